"""Spikes of single leaves: a detector that runs along the norms by leaf, all leaves at once."""

from collections.abc import Iterator

import numpy as np

from clipjax.quantities import NORM
from clipjax.runs.health.detectors import FEWEST, NORMAL
from clipjax.runs.health.findings import HealthLimits
from clipjax.runs.health.series import Spike
from clipjax.runs.kinds import Bools, Floats
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of

_RATIO = 5.0  # How many times its median a spike of a leaf is at least; there are many leaves to be wrong about.
_BLOCK = 16  # Rows that share a median.


class LeafDetector:
  """As `SpikeDetector`, for rows of shape (leaves,), by their logarithms; the rows of a block of 16 share a window."""

  def __init__(self, limits: HealthLimits):
    self._sigma = limits.spike_sigma
    self._window = limits.spike_window
    self._count = 0
    self._logs: Floats | None = None  # A ring of the last rows, shape (window, leaves); -inf for 0.
    self._limit: Floats | None = None
    self._usual: Floats | None = None

  @property
  def usual(self) -> Floats | None:
    """The medians of the leaves as they were before the last row."""
    return self._usual

  def feed(self, norms: Floats) -> Bools:
    """Which leaves of the next row are spikes; a row that is not finite is none and counts for nothing."""
    is_spike = np.zeros(norms.shape, np.bool_)
    if not np.isfinite(norms).all():
      return is_spike
    if self._logs is None or self._logs.shape[1] != norms.size:
      self._logs, self._count, self._limit = np.empty((self._window, norms.size)), 0, None
    with np.errstate(divide="ignore"):
      logs = np.log(norms)
    if self._count >= FEWEST and (self._count % _BLOCK == 0 or self._limit is None):
      self._learn()
    if self._limit is not None:
      is_spike = logs > self._limit
    self._logs[self._count % self._window] = logs
    self._count += 1
    return is_spike

  def _learn(self) -> None:
    assert self._logs is not None
    known = self._logs[: self._count]
    with np.errstate(invalid="ignore"):  # Of leaves that were mostly 0 nothing is known.
      middle = np.median(known, axis=0)
      deviation = NORMAL * np.median(np.abs(known - middle), axis=0)
      least = np.log(_RATIO) * (1 if self._count >= self._window // 4 else 2)
      limit = middle + np.maximum(self._sigma * deviation, least)
    self._limit = np.where(np.isfinite(limit), limit, np.inf)
    self._usual = np.exp(middle)


def leaf_spikes(run: Run, name: str, limits: HealthLimits) -> Iterator[Spike]:
  """The spikes of the leaves of a state, at the steps at which norms by leaf were recorded."""
  vector = key_of(name, NORM)
  if vector not in run.vectors:
    return
  detector, leaves = LeafDetector(limits), run.leaves[name]
  steps, values = run.vectors[vector]
  for step, row in zip(steps.tolist(), values, strict=True):
    for i in np.flatnonzero(detector.feed(row)).tolist():
      assert detector.usual is not None
      yield Spike(key_of(name, NORM, leaves[i]), step, float(row[i]), float(detector.usual[i]))
