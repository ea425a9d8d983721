"""The same numbers wherever the leaves live: every transformation under jit, shard_map and pmap against one device."""

import pickle
import re
from inspect import ismodule

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases, factories
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import TWO_OF_FOUR_DEVICES, outputs_of_processes

import clipjax
from clipjax import rules
from clipjax.norms import sums

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Sharded over both axes, one, two at once and none; 0-d, 16-bit and empty leaves; as (shape, dtype, spec).
LEAVES = {
  "two_axes": ((8, 4), "float32", P("a", "b")),
  "one_axis": ((4, 3), "float32", P("a")),
  "both_at_once": ((16,), "float32", P(("a", "b"))),
  "second_axis": ((3, 2), "bfloat16", P(None, "b")),
  "whole": ((5,), "float32", P()),
  "scalar": ((), "float32", P()),
  "empty_shards": ((8, 0), "float32", P("a")),
  "zeros": ((4,), "float32", P("a")),
}
SPECS = {name: spec for name, (_, _, spec) in LEAVES.items()}
AXES = {name: tuple(jax.tree.leaves(tuple(spec))) for name, spec in SPECS.items()}
MAGNITUDES = (1.0, 30.0, 1e28, 1e-28, 2.0)  # The second pass of the norm is taken too.
MODES = ("auto", "explicit", "shard_map", "unchecked")


def some_tree(magnitude=1.0, seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray((rng.standard_normal(shape) * magnitude * (name != "zeros")).astype(jnp.dtype(dtype)))
    for name, (shape, dtype, _) in LEAVES.items()
  }


def transformations(axis_name=None):
  """Every clip, every rule and every wrapper by name; `axis_name` goes to each."""
  by = {"axis_name": axis_name}
  each_rule = {
    "percentile": rules.percentile(50.0, window=4),
    "quantile_tracking": rules.quantile_tracking(0.5),
    "zscore": rules.zscore(0.5, warmup_steps=1),
    "rolling_sigma": rules.rolling_sigma(0.5, window=4, min_count=2),
    "ema_ratio": rules.ema_ratio(1.0, decay=0.5, warmup_steps=1, max_norm=1.0),
    "constant": 0.5,
    "schedule": lambda count: 1.0 / (count + 1),
    "minimum": rules.minimum(rules.zscore(), 0.5),
    "delayed": rules.delayed(2, 0.5),
  }
  protected = optax.chain(clipjax.watch(history=3, **by), clipjax.clip_by_global_norm(0.5, **by), optax.adam(1e-3))
  return {
    "clip_by_global_norm": clipjax.clip_by_global_norm(0.5, **by),
    "clip_by_global_norm_1": clipjax.clip_by_global_norm(0.5, 1, **by),
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
    **{f"rule_{name}": clipjax.clip_by_global_norm(rule, **by) for name, rule in each_rule.items()},
  }


FEW = ["clip_by_global_norm", "clip_by_leaf_norm", "clip_by_value", "autoclip", "watch", "skip_steps"]
BETWEEN_PROCESSES = ["clip_by_global_norm", "clip_by_leaf_norm", "skip_steps"]  # The last has a watch and a rule.


def without_rules():
  """The clips and wrappers with which leaves are measured in every way: a rule sees norms, which know of no mesh."""
  return [name for name in transformations() if not name.startswith("rule_")]


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


def run_on_one_device():
  """What every transformation gives on one device: a list of `(updates, states)` by step."""
  step, init = all_steps(transformations())
  step, states, out = jax.jit(step), init(some_tree()), []
  for i, magnitude in enumerate(MAGNITUDES):
    updates, states = step(states, some_tree(magnitude, seed=i), some_tree(10.0))
    out.append((updates, states))
  return out


@pytest.fixture(scope="module")
def on_one_device():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return run_on_one_device()


def assert_close(got, want, rtol=1e-5):
  for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, want)), strict=True):
    is_compared = "clip_effect" in jax.tree_util.keystr(path)  # Steps of a bfloat16 leaf, rounded to either side.
    tolerance = 2**-7 if a.dtype == jnp.bfloat16 else 1e-3 if is_compared else rtol
    a, b = (np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x) for x in (a, b))
    atol = tolerance * np.abs(b[np.isfinite(b)]).max(initial=0)  # Adam takes sums that nearly cancel.
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mode", cases(MODES, {"unchecked"}))
def test_every_transformation_gives_the_numbers_of_one_device(mode, on_one_device):
  names = list(transformations()) if mode in ("auto", "shard_map") else without_rules()
  assert run_and_compare(mode, names, leaves_of(on_one_device, names)) == set(names)


def leaves_of(steps, names):
  """The arrays of some transformations in `(updates, states)` of each step, without their structure."""
  return jax.device_get([[jax.tree.leaves({name: part[name] for name in names}) for part in step] for step in steps])


PROGRAM = f"""{TWO_OF_FOUR_DEVICES}
import pathlib
import pickle
import test_sharding
want = pickle.loads(pathlib.Path("../want").read_bytes())
for mode in ("auto", "shard_map"):
  test_sharding.run_and_compare(mode, test_sharding.BETWEEN_PROCESSES, want)
print("the same")
"""


def test_two_processes_give_the_numbers_of_one_device(tmp_path, on_one_device):
  (tmp_path / "want").write_bytes(pickle.dumps(leaves_of(on_one_device, BETWEEN_PROCESSES)))
  outputs = outputs_of_processes(PROGRAM, 2, tmp_path / "two", timeout=300)
  assert [out.splitlines()[-1] for out in outputs] == ["the same"] * 2


def run_and_compare(mode, names, on_one_device):
  """Runs transformations on eight devices, holds them to their `leaves_of` one, and gives the names of what it held."""
  mesh = mesh_of(mode)
  step, init = all_steps(names, AXES if mode == "unchecked" else None)
  params = on_mesh(mesh, some_tree(10.0))
  with jax.set_mesh(mesh):
    if mode in ("auto", "explicit"):
      run = jax.jit(step)
    else:
      state_specs = {name: state_specs_of(state) for name, state in init(some_tree()).items()}
      update_specs = dict.fromkeys(names, SPECS)
      run = jax.jit(
        jax.shard_map(
          step,
          in_specs=(state_specs, SPECS, SPECS),
          out_specs=(update_specs, state_specs),
          check_vma=mode == "shard_map",
        )
      )
    states = init(params)
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))  # Every process can read it.
    for i, magnitude in enumerate(MAGNITUDES):
      updates, states = run(states, on_mesh(mesh, some_tree(magnitude, seed=i)), params)
      for got, want in zip((updates, states), on_one_device[i], strict=True):
        assert_close(jax.device_get(whole(got)), want)
  for name in names:  # Gradients stay where they were, states are everywhere.
    for leaf in SPECS.keys() - {"empty_shards"}:  # XLA makes a constant of an array without entries.
      spec = SPECS[leaf]
      assert updates[name][leaf].sharding.is_equivalent_to(NamedSharding(mesh, spec), updates[name][leaf].ndim)
    # The moments of Adam lie as the parameters do.
    numbers = jax.tree.leaves(without_moments(states[name]))
    assert numbers and all(x.sharding.is_fully_replicated for x in numbers), name
  assert int(states["clip_by_global_norm"].clipped_steps) == len(MAGNITUDES) - 1
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
  assert set(factories()) <= set(ours)
  assert {f"rule_{name}" for name, rule in vars(rules).items() if name[0].islower() and not ismodule(rule)} <= set(ours)


# By hand, and pmap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_name", ["i", ("i",), {"split": "i", "whole": ()}, {"split": ("i",), "whole": None}])
def test_pmap_takes_a_name_a_tuple_or_a_tree(axis_name):
  whole_is_split = not isinstance(axis_name, dict)
  grads = {"split": jnp.arange(1.0, 25.0).reshape(8, 3), "whole": jnp.array([2.0, 3.0])}
  split = grads["whole"].reshape(1, 2) * jnp.eye(8, 1) if whole_is_split else jnp.broadcast_to(grads["whole"], (8, 2))
  tx = optax.chain(clipjax.watch(axis_name=axis_name), clipjax.clip_by_global_norm(0.5, axis_name=axis_name))

  def step(grads):
    updates, state = tx.update(grads, tx.init(grads))
    clipped, norm = clipjax.clip_grad_norm(grads, 0.5, axis_name=axis_name)
    by_leaf = clipjax.leaf_norms(grads, axis_name=axis_name)
    return updates, clipped, norm, clipjax.metrics(state)["grad/norm"], by_leaf

  updates, clipped, norm, recorded, by_leaf = jax.pmap(step, axis_name="i")({"split": grads["split"], "whole": split})
  want = float(clipjax.global_norm(grads))
  for values in (norm, recorded):
    np.testing.assert_allclose(values, np.full(8, want), rtol=1e-6)
  np.testing.assert_allclose(updates["split"], grads["split"] * (0.5 / want), rtol=1e-6)
  chex.assert_trees_all_close(updates, clipped)
  np.testing.assert_allclose(by_leaf["whole"], np.full(8, np.hypot(2.0, 3.0)), rtol=1e-6)


def test_without_checks_a_missing_axis_name_is_a_warning_and_an_empty_one_is_none():
  def run(axis_name):
    tx = clipjax.clip_by_global_norm(0.5, axis_name=axis_name)

    def step(grads):
      return tx.update(grads, tx.init(grads))[1].norm[None]

    split = jax.shard_map(step, mesh=mesh_of("auto"), in_specs=P("a"), out_specs=P("a"), check_vma=False)
    return jax.jit(split)(jnp.full(8, 3.0))

  with pytest.warns(UserWarning, match=r"each device computes its own norm: pass the mesh axes"):
    run(None)
  np.testing.assert_allclose(run(()), run(()).mean())  # Warnings are errors here: there is none.


@pytest.mark.parametrize("nothing", [None, (), optax.MaskedNode()], ids=["None", "tuple", "masked"])
@pytest.mark.parametrize("axis_name", ["i", {"w": "i", "nothing": None}])
def test_a_name_passes_over_what_is_no_leaf(nothing, axis_name):
  tree = {"nothing": nothing, "w": jnp.ones((8, 2))}
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


@pytest.mark.parametrize("shape", [(8, 1), (1, 4), (4, 2), (2, 2)])
def test_meshes_of_other_shapes_with_axes_of_size_one(shape):
  mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: np.prod(shape)])
  names = [n for n, (size, _, _) in LEAVES.items() if n not in ("one_axis", "zeros", "second_axis")]
  tree = {n: some_tree()[n] for n in names}
  specs = {n: SPECS[n] for n in names}

  @jax.jit
  def norms(tree):
    return [(clipjax.global_norm(tree, ord), clipjax.leaf_norms(tree, ord)) for ord in (1, 2, 3.0, jnp.inf)]

  out_specs = [(P(), dict.fromkeys(names, P()))] * 4
  run = jax.jit(jax.shard_map(norms, mesh=mesh, in_specs=(specs,), out_specs=out_specs))
  chex.assert_trees_all_close(run(tree), norms(tree), rtol=1e-6)


# What must not be summed, and what must have been ---------------------------------------------------------------------


def test_examples_are_clipped_where_they_are():
  mesh = mesh_of("auto")
  rng = np.random.default_rng(0)
  grads = {"split": jnp.asarray(rng.standard_normal((8, 6)) * 3), "whole": jnp.asarray(rng.standard_normal(8))}
  want, want_norms = clipjax.clip_grad_per_example(grads, 2.0)
  specs = {"split": P("a"), "whole": P("a")}

  def data_parallel(grads):
    total, norms = clipjax.clip_grad_per_example(grads, 2.0)
    return jax.lax.psum(total, "a"), norms

  for check_vma in (True, False):
    run = jax.shard_map(data_parallel, mesh=mesh, in_specs=(specs,), out_specs=(P(), P("a")), check_vma=check_vma)
    chex.assert_trees_all_close(jax.jit(run)(grads), (want, want_norms), rtol=1e-5)

  specs = {"split": P("a", "b"), "whole": P("a")}

  def tensor_parallel(grads):
    total, norms = clipjax.clip_grad_per_example(grads, 2.0, axis_name={"split": "b", "whole": ()})
    return jax.lax.psum(total, "a"), norms

  out_specs = ({"split": P("b"), "whole": P()}, P("a"))
  for check_vma in (True, False) if jax.__version_info__ >= (0, 9) else (False,):  # The docstring says why.
    run = jax.shard_map(tensor_parallel, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=check_vma)
    chex.assert_trees_all_close(jax.jit(run)(grads), (want, want_norms), rtol=1e-5)
  message = (
    r"^`axis_name` must be given if leaves vary over different mesh axes, got 'split' over \['a', 'b'\] and 'whole' "
    r"over \['a'\]: pass the axes over which the gradient of one example is sharded\."
  )
  with pytest.raises(ValueError, match=message):
    jax.jit(jax.shard_map(data_parallel, mesh=mesh, in_specs=(specs,), out_specs=out_specs))(grads)
  for mode in ("auto", "explicit") if jax.__version_info__ >= (0, 10, 2) else ("auto",):
    mesh = mesh_of(mode)
    placed = on_mesh(mesh, grads, specs)
    with jax.set_mesh(mesh):
      got = jax.jit(clipjax.clip_grad_per_example)(placed, 2.0)
    chex.assert_trees_all_close(got, (want, want_norms), rtol=1e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="JAX of before cannot sum what an explicit axis splits")
@pytest.mark.parametrize("shape", [(8,), (8, 6)])
def test_examples_that_an_explicit_axis_splits(shape):
  mesh = mesh_of("explicit")
  grads = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 3, jnp.float32)
  want = clipjax.clip_grad_per_example(grads, 2.0)
  with jax.set_mesh(mesh):
    got = jax.jit(clipjax.clip_grad_per_example)(jax.device_put(grads, NamedSharding(mesh, P("a"))), 2.0)
  chex.assert_trees_all_close(got, want, rtol=1e-5)


@pytest.mark.parametrize("axis_name", [None, "b"])
@pytest.mark.parametrize("name", [*FEW, "skip_steps of an optimizer of Optax"])
def test_a_gradient_that_is_not_reduced_is_an_error(name, axis_name):
  of_optax = clipjax.skip_steps(optax.sgd(1.0), axis_name=axis_name)
  tx = {**transformations(axis_name), "skip_steps of an optimizer of Optax": of_optax}[name]
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
  mesh = mesh_of("auto")
  tx = transformations()[name]
  for sets in ([P("a")], [P("a"), P("a", "b"), P()]):
    seen = set()
    for count in (2, 10):
      grads = [jnp.ones((8, 4)) for _ in range(count * len(sets))]
      specs = [spec for _ in range(count) for spec in sets]

      def step(grads):
        updates, state = tx.update(grads, tx.init(grads))
        return updates, state.norm

      seen.add(collectives(step, grads, mesh, specs)[0])
    assert seen == {1 if len(sets) == 1 else 2}


def test_the_second_read_of_large_leaves_has_as_many_collectives_again(monkeypatch):
  monkeypatch.setattr(sums, "SMALL", 4)
  mesh = mesh_of("auto")
  grads, specs = [jnp.ones((8, 4))] * 40, [P("a")] * 40
  assert collectives(lambda g: (g, clipjax.global_norm(g)), grads, mesh, specs) == (1, 2)


def test_under_jit_alone_the_partitioner_sums_all_leaves_at_once():
  mesh = mesh_of("auto")
  seen = set()
  for count in (2, 40):
    grads = [jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("a", "b")))] * count
    text = jax.jit(clipjax.global_norm).lower(grads).compile().as_text()
    seen.add(len(re.findall(r" all-reduce(?:-start)?\(", text[text.index("\nENTRY ") :])))
    assert "all-gather" not in text and "all-to-all" not in text
  assert seen == {2}  # One for each axis of the mesh.
