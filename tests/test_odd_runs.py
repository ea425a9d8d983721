"""Runs that are odd but sound, and runs that ended in an odd way: the verdict, and the suggestion beside it."""

import numpy as np
import pytest
from synthetic import N, bad, healthy, only, run_of

import clipjax
from clipjax.runs.health.live import Live
from clipjax.runs.roles import Role, main_loss, role_of

RNG = np.random.default_rng(0)
NOISE = np.exp(RNG.normal(0, 0.05, N))
NORMS = np.exp(RNG.normal(0, 0.15, N))
ROWS = np.arange(N)
LOSS = healthy()["loss"]


def since(row, then, before=1.0):
  """A column that changes at a row."""
  return np.where(row > ROWS, before, then)


def told(columns, ends):
  """The findings along the rows of these columns, in batches that end at some rows."""
  live, found = Live(clipjax.runs.HealthLimits()), []
  size = len(next(iter(columns.values())))
  rows = [{"step": i + 1, **{key: float(column[i]) for key, column in columns.items()}} for i in range(size)]
  for part in np.split(np.array(rows), ends):
    live.marked(part.tolist(), [{}] * len(part))
    found += live.findings(part.tolist(), {})
  return found


def spoiled(rows, **columns):
  """A healthy run whose norm is not finite at some rows, and its flags."""
  run, bad_rows = healthy(**columns), np.isin(ROWS, rows)
  run["grad/norm"][bad_rows] = run["grad/norm_clipped"][bad_rows] = np.nan
  return run, {"grad/norm": bad_rows}


def test_a_run_whose_steps_count_examples_was_recorded_from_its_start():
  run = run_of(healthy(loss=2.303 * NOISE), steps=65536 * (ROWS + 1))
  assert bad(clipjax.runs.diagnose(run)) == ["not-learning"]


def test_the_norms_of_every_state_may_explode_without_a_loss():
  """Of two losses none is called as the one that is trained, as in a GAN."""
  losses = {"g_loss": LOSS, "d_loss": LOSS[::-1]}
  run = run_of({**losses, "g/norm": NORMS, "d/norm": NORMS[::-1] * since(300, 1e4)})
  finding = clipjax.runs.diagnose(run)[0]
  assert (finding.name, finding.level, finding.steps) == ("diverged", "FAIL", (301,))
  assert finding.message.startswith("The norm of 'd' rose from ")


def test_a_group_may_be_called_like_a_loss_or_a_learning_rate():
  groups = {"grad/norm/lr_encoder": since(300, 0.0), "grad/norm/perceptual_loss": 4 * NOISE, "loss": LOSS}
  run = run_of({"grad/norm": NORMS, **groups})
  assert [name for name in bad(clipjax.runs.diagnose(run)) if name != "zero-gradient"] == []
  assert main_loss(["grad/norm/perceptual_loss"]) is None
  assert role_of("grad/scale/lr_encoder") is None and role_of("train/loss") is Role.LOSS


# What trains no more ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [np.zeros(N), since(300, 0.0)], ids=["throughout", "from a step on"])
def test_a_part_of_a_model_may_have_a_learning_rate_of_0(frozen):
  rates = {"lr/backbone": frozen, "lr/head": np.full(N, 0.1)}
  assert bad(clipjax.runs.diagnose(run_of(healthy(**rates)))) == []
  both = {"lr/backbone": since(200, 0.0), "lr/head": since(300, 0.0)}
  finding = clipjax.runs.diagnose(run_of(healthy(**both)))[0]
  assert (finding.name, finding.steps) == ("stopped", (301,))
  assert "'lr/backbone', 'lr/head' are 0" in finding.message


def test_an_expert_that_is_rarely_used_has_not_died():
  norms = np.tile([1.0, 0.0], (N, 1))
  norms[[5, 90, 130, 260, 290], 1] = 1.0  # 129 steps without one, then 109 at the end.
  vectors = {"leaves": {"grad": ("in/w", "expert/w")}, "vectors": {"grad/norm": (ROWS + 1, norms)}}
  assert bad(clipjax.runs.diagnose(run_of(healthy(), **vectors))) == []
  norms[150:, 1] = 0.0
  assert only(clipjax.runs.diagnose(run_of(healthy(), **vectors)), "zero-gradient").steps == (132,)


def test_a_norm_that_becomes_0_for_good_is_a_gradient_of_0():
  finding = clipjax.runs.diagnose(run_of(healthy(**{"grad/norm": since(300, 0.0, NORMS)})))[0]
  assert (finding.name, finding.level, finding.steps) == ("zero-gradient", "FAIL", (301,))
  assert finding.message == "The norm of 'grad' has been exactly 0 since step 301."


def test_where_the_loss_is_0_the_gradient_may_be():
  """A hinge loss on data that can be told apart."""
  loss = {"loss": since(300, 0.0, 3 * np.exp(-ROWS / 60) * NOISE)}
  assert bad(clipjax.runs.diagnose(run_of(healthy(**loss, **{"grad/norm": since(300, 0.0, NORMS)})))) == []
  norms = np.tile(since(300, 0.0)[:, None], (1, 2))
  vectors = {"leaves": {"grad": ("in/w", "out/w")}, "vectors": {"grad/norm": (ROWS + 1, norms)}}
  assert bad(clipjax.runs.diagnose(run_of(healthy(**loss), **vectors))) == []


def test_one_of_several_optimizers_may_stop():
  updates = {"update_g/norm": 0.01 * NORMS, "update_d/norm": since(300, 0.0, 0.01 * NORMS[::-1])}
  finding = clipjax.runs.diagnose(run_of(healthy(**updates)))[0]
  assert (finding.name, finding.steps) == ("stopped", (301,))
  assert finding.message.startswith("A part has not trained since step 301: the norm of 'update_d' is 0.")


# What skip_steps alone records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_rejected", "name"), [(True, "spikes-caught"), (False, "spikes")])
def test_what_skip_steps_rejects_is_caught_without_a_watch(is_rejected, name):
  rows = ROWS == 200
  columns = {"loss": LOSS, "skip/norm": np.where(rows, 50.0, NORMS), "skip/consecutive": rows * float(is_rejected)}
  assert only(clipjax.runs.diagnose(run_of(columns)), name).steps == (201,)
  assert [finding.name for finding in told(columns, range(40, N, 40))] == ([] if is_rejected else [name])


# What to restore ----------------------------------------------------------------------------------------------------


def test_there_is_no_checkpoint_from_before_the_first_step():
  columns, flags = spoiled([0])
  advice = only(clipjax.runs.diagnose(run_of(columns, flags=flags)), "nonfinite").advice
  assert "Restore" not in advice and advice.startswith("Look at the batch of step 1, and chain skip_steps")


def test_nothing_is_called_sound_that_is_not_known_to_be():
  spike = {"grad/norm": np.where(ROWS == 200, 80.0, NORMS), "grad/scale": np.ones(N)}
  known = only(clipjax.runs.diagnose(run_of(healthy(**spike))), "spikes")
  assert known.advice.startswith("Nothing needs to be restored. Look at the batch of step 201.")
  unknown = only(clipjax.runs.diagnose(run_of({"grad/norm": spike["grad/norm"]})), "spikes")
  assert unknown.advice.startswith("Look at the batch of step 201.")
  columns, flags = spoiled(range(206, N), loss=since(206, np.nan, LOSS))
  columns["grad/norm"][200], columns["grad/scale"] = 80.0, np.ones(N)
  report = clipjax.runs.diagnose(run_of(columns, flags=flags))
  assert bad(report) == ["nonfinite", "spikes"]
  assert "Nothing needs" not in str(report), "The run ended by what came after."


@pytest.mark.parametrize("last", [210, 245])
def test_a_loss_that_does_not_come_back_is_told_at_once(tmp_path, last):
  """The loss keeps half of what it learned, so that it has not diverged; `last` rows later a finding is due."""
  path, seen, rng = tmp_path / "run.jsonl", [], np.random.default_rng(0)
  with clipjax.runs.Recorder(path, on_finding=seen.append) as recorder:
    for step in range(1, last + 1):
      loss = 1 + 3 * np.exp(-step / 60) + (1.5 if step >= 200 else 0)
      recorder.push(step, None, loss=loss * rng.uniform(0.97, 1.03))
      if step in (190, last):
        recorder.flush()
  assert [(f.level, f.steps) for f in seen] == [("WARN", (200,))]
  (found,) = [f for f in clipjax.runs.diagnose(clipjax.runs.read_run(path)) if f.level != "INFO"]
  assert (found.name, found.steps) == (seen[0].name, seen[0].steps)


@pytest.mark.parametrize("flushed", [42, 43, 44, 46])
def test_a_loss_is_given_some_rows_to_come_back(tmp_path, flushed):
  """Within a spike of the loss, its last values are those of a loss that diverged."""
  seen, rng = [], np.random.default_rng(0)
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", every=500, on_finding=seen.append) as recorder:
    for step in range(1, 400):
      loss = 9 if step > 350 or 40 <= step < 44 else 1 + 3 * np.exp(-step / 8)
      recorder.push(step, None, loss=loss * rng.uniform(0.97, 1.03))
      if step in (flushed, 100):
        recorder.flush()
  assert [(f.name, f.steps) for f in seen] == [("spikes", (40,)), ("diverged", (351,))]


def test_one_jump_of_a_loss_is_told_once():
  """First the loss loses most of what it learned, then a part; a spike of later on is told."""
  steps = np.arange(1, 500)
  loss = np.where(steps < 200, 1 + 3 * np.exp(-steps / 30), 4) * np.exp(RNG.normal(0, 0.01, 499))
  loss[249:] = 1 + 1.5 * np.exp(-(steps[249:] - 250) / 60)
  loss[449] += 20
  found = told({"loss": loss}, [220, 240, 300, 350, 400, 480])
  assert [(f.name, f.steps) for f in found] == [("diverged", (200,)), ("spikes", (450,))]


def test_a_batch_of_many_rows_is_judged_from_its_first_row_on():
  norms = np.exp(np.random.default_rng(0).normal(0, 0.15, 1000))
  norms[300] = 80
  assert [(f.name, f.steps) for f in told({"grad/norm": norms}, [])] == [("spikes", (301,))]


def test_a_recorder_without_a_row_has_nothing_to_find(tmp_path):
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", on_finding=print) as recorder:
    recorder.flush()
  assert len(clipjax.runs.read_run(tmp_path / "run.jsonl")) == 0


# The suggestion ------------------------------------------------------------------------------------------------------


def skipping(rows, norm):
  """A healthy run in which `skip_steps` rejected some rows, of this norm."""
  columns, is_bad = healthy(), np.isin(ROWS, rows)
  columns["grad/norm"] = np.where(is_bad, np.nan, columns["grad/norm"])
  columns["skip/norm"] = np.where(is_bad, norm, columns["skip/norm"])
  columns["skip/consecutive"] = is_bad.astype(float)
  flags = {} if np.isfinite(norm) else {"skip/norm": is_bad}
  return run_of(columns, flags=flags)


@pytest.mark.parametrize("rows", [range(200, 220), [N - 1]], ids=["in the middle", "last"])
def test_a_run_whose_steps_of_nan_were_dropped_has_not_diverged(rows):
  run = skipping(rows, np.nan)
  assert all(finding.level != "FAIL" for finding in clipjax.runs.diagnose(run))
  assert "diverged" not in clipjax.runs.suggest_max_norm(run).reason


def test_norms_of_steps_that_were_mostly_rejected_are_told_to_be_no_base():
  reason = clipjax.runs.suggest_max_norm(skipping(range(250, N), 40.0)).reason
  assert "But skip_steps rejected 41.7% of these steps, and their norms are among these" in reason
  assert "skip_steps" not in clipjax.runs.suggest_max_norm(skipping(range(250, 270), 40.0)).reason


def test_a_resumed_run_may_have_learned_before_its_record():
  columns = healthy(loss=np.full(N, 2.0))
  assert "never fell" in clipjax.runs.suggest_max_norm(run_of(columns)).reason
  late = run_of(columns, steps=ROWS + 10**6)
  assert bad(clipjax.runs.diagnose(late)) == []
  assert "never fell" not in clipjax.runs.suggest_max_norm(late).reason
