"""How often a clip acted, and how much of the gradient it left."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax.quantities import CLIP_FRACTION, NORM, NORM_CLIPPED, SCALE
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View
from clipjax.runs.norms import column
from clipjax.runs.optimizers import scale_free_states
from clipjax.runs.roles import effect_names
from clipjax.runs.schema import key_of, names_with
from clipjax.runs.sources import PLAYBOOK
from clipjax.runs.words import percent, several


class _Clip(NamedTuple):
  """The share of steps in which a clip acted, and the part of the gradient that it leaves there, a median."""

  share: float
  left: float


def clipped_often(view: View) -> Iterator[Finding]:
  """WARN for a clip that takes most of the gradient away in most steps, under an optimizer that feels it.

  Adam and its like divide the scale of the gradient out again: what a clip takes in every step, they give back.
  """
  if scale_free_states(view.run):
    return
  for name in names_with(view.run.columns, CLIP_FRACTION):
    if not view.enough(view.steps_taken(name)):
      continue
    clips = _clips(view, name)
    limits = view.limits
    often = {label: c for label, c in clips.items() if c.share > limits.clip_fraction and c.left < limits.clip_left}
    if not often:
      continue
    leaves = () if "" in often else tuple(often)
    worst = min(often.values(), key=lambda clip: clip.left)
    which = f" in {several(leaves, list(clips))}" if leaves else ""
    message = f"{name!r} clipped {percent(worst.share)} of the steps{which}, and left {percent(worst.left)} of the "
    message += "gradient (median)."
    rule = f"at most {percent(limits.clip_fraction)} of the steps where less than {percent(limits.clip_left)} is left; "
    rule += 'more than half is called "extremely aggressive", as it acts like a lower learning rate'
    advice = "Raise max_norm to what clipjax.runs.suggest_max_norm gives. Fine where you train SGD at a high rate on "
    advice += "purpose and max_norm sets the length of its steps."
    yield Finding("WARN", "clipped-often", message, advice, rule, str(PLAYBOOK), leaves=leaves)


def _clips(view: View, name: str) -> dict[str, _Clip]:
  """What a clip did: by the name "" for a global clip, else by leaf or group."""
  labels, _, scales = view.blocks(name, SCALE)
  if not labels:
    share = view.last(name, CLIP_FRACTION)
    before, after = (column(view.run, key_of(name, quantity)) for quantity in (NORM, NORM_CLIPPED))
    with np.errstate(divide="ignore", invalid="ignore"):
      left = after / before
    left = left[np.isfinite(left) & (left < 1)]
    return {} if share is None else {"": _Clip(share, float(np.median(left)) if left.size else 1.0)}
  known = np.isfinite(scales)
  return {
    label: _Clip(float(np.mean(scale[ok] < 1)), float(np.median(scale[ok])))
    for label, scale, ok in zip(labels, scales.T, known.T, strict=True)
    if view.enough(int(ok.sum()))
  }


def clipped(view: View) -> Iterator[Finding]:
  """INFO: the share of steps that each clip acted in."""
  for name in names_with(view.run.columns, CLIP_FRACTION):
    share = view.last(name, CLIP_FRACTION)
    if share is None:
      continue
    what = " some leaf or group in" if view.blocks(name, SCALE)[0] else ""
    message = f"{name!r} clipped{what} {percent(share)} of {view.steps_taken(name)} steps."
    advice = ""
    is_measured = bool(effect_names(view.run))  # Then it is known what the clip does.
    if share > view.limits.clip_fraction and scale_free_states(view.run) and not is_measured:
      advice = "No harm under this optimizer, which divides the scale of the gradient out."
    yield Finding("INFO", "clipped", message, advice)
