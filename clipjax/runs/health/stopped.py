"""Runs in which nothing trains any more, and steps that were dropped."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax.quantities import FRACTION, NORM
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View
from clipjax.runs.health.words import restore
from clipjax.runs.kinds import Bools, Ints
from clipjax.runs.norms import column, rejected, unseen
from clipjax.runs.roles import Role, keys_with, update_states
from clipjax.runs.schema import SKIP, key_of
from clipjax.runs.words import percent, several

_MOST = 100  # Rows that are enough, however long the run.
_FEWEST = 10  # Rows at the end without training, at least; the last steps of a schedule may have a rate of 0.


class _End(NamedTuple):
  """Why nothing trains from a step on, and what to do."""

  step: int
  why: str
  advice: str
  what: str = "Nothing"  # And whether a part alone does not.


def stopped(view: View) -> Iterator[Finding]:
  """FAIL for a run that trains no more from some step on."""
  ends = [
    end for end in (_all_rejected(view), _all_nonfinite(view), _no_rate(view), _no_update(view)) if end is not None
  ]
  if not ends:
    return
  end = min(ends, key=lambda end: end.step)
  verb = "has trained" if end.what == "Nothing" else "has not trained"
  message = f"{end.what} {verb} since step {end.step}: {end.why}."
  rule = f"less than {percent(view.limits.stopped)} of the run, a limit of clipjax"
  yield Finding("FAIL", "stopped", message, end.advice, rule, steps=(end.step,))


def _since(view: View, is_still: Bools, known: Bools, most: int = _MOST) -> int | None:
  """The step since which each row that says so stands still; None where that is a short part of the run."""
  rows = np.flatnonzero(known)
  moving = np.flatnonzero(~is_still[rows])
  first = int(moving[-1]) + 1 if moving.size else 0
  if rows.size - first < max(_FEWEST, min(view.limits.stopped * view.extent.rows, most)):
    return None
  return int(view.run.steps[rows[first]])


def _all_rejected(view: View) -> _End | None:
  known = np.isfinite(column(view.run, key_of(SKIP, FRACTION)))
  step = _since(view, rejected(view.run), known)
  if step is None:
    return None
  bad = ~np.isfinite(column(view.run, key_of(SKIP, NORM)))[view.run.steps >= step]
  if bad.all():
    advice = f"{restore([step])} Every gradient is inf or NaN from there on: the parameters are, or an accumulator is. "
    advice += "optax.MultiSteps keeps a NaN for good, so put skip_steps around it."
  else:
    advice = (
      f"{restore([step])} If the gradients are sound, raise the sigma of the rule: its limit is below all of them."
    )
  return _End(step, "skip_steps has rejected every step", advice)


def _all_nonfinite(view: View) -> _End | None:
  """Each norm is inf or NaN, and each step was dropped: what is applied is a finding of its own."""
  known = np.isin(view.run.steps, view.norms.steps)
  still = np.isin(view.run.steps, view.norms.steps[~view.norms.finite])
  step = _since(view, still, known)
  if step is None:
    return None
  advice = (
    f"{restore([step])} One NaN stays in an accumulator such as that of optax.MultiSteps: put skip_steps around it."
  )
  return _End(step, f"every norm{view.of} is inf or NaN", advice)


def _no_rate(view: View) -> _End | None:
  """Every learning rate is 0: a part of a model may be frozen on purpose."""
  columns = {key: column(view.run, key) for key in keys_with(view.run.columns, Role.RATE)}
  rates = {key: rate for key, rate in columns.items() if np.isfinite(rate).any()}
  ends = [_since(view, rate == 0, np.isfinite(rate), len(view.run) + 1) for rate in rates.values()]
  known = [step for step in ends if step is not None]
  if not known or len(known) < len(ends):
    return None
  step = max(known)
  ran = "" if step > view.run.steps[0] else " from the start"
  advice = "Look at the schedule: it ends before the run does." if not ran else "Look at the schedule."
  verb = "is" if len(rates) == 1 else "are"
  return _End(step, f"{several(tuple(rates), tuple(rates))} {verb} 0{ran}", advice)


def _no_update(view: View) -> _End | None:
  names = update_states(view.run)
  for name in names:
    norm = column(view.run, key_of(name, NORM))
    known = np.isfinite(norm) & ~unseen(view.run, name)
    if known.any() and (step := _since(view, norm == 0, known)) is not None and not view.is_solved(step):
      advice = "Look at the learning rate, at masks, and at optax.apply_if_finite or MultiSteps around the optimizer."
      return _End(step, f"the norm of {name!r} is 0", advice, "Nothing" if len(names) == 1 else "A part")
  return None


def skipped(view: View) -> Iterator[Finding]:
  """FAIL where `skip_steps` rejected a large part of the steps, WARN for many, INFO for few."""
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
    advice = f"Look at the {view.batches(steps)}; raise the sigma of the rule if they are ordinary ones."
  rule = f"at most {percent(limit)}, a limit of clipjax"
  yield Finding(level, "skipped", message, advice, rule, steps=tuple(steps.tolist()))
