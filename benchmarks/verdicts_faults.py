"""The faults of `verdicts.py`: what is done to a training and where, and what a verdict must say."""

from collections.abc import Callable
from typing import Any

import numpy as np
from verdicts_conditions import STEPS, Draw, Made, at, leaves, since
from verdicts_training import MICRO
from verdicts_truth import GRADUAL, NATURAL, Expected

# Findings that also hold for a diverged run.
WILD = (
  "spikes", "update-spike", "rising-norm", "rising-loss", "update-ratio", "not-learning", "layer-spread", "zeros",
  "zero-gradient", "diverged", "nonfinite", "nonfinite-loss", "overfit",
)  # fmt: skip
RAMP = 40  # Steps over which a rate rises.
WEIGHTS = (100.0, 30.0, 10.0)  # Weight of a bad batch, for each seed.
AFTER = ("spikes", "update-spike")  # Findings that also hold after one bad step.
STUCK = ("not-learning", "update-ratio", "layer-spread")
TAIL = 2.5  # How heavy the tail of a leaf is: its factor is proportional to exp(TAIL |normal|).
SET_IN = 60  # The step at which the tail begins under Adam.
SPREAD = 2.0  # Standard deviation of the logarithm of a varying loss weight.


# Out of hand --------------------------------------------------------------------------------------------------------


def too_fast(draw: Draw) -> Made:
  """A rate that is too high from the start."""
  return Made(draw.train({"rate": draw.too_fast}), also=WILD, course="leaves", near=NATURAL)


def renamed(draw: Draw) -> Made:
  """A rate that is too high, and a loss named "train/loss"."""
  training = draw.train({"rate": draw.too_fast}, loss="train/loss", pushes=frozenset())
  return Made(training, also=WILD, course="leaves", near=NATURAL)


def ramp(draw: Draw) -> Made:
  """A rate that rises to 100 times the good one over `RAMP` steps, and stays there."""
  start = draw.step()
  factor = 100.0 ** np.clip((np.arange(STEPS) - start) / RAMP, 0.0, 1.0)
  return Made(draw.train({"rate": draw.rate * factor}), also=WILD, course="leaves", near=GRADUAL)


def jump(draw: Draw) -> Made:
  """The rate is 100 times as high from one step on."""
  step = draw.step()
  training = draw.train({"rate": draw.rate * since(step, 100.0, 1.0)})
  return Made(training, _diverged(step), WILD, "leaves")


def jump_once(draw: Draw) -> Made:
  """The rate is 100 times as high at one step."""
  step = draw.step()
  training = draw.train({"rate": draw.rate * at(step, 100.0, 1.0)})
  return Made(training, (Expected("update-spike", (step,)),), AFTER)


def forgets(draw: Draw) -> Made:
  """Random targets from one step on; in the other half, noise on the parameters."""
  step = draw.step()
  spoils = {"poison": since(step, 1.0, 0.0)} if draw.half == "tune" else {"noise": since(step, 0.05, 0.0)}
  expected = (Expected("diverged", (step,)), Expected("rising-loss", (step,)))
  return Made(draw.train(spoils), expected, WILD, "leaves")


# Spikes -------------------------------------------------------------------------------------------------------------


def bad_batch(draw: Draw) -> Made:
  """A batch with random targets and a larger loss weight."""
  step = draw.step()
  return Made(draw.train(_bad(step, WEIGHTS[draw.place])), _spikes(draw, step), AFTER)


def high_clip(draw: Draw) -> Made:
  """The same with a clip at 50 times the usual norm."""
  step = draw.step()
  return Made(draw.train({**_bad(step, 100.0), "max_norm": 50 * draw.norm}), _spikes(draw, step), AFTER)


def early(low: int, high: int) -> Callable[[Draw], Made]:
  """A bad batch near the start."""

  def make(draw: Draw) -> Made:
    step = int(draw.rng.integers(low, high + 1))
    return Made(draw.train(_bad(step, WEIGHTS[draw.place])), _spikes(draw, step), AFTER)

  return make


def bad_batches(draw: Draw) -> Made:
  """Three bad batches."""
  steps = [draw.step(low, low + 0.15) for low in (0.3, 0.5, 0.7)]
  return Made(draw.train(_bad(steps, 30.0)), _spikes(draw, *steps), AFTER)


def loss_alone(draw: Draw) -> Made:
  """The loss is higher for four steps; the gradient is as usual."""
  step = draw.step()
  knobs = {"shown": at(step, 8.0, 0.0, 4)}
  return Made(draw.train(knobs), (Expected("spikes", (step,)),), AFTER)


def one_leaf(draw: Draw) -> Made:
  """The gradient of one matrix is 100 times as large at one step."""
  step, leaf = draw.step(), draw.layer[-1]
  knobs = leaves(draw, at(step, 100.0, 1.0), (leaf,))
  return Made(draw.train(knobs), (Expected("spikes", (step,), leaves=(leaf,), batches=draw.batches(step)),), AFTER)


def _bad(steps: int | list[int], weight: float) -> dict[str, Any]:
  return {"weight": at(steps, weight, 1.0), "poison": at(steps, 1.0, 0.0)}


def _spikes(draw: Draw, *steps: int) -> tuple[Expected, ...]:
  return (Expected("spikes", steps, batches=draw.batches(*steps)),)


def _diverged(step: int) -> tuple[Expected, ...]:
  return (Expected("diverged", (step,)), Expected("nonfinite", (step,)), Expected("nonfinite-loss", (step,)))


# Not learning -------------------------------------------------------------------------------------------------------


def random_labels(draw: Draw) -> Made:
  """Random targets throughout."""
  return Made(draw.train({"poison": 1.0}), (Expected("not-learning"),), STUCK, "flat")


def stuck(draw: Draw) -> Made:
  """A rate that kills the net within a few steps."""
  expected = Expected("not-learning"), Expected("zero-gradient")
  return Made(draw.train({"rate": draw.too_fast}), expected, WILD, "flat")


def too_slow(draw: Draw) -> Made:
  """A ten-thousandth of the good rate."""
  expected = Expected("not-learning"), Expected("update-ratio")
  return Made(draw.train({"rate": 1e-4 * draw.rate}), expected, STUCK, "flat")


def vanishing(draw: Draw) -> Made:
  """A deep net of sigmoids."""
  lowest = tuple(f"{i}/{name}" for i in range(3) for name in "bw")
  return Made(draw.train({}), (Expected("layer-spread", leaves=lowest),), STUCK, "")


def dead(draw: Draw) -> Made:
  """A layer has a gradient of 0 throughout."""
  return Made(draw.train(leaves(draw, 0.0)), (Expected("zero-gradient", leaves=draw.layer),), ("zeros",))


def dies(draw: Draw) -> Made:
  """A layer has a gradient of 0 from one step on."""
  step = draw.step()
  knobs = leaves(draw, since(step, 0.0, 1.0))
  return Made(draw.train(knobs), (Expected("zero-gradient", (step,), leaves=draw.layer),), ("zeros",))


def low_clip(draw: Draw) -> Made:
  """A clip at a hundredth of the usual norm, with an optimizer whose steps scale with the gradient."""
  training = draw.train({"max_norm": 0.01 * draw.norm})
  return Made(training, (Expected("clipped-often"),), STUCK, "")


def overfits(draw: Draw) -> Made:
  """Sixty images and a large net."""
  return Made(draw.train({}, validate=10), (Expected("overfit"),))


def rising(draw: Draw) -> Made:
  """The loss weight grows, only in the gradient: the norm shows it, Adam's steps do not."""
  return Made(draw.train({"weight": np.geomspace(1.0, 20.0, STEPS)}), (Expected("rising-norm"),))


# What a clip does to the step ---------------------------------------------------------------------------------------


def starved(draw: Draw) -> Made:
  """One leaf has large gradients with a heavy tail, and one clip covers all leaves.

  Adam divides out gradients that are always small. The other leaves starve once its second moment has seen them large.
  """
  leaf = draw.layer[-1]
  tail = np.exp(TAIL * np.abs(draw.rng.standard_normal(STEPS)))
  is_adam = draw.setting.optimizer == "adam"
  factor = np.where(np.arange(STEPS) < SET_IN, 1.0, 100 * tail) if is_adam else 10 * tail
  training = draw.train({**leaves(draw, factor, (leaf,)), "max_norm": draw.norm})
  also = ("rising-norm", "clip-lengthens") if is_adam else ("clipped-often",)
  return Made(training, (Expected("clip-starves", leaves=(leaf,), is_last=True),), ("spikes", *STUCK, *also), "")


def lengthened(draw: Draw) -> Made:
  """Norms vary strongly, with a clip at half the usual norm: Adam's second moment never sees the large ones."""
  weight = np.exp(SPREAD * draw.rng.standard_normal(STEPS))
  training = draw.train({"weight": weight, "max_norm": 0.5 * draw.norm})
  return Made(training, (Expected("clip-lengthens"),), ("spikes",))


# Stopped and dropped ------------------------------------------------------------------------------------------------


def rate_zero(pushes: frozenset[str]) -> Callable[[Draw], Made]:
  """The rate is 0 from one step on."""

  def make(draw: Draw) -> Made:
    step = draw.step()
    training = draw.train({"rate": draw.rate * since(step, 0.0, 1.0)}, pushes=pushes)
    return Made(training, (Expected("stopped", (step,)),), ("update-ratio",))

  return make


def rejects_all(draw: Draw) -> Made:
  """`skip_steps` rejects every step from one step on: NaN gradients, or a limit below all norms."""
  step = draw.step()
  is_nan = draw.place % 2 == 0
  knobs = {"weight": since(step, np.nan, 1.0)} if is_nan else {"max_norm": since(step, 1e-6, np.inf)}
  return Made(draw.train(knobs), (Expected("stopped", (step,)),), ("skipped", "nonfinite-dropped"))


def drops_many(draw: Draw) -> Made:
  """`skip_steps` drops 40% of the steps: their norms are far above its limit."""
  is_bad = draw.rng.random(STEPS) < 0.4
  knobs = {"weight": np.where(is_bad, 1e5, 1.0), "max_norm": 20 * draw.norm}
  return Made(draw.train(knobs), (Expected("skipped"),))


def frozen(draw: Draw) -> Made:
  """One NaN stays in the accumulator of `optax.MultiSteps`: every later update is rejected inside."""
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
  """The recorded loss is NaN at three steps, but not the gradient."""
  step = draw.step()
  return Made(draw.train({"shown": at(step, np.nan, 0.0, 3)}), (Expected("nonfinite-loss", (step,)),))


def nan_dropped(draw: Draw) -> Made:
  """A NaN batch that `skip_steps` drops."""
  step = draw.step()
  training = draw.train({"weight": at(step, np.nan, 1.0)})
  return Made(training, (Expected("nonfinite-dropped", (step,), batches=draw.batches(step)),))


def inf_zeroed(draw: Draw) -> Made:
  """A gradient of inf, which `on_nonfinite="zero"` turns into a step of zeros."""
  step = draw.step()
  training = draw.train({**leaves(draw, at(step, np.inf, 1.0)), "max_norm": draw.norm})
  return Made(training, (Expected("nonfinite-dropped", (step,)),))


def nan_in_second(draw: Draw) -> Made:
  """Two optimizers; one leaf of the second has a gradient of NaN at one step."""
  step, leaf = draw.step(), draw.layer[-1]
  training = draw.train(leaves(draw, at(step, np.nan, 1.0), (leaf,)), pushes=frozenset({"batch"}))
  return Made(training, (Expected("nonfinite", (step,), leaves=(leaf,)),), WILD, "")
