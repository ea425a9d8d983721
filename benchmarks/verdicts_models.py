"""The models of `verdicts.py`, different ones for the half that sets the limits and for the reported half.

The first half has the RNN, the Transformer and the feed-forward net of `small_models.py`, and an autoencoder; the other
half has the CNN, a GRU, a residual net with layer norm and a vision Transformer. Each half also has its own attention
with a key bias, deep sigmoid net, net that is too large for sixty images, start at zero, and GAN.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from small_models import (
  CLASSES,
  MODELS,
  Model,
  cross_entropy,
  digits_data,
  draw,
  init_layers,
  mlp_loss,
  noise,
  normal,
  relabel,
  text_data,
  windows,
)

from clipjax.demo import model

Params = Any
Images = tuple[jax.Array, jax.Array]

HEADS, PATCH = 4, 2
TEXT_LENGTH = 32


# Attention with biases ----------------------------------------------------------------------------------------------


def init_attention(entries: int, inputs: int, length: int, out: int) -> Callable[[jax.Array], dict[str, Any]]:
  """Two blocks of attention and a feed-forward part, with biases; the key bias is a separate leaf."""

  def init(key: jax.Array, width: int = 32, layers: int = 2) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 3 + 6 * layers))
    ends = 1 / math.sqrt(2 * layers * width)

    def block() -> dict[str, jax.Array]:
      matrices = {name: normal(next(keys), (width, width), 1 / math.sqrt(width)) for name in ("query", "key", "value")}
      matrices |= {"mixed": normal(next(keys), (width, width), ends)}
      matrices |= {"up": normal(next(keys), (width, 2 * width), 1 / math.sqrt(width))}
      matrices |= {"down": normal(next(keys), (2 * width, width), ends / math.sqrt(2))}
      biases = {f"{name}_bias": jnp.zeros(width) for name in ("query", "key", "value", "down")}
      gains = {"attention_gain": jnp.ones(width), "mlp_gain": jnp.ones(width)}
      return {**matrices, **biases, **gains, "up_bias": jnp.zeros(2 * width)}

    return {
      "embed": normal(next(keys), (entries, width), inputs**-0.5),
      "positions": normal(next(keys), (length, width), 0.3),
      "blocks": [block() for _ in range(layers)],
      "gain": jnp.ones(width),
      "out": normal(next(keys), (width, out), 0.01),
    }

  return init


def attend(params: dict[str, Any], x: jax.Array, is_causal: bool) -> jax.Array:
  """Applies the blocks to (batch, length, width)."""
  shape = (*x.shape[:2], HEADS, -1)
  for block in params["blocks"]:
    normed = _normed(x, block["attention_gain"])
    qkv = [(normed @ block[name] + _row(block[f"{name}_bias"])).reshape(shape) for name in ("query", "key", "value")]
    mixed = jax.nn.dot_product_attention(*qkv, is_causal=is_causal).reshape(x.shape)
    x = x + mixed @ block["mixed"]
    hidden = jax.nn.gelu(_normed(x, block["mlp_gain"]) @ block["up"] + _row(block["up_bias"]))
    x = x + hidden @ block["down"] + _row(block["down_bias"])
  return _normed(x, params["gain"])


def biased_text_loss(params: dict[str, Any], batch: jax.Array) -> jax.Array:
  """A decoder of text: the loss of each next character."""
  x = params["embed"][batch[:, :-1]] + params["positions"][None]
  return cross_entropy((attend(params, x, True) @ params["out"]).astype(jnp.float32), batch[:, 1:])


def vit_loss(params: dict[str, Any], batch: Images) -> jax.Array:
  """A vision Transformer on patches of 2x2 with averaged outputs."""
  images = batch[0][..., 0].astype(params["embed"].dtype)
  side = images.shape[1] // PATCH
  patches = images.reshape(-1, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4).reshape(-1, side * side, PATCH**2)
  x = patches @ params["embed"] + params["positions"][None]
  return cross_entropy((attend(params, x, False).mean(1) @ params["out"]).astype(jnp.float32), batch[1])


def _normed(x: jax.Array, gain: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * gain


def _row(bias: jax.Array) -> jax.Array:
  return bias[None, None, :]


# A GRU --------------------------------------------------------------------------------------------------------------


def init_gru(key: jax.Array, width: int = 48) -> dict[str, jax.Array]:
  """Weights of a GRU (Cho et al., 2014)."""
  keys = jax.random.split(key, 4)
  return {
    "embed": normal(keys[0], (model.CHARACTERS, width), 1.0),
    "gates_in": normal(keys[1], (width, 3 * width), 1 / math.sqrt(width)),
    "gates": normal(keys[2], (width, 3 * width), 1 / math.sqrt(width)),
    "bias": jnp.zeros(3 * width),
    "out": normal(keys[3], (width, model.CHARACTERS), 0.01),
    "out_bias": jnp.zeros(model.CHARACTERS),
  }


def gru_loss(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
  """The loss of each next character."""
  inputs = params["embed"][batch[:, :-1].T] @ params["gates_in"] + _row(params["bias"])

  def cell(hidden: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    z, r, c = jnp.split(inputs, 3, axis=1)
    hz, hr, hc = jnp.split(hidden @ params["gates"], 3, axis=1)
    z, r = jax.nn.sigmoid(z + hz), jax.nn.sigmoid(r + hr)
    hidden = z * hidden + (1 - z) * jnp.tanh(c + r * hc)
    return hidden, hidden

  hidden = jnp.zeros((batch.shape[0], params["gates"].shape[0]), inputs.dtype)
  _, hiddens = jax.lax.scan(cell, hidden, inputs)
  return cross_entropy((hiddens @ params["out"] + _row(params["out_bias"])).astype(jnp.float32), batch[:, 1:].T)


# Digits -------------------------------------------------------------------------------------------------------------


def init_residual(key: jax.Array, width: int = 48, blocks: int = 4) -> dict[str, Any]:
  """Weights of a residual net with small initial branches."""
  keys = jax.random.split(key, 2 + 2 * blocks)
  return {
    "in": normal(keys[0], (64, width), 1 / 8),
    "blocks": [
      {
        "gain": jnp.ones(width),
        "shift": jnp.zeros(width),
        "up": normal(keys[2 + 2 * i], (width, 2 * width), math.sqrt(2 / width)),
        "down": normal(keys[3 + 2 * i], (2 * width, width), 0.5 / math.sqrt(2 * width)),
      }
      for i in range(blocks)
    ],
    "out": normal(keys[1], (width, CLASSES), 0.1 / math.sqrt(width)),
    "out_bias": jnp.zeros(CLASSES),
  }


def residual_loss(params: dict[str, Any], batch: Images) -> jax.Array:
  """Residual blocks of layer norm, relu and two matrices."""
  x = batch[0].reshape(batch[0].shape[0], -1).astype(params["in"].dtype) @ params["in"]
  for block in params["blocks"]:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    x = x + jax.nn.relu((normed * block["gain"][None] + block["shift"][None]) @ block["up"]) @ block["down"]
  return cross_entropy((x @ params["out"] + params["out_bias"][None]).astype(jnp.float32), batch[1])


def autoencoder_loss(params: list[dict[str, jax.Array]], batch: Images) -> jax.Array:
  """Half the squared error of an image, summed over its pixels, from a code of eight tanh units."""
  images = batch[0].reshape(batch[0].shape[0], -1)
  x = images.astype(params[0]["w"].dtype)
  for layer in params[:-1]:
    x = jnp.tanh(x @ layer["w"] + layer["b"][None])
  error = (x @ params[-1]["w"] + params[-1]["b"][None]).astype(jnp.float32) - images
  return 0.5 * jnp.square(error).sum(-1).mean()


def blur(batch: Images, key: jax.Array) -> Images:
  """Images with random pixels."""
  return jax.random.uniform(key, batch[0].shape), batch[1]


def sigmoid_loss(params: list[dict[str, jax.Array]], batch: Images) -> jax.Array:
  """A net of sigmoids: each layer removes most of the gradient."""
  x = batch[0].reshape(batch[0].shape[0], -1)
  for layer in params[:-1]:
    x = jax.nn.sigmoid(x @ layer["w"] + layer["b"][None])
  return cross_entropy(x @ params[-1]["w"] + params[-1]["b"][None], batch[1])


def shrunk(init: Callable[[jax.Array], Params], last: float) -> Callable[[jax.Array], Params]:
  """The same initial weights with the last matrix multiplied by `last`; 0 makes the output start at zero."""

  def start(key: jax.Array) -> Params:
    params = init(key)
    return [*params[:-1], {**params[-1], "w": params[-1]["w"] * last}]

  return start


def layers(*sizes: int) -> Callable[[jax.Array], Params]:
  """Dense layers of these sizes."""
  return init_layers(tuple(pairwise(sizes)))


def digits(title: str, init: Any, loss: Any, poison: Any = relabel) -> Model:
  """A model on scikit-learn's digits."""
  return Model(title, (math.nan, math.nan), digits_data, init, draw, poison, loss)


def text(title: str, init: Any, loss: Any) -> Model:
  """A model on the text."""
  return Model(title, (math.nan, math.nan), text_data, init, windows(TEXT_LENGTH), noise, loss)


_CHARACTERS = model.CHARACTERS

TUNE = {
  "rnn": MODELS["rnn"]._replace(batch=windows(TEXT_LENGTH)),
  "transformer": MODELS["transformer"],
  "mlp": MODELS["mlp"],
  "autoencoder": digits("Autoencoder, 64-48-8-48-64", layers(64, 48, 8, 48, 64), autoencoder_loss, blur),
  "biased": text("Transformer with biases", init_attention(_CHARACTERS, 4, TEXT_LENGTH, _CHARACTERS), biased_text_loss),
  "sigmoid": digits("Sigmoid net, 8 layers", layers(64, *[32] * 8, CLASSES), sigmoid_loss),
  "large": digits("Feed-forward, 64-512-512-10", layers(64, 512, 512, CLASSES), mlp_loss),
  "zero": digits("Feed-forward, output at 0", shrunk(layers(64, 96, 96, CLASSES), 0.0), mlp_loss),
}
HELD_OUT = {
  "gru": text("GRU, 48 units", init_gru, gru_loss),
  "vit": digits("Vision Transformer", init_attention(PATCH**2, PATCH**2, 16, CLASSES), vit_loss),
  "cnn": MODELS["cnn"],
  "residual": digits("Residual net, 4 blocks", init_residual, residual_loss),
  "sigmoid12": digits("Sigmoid net, 12 layers", layers(64, *[48] * 12, CLASSES), sigmoid_loss),
  "wide": digits("Residual net, 4 blocks of 160", lambda key: init_residual(key, 160), residual_loss),
  "linear": digits("Linear, all at 0", shrunk(layers(64, CLASSES), 0.0), mlp_loss),
}
ALL = {**TUNE, **HELD_OUT}
