"""The numbers that a run has by leaf or group, and which blocks its clip acted on."""

from typing import NamedTuple

import numpy as np

from clipjax.metric_names import NORM, SCALE, SO_FAR
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import flag, unseen
from clipjax.runs.run import Run
from clipjax.runs.schema import UNITS, key_of

LEAF, GROUP, EITHER = "leaf", "group", "leaf or group"
_COLUMNS = 64  # A Recorder makes columns for up to this many groups; a clip without such columns is by leaf.


class Blocks(NamedTuple):
  """Norms by leaf or group; m is the number of steps with such norms.

  Attributes:
    labels: the names; empty if nothing was recorded by leaf or group.
    steps: int64, shape (m,).
    norms: float64, shape (m, labels): inf for a nonfinite norm, NaN where nothing was recorded.
    clipped: the blocks the clip acted on: "leaf", "group", "leaf or group" if the record does not tell which, or "" for
      a global clip or no clip.
  """

  labels: tuple[str, ...]
  steps: Ints
  norms: Floats
  clipped: str


def blocks_of(run: Run, name: str | None) -> Blocks:
  """The norms by leaf or group of the state `name`: from its clip, else from its watch."""
  bases = [f"{name}{unit}" for unit in UNITS]  # A clip whose blocks differ from the watch of its name has a unit here.
  # Few groups: the clip has a column per group.
  for base in bases:
    start = f"{key_of(base, SCALE)}/"
    labels = tuple(key.removeprefix(start) for key in run.columns if key.startswith(start))
    if keys := [key for label in labels if (key := key_of(base, NORM, label)) in run.columns]:
      columns = [np.where(flag(run, key), np.inf, run.columns[key]) for key in keys]
      return Blocks(labels, run.steps, np.stack(columns, 1), GROUP)
  # Leaves, or many groups: the clip has vectors.
  for base in bases:
    if key_of(base, SCALE) in run.vectors and key_of(base, NORM) in run.vectors:
      labels = run.leaves[base]
      unit = LEAF if run.path and len(labels) <= _COLUMNS else EITHER
      return Blocks(labels, *run.vectors[key_of(base, NORM)], unit)
  if (found := run.vectors.get(key_of(str(name), NORM))) is not None:
    return Blocks(run.leaves[str(name)], *found, "")
  return Blocks((), run.steps[:0], np.zeros((0, 0)), "")


def numbers_by_block(run: Run, name: str, quantity: str) -> tuple[tuple[str, ...], Ints, Floats]:
  """The recorded numbers by leaf or group: names (L,), steps (m,) and values (m, L).

  inf stands for a nonfinite number, NaN for one that was not recorded. Up to 64 groups are columns too, with a number
  at every step. Steps that the state did not see are left out.
  """
  start = f"{key_of(name, quantity)}/"
  keys = [key for key in run.columns if key.startswith(start)]
  labels = tuple(key.removeprefix(start) for key in keys)
  # A clip whose blocks differ from the watch of its name is recorded with their unit at the end of its name.
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
