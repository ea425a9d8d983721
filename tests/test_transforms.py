"""One contract for every exported clip, and what is particular to each `clip_by_*`."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
  assert_bits_equal,
  assert_close,
  factories,
  first_step,
  oracle_clip,
  oracle_norm,
  random_leaves,
  steps_of,
)
from jax.experimental import checkify

import clipjax

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
  state = FACTORIES[name].init(TREE)
  updates, after = FACTORIES[name].update(TREE, state, TREE)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, TREE)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  if name != "autoclip":  # Whose first norm is its own percentile.
    assert oracle_norm(updates) < oracle_norm(TREE)


@every_factory
def test_eager_jit_scan_and_vmap_agree(name):
  tx = FACTORIES[name]
  grads = [grads_at(step) for step in range(3)]
  small = jax.tree.map(lambda x: (x / 1000).astype(x.dtype), TREE)  # Under every limit, if the step were finite.
  grads.insert(2, small | {"head": jnp.full_like(TREE["head"], jnp.nan)})

  def loop(update):
    state, steps = tx.init(TREE), []
    for each in grads:
      updates, state = update(each, state)
      steps.append(jax.device_get((updates, state)))
    return jax.tree.map(lambda *xs: np.stack(xs), *steps)

  update = jax.jit(tx.update, donate_argnums=1)
  eager, jitted = loop(tx.update), loop(update)
  assert update._cache_size() == 1  # No compilation for a state that the update itself returned.
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
  scanned = jax.lax.scan(lambda s, g: ((out := tx.update(g, s))[1], out), tx.init(TREE), stacked)[1]
  chex.assert_trees_all_close(jitted, eager, rtol=1e-6)
  chex.assert_trees_all_close(scanned, eager, rtol=1e-6)
  mapped, mapped_state = jax.jit(jax.vmap(tx.update))(stacked, jax.jit(jax.vmap(tx.init))(stacked))
  for step, each in enumerate(grads):
    alone, alone_state = first_step(tx, each)
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=step: x[i], mapped), alone, rtol=1e-6)
    np.testing.assert_allclose(mapped_state.norm[step], alone_state.norm, rtol=1e-6)


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
def test_zero_gradient_and_empty_tree(name):
  zeros = jax.tree.map(jnp.zeros_like, TREE)
  updates, state = first_step(FACTORIES[name], zeros)
  assert_bits_equal(updates, zeros)
  assert state.norm == 0 and state.clipped_steps == 0
  updates, state = first_step(FACTORIES[name], {})
  assert updates == {} and state.steps == 1


def test_zeros_under_a_limit_of_zero_have_a_scale_of_one():
  updates, state = first_step(clipjax.clip_by_global_norm(0.0), jnp.zeros(2))
  assert not updates.any() and state.scale == 1 and state.clipped_steps == 0


def test_an_empty_tree_and_a_limit_that_is_nan():
  updates, state = first_step(clipjax.clip_by_global_norm(lambda count: jnp.nan), {})
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


def make(name, *limit, **options):
  """A factory that rescales, with one group for all leaves."""
  groups = (lambda path, leaf: "all",) if name == "clip_by_group_norm" else ()
  return getattr(clipjax, name)(*(limit or (0.5,)), *groups, **options)


@pytest.mark.parametrize("name", RESCALING)
@pytest.mark.parametrize(("policy", "filled"), [("propagate", math.nan), ("zero", 0.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_step_is_never_half_applied(name, policy, filled, bad):
  tx = make(name, on_nonfinite=policy)
  if name == "clip_by_group_norm":
    tx = clipjax.clip_by_group_norm({"b": 1.0, "h": None}, lambda path, leaf: path[0], on_nonfinite=policy)
  bad_grads = {**TREE, "head": TREE["head"].at[1].set(bad)}
  updates, after = jax.jit(tx.update)(bad_grads, tx.init(TREE))
  assert_close(updates, jax.tree.map(lambda x: np.full(x.shape, filled), TREE))
  assert after.nonfinite_steps == 1 and after.steps == 1 and after.clipped_steps == 0 and not after.finite
  assert after.labels.leaves[after.nonfinite_leaf] == "head"
  np.testing.assert_array_equal([after.norm_clipped, *np.unique(after.scale)], filled)
  _, good = jax.jit(tx.update)(TREE, after)
  assert good.finite and good.nonfinite_leaf == -1 and good.nonfinite_steps == 1


@pytest.mark.parametrize("name", RESCALING)
def test_error_policy(name):
  tx = make(name, on_nonfinite="error")
  bad = {**TREE, "head": TREE["head"].at[1].set(jnp.nan)}
  with pytest.raises(FloatingPointError, match=r"norm nan.* in 'head'"):
    first_step(tx, bad)
  checked = jax.jit(checkify.checkify(tx.update))
  assert "the gradient is not finite" in checked(bad, tx.init(TREE))[0].get()
  assert checked(TREE, tx.init(TREE))[0].get() is None


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm", "clip_by_block_rms"])
def test_checks_of_floats_find_nothing_where_the_gradient_is_finite(name):
  tx = make(name, 1.0)
  checked = jax.jit(checkify.checkify(tx.update, errors=checkify.float_checks))
  for scale in (0.0, 1e-30, 1.0, 1e30):
    err, _ = checked(jax.tree.map(lambda x, s=scale: x * s, TREE), tx.init(TREE))
    assert err.get() is None


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_global_and_by_leaf_against_the_oracle_with_statistics(p):
  leaves = random_leaves(6)
  norm, norms = oracle_norm(leaves, p), np.array([oracle_norm(x, p) for x in leaves])
  updates, state = first_step(clipjax.clip_by_global_norm(0.7, p), leaves)
  assert_close(updates, oracle_clip(leaves, 0.7, p), 2e-6)
  np.testing.assert_allclose([state.norm, state.norm_clipped, state.scale], [norm, 0.7, 0.7 / norm], rtol=1e-6)
  assert state.max_norm == np.float32(0.7) and state.clipped_steps == 1
  updates, state = first_step(clipjax.clip_by_leaf_norm(2.0, p), leaves)
  assert_close(updates, [oracle_clip(x, 2.0, p) for x in leaves], 2e-6)
  scales = np.minimum(1, 2.0 / norms)
  assert 0 < (scales == 1).sum() < 6
  wanted = [norm, oracle_norm(updates, p), norms, scales]
  assert_close([state.norm, state.norm_clipped, state.norms, state.scale], wanted)


def test_by_rms_against_optax():
  leaves = random_leaves(6, magnitude=2.0)
  updates, state = first_step(clipjax.clip_by_block_rms(1.5), [*leaves, jnp.zeros((0, 3))])
  assert_close(updates[:-1], first_step(optax.clip_by_block_rms(1.5), leaves)[0])
  np.testing.assert_allclose(state.norms, [*(np.sqrt(np.mean(np.square(x))) for x in leaves), 0], rtol=1e-6)


def test_by_value_is_optax_clip():
  leaves = random_leaves(6, magnitude=2.0)
  updates, state = first_step(clipjax.clip_by_value(0.9), leaves)
  assert_bits_equal(updates, first_step(optax.clip(0.9), leaves)[0])
  assert state.norm == max(np.abs(x).max() for x in leaves)
  assert state.norm_clipped == np.float32(0.9)
  updates, state = first_step(clipjax.clip_by_value(0.9), [jnp.array([jnp.inf, jnp.nan])])
  np.testing.assert_array_equal(updates[0], [np.float32(0.9), np.nan])
  assert state.nonfinite_steps == 1


def test_groups_by_function_tree_and_dict(standard_promotion):
  grads = {"body": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": jnp.array([10.0]), "n": None}
  label = lambda path, leaf: path.split("/")[0]  # noqa: E731
  as_tree = {"body": "body", "head": "head", "n": None}
  for groups in (label, as_tree):
    updates, state = first_step(clipjax.clip_by_group_norm(2.5, groups), grads)
    np.testing.assert_allclose(updates["body"]["w"], [1.5], rtol=1e-6)
    np.testing.assert_allclose(updates["head"], [2.5], rtol=1e-6)
    np.testing.assert_allclose(state.norms, [5, 10], rtol=1e-6)
  schedule = optax.piecewise_constant_schedule(10.0, {1: 0.1})
  tx = clipjax.clip_by_group_norm({"head": None, "body": schedule}, label)
  steps = steps_of(tx, [grads, grads])
  assert_close([updates["body"]["w"] for updates, _ in steps], [np.array([3.0]), np.array([0.6])])
  assert all(updates["head"] == 10 for updates, _ in steps)
  assert clipjax.metrics(steps[-1][1])["grad/max_norm/head"] == np.finfo(np.float32).max


def test_labels_may_be_numbers_or_enums():
  grads = [jnp.array([3.0, 4.0]), jnp.array([1.0])]
  updates, _ = first_step(clipjax.clip_by_group_norm({0: 1.0, 1: 2.0}, [0, 1]), grads)
  np.testing.assert_allclose(updates[0], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm", "clip_by_block_rms"])
def test_number_array_schedule_and_rule_share_one_state(name):
  limits = [0.5, np.float64(0.5), jnp.bfloat16(0.5), jnp.array(0.5), lambda _: 0.5]
  first, *others = (first_step(make(name, limit), TREE) for limit in limits)
  for other in others:
    chex.assert_trees_all_close(other, first)
  # So a run with a constant resumes with a schedule, at the count that it has reached.
  _, state = make(name, lambda count: jnp.where(count == 1, 1.5, 0.5)).update(TREE, first[1])
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
@pytest.mark.parametrize("factory", [clipjax.clip_by_global_norm, clipjax.clip_by_leaf_norm])
def test_the_leaf_that_is_named_is_the_first_that_is_nan_or_else_inf(factory, values, leaf):
  grads = [jnp.array([x, 1.0]) for x in values]
  _, state = first_step(factory(1.0), grads)
  assert state.nonfinite_leaf == leaf
  np.testing.assert_allclose(state.norm, np.linalg.norm(np.array(grads)), rtol=1e-6)


@pytest.mark.parametrize("factory", [clipjax.clip_by_global_norm, clipjax.clip_by_leaf_norm, clipjax.clip_by_value])
def test_a_limit_below_zero_counts_as_zero(factory):
  updates, state = first_step(factory(lambda count: -1.0), [jnp.array([3.0, -4.0])])
  assert not updates[0].any() and state.max_norm == 0 and state.clipped_steps == 1


def test_schedule_counts_steps_that_are_not_finite():
  tx = clipjax.clip_by_global_norm(lambda count: count + 1)
  _, state = steps_of(tx, [jnp.array([jnp.nan, 1.0]), jnp.ones(2)])[-1]
  assert state.max_norm == 2 and state.steps == 2 and state.nonfinite_steps == 1


@pytest.mark.parametrize("name", RESCALING)
def test_without_tracking_the_state_is_that_of_optax(name):
  tx = make(name, track=False)
  updates, state = first_step(tx, TREE)
  assert tx.init(TREE) == state == optax.EmptyState()
  assert_bits_equal(updates, first_step(make(name), TREE)[0])


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


def test_counters_stop_at_the_end_of_int32():
  tx = clipjax.clip_by_global_norm(0.5)
  state = tx.init(jnp.ones(2))
  last = jnp.array(2**31 - 1, jnp.int32)
  _, state = tx.update(jnp.ones(2), state._replace(steps=last, clipped_steps=last))
  assert state.steps == 2**31 - 1 and clipjax.metrics(state)["grad/clip_fraction"] == 1


def test_another_structure_in_update_than_in_init():
  # Flax NNX and Equinox hand the two of them trees of different structure with the same arrays.
  tx = clipjax.clip_by_leaf_norm(1.0)
  state = tx.init({"w": jnp.ones(2), "b": jnp.ones(2)})
  (b, _), state = tx.update((jnp.array([3.0, 4.0]), jnp.array([0.0, 0.5])), state)
  np.testing.assert_allclose(b, [0.6, 0.8], rtol=1e-6)
  assert clipjax.metrics(state, per_leaf=True)["grad/norm/b"] == 5


@pytest.mark.parametrize("tx", [
  clipjax.clip_by_leaf_norm(1.0), clipjax.clip_by_block_rms(1.0),
  clipjax.clip_by_group_norm(1.0, lambda path, leaf: path), clipjax.adaptive_grad_clip(0.1),
])  # fmt: skip
def test_finite_leaves_whose_global_norm_is_not_make_a_step_nonfinite(tx):
  grads = {"a": jnp.array([3e38]), "b": jnp.array([3e38])}
  updates, state = first_step(tx, grads, grads)
  assert np.isnan(updates["a"]) and state.nonfinite_steps == 1
  with pytest.raises(FloatingPointError, match="norm inf, above the largest number of its dtype"):
    clipjax.raise_if_nonfinite(state)
