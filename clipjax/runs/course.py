"""The course of a loss: where it began, how low it got, where it ended, and where it left for good."""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from clipjax.runs.kinds import Floats, Ints

NORMAL = 1.4826  # Standard deviation of normal values over their median absolute deviation (MAD).
LEARNED, LOST = 0.1, 0.8  # See `has_diverged`; `HealthLimits` has other values where they are asked for.
OVER = 0.25  # Over its start, where a loss that ends above it has diverged.
FEWEST = 8  # Losses of which a course can be told.
FIRST = 3  # Losses whose median is the start.
WINDOW = 9  # Losses whose median counts: single batches are noisy.


class Course(NamedTuple):
  """A loss in a few numbers.

  Attributes:
    steps: the steps of the finite losses.
    first: the loss at the start: the first, or the median of three where that is less.
    best: the lowest median of nine that follow each other.
    best_step: about where that was.
    last: the loss at the end, a median of the last twentieth, of three at least.
    noise: standard deviation of a loss around its neighbours, near its best.
    left: the first step after which the loss was never as low again as near its best; None where it ends there.
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
    """What was learned: from the start to the best."""
    return self.first - self.best

  @property
  def loss(self) -> float:
    """What was lost again: from the best to the end."""
    return self.last - self.best


def course_of(steps: Ints, values: Floats, count: int | None = None) -> Course | None:
  """The course of finite losses; None for too few.

  Args:
    steps: of the losses, ascending.
    values: the losses.
    count: how many there were in all, where these are the first, the best and the last of them.
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
  """Whether a record begins so late that the start of the run is not known; its steps may count examples.

  Args:
    steps: of the rows.
    first: the first step of the record, where these are its last rows.
    rows: how many rows it has, where these are the last.
  """
  if steps.size < 2:
    return False
  begin, count = int(steps[0]) if first is None else first, rows or steps.size
  return begin > count * float(np.median(np.diff(steps)))


def has_diverged(course: Course, *, learned: float = LEARNED, lost: float = LOST) -> bool:
  """Whether a loss left for good: it ends above its start, or has lost most of what it learned.

  Args:
    course: of the loss that is trained.
    learned: the fall of a loss, over its first value, below which nothing was learned.
    lost: the share of the fall whose loss counts.
  """
  if course.left is None:
    return False
  noise = 6 * course.noise
  if course.last - course.first > max(noise, OVER * abs(course.first)):
    return True
  has_learned = course.fall > max(noise, learned * abs(course.first))
  return has_learned and course.loss > max(noise, lost * course.fall)


def _noise(values: Floats, best: float) -> float:
  """The deviation of a loss around its neighbours, at its best.

  Differences of neighbours do not see a trend, nor those of logarithms one that grows by a factor; their deviation is
  sqrt(2) times that of a value.
  """
  is_positive = values.min() > 0
  differences = np.diff(np.log(values) if is_positive else values)
  deviation = NORMAL * float(np.median(np.abs(differences - np.median(differences)))) / 2**0.5
  return deviation * best if is_positive else deviation


def _left(steps: Ints, values: Floats, first: float, best: float, last: float, noise: float) -> int | None:
  """The step after the last one at which the loss was near its best: within a half of it, and a tenth of the start."""
  near = max(4 * noise, 0.5 * abs(best), 0.1 * abs(first))
  level = best + min(near, 0.5 * (last - best))
  inside = np.flatnonzero(values <= level)
  if last <= level or not inside.size or inside[-1] + 1 >= values.size:
    return None
  return int(steps[inside[-1] + 1])
