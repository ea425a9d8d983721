"""One training of `verdicts.py`: a compiled step that takes its condition as an argument, and a loop that records it.

A step is compiled once per `Setting`: a model, an optimizer and its wrappers. A condition acts only through a row of
numbers per step, `KNOBS`: the learning rate, the weight of the loss, changes to the gradient of some leaves. The loop
records as a user would: a watch first, a clip if there is one, the optimizer, a watch of the updates last, and
`Recorder.push` at each step.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import verdicts_pairs
from small_models import Array, Model
from verdicts_models import ALL

import clipjax

# The row of a step with its usual values. Leaves are counted in the order of `jax.tree.leaves`.
KNOBS = {
  "rate": 0.0,  # The learning rate.
  "max_norm": np.inf,  # The limit of the clip, or of `skip_steps`.
  "weight": 1.0,  # Multiplies the loss before the gradient is taken.
  "shown": 0.0,  # Added only to the recorded loss.
  "poison": 0.0,  # 1 for random targets.
  "first": 0.0,  # From this leaf
  "last": -1.0,  # to this one, the gradient is multiplied
  "factor": 1.0,  # by this.
  "noise": 0.0,  # Standard deviation of the noise added to every parameter after the step.
  "grow": 1.0,  # Multiplies the loss scale.
}
TRAINED = 0.85  # Share of the data for training; the rest is for validation.
MICRO = 4  # Batches per update under `optax.MultiSteps`.

OPTIMIZERS: dict[str, Callable[[jax.Array], optax.GradientTransformation]] = {
  "sgd": optax.sgd,
  "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
  "adam": optax.adam,
  "adamw": lambda rate: optax.adamw(rate, weight_decay=1e-2),
  "lion": optax.lion,
}


class Setting(NamedTuple):
  """The static choices for which a step is compiled.

  Attributes:
    model: its name in `verdicts_models` or in `verdicts_pairs`.
    optimizer: its name in `OPTIMIZERS`.
    clip: whether there is a clip between the first watch and the optimizer.
    effect: whether `clip_effect` wraps that clip and the optimizer.
    around: "skip" for `skip_steps` around everything, "multi" for `optax.MultiSteps`, "multi skip" for `skip_steps`
      inside `optax.MultiSteps`.
    on_nonfinite: the clip's policy for a nonfinite norm.
    numbers: "float32", "bfloat16" or "float16" for only the model, "bfloat16 parameters" for the parameters too.
    rows: number of examples used of a batch; 0 for all.
    data: number of examples in the data; 0 for all.
    is_shaken: whether the parameters may get noise; its random numbers take long to compile.
  """

  model: str
  optimizer: str
  clip: bool = False
  effect: bool = False
  around: str = ""
  on_nonfinite: str = "propagate"
  numbers: str = "float32"
  rows: int = 0
  data: int = 0
  is_shaken: bool = False


class Training(NamedTuple):
  """One run to be recorded.

  Attributes:
    setting: the setting of its step.
    seed: seed of parameters and batches.
    knobs: float32, shape (steps, knobs).
    loss: name of the recorded loss.
    pushes: what else is recorded, from "learning_rate", "batch", "params", "loss_scale".
    validate: steps between two validation losses; 0 for none.
    back: the step at which the process ends, and the step from which another resumes from a checkpoint.
    scale: the first loss scale under float16.
  """

  setting: Setting
  seed: int
  knobs: Array
  loss: str = "loss"
  pushes: frozenset[str] = frozenset({"learning_rate", "batch"})
  validate: int = 0
  back: tuple[int, int] | None = None
  scale: float = 1.0


class Carry(NamedTuple):
  """The state passed from step to step."""

  params: Any
  state: Any
  scale: jax.Array


def record(training: Training, path: pathlib.Path) -> None:
  """Trains and records; the file must not exist."""
  program = program_of(training.setting)
  steps = len(training.knobs)
  carry = program.start(training.seed, training.scale)
  if training.back is None:
    _loop(program, training, carry, range(steps), path)
    return
  stop, again = training.back
  carry = _loop(program, training, carry, range(again), path)
  _loop(program, training, carry, range(again, stop), path)
  _loop(program, training, carry, range(again, steps), path)  # Another process, from the checkpoint.


def name_of_batch(seed: int, step: int) -> str:
  """The name of the batch of a step."""
  return f"{seed}-{step:05d}"


def _loop(program: "Program", training: Training, carry: Carry, steps: range, path: pathlib.Path) -> Carry:
  key = jax.random.key(training.seed)
  with clipjax.runs.Recorder(path) as recorder:
    for i in steps:
      row = training.knobs[i]
      carry, losses = program.step(carry, program.data, key, np.int32(i), row)
      if training.validate and i % training.validate == 0 and program.validate is not None:
        losses["val_loss"] = program.validate(carry.params, program.validation)
      pushed: dict[str, Any] = {training.loss if name == "loss" else name: x for name, x in losses.items()}
      if "learning_rate" in training.pushes:
        pushed["learning_rate"] = float(row[0])
      if "loss_scale" in training.pushes:
        pushed["loss_scale"] = carry.scale
      recorder.push(
        i,
        carry.state,
        params=carry.params if "params" in training.pushes else None,
        batch=name_of_batch(training.seed, i) if "batch" in training.pushes else None,
        **pushed,
      )
  return carry


# Programs -----------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
  """The compiled `step(carry, data, key, number, knobs) -> (carry, losses)` of a setting, and what it needs."""

  start: Callable[[int, float], Carry]
  step: Callable[..., tuple[Carry, dict[str, jax.Array]]]
  validate: Callable[[Any, Any], jax.Array] | None
  data: Any
  validation: Any


@functools.cache
def program_of(setting: Setting) -> Program:
  """The program of a setting, compiled at its first step."""
  if setting.model in verdicts_pairs.PAIRS:
    return _program_of_pair(setting)
  model = ALL[setting.model]
  data, rest = _split(_data_of(model), setting.data)
  loss_of = _in_numbers(model.loss, setting.numbers)

  def start(seed: int, scale: float) -> Carry:
    params = model.init(jax.random.fold_in(jax.random.key(seed), 1))
    if setting.numbers == "bfloat16 parameters":
      params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return Carry(params, optimizer_of(setting, jnp.float32(0), jnp.float32(1)).init(params), jnp.float32(scale))

  def step(carry: Carry, data: Any, key: jax.Array, number: jax.Array, row: jax.Array) -> Any:
    knobs = dict(zip(KNOBS, row, strict=True))
    key = jax.random.fold_in(jax.random.fold_in(key, 2), number)
    batch = _batch(model, setting, data, key, knobs["poison"] > 0)

    def scaled(params: Any) -> tuple[jax.Array, jax.Array]:
      loss = loss_of(params, batch)
      return carry.scale * knobs["weight"] * loss, loss

    grads, loss = jax.grad(scaled, has_aux=True)(carry.params)
    grads = spoiled(jax.tree.map(lambda g: g / carry.scale.astype(g.dtype), grads), knobs)
    tx = optimizer_of(setting, knobs["rate"], knobs["max_norm"])
    updates, state = tx.update(grads, carry.state, carry.params, value=loss)
    params = optax.apply_updates(carry.params, updates)
    if setting.is_shaken:
      params = shaken(params, knobs["noise"], jax.random.fold_in(key, 3))
    scale = carry.scale * knobs["grow"]
    if setting.numbers == "float16":  # Halve the scale after an overflow, as the docs recommend.
      scale = jnp.where(clipjax.metrics(state)["skip/consecutive"] > 0, carry.scale / 2, scale)
    return Carry(params, state, scale), {"loss": loss + knobs["shown"]}

  validation = model.batch(rest, jax.random.key(0))
  return Program(start, jax.jit(step), jax.jit(model.loss), data, validation)


def optimizer_of(setting: Setting, rate: jax.Array, max_norm: jax.Array) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a setting; rate and limit are traced, so new values do not recompile it."""
  is_skip = setting.around.endswith("skip")
  clip = clipjax.clip_by_global_norm(max_norm, on_nonfinite=setting.on_nonfinite) if setting.clip else None
  optimizer = OPTIMIZERS[setting.optimizer](rate)
  stepped = [clipjax.clip_effect(clip, optimizer)] if setting.effect else [clip, optimizer]
  parts = [clipjax.watch(), *stepped, clipjax.watch(name="update")]
  tx = optax.chain(*[part for part in parts if part is not None])
  if is_skip:
    tx = clipjax.skip_steps(tx, norm_rule=None if setting.clip else max_norm)
  if setting.around.startswith("multi"):
    multi = optax.MultiSteps(tx, MICRO)
    tx = optax.GradientTransformationExtraArgs(multi.init, multi.update)
  return tx


def spoiled(grads: Any, knobs: dict[str, jax.Array]) -> Any:
  """The gradient with some leaves multiplied by a factor."""
  leaves, structure = jax.tree.flatten(grads)
  is_meant = [(knobs["first"] <= i) & (i <= knobs["last"]) for i in range(len(leaves))]
  factors = [jnp.where(meant, knobs["factor"], 1.0) for meant in is_meant]
  return structure.unflatten([g * factor.astype(g.dtype) for g, factor in zip(leaves, factors, strict=True)])


def shaken(params: Any, noise: jax.Array, key: jax.Array) -> Any:
  """The parameters plus normal noise."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  return structure.unflatten([x + noise * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def _batch(model: Model, setting: Setting, data: Any, key: jax.Array, is_bad: jax.Array) -> Any:
  batch = model.batch(data, key)
  bad = model.poison(batch, jax.random.fold_in(key, 1))
  batch = jax.tree.map(lambda good, bad: jnp.where(is_bad, bad, good), batch, bad)
  return jax.tree.map(lambda x: x[: setting.rows], batch) if setting.rows else batch


def _in_numbers(loss: Callable[[Any, Any], jax.Array], numbers: str) -> Callable[[Any, Any], jax.Array]:
  """The loss with parameters and images cast for the model."""
  if numbers == "float32":
    return loss
  dtype = jnp.dtype(numbers.split(maxsplit=1)[0])

  def cast(x: jax.Array) -> jax.Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  def in_numbers(params: Any, batch: Any) -> jax.Array:
    return loss(jax.tree.map(cast, params), jax.tree.map(cast, batch)).astype(jnp.float32)

  return in_numbers


_LOADED: dict[Callable[[], Any], Any] = {}


def _data_of(model: Model) -> Any:
  if model.data not in _LOADED:
    _LOADED[model.data] = model.data()
  return _LOADED[model.data]


def _split(data: Any, examples: int) -> tuple[Any, Any]:
  """The training data and the validation data."""
  cut = int(TRAINED * len(jax.tree.leaves(data)[0]))
  return jax.tree.map(lambda x: x[: examples or cut], data), jax.tree.map(lambda x: x[cut:], data)


def _program_of_pair(setting: Setting) -> Program:
  pair = verdicts_pairs.PAIRS[setting.model]
  data, rest = _split(_data_of(ALL["mlp"]), setting.data)

  def start(seed: int, scale: float) -> Carry:
    params = pair.init(jax.random.fold_in(jax.random.key(seed), 1))
    tx = optimizer_of(setting, jnp.float32(0), jnp.float32(1))
    return Carry(params, {name: tx.init(some) for name, some in params.items()}, jnp.float32(scale))

  def step(carry: Carry, data: Any, key: jax.Array, number: jax.Array, row: jax.Array) -> Any:
    knobs = dict(zip(KNOBS, row, strict=True))
    losses, grads = pair.gradients(carry.params, data, jax.random.fold_in(jax.random.fold_in(key, 2), number))
    grads["g"] = spoiled(grads["g"], knobs)
    tx = optimizer_of(setting, knobs["rate"], knobs["max_norm"])
    params, state = {}, {}
    for name, some in carry.params.items():
      updates, state[name] = tx.update(grads[name], carry.state[name], some)
      params[name] = optax.apply_updates(some, updates)
    return Carry(params, state, carry.scale), losses

  return Program(start, jax.jit(step), None, data, rest)
