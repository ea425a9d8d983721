"""What `choosing.py` counts: which final losses hold, against what, and how often.

A cell is one model under one optimizer at one rate. Its best is the lowest median over the seeds, of all thresholds of
the sweep and of no clip. A rule holds where its own median is above that by no more than the tolerance.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from choosing_runs import NO_CLIP, Cell, Study
from small_models import Array

SHARE, NATS = 0.05, 0.05  # A loss holds where it is above the best by no more than this share, or so much.


class At(NamedTuple):
  """A cell, and where it is."""

  study: Study
  k: int

  @property
  def cell(self) -> Cell:
    """Its runs."""
    return self.study.cells[self.k]

  @property
  def best(self) -> float:
    """The lowest median."""
    return min(float(np.median(self.cell.sweep, axis=0).min()), float(np.median(self.cell.rules[NO_CLIP])))

  @property
  def best_at(self) -> float:
    """The threshold of the sweep that ends lowest."""
    return float(self.study.thresholds[np.median(self.cell.sweep, axis=0).argmin()])

  @property
  def trains(self) -> bool:
    """Whether with the best threshold the loss makes half of the fall that it makes at the stable rate."""
    stable = float(np.median(self.study.grid[:, self.study.stable]))
    return self.best < (stable + self.study.start) / 2

  def excess(self, losses: Array) -> float:
    """The median above the best, in tolerances; at most 1 where it holds."""
    return float((np.median(losses) - self.best) / tolerance(self.best))

  def holds(self, losses: Array) -> bool:
    """Whether losses, one a seed, hold."""
    return self.excess(losses) <= 1

  def is_worse(self, losses: Array, than: Array) -> bool:
    """Whether one median is above another by more than the tolerance of the best."""
    return bool(np.median(losses) - np.median(than) > tolerance(self.best))

  def seeds(self, losses: Array) -> int:
    """Seeds whose loss holds against the best threshold of the same seed, a harder test."""
    best = np.minimum(self.cell.sweep.min(axis=1), self.cell.rules[NO_CLIP])
    return int((losses <= best + tolerance(best)).sum())

  def good_range(self) -> tuple[float, float]:
    """The lowest and the highest threshold around the best of the sweep whose medians, without a gap, hold."""
    holds = [self.holds(losses) for losses in self.cell.sweep.T]
    low = high = int(np.median(self.cell.sweep, axis=0).argmin())
    while low > 0 and holds[low - 1]:
      low -= 1
    while high + 1 < len(holds) and holds[high + 1]:
      high += 1
    return float(self.study.thresholds[low]), float(self.study.thresholds[high])


def tolerance(best: Array | float) -> Array:
  """How far above the best a loss may be."""
  return np.maximum(SHARE * np.abs(np.asarray(best)), NATS)


def cells_of(studies: Iterable[Study], factors: Sequence[int]) -> list[At]:
  """The cells at some factors in which training is possible at all."""
  return [at for study in studies for k in factors if (at := At(study, k)).trains]


def hopeless(studies: Iterable[Study], factors: Sequence[int]) -> list[At]:
  """The other ones, in which no threshold trains."""
  return [at for study in studies for k in factors if not (at := At(study, k)).trains]


def held(cells: Sequence[At], rule: str) -> int:
  """In how many cells a rule holds."""
  return sum(at.holds(at.cell.rules[rule]) for at in cells)


def anded(words: Sequence[str]) -> str:
  """A list in words."""
  return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) if words else "none"
