"""A verdict on a recorded run: what is wrong, what to look at, and the numbers that practitioners ask for.

The checks are in the files beside this one, a family of findings each. A finding says its number, the rule with its
limit, where the rule comes from, and what to do next. The limits are the fields of `HealthLimits`.
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
from clipjax.runs.health.findings import Finding, HealthLimits, check_limits
from clipjax.runs.health.layers import layer_spread, zero_gradient, zeros
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

# What may end a training: all that comes after that is its aftermath, and is not judged.
ENDS: tuple[Check, ...] = (nonfinite_norm, nonfinite_loss, diverged, stopped)
NONFINITE = frozenset({"nonfinite", "nonfinite-loss"})
# Of the rows before that, the strongest first. Those of `OF_STATES` are made of each state that is judged.
DEFECTS: tuple[Check, ...] = (
  zero_gradient, skipped, update_spikes, spikes, not_learning, rising_loss, clip_starves, clipped_often, clip_lengthens,
  update_ratio, layer_spread, rising_norm, overfit, zeros,
)  # fmt: skip
OF_STATES = frozenset({nonfinite_norm, zero_gradient, layer_spread, rising_norm, zeros})
FACTS: tuple[Check, ...] = (
  too_few, not_judged, left_out, spikes_of_leaves, spike_rate, norm_percentiles, norm_scale, clipped, clip_effect,
  loss_course, parameters, step_time,
)  # fmt: skip

# One cause, one advice: where a finding is there, these are its consequences, or the same in other words.
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
  """The verdict on a run: a sequence of findings, whose `str()` is a table.

  `len`, `bool`, iteration, indices and slices are those of `findings`.

  Attributes:
    findings: what was found, FAIL before WARN before INFO.
    path: the file of the run.
    steps: how many steps it has.
    warmup_steps: how many steps, from the first one on, were left out of medians and percentiles.
    events: what happened, in the order of the steps: spikes of the series, brought together.

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
    """How many findings each level has: "1 FAIL, 0 WARN, 3 INFO"."""
    return ", ".join(f"{sum(finding.level == level for finding in self)} {level}" for level in LEVELS)

  def table(self, width: int = 100) -> str:
    """The findings as text of `width` columns, 60 or more; a long word may reach beyond."""
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
  """The rule and its source as a sentence, empty where there are none."""
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
  """The verdict on a recorded run: findings of the levels FAIL, WARN and INFO, each with what to do next.

  FAIL: norms or losses that are not finite, a run that diverged or in which nothing trains any more, a layer without a
  gradient, steps that were mostly dropped. WARN: spikes that reached the parameters, updates that jumped, a run that
  never learned or lost a part of what it learned, a norm that rises, overfitting, a clip that takes most of the
  gradient, or that `clip_effect` saw starve leaves or lengthen the step, layers whose norms are far apart, many zeros.
  INFO: what a clip caught, what it does to the step, percentiles of the norm, step time, throughput, and which series
  are not judged.

  Every state is judged, and every loss; spikes at one time are one event, in `events`. What comes after the end of a
  training, as where its parameters are NaN, is not judged, and of a cause and its consequences the cause alone is
  told. The strongest finding of a level comes first.

  Update ratios are judged of a watch whose name begins with "update", as `clipjax.watch(name="update")` last in the
  chain: the ratio of a gradient to its parameters says nothing before the learning rate. Norms of inf and NaN are
  counted and left out of percentiles, and so is the warm-up. What was not recorded is not judged, and with fewer than
  `limits.min_steps` norms only what needs no statistics is. How often it is right: docs/verdicts.md of the project.

  Args:
    run: what `read_run` gives.
    limits: where the findings begin; None: the published ones, see `HealthLimits`.
    warmup_steps: how many steps from the first on to leave out; None: those of a tenth of the rows, at most 100 rows.

  Returns:
    A `HealthReport`, whose `findings` are in the order FAIL, WARN, INFO, and whose `str()` is a table.

  Raises:
    TypeError: if `run` is no `Run`, `limits` no `HealthLimits`, a field of it no number, or `warmup_steps` no whole
      number.
    ValueError: if `warmup_steps` is negative, or a field of `limits` out of its range.

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
  # Medians and quotients of norms near the largest float64 are inf, which is told.
  with np.errstate(over="ignore", invalid="ignore"):
    findings = judged(view, warmup_steps, DEFECTS, FACTS)
  return HealthReport(tuple(findings), run.path, len(run.steps), view.norms.warmup_steps, view.events)


def judged(view: View, warmup_steps: int | None, defects: Sequence[Check], facts: Sequence[Check]) -> list[Finding]:
  """What is found in a run: its end, then the defects of the rows before that, then facts of the whole."""
  found = [(finding, _end(view, finding)) for finding in _found(ENDS, view)]
  end = min((step for _, step in found if step is not None), default=None)
  cause = next((finding for finding, step in found if step == end), None)
  ended = [finding for finding, step in found if step is None or finding is cause]
  findings = [*ended, *_found(defects, view if end is None else before(view, end, warmup_steps)), *_found(facts, view)]
  explained = set().union(*(CONSEQUENCES.get(f.name, frozenset()) for f in findings if f.level != "INFO"))
  kept = [finding for finding in findings if finding.name not in explained or finding.level == "INFO"]
  return sorted(kept, key=lambda finding: LEVELS.index(finding.level))


def _found(checks: Sequence[Check], view: View) -> list[Finding]:
  states = tuple(views_of(view))
  return [f for check in checks for v in (states if check in OF_STATES else states[:1]) for f in check(v)]


def _end(view: View, finding: Finding) -> int | None:
  """The step at which a training ended by what was found; None where it went on."""
  if finding.level != "FAIL" or not finding.steps:
    return None
  if finding.name not in NONFINITE:
    return finding.steps[0]
  rows = np.searchsorted(view.run.steps, finding.steps)
  if rows[-1] < len(view.run) - 1:
    return None  # Numbers were finite again.
  return finding.steps[int(np.flatnonzero(np.diff(rows, prepend=-2) > 1)[-1])]


def check_arguments(run: Any, limits: Any, warmup_steps: Any) -> None:
  """Raises for what is no run, no limits or no warm-up, as all that judges a run does."""
  if not isinstance(run, Run):
    raise TypeError(f"`run` must be a Run, got {described(run)}: read the file with clipjax.runs.read_run(path).")
  check_limits(HealthLimits() if limits is None else limits)
  check_warmup(warmup_steps)
