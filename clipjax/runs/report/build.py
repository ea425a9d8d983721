"""The HTML of a whole report, and the series of the run as JSON. It needs matplotlib.

`write` imports it at the call.
"""

import json
import math
import os
from typing import Any

import numpy as np

import clipjax
from clipjax.quantities import MAX_NORM, NORM, NORM_CLIPPED, SCALE
from clipjax.runs.health.findings import Finding, HealthLimits
from clipjax.runs.health.verdict import diagnose
from clipjax.runs.kinds import Floats
from clipjax.runs.norms import main_name, norms_of_run
from clipjax.runs.report import figures, page, sections
from clipjax.runs.report.series import norm_series
from clipjax.runs.run import Run
from clipjax.runs.schema import TIME, key_of
from clipjax.runs.speed import speed
from clipjax.runs.suggest import suggest_max_norm
from clipjax.runs.words import number, percent

_LARGEST_DATA = 8_000_000  # Bytes of JSON in a page; a browser still opens it at once.


def to_json(run: Run, largest: int) -> tuple[str, list[str]]:
  """`(text, omitted)`: the series as ASCII JSON, numbers to 7 digits, null for what is absent or not finite.

  Keys: `steps`, `columns`, `nonfinite` (key to steps), `leaves`, `vectors` (key to steps and rows, with "inf" for what
  was not finite), `weights`, `parameters`, `omitted`. Series that would make it longer than `largest` are left out, the
  main ones last.
  """
  fields = {"clipjax_report": "1", "version": json.dumps(clipjax.__version__), "parameters": json.dumps(run.parameters)}
  fields |= {"source": json.dumps(os.path.basename(run.path)), "leaves": json.dumps(run.leaves)}
  fields["steps"] = json.dumps(run.steps.tolist())
  fields["nonfinite"] = json.dumps({key: run.steps[mask].tolist() for key, mask in run.flags.items()})
  room = largest - sum(map(len, fields.values()))
  omitted: list[str] = []
  columns: dict[str, str] = {}
  rows: dict[str, str] = {}
  for key in sorted(run.columns, key=lambda key: _rank(run, key)):
    source = _numbers(np.round(run.columns[key], 3) if key == TIME else run.columns[key], 14 if key == TIME else 7)
    room = _keep(columns, omitted, key, source, room)
  for key, (steps, values) in run.vectors.items():
    source = f'{{"steps":{json.dumps(steps.tolist())},"values":[{",".join(map(_by_leaf, values))}]}}'
    room = _keep(rows, omitted, f"{key}/…", source, room)
  fields |= {"columns": _object(columns), "vectors": _object({k.removesuffix("/…"): v for k, v in rows.items()})}
  if run.weights is not None:
    steps, edges, counts = run.weights
    fields["weights"] = f'{{"steps":{json.dumps(steps.tolist())},"edges":{_numbers(edges)},'
    fields["weights"] += f'"counts":[{",".join(map(_numbers, counts))}]}}'
  return _object(fields | {"omitted": json.dumps(omitted)}), omitted


def whole_page(run: Run, limits: HealthLimits | None, warmup_steps: int | None) -> str:
  """The HTML of a run; the limits and the warm-up are those of `diagnose`."""
  data, omitted = to_json(run, _LARGEST_DATA)
  title = f"Training run {os.path.basename(run.path)}".rstrip()
  begin = norms_of_run(run, main_name(run), warmup_steps).begin
  shown = sections.Shown(
    run, norm_series(run, limits, warmup_steps), speed(run, begin), limits if limits is not None else HealthLimits()
  )
  body = [f"<h1>{page.text(title)}</h1>", f'<p class="soft">{_subtitle(run)}</p>', sections.summary(shown)]
  body += [_verdict(run, limits, warmup_steps), _suggestion(run, warmup_steps)]
  parts = sections.all_sections(shown)
  body += [part for part in parts if isinstance(part, str)]
  missing = "".join(f"<li>{part.title}: {part.remedy}</li>" for part in parts if not isinstance(part, str))
  if missing:
    body.append(f"<section><h2>Not in this report</h2><ul>{missing}</ul></section>")
  return page.page(title, "\n".join([*body, _footer(run, omitted)]), data)


def _subtitle(run: Run) -> str:
  steps = f"Step {run.steps[0]:,} to {run.steps[-1]:,}" if len(run) else "No steps"
  return f"{steps}. Written by clipjax {clipjax.__version__}."


def _verdict(run: Run, limits: HealthLimits | None, warmup_steps: int | None) -> str:
  report = diagnose(run, limits=limits, warmup_steps=warmup_steps)
  rows = [_cells(finding) for finding in report]
  table = page.table(("level", "what", "found, rule and source", "what to do"), rows, "findings") if rows else ""
  return f"<section><h2>Verdict: {report.counts()}</h2>{table or '<p>Nothing to report.</p>'}</section>"


def _cells(finding: Finding) -> tuple[str, ...]:
  """A finding as the cells of a row."""
  level = page.text(finding.level)
  rule = f"Rule: {page.text(finding.rule)}." if finding.rule else ""
  rule += f" Source: {page.source(finding.source)}." if finding.source else ""
  found = page.text(finding.message) + (f'<p class="soft">{rule}</p>' if rule else "")
  return f'<span class="level {level}">{level}</span>', page.text(finding.name), found, page.text(finding.advice)


def _suggestion(run: Run, warmup_steps: int | None) -> str:
  try:
    found = suggest_max_norm(run, warmup_steps=warmup_steps)
  except ValueError as error:
    body = f"<p>None: {page.text(str(error))}</p>"
  else:
    body = f'<p class="answer">max_norm = {number(found.max_norm)}</p><p>{page.text(found.reason)}</p>'
    said = [*map(page.text, found.notes), *(f"Source: {page.source(source)}" for source in found.sources)]
    body += f"<ul>{''.join(f'<li>{line}</li>' for line in said)}</ul>"
    pairs = sorted({(found.max_norm, found.clip_fraction), *found.alternatives})
    rows = [(number(value) + " (suggested)" * (value == found.max_norm), percent(share)) for value, share in pairs]
    body += page.table(("max_norm", "would have clipped"), rows, "layers")
  return f"<section><h2>Suggested threshold</h2>{body}</section>"


def _footer(run: Run, omitted: list[str]) -> str:
  said = ["Numbers are of all recorded steps. The series are in this file as JSON, 7 digits each: "]
  said += [page.code('<script type="application/json" id="clipjax-run">'), "."]
  if len(run) > 2 * figures.bins_of(figures.NARROW):
    said.append(" Lines are thinned for drawing: of each small part of the axis the least and the greatest are shown.")
  if omitted:
    said.append(f" Left out of the JSON for its size: {', '.join(map(page.code, omitted))}.")
  return f"<footer><h2>Data</h2><p>{''.join(said)}</p></footer>"


def _numbers(values: Any, digits: int = 7) -> str:
  """A JSON array; NaN and inf become null."""
  return "[" + ",".join(f"{x:.{digits}g}" if math.isfinite(x) else "null" for x in values.tolist()) + "]"


def _by_leaf(values: Floats) -> str:
  """A JSON array of numbers by leaf: "inf" for what was not finite, null for what was not recorded."""
  text = _numbers(values)
  if not np.isinf(values).any():
    return text
  parts = text[1:-1].split(",")
  return "[" + ",".join('"inf"' if x == math.inf else part for x, part in zip(values, parts, strict=True)) + "]"


def _object(fields: dict[str, str]) -> str:
  """A JSON object of values that are JSON already."""
  return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in fields.items()) + "}"


def _keep(into: dict[str, str], omitted: list[str], key: str, source: str, room: int) -> int:
  """Adds a series where there is room for it, and gives the room that is left."""
  if len(source) > room:
    omitted.append(key)
    return room
  into[key] = source
  return room - len(source)


def _rank(run: Run, key: str) -> tuple[int, int]:
  """Main series first: norm and threshold, what the caller pushed, then the rest in their order."""
  main = [key_of(str(main_name(run)), quantity) for quantity in (NORM, MAX_NORM, SCALE, NORM_CLIPPED)]
  rank = 0 if key in main else 1 if "/" not in key else 2
  return rank, list(run.columns).index(key)
