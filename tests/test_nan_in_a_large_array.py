"""A NaN or an inf is seen wherever it lies in a large array of one device: XLA may drop it from a max of many."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle_norm

import clipjax
from clipjax.arithmetic import vector_norm
from clipjax.norms import sums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64", "float64", "complex128"])
def test_a_large_leaf_keeps_its_nan(dtype):
  # XLA on CPU drops it from the max of a large array, in JAX 0.10 and later.
  with jax.enable_x64(dtype in ("float64", "complex128")):
    norms = jax.jit(lambda x: [clipjax.global_norm(x, p) for p in (math.inf, -math.inf, 3)])
    # A cube of the other leaf leaves the range if it has no unit, which an inf takes from both.
    clips, other = [clipjax.clip_by_global_norm(1.0, p) for p in (math.inf, 3)], jnp.finfo(dtype).max / 4
    first_bad = jax.jit(lambda *x: [tx.update(x, tx.init(x))[1].nonfinite_leaf for tx in clips])
    size = 4 * sums.FEW
    for shape in ((size,), (size // 64, 64)):
      for value in (math.nan, math.inf, -math.inf, 2.0):
        for place in (0, 7, size // 2, size - 1):
          x = np.ones(size, dtype=jnp.dtype(dtype))
          x[place] = value
          x = x.reshape(shape)
          for p, norm in zip((math.inf, -math.inf, 3), norms(x), strict=True):
            np.testing.assert_allclose(norm, oracle_norm(x, p), rtol=1e-5)
          assert first_bad(np.full(1, other, x.dtype), x) == [-1 if value == 2 else 1] * 2


@pytest.mark.parametrize("p", [math.inf, -math.inf, 2.0, 3.0, 1.0])
def test_the_norm_of_many_norms_keeps_a_nan(p):
  for size in (3, 1 << 17):
    norms = jnp.ones(size).at[size // 2].set(jnp.nan)
    assert jnp.isnan(vector_norm(norms, p)) and jnp.isnan(jax.jit(vector_norm, static_argnums=1)(norms, p))


def test_metrics_of_many_models_keep_a_nan():
  tx = clipjax.clip_by_leaf_norm(1.0)
  grads = {"a": jnp.ones(2), "b": jnp.ones(2)}
  states = jax.jit(jax.vmap(lambda _: tx.update(grads, tx.init(grads))[1]))(jnp.arange(1 << 15))
  states = states._replace(max_norm=states.max_norm.at[100, 1].set(jnp.nan), scale=states.scale.at[7, 0].set(jnp.nan))
  found = clipjax.metrics(states)
  assert np.flatnonzero(np.isnan(found["grad/max_norm"])).tolist() == [100]
  assert np.flatnonzero(np.isnan(found["grad/scale"])).tolist() == [7]
