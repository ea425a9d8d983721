"""Runs of a million steps, counters at the end of int32, and the memory of a process that records."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases

import clipjax
from clipjax import rules
from clipjax.rules.base import StepCount

STEPS = 1_000_000
LAST = 2**31 - 1


@pytest.fixture(scope="module")
def norms():
  """Norms of which some are large and a few are no number; none is so near 1 that rounding could decide."""
  drawn = np.random.default_rng(0).lognormal(sigma=0.5, size=STEPS).astype(np.float32)
  drawn[np.abs(drawn - 1) < 1e-4] = 2.0
  drawn[::99_991] = math.nan
  return drawn


def after(tx, norms, state=None):
  """The state after gradients of these norms, in one scan."""
  start = tx.init(jnp.zeros(1)) if state is None else state

  @jax.jit
  def run(state):
    return jax.lax.scan(lambda s, norm: (tx.update(norm[None], s, jnp.ones(1))[1], None), state, jnp.asarray(norms))[0]

  return jax.device_get(run(start))


def test_counts_and_history_of_a_million_steps(norms):
  clip, watch = after(optax.chain(clipjax.clip_by_global_norm(1.0), clipjax.watch(history=7)), norms)
  bad = np.isnan(norms)
  assert (clip.steps, watch.steps) == (STEPS, STEPS)
  assert clip.nonfinite_steps == watch.nonfinite_steps == bad.sum() == 11
  assert clip.clipped_steps == (norms > 1).sum()
  seen = clipjax.metrics(clip)
  np.testing.assert_allclose(seen["grad/clip_fraction"], (norms > 1).mean(), rtol=1e-6)
  # The watch sees what the clip left; the norm of step i is at (i - 1) % 7.
  want = np.minimum(norms, 1)[-7:]
  np.testing.assert_allclose(watch.history[np.arange(STEPS - 7, STEPS) % 7], want, rtol=1e-6)
  assert watch.worst_step == 1 and math.isnan(watch.worst_norm)


@pytest.mark.parametrize("window", cases([32, 50], {50}))
def test_rings_hold_the_last_norms_after_many_steps(norms, window):
  norms = norms[:200_000]  # A ring that has wrapped around thousands of times.
  finite = norms[~np.isnan(norms)]
  for rule in (rules.percentile(90.0, window=window), rules.rolling_sigma(6.0, window=window)):
    ring = after(clipjax.clip_by_global_norm(rule), norms).rule
    assert (ring.next, ring.filled) == (finite.size % window, window)
    np.testing.assert_array_equal(np.roll(ring.values, -ring.next), finite[-window:])


def test_mean_and_variance_of_zscore_are_those_of_float64_after_a_million_steps(norms):
  decay, warmup, mean, variance = 0.97, 25, 0.0, 0.0
  finite = norms[~np.isnan(norms)].astype(float).tolist()
  clipped = 0
  for i, norm in enumerate(finite):
    if i < warmup:
      first = finite[: i + 1]
      mean, variance = (float(f(first)) for f in (np.mean, np.var))
      continue
    std = math.sqrt(variance)
    if norm > mean + 2.5 * std:
      clipped += 1
      norm = mean + 2.5**2 / ((norm - mean) / (std + 1e-6)) * std
    mean = decay * mean + (1 - decay) * norm
    variance = decay * variance + (1 - decay) * (norm - mean) ** 2
  state = after(clipjax.clip_by_global_norm(rules.zscore()), norms)
  np.testing.assert_allclose([state.rule.mean, state.rule.variance], [mean, variance], rtol=1e-4)
  assert abs(int(state.clipped_steps) - clipped) <= 3  # A norm at the limit, to rounding.


def test_average_of_ema_ratio_is_that_of_float64_after_a_million_steps(norms):
  # The million steps of the averages that a leaf of AdaGC keeps: each is that of the norms as they were clipped.
  ratio, decay, warmup, ema = 1.05, 0.98, 100, math.inf
  for i, norm in enumerate(norms[~np.isnan(norms)].astype(float).tolist()):
    ema = min(ema, norm, 1.0) if i < warmup else decay * ema + (1 - decay) * min(norm, ratio * ema)
  rule = rules.ema_ratio(ratio, decay=decay, warmup_steps=warmup, max_norm=1.0)
  np.testing.assert_allclose(after(clipjax.clip_by_leaf_norm(rule), norms).rule.ema, [ema], rtol=1e-4)


def test_quantile_tracking_is_at_its_quantile_after_a_million_steps(norms):
  state = after(clipjax.clip_by_global_norm(rules.quantile_tracking(0.9, learning_rate=0.01)), norms)
  np.testing.assert_allclose(1 - state.clipped_steps / STEPS, 0.9, atol=1e-3)
  np.testing.assert_allclose(state.rule, np.nanquantile(norms, 0.9), rtol=0.1)


@pytest.mark.usefixtures("standard_promotion")  # Adam needs it.
def test_skips_of_a_million_steps(norms):
  tx = clipjax.skip_steps(optax.adam(1e-3), norm_rule=rules.minimum(1.0, rules.rolling_sigma(window=32)))
  state = after(tx, norms)
  assert state.steps == STEPS
  assert state.skipped_steps >= (~(norms <= 1)).sum()
  assert state.inner_state[0].count == STEPS - state.skipped_steps  # Adam counts those alone that reach it.
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner_state))


# The end of int32 ---------------------------------------------------------------------------------------------------

COUNTS = ("steps", "clipped_steps", "nonfinite_steps", "skipped_steps", "consecutive")
MANY = {
  "clip_by_global_norm": lambda: clipjax.clip_by_global_norm(1.0),
  "clip_by_leaf_norm with a schedule": lambda: clipjax.clip_by_leaf_norm(optax.constant_schedule(1.0)),
  "adaptive_grad_clip": lambda: clipjax.adaptive_grad_clip(0.5),
  "zclip": lambda: clipjax.zclip(warmup_steps=2),
  "adagc": lambda: clipjax.adagc(warmup_steps=2),
  "watch": lambda: clipjax.watch(history=4),
  "skip_steps": lambda: clipjax.skip_steps(optax.identity(), norm_rule=1.0),
}


def near_the_end(state):
  """The state with every count of steps 3 before the last int32."""
  if isinstance(state, StepCount):
    return StepCount(jnp.int32(LAST - 3))
  if not hasattr(state, "_fields"):
    return state
  counts = {name: jnp.int32(LAST - 3) for name in COUNTS if name in state._fields}
  parts = {name: near_the_end(getattr(state, name)) for name in ("rule", "norm_rule") if name in state._fields}
  return state._replace(**counts, **parts)


@pytest.mark.parametrize("bad", [math.nan, 5.0])
@pytest.mark.parametrize("name", sorted(MANY))
def test_counts_stay_at_the_end_of_int32(name, bad):
  tx = MANY[name]()
  state = after(tx, np.array([bad, 0.5, bad] * 4, np.float32), near_the_end(tx.init(jnp.zeros(1))))
  found = [getattr(state, count) for count in COUNTS if count in state._fields]
  assert state.steps == LAST
  assert min(found) >= 0
  for key, value in clipjax.metrics(state).items():
    if key.endswith("fraction"):
      assert 0 <= value <= 1, key
  if isinstance(getattr(state, "rule", None), StepCount):
    assert state.rule.schedule_count == LAST


# The memory of the host ---------------------------------------------------------------------------------------------

RECORDING = """
import pathlib, sys, tracemalloc
import jax, jax.numpy as jnp, numpy as np, optax, clipjax
tx = optax.chain(clipjax.watch(history=8), clipjax.clip_by_global_norm(1.0), clipjax.watch(name="update"))
params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
state = tx.init(params)
update = jax.jit(lambda state: tx.update(params, state, params)[1])
pushes, path = int(sys.argv[1]), pathlib.Path(sys.argv[2])
def resident():
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
with clipjax.runs.Recorder(path) as recorder:
  for i in range(pushes):
    if i == pushes // 5:
      recorder.flush()
      tracemalloc.start()
      before = resident()
    state = update(state)
    recorder.push(i, state, params=params, loss=0.5, examples=8)
  recorder.flush()
  grown = resident() - before
  traced, _ = tracemalloc.get_traced_memory()
print(grown, traced, sum(1 for _ in path.open()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("pushes", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_is_flat_while_a_run_is_recorded(pushes, tmp_path):
  command = [sys.executable, "-c", RECORDING, str(pushes), str(tmp_path / "run.jsonl")]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
  grown, traced, rows = map(int, done.stdout.split())
  assert rows >= pushes
  assert grown < 2e6 and traced < 3.5e5, (grown, traced)
