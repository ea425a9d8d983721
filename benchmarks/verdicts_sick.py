"""The conditions of `verdicts.py` that a verdict must name: what is planted, where, and what it is called."""

from collections.abc import Callable
from typing import Any

import numpy as np
from verdicts_conditions import STEPS, Condition, Draw, Made, at, halves, leaves, of, since
from verdicts_training import MICRO
from verdicts_truth import GRADUAL, NATURAL, Expected

# What a run that is out of hand shows beside.
WILD = (
  "spikes", "update-spike", "rising-norm", "rising-loss", "update-ratio", "not-learning", "layer-spread", "zeros",
  "zero-gradient", "diverged", "nonfinite", "nonfinite-loss", "overfit",
)  # fmt: skip
AFTER = ("spikes", "update-spike")  # What one bad step shows beside.
STUCK = ("not-learning", "update-ratio", "layer-spread")


# Out of hand --------------------------------------------------------------------------------------------------------


def too_fast(*factors: float) -> Callable[[Draw], Made]:
  """A rate that is so many times too high from the start, one factor for each setting."""

  def make(draw: Draw) -> Made:
    rate = draw.rate * factors[draw.place % len(factors)]
    return Made(draw.train({"rate": rate}), also=WILD, course="leaves", near=NATURAL)

  return make


def ramp(draw: Draw) -> Made:
  """A rate that rises evenly from half the good one to 60 times that."""
  rate = draw.rate * np.geomspace(0.5, 60.0, STEPS)
  return Made(draw.train({"rate": rate}), also=WILD, course="leaves", near=GRADUAL)


def jump(draw: Draw) -> Made:
  """The rate is 100 times as high from a step on."""
  step = draw.step()
  training = draw.train({"rate": draw.rate * since(step, 100.0, 1.0)})
  return Made(training, _diverged(step), WILD, "leaves")


def jump_once(draw: Draw) -> Made:
  """The rate is 100 times as high at one step."""
  step = draw.step()
  training = draw.train({"rate": draw.rate * at(step, 100.0, 1.0)})
  return Made(training, (Expected("update-spike", (step,)),), AFTER)


def forgets(draw: Draw) -> Made:
  """Targets by chance from a step on; in the other half noise on the parameters."""
  step = draw.step()
  spoils = {"poison": since(step, 1.0, 0.0)} if draw.half == "tune" else {"noise": since(step, 0.05, 0.0)}
  expected = (Expected("diverged", (step,)), Expected("rising-loss", (step,)))
  return Made(draw.train(spoils), expected, WILD, "leaves")


def renamed(*factors: float) -> Callable[[Draw], Made]:
  """A rate that is too high, and a loss that is called "train/loss"."""

  def make(draw: Draw) -> Made:
    knobs = {"rate": draw.rate * factors[draw.place % len(factors)]}
    training = draw.train(knobs, loss="train/loss", pushes=frozenset())
    return Made(training, also=WILD, course="leaves", near=NATURAL)

  return make


# Spikes -------------------------------------------------------------------------------------------------------------


def bad_batch(max_norm: float = np.inf, weight: float = 100.0) -> Callable[[Draw], Made]:
  """A batch whose targets are drawn by chance and whose loss weighs more, under a limit in usual norms."""

  def make(draw: Draw) -> Made:
    step = draw.step()
    knobs = {"weight": at(step, weight, 1.0), "poison": at(step, 1.0, 0.0), "max_norm": max_norm * draw.norm}
    return Made(draw.train(knobs), _spikes(draw, step), AFTER)

  return make


def early(low: int, high: int) -> Callable[[Draw], Made]:
  """A bad batch near the start."""

  def make(draw: Draw) -> Made:
    step = int(draw.rng.integers(low, high + 1))
    knobs = {"weight": at(step, 100.0, 1.0), "poison": at(step, 1.0, 0.0)}
    return Made(draw.train(knobs), _spikes(draw, step), AFTER)

  return make


def bad_batches(draw: Draw) -> Made:
  """Three bad batches."""
  steps = [draw.step(low, low + 0.15) for low in (0.3, 0.5, 0.7)]
  knobs = {"weight": at(steps, 60.0, 1.0), "poison": at(steps, 1.0, 0.0)}
  return Made(draw.train(knobs), _spikes(draw, *steps), AFTER)


def loss_alone(draw: Draw) -> Made:
  """The loss is higher for four steps, while the gradient is as usual."""
  step = draw.step()
  knobs = {"shown": at(step, 8.0, 0.0, 4)}
  return Made(draw.train(knobs), (Expected("spikes", (step,)),), AFTER)


def one_leaf(draw: Draw) -> Made:
  """The gradient of one matrix is 100 times as large at one step."""
  step, leaf = draw.step(), draw.layer[-1]
  knobs = leaves(draw, at(step, 100.0, 1.0), (leaf,))
  return Made(draw.train(knobs), (Expected("spikes", (step,), leaves=(leaf,), batches=draw.batches(step)),), AFTER)


def _spikes(draw: Draw, *steps: int) -> tuple[Expected, ...]:
  return (Expected("spikes", steps, batches=draw.batches(*steps)),)


def _diverged(step: int) -> tuple[Expected, ...]:
  return (Expected("diverged", (step,)), Expected("nonfinite", (step,)), Expected("nonfinite-loss", (step,)))


# Not learning -------------------------------------------------------------------------------------------------------


def random_labels(draw: Draw) -> Made:
  """Targets by chance throughout."""
  return Made(draw.train({"poison": 1.0}), (Expected("not-learning"),), STUCK, "flat")


def stuck(*factors: float) -> Callable[[Draw], Made]:
  """A rate so high that the net is dead after a few steps."""

  def make(draw: Draw) -> Made:
    rate = draw.rate * factors[draw.place % len(factors)]
    return Made(draw.train({"rate": rate}), (Expected("not-learning"), Expected("zero-gradient")), WILD, "flat")

  return make


def too_slow(draw: Draw) -> Made:
  """A ten-thousandth of the good rate."""
  expected = Expected("not-learning"), Expected("update-ratio")
  return Made(draw.train({"rate": 1e-4 * draw.rate}), expected, STUCK, "flat")


def vanishing(draw: Draw) -> Made:
  """A deep net of sigmoids."""
  lowest = tuple(f"{i}/{name}" for i in range(3) for name in "bw")
  return Made(draw.train({}), (Expected("layer-spread", leaves=lowest),), STUCK, "")


def dead(draw: Draw) -> Made:
  """A layer has no gradient throughout."""
  return Made(draw.train(leaves(draw, 0.0)), (Expected("zero-gradient", leaves=draw.layer),), ("zeros",))


def dies(draw: Draw) -> Made:
  """A layer has no gradient from a step on."""
  step = draw.step()
  knobs = leaves(draw, since(step, 0.0, 1.0))
  return Made(draw.train(knobs), (Expected("zero-gradient", (step,), leaves=draw.layer),), ("zeros",))


def low_clip(draw: Draw) -> Made:
  """A clip at a hundredth of the usual norm, under an optimizer whose steps scale with it."""
  training = draw.train({"max_norm": 0.01 * draw.norm})
  return Made(training, (Expected("clipped-often"),), STUCK, "")


def overfits(draw: Draw) -> Made:
  """Sixty images and a large net."""
  return Made(draw.train({}, validate=10), (Expected("overfit"),))


def rising(draw: Draw) -> Made:
  """The loss weighs more and more, in the gradient alone: Adam does not see it, the norm does."""
  return Made(draw.train({"weight": np.geomspace(1.0, 20.0, STEPS)}), (Expected("rising-norm"),))


# Stopped and dropped ------------------------------------------------------------------------------------------------


def rate_zero(pushes: frozenset[str]) -> Callable[[Draw], Made]:
  """The rate is 0 from a step on."""

  def make(draw: Draw) -> Made:
    step = draw.step()
    training = draw.train({"rate": draw.rate * since(step, 0.0, 1.0)}, pushes=pushes)
    return Made(training, (Expected("stopped", (step,)),), ("update-ratio",))

  return make


def rejects_all(draw: Draw) -> Made:
  """`skip_steps` rejects every step from one on: gradients of NaN, or a limit below all norms."""
  step = draw.step()
  is_nan = draw.place % 2 == 0
  knobs = {"weight": since(step, np.nan, 1.0)} if is_nan else {"max_norm": since(step, 1e-6, np.inf)}
  return Made(draw.train(knobs), (Expected("stopped", (step,)),), ("skipped", "nonfinite-dropped"))


def drops_many(draw: Draw) -> Made:
  """40% of the steps are dropped by `skip_steps`: their norm is far above its limit."""
  is_bad = draw.rng.random(STEPS) < 0.4
  knobs = {"weight": np.where(is_bad, 1e5, 1.0), "max_norm": 20 * draw.norm}
  return Made(draw.train(knobs), (Expected("skipped"),))


def frozen(draw: Draw) -> Made:
  """One NaN, which `optax.MultiSteps` keeps in its accumulator: what is inside rejects every later update."""
  step = draw.step()
  landed = step // MICRO * MICRO + MICRO - 1
  training = draw.train({"weight": at(step, np.nan, 1.0)})
  return Made(training, (Expected("stopped", (landed,), near=MICRO),), ("skipped", "nonfinite-dropped"))


# Not finite ---------------------------------------------------------------------------------------------------------


def nan_gradient(draw: Draw) -> Made:
  """The gradient of one leaf is NaN at one step, and nothing stops it."""
  step, leaf = draw.step(), draw.layer[-1]
  training = draw.train(leaves(draw, at(step, np.nan, 1.0), (leaf,)))
  return Made(training, (Expected("nonfinite", (step,), leaves=(leaf,)),), WILD, "")


def nan_loss(draw: Draw) -> Made:
  """The loss that is recorded is NaN at three steps, the gradient is not."""
  step = draw.step()
  return Made(draw.train({"shown": at(step, np.nan, 0.0, 3)}), (Expected("nonfinite-loss", (step,)),))


def nan_dropped(draw: Draw) -> Made:
  """A NaN batch that `skip_steps` drops."""
  step = draw.step()
  training = draw.train({"weight": at(step, np.nan, 1.0)})
  return Made(training, (Expected("nonfinite-dropped", (step,), batches=draw.batches(step)),))


def inf_zeroed(draw: Draw) -> Made:
  """A gradient of inf, of which `on_nonfinite="zero"` makes a step of zeros."""
  step = draw.step()
  training = draw.train({**leaves(draw, at(step, np.inf, 1.0)), "max_norm": draw.norm})
  return Made(training, (Expected("nonfinite-dropped", (step,)),))


def nan_in_second(draw: Draw) -> Made:
  """Two optimizers, and one leaf of the second has a gradient of NaN at one step."""
  step, leaf = draw.step(), draw.layer[-1]
  training = draw.train(leaves(draw, at(step, np.nan, 1.0), (leaf,)), pushes=frozenset({"batch"}))
  return Made(training, (Expected("nonfinite", (step,), leaves=(leaf,)),), WILD, "")


def _sick(name: str, said: str, make: Callable[[Draw], Made], tune: Any, held_out: Any) -> Condition:
  return Condition(name, said, halves(tune, held_out), make)


FULL = frozenset({"learning_rate", "batch"})

SICK: tuple[Condition, ...] = (
  _sick(
    "too fast, SGD",
    "a rate that is far too high from the start: `diverged`",
    too_fast(64, 8, 16),
    of("rnn autoencoder rnn", "momentum sgd sgd"),
    of("gru residual gru", "momentum momentum sgd"),
  ),
  _sick(
    "too fast, Adam and Lion",
    "the same with steps of a given size: `diverged`",
    too_fast(256, 128, 256),
    of("rnn autoencoder rnn", "adam lion lion"),
    of("gru vit gru", "adam lion lion"),
  ),
  _sick(
    "ramp",
    "a rate that rises until it is far too high: `diverged`",
    ramp,
    of("rnn mlp", "momentum momentum"),
    of("gru residual", "momentum momentum"),
  ),
  _sick(
    "jump",
    "the rate is 100 times as high from a step on: `diverged`",
    jump,
    of("rnn mlp", "momentum adam"),
    of("gru cnn", "adam adam"),
  ),
  _sick(
    "jump once",
    "the rate is 100 times as high at one step: `update-spike`",
    jump_once,
    of("mlp transformer", "momentum adam"),
    of("cnn gru", "adam momentum"),
  ),
  _sick(
    "forgets",
    "targets by chance from a step on; in the reported half noise on all parameters: `diverged` or `rising-loss`",
    forgets,
    of("mlp transformer", "adam adam"),
    of("residual cnn", "adam adam", is_shaken=True),
  ),
  _sick(
    "train/loss",
    "too fast, and the loss is called that: `diverged`",
    renamed(64, 8),
    of("rnn autoencoder", "momentum sgd"),
    of("gru residual", "momentum momentum"),
  ),
  _sick(
    "bad batch",
    "one batch with targets by chance and 100 times the weight, no clip: `spikes`",
    bad_batch(),
    of("mlp transformer autoencoder", "adam"),
    of("residual gru cnn", "adam"),
  ),
  _sick(
    "bad batch, high clip",
    "the same under a clip at 50 times the usual norm: `spikes`",
    bad_batch(50.0),
    of("mlp transformer", "adam adamw", clip=True),
    of("residual gru", "momentum adamw", clip=True),
  ),
  _sick(
    "bad batches",
    "three bad batches: `spikes`",
    bad_batches,
    of("transformer autoencoder", "adam"),
    of("gru residual", "adam"),
  ),
  _sick(
    "spike at 17",
    "a bad batch at one of the steps 15 to 19: `spikes`",
    early(15, 19),
    of("mlp transformer", "adam"),
    of("residual gru", "adam"),
  ),
  _sick(
    "spike at 40",
    "a bad batch at one of the steps 35 to 45: `spikes`",
    early(35, 45),
    of("transformer mlp", "adam"),
    of("cnn residual", "adam"),
  ),
  _sick(
    "loss alone",
    "the loss is 8 higher for four steps, the gradient as usual: `spikes`",
    loss_alone,
    of("transformer mlp", "adam momentum"),
    of("gru residual", "adam momentum"),
  ),
  _sick(
    "one leaf",
    "the gradient of one matrix is 100 times as large at one step: `spikes`",
    one_leaf,
    of("mlp transformer autoencoder", "adam"),
    of("residual gru cnn", "adam"),
  ),
  _sick(
    "random labels",
    "targets by chance throughout: `not-learning`",
    random_labels,
    of("mlp mlp", "adam momentum"),
    of("cnn residual", "adam momentum"),
  ),
  _sick(
    "stuck",
    "a rate with which the net is dead after a few steps: `not-learning` or `zero-gradient`",
    stuck(32, 16, 32),
    of("mlp mlp", "momentum sgd"),
    of("cnn cnn cnn", "momentum sgd adam"),
  ),
  _sick(
    "too slow",
    "a ten-thousandth of the good rate: `not-learning` or `update-ratio`",
    too_slow,
    of("transformer mlp", "adam momentum"),
    of("gru residual", "adam momentum"),
  ),
  _sick(
    "vanishing",
    "a deep net of sigmoids: `layer-spread`, one of the three lowest layers",
    vanishing,
    of("sigmoid sigmoid", "sgd momentum"),
    of("sigmoid12 sigmoid12", "sgd momentum"),
  ),
  _sick(
    "dead layer",
    "a layer whose gradient is 0 throughout: `zero-gradient`",
    dead,
    of("mlp transformer", "adam adam"),
    of("residual vit", "adam adam"),
  ),
  _sick(
    "layer dies",
    "a layer whose gradient is 0 from a step on: `zero-gradient`",
    dies,
    of("mlp transformer autoencoder", "momentum adam adam"),
    of("residual vit cnn", "momentum adam adam"),
  ),
  _sick(
    "clip too low",
    "SGD under a clip at a hundredth of the usual norm: `clipped-often`",
    low_clip,
    of("mlp rnn", "momentum", clip=True),
    of("gru residual", "momentum", clip=True),
  ),
  _sick(
    "overfits",
    "60 images, a large net, a validation loss: `overfit`",
    overfits,
    of("large mlp", "adam adam", data=60),
    of("wide cnn", "adam adam", data=60),
  ),
  _sick(
    "rising",
    "the gradient of Adam is multiplied with more and more: `rising-norm`",
    rising,
    of("transformer biased", "adam"),
    of("gru gru", "adam"),
  ),
  _sick(
    "rate 0",
    "the rate is 0 from a step on, and recorded: `stopped`",
    rate_zero(FULL),
    of("transformer mlp", "adam momentum"),
    of("gru residual", "adam momentum"),
  ),
  _sick(
    "update 0",
    "the same, and the rate is not recorded: `stopped`",
    rate_zero(frozenset()),
    of("mlp rnn", "adam momentum"),
    of("cnn gru", "adam momentum"),
  ),
  _sick(
    "rejects all",
    "`skip_steps` drops every step from one on: `stopped`",
    rejects_all,
    of("mlp transformer", "adam momentum", around="skip"),
    of("residual gru", "adam momentum", around="skip"),
  ),
  _sick(
    "drops many",
    "`skip_steps` drops 40% of the steps: `skipped`",
    drops_many,
    of("mlp transformer", "adam momentum", around="skip"),
    of("residual gru", "adam momentum", around="skip"),
  ),
  _sick(
    "frozen",
    "one NaN inside `optax.MultiSteps`, for which every later update is dropped: `stopped`",
    frozen,
    of("mlp transformer", "adam momentum", around="multi skip"),
    of("residual gru", "adam momentum", around="multi skip"),
  ),
  _sick(
    "NaN gradient",
    "the gradient of one leaf is NaN at one step: `nonfinite`",
    nan_gradient,
    of("mlp transformer autoencoder", "adam"),
    of("residual gru cnn", "adam"),
  ),
  _sick(
    "NaN loss",
    "the recorded loss is NaN for three steps, the gradient is not: `nonfinite-loss`",
    nan_loss,
    of("mlp transformer", "adam"),
    of("gru residual", "adam"),
  ),
  _sick(
    "NaN dropped",
    "a NaN batch that `skip_steps` drops: `nonfinite-dropped` and nothing else",
    nan_dropped,
    of("mlp transformer", "adam momentum", around="skip"),
    of("residual gru", "adam momentum", around="skip"),
  ),
  _sick(
    "inf zeroed",
    'a gradient of inf under `on_nonfinite="zero"`: `nonfinite-dropped`',
    inf_zeroed,
    of("autoencoder mlp", "momentum adam", clip=True, on_nonfinite="zero"),
    of("cnn residual", "momentum adam", clip=True, on_nonfinite="zero"),
  ),
  _sick(
    "NaN in the second",
    "two optimizers, and one leaf of the second has a gradient of NaN at one step: `nonfinite`",
    nan_in_second,
    of("gan coder", "adam"),
    of("gan64 coder32", "adam"),
  ),
)
