"""Spikes of single leaves: one detector runs along the norms by leaf, for all leaves at once.

The rule of `spike_detectors`, simplified to stay cheap for thousands of leaves: only logarithms, no jump required,
and 32 rows share a median.
"""

from collections.abc import Iterator

import numpy as np

from clipjax.metric_names import NORM
from clipjax.runs.course import NORMAL
from clipjax.runs.health.limits import HealthLimits
from clipjax.runs.health.series import Spike
from clipjax.runs.health.spike_detectors import FEWEST
from clipjax.runs.kinds import Bools, Floats
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of

_RATIO = 5.0  # A spike is at least this many times the median of its leaf: many leaves mean many false alarms.
_BLOCK = 32  # Rows that share a median.
_FIRST = 16  # Rows before the second median; `FEWEST` come before the first.


class LeafDetector:
  """`SpikeDetector` for rows of shape (leaves,), on logarithms; the 32 rows of a block share a window."""

  def __init__(self, limits: HealthLimits):
    self._sigma = limits.spike_sigma
    self._window = limits.spike_window
    self._count = 0
    # A ring buffer of the last rows, shape (window, leaves); a norm of 0 is -inf.
    self._logs: Floats = np.empty((limits.spike_window, 0))
    self._limit: Floats | None = None
    self._usual: Floats | None = None

  def feed(self, norms: Floats) -> tuple[Bools, Floats]:
    """Which entries of the next rows, shape (n, leaves), are spikes, and the medians before them.

    A nonfinite row has no spikes and is not counted.
    """
    if norms.shape[1] != self._logs.shape[1]:
      self._logs, self._count, self._limit = np.empty((self._window, norms.shape[1])), 0, None
    spikes, usual = np.zeros(norms.shape, np.bool_), np.full(norms.shape, np.nan)
    finite = np.flatnonzero(np.isfinite(norms).all(axis=1))
    with np.errstate(divide="ignore"):
      logs = np.log(norms[finite])
    # Judge the rows up to the next median, put them into the ring, take that median.
    at = 0
    while at < finite.size:
      stop = min(at + self._until_median(), finite.size)
      if self._limit is not None and self._usual is not None:
        spikes[finite[at:stop]] = logs[at:stop] > self._limit
        usual[finite[at:stop]] = self._usual
      self._logs[(self._count + np.arange(stop - at)) % self._window] = logs[at:stop]
      self._count += stop - at
      at = stop
      if np.isfinite(self._sigma) and (self._count in (FEWEST, _FIRST) or self._count % _BLOCK == 0):
        self._learn()
    return spikes, usual

  def _until_median(self) -> int:
    """How many rows are left until the next median."""
    ends = (FEWEST, _FIRST, (self._count // _BLOCK + 1) * _BLOCK)
    return min(*(end - self._count for end in ends if end > self._count), self._window)

  def _learn(self) -> None:
    """Takes the median and the limit of each leaf from the ring."""
    known = self._logs[: self._count]
    with np.errstate(invalid="ignore"):  # A leaf that was mostly 0 gets no limit.
      middle = np.median(known, axis=0)
      deviation = NORMAL * np.median(np.abs(known - middle), axis=0)
      least = np.log(_RATIO) * (1 if self._count >= _FIRST else 2)
      limit = middle + np.maximum(self._sigma * deviation, least)
    self._limit = np.where(np.isfinite(limit), limit, np.inf)
    self._usual = np.exp(middle)


def leaf_spikes(run: Run, name: str, limits: HealthLimits) -> Iterator[Spike]:
  """The leaf spikes of a state, at the steps with recorded norms by leaf."""
  vector = key_of(name, NORM)
  if vector not in run.vectors:
    return
  steps, values = run.vectors[vector]
  spikes, usual = LeafDetector(limits).feed(values)
  for row, leaf in zip(*(found.tolist() for found in np.nonzero(spikes)), strict=True):
    key = key_of(name, NORM, run.leaves[name][leaf])
    yield Spike(key, int(steps[row]), float(values[row, leaf]), float(usual[row, leaf]))
