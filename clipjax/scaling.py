"""Scale: from norms and limits to clipped leaves, by the factor of each block; the clamp; and their derivatives.

A leaf at or under its limit keeps its bits; any other leaf is multiplied in float32 (float64 for float64 leaves) and
rounded once. No intermediate product leaves its range: if a factor is too small for its dtype, an exact power of two
comes first. In a nonfinite step every factor is NaN.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipjax.arithmetic import by_parts, divide, quotient, upcast, widest
from clipjax.checks import within_range
from clipjax.stacks import Stacks, split


class Limits(NamedTuple):
  """The decision for one block of leaves; each field has shape (), or a shape that broadcasts against the leaf.

  Attributes:
    norm: the measured norm plus `eps`.
    limit: the norm above which the block is rescaled; below 0 in a nonfinite step.
    target: the norm that the block is rescaled to; NaN in a nonfinite step.
  """

  norm: jax.Array
  limit: jax.Array
  target: jax.Array

  @classmethod
  def of(cls, norm: jax.Array, limit: jax.Array, target: jax.Array, bad: jax.Array, eps: Any = 0.0) -> "Limits":
    """The limits of a block, from a rule's limit and target; the target may be any number."""
    if target is not limit:
      # At or under the limit the target has no meaning, yet `eps` can still push the norm above the limit.
      target = jnp.where(norm > limit, jnp.clip(target, 0, limit), limit)
    if not (isinstance(eps, float) and eps == 0.0):
      norm = norm + jnp.asarray(within_range(eps)).astype(norm.dtype)
    # In a bad step no block is kept and every target is NaN. Eagerly, `jax_debug_nans` must not see a NaN on the way,
    # so select from an array of NaN there. Under jit an explicit mesh axis may split units, but not such an array.
    if isinstance(target, jax.core.Tracer):
      return cls(norm, jnp.where(bad, -1, limit), jnp.where(bad, np.array(np.nan, target.dtype), target))
    nan = np.full(jnp.shape(target), np.nan, target.dtype)
    return cls(norm, jnp.where(bad, -1, limit), lax.select(jnp.broadcast_to(bad, nan.shape), nan, target))

  @property
  def kept(self) -> jax.Array:
    """Whether the block is unchanged: its norm is at or under the limit."""
    return self.norm <= self.limit


def scale_of(limits: Limits) -> jax.Array:
  """The factor, element by element: `min(1, target / norm)` above the limit, else 1; NaN for NaN."""
  kept = limits.kept
  return quotient(jnp.where(kept, 1, limits.target), jnp.where(kept, 1, limits.norm))


def norm_after(norms: jax.Array, limits: Limits) -> jax.Array:
  """The norm after the clip, element by element; not `norm * scale`, which is 0 if the scale is subnormal."""
  kept = limits.kept
  share = quotient(jnp.where(kept, 1, norms), jnp.where(kept, 1, limits.norm))  # Slightly below 1 with `eps`.
  return jnp.where(kept, norms, jnp.where(kept, 0, limits.target) * share)


# Rescaling -----------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
  """Which limits apply to which leaf; static.

  Attributes:
    block_of: the index of the block of each leaf, or of each slice if leaves are stacked.
    stacks: which leaves are stacked; if any is, the limits of all blocks come as one `Limits` of shape (n,).
  """

  block_of: tuple[int, ...]
  stacks: Stacks = ()


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def rescale(spread: Spread, leaves: Sequence[Any], limits: Sequence[Limits]) -> list[jax.Array]:
  """Each leaf times the factor of its block, or the factors of its slices.

  Args:
    spread: which limits apply to which leaf.
    leaves: the measured leaves.
    limits: the limits of each block.
  """
  xs = [jnp.asarray(x) for x in leaves]
  dtypes = [upcast(x).real.dtype for x in xs]
  if spread.stacks:  # Compute all factors at once: one computation for each leaf would be one kernel each.
    (whole,) = limits
    of_dtype = {dtype: _of_leaves(spread, factor_of(whole, dtype), xs) for dtype in dict.fromkeys(dtypes)}
    return [_multiplied(x, of_dtype[dtype][i]) for i, (x, dtype) in enumerate(zip(xs, dtypes, strict=True))]
  # One factor for each block and dtype, shared by the leaves of the block.
  factors = {key: factor_of(limits[key[0]], key[1]) for key in zip(spread.block_of, dtypes, strict=True)}
  return [_multiplied(x, factors[b, dtype]) for x, b, dtype in zip(xs, spread.block_of, dtypes, strict=True)]


rescale_jit = jax.jit(rescale, static_argnums=0, inline=True)


def _of_leaves(spread: Spread, vector: jax.Array, leaves: Sequence[Any]) -> list[jax.Array]:
  """Splits a vector with an entry for each block into arrays that broadcast against the leaves."""
  in_order = spread.block_of == tuple(range(vector.shape[0]))
  return list(split(vector if in_order else vector[np.array(spread.block_of)], leaves, spread.stacks))


@partial(jax.jit, static_argnums=(1, 2))  # Traced and lowered once for all blocks.
def factor_of(
  limits: Limits, dtype: Any, divide: Callable[[jax.Array, jax.Array], jax.Array] = jnp.divide
) -> jax.Array:
  """The factor of a block for leaves of a dtype; its range also encodes how to apply it.

  - Above 1: the leaf is unchanged.
  - Below 0: the factor is less than the least normal number of the dtype and would be flushed to zero. The leaf is
    multiplied by that number, an exact power of two, first, and then by this factor without its sign. Entries that the
    first product flushes would be below that number in the answer too.
  - NaN makes every entry NaN.

  There is only one number, and its division comes last: XLA on CPU would recompute all cheap scalars in every loop over
  a leaf, which takes long to compile.
  """
  norm, _, target = limits
  kept, tiny = limits.kept, float(jnp.finfo(dtype).tiny)
  # For a norm up to 1, the target is subnormal before the factor is. A target of 0 cannot carry a sign.
  far = (norm > jnp.maximum(target / tiny, 1)) & (target > 0)
  share = norm * lax.select(far, jnp.full_like(norm, -tiny), jnp.ones_like(norm))
  return divide(jnp.where(kept, 2, target), jnp.where(kept, 1, share))


def steps_of(factor: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """The two numbers by which a leaf that is not kept is multiplied, in this order."""
  tiny = jnp.full_like(factor, float(jnp.finfo(dtype).tiny))
  below = factor < 0
  return lax.select(below, tiny, jnp.ones_like(factor)), lax.select(below, -factor, factor)


def safe_steps_of(limits: Limits, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """`steps_of` the factor of a block; both are 1, with finite derivatives, for a block that is kept."""
  kept = limits.kept
  norm, target = jnp.where(kept, 1, limits.norm), jnp.where(kept, 1, limits.target)
  return steps_of(factor_of(Limits(norm, jnp.zeros_like(norm), target), dtype, quotient), dtype)


def times(wide: jax.Array, *factors: jax.Array) -> jax.Array:
  """The product with real factors, from left to right, in the dtype of the array."""

  def product(part: jax.Array) -> jax.Array:
    for factor in factors:
      part = part * factor.astype(part.dtype)
    return part

  return by_parts(product, wide)


@jax.jit
def _multiplied(x: jax.Array, factor: jax.Array) -> jax.Array:
  """The same bits if the leaf is kept, else the product, with one rounding at the end."""
  if x.dtype != jnp.bfloat16:
    return _rounded(x, factor)
  out: jax.Array = lax.platform_dependent(x, factor, cpu=_rounded_by_hand, default=_rounded)
  return out


def _product(x: jax.Array, factor: jax.Array) -> jax.Array:
  wide = upcast(x)
  return times(wide, *steps_of(factor, wide.real.dtype))


def _rounded(x: jax.Array, factor: jax.Array) -> jax.Array:
  return jnp.where(factor > 1, x, _product(x, factor).astype(x.dtype))


def _rounded_by_hand(x: jax.Array, factor: jax.Array) -> jax.Array:
  """`_rounded` for bfloat16, the upper half of a float32, in integer arithmetic.

  XLA on CPU writes out an array that is converted to bfloat16 and read twice, for instance by both moments of Adam, but
  fuses these integer operations.
  """
  bits = lax.bitcast_convert_type(_product(x, factor), np.uint32)
  nearest = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)  # Ties go to even.
  is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
  upper = lax.convert_element_type(jnp.where(is_nan, bits | np.uint32(0x400000), nearest) >> 16, np.uint16)
  kept = lax.bitcast_convert_type(x, np.uint16)
  return lax.bitcast_convert_type(jnp.where(factor > 1, kept, upper), x.dtype)


@rescale.defjvp
def _rescale_jvp(spread: Spread, primals: Any, tangents: Any) -> Any:
  (leaves, limits), (dleaves, dlimits) = primals, tangents

  def by_leaf(limits: Sequence[Limits]) -> list[Limits]:
    if not spread.stacks:
      return [limits[b] for b in spread.block_of]
    return [Limits(*fields) for fields in zip(*(_of_leaves(spread, x, leaves) for x in limits[0]), strict=True)]

  out = []
  for x, dx, block, dblock in zip(leaves, dleaves, by_leaf(limits), by_leaf(dlimits), strict=True):
    dy = change(widest(x), widest(dx), block, dblock)
    out.append(jnp.where(block.kept, dx, dy.astype(dx.dtype)))
  return rescale(spread, leaves, limits), out


def change(x: jax.Array, dx: jax.Array, block: Limits, dblock: Limits) -> jax.Array:
  """The tangent of `x t / n`: `(t / n) (dx - (x / n) dn) + (x / n) dt`; the caller keeps dx for a block that is kept.

  In this form no product leaves the range of float32. Differentiating the factor would leave it from n = 1e20
  upwards and from 1e-20 downwards.
  """
  steps = safe_steps_of(block, x.real.dtype)
  clipped = block.norm > block.limit
  norm = jnp.where(clipped, block.norm, 1).astype(x.real.dtype)
  # If nothing is clipped this product goes unused, but its own derivative must not be inf.
  unit = divide(by_parts(lambda part: jnp.where(clipped, part, 0), x), norm)
  return times(dx - times(unit, dblock.norm), *steps) + times(unit, dblock.target)


# Clamping ------------------------------------------------------------------------------------------------------------


@partial(jax.jit, inline=True)
def clamp(leaves: Sequence[Any], max_value: Any) -> list[jax.Array]:
  """Each leaf with its entries clipped to `[-max_value, max_value]`."""
  limit = jnp.maximum(jnp.asarray(max_value).astype(jax.dtypes.canonicalize_dtype(np.float64)), 0)
  return [_clamped(jnp.asarray(x), limit) for x in leaves]


def _clamped(x: jax.Array, limit: jax.Array) -> jax.Array:
  if x.dtype.itemsize == 1:  # A float8 may have no inf: a bound above its range would be NaN.
    return _clamped(x.astype(jnp.float32), limit).astype(x.dtype)
  bound = limit.astype(x.dtype)
  # The largest number of the dtype means no limit, and leaves an infinite entry unchanged. XLA on CPU flushes a
  # subnormal entry to 0 if it computes with it, but not if it passes it on: `where` keeps the bits.
  kept = (jnp.abs(x) < bound) | (limit >= jnp.finfo(limit.dtype).max)
  return jnp.where(kept, x, lax.clamp(-bound, x, bound))
