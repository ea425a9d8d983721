"""How often a clip acted and how much of the gradient it left: `clipped-often` and `clipped`.

Both need only what a clip always records: its share of clipped steps, and the norm before and after it or its scales.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax.metric_names import CLIP_FRACTION, NORM, NORM_CLIPPED, SCALE
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View
from clipjax.runs.norms import column
from clipjax.runs.optimizers import scale_free_states
from clipjax.runs.roles import effect_names
from clipjax.runs.schema import key_of, names_with
from clipjax.runs.sources import PLAYBOOK
from clipjax.runs.words import percent, several


class _Clip(NamedTuple):
  """How often a clip acted, and the median part of the gradient that it left."""

  share: float
  left: float


def clipped_often(view: View) -> Iterator[Finding]:
  """WARN for a clip that removes most of the gradient in most steps, if the optimizer depends on the scale.

  Adam and similar optimizers divide the scale of the gradient out, which undoes a clip that acts in every step.
  """
  if scale_free_states(view.run):
    return
  for name in names_with(view.run.columns, CLIP_FRACTION):
    if not view.enough(view.steps_taken(name)):
      continue
    clips = _clips(view, name)
    limits = view.limits
    # Both conditions must hold: a clip that acts in every step but removes little is harmless.
    often = {label: c for label, c in clips.items() if c.share > limits.clip_fraction and c.left < limits.clip_left}
    if not often:
      continue
    leaves = () if "" in often else tuple(often)
    # Report the harshest of them.
    worst = min(often.values(), key=lambda clip: clip.left)
    which = f" in {several(leaves, list(clips))}" if leaves else ""
    message = f"{name!r} clipped {percent(worst.share)} of the steps{which} and left {percent(worst.left)} of the "
    message += "gradient (median)."
    rule = f"at most {percent(limits.clip_fraction)} of the steps if less than {percent(limits.clip_left)} of the "
    rule += 'gradient is left; the playbook calls more than half "extremely aggressive", since it acts like a lower '
    rule += "learning rate"
    advice = "Raise max_norm to the value from clipjax.runs.suggest_max_norm. This is fine if you run SGD at a high "
    advice += "learning rate on purpose and let max_norm set the length of its steps."
    yield Finding("WARN", "clipped-often", message, advice, rule, str(PLAYBOOK), leaves=leaves)


def _clips(view: View, name: str) -> dict[str, _Clip]:
  """What a clip did, by leaf or group; a global clip has the single name ""."""
  labels, _, scales = view.blocks(name, SCALE)
  if not labels:
    share = view.last(name, CLIP_FRACTION)
    before, after = (column(view.run, key_of(name, quantity)) for quantity in (NORM, NORM_CLIPPED))
    with np.errstate(divide="ignore", invalid="ignore"):
      left = after / before
    left = left[np.isfinite(left) & (left < 1)]  # Only the clipped steps.
    return {} if share is None else {"": _Clip(share, float(np.median(left)) if left.size else 1.0)}
  # A clip by leaf or group is judged block by block: it acts in some block far more often than in any one of them.
  known = np.isfinite(scales)
  return {
    label: _Clip(float(np.mean(scale[ok] < 1)), float(np.median(scale[ok])))
    for label, scale, ok in zip(labels, scales.T, known.T, strict=True)
    if view.enough(int(ok.sum()))
  }


def clipped(view: View) -> Iterator[Finding]:
  """INFO: the share of steps in which each clip acted."""
  for name in names_with(view.run.columns, CLIP_FRACTION):
    share = view.last(name, CLIP_FRACTION)
    if share is None:
      continue
    what = " some leaf or group in" if view.blocks(name, SCALE)[0] else ""
    message = f"{name!r} clipped{what} {percent(share)} of {view.steps_taken(name)} steps."
    advice = ""
    is_measured = bool(effect_names(view.run))  # `clip_effect` then says what the clip does.
    if share > view.limits.clip_fraction and scale_free_states(view.run) and not is_measured:
      advice = "Harmless under this optimizer, which divides out the scale of the gradient."
    yield Finding("INFO", "clipped", message, advice)
