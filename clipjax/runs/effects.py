"""What `clip_effect` measured in a run: what a clip does to the step, whose leaves starve, and whether scale counts."""

from typing import NamedTuple

import numpy as np

from clipjax.quantities import COSINE, GRAD_RATIO, RATIO, SHARE
from clipjax.runs.blocks import numbers_by_block
from clipjax.runs.kept import mean_kept
from clipjax.runs.norms import column
from clipjax.runs.roles import effect_names
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of

SAME = 0.05  # A ratio as near to 1 is that of a step which the clip leaves alone.
# A leaf that keeps less of its step is starved by another one, if without that one the clip would leave at least as
# much of the gradient, and twice as much as it does.
STARVED, _TIMES = 0.5, 2.0
_LEAST_ROWS = 4  # With numbers by leaf.
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
    left: what the clip leaves of the gradient, a mean, and
    without: what it would leave of the other leaves without this one.
    among: the names of all leaves.
  """

  leaves: tuple[str, ...]
  kept: float
  holder: str
  left: float
  without: float
  among: tuple[str, ...]


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
  if not names or names != of_shares or not np.array_equal(steps, at) or late.sum() < _LEAST_ROWS:
    return None
  ratios, shares = ratios[late], shares[late]
  left = column(run, key_of(name, GRAD_RATIO))
  of_rows = left[np.searchsorted(run.steps, steps[late])]
  if not (acts := of_rows < 1).any():
    return None

  # The cause: the leaf that most often holds the norm, and what the clip would leave of the others without it.
  holder = int(np.bincount(shares.argmax(1)[acts]).argmax())
  others = np.sqrt(np.maximum(1 - shares[:, holder], 0))
  without = np.divide(of_rows, others, out=np.ones_like(of_rows), where=of_rows < others)

  everywhere = left[np.isfinite(left) & (run.steps >= begin)]
  kept, [mean_without] = (mean_kept(x, of_rows, everywhere) for x in (ratios, without[:, None]))
  leaves = [i for i in np.argsort(kept).tolist() if i != holder and kept[i] < least]
  means = float(everywhere.mean()), float(mean_without)
  if not leaves or means[1] < max(least, _TIMES * means[0]):
    return None
  return Starved(tuple(names[i] for i in leaves), float(kept[leaves[0]]), names[holder], *means, names)


def is_scale_free(run: Run) -> bool | None:
  """Whether the steps are as long though the gradient is clipped to less than half; None where too few steps tell."""
  for name in effect_names(run):
    ratio, left = (column(run, key_of(name, quantity)) for quantity in (RATIO, GRAD_RATIO))
    known = (ratio > 0) & (left > 0) & (left < _HALVED)
    if known.sum() >= _HALVED_ROWS:
      return bool(np.median(np.log(ratio[known]) / np.log(left[known])) < _FREE)
  return None
