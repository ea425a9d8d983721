"""How each kind of logger is called. A kind is recognized by its methods; no logger is imported.

`logger_of` turns what a user passes into a `Logger`; from then on, every logger gets its rows in the same way. wandb
accepts only increasing steps and has its own file, `wandb`.
"""

import contextvars
import datetime
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from clipjax.checks import check_takes
from clipjax.runs.loggers.keys import MlflowKeys, Namespaces
from clipjax.runs.loggers.wandb import WandbRows
from clipjax.runs.number_text import numbers
from clipjax.runs.schema import BATCH, FLAGS, HEADER, LEAF, STEP, TIME, USER_STEP, WEIGHTS, name_of

_NO_NUMBERS = frozenset({HEADER, STEP, TIME, BATCH, LEAF, FLAGS, WEIGHTS, USER_STEP})


class Entry(NamedTuple):
  """A row as a logger gets it.

  Attributes:
    step: the step number that the caller pushed.
    time: the time of the push, in seconds since 1970; None for a row from a ring.
    values: numbers by key; inf and NaN are floats.
  """

  step: int
  time: float | None
  values: dict[str, float]


class Logger(NamedTuple):
  """How a target gets its rows.

  Attributes:
    name: the name of the target in messages.
    take: takes rows; if it raises, it is called again with the same rows.
    flush: the flush method of the target, if it has one.
    most: the maximum number of rows per call.
  """

  name: str
  take: Callable[[Sequence[Entry]], None]
  flush: Callable[[], Any] | None = None
  most: int = 1


def entry_of(row: Mapping[str, Any], leaves: Mapping[str, Sequence[str]] | None) -> Entry:
  """A row of the file as a logger gets it, with the numbers by leaf if `leaves` has their names."""
  flags = row.get(FLAGS, {})
  values = {key: float(flags[key]) if value is None else value for key, value in row.items() if key not in _NO_NUMBERS}
  if leaves is not None:
    for key, vector in row.get(LEAF, {}).items():
      labels = zip(leaves[name_of(key)], numbers(np.asarray(vector)), strict=True)
      values.update({f"{key}/{label}": number for label, number in labels})
  return Entry(row[STEP], row.get(TIME), values)


def logger_of(target: Any) -> Logger | WandbRows:
  """How to give rows to this target.

  Raises:
    TypeError: for an object that takes no rows.
    ValueError: for wandb, mlflow or trackio without a run.
  """
  if remedy := _refusal(target):
    raise TypeError(f"{_RULE}, got {_described(target)}: {remedy}.")
  for kind in (_wandb, _mlflow, _by_row, _by_key, _function):
    if (logger := kind(target)) is not None:
      return logger
  remedy = "pass a function that forwards the values"
  if isinstance(target, tuple) and len(target) == 2:
    remedy = "the second of a pair must be 'leaves'"
  elif target == "leaves":
    remedy = "pass [(logger, 'leaves')]"
  raise TypeError(f"{_RULE}, got {_described(target)}: {remedy}.")


_RULE = "`writers` must each be a logger that clipjax knows, a function (step, values), or a pair of one and 'leaves'"


def _refusal(target: Any) -> str | None:
  """What to pass instead of something that looks like a logger but takes no rows."""
  if isinstance(target, type):
    return "pass an instance"
  if isinstance(target, logging.Logger | logging.LoggerAdapter) or target is logging:
    return 'pass `lambda step, values: logger.info("%d %s", step, values)`'
  if callable(getattr(target, "writerow", None)):
    return "pass `lambda step, values: writer.writerow([step, values.get('loss'), values.get('grad/norm')])`"
  if _has(target, "log_batch") and not isinstance(target, ModuleType):
    return "pass the module `mlflow` after `mlflow.start_run()`, or what that returned"
  return None


# Called once per row -------------------------------------------------------------------------------------------------


def _by_row(target: Any) -> Logger | None:
  """Loggers that take all numbers of a row at once: clu, trackio, neptune_scale, comet."""
  if _has(target, "write_scalars"):
    return _rows(target, lambda entry: target.write_scalars(entry.step, entry.values))
  if _has(target, "log_metrics"):
    return _rows(target, _neptune_scale(target) if _takes(target.log_metrics, "data") else _comet(target))
  if _has(target, "log") and _takes(target.log, "step"):
    # trackio keeps its run in a context variable, which another thread would not see.
    context = contextvars.copy_context()
    _check_trackio(target)
    return _rows(target, lambda entry: context.run(target.log, entry.values, step=entry.step))
  return None


def _rows(target: Any, write: Callable[[Entry], Any]) -> Logger:
  def take(entries: Sequence[Entry]) -> None:
    for entry in entries:
      write(entry)

  return Logger(_name(target), take, _flush(target))


def _neptune_scale(target: Any) -> Callable[[Entry], Any]:
  def write(entry: Entry) -> None:  # It refuses nonfinite numbers.
    time = None if entry.time is None else datetime.datetime.fromtimestamp(entry.time, datetime.UTC)
    target.log_metrics(data=_finite(entry.values), step=entry.step, timestamp=time)

  return write


def _comet(target: Any) -> Callable[[Entry], Any]:
  """`log_metrics(dict, step=)`, for comet and the loggers of Lightning."""

  def write(entry: Entry) -> None:
    current = getattr(target, "curr_step", None)
    target.log_metrics(entry.values, step=entry.step)
    if hasattr(target, "curr_step"):  # comet uses it for what the user logs without a step; ours is older.
      target.curr_step = current

  return write


def _check_trackio(target: Any) -> None:
  current = getattr(getattr(target, "context_vars", None), "current_run", None)
  if isinstance(current, contextvars.ContextVar) and current.get() is None:
    raise ValueError(
      "`writers` must have trackio with a run, got none: call `trackio.init` before making the Recorder."
    )


# Called once per number ----------------------------------------------------------------------------------------------


def _by_key(target: Any) -> Logger | None:
  """Loggers that take one number at a time: tensorboardX, torch, aim, clearml, neptune."""
  write: Callable[[str, float, Entry], Any] | None = None
  if _has(target, "add_scalar"):
    write = _tensorboard(target.add_scalar)
  elif _has(target, "track"):  # An integer would change the type of an aim series.
    write = lambda key, value, entry: target.track(float(value), name=key, step=entry.step)  # noqa: E731
  elif _has(target, "report_scalar"):
    write = _clearml(target.report_scalar)
  elif all(_has(target, name) for name in ("__getitem__", "assign", "sync")):
    write = _neptune(target)
  return None if write is None else Logger(_name(target), _KeyByKey(write), _flush(target))


class _KeyByKey:
  """Writes a row number by number; after an error it resumes, so each number is written once."""

  def __init__(self, write: Callable[[str, float, Entry], Any]):
    self._write = write
    self._written = 0

  def __call__(self, entries: Sequence[Entry]) -> None:
    (entry,) = entries
    for key, value in list(entry.values.items())[self._written :]:
      self._write(key, value, entry)
      self._written += 1
    self._written = 0


def _tensorboard(add_scalar: Callable[..., Any]) -> Callable[[str, float, Entry], Any]:
  if not _takes(add_scalar, "walltime"):
    return lambda key, value, entry: add_scalar(key, value, entry.step)
  return lambda key, value, entry: add_scalar(key, value, entry.step, walltime=entry.time)


def _clearml(report_scalar: Callable[..., Any]) -> Callable[[str, float, Entry], Any]:
  def write(key: str, value: float, entry: Entry) -> None:
    if math.isfinite(value):  # clearml would draw a 0.
      title, _, series = key.rpartition("/")
      report_scalar(title=title or series, series=series, value=value, iteration=entry.step)

  return write


def _neptune(target: Any) -> Callable[[str, float, Entry], Any]:
  keys = Namespaces()

  def write(key: str, value: float, entry: Entry) -> None:
    if math.isfinite(value):  # neptune would warn at each nonfinite number.
      target[keys(key)].append(value, step=entry.step, timestamp=entry.time)

  return write


# Functions, and mlflow -----------------------------------------------------------------------------------------------


def _function(target: Any) -> Logger | None:
  if not callable(target):
    return None
  check_takes(target, "a function among `writers`", "step, values", "print(step, values)")
  return _rows(target, lambda entry: target(entry.step, entry.values))


def _wandb(target: Any) -> WandbRows | None:
  """A run of wandb, or the module with an active run."""
  if isinstance(target, ModuleType) and _has(target, "define_metric") and hasattr(target, "run"):
    if target.run is None:
      raise ValueError("`writers` must have wandb with a run, got none: call `wandb.init` before making the Recorder.")
    target = target.run
  # Look at the type: asking a run for its step is slow, and fails once the run is finished.
  if _has(target, "define_metric") and _has(target, "log") and hasattr(type(target), "step"):
    return WandbRows(target)
  return None


def _mlflow(target: Any) -> Logger | None:
  """The module with its active run, which other threads cannot see, or a run that it started."""
  if isinstance(target, ModuleType) and _has(target, "active_run") and _has(target, "MlflowClient"):
    if (run := target.active_run()) is None:
      raise ValueError(
        "`writers` must have mlflow with a run, got none: call `mlflow.start_run` before making the Recorder."
      )
    return _mlflow_run(target, run)
  if hasattr(getattr(target, "info", None), "run_id") and "mlflow" in sys.modules:
    return _mlflow_run(sys.modules["mlflow"], target)
  return None


_MLFLOW_ROWS = 50  # Per request: a server handles only a few requests per second.
_MLFLOW_METRICS = 1000  # mlflow refuses more per request.


def _mlflow_run(mlflow: Any, run: Any) -> Logger:
  client, metric, run_id, keys = mlflow.MlflowClient(), mlflow.entities.Metric, run.info.run_id, MlflowKeys()

  def take(entries: Sequence[Entry]) -> None:
    now = datetime.datetime.now().timestamp()
    metrics = [
      metric(keys(key), value, int(1000 * (now if entry.time is None else entry.time)), entry.step)
      for entry in entries
      for key, value in entry.values.items()
    ]
    for i in range(0, len(metrics), _MLFLOW_METRICS):
      client.log_batch(run_id, metrics=metrics[i : i + _MLFLOW_METRICS])

  return Logger("mlflow", take, None, _MLFLOW_ROWS)


# Looking at objects -------------------------------------------------------------------------------------------------


def _has(target: Any, method: str) -> bool:
  return callable(getattr(target, method, None))


def _takes(function: Callable[..., Any], argument: str) -> bool:
  """Whether a function has an argument of this name; assumed if it has no signature."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError):
    return True
  return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _flush(target: Any) -> Callable[[], Any] | None:
  return target.flush if _has(target, "flush") else None


def _name(target: Any) -> str:
  if isinstance(target, ModuleType) or inspect.isroutine(target):
    return str(target.__name__)
  return type(target).__name__


def _described(target: Any) -> str:
  if isinstance(target, type | str):
    return repr(target)
  if isinstance(target, ModuleType):
    return f"the module {target.__name__}"
  name = type(target).__name__
  return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _finite(values: Mapping[str, float]) -> dict[str, float]:
  return {key: value for key, value in values.items() if math.isfinite(value)}
