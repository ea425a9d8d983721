"""`View`, the input of every check of `diagnose`.

A check is a function `View -> findings`. It yields nothing if the numbers it needs were not recorded, or if there are
too few steps for its statistics.
"""

import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from clipjax.metric_names import NORM, STEPS
from clipjax.runs.blocks import numbers_by_block
from clipjax.runs.course import Course, course_of
from clipjax.runs.health.events import Event, events_of, leaf_of
from clipjax.runs.health.leaf_spikes import leaf_spikes
from clipjax.runs.health.leaves import Grown, grown
from clipjax.runs.health.limits import HealthLimits
from clipjax.runs.health.series import Spike, spikes_of
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.norms import Norms, column, norms_of_run
from clipjax.runs.roles import Role, judged_states, losses_of, main_loss, role_of
from clipjax.runs.run import Run, rows_before
from clipjax.runs.schema import key_of, name_of
from clipjax.runs.words import at_steps


class Loss(NamedTuple):
  """The training loss: its key, the steps and values that are finite, and how many there were in all."""

  key: str
  steps: Ints
  values: Floats
  total: int

  def course(self) -> Course | None:
    """Its course; None if there are too few values."""
    return course_of(self.steps, self.values, self.total)


class Extent(NamedTuple):
  """The size of the whole run, since a view may hold only its last rows."""

  first_step: int
  rows: int


class View(NamedTuple):
  """The part of a run that a check looks at, with all that several checks need.

  Attributes:
    run: the whole run, its rows before the end of the training, or its last rows.
    name: the judged state; None if no norm was recorded.
    norms: its raw norms.
    limits: where findings begin.
    names: all judged states, the main one first.
    events: spikes, grouped.
    loss: the training loss of the whole run; None if none was recorded.
    extent: the size of the whole run.
    has_ended: whether the training ended right after these rows.
    leaf_spikes: the spikes of single leaves, by state.
  """

  run: Run
  name: str | None
  norms: Norms
  limits: HealthLimits
  names: tuple[str, ...] = ()
  events: tuple[Event, ...] = ()
  loss: Loss | None = None
  extent: Extent = Extent(0, 0)
  has_ended: bool = False
  leaf_spikes: Mapping[str, tuple[Spike, ...]] = MappingProxyType({})

  @property
  def of(self) -> str:
    """The words " of 'name'" for a message; empty for the main state."""
    return f" of {self.name!r}" if self.names and self.name != self.names[0] else ""

  def enough(self, count: int, parts: int = 1) -> bool:
    """Whether this many numbers, split into parts, are enough for statistics."""
    return count >= max(self.limits.min_steps, parts)

  def column(self, key: str) -> Floats:
    """The finite values of a column after the warm-up; empty if it was not recorded."""
    values = column(self.run, key)
    return values[np.isfinite(values) & (self.run.steps >= self.norms.begin)]

  def number(self, quantity: str) -> Floats:
    """The same for a quantity of the judged state."""
    return self.column(key_of(str(self.name), quantity))

  def is_solved(self, step: int) -> bool:
    """Whether the loss is exactly 0 from a step on, as a hinge loss may be: it needs no gradient."""
    if self.loss is None:
      return False
    values = self.loss.values[self.loss.steps >= step]
    return bool(values.size) and not values.any()

  def last(self, name: str | None, quantity: str) -> float | None:
    """The last finite value of a counter of a state; None if there is none."""
    values = column(self.run, key_of(str(name), quantity))
    values = values[np.isfinite(values)]
    return float(values[-1]) if values.size else None

  def steps_taken(self, name: str | None) -> int:
    """How many steps a state has counted; the recorded steps if it has no counter."""
    return max(self.norms.values.size, int(self.last(name, STEPS) or 0))

  def at(self, steps: Ints) -> str:
    """Steps in words, with their batches."""
    if self.run.batches is None:
      return at_steps(steps.tolist())
    return at_steps(steps.tolist(), self.run.batches[np.searchsorted(self.run.steps, steps)].tolist())

  def batches(self, steps: Ints) -> str:
    """The batches of these steps in words, for advice."""
    if steps.size == 1:
      return f"batch of step {steps[0]}"
    return "batches of these steps"

  def blocks(self, name: str, quantity: str) -> tuple[tuple[str, ...], Ints, Floats]:
    """`numbers_by_block` of the run."""
    return numbers_by_block(self.run, name, quantity)


def view_of(run: Run, limits: HealthLimits, warmup_steps: int | None) -> View:
  """The view of a whole run that judges its main state; arguments as in `diagnose`."""
  extent = Extent(int(run.steps[0]) if len(run) else 0, len(run))
  return view_with(run, limits, warmup_steps, spikes_of(run, limits), loss_of(run), extent)


def view_with(
  run: Run,
  limits: HealthLimits,
  warmup_steps: int | None,
  spikes: Iterable[Spike],
  loss: Loss | None,
  extent: Extent,
) -> View:
  """The view of the last rows of a run, with the spikes that detectors found along all of it."""
  # Events need the leaves that grew, which need the norms of the view: build it without events, then add them.
  names = distinct_states(run)
  of_leaves = {name: tuple(leaf_spikes(run, name, limits)) for name in names}
  main = names[0] if names else None
  view = View(run, main, norms_of_run(run, main, warmup_steps), limits, names, (), loss, extent, leaf_spikes=of_leaves)
  found = [*spikes, *itertools.chain.from_iterable(of_leaves.values())]
  return view._replace(events=_with_leaves(view, events_of(run, found, names)))


def loss_of(run: Run) -> Loss | None:
  """The training loss; None if there is none."""
  key = main_loss(run.columns)
  if key is None:
    return None
  steps, values = losses_of(run)
  return Loss(key, steps, values, values.size)


def before(view: View, step: int, warmup_steps: int | None) -> View:
  """The view of the rows before a step."""
  # Cut everything off at the step, and keep only events that were over by then.
  run = rows_before(view.run, step)
  loss = view.loss
  if loss is not None:
    inside = loss.steps < step
    loss = Loss(loss.key, loss.steps[inside], loss.values[inside], loss.total - int((~inside).sum()))
  events = tuple(event for event in view.events if event.end < step)
  norms = norms_of_run(run, view.name, warmup_steps)
  return view._replace(run=run, norms=norms, events=events, loss=loss, has_ended=True)


def views_of(view: View) -> Iterable[View]:
  """One view per judged state, the main state first."""
  yield view
  for name in view.names[1:]:
    yield view._replace(name=name, norms=norms_of_run(view.run, name, view.norms.warmup_steps))


def distinct_states(run: Run) -> tuple[str, ...]:
  """The judged states; of those with equal norms, such as a watch and the clip after it, one."""
  out: dict[str, Floats] = {}
  for name in judged_states(run):
    norms = run.columns[key_of(name, NORM)]
    if not any(np.array_equal(norms, other, equal_nan=True) for other in out.values()):
      out[name] = norms
  return tuple(out)


def _with_leaves(view: View, events: tuple[Event, ...]) -> tuple[Event, ...]:
  """The events with their leaves: those that grew most at the first step of the event with norms by leaf."""
  out = []
  grew = {name: _grew(view, name, events) for name in view.names}
  for event in events:
    found = [grew[name] for name in _states_of(event) if name in grew]
    inside = view.run.steps[slice(*np.searchsorted(view.run.steps, (event.start, event.end + 1)))].tolist()
    # First the leaves that grew most, then those whose own spike joined the event.
    steps = [step for step in inside if any(step in by_step for by_step in found)]
    leaves = [grown.leaf for step in steps[:1] for by_step in found if (grown := by_step.get(step)) is not None]
    leaves += [leaf for move in event.moves if (leaf := leaf_of(move.key)) is not None]
    out.append(event._replace(leaves=tuple(dict.fromkeys(leaves))))
  return tuple(out)


def _grew(view: View, name: str, events: tuple[Event, ...]) -> dict[int, Grown]:
  """The leaf of a state that grew most, by step of the events."""
  rows = [np.searchsorted(view.run.steps, ends) for event in events for ends in ((event.start, event.end),)]
  inside = np.concatenate([np.arange(first, last + 1) for first, last in rows]) if rows else np.zeros(0, np.int64)
  return {leaf.step: leaf for leaf in grown(view.run, name, view.run.steps[inside], view.norms.begin)}


def _states_of(event: Event) -> list[str]:
  """The states whose norms moved in an event."""
  return [name_of(move.key) for move in event.moves if role_of(move.key) == Role.NORM]
