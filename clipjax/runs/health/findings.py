"""What a check of `diagnose` takes and gives: a `View` of the run, and findings."""

from typing import NamedTuple

import numpy as np

from clipjax.runs.norms import Norms
from clipjax.runs.run import Floats, Ints, Run
from clipjax.runs.words import described


class Finding(NamedTuple):
  """One line of a `HealthReport`.

  Attributes:
    level: "FAIL", "WARN" or "INFO".
    name: a short name in the same words each time, such as "clipped-often".
    message: the number, the rule with its limit, and where the rule comes from.
    advice: what to do next; empty where there is nothing to do.

  Example:
    >>> import clipjax
    >>> finding = clipjax.runs.Finding("WARN", "clipped-often", "90% of 40 steps were clipped.", "Raise max_norm.")
    >>> print(f"{finding.level} {finding.name}: {finding.message} {finding.advice}")
    WARN clipped-often: 90% of 40 steps were clipped. Raise max_norm.
  """

  level: str
  name: str
  message: str
  advice: str


class HealthLimits(NamedTuple):
  """Where the findings of `diagnose` begin; the defaults are published rules where there are any.

  Attributes:
    min_steps: finite norms after the warm-up that statistics need.
    clip_fraction: share of steps that are clipped; the tuning playbook calls more than 0.5 "extremely aggressive".
    spike_sigma: standard deviations above the mean from which on a norm is a spike; OLMo-core's rule.
    spike_window: over how many norms before it; OLMo-core's rule.
    rise: median norm, and median loss, of the last quarter over an earlier one; of this package.
    ratio_low: smallest median ratio of update to parameters; around 1e-3 is what CS231n asks for.
    ratio_high: largest such ratio.
    spread: largest median norm of a layer over the smallest; of this package.
    norm_low: median norm below which an INFO says so; a hint, which knows neither model nor loss. 0 for none.
    norm_high: median norm above which an INFO says so; a hint as well. inf for none.
    skip_fraction: share of steps that are rejected; of this package.
    zero_fraction: median share of zeros in the gradient; of this package.
    overfit: last validation loss over the best one, minus 1; Prechelt's criterion GL5.

  Example:
    >>> import clipjax
    >>> limits = clipjax.runs.HealthLimits(clip_fraction=0.9)
    >>> limits.clip_fraction, limits.spike_sigma
    (0.9, 6.0)
  """

  min_steps: int = 20
  clip_fraction: float = 0.5
  spike_sigma: float = 6.0
  spike_window: int = 128
  rise: float = 2.0
  ratio_low: float = 1e-4
  ratio_high: float = 1e-2
  spread: float = 1e3
  norm_low: float = 1e-5
  norm_high: float = 100.0
  skip_fraction: float = 0.05
  zero_fraction: float = 0.5
  overfit: float = 0.05


# The smallest value of a field; one that is not here may be 0.
_LEAST = {"min_steps": 1, "spike_window": 2}
_NUMBER = int | float | np.integer | np.floating


def check_limits(limits: HealthLimits) -> None:
  """Raises for a field that is no number in its range; inf switches a finding off."""
  for field, value in limits._asdict().items():
    low = _LEAST.get(field, 0)
    what, kind = ("a whole number", int | np.integer) if field in _LEAST else ("a number", _NUMBER)
    rule = f"`limits.{field}` must be {what} >= {low}"
    remedy = f"pass one such as {HealthLimits._field_defaults[field]}"
    if isinstance(value, bool) or not isinstance(value, kind):
      raise TypeError(f"{rule}, got {described(value)}: {remedy}.")
    if not value >= low:
      raise ValueError(f"{rule}, got {value}: {remedy}.")


class View(NamedTuple):
  """What a check looks at.

  Attributes:
    run: the run.
    name: the state that is judged, None where no norm was recorded.
    norms: its raw norms.
    limits: where findings begin.
  """

  run: Run
  name: str | None
  norms: Norms
  limits: HealthLimits

  def enough(self, count: int, parts: int = 1) -> bool:
    """Whether statistics of so many numbers, split into parts, say something."""
    return count >= max(self.limits.min_steps, parts)

  def column(self, key: str) -> Floats:
    """The finite values of a column after the warm-up; none where it was not recorded."""
    values = self.run.columns.get(key, np.zeros(0))
    if not values.size:
      return values
    return values[np.isfinite(values) & (self.run.steps >= self.norms.begin)]

  def last(self, key: str) -> float | None:
    """The last finite value of a column, as of a counter; None without any."""
    values = self.run.columns.get(key, np.zeros(0))
    values = values[np.isfinite(values)]
    return float(values[-1]) if values.size else None

  def steps_taken(self, name: str | None = None) -> int:
    """How many steps a state has counted; the recorded ones where it does not say."""
    return max(self.norms.values.size, int(self.last(f"{name or self.name}/steps") or 0))

  def blocks(self, name: str, quantity: str) -> tuple[tuple[str, ...], Ints, Floats]:
    """What was recorded by leaf or group: names (L,), steps (m,) and values (m, L).

    Values are inf where they were not finite, NaN where none was recorded.
    Groups are columns too, with a number at every step, and NaN where there is none, up to 64 of them.
    """
    key = f"{name}/{quantity}"
    keys = [other for other in self.run.columns if other.startswith(f"{key}/")]
    labels = tuple(other.removeprefix(f"{key}/") for other in keys)
    # A clip of other blocks than the watch of its name has, in the record, their unit at the end.
    names = (by for by in (name, f"{name}_group", f"{name}_leaf") if f"{by}/{quantity}" in self.run.vectors)
    by = next(names, None)
    if by is not None and (not keys or (by == name and set(labels) != set(self.run.leaves[by]))):
      steps, values = self.run.vectors[f"{by}/{quantity}"]
      return self.run.leaves[by], steps, values
    columns = [np.where(self.run.flags.get(k, False), np.inf, self.run.columns[k]) for k in keys]
    return labels, self.run.steps, np.stack(columns, 1) if keys else np.zeros((len(self.run.steps), 0))
