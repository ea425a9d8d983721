"""The arguments of `Recorder.push`: their checks, and the record of a push on its way to a row."""

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.checks import describe, describe_size
from clipjax.runs.record.packing import Layout, Packer

_LONGEST_BATCH = 100  # Characters: enough for the name of a batch, not for its content.
_INT64 = 2**63
_INSIDE_JIT = "`{}` must be an array with a value, got {}: call `push` outside jit, with what the jitted step returns."

Batch = int | str


class Pushed(NamedTuple):
  """A push whose numbers are still on the device."""

  time: float
  thread: int
  step: int | None  # None if it is on the device.
  batch: Batch | None
  scalars: dict[str, Any]
  packer: Packer
  layout: Layout
  vector: jax.Array | None
  weights: jax.Array | None
  by_leaf: bool


def split(scalars: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits scalars into those on the host, as Python numbers, and those on the device."""
  host: dict[str, Any] = {}
  device: dict[str, Any] = {}
  for key, value in scalars.items():
    check_outside_jit(value, key)
    if isinstance(value, np.ndarray | jax.Array):
      if value.shape != ():
        raise ValueError(
          f"`{key}` must be a scalar, got shape {value.shape}: reduce it, for example with jnp.mean, or push one entry."
        )
      if not _is_real(value.dtype):
        raise _no_number(key, value)
    # Device scalars are packed with the metrics; host scalars go straight into the row.
    if isinstance(value, jax.Array):
      device[key] = value
    else:
      host[key] = _python_number(key, value)
  return host, device


def check_outside_jit(value: Any, name: str) -> None:
  """Raises for a traced value."""
  if isinstance(value, jax.core.Tracer):
    raise TypeError(_INSIDE_JIT.format(name, "a traced array"))


def step_of(step: Any) -> int | None:
  """The caller's step number; None if it is on the device."""
  check_outside_jit(step, "step")
  if isinstance(step, numbers.Integral) and not isinstance(step, bool):
    if abs(int(step)) >= _INT64:
      raise ValueError(
        f"`step` must be in the range of an int64, got {describe_size(step)}: pass the number of the step."
      )
    return int(step)
  # A numpy step is on the host already; a JAX one may still be being computed.
  if isinstance(step, jax.Array | np.ndarray) and step.shape == () and jnp.issubdtype(step.dtype, jnp.integer):
    return None if isinstance(step, jax.Array) else int(step)
  raise TypeError(f"`step` must be an integer, got {describe(step)}: pass the number of the step.")


def batch_of(batch: Any) -> Batch | None:
  """The caller's name for the batch."""
  if batch is None:
    return None
  if isinstance(batch, str):
    if len(batch) > _LONGEST_BATCH:
      raise ValueError(
        f"`batch` must have at most {_LONGEST_BATCH} characters, got {len(batch)}: pass the name of the batch, not "
        "what is in it."
      )
    return batch
  if isinstance(batch, numbers.Integral) and not isinstance(batch, bool):
    if abs(int(batch)) >= _INT64:
      raise ValueError(f"`batch` must be in the range of an int64, got {describe_size(batch)}: pass it as a string.")
    return int(batch)
  raise TypeError(
    f"`batch` must be an integer or a short string, got {describe(batch)}: pass the name you look the batch up by."
  )


@functools.cache  # Every push asks for every scalar.
def _is_real(dtype: Any) -> bool:
  return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _python_number(key: str, value: Any) -> int | float:
  number = value.item() if isinstance(value, np.ndarray | np.generic) else value
  if isinstance(number, float):
    return number
  if not isinstance(number, numbers.Real):
    raise _no_number(key, value)
  if isinstance(number, numbers.Integral) and abs(int(number)) < _INT64:
    return int(number)
  try:
    return float(number)
  except OverflowError:
    raise ValueError(f"`{key}` must be in the range of a float, got {describe_size(number)}: scale it.") from None


def _no_number(key: str, value: Any) -> TypeError:
  return TypeError(f"`{key}` must be a real number or an array of shape (), got {describe(value)}: push only numbers.")
