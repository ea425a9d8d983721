"""Which leaves or groups a finding names: the nonfinite ones, and the one whose norm grew most."""

from typing import NamedTuple

import numpy as np

from clipjax.metric_names import NONFINITE, NORM
from clipjax.runs.blocks import numbers_by_block
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.run import Run
from clipjax.runs.words import number, percent, several

_FEW = 4  # A median of fewer steps says little.
_SHARE = 0.01  # Smaller parts of the squared norm are noise.


class Bad(NamedTuple):
  """The nonfinite leaves of a step, among all recorded ones."""

  step: int
  leaves: tuple[str, ...]
  among: tuple[str, ...]

  def __str__(self) -> str:
    return "every leaf" if len(self.leaves) == len(self.among) > 3 else several(self.leaves, self.among)


class Grown(NamedTuple):
  """The leaf that caused a spike.

  `times` is its norm over its own median at the other steps; None if too few of them have norms by leaf. `share` is its
  part of the squared norm.
  """

  step: int
  leaf: str
  times: float | None
  share: float

  def __str__(self) -> str:
    if self.times is None:
      return f"at step {self.step} {self.leaf!r} held {percent(self.share)} of the squared norm"
    return f"at step {self.step} {self.leaf!r} grew most, to {number(self.times)} times its median"


def first_bad(run: Run, name: str | None, steps: Ints) -> Bad | None:
  """The leaves at the first of these steps with a known nonfinite leaf; None if there is no such step."""
  if name is None:
    return None
  # At one step, counts of nonfinite entries win over norms.
  found = (_bad(run, name, quantity, steps) for quantity in (NONFINITE, NORM))
  return min(filter(None, found), key=lambda bad: bad.step, default=None)


def _bad(run: Run, name: str, quantity: str, steps: Ints) -> Bad | None:
  names, at, values = numbers_by_block(run, name, quantity)
  bad = np.isinf(values) | (values > 0) if quantity == NONFINITE else np.isinf(values)
  rows = np.flatnonzero(np.isin(at, steps) & bad.any(axis=1))
  if not rows.size:
    return None
  return Bad(int(at[rows[0]]), tuple(names[i] for i in np.flatnonzero(bad[rows[0]])), names)


def bad_words(bad: Bad | None, first: int) -> str:
  """These leaves as the end of a sentence that has named the step `first`; "" for None."""
  if bad is None:
    return ""
  return f"; first in {bad}" if bad.step == first else f"; at step {bad.step} in {bad}"


def grown(run: Run, name: str, steps: Ints, begin: int) -> list[Grown]:
  """The leaf whose norm grew most, for each of these ascending steps that has norms by leaf.

  Only leaves that hold a hundredth of the squared norm count: a norm near 0 grows by chance. With too few other steps
  it is the leaf that holds the most. `begin` is the first step after the warm-up.
  """
  names, at, values = numbers_by_block(run, name, NORM)
  inside = np.isin(at, steps)
  usual = _usual(names, at, values[~inside], ~inside, begin)
  found = []
  for step, row in zip(at[inside].tolist(), values[inside], strict=True):
    known = np.isfinite(row) & (row > 0)
    if not known.any():
      continue
    scaled = np.where(known, row, 0) / row[known].max()  # Squares of the largest numbers would overflow.
    shares = scaled**2 / np.sum(scaled**2)
    with np.errstate(over="ignore"):
      times = np.where(known, row, np.nan) / usual
    # Growth decides among the leaves that matter; without a usual norm the share does.
    if (able := np.isfinite(times) & (shares >= _SHARE)).any():
      leaf = int(np.argmax(np.where(able, times, -1)))
      found.append(Grown(step, names[leaf], float(times[leaf]), float(shares[leaf])))
    else:
      leaf = int(np.argmax(shares))
      found.append(Grown(step, names[leaf], None, float(shares[leaf])))
  return found


def _usual(names: tuple[str, ...], at: Ints, values: Floats, kept: Bools, begin: int) -> Floats:
  """The median of each leaf, after the warm-up if that leaves enough steps; NaN if too few are known."""
  # Norms of the warm-up are larger, so they count only if little else is left.
  late = at[kept] >= begin
  values = values[late] if late.sum() >= _FEW else values
  if len(values) < _FEW:
    return np.full(len(names), np.nan)
  medians = medians_of(names, values)
  return np.array([medians.get(name, np.nan) for name in names])


def medians_of(names: tuple[str, ...], values: Floats) -> dict[str, float]:
  """The median of the positive numbers of each column, by name; columns without any are left out."""
  kept = [(name, x[(x > 0) & np.isfinite(x)]) for name, x in zip(names, values.T, strict=True)]
  return {name: float(np.median(x)) for name, x in kept if x.size}
