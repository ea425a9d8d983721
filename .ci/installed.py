"""What must work where the wheel and its run-time dependencies are installed, and nothing else.

Run by `.ci/run` with the Python of such an environment, in an empty folder.
"""

import pathlib
import sys
from importlib import metadata, util

import jax
import jax.numpy as jnp
import optax

import clipjax

absent = ("pytest", "hypothesis", "matplotlib", "rich", "tensorboardX", "flax", "equinox", "orbax")
assert pathlib.Path(clipjax.__file__).is_relative_to(sys.prefix), clipjax.__file__
assert not [name for name in absent if util.find_spec(name)], "an environment with the run-time dependencies alone"

tx = optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(5.0), optax.sgd(1.0))
params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
opt_state = tx.init(params)
with clipjax.runs.Recorder("run.jsonl") as recorder:
  for step in range(30):
    updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
    recorder.push(step, opt_state, loss=1.0)
assert jnp.allclose(updates["w"], -grads["w"] * 5 / 13), updates
assert clipjax.metrics(opt_state)["grad/norm"] == 13
run = clipjax.runs.read_run("run.jsonl")
assert {finding.name for finding in clipjax.runs.diagnose(run).findings} >= {"clipped", "norms"}
assert clipjax.runs.suggest_max_norm(run).max_norm > 0
print(f"clipjax {metadata.version('clipjax')} works with", *(f"{d.name} {d.version}" for d in metadata.distributions()))
