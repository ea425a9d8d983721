"""What finds spikes: a detector that runs along a series, in constant time a value and in constant memory.

The recorder feeds it with the rows as it writes them, `diagnose` with all of a run at once: the answers are the same.

A value is held against the median of the values before it, in median absolute deviations (MAD): both stand still where
a tenth of the values are spikes, which mean and standard deviation do not. 1.4826 * MAD is the standard deviation of
normal values (Hampel, 1974, https://doi.org/10.1080/01621459.1974.10482962). Positive series are judged by their
logarithms, since norms and losses vary by factors.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from clipjax.runs.course import NORMAL
from clipjax.runs.kinds import Bools, Floats

FEWEST = 8  # Values before the first one that is judged.
BLOCK = 8  # Values that share a median: a median of each window of a long run would take minutes.
_BLOCKS = 8192  # Blocks at a time, which bounds the memory that a long run takes.
_MOST = 30.0  # Times the median: so far above it a positive value is a spike, however much those before vary.
_EARLY = 4  # Until a window is a quarter full, limits are wider.
_JUST = 4  # Values before it that the first value of a spike must exceed: a level that rises is no spike.


class Kind(NamedTuple):
  """How far a value of a series may exceed the usual.

  Attributes:
    ratio: how many times the median a spike is at least; the square of that where few values are known.
    jump: how many times the largest of the few values before it the first value of a spike is.
    share: part of the first values that a spike exceeds the median by; for losses, near 0 in the end.
  """

  ratio: float
  jump: float
  share: float = 0.0


class Judged(NamedTuple):
  """What a detector says of values: whether each is a spike, and the median before it (NaN where none is judged)."""

  is_spike: Bools
  usual: Floats


class SpikeDetector:
  """Finds spikes: more than `sigma` deviations, `1.4826 * MAD`, above the median of the `window` values before.

  The 8 values of a block share the window that ends before the block. The first spike of several in a row has to jump
  as well.
  """

  def __init__(self, sigma: float, window: int, kind: Kind):
    self._sigma = sigma
    self._window = window
    self._kind = kind
    self._count = 0  # Values so far.
    self._before: Floats = np.zeros(0)  # The last ones.
    self._first: Floats = np.zeros(0)
    self._was_spike: Bools = np.zeros(0, np.bool_)  # Of the last ones.

  def feed(self, values: Floats) -> Judged:
    """Judges the next values, which are finite."""
    known = self._before.size
    joined = np.concatenate([self._before, values])
    if self._first.size < FEWEST:
      self._first = np.concatenate([self._first, values])[:FEWEST]
    limits, usual = self._limits(joined, known)
    spikes = self._jumping(joined, limits, known)
    self._count += values.size
    kept = self._window + BLOCK
    self._before = joined[max(joined.size - kept, 0) :]
    self._was_spike = np.concatenate([self._was_spike, spikes])[-kept:]
    return Judged(spikes, usual)

  def forget(self, count: int) -> None:
    """Takes the last `count` values back, where a run went back to before them."""
    count = min(count, self._before.size)
    self._before = self._before[: self._before.size - count]
    self._was_spike = self._was_spike[: self._was_spike.size - count]
    self._count -= count
    self._first = self._first[: self._count]

  def _limits(self, joined: Floats, known: int) -> tuple[Floats, Floats]:
    """The limit and the median of each of the values from the place `known` on; inf and NaN where none is judged."""
    begin = self._count - known  # The place of joined[0] in the whole series.
    size = joined.size - known
    limits, usual = np.full(size, np.inf), np.full(size, np.nan)
    at, end = self._count, begin + joined.size
    while at < end:
      first = at // BLOCK * BLOCK
      is_full = first - self._window >= begin
      if is_full:  # Many blocks at once.
        stop = min(first + BLOCK * _BLOCKS, end)
        windows = sliding_window_view(joined, self._window)[first - self._window - begin : stop - self._window - begin]
        limit, middle = (np.repeat(x, BLOCK)[at - first : stop - first] for x in self._bounds(windows[::BLOCK]))
      else:  # Until the window is full, each value has its own.
        stop = at + 1
        limit, middle = self._bounds(joined[None, max(at - self._window - begin, 0) : at - begin])
      part = slice(at - self._count, stop - self._count)
      limits[part], usual[part] = limit, middle
      at = stop
    return limits, usual

  def _bounds(self, before: Floats) -> tuple[Floats, Floats]:
    """The limit after each row of values, and their median."""
    count = before.shape[1]
    if count < FEWEST or np.isinf(self._sigma):
      return np.full(len(before), np.inf), np.full(len(before), np.nan)
    usual = np.median(before, axis=1)
    is_positive = before.min(axis=1) > 0
    limit = np.exp(_robust(np.log(np.where(is_positive[:, None], before, 1)), self._sigma))
    limit = np.minimum(limit, _MOST * usual)
    if not is_positive.all():
      limit = np.where(is_positive, limit, _robust(before, self._sigma))
    ratio = self._kind.ratio if _EARLY * count >= self._window else self._kind.ratio**2
    floor = (ratio - 1) * np.abs(usual) + self._kind.share * float(np.median(np.abs(self._first)))
    # A series of zeros says nothing of how large a value may be.
    return np.where(floor > 0, np.maximum(limit, usual + floor), np.inf), usual

  def _jumping(self, joined: Floats, limits: Floats, known: int) -> Bools:
    """Which values from the place `known` on are spikes: above their limit, after a jump or a spike."""
    above = joined[known:] > limits
    spikes = np.zeros(above.size, np.bool_)
    for i in np.flatnonzero(above).tolist():
      at = known + i
      before = spikes[i - 1] if i else bool(self._was_spike.size and self._was_spike[-1])
      just = joined[max(at - _JUST, 0) : at].max()
      spikes[i] = before or joined[at] - just > (self._kind.jump - 1) * abs(just)
    return spikes


def _robust(values: Floats, sigma: float) -> Floats:
  """Median plus `sigma` standard deviations of each row."""
  middle = np.median(values, axis=1)
  deviation: Floats = NORMAL * np.median(np.abs(values - middle[:, None]), axis=1)
  return middle + sigma * deviation
