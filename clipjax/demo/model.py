"""The model of the demo: a tanh RNN that learns to predict the next character, and its training step.

The text is prose from the standard library; nothing is downloaded. `max_norm` is an argument of the compiled step,
which chains `clipjax.clip_by_global_norm` before the optimizer.
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
  """The prose of `pydoc_data.topics` as ASCII codes, shape (n,); the few characters outside ASCII become "?"."""
  text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
  return np.frombuffer(text.encode("ascii", "replace"), np.uint8)


def init_params(key: jax.Array) -> Params:
  """Initial weights of a stable network: the recurrent matrix has a spectral radius of about 1/2."""
  keys = jax.random.split(key, 3)
  return {
    "embed": jax.random.normal(keys[0], (CHARACTERS, HIDDEN), jnp.float32),
    "recurrent": jax.random.normal(keys[1], (HIDDEN, HIDDEN), jnp.float32) * (0.5 / math.sqrt(HIDDEN)),
    "bias": jnp.zeros(HIDDEN, jnp.float32),
    "out": jax.random.normal(keys[2], (HIDDEN, CHARACTERS), jnp.float32) * 0.01,
    "out_bias": jnp.zeros(CHARACTERS, jnp.float32),
  }


def optimizer(max_norm: jax.Array) -> optax.GradientTransformationExtraArgs:
  """The clip, chained before SGD with momentum; with `max_norm=inf` it only measures."""
  return optax.chain(clipjax.clip_by_global_norm(max_norm), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))


def train_step(
  params: Params, opt_state: Any, max_norm: jax.Array, text: jax.Array, key: jax.Array, step: jax.Array
) -> tuple[Params, Any, dict[str, jax.Array]]:
  """One step on the batch given by `key` and `step`; `max_norm` is traced, so a new threshold does not recompile it."""
  loss, grads = jax.value_and_grad(loss_fn)(params, batch(text, key, step))
  updates, opt_state = optimizer(max_norm).update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  return params, opt_state, {"loss": loss, **clipjax.metrics(opt_state)}


def batch(text: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
  """The text windows of a step, int32, shape (batch, length + 1)."""
  # The batch depends only on the key and the step, so every run sees the same batches.
  starts = jax.random.randint(jax.random.fold_in(key, step), (BATCH, 1), 0, text.size - LENGTH)
  return text[starts + jnp.arange(LENGTH + 1)[None, :]].astype(jnp.int32)


def loss_fn(params: Params, windows: jax.Array) -> jax.Array:
  """Mean cross-entropy, in nats, of each next character in windows of shape (batch, length + 1)."""

  # The unrolled recurrence: its repeated products make gradients explode.
  def cell(hidden: jax.Array, embedded: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(embedded + hidden @ params["recurrent"] + params["bias"][None, :])
    return hidden, hidden

  inputs, targets = windows[:, :-1].T, windows[:, 1:].T
  hidden = jnp.zeros((windows.shape[0], HIDDEN), jnp.float32)
  _, hiddens = jax.lax.scan(cell, hidden, params["embed"][inputs])
  logits = hiddens @ params["out"] + params["out_bias"][None, None, :]
  losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return losses.mean()
