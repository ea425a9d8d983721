"""The heat map of layers over steps, the first layer on top.

It shows norms, norms over the usual norm of each layer, or ratios around 1.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from clipjax.runs.kinds import Bools, Floats
from clipjax.runs.report.axes import VERMILION, WIDE, bins_of, figure_of, is_wide, positive, step_axis, tick, ticks
from clipjax.runs.report.grid import (
  Combine,
  Depth,
  Grid,
  Steps,
  by_depth,
  farthest,
  greatest,
  over_usual,
  steps_of,
  time_grid,
)
from clipjax.runs.report.series import Vectors, short, without_common, without_last

MOST_LINES = 360  # More would be thinner than two pixels, and a browser may drop such lines.
_BAD, _ZERO = "#b5179e", "#4d4d4e"  # Colours of cells: an image cannot use the page's variables.
# From far below the usual norm to far above it; the middle is transparent, as the page may be light or dark.
_AROUND = LinearSegmentedColormap.from_list(
  "around", [(0.0, 0.32, 0.75), (0.34, 0.65, 0.92), (0.5, 0.5, 0.5, 0.13), (0.95, 0.65, 0.1), (0.8, 0.25, 0.0)]
)
_LEAST, _MOST = 1.0, 3.0  # The colours span at least 1 and at most 3 decades around the usual norm.
_LEAST_RATIO, _MOST_RATIO = 0.30103, 2.0  # Around a ratio of 1, they span a factor of 2 to 100.


def layers(found: Vectors, width: float = WIDE, axis: Steps | None = None, alone: Bools | None = None) -> Figure:
  """The norm of each layer, as a figure of its own; `axis` and `alone` as in `time_grid`."""
  figure, axes = figure_of(width, height_of(found, width) + 0.9)
  _draw_norms(axes, found, axis or steps_of(found.steps), width, alone)
  return figure


def height_of(found: Vectors, width: float) -> float:
  """The height of the map in inches: a line of text per layer, as far as there is room."""
  return float(np.clip(_line(width) * len(found.names) + 0.2, 0.9, 7.0 if is_wide(width) else 6.8))


def _line(width: float) -> float:
  """The height of a line of text in inches."""
  return 0.155 if is_wide(width) else 0.165


def draw_over_usual(
  axes: Axes, found: Vectors, axis: Steps, width: float, alone: Bools, rings: Sequence[tuple[int, int]]
) -> None:
  """Draws norms over the usual norm of their layer, or plain norms if that is unknown.

  Usual norms are faint. `rings` are steps and layers to circle, as their cells may be tiny.
  """
  over = over_usual(found, alone)
  if over is None:
    _draw_norms(axes, found, axis, width, alone)
    return
  rings = [(step, layer) for step, layer in rings if axis.first <= step <= axis.last]
  grid = time_grid(over, axis, _columns(width), alone)
  # Colours are symmetric around the usual norm, and reach as far as the data within fixed bounds.
  log = np.log10(positive(grid.values))
  most = float(np.clip(np.abs(log[np.isfinite(log)]).max(initial=0.0), _LEAST, _MOST))
  _draw(axes, found, grid, np.clip(log, -most, most), (-most, most), _AROUND, "times the usual norm", width, rings)


def _draw_norms(axes: Axes, found: Vectors, axis: Steps, width: float, alone: Bools | None) -> None:
  grid = time_grid(found, axis, _columns(width), alone)
  log = np.log10(positive(grid.values))
  known = log[np.isfinite(log)]
  low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
  if high - low < 0.1:  # Equal norms would make noise look like structure.
    low, high = low - 0.5, high + 0.5
  _draw(axes, found, grid, log, (low, high), mpl.colormaps["viridis"], "norm", width)


def draw_ratios(axes: Axes, found: Vectors, axis: Steps, width: float, alone: Bools) -> None:
  """Draws ratios, faint near 1; a cell of several ratios shows the one farthest from 1."""
  with np.errstate(divide="ignore"):
    logs = found._replace(values=np.log10(found.values))
  grid = time_grid(logs, axis, _columns(width), alone, combine=farthest)
  known = np.abs(grid.values[np.isfinite(grid.values)])
  most = float(np.clip(known.max(initial=0.0), _LEAST_RATIO, _MOST_RATIO))
  log, label = np.clip(grid.values, -most, most), "times the step without the clip"
  _draw(axes, found, grid._replace(values=10.0**grid.values), log, (-most, most), _AROUND, label, width, (), farthest)


def _columns(width: float) -> int:
  return bins_of(width) // 2


def _draw(
  axes: Axes,
  found: Vectors,
  grid: Grid,
  log: Floats,
  limits: tuple[float, float],
  colours: Colormap,
  label: str,
  width: float,
  rings: Sequence[tuple[int, int]] = (),
  combine: Combine = greatest,
) -> None:
  """Draws the cells of `log`, with a colour bar and the labels of the layers."""
  # Nonfinite cells and zeros lie outside the limits, where the colour map has colours of their own.
  low, high = limits
  is_bad, is_zero = np.isinf(grid.values), grid.values == 0
  log[is_zero], log[is_bad] = low - 1, high + 1
  # Stacked layers share lines if there are more than a screen can show.
  depth = by_depth(found.names, log, MOST_LINES, combine=combine)
  image = axes.imshow(
    np.ma.masked_invalid(depth.values),
    cmap=colours.with_extremes(bad=(0, 0, 0, 0), under=_ZERO, over=_BAD),
    vmin=low,
    vmax=high,
    aspect="auto",
    interpolation="none",
    extent=(grid.start, grid.stop, len(depth.values) - 0.5, -0.5),
  )
  axes.set_facecolor("none")
  axes.grid(visible=False)
  # Layers that an event names get a ring and a bold label.
  names = without_common(without_last(found.names))
  named = {int(depth.lines[layer]): names[layer] for _, layer in rings}
  _label_layers(axes, depth, height_of(found, width), width, named)
  style: dict[str, Any] = {"linestyle": "none", "marker": "o", "fillstyle": "none", "color": VERMILION}
  axes.plot([step for step, _ in rings], [depth.lines[layer] for _, layer in rings], markersize=8, **style)
  _colour_bar(axes, image, label, width)
  step_axis(axes, width)
  for mask, colour, name in ((is_bad, _BAD, "nonfinite"), (is_zero, _ZERO, "zero")):
    if mask.any():  # An empty line adds the entry of the legend.
      axes.plot([], [], color=colour, marker="s", linestyle="none", label=name)


def _colour_bar(axes: Axes, image: Any, label: str, width: float) -> None:
  bar = axes.figure.colorbar(image, ax=axes, orientation="horizontal", pad=0.02, aspect=50, shrink=0.7, label=label)
  bar.set_ticks(ticks(image.norm.vmin, image.norm.vmax, 8 if is_wide(width) else 4))
  bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(10.0**x)))
  bar.outline.set_linewidth(0.5)


def _label_layers(axes: Axes, depth: Depth, height: float, width: float, named: dict[int, str]) -> None:
  """Labels at most one layer per line of text, `named` lines in bold, and draws a line between stacks."""
  size = 7.5 if is_wide(width) else 8.5
  room = len(depth.values) / max(1, int(height / _line(width)))
  labels = layer_labels(depth, room, 22 if is_wide(width) else 14, named)
  axes.set_yticks(list(labels), list(labels.values()), parse_math=False, fontsize=size)
  for place, text in zip(labels, axes.get_yticklabels(), strict=True):
    if place in named:
      text.set(fontweight="bold", color=VERMILION)
  for above, below in itertools.pairwise(depth.stacks):
    if above.size > 1 or below.size > 1:
      axes.axhline(below.start - 0.5, color="white", linewidth=0.8)


def layer_labels(depth: Depth, room: float, length: int, named: dict[int, str]) -> dict[float, str]:
  """The labels of a heat map by line, at least `room` lines apart.

  Room goes first to `named` lines, then to stacks, to whole leaves, and to depths within a stack.
  """
  out: dict[float, str] = {}

  def is_free(place: float) -> bool:
    return all(abs(place - other) >= room for other in out)

  for line, name in named.items():
    if is_free(line):
      out[line] = short(name, length)
  whole = [stack for stack in depth.stacks if stack.size == 1]
  stacked = sorted((stack for stack in depth.stacks if stack.size > 1), key=lambda stack: -stack.size)
  for stacks in (stacked, whole):  # Names leave out what they share: all stacks may begin with "blocks".
    names = without_common(without_last(tuple(stack.name for stack in stacks)))
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
