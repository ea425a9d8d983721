"""What a report takes out of a `Run`, in numpy: the main series, the layers over time, the worst step, the speed.

Numbers are always of all steps. Only what is drawn is thinned, by `thin`, `thin_mask` and `time_grid`, and each of
them keeps the extremes. What is absent and what was not finite are told apart as in a `Run`.
"""

import math
from typing import NamedTuple

import numpy as np

from clipjax.runs.norms import acted, main_name, norms_of_run
from clipjax.runs.run import Bools, Floats, Ints, Run
from clipjax.runs.words import Stack, in_stacks


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
  """

  name: str
  steps: Ints
  norm: Floats
  limit: Floats
  clipped: Bools
  nonfinite: Bools
  rejected: Bools
  by_block: bool


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


class Speed(NamedTuple):
  """Seconds: `step_time`, the median of `parts` parts of the run, and two percentiles of the time from push to push.

  `rates` are the tokens and examples a second at that step time, of those that were recorded.
  """

  step_time: float
  parts: int
  median: float
  p99: float
  rates: dict[str, float]


def column(run: Run, key: str) -> Floats:
  """A column of `run`, of NaN where it has none of that name."""
  return run.columns.get(key, np.full(len(run.steps), np.nan))


def flag(run: Run, key: str) -> Bools:
  """Where a column of `run` was inf or NaN."""
  return run.flags.get(key, np.zeros(len(run.steps), np.bool_))


def norm_series(run: Run) -> NormSeries | None:
  """The main norm of `run`; None where no norm was recorded."""
  name = main_name(run)
  if name is None:
    return None
  norms = norms_of_run(run, name, None)
  at = np.searchsorted(run.steps, norms.steps)
  norm, bad, clipped = np.full(len(run), np.nan), np.zeros(len(run), np.bool_), np.zeros(len(run), np.bool_)
  norm[at] = np.where(norms.finite, norms.values, np.nan)
  bad[at] = ~norms.finite
  clipped[at] = acted(run, name, norms) & ~norms.rejected
  blocks = (f"{name}/max_norm", f"{name}_leaf/max_norm", f"{name}_group/max_norm")
  by_block = any(key in run.vectors for key in blocks) or any(key.startswith(f"{blocks[0]}/") for key in run.columns)
  if by_block:  # A norm without a scale does not tell which of them acted.
    clipped &= np.isfinite(column(run, f"{name}/scale"))
  limit, rejected = column(run, f"{name}/max_norm"), column(run, "skip/consecutive") > 0
  return NormSeries(name, run.steps, norm, limit, clipped, bad, rejected, by_block)


def vectors(run: Run, key: str) -> Vectors | None:
  """A vector of `run` with the names of its entries; None where it is absent or empty."""
  if key not in run.vectors:
    return None
  steps, values = run.vectors[key]
  if values.size == 0:
    return None
  names = run.leaves.get(key.rpartition("/")[0], ())[: values.shape[1]]
  return Vectors(steps, values, (*names, *(f"leaf {i}" for i in range(len(names), values.shape[1]))))


def worst_step(run: Run, series: NormSeries) -> Worst | None:
  """The worst step of `series`, with its layers where they were recorded; None where nothing was measured."""
  if series.nonfinite.any():
    at = int(np.argmax(series.nonfinite))
  elif np.isfinite(series.norm).any():
    at = int(np.nanargmax(series.norm))
  else:
    return None
  step = int(series.steps[at])
  for quantity in ("norm", "worst_norm"):
    found = vectors(run, f"{series.name}/{quantity}")
    if found is None:
      continue
    # The watch keeps the norms of its worst step, so that later rows have them too.
    at_row = np.isin(found.steps, run.steps[column(run, f"{series.name}/worst_step") == step])
    rows = np.flatnonzero(found.steps == step if quantity == "norm" else at_row)
    if rows.size:
      values = found.values[rows[0]]
      order = [i for i in np.argsort(-values, kind="stable") if not np.isnan(values[i])]
      return Worst(step, float(series.norm[at]), tuple((found.names[i], float(values[i])) for i in order))
  return Worst(step, float(series.norm[at]), ())


def seconds_per_step(run: Run) -> tuple[Ints, Floats]:
  """`(steps, seconds)`: the time between two pushes over the steps between them, at the later one."""
  time = column(run, "time")
  known = np.isfinite(time)
  steps, time = run.steps[known], time[known]
  seconds = np.diff(time) / np.maximum(np.diff(steps), 1)
  forward = seconds > 0  # After a resume a step may be older than the one before it.
  return steps[1:][forward], seconds[forward]


def speed(run: Run, begin: int | None = None) -> Speed | None:
  """The speed from the step `begin` on, by default the first after the warm-up; None without two pushes.

  JAX runs ahead of the host, so that two pushes may be closer than two steps: parts of the run tell the step time.
  Their median leaves out a pause, as where a run was resumed.
  """
  begin = norms_of_run(run, main_name(run), None).begin if begin is None else begin
  _, parts, _ = _parts(run, 20, begin)
  if not parts.size:
    return None
  steps, seconds = seconds_per_step(run)
  median, p99 = (float(x) for x in np.percentile(seconds[steps > begin], [50, 99]))
  step_time, rates = float(np.median(parts)), {}
  for key in ("tokens", "examples"):
    amount = column(run, key)[run.steps >= begin]
    if np.isfinite(amount).any():
      rates[key] = float(np.nanmean(amount)) / step_time
  return Speed(step_time, parts.size, median, p99, rates)


def throughput(run: Run, key: str) -> tuple[Ints, Floats]:
  """`(steps, rate)`: the scalar `key`, an amount for each step, over the seconds of a step, for 50 parts of the run."""
  steps, seconds, parts = _parts(run, 50)
  amount = column(run, key)
  known = np.isfinite(amount)
  total, count = np.cumsum(np.where(known, amount, 0)), np.cumsum(known)
  first, last = (np.searchsorted(run.steps, ends) for ends in parts)
  some = count[last] > count[first]
  rate = (total[last] - total[first])[some] / (count[last] - count[first])[some] / seconds[some]
  return steps[some], rate


def _parts(run: Run, most: int, begin: int = 0) -> tuple[Ints, Floats, tuple[Ints, Ints]]:
  """The run in at most `most` parts: the last step of each, its seconds for a step, its first and last step."""
  time = column(run, "time")
  known = np.isfinite(time) & (run.steps >= begin)
  steps, time = run.steps[known], time[known]
  ends = np.linspace(0, max(steps.size - 1, 0), max(min(most, steps.size - 1), 0) + 1).astype(np.int64)
  ends = ends if steps.size else ends[:0]
  steps, time = steps[ends], time[ends]
  seconds = np.diff(time) / np.diff(steps)
  forward = seconds > 0  # The clock was set back, or stood still.
  return steps[1:][forward], seconds[forward], (steps[:-1][forward], steps[1:][forward])


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

  A column without a recording repeats the one before it: nothing newer was known.
  """
  gap = float(np.median(np.diff(steps))) if steps.size > 1 else 1.0
  count = int(np.clip(round((steps[-1] - steps[0]) / gap) + 1, 1, bins))
  start, stop = steps[0] - gap / 2, steps[-1] + gap / 2
  which = np.minimum(((steps - start) / (stop - start) * count).astype(np.int64), count - 1)
  grid = np.empty((values.shape[1], count))
  for i in range(count):
    inside = values[which == i]
    grid[:, i] = np.fmax.reduce(inside, axis=0) if len(inside) else grid[:, i - 1]
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
  lines: Floats = np.fmax.reduceat(values, np.concatenate(firsts), axis=0)  # NaN, the absent ones, only alone.
  return Depth(lines, tuple(s._replace(start=start) for s, start in zip(stacks, starts, strict=False)), per)


# Names --------------------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
  """A name with every character that has no shape of its own as an escape: line ends, controls, direction marks."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


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
