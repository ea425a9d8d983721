"""The norms of a run as the verdict uses them: raw norms, with nonfinite ones and the warm-up marked.

One state of a run is judged, `main_name`: "grad" if there is one. Its norms are taken before any clip. If `skip_steps`
rejected a step, the clip inside never saw it, and the norm that `skip_steps` saw takes its place.
"""

from typing import Any, NamedTuple

import numpy as np

from clipjax.metric_names import CONSECUTIVE, MAX_NORM, NORM, SCALE, STEPS
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.run import Run
from clipjax.runs.schema import GRAD, SKIP, key_of, names_with
from clipjax.runs.words import described

WARMUP_SHARE, WARMUP_MOST = 10, 100  # The default warm-up is a tenth of the rows, at most 100.
FEW = 20  # Percentiles of fewer norms say little: p90 would rest on two norms.


class Norms(NamedTuple):
  """Norms in step order; n is how many were recorded.

  Attributes:
    steps: int64, shape (n,): their steps.
    values: float64, shape (n,): inf or NaN for a nonfinite norm.
    rejected: bool, shape (n,): whether `skip_steps` rejected the step.
    warmup_steps: the length of the warm-up, in steps from the first recorded one.
    begin: the first step after the warm-up.
  """

  steps: Ints
  values: Floats
  rejected: Bools
  warmup_steps: int
  begin: int

  @property
  def finite(self) -> Bools:
    """Whether each norm is finite."""
    return np.isfinite(self.values)

  @property
  def judged(self) -> Bools:
    """Whether each norm is finite and lies after the warm-up."""
    return self.finite & (self.steps >= self.begin)

  @property
  def typical(self) -> Floats:
    """The finite norms after the warm-up."""
    return self.values[self.judged]


def main_name(run: Run) -> str | None:
  """The state that is judged: "grad" if it has a norm, else the first with one, "skip" last; None without norms."""
  names = names_with(run.columns, NORM)
  return next((name for name in [GRAD, *sorted(names, key=lambda name: name == SKIP)] if name in names), None)


def norms_of_run(run: Run, name: str | None, warmup_steps: int | None) -> Norms:
  """The raw norms of the state `name`, empty for None. `warmup_steps=None` means the default warm-up."""
  warmup, begin = _warmup(run.steps, warmup_steps)
  if name is None:
    return Norms(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.bool_), warmup, begin)
  skipped = rejected(run)
  values = np.where(unseen(run, name), np.nan, _flagged(run, key_of(name, NORM)))
  if (key := key_of(SKIP, NORM)) in run.columns and name != SKIP:
    # A step without a norm that was not rejected is a micro-batch, as in optax.MultiSteps.
    values = np.where(np.isnan(values) & skipped, _flagged(run, key), values)
  known = ~np.isnan(values)
  return Norms(run.steps[known], values[known], skipped[known], warmup, begin)


def rejected(run: Run) -> Bools:
  """Whether `skip_steps` rejected each step."""
  return column(run, key_of(SKIP, CONSECUTIVE)) > 0


def unseen(run: Run, name: str) -> Bools:
  """Whether the state `name` did not see each step, as a clip inside `skip_steps` does not see a rejected step.

  A row of format 1 then repeats the numbers of the step before: the state's count of steps does not change.
  """
  count = run.columns.get(key_of(name, STEPS))
  if count is None:
    return np.zeros(len(run.steps), np.bool_)
  return np.append(count[:1] == 0, count[1:] == count[:-1])


def acted(run: Run, name: str | None, norms: Norms) -> Bools:
  """Whether the clip acted on each norm.

  A norm from the history of a watch has no scale. Its row stands before the push that brought it, so it is compared
  with the limit of the next row that has one.
  """
  scale, limit = (run.columns.get(key_of(str(name), quantity)) for quantity in (SCALE, MAX_NORM))
  if scale is None or limit is None or not (known := np.flatnonzero(np.isfinite(scale))).size:
    return np.zeros(norms.steps.shape, np.bool_)
  rows = np.searchsorted(run.steps, norms.steps)
  nearest = known[np.minimum(np.searchsorted(known, rows), known.size - 1)]
  return np.where(nearest == rows, scale[rows] < 1, norms.finite & (norms.values > limit[nearest]))


def norms_of_array(norms: Any, warmup_steps: int | None) -> Norms:
  """The norms in a list or array, one per step.

  Raises:
    TypeError: if they are not real numbers.
    ValueError: if they are empty, not 1-D, or negative.
  """
  try:
    array = np.asarray(norms)
  except (ValueError, TypeError):  # Lists of different lengths, or a traced array.
    array = np.asarray(None)
  # The 16-bit and 8-bit floats that JAX adds to numpy have kind "V".
  if array.dtype.kind not in "fiu" and not (array.dtype.kind == "V" and "float" in array.dtype.name):
    raise TypeError(
      f"`norms_or_run` must be a Run or a 1-D array of norms, got {described(norms)}: pass "
      "clipjax.runs.read_run(path) or a list of numbers."
    )
  values: Floats = array.astype(np.float64)
  if values.ndim != 1 or values.size == 0:
    raise ValueError(
      f"`norms_or_run` must be a Run or a 1-D array of norms, got shape {values.shape}: pass the norm of each step."
    )
  if (negative := values < 0).any():
    first = int(np.argmax(negative))
    raise ValueError(
      f"`norms_or_run` must be norms, which are >= 0, got {values[first]:g} at index {first}: pass norms, not their "
      "logarithms."
    )
  steps = np.arange(values.size)
  return Norms(steps, values, np.zeros(values.size, np.bool_), *_warmup(steps, warmup_steps))


def _warmup(steps: Ints, warmup_steps: int | None) -> tuple[int, int]:
  """The length of the warm-up in steps, by default a tenth of the rows, and the first step after it."""
  if not steps.size:
    return warmup_steps or 0, 0
  first = int(steps[0])
  if warmup_steps is None:
    begin = default_warmup(steps)
    return begin - first, begin
  return int(warmup_steps), first + int(warmup_steps)


def default_warmup(steps: Ints) -> int:
  """The first step after the default warm-up: a tenth of the rows, at most 100."""
  # Rows, not steps: steps may count examples, or one in a hundred may be pushed.
  return int(steps[min(steps.size // WARMUP_SHARE, WARMUP_MOST)])


def check_warmup(warmup_steps: Any) -> None:
  """Raises unless `warmup_steps` is None or a whole number >= 0."""
  if warmup_steps is None:
    return
  if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int | np.integer):
    raise TypeError(
      f"`warmup_steps` must be a whole number or None, got {described(warmup_steps)}: pass how many steps to leave out."
    )
  if warmup_steps < 0:
    raise ValueError(f"`warmup_steps` must be >= 0, got {warmup_steps}: pass 0 to leave out no steps.")


def mean(values: Floats) -> float:
  """The mean of nonnegative numbers; their sum may exceed the largest float64."""
  largest = float(values.max(initial=0.0))
  return largest * float(np.mean(values / largest)) if largest > 0 else 0.0


def column(run: Run, key: str) -> Floats:
  """A column of a run; all NaN if the run has no such column."""
  return run.columns.get(key, np.full(len(run.steps), np.nan))


def flag(run: Run, key: str) -> Bools:
  """Where a column of a run was inf or NaN."""
  return run.flags.get(key, np.zeros(len(run.steps), np.bool_))


def _flagged(run: Run, key: str) -> Floats:
  """A column with inf in place of the recorded nonfinite values."""
  return np.where(flag(run, key), np.inf, run.columns[key])
