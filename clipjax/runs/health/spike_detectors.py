"""The spike detector: it runs along a series in constant time per value and constant memory.

The recorder feeds it rows as it writes them, `diagnose` feeds it a whole run: the answers are the same.

A value is compared with the median of the values before it, in units of their median absolute deviation (MAD). Both
stay put when a tenth of the values are spikes, unlike mean and standard deviation. 1.4826 * MAD is the standard
deviation of normal values (Hampel, 1974, https://doi.org/10.1080/01621459.1974.10482962). Positive series are judged by
their logarithms, since norms and losses vary by factors.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from clipjax.runs.course import NORMAL
from clipjax.runs.kinds import Bools, Floats

FEWEST = 8  # This many values come before the first judged one.
BLOCK = 8  # This many values share a median: one median per value would take minutes for a long run.
_BLOCKS = 8192  # Blocks per batch, to bound memory on long runs.
_MOST = 30.0  # A positive value this many times the median is a spike, however much the others vary.
_EARLY = 4  # Limits are wider until a quarter of the window is full.
_JUST = 4  # The first value of a spike must jump above this many values before it: a rising level is not a spike.


class Kind(NamedTuple):
  """How far a value of a series may rise before it is a spike.

  Attributes:
    ratio: a spike is at least this many times the median; its square while few values are known.
    jump: the first value of a spike exceeds this many times the largest of the 4 values before it.
    share: a spike exceeds the median by at least this part of the first values; for losses, which end near 0.
  """

  ratio: float
  jump: float
  share: float = 0.0


class Judged(NamedTuple):
  """Whether each value is a spike, and the median it was compared with (NaN if it was not judged)."""

  is_spike: Bools
  usual: Floats


class SpikeDetector:
  """Finds spikes: values more than `sigma * 1.4826 * MAD` above the median of the `window` values before.

  The 8 values of a block share the window that ends before the block. The first of several spikes in a row must jump,
  too.
  """

  def __init__(self, sigma: float, window: int, kind: Kind):
    self._sigma = sigma
    self._window = window
    self._kind = kind
    self._count = 0  # Of all values so far.
    self._before: Floats = np.zeros(0)  # The last values, a window and a block of them.
    self._first: Floats = np.zeros(0)
    self._was_spike: Bools = np.zeros(0, np.bool_)  # Of the values in `_before`.

  def feed(self, values: Floats) -> Judged:
    """Judges the next values, all finite."""
    known = self._before.size
    joined = np.concatenate([self._before, values])
    if self._first.size < FEWEST:
      self._first = np.concatenate([self._first, values])[:FEWEST]
    limits, usual = self._limits(joined, known)
    spikes = self._jumping(joined, limits, known)
    # Keep what the next call needs.
    self._count += values.size
    kept = self._window + BLOCK
    self._before = joined[max(joined.size - kept, 0) :]
    self._was_spike = np.concatenate([self._was_spike, spikes])[-kept:]
    return Judged(spikes, usual)

  def forget(self, count: int) -> None:
    """Takes back the last `count` values, for a run that resumes from before them."""
    count = min(count, self._before.size)
    self._before = self._before[: self._before.size - count]
    self._was_spike = self._was_spike[: self._was_spike.size - count]
    self._count -= count
    self._first = self._first[: self._count]

  def _limits(self, joined: Floats, known: int) -> tuple[Floats, Floats]:
    """The limit and the median for each value from index `known` on; inf and NaN if it is not judged."""
    begin = self._count - known  # The index of joined[0] in the whole series.
    size = joined.size - known
    limits, usual = np.full(size, np.inf), np.full(size, np.nan)
    at, end = self._count, begin + joined.size
    while at < end:
      first = at // BLOCK * BLOCK
      is_full = first - self._window >= begin
      if is_full:  # Many blocks at a time, one window each.
        stop = min(first + BLOCK * _BLOCKS, end)
        windows = sliding_window_view(joined, self._window)[first - self._window - begin : stop - self._window - begin]
        limit, middle = (np.repeat(x, BLOCK)[at - first : stop - first] for x in self._bounds(windows[::BLOCK]))
      else:  # Until the window is full, each value is compared with all before it.
        stop = at + 1
        limit, middle = self._bounds(joined[None, max(at - self._window - begin, 0) : at - begin])
      part = slice(at - self._count, stop - self._count)
      limits[part], usual[part] = limit, middle
      at = stop
    return limits, usual

  def _bounds(self, before: Floats) -> tuple[Floats, Floats]:
    """The limit for the value after each row of values, and the median of the row."""
    count = before.shape[1]
    if count < FEWEST or np.isinf(self._sigma):
      return np.full(len(before), np.inf), np.full(len(before), np.nan)
    # Median and deviation, on logarithms if all values are positive.
    usual = np.median(before, axis=1)
    is_positive = before.min(axis=1) > 0
    limit = np.exp(_robust(np.log(np.where(is_positive[:, None], before, 1)), self._sigma))
    limit = np.minimum(limit, _MOST * usual)
    if not is_positive.all():
      limit = np.where(is_positive, limit, _robust(before, self._sigma))
    # A spike is large as well as rare: the limit never falls below this multiple of the median.
    ratio = self._kind.ratio if _EARLY * count >= self._window else self._kind.ratio**2
    floor = (ratio - 1) * np.abs(usual) + self._kind.share * float(np.median(np.abs(self._first)))
    # A series of zeros does not say how large a value may be.
    return np.where(floor > 0, np.maximum(limit, usual + floor), np.inf), usual

  def _jumping(self, joined: Floats, limits: Floats, known: int) -> Bools:
    """Which values from index `known` on are spikes: above their limit, and after a jump or another spike."""
    above = joined[known:] > limits
    spikes = np.zeros(above.size, np.bool_)
    for i in np.flatnonzero(above).tolist():
      at = known + i
      before = spikes[i - 1] if i else bool(self._was_spike.size and self._was_spike[-1])
      just = joined[max(at - _JUST, 0) : at].max()
      spikes[i] = before or joined[at] - just > (self._kind.jump - 1) * abs(just)
    return spikes


def _robust(values: Floats, sigma: float) -> Floats:
  """The median plus `sigma` robust standard deviations of each row."""
  middle = np.median(values, axis=1)
  deviation: Floats = NORMAL * np.median(np.abs(values - middle[:, None]), axis=1)
  return middle + sigma * deviation
