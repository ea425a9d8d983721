"""The parts of the conditions of `verdicts.py`: what is done to a run, and what a verdict should therefore say.

`verdicts_healthy.py` and `verdicts_sick.py` have the tables of conditions. This file defines a condition, the rates and
limits at which the models train well, and rows of knobs.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import verdicts_pairs
from small_models import Array
from verdicts_models import ALL
from verdicts_training import KNOBS, Setting, Training, name_of_batch
from verdicts_truth import Expected

STEPS = 400
HALVES = {"tune": (0, 1, 2), "held-out": (100, 101, 102)}  # Seeds of each half.

# Learning rates near the best of a sweep, and the 90th percentile of the norm at these rates.
RATES = {
  "rnn": {"sgd": 0.3, "momentum": 0.05, "adam": 0.005, "adamw": 0.005, "lion": 0.001},
  "transformer": {"sgd": 0.5, "momentum": 0.1, "adam": 0.005, "adamw": 0.005, "lion": 0.003},
  "biased": {"sgd": 0.5, "momentum": 0.1, "adam": 0.005, "adamw": 0.005, "lion": 0.003},
  "mlp": {"sgd": 0.125, "momentum": 0.03, "adam": 0.003, "adamw": 0.003, "lion": 0.0003},
  "autoencoder": {"sgd": 0.012, "momentum": 0.004, "adam": 0.005, "adamw": 0.005, "lion": 0.0005},
  "sigmoid": {"sgd": 0.1, "momentum": 0.02, "adam": 0.001},
  "large": {"momentum": 0.03, "adam": 0.001},
  "zero": {"sgd": 0.125, "momentum": 0.03, "adam": 0.003},
  "gan": {"adam": 0.002},
  "coder": {"adam": 0.005},
  "gru": {"sgd": 1.0, "momentum": 0.2, "adam": 0.01, "adamw": 0.01, "lion": 0.002},
  "vit": {"sgd": 0.125, "momentum": 0.02, "adam": 0.002, "adamw": 0.002, "lion": 0.0005},
  "cnn": {"sgd": 0.125, "momentum": 0.02, "adam": 0.005, "adamw": 0.005, "lion": 0.0005},
  "residual": {"sgd": 0.04, "momentum": 0.006, "adam": 0.001, "adamw": 0.001, "lion": 0.0002},
  "sigmoid12": {"sgd": 0.1, "momentum": 0.02, "adam": 0.001},
  "wide": {"momentum": 0.006, "adam": 0.001},
  "linear": {"sgd": 0.5, "momentum": 0.1, "adam": 0.01},
  "gan64": {"adam": 0.001},
  "coder32": {"adam": 0.003},
}
# The factor on the rate at which a run diverges; mlp and cnn are dead then.
TOO_FAST = {
  "rnn": {"sgd": 16, "momentum": 64, "adam": 256, "lion": 256},
  "autoencoder": {"sgd": 8, "lion": 128},
  "mlp": {"sgd": 16, "momentum": 32},
  "gru": {"sgd": 16, "momentum": 64, "adam": 256, "lion": 256},
  "residual": {"momentum": 32, "lion": 500},
  "cnn": {"sgd": 16, "momentum": 64, "adam": 32},
}
NORMS = {
  "rnn": 0.8, "transformer": 0.7, "biased": 0.7, "mlp": 1.3, "autoencoder": 6.0, "zero": 1.3,
  "gru": 0.5, "vit": 2.5, "cnn": 1.6, "residual": 3.3, "linear": 0.3,
}  # fmt: skip
# A middle layer of each model: its leaves in order, the last a large matrix.
LAYERS = {
  "rnn": ("recurrent",),
  "transformer": ("blocks/0/qkv",),
  "biased": ("blocks/0/value",),
  "mlp": ("1/b", "1/w"),
  "autoencoder": ("1/b", "1/w"),
  "gru": ("gates",),
  "vit": ("blocks/0/value",),
  "cnn": ("2/b", "2/w"),
  "residual": ("blocks/1/down", "blocks/1/gain", "blocks/1/shift", "blocks/1/up"),
  **dict.fromkeys(("gan", "coder", "gan64", "coder32"), ("latent/b", "latent/w")),
}


Settings = tuple[Setting, ...]


class Draw(NamedTuple):
  """What a condition may depend on.

  Attributes:
    half: "tune" or "held-out".
    setting: the setting to train.
    seed: seed of the training.
    place: index of the seed in its half: 0, 1 or 2.
    rng: random numbers to choose steps.
  """

  half: str
  setting: Setting
  seed: int
  place: int
  rng: np.random.Generator

  @property
  def rate(self) -> float:
    """A rate at which the model trains well."""
    return RATES[self.setting.model][self.setting.optimizer]

  @property
  def too_fast(self) -> float:
    """A rate at which the model diverges."""
    return self.rate * TOO_FAST[self.setting.model][self.setting.optimizer]

  @property
  def norm(self) -> float:
    """The 90th percentile of the gradient norm."""
    return NORMS[self.setting.model]

  @property
  def layer(self) -> tuple[str, ...]:
    """The leaves of the middle layer."""
    return LAYERS[self.setting.model]

  def step(self, low: float = 0.4, high: float = 0.7) -> int:
    """A random step in this part of the run."""
    return int(self.rng.integers(int(low * STEPS), int(high * STEPS)))

  def train(self, knobs: dict[str, Any], **options: Any) -> Training:
    """A training; knobs are numbers, or arrays with one number per step; the rate defaults to the usual one."""
    columns = {**KNOBS, "rate": self.rate, **knobs}
    return Training(self.setting, self.seed, _rows(columns), **options)

  def batches(self, *steps: int) -> tuple[str, ...]:
    """The names of the batches of these steps."""
    return tuple(name_of_batch(self.seed, step) for step in steps)


class Made(NamedTuple):
  """A training, and the truth about it.

  Attributes:
    training: the training.
    expected: the right answers.
    also: names of findings that are also true.
    course: what its loss must do, as in `Truth`.
    near: how many steps off the verdict may be if the run diverges by itself, at the step of `departure`.
  """

  training: Training
  expected: tuple[Expected, ...] = ()
  also: tuple[str, ...] = ()
  course: str = "learns"
  near: int = 0


class Condition(NamedTuple):
  """A condition.

  Attributes:
    name: a short name.
    said: what was done and what the verdict must say, for the page.
    settings: the settings of each half, which its seeds take in turn.
    make: makes a training from a draw.
    is_healthy: whether a user needs no warning.
  """

  name: str
  said: str
  settings: dict[str, Settings]
  make: Callable[[Draw], Made]
  is_healthy: bool = False

  def draws(self, half: str) -> list[Draw]:
    """The runs of the condition in a half."""
    settings = self.settings[half]
    out = []
    for place, seed in enumerate(HALVES[half]):
      rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
      out.append(Draw(half, settings[place % len(settings)], seed, place, rng))
    return out


def of(models: str, optimizers: str, **options: Any) -> Settings:
  """Settings from models and optimizers in pairs: `of("mlp rnn", "sgd adam")`."""
  names, kinds = models.split(), optimizers.split()
  kinds = kinds * len(names) if len(kinds) == 1 else kinds
  return tuple(Setting(model, kind, **options) for model, kind in zip(names, kinds, strict=True))


def halves(tune: Settings, held_out: Settings) -> dict[str, Settings]:
  """The settings of both halves."""
  return {"tune": tune, "held-out": held_out}


# Rows of knobs ------------------------------------------------------------------------------------------------------


def at(steps: int | list[int], value: float, usual: float, length: int = 1) -> Array:
  """One number per step: `value` at the given steps and `length - 1` steps after each, else `usual`."""
  out = np.full(STEPS, float(usual))
  for step in [steps] if isinstance(steps, int) else steps:
    out[step : step + length] = value
  return out


def since(step: int, value: float, usual: float) -> Array:
  """One number per step: `usual` before a step, `value` from it on."""
  return at(step, value, usual, STEPS)


def leaves(draw: Draw, factor: float | Array, names: tuple[str, ...] | None = None) -> dict[str, Any]:
  """Knobs that multiply the gradient of consecutive leaves, by default of the middle layer."""
  known = leaf_names(draw.setting.model)
  places = [known.index(name) for name in names or draw.layer]
  return {"first": places[0], "last": places[-1], "factor": factor}


def leaf_names(model: str) -> list[str]:
  """The leaves of a model (of "g" for a pair), in the order of the knobs."""
  is_pair = model in verdicts_pairs.PAIRS
  init = verdicts_pairs.PAIRS[model].init if is_pair else ALL[model].init
  params = jax.eval_shape(init, jax.random.key(0))
  params = params["g"] if is_pair else params
  paths = jax.tree_util.tree_flatten_with_path(params)[0]
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _rows(columns: dict[str, Any]) -> Array:
  rows = [np.broadcast_to(np.asarray(columns[name], np.float32), STEPS) for name in KNOBS]
  return np.stack(rows, axis=1)
