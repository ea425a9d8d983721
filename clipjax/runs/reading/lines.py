"""The lines of a run file as dicts: all of them, part by part, or only the last ones.

A line that a crash tore is not JSON and is skipped, like anything else that is neither a header nor a row. Only one
part of the file is in memory at a time.
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
from clipjax.runs.reading.uniform_rows import block
from clipjax.runs.schema import FORMAT, HEADER, STEP
from clipjax.runs.words import described

_PART = 2**20  # Bytes of a part.
_MANY = 50  # Uniform rows; for fewer, the parser is as fast.
_TAIL = 2**16  # Bytes at the end of a file to look at first.
_START = f'{{"{HEADER}"'.encode()
_NUMBER = re.compile(re.escape(_START) + rb": *(\d+)")


def checked_path(path: Any) -> str:
  """The path as a string; raises for anything but a path."""
  name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
  if not isinstance(name, str):
    raise TypeError(f"`path` must be a string or a pathlib.Path, got {described(path)}: pass the name of a file.")
  if not name or "\0" in name:
    raise ValueError(f"`path` must be the name of a file, got {name!r}: pass one such as 'run.jsonl'.")
  return name


def is_run(path: str) -> bool:
  """Whether a file begins as a `Recorder` begins one; an empty file counts, and so does a torn first line."""
  with Path(path).open("rb") as file:
    return _START.startswith(file.read(len(_START)))


def is_blank(path: str) -> bool:
  """Whether all lines of a file are blank."""
  with Path(path).open("rb") as file:
    return not any(line.strip() for line in file)


class Survey(NamedTuple):
  """What a first look at a file shows.

  Attributes:
    size: the size in bytes.
    rows: the approximate number of lines.
    header: the first complete header; None if there is none.
    format: the format of the rows before it, which a torn header may still tell.
  """

  size: int
  rows: int
  header: Row | None
  format: int


def survey(path: str) -> Survey:
  """Looks at the first lines of a file, or at all of them if it has no header."""
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
    # The line density of the next part gives the approximate number of rows.
    head = file.read(_PART)
  rows = 16 + size * head.count(b"\n") // max(len(head), 1)
  return Survey(size, rows + rows // 32, header, number or FORMAT)


class Part(NamedTuple):
  """Some lines of a file.

  Attributes:
    entries: headers and rows, in order.
    others: how many lines were neither.
    block: more rows, all uniform; None if there are none. With a block, `entries` has no header.
    among: the places of the block among all rows.
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
      # A part ends with a line; the beginning of the next line waits for the next part.
      lines, end, rest_of_line = (rest + data).rpartition(b"\n") if b"\n" in data else (b"", b"", rest + data)
      if lines:
        yield _with_block(lines + end) or Part(*_entries(lines.split(b"\n")))
      rest = rest_of_line
  if rest:
    yield Part(*_entries([rest]))


def last_parts(path: str) -> Iterator[tuple[list[Row], bool]]:
  """Headers and rows at the end of a file, each time from a larger part, and whether that is the whole file."""
  with Path(path).open("rb") as file:
    size, length = file.seek(0, os.SEEK_END), _TAIL
    while True:
      lines = _from(file, max(size - length, 0), size)
      yield _entries(lines)[0], length >= size
      if length >= size:
        return
      length *= 4


def _from(file: BinaryIO, start: int, size: int) -> list[bytes]:
  """The lines that begin at `start` or later."""
  file.seek(max(start - 1, 0))
  data = file.read(size - max(start - 1, 0))
  return data.splitlines(keepends=True) if start == 0 else data.split(b"\n", 1)[-1].split(b"\n")


def _with_block(text: bytes) -> Part | None:
  """A part whose rows are mostly uniform; None if they are not, or a line is not a row."""
  characters = np.frombuffer(text, np.uint8)
  ends = np.flatnonzero(characters == ord("\n")) + 1
  bounds = np.concatenate([[0], ends])
  # Select the rows with the usual number of objects; if they are not uniform, those with the usual number of keys.
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
  """The text without some of its lines; line i begins at `bounds[i]`."""
  starts = [0, *(bounds[i + 1] for i in lines)]
  stops = [*(bounds[i] for i in lines), len(text)]
  return b"".join([text[start:stop] for start, stop in zip(starts, stops, strict=True)])


def _entries(lines: list[bytes]) -> tuple[list[Row], int]:
  """The headers and rows in the lines, and how many lines hold neither."""
  entries = _together(lines)
  if entries is None:
    lines = [line for line in lines if line.strip()]
    entries = [entry for line in lines if (entry := _entry(line)) is not None]
  elif {type(entry.get(STEP)) for entry in entries} == {int}:
    return entries, 0
  ours = [entry for entry in entries if HEADER in entry or type(entry.get(STEP)) is int]
  return ours, len(lines) - len(ours)


def _together(lines: list[bytes]) -> list[Row] | None:
  """The lines, parsed in a single call; None unless every line is an object by itself."""
  try:
    entries = json.loads(f"[{b','.join(lines).decode()}]")
  except (ValueError, RecursionError):
    return None
  # The next line could complete a torn one, but then there are fewer objects than lines.
  return entries if len(entries) == len(lines) and {*map(type, entries)} <= {dict} else None


def _entry(line: bytes) -> Row | None:
  """The object in a line; None if the line is torn, not text, or nested too deeply to be a row."""
  try:
    entry = json.loads(line.decode("utf-8-sig"))
  except (ValueError, RecursionError):
    return None
  return entry if isinstance(entry, dict) else None
