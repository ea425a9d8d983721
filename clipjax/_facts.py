"""What is good to know of a run that is no defect, for `diagnose`: functions `View -> findings` of the level INFO."""

from collections.abc import Callable, Iterator

import numpy as np

from clipjax._findings import Finding, View
from clipjax._suggest import PLAYBOOK
from clipjax._words import counted, duration, number, percent

_PARTS = 20  # Of a run, for the time of a step.


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
    "clipjax.suggest_max_norm gives a threshold from them." if percentiles[1] > 0 else "",
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


def _parameters(view: View) -> Iterator[Finding]:
  if view.run.parameters is not None:
    yield Finding("INFO", "parameters", f"{view.run.parameters:,} parameters.", "")


def _speed(view: View) -> Iterator[Finding]:
  times = view.run.columns.get("time", np.zeros(0))
  known = np.isfinite(times)
  known[known] = view.run.steps[known] >= view.norms.begin
  times, steps = times[known], view.run.steps[known]
  if times.size < 2:
    return
  single = np.diff(times) / np.diff(steps)
  # JAX runs ahead of the host, so that two pushes may be closer than two steps: parts of the run tell the step time.
  # Their median leaves out a pause, as where a run was resumed.
  ends = np.linspace(0, times.size - 1, min(_PARTS, times.size - 1) + 1).astype(int)
  parts = np.diff(times[ends]) / np.diff(steps[ends])
  if not (parts > 0).all():  # The clock was set back, or stood still.
    return
  p50, p99 = np.percentile(single, [50, 99])
  middle = float(np.median(parts))
  yield Finding(
    "INFO",
    "step-time",
    f"{duration(middle)} a step, the median of {parts.size} parts of the run; from push to push median "
    f"{duration(float(p50))}, p99 {duration(float(p99))}.",
    "",
  )
  for key in ("tokens", "examples"):
    amount = view.column(key)
    if amount.size:
      rate = float(np.mean(amount)) / middle
      yield Finding("INFO", "throughput", f"{counted(rate)} {key} a second at that step time.", "")


FACTS: tuple[Callable[[View], Iterator[Finding]], ...] = (
  _too_few,
  _percentiles,
  _norm_scale,
  _clipped,
  _parameters,
  _speed,
)
