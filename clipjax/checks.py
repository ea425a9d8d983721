"""Checks of arguments, the texts that describe a bad one, and the line that a warning points at.

Python numbers are checked where they are given, before any tracing. Arrays may be traced, so their values are not read:
a bad one shows in the state instead. Every error gives name, rule, value and remedy.
"""

import inspect
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

POLICIES = ("propagate", "zero", "error")

# The remedy for a number that became a tracer inside optax.inject_hyperparams.
STATIC_ARGS_REMEDY = "under `optax.inject_hyperparams`, name it in `static_args`"
ZERO_OR_INF = "pass 0 to zero the gradient or `float('inf')` for no limit"

_NOT_THE_CALLER = ("clipjax", "jax", "optax")
_HOST_NUMBERS = int | float | np.generic | np.ndarray


# Texts ---------------------------------------------------------------------------------------------------------------


def describe(x: Any) -> str:
  """A short text for error messages: dtype and shape of an array, type and value of a Python scalar."""
  shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
  if shape is not None and dtype is not None:
    traced = "traced " if isinstance(x, jax.core.Tracer) else ""
    return f"{traced}{dtype}[{','.join(map(str, shape))}]"
  kind = type(x).__name__
  if isinstance(x, int | float | complex | str):
    return f"{x!r} ({kind})"
  return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def describe_size(x: Any) -> str:
  """A text for a number that is too large to print."""
  return f"an integer of {int(x).bit_length()} bits"


def describe_choice(x: Any) -> str:
  """A text for an argument that must be one of some strings."""
  return describe(x) if hasattr(x, "shape") else repr(x)


def caller_level() -> int:
  """The `stacklevel` that points a warning at the user's line, past the frames of this package, JAX and Optax."""
  level, frame = 1, sys._getframe(1)
  while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
    level, frame = level + 1, frame.f_back
  return level


# Functions -----------------------------------------------------------------------------------------------------------


def is_function(x: Any) -> bool:
  """Whether this is a function, rather than a tree that happens to be callable, such as an Equinox module."""
  return callable(x) and (isinstance(x, jax.tree_util.Partial) or jax.tree_util.all_leaves([x]))


def check_takes(fn: Any, what: str, arguments: str, body: str, *, keywords: tuple[str, ...] = ()) -> None:
  """Raises if a user's function does not take these arguments, by name and number."""
  try:
    signature = inspect.signature(fn)
  except (TypeError, ValueError):  # Some functions written in C have no signature.
    return
  # Bind names instead of values: the function itself never runs.
  names = arguments.split(", ")
  try:
    signature.bind(*names, **dict.fromkeys(keywords))
  except TypeError:
    taken = ", ".join([*names, *(["*"] if keywords else []), *keywords])
    remedy = f"write `lambda {arguments}: {body}`" if body else f"define it as `def update({taken})`"
    raise TypeError(f"{what} must take ({taken}), got a function of {signature}: {remedy}.") from None


# Thresholds and what goes with them ----------------------------------------------------------------------------------


def check_threshold(
  value: Any, argument: str, *, remedy: str = ZERO_OR_INF, or_else: str = "", allow_nan: bool = False
) -> Any:
  """The threshold, with host numbers as floats; raises unless it is >= 0 or a scalar array, whose value is not read.

  `remedy` is for a number out of range; `or_else` extends the remedy for an array of numbers.
  """
  rule = f"`{argument}` must be a number >= 0 or a scalar array"
  if isinstance(value, bool | np.bool_ | str) or not isinstance(value, _HOST_NUMBERS | jax.Array):
    raise TypeError(f"{rule}, got {describe(value)}: pass a float such as 1.0.")
  if isinstance(value, np.ndarray | jax.Array) and value.shape != ():
    raise ValueError(f"{rule}, got {describe(value)}: pass one number{or_else}.")
  dtype = value.dtype if isinstance(value, np.generic | np.ndarray | jax.Array) else np.dtype(type(value))
  if not (jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)):
    raise TypeError(f"{rule}, got {describe(value)}: pass a real number such as 1.0.")
  # The value of an array may be traced; the state shows what is wrong with it.
  if isinstance(value, jax.Array):
    return value
  number = _as_float(value, argument)
  if number < 0 or (math.isnan(number) and not allow_nan):
    raise ValueError(f"`{argument}` must be >= 0, got {number}: {remedy}.")
  return number


def within_range(value: Any) -> Any:
  """Clamps a host number to the range of norms, to keep inf out of states; NaN stays NaN, and arrays are unchanged.

  Without x64, NumPy would warn about a Python number above the largest float32 and turn it into inf.
  """
  if isinstance(value, jax.Array):
    return value
  most = float(np.finfo(jax.dtypes.canonicalize_dtype(np.float64)).max)
  return min(max(_as_float(value, "a threshold"), -most), most)


def _as_float(value: Any, argument: str) -> float:
  try:
    return float(value)
  except OverflowError:
    raise ValueError(
      f"`{argument}` must be within the range of a float, got {describe_size(value)}: pass a smaller number."
    ) from None


def check_eps(eps: Any, *, remedy: str = "pass 0.0, or 1e-6 for the factor of torch") -> Any:
  """`eps`, with host numbers as floats; raises unless it is finite and >= 0, or a scalar array."""
  eps = check_threshold(eps, "eps", remedy=remedy)
  if isinstance(eps, float) and math.isinf(eps):
    raise ValueError(f"`eps` must be finite, got {eps}: {remedy}.")
  return eps


def check_ord(ord: Any, *, for_clip: bool) -> float:
  """The order of the norm as a float, 2 for None; raises if no norm has this order."""
  if ord is None:
    return 2.0
  if isinstance(ord, jax.Array):
    raise TypeError(
      f"`ord` must be a Python number, got {describe(ord)}: pass 2, 1 or `float('inf')`; {STATIC_ARGS_REMEDY}."
    )
  if isinstance(ord, bool) or not isinstance(ord, int | float | np.integer | np.floating):
    raise TypeError(f"`ord` must be a Python number, got {describe(ord)}: pass 2, 1 or `float('inf')`.")
  p = float(ord)
  if p > 0 or (not for_clip and p in (0.0, -math.inf)):
    return p
  allowed = "> 0" if for_clip else "> 0, 0 or -inf"
  raise ValueError(f"`ord` must be {allowed}, got {ord!r}: pass 2 for the Euclidean norm.")


def check_policy(on_nonfinite: Any) -> None:
  """Raises unless `on_nonfinite` names a policy."""
  if not isinstance(on_nonfinite, str) or on_nonfinite not in POLICIES:
    names = ", ".join(f'"{name}"' for name in POLICIES)
    raise ValueError(
      f"`on_nonfinite` must be one of {names}, got {describe_choice(on_nonfinite)}: "
      'pass "zero" to drop such steps or "propagate" to make them visible.'
    )


def check_track(track: Any, argument: str, *thresholds: Any) -> None:
  """Raises if `track` is not a bool, or is False with a schedule or a rule, which need a state."""
  check_flag(track, "track")
  if not track and any(callable(value) or callable(getattr(value, "update", None)) for value in thresholds):
    raise ValueError(
      f"`{argument}` must be a number or an array with `track=False`, got a schedule or a rule: leave `track` at True."
    )


def check_name(name: Any) -> str:
  """The name; raises unless it is a nonempty string."""
  if not isinstance(name, str) or not name:
    raise TypeError(f'`name` must be a nonempty string, got {describe(name)}: pass a word such as "grad".')
  return name


def check_state(state: Any, kind: type, *, or_else: str = "") -> None:
  """Raises if `update` was given another transformation's state; `or_else` extends the remedy."""
  if not isinstance(state, kind):
    raise TypeError(
      f"`state` must be the {kind.__name__} that `init` returned, got {describe(state)}: pass the state of this "
      f"transformation{or_else}."
    )


# Plain arguments -----------------------------------------------------------------------------------------------------


def check_number(
  value: Any, argument: str, low: float, high: float, *, open_low: bool = False, finite: bool = False
) -> None:
  """Raises unless `value` is a number in its range, or an array."""
  if isinstance(value, jax.Array):
    return
  below = f"> {low:g}" if open_low else f">= {low:g}"
  rule = f"`{argument}` must be a {'finite ' if finite else ''}number {below}"
  rule += "" if math.isinf(high) else f" and <= {high:g}"
  if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
    raise TypeError(f"{rule}, got {describe(value)}: pass a float.")
  number = _as_float(value, argument)
  if not (low < number if open_low else low <= number) or not number <= high or (finite and math.isinf(number)):
    raise ValueError(f"{rule}, got {value}: choose one in that range.")


def check_whole(value: Any, argument: str, low: int, high: int | None = None) -> None:
  """Raises unless `value` is a Python integer in its range."""
  rule = f"`{argument}` must be an integer >= {low}" + ("" if high is None else f" and <= {high}")
  if isinstance(value, jax.Array):
    raise TypeError(f"{rule}, got {describe(value)}: pass a Python integer; {STATIC_ARGS_REMEDY}.")
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise TypeError(f"{rule}, got {describe(value)}: pass a Python integer.")
  most = 2**31 - 1 if high is None else high
  if not low <= value <= most:
    rule += f" and <= {most}" if high is None and value > most else ""
    raise ValueError(f"{rule}, got {value}: choose one in that range.")


def check_choice(value: Any, argument: str, choices: tuple[str, ...]) -> None:
  """Raises unless `value` is one of some strings."""
  if not isinstance(value, str) or value not in choices:
    names = ", ".join(f'"{name}"' for name in choices)
    raise ValueError(f"`{argument}` must be one of {names}, got {describe_choice(value)}: choose one of them.")


def check_flag(value: Any, argument: str) -> None:
  """Raises unless `value` is a Python bool."""
  if not isinstance(value, bool):
    raise TypeError(f"`{argument}` must be True or False, got {describe(value)}: pass one of them.")
