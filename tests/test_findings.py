"""What a finding names: the steps that were pushed, their batches, the leaves that were recorded there."""

import dataclasses

import numpy as np
import pytest
from conditions import NORMS, ROWS, at, check, leaves_at, spoiled
from synthetic import N, healthy, layered, run_of, with_spikes

import clipjax
from clipjax.runs.health.nonfinite import nonfinite_loss, nonfinite_norm
from clipjax.runs.health.view import view_of
from clipjax.runs.words import at_steps

STEPS = ROWS * 10 + 1000  # As a caller may count them.
SPIKES = with_spikes()["grad/norm"]  # At the steps 201 and 301.


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


# Runs ---------------------------------------------------------------------------------------------------------------


def with_batches(run, **named):
  """The run with names of the batches of the rows `r7=...`, and none of the others."""
  batches = np.full(N, None, object)
  for row, batch in named.items():
    batches[int(row[1:])] = batch
  return dataclasses.replace(run, batches=batches)


def spikes(by_leaf, **columns):
  """Two spikes of a norm, and norms by leaf: those of step 201 are row 20, those of step 301 row 30."""
  return run_of({"grad/norm": SPIKES, **columns}, **by_leaf)


def jump_of_a_leaf(**columns):
  """A leaf that holds little of the norm, and a hundred times as much at step 251."""
  noise = np.exp(np.random.default_rng(0).normal(0, 0.1, (40, 2)))
  values = np.array([0.9, 0.01]) * noise
  values[25, 1] = 1.0
  return run_of(healthy(**columns), **layered(values))


# A file of 0.1.0, watch inside `skip_steps`: the row of a rejected step repeats the numbers of the one before.
SEEN = np.where(np.isin(ROWS, [200, 300]), ROWS - 1, ROWS)
REJECTED = run_of(
  healthy(**{
    "grad/norm": NORMS[SEEN], "grad/steps": np.cumsum(SEEN == ROWS), "skip/consecutive": SEEN != ROWS,
    "skip/norm": at(300, np.nan, at(200, 30.0, NORMS)),
  }),
  flags={"skip/norm": ROWS == 300}, leaves={"grad": ("a", "b")},
  vectors={"grad/norm": (ROWS + 1, NORMS[SEEN, None] * [0.8, 0.6])},
)  # fmt: skip
LEFT_OUT = ("grad/norm", "grad/scale", "grad/norm_clipped")
RISEN = "'grad/norm' rose to 30, 26.2 times its usual 1.14"
AT_350 = {"flags": {"grad/norm": ROWS == 350}, "steps": STEPS}
NAN_AND_SPIKES = spoiled(350, {"grad/norm": SPIKES, "grad/scale": np.ones(N)}, **AT_350)
KNOWN = run_of(healthy(**{"grad/norm": at(200, 80.0, NORMS), "grad/scale": np.ones(N)}))

# Runs, and the findings as `check` has them.
RUNS = {
  "steps are those that were pushed, and all of them": (
    spoiled(range(70, 90), steps=STEPS),
    [("nonfinite", "FAIL", tuple(range(1700, 1900, 10)), (), "at steps 1700, 1710, 1720, 1730, 1740 and 15 more")]),
  "batches are named": (
    with_batches(NAN_AND_SPIKES, r350="shard-3", r200=17, r201=18, r300=("a", "b")),
    [("nonfinite", "FAIL", (4500,), (), "at step 4500 (batch 'shard-3').", "Look at the batch of step 4500"),
     ("spikes", "WARN", (3000, 4000), (), "2 spikes reached the parameters, at steps 3000 (batch 17), 4000 (batches "
      f"'a', 'b'). The largest: At step 3000 (batch 17) {RISEN}", "Look at batches 'a' to 'b'.")]),
  "rejected steps are named": (
    run_of(healthy(**{"skip/fraction": np.full(N, 0.125), "skip/consecutive": at(5, 1, 0) + at(6, 2, 0)}), steps=STEPS),
    [("skipped", "WARN", (1050, 1060), (), "skip_steps rejected 12.5% of 400 steps, at steps 1050, 1060.\nLook at the "
      "batches of these steps; if they are ordinary, raise the limit of the rule.\n")]),
  "the best step of a validation loss is named": (
    run_of(healthy(val_loss=np.where(ROWS % 4 == 3, 2 + np.abs(ROWS - 199) / 100, np.nan)), steps=STEPS),
    [("overfit", "WARN", (STEPS[199],), (), f"near step {STEPS[199]})")]),
  # 'in/w' is the largest throughout; 'out/w' grows 90 times at step 201, and 'in/w' at step 301.
  "the leaf of a spike is the one that grew most": (
    spikes(leaves_at({20: [12.0, 9.0], 30: [40.0, 0.2]}, (5.0, 0.1))),
    [("spikes", "WARN", (201, 301), ("out/w", "in/w"), f"At step 201 {RISEN}, most of all in 'out/w'."),
     ("spikes-of-leaves", None)]),
  "a leaf that is nearly 0 did not grow": (
    spikes(leaves_at({20: [40.0, 1e-3]}, (5.0, 1e-7))),
    [("spikes", "WARN", (201, 301), ("in/w",)), ("layer-spread", "WARN", (), ("out/w", "in/w"))]),
  "a leaf that was not finite or not recorded did not grow": (
    spikes(leaves_at({20: [np.nan, 0.2], 30: [np.inf, np.nan], **{i: [np.nan, 0.1] for i in range(5)}}, (5.0, 0.1))),
    [("spikes", "WARN", (201, 301), ("out/w",))]),
  "the leaf that holds the norm, where no usual norm is known": (
    spikes({"leaves": {"grad": ("in/w", "out/w")},
            "vectors": {"grad/norm": (np.array([201, 301]), np.array([[1.0, 30.0], [2.0, 1.0]]))}}),
    [("spikes", "WARN", (201, 301), ("out/w", "in/w"))]),
  "a spike of a leaf alone": (
    jump_of_a_leaf(),
    [("spikes-of-leaves", "INFO", (251,), ("out/w",), "1 leaf spike while the norm was normal; the largest at step "
      "251, where 'out/w' was 9")]),
  "a spike of a leaf, and of the update": (
    jump_of_a_leaf(**{"update/norm": at(250, 0.5, 0.01)}),
    [("spikes", "WARN", (251,), ("out/w",), "'grad/norm/out/w' rose to 1, ", "; 'update/norm' rose to 0.5")]),
  "the group of a spike": (
    run_of({k: v for k, v in with_spikes((205,)).items() if k != "grad/scale"}
           | {"grad/norm/a": np.ones(N), "grad/norm/b": at(205, 30.0)}),
    [("spikes", "WARN", (206,), ("b",))]),
  "the farthest layer, by the limits": (  # 0.0005 is 20 times below 0.01, and 1 is 10 times above 0.1.
    run_of(healthy(**{"update/ratio": np.full(N, 0.05)}), **layered([5e-4, 1.0], key="update/ratio")),
    [("update-ratio-by-layer", "INFO", (), ("in/w", "out/w"), "the farthest is 'in/w' at 0.0005.")],
    {"ratio_low": 0.01, "ratio_high": 0.1}),
  "rows that were superseded, and a torn line": (
    dataclasses.replace(run_of(healthy()), superseded=1200, unreadable=1),
    [("superseded", "INFO", (), (), "1,200 rows were left out: the run went back to an earlier step"),
     ("unreadable", "INFO", (), (), "1 line could not be read and was left out; a process that dies")]),
  "one superseded row, and torn lines": (
    dataclasses.replace(run_of(healthy()), superseded=1, unreadable=2),
    [("superseded", "INFO", (), (), "1 row was left out: "),
     ("unreadable", "INFO", (), (), "2 lines could not be read and were left out; ")]),
  # What may be called sound.
  "a spike from which the loss recovered": (
    KNOWN, [("spikes", "WARN", (201,), (), "; the loss recovered.\nNothing needs to be restored. Look at the")]),
  "a spike, and no loss that says what came of it": (
    run_of({"grad/norm": KNOWN["grad/norm"]}), [("spikes", "WARN", (201,), (), ".\nLook at the batch of step 201.")]),
  "a spike, and the run ended by what came after": (
    spoiled(range(206, N), {"grad/norm": KNOWN["grad/norm"], "grad/scale": np.ones(N), "loss": at(range(206, N), np.nan,
            healthy()["loss"])}),
    [("nonfinite", "FAIL", None, ()), ("spikes", "WARN", (201,), (), ".\nLook at the batch of step 201.")]),
  "rejected steps, whose leaves are not those of the steps before": (
    REJECTED, [("nonfinite-dropped", "WARN", (301,), ()), ("spikes-caught", "INFO", (201,), ())]),
  # As a row of format 2 is: only the counters of what is inside are there.
  **{f"a rejected step, the row {row} its norms": (
      run_of(healthy(**{"skip/norm": at(200, 30.0), "skip/consecutive": at(200, 1.0, 0.0), **steps,
                        **{key: at(200, np.nan, healthy()[key]) for key in LEFT_OUT}})),
      [("spikes-caught", "INFO", (201,), (), "The clip or skip_steps caught 1 spike. At step 201 'grad/norm' rose")])
     for row, steps in (("with a counter without", {"grad/steps": ROWS + at(range(200), 1.0, 0.0)}),
                        ("without", {"grad/steps": np.full(N, np.nan)}))},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_finding_names_steps_batches_and_leaves(name):
  run, want, *limits = RUNS[name]
  check(run, want, *limits)


# As the rows are written --------------------------------------------------------------------------------------------


def test_the_checks_that_the_recorder_runs_need_no_more_than_a_few_rows():
  columns = {"grad/norm": np.array([1.0, np.nan, 1.0]), "loss": np.array([1.0, 2.0, np.nan])}
  flags = {"grad/norm": np.array([False, True, False]), "loss": np.array([False, False, True])}
  view = view_of(run_of(columns, flags=flags, steps=[7, 8, 9]), clipjax.runs.HealthLimits(), 0)
  (norm,), (loss,) = nonfinite_norm(view), nonfinite_loss(view)
  assert (norm.level, norm.steps, loss.level, loss.steps) == ("FAIL", (8,), "FAIL", (9,))


def test_the_page_says_that_the_leaves_of_a_rejected_step_are_not_known(tmp_path):
  text = clipjax.runs.write_report(REJECTED, tmp_path / "a.html").read_text()
  assert "Step <strong>201</strong>, the largest norm" in text  # Not the one that was dropped as it was not finite.
  assert "<code>skip_steps</code> rejected it" in text
