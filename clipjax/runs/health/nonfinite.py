"""Steps whose norm or loss was inf or NaN.

A nonfinite step is a FAIL if it was applied, a WARN if a clip or `skip_steps` dropped it, and an INFO if dynamic loss
scaling caused it.
"""

from collections.abc import Iterator

import numpy as np

from clipjax.metric_names import NONFINITE_STEPS, NORM_CLIPPED
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import bad_words, first_bad
from clipjax.runs.health.view import View
from clipjax.runs.health.words import restore
from clipjax.runs.kinds import Bools, Ints
from clipjax.runs.norms import column, rejected
from clipjax.runs.roles import Role, keys_with
from clipjax.runs.schema import key_of
from clipjax.runs.sources import MIXED_PRECISION

_RULE = "none allowed: applying one such step makes every parameter NaN"


def nonfinite_norm(view: View) -> Iterator[Finding]:
  """FAIL for norms of inf or NaN; WARN if each was dropped, INFO if loss scaling caused them."""
  bad = view.norms.steps[~view.norms.finite]
  # Only the counter knows the steps between two rows.
  total = max(bad.size, int(view.last(view.name, NONFINITE_STEPS) or 0))
  if not total:
    return
  # What was nonfinite, and in which leaves it began.
  where = view.at(bad) if bad.size else "at unrecorded steps"
  message = f"{total} of {view.steps_taken(view.name)} steps had a norm{view.of} of inf or NaN, {where}"
  layers = first_bad(view.run, view.name, bad)
  leaves, steps = layers.leaves if layers else (), tuple(bad.tolist())
  # Dropped steps did no harm; dynamic loss scaling even expects them.
  is_dropped = bad.size == total and _are_dropped(view, bad)
  if is_dropped and (lowered := _lowered_scale(view, bad)) is not None:
    message += f". Each was dropped and lowered {lowered!r}, as dynamic loss scaling does."
    yield Finding("INFO", "loss-scaling", message, source=str(MIXED_PRECISION), steps=steps)
    return
  message += f"{bad_words(layers, bad[0]) if bad.size else ''}."
  if is_dropped:
    message += ' skip_steps or on_nonfinite="zero" dropped them.'
    advice = f"Look at the {view.batches(bad)}. If a loss scale caused it, push that too: loss_scale=scale."
    yield Finding("WARN", "nonfinite-dropped", message, advice, "none allowed", steps=steps, leaves=leaves)
    return
  # These steps were applied, or nobody knows.
  advice = f"Look at the {view.batches(bad[:1])}, and wrap" if bad.size else "Wrap"
  if bad.size and bad[0] > view.extent.first_step:
    advice = f"{restore(bad)} {advice}"
  advice += " the optimizer in skip_steps, which drops such steps."
  if not layers:
    advice += " Put clipjax.watch() first in the chain to record which layer it was."
  yield Finding("FAIL", "nonfinite", message, advice, _RULE, steps=steps, leaves=leaves)


def _are_dropped(view: View, bad: Ints) -> bool:
  """Whether `skip_steps` rejected each of these steps, or a clip zeroed it."""
  rows = np.searchsorted(view.run.steps, bad)
  return bool((rejected(view.run) | _zeroed(view))[rows].all())


def _zeroed(view: View) -> Bools:
  return np.isfinite(column(view.run, key_of(str(view.name), NORM_CLIPPED)))


def _lowered_scale(view: View, bad: Ints) -> str | None:
  """The loss scale that fell at each of these steps; None if there is no such scale."""
  rows = np.searchsorted(view.run.steps, bad)
  for key in keys_with(view.run.columns, Role.SCALE):
    scale = column(view.run, key)
    before, after = scale[np.maximum(rows - 1, 0)], scale[np.minimum(rows + 1, scale.size - 1)]
    # The scale may be pushed before or after the step. The last row has no later one to compare.
    if np.all((after < before) | (scale[rows] < before) | (after < scale[rows]) | (rows == scale.size - 1)):
      return key
  return None


def nonfinite_loss(view: View) -> Iterator[Finding]:
  """FAIL for a loss of inf or NaN; WARN if each of these steps was rejected."""
  for key in keys_with(view.run.columns, Role.LOSS, Role.VALIDATION):
    at = view.run.flags.get(key)
    if at is None or not at.any():
      continue
    # The gradient of such a step is often nonfinite too, and its leaves say where to look.
    bad = view.run.steps[at]
    known = int(np.sum(at | np.isfinite(view.run.columns[key])))
    layers = first_bad(view.run, view.name, bad)
    leaves, steps = layers.leaves if layers else (), tuple(bad.tolist())
    message = f"{bad.size} of {known} values of {key!r} were inf or NaN, {view.at(bad)}"
    if layers:
      message += f"; so was the gradient{'' if layers.step == bad[0] else f' at step {layers.step}'}, in {layers}"
    if rejected(view.run)[at].all():
      message += ". skip_steps rejected these steps."
      advice = f"Look at the {view.batches(bad)}."
      yield Finding("WARN", "nonfinite-loss", message, advice, "none allowed", steps=steps, leaves=leaves)
      continue
    advice = f"Look at the {view.batches(bad[:1])}, and check the loss for log, division and sqrt at 0."
    yield Finding("FAIL", "nonfinite-loss", f"{message}.", advice, "none allowed", steps=steps, leaves=leaves)
