"""The series of a run in which spikes are looked for, and their spikes."""

from typing import NamedTuple

import numpy as np

from clipjax.metric_names import NORM
from clipjax.runs.health.limits import HealthLimits
from clipjax.runs.health.spike_detectors import Kind, SpikeDetector
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import norms_of_run, unseen
from clipjax.runs.roles import Role, judged_states, keys_with, role_of
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of, name_of

# What counts as a spike, by role. Adam's updates vary several-fold, and a loss near 0 may triple.
KINDS: dict[Role, Kind] = {
  Role.NORM: Kind(ratio=5, jump=2),
  Role.UPDATE: Kind(ratio=8, jump=3),
  Role.PARAMETERS: Kind(ratio=3, jump=3),
  Role.LOSS: Kind(ratio=1.25, jump=1, share=0.1),
  Role.VALIDATION: Kind(ratio=1.25, jump=1, share=0.1),
}


class Series(NamedTuple):
  """A series of finite numbers: its key, its role, its steps and its values."""

  key: str
  role: Role
  steps: Ints
  values: Floats


class Spike(NamedTuple):
  """A value of a series far above those before it; `usual` is their median."""

  key: str
  step: int
  value: float
  usual: float


def series_of(run: Run) -> list[Series]:
  """Every series to search for spikes; equal ones, such as those of a watch and a clip, count once."""
  out: list[Series] = []
  states = judged_states(run)
  # A watch and the clip after it record the same norm: keep the first, or every spike would count twice.
  for key in [*(key_of(name, NORM) for name in states), *keys_with(run.columns, *KINDS)]:
    role = role_of(key) or Role.NORM
    if any(key == other.key for other in out) or role not in KINDS:
      continue
    series = _series(run, key, role)
    if not any(role == s.role and np.array_equal(series.values, s.values) for s in out):
      out.append(series)
  return out


def _series(run: Run, key: str, role: Role) -> Series:
  if role == Role.NORM:
    norms = norms_of_run(run, name_of(key), 0)
    return Series(key, role, norms.steps[norms.finite], norms.values[norms.finite])
  known = np.isfinite(run.columns[key])
  # A state inside `skip_steps` or MultiSteps did not see every step: such rows repeat an old number.
  if role in (Role.UPDATE, Role.PARAMETERS):
    known &= ~unseen(run, name_of(key))
  return Series(key, role, run.steps[known], run.columns[key][known])


def detector(role: Role, limits: HealthLimits) -> SpikeDetector:
  """A spike detector for a series of this role."""
  return SpikeDetector(limits.spike_sigma, limits.spike_window, KINDS[role])


def spikes_of(run: Run, limits: HealthLimits) -> list[Spike]:
  """The spikes of every series of a run."""
  out: list[Spike] = []
  for series in series_of(run):
    judged = detector(series.role, limits).feed(series.values)
    # Keep the usual value beside each spike: messages say how many times it was exceeded.
    at = np.flatnonzero(judged.is_spike)
    found = zip(series.steps[at].tolist(), series.values[at].tolist(), judged.usual[at].tolist(), strict=True)
    out += [Spike(series.key, *spike) for spike in found]
  return out
