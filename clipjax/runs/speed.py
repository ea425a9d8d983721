"""How fast a run went: seconds per step, tokens and examples per second.

A step here is an update, whatever the caller's step numbers count; if updates were not counted, it is one of the
caller's steps. JAX runs ahead of the host, so two pushes may lie closer together than two steps. Averages over longer
parts of the run are more reliable.
"""

from typing import NamedTuple

import numpy as np

from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import column, main_name, norms_of_run
from clipjax.runs.run import Run
from clipjax.runs.schema import AMOUNTS, TIME, UPDATE


class Speed(NamedTuple):
  """Seconds per step: `step_time` is the median over `parts` parts of the run, `median` and `p99` go from push to push.

  `rates` are tokens and examples per second at `step_time`, as far as they were recorded.
  """

  step_time: float
  parts: int
  median: float
  p99: float
  rates: dict[str, float]


def seconds_per_step(run: Run) -> tuple[Ints, Floats]:
  """`(steps, seconds)`: the time between two pushes divided by the updates between them, at the later step."""
  rows = np.flatnonzero(np.isfinite(column(run, TIME)))
  seconds = np.diff(column(run, TIME)[rows]) / _between(run, rows)
  forward = seconds > 0  # After a resume, a step may be older than the step before it.
  return run.steps[rows][1:][forward], seconds[forward]


def _between(run: Run, rows: Ints) -> Floats:
  """The number of updates from each of these rows to the next."""
  updates, steps = np.diff(column(run, UPDATE)[rows]), np.diff(run.steps[rows])
  return np.where(updates > 0, updates, steps).astype(np.float64)


def speed(run: Run, begin: int | None = None) -> Speed | None:
  """The speed from step `begin` on, by default the first after the warm-up; None with fewer than two pushes.

  A median over parts ignores a pause, such as the gap before a resume.
  """
  begin = norms_of_run(run, main_name(run), None).begin if begin is None else begin
  parts = _parts(run, 20, begin)
  if not parts.seconds.size:
    return None
  steps, seconds = seconds_per_step(run)
  median, p99 = (float(x) for x in np.percentile(seconds[steps > begin], [50, 99]))
  rates = {}
  for key in AMOUNTS:
    amount = column(run, key)[run.steps >= begin]
    if np.isfinite(amount).any():
      rates[key] = float(np.nanmean(amount)) / float(np.median(parts.seconds))
  return Speed(float(np.median(parts.seconds)), parts.seconds.size, median, p99, rates)


def throughput(run: Run, key: str) -> tuple[Ints, Floats]:
  """`(steps, rate)`: how much of the scalar `key`, an amount per update, is processed per second, for 50 parts."""
  # In each part: the mean recorded amount per update, over the seconds per update.
  parts = _parts(run, 50)
  amount = column(run, key)
  known = np.isfinite(amount)
  total, count = np.cumsum(np.where(known, amount, 0)), np.cumsum(known)
  first, last = (np.searchsorted(run.steps, ends) for ends in (parts.first, parts.last))
  some = count[last] > count[first]
  rate = (total[last] - total[first])[some] / (count[last] - count[first])[some] / parts.seconds[some]
  return parts.last[some], rate


class _Parts(NamedTuple):
  """Parts of a run: their first and last steps, and the seconds per update."""

  first: Ints
  last: Ints
  seconds: Floats


def _parts(run: Run, most: int, begin: int = 0) -> _Parts:
  """Splits the run from `begin` on into at most `most` parts."""
  time = column(run, TIME)
  rows = np.flatnonzero(np.isfinite(time) & (run.steps >= begin))
  ends = np.linspace(0, max(rows.size - 1, 0), max(min(most, rows.size - 1), 0) + 1).astype(np.int64)
  rows = rows[ends] if rows.size else rows
  seconds = np.diff(time[rows])
  forward = seconds > 0  # Drops parts in which the clock was set back or stood still.
  first, last = run.steps[rows][:-1][forward], run.steps[rows][1:][forward]
  return _Parts(first, last, (seconds / _between(run, rows))[forward])
