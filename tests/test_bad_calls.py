"""Bad input to transformations, rules and what reads states: the whole message, and a state that is as it was.

What a function is given at once is in `test_messages.py`; files and the command line are in `test_bad_files.py`.
"""

import math
import pathlib
import types
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
THRESHOLD = "must be a number >= 0 or a scalar array"
RANGE, INTEGER, FLOAT, FLAG = (
  "choose one in that range.",
  "pass a Python integer.",
  "pass a float.",
  "pass one of them.",
)
ANEW = "pass the state of this transformation, or call `init` anew."
AXES = "must be a name, a tuple of names or a prefix tree of them"
OPT_STATE = "must be the state of an optimizer"
RETURNED = "pass what `init` or `update` returned."


def ema(**changes):
  return rules.ema_ratio(**{"ratio": 1.04, "decay": 0.9, "warmup_steps": 1, "max_norm": 1.0, **changes})


# Arguments of factories and rules: name, call, kind, message.
ARGUMENTS = {
  "track as a string": (
    lambda: clipjax.clip_by_global_norm(1.0, track="no"),
    TypeError, f"`track` must be True or False, got 'no' (str): {FLAG}",
  ),
  "track None": (
    lambda: clipjax.clip_by_leaf_norm(1.0, track=None),
    TypeError, f"`track` must be True or False, got a NoneType: {FLAG}",
  ),
  "track 0": (
    lambda: clipjax.clip_by_group_norm(1.0, BY_PATH, track=0),
    TypeError, f"`track` must be True or False, got 0 (int): {FLAG}",
  ),
  "track of rms": (
    lambda: clipjax.clip_by_block_rms(1.0, track=np.True_),
    TypeError, f"`track` must be True or False, got bool[]: {FLAG}",
  ),
  "axis_name in a factory": (
    lambda: clipjax.clip_by_global_norm(1.0, axis_name=3),
    TypeError, f"`axis_name` {AXES}, got 3 (int): pass the names as strings.",
  ),
  "axis_name of a clip by value": (
    lambda: clipjax.clip_by_value(1.0, axis_name=0.5),
    TypeError, f"`axis_name` {AXES}, got 0.5 (float): pass the names as strings.",
  ),
  "axis_name of a watch": (
    lambda: clipjax.watch(axis_name=True),
    TypeError, f"`axis_name` {AXES}, got True (bool): pass the names as strings.",
  ),
  "axis_name of skip_steps": (
    lambda: clipjax.skip_steps(optax.sgd(1.0), axis_name={"w": 1}),
    TypeError, f"`axis_name` {AXES}, got 1 (int): pass the names as strings.",
  ),
  "axis_name twice": (
    lambda: clipjax.clip_by_leaf_norm(1.0, axis_name=("x", "x")),
    ValueError, "`axis_name` must name each axis once, got ('x', 'x'): leave out what is there twice.",
  ),
  "no groups": (
    lambda: clipjax.clip_by_group_norm(1.0, None),
    TypeError,
    "`groups` must be a function (path, leaf) -> label or a tree of labels, got a NoneType: pass it as the second "
    "argument; under `optax.inject_hyperparams`, name it in `static_args`.",
  ),
  "no thresholds": (
    lambda: clipjax.clip_by_group_norm({}, BY_PATH).init(TREE),
    ValueError,
    "`max_norm` must have a threshold for every label, got none for 'b' of leaf 'layer/b' (it has none): add it, with "
    "None to exempt the group.",
  ),
  "a label None among thresholds": (
    lambda: clipjax.clip_by_group_norm({None: 1.0}, BY_PATH),
    TypeError, "labels of groups must be strings, got a NoneType in `max_norm`: pass strings.",
  ),
  "a label that is a list": (
    lambda: clipjax.clip_by_group_norm(1.0, lambda path, leaf: [path]).init(TREE),
    TypeError, "`groups` must give strings, got a list for leaf 'layer/b': pass a label.",
  ),
  "a threshold in a dict that is a string": (
    lambda: clipjax.clip_by_group_norm({"w": "1", "b": 1.0}, BY_PATH),
    TypeError, f"`max_norm['w']` {THRESHOLD}, got '1' (str): pass a float such as 1.0.",
  ),
  "a policy that is an array": (
    lambda: clipjax.clip_by_global_norm(1.0, on_nonfinite=np.array(["zero", "x"])),
    ValueError,
    '`on_nonfinite` must be one of "propagate", "zero", "error", got <U4[2]: pass "zero" to drop such steps or '
    '"propagate" to make them visible.',
  ),
  "a policy that is a list": (
    lambda: clipjax.adaptive_grad_clip(on_nonfinite=["zero"]),
    ValueError,
    '`on_nonfinite` must be one of "propagate", "zero", "error", got [\'zero\']: pass "zero" to drop such steps or '
    '"propagate" to make them visible.',
  ),
  "a name that is a number": (
    lambda: clipjax.watch(name=3),
    TypeError, '`name` must be a nonempty string, got 3 (int): pass a word such as "grad".',
  ),
  "per_leaf of metrics": (
    lambda: clipjax.metrics(optax.EmptyState(), per_leaf="yes"),
    TypeError, f"`per_leaf` must be True or False, got 'yes' (str): {FLAG}",
  ),
  "percentile above 100": (
    lambda: clipjax.autoclip(101),
    ValueError, f"`percentile` must be a number >= 0 and <= 100, got 101: {RANGE}",
  ),
  "percentile NaN": (
    lambda: rules.percentile(math.nan),
    ValueError, f"`percentile` must be a number >= 0 and <= 100, got nan: {RANGE}",
  ),
  "percentile as a string": (
    lambda: clipjax.autoclip("10"),
    TypeError, f"`percentile` must be a number >= 0 and <= 100, got '10' (str): {FLOAT}",
  ),
  "a window of 0": (
    lambda: clipjax.autoclip(window=0),
    ValueError, f"`window` must be an integer >= 1, got 0: {RANGE}",
  ),
  "a window that is a float": (
    lambda: rules.percentile(10, window=10.0),
    TypeError, f"`window` must be an integer >= 1, got 10.0 (float): {INTEGER}",
  ),
  "include_current as a string": (
    lambda: clipjax.autoclip(include_current="no"),
    TypeError, f"`include_current` must be True or False, got 'no' (str): {FLAG}",
  ),
  "an infinite learning rate": (
    lambda: rules.quantile_tracking(0.5, learning_rate=math.inf),
    ValueError, f"`learning_rate` must be a finite number > 0, got inf: {RANGE}",
  ),
  "an infinite start": (
    lambda: rules.quantile_tracking(0.5, initial=math.inf),
    ValueError, f"`initial` must be a finite number > 0, got inf: {RANGE}",
  ),
  "an infinite sigma": (
    lambda: rules.rolling_sigma(math.inf),
    ValueError, f"`sigma` must be a finite number >= 0, got inf: {RANGE}",
  ),
  "an infinite floor": (
    lambda: rules.rolling_sigma(std_floor=math.inf),
    ValueError, f"`std_floor` must be a finite number >= 0, got inf: {RANGE}",
  ),
  "a mode that is an array": (
    lambda: rules.zscore(mode=np.array(["mean", "max"])),
    ValueError, '`mode` must be one of "reciprocal", "mean", "max", got <U4[2]: choose one of them.',
  ),
  "a record None": (
    lambda: clipjax.zclip(record=None),
    ValueError, '`record` must be one of "clipped", "raw", "none", got None: choose one of them.',
  ),
  "a z that is no number": (
    lambda: clipjax.zclip(None),
    TypeError, f"`z_thresh` must be a number > 0, got a NoneType: {FLOAT}",
  ),
  "z as a numpy vector": (
    lambda: rules.zscore(np.ones(2)),
    TypeError, f"`z_thresh` must be a number > 0, got float64[2]: {FLOAT}",
  ),
  "a cap that is a string": (
    lambda: clipjax.zclip(max_norm="1"),
    TypeError, f"`max_norm` {THRESHOLD}, got '1' (str): pass a float such as 1.0.",
  ),
  "a decay above 1": (lambda: ema(decay=2.0), ValueError, f"`decay` must be a number >= 0 and <= 1, got 2.0: {RANGE}"),
  "a ratio of 0": (lambda: clipjax.adagc(0), ValueError, f"`ratio` must be a number > 0, got 0: {RANGE}"),
  "a warm-up below 0": (
    lambda: ema(warmup_steps=-1), ValueError, f"`warmup_steps` must be an integer >= 0, got -1: {RANGE}",
  ),
  "no threshold for the warm-up": (
    lambda: ema(max_norm=None), TypeError, f"`max_norm` must be a number >= 0, got a NoneType: {FLOAT}",
  ),
  "a rule for a warm-up": (
    lambda: clipjax.adagc(max_norm=rules.zscore()),
    TypeError, f"`max_norm` must be a number >= 0, got a Rule: {FLOAT}",
  ),
  "after, arguments swapped": (
    lambda: rules.delayed(rules.zscore(), 3),
    TypeError, f"`n` must be an integer >= 0, got a Rule: {INTEGER}",
  ),
  "lower of nothing": (
    lambda: rules.minimum(None, 1.0),
    TypeError,
    "`rule_a` must be a number, a scalar array, a schedule or a clipjax.rules.Rule, got a NoneType: pass a float such "
    "as 1.0; a dict by label is for clip_by_group_norm.",
  ),
  "lower of a negative number": (
    lambda: rules.minimum(1.0, -1.0),
    ValueError, "`rule_b` must be >= 0, got -1.0: pass 0 to zero the gradient or `float('inf')` only to measure.",
  ),
  "a rule of no functions": (
    lambda: clipjax.clip_by_global_norm(rules.Rule(1, print)),
    TypeError, "`max_norm` must be a Rule of two functions, got 1 (int) as its `init`: see clipjax.rules.Rule.",
  ),
  "a rule without an update": (
    lambda: clipjax.skip_steps(optax.sgd(1.0), norm_rule=rules.Rule(print, None)),
    TypeError, "`norm_rule` must be a Rule of two functions, got a NoneType as its `update`: see clipjax.rules.Rule.",
  ),
  "an optimizer of another library to be protected": (
    lambda: clipjax.skip_steps(types.SimpleNamespace(init=lambda params: ())),
    TypeError, "`inner` must be an Optax transformation, got a SimpleNamespace: pass one such as optax.adam(1e-3).",
  ),
  "a factory to be protected": (
    lambda: clipjax.skip_steps(optax.sgd),
    TypeError, "`inner` must be an Optax transformation, got a function: pass one such as optax.adam(1e-3).",
  ),
  "a clip that is a number": (
    lambda: clipjax.clip_effect(1.0, optax.sgd(1.0)),
    TypeError,
    "`clip` must be an Optax transformation, got 1.0 (float): pass one such as clipjax.clip_by_global_norm(1.0).",
  ),
  "a factory behind a clip": (
    lambda: clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.adam),
    TypeError, "`optimizer` must be an Optax transformation, got a function: pass one such as optax.adam(1e-3).",
  ),
  "axis_name of clip_effect": (
    lambda: clipjax.clip_effect(optax.identity(), optax.sgd(1.0), axis_name=2),
    TypeError, f"`axis_name` {AXES}, got 2 (int): pass the names as strings.",
  ),
  "skips that are a fraction": (
    lambda: clipjax.skip_steps(optax.sgd(1.0), max_consecutive_skips=1.5),
    TypeError, f"`max_consecutive_skips` must be an integer >= 1 and <= 2147483647, got 1.5 (float): {INTEGER}",
  ),
  "a loss rule below 0": (
    lambda: clipjax.skip_steps(optax.sgd(1.0), loss_rule=-1.0),
    ValueError, "`loss_rule` must be >= 0, got -1.0: pass 0 to zero the gradient or `float('inf')` only to measure.",
  ),
  "clipping as a string": (
    lambda: clipjax.adaptive_grad_clip("0.01"),
    TypeError, f"`clipping` {THRESHOLD}, got '0.01' (str): pass a float such as 1.0.",
  ),
  "an axis that is a string": (
    lambda: clipjax.adaptive_grad_clip(axis="0"),
    TypeError, "`axis` must be an integer or a tuple of them, got '0' (str): pass integers.",
  ),
  "a batch that is a number": (
    lambda: clipjax.clip_grad_per_example(1.0, 1.0),
    ValueError,
    "`grads` must have a leading batch axis in every leaf, got 1.0 (float) at '.': take them with "
    "jax.vmap(jax.grad(loss), (None, 0)).",
  ),
  "a threshold for each example": (
    lambda: clipjax.clip_grad_per_example(jnp.ones((2, 2)), jnp.ones(2)),
    ValueError, f"`max_norm` {THRESHOLD}, got float32[2]: pass one number, or use clip_by_group_norm.",
  ),
  "gradients and threshold swapped": (
    lambda: clipjax.clip_grad_norm(1.0, TREE),
    TypeError, f"`max_norm` {THRESHOLD}, got a dict: pass a float such as 1.0.",
  ),
  "a norm that is a string": (
    lambda: clipjax.clip_grad_norm(TREE, 1.0, norm="1"),
    TypeError, f"`norm` {THRESHOLD}, got '1' (str): pass a float such as 1.0.",
  ),
  "gradients that are a string": (
    lambda: clipjax.clip_grad_value("grads", 1.0),
    TypeError,
    "`grads` must have floating or complex leaves, got 'grads' (str) at '.': leave it out of the tree, or mask it with "
    "`optax.masked`.",
  ),
  "gradients that are objects": (
    lambda: clipjax.clip_grad_norm([np.array([None])], 1.0),
    TypeError,
    "`grads` must have floating or complex leaves, got object[1] at '0': leave it out of the tree, or mask it with "
    "`optax.masked`.",
  ),
  # What is given in the place of a state.
  "metrics of a transformation": (
    lambda: clipjax.metrics(clipjax.clip_by_global_norm(1.0)),
    TypeError, f"`opt_state` {OPT_STATE}, got a GradientTransformationExtraArgs: {RETURNED}",
  ),
  "metrics of a transformation in a tuple": (
    lambda: clipjax.metrics((optax.EmptyState(), optax.sgd(1.0))),
    TypeError, f"`opt_state` {OPT_STATE}, got a GradientTransformationExtraArgs: {RETURNED}",
  ),
  "check of a transformation": (
    lambda: clipjax.raise_if_nonfinite(optax.GradientTransformation(print, print)),
    TypeError, f"`opt_state` {OPT_STATE}, got a GradientTransformation: {RETURNED}",
  ),
  "metrics of a string": (
    lambda: clipjax.metrics("opt_state"), TypeError, f"`opt_state` {OPT_STATE}, got 'opt_state' (str): {RETURNED}",
  ),
  "the check of a number": (
    lambda: clipjax.raise_if_nonfinite(0.5), TypeError, f"`opt_state` {OPT_STATE}, got 0.5 (float): {RETURNED}",
  ),
  "metrics of a function": (
    lambda: clipjax.metrics(clipjax.metrics), TypeError, f"`opt_state` {OPT_STATE}, got a function: {RETURNED}",
  ),
  "check inside jit": (
    lambda: jax.jit(clipjax.raise_if_nonfinite)(clipjax.clip_by_global_norm(1.0).init(TREE)),
    TypeError,
    "`opt_state` must be of arrays with values, got traced ones: call `raise_if_nonfinite` outside jit, with what "
    "the jitted step returns.",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(ARGUMENTS))
def test_wrong_argument(case):
  call, kind, text = ARGUMENTS[case]
  with pytest.raises(kind) as error:
    call()
  assert (type(error.value), str(error.value)) == (kind, text)


# Calls of `update` --------------------------------------------------------------------------------------------------


def rule_of(update, init=jnp.zeros):
  return clipjax.clip_by_global_norm(rules.Rule(init, update))


GLOBAL, LEAF, ZCLIP = clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(1.0), clipjax.zclip()
AUTO, WATCH, AGC = clipjax.autoclip(window=10), clipjax.watch(), clipjax.adaptive_grad_clip()
MOMENTUM = optax.sgd(1.0, momentum=0.5)
SKIP, LOSS = clipjax.skip_steps(MOMENTUM), clipjax.skip_steps(MOMENTUM, loss_rule=2.0)
EFFECT = clipjax.clip_effect(clipjax.clip_by_leaf_norm(1.0), MOMENTUM)
GROUPS = clipjax.clip_by_group_norm({"w": 1.0, "b": 5.0}, BY_PATH)
UNTRACKED = ", or `track=False` to go on with a checkpoint of optax.clip_by_global_norm"
NO_FLOATING = "must have floating or complex leaves"
MASK = "leave it out of the tree, or mask it with `optax.masked`."
TRAIN = "call `init` with the parameters that you train."
INT = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.int32)}}
FEWER = {"layer": {"w": jnp.ones((2, 3))}}
# The transformation; what `update` is given, as a function of its state; the error.
UPDATES = {
  "another rule's state": (
    ZCLIP, lambda s: (TREE, GLOBAL.init(TREE)),
    ValueError,
    "`state.rule` must be as the rule's `init` gave it, ZScoreState(float(), float(), int(), int()), got "
    f"StepCount(int()): {ANEW}",
  ),
  "a constant's clip with another rule's state": (
    GLOBAL, lambda s: (TREE, ZCLIP.init(TREE)),
    ValueError,
    "`state.rule` must be as the rule's `init` gave it, StepCount(int()), got ZScoreState(float(), float(), int(), "
    f"int()): {ANEW}",
  ),
  "another window": (
    AUTO, lambda s: (TREE, clipjax.autoclip(window=20).init(TREE)),
    ValueError,
    "`state.rule` must be as the rule's `init` gave it, Ring(float(10,), int(), int()), got Ring(float(20,), int(), "
    f"int()): {ANEW}",
  ),
  "by leaf with a global state": (
    LEAF, lambda s: (TREE, GLOBAL.init(TREE)),
    ValueError,
    f"`state` must be of norms by leaf, as the one that `init` gave, got one of norms by the whole tree: {ANEW}",
  ),
  "globally with a state by leaf": (
    GLOBAL, lambda s: (TREE, LEAF.init(TREE)),
    ValueError,
    f"`state` must be of norms by the whole tree, as the one that `init` gave, got one of norms by leaf: {ANEW}",
  ),
  "by group with a state by leaf": (
    GROUPS, lambda s: (TREE, LEAF.init(TREE)),
    ValueError, f"`state` must be of norms by group, as the one that `init` gave, got one of norms by leaf: {ANEW}",
  ),
  "thresholds in another order": (
    GROUPS, lambda s: (TREE, clipjax.clip_by_group_norm({"b": 5.0, "w": 1.0}, BY_PATH).init(TREE)),
    ValueError, f"`state` must have the labels of `max_norm`, 'w', 'b', in this order, got 'b', 'w': {ANEW}",
  ),
  "AGC with the state of a clip by leaf": (
    AGC, lambda s: (TREE, LEAF.init(TREE), TREE),
    ValueError, f"`state` must have no rule, as the one that `init` gave, got a StepCount: {ANEW}",
  ),
  "a clip by leaf with the state of AGC": (
    LEAF, lambda s: (TREE, AGC.init(TREE)),
    ValueError, f"`state.rule` must be as the rule's `init` gave it, StepCount(int()), got tuple(): {ANEW}",
  ),
  "a watch without its history": (
    clipjax.watch(history=4), lambda s: (TREE, WATCH.init(TREE)),
    ValueError, f"`state` must have a history of 4 norms, as the one that `init` gave, got 0: {ANEW}",
  ),
  "a watch with a history that it has not asked for": (
    WATCH, lambda s: (TREE, clipjax.watch(history=4).init(TREE)),
    ValueError, f"`state` must have a history of 0 norms, as the one that `init` gave, got 4: {ANEW}",
  ),
  "a watch by leaf with a global state": (
    WATCH, lambda s: (TREE, clipjax.watch(per_leaf=False).init(TREE)),
    ValueError,
    f"`state` must be of norms by leaf, as the one that `init` gave, got one of norms by the whole tree: {ANEW}",
  ),
  "a watch with the state of a clip": (
    WATCH, lambda s: (TREE, GLOBAL.init(TREE)),
    TypeError,
    "`state` must be the WatchState that `init` gave, got a ClipState: pass the state of this transformation.",
  ),
  "a clip with the state of a watch": (
    GLOBAL, lambda s: (TREE, WATCH.init(TREE)),
    TypeError,
    "`state` must be the ClipState that `init` gave, got a WatchState: pass the state of this "
    f"transformation{UNTRACKED}.",
  ),
  "a clip with the state of a chain": (
    GLOBAL, lambda s: (TREE, (s,)),
    TypeError,
    f"`state` must be the ClipState that `init` gave, got a tuple: pass the state of this transformation{UNTRACKED}.",
  ),
  "skip_steps with the state of what it wraps": (
    SKIP, lambda s: (TREE, s.inner_state, TREE),
    TypeError, "`state` must be the SkipState that `init` gave, got a tuple: pass the state of this transformation.",
  ),
  "skip_steps with the state of another rule": (
    clipjax.skip_steps(MOMENTUM, norm_rule=rules.quantile_tracking(0.5)), lambda s: (TREE, SKIP.init(TREE), TREE),
    ValueError, f"`state.norm_rule` must be as the rule's `init` gave it, array(float()), got StepCount(int()): {ANEW}",
  ),
  "skip_steps with the state of another optimizer": (
    SKIP, lambda s: (TREE, s._replace(inner_state=optax.adam(1.0).init(TREE)), TREE),
    ValueError,
    "`state.inner_state` must be as the `init` of what is wrapped gives it, (TraceState, EmptyState) of 2 arrays, got "
    f"(ScaleByAdamState, EmptyState) of 5 arrays: {ANEW}",
  ),
  "skip_steps with the state of an optimizer that is no chain": (
    SKIP, lambda s: (TREE, s._replace(inner_state=optax.trace(0.5).init(TREE))),
    ValueError,
    "`state.inner_state` must be as the `init` of what is wrapped gives it, (TraceState, EmptyState) of 2 arrays, got "
    f"TraceState of 2 arrays: {ANEW}",
  ),
  "clip_effect with the state of its chain": (
    EFFECT, lambda s: (TREE, s.inner_state, TREE),
    TypeError, "`state` must be the EffectState that `init` gave, got a tuple: pass the state of this transformation.",
  ),
  "clip_effect with the state of another clip": (
    EFFECT, lambda s: (TREE, s._replace(inner_state=(WATCH.init(TREE), s.inner_state[1])), TREE),
    ValueError,
    "`state.inner_state` must be as the `init` of what is wrapped gives it, (ClipState, tuple) of 13 arrays, got "
    f"(WatchState, tuple) of 14 arrays: {ANEW}",
  ),
  "clip_effect with the second state of another optimizer": (
    EFFECT, lambda s: (TREE, s._replace(unclipped_state=optax.adam(1.0).init(TREE)), TREE),
    ValueError,
    "`state.unclipped_state` must be as the `init` of what is wrapped gives it, (TraceState, EmptyState) of 2 arrays, "
    f"got (ScaleByAdamState, EmptyState) of 5 arrays: {ANEW}",
  ),
  "clip_effect of another model": (
    EFFECT, lambda s: (TREE, s._replace(ratios=jnp.zeros(3)), TREE),
    ValueError,
    "`state` must have ratios of shape (2,), as the one that `init` gave, got (3,): it was restored from another model "
    f"or configuration; {TRAIN}",
  ),
  "integers in clip_effect": (
    EFFECT, lambda s: (INT, s, TREE), TypeError, f"`updates` {NO_FLOATING}, got int32[3] at 'layer/b': {MASK}",
  ),
  "the state of another model": (
    LEAF, lambda s: (TREE, s._replace(norms=jnp.zeros(3))),
    ValueError,
    "`state` must have norms of shape (2,), as the one that `init` gave, got (3,): it was restored from another model "
    f"or configuration; {TRAIN}",
  ),
  "a watch of another model": (
    WATCH, lambda s: (TREE, s._replace(norms=jnp.zeros(3))),
    ValueError,
    "`state` must have norms of shape (2,), as the one that `init` gave, got (3,): it was restored from another model "
    f"or configuration; {TRAIN}",
  ),
  "fewer leaves in AGC": (
    AGC, lambda s: (FEWER, s, FEWER),
    ValueError,
    f"`updates` must have as many floating leaves as `init` saw, 2, got 1 (missing: 'layer/b'): {TRAIN}",
  ),
  "fewer leaves in skip_steps": (
    SKIP, lambda s: (FEWER, s, FEWER),
    ValueError,
    f"`updates` must have as many floating leaves as `init` saw, 2, got 1 (missing: 'layer/b'): {TRAIN}",
  ),
  "integers in a rule's clip": (
    AUTO, lambda s: (INT, s), TypeError, f"`updates` {NO_FLOATING}, got int32[3] at 'layer/b': {MASK}",
  ),
  "integers in a watch": (
    WATCH, lambda s: (INT, s), TypeError, f"`updates` {NO_FLOATING}, got int32[3] at 'layer/b': {MASK}",
  ),
  "integers in skip_steps": (
    SKIP, lambda s: (INT, s, TREE), TypeError, f"`updates` {NO_FLOATING}, got int32[3] at 'layer/b': {MASK}",
  ),
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
  "an axis that a leaf has not": (
    clipjax.adaptive_grad_clip(axis=1), lambda s: (TREE, s, TREE),
    ValueError,
    "`axis` must be within the rank of every leaf, got 1 for shape (3,) at 'layer/b': exempt that leaf with "
    "`optax.masked`.",
  ),
  "no value for a loss rule": (
    LOSS, lambda s: (TREE, s, TREE),
    ValueError,
    "`value` must be given where there is a `loss_rule`, got None: call update(grads, state, params, value=loss).",
  ),
  "a rule that returns a number": (
    rule_of(lambda n, s, *, global_norm: 1.0), lambda s: (TREE, s),
    TypeError, "a rule's `update` must return (limit, target, state), got 1.0 (float): return all three.",
  ),
  "a rule that returns a pair": (
    rule_of(lambda n, s, *, global_norm: (1.0, s)), lambda s: (TREE, s),
    TypeError, "a rule's `update` must return (limit, target, state), got a tuple of 2: return all three.",
  ),
  "a limit that is a string": (
    rule_of(lambda n, s, *, global_norm: ("a", 1.0, s)), lambda s: (TREE, s),
    TypeError,
    "a rule's `limit` must be a real number or an array of them, got 'a' (str): compute it from `norms`, with jnp.inf "
    "for no limit.",
  ),
  "a target None": (
    rule_of(lambda n, s, *, global_norm: (1.0, None, s)), lambda s: (TREE, s),
    TypeError,
    "a rule's `target` must be a real number or an array of them, got a NoneType: compute it from `norms`, with "
    "jnp.inf for no limit.",
  ),
  "a complex limit": (
    rule_of(lambda n, s, *, global_norm: (jnp.complex64(1), 1.0, s)), lambda s: (TREE, s),
    TypeError,
    "a rule's `limit` must be a real number or an array of them, got complex64[]: compute it from `norms`, with "
    "jnp.inf for no limit.",
  ),
  "a rule's state of another structure": (
    rule_of(lambda n, s, *, global_norm: (1.0, 1.0, (s, s))), lambda s: (TREE, s),
    ValueError,
    "a rule's `update` must return a state like the one that it was given, array(float()), got tuple(float(), "
    "float()): keep its structure and shapes.",
  ),
  "a rule's state of another shape": (
    rule_of(lambda n, s, *, global_norm: (1.0, 1.0, jnp.zeros(3))), lambda s: (TREE, s),
    ValueError,
    "a rule's `update` must return a state like the one that it was given, array(float()), got array(float(3,)): "
    "keep its structure and shapes.",
  ),
  "a rule's count that becomes a fraction": (
    rule_of(lambda n, s, *, global_norm: (1.0, 1.0, s.astype(jnp.float32)), lambda *_: jnp.zeros((), jnp.int32)),
    lambda s: (TREE, s),
    ValueError,
    "a rule's `update` must return a state like the one that it was given, array(int()), got array(float()): keep its "
    "structure and shapes.",
  ),
  "a schedule of strings": (
    clipjax.clip_by_global_norm(lambda count: "1"), lambda s: (TREE, s),
    TypeError,
    "a schedule must return a real number, got '1' (str): call a rule of clipjax.rules first, as in rules.zscore().",
  ),
}  # fmt: skip


NEVER_RIGHT = ("a rule", "a limit", "a target", "a complex", "a schedule", "an axis")


@pytest.mark.parametrize("case", sorted(UPDATES))
def test_update_that_fails_changes_nothing(case):
  tx, arguments, kind, text = UPDATES[case]
  state = tx.init(TREE)
  given = arguments(state)
  before = jax.tree.map(np.array, (state, given))
  for update in (tx.update, jax.jit(tx.update)):
    with pytest.raises(kind) as error:
      update(*given)
    message = str(error.value).replace("traced ", "")
    assert (type(error.value), message) == (kind, text)
  assert_bits_equal(jax.tree.map(np.array, (state, given)), before)


@pytest.mark.parametrize("case", sorted(case for case in UPDATES if not case.startswith(NEVER_RIGHT)))
def test_the_right_call_still_works_after_the_wrong_one(case):
  tx, arguments, kind, _ = UPDATES[case]
  state = tx.init(TREE)
  want = tx.update(TREE, state, TREE, value=1.0)
  with pytest.raises(kind):
    tx.update(*arguments(state))
  assert_bits_equal(tx.update(TREE, state, TREE, value=1.0), want)


@pytest.mark.parametrize(
  ("value", "kind", "got"),
  [
    ("1", TypeError, "'1' (str)"),
    ({"a": 1.0}, TypeError, "a dict"),
    ([1.0], TypeError, "a list"),
    (1j, TypeError, "1j (complex)"),
    (jnp.ones(2), ValueError, "float32[2]"),
    (np.complex64(1), ValueError, "complex64[]"),
  ],
)
def test_a_loss_that_is_none(value, kind, got):
  state = LOSS.init(TREE)
  with pytest.raises(kind) as error:
    LOSS.update(TREE, state, TREE, value=value)
  assert str(error.value) == f"`value` must be a scalar loss, got {got}: pass its mean over the batch."
  # Without a rule for it, it may be meant for the wrapped transformation, and is none of our business.
  _, new = SKIP.update(TREE, SKIP.init(TREE), TREE, value=value)
  assert (new.loss, new.skipped_steps) == (0, 0)


def test_a_state_restored_as_numpy_or_in_another_width_is_no_other_state():
  for tx in (AUTO, ZCLIP, GROUPS, WATCH, SKIP):
    state = jax.tree.map(lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), tx.init(TREE))
    assert tx.update(TREE, state, TREE)[1].steps == 1


# Axis names ---------------------------------------------------------------------------------------------------------

MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
AROUND = "`axis_name` must name axes of the shard_map, pmap or vmap around"
OUT = "correct the name, or leave `axis_name` out under plain jit."


def first_update(tx):
  return lambda x: jax.tree.leaves(tx.update(x, tx.init(x)))[0].sum()


BY_NAME = {
  "global_norm": lambda name: lambda x: clipjax.global_norm(x, axis_name=name),
  "leaf_norms": lambda name: lambda x: clipjax.leaf_norms(x, axis_name=name),
  "clip_grad_norm": lambda name: lambda x: clipjax.clip_grad_norm(x, 1.0, axis_name=name)[1],
  "clip_grad_per_example": lambda name: lambda x: clipjax.clip_grad_per_example(x[None], 1.0, axis_name=name)[1][0],
  "clip_by_global_norm": lambda name: first_update(clipjax.clip_by_global_norm(1.0, axis_name=name)),
  "clip_by_value": lambda name: first_update(clipjax.clip_by_value(1.0, axis_name=name)),
  "zclip": lambda name: first_update(clipjax.zclip(axis_name=name)),
  "watch": lambda name: first_update(clipjax.watch(axis_name=name)),
  "skip_steps": lambda name: first_update(clipjax.skip_steps(optax.sgd(1.0), axis_name=name)),
}


@pytest.mark.parametrize("function", BY_NAME)
def test_an_axis_that_nothing_around_has(function):
  call = BY_NAME[function]
  for name, check_vma in (("data", True), (("x", "data"), False)):
    with pytest.raises(ValueError, match="axis_name") as error:
      jax.eval_shape(
        jax.shard_map(call(name), mesh=MESH, in_specs=P("x"), out_specs=P(), check_vma=check_vma), jnp.arange(8.0)
      )
    assert str(error.value) == f"{AROUND}, got 'data', and there is only 'x' here: {OUT}"
  for run in (lambda f: f(jnp.arange(8.0)), lambda f: jax.eval_shape(f, jnp.arange(8.0))):
    with pytest.raises(ValueError, match="axis_name") as error:
      run(call("x"))
    assert str(error.value) == f"{AROUND}, got 'x', and there is none here: {OUT}"


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


# Names that clash ---------------------------------------------------------------------------------------------------


def test_a_label_that_is_also_the_name_of_a_leaf_does_not_hide_its_norm():
  params = {"b": jnp.full(4, 1.0), "bias": jnp.full(3, 2.0), "w": jnp.ones(1)}
  for order in (1, -1):
    tx = optax.chain(*[clipjax.watch(), clipjax.clip_by_group_norm(9.0, lambda path, leaf: path[0])][::order])
    _, state = tx.update(params, tx.init(params))
    got = {key: float(value) for key, value in clipjax.metrics(state, per_leaf=True).items()}
    assert (got["grad/norm/b"], got["grad_group/norm/b"]) == (2.0, 4.0)
    assert "grad_group/scale/w" in got and "grad/scale/b" not in got
  # A group that is that leaf alone is no clash, and without a watch there is none.
  for label in (lambda path, leaf: path, lambda path, leaf: path[0]):
    tx = clipjax.clip_by_group_norm(9.0, label)
    tx = optax.chain(clipjax.watch(), tx) if label("bias", None) == "bias" else tx
    assert "grad/scale/b" in clipjax.metrics(tx.update(params, tx.init(params))[1])
