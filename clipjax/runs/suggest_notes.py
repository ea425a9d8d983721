"""What `suggest_max_norm` says beside the number: whether the run is a sound basis, and what the number is for.

Each note is a function from a `Case` to a text, which is empty if it does not apply. General claims about models were
measured by `benchmarks/choosing.py`; docs/choosing.md has the results.
"""

from typing import NamedTuple, TypeAlias

import numpy as np

from clipjax.metric_names import MAX_NORM, NORM, NORM_CLIPPED
from clipjax.runs.blocks import GROUP, Blocks
from clipjax.runs.course import began_late, course_of, has_diverged
from clipjax.runs.effects import SAME, STARVED, Effect, effect_of, starved_of
from clipjax.runs.kinds import Bools, Floats
from clipjax.runs.norms import FEW, Norms, acted, column, main_name, mean
from clipjax.runs.phase import MOST_OF_FALL, NORMS, OF_FALL, OF_SQUARES, Phase
from clipjax.runs.roles import effect_names, losses_of
from clipjax.runs.run import Run
from clipjax.runs.schema import SKIP, UPDATES, key_of, names_with
from clipjax.runs.sources import PASCANU, PLAYBOOK
from clipjax.runs.words import number, percent, several

Rates: TypeAlias = tuple[float, float] | None

FAMILIES = {
  "feed-forward": (5.0, 10.0),
  "cnn": (1.0, 5.0),
  "rnn": (0.25, 1.0),
  "lstm": (0.25, 1.0),
  "transformer": (0.5, 2.0),
}
# A run diverged if its norms rise by this factor, or if this share of them is nonfinite and was applied.
_DIVERGED_NORM, _DIVERGED_SHARE = 100.0, 0.05
_DEAD = 10  # With this many nonfinite norms at the end nothing trains any more, even if each was dropped.
_REJECTED = 0.1  # From this share on, rejected steps shift the 90th percentile noticeably.
_SHAPED = 0.25  # A clip that acts in more than this share of the steps has shaped the run and its norms.
_NAMED = 12  # Up to this many leaves or groups get their threshold named; more get a range.


class Case(NamedTuple):
  """Everything a note may look at.

  Attributes:
    run: the run; None for an array of norms.
    norms: all norms; `typical` are the ones that the percentile covers, in `phase`.
    max_norm: the threshold.
    rates: the learning rate of the record and the new one.
    scale_free: what was decided; `given` is what the caller asked for, `states` lists such optimizers in the record.
    model: the family of the model.
    blocks: norms by leaf or group; `thresholds` has the threshold of each.
  """

  run: Run | None
  norms: Norms
  typical: Floats
  phase: Phase
  max_norm: float
  rates: Rates
  scale_free: bool
  given: bool | None
  states: tuple[str, ...]
  model: str | None
  blocks: Blocks | None
  thresholds: dict[str, float]

  @property
  def is_other_rate(self) -> bool:
    """Whether the threshold is for a rate other than the recorded one."""
    return self.rates is not None and self.rates[0] != self.rates[1]


def warnings_of(case: Case) -> list[str]:
  """Why not to rely on the number; empty if it is sound."""
  return [text for check in (_few, _divergence, _rejected, _no_fall, _late_warmup) if (text := check(case))]


def notes_of(case: Case) -> list[str]:
  """What else to know, with what to do first in front."""
  notes = (
    _budget, _guard, _insurance, _effect, _record, _clipped_by, _shaped, _optimizer, _others, _rules, _half, _family,
  )  # fmt: skip
  return [text for note in notes if (text := note(case))]


# Whether the run is a sound basis -----------------------------------------------------------------------------------


def _few(case: Case) -> str:
  if case.typical.size >= FEW:
    return ""
  return f"Fewer than {FEW} norms are too few to rely on: record more steps."


def _divergence(case: Case) -> str:
  # Include the warm-up, since a run that diverges in its first steps may be level afterwards.
  norms = case.norms
  # Three signs: nonfinite norms, norms that rose if no loss was recorded, or a loss that left for good.
  finite, signs = norms.values[norms.finite], _nonfinite(case)
  course = None if case.run is None else course_of(*losses_of(case.run))
  medians = [float(np.median(part)) for part in np.array_split(finite, min(20, finite.size))]
  if course is None and finite.size >= FEW and medians[-1] > _DIVERGED_NORM * min(medians):
    signs.append(f"its norms rose from {number(min(medians))} to {number(medians[-1])}")
  if course is not None and has_diverged(course):
    low = course.best if course.fall > 0 else course.first
    signs.append(f"its loss rose from {number(low)} to {number(course.last)}")
  if not signs:
    return ""
  return (
    f"But the run diverged ({', '.join(signs)}): such norms are no basis for a threshold. Record a run at a learning "
    "rate at which it trains, then pass learning_rate= and new_learning_rate=."
  )


def _nonfinite(case: Case) -> list[str]:
  """Signs of divergence in nonfinite norms. Dropped steps did no harm, unless only they were left at the end."""
  norms = case.norms
  rows = np.flatnonzero(norms.finite)
  dropped = norms.rejected if case.run is None else norms.rejected | _zeroed(case.run, norms)
  # Nonfinite steps that reached the parameters: many of them, the last one, or nothing else at the end.
  is_applied = ~norms.finite & ~dropped
  share = float(np.mean(is_applied))
  if share > _DIVERGED_SHARE:
    return [f"{percent(share)} of its norms are nonfinite"]
  last = norms.values.size - 1 - int(rows[-1])
  if is_applied[-1] or last >= _DEAD:
    return [f"its last {f'{last} norms are' if last > 1 else 'norm is'} nonfinite"]
  return []


def _zeroed(run: Run, norms: Norms) -> Bools:
  """Which steps with a nonfinite norm the clip set to zero."""
  clipped = column(run, key_of(str(main_name(run)), NORM_CLIPPED))
  return ~norms.finite & np.isfinite(clipped[np.searchsorted(run.steps, norms.steps)])


def _rejected(case: Case) -> str:
  norms = case.norms
  inside = norms.finite & (norms.steps >= case.phase.begin) & (norms.steps <= case.phase.end)
  share = float(np.mean(norms.rejected[inside]))
  if share < _REJECTED:
    return ""
  return (
    f"But skip_steps rejected {percent(share)} of these steps, and their norms are included: find out why first "
    "(clipjax.runs.diagnose)."
  )


def _no_fall(case: Case) -> str:
  if case.phase.has_fallen is not False or _divergence(case) or (case.run is not None and began_late(case.run.steps)):
    return ""
  return (
    "But the loss of this run never fell: the norms of a run that does not learn are no basis for a threshold. Record "
    "one that does."
  )


def _late_warmup(case: Case) -> str:
  if not case.phase.is_missed:
    return ""
  return (
    f"But the run had learned before the {case.norms.warmup_steps}-step warm-up ended, so these are the norms of a "
    "converged run: lower `warmup_steps`."
  )


# What to do first ---------------------------------------------------------------------------------------------------


def _budget(case: Case) -> str:
  if not case.is_other_rate or case.scale_free:
    return ""
  return (
    "If you can afford more than one run, also try half and twice this value: on the models of docs/choosing.md both "
    "worked about as often as the value itself, and three times the value did not. Too high a threshold breaks "
    "training; too low a threshold slows it down."
  )


def _guard(case: Case) -> str:
  if not case.scale_free:
    return ""
  text = (
    "This guard is only for the learning rate of the record. It limits the damage of a bad batch: such a gradient "
    "moves the parameters at once, then stays in the second moment, where it makes about 1 / (1 - b2) later steps too "
    "small. It does not make up for a learning rate that is too high, because the optimizer divides the scale of the "
    "gradient out."
  )
  if case.is_other_rate:
    text += (
      " Norms differ at another rate: record a run at the new rate. No rule in docs/choosing.md did clearly better "
      "there than no clip."
    )
  return text


def _insurance(case: Case) -> str:
  if case.is_other_rate and not case.scale_free:
    return ""
  return (
    "At the rate of the record a run may need no clip at all: the clip is insurance against a batch with a gradient "
    "many times the usual size."
  )


def _effect(case: Case) -> str:
  if case.run is None:
    return ""
  said = []
  for name in effect_names(case.run):
    effect = effect_of(case.run, name, case.phase.begin)
    if effect is None or effect.rows < FEW:
      continue
    if (starved := starved_of(case.run, name, case.phase.begin, STARVED)) is not None:
      said.append(
        f"One leaf, {starved.holder!r}, triggered the clip of this run, and {starved.leaves[0]!r} kept "
        f"{percent(starved.kept)} of its step: a clip by leaf or group suits such a model better than any max_norm for "
        "all leaves."
      )
    said.append(_of_effect(effect))
  return " ".join(said)


def _of_effect(effect: Effect) -> str:
  """What the clip of the run did to the step, and what that means for a threshold."""
  numbers = f"(clip_effect: median ratio {number(effect.ratio)}, cosine {number(effect.cosine)})"
  if abs(effect.ratio - 1) <= SAME:
    return (
      f"The clip of this run kept the length of the step {numbers}: a threshold above its own only changes what a bad "
      "batch does."
    )
  did = f"made the step {number(effect.ratio)} times as long" if effect.ratio > 1 else ""
  did = did or f"shortened the step to {percent(effect.ratio)} of its length"
  return (
    f"The clip of this run {did} {numbers}. Another threshold changes the step, and with it the effective learning "
    "rate: tune both together."
  )


# How far to trust the record ----------------------------------------------------------------------------------------


def _record(case: Case) -> str:
  phase = case.phase
  # How the norms developed.
  course = "fell" if phase.last < phase.first else "rose" if phase.last > phase.first else "stayed"
  change = f"from {number(phase.first)} to {number(phase.last)}" if course != "stayed" else f"at {number(phase.last)}"
  text = f"The norms {course} {change} (medians of the first and last tenth of the record)."
  if phase.ended_by:
    share = f"the loss had made {percent(OF_FALL)} of its fall"
    if phase.ended_by == NORMS:
      share = f"the squared norms had reached {percent(OF_SQUARES)} of their sum (no loss was recorded)"
    return text + (
      f" By step {phase.end} {share}. The later norms (median {number(phase.after)}) are left out: they belong to a "
      "converged run, and with a threshold from them no run would learn. A longer record changes nothing."
    )
  # Whether the record is long enough.
  if phase.has_fallen is None:
    return text + " Without a recorded loss, nobody can tell whether the run had learned: push loss=."
  if phase.most_by is None:
    return text
  text += f" By step {phase.most_by} the loss had made {percent(MOST_OF_FALL)} of its fall"
  if phase.is_falling:
    return text + ", so it was still falling: record until it levels off, or for as long as the next run will take."
  return text + ": the record is long enough."


def _clipped_by(case: Case) -> str:
  blocks = case.blocks
  if blocks is None or not blocks.labels:
    return ""
  if not blocks.clipped:
    return ""
  text = f"max_norm is for clip_by_global_norm, but this run was clipped by {blocks.clipped}."
  if not case.thresholds:
    return text + (
      f" Fewer than {FEW} of these steps have norms by {blocks.clipped}, too few for thresholds: record them more "
      "often with Recorder(every=5)."
    )
  # Name each threshold, or their range if there are many.
  values = case.thresholds
  said = ", ".join(f"{number(value)} for {several([label], blocks.labels)}" for label, value in values.items())
  if len(values) > _NAMED:
    said = f"{number(min(values.values()))} to {number(max(values.values()))}"
  text += f" The same formula by {blocks.clipped} gives `thresholds`: {said}."
  if blocks.clipped == GROUP:
    return f"{text} Pass them to clip_by_group_norm as they are."
  return text + (
    f" clip_by_leaf_norm takes one number for all leaves: the largest, {number(max(values.values()))}, clips no leaf "
    "below its own threshold. clip_by_group_norm(thresholds, lambda path, leaf: path) takes one per leaf."
  )


def _shaped(case: Case) -> str:
  if case.run is None:
    return ""
  name = main_name(case.run)
  inside = (case.norms.steps >= case.phase.begin) & (case.norms.steps <= case.phase.end)
  share = float(np.mean(acted(case.run, name, case.norms)[inside]))
  if share <= _SHAPED:
    return ""
  text = (
    f"The clip of this run acted in {percent(share)} of these steps and shaped the run: without it the norms, and this "
    "number, would differ."
  )
  limits = column(case.run, key_of(str(name), MAX_NORM))
  limits = limits[np.isfinite(limits)]
  if case.rates is not None and case.is_other_rate and not case.scale_free and limits.size:
    old, new = case.rates
    kept = float(np.median(limits)) * (old / new)  # Keeps learning_rate * max_norm of the recorded clip.
    text += f" Its steps were bounded by a threshold of {number(np.median(limits))}: at the new rate the same bound "
    text += f"needs {number(kept)}."
  return text


# What it is for -----------------------------------------------------------------------------------------------------


def _optimizer(case: Case) -> str:
  if case.given is None and case.states:
    return (
      f"According to the record, the optimizer divides the scale of the gradient out ({', '.join(case.states)}): pass "
      "scale_free=False if the threshold is for another optimizer."
    )
  if case.given is None and case.scale_free:
    return (
      "clip_effect measured that steps keep their length when the gradient is clipped to less than half: the optimizer "
      "divides the scale of the gradient out. Pass scale_free=False if the threshold is for another optimizer."
    )
  if case.scale_free or case.rates is not None:
    return ""
  known = "" if case.run is None else ", ".join(case.run.optimizer)
  said = f"The record shows no optimizer like Adam ({known})" if known else "The record does not name the optimizer"
  return (
    f"{said}: the number is for SGD at the learning rate of this run. For another rate pass learning_rate= and "
    "new_learning_rate=; for Adam and similar optimizers pass scale_free=True."
  )


def _others(case: Case) -> str:
  if case.run is None:
    return ""
  name = main_name(case.run)
  others = [x for x in names_with(case.run.columns, NORM) if x not in (name, SKIP, UPDATES)]
  if not others:
    return ""
  key = key_of(others[0], NORM)
  return f"This is for {name!r}. For {several(others, others)} pass the norms: suggest_max_norm(run[{key!r}])."


# Published rules ----------------------------------------------------------------------------------------------------


def _rules(case: Case) -> str:
  middle = mean(case.typical)
  text = (
    f"{PLAYBOOK.title} recommends starting at the 90th percentile. {PASCANU.title} found that half to ten times the "
    f"mean norm can work: here {number(middle / 2)} to {number(middle * 10)}, and {number(case.max_norm)} is "
    f"{_place(case.max_norm, middle / 2, middle * 10)} that range."
  )
  if case.is_other_rate and not case.scale_free:
    text += " Both rules are for the learning rate of the record."
  return text


def _half(case: Case) -> str:
  if np.mean(case.typical > case.max_norm) <= 0.5:
    return ""
  return (
    "More than half of the recorded norms are above it: at the new learning rate the clip sets the length of most "
    'steps, as intended here. The playbook calls that "extremely aggressive" and would lower the learning rate instead.'
  )


def _family(case: Case) -> str:
  if case.model is None:
    return ""
  low, high = FAMILIES[case.model.lower()]
  return (
    f"The rule of thumb for this family of models ({case.model.lower()}) is {low:g} to {high:g}, and "
    f"{number(case.max_norm)} is {_place(case.max_norm, low, high)} that range. The rule ignores the size of the model "
    "and the scale of the loss: trust the norms of the run more."
  )


def _place(value: float, low: float, high: float) -> str:
  return "below" if value < low else "above" if value > high else "inside"
