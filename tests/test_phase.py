"""The phase of a record in which the run learned: where it ends, and what a suggestion makes of it."""

import numpy as np
import pytest
from synthetic import healthy, run_of

from clipjax.runs import phase, suggest_max_norm
from clipjax.runs.norms import norms_of_array

CHANCE = np.exp(np.random.default_rng(0).normal(0, 0.2, 1000))


def converging(n, seed=0, floor=0.0):
  """Losses and norms of a run that fits its data: both fall for good, with noise of a tenth and more."""
  rng = np.random.default_rng(seed)
  steps = np.arange(n)
  loss = 2.3 * np.exp(-steps / 40) * np.exp(rng.normal(0, 0.1, n)) + floor
  return loss, 1.5 * np.exp(-steps / 150) * np.exp(rng.normal(0, 0.3, n)) + 1e-4


LOSS, NORM = converging(2000)


def suggested(n=2000, loss=LOSS, steps=None, **options):
  return suggest_max_norm(run_of({"grad/norm": NORM[:n], "loss": loss[:n]}, steps=steps), **options)


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "new_learning_rate": 1.0}, {"scale_free": True}])
def test_a_record_that_goes_on_after_the_run_has_learned_says_the_same(options):
  short, long = suggested(300, **options), suggested(**options)
  assert short.max_norm == pytest.approx(long.max_norm, rel=0.1)
  assert np.percentile(NORM[100:], 75) < np.percentile(NORM[30:300], 75) / 10  # What the phase is for.


def test_the_phase_is_data_and_is_said():
  found = suggested()
  begin, end = found.phase
  assert 200 < end < 260 and begin == 1 + end // 10  # exp(-212 / 40) = 0.005
  inside = NORM[begin - 1 : end]
  assert found.max_norm == np.percentile(inside, 90)
  assert found.clip_fraction == (inside > found.max_norm).mean()
  assert f"{inside.size} norms of steps {begin} to {end} (left out: {begin - 1} from the warm-up)" in found.reason
  (said,) = [note for note in found.notes if note.startswith("The norms fell from")]
  assert f"By step {end} the loss had made 99.5% of its fall." in said and "A longer record changes nothing." in said


def test_without_a_loss_the_squared_norms_tell():
  short, long = suggest_max_norm(NORM[:400]), suggest_max_norm(NORM)
  assert short.max_norm == pytest.approx(long.max_norm, rel=0.2)
  assert np.sum(NORM[: long.phase[1] + 1] ** 2) / np.sum(NORM**2) == pytest.approx(0.98, abs=0.005)
  assert "the squared norms had reached 98% of their sum (no loss was recorded)" in " ".join(long.notes)
  spike = np.where(np.arange(2000) == 30, 1e4, NORM)
  assert suggest_max_norm(spike).phase == pytest.approx(long.phase, abs=5)  # Which is not the sum of the squares.


@pytest.mark.parametrize(
  ("run", "want"),
  [
    (CHANCE[:300] * np.where(np.arange(300) < 25, 50, 1), (30, 299)),  # Large norms at the start are no phase.
    (run_of(healthy()), (41, 400)),  # The loss levels off, the norms do not.
    (CHANCE**5, (100, 999)),
  ],
)
def test_norms_that_have_not_fallen_are_all_taken(run, want):
  assert suggest_max_norm(run).phase == want


@pytest.mark.parametrize("seed", range(5))
def test_a_plateau_of_noise_does_not_move_the_end(seed):
  ends = []
  for n in (600, 4000):
    loss, norm = converging(n, seed, floor=1.0)
    loss += np.random.default_rng(seed).normal(0, 0.02, n)
    ends.append(suggest_max_norm(run_of({"grad/norm": norm, "loss": loss})).phase[1])
  assert ends[1] == pytest.approx(ends[0], rel=0.35)


def test_a_warm_up_that_leaves_the_phase_out_is_told():
  said = "But the run had learned before the 1000-step warm-up ended"
  late, early = suggested(warmup_steps=1000), suggested(warmup_steps=100)
  assert said in late.reason and late.phase == (1001, 2000)
  assert said[:30] not in early.reason and early.phase[0] == 101


@pytest.mark.parametrize("name", ["train_loss", "train/loss", "total_loss", "Training-Loss"])
def test_the_training_loss_may_have_another_name(name):
  run = run_of({"grad/norm": NORM, name: LOSS, "val_loss": np.ones(2000)})
  assert suggest_max_norm(run).phase == suggested().phase


def test_steps_are_those_of_the_caller():
  begin, end = suggested(steps=np.arange(2000) * 64 + 5).phase
  assert ((begin - 5) // 64 + 1, (end - 5) // 64 + 1) == suggested().phase


def test_losses_that_are_missing_in_some_steps_will_do():
  loss = np.where(np.arange(2000) % 2, np.nan, LOSS)
  assert suggested(loss=loss).phase[1] == pytest.approx(suggested().phase[1], rel=0.15)


@pytest.mark.parametrize(
  "norms", [[1.0], [1.0, 2.0], [0.0, 0.0, 3.0, 3.0], [1e200] * 30, list(np.geomspace(1e300, 1, 60))]
)
def test_short_and_extreme_records(norms):
  taken = norms_of_array(norms, None)
  found = phase.phase_of(taken, None, None)
  assert found.begin <= found.end <= taken.steps[-1]


@pytest.mark.parametrize("rows", [100, 200, 400])
def test_a_run_that_learns_within_a_few_steps_is_given_a_threshold_with_which_it_would_learn(rows):
  steps = np.arange(rows)
  run = run_of({"loss": 8 * np.exp(-steps / 2), "grad/norm": 4 * np.exp(-steps / 4)})
  found = suggest_max_norm(run, learning_rate=0.1, new_learning_rate=0.5)
  assert found.phase == (3, 24)  # No fewer norms than 20.
  assert 0.05 < found.max_norm < 1 and np.percentile(run["grad/norm"][40:], 75) / 5 < 1e-4
