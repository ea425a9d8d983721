"""Which leaves, or slices of stacked ones, share a norm. Labels travel in a state as a static node without children.

`init` fixes the names and the state carries them, because Flax NNX and Equinox hand `init` and `update` trees of
different structure: a leaf's position among the floating and complex leaves says which group it belongs to. A block is
the set of slices that share a norm; a slice is a layer of a stacked leaf, or a whole leaf.

Labels are equal when their content is. The one exception is a state that `optax.tree.map_params` makes from a
placeholder for the parameters, to see which arrays of a real state are copies of them: its labels turn into the first
real labels that they are compared with.
"""

import json
import sys
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import export

from clipjax.checks import check_takes, describe, is_function
from clipjax.leaves import is_measured, leaf_names, measured_leaves
from clipjax.stacks import Stack, Stacks, by_leaf, slice_names, slice_types, spread_out, stacks_of

State = TypeVar("State")


@jax.tree_util.register_pytree_node_class
class Labels:
  """Names of the leaves, and the block of each slice.

  Attributes:
    name: first part of the keys of metrics.
    unit: "global", "group" or "leaf": what a block is; "entry" if all leaves are one block, clipped entry by entry.
    leaves: the leaf names.
    block_names: the names of the groups or slices, in the order of the norms; () for one block.
    block_of: for each slice, the index of its block.
    stacks: which leaves are stacked layers, with a slice for each layer; () if every slice is a whole leaf.
  """

  __slots__ = ("_hash", "_static", "block_names", "block_of", "leaves", "name", "stacks", "unit")

  def __init__(
    self,
    name: str,
    unit: str,
    leaves: tuple[str, ...],
    block_names: tuple[str, ...],
    block_of: tuple[int, ...],
    stacks: Stacks = (),
  ):
    self.name = name
    self.unit = unit
    self.leaves = leaves
    self.block_names = block_names
    self.block_of = block_of
    self.stacks = stacks
    self._hash = hash(self._content())  # Every jitted call needs it.
    self._static: Labels | _Unknown = self

  @classmethod
  def of(cls, tree: Any, *, name: str, unit: str, stacked: Any = None, axis_name: Any = None) -> "Labels":
    """Labels with one block of all leaves ("global"), or a block for each slice ("leaf")."""
    leaves, stacks = leaf_names(tree), stacks_of(tree, stacked, axis_name=axis_name)
    slices = slice_names(leaves, stacks)
    blocks = ((), (0,) * len(slices)) if unit in _WHOLE else (slices, tuple(range(len(slices))))
    return cls(name, unit, leaves, *blocks, stacks)._for(tree)

  @classmethod
  def by_group(
    cls,
    tree: Any,
    *,
    name: str,
    groups: Callable[[str, Any], Hashable] | Any,
    known: tuple[str, ...] | None,
    stacked: Any,
    axis_name: Any,
  ) -> "Labels":
    """Labels from a function or a tree of labels; `known` lists the labels with a threshold, None allows any."""
    leaves, stacks = leaf_names(tree), stacks_of(tree, stacked, axis_name=axis_name)
    names = slice_names(leaves, stacks)
    labels = _group_labels(tree, names, stacks, groups)
    # The dict of thresholds fixes the order of the groups, else the leaves do.
    in_use = dict.fromkeys(labels)
    order = tuple(in_use) if known is None else known
    place = {label: i for i, label in enumerate(order)}
    if names:  # A placeholder without leaves only has to show its structure.
      for label, leaf in zip(labels, names, strict=True):
        if label not in place:
          raise ValueError(
            f"`max_norm` must have a threshold for every label, got none for '{label}' of leaf '{leaf}' (it has "
            f"{', '.join(map(repr, order)) or 'none'}): add it, with None to exempt the group."
          )
      for label in order:
        if label not in in_use:
          raise ValueError(
            f"`max_norm` must have thresholds for labels in use, got one for '{label}', which no leaf has (the leaves "
            f"have {', '.join(map(repr, in_use))}): remove it, or fix `groups`."
          )
    return cls(name, "group", leaves, order, tuple(place[label] for label in labels), stacks)._for(tree)

  def _for(self, tree: Any) -> "Labels":
    """These labels, marked as unknown if the tree is the placeholder of `optax.tree.map_params`."""
    if type(tree).__name__ == "_ParamsPlaceholder":
      self._static = _Unknown(self)
    return self

  @property
  def slices(self) -> tuple[str, ...]:
    """The names of all slices."""
    return self.block_names if self.unit == "leaf" else slice_names(self.leaves, self.stacks)

  @property
  def is_whole(self) -> bool:
    """Whether all leaves are one block."""
    return self.unit in _WHOLE

  @property
  def blocks(self) -> tuple[tuple[int, ...], ...]:
    """The slices of each block."""
    out: list[list[int]] = [[] for _ in range(1 if self.is_whole else len(self.block_names))]
    for i, block in enumerate(self.block_of):
      out[block].append(i)
    return tuple(map(tuple, out))

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the norms: () for one block."""
    return () if self.is_whole else (len(self.block_names),)

  def check_state(self, unlabelled: "Labels", norms: Any, *, stacked: Any, updates: Any, field: str = "norms") -> None:
    """Raises if these labels come from another kind of clip, from other thresholds or from another model.

    Args:
      unlabelled: the labels that the transformation gives to an empty tree.
      norms: the norms in the state; not every library checks the shapes that it restores.
      stacked: the user's `stacked`.
      updates: the gradients, which show whether any leaf is stacked when the state has no stacks.
      field: the name of the norms in messages.
    """
    # Only a function can be tried on these updates: a tree or a name may not fit them.
    may_be_stacked = is_function(stacked) and not self.stacks
    if bool(self.stacks) > (stacked is not None) or (may_be_stacked and stacks_of(updates, stacked, axis_name=())):
      need, have, how = ("leaves", "layers", "with") if self.stacks else ("layers", "leaves", "without")
      raise ValueError(
        f"`state` must hold norms of {need}, got norms of {have}: it was made {how} `stacked`; call `init` again."
      )
    # Another kind of clip would read the norms as those of other blocks.
    if self.unit != unlabelled.unit:
      raise ValueError(
        f"`state` must hold norms {_UNITS[unlabelled.unit]}, got norms {_UNITS[self.unit]}: pass the state of this "
        "transformation, or call `init` again."
      )
    # Thresholds in another order would go to the wrong groups.
    known = unlabelled.block_names
    if known and self.leaves and self.block_names != known:
      raise ValueError(
        f"`state` must have the labels of `max_norm`, {', '.join(map(repr, known))}, in this order, got "
        f"{', '.join(map(repr, self.block_names))}: pass the state of this transformation, or call `init` again."
      )
    # Restored arrays may have the shapes of another model.
    got = () if isinstance(norms, tuple) else jnp.shape(norms)
    if got != self.shape:
      raise ValueError(
        f"`state` must have {field} of shape {self.shape}, as `init` made it, got {got}: it was restored from "
        "another model or configuration; call `init` with the parameters that you train."
      )

  def _content(self) -> tuple[Any, ...]:
    return (self.name, self.unit, self.leaves, self.block_names, self.block_of, self.stacks)

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Labels):
      return NotImplemented
    return self is other or (self._hash == other._hash and self._content() == other._content())

  def __hash__(self) -> int:
    return self._hash

  def __repr__(self) -> str:
    return f"Labels({self.name!r}, {self.unit!r}, {len(self.leaves)} leaves)"

  def __reduce__(self) -> tuple[Any, ...]:
    return Labels, self._content()  # A string's hash differs between processes.

  def tree_flatten(self) -> tuple[tuple[()], "Labels | _Unknown"]:
    """No children: everything is static."""
    return (), self._static

  @classmethod
  def tree_unflatten(cls, aux: "Labels | _Unknown", children: tuple[()]) -> "Labels":
    """The labels are their own static part."""
    del children
    return aux if isinstance(aux, Labels) else aux.labels


class _Unknown:
  """The static part of a placeholder's labels: equal to the first real labels it is compared with, then only to those.

  This lets `jax.tree.map(fn, state_of_placeholder, state)` return a state with the labels of the second argument. JAX
  builds the result with the structure of the first tree, and offers no other way.
  """

  def __init__(self, labels: Labels):
    self.labels = labels
    self._met = False

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Labels):
      return self is other
    if not self._met and (self.labels.name, self.labels.unit) == (other.name, other.unit):
      self.labels, self._met = other, True
    return self.labels == other

  __hash__ = object.__hash__


_WHOLE = ("global", "entry")
_UNITS = {"global": "of the whole tree", "entry": "of the largest entry", "group": "by group", "leaf": "by leaf"}


def _group_labels(tree: Any, names: tuple[str, ...], stacks: Stacks, groups: Any) -> list[str]:
  """The label of each slice; `names` are the slice names."""
  if is_function(groups):
    types = slice_types(measured_leaves(tree), stacks)
    check_takes(groups, "`groups`", "path, leaf", "path.split('/')[0]")
    labels = [groups(name, leaf) for name, leaf in zip(names, types, strict=True)]
  else:
    if not names:
      return []
    # A tree of labels may be a prefix, and has entries for leaves without a norm.
    leaves = jax.tree.leaves(tree)
    try:
      per_leaf = jax.tree.leaves(jax.tree.broadcast(groups, tree))
    except ValueError as error:
      raise ValueError(
        "`groups` must be a function (path, leaf) -> label or a tree of labels like the parameters, got one of another "
        f"structure: pass a label for each leaf or branch. JAX says: {error}"
      ) from None
    labels = [label for label, leaf in zip(per_leaf, leaves, strict=True) if is_measured(leaf)]
    labels = spread_out(labels, by_leaf(stacks, len(labels)))
  for name, label in zip(names, labels, strict=True):
    if label is None or isinstance(label, jax.Array) or not isinstance(label, Hashable):
      raise TypeError(
        f"`groups` must give labels that are hashable and not None, got {describe(label)} for leaf '{name}': pass a "
        "string."
      )
  return [str(label) for label in labels]


def carries_labels(state: type[State]) -> type[State]:
  """Decorates a state to make `flax.serialization` skip its field `labels`.

  Flax ignores pytree registrations and needs its own, by type. Flax may be imported after a state was made or read from
  a file, but never after it reads this field: reading the field therefore registers `Labels`.
  """
  field: Any = vars(state)["labels"]

  def labels(self: Any) -> Any:
    _register_with_flax()
    return field.__get__(self)

  setattr(state, "labels", property(labels, doc=field.__doc__))  # noqa: B010 (a type checker sees no such attribute)
  return state


def _register_with_flax() -> None:
  serialization = sys.modules.get("flax.serialization")
  if serialization is None or Labels in getattr(serialization, "_STATE_DICT_REGISTRY", {Labels}):
    return
  serialization.register_serialization_state(Labels, lambda labels: {}, lambda labels, state: labels)


def _from_json(data: bytes) -> Labels:
  name, unit, leaves, block_names, block_of, stacks = json.loads(data)
  of_leaves = tuple(s and Stack(*s) for s in stacks)
  return Labels(name, unit, tuple(leaves), tuple(block_names), tuple(block_of), of_leaves)


export.register_pytree_node_serialization(
  Labels,
  serialized_name="clipjax.Labels",
  serialize_auxdata=lambda labels: json.dumps(labels._content()).encode(),
  deserialize_auxdata=_from_json,
)
