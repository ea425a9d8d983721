"""What the sections of a report say: for each a figure, an alt text that has the numbers, and how to read it.

A section is a function of a `Run` that gives HTML, or a `Missing` that says what to record to get it. Numbers are of
all steps. Everything that comes from the run is escaped by `page`.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from clipjax.quantities import CLIPPED_STEPS, NORM, RATIO
from clipjax.runs.health.findings import HealthLimits
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import column, flag
from clipjax.runs.report import figures, page
from clipjax.runs.report.page import code, text
from clipjax.runs.report.series import (
  NormSeries,
  Vectors,
  by_depth,
  short,
  vectors,
  worst_step,
)
from clipjax.runs.run import Run
from clipjax.runs.schema import GRAD, LOSS, SKIP, TIME, UPDATES, key_of
from clipjax.runs.speed import Speed, seconds_per_step, throughput
from clipjax.runs.words import Stack, counted, duration, in_stacks, number, percent, several

_MOST_LAYERS = 5  # Named of the worst step.


class Missing(NamedTuple):
  """A section that is left out: its title and, as HTML, what to record."""

  title: str
  remedy: str


Section = str | Missing


class Shown(NamedTuple):
  """What the sections are made of.

  Attributes:
    run: the run.
    series: its main norm, None where none was recorded.
    speed: its speed, None where it is not known.
    limits: those of the verdict.
  """

  run: Run
  series: NormSeries | None
  speed: Speed | None
  limits: HealthLimits


def all_sections(shown: Shown) -> list[Section]:
  """The sections in the order of the page."""
  run, series = shown.run, shown.series
  clip = code("clipjax.clip_by_global_norm(max_norm)")
  if series is None or not len(run):
    remedy = f"chain {clip} or {code('clipjax.watch()')} before the optimizer and call {code('recorder.push')}."
    return [Missing("Gradient norm", remedy), *_others(shown, GRAD)]
  worst = _worst(run, series)
  return [_norm(series), _histogram(series), *_layers(run, series.name), worst, *_others(shown, series.name)]


def _others(shown: Shown, name: str) -> list[Section]:
  run, band = shown.run, (shown.limits.ratio_low, shown.limits.ratio_high)
  return [_ratios(run, band), _losses(run), _weights(run), _speed(run, shown.speed), _table(run, name)]


def _clipped_steps(run: Run, series: NormSeries) -> int:
  """What the clip has counted itself, where rows between two pushes cannot tell; else the rows that were clipped."""
  counted = column(run, key_of(series.name, CLIPPED_STEPS))
  counted = counted[np.isfinite(counted)]
  return int(counted[-1]) if counted.size else int(series.clipped.sum())


def summary(shown: Shown) -> str:
  """The numbers at the top."""
  run, series = shown.run, shown.series
  pairs = [("steps recorded", f"{len(run):,}")]
  if run.parameters is not None:
    pairs.append(("parameters", f"{run.parameters:,}"))
  if series is not None:
    finite = series.norm[np.isfinite(series.norm)]
    pairs += [("median norm", number(float(np.median(finite))) if finite.size else "none finite")]
    pairs += [("clipped steps", f"{_clipped_steps(run, series):,}"), ("steps not finite", f"{_count(series):,}")]
  if LOSS in run.columns:
    known = run[LOSS][np.isfinite(run[LOSS])]
    pairs += [("last finite loss", number(float(known[-1])) if known.size else "none finite")]
  if shown.speed is not None:
    pairs.append(("time of a step", duration(shown.speed.step_time)))
  return page.numbers(pairs)


def _norm(series: NormSeries) -> Section:
  caption = (
    "Each step's norm before the clip, on a log axis. Triangles are steps that were clipped to the threshold, crosses "
    "are steps whose norm was inf or NaN."
  )
  if series.by_block:
    caption += " Leaves or groups are clipped by thresholds of their own; the line is the smallest of them."
  if series.rejected.any():
    caption += " Squares are steps that skip_steps rejected; their norm is the one that it saw."
  if series.spikes.any():
    caption += " Rings are spikes, by the rule of the verdict."
  return _section("Gradient norm", partial(figures.norms, series), norm_words(series), caption)


def norm_words(series: NormSeries) -> str:
  """The alt text of the figure of the norm."""
  said = [f"Line chart of {series.name}/norm, {_span(series.steps)}, log axis: {_distribution(series.norm)}."]
  limits = series.limit[np.isfinite(series.limit)]
  what = "Smallest threshold of a leaf or group" if series.by_block else "Threshold"
  if not limits.size:
    said.append("No threshold.")
  elif limits.min() == limits.max():
    said.append(f"{what} {number(float(limits[0]))}.")
  else:
    least, last, most = (number(float(x)) for x in (limits.min(), limits[-1], limits.max()))
    said.append(f"{what} between {least} and {most}, {last} in the end.")
  said.append(f"{_share(series.clipped)} steps clipped.")
  bad = series.steps[series.nonfinite]
  first = f", the first is step {bad[0]:,}" if bad.size else ""
  said.append(f"{_share(series.nonfinite)} steps not finite{first}.")
  if series.rejected.any():
    said.append(f"{_share(series.rejected)} steps rejected by skip_steps.")
  if series.spikes.any():
    said.append(f"{series.spikes.sum():,} spikes.")
  return " ".join(said)


def _histogram(series: NormSeries) -> Section:
  norm = series.norm
  if not (norm > 0).any():
    return Missing("Distribution of the norm", "no step had a finite norm above 0, so there is nothing to draw.")
  values = _percentiles(norm)
  said = ", ".join(f"p{p} {number(x)}" for p, x in zip(figures.PERCENTILES, values, strict=True))
  alt = f"Histogram of log10 of {series.name}/norm over {np.isfinite(norm).sum():,} finite steps: {said}."
  caption = "How often each size of the norm occurred. The lines are percentiles over all finite steps; those of the "
  caption += "verdict leave the warm-up out."
  if zeros := int((norm == 0).sum()):
    caption += f" {zeros:,} step{'s' if zeros > 1 else ''} of norm 0 cannot be drawn on a log axis."
  return _section("Distribution of the norm", partial(figures.histogram, norm, values), alt, caption)


def _layers(run: Run, name: str) -> list[Section]:
  found = vectors(run, key_of(name, NORM))
  title = "Layers over time"
  if found is None:
    return [Missing(title, f"chain {code('clipjax.watch()')} before the clip; the norm of every layer is then read.")]
  values = found.values
  said = [f"Heat map of the norm of {len(found.names):,} layers at {found.steps.size:,} recorded steps."]
  middle = _medians(values)
  if np.isfinite(middle).any():
    low, high = int(np.nanargmin(middle)), int(np.nanargmax(middle))
    said.append(f"Smallest median {number(middle[low])} in {short(found.names[low], 60)}, largest {_of(found, high)}.")
  bad = np.flatnonzero(np.isinf(values).any(axis=0))
  if len(in_stacks(found.names)) < len(found.names):
    names = several([found.names[i] for i in bad], found.names)
  else:
    names = ", ".join(short(found.names[i], 60) for i in bad[:_MOST_LAYERS])
  said.append(f"{bad.size:,} layers were not finite at some step{': ' + names if bad.size else ''}.")
  caption = f"One row for each of {len(found.names):,} layers, the first on top. "
  depth = by_depth(found.names, values.T, figures.MOST_LINES)
  if len(depth.values) < len(found.names):
    caption = f"{len(found.names):,} layers, the first on top; of a stack, each row has the largest of {depth.per:,} "
    caption += "neighbours. "
  caption += "Names are shortened, and where there are many, not every row has one; all are in the table below. "
  caption += f"{code(key_of(name, NORM))}, log scale."
  return [_section(title, partial(figures.layers, found), " ".join(said), caption)]


def _worst(run: Run, series: NormSeries) -> Section:
  worst = worst_step(run, series)
  if worst is None:
    return Missing("Worst step", "no norm was recorded.")
  size = number(worst.norm) if np.isfinite(worst.norm) else "not finite"
  which = "the first that was not finite" if series.nonfinite.any() else "the largest norm"
  body = f"<p>Step <strong>{worst.step:,}</strong>, {which}: norm {size}.</p>"
  if not worst.layers and series.rejected[series.steps == worst.step].any():
    body += f"<p>{code('skip_steps')} rejected it, so that a {code('clipjax.watch()')} inside did not see it.</p>"
  elif not worst.layers:
    body += f"<p>Its layers were not recorded: {code('clipjax.watch()')} first in the chain keeps them.</p>"
  else:
    rows = [(code(name), number(x) if np.isfinite(x) else "not finite") for name, x in worst.layers[:_MOST_LAYERS]]
    body += page.table(("layer", "norm"), rows, "layers")
  return f"<section><h2>Worst step</h2>{body}</section>"


def _ratios(run: Run, band: tuple[float, float]) -> Section:
  title, key = "Size of the updates", key_of(UPDATES, RATIO)
  total, found = column(run, key), vectors(run, key)
  if not (total > 0).any() and (found is None or not (found.values > 0).any()):
    watch = code(f'clipjax.watch(name="{UPDATES}")')
    return Missing(title, f"chain {watch} last, after the optimizer, and give {code('params')} to {code('update')}.")
  known = total[total > 0] if (total > 0).any() else _some(found).values[_some(found).values > 0]
  alt = f"Line chart of update over parameters, {_span(run.steps)}, log axis: {_distribution(known)}."
  if found is not None:
    middle = _medians(found.values)
    inside = int(((middle >= band[0]) & (middle <= band[1])).sum())
    alt += f" The median of {inside:,} of {len(found.names):,} layers lies in {figures.band_words(band)}."
  caption = "Norm of the update over the norm of the parameters. About 1e-3 is usual with Adam-like optimizers; far "
  caption += "below, the layer hardly learns; far above, it is overwritten."
  return _section(title, partial(figures.ratios, (run.steps, total), found, band), alt, caption)


def _losses(run: Run) -> Section:
  curves = []
  for key in run.columns:
    if LOSS in key.lower() and not key.startswith(f"{SKIP}/"):
      values, known = run.columns[key], np.isfinite(run.columns[key])
      bad = run.steps[flag(run, key)]
      if known.any() or bad.size:
        curves.append((key, run.steps[known], values[known], bad))
  if not curves:
    example = code("recorder.push(step, opt_state, loss=loss, val_loss=val_loss)")
    return Missing("Loss", f"give the losses to push, as in {example}.")
  said = []
  for key, _, values, bad in curves:
    course = f"from {number(values[0])} to {number(values[-1])}, lowest {number(values.min())}" if values.size else ""
    failed = f"not finite at {bad.size:,} steps" if bad.size else ""
    said.append(f"{short(key, 60)} {', '.join(filter(None, (course, failed)))}")
  alt = f"Line chart of the losses, {_span(run.steps)}: {'; '.join(said)}."
  return _section("Loss", partial(figures.losses, curves), alt, "Every recorded number with “loss” in its name.")


def _weights(run: Run) -> Section:
  title = "Size of the weights"
  if run.weights is None or not run.weights[2].sum():
    return Missing(
      title, f"give the parameters to push, as in {code('recorder.push(step, opt_state, params=params)')}."
    )
  steps, edges, counts = run.weights
  centres = (edges[1:] + edges[:-1]) / 2
  middle = [number(10 ** centres[np.searchsorted(row.cumsum(), row.sum() / 2)]) for row in counts[[0, -1]]]
  alt = f"Histogram of log10 of the size of the weights at {steps.size:,} recorded steps: median about {middle[0]} at "
  alt += f"step {steps[0]:,} and {middle[1]} at step {steps[-1]:,}."
  caption = "Share of the weights by absolute value, on a log axis, at the first, the middle and the last recording."
  return _section(title, partial(figures.weights, steps, edges, counts), alt, caption)


def _speed(run: Run, found: Speed | None) -> Section:
  title = "Speed"
  if found is None:
    return Missing(title, f"two calls of {code('recorder.push')} or more give the time of a step.")
  steps, seconds = seconds_per_step(run)
  panels = [("ms per step", steps, 1e3 * seconds, 1e3 * found.step_time)]
  time = column(run, TIME)
  total = _total(float(np.nanmax(time) - np.nanmin(time)))
  said = [f"Line chart of the time of a step: {duration(found.step_time)}, the median of parts of the run"]
  said += [f"from push to push median {duration(found.median)}, 99th percentile {duration(found.p99)}"]
  said += [f"{number(1 / found.step_time)} steps per second, {total} in all"]
  for key, mean in found.rates.items():
    at, rate = throughput(run, key)
    if (rate > 0).any():
      panels.append((f"{key} per second", at, rate, mean))
      said.append(f"{counted(mean)} {key} per second")
  caption = "Time from push to push, over the steps between. JAX runs ahead of the host, so the dashed line, the time "
  caption += "of a step over longer parts of the run, tells more. "
  if len(panels) == 1:
    caption += f"For the throughput give {code('tokens=')} or {code('examples=')}, the amount in a step, to push."
  return _section(title, partial(figures.speed, panels), "; ".join(said) + ".", caption)


def _table(run: Run, name: str) -> Section:
  found = vectors(run, key_of(name, NORM))
  if found is None:
    return ""
  ratio = vectors(run, key_of(UPDATES, RATIO))
  shares = dict(zip(ratio.names, _medians(ratio.values), strict=True)) if ratio is not None else {}
  head = ["layer", "median norm", "largest", "not finite", *(["update ratio"] if shares else [])]
  stacks = in_stacks(found.names)
  rows = [_row(found, stack, shares) for stack in stacks]
  label = f"Layers: {len(found.names):,}; steps at which they were recorded: {found.steps.size:,}"
  inside = f"<details><summary>{label}</summary>{page.table(head, rows, 'cards')}</details>"
  if len(stacks) < len(found.names):
    inside += '<p class="soft">Of stacked layers the medians are medians over the layers; each layer is below.</p>'
  for stack in [stack for stack in stacks if stack.size > 1]:
    layers = [Stack(found.names[i], i, 1) for i in range(stack.start, stack.start + stack.size)]
    table = page.table(head, [_row(found, layer, shares) for layer in layers], "cards")
    inside += f"<details><summary>{stack.size:,} layers of {code(stack.name)}</summary>{table}</details>"
  return f"<section><h2>All layers</h2>{inside}</section>"


def _row(found: Vectors, stack: Stack, shares: dict[str, float]) -> list[str]:
  """The cells of a leaf, or of all layers of a stack together: medians of the layers, and which was the largest."""
  names = found.names[stack.start : stack.start + stack.size]
  values = found.values[:, stack.start : stack.start + stack.size]
  largest = np.where(np.isfinite(values), values, -np.inf).max(axis=0)
  cells, which = [code(stack.name)], int(largest.argmax())
  if stack.size > 1:
    cells = [code(f"{stack.name}[0..{stack.size - 1}]")]
  if np.isfinite(largest[which]):
    cells += [number(float(np.nanmedian(_medians(values)))), number(float(largest[which]))]
    cells[-1] += f" in [{which}]" if stack.size > 1 else ""
  else:
    cells += ["none", "none"]
  cells.append(f"{int(np.isinf(values).sum()):,}")
  known = [shares[name] for name in names if np.isfinite(shares.get(name, np.nan))]
  return [*cells, *([number(float(np.median(known))) if known else ""] if shares else [])]


# Words --------------------------------------------------------------------------------------------------------------


def _section(title: str, draw: figures.Draw, alt: str, caption: str) -> str:
  """A heading and a figure; the caption is HTML, the alt text is not, and is shown too, so that all can read it."""
  words = f"<details><summary>The figure in words</summary><p>{text(alt)}</p></details>"
  return f"<section><h2>{text(title)}</h2>{page.figure(draw, alt, caption)}{words}</section>"


def _count(series: NormSeries) -> int:
  return int(series.nonfinite.sum())


def _percentiles(values: Floats) -> list[float]:
  return [float(x) for x in np.percentile(values[np.isfinite(values)], figures.PERCENTILES)]


def _distribution(values: Floats) -> str:
  known = values[np.isfinite(values)]
  if not known.size:
    return "no finite value"
  p50, p90, p99 = (number(x) for x in _percentiles(known))
  least, most = number(float(known.min())), number(float(known.max()))
  return f"median {p50}, 90th percentile {p90}, 99th percentile {p99}, smallest {least}, largest {most}"


def _span(steps: Ints) -> str:
  return f"step {steps[0]:,}" if steps.size == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"


def _medians(values: Floats) -> Floats:
  """The median of the finite numbers of each column, NaN where a column has none."""
  known = np.isfinite(values)
  return np.array([np.median(values[known[:, i], i]) if known[:, i].any() else np.nan for i in range(values.shape[1])])


def _of(found: Vectors, i: int) -> str:
  return f"{number(_medians(found.values[:, i : i + 1])[0])} in {short(found.names[i], 60)}"


def _some(found: Vectors | None) -> Vectors:
  assert found is not None
  return found


def _total(seconds: float) -> str:
  """A long time in hours or minutes."""
  unit, size = ("h", 3600) if seconds >= 5400 else ("min", 60)
  return f"{number(seconds / size)} {unit}" if seconds >= 90 else duration(seconds)


def _share(mask: Bools) -> str:
  """How many, of how many, in percent."""
  return f"{mask.sum():,} of {mask.size:,} ({percent(float(mask.mean()))})"
