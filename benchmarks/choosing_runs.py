"""The runs of `choosing.py`: models trained without a clip, at thresholds of a sweep and by rules, 16 runs at once.

Each model first trains without a clip at 16 learning rates; the best one is the stable rate. A rule sees the norms and
losses of that run, and the factor k by which the rate will be multiplied, and returns a threshold. The lanes of the one
jitted `vmap` differ only in the threshold, the rate and whether some batches are poisoned; all runs of a seed have the
same weights and batches.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_models import Array, Model

import clipjax

LANES = 16  # Runs in one call.
FINAL = 10  # The final loss is the mean over the last tenth of the steps.
SWEEP = 2.0 ** np.arange(-6, 5)  # Thresholds in units of the power of two nearest to p90.
FACTORS = (1, 3, 10)  # New rate over stable rate.
MOMENTUM = 0.9

POISON_AT, POISON_WEIGHT = (0.5, 0.6, 0.7), 1000.0  # Places as shares of the run; the weight of the loss there.
JUMP_WINDOW = 20  # Steps after a poisoned batch in which the loss may jump.
ROLLING_PERCENTILE, ROLLING_WINDOW = 50.0, 100

Runs = tuple[Array, Array, Array]  # Losses, norms and step ratios of some runs, each of shape (runs, steps).


class Optimizer(NamedTuple):
  """An optimizer of the study.

  Attributes:
    title: its name on the page.
    make: `learning_rate -> transformation`.
    rates: the 16 rates from which the stable one is chosen.
    scale_free: whether it divides out the scale of the gradient.
  """

  title: str
  make: Callable[[Any], optax.GradientTransformation]
  rates: Array
  scale_free: bool


OPTIMIZERS = {
  "sgd": Optimizer("SGD", lambda rate: optax.sgd(rate, momentum=MOMENTUM), 2.0 ** np.arange(-13, 3), False),
  "adam": Optimizer("Adam", optax.adam, 10.0 ** np.linspace(-4, -0.5, LANES), True),
  "lion": Optimizer("Lion", optax.lion, 10.0 ** np.linspace(-5, -1.5, LANES), True),
}


class Record(NamedTuple):
  """What a rule may use.

  Attributes:
    norms: norms of the unclipped run at the stable rate.
    losses: losses of the same run.
    k: new rate over recorded rate.
    at_new: norms of the unclipped run at the rate of the grid nearest to the new one.
    scale_free: whether the optimizer divides out the scale of the gradient.
  """

  norms: Array
  losses: Array
  k: float
  at_new: Array
  scale_free: bool


def typical(norms: Array) -> Array:
  """A record without its first tenth."""
  return norms[norms.size // 10 :]


def advice(record: Record) -> float:
  """The threshold that `clipjax.runs.suggest_max_norm` suggests."""
  suggestion = clipjax.runs.suggest_max_norm(
    clipjax.runs.Run.from_arrays({"grad/norm": record.norms, "loss": record.losses}),
    learning_rate=1.0,
    new_learning_rate=float(record.k),
    scale_free=record.scale_free,
  )
  return suggestion.max_norm


def percentile(record: Record, q: float) -> float:
  """A percentile of the whole record."""
  return float(np.percentile(clean(record.norms), q))


NO_CLIP, P90, GUARD, BUDGET, ROLLING = "no clip", "p90", "2 * p90", "p75 / k", "rolling p50"
ADVICE, HIGHER, LOWER = "advice", ("2 * advice", "3 * advice"), ("advice / 2", "advice / 3")
P50, AT_NEW = "p50", "2 * p90 of the new rate"  # Only under a scale-free optimizer.
RULES: dict[str, Callable[[Record], float]] = {
  NO_CLIP: lambda record: math.inf,
  "1.0": lambda record: 1.0,
  P50: lambda record: percentile(record, 50),
  P90: lambda record: percentile(record, 90),
  GUARD: lambda record: 2 * percentile(record, 90),
  "10 * p90": lambda record: 10 * percentile(record, 90),
  BUDGET: lambda record: percentile(record, 75) / record.k,
  ROLLING: lambda record: math.nan,  # Its lanes use a rule of clipjax.
  AT_NEW: lambda record: 2 * float(np.percentile(at_new, 90)) if (at_new := clean(record.at_new)).size else math.inf,
  ADVICE: advice,
  HIGHER[0]: lambda record: 2 * advice(record),
  HIGHER[1]: lambda record: 3 * advice(record),
  LOWER[0]: lambda record: advice(record) / 2,
  LOWER[1]: lambda record: advice(record) / 3,
}
TRIED = {
  False: (NO_CLIP, "1.0", P90, GUARD, BUDGET, ROLLING, ADVICE, *HIGHER, *LOWER),
  True: (NO_CLIP, "1.0", P90, GUARD, BUDGET, ROLLING, AT_NEW, ADVICE, HIGHER[1], LOWER[1]),
}  # By whether the optimizer is scale-free.
GUARDS = (NO_CLIP, "1.0", P90, GUARD, "10 * p90", ROLLING)  # Against poisoned batches.
SOURCES = (-2, -1)  # Steps of the grid below the stable rate at which other records are taken.
STRETCH = (P50, P90, GUARD)  # Thresholds for which the length of a step is compared with the unclipped one.


def clean(norms: Array) -> Array:
  """The finite norms after the first tenth."""
  norms = typical(norms)
  return norms[np.isfinite(norms)]


class Lane(NamedTuple):
  """One run."""

  max_norm: float
  learning_rate: float
  poisoned: bool = False
  rolling: bool = False


class Cell(NamedTuple):
  """The results at one rate; arrays have one row per seed.

  Attributes:
    sweep: final losses, shape (seeds, thresholds).
    thresholds: threshold of each rule, shape (seeds,).
    rules: final losses of each rule, shape (seeds,).
    sources: final losses with the budget from another record, by steps of the grid.
  """

  sweep: Array
  thresholds: dict[str, Array]
  rules: dict[str, Array]
  sources: dict[int, Array]


class Poisoned(NamedTuple):
  """The effect of poisoned batches at the stable rate; arrays have shape (seeds,).

  Attributes:
    final: final loss with each guard.
    jump: largest rise of the loss after a poisoned batch with each guard.
  """

  final: dict[str, Array]
  jump: dict[str, Array]


class Study(NamedTuple):
  """Everything measured on one model under one optimizer.

  Attributes:
    title: title of the model.
    optimizer: key of the optimizer in `OPTIMIZERS`.
    rates: the grid of rates; `grid` has the final losses of its unclipped runs, shape (seeds, rates).
    stable: index of the stable rate.
    start: the loss before the first step, median over the seeds.
    p90: 90th percentile of the norms at the stable rate, shape (seeds,).
    thresholds: thresholds of the sweep.
    cells: results by factor.
    poisoned: results with poisoned batches.
    stretch: length of a step over the length of the unclipped step, by threshold, shape (seeds, steps).
  """

  title: str
  optimizer: str
  rates: Array
  grid: Array
  stable: int
  start: float
  p90: Array
  thresholds: Array
  cells: dict[int, Cell]
  poisoned: Poisoned
  stretch: dict[str, Array]


def trainer(
  model: Model, optimizer: Callable[[Any], optax.GradientTransformation], steps: int, lanes: int = LANES
) -> Callable[[Sequence[Lane], int], Runs]:
  """A function that trains runs, `lanes` at a time in one compiled call."""
  spikes = jnp.asarray(spike_steps(steps))

  def train(data: Any, seed: jax.Array, lane: Lane) -> Any:
    clip = clipjax.clip_by_global_norm(fixed_or_rolling(lane.max_norm, lane.rolling))
    plain = optimizer(lane.learning_rate)
    key_params, key_batches = jax.random.split(jax.random.key(seed))

    def step(carry: Any, i: jax.Array) -> Any:
      params, clip_state, state, beside = carry
      key = jax.random.fold_in(key_batches, i)
      bad = lane.poisoned & (spikes == i).any()
      batch = model.batch(data, key)
      batch = jax.tree.map(lambda b, p: jnp.where(bad, p, b), batch, model.poison(batch, jax.random.fold_in(key, 1)))

      def weighted(params: Any) -> tuple[jax.Array, jax.Array]:
        loss = model.loss(params, batch)
        return loss * jnp.where(bad, POISON_WEIGHT, 1.0), loss

      grads, loss = jax.grad(weighted, has_aux=True)(params)
      clipped, clip_state = clip.update(grads, clip_state)
      updates, state = plain.update(clipped, state, params)
      unclipped, beside = plain.update(grads, beside, params)  # The step that the unclipped gradient would have made.
      ratio = optax.global_norm(updates) / optax.global_norm(unclipped)
      return (optax.apply_updates(params, updates), clip_state, state, beside), (loss, clip_state.norm, ratio)

    params = model.init(key_params)
    carry = (params, clip.init(params), plain.init(params), plain.init(params))
    return jax.lax.scan(step, carry, jnp.arange(steps))[1]

  compiled = jax.jit(jax.vmap(train, in_axes=(None, None, 0)))
  data = model.data()

  def run(wanted: Sequence[Lane], seed: int) -> Runs:
    outs = []
    for start in range(0, len(wanted), lanes):
      chunk = list(wanted[start : start + lanes])
      columns = zip(*(chunk + chunk[-1:] * (lanes - len(chunk))), strict=True)
      arrays = (np.asarray(x, np.bool_ if isinstance(x[0], bool) else np.float32) for x in columns)
      outs.append([np.asarray(x, np.float64)[: len(chunk)] for x in compiled(data, jnp.uint32(seed), Lane(*arrays))])
    losses, norms, ratios = zip(*outs, strict=True)
    return np.concatenate(losses), np.concatenate(norms), np.concatenate(ratios)

  return run


def fixed_or_rolling(max_norm: Any, rolling: Any) -> clipjax.rules.Rule:
  """A rule with a fixed threshold or, if `rolling`, with the median of the last norms."""
  inner = clipjax.rules.percentile(ROLLING_PERCENTILE, window=ROLLING_WINDOW)

  def update(norms: jax.Array, state: Any, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    limit, _, state = inner.update(norms, state, global_norm=global_norm)
    limit = jnp.where(rolling, limit, max_norm)
    return limit, limit, state

  return clipjax.rules.Rule(inner.init, update)


def spike_steps(steps: int) -> Array:
  """The steps whose batches are poisoned."""
  return np.array([int(steps * share) for share in POISON_AT])


def final_loss(losses: Array) -> Array:
  """Mean over the last tenth of each run; inf if nonfinite."""
  final = losses[..., -max(losses.shape[-1] // FINAL, 1) :].mean(-1)
  return np.where(np.isfinite(final), final, np.inf)


def largest_jump(losses: Array) -> Array:
  """Largest loss soon after a poisoned batch, minus the mean of the steps before it; inf if nonfinite.

  The loss of the poisoned batch itself is left out, as its targets are noise.
  """
  jumps, spikes = [], [*spike_steps(losses.shape[-1]), losses.shape[-1]]
  for i, following in pairwise(spikes):
    before = losses[..., max(0, i - JUMP_WINDOW) : i].mean(-1)
    jumps.append(losses[..., i + 1 : min(i + 1 + JUMP_WINDOW, following)].max(-1) - before)
  worst = np.max(jumps, axis=0)
  return np.where(np.isfinite(worst), worst, np.inf)


def study(model: Model, optimizer: str, steps: int, seeds: int) -> Study:
  """Trains one model under one optimizer in all ways."""
  kind = OPTIMIZERS[optimizer]
  run, rates = trainer(model, kind.make, steps), kind.rates
  free = [run([Lane(math.inf, rate) for rate in rates], seed) for seed in range(seeds)]
  grid = np.stack([final_loss(losses) for losses, _, _ in free])
  stable = int(grid.max(0).argmin())
  p90 = np.array([np.percentile(typical(norms[stable]), 90) for _, norms, _ in free])
  start = float(np.median([losses[stable, 0] for losses, _, _ in free]))
  thresholds = SWEEP * 2.0 ** np.round(np.log2(np.median(p90)))
  rows = []
  for seed, (losses, norms, _) in enumerate(free):
    lanes = lanes_of(kind, norms, losses, stable, thresholds)
    trained, _, ratios = run(list(lanes.values()), seed)
    rows.append((lanes, dict(zip(lanes, trained, strict=True)), dict(zip(lanes, ratios, strict=True))))
  return Study(model.title, optimizer, rates, grid, stable, start, p90, thresholds, *measured(rows, thresholds))


def lanes_of(kind: Optimizer, norms: Array, losses: Array, stable: int, thresholds: Array) -> dict[Any, Lane]:
  """All runs of one seed, by purpose."""
  rates = kind.rates
  rate = float(rates[stable])

  def record(k: float, at: int = stable) -> Record:
    new = int(np.abs(np.log(rates / (k * rates[at]))).argmin())
    return Record(norms[at], losses[at], k, norms[new], kind.scale_free)

  lanes: dict[Any, Lane] = {}
  for k in FACTORS:
    lanes |= {("sweep", k, i): Lane(c, k * rate) for i, c in enumerate(thresholds)}
    lanes |= {("rule", k, name): lane_of(name, record(k), k * rate) for name in TRIED[kind.scale_free]}
    for shift in SOURCES if not kind.scale_free and k > 1 else ():
      at = min(max(stable + shift, 0), rates.size - 1)
      lanes["source", k, shift] = lane_of(ADVICE, record(k * rate / rates[at], at), k * rate)
  lanes |= {("poison", name): lane_of(name, record(1), rate)._replace(poisoned=True) for name in GUARDS}
  if kind.scale_free:
    lanes |= {("stretch", name): Lane(RULES[name](record(1)), rate) for name in STRETCH}
  return lanes


def lane_of(name: str, record: Record, rate: float) -> Lane:
  """The run for a rule of `RULES`."""
  return Lane(math.inf if name == ROLLING else RULES[name](record), rate, rolling=name == ROLLING)


def measured(rows: list[Any], thresholds: Array) -> tuple[dict[int, Cell], Poisoned, dict[str, Array]]:
  """The runs of all seeds as fields of a `Study`."""

  def final(*key: Any) -> Array:
    return np.array([float(final_loss(losses[key])) for _, losses, _ in rows])

  rules = [name for name in RULES if ("rule", FACTORS[0], name) in rows[0][0]]  # In table order.
  cells = {
    k: Cell(
      np.stack([final("sweep", k, i) for i in range(thresholds.size)], 1),
      {name: np.array([lanes["rule", k, name].max_norm for lanes, _, _ in rows]) for name in rules},
      {name: final("rule", k, name) for name in rules},
      {shift: final("source", k, shift) for shift in SOURCES if ("source", k, shift) in rows[0][0]},
    )
    for k in FACTORS
  }
  poisoned = Poisoned(
    {name: final("poison", name) for name in GUARDS},
    {name: np.array([float(largest_jump(losses["poison", name])) for _, losses, _ in rows]) for name in GUARDS},
  )
  stretch = {
    name: np.stack([ratios["stretch", name] for _, _, ratios in rows])
    for name in STRETCH
    if ("stretch", name) in rows[0][0]
  }
  return cells, poisoned, stretch
