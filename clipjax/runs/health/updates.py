"""Updates that are too large or too small for their parameters: `update-ratio`, and `update-ratio-by-layer`."""

from collections.abc import Iterator

import numpy as np

from clipjax.metric_names import RATIO
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.roles import effect_names
from clipjax.runs.schema import UPDATES, key_of, names_with
from clipjax.runs.sources import CS231N_RATIO
from clipjax.runs.words import number


def update_ratio(view: View) -> Iterator[Finding]:
  """WARN for updates outside the usual range if the loss did not fall; INFO if it did, and for single layers."""
  for name in names_with(view.run.columns, RATIO):
    if not name.startswith(UPDATES) or name in effect_names(view.run):
      continue
    ratios = view.column(key_of(name, RATIO))
    ratios = ratios[ratios > 0]  # 0 if parameters were not given, or nothing was updated.
    if not view.enough(ratios.size):
      continue
    # Only the second half counts, since parameters that start at 0 are small at first.
    middle = float(np.median(ratios[ratios.size // 2 :]))
    if view.limits.ratio_low <= middle <= view.limits.ratio_high:
      yield from _layer_ratios(view, name)
      continue
    message = f"The median of {key_of(name, RATIO)!r} (update norm over parameter norm) is {number(middle)} in the "
    message += "second half."
    # A loss that fell outweighs a rule of thumb.
    is_high = middle > view.limits.ratio_high
    if _has_learned(view):
      yield Finding("INFO", "update-ratio", f"{message} The loss fell anyway.", "", _rule(view), str(CS231N_RATIO))
      continue
    advice = "Lower the learning rate." if is_high else "Raise the learning rate, or max_norm if the clip acts."
    yield Finding("WARN", "update-ratio", message, advice, _rule(view), str(CS231N_RATIO))


def _has_learned(view: View) -> bool:
  """Whether a loss was recorded, and fell."""
  course = None if view.loss is None else view.loss.course()
  return course is not None and course.fall > view.limits.learned * abs(course.first)


def _rule(view: View) -> str:
  return f"{view.limits.ratio_low:g} to {view.limits.ratio_high:g}; about 1e-3 is usual for every set of parameters"


def _layer_ratios(view: View, name: str) -> Iterator[Finding]:
  """INFO for layers outside the range while the update as a whole is inside."""
  low, high = view.limits.ratio_low, view.limits.ratio_high
  names, steps, values = view.blocks(name, RATIO)
  medians = medians_of(names, values[steps >= view.norms.begin])
  outside = {leaf: x for leaf, x in medians.items() if not low <= x <= high}
  if not outside:
    return
  # Distance is a factor, measured from the nearer limit.
  worst = max(outside, key=lambda leaf: max(low / outside[leaf], outside[leaf] / high if high else np.inf))
  message = f"{len(outside)} of {len(medians)} layers have a median {key_of(name, RATIO)!r} outside the range; the "
  message += f"farthest is {worst!r} at {number(outside[worst])}."
  advice = "Parameters that start at 0, such as biases, have large ratios at first; for others check the learning rate "
  advice += "of the layer."
  leaves = tuple(outside)
  yield Finding("INFO", "update-ratio-by-layer", message, advice, _rule(view), str(CS231N_RATIO), leaves=leaves)
