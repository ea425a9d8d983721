"""adaptive_grad_clip against Optax's, and where Optax's goes wrong."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, cases, first_step, message_of

import clipjax

SHAPES = [(), (5,), (1, 5), (4, 3), (3, 4, 2), (2, 3, 4, 5), (2, 2, 3, 4, 2)]


def pair(shapes, dtype="float32", scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  params = [jnp.asarray(rng.standard_normal(s) * scale, dtype) for s in shapes]
  grads = [jnp.asarray(rng.standard_normal(s) * 0.05 * scale, dtype) for s in shapes]
  return params, grads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clipping", cases([0.01, 0.05, 10.0], slow=[0.05]))
def test_numbers_of_optax_for_every_rank(shape, clipping):
  params, grads = pair([shape])
  # Above rank 4 Optax 0.2.6 wants to be told what later versions do.
  axis = {"axis": tuple(range(len(shape) - 1))} if len(shape) > 4 else {}
  got, state = first_step(clipjax.adaptive_grad_clip(clipping), grads, params)
  assert_close(got, first_step(optax.adaptive_grad_clip(clipping, **axis), grads, params)[0])
  norms = [np.linalg.norm(np.ravel(x[0])) for x in (grads, got)]
  np.testing.assert_allclose([state.norm, state.norm_clipped], norms, rtol=1e-6)
  assert state.clipped_steps == int((np.asarray(state.scale) < 1).any())


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (0, 2), [1]])
def test_axis_is_that_of_optax(axis):
  params, grads = pair([(3, 4, 2), (2, 3, 4)])
  theirs = optax.adaptive_grad_clip(0.02, axis=tuple(axis) if isinstance(axis, list) else axis)
  ours = clipjax.adaptive_grad_clip(0.02, axis=axis)
  assert_close(jax.jit(ours.update)(grads, ours.init(params), params)[0], first_step(theirs, grads, params)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_and_every_magnitude(dtype):
  # 4096 entries of 30 have squares of 900, whose sum is no float16.
  params, grads = jnp.full((4096, 2), 30.0, dtype), jnp.full((4096, 2), 3.0, dtype)
  updates, state = first_step(clipjax.adaptive_grad_clip(0.05), grads, params)
  assert updates.dtype == grads.dtype
  np.testing.assert_allclose(np.asarray(updates, np.float32), 1.5, rtol=0.01)
  np.testing.assert_allclose(state.max_norm, 0.05 * 30 * 64, rtol=1e-6)
  for scale in (1e-25, 1e25):
    wide = jnp.full((8, 2), scale)
    updates, _ = first_step(clipjax.adaptive_grad_clip(0.5, 0.0), wide, wide)
    np.testing.assert_allclose(updates, 0.5 * scale, rtol=1e-6)


def test_a_factor_that_is_subnormal():
  params, grads = jnp.zeros((2, 1)), jnp.array([[3e35], [4e35]])
  updates, state = first_step(clipjax.adaptive_grad_clip(0.01), grads, params)
  np.testing.assert_allclose(updates, [[6e-6], [8e-6]], rtol=1e-6)
  np.testing.assert_allclose(state.norm_clipped, 1e-5, rtol=1e-6)


def test_units_at_or_under_their_limit_are_bit_identical_and_zeros_stay():
  params = jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
  grads = jnp.array([[0.3, 0.0, 1.0], [0.4, 0.0, 1e-40]])
  tx = clipjax.adaptive_grad_clip(0.5)
  updates, state = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(updates[:, :2], grads[:, :2])
  np.testing.assert_allclose(updates[0, 2], 0.5, rtol=1e-6)
  assert state.scale[0] < 1
  jac = jax.jacrev(lambda g: tx.update(g, tx.init(params), params)[0])(jnp.zeros((2, 3)))
  np.testing.assert_array_equal(np.reshape(jac, (6, 6)), np.eye(6))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_that_is_not_finite(bad):
  params, grads = pair([(4, 3), (5,)])
  broken = [grads[0].at[1, 1].set(bad), grads[1]]
  for policy, filled in (("propagate", math.nan), ("zero", 0.0)):
    tx = clipjax.adaptive_grad_clip(on_nonfinite=policy)
    updates, state = jax.jit(tx.update)(broken, tx.init(params), params)
    assert_close(updates, [np.full(x.shape, filled) for x in grads])
    assert state.nonfinite_steps == 1 and state.nonfinite_leaf == 0
  tx = clipjax.adaptive_grad_clip(on_nonfinite="error")
  with pytest.raises(FloatingPointError, match="in '0'"):
    first_step(tx, broken, params)
  assert first_step(tx, grads, params)[1].finite


def test_stays_one_structure_under_scan_and_vmap(x64):
  params, grads = pair([(4, 3), (5,)])
  tx = clipjax.adaptive_grad_clip()
  step = lambda s, g: tx.update(g, s, params)[::-1]  # noqa: E731
  stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), grads)
  state, scanned = jax.lax.scan(step, tx.init(params), stacked)
  assert state.steps == 2
  assert state.norm.dtype == (jnp.float64 if x64 else jnp.float32)
  mapped = jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0])(stacked)
  assert_close(mapped, scanned)
  assert clipjax.metrics(state, per_leaf=True)["grad/norm/0"] > 0


def test_messages():
  params, grads = pair([(4, 3), (5,)])
  tx, six = clipjax.adaptive_grad_clip(), jnp.ones((2,) * 6)
  assert message_of(lambda: tx.update(grads, tx.init(params), params[::-1])) == (
    "`params` must have the floating leaves of `updates`, got float32[5] for the float32[4,3] at '0': pass the "
    "parameters that the updates belong to."
  )
  assert message_of(lambda: first_step(tx, six, six)) == (
    "`axis` must be given for leaves of rank above 5, got shape (2, 2, 2, 2, 2, 2) at '.': pass the axes that make up "
    "a unit."
  )
  assert message_of(lambda: first_step(clipjax.adaptive_grad_clip(axis=1), grads, params)) == (
    "`axis` must be within the rank of every leaf, got 1 for shape (5,) at '1': exempt that leaf with `optax.masked`."
  )
