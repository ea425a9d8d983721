"""The sections after the timeline: each has a figure, an alt text with its numbers, and a caption on how to read it.

A section is HTML, or a `Missing` that says what to record. `html` escapes everything that comes from the run.
"""

from functools import partial

import numpy as np

from clipjax.metric_names import CLIPPED_STEPS, NORM
from clipjax.runs.norms import column
from clipjax.runs.report import figures, heatmap, html
from clipjax.runs.report.course import course_words, losses_drawn
from clipjax.runs.report.effect import effects
from clipjax.runs.report.grid import by_depth, steps_of
from clipjax.runs.report.html import code
from clipjax.runs.report.marks import inside
from clipjax.runs.report.series import NormSeries, Vectors, curve, curves, medians, short, vectors
from clipjax.runs.report.shown import (
  Missing,
  Section,
  Shown,
  distribution,
  percentiles,
  section,
  span_words,
)
from clipjax.runs.roles import Role, keys_with, main_loss, update_ratio
from clipjax.runs.run import Run
from clipjax.runs.schema import GRAD, TIME, UPDATES, key_of
from clipjax.runs.speed import Speed, seconds_per_step, throughput
from clipjax.runs.words import Stack, counted, duration, in_stacks, number


def all_sections(shown: Shown) -> list[Section]:
  """All sections in page order."""
  run, series = shown.run, shown.main
  band = shown.limits.ratio_low, shown.limits.ratio_high
  name = GRAD if series is None else series.name
  norm = [] if series is None else [_histogram(series)]
  rest = [_ratios(run, band), _other_losses(run), _weights(run), _speed(run, shown.speed)]
  return [*norm, *effects(shown), *_layers(shown, name), *rest, _table(run, name)]


def summary(shown: Shown) -> str:
  """The numbers at the top of the page."""
  run, series = shown.run, shown.main
  pairs = [("steps", f"{len(run):,}")]
  if run.parameters is not None:
    pairs.append(("parameters", f"{run.parameters:,}"))
  if (main := main_loss(run.columns)) is not None and (loss := curve(run, main)) is not None:
    name = "last finite loss" if loss.bad.size and loss.bad[-1] > loss.steps[-1:].max(initial=-1) else "last loss"
    pairs += [(name, number(float(loss.values[-1])) if loss.values.size else "none finite")]
  if series is not None:
    finite = series.typical
    pairs += [("median norm", number(float(np.median(finite))) if finite.size else "none finite")]
    pairs += [("clipped steps", f"{_clipped_steps(run, series):,}")]
    bad = np.any([other.nonfinite for other in shown.norms], axis=0)  # In any state.
    pairs += [("nonfinite steps", f"{int(bad.sum()):,}")]
  if shown.report.events:
    pairs.append(("events", f"{len(shown.report.events):,}"))
  if shown.speed is not None:
    pairs.append(("step time", duration(shown.speed.step_time)))
  return html.numbers(pairs)


def _clipped_steps(run: Run, series: NormSeries) -> int:
  """The clip's own count, which includes steps between pushes; without one, the number of clipped rows."""
  counts = column(run, key_of(series.name, CLIPPED_STEPS))
  counts = counts[np.isfinite(counts)]
  return int(counts[-1]) if counts.size else int(series.clipped.sum())


def _histogram(series: NormSeries) -> Section:
  norm, title = series.typical, "Distribution of the norm"
  if not (norm > 0).any():
    return Missing(title, "no step after the warm-up had a finite norm above 0, so there is nothing to draw.")
  values = percentiles(norm)
  said = ", ".join(f"p{p} {number(x)}" for p, x in zip(figures.PERCENTILES, values, strict=True))
  alt = f"Histogram of log10 of {series.key} over {norm.size:,} finite steps after the warm-up: {said}."
  caption = "How often each norm occurred after the warm-up. The lines mark the percentiles of the verdict."
  if zeros := int((norm == 0).sum()):
    caption += f" {zeros:,} step{'s' if zeros > 1 else ''} with norm 0 cannot be shown on a log axis."
  return section(title, partial(figures.histogram, norm, values), alt, caption)


def _layers(shown: Shown, name: str) -> list[Section]:
  found = vectors(shown.run, key_of(name, NORM))
  if found is None:
    return []
  middle = medians(found.values)
  alt = f"Heat map of the norm of {len(found.names):,} layers at {found.steps.size:,} recorded steps."
  if np.isfinite(middle).any():
    alt += f" Medians from {number(np.nanmin(middle))} to {number(np.nanmax(middle))}."
  caption = f"One row for each of {len(found.names):,} layers, the first on top. "
  depth = by_depth(found.names, found.values.T, heatmap.MOST_LINES)
  if len(depth.values) < len(found.names):
    caption = f"{len(found.names):,} layers, the first on top; in a stack, each row shows the largest of {depth.per:,} "
    caption += "neighbours. "
  caption += "Names are shortened, and not every row has room for one; the table below lists all. "
  caption += f"{code(key_of(name, NORM))}, log scale."
  alone = inside(shown.report.events, found.steps)
  draw = partial(heatmap.layers, found, axis=steps_of(shown.run.steps), alone=alone)
  return [section("Layers over time", draw, alt, caption)]


def _ratios(run: Run, band: tuple[float, float]) -> Section:
  title, key = "Size of the updates", update_ratio(run)
  total, found = (np.zeros(0), None) if key is None else (column(run, key), vectors(run, key))
  # The ratio over all parameters or, if only layers were recorded, theirs.
  by_layer = np.zeros(0) if found is None else found.values[found.values > 0]
  known = total[total > 0] if (total > 0).any() else by_layer
  if not known.size:
    watch = code(f'clipjax.watch(name="{UPDATES}")')
    return Missing(title, f"chain {watch} last, after the optimizer, and pass {code('params')} to {code('update')}.")
  alt = f"Line chart of update over parameters, {span_words(run.steps)}, log axis: {distribution(known)}."
  if found is not None:
    middle = medians(found.values)
    count = int(((middle >= band[0]) & (middle <= band[1])).sum())
    alt += f" {count:,} of {len(found.names):,} layers have a median in the range {figures.band_words(band)}."
  caption = "Update norm over parameter norm. About 1e-3 is usual for each set of parameters. Far below it, the layer "
  caption += "hardly learns; far above it, the layer is overwritten."
  return section(title, partial(figures.ratios, (run.steps, total), found, band), alt, caption)


def _other_losses(run: Run) -> Section:
  """Losses that the timeline leaves out, such as parts of the training loss."""
  drawn = losses_drawn(run)
  others = curves(run, [key for key in keys_with(run.columns, Role.LOSS, Role.VALIDATION) if key not in drawn])
  if not others:
    return ""
  said = "; ".join(f"{short(curve.key, 60)} {course_words(curve)}" for curve in others)
  alt = f"Line chart of other losses, {span_words(run.steps)}: {said}."
  return section("Other losses", partial(figures.losses, others), alt, "Losses that the timeline does not show.")


def _weights(run: Run) -> Section:
  title = "Size of the weights"
  if run.weights is None or not run.weights[2].sum():
    return Missing(title, f"pass the parameters to push: {code('recorder.push(step, opt_state, params=params)')}.")
  steps, edges, counts = run.weights
  # Only a histogram was recorded: its median is the centre of the bin that holds it.
  centres = (edges[1:] + edges[:-1]) / 2
  middle = [number(10 ** centres[np.searchsorted(row.cumsum(), row.sum() / 2)]) for row in counts[[0, -1]]]
  alt = f"Histogram of log10 of the size of the weights at {steps.size:,} recorded steps: median about {middle[0]} at "
  alt += f"step {steps[0]:,} and {middle[1]} at step {steps[-1]:,}."
  caption = "Share of the weights by absolute value (log axis), at the first, the middle and the last recorded step."
  return section(title, partial(figures.weights, steps, edges, counts), alt, caption)


def _speed(run: Run, found: Speed | None) -> Section:
  title = "Speed"
  if found is None:
    return Missing(title, f"call {code('recorder.push')} at least twice.")
  steps, seconds = seconds_per_step(run)
  # One panel for the step time, and one for each recorded amount, such as tokens.
  panels = [("ms per step", steps, 1e3 * seconds, 1e3 * found.step_time)]
  time = column(run, TIME)
  total = long_time(float(np.nanmax(time) - np.nanmin(time)))
  said = [f"Line chart of the step time: {duration(found.step_time)}, the median over parts of the run"]
  said += [f"time between pushes: median {duration(found.median)}, 99th percentile {duration(found.p99)}"]
  said += [f"{number(1 / found.step_time)} steps per second, {total} in total"]
  for key, mean in found.rates.items():
    at, rate = throughput(run, key)
    if (rate > 0).any():
      panels.append((f"{key} per second", at, rate, mean))
      said.append(f"{counted(mean)} {key} per second")
  caption = "Time between two pushes, per step. JAX runs ahead of the host, so single values mislead; the dashed line "
  caption += "is the step time over longer parts of the run. "
  if len(panels) == 1:
    caption += f"For throughput, pass {code('tokens=')} or {code('examples=')}, the amount per step, to push."
  return section(title, partial(figures.speed, panels), "; ".join(said) + ".", caption)


def long_time(seconds: float) -> str:
  """A duration, in minutes or hours if it is long."""
  unit, size = ("h", 3600) if seconds >= 5400 else ("min", 60)
  return f"{number(seconds / size)} {unit}" if seconds >= 90 else duration(seconds)


# All layers ---------------------------------------------------------------------------------------------------------


def _table(run: Run, name: str) -> Section:
  found = vectors(run, key_of(name, NORM))
  if found is None:
    return ""
  key = update_ratio(run)
  ratio = None if key is None else vectors(run, key)
  shares = dict(zip(ratio.names, medians(ratio.values), strict=True)) if ratio is not None else {}
  head = ["layer", "median norm", "largest", "nonfinite", *(["update ratio"] if shares else [])]
  # One row per leaf or stack; the layers of each stack follow in tables of their own.
  stacks = in_stacks(found.names)
  rows = [_row(found, stack, shares) for stack in stacks]
  label = f"{len(found.names):,} layer{'s' if len(found.names) > 1 else ''} at {found.steps.size:,} recorded steps"
  inner = f"<details><summary>{label}</summary>{html.table(head, rows, 'cards')}</details>"
  if len(stacks) < len(found.names):
    inner += '<p class="soft">For a stack, the medians are taken over its layers; each layer is listed below.</p>'
  for stack in [stack for stack in stacks if stack.size > 1]:
    layers = [Stack(found.names[i], i, 1) for i in range(stack.start, stack.start + stack.size)]
    table = html.table(head, [_row(found, layer, shares) for layer in layers], "cards")
    inner += f"<details><summary>{stack.size:,} layers of {code(stack.name)}</summary>{table}</details>"
  return f"<section><h2>All layers</h2>{inner}</section>"


def _row(found: Vectors, stack: Stack, shares: dict[str, float]) -> list[str]:
  """The cells of a leaf or a whole stack: its median and largest norm; for a stack, also which layer was largest."""
  names = found.names[stack.start : stack.start + stack.size]
  values = found.values[:, stack.start : stack.start + stack.size]
  # The largest finite norm of each layer, -inf for a layer without one.
  largest = np.where(np.isfinite(values), values, -np.inf).max(axis=0)
  cells, which = [code(stack.name)], int(largest.argmax())
  if stack.size > 1:
    cells = [code(f"{stack.name}[0..{stack.size - 1}]")]
  if np.isfinite(largest[which]):
    cells += [number(float(np.nanmedian(medians(values)))), number(float(largest[which]))]
    cells[-1] += f" in [{which}]" if stack.size > 1 else ""
  else:
    cells += ["none", "none"]
  cells.append(f"{int(np.isinf(values).sum()):,}")
  known = [shares[name] for name in names if np.isfinite(shares.get(name, np.nan))]
  return [*cells, *([number(float(np.median(known))) if known else ""] if shares else [])]
