"""`HealthLimits`, the thresholds at which the findings of `diagnose` begin, with their defaults."""

from typing import Any, NamedTuple

import numpy as np

from clipjax.runs.course import LEARNED, LOST
from clipjax.runs.effects import STARVED
from clipjax.runs.words import described


class HealthLimits(NamedTuple):
  """Where the findings of `diagnose` begin; the defaults are published rules if there are any.

  The other defaults were chosen on runs with known faults; docs/verdicts.md of the project shows how they do on others.

  Attributes:
    min_steps: how many finite norms after the warm-up statistics need.
    spike_sigma: how many deviations above the median a spike is; a deviation is 1.4826 median absolute deviations.
    spike_window: how many previous values that median covers.
    lost: share of its fall that a loss undoes by the end, for a FAIL.
    rising_loss: the same share for a WARN.
    learned: smallest fall of a loss, relative to its first value, that counts as learning.
    stopped: share of the run, at its end, in which nothing trains; 100 rows are enough, but for a learning rate of 0.
    clip_fraction: share of clipped steps; the tuning playbook calls more than 0.5 "extremely aggressive".
    clip_left: part of the gradient left in those steps; `clipped-often` needs both limits crossed.
    starved: smallest part of its step that a leaf keeps when another leaf triggers the clip.
    lengthened: largest median norm of the update, relative to its norm without the clip.
    rise: largest median norm at the end, relative to the smallest median before.
    ratio_low: smallest median ratio of update to parameters; CS231n asks for about 1e-3.
    ratio_high: largest such ratio.
    spread: largest median norm of a layer, relative to the smallest.
    norm_low: smallest median norm without an INFO; a hint that ignores model and loss. 0 switches it off.
    norm_high: largest median norm without an INFO; also a hint. inf switches it off.
    skip_fraction: share of rejected steps, for a WARN.
    skip_most: the same for a FAIL.
    zero_fraction: largest median share of zeros in the gradient.
    overfit: last validation loss over the best one, minus 1; Prechelt's criterion GL5.

  Example:
    >>> import clipjax
    >>> limits = clipjax.runs.HealthLimits(clip_fraction=0.9)
    >>> limits.clip_fraction, limits.spike_sigma
    (0.9, 6.0)

  References:
    Godbole et al., Deep Learning Tuning Playbook, 2023, https://github.com/google-research/tuning_playbook:
    `clip_fraction`.
    CS231n, ratio of updates to weights, https://cs231n.github.io/neural-networks-3/#ratio: `ratio_low` and
    `ratio_high`.
    Prechelt, Early stopping, but when?, 1998, https://doi.org/10.1007/3-540-49430-8_3: `overfit`.
  """

  min_steps: int = 20
  spike_sigma: float = 6.0
  spike_window: int = 64
  lost: float = LOST
  rising_loss: float = 0.1
  learned: float = LEARNED
  stopped: float = 0.05
  clip_fraction: float = 0.5
  clip_left: float = 0.05
  starved: float = STARVED
  lengthened: float = 1.2
  rise: float = 3.0
  ratio_low: float = 1e-4
  ratio_high: float = 1e-2
  spread: float = 300.0
  norm_low: float = 1e-5
  norm_high: float = 100.0
  skip_fraction: float = 0.05
  skip_most: float = 0.25
  zero_fraction: float = 0.5
  overfit: float = 0.05


# The smallest value of these fields, which are whole numbers; every other field is a number >= 0.
_LEAST = {"min_steps": 1, "spike_window": 8}
_NUMBER = int | float | np.integer | np.floating


def check_limits(limits: Any) -> None:
  """Raises unless `limits` is a `HealthLimits` with every field in its range.

  inf switches off a finding about a number that is too large.
  """
  if not isinstance(limits, HealthLimits):
    raise TypeError(
      f"`limits` must be a HealthLimits, got {described(limits)}: pass one such as HealthLimits(clip_fraction=0.9)."
    )
  for field, value in limits._asdict().items():
    low = _LEAST.get(field, 0)
    what, kind = ("a whole number", int | np.integer) if field in _LEAST else ("a number", _NUMBER)
    rule = f"`limits.{field}` must be {what} >= {low}"
    remedy = f"pass one such as {HealthLimits._field_defaults[field]}"
    if isinstance(value, bool) or not isinstance(value, kind):
      raise TypeError(f"{rule}, got {described(value)}: {remedy}.")
    if not value >= low:
      raise ValueError(f"{rule}, got {value}: {remedy}.")
