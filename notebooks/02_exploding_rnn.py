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
# A recurrent network reads a text one character at a time, with the same weights at every step. Its gradient travels
# back through all those steps, and each step multiplies it by a matrix. Products of many matrices become very large or
# very small. This notebook trains a small network on real text with and without a clip, looks at the product of
# matrices itself, and then at what reaches each layer at each time.
#
# The network has two layers of 64 tanh units and predicts the next character of the prose in Python's own
# documentation, 60 characters at a time. It is in [recurrent.py](recurrent.py), with the code that draws.

# %%
import math

import jax
import numpy as np
import optax
import recurrent
from recurrent import CHARACTERS, LENGTH, batch_of, init_params, jacobian_growth, loss_fn, state_gradients

import clipjax

# %% [markdown]
# ## With and without
#
# Two runs start from the same weights and see the same batches. Only `max_norm` differs: 0.5, and infinity, which
# measures and never clips. `clipjax.watch` adds the norm of each leaf to the state, and `clipjax.metrics` reads it.

# %%
STEPS, LIMIT = 200, 0.5


def optimizer(max_norm):
  return optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(max_norm), optax.sgd(1.0, momentum=0.9))


@jax.jit
def step(params, opt_state, max_norm, i):  # `max_norm` is an argument: both runs share one compilation.
  loss, grads = jax.value_and_grad(loss_fn)(params, batch_of(i))
  updates, opt_state = optimizer(max_norm).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, {"loss": loss, **clipjax.metrics(opt_state, per_leaf=True)}


def train(max_norm):
  weights, rows = [init_params(jax.random.key(0))], []
  opt_state = optimizer(max_norm).init(weights[0])
  for i in range(STEPS):
    params, opt_state, row = step(weights[-1], opt_state, max_norm, i)
    weights.append(params)
    rows.append(row)
  return weights, jax.tree.map(lambda *values: np.array(values), *jax.device_get(rows))


CLIPPED = f"max_norm = {LIMIT}"
weights, series = {}, {}
for name, max_norm in {"no clip": math.inf, CLIPPED: LIMIT}.items():
  weights[name], series[name] = train(max_norm)
recurrent.draw_runs(series, LIMIT)

final = {name: columns["loss"][-20:].mean() for name, columns in series.items()}
above = {name: columns["grad/norm"] > LIMIT for name, columns in series.items()}
worst = int(series["no clip"]["grad/norm"].argmax())
for name, columns in series.items():
  print(f"{name:15} last losses {final[name]:.2f}, largest norm {columns['grad/norm'].max():.3g}", end=", ")
  print(
    f"above {LIMIT} in {above[name][:50].mean():.0%} of the first and {above[name][-50:].mean():.0%} of the last 50"
  )
print(f"The largest norm without a clip is at step {worst}. A blind guess costs {math.log(CHARACTERS):.2f} nats.")

# %% [markdown]
# Both runs begin alike. Within the first twenty steps the norm of the unclipped run jumps by many orders of magnitude.
# The step that follows is just as long. It throws the weights so far away that the loss ends above the cost of a blind
# guess, and nothing repairs it.
#
# The clipped run meets norms above its limit too, in most of its early steps. But its steps there are short, and it
# never reaches weights where the norm explodes. Later most gradients are below the limit, and the clip leaves them
# alone.
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
# product grows exponentially; a little less than 1, and it shrinks exponentially. `jacobian_growth` measures how much
# the product stretches a random change, on the batch of the explosion. On the left are initial weights of several
# scales, on the right the weights of the two runs.

# %%
windows = batch_of(worst)
at_start = {f"scale {x:g}": jacobian_growth(init_params(jax.random.key(0), x), windows) for x in (0.5, 1, 1.5, 2, 4)}
moments = [("no clip", worst), ("no clip", worst - 1), ("no clip", 0), (CLIPPED, STEPS), ("no clip", STEPS)]
in_training = {f"{name}, step {i}": jacobian_growth(weights[name][i], windows) for name, i in moments}
titles = "Initial weights: about the same factor at each step", f"In training: the product explodes at step {worst}"
recurrent.draw_growth(at_start, in_training, titles)
for label, line in (at_start | in_training).items():
  print(f"{label:24} {LENGTH} steps multiply by {line[-1]:.1e}, or {line[-1] ** (1 / LENGTH):.2f} each")

# %% [markdown]
# The curves on the left are nearly straight on the log axis: exponentials, as predicted. At a small initial scale the
# product *vanishes*, at a large one it *explodes*, and the band in between is narrow. The scale at which the product
# starts to grow is above 1, because tanh flattens large states and so shrinks each factor.
#
# On the right, both runs start inside the narrow band. One step before the explosion, the product of the unclipped
# network is still of ordinary size. The giant step that follows the explosion drives the units to where tanh is flat,
# and every factor is close to zero there. At the end the product is gone within ten steps: the network can only learn
# from the last few characters.
#
# The product of the clipped run shrinks as well, but far more slowly. A clip does not keep long memories alive.
#
# ## Seen per layer and per time step
#
# How far back does the loss of the *last* character reach? The gradient by the state of each layer at each time tells.

# %%
heard, norms = {}, {}
for scale in (0.5, 1.5, 4.0):
  params = init_params(jax.random.key(0), scale)
  heard[scale] = np.asarray(state_gradients(params, windows), np.float64)[:-1]
  norms[scale] = clipjax.global_norm(jax.grad(loss_fn)(params, windows))
  print(f"scale {scale:g}: norm of the gradient of all weights {norms[scale]:.3g}")
recurrent.draw_echoes(heard, ("vanishes", "fades slowly", "explodes"))

# %% [markdown]
# A clip helps in the panel on the right: the norm of all weights shows the trouble, and the clip limits it. It cannot
# help on the left. There the norm of all weights looks healthy, about as large as in the middle, because the last few
# characters contribute most of it. Yet the network learns nothing about what came long before. Remedies for vanishing
# gradients are the initial scale, gates as in an LSTM, residual connections, or attention.
#
# ## Seen per leaf, in training
#
# `clipjax.watch` kept the norm of each leaf. It shows which weights the explosion came through.

# %%
titles = "No clip: layer 1 explodes, then gets hardly any gradient", f"{CLIPPED}: no leaf explodes"
recurrent.draw_leaves(series, 60, titles)
leaves = [key for key in series["no clip"] if key.startswith("grad/norm/")]
jump = {key: series["no clip"][key][worst] / series["no clip"][key][:worst].max() for key in leaves}
for key, factor in jump.items():
  print(f"{key.removeprefix('grad/norm/'):12} step {worst} against the largest before: times {factor:.3g}")
silent = np.mean(series["no clip"]["grad/norm/recurrent_1"][worst + 1 :] < 1e-3)
print(f"after that, the norm of recurrent_1 is below 0.001 in {silent:.0%} of the steps")

# %% [markdown]
# Three leaves explode: both matrices of layer 1, and the embedding below it. Their gradients come back through the
# recurrence of layer 1. Layer 2 and `out` saw larger gradients before that step. So one recurrence broke, not both, and
# the norms per leaf say which. After the giant step hardly any gradient arrives there: the explosion has turned into
# vanishing. A clip by the global norm need not know all this. It shortens the whole step.
#
# ## To remember
#
# - Backpropagation through time multiplies by one Jacobian per step. Products of many Jacobians explode or vanish.
# - An explosion shows in the norm of the gradient, and a clip turns it into an ordinary step.
# - A vanishing gradient does not show in the global norm, and no clip repairs it. Look at norms per layer and per time
#   step.
# - Watch the norms of your own run with `clipjax.watch()` and `clipjax.metrics(opt_state, per_leaf=True)`.
#
# We simply picked the threshold 0.5 here. To choose one, see [03_choosing_max_norm](03_choosing_max_norm.ipynb). For a
# network of this kind with a live table, run `clipjax demo` ([README](../README.md)).
