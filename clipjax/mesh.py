"""Mesh axes: over which of them a leaf is spread, and sums over all shards.

Plain jit needs nothing of this: XLA adds the collectives. Inside `shard_map` the type of each leaf says over which axes
its shards differ. `pmap` and `shard_map(check_vma=False)` have silent types, and `axis_name=` speaks for them.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from clipjax.checks import caller_level, describe

Axes: TypeAlias = tuple[Hashable, ...]

_AXIS_RULE = "`axis_name` must be a name, a tuple of names or a prefix tree of them"


def resolve_axes(tree: Any, leaves: Sequence[Any], measured: Sequence[bool], axis_name: Any) -> tuple[Axes, ...]:
  """The mesh axes to reduce each measured leaf over.

  None asks the types, which know inside `shard_map` with its checks on. A name, a tuple of names or a prefix tree of
  them says it by hand; where the types know better, a leaf is not summed over an axis that it does not vary over.

  Args:
    tree: the tree, for the prefix.
    leaves: all its leaves.
    measured: for each leaf, whether it has a norm.
    axis_name: what the user said.
  """
  chosen = [x for x, keep in zip(leaves, measured, strict=True) if keep]
  if axis_name is None:
    if not manual_axes():
      return ((),) * len(chosen)
    if _types_are_silent():
      warnings.warn(
        "inside pmap and shard_map(check_vma=False) the types do not say which leaves are sharded, so that every "
        "device takes a norm of its own: pass `axis_name=` the mesh axes that leaves are sharded over, or "
        "`axis_name=()` where every device holds them whole.",
        stacklevel=caller_level(),
      )
    return tuple(map(varying_axes, chosen))
  names, treedef = check_axis_name(axis_name)
  try:  # Numbers in place of the names: an empty tuple in the tree is no leaf, and is not taken for a name then.
    places = jax.tree.leaves(jax.tree.broadcast(jax.tree.unflatten(treedef, range(len(names))), tree))
  except ValueError as error:
    raise ValueError(f"{_AXIS_RULE}, got {axis_name!r}: {error}") from None
  given = [_as_axes(names[place]) for place, keep in zip(places, measured, strict=True) if keep]
  _check_in_scope(given)
  if not manual_axes() or _types_are_silent():
    return tuple(given)
  known = set(manual_axes())
  return tuple(
    tuple(axis for axis in axes if axis not in known or axis in varying_axes(x))
    for axes, x in zip(given, chosen, strict=True)
  )


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
  """Sums values over mesh axes (inf and -inf: their maximum and minimum), one collective a set of axes and dtype."""
  reduce: Callable[..., Any] = lax.pmax if p == float("inf") else lax.pmin if p == -float("inf") else lax.psum
  out = list(values)
  together: dict[tuple[Axes, Any], list[int]] = {}
  for i, (value, leaf_axes) in enumerate(zip(values, axes, strict=True)):
    if leaf_axes:
      together.setdefault((leaf_axes, value.dtype), []).append(i)
  for (leaf_axes, _), indices in together.items():
    reduced = reduce(jnp.stack([values[i] for i in indices]), leaf_axes)
    for k, i in enumerate(indices):
      out[i] = reduced[k]
  return out


def _types_are_silent() -> bool:
  """Whether we are inside `pmap` or `shard_map(check_vma=False)`: there not even an axis' own index varies over it."""
  axes = manual_axes()
  return bool(axes) and not varying_axes(lax.axis_index(axes[0]))


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
