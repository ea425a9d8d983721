"""`suggest_max_norm`: the formula, which norms it is applied to, what it says, and what it refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from synthetic import healthy, run_of

import clipjax
from clipjax.runs import suggest
from clipjax.state_search import optimizer_states

NORMS = np.exp(np.random.default_rng(0).normal(1, 0.4, 500))
typical = NORMS[50:]


def test_the_formula_is_p90_and_for_another_rate_a_budget_of_p75():
  p75, p90 = np.percentile(typical, [75, 90])
  assert clipjax.runs.suggest_max_norm(NORMS).max_norm == p90
  other = clipjax.runs.suggest_max_norm(NORMS, learning_rate=0.3, new_learning_rate=1.2)
  assert other.max_norm == pytest.approx(p75 / 4)
  assert 0.3 * p75 == pytest.approx(1.2 * other.max_norm)  # The bound on the step of SGD stays.
  assert clipjax.runs.suggest_max_norm(NORMS, learning_rate=1, new_learning_rate=1).max_norm == p90


def test_a_scale_free_optimizer_gets_a_guard_above_the_typical_norm():
  found = clipjax.runs.suggest_max_norm(NORMS, scale_free=True)
  assert found.max_norm == pytest.approx(2 * np.percentile(typical, 90))
  assert 0 < found.clip_fraction < 0.1
  same = clipjax.runs.suggest_max_norm(NORMS, scale_free=True, learning_rate=1e-3, new_learning_rate=1e-2)
  assert same.max_norm == found.max_norm
  # A few poisoned batches leave it where it was, and are clipped.
  poisoned = NORMS.copy()
  poisoned[60::50] = 1e4
  guard = clipjax.runs.suggest_max_norm(poisoned, scale_free=True).max_norm
  assert found.max_norm <= guard < 1.2 * found.max_norm


def test_shares_and_alternatives_are_those_of_the_recorded_norms():
  found = clipjax.runs.suggest_max_norm(NORMS, learning_rate=1.0, new_learning_rate=1.5)
  assert found.clip_fraction == (typical > found.max_norm).mean()
  want = [(p, (typical > p).mean()) for p in np.percentile(typical, [50, 75, 90, 99])]
  assert [tuple(pair) for pair in found.alternatives] == want


@pytest.mark.parametrize(
  "norms",
  [list(NORMS), tuple(NORMS), NORMS, jnp.asarray(NORMS), jnp.asarray(NORMS, jnp.bfloat16), NORMS.astype(np.float16)],
  ids=["list", "tuple", "numpy", "jax", "bfloat16", "float16"],
)
def test_any_sequence_of_norms_will_do(norms):
  assert clipjax.runs.suggest_max_norm(norms).max_norm == pytest.approx(np.percentile(typical, 90), rel=1e-2)


def test_whole_numbers_will_do():
  assert clipjax.runs.suggest_max_norm(range(1, 101), warmup_steps=0).max_norm == pytest.approx(90.1)


def test_warm_up_and_norms_that_are_not_finite_are_left_out_and_said():
  norms = np.concatenate([np.full(30, 1e9), typical[:270]])
  norms[[40, 50]] = np.inf, np.nan
  found = clipjax.runs.suggest_max_norm(norms)
  want = norms[30:][np.isfinite(norms[30:])]
  assert found.max_norm == np.percentile(want, 90)
  assert "90th percentile of 268 norms (the 30 of the warm-up and 2 nonfinite left out)" in found.reason
  assert clipjax.runs.suggest_max_norm(norms, warmup_steps=0).max_norm > 1e6
  assert "diverged" not in found.reason


def test_a_run_gives_its_raw_norms():
  columns = healthy()
  run = run_of(columns)
  want = np.percentile(columns["grad/norm"][40:], 90)
  assert clipjax.runs.suggest_max_norm(run).max_norm == want  # And not of grad/norm_clipped.
  critic = {"critic/norm": columns["grad/norm"] * 2, "skip/norm": columns["grad/norm"]}
  assert clipjax.runs.suggest_max_norm(run_of(critic)).max_norm == 2 * want
  assert clipjax.runs.suggest_max_norm(run_of({"skip/norm": columns["grad/norm"]})).max_norm == want


def test_few_norms_are_told():
  found = clipjax.runs.suggest_max_norm([1.0, 2.0, 3.0])
  assert "fewer than 20 norms, too few to rely on" in found.reason
  assert "too few" not in clipjax.runs.suggest_max_norm(NORMS).reason


def diverged(found):
  return "But the run diverged" in found.reason and "no base for a threshold" in found.reason


def test_norms_of_a_run_that_diverged_are_told_to_be_no_base():
  rising = NORMS * np.exp(np.linspace(0, 8, 500))
  assert diverged(clipjax.runs.suggest_max_norm(rising))
  assert "its norms rose from" in clipjax.runs.suggest_max_norm(rising).reason
  broken = np.where(np.arange(500) % 10 == 3, np.nan, NORMS)
  assert "10% of its norms are not finite" in clipjax.runs.suggest_max_norm(broken).reason
  ended = np.append(NORMS, np.inf)
  assert "its last norm is not finite" in clipjax.runs.suggest_max_norm(ended).reason
  early = np.where(np.arange(500) < 30, 1, 1e4)  # Level after the warm-up.
  assert diverged(clipjax.runs.suggest_max_norm(early))
  losses = healthy(loss=np.where(np.arange(400) < 5, 4.8, 265.0))
  assert "its loss rose from 4.8 to 265" in clipjax.runs.suggest_max_norm(run_of(losses)).reason


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_went_well_is_not_called_diverged(seed):
  assert not diverged(clipjax.runs.suggest_max_norm(run_of(healthy(seed)), scale_free=True))


def test_the_families_of_models():
  norms = np.full(100, 1.5)
  for model, place in (("Transformer", "inside"), ("cnn", "inside"), ("rnn", "above"), ("feed-forward", "below")):
    (note,) = [note for note in clipjax.runs.suggest_max_norm(norms, model=model).notes if "rule of thumb" in note]
    low, high = suggest.FAMILIES[model.lower()]
    assert f"({model.lower()}) is {low:g} to {high:g}, and 1.5 lies {place}." in note
  assert "rule of thumb" not in str(clipjax.runs.suggest_max_norm(norms))


def test_the_text_has_number_reason_alternatives_and_sources():
  found = clipjax.runs.suggest_max_norm(NORMS, learning_rate=0.1, new_learning_rate=1.0, model="rnn")
  text = str(found)
  lines = text.splitlines()
  assert lines[0] == f"max_norm = {found.max_norm:.3g}"
  assert " ".join(found.reason.split()) in " ".join(text.split())
  for name, value in zip(("p50", "p75", "p90", "p99"), found.alternatives, strict=True):
    assert [name, f"{value[0]:.3g}", f"{100 * value[1]:.3g}%"] in [line.split() for line in lines]
  assert ["suggested", f"{found.max_norm:.3g}", "100%"] in [line.split() for line in lines]
  mean = typical.mean()
  assert f"here {mean / 2:.3g} to {mean * 10:.3g}, and {found.max_norm:.3g} lies below." in " ".join(text.split())
  assert "extremely aggressive" in text  # It clips more than half.
  assert "extremely aggressive" not in str(clipjax.runs.suggest_max_norm(NORMS))
  assert "tuning playbook" in text and "Pascanu" in text
  assert max(map(len, lines)) <= 100


def test_the_rules_of_others_are_for_the_rate_of_the_record():
  said = "Both are for the learning rate that the norms were recorded at."
  rates = {"learning_rate": 0.1, "new_learning_rate": 1.0}
  assert said_of(clipjax.runs.suggest_max_norm(NORMS, **rates), said)
  for options in ({}, {"learning_rate": 0.1, "new_learning_rate": 0.1}, {**rates, "scale_free": True}):
    assert not said_of(clipjax.runs.suggest_max_norm(NORMS, **options), said)


@pytest.mark.parametrize("value", [1e-300, 1e-30, 0.1, 2.0, 1e30, 1e300])
def test_equal_norms_give_that_norm_which_clips_nothing(value):
  found = clipjax.runs.suggest_max_norm(np.full(100, value))
  assert (found.max_norm, found.clip_fraction) == (value, 0.0)
  assert found.alternatives == ((value, 0.0),) * 4
  assert "nan" not in str(found)


BAD = {
  "path": (("run.jsonl",), TypeError, "a 1-D array of norms, got 'run.jsonl' (str): pass clipjax.runs.read_run(path)"),
  "strings": ((["a", "b"],), TypeError, "a 1-D array of norms, got a list: pass"),
  "ragged": (([[1.0], [1.0, 2.0]],), TypeError, "a 1-D array of norms, got a list: pass"),
  "None": ((None,), TypeError, "got a NoneType: pass"),
  "complex": ((np.ones(3, complex),), TypeError, "got a ndarray: pass"),
  "bool": (([True, False],), TypeError, "got a list: pass"),
  "2-D": ((np.ones((3, 2)),), ValueError, "a 1-D array of norms, got shape (3, 2): pass the norm of each step."),
  "number": ((3.0,), ValueError, "got shape (): pass"),
  "empty": (([],), ValueError, "got shape (0,): pass"),
  "negative": (([1.0, -2.0],), ValueError, "must be norms, which are >= 0, got -2 at index 1: pass norms"),
  "nonfinite": (([math.nan] * 9,), ValueError, "must have finite norms after the warm-up of 0 steps, got none of 9"),
  "zeros": (([0.0] * 95 + [1.0] * 5,), ValueError, "must have norms above 0, got 0 in 94.4% of 90"),
  "no norms": ((run_of({"loss": np.ones(30)}),), ValueError, "must have finite norms after the warm-up of 3 steps"),
}
BAD_OPTIONS = {
  "one rate": ({"learning_rate": 0.1}, ValueError, "must be given both or neither, got 0.1 and None: pass the rate"),
  "other rate": ({"new_learning_rate": 0.1}, ValueError, "must be given both or neither, got None and 0.1: pass"),
  "rate 0": ({"learning_rate": 0.0, "new_learning_rate": 1.0}, ValueError, "`learning_rate` must be > 0 and finite"),
  "rate nan": ({"learning_rate": 1, "new_learning_rate": math.nan}, ValueError, "`new_learning_rate` must be > 0"),
  "rate text": ({"learning_rate": "1", "new_learning_rate": 1}, TypeError, "`learning_rate` must be a number, got '1'"),
  "quotient": ({"learning_rate": 1e-300, "new_learning_rate": 1e300}, ValueError, "must give a threshold > 0 and fini"),
  "model": ({"model": "gan"}, ValueError, "feed-forward, cnn, rnn, lstm, transformer or None, got 'gan' (str): pass"),
  "scale": (
    {"scale_free": "adam"},
    TypeError,
    "`scale_free` must be True, False or None, got 'adam' (str): pass one of them.",
  ),
  "warm-up": ({"warmup_steps": 2.5}, TypeError, "`warmup_steps` must be a whole number or None, got 2.5 (float): pass"),
  "all warm-up": ({"warmup_steps": 500}, ValueError, "warm-up of 500 steps, got none of 500 (500 finite in all)"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_norms(case):
  args, kind, text = BAD[case]
  with pytest.raises(kind) as error:
    clipjax.runs.suggest_max_norm(*args, scale_free=False)
  assert str(error.value).startswith("`norms_or_run` must") and text in str(error.value)


def test_a_threshold_beyond_float64_is_no_fault_of_rates_that_were_not_given():
  with pytest.raises(ValueError, match=r"^`norms_or_run` must give a threshold > 0 and finite, got inf: look at the"):
    clipjax.runs.suggest_max_norm(np.full(100, 1.7e308), scale_free=True)


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_wrong_options(case):
  options, kind, text = BAD_OPTIONS[case]
  with pytest.raises(kind) as error:
    clipjax.runs.suggest_max_norm(NORMS, **options)
  assert text in str(error.value)


# The optimizer ------------------------------------------------------------------------------------------------------


def updates(tx, scale):
  """What an optimizer makes of some steps whose gradients are all scaled."""
  params = {"w": jnp.full((4, 4), 0.3), "b": jnp.ones(4)}
  state, rng = tx.init(params), np.random.default_rng(0)
  for _ in range(12):
    grads = jax.tree.map(lambda p: scale * (p + jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype)), params)
    out, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, out)
  return params, optimizer_states(state)


OPTIMIZERS = {
  "sgd": (lambda: optax.sgd(1e-5), False),
  "momentum": (lambda: optax.sgd(1e-5, momentum=0.9), False),
  "adam": (lambda: optax.adam(1e-2), True),
  "adamw": (lambda: optax.adamw(1e-2), True),
  "amsgrad": (lambda: optax.amsgrad(1e-2), True),
  "adan": (lambda: optax.adan(1e-2), True),
  "adabelief": (lambda: optax.adabelief(1e-2), True),
  "adadelta": (lambda: optax.adadelta(1.0, eps=1e-12), True),
  "adafactor": (lambda: optax.adafactor(1e-2), True),
  "adagrad": (lambda: optax.adagrad(1e-2, initial_accumulator_value=1e-8), True),
  "lion": (lambda: optax.lion(1e-2), True),
  "novograd": (lambda: optax.novograd(1e-2), True),
  "rmsprop": (lambda: optax.rmsprop(1e-2), True),
  "rmsprop, centered": (lambda: optax.rmsprop(1e-2, centered=True, momentum=0.9), True),
  "rmsprop, bias correction": (lambda: optax.rmsprop(1e-2, bias_correction=True), True),
  "rprop": (lambda: optax.rprop(1e-2), True),
  "sm3": (lambda: optax.sm3(1e-2), True),
  "muon": (lambda: optax.contrib.muon(1e-2), True),
  "schedule-free AdamW": (lambda: optax.contrib.schedule_free_adamw(1e-2), True),
  "schedule-free SGD": (lambda: optax.contrib.schedule_free_sgd(1e-5), False),
  "in MultiSteps": (lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_which_optimizers_divide_the_scale_out(name, standard_promotion):
  make, is_free = OPTIMIZERS[name]
  (small, states), (large, _) = updates(make(), 1.0), updates(make(), 100.0)
  moved = max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (small, large)), strict=True))
  far = float(jnp.abs(small["w"] - 0.3).max())
  assert (moved < 0.01 * far) == is_free  # It is what we say.
  run = dataclasses.replace(run_of(healthy()), optimizer=states)
  found = clipjax.runs.suggest_max_norm(run)
  assert found.scale_free == is_free
  assert ("The record says that the optimizer divides the scale" in str(found)) == is_free


def said_of(found, text):
  return any(text in note for note in found.notes)


def test_the_optimizer_is_that_of_the_record_unless_told():
  run = dataclasses.replace(run_of(healthy()), optimizer=("ScaleByLionState", "EmptyState"))
  found = clipjax.runs.suggest_max_norm(run)
  assert found == clipjax.runs.suggest_max_norm(run, scale_free=True)._replace(notes=found.notes)
  assert said_of(found, "(ScaleByLionState): pass scale_free=False")
  told = clipjax.runs.suggest_max_norm(run, scale_free=False)
  assert (told.scale_free, told.max_norm) == (False, found.max_norm / 2)
  sgd = clipjax.runs.suggest_max_norm(dataclasses.replace(run, optimizer=("TraceState",)))
  assert said_of(sgd, "The record has no such optimizer as Adam (TraceState): the number is for SGD")
  assert said_of(clipjax.runs.suggest_max_norm(NORMS), "The record does not say which optimizer it was")


def test_a_recorder_tells_the_optimizer(tmp_path, standard_promotion):
  tx = optax.chain(clipjax.clip_by_global_norm(1.0), optax.adam(1e-3))
  grads = {"w": jnp.array([3.0, 4.0])}
  state = tx.init(grads)
  with clipjax.runs.Recorder(tmp_path / "run.jsonl") as recorder:
    for step in range(25):
      _, state = tx.update(grads, state)
      recorder.push(step, state)
  found = clipjax.runs.suggest_max_norm(clipjax.runs.read_run(tmp_path / "run.jsonl"))
  assert (found.scale_free, found.max_norm) == (True, 10.0)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_states_of_this_package_tell_no_optimizer(momentum):
  rule = clipjax.rules.percentile(50.0, window=3)
  clips = [clipjax.watch(), clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(rule, name="leaf")]
  tx = clipjax.skip_steps(optax.chain(*clips, optax.sgd(0.1, momentum)), norm_rule=rule)
  want = () if momentum is None else ("TraceState",)
  assert optimizer_states(tx.init({"w": jnp.ones(2)})) == want


# Clips by leaf or group ---------------------------------------------------------------------------------------------


def blocks_of_run(clip, **options):
  """A recorded run with a clip by blocks; norms of the leaves a/w, a/b, b are 4, 3 and 1 times a random number."""
  rng, columns = np.random.default_rng(0), []
  grads = {"a": {"w": jnp.array([4.0]), "b": jnp.array([3.0])}, "b": jnp.array([1.0])}
  update = jax.jit(clip.update)
  state = clip.init(grads)
  for _ in range(120):
    scale = float(np.exp(rng.normal(0, 0.3)))
    _, state = update(jax.tree.map(lambda x: x * scale, grads), state)  # noqa: B023
    columns.append({key: float(x) for key, x in clipjax.metrics(state, per_leaf=True).items()})
  return clipjax.runs.Run.from_arrays({key: np.array([row[key] for row in columns]) for key in columns[0]}, **options)


def test_a_run_that_was_clipped_by_leaf_gets_numbers_by_leaf():
  run = blocks_of_run(clipjax.clip_by_leaf_norm(2.0))
  found = clipjax.runs.suggest_max_norm(run)
  assert found.max_norm == pytest.approx(math.sqrt(26) * found.thresholds["b"], rel=0.05)
  assert found.thresholds["a/w"] == pytest.approx(4 * found.thresholds["b"], rel=1e-5)
  (said,) = [note for note in found.notes if "this run was clipped by" in note]
  assert said.startswith("max_norm is for clip_by_global_norm, but this run was clipped by leaf or group.")
  assert f"{found.thresholds['a/w']:.3g} for 'a/w'" in said
  assert f"one number for all: {found.thresholds['a/w']:.3g}" in said
  # What is said can be done.
  tx = clipjax.clip_by_group_norm(found.thresholds, lambda path, leaf: path)
  tx.init({"a": {"w": jnp.ones(1), "b": jnp.ones(1)}, "b": jnp.ones(1)})


def test_a_recorded_clip_by_group_gets_a_dict_for_it(tmp_path):
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_group_norm(2.0, lambda path, leaf: path[0]))
  grads = {"a": {"w": jnp.array([4.0]), "b": jnp.array([3.0])}, "b": jnp.array([1.0])}
  state, update = tx.init(grads), jax.jit(tx.update)
  with clipjax.runs.Recorder(tmp_path / "run.jsonl") as recorder:
    for step in range(40):
      _, state = update(grads, state, grads)
      recorder.push(step, state)
  found = clipjax.runs.suggest_max_norm(clipjax.runs.read_run(tmp_path / "run.jsonl"), scale_free=True)
  assert found.thresholds == pytest.approx({"a": 10.0, "b": 2.0})
  assert said_of(found, "clipped by group. The same formula by group, in `thresholds`: 10 for 'a', 2 for 'b'.")
  assert said_of(found, "clip_by_group_norm takes these as they are.")


def test_groups_that_are_called_as_leaves_are(tmp_path):
  # A group "w" beside a leaf "w" of other entries: the numbers by group go by another name.
  groups = lambda path, leaf: "w" if path in ("w", "b") else "rest"  # noqa: E731
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_group_norm(2.0, groups))
  grads = {"w": jnp.array([4.0]), "b": jnp.array([3.0]), "c": jnp.array([1.0])}
  state, update = tx.init(grads), jax.jit(tx.update)
  with clipjax.runs.Recorder(tmp_path / "run.jsonl") as recorder:
    for step in range(40):
      _, state = update(grads, state, grads)
      recorder.push(step, state)
  run = clipjax.runs.read_run(tmp_path / "run.jsonl")
  assert "grad_group/norm/w" in run
  found = clipjax.runs.suggest_max_norm(run)
  assert found.thresholds == pytest.approx({"w": 5.0, "rest": 1.0})
  assert said_of(found, "this run was clipped by group.")


def test_too_few_norms_by_leaf_are_no_base_but_say_what_to_record(tmp_path):
  tx = clipjax.clip_by_leaf_norm(1.0)
  grads = {"w": jnp.array([3.0, 4.0])}
  state = tx.init(grads)
  for every, known in ((50, False), (5, True)):
    path = tmp_path / f"{every}.jsonl"
    with clipjax.runs.Recorder(path, every=every) as recorder:
      for step in range(150):
        _, state = tx.update(grads, state)
        recorder.push(step, state)
    found = clipjax.runs.suggest_max_norm(clipjax.runs.read_run(path))
    assert bool(found.thresholds) == known
    assert said_of(found, "clipped by leaf.")
    assert said_of(found, "too few for numbers: record them more often, Recorder(every=5).") != known


def test_a_global_clip_beside_a_watch_has_numbers_by_leaf_but_no_word_of_them():
  run = blocks_of_run(clipjax.watch())
  found = clipjax.runs.suggest_max_norm(run)
  assert set(found.thresholds) == {"a/w", "a/b", "b"}
  assert not said_of(found, "this run was clipped by")
  assert clipjax.runs.suggest_max_norm(NORMS).thresholds == {}


def test_a_leaf_without_a_gradient_gets_no_threshold():
  columns = healthy()
  vectors = np.stack([np.zeros(400), columns["grad/norm"]], 1)
  run = run_of(columns, leaves={"grad": ("dead", "w")}, vectors={"grad/norm": (np.arange(1, 401), vectors)})
  assert set(clipjax.runs.suggest_max_norm(run).thresholds) == {"w"}


def test_spikes_which_are_recorded_more_often_by_leaf_do_not_count():
  columns = healthy()
  columns["grad/norm"][[100, 200, 300, 350]] = 50.0
  rows = np.unique([*range(0, 400, 10), 100, 200, 300, 350])
  run = run_of(columns, leaves={"grad": ("w",)}, vectors={"grad/norm": (rows + 1, columns["grad/norm"][rows][:, None])})
  found = clipjax.runs.suggest_max_norm(run)
  assert found.thresholds["w"] == pytest.approx(found.max_norm, rel=0.15)


def test_many_leaves_are_a_range():
  names = tuple(f"w{i}" for i in range(30))
  columns = healthy()
  values = np.arange(1, 31) * columns["grad/norm"][:, None]
  vectors = {key: (np.arange(1, 401), values if key == "grad/norm" else values / values) for key in BY_LEAF}
  found = clipjax.runs.suggest_max_norm(run_of(columns, leaves={"grad": names}, vectors=vectors))
  low, high = found.thresholds["w0"], found.thresholds["w29"]
  assert said_of(found, f"in `thresholds`: {low:.3g} to {high:.3g}. clip_by_leaf_norm")


BY_LEAF = ("grad/norm", "grad/scale")

# What else is said --------------------------------------------------------------------------------------------------

RATES = {"learning_rate": 0.1, "new_learning_rate": 1.0}


def test_at_the_rate_of_the_record_a_clip_is_an_insurance():
  for options in ({}, {"scale_free": True}, {"learning_rate": 0.1, "new_learning_rate": 0.1}):
    assert said_of(clipjax.runs.suggest_max_norm(NORMS, **options), "may need no clip at all: there it is an insurance")
  assert not said_of(clipjax.runs.suggest_max_norm(NORMS, **RATES), "insurance")


def test_a_budget_says_what_to_try_first():
  assert (
    clipjax.runs.suggest_max_norm(NORMS, **RATES).notes[0].startswith("If you can afford more than one run, try half")
  )
  for options in ({}, {**RATES, "scale_free": True}):
    assert not said_of(clipjax.runs.suggest_max_norm(NORMS, **options), "try half of it and twice as much")


def test_a_guard_is_for_the_rate_of_the_record():
  here = clipjax.runs.suggest_max_norm(NORMS, scale_free=True)
  assert here.notes[0].startswith("It is for the learning rate of the record alone.")
  other = clipjax.runs.suggest_max_norm(NORMS, **RATES, scale_free=True)
  assert other.max_norm == here.max_norm
  assert said_of(other, "record a run at the new rate") and not said_of(here, "record a run at the new rate")


def clipped_run(limit, **columns):
  norm = healthy()["grad/norm"]
  scale = {"grad/max_norm": np.full(400, limit), "grad/scale": np.minimum(1, limit / norm)}
  return run_of(healthy(**scale, **columns))


def test_a_clip_that_acted_often_has_shaped_the_run():
  norm = healthy()["grad/norm"][40:]
  limit = float(np.quantile(norm, 0.7))  # It acts in 30% of the steps.
  often = clipjax.runs.suggest_max_norm(clipped_run(limit), **RATES)
  assert said_of(often, "The clip of this run acted in 30% of these steps, and shaped it")
  assert said_of(often, f"bounded by a threshold of {limit:.3g}: the same bound is now {limit / 10:.3g}.")
  here = clipjax.runs.suggest_max_norm(clipped_run(limit))
  assert said_of(here, "shaped it") and not said_of(here, "the same bound")
  for run in (clipped_run(float(np.quantile(norm, 0.8))), run_of({"grad/norm": NORMS})):
    assert not said_of(clipjax.runs.suggest_max_norm(run), "shaped it")


def test_another_optimizer_of_the_run_is_named():
  columns = healthy()
  run = run_of(
    {"g/norm": columns["grad/norm"], "d/norm": columns["grad/norm"] * 2, "update/norm": columns["grad/norm"]}
  )
  assert said_of(
    clipjax.runs.suggest_max_norm(run), "It is of 'g'. For 'd' pass the norms: suggest_max_norm(run['d/norm'])."
  )
  assert not said_of(clipjax.runs.suggest_max_norm(run_of(columns)), "pass the norms")
