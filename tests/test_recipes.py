"""The recipes of docs/sharding.md run as they stand, print what the page says, and train as one device would.

Every Python block of the page is executed here. A recipe is right when its parameters after some steps are those of a
loop on one device that clips by hand in float64, and when its state has counted the steps that this loop clipped.
"""

import contextlib
import functools
import io
import os
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import oracle_norm, train_on_one_device
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import outputs_of_processes

import clipjax

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]\d+)?(?!\w)"
pytestmark = pytest.mark.usefixtures("standard_promotion")


def blocks_of(page):
  """`(heading, code, printed)` of each Python block, in order; `printed` is the text block below it."""
  out = []
  for section in re.split(r"^##+ ", page, flags=re.MULTILINE)[1:]:
    heading = section.splitlines()[0]
    pairs = re.findall(r"```python\n(.*?)```(?:(?!```python).)*?```text\n(.*?)```", section, re.DOTALL)
    out += [(heading, code, printed) for code, printed in pairs]
  return out


BLOCKS = blocks_of(PAGE)
ALONE = [i for i, (_, code, _) in enumerate(BLOCKS) if "sys.argv" not in code]


def code_under(heading):
  return next(code for title, code, _ in BLOCKS if title == heading)


@functools.cache
def run(code):
  """The names that a recipe leaves behind, and what it printed."""
  names, out = {"__name__": "recipe"}, io.StringIO()
  with mock.patch.dict(os.environ), contextlib.redirect_stdout(out):
    exec(compile(code, "a block of docs/sharding.md", "exec"), names)
  return names, out.getvalue()


def assert_prints(got, want):
  """Equal texts, up to the last digits of numbers and the width of columns."""
  apart = [re.sub(r"(?<=\[) | (?=\])", "", " ".join(re.sub(NUMBER, "#", text).split())) for text in (got, want)]
  assert apart[0] == apart[1]
  numbers = [np.array(re.findall(NUMBER, text), float) for text in (got, want)]
  np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-3, atol=2e-3)


def assert_trained_alike(params, opt_state, expected, norms, limit):
  """The same parameters and last norm, and each step that was clipped counted; some were, some were not."""
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    # By leaf: Adam's quotient of an entry that is nearly 0 is all rounding.
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
  clipped = np.array(norms) > limit
  assert 0 < clipped.sum() < len(norms)
  seen = clipjax.metrics(opt_state)
  np.testing.assert_allclose(np.ravel(seen["grad/norm"]), norms[-1], rtol=1e-5)
  np.testing.assert_allclose(np.ravel(seen["grad/clip_fraction"]), clipped.mean(), rtol=1e-6)
  assert np.all(seen["grad/steps"] == len(norms))


def train_by_hand(loss_fn, params, batches, limit, optimizer):
  return train_on_one_device(loss_fn, *jax.device_get((params, batches)), limit, optimizer)


def two_layers(params, x, y):
  hidden = jax.nn.gelu(x @ params.get("embedding", jnp.eye(x.shape[1])) @ params["up"])
  return jnp.mean((hidden @ params["down"] + params["bias"] - y) ** 2)


def test_every_python_block_has_its_output_below_it():
  assert len(BLOCKS) == PAGE.count("```python") == PAGE.count("```text")
  assert len(ALONE) == len(BLOCKS) - 1  # The two processes have a test of their own.


@pytest.mark.parametrize("index", ALONE)
def test_block_prints_what_the_page_says(index):
  _, code, printed = BLOCKS[index]
  if "jax.lax.pcast" in code and not hasattr(jax.lax, "pcast"):
    code = code.replace('jax.lax.pcast(params, "data", to="varying")', 'jax.lax.pvary(params, "data")')
  assert_prints(run(code)[1], printed)


def test_comparison_of_outputs_can_fail():
  assert_prints("norm 1.0001  w", "norm 1.0 w")
  for other in ("norm 1.1  w", "norm 1.0001  v", "norm 1.0001"):
    with pytest.raises(AssertionError):
      assert_prints(other, "norm 1.0 w")


def test_fsdp_with_jit_trains_as_one_device_does():
  names, _ = run(code_under("FSDP with `jax.jit`"))
  batches = [(names["batch_of"](i),) for i in range(names["STEPS"])]
  start = names["init_params"](jax.random.key(0))
  expected, norms = train_by_hand(names["loss_fn"], start, batches, 0.7, optax.adamw(3e-3, b2=0.95, eps=1e-5))
  assert_trained_alike(names["params"], names["opt_state"], expected, norms, 0.7)
  for x, sharding in zip(jax.tree.leaves(names["params"]), jax.tree.leaves(names["shardings"]), strict=True):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_eager_init_keeps_the_shardings_that_a_jitted_one_loses():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  params = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
  tx = optax.chain(clipjax.clip_by_global_norm(1.0), optax.adam(1e-3))
  assert tx.init(params)[1][0].mu.sharding == params.sharding
  assert len(jax.jit(tx.init)(params)[1][0].mu.sharding.device_set) == 1


@pytest.mark.parametrize(
  "heading", ["`shard_map` with a data axis and a tensor-parallel axis", "`shard_map(check_vma=False)`"]
)
def test_shard_map_trains_as_one_device_does(heading):
  names, _ = run(code_under(heading))
  batches = [(names["x"], names["y"])] * 5
  expected, norms = train_by_hand(two_layers, names["start"], batches, 0.5, optax.adamw(1e-2))
  assert_trained_alike(names["params"], names["opt_state"], expected, norms, 0.5)
  copies = [np.asarray(shard.data) for shard in names["params"]["bias"].addressable_shards]
  assert all(np.array_equal(copy, copies[0]) for copy in copies)


def test_replicated_parameters_drift_apart_without_axis_name():
  code = code_under("`shard_map(check_vma=False)`")
  with pytest.warns(UserWarning, match="each device computes its own norm"):
    names, _ = run(code.replace("axis_name=split", "axis_name=None"))
  copies = [np.asarray(shard.data) for shard in names["params"]["bias"].addressable_shards]
  assert max(np.abs(copy - copies[0]).max() for copy in copies) > 1e-3


def test_gradients_of_a_local_loss_are_a_sum_that_pmean_does_not_change():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

  def gradients(w, x):
    summed = jax.grad(lambda w: jnp.mean(w * x))(w)
    averaged = jax.grad(lambda w: jax.lax.pmean(jnp.mean(w * x), "data"))(w)
    return summed, jax.lax.pmean(summed, "data"), averaged

  run_it = jax.shard_map(gradients, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P(), P()))
  assert [float(g) for g in run_it(jnp.ones(()), jnp.arange(8.0))] == [14.0, 14.0, 3.5]


def test_pmap_trains_as_one_device_does():
  names, _ = run(code_under("`jax.pmap`"))
  start = names["start"] | {"bias": jnp.zeros(8)}
  batches = [(names["x"], names["y"])] * 5
  expected, norms = train_by_hand(two_layers, start, batches, 0.5, optax.adamw(1e-2))
  got = {name: np.reshape(v, start[name].shape) for name, v in names["params"]["sharded"].items()}
  for bias in np.asarray(names["params"]["bias"]):
    assert_trained_alike(got | {"bias": bias}, names["opt_state"], expected, norms, 0.5)


def test_accumulation_equals_one_big_batch_and_the_clip_of_micro_batches_does_not():
  names, _ = run(code_under("Gradient accumulation"))
  batches = [[v.reshape(-1, v.shape[-1]) for v in pair] for pair in zip(names["xs"], names["ys"], strict=True)]
  optimizer = optax.sgd(0.1, momentum=0.9)
  expected, norms = train_by_hand(names["loss_fn"], names["start"], batches, names["LIMIT"], optimizer)
  for way in ("MultiSteps", "scan"):
    assert_trained_alike(*names["results"][way], expected, norms, names["LIMIT"])
  params, opt_state = names["results"]["wrong, a clip per micro-batch"]
  assert np.abs(params["w"] - expected["w"]).max() > 1e-3
  assert clipjax.metrics(opt_state)["grad/steps"] == names["STEPS"] * names["MICRO"]


def test_two_processes_print_what_the_page_says_and_one_device_computes(tmp_path):
  printed = BLOCKS[next(i for i in range(len(BLOCKS)) if i not in ALONE)][2]
  code = code_under("Two processes")
  first, second = outputs_of_processes(code, 2, tmp_path / "two")
  assert first == second
  assert_prints(first, printed)

  rng = np.random.default_rng(0)
  w, b, x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 4), (4,), (32, 16), (32, 4)))
  loss_fn = lambda p, x, y: jnp.mean((x @ p["w"] + p["b"] - y) ** 2)  # noqa: E731
  params, norms = train_by_hand(loss_fn, {"w": w, "b": b}, [(x, y)] * 5, 4.0, optax.adam(0.1))
  np.testing.assert_allclose([float(n) for n in re.findall(r"norm (\S+)", first)], norms, atol=1e-4)
  np.testing.assert_allclose(float(first.split()[-1]), oracle_norm(params) ** 2, rtol=1e-5)


def test_process_that_fails_is_reported_with_its_stderr(tmp_path):
  code = "import sys, time\nif sys.argv[3] == '1': raise RuntimeError('broken on purpose')\ntime.sleep(60)"
  with pytest.raises(AssertionError, match="RuntimeError: broken on purpose"):
    outputs_of_processes(code, 2, tmp_path / "broken")
