"""Bad input: the whole text of every check, once; `test_bad_calls.py` shows that each argument reaches its check."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import rules

TREE = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
BY_PATH = lambda path, leaf: path.split("/")[-1]  # noqa: E731
ADAM = optax.adam(1e-3)
STATIC = "under `optax.inject_hyperparams`, name it in `static_args`"
THRESHOLD = "`max_norm` must be a number >= 0 or a scalar array"
DOOR = "must be a number, a scalar array, a schedule or a clipjax.rules.Rule"
DICT = "pass a float such as 1.0; a dict by label is for clip_by_group_norm."
ZERO = "pass 0 to zero the gradient or `float('inf')` for no limit."
RANGE = "choose one in that range."
ORD = "`ord` must be a Python number"
LABELS = "`groups` must be a function (path, leaf) -> label or a tree of labels"
POLICY = '`on_nonfinite` must be one of "propagate", "zero", "error"'
DROP = 'pass "zero" to drop such steps or "propagate" to make them visible.'
LEAVES = "must have floating or complex leaves"
MASK = "leave it out of the tree, or mask it with `optax.masked`."
AXES = "`axis_name` must be a name, a tuple of names or a prefix tree of them"
STATE = "`opt_state` must be the state of an optimizer"
JAX = "JAX says: ..."
NONFINITE = 'lower the learning rate, or pass on_nonfinite="zero" to drop such steps.'


def update(tx, grads):
  return tx.update(grads, tx.init(TREE))


def by_norm(max_norm=1.0, *args, **options):
  return clipjax.clip_by_global_norm(max_norm, *args, **options)


def by_group(max_norm=1.0, groups=BY_PATH):
  return clipjax.clip_by_group_norm(max_norm, groups).init(TREE)


def now(grads=TREE, max_norm=1.0, *args, **options):
  return clipjax.clip_grad_norm(grads, max_norm, *args, **options)


def broken(count):
  return now([jnp.full(2, jnp.nan)] * count + [jnp.ones(2)], on_nonfinite="error")


VALUES = [
  (lambda: by_norm(-1.0), f"`max_norm` must be >= 0, got -1.0: {ZERO}"),
  (lambda: now(TREE, -2), f"`max_norm` must be >= 0, got -2.0: {ZERO}"),
  (lambda: clipjax.clip_by_leaf_norm(np.float32(-1.0)), f"`max_norm` must be >= 0, got -1.0: {ZERO}"),
  (lambda: by_norm(math.nan), f"`max_norm` must be >= 0, got nan: {ZERO}"),
  (lambda: by_group({"w": 1.0, "b": math.nan}), f"`max_norm['b']` must be >= 0, got nan: {ZERO}"),
  (lambda: by_norm(eps=-1e-6), "`eps` must be >= 0, got -1e-06: pass 0.0, or 1e-6 for the factor of torch."),
  (lambda: by_norm(eps=math.inf), "`eps` must be finite, got inf: pass 0.0, or 1e-6 for the factor of torch."),
  (lambda: now(norm=-3.0), "`norm` must be >= 0, got -3.0: pass the norm of `grads`, or None to compute it."),
  (
    lambda: clipjax.adaptive_grad_clip(-0.5),
    "`clipping` must be >= 0, got -0.5: pass a ratio such as 0.01.",
  ),
  (
    lambda: clipjax.adaptive_grad_clip(0.01, eps=-1.0),
    "`eps` must be >= 0, got -1.0: pass a norm of parameters such as 1e-3.",
  ),
  (
    lambda: clipjax.skip_steps(ADAM, norm_rule=-1.0),
    "`norm_rule` must be >= 0, got -1.0: pass a limit above the usual numbers, or None for none.",
  ),
  (
    lambda: clipjax.clip_grad_value(TREE, jnp.ones(2)),
    "`max_value` must be a number >= 0 or a scalar array, got float32[2]: pass one number.",
  ),
  (lambda: by_norm(jnp.ones(2)), f"{THRESHOLD}, got float32[2]: pass one number, or use clip_by_group_norm."),
  (lambda: by_norm(np.ones(2)), f"{THRESHOLD}, got float64[2]: pass one number, or use clip_by_group_norm."),
  (lambda: by_group(jnp.ones(2)), f"{THRESHOLD}, got float32[2]: pass one number, or a dict by label."),
  (lambda: clipjax.zclip(max_norm=jnp.ones(2)), f"{THRESHOLD}, got float32[2]: pass one number."),
  (lambda: by_norm(1.0, 0), "`ord` must be > 0, got 0: pass 2 for the Euclidean norm."),
  (lambda: now(TREE, 1.0, -math.inf), "`ord` must be > 0, got -inf: pass 2 for the Euclidean norm."),
  (
    lambda: clipjax.global_norm(TREE, -1),
    "`ord` must be > 0, 0 or -inf, got -1: pass 2 for the Euclidean norm.",
  ),
  (
    lambda: clipjax.leaf_norms(TREE, math.nan),
    "`ord` must be > 0, 0 or -inf, got nan: pass 2 for the Euclidean norm.",
  ),
  (lambda: by_norm(on_nonfinite="skip"), f"{POLICY}, got 'skip': {DROP}"),
  (lambda: by_norm(on_nonfinite=["zero"]), f"{POLICY}, got ['zero']: {DROP}"),
  (lambda: by_norm(on_nonfinite=np.array(["zero", "x"])), f"{POLICY}, got <U4[2]: {DROP}"),
  (
    lambda: by_norm(lambda count: 1.0, track=False),
    "`max_norm` must be a number or an array with `track=False`, got a schedule or a rule: leave `track` at True.",
  ),
  (
    lambda: clipjax.clip_by_group_norm({"w": 1.0, "b": rules.minimum(1.0, 2.0)}, BY_PATH, track=False),
    "`max_norm` must be a number or an array with `track=False`, got a schedule or a rule: leave `track` at True.",
  ),
  (
    lambda: by_norm(axis_name=("x", "x")),
    "`axis_name` must name each axis once, got ('x', 'x'): remove the repeated name.",
  ),
  (
    lambda: clipjax.global_norm(TREE, axis_name={"layers": "x"}),
    f"{AXES}, got {{'layers': 'x'}}, which does not match the leaves: pass one entry for each leaf or branch. {JAX}",
  ),
  (lambda: rules.rolling_sigma(window=1), f"`window` must be an integer >= 2, got 1: {RANGE}"),
  (lambda: rules.rolling_sigma(ddof=2), f"`ddof` must be an integer >= 0 and <= 1, got 2: {RANGE}"),
  (lambda: rules.delayed(2**31, 1.0), f"`n` must be an integer >= 0 and <= 2147483647, got 2147483648: {RANGE}"),
  (lambda: rules.percentile(math.nan), f"`percentile` must be a number >= 0 and <= 100, got nan: {RANGE}"),
  (lambda: clipjax.adagc(0), f"`ratio` must be a number > 0, got 0: {RANGE}"),
  (lambda: rules.rolling_sigma(math.inf), f"`sigma` must be a finite number >= 0, got inf: {RANGE}"),
  (
    lambda: rules.zscore(mode=np.array(["mean", "max"])),
    '`mode` must be one of "reciprocal", "mean", "max", got <U4[2]: choose one of them.',
  ),
  (
    lambda: clipjax.zclip(record=None),
    '`record` must be one of "clipped", "raw", "none", got None: choose one of them.',
  ),
  (
    lambda: update(by_norm(lambda count: jnp.ones(2)), TREE),
    "a schedule must return a scalar, got float32[2]: for thresholds by group pass a dict to clip_by_group_norm.",
  ),
  (
    lambda: clipjax.clip_by_group_norm({1: 1.0, "1": 2.0}, BY_PATH),
    "labels of groups must differ as strings, got [1, '1'] in `max_norm`: rename one.",
  ),
  (
    lambda: by_group({"w": 1.0}),
    "`max_norm` must have a threshold for every label, got none for 'b' of leaf 'layer/b' (it has 'w'): add it, with "
    "None to exempt the group.",
  ),
  (
    lambda: by_group({}),
    "`max_norm` must have a threshold for every label, got none for 'b' of leaf 'layer/b' (it has none): add it, with "
    "None to exempt the group.",
  ),
  (
    lambda: by_group({"w": 1.0, "b": 1.0, "head": None}),
    "`max_norm` must have thresholds for labels in use, got one for 'head', which no leaf has (the leaves have 'b', "
    "'w'): remove it, or fix `groups`.",
  ),
  (
    lambda: by_group(groups={"layer": {"w": "x"}}),
    f"{LABELS} like the parameters, got one of another structure: pass a label for each leaf or branch. {JAX}",
  ),
  (
    lambda: update(by_norm(), {"layer": {"w": jnp.ones(2)}}),
    "`updates` must have as many floating leaves as `init` saw, 2, got 1 (missing: 'layer/b'): call `init` with the "
    "parameters that you train.",
  ),
  (
    lambda: update(by_norm(), {**TREE, "head": jnp.ones(2)}),
    "`updates` must have as many floating leaves as `init` saw, 2, got 3 (new: 'head'): call `init` with the "
    "parameters that you train.",
  ),
  (
    lambda: update(
      clipjax.clip_by_leaf_norm(rules.Rule(lambda s, d: (), lambda n, s, *, global_norm: (jnp.ones(3), 1.0, s))), TREE
    ),
    "a rule's `limit` must have shape () or the shape of the norms, (2,), got (3,): compute it from `norms` element by "
    "element.",
  ),
  (
    lambda: clipjax.clip_grad_per_example(1.0, 1.0),
    "`grads` must have a leading batch axis in every leaf, got 1.0 (float) at '.': compute them with "
    "jax.vmap(jax.grad(loss), (None, 0)).",
  ),
]
TYPES = [
  (lambda: by_norm("1.0"), f"{THRESHOLD}, got '1.0' (str): pass a float such as 1.0."),
  (lambda: by_norm(True), f"{THRESHOLD}, got True (bool): pass a float such as 1.0."),
  (lambda: by_norm(np.bool_(True)), f"{THRESHOLD}, got bool[]: pass a float such as 1.0."),
  (lambda: by_norm(np.complex64(1)), f"{THRESHOLD}, got complex64[]: pass a real number such as 1.0."),
  (lambda: now(1.0, TREE), f"{THRESHOLD}, got a dict: pass a float such as 1.0."),
  (lambda: now(TREE, lambda count: 1.0), f"{THRESHOLD}, got a function: pass a float such as 1.0."),
  (lambda: by_norm(None), f"`max_norm` {DOOR}, got a NoneType: {DICT}"),
  (lambda: by_norm({"w": 1.0}), f"`max_norm` {DOOR}, got a dict: {DICT}"),
  (
    lambda: by_norm(rules.Rule(1, print)),
    "`max_norm` must be a Rule of two functions, got 1 (int) as its `init`: see clipjax.rules.Rule.",
  ),
  (
    lambda: clipjax.skip_steps(ADAM, norm_rule=rules.Rule(print, None)),
    "`norm_rule` must be a Rule of two functions, got a NoneType as its `update`: see clipjax.rules.Rule.",
  ),
  (
    lambda: by_norm(lambda: 1.0),
    "the schedule `max_norm` must take (count), got a function of (): write `lambda count: 0.1 * count`.",
  ),
  (
    lambda: by_norm(rules.Rule(lambda shape: (), lambda norms, state, *, global_norm: (1.0, 1.0, state))),
    "the `init` of `max_norm` must take (shape, dtype), got a function of (shape): write `lambda shape, dtype: "
    "jnp.zeros(shape, dtype)`.",
  ),
  (
    lambda: by_norm(rules.Rule(lambda shape, dtype: (), lambda norms, state: (1.0, 1.0, state))),
    "the `update` of `max_norm` must take (norms, state, *, global_norm), got a function of (norms, state): define it "
    "as `def update(norms, state, *, global_norm)`.",
  ),
  (
    lambda: by_group(groups=lambda path: path),
    "`groups` must take (path, leaf), got a function of (path): write `lambda path, leaf: path.split('/')[0]`.",
  ),
  (
    lambda: update(by_norm(rules.zscore), TREE),
    "a schedule must return a real number, got a Rule: call a rule of clipjax.rules first, as in rules.zscore().",
  ),
  (lambda: clipjax.global_norm(TREE, "fro"), f"{ORD}, got 'fro' (str): pass 2, 1 or `float('inf')`."),
  (lambda: clipjax.global_norm(TREE, True), f"{ORD}, got True (bool): pass 2, 1 or `float('inf')`."),
  (lambda: by_norm(1.0, jnp.array(2.0)), f"{ORD}, got float32[]: pass 2, 1 or `float('inf')`; {STATIC}."),
  (
    lambda: jax.jit(lambda p: clipjax.global_norm(TREE, p))(2.0),
    f"{ORD}, got traced float32[]: pass 2, 1 or `float('inf')`; {STATIC}.",
  ),
  (lambda: by_norm(track=0), "`track` must be True or False, got 0 (int): pass one of them."),
  (lambda: by_norm(track=np.True_), "`track` must be True or False, got bool[]: pass one of them."),
  (lambda: by_norm(name=""), "`name` must be a nonempty string, got '' (str): pass a word such as \"grad\"."),
  (lambda: by_norm(name=3), '`name` must be a nonempty string, got 3 (int): pass a word such as "grad".'),
  (lambda: by_norm(axis_name={"w": 1}), f"{AXES}, got 1 (int): pass the names as strings."),
  (lambda: clipjax.zclip(None), "`z_thresh` must be a number > 0, got a NoneType: pass a float."),
  (lambda: rules.zscore(np.ones(2)), "`z_thresh` must be a number > 0, got float64[2]: pass a float."),
  (lambda: rules.zscore(True), "`z_thresh` must be a number > 0, got True (bool): pass a float."),
  (
    lambda: rules.percentile(10, window=10.0),
    "`window` must be an integer >= 1, got 10.0 (float): pass a Python integer.",
  ),
  (lambda: rules.delayed(True, 1.0), "`n` must be an integer >= 0, got True (bool): pass a Python integer."),
  (
    lambda: rules.delayed(jnp.array(3), 1.0),
    f"`n` must be an integer >= 0, got int32[]: pass a Python integer; {STATIC}.",
  ),
  (
    lambda: clipjax.adaptive_grad_clip(axis="0"),
    "`axis` must be an integer or a tuple of them, got '0' (str): pass integers.",
  ),
  (
    lambda: clipjax.skip_steps(optax.sgd),
    "`inner` must be an Optax transformation, got a function: pass one such as optax.adam(1e-3).",
  ),
  (
    lambda: clipjax.clip_effect(1.0, ADAM),
    "`clip` must be an Optax transformation, got 1.0 (float): pass one such as clipjax.clip_by_global_norm(1.0).",
  ),
  (lambda: by_group(groups=1.0), f"{LABELS}, got 1.0 (float): pass it as the second argument; {STATIC}."),
  (lambda: by_group(groups=jnp.ones(2)), f"{LABELS}, got float32[2]: pass it as the second argument; {STATIC}."),
  (lambda: by_group(groups=None), f"{LABELS}, got a NoneType: pass it as the second argument; {STATIC}."),
  (lambda: by_group({None: 1.0}), "`max_norm` must have labels that are not None, got None as a key: pass a string."),
  (
    lambda: by_group(groups=lambda path, leaf: None),
    "`groups` must give labels that are hashable and not None, got a NoneType for leaf 'layer/b': pass a string.",
  ),
  (
    lambda: by_group(groups=lambda path, leaf: [path]),
    "`groups` must give labels that are hashable and not None, got a list for leaf 'layer/b': pass a string.",
  ),
  (lambda: now({"a": jnp.ones(2), "n": [jnp.ones(2, jnp.int32)]}), f"`grads` {LEAVES}, got int32[2] at 'n/0': {MASK}"),
  (
    lambda: update(by_norm(), {"layer": {"w": jnp.ones(2), "b": jnp.array([True])}}),
    f"`updates` {LEAVES}, got bool[1] at 'layer/b': {MASK}",
  ),
  (lambda: clipjax.global_norm([1.0, 2]), f"`tree` {LEAVES}, got 2 (int) at '1': {MASK}"),
  (lambda: clipjax.leaf_norms({"f": print}), f"`tree` {LEAVES}, got a builtin_function_or_method at 'f': {MASK}"),
  (lambda: now([np.array([None])]), f"`grads` {LEAVES}, got object[1] at '0': {MASK}"),
  (lambda: now(jnp.ones(2, jnp.float8_e8m0fnu)), f"`grads` {LEAVES}, got float8_e8m0fnu[2] at '.': {MASK}"),
  (lambda: now(jnp.ones(2, jnp.float4_e2m1fn)), f"`grads` {LEAVES}, got float4_e2m1fn[2] at '.': {MASK}"),
  (lambda: now(jax.random.key(0)), f"`grads` {LEAVES}, got key<fry>[] at '.': {MASK}"),
  (
    lambda: clipjax.clip_by_value(1.0).update([1.0, 1j], clipjax.clip_by_value(1.0).init([1.0, 1.0])),
    "`updates` must have real leaves to clip by value, got 1j (complex) at '1': clip complex leaves by norm.",
  ),
  (
    lambda: clipjax.clip_grad_value([jnp.ones(1), jnp.ones(1, jnp.complex64)], 1.0),
    "`grads` must have real leaves to clip by value, got complex64[1] at '1': clip complex leaves by norm.",
  ),
  (
    lambda: clipjax.metrics(by_norm()),
    f"{STATE}, got a GradientTransformationExtraArgs: pass what `init` or `update` returned.",
  ),
  (
    lambda: clipjax.metrics((optax.EmptyState(), optax.GradientTransformation(print, print))),
    f"{STATE}, got a GradientTransformation: pass what `init` or `update` returned.",
  ),
  (lambda: clipjax.raise_if_nonfinite(0.5), f"{STATE}, got 0.5 (float): pass what `init` or `update` returned."),
  (
    lambda: jax.jit(clipjax.raise_if_nonfinite)(by_norm().init(TREE)),
    "`opt_state` must hold concrete arrays, got traced ones: call `raise_if_nonfinite` outside jit, with what the "
    "jitted step returns.",
  ),
]
RAISED = [
  (
    lambda: now({"a": jnp.array([jnp.nan]), "b": jnp.ones(2)}, on_nonfinite="error"),
    f"the gradient is not finite (norm nan) in 'a': {NONFINITE}",
  ),
  (
    lambda: broken(10),
    f"the gradient is not finite (norm nan) in '0', '1', '2', '3', '4', '5', '6', '7', '8', '9': {NONFINITE}",
  ),
  (
    lambda: broken(11),
    f"the gradient is not finite (norm nan) in '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', ...: {NONFINITE}",
  ),
  (
    lambda: now(jnp.ones(2), norm=jnp.inf, on_nonfinite="error"),
    f"the gradient is not finite (norm inf): {NONFINITE}",
  ),
  (
    lambda: now(jnp.array([3.0, 4.0]), jnp.float32(jnp.nan), on_nonfinite="error"),
    "a limit is NaN, of a gradient with the norm 5.0: check the schedule, rule or parameters that give it.",
  ),
]
KINDS = {ValueError: VALUES, TypeError: TYPES, FloatingPointError: RAISED}
CASES = [(kind, *row) for kind, rows in KINDS.items() for row in rows]


@pytest.mark.parametrize(("kind", "call", "text"), CASES)
def test_whole_message(kind, call, text):
  with pytest.raises(kind) as error:
    call()
  message = str(error.value)
  assert type(error.value) is kind
  if text.endswith("..."):  # What follows is the text of JAX on where the trees differ.
    assert message.startswith(text[:-3]) and len(message) > len(text)
  else:
    assert message == text


def test_no_message_shows_contents_of_an_array():
  with pytest.raises(TypeError) as error:
    now({"n": jnp.array([123456])})
  assert "123456" not in str(error.value)
