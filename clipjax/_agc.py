"""Adaptive gradient clipping: each unit of a leaf is clipped to a share of the norm of its parameters.

A unit is what feeds one output: a column of a matrix, a filter of a convolution, a whole vector. Norms are taken in
float32 (float64 for float64 leaves) and rescaled by the unit's largest entry, so that they are right at every
magnitude; that is one more pass over gradients and parameters than a plain sum of squares takes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from clipjax import _functional, _leaves, _norms
from clipjax._labels import Labels
from clipjax._transforms import ClipState, check_name, check_state, empty_state, next_state

Axis = int | tuple[int, ...] | None


def adaptive_grad_clip(
  clipping: ArrayLike = 0.01,
  eps: ArrayLike = 1e-3,
  *,
  axis: Axis = None,
  on_nonfinite: str = "propagate",
  name: str = "grad",
) -> optax.GradientTransformationExtraArgs:
  """AGC: scales each unit of the updates down to `clipping * max(norm of its parameters, eps)`.

  The units are Optax's: a scalar or vector is one; of rank 2 and 3 the columns (all but axis 0), of rank 4 and 5 the
  last axis. A zero unit stays zero, a unit at or under its limit is bit-identical. Where any entry of the updates is
  inf or NaN, or a norm of parameters is, `on_nonfinite` says what happens to every leaf.

  Layers that are stacked for `lax.scan` have one axis more, which these rules take for something else: give `axis`,
  the axes over which the norm of a unit is taken, or exempt them with `optax.masked`. Under plain jit on sharded arrays
  all is right as it stands; inside `shard_map` a leaf that varies over a mesh axis is an error.

  Args:
    clipping: number or scalar array >= 0: the largest ratio of the norm of an update to that of its parameters.
    eps: number or scalar array >= 0: the least norm of parameters, so that units that start at zero can learn.
    axis: the axes that make up a unit, for every leaf; None takes the rule above.
    on_nonfinite: "propagate", "zero" or "error", as in `clip_by_global_norm`.
    name: first part of the keys of `clipjax.metrics`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`. Its `ClipState` has, by leaf, the norm
    before the clip, the smallest limit of a unit and the smallest factor.

  Raises:
    ValueError: for a negative or NaN Python number or an unknown policy; in `update`, without `params`, or with
      others than the updates belong to, and for a leaf of rank above 5 without `axis`.
    TypeError: for an `axis` that is not made of integers; in `update`, for an integer or bool leaf, with its path.
    FloatingPointError: in an eager `update` with "error", for a step that is not finite.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> params, grads = jnp.array([[3.0, 0.3], [4.0, 0.4]]), jnp.array([[0.3, 0.3], [0.4, 0.4]])
    >>> tx = clipjax.adaptive_grad_clip(0.1)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates)
    [[0.3  0.03]
     [0.4  0.04]]

  References:
    Brock et al., High-performance large-scale image recognition without normalization, 2021,
    https://arxiv.org/abs/2102.06171; section 4, equation 3.
  """
  remedy = "pass a ratio such as 0.01"
  clipping = _functional.check_threshold(clipping, "clipping", remedy=remedy)
  eps = _functional.check_eps(eps)
  _functional.check_policy(on_nonfinite)
  axis = _checked_axis(axis)
  label = partial(Labels.of, name=check_name(name), unit="leaf")
  unlabelled = label(())

  def init(params: optax.Params) -> ClipState:
    return empty_state(label(params), rule=())

  def update(
    updates: optax.Updates, state: ClipState, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, ClipState]:
    del extra_args
    check_state(state, unlabelled)
    if not isinstance(state.rule, tuple) or state.rule:
      raise ValueError(
        f"`state` must have no rule, as the one that `init` gave, got {_leaves.describe(state.rule)}: pass the state "
        "of this transformation, or call `init` anew."
      )
    flat = _leaves.flatten(updates, "updates")
    state.labels.check_count(updates, len(flat.measured))
    for leaf_name, x in zip(state.labels.leaves, flat.measured, strict=True):
      if axes_of_mesh := _leaves.varying_axes(x):
        raise ValueError(
          f"`updates` must not vary over mesh axes inside shard_map, got '{leaf_name}' varying over "
          f"{list(axes_of_mesh)}: its type does not say which of its axes are sharded. Clip outside, under plain jit."
        )
    weights = _matching_params(flat, updates, params)
    axes = [_unit_axes(x, axis, name) for x, name in zip(flat.measured, state.labels.leaves, strict=True)]
    new, measured = _clip_units(tuple(axes), on_nonfinite, flat.measured, weights, clipping, eps)
    if on_nonfinite == "error":
      _functional.raise_nonfinite(measured["bad"], measured["norm"], updates)
    return flat.with_measured(new), next_state(state, **measured)

  return optax.GradientTransformationExtraArgs(init, update)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _clip_units(
  axes: tuple[tuple[int, ...], ...],
  policy: str,
  leaves: Sequence[Any],
  weights: Sequence[Any],
  clipping: Any,
  eps: Any,
) -> tuple[list[jax.Array], dict[str, Any]]:
  """The clipped leaves, and the fields of the next state."""
  dtype = _norms.norm_dtype()
  share = jnp.maximum(jnp.asarray(clipping).astype(dtype), 0)
  spec = _norms.NormSpec(2.0, tuple((i,) for i in range(len(leaves))), ((),) * len(leaves))
  first_bad = _norms.first_nonfinite(spec, leaves)
  out, limits, scales, before, after = [], [], [], [], []
  for x, w, unit in zip(leaves, weights, axes, strict=True):
    wide = _norms.upcast(x)
    real = wide.real.dtype
    least = jnp.maximum(jnp.asarray(eps).astype(real), 0)
    norms = unit_norms(wide, unit)
    limit = share.astype(real) * jnp.maximum(unit_norms(_norms.upcast(w), unit).astype(real), least)
    limit = jnp.where(share == jnp.inf, jnp.inf, limit)  # Of parameters that are 0 too.
    units = _functional.Limits(norms, limit, limit)
    out.extend(_functional.rescale((0,), [jnp.asarray(x)], [units], jnp.zeros((), jnp.bool_)))
    # Norms of a leaf from those of its units, each of which counts once.
    before.append(_norms.vector_norm(norms.ravel().astype(dtype), 2.0))
    after.append(_norms.vector_norm(_functional.norm_after(norms, units).ravel().astype(dtype), 2.0))
    limits.append(jnp.min(limit, initial=jnp.inf).astype(dtype))
    scales.append(jnp.min(_functional.scale_of(units), initial=1.0).astype(dtype))
  by_leaf, limit, scale = _norms.stack(before), _norms.stack(limits), _norms.stack(scales)
  norm = _norms.vector_norm(by_leaf, 2.0)
  bad = ~jnp.isfinite(by_leaf).all() | ~jnp.isfinite(norm) | jnp.isnan(limit).any()
  fill = jnp.zeros((), dtype) if policy == "zero" else _functional.nan_if(bad, dtype)
  out = [jnp.where(bad, fill.astype(y.dtype), y) for y in out]
  return out, {
    "norm": norm,
    "norm_clipped": jnp.where(bad, fill, _norms.vector_norm(_norms.stack(after), 2.0)),
    "max_norm": limit,
    "scale": jnp.where(bad, fill, scale),
    "norms": by_leaf,
    "clipped": (scale < 1).any(),
    "bad": bad,
    "first_bad": first_bad,
    "rule": (),
  }


def unit_norms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """The 2-norm over some axes, which stay with size 1; right at every magnitude, with the derivative 0 at 0."""
  largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0))
  usable = (largest > 0) & (largest < jnp.inf)
  unit = jnp.where(usable, largest, 1)
  ratio = _norms.by_parts(lambda part: jnp.where(usable, _norms.divide(part, unit), 0), x)
  squares = jnp.square(ratio) if not jnp.iscomplexobj(ratio) else jnp.square(ratio.real) + jnp.square(ratio.imag)
  total = jnp.sum(squares, axis=axes, keepdims=True)
  return jnp.where(usable, unit * jnp.sqrt(jnp.where(usable, total, 1)), largest)


def _unit_axes(x: Any, axis: tuple[int, ...] | None, name: str) -> tuple[int, ...]:
  """The axes over which the norm of a unit of this leaf is taken."""
  shape = jnp.shape(x)
  if axis is not None:
    for a in axis:
      if not -len(shape) <= a < len(shape):
        raise ValueError(
          f"`axis` must be within the rank of every leaf, got {a} for shape {shape} at '{name}': exempt that leaf with "
          "`optax.masked`."
        )
    return tuple(sorted({a % len(shape) for a in axis}))
  if sum(size != 1 for size in shape) <= 1:  # As in Optax, a vector stays one with axes of size 1 around it.
    return tuple(range(len(shape)))
  if len(shape) in (2, 3):
    return (0,)
  if len(shape) in (4, 5):
    return tuple(range(len(shape) - 1))
  raise ValueError(
    f"`axis` must be given for leaves of rank above 5, got shape {shape} at '{name}': pass the axes that make up a "
    "unit."
  )


def _matching_params(flat: _leaves.Flat, updates: Any, params: Any) -> list[Any]:
  """The parameters of the measured leaves."""
  if params is None:
    raise ValueError(
      "`params` must be given to clip by the norm of parameters, got None: call update(grads, state, params)."
    )
  weights = [w for w in jax.tree.leaves(params) if _leaves.is_measured(w)]
  if [jnp.shape(w) for w in weights] == [jnp.shape(x) for x in flat.measured]:
    return weights
  names = _leaves.leaf_names(updates)
  ours, theirs = ([jnp.shape(x) for x in v] for v in (flat.measured, weights))
  where = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
  at = f" from '{names[where]}' on" if where < len(names) else ""
  raise ValueError(
    f"`params` must have the floating leaves of `updates`, got {len(weights)} leaves for {len(names)}, which "
    f"differ{at}: pass the parameters that the updates belong to."
  )


def _checked_axis(axis: Any) -> tuple[int, ...] | None:
  if axis is None:
    return None
  axes = axis if isinstance(axis, tuple | list) else (axis,)
  for a in axes:
    if isinstance(a, bool) or not isinstance(a, int):
      remedy = f"pass Python integers; {_leaves.STATIC_ARGS_REMEDY}" if isinstance(a, jax.Array) else "pass integers"
      raise TypeError(f"`axis` must be an integer or a tuple of them, got {_leaves.describe(a)}: {remedy}.")
  return tuple(axes)
