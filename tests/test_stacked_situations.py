"""Stacked layers in wrappers of Optax, in files, and in programs of JAX: the same as of the layers unrolled."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import through_flax, through_orbax
from helpers import assert_bits_equal
from jax import export, lax
from unrolled import assert_as_unrolled, assert_same_numbers, slices_of, unrolled

import clipjax
from clipjax import rules

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


@functools.cache
def compiled(make):
  """A transformation of stacked layers whose update is compiled once in this file, and that of the layers unrolled."""
  ours, each = make(AXES), make()
  return ours._replace(update=jax.jit(ours.update)), each._replace(update=jax.jit(each.update))


# Wrappers of Optax ---------------------------------------------------------------------------------------------------


def of_layers(tree):
  """Labels for a partition: what is a layer, by any structure of the parameters, and the rest."""
  label = lambda path, _: "rest" if "head" in jax.tree_util.keystr(path) else "layers"  # noqa: E731
  return jax.tree_util.tree_map_with_path(label, tree)


WRAPPERS = {
  "chain": lambda tx: optax.chain(tx, optax.scale_by_adam(), optax.scale(-0.1)),
  "masked": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda label: label == "layers", of_layers(tree))),
  "multi_transform": lambda tx: optax.multi_transform(
    {"layers": tx, "rest": clipjax.clip_by_global_norm(0.5, name="rest")}, of_layers
  ),
  "MultiSteps": lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), 2).gradient_transformation(),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
  "skip_steps": lambda tx: clipjax.skip_steps(tx, norm_rule=rules.minimum(rules.zscore(warmup_steps=2), 15.0)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_within_a_wrapper(name):
  clips = (clipjax.clip_by_leaf_norm(2.0, stacked=stacked) for stacked in (axis_of, None))
  ours, each = (optax.with_extra_args_support(WRAPPERS[name](tx)) for tx in clips)
  state, of_each = jax.jit(ours.init)(PARAMS), each.init(layers(PARAMS))
  update, update_each = jax.jit(ours.update), jax.jit(each.update)
  grads = gradients(6)
  if name in ("apply_if_finite", "skip_steps"):
    grads[3]["blocks"]["w"] = grads[3]["blocks"]["w"].at[1, 2].set(jnp.nan)
  for grad in grads:
    updates, state = update(grad, state, PARAMS)
    want, of_each = update_each(layers(grad), of_each, layers(PARAMS))
    assert_as_unrolled((updates, state), (want, of_each), axis_of)
  assert update._cache_size() == 1
  assert slices_of(state)[0] == (NAMES[:-1] if name in ("masked", "multi_transform") else NAMES)
  seen = clipjax.metrics(state)
  assert next(value for key, value in seen.items() if key.endswith("clipped_steps")) > 0


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
  tx, _ = compiled(everything)
  first, last = gradients(2)
  _, state = tx.update(first, tx.init(PARAMS), PARAMS)
  again = way(state, tx.init(PARAMS), tmp_path)
  assert_bits_equal(again, state)
  assert slices_of(again) == [NAMES] * 3
  assert_bits_equal(tx.update(last, again, PARAMS), tx.update(last, state, PARAMS))


def test_an_exported_program_knows_the_layers():
  tx = clip(AXES)
  grad = gradients(1)[0]
  state = tx.init(PARAMS)
  program = export.deserialize(export.export(jax.jit(tx.update))(grad, state).serialize())
  got, want = program.call(grad, state), jax.jit(tx.update)(grad, state)
  assert_same_numbers(got, want)
  assert got[1].labels == state.labels and got[1].labels.stacks == state.labels.stacks
  assert slices_of(got[1]) == [NAMES]
  with pytest.raises(ValueError, match=r"Labels|tree"):  # Another number of layers is another program.
    program.call(grad, clip(AXES | {"gates": None}).init(PARAMS))


# Transformations of JAX ----------------------------------------------------------------------------------------------


def test_one_program_of_all_steps_whose_old_buffers_are_gone():
  ours, each = everything(AXES), compiled(everything)[1]
  steps = lambda state, grads: lax.scan(lambda s, g: ours.update(g, s, PARAMS)[::-1], state, grads)  # noqa: E731
  grads = gradients(4)
  donated = (
    jax.tree.map(jnp.copy, ours.init(PARAMS)),
    jax.tree.map(lambda *x: jnp.stack(x), *grads),
  )
  state, updates = jax.jit(steps, donate_argnums=(0, 1))(*donated)
  assert all(x.is_deleted() for x in jax.tree.leaves(donated[1]))
  of_each = each.init(layers(PARAMS))
  for i, grad in enumerate(grads):
    want, of_each = each.update(layers(grad), of_each, layers(PARAMS))
    assert_same_numbers(layers(jax.tree.map(lambda x, i=i: x[i], updates)), want)
  assert_same_numbers(state, of_each)
  assert slices_of(state) == slices_of(of_each)
  assert all(clipped > 0 for key, clipped in clipjax.metrics(state).items() if key.endswith("clipped_steps"))


def test_vmap_over_models():
  _, each = compiled(everything)
  grads, params = gradients(3), gradients(3, seed=2)
  together = lambda trees: jax.tree.map(lambda *x: jnp.stack(x, 1), *trees)  # noqa: E731
  states = jax.vmap(everything(AXES).init, in_axes=1)(together(params))
  assert slices_of(states) == [NAMES] * 3
  mapped = jax.jit(jax.vmap(everything(AXES).update, in_axes=(1, 0, 1)))
  updates, states = mapped(together(grads), states, together(params))
  for i in range(3):
    got = jax.tree.map(lambda x, i=i: x[i], (updates, states))
    want = each.update(layers(grads[i]), each.init(layers(params[i])), layers(params[i]))
    assert_as_unrolled(got, want, axis_of)


@pytest.mark.slow
def test_gradients_through_clips_of_units_of_several_models():
  """As in meta-learning: a loss of what the clip has left, and of the norms in its state."""
  weights, examples = gradients(1, seed=3)[0], gradients(2)

  def loss(tx, weights, params, grads):
    updates, state = tx.update(grads, tx.init(params), params)
    terms = jax.tree.map(lambda u, w: jnp.sum(u * w), updates, weights)
    return sum(jax.tree.leaves(terms)) + jnp.sum(jnp.sin(state.norms))

  tx, each = clipjax.adaptive_grad_clip(0.3, stacked=AXES), clipjax.adaptive_grad_clip(0.3)
  ours = jax.grad(lambda grads: loss(tx, weights, PARAMS, grads))
  theirs = jax.jit(jax.grad(lambda grads: loss(each, layers(weights), layers(PARAMS), grads)))
  got = jax.jit(jax.vmap(ours))(jax.tree.map(lambda *x: jnp.stack(x), *examples))
  for i, example in enumerate(examples):
    want = theirs(layers(example))
    for a, b in zip(layers(jax.tree.map(lambda x, i=i: x[i], got)).values(), want.values(), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)  # Terms of about 1 nearly cancel.


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_on_the_way_of_a_finite_step_is_nan_or_inf(magnitude, frozen):
  tx, _ = compiled(everything)
  grads = jax.tree.map(lambda x: x * magnitude, gradients(2))
  if frozen:
    grads = [{"blocks": {"k": g["blocks"]["k"], "w": None}, "gates": None, "head": g["head"]} for g in grads]
  with jax.debug_nans(True), jax.debug_infs(True):
    state = tx.init(PARAMS)
    for grad in grads:
      updates, state = tx.update(grad, state, PARAMS)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
  assert frozen == (updates["gates"] is None)
