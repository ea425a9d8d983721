"""The run on one step axis: losses, learning rates, norms, updates and layers, with events and findings marked on all.

Each panel is a title, a height and a function that draws on given axes. Marks are drawn behind the curves; their
numbers and names are in a lane above the first panel.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clipjax.metric_names import NORM
from clipjax.runs.kinds import Bools, Floats
from clipjax.runs.report import heatmap
from clipjax.runs.report.axes import (
  BLUE,
  COLOURS,
  DASHES,
  GREEN,
  GREY,
  ORANGE,
  PURPLE,
  VERMILION,
  WIDE,
  bins_of,
  edge_marks,
  heading,
  ink,
  is_wide,
  label_of,
  line,
  log_axis,
  plain_axis,
  positive,
  rings,
  step_axis,
  tidy,
)
from clipjax.runs.report.grid import Steps
from clipjax.runs.report.marks import Kind, Mark
from clipjax.runs.report.series import Curve, NormSeries, Vectors, short, thin
from clipjax.runs.schema import GRAD, key_of
from clipjax.runs.words import number

_LOG_FROM = 100.0  # A loss has a log axis if its largest value is this many times its smallest.
_KINDS: tuple[Kind, ...] = ("finding", "reached", "caught")  # Labels get room in this order.
_NAMES = {"reached": "reached the parameters", "caught": "caught", "finding": "finding of the verdict"}
_LANES = 3  # Lines of labels, at most.
_LANE = 0.17  # Height of a line of labels in inches.


class Panel(NamedTuple):
  """A part of the timeline; `draw` takes the axes, the step axis and the width."""

  title: str
  height: float
  draw: Callable[[Axes, Steps, float], None]


class Timeline(NamedTuple):
  """What the timeline draws.

  Attributes:
    losses: training and validation losses.
    rates: learning rates.
    scales: loss scales.
    norms: norms of the judged states.
    updates: norms of the updates; if unknown, their ratios to the parameters.
    band: the usual range of the ratio; None if `updates` are norms.
    layers: norms by layer, each with its key.
    alone: for each of `layers`, which rows stand only for their own step.
    jumps: for each of `layers`, the steps and layers that events name.
    marks: marks of events and findings.
  """

  losses: tuple[Curve, ...]
  rates: tuple[Curve, ...]
  scales: tuple[Curve, ...]
  norms: tuple[NormSeries, ...]
  updates: tuple[Curve, ...]
  band: tuple[float, float] | None
  layers: tuple[tuple[str, Vectors], ...]
  alone: tuple[Bools, ...]
  jumps: tuple[tuple[tuple[int, int], ...], ...]
  marks: tuple[Mark, ...]


def panels(found: Timeline, width: float) -> list[Panel]:
  """One panel for each kind of series that was recorded, in page order."""
  out = []
  if found.losses:
    out.append(Panel("Loss", 1.7, partial(draw_losses, found.losses)))
  if found.rates:
    out.append(Panel("Learning rate", 0.8, partial(_draw_rates, found.rates)))
  if found.scales:
    out.append(Panel("Loss scale", 0.8, partial(_draw_positive, found.scales, None)))
  out += [Panel(_title("Gradient norm", series.key), 1.9, partial(draw_norms, series)) for series in found.norms]
  if found.updates:
    title = "Norm of the update" if found.band is None else "Update over parameters"
    out.append(Panel(title, 1.2, partial(_draw_positive, found.updates, found.band)))
  for (key, layers), alone, jumps in zip(found.layers, found.alone, found.jumps, strict=True):
    draw = partial(_draw_layers, layers, alone, jumps)
    out.append(Panel(_title("Layers", key), heatmap.height_of(layers, width) + 0.55, draw))
  return out


def _title(what: str, key: str) -> str:
  """What a panel shows, and the key of its state unless that is "grad"."""
  return what if key == key_of(GRAD, NORM) else f"{what}, {short(key, 30)}"


def timeline(found: Timeline, axis: Steps, width: float = WIDE) -> Figure:
  """The whole figure over the steps of `axis`."""
  return on_one_axis(panels(found, width), found.marks, axis, width)


def on_one_axis(parts: Sequence[Panel], marks: Sequence[Mark], axis: Steps, width: float) -> Figure:
  """Stacks panels over the steps of `axis`, with the marks on all of them."""
  marks = [mark for mark in marks if mark.end >= axis.first and mark.start <= axis.last]
  # The lane of labels comes first, as its height depends on how many labels overlap.
  labels = _labels(marks, axis, width)
  tall = 1.0 if is_wide(width) else 1.15
  lanes = max((label.lane for label in labels), default=0) + 1
  heights = [0.05 + _LANE * lanes] * bool(marks) + [tall * part.height for part in parts]
  figure = Figure(figsize=(width, sum(heights) + 0.42 * len(heights) + 0.3), layout="constrained")
  ratios: dict[str, Any] = {"height_ratios": heights}
  rows = figure.subplots(len(heights), squeeze=False, sharex=True, gridspec_kw=ratios)[:, 0].tolist()
  if marks:
    _draw_lane(rows.pop(0), marks, labels, width)
  # Marks are drawn after the panel, which decides whether it is a map, but below its curves.
  for axes, panel in zip(rows, parts, strict=True):
    tidy(axes)
    panel.draw(axes, axis, width)
    _draw_marks(axes, marks, axis, width, is_map=bool(axes.images))
    step_axis(axes, width, axis.span)
    heading(axes, panel.title, width)
    axes.label_outer()
  for axes in rows[:-1]:
    axes.set_xlabel("")
  return figure


# Panels -------------------------------------------------------------------------------------------------------------


def draw_losses(curves: Sequence[Curve], axes: Axes, axis: Steps, width: float) -> None:
  """Losses, on a log axis if they are above 0 and span a factor of 100."""
  shown = _draw_curves(curves, axes, axis, width, always_named=len(curves) > 1)
  together = _together(shown)
  if not together.size or (together.min() > 0 and together.max() > _LOG_FROM * together.min()):
    log_axis(axes, together, most=5)
  else:
    plain_axis(axes, together)


def _draw_rates(curves: Sequence[Curve], axes: Axes, axis: Steps, width: float) -> None:
  """Learning rates on a linear axis from 0."""
  shown = _draw_curves(curves, axes, axis, width, always_named=len(curves) > 1)
  plain_axis(axes, _together(shown), is_from_zero=True)


def _draw_positive(
  curves: Sequence[Curve], band: tuple[float, float] | None, axes: Axes, axis: Steps, width: float
) -> None:
  """Values above 0 on a log axis, with the usual range if there is one."""
  if band is not None:
    low, high = max(band[0], 1e-306), min(band[1], 1e306)
    # A log axis cannot show 0 and inf.
    axes.axhspan(
      low, high, color=GREEN, alpha=0.13, linewidth=0, label=f"usual, {number(band[0])} to {number(band[1])}"
    )
  curves = [curve._replace(values=positive(curve.values)) for curve in curves]
  shown = _draw_curves(curves, axes, axis, width, always_named=True)
  log_axis(axes, _together(shown), most=5)


def _draw_curves(curves: Sequence[Curve], axes: Axes, axis: Steps, width: float, *, always_named: bool) -> list[Curve]:
  """Draws each curve in its own colour and dashes, with rings at its spikes; returns the parts that it drew."""
  bins, shown = bins_of(width), [curve.within(axis.span) for curve in curves]
  for i, curve in enumerate(shown):
    if not curve.steps.size and not curve.bad.size:
      continue
    style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
    if always_named:
      style["label"] = label_of(curve.key, 30 if is_wide(width) else 18)
    line(axes, curve.steps, curve.values, bins, **style)
    rings(axes, curve.steps, curve.values, curve.spikes, bins)
  for curve in shown:
    bad = np.ones(curve.bad.size, np.bool_)
    edge_marks(axes, curve.bad, bad, bins, 0.97, marker="x", color=VERMILION, label="nonfinite")
  return shown


def _together(curves: Sequence[Curve]) -> Floats:
  values: Floats = np.concatenate([curve.values for curve in curves])
  return values[np.isfinite(values)]


def draw_norms(series: NormSeries, axes: Axes, axis: Steps, width: float) -> None:
  """The norm and the threshold on a log axis; clipped, nonfinite, rejected and zero steps and spikes are marked."""
  series, bins = series.within(axis.span), bins_of(width)
  steps, norm = series.steps, series.norm
  # The norm as a line, and on it the clipped steps and the spikes.
  line(axes, steps, positive(norm), bins, color=BLUE, label="norm")
  at = np.flatnonzero(series.clipped & (norm > 0))
  at = at[thin(norm[at], bins // 2)]
  if at.size:
    size = 3.5 if at.size < 200 else 2
    axes.plot(steps[at], norm[at], color=ORANGE, label="clipped", linestyle="none", marker="v", markersize=size)
  rings(axes, steps, positive(norm), series.spikes, bins, label="spike")
  if steps.size and steps[0] < series.begin <= steps[-1]:
    axes.axvspan(float(steps[0]), float(series.begin), color=GREY, alpha=0.12, linewidth=0, label="warm-up")
  _draw_limit(axes, series, bins)
  log_axis(axes, np.concatenate([positive(norm), positive(series.limit)]))
  # Steps without a place on the log axis: nonfinite and rejected ones at the top, zeros at the bottom.
  edge_marks(axes, steps, series.nonfinite, bins, 0.97, marker="x", color=VERMILION, label="nonfinite")
  rejected = series.rejected & ~series.nonfinite
  edge_marks(axes, steps, rejected, bins, 0.93, marker="s", color=PURPLE, label="rejected")
  edge_marks(axes, steps, norm == 0, bins, 0.03, marker="o", color=GREY, label="norm 0")


def _draw_limit(axes: Axes, series: NormSeries, bins: int) -> None:
  limits, what = series.limit[np.isfinite(series.limit)], "smallest threshold" if series.by_block else "threshold"
  style: dict[str, Any] = {"color": ink(), "linestyle": DASHES[1], "linewidth": 1.5}
  # A constant threshold is a line across the panel with its value in the legend; a schedule or rule is a curve.
  if limits.size and limits.min() == limits.max() > 0:
    axes.axhline(limits[0], label=f"{what} {number(limits[0])}", **style)
  elif limits.size:
    kept = thin(series.limit, bins)
    axes.plot(series.steps[kept], positive(series.limit[kept]), label=what, **style)


def _draw_layers(
  found: Vectors, alone: Bools, jumps: Sequence[tuple[int, int]], axes: Axes, axis: Steps, width: float
) -> None:
  heatmap.draw_over_usual(axes, found, axis, width, alone, jumps)


# Marks --------------------------------------------------------------------------------------------------------------


def _colour(kind: Kind) -> Any:
  return {"reached": VERMILION, "caught": GREY, "finding": ink()}[kind]


def _draw_marks(axes: Axes, marks: Sequence[Mark], axis: Steps, width: float, *, is_map: bool) -> None:
  """A line at the start of each mark and a band to its end; above a map, which they would hide, a triangle."""
  across = axes.get_xaxis_transform()
  for kind in _KINDS:
    for is_named in (True, False):
      found = _drawn([mark for mark in marks if mark.kind == kind and bool(mark.label) == is_named], axis, width)
      if found and is_map:
        style: dict[str, Any] = {"linestyle": "none", "marker": "v", "markersize": 4, "clip_on": False}
        starts = [mark.start for mark in found]
        axes.plot(starts, np.ones(len(starts)), color=_colour(kind), transform=across, **style)
      elif found:
        _draw_lines(axes, found, axis, kind, 1.0 if is_named else 0.5)


def _draw_lines(axes: Axes, marks: Sequence[Mark], axis: Steps, kind: Kind, strength: float) -> None:
  style: dict[str, Any] = {"color": _colour(kind), "transform": axes.get_xaxis_transform()}
  bands = [(mark.start - axis.unit / 2, mark.end - mark.start + axis.unit) for mark in marks]
  axes.broken_barh(bands, (0, 1), alpha=0.16 * strength, linewidth=0, zorder=0.4, **style)
  dashes, wide = ((0, (5, 2)), 1.6) if kind == "finding" else ("-", 1.0)
  starts = [mark.start for mark in marks]
  axes.vlines(starts, 0, 1, linewidth=wide * strength, linestyle=dashes, alpha=0.8 * strength, zorder=0.5, **style)


def _drawn(marks: Sequence[Mark], axis: Steps, width: float) -> list[Mark]:
  """The marks that a reader can tell apart: at most one in each part of the axis."""
  starts = np.array([mark.start for mark in marks], np.int64)
  parts = (starts - axis.first) * bins_of(width) // (2 * max(axis.last - axis.first, 1))
  return [marks[i] for i in np.unique(parts, return_index=True)[1].tolist()]


class _Label(NamedTuple):
  """The label of a mark: its place and half its width, in steps, and its lane, 0 for the lowest."""

  mark: Mark
  place: float
  half: float
  lane: int


def _labels(marks: Sequence[Mark], axis: Steps, width: float) -> list[_Label]:
  """Places the labels for which there is room, findings first."""
  # The width of a character, in steps.
  size = mpl.rcParams["font.size"] * 0.65 / 72 / (width - 1.3) * max(axis.last - axis.first, 1)
  out: list[_Label] = []
  for mark in sorted((mark for mark in marks if mark.label), key=lambda mark: _KINDS.index(mark.kind)):
    half = (len(mark.label) + 1) * size / 2
    low, high = axis.first + half - size, axis.last - half + size
    place = min(max(mark.start, low), high) if low < high else (low + high) / 2
    # The lowest lane in which no label overlaps; without one, the mark stays unlabelled.
    near = {label.lane for label in out if abs(label.place - place) < label.half + half}
    free = [lane for lane in range(_LANES) if lane not in near]
    if free:
      out.append(_Label(mark, place, half, free[0]))
  return out


def _draw_lane(axes: Axes, marks: Sequence[Mark], labels: Sequence[_Label], width: float) -> None:
  """Draws the labels of the marks above the panels."""
  axes.set_axis_off()
  axes.set_ylim(0, max((label.lane for label in labels), default=0) + 1)
  for label in labels:
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold", "fontsize": "medium"}
    axes.text(label.place, label.lane + 0.5, label.mark.label, color=_colour(label.mark.kind), **style)
  for kind in _KINDS:
    if any(mark.kind == kind for mark in marks):
      axes.plot([], [], color=_colour(kind), marker="|", markersize=9, linestyle="none", label=_NAMES[kind])
  heading(axes, "What happened", width)
