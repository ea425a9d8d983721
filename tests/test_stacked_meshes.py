"""Stacked layers inside `shard_map`, where every device must hold them all, and in arrays of explicit types.

That each transformation gives the numbers of one device, test_sharding.py sees.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from unrolled import assert_as_unrolled, assert_same_numbers, unrolled

import clipjax
from clipjax.norms import sums

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYERS = 2
# (shape, dtype, axis of the layers, spec inside shard_map); both axes of the mesh have size 2.
LEAVES = {
  "by_both": ((LAYERS, 8), "float32", 0, P(None, ("a", "b"))),
  "last": ((3, 8, LAYERS), "bfloat16", 2, P(None, "b")),
  "one_each": ((LAYERS,), "float32", 0, P()),
  "single": ((8, 4), "float32", None, P("a", "b")),
}
INSIDE = {name: leaf[3] for name, leaf in LEAVES.items()}
INSIDE_AXES = {name: tuple(jax.tree.leaves(tuple(spec))) for name, spec in INSIDE.items()}


def axis_of(name, _=None):
  return LEAVES[name][2]


def some_tree(magnitude=1.0):
  rng = np.random.default_rng(0)
  return {
    name: jnp.asarray(np.asarray(rng.standard_normal(shape)) * magnitude, jnp.dtype(dtype))
    for name, (shape, dtype, *_) in LEAVES.items()
  }


def transformations(stacked, axis_name=None):
  """What takes `stacked=`, by name; the clip of units, which takes no `axis_name`, only where that is left out."""
  by = {"stacked": stacked, "axis_name": axis_name}
  return {
    "clip_by_leaf_norm": clipjax.clip_by_leaf_norm(0.5, **by),
    "clip_by_group_norm": clipjax.clip_by_group_norm(0.5, lambda name, _: name[-3:], **by),
    "clip_by_block_rms": clipjax.clip_by_block_rms(0.1, **by),
    "watch": clipjax.watch(history=3, **by),
    "clip_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(0.5, **by), optax.scale(0.5), **by),
    **({"adaptive_grad_clip": clipjax.adaptive_grad_clip(0.1, stacked=stacked)} if axis_name is None else {}),
  }


def mesh_of(kind):
  return jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def on_mesh(mesh, tree, specs):
  return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


# Explicit types -----------------------------------------------------------------------------------------------------


def test_arrays_of_explicit_types_need_no_mesh_around():
  shapes, specs = {"w": (LAYERS, 8), "gates": (LAYERS,)}, {"w": P("a", "b"), "gates": P("a")}
  grads = {name: jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
  placed = on_mesh(mesh_of(AxisType.Explicit), grads, specs)
  layers = unrolled(grads, lambda _: 0)
  tx, each = (clipjax.adaptive_grad_clip(0.1, stacked=stacked) for stacked in (0, None))
  got = jax.jit(tx.update)(placed, tx.init(placed), placed)
  assert_as_unrolled(jax.device_get(got), jax.jit(each.update)(layers, each.init(layers), layers), lambda _: 0)
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


def all_reduces(run, *args):
  return len(re.findall(r" all-reduce(?:-start)?\(", jax.jit(run).lower(*args).compile().as_text()))


@pytest.mark.parametrize("ord", [2, jnp.inf])
def test_all_layers_of_all_leaves_have_one_all_reduce(ord):
  grads = {"w": jnp.ones((LAYERS, 8, 2)), "v": jnp.ones((8, LAYERS)), "head": jnp.ones((8, 3))}
  specs = {"w": P(None, "a"), "v": P("a"), "head": P("a")}
  tx = clipjax.clip_by_leaf_norm(0.5, ord, stacked={"w": 0, "v": 1, "head": None})
  state = tx.init(grads)
  run = jax.shard_map(tx.update, mesh=mesh_of(AxisType.Auto), in_specs=(specs, P()), out_specs=(specs, P()))
  assert all_reduces(run, grads, state) == 1


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


@pytest.mark.parametrize("name", ["clip_by_leaf_norm", "clip_by_group_norm", "clip_by_block_rms", "watch"])
def test_init_inside_shard_map_must_be_told_what_layers_are_spread_over(name):
  with pytest.raises(ValueError, match=f"^{HOLDS_ALL}"):
    jax.eval_shape(with_init_inside(transformations(axis_of)[name]), some_tree())
  jax.eval_shape(with_init_inside(transformations(axis_of, INSIDE_AXES)[name]), some_tree())


@pytest.mark.parametrize(
  ("axis_name", "specs"), [(INSIDE_AXES, INSIDE), (None, dict.fromkeys(INSIDE, P()))], ids=["told", "all on each"]
)
def test_init_inside_shard_map(axis_name, specs):
  got = with_init_inside(transformations(axis_of, axis_name)["clip_by_leaf_norm"], specs)(some_tree())
  each, layers = clipjax.clip_by_leaf_norm(0.5), unrolled(some_tree(), axis_of)
  assert_as_unrolled(jax.device_get(got), jax.jit(each.update)(layers, each.init(layers)), axis_of)


@pytest.mark.parametrize("check_vma", [True, False])
def test_leaf_norms_inside_shard_map(check_vma, monkeypatch):
  def run(axis_name, magnitude=1.0):
    norms = lambda tree: clipjax.leaf_norms(tree, stacked=axis_of, axis_name=axis_name)  # noqa: E731
    split = jax.shard_map(norms, mesh=mesh_of(AxisType.Auto), in_specs=(INSIDE,), out_specs=P(), check_vma=check_vma)
    return jax.jit(split)(some_tree(magnitude))

  if check_vma:
    with pytest.raises(ValueError, match=f"^{HOLDS_ALL}"):
      run(None)
  else:
    with pytest.warns(UserWarning, match="pass the mesh axes that shard the leaves as `axis_name`"):
      run(None)
  want = {magnitude: clipjax.leaf_norms(some_tree(magnitude), stacked=axis_of) for magnitude in (1.0, 1e25, 1e-25)}
  monkeypatch.setattr(sums, "SMALL", 4)  # Large leaves are read again where a sum has left its range.
  for magnitude, norms in want.items():
    assert_same_numbers(run(INSIDE_AXES, magnitude), norms)


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
