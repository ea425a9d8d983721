"""metrics and check: what they find, in every wrapper, and what they call it."""

import io

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from helpers import NO_LIMIT

import clipjax

PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
KEYS = ("norm", "norm_clipped", "max_norm", "scale", "clip_fraction", "clipped_steps", "nonfinite_steps", "steps")

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Adam and the wrappers of Optax need it.


def chained(max_norm=6.5):
  return optax.chain(clipjax.clip_by_global_norm(max_norm), optax.adam(1e-3))


def run(tx, grads=PARAMS, steps=2, params=PARAMS):
  state = tx.init(params)
  for _ in range(steps):
    _, state = jax.jit(tx.update)(grads, state, params)
  return state


def values(state, **options):
  return {key: float(value) for key, value in clipjax.metrics(state, **options).items()}


def test_keys_and_values_of_a_global_clip():
  got = clipjax.metrics(run(chained()))
  assert tuple(got) == tuple(f"grad/{key}" for key in KEYS)
  assert all(isinstance(v, jax.Array) and v.shape == () for v in got.values())
  want = {"norm": 13, "norm_clipped": 6.5, "max_norm": 6.5, "scale": 0.5, "clip_fraction": 1, "steps": 2}
  for key, value in want.items():
    np.testing.assert_allclose(got[f"grad/{key}"], value, rtol=1e-6)
  assert got["grad/nonfinite_steps"] == 0


def test_before_the_first_step():
  got = values(chained().init(PARAMS))
  assert got["grad/norm"] == 0 and got["grad/scale"] == 1 and got["grad/clip_fraction"] == 0 and got["grad/steps"] == 0


def test_clip_fraction_counts_all_steps():
  tx = clipjax.clip_by_global_norm(10.0)
  state = tx.init(jnp.zeros(1))
  for g in (1.0, 20.0, jnp.nan, 10.0):
    _, state = tx.update(jnp.array([g]), state)
  got = values(state)
  assert got["grad/clip_fraction"] == 0.25 and got["grad/nonfinite_steps"] == 1 and got["grad/steps"] == 4


def test_leaves_on_request_and_groups_always():
  by_leaf = run(clipjax.clip_by_leaf_norm(6.0))
  assert set(values(by_leaf)) == {f"grad/{key}" for key in KEYS}
  got = values(by_leaf, per_leaf=True)
  assert got["grad/norm/w"] == 5 and got["grad/scale/w"] == 1
  assert got["grad/norm/b"] == 12 and got["grad/scale/b"] == 0.5 and got["grad/max_norm/b"] == 6
  assert got["grad/norm"] == 13 and got["grad/scale"] == 0.5 and got["grad/max_norm"] == 6
  np.testing.assert_allclose(got["grad/norm_clipped"], np.hypot(5, 6), rtol=1e-6)
  by_group = values(run(clipjax.clip_by_group_norm({"x": None, "y": 3.0}, {"w": "x", "b": "y"}, name="g")))
  assert by_group["g/norm/x"] == 5 and by_group["g/scale/y"] == 0.25 and by_group["g/max_norm/x"] == NO_LIMIT
  assert by_group["g/max_norm"] == 3


def wrappers():
  tx = chained()
  multi = optax.multi_transform({"a": tx, "b": optax.sgd(1.0)}, {"w": "a", "b": "a"})
  inject = optax.inject_hyperparams(clipjax.clip_by_global_norm)(max_norm=6.5)
  return {
    "chain": (tx, "grad"),
    "named_chain": (optax.named_chain(("clip", tx), ("scale", optax.scale(-1.0))), "grad"),
    "masked": (optax.masked(tx, {"w": True, "b": True}), "grad"),
    "multi_transform": (multi, "grad_a"),
    "MultiSteps": (optax.MultiSteps(tx, 2), "grad"),
    "inject_hyperparams": (optax.chain(inject, optax.adam(1e-3)), "grad"),
    "apply_if_finite": (optax.apply_if_finite(tx, 3), "grad"),
    "nested": (
      optax.apply_if_finite(optax.masked(optax.chain(tx, optax.scale(1.0)), {"w": True, "b": True}), 3),
      "grad",
    ),
    "conditionally_transform": (optax.conditionally_transform(tx, lambda step: step >= 0), "grad"),
  }


@pytest.mark.parametrize("wrapper", sorted(wrappers()))
def test_found_in_every_wrapper_and_under_scan(wrapper):
  tx, name = wrappers()[wrapper]
  tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
  got = values(run(tx))
  np.testing.assert_allclose(got[f"{name}/norm"], 13, rtol=1e-6)
  assert got[f"{name}/steps"] == (1 if wrapper == "MultiSteps" else 2)
  _, norms = jax.lax.scan(
    lambda s, _: (lambda s: (s, clipjax.metrics(s)[f"{name}/norm"]))(tx.update(PARAMS, s, PARAMS)[1]),
    tx.init(PARAMS), None, length=4,
  )  # fmt: skip
  np.testing.assert_allclose(norms[-1], 13, rtol=1e-6)


def test_second_clip_of_a_name_and_labels():
  tx = optax.chain(clipjax.clip_by_global_norm(6.5), optax.scale(2.0), clipjax.clip_by_global_norm(1.0))
  got = values(run(tx))
  assert got["grad/max_norm"] == 6.5 and got["grad_2/max_norm"] == 1
  np.testing.assert_allclose(got["grad_2/norm"], 13, rtol=1e-6)
  both = optax.multi_transform({"a": chained(1.0), "b": chained(2.0)}, {"w": "a", "b": "b"})
  got = values(run(both))
  assert got["grad_a/norm"] == 5 and got["grad_b/norm"] == 12
  named = optax.chain(clipjax.clip_by_global_norm(1.0, name="raw"), clipjax.clip_by_global_norm(1.0, name="update"))
  assert {key.split("/")[0] for key in values(run(named))} == {"raw", "update"}


def test_nothing_to_find():
  assert clipjax.metrics(optax.adam(1e-3).init(PARAMS)) == {}
  assert clipjax.metrics(clipjax.clip_by_global_norm(1.0, track=False).init(PARAMS)) == {}
  assert clipjax.raise_if_nonfinite(optax.EmptyState()) is None


def test_check_names_a_norm_of_the_whole_that_no_leaf_explains():
  tx = clipjax.clip_by_leaf_norm(1.0)
  grads = {"a": jnp.array([3e38]), "b": jnp.array([3e38])}
  _, state = tx.update(grads, tx.init(grads))
  with pytest.raises(FloatingPointError) as error:
    clipjax.raise_if_nonfinite(state)
  assert str(error.value) == (
    "step 1 of 'grad' was not finite: norm inf, above the largest number of its dtype. 1 of 1 steps were not finite: "
    'lower the learning rate, look at the batch, or pass on_nonfinite="zero" to drop such steps.'
  )


def test_the_labels_of_a_state_are_shown_can_be_keys_and_equal_nothing_else():
  labels = clipjax.clip_by_leaf_norm(1.0).init({"w": jnp.ones(2), "b": jnp.ones(1)}).labels
  assert repr(labels) == "Labels('grad', 'leaf', 2 leaves)"
  other = clipjax.clip_by_leaf_norm(1.0).init({"w": jnp.ones(2), "v": jnp.ones(1)}).labels
  again = clipjax.clip_by_leaf_norm(2.0).init({"w": jnp.ones(2), "b": jnp.ones(1)}).labels
  assert again is not labels and {labels: 1}[again] == 1 and labels != other
  assert labels != "Labels('grad', 'leaf', 2 leaves)"


def test_under_vmap():
  tx = clipjax.clip_by_leaf_norm(1.0)
  grads = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 0 * x]), PARAMS)
  _, state = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(grads))
  got = clipjax.metrics(state, per_leaf=True)
  np.testing.assert_allclose(got["grad/norm"], [13, 26, 0], rtol=1e-6)
  np.testing.assert_allclose(got["grad/norm/w"], [5, 10, 0], rtol=1e-6)
  np.testing.assert_allclose(got["grad/scale"], [1 / 12, 1 / 24, 1], rtol=1e-6)


def test_flax_nnx_optimizer():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.chain(clipjax.clip_by_leaf_norm(0.1), optax.adam(1e-3)), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
    optimizer.update(model, grads)

  for _ in range(2):
    step(model, optimizer, jnp.ones((4, 3)))
  got = values(optimizer, per_leaf=True)
  assert got["grad/steps"] == 2 and got["grad/norm/kernel"] > 0.1 and got["grad/norm/bias"] > 0.1
  np.testing.assert_allclose(got["grad/norm_clipped"], 0.1 * np.sqrt(2), rtol=1e-6)
  assert values(optimizer.opt_state, per_leaf=True) == got
  clipjax.raise_if_nonfinite(optimizer)


def test_flax_linen_train_state():
  state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=chained())
  assert values(state.apply_gradients(grads=PARAMS))["grad/norm"] == 13


def test_equinox_model():
  model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
  tx = optax.chain(clipjax.clip_by_leaf_norm(1e-3), optax.adam(1e-3))
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def step(model, state):
    grads = eqx.filter_grad(lambda m: jnp.square(m(jnp.ones(2))).sum())(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state

  for _ in range(2):
    model, state = step(model, state)
  got = values(state, per_leaf=True)
  assert got["grad/steps"] == 2
  assert "grad/norm/layers/0/weight" in got


def test_flax_serialization_brings_the_names_back():
  tx = optax.chain(clipjax.clip_by_leaf_norm(1.0), optax.adam(1e-3))
  state = run(tx)
  restored = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert values(restored, per_leaf=True) == values(state, per_leaf=True)


def test_orbax_saves_and_restores_every_state(tmp_path):
  by_group = clipjax.clip_by_group_norm({"x": None, "y": 1.0}, {"w": "x", "b": "y"})
  clips = [clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(1.0), clipjax.clip_by_value(1.0), by_group]
  for i, clip in enumerate([*clips, clipjax.zclip(), clipjax.autoclip(window=5), clipjax.adagc()]):
    tx = clipjax.skip_steps(optax.chain(clip, optax.adam(1e-3)), norm_rule=clipjax.rules.rolling_sigma(window=4))
    state = run(tx)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / str(i), state)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(tmp_path / str(i), tx.init(PARAMS))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert values(restored, per_leaf=True) == values(state, per_leaf=True)
    jax.jit(tx.update)(PARAMS, restored, PARAMS)


def test_two_names_share_no_compilation():
  read = jax.jit(clipjax.metrics)
  read(clipjax.clip_by_global_norm(1.0, name="a").init({}))
  assert "b/norm" in read(clipjax.clip_by_global_norm(1.0, name="b").init(PARAMS))


def test_optax_tree_tools():
  tx = chained()
  state = run(tx)
  assert optax.tree.get(state, "norm") == 13
  assert optax.tree.get(optax.tree.set(state, norm=jnp.float32(1.0)), "norm") == 1
  specs = optax.tree.map_params(
    tx, lambda _, spec: spec, state, {"w": "W", "b": "B"}, transform_non_params=lambda _: None
  )  # fmt: skip
  assert specs[1][0].mu == {"w": "W", "b": "B"} and specs[0].norm is None


def test_export_of_a_step_round_trips():
  tx = clipjax.clip_by_leaf_norm(6.0)
  state = tx.init(PARAMS)
  exported = jax.export.export(jax.jit(tx.update))(PARAMS, state)
  again = jax.export.deserialize(exported.serialize())
  updates, after = again.call(PARAMS, state)
  np.testing.assert_allclose(updates["b"], [6.0], rtol=1e-6)
  assert after.labels.leaves == ("b", "w")


def test_names_of_leaves():
  a = jnp.ones(1)
  names = clipjax.clip_by_leaf_norm(1.0).init({"x": [a, (a, {"y/z": a})], "x/1": {"0": a}, "v": None}).labels.leaves
  assert names == ("x/0", "x/1/0", "x/1/1/y/z", "x/1/0_2")
  assert clipjax.clip_by_leaf_norm(1.0).init(a).labels.leaves == (".",)


def test_check_names_leaves_groups_and_counts():
  bad = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.array([jnp.inf])}
  end = 'lower the learning rate, look at the batch, or pass on_nonfinite="zero" to drop such steps.'

  def text(tx, *grads):
    state = tx.init(PARAMS)
    for g in grads:
      _, state = tx.update(g, state)
    with pytest.raises(FloatingPointError) as error:
      clipjax.raise_if_nonfinite(state)
    return str(error.value)

  assert text(clipjax.clip_by_global_norm(1.0), PARAMS, bad) == (
    f"step 2 of 'grad' was not finite: norm nan, first in leaf 'w'. 1 of 2 steps were not finite: {end}"
  )
  assert text(clipjax.clip_by_leaf_norm(1.0), bad) == (
    f"step 1 of 'grad' was not finite: norm nan, in leaf 'b', 'w'. 1 of 1 steps were not finite: {end}"
  )
  assert text(clipjax.clip_by_group_norm(1.0, {"w": "x", "b": "y"}, name="g"), {**bad, "b": PARAMS["b"]}) == (
    f"step 1 of 'g' was not finite: norm nan, in group 'x'. 1 of 1 steps were not finite: {end}"
  )
  assert text(clipjax.clip_by_global_norm(lambda _: jnp.nan), PARAMS) == (
    f"step 1 of 'grad' was not finite: norm 13, threshold nan. 1 of 1 steps were not finite: {end}"
  )
  tx = clipjax.clip_by_global_norm(1.0)
  _, state = tx.update(bad, tx.init(PARAMS))
  _, state = tx.update(PARAMS, state)
  assert clipjax.raise_if_nonfinite(state) is None


def test_metrics_inside_jit_and_states_pickle():
  state = run(chained())
  assert jax.jit(clipjax.metrics)(state)["grad/norm"] == 13
  import pickle  # noqa: PLC0415

  again = pickle.load(io.BytesIO(pickle.dumps(jax.device_get(state))))
  assert jax.tree.structure(again) == jax.tree.structure(state)
