"""What a run has by leaf or group."""

import numpy as np

from clipjax.quantities import SO_FAR
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import flag, unseen
from clipjax.runs.run import Run
from clipjax.runs.schema import UNITS, key_of


def blocks_of(run: Run, name: str, quantity: str) -> tuple[tuple[str, ...], Ints, Floats]:
  """What was recorded by leaf or group: names (L,), steps (m,) and values (m, L).

  inf stands for what was not finite, NaN for what was not recorded. Groups, up to 64 of them, are columns too, with
  a number at every step. Steps that passed the state by are left out.
  """
  start = f"{key_of(name, quantity)}/"
  keys = [key for key in run.columns if key.startswith(start)]
  labels = tuple(key.removeprefix(start) for key in keys)
  # A clip of other blocks than the watch of its name has, in the record, their unit at the end.
  by = next((f"{name}{unit}" for unit in UNITS if key_of(f"{name}{unit}", quantity) in run.vectors), None)
  if by is not None and (not keys or (by == name and set(labels) != set(run.leaves[by]))):
    labels = run.leaves[by]
    steps, values = run.vectors[key_of(by, quantity)]
  else:
    found = [np.where(flag(run, key), np.inf, run.columns[key]) for key in keys]
    steps, values = run.steps, np.stack(found, 1) if keys else np.zeros((len(run), 0))
  if quantity in SO_FAR or not (passed := unseen(run, name)).any():
    return labels, steps, values
  seen = ~passed[np.searchsorted(run.steps, steps)]
  return labels, steps[seen], values[seen]
