"""Records of several lengths for `choosing.py`: what their advice is, and how a run at ten times the rate fares with it.

A model that converges trains once without a clip for as long as the longest record, at its stable rate; shorter records
are the first steps of that run. Each gives the advice of the whole record and that of the phase in which it learned, by
the loss and without it, and for some shares of the loss and of the squared norms.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from choosing_runs import OPTIMIZERS, Lane, final_loss, trainer
from small_models import Array, Model

from clipjax.runs import phase, suggest
from clipjax.runs.norms import norms_of_array

LENGTHS = (300, 1000, 2000)
FACTOR = 10
OF_FALL, OF_SQUARES = (0.9, 0.95, 0.98, 0.99, 0.995), (0.9, 0.95, 0.98, 0.99)
WHOLE = "whole record"


class Long(NamedTuple):
  """What records of several lengths say of one model; arrays of shape (seeds,).

  Attributes:
    title: of the model.
    lengths: of the records, in steps.
    best: the lowest median final loss of the sweep at `FACTOR` times the rate.
    p75: by the way to find the phase and the length: the percentile that the budget is made of.
    final: the same: the final loss at `FACTOR` times the rate with that budget.
    first: the median norm in the first tenth of the longest record, and `last` that in its last tenth.
  """

  title: str
  lengths: tuple[int, ...]
  best: float
  p75: dict[tuple[str, int], Array]
  final: dict[tuple[str, int], Array]
  first: Array
  last: Array


def ways() -> dict[str, tuple[bool, float, float]]:
  """The ways to find the phase: with the loss or without, share of its fall, share of the squares."""
  out = {WHOLE: (False, math.nan, math.nan)}
  out |= {f"{share:.1%} of the fall": (True, share, phase.OF_SQUARES) for share in OF_FALL}
  return out | {f"{share:.0%} of the squares": (False, phase.OF_FALL, share) for share in OF_SQUARES}


def long_study(model: Model, rate: float, lengths: Sequence[int], steps: int, seeds: int) -> Long:
  """Records at one rate, and runs of `steps` steps at ten times that.

  Args:
    model: what is trained, by SGD.
    rate: the stable one.
    lengths: of the records.
    steps: of the runs at the higher rate.
    seeds: how many.
  """
  make = OPTIMIZERS["sgd"].make
  record, run = trainer(model, make, max(lengths), lanes=1), trainer(model, make, steps)
  found: list[tuple[dict[Any, float], dict[Any, float], tuple[float, float]]] = []
  for seed in range(seeds):
    losses, norms, _ = (x[0] for x in record([Lane(math.inf, rate)], seed))
    p75 = {(way, n): percentile(norms[:n], losses[:n], way) for way in ways() for n in lengths}
    lanes = {key: Lane(value / FACTOR, FACTOR * rate) for key, value in p75.items()}
    lanes |= {("sweep", c): Lane(c, FACTOR * rate) for c in float(np.median(norms[:steps])) * 2.0 ** np.arange(-7, 3)}
    final = dict(zip(lanes, final_loss(run(list(lanes.values()), seed)[0]), strict=True))
    tenth = max(norms.size // 10, 1)
    found.append((p75, final, (float(np.median(norms[:tenth])), float(np.median(norms[-tenth:])))))
  sweep = np.array([[loss for key, loss in final.items() if key[0] == "sweep"] for _, final, _ in found])
  first, last = np.array([course for _, _, course in found]).T
  keys = list(found[0][0])
  return Long(
    model.title,
    tuple(lengths),
    float(np.median(sweep, axis=0).min()),
    {key: np.array([p75[key] for p75, _, _ in found]) for key in keys},
    {key: np.array([final[key] for _, final, _ in found]) for key in keys},
    first,
    last,
  )


def percentile(norms: Array, losses: Array, way: str) -> float:
  """The 75th percentile of a record, in the phase that is found in one way."""
  with_loss, of_fall, of_squares = ways()[way]
  if way == WHOLE:
    return float(np.percentile(norms[min(norms.size // 10, 100) :], 75))
  taken = norms_of_array(norms, None)
  given = (taken.steps, losses) if with_loss else None
  found = phase.phase_of(taken, given, None, of_fall=of_fall, of_squares=of_squares)
  return float(np.percentile(norms[found.begin : found.end + 1], suggest.BUDGET_PERCENTILE))


def chosen() -> dict[str, str]:
  """The ways that `suggest_max_norm` takes, with a loss and without."""
  return {"loss": f"{phase.OF_FALL:.1%} of the fall", "norms": f"{phase.OF_SQUARES:.0%} of the squares"}
