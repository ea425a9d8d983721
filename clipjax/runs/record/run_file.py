"""The file of a run: JSON Lines, appended to by one recorder at a time.

It never stops a training run. An error after the start causes one warning, and rows wait until they can be written.
"""

import contextlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipjax.runs.number_text import json_array
from clipjax.runs.reading.lines import checked_path, is_run
from clipjax.runs.schema import HEADER, LEAF

try:
  import fcntl
except ImportError:  # Not Unix: another process that records to the file goes unnoticed.
  fcntl = None  # type: ignore[assignment]

_KEPT_BYTES = 2**24  # Rows that could not be written wait, up to this many bytes.
# Without O_NONBLOCK, opening a FIFO would wait for its reader.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


class RunFile:
  """Appends to a file; every `write` hands its rows to the operating system before it returns.

  The file stays locked until `close`. If its path meanwhile leads to another file, rows go to that file; if it leads to
  none, a new file is created.

  Raises:
    OSError: if the file cannot be created or written to.
    ValueError: if no `Recorder` wrote the file, it is not a regular file, or another process has locked it.
  """

  def __init__(self, path: str | os.PathLike[str], warn: Callable[[str], None]):
    # Absolute, because the caller may change the working directory.
    self.path = Path(checked_path(path)).absolute()
    self._given = os.fspath(path)
    self._warn = warn
    self._file: int | None = _opened(self.path, self._given)
    size = os.fstat(self._file).st_size
    self.had_rows = size > 0
    self._is_torn = size > 0 and not _ends_with_newline(self.path)
    self._entry: dict[str, Any] = {}
    self._header = b""
    self._waiting: deque[tuple[bytes, int]] = deque()  # Lines, and how many rows they hold.
    self._lost = 0
    self._is_reported = False

  @property
  def identity(self) -> tuple[int, int] | None:
    """Identifies this file, whatever its path; None once it is closed."""
    return None if self._file is None else _identity(os.fstat(self._file))

  def write(self, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Appends rows, preceded by the header if the header or the file is new."""
    lines = [_line(row) for row in rows]
    if header != self._entry or not self._header:  # Made only on a change: it may name thousands of slices.
      self._entry, self._header = header, _line(header)
      lines.insert(0, self._header)
    if lines:
      self._waiting.append((b"".join(lines), len(rows)))
    if self._waiting:
      self._write_waiting()

  def close(self) -> None:
    """Releases the file; another recorder may open it."""
    if self._file is not None:
      if lost := self._lost + sum(rows for _, rows in self._waiting):
        self._warn(f"{lost} rows were never written to {str(self.path)!r}: they are lost.")
      _unlock(self._file)
      os.close(self._file)
      self._file = None

  def _write_waiting(self) -> None:
    try:
      file = self._current()
      is_new = os.fstat(file).st_size == 0
      while self._waiting:
        # A new file needs a header, and a torn line an end, before anything else is written.
        text, _ = self._waiting[0]
        if is_new and not text.startswith(self._header):
          text = self._header + text
        text = b"\n" + text if self._is_torn else text
        self._is_torn = True  # Until all of the text is written.
        _write_all(file, text)
        self._is_torn = is_new = False
        self._waiting.popleft()
    except (OSError, ValueError) as error:
      self._report(error)
      while sum(len(text) for text, _ in self._waiting) > _KEPT_BYTES and len(self._waiting) > 1:
        self._lost += self._waiting.popleft()[1]
        self._header = b""  # The dropped text may have held the header, so write it again.

  def _current(self) -> int:
    """The file that the path leads to now; writes to a removed file would be lost without an error."""
    try:
      now = _identity(os.stat(self.path))
    except FileNotFoundError:
      now = None
    if self._file is None or now != self.identity:
      file = _opened(self.path, self._given)
      if self._file is not None:
        os.close(self._file)
      self._file = file
      self._is_torn = os.fstat(file).st_size > 0 and not _ends_with_newline(self.path)
    return self._file

  def _report(self, error: Exception) -> None:
    if self._is_reported:
      return
    self._is_reported = True
    self._warn(
      f"cannot write {str(self.path)!r}: {getattr(error, 'strerror', None) or error}; training continues, and the "
      f"last {_KEPT_BYTES >> 20} MiB of rows wait until they can be written: free disk space or fix the path."
    )


def _opened(path: Path, given: str) -> int:
  """The file, open and locked."""
  rule = "`path` must be a new file or one that a Recorder wrote"
  try:
    file = os.open(path, _FLAGS, 0o666)
  except OSError as error:
    if path.exists() and not path.is_file() and not path.is_dir():  # A FIFO or a socket may refuse to open.
      raise ValueError(f"{rule}, got {given!r}, which is not a regular file: name a file on a disk.") from error
    raise
  try:
    if not stat.S_ISREG(os.fstat(file).st_mode):
      raise ValueError(f"{rule}, got {given!r}, which is not a regular file: name a file on a disk.")
    if not is_run(str(path)):
      raise ValueError(f"{rule}, got {given!r}, which is neither: name another file.")
    _lock(file, given)
  except BaseException:
    os.close(file)
    raise
  return file


def _lock(file: int, given: str) -> None:
  if fcntl is None:
    return
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise ValueError(
      f"`path` must be a file that no other process records to, got {given!r}, which another process has open: name "
      "a file for each process."
    ) from None
  except OSError:  # A file system without locks.
    pass


def _unlock(file: int) -> None:
  """Releases the lock for every process: a child forked meanwhile has the file open too."""
  if fcntl is not None:
    with contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_UN)


def _identity(status: os.stat_result) -> tuple[int, int]:
  return status.st_dev, status.st_ino


def _write_all(file: int, text: bytes) -> None:
  rest = memoryview(text)
  while rest:
    rest = rest[os.write(file, rest) :]


def _ends_with_newline(path: Path) -> bool:
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


_encode = json.JSONEncoder(allow_nan=False).encode


def _line(entry: dict[str, Any]) -> bytes:
  """A row or a header as a line; numbers by leaf are numpy vectors."""
  is_row = LEAF in entry and HEADER not in entry
  text = _encode({key: value for key, value in entry.items() if key != LEAF} if is_row else entry)
  if is_row:
    vectors = ", ".join([f"{_encode(key)}: {json_array(vector)}" for key, vector in entry[LEAF].items()])
    text = f'{text[:-1]}, "{LEAF}": {{{vectors}}}}}'
  return text.encode() + b"\n"
