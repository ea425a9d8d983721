"""What the states of a push say of its step: under which names, and without what is of another step.

Where a wrapper rejected the step, the states inside it have not seen it and repeat the step before: their numbers of a
step are left out then, and what they say of all steps so far stays. Two optimizers of one name that are pushed for one
step get names of their own.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from clipjax.quantities import CONSECUTIVE, LIMITS, SO_FAR
from clipjax.rules.base import is_no_limit
from clipjax.runs.record.packing import Packer, Ring, Seen
from clipjax.runs.schema import key_of


class Measured(NamedTuple):
  """What was measured at a step.

  Attributes:
    update: how many updates the outermost state has counted; None without any state.
    metrics: numbers by key.
    vectors: numbers by leaf or group, by `<name>/<quantity>`.
    rings: the last norms of watches, by name.
  """

  update: int | None
  metrics: dict[str, Any]
  vectors: dict[str, Any]
  rings: dict[str, Ring]


NOTHING = Measured(None, {}, {}, {})


class _Pushed(NamedTuple):
  """A state that was pushed for the step at hand."""

  packer: Packer
  counts: tuple[int, ...]
  metrics: dict[str, Any]


class States:
  """Tells what each push has measured, by what those before it had."""

  def __init__(self, warn: Callable[[str], None]):
    self._warn = warn
    self._step: int | None = None
    self._of_step: list[_Pushed] = []
    self._names: dict[tuple[Packer, int], dict[str, str]] = {}  # New names of each packer and its place in a step.
    self._counts: dict[tuple[Packer, int], tuple[int, ...]] = {}
    self._said: set[str] = set()
    self.leaves: dict[str, tuple[str, ...]] = {}  # By the name of a state, as recorded.

  def measured(self, packer: Packer, seen: Seen, step: int) -> Measured:
    """What a push for `step` has measured."""
    if not packer.sources:
      return NOTHING
    place = self._place(packer, seen, step)
    names, before = self._names[packer, place], self._counts.get((packer, place))
    self._counts[packer, place] = seen.counts
    update = max(seen.counts)
    if not update:  # Before the first update nothing has been measured.
      return Measured(0, {}, {}, {})
    metrics, vectors, rings = seen.metrics, seen.vectors, seen.rings
    if unseen := self._unseen(packer, seen, before):
      metrics, vectors = _without(packer, unseen, metrics, vectors)
    metrics = metrics | {key: math.inf for key in _limits(packer) if key in metrics and is_no_limit(metrics[key])}
    vectors = {key: _as_limits(packer.quantity_of["vector", key], vector) for key, vector in vectors.items()}
    if names:
      metrics = {_renamed(key, names): x for key, x in metrics.items()}
      vectors = {_renamed(key, names): x for key, x in vectors.items()}
      rings = {_renamed(key, names): x for key, x in rings.items()}
    return Measured(update, metrics, vectors, rings)

  def _unseen(self, packer: Packer, seen: Seen, before: tuple[int, ...] | None) -> set[int]:
    """The places of states that have not seen this step."""
    out = set()
    for i, source in enumerate(packer.sources):
      around = source.skip
      is_rejected = around is not None and seen.metrics.get(key_of(around.name, CONSECUTIVE), 0) > 0
      if is_rejected or seen.counts[i] == 0 or (before is not None and seen.counts[i] == before[i]):
        out.add(i)
    return out

  def _place(self, packer: Packer, seen: Seen, step: int) -> int:
    """Which state of one structure this is among those that are pushed for one step: 0 but for a second optimizer."""
    if step != self._step:
      self._step, self._of_step = step, []
    alike = [i for i, other in enumerate(self._of_step) if other.packer is packer]
    place = len(alike)
    for position, i in enumerate(alike):
      other = self._of_step[i]
      if other.counts != seen.counts or _are_equal(other.metrics, seen.metrics):
        if max(seen.counts) > max(other.counts):
          self._say(_GROW.format(step, max(other.counts), max(seen.counts)))
        place = position
        self._of_step[i] = _Pushed(packer, seen.counts, seen.metrics)
        break
    else:
      self._of_step.append(_Pushed(packer, seen.counts, seen.metrics))
    if (packer, place) not in self._names:
      self._names[packer, place] = self._new_names(packer, place, step)
    return place

  def _new_names(self, packer: Packer, place: int, step: int) -> dict[str, str]:
    """The names of its states that another state has in this step, with new ones."""
    others = [other for other in self._of_step[:-1] if other.packer is not packer or place > 0]
    taken = {source.name for other in others for source in other.packer.sources}
    names = {s.name: f"{s.name}_{len(others) + 1}" for s in packer.sources if s.name in taken}
    if names:
      old, new = next(iter(names.items()))
      self._say(
        f"`opt_state` must be of one optimizer, or have names of its own, got a second one with '{old}' for step "
        f"{step}: it is recorded as '{new}'; give its clips and watches another name, as in watch(name=\"critic\")."
      )
    for name, labels in packer.leaves.items():
      new = _renamed(name, names)
      self.leaves[new] = tuple(labels)
    return names

  def _say(self, text: str) -> None:
    kind = text[:40]
    if kind not in self._said:
      self._said.add(kind)
      self._warn(text)


_GROW = (
  "`step` must grow from update to update, got {} for updates {} and {}: of one step the last update alone is "
  "kept; push "
  "the number of the update, and an epoch as a scalar."
)


def _renamed(key: str, names: dict[str, str]) -> str:
  """A key, or the name of a state, with the new name of the state."""
  for old, new in names.items():
    for ending in ("", "_group", "_leaf"):
      if key == old + ending or key.startswith(f"{old}{ending}/"):
        return new + key[len(old) :]
  return key


def _without(
  packer: Packer, unseen: set[int], metrics: dict[str, Any], vectors: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Leaves out what states that have not seen this step say of a step."""
  of = packer.source_of
  return (
    {
      key: x
      for key, x in metrics.items()
      if of["metric", key] not in unseen or packer.quantity_of["metric", key] in SO_FAR
    },
    {key: x for key, x in vectors.items() if of["vector", key] not in unseen},
  )


@lru_cache(64)  # Each row asks for them.
def _limits(packer: Packer) -> tuple[str, ...]:
  """The metrics that are limits."""
  return tuple(key for key in packer.metric_keys if packer.quantity_of["metric", key] in LIMITS)


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
  return all(x == other[key] or (x != x and other[key] != other[key]) for key, x in one.items())  # noqa: PLR0124  (NaN)


def _as_limits(quantity: str, vector: Any) -> Any:
  """No limit is inf in a row, not the largest number, which stands for it in a state."""
  return np.where(is_no_limit(vector), math.inf, vector) if quantity in LIMITS else vector
