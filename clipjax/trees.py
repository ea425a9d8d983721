"""A tree of gradients, prepared: its measured leaves, their names, and the mesh axes that they are spread over.

Floating and complex leaves are measured. None and `optax.MaskedNode` are no leaves at all; float0 leaves (the
cotangents of integers) pass through untouched; anything else is a `TypeError` that names its path, except in `init`,
which passes over it. A name is the path with '/' between its parts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import mesh
from clipjax.checks import describe


class Prepared(NamedTuple):
  """A tree taken apart.

  Attributes:
    tree: as it came.
    leaves: all its leaves, float0 included.
    treedef: its structure.
    measured: the floating and complex leaves, in tree order.
    axes: the mesh axes to reduce each measured leaf over.
  """

  tree: Any
  leaves: list[Any]
  treedef: Any
  measured: list[Any]
  axes: tuple[mesh.Axes, ...]

  def with_measured(self, values: Sequence[Any]) -> Any:
    """The tree with new values for the measured leaves, float0 leaves as they were."""
    return self.with_all(values, lambda leaf: leaf)

  def with_all(self, values: Sequence[Any], other: Callable[[Any], Any]) -> Any:
    """The tree with new values for the measured leaves and `other(leaf)` for the rest."""
    it = iter(values)
    return jax.tree.unflatten(self.treedef, [next(it) if is_measured(x) else other(x) for x in self.leaves])

  def names(self) -> tuple[str, ...]:
    """The names of the measured leaves; for messages, since an eager step has no time for them."""
    return leaf_names(self.tree)


def prepare(
  tree: Any, argument: str, *, axis_name: Any = None, known: Sequence[str] | None = None, params: Any = None
) -> Prepared:
  """Takes a tree of gradients apart, and checks it.

  Args:
    tree: the gradients.
    argument: what a message calls them.
    axis_name: as in `global_norm`.
    known: names of the leaves that `init` saw; None for any.
    params: the parameters; where given, a gradient that is not reduced over their mesh axes is an error.

  Raises:
    TypeError: for a leaf that has no norm, with its path.
    ValueError: for another number of leaves than `init` saw, or an unreduced gradient.
  """
  leaves, treedef = jax.tree.flatten(tree)
  flags = [is_measured(x) for x in leaves]
  for i, (leaf, measured) in enumerate(zip(leaves, flags, strict=True)):
    if not measured and not is_float0(leaf):
      raise TypeError(
        f"`{argument}` must have floating or complex leaves, got {describe(leaf)} at "
        f"'{leaf_names(tree, lambda _: True)[i]}': leave it out of the tree, or mask it with `optax.masked`."
      )
  chosen = [x for x, measured in zip(leaves, flags, strict=True) if measured]
  if any(map(mesh.has_spec, chosen)):
    mesh.check_unreduced(chosen, argument, lambda: leaf_names(tree))
    chosen = list(map(mesh.without_reduced, chosen))
  if params is not None:
    weights = measured_leaves(params)
    mesh.check_unreduced(weights, "params", lambda: leaf_names(params))
    if mesh.manual_axes():
      mesh.check_reduced(chosen, weights, lambda: leaf_names(tree))
  if known is not None and len(chosen) != len(known):
    raise ValueError(_other_count(known, leaf_names(tree)))
  return Prepared(
    tree, leaves, treedef, chosen, mesh.resolve_axes(tree, leaves, flags, axis_name, lambda: leaf_names(tree))
  )


def check_real(prepared: Prepared, argument: str) -> None:
  """Raises for a complex leaf: its entries have no order, so there is no interval to clip them to."""
  for i, leaf in enumerate(prepared.measured):
    if jnp.iscomplexobj(leaf):
      raise TypeError(
        f"`{argument}` must have real leaves to clip by value, got {describe(leaf)} at '{prepared.names()[i]}': clip "
        "complex leaves by norm."
      )


def measured_leaves(tree: Any) -> list[Any]:
  """The floating and complex leaves of a tree."""
  return [x for x in jax.tree.leaves(tree) if is_measured(x)]


def is_measured(leaf: Any) -> bool:
  """Whether a leaf has a norm: floating and complex arrays whose dtype has zero and NaN, and Python floats."""
  dtype = _dtype(leaf)
  return dtype is not None and _has_norm(dtype)


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


def _other_count(known: Sequence[str], got: Sequence[str]) -> str:
  """The message where `update` sees another number of leaves than `init` did."""
  extra = [name for name in got if name not in known]
  missing = [name for name in known if name not in got]
  lists = [
    f"{what} {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"
    for what, names in (("new:", extra), ("missing:", missing))
    if names
  ]
  return (
    f"`updates` must have as many floating leaves as `init` saw, {len(known)}, got {len(got)}"
    f"{' (' + '; '.join(lists) + ')' if lists else ''}: call `init` with the parameters that you train."
  )


@functools.cache  # An eager call asks it of every leaf.
def _has_norm(dtype: Any) -> bool:
  inexact = jnp.issubdtype(dtype, np.inexact)
  return bool(inexact) and not np.dtype(dtype).name.startswith(("float8_e8m0", "float6_", "float4_"))


def _dtype(leaf: Any) -> Any:
  dtype = getattr(leaf, "dtype", None)
  if dtype is None and isinstance(leaf, bool | int | float | complex):
    return np.dtype(type(leaf))
  return dtype
