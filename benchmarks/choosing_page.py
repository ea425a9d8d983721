"""The page of `choosing.py`, except for the long records: tables, and sentences that follow from them.

Every list, count and verdict is derived from the runs. A sentence that could turn out either way has both versions.
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
  BUDGET,
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
  SWEEP,
  TRIED,
  Study,
  spike_steps,
)
from choosing_verdicts import NATS, SHARE, At, anded, cells_of, held, hopeless, tolerance
from small_models import MODELS, Array

FAST = FACTORS[1:]


def loss_text(x: float) -> str:
  """A loss with three decimals if it is small, with fewer if it is large."""
  if np.isinf(x):
    return "inf"
  return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}" if abs(x) < 1e3 else f"{x:.0e}"


def median_text(losses: Array) -> str:
  """The median over the seeds."""
  return loss_text(float(np.median(losses)))


def bold(at: At, losses: Array) -> str:
  """The median, in bold if it holds."""
  return f"**{median_text(losses)}**" if at.holds(losses) else median_text(losses)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """A table whose first `left` columns are left-aligned."""
  lines = [head, ["---"] * left + ["--:"] * (len(head) - left), *rows]
  return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def named(title: str) -> str:
  """A model's name in a sentence, with its size in brackets."""
  name, _, size = title.partition(", ")
  return f"{name} ({size})" if size else name


def kind(s: Study) -> str:
  """The model's name without its size."""
  return s.title.split(",")[0]


def where(cells: Sequence[At]) -> str:
  """Cells in words."""
  return anded([f"{kind(at.study)} at {at.k} times" for at in cells])


def introduction(models: Sequence[str], are_new: bool, steps: int, seeds: int) -> list[str]:
  """What was done."""
  command = shlex.join(["python", "benchmarks/choosing.py", *sys.argv[1:]])
  old = anded([named(model.title) for model in MODELS.values()])
  chosen = f" The rule and its constants were chosen on other models: {old}." if are_new else ""
  return [
    "# Choosing `max_norm`",
    "",
    f"Made by `{command}` on {os.cpu_count()} {platform.machine()} cores, jax {jax.__version__}, optax "
    f"{optax.__version__}. Every number is measured, and every sentence with a number is derived from the runs.",
    "",
    "A run without a clip has recorded its gradient norms. Which `max_norm` follows from them, at the same learning "
    "rate or at a higher one? `clipjax.runs.suggest_max_norm` gives this *advice*: for SGD, `p90` of the norms at the "
    "recorded rate and `p75 / k` at k times that rate; for optimizers that divide out the scale of the gradient, "
    f"`2 * p90`. This page compares the advice and other rules with the best of {SWEEP.size} thresholds and with no "
    "clip at all.",
    "",
    f"The models: {anded([named(title) for title in models])}.{chosen} They train for {steps} steps with {seeds} "
    f"seed{'s'[: seeds - 1]} at a constant learning rate; SGD has momentum {MOMENTUM:g}. The *stable rate* of a model "
    "is the one of 16 rates at which its worst seed ends lowest without a clip; neighbouring rates differ by a factor "
    f"of {anded([rate_steps(name) for name in OPTIMIZERS])}. A rule sees the norms and losses of the unclipped run "
    "with the same seed at that rate; p90 is the 90th percentile after the first tenth of the steps. "
    f"`{ROLLING}` clips at the median of the last {ROLLING_WINDOW} norms during training. `{AT_NEW}` takes its norms "
    "from another run without a clip, at the one of the 16 rates that is nearest to the new rate.",
    "",
    "The final loss is the mean over the last tenth of the steps; tables give its median over the seeds. It *holds* "
    f"if it exceeds the best by at most {SHARE:.0%} or {NATS:g}, whichever is more. A cell is one model at one "
    "rate. Cells whose best threshold lowers the loss by less than half as much as the stable rate does are left out "
    "of every count: no threshold trains there.",
    "",
  ]


def rate_steps(name: str) -> str:
  """The factor between neighbouring rates of an optimizer."""
  rates = OPTIMIZERS[name].rates
  return f"{rates[1] / rates[0]:.3g} under {OPTIMIZERS[name].title}"


def needed_section(studies: Sequence[Study]) -> list[str]:
  """Whether a clip is needed at the stable rate."""
  cells = cells_of(studies, [1])
  worse = [at for at in cells if not at.holds(at.cell.rules[NO_CLIP])]
  better = [at for at in cells if at.is_worse(at.cell.rules[ADVICE], at.cell.rules[NO_CLIP])]
  return [
    "## Is a clip needed?",
    "",
    f"At the stable rate, {len(cells) - len(worse)} of {len(cells)} cells hold without a clip"
    + (f"; not {anded([f'{kind(at.study)} ({OPTIMIZERS[at.study.optimizer].title})' for at in worse])}" * bool(worse))
    + f". The advice ends above the run without a clip by more than the tolerance in {len(better)}. A clip at this "
    "rate is therefore insurance; the next section shows against what.",
    "",
  ]


def poison_section(studies: Sequence[Study], steps: int) -> list[str]:
  """A few poisoned batches, with and without a clip."""
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
  said = anded([f"`{guard}` {total[guard]}" for guard in GUARDS])
  return [
    "## What it insures against",
    "",
    f"At the stable rate, the batches of steps {at} get random targets and a loss {POISON_WEIGHT:g} times as heavy. "
    "The threshold comes from the clean, unclipped run with the same seed. Each cell shows the final loss, and in "
    f"brackets the largest jump of the loss in the {JUMP_WINDOW} steps after a poisoned batch, without the loss of "
    "that batch. Bold: within the tolerance of the clean run.",
    "",
    *lines,
    f"In how many of {len(studies)} pairs of model and optimizer the loss stays within the tolerance of the clean run: "
    f"{said}. Under SGD, an unclipped bad batch is one step as long as its gradient. Under Adam, it is one bad step, "
    "and then stays in the second moment for about 1 / (1 - b2) = 1000 steps, which makes every later step too small.",
    "",
  ]


def survives(s: Study, guard: str) -> bool:
  """Whether a run with this clip ends within the tolerance of the clean run."""
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
  left_out = f" Left out because no threshold trains: {where(out)}." if out else ""
  return [
    *table(head, rows),
    'Bold: holds. "seeds": runs that hold against the best threshold for their own seed, a harder test.' + left_out,
    "",
  ]


def sgd_section(studies: Sequence[Study], image: str) -> list[str]:
  """The step budget compared with no clip, p90 and the best of the sweep."""
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
    f"parameters (with momentum m, times 1 / (1 - m)). It holds in {held(cells, ADVICE)} of these {len(cells)} cells, "
    f"plain p90 in {held(cells, P90)}, 1.0 in {held(cells, '1.0')}, training without a clip in {held(cells, NO_CLIP)}.",
    "",
    "A higher rate under the same budget is safe, but not faster by itself. Compared with the unclipped run at the "
    f"stable rate, even the best threshold ends higher by more than the tolerance in {slower} of {len(cells)} cells, "
    f"and lower by more than the tolerance in {faster}.",
    "",
    *aim(cells),
    "All rules, including the stable rate:",
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
  rows = []
  for rule in (*LOWER[::-1], ADVICE, *HIGHER):
    excess = [at.excess(at.cell.rules[rule]) for at in cells]
    rows.append([f"`{rule}`", f"{held(cells, rule)} of {len(cells)}", f"{np.median(excess):.2f}", f"{max(excess):.3g}"])
  near = [rule for rule in (*LOWER[::-1], *HIGHER) if held(cells, rule) >= held(cells, ADVICE) - 1]
  return [
    "Which threshold should a second run try? For each, the cells that hold, and how many tolerances above the best "
    "they end:",
    "",
    *table(["threshold", "hold", "median", "worst"], rows),
    f"The best threshold of the sweep is {np.median(ratios):.2g} times the advice (median), between {ratios[0]:.2g} "
    f"and {ratios[-1]:.2g} times, and above it in {sum(ratio > 1 for ratio in ratios)} of {len(cells)} cells. These "
    f"hold in at most one cell fewer than the advice: {anded([f'`{rule}`' for rule in near])}.",
    "",
  ]


def sources_section(studies: Sequence[Study]) -> list[str]:
  """The step budget from records at lower rates."""
  cells = cells_of(studies, FAST)
  step = OPTIMIZERS["sgd"].rates[1] / OPTIMIZERS["sgd"].rates[0]
  rows = []
  for shift in (*SOURCES, 0):
    found = [at.cell.sources[shift] if shift else at.cell.rules[ADVICE] for at in cells]
    texts = [bold(at, losses) for at, losses in zip(cells, found, strict=True)]
    kept = sum(at.holds(losses) for at, losses in zip(cells, found, strict=True))
    rows.append([f"{step**shift:.3g}", *texts, f"{kept} of {len(cells)}"])
  return [
    "### A record at a lower rate",
    "",
    "The same fast rates, but with norms recorded at a fraction of the stable rate, from which k counts:",
    "",
    *table(["recorded at", *(f"{kind(at.study)}, x{at.k}" for at in cells), "cells"], rows),
    "The budget inherits the pace of the record: from a slow run it is safe and slow. Record the norms at the best "
    "rate that is stable without a clip.",
    "",
  ]


def summary(groups: Sequence[Sequence[Study]], old: Sequence[Study], longs: Sequence[str]) -> list[str]:
  """The advice, and how often it holds."""
  everything = [s for studies in groups for s in studies]
  rules = (ADVICE, NO_CLIP, "1.0", P90, ROLLING)
  rows = []
  for studies in groups:
    title, free = OPTIMIZERS[studies[0].optimizer].title, OPTIMIZERS[studies[0].optimizer].scale_free
    for k in FACTORS:
      cells = cells_of(studies, [k])
      what = GUARD if free else P90 if k == 1 else BUDGET
      rows.append([f"{title}, x{k}", f"`{what}`", *(f"{held(cells, rule)} of {len(cells)}" for rule in rules)])
  here = cells_of(everything, [1])
  lines = [
    "## In short",
    "",
    "On how many models the advice and other rules hold, at 1, 3 and 10 times the recorded rate:",
    "",
    *table(["", "the advice is", ADVICE, *(f"`{rule}`" for rule in rules[1:])], rows, left=2),
    f"- At the recorded rate, training without a clip holds in {held(here, NO_CLIP)} of {len(here)} cells: there, a "
    "clip is insurance. With poisoned batches, training without a clip holds in "
    f"{sum(survives(s, NO_CLIP) for s in everything)} of {len(everything)}, "
    f"`{GUARD}` in {sum(survives(s, GUARD) for s in everything)}.",
    *longs,
  ]
  if old:
    fast = cells_of(old, FAST)
    lines.append(
      f"- Under SGD on {anded([kind(s) for s in old])}, models that the rule was chosen on: the advice holds in "
      f"{held(fast, ADVICE)} of {len(fast)} cells at {anded([str(k) for k in FAST])} times the rate, training without "
      f"a clip in {held(fast, NO_CLIP)}, p90 in {held(fast, P90)}."
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
