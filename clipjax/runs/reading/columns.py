"""Rows of a file as compact columns, filled while the file is read. numpy alone.

A `Table` holds its rows in step order, each step once. Every column is one float64 array, allocated up front for about
all rows; the unused part costs no memory. Rows with new steps arrive many at a time and cost a few numpy calls per
column. All other changes arrive one at a time: a number for an earlier row, a row between two others, and the end of a
course that the run abandoned.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from clipjax.runs.kinds import Bools, Floats, Ints, Names, Objects
from clipjax.runs.schema import BATCH, FLAGS, LEAF, OBJECTS, STEP, WEIGHTS, name_of

Row: TypeAlias = dict[str, Any]


class Block(NamedTuple):
  """Rows with the same keys and only numbers: `steps` (rows,) and `values` (rows, keys)."""

  keys: tuple[str, ...]
  steps: Ints
  values: Floats

  def rows(self) -> list[Row]:
    """The rows as dicts."""
    rows = [dict(zip(self.keys, values, strict=True)) for values in self.values.tolist()]
    return [row | {STEP: step} for row, step in zip(rows, self.steps.tolist(), strict=True)]


class Table:
  """Columns over ascending steps.

  Attributes:
    count: the number of rows.
    dropped: how many rows `cut` has removed.

  Args:
    room: how many rows to allocate at first.
    names: the leaf names of the first rows, by state name.
  """

  def __init__(self, room: int, names: Names):
    self.count = self.dropped = 0
    self._room = room
    self._steps: Ints = np.empty(room, np.int64)
    self._values: dict[str, Floats] = {}
    self._flags: dict[str, Bools] = {}
    self._batches: Objects | None = None
    self._names: Names = {}
    self._all_names: dict[str, dict[str, None]] = {}
    self._blocks: dict[str, list[_Piece]] = {}
    self._histograms: list[_Piece] = []
    self._cuts: list[int] = []
    self.name(names)

  def name(self, names: Names) -> None:
    """Sets the leaf names for the rows to come."""
    self._names |= names
    for key, labels in names.items():
      self._all_names.setdefault(key, {}).update(dict.fromkeys(labels))

  # Growing ----------------------------------------------------------------------------------------------------------

  def append(self, rows: Sequence[Row], block: Block | None = None, among: Ints | None = None) -> None:
    """Appends rows with ascending steps. The rows of a block take the places `among` all of them."""
    # Reserve and clear the places, then fill in the block and the other rows.
    start, stop = self.count, self.count + len(rows) + (0 if block is None else len(block.steps))
    self._reserve(stop)
    self._clear(start, stop)
    self.count, where = stop, np.arange(start, stop)
    if block is not None and among is not None:
      self._fill_block(block, where[among])
      where = np.delete(where, among)
    self._steps[where] = [row[STEP] for row in rows]
    # Rows with equally many keys nearly always have the same keys, and are filled in together.
    sizes = list(map(len, rows))
    for size in dict.fromkeys(sizes):
      alike = [i for i, other in enumerate(sizes) if other == size]
      if not self._fill([rows[i] for i in alike], where[alike]):
        for i in alike:
          self._fill([rows[i]], where[i : i + 1])

  def _fill_block(self, block: Block, where: Ints) -> None:
    self._steps[where] = block.steps
    for key, column in zip(block.keys, block.values.T, strict=True):
      if key != STEP:
        self._column(key)[where] = column

  def _fill(self, rows: Sequence[Row], where: Ints) -> bool:
    """Fills in rows with equally many keys; does nothing and returns False if their keys differ."""
    keys = tuple(rows[0])
    try:
      values = list(chain.from_iterable(map(itemgetter(STEP, *keys), rows)))
    except KeyError:
      return False
    if not _OBJECTS.isdisjoint(keys):  # Vectors, flags, batches or histograms: the rest are numbers.
      self._fill_objects(rows, where)
      scalars = _scalars(keys)
      values = list(chain.from_iterable(map(itemgetter(STEP, STEP, *scalars), rows)))
      keys = (STEP, *scalars)
    numbers = _floats(values).reshape(len(rows), -1)
    for key, column in zip(keys, numbers.T[1:], strict=True):
      if key != STEP:
        self._column(key)[where] = column
    return True

  def _fill_objects(self, rows: Sequence[Row], where: Ints) -> None:
    """Fills in everything that is not a number."""
    vectors: dict[str, tuple[list[int], list[Any]]] = {}
    for row, place in zip(rows, where.tolist(), strict=True):
      for key in _flagged(row):
        self._flag(key)[place] = True
      if BATCH in row:
        self._batch_column()[place] = _batch(row[BATCH])
      for key, values in (row.get(LEAF) or {}).items():
        if self._is_named(key, values):
          steps, lists = vectors.setdefault(key, ([], []))
          steps.append(row[STEP])
          lists.append(values)
      if row.get(WEIGHTS):
        self._add_histogram(row[STEP], row[WEIGHTS])
    for key, (steps, lists) in vectors.items():
      block = _Piece(np.array(steps, np.int64), self._names[name_of(key)], _vectors(lists), len(self._cuts))
      self._blocks.setdefault(key, []).append(block)

  def _is_named(self, key: str, values: Any) -> bool:
    """Whether a vector has an entry per named leaf; if no header names leaves, they are numbered."""
    name = name_of(key)
    if values and not self._names.get(name):
      self.name({name: tuple(f"leaf {i}" for i in range(len(values)))})
    return bool(values) and len(values) == len(self._names[name])

  def _add_histogram(self, step: int, weights: dict[str, Any]) -> None:
    edges, counts = tuple(weights["edges"]), np.array(weights["counts"], np.float64)
    if counts.shape != (len(edges) - 1,):
      raise ValueError("a histogram must have a count for each bin")
    if self._histograms and self._histograms[-1].names == edges:
      edges = self._histograms[-1].names  # Every row has the same edges: keep one copy.
    self._histograms.append(_Piece(np.array([step], np.int64), edges, counts[None], len(self._cuts)))

  # Changing rows ----------------------------------------------------------------------------------------------------

  def last(self) -> int | None:
    """The last step."""
    return int(self._steps[self.count - 1]) if self.count else None

  def add(self, row: Row) -> None:
    """Adds the numbers of a row to the row of its step, which is created if needed."""
    place = self._place(row[STEP])
    if place == self.count:
      self.append([row])
      return
    if self._steps[place] != row[STEP]:  # A new step between two others.
      self._make_room(place)
      self._steps[place] = row[STEP]
    for key in _scalars(row):  # A new number also replaces the flag of the old one.
      if key in self._flags:
        self._flags[key][place] = False
    self._fill([row], np.array([place]))

  def cut(self, step: int) -> None:
    """Removes the rows from `step` on."""
    place = self._place(step)
    self.dropped += self.count - place
    self.count = place
    self._cuts.append(step)

  def _make_room(self, place: int) -> None:
    """Moves the rows from `place` on by one place."""
    self._reserve(self.count + 1)
    for values in (self._steps, *self._values.values(), *self._flags.values(), self._batches):
      if values is not None:
        values[place + 1 : self.count + 1] = values[place : self.count]
    self._clear(place, place + 1)
    self.count += 1

  def _reserve(self, count: int) -> None:
    """Grows the arrays to at least `count` rows."""
    if count > self._room:
      self._room = max(count, self._room + self._room // 4)
      for values in (self._steps, *self._values.values(), *self._flags.values(), self._batches):
        if values is not None:
          values.resize(self._room, refcheck=False)

  def _clear(self, start: int, stop: int) -> None:
    for values in self._values.values():
      values[start:stop] = np.nan
    for flags in self._flags.values():
      flags[start:stop] = False
    if self._batches is not None:
      self._batches[start:stop] = None

  def _column(self, key: str) -> Floats:
    if key not in self._values:
      self._values[key] = np.empty(self._room)
      self._values[key][: self.count] = np.nan
    return self._values[key]

  def _flag(self, key: str) -> Bools:
    if key not in self._flags:
      self._flags[key] = np.zeros(self._room, np.bool_)
    return self._flags[key]

  def _batch_column(self) -> Objects:
    if self._batches is None:
      self._batches = np.empty(self._room, np.object_)
    return self._batches

  def _place(self, step: int) -> int:
    return int(np.searchsorted(self._steps[: self.count], step))

  def _end(self, block: "_Piece") -> float:
    """The step from which on the rows of a block were removed later; inf if none were."""
    return min(self._cuts[block.cuts :], default=math.inf)

  # Results ----------------------------------------------------------------------------------------------------------

  def steps(self) -> Ints:
    """The steps, shape (n,)."""
    self._steps = _cut_to(self._steps, self.count)
    return self._steps

  def columns(self) -> dict[str, Floats]:
    """The columns with anything recorded, shape (n,): NaN where there is no finite number."""
    flags = self.flags()
    values = {key: _cut_to(values, self.count) for key, values in self._values.items()}
    return {key: column for key, column in values.items() if key in flags or not np.isnan(column).all()}

  def flags(self) -> dict[str, Bools]:
    """Where a recorded number was nonfinite, shape (n,), for the columns with such numbers."""
    flags = {key: _cut_to(flags, self.count) for key, flags in self._flags.items()}
    return {key: column for key, column in flags.items() if column.any()}

  def batches(self) -> Objects | None:
    """The caller's name for each batch, shape (n,); None if no row has one."""
    batches = None if self._batches is None else _cut_to(self._batches, self.count)
    return None if batches is None or not any(batch is not None for batch in batches) else batches

  def names(self) -> Names:
    """The leaves of each state, from all headers together."""
    return {name: tuple(labels) for name, labels in self._all_names.items()}

  def vectors(self) -> dict[str, tuple[Ints, Floats]]:
    """By key: the steps (m,) and the numbers (m, leaves), inf for a nonfinite one, NaN for a leaf without one."""
    out: dict[str, tuple[Ints, Floats]] = {}
    while self._blocks:  # Releases each block as soon as it is joined, to save memory.
      key = next(iter(self._blocks))
      joined = self._joined(self._blocks.pop(key), tuple(self._all_names[name_of(key)]))
      if joined[0].size:
        out[key] = joined
    return out

  def weights(self) -> tuple[Ints, Floats, Floats] | None:
    """The histograms: steps (m,), edges (k + 1,) and counts (m, k); None if there are none."""
    kept = [block for block in self._histograms if block.steps[0] < self._end(block)]
    if not kept:
      return None
    # Only histograms with the edges of the last one can be compared.
    edges = max(reversed(kept), key=lambda block: int(block.steps[0])).names
    same = [block._replace(names=edges[1:]) for block in kept if block.names == edges]
    steps, counts = self._joined(same, edges[1:])
    return steps, np.array(edges, np.float64), counts

  def _joined(self, blocks: list["_Piece"], names: tuple[Any, ...]) -> tuple[Ints, Floats]:
    """Joins blocks, each step once; a later block replaces an earlier one."""
    # A row survives unless a later cut removed its step.
    ends = np.minimum.accumulate(np.array([math.inf, *reversed(self._cuts)]))[::-1]
    kept = [block.steps < ends[block.cuts] for block in blocks]
    steps = np.unique(np.concatenate([block.steps[mask] for block, mask in zip(blocks, kept, strict=True)]))
    out = np.full((steps.size, len(names)), np.nan)
    places = {name: i for i, name in enumerate(names)}
    for block, mask in zip(blocks, kept, strict=True):
      rows = np.searchsorted(steps, block.steps[mask])
      if block.names == names:
        out[rows] = block.values[mask]
      else:
        out[rows] = np.nan
        out[np.ix_(rows, [places[name] for name in block.names])] = block.values[mask]
    return steps, out


class _Piece(NamedTuple):
  """Vectors at some steps: `values` (m, names). `cuts` counts the cuts made before they were added."""

  steps: Ints
  names: tuple[Any, ...]
  values: Floats
  cuts: int


_OBJECTS = frozenset(OBJECTS)
_NO_SCALARS = _OBJECTS | {STEP}


def _scalars(keys: Iterable[str]) -> list[str]:
  return [key for key in keys if key not in _NO_SCALARS]


def _floats(numbers: list[Any]) -> Floats:
  """The numbers as float64, with NaN for None; raises for anything else."""
  form = f"{len(numbers)}d"
  try:
    return np.frombuffer(struct.pack(form, *numbers))
  except struct.error:
    if not {*map(type, numbers)} <= {int, float, bool, type(None)}:
      raise TypeError("a value must be a number or null") from None
    try:
      return np.frombuffer(struct.pack(form, *[math.nan if x is None else x for x in numbers]))
    except struct.error:  # Which error Python raises for an integer beyond float64 depends on its version.
      raise OverflowError("a value must be in the range of a float") from None


def _vectors(lists: list[Any]) -> Floats:
  """Lists of equal length as rows, with inf for None."""
  values = np.array(lists, np.float64)  # None becomes NaN.
  if values.ndim != 2:
    raise ValueError("a vector must have only numbers")
  values[np.isnan(values)] = np.inf
  return values


def _flagged(row: Row) -> list[str]:
  """The keys of a row whose numbers are nonfinite."""
  flags = row.get(FLAGS) or {}
  if not isinstance(flags, dict):
    raise TypeError("nonfinite numbers must be flagged by key")
  return [key for key in flags if key in row and key not in _NO_SCALARS]


def _batch(value: Any) -> Any:
  """A batch: an int, a string, or a tuple of them for a row with several."""
  if isinstance(value, list):
    return tuple(map(_batch, value))
  if not isinstance(value, int | str | None):
    raise TypeError("a batch must be a whole number or a string")
  return value


def _cut_to(values: Any, count: int) -> Any:
  """The first entries; the memory behind them is released."""
  if values.size > count:
    values.resize(count, refcheck=False)
  return values
