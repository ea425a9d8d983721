"""`Run.from_arrays`: the arrays of a scan are judged, give a suggestion and are drawn like a recorded run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recording import message_of

import clipjax
from clipjax.runs import Run

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"layers": [{"w": jnp.full((3, 3), 0.5), "b": jnp.zeros(3)} for _ in range(11)]}
TX = optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(1.0), optax.adam(1e-2))


def loss_of(params, x):
  for layer in params["layers"]:
    x = jnp.tanh(x @ layer["w"] + layer["b"])
  return jnp.mean((x - 1) ** 2)


def update(carry, x):
  """A step as PureJaxRL has it: a function of a scan that returns its metrics."""
  params, state = carry
  loss, grads = jax.value_and_grad(loss_of)(params, x)
  updates, state = TX.update(grads, state, params)
  return (optax.apply_updates(params, updates), state), {"loss": loss, **clipjax.metrics(state, per_leaf=True)}


def scanned(data):
  return jax.lax.scan(update, (PARAMS, TX.init(PARAMS)), data)[1]


@pytest.fixture(scope="module")
def arrays():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return jax.device_get(jax.jit(scanned)(jax.random.normal(jax.random.key(0), (60, 4, 3))))


def test_a_scan_is_a_run(arrays):
  run = Run.from_arrays(arrays)
  assert run.steps.tolist() == list(range(1, 61)) and run.path == "" and run.superseded == 0
  names = [f"layers/{i}/{key}" for i in range(11) for key in ("b", "w")]  # 2 before 10.
  assert run.leaves == {"grad": tuple(names)}
  assert set(run.vectors) == {f"grad/{quantity}" for quantity in ("norm", "ratio", "nonfinite", "worst_norm")}
  assert not any("layers" in key for key in run.columns) and set(run.keys()) == set(arrays)
  for key, values in arrays.items():
    np.testing.assert_array_equal(run[key], values.astype(np.float64), err_msg=key)


def test_a_scan_is_judged_and_drawn_as_what_was_recorded(arrays, tmp_path):
  path = tmp_path / "run.jsonl"
  with clipjax.runs.Recorder(path) as recorder:
    carry, step = (PARAMS, TX.init(PARAMS)), jax.jit(update)
    for i, x in enumerate(jax.random.normal(jax.random.key(0), (60, 4, 3)), 1):
      carry, _ = step(carry, x)
      recorder.push(i, carry[1], loss=loss_of(carry[0], x))
  run, recorded = Run.from_arrays(arrays), clipjax.runs.read_run(path)
  np.testing.assert_allclose(run["grad/norm"], recorded["grad/norm"], rtol=1e-4)
  report = clipjax.runs.diagnose(run)
  assert {"norms", "clipped"} <= {finding.name for finding in report.findings} and report.steps == 60
  got, want = (clipjax.runs.suggest_max_norm(x, scale_free=True) for x in (run, recorded))  # Arrays tell no optimizer.
  assert got.max_norm == pytest.approx(want.max_norm, rel=1e-4)
  assert clipjax.runs.plot_norms(run).axes[0].get_ylabel() == "grad/norm"
  page = clipjax.runs.write_report(run, tmp_path / "page.html").read_text()
  assert "Layers over time" in page and "layers/10/w" in page and "<h1>Training run</h1>" in page


def test_nonfinite_numbers_are_flagged_and_their_leaf_named():
  run = Run.from_arrays(
    {
      "loss": [1.0, 0.5, float("nan")], "grad/norm": jnp.array([1.0, 2.0, jnp.inf], jnp.bfloat16),
      "grad/norm/b": np.array([1.0, 2.0, np.nan]), "grad/norm/a": [0, 0, 1], "grad/max_norm": [np.inf] * 3,
      "grad/nonfinite/b": [0, 0, 4],
    }, steps=np.array([10, 20, 50]),
  )  # fmt: skip
  assert {key: flag.tolist() for key, flag in run.flags.items()} == {
    "loss": [False, False, True], "grad/norm": [False, False, True], "grad/max_norm": [True] * 3,
  }  # fmt: skip
  np.testing.assert_array_equal(run["grad/norm"], [1, 2, np.nan])
  np.testing.assert_array_equal(run["grad/norm/b"], [1, 2, np.inf])
  np.testing.assert_array_equal(run.vectors["grad/nonfinite"][1], [[np.nan, 0], [np.nan, 0], [np.nan, 4]])
  messages = " ".join(finding.message for finding in clipjax.runs.diagnose(run).findings if finding.level == "FAIL")
  assert "at step 50; first in 'b'" in messages


def test_no_limit_in_a_state_is_inf_in_a_run():
  tx = clipjax.clip_by_global_norm(float("inf"))
  state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[1]
  run = Run.from_arrays({key: jnp.stack([value] * 3) for key, value in clipjax.metrics(state).items()})
  assert np.isnan(run["grad/max_norm"]).all() and run.flags["grad/max_norm"].all()


def test_runs_under_vmap_and_scans_in_scans_are_refused_with_the_way_out(arrays):
  remedy = (
    "for runs under vmap take one, jax.tree.map(lambda x: x[0], arrays); for a scan in a scan join the steps, "
    "jax.tree.map(lambda x: x.reshape(-1), arrays)."
  )
  rule = "`arrays` must be a dict of arrays of shape (steps,), got shape"
  both = jax.tree.map(lambda x: np.stack([x, 2 * x]), arrays)
  assert message_of(ValueError, Run.from_arrays, both) == f"{rule} (2, 60) at 'grad/clip_fraction': {remedy}"
  nested = jax.tree.map(lambda x: x.reshape(6, 10), arrays)
  assert message_of(ValueError, Run.from_arrays, nested) == f"{rule} (6, 10) at 'grad/clip_fraction': {remedy}"
  run = Run.from_arrays(jax.tree.map(lambda x: x.reshape(-1), nested), steps=range(100, 160))
  np.testing.assert_array_equal(run["grad/norm"], arrays["grad/norm"])
  assert run.steps[[0, -1]].tolist() == [100, 159]


RULE = "`arrays` must be a dict of arrays of shape (steps,), got"
RETURNED = "pass what the scan returned besides its carry."
WRONG = [
  (([1.0],), TypeError, f"{RULE} a list: {RETURNED}"),
  (({},), ValueError, f"{RULE} an empty dict: {RETURNED}"),
  (({"loss": []},), ValueError, f"{RULE} empty arrays: {RETURNED}"),
  (({3: [1.0]},), TypeError, f"{RULE} the key 3: use a string as the name of each array."),
  (({"loss": [1.0], "x": [1.0, 2.0]},), ValueError, f"{RULE} 1 steps of 'loss' and 2 of 'x': {RETURNED}"),
  (({"loss": jnp.float32(1)},), ValueError, f"{RULE} a scalar at 'loss': return it from each step of the scan."),
  (({"loss": [[1], [1, 2]]},), TypeError, f"{RULE} a list at 'loss': pass real numbers, outside jit."),
  (({"x": jnp.ones(2, jnp.complex64)},), TypeError, f"{RULE} complex64[2] at 'x': pass real numbers, outside jit."),
  (
    ({"step": [1]},), ValueError, f"{RULE} the key 'step', which means something else in a run: pass it as `steps`.",
  ),
  (({"leaf": [1]},), ValueError, f"{RULE} the key 'leaf', which means something else in a run: rename it."),
  (({"x": [1.0]}, [1.5]), TypeError, "`steps` must be whole numbers, got a list: pass the number of each step."),
  (
    ({"loss": [1.0]}, [1, 2]), ValueError,
    "`steps` must have the shape (1,) of the arrays, got (2,): pass one for each step.",
  ),
  (({"x": [1.0] * 3}, [1, 3, 3]), ValueError, "`steps` must ascend, got 3 after 3: sort the arrays by step."),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_anything_but_a_dict_of_arrays(index):
  args, kind, message = WRONG[index]
  assert message_of(kind, Run.from_arrays, *args) == message


def test_inside_jit():
  message = message_of(TypeError, jax.jit(lambda x: Run.from_arrays({"loss": x})), jnp.ones(3))
  assert message.endswith("got traced float32[3] at 'loss': pass real numbers, outside jit.")
