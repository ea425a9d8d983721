"""A NaN or an inf is seen wherever it lies in a leaf that is spread over eight devices, or over two processes."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases, oracle_norm
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import everywhere

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")

ORDERS = (2, math.inf, -math.inf, 0, 0.5)
VALUES = (math.nan, math.inf, -math.inf)
DEVICES = 8
SPEC = {"split": P("d"), "whole": P()}
MODES = ("auto", "explicit", "shard_map", "unchecked")


def some_grads(value=1.0, shard=0):
  """A leaf of two rows a shard, with a value at the end of one shard, and one that every device holds whole."""
  split = np.linspace(1.0, 2.0, 6 * DEVICES, dtype=np.float32).reshape(2 * DEVICES, 3)
  split[2 * shard + 1, 2] = value
  return {"split": split, "whole": np.full(4, 0.5, np.float32)}


def everything(axis_name, grads):
  """What each entry says of a gradient: numbers that know whether it is finite, and clipped gradients."""
  by = {"axis_name": axis_name}
  clips = {
    "by_value": clipjax.clip_by_value(1.0, **by),
    "by_inf_norm_propagate": clipjax.clip_by_global_norm(1.0, jnp.inf, **by),
    "by_inf_norm_zero": clipjax.clip_by_global_norm(1.0, jnp.inf, on_nonfinite="zero", **by),
    "by_leaf_inf_norm": clipjax.clip_by_leaf_norm(1.0, jnp.inf, on_nonfinite="zero", **by),
    "watch": clipjax.watch(**by),
    "skip_steps": clipjax.skip_steps(optax.sgd(1.0), **by),
    "clip_effect": clipjax.clip_effect(clipjax.clip_by_value(1.0, **by), optax.sgd(1.0), **by),
  }
  updates, states = {}, {}
  for name, tx in clips.items():
    updates[name], states[name] = tx.update(grads, tx.init(grads), grads)
  return {
    "norms": [clipjax.global_norm(grads, p, **by) for p in ORDERS],
    "leaf_norms": [clipjax.leaf_norms(grads, p, **by) for p in ORDERS],
    "updates": updates,
    "nonfinite_steps": {name: s.nonfinite_steps for name, s in states.items() if name != "skip_steps"},
    "skipped": states["skip_steps"].skipped_steps,
    "first_bad": {name: states[name].nonfinite_leaf for name in states if name.startswith("by_")},
  }


def place(mesh, tree):
  def on_devices(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

  return jax.tree.map(on_devices, tree, SPEC)


def mesh_of(mode):
  return jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Explicit if mode == "explicit" else AxisType.Auto,))


def runner(mode):
  """`grads -> everything` in one of the ways to spread them, compiled once."""
  mesh = mesh_of(mode)
  if mode in ("auto", "explicit"):
    step = jax.jit(partial(everything, None))
  else:
    checked = mode == "shard_map"
    body = partial(everything, None if checked else {"split": "d", "whole": None})
    shapes = jax.eval_shape(partial(everything, None), some_grads())
    specs = {**jax.tree.map(lambda _: P(), shapes), "updates": dict.fromkeys(shapes["updates"], SPEC)}
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(SPEC,), out_specs=specs, check_vma=checked))

  def run_on_mesh(grads):
    with jax.set_mesh(mesh):
      return everywhere(step(place(mesh, grads)), mesh)

  return run_on_mesh


def check_all_shards(mode):
  """Every value in every shard, and none."""
  run = runner(mode)
  check(run(some_grads()), some_grads(), finite=True)
  for value in VALUES:
    for shard in range(DEVICES):
      grads = some_grads(value, shard)
      check(run(grads), grads, finite=False)


def check(out, grads, finite):
  out = jax.device_get(out)
  for p, norm, by_leaf in zip(ORDERS, out["norms"], out["leaf_norms"], strict=True):
    np.testing.assert_allclose(norm, oracle_norm(grads, p), rtol=1e-5, err_msg=f"order {p}")
    for name, x in grads.items():
      np.testing.assert_allclose(by_leaf[name], oracle_norm(x, p), rtol=1e-5, err_msg=f"order {p} of {name}")
  assert {int(n) for n in out["nonfinite_steps"].values()} == {int(not finite)}
  assert out["skipped"] == int(not finite)
  assert {int(i) for i in out["first_bad"].values()} == {-1 if finite else 0}
  if finite:
    return
  updates = out["updates"]
  np.testing.assert_array_equal(updates["by_value"]["split"], np.clip(grads["split"], -1, 1))
  for name, want in (("by_inf_norm_propagate", math.nan), ("by_inf_norm_zero", 0), ("by_leaf_inf_norm", 0)):
    for leaf, x in updates[name].items():
      np.testing.assert_array_equal(x, np.full_like(grads[leaf], want))
  for leaf, x in updates["skip_steps"].items():
    np.testing.assert_array_equal(x, np.zeros_like(grads[leaf]))


@pytest.mark.parametrize("mode", MODES)
def test_every_order_and_every_entry_sees_what_one_shard_holds(mode):
  check_all_shards(mode)


@pytest.mark.parametrize("mode", cases(["auto", "explicit"], {"auto"}))
@pytest.mark.parametrize("ord", [2, jnp.inf])
def test_an_error_names_the_leaf_of_the_shard(mode, ord):
  mesh, tx = mesh_of(mode), clipjax.clip_by_leaf_norm(1.0, ord, on_nonfinite="error")
  with jax.set_mesh(mesh):
    for value in (math.nan, -math.inf):
      grads = place(mesh, some_grads(value, 5))
      with pytest.raises(FloatingPointError, match=r"in 'split': "):
        clipjax.clip_grad_norm(grads, 1.0, ord, on_nonfinite="error")
      with pytest.raises(FloatingPointError, match=r"in 'split': "):
        tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize(("spec", "axis"), [(P("d", None), 0), (P(None, "d"), 1)])
def test_agc_sees_what_one_shard_holds(mode, spec, axis):
  mesh = mesh_of(mode)
  tx = clipjax.adaptive_grad_clip(0.1, on_nonfinite="zero")
  step = jax.jit(lambda grads, params: tx.update({"w": grads}, tx.init({"w": grads}), {"w": params}))
  for where, value, shard in itertools.product(("grads", "params"), VALUES, range(DEVICES)):
    both = {name: np.ones((16, 16), np.float32) for name in ("grads", "params")}
    both[where][tuple(np.roll((2 * shard, 3), axis))] = value
    with jax.set_mesh(mesh):
      updates, state = step(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in both.values()))
    if where == "grads" or math.isnan(value):
      np.testing.assert_array_equal(updates["w"], np.zeros((16, 16)))
      assert state.nonfinite_steps == 1
    else:  # An infinite parameter is an infinite limit.
      assert np.isfinite(state.norm)
