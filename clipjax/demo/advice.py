"""The last part of the demo: take a threshold from the norms of a stable run, try it, and write a report of that run.

The network of `clipjax.demo.compare` trains once without a clip, at a learning rate at which it is stable, and is
recorded by a `clipjax.runs.Recorder`. `clipjax.runs.suggest_max_norm` derives a threshold from the norms of this run,
and a second run tries it at the demo's higher rate.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import clipjax
from clipjax.demo import compare, model
from clipjax.runs.reading.lines import is_run
from clipjax.runs.report.own_pages import may_be_replaced
from clipjax.runs.words import plain

STABLE_RATE = 0.25  # The best rate in docs/choosing.md at which this model is stable without a clip.

_RECORD, _PAGE = "clipjax_demo_run.jsonl", "clipjax_demo_run.html"

Step = Callable[[Any, float, float, int], tuple[Any, jax.Array]]


def run(out: Path, steps: int, seed: int) -> None:
  """Records a run, suggests a threshold, tries it, and reports: writes `clipjax_demo_run.jsonl` and `.html`.

  Args:
    out: directory of the two files.
    steps: training steps of each run.
    seed: seed of weights and batches, as in `clipjax.demo.compare.run`.

  Raises:
    OSError: if a file cannot be written.
  """
  console = Console(markup=False, highlight=False, emoji=False)
  record, page = out / _RECORD, out / _PAGE
  # Record: the stable run, without a clip.
  record.unlink(missing_ok=True)
  start, step = _trainer(seed)
  with clipjax.runs.Recorder(record, every=10) as recorder:  # Norms by leaf every 10 steps.
    losses = train(start, step, steps, math.inf, STABLE_RATE, recorder)
  console.print(
    f"\nWhich threshold suits a learning rate of {model.LEARNING_RATE:g}? To find one, the same network trained for "
    f"{steps} steps without a clip at a rate of {STABLE_RATE:g}: {_course(losses)}.\n"
  )
  # Suggest: from the norms of the stable run, for the higher rate.
  run = clipjax.runs.read_run(record)
  suggestion = None
  try:
    suggestion = clipjax.runs.suggest_max_norm(
      run, learning_rate=STABLE_RATE, new_learning_rate=model.LEARNING_RATE, model="rnn"
    )
  except ValueError as error:
    console.print(f"No suggestion: {error}", soft_wrap=True)
  else:
    console.print(str(suggestion), soft_wrap=True)
    losses = train(start, step, steps, suggestion.max_norm, model.LEARNING_RATE)
    console.print(f"\nWith this threshold and a rate of {model.LEARNING_RATE:g}, {_course(losses)}.")
  clipjax.runs.write_report(run, page, suggestion=suggestion)
  written = f"\nWrote {plain(str(record))} and the report {plain(str(page))}"
  console.print(written.encode(console.encoding, "backslashreplace").decode(console.encoding), soft_wrap=True)


def other_file(out: Path) -> Path | None:
  """The first of the two files that exists and was not written by clipjax; None without one."""
  record, page = out / _RECORD, out / _PAGE
  if record.is_file() and not is_run(str(record)):
    return record
  return None if may_be_replaced(page) else page


def train(
  start: Any,
  step: Step,
  steps: int,
  max_norm: float,
  learning_rate: float,
  recorder: clipjax.runs.Recorder | None = None,
) -> list[float]:
  """Trains and returns the losses; a recorder, if given, records every step."""
  losses, state = [], start
  for i in range(1, steps + 1):
    state, loss = step(state, max_norm, learning_rate, i)
    if recorder is not None:
      tokens = model.BATCH * model.LENGTH
      recorder.push(i, state[1], params=state[0], loss=loss, learning_rate=learning_rate, tokens=tokens)
    losses.append(loss)
  return [float(loss) for loss in jax.device_get(losses)]


def _trainer(seed: int) -> tuple[Any, Step]:
  """The state before the first step, and the compiled step."""
  text = jnp.asarray(model.read_text())
  key_params, key_batches = jax.random.split(jax.random.key(seed))

  def optimizer(max_norm: Any, learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    sgd = optax.sgd(learning_rate, momentum=model.MOMENTUM)
    clip = clipjax.clip_by_global_norm(max_norm)
    return optax.chain(clipjax.watch(), clip, sgd, clipjax.watch(name="update"))

  @jax.jit
  def step(state: Any, max_norm: jax.Array, learning_rate: jax.Array, i: jax.Array) -> tuple[Any, jax.Array]:
    params, opt_state = state
    loss, grads = jax.value_and_grad(model.loss_fn)(params, model.batch(text, key_batches, i))
    updates, opt_state = optimizer(max_norm, learning_rate).update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  params = model.init_params(key_params)
  return (params, optimizer(math.inf, 1.0).init(params)), lambda state, max_norm, learning_rate, i: step(
    state, jnp.float32(max_norm), jnp.float32(learning_rate), jnp.int32(i)
  )


def _course(losses: list[float]) -> str:
  final = float(np.mean(losses[-compare.FINAL_STEPS :]))
  return f"the loss went from {compare.short(losses[0])} to {compare.short(final)}"
