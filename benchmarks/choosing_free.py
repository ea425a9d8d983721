"""The part of the page of `choosing.py` about optimizers that divide out the scale of the gradient."""

from collections.abc import Sequence

import numpy as np
from choosing_page import FAST, is_slower, rules_section, table
from choosing_runs import ADVICE, AT_NEW, FACTORS, NO_CLIP, OPTIMIZERS, ROLLING, STRETCH, Study
from choosing_verdicts import At, anded, cells_of, held, hopeless


def free_section(groups: Sequence[Sequence[Study]], image: str) -> list[str]:
  """Optimizers that divide out the scale: the advice at the recorded rate and at higher ones."""
  lines = [
    f"## {anded([OPTIMIZERS[g[0].optimizer].title for g in groups])}",
    "",
    f"![Final loss against the threshold under {OPTIMIZERS[groups[0][0].optimizer].title}]({image})",
    "",
  ]
  for studies in groups:
    lines += [f"{OPTIMIZERS[studies[0].optimizer].title}:", "", *rules_section(studies, FACTORS)]
  everything = [s for studies in groups for s in studies]
  here, fast = cells_of(everything, [1]), cells_of(everything, FAST)
  rules = (ADVICE, NO_CLIP, "1.0", ROLLING, AT_NEW)
  said = anded([f"`{rule}` in {held(fast, rule)}" for rule in rules])
  above = sum(at.is_worse(at.cell.rules[ADVICE], at.cell.rules[NO_CLIP]) for at in fast)
  below = sum(at.is_worse(at.cell.rules[NO_CLIP], at.cell.rules[ADVICE]) for at in fast)
  return [
    *lines,
    f"At the recorded rate, the advice holds in {held(here, ADVICE)} of {len(here)} cells, training without a clip in "
    f"{held(here, NO_CLIP)}. At {anded([str(k) for k in FAST])} times the rate, {len(fast)} cells train with some "
    f"threshold, and {len(hopeless(everything, FAST))} with none. Of these {len(fast)} cells hold: {said}. The advice "
    f"ends above the run without a clip by more than the tolerance in {above}, and below it in {below}.",
    "",
    "Even the best threshold ends above the unclipped run at the stable rate by more than the tolerance in "
    f"{sum(map(is_slower, fast))} of the {len(fast)}: a clip does not compensate for a rate that is too high. "
    + claim(fast),
    "",
    *stretch_section(groups),
  ]


def claim(fast: Sequence[At]) -> str:
  """What the runs show about a threshold at a higher rate than the recorded one."""
  best = max((ADVICE, "1.0", ROLLING, AT_NEW), key=lambda rule: held(fast, rule))
  lead = held(fast, best) - held(fast, NO_CLIP)
  if lead > len(fast) / 4:
    return f"`{best}` holds most often there, in {lead} cells more than training without a clip."
  return (
    f"No rule beats training without a clip by more than {max(lead, 0)} cells, too few to recommend one for a "
    "higher rate than the recorded one."
  )


def stretch_section(groups: Sequence[Sequence[Study]]) -> list[str]:
  """How much longer or shorter a step is than the step of the unclipped gradient."""
  rows = []
  for studies in groups:
    for name in STRETCH:
      ratios = np.concatenate([s.stretch[name].ravel() for s in studies])
      largest = max(float(np.nanpercentile(s.stretch[name], 95)) for s in studies)
      low, middle, high = np.nanpercentile(ratios, [5, 50, 95])
      title = OPTIMIZERS[studies[0].optimizer].title
      rows.append([title, f"`{name}`", f"{low:.2f}", f"{middle:.2f}", f"{high:.2f}", f"{largest:.2f}"])
  return [
    "### How long the steps are",
    "",
    "The length of each step over the length of the step that the unclipped gradient would have made there, with its "
    "own second moment, at the stable rate:",
    "",
    *table(["optimizer", "threshold", "5th percentile", "median", "95th", "95th on the worst model"], rows, left=2),
    *lengths_text(groups),
    "",
  ]


def lengths_text(groups: Sequence[Sequence[Study]]) -> list[str]:
  """With which threshold the steps are as long as without a clip."""
  out = []
  for studies in groups:
    high = {name: max(float(np.nanpercentile(s.stretch[name], 95)) for s in studies) for name in STRETCH}
    title = OPTIMIZERS[studies[0].optimizer].title
    if max(high.values()) < 1.001:
      out.append(f"{title}: with any of these thresholds, every step is as long as without a clip.")
    else:
      said = anded([f"{high[name]:.2g} at `{name}`" for name in STRETCH])
      out.append(f"{title}: the threshold changes the length of the steps; on the worst model, one step in twenty is "
                 f"longer than without a clip by at least these factors: {said}.")  # fmt: skip
  return [" ".join(out)]
