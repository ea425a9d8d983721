"""Recorder where a run goes back or is resumed, where several optimizers are pushed, and what it finds as it goes."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_record import PARAMS, grads_of, message_of, record, rows_of, train, warnings_of, watched

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def path(tmp_path):
  return tmp_path / "run.jsonl"


def norms_of(steps, scale=13.0):
  return pytest.approx(scale * np.asarray(steps, float), rel=1e-6, nan_ok=True)


# Going back, and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 7, 500])
def test_a_rollback_within_a_recorder_leaves_no_mixture(path, every):
  states = dict(train(watched(), 150))
  with clipjax.runs.Recorder(path, every=every) as recorder:
    for step in range(1, 151):
      recorder.push(step, states[step], loss=1.0)
    for step, state in train(watched(), 30, states[100], first=101):
      recorder.push(step, state, loss=2.0)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 131)]
  assert run["loss"].tolist() == [1] * 100 + [2] * 30 and run["grad/norm"] == norms_of(run.steps)
  assert len(rows_of(path)) == 180  # What was superseded stays in the file.


def test_a_rollback_of_a_run_without_an_optimizer(path):
  with clipjax.runs.Recorder(path, every=4) as recorder:
    for step in [*range(20), *range(10, 15)]:
      recorder.push(step, None, loss=float(step))
      if step % 5 == 0:
        recorder.push(step, None, val_loss=1.0)
  assert clipjax.runs.read_run(path).steps.tolist() == [*range(15)]


@pytest.mark.parametrize("has_state", [True, False])
def test_a_late_evaluation_is_added_to_its_step(path, has_state):
  with clipjax.runs.Recorder(path, every=4) as recorder:
    for step, state in train(watched(), 20):
      recorder.push(step, state if has_state else None, loss=float(step))
      if step % 5 == 0:
        recorder.push(step - 4, None, val_loss=float(step))
  with clipjax.runs.Recorder(path) as recorder:  # A program that evaluates checkpoints afterwards.
    if has_state:
      recorder.push(2, None, val_loss=2.0)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 21)] and run["loss"].tolist() == [*range(1, 21)]
  late = {1: 5, 6: 10, 11: 15, 16: 20} | ({2: 2} if has_state else {})
  assert {int(s): v for s, v in zip(run.steps, run["val_loss"].tolist(), strict=True) if v == v} == late  # noqa: PLR0124


def test_a_new_optimizer_state_does_not_hide_the_steps_before(path):
  with clipjax.runs.Recorder(path) as recorder:
    for step, state in train(watched(), 260):
      recorder.push(step, state)
  with clipjax.runs.Recorder(path) as recorder:  # Parameters restored, the optimizer made anew.
    for step, state in train(watched(), 200):
      recorder.push(260 + step, state)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 461)]
  assert run["update"].tolist() == [*range(1, 261), *range(1, 201)]


def test_a_fresh_run_over_an_old_one_is_told(path):
  record(path, watched(), 30)
  recorder = clipjax.runs.Recorder(path)
  for step, state in train(watched(), 10):
    recorder.push(step, state, loss=5.0)
  assert warnings_of(recorder.close) == [
    "`path` should be a new file for a new run, got one of the steps 1 to 30, and a run that begins at "
    "step 1: read_run will show the new run alone. The old rows stay in the file; name another file to keep both apart."
  ]
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 11)] and run["loss"].tolist() == [5] * 10
  assert len(rows_of(path)) == 40


def test_a_file_of_0_1_0_goes_on(path):
  rows = [{"clipjax_run": 1, "version": "0.1.0", "started": 1.0, "leaves": {"grad": ["b", "w"]}, "every": 50}]
  rows += [{"step": i, "time": float(i), "grad/norm": 13.0 * i, "user_step": i - 1} for i in range(1, 9)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with clipjax.runs.Recorder(path) as recorder:
    for step, state in train(watched(), 3, dict(train(watched(), 6))[6], first=7):
      recorder.push(step, state)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 10)] and run["grad/norm"] == norms_of(run.steps)
  assert np.isfinite(run["update"]).tolist() == [False] * 6 + [True] * 3


# The ring -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1000])
def test_rows_of_a_ring_are_numbered_back_from_their_push(path, first):
  with clipjax.runs.Recorder(path) as recorder:
    for update, state in train(watched(history=8), 24):
      if update % 8 == 0:
        recorder.push(first + update - 1, state)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(first, first + 24)] and run["grad/norm"] == norms_of(np.arange(1, 25))


def test_steps_that_are_examples_stand_evenly_between_two_pushes(path):
  with clipjax.runs.Recorder(path) as recorder:
    for update, state in train(watched(history=8), 24):
      if update % 8 == 1:
        recorder.push(64 * update, state)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(64, 64 * 18, 64)] and run["grad/norm"] == norms_of(run.steps / 64)


def test_steps_that_count_scans_have_no_number_for_the_updates_between(path):
  recorder = clipjax.runs.Recorder(path)
  for update, state in train(watched(history=8), 24):
    if update % 8 == 0:
      recorder.push(update // 8, state)
  (told,) = warnings_of(recorder.close)
  assert told == (
    "`step` must grow at least as fast as the updates, got 1 and 2 for 8 updates: the norms between them have no "
    "number and are not recorded; push the number of the last update."
  )
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [0, 1, 2, 3] and run["grad/norm"] == norms_of([7, 8, 16, 24])


def test_a_ring_within_multi_steps(path):
  with clipjax.runs.Recorder(path) as recorder:
    for micro, state in train(optax.MultiSteps(watched(history=8), 2), 40):
      if micro % 10 == 0:
        recorder.push(micro, state)
  run = clipjax.runs.read_run(path)
  assert run.steps[4:].tolist() == [*range(10, 41, 2)]
  assert run["grad/norm"][4:] == norms_of(run.steps[4:] - 0.5)


def test_a_rollback_with_a_ring_supersedes_what_the_ring_replaces(path):
  states = dict(train(watched(history=8), 30))
  with clipjax.runs.Recorder(path, every=2) as recorder:
    for step in (8, 16, 24, 30):
      recorder.push(step, states[step], loss=1.0)
    for step, state in train(watched(history=8), 8, states[20], first=121):
      if step in (124, 128):
        recorder.push(step - 100, state, loss=2.0)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 29)]
  assert run["grad/norm"] == norms_of([*range(1, 21), *range(121, 129)])
  assert np.isnan(run["loss"][20:23]).all() and run["loss"][[23, 27]].tolist() == [2, 2]


@pytest.mark.parametrize("every", [1, 5, 50])
def test_a_rollback_between_pushes_with_a_ring_leaves_no_mixture(path, every):
  states = dict(train(watched(history=16), 150))
  with clipjax.runs.Recorder(path, every=every) as recorder:
    for step in range(5, 150, 10):
      recorder.push(step, states[step], loss=1.0)
    for step, state in train(watched(history=16), 30, states[100], first=201):
      if step % 10 == 0:
        recorder.push(step - 100, state, loss=2.0)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 131)] and run.superseded == 45
  assert run["grad/norm"] == norms_of([*range(1, 101), *range(201, 231)])
  assert np.flatnonzero(run["loss"] == 1).max() == 94


def test_a_pool_of_threads_goes_back_once(path):
  with clipjax.runs.Recorder(path, every=3) as recorder, ThreadPoolExecutor(4) as pool:
    for steps, loss in ((range(151), 1.0), (range(101, 131), 2.0)):
      list(pool.map(lambda step: recorder.push(step, None, loss=loss), steps))  # noqa: B023
  run = clipjax.runs.read_run(path)
  assert {*range(131)} <= {*run.steps.tolist()} and (run["loss"][101:131] == 2).all()


# Several optimizers ---------------------------------------------------------------------------------------------------


def gan(alike):
  """States of two optimizers after each step: norms 13 i, and 5 i."""
  other = PARAMS if alike else {"v": jnp.array([3.0, 4.0])}
  first, second = watched(), watched()
  states = [first.init(PARAMS), second.init(other)]
  for step in range(1, 5):
    states[0] = first.update(grads_of(step), states[0], PARAMS)[1]
    small = jax.tree.map(lambda x: x * step * (5 / 13 if alike else 1), other)  # noqa: B023
    states[1] = second.update(small, states[1], other)[1]
    yield step, *states


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("every", [1, 2, 50])
def test_two_optimizers_of_one_name_have_names_of_their_own(path, alike, every):
  recorder = clipjax.runs.Recorder(path, every=every)

  def push():
    for step, generator, critic in gan(alike):
      recorder.push(step, generator, loss=1.0)
      recorder.push(step, critic, critic_loss=2.0)
    recorder.close()

  assert warnings_of(push) == [
    "`opt_state` must be of one optimizer, or have names of its own, got a second one with 'grad' for step 1: it is "
    "recorded as 'grad_2'; give its clips and watches another name, as in watch(name=\"critic\")."
  ]
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [1, 2, 3, 4] and run["critic_loss"].tolist() == [2] * 4
  assert run["grad/norm"] == norms_of(run.steps) and run["grad_2/norm"] == norms_of(run.steps, 5.0)
  assert run.leaves["grad"] == ("b", "w") and run.leaves["grad_2"] == (("b", "w") if alike else ("v",))
  steps, norms = run.vectors["grad_2/norm"]
  assert steps[0] == 1 and norms.shape[1] == len(run.leaves["grad_2"])


def turns(kind):
  """Pushes of two optimizers of one name: (step, 0 or 1, its update)."""
  if kind == "in turn":
    return [(step, step % 2, step // 2 + 1) for step in range(20)]
  if kind == "five times as often":  # The second one first.
    return [item for step in range(1, 9) for item in ((step, 1, 5 * step), (step, 0, step))]
  return [(step, 1, step + 1) if i else (step, 0, step // 5 + 1) for step in range(20) for i in range(step % 5 > 0, 2)]


@pytest.mark.parametrize(
  ("kind", "alike"),
  [
    ("in turn", False), ("in turn", True), ("five times as often", False), ("five times as often", True),
    ("at every fifth step", False),  # Of one structure nothing would tell them apart there, but for their names.
  ],
)  # fmt: skip
def test_two_optimizers_that_are_pushed_at_other_steps_are_told_apart(path, kind, alike):
  trees = [PARAMS, PARAMS if alike else {"v": jnp.array([3.0, 4.0])}]
  tx = watched()
  states = [dict(train_by(tx, tree, [13.0, 5.0][i], 60)) for i, tree in enumerate(trees)]
  recorder = clipjax.runs.Recorder(path, every=7)

  def push():
    for step, which, update in turns(kind):
      recorder.push(step, states[which][update], **{f"loss_{which}": float(update)})
    recorder.close()

  (told,) = warnings_of(push)
  assert "got a second one with 'grad' for step" in told
  run = clipjax.runs.read_run(path)
  first, second = ("grad_2", "grad") if kind == "five times as often" else ("grad", "grad_2")
  for which, name in enumerate((first, second)):
    pushed = {step: update for step, other, update in turns(kind) if other == which}
    want = [[13.0, 5.0][which] * pushed[step] if step in pushed else np.nan for step in run.steps.tolist()]
    np.testing.assert_allclose(run[f"{name}/norm"], want, rtol=1e-6)


def train_by(tx, tree, norm, steps):
  """The states of an optimizer whose norm is so many times the number of the step."""
  state, update, size = tx.init(tree), jax.jit(tx.update), float(clipjax.global_norm(tree))
  for step in range(1, steps + 1):
    _, state = update(jax.tree.map(lambda x: x * (norm * step / size), tree), state, tree)  # noqa: B023
    yield step, state


def test_a_step_that_is_tried_again_replaces_what_it_was(path):
  tx = watched()
  states = dict(train(tx, 60))
  bad = tx.update(grads_of(jnp.nan), states[49], PARAMS)[1]
  with clipjax.runs.Recorder(path, every=7) as recorder:
    for step in range(1, 50):
      recorder.push(step, states[step], loss=1.0)
    recorder.push(50, bad, loss=jnp.nan, old=1.0)
    for step in range(50, 61):
      recorder.push(step, states[step], loss=2.0)
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 61)] and run["grad/norm"] == norms_of(run.steps)
  assert run["loss"].tolist() == [1] * 49 + [2] * 11 and not run.flags and "old" not in run
  assert not any("_2" in key for key in run.columns) and run.superseded == 1


def test_a_step_that_is_tried_again_as_the_next_one_goes_on(path):
  tx = watched()
  states = dict(train(tx, 60))
  bad = tx.update(grads_of(jnp.nan), states[49], PARAMS)[1]
  with clipjax.runs.Recorder(path) as recorder:
    for step in range(1, 50):
      recorder.push(step, states[step])
    recorder.push(50, bad)
    recorder.push(51, states[50])
  run = clipjax.runs.read_run(path)
  assert run["grad/norm"][-1] == pytest.approx(650) and "grad_2/norm" not in run


def test_the_leaves_of_each_optimizer_are_due_in_turn(path):
  first, second = clipjax.watch(), clipjax.watch(name="critic")
  (_, one), *_ = train(first, 1)
  (_, other), *_ = train(second, 1)
  with clipjax.runs.Recorder(path, every=4) as recorder:
    for step in range(12):  # Two pushes a step: the fourth ones are always of the first.
      recorder.push(step, jax.tree.map(lambda x: x + step if x.shape == () and x.dtype == jnp.int32 else x, one))  # noqa: B023
      recorder.push(step, jax.tree.map(lambda x: x + step if x.shape == () and x.dtype == jnp.int32 else x, other))  # noqa: B023
  run = clipjax.runs.read_run(path)
  assert run.vectors["grad/norm"][0].tolist() == run.vectors["critic/norm"][0].tolist() == [0, 2, 4, 6, 8, 10]


def test_two_optimizers_pushed_together_or_under_names_are_silent(path):
  with clipjax.runs.Recorder(path) as recorder:
    for step, generator, critic in gan(alike=True):
      recorder.push(step, {"g": generator, "d": critic})
  run = clipjax.runs.read_run(path)
  assert run["grad/norm"] == norms_of(run.steps, 5.0) and run["grad_2/norm"] == norms_of(run.steps)  # "d" before "g".


def test_a_state_that_is_pushed_twice_for_a_step_is_itself(path):
  with clipjax.runs.Recorder(path, every=1) as recorder:
    for step, state in train(watched(), 3):
      recorder.push(step, state, loss=1.0)
      recorder.push(step, jax.tree.map(jnp.copy, state), val_loss=2.0)
  run = clipjax.runs.read_run(path)
  assert len(run) == 3 and not any("_2" in key for key in run.columns) and run["grad/norm"] == norms_of(run.steps)


def test_one_step_for_many_updates_is_told(path):
  recorder = clipjax.runs.Recorder(path)

  def push():
    for update, state in train(watched(), 20):
      recorder.push(update // 10, state, loss=float(update))
    recorder.close()

  assert warnings_of(push) == [
    "`step` must grow from update to update, got 0 for updates 1 and 2: of one step the last update alone is kept; "
    "push the number of the update, and an epoch as a scalar. Two optimizers are pushed together, as a dict of their "
    "states."
  ]
  assert clipjax.runs.read_run(path)["loss"].tolist() == [9, 19, 20]


# Findings -------------------------------------------------------------------------------------------------------------


def spiky(path, spikes, n=200, every=20, **options):
  """A run whose first norm is the largest, and whose leaf "b" makes spikes later; the steps with numbers by leaf."""
  tx = clipjax.watch()
  rng = np.random.default_rng(0)
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  with clipjax.runs.Recorder(path, every=every, **options) as recorder:
    for step in range(1, n + 1):
      scale = 1000.0 if step == 1 else float(rng.uniform(0.9, 1.1))
      grads = {"w": PARAMS["w"] * scale, "b": PARAMS["b"] * (30.0 if step in spikes else scale)}
      _, state = update(grads, state)
      recorder.push(step, state, loss=jnp.float32(spikes.get(step, 1.0)), batch=f"shard {step}")
  return clipjax.runs.read_run(path)


@pytest.mark.parametrize("every", [1, 20, 500])
def test_leaves_are_written_at_every_spike_though_the_first_norm_was_larger(path, every):
  run = spiky(path, {150: 1.0, 170: 1.0}, every=every)
  steps, values = run.vectors["grad/norm"]
  (report,) = [f for f in clipjax.runs.diagnose(run).findings if f.name == "spikes"]
  assert {150, 170} <= set(steps.tolist()) and report.steps == (150, 170) and report.leaves == ("b",)
  np.testing.assert_allclose(values[steps.tolist().index(150)][0], 12 * 30, rtol=1e-6)
  if every == 500:
    assert steps.tolist() == [1, 150, 170]


def test_leaves_are_written_where_the_loss_spikes(path):
  run = spiky(path, {}, every=500)
  path.unlink()
  assert run.vectors["grad/norm"][0].tolist() == [1]
  tx = clipjax.watch()
  with clipjax.runs.Recorder(path, every=500) as recorder:
    for step, state in train(tx, 200):
      recorder.push(step, state, loss=9.0 if step == 160 else 2.0)
  assert 160 in clipjax.runs.read_run(path).vectors["grad/norm"][0]


def leafy(path, change, n=200, every=500):
  """A run whose gradient of "b" `change` makes; what was found on the way."""
  tx, rng, seen = clipjax.watch(), np.random.default_rng(0), []
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  with clipjax.runs.Recorder(path, every=every, on_finding=seen.append) as recorder:
    for step in range(1, n + 1):
      scale = float(rng.uniform(0.9, 1.1))
      _, state = update({"w": 100 * scale * PARAMS["w"], "b": change(step) * scale * PARAMS["b"]}, state)
      recorder.push(step, state)
      if step % 50 == 0:
        recorder.flush()
  return clipjax.runs.read_run(path), seen


def test_a_leaf_that_dies_is_named_with_its_step(path):
  run, seen = leafy(path, lambda step: 0.0 if step >= 120 else 1.0)
  assert 120 in run.vectors["grad/norm"][0]
  run, seen = leafy(path.with_suffix(".more"), lambda step: 0.0 if step >= 120 else 1.0, 700, 100)
  report = clipjax.runs.diagnose(run)
  assert [(f.name, f.steps, f.leaves) for f in report if f.level != "INFO"] == [("zero-gradient", (120,), ("b",))]
  assert [(f.name, f.steps) for f in seen] == [("zero-gradient", (120,))]


def test_a_leaf_that_has_a_spike_of_its_own_gets_a_row_there(path):
  run, _ = leafy(path, lambda step: 100.0 if step == 150 else 1.0)
  assert run.vectors["grad/norm"][0].tolist() == [1, 150]


def test_a_finding_says_what_the_verdict_on_the_file_says_at_that_time(path):
  tx, told = clipjax.watch(), []
  state, update = tx.init(PARAMS), jax.jit(tx.update)

  def compare(finding):
    recorder.flush()
    told.append((finding, clipjax.runs.diagnose(clipjax.runs.read_run(path), warmup_steps=0)))

  rng = np.random.default_rng(0)
  with clipjax.runs.Recorder(path, every=10, on_finding=compare) as recorder:
    for step in range(1, 500):
      loss = 3 * np.exp(-step / 100) + 1 if step < 400 else 9.0
      _, state = update(PARAMS, state)
      recorder.push(step, state, loss=loss * rng.uniform(0.95, 1.05) + (8 if 200 <= step < 203 else 0))
  assert [(f.name, f.steps) for f, _ in told] == [("spikes", (200,)), ("diverged", (400,))]
  for finding, report in told:
    assert (finding.name, finding.level, finding.steps) in [(f.name, f.level, f.steps) for f in report]


def test_findings_are_told_once_a_kind_within_a_batch(path):
  seen = []
  run = spiky(path, {150: 1.0, 170: jnp.nan, 171: jnp.nan, 190: 1.0}, on_finding=lambda f: seen.append((len(seen), f)))
  names = [finding.name for _, finding in seen]
  assert sorted(names) == sorted(set(names)) == ["nonfinite-loss", "spikes"]
  report = {f.name: f for f in clipjax.runs.diagnose(run).findings}
  for _, finding in seen:
    assert finding.level == report[finding.name].level and set(finding.steps) <= set(report[finding.name].steps)
  spikes = next(f for _, f in seen if f.name == "spikes")
  assert spikes.steps == (150,) and spikes.leaves == ("b",) and "'shard 150'" in spikes.message


def test_a_finding_comes_within_a_batch_and_can_stop_the_run(path):
  class Stop(Exception):
    pass

  def stop(finding):
    raise Stop(finding.name)

  tx = clipjax.watch()
  recorder = clipjax.runs.Recorder(path, every=10, on_finding=stop)
  stopped = None
  for step, state in train(tx, 200):
    try:
      recorder.push(step, state, loss=jnp.float32(jnp.nan if step >= 55 else 1.0))
    except Stop as error:
      stopped = step, str(error)
      break
  recorder.close()
  assert stopped is not None and stopped[1] == "nonfinite-loss" and 60 <= stopped[0] <= 80
  assert clipjax.runs.read_run(path).steps.tolist() == [*range(1, stopped[0] + 1)]


def test_on_finding_and_limits_are_checked(path):
  assert message_of(TypeError, clipjax.runs.Recorder, path, on_finding=3) == (
    "`on_finding` must be a function of a Finding, got 3 (int): pass one, or None."
  )
  with pytest.raises(ValueError, match=r"`limits.spike_sigma` must be a number >= 0"):
    clipjax.runs.Recorder(path, limits=clipjax.runs.HealthLimits(spike_sigma=-1.0))
  assert not path.exists()
