"""The adaptive rules: thresholds that follow the norms of the run, in states of fixed shape.

Every rule works element by element, so that one serves the global norm, leaves and groups. Only finite norms reach a
state: the engine keeps it where a step is not finite. Numbers may be traced, but for those that fix a shape.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from clipjax import _norms
from clipjax._rule import Rule, check_choice, check_flag, check_number, check_whole


class Ring(NamedTuple):
  """The last norms, for a rule with a window.

  Attributes:
    values: shape (window, *shape of the norms), in the order of writing, which wraps.
    next: int32, shape (): the row to write next.
    filled: int32, shape (): the rows written so far, at most `window`.
  """

  values: jax.Array
  next: jax.Array
  filled: jax.Array

  @classmethod
  def empty(cls, window: int, shape: tuple[int, ...], dtype: Any) -> "Ring":
    """A ring of no norms."""
    return cls(jnp.zeros((window, *shape), dtype), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def push(self, norms: jax.Array) -> "Ring":
    """The ring with one row more, or the oldest one replaced."""
    window = self.values.shape[0]
    return Ring(
      lax.dynamic_update_index_in_dim(self.values, norms, self.next, 0),
      (self.next + 1) % window,
      jnp.minimum(self.filled + 1, window),
    )

  @property
  def is_filled(self) -> jax.Array:
    """Which rows hold a norm, shape (window, 1, ...)."""
    rows = jnp.arange(self.values.shape[0], dtype=jnp.int32) < self.filled
    return rows.reshape(-1, *(1,) * (self.values.ndim - 1))

  def or_else(self, filler: float) -> jax.Array:
    """The values, with a filler in the rows that hold none."""
    return jnp.where(self.is_filled, self.values, filler)


export.register_namedtuple_serialization(Ring, serialized_name="clipjax.rules.Ring")


def percentile(percentile: float, *, window: int = 1000, include_current: bool = True, min_count: int = 1) -> Rule:
  """The rule of AutoClip: limit and target are a percentile of the last norms, linearly interpolated.

  The ring holds norms before the clip, so that the threshold follows a lasting rise within the window: at percentile
  90 of 50 norms, 32 of the 200 steps after it are clipped (docs/methods.md). Of constant norms nothing is clipped. A
  norm of 0 is one like any other; with fewer than `min_count` norms nothing is clipped.

  Args:
    percentile: between 0 and 100.
    window: norms to look back on, the current one included; memory is `4 * window` bytes for each norm, 4 kB for the
      default, sorted at every step. `quantile_tracking` is the same idea in 4 bytes.
    include_current: whether the current norm is among those of which the percentile is taken.
    min_count: norms to see before the first clip, the current one included; at most `window`.

  Returns:
    A `Rule`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if one is no Python number.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(clipjax.rules.percentile(50.0, window=3))
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0, 8.0):
    ...   clipped, state = tx.update(jnp.array([g]), state)
    ...   print(clipped)
    [1.]
    [2.]
    [3.]

  References:
    Seetharaman et al., AutoClip: adaptive gradient clipping for source separation networks, 2020,
    https://arxiv.org/abs/2007.14469; algorithm 1, which keeps every norm.
  """
  check_number(percentile, "percentile", 0, 100)
  check_whole(window, "window", 1)
  check_whole(min_count, "min_count", 1, window)
  check_flag(include_current, "include_current")

  def init(shape: tuple[int, ...], dtype: Any) -> Ring:
    return Ring.empty(window, shape, dtype)

  def update(norms: jax.Array, ring: Ring, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Ring]:
    del global_norm
    pushed = ring.push(norms)
    seen = pushed if include_current else ring
    ordered = jnp.sort(seen.or_else(jnp.inf), axis=0)
    last = jnp.maximum(seen.filled - 1, 0)
    place = last.astype(norms.dtype) * (jnp.asarray(percentile, norms.dtype) / 100)
    low = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, last)
    at_low, at_high = (jnp.where(seen.filled > 0, ordered[i], 0) for i in (low, jnp.minimum(low + 1, last)))
    limit = at_low + (place - low.astype(norms.dtype)) * (at_high - at_low)
    limit = jnp.where((ring.filled + 1 >= min_count) & (seen.filled > 0), limit, jnp.inf)
    return limit, limit, pushed

  return Rule(init, update)


def quantile_tracking(quantile: float, *, learning_rate: float = 0.2, initial: float = 1.0) -> Rule:
  """The rule that moves one number towards a quantile of the norms: `C <- C * exp(-lr * (1[norm <= C] - q))`.

  O(1) memory, against the ring of `percentile`. C is used before it moves, and stays positive; a norm of 0 counts as
  one under it. A lasting rise is followed at `learning_rate * quantile` in log C a step: at quantile 0.9, 23 to 29 of
  the 200 steps after it are clipped (docs/methods.md).

  Args:
    quantile: the share of norms that should be at or under the threshold, between 0 and 1.
    learning_rate: step in log C, > 0 and finite.
    initial: C at the first step, > 0 and finite.

  Returns:
    A `Rule` whose state is C.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if one is no Python number.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(clipjax.rules.quantile_tracking(0.5))
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):
    ...   clipped, state = tx.update(jnp.array([2.0]), state)
    ...   print(f"{clipped[0]:.3f}")
    1.000
    1.105
    1.221

  References:
    Andrew et al., Differentially private learning with adaptive clipping, 2021, https://arxiv.org/abs/1905.03871;
    section 2, the geometric update, without its noise.
  """
  check_number(quantile, "quantile", 0, 1)
  check_number(learning_rate, "learning_rate", 0, math.inf, open_low=True, finite=True)
  check_number(initial, "initial", 0, math.inf, open_low=True, finite=True)

  def init(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.full(shape, initial, dtype)

  def update(norms: jax.Array, c: jax.Array, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    del global_norm
    under = (norms <= c).astype(norms.dtype)
    rate, q = jnp.asarray(learning_rate, c.dtype), jnp.asarray(quantile, c.dtype)
    moved = c * jnp.exp(-rate * (under - q))
    # Never 0 and never inf, from which no factor leads back.
    info = jnp.finfo(norms.dtype)
    return c, c, jnp.clip(moved, float(info.tiny), float(info.max))

  return Rule(init, update)


class ZScoreState(NamedTuple):
  """The state of `zscore`; every field has the shape of the norms.

  Attributes:
    mean: mean of the norms so far, exponentially weighted after the warm-up.
    variance: their variance, likewise.
    seen: int32: norms so far, up to `warmup_steps`.
    in_a_row: int32: clipped steps since the last one that was not; counted with `restart_after` only.
  """

  mean: jax.Array
  variance: jax.Array
  seen: jax.Array
  in_a_row: jax.Array


export.register_namedtuple_serialization(ZScoreState, serialized_name="clipjax.rules.ZScoreState")


def zscore(
  z_thresh: float = 2.5,
  *,
  decay: float = 0.97,
  warmup_steps: int = 25,
  mode: str = "reciprocal",
  record: str = "clipped",
  restart_after: int | None = None,
) -> Rule:
  """The rule of ZClip: clips norms whose z-score, `(norm - mean) / (std + 1e-6)`, is above `z_thresh`.

  The limit is `mean + z_thresh * std`; the target is `mean + z_thresh^2 / z * std` ("reciprocal": the larger the
  spike, the nearer to the mean), `mean` ("mean") or `mean + z_thresh * std` ("max"). The 1e-6 has the unit of the norm:
  much smaller norms are never clipped. During the warm-up nothing is clipped:
  add a cap with `lower(zscore(...), constant(1.0))`. Of constant norms nothing is clipped.

  With "clipped" statistics a lasting rise of the norm beyond the limit locks the rule in: each step is clipped to about
  the old level, which the statistics then see. In the experiment of docs/methods.md, norms of 1 with a deviation of
  5% that rise 1.5, 2 or 5 times, all 200 steps after the rise are clipped; with `restart_after=10`, 13 of them. The
  guard is off by default, as in the paper.

  Args:
    z_thresh: z-score of the limit, > 0.
    decay: weight of the past in mean and variance, between 0 and 1.
    warmup_steps: finite steps whose plain mean and variance start the averages, >= 1.
    mode: "reciprocal", "mean" or "max".
    record: what the statistics see of a clipped norm: what it was "clipped" to, the "raw" norm, or "none".
    restart_after: clipped steps in a row after which the warm-up starts again; None never does.

  Returns:
    A `Rule` with a `ZScoreState`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if one is no Python number.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(clipjax.rules.zscore(warmup_steps=4))
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (0.9, 1.1, 0.9, 1.1, 5.0):
    ...   clipped, state = tx.update(jnp.array([g]), state)
    >>> print(f"{clipped[0]:.4f}")
    1.0156

  References:
    Kumar et al., ZClip: adaptive spike mitigation for LLM pre-training, 2025, https://arxiv.org/abs/2504.02507;
    section 3. Where they differ, this follows the authors' code: its 1e-6, and the variance about the new mean.
  """
  check_number(z_thresh, "z_thresh", 0, math.inf, open_low=True)
  check_number(decay, "decay", 0, 1)
  check_whole(warmup_steps, "warmup_steps", 1)
  check_choice(mode, "mode", ("reciprocal", "mean", "max"))
  check_choice(record, "record", ("clipped", "raw", "none"))
  if restart_after is not None:
    check_whole(restart_after, "restart_after", 1)

  def init(shape: tuple[int, ...], dtype: Any) -> ZScoreState:
    return ZScoreState(*(jnp.zeros(shape, d) for d in (dtype, dtype, jnp.int32, jnp.int32)))

  def update(
    norms: jax.Array, state: ZScoreState, *, global_norm: jax.Array
  ) -> tuple[jax.Array, jax.Array, ZScoreState]:
    del global_norm
    z_limit, past = jnp.asarray(z_thresh, norms.dtype), jnp.asarray(decay, norms.dtype)
    warm = state.seen < warmup_steps
    std = _norms.root_or_zero(state.variance)
    limit = jnp.where(warm, jnp.inf, state.mean + z_limit * (std + 1e-6))
    clipped = norms > limit
    if mode == "reciprocal":
      z = jnp.where(clipped, _norms.quotient(norms - state.mean, std + 1e-6), 1)
      target = state.mean + z_limit * (z_limit / z) * std
    else:
      target = state.mean if mode == "mean" else state.mean + z_limit * std
    target = jnp.where(clipped, jnp.minimum(target, limit), limit)
    x = norms if record == "raw" else jnp.where(clipped, target, norms)
    # One whose square is no number any more would leave a variance of inf, and a limit of NaN, for good.
    x = jnp.minimum(x, float(jnp.finfo(x.dtype).max) ** 0.5 / 2)
    seen = jnp.minimum(state.seen + 1, warmup_steps)
    # Written as steps from the old mean, so that constant norms leave it as it is. In the warm-up the weight 1 / count
    # gives the plain mean and the population variance (Welford).
    weight = jnp.where(warm, 1 / seen.astype(norms.dtype), 1 - past)
    mean = state.mean + weight * (x - state.mean)
    about = jnp.where(warm, (x - state.mean) * (x - mean), jnp.square(x - mean))
    variance = state.variance + weight * (about - state.variance)
    if record == "none":
      mean = jnp.where(clipped, state.mean, mean)
      variance = jnp.where(clipped, state.variance, variance)
    in_a_row = jnp.where(clipped, state.in_a_row + 1, 0)
    new = ZScoreState(mean, variance, seen, in_a_row if restart_after is not None else state.in_a_row)
    if restart_after is not None:
      locked = in_a_row >= restart_after
      new = ZScoreState(*(jnp.where(locked, jnp.zeros((), v.dtype), v) for v in new))
    return limit, target, new

  return Rule(init, update)


def rolling_sigma(
  sigma: float = 6.0, *, window: int = 128, ddof: int = 1, std_floor: float = 0.0, min_count: int | None = None
) -> Rule:
  """The rule that clips above `mean + sigma * std` of the last norms, the current one not among them, to that limit.

  The ring holds norms before the clip, so that a lasting rise is soon within the limit: 2 of the 200 steps after it
  are clipped (docs/methods.md). For the same reason a spike widens the limit until it leaves the window. Of constant
  norms nothing is clipped.

  Args:
    sigma: standard deviations above the mean, >= 0 and finite.
    window: norms to look back on; memory is `4 * window` bytes for each norm.
    ddof: 1 for the sample's standard deviation, 0 for the population's.
    std_floor: the standard deviation is at least this, >= 0 and finite.
    min_count: norms to see before the first clip, the current one included; None is `max(2, window // 2)`; at most
      `window + 1`.

  Returns:
    A `Rule`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if one is no Python number.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(clipjax.rules.rolling_sigma(2.0, window=4, ddof=0))
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (0.9, 1.1, 0.9, 1.1, 5.0):
    ...   clipped, state = tx.update(jnp.array([g]), state)
    >>> print(f"{clipped[0]:.3f}")
    1.200

  References:
    OLMo-core's `SkipStepOptimizer`, https://github.com/allenai/OLMo-core, which skips above 6 sigma over 128 steps;
    Levanter's update clipping, https://github.com/marin-community/levanter, which rescales.
  """
  check_number(sigma, "sigma", 0, math.inf, finite=True)
  check_whole(ddof, "ddof", 0, 1)
  check_whole(window, "window", 1 + ddof)
  check_number(std_floor, "std_floor", 0, math.inf, finite=True)
  if min_count is None:
    min_count = max(2, window // 2)
  check_whole(min_count, "min_count", 1, window + 1)

  def init(shape: tuple[int, ...], dtype: Any) -> Ring:
    return Ring.empty(window, shape, dtype)

  def update(norms: jax.Array, ring: Ring, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Ring]:
    del global_norm
    n = ring.filled.astype(norms.dtype)
    # Distances from a norm in the ring: of constant norms their mean is exactly 0. In units of the largest distance
    # no square leaves its range.
    anchor = ring.values[0]
    distance = jnp.where(ring.is_filled, ring.values - anchor[None], 0)
    largest = jnp.max(jnp.abs(distance), axis=0)
    unit = lax.stop_gradient(jnp.where(largest > 0, largest, 1))  # It cancels.
    distance = distance / unit[None]
    mean = jnp.sum(distance, axis=0) / jnp.maximum(n, 1)
    about = jnp.where(ring.is_filled, distance - mean[None], 0)
    std = unit * _norms.root_or_zero(jnp.sum(jnp.square(about), axis=0) / jnp.maximum(n - ddof, 1))
    width = jnp.asarray(sigma, norms.dtype) * jnp.maximum(std, jnp.asarray(std_floor, norms.dtype))
    limit = anchor + unit * mean + width
    enough = (ring.filled + 1 >= min_count) & (ring.filled > ddof)
    limit = jnp.where(enough, limit, jnp.inf)
    return limit, limit, ring.push(norms)

  return Rule(init, update)


class EmaRatioState(NamedTuple):
  """The state of `ema_ratio`.

  Attributes:
    ema: shape of the norms: the average of the clipped norms; 0 where there is none yet.
    seen: int32, shape (): finite steps so far, up to `warmup_steps`.
  """

  ema: jax.Array
  seen: jax.Array


export.register_namedtuple_serialization(EmaRatioState, serialized_name="clipjax.rules.EmaRatioState")


def ema_ratio(ratio: float, *, decay: float, warmup_steps: int, max_norm: float) -> Rule:
  """The rule of AdaGC: clips each norm to `ratio` times the moving average of its clipped self.

  During the warm-up the whole gradient is clipped by its global norm, to `max_norm`, and the average is the smallest
  clipped norm that is not 0. A leaf without an average, because its norms were all 0, goes on under the global rule
  until it has one: else it would be clipped to 0 for ever. After a lasting rise the average grows by at most
  `(1 - decay) * (ratio - 1)` a step, so that at the defaults of AdaGC every one of 200 steps after it is clipped
  (docs/methods.md).

  Args:
    ratio: how much larger than its average a norm may be, > 0.
    decay: weight of the past in the average, between 0 and 1.
    warmup_steps: finite steps under the global rule, >= 0.
    max_norm: threshold of the global rule, >= 0; inf for none.

  Returns:
    A `Rule` with an `EmaRatioState`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if one is no Python number.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> rule = clipjax.rules.ema_ratio(1.5, decay=0.9, warmup_steps=1, max_norm=10.0)
    >>> tx = clipjax.clip_by_leaf_norm(rule)
    >>> state = tx.init([jnp.zeros(1), jnp.zeros(1)])
    >>> for g in ([1.0, 2.0], [4.0, 2.0]):
    ...   clipped, state = tx.update([jnp.array([x]) for x in g], state)
    >>> print(clipped[0], clipped[1])
    [1.5] [2.]

  References:
    Wang et al., AdaGC: improving training stability for large language model pretraining, 2025,
    https://arxiv.org/abs/2502.11034; algorithm 1.
  """
  check_number(ratio, "ratio", 0, math.inf, open_low=True)
  check_number(decay, "decay", 0, 1)
  check_whole(warmup_steps, "warmup_steps", 0)
  check_number(max_norm, "max_norm", 0, math.inf)

  def init(shape: tuple[int, ...], dtype: Any) -> EmaRatioState:
    return EmaRatioState(jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

  def update(
    norms: jax.Array, state: EmaRatioState, *, global_norm: jax.Array
  ) -> tuple[jax.Array, jax.Array, EmaRatioState]:
    most, past = jnp.asarray(max_norm, norms.dtype), jnp.asarray(decay, norms.dtype)
    warm = state.seen < warmup_steps
    over = global_norm > most
    # A zero norm is under every limit, so 0 for its limit clips nothing.
    most = jnp.where(over, most, 1)
    global_limit = jnp.where(over, _norms.divide(norms, jnp.where(over, global_norm, 1)) * most, jnp.inf)
    has_ema = state.ema > 0
    limit = jnp.where(warm | ~has_ema, global_limit, jnp.asarray(ratio, norms.dtype) * state.ema)
    kept = jnp.minimum(norms, limit)
    lowest = jnp.where(has_ema & (kept > 0), jnp.minimum(state.ema, kept), jnp.where(has_ema, state.ema, kept))
    moved = jnp.where(has_ema, past * state.ema + (1 - past) * kept, kept)
    ema = jnp.where(warm, lowest, moved)
    return limit, limit, EmaRatioState(ema, jnp.minimum(state.seen + 1, warmup_steps))

  return Rule(init, update)
