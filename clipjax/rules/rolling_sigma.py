"""OLMo's rule: a limit from the mean and standard deviation of the last norms."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipjax.arithmetic import root_or_zero
from clipjax.checks import check_number, check_whole
from clipjax.rules.base import Rule, no_limit, number
from clipjax.rules.ring import Ring


def rolling_sigma(
  sigma: float = 6.0, *, window: int = 128, ddof: int = 1, std_floor: float = 0.0, min_count: int | None = None
) -> Rule:
  """Clips norms above `mean + sigma * std` of the last norms, without the current one, to that limit.

  The ring holds norms before the clip, which soon puts a lasting rise within the limit: with `window=50`, 2 of the 200
  steps after the rise are clipped (docs/methods.md). For the same reason a spike widens the limit until it leaves the
  window. Constant norms are never clipped. A norm of 0 takes a place in the ring and counts for nothing else.

  Args:
    sigma: standard deviations above the mean, >= 0 and finite.
    window: norms to look back on, >= 1 + `ddof`; memory is `4 * window` bytes for each norm.
    ddof: 1 for the sample's standard deviation, 0 for the population's.
    std_floor: the standard deviation is at least this, >= 0 and finite.
    min_count: the fewest nonzero norms, the current one included, at which the rule clips, from 1 to `window + 1`; None
      is `max(2, window // 2)`. Without `1 + ddof` nonzero norms before the current one it never clips.

  Returns:
    A `Rule`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if `sigma` or `std_floor` is neither a Python number nor a JAX array, or `window`, `ddof` or `min_count`
      is not a Python integer.

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
    holds, n = ring.holds, ring.counted
    # Measure distances from one norm in the ring: for constant norms their mean is exactly 0. In units of the largest
    # distance no square leaves its range.
    anchor = jnp.max(jnp.where(holds, ring.values, -no_limit(norms.dtype)), axis=0)
    anchor = lax.stop_gradient(jnp.where(n > 0, anchor, 0))  # It cancels out, like the unit.
    distance = jnp.where(holds, ring.values - anchor[None], 0)
    largest = jnp.max(jnp.abs(distance), axis=0)
    unit = lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    distance = distance / unit[None]
    # Mean and standard deviation of the norms that count.
    size = n.astype(norms.dtype)
    mean = jnp.sum(distance, axis=0) / jnp.maximum(size, 1)
    about = jnp.where(holds, distance - mean[None], 0)
    std = unit * root_or_zero(jnp.sum(jnp.square(about), axis=0) / jnp.maximum(size - ddof, 1))
    width = number(sigma, norms.dtype) * jnp.maximum(std, number(std_floor, norms.dtype))
    limit = anchor + unit * mean + width
    # Too few norms give no limit.
    enough = (n + 1 >= min_count) & (n > ddof)
    limit = jnp.where(enough, limit, no_limit(norms.dtype))
    return limit, limit, ring.push(norms)

  return Rule(init, update)
