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
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import clipjax

UNITS, LENGTH, BATCH, CHARACTERS, LAYERS, STEPS, LEARNING_RATE = 64, 60, 32, 128, 2, 300, 1.0
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "black"])
prose = "\n".join(topics.topics[name] for name in sorted(topics.topics))
codes = jnp.asarray(np.frombuffer(prose.encode("ascii", "replace"), np.uint8), jnp.int32)


def init(key, scale=1.5):
  # `scale` is about the largest absolute eigenvalue of the recurrent matrices.
  shapes = {"embed": (CHARACTERS, UNITS, 1.0), "out": (UNITS, CHARACTERS, 0.01)}
  for i in range(LAYERS):
    shapes |= {f"input_{i + 1}": (UNITS, UNITS, UNITS**-0.5), f"recurrent_{i + 1}": (UNITS, UNITS, scale * UNITS**-0.5)}
  keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
  return {name: jax.random.normal(keys[name], shape) * gain for name, (*shape, gain) in shapes.items()}


def cell(params, state, x):
  # `state` has the shape (layers, ..., units).
  states = []
  for i in range(LAYERS):
    x = jnp.tanh(x @ params[f"input_{i + 1}"] + state[i] @ params[f"recurrent_{i + 1}"])
    states.append(x)
  return jnp.stack(states)


def unroll(params, inputs, nudges):
  # The states of the top layer at each time, with `nudges` added to the states of all layers.
  def advance(state, now):
    state = cell(params, state, now[0]) + now[1]
    return state, state[-1]

  return jax.lax.scan(advance, jnp.zeros(nudges.shape[1:]), (params["embed"][inputs], nudges))[1]


def loss_fn(params, windows):
  top = unroll(params, windows[:, :-1].T, jnp.zeros((LENGTH, LAYERS, BATCH, UNITS)))
  return cross_entropy(top @ params["out"], windows[:, 1:].T).mean()


def batch(key):
  return codes[jax.random.randint(key, (BATCH, 1), 0, codes.size - LENGTH) + jnp.arange(LENGTH + 1)]


# %% [markdown]
# ## With and without
#
# Two runs start from the same weights and see the same batches. The only difference is `max_norm`: infinity, which
# only measures, and 0.5. `clipjax.watch` adds the norm of each leaf to the state, and `clipjax.metrics` reads it. Run
# the cell in a notebook and the two curves grow while the networks train.


# %%
def optimizer(max_norm):
  return optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(max_norm), optax.sgd(LEARNING_RATE, momentum=0.9))


@jax.jit
def step(params, opt_state, max_norm, i):
  # `max_norm` is an argument, so that both runs share one compilation.
  loss, grads = jax.value_and_grad(loss_fn)(params, batch(jax.random.fold_in(jax.random.key(1), i)))
  updates, opt_state = optimizer(max_norm).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, {"loss": loss, **clipjax.metrics(opt_state, per_leaf=True)}


start = init(jax.random.key(0))
LIMIT, CLIPPED = 0.5, "max_norm = 0.5"
runs = {"no clip": math.inf, CLIPPED: LIMIT}
weights, rows = {name: [start] for name in runs}, {name: [] for name in runs}
states = {name: optimizer(1.0).init(start) for name in runs}
fig, axes = plt.subplots(2, 1, figsize=(9, 5.6), sharex=True)
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
        axis.plot(columns[key], label=name, linewidth=1.2)
    axes[0].set(ylabel="loss (nats per character)", title="Without a clip the norm explodes, and the loss stays high")
    axes[1].set(xlabel="step", ylabel="gradient norm before the clip", yscale="log")
    axes[1].axhline(LIMIT, color="black", linestyle="--", label=f"the limit {LIMIT}")
    axes[1].legend(loc="upper right")
    picture.update(fig)
plt.close(fig)

worst = int(series["no clip"]["grad/norm"].argmax())
final = {name: columns["loss"][-20:].mean() for name, columns in series.items()}
for name, columns in series.items():
  early, late = (np.mean(columns["grad/norm"][part] > LIMIT) for part in (slice(100), slice(-100, None)))
  print(f"{name:15} last losses {final[name]:.2f}, largest norm {columns['grad/norm'].max():.3g}", end=", ")
  print(f"above {LIMIT} in {early:.0%} of the first and {late:.0%} of the last 100 steps")
print(f"The largest norm without a clip is that of step {worst}. A blind guess costs {math.log(CHARACTERS):.2f} nats.")
assert worst < 20
assert final["no clip"] > math.log(CHARACTERS) > 2 * final[CLIPPED]
assert series["no clip"]["grad/norm"][worst] > 1e6 > 1e5 * series[CLIPPED]["grad/norm"].max()
assert late < 0.25 < early / 2

# %% [markdown]
# Both runs begin alike, and within the first twenty steps the norm of the unclipped one jumps by many orders of
# magnitude. The step that follows is as long as that norm. It throws the weights so far away that the loss ends above
# that of a blind guess among all characters, and nothing repairs it.
#
# The clipped run meets norms above its limit as well, at more than half of its early steps. But its steps there are
# short, so it never comes to weights where the norm explodes. Once it is past the steep part, most of its gradients
# are below the limit, and the clip leaves them alone.
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
# product grows like a power of it; a little less than 1, and it shrinks like one. Here it is, measured on the very
# batch of the explosion, for several initial weights and then for the weights of the two runs. Its norm is that of all
# entries, divided by that of the identity: how much a random change grows. We average it over the windows of the batch
# (as the root of the mean square).


# %%
@jax.jit
def growth(params, windows):
  def advance(carry, x):
    state, product = carry
    product = jax.jacfwd(cell, argnums=1)(params, state, x).reshape(product.shape) @ product
    return (cell(params, state, x), product), clipjax.global_norm(product) / math.sqrt(state.size)

  def one(window):
    carry = jnp.zeros((LAYERS, UNITS)), jnp.eye(LAYERS * UNITS)
    return jax.lax.scan(advance, carry, params["embed"][window[:-1]])[1]

  return jax.vmap(clipjax.global_norm, in_axes=1)(jax.vmap(one)(windows)) / math.sqrt(len(windows))


windows = batch(jax.random.fold_in(jax.random.key(1), worst))  # Those that the step with the largest norm has seen.
at_start = {f"scale {x:g}": growth(init(jax.random.key(0), x), windows) for x in (0.5, 1.0, 1.5, 2.0, 4.0)}
moments = [("no clip", worst), ("no clip", worst - 1), ("no clip", 0), (CLIPPED, STEPS), ("no clip", STEPS)]
in_training = {f"{name}, step {i}": growth(weights[name][i], windows) for name, i in moments}
fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
titles = ("Initial weights: about the same factor at each step", f"In training: the product explodes at step {worst}")
for axis, lines, title in zip(axes, (at_start, in_training), titles, strict=True):
  for label, line in lines.items():
    axis.semilogy(np.arange(1, LENGTH + 1), np.maximum(line, 1e-30), label=label)
  axis.set(xlabel="steps unrolled", ylabel="norm of the Jacobian product", title=title, ylim=(1e-25, 1e15))
  axis.legend(fontsize=8, loc="lower left")
plt.show()

for label, line in (at_start | in_training).items():
  print(f"{label:24} {LENGTH} steps multiply by {line[-1]:.1e}, that is by {line[-1] ** (1 / LENGTH):.2f} each")
ends = [float(line[-1]) for line in in_training.values()]
assert ends == sorted(ends, reverse=True)
assert ends[0] > 1e6 > 1e4 * ends[1]
assert in_training[f"no clip, step {STEPS}"][9] < 1e-6
assert at_start["scale 0.5"][-1] < 1e-9 < at_start["scale 1.5"][-1] < 1 < at_start["scale 2"][-1] / 100

# %% [markdown]
# On the log axis the curves on the left are nearly straight lines: a power of the length, as the argument says. With a
# small initial scale the product *vanishes*, with a large one it *explodes*. There is only a narrow band in between.
# Note that the scale at which the product grows is above 1: tanh flattens large states, and that shrinks each factor.
#
# On the right, the two runs, on the same batch. They start in the narrow band. One step before its explosion the
# unclipped network still has a product of ordinary size. At that step it explodes, and the gradient with it. The giant
# step that follows drives the units to where tanh is flat, and each factor is close to zero there. At the end its
# product is gone within ten steps: what the network could still learn from reaches back a few characters only.
#
# The product of the clipped run shrinks as well, though far more slowly. A clip does not keep long memories alive.
#
# ## Seen per layer and per time
#
# Which moments of the past does the loss of the *last* character still hear of? The gradient with respect to the state
# of each layer at each time says so. `nudges` above are zeros that were added to the states to make it measurable.


# %%
@jax.jit
def echoes(params, windows):
  # Mean norm over the windows, shape (length, layers).
  def last_loss(nudges, window):
    return cross_entropy(unroll(params, window[:-1], nudges)[-1] @ params["out"], window[-1])

  grads = jax.vmap(jax.grad(last_loss), (None, 0))(jnp.zeros((LENGTH, LAYERS, UNITS)), windows)
  return jnp.linalg.norm(grads, axis=-1).mean(0)


fig, panels = plt.subplots(1, 3, figsize=(12, 3.9), sharex=True, sharey=True)
heard, norms = {}, {}
for axis, (scale, title) in zip(panels, ((0.5, "vanishes"), (1.5, "fades slowly"), (4.0, "explodes")), strict=True):
  params = init(jax.random.key(0), scale)
  heard[scale] = np.asarray(echoes(params, windows), np.float64)[:-1]
  norms[scale] = clipjax.global_norm(jax.grad(loss_fn)(params, windows))
  for i in range(LAYERS):
    axis.semilogy(np.arange(LENGTH - 1, 0, -1), heard[scale][:, i], label=f"layer {i + 1}")
  axis.set(title=f"Initial scale {scale:g}: it {title}", xlabel="characters before the last", ylim=(1e-12, 1e12))
  print(f"scale {scale:g}: norm of the gradient of all weights {norms[scale]:.3g}")
panels[0].set(ylabel="norm of the gradient by the state")
panels[0].legend()
plt.show()
assert heard[0.5][-20].max() < 1e-6 * heard[0.5][-1].max()
assert 1e-4 < heard[1.5][0].max() / heard[1.5][-1].max() < 1
assert heard[4.0][0].min() > 1e6 * heard[4.0][-1].max()
assert 0.5 < norms[0.5] / norms[1.5] < 2
assert norms[4.0] > 1e6

# %% [markdown]
# A clip helps against the panel on the right: there the norm of the gradient of all weights shows the trouble, and can
# be limited. It cannot help against the left one. The norm of all weights looks healthy there, about as large as that
# of the middle panel, since the last few characters make most of it. But nothing at all is learned about what came long
# before. What helps against vanishing gradients is the initial scale, gates as in an LSTM, residual connections or
# attention.
#
# ## Seen per leaf, in training
#
# `clipjax.watch` has kept the norm of each leaf, so we can ask which weights the explosion came through.

# %%
fig, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
leaves = [key for key in series["no clip"] if key.startswith("grad/norm/")]
titles = ("No clip: layer 1 explodes, then gets hardly any gradient", f"{CLIPPED}: no leaf explodes")
for axis, columns, title in zip(panels, series.values(), titles, strict=True):
  for key in leaves:
    axis.semilogy(columns[key][:60], label=key.removeprefix("grad/norm/"), linewidth=1.2)
  axis.set(title=title, xlabel="step", ylabel="gradient norm of the leaf", ylim=(1e-3, 1e11))
panels[1].legend(fontsize=8, ncols=2)
plt.show()
jump = {key: series["no clip"][key][worst] / series["no clip"][key][:worst].max() for key in leaves}
for key, factor in jump.items():
  print(f"{key.removeprefix('grad/norm/'):12} step {worst} against the largest before: times {factor:.3g}")
assert {key.split("/")[-1] for key in leaves if jump[key] > 1e6} == {"embed", "input_1", "recurrent_1"}
assert sorted(jump.values())[2] < 1  # The three others were larger before.
silent = np.mean(series["no clip"]["grad/norm/recurrent_1"][worst + 1 :] < 1e-3)
print(f"after that the norm of recurrent_1 is below 0.001 in {silent:.0%} of the steps")
assert silent > 0.9

# %% [markdown]
# The leaves that explode are those whose gradient comes back through the recurrence of layer 1: its two matrices, and
# the embedding below it. Layer 2 and `out` saw larger gradients before that step. So one recurrence broke, not both,
# and the norms by leaf say which. After the giant step hardly any gradient arrives there at all: the explosion has
# turned into vanishing. The clip by the global norm does not need to know: it shortens the whole step.
#
# ## To remember
#
# - Backpropagation through time multiplies by one Jacobian per step. Products of many of them explode or vanish.
# - An explosion is visible in the norm of the gradient, and a clip turns it into an ordinary step.
# - A vanishing gradient is not visible in the norm, and no clip repairs it. Look at norms per layer and per time.
# - Watch the norms of your own run with `clipjax.watch()` and `clipjax.metrics(opt_state, per_leaf=True)`.
#
# The threshold 0.5 fell from the sky here. How to choose one:
# [03_choosing_max_norm](03_choosing_max_norm.ipynb). A network of this kind with a live table: `clipjax demo`, in
# the [README](../README.md).
