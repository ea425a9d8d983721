"""The figures of a report: arrays in, a matplotlib `Figure` out. Never pyplot: nothing is kept, shown or global.

Each takes its `width` in inches, since the page has every figure twice, for a screen and for a phone. Text and axes
have the colours of the caller's matplotlib style, which for the page is `_page.INK`. What is drawn is thinned by
`series.thin`; what is said in numbers is not drawn here.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from clipjax.quantities import NORM
from clipjax.runs.kinds import Floats, Ints
from clipjax.runs.report.series import (
  Depth,
  Grid,
  NormSeries,
  Vectors,
  by_depth,
  short,
  thin,
  thin_mask,
  time_grid,
  without_common,
)
from clipjax.runs.schema import key_of
from clipjax.runs.words import number

# Okabe and Ito's colours, which are told apart with any colour vision.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
GREY = "#8c8c8c"
_BAD, _ZERO = "#d55e01", "#8c8c8d"  # Of cells of the heat map: not of the page's variables, as the image is not.
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
WIDE, NARROW = 8.2, 3.9
PERCENTILES = (50, 90, 99)
MOST_LINES = 360  # Of the heat map: what a browser draws finer than two pixels, it may leave out.


def norms(series: NormSeries, width: float = WIDE) -> Figure:
  """The norm against the step on a log axis, with the threshold; clipped, nonfinite, zero steps, spikes marked."""
  figure, axes = _figure(width, 3.4)
  steps, norm = series.steps, series.norm
  bins = bins_of(width)
  _line(axes, steps, _positive(norm), bins, color=BLUE, label="norm before the clip")
  at = np.flatnonzero(series.clipped & (norm > 0))
  at = at[thin(norm[at], bins // 2)]
  if at.size:
    size = 3.5 if at.size < 200 else 2
    axes.plot(steps[at], norm[at], color=ORANGE, label="clipped", linestyle="none", marker="v", markersize=size)
  _draw_spikes(axes, series, bins)
  _draw_limit(axes, series, bins)
  _log_axis(axes, np.concatenate([_positive(norm), _positive(series.limit)]))
  _mark(axes, steps, series.nonfinite, bins, 0.97, marker="x", color=VERMILION, label="not finite")
  _mark(axes, steps, series.rejected & ~series.nonfinite, bins, 0.93, marker="s", color=PURPLE, label="rejected")
  _mark(axes, steps, norm == 0, bins, 0.03, marker="o", color=GREY, label="norm 0")
  _step_axis(axes, steps, width)
  axes.set_ylabel(key_of(series.name, NORM).replace("$", r"\$"))
  return _with_legend(figure, axes, width)


def histogram(norm: Floats, percentiles: Sequence[float], width: float = WIDE) -> Figure:
  """Counts of the finite, positive norms in equal parts of log10, with the percentiles `PERCENTILES` as lines."""
  figure, axes = _figure(width, 2.8)
  log = np.log10(_positive(norm)[norm > 0])
  edges = np.histogram_bin_edges(log, 40)
  axes.stairs(np.histogram(log, edges)[0], 10**edges, fill=True, color=SKY)
  _log_axis(axes, 10**edges, "x")
  for p, value, dash in zip(PERCENTILES, percentiles, DASHES, strict=True):
    if value > 0:
      axes.axvline(value, color=_ink(), linestyle=dash, linewidth=1.5, label=f"p{p} {number(value)}")
  axes.set_xlabel("norm before the clip")
  axes.set_ylabel("steps")
  axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
  return _with_legend(figure, axes, width)


def layers(found: Vectors, width: float = WIDE) -> Figure:
  """The norm of each layer, the first on top, against the step, as colour; at most one label for each line of text."""
  height = float(np.clip(0.17 * len(found.names) + 1.4, 2.2, 8.5))
  figure, axes = _figure(width, height)
  grid = time_grid(found.steps, found.values, bins_of(width) // 3)
  depth = by_depth(found.names, grid.values, MOST_LINES)
  axes.set_facecolor("none")
  image, handles = _draw_grid(axes, grid._replace(values=depth.values))
  bar = figure.colorbar(image, ax=axes, orientation="horizontal", pad=0.02, aspect=40, shrink=0.8, label="norm")
  bar.set_ticks(_ticks(image.norm.vmin, image.norm.vmax, 4 if width < WIDE else 8))
  bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(10.0**x)))
  labels = _layer_labels(depth, len(depth.values) / max(1, int((height - 1.2) / 0.16)), 18 if width < WIDE else 36)
  axes.set_yticks(list(labels), list(labels.values()), parse_math=False, fontsize=7.5)
  for above, below in itertools.pairwise(depth.stacks):
    if above.size > 1 or below.size > 1:
      axes.axhline(below.start - 0.5, color="white", linewidth=0.8)
  axes.grid(visible=False)
  _step_axis(axes, np.array([grid.start, grid.stop]), width)
  axes.set_xlim(grid.start, grid.stop)
  if handles:
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
  return figure


def band_words(band: tuple[float, float]) -> str:
  """The usual range of the ratio as the figure and its words name it."""
  return f"{_tick(band[0])} to {_tick(band[1])}"


def ratios(total: tuple[Ints, Floats], found: Vectors | None, band: tuple[float, float], width: float = WIDE) -> Figure:
  """The size of the update over that of the parameters against the step, of all and by layer, with the usual band."""
  figure, axes = _figure(width, 3.2)
  inside = max(band[0], 1e-306), min(band[1], 1e306)  # A log axis has no place for 0 and inf.
  axes.axhspan(*inside, color=GREEN, alpha=0.13, linewidth=0, label=f"usual, {band_words(band)}")
  shown = [np.array([x for x in band if 0 < x < math.inf])]
  if shown[0].size == 2:
    middle = math.sqrt(band[0]) * math.sqrt(band[1])
    axes.axhline(middle, color=GREEN, linestyle=DASHES[1], linewidth=1.5, label=_tick(middle))
  if found is not None:
    values = _positive(found.values)
    kept = np.isfinite(values).any(axis=1)
    steps, values = found.steps[kept], values[kept]
    if len(steps):
      low, median, high = (reduce(values, axis=1) for reduce in (np.nanmin, np.nanmedian, np.nanmax))
      axes.fill_between(steps, low, high, color=SKY, alpha=0.35, linewidth=0, label="all layers")
      _line(axes, steps, median, bins_of(width), color=BLUE, label="median layer")
      shown += [low, high]
  steps, value = total[0], _positive(total[1])
  if np.isfinite(value).any():
    _line(axes, steps, value, bins_of(width), color=ORANGE, alpha=0.8, label="all parameters")
    shown.append(value)
  _log_axis(axes, np.concatenate(shown))
  _step_axis(axes, steps, width)
  axes.set_ylabel("update / parameters")
  return _with_legend(figure, axes, width)


def losses(curves: Sequence[tuple[str, Ints, Floats, Ints]], width: float = WIDE) -> Figure:
  """Every loss, as (name, steps, values, steps that were not finite); on a log axis where they span a factor of 10."""
  figure, axes = _figure(width, 3.2)
  for i, (name, steps, values, bad) in enumerate(curves):
    style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
    # The space keeps a name with a leading underscore, which matplotlib would leave out.
    _line(axes, steps, values, bins_of(width), label=" " + short(name, 30).replace("$", r"\$"), **style)
    _mark(axes, bad, np.ones(bad.size, np.bool_), bins_of(width), 0.97, marker="x", color=VERMILION, label="not finite")
  together = np.concatenate([values for _, _, values, _ in curves])
  if not together.size or (together.min() > 0 and together.max() > 10 * together.min()):
    _log_axis(axes, together)
  _step_axis(axes, np.concatenate([np.append(steps, bad) for _, steps, _, bad in curves]), width)
  axes.set_ylabel("loss")
  return _with_legend(figure, axes, width)


def weights(steps: Ints, edges: Floats, counts: Floats, width: float = WIDE) -> Figure:
  """The distribution of log10 |weight| at the first, the middle and the last of the recorded steps."""
  figure, axes = _figure(width, 2.8)
  shown = sorted({0, len(steps) // 2, len(steps) - 1}, reverse=True)
  for at, colour, dash in zip(shown, (BLUE, ORANGE, GREY), DASHES, strict=False):
    portion = counts[at] / max(counts[at].sum(), 1)
    axes.stairs(100 * portion, edges, color=colour, linestyle=dash, linewidth=1.6, label=f"step {steps[at]:,}")
  used = np.flatnonzero(counts.sum(axis=0))
  if used.size:
    axes.set_xlim(edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, edges.size - 1)])
  axes.set_ylim(bottom=0)
  axes.xaxis.set_major_locator(MaxNLocator(4 if width < WIDE else 8, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(10.0**x)))
  axes.set_xlabel("size of the weight")
  axes.set_ylabel("% of the weights")
  return _with_legend(figure, axes, width)


def speed(panels: Sequence[tuple[str, Ints, Floats, float]], width: float = WIDE) -> Figure:
  """One panel under the other, each (label, steps, values, what is typical, dashed) on a log axis."""
  figure = Figure(figsize=(width, 0.4 + 2.1 * len(panels)), layout="constrained")
  for axes, (label, steps, values, typical) in zip(
    figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
  ):
    _tidy(axes)
    _line(axes, steps, values, bins_of(width), color=BLUE)
    axes.axhline(typical, color=_ink(), linestyle=DASHES[1], linewidth=1.2)
    _log_axis(axes, values)
    _step_axis(axes, steps, width)
    axes.set_ylabel(label)
  return figure


# Parts --------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.add_subplot()
  _tidy(axes)
  return figure, axes


def _tidy(axes: Axes) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.15, color=_ink())
  axes.set_axisbelow(True)


def bins_of(width: float) -> int:
  """Parts of the axis that can still be told apart."""
  return int(width * 75)


def _ink() -> Any:
  return mpl.rcParams["axes.edgecolor"]


def _positive(values: Floats) -> Floats:
  """NaN in place of what a log axis cannot show."""
  return np.where((values > 0) & np.isfinite(values), values, np.nan)


def _line(axes: Axes, steps: Ints, values: Floats, bins: int, **style: Any) -> None:
  """A thinned line; with dots where there are few points or where one stands between two gaps."""
  kept = thin(values, bins)
  x, y = steps[kept], values[kept]
  alone = np.isfinite(y)
  alone[1:] &= ~np.isfinite(y[:-1])
  alone[:-1] &= ~np.isfinite(y[1:])
  dots = np.arange(x.size) if x.size <= 60 else np.flatnonzero(alone)
  axes.plot(x, y, linewidth=1.1, marker=".", markersize=3.5 if x.size > 5 else 8, markevery=dots, **style)


def _draw_limit(axes: Axes, series: NormSeries, bins: int) -> None:
  limits, what = series.limit[np.isfinite(series.limit)], "smallest threshold" if series.by_block else "threshold"
  style: dict[str, Any] = {"color": _ink(), "linestyle": DASHES[1], "linewidth": 1.5}
  if limits.size and limits.min() == limits.max() > 0:
    axes.axhline(limits[0], label=f"{what} {number(limits[0])}", **style)
  elif limits.size:
    kept = thin(series.limit, bins)
    axes.plot(series.steps[kept], _positive(series.limit[kept]), label=what, **style)


def _draw_spikes(axes: Axes, series: NormSeries, bins: int) -> None:
  """Rings around the spikes, and the warm-up, which percentiles leave out, in grey."""
  at = np.flatnonzero(series.spikes & (series.norm > 0))
  at = at[thin(series.norm[at], bins // 2)]
  if at.size:
    style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 7, "fillstyle": "none"}
    axes.plot(series.steps[at], series.norm[at], color=VERMILION, label="spike", **style)
  if series.steps.size and series.steps[0] < series.begin <= series.steps[-1]:
    axes.axvspan(float(series.steps[0]), float(series.begin), color=GREY, alpha=0.12, linewidth=0, label="warm-up")


def _draw_grid(axes: Axes, grid: Grid) -> tuple[Any, list[Patch]]:
  """The heat map in log10, and a key for the layers that were not finite or zero."""
  log = np.log10(_positive(grid.values))
  known = log[np.isfinite(log)]
  low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
  if high - low < 0.1:
    low, high = low - 0.5, high + 0.5
  cmap = mpl.colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0), under=_ZERO, over=_BAD)
  is_bad = np.isinf(grid.values)
  log[grid.values == 0], log[is_bad] = low - 1, high + 1
  image = axes.imshow(
    np.ma.masked_invalid(log),
    cmap=cmap,
    vmin=low,
    vmax=high,
    aspect="auto",
    interpolation="none",
    extent=(grid.start, grid.stop, len(log) - 0.5, -0.5),
  )
  marks = ((is_bad, _BAD, "not finite"), (grid.values == 0, _ZERO, "zero"))
  return image, [Patch(color=colour, label=label) for mask, colour, label in marks if mask.any()]


def _layer_labels(depth: Depth, room: float, length: int) -> dict[float, str]:
  """The labels of lines of a heat map by their place, `room` lines apart: of stacks, of whole leaves, of depths."""
  out: dict[float, str] = {}

  def is_free(place: float) -> bool:
    return all(abs(place - other) >= room for other in out)

  whole = [stack for stack in depth.stacks if stack.size == 1]
  stacked = sorted((stack for stack in depth.stacks if stack.size > 1), key=lambda stack: -stack.size)
  for stacks in (stacked, whole):  # Stacks, which may all be of "blocks", leave out what they share.
    names = without_common(tuple(stack.name for stack in stacks))
    for stack, name in zip(stacks, names, strict=True):
      if is_free(stack.start):
        layers = f"[0..{stack.size - 1}]" if stack.size > 1 else ""
        out[stack.start] = short(name, length - len(layers)) + layers
  each = next(d * 10**e for e in range(9) for d in (1, 2, 5) if d * 10**e >= room * depth.per)
  for stack in depth.stacks:
    for layer in range(each, stack.size, each):
      if is_free(place := stack.start + layer / depth.per):
        out[place] = f"[{layer}]"
  return dict(sorted(out.items()))


def _mark(axes: Axes, steps: Ints, mask: Any, bins: int, height: float, **style: Any) -> None:
  """Marks at a height of the axes, for values that have no place on the axis."""
  at = thin_mask(mask, bins // 2)
  if at.size:
    transform = axes.get_xaxis_transform()
    axes.plot(
      steps[at], np.full(at.size, height), linestyle="none", markersize=4, clip_on=False, transform=transform, **style
    )


def _log_axis(axes: Axes, values: Floats, which: str = "y") -> None:
  """A log axis around the finite values, at least a factor of 4 wide; without any it says so and has no ticks."""
  known = values[np.isfinite(values) & (values > 1e-306)]  # Below, quotients and powers of 10 are not reliable.
  low, high = (float(known.min()), float(known.max())) if known.size else (0.1, 10.0)
  room = max(2.0, (high / low) ** 0.06) if math.isfinite(high / low) else 1e3
  low, high = max(low / room, 1e-307), min(high * room, 1e307)
  axis = getattr(axes, f"{which}axis")
  getattr(axes, f"set_{which}lim")(low, high)  # First: autoscaling of norms near the largest float overflows.
  getattr(axes, f"set_{which}scale")("log")
  axis.set_major_locator(FixedLocator([10.0**place for place in _ticks(math.log10(low), math.log10(high), 7)]))
  axis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
  axis.set_minor_locator(NullLocator())
  if not known.size:
    axis.set_ticks([])
    axes.set_title("no finite value above 0", y=0.45, fontsize="medium")


def _ticks(low: float, high: float, most: int) -> list[float]:
  """At most about `most` places between two log10, at 1, 2, 5 of each decade where it is short, else at decades."""
  decades = np.arange(math.floor(low), math.ceil(high) + 1)
  places = [i + j for i in decades.tolist() for j in (0, math.log10(2), math.log10(5)) if low <= i + j <= high]
  if len(places) > most:
    places = [i for i in decades.tolist() if low <= i <= high]
  return places[:: math.ceil(len(places) / most)]


def _tick(x: float) -> str:
  """A number in as few characters as it has digits: 0.001, 2,000, 1e-5."""
  if 1e3 <= x < 1e6:
    return f"{x:,.0f}"
  mantissa, _, exponent = f"{x:.3g}".partition("e")
  return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _step_axis(axes: Axes, steps: Any, width: float) -> None:
  if steps.size and steps.min() == steps.max():
    axes.set_xlim(steps[0] - 1, steps[0] + 1)
  axes.xaxis.set_major_locator(MaxNLocator(4 if width < WIDE else 8, integer=True, min_n_ticks=1))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
  axes.set_xlabel("step")


def _with_legend(figure: Figure, axes: Axes, width: float) -> Figure:
  """The figure with a legend above it, one entry for each label, so that it hides no data."""
  handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
  if handles:
    columns = 2 if width < WIDE else 4
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False)
  return figure


Draw = Callable[[float], Figure]
