"""The course of the losses of a run.

The training loss is "loss". A validation loss is any column named like "val_loss", "valid_loss", "validation/loss",
"eval_loss", "dev_loss" or "test_loss".
"""

import re
from collections.abc import Iterator

import numpy as np

from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.run import Run
from clipjax.runs.schema import LOSS
from clipjax.runs.sources import PRECHELT
from clipjax.runs.words import number, percent

_VALIDATION = re.compile(rf"(val|valid|validation|eval|evaluation|dev|test)[ _/.-]?{LOSS}", re.IGNORECASE)
_MIN_VALIDATIONS = 10


def rising_loss(view: View) -> Iterator[Finding]:
  """WARN where the loss ends above where it began."""
  loss = view.column(LOSS)
  if not view.enough(loss.size, parts=4):
    return
  first, *_, last = np.array_split(loss, 4)
  before, after = float(first.max()), float(np.median(last))
  if after <= before:
    return
  message = f"The loss rose: median {number(after)} in the last quarter of the steps, above the largest of the first "
  message += f"quarter, {number(before)}."
  advice = "The run diverged or never trained: lower the learning rate, or clip lower (clipjax.runs.suggest_max_norm, "
  advice += "on a run that trains)."
  yield Finding("WARN", "rising-loss", message, advice, "below it, a limit of clipjax")


def overfit(view: View) -> Iterator[Finding]:
  """WARN where the validation loss rises while the loss falls."""
  key = next((key for key in view.run.columns if _VALIDATION.fullmatch(key)), None)
  if key is None or LOSS not in view.run.columns:
    return
  known = np.isfinite(view.run.columns[key])
  values, at = view.run.columns[key][known], view.run.steps[known]
  if values.size < _MIN_VALIDATIONS or values.min() <= 0:  # A quotient of losses needs them positive.
    return
  # Medians of tenths, as a single validation is noisy.
  medians = [float(np.median(part)) for part in np.array_split(values, 10)]
  best, excess = int(np.argmin(medians)), medians[-1] / min(medians) - 1
  train = _losses_beside(view.run, at)
  if excess <= view.limits.overfit or not train[-1] < train[best]:
    return
  step = int(np.array_split(at, 10)[best][np.argmin(np.array_split(values, 10)[best])])
  message = f"{key!r} ends {percent(excess)} above its best, {number(min(medians))} near step {step}, while {LOSS!r} "
  message += f"fell from {number(train[best])} to {number(train[-1])}."
  rule = f"at most {percent(view.limits.overfit)}, criterion GL5"
  advice = "Keep the checkpoint near the best step; regularize, or get more data."
  yield Finding("WARN", "overfit", message, advice, rule, str(PRECHELT), (step,))


def _losses_beside(run: Run, at: Ints) -> list[float]:
  """The median of the training loss within each tenth of the steps `at`, NaN where it has none."""
  loss: Floats = run.columns[LOSS]
  spans = [(part[0] <= run.steps) & (run.steps <= part[-1]) & np.isfinite(loss) for part in np.array_split(at, 10)]
  return [float(np.median(loss[span])) if span.any() else np.nan for span in spans]


def loss_course(view: View) -> Iterator[Finding]:
  """INFO: where the loss began and ended."""
  loss = view.run.columns.get(LOSS, np.zeros(0))
  loss = loss[np.isfinite(loss)]
  if not view.enough(loss.size):
    return
  parts = np.array_split(loss, min(10, loss.size))  # `min_steps` may be less than 10.
  first, last = float(np.median(parts[0])), float(np.median(parts[-1]))
  yield Finding("INFO", "loss", f"The loss went from {number(first)} to {number(last)}, medians of tenths.")
