"""Recorder with arrays over several devices, and with the states of several models.

A file of its own: where a test names a mesh, none of its file has programs of earlier runs (see `conftest`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recording import PARAMS, message_of, recorded, rows_of, train, watched

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")


def mesh_of(axis_type):
  return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def test_sharded_over_devices(path):
  mesh = mesh_of(jax.sharding.AxisType.Auto)
  over = jax.NamedSharding(mesh, jax.P("data"))
  params = jax.device_put({"w": jnp.arange(1.0, 17.0), "b": jnp.ones(8)}, over)
  tx = watched(history=2)
  step = jax.jit(tx.update, donate_argnums=1)
  state = jax.device_put(tx.init(params), jax.NamedSharding(mesh, jax.P()))
  with clipjax.runs.Recorder(path, every=2) as recorder:
    for number in range(1, 6):
      _, state = step({key: x * number for key, x in params.items()}, state, params)
      recorder.push(number, state, loss=state[0].norm * 2, params=params)
  run = clipjax.runs.read_run(path)
  want = np.sqrt(np.sum(np.arange(1.0, 17) ** 2) + 8) * run.steps
  np.testing.assert_allclose(run["grad/norm"], want, rtol=1e-6)
  np.testing.assert_allclose(run["loss"], 2 * want, rtol=1e-6)
  assert run.parameters == 24 and run.weights[2].sum(axis=1).tolist() == [3] * 3  # Of the first device.


@pytest.mark.parametrize("kind", ["spread", "other"])
def test_state_and_loss_on_different_devices(path, kind):
  spread = jax.NamedSharding(mesh_of(jax.sharding.AxisType.Auto), jax.P())
  place = spread if kind == "spread" else jax.devices()[1]

  def pushes():
    for step, state in train(watched(), 3):
      yield step, jax.device_put(state, place), {"loss": jax.device_put(jnp.float32(step), jax.devices()[2])}

  run = recorded(path, pushes())
  assert run["loss"].tolist() == [1, 2, 3] and run["grad/norm"].tolist() == [13, 26, 39]


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_parameters_under_a_mesh_and_a_transfer_guard(path, axis_type):
  mesh = mesh_of(axis_type)
  w = jax.device_put(jnp.ones((16, 4)), jax.NamedSharding(mesh, jax.P("data")))
  params, tx = {"w": w, "large": jnp.ones(70_000)}, clipjax.clip_by_global_norm(1.0)
  state = tx.init(params)
  with clipjax.runs.Recorder(path, every=1) as recorder:
    with jax.set_mesh(mesh):
      recorder.push(0, state, params=params)
      recorder.push(1, state, params=params)
    with jax.transfer_guard("disallow"):
      recorder.push(2, state, params=params)
  assert clipjax.runs.read_run(path).weights[2].sum(axis=1).tolist() == [8 + 70_000] * 3


def test_state_of_several_models(path):
  states = jax.vmap(watched().init)(jax.tree.map(lambda x: jnp.stack([x] * 4), PARAMS))
  with clipjax.runs.Recorder(path) as recorder:
    for _ in range(2):  # The second time, when one of them was pushed.
      assert message_of(ValueError, recorder.push, 1, states) == (
        "`opt_state` must belong to one model, got 'grad' with leading axes (4,), as under vmap or pmap: push one of "
        "them, jax.tree.map(lambda x: x[0], opt_state)."
      )
      recorder.push(1, jax.tree.map(lambda x: x[0], states), loss=1.0)
  assert len(rows_of(path)) == 1
