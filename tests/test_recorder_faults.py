"""Recorder when it is interrupted, ended, called from threads, or when its file is somebody else's: nothing is lost."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import clipjax
from clipjax.runs.record import exits

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def interrupts():
  """SIGINT raises KeyboardInterrupt here, also where the tests were started in the background, which ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "run.jsonl"


def slow_loss(turns):
  """A program that gives back its number, for which the device needs a while."""

  def loss(x):
    waste = jax.lax.fori_loop(0, turns, lambda i, m: jnp.tanh(m @ m), jnp.full((500, 500), x)).mean()
    return jnp.where(jnp.isnan(waste), waste, x)

  return jax.jit(loss).lower(jnp.float32(0)).compile()


def interrupted_after(seconds):
  timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
  timer.start()
  return timer


def program(code, path, *, expect):
  """Runs code with the path of a run as `path`, in a process of its own; its stderr."""
  code = "import os, signal, sys, time, clipjax, jax.numpy as jnp\npath = sys.argv[1]\n" + textwrap.dedent(code)
  done = subprocess.run([sys.executable, "-c", code, path], check=False, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == expect, done.stderr
  return done.stderr


# Interrupts -----------------------------------------------------------------------------------------------------------


def test_an_interrupt_while_push_waits_loses_no_row(path):
  slow, pushed = slow_loss(20), []

  def loop():
    with clipjax.runs.Recorder(path, every=2) as recorder:
      for step in range(1000):
        recorder.push(step, None, loss=slow(jnp.float32(step)))
        pushed.append(step)

  timer = interrupted_after(0.5)
  with pytest.raises(KeyboardInterrupt):
    loop()
  timer.join()
  run = clipjax.runs.read_run(path)
  assert len(pushed) >= 3 and set(pushed) <= set(run.steps.tolist())
  assert run.steps.tolist() == run["loss"].tolist() == [*range(len(run))]


def test_twenty_interrupts_and_no_row_lost(path):
  seen, losses, done = [], [jnp.float32(step) for step in range(2000)], [0]

  def interrupt():
    for i in range(20):
      time.sleep(0.05)  # The loop is inside `try` again.
      os.kill(os.getpid(), signal.SIGINT)
      sent = time.monotonic()
      while len(seen) <= i:
        time.sleep(0.001)
        if time.monotonic() > sent + 5:  # One that comes while a finalizer runs is dropped.
          os.kill(os.getpid(), signal.SIGINT)
          sent = time.monotonic()

  recorder = clipjax.runs.Recorder(path, every=3)
  recorder.push(0, None, loss=losses[0])  # Its program is compiled.
  thread = threading.Thread(target=interrupt)

  def loop():
    while done[0] < 1999 or thread.is_alive():
      step = min(done[0] + 1, 1999)
      recorder.push(step, None, loss=losses[step])
      done[0] = step

  thread.start()
  while True:
    try:
      loop()
      break
    except KeyboardInterrupt:  # The push was cut short, or not: it is made again.
      seen.append(done[0])
  thread.join()
  recorder.close()
  assert len(seen) == 20
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == run["loss"].tolist() == [*range(2000)]


def test_close_that_was_interrupted_goes_on_the_second_time(path):
  slow = slow_loss(100)
  recorder = clipjax.runs.Recorder(path)
  for step in range(6):
    recorder.push(step, None, loss=slow(jnp.float32(step)))
  timer = interrupted_after(0.05)
  with pytest.raises(KeyboardInterrupt):
    recorder.close()
  timer.join()
  recorder.close()
  assert clipjax.runs.read_run(path)["loss"].tolist() == [*range(6)]


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["apart", "together"])
def test_a_thousand_pushes_from_four_threads(path, order):
  tx = clipjax.clip_by_global_norm(1.0)
  state = tx.init(jnp.zeros(2))
  errors = []

  def work(i):
    try:
      for k in range(250):
        step = 250 * i + k if order == "apart" else 4 * k + i
        recorder.push(step, state if order == "apart" else None, loss=jnp.float32(step))
    except Exception as error:
      errors.append(error)

  with clipjax.runs.Recorder(path, every=7) as recorder:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert not errors
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == run["loss"].tolist() == [*range(1000)]


def test_a_push_while_another_thread_closes_is_kept_or_told(path):
  told = []

  def work():
    for step in range(100_000):
      try:
        recorder.push(step, None, loss=float(step))
      except ValueError as error:
        told.append((step, str(error)))
        return

  recorder = clipjax.runs.Recorder(path, every=2)
  thread = threading.Thread(target=work)
  thread.start()
  time.sleep(0.1)
  recorder.close()
  thread.join()
  ((step, message),) = told
  assert message.startswith("`push` must be called before `close`, got ")
  assert clipjax.runs.read_run(path).steps.tolist() == [*range(step)]


# The end of the process -----------------------------------------------------------------------------------------------


def test_a_script_that_ends_without_close_has_written_all(path):
  code = """
  recorder = clipjax.runs.Recorder(path)
  for step in range(30):
    recorder.push(step, None, loss=jnp.float32(step))
  """
  assert program(code, path, expect=0) == ""
  assert clipjax.runs.read_run(path)["loss"].tolist() == [*range(30)]


def test_an_exception_without_with_has_written_all(path):
  code = """
  recorder = clipjax.runs.Recorder(path)
  for step in range(120):
    recorder.push(step, None, loss=jnp.float32(step))
  raise KeyError("batch")
  """
  assert "KeyError: 'batch'" in program(code, path, expect=1)
  assert len(clipjax.runs.read_run(path)) == 120


def test_sigterm_writes_all_and_ends_the_process(path):
  code = """
  recorder = clipjax.runs.Recorder(path)
  for step in range(120):
    recorder.push(step, None, loss=jnp.float32(step))
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)
  """
  program(code, path, expect=-signal.SIGTERM)
  assert len(clipjax.runs.read_run(path)) == 120


def test_sigterm_of_somebody_else_is_left_alone(path):
  code = """
  seen = []
  signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(0, None, loss=1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
  assert seen == [1]
  """
  program(code, path, expect=0)


def test_sigterm_is_nobodys_again_after_the_last_close(path):
  code = """
  def is_free():
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert is_free()
  first = clipjax.runs.Recorder(path)
  with clipjax.runs.Recorder(path + "2"):
    assert not is_free()
  assert not is_free()
  first.close()
  assert is_free()
  """
  program(code, path, expect=0)


def test_a_recorder_that_nobody_holds_is_closed(path):
  clipjax.runs.Recorder(path).push(1, None, loss=2.0)
  assert clipjax.runs.read_run(path)["loss"].tolist() == [2.0]


def test_a_child_that_was_forked_neither_writes_nor_waits(path):
  code = """
  import warnings
  warnings.simplefilter("ignore")
  recorder = clipjax.runs.Recorder(path)
  recorder.push(0, None, loss=1.0)
  if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    recorder.push(1, None, loss=2.0)
  else:
    try:
      recorder.push(1, None, loss=3.0)
    except ValueError as error:
      assert str(error).endswith("got a fork of it: make another.")
      recorder.flush()
      recorder.close()
      os._exit(0)
  """
  program(code, path, expect=0)
  lines = path.read_text().splitlines()
  assert [line[:9] for line in lines[1:]] == ['{"step": ', '{"step": ']
  assert clipjax.runs.read_run(path)["loss"].tolist() == [1, 2]


def test_a_path_is_free_again_though_a_child_was_forked_meanwhile(path):
  code = """
  import warnings
  warnings.simplefilter("ignore")
  recorder = clipjax.runs.Recorder(path)
  recorder.push(0, None, loss=1.0)
  child = os.fork()
  if not child:
    time.sleep(60)
    os._exit(0)
  recorder.close()
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(1, None, loss=2.0)
  os.kill(child, signal.SIGKILL)
  """
  program(code, path, expect=0)
  assert clipjax.runs.read_run(path)["loss"].tolist() == [1, 2]


# The file -------------------------------------------------------------------------------------------------------------


def test_the_older_recorder_of_a_path_in_this_process_is_closed(path):
  first = clipjax.runs.Recorder(path)
  first.push(1, None, loss=1.0)
  with pytest.warns(RuntimeWarning) as caught:
    second = clipjax.runs.Recorder(path)
  assert [str(w.message) for w in caught] == [
    f"{str(path)!r} was open in another Recorder of this process, which is closed now: close a Recorder, best by "
    "`with`, before you make another of its path."
  ]
  with pytest.raises(ValueError, match="`push` must be called of the last Recorder of a path"):
    first.push(2, None, loss=2.0)
  first.flush()
  first.close()
  second.push(2, None, loss=2.0)
  second.close()
  assert clipjax.runs.read_run(path)["loss"].tolist() == [1, 2]


def test_a_path_that_another_process_records_to_is_refused(path):
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(1, None, loss=1.0)
    said = program("clipjax.runs.Recorder(path)", path, expect=1)
  assert said.splitlines()[-1] == (
    f"ValueError: `path` must be a file that no other process records to, got {str(path)!r}, which one does: name a "
    "file for each."
  )
  program("clipjax.runs.Recorder(path).push(2, None, loss=2.0)", path, expect=0)
  assert len(clipjax.runs.read_run(path)) == 2


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
  import socket  # noqa: PLC0415

  path = tmp_path / "x"
  if kind == "fifo":
    os.mkfifo(path)
  elif kind == "device":
    path = Path("/dev/null")
  else:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
  with pytest.raises(
    ValueError, match=r"^`path` must be a new file .*, which is no regular file: name a file on a disk"
  ):
    clipjax.runs.Recorder(path)
  if kind == "socket":
    server.close()


@pytest.mark.parametrize("other", ["another run", "moved", "notes"])
def test_a_path_that_leads_elsewhere_meanwhile(path, other):
  recorder = clipjax.runs.Recorder(path, every=1)
  recorder.push(1, None, loss=1.0)
  recorder.flush()
  path.rename(path.with_name("old.jsonl"))
  if other == "another run":
    path.write_text('{"clipjax_run": 2, "leaves": {}}\n{"step": 1, "loss": 7.0}\n')
  elif other == "notes":
    path.write_text("my notes")
    recorder.push(2, None, loss=2.0)
    with pytest.warns(RuntimeWarning, match="which is neither: name another file"):
      recorder.flush()
    assert path.read_text() == "my notes"
    path.unlink()
  recorder.push(2, None, loss=2.0)
  recorder.push(3, None, loss=3.0)
  recorder.close()
  assert clipjax.runs.read_run(path.with_name("old.jsonl"))["loss"].tolist() == [1]
  assert clipjax.runs.read_run(path)["loss"].tolist() == ([7, 2, 3] if other == "another run" else [2, 3])


def test_a_file_system_without_locks_is_taken(path, monkeypatch):
  from clipjax.runs.record import run_file  # noqa: PLC0415

  def no_locks(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(run_file.fcntl, "flock", no_locks)
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(1, None, loss=1.0)
  monkeypatch.setattr(run_file, "fcntl", None)
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(2, None, loss=1.0)
  assert len(clipjax.runs.read_run(path)) == 2


def test_a_fault_in_the_thread_reaches_the_caller(path, monkeypatch):
  recorder = clipjax.runs.Recorder(path, every=1)
  monkeypatch.setattr(recorder._pipeline._rows, "of", lambda *_: 1 / 0)
  recorder.push(1, None, loss=1.0)
  with pytest.raises(ZeroDivisionError):
    recorder.flush()
  monkeypatch.undo()
  recorder.push(2, None, loss=2.0)
  recorder.close()
  assert clipjax.runs.read_run(path).steps.tolist() == [2]


# What a first reader found --------------------------------------------------------------------------------------------


def test_pushes_while_another_thread_closes_are_kept_or_told(path):
  for trial in range(10):
    name, kept, told = path.with_name(f"{trial}.jsonl"), [], []
    recorder = clipjax.runs.Recorder(name, every=3)

    def work(i):
      for step in range(i, 100_000, 4):
        try:
          recorder.push(step, None, loss=float(step))  # noqa: B023
        except ValueError:
          told.append(step)  # noqa: B023
          return
        kept.append(step)  # noqa: B023

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
      thread.start()
    time.sleep(0.02)
    recorder.close()
    for thread in threads:
      thread.join()
    assert len(told) == 4 and clipjax.runs.read_run(name).steps.tolist() == sorted(kept)


def test_a_recorder_that_is_collected_in_its_own_thread_is_written(path):
  code = """
  import gc
  class Trainer:
    def __init__(self):
      self.me, self.recorder = self, clipjax.runs.Recorder(path, every=5)
  def run():
    trainer = Trainer()
    rows = trainer.recorder._pipeline._rows
    of = rows.of
    rows.of = lambda *args: (gc.collect(), of(*args))[1]
    for step in range(10):
      trainer.recorder.push(step, None, loss=float(step))
  gc.disable()
  run()
  time.sleep(0.5)
  """
  assert program(code, path, expect=0) == ""
  assert clipjax.runs.read_run(path)["loss"].tolist() == [*range(10)]


def test_rows_that_were_never_written_are_told_at_the_end(path):
  recorder = clipjax.runs.Recorder(path, every=1)
  recorder.push(1, None, loss=1.0)
  recorder.flush()
  path.unlink()
  path.mkdir()

  def go_on():
    recorder.push(2, None, loss=1.0)
    recorder.push(3, None, loss=1.0)
    recorder.close()

  with pytest.warns(RuntimeWarning) as caught:
    go_on()
  assert [str(w.message) for w in caught][-1] == f"2 rows were never written to {str(path)!r}: they are lost."


def test_a_path_that_was_removed_and_is_recorded_to_again(path):
  first = clipjax.runs.Recorder(path)
  for step in range(5):
    first.push(step, None, loss=1.0)
  path.unlink(missing_ok=True)
  with pytest.warns(RuntimeWarning, match="was open in another Recorder of this process"):
    second = clipjax.runs.Recorder(path)
  second.push(5, None, loss=2.0)
  second.close()
  assert clipjax.runs.read_run(path)["loss"].tolist() == [1] * 5 + [2]


def test_sigterm_does_not_wait_for_a_slow_logger(path):
  code = """
  from clipjax.runs.record import exits
  exits._PATIENCE = 0.2
  def slow(step, values):
    time.sleep(5)
  recorder = clipjax.runs.Recorder(path, writers=[slow])
  for step in range(120):
    recorder.push(step, None, loss=jnp.float32(step))
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)
  """
  start = time.monotonic()
  program(code, path, expect=-signal.SIGTERM)
  assert time.monotonic() - start < 30 and len(clipjax.runs.read_run(path)) == 120


def test_an_error_in_the_loop_stays_the_error(path):
  def stop(finding):
    raise RuntimeError("stop")

  def loop():
    with clipjax.runs.Recorder(path, on_finding=stop) as recorder:
      recorder.push(1, None, loss=float("nan"))
      raise KeyError("batch")

  with pytest.raises(KeyError, match="batch") as error:
    loop()
  assert error.value.__notes__ == ["Closing the Recorder raised RuntimeError: stop"]


def test_limits_of_another_type_and_keys_of_leaves_are_refused(path):
  with pytest.raises(TypeError, match=r"^`limits` must be a HealthLimits, got 5 \(int\)"):
    clipjax.runs.Recorder(path, limits=5)
  tx = clipjax.watch()
  with clipjax.runs.Recorder(path) as recorder, pytest.raises(ValueError, match="`grad/norm/w` must be another key"):
    recorder.push(1, tx.init({"w": jnp.ones(2)}), **{"grad/norm/w": 1.0})


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_parameters_under_a_mesh_and_a_transfer_guard(path, axis_type):
  mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
  w = jax.device_put(jnp.ones((16, 4)), jax.NamedSharding(mesh, jax.P("d")))
  params, tx = {"w": w, "large": jnp.ones(70_000)}, clipjax.clip_by_global_norm(1.0)
  state = tx.init(params)
  with clipjax.runs.Recorder(path, every=1) as recorder:
    with jax.set_mesh(mesh):
      recorder.push(0, state, params=params)
      recorder.push(1, state, params=params)
    with jax.transfer_guard("disallow"):
      recorder.push(2, state, params=params)
  assert clipjax.runs.read_run(path).weights[2].sum(axis=1).tolist() == [8 + 70_000] * 3


def test_sigterm_closes_what_is_open_and_goes_on_to_the_end(path, monkeypatch, capsys):
  class Broken:
    path, identity = "x", None

    def close(self, patience):
      raise OSError("gone")

  ended, broken = [], Broken()
  monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number)))
  before = signal.getsignal(signal.SIGTERM)
  recorder = clipjax.runs.Recorder(path)
  exits._OPEN.add(broken)
  recorder.push(1, None, loss=2.0)
  exits._on_sigterm(signal.SIGTERM, None)
  exits._OPEN.discard(broken)
  signal.signal(signal.SIGTERM, before)
  recorder.close()
  assert ended == [(os.getpid(), signal.SIGTERM)] and clipjax.runs.read_run(path)["loss"].tolist() == [2]
  assert capsys.readouterr().err == "clipjax: gone\n"
  with pytest.raises(ValueError, match="`push` must be called before `close`"):
    recorder.push(2, None)


def test_what_tells_whether_sigterm_is_free(monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  assert exits._is_sigterm_free()
  monkeypatch.setattr(Path, "read_text", lambda self: "Name: x\nSigCgt:\t0000000000004000\n")
  assert not exits._is_sigterm_free()  # What JAX takes in C++, Python does not see.
  monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
  assert exits._is_sigterm_free()
  signal.signal(signal.SIGTERM, lambda *_: None)
  assert not exits._is_sigterm_free()
  signal.signal(signal.SIGTERM, before)


def test_a_forked_child_forgets_the_recorders_and_the_signal(path):
  recorder = clipjax.runs.Recorder(path)
  exits._forget()
  assert exits.open_at(str(path)) is None and not exits._IS_OURS.is_set()
  recorder.close()


def test_a_push_that_comes_when_the_thread_has_ended_is_told(path):
  recorder = clipjax.runs.Recorder(path)
  recorder.push(1, None, loss=1.0)
  pipeline = recorder._pipeline
  pipeline._request(pipeline._finish)  # As `close` in another thread, which has not come back yet.
  with pytest.raises(ValueError, match="got a push while another thread closed the Recorder"):
    recorder.push(2, None, loss=2.0)
  recorder.flush()
  recorder.close()
  assert clipjax.runs.read_run(path).steps.tolist() == [1]


def test_what_is_collected_in_another_thread_is_closed_by_a_third(path):
  from clipjax.runs.record import recorder as module  # noqa: PLC0415

  recorder = clipjax.runs.Recorder(path)
  recorder.push(1, None, loss=1.0)
  thread = threading.Thread(target=module._end, args=(recorder._pipeline, recorder._notes))
  thread.start()
  thread.join()
  deadline = time.monotonic() + 20
  while not recorder._pipeline.is_closed:
    assert time.monotonic() < deadline
  assert clipjax.runs.read_run(path).steps.tolist() == [1]
  recorder.close()


def test_what_on_finding_raises_comes_out_of_with(path):
  def stop(finding):
    raise RuntimeError(finding.name)

  with pytest.raises(RuntimeError, match="nonfinite-loss"), clipjax.runs.Recorder(path, on_finding=stop) as recorder:
    recorder.push(1, None, loss=float("nan"))
  assert len(clipjax.runs.read_run(path)) == 1


def test_a_step_that_cannot_be_read_costs_its_push(path):
  recorder = clipjax.runs.Recorder(path)
  recorder.push(jnp.int32(1), None, loss=1.0)
  recorder.push(jnp.int32(2), None, loss=1.0)
  recorder._pipeline._pending[0].vector.delete()
  with pytest.warns(RuntimeWarning, match="1 pushes could not be read from the device"):
    recorder.close()
  assert clipjax.runs.read_run(path).steps.tolist() == [2]


def test_a_series_that_is_longer_than_what_is_remembered_goes_back(path, monkeypatch):
  from clipjax.runs.record import rows  # noqa: PLC0415

  monkeypatch.setattr(rows, "_REMEMBERED", 5)
  with clipjax.runs.Recorder(path) as recorder:
    for step in [*range(20), *range(3, 6)]:
      recorder.push(step, None, loss=float(step))
  assert clipjax.runs.read_run(path).steps.tolist() == [*range(6)]
