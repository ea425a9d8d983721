"""skip_steps: what is rejected, what is left untouched, what is counted."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import message_of, steps_of, worked_cases

import clipjax
from clipjax import rules

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.zeros(1, jnp.bfloat16)}
GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(1, jnp.bfloat16)}

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Adam needs it.


def scaled(factor):
  return jax.tree.map(lambda x: (x.astype(jnp.float32) * factor).astype(x.dtype), GRADS)


def adam(**options):
  return clipjax.skip_steps(optax.chain(clipjax.clip_by_global_norm(1.0), optax.adam(0.1)), **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_that_is_not_finite_changes_nothing(bad):
  tx = adam()
  update = jax.jit(tx.update)
  _, before = update(GRADS, tx.init(PARAMS), PARAMS)
  updates, after = update({**GRADS, "w": jnp.array([bad, 1.0])}, before, PARAMS)
  chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, GRADS))
  chex.assert_trees_all_equal(after.inner_state, before.inner_state)
  assert not np.isfinite(after.norm)
  assert (after.steps, after.skipped_steps, after.consecutive) == (2, 1, 1)
  # From here on the run is the one that never saw that step.
  updates, resumed = update(scaled(2.0), after, PARAMS)
  want, without = update(scaled(2.0), before, PARAMS)
  chex.assert_trees_all_equal(updates, want)
  chex.assert_trees_all_equal(resumed.inner_state, without.inner_state)
  assert resumed.consecutive == 0


def test_without_a_spike_it_is_the_wrapped_transformation():
  plain, tx = optax.chain(clipjax.clip_by_global_norm(1.0), optax.adam(0.1)), adam(norm_rule=100.0)
  state, inner = tx.init(PARAMS), plain.init(PARAMS)
  for step in range(3):
    updates, state = tx.update(scaled(step), state, PARAMS)
    want, inner = plain.update(scaled(step), inner, PARAMS)
    chex.assert_trees_all_equal((updates, state.inner_state), (want, inner))


def test_a_negative_limit_counts_as_0_for_the_norm_and_stays_for_the_loss():
  def step(limit, scale, loss):
    tx = clipjax.skip_steps(optax.identity(), norm_rule=limit, loss_rule=limit)
    return tx.update(scaled(scale), tx.init(PARAMS), PARAMS, value=loss)[1]

  states = [jax.jit(step)(-1.0, scale, loss) for scale, loss in ((0.0, -2.0), (0.0, -0.5), (1.0, -2.0))]
  assert [int(state.skipped_steps) for state in states] == [0, 1, 1]
  assert [(float(state.max_norm), float(state.max_loss)) for state in states] == [(0, -1)] * 3


def test_norm_above_the_rule_is_seen_raw_though_the_chain_clips():
  factors = (1.0, 3.0, 2.0, 2.001)
  states = [state for _, state in steps_of(adam(norm_rule=10.0), list(map(scaled, factors)), PARAMS)]
  assert [int(state.skipped_steps) for state in states] == [0, 1, 1, 2]
  np.testing.assert_allclose([state.norm for state in states], 5 * np.array(factors), rtol=1e-6)


@pytest.mark.parametrize(("loss", "skipped"), [(1.0, 0), (2.0, 0), (2.1, 1), (math.nan, 1), (math.inf, 1), (-5.0, 0)])
def test_loss_above_the_rule(loss, skipped):
  tx = adam(loss_rule=2.0)
  _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, value=loss)
  assert state.skipped_steps == skipped
  np.testing.assert_equal(float(state.loss), np.float32(loss))


def test_rule_of_olmo_against_its_worked_steps():
  case = worked_cases()["skip_step_olmo"]
  h = case["hyperparams"]
  with jax.enable_x64(True):
    rule = rules.rolling_sigma(h["sigma_factor"], window=h["rolling_interval"], ddof=1)
    tx = clipjax.skip_steps(optax.identity(), norm_rule=rule, loss_rule=rule)
    state = tx.init({"w": jnp.zeros(2)})
    for step in case["steps"]:
      grads = {"w": jnp.array(step["grads"]["w"])}
      updates, state = tx.update(grads, state, value=step["loss"])
      np.testing.assert_allclose(updates["w"], step["updates"]["w"], rtol=1e-12)
      assert (state.consecutive == 0) == step["apply"]
      if "loss_mean" in step:
        np.testing.assert_allclose(state.max_loss, step["loss_mean"] + 6 * step["loss_std"], rtol=1e-12)
        np.testing.assert_allclose(state.max_norm, step["norm_mean"] + 6 * step["norm_std"], rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rules_never_see_what_is_not_finite(bad):
  tx = clipjax.skip_steps(optax.identity(), norm_rule=rules.rolling_sigma(3.0, window=4))

  def after(norms):
    grads = jnp.array(norms)[:, None]
    return jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(jnp.zeros(1)), grads)[0]

  assert after([1.0, bad, 1.1, bad, bad, 0.9, 1.0]).max_norm == after([1.0, 1.1, 0.9, 1.0]).max_norm < 2
  assert after([1.0, 1.1, 0.9, 1.0, 1e28]).consecutive == 1  # A huge finite norm is rejected like any other.


def test_metrics_check_and_nesting():
  tx = optax.chain(adam(norm_rule=10.0, max_consecutive_skips=3), optax.scale(1.0))
  state = tx.init(PARAMS)
  for _ in range(2):
    _, state = tx.update(scaled(9.0), state, PARAMS)
  clipjax.raise_if_nonfinite(state)
  got = clipjax.metrics(state)
  assert [got[f"skip/{key}"] for key in ("norm", "max_norm", "fraction", "consecutive", "steps")] == [45, 10, 1, 2, 2]
  assert got["grad/steps"] == 0  # The clip inside sees no rejected step.
  _, state = tx.update(scaled(9.0), state, PARAMS)
  assert message_of(lambda: clipjax.raise_if_nonfinite(state), FloatingPointError) == (
    "'skip' rejected the last 3 steps, the limit is 3: norm 45 (limit 10): check the data and the loss, and resume "
    "from an earlier checkpoint."
  )
  _, state = tx.update(GRADS, state, PARAMS)
  clipjax.raise_if_nonfinite(state)


def test_one_structure_under_scan_vmap_and_donation():
  tx = adam(norm_rule=rules.zscore(), loss_rule=rules.rolling_sigma())
  state, _ = jax.lax.scan(
    lambda s, f: (tx.update(scaled(f), s, PARAMS, value=f)[1], None), tx.init(PARAMS), jnp.array([1.0, jnp.nan, 2.0])
  )
  assert (state.steps, state.skipped_steps) == (3, 1)
  stacked = jax.tree.map(lambda x: jnp.stack([x, x * jnp.nan]), GRADS)
  _, mapped = jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(PARAMS), PARAMS, value=1.0)))(stacked)
  np.testing.assert_array_equal(mapped.skipped_steps, [0, 1])
  donated, state = jax.jit(tx.update, donate_argnums=(1,)), tx.init(PARAMS)
  for _ in range(2):
    _, state = donated(GRADS, state, PARAMS, value=1.0)


@pytest.mark.parametrize("which", ["norm_rule", "loss_rule"])
def test_a_limit_that_is_nan_rejects_the_step(which):
  limits = {"norm_rule": 1e6, "loss_rule": 1e6, which: lambda count: jnp.where(count == 1, jnp.nan, 1e6)}
  states = [state for _, state in steps_of(adam(**limits), [GRADS] * 3, PARAMS, value=1.0)]
  assert [int(state.skipped_steps) for state in states] == [0, 1, 1] and states[-1].consecutive == 0


@pytest.mark.parametrize("value", ["a text", jnp.ones(3), 1j, None])
def test_without_a_rule_for_it_a_value_that_is_no_loss_is_for_what_is_wrapped(value):
  def update(updates, state, params=None, *, value=None):
    seen.append(value)
    return updates, state

  seen = []
  tx = clipjax.skip_steps(optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
  _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=value)
  assert seen[0] is value and state.loss == 0 and state.skipped_steps == 0


def test_an_error_of_what_is_wrapped_is_not_changed():
  def fail(updates, state, params=None):
    raise KeyError("the user's own")

  tx = clipjax.skip_steps(optax.GradientTransformation(optax.sgd(1.0, momentum=0.9).init, fail))
  with pytest.raises(KeyError, match="the user's own"):
    tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_skips_in_a_row_are_counted_in_int32():
  assert message_of(lambda: adam(max_consecutive_skips=2**31)) == (
    "`max_consecutive_skips` must be an integer >= 1 and <= 2147483647, got 2147483648: choose one in that range."
  )
