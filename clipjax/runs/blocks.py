"""What a run has by leaf or group, and which of these its clip acted on."""

from typing import NamedTuple

import numpy as np

from clipjax.quantities import NORM, SCALE, SO_FAR
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import flag, unseen
from clipjax.runs.run import Run
from clipjax.runs.schema import UNITS, key_of

LEAF, GROUP, EITHER = "leaf", "group", "leaf or group"
_COLUMNS = 64  # Of so many groups or fewer a Recorder makes columns: a clip without them is one by leaf.


class Blocks(NamedTuple):
  """Norms by leaf or group; m is the number of steps that have them.

  Attributes:
    labels: the names; none where nothing was recorded by leaf or group.
    steps: int64, shape (m,).
    norms: float64, shape (m, labels): inf where not finite, NaN where not recorded.
    clipped: what the clip acted on: "leaf", "group", "leaf or group" where the record does not say which, or "" for a
      global clip and for none.
  """

  labels: tuple[str, ...]
  steps: Ints
  norms: Floats
  clipped: str


def blocks_of(run: Run, name: str | None) -> Blocks:
  """The norms by leaf or group of the state `name`: of its clip, else of its watch."""
  bases = [f"{name}{unit}" for unit in UNITS]  # A clip of other blocks than the watch of its name has a unit there.
  for base in bases:
    start = f"{key_of(base, SCALE)}/"
    labels = tuple(key.removeprefix(start) for key in run.columns if key.startswith(start))
    if keys := [key for label in labels if (key := key_of(base, NORM, label)) in run.columns]:
      columns = [np.where(flag(run, key), np.inf, run.columns[key]) for key in keys]
      return Blocks(labels, run.steps, np.stack(columns, 1), GROUP)
  for base in bases:
    if key_of(base, SCALE) in run.vectors and key_of(base, NORM) in run.vectors:
      labels = run.leaves[base]
      unit = LEAF if run.path and len(labels) <= _COLUMNS else EITHER
      return Blocks(labels, *run.vectors[key_of(base, NORM)], unit)
  if (found := run.vectors.get(key_of(str(name), NORM))) is not None:
    return Blocks(run.leaves[str(name)], *found, "")
  return Blocks((), run.steps[:0], np.zeros((0, 0)), "")


def numbers_by_block(run: Run, name: str, quantity: str) -> tuple[tuple[str, ...], Ints, Floats]:
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
