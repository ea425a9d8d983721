"""What a file has already, where a run is resumed."""

import numpy as np

from clipjax.quantities import NORM
from clipjax.runs.rings import Norms
from clipjax.runs.rows import Before
from clipjax.runs.run import read_run
from clipjax.runs.run_file import RunFile
from clipjax.runs.schema import UPDATE, key_of, names_with


def before_in(file: RunFile) -> Before | None:
  """The steps of a file that has rows; None where there are none."""
  if not file.had_rows:
    return None
  try:
    run = read_run(file.path)
  except (OSError, ValueError):  # Torn in its header.
    return None
  if not len(run):
    return None
  return Before(int(run.steps[0]), int(run.steps[-1]), len(run), UPDATE in run.columns)


def norms_in(path: str, first: int, last: int) -> dict[int, Norms]:
  """The norms that a file has from the step `first` to `last`, by step."""
  try:
    run = read_run(path)
  except (OSError, ValueError):
    return {}
  out: dict[int, Norms] = {int(step): {} for step in run.steps[(run.steps >= first) & (run.steps <= last)]}
  start = int(np.searchsorted(run.steps, first))
  for key in [key_of(name, NORM) for name in names_with(run.columns, NORM)]:
    known = np.isfinite(run.columns[key]) | run.flags.get(key, False)
    for i, norms in enumerate(out.values(), start):
      if known[i]:
        norms[key] = float(run.columns[key][i])
  return out
