"""A threshold of one number that tracks a quantile of the norms."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.checks import check_number
from clipjax.rules.base import Rule, number


def quantile_tracking(quantile: float, *, learning_rate: float = 0.2, initial: float = 1.0) -> Rule:
  """Moves one number C towards a quantile of the norms: `C <- C * exp(-lr * (1[norm <= C] - q))`.

  Needs O(1) memory, where `percentile` keeps a ring. C is used before it moves, and stays positive. A norm of 0 does
  not move it. After a lasting rise, log C grows by `learning_rate * quantile` per step: at quantile 0.9, 23 to 29 of
  the 200 steps after the rise are clipped (docs/methods.md).

  Args:
    quantile: the share of norms that should be at or under the threshold, between 0 and 1.
    learning_rate: step in log C, > 0 and finite.
    initial: C at the first step, > 0 and finite.

  Returns:
    A `Rule` whose state is C.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if an argument is neither a Python number nor a JAX array.

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
    return jnp.broadcast_to(number(initial, dtype), shape)

  def update(norms: jax.Array, c: jax.Array, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    del global_norm
    # Up by lr * q after a norm above C, down by lr * (1 - q) after one under it: at rest q of the norms are under C.
    under = (norms <= c).astype(norms.dtype)
    rate, q = number(learning_rate, c.dtype), number(quantile, c.dtype)
    moved = jnp.where(norms == 0, c, c * jnp.exp(-rate * (under - q)))
    # Keep C away from 0 and inf: no factor could bring it back.
    info = jnp.finfo(norms.dtype)
    return c, c, jnp.clip(moved, float(info.tiny), float(info.max))

  return Rule(init, update)
