"""Which leaves or groups a finding names: those that were not finite, and that whose norm grew most."""

from typing import NamedTuple

import numpy as np

from clipjax.quantities import NONFINITE, NORM
from clipjax.runs.health.view import View
from clipjax.runs.run import Floats, Ints
from clipjax.runs.words import several


class Bad(NamedTuple):
  """The leaves that were not finite at a step, among all that were recorded."""

  step: int
  leaves: tuple[str, ...]
  among: tuple[str, ...]

  def __str__(self) -> str:
    return "every leaf" if len(self.leaves) == len(self.among) > 3 else several(self.leaves, self.among)


class Grown(NamedTuple):
  """The leaf whose norm at a step was the most times its own median of the other steps."""

  step: int
  leaf: str
  times: float


def first_bad(view: View, steps: Ints) -> Bad | None:
  """The leaves at the first of some steps at which any are known to be not finite; None where none are."""
  if view.name is None:
    return None
  found = (_bad(view, quantity, steps) for quantity in (NONFINITE, NORM))  # The count of entries speaks first.
  return min(filter(None, found), key=lambda bad: bad.step, default=None)


def _bad(view: View, quantity: str, steps: Ints) -> Bad | None:
  names, at, values = view.blocks(str(view.name), quantity)
  bad = np.isinf(values) | (values > 0) if quantity == NONFINITE else np.isinf(values)
  rows = np.flatnonzero(np.isin(at, steps) & bad.any(axis=1))
  if not rows.size:
    return None
  return Bad(int(at[rows[0]]), tuple(names[i] for i in np.flatnonzero(bad[rows[0]])), names)


def bad_words(bad: Bad | None, first: int) -> str:
  """These leaves as the end of a sentence that has named the step `first`; nothing for None."""
  if bad is None:
    return ""
  return f"; first in {bad}" if bad.step == first else f"; at step {bad.step} in {bad}"


def grown(view: View, steps: Ints) -> list[Grown]:
  """For each of some steps, ascending, at which norms by leaf are known: the leaf whose norm grew most."""
  if view.name is None:
    return []
  names, at, values = view.blocks(view.name, NORM)
  inside = np.isin(at, steps)
  medians = medians_of(names, values[~inside])
  usual = np.array([medians.get(name, np.nan) for name in names])
  found = []
  for step, row in zip(at[inside].tolist(), values[inside], strict=True):
    with np.errstate(over="ignore"):
      times = row / usual
    if (known := np.isfinite(times)).any():
      leaf = int(np.argmax(np.where(known, times, -1)))
      found.append(Grown(step, names[leaf], float(times[leaf])))
  return found


def medians_of(names: tuple[str, ...], values: Floats) -> dict[str, float]:
  """The median of each column of positive numbers, by name; columns without any are left out."""
  kept = [(name, x[(x > 0) & np.isfinite(x)]) for name, x in zip(names, values.T, strict=True)]
  return {name: float(np.median(x)) for name, x in kept if x.size}
