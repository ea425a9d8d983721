"""The recorders that are open in this process: one per file, and all of them are written when the process ends.

A process ends when Python exits, with or without an exception, or by SIGTERM, which schedulers send before they take a
machine away. We handle SIGTERM only if nothing else does: we write the rows, give loggers ten seconds, and then let
SIGTERM end the process.
"""

import atexit
import os
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol


class _Open(Protocol):
  @property
  def identity(self) -> Any: ...

  @property
  def path(self) -> str: ...

  def close(self, patience: float | None = None) -> None: ...


_OPEN: "weakref.WeakSet[Any]" = weakref.WeakSet()
_IS_OURS = threading.Event()
_PATIENCE = 10.0  # Seconds that loggers get at SIGTERM; a kill follows it.


def add(pipeline: _Open) -> None:
  """Registers an open recorder, which is closed when the process ends."""
  _OPEN.add(pipeline)
  if not _IS_OURS.is_set() and threading.current_thread() is threading.main_thread() and _is_sigterm_free():
    signal.signal(signal.SIGTERM, _on_sigterm)
    _IS_OURS.set()


def remove(pipeline: _Open) -> None:
  """Forgets a closed recorder; after the last one, SIGTERM has its default handler again."""
  _OPEN.discard(pipeline)
  if not _OPEN and _IS_OURS.is_set() and threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _IS_OURS.clear()


def open_at(path: str) -> Any:
  """The open recorder that writes to this file, or wrote to it before it was removed; None if there is none."""
  try:
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
  except OSError:
    identity = None
  # The same file may have several paths, and a removed file has only its path.
  return next(
    (p for p in list(_OPEN) if p.path == os.path.abspath(path) or (identity is not None and identity == p.identity)),
    None,
  )


def _close_all(patience: float | None = None) -> None:
  for pipeline in list(_OPEN):
    try:
      pipeline.close(patience)
    except Exception as error:  # The others must still be written.
      print(f"clipjax: {error}", file=sys.stderr)


def _on_sigterm(number: int, frame: Any) -> None:
  _close_all(_PATIENCE)
  signal.signal(number, signal.SIG_DFL)
  os.kill(os.getpid(), number)


def _is_sigterm_free() -> bool:
  """Whether neither Python nor a linked library handles SIGTERM, as JAX does to report a preemption."""
  if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
    return False
  try:
    status = Path("/proc/self/status").read_text()
  except OSError:  # Not Linux: Python's answer must do.
    return True
  caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
  return not int(caught, 16) >> (signal.SIGTERM - 1) & 1


def _forget() -> None:
  """After a fork: the child has no thread to wait for, and the parent writes."""
  _OPEN.clear()
  if _IS_OURS.is_set():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _IS_OURS.clear()


atexit.register(_close_all)  # Also recorders that are collected only as Python ends.
if hasattr(os, "register_at_fork"):
  os.register_at_fork(after_in_child=_forget)
