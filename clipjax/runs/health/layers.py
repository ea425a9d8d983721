"""Layers that do not learn, or whose norms are far apart."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax.quantities import NORM, ZERO_FRACTION
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.kinds import Floats
from clipjax.runs.sources import CS231N_RELU, PASCANU
from clipjax.runs.words import number, percent, several

_ROWS, _SHARE = 3, 0.1  # Rows, and part of the run, in which a leaf that had a gradient has none, at least.
_LONGER = 2  # Times the longest part before in which it had none.
_ROUNDING = 1e-6  # Of the largest norm: below, a leaf that stands alone may be rounding alone.
_GAP = 1e3  # How far it stands from the next.


def zero_gradient(view: View) -> Iterator[Finding]:
  """FAIL for layers whose gradient is 0 throughout, or from some step on."""
  if view.name is None:
    return
  names, steps, values = view.blocks(view.name, NORM)
  if not names:
    yield from _zero_norm(view)
  finite = np.isfinite(values)
  rows = int(finite.any(1).sum())
  zero = tuple(n for n, x, ok in zip(names, values.T, finite.T, strict=True) if ok.any() and not x[ok].any())
  advice = "Look whether the layer is used, behind stop_gradient, or behind units that are dead; a layer that is "
  advice += "frozen on purpose belongs in optax.masked."
  rule = "no layer may, as such a layer does not learn"
  if zero and rows >= 2:  # The first gradient of a layer may be zero by its initialization.
    message = f"{len(zero)} of {len(names)} layers{view.of} had a gradient of exactly 0 at all {rows} steps at which "
    message += f"it was recorded: {several(zero, names)}."
    yield Finding("FAIL", "zero-gradient", message, advice, rule, leaves=zero)
  died = {n: row for n, x in zip(names, values.T, strict=True) if (row := _died(view, steps.tolist(), x)) is not None}
  if not died:
    return
  first = min(died.values())
  yield _death(f"The gradient of {several(tuple(died), names)}{view.of}", first, rule, tuple(died))


def _death(what: str, step: int, rule: str, leaves: tuple[str, ...]) -> Finding:
  message = f"{what} has been exactly 0 since step {step}."
  advice = f"Look at what happened at step {step}: units that died, a switch that cut "
  advice += "the layer off." if leaves else "the loss off."
  return Finding("FAIL", "zero-gradient", message, advice, rule, steps=(step,), leaves=leaves)


def _died(view: View, steps: list[int], norms: Floats) -> int | None:
  """The step since which a leaf that had a gradient has had none; None where that is a short part of the run.

  And where it had none for as long before, as an expert that is rarely used: twice that is longer.
  """
  known = np.flatnonzero(np.isfinite(norms))
  alive = np.flatnonzero(norms[known] > 0)
  if not alive.size or known.size - alive[-1] - 1 < _ROWS:
    return None
  if known.size - alive[-1] - 1 <= _LONGER * (np.diff(alive, prepend=alive[0]).max() - 1):
    return None
  first, last = steps[known[alive[-1] + 1]], int(view.run.steps[-1])
  is_short = last - first < _SHARE * (last - view.extent.first_step)
  return None if is_short or view.is_solved(first) else first


def _zero_norm(view: View) -> Iterator[Finding]:
  """Where nothing is known of the layers."""
  norms = view.norms.values[view.norms.finite]
  if norms.any() and (step := _died(view, view.norms.steps.tolist(), view.norms.values)) is not None:
    yield _death(f"The norm of {view.name!r}", step, "it may not be, as such a model does not learn", ())
  if norms.size < 2 or norms.any():
    return
  message = f"The norm of {view.name!r} was exactly 0 at all {norms.size} steps at which it was finite."
  advice = "Look whether the loss depends on the parameters: stop_gradient, a mask of zeros, units that are dead."
  yield Finding("FAIL", "zero-gradient", message, advice, "it may not be, as such a model does not learn")


class _Module(NamedTuple):
  """The leaves of one place in the model: the largest median of their norms, and the name of that leaf."""

  norm: float
  leaf: str


def layer_spread(view: View) -> Iterator[Finding]:
  """WARN for layers whose median norms are far apart.

  Of the leaves of one layer the largest counts: the bias of a key, or one before a normalization, has a gradient of
  rounding alone beside weights that learn.
  """
  if view.name is None:
    return
  names, steps, values = view.blocks(view.name, NORM)
  modules = _without_rounding(_modules(medians_of(names, values[steps >= view.norms.begin])))
  if len(modules) < 2:
    return
  low, high = min(modules), max(modules)
  spread = float(np.float64(high.norm) / low.norm)
  if not spread > view.limits.spread:
    return
  message = f"The median norms of the layers{view.of} are {number(spread)} times apart: {number(low.norm)} in "
  message += f"{low.leaf!r}, {number(high.norm)} in {high.leaf!r}."
  rule = f"at most {view.limits.spread:g} times, a limit of clipjax; gradients that vanish or explode with depth look "
  rule += "like this"
  advice = "If it follows the depth: normalization, residual connections, another initialization."
  yield Finding("WARN", "layer-spread", message, advice, rule, str(PASCANU), leaves=(low.leaf, high.leaf))


def _modules(medians: dict[str, float]) -> list[_Module]:
  """The places in the model, by the path above each leaf; of stacked layers, each by itself."""
  out: dict[str, _Module] = {}
  for leaf, norm in medians.items():
    path, _, last = leaf.rpartition("/")
    layer = last[last.rindex("[") :] if last.endswith("]") and "[" in last else ""
    place = f"{path}{layer}" if path or layer else leaf
    out[place] = max(out.get(place, _Module(0.0, leaf)), _Module(norm, leaf))
  return list(out.values())


def _without_rounding(modules: list[_Module]) -> list[_Module]:
  """Leaves out what is 0 up to rounding: tiny, and far from all others. A gradient that vanishes has neighbours."""
  ordered = sorted(modules)
  while (
    len(ordered) > 2 and ordered[0].norm < _ROUNDING * ordered[-1].norm and ordered[0].norm * _GAP < ordered[1].norm
  ):
    ordered = ordered[1:]
  return ordered


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
