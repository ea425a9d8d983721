"""The flight recorder: what every clip and watch measured, and the losses, of every step, in a file.

A push enqueues one small program and returns; numbers are read from the device when they are there, many steps at
once, in a thread of their own. So a loop is not slowed down by its log, and only a kill costs the last rows.
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
from clipjax.runs.health.findings import Finding, HealthLimits, check_limits
from clipjax.runs.health.live import Live
from clipjax.runs.loggers.writers import Writers
from clipjax.runs.reading.lines import checked_path
from clipjax.runs.record import exits, packing
from clipjax.runs.record.pipeline import Notes, Pipeline
from clipjax.runs.record.pushes import Pushed, batch_of, check_outside_jit, split, step_of
from clipjax.runs.record.run_file import RunFile
from clipjax.runs.record.weights import first_shard, histogram, parameter_count
from clipjax.runs.schema import RESERVED, USER_STEP


class Recorder:
  """Writes what the clips and watches of an optimizer state have measured, and what else it is given, row by row.

  `push` never waits for the device: it packs everything into one new vector there, which outlives a step that donates
  the optimizer state, and returns. A thread reads the vectors, `every` at a time, writes the rows, and hands them to
  the writers. The loop waits only where the device is more than `2 * every` steps behind.

  The file is JSON Lines, one row for each step, and `read_run` reads it. A row has the number that was pushed;
  "update" is how many updates the optimizer had seen. Pushes of one step are one row, of two numbers of one key the
  later. With `watch(history=N)` the steps between two pushes, up to N, become rows with their norm, numbered back from
  the push that brought them. Under `optax.MultiSteps` a row is an update: its step is the one in which the update
  landed, its scalars are means over the micro-batches, "tokens" and "examples" are sums. A step that `skip_steps`
  rejected is a row too, without the numbers of clips and watches inside, which did not see it.

  A path that has a run is appended to. Where the steps go back, to a checkpoint or to the start, what was recorded from
  there on is superseded: it stays in the file, and `read_run` leaves it out. What is pushed without an optimizer state
  for an earlier step, as a late evaluation, is added to that step.

  Norms by leaf are written once in `every` pushes, and at every step that a finding names: a spike of a norm or of the
  loss, and what is not finite, for the first `every` in a row. So they are at a worst step 10% above the last one
  written. Slices of stacked layers are leaves in this, and so are groups where there are more than 64. Numbers by
  fewer groups are in every row.

  Nothing that was pushed is lost by an exception, Ctrl-C, SIGTERM or a script that ends without `close`. SIGTERM is
  handled where nobody else does: the file is written, loggers get ten seconds, and the process ends by it. A process
  that is killed loses what was not yet read, at most twice `every` rows. `push` may be called from several threads.

  A full disk, or a logger that raises, is a warning, once, and the training goes on; up to 16 MiB of rows wait until
  they can be written, beyond that the oldest are dropped, and `close` says how many were never written. A file is
  recorded to by one recorder: a second one of this process closes the first, one of another process is refused. Of
  several processes of `jax.distributed` only process 0 writes: make the `Recorder` after `jax.distributed.initialize`.

  Args:
    path: the file.
    every: pushes between two reads from the device.
    writers: loggers that are given every scalar too, in order: a `SummaryWriter`, a run of wandb, the module `mlflow`
      and others, or functions `(step, values)`; docs/loggers.md of the project has all. A pair `(logger, "leaves")` is
      given the numbers by leaf as well. Each is called in a thread of its own, but for wandb, to which each push hands
      on a row. They are flushed, but not closed.
    on_finding: called with each FAIL or WARN of `diagnose` that names a step: what is not finite, a run that diverged
      or in which nothing trains, a layer that died, spikes that reached the parameters; once for each kind, by the
      first `push` after the rows were written, so within about `every` pushes. What it raises, `push` raises.
    limits: where these findings begin, as in `diagnose`.

  Raises:
    OSError: if the file cannot be written to.
    ValueError: if it is one that no Recorder wrote, no regular file, or recorded to by another process; for an `every`
      below 1 or limits out of their range.
    TypeError: for an object among the writers that takes no rows, or an argument of another type.

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
      raise TypeError(f"`writers` must be a sequence, got {type(writers).__name__}: pass [writer].")
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
    if jax.process_index() == 0:
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
      step: your number of the step. One on the device is not waited for.
      opt_state: as in `clipjax.metrics`, or None for a run without an optimizer; may be donated afterwards. Of several
        optimizers push a dict of their states.
      params: the parameters, for their number and a histogram of log10|w| once in `every` pushes; of an array that is
        spread over several devices, the part on the first of them. May be donated afterwards.
      batch: what you would look the batch up by: an integer or a short string. Findings name it.
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
    if self._pipeline is None:
      return
    if self._pipeline.is_closed:
      raise ValueError(
        "`push` must be called of the last Recorder of a path, got one that another of this process has replaced: push "
        "to that."
      )
    pushed = self._pushed(step, opt_state, params, batch, scalars)
    self._pipeline.put(pushed)
    self._pipeline.writers.pace(pushed.step)
    self._notes.deliver()

  def flush(self) -> None:
    """Reads and writes all that was pushed; waits for the device.

    Micro-batches of an update that has not landed wait for the others, until `close`.
    """
    if self._pipeline is not None and not self._pipeline.is_closed:
      self._pipeline.drain()
      self._pipeline.writers.flush()
    self._notes.deliver()

  def close(self) -> None:
    """Writes what is left; a second call does nothing, but goes on where the first one was interrupted."""
    self._is_closed = True
    if self._pipeline is not None:
      self._pipeline.close()
      exits.remove(self._pipeline)
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
      error.add_note(f"Closing the Recorder raised {type(late).__name__}: {late}")  # The first error stays the error.

  def _open(self, path: Any, writers: Writers, is_told: bool, limits: HealthLimits) -> None:
    name, warn = checked_path(path), self._notes.warn
    if (older := exits.open_at(name)) is not None:
      older.close()
      exits.remove(older)
      warn(
        f"{name!r} was open in another Recorder of this process, which is closed now: close a Recorder, best by "
        "`with`, before you make another of its path."
      )
    file = RunFile(path, warn)
    self._pipeline = Pipeline(self._every, file, writers, Live(limits), self._notes, is_told)
    exits.add(self._pipeline)
    self._finalizer = weakref.finalize(self, _end, self._pipeline, self._notes)

  def _pushed(self, step: Any, opt_state: Any, params: Any, batch: Any, scalars: dict[str, Any]) -> Pushed:
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
    if not self._is_alone:
      arrays = [first_shard(x) for x in arrays]
      device = {key: first_shard(value) for key, value in device.items()}
    params = params if self._pushes >= self._next_weights else None
    for leaf in jax.tree.leaves(params):
      check_outside_jit(leaf, "params")
    vector, layout = packer.pack(arrays, device)
    if isinstance(vector, jax.core.Tracer):  # Of a state that is no argument of the traced function.
      raise TypeError(
        "`push` must be called outside jit, got a call in a traced function: push what the jitted step returns."
      )
    weights = self._weights(params)
    by_leaf = self._pushes % self._every == 0
    self._pushes += 1
    return Pushed(now, threading.get_ident(), number, name, host, packer, layout, vector, weights, by_leaf)

  def _packed(self, opt_state: Any) -> tuple[packing.Packer, list[Any]]:
    """The packer for this structure of state, and what it packs."""
    if (found := self._found(opt_state)) is not None:
      return found
    with self._making:  # One packer for a structure, whatever threads push it at once.
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
  """Closes a recorder that nobody has closed.

  Garbage may be collected in any thread. One that rows pass through cannot wait for them: another one does.
  """
  if threading.current_thread() is threading.main_thread():
    _close(pipeline, notes)
  else:
    threading.Thread(target=_close, args=(pipeline, notes), name="clipjax close", daemon=True).start()


def _close(pipeline: Pipeline, notes: Notes) -> None:
  pipeline.close()
  exits.remove(pipeline)
  notes.deliver()


def _check_callable(on_finding: Any) -> None:
  if on_finding is not None and not callable(on_finding):
    raise TypeError(f"`on_finding` must be a function of a Finding, got {describe(on_finding)}: pass one, or None.")
