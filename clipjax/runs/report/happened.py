"""What happened, in words: the first screen, the table of events, and the layers of the worst step."""

import math
from collections.abc import Sequence

import numpy as np

from clipjax.runs.health.events import Event, Move
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.verdict import HealthReport
from clipjax.runs.report import html
from clipjax.runs.report.html import code, text
from clipjax.runs.report.marks import MOST, begins, numbered, times, told_by
from clipjax.runs.report.series import NormSeries
from clipjax.runs.report.worst import Layer, worst_step
from clipjax.runs.run import Run
from clipjax.runs.words import number

_MOST_SAID = 3  # Findings on the first screen.
_MOST_NAMED = 3  # Leaves, or batches, in a row of the table.
_MOST_LAYERS = 5  # Layers of the worst step.
APPLIED = "nonfinite"  # The finding about nonfinite steps that nothing dropped.


def first_screen(report: HealthReport) -> str:
  """The strongest findings in large type, each with what to do; without a finding, a line that says so."""
  found = [finding for finding in report if finding.level != "INFO"]
  if not found:
    return '<p class="lead">No problem was found.</p>'
  events = numbered(report.events)
  said = "".join(_said(finding, _marked(finding, report, events)) for finding in found[:_MOST_SAID])
  if (left := len(found) - _MOST_SAID) > 0:
    more = f"{left} more finding{'s' if left > 1 else ''} (FAIL or WARN)"
    said += f'<p class="soft">{more}: see the <a href="#verdict">whole verdict</a>.</p>'
  return said


def _said(finding: Finding, marked: Sequence[str]) -> str:
  level = text(finding.level)
  body = f'<p class="lead"><span class="level {level}">{level}</span> {text(finding.message)}</p>'
  if finding.advice:
    body += f"<p><strong>What to do:</strong> {text(finding.advice)}</p>"
  if marked:
    which = ", ".join(f"<strong>{text(mark)}</strong>" for mark in marked)
    body += f'<p class="soft">Marked in the timeline as {which}.</p>'
  return f'<div class="said {level}">{body}</div>'


def _marked(finding: Finding, report: HealthReport, events: dict[int, Event]) -> list[str]:
  """The marks of a finding: its own name, and the numbers of events."""
  is_named = any(finding is one for one in begins(report.events, report.findings))
  return [*([finding.name] if is_named else []), *map(str, told_by(finding, events))]


def events_table(events: Sequence[Event]) -> str:
  """The strongest events in step order; empty without events."""
  if not events:
    return ""
  rows = [
    (f"<strong>{i}</strong>", _steps(event), _moves(event.moves), _few(event.leaves), _few(event.batches), _end(event))
    for i, event in numbered(events).items()
  ]
  head = ("no.", "steps", "what moved, first to last", "layers that grew most", "batch", "outcome")
  kept = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows)]
  table = html.table([head[i] for i in kept], [[row[i] for i in kept] for row in rows], "events")
  count = "1 event" if len(events) == 1 else f"{len(events):,} events"
  count += f"; the table lists the {MOST} strongest" if len(events) > MOST else ""
  said = f'<p class="soft">{count}, in step order. The usual value is the median before the event.</p>'
  return f"<section><h2>Events</h2>{said}{table}</section>"


def _steps(event: Event) -> str:
  return f"{event.start:,}" if event.start == event.end else f"{event.start:,} to {event.end:,}"


def _moves(moves: Sequence[Move]) -> str:
  """One line per series; later ones say how many steps after the first they moved."""
  lines = []
  for move in moves:
    after = move.step - moves[0].step
    when = f", {after:,} step{'s' if after > 1 else ''} later" if after > 0 else ""
    lines.append(f"<li>{code(move.key)} {how_far(move)}{when}</li>")
  return f"<ul>{''.join(lines)}</ul>"


def how_far(move: Move) -> str:
  """The peak of a series in an event, compared with its usual value."""
  if not math.isfinite(move.peak):
    return f"nonfinite, usually {number(move.usual)}"
  if math.isfinite(times(move)):
    return f"{number(move.peak)}, {number(times(move))} times the usual {number(move.usual)}"
  return f"{number(move.peak)}, usually {number(move.usual)}"


def _few(names: Sequence[object]) -> str:
  """The first few names, and how many more there are."""
  shown = ", ".join(map(code, names[:_MOST_NAMED]))
  return shown + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")


def _end(event: Event) -> str:
  """Whether the event reached the parameters, and whether the loss recovered."""
  said = "caught" if event.is_caught else "reached the parameters"
  loss = {None: "", True: "; the loss recovered", False: "; the loss did not recover"}[event.is_recovered]
  return said + loss


def worst_of(run: Run, series: NormSeries, report: HealthReport) -> str:
  """The worst step of a state, with its layers."""
  applied = [step for finding in report if finding.name == APPLIED for step in finding.steps]
  worst = worst_step(run, series, report.events, applied)
  if worst is None:
    return ""
  key = code(series.key)
  if not math.isfinite(worst.norm):
    said = f"the first nonfinite step of {key}"
  elif worst.norm < np.nanmax(series.norm):
    said = f"the largest norm in an event that reached the parameters: {key} {number(worst.norm)}"
  else:
    said = f"the largest norm: {key} {number(worst.norm)}"
  body = f"<p>Step <strong>{worst.step:,}</strong>, {said}.</p>"
  if worst.layers:
    return body + _layer_table(worst.layers)
  if series.rejected[run.steps == worst.step].any():
    return f"{body}<p>{code('skip_steps')} rejected it, and a {code('clipjax.watch()')} inside did not see it.</p>"
  return f"{body}<p>Its layers were not recorded: chain {code('clipjax.watch()')} first to keep them.</p>"


def _layer_table(layers: Sequence[Layer]) -> str:
  shown = layers[:_MOST_LAYERS]
  known = any(math.isfinite(layer.times) for layer in shown)
  rows = []
  for layer in shown:
    cells = [code(layer.name), number(layer.norm) if math.isfinite(layer.norm) else "nonfinite"]
    times_usual = number(layer.times) if math.isfinite(layer.times) else ""
    rows.append([*cells, times_usual] if known else cells)
  return html.table(("layer", "norm", *(["times the usual"] if known else [])), rows, "layers")
