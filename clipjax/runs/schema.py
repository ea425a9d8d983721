"""Every key of a recorded run, once: of a row, of the header, and of what the caller pushes.

A file of a run is JSON Lines: a header, then a row for each step. The numbers of the states have the keys of
`clipjax.metrics`, `<name>/<quantity>` or `<name>/<quantity>/<label>`, whose quantities are in `clipjax.quantities`.
"""

from collections.abc import Iterable
from typing import Any

from clipjax.quantities import COSINE, LIMITS, MAX_NORM, NONFINITE, NORM, RATIO, SCALE, SHARE, WORST_NORM

FORMAT = 2  # In the header. In format 1 the step of a row was the count of the updates; a reader takes both.

# The header.
HEADER = "clipjax_run"
VERSION = "version"
STARTED = "started"  # Seconds since 1970; tells one `Recorder` from the next.
LEAVES = "leaves"  # Names of leaves or groups, by the name of a state.
PARAMETERS = "parameters"
EVERY = "every"
OPTIMIZER = "optimizer"  # The classes of the states that were pushed, without those of this package.

# A row.
STEP = "step"  # The number that the caller pushed.
UPDATE = "update"  # How many updates the outermost state has counted.
TIME = "time"  # Of the push, in seconds since 1970.
BATCH = "batch"  # What the caller calls the batch: an int or a short string; of several micro-batches a list.
LEAF = "leaf"  # Numbers by leaf: a vector by `<name>/<quantity>`.
FLAGS = "nonfinite"  # What the numbers were that are null: "inf", "-inf" or "nan", by key.
WEIGHTS = "weights"  # The histogram of log10|w|.
BACK = "back"  # True where the run went back to this step: rows from it on that stand before are superseded.
USER_STEP = "user_step"  # Format 1: the number that the caller pushed, where it was another. On the device: the step.

OBJECTS = (BATCH, LEAF, FLAGS, WEIGHTS, BACK)  # What is not a number.
RESERVED = frozenset({HEADER, STEP, UPDATE, TIME, USER_STEP, *OBJECTS})

# What the caller pushes under a name that means something here.
LOSS = "loss"
TOKENS = "tokens"
EXAMPLES = "examples"
AMOUNTS = (TOKENS, EXAMPLES)  # Summed over micro-batches, where all else is averaged.

# The names of states that mean something here.
GRAD = "grad"
UPDATES = "update"  # A watch at the end of the chain: its ratio is that of the step to the parameters.
SKIP = "skip"
EFFECT = "effect"  # Of `clip_effect`, unless the caller has named it.

# What is said by leaf or group as well; numbers by block go by the name of the state, or by that with its unit.
BY_BLOCK = frozenset({NORM, MAX_NORM, SCALE, RATIO, NONFINITE, WORST_NORM, COSINE, SHARE})
UNITS = ("", "_group", "_leaf")

MAY_BE_INF = LIMITS | {WORST_NORM}  # inf there is not a fault of the step.


def key_of(name: str, quantity: str, label: str | None = None) -> str:
  """The key of a number, as in "grad/norm" or "grad/norm/w"."""
  return f"{name}/{quantity}" if label is None else f"{name}/{quantity}/{label}"


def names_with(keys: Iterable[str], quantity: str) -> list[str]:
  """The names of the states that have a quantity, of all leaves together: "grad" for "grad/norm", not "grad/norm/w"."""
  ending = f"/{quantity}"
  found = [key for key in keys if key.endswith(ending) and not any(f"/{by}/" in key for by in BY_BLOCK)]
  return [key.removesuffix(ending) for key in found]


def name_of(key: str) -> str:
  """The name of the state whose numbers by leaf these are: "grad" of "grad/norm"."""
  return key.rpartition("/")[0]


def merge(old: dict[str, Any], new: dict[str, Any]) -> None:
  """Puts a later row into an earlier one of the same step."""
  flags = {key: text for key, text in (old.get(FLAGS) or {}).items() if key not in new}
  flags |= new.get(FLAGS) or {}
  leaf = {**(old.get(LEAF) or {}), **(new.get(LEAF) or {})}
  old.update(new)
  old |= {FLAGS: flags, LEAF: leaf}
  for key in (FLAGS, LEAF):
    if not old[key]:
      del old[key]
