"""The series of a run as the JSON of its page."""

import json
import math
import os
from typing import Any

import numpy as np

import clipjax
from clipjax.metric_names import MAX_NORM, NORM, NORM_CLIPPED, SCALE
from clipjax.runs.kinds import Floats
from clipjax.runs.norms import main_name
from clipjax.runs.run import Run
from clipjax.runs.schema import TIME, key_of

LARGEST = 8_000_000  # Bytes of JSON in a page: a browser still opens it at once.


def to_json(run: Run, largest: int) -> tuple[str, list[str]]:
  """Returns `(text, omitted)`: the series as ASCII JSON with 7 digits, and the keys that did not fit.

  Absent and nonfinite numbers are null. Keys: `steps`, `columns`, `nonfinite` (key to steps), `leaves`, `vectors` (key
  to steps and rows; a nonfinite entry is "inf"), `weights`, `parameters`, `omitted`. A series that would exceed
  `largest` characters is left out; the main series get room first.
  """
  fields = {"clipjax_report": "1", "version": json.dumps(clipjax.__version__), "parameters": json.dumps(run.parameters)}
  fields |= {"source": json.dumps(os.path.basename(run.path)), "leaves": json.dumps(run.leaves)}
  fields["steps"] = json.dumps(run.steps.tolist())
  fields["nonfinite"] = json.dumps({key: run.steps[mask].tolist() for key, mask in run.flags.items()})
  room = largest - sum(map(len, fields.values()))
  # Columns take the room first, in the order of `_rank`; numbers by leaf take what is left.
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


def _numbers(values: Any, digits: int = 7) -> str:
  """A JSON array; NaN and inf become null."""
  return "[" + ",".join(f"{x:.{digits}g}" if math.isfinite(x) else "null" for x in values.tolist()) + "]"


def _by_leaf(values: Floats) -> str:
  """A JSON array of numbers by leaf: "inf" for a nonfinite one, null for one that was not recorded."""
  text = _numbers(values)
  if not np.isinf(values).any():
    return text
  parts = text[1:-1].split(",")
  return "[" + ",".join('"inf"' if x == math.inf else part for x, part in zip(values, parts, strict=True)) + "]"


def _object(fields: dict[str, str]) -> str:
  """A JSON object; its values are JSON already."""
  return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in fields.items()) + "}"


def _keep(into: dict[str, str], omitted: list[str], key: str, source: str, room: int) -> int:
  """Adds a series if it fits; returns the room that is left."""
  if len(source) > room:
    omitted.append(key)
    return room
  into[key] = source
  return room - len(source)


def _rank(run: Run, key: str) -> tuple[int, int]:
  """Sort key: norm and threshold first, then what the caller pushed, then the rest in their order."""
  main = [key_of(str(main_name(run)), quantity) for quantity in (NORM, MAX_NORM, SCALE, NORM_CLIPPED)]
  rank = 0 if key in main else 1 if "/" not in key else 2
  return rank, list(run.columns).index(key)
