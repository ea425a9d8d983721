"""Recorder: interrupts, threads, the end of the process and files that change; no row is lost."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from recording import message_of, recorded, warnings_of

import clipjax
from clipjax.runs.record import at_exit, rows, run_file
from clipjax.runs.record import recorder as recorder_module

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def interrupts():
  """SIGINT raises KeyboardInterrupt here, also where the tests were started in the background, which ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of an interrupt in a finalizer.
def test_twenty_interrupts_and_no_row_lost(path):
  is_armed, seen, done, losses = [False], 0, 0, [jnp.float32(step) for step in range(2000)]

  def interrupt(*_):
    if is_armed[0]:
      is_armed[0] = False
      raise KeyboardInterrupt

  recorder = clipjax.runs.Recorder(path, every=3)
  recorder.push(0, None, loss=losses[0])  # Its program is compiled.
  before = signal.signal(signal.SIGALRM, interrupt)
  signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
  while done < 1999 or seen < 20:
    try:
      while done < 1999 or seen < 20:
        is_armed[0] = seen < 20  # Again: an interrupt during a finalizer is dropped.
        step = min(done + 1, 1999)
        recorder.push(step, None, loss=losses[step])
        done = step
    except KeyboardInterrupt:  # The push may or may not have been cut short: repeat it.
      seen += 1
  signal.setitimer(signal.ITIMER_REAL, 0)
  signal.signal(signal.SIGALRM, before)
  recorder.close()
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

  def work(i):
    for k in range(250):
      step = 250 * i + k if order == "apart" else 4 * k + i
      recorder.push(step, state if order == "apart" else None, loss=jnp.float32(step))

  with clipjax.runs.Recorder(path, every=7) as recorder, ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(4)))
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == run["loss"].tolist() == [*range(1000)]


def test_pushes_while_another_thread_closes_are_kept_or_refused(path):
  for trial in range(5):
    name, kept, told = path.with_name(f"{trial}.jsonl"), [], []
    recorder = clipjax.runs.Recorder(name, every=3)

    def work(i):
      for step in range(i, 100_000, 4):
        try:
          recorder.push(step, None, loss=float(step))  # noqa: B023
        except ValueError as error:
          told.append(str(error))  # noqa: B023
          return
        kept.append(step)  # noqa: B023

    with ThreadPoolExecutor(4) as pool:
      pool.map(work, range(4))
      time.sleep(0.02)
      recorder.close()
    assert len(told) == 4 and all(text.startswith("`push` must be called before `close`, got ") for text in told)
    assert clipjax.runs.read_run(name).steps.tolist() == sorted(kept)


# The end of the process -----------------------------------------------------------------------------------------------


PUSHED = """
from clipjax.runs.record import at_exit
at_exit._PATIENCE = 0.2
def slow(step, values):
  time.sleep(5)
recorder = clipjax.runs.Recorder(path, every=10, writers=[slow] if {slow} else [])
for step in range(120):
  recorder.push(step, None, loss=jnp.float32(step))
{end}
"""
KILL = "os.kill(os.getpid(), signal.{}); time.sleep(60)"
ENDS = {  # How the process ends, whether beside a slow logger, its status.
  "its last line": ("", False, 0),
  "an exception": ("raise KeyError('batch')", False, 1),
  "SIGTERM": (KILL.format("SIGTERM"), False, -signal.SIGTERM),
  "SIGTERM, beside a slow logger": (KILL.format("SIGTERM"), True, -signal.SIGTERM),
  "SIGKILL": (KILL.format("SIGKILL"), False, -signal.SIGKILL),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_process_that_ends_without_close_has_written_all_but_what_a_kill_cuts_off(case, path):
  end, slow, status = ENDS[case]
  start = time.monotonic()
  said = program(PUSHED.format(end=end, slow=slow), path, expect=status)
  losses = clipjax.runs.read_run(path)["loss"].tolist()
  assert losses == [*range(len(losses))] and (100 if case == "SIGKILL" else 120) <= len(losses) <= 120
  assert time.monotonic() - start < 30 and ("KeyError: 'batch'" in said) == (status == 1) and (said == "" or end)


def test_sigterm_is_ours_while_a_recorder_is_open_and_nobody_else_takes_it(path):
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
  seen = []
  signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(0, None, loss=1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
  assert seen == [1]
  """
  assert program(code, path, expect=0) == ""


def test_a_recorder_that_nobody_holds_is_closed(path):
  clipjax.runs.Recorder(path).push(1, None, loss=2.0)
  assert clipjax.runs.read_run(path)["loss"].tolist() == [2.0]


def test_a_child_that_was_forked_neither_writes_nor_waits_nor_keeps_the_path(path):
  code = """
  import warnings
  warnings.simplefilter("ignore")
  recorder = clipjax.runs.Recorder(path)
  recorder.push(0, None, loss=1.0)
  if not os.fork():
    try:
      recorder.push(1, None, loss=3.0)
    except ValueError as error:
      assert str(error).endswith("got a fork of it: make one there, with another path.")
      recorder.flush()
      recorder.close()
      os._exit(0)
  assert os.wait()[1] == 0
  recorder.push(1, None, loss=2.0)
  if not (child := os.fork()):
    time.sleep(60)
    os._exit(0)
  recorder.close()
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(2, None, loss=3.0)
  os.kill(child, signal.SIGKILL)
  """
  program(code, path, expect=0)
  lines = path.read_text().splitlines()
  assert [line[:9] for line in lines if "clipjax_run" not in line] == ['{"step": '] * 3
  assert clipjax.runs.read_run(path)["loss"].tolist() == [1, 2, 3]


# The file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_removed", [False, True])
def test_the_older_recorder_of_a_path_in_this_process_is_closed(path, is_removed):
  first, made = clipjax.runs.Recorder(path), []
  first.push(1, None, loss=1.0)
  if is_removed:
    path.unlink()
  assert warnings_of(lambda: made.append(clipjax.runs.Recorder(path))) == [
    f"{str(path)!r} was open in another Recorder of this process, which is now closed: close a Recorder, preferably "
    "with `with`, before you make another for its path."
  ]
  assert "`push` must be called on the newest Recorder of a path" in message_of(
    ValueError, first.push, 2, None, loss=2.0
  )
  first.flush()
  first.close()
  made[0].push(2, None, loss=2.0)
  made[0].close()
  assert clipjax.runs.read_run(path)["loss"].tolist() == [1, 2]


def test_a_path_that_another_process_records_to_is_refused(path):
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(1, None, loss=1.0)
    said = program("clipjax.runs.Recorder(path)", path, expect=1)
  assert said.splitlines()[-1] == (
    f"ValueError: `path` must be a file that no other process records to, got {str(path)!r}, which another process "
    "has open: name a file for each process."
  )
  program("clipjax.runs.Recorder(path).push(2, None, loss=2.0)", path, expect=0)
  assert len(clipjax.runs.read_run(path)) == 2


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_anything_but_a_regular_file_is_refused_at_once(tmp_path, kind):
  path = Path("/dev/null") if kind == "device" else tmp_path / "x"
  with socket.socket(socket.AF_UNIX) as server:
    if kind == "fifo":
      os.mkfifo(path)
    elif kind == "socket":
      server.bind(str(path))
    assert message_of(ValueError, clipjax.runs.Recorder, path) == (
      f"`path` must be a new file or one that a Recorder wrote, got {str(path)!r}, which is not a regular file: name a "
      "file on a disk."
    )


@pytest.mark.parametrize("other", ["another run", "moved", "notes"])
def test_a_path_that_leads_to_another_file_meanwhile(path, other):
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


def test_a_file_system_without_locks_is_accepted(path, monkeypatch):
  def no_locks(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(run_file.fcntl, "flock", no_locks)
  recorded(path, [(1, None, {"loss": 1.0})])
  monkeypatch.setattr(run_file, "fcntl", None)
  assert len(recorded(path, [(2, None, {"loss": 1.0})])) == 2


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


def test_rows_that_were_never_written_are_reported_at_the_end(path):
  recorder = clipjax.runs.Recorder(path, every=1)
  recorder.push(1, None, loss=1.0)
  recorder.flush()
  path.unlink()
  path.mkdir()
  said = warnings_of(lambda: [recorder.push(2, None, loss=1.0), recorder.push(3, None, loss=1.0), recorder.close()])
  assert said[-1] == f"2 rows were never written to {str(path)!r}: they are lost."


@pytest.mark.parametrize("fails", [False, True])
def test_what_on_finding_raises_comes_out_of_with_and_is_a_note_of_an_error_in_the_loop(path, fails):
  def stop(finding):
    raise RuntimeError(finding.name)

  def loop():
    with clipjax.runs.Recorder(path, on_finding=stop) as recorder:
      recorder.push(1, None, loss=float("nan"))
      if fails:
        raise KeyError("batch")

  with pytest.raises(KeyError if fails else RuntimeError, match="batch" if fails else "nonfinite-loss") as error:
    loop()
  assert getattr(error.value, "__notes__", []) == ["Closing the Recorder raised RuntimeError: nonfinite-loss"] * fails
  assert len(clipjax.runs.read_run(path)) == 1


def test_sigterm_closes_every_open_recorder_and_ends_the_process(path, monkeypatch, capsys):
  class Broken:
    path, identity = "x", None

    def close(self, patience):
      raise OSError("gone")

  ended, broken = [], Broken()
  monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number)))
  before = signal.getsignal(signal.SIGTERM)
  recorder = clipjax.runs.Recorder(path)
  at_exit._OPEN.add(broken)
  recorder.push(1, None, loss=2.0)
  at_exit._on_sigterm(signal.SIGTERM, None)
  at_exit._OPEN.discard(broken)
  signal.signal(signal.SIGTERM, before)
  recorder.close()
  assert ended == [(os.getpid(), signal.SIGTERM)] and clipjax.runs.read_run(path)["loss"].tolist() == [2]
  assert capsys.readouterr().err == "clipjax: gone\n"
  with pytest.raises(ValueError, match="`push` must be called before `close`"):
    recorder.push(2, None)


def test_how_we_know_whether_sigterm_is_free(monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  assert at_exit._is_sigterm_free()
  monkeypatch.setattr(Path, "read_text", lambda self: "Name: x\nSigCgt:\t0000000000004000\n")
  assert not at_exit._is_sigterm_free()  # Python does not see handlers that JAX sets in C++.
  monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
  assert at_exit._is_sigterm_free()
  signal.signal(signal.SIGTERM, lambda *_: None)
  assert not at_exit._is_sigterm_free()
  signal.signal(signal.SIGTERM, before)


def test_a_forked_child_forgets_the_recorders_and_the_signal(path):
  recorder = clipjax.runs.Recorder(path)
  at_exit._forget()
  assert at_exit.open_at(str(path)) is None and not at_exit._IS_OURS.is_set()
  recorder.close()


def test_a_push_that_comes_after_the_thread_has_ended_is_refused(path):
  recorder = clipjax.runs.Recorder(path)
  recorder.push(1, None, loss=1.0)
  pipeline = recorder._pipeline
  pipeline._request(pipeline._finish)  # Like a `close` in another thread that has not returned yet.
  with pytest.raises(ValueError, match="got a push while another thread closed the Recorder"):
    recorder.push(2, None, loss=2.0)
  recorder.flush()
  recorder.close()
  assert clipjax.runs.read_run(path).steps.tolist() == [1]


def test_a_recorder_collected_in_another_thread_is_closed_by_a_third(path):
  recorder = clipjax.runs.Recorder(path)
  recorder.push(1, None, loss=1.0)
  with ThreadPoolExecutor(1) as pool:
    pool.submit(recorder_module._end, recorder._pipeline, recorder._notes)
  deadline = time.monotonic() + 20
  while not recorder._pipeline.is_closed:
    assert time.monotonic() < deadline
  assert clipjax.runs.read_run(path).steps.tolist() == [1]
  recorder.close()


def test_a_series_longer_than_the_memory_of_steps_goes_back(path, monkeypatch):
  monkeypatch.setattr(rows, "_REMEMBERED", 5)
  run = recorded(path, [(step, None, {"loss": float(step)}) for step in [*range(20), *range(3, 6)]])
  assert run.steps.tolist() == [*range(6)]
