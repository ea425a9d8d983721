"""Layers stacked in one array: which axis of a leaf counts them, and how each slice is named.

A model that scans over its layers keeps the weights of all layers in one array. With `stacked=`, each slice along that
axis is a leaf of its own: slice 3 of `blocks/w` is `blocks/w[3]`. `init` settles the axes, and the labels of a state
carry them with the number of layers, which lets `update` notice a leaf that has lost some.

  the user's word on each leaf  ->  Stack(axis, size)  ->  the axes of a norm; names; vectors to leaves and back
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax import mesh
from clipjax.checks import STATIC_ARGS_REMEDY, check_takes, describe, is_function
from clipjax.leaves import axis_names, is_measured, leaf_names, measured_leaves, without_repeats

_RULE = "`stacked` must be a function (path, leaf) -> axis, a prefix tree of axes, or the name of an axis"
_FUNCTION = "write a function such as `lambda path, leaf: 0 if path.startswith('blocks/') else None`"


class Stack(NamedTuple):
  """A leaf of stacked layers.

  Attributes:
    axis: the axis that counts the layers, >= 0.
    size: the number of layers.
  """

  axis: int
  size: int


# The stack of each leaf, None for a whole leaf; () if no leaf is stacked.
Stacks: TypeAlias = tuple[Stack | None, ...]


def by_leaf(stacks: Stacks, leaves: int) -> Stacks:
  """The stack of each leaf, with () spelled out as None for each."""
  return stacks or (None,) * leaves


# The user's word -----------------------------------------------------------------------------------------------------


def stacks_of(tree: Any, stacked: Any, *, axis_name: Any = None) -> Stacks:
  """The stack of each measured leaf of a tree; () if none is stacked.

  Args:
    tree: the parameters, or gradients.
    stacked: the user's `stacked`.
    axis_name: the user's `axis_name`; None leaves it to the types to name the mesh axes that shard a leaf.

  Raises:
    TypeError: for an axis that is not a Python integer, with the leaf.
    ValueError: for an axis that the leaf does not have, a tree that does not match, a name that no leaf carries, or a
      leaf inside `shard_map` whose layers may be spread over devices.
  """
  if stacked is None:
    return ()
  names, leaves = leaf_names(tree), measured_leaves(tree)
  axes = _axes_of(tree, stacked, names, leaves)
  stacks = tuple(map(_checked, axes, leaves, names))
  # Inside shard_map a type says that a leaf is split, but not along which of its axes: it may be the layers.
  if axis_name is None and mesh.manual_axes():
    for name, leaf, stack in zip(names, leaves, stacks, strict=True):
      if stack and (varying := mesh.varying_axes(leaf)):
        raise ValueError(
          f"`stacked` needs every layer on each device, got '{name}' varying over {list(varying)} inside shard_map, "
          "where its type does not say which of its axes are sharded: pass the mesh axes that split a single layer as "
          "`axis_name`, () for none; or, for a transformation with a state, call `init` outside with whole parameters."
        )
  return stacks if any(stacks) else ()


def _axes_of(tree: Any, stacked: Any, names: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
  """The axis that the user gave for each measured leaf."""
  if not names:  # A placeholder without leaves only has to show its structure.
    return []
  if isinstance(stacked, str):
    return _named_axes(tree, stacked)
  if is_function(stacked):
    check_takes(stacked, "`stacked`", "path, leaf", "0 if path.startswith('blocks/') else None")
    return [stacked(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
  try:  # Broadcast numbers in place of the axes, since JAX does not count None as a leaf.
    entries, treedef = jax.tree.flatten(stacked, is_leaf=lambda x: x is None)
    places = jax.tree.leaves(jax.tree.broadcast(jax.tree.unflatten(treedef, range(len(entries))), tree))
  except ValueError as error:
    raise ValueError(f"{_RULE}, got a tree that does not match: {_FUNCTION}. JAX says of the tree: {error}") from None
  return [entries[place] for place, leaf in zip(places, jax.tree.leaves(tree), strict=True) if is_measured(leaf)]


def _named_axes(tree: Any, name: str) -> list[int | None]:
  """The axis of each leaf that carries this name in the metadata of its Flax box."""
  named = axis_names(tree)
  found = [next((i for i, axis in enumerate(axes) if axis == name), None) for axes in named]
  # The part of a model that a mask, a multi_transform or None leaves may have no layers.
  if all(axis is None for axis in found) and not _has_gaps(tree):
    known = sorted({axis for axes in named for axis in axes if isinstance(axis, str)})
    has = f"they have {', '.join(map(repr, known))}" if known else "no leaf has metadata"
    raise ValueError(
      f"`stacked` must name an axis in the metadata of Flax boxes, got {name!r}, which no leaf has ({has}): give axis "
      "names to the variables too, and `metadata_params` to nn.scan or `transform_metadata` to the nnx.vmap that "
      f"makes the layers; or {_FUNCTION}."
    )
  return found


def _has_gaps(tree: Any) -> bool:
  def is_gap(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)

  return any(map(is_gap, jax.tree.leaves(tree, is_leaf=is_gap)))


def _checked(axis: Any, leaf: Any, name: str) -> Stack | None:
  """The stack of a leaf; raises for an axis that the leaf does not have."""
  if axis is None:
    return None
  if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
    remedy = f"pass a Python integer; {STATIC_ARGS_REMEDY}" if isinstance(axis, jax.Array) else "pass an integer"
    raise TypeError(f"{_RULE}, got {describe(axis)} for the {describe(leaf)} at '{name}': {remedy}.")
  shape = jnp.shape(leaf)
  if not -len(shape) <= axis < len(shape):
    allowed = f"from {-len(shape)} to {len(shape) - 1}" if shape else "and a scalar has none"
    raise ValueError(
      f"`stacked` must give an axis of the leaf, {allowed}, got {axis} for shape {shape} at '{name}': give None for a "
      "leaf that is not stacked."
    )
  return Stack(int(axis) % len(shape), shape[axis])


def check_layers(leaves: Sequence[Any], stacks: Stacks, names: Callable[[], Sequence[str]], argument: str) -> None:
  """Raises if a stacked leaf has fewer or more layers than `init` saw."""
  for i, (leaf, stack) in enumerate(zip(leaves, stacks, strict=True)):
    shape = jnp.shape(leaf)
    if stack and (len(shape) <= stack.axis or shape[stack.axis] != stack.size):
      remedy = (
        "its layers are spread over devices; clip outside shard_map, under plain jit, where sharded arrays need no "
        "option"
        if mesh.manual_axes()
        else "call `init` with the parameters that you train"
      )
      raise ValueError(
        f"`{argument}` must have the {stack.size} layers that `init` saw along axis {stack.axis} of '{names()[i]}', "
        f"got {describe(leaf)}: {remedy}."
      )


# Norms of slices -----------------------------------------------------------------------------------------------------


def over(leaves: Sequence[Any], stacks: Stacks) -> tuple[tuple[int, ...] | None, ...]:
  """The axes that the norms of each leaf are taken over: all except the axis of its layers; None for a whole leaf."""
  return tuple(
    tuple(a for a in range(jnp.ndim(leaf)) if a != stack.axis) if stack else None
    for leaf, stack in zip(leaves, stacks, strict=True)
  )


def sizes(stacks: Stacks) -> list[int]:
  """The number of norms of each leaf."""
  return [stack.size if stack else 1 for stack in stacks]


def spread_out(values: Sequence[Any], stacks: Stacks) -> list[Any]:
  """Repeats the value of each leaf for its slices."""
  return [value for value, n in zip(values, sizes(stacks), strict=True) for _ in range(n)]


def slice_sizes(leaves: Sequence[Any], stacks: Stacks) -> list[int]:
  """The number of entries in each slice."""
  pairs = zip(leaves, sizes(stacks), strict=True)
  return spread_out([jnp.size(leaf) // max(n, 1) for leaf, n in pairs], stacks)


def split(vector: jax.Array, leaves: Sequence[Any], stacks: Stacks) -> Iterator[jax.Array]:
  """Splits a vector with an entry for each slice into arrays that broadcast against the leaves."""
  # A whole leaf takes one entry, a stacked leaf one for each layer, laid along the axis of its layers.
  start = 0
  for leaf, stack in zip(leaves, stacks, strict=True):
    if stack is None:
      yield vector[start]
      start += 1
    else:
      shape = [1] * jnp.ndim(leaf)
      shape[stack.axis] = stack.size
      yield mesh.split_as(vector[start : start + stack.size].reshape(shape), leaf, stack.axis)
      start += stack.size


def by_slice(x: Any, stack: Stack | None) -> Any:
  """Reshapes an array that broadcasts against a leaf, such as the norms of its units, to one row for each slice."""
  x = mesh.replicated(x)  # JAX refuses to merge axes if an explicit mesh splits one of them.
  if stack is None:
    return x.reshape(1, x.size)
  return jnp.moveaxis(x, stack.axis, 0).reshape(stack.size, x.size // max(stack.size, 1))


# Names ---------------------------------------------------------------------------------------------------------------


def slice_names(leaves: Sequence[str], stacks: Stacks) -> tuple[str, ...]:
  """The names of all slices: "blocks/w[3]" for a layer of a stack, the leaf's name for a whole leaf."""
  if not stacks:
    return tuple(leaves)
  pairs = zip(leaves, stacks, strict=True)
  names = ([name] if s is None else [f"{name}[{i}]" for i in range(s.size)] for name, s in pairs)
  return without_repeats(name for some in names for name in some)


def slice_types(leaves: Sequence[Any], stacks: Stacks) -> list[Any]:
  """What a user's function gets as the leaf of each slice: the leaf itself, or the shape and dtype of a layer."""
  out: list[Any] = []
  for leaf, stack in zip(leaves, by_leaf(stacks, len(leaves)), strict=True):
    if stack is None:
      out.append(leaf)
    else:
      # Describe a layer by its shape and dtype, instead of slicing the array for each of them.
      shape = jnp.shape(leaf)
      out += [jax.ShapeDtypeStruct(shape[: stack.axis] + shape[stack.axis + 1 :], jnp.result_type(leaf))] * stack.size
  return out


def absent(stack: Stack | None) -> Any:
  """A stand-in for a leaf that is None: no entries, and norm 0, or one norm 0 for each layer if it is stacked."""
  return np.zeros((0,) if stack is None else (1,) * stack.axis + (stack.size, 0), np.float32)


def is_absent(leaf: Any) -> bool:
  """Whether this is the stand-in for a leaf that is None."""
  return isinstance(leaf, np.ndarray) and leaf.size == 0
