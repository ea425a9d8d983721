"""Which `max_norm` to use, from the norms of a run that went well.

Stages of `suggest_max_norm`: take the norms, find the phase in which the run learned (`phase`), apply the formula
(`_threshold`), and add the notes (`suggest_notes`): how far to trust the record, and how the result compares with
published rules.
"""

import math
import textwrap
from typing import Any, NamedTuple

import numpy as np

from clipjax.runs.blocks import Blocks, blocks_of
from clipjax.runs.effects import is_scale_free
from clipjax.runs.kinds import Floats
from clipjax.runs.norms import FEW, Norms, check_warmup, main_name, norms_of_array, norms_of_run
from clipjax.runs.optimizers import scale_free_states
from clipjax.runs.phase import Phase, phase_of
from clipjax.runs.roles import losses_of
from clipjax.runs.run import Run
from clipjax.runs.sources import PASCANU, PLAYBOOK
from clipjax.runs.suggest_notes import FAMILIES, Case, Rates, notes_of, warnings_of
from clipjax.runs.words import described, number, percent

_ALTERNATIVES = (50, 75, 90, 99)
_PERCENTILE = 90  # The tuning playbook's starting point, for the learning rate of the run itself.
# For another learning rate; measured at 3 and 10 times the rate in docs/choosing.md. p90 works there too, but is closer
# to where training breaks.
BUDGET_PERCENTILE = 75
_GUARD = 2.0  # Times p90: above nearly all norms except spikes; measured on the same page.
_SPIKE_PERCENTILE = 99  # Spikes are overrepresented among norms by leaf, so steps above this percentile are left out.
_WIDTH = 100


class Suggestion(NamedTuple):
  """A threshold and the reason for it; `str()` explains it.

  Attributes:
    max_norm: the threshold, for `clip_by_global_norm`.
    clip_fraction: share of the norms of the phase above the threshold.
    reason: how the threshold was derived, in a few sentences with numbers.
    alternatives: pairs `(max_norm, clip_fraction)` for p50, p75, p90 and p99 of these norms.
    notes: what to try first, how far to trust the record, and how the threshold compares with published rules.
    sources: title and address of each published rule.
    phase: the first and last step of the norms that the percentile covers.
    scale_free: whether the threshold is for an optimizer that divides the scale of the gradient out.
    thresholds: the same by leaf or group, for `clip_by_group_norm`; empty if too few of their norms were recorded.

  Example:
    >>> import clipjax
    >>> suggestion = clipjax.runs.suggest_max_norm([float(norm) for norm in range(1, 102)], warmup_steps=0)
    >>> suggestion.max_norm, suggestion.alternatives[0], suggestion.phase
    (91.0, (51.0, 0.49504950495049505), (0, 100))
  """

  max_norm: float
  clip_fraction: float
  reason: str
  alternatives: tuple[tuple[float, float], ...]
  notes: tuple[str, ...]
  sources: tuple[str, ...]
  phase: tuple[int, int]
  scale_free: bool
  thresholds: dict[str, float]

  def __str__(self) -> str:
    rows = [("suggested", self.max_norm, self.clip_fraction)]
    rows += [(f"p{p}", *pair) for p, pair in zip(_ALTERNATIVES, self.alternatives, strict=True)]
    table = [f"  {'':<10}{'max_norm':>9}  would have clipped"]
    table += [f"  {name:<10}{number(value):>9}  {percent(share)}" for name, value, share in rows]
    notes = [textwrap.fill(note, _WIDTH, initial_indent="- ", subsequent_indent="  ", **_WHOLE) for note in self.notes]
    reason = textwrap.fill(self.reason, _WIDTH, **_WHOLE)
    sources = [f"- Source: {source}" for source in self.sources]
    return "\n".join([f"max_norm = {number(self.max_norm)}", "", reason, "", *table, "", *notes, *sources])


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def suggest_max_norm(
  norms_or_run: Any,
  *,
  learning_rate: float | None = None,
  new_learning_rate: float | None = None,
  scale_free: bool | None = None,
  model: str | None = None,
  warmup_steps: int | None = None,
) -> Suggestion:
  """A threshold for `clip_by_global_norm` from a run that went well: `p90(norms)`, or a budget for another rate.

  The budget is `p75(norms) * learning_rate / new_learning_rate`: `learning_rate * max_norm` bounds the length of an SGD
  step (times `1 / (1 - momentum)`), and the budget keeps that bound when the learning rate changes. An optimizer that
  divides the scale of the gradient out, such as Adam, Adafactor, Lion or Muon, gets a guard against spikes instead,
  `2 * p90(norms)`, which is only for the rate of the record: for another rate, record a run at that rate.

  The percentiles cover the raw norms, before any clip, of the phase in which the run learned: from the end of the
  warm-up until the loss had made 99.5% of its fall. Later norms are left out if they have fallen to less than half, as
  they do in a converged run. Without a loss, the phase holds 98% of the sum of squared norms. docs/choosing.md of the
  project shows how the rules do on ten models.

  Nonfinite norms are left out. It is an error if nine norms in ten or more are 0, since a threshold of 0 would stop the
  training. The norms of a run that diverged are no basis for a threshold; the reason then says so.

  Args:
    norms_or_run: a run from `read_run`, or the norms themselves, one per step, in step order: a list, a numpy or JAX
      array. A run gives the norms of "grad", or of the first recorded state if there is no "grad".
    learning_rate: the rate at which the norms were recorded, > 0.
    new_learning_rate: the rate that the threshold is for, > 0; pass both or neither.
    scale_free: whether the optimizer divides the scale of the gradient out; None: as the record says, from the states
      of the optimizer or from what `clip_effect` measured, and False if it does not say.
    model: "feed-forward", "cnn", "rnn", "lstm" or "transformer", to compare with the rule of thumb for that family.
    warmup_steps: how many steps to leave out at the start; None: those of a tenth of the rows of the phase, at most 100
      rows.

  Returns:
    A `Suggestion`: a threshold > 0, the share of the recorded norms above it, and the reason.

  Raises:
    ValueError: if the norms are negative, empty, not one-dimensional, all nonfinite after the warm-up, or nearly all 0;
      if only one learning rate is given, or one is not > 0 and finite; if `model` is unknown or `warmup_steps` is
      negative.
    TypeError: if `norms_or_run` is neither a run nor real numbers; for a `learning_rate`, `new_learning_rate`,
      `scale_free` or `warmup_steps` of the wrong type.

  Example:
    >>> import clipjax
    >>> norms = [1.0 + 0.01 * step for step in range(100)]
    >>> suggestion = clipjax.runs.suggest_max_norm(norms, learning_rate=0.1, new_learning_rate=0.5, warmup_steps=0)
    >>> print(f"{suggestion.max_norm:.4f} {suggestion.clip_fraction:.2f}")
    0.3485 1.00
    >>> print(clipjax.runs.suggest_max_norm(norms).reason)
    The 90th percentile of 90 norms (left out: 10 from the warm-up) is 1.9.

  References:
    Godbole et al., Deep Learning Tuning Playbook, 2023, https://github.com/google-research/tuning_playbook: start at
    the 90th percentile.
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063:
    half to ten times the mean norm; section 3.2.
  """
  # Take the norms.
  _check_options(learning_rate, new_learning_rate, scale_free, model)
  check_warmup(warmup_steps)
  run = norms_or_run if isinstance(norms_or_run, Run) else None
  norms = norms_of_array(norms_or_run, warmup_steps) if run is None else _norms(run, warmup_steps)
  _check(norms)
  rates = None if learning_rate is None or new_learning_rate is None else (learning_rate, new_learning_rate)
  # Decide whether the optimizer depends on the scale: what the caller says, then the record, then what was measured.
  states = () if run is None else scale_free_states(run)
  is_free = scale_free
  if is_free is None:
    is_free = bool(states) or (run is not None and bool(is_scale_free(run)))
  # Medians of norms near the largest float64 may be inf, and are reported as such.
  with np.errstate(over="ignore"):
    # Find the phase, apply the formula to its norms, and add warnings and notes.
    phase = phase_of(norms, None if run is None else losses_of(run), warmup_steps)
    typical = norms.values[norms.finite & (norms.steps >= phase.begin) & (norms.steps <= phase.end)]
    max_norm, formula = _threshold(typical, rates, is_free)
    _check_result(max_norm, rates, is_free)
    blocks = None if run is None else blocks_of(run, main_name(run))
    thresholds = {} if blocks is None else _by_block(blocks, norms, phase, rates, is_free)
    case = Case(run, norms, typical, phase, max_norm, rates, is_free, scale_free, states, model, blocks, thresholds)
    warnings, notes = warnings_of(case), notes_of(case)
  return Suggestion(
    max_norm=max_norm,
    clip_fraction=_share_above(typical, max_norm),
    reason=" ".join([formula.format(norms=_counted(norms, typical, phase)), *warnings]),
    alternatives=tuple((float(value), _share_above(typical, value)) for value in np.percentile(typical, _ALTERNATIVES)),
    notes=tuple(notes),
    sources=(str(PLAYBOOK), str(PASCANU)),
    phase=(int(phase.begin), int(phase.end)),
    scale_free=is_free,
    thresholds=thresholds,
  )


def _norms(run: Run, warmup_steps: int | None) -> Norms:
  return norms_of_run(run, main_name(run), warmup_steps)


def _threshold(typical: Floats, rates: Rates, scale_free: bool) -> tuple[float, str]:
  """The threshold, and how it was derived: a text with `{norms}` in place of the description of the norms."""
  p90 = float(np.percentile(typical, _PERCENTILE))
  text = f"The 90th percentile of {{norms}} is {number(p90)}"
  if scale_free:
    return _GUARD * p90, f"{text}; {_GUARD:g} times that is a guard, which clips spikes and little else."
  if rates is None or rates[0] == rates[1]:
    return p90, f"{text}."
  # The budget: keep the bound on the length of a step.
  old, new = rates
  p75 = float(np.percentile(typical, BUDGET_PERCENTILE))
  return p75 * (old / new), (
    f"The 75th percentile of {{norms}} is {number(p75)}. Multiplied by {old:g} / {new:g} for the new learning rate, it "
    f"keeps learning_rate * max_norm, which bounds the length of an SGD step, at {number(p75 * old)}."
  )


def _by_block(blocks: Blocks, norms: Norms, phase: Phase, rates: Rates, scale_free: bool) -> dict[str, float]:
  """The threshold of each leaf or group that has enough norms, unless nearly all of them are 0."""
  # Only ordinary steps of the phase: norms by leaf are also recorded at spikes.
  inside = norms.finite & (norms.steps >= phase.begin) & (norms.steps <= phase.end)
  usual = norms.values <= np.percentile(norms.values[inside], _SPIKE_PERCENTILE)
  rows = np.isin(blocks.steps, norms.steps[inside & usual])
  out = {}
  for label, column in zip(blocks.labels, blocks.norms[rows].T, strict=True):
    known = column[np.isfinite(column)]
    if known.size >= FEW and (threshold := _threshold(known, rates, scale_free)[0]) > 0:
      out[label] = threshold
  return out


def _share_above(typical: Floats, max_norm: float) -> float:
  return float(np.mean(typical > max_norm))


def _counted(norms: Norms, typical: Floats, phase: Phase) -> str:
  """Which norms the percentiles cover."""
  inside = (norms.steps >= phase.begin) & (norms.steps <= phase.end)
  nonfinite = int(np.sum(inside)) - typical.size
  left_out = [f"{phase.warmup} from the warm-up"] if phase.warmup else []
  left_out += [f"{nonfinite} nonfinite"] if nonfinite else []
  which = f" of steps {phase.begin} to {phase.end}" if phase.ended_by else ""
  return f"{typical.size} norms{which}" + (f" (left out: {', '.join(left_out)})" if left_out else "")


# Checks -------------------------------------------------------------------------------------------------------------


def _check(norms: Norms) -> None:
  """Raises unless there are finite norms after the warm-up that are not nearly all 0."""
  typical = norms.typical
  if typical.size == 0:
    raise ValueError(
      f"`norms_or_run` must have finite norms after the warm-up of {norms.warmup_steps} steps, got none of "
      f"{norms.values.size} ({int(norms.finite.sum())} finite in all): record more steps, at a learning rate at which "
      "they stay finite, or lower `warmup_steps`."
    )
  if np.percentile(typical, _PERCENTILE) == 0:
    raise ValueError(
      f"`norms_or_run` must have norms above 0, got 0 in {percent(float(np.mean(typical == 0)))} of {typical.size}: "
      "find out why the gradient is zero before you clip it."
    )


def _check_result(max_norm: float, rates: Rates, scale_free: bool) -> None:
  """Raises unless the threshold is > 0 and finite."""
  if 0 < max_norm < math.inf:
    return
  named, got, remedy = "`norms_or_run`", "", "check the norms."
  if rates is not None and not scale_free:
    named, got, remedy = "`learning_rate` and `new_learning_rate`", f"{rates} and ", "check the two rates."
  raise ValueError(f"{named} must give a threshold > 0 and finite, got {got}{max_norm:g}: {remedy}")


def _check_options(learning_rate: Any, new_learning_rate: Any, scale_free: Any, model: Any) -> None:
  for rate, name in ((learning_rate, "learning_rate"), (new_learning_rate, "new_learning_rate")):
    if rate is None:
      continue
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.integer | np.floating):
      raise TypeError(f"`{name}` must be a number, got {described(rate)}: pass a float such as 0.1.")
    if not 0 < rate < math.inf:
      raise ValueError(f"`{name}` must be > 0 and finite, got {rate}: pass a float such as 0.1.")
  if (learning_rate is None) != (new_learning_rate is None):
    raise ValueError(
      f"`learning_rate` and `new_learning_rate` must be given both or neither, got {learning_rate} and "
      f"{new_learning_rate}: pass the rate of the recorded run and the one that the threshold is for."
    )
  if scale_free is not None and not isinstance(scale_free, bool):
    raise TypeError(f"`scale_free` must be True, False or None, got {described(scale_free)}: pass one of them.")
  if model is not None and (not isinstance(model, str) or model.lower() not in FAMILIES):
    raise ValueError(f"`model` must be one of {', '.join(FAMILIES)} or None, got {described(model)}: pass the nearest.")
