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
NORM = 13.19327100149299
# torch 2.13.0, torch.nn.utils.clip_grad_norm_(max_norm), by order of the norm: (norm, w, b).
TORCH = {
  (2.0, 1.0): (
    13.193271636962890625,
    [[0.22738832235336304, -0.30318441987037659], [0.037898052483797073, 0.15159220993518829]],
    [0.90955328941345215, -0.018949026241898537],
  ),
}  # fmt: skip


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
  parameters = []
  for x in GRADS.values():
    parameter = torch.nn.Parameter(torch.zeros(x.shape))
    parameter.grad = torch.tensor(x)
    parameters.append(parameter)
  norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=p)
  clipped, ours = clip(p, max_norm)
  np.testing.assert_allclose(ours, norm.item(), rtol=1e-6)
  for parameter, x in zip(parameters, clipped.values(), strict=True):
    np.testing.assert_allclose(x, parameter.grad.numpy(), rtol=1e-6)
  torch.nn.utils.clip_grad_value_(parameters, 0.125)
  for parameter, x in zip(parameters, clipjax.clip_grad_value(clipped, 0.125).values(), strict=True):
    np.testing.assert_allclose(x, parameter.grad.numpy(), rtol=1e-6)


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
  tensors = [tf.constant(x) for x in grads.values()]
  theirs, norm = tf.clip_by_global_norm(tensors, 5.0, use_norm=use_norm)
  ours, our_norm = clipjax.clip_grad_norm(grads, 5.0, norm=use_norm)
  np.testing.assert_allclose(our_norm, norm.numpy(), rtol=1e-6)
  if use_norm is None:
    for a, b in zip(ours.values(), theirs, strict=True):
      np.testing.assert_allclose(a, b.numpy(), rtol=1e-6)
  else:
    scale = min(1.0, 5.0 / use_norm)
    for a, x in zip(ours.values(), grads.values(), strict=True):
      np.testing.assert_allclose(a, x * np.float32(scale), rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e4])
def test_optax(max_norm):
  leaves = random_leaves(7, magnitude=2.0)
  state = optax.EmptyState()
  pairs = (
    (clipjax.clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)),
    (clipjax.clip_by_rms(max_norm), optax.clip_by_block_rms(max_norm)),
    (clipjax.clip_by_value(max_norm), optax.clip(max_norm)),
  )
  for ours, theirs in pairs:
    got, _ = ours.update(leaves, ours.init(leaves))
    chex.assert_trees_all_close(got, theirs.update(leaves, state)[0], rtol=2e-6)
  np.testing.assert_allclose(clipjax.global_norm(leaves), optax.tree.norm(leaves), rtol=1e-6)
