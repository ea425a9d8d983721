"""Prepare: takes a tree of gradients apart into measured leaves, their stacked axes and the mesh axes that shard them.

Floating and complex leaves are measured; float0 leaves (the cotangents of integers) pass through untouched; any other
leaf is a `TypeError` that names its path, except in `init`, which ignores it.

Leaves are matched by position if `update` sees as many of them as `init` did, else by name. A frozen leaf may therefore
be None in the gradients, and the parameters may have leaves that the gradients lack.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax import mesh
from clipjax.checks import describe
from clipjax.leaves import is_float0, is_measured, leaf_names, measured_leaves, named_leaves
from clipjax.stacks import Stacks, absent, by_leaf, check_layers


class Prepared(NamedTuple):
  """A tree taken apart.

  Attributes:
    tree: the tree itself.
    leaves: all its leaves, float0 included.
    treedef: its structure.
    measured: the floating and complex leaves, in tree order; if some leaves that `init` saw are None now, all leaves
      that `init` saw, in its order, with `stacks.absent` in place of each None.
    axes: the mesh axes to reduce each measured leaf over.
    places: the index in `measured` of each floating and complex leaf of the tree.
    known: the names that `init` saw, if some leaves are None now; else None.
    stacks: which of the measured leaves are stacked layers; () for none.
  """

  tree: Any
  leaves: list[Any]
  treedef: Any
  measured: list[Any]
  axes: tuple[mesh.Axes, ...]
  places: Sequence[int]
  known: Sequence[str] | None
  stacks: Stacks

  def with_measured(self, values: Sequence[Any]) -> Any:
    """The tree with new values for the measured leaves, and float0 leaves unchanged."""
    return self.with_all(values, lambda leaf: leaf)

  def with_all(self, values: Sequence[Any], other: Callable[[Any], Any]) -> Any:
    """The tree with new values for the measured leaves and `other(leaf)` for the rest."""
    places = iter(self.places)
    return jax.tree.unflatten(self.treedef, [values[next(places)] if is_measured(x) else other(x) for x in self.leaves])

  def names(self) -> Sequence[str]:
    """The names of the measured leaves; only for messages, since computing them would slow an eager step."""
    return leaf_names(self.tree) if self.known is None else self.known


def prepare(
  tree: Any,
  argument: str,
  *,
  axis_name: Any = None,
  known: Sequence[str] | None = None,
  stacks: Stacks = (),
  params: Any = None,
) -> Prepared:
  """Takes a tree of gradients apart, and checks it.

  Args:
    tree: the gradients.
    argument: the name of the gradients in messages.
    axis_name: the user's `axis_name`.
    known: names of the leaves that `init` saw; None for any.
    stacks: which of them are stacked layers.
    params: the parameters; if given, a gradient that is not reduced over their mesh axes is an error.

  Raises:
    TypeError: for a leaf that has no norm, with its path.
    ValueError: for leaves that `init` did not see, a stack with other layers, or an unreduced gradient.
  """
  # Keep the leaves that have a norm, and refuse those that can neither be measured nor passed through.
  leaves, treedef = jax.tree.flatten(tree)
  flags = [is_measured(x) for x in leaves]
  for i, (leaf, has_norm) in enumerate(zip(leaves, flags, strict=True)):
    if not has_norm and not is_float0(leaf):
      raise TypeError(
        f"`{argument}` must have floating or complex leaves, got {describe(leaf)} at "
        f"'{leaf_names(tree, lambda _: True)[i]}': leave it out of the tree, or mask it with `optax.masked`."
      )
  measured = [x for x, has_norm in zip(leaves, flags, strict=True) if has_norm]

  def names() -> Sequence[str]:
    return leaf_names(tree)

  # Settle the mesh axes to reduce each leaf over.
  has_spec = any(map(mesh.has_spec, measured))
  if has_spec:
    mesh.check_unreduced(measured, argument, names)
    measured = list(map(mesh.without_reduced, measured))
  axes = mesh.resolve_axes(tree, leaves, flags, axis_name, names)
  # If the number of leaves differs from what `init` saw, match them by name; the missing ones must be frozen.
  places: Sequence[int] = range(len(measured))
  is_partial = known is not None and len(measured) != len(known)
  if known is not None and is_partial:
    got = names()
    if not _is_frozen_part(known, got, tree):
      raise ValueError(_other_leaves(argument, known, got))
    # Give every missing leaf a stand-in of norm 0, which keeps the order and number of norms in the state.
    place_of = {name: i for i, name in enumerate(known)}
    places = [place_of[name] for name in got]
    measured = _spread(measured, places, list(map(absent, by_leaf(stacks, len(known)))))
    axes = tuple(_spread(axes, places, [()] * len(known)))
  prepared = Prepared(tree, leaves, treedef, measured, axes, places, known if is_partial else None, stacks)
  if stacks:
    check_layers(measured, stacks, prepared.names, argument)
  # Without shards there is nothing unreduced: skip the check, which would slow an eager step.
  if params is not None and (has_spec or mesh.manual_axes()):
    mesh.check_unreduced(measured_leaves(params), "params", lambda: leaf_names(params))
    mesh.check_reduced(measured, paired(params, prepared), prepared.names)
  return prepared


def paired(params: Any, prepared: Prepared) -> list[Any]:
  """The parameter of each measured leaf: by position if there are as many, else by name; None if it has none."""
  weights = measured_leaves(params)
  if len(weights) == len(prepared.measured):
    return weights
  by_name = dict(zip(leaf_names(params), weights, strict=True))
  return [by_name.get(name) for name in prepared.names()]


def _is_frozen_part(known: Sequence[str], names: Sequence[str], tree: Any) -> bool:
  """Whether all these names are known, and every other known name is None in the tree."""
  # A name is explained by a None at its own place, or at that of a branch around it.
  absent = set(known).difference(names)
  frozen = ["/".join(parts) for parts, leaf, _ in named_leaves(tree, with_none=True) if leaf is None]
  starts = tuple(f"{name}/" for name in frozen if name)
  explained = all("" in frozen or name in frozen or name.startswith(starts) for name in absent)
  return explained and set(names) <= set(known)


def _spread(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
  """The values at their places, and `others` elsewhere."""
  out = list(others)
  for i, value in zip(places, values, strict=True):
    out[i] = value
  return out


def check_real(prepared: Prepared, argument: str) -> None:
  """Raises for a complex leaf: complex numbers have no order, and so no interval to clip to."""
  for i, leaf in enumerate(prepared.measured):
    if jnp.iscomplexobj(leaf):
      raise TypeError(
        f"`{argument}` must have real leaves to clip by value, got {describe(leaf)} at '{prepared.names()[i]}': clip "
        "complex leaves by norm."
      )


def _other_leaves(argument: str, known: Sequence[str], got: Sequence[str]) -> str:
  """The message for an `update` whose leaves differ from those that `init` saw."""
  extra = [name for name in got if name not in known]
  missing = [name for name in known if name not in got]
  lists = [
    f"{what} {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"
    for what, names in (("new:", extra), ("missing:", missing))
    if names
  ]
  return (
    f"`{argument}` must have as many floating leaves as `init` saw, {len(known)}, got {len(got)}"
    f"{' (' + '; '.join(lists) + ')' if lists else ''}: call `init` with the parameters that you train."
  )
