"""The page that `choosing.py` writes, but for the long records: tables, and sentences that follow from them.

Every list, count and verdict is derived from the runs. A sentence that could turn out either way is made of both.
"""

import os
import platform
import shlex
import sys
from collections.abc import Sequence

import jax
import numpy as np
import optax
from choosing_runs import (
  ADVICE,
  AT_NEW,
  FACTORS,
  GUARD,
  GUARDS,
  HIGHER,
  JUMP_WINDOW,
  LOWER,
  MOMENTUM,
  NO_CLIP,
  OPTIMIZERS,
  P90,
  POISON_WEIGHT,
  ROLLING,
  ROLLING_WINDOW,
  SOURCES,
  STRETCH,
  SWEEP,
  TRIED,
  Study,
  spike_steps,
)
from choosing_verdicts import NATS, SHARE, At, anded, cells_of, held, held_by_factor, hopeless, tolerance
from small_models import MODELS, Array

FAST = FACTORS[1:]


def loss_text(x: float) -> str:
  """Three digits after the point for a small loss, none for a large one."""
  if np.isinf(x):
    return "inf"
  return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}" if abs(x) < 1e3 else f"{x:.0e}"


def median_text(losses: Array) -> str:
  """The median of the seeds."""
  return loss_text(float(np.median(losses)))


def bold(at: At, losses: Array) -> str:
  """The median, in bold where it holds."""
  return f"**{median_text(losses)}**" if at.holds(losses) else median_text(losses)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """A table whose first columns are aligned to the left."""
  lines = [head, ["---"] * left + ["--:"] * (len(head) - left), *rows]
  return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def kind(s: Study) -> str:
  """The kind of the model."""
  return s.title.split(",")[0]


def where(cells: Sequence[At]) -> str:
  """Cells in words."""
  return anded([f"{kind(at.study)} at {at.k} times" for at in cells])


def introduction(models: Sequence[str], are_new: bool, steps: int, seeds: int) -> list[str]:
  """What was done."""
  command = shlex.join(["python", "benchmarks/choosing.py", *sys.argv[1:]])
  old = anded([model.title for model in MODELS.values()])
  chosen = f" The rule and its constants were chosen on others: {old}." if are_new else ""
  return [
    "# Choosing `max_norm`",
    "",
    f"Made by `{command}` on {os.cpu_count()} {platform.machine()} cores, jax {jax.__version__}, optax "
    f"{optax.__version__}. Every number is measured, and the sentences with numbers are derived from them.",
    "",
    "A run without a clip has recorded its gradient norms. Which `max_norm` follows from them, for the same learning "
    "rate or for a higher one? `clipjax.runs.suggest_max_norm` has an answer, the *advice*: for SGD `p90` of the norms "
    "at the rate of the record and `p75 / k` at k times that rate, for optimizers that divide the scale of the "
    f"gradient out `2 * p90`. Here it is held against the best of {SWEEP.size} thresholds and of no clip, beside "
    "other rules.",
    "",
    f"The models are {anded(models)}.{chosen} They train for {steps} steps with {seeds} seed{'s'[: seeds - 1]} at a "
    f"constant learning rate, SGD with momentum {MOMENTUM:g}. The *stable rate* of a model is the one of 16 at which "
    f"its worst seed ends lowest without a clip, {anded([rate_steps(name) for name in OPTIMIZERS])} apart. A rule sees "
    "the norms and losses of the unclipped run of the same seed at that rate; p90 is the 90th percentile without the "
    f"first tenth. `{ROLLING}` clips at the median of the last {ROLLING_WINDOW} norms as it goes. `{AT_NEW}` has a "
    "record of its own, without a clip, at the rate of the 16 that is nearest to the new one.",
    "",
    "The final loss is the mean of the last tenth of the steps, and tables give its median over the seeds. It *holds* "
    f"where it is above the best by at most {SHARE:.0%} or {NATS:g}, whichever is more. A cell is one model at one "
    "rate. Cells in which the best threshold does not make half of the fall of the loss that the stable rate makes are "
    "left out of every count: no threshold trains there.",
    "",
  ]


def rate_steps(name: str) -> str:
  """How far apart the rates of an optimizer are."""
  rates = OPTIMIZERS[name].rates
  return f"a factor of {rates[1] / rates[0]:.3g} under {OPTIMIZERS[name].title}"


def needed_section(studies: Sequence[Study]) -> list[str]:
  """Whether a clip is needed at the stable rate, and what against."""
  cells = cells_of(studies, [1])
  worse = [at for at in cells if not at.holds(at.cell.rules[NO_CLIP])]
  better = [at for at in cells if at.is_worse(at.cell.rules[ADVICE], at.cell.rules[NO_CLIP])]
  rows = []
  for name in dict.fromkeys(s.optimizer for s in studies):
    own = [at for at in cells if at.study.optimizer == name]
    rows.append([OPTIMIZERS[name].title, *(f"{held(own, rule)} of {len(own)}" for rule in (NO_CLIP, ADVICE, "1.0"))])
  return [
    "## Is a clip needed?",
    "",
    "At the stable rate itself, cells that hold:",
    "",
    *table(["optimizer", NO_CLIP, ADVICE, "1.0"], rows),
    f"Without a clip {len(cells) - len(worse)} of {len(cells)} cells hold"
    + (
      f"; it does not in {anded([f'{kind(at.study)} ({OPTIMIZERS[at.study.optimizer].title})' for at in worse])}"
      * bool(worse)
    )
    + f". The advice ends above no clip by more than the tolerance in {len(better)}. So a clip there is an insurance, "
    "against what the next section shows.",
    "",
  ]


def poison_section(studies: Sequence[Study], steps: int) -> list[str]:
  """A few poisoned batches, with and without a guard."""
  at = ", ".join(map(str, spike_steps(steps)))
  lines = []
  for name in dict.fromkeys(s.optimizer for s in studies):
    own = [s for s in studies if s.optimizer == name]
    rows = [["no poison, no clip", *(median_text(s.grid[:, s.stable]) for s in own), ""]]
    for guard in GUARDS:
      cells = []
      for s in own:
        jump = f" ({median_text(s.poisoned.jump[guard])})"
        cells.append((f"**{median_text(s.poisoned.final[guard])}**" if survives(s, guard) else
                      median_text(s.poisoned.final[guard])) + jump)  # fmt: skip
      rows.append([guard, *cells, f"{sum(survives(s, guard) for s in own)} of {len(own)}"])
    lines += [f"{OPTIMIZERS[name].title}:", "", *table(["", *(kind(s) for s in own), "hold"], rows)]
  total = {guard: sum(survives(s, guard) for s in studies) for guard in GUARDS}
  said = anded([f"`{guard}` on {total[guard]}" for guard in GUARDS])
  return [
    "## What it insures against",
    "",
    f"The batches of steps {at} have targets drawn by chance and a loss {POISON_WEIGHT:g} times as heavy, at the "
    "stable rate. The threshold comes from the clean, unclipped run of the same seed. Each cell: final loss, and in "
    f"brackets the largest jump of the loss in the {JUMP_WINDOW} steps after a poisoned batch, whose own loss is left "
    "out. In bold: within the tolerance of the clean run.",
    "",
    *lines,
    f"Of {len(studies)} models and optimizers the loss is within the tolerance of the clean run: {said}. Under SGD an "
    "unclipped bad batch is one step as long as its gradient. Under Adam it is a step of its own, and then stands in "
    "the second moment for about 1 / (1 - b2) = 1000 steps, which makes every later step too small.",
    "",
  ]


def survives(s: Study, guard: str) -> bool:
  """Whether a guard ends within the tolerance of the clean run."""
  clean = float(np.median(s.grid[:, s.stable]))
  return bool(np.median(s.poisoned.final[guard]) <= clean + max(SHARE * abs(clean), NATS))


def rules_section(studies: Sequence[Study], factors: Sequence[int]) -> list[str]:
  """Every rule in every cell of one optimizer."""
  cells = cells_of(studies, factors)
  out = hopeless(studies, factors)
  rows = [["best of the sweep", *(loss_text(at.best) for at in cells), "", ""]]
  for rule in TRIED[OPTIMIZERS[studies[0].optimizer].scale_free]:
    single = sum(at.seeds(at.cell.rules[rule]) for at in cells)
    runs = sum(at.cell.sweep.shape[0] for at in cells)
    losses = [at.cell.rules[rule] for at in cells]
    texts = [bold(at, x) for at, x in zip(cells, losses, strict=True)]
    rows.append([f"`{rule}`", *texts, f"{held(cells, rule)} of {len(cells)}", f"{single} of {runs}"])
  head = ["rule", *(f"{kind(at.study)}, x{at.k}" for at in cells), "cells", "seeds"]
  left_out = f" Left out, as no threshold trains: {where(out)}." if out else ""
  return [
    *table(head, rows),
    'In bold: what holds. "seeds": runs that hold against the best threshold of their own seed, a harder test.'
    + left_out,
    "",
  ]


def sgd_section(studies: Sequence[Study], image: str) -> list[str]:
  """The budget against no clip, p90 and the best of the sweep."""
  cells = cells_of(studies, FAST)
  rows = []
  for at in cells:
    low, high = at.good_range()
    rows.append([
      at.study.title, f"{at.k} * {at.study.rates[at.study.stable]:.3g}",
      median_text(at.study.grid[:, at.study.stable]),
      *(bold(at, at.cell.rules[rule]) for rule in (NO_CLIP, P90, ADVICE)),
      f"{loss_text(at.best)} at {at.best_at:.2g}", f"{np.median(at.cell.thresholds[ADVICE]):.2g}",
      f"{low:.2g} to {high:.2g}",
    ])  # fmt: skip
  head = ["model", "learning rate", "stable rate, no clip", NO_CLIP, P90, ADVICE, "best of the sweep", "the advice is",
          "thresholds that hold"]  # fmt: skip
  slower, faster = sum(map(is_slower, cells)), sum(map(is_faster, cells))
  return [
    "## SGD at a higher rate",
    "",
    f"![Final loss against the threshold, for each model at {anded([str(k) for k in FAST])} times the rate]({image})",
    "",
    *table(head, rows, left=2),
    "The advice keeps the *step budget*: the product of rate and threshold bounds how far one step moves the "
    f"parameters (with momentum m, times 1 / (1 - m)). It holds in {held(cells, ADVICE)} of {len(cells)} of these "
    f"cells, p90 as it is in {held(cells, P90)}, 1.0 in {held(cells, '1.0')}, no clip in {held(cells, NO_CLIP)}.",
    "",
    "A higher rate with the budget kept is safe; it is not faster by itself. Against the unclipped run at the stable "
    f"rate even the best threshold ends higher by more than the tolerance in {slower} of {len(cells)} cells, and lower "
    f"by more than that in {faster}.",
    "",
    *aim(cells),
    "All rules, at the stable rate too:",
    "",
    *rules_section(studies, FACTORS),
  ]


def is_faster(at: At) -> bool:
  """Whether the best threshold ends below the unclipped run at the stable rate."""
  stable = float(np.median(at.study.grid[:, at.study.stable]))
  return at.best < stable - float(tolerance(stable))


def is_slower(at: At) -> bool:
  """Whether even the best threshold ends above the unclipped run at the stable rate."""
  stable = float(np.median(at.study.grid[:, at.study.stable]))
  return at.best > stable + float(tolerance(stable))


def aim(cells: Sequence[At]) -> list[str]:
  """On which side of the advice the best threshold lies, and what a step to either side costs."""
  ratios = sorted(at.best_at / float(np.median(at.cell.thresholds[ADVICE])) for at in cells)
  above = sum(ratio > 1 for ratio in ratios)
  rows = []
  for rule in (*LOWER[::-1], ADVICE, *HIGHER):
    excess = [at.excess(at.cell.rules[rule]) for at in cells]
    rows.append([f"`{rule}`", f"{held(cells, rule)} of {len(cells)}", f"{np.median(excess):.2f}", f"{max(excess):.3g}"])
  high, low = (sum(held(cells, rule) for rule in rules) for rules in (HIGHER, LOWER))
  side = "higher first" if high > low else "lower first" if low > high else "on either side"
  return [
    "Where to look further, if a second run can be afforded? The cells that hold, and how many tolerances above the "
    "best they end:",
    "",
    *table(["threshold", "hold", "in the middle", "at worst"], rows),
    f"The best of the sweep is {np.median(ratios):.2g} times the advice in the middle, from {ratios[0]:.2g} to "
    f"{ratios[-1]:.2g} times, and above it in {above} of {len(cells)}. Two and three times the advice hold {high} "
    f"times together, a half and a third of it {low} times: so look {side}.",
    "",
  ]


def sources_section(studies: Sequence[Study]) -> list[str]:
  """The budget from runs at other rates than the best."""
  cells = cells_of(studies, FAST)
  step = OPTIMIZERS["sgd"].rates[1] / OPTIMIZERS["sgd"].rates[0]
  rows = []
  for shift in (*SOURCES, 0):
    found = [at.cell.sources[shift] if shift else at.cell.rules[ADVICE] for at in cells]
    texts = [bold(at, losses) for at, losses in zip(cells, found, strict=True)]
    kept = sum(at.holds(losses) for at, losses in zip(cells, found, strict=True))
    rows.append([f"{step**shift:.3g}", *texts, f"{kept} of {len(cells)}"])
  return [
    "### A record at another rate than the stable one",
    "",
    "The same fast rates, but the norms were recorded at a fraction of the stable rate, and k is counted from there:",
    "",
    *table(["recorded at", *(f"{kind(at.study)}, x{at.k}" for at in cells), "cells"], rows),
    "The budget hands on the pace of the record: from a slow run it is safe and slow. Take the norms from a run at the "
    "best rate that is stable without a clip.",
    "",
  ]


def free_section(groups: Sequence[Sequence[Study]], image: str) -> list[str]:
  """Optimizers that divide the scale out: the guard at the rate of the record, and at others."""
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
  below = [at for at in fast if at.is_worse(at.cell.rules[ADVICE], at.cell.rules[NO_CLIP])]
  above = [at for at in fast if at.is_worse(at.cell.rules[NO_CLIP], at.cell.rules[ADVICE])]
  lost = hopeless(everything, FAST)
  return [
    *lines,
    f"At the rate of the record the guard holds in {held(here, ADVICE)} of {len(here)} cells, no clip in "
    f"{held(here, NO_CLIP)}. At {anded([str(k) for k in FAST])} times the rate, of {len(fast)} cells hold: {said}. "
    f"Against no clip the guard of the record ends higher by more than the tolerance in {len(below)} "
    f"and lower by more in {len(above)}; in {len(lost)} more cells nothing trains. " + claim(fast, below),
    "",
    *stretch_section(groups),
  ]


def claim(fast: Sequence[At], below: Sequence[At]) -> str:
  """What may be said of the guard at another rate than that of the record."""
  best = max((ROLLING, AT_NEW, NO_CLIP, "1.0"), key=lambda rule: held(fast, rule))
  if held(fast, ADVICE) > held(fast, best) and not below:
    return "Here nothing did better than the guard of the record at another rate."
  return (
    f"`{best}` holds at least as often there as the guard of the record, which is therefore given for the rate of the "
    "record alone. A clip does not make up for a rate that is too high."
  )


def stretch_section(groups: Sequence[Sequence[Study]]) -> list[str]:
  """How much longer or shorter a step is than that of the unclipped gradient."""
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
    "The length of each step over that of the step that the unclipped gradient would have made there, with a second "
    "moment of its own, at the stable rate:",
    "",
    *table(["optimizer", "threshold", "5th percentile", "middle", "95th", "95th of the worst model"], rows, left=2),
    *lengths_text(groups),
    "",
  ]


def lengths_text(groups: Sequence[Sequence[Study]]) -> list[str]:
  """Under which threshold the steps are as long as without a clip."""
  out = []
  for studies in groups:
    high = {name: max(float(np.nanpercentile(s.stretch[name], 95)) for s in studies) for name in STRETCH}
    title = OPTIMIZERS[studies[0].optimizer].title
    if max(high.values()) < 1.001:
      out.append(f"{title}: every step is as long with any of these thresholds as without a clip.")
    else:
      said = anded([f"{high[name]:.2g} at `{name}`" for name in STRETCH])
      out.append(f"{title}: steps are not as long with one threshold as with another; on the worst model one in twenty "
                 f"is longer than without a clip by these factors or more: {said}.")  # fmt: skip
  return [" ".join(out)]


def summary(groups: Sequence[Sequence[Study]], old: Sequence[Study]) -> list[str]:
  """The advice, and how it fared."""
  everything = [s for studies in groups for s in studies]
  lines = ["## In short", ""]
  here = cells_of(everything, [1])
  for studies in groups:
    title, free = OPTIMIZERS[studies[0].optimizer].title, OPTIMIZERS[studies[0].optimizer].scale_free
    counts = {rule: held_by_factor(studies, FACTORS, rule) for rule in (ADVICE, NO_CLIP, "1.0", P90, ROLLING)}
    others = anded([f"`{rule}` {counts[rule]}" for rule in (NO_CLIP, "1.0", P90, ROLLING)])
    what = f"`{GUARD}`" if free else "`p90`, and `p75 / k` at a higher rate"
    lines.append(
      f"- {title}: the advice, {what}, holds at {anded([str(k) for k in FACTORS])} times the rate in {counts[ADVICE]} "
      f"models; {others}."
    )
  lines.append(
    f"- At the rate of the record no clip holds in {held(here, NO_CLIP)} of {len(here)}: there a clip is an insurance. "
    f"With poisoned batches no clip holds in {sum(survives(s, NO_CLIP) for s in everything)} of {len(everything)}, "
    f"`{GUARD}` in {sum(survives(s, GUARD) for s in everything)}."
  )
  if old:
    fast = cells_of(old, FAST)
    lines.append(
      f"- On {anded([kind(s) for s in old])}, of the models that the rule was chosen on, under SGD: the advice holds "
      f"in {held(fast, ADVICE)} of {len(fast)} at {anded([str(k) for k in FAST])} times the rate, no clip in "
      f"{held(fast, NO_CLIP)}, p90 in {held(fast, P90)}."
    )
  return [*lines, ""]


def old_section(studies: Sequence[Study]) -> list[str]:
  """The models that the rule was chosen on."""
  return [
    "## The models that the rule was chosen on",
    "",
    f"SGD, with {studies[0].grid.shape[0]} seed{'s'[: studies[0].grid.shape[0] - 1]}:",
    "",
    *rules_section(studies, FACTORS),
    *aim(cells_of(studies, FAST)),
  ]
