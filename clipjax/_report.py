"""A recorded run as one HTML file, or its norm as one figure. Reads a `Run`: numpy, no JAX; matplotlib at the call.

The file needs no network and runs no script: the verdict, the suggestion, the figures as SVG and the raw series as JSON
are in it. The parts: `_report_series` takes the numbers out of the run, `_report_figures` draws, `_report_sections`
words, `_report_page` escapes and styles.
"""

import errno
import importlib
import json
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax import _health, _suggest
from clipjax._report_series import norm_series
from clipjax._run import Run, checked_path
from clipjax._run_norms import main_name
from clipjax._words import described, number, percent

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_LARGEST_DATA = 8_000_000  # Bytes of JSON in a page; a browser still opens it at once.


def plot_norms(run: Run) -> "Figure":
  r"""The norm before the clip against the step, on a log axis, with the threshold; bad steps are marked.

  Triangles are clipped steps, crosses those whose norm was inf or NaN, dots at the bottom norms of 0; a gap in the
  line is a step without a finite norm. A long run is thinned for drawing, and every spike stays.

  Args:
    run: from `clipjax.read_run`.

  Returns:
    A `matplotlib.figure.Figure` that pyplot does not know: call its `savefig`, or show it under `%matplotlib inline`.

  Raises:
    TypeError: if `run` is no `Run`.
    ValueError: if it has no norm.
    ImportError: without matplotlib, the extra `report`.

  Example:
    >>> import tempfile, pathlib, clipjax
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
    >>> rows = '{"clipjax_run": 1, "leaves": {}, "parameters": 2}', '{"step": 1, "grad/norm": 3.0}'
    >>> _ = path.write_text("\n".join(rows) + "\n")
    >>> clipjax.plot_norms(clipjax.read_run(path)).axes[0].get_ylabel()
    'grad/norm'
  """
  _check(run)
  series = norm_series(run)
  if series is None:
    raise ValueError(f"`run` must have a norm, got {sorted(run.columns)}: chain clipjax.watch() or a clip, and push.")
  figure: Figure = _module("_report_figures").norms(series)
  return figure


def write_report(run: Run, path: str | os.PathLike[str]) -> pathlib.Path:
  r"""Writes a run as one HTML page that needs no network: verdict, suggested threshold, figures, raw series.

  It opens on a phone and in dark mode, runs no script, and every name is escaped. What was not recorded is left out,
  with a line that says how to get it. A long run is thinned for drawing only, and the page says so; a series
  that would make the file larger than about 10 MB stays out of the JSON, and the page names it. The JSON has 7 digits.

  Args:
    run: from `clipjax.read_run`.
    path: of the file, replaced at once where it exists: no reader sees half a page.

  Returns:
    `path`, as a `pathlib.Path`.

  Raises:
    TypeError: if `run` is no `Run`, or `path` no path.
    ValueError: if `path` is the file of the run itself.
    OSError: if the file cannot be written; its directory must exist.
    ImportError: without matplotlib, the extra `report`.

  Example:
    >>> import tempfile, pathlib, clipjax
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
    >>> rows = '{"clipjax_run": 1, "leaves": {}, "parameters": 2}', '{"step": 1, "grad/norm": 3.0}'
    >>> _ = path.write_text("\n".join(rows) + "\n")
    >>> clipjax.write_report(clipjax.read_run(path), path.with_suffix(".html")).name
    'run.html'
  """
  _check(run)
  target = pathlib.Path(checked_path(path))
  if target.exists() and os.path.exists(run.path) and target.samefile(run.path):
    raise ValueError(f"`path` must be another file than that of the run, got {str(path)!r}: name one for the page.")
  if target.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  if not target.parent.is_dir():
    raise FileNotFoundError(errno.ENOENT, "the directory of the report does not exist, make it first", str(path))
  _write(target, _page(run).encode("ascii", "xmlcharrefreplace"))
  return target


def to_json(run: Run, largest: int) -> tuple[str, list[str]]:
  """`(text, omitted)`: the series as ASCII JSON, numbers to 7 digits, null for what is absent or not finite.

  Keys: `steps`, `columns`, `nonfinite` (key to steps), `leaves`, `vectors` (key to steps and rows), `weights`,
  `parameters`, `omitted`. Series that would make it longer than `largest` are left out, the main ones last.
  """
  fields = {"clipjax_report": "1", "version": json.dumps(_version()), "parameters": json.dumps(run.parameters)}
  fields |= {"source": json.dumps(os.path.basename(run.path)), "leaves": json.dumps(run.leaves)}
  fields["steps"] = json.dumps(run.steps.tolist())
  fields["nonfinite"] = json.dumps({key: run.steps[mask].tolist() for key, mask in run.flags.items()})
  room = largest - sum(map(len, fields.values()))
  omitted: list[str] = []
  columns: dict[str, str] = {}
  rows: dict[str, str] = {}
  for key in sorted(run.columns, key=lambda key: _rank(run, key)):
    source = _numbers(np.round(run.columns[key], 3) if key == "time" else run.columns[key], 14 if key == "time" else 7)
    room = _keep(columns, omitted, key, source, room)
  for key, (steps, values) in run.vectors.items():
    source = f'{{"steps":{json.dumps(steps.tolist())},"values":[{",".join(map(_numbers, values))}]}}'
    room = _keep(rows, omitted, f"{key}/…", source, room)
  fields |= {"columns": _object(columns), "vectors": _object({k.removesuffix("/…"): v for k, v in rows.items()})}
  if run.weights is not None:
    steps, edges, counts = run.weights
    fields["weights"] = f'{{"steps":{json.dumps(steps.tolist())},"edges":{_numbers(edges)},'
    fields["weights"] += f'"counts":[{",".join(map(_numbers, counts))}]}}'
  return _object(fields | {"omitted": json.dumps(omitted)}), omitted


def _page(run: Run) -> str:
  """The HTML of a run."""
  page, sections = _module("_report_page"), _module("_report_sections")
  data, omitted = to_json(run, _LARGEST_DATA)
  title = f"Training run {os.path.basename(run.path)}"
  body = [f"<h1>{page.text(title)}</h1>", f'<p class="soft">{_subtitle(run)}</p>', sections.summary(run)]
  body += [_verdict(run, page), _suggestion(run, page)]
  parts = sections.all_sections(run)
  body += [part for part in parts if isinstance(part, str)]
  missing = "".join(f"<li>{part.title}: {part.remedy}</li>" for part in parts if not isinstance(part, str))
  if missing:
    body.append(f"<section><h2>Not in this report</h2><ul>{missing}</ul></section>")
  return str(page.page(title, "\n".join([*body, _footer(run, omitted, page)]), data))


def _subtitle(run: Run) -> str:
  steps = f"Step {run.steps[0]:,} to {run.steps[-1]:,}" if len(run) else "No steps"
  return f"{steps}. Written by clipjax {_version()}."


def _verdict(run: Run, page: Any) -> str:
  findings = _health.diagnose(run).findings
  counts = [(level, sum(finding[0] == level for finding in findings)) for level in ("FAIL", "WARN", "INFO")]
  rows = [
    (f'<span class="level {page.text(level)}">{page.text(level)}</span>', *map(page.prose, rest))
    for level, *rest in findings
  ]
  total = ", ".join(f"{count} {level}" for level, count in counts)
  table = page.table(("level", "what", "found, rule and source", "what to do"), rows, "findings") if rows else ""
  return f"<section><h2>Verdict: {total}</h2>{table or '<p>Nothing to report.</p>'}</section>"


def _suggestion(run: Run, page: Any) -> str:
  try:
    found = _suggest.suggest_max_norm(run)
  except ValueError as error:
    body = f"<p>None: {page.prose(str(error))}</p>"
  else:
    body = f'<p class="answer">max_norm = {number(found.max_norm)}</p><p>{page.prose(found.reason)}</p>'
    body += f"<ul>{''.join(f'<li>{page.prose(note)}</li>' for note in found.notes)}</ul>"
    pairs = sorted({(found.max_norm, found.clip_fraction), *found.alternatives})
    rows = [(number(value) + " (suggested)" * (value == found.max_norm), percent(share)) for value, share in pairs]
    body += page.table(("max_norm", "would have clipped"), rows, "layers")
  return f"<section><h2>Suggested threshold</h2>{body}</section>"


def _footer(run: Run, omitted: list[str], page: Any) -> str:
  said = ["Numbers are of all recorded steps. The series are in this file as JSON, 7 digits each: "]
  said += [page.code('<script type="application/json" id="clipjax-run">'), "."]
  if len(run) > 2 * _module("_report_figures").bins_of(_module("_report_figures").NARROW):
    said.append(" Lines are thinned for drawing: of each small part of the axis the least and the greatest are shown.")
  if omitted:
    said.append(f" Left out of the JSON for its size: {', '.join(map(page.code, omitted))}.")
  return f"<footer><h2>Data</h2><p>{''.join(said)}</p></footer>"


# Writing ------------------------------------------------------------------------------------------------------------


def _write(target: pathlib.Path, content: bytes) -> None:
  """All of it or nothing, through a file beside it; straight where the path is no file, as /dev/stdout."""
  is_special = target.exists() and not target.is_file()
  beside = target if is_special else target.with_name(f".clipjax-{os.getpid()}-{target.name}"[:200])
  try:
    beside.write_bytes(content)
    if not is_special:
      os.replace(beside, target)
  except OSError as error:  # It names no file, or the one beside, which nobody has asked for.
    raise OSError(error.errno, error.strerror, str(target)) from error
  finally:
    if not is_special:
      beside.unlink(missing_ok=True)


def _numbers(values: Any, digits: int = 7) -> str:
  """A JSON array; NaN and inf become null."""
  return "[" + ",".join(f"{x:.{digits}g}" if math.isfinite(x) else "null" for x in values.tolist()) + "]"


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
  main = [f"{main_name(run)}/{quantity}" for quantity in ("norm", "max_norm", "scale", "norm_clipped")]
  rank = 0 if key in main else 1 if "/" not in key else 2
  return rank, list(run.columns).index(key)


# Checks -------------------------------------------------------------------------------------------------------------


def _check(run: object) -> None:
  if not isinstance(run, Run):
    raise TypeError(f"`run` must be a Run, got {described(run)}: read the file with clipjax.read_run(path).")


def _module(name: str) -> Any:
  """A module of this package that needs matplotlib, imported when it is needed."""
  try:
    return importlib.import_module(f"clipjax.{name}")
  except ModuleNotFoundError as error:
    if error.name != "matplotlib":
      raise
    raise ImportError("a report needs matplotlib: pip install 'clipjax[report]'", name="matplotlib") from error


def _version() -> str:
  return str(importlib.import_module("clipjax").__version__)
