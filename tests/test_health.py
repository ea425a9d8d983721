"""`diagnose`: a healthy run has no defect, the numbers, the edges, the table, and runs of real states."""

import importlib
import math
import pkgutil
import re
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conditions import ROWS, at
from synthetic import N, bad, healthy, layered, only, run_of, with_spikes

import clipjax
from clipjax.runs import Finding, health
from clipjax.runs.health import verdict
from clipjax.runs.health.view import View
from clipjax.runs.words import number, percent

FACTS = ["norms", "clipped", "loss", "parameters", "step-time", "throughput"]
LENGTHS = [(N, seed) for seed in range(20)] + [(n, seed) for n in (1, 5, 22, 60, 3000) for seed in range(5)]


CHECK = {"view": View, "return": Iterator[Finding]}  # How a check is declared.


def names(report):
  return [finding.name for finding in report]


@pytest.mark.parametrize(("n", "seed"), LENGTHS)
def test_a_healthy_run_has_no_defect_at_any_length(n, seed):
  report = clipjax.runs.diagnose(run_of(healthy(seed, n), **(layered([1.0, 0.3]) if n == N else {})))
  assert bad(report) == []
  assert n != N or names(report) == ["skipped", *FACTS]


# Numbers ------------------------------------------------------------------------------------------------------------


def diagnosed(columns, steps=None, **options):
  return clipjax.runs.diagnose(run_of(columns, steps=steps), **options)


def test_percentiles_leave_out_the_warm_up_and_what_is_not_finite():
  norm = np.concatenate([np.full(40, 1e6), np.arange(1, 361)])
  norm[[50, 60]] = np.nan
  p50, p90, p99 = (f"{p:.3g}" for p in np.nanpercentile(norm[40:], [50, 90, 99]))
  assert only(diagnosed({"grad/norm": norm}), "norms").message == (
    f"p50 {p50}, p90 {p90}, p99 {p99}, largest 360, over 358 finite norms after the 40-step warm-up."
  )
  assert "over 398 finite" in only(diagnosed({"grad/norm": norm}, warmup_steps=0), "norms").message


@pytest.mark.parametrize(
  ("rows", "every", "warmup", "norms"), [(100, 1, 10, 90), (100, 50, 500, 90), (5000, 64, 6400, 4900)]
)
def test_the_warm_up_is_a_tenth_of_the_rows_at_most_a_hundred(rows, every, warmup, norms):
  report = diagnosed({"grad/norm": np.ones(rows)}, np.arange(rows) * every + 7)
  assert report.warmup_steps == warmup and f"over {norms} finite norms" in only(report, "norms").message


def test_step_time_and_throughput():
  rows = np.arange(100)
  # One row in ten steps of 2 ms; compilation and one long pause, and pushes in pairs, as the host runs ahead.
  seconds = np.where(rows % 2, 0.039, 0.001)
  seconds[[1, 51]] = 9.0
  columns = {"grad/norm": np.ones(100), "time": np.cumsum(seconds) + 1e9, "tokens": np.full(100, 640.0)}
  report = diagnosed(columns, rows * 10)
  message = only(report, "step-time").message
  middle = float(re.match(r"([\d.]+) ms per step \(median of 20 parts of the run\); between pushes: ", message)[1])
  assert middle == pytest.approx(2, rel=0.3)
  rate = float(re.match(r"([\d,]+) tokens per second", only(report, "throughput").message)[1].replace(",", ""))
  assert rate == pytest.approx(640 / (middle / 1e3), rel=0.01)
  slow = columns | {"time": np.cumsum(np.where(rows <= 60, 0.2, 0.02))}
  after = only(diagnosed(slow, rows * 10, warmup_steps=600), "step-time").message
  assert after.startswith("2 ms per step (median of 20 parts of the run)")
  assert "step-time" not in names(diagnosed(columns | {"time": -columns["time"]}))


@pytest.mark.parametrize(
  ("write", "x", "text"),
  [
    *((number, *case) for case in ((0, "0"), (0.00012345, "0.000123"), (9.996, "10"), (999.6, "1000"), (12345, "12300"),
                                   (2e6, "2e+06"), (1e-9, "1e-09"))),
    *((percent, *case) for case in ((0, "0%"), (1, "100%"), (0.5, "50%"), (0.12345, "12.3%"), (1e-5, "<0.1%"),
                                    (0.99999, ">99.9%"))),
  ],
)  # fmt: skip
def test_numbers_have_three_digits_and_shares_read_as_none_or_all_only_where_they_are(write, x, text):
  assert write(x) == text


# The findings as a whole --------------------------------------------------------------------------------------------


def test_a_table_has_all_that_is_in_the_findings():
  columns = with_spikes() | {"grad/scale": np.ones(N), "skip/fraction": np.full(N, 0.2), "aux_loss": at(350, np.nan)}
  by_layer = layered([1e-4, 1e-2, 1], ("a", "b", "c"))
  report = clipjax.runs.diagnose(run_of(columns, flags={"aux_loss": ROWS == 350}, **by_layer))
  assert [f.level for f in report] == sorted([f.level for f in report], key="FAIL WARN INFO".index)
  assert all(type(x) is kind for f in report for kind, some in ((int, f.steps), (str, f.leaves)) for x in some)
  for width in (60, 80, 100, 120):
    title, *lines = report.table(width).splitlines()
    assert title.startswith("'run.jsonl': 400 steps, ")
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)
    assert sum(not line.startswith(" ") for line in lines) == len(report)
    assert len({len(line) - len(line.lstrip()) for line in lines if line.startswith(" ")}) == 1
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
  with pytest.raises(TypeError, match=r"^`run` must be a Run, got 'run.jsonl' \(str\): read the file with"):
    clipjax.runs.diagnose("run.jsonl")
  with pytest.raises(TypeError, match=r"^`limits` must be a HealthLimits, got a dict: "):
    clipjax.runs.diagnose(run_of(healthy()), limits={"rise": 3})
  with pytest.raises(TypeError, match=r"^`warmup_steps` must be a whole number or None, got 0.1 \(float\): "):
    clipjax.runs.diagnose(run_of(healthy()), warmup_steps=0.1)


def test_every_check_is_in_use():
  modules = [importlib.import_module(f"{health.__name__}.{m.name}") for m in pkgutil.iter_modules(health.__path__)]
  found = {value for module in modules for name, value in vars(module).items()
           if getattr(value, "__annotations__", {}) == CHECK and not name.startswith("_")}  # fmt: skip
  used = [*verdict.ENDS, *verdict.DEFECTS, *verdict.FACTS]
  assert found == set(used) > verdict.OF_STATES and len(found) == len(used) >= 25


# The report as a sequence -------------------------------------------------------------------------------------------


def test_a_report_is_a_sequence_of_its_findings():
  report = clipjax.runs.diagnose(run_of(with_spikes(), **layered([1.0, 0.3])))
  assert len(report) == len(report.findings) > 4 and tuple(report) == report[:] == report.findings
  assert report[-1] is report.findings[-1] and report[1:3] == report.findings[1:3]
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


def measured(tx, gradients):
  """A run of the metrics after each of some gradients."""

  def step(state, scale):
    _, state = tx.update({"w": jnp.full(2, scale)}, state, {"w": jnp.ones(2)})
    return state, clipjax.metrics(state)

  _, arrays = jax.lax.scan(step, tx.init({"w": jnp.ones(2)}), jnp.float32(gradients))
  return clipjax.runs.Run.from_arrays(arrays)


GRADIENTS = [1.0 + 0.05 * (i % 7) for i in range(100)]


ODD = [*GRADIENTS[:80], 900.0, math.nan, *GRADIENTS[82:]]
CHAIN = optax.chain(clipjax.clip_by_global_norm(10.0), optax.sgd(1e-3))


@pytest.mark.parametrize(
  ("tx", "gradients", "defects", "said"),
  [
    (clipjax.clip_by_global_norm(10.0), ODD, ["nonfinite", "spikes"], {}),
    (clipjax.clip_by_global_norm(10.0, on_nonfinite="zero"), ODD, ["nonfinite-dropped", "spikes"], {}),
    (clipjax.skip_steps(CHAIN, norm_rule=100.0), ODD, ["nonfinite-dropped"],
     {"nonfinite-dropped": "1 of 100 steps had a norm of inf or NaN, at step 82.",
      "spikes-caught": "At step 81 'grad/norm' rose to 1270, 783 times its usual"}),
    (optax.chain(clipjax.watch(), clipjax.skip_steps(CHAIN, norm_rule=100.0)), ODD, ["nonfinite-dropped"], {}),
    # It sees one step in four; the mean over each four is 2.
    (clipjax.skip_steps(optax.MultiSteps(clipjax.clip_by_global_norm(10.0), 4).gradient_transformation()),
     [1.0 if i % 4 else 5.0 for i in range(100)], [],
     {"norms": "p50 2.83, p90 2.83, p99 2.83, largest 2.83, over 23 finite norms"}),
  ],
  ids=["applied", "zeroed by the clip", "rejected", "seen by a watch outside and rejected", "one step in four"],
)  # fmt: skip
@pytest.mark.usefixtures("standard_promotion")
def test_runs_of_real_states(tx, gradients, defects, said):
  report = clipjax.runs.diagnose(measured(tx, gradients))
  assert bad(report) == defects
  for name, text in said.items():
    assert text in only(report, name).message
