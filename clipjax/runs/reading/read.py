"""Reads what a `Recorder` wrote, and decides which rows belong to the run and which were superseded.

The file is JSON Lines. A header says what was recorded, `{"clipjax_run": 2, "leaves": ..., ...}`, followed by one row
per step, `{"step": 7, "time": ..., "grad/norm": ..., ...}`. Nonfinite numbers are null, and "nonfinite" in the row says
what they were. Most rows follow the last step; `Course` has the rules for those that do not.
"""

import dataclasses
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.runs.kinds import Ints, Names
from clipjax.runs.reading.columns import Row, Table
from clipjax.runs.reading.lines import Part, Survey, checked_path, is_blank, is_run, last_parts, parts, survey
from clipjax.runs.run import Run
from clipjax.runs.schema import BACK, FORMAT, HEADER, LEAF, LEAVES, OPTIMIZER, PARAMETERS, STARTED, STEP, VERSION, merge

_HEAD = 2**20  # Bytes to search for the first row.


def read_run(path: str | os.PathLike[str]) -> Run:
  """Reads a file that a `Recorder` wrote, even while it is being written or after a crash.

  Rows of one step become one row, in which a later number replaces an earlier one, even if it was recorded after later
  steps. If a row says that the run went back to its step, all earlier rows from that step on are superseded.
  `Run.superseded` counts them, and `Run.unreadable` counts the lines that a crash tore. A million rows take seconds and
  little more memory than their columns.

  Files of clipjax 0.1.0, in which a step is an update count, are read too. In them, only a resumed run supersedes rows,
  from its first step on.

  Args:
    path: the file.

  Returns:
    A `Run`; its length is 0 if the file has no rows.

  Raises:
    FileNotFoundError: if there is no such file.
    TypeError: for anything but a path.
    ValueError: for a directory, an empty file, a file that no `Recorder` wrote, or a file of a later format.

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
  _check_file(name)
  seen, unreadable = survey(name), 0  # How large to make the table, and the names of the first rows.
  with _told(name):
    course = Course(seen)
    for part in parts(name, seen.size):
      unreadable += part.others
      course.follow(part)
    # Without a complete header, the beginning of a torn one is enough.
    if not course.header and not (course.table.count and is_run(name)):
      raise _OtherFileError("no Recorder header")
    return course.run(name, unreadable)


def tail(path: str | os.PathLike[str], count: int) -> Run:
  """The last `count` rows of a file, or all if there are fewer, read from its end.

  The rows equal those of `read_run`, but `superseded` and the leaf names cover only the part that was read.

  Args:
    path: a file that a `Recorder` wrote.
    count: how many rows.
  """
  name = checked_path(path)
  with _told(name):
    for entries, is_all in last_parts(name):
      course = Course(Survey(0, len(entries), None, FORMAT))
      course.follow(Part(entries))
      # The first rows may be incomplete, or belong to steps further up in the file.
      if is_all or course.table.count >= 2 * count + 1:
        break
    return _last(course.run(name, 0), count)


def first_step(path: str | os.PathLike[str]) -> int | None:
  """The step of the first row of a file, read from its beginning; None if there is no row."""
  for part in parts(checked_path(path), _HEAD):
    for entry in _in_order(part):
      if STEP in entry:
        return int(entry[STEP])
  return None


class Course:
  """Follows a run line by line, and keeps the rows that belong to it in a `Table`.

  Attributes:
    table: the rows.
    header: the last value of each header field.
  """

  def __init__(self, seen: Survey):
    self.table = Table(seen.rows, _names(seen.header or {}))
    self.header: dict[str, Any] = {}
    self._format = seen.format
    self._started: Any = None
    self._is_resumed = False  # Format 1: whether the next row is the first one of another `Recorder`.
    self._rows: list[Row] = []  # Rows above the last step, which enter the table together.

  def follow(self, part: Part) -> None:
    """Processes the next headers and rows."""
    if self._goes_on(part):
      self._is_resumed = False
      self.table.append(part.entries, part.block, part.among)
    else:
      self._follow_each(_in_order(part))

  def _follow_each(self, entries: list[dict[str, Any]]) -> None:
    rows, last = self._rows, self.table.last()
    for entry in entries:
      if HEADER in entry:
        self._flush()
        self._begin(entry)
        continue
      # A row above the last step waits for more; a second row of the last step joins it; any other one is special.
      step = entry[STEP]
      if last is None or step > last:
        rows.append(entry)
      elif step == last and rows and not entry.get(BACK) and LEAF not in entry:
        merge(rows[-1], entry)
      else:
        self._flush()
        self._add(entry)
      last = step if rows else self.table.last()
    self._flush()

  def _goes_on(self, part: Part) -> bool:
    """Whether these are only rows, ascending above the last step, as nearly all parts are."""
    if (not part.entries and part.block is None) or any(HEADER in entry for entry in part.entries):
      return False
    # One comparison of all steps replaces the rules of `_follow_each`.
    steps, last = [entry[STEP] for entry in part.entries], self.table.last()
    if part.block is None or part.among is None:
      return (last is None or steps[0] > last) and all(map(operator.lt, steps, steps[1:]))
    both = _scattered(part.block.steps, part.among, steps, np.int64)
    return bool((last is None or both[0] > last) and (both[1:] > both[:-1]).all())

  def run(self, path: str, unreadable: int) -> Run:
    """The run that was read."""
    table, parameters = self.table, self.header.get(PARAMETERS)
    if not isinstance(parameters, int | None):
      raise TypeError("parameters must be a whole number")
    return Run(
      path=path,
      steps=table.steps(),
      columns=table.columns(),
      flags=table.flags(),
      vectors=table.vectors(),
      leaves=table.names(),
      weights=table.weights(),
      parameters=parameters,
      batches=table.batches(),
      superseded=table.dropped,
      unreadable=unreadable,
      optimizer=_classes(self.header),
    )

  def _begin(self, header: dict[str, Any]) -> None:
    self._format = _checked_format(header)
    started = header.get(STARTED)
    self._is_resumed = started is None or started != self._started
    self._started = started
    self.table.name(_names(header))
    self.header |= {key: value for key, value in header.items() if value}

  def _flush(self) -> None:
    if self._rows:
      self._is_resumed = False
      self.table.append(self._rows)
      self._rows.clear()

  def _add(self, row: Row) -> None:
    """Adds a row at or below the last step: it supersedes what follows, or adds to its step."""
    # Format 1 goes back at the first row of another recorder; a row of format 2 says so itself.
    if self._is_resumed if self._format == 1 else row.get(BACK):
      self.table.cut(row[STEP])
    self._is_resumed = False
    self.table.add(row)


def run_of_rows(rows: Iterable[Mapping[str, Any]], leaves: Names) -> Run:
  """The run of rows in memory, in the form that a `Recorder` has them."""
  kept = [{**row, LEAF: {key: list(vector) for key, vector in row.get(LEAF, {}).items()}} for row in rows]
  course = Course(Survey(0, len(kept), {LEAVES: leaves}, FORMAT))
  course.follow(Part(kept))
  return course.run("", 0)


def _in_order(part: Part) -> list[dict[str, Any]]:
  """The headers and rows of a part, including those of its block, in order."""
  if part.block is None or part.among is None:
    return part.entries
  return _scattered(part.block.rows(), part.among, part.entries, np.object_).tolist()  # type: ignore[no-any-return]


def _scattered(some: Any, among: Ints, others: list[Any], dtype: Any) -> Any:
  """An array with `some` at the places `among`, and the others at the remaining places."""
  out = np.empty(len(some) + len(others), dtype)
  out[among] = some
  out[np.delete(np.arange(len(out)), among)] = others
  return out


def _last(run: Run, count: int) -> Run:
  """The last rows of a run."""
  first = len(run) - min(len(run), count)
  begin = run.steps[first] if count and len(run) else np.inf
  vectors = {key: (steps[steps >= begin], values[steps >= begin]) for key, (steps, values) in run.vectors.items()}
  return dataclasses.replace(
    run,
    steps=run.steps[first:],
    columns={key: column[first:] for key, column in run.columns.items()},
    flags={key: column[first:] for key, column in run.flags.items()},
    vectors={key: vector for key, vector in vectors.items() if vector[0].size},
    weights=None,
    batches=None if run.batches is None else run.batches[first:],
  )


# Errors -------------------------------------------------------------------------------------------------------------

_REMEDY = "pass the path that you gave the Recorder."
_RULE = "`path` must be a file that `clipjax.runs.Recorder` wrote, got"


class _OtherFileError(Exception):
  """A file that no `Recorder` wrote; the text says what it has instead."""


class _LaterFormatError(Exception):
  """A file of a later format, with its number and the version of clipjax that wrote it."""


@contextmanager
def _told(name: str) -> Iterator[None]:
  """Turns any error while reading a file into one that names the file."""
  try:
    yield
  except _LaterFormatError as error:
    number, version = error.args
    raise ValueError(
      f"`path` must be a file of format {FORMAT} or below, got {name!r} of format {number!r}: read it with the version "
      f"of clipjax that wrote it, {version}, or a later one."
    ) from None
  except _OtherFileError as error:
    raise ValueError(f"{_RULE} {name!r}, which has {error}: {_REMEDY}") from None
  except OSError:
    raise
  except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # Anything may be in a file.
    what = f"malformed rows ({type(error).__name__})"
    raise ValueError(f"{_RULE} {name!r}, which has {what}: {_REMEDY}") from error


def _check_file(name: str) -> None:
  path = Path(name)
  if path.is_dir():
    raise ValueError(f"{_RULE} the directory {name!r}: name the file.")
  if not _exists(path):
    raise FileNotFoundError(f"{_RULE} {name!r}, which does not exist: check its spelling.")
  if not path.is_file():
    raise ValueError(f"{_RULE} {name!r}, which is not a regular file: name the file.")
  if is_blank(name):
    raise ValueError(
      f"{_RULE} {name!r}, which is empty: a Recorder writes its first rows after `every` steps, or when it is closed."
    )


def _exists(path: Path) -> bool:
  try:
    path.stat()
  except FileNotFoundError:
    return False
  return True


def _checked_format(header: dict[str, Any]) -> int:
  number = header[HEADER]
  if type(number) is not int or number < 1:
    raise _OtherFileError("a malformed header")
  if number > FORMAT:
    raise _LaterFormatError(number, header.get(VERSION))
  return number


def _classes(header: dict[str, Any]) -> tuple[str, ...]:
  """The classes of the optimizer states."""
  names = header.get(OPTIMIZER) or ()
  if isinstance(names, str) or not all(isinstance(name, str) for name in names):
    raise TypeError("the optimizer must be a list of names")
  return tuple(names)


def _names(header: dict[str, Any]) -> Names:
  """The leaf names in a header."""
  leaves = (header.get(LEAVES) or {}).items()
  if any(isinstance(labels, str) for _, labels in leaves):
    raise TypeError("the names of leaves must be a list")
  return {name: tuple(map(str, labels)) for name, labels in leaves if labels}
