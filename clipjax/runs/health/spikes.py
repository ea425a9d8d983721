"""Spikes of norms, losses and updates, and what to do about them.

`spikes` reports the events that reached the parameters, `spikes-caught` those that did not, `update-spike` those that
began with the learning rate.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from clipjax.metric_names import CLIP_FRACTION, MAX_NORM, NORM
from clipjax.runs.course import NORMAL
from clipjax.runs.health.events import Event, leaf_of
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.losses import lost_with
from clipjax.runs.health.view import View
from clipjax.runs.health.words import batches_of, rates_at, restore, told
from clipjax.runs.norms import column
from clipjax.runs.roles import Role, role_of
from clipjax.runs.schema import key_of
from clipjax.runs.sources import HAMPEL, OLMO_2
from clipjax.runs.words import number

_DOUBLE = 2  # An event of losses that are not trained counts only from this many times the usual.
_PART = 0.1  # A leaf spike counts only if the leaf holds more than this part of the norm.
_FAR = 3  # A limit above this many times the 90th percentile catches little.
_TOLD = 3  # A message describes this many events and counts the rest.


def spikes(view: View) -> Iterator[Finding]:
  """WARN for events that reached the parameters, INFO for those that a clip or `skip_steps` caught."""
  caught = [event for event in view.events if event.is_caught]
  # An event belongs to one finding: `update_spikes` and `rising_loss` report their own.
  lost = lost_with(view)
  free = [event for event in view.events if not (event.is_caught or event.is_of_rate or event is lost)]
  free = [event for event in free if not _is_aside(view, event)]
  if free:
    message = _words(view, free, "{} reached the parameters")
    advice = _advice(view, free)
    yield Finding("WARN", "spikes", message, advice, _rule(view), str(HAMPEL), _steps(free), _leaves(free))
  if caught:
    message = _words(view, caught, "The clip or skip_steps caught {}")
    yield Finding("INFO", "spikes-caught", message, "", _rule(view), str(HAMPEL), _steps(caught), _leaves(caught))


def update_spikes(view: View) -> Iterator[Finding]:
  """WARN for updates that jumped while the gradient was normal."""
  found = [event for event in view.events if event.is_of_rate]
  if not found:
    return
  message = _words(view, found, "{} began with the update, not the gradient")
  message += rates_at(view.run, found[0].first.step)
  advice = "Check the learning rate and its schedule at these steps."
  if bad := [event for event in found if event.is_recovered is False]:
    advice += f" {restore([bad[0].start])}"
  yield Finding("WARN", "update-spike", message, advice, _rule(view), str(HAMPEL), _steps(found))


def spikes_of_leaves(view: View) -> Iterator[Finding]:
  """INFO for leaf spikes of leaves that matter, outside of events."""
  found: list[tuple[float, int, str]] = []
  for name, some in view.leaf_spikes.items():
    norms = dict(zip(view.run.steps.tolist(), column(view.run, key_of(name, NORM)).tolist(), strict=True))
    for spike in some:
      inside = any(event.start <= spike.step <= event.end for event in view.events)
      if not inside and spike.value > _PART * norms[spike.step]:
        found.append((spike.value / spike.usual, spike.step, str(leaf_of(spike.key))))
  if not found:
    return
  times, step, leaf = max(found)
  count = f"{len(found)} leaf spikes" if len(found) > 1 else "1 leaf spike"
  message = f"{count} while the norm was normal; the largest at step {step}, where {leaf!r} was {number(times)} times "
  message += "its usual norm."
  steps = tuple(sorted({step for _, step, _ in found}))
  leaves = tuple(dict.fromkeys(leaf for *_, leaf in sorted(found, reverse=True)))
  yield Finding("INFO", "spikes-of-leaves", message, "", _rule(view), str(HAMPEL), steps, leaves)


def spike_rate(view: View) -> Iterator[Finding]:
  """INFO: how often events occur, a rate that large runs are watched by."""
  if not view.events or not view.enough(len(view.run)):
    return
  rate = 1000 * len(view.events) / len(view.run)
  message = f"{number(rate)} spikes per 1000 recorded steps: {len(view.events)} in {len(view.run):,}."
  yield Finding("INFO", "spike-rate", message, "Compare it from run to run.", source=str(OLMO_2))


def _is_aside(view: View, event: Event) -> bool:
  """Whether an event has only losses that are not trained, and none reached twice its usual value."""
  main = None if view.loss is None else view.loss.key
  roles = {role_of(move.key) for move in event.moves}
  is_other = roles <= {Role.LOSS, Role.VALIDATION} and all(move.key != main for move in event.moves)
  return is_other and size(event) < _DOUBLE


def size(event: Event) -> float:
  """How far an event went: the largest peak of a series over its usual value."""
  return max(move.peak / move.usual if move.usual > 0 else np.inf for move in event.moves)


def _words(view: View, events: Sequence[Event], text: str) -> str:
  """The text with the number of events in it, and a sentence for each of the largest."""
  count = len(events)
  among = list(chain.from_iterable(view.run.leaves.get(name, ()) for name in view.names))
  shown = sorted(sorted(events, key=size, reverse=True)[:_TOLD], key=lambda event: event.start)
  steps = view.at(np.array([event.start for event in events]))
  head = f"{text.format('1 spike')}." if count == 1 else f"{text.format(f'{count} spikes')}, {steps}. The largest:"
  return " ".join([head, *(told(event, among) for event in shown)])


def _advice(view: View, events: Sequence[Event]) -> str:
  """One thing to do: go back if the loss did not recover, else keep such steps out from now on."""
  # An event that the loss did not recover from outranks a larger one that it did.
  lost = [event for event in events if event.is_recovered is False]
  worst = max(lost or events, key=size)
  batches = batches_of(worst)
  if all(role_of(move.key) in (Role.LOSS, Role.VALIDATION) for event in events for move in event.moves):
    back = restore([worst.start]) if lost else "The norm was normal, so a clip cannot help."
    return f"{back} Look at {batches}."
  # A norm moved. Nothing is called sound unless the loss is known to have recovered.
  text = f"Look at {batches}."
  if lost:
    text = f"{restore([worst.start])} Leave out {batches}."
  elif not view.has_ended and all(event.is_recovered for event in events):
    text = f"Nothing needs to be restored. {text}"
  return f"{text} {_clip_advice(view)}"


def _clip_advice(view: View) -> str:
  """How to catch the next spike."""
  name, typical = str(view.name), view.norms.typical
  limits = view.column(key_of(name, MAX_NORM))
  is_idle = not view.last(name, CLIP_FRACTION)
  if limits.size and typical.size and is_idle and limits.min() > _FAR * np.percentile(typical, 90):
    limit, usual = number(float(limits.min())), number(float(np.median(typical)))
    return f"max_norm is {limit}, the typical norm {usual}: lower it to the value from clipjax.runs.suggest_max_norm."
  return "A clip just above the typical norm (clipjax.runs.suggest_max_norm) catches the next one."


def _rule(view: View) -> str:
  return (
    f"at most {view.limits.spike_sigma:g} deviations above the median of the {view.limits.spike_window} values before; "
    f"a deviation is {NORMAL:g} median absolute deviations"
  )


def _steps(events: Sequence[Event]) -> tuple[int, ...]:
  return tuple(event.start for event in events)


def _leaves(events: Sequence[Event]) -> tuple[str, ...]:
  return tuple(dict.fromkeys(leaf for event in events for leaf in event.leaves))
