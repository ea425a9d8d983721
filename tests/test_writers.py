"""Writers: what each kind of logger gets and in what order, and what happens when one fails or is slow."""

import contextvars
import csv
import datetime
import functools
import io
import logging
import math
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from recording import LOGGING, message_of

import clipjax
from clipjax.runs.loggers import writers
from clipjax.runs.loggers.keys import MlflowKeys, Namespaces
from clipjax.runs.loggers.writers import Writers

LEAVES = {"grad": ("w", "blocks/v[0]")}
RULE = (
  "`writers` must each be a logger that clipjax knows, a function (step, values), or a pair of one and 'leaves', got "
)


def row_of(step, **values):
  return {"step": step, "time": 1000.0 + step, "loss": 0.5, **values}


def collected(sent):
  return lambda step, values: sent.append((step, values))


def queued(targets, count, warn=print):
  """The writers of some targets, with as many rows handed on."""
  every = Writers(targets, warn)
  for step in range(count):
    every.hand_on(row_of(step), LEAVES)
  return every


def given(target, rows, leaves=LEAVES):
  """Hands rows to a target; returns the warnings."""
  said = []
  every = Writers([target], said.append)
  for row in rows:
    every.hand_on(row, leaves)
  every.close()
  return said


# What a row is -------------------------------------------------------------------------------------------------------


def test_every_row_comes_once_and_in_order():
  sent = []
  assert given(collected(sent), [row_of(step) for step in range(1000)]) == []
  assert sent == [(step, {"loss": 0.5}) for step in range(1000)]


def test_only_numbers_are_handed_on_and_nonfinite_ones_as_floats():
  sent = []
  flags = {"loss": "nan", "a": "inf", "b": "-inf"}
  row = row_of(3, update=2, batch="x", weights=[1], loss=None, a=None, b=None, nonfinite=flags)
  given(collected(sent), [row])
  ((step, values),) = sent
  assert step == 3 and math.isnan(values.pop("loss"))
  assert values == {"update": 2, "a": math.inf, "b": -math.inf}


@pytest.mark.parametrize("asks", [False, True])
def test_numbers_by_leaf_go_to_those_that_ask_for_them(asks):
  sent, row = [], row_of(1, leaf={"grad/norm": np.array([0.25, np.inf], np.float32)})
  assert given((collected(sent), "leaves") if asks else collected(sent), [row]) == []
  assert sent == [(1, {"loss": 0.5} | ({"grad/norm/w": 0.25, "grad/norm/blocks/v[0]": math.inf} if asks else {}))]


def test_a_row_without_numbers_is_left_out():
  sent = []
  given(collected(sent), [{"step": 1, "weights": [1]}, row_of(2)])
  assert [step for step, _ in sent] == [2]


def test_the_recorder_hands_on_its_rows(tmp_path):
  sent, path = [], tmp_path / "run.jsonl"
  with clipjax.runs.Recorder(path, every=2, writers=[collected(sent)]) as recorder:
    for step in range(5):
      recorder.push(step, None, loss=jnp.float32(-jnp.inf) if step == 1 else float(step))
  assert sent == [(step, {"loss": -math.inf if step == 1 else step}) for step in range(5)]


# What each kind is called with ----------------------------------------------------------------------------------------


class Scalars:
  def __init__(self):
    self.calls = []

  def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
    self.calls.append((tag, scalar_value, global_step, walltime))

  def flush(self):
    self.calls.append("flush")


def test_tensorboard_is_given_the_time_of_the_push():
  target = Scalars()
  given(target, [row_of(1, a=2), {"step": 2, "a": 3}])
  assert target.calls == [("loss", 0.5, 1, 1001.0), ("a", 2, 1, 1001.0), ("a", 3, 2, None), "flush"]


def taking(method, function):
  """An object with one method of this signature, and the list of what that makes of each call."""
  calls = []

  @functools.wraps(function)  # Signatures are inspected.
  def called(*args, **options):
    calls.append(function(*args, **options))

  return types.SimpleNamespace(**{method: called}), calls


ROW = {"step": 1, "time": 1001.0, "loss": 0.5, "grad/norm": 7, "a": math.inf}
FINITE, ALL = {"loss": 0.5, "grad/norm": 7}, {"loss": 0.5, "grad/norm": 7, "a": math.inf}
TIME = datetime.datetime(1970, 1, 1, 0, 16, 41, tzinfo=datetime.UTC)
# For each kind of logger: its method, what that returns for a call, and the expected results for the row.
TAKERS = {
  "tensorboard without times": ("add_scalar", lambda tag, x, step: (tag, x, step), [(k, x, 1) for k, x in ALL.items()]),
  "tensorboard, wrapped": (
    "add_scalar", lambda *args, **options: (*args, options), [(k, x, 1, {"walltime": 1001.0}) for k, x in ALL.items()],
  ),
  "clu": ("write_scalars", lambda step, scalars: (step, scalars), [(1, ALL)]),
  "log and step": ("log", lambda metrics, step=None: (step, metrics), [(1, ALL)]),
  "lightning": ("log_metrics", lambda metrics, step: (step, metrics), [(1, ALL)]),
  "neptune_scale": ("log_metrics", lambda data, step, *, timestamp: (step, data, timestamp), [(1, FINITE, TIME)]),
  "aim": ("track", lambda value, name, step: (repr(value), name), [(repr(float(x)), k) for k, x in ALL.items()]),
  "clearml": (
    "report_scalar", lambda title, series, value, iteration: (title, series, value, iteration),
    [("loss", "loss", 0.5, 1), ("grad", "norm", 7, 1)],
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKERS)
def test_each_kind_of_logger_is_given_a_row_in_its_own_way(case):
  method, function, want = TAKERS[case]
  target, calls = taking(method, function)
  assert given(target, [ROW]) == [] and calls == want


def test_neptune_scale_is_given_no_time_where_there_is_none():
  target, calls = taking("log_metrics", lambda data, step, *, timestamp: (step, data, timestamp))
  given(target, [{"step": 2, "a": 1.0}])
  assert calls == [(2, {"a": 1.0}, None)]


def test_trackio_is_called_in_the_context_of_the_caller():
  current, calls = contextvars.ContextVar("run", default=None), []
  trackio = types.ModuleType("trackio")
  trackio.context_vars = types.SimpleNamespace(current_run=current)
  trackio.log = lambda metrics, step=None: calls.append((current.get(), step, metrics))
  text = "`writers` must have trackio with a run, got none: call `trackio.init` before making the Recorder"
  assert text in message_of(ValueError, Writers, [trackio], print)
  token = current.set("mine")
  given(trackio, [row_of(1)])
  current.reset(token)
  assert calls == [("mine", 1, {"loss": 0.5})]


def test_comet_keeps_the_step_of_the_user():
  def log_metrics(dic, prefix=None, step=None, epoch=None):
    target.curr_step = step
    return step, dic

  target, calls = taking("log_metrics", log_metrics)
  target.curr_step = 40
  given(target, [row_of(1)])
  assert calls == [(1, {"loss": 0.5})] and target.curr_step == 40


class Neptune:
  """Refuses a key that is a folder too, as neptune does."""

  def __init__(self):
    self.calls = []

  def __getitem__(self, key):
    assert not any(key.startswith(f"{other}/") or other.startswith(f"{key}/") for other, *_ in self.calls)
    return types.SimpleNamespace(append=lambda value, step, timestamp: self.calls.append((key, step, value, timestamp)))

  assign = sync = print


def test_neptune_has_no_number_that_is_a_folder():
  target, row = Neptune(), row_of(1, **{"grad/norm": 2.0}, leaf={"grad/norm": np.array([3.0, np.inf])})
  assert given((target, "leaves"), [row, row_of(2, loss=math.nan)]) == []
  want = {"loss": 0.5, "grad/norm": 2.0, "grad/norm.w": 3.0}
  assert target.calls == [(key, 1, value, 1001.0) for key, value in want.items()]


def mlflow_module(active, batches):
  module = types.ModuleType("mlflow")
  module.active_run = lambda: active
  module.entities = types.SimpleNamespace(Metric=lambda *args: args)
  client = types.SimpleNamespace(log_batch=lambda run_id, metrics: batches.append((run_id, metrics)))
  module.MlflowClient = lambda: client
  return module


def run_of_mlflow():
  return types.SimpleNamespace(info=types.SimpleNamespace(run_id="id"))


def test_mlflow_is_given_many_rows_at_once_for_the_run_that_was_active(monkeypatch):
  batches, run = [], run_of_mlflow()
  module = mlflow_module(run, batches)
  monkeypatch.setitem(sys.modules, "mlflow", module)
  for target in (module, run):
    batches.clear()
    given(target, [row_of(step) for step in range(100)])
    assert [entry for _, metrics in batches for entry in metrics] == [
      ("loss", 0.5, 1000 * (1000 + step), step) for step in range(100)
    ]
    assert {run_id for run_id, _ in batches} == {"id"} and len(batches) < 100


def test_mlflow_is_given_no_more_than_it_takes_in_one_request():
  batches, names = [], tuple(f"w[{i}]" for i in range(2500))
  row = {"step": 1, "leaf": {"grad/norm": np.ones(2500)}}
  before = time.time()
  given((mlflow_module(run_of_mlflow(), batches), "leaves"), [row], {"grad": names})
  assert [len(metrics) for _, metrics in batches] == [1000, 1000, 500]
  key, _, stamp, _ = batches[0][1][7]
  assert key == "grad/norm/w.7" and 1000 * before - 1 <= stamp <= 1000 * time.time() + 1


def test_keys_of_mlflow():
  keys = MlflowKeys()
  assert keys("grad/norm") == "grad/norm" and keys("grad/norm/blocks/w[3]") == "grad/norm.blocks/w.3"
  assert keys("grad/norm/blocks/w.3") == "grad/norm.blocks/w.3_2"  # No two keys become one.
  assert keys("grad/norm/blocks/w[3]") == "grad/norm.blocks/w.3"
  assert [keys(key) for key in ("a//b", "/x", "a/../c", "k['s']")] == ["a/b", "x", "a/_/c", "k_'s'_".replace("'", "_")]
  assert len(keys("y" * 400)) == 250 and len(keys("y" * 401)) <= 250


def test_a_folder_that_becomes_a_number():
  keys = Namespaces()
  assert keys("clip/norm/a") == "clip/norm/a" and keys("clip/norm") == "clip/norm.all"


# What takes no rows --------------------------------------------------------------------------------------------------


REFUSED = {
  "a logger of logging": (
    lambda: logging.getLogger("x"), 'a Logger: pass `lambda step, values: logger.info("%d %s", step, values)`.',
  ),
  "the module logging": (
    lambda: logging, 'the module logging: pass `lambda step, values: logger.info("%d %s", step, values)`.',
  ),
  "a csv writer": (
    lambda: csv.writer(io.StringIO()),
    "a writer: pass `lambda step, values: writer.writerow([step, values.get('loss'), values.get('grad/norm')])`.",
  ),
  "a client of mlflow": (
    lambda: types.SimpleNamespace(log_batch=print),
    "a SimpleNamespace: pass the module `mlflow` after `mlflow.start_run()`, or what that returned.",
  ),
  "a log of another kind": (
    lambda: taking("log", lambda level, text: None)[0], "a SimpleNamespace: pass a function that forwards the values.",
  ),
  "a class": (lambda: Scalars, "<class 'test_writers.Scalars'>: pass an instance."),
  "a string": (lambda: "runs", "'runs': pass a function that forwards the values."),
  "an object": (object, "an object: pass a function that forwards the values."),
  "another pair": (lambda: (Scalars(), "leafs"), "a tuple: the second of a pair must be 'leaves'."),
  "a pair that is no list": (lambda: "leaves", "'leaves': pass [(logger, 'leaves')]."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_object_that_takes_no_rows_is_a_type_error(case):
  make, text = REFUSED[case]
  assert message_of(TypeError, Writers, [make()], print) == RULE + text


def test_a_function_of_other_arguments_is_a_type_error():
  text = "a function among `writers` must take (step, values), got a function of (row)"
  assert text in message_of(TypeError, Writers, [lambda row: None], print)


def test_a_logger_without_a_run_is_a_value_error():
  wandb = types.ModuleType("wandb")
  wandb.run, wandb.define_metric = None, print
  needs = {"wandb with a run, got none: call `wandb.init`": wandb, "mlflow with a": mlflow_module(None, [])}
  for text, module in needs.items():
    assert f"`writers` must have {text}" in message_of(ValueError, Writers, [module], print)


# Failures, and time ---------------------------------------------------------------------------------------------------


class Failing:
  """Raises at some calls."""

  def __init__(self, fails):
    self._fails, self.count, self.sent = fails, 0, []

  def __call__(self, step, values):
    self.count += 1
    if self._fails(self.count):
      raise ConnectionError("no route")
    self.sent.append(step)


WAITS = (
  "the writer Failing raised ConnectionError: no route; up to 16 MiB of its rows wait for another attempt. "
  "Training and the other outputs continue."
)


def test_a_writer_that_fails_now_and_then_gets_every_row_in_order_and_one_warning():
  target = Failing(lambda count: count in (20, 21, 50))
  assert given(target, [row_of(step) for step in range(300)]) == [WAITS]
  assert target.sent == list(range(300))


def test_a_number_that_was_written_before_an_error_is_not_written_twice():
  calls = []

  def add_scalar(key, value, step):
    calls.append((key, step))
    if len(calls) == 2:
      calls.pop()
      calls.append("failed")
      raise ConnectionError

  said = given(types.SimpleNamespace(add_scalar=add_scalar), [row_of(1, a=1, b=2), row_of(2)])
  assert calls == [("loss", 1), "failed", ("a", 1), ("b", 1), ("loss", 2)] and len(said) == 1


def test_a_writer_that_never_takes_a_row_says_how_many_at_the_end():
  target, said = Failing(lambda count: True), []
  every = queued([target], 30, said.append)
  every.flush()
  assert said == [WAITS]
  every.close()
  every.close()
  assert said == [WAITS, "the writer Failing never took 30 rows: the file has them."]
  every.hand_on(row_of(31), LEAVES)


def test_a_dead_writer_is_tried_less_and_less_often():
  target = Failing(lambda count: True)
  every = Writers([target], lambda text: None)
  until = time.monotonic() + 1.0
  while time.monotonic() < until:
    every.hand_on(row_of(1), LEAVES)
    time.sleep(0.001)
  assert 2 <= target.count <= 6  # After 0.1, 0.2, 0.4 and 0.8 s.
  every.close()


def test_rows_that_wait_are_bounded_and_the_oldest_go(monkeypatch):
  monkeypatch.setattr(writers, "_KEPT_BYTES", 10_000)
  target, gate = Failing(lambda count: False), threading.Event()
  said = []
  every = queued([lambda step, values: (gate.wait(), target(step, values))], 1000, said.append)
  gate.set()
  every.close()
  assert 5 < len(target.sent) < 100 and target.sent[-20:] == list(range(1000))[-20:]
  (text,) = said
  assert f"never took {1000 - len(target.sent)} rows" in text


def test_a_slow_writer_holds_up_nothing_but_itself():
  gate, slow, fast = threading.Event(), [], []
  start = time.monotonic()
  every = queued([lambda step, values: (gate.wait(), slow.append(step)), collected(fast)], 100)
  every.pace(99)
  while len(fast) < 100:
    time.sleep(0.001)
  assert time.monotonic() - start < 5 and not slow
  threading.Timer(0.1, gate.set).start()
  every.flush()
  assert slow == list(range(100))
  every.close()


def test_a_stuck_writer_is_not_waited_for_forever(monkeypatch):
  monkeypatch.setattr(writers, "_PATIENCE", 0.2)
  gate = threading.Event()
  said = given(lambda step, values: gate.wait(), [row_of(1), row_of(2)])
  gate.set()
  assert said == [
    "the writer <lambda> has taken nothing for 0 s: clipjax stops waiting for it.",
    "the writer <lambda> never took 2 rows: the file has them.",
  ]


def test_a_flush_hands_on_all_and_flushes_the_target_each_time():
  target = Scalars()
  every = Writers([target], print)
  for step in (1, 2):
    every.hand_on(row_of(step), LEAVES)
    every.flush()
    assert target.calls[-2:] == [("loss", 0.5, step, 1000.0 + step), "flush"]
  every.flush()
  assert len(target.calls) == 5
  every.close()


def test_a_flush_that_fails_is_a_warning():
  target = types.SimpleNamespace(log=lambda values, step: None, flush=lambda: 1 / 0)
  (text,) = given(target, [row_of(1)])
  assert text.startswith("the writer SimpleNamespace raised ZeroDivisionError")


def test_rows_are_written_where_no_thread_can_start(monkeypatch):
  def start(self):
    raise RuntimeError("can't create new thread at interpreter shutdown")

  monkeypatch.setattr(threading.Thread, "start", start)
  sent = []
  assert given(collected(sent), [row_of(step) for step in range(3)]) == []
  assert [step for step, _ in sent] == [0, 1, 2]


# wandb ---------------------------------------------------------------------------------------------------------------


class Wandb:
  """The steps of a run of wandb: a row a step, a later number replaces, earlier steps are dropped."""

  def __init__(self, start=0):
    self._step, self.open, self.rows, self.dropped, self.axes = start, {}, [], [], []
    self.fails = lambda: False
    feature = types.SimpleNamespace(set_step_log=False)
    self._telemetry_obj = types.SimpleNamespace(feature=feature)

  @property
  def step(self):
    return self._step

  def define_metric(self, name, step_metric=None):
    self.axes.append((name, step_metric))

  def log(self, values, step=None, commit=None):
    if self.fails():
      raise ConnectionError("no route")
    if step is not None:
      self._telemetry_obj.feature.set_step_log = True
      if step < self._step:
        self.dropped.append(values)
        return
      if step > self._step:
        self._close(step)
    assert not (set(self.open) & set(values)), "a number is replaced"
    self.open.update(values)
    if commit or (commit is None and step is None):
      self._close(self._step + 1)

  def _close(self, step):
    self.rows.append((self._step, self.open))
    self._step, self.open = step, {}

  def ours(self):
    return [row["clipjax/step"] for _, row in [*self.rows, (self._step, self.open)] if "clipjax/step" in row]


def trained(run, log=lambda step: None, *, count=300, first=0, late=50, flushes=(), stride=1):
  """Pushes `count` steps; rows come in batches, `late` steps after their push. Returns the warnings."""
  said, queue = [], []
  every = Writers([run], said.append)
  for step in range(first, first + count):
    log(step)
    queue.append(row_of(step))
    if len(queue) == late:
      while queue:
        every.hand_on(queue.pop(0), LEAVES)
    if step % stride == 0:
      every.pace(step)
    if step in flushes:
      every.flush()
  for row in queue:
    every.hand_on(row, LEAVES)
  every.close()
  return said


@pytest.mark.parametrize("flushes", [(), (70, 120, 121, 200)], ids=["", "flushed"])
@pytest.mark.parametrize("way", LOGGING)
def test_wandb_loses_no_row_of_ours_or_the_user(way, flushes):
  run = Wandb()
  trained(run, functools.partial(LOGGING[way], run), flushes=flushes)
  assert run.ours() == list(range(300)) and not run.dropped
  assert run.axes == [("clipjax/step", None), ("clipjax/*", "clipjax/step")]


def test_keys_of_wandb_are_ours_and_have_the_time_of_the_push():
  run = Wandb()
  run.log({"loss": 9}, step=20)
  trained(run, count=1)
  assert (run.step, run.open) == (20, {"loss": 9, "clipjax/loss": 0.5, "clipjax/step": 0, "clipjax/time": 1000.0})


def test_a_run_of_wandb_that_counts_already():
  run = Wandb(start=10000)
  trained(run, count=300, first=10000)
  assert run.ours() == list(range(10000, 10300)) and [step for step, _ in run.rows] == list(range(10000, 10299))


def test_wandb_beside_epochs_is_reported_once_and_costs_the_user_nothing():
  run = Wandb()
  (text,) = trained(run, lambda step: step % 10 or run.log({"loss": step}, step=step // 10), count=2000)
  assert text.startswith("wandb takes one row per step, and `step=` was ")
  assert text.endswith('or give clipjax a run of its own: writers=[wandb.init(reinit="create_new")].')
  assert run.ours() == list(range(2000)) and not run.dropped


def test_wandb_beside_epochs_that_begin_after_our_rows():
  run = Wandb()
  said = trained(run, lambda step: step % 100 == 99 and run.log({"epoch": step}, step=step // 100))
  assert len(said) == 1 and said[0].startswith("wandb takes one row per step, and your `step=` is not above ")
  assert run.ours() == list(range(300)) and len(run.dropped) == 3


def test_a_push_hands_on_one_row_and_one_of_many_steps_as_many():
  run, counts = Wandb(), []
  every = queued([run], 300)
  for step in (0, 1, 2, 12, None, 12, 1000):
    every.pace(step)
    counts.append(len(run.ours()))
  assert np.diff([0, *counts]).tolist() == [1, 1, 1, 10, 1, 1, 100]
  every.close()
  assert run.ours() == list(range(300))


def test_wandb_that_fails_is_tried_again():
  run = Wandb()
  run.fails = iter([False] * 8 + [True] * 3 + [False] * 10**4).__next__
  (text,) = trained(run, count=100, late=1)
  assert text.startswith("the writer wandb raised ConnectionError: no route") and run.ours() == list(range(100))


def test_wandb_that_is_finished_is_not_asked_for_its_step():
  class Finished(Wandb):
    _is_finished = True

    @property
    def step(self):
      raise AssertionError

  said = trained(Finished(), count=3, late=1)
  assert "RuntimeError: the run is finished" in said[0]
  assert said[1] == "the writer wandb never took 3 rows: the file has them."


def test_the_module_wandb_stands_for_its_run():
  wandb, run = types.ModuleType("wandb"), Wandb()
  wandb.run, wandb.define_metric = run, print
  trained(wandb, count=3)
  assert run.ours() == [0, 1, 2]


def test_two_threads_that_push_hand_on_each_row_once():
  run = Wandb()
  every = queued([run], 500)
  with ThreadPoolExecutor(2) as pool:
    pool.map(lambda _: [every.pace(None) for _ in range(200)], range(2))
  every.close()
  assert run.ours() == list(range(500))
