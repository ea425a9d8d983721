"""Shared parts of the figures: colours, lines, marks, axes, ticks and legends.

They never use pyplot, which keeps global state. Figures come in two widths, as the page has each for a screen and for
a phone. Text and axes take the colours of the caller's matplotlib style; the page sets them to `html.INK`. Lines are
thinned by `series.thin`.
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

# Okabe and Ito's colours, distinguishable with any colour vision.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
GREY = "#8c8c8c"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
WIDE, NARROW = 8.2, 3.9
_ROOM = 0.62  # Width of a character over its font size, with some to spare.

Draw = Callable[[float], Figure]


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
  """A figure with one panel."""
  figure = Figure(figsize=(width, height), layout="constrained")
  axes = figure.add_subplot()
  tidy(axes)
  return figure, axes


def tidy(axes: Axes) -> None:
  """Keeps only the spines with ticks, and adds a faint grid."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.15, color=ink())
  axes.set_axisbelow(True)


def bins_of(width: float) -> int:
  """How many parts of the axis a reader can tell apart."""
  return int(width * 75)


def is_wide(width: float) -> bool:
  """Whether a figure is for a screen."""
  return width >= WIDE


def ink() -> Any:
  """The colour of text and axes."""
  return mpl.rcParams["axes.edgecolor"]


def label_of(name: str, length: int) -> str:
  """A short label without math mode; its leading space keeps matplotlib from hiding a name that begins with "_"."""
  return " " + short(name, length).replace("$", r"\$")


# What is drawn ------------------------------------------------------------------------------------------------------


def positive(values: Floats) -> Floats:
  """The values, with NaN for those that a log axis cannot show."""
  return np.where((values > 0) & np.isfinite(values), values, np.nan)


def line(axes: Axes, steps: Ints, values: Floats, bins: int, **style: Any) -> None:
  """Draws a thinned line, with dots if points are few, and at a point between two gaps."""
  kept = thin(values, bins)
  x, y = steps[kept], values[kept]
  # A point between two gaps has no line: it needs a dot.
  alone = np.isfinite(y)
  alone[1:] &= ~np.isfinite(y[:-1])
  alone[:-1] &= ~np.isfinite(y[1:])
  dots = np.arange(x.size) if x.size <= 60 else np.flatnonzero(alone)
  style = {"linewidth": 1.1} | style
  axes.plot(x, y, marker=".", markersize=3.5 if x.size > 5 else 8, markevery=dots, **style)


def rings(axes: Axes, steps: Ints, values: Floats, mask: Bools, bins: int, **style: Any) -> None:
  """Draws rings around the finite points of `mask`."""
  at = np.flatnonzero(mask & np.isfinite(values))
  at = at[thin(values[at], bins // 2)]
  if at.size:
    style |= {"linestyle": "none", "marker": "o", "markersize": 7, "fillstyle": "none"}
    axes.plot(steps[at], values[at], color=VERMILION, **style)


def edge_marks(axes: Axes, steps: Ints, mask: Bools, bins: int, height: float, **style: Any) -> None:
  """Draws marks at one height of the axes, for values that the axis cannot show."""
  at = thin_mask(mask, bins // 2)
  if at.size:
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(steps[at], np.full(at.size, height), linestyle="none", markersize=4, **place, **style)


# Axes and ticks -----------------------------------------------------------------------------------------------------


def log_axis(axes: Axes, values: Floats, which: str = "y", most: int = 7) -> None:
  """Sets a log axis around the finite values, at least a factor of 4 wide; without any, it says so and has no ticks."""
  known = values[np.isfinite(values) & (values > 1e-306)]  # Quotients and powers of 10 are unreliable below.
  low, high = (float(known.min()), float(known.max())) if known.size else (0.1, 10.0)
  # 6% of the range on both sides, at least a factor of 2.
  room = max(2.0, (high / low) ** 0.06) if math.isfinite(high / low) else 1e3
  low, high = max(low / room, 1e-307), min(high * room, 1e307)
  axis = getattr(axes, f"{which}axis")
  getattr(axes, f"set_{which}lim")(low, high)  # Before the scale: autoscaling overflows near the largest float.
  getattr(axes, f"set_{which}scale")("log")
  axis.set_major_locator(FixedLocator([10.0**place for place in ticks(math.log10(low), math.log10(high), most)]))
  axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
  axis.set_minor_locator(NullLocator())
  if not known.size:
    axis.set_ticks([])
    axes.text(0.5, 0.45, "no finite value above 0", ha="center", transform=axes.transAxes)


def plain_axis(axes: Axes, values: Floats, *, is_from_zero: bool = False) -> None:
  """Sets a linear axis with few ticks around the finite values; `is_from_zero` starts it at 0 unless one is below."""
  known = values[np.isfinite(values)].clip(-1e306, 1e306)
  low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
  if is_from_zero and low >= 0:
    low = 0.0
  room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
  axes.set_autoscaley_on(False)  # It overflows for values near the largest float.
  axes.set_ylim(low if low == 0 and is_from_zero else low - room, high + room)
  axes.yaxis.set_major_locator(MaxNLocator(4))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))


def ticks(low: float, high: float, most: int) -> list[float]:
  """At most `most` ticks between two log10: at 1, 2 and 5 of each decade on a short axis, else at decades."""
  decades = np.arange(math.floor(low), math.ceil(high) + 1)
  # 1, 2 and 5 of each decade; if these are too many, decades; if these are too many, every second, third, ...
  places = [i + j for i in decades.tolist() for j in (0, math.log10(2), math.log10(5)) if low <= i + j <= high]
  if len(places) > most:
    places = [i for i in decades.tolist() if low <= i <= high]
  return places[:: math.ceil(len(places) / most)]


def tick(x: float) -> str:
  """A number in few characters: 0.001, 2,000, 1e-5."""
  if 1e3 <= x < 1e6:
    return f"{x:,.0f}"
  mantissa, _, exponent = f"{x:.3g}".partition("e")
  return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def step_axis(axes: Axes, width: float, span: tuple[int, int] | None = None) -> None:
  """Sets the step axis, over `span` if that is given."""
  if span is not None:
    room = max(0.01 * (span[1] - span[0]), 0.5)
    axes.set_xlim(span[0] - room, span[1] + room)
  axes.xaxis.set_major_locator(MaxNLocator(8 if is_wide(width) else 4, integer=True, min_n_ticks=1))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
  axes.set_xlabel("step")


def span_of(steps: Ints) -> tuple[int, int]:
  """The first and the last step; (0, 0) without steps."""
  return (int(steps.min()), int(steps.max())) if steps.size else (0, 0)


# Legends ------------------------------------------------------------------------------------------------------------


def with_legend(figure: Figure, axes: Axes, width: float) -> Figure:
  """Adds a legend above the axes, where it hides no data, with one entry per label."""
  handles = _entries(axes)
  if handles:
    columns = 4 if is_wide(width) else 2
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False)
  return figure


def heading(axes: Axes, title: str, width: float) -> None:
  """Sets the title of a panel, and its legend: beside the title if there is room, else between title and axes."""
  handles, size = _entries(axes), mpl.rcParams["font.size"]
  # Matplotlib does not place a legend beside a title, so lengths are estimated in characters.
  room = width * 72 / size / _ROOM
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
  """One handle per label."""
  handles, labels = axes.get_legend_handles_labels()
  return dict(zip(labels, handles, strict=True))
