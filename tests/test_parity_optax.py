"""What Optax's own tests ask of its clips, and of wrappers around them, asked of both with the same numbers.

Where the two differ on purpose is in docs/hardening.md, which `test_deviations.py` runs.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_leaves

import clipjax
from clipjax.norms.sums import NormSpec, measure
from clipjax.transforms import agc

TREE = {"a": jnp.array([3.0, -4.0, 0.25]), "b": {"c": jnp.array([[1.0, -2.0], [0.0, 12.0]]), "d": jnp.array(-0.5)}}
PARAMS = jax.tree.map(lambda x: x / 3 + 1, TREE)
LIMITS = [0.0, 0.01, 1.0, 5.0, 13.0, 1e4]


def run(tx, updates=TREE, params=PARAMS, **extra):
  return optax.with_extra_args_support(tx).update(updates, tx.init(params), params, **extra)[0]


def assert_close(ours, theirs, rtol=2e-6):
  chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
  chex.assert_trees_all_close(ours, theirs, rtol=rtol, atol=1e-30)


def variants(tx):
  """`update` as it is, and jitted."""
  return tx.update, jax.jit(tx.update)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_clip(limit, dtype, standard_promotion):
  tree = jax.tree.map(lambda x: x.astype(dtype), TREE)
  bound = jnp.asarray(limit, dtype)  # Optax compares in the wider dtype, and rounds afterwards.
  ours, theirs = clipjax.clip_by_value(limit), optax.clip(bound)
  for update in variants(ours):
    assert_close(update(tree, ours.init(tree))[0], run(theirs, tree), 0)
  for clipped, given in zip(jax.tree.leaves(run(ours, tree)), jax.tree.leaves(tree), strict=True):
    assert np.all(np.abs(clipped) <= bound) and np.all(np.sign(clipped) * np.sign(given) >= 0)


@pytest.mark.parametrize("limit", [0.01, 1.0, 5.0, 1e4])
def test_clip_by_block_rms(limit):
  ours = clipjax.clip_by_block_rms(limit)
  for update in variants(ours):
    assert_close(update(TREE, ours.init(TREE))[0], run(optax.clip_by_block_rms(limit)))
  for leaf, given in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(TREE), strict=True):
    before, after = (float(np.sqrt(np.mean(np.square(x)))) for x in (given, leaf))
    np.testing.assert_allclose(after, min(before, limit), rtol=1e-6)
    assert (before > limit) or np.array_equal(leaf, given)


@pytest.mark.parametrize("limit", [0.01, 1.0, 5.0, 1e4, jnp.float32(2.0)])
def test_clip_by_global_norm(limit):
  ours, theirs = clipjax.clip_by_global_norm(limit), optax.clip_by_global_norm(limit)
  for update in variants(ours):
    assert_close(update(TREE, ours.init(TREE))[0], run(theirs))
  clipped = run(ours)
  np.testing.assert_allclose(optax.tree.norm(clipped), min(float(optax.tree.norm(TREE)), float(limit)), rtol=1e-6)
  # A second clip has nothing left to do.
  assert_close(run(clipjax.clip_by_global_norm(limit), clipped), clipped, 1e-6)


def test_an_update_under_the_limit_is_the_same_array():
  for factory in (
    clipjax.clip_by_global_norm,
    clipjax.clip_by_block_rms,
    clipjax.clip_by_value,
    clipjax.clip_by_leaf_norm,
  ):
    chex.assert_trees_all_equal(run(factory(1e4)), TREE)
  chex.assert_trees_all_equal(run(optax.clip_by_global_norm(1e4)), TREE)


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    (clipjax.clip_by_global_norm, optax.clip_by_global_norm),
    (clipjax.clip_by_block_rms, optax.clip_by_block_rms),
    (clipjax.clip_by_value, optax.clip),
  ],
  ids=["global", "rms", "value"],
)
def test_complex_and_none_leaves_and_structures(ours, theirs, standard_promotion):
  for tree in ((), {}, [], {"a": None, "b": jnp.array([3.0, 4.0])}, (jnp.array([3.0]), [jnp.array([[4.0]])])):
    assert_close(run(ours(1.0), tree, tree), run(theirs(1.0), tree, tree))
  if ours is not clipjax.clip_by_value:
    tree = [jnp.array([3 + 4j, 1j], jnp.complex64), jnp.array([2.0])]
    assert_close(run(ours(1.0), tree, tree), run(theirs(1.0), tree, tree))


# AGC ----------------------------------------------------------------------------------------------------------------

SHAPES = [(), (5,), (1, 5), (5, 1), (4, 3), (2, 4, 3), (2, 3, 4, 5)]  # Rank 5 is in test_agc.py.


@pytest.mark.parametrize("shape", SHAPES)
def test_unitwise_norm(shape):
  x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
  # A limit of 1 on parameters of norm 1 shows each unit's norm as what is left of it.
  axes = agc._unit_axes(x, None, None, "x")
  ours = jnp.broadcast_to(measure(NormSpec(2.0, ((0,),), ((),), (axes,)), [x]).norms[0], x.shape)
  np.testing.assert_allclose(ours, optax.transforms.unitwise_norm(x), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, (0, 1), (0, 2), -1])
def test_unitwise_norm_over_given_axes(axis):
  x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4)), jnp.float32)
  ours, theirs = clipjax.adaptive_grad_clip(0.1, axis=axis), optax.adaptive_grad_clip(0.1, axis=axis)
  assert_close(run(ours, x, x / 2 + 1), run(theirs, x, x / 2 + 1))


@pytest.mark.parametrize("clipping", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("eps", [1e-3, 2.0])
def test_adaptive_grad_clip(clipping, eps):
  rng = np.random.default_rng(2)
  tree, params = ([jnp.asarray(rng.standard_normal(s), jnp.float32) for s in SHAPES] for _ in range(2))
  params[1] = jnp.zeros(5)  # Held up by `eps` alone.
  ours, theirs = clipjax.adaptive_grad_clip(clipping, eps), optax.adaptive_grad_clip(clipping, eps)
  want = run(theirs, tree, params)
  for update in variants(ours):
    assert_close(update(tree, ours.init(params), params)[0], want)
  # Clipping what is clipped changes nothing, and the norm of each unit is at most its share.
  assert_close(run(ours, want, params), want)
  for x, w in zip(run(ours, tree, params), params, strict=True):
    bound = clipping * jnp.maximum(optax.transforms.unitwise_norm(w), eps)
    assert np.all(optax.transforms.unitwise_norm(x) <= bound * (1 + 1e-6))


def test_agc_needs_params():
  for tx in (clipjax.adaptive_grad_clip(), optax.adaptive_grad_clip(0.01)):
    with pytest.raises(ValueError, match="param"):
      tx.update(TREE, tx.init(PARAMS), None)


def test_agc_of_a_rank_without_a_rule():
  x = jnp.ones((1, 2, 1, 2, 1, 2))
  for tx in (clipjax.adaptive_grad_clip(), optax.adaptive_grad_clip(0.01)):
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 2, 1, 2\)"):
      run(tx, x, x)
  ours, theirs = (tx(0.01, axis=(1, 3)) for tx in (clipjax.adaptive_grad_clip, optax.adaptive_grad_clip))
  assert_close(run(ours, x, x), run(theirs, x, x))


# Examples -----------------------------------------------------------------------------------------------------------


def examples(*shapes, batch=6, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("shapes", [[(3,)], [(), (2, 3)], [(3,), (1,), (2, 2)]])
def test_per_example_global_norm_clip(limit, shapes):
  grads = examples(*shapes)
  theirs, count = optax.per_example_global_norm_clip(grads, limit)
  for clip in (clipjax.clip_grad_per_example, jax.jit(clipjax.clip_grad_per_example)):
    ours, norms = clip(grads, limit)
    assert_close(ours, theirs, 1e-5)
    np.testing.assert_allclose(norms, jax.vmap(optax.tree.norm)(grads), rtol=1e-6)
    assert int(np.sum(norms > limit)) == count


def test_an_example_of_zeros_counts_as_it_is():
  grads = [jnp.array([[0.0, 0.0], [3.0, 4.0]])]
  for limit in (0.0, 1.0, math.inf):
    ours, norms = clipjax.clip_grad_per_example(grads, limit)
    theirs, count = optax.per_example_global_norm_clip(grads, limit)
    assert_close(ours, theirs)
    assert norms[0] == 0 and int(np.sum(norms > limit)) == count


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0, math.inf])
def test_per_example_layer_norm_clip_is_a_clip_of_each_leaf(uniform, limit):
  grads = examples((3,), (2, 2), ())
  theirs, counts = optax.per_example_layer_norm_clip(grads, limit, uniform=uniform)
  sizes = [x[0].size for x in grads]
  for x, want, count, size in zip(grads, theirs, counts, sizes, strict=True):
    share = 1 / len(grads) if uniform else size / sum(sizes)
    ours, norms = clipjax.clip_grad_per_example(x, limit * math.sqrt(share))
    assert_close(ours, want, 1e-5)
    assert int(np.sum(norms > limit * math.sqrt(share))) == count


@pytest.mark.parametrize("bad", [[jnp.ones(3), jnp.ones((2, 3))], [jnp.ones(3), jnp.float32(1.0)]])
def test_examples_without_a_batch_axis(bad):
  for clip in (optax.per_example_global_norm_clip, clipjax.clip_grad_per_example):
    with pytest.raises(ValueError, match="batch"):
      clip(bad, 1.0)


def test_differentially_private_aggregation_without_noise():
  grads = examples((3,), (2, 2))
  theirs = optax.contrib.differentially_private_aggregate(0.5, 0.0, key=jax.random.key(0))
  want, _ = theirs.update(grads, theirs.init([x[0] for x in grads]))
  ours, _ = clipjax.clip_grad_per_example(grads, 0.5)
  assert_close([x / 6 for x in ours], want, 1e-5)


# Wrappers -----------------------------------------------------------------------------------------------------------

PAIRS = {
  "global": (clipjax.clip_by_global_norm, optax.clip_by_global_norm),
  "value": (clipjax.clip_by_value, optax.clip),
  "rms": (clipjax.clip_by_block_rms, optax.clip_by_block_rms),
}
WRAPPERS = {
  "chain": lambda clip: optax.chain(clip, optax.trace(0.9), optax.scale(-0.1)),
  "named_chain": lambda clip: optax.named_chain(("clip", clip), ("sgd", optax.sgd(0.1))),
  "masked": lambda clip: optax.masked(clip, {"a": True, "b": {"c": True, "d": False}}),
  "masked by function": lambda clip: optax.masked(clip, lambda tree: jax.tree.map(lambda x: x.ndim > 0, tree)),
  "partition": lambda clip: optax.partition(
    {"clip": clip, "plain": optax.sgd(0.1)}, {"a": "clip", "b": {"c": "plain", "d": "clip"}}
  ),
  "MultiSteps": lambda clip: optax.MultiSteps(optax.chain(clip, optax.sgd(0.1)), 2),
  "MultiSteps that skips": lambda clip: optax.MultiSteps(
    optax.chain(clip, optax.sgd(0.1)), 1, should_skip_update_fn=optax.skip_not_finite
  ),
  "apply_if_finite": lambda clip: optax.apply_if_finite(optax.chain(clip, optax.sgd(0.1)), 3),
  "maybe_transform": lambda clip: optax.transforms.conditionally_transform(clip, lambda step: step % 2 == 0),
  "flatten": optax.flatten,
  "lookahead of updates": lambda clip: optax.chain(optax.add_decayed_weights(0.01), clip, optax.scale(-0.1)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("clip", ["global", *(pytest.param(name, marks=pytest.mark.slow) for name in ("value", "rms"))])
def test_inside_a_wrapper_the_two_give_the_same_steps(clip, wrapper, standard_promotion):
  ours, theirs = (WRAPPERS[wrapper](factory(0.7)) for factory in PAIRS[clip])
  ours, theirs = (optax.with_extra_args_support(t) if hasattr(t, "_fields") else t for t in (ours, theirs))
  mine, yours = ours.init(PARAMS), theirs.init(PARAMS)
  step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
  rng = np.random.default_rng(5)
  for i in range(5):
    scale = jnp.float32(10.0 ** rng.uniform(-2, 2))
    grads = jax.tree.map(lambda x: x * scale, TREE)  # noqa: B023  (used at once)
    if i == 2 and ("finite" in wrapper or "skips" in wrapper):
      grads = jax.tree.map(lambda x: x.at[...].set(jnp.nan), grads)
    got, mine = step(grads, mine, PARAMS)
    want, yours = their_step(grads, yours, PARAMS)
    assert_close(got, want, 5e-6)


def test_hyperparameters_that_are_injected_give_the_same_steps(standard_promotion):
  schedule = optax.exponential_decay(2.0, 1, 0.5)
  for ours, theirs in PAIRS.values():
    argument = {clipjax.clip_by_value: ("max_value", "max_delta"), clipjax.clip_by_block_rms: ("max_rms", "threshold")}
    names = argument.get(ours, ("max_norm", "max_norm"))
    pair = [optax.inject_hyperparams(f)(**{n: schedule}) for f, n in zip((ours, theirs), names, strict=True)]
    states = [tx.init(PARAMS) for tx in pair]
    for _ in range(4):
      outs = [tx.update(TREE, state, PARAMS) for tx, state in zip(pair, states, strict=True)]
      states = [state for _, state in outs]
      assert_close(outs[0][0], outs[1][0])
    with_number = [optax.inject_hyperparams(f)(**{n: 0.5}) for f, n in zip((ours, theirs), names, strict=True)]
    assert_close(*(run(tx) for tx in with_number))


def test_under_scan_and_vmap_the_two_give_the_same_steps():
  grads = random_leaves(3, magnitude=2.0)
  batch = [jnp.stack([x, 0.01 * x, -x]) for x in grads]
  for ours, theirs in PAIRS.values():
    a, b = ours(0.7), theirs(0.7)
    got = jax.vmap(lambda g, a=a: a.update(g, a.init(g))[0])(batch)
    want = jax.vmap(lambda g, b=b: b.update(g, b.init(g))[0])(batch)
    assert_close(got, want)
    scanned = jax.lax.scan(lambda state, g, a=a: a.update(g, state)[::-1], a.init(grads), batch)[1]
    assert_close(scanned, want)


def test_training_with_each_clip_ends_at_the_same_parameters():
  def loss(p):
    return jnp.sum(jnp.square(p["a"] - 2.0)) + jnp.sum(jnp.square(p["b"]["c"] * 5.0)) + p["b"]["d"] ** 4

  for ours, theirs in PAIRS.values():
    ends = []
    for clip in (ours(0.5), theirs(0.5)):
      tx = optax.chain(clip, optax.sgd(0.05, momentum=0.9))
      params, state = PARAMS, tx.init(PARAMS)
      step = jax.jit(lambda p, s, tx=tx: tx.update(jax.grad(loss)(p), s, p))
      for _ in range(60):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
      ends.append(params)
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-5)
