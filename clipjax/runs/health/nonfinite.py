"""Steps whose norm or loss was inf or NaN."""

from collections.abc import Iterator

import numpy as np

from clipjax.quantities import NONFINITE_STEPS, NORM_CLIPPED
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import bad_words, first_bad
from clipjax.runs.health.view import View
from clipjax.runs.health.words import restore
from clipjax.runs.kinds import Bools, Ints
from clipjax.runs.norms import column, rejected
from clipjax.runs.roles import Role, keys_with
from clipjax.runs.schema import key_of
from clipjax.runs.sources import MIXED_PRECISION

_RULE = "none may occur: one such step that is applied makes every parameter NaN"


def nonfinite_norm(view: View) -> Iterator[Finding]:
  """FAIL for norms of inf or NaN; WARN where each was dropped, INFO where loss scaling made them."""
  bad = view.norms.steps[~view.norms.finite]
  # Steps between two rows are known from the counter alone.
  total = max(bad.size, int(view.last(view.name, NONFINITE_STEPS) or 0))
  if not total:
    return
  where = view.at(bad) if bad.size else "at steps that were not recorded"
  message = f"{total} of {view.steps_taken(view.name)} steps had a norm{view.of} of inf or NaN, {where}"
  layers = first_bad(view.run, view.name, bad)
  leaves, steps = layers.leaves if layers else (), tuple(bad.tolist())
  is_dropped = bad.size == total and _are_dropped(view, bad)
  if is_dropped and (lowered := _lowered_scale(view, bad)) is not None:
    message += f", each of which was dropped and lowered {lowered!r}, as dynamic loss scaling does."
    yield Finding("INFO", "loss-scaling", message, source=str(MIXED_PRECISION), steps=steps)
    return
  message += f"{bad_words(layers, bad[0]) if bad.size else ''}."
  if is_dropped:
    message += ' skip_steps or on_nonfinite="zero" dropped them.'
    advice = f"Look at the {view.batches(bad)}. If a loss scale did it, push it: loss_scale=scale."
    yield Finding("WARN", "nonfinite-dropped", message, advice, "none may occur", steps=steps, leaves=leaves)
    return
  advice = f"Look at the {view.batches(bad[:1])}, and chain" if bad.size else "Chain"
  if bad.size and bad[0] > view.extent.first_step:
    advice = f"{restore(bad)} {advice}"
  advice += " skip_steps around the optimizer, which drops such steps."
  if not layers:
    advice += " clipjax.watch() first in the chain records which layer it was."
  yield Finding("FAIL", "nonfinite", message, advice, _RULE, steps=steps, leaves=leaves)


def _are_dropped(view: View, bad: Ints) -> bool:
  """Whether `skip_steps` rejected each of these steps, or a clip zeroed it."""
  rows = np.searchsorted(view.run.steps, bad)
  return bool((rejected(view.run) | _zeroed(view))[rows].all())


def _zeroed(view: View) -> Bools:
  return np.isfinite(column(view.run, key_of(str(view.name), NORM_CLIPPED)))


def _lowered_scale(view: View, bad: Ints) -> str | None:
  """The loss scale that was lower after each of these steps than before."""
  rows = np.searchsorted(view.run.steps, bad)
  for key in keys_with(view.run.columns, Role.SCALE):
    scale = column(view.run, key)
    before, after = scale[np.maximum(rows - 1, 0)], scale[np.minimum(rows + 1, scale.size - 1)]
    # It may be pushed before the step or after it; nothing is known of the first row and the last.
    if np.all((after < before) | (scale[rows] < before) | (after < scale[rows]) | (rows == scale.size - 1)):
      return key
  return None


def nonfinite_loss(view: View) -> Iterator[Finding]:
  """FAIL for a loss of inf or NaN, WARN where each of these steps was rejected."""
  for key in keys_with(view.run.columns, Role.LOSS, Role.VALIDATION):
    at = view.run.flags.get(key)
    if at is None or not at.any():
      continue
    bad = view.run.steps[at]
    known = int(np.sum(at | np.isfinite(view.run.columns[key])))
    layers = first_bad(view.run, view.name, bad)
    leaves, steps = layers.leaves if layers else (), tuple(bad.tolist())
    message = f"{bad.size} of {known} values of {key!r} were inf or NaN, {view.at(bad)}"
    if layers:
      message += f"; the gradient{'' if layers.step == bad[0] else f' at step {layers.step}'} too, in {layers}"
    if rejected(view.run)[at].all():
      message += ". skip_steps rejected these steps."
      advice = f"Look at the {view.batches(bad)}."
      yield Finding("WARN", "nonfinite-loss", message, advice, "none may occur", steps=steps, leaves=leaves)
      continue
    advice = f"Look at the {view.batches(bad[:1])}, and for log, division and sqrt at 0 in the loss."
    yield Finding("FAIL", "nonfinite-loss", f"{message}.", advice, "none may occur", steps=steps, leaves=leaves)
