"""The heat map in numbers: layers by time, each column where its steps are, and layers by depth.

Numbers by leaf are recorded once in so many steps, and at the steps that a finding names. A row of the first kind
stands for the steps around it, up to half way to the next row; one of the second kind for its own step alone. What lies
between and was not recorded stays empty.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import numpy as np

from clipjax.runs.health.events import Event
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.report.series import Vectors, medians
from clipjax.runs.words import Stack, in_stacks

_FEW = 4  # Rows, of which a median says little.
_CHAIN, _WHOLE = 3, 0.9  # Rows of a rhythm at least, and the share of them that is there, as some may be lost.
_CANDIDATES = 200  # Rows from the first on that may be its second.
_MOST_NAMED = 3  # Layers of an event.


# What stands for rows that share a cell: values and the first row of each cell to one row a cell.
Combine: TypeAlias = Callable[[Floats, Ints], Floats]


class Grid(NamedTuple):
  """Layers by time: `values` (L, columns), the columns of equal width between the steps `start` and `stop`.

  NaN is what was not recorded, inf what was not finite.
  """

  start: float
  stop: float
  values: Floats


class Steps(NamedTuple):
  """An axis of steps: from `first` to `last`, `unit` apart, as they usually are in the run."""

  first: int
  last: int
  unit: float

  @property
  def span(self) -> tuple[int, int]:
    """The first and the last step."""
    return self.first, self.last


def steps_of(steps: Ints, span: tuple[int, int] | None = None) -> Steps:
  """The axis of a run with these steps, or of the part `span` of it."""
  unit = float(np.median(np.diff(steps))) if steps.size > 1 else 1.0
  first, last = span if span is not None else (int(steps[0]), int(steps[-1])) if steps.size else (0, 0)
  return Steps(first, last, unit)


def greatest(values: Floats, firsts: Ints) -> Floats:
  """The greatest number of each group of rows, NaN where it has none."""
  out: Floats = np.fmax.reduceat(values, firsts, axis=0)
  return out


def farthest(values: Floats, firsts: Ints) -> Floats:
  """The number farthest from 0 of each group of rows, NaN where it has none; of logarithms, the farthest from 1."""
  high, low = greatest(values, firsts), -greatest(-values, firsts)
  return np.where(-low > high, low, high)


def time_grid(
  found: Vectors, axis: Steps, bins: int, alone: Bools | None = None, *, combine: Combine = greatest
) -> Grid:
  """At most `bins` columns, none finer than a step; each holds the greatest values recorded in it.

  A column without a record has those of the regular row beside it, where that is at most half a gap away.

  Args:
    found: numbers by layer.
    axis: what the columns span.
    bins: how many columns there may be.
    alone: bool, of the rows: which stand for their own step only; None: those that are not in the rhythm of the rest.
    combine: what a column holds of the values recorded in it.
  """
  count = int(np.clip(round((axis.last - axis.first) / axis.unit) + 1, 1, bins))
  start, stop = axis.first - axis.unit / 2, axis.last + axis.unit / 2
  width = (stop - start) / count
  grid = np.full((found.values.shape[1], count), np.nan)
  centres: Floats = start + width * (np.arange(count, dtype=np.float64) + 0.5)
  row = _row_for(found.steps, centres, alone)
  grid[:, row >= 0] = found.values[row[row >= 0]].T
  inside = (found.steps > start) & (found.steps < stop)
  if inside.any():
    which = np.minimum(((found.steps[inside] - start) / width).astype(np.int64), count - 1)
    columns, first = np.unique(which, return_index=True)
    grid[:, columns] = combine(found.values[inside], first).T
  return Grid(start, stop, grid)


def _row_for(steps: Ints, places: Floats, alone: Bools | None) -> Ints:
  """The regular row that stands for each of some places, -1 for none.

  It is at most half a gap away, and no other row is between: what comes after a jump says nothing of what was before.
  """
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
  """`(regular, gap)`: the rows that were recorded once in `gap` steps, and that gap; ascending steps.

  The gap is the least one at which rows follow each other from the first to the last row, as a recorder writes them;
  rows between, which it writes for a finding or a new largest norm, are not regular. Where there is no such gap, as
  where two records of one run differ in it, every row counts as regular, and the gap is the median.
  """
  kept = np.ones(steps.size, np.bool_) if alone is None else ~alone
  if steps.size < 2:
    return np.zeros(steps.size, np.bool_), 1
  first, last = int(steps[0]), int(steps[-1])
  for gap in (steps[1:_CANDIDATES] - first).tolist():
    count = (last - first) // gap + 1
    if count < _CHAIN:
      break
    # A longer chain cannot be whole, and steps may be counts of examples, which have no end.
    if count * _WHOLE <= steps.size and np.isin(first + gap * np.arange(count), steps).mean() >= _WHOLE:
      return kept & ((steps - first) % gap == 0), gap
  return kept, max(round(float(np.median(np.diff(steps[kept])))), 1) if kept.sum() > 1 else 1


def usual(found: Vectors, alone: Bools | None = None) -> Floats | None:
  """The median norm of each layer over the regular rows, NaN without one above 0; None where there are few rows."""
  regular, _ = rhythm(found.steps, alone)
  if regular.sum() < _FEW:
    return None
  values = found.values[regular]
  return medians(np.where(values > 0, values, np.nan))


def over_usual(found: Vectors, alone: Bools | None = None) -> Vectors | None:
  """Each norm over the usual one of its layer, 0 for 0; None where too few rows tell what is usual."""
  middle = usual(found, alone)
  if middle is None:
    return None
  with np.errstate(over="ignore"):
    return found._replace(values=np.where(found.values == 0, 0.0, found.values / middle))


def jumps(found: Vectors, events: Iterable[Event]) -> list[tuple[int, int]]:
  """`(step, layer)` of the layers that an event names, at the step of their largest norm in it."""
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
  """Layers as the lines of a map: `values` (lines, columns), each line that of `per` layers of one stack.

  `stacks` have their place among the lines in `start`, and the number of their layers in `size`; `lines` (L,) is where
  each layer is.
  """

  values: Floats
  stacks: tuple[Stack, ...]
  per: int
  lines: Ints


def by_depth(names: tuple[str, ...], values: Floats, most: int, *, combine: Combine = greatest) -> Depth:
  """Values (L, columns) with neighbouring layers of a stack in one line where there are more than about `most`."""
  stacks = in_stacks(names)
  per = math.ceil(len(names) / most)
  firsts = [range(stack.start, stack.start + stack.size, per) for stack in stacks]
  starts = np.cumsum([0, *map(len, firsts)]).tolist()
  first = np.concatenate(firsts)
  values = combine(values, first)  # What is known of them.
  places = tuple(s._replace(start=start) for s, start in zip(stacks, starts, strict=False))
  return Depth(values, places, per, np.searchsorted(first, np.arange(len(names)), side="right") - 1)
