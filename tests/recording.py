"""What the tests of a recording share: a small optimizer, its states step by step, and how they are recorded."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest

import clipjax

PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}


# How a training logs to wandb itself: at each step, before or after the push.
LOGGING = {
  "alone": lambda run, i: None,
  "log(step=i)": lambda run, i: run.log({"loss": i}, step=i),
  "log(step=i) after the push": lambda run, i: run.log({"loss": i}, step=i),
  "log() without a step": lambda run, i: run.log({"loss": i}),
  "three log() a step": lambda run, i: [run.log({f"loss{k}": i}) for k in range(3)],
  "log(step=i) every tenth": lambda run, i: i % 10 or run.log({"loss": i}, step=i),
  "log() every tenth": lambda run, i: i % 10 or run.log({"loss": i}),
  "log(step=i) every hundredth": lambda run, i: i % 100 or run.log({"loss": i}, step=i),
  "log(step=examples)": lambda run, i: run.log({"loss": i}, step=64 * i),
  "log(step=10000 + i)": lambda run, i: run.log({"loss": i}, step=10000 + i),
  "log(step=epoch), from the start": lambda run, i: i % 20 == 1 and run.log({"loss": i}, step=i // 20),
  "log(step=update), of 4 pushes": lambda run, i: i % 4 or run.log({"loss": i}, step=i // 4),
}


def watched(history=0):
  return optax.chain(clipjax.watch(history=history), clipjax.clip_by_global_norm(6.5), optax.adam(1e-3))


def grads_of(size):
  """Gradients whose norm is 13 times the size."""
  return jax.tree.map(lambda x: x * size, PARAMS)


def train(tx, sizes, state=None, first=1, params=PARAMS):
  """The number of each step and the state after it; a count of steps stands for gradients that grow with the step."""
  state = tx.init(params) if state is None else state
  update = jax.jit(tx.update)
  for step, size in enumerate(range(first, first + sizes) if isinstance(sizes, int) else sizes, first):
    _, state = update(jax.tree.map(lambda x: x * size, params), state, params)  # noqa: B023  (called at once)
    yield step, state


def after_a_step(tx):
  """The state after one step."""
  ((_, state),) = train(tx, 1)
  return state


def recorded(path, pushes, **options):
  """The run that is read after the pushes, each `(step, state)` or `(step, state, scalars)`."""
  with clipjax.runs.Recorder(path, **options) as recorder:
    for step, state, *scalars in pushes:
      recorder.push(step, state, **dict(*scalars))
  return clipjax.runs.read_run(path)


def record(path, tx, steps, **options):
  """The run of some steps with a loss."""
  return recorded(path, ((step, state, {"loss": jnp.float32(1 / step)}) for step, state in train(tx, steps)), **options)


def rows_of(path):
  """The rows of a file, without its headers."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return [line for line in lines if "clipjax_run" not in line]


def message_of(kind, call, *args, **options):
  """The text of the error that a call raises, which is of exactly this kind."""
  with pytest.raises(kind) as error:
    call(*args, **options)
  assert type(error.value) is kind
  return str(error.value)


def warnings_of(call):
  """The texts of the warnings of a call."""
  with pytest.warns(RuntimeWarning) as caught:
    call()
  return [str(warning.message) for warning in caught]
