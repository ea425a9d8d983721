"""What a clip does to the optimizer's step, as `clip_effect` measured it: one section per such state.

The figure compares the step with the step that the optimizer would take without the clip: the ratio of their norms,
their cosine, and the ratio by leaf, on one step axis with the marks of the verdict. The words cover the steps after the
warm-up, as the verdict does.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clipjax.metric_names import COSINE, GRAD_RATIO, RATIO
from clipjax.rules.base import is_no_limit
from clipjax.runs.effects import SAME, Effect, effect_of
from clipjax.runs.kept_steps import mean_kept
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import column, flag, unseen
from clipjax.runs.report import heatmap
from clipjax.runs.report.axes import (
  BLUE,
  DASHES,
  GREY,
  ORANGE,
  PURPLE,
  VERMILION,
  WIDE,
  bins_of,
  edge_marks,
  ink,
  line,
  log_axis,
  plain_axis,
  positive,
)
from clipjax.runs.report.grid import Steps, by_depth, steps_of
from clipjax.runs.report.html import code
from clipjax.runs.report.marks import Mark, inside, marks_of
from clipjax.runs.report.series import Vectors, medians, short, vectors
from clipjax.runs.report.shown import Section, Shown, section, share, span_words
from clipjax.runs.report.timeline import Panel, on_one_axis
from clipjax.runs.roles import effect_names
from clipjax.runs.schema import EFFECT, key_of
from clipjax.runs.words import number, percent

_ALIKE = 0.01  # Leaves count as equal if the parts of their steps that they keep differ by less.
_TURNED = 0.9  # The cosine axis begins here or below: a larger cosine is hardly a turn.


class Picture(NamedTuple):
  """What the figure of an effect draws; arrays have shape (n,), one entry per step, NaN for nonfinite or absent.

  Attributes:
    name: name of the state.
    steps: int64.
    ratio: float64, norm of the step over its norm without the clip; inf if that is 0.
    cosine: float64, cosine between the two steps.
    gradient: float64, gradient norm after the clip over the norm before it; inf if that is 0.
    bad: bool, whether the gradient or one of the two steps was nonfinite.
    begin: the first step after the warm-up.
    whole: the verdict's numbers for the steps after the warm-up; None if none was finite.
    leaves: ratios by leaf; None if they were not recorded.
    alone: bool, one per row of `leaves`, whether the row stands only for its own step.
    marks: marks of events and findings.
  """

  name: str
  steps: Ints
  ratio: Floats
  cosine: Floats
  gradient: Floats
  bad: Bools
  begin: int
  whole: Effect | None
  leaves: Vectors | None
  alone: Bools
  marks: tuple[Mark, ...]

  @property
  def late(self) -> Bools:
    """The steps after the warm-up."""
    return self.steps >= self.begin


def effects(shown: Shown) -> list[Section]:
  """One section per effect that was recorded."""
  names = effect_names(shown.run)
  found = [one for name in names if (one := picture_of(shown, name)) is not None]
  return [_section(one, is_named=len(names) > 1 or one.name != EFFECT) for one in found]


def picture_of(shown: Shown, name: str) -> Picture | None:
  """The effect `name`; None if nothing was recorded."""
  run, report, key = shown.run, shown.report, key_of(name, RATIO)
  seen = ~unseen(run, name)  # Steps that never reached the state repeat old numbers.
  ratio, cosine, gradient = (
    np.where(seen, _unbounded(column(run, key_of(name, quantity))), np.nan) for quantity in (RATIO, COSINE, GRAD_RATIO)
  )
  # The recorder stores nonfinite numbers as flags, so a flag without a number is a nonfinite step.
  bad = flag(run, key) & seen
  if not (bad | ~np.isnan(ratio)).any():
    return None
  leaves = vectors(run, key)
  alone = np.zeros(0, np.bool_) if leaves is None else inside(report.events, leaves.steps)
  begin, marks = int(run.steps[0]) + report.warmup_steps, marks_of(report.events, report.findings)
  whole = effect_of(run, name, begin)
  return Picture(name, run.steps, ratio, cosine, gradient, bad, begin, whole, leaves, alone, tuple(marks))


def _unbounded(values: Floats) -> Floats:
  """The ratios, with inf for the largest number of the dtype, which stands for a division by 0."""
  return np.where(is_no_limit(values), np.inf, values)


# The figure ---------------------------------------------------------------------------------------------------------


def figure(found: Picture, width: float = WIDE) -> Figure:
  """Ratio and cosine against the step, and below them the ratio by leaf."""
  parts = [
    Panel("Ratio to the step without the clip", 1.9, partial(_draw_ratios, found)),
    Panel("Cosine between the two steps", 1.1, partial(_draw_cosine, found)),
  ]
  if found.leaves is not None:
    height = heatmap.height_of(found.leaves, width) + 0.55
    parts.append(Panel("Ratio by leaf", height, partial(_draw_leaves, found.leaves, found.alone)))
  return on_one_axis(parts, found.marks, steps_of(found.steps), width)


def _draw_ratios(found: Picture, axes: Axes, axis: Steps, width: float) -> None:
  """Ratios of step and gradient on a log axis with a line at 1; marks at its edges for values that it cannot show."""
  bins, steps = bins_of(width), found.steps
  # At 1 the clip changes nothing; the gradient's line shows how much the clip scaled it.
  step, gradient = positive(found.ratio), positive(found.gradient)
  axes.axhline(1.0, color=ink(), linestyle=DASHES[1], linewidth=1.0)
  if steps[0] < found.begin <= steps[-1]:
    axes.axvspan(float(steps[0]), float(found.begin), color=GREY, alpha=0.12, linewidth=0, label="warm-up")
  line(axes, steps, gradient, bins, color=ORANGE, linewidth=2.6, alpha=0.55, label="gradient")
  line(axes, steps, step, bins, color=BLUE, label="step")
  log_axis(axes, np.concatenate([step, gradient, np.ones(1)]), most=5)
  edge_marks(axes, steps, found.bad, bins, 0.97, marker="x", color=VERMILION, label="nonfinite")
  edge_marks(axes, steps, np.isinf(found.ratio), bins, 0.93, marker="^", color=PURPLE, label="0 without the clip")
  edge_marks(axes, steps, found.ratio == 0, bins, 0.03, marker="o", color=GREY, label="0 with the clip")


def _draw_cosine(found: Picture, axes: Axes, axis: Steps, width: float) -> None:
  """Cosine on a linear axis that reaches from 0.9 or less to 1, or a negligible turn would look large."""
  line(axes, found.steps, found.cosine, bins_of(width), color=BLUE)
  plain_axis(axes, np.append(found.cosine, [_TURNED, 1.0]))
  axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _draw_leaves(leaves: Vectors, alone: Bools, axes: Axes, axis: Steps, width: float) -> None:
  heatmap.draw_ratios(axes, leaves, axis, width, alone)


# Words --------------------------------------------------------------------------------------------------------------


def _section(found: Picture, *, is_named: bool) -> str:
  title = "What the clip does to the step" + (f", {short(found.name, 60)}" if is_named else "")
  said = _global_words(found)
  alt = [f"{title}, {span_words(found.steps)}.", *said, *_leaf_words(found, partial(short, length=60))]
  parts = [" ".join([*said, *_leaf_words(found, code)]), *_reading(found)]
  return section(title, partial(figure, found), " ".join(alt), "".join(f"<p>{part}</p>" for part in parts))


def _global_words(found: Picture) -> list[str]:
  """Medians over the whole step, and how often the clip leaves it unchanged."""
  is_late = found.begin > found.steps[0]
  known = found.ratio[found.late & ~np.isnan(found.ratio)]
  gradient, whole, out = found.gradient[found.late], found.whole, []
  if whole is not None and not is_no_limit(whole.ratio):
    out.append(
      f"{'After the warm-up, the' if is_late else 'The'} median ratio is {number(whole.ratio)} and the median cosine "
      f"{number(whole.cosine)}. In {share(np.abs(known - 1) <= SAME)} steps the ratio is within {percent(SAME)} of 1."
    )
  elif not known.size:
    out.append("After the warm-up, no step was finite." if is_late else "No step was finite.")
  if (left := gradient[np.isfinite(gradient)]).size:
    out.append(f"The clip multiplies the gradient norm by {number(float(np.median(left)))} (median).")
  if count := int(np.isinf(known).sum()):
    out.append(f"At {count:,} of {known.size:,} steps nothing would move without the clip (triangles).")
  if count := int(found.bad.sum()):
    out.append(f"{count:,} {'step was' if count == 1 else 'steps were'} nonfinite.")
  return out


def _leaf_words(found: Picture, named: Callable[[str], str]) -> list[str]:
  """Names the leaf that keeps the smallest part of its step, and the one whose step grows most; empty for one leaf."""
  if found.leaves is None or len(found.leaves.names) == 1:
    return []
  names, late = found.leaves.names, found.leaves.steps >= found.begin
  values, at = found.leaves.values[late], np.searchsorted(found.steps, found.leaves.steps[late])
  if not np.isfinite(values).any():
    return ["No leaf has a finite ratio after the warm-up."]
  # Rows at spikes are over-represented, so each step counts as the row that was clipped as much.
  kept, length = mean_kept(values, found.gradient[at], found.gradient[found.late]), medians(values)
  # The two extremes: the leaf that the clip holds back most, and the leaf whose step it makes longer.
  low, high = int(np.nanargmin(kept)), int(np.nanargmax(length))
  is_short, is_long = kept[low] < 1 - SAME, length[high] > 1 + SAME
  if not is_short and not is_long:
    return [f"On average every leaf keeps its step to within {percent(SAME)}."]
  if not is_long and np.nanmax(kept) - kept[low] < _ALIKE:
    return [f"Every leaf keeps the same part of its step, {percent(kept[low])} on average."]
  least = f"{named(names[low])} keeps the smallest part of its step, {percent(kept[low])} on average."
  most = f"The step of {named(names[high])} grows most, {number(length[high])} times (median)."
  if is_no_limit(length[high]):
    most = f"{named(names[high])} would not move without the clip."
  return [
    least if is_short else f"No leaf loses more than {percent(SAME)} of its step on average.",
    most if is_long else f"The step of no leaf grows by more than {percent(SAME)} (median).",
  ]


def _reading(found: Picture) -> list[str]:
  """How to read the figure: its lines and its map."""
  lines = "At a ratio of 1, the clip changes nothing. Below 1, the step is shorter than without the clip. Above 1, it "
  lines += "is longer, which happens under Adam because it divides by gradients that the clip made small. At a cosine "
  lines += "of 1, the step keeps its direction. The wide line is the gradient norm after the clip over the norm before."
  if found.marks:
    lines += " Events and findings are marked as in the timeline."
  if found.leaves is None:
    return [lines, "Numbers by leaf were not recorded."]
  leaves = "By leaf: one row per leaf, the first on top. Blue is shorter, orange longer, faint unchanged. "
  depth = by_depth(found.leaves.names, found.leaves.values[:1].T, heatmap.MOST_LINES)
  if len(depth.values) < len(found.leaves.names):
    leaves += f"In a stack, each row shows the ratio farthest from 1 among {depth.per:,} neighbours. "
  return [lines, leaves + "Leaves are recorded at regular intervals; empty cells were not recorded."]
