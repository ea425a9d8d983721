"""The histogram of the parameters: exact for any leaves, by programs that do not grow with their number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.runs.record import weights


def counted(params):
  """What a row has, as one vector: the bins, zeros, and what is not finite."""
  row = weights.weights_row(np.asarray(weights.histogram(params)))
  return [*row["counts"], row["zeros"], row["nonfinite"]]


def wanted(params):
  x = np.concatenate([np.abs(np.asarray(leaf)).astype(np.float64).ravel() for leaf in jax.tree.leaves(params)])
  size = x[np.isfinite(x) & (x > 0)]
  counts, _ = np.histogram(np.clip(np.log10(size), weights.LOW, weights.HIGH), weights.EDGES)
  return [*counts.tolist(), int((x == 0).sum()), int((~np.isfinite(x)).sum())]


def drawn(shape, dtype=np.float32, seed=0):
  """Numbers of all sizes, none at the edge of a bin."""
  rng = np.random.default_rng(seed)
  bins = rng.integers(-4, weights.BINS + 4, shape) + rng.uniform(0.2, 0.8, shape)
  x = 10 ** (weights.LOW + bins / 4) * rng.choice([-1, 1], shape)
  x = np.where(rng.uniform(size=shape) < 0.1, rng.choice([0, np.inf, np.nan], shape), x)
  return jnp.asarray(x.astype(dtype))


def test_of_any_leaves_together(x64, monkeypatch):
  monkeypatch.setattr(weights, "_MOST", 4)
  small = weights._SMALL
  params = {f"same {i}": drawn((3, 5), seed=i) for i in range(5)}
  params |= {f"other {i}": drawn((1 + i, 1 + i % 7), seed=i) for i in range(9)}
  params |= {"half": drawn(9, np.float16), "complex": drawn(4).astype(jnp.complex64), "scalar": drawn(())}
  params |= {"at": drawn(small), "above": drawn(small + 1), "large": drawn((3, small)), "same large": drawn((3, small))}
  params |= {"double": drawn(17, np.float64), "empty": jnp.zeros((0, 3)), "numpy": np.ones(3, np.float32)}
  assert counted(params) == wanted(params)
  assert weights.parameter_count(params) == sum(x.size for x in params.values())


def test_a_leaf_larger_than_a_chunk(monkeypatch):
  monkeypatch.setattr(weights, "_CHUNK", 100)
  monkeypatch.setattr(weights, "_SMALL", 99)
  params = {"chunked": drawn(1234)}
  assert counted(params) == wanted(params) and weights.histogram(params).shape == (1, weights.BINS + 2)


@pytest.mark.parametrize("different", [False, True])
def test_no_program_grows_with_the_number_of_leaves(different, monkeypatch):
  monkeypatch.setattr(weights, "_MOST", 4)
  before = [program._cache_size() for program in (weights._joined, weights._first_counts)]
  params = [jnp.ones((11, 1 + different * i)) for i in range(40)]
  assert sum(counted(params)) == sum(x.size for x in params)
  after = [program._cache_size() for program in (weights._joined, weights._first_counts)]
  joined, firsts = np.subtract(after, before)
  assert joined <= (10 if different else 1) and firsts <= 6
  jaxpr = jax.make_jaxpr(weights._joined)(params[:4])
  assert str(jaxpr).count("concatenate") == 1 and len(jaxpr.jaxpr.invars) == 4


def test_without_parameters_there_is_none():
  assert weights.histogram({}) is None and weights.histogram({"w": jnp.zeros((0, 2))}) is None
