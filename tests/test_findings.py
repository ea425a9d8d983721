"""What a finding names: the steps that were pushed, their batches, the leaves that were recorded there."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from synthetic import N, healthy, layered, only, run_of, with_spikes

import clipjax
from clipjax.runs.health.losses import overfit
from clipjax.runs.health.nonfinite import nonfinite_loss, nonfinite_norm
from clipjax.runs.health.view import view_of
from clipjax.runs.words import at_steps

STEPS = np.arange(N) * 10 + 1000  # As a caller may count them.


def batches_of(**named):
  """Batches of the rows `r7=...`, of none of the others."""
  batches = np.full(N, None, object)
  for row, batch in named.items():
    batches[int(row[1:])] = batch
  return batches


# Words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("steps", "batches", "text"),
  [
    ([250], None, "at step 250"),
    ([250, 300], None, "at steps 250, 300"),
    (range(7), None, "at steps 0, 1, 2, 3, 4 and 2 more"),
    ([250], ["shard-3"], "at step 250 (batch 'shard-3')"),
    ([250, 300, 310, 320, 330], ["a", None, 7, "b", "c"], "at steps 250 (batch 'a'), 300, 310 (batch 7) and 2 more"),
    ([250, 300], [None, None], "at steps 250, 300"),
    ([8], [("a", "b")], "at step 8 (batches 'a', 'b')"),
    ([8], [tuple(range(8))], "at step 8 (batches 0, 1, 2 and 5 more)"),
    ([8], ["\x1b[31m\n\u202e"], r"at step 8 (batch '\x1b[31m\n\u202e')"),
  ],
)
def test_steps_with_their_batches(steps, batches, text):
  assert at_steps(steps, batches) == text


# Steps and batches --------------------------------------------------------------------------------------------------


def test_steps_are_those_that_were_pushed_and_all_of_them():
  columns, at = healthy(), np.isin(np.arange(N), range(70, 90))
  columns["grad/norm"][at] = columns["grad/norm_clipped"][at] = columns["loss"][at] = np.nan
  report = clipjax.runs.diagnose(run_of(columns, flags={"grad/norm": at, "loss": at}, steps=STEPS))
  finding = only(report, "nonfinite")
  assert finding.steps == tuple(range(1700, 1900, 10))
  assert "at steps 1700, 1710, 1720, 1730, 1740 and 15 more" in finding.message


def test_findings_name_the_batch():
  columns, at = with_spikes(), np.arange(N) == 350
  columns["grad/norm"][at] = columns["grad/norm_clipped"][at] = np.nan
  run = run_of(columns | {"grad/scale": np.ones(N)}, flags={"grad/norm": at}, steps=STEPS)
  run = dataclasses.replace(run, batches=batches_of(r350="shard-3", r200=17, r201=18, r300=("a", "b")))
  report = clipjax.runs.diagnose(run)
  assert "inf or NaN, at step 4500 (batch 'shard-3')." in only(report, "nonfinite").message
  finding = only(report, "spikes")
  assert (
    "parameters, at steps 3000 (batch 17), 4000 (batches 'a', 'b'). The largest: At step 3000 (batch 17) 'grad"
    in (finding.message)
  )
  assert "Look at batches 'a' to 'b'." in finding.advice


def test_rejected_steps_are_named():
  columns = healthy(**{"skip/fraction": np.full(N, 0.125)})
  columns["skip/consecutive"][[5, 6]] = [1, 2]
  finding = only(clipjax.runs.diagnose(run_of(columns, steps=STEPS)), "skipped")
  assert finding.message == "skip_steps rejected 12.5% of 400 steps, at steps 1050, 1060."
  assert finding.steps == (1050, 1060)


def test_what_concerns_the_whole_run_names_no_step():
  columns = healthy(**{"grad/zero_fraction": np.ones(N)})
  assert only(clipjax.runs.diagnose(run_of(columns)), "zeros").steps == ()


def test_overfit_names_the_best_step():
  steps = np.arange(1, N + 1)
  columns = healthy(val_loss=np.where(steps % 4 == 0, 2 + np.abs(steps - 200) / 100, np.nan))
  (finding,) = overfit(view_of(run_of(columns, steps=STEPS), clipjax.runs.HealthLimits(), None))
  assert finding.steps == (STEPS[199],) and f"near step {STEPS[199]}" in finding.message
  assert finding.source.startswith("Prechelt") and finding.rule == "at most 5%, criterion GL5"


# Leaves -------------------------------------------------------------------------------------------------------------


def spikes_with(values, **columns):
  """The finding of two spikes, at the steps 201 and 301: the rows 20 and 30 of `values`."""
  run = run_of({"grad/norm": with_spikes()["grad/norm"], **columns}, **layered(values))
  return only(clipjax.runs.diagnose(run), "spikes")


def test_the_leaf_of_a_spike_is_the_one_that_grew_most():
  # 'in/w' is the largest throughout; 'out/w' grows 90 times at step 201, and 'in/w' at step 301.
  values = np.tile([5.0, 0.1], (40, 1))
  values[20], values[30] = [12.0, 9.0], [40.0, 0.2]
  finding = spikes_with(values)
  assert finding.steps == (201, 301) and finding.leaves == ("out/w", "in/w")
  assert "At step 201 'grad/norm' rose to 30, 26.2 times its usual 1.14, most of all in 'out/w'" in finding.message


def test_a_leaf_that_is_nearly_0_or_was_not_finite_or_not_recorded_did_not_grow():
  values = np.tile([5.0, 1e-7], (40, 1))
  values[20] = [40.0, 1e-3]  # 'out/w' grew ten thousandfold, to nothing.
  assert spikes_with(values).leaves == ("in/w",)
  values = np.tile([5.0, 0.1], (40, 1))
  values[20], values[30] = [np.nan, 0.2], [np.inf, np.nan]
  values[0:5, 0] = np.nan
  assert spikes_with(values).leaves == ("out/w",)


def test_the_leaf_that_holds_the_norm_is_named_where_no_usual_norm_is_known():
  run = run_of({"grad/norm": with_spikes()["grad/norm"]}, leaves={"grad": ("in/w", "out/w")})
  run.vectors["grad/norm"] = np.array([201, 301]), np.array([[1.0, 30.0], [2.0, 1.0]])
  assert only(clipjax.runs.diagnose(run), "spikes").leaves == ("out/w", "in/w")


def test_a_leaf_may_have_a_spike_of_its_own():
  values = np.tile([0.9, 0.01], (40, 1)) * np.exp(np.random.default_rng(0).normal(0, 0.1, (40, 2)))
  values[25, 1] = 1.0
  report = clipjax.runs.diagnose(run_of(healthy(), **layered(values)))
  finding = only(report, "spikes-of-leaves")
  assert (finding.level, finding.steps, finding.leaves) == ("INFO", (251,), ("out/w",))
  assert finding.message.startswith("Once a leaf had a spike while the norm was as usual, the largest at step 251 in")
  columns = healthy(**{"update/norm": np.where(np.arange(N) == 250, 0.5, 0.01)})
  (event,) = clipjax.runs.diagnose(run_of(columns, **layered(values))).events
  assert [move.key for move in event.moves] == ["grad/norm/out/w", "update/norm"] and event.leaves == ("out/w",)


def test_groups_have_their_spikes_named_too():
  columns = with_spikes(at=(205,)) | {"grad/norm/a": np.ones(N), "grad/norm/b": np.ones(N)}
  columns["grad/norm/b"][205] = 30.0
  columns.pop("grad/scale")
  assert only(clipjax.runs.diagnose(run_of(columns)), "spikes").leaves == ("b",)


def test_the_first_step_with_leaves_is_told_where_the_first_has_none():
  columns, at = healthy(), np.isin(np.arange(N), [65, 70])
  columns["grad/norm"][at] = columns["grad/norm_clipped"][at] = np.nan
  values = np.ones((40, 2))
  values[7, 1] = np.inf  # Row 7 is step 71.
  finding = only(clipjax.runs.diagnose(run_of(columns, flags={"grad/norm": at}, **layered(values))), "nonfinite")
  assert finding.message.endswith("at steps 66, 71; at step 71 in 'out/w'.")
  assert finding.leaves == ("out/w",)


def test_what_was_not_recorded_is_not_taken_for_not_finite():
  columns, at = healthy(), np.arange(N) == 70
  columns["grad/norm"][at] = columns["grad/norm_clipped"][at] = np.nan
  values = np.ones((40, 2))
  values[7] = np.nan
  report = clipjax.runs.diagnose(run_of(columns, flags={"grad/norm": at}, **layered(values)))
  assert only(report, "nonfinite").leaves == ()
  assert "clipjax.watch()" in only(report, "nonfinite").advice


def test_a_loss_that_is_not_finite_names_the_leaves_that_are_not():
  columns, at = healthy(), np.arange(N) == 70
  columns["loss"][at] = np.nan
  values = np.ones((40, 2))
  values[7, 0] = np.inf
  finding = only(clipjax.runs.diagnose(run_of(columns, flags={"loss": at}, **layered(values))), "nonfinite-loss")
  assert finding.message == "1 of 400 values of 'loss' were inf or NaN, at step 71; the gradient too, in 'in/w'."
  assert finding.leaves == ("in/w",)


def test_layers_outside_of_the_usual_updates_are_named():
  report = clipjax.runs.diagnose(run_of(healthy(), **layered([1e-3, 0.2], key="update/ratio")))
  assert only(report, "update-ratio-by-layer").leaves == ("out/w",)


def test_the_farthest_layer_is_measured_from_the_limits():
  # 0.0005 is 20 times below the band 0.01 to 0.1, and 1 is 10 times above.
  limits = clipjax.runs.HealthLimits(ratio_low=0.01, ratio_high=0.1)
  columns = healthy(**{"update/ratio": np.full(N, 0.05)})
  run = run_of(columns, **layered([5e-4, 1.0], key="update/ratio"))
  assert "the farthest 'in/w'" in only(clipjax.runs.diagnose(run, limits=limits), "update-ratio-by-layer").message


# The record ---------------------------------------------------------------------------------------------------------


def test_rows_that_were_superseded_and_lines_that_were_torn_are_told():
  run = dataclasses.replace(run_of(healthy()), superseded=1200, unreadable=1)
  report = clipjax.runs.diagnose(run)
  assert only(report, "superseded").level == only(report, "unreadable").level == "INFO"
  assert only(report, "superseded").message.startswith(
    "1,200 rows were left out, as the run went back to a step before"
  )
  assert only(report, "unreadable").message.startswith("1 line could not be read and was left out")
  names = {finding.name for finding in clipjax.runs.diagnose(run_of(healthy()))}
  assert not names & {"superseded", "unreadable"}


# As the rows are written --------------------------------------------------------------------------------------------


def test_the_checks_that_the_recorder_runs_need_no_more_than_a_few_rows():
  columns = {"grad/norm": np.array([1.0, np.nan, 1.0]), "loss": np.array([1.0, 2.0, np.nan])}
  flags = {"grad/norm": np.array([False, True, False]), "loss": np.array([False, False, True])}
  view = view_of(run_of(columns, flags=flags, steps=[7, 8, 9]), clipjax.runs.HealthLimits(), 0)
  (norm,), (loss,) = nonfinite_norm(view), nonfinite_loss(view)
  assert (norm.level, norm.steps, loss.level, loss.steps) == ("FAIL", (8,), "FAIL", (9,))


# Steps that a state did not see -------------------------------------------------------------------------------------


def stale(tmp_path):
  """A file of 0.1.0, watch inside `skip_steps`: the row of a rejected step repeats the numbers of the one before."""
  tx = clipjax.skip_steps(optax.chain(clipjax.watch(), optax.sgd(1e-3)), norm_rule=100.0)
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  state, update = tx.init(params), jax.jit(tx.update)
  lines = [{"clipjax_run": 1, "version": "0", "leaves": {"grad": ["a", "b"]}, "parameters": 4, "every": 1}]
  for step in range(1, 121):
    scale = {90: 900.0, 100: math.nan}.get(step, 1.0 + 0.01 * (step % 7))
    _, state = update({"a": jnp.full(2, scale), "b": jnp.ones(2)}, state, params)
    values = {key: float(value) for key, value in clipjax.metrics(state).items()}
    flags = {key: repr(value) for key, value in values.items() if not math.isfinite(value)}
    row = {"step": step} | {key: None if key in flags else value for key, value in values.items()}
    lines.append(row | {"nonfinite": flags, "leaf": {"grad/norm": state.inner_state[0].norms.tolist()}})
  path = tmp_path / "run.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return clipjax.runs.read_run(path)


def test_the_leaves_of_a_rejected_step_are_not_those_of_the_step_before(tmp_path):
  report = clipjax.runs.diagnose(stale(tmp_path))
  spike, dropped = only(report, "spikes-caught"), only(report, "nonfinite-dropped")
  assert (spike.steps, spike.leaves) == ((90,), ()) and (dropped.steps, dropped.leaves) == ((100,), ())


def test_the_page_says_that_the_leaves_of_a_rejected_step_are_not_known(tmp_path):
  run = stale(tmp_path)
  text = clipjax.runs.write_report(run, tmp_path / "a.html").read_text()
  assert "Step <strong>90</strong>, the largest norm" in text  # Not the one that was dropped as it was not finite.
  assert "<code>skip_steps</code> rejected it" in text


def test_norms_that_are_left_out_of_a_row_are_those_that_skip_steps_saw():
  # As a row of format 2 is: only the counters of what is inside are there.
  columns = healthy(**{"skip/norm": np.full(N, 1.0)})
  columns["skip/consecutive"][200] = 1
  columns["skip/norm"][200] = 30.0
  columns["grad/steps"][200:] -= 1
  columns["grad/norm"][200] = columns["grad/scale"][200] = columns["grad/norm_clipped"][200] = np.nan
  assert only(clipjax.runs.diagnose(run_of(columns)), "spikes-caught").steps == (201,)
  without = {key: value for key, value in columns.items() if key != "grad/steps"}
  assert only(clipjax.runs.diagnose(run_of(without)), "spikes-caught").steps == (201,)
