"""The flight recorder: what every clip and watch measured, and the losses, of every step, in a file.

A push enqueues one small program and returns; numbers are read from the device when they are there, many steps at
once. So a loop is not slowed down by its log, and a crash costs the last rows alone.
"""

import functools
import numbers
import os
import time
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clipjax
from clipjax.checks import caller_level, check_whole, describe
from clipjax.runs import packing, weights
from clipjax.runs.outputs import RunFile, Writer
from clipjax.runs.reading import merge
from clipjax.runs.rows import Pushed, Rows
from clipjax.runs.schema import RESERVED


class Recorder:
  """Writes what the clips and watches of an optimizer state have measured, and what else it is given, row by row.

  `push` never waits for the device: it packs everything into one new vector there, which outlives a step that donates
  the optimizer state, and returns. After `every` pushes the vectors are read together, as soon as they are there. The
  loop waits only where the device is more than `every` steps behind. A run that is killed loses what was not yet read:
  about `every` rows, at most twice as many.

  The file is JSON Lines, one row for each step: `read_run` reads it. Rows are numbered by the updates that the
  outermost clip, watch or `skip_steps` has seen, so that under `optax.MultiSteps` the pushes of one update make one row
  (of two numbers of one key, the later), a rejected step is a row too, and a resumed run goes on where its checkpoint
  was. A `step` of another value is kept as "user_step". Before the first update there is nothing but what was pushed.
  An optimizer state without any of these is numbered by `step`. A path that has a recorded run is appended to. With
  `watch(history=N)` the steps between two pushes, up to N, become rows with their norm.

  Norms by leaf are written once in `every` pushes, at a step that is not finite, and at a worst step 10% above the last
  one written; of many steps in a row that are not finite, for the first `every`. Slices of stacked layers are leaves
  in this, and so are groups where there are more than 64. Numbers by fewer groups are in every row.

  Only process 0 writes. A full disk, or a writer that raises, is a warning, once, and the training goes on; up to
  16 MiB of rows wait until they can be written, beyond that the oldest are dropped. Make the `Recorder` after
  `jax.distributed.initialize`, and close it, best by `with`: pushes since the last read are lost otherwise.

  Args:
    path: the file.
    every: pushes between two reads from the device.
    writers: objects with `add_scalar(key, value, step)` (tensorboardX, torch), `log(dict, step)` (wandb, trackio) or
      `write_scalars(step, dict)` (clu), which are given every scalar too. They are flushed, but not closed.

  Raises:
    OSError: if the file cannot be written to.
    ValueError: if it is one that no Recorder wrote, or for an `every` below 1.
    TypeError: for an object among the writers that is none, or a `path` or `every` of another type.

  Example:
    >>> import os, tempfile, jax.numpy as jnp, optax, clipjax
    >>> tx = optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> state = tx.init(params)
    >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
    >>> with clipjax.runs.Recorder(path) as recorder:
    ...   for step in range(3):
    ...     _, state = tx.update(params, state, params)
    ...     recorder.push(step, state, loss=jnp.array(0.5), params=params)
    >>> run = clipjax.runs.read_run(path)
    >>> run.steps, run["loss"], run["grad/norm/w"]
    (array([1, 2, 3]), array([0.5, 0.5, 0.5]), array([ 5., nan, nan]))
  """

  def __init__(self, path: str | os.PathLike[str], *, every: int = 50, writers: Iterable[Any] = ()):
    check_whole(every, "every", 1)
    if not isinstance(writers, Iterable):
      raise TypeError(f"`writers` must be a sequence, got {type(writers).__name__}: pass [writer].")
    self._every = every
    self._writers = [Writer(target) for target in writers]
    self._file = RunFile(path) if jax.process_index() == 0 else None
    self._is_alone = jax.process_count() == 1
    self._packers: list[packing.Packer] = []
    self._pending: list[Pushed] = []
    self._pushes = 0
    self._next_weights = 0
    self._parameters: int | None = None
    self._is_closed = False
    self._rows = Rows(every, self._file)
    self._started = time.time()

  def push(
    self, step: int | jax.Array, opt_state: Any, *, params: Any = None, **scalars: float | jax.Array | np.generic
  ) -> None:
    """Records a step; call it outside jit, with what the step returned.

    Args:
      step: number of the step, where the optimizer state does not count; a device scalar is not waited for.
      opt_state: as in `clipjax.metrics`, or None for a run without an optimizer; may be donated afterwards.
      params: the parameters, for their number and a histogram of log10|w| once in `every` pushes; of an array that is
        spread over several devices, the part on the first of them. May be donated afterwards.
      scalars: what else to record, such as `loss=`, `learning_rate=`, or `tokens=` of this step for the throughput:
        Python numbers or arrays of shape (), which are not waited for. May be inf or NaN.

    Raises:
      TypeError: for a value that is no number, what is no optimizer state, `params` without a floating leaf, or inside
        jit.
      ValueError: for an array that is no scalar, a step beyond an int64, a key of `clipjax.metrics` or of the file's
        own, an optimizer state with leading axes, or after `close`.
    """
    if self._is_closed:
      raise ValueError("`push` must be called before `close`, got a closed Recorder: make another, of the same path.")
    if self._file is None:
      return
    now = time.time()
    host, device = _split(scalars)
    number = _step(step)
    if number is None:
      device["user_step"] = step
    packer, arrays = self._packed(opt_state)
    if taken := [key for key in scalars if key in RESERVED or key in packer.metric_keys]:
      raise ValueError(f"`{taken[0]}` must be another key, got one that the Recorder writes itself: rename it.")
    if any(issubclass(kind, jax.core.Tracer) for kind in {*map(type, arrays)}):
      raise TypeError(_INSIDE_JIT.format("opt_state", "a traced one"))
    if not self._is_alone:
      arrays = [packing.first_shard(x) for x in arrays]
      device = {key: packing.first_shard(value) for key, value in device.items()}
    params = params if self._pushes >= self._next_weights else None
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
      raise TypeError(_INSIDE_JIT.format("params", "a traced one"))
    vector, layout = packer.pack(arrays, device)
    if isinstance(vector, jax.core.Tracer):  # Of a state that is no argument of the traced function.
      raise TypeError(
        "`push` must be called outside jit, got a call in a traced function: push what the jitted step returns."
      )
    by_leaf = self._pushes % self._every == 0
    self._pending.append(Pushed(now, number, host, packer, layout, vector, self._weights(params), by_leaf))
    self._pushes += 1
    if len(self._pending) >= self._every:
      self._read_batch()

  def flush(self) -> None:
    """Reads and writes all that was pushed; waits for the device."""
    while self._pending:
      self._write(self._every)
    if self._file is not None:
      self._file.write(self._header(), [])
      self._hand_on(self._rows.last())
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    """Writes what is left; a second call does nothing."""
    if not self._is_closed:
      self._is_closed = True
      self.flush()

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()

  def _packed(self, opt_state: Any) -> tuple[packing.Packer, list[Any]]:
    """The packer for this structure of state, and what it packs."""
    for packer in self._packers:
      if (arrays := packer.arrays(opt_state)) is not None:
        return packer, arrays
    packer = packing.Packer(opt_state)
    self._packers.insert(0, packer)
    return packer, packer.arrays(opt_state) or []

  def _weights(self, params: Any) -> jax.Array | None:
    if params is None:
      return None
    parameters, counts = weights.parameter_count(params), weights.histogram(params)
    self._next_weights = self._pushes + self._every
    self._parameters = parameters
    return counts

  def _read_batch(self) -> None:
    """Reads a batch that the device is through with; waits for it only where another one has gathered meanwhile."""
    if len(self._pending) >= 2 * self._every or all(p.is_ready() for p in self._pending[: self._every]):
      self._write(self._every)

  def _write(self, count: int) -> None:
    batch, self._pending = self._pending[:count], self._pending[count:]
    vectors = _fetched([p.vector for p in batch])
    weights = _fetched([p.weights for p in batch])
    rows: list[dict[str, Any]] = []
    for pushed, seen, counts in zip(batch, _seen(batch, vectors), weights, strict=True):
      for row in self._rows.of(pushed, seen, counts):
        if rows and rows[-1]["step"] == row["step"]:
          merge(rows[-1], row)
        else:
          rows.append(row)
    assert self._file is not None
    self._file.write(self._header(), rows)
    for row in rows:
      self._hand_on(self._rows.complete(row))

  def _hand_on(self, row: dict[str, Any] | None) -> None:
    if row is not None:
      for writer in self._writers:
        writer.write(row)

  def _header(self) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for packer in self._packers:
      leaves = {**packer.leaves, **leaves}
    return {
      "clipjax_run": 1,  # Rows are numbered by updates.
      "version": clipjax.__version__,
      "started": self._started,
      "leaves": leaves,
      "parameters": self._parameters,
      "every": self._every,
    }


_INSIDE_JIT = "`{}` must be an array with a value, got {}: call `push` outside jit, with what the jitted step returns."


def _split(scalars: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The scalars that are on the host, as Python numbers, and those on the device."""
  host: dict[str, Any] = {}
  device: dict[str, Any] = {}
  for key, value in scalars.items():
    if isinstance(value, jax.core.Tracer):
      raise TypeError(_INSIDE_JIT.format(key, "a traced one"))
    if isinstance(value, np.ndarray | jax.Array):
      if value.shape != ():
        raise ValueError(
          f"`{key}` must be a scalar, got shape {value.shape}: reduce it, for example with jnp.mean, or push an entry."
        )
      if not _is_real(value.dtype):
        raise _no_number(key, value)
    if isinstance(value, jax.Array):
      device[key] = value
    else:
      host[key] = _python_number(key, value)
  return host, device


@functools.cache  # Every push asks it of every scalar.
def _is_real(dtype: Any) -> bool:
  return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _python_number(key: str, value: Any) -> int | float:
  number = value.item() if isinstance(value, np.ndarray | np.generic) else value
  if isinstance(number, float):
    return number
  if not isinstance(number, numbers.Real):
    raise _no_number(key, value)
  if isinstance(number, numbers.Integral) and abs(int(number)) < 2**63:
    return int(number)
  try:
    return float(number)
  except OverflowError:
    raise ValueError(f"`{key}` must be in the range of a float, got a larger integer: scale it.") from None


def _no_number(key: str, value: Any) -> TypeError:
  return TypeError(f"`{key}` must be a real number or an array of shape (), got {describe(value)}: push numbers alone.")


def _step(step: Any) -> int | None:
  """The caller's number of the step; None where it is on the device."""
  if isinstance(step, jax.core.Tracer):
    raise TypeError(_INSIDE_JIT.format("step", "a traced one"))
  if isinstance(step, numbers.Integral) and not isinstance(step, bool):
    if abs(int(step)) >= 2**63:
      raise ValueError("`step` must be in the range of an int64, got a larger integer: pass the number of the step.")
    return int(step)
  if isinstance(step, jax.Array | np.ndarray) and step.shape == () and jnp.issubdtype(step.dtype, jnp.integer):
    return None if isinstance(step, jax.Array) else int(step)
  raise TypeError(f"`step` must be an integer, got {describe(step)}: pass the number of the step.")


def _seen(batch: list[Pushed], vectors: list[Any]) -> list[packing.Seen | None]:
  """What the vectors hold; all those of one layout are taken apart together."""
  out: list[packing.Seen | None] = [None] * len(batch)
  places: dict[packing.Layout, list[int]] = {}
  for i, (pushed, words) in enumerate(zip(batch, vectors, strict=True)):
    if words is not None:
      places.setdefault(pushed.layout, []).append(i)
  for layout, some in places.items():
    for i, seen in zip(some, layout.read([vectors[i] for i in some]), strict=True):
      out[i] = seen
  return out


def _are_on_cpu(arrays: list[jax.Array | None]) -> bool:
  """Whether these arrays, all of one place, are in the memory of the host; of none, yes."""
  first = next((array for array in arrays if array is not None), None)
  return first is None or all(device.platform == "cpu" for device in first.devices())


def _fetched(arrays: list[jax.Array | None]) -> list[Any]:
  """The arrays on the host, together; None for one that a failed step has left without a value."""
  try:
    if _are_on_cpu(arrays):  # `device_get` would ask for a copy of each first.
      return [array if array is None else np.asarray(array) for array in arrays]
    return list(jax.device_get(arrays))
  except Exception as error:
    out: list[Any] = []
    for array in arrays:
      try:
        out.append(jax.device_get(array))
      except Exception:
        out.append(None)
    warnings.warn(
      f"{sum(a is not None and b is None for a, b in zip(arrays, out, strict=True))} pushes could not be read from the "
      f"device ({str(error).splitlines()[0]}): they are left out.",
      RuntimeWarning,
      stacklevel=caller_level(),
    )
    return out
