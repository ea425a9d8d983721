"""The program that a `Recorder` runs on the device: it packs everything recorded of one step into one new vector.

The vector holds 32-bit words with the unchanged bits of every number: a counter above 2**24 would not survive as a
float32. It shares no buffer with the optimizer state, which the next step may donate. Searching a large optimizer state
for the states of this package is slow and done once; after that, each push follows the known paths.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipjax.checks import describe
from clipjax.metric_names import NORM
from clipjax.runs.number_text import numbers
from clipjax.runs.schema import USER_STEP, key_of
from clipjax.state_metrics import blocks_name, global_numbers, vectors_of
from clipjax.state_search import (
  found_in,
  held_tree,
  is_accumulator,
  is_wrapper,
  named,
  optimizer_states,
  unwrapped,
)
from clipjax.transforms.skip import SkipState
from clipjax.transforms.watch import WatchState

Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]
Vector: TypeAlias = np.ndarray[Any, Any]
_Path: TypeAlias = list[tuple[bool, Any]]

MOST_COLUMNS = 64  # Up to this many groups, each has its own columns.

_SHAPE = attrgetter("shape", "dtype")
_NOT_READ = ("rule", "norm_rule", "loss_rule", "inner_state", "unclipped_state", "labels")


class Ring(NamedTuple):
  """The last norms of a watch; the norm of its step i is at `(i - 1) % len(norms)`."""

  steps: int
  norms: Vector


class Seen(NamedTuple):
  """The contents of one vector.

  Attributes:
    counts: how many steps each state has counted, in the order of `Packer.sources`.
    mini_step: how many micro-batches the outermost `optax.MultiSteps` has gathered; None unless all states are in one.
    user_step: the caller's step number if it was an array, else None.
    pushed: the caller's scalars that were on the device, by key.
    metrics: the metrics of the states, by key.
    vectors: numbers by leaf or group, by `<name>/<quantity>`.
    rings: the last norms of watches, by name.
  """

  counts: tuple[int, ...]
  mini_step: int | None
  user_step: int | None
  pushed: dict[str, float]
  metrics: dict[str, float]
  vectors: dict[str, Vector]
  rings: dict[str, Ring]


_KINDS = ("count", "pushed", "metric", "vector", "ring")
_ARRAYS = ("vector", "ring")  # Kinds whose entries are arrays; the others are scalars.
# Prefixes of count keys; no two of them can be confused.
_OF, _RING, _MINI_STEP = "of ", "ring ", "mini_step"


class _Entry(NamedTuple):
  """Consecutive words of one dtype: one array, or scalars with a key each."""

  kind: str
  keys: tuple[str, ...]
  dtype: np.dtype[Any]
  start: int
  stop: int


class Layout:
  """Where each number lies in the vectors of one program."""

  def __init__(self, shapes: Mapping[tuple[str, str], Any]):
    self.entries: list[_Entry] = []
    start = self._scalars = 0
    # Scalars come first, so that `read` can convert those of many vectors at once.
    for (kind, dtype, *_), members in _grouped(shapes).items():
      words = sum(int(np.prod(shapes[member].shape)) for member in members) * (dtype.itemsize // 4)
      keys = tuple(key for _, key in members)
      self.entries.append(_Entry(kind, keys, dtype, start, start + words))
      start += words
      self._scalars = self._scalars if kind in _ARRAYS else start
    self.metric_keys = tuple(key for kind, key in shapes if kind == "metric")

  def read(self, vectors: Sequence[Words]) -> list[Seen]:
    """Unpacks vectors."""
    # Scalars of all vectors together; not by np.stack, which leaks a tuple in numpy 2.4.
    scalars = np.array([words[: self._scalars] for words in vectors])
    every: list[dict[str, dict[str, Any]]] = [{kind: {} for kind in _KINDS} for _ in vectors]
    for kind, keys, dtype, start, stop in self.entries:
      if kind in _ARRAYS:
        for found, words in zip(every, vectors, strict=True):
          found[kind][keys[0]] = words[start:stop].view(dtype)
      else:
        for found, values in zip(every, numbers(scalars[:, start:stop].view(dtype)), strict=True):
          found[kind].update(zip(keys, values, strict=True))
    return [_seen(found) for found in every]


def _seen(found: dict[str, dict[str, Any]]) -> Seen:
  count = found["count"]
  counts = tuple(count[f"{_OF}{i}"] for i in range(sum(key.startswith(_OF) for key in count)))
  rings = {name: Ring(int(count[_RING + name]), norms) for name, norms in found["ring"].items()}
  number, mini_step = count.get(USER_STEP), count.get(_MINI_STEP)
  return Seen(counts, mini_step, number, found["pushed"], found["metric"], found["vector"], rings)


class Packer:
  """The states of this package in optimizer states of one structure, and the programs that pack them.

  Attributes:
    leaves: names of leaves or groups, by state name.
    metric_keys: the keys of `clipjax.metrics`.
    sources: the states, from the outside in.
    source_of: the index in `sources` of the state that a metric, vector or ring belongs to, by kind and key.
    quantity_of: the quantity of each metric, vector or ring, such as "norm", by kind and key.
    is_accumulated: whether all states are inside `optax.MultiSteps`, so that they see one step in several pushes.
    optimizer: the classes of the other states.
  """

  def __init__(self, opt_state: Any):
    # Search once: our states and their paths, the `skip_steps` around each, and MultiSteps around all.
    tree = held_tree(opt_state)
    everything = [] if tree is None else found_in(tree)
    ours = named(everything)
    self.optimizer = optimizer_states(tree)
    self.sources = [_Source(name, found.path, found.state) for name, found in ours]
    skips = [source for source in self.sources if source.is_skip]
    for source in self.sources:
      source.skip = next((s for s in reversed(skips) if s.is_around(source)), None)
    self.is_accumulated = bool(ours) and all(found.accumulators for _, found in ours)
    self._accumulator = (
      _path_of(next(f.path for f in everything if is_accumulator(f.state))) if self.is_accumulated else None
    )
    self.leaves = {s.leaves_name(self.sources): s.labels.block_names for s in self.sources if s.labels.block_names}
    self._without = None if self.sources else jax.tree.structure(tree)
    self.source_of: dict[tuple[str, str], int] = {}
    self.quantity_of: dict[tuple[str, str], str] = {}
    self._program = jax.jit(self._pack)
    self._layouts: dict[Any, Layout] = {}
    self._is_scattered = False
    # Trace once for the keys.
    arrays = self.arrays(opt_state)
    if arrays is None:
      raise TypeError(
        f"`opt_state` must be made of tuples, dicts and objects with attributes, got {describe(opt_state)}: "
        "push the part of it that holds the clip."
      )
    shapes = jax.eval_shape(self._entries, arrays, {})
    self.metric_keys = frozenset(key for kind, key in shapes if kind == "metric")
    self._vectors = tuple(f"{key}/" for kind, key in shapes if kind == "vector")

  def has(self, key: str) -> bool:
    """Whether the states have a number under this key, over all leaves or for one leaf."""
    return key in self.metric_keys or key.startswith(self._vectors)

  def arrays(self, opt_state: Any) -> list[Any] | None:
    """The arrays to pack; None if the optimizer state has another structure."""
    tree = held_tree(opt_state)
    if not self.sources:
      return [] if jax.tree.structure(tree) == self._without else None
    out: list[Any] = []
    try:
      for source in self.sources:
        out += source.arrays(tree)
      if self._accumulator is not None:
        out.append(unwrapped(_at(tree, self._accumulator).mini_step))
    except (AttributeError, KeyError, IndexError, TypeError, _OtherStructureError):
      return None
    return out

  def pack(self, arrays: list[Any], scalars: dict[str, Any]) -> tuple[jax.Array | None, Layout]:
    """Enqueues the program; the vector is None if there is nothing to pack."""
    key = (tuple(scalars), *map(_SHAPE, arrays), *map(_SHAPE, scalars.values()))
    layout = self._layouts.get(key)
    if layout is None:
      layout = self._layouts[key] = Layout(jax.eval_shape(self._entries, arrays, scalars))
    if not layout.entries:
      return None, layout
    if not self._is_scattered:
      try:
        return self._program(arrays, scalars), layout
      except ValueError:  # They lie on different devices. Asking each array would take longer than the program.
        self._is_scattered = True
    return self._program(*jax.device_put((arrays, scalars), jax.local_devices()[0])), layout

  def _entries(self, arrays: list[Any], scalars: dict[str, Any]) -> OrderedDict[tuple[str, str], jax.Array]:
    """Every recorded array, by kind and key."""
    out: OrderedDict[tuple[str, str], Any] = OrderedDict()
    rest = iter(arrays)
    # Counts, the caller's scalars, then what each state measured.
    states = [source.rebuilt(rest) for source in self.sources]
    for i, (source, state) in enumerate(zip(self.sources, states, strict=True)):
      source.check(state.steps)
      out["count", f"{_OF}{i}"] = state.steps
    if self._accumulator is not None:
      out["count", _MINI_STEP] = next(rest)
    for key, value in scalars.items():
      out["count" if key == USER_STEP else "pushed", key] = value
    for i, (source, state) in enumerate(zip(self.sources, states, strict=True)):
      for member, (quantity, value) in self._numbers_of(source, state).items():
        if member not in out:  # If two states share a name, the first in the chain provides the number.
          out[member] = value
          self.source_of[member], self.quantity_of[member] = i, quantity
      if isinstance(state, WatchState) and not isinstance(state.history, tuple):
        out["count", _RING + source.name] = state.steps
    return OrderedDict((key, _as_recorded(value)) for key, value in out.items())

  def _numbers_of(self, source: "_Source", state: Any) -> dict[tuple[str, str], tuple[str, Any]]:
    """The quantities of one state and their values, by kind and key."""
    vectors, numbers = vectors_of(state), global_numbers(state)
    out: dict[tuple[str, str], tuple[str, Any]] = {}
    for quantity, value in numbers.items():
      out["metric", key_of(source.name, quantity)] = quantity, value
    # Up to 64 groups get columns. Groups for each of hundreds of layers are recorded only as vectors, like leaves.
    if state.labels.unit == "group" and len(state.labels.block_names) <= MOST_COLUMNS:
      by = blocks_name(source.name, source.labels, [(s.name, s.labels) for s in self.sources])
      for quantity, vector in vectors.items():
        for i, label in enumerate(state.labels.block_names):
          out["metric", key_of(by, quantity, label)] = quantity, vector[i]
    for quantity, vector in vectors.items():
      out["vector", key_of(source.leaves_name(self.sources), quantity)] = quantity, vector
    if isinstance(state, WatchState) and not isinstance(state.history, tuple):
      out["ring", source.name] = NORM, state.history
    return out

  def _pack(self, arrays: list[Any], scalars: dict[str, Any]) -> jax.Array:
    entries = self._entries(arrays, scalars)
    order = [member for members in _grouped(entries).values() for member in members]
    # Join the numbers of one dtype, then their bits. Behind a barrier, XLA on CPU copies each vector as a whole; fused
    # with the rest, it would look up the source of each word.
    runs = [jnp.concatenate([entries[m].ravel() for m in run]) for _, run in groupby(order, lambda m: entries[m].dtype)]
    bits = [lax.bitcast_convert_type(run, jnp.uint32).ravel() for run in lax.optimization_barrier(runs)]
    return jnp.concatenate(lax.optimization_barrier(bits))


class _OtherStructureError(Exception):
  """An optimizer state does not have the structure that a packer was made for."""


class _Source:
  """One state of this package and its path in the optimizer state."""

  def __init__(self, name: str, path: Sequence[Any], state: Any):
    self.name = name
    self.labels = state.labels
    self.path = _path_of(path)
    self.skip: _Source | None = None  # The innermost `skip_steps` around it.
    self._type = type(state)
    self._fields = [
      field for field in state._fields if field not in _NOT_READ and not isinstance(getattr(state, field), tuple)
    ]
    self._is_wrapped = is_wrapper(state.steps)

  @property
  def is_skip(self) -> bool:
    """Whether this is the state of `skip_steps`."""
    return issubclass(self._type, SkipState)

  def is_around(self, other: "_Source") -> bool:
    """Whether the other state is inside this one."""
    return len(self.path) < len(other.path) and other.path[: len(self.path)] == self.path

  def check(self, steps: Any) -> None:
    """Raises if the state belongs to several models."""
    if shape := np.shape(steps):
      raise ValueError(
        f"`opt_state` must belong to one model, got '{self.name}' with leading axes {shape}, as under vmap or pmap: "
        "push one of them, jax.tree.map(lambda x: x[0], opt_state)."
      )

  def arrays(self, tree: Any) -> list[Any]:
    """The arrays of the state that are packed."""
    tree = _at(tree, self.path)
    if type(tree) is not self._type or (tree.labels is not self.labels and tree.labels != self.labels):
      raise _OtherStructureError
    out = [getattr(tree, field) for field in self._fields]
    return [unwrapped(x) for x in out] if self._is_wrapped else out

  def rebuilt(self, arrays: Any) -> Any:
    """The state with these arrays, and empty tuples for the fields that are not read."""
    values = dict.fromkeys(self._type._fields, ()) | {field: next(arrays) for field in self._fields}
    return self._type(**{**values, "labels": self.labels})

  def leaves_name(self, sources: Sequence["_Source"]) -> str:
    """The name its leaves are recorded under: its own, unless an earlier state uses it for other leaves."""
    first = next(s for s in sources if (s.name == self.name and s.labels.block_names) or s is self)
    return self.name if first.labels.block_names == self.labels.block_names else f"{self.name}_{self.labels.unit}"


def _path_of(path: Sequence[Any]) -> _Path:
  """For each part of a path: whether it is an attribute, and its name or index."""
  return [
    (True, key.name)
    if isinstance(key, jax.tree_util.GetAttrKey)
    else (False, getattr(key, "idx", getattr(key, "key", None)))
    for key in path
  ]


def _at(tree: Any, path: _Path) -> Any:
  for is_attribute, key in path:
    tree = getattr(tree, key) if is_attribute else tree[key]
  return tree


def _as_recorded(value: Any) -> jax.Array:
  """The same numbers in a 4-byte or 8-byte dtype."""
  array = jnp.asarray(value)
  if array.dtype.itemsize == 8:
    return array
  if jnp.issubdtype(array.dtype, jnp.floating):
    return array.astype(jnp.float32)
  return array if array.dtype == jnp.uint32 else array.astype(jnp.int32)


def _grouped(shapes: Mapping[tuple[str, str], Any]) -> dict[tuple[str, np.dtype[Any]], list[tuple[str, str]]]:
  """The entries in vector order: scalars grouped by kind and dtype, then single arrays.

  Scalars of one dtype are adjacent, and so are arrays of one dtype.
  """
  out: dict[Any, list[tuple[str, str]]] = {}
  for kind, key in shapes:
    dtype = np.dtype(shapes[kind, key].dtype)
    place = (kind, dtype) if shapes[kind, key].shape == () else (kind, dtype, key)
    out.setdefault(place, []).append((kind, key))
  return dict(sorted(out.items(), key=lambda item: (item[0][0] in _ARRAYS, item[0][1].name)))
