"""The libraries that people train with: the same numbers as without them, before and after a checkpoint.

That the state is *found* in every wrapper is the subject of test_metrics.py; that each state passes through Orbax and
flax.serialization too. Wrappers of Optax are in test_optax_situations.py, models with stacked layers in
test_stacked_models.py.
"""

import functools
import math
import pathlib
import re

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import through_equinox, through_flax, through_orbax
from flax import nnx
from helpers import assert_bits_equal, cases, factories, oracle_clip, oracle_norm, train_on_one_device
from jax.experimental import checkify

import clipjax
from clipjax import rules

RECIPES = (pathlib.Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
LIMIT, STEPS = 0.7, 6
pytestmark = pytest.mark.usefixtures("standard_promotion")  # As users have it; the libraries need it.


def batches_of(steps=STEPS):
  """Pairs of inputs and targets, of ever larger targets, so that some steps are clipped and some are not."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(steps, 8, 3)), rng.normal(size=(steps, 8, 2))
  growth = np.linspace(0.05, 2.0, steps)[:, None, None]
  return list(zip(jnp.asarray(x, jnp.float32), jnp.asarray(growth * y, jnp.float32), strict=True))


def start():
  """Weights and biases of two layers."""
  rng = np.random.default_rng(1)
  shapes = {"up": {"w": (3, 4), "b": (4,)}, "down": {"w": (4, 2), "b": (2,)}}
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s) * 0.3, jnp.float32), shapes, is_leaf=is_shape)


def loss_fn(params, x, y):
  hidden = jnp.tanh(x @ params["up"]["w"] + params["up"]["b"])
  return jnp.mean((hidden @ params["down"]["w"] + params["down"]["b"] - y) ** 2)


def train(tx, batches=None, params=None, state=None):
  """Parameters and state after the batches."""
  params = start() if params is None else params
  state = tx.init(params) if state is None else state

  @jax.jit
  def step(params, state, x, y):
    value, grads = jax.value_and_grad(loss_fn)(params, x, y)
    extra = {"value": value} if isinstance(tx, optax.GradientTransformationExtraArgs) else {}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  for x, y in batches_of() if batches is None else batches:
    params, state = step(params, state, x, y)
  return params, state


def clipped_adam(limit=LIMIT, **options):
  return optax.chain(clipjax.clip_by_global_norm(limit, **options), optax.adam(0.05))


def assert_alike(got, want, rtol=1e-5):
  """The same leaves, to rounding: by leaf, because Adam's quotient of an entry that is nearly 0 is all rounding."""
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  assert len(got) == len(want) > 0
  for a, b in zip(got, want, strict=True):
    assert np.shape(a) == np.shape(b)
    assert np.linalg.norm(np.subtract(a, b)) <= rtol * np.linalg.norm(b)


# Models of other libraries ------------------------------------------------------------------------------------------


class NNXModel(nnx.Module):
  """Two layers, and a count that is no parameter."""

  def __init__(self):
    self.up, self.down = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

  def __call__(self, x):
    self.calls[...] += 1
    return self.down(jnp.tanh(self.up(x)))


def test_flax_nnx():
  model = NNXModel()
  optimizer = nnx.Optimizer(model, clipped_adam(), wrt=nnx.Param)
  layers = {"up": model.up, "down": model.down}
  params = {name: {"w": layer.kernel[...], "b": layer.bias[...]} for name, layer in layers.items()}
  want, norms = train_on_one_device(loss_fn, params, batches_of(), LIMIT, optax.adam(0.05))

  @nnx.jit
  def step(model, optimizer, x, y):
    grads = nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    optimizer.update(model, grads)

  for x, y in batches_of():
    step(model, optimizer, x, y)
  assert_alike({name: {"w": layer.kernel[...], "b": layer.bias[...]} for name, layer in layers.items()}, want)
  seen, clipped = clipjax.metrics(optimizer), np.array(norms) > LIMIT
  assert 0 < clipped.sum() < len(norms)
  np.testing.assert_allclose(seen["grad/norm"], norms[-1], rtol=1e-5)
  assert (seen["grad/clipped_steps"], seen["grad/steps"]) == (clipped.sum(), len(norms))
  assert model.calls[...] == STEPS


# Saving and going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [through_orbax, through_flax, through_equinox])
def test_run_that_is_saved_in_the_middle_of_a_warm_up_goes_on_as_if_it_was_not(way, tmp_path):
  tx = clipjax.skip_steps(
    optax.chain(clipjax.watch(history=4), clipjax.zclip(warmup_steps=4), clipjax.adagc(name="leaf"), optax.adam(0.05)),
    norm_rule=rules.rolling_sigma(window=4),
  )
  batches = batches_of(8)
  want_params, want_state = train(tx, batches)
  params, state = way(train(tx, batches[:3]), (start(), tx.init(start())), tmp_path)
  params, state = train(tx, batches[3:], params, state)
  assert_bits_equal(params, want_params)
  assert_bits_equal(jax.tree.leaves(state), jax.tree.leaves(want_state))
  assert jax.tree.structure(state) == jax.tree.structure(want_state)


def test_flax_nnx_optimizer_is_restored_from_orbax(tmp_path):
  def fresh():
    model = NNXModel()
    return model, nnx.Optimizer(model, optax.chain(clipjax.zclip(warmup_steps=2), optax.adam(0.05)), wrt=nnx.Param)

  graph, start = nnx.split(fresh())

  @jax.jit
  def step(state, x, y):
    model, optimizer = nnx.merge(graph, state)
    optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model))
    return nnx.state((model, optimizer))

  first, last = functools.reduce(lambda state, batch: step(state, *batch), batches_of()[:3], start), batches_of()[3]
  restored = nnx.state(fresh())
  pure = through_orbax(nnx.to_pure_dict(first), nnx.to_pure_dict(restored), tmp_path)
  nnx.replace_by_pure_dict(restored, pure)
  assert_bits_equal(jax.tree.leaves(step(restored, *last)), jax.tree.leaves(step(first, *last)))


def test_constant_becomes_a_schedule_at_the_step_of_the_checkpoint(tmp_path):
  schedule = lambda count: jnp.where(count < 3, LIMIT, 0.1 * (count - 2))  # noqa: E731
  batches, later = batches_of(), clipped_adam(schedule)
  params, state = through_orbax(train(clipped_adam(), batches[:3]), (start(), later.init(start())), tmp_path)
  params, state = train(later, batches[3:], params, state)
  assert_bits_equal(params, train(later, batches)[0])
  np.testing.assert_allclose(clipjax.metrics(state)["grad/max_norm"], 0.1 * (STEPS - 1 - 2), rtol=1e-6)
  assert clipjax.metrics(state)["grad/steps"] == STEPS


def test_optax_checkpoint_goes_on_without_tracking(tmp_path):
  theirs = optax.chain(optax.clip_by_global_norm(LIMIT), optax.adam(0.05))
  ours, batches = clipped_adam(track=False), batches_of()
  params, state = through_orbax(train(theirs, batches[:3]), (start(), ours.init(start())), tmp_path)
  assert_alike(train(ours, batches[3:], params, state)[0], train(theirs, batches)[0])
  with pytest.raises(TypeError) as error:
    train(clipped_adam(), batches[3:], params, state)
  assert str(error.value) == (
    "`state` must be the ClipState that `init` returned, got an EmptyState: pass the state of this transformation, or "
    "use `track=False` to continue from a checkpoint of optax.clip_by_global_norm."
  )


UP, DOWN = start()["up"], start()["down"]
CHANGED = {
  "a new layer": (start() | {"middle": dict(UP)}, "6 (new: 'middle/b', 'middle/w')"),
  "a layer less": ({"up": UP}, "2 (missing: 'down/b', 'down/w')"),
  "another name and a layer more": (
    {"in": UP, "down": DOWN, "out": DOWN["w"]}, "5 (new: 'in/b', 'in/w', 'out'; missing: 'up/b', 'up/w')",
  ),
}  # fmt: skip


def made(name):
  return getattr(clipjax, name)(**({"max_norm": LIMIT} if name.startswith("clip") else {}))


MADE = ("clip_by_global_norm", "clip_by_leaf_norm", "zclip", "watch")


@pytest.mark.parametrize(
  ("name", "change"), [*(("adagc", change) for change in CHANGED), *((name, "a new layer") for name in MADE)]
)
def test_changed_model_with_the_state_of_the_old_one(name, change):
  (grads, text), tx = CHANGED[change], made(name)
  message = (
    f"`updates` must have as many floating leaves as `init` saw, 4, got {text}: call `init` with the parameters that "
    "you train."
  )
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    tx.update(grads, tx.init(start()), grads)


LARGER = start() | {"middle": {"w": UP["w"]}}


@pytest.mark.parametrize(
  ("tx", "old", "new"),
  [
    *((made(name), start(), LARGER) for name in ("clip_by_leaf_norm", "adagc", "watch")),
    (clipjax.watch(stacked=0), jnp.ones((4, 2)), jnp.ones((5, 2))),
  ],
)
def test_state_of_another_model_that_flax_put_into_the_new_one(tx, old, new):
  restored = flax.serialization.from_bytes(tx.init(new), flax.serialization.to_bytes(tx.init(old)))
  message = (
    "`state` must have norms of shape (5,), as `init` made it, got (4,): it was restored from another model "
    "or configuration; call `init` with the parameters that you train."
  )
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    tx.update(new, restored, new)


def test_state_by_leaf_in_a_watch_without_leaves():
  by_leaf, as_one = clipjax.watch(), clipjax.watch(per_leaf=False)
  state = by_leaf.init(start())._replace(labels=as_one.init(start()).labels)
  with pytest.raises(ValueError, match=r"`state` must have norms of shape \(\), .* got \(4,\)"):
    as_one.update(start(), state)


# Wrappers of Optax --------------------------------------------------------------------------------------------------


def test_inject_hyperparams_needs_to_know_that_a_function_of_groups_is_no_schedule():
  inject = functools.partial(optax.inject_hyperparams, clipjax.clip_by_group_norm)
  first = lambda path, leaf: path.split("/")[0]  # noqa: E731
  as_tree = {"up": "up", "down": "down"}
  want, _ = train(clipjax.clip_by_group_norm(0.1, first))
  for tx in (inject(static_args="groups")(max_norm=0.1, groups=first), inject()(max_norm=0.1, groups=as_tree)):
    assert_alike(train(tx)[0], want, rtol=1e-6)
  with pytest.raises(TypeError, match="missing 1 required positional argument: 'leaf'"):  # Optax calls it with a count.
    inject()(max_norm=0.1, groups=first).init(start())


def test_map_params_takes_no_number_of_a_state_for_the_one_parameter_that_is_a_scalar():
  clips = [clipjax.watch(), clipjax.clip_by_leaf_norm(1.0), clipjax.zclip(name="z"), clipjax.adagc(name="a")]
  tx = clipjax.skip_steps(optax.chain(*clips, optax.adam(0.05)), norm_rule=rules.rolling_sigma(window=4))
  state = tx.init(jnp.float32(1.0))
  mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (mapped, state)), strict=True)]
  (adam, _), (new, _) = (x.inner_state[-1] for x in (state, mapped))
  assert sum(changed) == 2 and (new.mu, new.nu) == (adam.mu + 1, adam.nu + 1)


# Transformations of JAX ---------------------------------------------------------------------------------------------


def test_chexify_lets_a_dropped_step_pass_and_stops_at_a_bad_one():
  def stepper(policy):
    tx = optax.chain(clipjax.clip_by_global_norm(LIMIT, on_nonfinite=policy), optax.sgd(0.1))

    @functools.partial(chex.chexify, async_check=False)
    @jax.jit
    def step(params, state, grads):
      updates, state = tx.update(grads, state, params)
      chex.assert_tree_all_finite(updates)
      return optax.apply_updates(params, updates), state

    return step, tx.init(start())

  good = jax.grad(loss_fn)(start(), *batches_of()[-1])
  bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good)
  step, state = stepper("zero")
  params, state = step(start(), state, good)
  assert_alike(params, jax.tree.map(lambda p, g: p - 0.1 * g, start(), oracle_clip(good, LIMIT)))
  after, state = step(params, state, bad)
  assert_bits_equal(after, params)
  assert clipjax.metrics(state)["grad/nonfinite_steps"] == 1
  for policy, text in (("propagate", "assert_tree_all_finite"), ("error", "the gradient is not finite")):
    step, state = stepper(policy)
    _, state = step(start(), state, good)
    with pytest.raises((AssertionError, ValueError, checkify.JaxRuntimeError), match=text):
      step(start(), state, bad)


# One of each kind of state; the rules soon give a limit.
EXPORTED = {
  **factories(),
  "watch": clipjax.watch(history=2),
  "skip_steps": clipjax.skip_steps(
    clipjax.clip_by_global_norm(1.0), norm_rule=rules.minimum(rules.zscore(warmup_steps=1), 1.0)
  ),
  "clip_effect": clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(0.9, name="b")),
  "adaptive_grad_clip": clipjax.adaptive_grad_clip(),
  "rolling_sigma": clipjax.clip_by_leaf_norm(rules.rolling_sigma(window=3)),
  "quantile_tracking": clipjax.clip_by_leaf_norm(rules.quantile_tracking(0.5)),
  "after": clipjax.clip_by_leaf_norm(rules.delayed(1, 1.0)),
  "layers": clipjax.clip_by_leaf_norm(rules.zscore(warmup_steps=1), stacked={"w": 0, "b": None}),
}
ALIKE = {
  "clip_by_block_rms",
  "clip_by_group_norm",
  "autoclip",
  "adagc",
  "units of layers",
  "an infinite threshold",
}  # What takes the same operations as another is slow.
LOOKED_AT = {
  **EXPORTED,
  "a threshold of 0": clipjax.clip_by_global_norm(0.0),
  "an infinite threshold": clipjax.clip_by_leaf_norm(math.inf),
  "units of layers": clipjax.adaptive_grad_clip(stacked={"w": 0, "b": None}),
  "skip_steps of an optimizer of Optax": clipjax.skip_steps(optax.sgd(1.0), norm_rule=rules.zscore(warmup_steps=1)),
}


@pytest.mark.parametrize("name", cases(LOOKED_AT, ALIKE))
def test_every_operation_of_a_finite_step_is_finite_enough(name):
  # Thresholds are infinite while a rule warms up; `inf * 0` would be a NaN that nobody asked for.
  tx, params = LOOKED_AT[name], {"w": jnp.ones((2, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
  checked = jax.jit(checkify.checkify(tx.update, errors=checkify.float_checks))
  for magnitude in (0.0, 1e-30, 1.0, 1e30):
    grads = {"w": jnp.array([[magnitude, 0.0], [magnitude, -magnitude]]), "b": jnp.full(2, magnitude, jnp.bfloat16)}
    state = tx.init(params)
    for step in range(3):
      if step < 2 and magnitude in (0.0, 1e30):  # Operation by operation, outside of a compiler.
        with jax.disable_jit(), jax.debug_nans(True):
          tx.update(grads, state, params)
      error, (_, state) = checked(grads, state, params)
      assert error.get() is None


@pytest.mark.parametrize("name", EXPORTED)
def test_every_state_goes_through_an_exported_program(name):
  params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
  state = EXPORTED[name].init(params)
  program = jax.export.deserialize(jax.export.export(jax.jit(lambda s: s))(state).serialize())
  chex.assert_trees_all_equal(program.call(state), state)
  if name == "layers":
    assert program.call(state).labels.slices == ("b", "w[0]", "w[1]")
    with pytest.raises(ValueError, match=r"Labels|tree"):  # Another number of layers is another program.
      program.call(EXPORTED[name].init({"w": jnp.ones((3, 2)), "b": jnp.ones(3)}))


def test_a_clip_that_is_differentiated_through_in_a_checkpoint():
  def inner(params, x, y):  # As in meta-learning.
    clipped, _ = clipjax.clip_grad_norm(jax.grad(loss_fn)(params, x, y), 0.1)
    return loss_fn(jax.tree.map(lambda p, g: p - 0.5 * g, params, clipped), x, y)

  batch = batches_of()[-1]
  assert oracle_norm(jax.grad(loss_fn)(start(), *batch)) > 0.1
  plain = jax.jit(jax.grad(inner))(start(), *batch)
  assert_alike(jax.jit(jax.grad(jax.checkpoint(inner)))(start(), *batch), plain)
  direction = jax.tree.map(jnp.ones_like, start())
  along = jax.jit(lambda t: inner(jax.tree.map(lambda p, d: p + t * d, start(), direction), *batch))
  slope = (float(along(1e-2)) - float(along(-1e-2))) / 2e-2
  np.testing.assert_allclose(sum(float(jnp.sum(g)) for g in jax.tree.leaves(plain)), slope, rtol=2e-2)


# Loss scaling -------------------------------------------------------------------------------------------------------


def test_the_recipe_for_loss_scaling_gives_the_true_norm_and_drops_steps_that_overflow():
  (code,) = [block for block in re.findall(r"```python\n(.*?)```", RECIPES, re.DOTALL) if "float16" in block]
  names = {}
  exec(compile(code, "a block of docs/recipes.md", "exec"), names)
  seen = clipjax.metrics(names["opt_state"])
  kept = int(seen["grad/steps"])
  assert 0 < kept < seen["skip/steps"] == 8
  assert names["scale"] == 2.0 ** (16 - (8 - kept))
  loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # noqa: E731
  want, norms = train_on_one_device(loss, jnp.zeros(3), [(names["x"], names["y"])] * kept, 1.0, optax.sgd(0.1))
  assert_alike(names["w"], want, rtol=2e-3)
  np.testing.assert_allclose(seen["grad/norm"], norms[-1], rtol=2e-3)
