"""Trains the demo's network once per threshold, and writes the series as JSON."""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import clipjax
from clipjax.demo.model import LEARNING_RATE, MOMENTUM, Params, init_params, optimizer, read_text, train_step

MAX_NORMS = (math.inf, 1.0, 0.25)
READ_EVERY = 10  # Steps between two reads from the device: each read waits for the step, and more would slow the run.

Series = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
Report = Callable[[str, int, dict[str, float]], None]


class Trained(NamedTuple):
  """One run.

  Attributes:
    max_norm: the threshold; inf for no clipping.
    series: "loss" and every key of `clipjax.metrics`; float64, shape (steps,).
    seconds: wall time of the steps, without compilation.
  """

  max_norm: float
  series: Series
  seconds: float

  @property
  def label(self) -> str:
    """The name of the run in the table and the picture."""
    return label_of(self.max_norm)


def train_all(steps: int, seed: int, report: Report) -> list[Trained]:
  """Trains one run for each of `MAX_NORMS`, with a single compilation.

  Args:
    steps: training steps of each run.
    seed: seed of weights and batches.
    report: called with the name of the run, the step and its values, every `READ_EVERY` steps and at the last.

  Returns:
    The runs, in order.
  """
  text = jnp.asarray(read_text())
  key_params, key_batches = jax.random.split(jax.random.key(seed))
  params = init_params(key_params)
  opt_state = optimizer(jnp.float32(math.inf)).init(params)
  # Compile once, ahead of the timed loop; the threshold is an argument.
  compiled = jax.jit(train_step).lower(params, opt_state, jnp.float32(0), text, key_batches, jnp.int32(0)).compile()
  # Every run starts from the same weights and sees the same batches.
  runs = []
  for max_norm in MAX_NORMS:
    state: tuple[Params, Any] = params, opt_state
    rows: list[dict[str, float]] = []
    pending: list[dict[str, jax.Array]] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
      *state, values = compiled(*state, jnp.float32(max_norm), text, key_batches, jnp.int32(step))
      pending.append(values)
      if step % READ_EVERY == 0 or step == steps:
        rows += [{name: float(value) for name, value in row.items()} for row in jax.device_get(pending)]
        pending.clear()
        report(label_of(max_norm), step, rows[-1])
    seconds = time.perf_counter() - start
    runs.append(Trained(max_norm, {name: np.array([row[name] for row in rows]) for name in rows[0]}, seconds))
  return runs


def label_of(max_norm: float) -> str:
  """The name of a run."""
  return "no clipping" if math.isinf(max_norm) else f"max_norm {max_norm:g}"


def to_json(runs: Sequence[Trained], seed: int) -> str:
  """The series of the runs as JSON; nonfinite numbers are null, also a `max_norm` of inf."""
  return json.dumps(
    {
      "clipjax": clipjax.__version__,
      "seed": seed,
      "learning_rate": LEARNING_RATE,
      "momentum": MOMENTUM,
      "runs": [
        {
          "label": trained.label,
          "max_norm": _or_none(trained.max_norm),
          "seconds": trained.seconds,
          "series": {name: [_or_none(x) for x in values.tolist()] for name, values in trained.series.items()},
        }
        for trained in runs
      ],
    },
    allow_nan=False,
  )


def _or_none(x: float) -> float | None:
  return x if math.isfinite(x) else None
