"""The part of its step that a clip leaves to each leaf, averaged over the steps of a run.

Leaves are recorded once in several steps, and at every spike. A plain mean over these rows would overweight the spikes.
Instead, each step of the run counts as the recorded step whose gradient was clipped by the most similar amount.
"""

import numpy as np

from clipjax.runs.kinds import Floats


def mean_kept(ratios: Floats, of_rows: Floats, everywhere: Floats) -> Floats:
  """The part of its step that each leaf keeps, shape (L,); NaN for a leaf without a finite ratio.

  A longer step counts as a whole one: it does not make up for a shorter step at another time.

  Args:
    ratios: shape (m, L): the ratio of each leaf at the m recorded steps.
    of_rows: shape (m,): the part of the gradient that the clip left at these steps, NaN where unknown.
    everywhere: shape (n,): the same for all steps that count, NaN where unknown.
  """
  kept = np.where(np.isfinite(ratios), np.minimum(ratios, 1), np.nan)
  known, everywhere = np.isfinite(of_rows), everywhere[np.isfinite(everywhere)]
  if not known.any() or not everywhere.size:
    return _means(kept, np.ones(len(kept)))
  # Each step of the run votes for the recorded level of clipping nearest to its own.
  levels, level, count = np.unique(of_rows[known], return_inverse=True, return_counts=True)
  weight = np.bincount(_nearest(levels, everywhere), minlength=levels.size) / count
  return _means(kept[known], weight[level])


def _nearest(levels: Floats, values: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
  """The index of the level nearest to each value; levels are ascending and unique."""
  return np.searchsorted((levels[1:] + levels[:-1]) / 2, values).astype(np.int64)


def _means(values: Floats, weights: Floats) -> Floats:
  """The weighted mean of each column over its finite numbers, NaN if these have no weight."""
  known = np.isfinite(values)
  total = weights @ known
  return np.where(total > 0, (weights @ np.where(known, values, 0)) / np.where(total > 0, total, 1), np.nan)
