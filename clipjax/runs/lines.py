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

from clipjax.runs.schema import FORMAT, HEADER, STEP
from clipjax.runs.words import described

_PART = 2**18  # Bytes of a part: what is made of it should stay in the cache of a processor.
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
    lines: how many lines it has.
    header: the first header that is whole; None without one.
    format: that of the rows before it, which a torn header may tell.
  """

  lines: int
  header: dict[str, Any] | None
  format: int


def survey(path: str) -> Survey:
  """Counts the lines of a file, and finds its first header."""
  lines, header, number = 0, None, None
  with Path(path).open("rb") as file:
    for line in file:
      lines += 1
      if line.startswith(_START):
        found = _NUMBER.match(line)
        number = number or (int(found[1]) if found else None)
        if (header := _entry(line)) is not None:
          break
    while part := file.read(_PART):
      lines += part.count(b"\n")
  return Survey(lines + 1, header, number or FORMAT)  # The last one may lack its end.


def parts(path: str, lines: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
  """The first `lines` lines, part by part: headers and rows in their order, and how many lines were neither."""
  with Path(path).open("rb") as file:
    while lines > 0 and (part := file.readlines(_PART)[:lines]):
      lines -= len(part)
      yield _entries(part)


def last_parts(path: str) -> Iterator[tuple[list[dict[str, Any]], bool]]:
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


def _entries(lines: list[bytes]) -> tuple[list[dict[str, Any]], int]:
  """What the lines hold, and how many of them hold nothing of ours."""
  entries = _together(lines)
  if entries is None:
    lines = [line for line in lines if line.strip()]
    entries = [entry for line in lines if (entry := _entry(line)) is not None]
  elif {type(entry.get(STEP)) for entry in entries} == {int}:
    return entries, 0
  ours = [entry for entry in entries if HEADER in entry or type(entry.get(STEP)) is int]
  return ours, len(lines) - len(ours)


def _together(lines: list[bytes]) -> list[dict[str, Any]] | None:
  """What the lines hold, by one call of the parser; None where not every line is an object by itself."""
  try:
    entries = json.loads(f"[{b','.join(lines).decode()}]")
  except (ValueError, RecursionError):
    return None
  # A torn line could be healed by one that follows it, but that leaves fewer objects than lines.
  return entries if len(entries) == len(lines) and {*map(type, entries)} == {dict} else None


def _entry(line: bytes) -> dict[str, Any] | None:
  """What a line holds; None where it is torn, no text, or nested too deep for any row."""
  try:
    entry = json.loads(line.decode("utf-8-sig"))
  except (ValueError, RecursionError):
    return None
  return entry if isinstance(entry, dict) else None
