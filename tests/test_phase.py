"""The phase of a record in which the run learned: where it ends, and what a suggestion makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from synthetic import healthy, run_of

import clipjax
from clipjax.runs import phase
from clipjax.runs.norms import norms_of_array

RNG = np.random.default_rng(1)


def converging(n, seed=0, floor=0.0):
  """Losses and norms of a run that fits its data: both fall for good, with noise of a tenth and more."""
  rng = np.random.default_rng(seed)
  steps = np.arange(n)
  loss = 2.3 * np.exp(-steps / 40) * np.exp(rng.normal(0, 0.1, n)) + floor
  return loss, 1.5 * np.exp(-steps / 150) * np.exp(rng.normal(0, 0.3, n)) + 1e-4


def suggested(n, **options):
  loss, norm = converging(2000)
  return clipjax.runs.suggest_max_norm(run_of({"grad/norm": norm[:n], "loss": loss[:n]}), **options)


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "new_learning_rate": 1.0}, {"scale_free": True}])
def test_a_record_that_goes_on_after_the_run_has_learned_says_the_same(options):
  short, long = suggested(300, **options), suggested(2000, **options)
  assert short.max_norm == pytest.approx(long.max_norm, rel=0.1)


def test_the_percentiles_of_a_whole_record_fall_with_its_length():
  _, norm = converging(2000)
  assert np.percentile(norm[100:], 75) < np.percentile(norm[30:300], 75) / 10  # What the phase is for.


def test_the_phase_is_data_and_is_said():
  _, norm = converging(2000)
  found = suggested(2000)
  begin, end = found.phase
  assert 200 < end < 260  # exp(-212 / 40) = 0.005
  assert begin == 1 + end // 10
  inside = norm[begin - 1 : end]
  assert found.max_norm == np.percentile(inside, 90)
  assert found.clip_fraction == (inside > found.max_norm).mean()
  assert (
    f"{inside.size} norms, those of steps {begin} to {end} (the {begin - 1} of the warm-up left out)" in found.reason
  )
  (said,) = [note for note in found.notes if note.startswith("The norms fell from")]
  assert f"By step {end} the loss had made 99.5% of its fall." in said and "record changes nothing" in said


def test_without_a_loss_the_squared_norms_tell():
  _, norm = converging(2000)
  found = {n: clipjax.runs.suggest_max_norm(norm[:n]) for n in (400, 2000)}
  assert found[400].max_norm == pytest.approx(found[2000].max_norm, rel=0.2)
  share = np.cumsum(norm**2) / np.sum(norm**2)
  assert share[found[2000].phase[1]] == pytest.approx(0.98, abs=0.005)
  assert "the squared norms had made 98% of their sum (no loss was recorded)" in str(found[2000]).replace("\n  ", " ")


def test_one_spike_is_not_the_sum_of_the_squares():
  _, norm = converging(2000)
  want = clipjax.runs.suggest_max_norm(norm)
  norm[30] = 1e4
  assert clipjax.runs.suggest_max_norm(norm).phase == pytest.approx(want.phase, abs=5)


def test_large_norms_at_the_start_alone_are_not_the_phase():
  norms = np.exp(np.random.default_rng(0).normal(0, 0.2, 300))
  norms[:25] *= 50
  assert clipjax.runs.suggest_max_norm(norms).phase == (30, 299)


def test_norms_that_have_not_fallen_are_all_taken():
  columns = healthy()  # The loss levels off, the norms do not.
  found = clipjax.runs.suggest_max_norm(run_of(columns))
  assert found.phase == (41, 400)
  assert clipjax.runs.suggest_max_norm(np.exp(RNG.normal(0, 1, 1000))).phase == (100, 999)


def test_a_plateau_of_noise_does_not_move_the_end():
  for seed in range(5):
    ends = []
    for n in (600, 4000):
      loss, norm = converging(n, seed, floor=1.0)
      loss += np.random.default_rng(seed).normal(0, 0.02, n)
      ends.append(clipjax.runs.suggest_max_norm(run_of({"grad/norm": norm, "loss": loss})).phase[1])
    assert ends[1] == pytest.approx(ends[0], rel=0.35)


def note(found):
  (text,) = [note for note in found.notes if note.startswith("The norms ")]
  return text


def test_a_loss_that_is_still_falling_asks_for_a_longer_record():
  n = 300
  falling = run_of({"grad/norm": np.ones(n), "loss": np.linspace(5, 1, n)})
  assert "so it was still falling: record until it levels off" in note(clipjax.runs.suggest_max_norm(falling))
  level = run_of(healthy(n=1200))
  assert "of its fall: the record is long enough" in note(clipjax.runs.suggest_max_norm(level))
  assert "push loss=" in note(clipjax.runs.suggest_max_norm(np.ones(n)))
  assert note(clipjax.runs.suggest_max_norm(np.ones(n))).startswith("The norms stayed at 1, medians")


def test_a_loss_that_never_fell_is_no_base():
  rng = np.random.default_rng(0)
  flat = run_of({"grad/norm": np.exp(rng.normal(0, 0.2, 400)), "loss": 2.3 + rng.normal(0, 0.05, 400)})
  assert "the loss of this run never fell" in clipjax.runs.suggest_max_norm(flat).reason
  assert "never fell" not in clipjax.runs.suggest_max_norm(run_of(healthy())).reason
  assert "never fell" not in clipjax.runs.suggest_max_norm(np.ones(400)).reason


def test_a_warm_up_that_leaves_the_phase_out_is_told():
  found = suggested(2000, warmup_steps=1000)
  assert "had learned before the warm-up of 1000 steps was over" in found.reason
  assert found.phase == (1001, 2000)
  assert "had learned before" not in suggested(2000, warmup_steps=100).reason
  assert suggested(2000, warmup_steps=100).phase[0] == 101


@pytest.mark.parametrize("name", ["loss", "train_loss", "train/loss", "total_loss", "Training-Loss"])
def test_the_training_loss_may_have_another_name(name):
  loss, norm = converging(2000)
  want = suggested(2000).phase
  run = run_of({"grad/norm": norm, name: loss, "val_loss": np.ones(2000)})
  assert clipjax.runs.suggest_max_norm(run).phase == want


def test_steps_are_those_of_the_caller():
  loss, norm = converging(2000)
  run = run_of({"grad/norm": norm, "loss": loss}, steps=np.arange(2000) * 64 + 5)
  begin, end = clipjax.runs.suggest_max_norm(run).phase
  want = suggested(2000).phase
  assert ((begin - 5) // 64 + 1, (end - 5) // 64 + 1) == want


def test_losses_that_are_missing_in_some_steps_will_do():
  loss, norm = converging(2000)
  loss[1::2] = np.nan
  run = run_of({"grad/norm": norm, "loss": loss})
  assert clipjax.runs.suggest_max_norm(run).phase[1] == pytest.approx(suggested(2000).phase[1], rel=0.15)


@pytest.mark.parametrize(
  "norms", [[1.0], [1.0, 2.0], [0.0, 0.0, 3.0, 3.0], [1e200] * 30, list(np.geomspace(1e300, 1, 60))]
)
def test_short_and_extreme_records(norms):
  taken = norms_of_array(norms, None)
  found = phase.phase_of(taken, None, None)
  assert found.begin <= found.end <= taken.steps[-1]


def scanned(steps):
  """A least-squares problem that is fitted exactly: norm and loss fall to 0."""
  tx = optax.chain(clipjax.clip_by_global_norm(jnp.inf), optax.sgd(0.1))

  def step(carry, key):
    params, state = carry
    x = jax.random.normal(key, (16, 8))
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ (w - 1)) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), {"loss": loss, **clipjax.metrics(state)}

  start = jnp.zeros(8)
  keys = jax.random.split(jax.random.key(0), 400)
  _, arrays = jax.lax.scan(step, (start, tx.init(start)), keys)
  return clipjax.runs.Run.from_arrays({key: np.asarray(value)[:steps] for key, value in arrays.items()})


def test_a_run_that_fits_its_data_is_given_a_threshold_with_which_it_would_learn():
  rates = {"learning_rate": 0.1, "new_learning_rate": 0.5}
  found = [clipjax.runs.suggest_max_norm(scanned(steps), **rates) for steps in (100, 200, 400)]
  assert {suggestion.phase for suggestion in found} == {
    (3, 24)
  }  # It learns within a few steps: no fewer norms than 20.
  assert all(0.05 < suggestion.max_norm < 1 for suggestion in found)
  assert np.percentile(scanned(400)["grad/norm"][40:], 75) / 5 < 1e-4
