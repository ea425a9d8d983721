"""Stacked layers that are spread over devices: every transformation that takes `stacked=` against the layers unrolled.

Under plain jit any axis may be sharded, that of the layers too. Inside `shard_map` every device must hold all layers.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from unrolled import assert_as_unrolled, assert_same_numbers, unrolled

import clipjax
from clipjax.norms import sums

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYERS = 2
# (shape, dtype, axis of the layers, spec under jit, spec inside shard_map); both axes of the mesh have size 2.
LEAVES = {
  "by_both": ((LAYERS, 8), "float32", 0, P("a", "b"), P(None, ("a", "b"))),
  "middle": ((8, LAYERS, 3), "float32", 1, P("b", "a"), P("b")),
  "last": ((3, 8, LAYERS), "bfloat16", 2, P(None, "b", "a"), P(None, "b")),
  "one_each": ((LAYERS,), "float32", 0, P("a"), P()),
  "single": ((8, 4), "float32", None, P("a", "b"), P("a", "b")),
}
UNDER_JIT, INSIDE = ({name: leaf[i] for name, leaf in LEAVES.items()} for i in (3, 4))
INSIDE_AXES = {name: tuple(jax.tree.leaves(tuple(spec))) for name, spec in INSIDE.items()}
MAGNITUDES = (1.0, 30.0, 1e25, 1e-25)


def axis_of(name, leaf=None):
  del leaf
  return LEAVES[name][2]


def some_tree(magnitude=1.0, seed=0):
  """Entries of which each layer has ten times as large ones as that before it, so that a limit clips some alone."""
  rng, tree = np.random.default_rng(seed), {}
  for name, (shape, dtype, axis, *_) in LEAVES.items():
    growth = (
      1.0 if axis is None else 10.0 ** np.arange(LAYERS).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    )
    tree[name] = jnp.asarray(rng.standard_normal(shape) * growth * magnitude / 100, jnp.dtype(dtype))
  return tree


def last_letters(name, leaf):
  """The layers of one number are a group, whichever leaf they are of."""
  del leaf
  return name[-3:]


def transformations(stacked, axis_name=None):
  """What takes `stacked=`, by name; the clip of units, which takes no `axis_name`, only where that is left out.

  A rule sees norms, which know of no mesh.
  """
  by = {"stacked": stacked, "axis_name": axis_name}
  return {
    "clip_by_leaf_norm": clipjax.clip_by_leaf_norm(0.5, **by),
    "clip_by_leaf_norm_inf": clipjax.clip_by_leaf_norm(0.5, jnp.inf, **by),
    "clip_by_group_norm": clipjax.clip_by_group_norm(0.5, last_letters, **by),
    "clip_by_block_rms": clipjax.clip_by_block_rms(0.1, **by),
    "watch": clipjax.watch(history=3, **by),
    "clip_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(0.5, **by), optax.scale(0.5), **by),
    **({"adaptive_grad_clip": clipjax.adaptive_grad_clip(0.1, stacked=stacked)} if axis_name is None else {}),
  }


# What the mesh has to do with the others is in these; all of them are inside `shard_map`, where sums are written out.
UNDER_JIT_ALONE = ("clip_by_leaf_norm", "watch", "adaptive_grad_clip")


def all_of(each):
  """`(init, update)` of several at once, in one program."""

  def update(grads, states, params):
    out = {name: tx.update(grads, states[name], params) for name, tx in each.items()}
    return {name: u for name, (u, _) in out.items()}, {name: s for name, (_, s) in out.items()}

  return lambda params: {name: tx.init(params) for name, tx in each.items()}, update


@pytest.fixture(scope="module")
def layer_by_layer():
  """What every transformation gives of the layers unrolled, on one device: `(updates, states)` of each step."""
  init, update = all_of(transformations(None))
  params = unrolled(some_tree(10.0), axis_of)
  states, out = init(params), []
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for i, magnitude in enumerate(MAGNITUDES):
      updates, states = jax.jit(update)(unrolled(some_tree(magnitude, i), axis_of), states, params)
      out.append(jax.device_get((updates, states)))
  scales = out[0][1]["clip_by_leaf_norm"].scale
  assert 0 < (scales < 1).sum() < scales.size
  return out


def mesh_of(kind):
  return jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def on_mesh(mesh, tree, specs):
  return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def compare(run, states, layer_by_layer, place, names):
  """Runs the steps, and holds each to the layers unrolled; gives the last updates and states."""
  for i, magnitude in enumerate(MAGNITUDES):
    updates, states = run(place(some_tree(magnitude, i)), states, place(some_tree(10.0)))
    for name in names:
      got, want = ([part[name] for part in both] for both in (jax.device_get((updates, states)), layer_by_layer[i]))
      assert_as_unrolled(got, want, axis_of)
  return updates, states


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_under_jit_any_axis_may_be_sharded_that_of_the_layers_too(kind, layer_by_layer):
  each = {name: transformations(axis_of)[name] for name in UNDER_JIT_ALONE}
  init, update = all_of(each)
  mesh = mesh_of(kind)
  with jax.set_mesh(mesh):
    run = jax.jit(update)
    updates, states = compare(
      run, jax.jit(init)(some_tree(10.0)), layer_by_layer, lambda tree: on_mesh(mesh, tree, UNDER_JIT), each
    )
    for name in each:  # Gradients stay where they were, states are everywhere.
      for leaf, spec in UNDER_JIT.items():
        assert updates[name][leaf].sharding.is_equivalent_to(NamedSharding(mesh, spec), updates[name][leaf].ndim)
      assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(states[name])), name
    if kind == AxisType.Explicit:
      norms = jax.jit(lambda tree: clipjax.leaf_norms(tree, stacked=axis_of))(on_mesh(mesh, some_tree(), UNDER_JIT))
      for name, norm in clipjax.leaf_norms(some_tree(), stacked=axis_of).items():
        np.testing.assert_allclose(norms[name], norm, rtol=2e-6)


WITHOUT_MESH = [
  (functools.partial(clipjax.adaptive_grad_clip, 0.1), True),
  (functools.partial(clipjax.clip_by_leaf_norm, 2.0), False),
]


@pytest.mark.parametrize(("make", "jit"), cases(WITHOUT_MESH, WITHOUT_MESH[1:]))
def test_arrays_of_explicit_types_need_no_mesh_around(make, jit):
  shapes, specs = {"w": (LAYERS, 8), "gates": (LAYERS,)}, {"w": P("a", "b"), "gates": P("a")}
  grads = {name: jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
  placed = on_mesh(mesh_of(AxisType.Explicit), grads, specs)
  layers, tx, each = unrolled(grads, lambda name: 0), make(stacked=0), make()
  got = (jax.jit(tx.update) if jit else tx.update)(placed, tx.init(placed), placed)
  assert_as_unrolled(jax.device_get(got), jax.jit(each.update)(layers, each.init(layers), layers), lambda name: 0)
  assert jax.typeof(got[0]["w"]) == jax.typeof(placed["w"])


@pytest.mark.slow
def test_gradient_through_a_clip_of_explicit_types():
  rng = np.random.default_rng(0)
  grads, weights = (jnp.asarray(rng.standard_normal((LAYERS, 8)), jnp.float32) for _ in range(2))
  tx = clipjax.clip_by_leaf_norm(1.0, stacked=0)
  loss = lambda grads, weights: jnp.sum(tx.update(grads, tx.init(grads))[0] * weights)  # noqa: E731
  want = jax.grad(loss)(grads, weights)
  mesh = mesh_of(AxisType.Explicit)
  placed = [jax.device_put(x, NamedSharding(mesh, P("a", "b"))) for x in (grads, weights)]
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(*placed), want, rtol=1e-5, atol=1e-6)


# Inside shard_map ----------------------------------------------------------------------------------------------------


def inside(update, mesh, states, specs=INSIDE, **options):
  """`update` in a `shard_map` in a `jit`, with the states whole on every device."""
  whole = jax.tree.map(lambda _: P(), states)
  out_specs = (dict.fromkeys(states, specs), whole)
  return jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(specs, whole, specs), out_specs=out_specs, **options))


@pytest.mark.parametrize("way", cases(["by the types", "by name", "without checks"], {"by name"}))
def test_inside_shard_map_where_every_device_holds_all_layers(way, layer_by_layer):
  each = transformations(axis_of, None if way == "by the types" else INSIDE_AXES)
  each.pop("adaptive_grad_clip", None)
  init, update = all_of(each)
  states = init(some_tree(10.0))  # Outside, with whole parameters.
  run = inside(update, mesh_of(AxisType.Auto), states, check_vma=way != "without checks")
  compare(run, states, layer_by_layer, lambda tree: tree, each)


def all_reduces(run, *args):
  return len(re.findall(r" all-reduce(?:-start)?\(", jax.jit(run).lower(*args).compile().as_text()))


@pytest.mark.parametrize("ord", [2, jnp.inf])
def test_all_layers_of_all_leaves_have_one_all_reduce(ord):
  grads = {"w": jnp.ones((LAYERS, 8, 2)), "v": jnp.ones((8, LAYERS)), "head": jnp.ones((8, 3))}
  specs = {"w": P(None, "a"), "v": P("a"), "head": P("a")}
  tx = clipjax.clip_by_leaf_norm(0.5, ord, stacked={"w": 0, "v": 1, "head": None})
  state = tx.init(grads)
  run = inside(
    lambda g, s, p: ({"": (out := tx.update(g, s[""]))[0]}, {"": out[1]}), mesh_of(AxisType.Auto), {"": state}, specs
  )
  assert all_reduces(run, grads, {"": state}, grads) == 1


def test_inside_shard_map_large_leaves_are_read_again_where_a_sum_has_left_its_range(monkeypatch, layer_by_layer):
  monkeypatch.setattr(sums, "SMALL", 4)
  each = {name: transformations(axis_of)[name] for name in ("clip_by_leaf_norm", "watch")}
  init, update = all_of(each)
  states = init(some_tree(10.0))
  compare(inside(update, mesh_of(AxisType.Auto), states), states, layer_by_layer, lambda tree: tree, each)


def with_init_inside(tx, specs=INSIDE, **options):
  """A step that makes its own state, in a `shard_map`."""
  state = jax.eval_shape(tx.init, some_tree())
  out_specs = (specs, jax.tree.map(lambda _: P(), state))
  step = lambda grads: tx.update(grads, tx.init(grads), grads)  # noqa: E731
  return jax.jit(jax.shard_map(step, mesh=mesh_of(AxisType.Auto), in_specs=(specs,), out_specs=out_specs, **options))


HOLDS_ALL = re.escape(
  "`stacked` needs every layer on each device, got 'by_both' varying over ['a', 'b'] inside shard_map, where its type "
  "does not say which of its axes are sharded: pass the mesh axes that split a single layer as `axis_name`, () "
  "for none; or, for a transformation with a state, call `init` outside with whole parameters."
)
INIT = ["clip_by_leaf_norm", "clip_by_group_norm", "clip_by_block_rms", "watch"]


@pytest.mark.parametrize("name", cases(INIT, INIT[1:-1]))
def test_init_inside_shard_map_must_be_told_what_layers_are_spread_over(name, layer_by_layer):
  with pytest.raises(ValueError, match=f"^{HOLDS_ALL}"):
    with_init_inside(transformations(axis_of)[name])(some_tree())
  got = with_init_inside(transformations(axis_of, INSIDE_AXES)[name])(some_tree())
  if name != "watch":  # Of other parameters.
    assert_as_unrolled(jax.device_get(got), [part[name] for part in layer_by_layer[0]], axis_of)


def test_init_inside_shard_map_needs_nothing_where_every_device_holds_everything(layer_by_layer):
  whole = jax.tree.map(lambda _: P(), INSIDE)
  got = with_init_inside(transformations(axis_of)["clip_by_leaf_norm"], whole)(some_tree())
  assert_as_unrolled(jax.device_get(got), [part["clip_by_leaf_norm"] for part in layer_by_layer[0]], axis_of)


@pytest.mark.parametrize("check_vma", [True, False])
def test_leaf_norms_inside_shard_map(check_vma):
  def run(axis_name):
    norms = lambda tree: clipjax.leaf_norms(tree, stacked=axis_of, axis_name=axis_name)  # noqa: E731
    split = jax.shard_map(norms, mesh=mesh_of(AxisType.Auto), in_specs=(INSIDE,), out_specs=P(), check_vma=check_vma)
    return jax.jit(split)(some_tree())

  if check_vma:
    with pytest.raises(ValueError, match=f"^{HOLDS_ALL}"):
      run(None)
  else:
    with pytest.warns(UserWarning, match="pass the mesh axes that shard the leaves as `axis_name`"):
      run(None)
  assert_same_numbers(run(INSIDE_AXES), clipjax.leaf_norms(some_tree(), stacked=axis_of))


@pytest.mark.parametrize("name", list(transformations(None)))
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.filterwarnings("ignore:inside shard_map")  # The clip of units takes no name.
def test_layers_that_are_spread_over_devices_are_an_error_inside_shard_map(check_vma, name):
  tx = transformations(0, "a" if name != "adaptive_grad_clip" and not check_vma else None)[name]
  grads, specs = {"w": jnp.ones((LAYERS, 6))}, {"w": P("a")}
  state = tx.init(grads)
  message = re.escape(
    f"`updates` must have the {LAYERS} layers that `init` saw along axis 0 of 'w', got traced float32[1,6]: its layers "
    "are spread over devices; clip outside shard_map, under plain jit, where sharded arrays need no option."
  )
  split = jax.jit(
    jax.shard_map(
      tx.update, mesh=mesh_of(AxisType.Auto), in_specs=(specs, P(), specs), out_specs=P(), check_vma=check_vma
    )
  )
  with pytest.raises(ValueError, match=f"^{message}"):
    split(grads, state, grads)


def test_clip_of_units_is_an_error_inside_shard_map_wherever_its_state_was_made():
  tx = clipjax.adaptive_grad_clip(0.1, stacked=0)
  grads, specs = {"w": jnp.ones((LAYERS, 8))}, {"w": P(None, "a")}
  message = re.escape(
    "`updates` must not vary over mesh axes inside shard_map, got 'w' varying over ['a']: its type does not say which "
    "of its axes are sharded. Clip outside, under plain jit."
  )
  for state in (None, tx.init(grads)):

    def step(grads, state=state):
      return tx.update(grads, tx.init(grads) if state is None else state, grads)[0]

    with pytest.raises(ValueError, match=f"^{message}"):
      jax.jit(jax.shard_map(step, mesh=mesh_of(AxisType.Auto), in_specs=(specs,), out_specs=specs))(grads)


def test_pmap_of_layers_that_are_split_along_another_axis():
  rng = np.random.default_rng(0)
  whole = {
    "w": jnp.asarray(rng.standard_normal((LAYERS, 8, 3)), jnp.float32),
    "b": jnp.asarray(rng.standard_normal((LAYERS, 2)), jnp.float32),
  }
  apart = {"w": jnp.moveaxis(whole["w"], 1, 0), "b": jnp.broadcast_to(whole["b"], (8, LAYERS, 2))}
  tx = clipjax.clip_by_leaf_norm(1.0, stacked=0, axis_name={"w": "i", "b": ()})
  updates, state = jax.pmap(lambda grads: tx.update(grads, tx.init(grads)), axis_name="i")(apart)
  each = clipjax.clip_by_leaf_norm(1.0)
  layers = unrolled(whole, lambda name: 0)
  first = jax.tree.map(lambda x: x[0], state)
  joined = {"w": jnp.moveaxis(updates["w"], 0, 1), "b": updates["b"][5]}
  assert_as_unrolled((joined, first), jax.jit(each.update)(layers, each.init(layers)), lambda name: 0)


def test_gradient_through_a_clip_inside_shard_map():
  specs, axes = {"w": P(None, "a"), "k": P("a"), "head": P("a")}, {"w": 0, "k": 1, "head": None}
  shapes, rng = {"w": (LAYERS, 8), "k": (4, LAYERS, 3), "head": (8, 2)}, np.random.default_rng(0)
  grads, weights = ({n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()} for _ in range(2))
  ours, each = clipjax.clip_by_leaf_norm(1.0, stacked=axes), clipjax.clip_by_leaf_norm(1.0)
  state = ours.init(grads)

  def loss(clipped, weights):
    return sum(jnp.sum(clipped[name] * weights[name]) for name in clipped)

  def split(grads, weights):
    return jax.grad(lambda g: jax.lax.psum(loss(ours.update(g, state)[0], weights), "a"))(grads)

  run = jax.shard_map(split, mesh=mesh_of(AxisType.Auto), in_specs=(specs, specs), out_specs=specs)
  layers = [unrolled(tree, axes.get) for tree in (grads, weights)]
  want = jax.jit(jax.grad(lambda g: loss(each.update(g, each.init(g))[0], layers[1])))(layers[0])
  for got, wanted in zip(unrolled(jax.jit(run)(grads, weights), axes.get).values(), want.values(), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)  # Differences of terms as large as 1.
