"""The detectors of `diagnose`, run along the rows while they are written.

They decide which steps get numbers by leaf, and make the findings that a `Recorder` passes to `on_finding`. They keep
the last rows and the state of the detectors, and so find the same spikes as `diagnose` does in the whole run.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipjax.metric_names import CONSECUTIVE, NORM
from clipjax.runs.course import FEWEST, WINDOW
from clipjax.runs.health.events import GAP
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.layers import zero_gradient
from clipjax.runs.health.leaf_spikes import LeafDetector
from clipjax.runs.health.limits import HealthLimits
from clipjax.runs.health.losses import DIVERGED, lost_with, rising_loss
from clipjax.runs.health.series import KINDS, Spike, detector
from clipjax.runs.health.spike_detectors import BLOCK
from clipjax.runs.health.spikes import spikes, update_spikes
from clipjax.runs.health.verdict import judged
from clipjax.runs.health.view import Extent, Loss, View, loss_of, view_with
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.reading.read import run_of_rows
from clipjax.runs.roles import Role, role_of
from clipjax.runs.run import Run
from clipjax.runs.schema import BACK, SKIP, STEP, key_of


def _lasting(view: View) -> Iterator[Finding]:
  """A loss that did not recover from an event, which `spikes` leaves to `rising_loss`."""
  if lost_with(view) is not None:
    yield from rising_loss(view)


# Only checks that name a step run here; the others judge a whole run.
_DEFECTS = zero_gradient, update_spikes, spikes, _lasting
_ONSETS = 3  # A leaf whose norm drops to 0 gets this many rows by leaf: an unused expert does it often.
_PATIENCE = 10  # A loss has this many rows to recover before it is reported as diverged.
_SKIP_NORM = key_of(SKIP, NORM)
Row = Mapping[str, Any]


class Live:
  """Detectors that run along rows: one per series, and one for the leaves of each state.

  Each kind of finding is reported once, and a WARN only if it names a step that no finding has named before.
  """

  def __init__(self, limits: HealthLimits):
    self._limits = limits
    self._series: dict[str, _Series] = {}
    self._leaves: dict[str, _Leaves] = {}
    self._rows: deque[Row] = deque(maxlen=4 * limits.spike_window)
    self._spikes: deque[Spike] = deque(maxlen=4 * limits.spike_window)
    self._loss = _Loss()
    self._extent = Extent(0, 0)
    self._kinds: set[str] = set()
    self._told: set[int] = set()  # The steps of the reported findings.

  def marked(self, rows: Sequence[Row], vectors: Sequence[Mapping[str, Any]]) -> set[int]:
    """The steps that get numbers by leaf: a series or a leaf had a spike there, or a leaf dropped to 0."""
    out: set[int] = set()
    # Spikes of the series, part by part if the run went back to an earlier step.
    for part in _courses(rows):
      if part[0].get(BACK):
        self._go_back(part[0][STEP])
      for key in self._judged(part):
        known = [(row[STEP], value) for row in part if (value := _value(row, key)) is not None]
        series = self._series.setdefault(key, _Series(key, role_of(key) or Role.NORM, self._limits))
        found = series.spikes([step for step, _ in known], [value for _, value in known])
        self._spikes += found
        out |= {spike.step for spike in found}
    # Spikes and zeros of the leaves.
    for key in dict.fromkeys(key for by_leaf in vectors for key in by_leaf if role_of(key) is Role.NORM):
      by_step = [(row[STEP], by_leaf[key]) for row, by_leaf in zip(rows, vectors, strict=True) if key in by_leaf]
      for _, same in itertools.groupby(by_step, lambda pair: len(pair[1])):  # A model may change on the way.
        pairs = list(same)
        norms = np.array([vector for _, vector in pairs], np.float64)
        are_marked = self._leaves.setdefault(key, _Leaves(self._limits)).are_marked(norms)
        out |= {step for (step, _), is_marked in zip(pairs, are_marked.tolist(), strict=True) if is_marked}
    return out

  def findings(self, rows: Sequence[Row], leaves: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """The new findings of `diagnose` in these rows, of the kinds that name a step."""
    size = 2 * self._limits.spike_window  # Half of the rows that are kept.
    return [f for i in range(0, len(rows), size) for f in self._found(rows[i : i + size], leaves)]

  def _found(self, rows: Sequence[Row], leaves: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    first = self._extent.first_step if self._extent.rows else rows[0][STEP]
    self._extent = Extent(first, self._extent.rows + len(rows))
    self._rows.extend(rows)
    run = run_of_rows(self._rows, dict(leaves))
    # Judge the kept rows as `diagnose` would, with the spikes found so far.
    spikes = _within(run.steps, self._spikes)
    view = view_with(run, self._limits, 0, spikes, self._loss.of(run), self._extent)
    with np.errstate(over="ignore", invalid="ignore"):
      found = [f for f in judged(view, 0, _DEFECTS, ()) if f.level != "INFO" and f.name not in self._kinds]
    # Give a loss time to recover, and say nothing twice.
    found = [f for f in found if f.name != DIVERGED or f.steps[0] <= run.steps[-min(_PATIENCE, len(run))]]
    found = [f for f in found if f.level == "FAIL" or not f.steps or not self._told.issuperset(f.steps)]
    self._kinds |= {finding.name for finding in found}
    self._told.update(*(finding.steps for finding in found))
    return found

  def _judged(self, rows: Sequence[Row]) -> list[str]:
    """The series of these rows; the norm of `skip_steps` counts if there is no other."""
    keys = dict.fromkeys(key for row in rows for key in row)
    found = [key for key in keys if role_of(key) in KINDS]
    has_norm = any(role_of(key) is Role.NORM for key in (*found, *self._series))
    return found if has_norm or _SKIP_NORM not in keys else [*found, _SKIP_NORM]

  def _go_back(self, step: int) -> None:
    """Forgets everything from this step on, for a run that resumes there."""
    for series in self._series.values():
      series.go_back(step)
    self._rows = deque((row for row in self._rows if row[STEP] < step), self._rows.maxlen)
    self._spikes = deque((spike for spike in self._spikes if spike.step < step), self._spikes.maxlen)


class _Series:
  """A detector, with the steps of the values it remembers."""

  def __init__(self, key: str, role: Role, limits: HealthLimits):
    self._key = key
    self._detector = detector(role, limits)
    self._steps: deque[int] = deque(maxlen=limits.spike_window + BLOCK)

  def spikes(self, steps: Sequence[int], values: Sequence[float]) -> list[Spike]:
    found = np.array(values, np.float64)
    judged = self._detector.feed(found)
    self._steps.extend(steps)
    at = np.flatnonzero(judged.is_spike).tolist()
    return [Spike(self._key, steps[i], values[i], float(judged.usual[i])) for i in at]

  def go_back(self, step: int) -> None:
    kept = [s for s in self._steps if s < step]
    self._detector.forget(len(self._steps) - len(kept))
    self._steps.clear()
    self._steps.extend(kept)


class _Loss:
  """The first losses of a run and its best stretch, which may have left the kept rows."""

  def __init__(self) -> None:
    self._key: str | None = None
    self._count = 0
    self._last = -np.inf
    self._first: list[tuple[int, float]] = []
    self._best: list[tuple[int, float]] = []

  def of(self, run: Run) -> Loss | None:
    """The loss of the whole run, given its last rows."""
    loss = loss_of(run)
    if loss is None:
      return None
    if loss.key != self._key:
      self._key, self._count, self._first, self._best = loss.key, 0, [], []
    pairs = list(zip(loss.steps.tolist(), loss.values.tolist(), strict=True))
    new = [pair for pair in pairs if pair[0] > self._last]
    self._count += len(new)
    self._last = pairs[-1][0] if pairs else self._last
    self._first = (self._first + new)[:FEWEST]
    # The best stretch is the window with the lowest median, as in `course_of`.
    for i in range(len(pairs) - len(new), len(pairs) - WINDOW + 1):
      few = pairs[i : i + WINDOW]
      if not self._best or _median(few) < _median(self._best):
        self._best = few
    joined = dict(sorted({**dict(self._first), **dict(self._best), **dict(pairs)}.items()))
    return Loss(loss.key, np.array([*joined], np.int64), np.array([*joined.values()], np.float64), self._count)


def _median(pairs: Sequence[tuple[int, float]]) -> float:
  return float(np.median([value for _, value in pairs]))


class _Leaves:
  """The norms by leaf of a state: whether a leaf had a spike or dropped to 0."""

  def __init__(self, limits: HealthLimits):
    self._detector = LeafDetector(limits)
    self._was_zero: Bools = np.ones(0, np.bool_)
    self._onsets: Ints = np.zeros(0, np.int64)

  def are_marked(self, norms: Floats) -> Bools:
    """Whether each of the next rows, shape (n, leaves), has such a leaf."""
    is_zero = norms == 0
    if self._was_zero.shape != is_zero.shape[1:]:  # A leaf that starts at 0 did not drop to it.
      self._was_zero, self._onsets = np.ones(is_zero.shape[1:], np.bool_), np.zeros(is_zero.shape[1:], np.int64)
    began = is_zero & ~np.concatenate([self._was_zero[None], is_zero[:-1]])
    counts = self._onsets + np.cumsum(began, axis=0)
    self._was_zero, self._onsets = is_zero[-1], counts[-1]
    spikes, _ = self._detector.feed(norms)
    marked: Bools = (spikes | (began & (counts <= _ONSETS))).any(axis=1)
    return marked


def _within(steps: Ints, spikes: Iterable[Spike]) -> list[Spike]:
  """The spikes at these steps, without the rest of an event that began before them."""
  inside = sorted((spike for spike in spikes if steps[0] <= spike.step <= steps[-1]), key=lambda spike: spike.step)
  rows = np.searchsorted(steps, [spike.step for spike in inside])
  begins = np.flatnonzero(np.diff(rows, prepend=0) > GAP)
  is_whole = int(steps[0]) <= min((spike.step for spike in spikes), default=0)
  return inside if is_whole else inside[begins[0] :] if begins.size else []


def _courses(rows: Sequence[Row]) -> list[list[Row]]:
  """The rows, split wherever the run went back to an earlier step."""
  out: list[list[Row]] = []
  for row in rows:
    if not out or row.get(BACK):
      out.append([])
    out[-1].append(row)
  return out


def _value(row: Row, key: str) -> float | None:
  """The finite number of a series at a step; for a rejected step, the norm that `skip_steps` saw."""
  if key not in row and role_of(key) == Role.NORM and row.get(key_of(SKIP, CONSECUTIVE), 0):
    return row.get(_SKIP_NORM)
  return row.get(key)
