"""The numbers of torch, TensorFlow and Optax: stored, and asked of the libraries themselves where they are installed.

Where this package deviates on purpose, the test says so: what Optax gets wrong is in `benchmarks/against_optax.py`.
"""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_leaves

import clipjax

GRADS = {"w": np.array([[3.0, -4.0], [0.5, 2.0]], np.float32), "b": np.array([12.0, -0.25], np.float32)}
# torch 2.13.0, torch.nn.utils.clip_grad_norm_ of GRADS, by (norm_type, max_norm): norm, w, b.
TORCH = {
  (1.0, 7.0): (21.75, [[0.96551716, -1.28735626], [0.16091953, 0.64367813]], [3.86206865, -0.08045977]),
  (2.0, 1.0): (13.16482067, [[0.22788003, -0.30384004], [0.03798001, 0.15192002]], [0.91152012, -0.01899000]),
  (2.0, 100.0): (13.16482067, [[3.0, -4.0], [0.5, 2.0]], [12.0, -0.25]),
  (3.0, 0.5): (12.22523975, [[0.12269697, -0.16359596], [0.02044949, 0.08179798]], [0.49078786, -0.01022475]),
  (float("inf"), 7.0): (12.0, [[1.75, -2.33333325], [0.29166666, 1.16666663]], [7.0, -0.14583333]),
}


def clip(p, max_norm, eps=1e-6):
  return clipjax.clip_grad_norm(GRADS, max_norm, p, eps=eps)


@pytest.mark.parametrize(("p", "max_norm"), sorted(TORCH))
def test_torch_stored(p, max_norm):
  clipped, norm = clip(p, max_norm)
  want = TORCH[p, max_norm]
  np.testing.assert_allclose(norm, want[0], rtol=1e-6)
  np.testing.assert_allclose(clipped["w"], want[1], rtol=1e-6)
  np.testing.assert_allclose(clipped["b"], want[2], rtol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 7.0, 100.0])
def test_torch_installed(p, max_norm):
  torch = pytest.importorskip("torch")
  parameters = {key: torch.nn.Parameter(torch.zeros(x.shape)) for key, x in GRADS.items()}
  for key, parameter in parameters.items():
    parameter.grad = torch.tensor(GRADS[key])
  norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm, norm_type=p)
  clipped, ours = clip(p, max_norm)
  np.testing.assert_allclose(ours, norm.item(), rtol=1e-6)
  for key, parameter in parameters.items():
    np.testing.assert_allclose(clipped[key], parameter.grad.numpy(), rtol=1e-6)
  torch.nn.utils.clip_grad_value_(parameters.values(), 0.125)
  clipped = clipjax.clip_grad_value(clipped, 0.125)
  for key, parameter in parameters.items():
    np.testing.assert_allclose(clipped[key], parameter.grad.numpy(), rtol=1e-6)


def test_tensorflow_stored():
  # tf.clip_by_global_norm([3, 4, 12], 5): 13 and [1.1538461, 1.5384616, 4.6153846]; a norm that is not finite makes
  # everything NaN; use_norm replaces the norm.
  clipped, norm = clipjax.clip_grad_norm([jnp.array([3.0, 4.0]), jnp.array([12.0])], 5.0)
  assert norm == 13
  np.testing.assert_allclose(clipped[0], [1.1538461, 1.5384616], rtol=1e-6)
  np.testing.assert_allclose(clipped[1], [4.6153846], rtol=1e-6)
  clipped, norm = clipjax.clip_grad_norm([jnp.array([jnp.inf, 1.0]), jnp.array([2.0])], 5.0)
  assert np.isnan(clipped[0]).all()
  assert np.isnan(clipped[1]).all()
  clipped, norm = clipjax.clip_grad_norm([jnp.array([3.0])], 5.0, norm=10.0)
  assert norm == 10
  np.testing.assert_allclose(clipped[0], [1.5], rtol=1e-6)


@pytest.mark.parametrize("use_norm", [None, 2.0, 50.0])
@pytest.mark.parametrize("bad", [None, np.inf, np.nan])
def test_tensorflow_installed(use_norm, bad):
  tf = pytest.importorskip("tensorflow")
  grads = {k: x.copy() for k, x in GRADS.items()}
  if bad is not None:
    grads["b"][0] = bad
  tensors = [tf.constant(grads[key]) for key in ("w", "b")]
  theirs, norm = tf.clip_by_global_norm(tensors, 5.0, use_norm=use_norm and tf.constant(use_norm))
  ours, our_norm = clipjax.clip_grad_norm(grads, 5.0, norm=use_norm)
  np.testing.assert_allclose(our_norm, norm.numpy(), rtol=1e-6)
  for key, want in zip(("w", "b"), theirs, strict=True):
    np.testing.assert_allclose(ours[key], want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e4])
def test_optax(max_norm):
  leaves = random_leaves(7, magnitude=2.0)
  state = optax.EmptyState()
  pairs = (
    (clipjax.clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)),
    (clipjax.clip_by_block_rms(max_norm), optax.clip_by_block_rms(max_norm)),
    (clipjax.clip_by_value(max_norm), optax.clip(max_norm)),
  )
  for ours, theirs in pairs:
    got, _ = ours.update(leaves, ours.init(leaves))
    chex.assert_trees_all_close(got, theirs.update(leaves, state)[0], rtol=2e-6)
  np.testing.assert_allclose(clipjax.global_norm(leaves), optax.tree.norm(leaves), rtol=1e-6)
