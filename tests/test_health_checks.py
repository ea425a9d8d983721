"""Each condition of a run gives its finding of `diagnose`, at its step and with its leaf, and no other defect."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from synthetic import N, bad, healthy, layered, only, run_of, with_spikes

import clipjax
from clipjax.runs.norms import norms_of_run
from clipjax.runs.words import number

RNG = np.random.default_rng(0)
NOISE = np.exp(RNG.normal(0, 0.05, N))
NORMS = np.exp(RNG.normal(0, 0.15, N))
ROWS = np.arange(N)


def since(row, then, before=1.0):
  """A column that changes at a row."""
  return np.where(row > ROWS, before, then)


def at(rows, then, before):
  """A column that has other values at some rows."""
  return np.where(np.isin(ROWS, rows), then, before)


def two_layers(*changes):
  """Norms of two layers at the rows 0, 10, 20, ...; a change is the first of these rows, the layer and its norm."""
  values = np.tile([1.0, 0.3], (40, 1))
  for row, layer, norm in changes:
    values[row:, layer] = norm
  return layered(values)


LOSS = healthy()["loss"]
CLIP_AT_50 = {"grad/max_norm": np.full(N, 50.0), "grad/scale": np.ones(N), "grad/clip_fraction": np.zeros(N)}

# Columns that differ from a healthy run, and the findings: name, level, steps (None: not compared), leaves.
CONDITIONS = {
  "the loss leaves from the start": (
    {"loss": 4.85 * np.exp(np.linspace(0, 5, N)) * NOISE}, [("diverged", "FAIL", None, ())]),
  "the loss leaves in the middle, slowly": (
    {"loss": np.where(ROWS < 200, LOSS, LOSS[199] + np.linspace(0, 9, 2 * N)[ROWS] * (ROWS - 200) / 90) * NOISE},
    [("diverged", "FAIL", None, ())]),
  "what was learned is lost at a step": (
    {"loss": since(250, 4.0, LOSS) * NOISE}, [("diverged", "FAIL", (251,), ())]),
  "a part of what was learned is lost": (
    {"loss": np.where(ROWS < 250, LOSS, LOSS + (ROWS - 250) / 150) * NOISE}, [("rising-loss", "WARN", None, ())]),
  "a loss at chance": ({"loss": 2.303 * NOISE}, [("not-learning", "WARN", (), ())]),
  "eight more on the loss for four steps, with a usual norm": (
    {"loss": at([200, 201, 202, 203], LOSS + 8, LOSS)}, [("spikes", "WARN", (201,), ())]),
  "a norm at step 17": ({"grad/norm": at(16, 1.4e7, NORMS), "grad/scale": np.ones(N)}, [("spikes", "WARN", (17,), ())]),
  "a norm at step 40": ({"grad/norm": at(39, 110.0, NORMS), "grad/scale": np.ones(N)}, [("spikes", "WARN", (40,), ())]),
  "a clip that is too high": (
    {"grad/norm": at(200, 112.0, 0.7 * NORMS), **CLIP_AT_50, "grad/scale": at(200, 50 / 112, 1.0),
     "grad/norm_clipped": at(200, 50.0, 0.7 * NORMS), "loss": at([201, 202], 12.9, LOSS)},
    [("spikes", "WARN", (201,), ())]),
  "a clip that catches": (
    {"grad/norm": at(200, 112.0, NORMS), "grad/scale": at(200, 0.01, 1.0), "grad/norm_clipped": at(200, 1.1, NORMS)},
    []),
  "a learning rate a hundred times too high for a step": (
    {"update/norm": at(250, 0.85, 0.01 * NOISE), "learning_rate": at(250, 0.1, 0.001),
     "grad/norm": at([251, 252], 20.0, NORMS), "grad/scale": np.ones(N)},
    [("update-spike", "WARN", (251,), ())]),
  "a learning rate of 0 in the end": (
    {"learning_rate": since(300, 0.0)}, [("stopped", "FAIL", (301,), ())]),
  "updates of 0 in the end": ({"update/norm": since(300, 0.0)}, [("stopped", "FAIL", (301,), ())]),
  "every step rejected in the end": (
    {"skip/consecutive": np.maximum(0, ROWS - 249), "skip/fraction": np.maximum(0, ROWS - 249) / N},
    [("stopped", "FAIL", (251,), ())]),
  "many steps rejected": (
    {"skip/consecutive": (ROWS % 5 < 2) * (1 + ROWS % 5), "skip/fraction": np.full(N, 0.4)},
    [("skipped", "FAIL", None, ())]),
  "some steps rejected": ({"skip/fraction": np.full(N, 0.125)}, [("skipped", "WARN", (), ())]),
  "a norm that rises tenfold, evenly": (
    {"grad/norm": NORMS * np.linspace(1, 10, N), "grad/scale": np.ones(N)}, [("rising-norm", "WARN", (), ())]),
  "updates far too large, and nothing is learned": (
    {"update/ratio": np.full(N, 0.05), "loss": 2.3 * NOISE}, [("update-ratio", "WARN", (), ())]),
  "updates far too small, and nothing is learned": (
    {"update/ratio": np.full(N, 2e-5), "loss": 2.3 * NOISE}, [("update-ratio", "WARN", (), ())]),
  "large updates of a run that learns": ({"update/ratio": np.full(N, 0.05)}, []),
  "a clip that takes most of the gradient": (
    {"grad/clip_fraction": np.ones(N), "grad/norm_clipped": np.full(N, 1e-3), "grad/scale": np.full(N, 1e-3)},
    [("clipped-often", "WARN", (), ())]),
  "a clip that acts in most steps and takes little": ({"grad/clip_fraction": np.full(N, 0.9)}, []),
  "a clip that lengthens the step": (
    {"effect/ratio": 1.5 * NOISE, "effect/cosine": np.full(N, 0.98)}, [("clip-lengthens", "WARN", (), ())]),
  "a clip that leaves the step alone": ({"effect/ratio": np.ones(N), "effect/cosine": np.ones(N)}, []),
  "zeros": ({"grad/zero_fraction": np.full(N, 0.625)}, [("zeros", "WARN", (), ())]),
}  # fmt: skip

BY_LAYER = {
  "a layer without a gradient": (two_layers((0, 0, 0.0)), [("zero-gradient", "FAIL", (), ("in/w",))]),
  "a layer that dies": (two_layers((20, 1, 0.0)), [("zero-gradient", "FAIL", (201,), ("out/w",))]),
  "a layer without a gradient at the very end": (two_layers((38, 1, 0.0)), []),
  "an early layer that hardly gets one": (
    layered([1e-4, 2e-2, 0.5], ("in/w", "mid/w", "out/w")), [("layer-spread", "WARN", (), ("in/w", "out/w"))]),
  "a bias whose gradient is rounding, beside its weights": (
    layered([1e-9, 0.2, 0.5], ("key/bias", "key/kernel", "out/w")), []),
  "a leaf whose gradient is rounding, alone": (layered([1e-9, 0.2, 0.5], ("a", "b", "c")), []),
  "layers of a stack that vanish with depth": (
    layered([1e-7, 1e-5, 1e-3, 0.1], tuple(f"blocks/w[{i}]" for i in range(4))),
    [("layer-spread", "WARN", (), ("blocks/w[0]", "blocks/w[3]"))]),
}  # fmt: skip


@pytest.mark.parametrize(
  ("columns", "vectors", "want"),
  [
    *(pytest.param(columns, {}, want, id=name) for name, (columns, want) in CONDITIONS.items()),
    *(pytest.param({}, vectors, want, id=name) for name, (vectors, want) in BY_LAYER.items()),
  ],
)
def test_a_condition_has_its_finding_and_no_other(columns, vectors, want):
  report = clipjax.runs.diagnose(run_of(healthy(**columns), **vectors))
  found = [finding for finding in report if finding.level != "INFO"]
  assert [(f.name, f.level) for f in found] == [(name, level) for name, level, *_ in want], str(report)
  for finding, (_, _, steps, leaves) in zip(found, want, strict=True):
    assert finding.leaves == leaves
    assert steps is None or finding.steps == steps, finding
    assert finding.rule and finding.advice.endswith("."), finding


def test_no_verdict_contradicts_itself():
  """Two conditions at once, of all pairs."""
  for one, other in itertools.combinations(CONDITIONS.values(), 2):
    report = clipjax.runs.diagnose(run_of(healthy(**(one[0] | other[0]))))
    advice = " ".join(finding.advice for finding in report)
    assert not ("Raise the learning rate" in advice and "Lower the learning rate" in advice), str(report)
    assert len(re.findall("Restore a checkpoint", advice)) <= 1, str(report)
    names = [finding.name for finding in report if finding.level != "INFO"]
    assert len(names) == len(set(names))


# What is not finite -------------------------------------------------------------------------------------------------


def spoiled(rows, **columns):
  """A healthy run whose norm is not finite at some rows, and its flags."""
  run, bad_rows = healthy(**columns), np.isin(ROWS, rows)
  run["grad/norm"][bad_rows] = run["grad/norm_clipped"][bad_rows] = np.nan
  return run, {"grad/norm": bad_rows}


def test_steps_that_are_not_finite_and_the_layer_where_it_began():
  columns, flags = spoiled([70, 71, 100])
  values = np.ones((40, 2))
  values[7, 1] = np.inf  # Row 7 is step 71.
  run = run_of(columns, flags=flags, **layered(values))
  report = clipjax.runs.diagnose(run)
  assert bad(report) == ["nonfinite"]
  finding = only(report, "nonfinite")
  assert finding.level == "FAIL"
  assert finding.message == "3 of 400 steps had a norm of inf or NaN, at steps 71, 72, 101; first in 'out/w'."
  assert finding.advice.startswith("Restore a checkpoint from before step 71. Look at the batch of step 71, and chain")
  assert (finding.source, finding.steps, finding.leaves) == ("", (71, 72, 101), ("out/w",))
  counts = np.where(np.arange(40)[:, None] == 7, [5.0, 0.0], 0.0)
  run.vectors["grad/nonfinite"] = run.vectors["grad/norm"][0], counts
  assert "first in 'in/w'." in only(clipjax.runs.diagnose(run), "nonfinite").message  # The count of entries goes first.
  groups = columns | {"grad/norm/a": np.ones(N), "grad/norm/b": np.where(flags["grad/norm"], np.nan, 1)}
  flags["grad/norm/b"] = flags["grad/norm"]
  assert "; first in 'b'." in only(clipjax.runs.diagnose(run_of(groups, flags=flags)), "nonfinite").message
  without = clipjax.runs.diagnose(run_of(columns, flags=flags))
  assert "clipjax.watch()" in only(without, "nonfinite").advice


def test_steps_that_were_not_recorded_are_counted_too():
  report = clipjax.runs.diagnose(run_of(healthy(**{"grad/nonfinite_steps": ROWS // 100})))
  assert "3 of 400 steps had a norm of inf or NaN, at steps that were not recorded" in only(report, "nonfinite").message


def test_a_loss_that_is_not_finite():
  columns, rows = healthy(), ROWS == 200
  columns["loss"][rows] = np.nan
  report = clipjax.runs.diagnose(run_of(columns, flags={"loss": rows}))
  assert bad(report) == ["nonfinite-loss"]
  assert only(report, "nonfinite-loss").level == "FAIL"
  assert "1 of 400 values of 'loss' were inf or NaN, at step 201." in only(report, "nonfinite-loss").message
  columns["skip/consecutive"][rows] = 1
  assert only(clipjax.runs.diagnose(run_of(columns, flags={"loss": rows})), "nonfinite-loss").level == "WARN"


@pytest.mark.parametrize("key", ["train_loss", "train/loss", "total_loss", "val_loss", "d_loss"])
def test_every_loss_is_looked_at(key):
  columns, rows = healthy(), ROWS == 200
  columns[key] = np.where(rows, np.nan, columns["loss"])
  report = clipjax.runs.diagnose(run_of(columns, flags={key: rows}))
  assert bad(report) == ["nonfinite-loss"] and repr(key) in report[0].message


def test_steps_that_overflowed_under_loss_scaling_are_no_defect():
  columns, flags = spoiled([0, 1, 2, 150])
  columns["skip/consecutive"][[0, 1, 2, 150]] = [1, 2, 3, 1]
  scale = 2.0 ** (16 - np.cumsum(np.isin(ROWS, [0, 1, 2, 150])))
  for loss_scale in (scale, np.append(2.0**16, scale[:-1])):  # Pushed after the step, or before it.
    report = clipjax.runs.diagnose(run_of(columns | {"loss_scale": loss_scale}, flags=flags))
    assert bad(report) == []
    assert "4 of 400 steps" in only(report, "loss-scaling").message
  for other in ({}, {"loss_scale": np.full(N, 1024.0)}):
    assert bad(clipjax.runs.diagnose(run_of(columns | other, flags=flags))) == ["nonfinite-dropped"]


def test_what_comes_after_the_end_of_a_training_is_not_judged():
  rows = ROWS >= 200
  columns = healthy(**{"grad/zero_fraction": np.where(rows, 1.0, 0.1), "update/ratio": np.where(rows, 9.0, 1e-3)})
  for key in ("grad/norm", "grad/norm_clipped", "loss"):
    columns[key][rows] = np.nan
  values = np.tile([1.0, 0.3], (40, 1))
  values[20:] = np.nan, 0.0
  run = run_of(columns, flags={"grad/norm": rows, "loss": rows}, **layered(values))
  assert bad(clipjax.runs.diagnose(run)) == ["nonfinite"]


def test_what_ends_a_training_first_is_its_cause():
  columns, flags = spoiled(np.arange(350, N))
  columns["loss"] = since(200, 50.0, LOSS) * NOISE
  report = clipjax.runs.diagnose(run_of(columns, flags=flags))
  assert [(f.name, f.steps) for f in report if f.level != "INFO"] == [("diverged", (201,))]
  columns, flags = spoiled(np.arange(150, N))
  columns["loss"] = since(160, 50.0, LOSS) * NOISE
  assert bad(clipjax.runs.diagnose(run_of(columns, flags=flags))) == ["nonfinite"]


def test_a_training_that_went_on_is_judged_on():
  columns, flags = spoiled([150])
  columns["loss"] = since(300, 50.0, LOSS) * NOISE
  report = clipjax.runs.diagnose(run_of(columns, flags=flags))
  assert [(f.name, f.steps) for f in report if f.level != "INFO"] == [("nonfinite", (151,)), ("diverged", (301,))]


# Several states -----------------------------------------------------------------------------------------------------


def test_every_state_is_judged():
  columns, rows = healthy(**{"grad_2/norm": 5 * NORMS[::-1], "grad_2/nonfinite_steps": ROWS >= 300}), ROWS == 300
  columns["grad_2/norm"][rows] = np.nan
  report = clipjax.runs.diagnose(run_of(columns, flags={"grad_2/norm": rows}))
  assert bad(report) == ["nonfinite"]
  assert "had a norm of 'grad_2' of inf or NaN, at step 301" in only(report, "nonfinite").message
  columns = healthy(**{"critic/norm": at(300, 80.0, NORMS[::-1])})
  assert only(clipjax.runs.diagnose(run_of(columns)), "spikes").steps == (301,)


def test_what_is_not_judged_is_said():
  columns = healthy(**{"aux_loss": NOISE, "copy/norm": healthy()["grad/norm"], "eval_loss": at([5, 9], 1.0, np.nan)})
  message = only(clipjax.runs.diagnose(run_of(columns)), "not-judged").message
  assert "'aux_loss': for spikes and for what is not finite alone, since 'loss' is the one" in message
  assert "'copy': the same norms as 'grad'" in message
  assert "'eval_loss': fewer than 8 values" in message
  assert "not-judged" not in [f.name for f in clipjax.runs.diagnose(run_of(healthy()))]


# Clips --------------------------------------------------------------------------------------------------------------


def test_a_clip_that_takes_most_of_the_gradient_does_no_harm_under_adam():
  columns = healthy(**CONDITIONS["a clip that takes most of the gradient"][0])
  run = dataclasses.replace(run_of(columns), optimizer=("ScaleByAdamState",))
  report = clipjax.runs.diagnose(run)
  assert bad(report) == []
  assert only(report, "clipped").advice.startswith("No harm under this optimizer")
  run = dataclasses.replace(run, optimizer=("TraceState",))
  assert only(clipjax.runs.diagnose(run), "clipped-often").message == (
    "'grad' clipped 100% of the steps, and left <0.1% of the gradient (median)."
  )


def test_a_clip_by_group_is_judged_group_by_group():
  # The clip acts on some group in every step, on each group in no more than half of them.
  columns = healthy(**{"grad/clip_fraction": np.ones(N)})
  odd = ROWS % 2 == 1
  columns |= {"grad/scale/a": np.where(odd, 0.01, 1), "grad/scale/b": np.where(odd, 1, 0.01)}
  assert bad(clipjax.runs.diagnose(run_of(columns))) == []
  columns["grad/scale/b"] = np.where(ROWS % 4, 0.01, 1.0)
  text = "'grad' clipped 75% of the steps in 'b', and left 1% of the gradient (median)."
  assert only(clipjax.runs.diagnose(run_of(columns)), "clipped-often").message == text
  # A Recorder writes groups at some rows as vectors too, which would be too few.
  some = {"leaves": {"grad": ("b", "a")}, "vectors": {"grad/scale": (np.array([1, 51]), np.full((2, 2), 0.5))}}
  assert only(clipjax.runs.diagnose(run_of(columns, **some)), "clipped-often").message == text
  assert "some leaf or group in 100% of 400 steps" in only(clipjax.runs.diagnose(run_of(columns)), "clipped").message


def test_a_clip_by_leaf_is_judged_leaf_by_leaf_where_there_are_enough_rows():
  columns = healthy(**{"grad/clip_fraction": np.ones(N)})
  scales = np.where(np.arange(40)[:, None] % 5 < [2, 4], 0.01, 1.0)
  run = run_of(columns, **layered(scales, key="grad/scale"))
  assert only(clipjax.runs.diagnose(run), "clipped-often").message.startswith(
    "'grad' clipped 80% of the steps in 'out/w'"
  )
  few = clipjax.runs.HealthLimits(min_steps=41)
  assert "clipped-often" not in bad(clipjax.runs.diagnose(run, limits=few))


def test_rows_from_the_history_of_a_watch_have_the_threshold_of_the_next_push():
  columns = with_spikes()
  columns["grad/scale"] = np.minimum(1, columns["grad/max_norm"] / columns["grad/norm"])
  pushed = ROWS % 8 == 7
  for key in set(columns) - {"grad/norm"}:
    columns[key] = np.where(pushed, columns[key], np.nan)
  assert bad(clipjax.runs.diagnose(run_of(columns))) == []
  columns["grad/max_norm"][pushed] = 50.0
  assert "spikes" in bad(clipjax.runs.diagnose(run_of(columns)))


# Losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["val_loss", "validation/loss", "eval_loss", "Test loss"])
def test_a_validation_loss_that_rises_while_the_loss_falls(key):
  columns = healthy(val_loss=np.full(N, np.nan))
  steps = ROWS + 1
  columns[key] = np.where(steps % 4 == 0, 2 + np.abs(steps - 200) / 100, np.nan)
  report = clipjax.runs.diagnose(run_of(columns))
  assert bad(report) == ["overfit"]
  values = columns[key][np.isfinite(columns[key])]
  medians = [np.median(part) for part in np.array_split(values, 10)]
  message = only(report, "overfit").message
  assert message.startswith(f"{key!r} ends {100 * (medians[-1] / min(medians) - 1):.3g}% above its best")
  assert "near step 200" in message and only(report, "overfit").steps == (200,)
  columns[key][3] = 1.5  # One lucky validation is not the best part of the run.
  assert "above its best, 2.18 near step 200" in only(clipjax.runs.diagnose(run_of(columns)), "overfit").message
  level = columns | {"loss": np.where(ROWS < 100, LOSS, LOSS[:100].min())}
  assert bad(clipjax.runs.diagnose(run_of(level))) == []  # Both are bad, which is no overfitting.
  slightly = columns | {key: np.where(steps % 4 == 0, 2 + np.abs(steps - 200) / 5000, np.nan)}
  assert bad(clipjax.runs.diagnose(run_of(slightly))) == []
  falling = columns | {key: np.where(steps % 4 == 0, 4 - steps / 200, np.nan)}
  assert bad(clipjax.runs.diagnose(run_of(falling))) == []


@pytest.mark.parametrize("key", ["train_loss", "train/loss", "trainLoss", "total_loss", "training/total-loss", "nll"])
def test_the_loss_that_is_trained_may_have_another_name(key):
  columns = healthy(**{key: since(250, 40.0, LOSS) * NOISE})
  del columns["loss"]
  report = clipjax.runs.diagnose(run_of(columns))
  assert [(f.name, f.steps) for f in report if f.level != "INFO"] == [("diverged", (251,))]


def test_eighteen_steps_are_enough_to_see_a_loss_explode():
  run = run_of({"loss": np.geomspace(2.5, 1e8, 18)})
  (finding,) = [f for f in clipjax.runs.diagnose(run) if f.level != "INFO"]
  assert (finding.name, finding.level, finding.steps) == ("diverged", "FAIL", (2,))


def test_norms_that_explode_without_a_loss():
  run = run_of({"grad/norm": NORMS * since(300, 1000.0)})
  assert [(f.name, f.steps) for f in clipjax.runs.diagnose(run) if f.level == "FAIL"] == [("diverged", (301,))]


def test_a_run_that_was_recorded_from_its_middle_on_may_have_learned_before():
  columns = healthy(loss=0.3 * NOISE)
  assert bad(clipjax.runs.diagnose(run_of(columns))) == ["not-learning"]
  assert bad(clipjax.runs.diagnose(run_of(columns, steps=ROWS + 5000))) == []


# Layers and updates -------------------------------------------------------------------------------------------------


def test_ratios_of_parameters_that_were_not_given_are_not_judged():
  assert bad(clipjax.runs.diagnose(run_of(healthy(**{"update/ratio": np.zeros(N)})))) == []


def test_the_ratio_of_a_gradient_is_not_judged():
  assert bad(clipjax.runs.diagnose(run_of(healthy(**{"grad/ratio": np.full(N, 50.0)})))) == []


def test_a_layer_with_large_updates_is_told_without_a_warning():
  report = clipjax.runs.diagnose(run_of(healthy(), **layered([1e-3, 0.2], key="update/ratio")))
  assert bad(report) == []
  finding = only(report, "update-ratio-by-layer")
  assert "1 of 2 layers have a median 'update/ratio' outside, the farthest 'out/w' with 0.2." in finding.message
  assert finding.leaves == ("out/w",)


def test_the_warm_up_does_not_count_for_the_ratio_of_a_layer():
  run = run_of(healthy(), **layered([1e-3, 1e-3], key="update/ratio"))
  steps, values = run.vectors["update/ratio"]
  early = np.append(np.full(50, 1), steps), np.concatenate([np.full((50, 2), 0.5), values])
  assert bad(clipjax.runs.diagnose(run)) == []
  names = [f.name for f in clipjax.runs.diagnose(dataclasses.replace(run, vectors={"update/ratio": early})).findings]
  assert "update-ratio-by-layer" not in names


def test_groups_without_a_gradient_are_columns():
  columns = healthy(**{"grad/norm/head": np.zeros(N), "grad/norm/rest": np.ones(N)})
  assert only(clipjax.runs.diagnose(run_of(columns)), "zero-gradient").leaves == ("head",)


@pytest.mark.parametrize(("factor", "text"), [(1e4, "above 100"), (1e-8, "below 1e-05")])
def test_the_size_of_the_norm_is_a_hint_alone(factor, text):
  columns = {"grad/norm": healthy()["grad/norm"] * factor}
  report = clipjax.runs.diagnose(run_of(columns))
  assert bad(report) == []
  assert f"is {number(np.median(columns['grad/norm'][40:]))}, {text}." in only(report, "norm-scale").message
  limits = clipjax.runs.HealthLimits(norm_low=0.0, norm_high=math.inf)
  assert "norm-scale" not in [f.name for f in clipjax.runs.diagnose(run_of(columns), limits=limits).findings]


def test_a_rejected_step_without_a_norm_of_its_own_has_the_one_that_skip_steps_saw():
  rows = np.isin(ROWS, [50, 51])
  columns = healthy()
  for key in ("grad/norm", "grad/norm_clipped", "grad/scale", "grad/max_norm"):  # Format 2 leaves them out of the row.
    columns[key] = np.where(rows, np.nan, columns[key])
  columns["skip/norm"] = np.where(rows, 70.0, columns["skip/norm"])
  columns["skip/consecutive"][rows] = [1, 2]
  seen = norms_of_run(run_of(columns), "grad", None)
  assert seen.values[rows].tolist() == [70, 70] and seen.rejected.tolist() == rows.tolist()
  assert seen.values[~rows].tolist() == columns["grad/norm"][~rows].tolist()
