"""What happened in a run: spikes of several series at one time form one `Event`.

Stages: group spikes by row, say how each series moved, then decide what became of it, that is, whether a clip caught it
and whether the loss recovered.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipjax.metric_names import NORM, NORM_CLIPPED
from clipjax.runs.course import NORMAL
from clipjax.runs.health.series import Spike
from clipjax.runs.kinds import Bools, Floats, Ints
from clipjax.runs.norms import acted, column, norms_of_run, rejected
from clipjax.runs.roles import Role, losses_of, role_of, update_states
from clipjax.runs.run import Run
from clipjax.runs.schema import key_of, name_of

GAP = 3  # Spikes at most this many rows apart belong to one event.
_LARGE = 3.0  # An update, or a norm after a clip, is unusual above this many times its median.
_UPDATES = 64  # This many updates before an event give the usual size.
_BEFORE = 16  # This many losses before an event give the level to recover to.
_AFTER, _BACK = 100, 5  # A loss may take this many rows to recover; the median of this many must be back.
_ORDER: tuple[Role, ...] = (
  Role.LOSS,
  Role.NORM,
  Role.UPDATE,
  Role.PARAMETERS,
  Role.VALIDATION,
)  # The order of series that move at the same step.


class Move(NamedTuple):
  """How one series moved in an event.

  Attributes:
    key: the series, as in `run[key]`: "loss", "grad/norm", "update/norm", or "grad/norm/w" for a leaf.
    step: its first spike in the event.
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
  """Consecutive steps at which one or more series had a spike.

  Attributes:
    start: the first of these steps, as pushed.
    end: the last one.
    moves: how each series moved, the first mover first.
    leaves: the leaves or groups whose norm grew most, strongest first; empty if none were recorded.
    batches: the caller's names of the batches from `start` to `high_end`; empty if they have no names.
    is_caught: whether a clip or `skip_steps` kept the event from the parameters: it acted, and the update had its usual
      size. Without recorded updates, the norm after the clip must have its usual size.
    is_recovered: whether the loss returned to its level before; None without a recorded loss.
    high_end: the last step at which the first mover was above half its peak; later steps are the aftermath. None stands
      for `end`.

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
    """The series that moved first."""
    return self.moves[0]

  @property
  def is_of_rate(self) -> bool:
    """Whether the update moved first, without norm and loss: the learning rate is to blame."""
    roles = {_role(move.key) for move in self.moves if move.step == self.first.step}
    return not roles.isdisjoint({Role.UPDATE, Role.PARAMETERS}) and roles.isdisjoint({Role.NORM, Role.LOSS})

  def moved(self, role: Role) -> Move | None:
    """The first series of this role that moved."""
    return next((move for move in self.moves if _role(move.key) == role), None)


def events_of(run: Run, spikes: Sequence[Spike], states: Sequence[str]) -> tuple[Event, ...]:
  """The spikes grouped into events, in step order.

  Args:
    run: the run.
    spikes: spikes of its series and of single leaves; those of leaves join an event but never make one.
    states: the names of the judged states.
  """
  reached, losses = {name: _reached(run, name) for name in states}, losses_of(run)
  is_rejected = rejected(run)
  out = []
  for group in _together(run.steps, spikes):
    # The leaves that grew are added by `view`, which knows the norms by leaf.
    moves = _moves(group)
    start, end = min(s.step for s in group), max(s.step for s in group)
    rows = np.searchsorted(run.steps, [spike.step for spike in group])
    # Nothing of a rejected step reaches the parameters, whatever moved.
    is_caught = bool(is_rejected[rows].all()) or _is_caught(run, group, moves, reached)
    high_end = _high_end(group, moves)
    batches, is_recovered = _batches(run, start, high_end), _is_recovered(losses, start, end)
    out.append(Event(start, end, moves, (), batches, is_caught, is_recovered, high_end))
  return tuple(out)


def _together(steps: Ints, spikes: Sequence[Spike]) -> list[list[Spike]]:
  """Groups of spikes at neighbouring rows, each with the leaf spikes of its steps."""
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
  """How each series moved; if no global norm moved, the first leaf that did, too."""
  by_key: dict[str, list[Spike]] = {}
  for spike in spikes:
    by_key.setdefault(spike.key, []).append(spike)
  moves = [Move(key, some[0].step, max(s.value for s in some), some[0].usual) for key, some in by_key.items()]
  leaves = [move for move in moves if leaf_of(move.key) is not None]
  moves = [move for move in moves if leaf_of(move.key) is None]
  # Of the leaves that moved first, the one with the largest norm stands for the gradient.
  if leaves and not any(_role(move.key) is Role.NORM for move in moves):
    first = min(move.step for move in leaves)
    moves.append(max((move for move in leaves if move.step == first), key=lambda move: move.peak))
  return tuple(sorted(moves, key=lambda move: (move.step, _ORDER.index(_role(move.key)))))


def _high_end(spikes: Sequence[Spike], moves: Sequence[Move]) -> int:
  """The last step at which the first mover, a norm rather than a loss, was above half its peak."""
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
  """For each norm of a state: its step, whether no clip acted on it, and whether it was unusually large after the clip.

  Both are False for a rejected step.
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
  """Whether a clip or `skip_steps` acted on every norm that moved, and update and later losses were as usual.

  Without recorded updates, the norm after the clip must be as usual instead.
  """
  # Nothing to catch, or an update that moved all the same.
  norms = [spike for spike in spikes if _role(spike.key) is Role.NORM and leaf_of(spike.key) is None]
  if not norms or any(role_of(move.key) in (Role.UPDATE, Role.PARAMETERS) for move in moves):
    return False
  if any(role_of(spike.key) is Role.LOSS and spike.step > norms[-1].step for spike in spikes):
    return False  # A bad batch has a large loss by itself, but the next batch does not.
  # Every norm that moved must have been clipped or rejected, and have left an update of the usual size.
  updates = [column(run, key_of(name, NORM)) for name in update_states(run)]
  for spike in norms:
    steps, is_free, is_large = reached[name_of(spike.key)]
    at, row = (int(np.searchsorted(x, spike.step)) for x in (steps, run.steps))
    if is_free[at] or (any(_is_large(values, row) for values in updates) if updates else is_large[at]):
      return False
  return True


def _is_large(values: Floats, row: int) -> bool:
  """Whether a value is far above the median of the values just before it."""
  before = values[max(row - _UPDATES, 0) : row]
  before = before[np.isfinite(before)]
  return bool(before.size and values[row] > _LARGE * np.median(before))


def _is_recovered(losses: tuple[Ints, Floats], start: int, end: int) -> bool | None:
  """Whether the loss returned to its level before the event; None if that is not known."""
  steps, loss = losses
  first, next_one = np.searchsorted(steps, start), np.searchsorted(steps, end, side="right")
  before, after = loss[max(first - _BEFORE, 0) : first], loss[next_one : next_one + _AFTER]
  if not before.size or not after.size:
    return None
  middle = float(np.median(before))
  # Recovered means within noise of the level before, or within 5% of the first loss.
  level = middle + max(4 * NORMAL * float(np.median(np.abs(before - middle))), 0.05 * abs(float(loss[0])))
  return bool((_medians(after) <= level).any())


def _medians(values: Floats) -> Floats:
  """Running medians of a few values."""
  width = min(_BACK, values.size)
  return np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)


def _role(key: str) -> Role:
  """The role of a series; the norm of `skip_steps`, judged if there is no other, and those of leaves are norms."""
  return role_of(key) or Role.NORM


def leaf_of(key: str) -> str | None:
  """The leaf of a series, such as "w" for "grad/norm/w"; None for a series of all leaves."""
  _, found, leaf = key.partition(f"/{NORM}/")
  return leaf if found else None
