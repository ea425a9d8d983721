"""Four models that train at 16 thresholds at once, in seconds on two cores: RNN, Transformer, feed-forward net, CNN.

The RNN is the demo's, on shorter windows of its text; the Transformer learns the same text; the other two classify
scikit-learn's digits. The sizes are small and the methods plain on purpose: no schedule, no weight decay, no batch
norm. Each model consists of names and five pure functions, which train under `vmap` and `scan`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax.demo import model

Array = np.ndarray[Any, np.dtype[Any]]

TEXT_BATCH, RNN_LENGTH = 16, 48
WIDTH, LAYERS, HEADS, CONTEXT = 32, 2, 4, 32
DIGITS_BATCH, CLASSES = 64, 10
PRINTABLE = (32, 127)  # ASCII codes of the noise in a poisoned text.


class Model(NamedTuple):
  """A model and its data.

  Attributes:
    title: its name in the tables.
    family: lowest and highest threshold of the rule of thumb for its kind.
    data: loads the arrays from which batches are drawn.
    init: `key -> params`.
    batch: `(data, key) -> batch`.
    poison: `(batch, key) -> batch` with random targets.
    loss: `(params, batch) -> ` mean cross-entropy in nats.
  """

  title: str
  family: tuple[float, float]
  data: Callable[[], Any]
  init: Callable[[jax.Array], Any]
  batch: Callable[[Any, jax.Array], Any]
  poison: Callable[[Any, jax.Array], Any]
  loss: Callable[[Any, Any], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean cross-entropy over all targets, in nats."""
  losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return losses.mean()


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
  """Weights from a normal distribution."""
  return jax.random.normal(key, shape, jnp.float32) * std


# Text ---------------------------------------------------------------------------------------------------------------


def text_data() -> jax.Array:
  """The codes of the text, shape (n,)."""
  return jnp.asarray(model.read_text())


def windows(length: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """A function that draws windows of shape (batch, length + 1) from the text."""

  def batch(text: jax.Array, key: jax.Array) -> jax.Array:
    starts = jax.random.randint(key, (TEXT_BATCH, 1), 0, text.size - length)
    return text[starts + jnp.arange(length + 1)[None, :]].astype(jnp.int32)

  return batch


def noise(batch: jax.Array, key: jax.Array) -> jax.Array:
  """Windows of random characters."""
  return jax.random.randint(key, batch.shape, *PRINTABLE, jnp.int32)


def init_transformer(
  key: jax.Array, width: int = WIDTH, layers: int = LAYERS, context: int = CONTEXT
) -> dict[str, Any]:
  """Weights that keep the scale of activations; those that end a residual branch start smaller, as in GPT-2."""
  shapes = {"qkv": (width, 3 * width), "mixed": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
  keys: Iterator[jax.Array] = iter(jax.random.split(key, 3 + layers * len(shapes)))
  ends = {name: 1 / math.sqrt(2 * layers) for name in ("mixed", "down")}

  def block() -> dict[str, jax.Array]:
    matrices = {name: normal(next(keys), s, ends.get(name, 1.0) / math.sqrt(s[0])) for name, s in shapes.items()}
    return {**matrices, "attention_gain": jnp.ones(width), "mlp_gain": jnp.ones(width)}

  return {
    "embed": normal(next(keys), (model.CHARACTERS, width), 0.5),
    "positions": normal(next(keys), (context, width), 0.5),
    "blocks": [block() for _ in range(layers)],
    "gain": jnp.ones(width),
    "out": normal(next(keys), (width, model.CHARACTERS), 0.01),
  }


def transformer_loss(params: dict[str, Any], batch: jax.Array) -> jax.Array:
  """A pre-norm decoder with learned positions: the loss of each next character."""
  inputs, targets = batch[:, :-1], batch[:, 1:]
  x = params["embed"][inputs] + params["positions"][None]
  for block in params["blocks"]:
    qkv = (_normed(x, block["attention_gain"]) @ block["qkv"]).reshape(*inputs.shape, 3, HEADS, -1)
    mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
    x = x + mixed.reshape(x.shape) @ block["mixed"]
    x = x + jax.nn.gelu(_normed(x, block["mlp_gain"]) @ block["up"]) @ block["down"]
  return cross_entropy(_normed(x, params["gain"]) @ params["out"], targets)


def _normed(x: jax.Array, gain: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * gain


# Digits -------------------------------------------------------------------------------------------------------------


def digits_data() -> tuple[jax.Array, jax.Array]:
  """Images of shape (n, 8, 8, 1) with entries from 0 to 1, and their labels."""
  from sklearn.datasets import load_digits  # noqa: PLC0415  (the models of text do without it)

  digits = load_digits()
  return jnp.asarray(digits.images[..., None] / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)


def draw(data: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Images and labels drawn with replacement."""
  rows = jax.random.randint(key, (DIGITS_BATCH,), 0, data[1].size)
  return data[0][rows], data[1][rows]


def relabel(batch: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The images with random labels."""
  return batch[0], jax.random.randint(key, batch[1].shape, 0, CLASSES, jnp.int32)


def init_layers(shapes: tuple[tuple[int, int], ...]) -> Callable[[jax.Array], list[dict[str, jax.Array]]]:
  """Layers with the scale of He et al., 2015, and no bias at the start."""

  def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(shapes))
    return [{"w": normal(k, s, math.sqrt(2 / s[0])), "b": jnp.zeros(s[1])} for k, s in zip(keys, shapes, strict=True)]

  return init


def mlp_loss(params: list[dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Two hidden layers with relu."""
  x = batch[0].reshape(batch[0].shape[0], -1)
  for layer in params[:-1]:
    x = jax.nn.relu(_dense(x, layer))
  return cross_entropy(_dense(x, params[-1]), batch[1])


def cnn_loss(params: list[dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Three convolutions of 3x3 with relu, the last two with stride 2, and a dense layer."""
  x = batch[0]
  for layer, stride in zip(params[:-1], (1, 2, 2), strict=True):
    x = jax.nn.relu(_dense(_patches(x, stride), layer))
  return cross_entropy(_dense(x.reshape(x.shape[0], -1), params[-1]), batch[1])


def _dense(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
  return jnp.matmul(x, layer["w"]) + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def _patches(x: jax.Array, stride: int) -> jax.Array:
  # As matrix products: with one kernel for each of 16 runs, the convolution would be grouped, which is slow on CPU.
  size = x.shape[1]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [x[:, i : i + size : stride, j : j + size : stride] for i in range(3) for j in range(3)]
  return jnp.concatenate(shifted, axis=-1)


MODELS = {
  "rnn": Model(
    f"RNN, {model.HIDDEN} tanh units",
    (0.25, 1.0),
    text_data,
    model.init_params,
    windows(RNN_LENGTH),
    noise,
    model.loss_fn,
  ),
  "transformer": Model(
    f"Transformer, {LAYERS} layers of {WIDTH}",
    (0.5, 2.0),
    text_data,
    init_transformer,
    windows(CONTEXT),
    noise,
    transformer_loss,
  ),
  "mlp": Model(
    "Feed-forward, 64-128-128-10",
    (5.0, 10.0),
    digits_data,
    init_layers(((64, 128), (128, 128), (128, CLASSES))),
    draw,
    relabel,
    mlp_loss,
  ),
  "cnn": Model(
    "CNN, 3 convolutions",
    (1.0, 5.0),
    digits_data,
    init_layers(((9, 8), (72, 16), (144, 32), (128, CLASSES))),
    draw,
    relabel,
    cnn_loss,
  ),
}
