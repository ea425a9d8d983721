"""What a report takes out of a `Run`, in numpy: the main series, the layers over time, the worst step.

Numbers are always of all steps. Only what is drawn is thinned, by `thin`, `thin_mask` and `time_grid`, and each of
them keeps the extremes. As in a `Run`, NaN stands for what is absent; by leaf, inf for what was not finite.
"""

import math
from typing import NamedTuple

import numpy as np

from clipjax.quantities import MAX_NORM, NORM, SCALE, SO_FAR, STEPS, WORST_NORM, WORST_STEP
from clipjax.runs.health.findings import HealthLimits
from clipjax.runs.health.series import detector
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import acted, column, main_name, norms_of_run, rejected, unseen
from clipjax.runs.roles import Role
from clipjax.runs.run import Run
from clipjax.runs.schema import UNITS, key_of, name_of
from clipjax.runs.words import Stack, in_stacks, plain


class NormSeries(NamedTuple):
  """The norm before the clip, step by step; each array has the shape (n,) of `Run.steps`.

  Attributes:
    name: of the state: "grad" where there is one.
    steps: int64.
    norm: float64; NaN where it was not recorded or not finite.
    limit: float64, the threshold in force; NaN where there was none.
    clipped: bool, where the updates were scaled down.
    nonfinite: bool, where the norm was inf or NaN.
    rejected: bool, where `skip_steps` rejected the step; its norm is the one that `skip_steps` saw.
    by_block: whether leaves or groups have thresholds of their own, of which `limit` is the smallest.
    spikes: bool, where the norm was a spike.
    begin: the first step after the warm-up.
  """

  name: str
  steps: Ints
  norm: Floats
  limit: Floats
  clipped: Bools
  nonfinite: Bools
  rejected: Bools
  by_block: bool
  spikes: Bools
  begin: int


class Vectors(NamedTuple):
  """One quantity by leaf or group: `steps` (m,), `values` (m, L), inf for nonfinite, NaN for absent, and L `names`."""

  steps: Ints
  values: Floats
  names: tuple[str, ...]


class Worst(NamedTuple):
  """The first step that was not finite, else the one of the largest norm; `layers` are of that step, worst first."""

  step: int
  norm: float
  layers: tuple[tuple[str, float], ...]


def norm_series(run: Run, limits: HealthLimits | None = None, warmup_steps: int | None = None) -> NormSeries | None:
  """The main norm of `run`; None where no norm was recorded. The limits are those of `diagnose`."""
  limits = limits or HealthLimits()
  name = main_name(run)
  if name is None:
    return None
  norms = norms_of_run(run, name, warmup_steps)
  at = np.searchsorted(run.steps, norms.steps)
  norm, bad, clipped, spikes = np.full(len(run), np.nan), *(np.zeros(len(run), np.bool_) for _ in range(3))
  norm[at] = np.where(norms.finite, norms.values, np.nan)
  bad[at] = ~norms.finite
  clipped[at] = acted(run, name, norms) & ~norms.rejected
  spikes[at[norms.finite]] = detector(Role.NORM, limits).feed(norms.values[norms.finite]).is_spike
  key = key_of(name, MAX_NORM)
  blocks = [key_of(f"{name}{unit}", MAX_NORM) for unit in UNITS]
  by_block = any(by in run.vectors for by in blocks) or any(other.startswith(f"{key}/") for other in run.columns)
  if by_block:  # A norm without a scale does not tell which of them acted.
    clipped &= np.isfinite(column(run, key_of(name, SCALE)))
  return NormSeries(name, run.steps, norm, column(run, key), clipped, bad, rejected(run), by_block, spikes, norms.begin)


def vectors(run: Run, key: str) -> Vectors | None:
  """A vector of `run` with the names of its entries; None where it is absent or empty.

  Steps that passed the state by are left out, as those that `skip_steps` rejected before a watch inside.
  """
  if key not in run.vectors:
    return None
  steps, values = run.vectors[key]
  name = name_of(key)
  if key.removeprefix(f"{name}/") not in SO_FAR:
    seen = ~unseen(run, name)[np.searchsorted(run.steps, steps)]
    steps, values = steps[seen], values[seen]
  if values.size == 0:
    return None
  names = run.leaves.get(name, ())[: values.shape[1]]
  return Vectors(steps, values, (*names, *(f"leaf {i}" for i in range(len(names), values.shape[1]))))


def worst_step(run: Run, series: NormSeries) -> Worst | None:
  """The worst step of `series`, with its layers where they were recorded; None where nothing was measured."""
  if series.nonfinite.any():
    at = int(np.argmax(series.nonfinite))
  elif np.isfinite(series.norm).any():
    at = int(np.nanargmax(series.norm))
  else:
    return None
  layers = _layers_at(vectors(run, key_of(series.name, NORM)), run.steps[at : at + 1])
  # The watch keeps the norms of its worst step, so that later rows have them too.
  layers = layers or _layers_at(vectors(run, key_of(series.name, WORST_NORM)), _steps_of_worst(run, series.name, at))
  return Worst(int(series.steps[at]), float(series.norm[at]), layers)


def _layers_at(found: Vectors | None, steps: Ints) -> tuple[tuple[str, float], ...]:
  """The layers of the first row of one of these steps, the worst first; none where none was recorded."""
  rows = np.flatnonzero(np.isin(found.steps, steps)) if found is not None else np.zeros(0, np.int64)
  if found is None or not rows.size:
    return ()
  values = found.values[rows[0]]
  order = np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")
  return tuple((found.names[i], float(values[i])) for i in order if not np.isnan(values[i]))


def _steps_of_worst(run: Run, name: str, at: int) -> Ints:
  """The steps from the row `at` on whose worst step, so far, is that of this row.

  A state says which one it was by its own count. Rows out of the history of a watch have no count: it is that of the
  push after them, less one for each step between. A new state counts from the start again.
  """
  counts, worst = column(run, key_of(name, STEPS)), column(run, key_of(name, WORST_STEP))
  if not np.isfinite(counts).any():
    same: Ints = run.steps[worst == run.steps[at]]
    return same
  counted = at + np.flatnonzero(np.isfinite(counts[at:]))
  if not counted.size or unseen(run, name)[at]:
    return run.steps[:0]
  count = counts[counted[0]] - (run.steps[counted[0]] - run.steps[at])
  fell = np.flatnonzero(np.diff(counts[counted]) < 0)
  end = counted[fell[0] + 1] if fell.size else len(run)
  later: Ints = run.steps[at:end][worst[at:end] == count]
  return later


# Thinning, for drawing only -----------------------------------------------------------------------------------------


def thin(values: Floats, bins: int) -> Ints:
  """Indices of the least and the greatest finite value in each of `bins` equal parts, ascending; all where few.

  The first and the last are kept, and one of each part without a finite value, so that a gap stays a gap.
  """
  n = values.size
  if n <= 2 * bins:
    return np.arange(n)
  finite = np.isfinite(values)
  low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
  kept = {0, n - 1}
  edges = np.linspace(0, n, bins + 1).astype(np.int64)
  for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
    kept |= {start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())}
  return np.array(sorted(kept), np.int64)


def thin_mask(mask: Bools, bins: int) -> Ints:
  """Indices where `mask` is true, at most one in each of `bins` equal parts."""
  at = np.flatnonzero(mask)
  _, first = np.unique(at * bins // max(mask.size, 1), return_index=True)
  return at[first]


class Grid(NamedTuple):
  """Layers by time: `values` (L, columns), the columns of equal width between the steps `start` and `stop`."""

  start: float
  stop: float
  values: Floats


def time_grid(steps: Ints, values: Floats, bins: int) -> Grid:
  """At most `bins` columns of time; each holds the greatest value in it, inf where one was not finite.

  Where a column has no recording of a layer, it repeats the one before it: nothing newer was known.
  """
  gap = float(np.median(np.diff(steps))) if steps.size > 1 else 1.0
  count = int(np.clip(round((steps[-1] - steps[0]) / gap) + 1, 1, bins))
  start, stop = steps[0] - gap / 2, steps[-1] + gap / 2
  which = np.minimum(((steps - start) / (stop - start) * count).astype(np.int64), count - 1)
  grid = np.empty((values.shape[1], count))
  for i in range(count):
    inside = values[which == i]
    grid[:, i] = np.fmax.reduce(inside, axis=0, initial=np.nan)
    if i:
      grid[:, i] = np.where(np.isnan(grid[:, i]), grid[:, i - 1], grid[:, i])
  return Grid(start, stop, grid)


class Depth(NamedTuple):
  """Layers as the lines of a map: `values` (lines, columns), each line the greatest of `per` layers of one stack.

  `stacks` have their place among the lines in `start`, and the number of their layers in `size`.
  """

  values: Floats
  stacks: tuple[Stack, ...]
  per: int


def by_depth(names: tuple[str, ...], values: Floats, most: int) -> Depth:
  """Values (L, columns) with neighbouring layers of a stack in one line where there are more than about `most`."""
  stacks = in_stacks(names)
  per = math.ceil(len(names) / most)
  firsts = [range(stack.start, stack.start + stack.size, per) for stack in stacks]
  starts = np.cumsum([0, *map(len, firsts)]).tolist()
  lines: Floats = np.fmax.reduceat(values, np.concatenate(firsts), axis=0)  # What is known of them.
  return Depth(lines, tuple(s._replace(start=start) for s, start in zip(stacks, starts, strict=False)), per)


# Names --------------------------------------------------------------------------------------------------------------


def without_common(names: tuple[str, ...]) -> tuple[str, ...]:
  """Paths without the first and the last parts that all of them share; each keeps one part at least."""
  parts = [name.split("/") for name in names]
  spare = min(map(len, parts), default=1) - 1
  head = next((i for i in range(spare) if len({part[i] for part in parts}) > 1), spare)
  tail = next((i for i in range(spare - head) if len({part[-1 - i] for part in parts}) > 1), spare - head)
  return names if len(names) < 2 else tuple("/".join(part[head : len(part) - tail]) for part in parts)


def short(name: str, length: int) -> str:
  """A name of at most `length` characters; the middle is left out, for the ends tell layers apart."""
  name = plain(name)
  if len(name) <= length:
    return name
  head = length * 3 // 5
  return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
