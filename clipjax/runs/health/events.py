"""What happened in a run: spikes of several series at the same time are one `Event`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipjax.quantities import NORM, NORM_CLIPPED
from clipjax.runs.course import NORMAL
from clipjax.runs.health.series import Spike
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import acted, column, norms_of_run
from clipjax.runs.roles import Role, losses_of, role_of, update_states
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of, name_of

GAP = 3  # Rows between two spikes of one event, at most.
_LARGE = 3.0  # Times its median, above which a norm after a clip, or an update, is not as usual.
_UPDATES = 64  # Updates before an event that say how large one is.
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
    batches: what the caller calls the batches from `start` to `high_end`; empty where they have no names.
    is_caught: whether a clip or `skip_steps` kept it from the parameters: it acted, and the update was as usual, or
      where updates were not recorded, the norm after the clip.
    is_recovered: whether the loss came back to where it was before; None where no loss was recorded.
    high_end: the last step at which what moved first was above half of its peak: what comes later is an aftermath. None
      stands for `end`.

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
  high_end: int | None = None

  @property
  def first(self) -> Move:
    """What moved first."""
    return self.moves[0]

  @property
  def is_of_rate(self) -> bool:
    """Whether the update moved first, and neither norm nor loss with it: the learning rate did."""
    roles = {_role(move.key) for move in self.moves if move.step == self.first.step}
    return not roles.isdisjoint({Role.UPDATE, Role.PARAMETERS}) and roles.isdisjoint({Role.NORM, Role.LOSS})

  def moved(self, role: Role) -> Move | None:
    """The first series of a role that moved."""
    return next((move for move in self.moves if _role(move.key) == role), None)


def events_of(run: Run, spikes: Sequence[Spike], states: Sequence[str]) -> tuple[Event, ...]:
  """The spikes brought together, in the order of the steps.

  Args:
    run: the run.
    spikes: of its series, and of single leaves: these make no event, and join that of their step.
    states: the names of the states that are judged.
  """
  reached, losses = {name: _reached(run, name) for name in states}, losses_of(run)
  out = []
  for group in _together(run.steps, spikes):
    moves = _moves(group)
    start, end = min(s.step for s in group), max(s.step for s in group)
    is_caught, high_end = _is_caught(run, group, moves, reached), _high_end(group, moves)
    batches, is_recovered = _batches(run, start, high_end), _is_recovered(losses, start, end)
    out.append(Event(start, end, moves, (), batches, is_caught, is_recovered, high_end))
  return tuple(out)


def _together(steps: Ints, spikes: Sequence[Spike]) -> list[list[Spike]]:
  """Spikes whose rows follow each other, and those of leaves at these rows."""
  ordered = sorted(spikes, key=lambda spike: spike.step)
  rows = np.searchsorted(steps, [spike.step for spike in ordered]).tolist()
  groups: list[list[Spike]] = []
  last = -np.inf
  for spike, row in zip(ordered, rows, strict=True):
    if leaf_of(spike.key) is not None:
      continue
    if row - last > GAP:
      groups.append([])
    groups[-1].append(spike)
    last = row
  by_step: dict[int, list[Spike]] = {}
  for spike in spikes:
    if leaf_of(spike.key) is not None:
      by_step.setdefault(spike.step, []).append(spike)
  return [group + [leaf for step in {s.step for s in group} for leaf in by_step.get(step, ())] for group in groups]


def _moves(spikes: Sequence[Spike]) -> tuple[Move, ...]:
  """How each series moved, and of the leaves that with the largest norm, where no norm of all leaves moved."""
  by_key: dict[str, list[Spike]] = {}
  for spike in spikes:
    by_key.setdefault(spike.key, []).append(spike)
  moves = [Move(key, some[0].step, max(s.value for s in some), some[0].usual) for key, some in by_key.items()]
  leaves = [move for move in moves if leaf_of(move.key) is not None]
  moves = [move for move in moves if leaf_of(move.key) is None]
  if leaves and not any(_role(move.key) is Role.NORM for move in moves):
    first = min(move.step for move in leaves)
    moves.append(max((move for move in leaves if move.step == first), key=lambda move: move.peak))
  return tuple(sorted(moves, key=lambda move: (move.step, _ORDER.index(_role(move.key)))))


def _high_end(spikes: Sequence[Spike], moves: Sequence[Move]) -> int:
  """The last step at which what moved first, of norms before losses, was above half of its peak."""
  first = [move for move in moves if move.step == moves[0].step]
  move = next((move for move in first if _role(move.key) is Role.NORM), first[0])
  return max(spike.step for spike in spikes if spike.key == move.key and spike.value >= move.peak / 2)


def _batches(run: Run, start: int, end: int) -> tuple[Any, ...]:
  if run.batches is None:
    return ()
  inside = run.batches[(run.steps >= start) & (run.steps <= end)]
  return tuple(batch for batch in inside.tolist() if batch is not None)


# What became of it --------------------------------------------------------------------------------------------------


def _reached(run: Run, name: str) -> tuple[Ints, Bools, Bools]:
  """For each norm of a state its step, whether a clip left it alone, and whether it came out larger than is usual.

  Neither is so where the step was rejected.
  """
  norms = norms_of_run(run, name, 0)
  clipped = column(run, key_of(name, NORM_CLIPPED))[np.searchsorted(run.steps, norms.steps)]
  known = clipped[np.isfinite(clipped)]
  usual = float(np.median(known)) if known.size else np.inf
  is_free = ~acted(run, name, norms) & ~norms.rejected
  return norms.steps, is_free, is_free | (~norms.rejected & (clipped > _LARGE * usual))


def _is_caught(
  run: Run, spikes: Sequence[Spike], moves: Sequence[Move], reached: dict[str, tuple[Ints, Bools, Bools]]
) -> bool:
  """Whether a clip or `skip_steps` acted on every norm that moved, and the update was as usual, and the loss after it.

  Where updates were not recorded, the norm after the clip has to be as usual instead.
  """
  norms = [spike for spike in spikes if _role(spike.key) is Role.NORM and leaf_of(spike.key) is None]
  if not norms or any(role_of(move.key) in (Role.UPDATE, Role.PARAMETERS) for move in moves):
    return False
  if any(role_of(spike.key) is Role.LOSS and spike.step > norms[-1].step for spike in spikes):
    return False  # A batch may have a large loss by itself; the one after it has not.
  updates = [column(run, key_of(name, NORM)) for name in update_states(run)]
  for spike in norms:
    steps, is_free, is_large = reached[name_of(spike.key)]
    at, row = (int(np.searchsorted(x, spike.step)) for x in (steps, run.steps))
    if is_free[at] or (any(_is_large(values, row) for values in updates) if updates else is_large[at]):
      return False
  return True


def _is_large(values: Floats, row: int) -> bool:
  """Whether a value is far above the median of those just before it."""
  before = values[max(row - _UPDATES, 0) : row]
  before = before[np.isfinite(before)]
  return bool(before.size and values[row] > _LARGE * np.median(before))


def _is_recovered(losses: tuple[Ints, Floats], start: int, end: int) -> bool | None:
  """Whether the loss was once again where it was before."""
  steps, loss = losses
  first, next_one = np.searchsorted(steps, start), np.searchsorted(steps, end, side="right")
  before, after = loss[max(first - _BEFORE, 0) : first], loss[next_one : next_one + _AFTER]
  if not before.size or not after.size:
    return None
  middle = float(np.median(before))
  level = middle + max(4 * NORMAL * float(np.median(np.abs(before - middle))), 0.05 * abs(float(loss[0])))
  return bool((_medians(after) <= level).any())


def _medians(values: Floats) -> Floats:
  """Medians of a few that follow each other."""
  width = min(_BACK, values.size)
  return np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)


def _role(key: str) -> Role:
  """The role of a series: that of `skip_steps` is judged where there is no other norm, and a leaf has a norm."""
  return role_of(key) or Role.NORM


def leaf_of(key: str) -> str | None:
  """The leaf that a series is of, as "w" of "grad/norm/w"; None for a series of all leaves."""
  _, found, leaf = key.partition(f"/{NORM}/")
  return leaf if found else None
