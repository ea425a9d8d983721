"""Finds the worst step of a state, and the norms of its layers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clipjax.metric_names import NORM, STEPS, WORST_NORM, WORST_STEP
from clipjax.runs.health.events import Event
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import column, unseen
from clipjax.runs.report.grid import usual
from clipjax.runs.report.marks import inside
from clipjax.runs.report.series import NormSeries, Vectors, vectors
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of


class Layer(NamedTuple):
  """A layer at a step: its norm, inf for nonfinite, and that over its usual norm, NaN if unknown."""

  name: str
  norm: float
  times: float


class Worst(NamedTuple):
  """The worst step: its norm, NaN for nonfinite, and its layers, those that moved most first."""

  step: int
  norm: float
  layers: tuple[Layer, ...]


def worst_step(run: Run, series: NormSeries, events: Sequence[Event] = (), applied: Sequence[int] = ()) -> Worst | None:
  """The worst step of a state, with its layers if they were recorded; None if nothing was measured.

  It is the first of the steps `applied`, whose nonfinite update nothing dropped; else the largest norm in an event that
  reached the parameters; else the largest norm; else the first nonfinite step.
  """
  finite = np.isfinite(series.norm)
  # The candidates in order of rank; the first set that is not empty decides.
  reached = inside([event for event in events if not event.is_caught], run.steps)
  for mask in (series.nonfinite & np.isin(run.steps, applied), finite & reached, finite, series.nonfinite):
    if mask.any():
      # The largest norm of the set, or its first step if all of its norms are nonfinite.
      at = int(np.argmax(np.where(mask & finite, series.norm, -1) if (mask & finite).any() else mask))
      return Worst(int(run.steps[at]), float(series.norm[at]), _layers(run, series.name, at, events))
  return None


def _layers(run: Run, name: str, at: int, events: Sequence[Event]) -> tuple[Layer, ...]:
  found = vectors(run, key_of(name, NORM))
  middle = usual(found, inside(events, found.steps)) if found is not None else None
  layers = _layers_at(found, run.steps[at : at + 1], middle)
  # The watch keeps the norms of its worst step, so later rows have them too.
  return layers or _layers_at(vectors(run, key_of(name, WORST_NORM)), _steps_of_worst(run, name, at), middle)


def _layers_at(found: Vectors | None, steps: Ints, middle: Floats | None) -> tuple[Layer, ...]:
  """The layers in the first row at one of these steps, those that moved most first; empty without such a row."""
  rows = np.flatnonzero(np.isin(found.steps, steps)) if found is not None else np.zeros(0, np.int64)
  if found is None or not rows.size:
    return ()
  # Without a usual norm (another set of leaves, too few rows), the order is by norm.
  values = found.values[rows[0]]
  times = np.full(values.size, np.nan) if middle is None or middle.size != values.size else values / middle
  order = np.argsort(-_rank(values, times), kind="stable")
  return tuple(Layer(found.names[i], float(values[i]), float(times[i])) for i in order if not np.isnan(values[i]))


def _rank(values: Floats, times: Floats) -> Floats:
  """Sort key of the layers: how far they moved if that is known for any, else their norms."""
  # Nonfinite layers come first, layers without a usual norm last, and layers that were not recorded are dropped.
  known: Bools = np.isfinite(times)
  rank = np.where(known, times, np.where(np.isinf(values), np.inf, -1)) if known.any() else values
  return np.where(np.isnan(values), -np.inf, rank)


def _steps_of_worst(run: Run, name: str, at: int) -> Ints:
  """The steps from row `at` on at which the state still reports row `at` as its worst step.

  A state identifies its worst step by its own count. Rows from the history of a watch have no count: subtract one per
  step from the count of the next push. A new state counts from the start again.
  """
  counts, worst = column(run, key_of(name, STEPS)), column(run, key_of(name, WORST_STEP))
  if not np.isfinite(counts).any():  # Without counts, compare with the number of the step.
    same: Ints = run.steps[worst == run.steps[at]]
    return same
  counted = at + np.flatnonzero(np.isfinite(counts[at:]))
  if not counted.size or unseen(run, name)[at]:
    return run.steps[:0]
  count = counts[counted[0]] - (run.steps[counted[0]] - run.steps[at])
  # A count that falls belongs to a new state, whose worst step is another one.
  fell = np.flatnonzero(np.diff(counts[counted]) < 0)
  end = counted[fell[0] + 1] if fell.size else len(run)
  later: Ints = run.steps[at:end][worst[at:end] == count]
  return later
