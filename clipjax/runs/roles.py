"""The role of a column in a run: a loss, a learning rate, the norm of a gradient or of an update.

Keys of states follow `clipjax.metric_names`. The words of its name tell the role of a scalar that the caller pushed,
such as "train/loss", "val_loss" or "lr".
"""

import enum
import functools
import itertools
import re
from collections.abc import Iterable

import numpy as np

from clipjax.metric_names import COSINE, NORM, PARAM_NORM, RATIO
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.run import Run
from clipjax.runs.schema import BY_BLOCK, GRAD, LOSS, SKIP, UPDATES, key_of, names_with


class Role(enum.Enum):
  """The role of a column."""

  LOSS = enum.auto()
  VALIDATION = enum.auto()  # A loss that is evaluated, not trained.
  RATE = enum.auto()  # A learning rate.
  SCALE = enum.auto()  # A loss scale, as for float16.
  NORM = enum.auto()  # The norm of a gradient.
  UPDATE = enum.auto()  # The norm of an update.
  PARAMETERS = enum.auto()  # The norm of the parameters.


_LOSSES = {LOSS, "losses", "nll", "xent", "cost", "mse", "perplexity", "ppl"}
_SCALE = {"scale", "scaling"}
_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "dev", "test"}
# "loss" with any of these words is still the training loss.
_PLAIN = {"train", "training", "total", "mean", "avg", "average", "batch", "step", "full"}


@functools.lru_cache(4096)  # A recorder asks for every key of every row.
def role_of(key: str) -> Role | None:
  """The role of a column; None for one that is not judged, such as a counter."""
  if (name := _state(key, NORM)) is not None:
    return None if name == SKIP else Role.UPDATE if _is_update(name) else Role.NORM
  if _state(key, PARAM_NORM) is not None:
    return Role.PARAMETERS
  if key.startswith(key_of(SKIP, "")) or any(f"/{quantity}/" in key for quantity in BY_BLOCK):
    return None  # The caller may give a group any name, even "loss".
  return _role_of_words(_words(key))


def _role_of_words(words: tuple[str, ...]) -> Role | None:
  """The role that these words of a name suggest."""
  if "lr" in words or ("learning", "rate") in itertools.pairwise(words):
    return Role.RATE
  if LOSS in words and not _SCALE.isdisjoint(words):
    return Role.SCALE
  if not words or not (words[-1] in _LOSSES or words[-2:] == ("cross", "entropy")):
    return None
  return Role.LOSS if _VALIDATION.isdisjoint(words) else Role.VALIDATION


def main_loss(keys: Iterable[str]) -> str | None:
  """The training loss: "loss", else one such as "train/loss" or "total_loss", else the only loss."""
  losses = keys_with(keys, Role.LOSS)
  plain = [key for key in losses if {LOSS} <= set(_words(key)) <= _PLAIN | {LOSS}]
  if LOSS in losses:
    return LOSS
  return plain[0] if plain else losses[0] if len(losses) == 1 else None


def losses_of(run: Run) -> tuple[Ints, Floats]:
  """The steps and values of the training loss where it is finite; empty if it was not recorded."""
  key = main_loss(run.columns)
  values = np.full(len(run.steps), np.nan) if key is None else run.columns[key]
  known = np.isfinite(values)
  return run.steps[known], values[known]


def keys_with(keys: Iterable[str], *roles: Role) -> list[str]:
  """The columns with these roles, in their order."""
  return [key for key in keys if role_of(key) in roles]


def judged_states(run: Run) -> list[str]:
  """The names of the states whose gradients are judged, the main one first: "grad" if there is one.

  The state of `skip_steps` is judged only if there is no other.
  """
  names = [name for name in names_with(run.columns, NORM) if not _is_update(name)]
  others = sorted((name for name in names if name != SKIP), key=lambda name: name != GRAD)
  return others or names


def effect_names(run: Run) -> list[str]:
  """The names of the states of `clip_effect`."""
  return names_with(run.columns, COSINE)


def update_states(run: Run) -> list[str]:
  """The names of the watches at the end of a chain, which measure the steps of the optimizer."""
  return [name for name in names_with(run.columns, NORM) if _is_update(name)]


def update_ratio(run: Run) -> str | None:
  """The key of the update-to-parameter ratios, of all leaves or by layer; None if `clip_effect` has that name."""
  return None if UPDATES in effect_names(run) else key_of(UPDATES, RATIO)


def _is_update(name: str) -> bool:
  return name.startswith(UPDATES) or UPDATES in _words(name)


def _state(key: str, quantity: str) -> str | None:
  """The state that has this quantity over all leaves under this key; None for any other key."""
  name = key.removesuffix(key_of("", quantity))
  return name if name != key and names_with([key], quantity) else None


def _words(key: str) -> tuple[str, ...]:
  """The words of a name in lower case; "trainLoss" and "train/loss" have the same words."""
  spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key)
  return tuple(re.findall(r"[a-z]+|[0-9]+", spaced.lower()))
