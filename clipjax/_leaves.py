"""Which leaves of a tree are measured, what they are called, and over which mesh axes they are spread.

Floating and complex leaves are measured. None and `optax.MaskedNode` are no leaves at all; float0 leaves (the
cotangents of integers) pass through untouched; anything else is a `TypeError` that names its path, except in `init`,
which passes over it. A name is the path with '/' between its parts.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipjax._words import caller_level

Axes: TypeAlias = tuple[Hashable, ...]

# What to tell somebody whose number became a tracer inside optax.inject_hyperparams.
STATIC_ARGS_REMEDY = "under `optax.inject_hyperparams`, name it in `static_args`"


class Flat(NamedTuple):
  """A tree taken apart.

  Attributes:
    measured: the floating and complex leaves, in tree order.
    leaves: all leaves, float0 included.
    treedef: the structure.
  """

  measured: list[Any]
  leaves: list[Any]
  treedef: Any

  def with_measured(self, values: Sequence[Any]) -> Any:
    """The tree with new values for the measured leaves, float0 leaves as they were."""
    return self.with_all(values, lambda leaf: leaf)

  def with_all(self, values: Sequence[Any], other: Callable[[Any], Any]) -> Any:
    """The tree with new values for the measured leaves and `other(leaf)` for the rest."""
    it = iter(values)
    return jax.tree.unflatten(self.treedef, [next(it) if is_measured(x) else other(x) for x in self.leaves])


def flatten(tree: Any, argument: str) -> Flat:
  """Takes a tree of gradients apart.

  Raises:
    TypeError: for a leaf that has no norm, with its path.
  """
  leaves, treedef = jax.tree.flatten(tree)
  for i, leaf in enumerate(leaves):
    if not is_measured(leaf) and not is_float0(leaf):
      raise TypeError(
        f"`{argument}` must have floating or complex leaves, got {describe(leaf)} at "
        f"'{leaf_names(tree, lambda _: True)[i]}': leave it out of the tree, or mask it with `optax.masked`."
      )
  return Flat([x for x in leaves if is_measured(x)], leaves, treedef)


def is_measured(leaf: Any) -> bool:
  """Whether a leaf has a norm: floating and complex arrays whose dtype has zero and NaN, and Python floats."""
  dtype = _dtype(leaf)
  return dtype is not None and _has_norm(dtype)


@functools.cache  # An eager call asks it of every leaf.
def _has_norm(dtype: Any) -> bool:
  inexact = jnp.issubdtype(dtype, np.inexact)
  return bool(inexact) and not np.dtype(dtype).name.startswith(("float8_e8m0", "float6_", "float4_"))


def is_float0(leaf: Any) -> bool:
  """Whether this is the cotangent of an integer, which holds nothing."""
  return bool(_dtype(leaf) == jax.dtypes.float0)


def leaf_names(tree: Any, keep: Callable[[Any], bool] = is_measured) -> tuple[str, ...]:
  """Names the leaves that `keep` wants: '.' for a bare array, '_2' and so on behind a name that is taken."""
  names: list[str] = []
  taken: set[str] = set()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if not keep(leaf):
      continue
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if len(parts) > 1 and parts[-1] == "value":  # Flax NNX keeps an array in the `value` of a Variable.
      parts.pop()
    base = name = "/".join(parts) or "."
    copy = 1
    while name in taken:
      copy += 1
      name = f"{base}_{copy}"
    taken.add(name)
    names.append(name)
  return tuple(names)


def resolve_axes(tree: Any, axis_name: Any) -> tuple[Axes, ...]:
  """The mesh axes to reduce each measured leaf over.

  None asks the types, which know inside `shard_map` with its checks on. A name, a tuple of names or a prefix tree of
  them says it by hand; where the types know better, a leaf is not summed over an axis that it does not vary over.
  """
  measured = [x for x in jax.tree.leaves(tree) if is_measured(x)]
  if axis_name is None:
    if not manual_axes():
      return ((),) * len(measured)
    if _types_are_silent():
      warnings.warn(
        "inside pmap and shard_map(check_vma=False) the types do not say which leaves are sharded, so that every "
        "device takes a norm of its own: pass `axis_name=` the mesh axes that leaves are sharded over, or "
        "`axis_name=()` where every device holds them whole.",
        stacklevel=caller_level(),
      )
    return tuple(map(varying_axes, measured))
  names, treedef = check_axis_name(axis_name)
  try:  # Numbers in place of the names: an empty tuple in the tree is no leaf, and is not taken for a name then.
    places = jax.tree.leaves(jax.tree.broadcast(jax.tree.unflatten(treedef, range(len(names))), tree))
  except ValueError as error:
    raise ValueError(f"{_AXIS_RULE}, got {axis_name!r}: {error}") from None
  per_leaf = [names[place] for place in places]
  given = [_as_axes(n) for n, leaf in zip(per_leaf, jax.tree.leaves(tree), strict=True) if is_measured(leaf)]
  _check_in_scope(given)
  if not manual_axes() or _types_are_silent():
    return tuple(given)
  known = set(manual_axes())
  return tuple(
    tuple(axis for axis in axes if axis not in known or axis in varying_axes(x))
    for axes, x in zip(given, measured, strict=True)
  )


_AXIS_RULE = "`axis_name` must be a name, a tuple of names or a prefix tree of them"


def check_axis_name(axis_name: Any) -> tuple[list[Any], Any]:
  """The names as `jax.tree.flatten` gives them; raises for what is no name."""
  names, treedef = jax.tree.flatten(axis_name, is_leaf=_is_axes)
  for some in names:
    if not _is_axes(some):
      raise TypeError(f"{_AXIS_RULE}, got {describe(some)}: pass the names as strings.")
    if len(set(_as_axes(some))) < len(_as_axes(some)):
      raise ValueError(f"`axis_name` must name each axis once, got {some!r}: leave out what is there twice.")
  return names, treedef


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


def _types_are_silent() -> bool:
  """Whether we are inside `pmap` or `shard_map(check_vma=False)`: there not even an axis' own index varies over it."""
  axes = manual_axes()
  return bool(axes) and not varying_axes(lax.axis_index(axes[0]))


def check_reduced(updates: Any, params: Any) -> None:
  """Raises where an update varies over a mesh axis over which its parameter does not: it is a sum not yet taken.

  Without parameters nothing is known, and nothing raised.
  """
  if params is None or not manual_axes():
    return
  ours, theirs = ([x for x in jax.tree.leaves(tree) if is_measured(x)] for tree in (updates, params))
  if len(ours) != len(theirs):
    return
  for i, (x, w) in enumerate(zip(ours, theirs, strict=True)):
    extra = [axis for axis in varying_axes(x) if axis not in varying_axes(w)]
    if extra:
      raise ValueError(
        f"`updates` must be reduced over the mesh axes that their parameters do not vary over, got "
        f"'{leaf_names(updates)[i]}' varying over {extra}: reduce it with jax.lax.pmean or psum first."
      )


def check_state(state: Any, kind: type, *, or_else: str = "") -> None:
  """Raises where `update` is given the state of something else; `or_else` goes on with the remedy."""
  if not isinstance(state, kind):
    raise TypeError(
      f"`state` must be the {kind.__name__} that `init` gave, got {describe(state)}: pass the state of this "
      f"transformation{or_else}."
    )


def axes_size(axes: Axes) -> int:
  """The number of shards over some mesh axes; 1 for none."""
  size = 1
  for axis in axes:
    size *= lax.axis_size(axis)
  return size


def describe(x: Any) -> str:
  """A short text for error messages: dtype and shape of an array, type and value of a Python scalar."""
  shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
  if shape is not None and dtype is not None:
    traced = "traced " if isinstance(x, jax.core.Tracer) else ""
    return f"{traced}{dtype}[{','.join(map(str, shape))}]"
  kind = type(x).__name__
  if isinstance(x, int | float | complex | str):
    return f"{x!r} ({kind})"
  return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def is_plain(x: Any) -> bool:
  """Whether this is a text, a number or a function, none of which is a tree of arrays."""
  return isinstance(x, str | bytes | int | float | complex) or callable(x)


def describe_choice(x: Any) -> str:
  """A text for what should be one of some strings."""
  return describe(x) if hasattr(x, "shape") else repr(x)


def _dtype(leaf: Any) -> Any:
  dtype = getattr(leaf, "dtype", None)
  if dtype is None and isinstance(leaf, bool | int | float | complex):
    return np.dtype(type(leaf))
  return dtype


def _is_axes(x: Any) -> bool:
  return x is None or isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(a, str) for a in x))


def _as_axes(names: Any) -> Axes:
  return () if names is None else (names,) if isinstance(names, str) else names
