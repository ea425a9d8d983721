"""Turns the results of `verdicts.py` into its page, in Markdown.

`render` is a pure function, so a test can compare the page with known results. Every number, and every sentence about
what is missed, is derived from the results.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from verdicts_conditions import HALVES
from verdicts_peers import NOT_GIVEN, TRIED
from verdicts_training import name_of_batch
from verdicts_truth import GRADUAL, LEVELS, NAMED, NATURAL, NEAR, Expected, Outcome, Truth

from clipjax.runs import Finding

TITLES = {"held-out": "The reported half", "tune": "The half on which the limits were chosen"}
DASH = "–"  # noqa: RUF001  (a dash, if there is nothing to name)


class Result(NamedTuple):
  """One judged run.

  Attributes:
    truth: how the run was made.
    outcome: how the verdict compares with the truth.
    findings: findings of the verdict.
    peers: outcomes of other run doctors, by name; empty if none was asked.
    seen: each series at the step to be named, as a multiple of its usual value; empty without such a step.
  """

  truth: Truth
  outcome: Outcome
  findings: tuple[Finding, ...]
  peers: dict[str, Outcome]
  seen: dict[str, float] = {}  # noqa: RUF012  (nothing changes it)


class Sums(NamedTuple):
  """Counts over runs.

  Attributes:
    bad: bad runs.
    named: bad runs with a right name among the findings.
    step: the same, also with the right steps.
    right: the same, also with the right steps and leaf.
    first: bad runs whose first finding has a right name.
    healthy: healthy runs.
    false: healthy runs with a false WARN or FAIL.
  """

  bad: int
  named: int
  step: int
  right: int
  first: int
  healthy: int
  false: int


def sums_of(pairs: Iterable[tuple[Truth, Outcome]]) -> Sums:
  """The counts over some runs."""
  pairs = list(pairs)
  bad = [outcome for truth, outcome in pairs if not truth.is_healthy]
  healthy = [outcome for truth, outcome in pairs if truth.is_healthy]
  return Sums(
    len(bad),
    sum(outcome.name is True for outcome in bad),
    sum(outcome.name is True and outcome.step is not False for outcome in bad),
    sum(outcome.is_right for outcome in bad),
    sum(outcome.is_first is True for outcome in bad),
    len(healthy),
    sum(bool(outcome.alarms) for outcome in healthy),
  )


def render(results: Sequence[Result], said: dict[str, str], versions: dict[str, str], is_quick: bool = False) -> str:
  """The whole page.

  Args:
    results: results of one or both halves.
    said: what was done in each condition, by name.
    versions: versions of the peers that were asked, by name.
    is_quick: whether only a few conditions and seeds were run.
  """
  kept = [result for result in results if result.truth.is_so]
  halves = [half for half in TITLES if any(result.truth.half == half for result in kept)]
  parts = [_head(kept, said, is_quick), _in_short(kept, halves)]
  for half in halves:
    parts.append(_half([result for result in kept if result.truth.half == half], half, said))
  parts += [_missed(kept, halves[:1]), _alarms(kept, halves[:1]), _peers(kept, halves, versions), _how(results)]
  return "\n\n".join(part for part in parts if part) + "\n"


def _head(kept: Sequence[Result], said: dict[str, str], is_quick: bool) -> str:
  known = {result.truth.condition: result.truth.is_healthy for result in kept}
  seeds = len(next(iter(HALVES.values())))
  lines = [
    "# The verdict, measured",
    "",
    "Does `clipjax.runs.diagnose` name what went wrong, at which step and in which leaf, and does it leave a healthy "
    f"run alone? Small models train on real data under {len(known)} known conditions, {sum(known.values())} of them "
    f"healthy, with {seeds} seeds each, and are recorded as a user would record them. The right answer follows from "
    "how a run was made.",
    "",
    "The limits of the verdict were chosen on one half of the runs. The other half, with other models, seeds and "
    "steps, is the reported result.",
    "",
    "```sh",
    "python benchmarks/verdicts.py --half both --peers --out docs/verdicts.md",
    "```",
  ]
  if is_quick:
    lines += ["", "**A quick run: it shows that everything runs, and measures little.**"]
  return "\n".join(lines)


def _in_short(kept: Sequence[Result], halves: Sequence[str]) -> str:
  rows = []
  for half in halves:
    s = sums_of((result.truth, result.outcome) for result in kept if result.truth.half == half)
    rows.append((TITLES[half], *_shares(s)))
  header = ("", "bad runs named", "with the step", "with step and leaf", "named first", "healthy runs with an alarm")
  return "\n".join(["## In short", "", *table(header, rows)])


def _shares(s: Sums) -> tuple[str, ...]:
  return (*(share(n, s.bad) for n in (s.named, s.step, s.right, s.first)), share(s.false, s.healthy))


def share(count: int, total: int) -> str:
  """A share such as "9 of 10 (90%)"."""
  return f"{count} of {total} ({count / total:.0%})" if total else DASH


def _half(results: Sequence[Result], half: str, said: dict[str, str]) -> str:
  """The tables by condition."""
  header = (
    "condition",
    "what was done, and the right answer",
    "name",
    "step",
    "leaf",
    "batch",
    "first",
    "false alarms",
  )
  lines = [f"## {TITLES[half]}", ""]
  for is_healthy, title in ((False, "Bad runs"), (True, "Healthy runs")):
    rows = []
    for name, group in by_condition(r for r in results if r.truth.is_healthy == is_healthy):
      counts = (
        _count(group, lambda o: o.name),
        _count(group, lambda o: o.step),
        _count(group, lambda o: o.leaf),
        _count(group, lambda o: o.batch),
        _count(group, lambda o: o.is_first),
      )
      rows.append((name, said.get(name, ""), *counts, _alarm_names(group)))
    lines += [f"### {title}", "", *table(header, rows), ""]
  return "\n".join(lines).rstrip()


def by_condition(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
  """The results by condition, in their order."""
  groups: dict[str, list[Result]] = {}
  for result in results:
    groups.setdefault(result.truth.condition, []).append(result)
  return list(groups.items())


def _count(group: Sequence[Result], field: Callable[[Outcome], bool | None]) -> str:
  known = [value for result in group if (value := field(result.outcome)) is not None]
  return f"{sum(known)}/{len(known)}" if known else DASH


def _alarm_names(group: Sequence[Result]) -> str:
  counts = Counter(name for result in group for name in set(result.outcome.alarms))
  return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or DASH


# What is missed -----------------------------------------------------------------------------------------------------


def _missed(kept: Sequence[Result], halves: Sequence[str]) -> str:
  """Each bad run with a wrong answer, and what the verdict says instead."""
  missed = [r for r in kept if r.truth.half in halves and not r.truth.is_healthy and not r.outcome.is_right]
  lines = ["## What is still missed", ""]
  if not missed:
    return "\n".join([*lines, "Nothing: every bad run of the reported half is named, with step and leaf."])
  lines += ["The bad runs of the reported half with a wrong answer, and what the verdict says about them.", ""]
  return "\n".join([*lines, *(f"- {_run(r.truth)}: {_wrong(r)}" for r in missed)])


def _wrong(result: Result) -> str:
  wanted = " or ".join(_answer(expected) for expected in result.truth.expected)
  said = [_finding(f) for f in result.findings if f.level in LEVELS]
  there = ", ".join(f"{factor:.3g} times its usual {key}" for key, factor in result.seen.items())
  there = f" At that step, the record shows {there}." if there else ""
  return f"the right answer is {wanted}; the verdict says {' and '.join(said) if said else 'nothing'}.{there}"


def _answer(expected: Expected) -> str:
  steps = f" at {_steps(expected.steps)}" if expected.steps else ""
  leaves = f" in {' or '.join(f'`{leaf}`' for leaf in expected.leaves[:NAMED])}" if expected.leaves else ""
  return f"`{expected.name}`{steps}{leaves}"


def _finding(finding: Finding) -> str:
  steps = f" at {_steps(sorted(finding.steps))}" if finding.steps else ""
  leaves = f" in {', '.join(f'`{leaf}`' for leaf in finding.leaves[:NAMED])}" if finding.leaves else ""
  return f"{finding.level} `{finding.name}`{steps}{leaves}"


def _steps(steps: Sequence[int]) -> str:
  """The first three steps, and how many more there are."""
  more = f" and {len(steps) - 3} more" if len(steps) > 3 else ""
  return f"step {', '.join(map(str, steps[:3]))}{more}"


def _run(truth: Truth) -> str:
  return f"{truth.condition} ({truth.model}, {truth.optimizer}, seed {truth.seed})"


def _alarms(kept: Sequence[Result], halves: Sequence[str]) -> str:
  """Each healthy run with a false alarm, and its message."""
  wrong = [r for r in kept if r.truth.half in halves and r.truth.is_healthy and r.outcome.alarms]
  lines = ["## False alarms on healthy runs", ""]
  if not wrong:
    return "\n".join([*lines, "None of the reported half."])
  for result in wrong:
    for finding in result.findings:
      if finding.level in LEVELS and finding.name in result.outcome.alarms:
        lines.append(f"- {_run(result.truth)}: {finding.level} `{finding.name}`: {finding.message}")
  return "\n".join(lines)


# Peers --------------------------------------------------------------------------------------------------------------


def _peers(kept: Sequence[Result], halves: Sequence[str], versions: dict[str, str]) -> str:
  lines = ["## Beside other run doctors", ""]
  if not versions:
    return ""
  lines += [
    f"Commands from PyPI (`pip install {' '.join(versions)}`) got the same runs as a table of losses, validation "
    f"losses, gradient norm and learning rate. They did not get {NOT_GIVEN}. Their checks are mapped to the names "
    "above in their favour, and their hints on the schedule do not count. Named: a right name is among the warnings "
    "and errors. With the step: by the same rule, if there is a step. No tool is asked for a leaf here.",
    "",
  ]
  for half in halves:
    group = [result for result in kept if result.truth.half == half]
    rows = [("clipjax", *_peer_shares(group, None))]
    rows += [(f"{name} {version}", *_peer_shares(group, name)) for name, version in versions.items()]
    header = (TITLES[half], "bad runs named", "with the step", "healthy runs with an alarm")
    lines += [*table(header, rows), ""]
  lines += _peers_by_condition([result for result in kept if result.truth.half == halves[0]], versions)
  lines += ["Also found on PyPI, but not asked:", ""]
  lines += [f"- {name} {why}." for name, why in TRIED.items()]
  return "\n".join(lines)


def _peer_shares(group: Sequence[Result], peer: str | None) -> tuple[str, str, str]:
  s = sums_of((r.truth, r.outcome if peer is None else r.peers[peer]) for r in group)
  return share(s.named, s.bad), share(s.step, s.bad), share(s.false, s.healthy)


def _peers_by_condition(group: Sequence[Result], versions: dict[str, str]) -> list[str]:
  """Two tables: bad runs named with the step, and healthy runs with an alarm."""
  named: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
  for name, results in by_condition(group):
    is_healthy, cells = results[0].truth.is_healthy, []
    for peer in (None, *versions):
      outcomes = [r.outcome if peer is None else r.peers[peer] for r in results]
      hits = [bool(o.alarms) if is_healthy else o.name is True and o.step is not False for o in outcomes]
      cells.append(f"{sum(hits)}/{len(hits)}")
    named[is_healthy].append((name, *cells))
  lines = []
  for is_healthy, header in ((False, "bad runs named with the step"), (True, "healthy runs with an alarm")):
    lines += [*table((header, "clipjax", *versions), named[is_healthy]), ""]
  return lines


# How ----------------------------------------------------------------------------------------------------------------


def _how(results: Sequence[Result]) -> str:
  left_out = [result.truth for result in results if not result.truth.is_so]
  lines = [
    "## How answers are judged",
    "",
    f"- Name: a finding has one of the right names. Step: the first step that it names is within {NEAR} of the first "
    f"planted step, and every other planted step is within {NEAR} of a named one. Leaf: one of the first {NAMED} "
    "leaves that it names is right; for `clip-starves` the last leaf counts, the cause.",
    "- If a run diverges by itself, the right step is the first from which the recorded loss stays above 1.5 times its "
    "best so far, and above that best by a tenth of the first loss; inf and NaN are above everything. The verdict may "
    f"then be {NATURAL} steps off, or {GRADUAL} if the rate rises gradually. If such a run ends in NaN, `nonfinite` or "
    "`nonfinite-loss` at the first such step is also right.",
    "- False alarm: a WARN or FAIL that is not true. Side effects of a condition do not count: a verdict may say that "
    "a diverged run also has spikes.",
    "- First: the first finding of the verdict, which answers what happened, has a right name.",
    f"- Batch: the text names the batches of the planted steps, such as `{name_of_batch(HALVES['held-out'][0], 123)}`.",
    "- A run whose loss does not behave as its condition says, by the rule above, is left out: "
    + (f"{', '.join(f'{_run(t)}, {t.half}' for t in left_out)}." if left_out else "none was."),
  ]
  return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """A table in Markdown."""
  lines = [header, ["---"] * len(header), *rows]
  return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]
