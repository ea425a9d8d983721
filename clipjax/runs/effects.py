"""What `clip_effect` measured in a run: what a clip does to the step, whose leaves starve, and whether scale counts."""

from typing import NamedTuple

import numpy as np

from clipjax.quantities import COSINE, GRAD_RATIO, RATIO, SHARE
from clipjax.runs.blocks import numbers_by_block
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import column
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of, names_with

SAME = 0.05  # A ratio as near to 1 is that of a step which the clip leaves alone.
STARVED = 0.5  # A leaf that keeps less of its step is starved.
_LEAST_ROWS = 4  # With numbers by leaf.
_OFTEN = 0.1  # Part of the steps in which one leaf alone must have made the clip act.
_ROUNDING = 1e-3
_HALVED, _HALVED_ROWS = 0.5, 20  # Steps whose gradient is clipped to less, and how many show what comes of it.
_FREE = 0.25  # Of the logarithm of the factor: what is left of it in a step that divides the scale out.


class Effect(NamedTuple):
  """What a clip does to the step as a whole: medians, the share of steps that are changed, and how many there are."""

  ratio: float
  cosine: float
  changed: float
  rows: int


class Starved(NamedTuple):
  """Leaves that lose most of their step by another one.

  Attributes:
    leaves: their names, the one that keeps least first.
    kept: the part of its step that this one keeps, a mean.
    holder: the leaf that makes the clip act.
    share: its part of the squared norm of the gradient there, a median.
    among: the names of all leaves.
  """

  leaves: tuple[str, ...]
  kept: float
  holder: str
  share: float
  among: tuple[str, ...]


def effect_names(run: Run) -> list[str]:
  """The names of the states of `clip_effect`."""
  return names_with(run.columns, COSINE)


def effect_of(run: Run, name: str, begin: int) -> Effect | None:
  """What the clip of an effect does from the step `begin` on; None where nothing finite was recorded."""
  ratio, cosine = (column(run, key_of(name, quantity)) for quantity in (RATIO, COSINE))
  known = np.isfinite(ratio) & np.isfinite(cosine) & (run.steps >= begin)
  if not known.any():
    return None
  changed = float(np.mean(np.abs(ratio[known] - 1) > SAME))
  return Effect(float(np.median(ratio[known])), float(np.median(cosine[known])), changed, int(known.sum()))


def starved_of(run: Run, name: str, begin: int, least: float) -> Starved | None:
  """The leaves that keep less than `least` of their step because another one makes the clip act; None without any."""
  names, steps, ratios = numbers_by_block(run, name, RATIO)
  of_shares, at, shares = numbers_by_block(run, name, SHARE)
  late = (steps >= begin) & np.isfinite(ratios).all(1)
  if names != of_shares or not np.array_equal(steps, at) or late.sum() < _LEAST_ROWS:
    return None
  ratios, shares = ratios[late], shares[late]
  left = column(run, key_of(name, GRAD_RATIO))
  of_rows = left[np.searchsorted(run.steps, steps[late])]

  # The cause: without this leaf the norm would have been below the limit.
  holders = shares.argmax(1)
  alone = (of_rows < 1) & (np.sqrt(1 - np.minimum(shares.max(1), 1)) <= of_rows * (1 + _ROUNDING))
  if not alone.any():
    return None
  holder = int(np.bincount(holders[alone]).argmax())

  # What the others keep. Leaves are recorded at spikes more often than elsewhere: each step of the run counts as the
  # recorded one whose gradient was clipped most nearly as much.
  nearest = _nearest(of_rows, left[np.isfinite(left) & (run.steps >= begin)])
  kept = np.minimum(ratios, 1)[nearest].mean(0)
  leaves = [i for i in np.argsort(kept).tolist() if i != holder and kept[i] < least]
  if alone[nearest].mean() < _OFTEN or not leaves:
    return None
  share = float(np.median(shares[alone & (holders == holder), holder]))
  return Starved(tuple(names[i] for i in leaves), float(kept[leaves[0]]), names[holder], share, names)


def is_scale_free(run: Run) -> bool | None:
  """Whether the steps are as long though the gradient is clipped to less than half; None where too few steps tell."""
  for name in effect_names(run):
    ratio, left = (column(run, key_of(name, quantity)) for quantity in (RATIO, GRAD_RATIO))
    known = (ratio > 0) & (left > 0) & (left < _HALVED)
    if known.sum() >= _HALVED_ROWS:
      return bool(np.median(np.log(ratio[known]) / np.log(left[known])) < _FREE)
  return None


def _nearest(known: Floats, values: Floats) -> Ints:
  """For each value the place of the known number that is nearest to it."""
  order = np.argsort(known, kind="stable")
  above = np.searchsorted(known[order], values).clip(1, known.size - 1)
  low, high = known[order][above - 1], known[order][above]
  return order[np.where(values - low <= high - values, above - 1, above)]
