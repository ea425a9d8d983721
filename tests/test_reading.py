"""Readers only read: under transfer guards, under the checks for NaN and inf, wherever the arrays lie."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import NO_LIMIT, cases
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from processes import outputs_of_processes

import clipjax

GUARD = "disallow_explicit"  # It forbids whatever "disallow" forbids, and jax.device_put too.
PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}

TRANSFORMS = {
  "global": lambda: clipjax.clip_by_global_norm(6.5),
  "leaf": lambda: clipjax.clip_by_leaf_norm(6.0),
  "group": lambda: clipjax.clip_by_group_norm({"x": 2.0, "y": None}, {"w": "x", "b": "y"}),
  "rms": lambda: clipjax.clip_by_block_rms(6.0),
  "value": lambda: clipjax.clip_by_value(5.0),
  "rule": clipjax.adagc,
  "watch": lambda: clipjax.watch(history=3),
  "watch of the whole": lambda: clipjax.watch(per_leaf=False, name="all"),
  "skip": lambda: clipjax.skip_steps(clipjax.clip_by_leaf_norm(6.0), norm_rule=20.0),
}
TRANSFORMS["all of them"] = lambda: optax.chain(*[make() for name, make in TRANSFORMS.items() if " " not in name])


def state_of(tx, grads=PARAMS, steps=2):
  state = tx.init(grads)
  for _ in range(steps):
    _, state = tx.update(grads, state, grads)
  return state


def put(state, *devices):
  """The state on a device, or on several of them, whole on each."""
  mesh = Mesh(np.array([jax.devices()[i] for i in devices]), ("x",))
  return jax.device_put(state, NamedSharding(mesh, PartitionSpec()) if len(devices) > 1 else mesh.devices[0])


PLACES = {
  "not committed": lambda state: state,
  "committed": lambda state: put(state, 0),
  "on another device": lambda state: put(state, 3),
  "on every device": lambda state: put(state, *range(8)),
}


@pytest.mark.parametrize(
  ("place", "entry"), [*((place, 4.0) for place in PLACES), ("not committed", jnp.nan), ("not committed", jnp.inf)]
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_metrics_moves_nothing_and_a_nan_or_inf_is_no_error(name, place, entry):
  state = PLACES[place](state_of(TRANSFORMS[name](), {**PARAMS, "w": jnp.array([3.0, entry])}))
  for per_leaf in (True, False):
    with jax.transfer_guard(GUARD), jax.debug_nans(entry != 4.0), jax.debug_infs(entry != 4.0):
      got = clipjax.metrics(state, per_leaf=per_leaf)
    want = jax.jit(clipjax.metrics, static_argnames="per_leaf")(state, per_leaf=per_leaf)
    assert set(got) == set(want) and all(np.isfinite(x) for x in got.values()) == (entry == 4.0)
    for key, value in got.items():
      assert isinstance(value, jax.Array) and value.shape == () and value.dtype == want[key].dtype
      np.testing.assert_array_equal(value, want[key], err_msg=key)


@pytest.mark.parametrize("name", cases(TRANSFORMS, slow=["rms", "value", "leaf"]))
def test_metrics_inside_jit_and_of_many_models_moves_nothing(name):
  tx = TRANSFORMS[name]()
  grads = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)
  state = jax.vmap(lambda g: state_of(tx, g))(grads)
  with jax.transfer_guard(GUARD):
    eager = clipjax.metrics(state, per_leaf=True)
    jitted = jax.jit(lambda s: clipjax.metrics(s, per_leaf=True))(state)
    mapped = jax.jit(jax.vmap(lambda s: clipjax.metrics(s, per_leaf=True)))(state)
  one = clipjax.metrics(jax.tree.map(lambda x: x[1], state), per_leaf=True)
  assert set(eager) == set(jitted) == set(mapped) == set(one)
  for key, value in eager.items():
    assert value.shape == (3,)
    np.testing.assert_array_equal(value, jitted[key], err_msg=key)
    np.testing.assert_array_equal(value, mapped[key], err_msg=key)
    np.testing.assert_array_equal(value[1], one[key], err_msg=key)


@pytest.mark.parametrize("n", [1, 2, 17, 70])
def test_every_leaf_has_its_own_number(n):
  grads = {f"leaf{i:03}": jnp.array([1.0 + i]) for i in range(n)}
  state = state_of(clipjax.clip_by_leaf_norm(2.0), grads, steps=1)
  with jax.transfer_guard(GUARD):
    got = clipjax.metrics(state, per_leaf=True)
  assert [got[f"grad/norm/leaf{i:03}"] for i in range(n)] == [1.0 + i for i in range(n)]
  assert len(got) == 8 + 3 * n


def test_metrics_of_no_leaves():
  got = clipjax.metrics(clipjax.clip_by_leaf_norm(2.0).init({}), per_leaf=True)
  assert len(got) == 8 and got["grad/scale"] == 1 and got["grad/max_norm"] == NO_LIMIT


def test_metrics_of_the_optimizer_of_flax_nnx_moves_nothing():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.chain(clipjax.watch(), clipjax.clip_by_leaf_norm(1.0)), wrt=nnx.Param)
  with jax.transfer_guard(GUARD):
    got = clipjax.metrics(optimizer, per_leaf=True)
  assert "grad/ratio/kernel" in got and "grad/scale/bias" in got


def test_states_may_lie_on_different_devices():
  first, second, _ = state_of(optax.chain(clipjax.watch(), clipjax.clip_by_leaf_norm(1.0), optax.scale(1.0)))
  got = clipjax.metrics((put(first, 1), put(second, 2), optax.EmptyState()), per_leaf=True)
  assert got["grad/ratio/w"].devices() == {jax.devices()[1]} and got["grad/scale/w"].devices() == {jax.devices()[2]}
  # Even the fields of one: what is computed of each is a program of its own.
  scattered = second._replace(norms=put(second.norms, 4), scale=put(second.scale, 5))
  assert clipjax.metrics(scattered, per_leaf=True)["grad/norm/b"] == 12


@pytest.mark.parametrize("name", TRANSFORMS)
def test_recorder_pushes_and_reads_without_an_implicit_transfer(name, tmp_path):
  state = state_of(TRANSFORMS[name]())
  loss = jnp.float32(0.5)
  with jax.transfer_guard("disallow"), clipjax.runs.Recorder(tmp_path / "run.jsonl", every=2) as recorder:
    for step in range(3):
      recorder.push(step, state, loss=loss, rate=0.1, params=PARAMS)
  run = clipjax.runs.read_run(tmp_path / "run.jsonl")
  assert run["loss"][-1] == 0.5 and any(key.endswith("/norm") for key in run.columns)


def test_the_other_readers_read_explicitly(monkeypatch):
  tx = optax.chain(clipjax.watch(history=3), clipjax.clip_by_global_norm(1.0))
  state = state_of(tx)
  reads = []
  get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: [reads.append(1), get(x)][1])
  with jax.transfer_guard("disallow"):
    clipjax.raise_if_nonfinite(state)
    assert len(reads) == 1
    steps, norms = state[0].last_norms()
  # A CPU never refuses to be read, so it is the call that tells.
  assert len(reads) == 2 and steps.tolist() == [1, 2] and norms.tolist() == [13, 13]


TWO_PROCESSES = """
  import os, sys

  address, processes, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // processes}"
  import jax, numpy as np, optax, clipjax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, num_processes=processes, process_id=rank)
  spread = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))

  def array(bad):
    x = np.arange(16.0, dtype=np.float32)
    x[3 if bad else 0] = np.nan if bad else 0
    return jax.make_array_from_callback((16,), spread, lambda i: x[i])

  inside = optax.chain(clipjax.clip_by_leaf_norm(1.0), optax.sgd(0.1))
  tx = optax.MultiSteps(clipjax.skip_steps(inside), 1)
  params = {"a": array(False), "b": array(False)}
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)

  def said():
    try:
      clipjax.raise_if_nonfinite(state)
    except FloatingPointError as error:
      return str(error)

  for bad in (False, True):
    updates, state = update({"a": array(False), "b": array(bad)}, state, params)
    with jax.transfer_guard("disallow"):
      seen = clipjax.metrics(state, per_leaf=True)
    print({key: round(float(value), 3) for key, value in seen.items() if "norm/" in key})
    if rank == 0:  # One process alone may ask: nothing here waits for the others.
      print(said())
"""


def test_two_processes_read_and_one_of_them_may_read_alone(tmp_path):
  first, second = outputs_of_processes(textwrap.dedent(TWO_PROCESSES), 2, tmp_path / "two")
  norms = "{'grad/norm/a': 35.214, 'grad/norm/b': 35.214, 'grad/max_norm/a': 1.0, 'grad/max_norm/b': 1.0}"
  assert second.splitlines() == [norms, norms]
  before, nothing, after, text = first.splitlines()
  assert (before, nothing, after) == (norms, "None", norms)
  assert text.startswith("The accumulator of `optax.MultiSteps` is nonfinite and stays nonfinite")
