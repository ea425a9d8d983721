"""Which leaves share a norm, and their names: what travels in a state, as a static pytree node without children.

The names are fixed at `init` and carried, because Flax NNX and Equinox hand `init` and `update` trees of different
structure: which leaf belongs to which group is known by its position among the floating and complex leaves.
"""

import json
import sys
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from clipjax.checks import describe
from clipjax.trees import is_measured, leaf_names, measured_leaves


@jax.tree_util.register_pytree_node_class
class Labels:
  """Names of the leaves, and the block that each belongs to.

  Two of them are equal when their content is, and under one name where either has no leaves:
  `optax.tree.map_params` compares the state of a placeholder without leaves with a real one.

  Attributes:
    name: first part of the keys of metrics.
    unit: "global", "group" or "leaf": what a block is.
    leaves: the leaf names.
    block_names: the names of groups, or those of the leaves, in the order of the norms; () for global.
    block_of: for each leaf, the index of its block.
  """

  __slots__ = ("block_names", "block_of", "leaves", "name", "unit")

  def __init__(
    self, name: str, unit: str, leaves: tuple[str, ...], block_names: tuple[str, ...], block_of: tuple[int, ...]
  ):
    self.name = name
    self.unit = unit
    self.leaves = leaves
    self.block_names = block_names
    self.block_of = block_of
    _register_with_flax()

  @classmethod
  def of(cls, tree: Any, *, name: str, unit: str) -> "Labels":
    """Labels for one block of all leaves ("global") or a block for each ("leaf")."""
    leaves = leaf_names(tree)
    if unit == "global":
      return cls(name, unit, leaves, (), (0,) * len(leaves))
    return cls(name, unit, leaves, leaves, tuple(range(len(leaves))))

  @classmethod
  def by_group(
    cls, tree: Any, *, name: str, groups: Callable[[str, Any], Hashable] | Any, known: tuple[str, ...] | None
  ) -> "Labels":
    """Labels from a function or a tree of labels; `known` are the labels that have a threshold, None for any."""
    names = leaf_names(tree)
    labels = _group_labels(tree, names, groups)
    found = tuple(dict.fromkeys(labels))
    order = found if known is None else known
    if names:  # A placeholder without leaves is asked for its structure alone.
      for label, leaf in zip(labels, names, strict=True):
        if label not in order:
          raise ValueError(
            f"`max_norm` must have a threshold for every label, got none for '{label}' of leaf '{leaf}' (it has "
            f"{', '.join(map(repr, order)) or 'none'}): add it, with None to exempt the group."
          )
      for label in order:
        if label not in found:
          raise ValueError(
            f"`max_norm` must have thresholds for labels in use, got one for '{label}', which no leaf has (the leaves "
            f"have {', '.join(map(repr, found))}): remove it, or mend `groups`."
          )
    return cls(name, "group", names, order, tuple(order.index(label) for label in labels))

  @property
  def blocks(self) -> tuple[tuple[int, ...], ...]:
    """The leaf indices of each block."""
    out: list[list[int]] = [[] for _ in range(1 if self.unit == "global" else len(self.block_names))]
    for leaf, block in enumerate(self.block_of):
      out[block].append(leaf)
    return tuple(map(tuple, out))

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the norms: () for a global one."""
    return () if self.unit == "global" else (len(self.block_names),)

  def check_state(self, unlabelled: "Labels", norms: Any) -> None:
    """Raises where the state of these labels is that of another kind of clip, of other thresholds or another model.

    Args:
      unlabelled: what the transformation would call no leaves at all.
      norms: those of the state; not every library checks the shapes that it restores.
    """
    if self.unit != unlabelled.unit:
      raise ValueError(
        f"`state` must be of norms by {_UNITS[unlabelled.unit]}, as the one that `init` gave, got one of norms by "
        f"{_UNITS[self.unit]}: pass the state of this transformation, or call `init` anew."
      )
    known = unlabelled.block_names
    if known and self.leaves and self.block_names != known:
      raise ValueError(
        f"`state` must have the labels of `max_norm`, {', '.join(map(repr, known))}, in this order, got "
        f"{', '.join(map(repr, self.block_names))}: pass the state of this transformation, or call `init` anew."
      )
    got = () if isinstance(norms, tuple) else jnp.shape(norms)
    if got != self.shape:
      raise ValueError(
        f"`state` must have norms of shape {self.shape}, as the one that `init` gave, got {got}: it was restored from "
        "another model or configuration; call `init` with the parameters that you train."
      )

  def _content(self) -> tuple[Any, ...]:
    return (self.name, self.unit, self.leaves, self.block_names, self.block_of)

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Labels):
      return NotImplemented
    if (self.name, self.unit) != (other.name, other.unit):
      return False
    return not self.leaves or not other.leaves or self._content() == other._content()

  def __hash__(self) -> int:
    return hash(Labels)  # Equality with a placeholder is not transitive, so nothing finer would agree with it.

  def __repr__(self) -> str:
    return f"Labels({self.name!r}, {self.unit!r}, {len(self.leaves)} leaves)"

  def tree_flatten(self) -> tuple[tuple[()], "Labels"]:
    """No children: everything is static."""
    return (), self

  @classmethod
  def tree_unflatten(cls, aux: "Labels", children: tuple[()]) -> "Labels":
    """The static part is the whole."""
    del children
    return aux


_UNITS = {"global": "the whole tree", "group": "group", "leaf": "leaf"}


def _group_labels(tree: Any, names: tuple[str, ...], groups: Any) -> list[str]:
  if callable(groups):
    measured = measured_leaves(tree)
    labels = [groups(name, leaf) for name, leaf in zip(names, measured, strict=True)]
  else:
    if not names:
      return []
    leaves = jax.tree.leaves(tree)
    try:
      per_leaf = jax.tree.leaves(jax.tree.broadcast(groups, tree))
    except ValueError as error:
      raise ValueError(
        f"`groups` must be a function (path, leaf) -> label or a tree of labels like the parameters: {error}"
      ) from None
    labels = [label for label, leaf in zip(per_leaf, leaves, strict=True) if is_measured(leaf)]
  for name, label in zip(names, labels, strict=True):
    if label is None or isinstance(label, jax.Array) or not isinstance(label, Hashable):
      raise TypeError(f"`groups` must give strings, got {describe(label)} for leaf '{name}': pass a label.")
  return [str(label) for label in labels]


def _register_with_flax() -> None:
  """Lets flax.serialization pass over a `Labels`: it knows no pytree nodes, and asks for a registration by type."""
  serialization = sys.modules.get("flax.serialization")
  if serialization is None or Labels in getattr(serialization, "_STATE_DICT_REGISTRY", {Labels}):
    return
  serialization.register_serialization_state(Labels, lambda labels: {}, lambda labels, state: labels)


def _from_json(data: bytes) -> Labels:
  name, unit, *lists = json.loads(data)
  return Labels(name, unit, *map(tuple, lists))


export.register_pytree_node_serialization(
  Labels,
  serialized_name="clipjax.Labels",
  serialize_auxdata=lambda labels: json.dumps(labels._content()).encode(),
  deserialize_auxdata=_from_json,
)
