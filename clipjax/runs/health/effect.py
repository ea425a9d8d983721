"""What a clip does to the step of its optimizer, where `clip_effect` has measured it.

Of each effect at most one thing is said of the step as a whole, and one of leaves that are starved.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax.quantities import COSINE, GRAD_RATIO, RATIO, SHARE
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.kinds import Floats
from clipjax.runs.norms import column
from clipjax.runs.schema import key_of, names_with
from clipjax.runs.words import number, percent, several

_SAME = 0.05  # A median ratio as near to 1 is that of a step which the clip leaves alone.
_TURNED = 0.9  # A median cosine below is a step of another direction.
_LEAST_ROWS = 4  # With numbers by leaf, after the warm-up.
_OFTEN = 0.1  # Part of the steps in which one leaf alone must have made the clip act.
_ROUNDING = 1e-3


class _Step(NamedTuple):
  """What the clip does to the step as a whole: medians after the warm-up, and the share of steps that are changed."""

  ratio: float
  cosine: float
  changed: float


def effects(view: View) -> list[str]:
  """The names of the states of `clip_effect`."""
  return names_with(view.run.columns, COSINE)


def clip_starves(view: View) -> Iterator[Finding]:
  """WARN where one leaf makes the clip act, and others lose most of their step by it."""
  for name in effects(view):
    if (found := _starved(view, name)) is not None:
      yield found


def clip_lengthens(view: View) -> Iterator[Finding]:
  """WARN for a clip that makes the step longer, as it does where a second moment is made of clipped gradients."""
  for name in effects(view):
    step = _step(view, name)
    if step is None or not step.ratio > view.limits.lengthened:
      continue
    message = f"With the clip of {name!r} the step is {number(step.ratio)} times as long as without it (median)"
    names, steps, ratios = view.blocks(name, RATIO)
    longest = medians_of(names, ratios[steps >= view.norms.begin])
    leaves = tuple(leaf for leaf, ratio in longest.items() if ratio == max(longest.values()) > step.ratio)
    message += f", in {leaves[0]!r} {number(longest[leaves[0]])} times." if leaves else "."
    advice = "It acts like a learning rate that is as many times higher. Raise max_norm to twice the 90th percentile "
    advice += "of the norm, where it catches spikes and leaves the step alone, or count it into the learning rate."
    rule = f"at most {view.limits.lengthened:g} times, a limit of clipjax"
    yield Finding("WARN", "clip-lengthens", message, advice, rule, leaves=leaves[:1])


def clip_effect(view: View) -> Iterator[Finding]:
  """INFO: what a clip does to the step, where that is no defect."""
  for name in effects(view):
    step = _step(view, name)
    if step is None or step.ratio > view.limits.lengthened:
      continue
    said = f"median ratio {number(step.ratio)}, cosine {number(step.cosine)}"
    if step.cosine < _TURNED:
      message = f"The clip of {name!r} turns the step ({said})."
      yield Finding("INFO", "clip-turns", message, "A clip by leaf or by value does so by design, and Lion's signs do.")
    elif step.ratio < 1 - _SAME:
      message = f"The clip of {name!r} shortens the step to {percent(step.ratio)} ({said})."
      yield Finding("INFO", "clip-shortens", message, "A lower learning rate would do the same to most steps.")
    elif step.ratio <= 1 + _SAME:
      message = f"The clip of {name!r} leaves the step as it is ({said}); in {percent(step.changed)} of the steps it "
      message += f"changes the length by more than {percent(_SAME)}."
      yield Finding("INFO", "clip-no-effect", message, "The clip is insurance: leave max_norm alone.")


def _step(view: View, name: str) -> _Step | None:
  """What the clip of an effect does to the step; None for too few steps."""
  ratios, cosines = view.column(key_of(name, RATIO)), view.column(key_of(name, COSINE))
  if not view.enough(ratios.size) or not cosines.size:
    return None
  changed = float(np.mean(np.abs(ratios - 1) > _SAME))
  return _Step(float(np.median(ratios)), float(np.median(cosines)), changed)


def _starved(view: View, name: str) -> Finding | None:
  """The finding of one effect; None where no leaf starves, or no single other one is the cause."""
  names, steps, ratios = view.blocks(name, RATIO)
  of_shares, at, shares = view.blocks(name, SHARE)
  late = (steps >= view.norms.begin) & np.isfinite(ratios).all(1)
  if names != of_shares or not np.array_equal(steps, at) or late.sum() < _LEAST_ROWS:
    return None
  ratios, shares = ratios[late], shares[late]
  left = column(view.run, key_of(name, GRAD_RATIO))
  of_rows = left[np.searchsorted(view.run.steps, steps[late])]

  # The cause: without this leaf the norm would have been below the limit.
  most = shares.max(1)
  alone = (of_rows < 1) & (np.sqrt(1 - np.minimum(most, 1)) <= of_rows * (1 + _ROUNDING))
  if not alone.any():
    return None
  holders = np.bincount(shares[alone].argmax(1), minlength=len(names))
  holder = int(holders.argmax())

  # What the others keep. Leaves are recorded at spikes more often than elsewhere: each step of the run counts as the
  # recorded one whose gradient was clipped most nearly as much.
  everywhere = left[np.isfinite(left) & (view.run.steps >= view.norms.begin)]
  nearest = _nearest(of_rows, everywhere)
  kept = np.minimum(ratios, 1)[nearest].mean(0)
  starved = [i for i in np.argsort(kept).tolist() if i != holder and kept[i] < view.limits.starved]
  if not view.enough(everywhere.size) or alone[nearest].mean() < _OFTEN or not starved:
    return None
  share = float(np.median(shares[alone & (shares.argmax(1) == holder), holder]))
  return _starving(view, name, tuple(names[i] for i in starved), float(kept[starved[0]]), names[holder], share, names)


def _starving(
  view: View, name: str, starved: tuple[str, ...], kept: float, holder: str, share: float, names: tuple[str, ...]
) -> Finding:
  message = f"The clip of {name!r} starves {several(starved, names)}: {starved[0]!r} keeps {percent(kept)} of its step "
  message += f"(mean). Where the clip acts, {holder!r} holds {percent(share)} of the squared norm of the gradient "
  message += "(median), and without it the norm would be below the limit."
  advice = (
    f"Clip {holder!r} by itself: clip_by_leaf_norm, or clip_by_group_norm with a group for it. Or raise max_norm."
  )
  rule = f"each leaf at least {percent(view.limits.starved)} of its step, a limit of clipjax"
  return Finding("WARN", "clip-starves", message, advice, rule, leaves=(*starved, holder))


def _nearest(known: Floats, values: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
  """For each value the place of the known number that is nearest to it."""
  order = np.argsort(known, kind="stable")
  above = np.searchsorted(known[order], values).clip(1, known.size - 1)
  low, high = known[order][above - 1], known[order][above]
  return order[np.where(values - low <= high - values, above - 1, above)]
