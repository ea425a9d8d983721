"""The truth about a run of `verdicts.py`, and how findings are compared with it.

The truth is how the run was made: what was planted, at which step, in which leaf. Only if a run diverges by itself does
the step come from the recorded loss, by the rule of `departure`. Nothing here depends on how a verdict is found.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from small_models import Array

from clipjax.runs import Finding

NEAR = 2  # Allowed steps between a planted and a named step.
NATURAL = 10  # The same if the rate is too high from the start: the loss takes some steps to diverge.
GRADUAL = 20  # The same if the rate rises gradually.
NAMED = 3  # Only so many leaves of a finding count: naming all of them names none.
LEVELS = ("FAIL", "WARN")  # Levels that count as an alarm.


class Expected(NamedTuple):
  """One right answer.

  Attributes:
    name: name of the finding.
    steps: the steps that it must name, the first one first.
    near: how many steps off it may be.
    leaves: leaves of which one must be among the first three named.
    batches: names of the batches of these steps.
    is_last: whether the leaf must instead be the last one named: the cause, after the leaves that suffer from it.
  """

  name: str
  steps: tuple[int, ...] = ()
  near: int = NEAR
  leaves: tuple[str, ...] = ()
  batches: tuple[str, ...] = ()
  is_last: bool = False


class Truth(NamedTuple):
  """The truth about a run.

  Attributes:
    half: "tune" or "held-out".
    condition: name of the condition.
    model: name of the model.
    optimizer: name of the optimizer.
    seed: seed of parameters and batches.
    is_healthy: whether a user needs no warning.
    expected: the right answers, one of which is enough; empty for most healthy runs.
    also: names of findings that are also true, and so no false alarms.
    course: what the loss should do according to `course_of`; "" if the condition does not say.
    is_so: whether the recorded loss did that; otherwise the run is left out.
  """

  half: str
  condition: str
  model: str
  optimizer: str
  seed: int
  is_healthy: bool
  expected: tuple[Expected, ...]
  also: tuple[str, ...] = ()
  course: str = ""
  is_so: bool = True

  @property
  def file(self) -> str:
    """The name of the run's file."""
    condition = re.sub("[^a-zA-Z0-9]+", "-", self.condition)
    return f"{self.half}/{condition}--{self.model}-{self.optimizer}--{self.seed}.jsonl"


class Outcome(NamedTuple):
  """How a verdict compares with the truth; None if there is nothing to name.

  Attributes:
    name: whether a right name is among the findings.
    is_first: whether it is the first finding.
    step: whether it names the steps.
    leaf: whether it names the leaf.
    batch: whether it names the batches.
    alarms: names of WARN and FAIL findings that are not true.
  """

  name: bool | None
  is_first: bool | None
  step: bool | None
  leaf: bool | None
  batch: bool | None
  alarms: tuple[str, ...]

  @property
  def is_right(self) -> bool:
    """Whether name, step and leaf are right, as far as they are expected."""
    return self.name is not False and self.step is not False and self.leaf is not False


def judge(truth: Truth, findings: Sequence[Finding]) -> Outcome:
  """The outcome of a verdict for the right answer that it comes nearest to."""
  names = {expected.name for expected in truth.expected}
  alarms = tuple(f.name for f in findings if f.level in LEVELS and f.name not in names.union(truth.also))
  outcomes = [_held_against(expected, findings, alarms) for expected in truth.expected]
  if not outcomes:
    return Outcome(None, None, None, None, None, alarms)
  return max(outcomes, key=lambda o: (o.is_right, o.name is True, o.step is True, o.leaf is True))


def _held_against(expected: Expected, findings: Sequence[Finding], alarms: tuple[str, ...]) -> Outcome:
  """Compares the findings of one name, which must together name what is expected."""
  found = [finding for finding in findings if finding.name == expected.name]
  is_first = bool(found) and findings[0].name == expected.name
  step = _names_steps(expected, found) if expected.steps else None
  leaf = any(_names_leaf(expected, finding) for finding in found) if expected.leaves else None
  said = " ".join(f"{finding.message} {finding.advice}" for finding in found)
  batch = all(batch in said for batch in expected.batches) if expected.batches else None
  return Outcome(bool(found), is_first, step, leaf, batch, alarms)


def _names_steps(expected: Expected, found: Iterable[Finding]) -> bool:
  """Whether the first step is named first, and all others are named."""
  named = sorted(step for finding in found for step in finding.steps)
  if not named or abs(named[0] - min(expected.steps)) > expected.near:
    return False
  return all(min(abs(step - other) for other in named) <= expected.near for step in expected.steps)


def _names_leaf(expected: Expected, finding: Finding) -> bool:
  """Whether one of the leaves is named, with or without the name of its state."""
  named = finding.leaves[-1:] if expected.is_last else finding.leaves[:NAMED]
  return any(name == leaf or name.endswith(f"/{leaf}") for name in named for leaf in expected.leaves)


# The course of a loss -----------------------------------------------------------------------------------------------


def departure(losses: Array) -> int | None:
  """The index from which the loss stays above 1.5 times its best so far, and above that best by a tenth of its start.

  A loss of inf or NaN is above everything. None if the loss never diverges, or only in the last tenth.
  """
  values = np.where(np.isfinite(losses), losses, np.inf)
  best = np.minimum.accumulate(values)[:-1]
  after = np.minimum.accumulate(values[::-1])[::-1][1:]
  is_left = after > np.maximum(1.5 * best, best + 0.1 * abs(values[0]))
  left = np.flatnonzero(is_left) + 1
  return int(left[0]) if left.size and left[0] < 0.9 * len(values) else None


def course_of(losses: Array) -> str:
  """What a loss does: "leaves" (diverges for good), "learns" (last tenth below 0.8 of the first), else "flat"."""
  if departure(losses) is not None:
    return "leaves"
  start, end = losses[0], np.nanmean(losses[-len(losses) // 10 :])
  return "learns" if end < 0.8 * start else "flat"


# The file of the truth ----------------------------------------------------------------------------------------------


def write_truths(truths: Iterable[Truth], path: pathlib.Path) -> None:
  """Adds the truths to a JSON object, by file name of the run."""
  known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  known |= {t.file: {**t._asdict(), "expected": [e._asdict() for e in t.expected]} for t in truths}
  path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


def read_truths(path: pathlib.Path) -> list[Truth]:
  """Reads what `write_truths` wrote."""
  return [_truth(fields) for fields in json.loads(path.read_text(encoding="utf-8")).values()]


def _truth(fields: dict[str, Any]) -> Truth:
  expected = tuple(
    Expected(**{**e, **{name: tuple(e[name]) for name in ("steps", "leaves", "batches")}}) for e in fields["expected"]
  )
  return Truth(**{**fields, "expected": expected, "also": tuple(fields["also"])})
