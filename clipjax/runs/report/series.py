"""What a report takes from a `Run`, as NumPy arrays: norms, other columns, and numbers by layer.

Numbers always cover all steps. Only drawings are thinned, by `thin` and `thin_mask`, which keep the extremes. As in a
`Run`, NaN means absent; in numbers by leaf, inf means nonfinite.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from clipjax.metric_names import MAX_NORM, NORM, SCALE, SO_FAR
from clipjax.runs.health.events import Event
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import acted, column, flag, norms_of_run, rejected, unseen
from clipjax.runs.run import Run
from clipjax.runs.schema import UNITS, key_of, name_of
from clipjax.runs.words import plain


class NormSeries(NamedTuple):
  """The norm of a state before the clip, step by step; each array has the shape (n,) of `Run.steps`.

  Attributes:
    name: name of the state; "grad" for the main one.
    steps: int64.
    norm: float64; NaN if it was not recorded or nonfinite.
    limit: float64, the threshold in force; NaN without one.
    clipped: bool, whether the updates were scaled down.
    nonfinite: bool, whether the norm was inf or NaN.
    rejected: bool, whether `skip_steps` rejected the step; the norm is then the one that `skip_steps` saw.
    by_block: whether each leaf or group has its own threshold; `limit` is then the smallest.
    spikes: bool, at the largest norm of each event in which the norm moved.
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

  @property
  def key(self) -> str:
    """The key of the norm's column."""
    return key_of(self.name, NORM)

  @property
  def typical(self) -> Floats:
    """The finite norms after the warm-up, whose percentiles the verdict reports."""
    return self.norm[np.isfinite(self.norm) & (self.steps >= self.begin)]

  def within(self, span: tuple[int, int]) -> "NormSeries":
    """The part between the first and the last step of `span`."""
    kept = (self.steps >= span[0]) & (self.steps <= span[1])
    parts: dict[str, Any] = {name: x[kept] for name, x in self._asdict().items() if isinstance(x, np.ndarray)}
    return self._replace(**parts)


class Curve(NamedTuple):
  """A column: its finite `values` with their `steps`, and the steps `bad` at which it was inf or NaN.

  `spikes` marks the largest value of each event in which the column moved.
  """

  key: str
  steps: Ints
  values: Floats
  bad: Ints
  spikes: Bools

  def within(self, span: tuple[int, int]) -> "Curve":
    """The part between the first and the last step of `span`."""
    kept = (self.steps >= span[0]) & (self.steps <= span[1])
    bad = self.bad[(self.bad >= span[0]) & (self.bad <= span[1])]
    return Curve(self.key, self.steps[kept], self.values[kept], bad, self.spikes[kept])


class Vectors(NamedTuple):
  """One quantity by leaf or group: `steps` (m,), L `names`, and `values` (m, L), inf for nonfinite, NaN for absent."""

  steps: Ints
  values: Floats
  names: tuple[str, ...]


def norm_series(run: Run, name: str, warmup_steps: int | None = None, events: Iterable[Event] = ()) -> NormSeries:
  """The norm of the state `name`, with the warm-up and the events that `diagnose` found."""
  # The judged norms, spread over all steps of the run.
  norms = norms_of_run(run, name, warmup_steps)
  at = np.searchsorted(run.steps, norms.steps)
  norm, bad, clipped = np.full(len(run), np.nan), *(np.zeros(len(run), np.bool_) for _ in range(2))
  norm[at] = np.where(norms.finite, norms.values, np.nan)
  bad[at] = ~norms.finite
  clipped[at] = acted(run, name, norms) & ~norms.rejected
  # Thresholds by leaf or group: recorded as a vector, or as one column each.
  key = key_of(name, MAX_NORM)
  blocks = [key_of(f"{name}{unit}", MAX_NORM) for unit in UNITS]
  by_block = any(by in run.vectors for by in blocks) or any(other.startswith(f"{key}/") for other in run.columns)
  if by_block:  # Without a scale, the norm alone does not tell which thresholds acted.
    clipped &= np.isfinite(column(run, key_of(name, SCALE)))
  # One ring per event, at its largest norm.
  spikes = _peaks(events, key_of(name, NORM), run.steps, norm)
  return NormSeries(name, run.steps, norm, column(run, key), clipped, bad, rejected(run), by_block, spikes, norms.begin)


def curve(run: Run, key: str, events: Iterable[Event] = ()) -> Curve | None:
  """A column of `run`; None if it has no number, finite or not."""
  values, bad = column(run, key), run.steps[flag(run, key)]
  known = np.isfinite(values)
  if not known.any() and not bad.size:
    return None
  return Curve(key, run.steps[known], values[known], bad, _peaks(events, key, run.steps[known], values[known]))


def curves(run: Run, keys: Iterable[str], events: Iterable[Event] = ()) -> tuple[Curve, ...]:
  """The columns `keys`, without those that have no number."""
  return tuple(filter(None, (curve(run, key, events) for key in keys)))


def _peaks(events: Iterable[Event], key: str, steps: Ints, values: Floats) -> Bools:
  """The largest value within each event in which `key` moved."""
  out = np.zeros(steps.size, np.bool_)
  for event in events:
    first, last = np.searchsorted(steps, [event.start, event.end + 1])
    inside = values[first:last]
    if any(move.key == key for move in event.moves) and np.isfinite(inside).any():
      out[first + int(np.nanargmax(inside))] = True
  return out


def vectors(run: Run, key: str) -> Vectors | None:
  """A vector of `run` with the names of its entries; None if it is absent or empty.

  Steps that the state never saw are left out, such as steps that `skip_steps` rejected before a watch inside it.
  """
  if key not in run.vectors:
    return None
  steps, values = run.vectors[key]
  name = name_of(key)
  # Running quantities, such as the norms at the worst step so far, are valid in every row.
  if key.removeprefix(f"{name}/") not in SO_FAR:
    seen = ~unseen(run, name)[np.searchsorted(run.steps, steps)]
    steps, values = steps[seen], values[seen]
  if values.size == 0:
    return None
  names = run.leaves.get(name, ())[: values.shape[1]]
  return Vectors(steps, values, (*names, *(f"leaf {i}" for i in range(len(names), values.shape[1]))))


def medians(values: Floats) -> Floats:
  """The median of the finite numbers of each column, NaN for a column without one."""
  known = np.isfinite(values)
  if known.all() and values.size:  # The usual case, without a loop over thousands of layers.
    return np.asarray(np.median(values, axis=0), np.float64)
  return np.array([np.median(values[known[:, i], i]) if known[:, i].any() else np.nan for i in range(values.shape[1])])


# Thinning, for drawing only -----------------------------------------------------------------------------------------


def thin(values: Floats, bins: int) -> Ints:
  """Ascending indices of the smallest and the largest finite value in each of `bins` equal parts.

  The first and the last index stay, and one of each part without a finite value, which keeps a gap a gap. Few values
  (up to `2 * bins`) all stay.
  """
  n = values.size
  if n <= 2 * bins:
    return np.arange(n)
  # In a part without a finite value both indices are its first, which keeps the gap.
  finite = np.isfinite(values)
  low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
  kept = {0, n - 1}
  edges = np.linspace(0, n, bins + 1).astype(np.int64)
  for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
    kept |= {start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())}
  return np.array(sorted(kept), np.int64)


def thin_mask(mask: Bools, bins: int) -> Ints:
  """Indices at which `mask` is true, at most one in each of `bins` equal parts."""
  at = np.flatnonzero(mask)
  _, first = np.unique(at * bins // max(mask.size, 1), return_index=True)
  return at[first]


# Names --------------------------------------------------------------------------------------------------------------


def without_common(names: tuple[str, ...]) -> tuple[str, ...]:
  """Paths without the leading and trailing parts that all of them share; each keeps at least one part."""
  parts = [name.split("/") for name in names]
  # Cut the shared parts at the front, then at the back, but never the last part that is left.
  spare = min(map(len, parts), default=1) - 1
  head = next((i for i in range(spare) if len({part[i] for part in parts}) > 1), spare)
  tail = next((i for i in range(spare - head) if len({part[-1 - i] for part in parts}) > 1), spare - head)
  return names if len(names) < 2 else tuple("/".join(part[head : len(part) - tail]) for part in parts)


def without_last(names: tuple[str, ...]) -> tuple[str, ...]:
  """Paths without their last part, often "kernel", if the rest still identifies the path."""
  heads = [name.rpartition("/")[0] or name for name in names]
  counts = Counter([*heads, *names])
  return tuple(head if counts[head] == 1 else name for head, name in zip(heads, names, strict=True))


def short(name: str, length: int) -> str:
  """A name of at most `length` characters; the middle is cut, as the ends tell layers apart."""
  name = plain(name)
  if len(name) <= length:
    return name
  head = length * 3 // 5
  return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
