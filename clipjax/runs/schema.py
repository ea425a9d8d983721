"""Every key of a recorded run, written once: keys of a row, of the header, and of what the caller pushes.

A run file is JSON Lines: a header, then one row per step. The numbers of the states use the keys of `clipjax.metrics`,
`<name>/<quantity>` or `<name>/<quantity>/<label>`. `clipjax.metric_names` lists the quantities.
"""

from collections.abc import Iterable
from typing import Any

from clipjax.metric_names import COSINE, LIMITS, MAX_NORM, NONFINITE, NORM, RATIO, SCALE, SHARE, WORST_NORM

FORMAT = 2  # In the header. In format 1 the step of a row was the update count; a reader takes both.

# The header.
HEADER = "clipjax_run"
VERSION = "version"
STARTED = "started"  # Seconds since 1970; distinguishes one `Recorder` from the next.
LEAVES = "leaves"  # Names of leaves or groups, by state name.
PARAMETERS = "parameters"
EVERY = "every"
OPTIMIZER = "optimizer"  # The classes of the states that were pushed, except those of this package.

# A row.
STEP = "step"  # The step number that the caller pushed.
UPDATE = "update"  # How many updates the outermost state has counted.
TIME = "time"  # The time of the push, in seconds since 1970.
BATCH = "batch"  # The caller's name for the batch: an int or a short string, or a list for several micro-batches.
LEAF = "leaf"  # Numbers by leaf: one vector per `<name>/<quantity>`.
FLAGS = "nonfinite"  # What each null number was, by key: "inf", "-inf" or "nan".
WEIGHTS = "weights"  # The histogram of log10|w|.
BACK = "back"  # True if the run went back to this step: earlier rows from this step on are superseded.
USER_STEP = "user_step"  # Format 1: the caller's step number where it differed. On the device: the step.

OBJECTS = (BATCH, LEAF, FLAGS, WEIGHTS, BACK)  # The values that are not numbers.
RESERVED = frozenset({HEADER, STEP, UPDATE, TIME, USER_STEP, *OBJECTS})

# Scalars of the caller whose name has a meaning here.
LOSS = "loss"
TOKENS = "tokens"
EXAMPLES = "examples"
AMOUNTS = (TOKENS, EXAMPLES)  # Summed over micro-batches; everything else is averaged.

# State names with a meaning here.
GRAD = "grad"
UPDATES = "update"  # A watch at the end of the chain: its ratio compares the step with the parameters.
SKIP = "skip"
EFFECT = "effect"  # The default name of `clip_effect`.

# Quantities that are also recorded by leaf or group, under the state name, or the state name with its unit.
BY_BLOCK = frozenset({NORM, MAX_NORM, SCALE, RATIO, NONFINITE, WORST_NORM, COSINE, SHARE})
UNITS = ("", "_group", "_leaf")

MAY_BE_INF = LIMITS | {WORST_NORM}  # inf here does not make the step a bad one.


def key_of(name: str, quantity: str, label: str | None = None) -> str:
  """The key of a number, such as "grad/norm" or "grad/norm/w"."""
  return f"{name}/{quantity}" if label is None else f"{name}/{quantity}/{label}"


def names_with(keys: Iterable[str], quantity: str) -> list[str]:
  """The states that have this quantity over all leaves: "grad" for "grad/norm", but not for "grad/norm/w"."""
  ending = f"/{quantity}"
  found = [key for key in keys if key.endswith(ending) and not any(f"/{by}/" in key for by in BY_BLOCK)]
  return [key.removesuffix(ending) for key in found]


def name_of(key: str) -> str:
  """The state that a vector of numbers by leaf belongs to: "grad" for "grad/norm"."""
  return key.rpartition("/")[0]


def merge(old: dict[str, Any], new: dict[str, Any]) -> None:
  """Merges a later row into an earlier one of the same step; the later number of a key wins."""
  # A number that is pushed again replaces the flag of the old one too.
  flags = {key: text for key, text in (old.get(FLAGS) or {}).items() if key not in new}
  flags |= new.get(FLAGS) or {}
  leaf = {**(old.get(LEAF) or {}), **(new.get(LEAF) or {})}
  old.update(new)
  old |= {FLAGS: flags, LEAF: leaf}
  for key in (FLAGS, LEAF):
    if not old[key]:
      del old[key]
