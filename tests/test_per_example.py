"""clip_grad_per_example against the oracle, Optax's, and the worked steps."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases, oracle_clip, oracle_norm

import clipjax


def batch(dtype="float32", scale=1.0, size=6):
  rng = np.random.default_rng(0)
  shapes = ((size, 4, 3), (size, 5), (size,))
  return {str(i): jnp.asarray(rng.standard_normal(s) * scale, dtype) for i, s in enumerate(shapes)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_oracle(dtype, share, scale):
  grads = batch(dtype, scale)
  max_norm = share * scale * 4.0
  total, norms = clipjax.clip_grad_per_example(grads, max_norm)
  examples = [jax.tree.map(lambda x, b=b: x[b], grads) for b in range(6)]
  np.testing.assert_allclose(norms, [oracle_norm(e) for e in examples], rtol=1e-6)
  want = jax.tree.map(lambda *xs: np.sum(xs, axis=0), *[oracle_clip(e, max_norm) for e in examples])
  for key, x in total.items():
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, want[key], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("huge", range(3))
def test_one_huge_example_among_others(huge):
  grads = jnp.array([[0.3, 0.4], [0.0, -0.5], [6.0, 8.0]]).at[huge].set(jnp.array([3e30, 4e30]))
  total, norms = clipjax.clip_grad_per_example({"w": grads}, 1e-3)
  examples = np.asarray(grads, np.float64)
  np.testing.assert_allclose(norms, np.linalg.norm(examples, axis=1), rtol=1e-6)
  want = 1e-3 * (examples / np.linalg.norm(examples, axis=1, keepdims=True)).sum(axis=0)
  np.testing.assert_allclose(total["w"], want, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_every_magnitude(scale):
  grads = batch(scale=scale)
  total, norms = clipjax.clip_grad_per_example(grads, 1e-32)
  examples = [jax.tree.map(lambda x, b=b: x[b], grads) for b in range(6)]
  np.testing.assert_allclose(norms, [oracle_norm(e) for e in examples], rtol=1e-6)
  want = sum(oracle_clip(e, 1e-32)["0"] for e in examples)
  np.testing.assert_allclose(total["0"], want, rtol=1e-4, atol=1e-37)


def test_four_thousand_examples_in_float16():
  total, norms = clipjax.clip_grad_per_example(jnp.full((4096, 1), 30.0, jnp.float16), 100.0)
  assert total[0] == 4096 * 30
  assert (norms == 30).all()


@pytest.mark.parametrize("example", [0, 2, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_example_that_is_not_finite_contributes_zero(bad, example):
  grads = batch()
  broken = {**grads, "1": grads["1"].at[example, 3].set(bad)}
  total, norms = clipjax.clip_grad_per_example(broken, 1.0)
  assert not np.isfinite(norms[example])
  without = jax.tree.map(lambda x: jnp.delete(x, example, axis=0), grads)
  want, _ = clipjax.clip_grad_per_example(without, 1.0)
  for key in total:
    np.testing.assert_allclose(total[key], want[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", cases([math.nan, math.inf], {math.inf}))
def test_derivatives_pass_over_a_broken_example(bad):
  grads = {key: x.at[2].set(bad) for key, x in batch().items()}
  keep = jnp.arange(len(grads["0"])) != 2

  def total(grads, max_norm):
    return sum(x.sum() for x in clipjax.clip_grad_per_example(grads, max_norm)[0].values())

  without = {key: x[keep] for key, x in grads.items()}
  got, of_limit = jax.grad(total, argnums=(0, 1))(grads, 1.0)
  want, of_limit_without = jax.grad(total, argnums=(0, 1))(without, 1.0)
  np.testing.assert_allclose(of_limit, of_limit_without, rtol=1e-5)
  for key, x in want.items():
    np.testing.assert_allclose(got[key][keep], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[key][2], np.zeros_like(got[key][2]))
  forward = [jax.jvp(total, (tree, 1.0), (jax.tree.map(jnp.ones_like, tree), 0.5))[1] for tree in (grads, without)]
  np.testing.assert_allclose(*forward, rtol=1e-5)


def test_numbers_of_optax():
  leaves = list(batch().values())
  for max_norm in (0.5, 4.0, 100.0):
    total, norms = clipjax.clip_grad_per_example(leaves, max_norm)
    want, clipped = optax.per_example_global_norm_clip(leaves, max_norm)
    for a, b in zip(total, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert (norms > max_norm).sum() == clipped


def test_worked_steps():
  cases = json.loads((pathlib.Path(__file__).parent / "data" / "vectors.json").read_text())["cases"]
  case = next(case for case in cases if case["name"] == "dp_per_example_and_quantile")
  with jax.enable_x64(True):
    limit = case["hyperparams"]["init_clip"]
    for step in case["steps"]:
      np.testing.assert_allclose(limit, step["clip_norm"], rtol=1e-12)
      grads = {key: jnp.array(x) for key, x in step["per_example_grads"].items()}
      total, norms = clipjax.clip_grad_per_example(grads, limit)
      np.testing.assert_allclose(norms, step["norms"], rtol=1e-12)
      for key, want in step["clipped_sum"].items():
        np.testing.assert_allclose(total[key], want, rtol=1e-12)
      # The threshold that follows a quantile: the rule of one norm, with the share of a batch for the indicator.
      under = float((norms <= limit).mean())
      limit = limit * math.exp(-case["hyperparams"]["quantile_lr"] * (under - case["hyperparams"]["target_quantile"]))
      np.testing.assert_allclose(limit, step["clip_norm_next"], rtol=1e-12)


def test_empty_batch_empty_tree_thresholds_and_jit():
  total, norms = clipjax.clip_grad_per_example({"a": jnp.zeros((0, 3)), "n": None}, 1.0)
  assert norms.shape == (0,)
  assert total["a"].shape == (3,) and not total["a"].any()
  total, norms = clipjax.clip_grad_per_example({}, 1.0)
  assert total == {} and norms.shape == (0,)
  grads = batch()
  assert not jax.jit(clipjax.clip_grad_per_example)(grads, jnp.nan)[0]["0"].any()
  assert not clipjax.clip_grad_per_example(grads, 0.0)[0]["0"].any()
  assert not jax.jit(clipjax.clip_grad_per_example)(grads, -1.0)[0]["0"].any()
  np.testing.assert_allclose(clipjax.clip_grad_per_example(grads, math.inf)[0]["2"], grads["2"].sum(), rtol=1e-5)


def test_messages():
  def message(grads, max_norm=1.0):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole text is compared)
      clipjax.clip_grad_per_example(grads, max_norm)
    return str(error.value)

  assert message({"a": jnp.ones((2, 3)), "b": jnp.ones(())}) == (
    "`grads` must have a leading batch axis in every leaf, got float32[] at 'b': compute them with "
    "jax.vmap(jax.grad(loss), (None, 0))."
  )
  assert message({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4))}) == (
    "`grads` must have the same batch size in every leaf, got 2 at 'a' and 3 at 'b': the batch is the leading axis."
  )
  assert message(jnp.ones((2, 3)), -1.0).startswith("`max_norm` must be >= 0, got -1.0")


def test_a_leaf_of_no_cotangents_loses_its_batch_axis_too():
  grads = {"w": jnp.ones((4, 3)), "i": np.zeros((4, 2), jax.dtypes.float0), "none": None}
  total, _ = clipjax.clip_grad_per_example(grads, 1.0)
  assert total["i"].shape == (2,) and total["i"].dtype == jax.dtypes.float0 and total["none"] is None

  def loss(params, x):
    return jnp.sum(params["w"] * x) * params["i"].shape[0]

  params = {"w": jnp.ones(3), "i": jnp.arange(2)}
  grads = jax.vmap(jax.grad(loss, allow_int=True), (None, 0))(params, jnp.ones((4, 3)))
  total, _ = clipjax.clip_grad_per_example(grads, 1.0)
  assert jax.tree.map(np.shape, total) == jax.tree.map(np.shape, params)
