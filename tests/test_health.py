"""`diagnose`: a healthy run has no defect, and each defect gives its finding with the right numbers."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import _checks, _facts
from clipjax._run import Run
from clipjax._words import number, percent

N = 400


def healthy(seed=0, n=N, **columns):
  """The columns of a run without a defect: falling loss and norm, a clip that acts in a tenth of the steps."""
  rng = np.random.default_rng(seed)
  steps = np.arange(1, n + 1)
  norm = np.exp(rng.normal(0, 0.15, n)) * (1 + 2 / np.sqrt(steps))
  limit = float(np.quantile(norm, 0.9))
  clipped = np.cumsum(norm > limit).astype(float)
  loss = 1 + 3 * np.exp(-steps / (n / 4)) * np.exp(rng.normal(0, 0.05, n))
  base = {
    "time": 1e9 + np.cumsum(rng.uniform(0.009, 0.011, n)),
    "loss": loss,
    "val_loss": np.where(steps % 10 == 0, loss * 1.05 * np.exp(rng.normal(0, 0.005, n)), np.nan),
    "tokens": np.full(n, 100.0),
    "grad/norm": norm,
    "grad/norm_clipped": np.minimum(norm, limit),
    "grad/max_norm": np.full(n, limit),
    "grad/scale": np.minimum(1, limit / norm),
    "grad/clip_fraction": clipped / steps,
    "grad/clipped_steps": clipped,
    "grad/nonfinite_steps": np.zeros(n),
    "grad/steps": steps.astype(float),
    "grad/zero_fraction": np.full(n, 0.1),
    "update/norm": norm * 1e-2,
    "update/ratio": 1e-3 * np.exp(rng.normal(0, 0.3, n)),
    "skip/norm": norm,
    "skip/fraction": np.zeros(n),
    "skip/consecutive": np.zeros(n),
    "skip/steps": steps.astype(float),
  }
  return base | columns


def run_of(columns, *, flags=None, leaves=None, vectors=None, parameters=1234, steps=None):
  n = len(next(iter(columns.values())))
  steps = np.arange(1, n + 1) if steps is None else np.asarray(steps)
  columns = {key: np.asarray(value, np.float64) for key, value in columns.items()}
  return Run("run.jsonl", steps, columns, flags or {}, leaves or {}, vectors or {}, None, parameters)


def layered(values, names=("in/w", "out/w"), key="grad/norm"):
  """Vectors of the rows 1, 11, 21, ...: `values` is what each leaf has there."""
  steps = np.arange(1, N + 1, 10)
  values = np.broadcast_to(np.asarray(values, np.float64), (len(steps), len(names)))
  return {"leaves": {key.split("/")[0]: names}, "vectors": {key: (steps, np.array(values))}}


def bad(report):
  return [f.name for f in report.findings if f.level != "INFO"]


def only(report, name):
  """The one finding of this name."""
  (finding,) = [f for f in report.findings if f.name == name]
  return finding


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_defect(seed):
  report = clipjax.diagnose(run_of(healthy(seed), **layered([1.0, 0.3])))
  assert bad(report) == []
  assert {"norms", "clipped", "parameters", "step-time", "throughput"} <= {f.name for f in report.findings}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 5, 22, 60, 3000])
def test_a_healthy_run_has_no_defect_at_any_length(seed, n):
  assert bad(clipjax.diagnose(run_of(healthy(seed, n)))) == []


# One defect each ----------------------------------------------------------------------------------------------------


def test_steps_that_are_not_finite_and_the_layer_where_it_began():
  columns, at = healthy(), np.zeros(N, bool)
  at[[70, 71, 100]] = True
  columns["grad/norm"][at] = columns["grad/norm_clipped"][at] = np.nan
  values = np.ones((40, 2))
  values[7, 1] = np.nan  # Row 7 is step 71.
  run = run_of(columns, flags={"grad/norm": at}, **layered(values))
  report = clipjax.diagnose(run)
  assert bad(report) == ["nonfinite"]
  finding = only(report, "nonfinite")
  assert finding.level == "FAIL"
  assert "3 of 400 steps had a norm of inf or NaN, at steps 71, 72, 101; first in 'out/w'." in finding.message
  run.vectors["grad/nonfinite"] = (run.vectors["grad/norm"][0], np.where(np.arange(40)[:, None] == 7, [5.0, 0.0], 0.0))
  assert "first in 'in/w'." in only(clipjax.diagnose(run), "nonfinite").message  # The count of entries speaks first.
  groups = columns | {"grad/norm/a": np.ones(N), "grad/norm/b": np.where(at, np.nan, 1)}
  flags = {"grad/norm": at, "grad/norm/b": at}
  assert "; first in 'b'." in only(clipjax.diagnose(run_of(groups, flags=flags)), "nonfinite").message
  without = clipjax.diagnose(run_of(columns, flags={"grad/norm": at}))
  assert "clipjax.watch()" in only(without, "nonfinite").advice


def test_steps_that_were_not_recorded_are_counted_too():
  report = clipjax.diagnose(run_of(healthy(**{"grad/nonfinite_steps": np.arange(N) // 100})))
  assert (
    "3 of 400 steps had a norm of inf or NaN, at steps that were not recorded." in only(report, "nonfinite").message
  )


def test_a_loss_that_is_not_finite():
  columns, at = healthy(), np.arange(N) == 200
  columns["loss"][at] = np.nan
  report = clipjax.diagnose(run_of(columns, flags={"loss": at}))
  assert bad(report) == ["nonfinite-loss"]
  assert only(report, "nonfinite-loss")[0] == "FAIL"
  assert "1 of 400 losses were inf or NaN, at step 201." in only(report, "nonfinite-loss").message
  columns["skip/consecutive"][at] = 1
  assert only(clipjax.diagnose(run_of(columns, flags={"loss": at})), "nonfinite-loss").level == "WARN"


def test_a_layer_whose_gradient_is_zero_throughout():
  values = np.ones((40, 2))
  values[:, 0] = 0
  report = clipjax.diagnose(run_of(healthy(), **layered(values)))
  assert bad(report) == ["zero-gradient"]
  assert only(report, "zero-gradient")[0] == "FAIL"
  assert "1 of 2 layers had a gradient of exactly 0 at all 40 steps at which it was recorded: 'in/w'." in (
    only(report, "zero-gradient").message
  )
  values[9, 0] = 1e-3
  assert bad(clipjax.diagnose(run_of(healthy(), **layered(values)))) == []
  columns = healthy(**{"grad/norm/head": np.zeros(N), "grad/norm/rest": np.ones(N)})
  assert "'head'" in only(clipjax.diagnose(run_of(columns)), "zero-gradient").message  # Groups are columns.


def test_clipped_in_more_than_half_of_the_steps():
  fractions = np.full(N, 0.7125)
  report = clipjax.diagnose(run_of(healthy(**{"grad/clip_fraction": fractions})))
  assert bad(report) == ["clipped-often"]
  message = only(report, "clipped-often").message
  assert message.startswith("'grad' clipped 71.2% of the steps. Rule: at most 50%.")
  assert "tuning playbook" in message
  assert "AutoClip" not in only(report, "clipped-often").advice
  assert bad(clipjax.diagnose(run_of(healthy(**{"grad/clip_fraction": np.full(N, 0.5)})))) == []
  adaptive = healthy(**{"grad/clip_fraction": fractions, "grad/max_norm": np.linspace(3, 1, N)})
  assert "AutoClip" in only(clipjax.diagnose(run_of(adaptive)), "clipped-often").advice


def test_a_clip_by_group_is_judged_group_by_group():
  # The clip acts on some group in every step, on each group in no more than half of them.
  columns = healthy(**{"grad/clip_fraction": np.ones(N)})
  odd = np.arange(N) % 2 == 1
  columns |= {"grad/scale/a": np.where(odd, 0.5, 1), "grad/scale/b": np.where(odd, 1, 0.5)}
  assert bad(clipjax.diagnose(run_of(columns))) == []
  columns["grad/scale/b"] = np.where(np.arange(N) % 4, 0.5, 1.0)
  message = only(clipjax.diagnose(run_of(columns)), "clipped-often").message
  assert message.startswith("'grad' clipped 75% of the steps in 'b'.")
  # A Recorder writes groups at some rows as vectors too, which would be too few.
  some = {"leaves": {"grad": ("b", "a")}, "vectors": {"grad/scale": (np.array([1, 51]), np.full((2, 2), 0.5))}}
  assert "75% of the steps in 'b'" in only(clipjax.diagnose(run_of(columns, **some)), "clipped-often").message
  assert "some leaf or group in 100% of 400 steps" in only(clipjax.diagnose(run_of(columns)), "clipped").message


def test_a_clip_by_leaf_is_judged_leaf_by_leaf_where_there_are_enough_rows():
  columns = healthy(**{"grad/clip_fraction": np.ones(N)})
  scales = np.where(np.arange(40)[:, None] % 5 < [2, 4], 0.5, 1.0)
  report = clipjax.diagnose(run_of(columns, **layered(scales, key="grad/scale")))
  assert only(report, "clipped-often").message.startswith("'grad' clipped 80% of the steps in 'out/w'.")
  few = clipjax.HealthLimits(min_steps=41)
  assert "clipped-often" not in bad(clipjax.diagnose(run_of(columns, **layered(scales, key="grad/scale")), limits=few))


def with_spikes(at=(200, 300), height=30.0):
  columns = healthy()
  columns["grad/norm"][list(at)] = height
  return columns


def test_spikes_that_no_clip_caught():
  report = clipjax.diagnose(run_of({"grad/norm": with_spikes()["grad/norm"]}))
  assert bad(report) == ["spikes"]
  message = only(report, "spikes").message
  assert message.startswith("2 of 400 norms were spikes that nothing caught, at steps 201, 301, the largest 30 against")
  assert "6 standard deviations above the mean of the 128 norms before" in message


def test_the_limit_of_a_spike_is_that_of_the_rule_for_skip_steps():
  norms = with_spikes()["grad/norm"]
  rule = clipjax.rules.rolling_sigma(6.0, window=128)

  def step(state, norm):
    limit, _, state = rule.update(norm, state, global_norm=norm)
    return state, limit

  with jax.enable_x64(True):
    limits = jax.lax.scan(step, rule.init((), jnp.float64), jnp.asarray(norms))[1]
  np.testing.assert_allclose(_checks._spike_bounds(norms, 6.0, 128), limits, rtol=1e-9)


def test_spikes_that_the_clip_or_skip_steps_caught_are_no_warning():
  columns = with_spikes()
  columns["grad/scale"] = np.minimum(1, columns["grad/max_norm"] / columns["grad/norm"])
  report = clipjax.diagnose(run_of(columns))
  assert bad(report) == []
  assert only(report, "spikes-caught").message.startswith(
    "2 of 400 norms were spikes that the clip or skip_steps caught, at st"
  )
  columns = {key: with_spikes()[key] for key in ("grad/norm", "skip/consecutive")}
  columns["skip/consecutive"][[200, 300]] = 1
  assert bad(clipjax.diagnose(run_of(columns))) == []


def test_rows_from_the_history_of_a_watch_have_the_threshold_of_the_next_push():
  columns = with_spikes()
  columns["grad/scale"] = np.minimum(1, columns["grad/max_norm"] / columns["grad/norm"])
  pushed = np.arange(N) % 8 == 7
  for key in set(columns) - {"grad/norm"}:
    columns[key] = np.where(pushed, columns[key], np.nan)
  assert bad(clipjax.diagnose(run_of(columns))) == []
  columns["grad/max_norm"][pushed] = 50.0
  assert "spikes" in bad(clipjax.diagnose(run_of(columns)))


def test_a_threshold_above_every_spike():
  columns = with_spikes()
  columns |= {"grad/max_norm": np.full(N, 50.0), "grad/scale": np.ones(N), "grad/clip_fraction": np.zeros(N)}
  report = clipjax.diagnose(run_of(columns))
  assert bad(report) == ["spikes", "clip-too-high"]
  message = only(report, "clip-too-high").message
  assert message.startswith("'grad' never clipped while 2 spikes up to 30 passed: max_norm was 50.")
  measured = columns | {"grad/max_norm": np.full(N, np.nan)}  # max_norm=inf only measures.
  assert bad(clipjax.diagnose(run_of(measured))) == ["spikes"]


def test_a_norm_that_rises_late():
  columns = healthy()
  norm = np.where(np.arange(N) < 310, 1.0, 3.0)
  report = clipjax.diagnose(run_of({"grad/norm": norm, "loss": columns["loss"]}))
  assert "rising-norm" in bad(report)
  assert "rose 3 times late in the run: median 1 in the third quarter of the steps, 3 in the last. Rule: at most 2" in (
    only(report, "rising-norm").message
  )
  slow = np.exp(np.linspace(0, 4, N))
  assert bad(clipjax.diagnose(run_of({"grad/norm": slow}))) == ["rising-norm"]
  zero = np.where(np.arange(N) < 310, 0.0, 3.0)
  assert "from 0" in only(clipjax.diagnose(run_of({"grad/norm": zero})), "rising-norm").message


def test_a_loss_that_rises():
  report = clipjax.diagnose(run_of(healthy(loss=np.linspace(4, 8, N), val_loss=np.full(N, np.nan))))
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
  report = clipjax.diagnose(run_of(columns))
  assert bad(report) == ["overfit"]
  values = columns[key][np.isfinite(columns[key])]
  medians = [np.median(part) for part in np.array_split(values, 10)]
  message = only(report, "overfit").message
  assert message.startswith(f"{key!r} ends {100 * (medians[-1] / min(medians) - 1):.3g}% above its best")
  assert "near step 200" in message
  level = columns | {"loss": np.full(N, 2.0)}
  assert bad(clipjax.diagnose(run_of(level))) == []  # Both are bad, which is no overfitting.
  slightly = columns | {key: np.where(steps % 4 == 0, 2 + np.abs(steps - 200) / 5000, np.nan)}
  assert bad(clipjax.diagnose(run_of(slightly))) == []
  falling = columns | {key: np.where(steps % 4 == 0, 4 - steps / 200, np.nan)}
  assert bad(clipjax.diagnose(run_of(falling))) == []


@pytest.mark.parametrize(("ratio", "advice"), [(0.05, "Lower"), (2e-5, "Raise")])
def test_updates_too_large_or_small_for_their_parameters(ratio, advice):
  report = clipjax.diagnose(run_of(healthy(**{"update/ratio": np.full(N, ratio)})))
  assert bad(report) == ["update-ratio"]
  finding = only(report, "update-ratio")
  assert f"is {ratio:.3g}. Rule: 0.0001 to 0.01; CS231n" in finding.message
  assert finding.advice.startswith(advice)


def test_ratios_of_parameters_that_were_not_given_are_not_judged():
  assert bad(clipjax.diagnose(run_of(healthy(**{"update/ratio": np.zeros(N)})))) == []


def test_the_ratio_of_a_gradient_is_not_judged():
  assert bad(clipjax.diagnose(run_of(healthy(**{"grad/ratio": np.full(N, 50.0)})))) == []


def test_a_layer_with_large_updates_is_told_without_a_warning():
  report = clipjax.diagnose(run_of(healthy(), **layered([1e-3, 0.2], key="update/ratio")))
  assert bad(report) == []
  assert "1 of 2 layers have a median 'update/ratio' outside, the farthest 'out/w' with 0.2." in (
    only(report, "update-ratio-by-layer").message
  )


def test_layers_whose_norms_are_far_apart():
  report = clipjax.diagnose(run_of(healthy(), **layered([1e-4, 0.5])))
  assert bad(report) == ["layer-spread"]
  assert (
    "5000 times apart: 0.0001 in 'in/w', 0.5 in 'out/w'. Rule: at most 1000" in only(report, "layer-spread").message
  )
  assert bad(clipjax.diagnose(run_of(healthy(), **layered([6e-4, 0.5])))) == []
  assert bad(clipjax.diagnose(run_of(healthy(), **layered([4e-4, 0.5])))) == ["layer-spread"]


def test_zeros_in_the_gradient():
  report = clipjax.diagnose(run_of(healthy(**{"grad/zero_fraction": np.full(N, 0.625)})))
  assert bad(report) == ["zeros"]
  assert only(report, "zeros").message.startswith("62.5% of the entries of the gradient are exactly 0 (median).")


def test_many_rejected_steps():
  report = clipjax.diagnose(run_of(healthy(**{"skip/fraction": np.full(N, 0.125)})))
  assert bad(report) == ["skipped"]
  assert only(report, "skipped").message.startswith("skip_steps rejected 12.5% of 400 steps. Rule: at most 5%")


@pytest.mark.parametrize(("factor", "text"), [(1e4, "above 100"), (1e-8, "below 1e-05")])
def test_the_size_of_the_norm_is_a_hint_alone(factor, text):
  columns = {"grad/norm": healthy()["grad/norm"] * factor}
  report = clipjax.diagnose(run_of(columns))
  assert bad(report) == []
  assert f"is {number(np.median(columns['grad/norm'][40:]))}, {text}." in only(report, "norm-scale").message
  limits = clipjax.HealthLimits(norm_low=0.0, norm_high=math.inf)
  assert "norm-scale" not in [f.name for f in clipjax.diagnose(run_of(columns), limits=limits).findings]


# Numbers ------------------------------------------------------------------------------------------------------------


def test_percentiles_leave_out_the_warm_up_and_what_is_not_finite():
  norm = np.concatenate([np.full(40, 1e6), np.arange(1, 361)])
  norm[[50, 60]] = np.nan
  flags = {"grad/norm": np.isnan(norm)}
  want = norm[40:][np.isfinite(norm[40:])]
  message = only(clipjax.diagnose(run_of({"grad/norm": norm}, flags=flags)), "norms").message
  p50, p90, p99 = (f"{p:.3g}" for p in np.percentile(want, [50, 90, 99]))
  assert message.startswith(
    f"p50 {p50}, p90 {p90}, p99 {p99}, largest 360, of 358 finite norms after the warm-up of 40"
  )
  assert "of 398 finite" in only(clipjax.diagnose(run_of({"grad/norm": norm}), warmup_steps=0), "norms").message


def test_the_warm_up_is_a_tenth_at_most_a_hundred_steps_and_counts_steps_not_rows():
  norm = np.ones(100)
  assert clipjax.diagnose(run_of({"grad/norm": norm})).warmup_steps == 10
  sparse = clipjax.diagnose(run_of({"grad/norm": norm}, steps=np.arange(100) * 50 + 7))
  assert sparse.warmup_steps == 100
  assert "of 98 finite norms" in only(sparse, "norms").message


def test_step_time_and_throughput():
  n = 100
  # One row in ten steps of 2 ms; compilation and one long pause, and pushes in pairs, as the host runs ahead.
  seconds = np.where(np.arange(n) % 2, 0.039, 0.001)
  seconds[[1, 51]] = 9.0
  columns = {"grad/norm": np.ones(n), "time": np.cumsum(seconds) + 1e9, "tokens": np.full(n, 640.0)}
  report = clipjax.diagnose(run_of(columns, steps=np.arange(n) * 10))
  message = only(report, "step-time").message
  middle = float(re.match(r"([\d.]+) ms a step, the median of 20 parts of the run; from push to push ", message)[1])
  assert middle == pytest.approx(2, rel=0.3)
  rate = float(re.match(r"([\d,]+) tokens a second", only(report, "throughput").message)[1].replace(",", ""))
  assert rate == pytest.approx(640 / (middle / 1e3), rel=0.01)
  slow = columns | {"time": np.cumsum(np.where(np.arange(n) <= 60, 0.2, 0.02))}
  after = clipjax.diagnose(run_of(slow, steps=np.arange(n) * 10), warmup_steps=600)
  assert only(after, "step-time").message.startswith("2 ms a step, the median of 20 parts of the run")
  back = columns | {"time": -columns["time"]}
  assert "step-time" not in [f.name for f in clipjax.diagnose(run_of(back)).findings]


def test_limits_can_be_set():
  run = run_of(healthy(**{"grad/clip_fraction": np.full(N, 0.7)}))
  assert bad(clipjax.diagnose(run, limits=clipjax.HealthLimits(clip_fraction=0.8))) == []
  strict = clipjax.HealthLimits(clip_fraction=0.65, min_steps=10_000)
  assert bad(clipjax.diagnose(run, limits=strict)) == []
  assert "at least 10000" in only(clipjax.diagnose(run, limits=strict), "few-steps").message


@pytest.mark.parametrize(
  ("x", "text"),
  [
    (0, "0"),
    (0.00012345, "0.000123"),
    (9.996, "10"),
    (999.6, "1000"),
    (12345, "12300"),
    (2e6, "2e+06"),
    (1e-9, "1e-09"),
  ],
)
def test_numbers_have_three_digits(x, text):
  assert number(x) == text


@pytest.mark.parametrize(
  ("share", "text"), [(0, "0%"), (1, "100%"), (0.5, "50%"), (0.12345, "12.3%"), (1e-5, "<0.1%"), (0.99999, ">99.9%")]
)
def test_a_share_reads_as_none_or_all_only_where_it_is(share, text):
  assert percent(share) == text


# Edges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-30, 0.1, 1.0, 1e30, 1e300])
def test_equal_norms_are_no_defect(value):
  report = clipjax.diagnose(run_of({"grad/norm": np.full(N, value)}))
  assert bad(report) == []
  assert f"p50 {value:.3g}, p90 {value:.3g}, p99 {value:.3g}" in only(report, "norms").message


def test_norms_that_differ_by_rounding_have_no_spikes():
  norm = 1 + 1e-7 * (np.arange(N) % 2)
  norm[200] += 1e-5
  assert bad(clipjax.diagnose(run_of({"grad/norm": norm}))) == []


def test_norms_that_are_never_finite():
  at = np.ones(N, bool)
  report = clipjax.diagnose(run_of({"grad/norm": np.full(N, np.nan)}, flags={"grad/norm": at}))
  assert bad(report) == ["nonfinite"]
  assert (
    "400 of 400 steps had a norm of inf or NaN, at steps 1, 2, 3, 4, 5 and 395 more."
    in only(report, "nonfinite").message
  )
  assert only(report, "few-steps").message.startswith("0 finite norms")


def test_a_run_without_rows_or_without_norms():
  assert [f.name for f in clipjax.diagnose(run_of({"loss": []}, parameters=None)).findings] == ["no-norms"]
  report = clipjax.diagnose(run_of({"loss": np.linspace(2, 1, N)}))
  assert [f.name for f in report.findings] == ["no-norms", "parameters"]


def test_few_steps_are_told_and_only_what_is_certain_is_judged():
  columns = healthy(n=15, **{"grad/clip_fraction": np.ones(15), "grad/zero_fraction": np.ones(15)})
  columns["loss"] = np.linspace(1, 9, 15)
  columns["grad/norm_clipped"][3] = np.nan
  report = clipjax.diagnose(run_of(columns, flags={"grad/norm": np.arange(15) == 3}))
  assert bad(report) == ["nonfinite"]
  assert only(report, "few-steps").message.startswith("13 finite norms after the warm-up of 1 steps are too few")


def test_only_skip_steps_recorded():
  columns = {key: value for key, value in healthy().items() if key.startswith("skip/")}
  report = clipjax.diagnose(run_of(columns))
  assert bad(report) == []
  assert "of 360 finite norms" in only(report, "norms").message


def test_another_name_is_judged_where_there_is_no_grad():
  columns = {"skip/norm": np.ones(N), "critic/norm": np.full(N, 7.0)}
  assert only(clipjax.diagnose(run_of(columns)), "norms").message.startswith("p50 7")


def test_every_finding_has_its_rule_and_what_to_do():
  columns = with_spikes()
  columns |= {
    "loss": np.linspace(4, 8, N),
    "grad/max_norm": np.full(N, 50.0),
    "grad/scale": np.ones(N),
    "grad/clip_fraction": np.zeros(N),
    "other/clip_fraction": np.full(N, 0.9),
    "other/steps": np.arange(N),
    "update/ratio": np.ones(N),
    "skip/fraction": np.full(N, 0.2),
    "grad/zero_fraction": np.full(N, 0.9),
  }
  columns["grad/norm"] *= np.exp(np.linspace(0, 9, N))
  values = np.ones((40, 3)) * [0, 1e-4, 1]
  flags = {"grad/norm": np.arange(N) == 90, "loss": np.arange(N) == 90}
  report = clipjax.diagnose(run_of(columns, flags=flags, **layered(values, ("a", "b", "c"))))
  judged = [f for f in report.findings if f.level != "INFO"]
  assert len(judged) >= 10
  for finding in judged:
    assert "Rule: " in finding.message and finding.advice.endswith("."), finding
    assert re.search(r"\d|exactly 0", finding.message), finding
  assert [f.level for f in report.findings] == sorted([f.level for f in report.findings], key="FAIL WARN INFO".index)
  assert "source" not in judged[0]._fields
  check_table(report)


def check_table(report):
  for width in (60, 80, 100, 120):
    title, *lines = report.table(width).splitlines()
    assert title.startswith("'run.jsonl': 400 steps, ")
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)
    heads = [line for line in lines if not line.startswith(" ")]
    assert len(heads) == len(report.findings)
    indents = {len(line) - len(line.lstrip()) for line in lines if line.startswith(" ")}
    assert len(indents) == 1
    # What is in the findings is in the table, word by word.
    words = " ".join(" ".join(lines).split())
    assert all(" ".join(f.message.split()) in words for f in report.findings)
  assert str(report) == report.table(100)


def test_names_of_leaves_cannot_break_the_table():
  values = np.zeros((40, 2))
  report = clipjax.diagnose(run_of(healthy(), **layered(values, ("a\nFAIL  x", "\x1b[31m"))))
  assert "\x1b" not in str(report) and "\nFAIL  x" not in str(report)


def test_wrong_arguments():
  run = run_of(healthy())
  with pytest.raises(TypeError, match=r"^`run` must be a Run, got 'run.jsonl' \(str\): read the file with"):
    clipjax.diagnose("run.jsonl")
  with pytest.raises(TypeError, match=r"^`limits` must be a HealthLimits, got a dict: "):
    clipjax.diagnose(run, limits={"rise": 3})
  with pytest.raises(TypeError, match=r"^`warmup_steps` must be a whole number or None, got 0.1 \(float\): "):
    clipjax.diagnose(run, warmup_steps=0.1)
  with pytest.raises(ValueError, match=r"^`warmup_steps` must be >= 0, got -1: "):
    clipjax.diagnose(run, warmup_steps=-1)


def test_the_checks_leave_the_run_as_it_was():
  run = run_of(with_spikes(), **layered([1.0, 0.0]))
  before = {key: value.copy() for key, value in run.columns.items()}
  clipjax.diagnose(run)
  assert all(np.array_equal(before[key], run.columns[key], equal_nan=True) for key in before)


def test_every_check_is_in_use():
  names = [name for name in vars(_checks) if name.startswith("_") and "view" in _arguments(vars(_checks)[name])]
  helpers = {"_first_layers", "_clip_shares", "_clip_too_high", "_layer_ratios", "_acted"}
  assert set(names) - helpers == {check.__name__ for check in _checks.CHECKS if check.__name__.startswith("_")}
  assert len(set(_checks.CHECKS + _facts.FACTS)) == len(_checks.CHECKS + _facts.FACTS)


def _arguments(value):
  return getattr(getattr(value, "__code__", None), "co_varnames", ())[:1]


def test_fifty_thousand_steps_take_under_two_seconds():
  import time  # noqa: PLC0415

  run = run_of(healthy(n=50_000))
  start = time.perf_counter()
  clipjax.diagnose(run)
  assert time.perf_counter() - start < 2


# From real states ---------------------------------------------------------------------------------------------------


def recorded(tx, gradients, path):
  """A run of the metrics after each of some gradients, through a file."""
  params = {"w": jnp.ones(2)}
  state, update = tx.init(params), jax.jit(tx.update)
  lines = [{"clipjax_run": 1, "version": "0", "leaves": {}, "parameters": 2, "every": 1}]
  for step, scale in enumerate(gradients, 1):
    _, state = update({"w": jnp.full(2, scale)}, state, params)
    values = {key: float(value) for key, value in clipjax.metrics(state).items()}
    bad = {key: repr(value) for key, value in values.items() if not math.isfinite(value)}
    lines.append({"step": step} | {key: None if key in bad else x for key, x in values.items()} | {"nonfinite": bad})
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return clipjax.read_run(path)


GRADIENTS = [1.0 + 0.05 * (i % 7) for i in range(100)]


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_a_step_that_the_clip_dropped_is_a_warning(policy, tmp_path):
  gradients = [*GRADIENTS[:80], math.nan, *GRADIENTS[81:]]
  run = recorded(clipjax.clip_by_global_norm(10.0, on_nonfinite=policy), gradients, tmp_path / "run.jsonl")
  assert bad(clipjax.diagnose(run)) == [{"propagate": "nonfinite", "zero": "nonfinite-dropped"}[policy]]


def test_steps_that_skip_steps_rejected_have_the_norm_that_it_saw(tmp_path):
  gradients = [*GRADIENTS[:80], 900.0, math.nan, *GRADIENTS[82:]]
  chain = optax.chain(clipjax.clip_by_global_norm(10.0), optax.sgd(1e-3))
  run = recorded(clipjax.skip_steps(chain, norm_rule=100.0), gradients, tmp_path / "run.jsonl")
  report = clipjax.diagnose(run)
  assert bad(report) == ["nonfinite-dropped"]
  assert "1 of 100 steps had a norm of inf or NaN, at step 82." in only(report, "nonfinite-dropped").message
  assert "at step 81, the largest 1270 against" in only(report, "spikes-caught").message


@pytest.mark.usefixtures("standard_promotion")
def test_a_clip_that_sees_one_step_in_four_has_its_own_norms_alone(tmp_path):
  gradients = [1.0 if i % 4 else 5.0 for i in range(100)]  # Their mean over each four is 2.
  tx = clipjax.skip_steps(optax.MultiSteps(clipjax.clip_by_global_norm(10.0), 4).gradient_transformation())
  report = clipjax.diagnose(recorded(tx, gradients, tmp_path / "run.jsonl"), warmup_steps=0)
  assert only(report, "norms").message.startswith("p50 2.83, p90 2.83, p99 2.83, largest 2.83, of 25 finite norms")


def test_a_watch_outside_of_skip_steps_sees_what_it_rejects(tmp_path):
  gradients = [*GRADIENTS[:80], math.nan, *GRADIENTS[81:]]
  tx = optax.chain(clipjax.watch(), clipjax.skip_steps(optax.sgd(1e-3)))
  assert bad(clipjax.diagnose(recorded(tx, gradients, tmp_path / "run.jsonl"))) == ["nonfinite-dropped"]
