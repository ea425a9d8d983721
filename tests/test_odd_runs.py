"""Findings while the rows of a run are written: what is told, when, and once."""

import numpy as np
import pytest
from conditions import LOSS, NORMS, at
from synthetic import N

import clipjax
from clipjax.runs.health.live import Live
from clipjax.runs.roles import Role, main_loss, role_of

STEPS = np.arange(1, 500)
# First the loss loses most of what it learned, then a part; a spike of later on is told.
JUMP = np.where(STEPS < 200, 1 + 3 * np.exp(-STEPS / 30), 4) * np.exp(np.random.default_rng(0).normal(0, 0.01, 499))
JUMP[249:] = 1 + 1.5 * np.exp(-(STEPS[249:] - 250) / 60)
JUMP[449] += 20
SKIPPED = {"loss": LOSS, "skip/norm": at(200, 50.0, NORMS), "skip/consecutive": at(200, 1.0, 0.0)}


def told(columns, ends):
  """The findings along the rows of these columns, in batches that end at some rows."""
  live, found = Live(clipjax.runs.HealthLimits()), []
  rows = [{"step": i, **dict(zip(columns, map(float, row), strict=True))}
          for i, row in enumerate(zip(*columns.values(), strict=True), 1)]  # fmt: skip
  for part in np.split(np.array(rows), ends):
    live.marked(part.tolist(), [{}] * len(part))
    found += live.findings(part.tolist(), {})
  return found


@pytest.mark.parametrize(
  ("columns", "ends", "want"),
  [
    (SKIPPED, range(40, N, 40), []),
    (SKIPPED | {"skip/consecutive": np.zeros(N)}, range(40, N, 40), [("spikes", (201,))]),
    ({"loss": JUMP}, [220, 240, 300, 350, 400, 480], [("diverged", (200,)), ("spikes", (450,))]),
    ({"grad/norm": np.where(np.arange(1000) == 300, 80, np.resize(NORMS, 1000))}, [], [("spikes", (301,))]),
  ],
  ids=["a rejected spike", "a spike", "one jump of a loss is told once", "a batch of many rows"],
)  # fmt: skip
def test_what_is_told_along_the_rows(columns, ends, want):
  assert [(f.name, f.steps) for f in told(columns, ends)] == want


def seen_by(path, losses, flushes, **options):
  """The findings that a recorder hands over for these losses, flushed at some steps."""
  seen, rng = [], np.random.default_rng(0)
  with clipjax.runs.Recorder(path, on_finding=seen.append, **options) as recorder:
    for step, loss in enumerate(losses, 1):
      recorder.push(step, None, loss=loss * rng.uniform(0.97, 1.03))
      if step in flushes:
        recorder.flush()
  return seen


@pytest.mark.parametrize("last", [210, 245])
def test_a_loss_that_does_not_come_back_is_told_at_once(tmp_path, last):
  """The loss keeps half of what it learned, so that it has not diverged; `last` rows later a finding is due."""
  steps = np.arange(1, last + 1)
  seen = seen_by(tmp_path / "run.jsonl", 1 + 3 * np.exp(-steps / 60) + np.where(steps >= 200, 1.5, 0), (190, last))
  assert [(f.level, f.steps) for f in seen] == [("WARN", (200,))]
  (found,) = [f for f in clipjax.runs.diagnose(clipjax.runs.read_run(tmp_path / "run.jsonl")) if f.level != "INFO"]
  assert (found.name, found.steps) == (seen[0].name, seen[0].steps)


@pytest.mark.parametrize("flushed", [42, 43, 44, 46])
def test_a_loss_is_given_some_rows_to_come_back(tmp_path, flushed):
  """Within a spike of the loss, its last values are those of a loss that diverged."""
  is_high = (STEPS > 350) | (STEPS >= 40) & (STEPS < 44)
  losses = np.where(is_high, 9, 1 + 3 * np.exp(-STEPS / 8))[:399]
  seen = seen_by(tmp_path / "run.jsonl", losses, (flushed, 100), every=500)
  assert [(f.name, f.steps) for f in seen] == [("spikes", (40,)), ("diverged", (351,))]


def test_a_recorder_without_a_row_has_nothing_to_find(tmp_path):
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", on_finding=print) as recorder:
    recorder.flush()
  assert len(clipjax.runs.read_run(tmp_path / "run.jsonl")) == 0


def test_a_group_called_like_a_loss_or_a_rate_is_neither():
  assert main_loss(["grad/norm/perceptual_loss"]) is None
  assert role_of("grad/scale/lr_encoder") is None and role_of("train/loss") is Role.LOSS
