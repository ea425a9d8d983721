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
from helpers import assert_bits_equal, cases, first_step, message_of, oracle_norm, steps_of

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax needs it.

PARAMS = {"dense": {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}, "head": jnp.full((4, 3), 0.5)}
NAMES = ("dense/b", "dense/w", "head")  # In the order of the tree.
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 20)
OPTIMIZERS = {
  "sgd": optax.sgd(0.1),
  "adam": optax.adam(0.01),
  "adamw": optax.adamw(SCHEDULE, weight_decay=0.1),
  "lion": optax.lion(0.01),
  "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=2),
  "muon": optax.contrib.muon(0.01),
  "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
  "multi_transform": optax.multi_transform(
    {"a": optax.adam(0.01), "b": optax.sgd(0.1, momentum=0.9)}, {"dense": "a", "head": "b"}
  ),
}
CLIPS = {
  "global": clipjax.clip_by_global_norm(0.7),
  "leaf": clipjax.clip_by_leaf_norm(0.5),
  "value": clipjax.clip_by_value(0.2),
  "optax": optax.clip_by_global_norm(0.7),
  "agc": clipjax.adaptive_grad_clip(0.05),
}
EVERY = [
  *(("global", name, jax.jit) for name in OPTIMIZERS),
  *((name, "adam", jax.jit) for name in CLIPS if name != "global"),
  *(("global", name, lambda update: update) for name in ("adamw", "muon", "multi_transform")),  # Eagerly.
]
# Each has parts that these optimizers have too, and a clip that they follow.
IN_SHORT = ("sgd", "adam", "adafactor", "muon", "inject_hyperparams", "multi_transform")
ONE_WAY = {("muon", False), ("multi_transform", True)}  # Left out, as the other way stays: eagerly, in `jit`.


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


@pytest.mark.parametrize(
  ("clip", "optimizer", "compiled"),
  cases(EVERY, lambda case: case[1] not in IN_SHORT or (case[1], case[2] is jax.jit) in ONE_WAY),
)
def test_equals_two_optimizers_run_by_hand(clip, optimizer, compiled):
  clip, optimizer = CLIPS[clip], OPTIMIZERS[optimizer]
  chain, tx = optax.chain(clip, optimizer), clipjax.clip_effect(clip, optimizer)
  params, state = PARAMS, tx.init(PARAMS)
  inner, second = chain.init(PARAMS), optimizer.init(PARAMS)
  update, by_chain, by_second = map(compiled, (tx.update, chain.update, optimizer.update))
  for step in range(5):
    grads = grads_at(step)
    updates, state = update(grads, state, params)
    want, inner = by_chain(grads, inner, params)
    plain, second = by_second(grads, second, params)
    assert_bits_equal((updates, state.inner_state), (want, inner))
    np.testing.assert_allclose((state.ratio, state.cosine), compared(want, plain), rtol=1e-5, atol=1e-6)
    pairs = zip(jax.tree.leaves(want), jax.tree.leaves(plain), strict=True)
    of_leaves = np.array([compared(a, b) for a, b in pairs])
    np.testing.assert_allclose(np.stack([state.ratios, state.cosines], 1), of_leaves, rtol=1e-4, atol=1e-6)
    squares = [oracle_norm(g) ** 2 for g in jax.tree.leaves(grads)]
    np.testing.assert_allclose(state.shares, squares / np.sum(squares), rtol=1e-5)
    params = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(jax.tree.leaves(state.unclipped_state), jax.tree.leaves(second), rtol=1e-5)
  assert state.labels.block_names == NAMES


# What each optimizer makes of a clip ----------------------------------------------------------------------------------


def effects(clip, optimizer, grads):
  """The last state, ratios, cosines and ratios of leaves (steps, leaves) of some steps, at parameters that stay."""
  states = [state for _, state in steps_of(clipjax.clip_effect(clip, optimizer), grads, grads[0])]
  return states[-1], *(np.array([getattr(state, name) for state in states]) for name in ("ratio", "cosine", "ratios"))


def varying(count=60):
  """Gradients of one direction, whose size varies as a lognormal."""
  rng = np.random.default_rng(0)
  base = rng.standard_normal(5)
  return [{"w": jnp.float32(base * s)} for s in np.exp(rng.standard_normal(count))]


def test_under_sgd_the_ratio_is_the_factor_of_the_clip():
  grads = varying()
  norms = [oracle_norm(g) for g in grads]
  _, ratio, cosine, ratios = effects(clipjax.clip_by_global_norm(1.0), optax.sgd(0.1), grads)
  np.testing.assert_allclose(ratio, np.minimum(1, 1 / np.array(norms)), rtol=1e-6)
  np.testing.assert_allclose(ratios[:, 0], ratio, rtol=1e-6)
  state, ratio, _, _ = effects(clipjax.clip_by_global_norm(1.0), optax.lion(0.1), grads)
  np.testing.assert_allclose(state.grad_ratio, min(1, 1 / norms[-1]), rtol=1e-6)
  np.testing.assert_allclose(cosine, 1, atol=1e-6)


@pytest.mark.parametrize(
  "clip",
  [
    clipjax.clip_by_value(1.0), clipjax.clip_by_leaf_norm(1.0), clipjax.clip_by_global_norm(1.0, 1), optax.clip(1.0),
  ],
)  # fmt: skip
def test_the_ratio_of_gradients_is_one_of_norms_whatever_clips(clip):
  grads = {"a": jnp.array([0.5, -3.0]), "b": jnp.array([2.0])}
  state, *_ = effects(clip, optax.sgd(0.1), [grads])
  clipped, _ = clip.update(grads, clip.init(grads))
  np.testing.assert_allclose(state.grad_ratio, oracle_norm(clipped) / oracle_norm(grads), rtol=1e-6)


@pytest.mark.parametrize(("limit", "optimizer"), [(1e9, "adam"), (0.1, "lion")])
def test_a_clip_that_never_acts_or_under_lion_changes_no_length(limit, optimizer):
  _, *numbers = effects(clipjax.clip_by_global_norm(limit), OPTIMIZERS[optimizer], varying())
  for x in numbers:
    np.testing.assert_allclose(x, 1, rtol=1e-6)


def test_a_clip_lengthens_the_step_of_adam_where_norms_vary():
  grads = varying(200)
  median = float(np.median([oracle_norm(g) for g in grads]))
  _, ratio, _, _ = effects(clipjax.clip_by_global_norm(median), optax.adam(0.1), grads)
  assert np.median(ratio[100:]) > 1.3


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_every_magnitude(magnitude):
  grads = {"a": jnp.float32([3 * magnitude, 0]), "b": jnp.float32([0, 4 * magnitude])}
  clip = clipjax.clip_by_group_norm({"a": magnitude, "b": None}, lambda path, leaf: path)
  _, state = first_step(clipjax.clip_effect(clip, optax.sgd(1.0)), grads, grads)
  a, b = np.array([1, 4]), np.array([3, 4])
  np.testing.assert_allclose((state.ratio, state.cosine), compared(a, b), rtol=1e-6)
  np.testing.assert_allclose(state.ratios, [1 / 3, 1], rtol=1e-6)
  np.testing.assert_allclose(state.shares, [9 / 25, 16 / 25], rtol=1e-5)


def test_a_small_angle_keeps_its_digits():
  angle = 1e-3
  turn = optax.stateless(lambda updates, params: jnp.float32([np.cos(angle), np.sin(angle)]))
  _, state = first_step(clipjax.clip_effect(turn, optax.sgd(1.0)), jnp.float32([1.0, 0.0]))
  np.testing.assert_allclose(1 - state.cosine, angle**2 / 2, rtol=0.15)  # A float32 beside 1 has steps of 6e-8.


def test_opposite_steps():
  grads = {"w": jnp.float32([1.0, -2.0]), "b": jnp.float32([0.5])}
  _, state = first_step(clipjax.clip_effect(optax.scale(-0.5), optax.sgd(1.0)), grads)
  np.testing.assert_allclose([state.ratio, state.cosine, *state.cosines], [0.5, -1, -1, -1], rtol=1e-6)


# Zero and not finite --------------------------------------------------------------------------------------------------


def test_zero_gradients_and_steps():
  def step(clip, grads):
    return first_step(clipjax.clip_effect(clip, optax.sgd(0.1)), grads, PARAMS)

  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, state = step(clipjax.clip_by_global_norm(1.0), zeros)
  assert_bits_equal(updates, jax.tree.map(lambda x: -x, zeros))
  assert (state.ratio, state.cosine, state.shares.sum()) == (1, 1, 0)
  _, state = step(clipjax.clip_by_global_norm(0.0), PARAMS)  # It leaves nothing, and has no direction.
  assert (state.ratio, state.cosine) == (0, 1)
  _, state = step(optax.stateless(lambda u, p: jax.tree.map(jnp.ones_like, u)), zeros)  # Only the clipped step moves.
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
  _, state = first_step(tx, jax.tree.map(lambda x: x * jnp.nan, PARAMS), PARAMS)
  assert message_of(lambda: clipjax.raise_if_nonfinite(state), FloatingPointError) == (
    "step 1 of 'effect' was not finite. 1 of 1 steps were not finite: lower the learning rate, or look at the batch."
  )
  clipjax.raise_if_nonfinite(tx.update(PARAMS, state, PARAMS)[1])


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


def test_a_skip_inside_and_around():
  protected = clipjax.skip_steps(clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam(0.1)))
  _, before = first_step(protected, grads_at(0), PARAMS)
  _, state = protected.update(jax.tree.map(lambda x: x * jnp.nan, PARAMS), before, PARAMS)
  assert_bits_equal(state.inner_state, before.inner_state)
  assert clipjax.metrics(state)["effect/steps"] == 1 and clipjax.metrics(state)["grad/steps"] == 1
  inside = clipjax.clip_effect(clipjax.skip_steps(clipjax.clip_by_global_norm(1.0), norm_rule=1.0), optax.sgd(0.1))
  _, state = first_step(inside, grads_at(3), PARAMS)
  assert (state.ratio, clipjax.metrics(state)["skip/fraction"]) == (0, 1)


# Programs, metrics and records ----------------------------------------------------------------------------------------


def test_metrics_of_every_leaf():
  _, state = first_step(
    clipjax.clip_effect(clipjax.clip_by_leaf_norm(0.5), optax.adam(0.1), name="e"), grads_at(0), PARAMS
  )
  got = clipjax.metrics(state, per_leaf=True)
  whole = [f"e/{key}" for key in ("ratio", "cosine", "grad_ratio", "nonfinite_steps", "steps")]
  assert [key for key in clipjax.metrics(state) if key.startswith("e/")] == whole
  for quantity, vector in (("ratio", state.ratios), ("cosine", state.cosines), ("share", state.shares)):
    np.testing.assert_array_equal([got[f"e/{quantity}/{name}"] for name in NAMES], vector)
  assert got["grad/norm/head"] > 0  # The clip inside is there too, and the second optimizer is not.
  assert set(clipjax.metrics(state.inner_state, per_leaf=True)) == {key for key in got if not key.startswith("e/")}


def test_a_watch_behind_the_optimizer_is_found_once():
  behind = optax.chain(optax.adam(0.1), clipjax.watch(name="update"))
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), behind)
  names = {key.partition("/")[0] for key in clipjax.metrics(tx.init(PARAMS))}
  assert names == {"effect", "grad", "update"}


def test_one_structure_under_vmap_and_donation():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam(0.1))
  state = tx.init(PARAMS)
  for update in (tx.update, jax.jit(tx.update, donate_argnums=1)):
    _, state = update(grads_at(0), state, PARAMS)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
  both = jax.tree.map(lambda *xs: jnp.stack(xs), grads_at(1), grads_at(2))
  first = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))
  _, mapped = jax.jit(jax.vmap(tx.update, in_axes=(0, 0, None)))(both, first, PARAMS)
  for i in (0, 1):
    _, alone = first_step(tx, grads_at(i + 1), PARAMS)
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], mapped), alone, rtol=1e-5, atol=1e-6)


def test_a_state_that_holds_the_parameters_may_be_donated():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.contrib.schedule_free_sgd(0.1))
  state = tx.init(PARAMS)
  buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
  assert len(set(buffers)) == len(buffers)


def test_recorded_and_read_back(tmp_path):
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam(0.1))
  states = [state for _, state in steps_of(tx, list(map(grads_at, range(3))), PARAMS)]
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", every=1) as recorder:
    for step, state in enumerate(states):
      recorder.push(step, state)
  run = clipjax.runs.read_run(tmp_path / "run.jsonl")
  read = [run["effect/ratio"], run["effect/cosine"], *(run.vectors[f"effect/{x}"][1] for x in ("ratio", "share"))]
  for got, name in zip(read, ("ratio", "cosine", "ratios", "shares"), strict=True):
    np.testing.assert_allclose(got, [getattr(state, name) for state in states], rtol=1e-5, atol=1e-7)
  assert run.leaves["effect"] == NAMES
  assert run.optimizer == ("ScaleByAdamState",)


@pytest.mark.parametrize("way", [through_orbax, through_flax, through_equinox])
def test_a_checkpoint_goes_on_as_if_it_was_none(way, tmp_path):
  tx = clipjax.clip_effect(clipjax.zclip(warmup_steps=4), optax.adam(0.1))
  grads, update = list(map(grads_at, range(6))), jax.jit(tx.update)
  steps = steps_of(tx, grads, PARAMS)
  restored = way(steps[2][1], tx.init(PARAMS), tmp_path)
  for grad in grads[3:]:
    updates, restored = update(grad, restored, PARAMS)
  assert_bits_equal((updates, restored), steps[-1])


def test_in_an_optimizer_of_flax_nnx():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(0.1), optax.adam(0.01))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(jnp.ones((4, 3))) ** 2))(model))

  for _ in range(2):
    step(model, optimizer)
  clipjax.raise_if_nonfinite(optimizer)
  got = clipjax.metrics(optimizer, per_leaf=True)
  assert got["effect/steps"] == 2 and got["effect/ratio/kernel"] > 0 and got["effect/grad_ratio"] < 1


def test_a_state_that_has_become_a_dict_is_refused():
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0, track=False), optax.sgd(0.1))
  lost = flax.serialization.to_state_dict(tx.init(PARAMS))
  with pytest.raises(TypeError, match="from_state_dict"):
    clipjax.metrics(lost)
