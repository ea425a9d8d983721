"""Which leaf is which: names, labels and groups, in every container, with frozen leaves and in mapped states."""

import copy
import dataclasses
import itertools
import pathlib
import pickle
import re
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import NO_LIMIT, assert_bits_equal, cases, factories

import clipjax
from clipjax.groups import Labels
from clipjax.leaves import leaf_names


class Pair(NamedTuple):
  key: Any
  value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
  key: Any
  value: Any


class Module(eqx.Module):
  key: Any
  value: Any

  def __call__(self, x):
    return x


class OwnParam(nnx.Param):
  pass


ONE, TWO = jnp.array([3.0]), jnp.array([4.0])


# A key or field that is called `value` -------------------------------------------------------------------------------

NAMED = {
  "dict": {"layer0": {"query": ONE, "key": ONE, "value": TWO}},
  "named tuple": {"layer0": Pair(ONE, TWO)},
  "dataclass": {"layer0": Record(ONE, TWO)},
  "Equinox module": {"layer0": Module(ONE, TWO)},
}


@pytest.mark.parametrize("container", sorted(NAMED))
def test_a_key_or_field_that_is_called_value_is_a_name_like_any_other(container):
  tree = NAMED[container]
  names = leaf_names(tree)
  assert set(names) >= {"layer0/key", "layer0/value"}
  assert all(name.startswith("layer0/") for name in names)
  tx = clipjax.clip_by_group_norm(1.0, lambda path, leaf: path.rsplit("/", 1)[-1])
  updates, state = tx.update(tree, tx.init(tree))
  got = clipjax.metrics(state)
  assert (got["grad/norm/key"], got["grad/norm/value"]) == (3.0, 4.0)
  assert jax.tree.structure(updates) == jax.tree.structure(tree)


@pytest.mark.parametrize("kind", [nnx.Param, OwnParam, nnx.Variable])
def test_the_value_of_an_nnx_variable_is_no_part_of_a_name(kind):
  class Model(nnx.Module):
    def __init__(self):
      self.value = kind(jnp.ones(2))  # A name of the user's, and the variable's own `.value` below it.
      self.tree = kind({"value": jnp.ones(2), "w": jnp.ones(2)})

  state = nnx.state(Model())
  assert leaf_names(state) == ("tree/value", "tree/w", "value")
  assert leaf_names(nnx.to_pure_dict(state)) == ("tree/value", "tree/w", "value")
  assert leaf_names(kind(jnp.ones(2))) == (".",)


def test_the_value_of_a_box_of_linen_is_no_part_of_a_name():
  def boxed(x):
    return nn.Partitioned(x, ("embed",))

  assert leaf_names({"value": boxed(ONE), "w": nn.LogicallyPartitioned(TWO, ("embed",)), "b": ONE}) == (
    "b",
    "value",
    "w",
  )
  assert leaf_names(boxed({"value": ONE})) == ("value",)
  assert leaf_names({"a": boxed(boxed(ONE))}) == ("a",)


def test_names_of_leaves():
  tree = {"x": [ONE, (ONE, {"y/z": ONE})], "x/1": {"0": ONE}, "v": None}
  assert leaf_names(tree) == ("x/0", "x/1/0", "x/1/1/y/z", "x/1/0_2")
  assert leaf_names(ONE) == (".",)


# What is a function, and what it takes -------------------------------------------------------------------------------


def test_a_module_of_labels_is_a_tree_although_it_is_callable():
  tree = Module(ONE, TWO)
  tx = clipjax.clip_by_group_norm({"a": 1.0, "b": None}, Module("a", "b"))
  updates, _ = tx.update(tree, tx.init(tree))
  assert (updates.key, updates.value) == (1.0, 4.0)


@pytest.mark.parametrize(
  "groups",
  [
    lambda path, leaf: path,
    lambda *args: args[0],
    jax.tree_util.Partial(lambda path, leaf: path),
    type("Labeller", (), {"__call__": lambda self, path, leaf: path})(),
  ],
  ids=["lambda", "any arguments", "Partial", "object"],
)
def test_every_kind_of_function_labels(groups):
  tree = {"a": ONE, "b": TWO}
  assert clipjax.clip_by_group_norm(1.0, groups).init(tree).labels.block_names == ("a", "b")


def test_a_function_of_more_arguments_is_an_error():
  with pytest.raises(TypeError, match=r"^`groups` must take \(path, leaf\), got a function of \(path, leaf, more\)"):
    clipjax.clip_by_group_norm(1.0, lambda path, leaf, more: path).init({"a": ONE})


def test_an_error_inside_of_a_function_stays_as_it_is():
  def broken(path, leaf):
    raise TypeError("mine")

  with pytest.raises(TypeError, match=r"^mine$"):
    clipjax.clip_by_group_norm(1.0, broken).init({"a": ONE})


# Labels are equal when their content is ------------------------------------------------------------------------------


def test_labels_of_other_models_are_never_equal():
  none, one, two = (Labels.of(t, name="grad", unit="leaf") for t in ((), {"a": ONE}, {"b": ONE}))
  assert len({none, one, two, copy.deepcopy(one), pickle.loads(pickle.dumps(two))}) == 3
  assert none != one
  assert one != two
  assert none == Labels.of({}, name="grad", unit="leaf")
  assert one != Labels.of({"a": ONE}, name="grad", unit="global")
  assert repr(one) == "Labels('grad', 'leaf', 1 leaves)" != one


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_group_norm", "adagc"])
def test_jit_returns_the_labels_that_it_was_given(name):
  tx = factories()[name]
  copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
  states = [tx.init(tree) for tree in ({}, {"a": ONE}, {"b": ONE, "c": TWO}, {"a": ONE})]
  for state in states:
    assert copied(state).labels.leaves == state.labels.leaves
  grads = {"b": jnp.array([jnp.nan]), "c": TWO}
  with pytest.raises(FloatingPointError, match=r"grad|leaf|group"):
    clipjax.raise_if_nonfinite(copied(tx.update(grads, states[2])[1]))


STATEFUL = {
  **factories(),
  "watch": clipjax.watch(history=3),
  "adaptive_grad_clip": clipjax.adaptive_grad_clip(0.1),
  "skip_steps": clipjax.skip_steps(optax.chain(clipjax.clip_by_leaf_norm(1.0), optax.adam(1e-3))),
  "clip_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(1.0), optax.adam(1e-3)),
}
WRAPPED = {
  "alone": lambda tx, params: tx,
  "chain": lambda tx, params: optax.chain(tx, optax.adam(1e-3)),
  "masked": lambda tx, params: optax.masked(tx, {"a": True, "b": False}),
  "multi steps": lambda tx, params: optax.MultiSteps(optax.chain(tx, optax.adam(1e-3)), 2),
  "two of a kind": lambda tx, params: optax.chain(tx, tx),
  "multi transform": lambda tx, params: optax.multi_transform({"x": tx, "y": optax.adam(1e-3)}, {"a": "x", "b": "y"}),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  ("name", "wrapper"),
  [(name, "chain") for name in sorted(STATEFUL)] + [("clip_by_leaf_norm", wrapper) for wrapper in sorted(WRAPPED)],
)
def test_map_params_keeps_the_state(name, wrapper):
  params = {"a": jnp.ones(3), "b": jnp.ones(2)}
  tx = WRAPPED[wrapper](STATEFUL[name], params)
  grads = {"a": jnp.full(3, 2.0), "b": jnp.ones(2)}
  _, state = tx.update(grads, tx.init(params), params)
  same = optax.tree.map_params(tx, lambda x: x, state)
  assert_bits_equal(same, state)
  want, got = (tx.update(grads, s, params) for s in (state, same))
  assert_bits_equal(got, want)

  # As for shardings: something else for copies of parameters, and for all the rest. Both are trees like the state.
  rest = () if wrapper in ("masked", "multi transform") else ({"a": "of a", "b": "of b"},)
  mapped = optax.tree.map_params(tx, lambda x, spec="of": spec, state, *rest, transform_non_params=lambda _: "other")
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  assert set(jax.tree.leaves(mapped)) <= {"of a", "of b", "of", "other"}
  assert_bits_equal(jax.tree.map(lambda spec, x: x, mapped, state), state)
  assert_bits_equal(jax.tree.map(lambda x, spec: x, state, mapped), state)


def test_a_placeholder_takes_no_labels_of_another_clip():
  state = clipjax.clip_by_leaf_norm(1.0, name="other").init({"a": ONE})
  with pytest.raises(ValueError, match="Labels"):
    optax.tree.map_params(clipjax.clip_by_leaf_norm(1.0), lambda x: x, state)


# Registered with Flax, whenever it is imported -----------------------------------------------------------------------

LATE = """
import pickle, sys
import jax.numpy as jnp, optax, clipjax
params = {"a": jnp.ones(2)}
tx = optax.chain(clipjax.watch(), clipjax.skip_steps(clipjax.clip_by_leaf_norm(1.0)))
state = tx.init(params)
data = pickle.dumps(state)
assert "flax" not in sys.modules
import flax.serialization as fs
saved = fs.to_bytes(state)
assert fs.to_state_dict(state)["0"]["labels"] == {}
for target in (state, pickle.loads(data), tx.init(params)):
  restored = fs.from_bytes(target, saved)
  assert restored[0].labels.leaves == ("a",)
  assert restored[1].inner_state.labels.leaves == ("a",)
"""


def test_flax_serializes_a_state_that_was_there_before_it_was_imported():
  result = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


def test_the_rule_for_t5x_gives_a_state_without_specs_that_flax_takes():
  """What t5x makes of a state by the line of docs/sharding.md, and what its wrapper does with that."""
  text = (pathlib.Path(__file__).parents[1] / "docs" / "sharding.md").read_text("utf-8")
  rules = {}
  line = re.search(r"`OptaxStatePartitionRules\._RULES\[(.*?)\] = (lambda .*?)`", text)
  rules[eval(line[1])] = eval(line[2])
  state = clipjax.clip_by_leaf_norm(1.0).init({"a": ONE})
  axes = rules[type(state)](state, {"a": None})
  assert type(axes) is clipjax.ClipState and jax.tree.leaves(axes) == []
  as_dict = flax.serialization.to_state_dict(axes)
  assert set(as_dict) == set(state._fields) and as_dict["norm"] is None and as_dict["labels"] == {}


# Frozen leaves -------------------------------------------------------------------------------------------------------

FULL = {"emb": {"w": jnp.full(4, 3.0), "b": jnp.ones(2)}, "head": jnp.full(9, 4.0)}
FROZEN = {
  "one": {"emb": {"w": None, "b": jnp.ones(2)}, "head": jnp.full(9, 4.0)},
  "a branch": {"emb": None, "head": jnp.full(9, 4.0)},
  "all": {"emb": {"w": None, "b": None}, "head": None},
}
STEPS = {
  **{name: tx for name, tx in STATEFUL.items() if name != "skip_steps"},
  # A state of Adam cannot be without a leaf.
  "clip_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(1.0), optax.sgd(1e-3)),
  "clip_by_group_norm": clipjax.clip_by_group_norm(0.5, lambda path, leaf: path.split("/")[0]),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  ("name", "frozen"),
  cases([(name, "one") for name in sorted(STEPS)], lambda case: case[0] in ("autoclip", "zclip", "clip_by_block_rms"))
  + list(itertools.product(("clip_by_group_norm", "watch", "adaptive_grad_clip"), ("a branch", "all"))),
)
def test_a_frozen_leaf_may_be_none_in_the_gradients(name, frozen):
  """Its norm is 0, the rest is what it is without it."""
  tx, grads = STEPS[name], FROZEN[frozen]
  there = jax.tree.leaves(grads)

  def is_none(x):
    return x is None

  zeros = jax.tree.map(jnp.zeros_like, FULL)
  filled = jax.tree.map(lambda g, z: z if g is None else g, grads, zeros, is_leaf=is_none)
  state = other = tx.init(FULL)
  update = jax.jit(tx.update)
  for _ in range(2):
    got, state = update(grads, state, FULL)
    want, other = update(filled, other, FULL)
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    wanted = jax.tree.leaves(jax.tree.map(lambda g, w: None if g is None else w, grads, want, is_leaf=is_none))
    assert len(jax.tree.leaves(got)) == len(there) == len(wanted)
    for a, b in zip(jax.tree.leaves(got), wanted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)
  # Fewer entries of a watch are zero, and AGC has no limit for a leaf that is None.
  left_out = {"watch": "zero_fraction", "adaptive_grad_clip": "max_norm"}
  for field in state._fields:
    if field != left_out.get(name):
      jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), getattr(state, field), getattr(other, field))


def test_watch_pairs_parameters_by_name():
  tx = clipjax.watch()
  state = tx.init({"a": ONE, "b": TWO})
  params = {"frozen": jnp.full(4, 100.0), "a": jnp.array([6.0]), "b": jnp.array([8.0])}
  _, state = tx.update({"a": ONE, "b": TWO}, state, params)
  got = clipjax.metrics(state, per_leaf=True)
  assert (got["grad/ratio/a"], got["grad/ratio/b"], got["grad/param_norm"]) == (0.5, 0.5, 10.0)
  # Parameters of no name that the updates have leave the ratio open, and break nothing.
  _, state = tx.update({"a": ONE, "b": TWO}, tx.init({"a": ONE, "b": TWO}), {"c": ONE})
  assert clipjax.metrics(state)["grad/ratio"] == 0


def test_agc_pairs_parameters_by_name():
  grads, params = {"a": jnp.array([3.0, 4.0])}, {"z": jnp.ones(3), "a": jnp.array([0.6, 0.8]), "b": jnp.ones(1)}
  tx = clipjax.adaptive_grad_clip(0.1)
  updates, _ = tx.update(grads, tx.init(grads), params)
  np.testing.assert_allclose(updates["a"], [0.06, 0.08], rtol=1e-6)
  with pytest.raises(ValueError, match=r"^`params` must have .* got none for the float32\[2\] at 'a'"):
    tx.update(grads, tx.init(grads), {"b": jnp.ones(1), "c": ONE})


@pytest.mark.parametrize("axis", [None, -1, (0, 1)])
def test_agc_has_no_limit_for_a_leaf_that_is_none(axis):
  params = {"a": jnp.ones((3, 4)), "b": jnp.full((2, 3), 100.0)}
  tx = clipjax.adaptive_grad_clip(0.5, axis=axis)
  updates, state = tx.update({"a": jnp.ones((3, 4)), "b": None}, tx.init(params), params)
  full, _ = tx.update({"a": jnp.ones((3, 4)), "b": jnp.zeros((2, 3))}, tx.init(params), params)
  np.testing.assert_allclose(updates["a"], full["a"], rtol=1e-6)
  got = clipjax.metrics(state, per_leaf=True)
  assert got["grad/max_norm"] == got["grad/max_norm/a"] < 10 < got["grad/max_norm/b"] == NO_LIMIT


def test_a_frozen_weight_of_an_equinox_model():
  params = eqx.filter(eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
  grads = eqx.tree_at(lambda model: model.layers[0].weight, params, None)
  tx = optax.chain(clipjax.watch(), clipjax.clip_by_leaf_norm(0.1))
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  assert updates.layers[0].weight is None and jax.tree.structure(updates) == jax.tree.structure(grads)
  got = clipjax.metrics(state, per_leaf=True)
  assert got["grad/norm/layers/0/weight"] == 0 < got["grad/norm/layers/1/weight"]


@pytest.mark.parametrize(
  "grads", [{"emb": {"w": None}, "head": ONE}, {"other": ONE, "emb": None, "head": None}, {"head": ONE}]
)
def test_leaves_that_are_neither_there_nor_none_are_an_error(grads):
  tx = clipjax.clip_by_global_norm(1.0)
  with pytest.raises(ValueError, match=r"^`updates` must have as many floating leaves as `init` saw, 3, got "):
    tx.update(grads, tx.init(FULL))
