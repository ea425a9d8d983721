"""What can be wrong with the losses of a run, for `diagnose`.

The training loss is "loss". A validation loss is any column named like "val_loss", "valid_loss", "validation/loss",
"eval_loss", "dev_loss" or "test_loss".
"""

import re
from collections.abc import Iterator

import numpy as np

from clipjax.runs.health.findings import Finding, View
from clipjax.runs.run import Floats, Run
from clipjax.runs.words import at_steps, number, percent

_VALIDATION = re.compile(r"(val|valid|validation|eval|evaluation|dev|test)[ _/.-]?loss", re.IGNORECASE)
_MIN_VALIDATIONS = 10


def nonfinite_loss(view: View) -> Iterator[Finding]:
  """FAIL for a loss of inf or NaN, WARN where the step was rejected."""
  if "loss" not in view.run.flags:
    return
  bad = view.run.flags["loss"]
  rejected = np.isin(view.run.steps[bad], view.norms.steps[view.norms.rejected])
  known = int(np.sum(bad | np.isfinite(view.run.columns["loss"])))
  message = f"{int(bad.sum())} of {known} losses were inf or NaN, {at_steps(view.run.steps[bad])}."
  if rejected.all():
    yield Finding(
      "WARN",
      "nonfinite-loss",
      f"{message} skip_steps rejected these steps. Rule: none may occur.",
      "Look at their batches.",
    )
    return
  yield Finding(
    "FAIL",
    "nonfinite-loss",
    f"{message} Rule: none may occur.",
    "Look at the batch of the first of these steps, and for log, division and sqrt at 0 in the loss; then lower the "
    "learning rate.",
  )


def rising_loss(view: View) -> Iterator[Finding]:
  """WARN where the loss ends above where it began."""
  loss = view.column("loss")
  if not view.enough(loss.size, parts=4):
    return
  first, *_, last = np.array_split(loss, 4)
  before, after = float(first.max()), float(np.median(last))
  if after <= before:
    return
  yield Finding(
    "WARN",
    "rising-loss",
    f"The loss rose: median {number(after)} in the last quarter of the steps, above the largest of the first quarter, "
    f"{number(before)}. Rule: below it, a limit of clipjax.",
    "The run diverged or never trained: lower the learning rate, or clip lower (clipjax.runs.suggest_max_norm, "
    "on a run "
    "that trains).",
  )


def overfit(view: View) -> Iterator[Finding]:
  """WARN where the validation loss rises while the loss falls."""
  key = next((key for key in view.run.columns if _VALIDATION.fullmatch(key)), None)
  if key is None or "loss" not in view.run.columns:
    return
  known = np.isfinite(view.run.columns[key])
  values, at = view.run.columns[key][known], view.run.steps[known]
  if values.size < _MIN_VALIDATIONS or values.min() <= 0:  # A quotient of losses needs them positive.
    return
  # Medians of tenths, as a single validation is noisy.
  medians = [float(np.median(part)) for part in np.array_split(values, 10)]
  best, excess = int(np.argmin(medians)), medians[-1] / min(medians) - 1
  best_step = np.array_split(at, 10)[best][np.argmin(np.array_split(values, 10)[best])]
  spans = [_between(view.run, int(part[0]), int(part[-1])) for part in np.array_split(at, 10)]
  train = [float(np.median(span)) if span.size else np.nan for span in spans]
  if excess <= view.limits.overfit or not train[-1] < train[best]:
    return
  yield Finding(
    "WARN",
    "overfit",
    f"{key!r} ends {percent(excess)} above its best, {number(min(medians))} near step {best_step}, while "
    f"'loss' fell from {number(train[best])} to {number(train[-1])}. Rule: at most {percent(view.limits.overfit)}, "
    "criterion GL5 of Prechelt, Early stopping, but when?, 1998.",
    "Keep the checkpoint near the best step; regularize, or get more data.",
  )


def _between(run: Run, first: int, last: int) -> Floats:
  """The finite losses of the steps from `first` to `last`."""
  loss: Floats = run.columns["loss"]
  return loss[(run.steps >= first) & (run.steps <= last) & np.isfinite(loss)]
