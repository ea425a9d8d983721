"""The model of the demo: a tanh RNN that learns to predict the next character, and one training step of it.

The text is the prose in the standard library, so that nothing is downloaded. `max_norm` is an argument of the compiled
step, in which `clipjax.clip_by_global_norm` is chained before the optimizer.
"""

import math
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax

HIDDEN, LENGTH, BATCH, CHARACTERS = 128, 100, 32, 128
LEARNING_RATE, MOMENTUM = 2.0, 0.9

Params = dict[str, jax.Array]


def read_text() -> np.ndarray[Any, np.dtype[np.uint8]]:
  """The prose of `pydoc_data.topics` as ASCII codes, shape (n,); its few other characters become "?"."""
  text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
  return np.frombuffer(text.encode("ascii", "replace"), np.uint8)


def init_params(key: jax.Array) -> Params:
  """Weights of a network that starts tame: the recurrent matrix has a spectral radius of about 1/2."""
  keys = jax.random.split(key, 3)
  return {
    "embed": jax.random.normal(keys[0], (CHARACTERS, HIDDEN), jnp.float32),
    "recurrent": jax.random.normal(keys[1], (HIDDEN, HIDDEN), jnp.float32) * (0.5 / math.sqrt(HIDDEN)),
    "bias": jnp.zeros(HIDDEN, jnp.float32),
    "out": jax.random.normal(keys[2], (HIDDEN, CHARACTERS), jnp.float32) * 0.01,
    "out_bias": jnp.zeros(CHARACTERS, jnp.float32),
  }


def optimizer(max_norm: jax.Array) -> optax.GradientTransformationExtraArgs:
  """The clip, chained before SGD with momentum; `max_norm=inf` only measures."""
  return optax.chain(clipjax.clip_by_global_norm(max_norm), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))


def train_step(
  params: Params, opt_state: Any, max_norm: jax.Array, text: jax.Array, key: jax.Array, step: jax.Array
) -> tuple[Params, Any, dict[str, jax.Array]]:
  """One step on the batch that `key` and `step` determine; `max_norm` is traced, so that no threshold recompiles it."""
  loss, grads = jax.value_and_grad(loss_fn)(params, batch(text, key, step))
  updates, opt_state = optimizer(max_norm).update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  return params, opt_state, {"loss": loss, **clipjax.metrics(opt_state)}


def batch(text: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
  """The windows of a step, shape (batch, length + 1), int32."""
  starts = jax.random.randint(jax.random.fold_in(key, step), (BATCH, 1), 0, text.size - LENGTH)
  return text[starts + jnp.arange(LENGTH + 1)[None, :]].astype(jnp.int32)


def loss_fn(params: Params, windows: jax.Array) -> jax.Array:
  """Mean cross-entropy, in nats, of each next character in windows of shape (batch, length + 1)."""

  def cell(hidden: jax.Array, embedded: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(embedded + hidden @ params["recurrent"] + params["bias"][None, :])
    return hidden, hidden

  inputs, targets = windows[:, :-1].T, windows[:, 1:].T
  hidden = jnp.zeros((windows.shape[0], HIDDEN), jnp.float32)
  _, hiddens = jax.lax.scan(cell, hidden, params["embed"][inputs])
  logits = hiddens @ params["out"] + params["out_bias"][None, None, :]
  losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return losses.mean()
