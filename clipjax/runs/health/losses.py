"""The losses of a run: whether it learned, and whether it kept what it learned.

`diverged`, `not-learning`, `rising-loss` and `overfit` read the `Course` of the training loss; `diverged` falls back to
the norms if no loss was recorded.
"""

from collections.abc import Iterator

import numpy as np

from clipjax.runs.course import Course, began_late, has_diverged
from clipjax.runs.health.events import Event
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View, views_of
from clipjax.runs.health.words import batches_of, moved, rates_at, restore
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.roles import Role, keys_with
from clipjax.runs.run import Run
from clipjax.runs.sources import PRECHELT
from clipjax.runs.words import number, percent

DIVERGED = "diverged"
_MIN_VALIDATIONS = 10
_MIN_LEARNING = 50  # With fewer losses `not_learning` says nothing.
# An event caused a departure if at most this many rows lie between them; the second number is for an event from which
# the loss never recovered.
_NEAR, _FAR = 5, 100
_ABOVE = 0.5  # A loss rises only if it ends this part of its best above it.
_ROSE, _HALF = 3.0, 0.5  # A loss that rose to 3 times its start must fall by half of that start to have learned.
_EXPLODED = 100.0  # Without a loss, norms that rise by this factor mean that the run diverged.


def diverged(view: View) -> Iterator[Finding]:
  """FAIL for a loss that left for good: it ends above its start, or undid most of its fall."""
  if view.loss is None:
    for of_state in views_of(view):
      yield from _exploded(of_state)
    return
  key, course = view.loss.key, view.loss.course()
  limits = view.limits
  if course is None or course.left is None or not has_diverged(course, learned=limits.learned, lost=limits.lost):
    return
  # Blame the event that the loss left with, if there is one.
  event = _cause(view, course.left)
  step = course.left if event is None else min(course.left, event.start)
  message = f"{key!r} diverged at step {step} and did not recover: {number(course.first)} at the start, "
  message += f"{number(course.best)} at its best (near step {course.best_step}), {number(course.last)} at the end."
  if event is not None and event.first.key != key:
    message += f" First {moved(event.first)}."
  message += rates_at(view.run, step)
  rule = f"at most {percent(view.limits.lost)} of the fall may be undone by the end, a clipjax limit"
  leaves = event.leaves if event is not None else ()
  yield Finding("FAIL", DIVERGED, message, _remedy(view, event, course, step), rule, steps=(step,), leaves=leaves)


def _cause(view: View, left: int) -> Event | None:
  """The event that a loss left with: the first one it did not recover from, else one at that step."""
  row = int(np.searchsorted(view.run.steps, left))
  far, near, end = (int(view.run.steps[np.clip(row + by, 0, len(view.run) - 1)]) for by in (-_FAR, -_NEAR, 1))
  events = [event for event in view.events if event.start <= end]
  lost = [event for event in events if event.start >= far and event.is_recovered is False]
  return next(iter(lost), next((event for event in events if event.start >= near), None))


def _remedy(view: View, event: Event | None, course: Course, step: int) -> str:
  # A run that never got going has no checkpoint worth restoring.
  if course.best_step <= course.steps[min(_NEAR, course.steps.size - 1)] or step <= course.steps[0] + _NEAR:
    return "Lower the learning rate or warm it up; clip if training still breaks (clipjax.runs.suggest_max_norm)."
  advice = f"{restore([step])} "
  if event is not None and event.is_of_rate:
    return f"{advice}Check the learning rate and its schedule there."
  if event is not None and event.moved(Role.NORM) is not None and not event.is_caught:
    return f"{advice}Leave out {batches_of(event)}, and clip just above the typical norm."
  return f"{advice}Lower the learning rate from there on, or clip just above the typical norm."


def _exploded(view: View) -> Iterator[Finding]:
  """Without a loss: norms that rose a hundredfold and stayed there."""
  finite = view.norms.finite
  values, steps = view.norms.values[finite], view.norms.steps[finite]
  if not view.enough(values.size):
    return
  parts = np.array_split(np.arange(values.size), min(20, values.size))
  medians = [float(np.median(values[part])) for part in parts]
  if not medians[-1] > _EXPLODED * min(medians) > 0:
    return
  # The step of the rise: the last norm below the geometric mean of both levels comes just before it.
  level = np.sqrt(min(medians)) * np.sqrt(medians[-1])
  below = np.flatnonzero(values <= level)
  step = int(steps[min(below[-1] + 1, steps.size - 1)])
  message = f"The norm{view.of} rose from {number(min(medians))} to {number(medians[-1])} at step {step} and stayed "
  message += "high."
  advice = f"{restore([step])} Lower the learning rate. Push the loss too, which says more."
  rule = f"less than a factor of {_EXPLODED:g}, a clipjax limit for runs without a loss"
  yield Finding("FAIL", DIVERGED, message, advice, rule, steps=(step,))


def not_learning(view: View) -> Iterator[Finding]:
  """WARN for a loss that never fell."""
  course = None if view.loss is None else view.loss.course()
  if view.loss is None or course is None or view.loss.total < max(_MIN_LEARNING, view.limits.min_steps):
    return
  key = view.loss.key
  # A resumed run may have learned before its record begins.
  is_begun = began_late(view.run.steps, view.extent.first_step, view.extent.rows)
  highest = float(view.loss.values.max())
  has_risen = highest > _ROSE * abs(course.first)
  if is_begun or course.fall > (_HALF if has_risen else view.limits.learned) * abs(course.first):
    return
  message = f"{key!r} hardly fell: {number(course.first)} at the start, "
  message += f"{f'{number(highest)} at its highest, ' if has_risen else ''}{number(course.best)} at its best, over "
  message += f"{view.loss.total} recorded losses."
  rule = f"a fall of at least {percent(_HALF if has_risen else view.limits.learned)}, a clipjax limit"
  advice = "Check that labels match inputs and that the loss reaches every layer; then try learning rates ten times "
  advice += "lower and higher. This is fine when you fine-tune a trained model."
  yield Finding("WARN", "not-learning", message, advice, rule)


def rising_loss(view: View) -> Iterator[Finding]:
  """WARN for a loss that undoes a part of its fall by the end."""
  if (course := _lost(view)) is None or view.loss is None:
    return
  event = lost_with(view)
  if event is None and any(_is_open(event, course) for event in view.events):
    return  # `spikes` reports it.
  step = course.best_step if event is None else event.start
  message = f"{view.loss.key!r} ends at {number(course.last)} after a best of {number(course.best)} near step "
  message += f"{course.best_step}."
  if event is not None:
    message += f" At step {step} {moved(event.first)}."
  rule = f"at most {percent(view.limits.rising_loss)} of the fall may be undone by the end, a clipjax limit"
  advice = f"Keep the checkpoint near step {course.best_step}; decay the learning rate earlier, or lower it."
  if event is not None:
    advice = f"{restore([step])} Look at {batches_of(event)}."
  leaves = () if event is None else event.leaves
  yield Finding("WARN", "rising-loss", message, advice, rule, steps=(step,), leaves=leaves)


def _is_open(event: Event, course: Course) -> bool:
  """Whether the loss did not recover from an event, or the run ends during it."""
  return event.is_recovered is False or (event.is_recovered is None and event.start > course.best_step)


def _lost(view: View) -> Course | None:
  """The course of the loss, if it ends above its best; else None."""
  course = None if view.loss is None else view.loss.course()
  if view.loss is None or course is None or not view.enough(view.loss.total, parts=4):
    return None
  # By more than noise, than the limit, and than half of its best, as a loss near 0 moves a lot in proportion.
  least = max(6 * course.noise, view.limits.rising_loss * course.fall, _ABOVE * abs(course.best))
  return course if course.loss > least else None


def lost_with(view: View) -> Event | None:
  """The event that `rising_loss` blames, if no other event reached the parameters."""
  course = _lost(view)
  event = None if course is None or course.left is None else _cause(view, course.left)
  free = [event for event in view.events if not event.is_caught]
  return event if event is not None and event.is_recovered is False and len(free) == 1 else None


def overfit(view: View) -> Iterator[Finding]:
  """WARN if a validation loss rises while the training loss falls."""
  if view.loss is None:
    return
  loss = view.loss.key
  for key in keys_with(view.run.columns, Role.VALIDATION):
    known = np.isfinite(view.run.columns[key])
    values, at = view.run.columns[key][known], view.run.steps[known]
    if values.size < _MIN_VALIDATIONS or values.min() <= 0:  # GL5 is a quotient of losses, which must be positive.
      continue
    # Compare medians of tenths, since a single validation is noisy.
    medians = [float(np.median(part)) for part in np.array_split(values, 10)]
    best, excess = int(np.argmin(medians)), medians[-1] / min(medians) - 1
    train = _losses_beside(view.run, loss, at)
    if excess <= view.limits.overfit or not train[-1] < train[best]:
      continue
    step = int(np.array_split(at, 10)[best][np.argmin(np.array_split(values, 10)[best])])
    message = f"{key!r} ends {percent(excess)} above its best ({number(min(medians))} near step {step}), while "
    message += f"{loss!r} fell from {number(train[best])} to {number(train[-1])}."
    rule = f"at most {percent(view.limits.overfit)}, criterion GL5"
    advice = "Keep the checkpoint near the best step; regularize, or get more data."
    yield Finding("WARN", "overfit", message, advice, rule, str(PRECHELT), (step,))
    return


def _losses_beside(run: Run, key: str, at: Ints) -> list[float]:
  """The median of the training loss within each tenth of the steps `at`; NaN for a tenth without losses."""
  loss: Floats = run.columns[key]
  spans = [(part[0] <= run.steps) & (run.steps <= part[-1]) & np.isfinite(loss) for part in np.array_split(at, 10)]
  return [float(np.median(loss[span])) if span.any() else np.nan for span in spans]


def loss_course(view: View) -> Iterator[Finding]:
  """INFO: where the loss started and ended."""
  if view.loss is None or not view.enough(view.loss.total):
    return
  key, loss = view.loss.key, view.loss.values
  parts = np.array_split(loss, min(10, loss.size))  # `min_steps` may be less than 10.
  first, last = float(np.median(parts[0])), float(np.median(parts[-1]))
  message = f"{key!r} went from {number(first)} to {number(last)} (medians of the first and last tenth)."
  yield Finding("INFO", "loss", message)
