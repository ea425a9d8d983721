"""Parses uniform rows with numpy, hundreds of rows at a time: the inverse of `number_text`.

Nearly all lines of a file have the same keys in the same order and only numbers. The text between two numbers is then
the same in every line. `block` finds where the numbers end, compares the text between them byte for byte, and turns the
digits into numbers: an integer of up to 16 digits over a power of ten. float64 represents both exactly, so the single
division rounds as Python does. Everything else is left to the JSON parser.
"""

import json
import re
from typing import Any

import numpy as np

from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.reading.columns import Block
from clipjax.runs.schema import OBJECTS, STEP

_PAD = b"\0" * 14 + b"}\n"  # The first line then begins like all others, and 16 bytes may be read before any number.
_PIECE = 2**18  # Bytes of text that are parsed together: the intermediate arrays fit in the processor cache.
_NUMBER = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_COMMA, _DOT, _BRACE = b",.}"
_POWERS = 10.0 ** np.arange(17)
_LARGEST = 2**53  # Below, float64 represents every integer.
# Masks for the last 0 to 8 of 8 characters in a little-endian word: its upper bytes.
_LAST = np.array([0, *(2**64 - 2 ** (64 - 8 * i) for i in range(1, 9))], np.uint64)
_ZEROS, _ABOVE_9, _HIGH_BITS = (np.uint64(int(byte * 8, 16)) for byte in ("30", "76", "80"))
# Combine neighbors into one number: digits to pairs, pairs to fours, fours to eights.
_JOIN = tuple((np.uint64(mask), np.uint64(10 * 2**shift * scale + 1), np.uint64(shift)) for mask, scale, shift in (
  (0x0F0F0F0F0F0F0F0F, 1, 8), (0x00FF00FF00FF00FF, 10, 16), (0x0000FFFF0000FFFF, 1000, 32),
))  # fmt: skip


def block(lines: bytes) -> Block | None:
  """The rows of uniform lines; None if the lines are not uniform."""
  # The first line gives the keys and the text between the numbers.
  keys, glue = _glue(lines[: lines.find(b"\n") + 1])
  if STEP not in keys or not set(keys).isdisjoint(OBJECTS) or min(map(len, glue)) < 8:
    return None
  pieces, start = [], 0
  while start < len(lines):
    stop = lines.find(b"\n", start + _PIECE) + 1 or len(lines)
    piece = _piece(_PAD + lines[start:stop], glue)
    if piece is None:
      return None
    pieces.append(piece)
    start = stop
  values, is_whole = map(np.concatenate, zip(*pieces, strict=True))
  place = keys.index(STEP)
  return Block(keys, values[:, place].astype(np.int64), values) if is_whole[:, place].all() else None


def _piece(text: bytes, glue: list[bytes]) -> tuple[Floats, Bools] | None:
  """The numbers in some lines, and which of them are integers."""
  # Where the numbers end.
  ends, dots = _ends(text)
  if ends.size == 0 or ends.size % len(glue):
    return None
  # Without the dots, every number is only digits and ends where the next glue begins.
  digits = text.replace(b".", b"")
  plain = ends - np.cumsum(dots > 0)
  befores = np.concatenate([[len(_PAD) - 2], plain[:-1]])
  starts = befores + np.tile([len(part) for part in glue], len(ends) // len(glue))
  if plain[-1] != len(digits) - 2 or (starts >= plain).any():
    return None
  words = np.ndarray(len(digits), "<u8", digits + b"\0" * 7, 0, (1,))  # The 8 characters from each place on.
  if not _is_glued(words, befores.reshape(-1, len(glue)), glue) or not digits.endswith(b"}\n"):
    return None
  # Plain digits by arithmetic; Python parses numbers with a sign, an exponent or more than 16 digits.
  values, is_plain = _values(words, starts, plain, dots)
  for i in np.flatnonzero(~is_plain).tolist():
    number = text[starts[i] + ends[i] - plain[i] - (dots[i] > 0) : ends[i]]
    if not _NUMBER.fullmatch(number):
      return None
    values[i] = float(number)
  return values.reshape(-1, len(glue)), (is_plain & (dots == 0)).reshape(-1, len(glue))


def _glue(line: bytes) -> tuple[tuple[str, ...], list[bytes]]:
  """The keys of a line and the text before each of its numbers; no keys unless all values are numbers."""
  fields = line.removeprefix(b"{").removesuffix(b"}\n").split(b", ")
  heads = [field[: field.find(b'": ') + 3] for field in fields]
  try:
    keys = tuple(json.loads(b"{" + b", ".join(head + b"0" for head in heads) + b"}"))
  except ValueError:
    return (), [b""]
  if len(keys) != len(heads) or b"." in b"".join(heads) or b"\\" in b"".join(heads):
    return (), [b""]
  return keys, [(b", " if i else b"}\n{") + head for i, head in enumerate(heads)]


def _ends(text: bytes) -> tuple[Ints, Ints]:
  """The end of each number, and the length of its fraction with the dot; empty if a number has two dots."""
  characters = np.frombuffer(text, np.uint8, offset=len(_PAD))
  marks = np.flatnonzero((characters == _COMMA) | (characters == _DOT) | (characters == _BRACE))
  is_dot = characters[marks] == _DOT
  places = np.flatnonzero(~is_dot)
  if not places.size or (np.diff(places, prepend=-1) > 2).any():
    return np.zeros(0, np.int64), np.zeros(0, np.int64)
  ends, before = marks[places], np.maximum(places - 1, 0)
  return ends + len(_PAD), np.where(is_dot[before], ends - marks[before], 0)


def _is_glued(words: Any, befores: Ints, glue: list[bytes]) -> bool:
  """Whether the text between the numbers is the same in every line, compared 8 bytes at a time."""
  columns, places, wanted = [], [], []
  for i, part in enumerate(glue):
    for place in {*range(0, len(part) - 7, 8), len(part) - 8}:
      columns.append(i)
      places.append(place)
      wanted.append(int.from_bytes(part[place : place + 8], "little"))
  return bool((words[befores[:, columns] + np.array(places)] == np.array(wanted, np.uint64)).all())


def _values(words: Any, starts: Ints, ends: Ints, dots: Ints) -> tuple[Floats, Any]:
  """The numbers between `starts` and `ends`, and whether each consists of at most 16 digits."""
  length, fraction = ends - starts, np.maximum(dots - 1, 0)
  lower, is_number = _eight(words[ends - 8], np.minimum(length, 8))
  upper, is_upper = _eight(words[ends - 16], np.clip(length - 8, 0, 8))
  whole = upper * np.uint64(10**8) + lower
  is_plain = is_number & is_upper & (length <= 16) & (whole < _LARGEST)
  # JSON requires a digit before and after the dot, and no leading zeros.
  is_plain &= (length > fraction) & (dots != 1)
  is_plain &= (length - fraction == 1) | (words[starts] & np.uint64(0xFF) != ord("0"))
  values: Floats = whole.astype(np.float64) / _POWERS.take(np.minimum(fraction, 16))
  return values, is_plain


def _eight(words: Any, count: Ints) -> tuple[Any, Any]:
  """The number in the last `count` of 8 characters, and whether they are all digits."""
  digits = (words ^ _ZEROS) & _LAST.take(count)
  is_number = ((digits + _ABOVE_9) | digits) & _HIGH_BITS == 0
  for mask, factor, shift in _JOIN:
    digits = ((digits & mask) * factor) >> shift
  return digits, is_number
