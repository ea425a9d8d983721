"""`suggest_max_norm`: the formula, which norms it is applied to, what it says, and what it refuses."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import healthy, run_of

import clipjax
from clipjax.runs import suggest

NORMS = np.exp(np.random.default_rng(0).normal(1, 0.4, 500))
typical = NORMS[50:]


def test_the_formula_is_p90_and_for_another_rate_a_budget_of_p75():
  p75, p90 = np.percentile(typical, [75, 90])
  assert clipjax.runs.suggest_max_norm(NORMS).max_norm == p90
  other = clipjax.runs.suggest_max_norm(NORMS, learning_rate=0.3, new_learning_rate=1.2)
  assert other.max_norm == pytest.approx(p75 / 4)
  assert 0.3 * p75 == pytest.approx(1.2 * other.max_norm)  # The bound on the step of SGD stays.
  assert clipjax.runs.suggest_max_norm(NORMS, learning_rate=1, new_learning_rate=1).max_norm == p90


def test_a_scale_free_optimizer_gets_a_guard_above_the_typical_norm_whatever_its_rate():
  found = clipjax.runs.suggest_max_norm(NORMS, scale_free=True)
  assert found.max_norm == pytest.approx(2 * np.percentile(typical, 90))
  assert 0 < found.clip_fraction < 0.1
  same = clipjax.runs.suggest_max_norm(NORMS, scale_free=True, learning_rate=1e-3, new_learning_rate=1e-2)
  assert same.max_norm == found.max_norm
  assert "rates do not enter" in str(same)
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
  assert said in clipjax.runs.suggest_max_norm(NORMS, **rates).notes[0]
  for options in ({}, {"learning_rate": 0.1, "new_learning_rate": 0.1}, {**rates, "scale_free": True}):
    assert said not in clipjax.runs.suggest_max_norm(NORMS, **options).notes[0]


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
    "`scale_free` must be True or False, got 'adam' (str): pass one of them.",
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
