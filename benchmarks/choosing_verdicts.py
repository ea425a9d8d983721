"""What `choosing.py` counts: which final losses hold, and how often.

A cell is one model under one optimizer at one rate. Its best is the lowest median over the seeds, among no clip and all
thresholds of the sweep. A rule holds if its own median exceeds the best by no more than the tolerance.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from choosing_runs import NO_CLIP, Cell, Study
from small_models import Array

SHARE, NATS = 0.05, 0.05  # A loss holds if it exceeds the best by at most this share, or this amount.


class At(NamedTuple):
  """A cell and its place."""

  study: Study
  k: int

  @property
  def cell(self) -> Cell:
    """The runs of the cell."""
    return self.study.cells[self.k]

  @property
  def best(self) -> float:
    """The lowest median final loss."""
    return min(float(np.median(self.cell.sweep, axis=0).min()), float(np.median(self.cell.rules[NO_CLIP])))

  @property
  def best_at(self) -> float:
    """The threshold of the sweep with the lowest median."""
    return float(self.study.thresholds[np.median(self.cell.sweep, axis=0).argmin()])

  @property
  def trains(self) -> bool:
    """Whether the best threshold lowers the loss at least half as much as the stable rate does."""
    stable = float(np.median(self.study.grid[:, self.study.stable]))
    return self.best < (stable + self.study.start) / 2

  def excess(self, losses: Array) -> float:
    """How far the median exceeds the best, in tolerances; at most 1 if it holds."""
    return float((np.median(losses) - self.best) / tolerance(self.best))

  def holds(self, losses: Array) -> bool:
    """Whether losses, one per seed, hold."""
    return self.excess(losses) <= 1

  def is_worse(self, losses: Array, than: Array) -> bool:
    """Whether one median exceeds another by more than the tolerance."""
    return bool(np.median(losses) - np.median(than) > tolerance(self.best))

  def seeds(self, losses: Array) -> int:
    """The number of seeds whose loss holds against the best threshold for the same seed, a harder test."""
    best = np.minimum(self.cell.sweep.min(axis=1), self.cell.rules[NO_CLIP])
    return int((losses <= best + tolerance(best)).sum())

  def good_range(self) -> tuple[float, float]:
    """The range of thresholds around the best of the sweep in which every median holds."""
    holds = [self.holds(losses) for losses in self.cell.sweep.T]
    low = high = int(np.median(self.cell.sweep, axis=0).argmin())
    while low > 0 and holds[low - 1]:
      low -= 1
    while high + 1 < len(holds) and holds[high + 1]:
      high += 1
    return float(self.study.thresholds[low]), float(self.study.thresholds[high])


def tolerance(best: Array | float) -> Array:
  """How far a loss may exceed the best."""
  return np.maximum(SHARE * np.abs(np.asarray(best)), NATS)


def cells_of(studies: Iterable[Study], factors: Sequence[int]) -> list[At]:
  """The cells in which some threshold trains."""
  return [at for study in studies for k in factors if (at := At(study, k)).trains]


def hopeless(studies: Iterable[Study], factors: Sequence[int]) -> list[At]:
  """The cells in which no threshold trains."""
  return [at for study in studies for k in factors if not (at := At(study, k)).trains]


def held(cells: Sequence[At], rule: str) -> int:
  """The number of cells in which a rule holds."""
  return sum(at.holds(at.cell.rules[rule]) for at in cells)


def anded(words: Sequence[str]) -> str:
  """A list in words, with "and" before the last item."""
  return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) if words else "none"
