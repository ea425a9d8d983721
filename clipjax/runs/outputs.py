"""Where a `Recorder` puts its rows: the file of JSON Lines, and writers of other kinds. Nothing here loads JAX.

Neither may stop a training: what goes wrong after the start is reported once, as a warning.
"""

import json
import os
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipjax.checks import caller_level
from clipjax.runs.lines import checked_path, is_run
from clipjax.runs.schema import RESERVED
from clipjax.runs.text import json_array

_KEPT_BYTES = 2**24  # Of rows that could not be written, until the disk takes them.


class RunFile:
  """Appends to a file of JSON Lines; every `write` hands its rows to the operating system before it returns.

  Raises:
    OSError: if the file cannot be made or written to.
    ValueError: if there is a file that no `Recorder` wrote.
  """

  def __init__(self, path: str | os.PathLike[str]):
    # Absolute, because the training may change the working directory.
    self.path = Path(checked_path(path)).absolute()
    with self.path.open("ab") as file:
      size = file.tell()
    if not is_run(str(self.path)):
      raise ValueError(
        f"`path` must be a new file or one that a Recorder wrote, got {os.fspath(path)!r}, which is neither: name "
        "another file."
      )
    self.had_rows = size > 0
    self._is_torn = size > 0 and not _ends_with_newline(self.path)
    self._entry: dict[str, Any] = {}
    self._header = b""
    self._waiting: deque[bytes] = deque()
    self._is_reported = False

  def write(self, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Appends rows, and a header before them where it is new or the file is."""
    lines = [_line(row) for row in rows]
    if header != self._entry or not self._header:  # Its text may have the names of thousands of slices.
      self._entry, self._header = header, _line(header)
      lines.insert(0, self._header)
    if lines:
      self._waiting.append(b"".join(lines))
    if self._waiting:
      self._write_waiting()

  def _write_waiting(self) -> None:
    try:
      # Opened anew each time: what is written to an open file that somebody has removed is lost without an error.
      with self.path.open("ab", buffering=0) as file:
        is_new = file.tell() == 0
        while self._waiting:
          text = self._waiting[0]
          if is_new and not text.startswith(self._header):
            text = self._header + text
          text = b"\n" + text if self._is_torn else text
          self._is_torn = True  # Until all of it is written.
          _write_all(file, text)
          self._is_torn = is_new = False
          self._waiting.popleft()
    except OSError as error:
      self._report(error)
      while sum(map(len, self._waiting)) > _KEPT_BYTES and len(self._waiting) > 1:
        self._waiting.popleft()
        self._header = b""  # It may have been in what is dropped, so it is written once more.

  def _report(self, error: OSError) -> None:
    if self._is_reported:
      return
    self._is_reported = True
    warnings.warn(
      f"cannot write {self.path}: {error.strerror or error}; the training goes on, and the last "
      f"{_KEPT_BYTES >> 20} MiB of rows are kept to be written when it is possible again: make room, or mend the path.",
      RuntimeWarning,
      stacklevel=caller_level(),
    )


def _write_all(file: Any, text: bytes) -> None:
  rest = memoryview(text)
  while rest:
    rest = rest[file.write(rest) :]


def _ends_with_newline(path: Path) -> bool:
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


_encode = json.JSONEncoder(allow_nan=False).encode


def _line(entry: dict[str, Any]) -> bytes:
  """A row, or a header; what a row has by leaf are vectors."""
  text = _encode({key: value for key, value in entry.items() if key != "leaf"} if "leaf" in entry else entry)
  if "leaf" in entry:
    vectors = ", ".join([f"{_encode(key)}: {json_array(vector)}" for key, vector in entry["leaf"].items()])
    text = f'{text[:-1]}, "leaf": {{{vectors}}}}}'
  return text.encode() + b"\n"


class Writer:
  """Anything that takes scalars: by `write_scalars(step, dict)`, `add_scalar(key, value, step)` or `log(dict, step)`.

  Raises:
    TypeError: for an object that has none of these.
  """

  def __init__(self, target: Any):
    self._target = target
    self._write = _method(target)
    self._is_dropped = False

  def write(self, row: dict[str, Any]) -> None:
    """Hands on the scalars of a row; those that are not finite as inf and NaN."""
    flags = row.get("nonfinite", {})
    values = {key: float(flags[key]) if value is None else value for key, value in row.items() if key not in RESERVED}
    if values:
      self._call(self._write, row["step"], values)

  def flush(self) -> None:
    """Flushes, where the object can."""
    flush = getattr(self._target, "flush", None)
    if callable(flush):
      self._call(flush)

  def _call(self, function: Callable[..., None], *args: Any) -> None:
    if self._is_dropped:
      return
    try:
      function(*args)
    except Exception as error:
      self._is_dropped = True
      warnings.warn(
        f"the writer {type(self._target).__name__} raised {type(error).__name__}: {error}; it is given nothing more, "
        "and the training and the other outputs go on.",
        RuntimeWarning,
        stacklevel=caller_level(),
      )


def _method(target: Any) -> Callable[[int, dict[str, Any]], None]:
  def method(name: str) -> Any:
    return None if isinstance(target, type) else getattr(target, name, None)

  if callable(write_scalars := method("write_scalars")):
    return write_scalars  # type: ignore[no-any-return]  # Of what is not ours.
  if callable(add_scalar := method("add_scalar")):

    def add_scalars(step: int, values: dict[str, Any]) -> None:
      for key, value in values.items():
        add_scalar(key, value, step)

    return add_scalars
  if callable(log := method("log")):
    return lambda step, values: log(values, step)
  raise TypeError(
    "`writers` must each have add_scalar(key, value, step), log(dict, step) or write_scalars(step, dict), got "
    f"{target if isinstance(target, type) else type(target).__name__}: pass a tensorboardX SummaryWriter or the like."
  )
