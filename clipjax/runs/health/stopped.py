"""Runs that stopped training, and rejected steps: `stopped` and `skipped`.

`stopped` has four causes, each with its own remedy; the earliest is reported.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax.metric_names import FRACTION, NORM
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View
from clipjax.runs.health.words import restore
from clipjax.runs.kinds import Bools, Ints
from clipjax.runs.norms import column, rejected, unseen
from clipjax.runs.roles import Role, keys_with, update_states
from clipjax.runs.schema import SKIP, key_of
from clipjax.runs.words import percent, several

_MOST = 100  # This many rows without training are enough, however long the run.
_FEWEST = 10  # Fewer are too few: a schedule may end with a few steps of rate 0.


class _End(NamedTuple):
  """Since when nothing trains, why, and what to do."""

  step: int
  why: str
  advice: str
  what: str = "Nothing"  # Or only a part of the model.
  most: float = _MOST  # As many rows are enough.


def stopped(view: View) -> Iterator[Finding]:
  """FAIL for a run that stops training at some step."""
  ends = [
    end for end in (_all_rejected(view), _all_nonfinite(view), _no_rate(view), _no_update(view)) if end is not None
  ]
  if not ends:
    return
  end = min(ends, key=lambda end: end.step)
  verb = "has trained" if end.what == "Nothing" else "has not trained"
  message = f"{end.what} {verb} since step {end.step}: {end.why}."
  rule = f"training stands still for less than {percent(view.limits.stopped)} of the run"
  rule += f" and for less than {end.most:.0f} rows" * (end.most < len(view.run)) + ", a clipjax limit"
  yield Finding("FAIL", "stopped", message, end.advice, rule, steps=(end.step,))


def _since(view: View, is_still: Bools, known: Bools, most: float = _MOST) -> int | None:
  """The step since which every known row stands still; None if that part of the run is short."""
  # Rows without the number say nothing, so only known rows are counted.
  rows = np.flatnonzero(known)
  moving = np.flatnonzero(~is_still[rows])
  first = int(moving[-1]) + 1 if moving.size else 0
  if rows.size - first < max(_FEWEST, min(view.limits.stopped * view.extent.rows, most)):
    return None
  return int(view.run.steps[rows[first]])


def _all_rejected(view: View) -> _End | None:
  """`skip_steps` rejected every step."""
  known = np.isfinite(column(view.run, key_of(SKIP, FRACTION)))
  step = _since(view, rejected(view.run), known)
  if step is None:
    return None
  # Two causes, told apart by the norms that skip_steps saw: broken numbers, or a limit below sound gradients.
  bad = ~np.isfinite(column(view.run, key_of(SKIP, NORM)))[view.run.steps >= step]
  if bad.all():
    advice = f"{restore([step])} Every gradient from there on is inf or NaN, as the parameters or an accumulator are. "
    advice += "optax.MultiSteps keeps a NaN forever, so wrap it in skip_steps."
  else:
    advice = f"{restore([step])} If the gradients are sound, raise the limit of the rule: it is below all of them."
  return _End(step, "skip_steps has rejected every step", advice)


def _all_nonfinite(view: View) -> _End | None:
  """Every norm is inf or NaN and every step was dropped; `nonfinite` reports steps that were applied."""
  known = np.isin(view.run.steps, view.norms.steps)
  still = np.isin(view.run.steps, view.norms.steps[~view.norms.finite])
  step = _since(view, still, known)
  if step is None:
    return None
  advice = f"{restore([step])} A NaN stays in an accumulator such as optax.MultiSteps: wrap it in skip_steps."
  return _End(step, f"every norm{view.of} is inf or NaN", advice)


def _no_rate(view: View) -> _End | None:
  """Every learning rate is 0; a single one may be, for a part that is frozen on purpose."""
  columns = {key: column(view.run, key) for key in keys_with(view.run.columns, Role.RATE)}
  rates = {key: rate for key, rate in columns.items() if np.isfinite(rate).any()}
  ends = [_since(view, rate == 0, np.isfinite(rate), math.inf) for rate in rates.values()]
  known = [step for step in ends if step is not None]
  if not known or len(known) < len(ends):
    return None
  step = max(known)
  ran = "" if step > view.run.steps[0] else " from the start"
  advice = "Check the schedule: it ends before the run does." if not ran else "Check the schedule."
  verb = "is" if len(rates) == 1 else "are"
  return _End(step, f"{several(tuple(rates), tuple(rates))} {verb} 0{ran}", advice, most=math.inf)


def _no_update(view: View) -> _End | None:
  """Every update is 0, though the loss is not."""
  names = update_states(view.run)
  for name in names:
    norm = column(view.run, key_of(name, NORM))
    known = np.isfinite(norm) & ~unseen(view.run, name)
    if known.any() and (step := _since(view, norm == 0, known)) is not None and not view.is_solved(step):
      advice = "Check the learning rate, masks, and optax.apply_if_finite or MultiSteps around the optimizer."
      return _End(step, f"the norm of {name!r} is 0", advice, "Nothing" if len(names) == 1 else "Part of the model")
  return None


def skipped(view: View) -> Iterator[Finding]:
  """FAIL if `skip_steps` rejected a large part of the steps, WARN for many, INFO for few."""
  # The counter of the state also covers steps between rows.
  share = view.last(SKIP, FRACTION)
  if share is None:
    return
  taken, limits = view.steps_taken(SKIP), view.limits
  steps: Ints = view.run.steps[rejected(view.run)]
  message = f"skip_steps rejected {percent(share)} of {taken} steps{f', {view.at(steps)}' if steps.size else ''}."
  level, advice, limit = "INFO", "", limits.skip_fraction
  if view.enough(taken) and share > limits.skip_fraction:
    level = "WARN"
    if share >= limits.skip_most:
      level, limit = "FAIL", limits.skip_most
    advice = f"Look at the {view.batches(steps)}; if they are ordinary, raise the limit of the rule."
  rule = f"at most {percent(limit)}, a clipjax limit"
  yield Finding(level, "skipped", message, advice, rule, steps=tuple(steps.tolist()))
