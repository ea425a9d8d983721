"""Layers that do not learn or whose norms are far apart: `zero-gradient`, `layer-spread` and `zeros`.

They need norms by leaf or group. Without those, `zero-gradient` falls back to the norm of the whole gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax.metric_names import NORM, ZERO_FRACTION
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.kinds import Floats
from clipjax.runs.sources import CS231N_RELU, PASCANU
from clipjax.runs.words import number, percent, several

# A leaf has died if its gradient has been 0 for at least this many rows and this share of the run, and for more than
# twice its longest earlier pause.
_ROWS, _SHARE, _LONGER = 3, 0.1, 2
# A leaf is rounding noise if its norm is below this part of the largest and this factor below the next larger one.
_ROUNDING, _GAP = 1e-6, 1e3
_NO_GRADIENT = "not allowed: such a model does not learn"


def zero_gradient(view: View) -> Iterator[Finding]:
  """FAIL for layers whose gradient is 0 throughout or from some step on."""
  if view.name is None:
    return
  names, steps, values = view.blocks(view.name, NORM)
  if not names:
    yield from _zero_norm(view)
  # Layers that never had a gradient.
  finite = np.isfinite(values)
  rows = int(finite.any(1).sum())
  zero = tuple(n for n, x, ok in zip(names, values.T, finite.T, strict=True) if ok.any() and not x[ok].any())
  advice = "Check whether the layer is used, or sits behind stop_gradient or dead units. Wrap a layer that you froze "
  advice += "on purpose in optax.masked."
  rule = "none allowed: such a layer does not learn"
  if zero and rows >= 2:  # Initialization may make the first gradient of a layer zero.
    message = f"{len(zero)} of {len(names)} layers{view.of} had a gradient of exactly 0 at all {rows} recorded steps: "
    message += f"{several(zero, names)}."
    yield Finding("FAIL", "zero-gradient", message, advice, rule, leaves=zero)
  # Layers that had one and lost it.
  died = {n: row for n, x in zip(names, values.T, strict=True) if (row := _died(view, steps.tolist(), x)) is not None}
  if not died:
    return
  first = min(died.values())
  yield _death(f"The gradient of {several(tuple(died), names)}{view.of}", first, rule, tuple(died))


def _death(what: str, step: int, rule: str, leaves: tuple[str, ...]) -> Finding:
  message = f"{what} has been exactly 0 since step {step}."
  advice = f"Check what happened at step {step}, such as dead units or a switch that cut off "
  advice += "the layer." if leaves else "the loss."
  return Finding("FAIL", "zero-gradient", message, advice, rule, steps=(step,), leaves=leaves)


def _died(view: View, steps: list[int], norms: Floats) -> int | None:
  """The step since which a leaf has had no gradient; None if that part of the run is short.

  Also None unless the pause is more than twice the longest earlier one: a rarely used expert has not died.
  """
  # The pause at the end, in recorded rows, and the longest one before it.
  known = np.flatnonzero(np.isfinite(norms))
  alive = np.flatnonzero(norms[known] > 0)
  if not alive.size or known.size - alive[-1] - 1 < _ROWS:
    return None
  if known.size - alive[-1] - 1 <= _LONGER * (np.diff(alive, prepend=alive[0]).max() - 1):
    return None
  # The same pause in steps. A loss of exactly 0 needs no gradient.
  first, last = steps[known[alive[-1] + 1]], int(view.run.steps[-1])
  is_short = last - first < _SHARE * (last - view.extent.first_step)
  return None if is_short or view.is_solved(first) else first


def _zero_norm(view: View) -> Iterator[Finding]:
  """The same for the norm of the whole gradient, if norms by layer are missing."""
  norms = view.norms.values[view.norms.finite]
  if norms.any() and (step := _died(view, view.norms.steps.tolist(), view.norms.values)) is not None:
    yield _death(f"The norm of {view.name!r}", step, _NO_GRADIENT, ())
  if norms.size < 2 or norms.any():
    return
  message = f"The norm of {view.name!r} was exactly 0 at all {norms.size} steps with a finite norm."
  advice = "Check that the loss depends on the parameters: look for stop_gradient, a mask of zeros or dead units."
  yield Finding("FAIL", "zero-gradient", message, advice, _NO_GRADIENT)


class _Module(NamedTuple):
  """The leaves at one place in the model: the largest of their median norms, and the leaf that has it."""

  norm: float
  leaf: str


def layer_spread(view: View) -> Iterator[Finding]:
  """WARN for layers whose median norms are far apart.

  A layer counts with its largest leaf: the gradient of a key's bias, or of a bias before a normalization, is only
  rounding noise beside weights that learn.
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
  message = f"The median layer norms{view.of} differ by a factor of {number(spread)}: {number(low.norm)} in "
  message += f"{low.leaf!r}, {number(high.norm)} in {high.leaf!r}."
  rule = f"at most a factor of {view.limits.spread:g}, a clipjax limit; gradients that vanish or explode with depth "
  rule += "look like this"
  advice = "If the norms follow the depth, try normalization, residual connections or another initialization."
  yield Finding("WARN", "layer-spread", message, advice, rule, str(PASCANU), leaves=(low.leaf, high.leaf))


def _modules(medians: dict[str, float]) -> list[_Module]:
  """The places in the model, by the path above each leaf; each stacked layer is a place of its own."""
  out: dict[str, _Module] = {}
  for leaf, norm in medians.items():
    path, _, last = leaf.rpartition("/")
    layer = last[last.rindex("[") :] if last.endswith("]") and "[" in last else ""
    place = f"{path}{layer}" if path or layer else leaf
    out[place] = max(out.get(place, _Module(0.0, leaf)), _Module(norm, leaf))
  return list(out.values())


def _without_rounding(modules: list[_Module]) -> list[_Module]:
  """Drops places that are 0 up to rounding: tiny and far from all others, unlike gradients that vanish with depth."""
  ordered = sorted(modules)
  while (
    len(ordered) > 2 and ordered[0].norm < _ROUNDING * ordered[-1].norm and ordered[0].norm * _GAP < ordered[1].norm
  ):
    ordered = ordered[1:]
  return ordered


def zeros(view: View) -> Iterator[Finding]:
  """WARN if most entries of the gradient are exactly 0."""
  shares = view.number(ZERO_FRACTION)
  if not view.enough(shares.size) or np.median(shares) <= view.limits.zero_fraction:
    return
  message = f"{percent(float(np.median(shares)))} of the gradient entries are exactly 0 (median)."
  rule = f"at most {percent(view.limits.zero_fraction)}, a clipjax limit; dead units have no gradient"
  advice = "Large embeddings do this by design: raise HealthLimits.zero_fraction. Otherwise lower the learning rate, "
  advice += "and try an activation without a flat side."
  yield Finding("WARN", "zeros", message, advice, rule, str(CS231N_RELU))
