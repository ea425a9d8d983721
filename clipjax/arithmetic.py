"""Quotients, roots, powers and vector norms that stay in range, with derivatives that are as right as the values.

Also the views of a leaf that sums, derivatives and scaling share: `upcast`, and the real parts of a complex array.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def upcast(x: Any) -> jax.Array:
  """The leaf in the dtype that sums it: float64 and complex128 unchanged, everything else in 32-bit parts."""
  array: jax.Array = jnp.asarray(x)
  if array.dtype in (jnp.float64, jnp.complex128):
    return array
  return array.astype(jnp.complex64 if jnp.iscomplexobj(array) else jnp.float32)


def widest(x: Any) -> jax.Array:
  """`upcast`, but in 64-bit parts under x64, where a magnitude or a norm may exceed the largest float32."""
  array = upcast(x)
  if jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
    return array
  return array.astype(jnp.complex128 if jnp.iscomplexobj(array) else jnp.float64)


def parts(x: jax.Array) -> tuple[jax.Array, ...]:
  """A real array, or the real and the imaginary part of a complex one."""
  return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def by_parts(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """Applies `fn` to a real array, or to the real and the imaginary part of a complex one."""
  return lax.complex(fn(x.real), fn(x.imag)) if jnp.iscomplexobj(x) else fn(x)


def power(magnitude: jax.Array, p: float) -> jax.Array:
  """`magnitude^p`, by multiplications if p is whole."""
  return magnitude ** (int(p) if p.is_integer() else p)


def root(total: jax.Array, p: float) -> jax.Array:
  """`total^(1/p)`, with one Newton step: 1/p is inexact in floating point, and a large total magnifies the error."""
  if p == 2:
    return jnp.sqrt(total)
  if p in (0, 1) or math.isinf(p):
    return total
  # 0, inf and NaN are their own roots.
  usable = (total > 0) & (total < jnp.inf)
  t = jnp.where(usable, total, 1)
  guess: jax.Array = lax.optimization_barrier(t ** (1 / p))  # XLA would simplify `(t^(1/p))^p` to t.
  finite = guess < jnp.inf
  correction = (power(jnp.where(finite, guess, 1), p) / t - 1) / p
  return jnp.where(usable, jnp.where(finite, guess - guess * correction, guess), total)


def ordered_bits(x: jax.Array, p: float) -> jax.Array:
  """Numbers >= 0 as integers of the same order; NaN sorts above inf for p = inf, and below 0 for p = -inf.

  A max or min of floats may drop a NaN: in an all-reduce on any platform, and on CPU from JAX 0.10 on in one large
  array. Integers drop nothing. `bitcast_convert_type` converts back, for p = -inf too: -1 is a NaN.
  """
  kind = np.dtype(f"int{8 * x.dtype.itemsize}")
  # The mask clears the sign that a NaN may have.
  bits: jax.Array = lax.bitcast_convert_type(x, kind) & kind.type(np.iinfo(kind).max)
  if p > 0:
    return bits
  return jnp.where(bits > np.array(np.inf, x.dtype).view(kind), kind.type(-1), bits)


def extreme(x: jax.Array, p: float, axes: tuple[int, ...]) -> jax.Array:
  """The largest (p = inf) or smallest (p = -inf) of numbers >= 0; NaN if any is NaN; 0 or inf if there are none."""
  start = np.array(0.0 if p > 0 else np.inf, x.dtype).view(f"int{8 * x.dtype.itemsize}")[()]
  found = lax.reduce(ordered_bits(x, p), start, lax.max if p > 0 else lax.min, axes)
  value: jax.Array = lax.bitcast_convert_type(found, x.dtype)
  return value


def root_or_zero(x: jax.Array) -> jax.Array:
  """The square root, with derivative 0 at 0."""
  is_zero = x == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def divide(x: jax.Array, n: jax.Array) -> jax.Array:
  """`x / n` for a real n: XLA multiplies by 1 / n, which is subnormal, and so flushed to 0, for n above 2^126."""
  shrink = jnp.where(n > 2.0**64, 2.0**-64, 1).astype(n.dtype)
  return by_parts(lambda part: quotient(part * shrink, n * shrink), x)


@jax.custom_jvp
def quotient(x: jax.Array, n: jax.Array) -> jax.Array:
  """`x / n` of real arrays, with a derivative that is right wherever the quotient is: JAX's own squares n."""
  return x / n


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> Any:
  # Multiply tangents instead of dividing them: in reverse mode a divided tangent would use JAX's own rule again.
  (x, n), (dx, dn) = primals, tangents
  ratio = quotient(x, n)
  shrink = jnp.where(n > 2.0**64, 2.0**-64, 1).astype(n.dtype)
  return ratio, (dx - ratio * dn) * shrink * _reciprocal(n * shrink)


@jax.custom_jvp
def _reciprocal(n: jax.Array) -> jax.Array:
  return 1 / n


@_reciprocal.defjvp
def _reciprocal_jvp(primals: Any, tangents: Any) -> Any:
  inverse = _reciprocal(*primals)
  return inverse, -(inverse * tangents[0]) * inverse


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def vector_norm(norms: jax.Array, p: float) -> jax.Array:
  """The p-norm of p-norms along the last axis, rescaled by the largest, and so right at every magnitude.

  Maps shape (..., n) to (...). Its derivative is right wherever it is finite.
  """
  if p in (0, 1):  # For p = 0 the norms are counts.
    return jnp.sum(norms, axis=-1)
  if math.isinf(p):
    return extreme(norms, p, (norms.ndim - 1,))
  largest = jnp.max(norms, axis=-1, initial=0.0)  # This may drop a NaN, but the sum keeps it.
  usable = (largest >= jnp.finfo(norms.dtype).tiny) & (largest < jnp.inf)  # False for NaN too.
  units = divide(norms, jnp.where(usable, largest, 1)[..., None])
  return largest * root(jnp.sum(power(units, p), axis=-1), p)


@vector_norm.defjvp
def _vector_norm_jvp(p: float, primals: Any, tangents: Any) -> Any:
  (norms,), (dnorms,) = primals, tangents
  norm = vector_norm(norms, p)
  change = direction(norms, norm[..., None], p)
  if math.isinf(p):
    change = change / lax.stop_gradient(jnp.maximum(jnp.sum(change, axis=-1, keepdims=True), 1))
  return norm, jnp.sum(change * dnorms, axis=-1)


def direction(x: jax.Array, norm: jax.Array, p: float) -> jax.Array:
  """The derivative of the p-norm by each entry, 0 at norm 0; for inf and -inf, the sign of every extreme entry."""
  n = norm.astype(x.real.dtype)
  usable = n > 0
  if p == 2:
    return divide(by_parts(lambda part: jnp.where(usable, part, 0), x), jnp.where(usable, n, 1))
  if p == 0:
    return jnp.zeros_like(x)
  magnitude = jnp.abs(x)
  # JAX takes the derivative of a complex `jnp.sign` for 0: divide by the magnitude instead.
  nonzero = magnitude > 0
  sign = (
    by_parts(lambda part: quotient(part, jnp.where(nonzero, magnitude, 1)), x) if jnp.iscomplexobj(x) else jnp.sign(x)
  )
  if p == 1:
    return sign
  if math.isinf(p):
    return by_parts(lambda part: jnp.where(magnitude == n, part, 0), sign)
  # sign * (|x| / n)^(p - 1), with 0 for a zero entry, where the power has no derivative.
  ratio = divide(magnitude, jnp.where(usable, n, 1))
  nonzero = usable & (ratio > 0)
  weight = jnp.where(nonzero, jnp.where(nonzero, ratio, 1) ** (p - 1), 0)
  return by_parts(lambda part: part * weight, sign)
