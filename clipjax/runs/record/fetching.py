"""Reads the packed vectors of pushes from the device, many at once.

A push that cannot be read, because its step failed, is left out with one warning; the others of its batch are kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from clipjax.runs.record.packing import Layout, Seen
from clipjax.runs.record.pushes import Pushed


def fetched(arrays: list[jax.Array | None], warn: Callable[[str], None]) -> list[Any]:
  """Copies the arrays to the host together; None for an array without a value, because its step failed.

  Waits for the device.
  """
  try:
    if _are_on_cpu(arrays):  # `device_get` would first request a copy of each.
      return [array if array is None else np.asarray(array) for array in arrays]
    return list(jax.device_get(arrays))
  except Exception as error:
    # One failed step fails the whole read: read one by one to lose only its own numbers.
    out = [_value(array) for array in arrays]
    lost = sum(a is not None and b is None for a, b in zip(arrays, out, strict=True))
    warn(f"{lost} pushes could not be read from the device ({str(error).splitlines()[0]}): they are left out.")
    return out


def seen_in(batch: list[Pushed], vectors: list[Any]) -> list[Seen | None]:
  """Unpacks the vectors; vectors of one layout are unpacked together."""
  out: list[Seen | None] = [None] * len(batch)
  places: dict[Layout, list[int]] = {}
  for i, (pushed, words) in enumerate(zip(batch, vectors, strict=True)):
    if words is not None:
      places.setdefault(pushed.layout, []).append(i)
  for layout, some in places.items():
    for i, seen in zip(some, layout.read([vectors[i] for i in some]), strict=True):
      out[i] = seen
  return out


def _value(array: Any) -> Any:
  try:
    return jax.device_get(array)
  except Exception:
    return None


def _are_on_cpu(arrays: list[jax.Array | None]) -> bool:
  """Whether these arrays, which share a place, are in host memory; True if there are none."""
  first = next((array for array in arrays if array is not None), None)
  return first is None or all(device.platform == "cpu" for device in first.devices())
