"""Sections of `speed.py` that train: a whole step of a small Transformer, and 16 thresholds of the demo at once."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import small_models
from speed_adam import Steps
from speed_peers import Plan
from speed_trees import (
  AT_ONCE,
  CLIPJAX,
  IN_TURN,
  LOOK,
  NO_CLIP,
  OPTAX,
  WATCHED_LEAVES,
  Case,
  Tree,
  case_of,
)
from timing import Turn, interleave, summary, turn_of

import clipjax
from clipjax.demo import model

WIDTH, LAYERS, CONTEXT, BATCH = 192, 4, 64, 8
THRESHOLDS = 16


def training_step(clip: optax.GradientTransformation) -> Any:
  """A jitted step `(params, (clip_state, adam_state), batch) -> (params, state)` that donates the first two."""
  tx = optax.chain(clip, optax.adam(1e-3))

  def step(params: Any, state: Any, batch: Any) -> Any:
    grads = jax.grad(small_models.transformer_loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


def train(plan: Plan) -> list[Case]:
  """A whole training step of a Transformer on text: gradient, clip, Adam."""
  width, layers = (32, 2) if plan.quick else (WIDTH, LAYERS)
  params = small_models.init_transformer(jax.random.key(0), width, layers, CONTEXT)
  text = small_models.text_data()
  batch = text[: BATCH * (CONTEXT + 1)].reshape(BATCH, CONTEXT + 1).astype(jnp.int32)
  shapes = [x.shape for x in jax.tree.leaves(params)]
  tree = Tree("training", f"{layers} layers of {width}, {BATCH} windows of {CONTEXT} characters", shapes)
  clips = {
    NO_CLIP: optax.identity(),
    OPTAX: optax.clip_by_global_norm(1.0),
    CLIPJAX: clipjax.clip_by_global_norm(1.0),
    WATCHED_LEAVES: optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(1.0)),
  }
  steps = Steps(clips, params, batch, training_step)
  turns = {**steps.turns(), LOOK: steps.look_turn(WATCHED_LEAVES)}
  return [case_of(tree, "float32", summary(interleave(turns, plan.rounds), NO_CLIP))]


def vmap(plan: Plan) -> list[Case]:
  """A step of 16 runs of the demo's model that differ in the threshold: one after another, and at once."""
  number = 2 if plan.quick else THRESHOLDS
  limits = jnp.geomspace(1 / 16, 16, number)
  text = jnp.asarray(model.read_text())
  key_params, key = jax.random.split(jax.random.key(0))
  batch = model.batch(text, key, jnp.int32(0))
  shapes = [x.shape for x in jax.tree.leaves(model.init_params(key_params))]
  makers: dict[str, Any] = {
    NO_CLIP: lambda _: optax.identity(),
    OPTAX: optax.clip_by_global_norm,
    CLIPJAX: clipjax.clip_by_global_norm,
  }
  turns: dict[str, Turn] = {}
  for name, make in makers.items():

    def optimizer(limit: Any, make: Any = make) -> optax.GradientTransformation:
      return optax.chain(make(limit), optax.sgd(0.25, momentum=model.MOMENTUM))  # Stable: the norms stay finite.

    def step(params: Any, state: Any, limit: Any, optimizer: Any = optimizer) -> Any:
      grads = jax.grad(model.loss_fn)(params, batch)
      updates, state = optimizer(limit).update(grads, state, params)
      return optax.apply_updates(params, updates), state

    def start(optimizer: Any = optimizer) -> Any:
      params = model.init_params(key_params)
      return params, optimizer(limits[0]).init(params)

    turns[IN_TURN.format(name)] = one_after_another(jax.jit(step, donate_argnums=(0, 1)), start, limits)
    turns[AT_ONCE.format(name)] = at_once(jax.jit(jax.vmap(step), donate_argnums=(0, 1)), start, limits)
  tree = Tree("vmap", f"the demo's model, {number} thresholds", shapes)
  return [case_of(tree, "float32", {**summary(interleave(turns, plan.rounds))})]


def one_after_another(step: Any, start: Any, limits: jax.Array) -> Turn:
  """A turn that runs one step of each run."""
  scalars = list(limits)  # Sliced once: each slice is a call.
  runs = [start() for _ in scalars]

  def run() -> None:
    for i, limit in enumerate(scalars):
      runs[i] = step(*runs[i], limit)
    jax.block_until_ready(runs)

  return turn_of(run)


def at_once(step: Any, start: Any, limits: jax.Array) -> Turn:
  """A turn that runs one step of all runs together."""
  carry = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start() for _ in limits))

  def run() -> None:
    nonlocal carry
    carry = jax.block_until_ready(step(*carry, limits))

  return turn_of(run)
