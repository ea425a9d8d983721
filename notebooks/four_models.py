"""Four small models on real data, and the pictures and the table of notebook 03.

A recurrent network and a Transformer predict the next character of the prose in Python's own documentation. A
feed-forward net and a convolutional network (CNN) classify scikit-learn's 8x8 digits. `MODELS` has all four. Parameters
are dicts of matrices.
"""

import math
from collections.abc import Callable
from pydoc_data import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

UNITS, LENGTH, WIDTH, HEADS, HE, SMALL = 64, 32, 32, 4, math.sqrt(2), 0.1
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "grey"
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

_prose = "\n".join(topics.topics[name] for name in sorted(topics.topics))
_codes = jnp.asarray(np.frombuffer(_prose.encode("ascii", "replace"), np.uint8), jnp.int32)
_images, _labels = map(jnp.asarray, load_digits(return_X_y=True))


class Model(NamedTuple):
  """What a training loop needs.

  Attributes:
    init: key -> parameters.
    loss_fn: (parameters, batch) -> loss in nats.
    batch: key -> batch.
    thumb: the rule of thumb for `max_norm` of this family, lowest and highest.
  """

  init: Callable
  loss_fn: Callable
  batch: Callable
  thumb: tuple[float, float]


def _text_batch(key):
  return _codes[jax.random.randint(key, (8, 1), 0, _codes.size - LENGTH) + jnp.arange(LENGTH + 1)]


def _digits_batch(key):
  rows = jax.random.randint(key, (64,), 0, _labels.size)
  return _images[rows] / 16, _labels[rows]


def _matrices(**shapes):
  """A function that draws matrices `(rows, columns, gain)`, with a standard deviation of gain / sqrt(rows)."""

  def init(key):
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {n: jax.random.normal(keys[n], (a, b)) * gain / math.sqrt(a) for n, (a, b, gain) in shapes.items()}

  return init


def _rnn_loss(params, windows):
  def cell(state, x):
    state = jnp.tanh(x + state @ params["recurrent"])
    return state, state

  x = params["embed"][windows[:, :-1].T]
  states = jax.lax.scan(cell, jnp.zeros(x.shape[1:]), x)[1]
  return cross_entropy(states @ params["out"], windows[:, 1:].T).mean()


def _transformer_loss(params, windows):
  """One block; attention and a feed-forward net, both with a residual."""
  x = params["embed"][windows[:, :-1]] + params["positions"]
  qkv = (jax.nn.standardize(x) @ params["qkv"]).reshape(*x.shape[:2], 3, HEADS, -1)
  mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
  x = x + mixed.reshape(x.shape) @ params["mixed"]
  x = x + jax.nn.gelu(jax.nn.standardize(x) @ params["up"]) @ params["down"]
  return cross_entropy(jax.nn.standardize(x) @ params["out"], windows[:, 1:]).mean()


def _mlp_loss(params, batch):
  hidden = jax.nn.relu(jax.nn.relu(batch[0] @ params["first"]) @ params["second"])
  return cross_entropy(hidden @ params["out"], batch[1]).mean()


def _cnn_loss(params, batch):
  """Three convolutions of 3x3, written as products of matrices, the last two with stride 2."""
  x = batch[0].reshape(-1, 8, 8, 1)
  for name, stride in (("first", 1), ("second", 2), ("third", 2)):
    size = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + size : stride, j : j + size : stride] for i in range(3) for j in range(3)]
    x = jax.nn.relu(jnp.concatenate(parts, axis=-1) @ params[name])
  return cross_entropy(x.reshape(x.shape[0], -1) @ params["out"], batch[1]).mean()


_rnn = _matrices(embed=(128, UNITS, math.sqrt(128)), recurrent=(UNITS, UNITS, 0.5), out=(UNITS, 128, SMALL))
_transformer = _matrices(
  embed=(128, WIDTH, 0.5 * math.sqrt(128)),
  positions=(LENGTH, WIDTH, 0.5 * math.sqrt(LENGTH)),
  qkv=(WIDTH, 3 * WIDTH, 1),
  mixed=(WIDTH, WIDTH, 0.5),
  up=(WIDTH, 4 * WIDTH, 1),
  down=(4 * WIDTH, WIDTH, 0.5),
  out=(WIDTH, 128, SMALL),
)
_mlp = _matrices(first=(64, 128, HE), second=(128, 128, HE), out=(128, 10, HE))
_cnn = _matrices(first=(9, 8, HE), second=(72, 16, HE), third=(144, 32, HE), out=(128, 10, HE))
MODELS = {
  "rnn": Model(_rnn, _rnn_loss, _text_batch, (0.25, 1.0)),
  "transformer": Model(_transformer, _transformer_loss, _text_batch, (0.5, 2.0)),
  "feed-forward": Model(_mlp, _mlp_loss, _digits_batch, (5.0, 10.0)),
  "cnn": Model(_cnn, _cnn_loss, _digits_batch, (1.0, 5.0)),
}


def draw_curves(thresholds, cells):
  """Final loss by threshold, `cells[name, factor] = (base rate, losses, tried, losses of those tried)`."""
  fig, panels = plt.subplots(2, 2, figsize=(11, 8))
  for axis, (name, model) in zip(panels.flat, MODELS.items(), strict=True):
    axis.axvspan(*model.thumb, color=GREY, alpha=0.25, label="rule of thumb")
    for factor, colour in ((1, BLUE), (10, ORANGE)):
      base, losses, tried, ends = cells[name, factor]
      axis.loglog(thresholds, np.minimum(losses, 1e3), "o-", color=colour, label=f"{factor} times the base rate")
      star = {"markersize": 17, "markeredgecolor": "black", "label": f"suggested for {factor} times"}
      axis.plot(tried[0], ends[0], "*", color=colour, **star)
    axis.set(title=f"{name}, base rate {base:.3g}", xlabel="max_norm", ylabel="final loss (nats)")
  for axis in panels.flat:
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
  panels[0, 0].legend(fontsize=8)
  fig.suptitle("The good thresholds move with the learning rate, the rule of thumb does not")
  plt.show()


def table(thresholds, cells, holds, good):
  """The cells as a table in Markdown; `holds` and `good` say which of those tried, and which thresholds, hold."""
  head = "| model | rate | best loss | thresholds that hold | suggested: loss | rule of thumb, middle: loss | no clip |"
  rows = [head, "|" + "---|" * 7]
  for (name, factor), (_, losses, tried, ends) in cells.items():
    there = thresholds[good[name, factor]]
    span = f"{there.size} of {thresholds.size}, from {there.min():.2g} to {there.max():.2g}"
    each = zip(tried, ends, holds[name, factor], strict=True)
    words = [f"{c:.2g}: {loss:.3g}{' holds' * bool(ok)}" for c, loss, ok in each]
    rows.append(f"| {name} | {factor} | {losses.min():.3g} | {span} | " + " | ".join(words) + " |")
  return "\n".join(rows)
