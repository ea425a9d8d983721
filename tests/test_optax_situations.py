"""The situations of Optax's own tests of wrappers and of `optax.tree.map_params`, with this package's transformations.

Each transformation of `PAIRS` has one of Optax beside it that gives the same steps: both go into the same place and
are held to each other. `map_params` has to leave every state as `update` wants it, names of leaves included.
"""

import dataclasses
import functools

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
QUICK = ("clip_by_leaf_norm",)  # One goes everywhere; the others do so among the slow tests.
slow = pytest.mark.slow
every = pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else slow) for x in NAMES])


def of(x):
  """As a transformation; `MultiSteps` is none."""
  return x.gradient_transformation() if isinstance(x, optax.MultiSteps) else x


def gradients(count, params=PARAMS, seed=0):
  """Gradients of many sizes; the first is small."""
  rng = np.random.default_rng(seed)
  out = []
  for i in range(count):
    scale = 1e-2 if i == 0 else 10.0 ** rng.uniform(-1, 2)
    out.append(jax.tree.map(lambda x, s=scale: jnp.asarray(rng.standard_normal(x.shape) * s, x.dtype), params))
  return out


def assert_close(ours, theirs, rtol=5e-6):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


def both(name, wrap, grads=None, params=PARAMS, extras=None):
  """Runs a wrapper around both of a pair over the same gradients; asserts equal updates and gives our states."""
  ours, theirs = (optax.with_extra_args_support(of(wrap(make()))) for make in PAIRS[name])
  mine, yours = jax.jit(ours.init)(params), jax.jit(theirs.init)(params)
  step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
  states, updates = [mine], []
  for i, grad in enumerate(gradients(5) if grads is None else grads):
    extra = {} if extras is None else extras(i)
    got, mine = step(grad, mine, params, **extra)
    want, yours = their_step(grad, yours, params, **extra)
    assert_close(got, want)
    states.append(mine)
    updates.append(got)
  assert step._cache_size() == their_step._cache_size()
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[-1])
  return states, updates


def labels_of(state):
  """The names of leaves that travel in a state."""
  is_labels = lambda x: isinstance(x, Labels)  # noqa: E731
  return [x.leaves for x in jax.tree.leaves(state, is_leaf=is_labels) if is_labels(x)]


def steps_of(state):
  return next(int(value) for key, value in clipjax.metrics(state).items() if key.endswith("/steps"))


LEAVES = ("a", "b/0", "b/1", "c/d", "c/e/0", "c/e/1")

# masked -------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("mask", [MASK, lambda _: MASK, lambda p: jax.tree.map(lambda x: x.ndim > 0, p)])
def test_masked(name, mask):
  states, updates = both(name, lambda tx: optax.masked(tx, mask))
  chosen = jax.tree.leaves(mask(PARAMS) if callable(mask) else mask)
  assert labels_of(states[-1])[0] == tuple(leaf for leaf, is_in in zip(LEAVES, chosen, strict=True) if is_in)
  for got, given, is_in in zip(jax.tree.leaves(updates[-1]), jax.tree.leaves(gradients(5)[-1]), chosen, strict=True):
    assert is_in or np.array_equal(got, given)


@every
def test_masked_by_a_prefix(name):
  states, _ = both(name, lambda tx: optax.masked(tx, {"a": True, "b": False, "c": {"d": False, "e": True}}))
  assert labels_of(states[-1])[0] == ("a", "c/e/0", "c/e/1")


@every
def test_a_mask_within_a_mask(name):
  inner = {"a": True, "b": [True, True], "c": False}
  by_rank = lambda p: jax.tree.map(lambda x: x.ndim > 0, p)  # noqa: E731
  states, _ = both(name, lambda tx: optax.masked(optax.masked(tx, inner), by_rank))
  assert labels_of(states[-1])[0] == ("a", "b/0")


@every
@pytest.mark.parametrize("container", [list, tuple, dict])
def test_nothing_to_mask(name, container):
  for make in PAIRS[name]:
    tx = optax.masked(make(), container())
    assert tx.update(container(), tx.init(container()), container())[0] == container()


@every
def test_a_mask_of_another_structure_is_an_error(name):
  mask = {**MASK, "z": True}
  for make in PAIRS[name]:
    with pytest.raises(ValueError, match=r"Dict key mismatch|structure"):
      optax.masked(make(), mask).init(PARAMS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Callable:
  """A module that is called, as Equinox has them."""

  w: jax.Array

  def __call__(self, x):
    return self.w @ x


@every
def test_a_mask_that_can_be_called(name):
  module = Callable(jnp.array([1.0, 2.0, 3.0]))
  tx = optax.masked(PAIRS[name][0](), Callable(False))
  updates, state = tx.update(module, tx.init(module), module)
  assert_bits_equal(updates, module)
  assert labels_of(state)[0] == ()


# partition ----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("labels", [GROUPS, lambda _: GROUPS])
def test_partition(name, labels):
  wrap = lambda tx: optax.partition({"x": optax.chain(tx, optax.scale(-1.0)), "y": optax.ema(0.5)}, labels)  # noqa: E731
  states, updates = both(name, wrap)
  assert labels_of(states[-1])[0] == ("a", "b/1", "c/d")
  assert steps_of(states[-1]) == 5
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_one_transformation_for_each_part():
  clips = {"x": clipjax.clip_by_global_norm(0.5, name="x"), "y": clipjax.clip_by_leaf_norm(0.25, name="y")}
  peers = {"x": optax.clip_by_global_norm(0.5), "y": by_leaf(0.25)}
  ours, theirs = (optax.partition(parts, GROUPS) for parts in (clips, peers))
  state, other = ours.init(PARAMS), theirs.init(PARAMS)
  for grad in gradients(4):
    got, state = ours.update(grad, state, PARAMS)
    want, other = theirs.update(grad, other, PARAMS)
    assert_close(got, want)
  values = clipjax.metrics(state)
  assert [values[key] for key in sorted(values) if key.endswith("/steps")] == [4, 4]


@pytest.mark.parametrize("container", [list, tuple, dict])
@every
def test_a_partition_of_nothing(name, container):
  tx = optax.partition({0: PAIRS[name][0]()}, lambda _: 0)
  assert tx.update(container(), tx.init(container()), container())[0] == container()


@every
def test_a_label_without_a_transformation_is_an_error(name):
  tx = optax.partition({"x": PAIRS[name][0]()}, GROUPS)
  with pytest.raises(ValueError, match="label"):
    jax.jit(tx.init)(PARAMS)


def test_extra_arguments_reach_the_parts():
  tx = optax.partition(
    {"x": clipjax.skip_steps(optax.sgd(1.0), loss_rule=10.0), "y": clipjax.clip_by_global_norm(1e9)}, GROUPS
  )
  state = tx.init(PARAMS)
  with pytest.raises(ValueError, match="value="):
    tx.update(PARAMS, state, PARAMS)
  updates, state = tx.update(PARAMS, state, PARAMS, value=3.0, another="ignored")
  assert_close(updates["a"], -PARAMS["a"])
  updates, state = tx.update(PARAMS, state, PARAMS, value=30.0)
  assert not np.any(updates["a"]) and np.array_equal(updates["b"][0], PARAMS["b"][0])
  assert optax.tree.get(state, "skipped_steps") == 1


# MultiSteps ---------------------------------------------------------------------------------------------------------


@every
def test_multi_steps(name):
  wrap = lambda tx: optax.MultiSteps(optax.chain(tx, optax.scale_by_adam(), optax.scale(-0.1)), 4)  # noqa: E731
  states, updates = both(name, wrap, gradients(12))
  for i, update in enumerate(updates):
    assert any(np.any(x) for x in jax.tree.leaves(update)) == (i % 4 == 3)
  assert [steps_of(state) for state in states] == [0] * 4 + [1] * 4 + [2] * 4 + [3]
  assert labels_of(states[-1])[0] == LEAVES


@every
def test_multi_steps_by_a_schedule(name):
  schedule = lambda step: jnp.where(step < 2, 1, 3)  # noqa: E731
  states, _ = both(name, lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), schedule), gradients(8))
  assert [steps_of(state) for state in states] == [0, 1, 2, 2, 2, 3, 3, 3, 4]


@every
def test_multi_steps_keeps_its_dtypes_in_a_scan(name):
  params = {"a": jnp.ones(2, jnp.bfloat16)}
  tx = of(optax.MultiSteps(optax.chain(PAIRS[name][0](), optax.sgd(1e-4)), 2, accumulator_dtype=jnp.float32))
  grads = {"a": jnp.ones((4, 2), jnp.bfloat16)}
  step = lambda state, grad: tx.update(grad, state, params)[::-1]  # noqa: E731
  state, updates = jax.lax.scan(step, tx.init(params), grads)
  assert state.acc_grads["a"].dtype == jnp.float32 and updates["a"].dtype == jnp.bfloat16
  assert steps_of(state) == 2


@every
def test_multi_steps_skips_what_is_not_finite(name):
  wrap = lambda tx: optax.MultiSteps(  # noqa: E731
    optax.chain(tx, optax.sgd(1.0)), 2, should_skip_update_fn=optax.skip_not_finite
  )
  grads = gradients(6)
  for i, bad in ((2, jnp.inf), (3, jnp.nan)):
    grads[i] = jax.tree.map(lambda x, bad=bad: jnp.full_like(x, bad), grads[i])
  states, updates = both(name, wrap, grads)
  assert [int(state.mini_step) for state in states] == [0, 1, 0, 0, 0, 1, 0]
  assert steps_of(states[-1]) == 2 and clipjax.metrics(states[-1]).get("grad/nonfinite_steps", 0) == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


@every
def test_multi_steps_clips_the_mean(name):
  grads = [jax.tree.map(lambda x, i=i: jnp.full_like(x, i), PARAMS) for i in (1.0, 2.0, 3.0, 4.0)]
  _, updates = both(name, lambda tx: optax.MultiSteps(tx, 4), grads)
  alone = PAIRS[name][0]()
  mean = jax.tree.map(lambda x: jnp.full_like(x, 2.5), PARAMS)
  assert_close(updates[-1], alone.update(mean, alone.init(PARAMS), PARAMS)[0])


# apply_if_finite, conditionally_transform and conditionally_mask ----------------------------------------------------


@every
def test_apply_if_finite(name):
  grads = gradients(7)
  for i in (1, 2, 4, 5, 6):
    grads[i] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads[i])
  states, updates = both(name, lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(1.0)), 2), grads)
  assert [int(state.notfinite_count) for state in states] == [0, 0, 1, 2, 0, 1, 2, 3]
  finite = [all(np.isfinite(x).all() for x in jax.tree.leaves(update)) for update in updates]
  # The third bad one in a row is let through; `skip_steps` rejects it nevertheless.
  assert finite == [True] * 6 + [name == "skip_steps"]
  assert steps_of(states[-2]) == 2 and steps_of(states[-1]) == 3


@every
@pytest.mark.parametrize("wrapper", [optax.transforms.conditionally_transform, optax.transforms.conditionally_mask])
def test_for_three_steps_alone(name, wrapper):
  grads = gradients(6, seed=4)
  states, updates = both(name, lambda tx: wrapper(tx, lambda step: step < 3), grads)
  assert [steps_of(state) for state in states] == [0, 1, 2, 3, 3, 3, 3]
  assert_bits_equal(states[3].inner_state, states[-1].inner_state)
  is_mask = wrapper is optax.transforms.conditionally_mask
  assert_bits_equal(updates[-1], jax.tree.map(jnp.zeros_like, grads[-1]) if is_mask else grads[-1])


@every
def test_a_condition_that_reads_extra_arguments(name):
  wrap = lambda tx: optax.transforms.conditionally_mask(  # noqa: E731
    tx, lambda step, loss, **extra: loss > 0.1, forward_extra_args=True
  )
  states, _ = both(name, wrap, extras=lambda i: {"loss": jnp.float32(0.2 if i < 3 else 0.0)})
  assert [steps_of(state) for state in states] == [0, 1, 2, 3, 3, 3]


# inject_hyperparams -------------------------------------------------------------------------------------------------

INJECTED = {
  "clip_by_global_norm": (clipjax.clip_by_global_norm, optax.clip_by_global_norm),
  "clip_by_leaf_norm": (clipjax.clip_by_leaf_norm, by_leaf),
  "clip_by_group_norm": (
    lambda max_norm: clipjax.clip_by_group_norm(max_norm, by_first_letter), by_group,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", INJECTED)
def test_a_hyperparameter_that_is_overridden(name):
  ours, theirs = (optax.inject_hyperparams(factory)(max_norm=0.1) for factory in INJECTED[name])
  mine, yours = jax.jit(ours.init)(PARAMS), jax.jit(theirs.init)(PARAMS)
  step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
  for i, grad in enumerate(gradients(5)):
    for state in (mine, yours):
      state.hyperparams["max_norm"] = jnp.float32(i)
    got, mine = step(grad, mine, PARAMS)
    want, yours = their_step(grad, yours, PARAMS)
    if i == 0:  # At 0 everything is 0.
      assert not any(np.any(x) for x in jax.tree.leaves(got))
    assert_close(got, want)
  assert labels_of(mine)[0] == LEAVES and np.all(np.asarray(mine.inner_state.max_norm) == 4)


@pytest.mark.parametrize("name", INJECTED)
def test_a_hyperparameter_on_a_schedule(name):
  schedule = optax.piecewise_constant_schedule(3.0, {1: 5, 4: 0.1})
  ours, theirs = (optax.inject_hyperparams(factory)(max_norm=schedule) for factory in INJECTED[name])
  mine, yours = ours.init(PARAMS), theirs.init(PARAMS)
  mine = optax.tree.map_params(ours, lambda x: x, mine)  # A change that is none.
  for grad, limit in zip(gradients(6), [3.0, 15.0, 15.0, 15.0, 1.5, 1.5], strict=True):
    got, mine = jax.jit(ours.update)(grad, mine, PARAMS)
    want, yours = jax.jit(theirs.update)(grad, yours, PARAMS)
    assert_close(got, want)
    np.testing.assert_allclose(mine.inner_state.max_norm, limit, rtol=1e-6)


@pytest.mark.parametrize("static_args", ["groups", ["groups"]])
def test_a_static_argument(static_args):
  tx = optax.inject_hyperparams(clipjax.clip_by_group_norm, static_args=static_args)(0.7, groups=by_first_letter)
  state = jax.jit(tx.init)(PARAMS)
  assert "groups" not in state.hyperparams and "max_norm" in state.hyperparams
  got, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
  assert_close(got, by_group(0.7).update(PARAMS, optax.EmptyState())[0])


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


# chain, named_chain, flatten, monitors ------------------------------------------------------------------------------


@every
def test_a_chain_is_its_parts_one_after_the_other(name):
  parts = [PAIRS[name][0](), optax.scale_by_adam(), optax.trace(0.5), optax.scale(-0.01)]
  tx = optax.chain(*parts)
  state, states = tx.init(PARAMS), [part.init(PARAMS) for part in parts]
  step = jax.jit(tx.update)
  for grad in gradients(4):
    updates, state = step(grad, state, PARAMS)
    by_hand = grad
    for i, part in enumerate(parts):
      by_hand, states[i] = jax.jit(part.update)(by_hand, states[i], PARAMS)
    assert_close(updates, by_hand)
  assert_close(jax.tree.leaves(state), jax.tree.leaves(tuple(states)))


@every
def test_a_chain_hands_on_extra_arguments(name):
  def needs_loss(updates, state, params=None, *, loss, **extra):
    del params, extra
    return jax.tree.map(lambda x: x / loss, updates), state

  by_loss = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), needs_loss)
  for wrap in (
    lambda tx: optax.chain(tx, by_loss),
    lambda tx: optax.named_chain(("clip", tx), ("by_loss", by_loss)),
  ):
    assert isinstance(wrap(PAIRS[name][0]()), optax.GradientTransformationExtraArgs)
    states, _ = both(name, wrap, extras=lambda i: {"loss": jnp.float32(i + 1), "unknown": jnp.float32(0.0)})
  assert labels_of(states[-1]["clip"])[0] == LEAVES


@every
def test_flatten(name):
  if name in ("clip_by_leaf_norm", "clip_by_group_norm", "adaptive_grad_clip"):
    ours = optax.flatten(PAIRS[name][0]() if name != "clip_by_group_norm" else clipjax.clip_by_group_norm(0.7, "x"))
    state = ours.init(PARAMS)
    assert [len(leaves) for leaves in labels_of(state)] == [1]  # Flattened, all leaves are one.
    grads = jax.tree.map(lambda x: 100 * x, gradients(2)[1])
    got, _ = ours.update(grads, state, PARAMS)
    theirs = optax.flatten(PAIRS[name][1]() if name != "clip_by_group_norm" else optax.clip_by_global_norm(0.7))
    assert_close(got, theirs.update(grads, theirs.init(PARAMS), PARAMS)[0])
    return
  states, updates = both(name, lambda tx: optax.flatten(optax.chain(tx, optax.sgd(0.1))))
  plain, unflattened = both(name, lambda tx: optax.chain(tx, optax.sgd(0.1)))
  assert_close(updates[-1], unflattened[-1])
  assert len(labels_of(states[-1])[0]) == 1 and labels_of(plain[-1])[0] == LEAVES


def test_the_norm_in_the_state_is_what_a_snapshot_takes():
  before = optax.chain(optax.sgd(0.1, momentum=0.9), optax.snapshot("norm_before_clip", optax.tree.norm))
  tx = optax.chain(before, clipjax.clip_by_global_norm(0.05))
  state = tx.init(PARAMS)
  for grad in gradients(3):
    updates, state = tx.update(grad, state)
    np.testing.assert_allclose(state[1].norm, optax.tree.get(state, "norm_before_clip"), rtol=1e-6)
    np.testing.assert_allclose(clipjax.global_norm(updates), min(0.05, float(state[1].norm)), rtol=1e-6)


# contrib ------------------------------------------------------------------------------------------------------------

CONTRIB = {
  "mechanize": lambda tx: optax.contrib.mechanize(optax.chain(tx, optax.sgd(1e-3)), weight_decay=0.0),
  "schedule_free": lambda tx: optax.contrib.schedule_free(optax.chain(tx, optax.sgd(1e-3)), learning_rate=1e-3),
  "reduce_on_plateau": lambda tx: optax.chain(tx, optax.sgd(1e-3), optax.contrib.reduce_on_plateau(patience=1)),
  "before muon": lambda tx: optax.chain(tx, optax.contrib.muon(0.01)),
  "before prodigy": lambda tx: optax.chain(tx, optax.contrib.prodigy(0.1)),
  "split_real_and_imaginary": lambda tx: optax.contrib.split_real_and_imaginary(optax.chain(tx, optax.sgd(1e-3))),
}


def rosenbrock(params):
  x, y = params
  return (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2


@every
@pytest.mark.parametrize("wrapper", CONTRIB)
def test_training_within_a_wrapper_of_contrib(name, wrapper):
  if name == "clip_by_group_norm":
    ours, theirs = clipjax.clip_by_group_norm(0.7, lambda path, leaf: "all"), optax.clip_by_global_norm(0.7)
  else:
    ours, theirs = (make() for make in PAIRS[name])
  ends = []
  for clip in (ours, theirs):
    tx = optax.with_extra_args_support(CONTRIB[wrapper](clip))

    @jax.jit
    def step(params, state, tx=tx):
      value, grads = jax.value_and_grad(rosenbrock)(params)
      extra = {"value": value, "an_argument_that_nothing_expects": 1}
      updates, state = tx.update(grads, state, params, **extra)
      return optax.apply_updates(params, updates), state, updates

    params = [jnp.float32(-0.5), jnp.float32(0.75)]
    state = tx.init(params)
    ends.append([])
    for _ in range(6):
      params, state, updates = step(params, state)
      ends[-1].append(updates)
    assert step._cache_size() == 1
    if clip is ours:
      assert steps_of(state) == 6
  assert_close(*ends, rtol=1e-4)


def test_sam_with_a_clip_on_both_sides():
  ends = []
  for clip in (clipjax.clip_by_global_norm, optax.clip_by_global_norm):
    adversary = optax.chain(optax.contrib.normalize(), clip(0.5), optax.sgd(0.05))
    tx = optax.contrib.sam(optax.chain(clip(0.7), optax.sgd(0.01)), adversary, sync_period=2)
    params = [jnp.float32(-0.5), jnp.float32(0.75)]
    state = tx.init(params)
    for _ in range(6):
      updates, state = jax.jit(tx.update)(jax.grad(rosenbrock)(params), state, params)
      params = optax.apply_updates(params, updates)
    ends.append(params)
  assert_close(*ends, rtol=1e-5)


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
placed = pytest.mark.parametrize(
  ("name", "place"),
  [
    pytest.param(name, place, marks=() if place == "before adam" or name in QUICK else slow, id=f"{name} {place}")
    for name in NAMES
    for place in PLACES
  ],
)
# Every state is mapped at one place; what else is asked, of two kinds.
KINDS = ("clip_by_group_norm", "watch")
each_kind = pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in KINDS else slow) for x in NAMES])


@functools.cache
def after_two_steps(name, place):
  tx = optax.with_extra_args_support(PLACES[place](PAIRS[name][0]()))
  state, step = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
  for grad in gradients(2):
    _, state = step(grad, state, PARAMS)
  return tx._replace(update=step), state


def is_masked_node(x):
  return isinstance(x, optax.MaskedNode)


def assert_same_state(tx, mapped, state):
  """The same structure, bits and names, and the same next step."""
  assert labels_of(mapped) == labels_of(state) and all(labels_of(state))
  assert_bits_equal(mapped, state)
  grad = gradients(3)[-1]
  assert_bits_equal(tx.update(grad, mapped, PARAMS), tx.update(grad, state, PARAMS))


@placed
@pytest.mark.parametrize("as_init", cases([False, True], {True}))
def test_map_params_with_the_identity_changes_nothing(name, place, as_init):
  tx, state = after_two_steps(name, place)
  mapped = optax.tree.map_params(tx.init if as_init else tx, lambda x: x, state)
  assert_same_state(tx, mapped, state)


@placed
def test_map_params_with_the_identity_for_the_rest_too_changes_nothing(name, place):
  tx, state = after_two_steps(name, place)
  mapped = optax.tree.map_params(tx, lambda x: x, state, transform_non_params=lambda x: x)
  assert_same_state(tx, mapped, state)


@each_kind
def test_map_params_changes_the_moments_alone(name):
  tx, state = after_two_steps(name, "before adam")
  mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
  assert_bits_equal(mapped[0], state[0])
  assert labels_of(mapped) == labels_of(state)
  for moment in ("mu", "nu"):
    want = jax.tree.map(lambda x: x + 1, getattr(state[1][0], moment))
    assert_bits_equal(getattr(mapped[1][0], moment), want)
  updates, after = tx.update(gradients(3)[-1], mapped, PARAMS)
  assert jax.tree.structure(after) == jax.tree.structure(state) and steps_of(after) == 3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


@each_kind
def test_map_params_changes_the_rest_alone(name):
  tx, state = after_two_steps(name, "before adam")
  doubled = lambda x: x * 2 if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
  mapped = optax.tree.map_params(tx, lambda x: x, state, transform_non_params=doubled)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  assert labels_of(mapped) == labels_of(state)
  assert_bits_equal(jax.tree.leaves(mapped[0]), list(map(doubled, jax.tree.leaves(state[0]))))
  assert_bits_equal(mapped[1][0].mu, state[1][0].mu)
  _, after = tx.update(gradients(3)[-1], mapped, PARAMS)
  assert jax.tree.structure(after) == jax.tree.structure(state)


@each_kind
def test_map_params_casts_the_moments_and_the_next_step_works(name):
  tx, state = after_two_steps(name, "before adam")
  mapped = optax.tree.map_params(tx, lambda x: x.astype(jnp.bfloat16), state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  assert labels_of(mapped) == labels_of(state)
  assert_bits_equal(mapped[0], state[0])
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((mapped[1][0].mu, mapped[1][0].nu)))
  got, _ = tx.update(gradients(3)[-1], mapped, PARAMS)
  want, _ = tx.update(gradients(3)[-1], state, PARAMS)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.05, atol=1e-3)


SPECS = {"a": "A", "b": ["B0", "B1"], "c": {"d": "D", "e": ("E0", "E1")}}


@each_kind
@pytest.mark.parametrize("rest", ["REST", None])
def test_map_params_makes_specs(name, rest):
  tx, state = after_two_steps(name, "before adam")
  specs = optax.tree.map_params(
    tx, lambda _, spec: spec, state, SPECS, transform_non_params=lambda _: rest, is_leaf=lambda x: x is None
  )
  assert specs[1][0].mu == specs[1][0].nu == SPECS and specs[1][0].count == rest
  assert labels_of(specs) == labels_of(state)
  if rest is None:
    assert jax.tree.leaves(specs[0]) == []
  else:  # A spec for each leaf of the state: as `jax.jit` wants its shardings.
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    assert set(jax.tree.leaves(specs[0])) == {"REST"}


@each_kind
def test_map_params_makes_shardings_that_place_a_state(name):
  tx, state = after_two_steps(name, "before adam")
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shardings = optax.tree.map_params(
    tx, lambda _, spec: spec, state, jax.tree.map(lambda _: everywhere, PARAMS),
    transform_non_params=lambda _: everywhere,
  )  # fmt: skip
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  assert_same_state(tx, jax.device_put(state, shardings), state)


@each_kind
def test_map_params_to_none(name):
  tx, state = after_two_steps(name, "before adam")
  mapped = optax.tree.map_params(tx, lambda _: None, state)
  assert jax.tree.leaves(mapped[1][0].mu) == [] and labels_of(mapped) == labels_of(state)
  assert_bits_equal(mapped[0], state[0])
  mapped = optax.tree.map_params(tx, lambda _: 1, state, transform_non_params=lambda _: None)
  assert mapped[1][0].mu == jax.tree.map(lambda _: 1, PARAMS) and mapped[1][0].count is None
  assert jax.tree.leaves(mapped[0]) == [] and labels_of(mapped) == labels_of(state)


@each_kind
def test_map_params_of_a_masked_state_with_specs(name):
  tx, state = after_two_steps(name, "masked")
  specs = optax.tree.map_params(
    tx, lambda x, spec: None if is_masked_node(x) else spec, state, SPECS, is_leaf=is_masked_node,
    transform_non_params=lambda _: "REST",
  )  # fmt: skip
  clip, (adam, _) = specs.inner_state
  assert adam.mu == {"a": "A", "b": [None, "B1"], "c": {"d": "D", "e": (None, "E1")}}
  assert jax.tree.structure(clip) == jax.tree.structure(state.inner_state[0])
  assert labels_of(specs) == labels_of(state) == [("a", "b/1", "c/d", "c/e/1")] * len(labels_of(state))


@each_kind
def test_map_params_of_a_state_made_under_jit(name):
  tx = optax.chain(PAIRS[name][0](), optax.adam(0.1))
  state = jax.jit(tx.init)(PARAMS)
  mapped = optax.tree.map_params(tx, lambda x: x, state)
  step, their_step = jax.jit(tx.update), jax.jit(functools.partial(tx.update))
  for grad in gradients(3):
    got, mapped = step(grad, mapped, PARAMS)
    want, state = their_step(grad, state, PARAMS)
    assert_bits_equal(got, want)
    mapped = optax.tree.map_params(tx, lambda x: x, mapped)
  assert step._cache_size() == their_step._cache_size()
