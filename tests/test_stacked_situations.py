"""Stacked layers in a partition, in files, and in programs of JAX: the same as of the layers unrolled."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import through_flax, through_orbax
from helpers import assert_bits_equal
from jax import lax
from unrolled import assert_as_unrolled, assert_same_numbers, slices_of, unrolled

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYERS = 2
SHAPES = {"blocks": {"k": (3, LAYERS, 4), "w": (LAYERS, 5)}, "gates": (LAYERS,), "head": (4,)}
AXES = {"blocks": {"k": 1, "w": 0}, "gates": 0, "head": None}
NAMES = (*(f"{leaf}[{i}]" for leaf in ("blocks/k", "blocks/w", "gates") for i in range(LAYERS)), "head")


def axis_of(name, _=None):
  return {"blocks/k": 1, "head": None}.get(name, 0)


def layers(tree):
  return unrolled(tree, axis_of, LAYERS)


def gradients(count, seed=0):
  """Gradients of which some layers grow from step to step, and some do not."""
  rng, is_shape = np.random.default_rng(seed), lambda x: isinstance(x, tuple)
  return [
    jax.tree.map(lambda s, i=i: jnp.asarray(rng.standard_normal(s) * (1 + i), jnp.float32), SHAPES, is_leaf=is_shape)
    for i in range(count)
  ]


PARAMS = gradients(1, seed=1)[0]


def clip(stacked=None, **options):
  """A clip whose rule keeps an average of each layer."""
  return clipjax.adagc(1.01, warmup_steps=1, max_norm=2.0, stacked=stacked, **options)


def everything(stacked=None):
  """A clip of leaves, one of units and a watch of what they have left."""
  units = clipjax.adaptive_grad_clip(0.3, stacked=stacked, name="units")
  return optax.chain(clip(stacked), units, clipjax.watch(stacked=stacked, history=2, name="update"))


OURS, EACH = (tx._replace(update=jax.jit(tx.update)) for tx in (everything(AXES), everything()))


def test_a_name_of_an_axis_in_a_partition_of_which_one_part_has_no_layers():
  boxed = {"blocks": nn.Partitioned(PARAMS["blocks"]["k"], names=(None, "layers", None)), "head": PARAMS["head"]}
  part = lambda path, _: "rest" if "head" in jax.tree_util.keystr(path) else "body"  # noqa: E731
  clips = {"body": clip("layers"), "rest": clip("layers")}
  tx = optax.multi_transform(clips, lambda tree: jax.tree_util.tree_map_with_path(part, tree))
  updates, state = jax.jit(tx.update)(boxed, tx.init(boxed), boxed)
  assert slices_of(state) == [("blocks[0]", "blocks[1]"), ("head",)]
  for i in range(LAYERS):
    norm = clipjax.metrics(state, per_leaf=True)[f"grad_body/norm/blocks[{i}]"]
    np.testing.assert_allclose(norm, np.linalg.norm(boxed["blocks"].value[:, i]), rtol=2e-6)
  assert isinstance(updates["blocks"], nn.Partitioned)
  with pytest.raises(ValueError, match="which no leaf has"):  # Where nothing is masked it is a mistake.
    clips["rest"].init({"head": PARAMS["head"]})


# Files ---------------------------------------------------------------------------------------------------------------


def through_pickle(saved, *_):
  return pickle.loads(pickle.dumps(jax.device_get(saved)))


def through_map_params(saved, *_):
  return optax.tree.map_params(everything(AXES), lambda x: x, saved)


def through_a_program_that_copies(saved, *_):
  return jax.jit(lambda state: jax.tree.map(jnp.copy, state))(saved)


@pytest.mark.parametrize(
  "way", [through_orbax, through_flax, through_pickle, through_map_params, through_a_program_that_copies]
)
def test_a_state_that_goes_some_way_goes_on_as_if_it_had_not(way, tmp_path):
  first, last = gradients(2)
  _, state = OURS.update(first, OURS.init(PARAMS), PARAMS)
  again = way(state, OURS.init(PARAMS), tmp_path)
  assert_bits_equal(again, state)
  assert slices_of(again) == [NAMES] * 3
  assert_bits_equal(OURS.update(last, again, PARAMS), OURS.update(last, state, PARAMS))


# Transformations of JAX ----------------------------------------------------------------------------------------------


def test_one_program_of_all_steps_whose_old_buffers_are_gone():
  steps = lambda state, grads: lax.scan(lambda s, g: everything(AXES).update(g, s, PARAMS)[::-1], state, grads)  # noqa: E731
  grads = gradients(4)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
  state, updates = jax.jit(steps, donate_argnums=(0, 1))(jax.tree.map(jnp.copy, OURS.init(PARAMS)), stacked)
  assert all(x.is_deleted() for x in jax.tree.leaves(stacked))
  of_each = EACH.init(layers(PARAMS))
  for i, grad in enumerate(grads):
    want, of_each = EACH.update(layers(grad), of_each, layers(PARAMS))
    assert_same_numbers(layers(jax.tree.map(lambda x, i=i: x[i], updates)), want)
  assert_same_numbers(state, of_each)
  assert slices_of(state) == slices_of(of_each)
  assert all(clipped > 0 for key, clipped in clipjax.metrics(state).items() if key.endswith("clipped_steps"))


def test_vmap_over_models():
  grads, params = gradients(3), gradients(3, seed=2)
  together = lambda trees: jax.tree.map(lambda *x: jnp.stack(x, 1), *trees)  # noqa: E731
  states = jax.vmap(everything(AXES).init, in_axes=1)(together(params))
  assert slices_of(states) == [NAMES] * 3
  mapped = jax.jit(jax.vmap(everything(AXES).update, in_axes=(1, 0, 1)))
  updates, states = mapped(together(grads), states, together(params))
  for i in range(3):
    got = jax.tree.map(lambda x, i=i: x[i], (updates, states))
    want = EACH.update(layers(grads[i]), EACH.init(layers(params[i])), layers(params[i]))
    assert_as_unrolled(got, want, axis_of)
