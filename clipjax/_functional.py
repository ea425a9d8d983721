"""Clipping that acts now: functions from gradients to clipped gradients, for eager use and inside jit.

Every Python check runs in the public wrapper, before an inner `jit`, so that an eager call costs one dispatch. The
scaling is one multiplication of each leaf by a factor that is a scalar: XLA fuses it into whatever reads the clipped
gradient next.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jax.typing import ArrayLike

from clipjax import _leaves, _norms

POLICIES = ("propagate", "zero", "error")


class Limits(NamedTuple):
  """What holds for one block of leaves, each of shape () and of `norm_dtype()`.

  Attributes:
    norm: the measured norm plus `eps`.
    limit: the norm above which the block is rescaled.
    target: the norm that it is rescaled to.
  """

  norm: jax.Array
  limit: jax.Array
  target: jax.Array


def clip_grad_norm(
  grads: Any,
  max_norm: ArrayLike,
  ord: float | None = None,
  *,
  norm: ArrayLike | None = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
) -> tuple[Any, jax.Array]:
  """Scales gradients down to a global norm: `g * min(1, max_norm / (norm + eps))`.

  With `eps=0` every leaf is bit-identical where `norm <= max_norm`, and 0 stays 0 for every `max_norm`, 0 included,
  with finite derivatives. `max_norm=inf` only measures. 16-bit leaves are multiplied in float32 and rounded once.
  Where the norm is inf, NaN or above the largest float32, or `max_norm` is NaN, `on_nonfinite` says what happens. An
  empty tree has norm 0.

  Args:
    grads: pytree of floating or complex arrays of any shape; None and float0 leaves are passed on.
    max_norm: number or scalar array >= 0, in the unit of the gradient; a traced negative one counts as 0.
    ord: order of the norm, 2 when None; 1, `jnp.inf` or any p > 0.
    norm: the norm, where you already have it; None computes it.
    eps: added to the norm; `1e-6` gives the factor of torch.
    on_nonfinite: "propagate" makes every leaf NaN, "zero" makes every leaf 0, "error" raises. Inside jit "error" is a
      check that the caller turns on with two lines, `err, out = jax.jit(checkify.checkify(step))(...)` and
      `err.throw()`, `checkify` being `jax.experimental.checkify`.
    axis_name: as in `global_norm`.

  Returns:
    `(clipped, norm)`: the same structure, shapes and dtypes; the norm before the clip, shape (), float32 (float64
    when x64 is enabled).

  Raises:
    ValueError: if `max_norm`, `eps` or `norm` is a negative Python number, `max_norm` or `eps` a NaN, `ord` is not
      above 0, or `on_nonfinite` is unknown.
    TypeError: for an integer, bool or other leaf, with its path.
    FloatingPointError: eagerly, with "error", for a norm that is not finite, with the leaves.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> clipped, norm = clipjax.clip_grad_norm({"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}, max_norm=5.0)
    >>> print(norm, clipped["w"], clipped["b"])
    13.0 [1.1538461 1.5384616] [4.6153846]
    >>> same, norm = clipjax.clip_grad_norm({"w": jnp.array([3.0, 4.0])}, max_norm=5.0)
    >>> print(norm, same["w"])
    5.0 [3. 4.]

  References:
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063; algorithm 1.
  """
  p = _norms.check_ord(ord, for_clip=True)
  max_norm = check_threshold(max_norm, "max_norm")
  eps = check_eps(eps)
  check_policy(on_nonfinite)
  if norm is not None:
    norm = check_threshold(norm, "norm", remedy="pass the norm of `grads`, or None to compute it", allow_nan=True)
  flat = _leaves.flatten(grads, "grads")
  axes = _leaves.resolve_axes(grads, axis_name) if norm is None else ((),) * len(flat.measured)
  spec = _norms.NormSpec(p, (tuple(range(len(flat.measured))),), axes)
  clipped, total, bad = _clip_leaves(spec, on_nonfinite, flat.measured, max_norm, norm, eps)
  if on_nonfinite == "error":
    raise_nonfinite(bad, total, grads)
  return flat.with_measured(clipped), total


def clip_grad_value(grads: Any, max_value: ArrayLike) -> Any:
  """Clips every entry to `[-max_value, max_value]`.

  Entries within the interval are bit-identical, inf becomes `max_value`, NaN stays NaN, `max_value=0` gives zeros.
  The direction of the gradient changes; `clip_grad_norm` keeps it.

  Args:
    grads: pytree of floating arrays of any shape; None and float0 leaves are passed on.
    max_value: number or scalar array >= 0; a traced negative one counts as 0. It is rounded to the leaf's dtype.

  Returns:
    The same structure, shapes and dtypes.

  Raises:
    ValueError: if `max_value` is a negative or NaN Python number.
    TypeError: for a complex, integer, bool or other leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> print(clipjax.clip_grad_value(jnp.array([0.5, -3.0, jnp.inf]), 1.0))
    [ 0.5 -1.   1. ]
  """
  max_value = check_threshold(max_value, "max_value")
  flat = _leaves.flatten(grads, "grads")
  check_real(grads, flat, "grads")
  return flat.with_measured(clamp_leaves(flat.measured, max_value))


def clip_grad_per_example(grads: Any, max_norm: ArrayLike, *, axis_name: Any = None) -> tuple[Any, jax.Array]:
  """The sum of gradients of single examples, each first scaled down to a global norm of its own.

  Example b contributes `g_b * min(1, max_norm / norm_b)`. One whose norm is inf or NaN contributes 0, and shows in the
  norms; zeros contribute 0; an empty batch sums to 0. Sums are taken in float32 (float64 for float64 leaves).

  This is the clipping of differentially private training, and no more: noise, sampling and the privacy accounting
  are the work of a library such as jax-privacy, to which sum and norms can be handed on. The sensitivity of the sum to
  one example is `max_norm` within rounding, about 1e-6 of it.

  Inside `shard_map` each device sums the examples that it has; `jax.lax.psum` of the sums is the sum of all. JAX below
  0.9 cannot batch the sum over `axis_name` there but with `check_vma=False`, and below 0.10.2 refuses examples that an
  explicit mesh axis splits.

  Args:
    grads: pytree of floating or complex arrays of shape (batch, ...), such as `jax.vmap(jax.grad(loss), (None, 0))`
      gives; None leaves are passed on.
    max_norm: number or scalar array >= 0; a traced negative one counts as 0, under NaN every example contributes 0.
    axis_name: mesh axes over which the gradient of one example is sharded: a name, a tuple of names, or a prefix tree
      of them. Those that the batch is sharded over are none of them.

  Returns:
    `(clipped_sum, norms)`: the tree without its batch axis, 16-bit and 8-bit leaves as float32, since a sum of
    thousands need not fit the dtype of one; the norms before the clip, shape (batch,), float32 (float64 when x64 is
    enabled).

  Raises:
    ValueError: if `max_norm` is a negative or NaN Python number, for a leaf without a batch axis, or leaves of
      different batch sizes, with their paths; without `axis_name`, for leaves that vary over different mesh axes.
    TypeError: for an integer, bool or other leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> total, norms = clipjax.clip_grad_per_example(jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.inf, 0.0]]), 1.0)
    >>> print(total, norms)
    [0.90000004 1.2       ] [5.  0.5 inf]

  References:
    Abadi et al., Deep learning with differential privacy, 2016, https://arxiv.org/abs/1607.00133; algorithm 1.
  """
  max_norm = check_threshold(max_norm, "max_norm")
  flat = _leaves.flatten(grads, "grads")
  check_batch(grads, flat)
  axes = _example_axes(grads, flat) if axis_name is None else _leaves.resolve_axes(grads, axis_name)
  total, norms = _clip_examples(axes, flat.measured, max_norm)
  return flat.with_measured(total), norms


# Checks of Python values, before any tracing ------------------------------------------------------------------------


ZERO_OR_INF = "pass 0 to zero the gradient or `float('inf')` only to measure"


def check_threshold(value: Any, argument: str, *, remedy: str = ZERO_OR_INF, allow_nan: bool = False) -> Any:
  """The threshold, a host number as a float; raises unless it is >= 0 or a scalar array, whose value is not read."""
  rule = f"`{argument}` must be a number >= 0 or a scalar array"
  numbers = int | float | np.generic | np.ndarray | jax.Array
  if isinstance(value, bool | np.bool_ | str) or not isinstance(value, numbers):
    raise TypeError(f"{rule}, got {_leaves.describe(value)}: pass a float such as 1.0.")
  if isinstance(value, np.ndarray | jax.Array) and value.shape != ():
    raise ValueError(f"{rule}, got {_leaves.describe(value)}: pass one number, or use clip_by_group_norm.")
  dtype = value.dtype if isinstance(value, np.generic | np.ndarray | jax.Array) else np.dtype(type(value))
  if not (jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)):
    raise TypeError(f"{rule}, got {_leaves.describe(value)}: pass a real number such as 1.0.")
  if isinstance(value, jax.Array):
    return value
  number = float(value)
  if number < 0 or (math.isnan(number) and not allow_nan):
    raise ValueError(f"`{argument}` must be >= 0, got {number}: {remedy}.")
  return number


def check_eps(eps: Any) -> Any:
  """`eps`, a host number as a float; raises unless it is finite and >= 0, or a scalar array."""
  remedy = "pass 0.0, or 1e-6 for the factor of torch"
  eps = check_threshold(eps, "eps", remedy=remedy)
  if isinstance(eps, float) and math.isinf(eps):
    raise ValueError(f"`eps` must be finite, got {eps}: {remedy}.")
  return eps


def check_policy(on_nonfinite: Any) -> None:
  """Raises unless `on_nonfinite` names a policy."""
  if not isinstance(on_nonfinite, str) or on_nonfinite not in POLICIES:
    names = ", ".join(f'"{name}"' for name in POLICIES)
    raise ValueError(
      f"`on_nonfinite` must be one of {names}, got {_leaves.describe_choice(on_nonfinite)}: "
      'pass "zero" to drop such steps or "propagate" to make them visible.'
    )


def check_real(tree: Any, flat: _leaves.Flat, argument: str) -> None:
  """Raises for a complex leaf: its entries have no order, so there is no interval to clip them to."""
  for i, leaf in enumerate(flat.measured):
    if jnp.iscomplexobj(leaf):
      raise TypeError(
        f"`{argument}` must have real leaves to clip by value, got {_leaves.describe(leaf)} at "
        f"'{_leaves.leaf_names(tree)[i]}': clip complex leaves by norm."
      )


def check_batch(tree: Any, flat: _leaves.Flat) -> None:
  """Raises unless every leaf has the same leading axis."""
  for i, leaf in enumerate(flat.measured):
    if jnp.ndim(leaf) == 0:
      raise ValueError(
        f"`grads` must have a leading batch axis in every leaf, got {_leaves.describe(leaf)} at "
        f"'{_leaves.leaf_names(tree)[i]}': "
        "take them with jax.vmap(jax.grad(loss), (None, 0))."
      )
    first = flat.measured[0]
    if leaf.shape[0] != first.shape[0]:
      names = _leaves.leaf_names(tree)
      raise ValueError(
        f"`grads` must have one batch size in every leaf, got {first.shape[0]} at '{names[0]}' and {leaf.shape[0]} at "
        f"'{names[i]}': the batch is the leading axis."
      )


def raise_nonfinite(bad: jax.Array, norm: jax.Array, grads: Any) -> None:
  """The policy "error": raises where `bad` is known, and is a check for `checkify` where it is traced."""
  text = "the gradient is not finite (norm {norm})"
  if isinstance(bad, jax.core.Tracer):
    checkify.check(~bad, text + ': see `on_nonfinite="error"` in the docstring of clipjax.clip_grad_norm', norm=norm)
  elif bool(bad):
    leaves = [np.isfinite(norm) for norm in jax.tree.leaves(_norms.leaf_norms(grads, jnp.inf))]
    names = [n for n, finite in zip(_leaves.leaf_names(grads, lambda _: True), leaves, strict=True) if not finite]
    where = ", ".join(f"'{name}'" for name in names[:10]) + (", ..." if len(names) > 10 else "")
    raise FloatingPointError(
      text.format(norm=float(norm))
      + (f" in {where}" if names else "")
      + ': lower the learning rate, or pass on_nonfinite="zero" to drop such steps.'
    )


# The arithmetic of a clip -------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _clip_leaves(
  spec: _norms.NormSpec, policy: str, leaves: Sequence[Any], max_norm: Any, norm: Any, eps: Any
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  dtype = _norms.norm_dtype()
  norm = _norms.block_norms(spec, leaves)[0] if norm is None else jnp.asarray(norm).astype(dtype)
  limit = jnp.maximum(jnp.asarray(max_norm).astype(dtype), 0)
  bad = ~jnp.isfinite(norm) | jnp.isnan(limit)
  limits = Limits(norm + jnp.asarray(eps).astype(dtype), limit, limit)
  return rescale_leaves((0,) * len(leaves), policy, leaves, [limits], bad), norm, bad


def _example_axes(grads: Any, flat: _leaves.Flat) -> tuple[_leaves.Axes, ...]:
  """No axes: each example is whole where it is. Raises where the types of the leaves say otherwise."""
  varying = list(map(_leaves.varying_axes, flat.measured))
  for i, axes in enumerate(varying):
    if axes != varying[0]:
      names = _leaves.leaf_names(grads)
      raise ValueError(
        "`axis_name` must be given where leaves vary over different mesh axes, got "
        f"'{names[0]}' over {list(varying[0])} and '{names[i]}' over {list(axes)}: pass the axes over which the "
        "gradient of one example is sharded."
      )
  return ((),) * len(varying)


@partial(jax.jit, static_argnums=0, inline=True)
def _clip_examples(
  axes: tuple[_leaves.Axes, ...], leaves: Sequence[Any], max_norm: Any
) -> tuple[list[jax.Array], jax.Array]:
  xs = [_norms.upcast(x) for x in leaves]
  dtype = _norms.norm_dtype()
  if not xs:
    return [], jnp.zeros((0,), dtype)
  spec = _norms.NormSpec(2.0, (tuple(range(len(xs))),), axes)
  norms = _example_norms(spec, xs)
  limit = jnp.maximum(jnp.asarray(max_norm).astype(dtype), 0)
  usable = jnp.isfinite(norms) & ~jnp.isnan(limit)
  if not norms.size:
    return [jnp.sum(x, axis=0) for x in xs], norms
  # An example without a norm is taken out before any product, whatever its factor.
  return _sum_examples(usable, Limits(norms, limit, limit), xs), norms


def _rows_norms(spec: _norms.NormSpec, xs: Sequence[jax.Array]) -> jax.Array:
  norms: jax.Array = jax.vmap(lambda rows: _norms.block_norms(spec, rows)[0])(xs)
  return norms


_example_norms = jax.custom_jvp(_rows_norms, nondiff_argnums=(0,))


@_example_norms.defjvp
def _example_norms_jvp(spec: _norms.NormSpec, primals: Any, tangents: Any) -> Any:
  """The derivative of a norm that is not finite is 0, not NaN: the example adds nothing to the sum."""
  norms = _example_norms(spec, *primals)
  usable = jnp.isfinite(norms)
  xs, dxs = ([jax.vmap(_kept)(x, usable) for x in leaves] for (leaves,) in (primals, tangents))
  return norms, jax.jvp(partial(_rows_norms, spec), (xs,), (dxs,))[1]


def _kept(x: jax.Array, keep: jax.Array) -> jax.Array:
  """The example or, without a product that NaN would survive, zeros."""
  return _norms.by_parts(lambda part: jnp.where(keep, part, 0), x)


@jax.custom_jvp
def _sum_examples(usable: jax.Array, limits: Limits, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """The sum of the usable examples of each leaf, each rescaled as its norm asks for."""
  shrink, factor = safe_factors_of(limits, jnp.zeros((), jnp.bool_))
  if any(map(_is_split_by_type, xs)):
    return _sum_at_once(usable, shrink, factor, xs)
  # A weighted sum is a product of a vector and a matrix, which writes no clipped copy of the batch. It cannot leave out
  # an example that is not finite, nor multiply twice: what needs that takes one example after the other.
  plain = usable.all() & (shrink == 1).all()
  one_by_one = partial(_sum_one_by_one, usable, shrink, factor)
  chosen: list[jax.Array] = lax.cond(plain, partial(_weighted_sum, factor), one_by_one, xs)
  return chosen


@_sum_examples.defjvp
def _sum_examples_jvp(primals: Any, tangents: Any) -> Any:
  (usable, limits, xs), (_, dlimits, dxs) = primals, tangents

  def change(keep: jax.Array, norm: jax.Array, dnorm: jax.Array, x: jax.Array, dx: jax.Array) -> jax.Array:
    return _change(
      _kept(x, keep),
      _kept(dx, keep),
      limits._replace(norm=norm),
      dlimits._replace(norm=dnorm),
      jnp.zeros((), jnp.bool_),
    )

  changes = [jax.vmap(change)(usable, limits.norm, dlimits.norm, x, dx) for x, dx in zip(xs, dxs, strict=True)]
  return _sum_examples(usable, limits, xs), [jnp.sum(c, axis=0) for c in changes]


def _weighted_sum(factor: jax.Array, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """`sum_i factor_i x_i` of each leaf."""

  def product(part: jax.Array) -> jax.Array:
    return jnp.tensordot(factor.astype(part.dtype), part, axes=1, precision=lax.Precision.HIGHEST)

  return [_norms.by_parts(product, x) for x in xs]


def _sum_one_by_one(keep: jax.Array, shrink: jax.Array, factor: jax.Array, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """`sum_i (x_i shrink_i) factor_i` of each leaf, over the examples to keep."""

  def add(sums: list[jax.Array], i: jax.Array) -> tuple[list[jax.Array], None]:
    return [total + _contribution(x[i], keep[i], shrink[i], factor[i]) for total, x in zip(sums, xs, strict=True)], None

  sums, _ = lax.scan(add, [_contribution(x[0], keep[0], shrink[0], factor[0]) for x in xs], jnp.arange(1, keep.size))
  return sums


def _sum_at_once(keep: jax.Array, shrink: jax.Array, factor: jax.Array, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """`_sum_one_by_one` for leaves whose examples cannot be taken one by one."""
  return [jnp.sum(jax.vmap(_contribution)(x, keep, shrink, factor), axis=0) for x in xs]


def _contribution(x: jax.Array, keep: jax.Array, shrink: jax.Array, factor: jax.Array) -> jax.Array:
  """What an example adds."""
  return _times(_kept(x, keep), shrink, factor)


def _is_split_by_type(x: jax.Array) -> bool:
  """Whether an explicit mesh axis splits the examples of a leaf, which JAX then refuses to index and to multiply."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  return sharding is not None and len(sharding.spec) > 0 and sharding.spec[0] is not None


@partial(jax.jit, inline=True)
def clamp_leaves(leaves: Sequence[Any], max_value: Any) -> list[jax.Array]:
  """Each leaf with its entries clipped to `[-max_value, max_value]`."""
  limit = jnp.maximum(jnp.asarray(max_value).astype(_norms.norm_dtype()), 0)
  return [_clamp(jnp.asarray(x), limit) for x in leaves]


def _clamp(x: jax.Array, limit: jax.Array) -> jax.Array:
  if x.dtype.itemsize == 1:  # A float8 may have no inf: a bound above its range would be NaN.
    return _clamp(x.astype(jnp.float32), limit).astype(x.dtype)
  bound = limit.astype(x.dtype)
  # XLA on CPU makes 0 of a subnormal entry that it computes with, not of one that it passes on.
  return jnp.where(jnp.abs(x) < bound, x, lax.clamp(-bound, x, bound))


def rescale_leaves(
  block_of: tuple[int, ...], policy: str, leaves: Sequence[Any], limits: Sequence[Limits], bad: jax.Array
) -> list[jax.Array]:
  """Each leaf times the factor of its block, or as the policy has it where `bad`.

  Args:
    block_of: the block of each leaf; static.
    policy: one of `POLICIES`; static.
    leaves: the measured leaves.
    limits: what holds for each block.
    bad: shape (), bool: the step is not finite.
  """
  scaled = rescale(block_of, [jnp.asarray(x) for x in leaves], list(limits), bad)
  return [jnp.where(bad, jnp.zeros((), y.dtype), y) for y in scaled] if policy == "zero" else scaled


rescale_leaves_jit = jax.jit(rescale_leaves, static_argnums=(0, 1), inline=True)


def scale_of(limits: Limits) -> jax.Array:
  """The factor `min(1, target / norm)` where the norm is above the limit, else 1; element by element."""
  clipped = limits.norm > limits.limit
  return _norms.quotient(jnp.where(clipped, limits.target, 1), jnp.where(clipped, limits.norm, 1))


def norm_after(norms: jax.Array, limits: Limits) -> jax.Array:
  """The norm that is left: not `norm * scale`, which is 0 where the scale is subnormal. Element by element."""
  clipped = limits.norm > limits.limit
  share = _norms.quotient(jnp.where(clipped, norms, 1), jnp.where(clipped, limits.norm, 1))  # Below 1 by `eps`.
  return jnp.where(clipped, jnp.where(clipped, limits.target, 0) * share, norms)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def rescale(
  block_of: tuple[int, ...], leaves: Sequence[jax.Array], limits: Sequence[Limits], bad: jax.Array
) -> list[jax.Array]:
  """Each leaf times the factor of its block, NaN where `bad`; the norm of a block may be that of each of its rows."""
  factors = [factors_of(block, bad) for block in limits]
  return [multiply(x, *factors[b]) for x, b in zip(leaves, block_of, strict=True)]


def factors_of(
  limits: Limits, bad: jax.Array, divide: Callable[[jax.Array, jax.Array], jax.Array] = jnp.divide
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`(touched, shrink, factor)`: a touched leaf becomes `(x * shrink) * factor`.

  A factor below 2^-100 would soon be subnormal, and flushed to zero: then an exact power of two comes first; with a
  norm up to 1 the target would be subnormal before the factor is. A factor of NaN makes every entry NaN. Where nothing
  is touched the factor is 0, since `checkify` looks at the product: `inf * 0` of an infinite target would be NaN. What
  does not depend on the norm comes first: XLA's time to compile a clip of each leaf grows with the operations that
  follow it.
  """
  norm, limit, target = limits
  from_bad = jnp.where(bad, -1, limit).astype(norm.dtype)
  finite = jnp.minimum(target.astype(norm.dtype), jnp.finfo(norm.dtype).max)
  target_or_nan = jnp.where(bad, nan_if(bad, norm.dtype), finite)
  far = jnp.maximum(target * 2.0**100, 1)
  shrink = lax.select(norm > far, jnp.full_like(norm, 2.0**-100), jnp.ones_like(norm))
  touched = ~(norm <= from_bad)
  return touched, shrink, divide(target_or_nan, jnp.where(touched, norm * shrink, jnp.inf))


def nan_if(bad: jax.Array, dtype: Any) -> jax.Array:
  """NaN if `bad`, else 0, without a NaN on the way, at which `jax_debug_nans` would stop where there is no jit."""
  return lax.select(bad, np.full((), np.nan, dtype), np.zeros((), dtype))


def safe_factors_of(limits: Limits, bad: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`(shrink, factor)` of `factors_of`, but a factor of 1, and finite derivatives, where nothing is touched."""
  clipped = limits.norm > limits.limit
  norm, target = jnp.where(clipped, limits.norm, 1), jnp.where(clipped, limits.target, 1)
  _, shrink, factor = factors_of(Limits(norm, jnp.zeros_like(norm), target), bad, _norms.quotient)
  return shrink, factor


def multiply(x: jax.Array, touched: jax.Array, shrink: jax.Array, factor: jax.Array) -> jax.Array:
  """`(x * shrink) * factor` where touched, with one rounding at the end; else the same bits."""
  return jnp.where(touched, _times(_norms.upcast(x), shrink, factor).astype(x.dtype), x)


def _times(wide: jax.Array, *factors: jax.Array) -> jax.Array:
  """The product with real factors, from left to right, in the dtype of the array."""

  def product(part: jax.Array) -> jax.Array:
    for factor in factors:
      part = part * factor.astype(part.dtype)
    return part

  return _norms.by_parts(product, wide)


@rescale.defjvp
def _rescale_jvp(block_of: tuple[int, ...], primals: Any, tangents: Any) -> Any:
  leaves, limits, bad = primals
  dleaves, dlimits, _ = tangents
  out = []
  for x, dx, b in zip(leaves, dleaves, block_of, strict=True):
    dy = _change(_norms.upcast(x), _norms.upcast(dx), limits[b], dlimits[b], bad)
    out.append(jnp.where((limits[b].norm > limits[b].limit) | bad, dy.astype(dx.dtype), dx))
  return rescale(block_of, leaves, limits, bad), out


def _change(x: jax.Array, dx: jax.Array, block: Limits, dblock: Limits, bad: jax.Array) -> jax.Array:
  """How `x t / n` changes with x, n and t: `(t / n) (dx - (x / n) dn) + (x / n) dt`, and dx where nothing is touched.

  Written so, no product leaves the range of float32, which differentiating the factor does from n = 1e20 on, and from
  1e-20 down.
  """
  shrink, factor = safe_factors_of(block, bad)
  clipped = block.norm > block.limit
  norm = jnp.where(clipped, block.norm, 1).astype(x.real.dtype)
  # Where nothing is clipped the product is not used, but its own derivative must not be inf.
  unit = _norms.divide(_norms.by_parts(lambda part: jnp.where(clipped, part, 0), x), norm)
  return _times(dx - _times(unit, dblock.norm), shrink, factor) + _times(unit, dblock.target)
