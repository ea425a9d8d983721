"""The picture of the speed page: time against the number of parameters and leaves, from the JSON of `speed.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from speed_trees import CLIPJAX, OPTAX, SUM, Case

COLOURS = {CLIPJAX: "#0072B2", OPTAX: "#D55E00"}  # Okabe and Ito's, distinguishable with any colour vision.


def picture(section: Mapping[str, Any]) -> Figure:
  """The section "growth" in two panels with logarithmic axes."""
  figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
  left, right = figure.subplots(1, 2)
  _draw(left, [case for case in section["cases"] if case["key"] == "parameters"], "parameters")
  cases = [case for case in section["cases"] if case["key"] == "leaves"]
  _draw(right, cases, "leaves")
  left.set(xlabel="Parameters, in 16 leaves", ylabel="Time (ms)", title="Growth with the parameters")
  right.set(xlabel=f"Leaves of {cases[0]['parameters']:,} parameters", title="Growth with the leaves")
  handles, labels = left.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
  return figure


def _draw(axes: Axes, cases: Sequence[Case], against: str) -> None:
  for name in (CLIPJAX, OPTAX):
    style: dict[str, Any] = {"color": COLOURS[name], "linewidth": 1.8, "markersize": 5}
    _line(axes, cases, against, name, "added", label=f"added to Adam, {name}", marker="o", **style)
    _line(
      axes, cases, against, f"{name}, norm", "median", label=f"norm, {name}", marker="^", linestyle=":", **style
    )  # fmt: skip
  _line(axes, cases, against, SUM, "median", label="limit: one read", color="black", linestyle="--", linewidth=1.2)
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.grid(alpha=0.3)


def _line(axes: Axes, cases: Sequence[Case], against: str, name: str, of: str, **style: Any) -> None:
  """Draws a line through the points above zero; a log axis cannot show the others."""
  points = [(case[against], 1e3 * case["variants"][name][of]) for case in cases if name in case["variants"]]
  axes.plot([x for x, y in points if y > 0], [y for _, y in points if y > 0], **style)
