"""Recorder: every number compared with `metrics`, and what happens when something around it fails."""

import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from recording import PARAMS, after_a_step, grads_of, message_of, record, recorded, rows_of, train, warnings_of, watched

import clipjax
from clipjax.runs.record import run_file

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("standard_promotion")  # Adam and the wrappers of Optax need it.


def near(value):
  return pytest.approx(value, rel=1e-6)


# What is recorded ---------------------------------------------------------------------------------------------------


def test_every_metric_of_every_step_is_what_metrics_says(path, x64):
  pushes = [(step, state, {"loss": jnp.sqrt(jnp.float32(step)), "rate": 0.1}) for step, state in train(watched(), 11)]
  run = recorded(path, pushes, every=4)
  want = [{**clipjax.metrics(state), **scalars} for _, state, scalars in pushes]
  np.testing.assert_array_equal(run.steps, np.arange(1, 12))
  assert set(run.columns) == {*want[0], "time", "update"} and run["update"].tolist() == list(range(1, 12))
  for key, value in want[0].items():
    dtype = np.asarray(value).dtype
    assert (dtype == np.float64) == (key == "rate" or (x64 and dtype.kind == "f" and key != "loss"))
    np.testing.assert_array_equal(run[key].astype(dtype), [row[key] for row in want], err_msg=key)
  assert np.all(np.diff(run["time"]) >= 0) and abs(run["time"][-1] - time.time()) < 60


def test_counters_and_integers_survive_exactly(path):
  big, tx = 2**24 + 1, watched()
  watch, *others = tx.init(PARAMS)
  ((_, state),) = train(tx, 1, (watch._replace(steps=jnp.int32(big - 1)), *others))
  scalars = {
    "int": jnp.int32(-big), "uint": jnp.uint32(2**32 - 1), "half": jnp.bfloat16(0.1), "flag": jnp.array(True),
    "python": 2**53 - 1, "numpy": np.float32(0.1), "array": np.array(big), "bool": False,
  }  # fmt: skip
  recorded(path, [(0, state, scalars)])
  (row,) = rows_of(path)
  assert row["step"] == 0 and row["update"] == big and row["grad/steps"] == big
  want = {"int": -big, "uint": 2**32 - 1, "flag": 1, "python": 2**53 - 1, "array": big, "bool": 0}
  assert {key: row[key] for key in want} == want
  assert np.float32(row["half"]) == jnp.float32(jnp.bfloat16(0.1)) and np.float32(row["numpy"]) == np.float32(0.1)


def test_long_integers_under_x64(path):
  with jax.enable_x64(True):
    scalars = {"tokens": jnp.int64(2**40 + 1), "loss": jnp.float64(0.1), "below": jnp.int64(-(2**40))}
    recorded(path, [(3, None, scalars)])
  (row,) = rows_of(path)
  assert (row["tokens"], row["loss"], row["below"]) == (2**40 + 1, 0.1, -(2**40))


def test_a_nonfinite_number_is_null_with_a_flag(path):
  ((step, state),) = train(watched(), [jnp.nan])
  run = recorded(path, [(step, state, {"loss": jnp.float32(jnp.inf), "other": -jnp.inf, "fine": 1.0})])
  (row,) = rows_of(path)
  want = {"grad/norm": "nan", "loss": "inf", "other": "-inf"}
  assert {key: row["nonfinite"][key] for key in want} == want
  assert all(row[key] is None for key in row["nonfinite"]) and row["fine"] == 1
  assert row["leaf"]["grad/norm"] == [None, None] and row["leaf"]["grad/nonfinite"] == [1, 2]
  assert np.isnan(run["loss"]).all() and run.flags["loss"].tolist() == [True] and "fine" not in run.flags


def test_header(path):
  recorded(path, [(1, after_a_step(watched()), {"params": PARAMS})], every=7)
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
  resumed = recorded(path, [(3, optax.chain(clipjax.watch(name="d"), optax.rmsprop(0.1)).init(PARAMS))])
  assert resumed.optimizer[-1] == "ScaleByRmsState"  # The last header that names any counts.


def test_numbers_by_leaf_are_written_once_in_every_pushes(path):
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


@pytest.mark.parametrize(
  ("every", "norms", "steps"),
  [  # At a worst step at least a tenth above the last one; at nonfinite steps, but not forever.
    (100, [1, 0.5, 1.05, 1.11, 1.2, 3, 2, 3], [1, 4, 6]),
    (4, [1, 1, *[np.nan, 1], *[np.nan] * 6, 1, np.nan], [1, 3, 5, 6, 7, 8, 9, 12]),
  ],
)
def test_numbers_by_leaf_are_also_written_where_it_matters(path, every, norms, steps):
  run = recorded(path, train(clipjax.watch(), norms), every=every)
  assert run.vectors["grad/norm"][0].tolist() == steps


def test_leaves_of_a_group_clip_beside_a_watch(path):
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_group_norm({"x": 6.0, "y": 2.5}, {"b": "x", "w": "y"}))
  run = record(path, tx, 2)
  assert run.leaves == {"grad": ("b", "w"), "grad_group": ("x", "y")}
  assert run["grad/scale/x"].tolist() == [0.5, 0.25] and run["grad_group/scale/y"][0] == 0.5
  assert run["grad/norm/b"][0] == 12 and run["grad/norm/x"].tolist() == [12, 24]


# Steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 50])
def test_multi_steps_is_a_row_for_each_update(path, every):
  sent = []
  with clipjax.runs.Recorder(path, every=every, writers=[lambda *row: sent.append(row)]) as recorder:
    for micro, state in train(optax.MultiSteps(watched(), 3), 11):
      recorder.push(100 + micro, state, loss=jnp.float32(100 if micro == 4 else micro), tokens=7, batch=f"part {micro}")
      if micro == 5:
        recorder.flush()  # Nothing is written of an update that has not landed.
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
  run = recorded(path, [(micro, states[micro], {"loss": float(micro)}) for micro in range(5, 10)])
  assert run.steps.tolist() == [6, 9] and run["loss"].tolist() == [5.5, 8] and run["update"].tolist() == [2, 3]


def test_around_multi_steps_every_micro_batch_is_a_row(path):
  tx = clipjax.skip_steps(optax.MultiSteps(watched(), 2))
  states = train(tx, [1.0, 1.0, jnp.nan, 2.0, 2.0])
  run = recorded(path, ((step, state, {"loss": float(step)}) for step, state in states))
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
  run = recorded(path, train(optax.apply_if_finite(watched(), 5), [1.0, jnp.nan, 2.0]), every=1)
  np.testing.assert_array_equal(run["grad/norm"], [13, np.nan, 26])
  assert run.vectors["grad/norm"][0].tolist() == [1, 3] and not run.flags


def test_without_a_state_of_clipjax(path):
  run = record(path, optax.adam(1e-3), 3)
  assert run.steps.tolist() == [1, 2, 3] and set(run.columns) == {"time", "loss"}


def test_steps_are_those_of_the_caller(path):
  one, two, three = (state for _, state in train(watched(), 3))
  run = recorded(path, [(250, one), (251, two), (jnp.int32(252), three), (jnp.int32(257), None, {"loss": 1.0})])
  np.testing.assert_array_equal(run.steps, [250, 251, 252, 257])
  np.testing.assert_array_equal(run["update"], [1, 2, 3, np.nan])


def test_before_the_first_update_only_what_was_pushed(path):
  recorded(path, [(0, watched().init(PARAMS), {"loss": 2.0})])
  (row,) = rows_of(path)
  assert row.keys() == {"step", "update", "time", "loss"} and row["step"] == row["update"] == 0


def test_names_of_batches_are_kept(path):
  batches = [7, "shard-3", np.int64(8), None]
  recorded(path, [(step, None, {"loss": 1.0, "batch": batch}) for step, batch in enumerate(batches)])
  assert [row.get("batch") for row in rows_of(path)] == [7, "shard-3", 8, None]


@pytest.mark.parametrize("every", [1, 50])
def test_two_pushes_of_a_step_are_one_row(path, every):
  pushes = []
  for step, state in train(watched(), 2):
    pushes += [(step, state, {"loss": 1.0}), (step, jax.tree.map(jnp.copy, state), {"val_loss": 2.0})]
  run = recorded(path, pushes, every=every)
  assert run["loss"].tolist() == [1, 1] and run["val_loss"].tolist() == [2, 2]
  assert run["grad/norm"].tolist() == [13, 26] and not any("_2" in key for key in run.columns)


# The ring of a watch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [2, 5, 8])
def test_steps_between_two_pushes_come_from_the_ring(path, between):
  states = train(watched(history=8), 24)
  run = recorded(path, ((step, state, {"loss": 0.0}) for step, state in states if step % between == 0), every=2)
  last = 24 // between * between
  np.testing.assert_array_equal([row["step"] for row in rows_of(path)], np.arange(1, last + 1))
  np.testing.assert_allclose(run["grad/norm"], 13 * run.steps, rtol=1e-6)
  np.testing.assert_array_equal(run.steps[~np.isnan(run["loss"])], np.arange(between, last + 1, between))


def test_more_steps_than_the_ring_holds_are_a_gap_and_reported_once(path):
  states = [(step, state) for step, state in train(watched(history=4), 18) if step % 6 == 0]
  assert warnings_of(lambda: recorded(path, states)) == [
    "`history` of the watch 'grad' must reach from one push to the next, got 4 for 6 steps: earlier steps are not "
    "recorded; pass watch(history=6)."
  ]
  assert clipjax.runs.read_run(path).steps.tolist() == [3, 4, 5, 6, 9, 10, 11, 12, 15, 16, 17, 18]


def test_ring_of_a_watch_that_does_not_see_every_step(path):
  states = dict(train(clipjax.skip_steps(watched(history=8), norm_rule=30.0), 5))
  assert recorded(path, states.items()).steps.tolist() == [1, 2, 3, 4, 5]
  # Step 2 was seen, 3 to 5 were rejected: nothing tells which of them the ring holds.
  assert recorded(path.with_name("sparse"), [(1, states[1]), (5, states[5])]).steps.tolist() == [1, 5]


# The device ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 2])
def test_survives_donation(path, accumulated):
  tx = optax.MultiSteps(watched(history=4), accumulated)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, number):
    updates, state = tx.update(grads_of(number), state, params)
    return optax.apply_updates(params, updates), state, number * 2

  params = jax.tree.map(jnp.copy, PARAMS)
  state = jax.tree.map(jnp.copy, tx.init(params))
  with clipjax.runs.Recorder(path, every=5) as recorder:
    for number in range(1, 13):
      old = state
      params, state, loss = step(params, old, jnp.float32(number))
      recorder.push(number, state, loss=loss, params=params)
      assert number == 1 or any(x.is_deleted() for x in recorder._packers[0].arrays(old))
      del loss
  run = clipjax.runs.read_run(path)
  np.testing.assert_array_equal(run.steps, np.arange(accumulated, 13, accumulated))
  mean = run.steps - (accumulated - 1) / 2  # Of steps 1 and 2, 3 and 4, ...
  np.testing.assert_allclose(run["grad/norm"], 13 * mean, rtol=1e-6)
  np.testing.assert_allclose(run["loss"], 2 * mean)
  assert run.weights[2].sum(axis=1).tolist() == [3] * len(run.weights[0])


def waiting(recorder):
  """How many pushes are on their way to the file."""
  return len(recorder._pipeline._pending) + len(recorder._pipeline._batch)


def slow(x):
  return jax.lax.fori_loop(0, 40, lambda i, m: jnp.tanh(m @ m), jnp.full((1000, 1000), x)).mean()


def test_push_does_not_wait_for_the_device(path):
  state = after_a_step(watched())
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


@pytest.mark.parametrize(("number", "steps"), [(int, [1, 2, 3]), (jnp.int32, [1, 3])])
def test_a_push_that_cannot_be_read_costs_its_numbers_alone_or_with_its_step_its_row(path, number, steps):
  recorder = clipjax.runs.Recorder(path)
  for step in (1, 2, 3):
    recorder.push(number(step), None, loss=jnp.float32(step), rate=0.5)
  recorder._pipeline._pending[1].vector.delete()  # Reading it raises, like reading the result of a failed step.
  (caught,) = warnings_of(recorder.close)
  assert caught.startswith("1 pushes could not be read from the device (") and "Array has been deleted" in caught
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == steps and run["rate"].tolist() == [0.5] * len(steps)
  np.testing.assert_array_equal(run["loss"], [np.nan if step == 2 else step for step in steps])


# Parameters ---------------------------------------------------------------------------------------------------------


def test_histogram_of_the_parameters(path):
  params = {
    "w": jnp.array([[0.0, jnp.inf, jnp.nan], [1e-30, 1e30, -3e-3]]), "b": jnp.full((7,), 0.5, jnp.bfloat16),
    "count": jnp.arange(3), "empty": jnp.zeros(0),
  }  # fmt: skip
  run = recorded(path, [(step, None, {"params": params}) for step in range(1, 9)], every=3)
  steps, edges, counts = run.weights
  assert steps.tolist() == [1, 4, 7] and run.parameters == 13
  assert edges.shape == (41,) and (edges[0], edges[-1]) == (-8, 2)
  want, _ = np.histogram(np.clip(np.log10([1e-30, 1e30, 3e-3, *[0.5] * 7]), -8, 2), edges)
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
      recorder.push(1, after_a_step(tx))
  assert len(recorder._packers) == 3
  assert {"grad/norm", "leaf/norm"} <= set(clipjax.runs.read_run(path).columns)


# Resuming, and what goes wrong --------------------------------------------------------------------------------------


def test_a_resumed_run_is_appended_and_superseded_rows_are_dropped(path):
  states = dict(train(watched(history=4), 10))
  recorded(path, [(step, state, {"loss": 1.0}) for step, state in states.items()])
  others = train(watched(history=4), 2, states[6], first=107)  # From the checkpoint of step 6.
  run = recorded(path, [(step - 100, state, {"loss": 2.0}) for step, state in others])
  lines = path.read_text().splitlines()
  assert [i for i, line in enumerate(lines) if "clipjax_run" in line] == [0, 11]
  assert [json.loads(line)["step"] for line in lines[12:]] == [7, 8]  # The ring's steps 4 to 6 are known.
  assert run.steps.tolist() == [*range(1, 9)] and run["loss"].tolist() == [1] * 6 + [2] * 2
  np.testing.assert_allclose(run["grad/norm"][5:], [13 * 6, 13 * 107, 13 * 108], rtol=1e-6)


def test_resumed_in_the_middle_of_a_scan_takes_the_new_norms(path):
  states = dict(train(watched(history=8), 10))
  recorded(path, states.items())
  *_, (_, state) = train(watched(history=8), 4, states[6], first=107)
  run = recorded(path, [(10, state)])
  np.testing.assert_allclose(run["grad/norm"], 13 * np.array([1, 2, 3, 4, 5, 6, 107, 108, 109, 110]), rtol=1e-6)


def test_resumed_beside_a_gap_keeps_what_was_recorded_after_it(path):
  states = dict(train(watched(history=4), 13))
  # Steps 5 and 6 are in no ring.
  assert len(warnings_of(lambda: recorded(path, [(4, states[4]), (10, states[10])]))) == 1
  run = recorded(path, [(8, states[8])])  # From the checkpoint of step 7, one step on.
  assert run.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # The restored ring has 5 and 6.
  np.testing.assert_allclose(run["grad/norm"], 13 * run.steps, rtol=1e-6)


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_torn_last_line_is_skipped_and_repaired_on_resume(path, cut):
  states = list(train(watched(), 6))
  recorded(path, states[:4])
  path.write_bytes(path.read_bytes()[:-cut])
  kept = [1, 2, 3] if cut > 1 else [1, 2, 3, 4]
  assert clipjax.runs.read_run(path).steps.tolist() == kept
  assert recorded(path, states[4:]).steps.tolist() == [*kept, 5, 6]


@pytest.mark.parametrize(("history", "steps"), [(0, [4]), (4, [1, 2, 3, 4])])
def test_a_file_torn_in_its_header_is_resumed_with_all_of_the_ring(path, history, steps):
  path.write_bytes(b'{"clipjax_run": 1, "ver')
  run = recorded(path, [(4, dict(train(watched(history), 4))[4])])
  assert run.steps.tolist() == steps
  np.testing.assert_allclose(run["grad/norm"], 13 * run.steps, rtol=1e-6)


def test_a_ring_under_a_new_name_replaces_what_was_recorded_without_it(path):
  recorded(path, train(watched(history=4), 5))
  run = recorded(path, [(6, dict(train(clipjax.watch(history=4, name="raw"), 6))[6])])
  assert run.steps.tolist() == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(run["raw/norm"], [np.nan, np.nan, *(13.0 * np.arange(3, 7))], rtol=1e-6)


class Opaque:
  """A node without keys: JAX numbers its children, and nothing can be looked up by the number."""

  def __init__(self, child):
    self.child = child


jax.tree_util.register_pytree_node(Opaque, lambda x: ((x.child,), None), lambda _, children: Opaque(*children))


def test_a_state_in_a_node_without_keys_is_refused(path):
  state = after_a_step(watched())
  with clipjax.runs.Recorder(path) as recorder:
    assert message_of(TypeError, recorder.push, 1, Opaque(state)) == (
      "`opt_state` must be made of tuples, dicts and objects with attributes, got an Opaque: push the part of it that "
      "holds the clip."
    )
    recorder.push(1, state)
  assert len(rows_of(path)) == 1


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


def test_only_process_0_writes(path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with clipjax.runs.Recorder(path, writers=[lambda step, values: 1 / 0]) as recorder:
    recorder.push(1, after_a_step(watched()), params=PARAMS)
    recorder.flush()
  assert not path.exists()


def test_working_directory_may_change(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "other").mkdir()
  with clipjax.runs.Recorder("run.jsonl") as recorder:
    monkeypatch.chdir(tmp_path / "other")
    recorder.push(1, None, loss=1.0)
  assert len(rows_of(tmp_path / "run.jsonl")) == 1


def test_flush_and_close_twice_and_push_after_close(path):
  recorder = clipjax.runs.Recorder(path)
  recorder.flush()
  recorder.push(1, None, loss=1.0)
  for method in (recorder.flush, recorder.flush, recorder.close, recorder.close):
    method()
  assert len(rows_of(path)) == 1
  assert message_of(ValueError, recorder.push, 2, None) == (
    "`push` must be called before `close`, got a closed Recorder: make another with the same path."
  )


# What looks odd -----------------------------------------------------------------------------------------------------


def test_a_scalar_named_like_a_metric_of_a_watch(path):
  run = recorded(path, [(1, after_a_step(watched()), {"valid/worst_norm": 2.0})])
  assert run["valid/worst_norm"].tolist() == [2.0]


def test_state_without_leaves(path):
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_leaf_norm(1.0))
  run = recorded(path, [(1, tx.update({}, tx.init({}))[1])])
  assert run["grad/norm"].tolist() == [0] and set(run.keys()) == set(run.columns)
