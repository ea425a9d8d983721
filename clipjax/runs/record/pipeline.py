"""A thread that turns pushes into rows of the file; the training loop does not wait for it.

The thread takes pushes in batches, reads them from the device, makes rows, and hands them to the file and the writers.
An interrupt reaches only the training thread, so it never cuts a batch in two. Warnings and findings of the thread wait
for the next call from outside.
"""

import os
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import clipjax
from clipjax.checks import caller_level
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.live import Live
from clipjax.runs.loggers.writers import Writers
from clipjax.runs.record.fetching import fetched, seen_in
from clipjax.runs.record.pushes import Pushed
from clipjax.runs.record.resumed import before_in, norms_in
from clipjax.runs.record.rings import Norms
from clipjax.runs.record.rows import Made, Rows
from clipjax.runs.record.run_file import RunFile
from clipjax.runs.schema import (
  BACK,
  EVERY,
  FORMAT,
  HEADER,
  LEAF,
  LEAVES,
  OPTIMIZER,
  PARAMETERS,
  STARTED,
  STEP,
  VERSION,
  merge,
)


class _Request:
  """An action that the thread runs once all earlier pushes are written."""

  def __init__(self, action: Callable[[], None]):
    self.action = action
    self.is_done = False


class _Failure(NamedTuple):
  """An error in the thread, raised by the next call from outside."""

  error: BaseException


class Pipeline:
  """The queue of pushes, and the thread that empties it."""

  def __init__(
    self,
    every: int,
    file: RunFile,
    writers: Writers,
    live: Live,
    notes: "Notes",
    is_told: bool,
  ):
    self._every = every
    self._file = file
    self._rows = Rows(every, before_in(file), self.recorded, notes.warn)
    self.writers = writers
    self._live = live
    self._notes = notes
    self._is_told = is_told
    self._process = os.getpid()
    self._started = time.time()
    self.parameters: int | None = None
    self._optimizer: tuple[str, ...] = ()
    self._pending: deque[Pushed] = deque()
    self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()  # None: a batch is complete.
    self._batch: list[Pushed] = []
    self._held: dict[str, Any] | None = None  # The last row; more numbers of its step may still arrive.
    self._is_closed = self._is_ending = False
    self._made: list[Made] = []
    self._thread = threading.Thread(target=self._run, name="clipjax recorder", daemon=True)
    self._thread.start()

  @property
  def identity(self) -> Any:
    """Identifies the file, whatever its path."""
    return self._file.identity

  @property
  def is_closed(self) -> bool:
    """Whether everything is written and nothing more is accepted."""
    return self._is_closed

  @property
  def path(self) -> str:
    """The path of the file."""
    return str(self._file.path)

  def has_optimizer(self, states: tuple[str, ...]) -> None:
    """Adds the state classes of an optimizer that is pushed."""
    self._optimizer = tuple(dict.fromkeys(self._optimizer + states))

  def put(self, pushed: Pushed) -> None:
    """Accepts a push; waits only while two batches are in flight."""
    if self._is_elsewhere():
      raise ValueError(
        "`push` must be called in the process that made the Recorder, got a fork of it: make one there, with another "
        "path."
      )
    self._pending.append(pushed)
    if self._is_ending:  # Another thread closes. Once ours has ended, we know whether this push came in time.
      self._thread.join()
      if any(late is pushed for late in list(self._pending)):
        raise ValueError(
          "`push` must be called before `close`, got a push while another thread closed the Recorder: join the threads "
          "that push before you close it."
        )
    elif len(self._pending) >= self._every:  # Waking the thread for each push would cost more than the push.
      self._queue.put(None)
      _wait_until(lambda: len(self._pending) + len(self._batch) < 2 * self._every or not self._thread.is_alive())

  def drain(self) -> None:
    """Waits until all earlier pushes are written and given to the writers."""
    if not self._is_elsewhere():
      self._request(self._release)

  def close(self, patience: float | None = None) -> None:
    """Drains and releases the file; a second call resumes an interrupted one.

    The file is complete before the writers are closed; `patience` limits the seconds spent waiting for them.
    """
    if self._is_closed or self._is_elsewhere():
      return
    self._request(self._finish)
    self._file.close()
    if patience is None:
      self.writers.close()
    else:
      closing = threading.Thread(target=self.writers.close, name="clipjax close", daemon=True)
      closing.start()
      closing.join(patience)
    self._is_closed = True

  # Outside the thread ------------------------------------------------------------------------------------------------

  def _is_elsewhere(self) -> bool:
    """Whether this is a forked child: it has no thread, and its parent writes."""
    return self._process != os.getpid()

  def _request(self, action: Callable[[], None]) -> None:
    request = _Request(action)
    self._queue.put(request)
    _wait_until(lambda: request.is_done or not self._thread.is_alive())

  # In the thread -----------------------------------------------------------------------------------------------------

  def _run(self) -> None:
    while True:
      item = self._queue.get()
      try:
        while len(self._pending) >= self._every:
          self._write_batch(self._every)
        if item is not None:
          self._write_batch(len(self._pending))
          item.action()
      except BaseException as error:  # A bug of ours, or out of memory: the caller gets it, the thread goes on.
        self._batch = []
        self._notes.add(_Failure(error))
      if item is not None:
        item.is_done = True
        if item.action == self._finish:
          return

  def recorded(self, first: int, last: int) -> dict[int, Norms]:
    """The norms in the file from one step to another, including the rows of the current batch."""
    self._write_made()
    return norms_in(self.path, first, last)

  def _write_batch(self, count: int) -> None:
    batch = self._batch = [self._pending.popleft() for _ in range(count)]
    if batch:
      # Read the whole batch at once; the device may be several steps ahead.
      vectors = fetched([p.vector for p in batch], self._notes.warn)
      weights = fetched([p.weights for p in batch], self._notes.warn)
      for pushed, seen, counts in zip(batch, seen_in(batch, vectors), weights, strict=True):
        self._made += self._rows.of(pushed, seen, counts)
      self._write_made()
      self._batch = []

  def _write_made(self) -> None:
    made, self._made = _joined(self._made), []
    # Numbers by leaf go into rows where they are due, and where a detector finds something.
    rows = [m.row for m in made]
    marked = self._live.marked(rows, [m.vectors for m in made])
    for m in made:
      if m.vectors and (m.is_due or m.row[STEP] in marked):
        m.row[LEAF] = m.vectors
    # The file first: it is the record, whatever a writer does.
    if rows:
      self._file.write(self._header(), rows)
    for row in rows:
      self._hand_on(row)
    if self._is_told:
      for finding in self._live.findings(rows, self._rows.leaves):
        self._notes.add(finding)

  def _hand_on(self, row: dict[str, Any]) -> None:
    """Gives the previous row to the writers, now that it is complete."""
    if self._held is not None and self._held[STEP] == row[STEP] and BACK not in row:
      merge(self._held, row)
    else:
      self._release()
      self._held = row

  def _release(self) -> None:
    if self._held is not None:
      self.writers.hand_on(self._held, self._rows.leaves)
      self._held = None

  def _finish(self) -> None:
    # Pushes of other threads may be too late from here on; earlier ones are still written.
    self._is_ending = True
    self._write_batch(len(self._pending))
    self._made += self._rows.rest()
    self._write_made()
    self._file.write(self._header(), [])
    self._release()
    while self._queue.qsize():  # Requests of other threads are done too.
      if (item := self._queue.get()) is not None:
        item.is_done = True

  def _header(self) -> dict[str, Any]:
    return {
      HEADER: FORMAT,
      VERSION: clipjax.__version__,
      STARTED: self._started,
      LEAVES: dict(self._rows.leaves),
      PARAMETERS: self.parameters,
      EVERY: self._every,
      OPTIMIZER: list(self._optimizer),
    }


class Notes:
  """Warnings, findings and errors of the thread, in order, until a call from outside delivers them."""

  def __init__(self, on_finding: Callable[[Finding], Any] | None):
    self._on_finding = on_finding
    self._notes: deque[str | Finding | _Failure] = deque()

  def add(self, note: "str | Finding | _Failure") -> None:
    """Adds a note."""
    self._notes.append(note)

  def warn(self, text: str) -> None:
    """Adds a warning."""
    self._notes.append(text)

  def deliver(self) -> None:
    """Delivers each note once: warns, calls back or raises."""
    while self._notes:
      try:
        note = self._notes.popleft()
      except IndexError:  # Another thread was faster.
        return
      if isinstance(note, str):
        warnings.warn(note, RuntimeWarning, stacklevel=caller_level())
      elif isinstance(note, _Failure):
        raise note.error
      elif self._on_finding is not None:
        self._on_finding(note)


def _joined(made: list[Made]) -> list[Made]:
  """The rows, with consecutive rows of one step merged."""
  out: list[Made] = []
  for m in made:
    if out and out[-1].row[STEP] == m.row[STEP] and BACK not in m.row:
      merge(out[-1].row, m.row)
      out[-1] = Made(out[-1].row, {**out[-1].vectors, **m.vectors}, out[-1].is_due or m.is_due)
    else:
      out.append(m)
  return out


def _wait_until(is_true: Callable[[], bool]) -> None:
  """Polls. An interrupt at the wrong moment would leave a lock held."""
  pause = 1e-5
  while not is_true():
    time.sleep(pause)
    pause = min(2 * pause, 5e-3)
