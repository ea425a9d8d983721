"""Marks on the step axes: events, numbered as in their table, and findings that begin at a step."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from clipjax.runs.health.events import Event, Move
from clipjax.runs.health.findings import Finding
from clipjax.runs.kinds import Bools, Ints

MOST = 20  # Events with a number and a row in the table.
_AROUND = 60  # Steps that a close-up shows on each side of its subject.

Kind: TypeAlias = Literal["reached", "caught", "finding"]


class Mark(NamedTuple):
  """Marked steps; `label` is the number of an event or the name of a finding, empty for an event without a number."""

  label: str
  start: int
  end: int
  kind: Kind


def times(move: Move) -> float:
  """Peak over usual value; inf for a nonfinite peak or a usual value that is not > 0."""
  if not math.isfinite(move.peak) or not move.usual > 0:
    return math.inf
  return move.peak / move.usual


def strength(event: Event) -> tuple[bool, float]:
  """Sort key of an event: whether it reached the parameters, then how far its farthest series moved."""
  return not event.is_caught, max(map(times, event.moves), default=0.0)


def numbered(events: Sequence[Event]) -> dict[int, Event]:
  """The strongest events, numbered in step order."""
  # Strength decides which events get a number, the steps decide which number.
  kept = sorted(events, key=strength, reverse=True)[:MOST]
  return dict(enumerate(sorted(kept, key=lambda event: event.start), 1))


def marks_of(events: Sequence[Event], findings: Sequence[Finding]) -> list[Mark]:
  """The marks of all events, numbered ones first, then of each FAIL and WARN that begins at a step."""
  # Events without a number keep their line and band, but have no label.
  known = numbered(events)
  out = [Mark(str(i), event.start, event.end, _fate(event)) for i, event in known.items()]
  chosen = set(map(id, known.values()))
  out += [Mark("", event.start, event.end, _fate(event)) for event in events if id(event) not in chosen]
  return out + [Mark(one.name, one.steps[0], one.steps[0], "finding") for one in begins(events, findings)]


def begins(events: Sequence[Event], findings: Sequence[Finding]) -> list[Finding]:
  """Every FAIL with a step, and every WARN with a step outside all events."""
  found = [finding for finding in findings if finding.level != "INFO" and finding.steps]
  return [one for one in found if one.level == "FAIL" or not inside(events, np.asarray(sorted(one.steps))).all()]


def told_by(finding: Finding, events: dict[int, Event]) -> list[int]:
  """The numbers of the events that contain a step of the finding."""
  steps = np.asarray(finding.steps, np.int64)
  return [i for i, event in events.items() if ((event.start <= steps) & (steps <= event.end)).any()]


def inside(events: Sequence[Event], steps: Ints) -> Bools:
  """Which of the ascending `steps` lie in an event, as a mask."""
  # Steps ascend, so each event is one slice.
  out = np.zeros(steps.size, np.bool_)
  for event in events:
    first, last = np.searchsorted(steps, [event.start, event.end + 1])
    out[first:last] = True
  return out


def focus(events: Sequence[Event], findings: Sequence[Finding], steps: Ints) -> tuple[int, int] | None:
  """First and last step of a close-up, around the first finding with a step, else around the strongest event.

  None if nothing is marked, or if the run is hardly longer than the close-up.
  """
  # Findings are ordered by severity, and the page begins with the first.
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
  # A long event is cut: its beginning shows what moved first.
  last = min(int(last), int(first) + 2 * _AROUND)
  low, high = max(int(first) - _AROUND, 0), min(last + _AROUND, steps.size - 1)
  return (int(steps[low]), int(steps[high])) if steps.size > 3 * (high - low) else None


def _event_at(events: Sequence[Event], step: int) -> Event | None:
  return next((event for event in events if event.start <= step <= event.end), None)


def _fate(event: Event) -> Kind:
  return "caught" if event.is_caught else "reached"
