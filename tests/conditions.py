"""What tests of the verdict share: columns of runs with a known condition, and what must be found in them."""

import re

import numpy as np
from synthetic import N, healthy, layered, run_of

import clipjax
from clipjax.runs.sources import BY_TEXT

RNG = np.random.default_rng(0)
NOISE = np.exp(RNG.normal(0, 0.05, N))
NORMS = np.exp(RNG.normal(0, 0.15, N))
ROWS = np.arange(N)
LOSS = healthy()["loss"]


def since(row, then, before=1.0):
  """A column that changes at a row."""
  return np.where(row > ROWS, before, then)


def at(rows, then, before=1.0):
  """A column that has other values at some rows."""
  return np.where(np.isin(ROWS, rows), then, before)


def leaves_at(changes, usual=(1.0, 0.3), names=("in/w", "out/w"), key="grad/norm"):
  """Norms by leaf at the rows 0, 10, 20, ...; `changes` has those of some of these 40 rows, by number."""
  values = np.tile(np.asarray(usual, float), (40, 1))
  for row, norms in changes.items():
    values[row] = norms
  return layered(values, names, key)


def spoiled(rows, changes=None, **options):
  """A healthy run with other columns, and a norm that is not finite at some rows."""
  columns, is_bad = healthy(**changes or {}), np.isin(ROWS, rows)
  columns["grad/norm"][is_bad] = columns["grad/norm_clipped"][is_bad] = np.nan
  return run_of(columns, **{"flags": {"grad/norm": is_bad}, **options})


def check(run, want, limits=None):
  """The defects in a run are those of `want`, in this order; each finding is as it says; the run is as it was.

  A finding is (name, level, steps, leaves, texts...), with None for steps or leaves that are not compared; (name, None)
  is one that must not be there. `limits` are those of `HealthLimits`.
  """
  before = {key: column.copy() for key, column in run.columns.items()}
  report = clipjax.runs.diagnose(run, limits=clipjax.runs.HealthLimits(**limits or {}))
  np.testing.assert_equal(run.columns, before)
  found = [(f.name, f.level) for f in report if f.level != "INFO"]
  for finding in report:
    if finding.level != "INFO":
      assert finding.rule and not finding.rule.endswith(".") and finding.advice.endswith("."), finding
      assert re.search("a clipjax limit|allowed", finding.rule) or finding.source in BY_TEXT, finding
      assert re.search(r"\d|exactly 0", finding.message) and "Rule" not in finding.message, finding
  assert found == [(name, level) for name, level, *_ in want if level not in ("INFO", None)], str(report)
  assert {f.name for f in report}.isdisjoint(name for name, level, *_ in want if level is None)
  for name, level, steps, leaves, *texts in (row for row in want if row[1]):
    finding = next(f for f in report if (f.name, f.level) == (name, level))
    assert steps is None or finding.steps == steps, finding
    assert leaves is None or finding.leaves == leaves, finding
    for text in texts:
      assert text in f"{finding.message}\n{finding.advice}\n{finding.rule}", finding
