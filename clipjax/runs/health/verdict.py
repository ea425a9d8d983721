"""The verdict on a recorded run: what is wrong, what to look at, and the numbers that practitioners ask for.

The checks live in the files beside this one, one family of findings each. A finding gives its number, the rule with its
limit, the source of the rule, and what to do next. The limits are the fields of `HealthLimits`.

Stages of `judged`: find where the training ended, look for defects before that step, add facts about the whole run, and
drop the findings that another one explains.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, overload

import numpy as np

from clipjax.runs.health.clips import clipped, clipped_often
from clipjax.runs.health.effect import clip_effect, clip_lengthens, clip_starves
from clipjax.runs.health.events import Event
from clipjax.runs.health.facts import left_out, not_judged, parameters, step_time, too_few
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.layers import layer_spread, zero_gradient, zeros
from clipjax.runs.health.limits import HealthLimits, check_limits
from clipjax.runs.health.losses import diverged, loss_course, not_learning, overfit, rising_loss
from clipjax.runs.health.nonfinite import nonfinite_loss, nonfinite_norm
from clipjax.runs.health.norm import norm_percentiles, norm_scale, rising_norm
from clipjax.runs.health.spikes import spike_rate, spikes, spikes_of_leaves, update_spikes
from clipjax.runs.health.stopped import skipped, stopped
from clipjax.runs.health.updates import update_ratio
from clipjax.runs.health.view import View, before, view_of, views_of
from clipjax.runs.norms import check_warmup
from clipjax.runs.run import Run
from clipjax.runs.words import described

LEVELS = ("FAIL", "WARN", "INFO")

Check: TypeAlias = Callable[[View], Iterator[Finding]]

# Checks that may find the end of training; what comes after it is aftermath and is not judged.
ENDS: tuple[Check, ...] = (nonfinite_norm, nonfinite_loss, diverged, stopped)
NONFINITE = frozenset({"nonfinite", "nonfinite-loss"})
# Checks of the rows before that, strongest first. Those in `OF_STATES` run once per judged state.
DEFECTS: tuple[Check, ...] = (
  zero_gradient, skipped, update_spikes, spikes, not_learning, rising_loss, clip_starves, clipped_often, clip_lengthens,
  update_ratio, layer_spread, rising_norm, overfit, zeros,
)  # fmt: skip
OF_STATES = frozenset({nonfinite_norm, zero_gradient, layer_spread, rising_norm, zeros})
FACTS: tuple[Check, ...] = (
  too_few, not_judged, left_out, spikes_of_leaves, spike_rate, norm_percentiles, norm_scale, clipped, clip_effect,
  loss_course, parameters, step_time,
)  # fmt: skip

# One cause, one piece of advice: each finding hides these others, which are its consequences or say the same.
CONSEQUENCES: dict[str, frozenset[str]] = {
  "nonfinite": frozenset({"nonfinite-loss", "stopped", "skipped"}),
  "diverged": frozenset(
    {"zero-gradient", "rising-loss", "rising-norm", "not-learning", "update-ratio", "clipped-often", "zeros"}
  ),
  "stopped": frozenset({"nonfinite-dropped", "skipped", "not-learning", "update-ratio", "rising-loss"}),
  "skipped": frozenset({"nonfinite-dropped"}),
  "zero-gradient": frozenset({"zeros", "layer-spread"}),
  "clipped-often": frozenset({"not-learning", "update-ratio"}),
  "clip-starves": frozenset({"clipped-often", "not-learning", "update-ratio", "layer-spread"}),
  "update-ratio": frozenset({"not-learning", "zeros"}),
  "update-spike": frozenset({"zeros"}),
  "spikes": frozenset({"zeros"}),
  "not-learning": frozenset({"zeros"}),
  "layer-spread": frozenset({"not-learning"}),
}


@dataclasses.dataclass(frozen=True)
class HealthReport(Sequence[Finding]):
  """The verdict on a run: a sequence of findings; `str()` gives a table.

  `len`, `bool`, iteration, indexing and slicing work on `findings`.

  Attributes:
    findings: what was found, FAIL before WARN before INFO.
    path: the file of the run.
    steps: how many recorded steps it has.
    warmup_steps: how many steps at the start were left out of medians and percentiles.
    events: what happened, in step order: spikes of several series at one time, grouped.

  Example:
    >>> import os, tempfile, jax.numpy as jnp, clipjax
    >>> tx, path = clipjax.clip_by_global_norm(1.0), os.path.join(tempfile.mkdtemp(), "run.jsonl")
    >>> state = tx.init(jnp.zeros(1))
    >>> with clipjax.runs.Recorder(path) as recorder:
    ...   for step in range(40):
    ...     _, state = tx.update(jnp.array([5.0]), state)
    ...     recorder.push(step, state)
    >>> report = clipjax.runs.diagnose(clipjax.runs.read_run(path))
    >>> report.steps, [finding.name for finding in report]
    (40, ['norms', 'clipped', 'step-time'])
  """

  findings: tuple[Finding, ...]
  path: str
  steps: int
  warmup_steps: int
  events: tuple[Event, ...] = ()

  def __len__(self) -> int:
    return len(self.findings)

  @overload
  def __getitem__(self, index: int) -> Finding: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
  def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
    return self.findings[index]

  def __str__(self) -> str:
    return self.table()

  def counts(self) -> str:
    """The number of findings per level: "1 FAIL, 0 WARN, 3 INFO"."""
    return ", ".join(f"{sum(finding.level == level for finding in self)} {level}" for level in LEVELS)

  def table(self, width: int = 100) -> str:
    """The findings as text, `width` columns wide but at least 60; a long word may stick out."""
    if isinstance(width, bool) or not isinstance(width, int):
      raise TypeError(
        f"`width` must be a whole number, got {described(width)}: pass how many columns the text may have."
      )
    indent = max((len(finding.name) for finding in self), default=0) + 8
    name = repr(self.path) if self.path else "The run"
    lines = [f"{name}: {self.steps} steps, {self.counts()}; warm-up {self.warmup_steps} steps"]
    for finding in self:
      head = f"{finding.level}  {finding.name}".ljust(indent)
      for text in (finding.message, _rule(finding), f"-> {finding.advice}" if finding.advice else ""):
        lines += _wrapped(text, max(width, 60), head, indent)
        head = " " * indent
    return "\n".join(lines)


def _rule(finding: Finding) -> str:
  """The rule and its source as sentences; "" if there are none."""
  rule = f"Rule: {finding.rule}." if finding.rule else ""
  return f"{rule} Source: {finding.source}.".strip() if finding.source else rule


def _wrapped(text: str, width: int, first: str, indent: int) -> list[str]:
  return textwrap.wrap(
    text,
    width,
    initial_indent=first,
    subsequent_indent=" " * indent,
    break_long_words=False,
    break_on_hyphens=False,
  )


def diagnose(run: Run, *, limits: HealthLimits | None = None, warmup_steps: int | None = None) -> HealthReport:
  """The verdict on a recorded run: FAIL, WARN and INFO findings, each with what to do next.

  FAIL: nonfinite norms or losses, a run that diverged or stopped training, a layer without a gradient, mostly rejected
  steps. WARN: spikes that reached the parameters, updates that jumped, a run that never learned or lost a part of what
  it learned, a rising norm, overfitting, a clip that removes most of the gradient, or that `clip_effect` saw starve
  leaves or lengthen the step, layers whose norms are far apart, many zeros. INFO: what a clip caught, what it does to
  the step, percentiles of the norm, step time, throughput, and which series are not fully judged.

  Every state and every loss is judged. Spikes at one time form one event, in `events`. Nothing is judged after the end
  of training, such as the step that made the parameters NaN, and a finding hides its consequences. Within a level the
  strongest finding comes first.

  Update ratios are judged only for a watch whose name begins with "update", such as `clipjax.watch(name="update")` last
  in the chain: before the learning rate, the ratio of gradient to parameters says nothing. Nonfinite norms are counted
  but left out of percentiles, and so is the warm-up. Quantities that were not recorded are not judged; with fewer than
  `limits.min_steps` norms, only checks without statistics run. docs/verdicts.md of the project shows how often the
  verdict is right.

  Args:
    run: a run from `read_run` or `Run.from_arrays`.
    limits: where findings begin; None: the defaults of `HealthLimits`.
    warmup_steps: how many steps to leave out at the start; None: those of a tenth of the rows, at most 100 rows.

  Returns:
    A `HealthReport`: its `findings` are in the order FAIL, WARN, INFO, and its `str()` is a table.

  Raises:
    TypeError: if `run` is not a `Run`, `limits` not a `HealthLimits`, a field of it not a number, or `warmup_steps` not
      a whole number.
    ValueError: if `warmup_steps` is negative, or a field of `limits` is out of its range.

  Example:
    >>> import json, tempfile, clipjax
    >>> rows = [{"clipjax_run": 1, "version": "0.1.0", "leaves": {}, "parameters": 7, "every": 1}]
    >>> rows += [{"step": i, "grad/norm": 2.0 + i % 3 if i < 999 else 90.0} for i in range(1000)]
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...   _ = file.write("".join(json.dumps(row) + chr(10) for row in rows))
    ...   file.flush()
    ...   report = clipjax.runs.diagnose(clipjax.runs.read_run(file.name))
    >>> for finding in report[:2]:
    ...   print(finding.level, finding.name, finding.message[:63])
    WARN spikes 1 spike reached the parameters. At step 999 'grad/norm' rose to
    INFO spike-rate 1 spikes per 1000 recorded steps: 1 in 1,000.
  """
  check_arguments(run, limits, warmup_steps)
  view = view_of(run, limits or HealthLimits(), warmup_steps)
  # Medians and quotients of norms near the largest float64 may be inf, and are reported as such.
  with np.errstate(over="ignore", invalid="ignore"):
    findings = judged(view, warmup_steps, DEFECTS, FACTS)
  return HealthReport(tuple(findings), run.path, len(run.steps), view.norms.warmup_steps, view.events)


def judged(view: View, warmup_steps: int | None, defects: Sequence[Check], facts: Sequence[Check]) -> list[Finding]:
  """All findings in a run, sorted by level; see the stages at the top of this file."""
  # The end: of everything that stopped the training, the earliest is its cause.
  found = [(finding, _end(view, finding)) for finding in _found(ENDS, view)]
  end = min((step for _, step in found if step is not None), default=None)
  cause = next((finding for finding, step in found if step == end), None)
  ended = [finding for finding, step in found if step is None or finding is cause]
  # Defects before the end, and facts about the whole run.
  findings = [*ended, *_found(defects, view if end is None else before(view, end, warmup_steps)), *_found(facts, view)]
  # Hide consequences; an INFO neither hides nor is hidden.
  explained = set().union(*(CONSEQUENCES.get(f.name, frozenset()) for f in findings if f.level != "INFO"))
  kept = [finding for finding in findings if finding.name not in explained or finding.level == "INFO"]
  return sorted(kept, key=lambda finding: LEVELS.index(finding.level))


def _found(checks: Sequence[Check], view: View) -> list[Finding]:
  """What these checks find: for the main state, and if they say so for every other one."""
  states = tuple(views_of(view))
  return [f for check in checks for v in (states if check in OF_STATES else states[:1]) for f in check(v)]


def _end(view: View, finding: Finding) -> int | None:
  """The step at which this finding ended the training; None if the training went on."""
  if finding.level != "FAIL" or not finding.steps:
    return None
  if finding.name not in NONFINITE:
    return finding.steps[0]
  # Nonfinite numbers end training only if they last to the end of the record: the last unbroken stretch counts.
  rows = np.searchsorted(view.run.steps, finding.steps)
  if rows[-1] < len(view.run) - 1:
    return None
  return finding.steps[int(np.flatnonzero(np.diff(rows, prepend=-2) > 1)[-1])]


def check_arguments(run: Any, limits: Any, warmup_steps: Any) -> None:
  """Raises unless run, limits and warm-up are valid; every function that judges a run calls it."""
  if not isinstance(run, Run):
    raise TypeError(f"`run` must be a Run, got {described(run)}: read the file with clipjax.runs.read_run(path).")
  check_limits(HealthLimits() if limits is None else limits)
  check_warmup(warmup_steps)
