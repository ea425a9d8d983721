"""Numbers, names and steps as the run wing prints them."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


def described(x: Any) -> str:
  """A value in a message: a number or a short string with its type; only the type of anything else."""
  if isinstance(x, str | int | float) and len(repr(x)) <= 60:
    return f"{x!r} ({type(x).__name__})"
  name = type(x).__name__
  return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def plain(name: str) -> str:
  """A name with every unprintable character escaped: line ends, control characters, direction marks."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def number(x: float) -> str:
  """Three significant digits, without an exponent from 0.0001 up to a million."""
  rounded = float(f"{x:.3g}")
  return f"{rounded:.0f}" if 1e3 <= rounded < 1e6 else f"{x:.3g}"


def percent(share: float) -> str:
  """A share in percent. Only exactly 0 and 1 read as "0%" and "100%"."""
  if 0 < share < 0.001 or 0.999 < share < 1:
    return "<0.1%" if share < 0.5 else ">99.9%"
  return f"{100 * share:.3g}%"


_MOST_STEPS, _MOST_BATCHES = 5, 3  # This many are listed, the rest are counted.
_MOST_NAMES = 3  # This many leaves are listed, the rest are counted.
_MOST_RANGES = 3  # This many ranges of layers are listed; if there are more, the layers are counted.


class Stack(NamedTuple):
  """Consecutive names: all layers of a stacked leaf, or one unstacked leaf.

  Attributes:
    name: the name of the leaf.
    start: the index of the first name.
    size: the number of layers; 1 for an unstacked leaf.
  """

  name: str
  start: int
  size: int


def in_stacks(names: Sequence[str]) -> list[Stack]:
  """Groups the layers of a stack: "w[0]", "w[1]", "w[2]" become the stack "w"."""
  out: list[Stack] = []
  for i, name in enumerate(names):
    leaf, layer = _layer(name)
    last = out[-1] if out else None
    if last is not None and layer == last.size and _layer(names[last.start]) == (leaf, 0):
      out[-1] = Stack(leaf, last.start, last.size + 1)
    else:
      out.append(Stack(name, i, 1))
  return out


def several(names: Sequence[str], among: Sequence[str]) -> str:
  """Lists names in quotes, with unprintable characters escaped, and counts those beyond the third.

  The layers of a stack are listed together, and so is one layer of many stacks: "all 24 layers of 'blocks/w'",
  "'blocks/w[3..7]'", "layer 3 of all 12 stacks".

  Args:
    names: some of `among`, in the same order.
    among: the names of all leaves or groups.
  """
  # Collect the layers of each leaf, then the leaves with the same layers.
  sizes = {stack.name: stack.size for stack in in_stacks(among) if stack.size > 1}
  layers: dict[tuple[str, bool], list[int]] = {}  # Keyed by leaf and whether it is a stack.
  for name in names:
    leaf, layer = _layer(name)
    is_stack = layer >= 0 and leaf in sizes
    layers.setdefault((leaf if is_stack else name, is_stack), []).append(layer)
  alike: dict[tuple[tuple[int, ...], bool], list[str]] = {}  # Keyed by layers and whether these are all layers.
  for (leaf, is_stack), some in layers.items():
    if is_stack:
      alike.setdefault((tuple(some), len(some) == sizes[leaf]), []).append(leaf)
  # Word each group once, at its first leaf.
  said: list[tuple[str, int]] = []  # Text, and how many names it covers.
  for (leaf, is_stack), some in layers.items():
    others = alike[tuple(some), len(some) == sizes[leaf]] if is_stack else []
    if len(others) > _MOST_NAMES or 1 < len(others) == len(sizes):
      if leaf == others[0]:
        said.append((_of_stacks(some, others, sizes), len(some) * len(others)))
    elif is_stack and len(some) == sizes[leaf]:
      said.append((f"all {len(some)} layers of {leaf!r}", len(some)))
    else:
      said.append((_of_stack(leaf, some) if is_stack else repr(leaf), len(some)))
  shown = ", ".join(text for text, _ in said[:_MOST_NAMES])
  left = sum(count for _, count in said[_MOST_NAMES:])
  return f"{shown} and {left} more" if left else shown


def _of_stacks(layers: Sequence[int], leaves: Sequence[str], sizes: dict[str, int]) -> str:
  """The same layers of many stacks."""
  ranges = _ranges(layers)
  which = f"layer{'s' if len(layers) > 1 else ''} {', '.join(ranges)}"
  if len(layers) == sizes[leaves[0]] or len(ranges) > _MOST_RANGES:
    which = f"{'all ' if len(layers) == sizes[leaves[0]] else ''}{len(layers)} layers"
  if len(leaves) == len(sizes):
    return f"{which} of all {len(leaves)} stacks"
  shown = ", ".join(map(repr, leaves[:_MOST_NAMES]))
  return f"{which} of {len(leaves)} stacks ({shown} and {len(leaves) - _MOST_NAMES} more)"


def _layer(name: str) -> tuple[str, int]:
  """The leaf and the layer index of a name such as "w[3]"; for any other name, the name and -1."""
  match = re.fullmatch(r"(.*)\[(0|[1-9][0-9]{0,8})\]", name, re.DOTALL)
  return (match[1], int(match[2])) if match else (name, -1)


def _of_stack(leaf: str, layers: Sequence[int]) -> str:
  """Some layers of one stack."""
  ranges = _ranges(layers)
  return f"{len(layers)} layers of {leaf!r}" if len(ranges) > _MOST_RANGES else repr(f"{leaf}[{', '.join(ranges)}]")


def _ranges(layers: Iterable[int]) -> list[str]:
  """Ascending numbers, with consecutive ones as a range: "0", "3..7"."""
  groups = itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
  runs = [[layer for _, layer in group] for _, group in groups]
  return [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]


def at_steps(steps: Sequence[int], batches: Sequence[Any] | None = None) -> str:
  """Lists the first of some steps, as in "at steps 250 (batch 'shard-3'), 300 and 3 more".

  Args:
    steps: the step numbers that the caller pushed; at least one.
    batches: the caller's name for the batch of each step, or None for a step without one; None if no step has one.
  """
  named = batches is not None and any(batch is not None for batch in batches[:_MOST_STEPS])
  most = _MOST_BATCHES if named else _MOST_STEPS
  said = [f"{step}{_of_batch(batch)}" for step, batch in zip(steps[:most], batches or (None,) * most, strict=False)]
  more = f" and {len(steps) - most} more" if len(steps) > most else ""
  return f"at step{'s' if len(steps) > 1 else ''} {', '.join(said)}{more}"


def _of_batch(batch: Any) -> str:
  """The batch of a step in parentheses, or the batches of a step that has several micro-batches."""
  if batch is None:
    return ""
  if not isinstance(batch, tuple):
    return f" (batch {batch!r})"
  more = f" and {len(batch) - _MOST_BATCHES} more" if len(batch) > _MOST_BATCHES else ""
  return f" (batches {', '.join(map(repr, batch[:_MOST_BATCHES]))}{more})"


def duration(seconds: float) -> str:
  """A duration in milliseconds or seconds."""
  return f"{number(1e3 * seconds)} ms" if seconds < 1 else f"{number(seconds)} s"


def counted(x: float) -> str:
  """A number that may be large, with thousands separators."""
  return f"{x:,.0f}" if x >= 100 else number(x)
