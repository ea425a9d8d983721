"""clip_grad_per_example against the oracle, Optax's, and the worked steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, message_of, oracle_clip, oracle_norm, worked_cases

import clipjax


def batch(dtype="float32", scale=1.0, size=6):
  rng = np.random.default_rng(0)
  shapes = ((size, 4, 3), (size, 5), (size,))
  return {str(i): jnp.asarray(rng.standard_normal(s) * scale, dtype) for i, s in enumerate(shapes)}


SMALL = 1e-32  # Against 1e30 the factor is 1e-62.


@pytest.mark.parametrize(("dtype", "scale", "max_norm"), [
  ("float32", 1e-3, 4e-3), ("float32", 1.0, 1.2), ("float32", 30.0, 360.0), ("bfloat16", 1.0, 1.2),
  ("bfloat16", 30.0, 120.0), ("float16", 1e-3, 1.2e-3), ("float16", 30.0, 120.0), ("float32", 1e-30, SMALL),
  ("float32", 1e30, SMALL),
])  # fmt: skip
def test_oracle(dtype, scale, max_norm):
  grads = batch(dtype, scale)
  total, norms = clipjax.clip_grad_per_example(grads, max_norm)
  examples = [jax.tree.map(lambda x, b=b: x[b], grads) for b in range(6)]
  np.testing.assert_allclose(norms, [oracle_norm(e) for e in examples], rtol=1e-6)
  want = jax.tree.map(lambda *xs: np.sum(xs, axis=0), *[oracle_clip(e, max_norm) for e in examples])
  assert all(x.dtype == jnp.float32 for x in total.values())
  assert_close(total, want, 1e-5 if max_norm != SMALL else 1e-4, 1e-6 * min(scale, max_norm) + 1e-37)


@pytest.mark.parametrize("huge", range(3))
def test_one_huge_example_among_others(huge):
  grads = jnp.array([[0.3, 0.4], [0.0, -0.5], [6.0, 8.0]]).at[huge].set(jnp.array([3e30, 4e30]))
  total, norms = clipjax.clip_grad_per_example({"w": grads}, 1e-3)
  examples = np.asarray(grads, np.float64)
  np.testing.assert_allclose(norms, np.linalg.norm(examples, axis=1), rtol=1e-6)
  want = 1e-3 * (examples / np.linalg.norm(examples, axis=1, keepdims=True)).sum(axis=0)
  np.testing.assert_allclose(total["w"], want, rtol=1e-5)


@pytest.mark.parametrize("example", [0, 2, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_example_that_is_not_finite_contributes_zero(bad, example):
  grads = batch()
  total, norms = clipjax.clip_grad_per_example({**grads, "1": grads["1"].at[example, 3].set(bad)}, 1.0)
  assert not np.isfinite(norms[example])
  want, _ = clipjax.clip_grad_per_example(jax.tree.map(lambda x: jnp.delete(x, example, axis=0), grads), 1.0)
  assert_close(total, want, 1e-6, 1e-7)


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_derivatives_pass_over_a_broken_example(bad):
  grads = {key: x.at[2].set(bad) for key, x in batch(size=4).items() if key != "0"}
  keep = np.arange(4) != 2
  without = {key: x[keep] for key, x in grads.items()}

  def total(grads, max_norm):
    return sum(x.sum() for x in clipjax.clip_grad_per_example(grads, max_norm)[0].values())

  def derivatives(tree):
    forward = jax.jvp(total, (tree, 1.0), (jax.tree.map(jnp.ones_like, tree), 0.5))[1]
    return (*jax.grad(total, argnums=(0, 1))(tree, 1.0), forward)

  (got, *others), (want, *wanted) = jax.jit(derivatives)(grads), jax.jit(derivatives)(without)
  assert_close(others, wanted, 1e-5)
  assert_close({key: x[keep] for key, x in got.items()}, want, 1e-5, 1e-6)
  assert not any(x[2].any() for x in got.values())


def test_worked_steps():
  case = worked_cases()["dp_per_example_and_quantile"]
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
  def message(**grads):
    return message_of(lambda: clipjax.clip_grad_per_example(grads, 1.0))

  assert message(a=jnp.ones((2, 3)), b=jnp.ones(())) == (
    "`grads` must have a leading batch axis in every leaf, got float32[] at 'b': compute them with "
    "jax.vmap(jax.grad(loss), (None, 0))."
  )
  assert message(a=jnp.ones((2, 3)), b=jnp.ones((3, 4))) == (
    "`grads` must have the same batch size in every leaf, got 2 at 'a' and 3 at 'b': the batch is the leading axis."
  )
  assert message_of(lambda: clipjax.clip_grad_per_example(jnp.ones((2, 3)), -1.0)).startswith("`max_norm` must be >= 0")


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
