"""Numbers as a run file has them.

A float32 is written with 9 digits, which identify it uniquely. Layers stacked in one array have thousands of norms, and
numpy turns such vectors into the same text in a tenth of the time.
"""

import json
import math
from typing import Any

import numpy as np

from clipjax.runs.kinds import Floats, Ints

_MANY = 100  # Fewer numbers are written one by one, as shorter text.
_LOWEST, _HIGHEST = -45, 38  # Exponents of float32.
_POWERS = 10.0 ** np.arange(8 - _HIGHEST, 8 - _LOWEST + 1)  # By exponent: the power that scales a number to 9 digits.
_EXACT = 12  # The product of a float32 and 10**12 still fits in the 53 bits of a float64.
_WHOLE = 22  # Powers of ten up to 10**22 are exact in float64.
_UNSURE = 1e-6  # This close to a half, rounding errors may decide.
# Four characters per 32-bit word, which numpy copies fast: ", 1." and "2345" and "6789" and "e-01".
_FIRST = np.array([f", {i}." for i in range(10)], "S4").view(np.uint32)
_FOUR = np.array([f"{i:04d}" for i in range(10**4)], "S4").view(np.uint32)
_EXPONENT = np.array([f"e{i:+03d}" for i in range(_LOWEST, _HIGHEST + 1)], "S4").view(np.uint32)
_NULL = np.frombuffer(b", null          ", np.uint32)


def numbers(values: np.ndarray[Any, Any]) -> list[Any]:
  """Python numbers, nested like the array. A float32 is rounded to 9 digits: 0.1, not 0.10000000149011612."""
  if values.dtype != np.float32:
    return values.tolist()  # type: ignore[no-any-return]  # numpy leaves its type open.
  if values.ndim == 1 and len(values) < _MANY:
    return [_nine_digits(x) for x in values.tolist()]
  return _rounded(values.ravel()).reshape(values.shape).tolist()  # type: ignore[no-any-return]


def _nine_digits(x: float) -> float:
  return float(f"{x:.9g}")


def json_array(values: np.ndarray[Any, Any]) -> str:
  """A vector as JSON: the values of `numbers`, with null for nonfinite ones."""
  if len(values) >= _MANY:
    if (values == values[0]).all():  # Common: no nonfinite entries, or nothing clipped.
      return f"[{', '.join([_one_by_one(values[:1])] * len(values))}]"
    if values.dtype == np.float32 and not (values < 0).any():
      return _together(values)
  return f"[{_one_by_one(values)}]"


def _one_by_one(values: np.ndarray[Any, Any]) -> str:
  return json.dumps([x if math.isfinite(x) else None for x in numbers(values)])[1:-1]


def _together(values: np.ndarray[Any, Any]) -> str:
  """Nonnegative float32 numbers as text of equal width: 1.23456789e-01."""
  known = np.isfinite(values)
  digits, exponents = _scientific(np.where(known, values, 0).astype(np.float64))
  # Split the 9 digits into 1, 4 and 4: one table lookup each.
  whole = digits.astype(np.uint32)
  first = whole // np.uint32(10**8)
  rest = whole - first * np.uint32(10**8)
  middle = rest // np.uint32(10**4)
  text = np.empty((len(values), 4), np.uint32)
  text[:, 0] = _FIRST.take(first)
  text[:, 1] = _FOUR.take(middle)
  text[:, 2] = _FOUR.take(rest - middle * np.uint32(10**4))
  text[:, 3] = _EXPONENT.take(exponents - _LOWEST)
  if not known.all():
    text[~known] = _NULL  # As wide as a number, thanks to its spaces.
  return f"[{text.tobytes()[2:].decode()}]"


def _rounded(values: np.ndarray[Any, np.dtype[np.float32]]) -> Floats:
  """The float64 nearest to the 9 digits of each number."""
  known = np.isfinite(values)
  digits, exponents = _scientific(np.abs(np.where(known, values, 0).astype(np.float64)))
  # One multiplication or division by an exact power of ten rounds correctly; beyond 10**22 Python does it.
  places = 8 - exponents
  power = _POWERS[_HIGHEST - 8 + np.abs(places)]
  out = np.where(known, np.copysign(np.where(places < 0, digits * power, digits / power), values), values)
  for i in np.flatnonzero(np.abs(places) > _WHOLE).tolist():
    out[i] = _nine_digits(float(values[i]))
  return out


def _scientific(values: Floats) -> tuple[Floats, Ints]:
  """Nine digits as an integer, and the exponent of the first digit; rounded as Python rounds."""
  zero = values == 0
  positive = values + zero
  exponents = np.floor(np.log10(positive)).astype(np.int64)
  scaled = positive * _POWERS.take(_HIGHEST - exponents)
  digits = np.rint(scaled)
  # Python formats the few numbers whose last digit floating-point errors could change.
  unsure = np.abs(scaled - digits) > 0.5 - _UNSURE
  unsure &= (exponents > 8) | (exponents < 8 - _EXACT)
  unsure |= (digits < 10**8) | (digits >= 10**9)  # The logarithm or the last digit was rounded up.
  for i in np.flatnonzero(unsure).tolist():
    mantissa, exponent = f"{positive[i]:.8e}".split("e")
    digits[i], exponents[i] = int(mantissa.replace(".", "")), int(exponent)
  digits[zero] = 0
  return digits, exponents
