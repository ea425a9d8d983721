"""What can be wrong with a run, for `diagnose`: functions `View -> findings`, in the order of a level's findings.

A check yields nothing where what it needs was not recorded, or where there are too few steps for its statistics. Each
message has the number, the rule with its limit, and where the rule comes from; a limit without a source says so.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from clipjax.runs.health.detectors import SpikeDetector
from clipjax.runs.health.findings import Finding, View
from clipjax.runs.health.losses import nonfinite_loss, overfit, rising_loss
from clipjax.runs.norms import acted
from clipjax.runs.run import Floats
from clipjax.runs.suggest import PLAYBOOK
from clipjax.runs.words import at_steps, number, percent, several


def nonfinite_norm(view: View) -> Iterator[Finding]:
  norms, bad = view.norms, ~view.norms.finite
  count = int(bad.sum())
  # Steps between two rows are known from the counter alone.
  total = max(count, int(view.last(f"{view.name}/nonfinite_steps") or 0))
  if not total:
    return
  where = at_steps(norms.steps[bad]) if count else "at steps that were not recorded"
  layers = _first_layers(view)
  message = f"{total} of {view.steps_taken()} steps had a norm of inf or NaN, {where}{layers}."
  after = view.run.columns.get(f"{view.name}/norm_clipped", np.full(len(view.run), np.nan))
  harmless = norms.rejected | np.isfinite(after[np.searchsorted(view.run.steps, norms.steps)])
  if count == total and harmless[bad].all():
    yield Finding(
      "WARN",
      "nonfinite-dropped",
      f'{message} skip_steps or on_nonfinite="zero" dropped them. Rule: none may occur.',
      "Look at the batches of these steps.",
    )
    return
  yield Finding(
    "FAIL",
    "nonfinite",
    f"{message} Rule: none may occur, as one such step that is applied makes every parameter NaN.",
    "Lower the learning rate, look at the batches of these steps, and protect the run with skip_steps or "
    'on_nonfinite="zero".' + ("" if layers else " clipjax.watch() first in the chain records which layer it was."),
  )


def _first_layers(view: View) -> str:
  """The layers that were not finite at the first such step, where that was recorded."""
  bad = view.norms.steps[~view.norms.finite]
  if view.name is None or not bad.size:
    return ""
  for quantity in ("nonfinite", "norm"):
    names, steps, values = view.blocks(view.name, quantity)
    rows = values[steps == bad[0]]
    if len(rows):
      layers = [
        name for name, x in zip(names, rows[0], strict=True) if np.isinf(x) or (quantity == "nonfinite" and x > 0)
      ]
      if layers:
        return f"; first in {'every leaf' if len(layers) == len(names) > 3 else several(layers, names)}"
  return ""


def _zero_gradient(view: View) -> Iterator[Finding]:
  if view.name is None:
    return
  names, _, values = view.blocks(view.name, "norm")
  finite = np.isfinite(values)
  rows = int(finite.any(1).sum())
  zero = [name for name, x, ok in zip(names, values.T, finite.T, strict=True) if ok.any() and not x[ok].any()]
  if not names:
    yield from _zero_norm(view)
  if not zero or rows < 2:  # The first gradient of a layer may be zero by its initialization.
    return
  yield Finding(
    "FAIL",
    "zero-gradient",
    f"{len(zero)} of {len(names)} layers had a gradient of exactly 0 at all {rows} steps at which it was recorded: "
    f"{several(zero, names)}. Rule: no layer may, as such a layer does not learn.",
    "Look whether the layer is used, behind stop_gradient, or behind units that are dead; a layer that is frozen on "
    "purpose belongs in optax.masked.",
  )


def _zero_norm(view: View) -> Iterator[Finding]:
  """Where nothing is known of the layers."""
  norms = view.norms.values[view.norms.finite]
  if norms.size < 2 or norms.any():
    return
  yield Finding(
    "FAIL",
    "zero-gradient",
    f"The norm of {view.name!r} was exactly 0 at all {norms.size} steps at which it was finite. Rule: it may not "
    "be, as such a model does not learn.",
    "Look whether the loss depends on the parameters: stop_gradient, a mask of zeros, units that are dead.",
  )


def _clipped_often(view: View) -> Iterator[Finding]:
  for name in [key.removesuffix("/clip_fraction") for key in view.run.columns if key.endswith("/clip_fraction")]:
    if not view.enough(view.steps_taken(name)):
      continue
    shares = _clip_shares(view, name)
    often = {label: share for label, share in shares.items() if share > view.limits.clip_fraction}
    if not often:
      continue
    limits = view.column(f"{name}/max_norm")
    moved = limits.size and limits.max() > 1.001 * limits.min()
    which = "" if "" in often else f" in {several(list(often), list(shares))}"
    yield Finding(
      "WARN",
      "clipped-often",
      f"{name!r} clipped {percent(max(often.values()))} of the steps{which}. Rule: at most "
      f"{percent(view.limits.clip_fraction)}. {PLAYBOOK} calls more than half of the updates clipped "
      '"extremely aggressive": it acts like a lower learning rate.',
      "Lower the learning rate, or raise max_norm: clipjax.runs.suggest_max_norm says how far. Fine where you "
      "train SGD at "
      "a high rate on purpose and max_norm sets the length of its steps."
      + (" The threshold moved: AutoClip's default clips nine steps in ten by design." if moved else ""),
    )


def _clip_shares(view: View, name: str) -> dict[str, float]:
  """The share of steps that a clip acted in: by the name "" for a global clip, else by leaf or group."""
  labels, _, scales = view.blocks(name, "scale")
  if not labels:
    share = view.last(f"{name}/clip_fraction")
    return {} if share is None else {"": share}
  known = np.isfinite(scales)
  return {
    label: float(np.mean(scale[ok] < 1))
    for label, scale, ok in zip(labels, scales.T, known.T, strict=True)
    if view.enough(int(ok.sum()))
  }


def spikes(view: View) -> Iterator[Finding]:
  finite = view.norms.finite
  steps, values = view.norms.steps[finite], view.norms.values[finite]
  sigma, window = view.limits.spike_sigma, view.limits.spike_window
  bounds = SpikeDetector(sigma, window).feed(values)
  spike = values > bounds
  if not spike.any():
    return
  free = spike & ~(acted(view.run, view.name, view.norms) | view.norms.rejected)[finite]
  shown = free if free.any() else spike
  largest = int(np.argmax(np.where(shown, values, -1)))
  count = int(shown.sum())
  message = (
    f"{count} of {values.size} norms {'was a spike' if count == 1 else 'were spikes'} that "
    f"{'nothing caught' if free.any() else 'the clip or skip_steps caught'}, {at_steps(steps[shown])}, the largest "
    f"{number(values[largest])} against a limit of {number(bounds[largest])}. Rule: {sigma:g} standard deviations "
    f"above the mean of the {window} norms before, as in OLMo-core's skip-step (github.com/allenai/OLMo-core)."
  )
  if not free.any():
    yield Finding("INFO", "spikes-caught", message, "Look at the batches of these steps if they come back.")
    return
  yield Finding(
    "WARN",
    "spikes",
    message,
    "Clip just above the typical norm (clipjax.runs.suggest_max_norm), or reject such steps: skip_steps with "
    f"rules.rolling_sigma({sigma:g}, window={window}). Look at the batches of these steps.",
  )
  yield from _clip_too_high(view, values[free])


def _clip_too_high(view: View, spikes: Floats) -> Iterator[Finding]:
  """Of a clip that never acted, though there were these spikes."""
  limits = view.column(f"{view.name}/max_norm")
  if not limits.size or view.last(f"{view.name}/clip_fraction"):
    return
  typical = float(np.median(view.norms.values[view.norms.finite]))
  yield Finding(
    "WARN",
    "clip-too-high",
    f"{view.name!r} never clipped while {spikes.size} {'spike' if spikes.size == 1 else 'spikes'} up to "
    f"{number(float(spikes.max()))} passed: max_norm was {number(float(limits.min()))}. Rule: a threshold just above "
    f"the typical norm, here {number(typical)}; {PLAYBOOK}.",
    "Lower max_norm to what clipjax.runs.suggest_max_norm gives.",
  )


def _rising_norm(view: View) -> Iterator[Finding]:
  typical = view.norms.typical
  if not view.enough(typical.size, parts=4):
    return
  _, _, third, last = (float(np.median(part)) for part in np.array_split(typical, 4))
  if last <= view.limits.rise * third:
    return
  growth = f"{number(last / third)} times" if third > 0 else "from 0"
  yield Finding(
    "WARN",
    "rising-norm",
    f"The norm rose {growth} late in the run: median {number(third)} in the third quarter of the steps, "
    f"{number(last)} in the last. Rule: at most {view.limits.rise:g} times, a limit of clipjax; in OLMo-0424 a "
    "norm that slowly grew came with more and more spikes (OLMo 2, arXiv 2501.00656, section 3).",
    "Look at the loss and at the layer that grows; lower the learning rate, or decay it.",
  )


def _update_ratio(view: View) -> Iterator[Finding]:
  low, high = view.limits.ratio_low, view.limits.ratio_high
  rule = (
    f"Rule: {low:g} to {high:g}; CS231n (cs231n.github.io/neural-networks-3/#ratio) asks for around 1e-3 in every "
    "set of parameters."
  )
  for key in [key for key in view.run.columns if re.fullmatch(r"update[^/]*/ratio", key)]:
    ratios = view.column(key)
    ratios = ratios[ratios > 0]  # 0 where parameters were not given, or nothing was updated.
    if not view.enough(ratios.size):
      continue
    middle = float(np.median(ratios))
    if low <= middle <= high:
      yield from _layer_ratios(view, key, rule)
      continue
    yield Finding(
      "WARN",
      "update-ratio",
      f"The median of {key!r}, norm of the update over norm of the parameters, is {number(middle)}. {rule}",
      "Lower the learning rate." if middle > high else "Raise the learning rate, or max_norm where the clip acts.",
    )


def _layer_ratios(view: View, key: str, rule: str) -> Iterator[Finding]:
  """Of layers that are outside where the update as a whole is not."""
  low, high = view.limits.ratio_low, view.limits.ratio_high
  names, steps, values = view.blocks(key.removesuffix("/ratio"), "ratio")
  medians = _medians(names, values[steps >= view.norms.begin])
  outside = {name: x for name, x in medians.items() if not low <= x <= high}
  if not outside:
    return
  worst = max(outside, key=lambda name: abs(np.log10(outside[name]) + 3))
  yield Finding(
    "INFO",
    "update-ratio-by-layer",
    f"{len(outside)} of {len(medians)} layers have a median {key!r} outside, the farthest {worst!r} with "
    f"{number(outside[worst])}. {rule}",
    "Ratios of parameters that begin at 0, as biases do, are large at first; for others look at the learning rate of "
    "the layer.",
  )


def _layer_spread(view: View) -> Iterator[Finding]:
  if view.name is None:
    return
  names, steps, values = view.blocks(view.name, "norm")
  medians = _medians(names, values[steps >= view.norms.begin])
  if len(medians) < 2:
    return
  low, high = min(medians, key=lambda name: medians[name]), max(medians, key=lambda name: medians[name])
  spread = float(np.float64(medians[high]) / medians[low])
  if not spread > view.limits.spread:
    return
  yield Finding(
    "WARN",
    "layer-spread",
    f"The median norms of the layers are {number(spread)} times apart: {number(medians[low])} in {low!r}, "
    f"{number(medians[high])} in {high!r}. Rule: at most {view.limits.spread:g} times, a limit of clipjax; gradients "
    "that vanish or explode with depth look like this (Pascanu et al. 2013, arXiv 1211.5063).",
    "If it follows the depth: normalization, residual connections, another initialization. A single layer that is 0 up "
    "to rounding, such as a bias before a normalization, is harmless.",
  )


def _skipped(view: View) -> Iterator[Finding]:
  share = view.last("skip/fraction")
  if share is None:
    return
  many = view.enough(view.steps_taken("skip")) and share > view.limits.skip_fraction
  yield Finding(
    "WARN" if many else "INFO",
    "skipped",
    f"skip_steps rejected {percent(share)} of {view.steps_taken('skip')} steps. Rule: at most "
    f"{percent(view.limits.skip_fraction)}, a limit of clipjax.",
    "Look at the batches of rejected steps; raise the sigma of the rule if they are ordinary ones." if many else "",
  )


def _zeros(view: View) -> Iterator[Finding]:
  shares = view.column(f"{view.name}/zero_fraction")
  if not view.enough(shares.size) or np.median(shares) <= view.limits.zero_fraction:
    return
  yield Finding(
    "WARN",
    "zeros",
    f"{percent(float(np.median(shares)))} of the entries of the gradient are exactly 0 (median). Rule: at most "
    f"{percent(view.limits.zero_fraction)}, a limit of clipjax; units that are dead have no gradient "
    "(cs231n.github.io/neural-networks-1, ReLU).",
    "Large embeddings are like this by design: raise HealthLimits.zero_fraction. Else lower the learning rate, and try "
    "an activation without a flat side.",
  )


def _medians(names: tuple[str, ...], values: Floats) -> dict[str, float]:
  """The median of each column of positive numbers, by name; columns without any are left out."""
  kept = [(name, x[(x > 0) & np.isfinite(x)]) for name, x in zip(names, values.T, strict=True)]
  return {name: float(np.median(x)) for name, x in kept if x.size}


CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
  nonfinite_norm,
  nonfinite_loss,
  _zero_gradient,
  _clipped_often,
  spikes,
  _rising_norm,
  rising_loss,
  overfit,
  _update_ratio,
  _layer_spread,
  _zeros,
  _skipped,
)
