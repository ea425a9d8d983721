"""Layers stacked in one array are leaves: a stacked model and the same model unrolled get the same updates and states.

The oracle of everything here is the unrolled model, whose slices are leaves of their own, in the order of the stack.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, cases, operations, oracle_norm
from unrolled import assert_as_unrolled, unrolled

import clipjax
from clipjax import rules
from clipjax.norms import sums
from clipjax.stacks import Stack, slice_names, stacks_of

AXES = {"a": 0, "b": None, "c": 1, "d": -1, "e": 0, "f": 2}
SHAPES = {"a": (3, 2, 5), "b": (4,), "c": (2, 3, 4), "d": (5, 3), "e": (3,), "f": (2, 4, 3)}
NAMES = tuple(
  name for leaf, axis in AXES.items() for name in ([leaf] if axis is None else [f"{leaf}[{i}]" for i in range(3)])
)
ORDERS = (2.0, 1.0, math.inf, 3.0, 0.5)


def layers(tree):
  """The same entries with each slice as a leaf of its own."""
  return unrolled(tree, AXES.get)


def layer(path, leaf=None):
  """Groups: one for each layer, and one for each leaf that is whole."""
  return path.rsplit("[")[-1]


def transformations(stacked):
  """Every transformation that takes `stacked`, each so that it clips: name -> transformation."""
  by = {"stacked": stacked}
  per_layer = {"0]": 0.3, "1]": rules.percentile(50.0, window=3), "2]": None, "b": 0.5}
  return {
    "leaf": clipjax.clip_by_leaf_norm(0.5, **by),
    "leaf with eps": clipjax.clip_by_leaf_norm(0.5, eps=0.1, **by),
    "leaf, zero": clipjax.clip_by_leaf_norm(0.5, on_nonfinite="zero", **by),
    "schedule": clipjax.clip_by_leaf_norm(lambda count: 0.1 * (1.0 + count.astype(jnp.float32)), **by),
    "rms": clipjax.clip_by_block_rms(0.2, **by),
    "group": clipjax.clip_by_group_norm(0.5, layer, **by),
    "groups": clipjax.clip_by_group_norm(per_layer, layer, **by),
    "agc": clipjax.adaptive_grad_clip(0.1, **by),
    "adagc": clipjax.adagc(1.01, warmup_steps=2, max_norm=0.5, **by),
    "zscore": clipjax.clip_by_leaf_norm(rules.zscore(1.0, warmup_steps=2), **by),
    "sigma": clipjax.clip_by_leaf_norm(rules.rolling_sigma(1.0, window=4, min_count=2), **by),
    "tracking": clipjax.clip_by_leaf_norm(rules.quantile_tracking(0.5), **by),
    "watch": clipjax.watch(history=3, **by),
    "effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(0.5, **by), optax.scale_by_sign(), **by),
  }


def gradients(dtype, magnitude=1.0, steps=4, shapes=SHAPES):
  """Some steps of gradients: a layer that spikes, one that is 0 at first, and entries of either sign."""
  rng = np.random.default_rng(0)
  for step in range(steps):
    grads = {name: rng.standard_normal(shape) * 0.3 * (1 + step) for name, shape in shapes.items()}
    grads["a"][1] *= 20 if step == 2 else 1
    grads["c"][:, 2] *= step > 0
    yield {name: jnp.asarray((x * magnitude).astype(jnp.dtype(dtype))) for name, x in grads.items()}


class Pair:
  """A stacked model and the same model unrolled, under one transformation, each compiled once."""

  def __init__(self, make):
    self.txs = make(AXES), make(None)
    self.updates = [jax.jit(tx.update) for tx in self.txs]

  def check(self, steps, rtol=2e-6):
    """The same updates and states over the steps; gives the last state of the stacked model."""
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), steps[0])
    state, of_each = self.txs[0].init(params), self.txs[1].init(layers(params))
    assert state.labels.slices == NAMES
    for grads in steps:
      updates, state = self.updates[0](grads, state, params)
      want, of_each = self.updates[1](layers(grads), of_each, layers(params))
      assert_as_unrolled((updates, state), (want, of_each), AXES.get, rtol=rtol)
    return state


def named(name):
  """Makes the transformation of that name: stacked -> transformation."""
  return lambda stacked: transformations(stacked)[name]


FEW = ("adagc", "agc", "group", "leaf", "watch")
ALL = sorted(transformations(None))


def of_clip(state):
  """The state of the clip, which an effect has inside."""
  return state.inner_state[0] if isinstance(state, clipjax.EffectState) else state


# The same as unrolled ------------------------------------------------------------------------------------------------


def apart(grads):
  """The gradients with entries of 1e-25 beside some of 1e25."""
  layers = grads["a"].at[0].multiply(1e-25).at[2].multiply(1e25)
  return {**grads, "a": layers, "d": grads["d"].at[:, 1].multiply(1e-25)}


def with_bad(steps, bad):
  """The steps with one bad layer in the second, and two in the last."""
  out = [dict(grads) for grads in steps]
  out[1]["c"] = out[1]["c"].at[0, 2, 1].set(bad)
  out[3]["c"], out[3]["a"] = out[3]["c"].at[0, 2, 1].set(jnp.inf), out[3]["a"].at[1, 0, 0].set(bad)
  return out


@pytest.mark.parametrize("name", cases(ALL, slow=["leaf with eps", "leaf, zero", "rms"]))
def test_stacked_is_as_unrolled(name):
  pair, steps = Pair(named(name)), list(gradients("float32"))
  state = pair.check(steps)
  assert name == "watch" or of_clip(state).clipped_steps > 0
  pair.check([apart(grads) for grads in steps])
  for bad in (jnp.nan, jnp.inf):
    state = pair.check(with_bad(steps, bad))
    assert state.nonfinite_steps == 2
    if name == "watch":
      assert {n for n, count in zip(NAMES, state.nonfinite, strict=True) if count} == {"a[1]", "c[2]"}
    else:  # A NaN comes first, and without one the first inf.
      assert NAMES[of_clip(state).nonfinite_leaf] == "a[1]"
    with pytest.raises(FloatingPointError, match=r"a\[1\]|in group '1\]', '2\]'"):
      clipjax.raise_if_nonfinite(state)


# Large leaves are summed in another way on CPU, and once more where that leaves its range.
LARGE = {**SHAPES, "a": (3, sums.SMALL // 8, 3), "c": (sums.SMALL // 16, 3, 2)}
LEAVES = {  # dtype, magnitude, steps, shapes
  "bfloat16": ("bfloat16", 1.0, 4, SHAPES),
  "float16": ("float16", 1.0, 4, SHAPES),
  "float64": ("float64", 1e30, 4, SHAPES),
  "large": ("float32", 1.0, 2, LARGE),
}


# What a clip by leaf says of 16-bit and large leaves holds for others, whose norms are the same ones.
KINDS_IN_SHORT = [*((name, "float64") for name in FEW), *(("leaf", kind) for kind in LEAVES), ("agc", "bfloat16")]


@pytest.mark.parametrize(
  ("name", "kind"), cases(itertools.product(ALL, LEAVES), slow=lambda case: case not in KINDS_IN_SHORT)
)
def test_leaves_of_other_kinds(name, kind):
  with jax.enable_x64(kind == "float64"):
    steps = list(gradients(*LEAVES[kind]))
    if kind == "large":
      steps = [{**grads, "a": grads["a"].at[1].multiply(1e-25)} for grads in steps]
    Pair(named(name)).check(steps, rtol=1e-12 if kind == "float64" else 2e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_every_order(p):
  make = lambda stacked: clipjax.clip_by_group_norm(0.5, layer, ord=p, stacked=stacked)  # noqa: E731
  Pair(make).check(list(gradients("float32")))


@pytest.mark.parametrize("p", [*ORDERS, 0.0, -math.inf])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_norms_are_those_of_the_oracle(p, magnitude):
  (grads,) = gradients("float32", magnitude, steps=1)
  if p == 0.5 and magnitude > 1:
    grads = jax.tree.map(lambda x: x * 1e-3, grads)  # The norm itself is above the largest float32.
  norms = clipjax.leaf_norms(grads, p, stacked=AXES)
  assert {name: x.shape for name, x in norms.items()} == {name: (3,) if name != "b" else () for name in SHAPES}
  want = [oracle_norm([x], p) for x in layers(grads).values()]
  np.testing.assert_allclose(np.concatenate([np.ravel(norms[name]) for name in sorted(norms)]), want, rtol=1e-6)


@pytest.mark.parametrize(
  ("p", "platform"),  # A GPU sums what is no square as a TPU does.
  cases(
    itertools.product([2.0, 1.0, math.inf, 3.0], ["cpu", "tpu", "gpu"]),
    slow=lambda case: case[1] == "gpu" and case[0] != 2,
  ),
)
def test_every_platform_has_the_norms_of_slices(platform, p):
  shapes = {"a": (3, 70, 1000), "b": (4,), "c": (40, 3, 5)}
  (grads,) = gradients("float32", steps=1, shapes=shapes)
  grads["a"] = grads["a"].at[1].multiply(1e-25).at[2].multiply(1e20)
  leaves, stacks = list(grads.values()), stacks_of(grads, {name: AXES[name] for name in shapes})
  spec = sums.spec_of_slices(p, leaves, ((),) * 3, stacks)
  got = jax.jit(lambda xs: sums.measure_on(platform, spec, xs))(leaves)
  want = [oracle_norm([x], p) for x in layers(grads).values()]
  # XLA on CPU adds the three sums of a GPU one entry after the other.
  np.testing.assert_allclose(got.vector, want, rtol=2e-5 if platform == "gpu" else 1e-6)
  assert got.first_bad == -1
  bad = sums.measure_on(platform, spec, [leaves[0], leaves[1], leaves[2].at[0, 2, 0].set(jnp.nan)])
  assert bad.first_bad == 6


@pytest.mark.parametrize("axis", cases([0, 1, 2], slow=(1, 2)))
@pytest.mark.parametrize("magnitude", [1e-30, 1.0])
def test_layers_of_many_entries(axis, magnitude):
  x = jnp.full(tuple(np.insert([2500, 1000], axis, 4).tolist()), magnitude, jnp.float32)
  np.testing.assert_allclose(clipjax.leaf_norms(x, stacked=axis), magnitude * math.sqrt(2.5e6), rtol=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_a_program_is_as_long_for_many_layers_as_for_few(name):
  def length(layers):
    tree = {"a": jnp.ones((layers, 2, 5)), "b": jnp.ones(4), "c": jnp.ones((3, layers))}
    tx = transformations({"a": 0, "b": None, "c": 1})[name]
    return operations(jax.make_jaxpr(tx.update)(tree, tx.init(tree), tree).jaxpr)

  assert length(3) == length(70)


def test_a_layer_under_its_limit_keeps_its_bits():
  rng = np.random.default_rng(0)
  for dtype in ("float32", "bfloat16", "float16"):
    grads = {"a": jnp.asarray(rng.standard_normal((3, 7, 11)), dtype).at[1].multiply(100)}
    tx = clipjax.clip_by_leaf_norm(50.0, stacked=0)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert_bits_equal(updates["a"][::2], grads["a"][::2])
    assert (state.scale == 1).tolist() == [True, False, True]


@pytest.mark.parametrize("ord", cases([2.0, 1.0, 3.0, math.inf], slow=[1.0, 3.0]))
def test_derivatives_are_those_of_the_model_unrolled(ord):
  (grads,) = gradients("float32", steps=1)

  def loss(tree, stacked=None):
    total, params = 0.0, jax.tree.map(lambda x: jnp.full(x.shape, 0.5), tree)
    for tx in (
      clipjax.clip_by_leaf_norm(0.5, ord, stacked=stacked),
      clipjax.clip_by_group_norm(0.5, layer, ord=ord, stacked=stacked),
      *([clipjax.adaptive_grad_clip(0.1, stacked=stacked)] if ord == 2 else []),
    ):
      clipped, state = tx.update(tree, tx.init(tree), params)
      flat = jnp.concatenate([x.ravel() for x in (layers(clipped) if stacked else clipped).values()])
      total += jnp.sum(flat * np.arange(1, 1 + flat.size, dtype=np.float32) / 100) + jnp.sum(state.norms)
    return total

  got = jax.jit(jax.grad(lambda tree: loss(tree, AXES)))(grads)
  want = jax.jit(jax.grad(loss))(layers(grads))
  for a, b in zip(layers(got).values(), want.values(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


THREE = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3))}
NO_LAYER = {"none": jnp.zeros((0, 4)), "one": jnp.full((1, 4), 2.0), "empty": jnp.zeros((2, 0))}


@pytest.mark.parametrize(
  ("params", "grads", "names"),
  [
    (NO_LAYER, NO_LAYER, ("empty[0]", "empty[1]", "one[0]")),
    ({}, {}, ()),
    ({"a": jnp.zeros((0, 3))}, {"a": jnp.zeros((0, 3))}, ()),
    (THREE, THREE | {"b": None}, ("a[0]", "a[1]", "a[2]", "b[0]", "b[1]")),
  ],
  ids=["one layer", "no leaf", "no layer", "a stack that is None now"],
)
@pytest.mark.parametrize("name", cases(FEW, slow=["adagc", "leaf"]))
def test_leaves_without_layers_and_one_layer(name, params, grads, names):
  for stacked in (0, None):
    tx = transformations(stacked)[name]
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, grads)
    assert state.finite and (state.norm == 0) == (names == ())
    assert stacked is None or state.labels.slices == names
    if stacked == 0 and state.norms.shape == (5,):
      assert (state.norms == 0).tolist() == [i > 2 and grads["b"] is None for i in range(5)]
  norms = {n: None if x is None else x.shape[:1] for n, x in grads.items()}
  assert jax.tree.map(jnp.shape, clipjax.leaf_norms(grads, stacked=0)) == norms


def test_groups_of_very_different_sizes():
  rng = np.random.default_rng(0)
  tree = {f"w{i}": jnp.asarray(rng.standard_normal((40, 3)), jnp.float32) for i in range(6)}
  groups = lambda path, leaf: path if path < "w2" else path[:2] if path > "w4" else "rest"  # noqa: E731
  tx = clipjax.clip_by_group_norm(1.0, groups, stacked=0)
  _, state = tx.update(tree, tx.init(tree))
  entries = {}
  for name, leaf in tree.items():
    for i in range(40):
      entries.setdefault(groups(f"{name}[{i}]", None), []).append(leaf[i])
  assert list(entries) == list(state.labels.block_names) and len(entries) == 83
  np.testing.assert_allclose(state.norms, [oracle_norm(x) for x in entries.values()], rtol=1e-6)
  # No more than twice the slices are looked up, though the largest group is 80 times the smallest.
  text = str(jax.make_jaxpr(tx.update)(tree, tx.init(tree)))
  assert max(int(n) * int(m) for n, m in re.findall(r"f32\[(\d+),(\d+)\]", text)) <= 2 * 240


# What is said of them ------------------------------------------------------------------------------------------------


def test_metrics_and_groups_name_the_layers():
  tree = {"blocks": {"w": jnp.asarray([[3.0, 4.0], [6.0, 8.0]]), "b": jnp.asarray([0.0, 24.0])}, "head": jnp.ones(1)}
  stacked = lambda path, leaf: 0 if "blocks" in path else None  # noqa: E731
  want = {
    "leaf": {"blocks/b[0]": 0, "blocks/b[1]": 24, "blocks/w[0]": 5, "blocks/w[1]": 10, "head": 1},
    "group": {"0]": 5, "1]": 26, "head": 1},
  }
  for name, norms in want.items():
    tx = transformations(stacked)[name]
    found = clipjax.metrics(tx.update(tree, tx.init(tree))[1], per_leaf=True)
    assert {key.removeprefix("grad/norm/"): x for key, x in found.items() if key.startswith("grad/norm/")} == norms


def test_a_function_of_groups_is_asked_for_each_slice_with_its_shape_and_dtype():
  asked = []
  tree = {"a": jnp.ones((3, 2, 5), jnp.bfloat16), "b": jnp.ones(4)}
  tx = clipjax.clip_by_group_norm(
    1.0, lambda path, leaf: asked.append((path, leaf.shape, str(leaf.dtype))) or "all", stacked={"a": 1, "b": None}
  )
  tx.init(tree)
  assert asked == [("a[0]", (3, 5), "bfloat16"), ("a[1]", (3, 5), "bfloat16"), ("b", (4,), "float32")]


def test_a_tree_of_labels_groups_all_layers_of_a_leaf():
  tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
  tx = clipjax.clip_by_group_norm(1.0, {"a": "body", "b": "head"}, stacked={"a": 0, "b": None})
  assert tx.init(tree).labels.blocks == ((0, 1, 2), (3,))


def test_forms_of_stacked_agree():
  tree = {"blocks": {"w": jnp.ones((3, 2)), "b": jnp.ones((3,))}, "head": jnp.ones(4)}
  forms = (
    lambda path, leaf: 0 if path.startswith("blocks/") else None,
    {"blocks": 0, "head": None},
    {"blocks": {"w": 0, "b": -1}, "head": None},
    {"blocks": {"w": np.int64(-2), "b": 0}, "head": None},
  )
  assert {stacks_of(tree, form) for form in forms} == {(Stack(0, 3), Stack(0, 3), None)}
  assert stacks_of(tree["blocks"], 0) == (Stack(0, 3), Stack(0, 3))
  assert stacks_of(tree, lambda path, leaf: None) == stacks_of(tree, None) == ()
  assert stacks_of(tree, {"blocks": {"w": 1, "b": None}, "head": None}) == (None, Stack(1, 2), None)


def test_a_name_that_is_taken_gets_a_number():
  assert slice_names(("a", "a[0]"), (Stack(0, 2), None)) == ("a[0]", "a[1]", "a[0]_2")


def test_a_nonfinite_step_names_the_layers_when_it_raises_at_once():
  grads = {"a": jnp.ones((3, 2)).at[1].set(jnp.nan), "b": jnp.ones(2), "c": jnp.ones((2, 2)).at[0, 1].set(jnp.inf)}
  tx = clipjax.clip_by_leaf_norm(1.0, stacked={"a": 0, "b": None, "c": 1}, on_nonfinite="error")
  with pytest.raises(FloatingPointError, match=r"\(norm nan\) in 'a\[1\]', 'c\[1\]': lower"):
    tx.update(grads, tx.init(grads))


# Bad calls -----------------------------------------------------------------------------------------------------------

TREE = {"blocks": {"w": jnp.ones((3, 2)), "gain": jnp.ones(3)}, "head": jnp.asarray(1.0)}
RULE = "`stacked` must be a function (path, leaf) -> axis, a prefix tree of axes, or the name of an axis"
AXIS, NONE = "`stacked` must give an axis of the leaf", "give None for a leaf that is not stacked."
FUNCTION = "write a function such as `lambda path, leaf: 0 if path.startswith('blocks/') else None`"
WRONG = {
  "out of range": (
    {"blocks": {"w": 2, "gain": 0}, "head": None}, ValueError,
    f"{AXIS}, from -2 to 1, got 2 for shape (3, 2) at 'blocks/w': {NONE}",
  ),
  "below the range": (
    lambda path, leaf: -2 if path == "blocks/gain" else None, ValueError,
    f"{AXIS}, from -1 to 0, got -2 for shape (3,) at 'blocks/gain': {NONE}",
  ),
  "too flat": (0, ValueError, f"{AXIS}, and a scalar has none, got 0 for shape () at 'head': {NONE}"),
  "no integer": (
    lambda path, leaf: "layers", TypeError,
    f"{RULE}, got 'layers' (str) for the float32[3] at 'blocks/gain': pass an integer.",
  ),
  "a bool": (
    {"blocks": True, "head": None}, TypeError,
    f"{RULE}, got True (bool) for the float32[3] at 'blocks/gain': pass an integer.",
  ),
  "an array": (
    {"blocks": jnp.asarray(0), "head": None}, TypeError,
    f"{RULE}, got int32[] for the float32[3] at 'blocks/gain': pass a Python integer; under "
    "`optax.inject_hyperparams`, name it in `static_args`.",
  ),
  "a tree that does not match": (
    {"blocks": 0}, ValueError, f"{RULE}, got a tree that does not match: {FUNCTION}. JAX says of the tree: ",
  ),
  "a name without metadata": (
    "layers", ValueError,
    "`stacked` must name an axis in the metadata of Flax boxes, got 'layers', which no leaf has (no leaf has "
    "metadata): give axis names to the variables too, and `metadata_params` to nn.scan or `transform_metadata` to "
    f"the nnx.vmap that makes the layers; or {FUNCTION}.",
  ),
  "a function of one argument": (
    lambda path: 0, TypeError,
    f"`stacked` must take (path, leaf), got a function of (path): {FUNCTION.replace('a function such as ', '')}.",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_stacked(case):
  stacked, kind, message = WRONG[case]
  with pytest.raises(kind) as caught:
    clipjax.leaf_norms(TREE, stacked=stacked)
  assert str(caught.value).startswith(message) if message.endswith(": ") else str(caught.value) == message


@pytest.mark.parametrize("name", ALL)
def test_stacked_is_checked_by_every_transformation(name):
  stacked, kind, message = WRONG["too flat"]
  with pytest.raises(kind, match=f"^{re.escape(message)}$"):
    transformations(stacked)[name].init(TREE)


def test_a_traced_axis():
  with pytest.raises(TypeError, match=r"got traced int32\[\] for the .* name it in `static_args`"):
    jax.jit(lambda axis: clipjax.leaf_norms(TREE["blocks"], stacked=axis))(0)
  inject = functools.partial(optax.inject_hyperparams, clipjax.clip_by_leaf_norm)
  with pytest.raises(TypeError, match="name it in `static_args`"):
    inject()(1.0, stacked=0).init(TREE["blocks"])
  # What is neither a number nor a function Optax leaves as it is.
  for tx in (inject(static_args="stacked")(1.0, stacked=0), inject()(1.0, stacked={"w": 0, "gain": 0})):
    assert tx.init(TREE["blocks"]).inner_state.labels.shape == (6,)


def test_another_number_of_layers_than_init_saw():
  tx = clipjax.watch(stacked={"blocks": 0, "head": None})
  fewer = TREE | {"blocks": {"w": jnp.ones((2, 2)), "gain": jnp.ones(3)}}
  message = (
    "must have the 3 layers that `init` saw along axis 0 of 'blocks/w', got float32[2,2]: call `init` with the "
    "parameters that you train."
  )
  for argument, grads, params in (("updates", fewer, None), ("params", TREE, fewer)):
    with pytest.raises(ValueError, match=f"^`{argument}` {re.escape(message)}$"):
      tx.update(grads, tx.init(TREE), params)


@pytest.mark.parametrize("name", FEW)
def test_a_state_from_before_stacked_was_given_and_the_reverse(name):
  tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
  stacked, without = transformations(lambda path, leaf: 0 if path == "a" else None)[name], transformations(None)[name]
  for tx, other, wanted, got, how in (
    (stacked, without, "layers", "leaves", "without"), (without, stacked, "leaves", "layers", "with"),
  ):  # fmt: skip
    message = (
      f"`state` must hold norms of {wanted}, got norms of {got}: it was made {how} `stacked`; call `init` again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
      tx.update(tree, other.init(tree), tree)
  whole = {"b": jnp.ones(2)}  # A part of a model without layers.
  stacked.update(whole, stacked.init(whole), whole)


def test_a_name_where_the_layers_are_none():
  tree = {"blocks": None, "head": jnp.ones(2)}
  assert clipjax.leaf_norms(tree, stacked="layers")["blocks"] is None


def test_watch_without_numbers_by_leaf_has_no_use_for_it():
  message = "which keeps no numbers by layer, got both: leave one of them out."
  with pytest.raises(ValueError, match=f"^`stacked` must be None with `per_leaf=False`, {re.escape(message)}$"):
    clipjax.watch(per_leaf=False, stacked=0)


def test_every_function_that_takes_stacked_is_in_the_table():
  made = {"leaf": "clip_by_leaf_norm", "group": "clip_by_group_norm", "rms": "clip_by_block_rms"}
  made |= {"agc": "adaptive_grad_clip", "adagc": "adagc", "watch": "watch", "effect": "clip_effect"}
  assert set(made) <= set(transformations(None))
  takes = {name for name in clipjax.__all__ if "stacked" in getattr(getattr(clipjax, name), "__annotations__", {})}
  assert takes == {*made.values(), "leaf_norms"}
