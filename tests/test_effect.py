"""clip_effect: two optimizers beside each other, held to the two run by hand and compared in float64."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import through_equinox, through_flax, through_orbax
from flax import nnx
from helpers import assert_bits_equal, oracle_norm

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax needs it.

PARAMS = {"dense": {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}, "head": jnp.full((4, 3), 0.5)}
NAMES = ("dense/b", "dense/w", "head")  # In the order of the tree.
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 20)
OPTIMIZERS = {
  "sgd": optax.sgd(0.1),
  "momentum": optax.sgd(0.1, momentum=0.9),
  "adam": optax.adam(0.01),
  "adamw": optax.adamw(SCHEDULE, weight_decay=0.1),
  "lion": optax.lion(0.01),
  "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=2),
  "muon": optax.contrib.muon(0.01),
  "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
  "multi_transform": optax.multi_transform(
    {"a": optax.adam(0.01), "b": optax.sgd(0.1, momentum=0.9)}, {"dense": "a", "head": "b"}
  ),
  "chain": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01), optax.scale(-0.1)),
}
CLIPS = {
  "global": clipjax.clip_by_global_norm(0.7),
  "leaf": clipjax.clip_by_leaf_norm(0.5),
  "value": clipjax.clip_by_value(0.2),
  "optax": optax.clip_by_global_norm(0.7),
  "agc": clipjax.adaptive_grad_clip(0.05),
}
EVERY = {**{name: ("global", name) for name in OPTIMIZERS}, **{name: (name, "adam") for name in CLIPS}}


def grads_at(step, params=PARAMS):
  """Gradients whose size varies from step to step and from leaf to leaf, the last leaf with a heavy tail."""
  rng = np.random.default_rng(step)
  leaves, treedef = jax.tree.flatten(params)
  sizes = [0.1, 1.0, 1.0 + 30.0 * (step % 4 == 3)]
  drawn = [rng.standard_normal(x.shape) * size for x, size in zip(leaves, sizes, strict=True)]
  return jax.tree.unflatten(treedef, [jnp.asarray(x, leaf.dtype) for x, leaf in zip(drawn, leaves, strict=True)])


def compared(a, b):
  """Ratio of the norms and cosine of two trees, in float64; 1 where nothing moves."""
  a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b))
  if not a.any() and not b.any():
    return 1.0, 1.0
  return np.linalg.norm(a) / np.linalg.norm(b), a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(("clip", "optimizer"), EVERY.values(), ids=EVERY)
def test_equals_two_optimizers_run_by_hand(clip, optimizer):
  clip, optimizer = CLIPS[clip], OPTIMIZERS[optimizer]
  chain, tx = optax.chain(clip, optimizer), clipjax.clip_effect(clip, optimizer)
  params, state = PARAMS, tx.init(PARAMS)
  inner, second = chain.init(PARAMS), optimizer.init(PARAMS)
  update, by_chain, by_second = jax.jit(tx.update), jax.jit(chain.update), jax.jit(optimizer.update)
  for step in range(8):
    grads = grads_at(step)
    updates, state = update(grads, state, params)
    want, inner = by_chain(grads, inner, params)
    plain, second = by_second(grads, second, params)
    assert_bits_equal(updates, want)
    np.testing.assert_allclose((state.ratio, state.cosine), compared(want, plain), rtol=1e-5, atol=1e-6)
    pairs = zip(jax.tree.leaves(want), jax.tree.leaves(plain), strict=True)
    of_leaves = np.array([compared(a, b) for a, b in pairs])
    np.testing.assert_allclose(np.stack([state.ratios, state.cosines], 1), of_leaves, rtol=1e-4, atol=1e-6)
    squares = [oracle_norm(g) ** 2 for g in jax.tree.leaves(grads)]
    np.testing.assert_allclose(state.shares, squares / np.sum(squares), rtol=1e-5)
    params = optax.apply_updates(params, updates)
  assert_bits_equal(jax.tree.leaves(state.inner_state), jax.tree.leaves(inner))
  chex.assert_trees_all_close(jax.tree.leaves(state.unclipped_state), jax.tree.leaves(second), rtol=1e-5)
  assert state.labels.block_names == NAMES


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_eager_updates_are_those_of_the_chain(optimizer):
  clip, optimizer = CLIPS["global"], OPTIMIZERS[optimizer]
  chain, tx = optax.chain(clip, optimizer), clipjax.clip_effect(clip, optimizer)
  want, inner = chain.update(grads_at(0), chain.init(PARAMS), PARAMS)
  updates, state = tx.update(grads_at(0), tx.init(PARAMS), PARAMS)
  assert_bits_equal(updates, want)
  assert_bits_equal(jax.tree.leaves(state.inner_state), jax.tree.leaves(inner))
  assert jax.tree.structure(state.inner_state) == jax.tree.structure(inner)


# What each optimizer makes of a clip ----------------------------------------------------------------------------------


def effects(clip, optimizer, grads, params=None):
  """The last state, ratios (steps, leaves) and cosines of some steps, at parameters that stay."""
  tx = clipjax.clip_effect(clip, optimizer)
  params = jax.tree.map(jnp.ones_like, grads[0]) if params is None else params
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)

  def step(state, grad):
    state = tx.update(grad, state, params)[1]
    return state, (state.ratio, state.cosine, state.ratios)

  state, (ratio, cosine, ratios) = jax.lax.scan(step, tx.init(params), stacked)
  return state, np.asarray(ratio), np.asarray(cosine), np.asarray(ratios)


def varying(count=60, sizes=(1.0,), spread=1.0):
  """Gradients of one direction, whose size varies as a lognormal; one leaf for each of `sizes`."""
  rng = np.random.default_rng(0)
  base = {f"{i}": rng.standard_normal(5) * size for i, size in enumerate(sizes)}
  return [jax.tree.map(lambda x, s=s: jnp.float32(x * s), base) for s in np.exp(spread * rng.standard_normal(count))]


def test_under_sgd_the_ratio_is_the_factor_of_the_clip():
  grads = varying()
  norms = [oracle_norm(g) for g in grads]
  _, ratio, cosine, ratios = effects(clipjax.clip_by_global_norm(1.0), optax.sgd(0.1), grads)
  np.testing.assert_allclose(ratio, np.minimum(1, 1 / np.array(norms)), rtol=1e-6)
  np.testing.assert_allclose(ratios[:, 0], ratio, rtol=1e-6)
  state, ratio, _, _ = effects(clipjax.clip_by_global_norm(1.0), optax.lion(0.1), grads)
  np.testing.assert_allclose(state.grad_ratio, min(1, 1 / norms[-1]), rtol=1e-6)
  np.testing.assert_allclose(cosine, 1, atol=1e-6)


def test_a_clip_that_never_acts_changes_nothing():
  _, ratio, cosine, ratios = effects(clipjax.clip_by_global_norm(1e9), optax.adam(0.1), varying())
  np.testing.assert_allclose(ratio, 1, rtol=1e-6)
  np.testing.assert_allclose(cosine, 1, rtol=1e-6)
  np.testing.assert_allclose(ratios, 1, rtol=1e-6)


def test_a_clip_lengthens_the_step_of_adam_where_norms_vary():
  grads = varying(200)
  median = float(np.median([oracle_norm(g) for g in grads]))
  _, ratio, _, _ = effects(clipjax.clip_by_global_norm(median), optax.adam(0.1), grads)
  assert np.median(ratio[100:]) > 1.3


def test_under_lion_the_length_stays():
  _, ratio, _, _ = effects(clipjax.clip_by_global_norm(0.1), optax.lion(0.1), varying())
  np.testing.assert_allclose(ratio, 1, rtol=1e-6)


def heavy(count=60):
  """Two leaves: one of even gradients, one that is 100 times as large at every third step."""
  rng = np.random.default_rng(1)
  draw = lambda size: jnp.float32(rng.standard_normal(8) * size)  # noqa: E731
  return [{"even": draw(1.0), "heavy": draw(100.0 if i % 3 == 0 else 1.0)} for i in range(count)]


def test_a_heavy_leaf_starves_the_other_under_a_global_clip_and_not_under_one_by_leaf():
  grads = heavy()
  state, _, _, ratios = effects(clipjax.clip_by_global_norm(3.0), optax.sgd(0.1), grads)
  assert ratios[::3, 0].max() < 0.1  # The even leaf, at the steps at which the other is large.
  assert state.labels.block_names == ("even", "heavy")
  _, _, _, by_leaf = effects(clipjax.clip_by_leaf_norm(9.0), optax.sgd(0.1), grads)
  np.testing.assert_array_equal(by_leaf[:, 0], 1)


def test_shares_name_the_leaf_that_holds_the_norm():
  state, *_ = effects(clipjax.clip_by_global_norm(3.0), optax.sgd(0.1), heavy(4))
  assert state.shares[1] > 0.99
  np.testing.assert_allclose(state.shares.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_every_magnitude(magnitude):
  grads = {"a": jnp.float32([3 * magnitude, 0]), "b": jnp.float32([0, 4 * magnitude])}
  clip = clipjax.clip_by_group_norm({"a": magnitude, "b": None}, lambda path, leaf: path)
  tx = clipjax.clip_effect(clip, optax.sgd(1.0))
  _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
  a, b = np.array([1, 4]), np.array([3, 4])
  np.testing.assert_allclose(state.ratio, np.linalg.norm(a) / np.linalg.norm(b), rtol=1e-6)
  np.testing.assert_allclose(state.cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b), rtol=1e-6)
  np.testing.assert_allclose(state.ratios, [1 / 3, 1], rtol=1e-6)
  np.testing.assert_allclose(state.shares, [9 / 25, 16 / 25], rtol=1e-5)


def test_a_small_angle_keeps_its_digits():
  angle = 1e-3
  turn = optax.stateless(lambda updates, params: jnp.float32([np.cos(angle), np.sin(angle)]))
  tx = clipjax.clip_effect(turn, optax.sgd(1.0))
  grads = jnp.float32([1.0, 0.0])
  _, state = tx.update(grads, tx.init(grads), grads)
  np.testing.assert_allclose(1 - state.cosine, angle**2 / 2, rtol=0.15)  # A float32 beside 1 has steps of 6e-8.


def test_opposite_steps():
  tx = clipjax.clip_effect(optax.scale(-0.5), optax.sgd(1.0))
  grads = {"w": jnp.float32([1.0, -2.0]), "b": jnp.float32([0.5])}
  _, state = tx.update(grads, tx.init(grads), grads)
  np.testing.assert_allclose([state.ratio, state.cosine, *state.cosines], [0.5, -1, -1, -1], rtol=1e-6)


# Zero and not finite --------------------------------------------------------------------------------------------------


def test_zero_gradients_and_steps():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.sgd(0.1))
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, state = tx.update(zeros, tx.init(PARAMS), PARAMS)
  assert_bits_equal(updates, jax.tree.map(lambda x: -x, zeros))
  assert (state.ratio, state.cosine, state.shares.sum()) == (1, 1, 0)
  # A clip to 0 leaves nothing, and has no direction.
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(0.0), optax.sgd(0.1))
  _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  assert (state.ratio, state.cosine) == (0, 1)
  # Only the clipped step moves.
  tx = clipjax.clip_effect(optax.stateless(lambda u, p: jax.tree.map(jnp.ones_like, u)), optax.sgd(0.1))
  _, state = tx.update(zeros, tx.init(PARAMS), PARAMS)
  assert state.ratio == np.finfo(np.float32).max and state.cosine == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_a_step_that_is_not_finite_leaves_the_second_state_alone(policy, bad):
  clip = clipjax.clip_by_global_norm(1.0, on_nonfinite=policy)
  chain, tx = optax.chain(clip, optax.adam(0.1)), clipjax.clip_effect(clip, optax.adam(0.1))
  _, before = tx.update(grads_at(0), tx.init(PARAMS), PARAMS)
  grads = grads_at(1)
  grads["head"] = grads["head"].at[0, 0].set(bad)
  updates, state = jax.jit(tx.update)(grads, before, PARAMS)
  want, inner = jax.jit(chain.update)(grads, before.inner_state, PARAMS)
  assert_bits_equal((updates, state.inner_state), (want, inner))
  assert_bits_equal(state.unclipped_state, before.unclipped_state)
  assert all(np.isnan(x).all() for x in (state.ratio, state.cosine, state.ratios, state.cosines, state.shares))
  assert (state.steps, state.nonfinite_steps, state.finite) == (2, 1, False)
  with pytest.raises(FloatingPointError, match=r"^step 2 of 'grad' was not finite.* first in leaf 'head'"):
    clipjax.raise_if_nonfinite(state)
  _, after = tx.update(grads_at(2), state, PARAMS)
  assert np.isfinite(after.ratio) == (policy == "zero") and after.finite


def test_a_clip_without_a_state_is_spoken_for():
  tx = clipjax.clip_effect(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  _, state = tx.update(jax.tree.map(lambda x: x * jnp.nan, PARAMS), tx.init(PARAMS), PARAMS)
  with pytest.raises(FloatingPointError) as error:
    clipjax.raise_if_nonfinite(state)
  assert str(error.value) == (
    "step 1 of 'effect' was not finite. 1 of 1 steps were not finite: lower the learning rate, or look at the batch."
  )
  _, state = tx.update(PARAMS, state, PARAMS)
  clipjax.raise_if_nonfinite(state)


# What is passed through -----------------------------------------------------------------------------------------------


def test_extra_arguments_reach_the_optimizer():
  def by_plateau():
    return optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))

  clip = clipjax.clip_by_global_norm(1.0)
  chain, tx = optax.chain(clip, by_plateau()), clipjax.clip_effect(clip, by_plateau())
  state, inner = tx.init(PARAMS), chain.init(PARAMS)
  for step in range(6):
    updates, state = tx.update(grads_at(step), state, PARAMS, value=1.0)
    want, inner = chain.update(grads_at(step), inner, PARAMS, value=1.0)
    assert_bits_equal(updates, want)
  assert inner[1][1].scale < 1
  assert_bits_equal(state.unclipped_state[1], inner[1][1])
  with pytest.raises(TypeError, match="value"):  # What the optimizer itself says.
    tx.update(grads_at(0), state, PARAMS)


def test_a_line_search_gets_its_function():
  def loss(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

  search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=8))
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(0.5), search)
  value, grads = jax.value_and_grad(loss)(PARAMS)
  updates, state = jax.jit(lambda g, s, v: tx.update(g, s, PARAMS, value=v, grad=g, value_fn=loss))(
    grads, tx.init(PARAMS), value
  )
  assert loss(optax.apply_updates(PARAMS, updates)) < value
  assert state.ratio < 1  # One step is 0.5 long, the other goes to the minimum.
  np.testing.assert_allclose(state.cosine, 1, rtol=1e-6)


def test_a_skip_inside_and_around_and_micro_batches():
  protected = clipjax.skip_steps(clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam(0.1)))
  _, before = protected.update(grads_at(0), protected.init(PARAMS), PARAMS)
  _, state = protected.update(jax.tree.map(lambda x: x * jnp.nan, PARAMS), before, PARAMS)
  assert_bits_equal(state.inner_state, before.inner_state)
  assert clipjax.metrics(state)["effect/steps"] == 1 and clipjax.metrics(state)["grad/steps"] == 1

  inside = clipjax.clip_effect(clipjax.skip_steps(clipjax.clip_by_global_norm(1.0), norm_rule=1.0), optax.sgd(0.1))
  _, state = inside.update(grads_at(3), inside.init(PARAMS), PARAMS)
  assert (state.ratio, clipjax.metrics(state)["skip/fraction"]) == (0, 1)

  multi = optax.MultiSteps(clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam(0.1)), 2)
  state = multi.init(PARAMS)
  for step in range(4):
    _, state = multi.update(grads_at(step), state, PARAMS)
  assert clipjax.metrics(state)["effect/steps"] == 2


def test_params_missing_is_what_the_optimizer_says():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adamw(0.1))
  with pytest.raises(ValueError, match="params"):
    tx.update(PARAMS, tx.init(PARAMS))


# Programs, metrics and records ----------------------------------------------------------------------------------------


def test_metrics_of_every_leaf():
  tx = clipjax.clip_effect(clipjax.clip_by_leaf_norm(0.5), optax.adam(0.1), name="e")
  _, state = tx.update(grads_at(0), tx.init(PARAMS), PARAMS)
  got = clipjax.metrics(state, per_leaf=True)
  assert [key for key in clipjax.metrics(state) if key.startswith("e/")] == [
    "e/ratio",
    "e/cosine",
    "e/grad_ratio",
    "e/nonfinite_steps",
    "e/steps",
  ]
  for quantity, vector in (("ratio", state.ratios), ("cosine", state.cosines), ("share", state.shares)):
    np.testing.assert_array_equal([got[f"e/{quantity}/{name}"] for name in NAMES], vector)
  assert got["grad/norm/head"] > 0  # The clip inside is there too, and the second optimizer is not.
  assert set(clipjax.metrics(state.inner_state, per_leaf=True)) == {key for key in got if not key.startswith("e/")}


def test_a_watch_behind_the_optimizer_is_found_once():
  behind = optax.chain(optax.adam(0.1), clipjax.watch(name="update"))
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), behind)
  names = {key.partition("/")[0] for key in clipjax.metrics(tx.init(PARAMS))}
  assert names == {"effect", "grad", "update"}


def test_one_structure_under_scan_vmap_and_donation():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam(0.1))
  state = tx.init(PARAMS)
  for update in (tx.update, jax.jit(tx.update, donate_argnums=1)):
    _, state = update(grads_at(0), state, PARAMS)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
  both = jax.tree.map(lambda *xs: jnp.stack(xs), grads_at(1), grads_at(2))
  first = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))
  _, mapped = jax.jit(jax.vmap(tx.update, in_axes=(0, 0, None)))(both, first, PARAMS)
  for i in (0, 1):
    _, alone = tx.update(grads_at(i + 1), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], mapped), alone, rtol=1e-5, atol=1e-6)


def test_a_state_that_holds_the_parameters_may_be_donated():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.contrib.schedule_free_sgd(0.1))
  state = tx.init(PARAMS)
  buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
  assert len(set(buffers)) == len(buffers)


def test_recorded_and_read_back(tmp_path):
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam(0.1))
  state = tx.init(PARAMS)
  want = []
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", every=1) as recorder:
    for step in range(5):
      _, state = tx.update(grads_at(step), state, PARAMS)
      recorder.push(step, state)
      want.append(jax.device_get((state.ratio, state.cosine, state.ratios, state.shares)))
  run = clipjax.runs.read_run(tmp_path / "run.jsonl")
  ratio, cosine, ratios, shares = map(np.stack, zip(*want, strict=True))
  np.testing.assert_allclose(run["effect/ratio"], ratio, rtol=1e-6)
  np.testing.assert_allclose(run["effect/cosine"], cosine, rtol=1e-6)
  assert run.leaves["effect"] == NAMES
  np.testing.assert_allclose(run.vectors["effect/ratio"][1], ratios, rtol=1e-6)
  np.testing.assert_allclose(run.vectors["effect/share"][1], shares, rtol=1e-5, atol=1e-7)
  assert run.optimizer == ("ScaleByAdamState",)


@pytest.mark.parametrize("way", [through_orbax, through_flax, through_equinox])
def test_a_checkpoint_goes_on_as_if_it_was_none(way, tmp_path):
  tx = clipjax.clip_effect(clipjax.zclip(warmup_steps=4), optax.adam(0.1))
  update, state = jax.jit(tx.update), tx.init(PARAMS)
  for step in range(6):
    if step == 3:
      saved = state
    updates, state = update(grads_at(step), state, PARAMS)
  restored = way(saved, tx.init(PARAMS), tmp_path)
  for step in range(3, 6):
    got, restored = update(grads_at(step), restored, PARAMS)
  assert_bits_equal(got, updates)
  assert_bits_equal(jax.tree.leaves(restored), jax.tree.leaves(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_in_an_optimizer_of_flax_nnx(tmp_path):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(0.1), optax.adam(0.01))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  x, y = jnp.ones((4, 3)), jnp.zeros((4, 2))

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model))

  with clipjax.runs.Recorder(tmp_path / "run.jsonl", every=1) as recorder:
    for i in range(3):
      step(model, optimizer)
      recorder.push(i, optimizer)
  clipjax.raise_if_nonfinite(optimizer)
  got = clipjax.metrics(optimizer, per_leaf=True)
  assert got["effect/ratio/kernel"] > 0 and got["effect/grad_ratio"] < 1
  run = clipjax.runs.read_run(tmp_path / "run.jsonl")
  np.testing.assert_allclose(run["effect/ratio/kernel"][-1], got["effect/ratio/kernel"], rtol=1e-6)


def test_a_state_that_has_become_a_dict_is_refused():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0, track=False), optax.sgd(0.1))
  lost = flax.serialization.to_state_dict(tx.init(PARAMS))
  with pytest.raises(TypeError, match="from_state_dict"):
    clipjax.metrics(lost)
