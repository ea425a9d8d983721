"""Adaptive gradient clipping: clips each unit of a leaf to a share of the norm of its parameters.

A unit is the part of a leaf that feeds one output: a column of a matrix, a filter of a convolution, a whole vector. AGC
runs the stages of the engine with a norm for each unit instead of each leaf, and with limits from the parameters.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from clipjax import checks, nonfinite
from clipjax.arithmetic import vector_norm
from clipjax.groups import Labels
from clipjax.mesh import varying_axes
from clipjax.norms.derivatives import measure
from clipjax.norms.sums import Measured, NormSpec, end_to_end, first_bad, norm_dtype
from clipjax.rules.base import no_limit
from clipjax.scaling import Limits, Spread, norm_after, scale_of
from clipjax.stacks import Stack, Stacks, by_leaf, by_slice, is_absent
from clipjax.transforms.engine import Clip, Decision, transformation
from clipjax.transforms.state import ClipState
from clipjax.trees import Prepared, paired

Axis = int | tuple[int, ...] | None


def adaptive_grad_clip(
  clipping: ArrayLike = 0.01,
  eps: ArrayLike = 1e-3,
  *,
  axis: Axis = None,
  stacked: Any = None,
  on_nonfinite: str = "propagate",
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """AGC: scales each unit of the updates down to a norm of `clipping * max(norm of its parameters, eps)`.

  The units follow Optax: a scalar or vector is one unit; a leaf of rank 2 or 3 has one for each index of all axes but
  axis 0 (its columns); a leaf of rank 4 or 5 has one for each index of the last axis. A zero unit stays zero, and a
  unit at or under its limit keeps its bits. If any entry of the updates or any parameter norm is inf or NaN, or the
  global norm is above the largest number of its dtype, `on_nonfinite` decides for every leaf.

  Layers stacked for `lax.scan` have one more axis, which these rules would mistake for part of a unit: name it with
  `stacked`, and the rules apply to each slice. Sharded arrays under plain jit need no option; inside `shard_map`, a
  leaf that varies over a mesh axis is an error.

  Args:
    clipping: number or scalar array >= 0: the largest ratio of the norm of an update to the norm of its parameters.
    eps: number or scalar array >= 0: the least parameter norm, which lets units that start at zero learn.
    axis: the axes that make up a unit, for every leaf or slice of a stacked leaf; None applies the rule above.
    stacked: see `clip_by_leaf_norm`.
    on_nonfinite, name, track: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`. Its `ClipState` has, by leaf or slice,
    the norm before the clip, the smallest limit of a unit and the smallest factor.

  Raises:
    ValueError: in `update`, without `params` or with parameters of other leaves or shapes; for a leaf of rank above 5
      without `axis`, or an `axis` that a leaf does not have; for a leaf that varies over a mesh axis.
    TypeError: for an `axis` that is not made of integers.
    Also as `clip_by_leaf_norm` does.

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
  clipping = checks.check_threshold(clipping, "clipping", remedy=remedy)
  eps = checks.check_eps(eps, remedy="pass a norm of parameters such as 1e-3")
  checks.check_policy(on_nonfinite)
  axis = _checked_axis(axis)
  checks.check_track(track, "clipping")
  # An axis name avoids an error in `init` inside shard_map: the error in `update` says more.
  label = partial(Labels.of, name=checks.check_name(name), unit="leaf", stacked=stacked, axis_name=())

  def spec(prepared: Prepared, labels: Labels) -> NormSpec:
    return _spec_of_units(prepared.measured, labels, axis)

  def decide(prepared: Prepared, measured: Measured, state: ClipState, params: Any) -> Decision:
    # Parameters have the units of their updates, and their norms set the limits.
    weights = _matching_params(prepared, params)
    units = _spec_of_units(weights, state.labels, axis)
    share, least = checks.within_range(clipping), checks.within_range(eps)
    stacks = by_leaf(state.labels.stacks, len(weights))
    limits, bad, fields = _decide(units, stacks, on_nonfinite, measured.norms, weights, share, least)
    return Decision(limits, Spread(tuple(range(len(weights)))), bad, fields)

  return transformation(
    Clip(label, lambda labels: (), _without_rule, spec, decide, on_nonfinite=on_nonfinite, stacked=stacked), track
  )


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _decide(
  units: NormSpec,
  stacks: Stacks,
  policy: str,
  norms: Sequence[jax.Array],
  weights: Sequence[Any],
  clipping: Any,
  eps: Any,
) -> tuple[list[Limits], jax.Array, dict[str, Any]]:
  """Decides the limits of all units, from the norms of their parameters."""
  dtype = norm_dtype()
  # The limit of each unit: a share of its parameter norm, but of no less than eps.
  share, least = (jnp.maximum(jnp.asarray(x).astype(dtype), 0) for x in (clipping, eps))
  limits = [share * jnp.maximum(of_params, least) for of_params in measure(units, weights).norms]
  # An unlimited share gives no limit, even for parameters that are 0.
  most = no_limit(dtype)
  limits = [jnp.where(share >= most, most, jnp.minimum(limit, most)) for limit in limits]
  # A leaf without entries has no limit; this includes a leaf that is None.
  limits = [limit if jnp.size(w) else jnp.full_like(limit, most) for limit, w in zip(limits, weights, strict=True)]

  def of_slices(values: Iterable[jax.Array], p: float) -> jax.Array:
    """The p-norm over the units of each leaf or slice."""
    return end_to_end([vector_norm(by_slice(v, s), p) for v, s in zip(values, stacks, strict=True)], dtype)

  # The global norm and the lowest limits say whether the step is finite.
  norms_of_slices = of_slices(norms, 2.0)
  norm = vector_norm(norms_of_slices, 2.0)
  # Not `jnp.min`, which may drop a unit's NaN.
  lowest = of_slices(limits, -math.inf)
  lowest = jnp.where(lowest > most, most, lowest)  # A leaf without units gave inf.
  bad = nonfinite.is_bad(norm, [lowest])
  # The limits of each unit, and what the state will report of them.
  of_units = [Limits.of(n, limit, limit, bad) for n, limit in zip(norms, limits, strict=True)]
  after = of_slices((norm_after(n, unit) for n, unit in zip(norms, of_units, strict=True)), 2.0)
  scale = of_slices(map(scale_of, of_units), -math.inf)
  scale = jnp.where(scale > 1, 1, scale)
  fields = {
    "norm": norm,
    "norm_clipped": nonfinite.number(policy, bad, vector_norm(after, 2.0)),
    "max_norm": lowest,
    "scale": nonfinite.number(policy, bad, scale),
    "norms": norms_of_slices,
    "first_bad": first_bad(norms_of_slices),
    "clipped": (scale < 1).any(),
    "rule": (),
  }
  return of_units, bad, fields


def _spec_of_units(leaves: Sequence[Any], labels: Labels, axis: tuple[int, ...] | None) -> NormSpec:
  """The spec with one norm for each unit."""
  for name, x in zip(labels.leaves, leaves, strict=True):
    if axes := varying_axes(x):
      raise ValueError(
        f"`updates` must not vary over mesh axes inside shard_map, got '{name}' varying over {list(axes)}: its type "
        "does not say which of its axes are sharded. Clip outside, under plain jit."
      )
  # Every leaf is a block, with one norm for each unit.
  stacks = by_leaf(labels.stacks, len(leaves))
  over = tuple(_unit_axes(x, s, axis, name) for x, s, name in zip(leaves, stacks, labels.leaves, strict=True))
  return NormSpec(2.0, tuple((i,) for i in range(len(over))), ((),) * len(over), over)


def _without_rule(state: ClipState) -> ClipState:
  if not isinstance(state.rule, tuple) or state.rule:
    raise ValueError(
      f"`state` must have no rule, as `init` made it, got {checks.describe(state.rule)}: pass the state of this "
      "transformation, or call `init` again."
    )
  return state


def _unit_axes(x: Any, stack: Stack | None, axis: tuple[int, ...] | None, name: str) -> tuple[int, ...]:
  """The axes that the norm of a unit of this leaf is taken over."""
  if stack is None:
    return (0,) if is_absent(x) else _unit_axes_of_shape(jnp.shape(x), axis, name)
  # The axis of the layers is no part of a unit: apply the rule to the shape without it, then map the axes back.
  others = [a for a in range(jnp.ndim(x)) if a != stack.axis]
  if is_absent(x):
    return tuple(others)
  return tuple(others[a] for a in _unit_axes_of_shape(tuple(jnp.shape(x)[a] for a in others), axis, f"{name}[0]"))


def _unit_axes_of_shape(shape: tuple[int, ...], axis: tuple[int, ...] | None, name: str) -> tuple[int, ...]:
  """The axes of a unit in a leaf, or slice, of this shape."""
  if axis is not None:
    for a in axis:
      if not -len(shape) <= a < len(shape):
        raise ValueError(
          f"`axis` must be within the rank of every leaf, got {a} for shape {shape} at '{name}': exempt that leaf with "
          "`optax.masked`."
        )
    return tuple(sorted({a % len(shape) for a in axis}))
  if sum(size != 1 for size in shape) <= 1:  # As in Optax, axes of size 1 do not change a vector.
    return tuple(range(len(shape)))
  if len(shape) in (2, 3):
    return (0,)
  if len(shape) in (4, 5):
    return tuple(range(len(shape) - 1))
  raise ValueError(
    f"`axis` must be given for leaves of rank above 5, got shape {shape} at '{name}': pass the axes that make up a "
    "unit."
  )


def _matching_params(prepared: Prepared, params: Any) -> list[Any]:
  """The parameters of the measured leaves; a leaf that is None gets an absent parameter too."""
  if params is None:
    raise ValueError(
      "`params` must be given to clip by the norm of parameters, got None: call update(grads, state, params)."
    )
  weights = [x if is_absent(x) else w for x, w in zip(prepared.measured, paired(params, prepared), strict=True)]
  for i, (x, w) in enumerate(zip(prepared.measured, weights, strict=True)):
    if w is None or jnp.shape(w) != jnp.shape(x):
      got = "none" if w is None else checks.describe(w)
      raise ValueError(
        f"`params` must have the floating leaves of `updates`, got {got} for the {checks.describe(x)} at "
        f"'{prepared.names()[i]}': pass the parameters that the updates belong to."
      )
  return weights


def _checked_axis(axis: Any) -> tuple[int, ...] | None:
  if axis is None:
    return None
  axes = axis if isinstance(axis, tuple | list) else (axis,)
  for a in axes:
    if isinstance(a, bool) or not isinstance(a, int):
      remedy = f"pass Python integers; {checks.STATIC_ARGS_REMEDY}" if isinstance(a, jax.Array) else "pass integers"
      raise TypeError(f"`axis` must be an integer or a tuple of them, got {checks.describe(a)}: {remedy}.")
  return tuple(axes)
