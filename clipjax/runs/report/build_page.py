"""Builds the HTML of a whole report, from the first screen to the data.

It needs matplotlib, so `write` imports it only when a report is written.
"""

import datetime
import os

import numpy as np

import clipjax
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.limits import HealthLimits
from clipjax.runs.health.verdict import HealthReport
from clipjax.runs.norms import column
from clipjax.runs.report import axes, data, html
from clipjax.runs.report.course import course
from clipjax.runs.report.happened import events_table, first_screen, worst_of
from clipjax.runs.report.html import code, text
from clipjax.runs.report.sections import all_sections, long_time, summary
from clipjax.runs.report.shown import Section, Shown, shown_of
from clipjax.runs.run import Run
from clipjax.runs.schema import TIME
from clipjax.runs.suggest import Suggestion, suggest_max_norm
from clipjax.runs.words import number, percent


def whole_page(
  run: Run,
  report: HealthReport,
  suggestion: Suggestion | None = None,
  limits: HealthLimits | None = None,
  warmup_steps: int | None = None,
) -> str:
  """The HTML of a run and its verdict, which `diagnose` made with the same `limits` and `warmup_steps`.

  Without a suggestion, `suggest_max_norm` makes one with its default options.
  """
  series, omitted = data.to_json(run, data.LARGEST)
  title = f"Training run {os.path.basename(run.path)}".rstrip()
  shown = shown_of(run, report, limits, warmup_steps)
  # From what happened, to what to change, to everything that was measured.
  parts: list[Section] = [*course(shown), events_table(report.events), _worst(shown)]
  parts += [_suggestion(run, suggestion, warmup_steps), *all_sections(shown), _verdict(report)]
  body = [f"<h1>{text(title)}</h1>", f'<p class="soft">{_subtitle(run)}</p>', first_screen(report), summary(shown)]
  body += [part for part in parts if isinstance(part, str)]
  missing = "".join(f"<li>{part.title}: {part.remedy}</li>" for part in parts if not isinstance(part, str))
  if missing:
    body.append(f"<section><h2>Not in this report</h2><ul>{missing}</ul></section>")
  return html.page(title, "\n".join([*body, _footer(run, omitted)]), series)


def _subtitle(run: Run) -> str:
  """Date, duration, steps and optimizer."""
  said = [_when(run)]
  said.append(f"Step {run.steps[0]:,} to {run.steps[-1]:,}." if len(run) else "No steps.")
  if run.optimizer:
    said.append(f"Optimizer states: {', '.join(map(code, run.optimizer))}.")
  return " ".join([*filter(None, said), f"Written by clipjax {clipjax.__version__}."])


def _when(run: Run) -> str:
  """Date and duration; empty if the run has no valid times."""
  time = column(run, TIME)
  time = time[np.isfinite(time)]
  if not time.size:
    return ""
  try:
    start = datetime.datetime.fromtimestamp(float(time.min()), datetime.UTC)
  except (OverflowError, ValueError, OSError):
    return ""
  lasted = f", {long_time(float(time.max() - time.min()))}" if time.size > 1 else ""
  return f"{start:%Y-%m-%d %H:%M} UTC{lasted}."


def _worst(shown: Shown) -> str:
  """The worst step of each judged state."""
  found = "".join(filter(None, (worst_of(shown.run, series, shown.report) for series in shown.norms)))
  is_bad = shown.report.events or any(finding.level != "INFO" for finding in shown.report)
  title = "Worst step" if is_bad else "Largest norm"
  return f"<section><h2>{title}</h2>{found}</section>" if found else ""


def _verdict(report: HealthReport) -> str:
  rows = [_cells(finding) for finding in report]
  table = html.table(("level", "what", "found, rule and source", "what to do"), rows, "findings") if rows else ""
  counts = f'<h2 id="verdict">Verdict: {report.counts()}</h2>'
  return f"<section>{counts}{table or '<p>Nothing to report.</p>'}</section>"


def _cells(finding: Finding) -> tuple[str, ...]:
  """A finding as the cells of a table row."""
  level = text(finding.level)
  rule = f"Rule: {text(finding.rule)}." if finding.rule else ""
  rule += f" Source: {html.source(finding.source)}." if finding.source else ""
  found = text(finding.message) + (f'<p class="soft">{rule}</p>' if rule else "")
  return f'<span class="level {level}">{level}</span>', text(finding.name), found, text(finding.advice)


def _suggestion(run: Run, found: Suggestion | None, warmup_steps: int | None) -> str:
  try:
    found = found or suggest_max_norm(run, warmup_steps=warmup_steps)
  except ValueError as error:
    body = f"<p>None: {text(str(error))}</p>"
  else:
    body = f'<p class="answer">max_norm = {number(found.max_norm)}</p><p>{text(found.reason)}</p>'
    said = [*map(text, found.notes), *(f"Source: {html.source(source)}" for source in found.sources)]
    body += f"<ul>{''.join(f'<li>{line}</li>' for line in said)}</ul>"
    pairs = sorted({(found.max_norm, found.clip_fraction), *found.alternatives})
    rows = [(number(value) + " (suggested)" * (value == found.max_norm), percent(share)) for value, share in pairs]
    body += html.table(("max_norm", "would have clipped"), rows, "layers")
  return f"<section><h2>Suggested threshold</h2>{body}</section>"


def _footer(run: Run, omitted: list[str]) -> str:
  said = ["All numbers cover every recorded step. This file contains the series as JSON with 7 digits: "]
  said += [code('<script type="application/json" id="clipjax-run">'), "."]
  if len(run) > 2 * axes.bins_of(axes.NARROW):
    said.append(" Lines are thinned for drawing: each small part of the axis shows its smallest and its largest value.")
  if omitted:
    said.append(f" Left out of the JSON because of its size: {', '.join(map(code, omitted))}.")
  return f"<footer><h2>Data</h2><p>{''.join(said)}</p></footer>"
