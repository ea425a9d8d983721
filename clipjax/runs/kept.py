"""What a clip leaves of the step of each leaf, on average over the steps of a run.

Leaves are recorded once in some steps, and at every spike. A mean over these rows would say too much of the spikes, so
each step of the run counts as the recorded one whose gradient was clipped most nearly as much.
"""

import numpy as np

from clipjax.runs.kinds import Floats


def mean_kept(ratios: Floats, of_rows: Floats, everywhere: Floats) -> Floats:
  """The part of its step that each leaf keeps, shape (L,); NaN for a leaf without a finite ratio.

  A longer step counts as a whole one: it makes up for no shorter one at another time.

  Args:
    ratios: shape (m, L): of each leaf, at the steps at which these were recorded.
    of_rows: shape (m,): how much of the gradient the clip left at these steps, NaN where it is not known.
    everywhere: shape (n,): the same of all steps that count, NaN likewise.
  """
  kept = np.where(np.isfinite(ratios), np.minimum(ratios, 1), np.nan)
  known, everywhere = np.isfinite(of_rows), everywhere[np.isfinite(everywhere)]
  if not known.any() or not everywhere.size:
    return _means(kept, np.ones(len(kept)))
  levels, level, count = np.unique(of_rows[known], return_inverse=True, return_counts=True)
  weight = np.bincount(_nearest(levels, everywhere), minlength=levels.size) / count
  return _means(kept[known], weight[level])


def _nearest(levels: Floats, values: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
  """The place of the level that is nearest to each value; levels ascend, each once."""
  return np.searchsorted((levels[1:] + levels[:-1]) / 2, values).astype(np.int64)


def _means(values: Floats, weights: Floats) -> Floats:
  """The weighted mean of each column over its finite numbers, NaN where these have no weight."""
  known = np.isfinite(values)
  total = weights @ known
  return np.where(total > 0, (weights @ np.where(known, values, 0)) / np.where(total > 0, total, 1), np.nan)
