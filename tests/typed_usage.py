"""A file of typical user code: it is type-checked, and a test runs it."""

import jax
import jax.numpy as jnp
import optax

import clipjax
from clipjax import rules

Params = dict[str, jax.Array]


def step(params: Params, state: optax.OptState, x: jax.Array) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
  """One step of training, with the norm among what it reports."""
  grads = jax.grad(lambda p: jnp.sum((x @ p["w"] + p["b"]) ** 2))(params)
  updates, state = optimizer().update(grads, state, params)
  new: Params = optax.apply_updates(params, updates)
  return new, state, clipjax.metrics(state)


def optimizer() -> optax.GradientTransformationExtraArgs:
  """Every kind of threshold in one chain."""
  return optax.chain(
    clipjax.watch(history=8),
    clipjax.clip_by_global_norm(1.0, axis_name=()),
    clipjax.clip_by_leaf_norm(jnp.float32(0.9), name="leaf"),
    clipjax.clip_by_group_norm({"w": 0.8, "b": None}, lambda path, leaf: path, name="group"),
    clipjax.clip_by_block_rms(optax.linear_schedule(1.0, 0.5, 10), name="rms"),
    clipjax.clip_by_value(rules.minimum(0.7, 1.0), name="value"),
    optax.sgd(0.1),
  )


def record(path: str) -> tuple[float, list[str], str]:
  """A recorded run, its verdict, the suggestion and the report."""
  params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
  state = optimizer().init(params)
  with clipjax.runs.Recorder(path, every=10) as recorder:
    for i in range(30):
      params, state, _ = jax.jit(step)(params, state, jnp.ones((4, 3)))
      recorder.push(i, state, params=params, loss=jnp.float32(1.0), examples=4)
  run: clipjax.runs.Run = clipjax.runs.read_run(path)
  report: clipjax.runs.HealthReport = clipjax.runs.diagnose(run)
  suggestion = clipjax.runs.suggest_max_norm(run, learning_rate=0.1, new_learning_rate=0.2, model="rnn")
  steps, norms = state[0].last_norms()
  assert len(steps) == len(norms)
  page = clipjax.runs.write_report(run, path + ".html", suggestion=suggestion)
  return suggestion.max_norm, [finding.name for finding in report.findings], str(page)


def main() -> dict[str, float]:
  """Three steps, and a clip by hand."""
  params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
  state = optimizer().init(params)
  seen: dict[str, jax.Array] = {}
  for _ in range(3):
    params, state, seen = jax.jit(step)(params, state, jnp.ones((4, 3)))
  clipjax.raise_if_nonfinite(state)
  clipped, norm = clipjax.clip_grad_norm(params, max_norm=0.5, on_nonfinite="zero")
  clipped = clipjax.clip_grad_value(clipped, 0.1)
  total: jax.Array = clipjax.global_norm(clipped, ord=1)
  return {**{key: float(value) for key, value in seen.items()}, "norm": float(norm), "total": float(total)}
