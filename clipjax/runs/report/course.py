"""The timeline of a run and its close-up: what they draw, and the same in words."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from clipjax.metric_names import NORM
from clipjax.runs.health.events import Event
from clipjax.runs.kinds import Ints
from clipjax.runs.report.grid import Steps, jumps, steps_of
from clipjax.runs.report.happened import how_far
from clipjax.runs.report.html import code, text
from clipjax.runs.report.marks import Mark, begins, focus, inside, marks_of, numbered
from clipjax.runs.report.series import Curve, NormSeries, Vectors, curves, medians, short, vectors
from clipjax.runs.report.shown import Missing, Section, Shown, distribution, section, share, span_words
from clipjax.runs.report.timeline import Timeline, timeline
from clipjax.runs.roles import Role, keys_with, main_loss, update_ratio, update_states
from clipjax.runs.run import Run
from clipjax.runs.schema import UPDATES, key_of
from clipjax.runs.words import in_stacks, number, several

_MOST_STATES = 3  # Panels of norms, and panels of layers.
_MOST_CURVES = 6  # Per panel.
_MOST_NAMED = 5


def timeline_of(shown: Shown) -> Timeline:
  """Collects what the timeline draws."""
  run, events = shown.run, list(numbered(shown.report.events).values())  # Only these get rings.
  # Norms of updates or, without a record of them, their ratios to the parameters.
  updates, is_norm = _updates(run, events)
  layers = []
  for series in shown.norms[:_MOST_STATES]:
    if (found := vectors(run, series.key)) is not None:
      layers.append((series.key, found))
  return Timeline(
    losses=curves(run, losses_drawn(run), events),
    rates=curves(run, keys_with(run.columns, Role.RATE)[:_MOST_CURVES], events),
    scales=curves(run, keys_with(run.columns, Role.SCALE)[:_MOST_CURVES], events),
    norms=shown.norms[:_MOST_STATES],
    updates=updates,
    band=None if is_norm else (shown.limits.ratio_low, shown.limits.ratio_high),
    layers=tuple(layers),
    alone=tuple(inside(shown.report.events, found.steps) for _, found in layers),
    jumps=tuple(tuple(jumps(found, events)) for _, found in layers),
    marks=tuple(marks_of(shown.report.events, shown.report.findings)),
  )


def losses_drawn(run: Run) -> list[str]:
  """The training loss, then the validation losses; all losses if it is unclear which one is trained."""
  losses, validated = keys_with(run.columns, Role.LOSS), keys_with(run.columns, Role.VALIDATION)
  main = main_loss(run.columns)
  return [*([main] if main is not None else losses), *validated][:_MOST_CURVES]


def _updates(run: Run, events: Sequence[Event]) -> tuple[tuple[Curve, ...], bool]:
  """`(curves, True)` with the norms of the updates, or `(curves, False)` with update ratios if there are no norms."""
  norms = curves(run, [key_of(name, NORM) for name in update_states(run)][:_MOST_CURVES], events)
  key = update_ratio(run)
  if norms or key is None or key not in run.columns:
    return norms, True
  return curves(run, [key], events), False


def course(shown: Shown) -> list[Section]:
  """The timeline, its close-up if the run is long, and what was not recorded."""
  if not len(shown.run):
    return [Missing("Timeline", f"call {code('recorder.push')} after each step.")]
  found, steps = timeline_of(shown), shown.run.steps
  out: list[Section] = []
  if found.losses or found.rates or found.scales or found.norms or found.updates:
    # One axis for all panels, on which simultaneous changes line up.
    axis = steps_of(steps)
    draw = partial(timeline, found, axis)
    out.append(section("Timeline", draw, _words(shown, found), _caption(shown, found)))
    span = focus(shown.report.events, shown.report.findings, steps)
    if span is not None:
      out.append(_close_up(shown, found, Steps(*span, axis.unit)))
  return out + _missing(shown, found)


def _close_up(shown: Shown, found: Timeline, axis: Steps) -> str:
  """The steps around the main finding or event, where a reader sees which series moved first."""
  marks = [mark for mark in found.marks if mark.label and mark.end >= axis.first and mark.start <= axis.last]
  named = ", ".join(dict.fromkeys(mark.label for mark in marks))
  around = f"around the mark{'s' if ', ' in named else ''}"
  alt = f"The same panels {around} {named}, steps {axis.first:,} to {axis.last:,}. {_events_words(shown)}"
  caption = f"Steps {axis.first:,} to {axis.last:,} of the timeline, {around} {text(named)}."
  return section("Close-up", partial(timeline, found, axis), alt, caption)


def _missing(shown: Shown, found: Timeline) -> list[Section]:
  out: list[Section] = []
  if not found.losses:
    example = code("recorder.push(step, opt_state, loss=loss, val_loss=val_loss)")
    out.append(Missing("Loss", f"pass the losses to push: {example}."))
  if not found.rates:
    example = code("recorder.push(step, opt_state, learning_rate=schedule(step))")
    out.append(Missing("Learning rate", f"pass it to push: {example}."))
  if not found.norms:
    clip = code("clipjax.clip_by_global_norm(max_norm)")
    remedy = f"chain {clip} or {code('clipjax.watch()')} before the optimizer and call {code('recorder.push')}."
    out.append(Missing("Gradient norm", remedy))
  elif not found.layers:
    watch = code("clipjax.watch()")
    out.append(Missing("Layers over time", f"chain {watch} before the clip to record the norm of every layer."))
  if not found.updates:
    watch = code(f'clipjax.watch(name="{UPDATES}")')
    out.append(Missing("Norm of the update", f"chain {watch} last, after the optimizer."))
  return out


# Words --------------------------------------------------------------------------------------------------------------


def _caption(shown: Shown, found: Timeline) -> str:
  """How to read the figure."""
  said = ["All panels share one step axis."]
  if found.marks:
    said.append(_mark_words(found.marks))
  if any(series.by_block for series in found.norms):
    said.append("Each leaf or group has its own threshold; the dashed line is the smallest.")
  if any((series.rejected & ~series.nonfinite).any() for series in found.norms):
    said.append(f"Squares are steps that {code('skip_steps')} rejected, at the norm that it saw.")
  if found.layers:
    said.append(
      "Layers: one row per layer, the first on top. The colour compares the norm with the layer's usual norm; faint "
      "cells are as usual. Layers are recorded at regular intervals, and at the steps of a finding (thin columns); "
      "empty cells were not recorded."
    )
  left = [series.key for series in shown.norms[_MOST_STATES:]]
  if left:
    said.append(f"Not drawn: {', '.join(map(code, left))}.")
  return " ".join(said)


def _mark_words(marks: tuple[Mark, ...]) -> str:
  said = []
  if any(mark.kind != "finding" for mark in marks):
    said.append("Numbers refer to the events below; rings mark their largest values.")
  if any(mark.kind == "finding" for mark in marks):
    said.append("Names are findings of the verdict, marked where they begin.")
  return " ".join(said)


def _words(shown: Shown, found: Timeline) -> str:
  """The alt text of the timeline, with its numbers."""
  said = [f"Timeline, {span_words(shown.run.steps)}.", _events_words(shown)]
  said += [f"{short(curve.key, 60)} {course_words(curve)}." for curve in (*found.losses, *found.rates, *found.scales)]
  said += [norm_words(series) for series in found.norms]
  said += [f"{curve.key}: {distribution(curve.values)}." for curve in found.updates]
  said += [_layer_words(key, layers) for key, layers in found.layers]
  return " ".join(filter(None, said))


def _events_words(shown: Shown) -> str:
  """The events, and the findings that begin at a step."""
  events = shown.report.events
  said = [
    f"{i} at step {event.start:,}, {event.moves[0].key} {how_far(event.moves[0])}" if event.moves else f"{i}"
    for i, event in numbered(events).items()
  ]
  said += [f"{finding.name} from step {finding.steps[0]:,}" for finding in begins(events, shown.report.findings)]
  return f"Marked: {'; '.join(said)}." if said else ""


def course_words(curve: Curve) -> str:
  """Start, end and minimum of a column, and how often it was nonfinite."""
  values, bad = curve.values, curve.bad
  said = f"from {number(values[0])} to {number(values[-1])}, lowest {number(values.min())}" if values.size else ""
  wrong = f"nonfinite at {bad.size:,} step{'s' if bad.size > 1 else ''}" if bad.size else ""
  return ", ".join(filter(None, (said, wrong)))


def norm_words(series: NormSeries) -> str:
  """The norm of a state in words, with the percentiles of the verdict."""
  after = f" after the warm-up, from step {series.begin:,}" if series.steps[0] < series.begin else ""
  said = [f"{series.key}{after}: {distribution(series.typical)}."]
  # The threshold: none, constant, or its range and its last value.
  limits = series.limit[np.isfinite(series.limit)]
  what = "Smallest threshold of any leaf or group" if series.by_block else "Threshold"
  if not limits.size:
    said.append("No threshold.")
  elif limits.min() == limits.max():
    said.append(f"{what} {number(float(limits[0]))}.")
  else:
    least, last, most = (number(float(x)) for x in (limits.min(), limits[-1], limits.max()))
    said.append(f"{what} between {least} and {most}, at last {last}.")
  said.append(f"{share(series.clipped)} steps clipped.")
  bad = series.steps[series.nonfinite]
  said.append(f"{share(series.nonfinite)} steps nonfinite{_first(bad)}.")
  if series.rejected.any():
    said.append(f"{share(series.rejected)} steps rejected by skip_steps.")
  return " ".join(said)


def _first(steps: Ints) -> str:
  return f", first at step {steps[0]:,}" if steps.size else ""


def _layer_words(key: str, found: Vectors) -> str:
  """How large the layers were, and which were nonfinite."""
  said = [f"{len(found.names):,} layers of {key} at {found.steps.size:,} recorded steps."]
  middle = medians(found.values)
  if np.isfinite(middle).any():
    low, high = int(np.nanargmin(middle)), int(np.nanargmax(middle))
    least, most = (f"{number(middle[i])} in {short(found.names[i], 60)}" for i in (low, high))
    said.append(f"Smallest median {least}, largest {most}.")
  bad = np.flatnonzero(np.isinf(found.values).any(axis=0))
  # Stacked layers are summarized by depth, others named one by one.
  if len(in_stacks(found.names)) < len(found.names):
    names = several([found.names[i] for i in bad], found.names)
  else:
    names = ", ".join(short(found.names[i], 60) for i in bad[:_MOST_NAMED])
  count = f"{bad.size:,} layer{'s were' if bad.size > 1 else ' was'} nonfinite at some step"
  said.append(f"{count}: {names}." if bad.size else "No layer was ever nonfinite.")
  return " ".join(said)
