"""Clipping of single examples, the form that differentially private training needs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from clipjax import checks
from clipjax.arithmetic import by_parts, upcast
from clipjax.mesh import Axes, varying_axes
from clipjax.norms.derivatives import measure
from clipjax.norms.sums import NormSpec, norm_dtype
from clipjax.scaling import Limits, change, safe_steps_of, times
from clipjax.trees import Prepared, prepare


def clip_grad_per_example(grads: Any, max_norm: ArrayLike, *, axis_name: Any = None) -> tuple[Any, jax.Array]:
  """The sum of per-example gradients, each scaled down to a global norm first: `sum_b g_b * min(1, max_norm / norm_b)`.

  An example whose norm is inf or NaN contributes 0, and its norm shows why; zeros contribute 0; an empty batch sums to
  0. Sums are taken in float32 (float64 for float64 leaves).

  This is only the clipping of differentially private training. Leave noise, sampling and privacy accounting to a
  library such as jax-privacy, and hand it the sum and the norms. The sensitivity of the sum to one example is
  `max_norm` within rounding, about 1e-6 of it.

  Inside `shard_map` each device sums its own examples; `jax.lax.psum` adds up the sums. There, JAX below 0.9 needs
  `check_vma=False` with `axis_name`, and JAX below 0.10.2 refuses examples that an explicit mesh axis splits.

  Args:
    grads: pytree of floating or complex arrays of shape (batch, ...), such as `jax.vmap(jax.grad(loss), (None, 0))`
      gives; None leaves pass through.
    max_norm: number or scalar array >= 0; a traced negative one counts as 0. If an array holds NaN, every example
      contributes 0.
    axis_name: mesh axes that shard the gradient of one example: a name, a tuple of names, or a prefix tree of them.
      Leave out the axes that shard the batch.

  Returns:
    `(clipped_sum, norms)`: the tree without its batch axis, with 16-bit and 8-bit leaves as float32, because a sum of
    thousands may not fit the dtype of one example; the norms before the clip, shape (batch,), float32 (float64 when
    x64 is enabled).

  Raises:
    ValueError: if `max_norm` is a negative or NaN Python number, or an array that is not a scalar; for a leaf without a
      batch axis or leaves of different batch sizes, with their paths; without `axis_name`, for leaves that vary over
      different mesh axes.
    TypeError: for a `max_norm` of the wrong type; for an integer, bool or other leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> total, norms = clipjax.clip_grad_per_example(jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.inf, 0.0]]), 1.0)
    >>> print(total, norms)
    [0.90000004 1.2       ] [5.  0.5 inf]

  References:
    Abadi et al., Deep learning with differential privacy, 2016, https://arxiv.org/abs/1607.00133; algorithm 1.
  """
  max_norm = checks.check_threshold(max_norm, "max_norm")
  prepared = prepare(grads, "grads", axis_name=() if axis_name is None else axis_name)
  _check_batch(prepared)
  if axis_name is None:
    _check_axes(prepared)
  total, norms = _clip_examples(prepared.axes, prepared.measured, checks.within_range(max_norm))
  return prepared.with_all(total, lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype)), norms


def _check_batch(prepared: Prepared) -> None:
  """Raises unless every leaf has the same leading axis."""
  for i, leaf in enumerate(prepared.measured):
    if jnp.ndim(leaf) == 0:
      raise ValueError(
        f"`grads` must have a leading batch axis in every leaf, got {checks.describe(leaf)} at "
        f"'{prepared.names()[i]}': compute them with jax.vmap(jax.grad(loss), (None, 0))."
      )
    first = prepared.measured[0]
    if leaf.shape[0] != first.shape[0]:
      names = prepared.names()
      raise ValueError(
        f"`grads` must have the same batch size in every leaf, got {first.shape[0]} at '{names[0]}' and "
        f"{leaf.shape[0]} at '{names[i]}': the batch is the leading axis."
      )


def _check_axes(prepared: Prepared) -> None:
  """Raises if the types of the leaves show that a device does not hold its examples whole."""
  varying = list(map(varying_axes, prepared.measured))
  for i, axes in enumerate(varying):
    if axes != varying[0]:
      names = prepared.names()
      raise ValueError(
        "`axis_name` must be given if leaves vary over different mesh axes, got "
        f"'{names[0]}' over {list(varying[0])} and '{names[i]}' over {list(axes)}: pass the axes over which the "
        "gradient of one example is sharded."
      )


@partial(jax.jit, static_argnums=0, inline=True)
def _clip_examples(axes: tuple[Axes, ...], leaves: Sequence[Any], max_norm: Any) -> tuple[list[jax.Array], jax.Array]:
  xs = [upcast(x) for x in leaves]
  dtype = norm_dtype()
  if not xs:
    return [], jnp.zeros((0,), dtype)
  # Measure: one global norm for each example.
  spec = NormSpec(2.0, (tuple(range(len(xs))),), axes)
  norms = _example_norms(spec, xs)
  # Decide.
  limit = jnp.maximum(jnp.asarray(max_norm).astype(dtype), 0)
  usable = jnp.isfinite(norms) & ~jnp.isnan(limit)
  if not norms.size:
    return [jnp.sum(x, axis=0) for x in xs], norms
  # Scale and sum. An example without a norm is taken out before any product, whatever its factor.
  known = jnp.where(jnp.isnan(limit), 0, limit)
  return _sum_examples(usable, Limits(jnp.where(usable, norms, 0), known, known), xs), norms


def _rows_norms(spec: NormSpec, xs: Sequence[jax.Array]) -> jax.Array:
  norms: jax.Array = jax.vmap(lambda rows: measure(spec, rows).norms[0])(xs)
  return norms


_example_norms = jax.custom_jvp(_rows_norms, nondiff_argnums=(0,))


@_example_norms.defjvp
def _example_norms_jvp(spec: NormSpec, primals: Any, tangents: Any) -> Any:
  """A nonfinite norm has derivative 0, not NaN: its example adds nothing to the sum."""
  norms = _example_norms(spec, *primals)
  usable = jnp.isfinite(norms)
  xs, dxs = ([jax.vmap(_kept)(x, usable) for x in leaves] for (leaves,) in (primals, tangents))
  return norms, jax.jvp(partial(_rows_norms, spec), (xs,), (dxs,))[1]


def _kept(x: jax.Array, keep: jax.Array) -> jax.Array:
  """The example, or zeros; selected rather than multiplied, because NaN would survive a product."""
  return by_parts(lambda part: jnp.where(keep, part, 0), x)


@jax.custom_jvp
def _sum_examples(usable: jax.Array, limits: Limits, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """The sum of the usable examples of each leaf, each rescaled by the factor of its norm."""
  # The two multiplications of each example, in the narrowest dtype among the leaves.
  shrink, factor = safe_steps_of(limits, min((x.real.dtype for x in xs), key=lambda d: d.itemsize))
  if any(map(_is_split_by_type, xs)):
    return _sum_at_once(usable, shrink, factor, xs)
  # A weighted sum is a product of a vector and a matrix, which writes no clipped copy of the batch. It can neither skip
  # a nonfinite example nor multiply twice: batches that need this go one example at a time.
  plain = usable.all() & (shrink == 1).all()
  one_by_one = partial(_sum_one_by_one, usable, shrink, factor)
  chosen: list[jax.Array] = lax.cond(plain, partial(_weighted_sum, factor), one_by_one, xs)
  return chosen


@_sum_examples.defjvp
def _sum_examples_jvp(primals: Any, tangents: Any) -> Any:
  (usable, limits, xs), (_, dlimits, dxs) = primals, tangents

  # The tangent of each clipped example, then their sum. An example that is left out contributes 0.
  def of_example(keep: jax.Array, norm: jax.Array, dnorm: jax.Array, x: jax.Array, dx: jax.Array) -> jax.Array:
    return change(
      _kept(x, keep),
      _kept(dx, keep),
      limits._replace(norm=norm),
      dlimits._replace(norm=dnorm),
    )

  changes = [jax.vmap(of_example)(usable, limits.norm, dlimits.norm, x, dx) for x, dx in zip(xs, dxs, strict=True)]
  return _sum_examples(usable, limits, xs), [jnp.sum(c, axis=0) for c in changes]


def _weighted_sum(factor: jax.Array, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """`sum_i factor_i x_i` of each leaf."""

  def product(part: jax.Array) -> jax.Array:
    return jnp.tensordot(factor.astype(part.dtype), part, axes=1, precision=lax.Precision.HIGHEST)

  return [by_parts(product, x) for x in xs]


def _sum_one_by_one(keep: jax.Array, shrink: jax.Array, factor: jax.Array, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """`sum_i (x_i shrink_i) factor_i` of each leaf, over the examples to keep."""

  def add(sums: list[jax.Array], i: jax.Array) -> tuple[list[jax.Array], None]:
    return [total + _contribution(x[i], keep[i], shrink[i], factor[i]) for total, x in zip(sums, xs, strict=True)], None

  sums, _ = lax.scan(add, [_contribution(x[0], keep[0], shrink[0], factor[0]) for x in xs], jnp.arange(1, keep.size))
  return sums


def _sum_at_once(keep: jax.Array, shrink: jax.Array, factor: jax.Array, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """`_sum_one_by_one` for leaves whose examples cannot be indexed one by one."""
  return [jnp.sum(jax.vmap(_contribution)(x, keep, shrink, factor), axis=0) for x in xs]


def _contribution(x: jax.Array, keep: jax.Array, shrink: jax.Array, factor: jax.Array) -> jax.Array:
  """What one example adds to the sum."""
  return times(_kept(x, keep), shrink, factor)


def _is_split_by_type(x: jax.Array) -> bool:
  """Whether an explicit mesh axis splits the examples of a leaf: JAX refuses to index and to multiply such leaves."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  return sharding is not None and len(sharding.spec) > 0 and sharding.spec[0] is not None
