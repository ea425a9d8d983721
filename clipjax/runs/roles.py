"""What a column of a run is: a loss, a learning rate, the norm of a gradient or of an update.

Names of states follow `clipjax.quantities`. What the caller pushes is told by the words of its name, as in
"train/loss", "val_loss" or "lr".
"""

import enum
import functools
import itertools
import re
from collections.abc import Iterable

import numpy as np

from clipjax.quantities import COSINE, NORM, PARAM_NORM, RATIO
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.run import Run
from clipjax.runs.schema import BY_BLOCK, GRAD, LOSS, SKIP, UPDATES, key_of, names_with


class Role(enum.Enum):
  """What a column is."""

  LOSS = enum.auto()
  VALIDATION = enum.auto()  # A loss that is not trained.
  RATE = enum.auto()  # A learning rate.
  SCALE = enum.auto()  # That of a loss, as for float16.
  NORM = enum.auto()  # Of a gradient.
  UPDATE = enum.auto()  # The norm of an update.
  PARAMETERS = enum.auto()  # The norm of the parameters.


_LOSSES = {LOSS, "losses", "nll", "xent", "cost", "mse", "perplexity", "ppl"}
_SCALE = {"scale", "scaling"}
_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "dev", "test"}
# Words beside "loss" with which a column is still the loss that is trained.
_PLAIN = {"train", "training", "total", "mean", "avg", "average", "batch", "step", "full"}


@functools.lru_cache(4096)  # A recorder asks of every key of every row.
def role_of(key: str) -> Role | None:
  """What a column is; None for what is not judged, as counters are."""
  if (name := _state(key, NORM)) is not None:
    return None if name == SKIP else Role.UPDATE if _is_update(name) else Role.NORM
  if _state(key, PARAM_NORM) is not None:
    return Role.PARAMETERS
  if key.startswith(key_of(SKIP, "")) or any(f"/{quantity}/" in key for quantity in BY_BLOCK):
    return None  # A group may be called as the caller likes.
  return _role_of_words(_words(key))


def _role_of_words(words: tuple[str, ...]) -> Role | None:
  """What the caller means by these words."""
  if "lr" in words or ("learning", "rate") in itertools.pairwise(words):
    return Role.RATE
  if LOSS in words and not _SCALE.isdisjoint(words):
    return Role.SCALE
  if not words or not (words[-1] in _LOSSES or words[-2:] == ("cross", "entropy")):
    return None
  return Role.LOSS if _VALIDATION.isdisjoint(words) else Role.VALIDATION


def main_loss(keys: Iterable[str]) -> str | None:
  """The loss that is trained: "loss", else one such as "train/loss" or "total_loss", else the only one there is."""
  losses = keys_with(keys, Role.LOSS)
  plain = [key for key in losses if {LOSS} <= set(_words(key)) <= _PLAIN | {LOSS}]
  if LOSS in losses:
    return LOSS
  return plain[0] if plain else losses[0] if len(losses) == 1 else None


def losses_of(run: Run) -> tuple[Ints, Floats]:
  """The steps of the loss that is trained and its values, where they are finite; none where it was not recorded."""
  key = main_loss(run.columns)
  values = np.full(len(run.steps), np.nan) if key is None else run.columns[key]
  known = np.isfinite(values)
  return run.steps[known], values[known]


def keys_with(keys: Iterable[str], *roles: Role) -> list[str]:
  """The columns of some roles, in their order."""
  return [key for key in keys if role_of(key) in roles]


def judged_states(run: Run) -> list[str]:
  """The names of the states whose gradients are judged, the main one first: "grad" where there is one.

  That of `skip_steps` is judged where there is no other.
  """
  names = [name for name in names_with(run.columns, NORM) if not _is_update(name)]
  others = sorted((name for name in names if name != SKIP), key=lambda name: name != GRAD)
  return others or names


def effect_names(run: Run) -> list[str]:
  """The names of the states of `clip_effect`."""
  return names_with(run.columns, COSINE)


def update_states(run: Run) -> list[str]:
  """The names of the watches that are last in a chain: what they measure are the steps of the optimizer."""
  return [name for name in names_with(run.columns, NORM) if _is_update(name)]


def update_ratio(run: Run) -> str | None:
  """The key of the ratios of updates to parameters, of all or by layer; None where `clip_effect` has that name."""
  return None if UPDATES in effect_names(run) else key_of(UPDATES, RATIO)


def _is_update(name: str) -> bool:
  return name.startswith(UPDATES) or UPDATES in _words(name)


def _state(key: str, quantity: str) -> str | None:
  """The name of the state whose number over all leaves this is."""
  name = key.removesuffix(key_of("", quantity))
  return name if name != key and names_with([key], quantity) else None


def _words(key: str) -> tuple[str, ...]:
  """The words of a name, in small letters: those of "trainLoss" and of "train/loss" are the same."""
  spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key)
  return tuple(re.findall(r"[a-z]+|[0-9]+", spaced.lower()))
