"""What happened in a run: spikes of several series at the same time are one `Event`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipjax.quantities import NORM, NORM_CLIPPED
from clipjax.runs.health.detectors import NORMAL
from clipjax.runs.health.series import KINDS, Spike
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import acted, column, norms_of_run
from clipjax.runs.roles import Role, main_loss, role_of
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of, name_of

_GAP = 3  # Rows between two spikes of one event, at most.
_BEFORE = 16  # Losses before an event that say where the loss was.
_AFTER, _BACK = 100, 5  # Rows in which a loss may come back, and how many of them must agree.
_ORDER: tuple[Role, ...] = (
  Role.LOSS,
  Role.NORM,
  Role.UPDATE,
  Role.PARAMETERS,
  Role.VALIDATION,
)  # Of series that move at one step.


class Move(NamedTuple):
  """How one series moved in an event.

  Attributes:
    key: the series, as in `run[key]`: Role.LOSS, "grad/norm", "update/norm", or of a leaf "grad/norm/w".
    step: the first step at which it was a spike.
    peak: its largest value in the event.
    usual: the median of the values before.

  Example:
    >>> import clipjax
    >>> move = clipjax.runs.Move("grad/norm", step=7, peak=30.0, usual=0.5)
    >>> move.peak / move.usual
    60.0
  """

  key: str
  step: int
  peak: float
  usual: float


class Event(NamedTuple):
  """Steps that follow each other at which one or more series had a spike.

  Attributes:
    start: the first of these steps, as it was pushed.
    end: the last one.
    moves: how each series moved, what moved first in front.
    leaves: the leaves or groups whose norm grew most, the strongest first; empty where none was recorded.
    batches: what the caller calls the batches of these steps; empty where they have no names.
    is_caught: whether nothing of it reached the parameters: the clip brought the norm down to the usual one, or
      `skip_steps` or a clip dropped the step.
    is_recovered: whether the loss came back to where it was before; None where no loss was recorded.

  Example:
    >>> import clipjax
    >>> rows = {"grad/norm": [1.0] * 20 + [50.0] + [1.0] * 20}
    >>> (event,) = clipjax.runs.diagnose(clipjax.runs.Run.from_arrays(rows)).events
    >>> event.start, event.end, event.moves[0].key, event.is_caught
    (21, 21, 'grad/norm', False)
  """

  start: int
  end: int
  moves: tuple[Move, ...]
  leaves: tuple[str, ...] = ()
  batches: tuple[Any, ...] = ()
  is_caught: bool = False
  is_recovered: bool | None = None

  @property
  def first(self) -> Move:
    """What moved first."""
    return self.moves[0]

  def moved(self, role: Role) -> Move | None:
    """The first series of a role that moved."""
    return next((move for move in self.moves if role_of(move.key) == role), None)


def events_of(run: Run, spikes: Sequence[Spike], states: Sequence[str]) -> tuple[Event, ...]:
  """The spikes brought together, in the order of the steps.

  Args:
    run: the run.
    spikes: of its series; those of single leaves make an event only where no other series had a spike.
    states: the names of the states that are judged.
  """
  reached = {name: _reached(run, name) for name in states}
  out = []
  for group in _together(run.steps, spikes):
    moves = _moves(group)
    start, end = min(s.step for s in group), max(s.step for s in group)
    is_caught = _is_caught(group, moves, reached)
    out.append(Event(start, end, moves, (), _batches(run, start, end), is_caught, _is_recovered(run, start, end)))
  return tuple(out)


def _together(steps: Ints, spikes: Sequence[Spike]) -> list[list[Spike]]:
  """Spikes whose rows follow each other."""
  ordered = sorted(spikes, key=lambda spike: spike.step)
  rows = np.searchsorted(steps, [spike.step for spike in ordered]).tolist()
  groups: list[list[Spike]] = []
  last = -np.inf
  for spike, row in zip(ordered, rows, strict=True):
    if row - last > _GAP:
      groups.append([])
    groups[-1].append(spike)
    last = row
  return groups


def _moves(spikes: Sequence[Spike]) -> tuple[Move, ...]:
  """How each series moved. Of leaves the one that grew most, and that only where no series moved."""
  by_key: dict[str, list[Spike]] = {}
  for spike in spikes:
    by_key.setdefault(spike.key, []).append(spike)
  moves = [Move(key, some[0].step, max(s.value for s in some), some[0].usual) for key, some in by_key.items()]
  of_series = [move for move in moves if role_of(move.key) is not None]
  if not of_series:
    return (max(moves, key=lambda move: move.peak / move.usual),)
  return tuple(sorted(of_series, key=lambda move: (move.step, _ORDER.index(role_of(move.key) or Role.NORM))))


def _batches(run: Run, start: int, end: int) -> tuple[Any, ...]:
  if run.batches is None:
    return ()
  inside = run.batches[(run.steps >= start) & (run.steps <= end)]
  return tuple(batch for batch in inside.tolist() if batch is not None)


# What became of it --------------------------------------------------------------------------------------------------


def _reached(run: Run, name: str) -> tuple[Ints, Bools]:
  """For each norm of a state its step, and whether it reached the optimizer larger than is usual.

  It did not where the step was rejected, or where a clip brought it down to what is usual after the clip.
  """
  norms = norms_of_run(run, name, 0)
  clipped = column(run, key_of(name, NORM_CLIPPED))[np.searchsorted(run.steps, norms.steps)]
  known = clipped[np.isfinite(clipped)]
  usual = float(np.median(known)) if known.size else np.inf
  is_down = acted(run, name, norms) & ~(clipped > KINDS[Role.NORM].ratio * usual)
  return norms.steps, ~(norms.rejected | is_down)


def _is_caught(spikes: Sequence[Spike], moves: Sequence[Move], reached: dict[str, tuple[Ints, Bools]]) -> bool:
  """Whether every norm that moved was brought down, and no update moved."""
  norms = [spike for spike in spikes if role_of(spike.key) == Role.NORM]
  if not norms or any(role_of(move.key) in (Role.UPDATE, Role.PARAMETERS) for move in moves):
    return False
  for spike in norms:
    steps, has_reached = reached[name_of(spike.key)]
    if has_reached[steps == spike.step].any():
      return False
  return True


def _is_recovered(run: Run, start: int, end: int) -> bool | None:
  """Whether the main loss was once again where it was before."""
  key = main_loss(run.columns)
  if key is None:
    return None
  known = np.isfinite(run.columns[key])
  steps, loss = run.steps[known], run.columns[key][known]
  before, after = loss[steps < start][-_BEFORE:], loss[steps > end][:_AFTER]
  if not before.size or not after.size:
    return None
  middle = float(np.median(before))
  level = middle + max(4 * NORMAL * float(np.median(np.abs(before - middle))), 0.05 * abs(float(loss[0])))
  return bool((_medians(after) <= level).any())


def _medians(values: Floats) -> Floats:
  """Medians of a few that follow each other."""
  width = min(_BACK, values.size)
  return np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)


def leaf_of(key: str) -> str | None:
  """The leaf that a series is of, as "w" of "grad/norm/w"; None for a series of all leaves."""
  _, found, leaf = key.partition(f"/{NORM}/")
  return leaf if found else None
