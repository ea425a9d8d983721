"""The course of a loss: where it started, how low it got, where it ended, and where it left for good.

`diagnose` and `suggest_max_norm` both decide by it whether a run diverged. Medians stand for single losses throughout,
since single batches are noisy.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from clipjax.runs.kinds import Floats, Ints

NORMAL = 1.4826  # The standard deviation of normal values over their median absolute deviation (MAD).
LEARNED, LOST = 0.1, 0.8  # Defaults of `has_diverged`; callers of `diagnose` may set others in `HealthLimits`.
OVER = 0.25  # A loss that ends this part of its start above it has diverged.
FEWEST = 8  # A course needs at least this many losses.
FIRST = 3  # The median of this many losses is the start.
WINDOW = 9  # The best is the lowest median of this many losses in a row.


class Course(NamedTuple):
  """A loss in a few numbers.

  Attributes:
    steps: the steps of the finite losses.
    first: the loss at the start: the first one, or the median of three if that is lower.
    best: the lowest median of nine losses in a row.
    best_step: roughly the step of the best.
    last: the loss at the end: the median of the last twentieth, at least three.
    noise: the standard deviation of a loss around its neighbours, near its best.
    left: the first step from which on the loss never came near its best again; None if it ends near it.
  """

  steps: Ints
  first: float
  best: float
  best_step: int
  last: float
  noise: float
  left: int | None

  @property
  def fall(self) -> float:
    """What the run learned: from the start down to the best."""
    return self.first - self.best

  @property
  def loss(self) -> float:
    """How much of its fall it undid: from the best up to the end."""
    return self.last - self.best


def course_of(steps: Ints, values: Floats, count: int | None = None) -> Course | None:
  """The course of finite losses; None if there are too few.

  Args:
    steps: the steps of the losses, ascending.
    values: the losses.
    count: how many losses there were in all, if these are only the first, the best and the last of them.
  """
  if values.size < FEWEST:
    return None
  width = min(WINDOW, values.size // 3)
  smooth = np.median(sliding_window_view(values, width), axis=1)
  first, best_at = min(float(values[0]), float(np.median(values[:FIRST]))), int(smooth.argmin())
  best = min(float(smooth[best_at]), first)
  last = float(np.median(values[-max(FIRST, min((count or values.size) // 20, 100)) :]))
  noise = _noise(values, best)
  left = _left(steps, values, first, best, last, noise)
  return Course(steps, first, best, int(steps[best_at + width // 2]), last, noise, left)


def began_late(steps: Ints, first: int | None = None, rows: int | None = None) -> bool:
  """Whether a record begins so late that the start of the run is unknown.

  Steps may count examples, so the first step is compared with the usual distance of two rows.

  Args:
    steps: the steps of the rows.
    first: the first step of the record, if these are only its last rows.
    rows: how many rows the record has, if these are only the last.
  """
  if steps.size < 2:
    return False
  begin, count = int(steps[0]) if first is None else first, rows or steps.size
  return begin > count * float(np.median(np.diff(steps)))


def has_diverged(course: Course, *, learned: float = LEARNED, lost: float = LOST) -> bool:
  """Whether a loss left for good: it ends above its start, or undid most of its fall.

  Args:
    course: the course of the training loss.
    learned: smallest fall, relative to the first loss, that counts as learning.
    lost: the share of the fall that must be undone.
  """
  if course.left is None:
    return False
  # Six deviations are more than noise.
  noise = 6 * course.noise
  if course.last - course.first > max(noise, OVER * abs(course.first)):
    return True
  has_learned = course.fall > max(noise, learned * abs(course.first))
  return has_learned and course.loss > max(noise, lost * course.fall)


def _noise(values: Floats, best: float) -> float:
  """The standard deviation of a loss around its neighbours, at its best.

  Differences of neighbours ignore a linear trend, differences of logarithms an exponential one. Their deviation is
  sqrt(2) times the deviation of a value.
  """
  is_positive = values.min() > 0
  differences = np.diff(np.log(values) if is_positive else values)
  deviation = NORMAL * float(np.median(np.abs(differences - np.median(differences)))) / 2**0.5
  return deviation * best if is_positive else deviation


def _left(steps: Ints, values: Floats, first: float, best: float, last: float, noise: float) -> int | None:
  """The step after the last one at which the loss was near its best; None if it ends there.

  Near means within noise, half of the best, or a tenth of the start, but at most halfway up to the end.
  """
  near = max(4 * noise, 0.5 * abs(best), 0.1 * abs(first))
  level = best + min(near, 0.5 * (last - best))
  inside = np.flatnonzero(values <= level)
  if last <= level or not inside.size or inside[-1] + 1 >= values.size:
    return None
  return int(steps[inside[-1] + 1])
