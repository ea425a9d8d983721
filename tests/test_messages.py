"""Bad input: the whole text of every error."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import rules

TREE = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
BY_PATH = lambda path, leaf: path.split("/")[-1]  # noqa: E731
STATIC = "under `optax.inject_hyperparams`, name it in `static_args`"
THRESHOLD = "must be a number >= 0 or a scalar array"
REMEDY = "pass 0 to zero the gradient or `float('inf')` only to measure"


def update(tx, grads, params=TREE):
  return tx.update(grads, tx.init(params))


def broken_leaves(count):
  leaves = [jnp.full(2, jnp.nan)] * count + [jnp.ones(2)]
  return clipjax.clip_grad_norm(leaves, 1.0, on_nonfinite="error")


CASES = {
  "negative": (
    lambda: clipjax.clip_by_global_norm(-1.0),
    ValueError, f"`max_norm` must be >= 0, got -1.0: {REMEDY}.",
  ),
  "negative int": (
    lambda: clipjax.clip_grad_norm(TREE, -2),
    ValueError, f"`max_norm` must be >= 0, got -2.0: {REMEDY}.",
  ),
  "negative numpy": (
    lambda: clipjax.clip_by_leaf_norm(np.float32(-1.0)),
    ValueError, f"`max_norm` must be >= 0, got -1.0: {REMEDY}.",
  ),
  "nan": (
    lambda: clipjax.clip_by_group_norm(math.nan, BY_PATH),
    ValueError, f"`max_norm` must be >= 0, got nan: {REMEDY}.",
  ),
  "nan in a dict": (
    lambda: clipjax.clip_by_group_norm({"w": 1.0, "b": math.nan}, BY_PATH),
    ValueError, f"`max_norm['b']` must be >= 0, got nan: {REMEDY}.",
  ),
  "negative rms": (
    lambda: clipjax.clip_by_block_rms(-1.0),
    ValueError, f"`max_rms` must be >= 0, got -1.0: {REMEDY}.",
  ),
  "negative value": (
    lambda: clipjax.clip_by_value(-0.5),
    ValueError, f"`max_value` must be >= 0, got -0.5: {REMEDY}.",
  ),
  "negative value now": (
    lambda: clipjax.clip_grad_value(TREE, -0.5),
    ValueError, f"`max_value` must be >= 0, got -0.5: {REMEDY}.",
  ),
  "string": (
    lambda: clipjax.clip_by_global_norm("1.0"),
    TypeError, f"`max_norm` {THRESHOLD}, got '1.0' (str): pass a float such as 1.0.",
  ),
  "bool": (
    lambda: clipjax.clip_by_global_norm(True),
    TypeError, f"`max_norm` {THRESHOLD}, got True (bool): pass a float such as 1.0.",
  ),
  "complex": (
    lambda: clipjax.clip_by_global_norm(np.complex64(1)),
    TypeError, f"`max_norm` {THRESHOLD}, got complex64[]: pass a real number such as 1.0.",
  ),
  "None": (
    lambda: clipjax.clip_by_global_norm(None),
    TypeError,
    "`max_norm` must be a number, a scalar array, a schedule or a clipjax.rules.Rule, got a NoneType: pass a float "
    "such as 1.0; a dict by label is for clip_by_group_norm.",
  ),
  "vector": (
    lambda: clipjax.clip_by_leaf_norm(jnp.ones(2)),
    ValueError, f"`max_norm` {THRESHOLD}, got float32[2]: pass one number, or use clip_by_group_norm.",
  ),
  "schedule now": (
    lambda: clipjax.clip_grad_norm(TREE, lambda count: 1.0),
    TypeError, f"`max_norm` {THRESHOLD}, got a function: pass a float such as 1.0.",
  ),
  "vector schedule": (
    lambda: update(clipjax.clip_by_leaf_norm(lambda count: jnp.ones(2)), TREE),
    ValueError, "a schedule must return a scalar, got float32[2]: for a threshold by group pass a dict.",
  ),
  "rule not called": (
    lambda: update(clipjax.clip_by_global_norm(rules.zscore), TREE),
    TypeError,
    "a schedule must return a real number, got a Rule: call a rule of clipjax.rules first, as in rules.zscore().",
  ),
  "schedule of None": (
    lambda: update(clipjax.clip_by_global_norm(lambda count: None), TREE),
    TypeError,
    "a schedule must return a real number, got a NoneType: call a rule of clipjax.rules first, as in rules.zscore().",
  ),
  "labels that differ in type alone": (
    lambda: clipjax.clip_by_group_norm({1: 1.0, "1": 2.0}, BY_PATH),
    ValueError, "labels of groups must differ as strings, got [1, '1'] in `max_norm`: rename one.",
  ),
  "arguments swapped": (
    lambda: clipjax.clip_by_group_norm(BY_PATH, 1.0),
    TypeError,
    "`groups` must be a function (path, leaf) -> label or a tree of labels, got 1.0 (float): pass it as the second "
    f"argument; {STATIC}.",
  ),
  "window without a deviation": (
    lambda: rules.rolling_sigma(window=1),
    ValueError, "`window` must be an integer >= 2, got 1: choose one in that range.",
  ),
  "count beyond int32": (
    lambda: rules.delayed(2**31, 1.0),
    ValueError, "`n` must be an integer >= 0, got 2147483648: choose one in that range.",
  ),
  "negative eps": (
    lambda: clipjax.clip_by_global_norm(1.0, eps=-1e-6),
    ValueError, "`eps` must be >= 0, got -1e-06: pass 0.0, or 1e-6 for the factor of torch.",
  ),
  "infinite eps": (
    lambda: clipjax.clip_grad_norm(TREE, 1.0, eps=math.inf),
    ValueError, "`eps` must be finite, got inf: pass 0.0, or 1e-6 for the factor of torch.",
  ),
  "negative norm": (
    lambda: clipjax.clip_grad_norm(TREE, 1.0, norm=-3.0),
    ValueError, "`norm` must be >= 0, got -3.0: pass the norm of `grads`, or None to compute it.",
  ),
  "policy": (
    lambda: clipjax.clip_by_block_rms(1.0, on_nonfinite="skip"),
    ValueError,
    "`on_nonfinite` must be one of \"propagate\", \"zero\", \"error\", got 'skip': pass \"zero\" to drop such steps or "
    "\"propagate\" to make them visible.",
  ),
  "policy now": (
    lambda: clipjax.clip_grad_norm(TREE, 1.0, on_nonfinite=True),
    ValueError,
    "`on_nonfinite` must be one of \"propagate\", \"zero\", \"error\", got True: pass \"zero\" to drop such steps or "
    "\"propagate\" to make them visible.",
  ),
  "ord 0": (
    lambda: clipjax.clip_by_global_norm(1.0, 0),
    ValueError, "`ord` must be > 0, got 0: pass 2 for the Euclidean norm.",
  ),
  "ord -inf for a clip": (
    lambda: clipjax.clip_grad_norm(TREE, 1.0, -math.inf),
    ValueError, "`ord` must be > 0, got -inf: pass 2 for the Euclidean norm.",
  ),
  "negative ord": (
    lambda: clipjax.global_norm(TREE, -1),
    ValueError, "`ord` must be > 0, 0 or -inf, got -1: pass 2 for the Euclidean norm.",
  ),
  "nan ord": (
    lambda: clipjax.leaf_norms(TREE, math.nan),
    ValueError, "`ord` must be > 0, 0 or -inf, got nan: pass 2 for the Euclidean norm.",
  ),
  "ord fro": (
    lambda: clipjax.global_norm(TREE, "fro"),
    TypeError, "`ord` must be a Python number, got 'fro' (str): pass 2, 1 or `float('inf')`.",
  ),
  "array ord": (
    lambda: clipjax.clip_by_leaf_norm(1.0, jnp.array(2.0)),
    TypeError, f"`ord` must be a Python number, got float32[]: pass 2, 1 or `float('inf')`; {STATIC}.",
  ),
  "traced ord": (
    lambda: jax.jit(lambda p: clipjax.global_norm(TREE, p))(2.0),
    TypeError, f"`ord` must be a Python number, got traced float32[]: pass 2, 1 or `float('inf')`; {STATIC}.",
  ),
  "injected ord": (
    lambda: optax.inject_hyperparams(clipjax.clip_by_global_norm)(1.0, ord=2.0).init(TREE),
    TypeError, f"`ord` must be a Python number, got float32[]: pass 2, 1 or `float('inf')`; {STATIC}.",
  ),
  "array groups": (
    lambda: clipjax.clip_by_group_norm(1.0, jnp.ones(2)),
    TypeError,
    f"`groups` must be a function (path, leaf) -> label or a tree of labels, got float32[2]: pass it as the second "
    f"argument; {STATIC}.",
  ),
  "int leaf": (
    lambda: clipjax.clip_grad_norm({"a": jnp.ones(2), "n": [jnp.ones(2, jnp.int32)]}, 1.0),
    TypeError,
    "`grads` must have floating or complex leaves, got int32[2] at 'n/0': leave it out of the tree, or mask it "
    "with `optax.masked`.",
  ),
  "bool leaf in update": (
    lambda: update(clipjax.clip_by_global_norm(1.0), {"layer": {"w": jnp.ones(2), "b": jnp.array([True])}}),
    TypeError,
    "`updates` must have floating or complex leaves, got bool[1] at 'layer/b': leave it out of the tree, or "
    "mask it with `optax.masked`.",
  ),
  "Python int leaf": (
    lambda: clipjax.global_norm([1.0, 2]),
    TypeError,
    "`tree` must have floating or complex leaves, got 2 (int) at '1': leave it out of the tree, or mask it with "
    "`optax.masked`.",
  ),
  "object leaf": (
    lambda: clipjax.leaf_norms({"f": print}),
    TypeError,
    "`tree` must have floating or complex leaves, got a builtin_function_or_method at 'f': leave it out of the tree, "
    "or mask it with `optax.masked`.",
  ),
  "scale dtype": (
    lambda: clipjax.global_norm(jnp.ones(2, jnp.float8_e8m0fnu)),
    TypeError,
    "`tree` must have floating or complex leaves, got float8_e8m0fnu[2] at '.': leave it out of the tree, or "
    "mask it with `optax.masked`.",
  ),
  "float4": (
    lambda: clipjax.clip_grad_value(jnp.ones(2, jnp.float4_e2m1fn), 1.0),
    TypeError,
    "`grads` must have floating or complex leaves, got float4_e2m1fn[2] at '.': leave it out of the tree, or "
    "mask it with `optax.masked`.",
  ),
  "key leaf": (
    lambda: clipjax.clip_grad_norm(jax.random.key(0), 1.0),
    TypeError,
    "`grads` must have floating or complex leaves, got key<fry>[] at '.': leave it out of the tree, or mask it "
    "with `optax.masked`.",
  ),
  "complex by value": (
    lambda: update(clipjax.clip_by_value(1.0), [jnp.ones(1), jnp.ones(1, jnp.complex64)], [1.0, 1.0]),
    TypeError,
    "`updates` must have real leaves to clip by value, got complex64[1] at '1': clip complex leaves by norm.",
  ),
  "complex by value in a function": (
    lambda: clipjax.clip_grad_value([jnp.ones(1), jnp.ones(1, jnp.complex64)], 1.0),
    TypeError,
    "`grads` must have real leaves to clip by value, got complex64[1] at '1': clip complex leaves by norm.",
  ),
  "fewer leaves": (
    lambda: update(clipjax.clip_by_global_norm(1.0), {"layer": {"w": jnp.ones(2)}}),
    ValueError,
    "`updates` must have as many floating leaves as `init` saw, 2, got 1 (missing: 'layer/b'): call `init` with the "
    "parameters that you train.",
  ),
  "more leaves": (
    lambda: update(clipjax.clip_by_leaf_norm(1.0), {**TREE, "head": jnp.ones(2)}),
    ValueError,
    "`updates` must have as many floating leaves as `init` saw, 2, got 3 (new: 'head'): call `init` with the "
    "parameters that you train.",
  ),
  "label without threshold": (
    lambda: clipjax.clip_by_group_norm({"w": 1.0}, BY_PATH).init(TREE),
    ValueError,
    "`max_norm` must have a threshold for every label, got none for 'b' of leaf 'layer/b' (it has 'w'): add it, with "
    "None to exempt the group.",
  ),
  "threshold without leaves": (
    lambda: clipjax.clip_by_group_norm({"w": 1.0, "b": 1.0, "head": None}, BY_PATH).init(TREE),
    ValueError,
    "`max_norm` must have thresholds for labels in use, got one for 'head', which no leaf has (the leaves have 'b', "
    "'w'): remove it, or mend `groups`.",
  ),
  "label None": (
    lambda: clipjax.clip_by_group_norm(1.0, lambda path, leaf: None).init(TREE),
    TypeError, "`groups` must give strings, got a NoneType for leaf 'layer/b': pass a label.",
  ),
  "tree of labels": (
    lambda: clipjax.clip_by_group_norm(1.0, {"layer": {"w": "x"}}).init(TREE),
    ValueError, "`groups` must be a function (path, leaf) -> label or a tree of labels like the parameters: ...",
  ),
  "untracked schedule": (
    lambda: clipjax.clip_by_global_norm(lambda count: 1.0, track=False),
    ValueError,
    "`track=False` keeps no state, so that `max_norm` must be a number or an array, got a schedule or a rule: leave "
    "`track` at True.",
  ),
  "untracked rule in a dict": (
    lambda: clipjax.clip_by_group_norm({"w": 1.0, "b": rules.minimum(1.0, 2.0)}, BY_PATH, track=False),
    ValueError,
    "`track=False` keeps no state, so that `max_norm` must be a number or an array, got a schedule or a rule: leave "
    "`track` at True.",
  ),
  "dict for a global clip": (
    lambda: clipjax.clip_by_global_norm({"w": 1.0}),
    TypeError,
    "`max_norm` must be a number, a scalar array, a schedule or a clipjax.rules.Rule, got a dict: pass a float such as "
    "1.0; a dict by label is for clip_by_group_norm.",
  ),
  "name": (
    lambda: clipjax.clip_by_global_norm(1.0, name=""),
    TypeError, "`name` must be a nonempty string, got '' (str): pass a word such as \"grad\".",
  ),
  "axis_name": (
    lambda: clipjax.global_norm(TREE, axis_name=3),
    TypeError,
    "`axis_name` must be a name, a tuple of names or a prefix tree of them, got 3 (int): pass the names as strings.",
  ),
  "axis_name tree": (
    lambda: clipjax.global_norm(TREE, axis_name={"layers": "x"}),
    ValueError, "`axis_name` must be a name, a tuple of names or a prefix tree of them, got {'layers': 'x'}: ...",
  ),
  "shape of a limit": (
    lambda: update(
      clipjax.clip_by_leaf_norm(rules.Rule(lambda s, d: (), lambda n, s, *, global_norm: (jnp.ones(3), 1.0, s))), TREE
    ),
    ValueError,
    "a rule's `limit` must have shape () or that of the norms, (2,), got (3,): compute it from `norms` element by "
    "element.",
  ),
  "state of another transformation": (
    lambda: clipjax.clip_by_global_norm(1.0).update(TREE, optax.EmptyState()),
    TypeError,
    "`state` must be the ClipState that `init` gave, got an EmptyState: pass the state of this transformation, or "
    "`track=False` to go on with a checkpoint of optax.clip_by_global_norm.",
  ),
  "eager error": (
    lambda: clipjax.clip_grad_norm({"a": jnp.array([jnp.nan]), "b": jnp.ones(2)}, 1.0, on_nonfinite="error"),
    FloatingPointError,
    "the gradient is not finite (norm nan) in 'a': lower the learning rate, or pass on_nonfinite=\"zero\" to drop such "
    "steps.",
  ),
  "eager error of ten leaves": (
    lambda: broken_leaves(10),
    FloatingPointError,
    "the gradient is not finite (norm nan) in '0', '1', '2', '3', '4', '5', '6', '7', '8', '9': lower the learning "
    "rate, or pass on_nonfinite=\"zero\" to drop such steps.",
  ),
  "eager error of more": (
    lambda: broken_leaves(11),
    FloatingPointError,
    "the gradient is not finite (norm nan) in '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', ...: lower the "
    "learning rate, or pass on_nonfinite=\"zero\" to drop such steps.",
  ),
  "eager error of a norm that is given": (
    lambda: clipjax.clip_grad_norm(jnp.ones(2), 1.0, norm=jnp.inf, on_nonfinite="error"),
    FloatingPointError,
    "the gradient is not finite (norm inf): lower the learning rate, or pass on_nonfinite=\"zero\" to drop such steps.",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES))
def test_whole_message(case):
  call, kind, text = CASES[case]
  with pytest.raises(kind) as error:
    call()
  message = str(error.value)
  if text.endswith("..."):  # What follows is the text of JAX on where the trees differ.
    assert message.startswith(text[:-3]) and len(message) > len(text)
  else:
    assert message == text


def test_no_message_shows_contents_of_an_array():
  with pytest.raises(TypeError) as error:
    clipjax.clip_grad_norm({"n": jnp.array([123456])}, 1.0)
  assert not re.search("123456", str(error.value))
