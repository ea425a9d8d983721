"""Numbers, names and steps as the texts of the run wing show them; it loads without JAX."""

from collections.abc import Sequence
from typing import Any


def described(x: Any) -> str:
  """A value in a message: a number or a short string with its type, anything else by its type."""
  if isinstance(x, str | int | float) and len(repr(x)) <= 60:
    return f"{x!r} ({type(x).__name__})"
  name = type(x).__name__
  return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def number(x: float) -> str:
  """Three significant digits; without an exponent from 0.0001 up to a million."""
  rounded = float(f"{x:.3g}")
  return f"{rounded:.0f}" if 1e3 <= rounded < 1e6 else f"{x:.3g}"


def percent(share: float) -> str:
  """A share in percent; one that is not 0 or 1 never reads as such."""
  if 0 < share < 0.001 or 0.999 < share < 1:
    return "<0.1%" if share < 0.5 else ">99.9%"
  return f"{100 * share:.3g}%"


def several(names: Sequence[str], most: int = 3) -> str:
  """Names, quoted, which also shows what is not printable; the first few of many."""
  shown = ", ".join(repr(name) for name in names[:most])
  return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def at_steps(steps: Any) -> str:
  """The first of some steps."""
  shown = ", ".join(map(str, steps[:5]))
  more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
  return f"at step{'s' if len(steps) > 1 else ''} {shown}{more}"


def duration(seconds: float) -> str:
  """A time in milliseconds or seconds."""
  return f"{number(1e3 * seconds)} ms" if seconds < 1 else f"{number(seconds)} s"


def counted(x: float) -> str:
  """A number that may be large, its thousands apart."""
  return f"{x:,.0f}" if x >= 100 else number(x)
