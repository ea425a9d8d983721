"""The situations of Optax's own tests of wrappers and of `optax.tree.map_params`, with this package's transformations.

Each transformation of `PAIRS` has one of Optax beside it that gives the same steps: both go into the same place and
are held to each other. `map_params` has to leave every state as `update` wants it, names of leaves included.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, cases

import clipjax
from clipjax.groups import Labels

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {
  "a": jnp.array([1.0, 2.0]),
  "b": [jnp.array([[3.0], [-1.0]]), jnp.array(4.0)],
  "c": {"d": jnp.array([0.5, 0.25, -2.0]), "e": (jnp.array([5.0]), jnp.array([[6.0, -3.0]]))},
}
MASK = {"a": True, "b": [False, True], "c": {"d": True, "e": (False, True)}}
GROUPS = {"a": "x", "b": ["y", "x"], "c": {"d": "x", "e": ("y", "y")}}


def by_leaf(max_norm):
  """Optax's clip of each leaf by itself."""
  clip = optax.clip_by_global_norm(max_norm)
  each = lambda x: clip.update(x, optax.EmptyState())[0]  # noqa: E731
  return optax.stateless(lambda updates, params: jax.tree.map(each, updates))


def by_layer(max_norm):
  """Optax's clip of each row of a matrix, and of any other leaf by itself."""
  clip = optax.clip_by_global_norm(max_norm)
  each = lambda x: clip.update(x, optax.EmptyState())[0]  # noqa: E731
  rows = lambda x: jax.vmap(each)(x) if x.ndim > 1 else each(x)  # noqa: E731
  return optax.stateless(lambda updates, params: jax.tree.map(rows, updates))


def by_first_letter(path, leaf):
  """The group of a leaf, by the first letter of its name: those of d and e are one."""
  del leaf
  return "x" if path[0] in "ab" else "y"


def by_group(max_norm):
  """Optax's clip of each group: of leaves that stand under "a" or "b" at the top, and of the rest."""

  def update(updates, params):
    del params
    names = jax.tree.map_with_path(lambda path, x: by_first_letter(jax.tree_util.keystr(path, simple=True), x), updates)
    clips = {key: optax.clip_by_global_norm(max_norm) for key in ("x", "y")}
    tx = optax.partition(clips, names)
    return tx.update(updates, tx.init(updates))[0]

  return optax.stateless(update)


# Ours, and what gives the same steps in Optax. In its warm-up `zclip` only measures, `adagc` clips the global norm.
PAIRS = {
  "clip_by_global_norm": (lambda: clipjax.clip_by_global_norm(0.7), lambda: optax.clip_by_global_norm(0.7)),
  "clip_by_leaf_norm": (lambda: clipjax.clip_by_leaf_norm(0.7), lambda: by_leaf(0.7)),
  "clip_by_leaf_norm of layers": (
    lambda: clipjax.clip_by_leaf_norm(0.7, stacked=lambda path, leaf: 0 if leaf.ndim > 1 else None),
    lambda: by_layer(0.7),
  ),
  "clip_by_group_norm": (lambda: clipjax.clip_by_group_norm(0.7, by_first_letter), lambda: by_group(0.7)),
  "adaptive_grad_clip": (lambda: clipjax.adaptive_grad_clip(0.3), lambda: optax.adaptive_grad_clip(0.3)),
  "watch": (lambda: clipjax.watch(history=2), optax.identity),
  "clip_effect": (
    lambda: clipjax.clip_effect(clipjax.clip_by_global_norm(0.7), optax.scale(0.5)),
    lambda: optax.chain(optax.clip_by_global_norm(0.7), optax.scale(0.5)),
  ),
  "zclip": (clipjax.zclip, optax.identity),
  "adagc": (lambda: clipjax.adagc(max_norm=0.7), lambda: optax.clip_by_global_norm(0.7)),
  "skip_steps": (
    lambda: clipjax.skip_steps(clipjax.clip_by_global_norm(0.7)),
    lambda: optax.apply_if_finite(optax.clip_by_global_norm(0.7), 100),
  ),
}
NAMES = sorted(PAIRS)
QUICK = ("clip_by_leaf_norm of layers",)  # One goes everywhere; the others do so among the slow tests.
every = pytest.mark.parametrize("name", cases(NAMES, lambda name: name not in QUICK))


def of(x):
  """As a transformation; `MultiSteps` is none."""
  return x.gradient_transformation() if isinstance(x, optax.MultiSteps) else x


def gradients(count, params=PARAMS, seed=0, bad=None):
  """Gradients of many sizes, the first small; `bad` maps the steps that are not finite to their entries."""
  rng = np.random.default_rng(seed)
  out = []
  for i in range(count):
    scale = 1e-2 if i == 0 else 10.0 ** rng.uniform(-1, 2)
    grads = jax.tree.map(lambda x, s=scale: jnp.asarray(rng.standard_normal(x.shape) * s, x.dtype), params)
    out.append(jax.tree.map(lambda x, i=i: jnp.full_like(x, bad[i]), grads) if i in (bad or {}) else grads)
  return out


def assert_close(ours, theirs, rtol=5e-6):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


def both(pair, wrap, grads, extras=None):
  """Runs a wrapper around both of a pair over the same gradients; asserts equal updates and gives our states."""
  ours, theirs = (optax.with_extra_args_support(of(wrap(make()))) for make in pair)
  mine, yours = jax.jit(ours.init)(PARAMS), jax.jit(theirs.init)(PARAMS)
  step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
  states = [mine]
  for i, grad in enumerate(grads):
    extra = {} if extras is None else extras(i)
    got, mine = step(grad, mine, PARAMS, **extra)
    want, yours = their_step(grad, yours, PARAMS, **extra)
    assert_close(got, want)
    states.append(mine)
  assert step._cache_size() == their_step._cache_size()
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[-1])
  return states


def labels_of(state):
  """The names of leaves that travel in a state."""
  is_labels = lambda x: isinstance(x, Labels)  # noqa: E731
  return [x.leaves for x in jax.tree.leaves(state, is_leaf=is_labels) if is_labels(x)]


def steps_of(state):
  return next(int(value) for key, value in clipjax.metrics(state).items() if key.endswith("/steps"))


# Wrappers ------------------------------------------------------------------------------------------------------------


def multi_steps(every, **options):
  return lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), every, **options)


def partitioned(labels):
  return lambda tx: optax.partition({"x": optax.chain(tx, by_loss()), "y": optax.ema(0.5)}, labels)


def by_loss():
  """A transformation that needs an argument of its own."""

  def update(updates, state, params=None, *, loss, **extra):
    del params, extra
    return jax.tree.map(lambda x: x / loss, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def by_rank(params):
  return jax.tree.map(lambda x: x.ndim > 0, params)


LEAVES = ("a", "b/0", "b/1", "c/d", "c/e/0", "c/e/1")
CHOSEN = ("a", "b/1", "c/d", "c/e/1")
FIVE = gradients(5)
COUNTED = [0, 1, 2, 3, 4, 5]
NOT_FINITE = {2: jnp.inf, 3: jnp.nan}
THREE_IN_A_ROW = dict.fromkeys((1, 2, 4, 5, 6), jnp.nan)
LOSSES = lambda i: {"loss": jnp.float32(0.2 if i < 3 else 0.01), "unknown": jnp.float32(0.0)}  # noqa: E731
# (wrapper, gradients, the steps that are counted before the first and after each, the leaves that are seen, extras)
WRAPPERS = {
  "masked": (lambda tx: optax.masked(tx, MASK), FIVE, COUNTED, CHOSEN, None),
  "masked by a function": (lambda tx: optax.masked(tx, by_rank), FIVE, COUNTED, ("a", "b/0", *LEAVES[3:]), None),
  "masked by a prefix": (
    lambda tx: optax.masked(tx, {"a": True, "b": False, "c": {"d": False, "e": True}}),
    FIVE, COUNTED, ("a", *LEAVES[4:]), None,
  ),
  "masked within a mask": (
    lambda tx: optax.masked(optax.masked(tx, {"a": True, "b": [True, True], "c": False}), by_rank),
    FIVE, COUNTED, ("a", "b/0"), None,
  ),
  "all masked": (lambda tx: optax.masked(tx, jax.tree.map(lambda _: False, PARAMS)), FIVE, COUNTED, (), None),
  "partition": (partitioned(GROUPS), FIVE, COUNTED, CHOSEN[:3], LOSSES),
  "partition by a function": (partitioned(lambda _: GROUPS), FIVE, COUNTED, CHOSEN[:3], LOSSES),
  "MultiSteps": (multi_steps(4), gradients(12), [0] * 4 + [1] * 4 + [2] * 4 + [3], LEAVES, None),
  "MultiSteps by a schedule": (
    multi_steps(lambda step: jnp.where(step < 2, 1, 3)), gradients(8), [0, 1, 2, 2, 2, 3, 3, 3, 4], LEAVES, None,
  ),
  "MultiSteps that skips": (
    multi_steps(2, should_skip_update_fn=optax.skip_not_finite),
    gradients(6, bad=NOT_FINITE), [0, 0, 1, 1, 1, 1, 2], LEAVES, None,
  ),
  # The third bad one in a row is let through.
  "apply_if_finite": (
    lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(1.0)), 2),
    gradients(7, bad=THREE_IN_A_ROW), [0, 1, 1, 1, 2, 2, 2, 3], LEAVES, None,
  ),
  "conditionally_transform": (
    lambda tx: optax.transforms.conditionally_transform(tx, lambda step: step < 3),
    FIVE, [0, 1, 2, 3, 3, 3], LEAVES, None,
  ),
  "conditionally_mask by an extra argument": (
    lambda tx: optax.transforms.conditionally_mask(tx, lambda step, loss, **extra: loss > 0.1, forward_extra_args=True),
    FIVE, [0, 1, 2, 3, 3, 3], LEAVES, LOSSES,
  ),
  "chain with an extra argument": (lambda tx: optax.chain(tx, by_loss()), FIVE, COUNTED, LEAVES, LOSSES),
  "named_chain with an extra argument": (
    lambda tx: optax.named_chain(("clip", tx), ("by_loss", by_loss())), FIVE, COUNTED, LEAVES, LOSSES,
  ),
  "flatten": (lambda tx: optax.flatten(optax.chain(tx, optax.sgd(0.1))), FIVE, COUNTED, (".",), None),
}  # fmt: skip
GLOBAL = lambda: optax.clip_by_global_norm(0.7)  # noqa: E731
ONE_GROUP = (lambda: clipjax.clip_by_group_norm(0.7, lambda path, leaf: "all"), GLOBAL)
# Flattened, all leaves are one.
FLAT = {name: (PAIRS[name][0], GLOBAL) for name in NAMES if "leaf" in name} | {"clip_by_group_norm": ONE_GROUP}


@every
@pytest.mark.parametrize(
  "wrapper", cases(WRAPPERS, slow=["masked by a prefix", "masked within a mask", "MultiSteps by a schedule"])
)
def test_in_a_wrapper_of_optax(name, wrapper):
  wrap, grads, counted, leaves, extras = WRAPPERS[wrapper]
  states = both(FLAT.get(name, PAIRS[name]) if wrapper == "flatten" else PAIRS[name], wrap, grads, extras)
  assert [steps_of(state) for state in states] == counted
  assert labels_of(states[-1])[0] == leaves
  assert clipjax.metrics(states[-1]).get("grad/nonfinite_steps", 0) == (
    wrapper == "apply_if_finite" and name != "skip_steps"
  )


@every
@pytest.mark.parametrize("container", [list, tuple, dict])
def test_nothing_to_mask_or_to_part(name, container):
  make, nothing = PAIRS[name][0], container()
  for tx in (optax.masked(make(), nothing), optax.partition({0: make()}, lambda _: 0)):
    assert tx.update(nothing, tx.init(nothing), nothing)[0] == nothing


@every
def test_multi_steps_keeps_its_dtypes_in_a_scan(name):
  params = {"a": jnp.ones(2, jnp.bfloat16)}
  tx = of(optax.MultiSteps(optax.chain(PAIRS[name][0](), optax.sgd(1e-4)), 2, accumulator_dtype=jnp.float32))
  grads = {"a": jnp.ones((4, 2), jnp.bfloat16)}
  step = lambda state, grad: tx.update(grad, state, params)[::-1]  # noqa: E731
  state, updates = jax.lax.scan(step, tx.init(params), grads)
  assert state.acc_grads["a"].dtype == jnp.float32 and updates["a"].dtype == jnp.bfloat16
  assert steps_of(state) == 2


# inject_hyperparams -------------------------------------------------------------------------------------------------

INJECTED = {
  "clip_by_global_norm": (clipjax.clip_by_global_norm, optax.clip_by_global_norm),
  "clip_by_leaf_norm": (clipjax.clip_by_leaf_norm, by_leaf),
  "clip_by_group_norm": (
    lambda max_norm: clipjax.clip_by_group_norm(max_norm, by_first_letter), by_group,
  ),
}  # fmt: skip


@pytest.mark.parametrize("overridden", [False, True])
@pytest.mark.parametrize("name", INJECTED)
def test_a_hyperparameter_on_a_schedule_and_overridden(name, overridden):
  schedule = optax.piecewise_constant_schedule(3.0, {1: 5, 4: 0.1})
  start = 0.1 if overridden else schedule
  ours, theirs = (optax.inject_hyperparams(factory)(max_norm=start) for factory in INJECTED[name])
  mine, yours = jax.jit(ours.init)(PARAMS), jax.jit(theirs.init)(PARAMS)
  mine = optax.tree.map_params(ours, lambda x: x, mine)  # A change that is none.
  step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
  for i, grad in enumerate(gradients(6)):
    for state in (mine, yours) if overridden else ():
      state.hyperparams["max_norm"] = jnp.float32(i)
    got, mine = step(grad, mine, PARAMS)
    want, yours = their_step(grad, yours, PARAMS)
    assert_close(got, want)
    np.testing.assert_allclose(mine.inner_state.max_norm, i if overridden else schedule(i), rtol=1e-6)
  assert labels_of(mine)[0] == LEAVES
  assert clipjax.metrics(mine)["grad/steps"] == 6


@pytest.mark.parametrize("hyperparam", ["bfloat16", "float32"])
@pytest.mark.parametrize("grad", ["bfloat16", "float32"])
def test_the_dtype_of_a_hyperparameter(hyperparam, grad):
  tx = optax.inject_hyperparams(clipjax.clip_by_global_norm, hyperparam_dtype=jnp.dtype(hyperparam))(max_norm=0.5)
  params = jax.tree.map(lambda x: x.astype(grad), PARAMS)
  state = jax.jit(tx.init)(params)
  updates, state = jax.jit(tx.update)(params, state, params)
  assert state.hyperparams["max_norm"].dtype == hyperparam
  assert all(x.dtype == grad for x in jax.tree.leaves(updates))
  np.testing.assert_allclose(clipjax.global_norm(updates), 0.5, rtol=1e-2 if grad == "bfloat16" else 1e-6)


# contrib ------------------------------------------------------------------------------------------------------------

CONTRIB = {
  "mechanize": lambda tx: optax.contrib.mechanize(optax.chain(tx, optax.sgd(1e-3)), weight_decay=0.0),
  "schedule_free": lambda tx: optax.contrib.schedule_free(optax.chain(tx, optax.sgd(1e-3)), learning_rate=1e-3),
  "reduce_on_plateau": lambda tx: optax.chain(tx, optax.sgd(1e-3), optax.contrib.reduce_on_plateau(patience=1)),
  "after muon": lambda tx: optax.chain(optax.contrib.muon(0.01), tx),
  "before muon": lambda tx: optax.chain(tx, optax.contrib.muon(0.01)),
  "before prodigy": lambda tx: optax.chain(tx, optax.contrib.prodigy(0.1)),
  "split_real_and_imaginary": lambda tx: optax.contrib.split_real_and_imaginary(optax.chain(tx, optax.sgd(1e-3))),
  "both sides of sam": lambda tx: optax.contrib.sam(
    optax.chain(tx, optax.sgd(0.01)), optax.chain(optax.contrib.normalize(), tx, optax.sgd(0.05)), sync_period=2
  ),
}


def rosenbrock(params):
  x, y = params
  return (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2


@every
@pytest.mark.parametrize("wrapper", CONTRIB)
def test_training_within_a_wrapper_of_contrib(name, wrapper):
  ends, programs = [], []
  for make in ONE_GROUP if name == "clip_by_group_norm" else PAIRS[name]:
    tx = optax.with_extra_args_support(CONTRIB[wrapper](make()))

    @jax.jit
    def step(params, state, tx=tx):
      value, grads = jax.value_and_grad(rosenbrock)(params)
      extra = {} if wrapper == "both sides of sam" else {"value": value, "an_argument_that_nothing_expects": 1}
      updates, state = tx.update(grads, state, params, **extra)
      return optax.apply_updates(params, updates), state, updates

    params = [jnp.float32(-0.5), jnp.float32(0.75)]
    state = tx.init(params)
    ends.append([])
    for _ in range(6):
      params, state, updates = step(params, state)
      ends[-1].append(updates)
    programs.append(step._cache_size())
  assert programs[0] == programs[1] or wrapper == "both sides of sam"  # Which makes an int32 of a bool.
  assert_close(*ends, rtol=1e-4)


# tree.map_params ----------------------------------------------------------------------------------------------------

PLACES = {
  "alone": lambda tx: tx,
  "before adam": lambda tx: optax.chain(tx, optax.adam(0.1)),
  "after adam": lambda tx: optax.chain(optax.adam(0.1), tx),
  "named": lambda tx: optax.named_chain(("clip", tx), ("adam", optax.adam(0.1))),
  "skip_steps": lambda tx: clipjax.skip_steps(optax.chain(tx, optax.adam(0.1))),
  "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.adam(0.1)), 3),
  "conditionally_transform": lambda tx: optax.transforms.conditionally_transform(tx, lambda step: step < 9),
  "MultiSteps": lambda tx: of(optax.MultiSteps(optax.chain(tx, optax.adam(0.1)), 2)),
  "masked": lambda tx: optax.masked(optax.chain(tx, optax.adam(0.1)), MASK),
  "partition": lambda tx: optax.partition({"x": optax.chain(tx, optax.adam(0.1)), "y": optax.adam(0.1)}, GROUPS),
  "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda lr: optax.chain(tx, optax.adam(lr)))(lr=0.1),
}
# Every state is mapped at one place; what else is asked, of two kinds.
KINDS = ("clip_by_group_norm", "watch")
MAPPED = (*QUICK, *KINDS, "clip_effect", "skip_steps", "adaptive_grad_clip")
each_kind = pytest.mark.parametrize("name", cases(NAMES, lambda name: name not in KINDS))


@functools.cache
def after_two_steps(name, place):
  tx = optax.with_extra_args_support(PLACES[place](PAIRS[name][0]()))
  state, step = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
  for grad in gradients(2):
    _, state = step(grad, state, PARAMS)
  return tx._replace(update=step), state


@pytest.mark.parametrize("options", [{}, {"transform_non_params": lambda x: x}], ids=["params", "all"])
@pytest.mark.parametrize(
  ("name", "place"),
  cases(itertools.product(NAMES, PLACES), lambda case: case[0] not in (QUICK if case[1] != "before adam" else MAPPED)),
)
def test_map_params_with_the_identity_changes_nothing(name, place, options):
  tx, state = after_two_steps(name, place)
  mapped = optax.tree.map_params(tx, lambda x: x, state, **options)
  assert labels_of(mapped) == labels_of(state) and all(labels_of(state))
  assert_bits_equal(mapped, state)
  grad = gradients(3)[-1]
  want, programs = tx.update(grad, state, PARAMS), tx.update._cache_size()
  assert_bits_equal(tx.update(grad, mapped, PARAMS), want)
  assert tx.update._cache_size() == programs


def doubled(x):
  return x * 2 if jnp.issubdtype(x.dtype, jnp.floating) else x


# What becomes of the moments, and of the rest.
CHANGES = {
  "the moments": (lambda x: x + 1, lambda x: x),
  "the rest": (lambda x: x, doubled),
  "the dtype of the moments": (lambda x: x.astype(jnp.bfloat16), lambda x: x),
  "the moments to None": (lambda _: None, lambda x: x),
  "the rest to None": (lambda _: 1, lambda _: None),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_map_params_changes_moments_and_the_rest_by_themselves(name, change):
  of_moments, of_rest = CHANGES[change]
  tx, state = after_two_steps(name, "before adam")
  mapped = optax.tree.map_params(tx, of_moments, state, transform_non_params=of_rest)
  assert labels_of(mapped) == labels_of(state)
  assert_bits_equal(jax.tree.leaves(mapped[0]), jax.tree.leaves([of_rest(x) for x in jax.tree.leaves(state[0])]))
  for moment in ("mu", "nu"):
    assert_bits_equal(getattr(mapped[1][0], moment), jax.tree.map(of_moments, getattr(state[1][0], moment)))
  if "None" not in change:
    updates, after = tx.update(gradients(3)[-1], mapped, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(mapped) == jax.tree.structure(state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
