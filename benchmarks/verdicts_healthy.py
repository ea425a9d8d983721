"""The healthy conditions of `verdicts.py`: a verdict that warns about one of these is wrong."""

from typing import Any

import numpy as np
from small_models import Array
from verdicts_conditions import STEPS, Condition, Draw, Made, at, halves, of
from verdicts_truth import Expected

WARM_UP = 40  # Steps of a rising rate.
FULL = frozenset({"learning_rate", "batch", "params"})
SCALE_STEPS = 60  # Steps between two rises of the loss scale.


def plain(draw: Draw) -> Made:
  """A good rate and nothing else."""
  return Made(draw.train({}, pushes=FULL))


def bare(draw: Draw) -> Made:
  """Only the loss and the state are recorded."""
  return Made(draw.train({}, pushes=frozenset()))


def cosine(draw: Draw) -> Made:
  """The rate rises, then falls to nearly 0; a clip at the usual norm."""
  return Made(draw.train({"rate": draw.rate * schedule(), "max_norm": draw.norm}, pushes=FULL))


def schedule() -> Array:
  """One factor per step: it rises from 0 to 1, and falls along a cosine."""
  steps = np.arange(STEPS)
  falling = 0.5 * (1 + np.cos(np.pi * (steps - WARM_UP) / (STEPS - WARM_UP)))
  return np.where(steps < WARM_UP, steps / WARM_UP, falling)


def scaled(draw: Draw) -> Made:
  """A loss scale that is too high at first; in the other half, one that rises repeatedly."""
  grow = 1.0 if draw.half == "tune" else at(list(range(SCALE_STEPS, STEPS, SCALE_STEPS)), 2.0, 1.0)
  knobs = {"max_norm": draw.norm, "grow": grow}
  return Made(draw.train(knobs, scale=2.0**26, pushes=frozenset({"learning_rate", "batch", "loss_scale"})))


def resumed(draw: Draw) -> Made:
  """The process ends; another resumes from an earlier checkpoint, into the same file."""
  again = draw.step(0.4, 0.6)
  return Made(draw.train({}, back=(again + draw.step(0.05, 0.15), again)))


def clipped(share: float) -> Any:
  """A clip at a fraction of the usual norm."""

  def make(draw: Draw) -> Made:
    return Made(draw.train({"max_norm": share * draw.norm}))

  return make


def no_effect(draw: Draw) -> Made:
  """A clip at twice the usual norm, as advised."""
  return Made(draw.train({"max_norm": 2 * draw.norm}), (Expected("clip-no-effect"),))


def caught(draw: Draw) -> Made:
  """A batch with random targets and a weight of 30, with a clip at the usual norm."""
  step = draw.step()
  knobs = {"max_norm": draw.norm, "weight": at(step, 30.0, 1.0), "poison": at(step, 1.0, 0.0)}
  return Made(draw.train(knobs), (Expected("spikes-caught", (step,), batches=draw.batches(step)),))


def validated(draw: Draw) -> Made:
  """A validation loss at every 20th step."""
  return Made(draw.train({}, validate=20))


def two(draw: Draw) -> Made:
  """Two optimizers, pushed as a dict."""
  return Made(draw.train({}, pushes=frozenset({"batch"})), course="")


HEALTHY: tuple[Condition, ...] = tuple(
  Condition(name, said, halves(tune, held_out), make, is_healthy=True)
  for name, said, make, tune, held_out in (
    ("sgd", "plain SGD", plain, of("mlp transformer autoencoder", "sgd"), of("cnn residual gru", "sgd")),
    (
      "momentum",
      "SGD with momentum",
      plain,
      of("autoencoder mlp transformer", "momentum"),
      of("residual vit cnn", "momentum"),
    ),
    ("adam", "Adam", bare, of("transformer mlp autoencoder", "adam"), of("vit gru cnn", "adam")),
    (
      "cosine",
      "AdamW with warm-up, cosine and a clip",
      cosine,
      of("mlp transformer biased", "adamw", clip=True),
      of("vit residual gru", "adamw", clip=True),
    ),
    ("lion", "Lion", plain, of("mlp transformer autoencoder", "lion"), of("cnn vit residual", "lion")),
    (
      "bfloat16",
      "the model in bfloat16; in the reported half, the parameters too",
      plain,
      of("mlp transformer", "adam momentum", numbers="bfloat16"),
      of("residual gru cnn", "momentum adam sgd", numbers="bfloat16 parameters"),
    ),
    (
      "float16",
      "the model in float16 with a loss scale; steps overflow at first, in the reported half repeatedly",
      scaled,
      of("mlp autoencoder", "sgd adam", numbers="float16", around="skip", clip=True),
      of("residual cnn", "adam momentum", numbers="float16", around="skip", clip=True),
    ),
    (
      "resumed",
      "the process ends, and another resumes from an earlier checkpoint",
      resumed,
      of("transformer mlp", "adam momentum"),
      of("cnn gru", "adam momentum"),
    ),
    (
      "multisteps",
      "four batches per update",
      plain,
      of("mlp transformer", "adam momentum", around="multi"),
      of("vit residual", "adam momentum", around="multi"),
    ),
    (
      "zero start",
      "the output layer, or the whole model, starts at 0",
      plain,
      of("zero zero", "sgd adam"),
      of("linear", "sgd"),
    ),
    (
      "key bias",
      "attention with a key bias, whose gradient is rounding noise",
      plain,
      of("biased biased", "adam momentum"),
      of("vit vit", "adam momentum"),
    ),
    (
      "often clipped",
      "AdamW with a clip that acts in most steps",
      clipped(0.5),
      of("biased transformer", "adamw", clip=True),
      of("vit gru", "adamw", clip=True),
    ),
    (
      "recurrent",
      "a recurrent net, SGD with momentum, a good clip",
      clipped(0.6),
      of("rnn rnn", "momentum sgd", clip=True),
      of("gru gru", "momentum sgd", clip=True),
    ),
    (
      "caught",
      "one bad batch, clipped to the usual norm: `spikes-caught` and no warning",
      caught,
      of("transformer biased", "momentum adam", clip=True),
      of("gru gru", "momentum adam", clip=True),
    ),
    (
      "no effect",
      "Adam with a clip at twice the usual norm and its effect measured: `clip-no-effect` and no warning",
      no_effect,
      of("mlp transformer biased", "adam", clip=True, effect=True),
      of("cnn gru vit", "adam", clip=True, effect=True),
    ),
    (
      "effect",
      "SGD with and without momentum, with a clip at the usual norm and its effect measured",
      clipped(1.0),
      of("mlp transformer autoencoder", "sgd momentum momentum", clip=True, effect=True),
      of("cnn residual gru", "sgd momentum momentum", clip=True, effect=True),
    ),
    (
      "two",
      "two optimizers: a GAN, or an autoencoder and a classifier of its codes",
      two,
      of("gan coder", "adam"),
      of("gan64 coder32", "adam"),
    ),
    (
      "small batches",
      "eight examples per batch: norms vary strongly",
      plain,
      of("mlp autoencoder", "sgd adam", rows=8),
      of("cnn residual", "momentum sgd", rows=8),
    ),
    (
      "converged",
      "128 images, trained until the loss is nearly 0",
      plain,
      of("mlp large", "adam momentum", data=128),
      of("residual cnn", "momentum adam", data=128),
    ),
    (
      "validated",
      "a validation loss that falls too",
      validated,
      of("transformer autoencoder", "adam momentum"),
      of("gru linear", "adam sgd"),
    ),
  )
)
