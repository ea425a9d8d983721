"""metrics and check: what they find, in every wrapper, and what they call it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import through_flax, through_orbax
from flax import nnx
from helpers import NO_LIMIT

import clipjax

PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
ONES = [{"w": jnp.array([n, 0.0]), "b": jnp.zeros(1)} for n in (1.0, 20.0, jnp.nan, 10.0)]  # By their norms.
KEYS = ("norm", "norm_clipped", "max_norm", "scale", "clip_fraction", "clipped_steps", "nonfinite_steps", "steps")

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Adam and the wrappers of Optax need it.


def chained(max_norm=6.5):
  return optax.chain(clipjax.clip_by_global_norm(max_norm), optax.adam(1e-3))


def run(tx, *grads):
  """The state after some gradients, of the size of the parameters without any."""
  state = tx.init(PARAMS)
  for g in grads or (PARAMS, PARAMS):
    _, state = tx.update(g, state, PARAMS)
  return state


def values(state, **options):
  return {key: float(value) for key, value in clipjax.metrics(state, **options).items()}


# Keys and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("state", "want"),
  [
    (lambda: chained().init(PARAMS), (0, 0, NO_LIMIT, 1, 0, 0, 0, 0)),
    (lambda: run(chained()), (13, 6.5, 6.5, 0.5, 1, 2, 0, 2)),
    # A nonfinite step and one at the limit count as steps, not as clipped ones.
    (lambda: run(clipjax.clip_by_global_norm(10.0), *ONES), (10, 10, 10, 1, 0.25, 1, 1, 4)),
  ],
)
def test_keys_and_values_of_a_global_clip(state, want):
  got = clipjax.metrics(state())
  assert tuple(got) == tuple(f"grad/{key}" for key in KEYS)
  assert all(isinstance(v, jax.Array) and v.shape == () for v in got.values())
  np.testing.assert_allclose(list(got.values()), want, rtol=1e-6)


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


def test_second_clip_of_a_name_and_labels():
  got = values(run(optax.chain(clipjax.clip_by_global_norm(6.5), optax.scale(2.0), clipjax.clip_by_global_norm(1.0))))
  assert got["grad/max_norm"] == 6.5 and got["grad_2/max_norm"] == 1
  np.testing.assert_allclose(got["grad_2/norm"], 13, rtol=1e-6)
  got = values(run(optax.multi_transform({"a": chained(1.0), "b": chained(2.0)}, {"w": "a", "b": "b"})))
  assert got["grad_a/norm"] == 5 and got["grad_b/norm"] == 12
  named = optax.chain(clipjax.clip_by_global_norm(1.0, name="raw"), clipjax.clip_by_global_norm(1.0, name="update"))
  assert {key.split("/")[0] for key in values(run(named))} == {"raw", "update"}


def test_a_label_that_is_also_the_name_of_a_leaf_does_not_hide_its_norm():
  params = {"b": jnp.full(4, 1.0), "bias": jnp.full(3, 2.0), "w": jnp.ones(1)}
  first, whole = lambda path, leaf: path[0], lambda path, leaf: path
  for order in (1, -1):
    tx = optax.chain(*[clipjax.watch(), clipjax.clip_by_group_norm(9.0, first)][::order])
    got = values(tx.update(params, tx.init(params))[1], per_leaf=True)
    assert (got["grad/norm/b"], got["grad_group/norm/b"]) == (2.0, 4.0)
    assert "grad_group/scale/w" in got and "grad/scale/b" not in got
  # A group that is that leaf alone is no clash, and without a watch there is none.
  for tx in (
    optax.chain(clipjax.watch(), clipjax.clip_by_group_norm(9.0, whole)),
    clipjax.clip_by_group_norm(9.0, first),
  ):
    assert "grad/scale/b" in clipjax.metrics(tx.init(params))


def test_nothing_to_find():
  assert clipjax.metrics(optax.adam(1e-3).init(PARAMS)) == {}
  assert clipjax.metrics(clipjax.clip_by_global_norm(1.0, track=False).init(PARAMS)) == {}
  assert clipjax.raise_if_nonfinite(optax.EmptyState()) is None


# In every place ------------------------------------------------------------------------------------------------------


def wrappers():
  tx = chained()
  everything = {"w": True, "b": True}
  inject = optax.inject_hyperparams(clipjax.clip_by_global_norm)(max_norm=6.5)
  return {
    "named_chain": optax.named_chain(("clip", tx), ("scale", optax.scale(-1.0))),
    "masked": optax.masked(tx, everything),
    "multi_transform": optax.multi_transform({"a": tx, "b": optax.sgd(1.0)}, {"w": "a", "b": "a"}),
    "MultiSteps": optax.MultiSteps(tx, 2),
    "inject_hyperparams": optax.chain(inject, optax.adam(1e-3)),
    "nested": optax.apply_if_finite(optax.masked(optax.chain(tx, optax.scale(1.0)), everything), 3),
    "conditionally_transform": optax.conditionally_transform(tx, lambda step: step >= 0),
  }


@pytest.mark.parametrize("wrapper", sorted(wrappers()))
def test_found_in_every_wrapper_and_under_scan(wrapper):
  tx, name = wrappers()[wrapper], "grad_a" if wrapper == "multi_transform" else "grad"

  def step(state, _):
    _, state = tx.update(PARAMS, state, PARAMS)
    return state, clipjax.metrics(state)[f"{name}/norm"]

  state, norms = jax.lax.scan(step, tx.init(PARAMS), None, length=2)
  np.testing.assert_allclose(norms[-1], 13, rtol=1e-6)
  assert values(state)[f"{name}/steps"] == (1 if wrapper == "MultiSteps" else 2)


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
  optimizer = nnx.Optimizer(model, clipjax.clip_by_leaf_norm(0.1), wrt=nnx.Param)
  optimizer.update(model, nnx.grad(lambda m: (m(jnp.ones((4, 3))) ** 2).mean())(model))
  got = values(optimizer, per_leaf=True)
  assert got["grad/steps"] == 1 and got["grad/norm/kernel"] > 0.1 and got["grad/norm/bias"] > 0.1
  np.testing.assert_allclose(got["grad/norm_clipped"], 0.1 * np.sqrt(2), rtol=1e-6)
  assert values(optimizer.opt_state, per_leaf=True) == got
  clipjax.raise_if_nonfinite(optimizer)


def test_checkpoints_bring_the_names_back(tmp_path):
  by_group = clipjax.clip_by_group_norm({"x": None, "y": 1.0}, {"w": "x", "b": "y"})
  tx = clipjax.skip_steps(optax.chain(by_group, clipjax.autoclip(window=5), clipjax.adagc()))
  fresh, update = tx.init(PARAMS), jax.jit(tx.update)
  _, state = update(PARAMS, fresh, PARAMS)
  for way in (through_orbax, through_flax):
    folder = tmp_path / way.__name__
    folder.mkdir()
    restored = way(state, fresh, folder)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert values(restored, per_leaf=True) == values(state, per_leaf=True)
    update(PARAMS, restored, PARAMS)


def test_two_names_share_no_compilation():
  read = jax.jit(clipjax.metrics)
  read(clipjax.clip_by_global_norm(1.0, name="a").init({}))
  assert "b/norm" in read(clipjax.clip_by_global_norm(1.0, name="b").init(PARAMS))


# raise_if_nonfinite --------------------------------------------------------------------------------------------------

BAD = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.array([jnp.inf])}
HUGE = {"w": jnp.array([3e38, 0.0]), "b": jnp.array([3e38])}
BY_GROUP = clipjax.clip_by_group_norm(1.0, {"w": "x", "b": "y"}, name="g")


@pytest.mark.parametrize(
  ("tx", "grads", "what", "bad_of_all"),
  [
    (clipjax.clip_by_global_norm(1.0), (PARAMS, BAD), "step 2 of 'grad': norm nan, first in leaf 'w'", "1 of 2"),
    (clipjax.clip_by_leaf_norm(1.0), (BAD,), "step 1 of 'grad': norm nan, in leaf 'b', 'w'", "1 of 1"),
    (BY_GROUP, ({**BAD, "b": PARAMS["b"]},), "step 1 of 'g': norm nan, in group 'x'", "1 of 1"),
    (clipjax.clip_by_global_norm(lambda _: jnp.nan), (PARAMS,), "step 1 of 'grad': norm 13, threshold nan", "1 of 1"),
    (
      clipjax.clip_by_leaf_norm(1.0), (HUGE,),
      "step 1 of 'grad': norm inf, above the largest number of its dtype", "1 of 1",
    ),
  ],
)  # fmt: skip
def test_check_names_leaves_groups_and_counts(tx, grads, what, bad_of_all):
  state = run(tx, *grads)
  with pytest.raises(FloatingPointError) as error:
    clipjax.raise_if_nonfinite(state)
  remedy = "lower the learning rate, look at the batch, or wrap the optimizer in clipjax.skip_steps to drop such steps."
  if "threshold" in what:
    remedy = "check the schedule or rule that gives it."
  assert str(error.value) == (
    f"{what.replace(':', ' was not finite:', 1)}. {bad_of_all} steps were not finite: {remedy}"
  )
  _, state = tx.update(PARAMS, state)
  if "threshold" not in what:
    assert clipjax.raise_if_nonfinite(state) is None
