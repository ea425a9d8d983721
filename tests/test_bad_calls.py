"""Bad calls: every public argument reaches its check, and an `update` that fails leaves its state as it was.

The whole text of each check is in `test_messages.py`; files and the command line are in `test_bad_files.py`.
"""

import inspect
import math
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import clipjax
from clipjax import rules

TREE = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
BY_PATH = lambda path, leaf: path.split("/")[-1]  # noqa: E731

# Every argument of every function ------------------------------------------------------------------------------------

SOUND = {  # For arguments without a default.
  **dict.fromkeys(("max_norm", "max_rms", "max_value", "rule_a", "rule_b", "rule", "quantile", "ratio", "decay"), 1.0),
  **dict.fromkeys(("grads", "tree"), TREE),
  **dict.fromkeys(("clip", "optimizer", "inner"), optax.identity()),
  **dict.fromkeys(("n", "warmup_steps", "percentile"), 1),
  "groups": BY_PATH,
  "opt_state": optax.EmptyState(),
}
BAD = {
  **dict.fromkeys(("max_norm", "max_rms", "max_value", "clipping", "norm", "norm_rule", "loss_rule"), ("1", -1.0)),
  **dict.fromkeys(("rule_a", "rule_b", "rule"), (None, -1.0)),
  **dict.fromkeys(("clip", "optimizer", "inner"), (1.0, optax.adam)),
  **dict.fromkeys(("track", "per_leaf", "param_norms", "include_current"), ("no", None)),
  **dict.fromkeys(("learning_rate", "initial"), (math.inf, 0.0, "1")),
  **dict.fromkeys(("sigma", "std_floor"), (math.inf, -1.0, "1")),
  **dict.fromkeys(("ratio", "z_thresh"), (0, None)),
  **dict.fromkeys(("quantile", "decay"), (2.0, -0.1, "1")),
  **dict.fromkeys(("window", "min_count", "restart_after", "max_consecutive_skips"), (0, 1.5)),
  **dict.fromkeys(("n", "warmup_steps", "history"), (-1, rules.zscore())),
  **dict.fromkeys(("grads", "tree"), ("grads",)),
  "percentile": (101, -1, "10"),
  "ddof": (2, -1),
  "mode": ("median",),
  "record": (None,),
  "eps": (-1.0, math.inf),
  "ord": ("fro", -1),
  "axis": ("0",),
  "axis_name": (3, ("x", "x")),
  "groups": (None,),
  "name": ("", 3),
  "on_nonfinite": ("skip",),
  "opt_state": ("opt_state", clipjax.metrics),
  "stacked": (0.5, 7),
}
FUNCTIONS = {
  name: value
  for module in (clipjax, rules)
  for name, value in vars(module).items()
  if name in getattr(module, "__all__", dir(rules)) and inspect.isfunction(value)
}
ARGUMENTS = [(f, a) for f in FUNCTIONS for a in inspect.signature(FUNCTIONS[f]).parameters]


@pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
def test_every_argument_reaches_its_check(function, argument):
  required = [p.name for p in inspect.signature(FUNCTIONS[function]).parameters.values() if p.default is p.empty]
  for value in BAD[argument]:
    given = {name: SOUND[name] for name in required} | {argument: value}
    with pytest.raises((TypeError, ValueError), match=rf"^`{argument}` must "):
      FUNCTIONS[function](**given).init(TREE)  # Only `stacked` waits for a tree.


@pytest.mark.parametrize("number", [10**400, 10**5000], ids=["401 digits", "5001 digits"])
def test_an_integer_beyond_every_float_is_an_error(number):
  schedule = clipjax.clip_by_global_norm(lambda count: number)
  for make in (
    lambda: clipjax.clip_by_global_norm(number),
    lambda: clipjax.zclip(number),
    lambda: schedule.update(TREE, schedule.init(TREE)),
  ):
    with pytest.raises(ValueError, match=r"must be within the range of a float, got an integer of \d+ bits: pass "):
      make()


# Calls of `update` ---------------------------------------------------------------------------------------------------


def rule_of(update, init=jnp.zeros):
  return clipjax.clip_by_global_norm(rules.Rule(init, update))


def answering(limit=1.0, target=1.0, state=lambda s: s, init=jnp.zeros):
  return rule_of(lambda norms, s, *, global_norm: (limit, target, state(s)), init)


def swapped(**fields):
  """Gradients, and the state with other fields."""
  return lambda state: (TREE, state._replace(**fields), TREE)


GLOBAL, LEAF, ZCLIP = clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(1.0), clipjax.zclip()
AUTO, WATCH, AGC = clipjax.autoclip(window=10), clipjax.watch(), clipjax.adaptive_grad_clip()
MOMENTUM = optax.sgd(1.0, momentum=0.5)
SKIP, LOSS = clipjax.skip_steps(MOMENTUM), clipjax.skip_steps(MOMENTUM, loss_rule=2.0)
TRACKING = clipjax.skip_steps(MOMENTUM, norm_rule=rules.quantile_tracking(0.5), loss_rule=rules.zscore())
EFFECT = clipjax.clip_effect(clipjax.clip_by_leaf_norm(1.0), MOMENTUM)
GROUPS = clipjax.clip_by_group_norm({"w": 1.0, "b": 5.0}, BY_PATH)
FEWER = {"layer": {"w": jnp.ones((2, 3))}}
INT = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.int32)}}
PASS = "pass the state of this transformation"
AGAIN = f"{PASS}, or call `init` again."
TRAIN = "call `init` with the parameters that you train."
MODEL = f"as `init` made it, got (3,): it was restored from another model or configuration; {TRAIN}"
INTEGER = (
  "`updates` must have floating or complex leaves, got int32[3] at 'layer/b': leave it out of the tree, or mask it "
  "with `optax.masked`."
)
TRACE = "(TraceState, EmptyState) of 2 arrays"
WRAPPED = f"must match what the wrapped `init` returns, {TRACE}, got"
RULE = "must match what the rule's `init` returned,"
REAL, FROM_NORMS = "must be a real number or an array of them", "compute it from `norms`, with jnp.inf for no limit."
LIKE, KEEP = "a rule's `update` must return a state like the one it was given,", "keep its structure and shapes."
# The transformation; what `update` is given, as a function of its state; the error.
UPDATES = {
  "another rule's state": (
    ZCLIP, lambda s: (TREE, GLOBAL.init(TREE)),
    ValueError, f"`state.rule` {RULE} ZScoreState(float(), float(), int(), int()), got StepCount(int()): {AGAIN}",
  ),
  "another window": (
    AUTO, lambda s: (TREE, clipjax.autoclip(window=20).init(TREE)),
    ValueError,
    f"`state.rule` {RULE} Ring(float(10,), int(), int()), got Ring(float(20,), int(), int()): {AGAIN}",
  ),
  "another rule's state in skip_steps": (
    TRACKING, lambda s: (TREE, s._replace(norm_rule=SKIP.init(TREE).norm_rule), TREE),
    ValueError, f"`state.norm_rule` {RULE} array(float()), got StepCount(int()): {AGAIN}",
  ),
  "another loss rule's state in skip_steps": (
    TRACKING, lambda s: (TREE, s._replace(loss_rule=s.norm_rule), TREE),
    ValueError,
    f"`state.loss_rule` {RULE} ZScoreState(float(), float(), int(), int()), got array(float()): {AGAIN}",
  ),
  "by leaf with a global state": (
    LEAF, lambda s: (TREE, GLOBAL.init(TREE)),
    ValueError, f"`state` must hold norms by leaf, got norms of the whole tree: {AGAIN}",
  ),
  "by group with a state by leaf": (
    GROUPS, lambda s: (TREE, LEAF.init(TREE)),
    ValueError, f"`state` must hold norms by group, got norms by leaf: {AGAIN}",
  ),
  "thresholds in another order": (
    GROUPS, lambda s: (TREE, clipjax.clip_by_group_norm({"b": 5.0, "w": 1.0}, BY_PATH).init(TREE)),
    ValueError, f"`state` must have the labels of `max_norm`, 'w', 'b', in this order, got 'b', 'w': {AGAIN}",
  ),
  "AGC with the state of a clip by leaf": (
    AGC, lambda s: (TREE, LEAF.init(TREE), TREE),
    ValueError, f"`state` must have no rule, as `init` made it, got a StepCount: {AGAIN}",
  ),
  "a watch without its history": (
    clipjax.watch(history=4), lambda s: (TREE, WATCH.init(TREE)),
    ValueError, f"`state` must have a history of 4 norms, as `init` made it, got 0: {AGAIN}",
  ),
  "a watch with a history that it has not asked for": (
    WATCH, lambda s: (TREE, clipjax.watch(history=4).init(TREE)),
    ValueError, f"`state` must have a history of 0 norms, as `init` made it, got 4: {AGAIN}",
  ),
  "a watch with the state of a clip": (
    WATCH, lambda s: (TREE, GLOBAL.init(TREE)),
    TypeError, f"`state` must be the WatchState that `init` returned, got a ClipState: {PASS}.",
  ),
  "a clip with the state of a chain": (
    GLOBAL, lambda s: (TREE, (s,)),
    TypeError,
    f"`state` must be the ClipState that `init` returned, got a tuple: {PASS}, or use `track=False` to continue from a "
    "checkpoint of optax.clip_by_global_norm.",
  ),
  "skip_steps with the state of what it wraps": (
    SKIP, lambda s: (TREE, s.inner_state, TREE),
    TypeError, f"`state` must be the SkipState that `init` returned, got a tuple: {PASS}.",
  ),
  "clip_effect with the state of its chain": (
    EFFECT, lambda s: (TREE, s.inner_state, TREE),
    TypeError, f"`state` must be the EffectState that `init` returned, got a tuple: {PASS}.",
  ),
  "skip_steps with the state of another optimizer": (
    SKIP, swapped(inner_state=optax.adam(1.0).init(TREE)),
    ValueError, f"`state.inner_state` {WRAPPED} (ScaleByAdamState, EmptyState) of 5 arrays: {AGAIN}",
  ),
  "skip_steps with the state of an optimizer that is no chain": (
    SKIP, lambda s: (TREE, s._replace(inner_state=optax.trace(0.5).init(TREE))),
    ValueError, f"`state.inner_state` {WRAPPED} TraceState of 2 arrays: {AGAIN}",
  ),
  "clip_effect with the state of another clip": (
    EFFECT, lambda s: (TREE, s._replace(inner_state=(WATCH.init(TREE), s.inner_state[1])), TREE),
    ValueError,
    "`state.inner_state` must match what the wrapped `init` returns, (ClipState, tuple) of 13 arrays, got "
    f"(WatchState, tuple) of 14 arrays: {AGAIN}",
  ),
  "clip_effect with the second state of another optimizer": (
    EFFECT, swapped(unclipped_state=optax.adam(1.0).init(TREE)),
    ValueError, f"`state.unclipped_state` {WRAPPED} (ScaleByAdamState, EmptyState) of 5 arrays: {AGAIN}",
  ),
  "clip_effect of another model": (
    EFFECT, swapped(ratios=jnp.zeros(3)), ValueError, f"`state` must have ratios of shape (2,), {MODEL}",
  ),
  "a clip of another model": (
    LEAF, swapped(norms=jnp.zeros(3)), ValueError, f"`state` must have norms of shape (2,), {MODEL}",
  ),
  "a watch of another model": (
    WATCH, swapped(norms=jnp.zeros(3)), ValueError, f"`state` must have norms of shape (2,), {MODEL}",
  ),
  "fewer leaves in skip_steps": (
    SKIP, lambda s: (FEWER, s, FEWER),
    ValueError, f"`updates` must have as many floating leaves as `init` saw, 2, got 1 (missing: 'layer/b'): {TRAIN}",
  ),
  "integers in clip_effect": (EFFECT, lambda s: (INT, s, TREE), TypeError, INTEGER),
  "integers in a watch": (WATCH, lambda s: (INT, s), TypeError, INTEGER),
  "integers in skip_steps": (SKIP, lambda s: (INT, s, TREE), TypeError, INTEGER),
  "AGC without params": (
    AGC, lambda s: (TREE, s),
    ValueError,
    "`params` must be given to clip by the norm of parameters, got None: call update(grads, state, params).",
  ),
  "AGC with other params": (
    AGC, lambda s: (TREE, s, FEWER),
    ValueError,
    "`params` must have the floating leaves of `updates`, got none for the float32[3] at 'layer/b': pass the "
    "parameters that the updates belong to.",
  ),
  "no value for a loss rule": (
    LOSS, lambda s: (TREE, s, TREE),
    ValueError, "`value` must be given with a `loss_rule`, got None: call update(grads, state, params, value=loss).",
  ),
}  # fmt: skip
NEVER_RIGHT = {
  "an axis that a leaf does not have": (
    clipjax.adaptive_grad_clip(axis=1), lambda s: (TREE, s, TREE),
    ValueError,
    "`axis` must be within the rank of every leaf, got 1 for shape (3,) at 'layer/b': exempt that leaf with "
    "`optax.masked`.",
  ),
  "a rule that returns a number": (
    rule_of(lambda n, s, *, global_norm: 1.0), swapped(),
    TypeError, "a rule's `update` must return (limit, target, state), got 1.0 (float): return all three.",
  ),
  "a rule that returns a pair": (
    rule_of(lambda n, s, *, global_norm: (1.0, s)), swapped(),
    TypeError, "a rule's `update` must return (limit, target, state), got a tuple of 2: return all three.",
  ),
  "a limit that is a string": (
    answering(limit="a"), swapped(), TypeError, f"a rule's `limit` {REAL}, got 'a' (str): {FROM_NORMS}",
  ),
  "a limit that is a bool": (
    answering(limit=True), swapped(), TypeError, f"a rule's `limit` {REAL}, got True (bool): {FROM_NORMS}",
  ),
  "a target None": (
    answering(target=None), swapped(), TypeError, f"a rule's `target` {REAL}, got a NoneType: {FROM_NORMS}",
  ),
  "a complex limit": (
    answering(limit=jnp.complex64(1)), swapped(), TypeError, f"a rule's `limit` {REAL}, got complex64[]: {FROM_NORMS}",
  ),
  "a rule's state of another structure": (
    answering(state=lambda s: (s, s)), swapped(),
    ValueError, f"{LIKE} array(float()), got tuple(float(), float()): {KEEP}",
  ),
  "a rule's state of another shape": (
    answering(state=lambda s: jnp.zeros(3)), swapped(),
    ValueError, f"{LIKE} array(float()), got array(float(3,)): {KEEP}",
  ),
  "a rule's count that becomes a fraction": (
    answering(state=lambda s: s.astype(jnp.float32), init=lambda *_: jnp.zeros((), jnp.int32)), swapped(),
    ValueError, f"{LIKE} array(int()), got array(float()): {KEEP}",
  ),
  "a schedule of strings": (
    clipjax.clip_by_global_norm(lambda count: "1"), swapped(),
    TypeError,
    "a schedule must return a real number, got '1' (str): call a rule of clipjax.rules first, as in rules.zscore().",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(UPDATES | NEVER_RIGHT))
def test_an_update_that_fails_changes_nothing(case):
  tx, arguments, kind, text = (UPDATES | NEVER_RIGHT)[case]
  state = tx.init(TREE)
  given = arguments(state)
  before = jax.tree.map(np.array, (state, given))
  want = tx.update(TREE, state, TREE, value=1.0) if case in UPDATES else None
  for update in (tx.update, jax.jit(tx.update)):
    with pytest.raises(kind) as error:
      update(*given)
    assert (type(error.value), str(error.value).replace("traced ", "")) == (kind, text)
  assert_bits_equal(jax.tree.map(np.array, (state, given)), before)
  if case in UPDATES:
    assert_bits_equal(tx.update(TREE, state, TREE, value=1.0), want)


@pytest.mark.parametrize(
  ("value", "kind", "got"),
  [
    ("1", TypeError, "'1' (str)"),
    (jnp.ones(2), ValueError, "float32[2]"),
    (np.complex64(1), ValueError, "complex64[]"),
  ],
)
def test_a_value_that_is_no_loss(value, kind, got):
  with pytest.raises(kind) as error:
    LOSS.update(TREE, LOSS.init(TREE), TREE, value=value)
  assert str(error.value) == f"`value` must be a scalar loss, got {got}: pass its mean over the batch."
  # Without a rule for it, it may be meant for the wrapped transformation, and is none of our business.
  _, new = SKIP.update(TREE, SKIP.init(TREE), TREE, value=value)
  assert (new.loss, new.skipped_steps) == (0, 0)


def test_a_state_restored_as_numpy_or_in_another_width_is_no_other_state():
  for tx in (AUTO, ZCLIP, GROUPS, WATCH, SKIP):
    state = jax.tree.map(lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), tx.init(TREE))
    assert tx.update(TREE, state, TREE)[1].steps == 1


# Axis names ----------------------------------------------------------------------------------------------------------

MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
AROUND = "`axis_name` must name axes of the shard_map, pmap or vmap around"
OUT = "correct the name, or leave `axis_name` out under plain jit."


def test_an_axis_that_nothing_around_has():
  with pytest.raises(ValueError, match="axis_name") as error:
    clipjax.global_norm(jnp.arange(8.0), axis_name="x")
  assert str(error.value) == f"{AROUND}, got 'x', and there is none here: {OUT}"


@pytest.mark.parametrize(("name", "check_vma"), [("data", True), (("x", "data"), False)])
def test_an_axis_that_the_shard_map_around_does_not_have(name, check_vma):
  norm = jax.shard_map(
    lambda x: clipjax.global_norm(x, axis_name=name), mesh=MESH, in_specs=P("x"), out_specs=P(), check_vma=check_vma
  )
  with pytest.raises(ValueError, match="axis_name") as error:
    jax.eval_shape(norm, jnp.arange(8.0))
  assert str(error.value) == f"{AROUND}, got 'data', and there is only 'x' here: {OUT}"


def test_axis_names_of_pmap_and_vmap_are_known():
  for run in (jax.pmap, jax.vmap):
    norms = run(lambda x: clipjax.global_norm(x, axis_name="i"), axis_name="i")(jnp.ones(8))
    np.testing.assert_allclose(norms, np.full(8, 8**0.5), rtol=1e-6)


@pytest.mark.parametrize("chained", [False, True])
def test_the_warning_of_a_missing_axis_name_points_at_the_caller(chained):
  tx = clipjax.clip_by_global_norm(1.0)
  tx = optax.chain(tx, optax.sgd(1.0)) if chained else tx
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    # JAX itself calls `update`: the nearest line of the user is the one below.
    state, specs = tx.init(jnp.ones(8)), {"in_specs": (P("x"), P()), "out_specs": (P("x"), P())}
    jax.eval_shape(jax.shard_map(tx.update, mesh=MESH, check_vma=False, **specs), jnp.ones(8), state)
  assert {pathlib.Path(w.filename).name for w in caught if "axis_name" in str(w.message)} == {"test_bad_calls.py"}
