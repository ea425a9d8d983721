"""Layers that do not learn, or whose norms are far apart."""

from collections.abc import Iterator

import numpy as np

from clipjax.quantities import NORM, ZERO_FRACTION
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.sources import CS231N_RELU, PASCANU
from clipjax.runs.words import number, percent, several


def zero_gradient(view: View) -> Iterator[Finding]:
  """FAIL for layers whose gradient is 0 throughout."""
  if view.name is None:
    return
  names, _, values = view.blocks(view.name, NORM)
  if not names:
    yield from _zero_norm(view)
  finite = np.isfinite(values)
  rows = int(finite.any(1).sum())
  zero = tuple(n for n, x, ok in zip(names, values.T, finite.T, strict=True) if ok.any() and not x[ok].any())
  if not zero or rows < 2:  # The first gradient of a layer may be zero by its initialization.
    return
  message = f"{len(zero)} of {len(names)} layers had a gradient of exactly 0 at all {rows} steps at which it was "
  message += f"recorded: {several(zero, names)}."
  advice = "Look whether the layer is used, behind stop_gradient, or behind units that are dead; a layer that is "
  advice += "frozen on purpose belongs in optax.masked."
  yield Finding("FAIL", "zero-gradient", message, advice, "no layer may, as such a layer does not learn", leaves=zero)


def _zero_norm(view: View) -> Iterator[Finding]:
  """Where nothing is known of the layers."""
  norms = view.norms.values[view.norms.finite]
  if norms.size < 2 or norms.any():
    return
  message = f"The norm of {view.name!r} was exactly 0 at all {norms.size} steps at which it was finite."
  advice = "Look whether the loss depends on the parameters: stop_gradient, a mask of zeros, units that are dead."
  yield Finding("FAIL", "zero-gradient", message, advice, "it may not be, as such a model does not learn")


def layer_spread(view: View) -> Iterator[Finding]:
  """WARN for layers whose median norms are far apart."""
  if view.name is None:
    return
  names, steps, values = view.blocks(view.name, NORM)
  medians = medians_of(names, values[steps >= view.norms.begin])
  if len(medians) < 2:
    return
  low, high = min(medians, key=lambda name: medians[name]), max(medians, key=lambda name: medians[name])
  spread = float(np.float64(medians[high]) / medians[low])
  if not spread > view.limits.spread:
    return
  message = f"The median norms of the layers are {number(spread)} times apart: {number(medians[low])} in {low!r}, "
  message += f"{number(medians[high])} in {high!r}."
  rule = f"at most {view.limits.spread:g} times, a limit of clipjax; gradients that vanish or explode with depth look "
  rule += "like this"
  advice = "If it follows the depth: normalization, residual connections, another initialization. A single layer that "
  advice += "is 0 up to rounding, such as a bias before a normalization, is harmless."
  yield Finding("WARN", "layer-spread", message, advice, rule, str(PASCANU), leaves=(low, high))


def zeros(view: View) -> Iterator[Finding]:
  """WARN where most entries of the gradient are exactly 0."""
  shares = view.number(ZERO_FRACTION)
  if not view.enough(shares.size) or np.median(shares) <= view.limits.zero_fraction:
    return
  message = f"{percent(float(np.median(shares)))} of the entries of the gradient are exactly 0 (median)."
  rule = f"at most {percent(view.limits.zero_fraction)}, a limit of clipjax; units that are dead have no gradient"
  advice = "Large embeddings are like this by design: raise HealthLimits.zero_fraction. Else lower the learning rate, "
  advice += "and try an activation without a flat side."
  yield Finding("WARN", "zeros", message, advice, rule, str(CS231N_RELU))
