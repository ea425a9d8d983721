"""How often a clip acted, or `skip_steps` rejected."""

from collections.abc import Iterator

import numpy as np

from clipjax.quantities import CLIP_FRACTION, FRACTION, MAX_NORM, SCALE
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.view import View
from clipjax.runs.norms import rejected
from clipjax.runs.schema import SKIP, key_of, names_with
from clipjax.runs.sources import PLAYBOOK
from clipjax.runs.words import percent, several


def clipped_often(view: View) -> Iterator[Finding]:
  """WARN for a clip that acts in most steps; of a clip by group or leaf, in most steps of one of them."""
  for name in names_with(view.run.columns, CLIP_FRACTION):
    if not view.enough(view.steps_taken(name)):
      continue
    shares = _clip_shares(view, name)
    often = {label: share for label, share in shares.items() if share > view.limits.clip_fraction}
    if not often:
      continue
    leaves = () if "" in often else tuple(often)
    which = f" in {several(leaves, list(shares))}" if leaves else ""
    message = f"{name!r} clipped {percent(max(often.values()))} of the steps{which}."
    rule = f"at most {percent(view.limits.clip_fraction)}; more than half of the updates clipped is called "
    rule += '"extremely aggressive", as it acts like a lower learning rate'
    advice = "Lower the learning rate, or raise max_norm: clipjax.runs.suggest_max_norm says how far. Fine where you "
    advice += "train SGD at a high rate on purpose and max_norm sets the length of its steps."
    limits = view.column(key_of(name, MAX_NORM))
    if limits.size and limits.max() > 1.001 * limits.min():
      advice += " The threshold moved: AutoClip's default clips nine steps in ten by design."
    yield Finding("WARN", "clipped-often", message, advice, rule, str(PLAYBOOK), leaves=leaves)


def _clip_shares(view: View, name: str) -> dict[str, float]:
  """The share of steps that a clip acted in: by the name "" for a global clip, else by leaf or group."""
  labels, _, scales = view.blocks(name, SCALE)
  if not labels:
    share = view.last(name, CLIP_FRACTION)
    return {} if share is None else {"": share}
  known = np.isfinite(scales)
  return {
    label: float(np.mean(scale[ok] < 1))
    for label, scale, ok in zip(labels, scales.T, known.T, strict=True)
    if view.enough(int(ok.sum()))
  }


def clipped(view: View) -> Iterator[Finding]:
  """INFO: the share of steps that each clip acted in."""
  for name in names_with(view.run.columns, CLIP_FRACTION):
    share = view.last(name, CLIP_FRACTION)
    if share is not None:
      what = " some leaf or group in" if view.blocks(name, SCALE)[0] else ""
      yield Finding("INFO", "clipped", f"{name!r} clipped{what} {percent(share)} of {view.steps_taken(name)} steps.")


def skipped(view: View) -> Iterator[Finding]:
  """WARN where `skip_steps` rejected many steps, INFO where it rejected few."""
  share = view.last(SKIP, FRACTION)
  if share is None:
    return
  taken = view.steps_taken(SKIP)
  many = view.enough(taken) and share > view.limits.skip_fraction
  steps = view.run.steps[rejected(view.run)]
  message = f"skip_steps rejected {percent(share)} of {taken} steps{f', {view.at(steps)}' if steps.size else ''}."
  rule = f"at most {percent(view.limits.skip_fraction)}, a limit of clipjax"
  level, advice = "INFO", ""
  if many:
    level = "WARN"
    advice = "Look at the batches of rejected steps; raise the sigma of the rule if they are ordinary ones."
  yield Finding(level, "skipped", message, advice, rule, steps=tuple(steps.tolist()))
