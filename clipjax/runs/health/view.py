"""What a check of `diagnose` is given: a `View` of a run.

A check is a function `View -> findings`. It yields nothing where what it needs was not recorded, or where there are too
few steps for its statistics.
"""

from typing import NamedTuple

import numpy as np

from clipjax.quantities import SO_FAR, STEPS
from clipjax.runs.health.detectors import SpikeDetector
from clipjax.runs.health.findings import HealthLimits
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import Norms, column, flag, main_name, norms_of_run, unseen
from clipjax.runs.run import Run
from clipjax.runs.schema import UNITS, key_of
from clipjax.runs.words import at_steps


class View(NamedTuple):
  """What a check looks at.

  Attributes:
    run: the run, or the last rows of one.
    name: the state that is judged, None where no norm was recorded.
    norms: its raw norms.
    limits: where findings begin.
    spike_detector: what has seen the rows before these, and is fed with these by `spikes`; None: `limits` say what a
      spike is, and nothing came before.
  """

  run: Run
  name: str | None
  norms: Norms
  limits: HealthLimits
  spike_detector: SpikeDetector | None = None

  def enough(self, count: int, parts: int = 1) -> bool:
    """Whether statistics of so many numbers, split into parts, say something."""
    return count >= max(self.limits.min_steps, parts)

  def column(self, key: str) -> Floats:
    """The finite values of a column after the warm-up; none where it was not recorded."""
    values = column(self.run, key)
    return values[np.isfinite(values) & (self.run.steps >= self.norms.begin)]

  def number(self, quantity: str) -> Floats:
    """The same of a quantity of the state that is judged."""
    return self.column(key_of(str(self.name), quantity))

  def last(self, name: str | None, quantity: str) -> float | None:
    """The last finite value of a counter of a state; None without any."""
    values = column(self.run, key_of(str(name), quantity))
    values = values[np.isfinite(values)]
    return float(values[-1]) if values.size else None

  def steps_taken(self, name: str | None) -> int:
    """How many steps a state has counted; the recorded ones where it does not say."""
    return max(self.norms.values.size, int(self.last(name, STEPS) or 0))

  def at(self, steps: Ints) -> str:
    """Some steps of the run in words, with their batches."""
    if self.run.batches is None:
      return at_steps(steps.tolist())
    return at_steps(steps.tolist(), self.run.batches[np.searchsorted(self.run.steps, steps)].tolist())

  def blocks(self, name: str, quantity: str) -> tuple[tuple[str, ...], Ints, Floats]:
    """What was recorded by leaf or group: names (L,), steps (m,) and values (m, L).

    inf stands for what was not finite, NaN for what was not recorded. Groups, up to 64 of them, are columns too, with
    a number at every step. Steps that passed the state by are left out.
    """
    start = f"{key_of(name, quantity)}/"
    keys = [key for key in self.run.columns if key.startswith(start)]
    labels = tuple(key.removeprefix(start) for key in keys)
    # A clip of other blocks than the watch of its name has, in the record, their unit at the end.
    by = next((f"{name}{unit}" for unit in UNITS if key_of(f"{name}{unit}", quantity) in self.run.vectors), None)
    if by is not None and (not keys or (by == name and set(labels) != set(self.run.leaves[by]))):
      labels = self.run.leaves[by]
      steps, values = self.run.vectors[key_of(by, quantity)]
    else:
      found = [np.where(flag(self.run, key), np.inf, self.run.columns[key]) for key in keys]
      steps, values = self.run.steps, np.stack(found, 1) if keys else np.zeros((len(self.run), 0))
    if quantity in SO_FAR or not (passed := unseen(self.run, name)).any():
      return labels, steps, values
    seen = ~passed[np.searchsorted(self.run.steps, steps)]
    return labels, steps[seen], values[seen]


def view_of(
  run: Run, limits: HealthLimits, warmup_steps: int | None, spike_detector: SpikeDetector | None = None
) -> View:
  """The view of a run in which its main state is judged."""
  name = main_name(run)
  return View(run, name, norms_of_run(run, name, warmup_steps), limits, spike_detector)
