"""What TensorFlow's own tests ask of its clip ops, asked of TensorFlow and of this package with the same numbers.

Sparse `IndexedSlices` have no counterpart in JAX. Skipped where TensorFlow is not installed; where the two differ on
purpose is in docs/hardening.md, which `test_deviations.py` runs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax

tf = pytest.importorskip("tensorflow")

MATRIX = np.array([[-3.0, 0.0, 0.0], [4.0, 0.0, 0.0]], np.float32)  # Norm 5.
OTHER = np.array([1.0, -2.0], np.float32)
TIMES = {"float16": 2e-3, "float32": 1e-6}


def assert_close(ours, theirs, rtol=1e-6):
  np.testing.assert_allclose(np.asarray(ours).astype(np.float64), np.asarray(theirs).astype(np.float64), rtol=rtol)


def by_norm(x, limit, axes=None):
  """`tf.clip_by_norm`: over some axes it is a clip of each slice, which is what `jax.vmap` makes of the clip."""
  if axes is None:
    return clipjax.clip_grad_norm(x, limit)[0]
  moved = jnp.moveaxis(x, axes, range(len(axes)))
  flat = moved.reshape(*moved.shape[: len(axes)], -1)
  clipped = jax.vmap(lambda part: clipjax.clip_grad_norm(part, limit)[0], in_axes=-1, out_axes=-1)(flat)
  return jnp.moveaxis(clipped.reshape(moved.shape), range(len(axes)), axes)


@pytest.mark.parametrize("limit", [4.0, 5.0, 6.0, 0.5, 0.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_clip_by_norm(limit, as_tensor):
  theirs = tf.clip_by_norm(MATRIX, tf.constant(limit) if as_tensor else limit)
  assert_close(by_norm(MATRIX, jnp.float32(limit) if as_tensor else limit), theirs)
  assert np.array_equal(by_norm(MATRIX, limit), MATRIX) == (limit >= 5)
  tx = clipjax.clip_by_leaf_norm(limit)
  updates, _ = tx.update([MATRIX, OTHER], tx.init([MATRIX, OTHER]))
  for ours, x in zip(updates, (MATRIX, OTHER), strict=True):
    assert_close(ours, tf.clip_by_norm(x, limit))


@pytest.mark.parametrize("axes", [[0], [1], [0, 1], [0, 2], [1, 2]])
@pytest.mark.parametrize("limit", [0.5, 2.0, 100.0])
def test_clip_by_norm_over_some_axes(axes, limit):
  x = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32) * 2
  assert_close(by_norm(x, limit, axes), tf.clip_by_norm(x, limit, axes=axes), 2e-6)
  assert_close(by_norm(MATRIX, 2.0, [1]), tf.clip_by_norm(MATRIX, 2.0, axes=[1]))


def test_clip_by_norm_of_zeros():
  zeros = np.zeros((2, 3), np.float32)
  assert_close(by_norm(zeros, 6.0), tf.clip_by_norm(zeros, 6.0))
  with tf.GradientTape() as tape:  # Both have a finite derivative there, that of no clip.
    x = tf.Variable(zeros)
    y = tf.reduce_sum(tf.clip_by_norm(x, 6.0))
  assert_close(jax.grad(lambda x: by_norm(x, 6.0).sum())(zeros), tape.gradient(y, x))


@pytest.mark.parametrize("limit", [1.0, 5.0, 50.0])
def test_the_derivative_of_clip_by_norm(limit):
  weights = np.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]], np.float32)
  with tf.GradientTape() as tape:
    x = tf.Variable(MATRIX)
    y = tf.reduce_sum(weights * tf.clip_by_norm(x, limit))
  if limit != 5:  # At the limit the derivative is one of two.
    ours = jax.grad(lambda x: jnp.sum(weights * by_norm(x, limit)))(MATRIX)
    np.testing.assert_allclose(ours, tape.gradient(y, x), rtol=1e-5, atol=1e-6)


def test_a_threshold_that_is_no_scalar_is_an_error():
  with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
    tf.clip_by_norm(np.float32(2.0), np.array([2.0, 3.0], np.float32))
  with pytest.raises(ValueError, match=r"`max_norm` must be a number >= 0 or a scalar array, got float32\[2\]"):
    by_norm(jnp.float32(2.0), jnp.array([2.0, 3.0]))


@pytest.mark.parametrize("dtype", TIMES)
def test_global_norm(dtype):
  tensors = [MATRIX.astype(dtype), OTHER.astype(dtype)]
  assert_close(clipjax.global_norm(tensors), tf.linalg.global_norm(tensors), TIMES[dtype])
  with_none = [tensors[0], None, tensors[1]]
  assert_close(clipjax.global_norm(with_none), tf.linalg.global_norm(with_none), TIMES[dtype])
  assert tf.linalg.global_norm([None, None]) == clipjax.global_norm([None, None]) == 0


@pytest.mark.parametrize("limit", [0.5, 4.0, 5.4772255, 6.0, 1e9])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_clip_by_global_norm(limit, as_tensor):
  theirs, norm = tf.clip_by_global_norm([MATRIX, OTHER], tf.constant(limit) if as_tensor else limit)
  ours, our_norm = clipjax.clip_grad_norm([MATRIX, OTHER], jnp.float32(limit) if as_tensor else limit)
  assert_close(our_norm, norm)
  for a, b in zip(ours, theirs, strict=True):
    assert_close(a, b)


def test_clip_by_global_norm_passes_over_none():
  theirs, norm = tf.clip_by_global_norm([MATRIX, None, OTHER], 4.0)
  ours, our_norm = clipjax.clip_grad_norm([MATRIX, None, OTHER], 4.0)
  assert theirs[1] is None and ours[1] is None
  assert_close(our_norm, norm)
  assert_close(ours[0], theirs[0])
  assert_close(ours[2], theirs[2])


@pytest.mark.parametrize("norm", [0.5, 3.0, 5.0, 80.0])
def test_a_norm_that_is_given(norm):
  theirs, same = tf.clip_by_global_norm([MATRIX, OTHER], 4.0, use_norm=tf.constant(norm))
  ours, our_norm = clipjax.clip_grad_norm([MATRIX, OTHER], 4.0, norm=norm)
  assert our_norm == same.numpy() == np.float32(norm)
  for a, b in zip(ours, theirs, strict=True):
    assert_close(a, b)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("given", [False, True])
def test_a_norm_that_is_not_finite_makes_everything_nan(bad, given):
  tensors = [MATRIX.copy(), OTHER]
  tensors[0][0, 0] = bad
  theirs, norm = tf.clip_by_global_norm(tensors, 4.0, use_norm=tf.constant(abs(bad)) if given else None)
  ours, our_norm = clipjax.clip_grad_norm(tensors, 4.0, norm=abs(bad) if given else None)
  np.testing.assert_array_equal(our_norm, norm)
  for a, b in zip(ours, theirs, strict=True):
    assert np.isnan(a).all() and np.isnan(b).all()


def test_clip_by_global_norm_of_zeros_and_of_nothing():
  theirs, norm = tf.clip_by_global_norm([np.zeros(3, np.float32)], 1.0)
  ours, our_norm = clipjax.clip_grad_norm([np.zeros(3, np.float32)], 1.0)
  assert (our_norm, norm.numpy()) == (0, 0)
  assert_close(ours[0], theirs[0])
  assert tf.clip_by_global_norm([], 1.0)[0] == clipjax.clip_grad_norm([], 1.0)[0] == []


def test_what_is_no_list_of_tensors_is_one_leaf_here():
  with pytest.raises(TypeError):
    tf.clip_by_global_norm(tf.constant([3.0, 4.0]), 1.0)
  assert_close(clipjax.clip_grad_norm(jnp.array([3.0, 4.0]), 1.0)[0], [0.6, 0.8])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bound", [0.0, 1.5, 4.0, 10.0])
def test_clip_by_value(dtype, bound):
  x = np.array([[-5.0, 2.0, math.inf], [4.0, -math.inf, math.nan]]).astype(dtype)
  np.testing.assert_array_equal(clipjax.clip_grad_value(x, bound), tf.clip_by_value(x, -bound, bound))
  finite = np.array([-5.0, 2.0, 0.0, 4.5], np.float32)
  with tf.GradientTape() as tape:
    t = tf.Variable(finite)
    y = tf.reduce_sum(tf.clip_by_value(t, -1.5, 1.5) * [1.0, 2.0, 3.0, 4.0])
  ours = jax.grad(lambda x: jnp.sum(clipjax.clip_grad_value(x, 1.5) * jnp.array([1.0, 2.0, 3.0, 4.0])))(finite)
  np.testing.assert_array_equal(ours, tape.gradient(y, t))


@pytest.mark.parametrize("limit", [0.1, 5 / 6, 0.9, 4.0])
def test_clip_by_average_norm_is_a_threshold_for_each_entry(limit):
  theirs = tf.compat.v1.clip_by_average_norm(MATRIX, limit)
  assert_close(by_norm(MATRIX, limit * MATRIX.size), theirs)


@pytest.mark.parametrize(
  ("argument", "ours"),
  [
    ({"clipnorm": 0.5}, lambda: clipjax.clip_by_leaf_norm(0.5)),
    ({"global_clipnorm": 0.5}, lambda: clipjax.clip_by_global_norm(0.5)),
    ({"clipvalue": 0.5}, lambda: clipjax.clip_by_value(0.5)),
  ],
)
def test_clips_of_keras_optimizers(argument, ours):
  variables = [tf.Variable(np.zeros_like(x)) for x in (MATRIX, OTHER)]
  optimizer = tf.keras.optimizers.SGD(1.0, **argument)
  optimizer.apply_gradients(zip([tf.constant(MATRIX), tf.constant(OTHER)], variables, strict=True))
  tx = ours()
  updates, _ = tx.update([MATRIX, OTHER], tx.init([MATRIX, OTHER]))
  for a, b in zip(updates, variables, strict=True):
    np.testing.assert_allclose(-np.asarray(a), b.numpy(), rtol=2e-6)
