"""The Rule pair: constant and schedule, and a rule of one's own in every clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_step, steps_of

import clipjax
from clipjax import rules


def ema_rule(decay=0.5, ratio=2.0):
  """A rule as a user writes one: clips what is above `ratio` times the mean of the norms, to the mean."""

  def init(shape, dtype):
    return {"ema": jnp.zeros(shape, dtype), "seen": jnp.zeros((), jnp.int32)}

  def update(norms, state, *, global_norm):
    first = state["seen"] == 0
    limit = jnp.where(first, jnp.inf, ratio * state["ema"])
    kept = jnp.minimum(norms, limit)
    ema = jnp.where(first, kept, decay * state["ema"] + (1 - decay) * kept)
    return limit, jnp.where(first, jnp.inf, state["ema"]), {"ema": ema, "seen": state["seen"] + 1}

  return rules.Rule(init, update)


def run(tx, norms):
  return steps_of(tx, [{"a": jnp.array([0.6, 0.8]) * n, "b": jnp.array([2.0]) * n} for n in norms])


def test_limit_and_target_may_differ():
  steps = run(clipjax.clip_by_leaf_norm(ema_rule()), [1.0, 1.0, 10.0, 1.5])
  updates, state = steps[2]
  np.testing.assert_allclose(state.max_norm, [2, 4], rtol=1e-6)
  np.testing.assert_allclose(state.scale, [0.1, 0.1], rtol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(updates["a"]), 1.0, rtol=1e-6)
  np.testing.assert_allclose(steps[3][1].max_norm, [3, 6], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_step_leaves_the_rule_as_it_was(bad):
  tx = clipjax.clip_by_global_norm(ema_rule())
  (want, clean), (got, dirty) = run(tx, [1.0, 2.0, 3.0])[-1], run(tx, [bad, 1.0, bad, 2.0, bad, 3.0])[-1]
  assert dirty.nonfinite_steps == 3
  assert jax.tree.map(float, dirty.rule) == jax.tree.map(float, clean.rule)
  np.testing.assert_array_equal(got["a"], want["a"])


def test_rule_in_every_clip():
  groups = lambda path, leaf: path  # noqa: E731
  for tx, shape in (
    (clipjax.clip_by_global_norm(ema_rule()), ()),
    (clipjax.clip_by_leaf_norm(ema_rule()), (2,)),
    (clipjax.clip_by_group_norm(ema_rule(), groups), (2,)),
    (clipjax.clip_by_block_rms(ema_rule()), (2,)),
    (clipjax.clip_by_value(ema_rule()), ()),
  ):
    state = run(tx, [1.0, 1.0, 10.0])[-1][1]
    assert state.rule["ema"].shape == shape and state.clipped_steps == 1
  tx = clipjax.clip_by_group_norm({"a": ema_rule(), "b": 1.0}, groups)
  state = run(tx, [1.0, 1.0, 10.0])[-1][1]
  np.testing.assert_allclose(state.max_norm, [2, 1], rtol=1e-6)


def test_rule_sees_the_global_norm():
  rule = rules.Rule(lambda shape, dtype: (), lambda norms, state, *, global_norm: (global_norm, jnp.inf, state))
  _, state = run(clipjax.clip_by_leaf_norm(rule), [3.0])[-1]
  np.testing.assert_allclose(state.max_norm, [np.sqrt(45)] * 2, rtol=1e-6)


GLOBAL, BY_LEAF = clipjax.clip_by_global_norm, clipjax.clip_by_leaf_norm
NAN_BESIDE_1 = np.array([1.0, np.nan], np.float32)
# Factory, limit and target, the factors of leaves of norms 3 and 4; None for a step that is not finite.
TARGETS = {
  "at most the limit": (GLOBAL, 1.0, 5.0, 0.2),
  "below 0": (GLOBAL, 1.0, -2.0, 0.0),
  "below 0 by leaf": (BY_LEAF, 1.0, -2.0, 0.0),
  "under a limit below 0": (GLOBAL, -1.0, 1.0, 0.0),
  "without a meaning at the limit": (GLOBAL, 5.0, 1.0, 1.0),
  "NaN": (GLOBAL, 1.0, np.nan, None),
  "NaN for one leaf": (BY_LEAF, 1.0, NAN_BESIDE_1, None),
  "with a limit NaN for one leaf": (BY_LEAF, NAN_BESIDE_1, 1.0, None),
}


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize(("policy", "filled"), [("propagate", np.nan), ("zero", 0.0)])
def test_the_target_of_a_rule(case, policy, filled):
  factory, limit, target, factor = TARGETS[case]
  fixed = rules.Rule(lambda shape, dtype: (), lambda norms, state, *, global_norm: (limit, target, state))
  grads = np.array([3.0, 4.0], np.float32)
  updates, state = first_step(factory(fixed, on_nonfinite=policy, eps=1e-6), [*map(jnp.asarray, grads)])
  np.testing.assert_allclose(updates, np.full(2, filled) if factor is None else factor * grads, rtol=1e-6)
  assert state.nonfinite_steps == int(factor is None) and state.nonfinite_leaf == -1  # No leaf: it is the rule.
  np.testing.assert_allclose(state.norm_clipped, filled if factor is None else 5 * factor, rtol=1e-6)


def test_rule_state_keeps_its_dtype_in_a_scan():
  # A rule that answers with a wider or a weak type must not change the carry of a scan.
  def update(norms, state, *, global_norm):
    return jnp.inf, jnp.inf, jnp.ones((), jnp.float32)

  tx = clipjax.clip_by_global_norm(rules.Rule(lambda shape, dtype: jnp.zeros((), jnp.bfloat16), update))
  state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(jnp.zeros(2)), jnp.ones((3, 2)))
  assert state.rule.dtype == jnp.bfloat16 and state.rule == 1


def test_rule_is_no_callable():
  # inject_hyperparams and the door of the clips take callables for schedules.
  assert not callable(rules.minimum(1.0, 2.0))
