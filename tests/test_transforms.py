"""One contract for every exported clip, and what is particular to each `clip_by_*`."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, factories, oracle_clip, oracle_norm, random_leaves
from jax.experimental import checkify

import clipjax
from clipjax import rules

FACTORIES = factories()
BY_THRESHOLD = sorted(name for name in FACTORIES if name.startswith("clip_by_"))
RESCALING = sorted(set(BY_THRESHOLD) - {"clip_by_value"})
TREE = {"body": {"w": jnp.full((3, 2), 2.0), "b": jnp.full(2, -1.0)}, "head": jnp.full(4, 3.0, jnp.bfloat16)}
every_factory = pytest.mark.parametrize("name", sorted(FACTORIES))


def grads_at(step):
  """A gradient that differs from step to step, in the structure of TREE."""
  return jax.tree.map(lambda x: (x.astype(jnp.float32) * (1 + step)).astype(x.dtype), TREE)


def test_every_exported_factory_is_in_the_table():
  returns = {name: str(getattr(clipjax, name).__annotations__.get("return")) for name in clipjax.__all__}
  transformations = {name for name, text in returns.items() if "GradientTransformation" in text}
  # One needs parameters, two other transformations, one does not clip: they have contracts of their own.
  assert set(FACTORIES) == transformations - {"adaptive_grad_clip", "clip_effect", "skip_steps", "watch"}


@every_factory
def test_structure_shapes_and_dtypes_are_kept(name):
  tx = FACTORIES[name]
  state = tx.init(TREE)
  updates, after = tx.update(TREE, state, TREE)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, TREE)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  if name != "autoclip":  # Whose first norm is its own percentile.
    assert oracle_norm(updates) < oracle_norm(TREE)


@every_factory
def test_eager_jit_scan_and_vmap_agree(name):
  tx = FACTORIES[name]
  state, eager = tx.init(TREE), []
  for step in range(3):
    updates, state = tx.update(grads_at(step), state)
    eager.append((updates, state))
  jitted, state = [], tx.init(TREE)
  update = jax.jit(tx.update)
  for step in range(3):
    updates, state = update(grads_at(step), state)
    jitted.append((updates, state))
  assert update._cache_size() == 1  # No compilation for a state that the update itself returned.
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *map(grads_at, range(3)))
  last, scanned = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(TREE), stacked)
  first = jax.jit(jax.vmap(tx.init))(stacked)
  mapped, mapped_state = jax.jit(jax.vmap(tx.update))(stacked, first)
  for step in range(3):
    chex.assert_trees_all_close(jitted[step], eager[step], rtol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=step: x[i], scanned), eager[step][0], rtol=1e-6)
    alone, alone_state = tx.update(grads_at(step), tx.init(TREE))
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=step: x[i], mapped), alone, rtol=1e-6)
    np.testing.assert_allclose(mapped_state.norm[step], alone_state.norm, rtol=1e-6)
  chex.assert_trees_all_close(last, eager[-1][1], rtol=1e-6)


@every_factory
def test_state_is_that_of_the_norm_dtype(name, x64):
  tx = FACTORIES[name]
  tree = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)).astype(x.dtype), TREE)
  want = jnp.float64 if x64 else jnp.float32
  state = tx.init(tree)
  _, after = tx.update(tree, state)
  for s in (state, after):
    floats = jax.tree.leaves((s.norm, s.norm_clipped, s.max_norm, s.scale, s.norms))
    assert {x.dtype for x in floats} == {jnp.dtype(want)}
    assert {s.steps.dtype, s.clipped_steps.dtype, s.nonfinite_steps.dtype} == {jnp.dtype("int32")}


@every_factory
def test_donated_state_and_updates(name, standard_promotion):
  tx = optax.chain(FACTORIES[name], optax.adam(1e-3))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, TREE)
  state = tx.init(params)
  for i in range(3):
    params, state = step(params, state, grads_at(i))
  assert clipjax.metrics(state)["grad/steps"] == 3


@every_factory
def test_zero_gradient_and_empty_tree(name):
  tx = FACTORIES[name]
  zeros = jax.tree.map(jnp.zeros_like, TREE)
  updates, state = tx.update(zeros, tx.init(zeros))
  assert_bits_equal(updates, zeros)
  assert state.norm == 0 and state.clipped_steps == 0
  updates, state = tx.update({}, tx.init({}))
  assert updates == {} and state.steps == 1


def test_zeros_under_a_limit_of_zero_have_a_scale_of_one():
  tx = clipjax.clip_by_global_norm(0.0)
  updates, state = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))
  assert not updates.any() and state.scale == 1 and state.clipped_steps == 0


def test_an_empty_tree_and_a_limit_that_is_nan():
  tx = clipjax.clip_by_global_norm(lambda count: jnp.nan)
  updates, state = tx.update({}, tx.init({}))
  assert updates == {} and state.nonfinite_steps == 1 and state.nonfinite_leaf == -1


@every_factory
def test_leaves_that_are_not_measured(name):
  tx = FACTORIES[name]
  key = jax.random.key(0)
  params = {"w": jnp.ones(2), "n": jnp.arange(3), "flag": jnp.array(True), "key": key, "none": None}
  state = tx.init(params)
  assert state.labels.leaves == ("w",)
  f0 = np.zeros(3, jax.dtypes.float0)
  updates, _ = tx.update({"w": jnp.ones(2), "n": f0, "flag": None, "key": optax.MaskedNode(), "none": None}, state)
  assert updates["n"] is f0


@every_factory
def test_sharded_updates_keep_their_sharding_and_values(name):
  tx = FACTORIES[name]
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  grads = {"a": jnp.arange(16.0), "b": jnp.ones((8, 3))}
  want, _ = tx.update(grads, tx.init(grads))
  sharded = jax.device_put(grads, sharding)
  got, state = jax.jit(tx.update)(sharded, tx.init(sharded))
  chex.assert_trees_all_close(got, want, rtol=1e-6)
  for x in jax.tree.leaves(got):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  np.testing.assert_allclose(state.norm, oracle_norm(grads, math.inf if name == "clip_by_value" else 2), rtol=1e-6)


@pytest.mark.parametrize("name", RESCALING)
@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_step_is_never_half_applied(name, policy, bad):
  options = {"on_nonfinite": policy}
  tx = {
    "clip_by_group_norm": lambda: clipjax.clip_by_group_norm({"b": 1.0, "h": None}, lambda p, x: p[0], **options),
  }.get(name, lambda: getattr(clipjax, name)(0.5, **options))()
  state = tx.init(TREE)
  bad_grads = {**TREE, "head": TREE["head"].at[1].set(bad)}
  updates, after = jax.jit(tx.update)(bad_grads, state)
  for x in jax.tree.leaves(updates):
    x = np.asarray(x, np.float32)
    assert np.isnan(x).all() if policy == "propagate" else not x.any()
  assert after.nonfinite_steps == 1 and after.steps == 1 and after.clipped_steps == 0 and not after.finite
  assert after.labels.leaves[after.nonfinite_leaf] == "head"
  filled = math.nan if policy == "propagate" else 0.0
  np.testing.assert_equal(float(after.norm_clipped), filled)
  np.testing.assert_equal(np.unique(after.scale), [filled])
  _, good = jax.jit(tx.update)(TREE, after)
  assert good.finite and good.nonfinite_leaf == -1 and good.nonfinite_steps == 1


@pytest.mark.parametrize("name", RESCALING)
def test_error_policy(name):
  make = getattr(clipjax, name)
  args = (lambda path, leaf: "all",) if name == "clip_by_group_norm" else ()
  tx = make(0.5, *args, on_nonfinite="error")
  bad = {**TREE, "head": TREE["head"].at[1].set(jnp.nan)}
  state = tx.init(TREE)
  with pytest.raises(FloatingPointError, match=r"norm nan.* in 'head'"):
    tx.update(bad, state)
  err, _ = jax.jit(checkify.checkify(tx.update))(bad, state)
  assert "the gradient is not finite" in err.get()
  err, _ = jax.jit(checkify.checkify(tx.update))(TREE, state)
  assert err.get() is None


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm", "clip_by_block_rms"])
def test_checks_of_floats_find_nothing_where_the_gradient_is_finite(name, scale):
  tx = getattr(clipjax, name)(1.0)
  grads = jax.tree.map(lambda x: x * scale, TREE)
  checked = checkify.checkify(tx.update, errors=checkify.float_checks)
  err, _ = jax.jit(checked)(grads, tx.init(grads))
  assert err.get() is None


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_a_step_under_the_limit_has_a_scale_of_one(policy):
  tx = clipjax.clip_by_leaf_norm(6.0, on_nonfinite=policy)
  grads = [jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])]
  updates, state = tx.update(grads, tx.init(grads))
  np.testing.assert_allclose(state.scale, [1.0, 0.6], rtol=1e-6)
  np.testing.assert_allclose(state.norm_clipped, np.sqrt(5.0**2 + 6.0**2), rtol=1e-6)
  np.testing.assert_allclose(updates, [[3.0, 4.0], [3.6, 4.8]], rtol=1e-6)


def test_global_against_the_oracle_with_statistics():
  tx = clipjax.clip_by_global_norm(0.7)
  leaves = random_leaves(6)
  updates, state = tx.update(leaves, tx.init(leaves))
  for got, want in zip(updates, oracle_clip(leaves, 0.7), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6)
  norm = oracle_norm(leaves)
  np.testing.assert_allclose(state.norm, norm, rtol=1e-6)
  np.testing.assert_allclose(state.norm_clipped, 0.7, rtol=1e-6)
  np.testing.assert_allclose(state.scale, 0.7 / norm, rtol=1e-6)
  assert state.max_norm == np.float32(0.7) and state.clipped_steps == 1


def test_by_leaf_and_by_rms_against_the_oracle():
  leaves = random_leaves(6, magnitude=2.0)
  by_leaf = clipjax.clip_by_leaf_norm(1.5)
  updates, state = by_leaf.update(leaves, by_leaf.init(leaves))
  for got, x, n in zip(updates, leaves, state.norms, strict=True):
    np.testing.assert_allclose(got, oracle_clip(x, 1.5), rtol=1e-6)
    np.testing.assert_allclose(n, oracle_norm(x), rtol=1e-6)
  np.testing.assert_allclose(state.norm, oracle_norm(leaves), rtol=1e-6)
  np.testing.assert_allclose(state.norm_clipped, oracle_norm(updates), rtol=1e-6)
  leaves.append(jnp.zeros((0, 3)))
  by_rms = clipjax.clip_by_block_rms(1.5)
  updates, state = by_rms.update(leaves, by_rms.init(leaves))
  want, _ = optax.clip_by_block_rms(1.5).update(leaves[:-1], optax.EmptyState())
  chex.assert_trees_all_close(updates[:-1], want, rtol=1e-6)
  np.testing.assert_allclose(state.norms[:-1], [np.sqrt(np.mean(np.square(x))) for x in leaves[:-1]], rtol=1e-6)
  assert state.norms[-1] == 0


def test_by_value_is_optax_clip():
  leaves = random_leaves(6, magnitude=2.0)
  tx = clipjax.clip_by_value(0.9)
  updates, state = tx.update(leaves, tx.init(leaves))
  assert_bits_equal(updates, optax.clip(0.9).update(leaves, optax.EmptyState())[0])
  assert state.norm == max(np.abs(x).max() for x in leaves)
  assert state.norm_clipped == np.float32(0.9)
  updates, state = tx.update([jnp.array([jnp.inf, jnp.nan])], tx.init([jnp.ones(2)]))
  np.testing.assert_array_equal(updates[0], [np.float32(0.9), np.nan])
  assert state.nonfinite_steps == 1


def test_groups_by_function_tree_and_dict(standard_promotion):
  grads = {"body": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": jnp.array([10.0]), "n": None}
  label = lambda path, leaf: path.split("/")[0]  # noqa: E731
  as_tree = {"body": "body", "head": "head", "n": None}
  for groups in (label, as_tree):
    tx = clipjax.clip_by_group_norm(2.5, groups)
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["body"]["w"], [1.5], rtol=1e-6)
    np.testing.assert_allclose(updates["head"], [2.5], rtol=1e-6)
    np.testing.assert_allclose(state.norms, [5, 10], rtol=1e-6)
  schedule = optax.piecewise_constant_schedule(10.0, {1: 0.1})
  tx = clipjax.clip_by_group_norm({"head": None, "body": schedule}, label)
  state = tx.init(grads)
  for want in (3.0, 0.6):
    updates, state = tx.update(grads, state)
    np.testing.assert_allclose(updates["body"]["w"], [want], rtol=1e-6)
    assert updates["head"] == 10
  assert clipjax.metrics(state)["grad/max_norm/head"] == np.finfo(np.float32).max


def test_labels_may_be_numbers_or_enums():
  grads = [jnp.array([3.0, 4.0]), jnp.array([1.0])]
  tx = clipjax.clip_by_group_norm({0: 1.0, 1: 2.0}, [0, 1])
  updates, _ = tx.update(grads, tx.init(grads))
  np.testing.assert_allclose(updates[0], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("make", [clipjax.clip_by_global_norm, clipjax.clip_by_leaf_norm, clipjax.clip_by_block_rms])
def test_number_array_schedule_and_rule_share_one_state(make):
  thresholds = [0.5, np.float64(0.5), jnp.bfloat16(0.5), jnp.array(0.5), lambda _: 0.5]
  states, outs = [], []
  for threshold in thresholds:
    tx = make(threshold)
    updates, state = tx.update(TREE, tx.init(TREE))
    states.append(state)
    outs.append(updates)
  for updates, state in zip(outs, states, strict=True):
    chex.assert_trees_all_close(updates, outs[0])
    chex.assert_trees_all_close(state, states[0])
    assert jax.tree.structure(state) == jax.tree.structure(states[0])
  # So a run with a constant resumes with a schedule, at the count that it has reached.
  resumed = make(lambda count: jnp.where(count == 1, 1.5, 0.5))
  _, state = resumed.update(TREE, states[0])
  np.testing.assert_allclose(np.min(state.max_norm), 1.5)


@pytest.mark.parametrize(
  ("values", "leaf"),
  [
    ((1, math.inf, math.nan, math.nan), 2),
    ((math.nan, 1, math.inf, 1), 0),
    ((1, math.inf, 1, math.inf), 1),
    ((1,), -1),
  ],
)
@pytest.mark.parametrize("make", [clipjax.clip_by_global_norm, clipjax.clip_by_leaf_norm])
def test_the_leaf_that_is_named_is_the_first_that_is_nan_or_else_inf(make, values, leaf):
  grads = [jnp.array([x, 1.0]) for x in values]
  tx = make(1.0)
  _, state = tx.update(grads, tx.init(grads))
  assert state.nonfinite_leaf == leaf
  np.testing.assert_allclose(state.norm, np.linalg.norm(np.array(grads)), rtol=1e-6)


def fixed_rule(limit, target):
  return rules.Rule(lambda shape, dtype: (), lambda norms, state, *, global_norm: (limit, target, state))


@pytest.mark.parametrize("make", [clipjax.clip_by_global_norm, clipjax.clip_by_leaf_norm, clipjax.clip_by_value])
def test_a_limit_or_a_target_below_zero_counts_as_zero(make):
  grads = [jnp.array([3.0, -4.0])]
  tx = make(lambda count: -1.0)
  updates, state = tx.update(grads, tx.init(grads))
  assert not updates[0].any() and state.max_norm == 0 and state.clipped_steps == 1
  if make is not clipjax.clip_by_value:  # Whose limit is its target.
    tx = make(fixed_rule(1.0, -1.0))
    updates, state = tx.update(grads, tx.init(grads))
    assert not updates[0].any() and state.norm_clipped == 0 and state.scale == 0


def test_a_limit_that_is_nan_for_one_leaf_is_a_step_that_is_not_finite():
  tx = clipjax.clip_by_leaf_norm(fixed_rule(jnp.array([1.0, jnp.nan]), 1.0))
  grads = [jnp.array([3.0]), jnp.array([0.5])]
  updates, state = tx.update(grads, tx.init(grads))
  assert state.nonfinite_steps == 1 and np.isnan(updates).all()
  assert state.nonfinite_leaf == -1  # It is the limit.


def test_a_target_that_is_nan_for_one_leaf_is_a_step_that_is_not_finite():
  tx = clipjax.clip_by_leaf_norm(fixed_rule(1.0, jnp.array([1.0, jnp.nan])))
  grads = [jnp.array([3.0]), jnp.array([0.5])]
  updates, state = tx.update(grads, tx.init(grads))
  assert state.nonfinite_steps == 1 and np.isnan(updates).all()


def test_at_the_limit_the_target_of_a_rule_has_no_meaning():
  tx = clipjax.clip_by_global_norm(fixed_rule(5.0, 1.0), eps=1e-6)
  grads = jnp.array([3.0, 4.0])
  np.testing.assert_allclose(tx.update(grads, tx.init(grads))[0], grads, rtol=1e-6)
  np.testing.assert_allclose(tx.update(2 * grads, tx.init(grads))[0], [0.6, 0.8], rtol=1e-6)


def test_schedule_counts_steps_that_are_not_finite():
  tx = clipjax.clip_by_global_norm(lambda count: count + 1)
  state = tx.init(jnp.ones(2))
  _, state = tx.update(jnp.array([jnp.nan, 1.0]), state)
  _, state = tx.update(jnp.ones(2), state)
  assert state.max_norm == 2 and state.steps == 2 and state.nonfinite_steps == 1


def test_without_tracking_the_state_is_that_of_optax(standard_promotion):
  ours, theirs = clipjax.clip_by_global_norm(0.5, track=False), optax.clip_by_global_norm(0.5)
  assert ours.init(TREE) == theirs.init(TREE) == optax.EmptyState()
  updates, state = jax.jit(ours.update)(TREE, theirs.init(TREE))
  assert state == optax.EmptyState()
  chex.assert_trees_all_close(updates, theirs.update(TREE, state)[0], rtol=1e-2)
  for name in sorted(RESCALING):
    args = (lambda path, leaf: path[0],) if name == "clip_by_group_norm" else ()
    tx = getattr(clipjax, name)(0.5, *args, track=False)
    tracked = getattr(clipjax, name)(0.5, *args)
    updates, _ = tx.update(TREE, tx.init(TREE))
    assert_bits_equal(updates, tracked.update(TREE, tracked.init(TREE))[0])


@pytest.mark.parametrize("p", [1.0, 3.0, math.inf])
def test_other_orders(p):
  leaves = random_leaves(4)
  for make, blocks in ((clipjax.clip_by_global_norm, [leaves]), (clipjax.clip_by_leaf_norm, [[x] for x in leaves])):
    tx = make(0.1, p)
    updates, _ = tx.update(leaves, tx.init(leaves))
    want = [x for block in blocks for x in oracle_clip(block, 0.1, p)]
    for got, expected in zip(updates, want, strict=True):
      np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_norm_after_is_right_where_the_factor_is_subnormal():
  for tx in (clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(1.0), clipjax.clip_by_block_rms(1.0)):
    updates, state = tx.update(jnp.array([1e38]), tx.init(jnp.zeros(1)))
    np.testing.assert_allclose([updates[0], state.norm_clipped], 1.0, rtol=1e-6)


def test_gradient_that_is_not_reduced_is_an_error():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  tx = clipjax.clip_by_global_norm(1.0)
  vary = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary

  def step(w, x):
    local = vary(w, "x")
    grads = {"w": jax.grad(lambda w: jnp.sum(w * x[0]))(local)}
    return tx.update(grads, tx.init({"w": w}), {"w": w})[0]

  run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("x")), out_specs={"w": spec()}))
  with pytest.raises(ValueError, match=r"got 'w' varying over \['x'\]: reduce it with jax.lax.pmean or psum first"):
    run(jnp.ones(3), jnp.ones((8, 3)))


def test_eps_is_that_of_torch():
  x = jnp.array([0.6, 0.8])
  tx = clipjax.clip_by_global_norm(1.0, eps=1e-6)
  np.testing.assert_allclose(tx.update(x, tx.init(x))[0], np.array([0.6, 0.8]) / (1 + 1e-6), rtol=1e-7)


def test_inject_hyperparams_as_it_stands(standard_promotion):
  inject = optax.inject_hyperparams
  mixed = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4), "c": jnp.ones(())}
  for tx in (
    inject(clipjax.clip_by_global_norm)(max_norm=0.5),
    inject(clipjax.clip_by_global_norm)(max_norm=optax.constant_schedule(0.5)),
    inject(clipjax.clip_by_leaf_norm)(max_norm=0.5),
    inject(clipjax.clip_by_block_rms)(max_rms=0.25),
    inject(clipjax.clip_by_value)(max_value=0.25),
    inject(clipjax.clip_by_group_norm, static_args="groups")(max_norm=0.5, groups=lambda path, leaf: "all"),
  ):
    for tree in (mixed, jax.tree.map(lambda x: x.astype(jnp.bfloat16), mixed)):
      state = tx.init(tree)
      updates, state = jax.jit(tx.update)(tree, state, tree)
      chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
      assert oracle_norm(updates) < oracle_norm(tree)
      step = partial(lambda tx, tree, state, _: (tx.update(tree, state, tree)[1], None), tx, tree)
      jax.eval_shape(lambda state, step=step: jax.lax.scan(step, state, None, length=2), state)


def test_inject_hyperparams_changes_the_threshold():
  tx = optax.inject_hyperparams(clipjax.clip_by_global_norm)(max_norm=1.0)
  state = tx.init(jnp.ones(2))
  state.hyperparams["max_norm"] = jnp.float32(0.25)
  updates, _ = tx.update(jnp.array([3.0, 4.0]), state, jnp.ones(2))
  np.testing.assert_allclose(updates, [0.15, 0.2], rtol=1e-6)


def test_counters_stop_at_the_end_of_int32():
  tx = clipjax.clip_by_global_norm(0.5)
  state = tx.init(jnp.ones(2))
  last = jnp.array(2**31 - 1, jnp.int32)
  _, state = tx.update(jnp.ones(2), state._replace(steps=last, clipped_steps=last))
  assert state.steps == 2**31 - 1 and clipjax.metrics(state)["grad/clip_fraction"] == 1


def test_differentiating_through_an_update():
  tx = clipjax.clip_by_global_norm(1.0)
  state = tx.init(jnp.zeros(2))
  jac = jax.jacrev(lambda g: tx.update(g, state)[0])
  np.testing.assert_allclose(jac(jnp.array([3.0, 4.0])), [[0.128, -0.096], [-0.096, 0.072]], rtol=1e-5)
  np.testing.assert_array_equal(jac(jnp.zeros(2)), np.eye(2))
  norms = jax.grad(lambda g: clipjax.metrics(tx.update(g, state)[1])["grad/norm"])(jnp.array([3.0, 4.0]))
  np.testing.assert_allclose(norms, [0.6, 0.8], rtol=1e-6)


def test_another_structure_in_update_than_in_init():
  # Flax NNX and Equinox hand the two of them trees of different structure with the same arrays.
  tx = clipjax.clip_by_leaf_norm(1.0)
  state = tx.init({"w": jnp.ones(2), "b": jnp.ones(2)})
  (b, _), state = tx.update((jnp.array([3.0, 4.0]), jnp.array([0.0, 0.5])), state)
  np.testing.assert_allclose(b, [0.6, 0.8], rtol=1e-6)
  assert clipjax.metrics(state, per_leaf=True)["grad/norm/b"] == 5


@pytest.mark.parametrize("make", [
  lambda: clipjax.clip_by_leaf_norm(1.0), lambda: clipjax.clip_by_block_rms(1.0),
  lambda: clipjax.clip_by_group_norm(1.0, lambda path, leaf: path), lambda: clipjax.adaptive_grad_clip(0.1),
])  # fmt: skip
def test_finite_leaves_whose_global_norm_is_not_make_a_step_nonfinite(make):
  grads = {"a": jnp.array([3e38]), "b": jnp.array([3e38])}
  tx = make()
  updates, state = tx.update(grads, tx.init(grads), grads)
  assert np.isnan(updates["a"]) and state.nonfinite_steps == 1
  with pytest.raises(FloatingPointError, match="norm inf, above the largest number of its dtype"):
    clipjax.raise_if_nonfinite(state)
