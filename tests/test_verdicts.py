"""The measurement of the verdict: its truths, how findings are held against them, its page, and one run of it."""

import dataclasses
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import verdicts
import verdicts_page
import verdicts_peers
from verdicts_conditions import HALVES, STEPS, leaf_names, of
from verdicts_page import Result
from verdicts_training import KNOBS, optimizer_of
from verdicts_truth import Expected, Outcome, Truth, course_of, departure, judge, read_truths, write_truths

from clipjax.metric_names import GRAD_RATIO, RATIO, SHARE
from clipjax.runs import Finding, Run
from clipjax.runs.schema import key_of

SAID = ("caught", "no effect")  # Healthy, and the verdict must say why.
PLANTED = [condition for condition in verdicts.CONDITIONS.values() if not condition.is_healthy]


def truth_of(*expected, also=(), is_healthy=False, **fields):
  fields = {"half": "held-out", "condition": "one leaf", "model": "gru", "optimizer": "adam", "seed": 100} | fields
  return Truth(**fields, is_healthy=is_healthy, expected=expected, also=also)


def said(name, steps=(), leaves=(), level="WARN", message=""):
  return Finding(level, name, message, steps=steps, leaves=leaves)


# The course of a loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("losses", "left", "course"),
  [
    (np.linspace(2.0, 0.5, 100), None, "learns"),
    (np.full(100, 2.0), None, "flat"),
    (np.r_[np.full(50, 2.0), np.full(50, 3.1)], 50, "leaves"),
    (np.r_[np.full(50, 2.0), np.full(50, 2.9)], None, "flat"),  # Less than half above the best.
    (np.r_[np.full(50, 2.0), np.full(49, 9.0), 2.0], None, "flat"),  # It comes back.
    (np.r_[2.0, np.full(49, 0.01), np.full(50, 0.1)], None, "learns"),  # A tenth of the start is 0.2.
    (np.r_[2.0, np.full(49, 0.01), np.full(50, 0.3)], 50, "leaves"),
    (np.r_[np.full(95, 2.0), np.full(5, 9.0)], None, None),  # In the last tenth nobody knows whether it comes back.
    (np.r_[np.full(20, 2.0), np.full(80, math.nan)], 20, "leaves"),
    (np.r_[np.full(20, 2.0), math.nan, np.full(79, 1.0)], None, "learns"),
  ],
)
def test_a_loss_leaves_where_it_stays_above_its_best(losses, left, course):
  assert departure(losses) == left
  assert course is None or course_of(losses) == course


# Judging ------------------------------------------------------------------------------------------------------------

SPIKES = truth_of(Expected("spikes", (50,), leaves=("w",)), also=("update-spike",))
STARVED = truth_of(Expected("clip-starves", leaves=("w",), is_last=True))
EITHER = truth_of(Expected("diverged", (50,)), Expected("nonfinite", (80,)))
TWO_STEPS = truth_of(Expected("spikes", (50, 90)))
BATCH = truth_of(Expected("spikes", (50,), batches=("0-00050",)))
HEALTHY = truth_of(is_healthy=True)


def named(step, leaf, alarms=()):
  return {"name": True, "step": step, "leaf": leaf, "alarms": alarms, "is_right": step and leaf}


@pytest.mark.parametrize(
  ("truth", "findings", "want"),
  [
    (SPIKES, [said("spikes", (50, 51), ("w",))], named(True, True)),
    (SPIKES, [said("spikes", (52,), ("grad_2/w",))], named(True, True)),
    (SPIKES, [said("spikes", (53,), ("w",))], named(False, True)),
    (SPIKES, [said("spikes", (20, 50), ("w",))], named(False, True)),  # A step before it, which was nothing.
    (SPIKES, [said("spikes", (47, 50), ("w",))], named(False, True)),
    (SPIKES, [said("spikes", (50,), ("a", "b", "c", "w"))], named(True, False)),  # Who names all leaves names none.
    (SPIKES, [said("spikes")], named(False, False)),
    (SPIKES, [said("diverged", (50,), level="FAIL")], named(False, False, ("diverged",)) | {"name": False}),
    (SPIKES, [said("update-spike", (50,)), said("loss", level="INFO")], named(False, False) | {"name": False}),
    (SPIKES, [], named(False, False) | {"name": False}),
    # The leaf that holds the norm is named last.
    (STARVED, [said("clip-starves", (), ("a", "b", "c", "w"))], {"leaf": True}),
    (STARVED, [said("clip-starves", (), ("w", "a"))], {"leaf": False}),
    (STARVED, [said("clip-starves")], {"leaf": False}),
    # Of several right answers the nearest counts.
    (EITHER, [said("nonfinite", (80, 81), level="FAIL"), said("diverged", (10,), level="FAIL")],
     {"is_right": True, "is_first": True, "alarms": ()}),
    # Every planted step must be named.
    (TWO_STEPS, [said("spikes", (50, 55, 91))], {"step": True}),
    (TWO_STEPS, [said("spikes", (50, 55))], {"step": False}),
    (TWO_STEPS, [said("spikes", (51,)), said("spikes", (90,))], {"step": True}),
    (BATCH, [said("spikes", (50,), message="The norm jumped in batch '0-00050'.")], {"batch": True}),
    (BATCH, [said("spikes", (50,), message="The norm jumped.")], {"batch": False}),
    (HEALTHY, [said("spikes-caught", (3,), level="INFO")], Outcome(None, None, None, None, None, ())._asdict()),
    (HEALTHY, [said("spikes", (3,))], {"alarms": ("spikes",)}),
  ],
)  # fmt: skip
def test_findings_are_held_against_the_truth(truth, findings, want):
  outcome = judge(truth, findings)
  assert {field: getattr(outcome, field) for field in want} == want


def test_truths_come_back_from_their_file(tmp_path):
  starved = truth_of(Expected("clip-starves", leaves=("w",), is_last=True), seed=101)
  truths = [truth_of(Expected("spikes", (5,), leaves=("w",), batches=("b",)), also=("zeros",)), starved]
  path = tmp_path / "truth.json"
  for truth in truths:
    write_truths([truth], path)
  assert read_truths(path) == truths
  assert truths[0].file == "held-out/one-leaf--gru-adam--100.jsonl"


# The conditions -----------------------------------------------------------------------------------------------------


def test_the_halves_share_no_model_and_no_seed():
  models = {half: {s.model for c in verdicts.CONDITIONS.values() for s in c.settings[half]} for half in HALVES}
  assert not set.intersection(*models.values())
  assert not set.intersection(*map(set, HALVES.values()))
  assert len(PLANTED) >= 19
  assert len(verdicts.CONDITIONS) - len(PLANTED) >= 11


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("condition", verdicts.CONDITIONS.values(), ids=verdicts.CONDITIONS)
def test_what_is_planted_is_where_the_truth_says(condition, half):
  """The knobs of the row change at each step that is expected, and at none before the first."""
  draws = condition.draws(half)
  assert len({draw.seed for draw in draws}) == 3
  for draw in draws:
    made = condition.make(draw)
    knobs = made.training.knobs
    assert knobs.shape == (STEPS, len(KNOBS))
    assert bool(made.expected or made.near) != condition.is_healthy or condition.name in SAID
    changed = 1 + np.flatnonzero((~np.equal(knobs[1:], knobs[:-1]) & ~np.isnan(knobs[:-1])).any(axis=1))
    for expected in made.expected:
      assert all(np.abs(changed - step).min() <= expected.near for step in expected.steps)
      if expected.steps:
        assert changed[0] >= min(expected.steps) - expected.near
      assert set(expected.leaves) <= set(leaf_names(draw.setting.model))


@pytest.mark.usefixtures("standard_promotion")  # Optax's Adam wants it.
def test_the_effect_of_a_clip_is_measured_around_it():
  params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([3.0, 4.0, 0.0])}
  stepped = {}
  for effect in (False, True):
    (setting,) = of("mlp", "momentum", clip=True, effect=effect)
    tx = optimizer_of(setting, jnp.float32(0.1), jnp.float32(1.0))
    stepped[effect], state = tx.update(grads, tx.init(params), params)
    said_of = verdicts.clipjax.metrics(state)
    assert {"grad/norm", "update/norm"} <= said_of.keys()
    assert said_of.get(key_of("effect", RATIO)) == (pytest.approx(0.2) if effect else None)
  np.testing.assert_array_equal(stepped[True]["w"], stepped[False]["w"])


# The page -----------------------------------------------------------------------------------------------------------


def outcome(right=True, alarms=()):
  return Outcome(right, right, right, None, None, alarms)


def results():
  """Of two conditions and both halves: three of four bad runs are right, one of two healthy ones is left alone."""
  bad, spikes = Expected("spikes", (50,)), (said("spikes", (50,)),)
  zeros = (said("zeros", (7,), ("w",)), said("loss", level="INFO"))
  out = [
    Result(truth_of(bad, seed=seed), outcome(), spikes, {"runmedic": outcome(seed == 100)}) for seed in (100, 101, 102)
  ]
  last = Result(truth_of(bad, seed=103), outcome(False, ("zeros",)), zeros, {"runmedic": outcome(False)})
  out.append(last._replace(seen={"grad/norm": 1.25}))
  for seed, alarms in ((100, ()), (101, ("rising-norm",))):
    none = outcome(None, alarms)
    findings = tuple(said(name, message="The norm rose.") for name in alarms)
    out.append(Result(truth_of(condition="sgd", is_healthy=True, seed=seed), none, findings, {"runmedic": none}))
  return [*out, out[0]._replace(truth=out[0].truth._replace(is_so=False, seed=104))]


def test_the_page_says_what_its_results_say():
  said_of = {"one leaf": "one is larger: `spikes`", "sgd": "plain SGD"}
  text = verdicts_page.render(results(), said_of, {"runmedic": "0.1.1"})
  assert "| The reported half | 3 of 4 (75%) | 3 of 4 (75%) | 3 of 4 (75%) | 3 of 4 (75%) | 1 of 2 (50%) |" in text
  assert "| one leaf | one is larger: `spikes` | 3/4 | 3/4 | – | – | 3/4 | zeros 1 |" in text  # noqa: RUF001
  assert (
    "- one leaf (gru, adam, seed 103): the right answer is `spikes` at step 50; the verdict says WARN `zeros`" in text
  )
  assert "at step 7 in `w`. At that step, the record shows 1.25 times its usual grad/norm." in text
  assert "- sgd (gru, adam, seed 101): WARN `rising-norm`: The norm rose." in text
  assert "| runmedic 0.1.1 | 1 of 4 (25%) | 1 of 4 (25%) | 1 of 2 (50%) |" in text
  assert "left out: one leaf (gru, adam, seed 104), held-out." in text
  assert "chosen" not in re.findall(r"^## .*$", text, re.MULTILINE)[0]
  tables = [block for block in text.split("\n\n") if block.startswith("|")]
  assert "| one leaf | 3/4 | 1/4 |" in text
  assert "| sgd | 1/2 | 1/2 |" in text
  assert len(tables) == 6
  for block in tables:
    assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_without_peers_and_misses_the_page_says_so():
  text = verdicts_page.render([results()[0]], {"one leaf": "x"}, {})
  assert "Nothing: every bad run" in text
  assert "Beside other" not in text


# Peers --------------------------------------------------------------------------------------------------------------

REPORTS = {
  "runmedic": [{"findings": [{"check": "loss_spikes", "severity": "warning", "step": 50.0}]}],
  "losslint": {
    "findings": [{"check": "loss_spike", "severity": "warning", "details": {"steps": [50, 51], "count": 2}}]
  },
  "trainspotter": {"findings": [{"detector": "spikes", "severity": "error", "step_start": 50, "step_end": 61}]},
}


@pytest.mark.parametrize("name", verdicts_peers.PEERS)
def test_what_a_peer_says_counts_in_its_favour(name):
  peer = verdicts_peers.PEERS[name]
  found = list(peer.said(json.loads(json.dumps(REPORTS[name]))))
  for expected in ("spikes", "update-spike", "spikes-caught"):
    truth = verdicts_peers.without_leaves(truth_of(Expected(expected, (50,), leaves=("w",), batches=("b",))))
    assert judge(truth, verdicts_peers.as_findings(found, peer.names, truth)).is_right
  healthy = truth_of(is_healthy=True)
  assert judge(healthy, verdicts_peers.as_findings(found, peer.names, healthy)).alarms == ("spikes",)


def test_a_peer_is_given_losses_norm_and_rate(tmp_path):
  columns = {
    "train/loss": [1.0, math.nan, 0.5],
    "grad/norm": [2.0, math.inf, math.nan],
    "skip/norm": [2.0, math.inf, 7.0],
  }
  run = Run.from_arrays(columns | {key: [1.0] * 3 for key in ("learning_rate", "update/norm", "val_loss")})
  flags = {**run.flags, "grad/norm": np.array([False, True, False])}  # The third was not recorded.
  run = dataclasses.replace(run, flags=flags)
  path = tmp_path / "run.csv"
  verdicts_peers.write_table(run, path)
  lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
  columns = dict(zip(lines[0], zip(*lines[1:], strict=True), strict=True))
  assert set(columns) == {"step", "train/loss", "val_loss", "grad_norm", "lr"}
  assert columns["train/loss"] == ("1.0", "nan", "0.5")
  assert columns["grad_norm"] == ("2.0", "nan", "7.0")  # What was dropped had a norm too.


# Some of them -------------------------------------------------------------------------------------------------------


def trained(name, folder):
  """The first run of a condition, from training through its files to what is judged."""
  (truth,) = verdicts.train([verdicts.CONDITIONS[name]], "tune", folder, seeds=1)
  assert truth.is_so
  assert read_truths(folder / "truth.json") == [truth]
  return truth, verdicts.clipjax.runs.read_run(folder / truth.file)


@pytest.mark.usefixtures("standard_promotion")  # Optax's Adam wants it.
def test_one_condition_from_training_to_page(tmp_path):
  truth, run = trained("one leaf", tmp_path)
  (result,) = verdicts.judged([truth], tmp_path, peers=())
  want = truth.expected[0]
  (step,), (leaf,), (batch,) = want.steps, want.leaves, want.batches
  assert run.steps.tolist() == list(range(STEPS))
  assert run.steps[np.argmax(run["grad/norm"])] == step and run.batches[step] == batch
  assert run[f"grad/norm/{leaf}"][step] > 0.99 * run["grad/norm"][step]
  assert result.outcome.is_right
  assert result.seen["grad/norm"] > 5 and result.seen["loss"] < 5
  assert "| one leaf |" in verdicts_page.render([result], {"one leaf": "x"}, {})


@pytest.mark.usefixtures("standard_promotion")
def test_a_starved_run_is_one(tmp_path):
  """Where the clip takes most of the gradient, the leaf that is expected holds the norm, and the rest has no step."""
  truth, run = trained("starved", tmp_path)
  place = run.leaves["effect"].index(*truth.expected[0].leaves)
  steps, shares = run.vectors[key_of("effect", SHARE)]
  left = run[key_of("effect", GRAD_RATIO)]
  is_hard = left[np.searchsorted(run.steps, steps)] < 0.1
  assert is_hard.sum() > 5 and np.median(shares[is_hard, place]) > 0.9
  ratios = run.vectors[key_of("effect", RATIO)][1]
  assert np.delete(np.median(ratios, axis=0), place).max() < 1 / 3 and left.mean() < 1 / 3


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("name", "low", "high"), [("lengthened", 2.0, 10.0), ("no effect", 0.95, 1.05)])
def test_a_step_is_as_long_as_the_condition_says(name, low, high, tmp_path):
  _, run = trained(name, tmp_path)
  assert low < np.median(run[key_of("effect", RATIO)]) < high
