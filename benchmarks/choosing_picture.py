"""The pictures of `choosing.py`: final loss against the threshold, with one panel per model."""

from collections.abc import Sequence

import numpy as np
from choosing_runs import ADVICE, NO_CLIP, OPTIMIZERS, P90, Study
from choosing_verdicts import At
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

LEGEND = ("curve", "holds", "advice", "other")
COLOURS = {1: "#009E73", 3: "#0072B2", 10: "#D55E00"}  # Okabe and Ito's, distinguishable with any colour vision.
COLUMNS = 3


def picture(studies: Sequence[Study], factors: Sequence[int]) -> Figure:
  """One panel for each model of an optimizer, at several rates."""
  columns = min(COLUMNS, len(studies))
  rows = -(-len(studies) // columns)
  figure = Figure(figsize=(4.6 * columns + 0.4, 3.6 * rows + 1.3), layout="constrained")
  title = OPTIMIZERS[studies[0].optimizer].title
  figure.suptitle(
    f"Final loss against max_norm under {title}, at {_listed(factors)} times the best stable learning rate"
  )
  panels = figure.subplots(rows, columns, squeeze=False)
  for s, axes in zip(studies, panels.flat, strict=False):
    _draw(axes, s, factors)
  for axes in panels.flat[len(studies) :]:
    axes.remove()
  handles, labels = panels.flat[0].get_legend_handles_labels()
  order = sorted(range(len(labels)), key=lambda i: LEGEND.index(handles[i].get_gid()))  # By columns.
  figure.legend(
    [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=4, frameon=False
  )
  return figure


def _listed(factors: Sequence[int]) -> str:
  return " and ".join([", ".join(map(str, factors[:-1])), str(factors[-1])] if len(factors) > 1 else map(str, factors))


def _draw(axes: Axes, s: Study, factors: Sequence[int]) -> None:
  """Draws medians and ranges over the seeds, points that hold, the advice, p90, and the stable rate without a clip."""
  stable = float(np.median(s.grid[:, s.stable]))
  shown = [loss for k in factors for loss in (s.cells[k].sweep, s.cells[k].rules[NO_CLIP])]
  lowest = min(float(loss.min()) for loss in shown)
  is_log = lowest > 0
  # A run that ends above its start has diverged; it is drawn at the upper edge.
  top = 1.2 * s.start if is_log else s.start + 0.2 * (s.start - lowest)
  for k in factors:
    at, colour = At(s, k), COLOURS[k]
    sweep = np.minimum(at.cell.sweep, 2 * top)
    medians = np.median(sweep, axis=0)
    axes.fill_between(s.thresholds, sweep.min(0), sweep.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(s.thresholds, medians, color=colour, linewidth=1.5, label=f"{k} times the stable rate", gid="curve")
    holds = np.array([at.trains and at.holds(losses) for losses in at.cell.sweep.T])
    axes.plot(
      s.thresholds[holds], medians[holds], color=colour, linestyle="", marker="o", markersize=5,
      label=f"within 5% or 0.05, {k} times", gid="holds",
    )  # fmt: skip
  advised = {k: float(np.median(s.cells[k].thresholds[ADVICE])) for k in factors}
  for k, value in advised.items() if len(set(advised.values())) > 1 else list(advised.items())[:1]:
    colour, label = (COLOURS[k], f"advice for {k} times") if len(set(advised.values())) > 1 else ("black", "advice")
    axes.axvline(value, color=colour, linestyle="--", linewidth=1.5, label=label, gid="advice")
  p90 = float(np.median(s.cells[factors[0]].thresholds[P90]))
  axes.axvline(p90, color="black", linestyle=":", linewidth=1.5, label="p90 as it is", gid="other")
  axes.axhline(stable, color="0.45", linewidth=1, label="stable rate without a clip", gid="other")
  axes.set_xscale("log")
  axes.set_xlim(s.thresholds[0], s.thresholds[-1])
  axes.xaxis.set_major_formatter("{x:g}")
  if is_log:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.85 * min(lowest, stable), top)
  else:
    axes.set_ylim(lowest - 0.1 * (s.start - lowest), top)
  axes.set_title(f"{s.title} (stable rate {s.rates[s.stable]:.2g})", fontsize=11)
  axes.set_xlabel("max_norm")
  axes.set_ylabel("Final loss")
  axes.grid(alpha=0.3)
