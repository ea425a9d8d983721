"""AdaGC's rule: limits each norm to a multiple of the EMA of its clipped values."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from clipjax.arithmetic import divide
from clipjax.checks import check_number, check_whole
from clipjax.rules.base import Rule, no_limit, number


class EmaRatioState(NamedTuple):
  """The state of `ema_ratio`.

  Attributes:
    ema: shape of the norms: the EMA of the clipped norms; 0 before there is one.
    had_zero: bool, shape of the norms: whether a norm of 0 has entered the EMA.
    seen: int32, shape (): finite steps so far, up to `warmup_steps`.
  """

  ema: jax.Array
  had_zero: jax.Array
  seen: jax.Array


export.register_namedtuple_serialization(EmaRatioState, serialized_name="clipjax.rules.EmaRatioState")


def ema_ratio(ratio: float, *, decay: float, warmup_steps: int, max_norm: float) -> Rule:
  """The rule of AdaGC: clips each norm to `ratio` times the EMA of its clipped values.

  During the warm-up, the whole gradient is clipped to the global norm `max_norm`, and the EMA is the smallest nonzero
  clipped norm. A leaf without an EMA, because all its norms were 0, stays under the global rule until it has one:
  otherwise it would be clipped to 0 forever. After the warm-up, the first norm of 0 enters the EMA, as in the paper.
  Later zeros do not: a leaf whose gradient is 0 now and then would end up clipped to 0. After a lasting rise the EMA
  grows by a share of at most `(1 - decay) * (ratio - 1)` per step: at AdaGC's ratio and decay, all of the 200 steps
  after the rise are clipped (docs/methods.md).

  Args:
    ratio: how much larger than its EMA a norm may be, > 0.
    decay: weight of the past in the EMA, between 0 and 1.
    warmup_steps: finite steps under the global rule, >= 0.
    max_norm: threshold of the global rule, >= 0; inf for no limit.

  Returns:
    A `Rule` with an `EmaRatioState`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if `ratio`, `decay` or `max_norm` is neither a Python number nor a JAX array, or `warmup_steps` is not a
      Python integer.

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
    return EmaRatioState(jnp.zeros(shape, dtype), jnp.zeros(shape, jnp.bool_), jnp.zeros((), jnp.int32))

  def update(
    norms: jax.Array, state: EmaRatioState, *, global_norm: jax.Array
  ) -> tuple[jax.Array, jax.Array, EmaRatioState]:
    most, past = number(max_norm, norms.dtype), number(decay, norms.dtype)
    unlimited = no_limit(norms.dtype)
    warm = state.seen < warmup_steps
    over = (global_norm > most) & (most < unlimited)
    # The global rule, as a limit for each norm: scaled down by the same factor. A zero norm is under every limit, so a
    # limit of 0 clips nothing.
    most = jnp.where(over, most, 1)
    global_limit = jnp.where(over, divide(norms, jnp.where(over, global_norm, 1)) * most, unlimited)
    # The limit: the global rule in the warm-up and for a norm without an EMA, else the ratio to the EMA.
    has_ema = state.ema > 0
    limit = jnp.where(warm | ~has_ema, global_limit, jnp.minimum(number(ratio, norms.dtype) * state.ema, unlimited))
    # The EMA sees clipped norms. In the warm-up it is the smallest nonzero one.
    kept = jnp.minimum(norms, limit)
    lowest = jnp.where(has_ema & (kept > 0), jnp.minimum(state.ema, kept), jnp.where(has_ema, state.ema, kept))
    moved = jnp.where(has_ema, past * state.ema + (1 - past) * kept, kept)
    # A gradient that is 0 now and then, such as an expert's, would pull its EMA down to 0 and keep it there.
    is_zero = (norms == 0) & has_ema & ~warm
    ema = jnp.where(warm, lowest, jnp.where(is_zero & state.had_zero, state.ema, moved))
    return limit, limit, EmaRatioState(ema, state.had_zero | is_zero, jnp.minimum(state.seen + 1, warmup_steps))

  return Rule(init, update)
