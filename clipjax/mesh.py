"""Mesh axes: over which of them a leaf is spread, and sums over all shards.

Plain jit needs nothing of this: XLA adds the collectives. Inside `shard_map` the type of each leaf says over which axes
its shards differ. `pmap` and `shard_map(check_vma=False)` have silent types, and `axis_name=` speaks for them; without
it a leaf in `pmap` is taken to be whole on every device, as `pmean` makes it.
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

  None asks the types, which know inside `shard_map` with its checks on. A name, a tuple of names or a prefix tree of
  them says it by hand; where the types know better, a leaf is not summed over an axis that it does not vary over.

  Args:
    tree: the tree, for the prefix.
    leaves: all its leaves.
    measured: for each leaf, whether it has a norm.
    axis_name: what the user said.
    names: the names of the measured leaves, for messages.

  Raises:
    TypeError, ValueError: for an `axis_name` that names no axis here.
    ValueError: where a `vmap` around makes a sum over the mesh impossible.
  """
  chosen = [x for x, keep in zip(leaves, measured, strict=True) if keep]
  around = manual_axes()
  silent = bool(around) and _types_are_silent()
  if around and not silent:
    _check_batched(chosen, names)
  if axis_name is None:
    if not around:
      return ((),) * len(chosen)
    if silent and not _is_in_pmap():
      warnings.warn(
        "inside shard_map(check_vma=False) the types do not say which leaves are sharded, so that every device takes a "
        "norm of its own: pass `axis_name=` the mesh axes that leaves are sharded over, or `axis_name=()` where every "
        "device holds them whole.",
        stacklevel=caller_level(),
      )
    found = tuple(map(varying_axes, chosen))
    _check_not_hidden(found, silent, names)
    return found
  entries, treedef = check_axis_name(axis_name)
  try:  # Numbers in place of the names: an empty tuple in the tree is no leaf, and is not taken for a name then.
    places = jax.tree.leaves(jax.tree.broadcast(jax.tree.unflatten(treedef, range(len(entries))), tree))
  except ValueError as error:
    raise ValueError(f"{_AXIS_RULE}, got {axis_name!r}: {error}") from None
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
  """The names as `jax.tree.flatten` gives them; raises for what is no name."""
  names, treedef = jax.tree.flatten(axis_name, is_leaf=_is_axes)
  for some in names:
    if not _is_axes(some):
      raise TypeError(f"{_AXIS_RULE}, got {describe(some)}: pass the names as strings.")
    if len(set(_as_axes(some))) < len(_as_axes(some)):
      raise ValueError(f"`axis_name` must name each axis once, got {some!r}: leave out what is there twice.")
  return names, treedef


def check_reduced(leaves: Sequence[Any], weights: Sequence[Any], names: Callable[[], Sequence[str]]) -> None:
  """Raises where an update varies over a mesh axis over which its parameter does not: it is a sum not yet taken."""
  for i, (x, w) in enumerate(zip(leaves, weights, strict=True)):
    extra = [axis for axis in varying_axes(x) if axis not in varying_axes(w)]
    if extra and w is not None:
      raise ValueError(
        f"`updates` must be reduced over the mesh axes that their parameters do not vary over, got "
        f"'{names()[i]}' varying over {extra}: reduce it with jax.lax.pmean or psum first."
      )


def check_unreduced(leaves: Sequence[Any], argument: str, names: Callable[[], Sequence[str]]) -> None:
  """Raises for a leaf that JAX itself calls unreduced: each device holds a summand of it.

  Also for one that it calls reduced inside `shard_map`, where it neither compares it with a number nor drops the mark.
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
  """Whether a leaf may have a mark of its type; quick, since an eager call asks it of every leaf."""
  return hasattr(_sharding_of(x), "spec")


def without_reduced(x: Any) -> Any:
  """The leaf without the mark "reduced" that an explicit type may have: JAX 0.10 cannot compare it with a number."""
  sharding = _sharding_of(x)
  if not getattr(getattr(sharding, "spec", None), "reduced", None):
    return x
  spec = jax.sharding.PartitionSpec(*getattr(sharding.spec, "partitions", sharding.spec))
  return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, spec))


def replicated(x: jax.Array) -> jax.Array:
  """A small array whose type has no explicit mesh axes: JAX puts no arrays together that are sharded differently."""
  return _resharded(x, x, ()) if any(axes is not None for axes in _explicit_spec(x)) else x


def split_as(x: jax.Array, leaf: Any, axis: int) -> jax.Array:
  """A small array that broadcasts against a leaf, split along one axis as an explicit type says that the leaf is.

  JAX broadcasts what is whole, but chooses between no arrays of one shape that are sharded differently.
  """
  spec = _explicit_spec(leaf)
  axes = spec[axis] if axis < len(spec) else None
  return x if axes is None else _resharded(x, leaf, (*(None,) * axis, axes))


def _explicit_spec(x: Any) -> Sequence[Any]:
  """For each array axis the explicit mesh axes that the type has there."""
  spec: Sequence[Any] = getattr(jax.typeof(x).sharding, "spec", ())
  return spec


def _resharded(x: jax.Array, leaf: Any, spec: Sequence[Any]) -> jax.Array:
  """The array with another spec on the mesh of a leaf, which need not be the one that is set around."""
  resharded: jax.Array = jax.sharding.reshard(
    x, jax.sharding.NamedSharding(_sharding_of(leaf).mesh, jax.sharding.PartitionSpec(*spec))
  )
  return resharded


def varying_axes(x: Any) -> Axes:
  """The mesh axes over which the shards of `x` differ inside `shard_map`; empty elsewhere."""
  if not isinstance(x, jax.Array):
    return ()
  aval = jax.typeof(x)
  # Releases before 0.10 keep the set on the type itself.
  holder = getattr(aval, "manual_axis_type", aval)
  varying = getattr(holder, "varying", None)
  return tuple(sorted(getattr(aval, "vma", ()) if varying is None else varying, key=str))


def manual_axes() -> Axes:
  """The mesh axes of the `shard_map` or `pmap` around; empty elsewhere."""
  return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def axes_size(axes: Axes) -> int:
  """The number of shards over some mesh axes; 1 for none."""
  size = 1
  for axis in axes:
    size *= lax.axis_size(axis)
  return size


def all_reduce(values: Sequence[jax.Array], axes: Sequence[Axes], p: float = 1.0) -> list[jax.Array]:
  """Sums values of any shape over mesh axes, one collective a set of axes and dtype.

  For inf and -inf the maximum and minimum of values of at least 0, NaN where one is.
  """
  out = list(values)
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
    for i in indices:
      out[i] = reduced[start : start + values[i].size].reshape(values[i].shape)
      start += values[i].size
  return out


def _types_are_silent() -> bool:
  """Whether we are inside `pmap` or `shard_map(check_vma=False)`: there nothing can be made to vary."""
  return not varying_axes(_as_varying(jnp.zeros(()), manual_axes()[0]))


def _as_varying(x: jax.Array, axis: Hashable) -> jax.Array:
  """The array with a type that varies over an axis; in `pmap` and `shard_map(check_vma=False)` as it is."""
  ops: Any = lax  # Releases from 0.8.2 on have `pcast`, those before 0.10 `pvary`.
  varying: jax.Array = ops.pcast(x, axis, to="varying") if hasattr(ops, "pcast") else ops.pvary(x, axis)
  return varying


def _is_in_pmap() -> bool:
  """Whether `pmap`, and not `shard_map`, is the innermost around: JAX makes one of the other, and only calls tell."""
  modules = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
  return next((m for m in modules if m in ("jax._src.pmap", "jax._src.shard_map")), None) == "jax._src.pmap"


def _sharding_of(x: Any) -> Any:
  """The sharding of an array, or of the type of a traced one; None of what has none."""
  return getattr(jax.typeof(x) if isinstance(x, jax.core.Tracer) else x, "sharding", None)


def _unreduced_axes(x: Any) -> Axes:
  """The mesh axes over which JAX calls the type of an array unreduced."""
  spec = getattr(_sharding_of(x), "spec", None)
  if spec is None:
    return ()
  holders = (spec, getattr(jax.typeof(x), "manual_axis_type", None))
  return tuple(sorted({axis for holder in holders for axis in getattr(holder, "unreduced", None) or ()}, key=str))


def _check_batched(leaves: Sequence[Any], names: Callable[[], Sequence[str]]) -> None:
  """Raises for a leaf that `vmap(spmd_axis_name=)` around a `shard_map` with its checks on has batched."""
  for i, x in enumerate(leaves):
    for axis in manual_axes():
      if not isinstance(x, jax.core.Tracer) or axis in varying_axes(x):
        continue
      try:  # The type that is seen here does not say it; that of what is batched does.
        _as_varying(x, axis)
      except ValueError:
        raise ValueError(
          "`spmd_axis_name` must be left out of a vmap around a shard_map with its checks on, got "
          f"'{names()[i]}' batched over {[axis]}: JAX cannot branch there. Leave it out, or pass `check_vma=False` to "
          "shard_map and `axis_name=` here."
        ) from None


def _check_of_mesh(given: Sequence[Axes], around: Axes, names: Callable[[], Sequence[str]]) -> None:
  """Raises for an axis of a `vmap` inside a `shard_map` with its checks on, over which JAX does not sum."""
  for i, axes in enumerate(given):
    for axis in axes:
      if axis not in around:
        raise ValueError(
          f"`axis_name` must name mesh axes inside a shard_map with its checks on, got {axis!r} for '{names()[i]}', "
          "the axis of a vmap, over which JAX does not sum there: pass `check_vma=False` to shard_map."
        )


def _check_not_hidden(given: Sequence[Axes], silent: bool, names: Callable[[], Sequence[str]]) -> None:
  """Raises where a `vmap` has taken the name of a mesh axis that a leaf is to be summed over."""
  sizes = jax.sharding.get_abstract_mesh().shape
  for i, axes in enumerate(given):
    for axis in axes:
      if axis not in manual_axes():
        continue
      # Types that speak tell for certain; else only another size does.
      is_hidden = lax.axis_size(axis) != sizes[axis] if silent else axis not in varying_axes(lax.axis_index(axis))
      if is_hidden:
        raise ValueError(
          f"`axis_name` of a vmap must differ from the mesh axes around it, got {axis!r}, over which '{names()[i]}' is "
          "to be summed: give the axis of the vmap another name."
        )


def _check_in_scope(given: Sequence[Axes]) -> None:
  """Raises for an axis that nothing around binds: JAX says so with a `NameError`, or with no word at all."""
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
