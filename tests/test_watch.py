"""watch: what it measures against numpy, what it keeps, and what it costs beside a clip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, oracle_norm, random_leaves, steps_of

import clipjax
from clipjax.transforms.watch import LOOK_EVERY, _zeros_and_nonfinite

GRADS = {"w": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "b": jnp.array([12.0]), "h": jnp.array([0.0, 84.0], jnp.bfloat16)}
PARAMS = {"w": jnp.full((2, 2), 2.0), "b": jnp.array([0.0]), "h": jnp.array([3.0, 4.0], jnp.bfloat16)}


def run(tx, grads, params=None, steps=1):
  return steps_of(tx, [grads] * steps, params)[-1][1]


def values(state):
  return {key: np.asarray(value).item() for key, value in clipjax.metrics(state, per_leaf=True).items()}


def test_it_measures_what_numpy_measures_and_changes_nothing(x64):
  tx = clipjax.watch()
  updates, state = jax.jit(tx.update)(GRADS, tx.init(GRADS), PARAMS)
  assert_bits_equal(updates, GRADS)
  got = values(state)
  dtype = jnp.float64 if x64 else jnp.float32
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(dtype), jnp.dtype("int32"), jnp.dtype("bool")}
  want = {
    "norm": 85.0, "norm/w": 5.0, "norm/b": 12.0, "norm/h": 84.0,
    "zero_fraction": 3 / 7, "param_norm": oracle_norm(PARAMS), "ratio": 85 / oracle_norm(PARAMS),
    "ratio/w": 5 / 4, "ratio/b": 0.0, "ratio/h": 84 / 5,
    "nonfinite/w": 0, "nonfinite/b": 0, "nonfinite/h": 0, "nonfinite_steps": 0, "steps": 1,
    "worst_norm": 85.0, "worst_step": 1, "worst_norm/w": 5.0, "worst_norm/b": 12.0, "worst_norm/h": 84.0,
  }  # fmt: skip
  assert got.keys() == {f"grad/{key}" for key in want}
  for key, value in want.items():
    np.testing.assert_allclose(got[f"grad/{key}"], value, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("per_leaf", [True, False])
def test_norms_are_right_at_every_magnitude(magnitude, per_leaf):
  leaves = random_leaves(7, magnitude=magnitude)
  state = run(clipjax.watch(per_leaf=per_leaf), leaves)
  np.testing.assert_allclose(state.norm, oracle_norm(leaves), rtol=1e-6)
  if per_leaf:
    np.testing.assert_allclose(state.norms, [oracle_norm(x) for x in leaves], rtol=1e-6)
  else:
    assert (state.norms, state.nonfinite, state.param_norms, state.worst_norms) == ((),) * 4


def test_entries_that_are_not_finite_are_counted_by_leaf_and_named():
  bad = {"w": jnp.array([jnp.inf, 1.0, -jnp.inf]), "b": jnp.array([0.0, jnp.nan]), "c": jnp.array([1.0])}
  tx = clipjax.watch()
  state = run(tx, jax.tree.map(jnp.ones_like, bad), steps=2)
  _, state = jax.jit(tx.update)(bad, state)
  assert state.labels.leaves == ("b", "c", "w")
  np.testing.assert_array_equal(state.nonfinite, [1, 0, 2])
  assert state.nonfinite_steps == 1 and not state.finite
  np.testing.assert_allclose(state.zero_fraction, 1 / 6, rtol=1e-6)  # It looks at a step that is not finite.
  with pytest.raises(FloatingPointError, match=r"step 3 of 'grad' was not finite: norm nan, in leaf 'b', 'w'\. 1 of 3"):
    clipjax.raise_if_nonfinite(state)
  _, state = tx.update(jax.tree.map(jnp.ones_like, bad), state)
  np.testing.assert_array_equal(state.nonfinite, [0, 0, 0])
  clipjax.raise_if_nonfinite(state)


def test_without_leaves_check_says_that_much():
  state = run(clipjax.watch(per_leaf=False), jnp.array([jnp.inf]))
  with pytest.raises(FloatingPointError, match=r"step 1 of 'grad' was not finite: norm inf, somewhere\. 1 of 1 steps"):
    clipjax.raise_if_nonfinite(state)


def test_parameters_and_zeros_are_looked_at_every_so_many_steps():
  tx = clipjax.watch()
  state = tx.init(jnp.zeros(2))
  for i in range(1, LOOK_EVERY + 2):
    grad = jnp.array([float(i), 0.0 if i % 2 else 1.0])
    _, state = tx.update(grad, state, jnp.array([0.0, float(i)]))
    seen = 1 if i <= LOOK_EVERY else LOOK_EVERY + 1
    assert state.param_norm == seen and state.zero_fraction == 0.5
    np.testing.assert_allclose(values(state)["grad/ratio/."], state.norm / seen, rtol=1e-6)


@pytest.mark.parametrize("norms", [[1, 5, 3], [5, 1, 2], [1, np.inf, 9, np.nan], [np.nan, np.inf, 3], [0, 0]])
def test_the_worst_step_is_the_first_that_is_not_finite_else_the_largest(norms):
  grads = [{"a": jnp.array([norm], jnp.float32), "b": jnp.array([0.25])} for norm in norms]
  _, state = steps_of(clipjax.watch(), grads)[-1]
  bad = [i for i, norm in enumerate(norms) if not np.isfinite(norm)]
  worst = bad[0] if bad else int(np.argmax(norms))
  assert state.worst_step == worst + 1
  np.testing.assert_array_equal(state.worst_norms, np.float32([norms[worst], 0.25]))


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 11])
def test_the_history_holds_the_last_norms_in_order(steps):
  tx = clipjax.watch(history=4)
  grads = jnp.arange(1.0, steps + 1)[:, None]
  state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(jnp.zeros(1)), grads)
  want = np.arange(max(steps - 4, 0) + 1, steps + 1)
  np.testing.assert_array_equal(state.last_norms(), [want, want])
  assert run(clipjax.watch(), jnp.ones(2)).last_norms()[0].shape == (0,)


def test_it_goes_together_with_a_clip_of_its_name_and_the_first_speaks():
  grads = {"w": jnp.array([3.0, 4.0])}
  for order in (0, 1):
    pair = [clipjax.watch(), clipjax.clip_by_global_norm(1.0)][:: 1 - 2 * order]
    state = run(optax.chain(*pair), grads)
    got = values(state)
    assert got["grad/norm"] == 5 and got["grad/max_norm"] == 1 and got["grad/zero_fraction"] == 0
    np.testing.assert_allclose(got["grad/norm/w"], [5.0, 1.0][order], rtol=1e-6)
  twice = values(run(optax.chain(clipjax.watch(), clipjax.watch(), clipjax.watch(name="update")), grads))
  assert {"grad/norm", "grad_2/norm", "update/norm"} <= twice.keys()


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("wrap", [
  clipjax.skip_steps, lambda tx: optax.apply_if_finite(tx, 5), lambda tx: optax.masked(tx, dict.fromkeys(GRADS, True)),
  lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
])  # fmt: skip
def test_it_passes_through_the_wrappers_of_optax(wrap):
  tx = optax.chain(clipjax.watch(history=3), clipjax.clip_by_global_norm(1.0))
  grads = jax.tree.map(lambda x: x.astype(jnp.float32), GRADS)
  np.testing.assert_allclose(values(run(wrap(tx), grads, PARAMS, steps=2))["grad/norm"], 85.0, rtol=1e-6)


def test_under_vmap_and_map_params():
  tx = clipjax.watch(history=3)
  batch = jax.tree.map(lambda x: jnp.stack([x, x * jnp.array(2, x.dtype)]), GRADS)
  _, states = jax.vmap(tx.update)(batch, jax.vmap(tx.init)(batch), batch)
  np.testing.assert_allclose(clipjax.metrics(states, per_leaf=True)["grad/norm/w"], [5.0, 10.0])
  with pytest.raises(
    ValueError, match=r"`last_norms` needs the state of one model, got a state with leading axes \(2,\)"
  ):
    states.last_norms()
  state = tx.init(GRADS)
  assert optax.tree.map_params(tx, lambda x: x + 1, state).labels == state.labels


@pytest.mark.one_version
def test_odd_trees():
  for tree in ({}, {"a": None}, {"a": jnp.zeros((0, 3))}, {"a": jnp.zeros(2, jnp.int32)}):
    tx = clipjax.watch(history=2)
    state = tx.init(tree)
    if not any(x.dtype == jnp.int32 for x in jax.tree.leaves(tree)):
      _, state = tx.update(tree, state)
      assert state.norm == 0 and state.zero_fraction == 0
  complex_ = {"z": jnp.array([3 + 4j, 0j]), "f8": jnp.array([1.0, 0.0], jnp.float8_e4m3fn)}
  state = run(clipjax.watch(), complex_)
  np.testing.assert_allclose(state.norms, [1.0, 5.0])
  np.testing.assert_allclose(state.zero_fraction, 0.5)


def test_more_zeros_than_an_int32_counts():
  counts = jax.jit(lambda zero: _zeros_and_nonfinite(jnp.full((50_000, 50_000), zero)))  # Fused: nothing that large.
  assert [float(n) for n in counts(jnp.float32(0))] == [2.5e9, 0]


def test_no_nan_for_finite_input_under_debug_nans():
  with jax.debug_nans(True):
    zeros = [jax.tree.map(jnp.zeros_like, tree) for tree in (GRADS, PARAMS)]
    assert values(run(clipjax.watch(history=2), *zeros, steps=2))["grad/ratio"] == 0
