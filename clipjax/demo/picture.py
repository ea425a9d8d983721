"""The picture of the demo: loss and gradient norm of every run against the step."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clipjax.demo.model import LEARNING_RATE
from clipjax.demo.training import Trained

# Okabe and Ito's colours, distinguishable with any colour vision.
COLOURS = ("#D55E00", "#0072B2", "#009E73")
# Small dots show a finite step between two nonfinite ones, where there is no line.
LINE: dict[str, Any] = {"linewidth": 1.2, "marker": ".", "markersize": 2.5}


def picture(runs: Sequence[Trained]) -> Figure:
  """Plots loss, and below it the gradient norm before the clip, against the step; nonfinite values are gaps."""
  figure = Figure(figsize=(9, 8), layout="constrained")
  figure.suptitle(f"A character RNN under SGD at learning rate {LEARNING_RATE:g}, without and with clipping")
  top, bottom = figure.subplots(2, 1, sharex=True)
  for row, (trained, colour) in enumerate(zip(runs, COLOURS, strict=True)):
    _draw_loss(top, trained, colour)
    _draw_norm(bottom, trained, colour, row)
  top.set_ylabel("Loss (nats per character)")
  bottom.set_ylabel("Gradient norm before the clip")
  bottom.set_xlabel("Step")
  for axes in (top, bottom):
    axes.set_yscale("log")
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    if not math.isfinite(axes.dataLim.minposy):
      axes.set_ylim(1, 10)  # Nothing to show: matplotlib cannot autoscale an empty log axis.
  return figure


def _draw_loss(axes: Axes, trained: Trained, colour: str) -> None:
  loss = trained.series["loss"]
  axes.plot(_steps(loss), _positive(loss), color=colour, label=trained.label, **LINE)


def _draw_norm(axes: Axes, trained: Trained, colour: str, row: int) -> None:
  """Draws the norm, its limit, and a tick at each clipped step in the given row above the panel."""
  norm = trained.series["grad/norm"]
  axes.plot(_steps(norm), _positive(norm), color=colour, label=trained.label, **LINE)
  if math.isinf(trained.max_norm):
    return
  axes.axhline(trained.max_norm, color=colour, linestyle="--", label=f"limit {trained.max_norm:g}")
  clipped = _steps(norm)[trained.series["grad/scale"] < 1]
  # The ticks are off the curve: if most steps are clipped, marks on it would hide it.
  axes.plot(
    clipped, np.full(clipped.shape, 1 + 0.035 * row), color=colour, linestyle="", marker="|", markersize=7,
    transform=axes.get_xaxis_transform(), clip_on=False, label=f"clipped at {trained.max_norm:g}",
  )  # fmt: skip


def _steps(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
  return np.arange(1, values.size + 1)


def _positive(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
  """The values that a log axis can show; the rest becomes NaN, a gap in the line."""
  return np.where(np.isfinite(values) & (values > 0), values, np.nan)
