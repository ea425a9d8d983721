"""What a column of a run is: a loss, a learning rate, the norm of a gradient or of an update.

Names of states follow `clipjax.quantities`. What the caller pushes is told by the words of its name, as in
"train/loss", "val_loss" or "lr".
"""

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

from clipjax.quantities import NORM, PARAM_NORM
from clipjax.runs.run import Run
from clipjax.runs.schema import GRAD, LOSS, SKIP, UPDATES, key_of, names_with

Role: TypeAlias = Literal["loss", "validation", "rate", "scale", "norm", "update", "parameters"]

_LOSSES = {LOSS, "losses", "nll", "xent", "cost", "mse", "perplexity", "ppl"}
_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "dev", "test"}
# Words beside "loss" with which a column is still the loss that is trained.
_PLAIN = {"train", "training", "total", "mean", "avg", "average", "batch", "step", "full"}


def role_of(key: str) -> Role | None:
  """What a column is; None for what is not judged, as counters are."""
  if (name := _state(key, NORM)) is not None:
    return None if name == SKIP else "update" if _is_update(name) else "norm"
  if _state(key, PARAM_NORM) is not None:
    return "parameters"
  if key.startswith(f"{SKIP}/"):
    return None
  words = _words(key)
  if "loss" in words and ({"scale", "scaling"} & set(words)):
    return "scale"
  if "lr" in words or ("learning", "rate") in zip(words, words[1:], strict=False):
    return "rate"
  if not words or not (words[-1] in _LOSSES or words[-2:] == ("cross", "entropy")):
    return None
  return "validation" if _VALIDATION & set(words) else "loss"


def main_loss(keys: Iterable[str]) -> str | None:
  """The loss that is trained: "loss", else one such as "train/loss" or "total_loss", else the only one there is."""
  losses = keys_with(keys, "loss")
  plain = [key for key in losses if LOSS in (words := set(_words(key))) and words <= _PLAIN | {LOSS}]
  if LOSS in losses:
    return LOSS
  return plain[0] if plain else losses[0] if len(losses) == 1 else None


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


def update_states(run: Run) -> list[str]:
  """The names of the watches that are last in a chain: what they measure are the steps of the optimizer."""
  return [name for name in names_with(run.columns, NORM) if _is_update(name)]


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
