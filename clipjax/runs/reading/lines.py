"""The lines of a file of rows as dicts: all of them, part by part, or those at its end.

A line that a crash has torn is no JSON and is passed over, and so is whatever else is neither a header nor a row. No
more than a part of the file is in memory at a time.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from clipjax.runs.kinds import Ints
from clipjax.runs.reading.columns import Block, Row
from clipjax.runs.reading.digits import block
from clipjax.runs.schema import FORMAT, HEADER, STEP
from clipjax.runs.words import described

_PART = 2**20  # Bytes of a part.
_MANY = 50  # Rows that are alike; of fewer the parser takes as long.
_TAIL = 2**16  # Bytes at the end of a file that are looked at first.
_START = f'{{"{HEADER}"'.encode()
_NUMBER = re.compile(re.escape(_START) + rb": *(\d+)")


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
  with Path(path).open("rb") as file:
    return _START.startswith(file.read(len(_START)))


def is_blank(path: str) -> bool:
  """Whether a file has no line with anything in it."""
  with Path(path).open("rb") as file:
    return not any(line.strip() for line in file)


class Survey(NamedTuple):
  """What a first look at a file tells.

  Attributes:
    size: its bytes.
    rows: about how many lines it has.
    header: the first header that is whole; None without one.
    format: that of the rows before it, which a torn header may tell.
  """

  size: int
  rows: int
  header: Row | None
  format: int


def survey(path: str) -> Survey:
  """Looks at the first lines of a file; at all of them where it has no header."""
  header, number = None, None
  with Path(path).open("rb") as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for line in file:
      if line.startswith(_START):
        found = _NUMBER.match(line)
        number = number or (int(found[1]) if found else None)
        if (header := _entry(line)) is not None:
          break
    head = file.read(_PART)
  rows = 16 + size * head.count(b"\n") // max(len(head), 1)
  return Survey(size, rows + rows // 32, header, number or FORMAT)


class Part(NamedTuple):
  """Some lines of a file.

  Attributes:
    entries: headers and rows, in their order.
    others: how many lines were neither.
    block: more rows, which are alike; None where there are none. `entries` then has no header.
    among: the places of these among all rows.
  """

  entries: list[Row]
  others: int = 0
  block: Block | None = None
  among: Ints | None = None


def parts(path: str, size: int) -> Iterator[Part]:
  """The first `size` bytes of a file, part by part."""
  rest = b""
  with Path(path).open("rb") as file:
    while size > 0 and (data := file.read(min(_PART, size))):
      size -= len(data)
      lines, end, rest_of_line = (rest + data).rpartition(b"\n") if b"\n" in data else (b"", b"", rest + data)
      if lines:
        yield _with_block(lines + end) or Part(*_entries(lines.split(b"\n")))
      rest = rest_of_line
  if rest:
    yield Part(*_entries([rest]))


def last_parts(path: str) -> Iterator[tuple[list[Row], bool]]:
  """The headers and rows at the end of a file, each time of more of it, and whether that is all of it."""
  with Path(path).open("rb") as file:
    size, length = file.seek(0, os.SEEK_END), _TAIL
    while True:
      lines = _from(file, max(size - length, 0), size)
      yield _entries(lines)[0], length >= size
      if length >= size:
        return
      length *= 4


def _from(file: BinaryIO, start: int, size: int) -> list[bytes]:
  """The lines that begin at `start` or behind it."""
  file.seek(max(start - 1, 0))
  data = file.read(size - max(start - 1, 0))
  return data.splitlines(keepends=True) if start == 0 else data.split(b"\n", 1)[-1].split(b"\n")


def _with_block(text: bytes) -> Part | None:
  """Rows, most of which are alike; None where they are not, or one of the lines is no row."""
  characters = np.frombuffer(text, np.uint8)
  ends = np.flatnonzero(characters == ord("\n")) + 1
  bounds = np.concatenate([[0], ends])
  # First those without an object inside; where that is not enough, those that have as many keys as most.
  for mark in b'{"':
    counts = np.diff(np.searchsorted(np.flatnonzero(characters == mark), bounds))
    usual = np.bincount(counts).argmax()
    is_usual = counts == usual
    among = np.flatnonzero(is_usual)
    if len(among) < _MANY or usual == 0:
      return None
    others = np.flatnonzero(~is_usual).tolist()
    if (found := block(_without(text, bounds, others))) is not None:
      break
  else:
    return None
  rest = _together([text[bounds[i] : bounds[i + 1]] for i in others])
  if rest is None or any(HEADER in entry or type(entry.get(STEP)) is not int for entry in rest):
    return None
  return Part(rest, 0, found, among)


def _without(text: bytes, bounds: Ints, lines: list[int]) -> bytes:
  """The text without some of its lines, the first of which begins at `bounds[0]`."""
  starts = [0, *(bounds[i + 1] for i in lines)]
  stops = [*(bounds[i] for i in lines), len(text)]
  return b"".join([text[start:stop] for start, stop in zip(starts, stops, strict=True)])


def _entries(lines: list[bytes]) -> tuple[list[Row], int]:
  """What the lines hold, and how many of them hold nothing of ours."""
  entries = _together(lines)
  if entries is None:
    lines = [line for line in lines if line.strip()]
    entries = [entry for line in lines if (entry := _entry(line)) is not None]
  elif {type(entry.get(STEP)) for entry in entries} == {int}:
    return entries, 0
  ours = [entry for entry in entries if HEADER in entry or type(entry.get(STEP)) is int]
  return ours, len(lines) - len(ours)


def _together(lines: list[bytes]) -> list[Row] | None:
  """What the lines hold, by one call of the parser; None where not every line is an object by itself."""
  try:
    entries = json.loads(f"[{b','.join(lines).decode()}]")
  except (ValueError, RecursionError):
    return None
  # A torn line could be healed by one that follows it, but that leaves fewer objects than lines.
  return entries if len(entries) == len(lines) and {*map(type, entries)} <= {dict} else None


def _entry(line: bytes) -> Row | None:
  """What a line holds; None where it is torn, no text, or nested too deep for any row."""
  try:
    entry = json.loads(line.decode("utf-8-sig"))
  except (ValueError, RecursionError):
    return None
  return entry if isinstance(entry, dict) else None
