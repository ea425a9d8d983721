"""AutoClip's rule: a percentile of the last norms."""

from typing import Any

import jax
import jax.numpy as jnp

from clipjax.checks import check_flag, check_number, check_whole
from clipjax.rules.base import Rule, no_limit, number
from clipjax.rules.ring import Ring


def percentile(percentile: float, *, window: int = 1000, include_current: bool = True, min_count: int = 1) -> Rule:
  """The rule of AutoClip: limit and target are a percentile of the last norms, linearly interpolated.

  The ring holds norms before the clip, which lets the threshold follow a lasting rise within the window: at percentile
  90 of 50 norms, 32 of the 200 steps after the rise are clipped (docs/methods.md). Constant norms are never clipped. A
  norm of 0 takes a place in the ring but does not count for the percentile: a leaf may have no gradient for a while.
  With fewer than `min_count` nonzero norms nothing is clipped.

  Args:
    percentile: between 0 and 100.
    window: how many of the last norms count, >= 1; the current one is among them only with `include_current`. Memory is
      `4 * window` bytes for each norm, 4 kB by default, sorted at every step. `quantile_tracking` is the same idea in 4
      bytes.
    include_current: whether the percentile includes the current norm.
    min_count: the fewest nonzero norms, the current one included, at which the rule clips, from 1 to `window`.

  Returns:
    A `Rule`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if an argument has the wrong type.

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
    # The ring that the percentile sees.
    pushed = ring.push(norms)
    seen = pushed if include_current else ring
    n, most = seen.counted, no_limit(norms.dtype)
    # Sort the norms that count to the front, and find the two ranks around the percentile.
    ordered = jnp.sort(jnp.where(seen.holds, seen.values, most), axis=0)
    last = jnp.maximum(n - 1, 0)
    place = last.astype(norms.dtype) * (number(percentile, norms.dtype) / 100)
    low = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, last)

    def at(rank: jax.Array) -> jax.Array:
      return jnp.where(n > 0, jnp.take_along_axis(ordered, rank[None], axis=0)[0], 0)

    # Interpolate between them; too few norms give no limit.
    at_low, at_high = at(low), at(jnp.minimum(low + 1, last))
    limit = at_low + (place - low.astype(norms.dtype)) * (at_high - at_low)
    limit = jnp.where((ring.counted + 1 >= min_count) & (n > 0), limit, most)
    return limit, limit, pushed

  return Rule(init, update)
