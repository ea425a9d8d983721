"""Six more models for `choosing.py`; no rule or constant was chosen on them.

A variational autoencoder, a residual net with layer norm and an MLP-Mixer see scikit-learn's digits; a GRU reads the
text of `clipjax demo` by character, another net by word; a mixture density network learns a curve with several branches
and heavy-tailed noise. As in `small_models.py`, each consists of five pure functions, plain and small on purpose.
"""

import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from small_models import CLASSES, Model, cross_entropy, digits_data, noise, normal, relabel, text_data, windows

from clipjax.demo import model

Params = dict[str, Any]

BATCH = 32
LATENT, HIDDEN = 8, 64
RES_WIDTH, RES_BLOCKS = 32, 4
PATCHES, PIXELS, MIXER_WIDTH, MIXER_BLOCKS = 4, 16, 32, 2  # Patches of 4x4 pixels.
GRU_UNITS, GRU_LENGTH, GRU_BATCH = 48, 12, 8
VOCABULARY, WORDS_BACK, WORD_WIDTH = 256, 3, 32
BRANCHES, TAILS = 3, 2.5  # Gaussians of the mixture; degrees of freedom of the noise: its fourth moment is infinite.


def matrices(key: jax.Array, shapes: dict[str, tuple[int, int]], gain: float = 1.0) -> Params:
  """Matrices with entries of standard deviation `gain / sqrt(rows)`, each with a bias of 0."""
  keys = jax.random.split(key, len(shapes))
  out = {name: normal(k, s, gain / math.sqrt(s[0])) for k, (name, s) in zip(keys, shapes.items(), strict=True)}
  return out | {f"{name}_bias": jnp.zeros(columns) for name, (_, columns) in shapes.items()}


def dense(params: Params, name: str, x: jax.Array) -> jax.Array:
  """Applies a matrix and its bias."""
  bias = params[f"{name}_bias"]
  return jnp.matmul(x, params[name]) + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


# Digits -------------------------------------------------------------------------------------------------------------


def digits_batch(data: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Images of shape (batch, 8, 8, 1) and their labels."""
  rows = jax.random.randint(key, (BATCH,), 0, data[1].size)
  return data[0][rows], data[1][rows]


def init_vae(key: jax.Array) -> Params:
  """Encoder and decoder with one hidden layer each."""
  shapes = {"in": (64, HIDDEN), "code": (HIDDEN, 2 * LATENT), "up": (LATENT, HIDDEN), "out": (HIDDEN, 64)}
  return matrices(key, shapes)


def vae_batch(data: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Images of shape (batch, 64), and the noise of their codes."""
  key_rows, key_noise = jax.random.split(key)
  return digits_batch(data, key_rows)[0].reshape(BATCH, -1), jax.random.normal(key_noise, (BATCH, LATENT))


def vae_poison(batch: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Random images."""
  return jax.random.uniform(key, batch[0].shape), batch[1]


def vae_loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  """The negative ELBO of an image, with Bernoulli pixels (Kingma and Welling, 2014, appendix B and C.1)."""
  images, eps = batch
  mean, log_var = jnp.split(dense(params, "code", jnp.tanh(dense(params, "in", images))), 2, axis=-1)
  code = mean + jnp.exp(log_var / 2) * eps
  logits = dense(params, "out", jnp.tanh(dense(params, "up", code)))
  pixels = jnp.sum(jax.nn.softplus(logits) - images * logits, axis=-1)
  divergence = jnp.sum(jnp.exp(log_var) + jnp.square(mean) - 1 - log_var, axis=-1) / 2
  return jnp.mean(pixels + divergence)


def init_residual(key: jax.Array) -> Params:
  """Blocks with a small end of each branch, as in GPT-2."""
  key_ends, *keys = jax.random.split(key, 1 + RES_BLOCKS)
  ends = matrices(key_ends, {"in": (64, RES_WIDTH), "out": (RES_WIDTH, CLASSES)})
  shapes = {"up": (RES_WIDTH, 2 * RES_WIDTH), "down": (2 * RES_WIDTH, RES_WIDTH)}
  return ends | {"blocks": [matrices(k, shapes, 1 / math.sqrt(RES_BLOCKS)) for k in keys]}


def residual_loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Pre-norm blocks `x + down(relu(up(norm(x))))`."""
  x = dense(params, "in", batch[0].reshape(BATCH, -1))
  for block in params["blocks"]:
    x = x + dense(block, "down", jax.nn.relu(dense(block, "up", jax.nn.standardize(x))))
  return cross_entropy(dense(params, "out", jax.nn.standardize(x)), batch[1])


def init_mixer(key: jax.Array) -> Params:
  """Blocks that mix the patches, then the channels (Tolstikhin et al., 2021)."""
  key_ends, *keys = jax.random.split(key, 1 + MIXER_BLOCKS)
  ends = matrices(key_ends, {"in": (PIXELS, MIXER_WIDTH), "out": (MIXER_WIDTH, CLASSES)})
  tokens = {"across": (PATCHES, 2 * PATCHES), "back": (2 * PATCHES, PATCHES)}
  channels = {"up": (MIXER_WIDTH, 2 * MIXER_WIDTH), "down": (2 * MIXER_WIDTH, MIXER_WIDTH)}
  return ends | {"blocks": [matrices(k, tokens | channels) for k in keys]}


def mixer_loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Mixer blocks, then the mean over the patches."""
  patches = batch[0].reshape(BATCH, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(BATCH, PATCHES, PIXELS)
  x = dense(params, "in", patches)
  for block in params["blocks"]:
    mixed = jax.nn.standardize(x).swapaxes(1, 2)
    x = x + dense(block, "back", jax.nn.relu(dense(block, "across", mixed))).swapaxes(1, 2)
    x = x + dense(block, "down", jax.nn.relu(dense(block, "up", jax.nn.standardize(x))))
  return cross_entropy(dense(params, "out", jax.nn.standardize(x.mean(1))), batch[1])


# Text ---------------------------------------------------------------------------------------------------------------


def init_gru(key: jax.Array) -> Params:
  """An embedding for each of the three gates, their recurrent matrices, and the output."""
  key_embed, key_rest = jax.random.split(key)
  embed = normal(key_embed, (model.CHARACTERS, 3 * GRU_UNITS), 0.5)
  shapes = {"gates": (GRU_UNITS, 2 * GRU_UNITS), "candidate": (GRU_UNITS, GRU_UNITS)}
  return {"embed": embed, **matrices(key_rest, {**shapes, "out": (GRU_UNITS, model.CHARACTERS)})}


def gru_batch(text: jax.Array, key: jax.Array) -> jax.Array:
  """Windows of the text."""
  return windows(GRU_LENGTH)(text, key)[:GRU_BATCH]


def gru_loss(params: Params, batch: jax.Array) -> jax.Array:
  """The loss of each next character (Cho et al., 2014)."""

  def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    for_gates, for_candidate = x[:, : 2 * GRU_UNITS], x[:, 2 * GRU_UNITS :]
    reset, keep = jnp.split(jax.nn.sigmoid(for_gates + dense(params, "gates", h)), 2, axis=-1)
    candidate = jnp.tanh(for_candidate + dense(params, "candidate", reset * h))
    h = keep * h + (1 - keep) * candidate
    return h, h

  inputs, targets = batch[:, :-1].T, batch[:, 1:].T
  _, states = jax.lax.scan(cell, jnp.zeros((inputs.shape[1], GRU_UNITS)), params["embed"][inputs])
  return cross_entropy(dense(params, "out", states), targets)


def words_data() -> jax.Array:
  """The words of the text as numbers, shape (n,): the most frequent ones, and 0 for all others."""
  words = re.findall(r"[a-z]+|[^a-z\s]", bytes(model.read_text()).decode("ascii").lower())
  ranks = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1))}
  return jnp.asarray([ranks.get(word, 0) for word in words], jnp.int32)


def words_batch(words: jax.Array, key: jax.Array) -> jax.Array:
  """Some words and the next one, shape (batch, words + 1)."""
  starts = jax.random.randint(key, (BATCH, 1), 0, words.size - WORDS_BACK)
  return words[starts + jnp.arange(WORDS_BACK + 1)[None, :]]


def words_poison(batch: jax.Array, key: jax.Array) -> jax.Array:
  """Random words."""
  return jax.random.randint(key, batch.shape, 0, VOCABULARY, jnp.int32)


def init_words(key: jax.Array) -> Params:
  """An embedding, a hidden layer and the output (Bengio et al., 2003)."""
  key_embed, key_rest = jax.random.split(key)
  shapes = {"hidden": (WORDS_BACK * WORD_WIDTH, 2 * WORD_WIDTH), "out": (2 * WORD_WIDTH, VOCABULARY)}
  return {"embed": normal(key_embed, (VOCABULARY, WORD_WIDTH), 1.0), **matrices(key_rest, shapes)}


def words_loss(params: Params, batch: jax.Array) -> jax.Array:
  """The loss of the next word."""
  x = params["embed"][batch[:, :-1]].reshape(batch.shape[0], -1)
  return cross_entropy(dense(params, "out", jnp.tanh(dense(params, "hidden", x))), batch[:, -1])


# A curve ------------------------------------------------------------------------------------------------------------


def no_data() -> tuple[()]:
  """Nothing: the batches are drawn fresh."""
  return ()


def curve_batch(data: tuple[()], key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Points of `x = y + 0.3 sin(2 pi y)` with Student's t noise; y must be predicted from x (Bishop, 1994)."""
  del data
  key_y, key_noise = jax.random.split(key)
  y = jax.random.uniform(key_y, (4 * BATCH, 1))
  x = y + 0.3 * jnp.sin(2 * math.pi * y) + 0.02 * jax.random.t(key_noise, TAILS, y.shape)
  return x, y


def curve_poison(batch: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Random targets."""
  return batch[0], jax.random.uniform(key, batch[1].shape)


def init_mixture(key: jax.Array) -> Params:
  """Two hidden layers, and weight, mean and width of each Gaussian."""
  return matrices(key, {"in": (1, HIDDEN), "hidden": (HIDDEN, HIDDEN), "out": (HIDDEN, 3 * BRANCHES)})


def mixture_loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  """The negative log-likelihood under a mixture of Gaussians; it is below 0 if the density is above 1."""
  hidden = jnp.tanh(dense(params, "hidden", jnp.tanh(dense(params, "in", batch[0]))))
  logits, means, log_widths = jnp.split(dense(params, "out", hidden), 3, axis=-1)
  squares = jnp.square((batch[1] - means) * jnp.exp(-log_widths))
  densities = jax.nn.log_softmax(logits) - log_widths - (squares + math.log(2 * math.pi)) / 2
  return -jnp.mean(jax.scipy.special.logsumexp(densities, axis=-1))


NEW_MODELS = {
  "vae": Model(f"VAE, {LATENT} codes", (5.0, 10.0), digits_data, init_vae, vae_batch, vae_poison, vae_loss),
  "residual": Model(
    f"Residual net, {RES_BLOCKS} blocks of {RES_WIDTH}",
    (5.0, 10.0),
    digits_data,
    init_residual,
    digits_batch,
    relabel,
    residual_loss,
  ),
  "mixer": Model(
    f"MLP-Mixer, {MIXER_BLOCKS} blocks of {MIXER_WIDTH}",
    (0.5, 2.0),
    digits_data,
    init_mixer,
    digits_batch,
    relabel,
    mixer_loss,
  ),
  "gru": Model(f"GRU, {GRU_UNITS} units", (0.25, 1.0), text_data, init_gru, gru_batch, noise, gru_loss),
  "words": Model(
    f"Words, {VOCABULARY} of them", (5.0, 10.0), words_data, init_words, words_batch, words_poison, words_loss
  ),
  "mixture": Model(
    f"Mixture of {BRANCHES} Gaussians", (5.0, 10.0), no_data, init_mixture, curve_batch, curve_poison, mixture_loss
  ),
}
