"""Properties that hold for every tree: hypothesis draws the leaves, the orders and the thresholds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_bits_equal, oracle_norm
from hypothesis import given, settings
from hypothesis import strategies as st

import clipjax

settings.register_profile("suite", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("suite")

ORDERS = st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf])
# Shapes are few, so that the examples share their compilations.
SHAPES = st.sampled_from([(3,), (2, 2), (), (0,)])


@st.composite
def trees(draw, dtypes=("float32", "bfloat16", "float16")):
  """A dict of one to three leaves, each with a magnitude of its own; zeros and signed zeros are frequent."""
  out = {}
  for i in range(draw(st.integers(1, 3))):
    shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
    exponent = draw(st.integers(-30, 30)) if dtype != "float16" else draw(st.integers(-3, 3))
    entries = st.sampled_from([0.0, -0.0, 1.0, -1.5, 0.3, 7.0])
    x = np.array([draw(entries) for _ in range(math.prod(shape))]).reshape(shape) * 10.0**exponent
    out[f"leaf{i}"] = jnp.asarray(x.astype(np.float32)).astype(dtype)
  return out


@given(tree=trees(), p=ORDERS)
def test_norm_is_that_of_the_oracle(tree, p):
  np.testing.assert_allclose(clipjax.global_norm(tree, p), oracle_norm(tree, p), rtol=2e-6)
  for name, norm in clipjax.leaf_norms(tree, p).items():
    np.testing.assert_allclose(norm, oracle_norm(tree[name], p), rtol=2e-6)


@given(tree=trees(), p=ORDERS, share=st.sampled_from([0.0, 1e-6, 0.5, 0.999, 1.0, 2.0]))
def test_norm_after_is_at_most_the_limit_and_clipping_twice_is_clipping_once(tree, p, share):
  max_norm = np.float32(share * oracle_norm(tree, p))
  once, norm = clipjax.clip_grad_norm(tree, max_norm, p)
  if norm <= max_norm:
    assert_bits_equal(once, tree)
  else:
    rounding = max(float(jnp.finfo(x.dtype).eps) for x in tree.values())
    # An entry that comes out subnormal may be rounded up by half of the dtype's smallest step.
    steps = sum(x.size * float(jnp.finfo(x.dtype).smallest_subnormal) for x in tree.values())
    assert oracle_norm(once, p) <= max_norm * (1 + max(rounding, 1e-6)) + steps
  twice, _ = clipjax.clip_grad_norm(once, np.float32(max_norm * 1.01), p)
  for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
    np.testing.assert_allclose(np.asarray(b, np.float32), np.asarray(a, np.float32), rtol=0.02)


@given(tree=trees(dtypes=("float32",)), p=ORDERS)
def test_splitting_and_permuting_leaves_changes_nothing(tree, p):
  pieces = [row for x in tree.values() for row in jnp.ravel(x)[::-1]][::-1]
  np.testing.assert_allclose(clipjax.global_norm(pieces, p), clipjax.global_norm(tree, p), rtol=2e-6)


@given(tree=trees(dtypes=("float32",)), p=ORDERS, power=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_norm(tree, p, power):
  scaled = {name: x * jnp.float32(2.0**power) for name, x in tree.items()}
  np.testing.assert_allclose(
    clipjax.global_norm(scaled, p), np.float64(clipjax.global_norm(tree, p)) * 2.0**power, rtol=2e-6
  )


@given(tree=trees(), max_norm=st.floats(1e-20, 1e20))
def test_direction_and_signs_are_kept(tree, max_norm):
  clipped, norm = clipjax.clip_grad_norm(tree, max_norm)
  factor = min(1.0, max_norm / float(norm)) if norm > 0 else 1.0
  for name, x in tree.items():
    got, want = np.asarray(clipped[name], np.float64), np.asarray(x, np.float64) * factor
    info = jnp.finfo(x.dtype)
    np.testing.assert_allclose(got, want, rtol=max(float(info.eps), 2e-6), atol=2 * float(info.tiny))
    assert (np.signbit(got) == np.signbit(want)).all()
