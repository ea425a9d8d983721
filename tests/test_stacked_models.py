"""Models that scan over their layers, of each library: the same steps as of the model unrolled, and layers by name.

Every model is trained for some steps with a watch and clips that know of its layers. The oracle gets the same gradients
with each layer as a leaf of its own, and knows nothing of layers.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import cases
from jax import lax
from unrolled import assert_as_unrolled, slices_of, unrolled

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # As users have it; the libraries need it.

LAYERS, WIDTH, STEPS = 2, 4, 4


def batches():
  """Inputs and targets of few examples, so that norms rise and fall from step to step."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(STEPS, 3, WIDTH)), rng.normal(size=(STEPS, 3, 2))
  return list(zip(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), strict=True))


def optimizer(stacked=None, *, units=False):
  """Norms by layer in a watch, under a rule with averages, and, with `units`, of units against their parameters."""
  of_units = [clipjax.adaptive_grad_clip(0.3, stacked=stacked, name="units")] if units else []
  rule = clipjax.adagc(1.01, warmup_steps=1, max_norm=10.0, stacked=stacked)
  return optax.chain(clipjax.watch(stacked=stacked, history=2), rule, *of_units, optax.sgd(0.1))


def with_bad_layer(grads, leaf, axis, layer):
  """The gradients with NaN in one layer of one leaf."""

  def mended(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return x.at[(slice(None),) * axis + (layer,)].set(jnp.nan) if name in (leaf, f"{leaf}/value") else x

  return jax.tree_util.tree_map_with_path(mended, grads)


def assert_trains_as_unrolled(gradient, params, stacked, axis_of, bad, *, plain=lambda tree: tree, units=False):
  """Trains a model beside itself unrolled, and at last with a layer that is not finite.

  Args:
    gradient: `(params, x, y) -> grads`, in which a leaf may be None.
    params: of the model.
    stacked: what the clips are told.
    axis_of: `name -> axis of its layers or None`.
    bad: a leaf, the axis of its layers and the layer that becomes NaN.
    plain: takes boxes off a tree.
    units: whether the units of layers are clipped too.
  """
  tx, each = optimizer(stacked, units=units), optimizer(units=units)
  layers = lambda tree: unrolled(plain(tree), axis_of, LAYERS)  # noqa: E731
  state, of_each = tx.init(params), each.init(layers(params))
  gradient, update, update_each = jax.jit(gradient), jax.jit(tx.update), jax.jit(each.update)
  for x, y in batches():
    grads = gradient(params, x, y)
    updates, state = update(grads, state, params)
    want, of_each = update_each(layers(grads), of_each, layers(params))
    assert_as_unrolled((plain(updates), state), (want, of_each), axis_of, LAYERS)
    params = jax.tree.map(lambda p, u: p if u is None else p + u, params, updates, is_leaf=lambda x: x is None)
  assert update._cache_size() == 1
  names = slices_of(state)[0]
  assert sum("[" in name for name in names) >= LAYERS
  scale, norms = np.asarray(state[1].scale), np.asarray(state[0].norms)
  assert 0 < np.sum(scale < 1) < scale.size
  assert np.unique(norms[norms > 0]).size == np.sum(norms > 0)  # What is exchanged would be seen.
  assert clipjax.metrics(state, per_leaf=True).keys() == clipjax.metrics(of_each, per_leaf=True).keys()
  _, state = update(with_bad_layer(grads, *bad), state, params)
  with pytest.raises(FloatingPointError) as error:
    clipjax.raise_if_nonfinite(state)
  name = f"{bad[0]}[{bad[2]}]"
  assert str(error.value).startswith(f"step {STEPS + 1} of 'grad' was not finite: norm nan, in leaf '{name}'. ")
  assert clipjax.metrics(state, per_leaf=True)[f"grad/nonfinite/{name}"] > 0
  return names


# Flax Linen ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
  """A layer, whose weights may be in boxes with the names of their axes, but not its biases."""

  boxed: object

  @nn.compact
  def __call__(self, x, _):
    init = nn.initializers.lecun_normal()
    kernel_init = self.boxed(init, ("in", "out"))
    return x + jnp.tanh(nn.Dense(WIDTH, kernel_init=kernel_init, name="dense")(x)), None


class Scanned(nn.Module):
  """A scan over layers, of parameters that are stacked along an axis."""

  boxed: object
  axis: int

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      Block,
      variable_axes={"params": self.axis},
      split_rngs={"params": True},
      length=LAYERS,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return nn.Dense(2, name="head")(scan(self.boxed, name="blocks")(x, None)[0])


def in_blocks(axis):
  return lambda name, leaf=None: axis if name.startswith("blocks/") else None


def linen(boxed, axis):
  """The parameters of a model, and its gradient."""
  model = Scanned(boxed, axis)
  params = model.init(jax.random.key(0), batches()[0][0])["params"]
  loss = lambda params, x, y: jnp.mean((model.apply({"params": params}, x) - y) ** 2)  # noqa: E731
  return params, jax.grad(loss)


# Axis 1 is where MaxText has its layers.
BOXES = [(nn.with_logical_partitioning, 1), (nn.with_partitioning, 0)]


@pytest.mark.parametrize(("boxed", "axis"), cases(BOXES, BOXES[1:]))
def test_linen_by_the_name_of_the_axis(boxed, axis):
  params, gradient = linen(boxed, axis)
  # A bias has no box, and with it no name: its layers are one leaf.
  axis_of = {"blocks/dense/kernel": axis}.get
  bad = ("blocks/dense/kernel", axis, 1)
  names = assert_trains_as_unrolled(gradient, params, "layers", axis_of, bad, plain=nn.meta.unbox)
  kernels = (f"blocks/dense/kernel[{i}]" for i in range(LAYERS))
  assert names == ("blocks/dense/bias", *kernels, "head/bias", "head/kernel")


# Flax NNX ------------------------------------------------------------------------------------------------------------


class NNXBlock(nnx.Module):
  def __init__(self, rngs):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, kernel_init=init)


class NNXScanned(nnx.Module):
  """Layers that `nnx.vmap` has made, along axis 1 of weights, and `nnx.scan` goes over."""

  def __init__(self):
    rngs, named = nnx.Rngs(0), {nnx.PARTITION_NAME: "layers"}
    make = nnx.vmap(NNXBlock, in_axes=0, out_axes=1, transform_metadata=named)
    self.blocks = nnx.split_rngs(splits=LAYERS)(make)(rngs)
    self.head = nnx.Linear(WIDTH, 2, rngs=rngs)
    self._scan = nnx.scan(
      lambda block, x: x + jnp.tanh(block.linear(x)),
      in_axes=(1, nnx.Carry),
      out_axes=nnx.Carry,
      transform_metadata=named,
    )

  def __call__(self, x):
    return self.head(self._scan(self.blocks, x))


def test_nnx_by_the_name_of_the_axis():
  with nnx.use_eager_sharding(False):  # Else names of axes would have to be those of devices.
    graph, params = nnx.split(NNXScanned())

    def gradient(params, x, y):
      return nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(nnx.merge(graph, params))

    axis_of, bad = {"blocks/linear/kernel": 1}.get, ("blocks/linear/kernel", 1, 1)
    names = assert_trains_as_unrolled(gradient, params, "layers", axis_of, bad, plain=nnx.to_pure_dict)
  kernels = (f"blocks/linear/kernel[{i}]" for i in range(LAYERS))
  assert names == ("blocks/linear/bias", *kernels, "head/bias", "head/kernel")


# Equinox -------------------------------------------------------------------------------------------------------------


class EquinoxBlock(eqx.Module):
  linear: eqx.nn.Linear
  gate: jax.Array  # One number a layer.
  activation: object

  def __init__(self, key):
    self.linear = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key)
    self.gate, self.activation = jax.random.uniform(key), jnp.tanh


class EquinoxScanned(eqx.Module):
  """Layers that `filter_vmap` has made, a count that is no float, and what is None where arrays are asked for."""

  blocks: EquinoxBlock
  head: eqx.nn.Linear
  calls: jax.Array

  def __init__(self, key):
    keys = jax.random.split(key, LAYERS)
    self.blocks = eqx.filter_vmap(EquinoxBlock)(keys)
    self.head = eqx.nn.Linear(WIDTH, 2, key=key)
    self.calls = jnp.zeros((LAYERS,), jnp.int32)

  def __call__(self, x):
    arrays, static = eqx.partition(self.blocks, eqx.is_array)

    def layer(x, arrays):
      block = eqx.combine(arrays, static)
      return x + block.gate * block.activation(block.linear(x)), None

    return self.head(lax.scan(layer, x, arrays)[0])


def test_equinox():
  model = EquinoxScanned(jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  nowhere = jax.tree.map(lambda _: None, params)
  each_leaf = eqx.tree_at(
    lambda m: m.blocks, nowhere, jax.tree.map(lambda _: 0, params.blocks), is_leaf=lambda x: x is None
  )
  all_blocks = eqx.tree_at(lambda m: m.blocks, nowhere, 0)
  loss = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)  # noqa: E731

  def gradient(params, x, y):
    return eqx.filter_grad(loss)(eqx.combine(params, static), x, y)

  assert jax.eval_shape(gradient, params, *batches()[0]).blocks.activation is None and params.calls is None
  names = assert_trains_as_unrolled(gradient, params, all_blocks, in_blocks(0), ("blocks/gate", 0, 1))
  weights, gates = ([f"blocks/{kind}[{i}]" for i in range(LAYERS)] for kind in ("linear/weight", "gate"))
  assert names == (*weights, *gates, "head/weight", "head/bias")
  for axes in (in_blocks(0), each_leaf):
    assert clipjax.watch(stacked=axes).init(params).labels.slices == names


# Plain JAX -----------------------------------------------------------------------------------------------------------


def plain_model():
  """Parameters and loss of a scan over layers, of which each has a part of rank one, as LoRA adds it."""
  rng = np.random.default_rng(2)
  shapes = {
    "blocks": {"w": (LAYERS, WIDTH, WIDTH), "b": (WIDTH, LAYERS), "lora": (LAYERS, WIDTH)},
    "head": (WIDTH, 2),
  }
  normal = lambda shape: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)  # noqa: E731
  params = jax.tree.map(normal, shapes, is_leaf=lambda x: isinstance(x, tuple))

  def loss(params, x, y):
    def layer(x, block):
      w, b, lora = block
      return x + jnp.tanh(x @ (w + jnp.outer(lora, lora)) + b), None

    blocks = params["blocks"]
    x, _ = lax.scan(layer, x, (blocks["w"], blocks["b"].T, blocks["lora"]))
    return jnp.mean((x @ params["head"] - y) ** 2)

  return params, loss


AXES = {"blocks": {"w": 0, "b": 1, "lora": -2}, "head": None}


def axis_of_plain(name, leaf=None):
  return None if name == "head" else AXES["blocks"][name.split("/")[1]]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_scan_of_plain_jax_whose_frozen_stacks_have_no_gradient(frozen):
  params, loss = plain_model()
  is_trained = {"blocks": {"w": not frozen, "b": not frozen, "lora": True}, "head": not frozen}

  def gradient(params, x, y):
    trained, rest = eqx.partition(params, is_trained)
    return jax.grad(lambda trained: loss(eqx.combine(trained, rest), x, y))(trained)

  assert (jax.eval_shape(gradient, params, *batches()[0])["blocks"]["w"] is None) == frozen
  names = assert_trains_as_unrolled(gradient, params, AXES, axis_of_plain, ("blocks/lora", 0, 1), units=frozen)
  assert names == (*(f"blocks/{leaf}[{i}]" for leaf in ("b", "lora", "w") for i in range(LAYERS)), "head")
