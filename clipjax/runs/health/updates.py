"""Updates too large or too small for their parameters."""

from collections.abc import Iterator

import numpy as np

from clipjax.quantities import RATIO
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.roles import effect_names
from clipjax.runs.schema import UPDATES, key_of, names_with
from clipjax.runs.sources import CS231N_RATIO
from clipjax.runs.words import number


def update_ratio(view: View) -> Iterator[Finding]:
  """WARN for an update outside of the usual range with a loss that agrees, INFO without, or for single layers."""
  for name in names_with(view.run.columns, RATIO):
    if not name.startswith(UPDATES) or name in effect_names(view.run):
      continue
    ratios = view.column(key_of(name, RATIO))
    ratios = ratios[ratios > 0]  # 0 where parameters were not given, or nothing was updated.
    if not view.enough(ratios.size):
      continue
    # Parameters that begin at 0 are small at first.
    middle = float(np.median(ratios[ratios.size // 2 :]))
    if view.limits.ratio_low <= middle <= view.limits.ratio_high:
      yield from _layer_ratios(view, name)
      continue
    message = f"The median of {key_of(name, RATIO)!r}, norm of the update over norm of the parameters, is "
    message += f"{number(middle)} in the later half."
    is_high = middle > view.limits.ratio_high
    if _has_learned(view):
      yield Finding(
        "INFO", "update-ratio", f"{message} The loss fell all the same.", "", _rule(view), str(CS231N_RATIO)
      )
      continue
    advice = "Lower the learning rate." if is_high else "Raise the learning rate, or max_norm where the clip acts."
    yield Finding("WARN", "update-ratio", message, advice, _rule(view), str(CS231N_RATIO))


def _has_learned(view: View) -> bool:
  """Whether a loss was recorded, and fell."""
  course = None if view.loss is None else view.loss.course()
  return course is not None and course.fall > view.limits.learned * abs(course.first)


def _rule(view: View) -> str:
  return f"{view.limits.ratio_low:g} to {view.limits.ratio_high:g}, as around 1e-3 is usual in every set of parameters"


def _layer_ratios(view: View, name: str) -> Iterator[Finding]:
  """Of layers that are outside where the update as a whole is not."""
  low, high = view.limits.ratio_low, view.limits.ratio_high
  names, steps, values = view.blocks(name, RATIO)
  medians = medians_of(names, values[steps >= view.norms.begin])
  outside = {leaf: x for leaf, x in medians.items() if not low <= x <= high}
  if not outside:
    return
  worst = max(outside, key=lambda leaf: max(low / outside[leaf], outside[leaf] / high if high else np.inf))
  message = f"{len(outside)} of {len(medians)} layers have a median {key_of(name, RATIO)!r} outside, the farthest "
  message += f"{worst!r} with {number(outside[worst])}."
  advice = "Ratios of parameters that begin at 0, as biases do, are large at first; for others look at the learning "
  advice += "rate of the layer."
  leaves = tuple(outside)
  yield Finding("INFO", "update-ratio-by-layer", message, advice, _rule(view), str(CS231N_RATIO), leaves=leaves)
