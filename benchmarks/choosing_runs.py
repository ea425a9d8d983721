"""The runs of `choosing.py`: four models, unclipped and at thresholds from a sweep and from rules, 16 runs at once.

Each model first trains without a clip at 16 learning rates, of which the best is kept. A rule sees the norms of that
run, its rate and a rate 3 or 10 times as high, and gives the threshold for the latter. All that differs between the
lanes of the one jitted `vmap` is the threshold, the rate and whether some batches are poisoned; every run of a seed has
the same weights and batches.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_models import MODELS, Array, Model

import clipjax

LANES = 16  # Runs in one call.
FINAL = 10  # The final loss is the mean over so many last steps.
THRESHOLDS = 2.0 ** np.arange(-10, 6)
FACTORS = (3, 10)  # Fast rate over stable rate.
SGD_RATES = 2.0 ** np.arange(-7.5, 0.5, 0.5)
ADAM_RATES = 10.0 ** np.linspace(-4, -1, LANES)
MOMENTUM = 0.9

POISON_AT, POISON_WEIGHT = (0.5, 0.6, 0.7), 1000.0  # Shares of the run; the weight of the loss there.
JUMP_WINDOW = 20  # Steps after a poisoned batch in which the loss may jump.

Runs = tuple[Array, Array]  # Losses and norms of some runs, each of shape (runs, steps).
Rule = Callable[[Array, float], float]


def typical(norms: Array) -> Array:
  """A run without its first tenth, as `clipjax.runs.suggest_max_norm` takes it."""
  return norms[norms.size // 10 :]


def late(norms: Array) -> Array:
  """The later half of a run."""
  return norms[norms.size // 2 :]


# From the norms of an unclipped run and `k = new_learning_rate / learning_rate`; `FAMILY` needs the model's kind.
FAMILY = "table by model family"
RULES: dict[str, Rule] = {
  "no clip": lambda norms, k: math.inf,
  FAMILY: lambda norms, k: math.nan,
  "10 * mean": lambda norms, k: 10 * norms.mean(),
  "mean / 2": lambda norms, k: norms.mean() / 2,
  "p90": lambda norms, k: np.percentile(norms, 90),
  "p90 / k": lambda norms, k: np.percentile(norms, 90) / k,
  "p75 / k": lambda norms, k: (
    clipjax.runs.suggest_max_norm(norms, learning_rate=1.0, new_learning_rate=k, warmup_steps=0).max_norm
  ),
  "rms / k": lambda norms, k: math.sqrt(np.square(norms).mean()) / k,
  "mean / k": lambda norms, k: norms.mean() / k,
  "p50 / k": lambda norms, k: np.percentile(norms, 50) / k,
  "p10 / k": lambda norms, k: np.percentile(norms, 10) / k,
  "p90 of the later half / k": lambda norms, k: np.percentile(late(norms), 90) / k,
  "p90 / k^1.5": lambda norms, k: np.percentile(norms, 90) / k**1.5,
}
SUGGESTED = "p75 / k"  # What `clipjax.runs.suggest_max_norm` says; its warm-up is left out for every rule.
SOURCES, SOURCE_RULES = (-4, -2, 1), ("p90 / k", "p75 / k", "mean / k")  # Steps of the grid from the best rate.
GUARDS: dict[str, Rule] = {
  "p50": lambda norms, k: np.percentile(norms, 50),
  "p90": lambda norms, k: np.percentile(norms, 90),
  "p99": lambda norms, k: np.percentile(norms, 99),
  "2 * p90": lambda norms, k: clipjax.runs.suggest_max_norm(norms, scale_free=True, warmup_steps=0).max_norm,
  "4 * p90": lambda norms, k: 4 * np.percentile(norms, 90),
  "10 * p90": lambda norms, k: 10 * np.percentile(norms, 90),
  "100 * p90": lambda norms, k: 100 * np.percentile(norms, 90),
  "no clip": lambda norms, k: math.inf,
}


class Lane(NamedTuple):
  """One run."""

  max_norm: float
  learning_rate: float
  poisoned: bool = False


class Fast(NamedTuple):
  """What happened at one fast rate; arrays have one row for each seed.

  Attributes:
    sweep: final losses, shape (seeds, thresholds).
    thresholds: of each rule, shape (seeds,).
    rules: final losses of each rule, shape (seeds,).
    sources: of (rule, steps of the grid), from the norms of another rate than the best.
  """

  sweep: Array
  thresholds: dict[str, Array]
  rules: dict[str, Array]
  sources: dict[tuple[str, int], Array]


class Poisoned(NamedTuple):
  """What poisoned batches do at the best rate; arrays of shape (seeds,).

  Attributes:
    clean: final loss without poison and without a clip.
    guarded: final loss without poison, of each guard.
    final: final loss of each guard.
    jump: largest rise of the loss after a poisoned batch, of each guard.
  """

  clean: Array
  guarded: dict[str, Array]
  final: dict[str, Array]
  jump: dict[str, Array]


class Study(NamedTuple):
  """All that was measured on one model under one optimizer.

  Attributes:
    title: of the model.
    rates: the grid, and `grid` the final losses of its unclipped runs, shape (seeds, rates).
    stable: index of the best rate.
    fast: by factor; empty under Adam.
    sweep: final losses at the best rate, shape (seeds, thresholds).
    poisoned: the spikes.
  """

  title: str
  rates: Array
  grid: Array
  stable: int
  fast: dict[int, Fast]
  sweep: Array
  poisoned: Poisoned


def trainer(
  model: Model, optimizer: Callable[[jax.Array], optax.GradientTransformation], steps: int
) -> Callable[[Sequence[Lane], int], Runs]:
  """What trains some runs, 16 at a time in one compiled function."""
  spikes = jnp.asarray(spike_steps(steps))

  def train(data: Any, seed: jax.Array, max_norm: jax.Array, rate: jax.Array, poisoned: jax.Array) -> Any:
    tx = optax.chain(clipjax.clip_by_global_norm(max_norm), optimizer(rate))
    key_params, key_batches = jax.random.split(jax.random.key(seed))

    def step(carry: Any, i: jax.Array) -> Any:
      params, state = carry
      key = jax.random.fold_in(key_batches, i)
      bad = poisoned & (spikes == i).any()
      batch = model.batch(data, key)
      batch = jax.tree.map(lambda b, p: jnp.where(bad, p, b), batch, model.poison(batch, jax.random.fold_in(key, 1)))

      def weighted(params: Any) -> tuple[jax.Array, jax.Array]:
        loss = model.loss(params, batch)
        return loss * jnp.where(bad, POISON_WEIGHT, 1.0), loss

      grads, loss = jax.grad(weighted, has_aux=True)(params)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), (loss, state[0].norm)

    params = model.init(key_params)
    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[1]

  compiled = jax.jit(jax.vmap(train, in_axes=(None, None, 0, 0, 0)))
  data = model.data()

  def run(lanes: Sequence[Lane], seed: int) -> Runs:
    outs = []
    for start in range(0, len(lanes), LANES):
      chunk = list(lanes[start : start + LANES])
      max_norm, rate, poisoned = zip(*(chunk + chunk[-1:] * (LANES - len(chunk))), strict=True)
      out = compiled(data, jnp.uint32(seed), jnp.float32(max_norm), jnp.float32(rate), jnp.asarray(poisoned))
      outs.append([np.asarray(x, np.float64)[: len(chunk)] for x in out])
    losses, norms = zip(*outs, strict=True)
    return np.concatenate(losses), np.concatenate(norms)

  return run


def spike_steps(steps: int) -> Array:
  """The steps whose batches are poisoned."""
  return np.array([int(steps * share) for share in POISON_AT])


def final_loss(losses: Array) -> Array:
  """Mean of the last steps of each run; inf where that is not finite."""
  final = losses[..., -FINAL:].mean(-1)
  return np.where(np.isfinite(final), final, np.inf)


def largest_jump(losses: Array) -> Array:
  """Largest loss soon after a poisoned batch, less the mean of the steps before it; inf where it is not finite.

  The loss of the poisoned batch itself is left out: its targets are noise.
  """
  jumps, spikes = [], [*spike_steps(losses.shape[-1]), losses.shape[-1]]
  for i, following in pairwise(spikes):
    before = losses[..., max(0, i - FINAL) : i].mean(-1)
    jumps.append(losses[..., i + 1 : min(i + 1 + JUMP_WINDOW, following)].max(-1) - before)
  worst = np.max(jumps, axis=0)
  return np.where(np.isfinite(worst), worst, np.inf)


def threshold(name: str, model: Model, norms: Array, k: float) -> float:
  """What a rule gives; the table by family stands for its geometric middle."""
  return math.sqrt(math.prod(model.family)) if name == FAMILY else float(RULES[name](norms[np.isfinite(norms)], k))


def find_stable(run: Callable[[Sequence[Lane], int], Runs], rates: Array, seeds: int) -> tuple[Array, Array, int]:
  """Final losses and norms of unclipped runs by seed and rate, and the rate whose worst seed ends lowest."""
  runs = [run([Lane(math.inf, rate) for rate in rates], seed) for seed in range(seeds)]
  finals = np.stack([final_loss(losses) for losses, _ in runs])
  return finals, np.stack([norms for _, norms in runs]), int(finals.max(0).argmin())


def study(name: str, adam: bool, steps: int, seeds: int) -> Study:
  """Trains one model under one optimizer in every way."""
  model, rates = MODELS[name], ADAM_RATES if adam else SGD_RATES
  run = trainer(model, optax.adam if adam else lambda rate: optax.sgd(rate, momentum=MOMENTUM), steps)
  grid, norms, stable = find_stable(run, rates, seeds)
  rate = rates[stable]
  sources = {} if adam else {shift: min(max(stable + shift, 0), rates.size - 1) for shift in SOURCES}
  guards = GUARDS if adam else {name: GUARDS[name] for name in ("p90", "no clip")}
  rows = []
  for seed in range(seeds):
    clean = typical(norms[seed, stable])
    lanes = {("guard", g, bad): Lane(f(clean, 1.0), rate, bad) for g, f in guards.items() for bad in (True, False)}
    lanes |= {("sweep", c): Lane(c, rate) for c in THRESHOLDS if adam}
    for k in FACTORS if not adam else ():
      lanes |= {("fast", k, c): Lane(c, k * rate) for c in THRESHOLDS}
      lanes |= {("rule", k, r): Lane(threshold(r, model, clean, k), k * rate) for r in RULES}
      for shift, i in sources.items():
        lanes |= {
          ("source", k, r, shift): Lane(threshold(r, model, typical(norms[seed, i]), k * rate / rates[i]), k * rate)
          for r in SOURCE_RULES
        }
    losses, _ = run(list(lanes.values()), seed)
    rows.append((lanes, dict(zip(lanes, final_loss(losses), strict=True)), dict(zip(lanes, losses, strict=True))))

  def final(*key: Any) -> Array:
    return np.array([finals[key] for _, finals, _ in rows])

  fast = {
    k: Fast(
      np.stack([final("fast", k, c) for c in THRESHOLDS], 1),
      {r: np.array([lanes["rule", k, r].max_norm for lanes, _, _ in rows]) for r in RULES},
      {r: final("rule", k, r) for r in RULES},
      {(r, shift): final("source", k, r, shift) for shift in sources for r in SOURCE_RULES},
    )
    for k in (() if adam else FACTORS)
  }
  poisoned = Poisoned(
    grid[:, stable],
    {g: final("guard", g, False) for g in guards},
    {g: final("guard", g, True) for g in guards},
    {g: np.array([largest_jump(losses["guard", g, True]) for _, _, losses in rows]) for g in guards},
  )
  sweep = np.stack([final("sweep", c) for c in THRESHOLDS], 1) if adam else np.zeros((seeds, 0))
  return Study(model.title, rates, grid, stable, fast, sweep, poisoned)
