"""Steps whose norm or loss was inf or NaN."""

from collections.abc import Iterator

import numpy as np

from clipjax.quantities import NONFINITE_STEPS, NORM_CLIPPED
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import bad_words, first_bad
from clipjax.runs.health.view import View
from clipjax.runs.kinds import Ints
from clipjax.runs.norms import column, rejected
from clipjax.runs.schema import LOSS, key_of


def nonfinite_norm(view: View) -> Iterator[Finding]:
  """FAIL for norms of inf or NaN, WARN where each of these steps was dropped."""
  bad = view.norms.steps[~view.norms.finite]
  # Steps between two rows are known from the counter alone.
  total = max(bad.size, int(view.last(view.name, NONFINITE_STEPS) or 0))
  if not total:
    return
  where = view.at(bad) if bad.size else "at steps that were not recorded"
  layers = first_bad(view, bad)
  leaves, steps = layers.leaves if layers else (), tuple(bad.tolist())
  message = f"{total} of {view.steps_taken(view.name)} steps had a norm of inf or NaN, {where}"
  message += f"{bad_words(layers, bad[0]) if bad.size else ''}."
  if bad.size == total and _are_dropped(view, bad):
    message += ' skip_steps or on_nonfinite="zero" dropped them.'
    advice = "Look at the batches of these steps."
    yield Finding("WARN", "nonfinite-dropped", message, advice, "none may occur", steps=steps, leaves=leaves)
    return
  advice = "Lower the learning rate, look at the batches of these steps, and protect the run with skip_steps or "
  advice += 'on_nonfinite="zero".'
  if not layers:
    advice += " clipjax.watch() first in the chain records which layer it was."
  rule = "none may occur, as one such step that is applied makes every parameter NaN"
  yield Finding("FAIL", "nonfinite", message, advice, rule, steps=steps, leaves=leaves)


def _are_dropped(view: View, bad: Ints) -> bool:
  """Whether `skip_steps` rejected each of these steps, or a clip zeroed it."""
  rows = np.searchsorted(view.run.steps, bad)
  zeroed = np.isfinite(column(view.run, key_of(str(view.name), NORM_CLIPPED)))
  return bool((rejected(view.run) | zeroed)[rows].all())


def nonfinite_loss(view: View) -> Iterator[Finding]:
  """FAIL for a loss of inf or NaN, WARN where each of these steps was rejected."""
  at = view.run.flags.get(LOSS)
  if at is None or not at.any():
    return
  bad = view.run.steps[at]
  known = int(np.sum(at | np.isfinite(view.run.columns[LOSS])))
  layers = first_bad(view, bad)
  leaves, steps = layers.leaves if layers else (), tuple(bad.tolist())
  message = f"{bad.size} of {known} losses were inf or NaN, {view.at(bad)}"
  if layers:
    message += f"; the gradient{'' if layers.step == bad[0] else f' at step {layers.step}'} too, in {layers}"
  if rejected(view.run)[at].all():
    message += ". skip_steps rejected these steps."
    advice = "Look at their batches."
    yield Finding("WARN", "nonfinite-loss", message, advice, "none may occur", steps=steps, leaves=leaves)
    return
  advice = "Look at the batch of the first of these steps, and for log, division and sqrt at 0 in the loss; then lower "
  advice += "the learning rate."
  yield Finding("FAIL", "nonfinite-loss", f"{message}.", advice, "none may occur", steps=steps, leaves=leaves)
