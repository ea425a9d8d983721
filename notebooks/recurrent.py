"""A small recurrent network on real text, what its gradient passes through, and the pictures of notebook 02.

Two layers of 64 tanh units predict the next character of the prose in Python's own documentation. Parameters are a dict
of matrices: `embed`, `out`, and `input_i` and `recurrent_i` for each layer i. A batch is an array of character codes,
shape (windows, LENGTH + 1).
"""

import math
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import clipjax

UNITS, LENGTH, BATCH, CHARACTERS, LAYERS = 64, 60, 32, 128, 2
PROSE = "\n".join(topics.topics[name] for name in sorted(topics.topics))
CODES = jnp.asarray(np.frombuffer(PROSE.encode("ascii", "replace"), np.uint8), jnp.int32)

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "black"])


def init_params(key, scale=1.5):
  """Random weights; `scale` is about the largest absolute eigenvalue of the recurrent matrices."""
  shapes = {"embed": (CHARACTERS, UNITS, 1.0), "out": (UNITS, CHARACTERS, 0.01)}
  for i in range(LAYERS):
    shapes |= {f"input_{i + 1}": (UNITS, UNITS, UNITS**-0.5), f"recurrent_{i + 1}": (UNITS, UNITS, scale * UNITS**-0.5)}
  keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
  return {name: jax.random.normal(keys[name], shape) * gain for name, (*shape, gain) in shapes.items()}


def batch_of(step):
  """The windows of text that step `step` trains on."""
  key = jax.random.fold_in(jax.random.key(1), step)
  return CODES[jax.random.randint(key, (BATCH, 1), 0, CODES.size - LENGTH) + jnp.arange(LENGTH + 1)]


def cell(params, state, x):
  """One step in time: the states of both layers, shape (layers, ..., units), after one embedded character."""
  states = []
  for i in range(LAYERS):
    x = jnp.tanh(x @ params[f"input_{i + 1}"] + state[i] @ params[f"recurrent_{i + 1}"])
    states.append(x)
  return jnp.stack(states)


def unroll(params, inputs, nudges):
  """The states of the top layer at each time, with `nudges` added to the states of all layers."""

  def advance(state, now):
    state = cell(params, state, now[0]) + now[1]
    return state, state[-1]

  return jax.lax.scan(advance, jnp.zeros(nudges.shape[1:]), (params["embed"][inputs], nudges))[1]


def loss_fn(params, windows):
  """Nats per character."""
  top = unroll(params, windows[:, :-1].T, jnp.zeros((LENGTH, LAYERS, len(windows), UNITS)))
  return cross_entropy(top @ params["out"], windows[:, 1:].T).mean()


@jax.jit
def jacobian_growth(params, windows):
  """The norm of the product of the Jacobians of the first 1, 2, ... LENGTH steps, shape (LENGTH,).

  It is divided by the norm of the identity, which tells how much a random change of the state grows, and is the root
  mean square over the windows.
  """

  def advance(carry, x):
    state, product = carry
    product = jax.jacfwd(cell, argnums=1)(params, state, x).reshape(product.shape) @ product
    return (cell(params, state, x), product), clipjax.global_norm(product) / math.sqrt(state.size)

  def one(window):
    carry = jnp.zeros((LAYERS, UNITS)), jnp.eye(LAYERS * UNITS)
    return jax.lax.scan(advance, carry, params["embed"][window[:-1]])[1]

  # The squares of these norms do not fit into float32.
  return jax.vmap(clipjax.global_norm, in_axes=1)(jax.vmap(one)(windows)) / math.sqrt(len(windows))


@jax.jit
def state_gradients(params, windows):
  """Norms of the gradient of the last character's loss by the state at each time, shape (LENGTH, LAYERS)."""

  def last_loss(nudges, window):
    return cross_entropy(unroll(params, window[:-1], nudges)[-1] @ params["out"], window[-1])

  grads = jax.vmap(jax.grad(last_loss), (None, 0))(jnp.zeros((LENGTH, LAYERS, UNITS)), windows)
  return jnp.linalg.norm(grads, axis=-1).mean(0)


def draw_runs(series, limit):
  """Loss and gradient norm of each run, `{name: {key: values}}`."""
  _, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5.6), sharex=True)
  for name, columns in series.items():
    top.plot(columns["loss"], linewidth=1.2)
    bottom.plot(columns["grad/norm"], label=name, linewidth=1.2)
  top.set(ylabel="loss (nats per character)", title="Without a clip the norm explodes, and the loss stays high")
  bottom.set(xlabel="step", ylabel="gradient norm before the clip", yscale="log")
  bottom.axhline(limit, color="black", linestyle="--", label=f"the limit {limit}")
  bottom.legend(loc="upper right")
  plt.show()


def draw_growth(left, right, titles):
  """Two panels of lines `{label: norms}`, on a log axis."""
  _, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
  for axis, lines, title in zip(axes, (left, right), titles, strict=True):
    for label, line in lines.items():
      axis.semilogy(np.arange(1, LENGTH + 1), np.maximum(line, 1e-35), label=label)
    axis.set(xlabel="steps unrolled", title=title, ylim=(1e-25, 1e28))
    axis.legend(fontsize=8, loc="upper left")
  axes[0].set_ylabel("norm of the Jacobian product")
  plt.show()


def draw_echoes(heard, titles):
  """One panel for each initial scale, `{scale: norms of shape (times, layers)}`, latest time first."""
  _, panels = plt.subplots(1, len(heard), figsize=(12, 3.9), sharex=True, sharey=True)
  for axis, (scale, norms), title in zip(panels, heard.items(), titles, strict=True):
    for i in range(LAYERS):
      axis.semilogy(np.arange(LENGTH - 1, 0, -1), norms[:, i], label=f"layer {i + 1}")
    axis.set(title=f"Initial scale {scale:g}: it {title}", xlabel="characters before the last", ylim=(1e-12, 1e12))
  panels[0].set(ylabel="norm of the gradient by the state")
  panels[0].legend()
  plt.show()


def draw_leaves(series, steps, titles):
  """The norm of each leaf in the first `steps` steps of each run."""
  _, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
  for axis, columns, title in zip(panels, series.values(), titles, strict=True):
    for key in (key for key in columns if key.startswith("grad/norm/")):
      leaf = key.removeprefix("grad/norm/")
      style = "-" if leaf in ("embed", "input_1", "recurrent_1") else "--"
      axis.semilogy(columns[key][:steps], style, label=leaf, linewidth=1.3)
    axis.set(title=title, xlabel="step", ylim=(1e-3, 1e11))
  panels[0].set_ylabel("gradient norm of the leaf")
  panels[1].legend(fontsize=8, ncols=2)
  plt.show()
