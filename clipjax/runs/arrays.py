"""The fields of a `Run` from the arrays that a `jax.lax.scan` returned: a dict with one array per recorded number.

Numbers by leaf become vectors with a column per leaf, everything else becomes columns. numpy alone; every check of the
caller's arrays is here.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipjax.checks import describe
from clipjax.metric_names import LIMITS
from clipjax.rules.base import is_no_limit
from clipjax.runs.kinds import Floats, Ints, Names
from clipjax.runs.schema import BY_BLOCK, HEADER, OBJECTS, STEP, key_of

_RULE = "`arrays` must be a dict of arrays of shape (steps,)"
_RETURNED = "pass what the scan returned besides its carry."


def fields_of(arrays: Any, steps: Any) -> dict[str, Any]:
  """The fields of a `Run`, by name; raises for anything but a dict of 1-D arrays of equal length."""
  values = _checked(arrays)
  size = len(next(iter(values.values())))
  # A column has NaN for a nonfinite number, and a flag that says so.
  columns = {key: column for key, column in values.items() if _split(key) is None}
  leaves, vectors = _vectors(values)
  numbers = np.arange(1, size + 1) if steps is None else _checked_steps(steps, size)
  flags = {key: ~np.isfinite(column) for key, column in columns.items() if not np.isfinite(column).all()}
  return {
    "path": "",
    "steps": numbers,
    "columns": {key: np.where(flags[key], np.nan, x) if key in flags else x for key, x in columns.items()},
    "flags": flags,
    "leaves": leaves,
    "vectors": {key: (numbers, x) for key, x in vectors.items()},
    "weights": None,
    "parameters": None,
  }


def _vectors(values: Mapping[str, Floats]) -> tuple[Names, dict[str, Floats]]:
  """The leaf names of each state, and the numbers by leaf with one column per leaf."""
  parts = {key: split for key in values if (split := _split(key)) is not None}
  labels: dict[str, set[str]] = {}
  for name, _, label in parts.values():
    labels.setdefault(name, set()).add(label)
  leaves = {name: tuple(sorted(some, key=_in_order)) for name, some in labels.items()}
  places = {name: {label: i for i, label in enumerate(some)} for name, some in leaves.items()}
  vectors: dict[str, Floats] = {}
  for key, (name, quantity, label) in parts.items():
    shape = len(values[key]), len(leaves[name])
    vector = vectors.setdefault(key_of(name, quantity), np.full(shape, np.nan))
    # In a vector, NaN means that nothing was recorded, so a nonfinite number is inf.
    vector[:, places[name][label]] = np.where(np.isnan(values[key]), np.inf, values[key])
  return leaves, vectors


def _split(key: str) -> tuple[str, str, str] | None:
  """The state, quantity and leaf of a key such as "grad/norm/w"; None unless the number belongs to a leaf."""
  parts = key.split("/")
  for i in range(1, len(parts) - 1):
    if parts[i] in BY_BLOCK:
      return "/".join(parts[:i]), parts[i], "/".join(parts[i + 1 :])
  return None


def _in_order(label: str) -> list[tuple[int, str]]:
  """A sort key that puts "w[2]" before "w[10]"; a scan returns its keys in character order."""
  return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", label)]


def _checked(arrays: Any) -> dict[str, Floats]:
  """The arrays as float64; nonfinite numbers stay inf or NaN."""
  if not isinstance(arrays, Mapping):
    raise TypeError(f"{_RULE}, got {describe(arrays)}: {_RETURNED}")
  if not arrays:
    raise ValueError(f"{_RULE}, got an empty dict: {_RETURNED}")
  out = {key: _checked_array(key, value) for key, value in arrays.items()}
  first, size = next((key, len(values)) for key, values in out.items())
  if not size:
    raise ValueError(f"{_RULE}, got empty arrays: {_RETURNED}")
  for key, values in out.items():
    if len(values) != size:
      raise ValueError(f"{_RULE}, got {size} steps of {first!r} and {len(values)} of {key!r}: {_RETURNED}")
  return out


def _checked_array(key: Any, value: Any) -> Floats:
  if not isinstance(key, str):
    raise TypeError(f"{_RULE}, got the key {key!r}: use a string as the name of each array.")
  if key in (HEADER, STEP, *OBJECTS):
    remedy = "pass it as `steps`" if key == STEP else "rename it"
    raise ValueError(f"{_RULE}, got the key {key!r}, which means something else in a run: {remedy}.")
  array = _numbers(value)
  if array is None:
    raise TypeError(f"{_RULE}, got {describe(value)} at {key!r}: pass real numbers, outside jit.")
  if array.ndim == 0:
    raise ValueError(f"{_RULE}, got a scalar at {key!r}: return it from each step of the scan.")
  if array.ndim > 1:
    raise ValueError(
      f"{_RULE}, got shape {array.shape} at {key!r}: for runs under vmap take one, "
      "jax.tree.map(lambda x: x[0], arrays); for a scan in a scan join the steps, "
      "jax.tree.map(lambda x: x.reshape(-1), arrays)."
    )
  values: Floats = array.astype(np.float64)
  if not LIMITS.isdisjoint(key.split("/")):
    values = np.where(is_no_limit(array), np.inf, values)
  return values


def _numbers(value: Any) -> Any:
  """The value as a numpy array; None unless it has real numbers."""
  try:
    array = np.asarray(value)
  except (ValueError, TypeError):  # Lists of different lengths, or a traced array.
    return None
  # The 16-bit and 8-bit floats that JAX adds to numpy have kind "V".
  is_real = array.dtype.kind in "fiub" or (array.dtype.kind == "V" and "float" in array.dtype.name)
  return array if is_real else None


def _checked_steps(steps: Any, size: int) -> Ints:
  array = _numbers(steps)
  if array is None or array.dtype.kind not in "iu":
    raise TypeError(f"`steps` must be whole numbers, got {describe(steps)}: pass the number of each step.")
  if array.shape != (size,):
    raise ValueError(f"`steps` must have the shape ({size},) of the arrays, got {array.shape}: pass one for each step.")
  numbers: Ints = array.astype(np.int64)
  if (falls := np.diff(numbers) <= 0).any():
    first = int(np.argmax(falls))
    raise ValueError(f"`steps` must ascend, got {numbers[first + 1]} after {numbers[first]}: sort the arrays by step.")
  return numbers
