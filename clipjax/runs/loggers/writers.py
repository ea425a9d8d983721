"""Gives the rows of a `Recorder` to loggers: each row once, in order, and no push waits for a logger.

Every logger has its own queue, emptied by its own thread, so a slow logger delays only itself; one that raises is tried
again. wandb counts steps by what the training code logs, so the pushing thread logs its rows, one per push. Warnings
are given in the pushing thread too.
"""

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from clipjax.runs.loggers.kinds import Entry, Logger, entry_of, logger_of
from clipjax.runs.loggers.wandb import WandbRows
from clipjax.runs.schema import LEAF

WITH_LEAVES = "leaves"  # Second of a pair: its logger gets the numbers by leaf too.

_KEPT_BYTES = 2**24  # Limit for the rows that wait for a logger.
_BYTES_A_NUMBER = 64  # A float and its place in a dict.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 60.0  # Seconds between two attempts.
_MOST_A_PUSH = 100  # Rows handed on by one push that stands for many steps.
_TRIES = 3  # Attempts at a flush; each may take as long as an unresponsive server.
_PATIENCE = 60.0  # Seconds that a flush waits for a logger that takes nothing.

Row: TypeAlias = dict[str, Any]
Leaves: TypeAlias = Mapping[str, Sequence[str]]


class Writers:
  """All loggers of a `Recorder`.

  Args:
    targets: loggers, functions (step, values), or pairs of one and "leaves".
    warn: called with the text of each warning, in a thread that calls `pace`, `flush` or `close`.

  Raises:
    TypeError: for an object that takes no rows.
    ValueError: for wandb, mlflow or trackio without a run.
  """

  def __init__(self, targets: Iterable[Any], warn: Callable[[str], None]):
    self._warn = warn
    self._writers = [_writer(target) for target in targets]
    self._paced = [writer for writer in self._writers if isinstance(writer, _Paced)]

  def hand_on(self, row: Row, leaves: Leaves) -> None:
    """Adds a row to the queues.

    Args:
      row: as in the file, with its numbers by leaf as numpy vectors. Must not be changed afterwards.
      leaves: names of the entries of those vectors, by state name.
    """
    for writer in self._writers:
      writer.put(row, leaves)

  def pace(self, step: int | None) -> None:
    """Hands on the next row to loggers that want it in this thread; called at each push.

    Args:
      step: the step of the push; None if it is not known on the host.
    """
    for writer in self._paced:
      writer.pace(step)
    for one in self._writers:
      if one.says:
        self._say()

  def flush(self) -> None:
    """Hands on waiting rows, retries failed ones, and flushes the loggers."""
    for writer in self._writers:
      writer.ask()
    for writer in self._writers:
      writer.wait()
    self._say()

  def close(self) -> None:
    """Flushes, and warns how many rows were never taken, as later rows never are."""
    for writer in self._writers:
      writer.ask(is_last=True)
    for writer in self._writers:
      writer.wait()
      writer.end()
    self._say()

  def _say(self) -> None:
    for writer in self._writers:
      while writer.says:
        self._warn(writer.says.popleft())


def _writer(target: Any) -> "_Threaded | _Paced":
  with_leaves = isinstance(target, tuple) and len(target) == 2 and target[1] == WITH_LEAVES
  logger = logger_of(target[0] if with_leaves else target)
  return _Threaded(logger, with_leaves) if isinstance(logger, Logger) else _Paced(logger, with_leaves)


class _Queue:
  """Rows that a logger has not taken yet; if there are too many, the oldest are dropped."""

  def __init__(self, with_leaves: bool):
    self._with_leaves = with_leaves
    self._rows: deque[tuple[Row, Leaves, int]] = deque()
    self._bytes = 0
    self._lock = threading.RLock()  # SIGTERM is handled in the thread that it interrupts, which may hold the lock.
    self.lost = 0

  def __len__(self) -> int:
    return len(self._rows)

  def put(self, row: Row, leaves: Leaves) -> None:
    size = sys.getsizeof(row) + _BYTES_A_NUMBER * len(row)
    if self._with_leaves:
      size += sum(vector.nbytes for vector in row.get(LEAF, {}).values())
    with self._lock:
      self._rows.append((row, leaves, size))
      self._bytes += size
      while self._bytes > _KEPT_BYTES and len(self._rows) > 1:
        self._bytes -= self._rows.popleft()[2]
        self.lost += 1

  def take(self, most: int) -> list[Entry]:
    """Takes some of the oldest rows, without those that have no number."""
    with self._lock:
      taken = [self._rows.popleft() for _ in range(min(most, len(self._rows)))]
      self._bytes -= sum(size for _, _, size in taken)
    entries = [entry_of(row, leaves if self._with_leaves else None) for row, leaves, _ in taken]
    return [entry for entry in entries if entry.values]


class _Tries:
  """Calls a logger; after an error, it pauses longer each time and warns once."""

  def __init__(self, name: str, says: deque[str]):
    self._name = name
    self._says = says
    self._failures = 0
    self._has_said = False
    self._next = 0.0

  def begin(self) -> None:
    """Allows an immediate attempt, and `_TRIES` attempts with short pauses."""
    self._failures, self._next = 0, 0.0

  def is_given_up(self) -> bool:
    """Whether it has failed `_TRIES` times since `begin`."""
    return self._failures >= _TRIES

  def pause(self) -> float:
    """Seconds until the next attempt."""
    return max(0.0, self._next - time.monotonic())

  def call(self, function: Callable[[], Any]) -> bool:
    """Calls the function; returns whether it succeeded."""
    try:
      function()
    except Exception as error:
      self._next = time.monotonic() + min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE)
      self._failures = min(self._failures + 1, 30)
      if not self._has_said:
        self._has_said = True
        self._says.append(
          f"the writer {self._name} raised {type(error).__name__}: {error}; up to "
          f"{_KEPT_BYTES >> 20} MiB of its rows wait for another attempt. Training and the other outputs continue."
        )
      return False
    self._failures, self._next = 0, 0.0
    return True


class _Threaded:
  """A logger with its own thread."""

  def __init__(self, logger: Logger, with_leaves: bool):
    self.says: deque[str] = deque()
    self._logger = logger
    self._tries = _Tries(logger.name, self.says)
    self._queue = _Queue(with_leaves)
    self._in_hand: list[Entry] = []  # Taken from the queue, and kept until the logger accepts them.
    self._changed = threading.Condition()
    self._asked = self._answered = self._progress = 0
    self._is_closed = False
    self._thread: threading.Thread | None = None

  def put(self, row: Row, leaves: Leaves) -> None:
    with self._changed:
      if self._is_closed:
        self._queue.lost += 1
        return
      self._queue.put(row, leaves)
      self._start()
      self._changed.notify_all()

  def ask(self, *, is_last: bool = False) -> None:
    """Requests a flush; `wait` waits for it."""
    with self._changed:
      if not self._is_closed:
        self._asked += 1
        self._tries.begin()
        self._changed.notify_all()

  def wait(self) -> None:
    """Waits until the flush is done or has failed again, or the logger is stuck."""
    while self._thread is None and self._answered < self._asked:  # No rows so far, or no thread can start.
      time.sleep(self._tries.pause())
      self._turn()
    with self._changed:
      # Give up only on a logger that makes no progress at all: a slow one may take its time.
      asked, progress, since = self._asked, self._progress, time.monotonic()
      while self._answered < asked:
        self._changed.wait(_PATIENCE / 10)
        if self._progress > progress:
          progress, since = self._progress, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
          self.says.append(
            f"the writer {self._logger.name} has taken nothing for {_PATIENCE:.0f} s: clipjax stops waiting for it."
          )
          return

  def end(self) -> None:
    with self._changed:
      if not self._is_closed:
        self._is_closed = True
        self._changed.notify_all()
        _say_lost(self.says, self._logger.name, self._queue.lost + len(self._queue) + len(self._in_hand))

  def _start(self) -> None:
    if self._thread is None:
      thread = threading.Thread(target=self._work, name=f"clipjax {self._logger.name}", daemon=True)
      with contextlib.suppress(RuntimeError):  # No thread can start while Python exits.
        thread.start()
        self._thread = thread

  def _work(self) -> None:
    while True:
      with self._changed:
        while not self._is_due() and not self._is_closed:
          self._changed.wait(self._tries.pause() or None)
        if self._is_closed:
          return
      self._turn()

  def _turn(self) -> None:
    """Gives the next rows to the logger; flushes it if there are none and a flush was requested."""
    # Under the lock: what to do. Without it: the call, which may take long. Under it again: what was done.
    with self._changed:
      asked = self._asked
      self._in_hand = rows = self._in_hand or self._queue.take(self._logger.most)
      is_empty = not rows and not len(self._queue)
    if rows:
      is_done = self._tries.call(lambda: self._logger.take(rows))
    else:
      is_done = not is_empty or self._logger.flush is None or self._tries.call(self._logger.flush)
    with self._changed:
      if is_done:
        self._in_hand = []
        self._progress += 1
      if (is_empty and is_done) or self._tries.is_given_up():
        self._answered = asked
      self._changed.notify_all()

  def _is_due(self) -> bool:
    """Whether there is work to do now rather than after a pause."""
    is_wanted = self._asked > self._answered or bool(self._in_hand) or len(self._queue) > 0
    return is_wanted and self._tries.pause() == 0


class _Paced:
  """A logger that is called in the pushing thread."""

  def __init__(self, logger: WandbRows, with_leaves: bool):
    self.says: deque[str] = deque()
    self._logger = logger
    self._tries = _Tries(logger.name, self.says)
    self._queue = _Queue(with_leaves)
    self._in_hand: list[Entry] = []
    self._lock = threading.RLock()
    self._pushed: tuple[int, int] | None = None
    self._is_closed = False

  def put(self, row: Row, leaves: Leaves) -> None:
    self._queue.put(row, leaves)

  def pace(self, step: int | None) -> None:
    if not self._lock.acquire(blocking=False):  # Another thread is handing on a row.
      return
    try:
      before = self._pushed[1] if self._pushed else step
      if step is not None and before is not None:
        self._pushed = (before, max(before, step))
      # A push that brings several steps from a ring hands on as many rows.
      most = max(1, self._pushed[1] - self._pushed[0]) if self._pushed and step is not None else 1
      if self._tries.pause() == 0:
        self._hand_on(min(most, _MOST_A_PUSH))
    finally:
      self._lock.release()

  def ask(self, *, is_last: bool = False) -> None:
    with self._lock:
      if self._is_closed:
        return
      self._tries.begin()
      self._hand_on(None, at_any_step=is_last)
      while self._tries.pause() and not self._tries.is_given_up():
        time.sleep(self._tries.pause())
        self._hand_on(None, at_any_step=is_last)

  def wait(self) -> None:
    """Does nothing: `ask` has done it all."""

  def end(self) -> None:
    if not self._is_closed:
      self._is_closed = True
      _say_lost(self.says, self._logger.name, self._queue.lost + len(self._queue) + len(self._in_hand))

  def _hand_on(self, most: int | None, at_any_step: bool = False) -> None:
    """Hands on rows as long as the logger takes them."""
    handed = 0
    while (most is None or handed < most) and (self._in_hand or len(self._queue)):
      self._in_hand = self._in_hand or self._queue.take(1)
      if self._in_hand and not self._offer(self._in_hand[0], at_any_step):
        break
      self._in_hand = []
      handed += 1
    if warning := self._logger.new_warning():
      self.says.append(warning)

  def _offer(self, entry: Entry, at_any_step: bool) -> bool:
    """Whether the logger took the row."""
    is_taken = False

    def offer() -> None:
      nonlocal is_taken
      is_taken = self._logger.offer(entry, self._pushed, len(self._queue), at_any_step)

    return self._tries.call(offer) and is_taken


def _say_lost(says: deque[str], name: str, count: int) -> None:
  if count:
    says.append(f"the writer {name} never took {count} rows: the file has them.")
