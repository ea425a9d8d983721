"""The steps between two pushes, from the rings of norms that watches keep.

They are numbered backward from the push that brought them. If the caller's step numbers grow faster than the updates,
as under `optax.MultiSteps` or when they count examples, the rows are spaced evenly between the two pushes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from clipjax.metric_names import NORM
from clipjax.runs.number_text import numbers
from clipjax.runs.record.packing import Ring
from clipjax.runs.record.warn_once import Once
from clipjax.runs.schema import key_of

Norms = dict[str, float]  # The norms of one step, by key.


class _Place(NamedTuple):
  """A push: the caller's step and the update count at that time."""

  step: int
  update: int


class Rings:
  """Makes rows from the rings of one optimizer since its last push.

  `recorded` returns the norms that the file has between two steps, because a restored ring reaches back beyond its
  checkpoint.
  """

  def __init__(self, recorded: Callable[[int, int], dict[int, Norms]], warn: Callable[[str], None]):
    self._recorded = recorded
    self._once = Once(warn)
    self._last: _Place | None = None
    self._lag: dict[str, int] = {}  # How far the count of each watch lags behind the updates.

  def between(self, step: int, update: int, rings: dict[str, Ring]) -> tuple[list[tuple[int, Norms]], int | None]:
    """The steps between the last push and this one with their norms, ascending.

    Also the first step at which the file has another norm, because the run went back to it; None if there is none.
    """
    before, self._last = self._last, _Place(step, update)
    if before is not None and before.update == update:
      return [], None
    # A new or restored ring is compared with the file; otherwise the last push tells where to begin.
    is_new = before is None or update < before.update or step < before.step
    stride = 1
    if before is not None and not is_new:
      stride = (step - before.step) // (update - before.update)
      if stride == 0:
        self._once.say(
          "slow steps",
          f"`step` must grow at least as fast as the updates, got {before.step} and {step} for "
          f"{update - before.update} updates: the norms in between have no number and are not recorded; push the "
          "number of the last update.",
        )
        return [], None
    rows = self._rows(_Place(step, update), None if is_new else before, rings, stride)
    return self._without_known(rows) if is_new and rows else (sorted(rows.items()), None)

  def _rows(self, now: _Place, before: _Place | None, rings: dict[str, Ring], stride: int) -> dict[int, Norms]:
    rows: dict[int, Norms] = {}
    for name, (count, norms) in rings.items():
      lag, size = now.update - count, len(norms)
      is_in_step = self._lag.get(name, lag) == lag  # If not, the watch missed some of the steps in between.
      self._lag[name] = lag
      if not is_in_step:
        continue
      if before is not None and now.update - before.update > size:
        self._say_gap(name, size, now.update - before.update)
      oldest = max(count - size + 1, 1)
      first = oldest if before is None else max(oldest, before.update - lag + 1)
      for i in range(first, count):
        step = now.step - (count - i) * stride
        if step >= 0:
          norm = numbers(norms[(i - 1) % size : (i - 1) % size + 1])[0]
          rows.setdefault(step, {})[key_of(name, NORM)] = norm
    return rows

  def _without_known(self, rows: dict[int, Norms]) -> tuple[list[tuple[int, Norms]], int | None]:
    """The rows that the file lacks, and all rows from the first step on at which it has another norm."""
    recorded = self._recorded(min(rows), max(rows))
    out: list[tuple[int, Norms]] = []
    other = None
    for step, row in sorted(rows.items()):
      old = recorded.get(step, {})
      if other is None and any(key in old and not _is_same(old[key], norm) for key, norm in row.items()):
        other = step
      if other is not None or not row.keys() <= old.keys():
        out.append((step, row))
    return out, other

  def _say_gap(self, name: str, size: int, steps: int) -> None:
    self._once.say(
      "history",
      f"`history` of the watch '{name}' must reach from one push to the next, got {size} for {steps} steps: earlier "
      f"steps are not recorded; pass watch(history={steps}).",
    )


def _is_same(recorded: float, norm: float) -> bool:
  return recorded == norm or not (math.isfinite(recorded) or math.isfinite(norm))
