"""Reading what a `Recorder` has written: a `Run`, columns of numpy arrays over the steps.

The file is JSON Lines. A header names what was recorded, `{"clipjax_run": 1, "leaves": ..., ...}`; then comes a row
for each step, `{"step": 7, "time": ..., "grad/norm": ..., ...}`. Numbers that are not finite are null, and the row's
"nonfinite" says what they were. Lines that a crash has torn are passed over. This module does not load JAX.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from clipjax.runs.schema import BACK, FORMAT, OBJECTS
from clipjax.runs.words import described

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Objects: TypeAlias = np.ndarray[Any, np.dtype[np.object_]]

_OBJECTS = OBJECTS


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
  """A recorded run; made by `read_run`. n is the number of steps, m that of the steps with numbers by leaf.

  `run[key]` is a column, or for a leaf, as in `run["grad/norm/w"]`, its numbers spread over all steps, NaN where none
  were recorded. `run.keys()` are the keys of both kinds, `key in run` and `len(run)`, the number of steps, work too.
  A slice of stacked layers is a leaf, as in `run["grad/norm/blocks/w[3]"]`.

  Attributes:
    path: the file.
    steps: int64, shape (n,): the steps, ascending, each once; not every one needs to be there.
    columns: float64, shape (n,), by key: NaN where nothing was recorded or the number was not finite. "time" is the
      time of the push in seconds since 1970, "user_step" the caller's number of the step where it was another.
    flags: bool, shape (n,), by key: True where a number was recorded and was inf or NaN; only keys that have such.
    leaves: names of the leaves or groups, by name of the clip or watch, such as "grad".
    vectors: by `<name>/<quantity>`: int64 (m,), the steps, and float64 (m, leaves), the numbers: inf where one was
      not finite, NaN where it was not recorded.
    weights: the histogram of log10|w| over the parameters: int64 (m,), steps; float64 (k + 1,), edges of its bins;
      float64 (m, k), counts. None where no parameters were given.
    parameters: number of the parameters; None where none were given.
    batches: object, shape (n,): what the caller called the batch of each step, an int or a str, a tuple of them where
      a step is several micro-batches, None where nothing was said; None where nothing ever was.
    superseded: how many rows the reader left out, as the run went back to before them.
    unreadable: how many lines were torn.

  Example:
    >>> import os, tempfile, jax.numpy as jnp, clipjax
    >>> tx, grads = clipjax.clip_by_leaf_norm(1.0), {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
    >>> with clipjax.runs.Recorder(path) as recorder:
    ...   recorder.push(1, tx.update(grads, tx.init(grads))[1], loss=0.5)
    >>> run = clipjax.runs.read_run(path)
    >>> len(run), "loss" in run, run["grad/norm"], run["grad/norm/w"]
    (1, True, array([13.]), array([5.]))
  """

  path: str
  steps: Ints
  columns: dict[str, Floats]
  flags: dict[str, Bools]
  leaves: dict[str, tuple[str, ...]]
  vectors: dict[str, tuple[Ints, Floats]]
  weights: tuple[Ints, Floats, Floats] | None
  parameters: int | None
  batches: Objects | None = None
  superseded: int = 0
  unreadable: int = 0

  def keys(self) -> tuple[str, ...]:
    """The columns, then the numbers by leaf."""
    by_leaf = (f"{key}/{leaf}" for key in self.vectors for leaf in self.leaves[key.rpartition("/")[0]])
    return tuple(dict.fromkeys((*self.columns, *by_leaf)))

  def __getitem__(self, key: str) -> Floats:
    if key in self.columns:
      return self.columns[key]
    if (place := self._place(key)) is None:
      near = difflib.get_close_matches(str(key), self.keys(), 3, 0.5) or list(self.columns)
      raise KeyError(f"{self.path} has no {key!r}; it has {', '.join(map(repr, near[:10]))}")
    vector, i = place
    steps, values = self.vectors[vector]
    out = np.full(self.steps.shape, np.nan)
    out[np.searchsorted(self.steps, steps)] = values[:, i]
    return out

  def __contains__(self, key: object) -> bool:
    return key in self.columns or self._place(key) is not None

  def __len__(self) -> int:
    return len(self.steps)

  def __repr__(self) -> str:
    return f"Run({self.path!r}, {len(self)} steps, {len(self.columns)} columns)"

  def _place(self, key: object) -> tuple[str, int] | None:
    """The vector that a key such as "grad/norm/w" belongs to, and the place of the leaf in it."""
    if not isinstance(key, str):
      return None
    for ending in ("", "_group", "_leaf"):  # Of blocks that are not those of the watch of this name.
      for vector in self.vectors:
        name, _, quantity = vector.rpartition("/")
        start, leaves = f"{name.removesuffix(ending)}/{quantity}/", self.leaves[name]
        if name.endswith(ending) and key.startswith(start) and key[len(start) :] in leaves:
          return vector, leaves.index(key[len(start) :])
    return None


def read_run(path: str | os.PathLike[str]) -> Run:
  """Reads a file that a `Recorder` wrote, also while it is being written, or after a crash.

  Lines that a crash has torn are passed over. Rows of one step become one row, in which a later number replaces an
  earlier one. Where a run was resumed, what was recorded before from the first step of the resumed part on is dropped:
  it belongs to a course that was given up.

  Args:
    path: the file.

  Returns:
    A `Run`; without rows, one of length 0.

  Raises:
    FileNotFoundError: if there is no such file.
    TypeError: for what is no path.
    ValueError: for a directory, an empty file, a file that no `Recorder` wrote, or one of a later format.

  Example:
    >>> import os, tempfile, jax.numpy as jnp, clipjax
    >>> tx, grads = clipjax.clip_by_global_norm(1.0), {"w": jnp.array([3.0, 4.0])}
    >>> state = tx.init(grads)
    >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
    >>> with clipjax.runs.Recorder(path) as recorder:
    ...   for step in range(1, 4):
    ...     _, state = tx.update(grads, state)
    ...     recorder.push(step, state, loss=0.5 / step)
    >>> run = clipjax.runs.read_run(path)
    >>> run.steps, run["grad/norm"], run["loss"][0]
    (array([1, 2, 3]), array([5., 5., 5.]), np.float64(0.5))
  """
  name = checked_path(path)
  entries = _entries(_lines(name))
  headers = [entry for entry in entries if "clipjax_run" in entry]
  other = f"`path` must be a file that `clipjax.runs.Recorder` wrote, got {name!r}, which has {{}}: {_REMEDY}"
  if not headers:
    raise ValueError(other.format("no header of one"))
  for header in headers:
    if type(header["clipjax_run"]) is not int or header["clipjax_run"] < 1:
      raise ValueError(other.format("a header of another kind"))
    _check_format(header, name)
  try:
    return _run(name, *_merged(entries))
  except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # Anything may be in a file.
    raise ValueError(other.format(f"rows of another kind ({type(error).__name__})")) from error


_REMEDY = "pass the path that the Recorder was given."


def checked_path(path: Any) -> str:
  """The path as a string; raises for what is none."""
  name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
  if not isinstance(name, str):
    raise TypeError(f"`path` must be a string or a pathlib.Path, got {described(path)}: pass the name of a file.")
  if not name or "\0" in name:
    raise ValueError(f"`path` must be the name of a file, got {name!r}: pass one such as 'run.jsonl'.")
  return name


def is_run(path: str) -> bool:
  """Whether a file begins as a `Recorder` does; an empty one does, and so does one torn in its first line."""
  start = b'{"clipjax_run"'
  with Path(path).open("rb") as file:
    head = file.read(len(start))
  return start.startswith(head)


def _lines(name: str) -> list[bytes]:
  if Path(name).is_dir():
    raise ValueError(
      f"`path` must be a file that `clipjax.runs.Recorder` wrote, got the directory {name!r}: name the file."
    )
  try:
    data = Path(name).read_bytes()
  except FileNotFoundError:
    raise FileNotFoundError(
      f"`path` must be a file that `clipjax.runs.Recorder` wrote, got {name!r}, which does not exist: look at "
      "its spelling."
    ) from None
  if not data.strip():
    raise ValueError(
      f"`path` must be a file that `clipjax.runs.Recorder` wrote, got {name!r}, which is empty: a Recorder "
      "writes its first "
      "rows after `every` steps, or when it is closed."
    )
  return data.split(b"\n")


def _entries(lines: list[bytes]) -> list[dict[str, Any]]:
  """What the lines hold; not those that are torn, no text, or nested too deep for any row."""
  entries = []
  for line in lines:
    try:
      entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
      continue
    if isinstance(entry, dict):
      entries.append(entry)
  return entries


def _merged(entries: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
  """The header, of the last values that the headers have, and the rows by step."""
  header: dict[str, Any] = {}
  rows = _Rows()
  for entry in entries:
    if "clipjax_run" in entry:
      rows.begin(entry.get("started"), entry["clipjax_run"] < 2)
      header = {**header, **{key: value for key, value in entry.items() if value}}
    elif header and type(entry.get("step")) is int:
      rows.add(entry)
  return header, rows.by_step


def _check_format(header: dict[str, Any], name: str) -> None:
  number = header["clipjax_run"]
  if number > FORMAT:
    raise ValueError(
      f"`path` must be a file of format {FORMAT} or below, got {name!r} of format {number!r}: read it with the version "
      f"of clipjax that wrote it, {header.get('version')}, or a later one."
    )


class _Rows:
  """The rows by step, of which those of a course that was given up are dropped."""

  def __init__(self) -> None:
    self.by_step: dict[int, dict[str, Any]] = {}
    self._started: Any = None
    self._is_first = False

  def begin(self, started: Any, is_old: bool) -> None:
    """A header: `started` tells one `Recorder` from the next."""
    self._is_first = is_old and (started is None or started != self._started)
    self._started = started

  def add(self, row: dict[str, Any]) -> None:
    step = row["step"]
    if (self._is_first or row.pop(BACK, False)) and self.by_step:
      self.by_step = {s: kept for s, kept in self.by_step.items() if s < step}
    self._is_first = False
    old = self.by_step.setdefault(step, row)
    if old is not row:
      merge(old, row)


def merge(old: dict[str, Any], new: dict[str, Any]) -> None:
  """Puts a later row into an earlier one of the same step."""
  flags = {key: text for key, text in (old.get("nonfinite") or {}).items() if key not in new}
  flags |= new.get("nonfinite") or {}
  leaf = {**(old.get("leaf") or {}), **(new.get("leaf") or {})}
  old.update(new)
  old |= {"nonfinite": flags, "leaf": leaf}
  for key in ("nonfinite", "leaf"):
    if not old[key]:
      del old[key]


def run_of_rows(rows: Iterable[Mapping[str, Any]], leaves: Mapping[str, Any]) -> Run:
  """The run of rows that are in memory."""
  merged = _Rows()
  for row in rows:
    merged.add(dict(row))
  return _run("", {"leaves": {name: list(labels) for name, labels in leaves.items()}}, merged.by_step)


def _run(name: str, header: dict[str, Any], rows: dict[int, dict[str, Any]]) -> Run:
  steps = np.array(sorted(rows), np.int64)
  columns: dict[str, Floats] = {}
  flags: dict[str, Bools] = {}
  for i, step in enumerate(steps.tolist()):
    row = rows[step]
    for key, value in row.items():
      if key == "step" or key in _OBJECTS:
        continue
      if key not in columns:
        columns[key] = np.full(steps.shape, np.nan)
      if isinstance(value, int | float):
        columns[key][i] = value
      elif value is not None:
        raise TypeError("a value must be a number or null")
    for key in row.get("nonfinite") or ():
      flags.setdefault(key, np.zeros(steps.shape, np.bool_))[i] = True
  leaves = {key: tuple(map(str, labels)) for key, labels in (header.get("leaves") or {}).items()}
  if any(isinstance(labels, str) for labels in (header.get("leaves") or {}).values()):
    raise TypeError("the names of leaves must be a list")
  ordered = [rows[step] for step in steps.tolist()]
  parameters = header.get("parameters")
  if not isinstance(parameters, int | None):
    raise TypeError("parameters must be a whole number")
  return Run(name, steps, columns, flags, leaves, _vectors(ordered, leaves), _weights(ordered), parameters)


def _vectors(rows: list[dict[str, Any]], leaves: dict[str, tuple[str, ...]]) -> dict[str, tuple[Ints, Floats]]:
  found: dict[str, tuple[list[int], list[Any]]] = {}
  for row in rows:
    for key, values in (row.get("leaf") or {}).items():
      # Of another length, they are of a run of other leaves, resumed.
      if values and len(values) == len(leaves.get(key.rpartition("/")[0], ())):
        steps, vectors = found.setdefault(key, ([], []))
        steps.append(row["step"])
        vectors.append(np.array([np.inf if x is None else x for x in values], np.float64))
  return {key: (np.array(steps, np.int64), np.stack(vectors)) for key, (steps, vectors) in found.items()}


def _weights(rows: list[dict[str, Any]]) -> tuple[Ints, Floats, Floats] | None:
  found = [(row["step"], row["weights"]) for row in rows if row.get("weights")]
  if not found:
    return None
  edges = found[-1][1]["edges"]
  found = [(step, weights) for step, weights in found if weights["edges"] == edges]
  counts = np.array([weights["counts"] for _, weights in found], np.float64)
  if counts.shape != (len(found), len(edges) - 1):
    raise ValueError("a histogram must have a count for each bin")
  return np.array([step for step, _ in found], np.int64), np.array(edges, np.float64), counts
