"""The size of the norm and how it develops: `rising-norm`, `norms` and `norm-scale`."""

from collections.abc import Iterator

import numpy as np

from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View
from clipjax.runs.sources import OLMO_2
from clipjax.runs.words import number

_PARTS = 8  # The medians of this many parts of the run are compared.
_STEADY = 0.7  # A rise is steady if this share of the parts lies above the one before.


def rising_norm(view: View) -> Iterator[Finding]:
  """WARN for a norm that rose steadily and ends far above an earlier part of the run."""
  kept = view.norms.judged & ~view.norms.rejected
  typical = view.norms.values[kept]
  if not view.enough(typical.size, parts=_PARTS):
    return
  # Medians of eighths hide spikes; the rise counts from the lowest of them.
  medians = [float(np.median(part)) for part in np.array_split(typical, _PARTS)]
  low = int(np.argmin(medians))
  last = medians[-1]
  rises = np.diff(medians[low:]) > 0
  if last <= view.limits.rise * medians[low] or rises.mean() < _STEADY:
    return
  growth = f"by a factor of {number(last / medians[low])}" if medians[low] > 0 else "from 0"
  step = int(np.array_split(view.norms.steps[kept], _PARTS)[low][0])
  message = f"The norm{view.of} rose {growth}: its median was {number(medians[low])} in the eighth of the run from "
  message += f"step {step} on, and {number(last)} in the last eighth."
  rule = f"at most a factor of {view.limits.rise:g}, a clipjax limit; in OLMo-0424 a slowly growing norm came with "
  rule += "more and more spikes"
  advice = "Look at the loss and at the layer that grows; lower or decay the learning rate."
  yield Finding("WARN", "rising-norm", message, advice, rule, str(OLMO_2))


def norm_percentiles(view: View) -> Iterator[Finding]:
  """INFO: the percentiles of the norm."""
  typical = view.norms.typical
  if not typical.size:
    return
  percentiles = np.percentile(typical, [50, 90, 99])
  p50, p90, p99 = (number(float(p)) for p in percentiles)
  message = f"p50 {p50}, p90 {p90}, p99 {p99}, largest {number(float(typical.max()))}, over {typical.size} finite "
  message += f"norms after the {view.norms.warmup_steps}-step warm-up."
  advice = ""
  if percentiles[1] > 0:
    advice = "clipjax.runs.suggest_max_norm derives a threshold from the steps in which the run learned."
  yield Finding("INFO", "norms", message, advice)


def norm_scale(view: View) -> Iterator[Finding]:
  """INFO for norms that are unusually large or small."""
  typical = view.norms.typical
  if not view.enough(typical.size):
    return
  middle, low, high = float(np.median(typical)), view.limits.norm_low, view.limits.norm_high
  if low <= middle <= high:
    return
  message = f"The median norm is {number(middle)}, {f'above {high:g}' if middle > high else f'below {low:g}'}."
  rule = f"{low:g} to {high:g}, only a clipjax hint: the norm grows with the model and the scale of the loss"
  yield Finding("INFO", "norm-scale", message, "Not a defect by itself: compare it with a run that trains.", rule)
