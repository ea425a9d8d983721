"""What runs over several devices: norms of every order inside shard_map, their derivatives, and what is said of a mesh.

Programs over a mesh are compiled in every run, see `conftest.py`, so that they have a file of their own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, oracle_norm
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import clipjax

SPECS = {"ab": P("a", "b"), "a": P("a"), "none": P()}
AXES = {"ab": ("a", "b"), "a": "a", "none": None}


def some_tree(seed):
  rng = np.random.default_rng(seed)
  shapes = {"ab": (8, 4), "a": (8,), "none": (3,)}
  return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def norms(tree, ord):
  return clipjax.global_norm(tree, ord), clipjax.leaf_norms(tree, ord)


def split(fn, out_specs=None, **options):
  """The function inside shard_map, where each device has its part of the tree."""
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(SPECS,), out_specs=out_specs or P(), **options))


@pytest.mark.parametrize("ord", [1.0, 2.0, 3.0, math.inf, 0.0, -math.inf])
def test_shards_are_summed_inside_shard_map(ord):
  both = split(lambda t: norms(t, ord), (P(), P()))
  by_hand = split(lambda t: clipjax.global_norm(t, ord, axis_name=AXES), check_vma=False)
  for scale in (1.0, 1e30, 1e-30):
    tree = jax.tree.map(lambda x, scale=scale: x * scale, some_tree(0))
    whole = oracle_norm(tree, ord)
    want = ((whole, jax.tree.map(lambda x: oracle_norm(x, ord), tree)), whole)
    assert_close((both(tree), by_hand(tree)), want, 2e-6)


@pytest.mark.parametrize("ord", [1.0, 2.0, 3.0, math.inf])
def test_derivatives_inside_shard_map_are_those_of_one_device(ord):
  def number(tree):
    norm, by_leaf = norms(tree, ord)
    return norm + 2 * by_leaf["ab"] + 3 * by_leaf["none"]

  tree, tangent = some_tree(0), some_tree(1)
  of_shards, of_one = ((jax.jvp(fn, (tree,), (tangent,)), jax.grad(fn)(tree)) for fn in (split(number), number))
  assert_close(of_shards, of_one, 1e-5, 1e-6)


def test_agc_says_that_it_cannot_measure_a_unit_that_is_split():
  tx, mesh = clipjax.adaptive_grad_clip(), jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  step = jax.shard_map(lambda g: tx.update(g, tx.init(g), g)[0], mesh=mesh, in_specs=P("x"), out_specs=P("x"))
  with pytest.raises(ValueError, match=r"must not vary over mesh axes inside shard_map, got '\.' varying over"):
    step(jnp.ones((8, 2)))


@pytest.mark.usefixtures("standard_promotion")  # Optax needs it.
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_accumulator_that_stays_nan_is_told_under_a_mesh_that_is_set_around(kind):
  """There JAX runs no program on one of its devices alone."""
  mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    params, bad = (jax.device_put({"w": jnp.full((8, 2), v)}, NamedSharding(mesh, P("d"))) for v in (1.0, jnp.nan))
    tx = optax.MultiSteps(clipjax.skip_steps(optax.sgd(0.1)), 2)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)  # Optax before 0.2.7 loses a sharding without jit.
    for _ in range(2):
      _, state = update(bad, state, params)
    in_one_part = jax.device_put({"w": jnp.zeros((8, 2)).at[7].set(jnp.inf)}, NamedSharding(mesh, P("d")))
    for held in (state, *(state._replace(acc_grads=x) for x in (in_one_part, jax.device_get(in_one_part)))):
      with pytest.raises(FloatingPointError, match=r"^The accumulator of `optax\.MultiSteps` "):
        clipjax.raise_if_nonfinite(held)
