"""Mesh axes: which ones shard a leaf, and sums over all shards.

Plain jit needs none of this: XLA adds the collectives. Inside `shard_map` the type of each leaf names the axes over
which its shards differ. The types are silent in `pmap` and `shard_map(check_vma=False)`, where `axis_name=` replaces
them; without it, a leaf in `pmap` is assumed to be whole on every device, as `pmean` makes it.
"""

import math
import traceback
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from clipjax.arithmetic import ordered_bits
from clipjax.checks import caller_level, describe

Axes: TypeAlias = tuple[Hashable, ...]

_AXIS_RULE = "`axis_name` must be a name, a tuple of names or a prefix tree of them"


def resolve_axes(
  tree: Any, leaves: Sequence[Any], measured: Sequence[bool], axis_name: Any, names: Callable[[], Sequence[str]]
) -> tuple[Axes, ...]:
  """The mesh axes to reduce each measured leaf over.

  None reads them from the types, which know them inside `shard_map` with its checks on. A name, a tuple of names or a
  prefix tree of them states them explicitly; if the types know better, a leaf is not summed over an axis that it does
  not vary over.

  Args:
    tree: the tree, for the prefix.
    leaves: all its leaves.
    measured: for each leaf, whether it has a norm.
    axis_name: the user's `axis_name`.
    names: the names of the measured leaves, for messages.

  Raises:
    TypeError, ValueError: for an `axis_name` that names no axis here.
    ValueError: if an enclosing `vmap` makes a sum over the mesh impossible.
  """
  chosen = [x for x, keep in zip(leaves, measured, strict=True) if keep]
  around = manual_axes()
  silent = bool(around) and _types_are_silent()
  if around and not silent:
    _check_batched(chosen, names)
  # Without a name, the types decide. Silent types in shard_map deserve a warning, since nothing else would fail.
  if axis_name is None:
    if not around:
      return ((),) * len(chosen)
    if silent and not _is_in_pmap():
      warnings.warn(
        "inside shard_map(check_vma=False) the types do not say which leaves are sharded, so each device computes its "
        "own norm: pass the mesh axes that shard the leaves as `axis_name`, or `axis_name=()` if every device holds "
        "whole leaves.",
        stacklevel=caller_level(),
      )
    found = tuple(map(varying_axes, chosen))
    _check_not_hidden(found, silent, names)
    return found
  entries, treedef = check_axis_name(axis_name)
  # Broadcast numbers in place of the names: JAX takes an empty tuple for an empty subtree, not for a name.
  try:
    places = jax.tree.leaves(jax.tree.broadcast(jax.tree.unflatten(treedef, range(len(entries))), tree))
  except ValueError as error:
    raise ValueError(
      f"{_AXIS_RULE}, got {axis_name!r}, which does not match the leaves: pass one entry for each leaf or branch. JAX "
      f"says: {error}"
    ) from None
  # With names, take each leaf's entry, and check that its axes exist, are of the mesh and are not hidden.
  given = tuple(_as_axes(entries[place]) for place, keep in zip(places, measured, strict=True) if keep)
  _check_in_scope(given)
  if around and not silent:
    _check_of_mesh(given, around, names)
    given = tuple(
      tuple(axis for axis in axes if axis in varying_axes(x)) for axes, x in zip(given, chosen, strict=True)
    )
  _check_not_hidden(given, silent, names)
  return given


def check_axis_name(axis_name: Any) -> tuple[list[Any], Any]:
  """The names as `jax.tree.flatten` gives them; raises for anything that is not a name."""
  names, treedef = jax.tree.flatten(axis_name, is_leaf=_is_axes)
  for some in names:
    if not _is_axes(some):
      raise TypeError(f"{_AXIS_RULE}, got {describe(some)}: pass the names as strings.")
    if len(set(_as_axes(some))) < len(_as_axes(some)):
      raise ValueError(f"`axis_name` must name each axis once, got {some!r}: remove the repeated name.")
  return names, treedef


def check_reduced(leaves: Sequence[Any], weights: Sequence[Any], names: Callable[[], Sequence[str]]) -> None:
  """Raises if an update varies over a mesh axis that its parameter does not vary over: a sum is still to be taken."""
  for i, (x, w) in enumerate(zip(leaves, weights, strict=True)):
    # JAX sums a gradient over the axes that its parameter does not vary over; an axis left over was not summed.
    extra = [axis for axis in varying_axes(x) if axis not in varying_axes(w)]
    if extra and w is not None:
      raise ValueError(
        f"`updates` must be reduced over the mesh axes that their parameters do not vary over, got "
        f"'{names()[i]}' varying over {extra}: reduce it with jax.lax.pmean or psum first."
      )


def check_unreduced(leaves: Sequence[Any], argument: str, names: Callable[[], Sequence[str]]) -> None:
  """Raises for a leaf whose type JAX marks as unreduced: each device holds one summand of it.

  Also raises for a leaf marked as reduced inside `shard_map`: JAX can neither compare it with a number there nor drop
  the mark.
  """
  for i, x in enumerate(leaves):
    if reduced := getattr(getattr(jax.typeof(x), "manual_axis_type", None), "reduced", None):
      raise ValueError(
        f"`{argument}` must have no leaves marked as reduced inside shard_map, got {describe(x)} at '{names()[i]}' "
        f"reduced over {sorted(reduced, key=str)}: leave `reduced` out of its spec in `in_specs`."
      )
    if axes := _unreduced_axes(x):
      raise ValueError(
        f"`{argument}` must be reduced over all mesh axes, got {describe(x)} at '{names()[i]}' whose type is unreduced "
        f"over {list(axes)}: reduce it first, with jax.sharding.reshard(x, jax.sharding.PartitionSpec(...)), or with "
        "jax.lax.psum inside shard_map."
      )


def has_spec(x: Any) -> bool:
  """Whether the type of a leaf may carry a mark; quick, since an eager call checks every leaf."""
  return hasattr(_sharding_of(x), "spec")


def without_reduced(x: Any) -> Any:
  """The leaf without the mark "reduced" of an explicit type: JAX 0.10 cannot compare such a leaf with a number."""
  sharding = _sharding_of(x)
  if not getattr(getattr(sharding, "spec", None), "reduced", None):
    return x
  spec = jax.sharding.PartitionSpec(*getattr(sharding.spec, "partitions", sharding.spec))
  return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, spec))


def replicated(x: jax.Array) -> jax.Array:
  """A small array without explicit mesh axes in its type: JAX refuses to join arrays that are sharded differently."""
  return _resharded(x, x, ()) if any(axes is not None for axes in _explicit_spec(x)) else x


def split_as(x: jax.Array, leaf: Any, axis: int) -> jax.Array:
  """A small array that broadcasts against a leaf, split along one axis in the same way as the leaf's explicit type.

  JAX broadcasts whole arrays, but cannot select between arrays of one shape that are sharded differently.
  """
  spec = _explicit_spec(leaf)
  axes = spec[axis] if axis < len(spec) else None
  return x if axes is None else _resharded(x, leaf, (*(None,) * axis, axes))


def _explicit_spec(x: Any) -> Sequence[Any]:
  """The explicit mesh axes in the type, for each array axis."""
  spec: Sequence[Any] = getattr(jax.typeof(x).sharding, "spec", ())
  return spec


def _resharded(x: jax.Array, leaf: Any, spec: Sequence[Any]) -> jax.Array:
  """The array with another spec on the mesh of a leaf, which may differ from the mesh in the context."""
  resharded: jax.Array = jax.sharding.reshard(
    x, jax.sharding.NamedSharding(_sharding_of(leaf).mesh, jax.sharding.PartitionSpec(*spec))
  )
  return resharded


def varying_axes(x: Any) -> Axes:
  """The mesh axes over which the shards of `x` differ inside `shard_map`; empty elsewhere."""
  if not isinstance(x, jax.Array):
    return ()
  aval = jax.typeof(x)
  # JAX before 0.10 keeps the set on the type itself.
  holder = getattr(aval, "manual_axis_type", aval)
  varying = getattr(holder, "varying", None)
  return tuple(sorted(getattr(aval, "vma", ()) if varying is None else varying, key=str))


def manual_axes() -> Axes:
  """The mesh axes of the enclosing `shard_map` or `pmap`; empty elsewhere."""
  return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def axes_size(axes: Axes) -> int:
  """The number of shards over some mesh axes; 1 for none."""
  size = 1
  for axis in axes:
    size *= lax.axis_size(axis)
  return size


def all_reduce(values: Sequence[jax.Array], axes: Sequence[Axes], p: float = 1.0) -> list[jax.Array]:
  """Sums values of any shape over mesh axes, with one collective for each set of axes and dtype.

  For p = inf and -inf, takes the maximum and minimum of values >= 0 instead; NaN if any is NaN.
  """
  out = list(values)
  # Values that share axes and dtype go through one collective, as one vector.
  together: dict[tuple[Axes, Any], list[int]] = {}
  for i, (value, leaf_axes) in enumerate(zip(values, axes, strict=True)):
    if leaf_axes:
      together.setdefault((leaf_axes, value.dtype), []).append(i)
  for (leaf_axes, _), indices in together.items():
    stacked = jnp.concatenate([values[i].ravel() for i in indices])
    if math.isinf(p):
      reduce: Callable[..., Any] = lax.pmax if p > 0 else lax.pmin
      reduced = lax.bitcast_convert_type(reduce(ordered_bits(stacked, p), leaf_axes), stacked.dtype)
    else:
      reduced = lax.psum(stacked, leaf_axes)
    start = 0
    for i in indices:  # Each value gets its part of the vector back.
      out[i] = reduced[start : start + values[i].size].reshape(values[i].shape)
      start += values[i].size
  return out


def _types_are_silent() -> bool:
  """Whether this runs inside `pmap` or `shard_map(check_vma=False)`, where no type can be made to vary."""
  return not varying_axes(_as_varying(jnp.zeros(()), manual_axes()[0]))


def _as_varying(x: jax.Array, axis: Hashable) -> jax.Array:
  """The array with a type that varies over an axis; unchanged in `pmap` and `shard_map(check_vma=False)`."""
  ops: Any = lax  # JAX has `pcast` from 0.8.2 on, and `pvary` before 0.10.
  varying: jax.Array = ops.pcast(x, axis, to="varying") if hasattr(ops, "pcast") else ops.pvary(x, axis)
  return varying


def _is_in_pmap() -> bool:
  """Whether the innermost enclosing map is `pmap`: JAX builds it from `shard_map`, so only the call stack tells."""
  modules = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
  return next((m for m in modules if m in ("jax._src.pmap", "jax._src.shard_map")), None) == "jax._src.pmap"


def _sharding_of(x: Any) -> Any:
  """The sharding of an array, or of the type of a traced one; None without a sharding."""
  return getattr(jax.typeof(x) if isinstance(x, jax.core.Tracer) else x, "sharding", None)


def _unreduced_axes(x: Any) -> Axes:
  """The mesh axes over which the type of an array is unreduced."""
  spec = getattr(_sharding_of(x), "spec", None)
  if spec is None:
    return ()
  # Under an explicit mesh the spec holds the mark, inside shard_map the type does.
  holders = (spec, getattr(jax.typeof(x), "manual_axis_type", None))
  return tuple(sorted({axis for holder in holders for axis in getattr(holder, "unreduced", None) or ()}, key=str))


def _check_batched(leaves: Sequence[Any], names: Callable[[], Sequence[str]]) -> None:
  """Raises for a leaf that a `vmap(spmd_axis_name=)` has batched around a `shard_map` with its checks on."""
  for i, x in enumerate(leaves):
    for axis in manual_axes():
      if not isinstance(x, jax.core.Tracer) or axis in varying_axes(x):
        continue
      try:  # The type seen here does not show the axis, but the type of the batched array does.
        _as_varying(x, axis)
      except ValueError:
        raise ValueError(
          "`spmd_axis_name` must be left out of a vmap around a shard_map with its checks on, got "
          f"'{names()[i]}' batched over {[axis]}: JAX cannot branch there. Leave it out, or pass `check_vma=False` to "
          "shard_map and `axis_name=` here."
        ) from None


def _check_of_mesh(given: Sequence[Axes], around: Axes, names: Callable[[], Sequence[str]]) -> None:
  """Raises for a `vmap` axis inside a `shard_map` with its checks on: JAX does not sum over it."""
  for i, axes in enumerate(given):
    for axis in axes:
      if axis not in around:
        raise ValueError(
          f"`axis_name` must name mesh axes inside a shard_map with its checks on, got {axis!r} for '{names()[i]}', "
          "the axis of a vmap, over which JAX does not sum there: pass `check_vma=False` to shard_map."
        )


def _check_not_hidden(given: Sequence[Axes], silent: bool, names: Callable[[], Sequence[str]]) -> None:
  """Raises if a `vmap` hides a mesh axis that a leaf is summed over, by using its name."""
  sizes = jax.sharding.get_abstract_mesh().shape
  for i, axes in enumerate(given):
    for axis in axes:
      if axis not in manual_axes():
        continue
      # The types tell for certain; if they are silent, only a different size shows it.
      is_hidden = lax.axis_size(axis) != sizes[axis] if silent else axis not in varying_axes(lax.axis_index(axis))
      if is_hidden:
        raise ValueError(
          f"`axis_name` of a vmap must differ from the mesh axes around it, got {axis!r}, over which '{names()[i]}' is "
          "to be summed: give the axis of the vmap another name."
        )


def _check_in_scope(given: Sequence[Axes]) -> None:
  """Raises for an axis that no enclosing map binds: JAX raises a `NameError`, or says nothing at all."""
  for axis in dict.fromkeys(axis for axes in given for axis in axes):
    try:
      lax.axis_size(axis)
    except NameError:
      around = f"only {', '.join(map(repr, manual_axes()))} here" if manual_axes() else "none here"
      raise ValueError(
        f"`axis_name` must name axes of the shard_map, pmap or vmap around, got {axis!r}, and there is {around}: "
        "correct the name, or leave `axis_name` out under plain jit."
      ) from None


def _is_axes(x: Any) -> bool:
  return x is None or isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(a, str) for a in x))


def _as_axes(names: Any) -> Axes:
  return () if names is None else (names,) if isinstance(names, str) else names
