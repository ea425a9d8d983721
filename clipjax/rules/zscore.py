"""ZClip's rule: clips norms far above their running mean, in units of their running standard deviation."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from clipjax.arithmetic import quotient, root_or_zero
from clipjax.checks import check_choice, check_number, check_whole
from clipjax.rules.base import Rule, no_limit, number


class ZScoreState(NamedTuple):
  """The state of `zscore`; every field has the shape of the norms.

  Attributes:
    mean: mean of the norms so far; an EMA after the warm-up.
    variance: variance of the norms so far; an EMA after the warm-up.
    seen: int32: norms so far, up to `warmup_steps`.
    in_a_row: int32: clipped steps since the last unclipped one; counted only with `restart_after`.
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

  The limit is `mean + z_thresh * (std + 1e-6)`. The target is `mean + z_thresh^2 / z * std` ("reciprocal": the larger
  the spike, the closer to the mean), `mean` ("mean") or `mean + z_thresh * std` ("max"). The 1e-6 has the unit of the
  norm: much smaller norms are never clipped. During the warm-up nothing is clipped: add a cap with
  `minimum(zscore(...), 1.0)`. Constant norms are never clipped. A norm of 0 does not change the statistics, and is not
  a step of the warm-up.

  With "clipped" statistics, a lasting rise of the norm beyond the limit locks the rule in: each step is clipped to
  about the old level, and the statistics see only that. In the experiment of docs/methods.md, norms of 1 with a
  deviation of 5% rise 1.5, 2 or 5 times: all 200 steps after the rise are clipped; with `restart_after=10`, 13 of them.
  This guard is off by default, as in the paper.

  Args:
    z_thresh: z-score of the limit, > 0.
    decay: weight of the past in mean and variance, between 0 and 1.
    warmup_steps: finite steps whose plain mean and variance start the EMAs, >= 1.
    mode: "reciprocal", "mean" or "max".
    record: what enters the statistics for a clipped norm: "clipped", its target; "raw", the norm; "none", nothing.
    restart_after: clipped steps in a row after which the warm-up starts again; None never restarts it.

  Returns:
    A `Rule` with a `ZScoreState`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if `z_thresh` or `decay` is neither a Python number nor a JAX array, or `warmup_steps` or `restart_after`
      is not a Python integer.

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
    section 3. Where paper and code differ, this follows the code: its 1e-6, and the variance about the new mean.
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
    # The limit: none in the warm-up.
    z_limit, past = number(z_thresh, norms.dtype), number(decay, norms.dtype)
    warm = state.seen < warmup_steps
    std = root_or_zero(state.variance)
    most = no_limit(norms.dtype)
    limit = jnp.where(warm, most, jnp.minimum(state.mean + z_limit * (std + 1e-6), most))
    # The target of a clipped norm.
    clipped = norms > limit
    if mode == "reciprocal":
      z = jnp.where(clipped, quotient(norms - state.mean, std + 1e-6), 1)
      share = jnp.where(clipped, z_limit, 0) / z  # Below 1 for a clipped norm.
      target = state.mean + z_limit * share * std
    else:
      target = state.mean if mode == "mean" else state.mean + z_limit * std
    target = jnp.where(clipped, jnp.minimum(target, limit), limit)
    # The statistics see x, capped: a square out of range would leave a variance of inf, and a limit of NaN, for good.
    x = norms if record == "raw" else jnp.where(clipped, target, norms)
    x = jnp.minimum(x, float(jnp.finfo(x.dtype).max) ** 0.5 / 2)
    seen = jnp.minimum(state.seen + 1, warmup_steps)
    # Steps from the old mean, which constant norms leave exactly unchanged. In the warm-up, the weight 1 / count gives
    # the plain mean and the population variance (Welford).
    weight = jnp.where(warm, 1 / seen.astype(norms.dtype), 1 - past)
    mean = state.mean + weight * (x - state.mean)
    about = jnp.where(warm, (x - state.mean) * (x - mean), jnp.square(x - mean))
    variance = state.variance + weight * (about - state.variance)
    if record == "none":
      mean = jnp.where(clipped, state.mean, mean)
      variance = jnp.where(clipped, state.variance, variance)
    # After a lasting rise, start over.
    in_a_row = jnp.where(clipped, state.in_a_row + 1, 0)
    new = ZScoreState(mean, variance, seen, in_a_row if restart_after is not None else state.in_a_row)
    if restart_after is not None:
      locked = in_a_row >= restart_after
      new = ZScoreState(*(jnp.where(locked, jnp.zeros((), v.dtype), v) for v in new))
    # Skip norms of 0: a leaf without a gradient yet would otherwise stay clipped to 0.
    return limit, target, jax.tree.map(lambda now, old: jnp.where(norms == 0, old, now), new, state)

  return Rule(init, update)
