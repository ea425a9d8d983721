"""Parts of the figures: colours, lines, marks, axes, ticks and legends. Never pyplot: nothing is kept, shown or global.

Figures come in two widths, since the page has each twice, for a screen and for a phone. Text and axes have the colours
of the caller's matplotlib style, which for the page is `page.INK`. What is drawn is thinned by `series.thin`.
"""

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.report.series import short, thin, thin_mask

# Okabe and Ito's colours, which are told apart with any colour vision.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
GREY = "#8c8c8c"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
WIDE, NARROW = 8.2, 3.9
_ROOM = 0.62  # The width of a character over its size, with some to spare.

Draw = Callable[[float], Figure]


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
  """A figure of one panel."""
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.add_subplot()
  tidy(axes)
  return figure, axes


def tidy(axes: Axes) -> None:
  """Only the two spines that have ticks, and a faint grid."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.15, color=ink())
  axes.set_axisbelow(True)


def bins_of(width: float) -> int:
  """Parts of the axis that can still be told apart."""
  return int(width * 75)


def is_wide(width: float) -> bool:
  """Whether a figure is for a screen."""
  return width >= WIDE


def ink() -> Any:
  """The colour of text and axes."""
  return mpl.rcParams["axes.edgecolor"]


def label_of(name: str, length: int = 30) -> str:
  """A name as a label: short, without mathematics, and never hidden, as one with a leading underscore would be."""
  return " " + short(name, length).replace("$", r"\$")


# What is drawn ------------------------------------------------------------------------------------------------------


def positive(values: Floats) -> Floats:
  """NaN in place of what a log axis cannot show."""
  return np.where((values > 0) & np.isfinite(values), values, np.nan)


def line(axes: Axes, steps: Ints, values: Floats, bins: int, **style: Any) -> None:
  """A thinned line; with dots where there are few points or where one stands between two gaps."""
  kept = thin(values, bins)
  x, y = steps[kept], values[kept]
  alone = np.isfinite(y)
  alone[1:] &= ~np.isfinite(y[:-1])
  alone[:-1] &= ~np.isfinite(y[1:])
  dots = np.arange(x.size) if x.size <= 60 else np.flatnonzero(alone)
  style = {"linewidth": 1.1} | style
  axes.plot(x, y, marker=".", markersize=3.5 if x.size > 5 else 8, markevery=dots, **style)


def rings(axes: Axes, steps: Ints, values: Floats, mask: Bools, bins: int, **style: Any) -> None:
  """Rings around the points of `mask` that are finite."""
  at = np.flatnonzero(mask & np.isfinite(values))
  at = at[thin(values[at], bins // 2)]
  if at.size:
    style |= {"linestyle": "none", "marker": "o", "markersize": 7, "fillstyle": "none"}
    axes.plot(steps[at], values[at], color=VERMILION, **style)


def edge_marks(axes: Axes, steps: Ints, mask: Bools, bins: int, height: float, **style: Any) -> None:
  """Marks at a height of the axes, for values that have no place on the axis."""
  at = thin_mask(mask, bins // 2)
  if at.size:
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(steps[at], np.full(at.size, height), linestyle="none", markersize=4, **place, **style)


# Axes and ticks -----------------------------------------------------------------------------------------------------


def log_axis(axes: Axes, values: Floats, which: str = "y", most: int = 7) -> None:
  """A log axis around the finite values, at least a factor of 4 wide; without any it says so and has no ticks."""
  known = values[np.isfinite(values) & (values > 1e-306)]  # Below, quotients and powers of 10 are not reliable.
  low, high = (float(known.min()), float(known.max())) if known.size else (0.1, 10.0)
  room = max(2.0, (high / low) ** 0.06) if math.isfinite(high / low) else 1e3
  low, high = max(low / room, 1e-307), min(high * room, 1e307)
  axis = getattr(axes, f"{which}axis")
  getattr(axes, f"set_{which}lim")(low, high)  # First: autoscaling of norms near the largest float overflows.
  getattr(axes, f"set_{which}scale")("log")
  axis.set_major_locator(FixedLocator([10.0**place for place in ticks(math.log10(low), math.log10(high), most)]))
  axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
  axis.set_minor_locator(NullLocator())
  if not known.size:
    axis.set_ticks([])
    axes.text(0.5, 0.45, "no finite value above 0", ha="center", transform=axes.transAxes)


def plain_axis(axes: Axes, values: Floats, *, is_from_zero: bool = False) -> None:
  """A linear axis with few ticks around the finite values, from 0 on where these are not below it."""
  known = values[np.isfinite(values)].clip(-1e306, 1e306)
  low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
  if is_from_zero and low >= 0:
    low = 0.0
  room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
  axes.set_autoscaley_on(False)  # Which overflows for values near the largest float.
  axes.set_ylim(low if low == 0 and is_from_zero else low - room, high + room)
  axes.yaxis.set_major_locator(MaxNLocator(4))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))


def ticks(low: float, high: float, most: int) -> list[float]:
  """At most about `most` places between two log10, at 1, 2, 5 of each decade where it is short, else at decades."""
  decades = np.arange(math.floor(low), math.ceil(high) + 1)
  places = [i + j for i in decades.tolist() for j in (0, math.log10(2), math.log10(5)) if low <= i + j <= high]
  if len(places) > most:
    places = [i for i in decades.tolist() if low <= i <= high]
  return places[:: math.ceil(len(places) / most)]


def tick(x: float) -> str:
  """A number in as few characters as it has digits: 0.001, 2,000, 1e-5."""
  if 1e3 <= x < 1e6:
    return f"{x:,.0f}"
  mantissa, _, exponent = f"{x:.3g}".partition("e")
  return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def step_axis(axes: Axes, width: float, span: tuple[int, int] | None = None) -> None:
  """The axis of steps, over `span` where it is given."""
  if span is not None:
    room = max(0.01 * (span[1] - span[0]), 0.5)
    axes.set_xlim(span[0] - room, span[1] + room)
  axes.xaxis.set_major_locator(MaxNLocator(8 if is_wide(width) else 4, integer=True, min_n_ticks=1))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
  axes.set_xlabel("step")


def span_of(steps: Ints) -> tuple[int, int]:
  """The first and the last step; 0 twice where there is none."""
  return (int(steps.min()), int(steps.max())) if steps.size else (0, 0)


# Legends ------------------------------------------------------------------------------------------------------------


def with_legend(figure: Figure, axes: Axes, width: float) -> Figure:
  """The figure with a legend above it, one entry for each label, so that it hides no data."""
  handles = _entries(axes)
  if handles:
    columns = 4 if is_wide(width) else 2
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False)
  return figure


def heading(axes: Axes, title: str, width: float) -> None:
  """The title of a panel and its legend: beside it where there is room, else below it, above the axes."""
  handles, size = _entries(axes), mpl.rcParams["font.size"]
  room = width * 72 / size / _ROOM  # In characters.
  taken = [len(label) + 5 for label in handles]
  beside = is_wide(width) and len(title) + sum(taken) + 12 < room
  is_row = sum(taken) + 12 < room
  columns = max(1, len(handles) if is_row else int((room - 10) / max(taken, default=1)))
  rows = 0 if beside or not handles else math.ceil(len(handles) / columns)
  pad = 4 + rows * 1.45 * size
  axes.set_title(title.replace("$", r"\$"), loc="left", fontsize="medium", fontweight="bold", pad=pad)
  if handles:
    side = "right" if beside else "left"
    style: dict[str, Any] = {"frameon": False, "borderpad": 0, "handlelength": 1.5, "columnspacing": 1.2}
    style |= {"loc": f"lower {side}", "bbox_to_anchor": (1.0 if beside else 0.0, 1.0), "borderaxespad": 0.3}
    axes.legend(handles.values(), handles.keys(), ncols=columns, **style)


def _entries(axes: Axes) -> dict[str, Any]:
  """The handle of each label, once."""
  handles, labels = axes.get_legend_handles_labels()
  return dict(zip(labels, handles, strict=True))
