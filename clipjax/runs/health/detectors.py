"""What finds steps: detectors that run along a series, in constant time a value and in constant memory.

The recorder feeds them with the rows as it writes them, `diagnose` with all of a run at once: the answers are the same.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from clipjax.runs.kinds import Floats

_ROUNDING = 0.01  # The least standard deviation, over the mean: constant norms differ by rounding alone.
_CHUNK = 8192  # Windows at a time, which bounds the memory that a long run takes.


class SpikeDetector:
  """For each value of a series the limit above which it is a spike: mean plus `sigma` standard deviations.

  Mean and deviation are of the `window` values before it. As in OLMo-core, a value is judged as soon as it and those
  before it fill half of the window; before that its limit is inf.
  """

  def __init__(self, sigma: float, window: int):
    self._sigma = sigma
    self._window = window
    self._before: Floats = np.zeros(0)

  def feed(self, values: Floats) -> Floats:
    """The limits of the next values, which are finite and >= 0."""
    known, window = self._before.size, self._window
    joined = np.concatenate([self._before, values])
    self._before = joined[max(joined.size - window, 0) :]
    bounds = np.full(joined.size, np.inf)
    if window >= 2:
      for i in range(max(known, 2, window // 2 - 1), min(window, joined.size)):
        bounds[i] = self._bound(joined[None, :i])[0]
      if joined.size > window:
        windows = sliding_window_view(joined, window)[:-1]
        for i in range(0, len(windows), _CHUNK):
          bounds[window + i : window + i + _CHUNK] = self._bound(windows[i : i + _CHUNK])
    return bounds[known:]

  def forget(self, count: int) -> None:
    """Takes the last `count` values back, where a run went back to before them."""
    self._before = self._before[: max(self._before.size - count, 0)]

  def _bound(self, before: Floats) -> Floats:
    """The limit after each row of values."""
    largest = before.max(axis=1, keepdims=True, initial=0.0)
    scaled = before / np.where(largest > 0, largest, 1)  # Squares near the largest float64 would overflow.
    mean = scaled.mean(axis=1)
    # The deviation of many equal numbers is not exactly 0.
    deviation = np.maximum(scaled.std(axis=1, ddof=1), _ROUNDING * mean)
    limit: Floats = largest[:, 0] * (mean + self._sigma * deviation)
    return np.where(largest[:, 0] > 0, limit, np.inf)
