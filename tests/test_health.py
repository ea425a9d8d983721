"""`diagnose`: a healthy run has no defect, the numbers, the edges, the table, and runs of real states."""

import importlib
import inspect
import json
import math
import pkgutil
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from synthetic import N, bad, healthy, layered, only, run_of, with_spikes

import clipjax
from clipjax.runs import health
from clipjax.runs.health import verdict
from clipjax.runs.health.view import View
from clipjax.runs.sources import BY_TEXT
from clipjax.runs.words import number, percent


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_defect(seed):
  report = clipjax.runs.diagnose(run_of(healthy(seed), **layered([1.0, 0.3])))
  assert bad(report) == []
  assert {"norms", "clipped", "parameters", "step-time", "throughput"} <= {f.name for f in report.findings}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 5, 22, 60, 3000])
def test_a_healthy_run_has_no_defect_at_any_length(seed, n):
  assert bad(clipjax.runs.diagnose(run_of(healthy(seed, n)))) == []


# Numbers ------------------------------------------------------------------------------------------------------------


def test_percentiles_leave_out_the_warm_up_and_what_is_not_finite():
  norm = np.concatenate([np.full(40, 1e6), np.arange(1, 361)])
  norm[[50, 60]] = np.nan
  flags = {"grad/norm": np.isnan(norm)}
  want = norm[40:][np.isfinite(norm[40:])]
  message = only(clipjax.runs.diagnose(run_of({"grad/norm": norm}, flags=flags)), "norms").message
  p50, p90, p99 = (f"{p:.3g}" for p in np.percentile(want, [50, 90, 99]))
  assert message.startswith(
    f"p50 {p50}, p90 {p90}, p99 {p99}, largest 360, of 358 finite norms after the warm-up of 40"
  )
  assert "of 398 finite" in only(clipjax.runs.diagnose(run_of({"grad/norm": norm}), warmup_steps=0), "norms").message


def test_the_warm_up_is_a_tenth_of_the_rows_at_most_a_hundred():
  norm = np.ones(100)
  assert clipjax.runs.diagnose(run_of({"grad/norm": norm})).warmup_steps == 10
  sparse = clipjax.runs.diagnose(run_of({"grad/norm": norm}, steps=np.arange(100) * 50 + 7))
  assert sparse.warmup_steps == 500
  assert "of 90 finite norms" in only(sparse, "norms").message
  assert clipjax.runs.diagnose(run_of({"grad/norm": np.ones(5000)}, steps=np.arange(5000) * 64)).warmup_steps == 6400


def test_step_time_and_throughput():
  n = 100
  # One row in ten steps of 2 ms; compilation and one long pause, and pushes in pairs, as the host runs ahead.
  seconds = np.where(np.arange(n) % 2, 0.039, 0.001)
  seconds[[1, 51]] = 9.0
  columns = {"grad/norm": np.ones(n), "time": np.cumsum(seconds) + 1e9, "tokens": np.full(n, 640.0)}
  report = clipjax.runs.diagnose(run_of(columns, steps=np.arange(n) * 10))
  message = only(report, "step-time").message
  middle = float(re.match(r"([\d.]+) ms a step, the median of 20 parts of the run; from push to push ", message)[1])
  assert middle == pytest.approx(2, rel=0.3)
  rate = float(re.match(r"([\d,]+) tokens a second", only(report, "throughput").message)[1].replace(",", ""))
  assert rate == pytest.approx(640 / (middle / 1e3), rel=0.01)
  slow = columns | {"time": np.cumsum(np.where(np.arange(n) <= 60, 0.2, 0.02))}
  after = clipjax.runs.diagnose(run_of(slow, steps=np.arange(n) * 10), warmup_steps=600)
  assert only(after, "step-time").message.startswith("2 ms a step, the median of 20 parts of the run")
  back = columns | {"time": -columns["time"]}
  assert "step-time" not in [f.name for f in clipjax.runs.diagnose(run_of(back)).findings]


def test_limits_can_be_set():
  run = run_of(healthy(**{"grad/zero_fraction": np.full(N, 0.7)}))
  assert bad(clipjax.runs.diagnose(run, limits=clipjax.runs.HealthLimits(zero_fraction=0.8))) == []
  strict = clipjax.runs.HealthLimits(zero_fraction=0.65, min_steps=10_000)
  assert bad(clipjax.runs.diagnose(run, limits=strict)) == []
  assert only(clipjax.runs.diagnose(run, limits=strict), "few-steps").rule == "at least 10000, a limit of clipjax"


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


@pytest.mark.parametrize("value", [1e-300, 1e-30, 0.1, 1.0, 1e30, 1e300])
def test_equal_norms_are_no_defect(value):
  report = clipjax.runs.diagnose(run_of({"grad/norm": np.full(N, value)}))
  assert bad(report) == []
  assert f"p50 {value:.3g}, p90 {value:.3g}, p99 {value:.3g}" in only(report, "norms").message


def test_a_gradient_that_is_zero_throughout():
  report = clipjax.runs.diagnose(run_of({"grad/norm": np.zeros(N)}))
  assert bad(report) == ["zero-gradient"]
  assert only(report, "zero-gradient").message.startswith("The norm of 'grad' was exactly 0 at all 400 steps")
  assert "p50 0, p90 0, p99 0" in only(report, "norms").message
  assert only(report, "norms").advice == ""  # There suggest_max_norm raises.
  assert bad(clipjax.runs.diagnose(run_of({"grad/norm": np.arange(N) % 100 == 7}))) == []  # Rare, but not gone.


def test_norms_that_differ_by_rounding_have_no_spikes():
  norm = 1 + 1e-7 * (np.arange(N) % 2)
  norm[200] += 1e-5
  assert bad(clipjax.runs.diagnose(run_of({"grad/norm": norm}))) == []


def test_norms_that_are_never_finite():
  at = np.ones(N, bool)
  report = clipjax.runs.diagnose(run_of({"grad/norm": np.full(N, np.nan)}, flags={"grad/norm": at}))
  assert bad(report) == ["nonfinite"]
  assert (
    "400 of 400 steps had a norm of inf or NaN, at steps 1, 2, 3, 4, 5 and 395 more."
    in only(report, "nonfinite").message
  )
  assert only(report, "few-steps").message.startswith("0 finite norms")


def test_a_run_without_rows_or_without_norms():
  assert [f.name for f in clipjax.runs.diagnose(run_of({"loss": []}, parameters=None)).findings] == ["no-norms"]
  report = clipjax.runs.diagnose(run_of({"loss": np.linspace(2, 1, N)}))
  assert [f.name for f in report.findings] == ["no-norms", "loss", "parameters"]


def test_few_steps_are_told_and_only_what_is_certain_is_judged():
  columns = healthy(n=15, **{"grad/clip_fraction": np.ones(15), "grad/zero_fraction": np.ones(15)})
  columns["grad/norm_clipped"][3] = np.nan
  report = clipjax.runs.diagnose(run_of(columns, flags={"grad/norm": np.arange(15) == 3}))
  assert bad(report) == ["nonfinite"]
  assert only(report, "few-steps").message.startswith("13 finite norms after the warm-up of 1 steps are too few")


def test_only_skip_steps_recorded():
  columns = {key: value for key, value in healthy().items() if key.startswith("skip/")}
  report = clipjax.runs.diagnose(run_of(columns))
  assert bad(report) == []
  assert "of 360 finite norms" in only(report, "norms").message


def test_another_name_is_judged_where_there_is_no_grad():
  columns = {"skip/norm": np.ones(N), "critic/norm": np.full(N, 7.0)}
  assert only(clipjax.runs.diagnose(run_of(columns)), "norms").message.startswith("p50 7")


def test_every_finding_has_its_rule_and_what_to_do():
  columns = with_spikes()
  columns |= {
    "grad/scale": np.ones(N),
    "skip/fraction": np.full(N, 0.2),
    "aux_loss": np.where(np.arange(N) == 350, np.nan, 1.0),
  }
  columns["grad/norm"] *= np.exp(np.linspace(0, 9, N))
  values = np.ones((40, 3)) * [1e-4, 1e-2, 1]
  flags = {"aux_loss": np.arange(N) == 350}
  report = clipjax.runs.diagnose(run_of(columns, flags=flags, **layered(values, ("a", "b", "c"))))
  judged = [f for f in report.findings if f.level != "INFO"]
  assert {f.name for f in judged} == {"nonfinite-loss", "spikes", "layer-spread", "rising-norm", "skipped"}
  for finding in judged:
    assert finding.rule and finding.advice.endswith("."), finding
    assert not finding.rule.endswith(".") and "Rule" not in finding.message, finding
    assert ("a limit of clipjax" in finding.rule or "may" in finding.rule) or finding.source in BY_TEXT, finding
    assert finding.source == "" or finding.source in BY_TEXT, finding
    assert re.search(r"\d|exactly 0", finding.message), finding
    assert all(type(step) is int for step in finding.steps) and all(type(leaf) is str for leaf in finding.leaves)
  assert [f.level for f in report.findings] == sorted([f.level for f in report.findings], key="FAIL WARN INFO".index)
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
    assert all(f"Rule: {f.rule}." in words for f in report if f.rule)
    assert all(f"Source: {f.source}." in words for f in report if f.source)
    assert all(f"-> {f.advice}" in words for f in report if f.advice)
  assert str(report) == report.table(100)


def test_names_of_leaves_cannot_break_the_table():
  values = np.zeros((40, 2))
  report = clipjax.runs.diagnose(run_of(healthy(), **layered(values, ("a\nFAIL  x", "\x1b[31m"))))
  assert "\x1b" not in str(report) and "\nFAIL  x" not in str(report)


def test_wrong_arguments():
  run = run_of(healthy())
  with pytest.raises(TypeError, match=r"^`run` must be a Run, got 'run.jsonl' \(str\): read the file with"):
    clipjax.runs.diagnose("run.jsonl")
  with pytest.raises(TypeError, match=r"^`limits` must be a HealthLimits, got a dict: "):
    clipjax.runs.diagnose(run, limits={"rise": 3})
  with pytest.raises(TypeError, match=r"^`warmup_steps` must be a whole number or None, got 0.1 \(float\): "):
    clipjax.runs.diagnose(run, warmup_steps=0.1)
  with pytest.raises(ValueError, match=r"^`warmup_steps` must be >= 0, got -1: "):
    clipjax.runs.diagnose(run, warmup_steps=-1)


def test_the_checks_leave_the_run_as_it_was():
  run = run_of(with_spikes(), **layered([1.0, 0.0]))
  before = {key: value.copy() for key, value in run.columns.items()}
  clipjax.runs.diagnose(run)
  assert all(np.array_equal(before[key], run.columns[key], equal_nan=True) for key in before)


def test_every_check_is_in_use():
  names = [module.name for module in pkgutil.iter_modules(health.__path__)]
  modules = [importlib.import_module(f"{health.__name__}.{name}") for name in names]
  found = {value for module in modules for value in vars(module).values() if _is_check(value)}
  used = [*verdict.ENDS, *verdict.DEFECTS, *verdict.FACTS]
  assert found == set(used)
  assert len(found) == len(used) >= 25
  assert found > verdict.OF_STATES


def _is_check(value):
  """A public function `View -> findings`."""
  if not inspect.isfunction(value) or value.__name__.startswith("_"):
    return False
  signature = inspect.signature(value)
  annotations = [parameter.annotation for parameter in signature.parameters.values()]
  return annotations == [View] and "Finding" in str(signature.return_annotation)


# The report as a sequence -------------------------------------------------------------------------------------------


def test_a_report_is_a_sequence_of_its_findings():
  report = clipjax.runs.diagnose(run_of(with_spikes(), **layered([1.0, 0.3])))
  assert len(report) == len(report.findings) > 4
  assert tuple(report) == report[:] == report.findings
  assert report[0] is report.findings[0] and report[-1] is report.findings[-1]
  assert report[1:3] == report.findings[1:3]
  assert report.findings[2] in report and report.index(report.findings[2]) == 2
  assert (report.path, report.steps, report.warmup_steps) == ("run.jsonl", 400, 40)
  assert isinstance(report, Sequence)


def test_a_report_without_findings_is_false_and_has_a_title():
  report = clipjax.runs.HealthReport((), "run.jsonl", 3, 0)
  assert not report and len(report) == 0 and list(report) == []
  assert str(report) == "'run.jsonl': 3 steps, 0 FAIL, 0 WARN, 0 INFO; warm-up 0 steps"
  assert clipjax.runs.diagnose(run_of(healthy()))


@pytest.mark.slow  # It asks the clock.
def test_fifty_thousand_steps_take_under_two_seconds():
  run = run_of(healthy(n=50_000))
  start = time.perf_counter()
  clipjax.runs.diagnose(run)
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
  return clipjax.runs.read_run(path)


GRADIENTS = [1.0 + 0.05 * (i % 7) for i in range(100)]


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_a_step_that_the_clip_dropped_is_a_warning(policy, tmp_path):
  gradients = [*GRADIENTS[:80], math.nan, *GRADIENTS[81:]]
  run = recorded(clipjax.clip_by_global_norm(10.0, on_nonfinite=policy), gradients, tmp_path / "run.jsonl")
  assert bad(clipjax.runs.diagnose(run)) == [{"propagate": "nonfinite", "zero": "nonfinite-dropped"}[policy]]


def test_steps_that_skip_steps_rejected_have_the_norm_that_it_saw(tmp_path):
  gradients = [*GRADIENTS[:80], 900.0, math.nan, *GRADIENTS[82:]]
  chain = optax.chain(clipjax.clip_by_global_norm(10.0), optax.sgd(1e-3))
  run = recorded(clipjax.skip_steps(chain, norm_rule=100.0), gradients, tmp_path / "run.jsonl")
  report = clipjax.runs.diagnose(run)
  assert bad(report) == ["nonfinite-dropped"]
  assert "1 of 100 steps had a norm of inf or NaN, at step 82." in only(report, "nonfinite-dropped").message
  assert "At step 81 'grad/norm' rose to 1270, 783 times its usual" in only(report, "spikes-caught").message


@pytest.mark.usefixtures("standard_promotion")
def test_a_clip_that_sees_one_step_in_four_has_its_own_norms_alone(tmp_path):
  gradients = [1.0 if i % 4 else 5.0 for i in range(100)]  # Their mean over each four is 2.
  tx = clipjax.skip_steps(optax.MultiSteps(clipjax.clip_by_global_norm(10.0), 4).gradient_transformation())
  report = clipjax.runs.diagnose(recorded(tx, gradients, tmp_path / "run.jsonl"), warmup_steps=0)
  assert only(report, "norms").message.startswith("p50 2.83, p90 2.83, p99 2.83, largest 2.83, of 25 finite norms")


def test_a_watch_outside_of_skip_steps_sees_what_it_rejects(tmp_path):
  gradients = [*GRADIENTS[:80], math.nan, *GRADIENTS[81:]]
  tx = optax.chain(clipjax.watch(), clipjax.skip_steps(optax.sgd(1e-3)))
  assert bad(clipjax.runs.diagnose(recorded(tx, gradients, tmp_path / "run.jsonl"))) == ["nonfinite-dropped"]


def test_where_the_loss_began_and_ended_is_told():
  loss = np.concatenate([np.full(40, 3.0), np.full(320, 2.0), np.full(40, 1.25)])
  loss[5], loss[399] = np.nan, 50.0  # Neither moves a median.
  assert only(clipjax.runs.diagnose(run_of(healthy(loss=loss))), "loss").message == (
    "'loss' went from 3 to 1.25, medians of tenths."
  )
  assert "loss" not in [f.name for f in clipjax.runs.diagnose(run_of(healthy(n=10))).findings]
