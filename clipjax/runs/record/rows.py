"""Makes rows from what a `Recorder` read from the device: which steps, which numbers, and when numbers by leaf.

Pushes arrive in order; `Rows` keeps what a row needs from earlier ones. Under `optax.MultiSteps`, the pushes of one
update become one row, with means of the scalars and sums of tokens and examples.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from clipjax.metric_names import WORST_NORM, WORST_STEP
from clipjax.runs.record.measured import NOTHING, Measured, States
from clipjax.runs.record.packing import Packer, Seen
from clipjax.runs.record.pushes import Batch, Pushed
from clipjax.runs.record.rings import Norms, Rings
from clipjax.runs.record.weights import weights_row
from clipjax.runs.schema import AMOUNTS, BACK, BATCH, FLAGS, MAY_BE_INF, STEP, TIME, UPDATE, WEIGHTS, key_of

_Series = tuple[int, Packer | frozenset[str]]  # A thread, and an optimizer or a set of keys.
_REMEMBERED = 4096  # How many steps of a series without a state are remembered.
_WORSE = 1.1  # A worst step must exceed the last one written by this factor: a rising norm has many worst steps.


class Made(NamedTuple):
  """A row, and the numbers by leaf that it gets if they are due or a detector asks for them."""

  row: dict[str, Any]
  vectors: dict[str, Any]
  is_due: bool


class Before(NamedTuple):
  """What the file of a resumed run already holds.

  Attributes:
    first: the first step in the file.
    last: the last step in the file.
    has_updates: whether an optimizer state was pushed.
  """

  first: int
  last: int
  has_updates: bool


class Rows:
  """Makes rows of what was read, and remembers what later rows need."""

  def __init__(
    self,
    every: int,
    before: Before | None,
    recorded: Callable[[int, int], dict[int, Norms]],
    warn: Callable[[str], None],
  ):
    self._states = States(warn)
    self._recorded = recorded
    self._warn = warn
    self._rings: dict[frozenset[str], Rings] = {}  # One per optimizer, by the names of its watches.
    self._course = _Course(before, warn)
    self._groups: dict[Packer, _Group] = {}
    self._leaves = _ByLeaf(every)

  @property
  def leaves(self) -> dict[str, tuple[str, ...]]:
    """Names of leaves or groups, by state name."""
    return self._states.leaves

  def of(self, pushed: Pushed, seen: Seen | None, counts: Any) -> list[Made]:
    """The rows of steps that the rings of watches hold since the last push, then the row of this push."""
    seen = seen or Seen((), None, None, {}, {}, {}, {})
    step = pushed.step if pushed.step is not None else seen.user_step
    if step is None:  # The step number was on the device and could not be read.
      return []
    if pushed.by_leaf:
      self._leaves.ask()
    values = {**pushed.scalars, **seen.pushed}
    batch: Any = pushed.batch
    # Micro-batches wait until their update lands; then they become one row.
    if pushed.packer.is_accumulated and seen.counts:
      group = self._groups.setdefault(pushed.packer, _Group())
      group.add(step, pushed, values, counts)
      if not group.has_landed(seen):
        return []
      values, batch, counts = group.taken()
    measured = self._states.measured(pushed.packer, seen, step) if seen.counts else NOTHING
    return self._made(step, pushed, measured, values, batch, counts)

  def rest(self) -> list[Made]:
    """The rows of micro-batches whose update has not landed when the recording ends."""
    out = []
    for group in self._groups.values():
      if group.pushed:
        step, pushed = group.step, group.pushed[-1]
        out += self._made(step, pushed, NOTHING, *group.taken())
    return out

  def _made(
    self, step: int, pushed: Pushed, measured: Measured, values: dict[str, Any], batch: Any, counts: Any
  ) -> list[Made]:
    # The row of this push.
    row: dict[str, Any] = {STEP: step}
    if measured.update is not None:
      row[UPDATE] = measured.update
    row |= {TIME: round(pushed.time, 6), **_finite({**values, **measured.metrics})}
    if batch is not None:
      row[BATCH] = batch
    if counts is not None:
      row[WEIGHTS] = weights_row(counts)
    # The steps between two pushes, from the rings.
    rings = self._rings_of(measured)
    between, other = ([], None) if rings is None else rings.between(step, measured.update or 0, measured.rings)
    rows = [Made({STEP: at, **_finite(dict(norms))}, {}, False) for at, norms in between]
    rows.append(Made(row, measured.vectors, self._leaves.are_due(row, measured)))
    # If the run went back, the first row that replaces others says so.
    series = pushed.packer if measured.update is not None else frozenset(values)
    if self._course.goes_back((pushed.thread, series), step) or other is not None or measured.is_again:
      first = step if other is None else other
      next(made for made in rows if made.row[STEP] >= first).row[BACK] = True
    return rows

  def _rings_of(self, measured: Measured) -> Rings | None:
    if not measured.rings:
      return None
    names = frozenset(measured.rings)
    if names not in self._rings:
      self._rings[names] = Rings(self._recorded, self._warn)
    return self._rings[names]


class _ByLeaf:
  """Decides when numbers by leaf are due: once in `every` pushes, at nonfinite steps and at a worst step.

  Each optimizer is due by itself. If numbers are due at a step without any, the next step that has some gets them.
  """

  def __init__(self, every: int):
    self._every = every
    self._asked = 0
    self._given: dict[frozenset[str], int] = {}
    self._bad_in_a_row: dict[frozenset[str], int] = {}
    self._worst: dict[str, tuple[float, float]] = {}  # The worst step and norm when last written.

  def ask(self) -> None:
    """Makes numbers by leaf due; called once in `every` pushes."""
    self._asked += 1

  def are_due(self, row: dict[str, Any], measured: Measured) -> bool:
    """Whether this row gets numbers by leaf, whatever a detector finds."""
    who = frozenset(measured.vectors)
    if not who:
      return False
    is_bad = any(not _is_of(key, MAY_BE_INF) for key in row.get(FLAGS, ()))
    bad = self._bad_in_a_row[who] = self._bad_in_a_row.get(who, 0) + 1 if is_bad else 0
    due = self._given.get(who, 0) < self._asked or 0 < bad <= self._every
    worst = _worst(measured.metrics)
    for key, (step, norm) in worst.items():
      written_step, written_norm = self._worst.get(key, (0, 0.0))
      due = due or (step != written_step and not norm <= _WORSE * written_norm)  # Above, or NaN.
    if due:
      self._worst |= worst
      self._given[who] = self._asked
    return due


class _Group:
  """The micro-batches of an update that has not landed."""

  def __init__(self) -> None:
    self.step = 0
    self.pushed: list[Pushed] = []
    self._update: int | None = None
    self._values: dict[str, list[Any]] = {}
    self._counts: Any = None

  def add(self, step: int, pushed: Pushed, values: dict[str, Any], counts: Any) -> None:
    """Adds a micro-batch."""
    self.step = step
    self.pushed.append(pushed)
    for key, value in values.items():
      self._values.setdefault(key, []).append(value)
    self._counts = self._counts if counts is None else counts

  def has_landed(self, seen: Seen) -> bool:
    """Whether this push was the last micro-batch of its update."""
    update, before = max(seen.counts), self._update
    self._update = update
    return update > 0 and (seen.mini_step == 0 if before is None else update != before)

  def taken(self) -> tuple[dict[str, Any], Any, Any]:
    """Takes all micro-batches: combined scalars, batch names, the histogram of the parameters."""
    values = {key: _together(key, some) for key, some in self._values.items()}
    batches: list[Batch] = [p.batch for p in self.pushed if p.batch is not None]
    out = values, (batches if len(batches) > 1 else batches[0]) if batches else None, self._counts
    self.pushed, self._values, self._counts = [], {}, None
    return out


class _Course:
  """Decides when a run goes back, to a checkpoint or to its start.

  A series is what one thread pushes from one optimizer, or under one set of keys: threads are not in step with each
  other, nor are the optimizers of a GAN. If threads share the steps of one run, the first one goes back for all.
  """

  def __init__(self, before: Before | None, warn: Callable[[str], None]):
    self._before = before
    self._warn = warn
    self._has_states = before is not None and before.has_updates
    self._last: dict[_Series, tuple[int, int]] = {}  # The last step, and how often the run had gone back.
    self._times = 0
    self._recorded: dict[_Series, OrderedDict[int, None]] = {}

  def goes_back(self, series: _Series, step: int) -> bool:
    """Whether a push for `step` supersedes the rows from there on.

    A push without a state for an earlier step adds to that step, as a late evaluation does. It goes back only if the
    run has no state at all and recorded the same keys at that step before.
    """
    has_state = isinstance(series[1], Packer)
    self._has_states = self._has_states or has_state
    before = self._before
    # The first push to an existing file: does it resume inside, or after it?
    if before is not None and (has_state or not self._has_states):
      self._before = None
      if step <= before.first:
        self._warn_of_fresh_start(before, step)
      is_back = step <= before.last
    else:
      last, times = self._last.get(series, (step, 0))
      is_back = step < last and times == self._times  # If times differ, another thread went back already.
      if is_back and not has_state:
        is_back = not self._has_states and self._was_recorded(series, step)
    self._times += is_back
    last, times = self._last.get(series, (step, self._times))
    is_late = times == self._times and not is_back and not has_state
    self._last[series] = max(step, last) if is_late else step, self._times
    if not has_state:
      self._remember(series, step)
    return is_back

  def _was_recorded(self, series: _Series, step: int) -> bool:
    recorded = self._recorded.get(series)
    if not recorded:
      return False
    return step in recorded or (len(recorded) == _REMEMBERED and step < next(iter(recorded)))

  def _remember(self, series: _Series, step: int) -> None:
    recorded = self._recorded.setdefault(series, OrderedDict())
    recorded[step] = None
    if len(recorded) > _REMEMBERED:
      recorded.popitem(last=False)

  def _warn_of_fresh_start(self, before: Before, step: int) -> None:
    self._warn(
      f"`path` should be a new file for a new run, got one with steps {before.first} to {before.last} and a run that "
      f"begins at step {step}: read_run will show only the new run. The old rows stay in the file; name another file "
      "to keep the runs apart."
    )


def _together(key: str, values: list[Any]) -> Any:
  """Combines a number over micro-batches: the sum of an amount, otherwise the mean."""
  if key in AMOUNTS:
    return sum(values)
  return values[0] if all(x == values[0] for x in values) else sum(values) / len(values)


def _is_of(key: str, quantities: frozenset[str]) -> bool:
  """Whether a key belongs to one of these quantities, over all leaves or by group."""
  return not quantities.isdisjoint(key.split("/"))


def _worst(metrics: dict[str, Any]) -> dict[str, tuple[float, float]]:
  """Step and norm of the worst step of each watch."""
  names = [key.removesuffix(f"/{WORST_NORM}") for key in metrics if key.endswith(f"/{WORST_NORM}")]
  return {name: (metrics[key_of(name, WORST_STEP)], metrics[key_of(name, WORST_NORM)]) for name in names}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
  """The values as a row has them: null for nonfinite ones, with flags that say what they were."""
  flags = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
  if not flags:
    return values
  return {**{key: None if key in flags else value for key, value in values.items()}, FLAGS: flags}
