"""Records of several lengths for `choosing.py`: their advice, and how a run at ten times the rate does with it.

Each model trains once without a clip, at its stable rate, for as long as the longest record; shorter records are the
first steps of that run. For each record the advice is computed from the whole record and from the phase in which the
run learned, found with and without the loss, for several shares of the fall of the loss and of the squared norms.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from choosing_page import median_text, named, table
from choosing_runs import OPTIMIZERS, Lane, final_loss, trainer
from choosing_verdicts import anded, tolerance
from small_models import Array, Model

from clipjax.runs import phase, suggest
from clipjax.runs.norms import norms_of_array

LENGTHS = (300, 1000, 2000)
FACTOR = 10
OF_FALL, OF_SQUARES = (0.9, 0.95, 0.98, 0.99, 0.995), (0.9, 0.95, 0.98, 0.99)
WHOLE = "whole record"


class Long(NamedTuple):
  """Results of one model for records of several lengths; arrays have shape (seeds,).

  Attributes:
    title: title of the model.
    lengths: lengths of the records, in steps.
    best: the lowest median final loss of the sweep at `FACTOR` times the rate.
    p75: the percentile that the budget is made of, by (way to find the phase, length).
    final: the final loss at `FACTOR` times the rate with that budget, by the same keys.
    first: the median norm in the first tenth of the longest record.
    last: the median norm in its last tenth.
  """

  title: str
  lengths: tuple[int, ...]
  best: float
  p75: dict[tuple[str, int], Array]
  final: dict[tuple[str, int], Array]
  first: Array
  last: Array


def ways() -> dict[str, tuple[bool, float, float]]:
  """The ways to find the phase: whether by the loss, share of its fall, share of the squares."""
  out = {WHOLE: (False, math.nan, math.nan)}
  out |= {f"{share:.1%} of the fall": (True, share, phase.OF_SQUARES) for share in OF_FALL}
  return out | {f"{share:.0%} of the squares": (False, phase.OF_FALL, share) for share in OF_SQUARES}


def long_study(model: Model, rate: float, lengths: Sequence[int], steps: int, seeds: int) -> Long:
  """Records at one rate, and runs of `steps` steps at ten times that rate.

  Args:
    model: the model to train with SGD.
    rate: its stable rate.
    lengths: lengths of the records.
    steps: steps of the runs at the higher rate.
    seeds: number of seeds.
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
  """The 75th percentile of a record, over the phase found in one of the `ways`."""
  with_loss, of_fall, of_squares = ways()[way]
  if way == WHOLE:
    return float(np.percentile(norms[min(norms.size // 10, 100) :], 75))
  taken = norms_of_array(norms, None)
  given = (taken.steps, losses) if with_loss else None
  found = phase.phase_of(taken, given, None, of_fall=of_fall, of_squares=of_squares)
  return float(np.percentile(norms[found.begin : found.end + 1], suggest.BUDGET_PERCENTILE))


LOSS, NORMS = f"{phase.OF_FALL:.1%} of the fall", f"{phase.OF_SQUARES:.0%} of the squares"  # As in `suggest_max_norm`.


def cell(long: Long, way: str, length: int) -> str:
  """The percentile behind the budget, and the final loss with it, in bold if it holds."""
  text = median_text(long.final[way, length])
  return f"{np.median(long.p75[way, length]):.3g}: " + (f"**{text}**" if holds(long, way, length) else text)


def holds(long: Long, way: str, length: int) -> bool:
  """Whether the final loss is within the tolerance of the best of the sweep."""
  return bool(np.median(long.final[way, length]) <= long.best + tolerance(long.best))


def spread(long: Long, way: str) -> float:
  """The largest factor between the percentiles of records of different lengths."""
  values = [float(np.median(long.p75[way, n])) for n in long.lengths]
  return max(values) / min(values)


def long_summary(everything: Sequence[Long]) -> list[str]:
  """The result in one line."""
  keys = [(long, n) for long in everything for n in long.lengths]
  if not keys:
    return []
  kept = {way: sum(holds(long, way, n) for long, n in keys) for way in (WHOLE, LOSS)}
  return [
    f"- For {len(keys)} records of {min(n for _, n in keys)} to {max(n for _, n in keys)} steps, the step budget for "
    f"{FACTOR} times the rate holds in {kept[LOSS]}; if computed from the whole record, in {kept[WHOLE]}.",
  ]


def long_section(longs: Sequence[Long], old: Sequence[Long], steps: int) -> list[str]:
  """How the advice depends on the length of the record."""
  everything = [*longs, *old]
  rows = []
  for long in everything:
    course = f"{median_text(long.first)} to {median_text(long.last)}"
    rows += [[long.title, str(n), *(cell(long, way, n) for way in (WHOLE, LOSS, NORMS)), course] for n in long.lengths]
  keys = [(long, n) for long in everything for n in long.lengths]
  kept = {way: sum(holds(long, way, n) for long, n in keys) for way in (WHOLE, LOSS, NORMS)}
  apart = {way: max(spread(long, way) for long in everything) for way in kept}
  head = [
    "model",
    "steps of the record",
    "whole record",
    "phase, by the loss",
    "phase, without a loss",
    "norms of the longest",
  ]
  return [
    "## A record that goes on after the run has learned",
    "",
    "When a run fits its data, its norms fall to nothing, and so does a percentile of the whole record. The advice "
    f"therefore uses the phase in which the run learned: until the smoothed loss has completed {phase.OF_FALL:.1%} of "
    f"its fall or, without a loss, until the squared norms have reached {phase.OF_SQUARES:.0%} of their sum; and only "
    "if the norms have fallen to less than half since. The table covers records of several lengths, under SGD at the "
    f"stable rate: p75, and the final loss after {steps} steps at {FACTOR} times the rate with p75 / {FACTOR}, in bold "
    "if it holds.",
    "",
    *table(head, rows, left=1),
    f"Of {len(keys)} records, the budget holds in {kept[WHOLE]} with the whole record, in {kept[LOSS]} with the phase "
    f"by the loss, and in {kept[NORMS]} with the phase without a loss. Across the lengths of a record, p75 differs by "
    f"factors of up to {apart[WHOLE]:.3g}, {apart[LOSS]:.2g} and {apart[NORMS]:.2g}.",
    "",
  ]


def choice_section(old: Sequence[Long]) -> list[str]:
  """Which share of the fall, or of the squares, was chosen, and on which models."""
  if not old:
    return []
  rows = [
    [way, *(cell(long, way, n) for long in old for n in long.lengths), f"{max(spread(long, way) for long in old):.3g}",
     f"{sum(holds(long, way, n) for long in old for n in long.lengths)} of {len(old) * len(old[0].lengths)}"]
    for way in ways()
  ]  # fmt: skip
  is_open = all(holds(long, way, n) for way in ways() if way != WHOLE for long in old for n in long.lengths)
  head = ["phase", *(f"{long.title.split(',')[0]}, {n}" for long in old for n in long.lengths), "apart", "hold"]
  return [
    "### How the end of the phase was chosen",
    "",
    f"The same for other shares, on {anded([named(long.title) for long in old])}, models that the rule was chosen on. "
    '"apart" is the largest factor between records of one model.',
    "",
    *table(head, rows),
    f"Chosen: {LOSS}, and {NORMS} without a loss. "
    + ("Every share holds here, so the table does not decide between them. " if is_open else "")
    + "A later end gives a smaller budget, which is further from the side on which training breaks.",
    "",
  ]
