"""The detectors of `diagnose` along the rows of a run as they are written.

They say which steps get their numbers by leaf, and make the findings that a `Recorder` hands to `on_finding`. The rows
before a batch are kept as far as the detectors look back, so the limits are those that `diagnose` has for the whole
run.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.quantities import CONSECUTIVE, NORM
from clipjax.runs.health.detectors import SpikeDetector
from clipjax.runs.health.findings import Finding, HealthLimits
from clipjax.runs.health.nonfinite import nonfinite_loss, nonfinite_norm
from clipjax.runs.health.spikes import spikes
from clipjax.runs.health.view import view_of
from clipjax.runs.reading.read import run_of_rows
from clipjax.runs.schema import BACK, FLAGS, LOSS, SKIP, STEP, key_of, names_with

_CHECKS = (nonfinite_norm, nonfinite_loss, spikes)  # Those that name steps.
Row = Mapping[str, Any]


class Live:
  """Detectors that run along rows, one for each series: the norm of every state, and the loss.

  A finding of a kind is told once.
  """

  def __init__(self, limits: HealthLimits):
    self._limits = limits
    self._series: dict[str, _Series] = {}
    self._rows: deque[Row] = deque(maxlen=2 * limits.spike_window)
    self._kinds: set[str] = set()

  def spikes(self, rows: Sequence[Row]) -> set[int]:
    """The steps of these rows at which a series had a spike."""
    out: set[int] = set()
    for part in _courses(rows):
      if part[0].get(BACK):
        self._go_back(part[0][STEP])
      for key in dict.fromkeys(key for row in part for key in row if _is_series(key)):
        known = [(row[STEP], value) for row in part if (value := _value(row, key)) is not None]
        series = self._series.setdefault(key, _Series(self._limits))
        out |= series.spikes([step for step, _ in known], [value for _, value in known])
    return out

  def findings(self, rows: Sequence[Row], spikes: set[int], leaves: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """What `diagnose` finds at the spikes of these rows, and where they are not finite; each kind once."""
    self._rows.extend(rows)
    steps = spikes | {row[STEP] for row in rows if any(map(_is_series, row.get(FLAGS, ())))}
    if not steps:
      return []
    run = run_of_rows(self._rows, dict(leaves))
    view = view_of(run, self._limits, 0)
    with np.errstate(over="ignore", invalid="ignore"):
      found = [finding for check in _CHECKS for finding in check(view)]
    new = [f for f in found if f.level != "INFO" and f.name not in self._kinds and not steps.isdisjoint(f.steps)]
    self._kinds |= {finding.name for finding in new}
    return new

  def _go_back(self, step: int) -> None:
    for series in self._series.values():
      series.go_back(step)
    kept = [row for row in self._rows if row[STEP] < step]
    self._rows.clear()
    self._rows.extend(kept)


class _Series:
  """A detector, and the steps of the values that it remembers."""

  def __init__(self, limits: HealthLimits):
    self._detector = SpikeDetector(limits.spike_sigma, limits.spike_window)
    self._steps: deque[int] = deque(maxlen=limits.spike_window)

  def spikes(self, steps: Sequence[int], values: Sequence[float]) -> set[int]:
    found = np.array(values, np.float64)
    is_spike = found > self._detector.feed(found)
    self._steps.extend(steps)
    return {step for step, spike in zip(steps, is_spike.tolist(), strict=True) if spike}

  def go_back(self, step: int) -> None:
    kept = [s for s in self._steps if s < step]
    self._detector.forget(len(self._steps) - len(kept))
    self._steps.clear()
    self._steps.extend(kept)


def _courses(rows: Sequence[Row]) -> list[list[Row]]:
  """The rows, each part from one where the run went back to the next such one."""
  out: list[list[Row]] = []
  for row in rows:
    if not out or row.get(BACK):
      out.append([])
    out[-1].append(row)
  return out


def _is_series(key: str) -> bool:
  return key == LOSS or bool(names_with([key], NORM))


def _value(row: Row, key: str) -> float | None:
  """The number of a series at a step, where it is finite; that of `skip_steps` where that rejected the step."""
  if key not in row and key != LOSS and row.get(key_of(SKIP, CONSECUTIVE), 0):
    return row.get(key_of(SKIP, NORM))
  return row.get(key)
