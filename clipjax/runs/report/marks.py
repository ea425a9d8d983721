"""What is marked on the axes of steps: events, numbered as in their table, and findings that begin at a step."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from clipjax.runs.health.events import Event, Move
from clipjax.runs.health.findings import Finding
from clipjax.runs.kinds import Bools, Ints

MOST = 20  # Events that get a number, and a row of the table.
_AROUND = 60  # Steps before and after what a close-up shows.

Kind: TypeAlias = Literal["reached", "caught", "finding"]


class Mark(NamedTuple):
  """Steps that are marked: the number of an event or the name of a finding, empty where it has none."""

  label: str
  start: int
  end: int
  kind: Kind


def times(move: Move) -> float:
  """How many times its usual value a series had; inf where it was not finite, or where the usual value is not > 0."""
  if not math.isfinite(move.peak) or not move.usual > 0:
    return math.inf
  return move.peak / move.usual


def strength(event: Event) -> tuple[bool, float]:
  """What orders events: whether it reached the parameters, then how far the farthest series moved."""
  return not event.is_caught, max(map(times, event.moves), default=0.0)


def numbered(events: Sequence[Event]) -> dict[int, Event]:
  """The strongest events by number, which follows the steps."""
  kept = sorted(events, key=strength, reverse=True)[:MOST]
  return dict(enumerate(sorted(kept, key=lambda event: event.start), 1))


def marks_of(events: Sequence[Event], findings: Sequence[Finding]) -> list[Mark]:
  """The marks of all events, those with a number first, and of what FAIL and WARN say begins at a step."""
  known = numbered(events)
  out = [Mark(str(i), event.start, event.end, _fate(event)) for i, event in known.items()]
  chosen = set(map(id, known.values()))
  out += [Mark("", event.start, event.end, _fate(event)) for event in events if id(event) not in chosen]
  return out + [Mark(one.name, one.steps[0], one.steps[0], "finding") for one in begins(events, findings)]


def begins(events: Sequence[Event], findings: Sequence[Finding]) -> list[Finding]:
  """Every FAIL that has a step, and every WARN that has one of which no event tells."""
  found = [finding for finding in findings if finding.level != "INFO" and finding.steps]
  return [one for one in found if one.level == "FAIL" or not inside(events, np.asarray(sorted(one.steps))).all()]


def told_by(finding: Finding, events: dict[int, Event]) -> list[int]:
  """The numbers of the events in which a finding has a step."""
  steps = np.asarray(finding.steps, np.int64)
  return [i for i, event in events.items() if ((event.start <= steps) & (steps <= event.end)).any()]


def inside(events: Sequence[Event], steps: Ints) -> Bools:
  """Which of some ascending steps are in an event."""
  out = np.zeros(steps.size, np.bool_)
  for event in events:
    first, last = np.searchsorted(steps, [event.start, event.end + 1])
    out[first:last] = True
  return out


def focus(events: Sequence[Event], findings: Sequence[Finding], steps: Ints) -> tuple[int, int] | None:
  """The steps of a close-up: around the first finding that has a step, else the strongest event.

  None where nothing is marked, or where the run is hardly longer.
  """
  found = [finding for finding in findings if finding.level != "INFO" and finding.steps]
  if found:
    start = found[0].steps[0]
    at = _event_at(events, start)
    start, end = (at.start, at.end) if at is not None else (start, start)
  elif events:
    event = max(events, key=strength)
    start, end = event.start, event.end
  else:
    return None
  first, last = np.searchsorted(steps, [start, end])
  last = min(int(last), int(first) + 2 * _AROUND)  # The beginning of a long one tells what moved first.
  low, high = max(int(first) - _AROUND, 0), min(last + _AROUND, steps.size - 1)
  return (int(steps[low]), int(steps[high])) if steps.size > 3 * (high - low) else None


def _event_at(events: Sequence[Event], step: int) -> Event | None:
  return next((event for event in events if event.start <= step <= event.end), None)


def _fate(event: Event) -> Kind:
  return "caught" if event.is_caught else "reached"
