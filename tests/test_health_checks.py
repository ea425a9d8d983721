"""Each defect of a run gives its finding of `diagnose`, with the right numbers, and no other."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import N, bad, healthy, layered, only, run_of, with_spikes

import clipjax
from clipjax.runs.health.detectors import SpikeDetector
from clipjax.runs.norms import norms_of_run
from clipjax.runs.words import number


def test_steps_that_are_not_finite_and_the_layer_where_it_began():
  columns, at = healthy(), np.zeros(N, bool)
  at[[70, 71, 100]] = True
  columns["grad/norm"][at] = columns["grad/norm_clipped"][at] = np.nan
  values = np.ones((40, 2))
  values[7, 1] = np.inf  # Row 7 is step 71.
  run = run_of(columns, flags={"grad/norm": at}, **layered(values))
  report = clipjax.runs.diagnose(run)
  assert bad(report) == ["nonfinite"]
  finding = only(report, "nonfinite")
  assert finding.level == "FAIL"
  assert finding.message == "3 of 400 steps had a norm of inf or NaN, at steps 71, 72, 101; first in 'out/w'."
  assert finding.rule == "none may occur, as one such step that is applied makes every parameter NaN"
  assert (finding.source, finding.steps, finding.leaves) == ("", (71, 72, 101), ("out/w",))
  run.vectors["grad/nonfinite"] = (run.vectors["grad/norm"][0], np.where(np.arange(40)[:, None] == 7, [5.0, 0.0], 0.0))
  assert (
    "first in 'in/w'." in only(clipjax.runs.diagnose(run), "nonfinite").message
  )  # The count of entries speaks first.
  groups = columns | {"grad/norm/a": np.ones(N), "grad/norm/b": np.where(at, np.nan, 1)}
  flags = {"grad/norm": at, "grad/norm/b": at}
  assert "; first in 'b'." in only(clipjax.runs.diagnose(run_of(groups, flags=flags)), "nonfinite").message
  without = clipjax.runs.diagnose(run_of(columns, flags={"grad/norm": at}))
  assert "clipjax.watch()" in only(without, "nonfinite").advice


def test_steps_that_were_not_recorded_are_counted_too():
  report = clipjax.runs.diagnose(run_of(healthy(**{"grad/nonfinite_steps": np.arange(N) // 100})))
  assert (
    "3 of 400 steps had a norm of inf or NaN, at steps that were not recorded." in only(report, "nonfinite").message
  )


def test_a_loss_that_is_not_finite():
  columns, at = healthy(), np.arange(N) == 200
  columns["loss"][at] = np.nan
  report = clipjax.runs.diagnose(run_of(columns, flags={"loss": at}))
  assert bad(report) == ["nonfinite-loss"]
  assert only(report, "nonfinite-loss")[0] == "FAIL"
  assert "1 of 400 losses were inf or NaN, at step 201." in only(report, "nonfinite-loss").message
  columns["skip/consecutive"][at] = 1
  assert only(clipjax.runs.diagnose(run_of(columns, flags={"loss": at})), "nonfinite-loss").level == "WARN"


def test_a_layer_whose_gradient_is_zero_throughout():
  values = np.ones((40, 2))
  values[:, 0] = 0
  report = clipjax.runs.diagnose(run_of(healthy(), **layered(values)))
  assert bad(report) == ["zero-gradient"]
  assert only(report, "zero-gradient")[0] == "FAIL"
  assert "1 of 2 layers had a gradient of exactly 0 at all 40 steps at which it was recorded: 'in/w'." in (
    only(report, "zero-gradient").message
  )
  values[9, 0] = 1e-3
  assert bad(clipjax.runs.diagnose(run_of(healthy(), **layered(values)))) == []
  columns = healthy(**{"grad/norm/head": np.zeros(N), "grad/norm/rest": np.ones(N)})
  assert "'head'" in only(clipjax.runs.diagnose(run_of(columns)), "zero-gradient").message  # Groups are columns.


def test_clipped_in_more_than_half_of_the_steps():
  fractions = np.full(N, 0.7125)
  report = clipjax.runs.diagnose(run_of(healthy(**{"grad/clip_fraction": fractions})))
  assert bad(report) == ["clipped-often"]
  message = only(report, "clipped-often").message
  assert message == "'grad' clipped 71.2% of the steps."
  finding = only(report, "clipped-often")
  assert finding.rule.startswith("at most 50%; ")
  assert finding.source == "Google's tuning playbook, https://github.com/google-research/tuning_playbook"
  assert "AutoClip" not in only(report, "clipped-often").advice
  assert bad(clipjax.runs.diagnose(run_of(healthy(**{"grad/clip_fraction": np.full(N, 0.5)})))) == []
  adaptive = healthy(**{"grad/clip_fraction": fractions, "grad/max_norm": np.linspace(3, 1, N)})
  assert "AutoClip" in only(clipjax.runs.diagnose(run_of(adaptive)), "clipped-often").advice


def test_a_clip_by_group_is_judged_group_by_group():
  # The clip acts on some group in every step, on each group in no more than half of them.
  columns = healthy(**{"grad/clip_fraction": np.ones(N)})
  odd = np.arange(N) % 2 == 1
  columns |= {"grad/scale/a": np.where(odd, 0.5, 1), "grad/scale/b": np.where(odd, 1, 0.5)}
  assert bad(clipjax.runs.diagnose(run_of(columns))) == []
  columns["grad/scale/b"] = np.where(np.arange(N) % 4, 0.5, 1.0)
  message = only(clipjax.runs.diagnose(run_of(columns)), "clipped-often").message
  assert message.startswith("'grad' clipped 75% of the steps in 'b'.")
  # A Recorder writes groups at some rows as vectors too, which would be too few.
  some = {"leaves": {"grad": ("b", "a")}, "vectors": {"grad/scale": (np.array([1, 51]), np.full((2, 2), 0.5))}}
  assert "75% of the steps in 'b'" in only(clipjax.runs.diagnose(run_of(columns, **some)), "clipped-often").message
  assert "some leaf or group in 100% of 400 steps" in only(clipjax.runs.diagnose(run_of(columns)), "clipped").message


def test_a_clip_by_leaf_is_judged_leaf_by_leaf_where_there_are_enough_rows():
  columns = healthy(**{"grad/clip_fraction": np.ones(N)})
  scales = np.where(np.arange(40)[:, None] % 5 < [2, 4], 0.5, 1.0)
  report = clipjax.runs.diagnose(run_of(columns, **layered(scales, key="grad/scale")))
  assert only(report, "clipped-often").message.startswith("'grad' clipped 80% of the steps in 'out/w'.")
  few = clipjax.runs.HealthLimits(min_steps=41)
  assert "clipped-often" not in bad(
    clipjax.runs.diagnose(run_of(columns, **layered(scales, key="grad/scale")), limits=few)
  )


def test_spikes_that_no_clip_caught():
  report = clipjax.runs.diagnose(run_of({"grad/norm": with_spikes()["grad/norm"]}))
  assert bad(report) == ["spikes"]
  message = only(report, "spikes").message
  assert message.startswith("2 of 400 norms were spikes that nothing caught, at steps 201, 301, the largest 30 against")
  finding = only(report, "spikes")
  assert finding.rule == "at most 6 standard deviations above the mean of the 128 norms before"
  assert (finding.source.partition(",")[0], finding.steps, finding.leaves) == ("OLMo-core", (201, 301), ())


def test_the_limit_of_a_spike_is_that_of_the_rule_for_skip_steps():
  norms = with_spikes()["grad/norm"]
  rule = clipjax.rules.rolling_sigma(6.0, window=128)

  def step(state, norm):
    limit, _, state = rule.update(norm, state, global_norm=norm)
    return state, limit

  with jax.enable_x64(True):
    limits = jax.lax.scan(step, rule.init((), jnp.float64), jnp.asarray(norms))[1]
  bounds = SpikeDetector(6.0, 128).feed(norms)
  np.testing.assert_array_equal(np.isinf(bounds), np.asarray(limits) == np.finfo(np.float64).max)
  np.testing.assert_allclose(bounds[np.isfinite(bounds)], np.asarray(limits)[np.isfinite(bounds)], rtol=1e-9)


def test_spikes_that_the_clip_or_skip_steps_caught_are_no_warning():
  columns = with_spikes()
  columns["grad/scale"] = np.minimum(1, columns["grad/max_norm"] / columns["grad/norm"])
  report = clipjax.runs.diagnose(run_of(columns))
  assert bad(report) == []
  assert only(report, "spikes-caught").message.startswith(
    "2 of 400 norms were spikes that the clip or skip_steps caught, at st"
  )
  columns = {key: with_spikes()[key] for key in ("grad/norm", "skip/consecutive")}
  columns["skip/consecutive"][[200, 300]] = 1
  assert bad(clipjax.runs.diagnose(run_of(columns))) == []


def test_rows_from_the_history_of_a_watch_have_the_threshold_of_the_next_push():
  columns = with_spikes()
  columns["grad/scale"] = np.minimum(1, columns["grad/max_norm"] / columns["grad/norm"])
  pushed = np.arange(N) % 8 == 7
  for key in set(columns) - {"grad/norm"}:
    columns[key] = np.where(pushed, columns[key], np.nan)
  assert bad(clipjax.runs.diagnose(run_of(columns))) == []
  columns["grad/max_norm"][pushed] = 50.0
  assert "spikes" in bad(clipjax.runs.diagnose(run_of(columns)))


def test_a_threshold_above_every_spike():
  columns = with_spikes()
  columns |= {"grad/max_norm": np.full(N, 50.0), "grad/scale": np.ones(N), "grad/clip_fraction": np.zeros(N)}
  report = clipjax.runs.diagnose(run_of(columns))
  assert bad(report) == ["spikes", "clip-too-high"]
  message = only(report, "clip-too-high").message
  assert message.startswith("'grad' never clipped while 2 spikes up to 30 passed: max_norm was 50.")
  measured = columns | {"grad/max_norm": np.full(N, np.nan)}  # max_norm=inf only measures.
  assert bad(clipjax.runs.diagnose(run_of(measured))) == ["spikes"]


def test_a_norm_that_rises_late():
  columns = healthy()
  norm = np.where(np.arange(N) < 310, 1.0, 3.0)
  report = clipjax.runs.diagnose(run_of({"grad/norm": norm, "loss": columns["loss"]}))
  assert "rising-norm" in bad(report)
  assert "rose 3 times late in the run: median 1 in the third quarter of the steps, 3 in the last." in (
    only(report, "rising-norm").message
  )
  assert only(report, "rising-norm").rule.startswith("at most 2 times, a limit of clipjax; ")
  slow = np.exp(np.linspace(0, 4, N))
  assert bad(clipjax.runs.diagnose(run_of({"grad/norm": slow}))) == ["rising-norm"]
  zero = np.where(np.arange(N) < 310, 0.0, 3.0)
  assert "from 0" in only(clipjax.runs.diagnose(run_of({"grad/norm": zero})), "rising-norm").message


def test_a_loss_that_rises():
  report = clipjax.runs.diagnose(run_of(healthy(loss=np.linspace(4, 8, N), val_loss=np.full(N, np.nan))))
  assert bad(report) == ["rising-loss"]
  # The warm-up of 40 steps is left out: quarters of 90 steps, from step 41.
  quarters = np.array_split(np.linspace(4, 8, N)[40:], 4)
  text = f"median {np.median(quarters[3]):.3g} in the last quarter of the steps, above the largest of the first quarter"
  assert f"{text}, {quarters[0].max():.3g}." in only(report, "rising-loss").message


@pytest.mark.parametrize("key", ["val_loss", "validation/loss", "eval_loss", "Test loss"])
def test_a_validation_loss_that_rises_while_the_loss_falls(key):
  columns = healthy()
  steps = np.arange(1, N + 1)
  del columns["val_loss"]
  columns[key] = np.where(steps % 4 == 0, 2 + np.abs(steps - 200) / 100, np.nan)
  report = clipjax.runs.diagnose(run_of(columns))
  assert bad(report) == ["overfit"]
  values = columns[key][np.isfinite(columns[key])]
  medians = [np.median(part) for part in np.array_split(values, 10)]
  message = only(report, "overfit").message
  assert message.startswith(f"{key!r} ends {100 * (medians[-1] / min(medians) - 1):.3g}% above its best")
  assert "near step 200" in message
  columns[key][3] = 1.5  # One lucky validation is not the best part of the run.
  assert "above its best, 2.18 near step 200" in only(clipjax.runs.diagnose(run_of(columns)), "overfit").message
  level = columns | {"loss": np.full(N, 2.0)}
  assert bad(clipjax.runs.diagnose(run_of(level))) == []  # Both are bad, which is no overfitting.
  slightly = columns | {key: np.where(steps % 4 == 0, 2 + np.abs(steps - 200) / 5000, np.nan)}
  assert bad(clipjax.runs.diagnose(run_of(slightly))) == []
  falling = columns | {key: np.where(steps % 4 == 0, 4 - steps / 200, np.nan)}
  assert bad(clipjax.runs.diagnose(run_of(falling))) == []


@pytest.mark.parametrize(("ratio", "advice"), [(0.05, "Lower"), (2e-5, "Raise")])
def test_updates_too_large_or_small_for_their_parameters(ratio, advice):
  report = clipjax.runs.diagnose(run_of(healthy(**{"update/ratio": np.full(N, ratio)})))
  assert bad(report) == ["update-ratio"]
  finding = only(report, "update-ratio")
  assert finding.message.endswith(f"is {ratio:.3g}.")
  assert finding.rule.startswith("0.0001 to 0.01, ") and finding.source.startswith("CS231n")
  assert finding.advice.startswith(advice)


def test_ratios_of_parameters_that_were_not_given_are_not_judged():
  assert bad(clipjax.runs.diagnose(run_of(healthy(**{"update/ratio": np.zeros(N)})))) == []


def test_the_ratio_of_a_gradient_is_not_judged():
  assert bad(clipjax.runs.diagnose(run_of(healthy(**{"grad/ratio": np.full(N, 50.0)})))) == []


def test_a_layer_with_large_updates_is_told_without_a_warning():
  report = clipjax.runs.diagnose(run_of(healthy(), **layered([1e-3, 0.2], key="update/ratio")))
  assert bad(report) == []
  assert "1 of 2 layers have a median 'update/ratio' outside, the farthest 'out/w' with 0.2." in (
    only(report, "update-ratio-by-layer").message
  )


def test_the_warm_up_does_not_count_for_the_ratio_of_a_layer():
  run = run_of(healthy(), **layered([1e-3, 1e-3], key="update/ratio"))
  steps, values = run.vectors["update/ratio"]
  early = np.append(np.full(50, 1), steps), np.concatenate([np.full((50, 2), 0.5), values])
  assert bad(clipjax.runs.diagnose(run)) == []
  names = [f.name for f in clipjax.runs.diagnose(dataclasses.replace(run, vectors={"update/ratio": early})).findings]
  assert "update-ratio-by-layer" not in names


def test_layers_whose_norms_are_far_apart():
  report = clipjax.runs.diagnose(run_of(healthy(), **layered([1e-4, 0.5])))
  assert bad(report) == ["layer-spread"]
  finding = only(report, "layer-spread")
  assert finding.message.endswith(" are 5000 times apart: 0.0001 in 'in/w', 0.5 in 'out/w'.")
  assert finding.rule.startswith("at most 1000 times, a limit of clipjax; ")
  assert finding.leaves == ("in/w", "out/w")
  assert bad(clipjax.runs.diagnose(run_of(healthy(), **layered([6e-4, 0.5])))) == []
  assert bad(clipjax.runs.diagnose(run_of(healthy(), **layered([4e-4, 0.5])))) == ["layer-spread"]


def test_zeros_in_the_gradient():
  report = clipjax.runs.diagnose(run_of(healthy(**{"grad/zero_fraction": np.full(N, 0.625)})))
  assert bad(report) == ["zeros"]
  assert only(report, "zeros").message.startswith("62.5% of the entries of the gradient are exactly 0 (median).")


def test_many_rejected_steps():
  report = clipjax.runs.diagnose(run_of(healthy(**{"skip/fraction": np.full(N, 0.125)})))
  assert bad(report) == ["skipped"]
  assert only(report, "skipped").message == "skip_steps rejected 12.5% of 400 steps."
  assert only(report, "skipped").rule == "at most 5%, a limit of clipjax"


@pytest.mark.parametrize(("factor", "text"), [(1e4, "above 100"), (1e-8, "below 1e-05")])
def test_the_size_of_the_norm_is_a_hint_alone(factor, text):
  columns = {"grad/norm": healthy()["grad/norm"] * factor}
  report = clipjax.runs.diagnose(run_of(columns))
  assert bad(report) == []
  assert f"is {number(np.median(columns['grad/norm'][40:]))}, {text}." in only(report, "norm-scale").message
  limits = clipjax.runs.HealthLimits(norm_low=0.0, norm_high=math.inf)
  assert "norm-scale" not in [f.name for f in clipjax.runs.diagnose(run_of(columns), limits=limits).findings]


def test_a_rejected_step_without_a_norm_of_its_own_has_the_one_that_skip_steps_saw():
  at = np.isin(np.arange(N), [50, 51])
  columns = healthy()
  for key in ("grad/norm", "grad/norm_clipped", "grad/scale", "grad/max_norm"):  # Format 2 leaves them out of the row.
    columns[key] = np.where(at, np.nan, columns[key])
  columns["skip/norm"] = np.where(at, 70.0, columns["skip/norm"])
  columns["skip/consecutive"][at] = [1, 2]
  seen = norms_of_run(run_of(columns), "grad", None)
  assert seen.values[at].tolist() == [70, 70] and seen.rejected.tolist() == at.tolist()
  assert seen.values[~at].tolist() == columns["grad/norm"][~at].tolist()
