"""Which `max_norm` to use, from the norms of a run that went well.

The formula and its constants are `_threshold`; the rest finds the norms that it is applied to, and says
how the result stands to them and to the rules of others.
"""

import math
import textwrap
from typing import Any, NamedTuple

import numpy as np

from clipjax.runs.kinds import Floats
from clipjax.runs.norms import FEW, Norms, check_warmup, main_name, mean, norms_of_array, norms_of_run
from clipjax.runs.run import Run
from clipjax.runs.schema import LOSS
from clipjax.runs.sources import PASCANU, PLAYBOOK
from clipjax.runs.words import described, number, percent

FAMILIES = {
  "feed-forward": (5.0, 10.0),
  "cnn": (1.0, 5.0),
  "rnn": (0.25, 1.0),
  "lstm": (0.25, 1.0),
  "transformer": (0.5, 2.0),
}
_ALTERNATIVES = (50, 75, 90, 99)
_PERCENTILE = 90  # The start that the tuning playbook recommends, for the rate of the run itself.
# For another rate: measured on four models at 3 and 10 times the rate, docs/choosing.md. p90 works there too, nearer to
# the side on which training breaks.
_BUDGET_PERCENTILE = 75
_GUARD = 2.0  # Above nearly all norms that are no spike; under Adam anything from p50 to 10 p90 did, the same page.
_DIVERGED_NORM, _DIVERGED_LOSS, _DIVERGED_SHARE = 100.0, 1.5, 0.05
_WIDTH = 100


class Suggestion(NamedTuple):
  """A threshold and why; `str()` explains it.

  Attributes:
    max_norm: the threshold, for `clip_by_global_norm`.
    clip_fraction: share of the norms, finite and after the warm-up, that are above it.
    reason: where it comes from, in a few sentences with numbers.
    alternatives: pairs `(max_norm, clip_fraction)` for p50, p75, p90 and p99 of these norms.
    notes: what else to know: how it stands to the rules of others, and what it holds for.
    sources: where the rules of others come from, title and address each.

  Example:
    >>> import clipjax
    >>> suggestion = clipjax.runs.suggest_max_norm([float(norm) for norm in range(1, 102)], warmup_steps=0)
    >>> suggestion.max_norm, suggestion.alternatives[0]
    (91.0, (51.0, 0.49504950495049505))
  """

  max_norm: float
  clip_fraction: float
  reason: str
  alternatives: tuple[tuple[float, float], ...]
  notes: tuple[str, ...]
  sources: tuple[str, ...] = ()

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
  scale_free: bool = False,
  model: str | None = None,
  warmup_steps: int | None = None,
) -> Suggestion:
  """A threshold for `clip_by_global_norm`, from a run that went well: `p90(norms)`, or for another rate a budget.

  The budget is `p75(norms) * learning_rate / new_learning_rate`: `learning_rate * max_norm` bounds the length of a step
  of SGD (times `1 / (1 - momentum)`), and is kept where the rate changes. An optimizer that divides the scale of the
  gradient out, such as Adam, Adafactor, Lion or Muon, gets a guard against spikes instead, `2 * p90`: its steps are as
  long with one threshold as with another. Percentiles are of the raw norms, before any clip, without those that are
  not finite and without the warm-up. How the rules fare on four models: docs/choosing.md of the project.

  Norms of inf and NaN are left out. Norms of 0 in nine steps of ten or more are an error, as 0 would stop the
  training. Norms of a run that diverged are no base for a threshold, which the reason then says.

  Args:
    norms_or_run: what `read_run` gives, or the norms themselves, one a step, in the order of the steps: a list, a numpy
      or JAX array. Of a run the norms of "grad", else of the first state that is recorded.
    learning_rate: the one that the norms were recorded at, > 0.
    new_learning_rate: the one that the threshold is for, > 0; both or neither.
    scale_free: whether the optimizer divides the scale of the gradient out.
    model: "feed-forward", "cnn", "rnn", "lstm" or "transformer", to compare with the rule of thumb for it.
    warmup_steps: how many steps from the first on to leave out; None: those of a tenth of the rows, at most 100 rows.

  Returns:
    A `Suggestion`: a threshold > 0, the share of the recorded norms above it, and why.

  Raises:
    ValueError: for norms that are negative, empty, not in one dimension, none finite after the warm-up, or 0 nearly
      throughout; for one learning rate of two, or one that is not > 0; for an unknown model.
    TypeError: for what is no run and no real numbers.

  Example:
    >>> import clipjax
    >>> norms = [1.0 + 0.01 * step for step in range(100)]
    >>> suggestion = clipjax.runs.suggest_max_norm(norms, learning_rate=0.1, new_learning_rate=0.5, warmup_steps=0)
    >>> print(f"{suggestion.max_norm:.4f} {suggestion.clip_fraction:.2f}")
    0.3485 1.00
    >>> print(clipjax.runs.suggest_max_norm(norms).reason)
    The 90th percentile of 90 norms (the 10 of the warm-up left out) is 1.9.

  References:
    Godbole et al., Deep Learning Tuning Playbook, 2023, https://github.com/google-research/tuning_playbook: the 90th
    percentile as a start.
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063:
    half to ten times the mean norm; section 3.2.
  """
  _check_options(learning_rate, new_learning_rate, scale_free, model)
  check_warmup(warmup_steps)
  run = norms_or_run if isinstance(norms_or_run, Run) else None
  norms = norms_of_array(norms_or_run, warmup_steps) if run is None else _norms(run, warmup_steps)
  typical = _checked(norms)
  rates = None if learning_rate is None or new_learning_rate is None else (learning_rate, new_learning_rate)
  max_norm, formula = _threshold(typical, rates, scale_free)
  if not 0 < max_norm < math.inf:
    named, got, remedy = "`norms_or_run`", "", "look at the norms."
    if rates is not None and not scale_free:
      named, got, remedy = "`learning_rate` and `new_learning_rate`", f"{rates} and ", "check the two rates."
    raise ValueError(f"{named} must give a threshold > 0 and finite, got {got}{max_norm:g}: {remedy}")
  with np.errstate(over="ignore"):  # Medians of norms near the largest float64 are inf, which is told.
    warnings = [_few(typical), _divergence(norms, run)]
  return Suggestion(
    max_norm=max_norm,
    clip_fraction=_share_above(typical, max_norm),
    reason=" ".join([formula.format(norms=_counted(norms)), *filter(None, warnings)]),
    alternatives=tuple((float(value), _share_above(typical, value)) for value in np.percentile(typical, _ALTERNATIVES)),
    notes=tuple(_notes(typical, max_norm, rates, scale_free, model)),
    sources=(str(PLAYBOOK), str(PASCANU)),
  )


def _norms(run: Run, warmup_steps: int | None) -> Norms:
  return norms_of_run(run, main_name(run), warmup_steps)


def _threshold(typical: Floats, rates: tuple[float, float] | None, scale_free: bool) -> tuple[float, str]:
  """The threshold, and where it comes from as a text in which `{norms}` says which norms."""
  p90 = float(np.percentile(typical, _PERCENTILE))
  text = f"90th percentile of {{norms}} is {number(p90)}"
  if scale_free:
    return _GUARD * p90, (
      f"The {text}, and {_GUARD:g} times that lies just above the typical norm: it clips spikes and little else. The "
      "optimizer divides the scale of the gradient out, so that the threshold hardly matters but for spikes."
    )
  if rates is None or rates[0] == rates[1]:
    return p90, f"The {text}."
  old, new = rates
  p75 = float(np.percentile(typical, _BUDGET_PERCENTILE))
  return p75 * (old / new), (
    f"The 75th percentile of {{norms}} is {number(p75)}, times {old:g} / {new:g} for the new learning rate: under SGD "
    f"learning_rate * max_norm bounds the length of a step, and that stays at {number(p75 * old)}."
  )


def _share_above(typical: Floats, max_norm: float) -> float:
  return float(np.mean(typical > max_norm))


def _checked(norms: Norms) -> Floats:
  """The finite norms after the warm-up, of which there are some, not nearly all of them 0."""
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
      "look why the gradient is zero before you clip it."
    )
  return typical


def _counted(norms: Norms) -> str:
  """Which norms the percentiles are of."""
  in_warmup = int(np.sum(norms.steps < norms.begin))
  nonfinite = norms.values.size - in_warmup - norms.typical.size
  left_out = [f"the {in_warmup} of the warm-up"] if in_warmup else []
  left_out += [f"{nonfinite} nonfinite"] if nonfinite else []
  return f"{norms.typical.size} norms" + (f" ({' and '.join(left_out)} left out)" if left_out else "")


def _few(typical: Floats) -> str:
  if typical.size >= FEW:
    return ""
  return f"These are fewer than {FEW} norms, too few to rely on: record more steps."


def _divergence(norms: Norms, run: Run | None) -> str:
  """Why the run is no base for a threshold; an empty text where it is one."""
  # The warm-up too: a run that diverges in its first steps may be level afterwards.
  finite, signs = norms.values[norms.finite], []
  nonfinite = 1 - finite.size / norms.values.size
  if nonfinite > _DIVERGED_SHARE:
    signs.append(f"{percent(nonfinite)} of its norms are not finite")
  elif not norms.finite[-1]:
    signs.append("its last norm is not finite")
  medians = [float(np.median(part)) for part in np.array_split(finite, min(20, finite.size))]
  if finite.size >= FEW and medians[-1] > _DIVERGED_NORM * min(medians):
    signs.append(f"its norms rose from {number(min(medians))} to {number(medians[-1])}")
  loss = np.zeros(0) if run is None else run.columns.get(LOSS, np.zeros(0))
  loss = loss[np.isfinite(loss)]
  if loss.size >= FEW:
    first, last = float(loss[:3].max()), float(np.median(loss[-(loss.size // 10) :]))
    if first > 0 and last > _DIVERGED_LOSS * first:
      signs.append(f"its loss rose from {number(first)} to {number(last)}")
  if not signs:
    return ""
  return (
    f"But the run diverged ({', '.join(signs)}): such norms are no base for a threshold. Record a run at a learning "
    "rate at which it trains, and go from there with learning_rate= and new_learning_rate=."
  )


def _notes(
  typical: Floats, max_norm: float, rates: tuple[float, float] | None, scale_free: bool, model: str | None
) -> list[str]:
  middle = mean(typical)
  notes = [
    f"{PLAYBOOK.title} recommends the 90th percentile as a start. {PASCANU.title} found that half to "
    f"ten times the mean norm can work: here {number(middle / 2)} to {number(middle * 10)}, and "
    f"{number(max_norm)} lies {_place(max_norm, middle / 2, middle * 10)}."
  ]
  if rates is not None and rates[0] != rates[1] and not scale_free:
    notes[0] += " Both are for the learning rate that the norms were recorded at."
  if _share_above(typical, max_norm) > 0.5:
    notes.append(
      "More than half of the recorded norms are above it: at the new learning rate the clip sets the length of most "
      'steps, as it is meant to here. The playbook calls that "extremely aggressive" and would lower the learning rate '
      "instead."
    )
  if model is not None:
    low, high = FAMILIES[model.lower()]
    notes.append(
      f"The rule of thumb for this family of models ({model.lower()}) is {low:g} to {high:g}, and {number(max_norm)} "
      f"lies {_place(max_norm, low, high)}. It knows neither the size of the model nor the scale of the loss: trust "
      "the norms of the run more."
    )
  if rates is None and not scale_free:
    notes.append(
      "It is for SGD at the learning rate of this run: for another rate pass learning_rate= and new_learning_rate=, "
      "for Adam and its like scale_free=True."
    )
  elif rates is not None and scale_free:
    notes.append("Under an optimizer that divides the scale out the learning rates do not enter.")
  return notes


def _place(value: float, low: float, high: float) -> str:
  return "below" if value < low else "above" if value > high else "inside"


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
  if not isinstance(scale_free, bool):
    raise TypeError(f"`scale_free` must be True or False, got {described(scale_free)}: pass one of them.")
  if model is not None and (not isinstance(model, str) or model.lower() not in FAMILIES):
    raise ValueError(f"`model` must be one of {', '.join(FAMILIES)} or None, got {described(model)}: pass the nearest.")
