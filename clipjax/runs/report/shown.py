"""What the sections of a report are made of, and the words that they share."""

from typing import NamedTuple

import numpy as np

from clipjax.runs.health.limits import HealthLimits
from clipjax.runs.health.verdict import HealthReport
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.report import html
from clipjax.runs.report.axes import Draw
from clipjax.runs.report.figures import PERCENTILES
from clipjax.runs.report.html import text
from clipjax.runs.report.marks import numbered
from clipjax.runs.report.series import NormSeries, norm_series
from clipjax.runs.roles import judged_states
from clipjax.runs.run import Run
from clipjax.runs.speed import Speed, speed
from clipjax.runs.words import number, percent


class Shown(NamedTuple):
  """What a report shows.

  Attributes:
    run: the run.
    report: its verdict.
    limits: the limits of the verdict.
    norms: norms of the judged states, the main one first.
    speed: None if it is unknown.
  """

  run: Run
  report: HealthReport
  limits: HealthLimits
  norms: tuple[NormSeries, ...]
  speed: Speed | None

  @property
  def main(self) -> NormSeries | None:
    """The norm of the main state; None if no norm was recorded."""
    return self.norms[0] if self.norms else None


def shown_of(
  run: Run, report: HealthReport, limits: HealthLimits | None = None, warmup_steps: int | None = None
) -> Shown:
  """What the report of a run shows; `report` was made with the same `limits` and `warmup_steps`."""
  names = judged_states(run) if len(run) else []
  events = numbered(report.events).values()
  norms = tuple(norm_series(run, name, warmup_steps, events) for name in names)
  return Shown(run, report, limits or HealthLimits(), norms, speed(run, norms[0].begin if norms else None))


class Missing(NamedTuple):
  """A section that was left out: its title and, as HTML, what to record."""

  title: str
  remedy: str


Section = str | Missing


def section(title: str, draw: Draw, alt: str, caption: str) -> str:
  """A heading and a figure with a caption of HTML; the alt text is plain and shown too, for every reader."""
  words = f"<details><summary>The figure in words</summary><p>{text(alt)}</p></details>"
  return f"<section><h2>{text(title)}</h2>{html.figure(draw, alt, caption)}{words}</section>"


def percentiles(values: Floats) -> list[float]:
  """The `PERCENTILES` of the finite values; at least one must be finite."""
  return [float(x) for x in np.percentile(values[np.isfinite(values)], PERCENTILES)]


def distribution(values: Floats) -> str:
  """Percentiles and extremes in words."""
  known = values[np.isfinite(values)]
  if not known.size:
    return "no finite value"
  p50, p90, p99 = (number(x) for x in percentiles(known))
  least, most = number(float(known.min())), number(float(known.max()))
  return f"median {p50}, 90th percentile {p90}, 99th percentile {p99}, smallest {least}, largest {most}"


def span_words(steps: Ints) -> str:
  """The first and the last step in words."""
  return f"step {steps[0]:,}" if steps.size == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"


def share(mask: Bools) -> str:
  """The count, the total and the share in percent."""
  return f"{mask.sum():,} of {mask.size:,} ({percent(float(mask.mean()))})"
