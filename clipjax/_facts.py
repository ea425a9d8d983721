"""What is good to know of a run that is no defect, for `diagnose`: functions `View -> findings` of the level INFO."""

from collections.abc import Callable, Iterator

import numpy as np

from clipjax._findings import Finding, View
from clipjax._suggest import PLAYBOOK
from clipjax._words import counted, duration, number, percent


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
  p50, p90, p99 = (number(float(p)) for p in np.percentile(typical, [50, 90, 99]))
  yield Finding(
    "INFO",
    "norms",
    f"p50 {p50}, p90 {p90}, p99 {p99}, largest {number(float(typical.max()))}, of {typical.size} finite norms after "
    f"the warm-up of {view.norms.warmup_steps} steps. {PLAYBOOK} begins with p90 as max_norm.",
    "clipjax.suggest_max_norm gives a threshold from them.",
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
      text = f"{name!r} clipped {percent(share)} of {view.steps_taken(name)} steps."
      yield Finding("INFO", "clipped", text, "")


def _parameters(view: View) -> Iterator[Finding]:
  if view.run.parameters is not None:
    yield Finding("INFO", "parameters", f"{view.run.parameters:,} parameters.", "")


def _speed(view: View) -> Iterator[Finding]:
  times = view.run.columns.get("time", np.zeros(0))
  known = np.isfinite(times)
  if known.sum() < 2:
    return
  seconds = np.diff(times[known]) / np.diff(view.run.steps[known])
  forward = seconds > 0  # Not where a clock was set back.
  if not forward.any():
    return
  p50, p99 = (float(p) for p in np.percentile(seconds[forward], [50, 99]))
  yield Finding(
    "INFO",
    "step-time",
    f"median {duration(p50)}, p99 {duration(p99)}, from push to push.",
    "A p99 far above the median: look at the input pipeline, checkpoints and recompilations." if p99 > 3 * p50 else "",
  )
  for key in ("tokens", "examples"):
    if key in view.run.columns:
      rates = view.run.columns[key][known][1:][forward] / seconds[forward]
      if np.isfinite(rates).any():
        yield Finding("INFO", "throughput", f"median {counted(float(np.nanmedian(rates)))} {key} a second.", "")


FACTS: tuple[Callable[[View], Iterator[Finding]], ...] = (
  _too_few,
  _percentiles,
  _norm_scale,
  _clipped,
  _parameters,
  _speed,
)
