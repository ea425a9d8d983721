"""What is good to know of a run that is no defect, for `diagnose`: functions `View -> findings` of the level INFO."""

from collections.abc import Callable, Iterator

import numpy as np

from clipjax.runs.health.findings import Finding, View
from clipjax.runs.report.series import speed
from clipjax.runs.suggest import PLAYBOOK
from clipjax.runs.words import counted, duration, number, percent


def _too_few(view: View) -> Iterator[Finding]:
  count = view.norms.typical.size
  if view.name is None:
    yield Finding(
      "INFO",
      "no-norms",
      "No norm was recorded, so that none is judged.",
      "Put clipjax.watch() or a clip with track=True into the chain, and push the whole optimizer state.",
    )
  elif not view.enough(count):
    yield Finding(
      "INFO",
      "few-steps",
      f"{count} finite norms after the warm-up of {view.norms.warmup_steps} steps are too few to judge. Rule: at least "
      f"{view.limits.min_steps}, a limit of clipjax; only what needs no statistics was judged.",
      "Record more steps.",
    )


def _percentiles(view: View) -> Iterator[Finding]:
  typical = view.norms.typical
  if not typical.size:
    return
  percentiles = np.percentile(typical, [50, 90, 99])
  p50, p90, p99 = (number(float(p)) for p in percentiles)
  yield Finding(
    "INFO",
    "norms",
    f"p50 {p50}, p90 {p90}, p99 {p99}, largest {number(float(typical.max()))}, of {typical.size} finite norms after "
    f"the warm-up of {view.norms.warmup_steps} steps. {PLAYBOOK} begins with p90 as max_norm.",
    "clipjax.runs.suggest_max_norm gives a threshold from them." if percentiles[1] > 0 else "",
  )


def _norm_scale(view: View) -> Iterator[Finding]:
  typical = view.norms.typical
  if not view.enough(typical.size):
    return
  middle, low, high = float(np.median(typical)), view.limits.norm_low, view.limits.norm_high
  if low <= middle <= high:
    return
  side = f"above {high:g}" if middle > high else f"below {low:g}"
  yield Finding(
    "INFO",
    "norm-scale",
    f"The median norm is {number(middle)}, {side}. Rule: a hint of clipjax without a source, as the norm grows with "
    "the model and the scale of the loss.",
    "No defect by itself: compare it with a run that trains.",
  )


def _clipped(view: View) -> Iterator[Finding]:
  for key in [key for key in view.run.columns if key.endswith("/clip_fraction")]:
    share, name = view.last(key), key.removesuffix("/clip_fraction")
    if share is not None:
      what = " some leaf or group in" if view.blocks(name, "scale")[0] else ""
      yield Finding(
        "INFO", "clipped", f"{name!r} clipped{what} {percent(share)} of {view.steps_taken(name)} steps.", ""
      )


def _loss(view: View) -> Iterator[Finding]:
  loss = view.run.columns.get("loss", np.zeros(0))
  loss = loss[np.isfinite(loss)]
  if not view.enough(loss.size):
    return
  parts = np.array_split(loss, min(10, loss.size))  # `min_steps` may be less than 10.
  first, last = float(np.median(parts[0])), float(np.median(parts[-1]))
  yield Finding("INFO", "loss", f"The loss went from {number(first)} to {number(last)}, medians of tenths.", "")


def _parameters(view: View) -> Iterator[Finding]:
  if view.run.parameters is not None:
    yield Finding("INFO", "parameters", f"{view.run.parameters:,} parameters.", "")


def _speed(view: View) -> Iterator[Finding]:
  found = speed(view.run, view.norms.begin)
  if found is None:
    return
  yield Finding(
    "INFO",
    "step-time",
    f"{duration(found.step_time)} a step, the median of {found.parts} parts of the run; from push to push median "
    f"{duration(found.median)}, p99 {duration(found.p99)}.",
    "",
  )
  for key, rate in found.rates.items():
    yield Finding("INFO", "throughput", f"{counted(rate)} {key} a second at that step time.", "")


FACTS: tuple[Callable[[View], Iterator[Finding]], ...] = (
  _too_few,
  _percentiles,
  _norm_scale,
  _clipped,
  _loss,
  _parameters,
  _speed,
)
