# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why do recurrent networks explode, and what does a clip do about it?
#
# A recurrent network reads a text one character at a time, with the same weights at every step. Its gradient goes back
# through all those steps, and is multiplied by a matrix at each of them. Products of many matrices become very large or
# very small. This notebook trains a small network on real text with and without a clip, looks at the product of
# matrices itself, and then at what arrives in each layer, at each time.
#
# ## The network
#
# Two layers of 64 tanh units predict the next character of the prose in Python's own documentation. `cell` is one step
# in time: it takes the state of both layers and one embedded character, and gives the next state.

# %%
import math
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import display

import clipjax

UNITS, LENGTH, BATCH, CHARACTERS, LAYERS, STEPS, LEARNING_RATE = 64, 60, 32, 128, 2, 400, 2.0
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update(
  {"axes.prop_cycle": plt.cycler(color=["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "black"])}
)
prose = "\n".join(topics.topics[name] for name in sorted(topics.topics))
codes = jnp.asarray(np.frombuffer(prose.encode("ascii", "replace"), np.uint8), jnp.int32)


def init(key, scale=0.5):
  """Weights; `scale` is about the spectral radius of the recurrent matrices."""
  shapes = {"embed": (CHARACTERS, UNITS, 1.0), "out": (UNITS, CHARACTERS, 0.01)}
  for i in range(LAYERS):
    shapes |= {f"input_{i + 1}": (UNITS, UNITS, UNITS**-0.5), f"recurrent_{i + 1}": (UNITS, UNITS, scale * UNITS**-0.5)}
  keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
  return {name: jax.random.normal(keys[name], shape) * gain for name, (*shape, gain) in shapes.items()}


def cell(params, state, x):
  """The next state, shape (layers, ..., units)."""
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
  """Mean cross-entropy of each next character, in nats."""
  top = unroll(params, windows[:, :-1].T, jnp.zeros((LENGTH, LAYERS, BATCH, UNITS)))
  return optax.softmax_cross_entropy_with_integer_labels(top @ params["out"], windows[:, 1:].T).mean()


def batch(key):
  """Windows of the text, shape (batch, length + 1)."""
  return codes[jax.random.randint(key, (BATCH, 1), 0, codes.size - LENGTH) + jnp.arange(LENGTH + 1)]


# %% [markdown]
# ## With and without
#
# Two runs start from the same weights and see the same batches. The only difference is `max_norm`: infinity, which
# only measures, and 0.25. `clipjax.watch` adds the norm of each leaf to the state, and `clipjax.metrics` reads it. Run
# the cell in a notebook and the two curves grow while the networks train.


# %%
def optimizer(max_norm):
  """Watch, clip, SGD with momentum."""
  return optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(max_norm), optax.sgd(LEARNING_RATE, momentum=0.9))


@jax.jit
def step(params, opt_state, max_norm, i):
  """One training step; `max_norm` is an argument, so that both runs share one compilation."""
  loss, grads = jax.value_and_grad(loss_fn)(params, batch(jax.random.fold_in(jax.random.key(1), i)))
  updates, opt_state = optimizer(max_norm).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, {"loss": loss, **clipjax.metrics(opt_state, per_leaf=True)}


start = init(jax.random.key(0))
runs = {"no clip": math.inf, "max_norm = 0.25": 0.25}
weights, rows = {name: [start] for name in runs}, {name: [] for name in runs}
states = {name: optimizer(1.0).init(start) for name in runs}
fig, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True)
picture = display(fig, display_id=True)
for i in range(STEPS):
  for name, max_norm in runs.items():
    after, states[name], row = step(weights[name][-1], states[name], max_norm, i)
    weights[name].append(after)
    rows[name].append(row)
  if (i + 1) % 100 == 0:
    series = {name: jax.tree.map(lambda *x: np.array(x), *jax.device_get(r)) for name, r in rows.items()}
    for axis, key in zip(axes, ("loss", "grad/norm"), strict=True):
      axis.clear()
      for name, columns in series.items():
        axis.semilogy(columns[key], label=name)
    axes[0].set(ylabel="loss (nats per character)", title="Without a clip the norm explodes, and the loss stays high")
    axes[1].set(xlabel="step", ylabel="gradient norm before the clip")
    axes[1].axhline(0.25, color="black", linestyle="--", label="the limit 0.25")
    axes[1].legend(loc="upper right")
    picture.update(fig)
plt.close(fig)

final = {name: columns["loss"][-20:].mean() for name, columns in series.items()}
largest = {name: columns["grad/norm"].max() for name, columns in series.items()}
assert final["no clip"] > 2 * final["max_norm = 0.25"]
assert largest["no clip"] > 100 * largest["max_norm = 0.25"]
for name, columns in series.items():
  share = columns["grad/clip_fraction"][-1]
  print(f"{name:15} last losses {final[name]:.2f}, largest norm {largest[name]:.3g}, clipped {share:.0%} of the steps")

# %% [markdown]
# The clipped run sees large norms too, early on. But its steps there are short, so it stays where the loss is smooth.
# The other run takes one step that is far too long, and lands where the gradient is larger still.
#
# ## Why: a product of matrices
#
# A small change of the first state moves the state at time $T$ by the Jacobian
#
# $$ \frac{\partial h_T}{\partial h_0} = J_T \, J_{T-1} \cdots J_1, \qquad
# J_t = \frac{\partial h_t}{\partial h_{t-1}}, $$
#
# and the gradient comes back through the same product
# ([Pascanu et al., 2013](https://arxiv.org/abs/1211.5063)). If each factor stretches by a little more than 1, the
# product grows like a power of it; a little less than 1, and it shrinks like one. Here it is, measured on eight windows
# of text. Its norm is that of all entries, divided by that of the identity: how much a random change grows.


# %%
@jax.jit
def growth(params, windows):
  """Norm of the Jacobian product after 1, 2, ... steps: the geometric mean over the windows."""

  def advance(carry, x):
    state, product = carry
    product = jax.jacfwd(cell, argnums=1)(params, state, x).reshape(product.shape) @ product
    return (cell(params, state, x), product), jnp.log(clipjax.global_norm(product) / math.sqrt(state.size))

  def one(window):
    carry = jnp.zeros((LAYERS, UNITS)), jnp.eye(LAYERS * UNITS)
    return jax.lax.scan(advance, carry, params["embed"][window[:-1]])[1]

  return jnp.exp(jax.vmap(one)(windows).mean(0))


windows = batch(jax.random.key(7))[:8]
at_start = {scale: growth(init(jax.random.key(0), scale), windows) for scale in (0.5, 1.0, 1.5, 2.0, 4.0)}
worst = int(series["no clip"]["grad/norm"].argmax())
in_training = {
  f"no clip, step {worst}, the largest norm": growth(weights["no clip"][worst], windows),
  f"max_norm = 0.25, step {STEPS}": growth(weights["max_norm = 0.25"][-1], windows),
  "both at the start": growth(start, windows),
  f"no clip, step {STEPS}": growth(weights["no clip"][-1], windows),
}
fig, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
titles = ("Initial weights: a power of the length", "In training: the norm explodes where the product does")
for axis, lines, title in zip(axes, (at_start, in_training), titles, strict=True):
  for label, line in lines.items():
    axis.semilogy(np.arange(1, LENGTH + 1), line, label=label if lines is in_training else f"initial scale {label:g}")
  axis.set(xlabel="steps unrolled", ylabel="norm of the Jacobian product", title=title)
  axis.legend(fontsize=8)
plt.show()

per_step = {scale: float((g[-1] / g[9]) ** (1 / (LENGTH - 10))) for scale, g in at_start.items()}
for scale, factor in per_step.items():
  print(f"initial scale {scale:g}: each step multiplies by {factor:.2f}, {LENGTH} steps by {at_start[scale][-1]:.1e}")
assert per_step[0.5] < per_step[1.0] < 1 < per_step[2.0] < per_step[4.0]

# %% [markdown]
# On the log axis the curves are straight lines: a power of the length, as the argument says. With a small initial scale
# the product *vanishes*, with a large one it *explodes*. There is only a narrow band in between. Note that the scale at
# which the product grows is above 1: tanh flattens large states, and that shrinks each factor.
#
# ## Seen per layer and per time
#
# Which moments of the past does the loss of the *last* character still hear of? The gradient with respect to the state
# of each layer at each time says so. `nudges` above are zeros that were added to the states to make it measurable.


# %%
@jax.jit
def echoes(params, windows):
  """Mean norm of the gradient of the last character's loss by the state, shape (length, layers)."""

  def last_loss(nudges, window):
    logits = unroll(params, window[:-1], nudges)[-1] @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[-1])

  grads = jax.vmap(jax.grad(last_loss), (None, 0))(jnp.zeros((LENGTH, LAYERS, UNITS)), windows)
  return jnp.linalg.norm(grads, axis=-1).mean(0)


fig, panels = plt.subplots(1, 3, figsize=(12, 3.9), sharex=True, sharey=True)
heard, norms = {}, {}
for axis, (scale, title) in zip(panels, ((0.5, "vanishes"), (1.5, "lasts"), (4.0, "explodes")), strict=True):
  params = init(jax.random.key(0), scale)
  heard[scale] = np.asarray(echoes(params, windows), np.float64)[:-1]
  norms[scale] = clipjax.global_norm(jax.grad(loss_fn)(params, batch(jax.random.key(7))))
  for i in range(LAYERS):
    axis.semilogy(np.arange(LENGTH - 1, 0, -1), heard[scale][:, i], label=f"layer {i + 1}")
  axis.set(title=f"Initial scale {scale:g}: {title}", xlabel="steps before the last", ylabel="norm", ylim=(1e-12, 1e12))
  print(f"scale {scale:g}: norm of the whole gradient {norms[scale]:.3g}")
panels[0].legend()
plt.show()
assert heard[0.5][-20].max() < 1e-3 * heard[0.5][-1].max()
assert heard[4.0][0].min() > 1e3 * heard[4.0][-1].max()
assert norms[0.5] < 10 < norms[4.0]

# %% [markdown]
# A clip helps against the panel on the right: there the norm of the whole gradient shows the trouble, and can be
# limited. It cannot help against the left one. There the norm of the whole gradient looks healthy, since the last few
# characters dominate it, while nothing at all is learned about what came long before. Against vanishing gradients help
# the initial scale, gates as in an LSTM, residual connections or attention.
#
# The norms by leaf say the same of the training runs, from `clipjax.watch`:

# %%
fig, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
leaves = [key for key in series["no clip"] if key.startswith("grad/norm/")]
for axis, (name, columns) in zip(panels, series.items(), strict=True):
  for key in leaves:
    axis.semilogy(columns[key][:100], label=key.removeprefix("grad/norm/"))
  axis.set(title=name, xlabel="step", ylabel="gradient norm of the leaf")
panels[1].legend(fontsize=8)
plt.show()
loudest = max(leaves, key=lambda key: series["no clip"][key][worst])
print(f"The largest of them at step {worst} without a clip: {loudest.removeprefix('grad/norm/')}")

# %% [markdown]
# ## To remember
#
# - Backpropagation through time multiplies by one Jacobian per step. Products of many of them explode or vanish.
# - An explosion is visible in the norm of the gradient, and a clip turns it into an ordinary step.
# - A vanishing gradient is not visible in the norm, and no clip repairs it. Look at norms per layer and per time.
# - Watch the norms of your own run with `clipjax.watch()` and `clipjax.metrics(opt_state, per_leaf=True)`.
#
# The threshold 0.25 fell from the sky here. How to choose one:
# [03_choosing_max_norm](03_choosing_max_norm.ipynb). The same network with a live table: `clipjax demo`, in the
# [README](../README.md).
