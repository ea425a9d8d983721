"""What the file of a resumed run already holds, read from its two ends however long it is."""

import numpy as np

from clipjax.metric_names import NORM
from clipjax.runs.reading.read import first_step, read_run, tail
from clipjax.runs.record.rings import Norms
from clipjax.runs.record.rows import Before
from clipjax.runs.record.run_file import RunFile
from clipjax.runs.schema import UPDATE, key_of, names_with

_ROWS = 100  # Rows at the end; one of them is sure to tell whether there is an optimizer.


def before_in(file: RunFile) -> Before | None:
  """The first and last step of a file; None if it has no rows."""
  if not file.had_rows:
    return None
  try:
    end = tail(file.path, _ROWS)
  except ValueError:  # A torn header.
    return None
  if not len(end):
    return None
  last, first = int(end.steps[-1]), first_step(file.path)
  return Before(last if first is None else first, last, UPDATE in end.columns)


def norms_in(path: str, first: int, last: int) -> dict[int, Norms]:
  """The norms in a file from step `first` to `last`, by step."""
  try:
    # The steps are at the end, unless late rows were added there; only then read all of the file.
    run = tail(path, 2 * (last - first + 1))
    if not len(run) or run.steps[0] > first:
      run = read_run(path)
  except (OSError, ValueError):
    return {}
  inside = (run.steps >= first) & (run.steps <= last)
  out: dict[int, Norms] = {step: {} for step in run.steps[inside].tolist()}
  start = int(np.searchsorted(run.steps, first))
  for key in [key_of(name, NORM) for name in names_with(run.columns, NORM)]:
    known = np.isfinite(run.columns[key]) | run.flags.get(key, False)
    for i, norms in enumerate(out.values(), start):
      if known[i]:
        norms[key] = float(run.columns[key][i])
  return out
