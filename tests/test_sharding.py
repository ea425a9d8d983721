"""The same numbers wherever the leaves live: every transformation under jit, shard_map and pmap against one device.

Stacked layers too: under plain jit they may be spread over devices, inside `shard_map` every device must hold all.
"""

import pickle
import re
from inspect import ismodule

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import factories
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import TWO_OF_FOUR_DEVICES, everywhere, outputs_of_processes

import clipjax
from clipjax import rules
from clipjax.norms import sums

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Sharded over both axes, one, two at once and none; 0-d, 16-bit and empty leaves; as (shape, dtype, spec).
LEAVES = {
  "two_axes": ((8, 4), "float32", P("a", "b")),
  "one_axis": ((4, 3), "float32", P("a")),
  "both_at_once": ((16,), "float32", P(("a", "b"))),
  "three_axes": ((3, 4, 2), "bfloat16", P(None, "a", "b")),
  "scalar": ((), "float32", P()),
  "empty_shards": ((8, 0), "float32", P("a")),
}
SPECS = {name: spec for name, (_, _, spec) in LEAVES.items()}
AXES = {name: tuple(jax.tree.leaves(tuple(spec))) for name, spec in SPECS.items()}
MAGNITUDES = (1.0, 30.0, 1e28, 1e-28, 2.0)  # The second pass of the norm is taken too.


def some_tree(magnitude=1.0, seed=0):
  """Normal entries, and zeros that the first device has not, and knows by the count of another alone."""
  rng = np.random.default_rng(seed)
  tree = {name: np.asarray(rng.standard_normal(shape)) * magnitude for name, (shape, *_) in LEAVES.items()}
  tree["one_axis"][1] = 0
  return {name: jnp.asarray(x.astype(jnp.dtype(LEAVES[name][1]))) for name, x in tree.items()}


def transformations(axis_name=None):
  """Every clip, every rule and every wrapper by name; `axis_name` goes to each that takes it."""
  by = {"axis_name": axis_name}
  layers = {"stacked": lambda name, leaf: {"one_axis": 1, "three_axes": 0}.get(name), **by}  # Whole on every device.
  protected = optax.chain(clipjax.watch(history=3, **by), clipjax.clip_by_global_norm(0.5, **by), optax.adam(1e-3))
  return {
    "clip_by_global_norm": clipjax.clip_by_global_norm(0.5, **by),
    "clip_by_global_norm_3": clipjax.clip_by_global_norm(0.5, 3.0, **by),
    "clip_by_global_norm_inf": clipjax.clip_by_global_norm(0.5, jnp.inf, **by),
    "clip_by_leaf_norm": clipjax.clip_by_leaf_norm(0.5, **by),
    "clip_by_group_norm": clipjax.clip_by_group_norm(0.5, lambda path, leaf: path[0], **by),
    "clip_by_block_rms": clipjax.clip_by_block_rms(0.5, **by),
    "clip_by_value": clipjax.clip_by_value(rules.percentile(50.0, window=4), **by),
    "autoclip": clipjax.autoclip(50.0, **by),
    "zclip": clipjax.zclip(0.5, warmup_steps=1, max_norm=5.0, **by),
    "adagc": clipjax.adagc(warmup_steps=2, max_norm=0.5, **by),
    "watch": clipjax.watch(history=3, **by),
    "watch_global": clipjax.watch(per_leaf=False, **by),
    "clip_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(0.5, **by), optax.trace(0.9), **by),
    "skip_steps": clipjax.skip_steps(protected, norm_rule=rules.minimum(rules.percentile(80.0, window=8), 1e20), **by),
    "rule_quantile_tracking": clipjax.clip_by_global_norm(rules.quantile_tracking(0.5), **by),
    "rule_rolling_sigma": clipjax.clip_by_global_norm(rules.rolling_sigma(0.5, window=4, min_count=2), **by),
    "rule_schedule": clipjax.clip_by_global_norm(lambda count: 1.0 / (count + 1), **by),
    "rule_delayed": clipjax.clip_by_global_norm(rules.delayed(2, 0.5), **by),
    "layers": clipjax.clip_by_leaf_norm(0.5, **layers),
    "layers_inf": clipjax.clip_by_leaf_norm(0.5, jnp.inf, **layers),
    "layers_group": clipjax.clip_by_group_norm(0.5, lambda path, leaf: path[-3:], **layers),
    "layers_rms": clipjax.clip_by_block_rms(0.1, **layers),
    "layers_watch": clipjax.watch(history=3, **layers),
    "layers_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(0.5, **layers), optax.scale(0.5), **layers),
    **(under_jit() if axis_name is None else {}),
  }


def under_jit():
  """What has its layers, or its units, spread over devices, by name: plain jit alone can do it."""
  spread = {"two_axes": 0, "one_axis": 0, "three_axes": 2, "both_at_once": 0, "scalar": None, "empty_shards": 0}
  return {
    "spread_layers": clipjax.clip_by_leaf_norm(0.5, stacked=spread),
    "spread_watch": clipjax.watch(history=3, stacked=spread),
    "units_of_layers": clipjax.adaptive_grad_clip(0.1, stacked=spread),
  }


IN_OTHERS = {"percentile": "autoclip", "zscore": "zclip", "ema_ratio": "adagc", "minimum": "skip_steps"}
BETWEEN_PROCESSES = ["clip_by_leaf_norm", "skip_steps"]  # This has a watch, a clip and a rule.
RULES = [name for name in transformations() if name.startswith("rule_")]
BY_TYPES = ["clip_by_global_norm", "clip_by_value", "watch", "clip_effect", *BETWEEN_PROCESSES]
ELSEWHERE = ("clip_by_global_norm_3", "clip_by_global_norm_inf", "layers", "layers_inf")
MODES = {
  "auto": [*BETWEEN_PROCESSES, "spread_layers"],
  "explicit": [*BY_TYPES, "clip_by_global_norm_inf", "clip_by_group_norm", *under_jit()],
  # A rule sees norms, which know of no mesh, but the types of its state must agree.
  "shard_map": [*BY_TYPES, "clip_by_global_norm_3", "clip_by_block_rms", "zclip", "adagc", *RULES, "layers_inf"],
  # A name goes its own way through each factory.
  "unchecked": sorted({*transformations(())} - {*RULES, *ELSEWHERE}),
}


def all_steps(names, axis_name=None):
  """`(states, grads, params) -> (updates, states)` of some transformations at once, by name."""
  each = {name: tx for name, tx in transformations(axis_name).items() if name in names}

  def step(states, grads, params):
    out = {name: tx.update(grads, states[name], params) for name, tx in each.items()}
    return {name: u for name, (u, _) in out.items()}, {name: s for name, (_, s) in out.items()}

  return step, lambda params: {name: tx.init(params) for name, tx in each.items()}


def mesh_of(mode):
  kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
  return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)


def on_mesh(mesh, tree, specs=SPECS):
  def place(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: np.asarray(x)[index])

  return jax.tree.map(place, tree, specs)


@pytest.fixture(scope="module")
def on_one_device():
  """What every transformation gives on one device: a list of `(updates, states)` by step."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    step, init = map(jax.jit, all_steps(transformations()))
    states, out = init(some_tree()), []
    for i, magnitude in enumerate(MAGNITUDES):
      updates, states = step(states, some_tree(magnitude, seed=i), some_tree(10.0))
      out.append((updates, states))
    return out


def assert_close(got, want, rtol=1e-5):
  for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, want)), strict=True):
    is_compared = "effect" in jax.tree_util.keystr(path)  # Steps of a bfloat16 leaf, rounded to either side.
    tolerance = 2**-7 if a.dtype == jnp.bfloat16 else 1e-3 if is_compared else rtol
    a, b = (np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x) for x in (a, b))
    atol = tolerance * np.abs(b[np.isfinite(b)]).max(initial=0)  # Adam takes sums that nearly cancel.
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mode", MODES)
def test_every_transformation_gives_the_numbers_of_one_device(mode, on_one_device):
  assert run_and_compare(mode, MODES[mode], leaves_of(on_one_device, MODES[mode])) == set(MODES[mode])


def leaves_of(steps, names):
  """The arrays of some transformations in `(updates, states)` of each step, without their structure."""
  return jax.device_get([[jax.tree.leaves({name: part[name] for name in names}) for part in step] for step in steps])


@pytest.mark.parametrize(
  ("shape", "spec", "stack"), [((4, 6, 8), P("a", None, "b"), None), ((4, 2, 6, 8), P("a", None, None, "b"), 1)]
)
def test_units_of_an_array_whose_types_name_two_axes_are_clipped_as_on_one_device(shape, spec, stack):
  tx = clipjax.adaptive_grad_clip(0.01, stacked=None if stack is None else (lambda path, leaf: stack))
  tree = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)}
  want, want_state = tx.update(tree, tx.init(tree), tree)
  mesh = mesh_of("explicit")
  with jax.set_mesh(mesh):
    spread = on_mesh(mesh, tree, {"w": spec})
    got, state = jax.jit(tx.update)(spread, tx.init(spread), spread)
  assert_close(jax.device_get((got, state)), (want, want_state))
  assert int(state.clipped_steps) == 1


PROGRAM = f"""{TWO_OF_FOUR_DEVICES}
import pathlib
import pickle
import test_nan_in_a_shard
import test_sharding
want = pickle.loads(pathlib.Path("../want").read_bytes())
test_sharding.run_and_compare("auto", test_sharding.BETWEEN_PROCESSES, want)
with jax.enable_x64(True):
  test_nan_in_a_shard.check_all_shards("shard_map")
print("the same, and every NaN is seen")
"""


def test_two_processes_give_the_numbers_of_one_device_and_see_what_one_shard_holds(tmp_path, on_one_device):
  (tmp_path / "want").write_bytes(pickle.dumps(leaves_of(on_one_device, BETWEEN_PROCESSES)))
  outputs = outputs_of_processes(PROGRAM, 2, tmp_path / "two", timeout=300)
  assert [out.splitlines()[-1] for out in outputs] == ["the same, and every NaN is seen"] * 2


def run_and_compare(mode, names, on_one_device):
  """Runs transformations on eight devices, holds them to their `leaves_of` one, and gives the names of what it held."""
  mesh = mesh_of(mode)
  step, init = all_steps(names, AXES if mode == "unchecked" else None)
  params = on_mesh(mesh, some_tree(10.0))
  with jax.set_mesh(mesh):
    if mode not in ("auto", "explicit"):
      state_specs = {name: state_specs_of(state) for name, state in init(some_tree()).items()}
      out_specs = dict.fromkeys(names, SPECS), state_specs
      checked = mode == "shard_map"
      step = jax.shard_map(step, in_specs=(state_specs, SPECS, SPECS), out_specs=out_specs, check_vma=checked)
    step, states = jax.jit(step), init(params)
    for i, magnitude in enumerate(MAGNITUDES):
      updates, states = step(states, on_mesh(mesh, some_tree(magnitude, seed=i)), params)
      for got, want in zip((updates, states), on_one_device[i], strict=True):
        assert_close(jax.device_get(everywhere(got, mesh)), want)
  for name in names:  # Gradients stay where they were, states are everywhere.
    for leaf in SPECS.keys() - {"empty_shards"}:  # XLA makes a constant of an array without entries.
      spec = SPECS[leaf]
      assert updates[name][leaf].sharding.is_equivalent_to(NamedSharding(mesh, spec), updates[name][leaf].ndim)
    # The moments of Adam lie as the parameters do.
    numbers = jax.tree.leaves(without_moments(states[name]))
    assert numbers and all(x.sharding.is_fully_replicated for x in numbers), name
  assert int(states["clip_by_leaf_norm"].clipped_steps) == len(MAGNITUDES) - 1
  assert int(states["skip_steps"].skipped_steps) == 2  # 30.0 is above the percentile, 1e28 above the number.
  return set(updates) & set(states)


def without_moments(state):
  """A state without those of the optimizers in it."""
  return state._replace(**dict.fromkeys({"inner_state", "unclipped_state"}.intersection(state._fields)))


def state_specs_of(states):
  """All on every device, but for the moments of Adam, which lie as the parameters do."""
  return jax.tree.map(lambda x: SPECS if isinstance(x, dict) else P(), states, is_leaf=lambda x: isinstance(x, dict))


def test_every_clip_and_rule_is_among_them():
  ours = transformations()
  assert set(factories()) | set(IN_OTHERS.values()) <= set(ours)
  assert {name for name, rule in vars(rules).items() if name[0].islower() and not ismodule(rule)} <= {
    *IN_OTHERS, *(name.removeprefix("rule_") for name in ours),
  }  # fmt: skip


# By hand, and pmap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_name", [("i",), {"split": ("i",), "whole": None}])
def test_pmap_takes_a_tuple_or_a_tree(axis_name):
  grads = {"split": jnp.arange(1.0, 25.0).reshape(8, 3), "whole": jnp.array([2.0, 3.0])}
  parts = jnp.diag(grads["whole"]) if axis_name == ("i",) else jnp.broadcast_to(grads["whole"], (8, 2))
  whole = jnp.zeros((8, 2)).at[: len(parts)].set(parts)
  tx = optax.chain(clipjax.watch(axis_name=axis_name), clipjax.clip_by_global_norm(0.5, axis_name=axis_name))

  def step(grads):
    updates, state = tx.update(grads, tx.init(grads))
    clipped, norm = clipjax.clip_grad_norm(grads, 0.5, axis_name=axis_name)
    return updates, clipped, norm, clipjax.metrics(state)["grad/norm"], clipjax.leaf_norms(grads, axis_name=axis_name)

  updates, clipped, *norms, by_leaf = jax.pmap(step, axis_name="i")({"split": grads["split"], "whole": whole})
  want = float(clipjax.global_norm(grads))
  np.testing.assert_allclose(norms, np.full((2, 8), want), rtol=1e-6)
  np.testing.assert_allclose(updates["split"], grads["split"] * (0.5 / want), rtol=1e-6)
  chex.assert_trees_all_close(updates, clipped)
  np.testing.assert_allclose(by_leaf["whole"], np.full(8, np.hypot(2.0, 3.0)), rtol=1e-6)


@pytest.mark.parametrize("axis_name", ["i", {"w": "i", "None": None, "tuple": None, "masked": None}])
def test_a_name_passes_over_what_is_no_leaf(axis_name):
  tree = {"None": None, "tuple": (), "masked": optax.MaskedNode(), "w": jnp.ones((8, 2))}
  norms = jax.pmap(lambda grads: clipjax.global_norm(grads, axis_name=axis_name), axis_name="i")(tree)
  np.testing.assert_allclose(norms, 4.0)


def test_with_the_types_on_a_name_sums_no_leaf_twice():
  mesh = mesh_of("auto")
  tree = {"split": jnp.arange(1.0, 9.0), "whole": jnp.array([2.0, 3.0])}

  def norms(tree):
    return clipjax.global_norm(tree, axis_name="a"), clipjax.global_norm(tree)

  specs = {"split": P("a"), "whole": P()}
  for norm in jax.shard_map(norms, mesh=mesh, in_specs=(specs,), out_specs=(P(), P()))(tree):
    np.testing.assert_allclose(norm, clipjax.global_norm(tree), rtol=1e-6)


# What must not be summed, and what must have been ---------------------------------------------------------------------


def test_examples_are_clipped_where_they_are():
  mesh = mesh_of("auto")
  rng = np.random.default_rng(0)
  grads = {"split": jnp.asarray(rng.standard_normal((8, 6)) * 3), "whole": jnp.asarray(rng.standard_normal(8))}
  want = clipjax.clip_grad_per_example(grads, 2.0)

  def run(specs, out_specs, check_vma=True, axis_name=None):
    def step(grads):
      total, norms = clipjax.clip_grad_per_example(grads, 2.0, axis_name=axis_name)
      return jax.lax.psum(total, "a"), norms

    split = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=(out_specs, P("a")), check_vma=check_vma)
    return jax.jit(split)(grads)

  for check_vma in (True, False):  # Data parallel.
    chex.assert_trees_all_close(run({"split": P("a"), "whole": P("a")}, P(), check_vma), want, rtol=1e-5)
  tensor_parallel = {"split": P("a", "b"), "whole": P("a")}, {"split": P("b"), "whole": P()}
  for check_vma in (True, False) if jax.__version_info__ >= (0, 9) else (False,):  # The docstring says why.
    got = run(*tensor_parallel, check_vma, {"split": "b", "whole": ()})
    chex.assert_trees_all_close(got, want, rtol=1e-5)
  message = (
    r"^`axis_name` must be given if leaves vary over different mesh axes, got 'split' over \['a', 'b'\] and 'whole' "
    r"over \['a'\]: pass the axes over which the gradient of one example is sharded\."
  )
  with pytest.raises(ValueError, match=message):
    run(*tensor_parallel)


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="JAX of before cannot sum what an explicit axis splits")
@pytest.mark.parametrize("spec", [P("a"), P("a", "b")])
def test_examples_that_an_explicit_axis_splits(spec):
  mesh = mesh_of("explicit")
  grads = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)) * 3, jnp.float32), "b": jnp.ones(8)}
  with jax.set_mesh(mesh):
    got = jax.jit(clipjax.clip_grad_per_example)(on_mesh(mesh, grads, {"w": spec, "b": P("a")}), 2.0)
  chex.assert_trees_all_close(got, clipjax.clip_grad_per_example(grads, 2.0), rtol=1e-5)


@pytest.mark.parametrize("axis_name", [None, "b"])
@pytest.mark.parametrize(
  "name", ["clip_by_global_norm", "clip_by_leaf_norm", "clip_by_value", "autoclip", "watch", "skip_steps", "of Optax"]
)
def test_a_gradient_that_is_not_reduced_is_an_error(name, axis_name):
  of_optax = clipjax.skip_steps(optax.sgd(1.0), axis_name=axis_name)
  tx = {**transformations(axis_name), "of Optax": of_optax}[name]
  params = {"w": jnp.ones(3)}

  def step(params, x):
    grads = {"w": params["w"] * x.sum()}  # What varies over the axis makes the product vary.
    return tx.update(grads, tx.init(params), params)[0]

  run = jax.jit(jax.shard_map(step, mesh=mesh_of("auto"), in_specs=(P(), P("a")), out_specs=P()))
  message = (
    r"`updates` must be reduced over the mesh axes that their parameters do not vary over, got 'w' varying over "
    r"\['a'\]: reduce it with jax.lax.pmean or psum first\."
  )
  with pytest.raises(ValueError, match=message):
    run(params, jnp.arange(4.0))


def test_a_loss_that_is_not_reduced_is_an_error_where_a_rule_needs_it():
  mesh = mesh_of("auto")

  def run(loss_rule, reduce):
    tx = clipjax.skip_steps(optax.sgd(1.0), loss_rule=loss_rule)

    def step(g, losses):
      loss = reduce(losses.sum())
      updates, state = tx.update(g, tx.init(g), g, value=loss)
      return updates, state.loss

    split = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("a")), out_specs=(P(), P()))
    return jax.jit(split)(jnp.ones(2), jnp.arange(4.0))

  with pytest.raises(ValueError, match=r"`value` must be the loss of the whole batch, got one that varies over the "):
    run(10.0, lambda loss: loss)
  updates, loss = run(10.0, lambda loss: jax.lax.psum(loss, "a"))
  np.testing.assert_allclose(updates, [-1.0, -1.0])
  assert loss == 6
  assert run(None, lambda loss: loss)[1] == 0  # It may be meant for the wrapped transformation.


# Collectives ----------------------------------------------------------------------------------------------------------


def collectives(step, grads, mesh, specs):
  """`(in the normal path, in all)`: the all-reduces of the compiled program; the second pass has its own."""
  run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=(specs, P())))
  text = run.lower(grads).compile().as_text()
  entry = text[text.index("\nENTRY ") :]
  return tuple(len(re.findall(r" all-reduce(?:-start)?\(", part)) for part in (entry, text))


@pytest.mark.parametrize(
  "name", ["clip_by_global_norm", "clip_by_leaf_norm", "clip_by_block_rms", "autoclip", "skip_steps"]
)
def test_one_all_reduce_for_each_set_of_axes_however_many_leaves(name):
  tx = transformations()[name]
  grads, specs = [jnp.ones((8, 4))] * 15, [P("a"), P("a", "b"), P()] * 5

  def step(grads):
    updates, state = tx.update(grads, tx.init(grads))
    return updates, state.norm

  assert collectives(step, grads, mesh_of("auto"), specs)[0] == 2


def test_the_second_read_of_large_leaves_has_as_many_collectives_again(monkeypatch):
  monkeypatch.setattr(sums, "SMALL", 4)
  grads, specs = [jnp.ones((8, 4))] * 10, [P("a")] * 10
  assert collectives(lambda g: (g, clipjax.global_norm(g)), grads, mesh_of("auto"), specs) == (1, 2)


def test_under_jit_alone_the_partitioner_sums_all_leaves_at_once():
  grads = [jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh_of("auto"), P("a", "b")))] * 10
  text = jax.jit(clipjax.global_norm).lower(grads).compile().as_text()
  # One for each axis of the mesh.
  assert len(re.findall(r" all-reduce(?:-start)?\(", text[text.index("\nENTRY ") :])) == 2
  assert "all-gather" not in text and "all-to-all" not in text
