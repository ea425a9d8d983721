"""What the states of a push measured at its step: under which names, and without numbers of another step.

If a wrapper rejected the step, the states inside it did not see it and repeat the step before. Their numbers for that
step are dropped, and their numbers over all steps so far are kept. If two optimizers push states of the same name, the
second one gets a new name.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from clipjax.metric_names import CONSECUTIVE, LIMITS, SO_FAR
from clipjax.rules.base import is_no_limit
from clipjax.runs.record.packing import Packer, Ring, Seen
from clipjax.runs.record.warn_once import Once
from clipjax.runs.schema import UNITS, key_of


class Measured(NamedTuple):
  """What was measured at a step.

  Attributes:
    update: how many updates the outermost state has counted; None if there is no state.
    metrics: numbers by key.
    vectors: numbers by leaf or group, by `<name>/<quantity>`.
    rings: the last norms of watches, by name.
    is_again: whether this step was pushed before with other numbers, so it was repeated from an earlier state.
  """

  update: int | None
  metrics: dict[str, Any]
  vectors: dict[str, Any]
  rings: dict[str, Ring]
  is_again: bool = False


NOTHING = Measured(None, {}, {}, {})


class _Last(NamedTuple):
  """The last state of one optimizer that was pushed."""

  step: int
  counts: tuple[int, ...]
  metrics: dict[str, Any]

  @property
  def update(self) -> int:
    return max(self.counts)


class States:
  """Decides what each push measured, by comparison with the pushes before it.

  Two optimizers whose states have the same structure are told apart at their first steps: the state of the second one
  has other numbers than the first, but the same number of updates or the same step. A later push belongs to the
  optimizer with the nearest lower update count.
  """

  def __init__(self, warn: Callable[[str], None]):
    self._once = Once(warn)
    self._last: dict[Packer, list[_Last]] = {}  # By structure, one entry per optimizer.
    self._steps: dict[Packer, int] = {}  # The number of steps pushed for each structure, up to 2.
    self._names: dict[tuple[Packer, int], dict[str, str]] = {}  # Renamed states of each optimizer.
    self.leaves: dict[str, tuple[str, ...]] = {}  # By the recorded name of a state.

  def measured(self, packer: Packer, seen: Seen, step: int) -> Measured:
    """What a push for `step` measured."""
    if not packer.sources:
      return NOTHING
    # Which optimizer is it?
    known = self._last.setdefault(packer, [])
    place, is_again = self._place(packer, known, seen, step)
    before = known[place] if place < len(known) else None
    if before is None or before.step != step:
      self._steps[packer] = min(self._steps.get(packer, 0) + (not any(last.step == step for last in known)), 2)
    known[place:] = [_Last(step, seen.counts, seen.metrics), *known[place + 1 :]]
    names = self._names_of(packer, place, step)
    if not known[place].update:  # Before the first update, nothing was measured.
      return Measured(0, {}, {}, {})
    metrics, vectors, rings = seen.metrics, seen.vectors, seen.rings
    # Drop the numbers of states that did not see the step. The same counts with other numbers do not mean that: the run
    # went back and took another course.
    is_other = before is not None and before.counts == seen.counts and not _are_equal(before.metrics, seen.metrics)
    if unseen := self._unseen(packer, seen, None if before is None or is_other else before.counts):
      metrics, vectors = _without(packer, unseen, metrics, vectors)
    # In a row, "no limit" is inf, and states have their recorded names.
    metrics = metrics | {key: math.inf for key in _limits(packer) if key in metrics and is_no_limit(metrics[key])}
    vectors = {key: _as_limits(packer.quantity_of["vector", key], vector) for key, vector in vectors.items()}
    if names:
      metrics = {_renamed(key, names): x for key, x in metrics.items()}
      vectors = {_renamed(key, names): x for key, x in vectors.items()}
      rings = {_renamed(key, names): x for key, x in rings.items()}
    return Measured(known[place].update, metrics, vectors, rings, is_again)

  def _unseen(self, packer: Packer, seen: Seen, before: tuple[int, ...] | None) -> set[int]:
    """The indices of states that did not see this step."""
    out = set()
    for i, source in enumerate(packer.sources):
      around = source.skip
      is_rejected = around is not None and seen.metrics.get(key_of(around.name, CONSECUTIVE), 0) > 0
      if is_rejected or seen.counts[i] == 0 or (before is not None and seen.counts[i] == before[i]):
        out.add(i)
    return out

  def _place(self, packer: Packer, known: list[_Last], seen: Seen, step: int) -> tuple[int, bool]:
    """The index of the optimizer among those of its structure, perhaps a new one, and whether the step is a repeat."""
    for i, last in enumerate(known):
      if last.counts == seen.counts and _are_equal(last.metrics, seen.metrics):
        return i, False  # The same state again.
    # The usual case: the optimizer with the nearest lower count goes on.
    update, is_young = max(seen.counts), self._steps.get(packer, 0) <= 1
    here = [i for i, last in enumerate(known) if last.step == step]
    others = [i for i in range(len(known)) if i not in here]
    below = [i for i in others if known[i].update < update]
    if below:
      return max(below, key=lambda i: (known[i].update, _alike(packer, known[i], seen), -known[i].step)), False
    if not here:  # No lower count: another optimizer, or an earlier state of this one.
      is_other = is_young and any(last.update == update for last in known)
      return (len(known) if is_other else 0), False
    # A second push for this step: another optimizer, a repeat, or one step number for many updates.
    if is_young and not any(known[i].update < update for i in here):
      return len(known), False
    nearest = others[0] if others else min(here, key=lambda i: abs(known[i].update - update))
    if nearest in here and known[nearest].update < update:
      self._once.say("one step", _GROW.format(step, known[nearest].update, update))
    return nearest, nearest in here and known[nearest].update >= update

  def _names_of(self, packer: Packer, place: int, step: int) -> dict[str, str]:
    """New names for the states whose names another optimizer already uses."""
    if (packer, place) in self._names:
      return self._names[packer, place]
    taken = {
      names.get(source.name, source.name) for (other, _), names in self._names.items() for source in other.sources
    }
    names = {s.name: _free(s.name, taken) for s in packer.sources if s.name in taken}
    if names:
      old, new = next(iter(names.items()))
      self._once.say(
        "opt_state",
        f"`opt_state` must come from one optimizer, or use its own names, got a second one with '{old}' for step "
        f"{step}: it is recorded as '{new}'; give its clips and watches another name, as in watch(name=\"critic\").",
      )
    self._names[packer, place] = names
    for name, labels in packer.leaves.items():
      self.leaves[_renamed(name, names)] = tuple(labels)
    return names


_GROW = (
  "`step` must increase with every update, got {} for updates {} and {}: only the last update of a step is kept; "
  "push the number of the update as `step`, and an epoch as a scalar. Push two optimizers together, as a dict of their "
  "states."
)


def _alike(packer: Packer, last: _Last, seen: Seen) -> int:
  """How many numbers over all steps so far, such as the worst norm, are unchanged; two optimizers differ in them."""
  so_far = (key for key in packer.metric_keys if packer.quantity_of["metric", key] in SO_FAR)
  return sum(last.metrics.get(key) == seen.metrics.get(key) for key in so_far)


def _free(name: str, taken: set[str]) -> str:
  """The name with the lowest number that makes it free."""
  return next(new for i in itertools.count(2) if (new := f"{name}_{i}") not in taken)


def _renamed(key: str, names: dict[str, str]) -> str:
  """A key or state name under the new name of its state."""
  for old, new in names.items():
    for ending in UNITS:
      if key == old + ending or key.startswith(f"{old}{ending}/"):
        return new + key[len(old) :]
  return key


def _without(
  packer: Packer, unseen: set[int], metrics: dict[str, Any], vectors: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Drops the numbers for this step of states that did not see it; numbers over all steps so far stay."""
  of = packer.source_of
  return (
    {
      key: x
      for key, x in metrics.items()
      if of["metric", key] not in unseen or packer.quantity_of["metric", key] in SO_FAR
    },
    {key: x for key, x in vectors.items() if of["vector", key] not in unseen},
  )


@lru_cache(64)  # Every row asks for them.
def _limits(packer: Packer) -> tuple[str, ...]:
  """The keys of the metrics that are limits."""
  return tuple(key for key in packer.metric_keys if packer.quantity_of["metric", key] in LIMITS)


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
  return all(x == other[key] or (x != x and other[key] != other[key]) for key, x in one.items())  # noqa: PLR0124  (NaN)


def _as_limits(quantity: str, vector: Any) -> Any:
  """In a row, no limit is inf; in a state, the largest float stands for it."""
  return np.where(is_no_limit(vector), math.inf, vector) if quantity in LIMITS else vector
