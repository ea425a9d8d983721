"""The figures outside the timeline: each takes arrays, and returns a matplotlib `Figure` of `width` inches.

Lines are thinned by `series.thin`; percentiles and other numbers come from the caller, over all steps.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.report.axes import (
  BLUE,
  DASHES,
  GREEN,
  GREY,
  ORANGE,
  SKY,
  WIDE,
  bins_of,
  figure_of,
  ink,
  is_wide,
  line,
  log_axis,
  positive,
  span_of,
  step_axis,
  tick,
  tidy,
  with_legend,
)
from clipjax.runs.report.grid import steps_of
from clipjax.runs.report.series import Curve, NormSeries, Vectors
from clipjax.runs.report.timeline import draw_losses, draw_norms
from clipjax.runs.words import number

PERCENTILES = (50, 90, 99)


def norms(series: NormSeries, width: float = WIDE) -> Figure:
  """Only the norm against the step."""
  figure, axes = figure_of(width, 3.4)
  axis = steps_of(series.steps)
  draw_norms(series, axes, axis, width)
  step_axis(axes, width, axis.span)
  axes.set_ylabel(series.key.replace("$", r"\$"))
  return with_legend(figure, axes, width)


def losses(curves: Sequence[Curve], width: float = WIDE) -> Figure:
  """The losses that the timeline leaves out."""
  figure, axes = figure_of(width, 3.2)
  axis = steps_of(np.unique(np.concatenate([np.append(curve.steps, curve.bad) for curve in curves])))
  draw_losses(curves, axes, axis, width)
  step_axis(axes, width, axis.span)
  return with_legend(figure, axes, width)


def histogram(norm: Floats, percentiles: Sequence[float], width: float = WIDE) -> Figure:
  """Histogram of the finite, positive norms over log10, with a line at each of `PERCENTILES`."""
  figure, axes = figure_of(width, 2.8)
  log = np.log10(positive(norm)[norm > 0])
  edges = np.histogram_bin_edges(log, 40)
  axes.stairs(np.histogram(log, edges)[0], 10**edges, fill=True, color=SKY)
  log_axis(axes, 10**edges, "x", 7 if is_wide(width) else 4)
  for p, value, dash in zip(PERCENTILES, percentiles, DASHES, strict=True):
    if value > 0:
      axes.axvline(value, color=ink(), linestyle=dash, linewidth=1.5, label=f"p{p} {number(value)}")
  axes.set_xlabel("norm before the clip")
  axes.set_ylabel("steps")
  axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
  return with_legend(figure, axes, width)


def band_words(band: tuple[float, float]) -> str:
  """The usual range of the ratio, for the figure and its words."""
  return f"{tick(band[0])} to {tick(band[1])}"


def ratios(total: tuple[Ints, Floats], found: Vectors | None, band: tuple[float, float], width: float = WIDE) -> Figure:
  """Update norm over parameter norm against the step: over all parameters, by layer, and the usual band."""
  figure, axes = figure_of(width, 3.2)
  inside = max(band[0], 1e-306), min(band[1], 1e306)  # A log axis cannot show 0 and inf.
  axes.axhspan(*inside, color=GREEN, alpha=0.13, linewidth=0, label=f"usual, {band_words(band)}")
  shown = [np.array([x for x in band if 0 < x < math.inf])]
  if shown[0].size == 2:
    middle = math.sqrt(band[0]) * math.sqrt(band[1])
    axes.axhline(middle, color=GREEN, linestyle=DASHES[1], linewidth=1.5, label=tick(middle))
  # Layers: their range as a band, and their median as a line.
  if found is not None:
    values = positive(found.values)
    kept = np.isfinite(values).any(axis=1)
    steps, values = found.steps[kept], values[kept]
    if len(steps):
      low, median, high = (reduce(values, axis=1) for reduce in (np.nanmin, np.nanmedian, np.nanmax))
      axes.fill_between(steps, low, high, color=SKY, alpha=0.35, linewidth=0, label="all layers")
      line(axes, steps, median, bins_of(width), color=BLUE, label="median layer")
      shown += [low, high]
  steps, value = total[0], positive(total[1])
  if np.isfinite(value).any():
    line(axes, steps, value, bins_of(width), color=ORANGE, alpha=0.8, label="all parameters")
    shown.append(value)
  log_axis(axes, np.concatenate(shown))
  step_axis(axes, width, span_of(steps))
  axes.set_ylabel("update / parameters")
  return with_legend(figure, axes, width)


def weights(steps: Ints, edges: Floats, counts: Floats, width: float = WIDE) -> Figure:
  """The distribution of log10 |weight| at the first, the middle and the last recorded step."""
  figure, axes = figure_of(width, 2.8)
  # The last recording first: it gets the strongest colour.
  shown = sorted({0, len(steps) // 2, len(steps) - 1}, reverse=True)
  for at, colour, dash in zip(shown, (BLUE, ORANGE, GREY), DASHES, strict=False):
    portion = counts[at] / max(counts[at].sum(), 1)
    axes.stairs(100 * portion, edges, color=colour, linestyle=dash, linewidth=1.6, label=f"step {steps[at]:,}")
  # Show the bins that were ever used, and one on each side.
  used = np.flatnonzero(counts.sum(axis=0))
  if used.size:
    axes.set_xlim(edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, edges.size - 1)])
  axes.set_ylim(bottom=0)
  axes.xaxis.set_major_locator(MaxNLocator(8 if is_wide(width) else 4, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(10.0**x)))
  axes.set_xlabel("size of the weight")
  axes.set_ylabel("% of the weights")
  return with_legend(figure, axes, width)


def speed(panels: Sequence[tuple[str, Ints, Floats, float]], width: float = WIDE) -> Figure:
  """One panel per (label, steps, values, typical value) on a log axis, with a dashed line at the typical value."""
  figure = Figure(figsize=(width, 0.4 + 2.1 * len(panels)), layout="constrained")
  for axes, (label, steps, values, typical) in zip(
    figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
  ):
    tidy(axes)
    line(axes, steps, values, bins_of(width), color=BLUE)
    axes.axhline(typical, color=ink(), linestyle=DASHES[1], linewidth=1.2)
    log_axis(axes, values)
    step_axis(axes, width, span_of(steps))
    axes.set_ylabel(label)
  return figure
