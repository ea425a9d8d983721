"""Norms far above those before them, and a threshold that lets them pass."""

from collections.abc import Iterator

import numpy as np

from clipjax.quantities import CLIP_FRACTION, MAX_NORM
from clipjax.runs.health.detectors import SpikeDetector
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import grown
from clipjax.runs.health.view import View
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import acted
from clipjax.runs.sources import OLMO_CORE, PLAYBOOK
from clipjax.runs.words import number


def spikes(view: View) -> Iterator[Finding]:
  """WARN for spikes that nothing caught, INFO where the clip or `skip_steps` caught each."""
  finite = view.norms.finite
  steps, values = view.norms.steps[finite], view.norms.values[finite]
  detector = view.spike_detector or SpikeDetector(view.limits.spike_sigma, view.limits.spike_window)
  bounds = detector.feed(values)
  spike = values > bounds
  if not spike.any():
    return
  free = spike & ~(acted(view.run, view.name, view.norms) | view.norms.rejected)[finite]
  shown = free if free.any() else spike
  fate = "nothing caught" if free.any() else "the clip or skip_steps caught"
  message, leaves = _words(view, steps, values, bounds, shown, fate)
  sigma, window = view.limits.spike_sigma, view.limits.spike_window
  rule = f"at most {sigma:g} standard deviations above the mean of the {window} norms before"
  at = tuple(steps[shown].tolist())
  if not free.any():
    advice = "Look at the batches of these steps if they come back."
    yield Finding("INFO", "spikes-caught", message, advice, rule, str(OLMO_CORE), at, leaves)
    return
  advice = "Clip just above the typical norm (clipjax.runs.suggest_max_norm), or reject such steps: skip_steps with "
  advice += f"rules.rolling_sigma({sigma:g}, window={window}). Look at the batches of these steps."
  yield Finding("WARN", "spikes", message, advice, rule, str(OLMO_CORE), at, leaves)
  yield from _clip_too_high(view, steps[free], values[free])


def _words(
  view: View, steps: Ints, values: Floats, bounds: Floats, shown: Bools, fate: str
) -> tuple[str, tuple[str, ...]]:
  """What is said of the spikes, and the leaf that grew most at each, as far as leaves were recorded there."""
  count, largest = int(shown.sum()), int(np.argmax(np.where(shown, values, -1)))
  message = f"{count} of {values.size} norms {'was a spike' if count == 1 else 'were spikes'} that {fate}, "
  message += f"{view.at(steps[shown])}, the largest {number(values[largest])} against a limit of "
  message += number(bounds[largest])
  found = grown(view, steps[shown])
  if found:
    said = next((leaf for leaf in found if leaf.step == steps[largest]), found[0])
    message += f"; {said}"
  return f"{message}.", tuple(dict.fromkeys(leaf.leaf for leaf in found))


def _clip_too_high(view: View, steps: Ints, values: Floats) -> Iterator[Finding]:
  """Of a clip that never acted, though there were these spikes."""
  limits = view.number(MAX_NORM)
  if not limits.size or view.last(view.name, CLIP_FRACTION):
    return
  typical = float(np.median(view.norms.values[view.norms.finite]))
  message = f"{view.name!r} never clipped while {values.size} {'spike' if values.size == 1 else 'spikes'} up to "
  message += f"{number(float(values.max()))} passed: max_norm was {number(float(limits.min()))}."
  rule = f"a threshold just above the typical norm, here {number(typical)}"
  advice = "Lower max_norm to what clipjax.runs.suggest_max_norm gives."
  yield Finding("WARN", "clip-too-high", message, advice, rule, str(PLAYBOOK), tuple(steps.tolist()))
