"""Recorder: runs that go back or resume, several optimizers, and findings while the run goes on."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recording import PARAMS, after_a_step, record, recorded, rows_of, train, warnings_of, watched

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")


def norms_of(steps, scale=13.0):
  return pytest.approx(scale * np.asarray(steps, float), rel=1e-6, nan_ok=True)


# Going back, and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 7, 500])
def test_a_rollback_within_a_recorder_leaves_no_mixture(path, every):
  states = dict(train(watched(), 50))
  pushes = [(step, state, {"loss": 1.0}) for step, state in states.items()]
  pushes += [(step, state, {"loss": 2.0}) for step, state in train(watched(), 20, states[20], first=21)]
  run = recorded(path, pushes, every=every)
  assert run.steps.tolist() == [*range(1, 41)]
  assert run["loss"].tolist() == [1] * 20 + [2] * 20 and run["grad/norm"] == norms_of(run.steps)
  assert len(rows_of(path)) == 70  # What was superseded stays in the file.


def test_a_rollback_of_a_run_without_an_optimizer(path):
  pushes = []
  for step in [*range(20), *range(10, 15)]:
    pushes.append((step, None, {"loss": float(step)}))
    if step % 5 == 0:
      pushes.append((step, None, {"val_loss": 1.0}))
  assert recorded(path, pushes, every=4).steps.tolist() == [*range(15)]


@pytest.mark.parametrize("has_state", [True, False])
def test_a_late_evaluation_is_added_to_its_step(path, has_state):
  pushes = []
  for step, state in train(watched(), 20):
    pushes.append((step, state if has_state else None, {"loss": float(step)}))
    if step % 5 == 0:
      pushes.append((step - 4, None, {"val_loss": float(step)}))
  recorded(path, pushes, every=4)
  run = recorded(path, [(2, None, {"val_loss": 2.0})] if has_state else [])  # A program that evaluates checkpoints.
  assert run.steps.tolist() == [*range(1, 21)] and run["loss"].tolist() == [*range(1, 21)]
  late = {1: 5, 6: 10, 11: 15, 16: 20} | ({2: 2} if has_state else {})
  assert {int(s): v for s, v in zip(run.steps, run["val_loss"].tolist(), strict=True) if v == v} == late  # noqa: PLR0124


def test_a_new_optimizer_state_does_not_hide_the_steps_before(path):
  recorded(path, train(watched(), 60))
  # Parameters restored, the optimizer made anew.
  run = recorded(path, [(60 + step, state) for step, state in train(watched(), 40)])
  assert run.steps.tolist() == [*range(1, 101)]
  assert run["update"].tolist() == [*range(1, 61), *range(1, 41)]


def test_a_fresh_run_over_an_old_one_is_reported(path):
  record(path, watched(), 30)
  assert warnings_of(lambda: record(path, watched(), 10)) == [
    "`path` should be a new file for a new run, got one with steps 1 to 30 and a run that begins at "
    "step 1: read_run will show only the new run. The old rows stay in the file; name another file to keep the runs "
    "apart."
  ]
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [*range(1, 11)] and run.superseded == 30 and len(rows_of(path)) == 40


def test_a_file_of_0_1_0_is_continued(path):
  rows = [{"clipjax_run": 1, "version": "0.1.0", "started": 1.0, "leaves": {"grad": ["b", "w"]}, "every": 50}]
  rows += [{"step": i, "time": float(i), "grad/norm": 13.0 * i, "user_step": i - 1} for i in range(1, 9)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  run = recorded(path, train(watched(), 3, dict(train(watched(), 6))[6], first=7))
  assert run.steps.tolist() == [*range(1, 10)] and run["grad/norm"] == norms_of(run.steps)
  assert np.isfinite(run["update"]).tolist() == [False] * 6 + [True] * 3


# The ring -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1000])
def test_rows_of_a_ring_are_numbered_back_from_their_push(path, first):
  states = train(watched(history=8), 24)
  run = recorded(path, [(first + update - 1, state) for update, state in states if update % 8 == 0])
  assert run.steps.tolist() == [*range(first, first + 24)] and run["grad/norm"] == norms_of(np.arange(1, 25))


def test_steps_that_are_examples_stand_evenly_between_two_pushes(path):
  states = train(watched(history=8), 24)
  run = recorded(path, [(64 * update, state) for update, state in states if update % 8 == 1])
  assert run.steps.tolist() == [*range(64, 64 * 18, 64)] and run["grad/norm"] == norms_of(run.steps / 64)


def test_steps_that_count_scans_have_no_number_for_the_updates_between(path):
  pushes = [(update // 8, state) for update, state in train(watched(history=8), 24) if update % 8 == 0]
  assert warnings_of(lambda: recorded(path, pushes)) == [
    "`step` must grow at least as fast as the updates, got 1 and 2 for 8 updates: the norms in between have no "
    "number and are not recorded; push the number of the last update."
  ]
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [0, 1, 2, 3] and run["grad/norm"] == norms_of([7, 8, 16, 24])


def test_a_ring_within_multi_steps(path):
  states = train(optax.MultiSteps(watched(history=8), 2), 40)
  run = recorded(path, [(micro, state) for micro, state in states if micro % 10 == 0])
  assert run.steps[4:].tolist() == [*range(10, 41, 2)]
  assert run["grad/norm"][4:] == norms_of(run.steps[4:] - 0.5)


@pytest.mark.parametrize("every", [1, 5, 50])
def test_a_rollback_between_pushes_with_a_ring_supersedes_what_the_ring_replaces(path, every):
  states = dict(train(watched(history=16), 80))
  pushes = [(step, states[step], {"loss": 1.0}) for step in range(5, 80, 10)]
  others = train(watched(history=16), 30, states[40], first=201)
  pushes += [(step - 160, state, {"loss": 2.0}) for step, state in others if step % 10 == 0]
  run = recorded(path, pushes, every=every)
  assert run.steps.tolist() == [*range(1, 71)] and run.superseded == 35
  assert run["grad/norm"] == norms_of([*range(1, 41), *range(201, 231)])
  losses = dict(zip(run.steps.tolist(), run["loss"].tolist(), strict=True))
  assert {step: loss for step, loss in losses.items() if loss == loss} == (  # noqa: PLR0124
    dict.fromkeys((5, 15, 25, 35), 1) | dict.fromkeys((50, 60, 70), 2)
  )


def test_a_pool_of_threads_goes_back_once(path):
  with clipjax.runs.Recorder(path, every=3) as recorder, ThreadPoolExecutor(4) as pool:
    for steps, loss in ((range(151), 1.0), (range(101, 131), 2.0)):
      list(pool.map(lambda step: recorder.push(step, None, loss=loss), steps))  # noqa: B023
  run = clipjax.runs.read_run(path)
  assert {*range(131)} <= {*run.steps.tolist()} and (run["loss"][101:131] == 2).all()


# Several optimizers ---------------------------------------------------------------------------------------------------


def train_by(tx, tree, norm, steps):
  """The states of an optimizer whose norm is so many times the number of the step."""
  state, update, size = tx.init(tree), jax.jit(tx.update), float(clipjax.global_norm(tree))
  for step in range(1, steps + 1):
    _, state = update(jax.tree.map(lambda x: x * (norm * step / size), tree), state, tree)  # noqa: B023
    yield step, state


def two(alike, steps):
  """The states of two optimizers by step: norms 13 times the step, and 5 times."""
  other = PARAMS if alike else {"v": jnp.array([3.0, 4.0])}
  return dict(train_by(watched(), PARAMS, 13.0, steps)), dict(train_by(watched(), other, 5.0, steps))


@pytest.mark.parametrize(("every", "alike"), [(1, True), (2, False), (50, True), (50, False)])
def test_two_optimizers_of_one_name_have_names_of_their_own(path, alike, every):
  generator, critic = two(alike, 4)
  pushes = []
  for step in range(1, 5):
    pushes += [(step, generator[step], {"loss": 1.0}), (step, critic[step], {"critic_loss": 2.0})]
  assert warnings_of(lambda: recorded(path, pushes, every=every)) == [
    "`opt_state` must come from one optimizer, or use its own names, got a second one with 'grad' for step 1: it is "
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
    ("at every fifth step", False),  # With the same structure, only their names could tell them apart.
  ],
)  # fmt: skip
def test_two_optimizers_that_are_pushed_at_other_steps_are_told_apart(path, kind, alike):
  states = two(alike, 60)
  pushes = [(step, states[which][update], {f"loss_{which}": float(update)}) for step, which, update in turns(kind)]
  (told,) = warnings_of(lambda: recorded(path, pushes, every=7))
  assert "got a second one with 'grad' for step" in told
  run = clipjax.runs.read_run(path)
  first, second = ("grad_2", "grad") if kind == "five times as often" else ("grad", "grad_2")
  for which, name in enumerate((first, second)):
    pushed = {step: update for step, other, update in turns(kind) if other == which}
    want = [(13.0, 5.0)[which] * pushed[step] if step in pushed else np.nan for step in run.steps.tolist()]
    np.testing.assert_allclose(run[f"{name}/norm"], want, rtol=1e-6)


@pytest.mark.parametrize("is_next", [False, True])
def test_a_step_that_is_tried_again_replaces_what_it_was_or_goes_on_as_the_next(path, is_next):
  states = dict(train(watched(), 30))
  ((_, bad),) = train(watched(), [jnp.nan], states[19])
  pushes = [(step, states[step], {"loss": 1.0}) for step in range(1, 20)]
  pushes.append((20, bad, {"loss": jnp.nan, "old": 1.0}))
  pushes += [(step + is_next, states[step], {"loss": 2.0}) for step in range(20, 31)]
  run = recorded(path, pushes, every=7)
  assert run.steps.tolist() == [*range(1, 31 + is_next)] and run.superseded == (not is_next)
  assert run["loss"].tolist()[19 + is_next :] == [2] * 11 and run["loss"].tolist()[:19] == [1] * 19
  norms = [*range(1, 20), *([np.nan] if is_next else []), *range(20, 31)]
  assert run["grad/norm"] == norms_of(norms) and not any("_2" in key for key in run.columns)
  assert bool(run.flags) == ("old" in run) == is_next


def test_the_leaves_of_each_optimizer_are_due_in_turn(path):
  first, second = (after_a_step(clipjax.watch(name=name)) for name in ("grad", "critic"))

  def at(state, step):
    return jax.tree.map(lambda x: x + step if x.shape == () and x.dtype == jnp.int32 else x, state)

  # Two pushes per step: every fourth push is one of the first optimizer.
  run = recorded(path, [(step, at(state, step)) for step in range(12) for state in (first, second)], every=4)
  assert run.vectors["grad/norm"][0].tolist() == run.vectors["critic/norm"][0].tolist() == [0, 2, 4, 6, 8, 10]


def test_two_optimizers_pushed_together_or_under_names_are_silent(path):
  generator, critic = two(True, 4)
  run = recorded(path, [(step, {"g": generator[step], "d": critic[step]}) for step in generator])
  assert run["grad/norm"] == norms_of(run.steps, 5.0) and run["grad_2/norm"] == norms_of(run.steps)  # "d" before "g".


def test_one_step_for_many_updates_is_reported(path):
  pushes = [(update // 10, state, {"loss": float(update)}) for update, state in train(watched(), 20)]
  assert warnings_of(lambda: recorded(path, pushes)) == [
    "`step` must increase with every update, got 0 for updates 1 and 2: only the last update of a step is kept; "
    "push the number of the update as `step`, and an epoch as a scalar. Push two optimizers together, as a dict of "
    "their states."
  ]
  assert clipjax.runs.read_run(path)["loss"].tolist() == [9, 19, 20]


# Findings -------------------------------------------------------------------------------------------------------------


def uneven(path, scales, losses=None, *, n=200, flush=50, **options):
  """A run in whose steps the gradients of "w" and "b" are scaled, with some noise, by `scales(step)`."""
  rng, tx = np.random.default_rng(0), clipjax.watch()
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  with clipjax.runs.Recorder(path, **options) as recorder:
    for step in range(1, n + 1):
      w, b = np.multiply(scales(step), rng.uniform(0.9, 1.1))
      _, state = update({"w": PARAMS["w"] * w, "b": PARAMS["b"] * b}, state)
      loss = {} if losses is None else {"loss": jnp.float32(losses.get(step, 1.0))}
      recorder.push(step, state, batch=f"shard {step}", **loss)
      if step % flush == 0:
        recorder.flush()
  return clipjax.runs.read_run(path)


def spiky(path, spikes, **options):
  """A run whose first norm is the largest, and whose leaf "b" makes spikes later, with these losses."""
  scales = lambda step: (1000.0, 1000.0) if step == 1 else (1.0, 30.0 if step in spikes else 1.0)  # noqa: E731
  return uneven(path, scales, spikes, flush=1000, **options)


@pytest.mark.parametrize("every", [1, 20, 500])
def test_leaves_are_written_at_every_spike_though_the_first_norm_was_larger(path, every):
  run = spiky(path, {150: 1.0, 170: 1.0}, every=every)
  steps, values = run.vectors["grad/norm"]
  (report,) = [f for f in clipjax.runs.diagnose(run).findings if f.name == "spikes"]
  assert {150, 170} <= set(steps.tolist()) and report.steps == (150, 170) and report.leaves == ("b",)
  np.testing.assert_allclose(values[steps.tolist().index(150)][0], 12 * 30, rtol=0.1)
  if every == 500:
    assert steps.tolist() == [1, 150, 170]


def test_leaves_are_written_where_the_loss_spikes(path):
  run = uneven(path, lambda step: (1.0, 1.0), {160: 9.0}, every=500)
  assert run.vectors["grad/norm"][0].tolist() == [1, 160]


def test_a_leaf_that_dies_is_named_with_its_step(path):
  dies, seen = (lambda step: (100.0, 0.0 if step >= 120 else 1.0)), []
  assert 120 in uneven(path, dies, every=500).vectors["grad/norm"][0]
  run = uneven(path.with_suffix(".more"), dies, n=700, every=100, on_finding=seen.append)
  report = clipjax.runs.diagnose(run)
  assert [(f.name, f.steps, f.leaves) for f in report if f.level != "INFO"] == [("zero-gradient", (120,), ("b",))]
  assert [(f.name, f.steps) for f in seen] == [("zero-gradient", (120,))]


def test_a_leaf_that_has_a_spike_of_its_own_gets_a_row_there(path):
  run = uneven(path, lambda step: (100.0, 100.0 if step == 150 else 1.0), every=500)
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


def test_findings_are_reported_once_per_kind_within_a_batch(path):
  seen = []
  run = spiky(path, {150: 1.0, 170: jnp.nan, 171: jnp.nan, 190: 1.0}, every=20, on_finding=seen.append)
  names = [finding.name for finding in seen]
  assert sorted(names) == sorted(set(names)) == ["nonfinite-loss", "spikes"]
  report = {f.name: f for f in clipjax.runs.diagnose(run).findings}
  for finding in seen:
    assert finding.level == report[finding.name].level and set(finding.steps) <= set(report[finding.name].steps)
  spikes = next(f for f in seen if f.name == "spikes")
  assert spikes.steps == (150,) and spikes.leaves == ("b",) and "'shard 150'" in spikes.message


def test_a_finding_comes_within_a_batch_and_can_stop_the_run(path):
  def stop(finding):
    raise RuntimeError(finding.name)

  reached = []

  def loop():
    with clipjax.runs.Recorder(path, every=10, on_finding=stop) as recorder:
      for step, state in train(clipjax.watch(), 200):
        reached.append(step)
        recorder.push(step, state, loss=jnp.float32(jnp.nan if step >= 55 else 1.0))

  with pytest.raises(RuntimeError, match="nonfinite-loss"):
    loop()
  assert 60 <= len(reached) <= 80 and clipjax.runs.read_run(path).steps.tolist() == reached
