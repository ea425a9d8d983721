"""Sentences that several findings share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipjax.runs.health.events import Event, Move, leaf_of
from clipjax.runs.kinds import Ints
from clipjax.runs.norms import column
from clipjax.runs.roles import Role, keys_with
from clipjax.runs.run import Run
from clipjax.runs.words import at_steps, number, several

_RISE = 1.5  # A learning rate that rises by less is a schedule.


def restore(steps: "Ints | Sequence[int]") -> str:
  """The advice after a step that spoiled what follows."""
  return f"Restore a checkpoint from before step {int(steps[0])}."


def moved(move: Move) -> str:
  """How far a series moved: "'grad/norm' rose to 31, 28 times its usual 1.1"."""
  times = move.peak / move.usual if move.usual > 0 else 0.0
  far = f", {number(times)} times its usual" if times >= 1.1 else " from its usual"
  return f"{move.key!r} rose to {number(move.peak)}{far} {number(move.usual)}"


def told(event: Event, among: Sequence[str], *, with_fate: bool = True) -> str:
  """An event in a sentence: what moved first, in which leaf, what followed, and whether the loss recovered."""
  first, *others = event.moves
  text = f"{_when(event)} {moved(first)}"
  if event.leaves and leaf_of(first.key) is None:
    text += f", most of all in {several(event.leaves, among)}"
  # Two followers are enough to tell cause from effect.
  for move in others[:2]:
    late = move.step - first.step
    text += f"; {moved(move)}" + (f" {late} step{'s' if late > 1 else ''} later" if late else "")
  if with_fate and event.is_recovered is not None:
    text += "; the loss recovered" if event.is_recovered else "; the loss did not recover"
  return f"{text}."


def _when(event: Event) -> str:
  place = at_steps([event.start], event.batches[:1] or None)
  if event.end > event.start:
    place = f"at steps {event.start} to {event.end}{f' ({in_batches(event.batches)})' if event.batches else ''}"
  return place[0].upper() + place[1:]


def batches_of(event: Event) -> str:
  """The batches that caused an event."""
  if event.batches:
    return in_batches(event.batches)
  # Only batches up to the end of the peak: later steps are the aftermath.
  end = event.end if event.high_end is None else event.high_end
  return f"the batch of step {event.start}" if end == event.start else f"the batches of steps {event.start} to {end}"


def in_batches(batches: Sequence[Any]) -> str:
  """Names of batches: "batches 7 to 12" or "batch 'shard-3'"."""
  flat = [b for batch in batches for b in (batch if isinstance(batch, tuple) else (batch,))]
  if len(flat) == 1:
    return f"batch {flat[0]!r}"
  return f"batches {flat[0]!r} to {flat[-1]!r}"


def rates_at(run: Run, step: int) -> str:
  """A sentence for each learning rate that rose at a step, to follow another sentence; "" if none did."""
  out, row = "", int(np.searchsorted(run.steps, step))
  for key in keys_with(run.columns, Role.RATE):
    rates = column(run, key)
    before = rates[:row][np.isfinite(rates[:row])]
    if before.size and np.isfinite(rates[row]) and rates[row] > _RISE * before[-1] > 0:
      times = number(float(rates[row] / before[-1]))
      out += f" {key!r} was {number(float(rates[row]))} there, {times} times its previous value."
  return out
