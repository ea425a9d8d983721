"""How to choose `max_norm`: rules that read the norms of one unclipped run, against a sweep of 16 thresholds.

Run `python benchmarks/choosing.py [--quick] [--models rnn mlp] [--steps 300] [--seeds 5] [--out docs/choosing.md]`:
it trains what `choosing_runs.py` says, on the models of `small_models.py`, and writes the page and, beside it, the
picture. Every number of the page is taken from the runs, and every list and verdict is derived from them.
"""

import argparse
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import optax
from choosing_runs import (
  ADAM_RATES,
  FACTORS,
  FAMILY,
  FINAL,
  GUARDS,
  JUMP_WINDOW,
  MOMENTUM,
  POISON_WEIGHT,
  RULES,
  SGD_RATES,
  SOURCE_RULES,
  SOURCES,
  SUGGESTED,
  THRESHOLDS,
  Study,
  spike_steps,
  study,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from small_models import MODELS, Array

MIN_STEPS = 30  # Less leaves no room for the poisoned batches.
SHARE, NATS = 0.05, 0.05  # A loss holds where it is above the best by no more than this share, or so many nats.
ADAM_GUARD = "2 * p90"
LEGEND = ("curve", "holds", "suggested", "other")
COLOURS = {3: "#0072B2", 10: "#D55E00"}  # Okabe and Ito's, which are told apart with any colour vision.


def tolerance(best: Array | float) -> Array:
  """How far above the best a loss may be."""
  return np.maximum(SHARE * np.asarray(best), NATS)


def excess(losses: Array, best: Array | float) -> float:
  """The median of the seeds above the best, in tolerances; at most 1 where it holds."""
  return float((np.median(losses) - best) / tolerance(best))


def best_of(sweep: Array) -> float:
  """The lowest median of the thresholds."""
  return float(np.median(sweep, axis=0).min())


def seeds_within(losses: Array, sweep: Array) -> int:
  """Seeds whose loss holds against the best threshold of the same seed."""
  best = sweep.min(axis=1)
  return int((losses <= best + tolerance(best)).sum())


def good_range(sweep: Array) -> tuple[float, float]:
  """The lowest and the highest threshold around the best whose medians, without a gap, hold."""
  medians = np.median(sweep, axis=0)
  holds = medians <= medians.min() + tolerance(medians.min())
  low = high = int(medians.argmin())
  while low > 0 and holds[low - 1]:
    low -= 1
  while high + 1 < holds.size and holds[high + 1]:
    high += 1
  return float(THRESHOLDS[low]), float(THRESHOLDS[high])


# Markdown -----------------------------------------------------------------------------------------------------------


def loss_text(x: float) -> str:
  """Three digits after the point for a small loss, none for a large one."""
  return "inf" if math.isinf(x) else f"{x:.3f}" if x < 10 else f"{x:,.0f}" if x < 1e4 else f"{x:.0e}"


def median_text(losses: Array) -> str:
  """The median of the seeds."""
  return loss_text(float(np.median(losses)))


def row(cells: Sequence[str]) -> str:
  """A line of a table."""
  return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """A table whose first columns are aligned to the left."""
  return [row(head), row(["---"] * left + ["--:"] * (len(head) - left)), *(row(cells) for cells in rows), ""]


def cells_of(studies: Sequence[Study]) -> list[tuple[Study, int]]:
  """Every model at every fast rate."""
  return [(s, k) for s in studies for k in FACTORS]


def introduction(steps: int, seeds: int) -> list[str]:
  """What was done."""
  command = shlex.join(["python", "benchmarks/choosing.py", *sys.argv[1:]])
  return [
    "# Choosing `max_norm`",
    "",
    f"Made by `{command}` on {os.cpu_count()} {platform.machine()} cores, jax {jax.__version__}, optax "
    f"{optax.__version__}. Every number is measured, and the sentences with numbers are derived from them.",
    "",
    "A run without a clip has recorded its gradient norms. Which `max_norm` follows from them, for the same learning "
    "rate or for a higher one? The usual advice is a percentile of the norms, about the 90th "
    "([tuning playbook](https://github.com/google-research/tuning_playbook)), or half to ten times their mean "
    "([Pascanu et al., 2013](https://arxiv.org/abs/1211.5063)). Here both, and others, are held against the best of "
    f"{THRESHOLDS.size} thresholds.",
    "",
    f"Small models train for {steps} steps with {seeds} seed{'s'[: seeds - 1]}, at a constant learning rate. "
    f"The *stable rate* of a model is the one of {SGD_RATES.size} (a factor "
    f"of {SGD_RATES[1] / SGD_RATES[0]:.3g} apart) at which its worst "
    f"seed ends lowest without a clip. The *fast rates* are {' and '.join(map(str, FACTORS))} times that. A rule sees "
    "only the norms of the unclipped run of the same seed at the stable rate, its first tenth left out, and k, the "
    "fast rate over the stable one; p90 is their 90th percentile, p75 the 75th. The final loss is the training loss in "
    "nats, mean of the last "
    f"{FINAL} steps, and tables give its median over the seeds. It *holds* where it is above the best threshold's by "
    f"at most {SHARE:.0%} or {NATS:g} nats, whichever is more.",
    "",
  ]


def summary(sgd: Sequence[Study], adam: Sequence[Study]) -> list[str]:
  """The rules, and how they fared."""
  cells = cells_of(sgd)
  held = sum(excess(s.fast[k].rules[SUGGESTED], best_of(s.fast[k].sweep)) <= 1 for s, k in cells)
  single = sum(seeds_within(s.fast[k].rules[SUGGESTED], s.fast[k].sweep) for s, k in cells)
  runs = sum(s.fast[k].sweep.shape[0] for s, k in cells)
  plain = sum(excess(s.fast[k].rules["p90"], best_of(s.fast[k].sweep)) <= 1 for s, k in cells)
  faster = sum(excess(s.grid[:, s.stable], best_of(s.fast[k].sweep)) > 1 for s, k in cells)
  guarded = [excess(s.poisoned.final[ADAM_GUARD], float(np.median(s.poisoned.clean))) <= 1 for s in adam]
  open_ = [excess(s.poisoned.final["no clip"], float(np.median(s.poisoned.clean))) <= 1 for s in adam]
  return [
    "## In short",
    "",
    f"- SGD with momentum {MOMENTUM:g}: `max_norm = {SUGGESTED[:3]} * learning_rate / new_learning_rate`. "
    "This keeps the *step budget*: the product of rate and threshold bounds how far one step moves the parameters "
    f"(with momentum m, times 1 / (1 - m)). It holds in {held} of {len(cells)} cells, and for "
    f"{single} of {runs} single runs against the best threshold of the same seed; p90 as it is holds in "
    f"{plain} of {len(cells)}.",
    f"- Adam and other optimizers that divide the scale out: `max_norm = {ADAM_GUARD}`, just above the usual "
    "norms, whatever the rate. The threshold hardly matters, but for spikes: with poisoned batches the guard ends "
    f"within the tolerance of the clean run on {sum(guarded)} of {len(adam)} models, no clip on "
    f"{sum(open_)} of {len(adam)}.",
    "- Take the norms from a run at the best rate that is stable without a clip. The budget hands on the pace of that "
    "run: from a slower one it comes out too low ([below](#norms-of-a-run-at-another-rate)).",
    "- A higher rate with the budget kept is safe, not faster: where nearly every step is clipped, only the product "
    f"of rate and threshold counts. Even the best threshold ends below the unclipped run at the stable rate, by more "
    f"than the tolerance, in {faster} of {len(cells)} cells.",
    "",
  ]


def fast_section(studies: Sequence[Study], image: str) -> list[str]:
  """The suggested threshold against no clip, p90 and the best of the sweep."""
  rows, ranges, cliffs = [], [], 0
  for s, k in cells_of(studies):
    fast = s.fast[k]
    low, high = good_range(fast.sweep)
    best = best_of(fast.sweep)
    at = THRESHOLDS[np.median(fast.sweep, axis=0).argmin()]
    ranges.append(high / low)
    medians = np.median(fast.sweep, axis=0)
    cliffs += np.interp(4 * high, THRESHOLDS, medians) > np.interp(low / 4, THRESHOLDS, medians)
    rows.append([
      s.title, f"{k} * {s.rates[s.stable]:.3g}", median_text(s.grid[:, s.stable]),
      *(median_text(fast.rules[r]) for r in ("no clip", "p90")), f"**{median_text(fast.rules[SUGGESTED])}**",
      f"{loss_text(best)} at {at:.2g}", f"{np.median(fast.thresholds[SUGGESTED]):.2g}", f"{low:.2g} to {high:.2g}",
      f"{seeds_within(fast.rules[SUGGESTED], fast.sweep)} of {fast.sweep.shape[0]}",
    ])  # fmt: skip
  head = [
    "model", "learning rate", "stable rate, no clip", "no clip", "p90", f"`{SUGGESTED}`", "best of the sweep",
    f"`{SUGGESTED}` is", "thresholds that hold", "seeds that hold",
  ]  # fmt: skip
  trains = [
    f"{s.title} at {k} times"
    for s, k in cells_of(studies)
    if excess(s.fast[k].rules["no clip"], best_of(s.fast[k].sweep)) <= 1
  ]
  near = [
    f"{s.title} at {k} times ({median_text(s.fast[k].rules['no clip'])})"
    for s, k in cells_of(studies)
    if excess(s.fast[k].rules["no clip"], best_of(s.fast[k].sweep)) > 1 and np.median(s.fast[k].rules["no clip"]) < 1
  ]
  return [
    f"## SGD with momentum {MOMENTUM:g}, {' and '.join(map(str, FACTORS))} times too fast",
    "",
    f"![Final loss against the threshold, for each model at two learning rates]({image})",
    "",
    *table(head, rows, left=2),
    f"How steep the curve is: the thresholds that hold, without a gap around the best, span a factor of "
    f"{min(ranges):g} to {max(ranges):g} (the sweep has a factor of {THRESHOLDS[1] / THRESHOLDS[0]:g} between two). "
    "Below the range training is slower; above it it breaks. Four times above the range (or at the top of the sweep) "
    f"the loss is further from the best than four times below it in {cliffs} of {len(ranges)} cells, so if in doubt go "
    "lower.",
    "",
    f"Without a clip the loss is within the tolerance in: {listed(trains)}. It is worse, but the model still trains "
    f"to below 1 nat, in: {listed(near)}. In all other cells it diverges or stalls.",
    "",
  ]


def listed(names: Sequence[str]) -> str:
  """The names, or that there are none."""
  return ", ".join(names) or "none"


def rules_section(studies: Sequence[Study]) -> list[str]:
  """Every rule in every cell."""
  cells = cells_of(studies)
  rows, worst, missed = [], {}, {}
  for rule in RULES:
    over = [excess(s.fast[k].rules[rule], best_of(s.fast[k].sweep)) for s, k in cells]
    worst[rule], missed[rule] = max(over), sum(x > 1 for x in over)
    texts = [f"{median_text(s.fast[k].rules[rule])}" for s, k in cells]
    single = sum(seeds_within(s.fast[k].rules[rule], s.fast[k].sweep) for s, k in cells)
    rows.append([
      f"`{rule}`" if rule != FAMILY else rule,
      *(f"**{t}**" if x <= 1 else t for t, x in zip(texts, over, strict=True)),
      f"{len(cells) - missed[rule]} of {len(cells)}",
      f"{single} of {sum(s.fast[k].sweep.shape[0] for s, k in cells)}",
      f"{worst[rule]:.2f}" if worst[rule] < 10 else f"{min(worst[rule], 999):.0f}" + "+" * (worst[rule] > 999),
    ])  # fmt: skip
  whole = sorted((rule for rule in RULES if not missed[rule]), key=lambda rule: worst[rule])
  head = ["rule", *(f"{short_title(s)}, x{k}" for s, k in cells), "cells", "seeds", "worst"]
  fixed = ("p90", "mean / 2", "10 * mean", FAMILY)
  best_row = [loss_text(best_of(s.fast[k].sweep)) for s, k in cells]
  return [
    "## The rules compared",
    "",
    'In bold: what holds. "seeds": runs that hold against the best threshold of their own seed, a harder test. '
    '"worst": the largest distance to the best in tolerances; up to 1 holds. "rms" is the root mean square of the '
    "norms; the table by model family is the rule of thumb (feed-forward 5-10, CNN 1-5, RNN 0.25-1, Transformer "
    "0.5-2) at its geometric middle.",
    "",
    *table(head, [["best of the sweep", *best_row, "", "", ""], *rows]),
    f"Rules that hold in every cell, the best worst case first: {listed([f'`{rule}`' for rule in whole])}. Of the "
    "rules that do not look at the rate, "
    + ", ".join(f"{rule} holds in {len(cells) - missed[rule]} of {len(cells)}" for rule in fixed)
    + ". Half the mean to ten times the mean is advice for a run at the rate that the norms were recorded at.",
    "",
    "Of these the percentiles are the ones that a few spikes in the record do not move, as they move a mean or a root "
    f"mean square. `p90 / k` (worst {worst['p90 / k']:.2f}) lies nearer to the steep side of the range than "
    f"`{SUGGESTED}` (worst {worst[SUGGESTED]:.2f}), which is the same budget with a margin.",
    "",
  ]


def short_title(s: Study) -> str:
  """The kind of the model."""
  return s.title.split(",")[0]


def sources_section(studies: Sequence[Study]) -> list[str]:
  """The budget from runs at other rates than the best."""
  cells = cells_of(studies)
  step = SGD_RATES[1] / SGD_RATES[0]
  rows, failed = [], []
  for rule in SOURCE_RULES:
    for shift in sorted((*SOURCES, 0)):
      found = [(s.fast[k].sources[rule, shift] if shift else s.fast[k].rules[rule]) for s, k in cells]
      over = [excess(x, best_of(s.fast[k].sweep)) for x, (s, k) in zip(found, cells, strict=True)]
      texts = [f"**{median_text(x)}**" if o <= 1 else median_text(x) for x, o in zip(found, over, strict=True)]
      rows.append([f"`{rule}`", f"{step**shift:.3g}", *texts, f"{sum(o <= 1 for o in over)} of {len(cells)}"])
      if rule == SUGGESTED:
        failed.append(f"{step**shift:.3g} times: {sum(o > 1 for o in over)} of {len(cells)}")
  return [
    "## Norms of a run at another rate",
    "",
    "The same fast rates, but the norms were recorded at a fraction or a multiple of the stable rate, and k is counted "
    "from there:",
    "",
    *table(["rule", "recorded at", *(f"{short_title(s)}, x{k}" for s, k in cells), "cells"], rows, left=1),
    f"Cells in which `{SUGGESTED}` does not hold, by the rate of the record: {'; '.join(failed)}. A slow run's budget "
    "is safe but slow: nothing diverges, and the loss is about what the slow rate itself would have given. A run that "
    "was already on the verge of breaking hands on too much. What the budget cannot know is how much faster the model "
    "could have gone: try a few thresholds around it.",
    "",
  ]


def adam_section(studies: Sequence[Study]) -> list[str]:
  """How flat the curve is under Adam."""
  rows, spreads = [], []
  for s in studies:
    medians = np.median(s.sweep, axis=0)
    low, high = good_range(s.sweep)
    holds = int((medians <= medians.min() + tolerance(medians.min())).sum())
    spreads.append(medians.max() / medians.min())
    rows.append([
      s.title, f"{s.rates[s.stable]:.2g}", loss_text(float(np.median(s.poisoned.clean))), loss_text(medians.min()),
      loss_text(medians.max()), f"{holds} of {medians.size}", f"{low:.2g} to {high:.2g}",
    ])  # fmt: skip
  head = ["model", "stable rate", "no clip", "best threshold", "worst threshold", "hold", "range that holds"]
  return [
    "## Adam",
    "",
    f"The best of {ADAM_RATES.size} rates from {ADAM_RATES[0]:g} to {ADAM_RATES[-1]:g}, chosen in the same way, and "
    f"the same {THRESHOLDS.size} thresholds, from {THRESHOLDS[0]:.2g} to {THRESHOLDS[-1]:g}, at that rate:",
    "",
    *table(head, rows),
    f"Where the losses are small, the tolerance of {NATS:g} nats hides a factor: the worst threshold ends at "
    f"{max(spreads):.2g} times the loss of the best on one model, at {min(spreads):.3g} times on another.",
    "",
    "Adam divides by the root of the running mean of the squared gradient: scaling every gradient by the same factor "
    "changes nothing, and a threshold below all norms does hardly more. So a budget has no meaning there, and a clip "
    "does not make up for a rate that is too high ([methods.md](methods.md)). What is left is protection from "
    "spikes.",
    "",
  ]


def poison_section(sgd: Sequence[Study], adam: Sequence[Study], steps: int) -> list[str]:
  """A few poisoned batches, with and without a guard."""
  at = ", ".join(map(str, spike_steps(steps)))
  verdicts = []
  for guard in GUARDS:
    held = sum(excess(s.poisoned.final[guard], float(np.median(s.poisoned.clean))) <= 1 for s in adam)
    harmless = sum(excess(s.poisoned.guarded[guard], float(np.median(s.poisoned.clean))) <= 1 for s in adam)
    verdicts.append((guard, held, harmless, max(float(np.median(s.poisoned.jump[guard])) for s in adam)))
  whole = [f"`{guard}`" for guard, held, harmless, _ in verdicts if held == harmless == len(adam)]
  return [
    "## Poisoned batches",
    "",
    f"The batches of steps {at} have targets drawn by chance and a loss {POISON_WEIGHT:g} times as heavy. The "
    "threshold comes from the norms of a clean, unclipped run of the same seed at the same rate. Each cell: final "
    f"loss, and in brackets the largest jump of the loss in the {JUMP_WINDOW} steps after a poisoned batch, whose own "
    "loss is left out. In bold: what ends within the tolerance of the clean run.",
    "",
    "Adam:",
    "",
    *poison_table(adam, list(GUARDS)),
    f"Guards that hold on every model, with poison and without: {listed(whole)}. One unclipped spike hurts twice: it "
    "makes a step of its own, and then stands in Adam's second moment for about 1 / (1 - b2) = 1000 steps, which "
    "makes every later step too small.",
    "",
    f"SGD with momentum {MOMENTUM:g}, at the stable rate with p90 as it is:",
    "",
    *poison_table(sgd, ["p90", "no clip"]),
  ]


def poison_table(studies: Sequence[Study], guards: Sequence[str]) -> list[str]:
  """Guards by model; the first row has no poison."""
  rows = [["no poison, no clip", *(f"{median_text(s.poisoned.clean)}" for s in studies)]]
  for name, of in (("no poison, {}", False), ("poison, {}", True)):
    for guard in guards:
      if not of and guard not in ("p90", ADAM_GUARD):
        continue
      cells = []
      for s in studies:
        losses = (s.poisoned.final if of else s.poisoned.guarded)[guard]
        text = median_text(losses)
        held = excess(losses, float(np.median(s.poisoned.clean))) <= 1
        jump = f" ({median_text(s.poisoned.jump[guard])})" if of else ""
        cells.append((f"**{text}**" if held else text) + jump)
      rows.append([name.format(guard), *cells])
  return table(["", *(s.title for s in studies)], rows)


# Picture ------------------------------------------------------------------------------------------------------------


def picture(studies: Sequence[Study]) -> Figure:
  """Final loss against the threshold, a panel for each model."""
  figure = Figure(figsize=(11, 8.2), layout="constrained")
  figure.suptitle("Final loss against max_norm under SGD, at 3 and 10 times the best stable learning rate")
  columns = min(2, len(studies))
  panels = figure.subplots(-(-len(studies) // columns), columns, squeeze=False)
  for s, axes in zip(studies, panels.flat, strict=False):
    draw_study(axes, s)
  for axes in panels.flat[len(studies) :]:
    axes.remove()
  handles, labels = panels.flat[0].get_legend_handles_labels()
  order = sorted(range(len(labels)), key=lambda i: LEGEND.index(handles[i].get_gid()))  # A legend fills its columns.
  figure.legend(
    [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=4, frameon=False
  )
  return figure


def draw_study(axes: Axes, s: Study) -> None:
  """Medians and the span of the seeds, what holds, what was suggested and p90."""
  stable = float(np.median(s.grid[:, s.stable]))
  top = 20 * max(stable, 0.1)
  lows = []
  for k in FACTORS:
    fast, colour = s.fast[k], COLOURS[k]
    medians = np.median(fast.sweep, axis=0)
    holds = medians <= medians.min() + tolerance(medians.min())
    shown = np.minimum(fast.sweep, 100 * top)
    lows.append(shown.min())
    axes.fill_between(THRESHOLDS, shown.min(0), shown.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(
      THRESHOLDS,
      np.minimum(medians, 100 * top),
      color=colour,
      linewidth=1.5,
      label=f"{k} times the stable rate",
      gid="curve",
    )
    axes.plot(
      THRESHOLDS[holds], medians[holds], color=colour, linestyle="", marker="o", markersize=6,
      label=f"within 5% or 0.05 nats, {k} times", gid="holds",
    )  # fmt: skip
    suggested = float(np.median(fast.thresholds[SUGGESTED]))
    axes.axvline(
      suggested, color=colour, linestyle="--", linewidth=1.5, label=f"suggested: {SUGGESTED[:-1]}{k}", gid="suggested"
    )
  p90 = float(np.median(s.fast[FACTORS[0]].thresholds["p90"]))
  axes.axvline(p90, color="black", linestyle=":", linewidth=1.5, label="p90 as it is", gid="other")
  axes.axhline(stable, color="0.45", linewidth=1, label="stable rate without a clip", gid="other")
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_ylim(0.85 * min(*lows, stable), top)
  axes.set_xlim(THRESHOLDS[0], THRESHOLDS[-1])
  axes.xaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_minor_formatter(NullFormatter())
  axes.set_title(f"{s.title} (stable rate {s.rates[s.stable]:.2g})", fontsize=11)
  axes.set_xlabel("max_norm")
  axes.set_ylabel("Final loss (nats)")
  axes.grid(alpha=0.3)


def write(sgd: Sequence[Study], adam: Sequence[Study], steps: int, out: Path) -> str:
  """Writes the page and its picture, and gives the text of the page."""
  lines = [
    *introduction(steps, sgd[0].grid.shape[0]),
    *summary(sgd, adam),
    *fast_section(sgd, out.with_suffix(".png").name),
    *rules_section(sgd),
    *sources_section(sgd),
    *adam_section(adam),
    *poison_section(sgd, adam, steps),
    "What holds for models this small, a constant rate and a few hundred steps need not hold for a large model with a "
    "schedule; the sweep is the way to find out.",
  ]
  text = "\n".join(lines) + "\n"
  out.write_text(text, encoding="utf-8")
  picture(sgd).savefig(out.with_suffix(".png"), dpi=130)
  return text


def main() -> None:
  """Trains everything, then writes the page and its picture."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--quick", action="store_true", help="one seed and 40 steps: only to see that it runs")
  parser.add_argument("--out", type=Path, default=Path("docs/choosing.md"))
  args = parser.parse_args()
  steps, seeds = (40, 1) if args.quick else (args.steps, args.seeds)
  if steps < MIN_STEPS or seeds < 1:
    parser.error(f"--steps must be at least {MIN_STEPS} and --seeds at least 1")
  args.out.parent.mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()

  def timed(name: str, adam: bool) -> Study:
    done = study(name, adam, steps, seeds)
    print(f"{name}, {'Adam' if adam else 'SGD'}: done after {time.perf_counter() - start:.0f} s", flush=True)
    return done

  # Two at a time: one compiled scan of small models leaves a second core idle for much of the time.
  with ThreadPoolExecutor(2) as pool:
    sgd, adam = ([pool.submit(timed, name, adam) for name in args.models] for adam in (False, True))
    studies = [[future.result() for future in futures] for futures in (sgd, adam)]
  print(write(*studies, steps, args.out))


if __name__ == "__main__":
  main()
