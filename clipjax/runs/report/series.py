"""What a report takes out of a `Run`, in numpy: norms, other columns, and numbers by layer.

Numbers are always of all steps. Only what is drawn is thinned, by `thin` and `thin_mask`, and each of them keeps the
extremes. As in a `Run`, NaN stands for what is absent; by leaf, inf for what was not finite.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from clipjax.quantities import MAX_NORM, NORM, SCALE, SO_FAR
from clipjax.runs.health.events import Event
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import acted, column, flag, norms_of_run, rejected, unseen
from clipjax.runs.run import Run
from clipjax.runs.schema import UNITS, key_of, name_of
from clipjax.runs.words import plain


class NormSeries(NamedTuple):
  """The norm of a state before the clip, step by step; each array has the shape (n,) of `Run.steps`.

  Attributes:
    name: of the state: "grad" where there is one.
    steps: int64.
    norm: float64; NaN where it was not recorded or not finite.
    limit: float64, the threshold in force; NaN where there was none.
    clipped: bool, where the updates were scaled down.
    nonfinite: bool, where the norm was inf or NaN.
    rejected: bool, where `skip_steps` rejected the step; its norm is the one that `skip_steps` saw.
    by_block: whether leaves or groups have thresholds of their own, of which `limit` is the smallest.
    spikes: bool, the largest norm of each event in which the norm moved.
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
    """That of the column."""
    return key_of(self.name, NORM)

  @property
  def typical(self) -> Floats:
    """The finite norms after the warm-up, of which the verdict tells the percentiles."""
    return self.norm[np.isfinite(self.norm) & (self.steps >= self.begin)]

  def within(self, span: tuple[int, int]) -> "NormSeries":
    """The steps from the first to the last of `span`."""
    kept = (self.steps >= span[0]) & (self.steps <= span[1])
    parts: dict[str, Any] = {name: x[kept] for name, x in self._asdict().items() if isinstance(x, np.ndarray)}
    return self._replace(**parts)


class Curve(NamedTuple):
  """A column: `values` at the `steps` at which it was finite, and the steps at which it was inf or NaN.

  `spikes` are the largest values of each event in which it moved.
  """

  key: str
  steps: Ints
  values: Floats
  bad: Ints
  spikes: Bools

  def within(self, span: tuple[int, int]) -> "Curve":
    """The steps from the first to the last of `span`."""
    kept = (self.steps >= span[0]) & (self.steps <= span[1])
    bad = self.bad[(self.bad >= span[0]) & (self.bad <= span[1])]
    return Curve(self.key, self.steps[kept], self.values[kept], bad, self.spikes[kept])


class Vectors(NamedTuple):
  """One quantity by leaf or group: `steps` (m,), `values` (m, L), inf for nonfinite, NaN for absent, and L `names`."""

  steps: Ints
  values: Floats
  names: tuple[str, ...]


def norm_series(run: Run, name: str, warmup_steps: int | None = None, events: Iterable[Event] = ()) -> NormSeries:
  """The norm of the state `name`; the warm-up and the events are those of `diagnose`."""
  norms = norms_of_run(run, name, warmup_steps)
  at = np.searchsorted(run.steps, norms.steps)
  norm, bad, clipped = np.full(len(run), np.nan), *(np.zeros(len(run), np.bool_) for _ in range(2))
  norm[at] = np.where(norms.finite, norms.values, np.nan)
  bad[at] = ~norms.finite
  clipped[at] = acted(run, name, norms) & ~norms.rejected
  key = key_of(name, MAX_NORM)
  blocks = [key_of(f"{name}{unit}", MAX_NORM) for unit in UNITS]
  by_block = any(by in run.vectors for by in blocks) or any(other.startswith(f"{key}/") for other in run.columns)
  if by_block:  # A norm without a scale does not tell which of them acted.
    clipped &= np.isfinite(column(run, key_of(name, SCALE)))
  spikes = _peaks(events, key_of(name, NORM), run.steps, norm)
  return NormSeries(name, run.steps, norm, column(run, key), clipped, bad, rejected(run), by_block, spikes, norms.begin)


def curve(run: Run, key: str, events: Iterable[Event] = ()) -> Curve | None:
  """A column of `run`; None where it has no number, finite or not."""
  values, bad = column(run, key), run.steps[flag(run, key)]
  known = np.isfinite(values)
  if not known.any() and not bad.size:
    return None
  return Curve(key, run.steps[known], values[known], bad, _peaks(events, key, run.steps[known], values[known]))


def curves(run: Run, keys: Iterable[str], events: Iterable[Event] = ()) -> tuple[Curve, ...]:
  """The columns of some keys that have numbers."""
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


def medians(values: Floats) -> Floats:
  """The median of the finite numbers of each column, NaN where a column has none."""
  known = np.isfinite(values)
  if known.all() and values.size:
    return np.asarray(np.median(values, axis=0), np.float64)
  return np.array([np.median(values[known[:, i], i]) if known[:, i].any() else np.nan for i in range(values.shape[1])])


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


# Names --------------------------------------------------------------------------------------------------------------


def without_common(names: tuple[str, ...]) -> tuple[str, ...]:
  """Paths without the first and the last parts that all of them share; each keeps one part at least."""
  parts = [name.split("/") for name in names]
  spare = min(map(len, parts), default=1) - 1
  head = next((i for i in range(spare) if len({part[i] for part in parts}) > 1), spare)
  tail = next((i for i in range(spare - head) if len({part[-1 - i] for part in parts}) > 1), spare - head)
  return names if len(names) < 2 else tuple("/".join(part[head : len(part) - tail]) for part in parts)


def without_last(names: tuple[str, ...]) -> tuple[str, ...]:
  """Paths without their last part, which is often "kernel", where what is left is that of one path alone."""
  heads = [name.rpartition("/")[0] or name for name in names]
  counts = Counter([*heads, *names])
  return tuple(head if counts[head] == 1 else name for head, name in zip(heads, names, strict=True))


def short(name: str, length: int) -> str:
  """A name of at most `length` characters; the middle is left out, for the ends tell layers apart."""
  name = plain(name)
  if len(name) <= length:
    return name
  head = length * 3 // 5
  return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
