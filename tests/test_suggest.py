"""`suggest_max_norm`: the formula, which norms it is applied to, what it says, and what it refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conditions import NORMS as TYPICAL
from conditions import ROWS
from synthetic import N, healthy, run_of

import clipjax
from clipjax.runs import suggest_max_norm

NORMS = np.exp(np.random.default_rng(0).normal(1, 0.4, 500))
typical = NORMS[50:]
MEAN = typical.mean()
P75, P90 = np.percentile(typical, [75, 90])
HEALTHY = healthy()["grad/norm"]
RAW_P90 = np.percentile(HEALTHY[40:], 90)
RATES = {"learning_rate": 0.1, "new_learning_rate": 1.0}
SAME = {"learning_rate": 0.1, "new_learning_rate": 0.1}
FREE = {"scale_free": True}


# The number ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("norms", "options", "want"),
  [
    (NORMS, {}, P90),
    (NORMS, {"learning_rate": 0.3, "new_learning_rate": 1.2}, P75 / 4),  # 0.3 * P75 bounds the step of SGD, as before.
    (NORMS, SAME, P90),
    (NORMS, FREE, 2 * P90),
    (NORMS, FREE | RATES, 2 * P90),
    (list(NORMS), {}, P90),
    (jnp.asarray(NORMS), {}, P90),
    (range(1, 101), {"warmup_steps": 0}, 90.1),
    (run_of(healthy()), {}, RAW_P90),  # Of grad/norm, and not of grad/norm_clipped.
    (run_of({"critic/norm": 2 * HEALTHY, "skip/norm": HEALTHY}), {}, 2 * RAW_P90),
    (run_of({"skip/norm": HEALTHY}), {}, RAW_P90),
    (np.full(100, 1e-300), {}, 1e-300),
    (np.full(100, 1e300), {}, 1e300),
  ],
)
def test_the_threshold_is_p90_or_a_guard_above_it_or_a_budget_of_p75(norms, options, want):
  found = suggest_max_norm(norms, **options)
  assert found.max_norm == pytest.approx(want, rel=1e-6)
  assert "nan" not in str(found)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_norms_of_16_bits_will_do(dtype):
  assert suggest_max_norm(jnp.asarray(NORMS, dtype)).max_norm == pytest.approx(P90, rel=1e-2)


def test_a_guard_clips_a_few_poisoned_batches_and_stays_where_it_was():
  found = suggest_max_norm(NORMS, scale_free=True)
  poisoned = np.where((np.arange(500) >= 60) & (np.arange(500) % 50 == 10), 1e4, NORMS)
  assert 0 < found.clip_fraction < 0.1
  assert found.max_norm <= suggest_max_norm(poisoned, scale_free=True).max_norm < 1.2 * found.max_norm


def test_shares_and_alternatives_are_those_of_the_recorded_norms():
  found = suggest_max_norm(NORMS, learning_rate=1.0, new_learning_rate=1.5)
  assert found.clip_fraction == (typical > found.max_norm).mean()
  want = [(p, (typical > p).mean()) for p in np.percentile(typical, [50, 75, 90, 99])]
  assert [tuple(pair) for pair in found.alternatives] == want
  assert suggest_max_norm(np.full(100, 2.0)).alternatives == ((2.0, 0.0),) * 4


def test_warm_up_and_norms_that_are_not_finite_are_left_out_and_said():
  norms = np.concatenate([np.full(30, 1e9), typical[:270]])
  norms[[40, 50]] = np.inf, np.nan
  found = suggest_max_norm(norms)
  assert found.max_norm == np.percentile(norms[30:][np.isfinite(norms[30:])], 90)
  assert found.reason.startswith("The 90th percentile of 268 norms (left out: 30 from the warm-up, 2 nonfinite) is ")
  assert "diverged" not in found.reason
  assert suggest_max_norm(norms, warmup_steps=0).max_norm > 1e6


def test_the_text_has_number_reason_alternatives_and_sources():
  found = suggest_max_norm(NORMS, **RATES, model="rnn")
  text, lines = str(found), str(found).splitlines()
  assert lines[0] == f"max_norm = {found.max_norm:.3g}"
  words = " ".join(text.split())
  for part in (found.reason, *found.notes):
    assert " ".join(part.split()) in words
  cells = [line.split() for line in lines]
  for name, (value, share) in zip(("p50", "p75", "p90", "p99"), found.alternatives, strict=True):
    assert [name, f"{value:.3g}", f"{100 * share:.3g}%"] in cells
  assert ["suggested", f"{found.max_norm:.3g}", "100%"] in cells
  assert "tuning playbook" in text and "Pascanu" in text and max(map(len, lines)) <= 100


# What is said -------------------------------------------------------------------------------------------------------


def skipping(rows, norm):
  """A healthy run in which `skip_steps` rejected some rows, of this norm."""
  is_bad = np.isin(ROWS, rows)
  columns = {"grad/norm": np.where(is_bad, np.nan, HEALTHY), "skip/norm": np.where(is_bad, norm, HEALTHY)}
  flags = {} if np.isfinite(norm) else {"skip/norm": is_bad}
  return run_of(healthy(**columns, **{"skip/consecutive": is_bad}), flags=flags)


def clipped(share):
  """A healthy run whose clip acts in this share of the steps after the warm-up."""
  limit = float(np.quantile(HEALTHY[40:], 1 - share))
  return run_of(healthy(**{"grad/max_norm": np.full(N, limit), "grad/scale": np.minimum(1, limit / HEALTHY)})), limit


def by(*states):
  return dataclasses.replace(run_of(healthy()), optimizer=states)


SHAPED, LIMIT = clipped(0.3)
INSURANCE, BUDGET = "may need no clip at all: the clip is insurance", "try half and twice this value"
GUARD, NEW_RATE = "This guard is only for the learning rate of the record.", "record a run at the new rate"
BOTH, BOUND = "Both rules are for the learning rate of the record.", "Its steps were bounded by a threshold of "
ACTED = "The clip of this run acted in 30% of these steps and shaped the run"
FLAT = run_of({"grad/norm": TYPICAL, "loss": 2.3 + np.random.default_rng(0).normal(0, 0.05, N)})
DIVERGED = "But the run diverged ("
AT_ONCE = np.where(np.arange(500) < 30, 1, 1e4)  # Level after the warm-up.

# Norms or a run, options, what the reason or a note says, and what neither does.
SAID = {
  "nothing is asked": (NORMS, {}, [INSURANCE, "The record does not name the optimizer: the number is for SGD"],
                       [BUDGET, BOTH, "rule of thumb", "extremely aggressive", "too few", DIVERGED]),
  "the same rate": (NORMS, SAME, [INSURANCE], [BUDGET, BOTH]),
  "another rate": (
    NORMS, RATES, [BUDGET, BOTH, "extremely aggressive",
                   f"here {MEAN / 2:.3g} to {MEAN * 10:.3g}, and {P75 / 10:.3g} is below that range."],
    [INSURANCE, GUARD]),
  "a guard": (NORMS, FREE, [GUARD, INSURANCE], [BUDGET, NEW_RATE]),
  "a guard at another rate": (NORMS, FREE | RATES, [GUARD, NEW_RATE], [BUDGET, BOTH]),
  **{f"a {model}": (np.full(100, 1.5), {"model": model}, [f"({model.lower()}) is {text} that range."], [])
     for model, text in (("Transformer", "0.5 to 2, and 1.5 is inside"), ("cnn", "1 to 5, and 1.5 is inside"),
                         ("rnn", "0.25 to 1, and 1.5 is above"), ("lstm", "0.25 to 1, and 1.5 is above"),
                         ("feed-forward", "5 to 10, and 1.5 is below"))},
  "an optimizer of the record": (by("ScaleByLionState", "EmptyState"), {}, ["(ScaleByLionState): pass scale_fr"], []),
  "another optimizer of the record": (
    by("TraceState"), {}, ["The record shows no optimizer like Adam (TraceState): the number is for SGD"], []),
  "a clip that acted often, another rate": (
    SHAPED, RATES, [ACTED, f"{BOUND}{LIMIT:.3g}: at the new rate the same bound needs {LIMIT / 10:.3g}."], []),
  "a clip that acted often": (SHAPED, {}, [ACTED], [BOUND]),
  "a clip that acted less often": (clipped(0.2)[0], {}, [], ["shaped the run"]),
  "a second state": (
    run_of({"g/norm": HEALTHY, "d/norm": 2 * HEALTHY, "update/norm": HEALTHY}), {},
    ["This is for 'g'. For 'd' pass the norms: suggest_max_norm(run['d/norm'])."], ["shaped the run"]),
  "one state": (run_of(healthy()), {}, [], ["pass the norms", "never fell", DIVERGED]),
  # Whether the run is a sound basis.
  "few norms": ([1.0, 2.0, 3.0], {}, ["Fewer than 20 norms are too few to rely on: record more steps."], []),
  "norms that rose": (NORMS * np.exp(np.linspace(0, 8, 500)), {}, [f"{DIVERGED}its norms rose ", "no basis"], []),
  "norms that rose at once": (AT_ONCE, {}, [f"{DIVERGED}its norms rose from 1 to 10000)"], []),
  "a tenth of the norms are NaN": (
    np.where(np.arange(500) % 10 == 3, np.nan, NORMS), {}, [f"{DIVERGED}10% of its norms are nonfinite)"], []),
  "the last norm is inf": (np.append(NORMS, np.inf), {}, [f"{DIVERGED}its last norm is nonfinite)"], []),
  "a loss that rose": (
    run_of(healthy(loss=np.where(ROWS < 5, 4.8, 265.0))), {}, [f"{DIVERGED}its loss rose from 4.8 to 265)"], []),
  "NaN that was dropped": (skipping(range(200, 220), np.nan), {}, [], [DIVERGED]),
  "a last step of NaN that was dropped": (skipping([N - 1], np.nan), {}, [], [DIVERGED]),
  "many rejected steps": (
    skipping(range(250, N), 40.0), {}, ["But skip_steps rejected 41.7% of these steps, and their norms"], []),
  "few rejected steps": (skipping(range(250, 270), 40.0), {}, [], ["skip_steps"]),
  "a loss that never fell": (FLAT, {}, ["But the loss of this run never fell: "], []),
  "a flat loss of a resumed run": (dataclasses.replace(FLAT, steps=ROWS + 10**6), {}, [], ["never fell"]),
  # How far to trust the record.
  "a loss that is still falling": (
    run_of({"grad/norm": np.ones(N), "loss": np.linspace(5, 1, N)}), {},
    ["The norms stayed at 1 (medians of the first and last", "so it was still falling: record until it levels"], []),
  "a loss that levels off": (run_of(healthy(n=1200)), {}, ["of its fall: the record is long enough"], ["never fell"]),
  "no loss": (np.ones(300), {}, ["The norms stayed at 1 ", "Without a recorded loss, nobody can tell whether"],
              ["never fell"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_norms(name):
  norms, options, said, unsaid = SAID[name]
  found = suggest_max_norm(norms, **options)
  text = " ".join([found.reason, *found.notes])
  assert [part for part in said if part not in text] == []
  assert [part for part in unsaid if part in text] == []


@pytest.mark.parametrize(("options", "first"), [(RATES, "If you can afford"), (FREE, GUARD)])
def test_what_to_do_first_is_said_first(options, first):
  assert suggest_max_norm(NORMS, **options).notes[0].startswith(first)


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_went_well_is_not_called_diverged(seed):
  assert "diverged" not in suggest_max_norm(run_of(healthy(seed)), scale_free=True).reason


# What is refused ----------------------------------------------------------------------------------------------------

SHAPES, BOTH_OR = "a 1-D array of norms, got ", "must be given both or neither, got "
REFUSED = {
  "ragged": ([[1.0], [1.0, 2.0]], {}, TypeError, f"{SHAPES}a list: pass"),
  "complex": (np.ones(3, complex), {}, TypeError, f"{SHAPES}a ndarray: pass"),
  "bool": ([True, False], {}, TypeError, f"{SHAPES}a list: pass"),
  "None": (None, {}, TypeError, f"{SHAPES}a NoneType: pass"),
  "2-D": (np.ones((3, 2)), {}, ValueError, f"{SHAPES}shape (3, 2): pass the norm of each step."),
  "number": (3.0, {}, ValueError, f"{SHAPES}shape (): pass"),
  "empty": ([], {}, ValueError, f"{SHAPES}shape (0,): pass"),
  "negative": ([1.0, -2.0], {}, ValueError, "`norms_or_run` must be norms, which are >= 0, got -2 at index 1: p"),
  "zeros": ([0.0] * 95 + [1.0] * 5, {}, ValueError, "`norms_or_run` must have norms above 0, got 0 in 94.4% of 90"),
  "no norms": (run_of({"loss": np.ones(30)}), {}, ValueError, "must have finite norms after the warm-up of 3 steps"),
  "beyond float64": (np.full(100, 1.7e308), FREE, ValueError,
                     "`norms_or_run` must give a threshold > 0 and finite, got inf: check the norms."),
  "one rate": (NORMS, {"learning_rate": 0.1}, ValueError, f"{BOTH_OR}0.1 and None: pass the rate"),
  "rate 0": (NORMS, RATES | {"learning_rate": 0.0}, ValueError, "`learning_rate` must be > 0 and finite, got 0.0"),
  "rate nan": (NORMS, RATES | {"new_learning_rate": math.nan}, ValueError, "`new_learning_rate` must be > 0 and"),
  "rate text": (NORMS, RATES | {"learning_rate": "1"}, TypeError, "`learning_rate` must be a number, got '1' (str): "),
  "quotient": (NORMS, {"learning_rate": 1e-300, "new_learning_rate": 1e300}, ValueError,
               "`learning_rate` and `new_learning_rate` must give a threshold > 0 and finite, got (1e-300, 1e+300) a"),
  "model": (NORMS, {"model": "gan"}, ValueError, "feed-forward, cnn, rnn, lstm, transformer or None, got 'gan' (str)"),
  "scale": (NORMS, {"scale_free": "adam"}, TypeError, "`scale_free` must be True, False or None, got 'adam' (str)"),
  "all warm-up": (NORMS, {"warmup_steps": 500}, ValueError, "warm-up of 500 steps, got none of 500 (500 finite in all"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
  norms, options, kind, text = REFUSED[case]
  with pytest.raises(kind) as error:
    suggest_max_norm(norms, **options)
  assert text in str(error.value)


# The optimizer ------------------------------------------------------------------------------------------------------


def test_the_optimizer_is_that_of_the_record_unless_told():
  run = by("ScaleByLionState", "EmptyState")
  found = suggest_max_norm(run)
  assert found == suggest_max_norm(run, scale_free=True)._replace(notes=found.notes)
  told = suggest_max_norm(run, scale_free=False)
  assert (told.scale_free, told.max_norm) == (False, found.max_norm / 2)


def recorded(path, tx, grads, steps=40, **options):
  """The run of a chain at constant gradients, from its file."""
  state, update = tx.init(grads), jax.jit(tx.update)
  with clipjax.runs.Recorder(path, **options) as recorder:
    for step in range(steps):
      _, state = update(grads, state, grads)
      recorder.push(step, state)
  return clipjax.runs.read_run(path)


def test_a_recorder_tells_the_optimizer(tmp_path, standard_promotion):
  tx = optax.chain(clipjax.clip_by_global_norm(1.0), optax.adam(1e-3))
  found = suggest_max_norm(recorded(tmp_path / "run.jsonl", tx, {"w": jnp.array([3.0, 4.0])}, 25))
  assert (found.scale_free, found.max_norm) == (True, 10.0)


# Clips by leaf or group ---------------------------------------------------------------------------------------------


def said_of(found, text):
  return any(text in note for note in found.notes)


BLOCKS = {"a/w": 4.0, "a/b": 3.0, "b": 1.0}


def run_with_leaves(names, values, rows=ROWS, columns=None, *others):
  vectors = {"grad/norm": (rows + 1, values)} | {key: (rows + 1, np.ones(values.shape)) for key in others}
  return run_of(columns or healthy(), leaves={"grad": names}, vectors=vectors)


def scanned(*others):
  """The arrays of a healthy run with norms by leaf of 4, 3 and 1 times the norm."""
  run = run_with_leaves(tuple(BLOCKS), HEALTHY[:, None] * list(BLOCKS.values()), ROWS, None, *others)
  return dataclasses.replace(run, path="")


def test_a_run_that_was_clipped_by_leaf_gets_numbers_by_leaf():
  found = suggest_max_norm(scanned("grad/scale"))
  assert found.thresholds == pytest.approx({name: x * found.thresholds["b"] for name, x in BLOCKS.items()})
  assert found.thresholds["b"] == pytest.approx(RAW_P90, rel=0.05)
  (said,) = [note for note in found.notes if "this run was clipped by" in note]
  assert said.startswith("max_norm is for clip_by_global_norm, but this run was clipped by leaf or group.")
  largest = f"{found.thresholds['a/w']:.3g}"
  assert f"{largest} for 'a/w'" in said and f"one number for all leaves: the largest, {largest}, clips no leaf" in said
  # What is said can be done.
  tx = clipjax.clip_by_group_norm(found.thresholds, lambda path, leaf: path)
  tx.init({"a": {"w": jnp.ones(1), "b": jnp.ones(1)}, "b": jnp.ones(1)})


def test_a_global_clip_beside_a_watch_has_numbers_by_leaf_but_no_word_of_them():
  found = suggest_max_norm(scanned())
  assert set(found.thresholds) == set(BLOCKS) and not said_of(found, "this run was clipped by")
  assert suggest_max_norm(NORMS).thresholds == {}


THREE = {"w": jnp.array([4.0]), "b": jnp.array([3.0]), "c": jnp.array([1.0])}


@pytest.mark.parametrize(
  ("groups", "want", "said"),
  [
    (
      lambda path, leaf: "a" if path in ("w", "b") else "b",
      {"a": 10.0, "b": 2.0},
      "10 for 'a', 2 for 'b'. Pass them to",
    ),
    # A group "w" beside a leaf "w" of other entries: the numbers by group go by another name.
    (lambda path, leaf: "w" if path in ("w", "b") else "rest", {"w": 10.0, "rest": 2.0}, "10 for 'w', 2 for 'rest'."),
  ],
  ids=["names of their own", "a name of a leaf"],
)
def test_a_recorded_clip_by_group_gets_a_dict_for_it(groups, want, said, tmp_path):
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_group_norm(2.0, groups))
  run = recorded(tmp_path / "run.jsonl", tx, THREE)
  assert ("grad_group/norm/w" in run) == ("w" in want)
  found = suggest_max_norm(run, scale_free=True)
  assert found.thresholds == pytest.approx(want)
  assert said_of(found, f"clipped by group. The same formula by group gives `thresholds`: {said}")


@pytest.mark.parametrize(("every", "is_known"), [(50, False), (5, True)])
def test_too_few_norms_by_leaf_are_no_base_but_say_what_to_record(every, is_known, tmp_path):
  tx, grads = clipjax.clip_by_leaf_norm(1.0), {"w": jnp.array([3.0, 4.0])}
  found = suggest_max_norm(recorded(tmp_path / "run.jsonl", tx, grads, 150, every=every))
  assert bool(found.thresholds) == is_known and said_of(found, "clipped by leaf.")
  assert said_of(found, "too few for thresholds: record them more often with Recorder(every=5).") != is_known


def test_a_leaf_without_a_gradient_gets_no_threshold():
  run = run_with_leaves(("dead", "w"), np.stack([np.zeros(N), HEALTHY], 1))
  assert set(suggest_max_norm(run).thresholds) == {"w"}


def test_spikes_which_are_recorded_more_often_by_leaf_do_not_count():
  spikes = [100, 200, 300, 350]
  norms, rows = np.where(np.isin(ROWS, spikes), 50.0, HEALTHY), np.unique([*range(0, N, 10), *spikes])
  found = suggest_max_norm(run_with_leaves(("w",), norms[rows, None], rows, healthy(**{"grad/norm": norms})))
  assert found.thresholds["w"] == pytest.approx(found.max_norm, rel=0.15)


def test_many_leaves_are_a_range():
  names = tuple(f"w{i}" for i in range(30))
  run = run_with_leaves(names, np.arange(1, 31) * HEALTHY[:, None], ROWS, None, "grad/scale")
  found = suggest_max_norm(run)
  low, high = found.thresholds["w0"], found.thresholds["w29"]
  assert said_of(found, f"gives `thresholds`: {low:.3g} to {high:.3g}. clip_by_leaf_norm")
