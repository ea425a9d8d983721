"""From what a `Recorder` has read off the device to rows: which steps, which numbers, and when those by leaf.

Steps are taken in the order of the pushes; what a row depends on of those before it is kept in `Rows`.
"""

import math
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from clipjax.checks import caller_level
from clipjax.rules.base import is_no_limit
from clipjax.runs import packing
from clipjax.runs.outputs import RunFile
from clipjax.runs.reading import merge, read_run
from clipjax.runs.text import numbers
from clipjax.runs.weights import weights_row

# What may be inf without anything being wrong: no limit, or a step long ago.
_LIMITS = frozenset({"max_norm", "max_loss"})
_MAY_BE_INF = _LIMITS | {"worst_norm"}
_WORSE = 1.1  # By how much a worst step exceeds the last one whose leaves were written: a rising norm has many.


class Pushed(NamedTuple):
  """A push whose numbers are still on the device."""

  time: float
  step: int | None
  scalars: dict[str, Any]
  packer: packing.Packer
  layout: packing.Layout
  vector: jax.Array | None
  weights: jax.Array | None
  by_leaf: bool

  def is_ready(self) -> bool:
    """Whether reading it would not wait."""
    arrays: tuple[Any, ...] = (self.vector, self.weights)
    return all(x is None or x.is_ready() for x in arrays)


class Rows:
  """Makes rows of what was read, and remembers what they depend on."""

  def __init__(self, every: int, file: RunFile | None):
    self._every = every
    self._file = file
    self._step: int | None = None  # Of the last row.
    self._lag: dict[str, int] = {}  # By how much the count of a watch is behind.
    self._bad_in_a_row = 0
    self._worst: dict[str, tuple[float, float]] = {}  # Step and norm when those by leaf were last written.
    self._incomplete: dict[str, Any] | None = None
    self._is_gap_reported = False

  def of(self, pushed: Pushed, seen: packing.Seen | None, counts: Any) -> list[dict[str, Any]]:
    """The rows of the steps in the rings of watches since the last push, then the row of this one."""
    seen = seen or packing.Seen(None, None, {}, {}, {}, {})
    user_step = pushed.step if pushed.step is not None else seen.user_step
    step = seen.step if seen.step is not None else user_step
    if step is None:  # It was on the device, and could not be read.
      return []
    values: dict[str, Any] = {**pushed.scalars, **seen.pushed}
    between: list[dict[str, Any]] = []
    if seen.step:  # Before the first update nothing has been measured.
      values |= seen.metrics
      values |= {key: math.inf for key in _limits(pushed.layout.metric_keys) if is_no_limit(values[key])}
      between = self._between(step, seen.rings)
    row = {"step": step, "time": round(pushed.time, 6), **_finite(values)}
    if user_step not in (None, step):
      row["user_step"] = user_step
    if seen.step and seen.vectors and self._is_by_leaf_due(pushed, row, seen.metrics):
      row["leaf"] = {key: _limit_as_inf(key, vector) for key, vector in seen.vectors.items()}
    if counts is not None:
      row["weights"] = weights_row(counts)
    self._step = step
    return [*between, row]

  def complete(self, row: dict[str, Any]) -> dict[str, Any] | None:
    """The row before, now that nothing more can come to it; None where this one belongs to it, or is the first."""
    before = self._incomplete
    if before is not None and before["step"] == row["step"]:
      merge(before, row)
      return None
    self._incomplete = row
    return before

  def last(self) -> dict[str, Any] | None:
    """The row that was held back."""
    row, self._incomplete = self._incomplete, None
    return row

  def _is_by_leaf_due(self, pushed: Pushed, row: dict[str, Any], measured: dict[str, Any]) -> bool:
    is_bad = any(not _is_of(key, _MAY_BE_INF) for key in row.get("nonfinite", ()))
    self._bad_in_a_row = self._bad_in_a_row + 1 if is_bad else 0
    worst = {norm: (measured[step], measured[norm]) for norm, step in _worst(pushed.layout.metric_keys)}
    due = pushed.by_leaf or 0 < self._bad_in_a_row <= self._every
    for key, (step, norm) in worst.items():
      written_step, written_norm = self._worst.get(key, (0, 0.0))
      due = due or (step != written_step and not norm <= _WORSE * written_norm)  # Above, or NaN.
    if due:
      self._worst = worst
    return due

  def _between(self, step: int, rings: dict[str, packing.Ring]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    last = self._step if self._step is not None and self._step <= step else None
    for name, (count, norms) in rings.items():
      lag, size = step - count, len(norms)
      is_in_step = self._lag.get(name, lag) == lag  # Else steps that the watch has not seen lie between.
      self._lag[name] = lag
      if not is_in_step:
        continue
      if last is not None and step - last > size:
        self._report_gap(name, size, step - last)
      first = max(count - size + 1, 1) if last is None else max(count - size + 1, 1, last - lag + 1)
      for i in range(first, count):
        norm = numbers(norms[(i - 1) % size : (i - 1) % size + 1])[0]
        rows.setdefault(i + lag, {"step": i + lag})[f"{name}/norm"] = norm
    if rows and self._step is None and self._file is not None and self._file.had_rows:
      rows = _without_known(rows, str(self._file.path))
    return [{"step": row.pop("step"), **_finite(row)} for _, row in sorted(rows.items())]

  def _report_gap(self, name: str, size: int, steps: int) -> None:
    if not self._is_gap_reported:
      self._is_gap_reported = True
      warnings.warn(
        f"`history` of the watch '{name}' must reach from one push to the next, got {size} for {steps} steps: those "
        f"before are not recorded; pass watch(history={steps}).",
        RuntimeWarning,
        stacklevel=caller_level(),
      )


def _without_known(rows: dict[int, dict[str, Any]], path: str) -> dict[int, dict[str, Any]]:
  """From the first step on that the file has with other norms, else those after the last that it has.

  A restored ring goes back to before its checkpoint, and a row in the middle of those that stay would end them.
  """
  try:
    run = read_run(path)
  except (OSError, ValueError):
    return rows
  places = {step: i for i, step in enumerate(run.steps.tolist())}

  def is_known(step: int, key: str, norm: float) -> bool:
    if key not in run.columns:
      return False
    recorded = run.columns[key][places[step]]
    return bool(recorded == norm or (math.isnan(recorded) and not math.isfinite(norm)))

  both = sorted(places.keys() & rows.keys())
  other = [s for s in both if not all(is_known(s, key, norm) for key, norm in rows[s].items() if key != "step")]
  begin = other[0] if other else both[-1] + 1 if both else 0
  return {step: row for step, row in rows.items() if step >= begin}


def _is_of(key: str, quantities: frozenset[str]) -> bool:
  """Whether a key is that of one of these quantities, of all leaves or of a group."""
  return not quantities.isdisjoint(key.split("/"))


@lru_cache(64)  # Each row asks for them.
def _limits(keys: tuple[str, ...]) -> tuple[str, ...]:
  """Those that are limits."""
  return tuple(key for key in keys if _is_of(key, _LIMITS))


@lru_cache(64)
def _worst(keys: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
  """Of each watch the keys of the norm and the number of its worst step."""
  return tuple((key, key[: -len("norm")] + "step") for key in keys if key.endswith("/worst_norm"))


def _limit_as_inf(key: str, vector: Any) -> Any:
  """No limit is inf in a row, not the largest number, which stands for it in a state."""
  return np.where(is_no_limit(vector), math.inf, vector) if _is_of(key, _LIMITS) else vector


def _finite(values: dict[str, Any]) -> dict[str, Any]:
  """The values as a row has them: null where not finite, and what they were beside them."""
  flags = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
  if not flags:
    return values
  return {**{key: None if key in flags else value for key, value in values.items()}, "nonfinite": flags}
