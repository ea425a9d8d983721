"""What `clip_effect` measured in a run: how a clip changes the step, which leaves starve, and whether scale matters."""

from typing import NamedTuple

import numpy as np

from clipjax.metric_names import COSINE, GRAD_RATIO, RATIO, SHARE
from clipjax.runs.blocks import numbers_by_block
from clipjax.runs.kept_steps import mean_kept
from clipjax.runs.norms import column
from clipjax.runs.roles import effect_names
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of

SAME = 0.05  # A clip with a ratio this close to 1 leaves the step alone.
# A leaf that keeps less than this part of its step is starved by another leaf if, without that leaf, the clip would
# leave at least the same part of the gradient, and at least twice what it leaves now.
STARVED, _TIMES = 0.5, 2.0
_LEAST_ROWS = 4  # Starving takes at least this many rows with numbers by leaf.
# Scale is judged by the steps whose gradient is clipped to less than this part, if there are this many of them.
_HALVED, _HALVED_ROWS = 0.5, 20
_FREE = 0.25  # The step is scale-free if less than this part of the factor, in logarithms, is left in its length.


class Effect(NamedTuple):
  """What a clip does to the whole step: median ratio and cosine, the share of changed steps, and how many steps."""

  ratio: float
  cosine: float
  changed: float
  rows: int


class Starved(NamedTuple):
  """Leaves that lose most of their step because of another leaf.

  Attributes:
    leaves: their names, starting with the leaf that keeps least.
    kept: the mean part of its step that this first leaf keeps.
    holder: the leaf that triggers the clip.
    left: the mean part of the gradient that the clip leaves.
    without: the mean part of the other leaves that it would leave without the holder.
    among: the names of all leaves.
  """

  leaves: tuple[str, ...]
  kept: float
  holder: str
  left: float
  without: float
  among: tuple[str, ...]


def effect_of(run: Run, name: str, begin: int) -> Effect | None:
  """What the clip of an effect does from step `begin` on; None if nothing finite was recorded."""
  ratio, cosine = (column(run, key_of(name, quantity)) for quantity in (RATIO, COSINE))
  known = np.isfinite(ratio) & np.isfinite(cosine) & (run.steps >= begin)
  if not known.any():
    return None
  changed = float(np.mean(np.abs(ratio[known] - 1) > SAME))
  return Effect(float(np.median(ratio[known])), float(np.median(cosine[known])), changed, int(known.sum()))


def starved_of(run: Run, name: str, begin: int, least: float) -> Starved | None:
  """The leaves that keep less than `least` of their step because another leaf triggers the clip; None if none do."""
  # The rows with finite ratios and shares of every leaf; the clip must act in one of them.
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

  # The cause: the leaf that most often holds the norm, and what the clip would leave of the other leaves without it.
  holder = int(np.bincount(shares.argmax(1)[acts]).argmax())
  others = np.sqrt(np.maximum(1 - shares[:, holder], 0))
  without = np.divide(of_rows, others, out=np.ones_like(of_rows), where=of_rows < others)

  # The victims. `mean_kept` weights the rows with leaves to represent all steps, since spikes are overrepresented.
  everywhere = left[np.isfinite(left) & (run.steps >= begin)]
  kept, [mean_without] = (mean_kept(x, of_rows, everywhere) for x in (ratios, without[:, None]))
  leaves = [i for i in np.argsort(kept).tolist() if i != holder and kept[i] < least]
  means = float(everywhere.mean()), float(mean_without)
  if not leaves or means[1] < max(least, _TIMES * means[0]):
    return None
  return Starved(tuple(names[i] for i in leaves), float(kept[leaves[0]]), names[holder], *means, names)


def is_scale_free(run: Run) -> bool | None:
  """Whether steps keep their length when the gradient is clipped to less than half; None if too few steps show it."""
  for name in effect_names(run):
    ratio, left = (column(run, key_of(name, quantity)) for quantity in (RATIO, GRAD_RATIO))
    known = (ratio > 0) & (left > 0) & (left < _HALVED)
    if known.sum() >= _HALVED_ROWS:
      return bool(np.median(np.log(ratio[known]) / np.log(left[known])) < _FREE)
  return None
