"""The numbers of the heat map: layers over time, each column at its own steps, and layers over depth.

Numbers by leaf are recorded at regular intervals, and at the steps that a finding names. A regular row stands for the
steps around it, up to halfway to the next row; any other row stands only for its own step. Steps that no row covers
stay empty.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import numpy as np

from clipjax.runs.health.events import Event
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.report.series import Vectors, medians
from clipjax.runs.words import Stack, in_stacks

_FEW = 4  # With fewer rows a median says little.
_CHAIN, _WHOLE = 3, 0.9  # The fewest rows of a rhythm, and the share that must be present: some may be lost.
_CANDIDATES = 200  # Rows among which the second row of the rhythm is sought.
_MOST_NAMED = 3  # Layers per event.


# Reduces rows that share a cell to one: takes all values and the first row of each cell.
Combine: TypeAlias = Callable[[Floats, Ints], Floats]


class Grid(NamedTuple):
  """Layers over time: `values` has shape (L, columns), with columns of equal width from step `start` to step `stop`.

  NaN means not recorded, inf nonfinite.
  """

  start: float
  stop: float
  values: Floats


class Steps(NamedTuple):
  """A step axis from `first` to `last`; `unit` is the median distance between recorded steps."""

  first: int
  last: int
  unit: float

  @property
  def span(self) -> tuple[int, int]:
    """The first and the last step."""
    return self.first, self.last


def steps_of(steps: Ints) -> Steps:
  """The axis of a run with these steps."""
  unit = float(np.median(np.diff(steps))) if steps.size > 1 else 1.0
  first, last = (int(steps[0]), int(steps[-1])) if steps.size else (0, 0)
  return Steps(first, last, unit)


def greatest(values: Floats, firsts: Ints) -> Floats:
  """The largest number of each group of rows, NaN for a group without one."""
  out: Floats = np.fmax.reduceat(values, firsts, axis=0)
  return out


def farthest(values: Floats, firsts: Ints) -> Floats:
  """The number farthest from 0 in each group of rows (as logarithms: from 1), NaN for a group without one."""
  high, low = greatest(values, firsts), -greatest(-values, firsts)
  return np.where(-low > high, low, high)


def time_grid(
  found: Vectors, axis: Steps, bins: int, alone: Bools | None = None, *, combine: Combine = greatest
) -> Grid:
  """At most `bins` columns, none narrower than a step; each holds the largest values recorded in it.

  A column without a record takes the values of the nearest regular row if that is at most half a gap away.

  Args:
    found: numbers by layer.
    axis: the steps that the columns span.
    bins: the largest number of columns.
    alone: bool, one per row, whether the row stands only for its own step; None: the rows outside the rhythm do.
    combine: reduces the values recorded in one column.
  """
  count = int(np.clip(round((axis.last - axis.first) / axis.unit) + 1, 1, bins))
  start, stop = axis.first - axis.unit / 2, axis.last + axis.unit / 2
  width = (stop - start) / count
  # Columns between records take the regular row nearby.
  grid = np.full((found.values.shape[1], count), np.nan)
  centres: Floats = start + width * (np.arange(count, dtype=np.float64) + 0.5)
  row = _row_for(found.steps, centres, alone)
  grid[:, row >= 0] = found.values[row[row >= 0]].T
  # Columns with records show exactly these, and none is lost: one spike of one layer stays visible.
  inside = (found.steps > start) & (found.steps < stop)
  if inside.any():
    which = np.minimum(((found.steps[inside] - start) / width).astype(np.int64), count - 1)
    columns, first = np.unique(which, return_index=True)
    grid[:, columns] = combine(found.values[inside], first).T
  return Grid(start, stop, grid)


def _row_for(steps: Ints, places: Floats, alone: Bools | None) -> Ints:
  """The index of the regular row that stands for each place, -1 for none.

  The row is at most half a gap away, with no other row between: a row after a jump says nothing about steps before it.
  """
  # Of the rows on both sides of a place, take the nearer one that is regular and near enough.
  regular, gap = rhythm(steps, alone)
  after = np.searchsorted(steps, places)
  near = []
  for row in (after - 1, after):
    at = row.clip(0, steps.size - 1)
    far = np.abs(steps[at] - places)
    near.append((at, np.where((row == at) & regular[at] & (far <= gap / 2), far, np.inf)))
  (left, far_left), (right, far_right) = near
  row = np.where(far_left <= far_right, left, right)
  return np.where(np.minimum(far_left, far_right) < np.inf, row, -1)


def rhythm(steps: Ints, alone: Bools | None = None) -> tuple[Bools, int]:
  """Returns `(regular, gap)`: which rows were recorded every `gap` steps, and that gap; the steps ascend.

  The gap is the smallest one at which rows follow each other from the first row to the last, as a recorder writes them.
  Rows between, which it writes for a finding or a new largest norm, are not regular. Without such a gap, for instance
  if two records of one run have different gaps, every row counts as regular and the gap is the median.
  """
  kept = np.ones(steps.size, np.bool_) if alone is None else ~alone
  if steps.size < 2:
    return np.zeros(steps.size, np.bool_), 1
  first, last = int(steps[0]), int(steps[-1])
  # Try the distances from the first row to later ones, the smallest first.
  for gap in (steps[1:_CANDIDATES] - first).tolist():
    count = (last - first) // gap + 1
    if count < _CHAIN:
      break
    # A chain longer than the rows cannot be whole, and would be huge if steps count examples.
    if count * _WHOLE <= steps.size and np.isin(first + gap * np.arange(count), steps).mean() >= _WHOLE:
      return kept & ((steps - first) % gap == 0), gap
  return kept, max(round(float(np.median(np.diff(steps[kept])))), 1) if kept.sum() > 1 else 1


def usual(found: Vectors, alone: Bools | None = None) -> Floats | None:
  """The median norm of each layer over regular rows, NaN without a norm above 0; None if the rows are too few."""
  regular, _ = rhythm(found.steps, alone)
  if regular.sum() < _FEW:
    return None
  values = found.values[regular]
  return medians(np.where(values > 0, values, np.nan))


def over_usual(found: Vectors, alone: Bools | None = None) -> Vectors | None:
  """Each norm over the usual norm of its layer, 0 for 0; None if the rows are too few."""
  middle = usual(found, alone)
  if middle is None:
    return None
  with np.errstate(over="ignore"):
    return found._replace(values=np.where(found.values == 0, 0.0, found.values / middle))


def jumps(found: Vectors, events: Iterable[Event]) -> list[tuple[int, int]]:
  """`(step, layer)` of each layer that an event names, at the step of its largest norm within the event."""
  out = []
  for event in events:
    rows = np.flatnonzero((found.steps >= event.start) & (found.steps <= event.end))
    for name in event.leaves[:_MOST_NAMED]:
      if rows.size and name in found.names:
        layer = found.names.index(name)
        largest = int(np.argmax(np.nan_to_num(found.values[rows, layer], nan=-1.0)))
        out.append((int(found.steps[rows[largest]]), layer))
  return out


class Depth(NamedTuple):
  """Layers as lines of a map: `values` has shape (lines, columns); a line stands for `per` layers of one stack.

  Each of `stacks` has its first line in `start` and its number of layers in `size`; `lines` (L,) is the line of each
  layer.
  """

  values: Floats
  stacks: tuple[Stack, ...]
  per: int
  lines: Ints


def by_depth(names: tuple[str, ...], values: Floats, most: int, *, combine: Combine = greatest) -> Depth:
  """Reduces values (L, columns) to about `most` lines: neighbouring layers of a stack share one."""
  # Merge as many neighbours as needed; a line never crosses from one stack to the next.
  stacks = in_stacks(names)
  per = math.ceil(len(names) / most)
  firsts = [range(stack.start, stack.start + stack.size, per) for stack in stacks]
  starts = np.cumsum([0, *map(len, firsts)]).tolist()
  first = np.concatenate(firsts)
  values = combine(values, first)
  places = tuple(s._replace(start=start) for s, start in zip(stacks, starts, strict=False))
  return Depth(values, places, per, np.searchsorted(first, np.arange(len(names)), side="right") - 1)
