"""Recorder: every number against what `metrics` says, and what happens when anything around it goes wrong."""

import json
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import clipjax
from clipjax.runs.record import run_file

ROOT = Path(__file__).parent.parent
PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Adam and the wrappers of Optax need it.


@pytest.fixture
def path(tmp_path):
  return tmp_path / "run.jsonl"


def watched(history=0):
  return optax.chain(clipjax.watch(history=history), clipjax.clip_by_global_norm(6.5), optax.adam(1e-3))


def grads_of(step):
  return jax.tree.map(lambda x: x * step, PARAMS)


def train(tx, steps, state=None, first=1):
  """The states after each step, of gradients whose norm is 13 times the number of the step."""
  state = tx.init(PARAMS) if state is None else state
  update = jax.jit(tx.update)
  for step in range(first, first + steps):
    _, state = update(grads_of(step), state, PARAMS)
    yield step, state


def record(path, tx, steps, **options):
  with clipjax.runs.Recorder(path, **options) as recorder:
    for step, state in train(tx, steps):
      recorder.push(step, state, loss=jnp.float32(1 / step))
  return clipjax.runs.read_run(path)


def rows_of(path):
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return [line for line in lines if "clipjax_run" not in line]


def message_of(kind, call, *args, **options):
  with pytest.raises(kind) as error:
    call(*args, **options)
  return str(error.value)


def warnings_of(call):
  with pytest.warns(RuntimeWarning) as caught:
    call()
  return [str(warning.message) for warning in caught]


def near(value):
  return pytest.approx(value, rel=1e-6)


# What is recorded ---------------------------------------------------------------------------------------------------


def test_every_metric_of_every_step_is_what_metrics_says(path, x64):
  tx = watched()
  with clipjax.runs.Recorder(path, every=4) as recorder:
    want = []
    for step, state in train(tx, 11):
      recorder.push(step, state, loss=jnp.sqrt(jnp.float32(step)), rate=0.1)
      want.append({**clipjax.metrics(state), "loss": jnp.sqrt(jnp.float32(step)), "rate": 0.1})
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal(run.steps, np.arange(1, 12))
  assert set(run.columns) == {*want[0], "time", "update"} and run["update"].tolist() == list(range(1, 12))
  for key, value in want[0].items():
    dtype = np.asarray(value).dtype
    assert (dtype == np.float64) == (key == "rate" or (x64 and dtype.kind == "f" and key != "loss"))
    np.testing.assert_array_equal(run[key].astype(dtype), [row[key] for row in want], err_msg=key)
  assert np.all(np.diff(run["time"]) >= 0) and abs(run["time"][-1] - time.time()) < 60


def test_counters_and_integers_survive_exactly(path):
  big = 2**24 + 1
  tx = watched()
  state = tx.init(PARAMS)
  state = (state[0]._replace(steps=jnp.int32(big - 1)), *state[1:])
  (_, state), *_ = train(tx, 1, state)
  scalars = {
    "int": jnp.int32(-big), "uint": jnp.uint32(2**32 - 1), "half": jnp.bfloat16(0.1), "flag": jnp.array(True),
    "python": 2**53 - 1, "numpy": np.float32(0.1), "array": np.array(big), "bool": False,
  }  # fmt: skip
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(0, state, **scalars)
  (row,) = rows_of(path)
  assert row["step"] == 0 and row["update"] == big and row["grad/steps"] == big
  want = {"int": -big, "uint": 2**32 - 1, "flag": 1, "python": 2**53 - 1, "array": big, "bool": 0}
  assert {key: row[key] for key in want} == want
  assert np.float32(row["half"]) == jnp.float32(jnp.bfloat16(0.1)) and np.float32(row["numpy"]) == np.float32(0.1)


def test_long_integers_under_x64(path):
  with jax.enable_x64(True), clipjax.runs.Recorder(path) as recorder:
    recorder.push(3, None, tokens=jnp.int64(2**40 + 1), loss=jnp.float64(0.1), below=jnp.int64(-(2**40)))
  (row,) = rows_of(path)
  assert (row["tokens"], row["loss"], row["below"]) == (2**40 + 1, 0.1, -(2**40))


def test_not_finite_is_null_with_a_flag(path):
  tx = watched()
  with clipjax.runs.Recorder(path) as recorder:
    _, state = tx.update(grads_of(jnp.nan), tx.init(PARAMS), PARAMS)
    recorder.push(1, state, loss=jnp.float32(jnp.inf), other=-jnp.inf, fine=1.0)
  (row,) = rows_of(path)
  want = {"grad/norm": "nan", "loss": "inf", "other": "-inf"}
  assert {key: row["nonfinite"][key] for key in want} == want
  assert all(row[key] is None for key in row["nonfinite"]) and row["fine"] == 1
  assert row["leaf"]["grad/norm"] == [None, None] and row["leaf"]["grad/nonfinite"] == [1, 2]
  run = clipjax.runs.read_run(path)
  assert np.isnan(run["loss"]).all() and run.flags["loss"].tolist() == [True] and "fine" not in run.flags


def test_header(path):
  with clipjax.runs.Recorder(path, every=7) as recorder:
    for step, state in train(watched(), 1):
      recorder.push(step, state, params=PARAMS)
  header = json.loads(path.read_text().splitlines()[0])
  assert abs(header.pop("started") - time.time()) < 60
  assert header == {
    "clipjax_run": 2, "version": clipjax.__version__, "leaves": {"grad": ["b", "w"]}, "parameters": 3, "every": 7,
    "optimizer": ["ScaleByAdamState"],
  }  # fmt: skip


@pytest.mark.parametrize(
  ("optimizer", "states"),
  [
    (optax.sgd(0.1), ()),
    (optax.sgd(0.1, momentum=0.9), ("TraceState",)),
    (optax.adamw(optax.constant_schedule(1e-3)), ("ScaleByAdamState", "ScaleByScheduleState")),
    (optax.masked(optax.lion(1e-3), {"w": True, "b": False}), ("ScaleByLionState",)),
    (optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}), None),
    (clipjax.skip_steps(optax.adam(0.1)), ("ScaleByAdamState",)),
  ],
)
def test_the_classes_of_the_optimizer_are_in_the_record(path, optimizer, states):
  tx = optax.chain(clipjax.zclip(), optimizer)
  found = record(path, tx, 2).optimizer
  assert found == states or (states is None and "ScaleByAdamState" in found)
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(3, optax.chain(clipjax.watch(name="d"), optax.rmsprop(0.1)).init(PARAMS))
  assert clipjax.runs.read_run(path).optimizer[-1] == "ScaleByRmsState"  # Of the last header that says any.


@pytest.mark.parametrize("value", ['"adam"', "[1]", "3"])
def test_a_header_with_another_kind_of_optimizer_is_refused(path, value):
  path.write_text(f'{{"clipjax_run": 2, "optimizer": {value}}}\n{{"step": 1, "loss": 2.0}}\n')
  with pytest.raises(ValueError, match="rows of another kind"):
    clipjax.runs.read_run(path)


def test_numbers_by_leaf_once_in_every_pushes(path):
  run = record(path, optax.chain(clipjax.watch(), optax.sgd(1.0)), 1, every=3)
  steps, norms = run.vectors["grad/norm"]
  assert steps.tolist() == [1]
  np.testing.assert_array_equal(norms, [[12, 5]])
  assert set(run.vectors) == {f"grad/{key}" for key in ("norm", "ratio", "nonfinite", "worst_norm")}
  path.unlink()
  tx = clipjax.clip_by_leaf_norm(6.0)
  run = record(path, tx, 8, every=3)
  assert run.vectors["grad/scale"][0].tolist() == [1, 4, 7]
  np.testing.assert_allclose(run["grad/scale/b"], [0.5, np.nan, np.nan, 0.125, *[np.nan] * 2, 0.5 / 7, np.nan])


def norms_pushed(path, norms, every):
  """The steps at which numbers by leaf were written, for gradients of the given norms."""
  tx = clipjax.watch()
  state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
  with clipjax.runs.Recorder(path, every=every) as recorder:
    for step, norm in enumerate(norms, 1):
      _, state = update(jnp.array([norm, 0.0]), state)
      recorder.push(step, state)
  return clipjax.runs.read_run(path).vectors["grad/norm"][0].tolist()


def test_numbers_by_leaf_at_a_worst_step_that_is_a_tenth_above(path):
  assert norms_pushed(path, [1, 0.5, 1.05, 1.11, 1.2, 3, 2, 3], every=100) == [1, 4, 6]


def test_numbers_by_leaf_where_not_finite_and_not_for_ever(path):
  nan = float("nan")
  assert norms_pushed(path, [1, 1, nan, 1, nan, nan, nan, nan, nan, nan, 1, nan], every=4) == [1, 3, 5, 6, 7, 8, 9, 12]


def test_leaves_of_a_group_clip_beside_a_watch(path):
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_group_norm({"x": 6.0, "y": 2.5}, {"b": "x", "w": "y"}))
  run = record(path, tx, 2)
  assert run.leaves == {"grad": ("b", "w"), "grad_group": ("x", "y")}
  assert run["grad/scale/x"].tolist() == [0.5, 0.25] and run["grad_group/scale/y"][0] == 0.5
  assert run["grad/norm/b"][0] == 12 and run["grad/norm/x"].tolist() == [12, 24]


# Steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 50])
def test_multi_steps_is_a_row_for_each_update(path, every):
  steps = optax.MultiSteps(watched(), 3)
  sent = []
  with clipjax.runs.Recorder(path, every=every, writers=[Collector(sent)]) as recorder:
    for micro, state in train(steps, 11):
      recorder.push(100 + micro, state, loss=jnp.float32(100 if micro == 4 else micro), tokens=7, batch=f"part {micro}")
      if micro == 5:
        recorder.flush()  # Of an update that has not landed nothing is written.
        assert [row["step"] for row in rows_of(path)] == [103]
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal(run.steps, [103, 106, 109, 111])  # The last one has not landed.
  np.testing.assert_array_equal(run["update"], [1, 2, 3, np.nan])
  np.testing.assert_allclose(run["loss"], [2, 37, 8, 10.5])
  np.testing.assert_array_equal(run["tokens"], [21, 21, 21, 14])
  np.testing.assert_allclose(run["grad/norm"], [26, 65, 104, np.nan])  # Of the mean gradient of three.
  assert [step for step, _ in sent] == [103, 106, 109, 111] and sent[1][1]["loss"] == 37
  assert rows_of(path)[1]["batch"] == ["part 4", "part 5", "part 6"]


def test_a_recording_that_begins_within_an_update_waits_for_it(path):
  states = dict(train(optax.MultiSteps(watched(), 3), 9))
  with clipjax.runs.Recorder(path) as recorder:
    for micro in (5, 6, 7, 8, 9):
      recorder.push(micro, states[micro], loss=float(micro))
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [6, 9] and run["loss"].tolist() == [5.5, 8] and run["update"].tolist() == [2, 3]


def test_around_multi_steps_every_micro_batch_is_a_row(path):
  tx = clipjax.skip_steps(optax.MultiSteps(watched(), 2))
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  with clipjax.runs.Recorder(path) as recorder:
    for step, size in enumerate([1.0, 1.0, jnp.nan, 2.0, 2.0], 1):
      _, state = update(grads_of(size), state, PARAMS)
      recorder.push(step, state, loss=float(step))
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal(run["skip/norm"], [13, 13, np.nan, 26, 26])
  np.testing.assert_array_equal(run["grad/norm"], [np.nan, 13, np.nan, np.nan, 26])
  assert run["loss"].tolist() == [1, 2, 3, 4, 5]


def test_a_rejected_step_is_a_row_without_the_numbers_of_the_step_before(path):
  tx = clipjax.skip_steps(watched(), norm_rule=30.0)
  run = record(path, tx, 5, every=1)  # Norms 13, 26, 39, 52, 65.
  np.testing.assert_array_equal(run.steps, [1, 2, 3, 4, 5])
  np.testing.assert_allclose(run["skip/norm"], [13, 26, 39, 52, 65])
  np.testing.assert_array_equal(run["grad/steps"], [1, 2, 2, 2, 2])
  np.testing.assert_array_equal(run["skip/consecutive"], [0, 0, 1, 2, 3])
  for key in ("grad/norm", "grad/scale", "grad/ratio", "grad/zero_fraction", "grad/max_norm"):
    assert np.isfinite(run[key]).tolist() == [True, True, False, False, False], key
  assert run["grad/clip_fraction"].tolist() == [1] * 5
  assert run.vectors["grad/norm"][0].tolist() == [1, 2]


def test_a_step_that_apply_if_finite_rejects_has_no_norm_of_another(path):
  tx = optax.apply_if_finite(watched(), 5)
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  with clipjax.runs.Recorder(path, every=1) as recorder:
    for step, size in enumerate([1.0, jnp.nan, 2.0], 1):
      _, state = update(grads_of(size), state, PARAMS)
      recorder.push(step, state)
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal(run["grad/norm"], [13, np.nan, 26])
  assert run.vectors["grad/norm"][0].tolist() == [1, 3] and not run.flags


def test_without_a_state_of_clipjax(path):
  tx = optax.adam(1e-3)
  run = record(path, tx, 3)
  np.testing.assert_array_equal(run.steps, [1, 2, 3])
  assert set(run.columns) == {"time", "loss"}


def test_steps_are_those_of_the_caller(path):
  with clipjax.runs.Recorder(path) as recorder:
    for step, state in train(watched(), 3):
      recorder.push(249 + step if step < 3 else jnp.int32(252), state)
    recorder.push(jnp.int32(257), None, loss=1.0)
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal(run.steps, [250, 251, 252, 257])
  np.testing.assert_array_equal(run["update"], [1, 2, 3, np.nan])


def test_before_the_first_update_only_what_was_pushed(path):
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(0, watched().init(PARAMS), loss=2.0)
  (row,) = rows_of(path)
  assert row.keys() == {"step", "update", "time", "loss"} and row["step"] == row["update"] == 0


def test_names_of_batches_are_kept(path):
  with clipjax.runs.Recorder(path) as recorder:
    for step, batch in enumerate([7, "shard-3", np.int64(8), None]):
      recorder.push(step, None, loss=1.0, batch=batch)
    for batch in (1.5, True, b"x", ["a"], jnp.int32(1)):
      assert message_of(TypeError, recorder.push, 5, None, batch=batch).startswith(
        "`batch` must be an integer or a short string, got "
      )
    assert message_of(ValueError, recorder.push, 5, None, batch="x" * 101) == (
      "`batch` must have at most 100 characters, got 101: pass the name of the batch, not what is in it."
    )
  assert [row.get("batch") for row in rows_of(path)] == [7, "shard-3", 8, None]


def test_two_pushes_of_a_step_are_one_row(path):
  for every in (1, 50):
    with clipjax.runs.Recorder(path, every=every) as recorder:
      for step, state in train(watched(), 2):
        recorder.push(step, state, loss=1.0)
        recorder.push(step, state, val_loss=2.0)
    run = clipjax.runs.read_run(path)
    assert run["loss"].tolist() == [1, 1] and run["val_loss"].tolist() == [2, 2]
    path.unlink()


# The ring of a watch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [2, 5, 8])
def test_steps_between_two_pushes_come_from_the_ring(path, between):
  with clipjax.runs.Recorder(path, every=2) as recorder:
    for step, state in train(watched(history=8), 24):
      if step % between == 0:
        recorder.push(step, state, loss=0.0)
  run = clipjax.runs.read_run(path)
  last = 24 // between * between
  np.testing.assert_array_equal([row["step"] for row in rows_of(path)], np.arange(1, last + 1))
  np.testing.assert_allclose(run["grad/norm"], 13 * run.steps, rtol=1e-6)
  np.testing.assert_array_equal(run.steps[~np.isnan(run["loss"])], np.arange(between, last + 1, between))


def test_scan_of_steps_loses_none(path):
  tx = watched(history=10)

  @jax.jit
  def ten(state, first):
    def body(state, step):
      return tx.update(grads_of(step), state, PARAMS)[1], None

    return jax.lax.scan(body, state, first + jnp.arange(10.0))[0]

  state = tx.init(PARAMS)
  with clipjax.runs.Recorder(path) as recorder:
    for first in (1, 11, 21):
      state = ten(state, first)
      recorder.push(first + 9, state)
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal([row["step"] for row in rows_of(path)], np.arange(1, 31))
  np.testing.assert_allclose(run["grad/norm"], 13 * run.steps, rtol=1e-6)


def test_more_steps_than_the_ring_has_are_a_gap_and_said_once(path):
  recorder = clipjax.runs.Recorder(path)
  for step, state in train(watched(history=4), 18):
    if step % 6 == 0:
      recorder.push(step, state)
  caught = warnings_of(recorder.close)
  assert caught == [
    "`history` of the watch 'grad' must reach from one push to the next, got 4 for 6 steps: those before are not "
    "recorded; pass watch(history=6)."
  ]
  assert clipjax.runs.read_run(path).steps.tolist() == [3, 4, 5, 6, 9, 10, 11, 12, 15, 16, 17, 18]


def test_ring_of_a_watch_that_does_not_see_every_step(path):
  tx = clipjax.skip_steps(watched(history=8), norm_rule=30.0)
  run = record(path, tx, 5)
  assert run.steps.tolist() == [1, 2, 3, 4, 5]
  with clipjax.runs.Recorder(path.with_name("sparse")) as recorder:
    for step, state in train(tx, 5):
      if step in (1, 5):  # 2 was seen, 3 to 5 were rejected: which of them the ring has cannot be told.
        recorder.push(step, state)
  assert clipjax.runs.read_run(path.with_name("sparse")).steps.tolist() == [1, 5]


# The device ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 2])
def test_survives_donation(path, accumulated):
  tx = watched(history=4)
  tx = tx if accumulated == 1 else optax.MultiSteps(tx, accumulated)

  def step(params, state, number):
    updates, state = tx.update(grads_of(number), state, params)
    params = optax.apply_updates(params, updates)
    return params, state, number * 2

  step = jax.jit(step, donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, PARAMS)
  state = jax.tree.map(jnp.copy, tx.init(params))
  with clipjax.runs.Recorder(path, every=5) as recorder:
    for number in range(1, 13):
      old = params, state
      params, state, loss = step(*old, jnp.float32(number))
      recorder.push(number, state, loss=loss, params=params)
      if number > 1:
        assert any(x.is_deleted() for x in recorder._packers[0].arrays(old[1]))
      del loss
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal(run.steps, np.arange(accumulated, 13, accumulated))
  mean = run.steps - (0.5 if accumulated == 2 else 0.0)  # Of steps 1 and 2, 3 and 4, ...
  np.testing.assert_allclose(run["grad/norm"], 13 * mean, rtol=1e-6)
  np.testing.assert_allclose(run["loss"], 2 * mean)
  assert run.weights[2].sum(axis=1).tolist() == [3] * len(run.weights[0])


def waiting(recorder):
  """How many pushes are on their way to the file."""
  return len(recorder._pipeline._pending) + len(recorder._pipeline._batch)


def slow(x):
  return jax.lax.fori_loop(0, 40, lambda i, m: jnp.tanh(m @ m), jnp.full((1000, 1000), x)).mean()


def test_push_does_not_wait_for_the_device(path):
  (_, state), *_ = train(watched(), 1)
  after = jax.jit(lambda tree, x: jax.tree.map(lambda y: jnp.where(x > 2, jnp.zeros_like(y), y), tree))
  one = jax.jit(slow).lower(jnp.float32(1)).compile()
  with clipjax.runs.Recorder(path, every=2) as recorder:
    recorder.push(1, after(state, jnp.float32(0)), loss=jnp.float32(0), params=after(PARAMS, jnp.float32(0)))
    recorder.flush()  # Everything is compiled.
    x = one(jnp.float32(1))
    late, params = after(state, x), after(PARAMS, x)
    for _ in range(3):
      recorder.push(1, late, loss=x, params=params)
    assert not x.is_ready() and waiting(recorder) == 3
    recorder.push(1, late, loss=x)  # The second batch is full, so it waits for the first.
    assert x.is_ready() and waiting(recorder) <= 2
  assert clipjax.runs.read_run(path)["loss"][0] == near(float(x))


def test_one_program_for_all_pushes_of_a_kind(path):
  with clipjax.runs.Recorder(path) as recorder:
    for step, state in train(watched(), 5):
      recorder.push(step, state, loss=jnp.float32(0), rate=0.1 * step)
    assert [p._program._cache_size() for p in recorder._packers] == [1]
    recorder.push(step, state, val_loss=jnp.float32(0))
    assert [p._program._cache_size() for p in recorder._packers] == [2]


def test_memory_of_the_host_is_flat(path):
  with clipjax.runs.Recorder(path, every=20) as recorder:
    (_, state), *_ = train(optax.chain(clipjax.watch(history=8), clipjax.clip_by_leaf_norm(1.0)), 1)

    def pushes(count):
      for step in range(count):
        recorder.push(step, state, loss=jnp.float32(0), params=PARAMS)

    pushes(500)
    recorder.flush()
    tracemalloc.start()
    pushes(200)
    recorder.flush()
    before, _ = tracemalloc.get_traced_memory()
    pushes(3000)
    recorder.flush()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 150_000, (before, after)  # 50 bytes a push; a row has several hundred.


def test_sharded_over_devices(path):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  over = jax.NamedSharding(mesh, jax.P("data"))
  params = jax.device_put({"w": jnp.arange(1.0, 17.0), "b": jnp.ones(8)}, over)
  tx = watched(history=2)
  step = jax.jit(tx.update, donate_argnums=1)
  state = jax.device_put(tx.init(params), jax.NamedSharding(mesh, jax.P()))
  with clipjax.runs.Recorder(path, every=2) as recorder:
    for number in range(1, 6):
      _, state = step({key: x * number for key, x in params.items()}, state, params)
      recorder.push(number, state, loss=state[0].norm * 2, params=params)
  run = clipjax.runs.read_run(path)
  want = np.sqrt(np.sum(np.arange(1.0, 17) ** 2) + 8) * run.steps
  np.testing.assert_allclose(run["grad/norm"], want, rtol=1e-6)
  np.testing.assert_allclose(run["loss"], 2 * want, rtol=1e-6)
  assert run.parameters == 24 and run.weights[2].sum(axis=1).tolist() == [3] * 3  # Of the first device.


@pytest.mark.parametrize("kind", ["spread", "other"])
def test_state_and_loss_on_different_devices(path, kind):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  place = jax.NamedSharding(mesh, jax.P()) if kind == "spread" else jax.devices()[1]
  with clipjax.runs.Recorder(path) as recorder:
    for step, state in train(watched(), 3):
      loss = jax.device_put(jnp.float32(step), jax.devices()[2])
      recorder.push(step, jax.device_put(state, place), loss=loss)
  run = clipjax.runs.read_run(path)
  assert run["loss"].tolist() == [1, 2, 3] and run["grad/norm"].tolist() == [13, 26, 39]


def test_what_cannot_be_read_costs_its_row_alone(path):
  recorder = clipjax.runs.Recorder(path)
  for step in (1, 2, 3):
    recorder.push(step, None, loss=jnp.float32(step), rate=0.5)
  recorder._pipeline._pending[1].vector.delete()  # Reading it raises, as reading what a failed step returned does.
  (caught,) = warnings_of(recorder.close)
  assert caught.startswith("1 pushes could not be read from the device (") and "Array has been deleted" in caught
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [1, 2, 3] and run["rate"].tolist() == [0.5] * 3
  np.testing.assert_array_equal(run["loss"], [1, np.nan, 3])


# Parameters ---------------------------------------------------------------------------------------------------------


def test_histogram_of_the_parameters(path):
  rng = np.random.default_rng(0)
  w = (rng.standard_normal((30, 40)) * 10.0 ** rng.integers(-9, 4, (30, 40))).astype(np.float32)
  w[0, :5] = 0, np.inf, np.nan, 1e-30, 1e30
  params = {"w": jnp.asarray(w), "b": jnp.full((7,), 0.5, jnp.bfloat16), "count": jnp.arange(3), "empty": jnp.zeros(0)}
  with clipjax.runs.Recorder(path, every=3) as recorder:
    for step, state in train(watched(), 8):
      recorder.push(step, state, params=params)
  run = clipjax.runs.read_run(path)
  steps, edges, counts = run.weights
  assert steps.tolist() == [1, 4, 7] and run.parameters == 1207
  size = np.abs(np.concatenate([w.ravel(), np.full(7, 0.5)])).astype(np.float64)
  size = size[np.isfinite(size) & (size > 0)]
  want, _ = np.histogram(np.clip(np.log10(size), edges[0], edges[-1]), edges)
  assert edges.shape == (41,) and (edges[0], edges[-1]) == (-8, 2)
  np.testing.assert_array_equal(counts, [want] * 3)
  weights = [row["weights"] for row in rows_of(path) if "weights" in row]
  assert all(x["zeros"] == 1 and x["nonfinite"] == 2 for x in weights) and len(weights) == 3


# Wrappers -----------------------------------------------------------------------------------------------------------


def nnx_optimizer():
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, watched(), wrt=nnx.Param)
  optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
  return optimizer


def trained_state():
  return train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=watched()).apply_gradients(grads=PARAMS)


def after_a_step(tx):
  (_, state), *_ = train(tx, 1)
  return state


WRAPPERS = {
  "inject_hyperparams": lambda: after_a_step(optax.inject_hyperparams(clipjax.clip_by_global_norm)(max_norm=6.5)),
  "multi_transform": lambda: after_a_step(optax.multi_transform({"a": watched()}, {"w": "a", "b": "a"})),
  "apply_if_finite": lambda: after_a_step(optax.apply_if_finite(watched(), 3)),
  "masked": lambda: after_a_step(optax.masked(watched(), {"w": True, "b": True})),
  "nnx": nnx_optimizer,
  "train_state": trained_state,
}


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_found_in_every_wrapper(path, wrapper):
  state = WRAPPERS[wrapper]()
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(1, state)
    recorder.push(1, state)
  (row,) = rows_of(path)
  want = {key: float(value) for key, value in clipjax.metrics(state).items()}
  assert want and {key: near(row[key]) for key in want} == want and len(recorder._packers) == 1


def test_another_optimizer_gets_another_program(path):
  with clipjax.runs.Recorder(path) as recorder:
    for tx in (watched(), clipjax.clip_by_leaf_norm(1.0, name="leaf"), watched(), optax.adam(0.1)):
      (_, state), *_ = train(tx, 1)
      recorder.push(1, state)
  assert len(recorder._packers) == 3
  assert {"grad/norm", "leaf/norm"} <= set(clipjax.runs.read_run(path).columns)


# Resuming, and what goes wrong --------------------------------------------------------------------------------------


def test_resumed_run_is_appended_and_what_was_given_up_is_dropped(path):
  states = dict(train(watched(history=4), 10))
  with clipjax.runs.Recorder(path) as recorder:
    for step in range(1, 11):
      recorder.push(step, states[step], loss=1.0)
  with clipjax.runs.Recorder(path) as recorder:  # From the checkpoint of step 6, with other gradients.
    for step, state in train(watched(history=4), 2, states[6], first=107):
      recorder.push(step - 100, state, loss=2.0)
  lines = path.read_text().splitlines()
  assert [i for i, line in enumerate(lines) if "clipjax_run" in line] == [0, 11]
  assert [json.loads(line)["step"] for line in lines[12:]] == [7, 8]  # The ring's steps 4 to 6 are known.
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 9)] and run["loss"].tolist() == [1] * 6 + [2] * 2
  np.testing.assert_allclose(run["grad/norm"][5:], [13 * 6, 13 * 107, 13 * 108], rtol=1e-6)


def test_resumed_in_the_middle_of_a_scan_takes_the_new_norms(path):
  states = dict(train(watched(history=8), 10))
  with clipjax.runs.Recorder(path) as recorder:
    for step in range(1, 11):
      recorder.push(step, states[step])
  with clipjax.runs.Recorder(path) as recorder:
    *_, (_, state) = train(watched(history=8), 4, states[6], first=107)
    recorder.push(10, state)
  run = clipjax.runs.read_run(path)
  np.testing.assert_allclose(run["grad/norm"], 13 * np.array([1, 2, 3, 4, 5, 6, 107, 108, 109, 110]), rtol=1e-6)


def test_resumed_beside_a_gap_keeps_what_was_recorded_after_it(path):
  states = dict(train(watched(history=4), 13))
  recorder = clipjax.runs.Recorder(path)
  recorder.push(4, states[4])
  recorder.push(10, states[10])  # Steps 5 and 6 are in no ring.
  assert len(warnings_of(recorder.close)) == 1
  with clipjax.runs.Recorder(path) as recorder:  # From the checkpoint of step 7, one step on.
    recorder.push(8, states[8])
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # The restored ring has 5 and 6.
  np.testing.assert_allclose(run["grad/norm"], 13 * run.steps, rtol=1e-6)


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_torn_last_line_is_passed_over_and_mended_on_resume(path, cut):
  states = dict(train(watched(), 6))
  with clipjax.runs.Recorder(path) as recorder:
    for step in range(1, 5):
      recorder.push(step, states[step])
  path.write_bytes(path.read_bytes()[:-cut])
  assert clipjax.runs.read_run(path).steps.tolist() == ([1, 2, 3] if cut > 1 else [1, 2, 3, 4])
  with clipjax.runs.Recorder(path) as recorder:
    for step in range(5, 7):
      recorder.push(step, states[step])
  assert clipjax.runs.read_run(path).steps.tolist() == ([1, 2, 3, 5, 6] if cut > 1 else [1, 2, 3, 4, 5, 6])


def test_file_torn_in_its_header_is_resumed(path):
  path.write_bytes(b'{"clipjax_run": 1, "ver')
  with pytest.raises(ValueError, match="which has no header"):
    clipjax.runs.read_run(path)
  assert len(record(path, watched(), 2)) == 2


def test_a_ring_that_is_restored_beside_a_torn_header_is_recorded_whole(path):
  path.write_bytes(b'{"clipjax_run": 1, "ver')
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(4, dict(train(watched(history=4), 4))[4])
  np.testing.assert_allclose(clipjax.runs.read_run(path)["grad/norm"], 13 * np.arange(1, 5), rtol=1e-6)


def test_a_ring_under_a_new_name_replaces_what_was_recorded_without_it(path):
  with clipjax.runs.Recorder(path) as recorder:
    for step, state in train(watched(history=4), 5):
      recorder.push(step, state)
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(6, dict(train(clipjax.watch(history=4, name="raw"), 6))[6])
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(run["raw/norm"], [np.nan, np.nan, *(13.0 * np.arange(3, 7))], rtol=1e-6)


@jax.tree_util.register_pytree_node_class
class Opaque:
  """A node without keys: JAX numbers its children, and nothing can be looked up by the number."""

  def __init__(self, child):
    self.child = child

  def tree_flatten(self):
    return (self.child,), None

  @classmethod
  def tree_unflatten(cls, _, children):
    return cls(*children)


def test_a_state_in_a_node_without_keys_is_told(path):
  (_, state), *_ = train(watched(), 1)
  with clipjax.runs.Recorder(path) as recorder:
    with pytest.raises(TypeError) as error:
      recorder.push(1, Opaque(state))
    recorder.push(1, state)
  assert str(error.value) == (
    "`opt_state` must be made of tuples, dicts and objects with attributes, got an Opaque: push the part of it that "
    "holds the clip."
  )
  assert len(rows_of(path)) == 1


KILLED = """
import os, signal, sys, jax, jax.numpy as jnp, clipjax
tx = clipjax.clip_by_global_norm(1.0)
state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
with clipjax.runs.Recorder(sys.argv[1], every=10) as recorder:
  for step in range(1, 101):
    _, state = update(jnp.full(2, step, jnp.float32), state)
    recorder.push(step, state, loss=jnp.float32(step))
    if step == 57:
      os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_loses_only_what_was_not_yet_read(path):
  done = subprocess.run([sys.executable, "-c", KILLED, path], check=False, cwd=ROOT)
  assert done.returncode == -signal.SIGKILL
  run = clipjax.runs.read_run(path)
  assert 37 <= len(run) <= 57
  np.testing.assert_array_equal(run.steps, np.arange(1, len(run) + 1))
  np.testing.assert_array_equal(run["loss"], run.steps)


def test_what_was_pushed_before_an_exception_is_written(path):
  def body():
    with clipjax.runs.Recorder(path) as recorder:
      for step, state in train(watched(), 3):
        recorder.push(step, state)
      raise KeyError("batch")

  with pytest.raises(KeyError, match="batch"):
    body()
  assert len(clipjax.runs.read_run(path)) == 3


def test_path_that_vanishes_is_said_once_and_rows_wait(tmp_path):
  folder = tmp_path / "runs"
  folder.mkdir()
  path = folder / "run.jsonl"
  states = dict(train(watched(), 8))
  with clipjax.runs.Recorder(path, every=1) as recorder:
    recorder.push(1, states[1])
    recorder.flush()
    path.unlink()
    folder.rmdir()
    caught = warnings_of(lambda: [(recorder.push(step, states[step]), recorder.flush()) for step in range(2, 6)])
    assert caught == [
      f"cannot write {str(path)!r}: No such file or directory; the training goes on, and the last 16 MiB of rows are "
      "kept to be written when it is possible again: free disk space or fix the path."
    ]
    folder.mkdir()
    recorder.push(6, states[6])
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [2, 3, 4, 5, 6] and run.leaves == {"grad": ("b", "w")}


def test_full_disk_in_the_middle_of_a_row(path, monkeypatch):
  states = dict(train(watched(), 6))
  whole = run_file._write_all

  def half(file, text):
    whole(file, text[: len(text) - 30])
    raise OSError(28, "No space left on device")

  with clipjax.runs.Recorder(path, every=2) as recorder:
    recorder.push(1, states[1])
    recorder.flush()
    monkeypatch.setattr(run_file, "_write_all", half)
    (caught,) = warnings_of(lambda: [(recorder.push(step, states[step]), recorder.flush()) for step in range(2, 5)])
    assert "No space left on device; the training goes on" in caught
    assert clipjax.runs.read_run(path).steps.tolist() == [1]
    monkeypatch.setattr(run_file, "_write_all", whole)
    recorder.push(5, states[5])
  assert clipjax.runs.read_run(path).steps.tolist() == [1, 2, 3, 4, 5]


def test_rows_that_wait_are_bounded(path, monkeypatch):
  monkeypatch.setattr(run_file, "_KEPT_BYTES", 2000)
  file = run_file.RunFile(path, (told := []).append)
  path.unlink()
  path.mkdir()
  header = {"clipjax_run": 1, "leaves": {}}
  for step in range(1000):
    file.write(header, [{"step": step}])
  assert len(told) == 1 and "Is a directory" in told[0]
  assert sum(map(len, file._waiting)) <= 2000
  path.rmdir()
  file.write(header, [{"step": 1000}])
  run = clipjax.runs.read_run(path)
  assert 0 < run.steps[0] < 1000 and np.all(np.diff(run.steps) == 1) and run.steps[-1] == 1000


def test_path_that_cannot_be_written_raises_at_once(tmp_path):
  with pytest.raises(FileNotFoundError):
    clipjax.runs.Recorder(tmp_path / "none" / "run.jsonl")
  with pytest.raises(IsADirectoryError):
    clipjax.runs.Recorder(tmp_path)


def test_file_of_somebody_else_is_not_touched(tmp_path):
  path = tmp_path / "notes.txt"
  path.write_text("my notes")
  assert message_of(ValueError, clipjax.runs.Recorder, path) == (
    f"`path` must be a new file or one that a Recorder wrote, got {str(path)!r}, which is neither: name another file."
  )
  assert path.read_text() == "my notes"


def test_only_process_0_writes(path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with clipjax.runs.Recorder(path, writers=[Broken()]) as recorder:
    for step, state in train(watched(), 3):
      recorder.push(step, state, params=PARAMS)
    recorder.flush()
  assert not path.exists()


def test_working_directory_may_change(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "other").mkdir()
  with clipjax.runs.Recorder("run.jsonl") as recorder:
    monkeypatch.chdir(tmp_path / "other")
    recorder.push(1, None, loss=1.0)
  assert len(clipjax.runs.read_run(tmp_path / "run.jsonl")) == 1


def test_flush_and_close_twice_and_push_after_close(path):
  recorder = clipjax.runs.Recorder(path)
  recorder.flush()
  recorder.push(1, None, loss=1.0)
  for method in (recorder.flush, recorder.flush, recorder.close, recorder.close):
    method()
  assert len(rows_of(path)) == 1
  assert message_of(ValueError, recorder.push, 2, None) == (
    "`push` must be called before `close`, got a closed Recorder: make another, of the same path."
  )


# Writers ------------------------------------------------------------------------------------------------------------


class Collector:
  def __init__(self, sent):
    self._sent = sent

  def log(self, values, step):
    self._sent.append((step, values))


class Broken:
  def add_scalar(self, key, value, step):
    raise RuntimeError(f"offline at {step}")


# Wrong arguments ----------------------------------------------------------------------------------------------------

NO_NUMBER = "`loss` must be a real number or an array of shape (), got {}: push numbers alone."
WRONG = [
  ({"loss": "low"}, TypeError, NO_NUMBER.format("'low' (str)")),
  ({"loss": None}, TypeError, NO_NUMBER.format("a NoneType")),
  ({"loss": 1j}, TypeError, NO_NUMBER.format("1j (complex)")),
  (
    {"loss": np.zeros(2)}, ValueError,
    "`loss` must be a scalar, got shape (2,): reduce it, for example with jnp.mean, or push an entry.",
  ),
  (
    {"loss": np.zeros(1)}, ValueError,
    "`loss` must be a scalar, got shape (1,): reduce it, for example with jnp.mean, or push an entry.",
  ),
  ({"n": 10**400}, ValueError, "`n` must be in the range of a float, got a larger integer: scale it."),
  ({"time": 1.0}, ValueError, "`time` must be another key, got one that the Recorder writes itself: rename it."),
  ({"leaf": 1.0}, ValueError, "`leaf` must be another key, got one that the Recorder writes itself: rename it."),
  (
    {"grad/norm": 1.0}, ValueError,
    "`grad/norm` must be another key, got one that the Recorder writes itself: rename it.",
  ),
  ({"step": 1.5}, TypeError, "`step` must be an integer, got 1.5 (float): pass the number of the step."),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_wrong_scalars_are_named_and_nothing_is_queued(path, index):
  scalars, kind, message = WRONG[index]
  (_, state), *_ = train(watched(), 1)
  with clipjax.runs.Recorder(path) as recorder:
    assert message_of(kind, recorder.push, **{"step": 1, "opt_state": state, **scalars}) == message
    assert waiting(recorder) == 0


def test_arrays_that_are_no_numbers(path):
  with clipjax.runs.Recorder(path) as recorder:
    for value in (jax.random.key(0), jnp.complex64(1), np.array("a")):
      with pytest.raises(TypeError, match=r"^`loss` must be a real number or an array of shape"):
        recorder.push(1, None, loss=value)
    with pytest.raises(ValueError, match=r"^`loss` must be a scalar, got shape"):
      recorder.push(1, None, loss=jnp.zeros(3))
  assert rows_of(path) == []


def test_a_scalar_that_is_called_as_a_metric_of_a_watch(path):
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(1, next(train(watched(), 1))[1], **{"valid/worst_norm": 2.0})
  run = clipjax.runs.read_run(path)
  assert run["valid/worst_norm"].tolist() == [2.0]


def test_state_without_leaves(path):
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_leaf_norm(1.0))
  _, state = tx.update({}, tx.init({}))
  with clipjax.runs.Recorder(path) as recorder:
    recorder.push(1, state)
  run = clipjax.runs.read_run(path)
  assert run["grad/norm"].tolist() == [0] and set(run.keys()) == set(run.columns)


def test_inside_jit(path):
  (_, state), *_ = train(watched(), 1)
  with clipjax.runs.Recorder(path) as recorder:
    calls = {
      "opt_state": lambda x: recorder.push(1, jax.tree.map(lambda y: y + x.astype(y.dtype), state)),
      "loss": lambda x: recorder.push(1, state, loss=x),
      "step": lambda x: recorder.push(x, state),
      "params": lambda x: recorder.push(1, state, params={"w": x}),
    }
    for name, call in calls.items():
      assert message_of(TypeError, jax.jit(call), jnp.int32(1)) == (
        f"`{name}` must be an array with a value, got a traced one: call `push` outside jit, with what the jitted step "
        "returns."
      )
  assert rows_of(path) == []


def test_state_of_several_models(path):
  tx = watched()
  states = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x] * 4), PARAMS))
  with clipjax.runs.Recorder(path) as recorder:
    assert message_of(ValueError, recorder.push, 1, states) == (
      "`opt_state` must be that of one model, got 'grad' with leading axes (4,), as under vmap or pmap: push one of "
      "them, jax.tree.map(lambda x: x[0], opt_state)."
    )
    recorder.push(1, jax.tree.map(lambda x: x[0], states), loss=1.0)
    with pytest.raises(ValueError, match="leading axes"):
      recorder.push(1, states)
  assert len(rows_of(path)) == 1


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_a_number_of_pushes(path, every):
  with pytest.raises((TypeError, ValueError), match=r"^`every` must be"):
    clipjax.runs.Recorder(path, every=every)
