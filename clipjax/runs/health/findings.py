"""What `diagnose` finds, a `Finding`, and where findings begin, `HealthLimits`."""

from typing import Any, NamedTuple

import numpy as np

from clipjax.runs.course import LEARNED, LOST
from clipjax.runs.effects import STARVED
from clipjax.runs.words import described


class Finding(NamedTuple):
  """One line of a `HealthReport`; every field is data, and the table, the page and the terminal are made of them.

  Attributes:
    level: "FAIL", "WARN" or "INFO".
    name: a short name in the same words each time, such as "clipped-often".
    message: what was found, with its numbers.
    advice: what to do next; empty where there is nothing to do.
    rule: the limit in words, as in "at most 50%"; empty where nothing is judged.
    source: where the rule comes from, title and address; empty for a limit of clipjax.
    steps: all the steps that it speaks of, as they were pushed; empty where it speaks of the whole run.
    leaves: the names of the leaves or groups that it speaks of.

  Example:
    >>> import clipjax
    >>> finding = clipjax.runs.Finding("WARN", "spikes", "1 norm was a spike, at step 7.", "Clip it.", steps=(7,))
    >>> print(f"{finding.level} {finding.name}: {finding.message} {finding.advice}")
    WARN spikes: 1 norm was a spike, at step 7. Clip it.
  """

  level: str
  name: str
  message: str
  advice: str = ""
  rule: str = ""
  source: str = ""
  steps: tuple[int, ...] = ()
  leaves: tuple[str, ...] = ()


class HealthLimits(NamedTuple):
  """Where the findings of `diagnose` begin; the defaults are published rules where there are any.

  The others were chosen on runs of known condition: docs/verdicts.md of the project says how they fare on others.

  Attributes:
    min_steps: finite norms after the warm-up that statistics need.
    spike_sigma: deviations, each 1.4826 median absolute deviations, above the median from which on a value is a spike.
    spike_window: over how many values before it.
    lost: share of what was learned that is lost at the end, for a FAIL.
    rising_loss: the same share for a WARN.
    learned: the fall of a loss, over its first value, below which nothing was learned.
    stopped: share of the run at its end in which nothing trains.
    clip_fraction: share of steps that are clipped; the tuning playbook calls more than 0.5 "extremely aggressive".
    clip_left: and the part of the gradient that is left there.
    starved: part of its step that a leaf keeps under a clip which another leaf makes act.
    lengthened: median norm of the update over its norm without the clip.
    rise: median norm at the end over the smallest one before.
    ratio_low: smallest median ratio of update to parameters; around 1e-3 is what CS231n asks for.
    ratio_high: largest such ratio.
    spread: largest median norm of a layer over the smallest.
    norm_low: median norm below which an INFO says so; a hint, which knows neither model nor loss. 0 for none.
    norm_high: median norm above which an INFO says so; a hint as well. inf for none.
    skip_fraction: share of steps that are rejected, for a WARN.
    skip_most: the same for a FAIL.
    zero_fraction: median share of zeros in the gradient.
    overfit: last validation loss over the best one, minus 1; Prechelt's criterion GL5.

  Example:
    >>> import clipjax
    >>> limits = clipjax.runs.HealthLimits(clip_fraction=0.9)
    >>> limits.clip_fraction, limits.spike_sigma
    (0.9, 6.0)
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


# The smallest value of a field; one that is not here may be 0.
_LEAST = {"min_steps": 1, "spike_window": 8}
_NUMBER = int | float | np.integer | np.floating


def check_limits(limits: Any) -> None:
  """Raises for what is no `HealthLimits`, or a field that is no number in its range; inf switches a finding off."""
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
