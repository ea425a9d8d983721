"""States as they are found: in another width, without an inf, of a late gradient, in hands other than Optax's."""

import itertools
import math
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NO_LIMIT, cases, factories

import clipjax
from clipjax import rules

RULES = {
  "number": lambda: 1.0,
  "schedule": lambda: optax.linear_schedule(2.0, 1.0, 4),
  "percentile": lambda: rules.percentile(50.0, window=6),
  "percentile without the current": lambda: rules.percentile(50.0, window=6, include_current=False, min_count=2),
  "quantile_tracking": lambda: rules.quantile_tracking(0.5),
  "zscore reciprocal": lambda: rules.zscore(warmup_steps=2),
  "zscore mean": lambda: rules.zscore(warmup_steps=2, mode="mean", record="raw"),
  "zscore max": lambda: rules.zscore(warmup_steps=2, mode="max", record="none", restart_after=3),
  "rolling_sigma": lambda: rules.rolling_sigma(2.0, window=4),
  "ema_ratio": lambda: rules.ema_ratio(1.5, decay=0.9, warmup_steps=2, max_norm=math.inf),
  "minimum": lambda: rules.minimum(rules.zscore(warmup_steps=2), 1.0),
  "delayed": lambda: rules.delayed(2, 1.0),
}
PARAMS = {"a": jnp.full(3, 2.0), "b": jnp.full(2, 2.0)}


BY_RULE = {f"global, {name}": clipjax.clip_by_global_norm(make()) for name, make in RULES.items()}
ALL = {
  **factories(),
  **BY_RULE,
  "by leaf, zscore": clipjax.clip_by_leaf_norm(RULES["zscore mean"]()),
  "by leaf, percentile": clipjax.clip_by_leaf_norm(RULES["percentile"]()),
  "exempt group": clipjax.clip_by_group_norm({"a": 1.0, "b": None}, lambda path, leaf: path),
  "adaptive_grad_clip": clipjax.adaptive_grad_clip(math.inf),
  "watch": clipjax.watch(history=3),
  "skip_steps": clipjax.skip_steps(optax.chain(clipjax.clip_by_leaf_norm(1.0), optax.sgd(0.1, momentum=0.9))),
  "clip_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(1.0), optax.sgd(0.1, momentum=0.9)),
  "skip_steps by rules": clipjax.skip_steps(
    optax.sgd(0.1), norm_rule=rules.rolling_sigma(2.0, window=4), loss_rule=rules.percentile(99.0, window=4)
  ),
}


def wraps_optax(name):
  """Whether a part of the state belongs to Optax."""
  return name.startswith(("skip_steps", "clip_effect"))


def gradient(scale):
  return {"a": jnp.full(3, scale, jnp.float32), "b": jnp.full(2, 2 * scale, jnp.float32)}


def steps(tx, state, scales, jit=True):
  update = jax.jit(tx.update) if jit else tx.update
  updates = None
  for scale in scales:
    updates, state = update(gradient(scale), state, PARAMS, value=jnp.float32(scale))
  return updates, state


# In another width ----------------------------------------------------------------------------------------------------


def as_bfloat16(state):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


STORED = {
  "as it is": lambda state: state,
  "pickle": lambda state: pickle.loads(pickle.dumps(state)),
  "flax": lambda state: flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)),
  "numpy": lambda state: jax.tree.map(np.asarray, state),
}


# What is tested as another clip, or as the same rule in another clip, is slow.
ALIKE = {
  "clip_by_global_norm", "global, percentile", "global, percentile without the current", "global, zscore mean",
  "global, zscore reciprocal", "global, minimum", "by leaf, percentile", "by leaf, zscore",
}  # fmt: skip
# One of each kind of state goes through every way.
KINDS = ("clip_by_global_norm", "autoclip", "zclip", "watch", "skip_steps", "clip_effect", "exempt group")


@pytest.mark.parametrize(
  ("name", "way"),
  cases([(name, "as it is") for name in sorted(ALL)], slow=lambda case: case[0] in ALIKE)
  + list(itertools.product(KINDS, ("flax", "numpy", "pickle"))),
)
def test_a_state_from_before_x64_was_set_goes_on(name, way):
  tx = ALL[name]
  _, state = steps(tx, tx.init(PARAMS), [1.0, 1.5, 1.0])
  want, _ = steps(tx, state, [1.2, 3.0])
  with jax.enable_x64(True):
    got, after = steps(tx, STORED[way](state), [1.2, 3.0])
    fresh = tx.init(PARAMS)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  if not wraps_optax(name):
    chex.assert_trees_all_equal_shapes_and_dtypes(after, fresh)


@pytest.mark.parametrize(
  ("name", "jit"),
  cases(itertools.product(sorted(ALL), [True]), lambda case: case[0] in ALIKE) + [(name, False) for name in KINDS],
)
def test_a_state_that_was_cast_with_the_rest_of_a_train_state_goes_on(name, jit):
  tx = ALL[name]
  _, state = steps(tx, tx.init(PARAMS), [1.0, 1.5, 1.0])
  want, _ = steps(tx, state, [1.2, 3.0])
  # Optax itself needs the promotion that users have.
  with jax.numpy_dtype_promotion("standard" if wraps_optax(name) else "strict"):
    got, after = steps(tx, as_bfloat16(state), [1.2, 3.0], jit)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0.05)
  if not wraps_optax(name):
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


# Without an inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "jit"), [(name, False) for name in sorted(ALL)] + [(name, True) for name in KINDS])
def test_no_state_and_no_update_holds_an_inf(name, jit):
  tx = ALL[name]
  with jax.debug_infs(True), jax.debug_nans(True):
    state = tx.init(PARAMS)
    chex.assert_tree_all_finite(state)
    for scale in (1.0, 1.5, 0.0, 40.0):
      updates, state = steps(tx, state, [scale], jit)
      chex.assert_tree_all_finite((state, updates, clipjax.metrics(state, per_leaf=True)))


@pytest.mark.parametrize("limit", [math.inf, 10**300, np.float64(1e39), np.array(1e200)])
def test_a_number_above_the_range_of_norms_is_no_limit_and_gives_no_warning(limit):
  grads = gradient(1e30)
  with jax.debug_infs(True):
    for tx in (
      clipjax.clip_by_global_norm(limit),
      clipjax.clip_by_global_norm(lambda count: limit),
      clipjax.clip_by_leaf_norm(rules.minimum(limit, limit)),
      clipjax.clip_by_block_rms(limit),
      clipjax.clip_by_value(limit),
      clipjax.clip_by_group_norm({"a": limit, "b": None}, lambda path, leaf: path),
      clipjax.adaptive_grad_clip(limit),
      clipjax.skip_steps(optax.identity(), norm_rule=limit, loss_rule=limit),
    ):
      updates, state = tx.update(grads, tx.init(grads), grads, value=1.0)
      chex.assert_trees_all_equal(updates, grads)
      if not isinstance(state, clipjax.SkipState):
        np.testing.assert_array_equal(state.max_norm, np.full_like(state.max_norm, NO_LIMIT))
    clipped, norm = clipjax.clip_grad_norm(grads, limit)
    chex.assert_trees_all_equal((clipped, clipjax.clip_grad_value(grads, limit)), (grads, grads))
    total, _ = clipjax.clip_grad_per_example(jax.tree.map(lambda x: x[None], grads), limit)
    chex.assert_trees_all_equal(total, grads)
    assert norm < NO_LIMIT


def test_under_no_limit_an_infinite_entry_stays_what_it_is():
  grads = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 3.0])
  for limit in (jnp.inf, 1e39, jnp.array(jnp.inf)):
    tx = clipjax.clip_by_value(limit)
    updates, state = tx.update(grads, tx.init(grads))
    for got in (updates, clipjax.clip_grad_value(grads, limit)):
      np.testing.assert_array_equal(got, grads)
    _, state = tx.update(grads[:2], tx.init(grads[:2]))
    assert state.norm_clipped == jnp.inf and state.max_norm == NO_LIMIT


@pytest.mark.parametrize(
  "make",
  [
    lambda: rules.zscore(1e39),
    lambda: rules.rolling_sigma(1e39, std_floor=1e39),
    lambda: rules.quantile_tracking(0.5, initial=1e39, learning_rate=1e39),
    lambda: rules.ema_ratio(1e39, decay=0.9, warmup_steps=1, max_norm=1e39),
  ],
)
def test_options_of_rules_above_the_range_of_norms(make):
  tx = clipjax.clip_by_global_norm(make())
  with jax.debug_nans(True):
    updates, state = steps(tx, tx.init(PARAMS), [1.0, 2.0, 3.0], jit=False)
  chex.assert_tree_all_finite(state)
  chex.assert_trees_all_equal(updates, gradient(3.0))


# A gradient that comes late ------------------------------------------------------------------------------------------

LATE = {name: make for name, make in RULES.items() if name not in ("number", "schedule", "minimum", "delayed")} | {
  "minimum": lambda: rules.minimum(rules.zscore(warmup_steps=2), 100.0)
}
CLIPS = {
  "leaf": clipjax.clip_by_leaf_norm,
  "group": lambda rule: clipjax.clip_by_group_norm({"a": rule, "b": rule}, lambda path, leaf: path),
  "rms": clipjax.clip_by_block_rms,
}


def clipped(tx, norms):
  """The norms of a leaf after the clip, step by step, beside a leaf of norm 1."""
  update, state, out = jax.jit(tx.update), tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}), []
  for norm in norms:
    updates, state = update({"a": jnp.array([1.0]), "b": jnp.array([norm])}, state)
    out.append(float(updates["b"][0]))
  return np.array(out)


@pytest.mark.parametrize(
  ("name", "by"), [(name, "leaf") for name in sorted(LATE)] + [("zscore mean", "group"), ("zscore mean", "rms")]
)
def test_a_leaf_whose_gradient_comes_late_is_trained_as_if_the_run_began_there(name, by):
  """Norms of 0 enter no statistic: after them each limit is what it is without them."""
  tx, norms = CLIPS[by](LATE[name]()), [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0]
  want = clipped(tx, norms)
  for idle in (1, 40):
    np.testing.assert_allclose(clipped(tx, [0.0] * idle + norms)[idle:], want, rtol=1e-5)
  assert min(want) > 0.5


@pytest.mark.parametrize("name", sorted(LATE))
def test_a_leaf_whose_gradient_pauses_or_comes_in_turns_keeps_its_length(name):
  """In turns like the gradient of an expert, which is 0 at every step that goes to others."""
  tx = clipjax.clip_by_leaf_norm(LATE[name]())
  assert clipped(tx, [1.0, 1.1, 0.9, 1.0, 1.1] + [0.0] * 200 + [0.9])[-1] > 0.6
  for every in (2, 4):
    assert min(clipped(tx, ([1.0] + [0.0] * (every - 1)) * (400 // every))[::every]) > 0.6


@pytest.mark.parametrize("name", sorted(LATE))
def test_a_whole_gradient_of_zeros_enters_no_statistic(name):
  tx = clipjax.clip_by_global_norm(LATE[name]())
  state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
  for norm in [0.0] * 30 + [1.0, 1.0, 1.0]:
    updates, state = update(jnp.array([norm]), state)
  assert updates[0] > 0.5


# In other hands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "make",
  [
    lambda: clipjax.clip_by_global_norm(1.0, track=False),
    lambda: clipjax.clip_by_leaf_norm(1.0, track=False),
    lambda: clipjax.clip_by_group_norm(1.0, lambda path, leaf: path, track=False),
    lambda: clipjax.clip_by_block_rms(1.0, track=False),
    lambda: clipjax.clip_by_value(1.0, track=False),
    lambda: clipjax.adaptive_grad_clip(0.1, track=False),
  ],
)
def test_without_a_state_a_clip_takes_none_and_what_optax_gives(make):
  tx = make()
  grads = gradient(3.0)
  want, state = tx.update(grads, tx.init(PARAMS), PARAMS)
  assert state == optax.EmptyState()
  for given in (None, optax.EmptyState(), ()):
    got, state = jax.jit(tx.update)(grads, given, PARAMS)
    assert state == given
    chex.assert_trees_all_close(got, want, rtol=1e-6)
  assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(want)) < 3.0


def test_without_a_state_there_is_no_rule_by_value():
  with pytest.raises(ValueError, match=r"^`max_value` must be a number or an array with `track=False`, "):
    clipjax.clip_by_value(rules.zscore(), track=False)


@pytest.mark.parametrize("name", sorted(ALL))
def test_names_in_the_state_of_a_clip_are_unique(name):
  if wraps_optax(name):
    pytest.skip("It holds the state of another transformation.")
  state = ALL[name].init(PARAMS)
  for field in ("steps", "norm", "max_norm", "finite"):
    if field in state._fields:
      assert optax.tree.get(state, field) is getattr(state, field)
  # Adam's own count is found beside it.
  beside = optax.chain(ALL[name], optax.adam(1e-3)).init(PARAMS)
  assert optax.tree.get(beside, "count") == 0
