"""Measure, with derivatives: right wherever the norm is finite, and 0 at zero; `dn = <x / n, dx>`.

Derivatives never go through the sums. Everything that clips calls `measure` here, not the one in `sums`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipjax import mesh
from clipjax.arithmetic import direction, parts, widest
from clipjax.norms import sums
from clipjax.norms.sums import Measured, NormSpec, end_to_end, norm_dtype, stack


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def measure(spec: NormSpec, leaves: Sequence[Any]) -> Measured:
  """The norms of the blocks of `spec`; see `Measured`."""
  return sums.measure(spec, leaves)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure_beside_derivatives(spec: NormSpec, leaves: Sequence[Any]) -> Measured:
  """`measure` without `custom_vmap`.

  JAX cannot differentiate that where it drops our rule, as in a second derivative through a scan.
  """
  return sums.measure(spec, leaves, lazy_vmap=False)


@measure.defjvp
@_measure_beside_derivatives.defjvp
def _measure_jvp(spec: NormSpec, primals: Any, tangents: Any) -> Any:
  (leaves,), (dleaves,) = primals, tangents
  measured = _measure_beside_derivatives(spec, leaves)
  # The direction of each leaf, x / n, is the gradient of its block's norm.
  block_of = {i: b for b, block in enumerate(spec.blocks) for i in block}
  over = spec.over or (None,) * len(leaves)

  def change(weights: Sequence[jax.Array]) -> list[jax.Array]:
    """The sums of some weights over each block."""
    summed = (_sum(w, o) for w, o in zip(weights, over, strict=True))
    by_leaf = mesh.all_reduce(list(summed), spec.axes)
    return [_block_sum([by_leaf[i] for i in block]) for block in spec.blocks]

  directions = [direction(widest(x), measured.norms[block_of[i]], spec.ord) for i, x in enumerate(leaves)]
  # Each norm changes by the inner product of the direction with the tangents.
  dnorms = change([_real_product(g, widest(dx)) for g, dx in zip(directions, dleaves, strict=True)])
  if math.isinf(spec.ord):  # Entries that tie for the extreme share the derivative.
    ties = [lax.stop_gradient(jnp.maximum(n, 1)) for n in change([jnp.abs(g) for g in directions])]
    dnorms = [dn / n for dn, n in zip(dnorms, ties, strict=True)]
  vector = end_to_end(dnorms, norm_dtype()) if spec.over else stack(dnorms, norm_dtype())
  no_change: Any = np.zeros((), jax.dtypes.float0)  # The tangent type of an integer.
  return measured, Measured(tuple(dnorms), vector, no_change)


measure_jit: Callable[[NormSpec, Sequence[Any]], Measured] = jax.jit(measure, static_argnums=0, inline=True)


def _real_product(g: jax.Array, dx: jax.Array) -> jax.Array:
  """`Re(conj(g) dx)`, entry by entry: the sum is the change of the norm when its argument moves by dx."""
  first, *rest = (a * b for a, b in zip(parts(g), parts(dx), strict=True))
  return sum(rest, start=first)


def _sum(x: jax.Array, over: tuple[int, ...] | None) -> jax.Array:
  return jnp.sum(x) if over is None else jnp.sum(x, axis=over, keepdims=True)


def _block_sum(values: Sequence[jax.Array]) -> jax.Array:
  """The sum of some leaves' values, in `norm_dtype()`."""
  if len(values) == 1:
    return values[0].astype(norm_dtype())
  return stack(values, norm_dtype()).sum()
