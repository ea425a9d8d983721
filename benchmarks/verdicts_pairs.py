"""Two optimizers in one run, for `verdicts.py`: a GAN on the digits, or an autoencoder and a classifier."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from small_models import CLASSES, cross_entropy, normal

LATENT, PIXELS, BATCH = 8, 64, 64

Params = dict[str, dict[str, jax.Array]]


class Pair(NamedTuple):
  """Two networks, "g" and "d", each with its own loss.

  Attributes:
    init: `key -> {"g": params, "d": params}`.
    gradients: `(params, (images, labels), key) -> ({"g_loss", "d_loss"}, {"g": gradient, "d": gradient})`.
  """

  init: Callable[[jax.Array], dict[str, Params]]
  gradients: Callable[[Any, Any, jax.Array], tuple[dict[str, jax.Array], dict[str, Any]]]


def gan(width: int) -> Pair:
  """A generator and a discriminator with squared losses (Mao et al., Least squares GANs, 2017)."""

  def init(key: jax.Array) -> dict[str, Params]:
    keys = jax.random.split(key, 4)
    return {
      "d": {"look": _layer(keys[2], PIXELS, width), "judge": _layer(keys[3], width, 1)},
      "g": {"latent": _layer(keys[0], LATENT, width), "pixels": _layer(keys[1], width, PIXELS)},
    }

  def images_of(params: Params, key: jax.Array) -> jax.Array:
    z = jax.random.normal(key, (BATCH, LATENT))
    return jax.nn.sigmoid(_dense(jax.nn.relu(_dense(z, params["latent"])), params["pixels"]))

  def judged(params: Params, images: jax.Array) -> jax.Array:
    return _dense(jax.nn.leaky_relu(_dense(images, params["look"]), 0.2), params["judge"])

  def gradients(params: dict[str, Params], data: Any, key: jax.Array) -> Any:
    real, key = _drawn(data, key)[0], jax.random.fold_in(key, 1)
    fake = images_of(params["g"], key)

    def d_loss(d: Params) -> jax.Array:
      return 0.5 * (jnp.square(judged(d, real) - 1).mean() + jnp.square(judged(d, fake)).mean())

    def g_loss(g: Params) -> jax.Array:
      return 0.5 * jnp.square(judged(params["d"], images_of(g, key)) - 1).mean()

    return _both(d_loss, g_loss, params)

  return Pair(init, gradients)


def coder(width: int) -> Pair:
  """An autoencoder, and a classifier of its codes whose gradient does not reach them."""

  def init(key: jax.Array) -> dict[str, Params]:
    keys = jax.random.split(key, 4)
    return {
      "d": {"look": _layer(keys[2], LATENT, width), "judge": _layer(keys[3], width, CLASSES)},
      "g": {"latent": _layer(keys[0], PIXELS, LATENT), "pixels": _layer(keys[1], LATENT, PIXELS)},
    }

  def gradients(params: dict[str, Params], data: Any, key: jax.Array) -> Any:
    images, labels = _drawn(data, key)
    codes = jnp.tanh(_dense(images, params["g"]["latent"]))

    def d_loss(d: Params) -> jax.Array:
      return cross_entropy(_dense(jax.nn.relu(_dense(codes, d["look"])), d["judge"]), labels)

    def g_loss(g: Params) -> jax.Array:
      error = _dense(jnp.tanh(_dense(images, g["latent"])), g["pixels"]) - images
      return 0.5 * jnp.square(error).sum(-1).mean()

    return _both(d_loss, g_loss, params)

  return Pair(init, gradients)


def _both(d_loss: Callable[[Params], jax.Array], g_loss: Callable[[Params], jax.Array], params: Any) -> Any:
  (d, d_grads), (g, g_grads) = jax.value_and_grad(d_loss)(params["d"]), jax.value_and_grad(g_loss)(params["g"])
  return {"g_loss": g, "d_loss": d}, {"g": g_grads, "d": d_grads}


def _drawn(data: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  rows = jax.random.randint(key, (BATCH,), 0, len(data[1]))
  return data[0][rows].reshape(BATCH, PIXELS), data[1][rows]


def _layer(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
  return {"w": normal(key, (inputs, outputs), 1 / math.sqrt(inputs)), "b": jnp.zeros(outputs)}


def _dense(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
  return x @ layer["w"] + layer["b"][None, :]


PAIRS = {"gan": gan(48), "coder": coder(48), "gan64": gan(64), "coder32": coder(32)}
