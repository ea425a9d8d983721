"""The phase of a record in which the run learned: the steps over which `suggest_max_norm` takes its percentile.

Norms fall as a run converges, down to nothing if it fits its data. The longer such a record, the less its norms would
say, so the steps after the phase are left out if the norms have fallen by then. The constants were chosen on the four
models of `benchmarks/small_models.py`; docs/choosing.md shows how the phase does on others.

Stages: find the end of the phase from the loss, or without one from the squared norms; leave out the warm-up; keep the
phase only if the norms fell after it.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import FEW, Norms, default_warmup
from clipjax.runs.schema import LOSS

# The phase ends once the smoothed loss has made this share of its fall, or without a loss once this share of the sum of
# squared norms is reached: to first order a gradient descent step lowers the loss by learning_rate * norm**2. With
# both, records of 300 and 2000 steps give the same budget, within the tolerance, on the feed-forward net and the CNN.
OF_FALL, OF_SQUARES = 0.995, 0.98
_FELL = 2.0  # Only norms that fell by this factor are left out; otherwise the whole record says more.
MOST_OF_FALL, _LATE = 0.95, 0.75  # A loss whose last twentieth of the fall came in the last quarter was still falling.
_WINDOW, _FIRST, _BLOCKS = 15, 3, 20  # Steps in a running median, and in the first level; parts to find the lowest in.
_LEAST = FEW + FEW // 5  # The phase has at least this many norms, which leaves enough after the warm-up.
_CHUNK = 8192  # Windows per batch, to bound memory on long runs.
NORMS = "norms"  # `Phase.ended_by` if no loss was recorded.


class Phase(NamedTuple):
  """The steps that the percentile covers, and what else the record says.

  Attributes:
    begin: the first step, after the warm-up.
    end: the last one.
    ended_by: "loss" or "norms", whichever gave the end; "" if it is the end of the record.
    warmup: how many norms before `begin` are left out.
    first: the median norm in the first tenth of the record; `last` is the same for the last tenth.
    after: the median norm after `end`; NaN if the record ends there.
    has_fallen: whether the loss fell by more than its changes from step to step; None without a loss.
    most_by: the step by which the loss had made 95% of its fall; None if it did not fall.
    is_falling: whether that step lies in the last quarter of the record, so the loss was still falling.
    is_missed: whether the given warm-up covers the phase, and the norms have fallen since.
  """

  begin: int
  end: int
  ended_by: str
  warmup: int
  first: float
  last: float
  after: float
  has_fallen: bool | None
  most_by: int | None
  is_falling: bool
  is_missed: bool


def phase_of(
  norms: Norms,
  losses: tuple[Ints, Floats] | None,
  warmup_steps: int | None,
  *,
  of_fall: float = OF_FALL,
  of_squares: float = OF_SQUARES,
) -> Phase:
  """The phase of these norms, at least one of them finite.

  Args:
    norms: the norms in step order, with the warm-up of the whole record.
    losses: the steps and values of the training loss, all finite; None or empty if it was not recorded.
    warmup_steps: the caller's argument; None: a tenth of the rows up to the end of the phase, at most 100.
    of_fall: the share of its fall that the loss makes in the phase.
    of_squares: the share of the sum of squared norms in the phase, used without a loss.
  """
  # The end, by the loss or by the squared norms; a loss that never fell ends no phase.
  steps, values = norms.steps[norms.finite], norms.values[norms.finite]
  course = None if losses is None or losses[0].size < FEW else _Course.of(*losses)
  has_fallen = None if course is None else course.has_fallen
  end, by = int(steps[-1]), ""
  most = None
  if course is None:
    end, by = _by_squares(norms, of_squares), NORMS
  elif has_fallen:
    end, by, most = course.reached(of_fall), LOSS, course.reached(MOST_OF_FALL)
  # Even a run that learns in five steps needs enough norms.
  end = max(end, int(steps[min(_LEAST, steps.size) - 1]))
  # The warm-up scales with the phase, not with the record.
  begin = norms.begin if warmup_steps is not None else default_warmup(norms.steps[norms.steps <= end])
  inside, after = values[(steps >= begin) & (steps <= end)], values[steps > end]
  # Keep the phase only if the norms fell after it, else take the whole record.
  is_low = bool(after.size >= FEW and _FELL * np.median(after) <= np.median(values[steps <= end]))
  is_missed = is_low and inside.size < FEW and warmup_steps is not None
  if not by or not is_low or inside.size < FEW:
    begin, end, by = norms.begin, int(norms.steps[-1]), ""
  tenths = np.array_split(values, min(10, values.size))
  return Phase(
    begin=begin,
    end=end,
    ended_by=by,
    warmup=int(np.sum(norms.steps < begin)),
    first=float(np.median(tenths[0])),
    last=float(np.median(tenths[-1])),
    after=float(np.median(after)) if by else np.nan,
    has_fallen=has_fallen,
    most_by=most,
    is_falling=course is not None and most is not None and course.is_late(most),
    is_missed=is_missed,
  )


class _Course(NamedTuple):
  """How a loss fell: its steps, running median, first level, lowest level and noise from step to step."""

  steps: Ints
  smooth: Floats
  first: float
  lowest: float
  noise: float

  @classmethod
  def of(cls, steps: Ints, loss: Floats) -> "_Course":
    first = float(np.median(loss[:_FIRST]))
    # Medians of parts: the lowest of many single values is chance, and on a long plateau it comes late.
    lowest = min(float(np.median(part)) for part in np.array_split(loss, min(_BLOCKS, loss.size)))
    return cls(steps, _running_median(loss), first, lowest, float(np.median(np.abs(np.diff(loss)))))

  @property
  def has_fallen(self) -> bool:
    return self.first - self.lowest > self.noise

  def reached(self, share: float) -> int:
    """The first step at which the loss had made this share of its fall."""
    return int(self.steps[np.argmax(self.smooth <= self.first - share * (self.first - self.lowest))])

  def is_late(self, step: int) -> bool:
    return bool(np.searchsorted(self.steps, step) >= _LATE * self.steps.size)


def _by_squares(norms: Norms, share: float) -> int:
  """The step by which the squared norms, smoothed against spikes, have reached this share of their sum.

  It is the last step if the norms have not fallen since the warm-up: large norms only at the start end no phase.
  """
  steps, values = norms.steps[norms.finite], norms.values[norms.finite]
  first, *_, last = np.array_split(values[steps >= norms.begin], 10)
  largest = float(values.max())
  if last.size == 0 or largest == 0 or _FELL * np.median(last) > np.median(first):
    return int(steps[-1])
  total = np.cumsum(np.square(_running_median(values) / largest))
  return int(steps[np.searchsorted(total, share * total[-1])])


def _running_median(values: Floats) -> Floats:
  """The median of each value and the values before it, one window in all; fewer at the start."""
  head = [np.median(values[: i + 1]) for i in range(min(_WINDOW - 1, values.size))]
  if values.size < _WINDOW:
    return np.array(head)
  windows = sliding_window_view(values, _WINDOW)
  return np.concatenate([head, *(np.median(windows[i : i + _CHUNK], axis=1) for i in range(0, len(windows), _CHUNK))])
