"""Leaves: which leaves of a tree are measured, and how each is named.

Floating and complex leaves are measured. None and `optax.MaskedNode` are not leaves. A name is the path with '/'
between its parts; only the `value` of a Flax box is left out. A box may also name the axes of its array.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def measured_leaves(tree: Any) -> list[Any]:
  """The floating and complex leaves of a tree."""
  return [x for x in jax.tree.leaves(tree) if is_measured(x)]


def is_measured(leaf: Any) -> bool:
  """Whether a leaf has a norm: floating and complex arrays whose dtype has zero and NaN, and Python floats."""
  dtype = _dtype(leaf)
  return dtype is not None and _has_norm(dtype)


def is_float0(leaf: Any) -> bool:
  """Whether this is the cotangent of an integer, which holds no data."""
  return bool(_dtype(leaf) == jax.dtypes.float0)


class Named(NamedTuple):
  """A leaf, the parts of its name, and the innermost Flax box around it; None without one."""

  parts: tuple[str, ...]
  leaf: Any
  box: Any


def leaf_names(tree: Any, keep: Callable[[Any], bool] = is_measured) -> tuple[str, ...]:
  """Names the leaves that `keep` accepts: '.' for a bare array, '_2' and so on appended to a name already taken."""
  return without_repeats("/".join(parts) or "." for parts, leaf, _ in named_leaves(tree) if keep(leaf))


def without_repeats(names: Iterable[str]) -> tuple[str, ...]:
  """The names, with '_2' and so on appended to each one already taken."""
  taken: dict[str, None] = {}
  for base in names:
    name, copy = base, 1
    while name in taken:
      copy += 1
      name = f"{base}_{copy}"
    taken[name] = None
  return tuple(taken)


def named_leaves(
  tree: Any, prefix: tuple[str, ...] = (), box: Any = None, *, with_none: bool = False
) -> Iterator[Named]:
  """Every leaf with the parts of its name, leaving out the part that a Flax box adds for its content."""
  of_box = _is_box(type(tree))
  box = tree if of_box else box

  def ends(x: Any) -> bool:
    return x is not tree and (_is_box(type(x)) or (with_none and x is None))

  # Stop at each inner box, which is then named by a call of its own.
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=ends)[0]:
    keys = path[1:] if of_box and getattr(path[0], "name", None) == "value" else path
    parts = (*prefix, *(jax.tree_util.keystr((key,), simple=True) for key in keys))
    if _is_box(type(leaf)):
      yield from named_leaves(leaf, parts, box, with_none=with_none)
    else:
      yield Named(parts, leaf, box)


def axis_names(tree: Any) -> list[tuple[Any, ...]]:
  """The axis names of each measured leaf, from the metadata of its Flax box; () without any."""
  return [_axis_names(box) for _, leaf, box in named_leaves(tree) if is_measured(leaf)]


def _axis_names(box: Any) -> tuple[Any, ...]:
  metadata: dict[str, Any] = (
    box.get_metadata() if hasattr(box, "get_metadata") else {"names": getattr(box, "names", None)}
  )
  found: Any = next((metadata[key] for key in _AXIS_NAMES if metadata.get(key)), ())
  return tuple(getattr(found, "spec", found))  # The entry may be a sharding, whose spec holds the names.


# The keys used by Linen's boxes, by NNX, and by NNX before Flax 0.12.
_AXIS_NAMES = ("names", "out_sharding", "sharding_names", "sharding")


def _is_box(kind: Any) -> bool:
  """Whether this is a Flax NNX variable, or a Flax Linen box that carries metadata beside an array."""
  return any(base.__name__ in _BOXES and base.__module__.startswith("flax.") for base in kind.__mro__)


_BOXES = ("Variable", "VariableState", "AxisMetadata")


@functools.cache  # An eager call checks every leaf.
def _has_norm(dtype: Any) -> bool:
  inexact = jnp.issubdtype(dtype, np.inexact)
  return bool(inexact) and not np.dtype(dtype).name.startswith(("float8_e8m0", "float6_", "float4_"))


def _dtype(leaf: Any) -> Any:
  dtype = getattr(leaf, "dtype", None)
  if dtype is None and isinstance(leaf, bool | int | float | complex):
    return np.dtype(type(leaf))
  return dtype
