"""The adaptive rules: numpy beside them, the known traps, and their arguments."""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NO_LIMIT, cases, first_step, message_of, steps_of

import clipjax
from clipjax import rules

RULES = {
  "percentile": lambda: rules.percentile(50.0, window=5),
  "quantile_tracking": lambda: rules.quantile_tracking(0.5),
  "zscore": lambda: rules.zscore(warmup_steps=3),
  "rolling_sigma": lambda: rules.rolling_sigma(2.0, window=5),
  "ema_ratio": lambda: rules.ema_ratio(1.1, decay=0.9, warmup_steps=2, max_norm=2.0),
  "lower": lambda: rules.minimum(rules.zscore(warmup_steps=3), 1.5),
  "after": lambda: rules.delayed(2, rules.percentile(50.0, window=5)),
}
every_rule = pytest.mark.parametrize("name", sorted(RULES))


def run(rule, norms, make=clipjax.clip_by_global_norm, **options):
  """The states of a clip under a rule after gradients of these norms."""
  grads = [jnp.array([n], jnp.float32) for n in norms]
  return [state for _, state in steps_of(make(rule, **options), grads)]


def limits(rule, norms, **options):
  return np.array([float(np.min(s.max_norm)) for s in run(rule, norms, **options)])


def clipped_steps(rule, norms):
  """The numbers of the steps that were clipped."""
  counts = [0, *(int(s.clipped_steps) for s in run(rule, norms))]
  return [i for i, (before, now) in enumerate(itertools.pairwise(counts)) if now > before]


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", cases([0, 1, 6], slow=[1]))
def test_a_norm_that_is_not_finite_changes_nothing_later(name, bad, at):
  norms = [1.0, 1.2, 0.9, 1.1, 3.0, 1.0, 1.3, 0.7, 1.0]
  clean = run(RULES[name](), norms)[-1]
  dirty = run(RULES[name](), [*norms[:at], bad, bad, *norms[at:]])[-1]
  assert dirty.max_norm == clean.max_norm
  assert dirty.clipped_steps == clean.clipped_steps
  assert dirty.nonfinite_steps == 2


# Without a threshold in the unit of the gradient; quantile_tracking has nothing else.
SCALE_FREE = {name: rule for name, rule in RULES.items() if name != "quantile_tracking"} | {
  "ema_ratio": lambda: rules.ema_ratio(1.1, decay=0.9, warmup_steps=2, max_norm=math.inf),
  "lower": lambda: rules.minimum(rules.zscore(warmup_steps=3), rules.rolling_sigma(2.0, window=5)),
}


ALONE = RULES | SCALE_FREE  # The warm-up of ema_ratio with a limit looks at the norm of all leaves.


@pytest.mark.parametrize("name", sorted(SCALE_FREE))
@pytest.mark.parametrize("value", [1e-12, 0.1, 1.0, 1e6])
def test_constant_norms_clip_nothing(name, value):
  assert clipped_steps(SCALE_FREE[name](), [value] * 40) == []


@every_rule
def test_global_leaf_and_group_agree(name):
  norms = [1.0, 1.2, 0.9, 1.1, 3.0, 1.0, 1.3]
  label = lambda path, leaf: "all"  # noqa: E731
  by_global = run(RULES[name](), norms)[-1]
  for make in (
    clipjax.clip_by_leaf_norm,
    lambda rule: clipjax.clip_by_group_norm(rule, label),
    lambda rule: clipjax.clip_by_group_norm({"all": rule}, label),
  ):
    state = run(RULES[name](), norms, make)[-1]
    np.testing.assert_allclose([state.max_norm, state.scale], [[by_global.max_norm], [by_global.scale]], rtol=1e-6)
    assert state.clipped_steps == by_global.clipped_steps


@pytest.mark.parametrize(
  ("name", "x64"),
  cases(
    itertools.product(sorted(RULES), [False, True]),
    slow=lambda case: case[1] and case[0] not in ("ema_ratio", "percentile"),
  ),
  indirect=["x64"],
)
def test_leaves_do_not_mix_and_scan_and_vmap_agree(name, x64):
  rng = np.random.default_rng(0)
  norms = rng.lognormal(size=(12, 3)).astype(np.float32)
  rule = ALONE[name]()
  tx = clipjax.clip_by_leaf_norm(rule)
  grads = [jnp.asarray(norms[:, i : i + 1]) for i in range(3)]
  state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init([g[0] for g in grads]), grads)
  one = clipjax.clip_by_global_norm(rule)
  each = jnp.asarray(norms)[..., None]
  alone, _ = jax.lax.scan(
    lambda s, g: (jax.vmap(one.update)(g, s)[1], None), jax.jit(jax.vmap(one.init))(each[0]), each
  )
  np.testing.assert_allclose(state.max_norm, alone.max_norm, rtol=1e-5)
  assert {x.dtype for x in jax.tree.leaves(state.rule)} <= {jnp.dtype("int32"), jnp.dtype("bool"), state.norm.dtype}


# ZClip adds 1e-6 to a standard deviation, which it takes of squares.
@pytest.mark.parametrize(("name", "magnitudes"), [
  ("percentile", (1e-30, 1.0, 1e30)), ("quantile_tracking", (1e-30, 1.0, 1e30)), ("rolling_sigma", (1e-30, 1.0, 1e30)),
  ("ema_ratio", (1e-30, 1.0, 1e30)), ("zscore", (1.0, 1e3, 1e12)),
])  # fmt: skip
def test_each_norm_has_a_limit_in_its_own_magnitude(name, magnitudes):
  rule = ALONE[name]()
  rng = np.random.default_rng(0)
  norms = jnp.asarray(rng.lognormal(sigma=0.3, size=(30, 3)) * np.array(magnitudes), jnp.float32)

  def limits_of(norms):
    state = rule.init(norms.shape[1:], norms.dtype)
    return jax.lax.scan(lambda s, x: rule.update(x, s, global_norm=jnp.linalg.norm(x))[::-2], state, norms)[1]

  together, alone = limits_of(norms), [limits_of(norms[:, i]) for i in range(3)]
  np.testing.assert_allclose(together, np.stack(alone, axis=1), rtol=1e-5)
  assert np.isfinite(together[-1]).all()


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize("q", [0.0, 10.0, 50.0, 100.0])
def test_percentile_is_that_of_numpy(window, include_current, q):
  norms = np.random.default_rng(0).lognormal(size=20).astype(np.float32)
  got = limits(rules.percentile(q, window=window, include_current=include_current, min_count=1), norms)
  for i in range(20):
    seen = norms[max(0, i + 1 - window) : i + 1] if include_current else norms[max(0, i - window) : i]
    want = np.percentile(seen, q) if seen.size else NO_LIMIT
    np.testing.assert_allclose(got[i], want, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 50])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", cases([1e-25, 1.0, 1e25], slow=[1e-25]))
def test_rolling_sigma_is_that_of_numpy(window, ddof, scale):
  window = max(window, 1 + ddof)
  norms = (np.random.default_rng(0).lognormal(size=20) * scale).astype(np.float32)
  min_count, floor = min(3, window + 1), 0.01 * (scale == 1)
  got = limits(rules.rolling_sigma(2.0, window=window, ddof=ddof, std_floor=floor, min_count=min_count), norms)
  for i in range(20):
    seen = norms[max(0, i - window) : i].astype(np.float64)
    enough = seen.size + 1 >= min_count and seen.size > ddof
    want = seen.mean() + 2 * max(seen.std(ddof=ddof), floor) if enough else NO_LIMIT
    np.testing.assert_allclose(got[i], want, rtol=1e-5)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 2.5])
def test_the_warm_up_of_adagc_clips_the_whole_gradient_to_max_norm(max_norm):
  tx = clipjax.clip_by_leaf_norm(rules.ema_ratio(1.1, decay=0.9, warmup_steps=9, max_norm=max_norm))
  clipped, state = first_step(tx, [jnp.array([3.0]), jnp.array([4.0])])
  np.testing.assert_allclose(clipped, [[0.6 * max_norm], [0.8 * max_norm]], rtol=1e-6)
  np.testing.assert_allclose(state.max_norm, [0.6 * max_norm, 0.8 * max_norm], rtol=1e-6)
  small = [jnp.array([0.03]), jnp.array([0.04])]
  kept, state = tx.update(small, state)
  assert kept == small and (state.max_norm == NO_LIMIT).all()


@pytest.mark.parametrize(("rule", "waits"), [
  (rules.rolling_sigma(2.0, window=2, ddof=0, min_count=3), 2),
  (rules.percentile(50.0, window=8, min_count=4), 3),
  *((rules.rolling_sigma(window=w, ddof=0), n - 1) for w, n in ((2, 2), (4, 2), (5, 2), (6, 3), (8, 4), (9, 4))),
])  # fmt: skip
def test_min_count_holds_back_the_first_clips_by_default_for_half_a_window(rule, waits):
  np.testing.assert_array_equal(np.array(limits(rule, np.arange(1.0, 9.0))) == NO_LIMIT, np.arange(8) < waits)


def test_quantile_tracking_finds_the_quantile():
  norms = np.random.default_rng(0).lognormal(size=3000).astype(np.float32)
  tx = clipjax.clip_by_global_norm(rules.quantile_tracking(0.9, learning_rate=0.02))

  def step(state, grads):
    _, state = tx.update(grads, state)
    return state, state.max_norm

  state, seen = jax.lax.scan(step, tx.init(jnp.zeros(1)), jnp.asarray(norms)[:, None])
  assert 0.05 < state.clipped_steps / 3000 < 0.15
  np.testing.assert_allclose(np.median(seen[1000:]), np.quantile(norms, 0.9), rtol=0.1)


def test_quantile_tracking_worked_steps():
  state = run(rules.quantile_tracking(0.5), [5.0, 0.5])
  np.testing.assert_allclose([state[1].max_norm, state[1].rule], [math.exp(0.1), 1.0], rtol=1e-6)
  at_the_threshold = run(rules.quantile_tracking(0.5), [1.0])[-1]  # Taken for one under it.
  np.testing.assert_allclose(at_the_threshold.rule, math.exp(-0.1), rtol=1e-6)


@pytest.mark.parametrize("mode", ["reciprocal", "mean", "max"])
def test_zscore_targets(mode):
  norms = [0.9, 1.1, 0.9, 1.1]
  mean, std, z = 1.0, 0.1, (3.0 - 1.0) / (0.1 + 1e-6)
  want = {"reciprocal": mean + 2.5**2 / z * std, "mean": mean, "max": mean + 2.5 * std}[mode]
  state = run(rules.zscore(warmup_steps=4, mode=mode), [*norms, 3.0])[-1]
  np.testing.assert_allclose(3.0 * state.scale, want, rtol=1e-5)
  np.testing.assert_allclose(state.max_norm, mean + 2.5 * std, rtol=1e-5)


@pytest.mark.parametrize(("record", "seen"), [("clipped", 1.0), ("raw", 3.0), ("none", None)])
def test_zscore_records(record, seen):
  state = run(rules.zscore(warmup_steps=4, record=record, mode="mean"), [0.9, 1.1, 0.9, 1.1, 3.0])[-1].rule
  mean, variance = 1.0, 0.01
  if seen is not None:
    mean = 0.97 * mean + 0.03 * seen
    variance = 0.97 * variance + 0.03 * (seen - mean) ** 2
  np.testing.assert_allclose([state.mean, state.variance], [mean, variance], rtol=1e-5)


def test_a_spike_does_not_let_the_next_one_pass():
  norms = [0.9, 1.1, 0.9, 1.1, 1.0, 50.0, 50.0, 50.0]
  assert clipped_steps(rules.zscore(warmup_steps=4), norms) == [5, 6, 7]
  assert clipped_steps(rules.ema_ratio(1.2, decay=0.9, warmup_steps=2, max_norm=math.inf), norms)[-3:] == [5, 6, 7]
  # One that keeps raw norms widens its limit, until the spike has left the window.
  assert clipped_steps(rules.rolling_sigma(2.0, window=4), norms) == [5]


# Rule, and for how many of 200 steps it clips after the norms have risen for good: the numbers are those of the docs.
AFTER_A_RISE = {
  "percentile": (rules.percentile(90.0, window=50), 0, 40),
  "rolling_sigma": (rules.rolling_sigma(6.0, window=50), 0, 10),
  "zscore": (rules.zscore(), 200, 200),  # Locked in: every step to the end of the run.
  "zscore, guarded": (rules.zscore(restart_after=10), 0, 15),
  "quantile_tracking": (rules.quantile_tracking(0.9), 0, 100),
}


@pytest.mark.parametrize("times", [1.5, 2.0, 5.0])
@pytest.mark.parametrize("name", AFTER_A_RISE)
def test_lasting_rise_of_the_norm(name, times):
  rule, least, most = AFTER_A_RISE[name]
  norms = 1 + 0.05 * np.random.default_rng(0).standard_normal(300)
  norms[100:] *= times
  assert least <= sum(i >= 100 for i in clipped_steps(rule, norms)) <= most


def after_pairs(tx, pairs):
  """The last updates and state after gradients of two leaves."""
  return steps_of(tx, [[jnp.array([g]) for g in pair] for pair in pairs])[-1]


def test_guard_is_off_by_default_and_restarts_one_leaf_alone():
  tx = clipjax.clip_by_leaf_norm(rules.zscore(warmup_steps=3, restart_after=2))
  pairs = [(0.9, 1.0), (1.1, 1.0), (1.0, 1.0), (9.0, 1.0), (9.0, 1.0)]
  _, state = after_pairs(tx, pairs)
  np.testing.assert_array_equal(state.rule.seen, [0, 3])
  assert state.rule.mean[0] == 0
  assert after_pairs(tx, [*pairs, (9.0, 1.0)])[1].rule.mean[0] == 9


def test_leaf_that_is_zero_in_the_warm_up_of_adagc_learns_later():
  pairs = [(0.0, 0.5)] * 5
  for following, want, ema in (([], 0.0, 0.0), ([0.4], 0.4, 0.4), ([0.4, 4.0], 1.04 * 0.4, None)):
    # The first gradient other than 0 is under the global rule.
    updates, state = after_pairs(clipjax.adagc(warmup_steps=3, max_norm=1.0), [*pairs, *((g, 0.5) for g in following)])
    np.testing.assert_allclose(updates[0], want, rtol=1e-6)
    if ema is not None:
      np.testing.assert_allclose(state.rule.ema[0], ema, rtol=1e-6)


def test_adagc_starts_from_the_smallest_norm_of_its_warm_up():
  state = run(rules.ema_ratio(1.04, decay=0.99, warmup_steps=4, max_norm=1.0), [0.5, 0.2, 0.0, 0.4])[-1]
  np.testing.assert_allclose(state.rule.ema, 0.2, rtol=1e-6)


def test_an_average_fades_by_one_zero_and_no_further():
  state = run(None, [1.0] + [0.0] * 30, lambda _: clipjax.adagc(warmup_steps=1, decay=0.9))[-1]
  np.testing.assert_allclose(state.rule.ema, [0.9], rtol=1e-6)  # As in the paper; and a pause is no longer decay.
  state = run(None, [1.0] + [0.0] * 30 + [0.9, 0.0], lambda _: clipjax.adagc(warmup_steps=1, decay=0.9))[-1]
  np.testing.assert_allclose([*state.rule.ema, *state.norms, state.clipped_steps], [0.9, 0.0, 0], rtol=1e-6)


def test_zclip_cap_holds_in_the_warm_up_and_is_not_recorded():
  norms = [3.0, 3.2, 2.8, 3.1]
  state = run(None, norms, lambda _: clipjax.zclip(warmup_steps=4, max_norm=1.0))[-1]
  assert state.clipped_steps == 4
  np.testing.assert_allclose([state.norm_clipped, state.rule[0].mean], [1.0, np.mean(norms)], rtol=1e-6)


def test_lower_takes_the_lower_target():
  wide = rules.Rule(lambda s, d: (), lambda n, s, *, global_norm: (10.0, 1.0, s))
  for rule in (rules.minimum(wide, 5.0), rules.minimum(5.0, wide)):
    for norm, want in ((4.0, 4.0), (6.0, 5.0), (20.0, 1.0)):
      np.testing.assert_allclose(run(rule, [norm])[-1].norm_clipped, want, rtol=1e-6)


@pytest.mark.parametrize("spike", [1e6, 1e10, 1e20, 1e30, 3e38])
def test_a_huge_finite_spike_is_clipped_and_poisons_nothing(spike):
  norms = [0.9, 1.1] * 4
  # The limit does not depend on the norm that it is for.
  state = run(rules.rolling_sigma(6.0, window=8), [*norms, spike])[-1]
  want = np.mean(norms) + 6 * np.std(norms, ddof=1)
  np.testing.assert_allclose([state.max_norm, state.norm_clipped], want, rtol=1e-5)
  for rule in (rules.zscore(warmup_steps=8), rules.zscore(warmup_steps=8, record="raw"), rules.percentile(50.0)):
    states = run(rule, [*norms, spike, 1.0, 1.0])
    assert states[-1].nonfinite_steps == 0
    assert states[8].norm_clipped < 2
    assert states[-1].max_norm < NO_LIMIT
  warm = run(rules.zscore(warmup_steps=4), [1.0, spike, 1.0, 1.0, 1.0, 1.0])[-1]
  assert warm.nonfinite_steps == 0
  state = run(rules.ema_ratio(1.04, decay=0.99, warmup_steps=9, max_norm=1.0), [spike], clipjax.clip_by_leaf_norm)[-1]
  np.testing.assert_allclose(state.norm_clipped, 1.0, rtol=1e-6)


def test_after_counts_finite_steps_and_keeps_the_target_of_its_rule():
  rule = rules.Rule(lambda s, d: (), lambda n, s, *, global_norm: (1.0, 0.5, s))
  states = run(rules.delayed(2, rule), [3.0, math.nan, 3.0, 3.0])
  np.testing.assert_allclose([s.norm_clipped for s in states], [3.0, math.nan, 3.0, 0.5], rtol=1e-6)
  assert not run(rules.delayed(2**31 - 1, 1.0), [3.0])[-1].clipped_steps


def test_numbers_may_be_injected(standard_promotion):
  tx = optax.inject_hyperparams(clipjax.zclip, static_args=("warmup_steps",))(z_thresh=2.0, warmup_steps=2)
  state = tx.init(jnp.zeros(1))
  for g in (1.0, 1.1, 9.0):
    _, state = jax.jit(tx.update)(jnp.array([g]), state, jnp.zeros(1))
  assert clipjax.metrics(state)["grad/norm_clipped"] < 1.3
  assert message_of(lambda: optax.inject_hyperparams(clipjax.autoclip)().init(jnp.zeros(1)), TypeError) == (
    "`window` must be an integer >= 1, got int32[]: pass a Python integer; under `optax.inject_hyperparams`, name it "
    "in `static_args`."
  )


BAD_ARGUMENTS = [  # Where ranges end; that each argument is checked is in `test_bad_calls.py`.
  (lambda: rules.quantile_tracking(-0.1), "`quantile` must be a number >= 0 and <= 1, got -0.1"),
  (lambda: rules.zscore(restart_after=0), "`restart_after` must be an integer >= 1, got 0"),
  (lambda: clipjax.zclip(warmup_steps=0), "`warmup_steps` must be an integer >= 1, got 0"),
  (lambda: rules.percentile(10.0, window=5, min_count=6), "`min_count` must be an integer >= 1 and <= 5, got 6"),
  (lambda: rules.rolling_sigma(window=5, min_count=7), "`min_count` must be an integer >= 1 and <= 6, got 7"),
]


@pytest.mark.parametrize(("call", "text"), BAD_ARGUMENTS)
def test_argument_out_of_range(call, text):
  assert message_of(call) == f"{text}: choose one in that range."


PUBLISHED = {
  clipjax.autoclip: {"percentile": 10.0, "window": 1000, "include_current": True},
  clipjax.adagc: {"ratio": 1.04, "decay": 0.99, "warmup_steps": 100, "max_norm": 1.0},
  clipjax.adaptive_grad_clip: {"clipping": 0.01, "eps": 0.001, "axis": None},
  clipjax.zclip: {
    "z_thresh": 2.5, "decay": 0.97, "warmup_steps": 25, "mode": "reciprocal", "max_norm": None, "record": "clipped",
    "restart_after": None,
  },
  rules.zscore: {"z_thresh": 2.5, "decay": 0.97, "warmup_steps": 25, "mode": "reciprocal", "record": "clipped"},
  rules.percentile: {"window": 1000, "include_current": True, "min_count": 1},
  rules.rolling_sigma: {"sigma": 6.0, "window": 128, "ddof": 1, "std_floor": 0.0, "min_count": None},
  rules.quantile_tracking: {"learning_rate": 0.2, "initial": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("fn", PUBLISHED, ids=lambda fn: fn.__name__)
def test_defaults_are_those_that_the_docstring_gives_the_source_of(fn):
  defaults = {name: argument.default for name, argument in inspect.signature(fn).parameters.items()}
  for name, value in PUBLISHED[fn].items():
    assert defaults[name] == value and type(defaults[name]) is type(value), name
