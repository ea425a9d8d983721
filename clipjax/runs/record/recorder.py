"""The flight recorder: it writes what every clip and watch measured, and the losses, of every step to a file.

A push enqueues one small program and returns. Another thread reads the numbers from the device once they are ready,
many steps at a time. Logging therefore does not slow the training loop, and only a kill costs the last rows.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import jax
import numpy as np

from clipjax.checks import check_whole, describe
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.limits import HealthLimits, check_limits
from clipjax.runs.health.live import Live
from clipjax.runs.loggers.writers import Writers
from clipjax.runs.reading.lines import checked_path
from clipjax.runs.record import at_exit, packing
from clipjax.runs.record.pipeline import Notes, Pipeline
from clipjax.runs.record.pushes import Pushed, batch_of, check_outside_jit, split, step_of
from clipjax.runs.record.run_file import RunFile
from clipjax.runs.record.weights import first_shard, histogram, parameter_count
from clipjax.runs.schema import RESERVED, USER_STEP


class Recorder:
  """Writes what the clips and watches of an optimizer state measured, and your own scalars, row by row.

  `push` packs everything into one new vector on the device, which outlives a step that donates the optimizer state, and
  returns. A thread reads the vectors, `every` at a time, writes the rows and hands them to the writers. `push` waits
  only if the device is more than `2 * every` steps behind.

  The file is JSON Lines with one row per step; `read_run` reads it. A row has the step number that you pushed; "update"
  counts the updates that the optimizer had seen. Several pushes of one step become one row, in which the later number
  of a key wins. With `watch(history=N)`, up to N steps between two pushes become rows with their norm, numbered back
  from the push that brought them. Under `optax.MultiSteps`, a row is an update: its step is the one in which the update
  landed, its scalars are means over the micro-batches, "tokens" and "examples" are sums. A step that `skip_steps`
  rejected is a row too, without the numbers of the clips and watches inside, which did not see it.

  If the path holds a run, rows are appended to it. When the steps go back, to a checkpoint or to the start, the rows
  from there on are superseded: they stay in the file, but `read_run` leaves them out. A push without an optimizer state
  for an earlier step, such as a late evaluation, is added to that step.

  Norms by leaf are written once in `every` pushes and at every step that a finding names: a spike of a norm or of the
  loss, or nonfinite numbers, for the first `every` steps in a row. They are also written at a worst step 10% above the
  last one written. Slices of stacked layers count as leaves here, and so do more than 64 groups. Numbers of fewer
  groups are in every row.

  An exception, Ctrl-C, SIGTERM or a script that ends without `close` loses nothing that was pushed. The Recorder
  handles SIGTERM only if nothing else does: it writes the file, gives loggers ten seconds, and then lets SIGTERM end
  the process. A killed process loses what was not yet read, at most twice `every` rows. `push` may be called from
  several threads.

  A full disk or a logger that raises causes one warning, and training continues. Up to 16 MiB of rows wait until they
  can be written; beyond that the oldest are dropped, and `close` says how many were never written. Only one recorder
  writes to a file: a second one in this process closes the first, one in another process is refused. With several
  processes of `jax.distributed`, only process 0 writes: make the `Recorder` after `jax.distributed.initialize`.

  Args:
    path: the file.
    every: how many pushes are read from the device at a time.
    writers: loggers that also get every scalar, in order: a `SummaryWriter`, a run of wandb, the module `mlflow` and
      others, or functions `(step, values)`; docs/loggers.md of the project lists all. A pair `(logger, "leaves")` gets
      the numbers by leaf as well. Each logger has its own thread, except wandb, which gets a row at each push. They are
      flushed, but not closed.
    on_finding: called with each FAIL or WARN of `diagnose` that names a step: nonfinite numbers, a run that diverged or
      in which nothing trains, a layer that died, spikes that reached the parameters. It is called once for each kind,
      by the first `push` after the rows were written, so within about `every` pushes. `push` raises what it raises.
    limits: the thresholds of these findings, as in `diagnose`.

  Raises:
    OSError: if the file cannot be written to.
    ValueError: if no Recorder wrote the file, it is not a regular file, or another process records to it; for an
      `every` below 1 or limits out of range; for wandb, mlflow or trackio without a run.
    TypeError: for a writer that takes no rows, or an argument of another type.

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
    (array([0, 1, 2]), array([0.5, 0.5, 0.5]), array([ 5., nan, nan]))
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    every: int = 50,
    writers: Iterable[Any] = (),
    on_finding: Callable[[Finding], Any] | None = None,
    limits: HealthLimits | None = None,
  ):
    check_whole(every, "every", 1)
    if not isinstance(writers, Iterable):
      raise TypeError(f"`writers` must be an iterable of writers, got {type(writers).__name__}: pass [writer].")
    _check_callable(on_finding)
    limits = HealthLimits() if limits is None else limits
    check_limits(limits)
    self._every = every
    self._notes = Notes(on_finding)
    self._packers: list[packing.Packer] = []
    self._making = threading.Lock()
    self._pushes = 0
    self._next_weights = 0
    self._is_closed = False
    self._is_alone = jax.process_count() == 1
    self._pipeline: Pipeline | None = None
    if jax.process_index() == 0:  # In the other processes, `push` returns at once.
      targets = Writers(writers, self._notes.warn)
      self._open(path, targets, on_finding is not None, limits)
      self._notes.deliver()

  def push(
    self,
    step: int | jax.Array,
    opt_state: Any,
    *,
    params: Any = None,
    batch: int | str | None = None,
    **scalars: float | jax.Array | np.generic,
  ) -> None:
    """Records a step; call it outside jit, with what the step returned.

    Args:
      step: your step number. `push` does not wait for one on the device.
      opt_state: as in `clipjax.metrics`, or None for a run without an optimizer; may be donated afterwards. For several
        optimizers, push a dict of their states.
      params: the parameters, to record their number and, once in `every` pushes, a histogram of log10|w|. Only the part
        on the first device counts if an array is spread over several. May be donated afterwards.
      batch: the name you look the batch up by: an integer, or a string of at most 100 characters. Findings quote it.
      scalars: anything else to record, such as `loss=`, `learning_rate=`, or `tokens=` of this step for the throughput:
        Python numbers or arrays of shape (), which `push` does not wait for. May be inf or NaN.

    Raises:
      TypeError: for a value that is not a number, anything but an optimizer state, `params` without a floating leaf, or
        a call inside jit.
      ValueError: for an array that is not a scalar, a step or batch beyond int64, a batch of more than 100 characters,
        a key of `clipjax.metrics` or of the file itself, an optimizer state with leading axes, or a call after `close`.
    """
    if self._is_closed:
      raise ValueError("`push` must be called before `close`, got a closed Recorder: make another with the same path.")
    if self._pipeline is None:
      return
    if self._pipeline.is_closed:
      raise ValueError(
        "`push` must be called on the newest Recorder of a path, got one that another Recorder of this process has "
        "replaced: push to that one."
      )
    pushed = self._pushed(step, opt_state, params, batch, scalars)
    self._pipeline.put(pushed)
    self._pipeline.writers.pace(pushed.step)
    self._notes.deliver()

  def flush(self) -> None:
    """Reads and writes all pushes so far; waits for the device.

    Micro-batches of an update that has not landed wait for the rest of the update, or for `close`.
    """
    if self._pipeline is not None and not self._pipeline.is_closed:
      self._pipeline.drain()
      self._pipeline.writers.flush()
    self._notes.deliver()

  def close(self) -> None:
    """Writes everything that is left. A second call resumes an interrupted first call and otherwise does nothing."""
    self._is_closed = True
    if self._pipeline is not None:
      self._pipeline.close()
      at_exit.remove(self._pipeline)
      self._finalizer.detach()
    self._notes.deliver()

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    try:
      self.close()
    except Exception as late:
      if error is None:
        raise
      error.add_note(f"Closing the Recorder raised {type(late).__name__}: {late}")  # The first error wins.

  def _open(self, path: Any, writers: Writers, is_told: bool, limits: HealthLimits) -> None:
    name, warn = checked_path(path), self._notes.warn
    if (older := at_exit.open_at(name)) is not None:
      older.close()
      at_exit.remove(older)
      warn(
        f"{name!r} was open in another Recorder of this process, which is now closed: close a Recorder, preferably "
        "with `with`, before you make another for its path."
      )
    file = RunFile(path, warn)
    self._pipeline = Pipeline(self._every, file, writers, Live(limits), self._notes, is_told)
    at_exit.add(self._pipeline)
    self._finalizer = weakref.finalize(self, _end, self._pipeline, self._notes)

  def _pushed(self, step: Any, opt_state: Any, params: Any, batch: Any, scalars: dict[str, Any]) -> Pushed:
    # Check the arguments first: a push that fails must leave no trace.
    now = time.time()
    host, device = split(scalars)
    number, name = step_of(step), batch_of(batch)
    if number is None:
      device[USER_STEP] = step
    packer, arrays = self._packed(opt_state)
    if taken := [key for key in scalars if key in RESERVED or packer.has(key)]:
      raise ValueError(f"`{taken[0]}` must be another key, got one that the Recorder writes itself: rename it.")
    if any(issubclass(kind, jax.core.Tracer) for kind in {*map(type, arrays)}):
      check_outside_jit(next(x for x in arrays if isinstance(x, jax.core.Tracer)), "opt_state")
    if not self._is_alone:  # A program over devices of other processes would wait for them.
      arrays = [first_shard(x) for x in arrays]
      device = {key: first_shard(value) for key, value in device.items()}
    params = params if self._pushes >= self._next_weights else None
    for leaf in jax.tree.leaves(params):
      check_outside_jit(leaf, "params")
    # Enqueue the programs: nothing here waits for the device.
    vector, layout = packer.pack(arrays, device)
    if isinstance(vector, jax.core.Tracer):  # The traced function closes over the state.
      raise TypeError(
        "`push` must be called outside jit, got a call in a traced function: push what the jitted step returns."
      )
    weights = self._weights(params)
    by_leaf = self._pushes % self._every == 0  # Makes numbers by leaf due.
    self._pushes += 1
    return Pushed(now, threading.get_ident(), number, name, host, packer, layout, vector, weights, by_leaf)

  def _packed(self, opt_state: Any) -> tuple[packing.Packer, list[Any]]:
    """The packer for this state structure, and the arrays to pack."""
    if (found := self._found(opt_state)) is not None:
      return found
    with self._making:  # One packer per structure, even if several threads push it at once.
      if (found := self._found(opt_state)) is not None:
        return found
      packer = packing.Packer(opt_state)
      self._packers = [packer, *self._packers]
      assert self._pipeline is not None
      self._pipeline.has_optimizer(packer.optimizer)
    return packer, packer.arrays(opt_state) or []

  def _found(self, opt_state: Any) -> tuple[packing.Packer, list[Any]] | None:
    for packer in self._packers:
      if (arrays := packer.arrays(opt_state)) is not None:
        return packer, arrays
    return None

  def _weights(self, params: Any) -> jax.Array | None:
    if params is None:
      return None
    parameters, counts = parameter_count(params), histogram(params)
    self._next_weights = self._pushes + self._every
    assert self._pipeline is not None
    self._pipeline.parameters = parameters
    return counts


def _end(pipeline: Pipeline, notes: Notes) -> None:
  """Closes a recorder that nobody closed.

  Garbage may be collected in any thread. A thread that rows pass through cannot wait for them, so another one does.
  """
  if threading.current_thread() is threading.main_thread():
    _close(pipeline, notes)
  else:
    threading.Thread(target=_close, args=(pipeline, notes), name="clipjax close", daemon=True).start()


def _close(pipeline: Pipeline, notes: Notes) -> None:
  pipeline.close()
  at_exit.remove(pipeline)
  notes.deliver()


def _check_callable(on_finding: Any) -> None:
  if on_finding is not None and not callable(on_finding):
    raise TypeError(f"`on_finding` must be a function of a Finding, got {describe(on_finding)}: pass one, or None.")
