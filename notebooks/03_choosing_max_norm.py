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
# # Which threshold should I use?
#
# A clip has one number, `max_norm`. The right one depends on the model, the loss and the learning rate. This notebook
# records a run without a clip, reads the verdict on it, and takes a threshold from its norms. Then it trains 12
# thresholds at once, and compares the suggestion, and a popular rule of thumb, with the measured curves of four models.
#
# The models are in [four_models.py](four_models.py). A recurrent network and a Transformer learn the prose of
# Python's own documentation, character by character. A feed-forward net and a convolutional network (CNN) classify
# scikit-learn's digits.

# %%
import math
import os
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from four_models import MODELS, draw_curves, table
from IPython.display import Image, Markdown

import clipjax

os.chdir(tempfile.mkdtemp())  # The files of the recorded run go there.
STEPS, FINAL = 120, 10

# %% [markdown]
# ## Record a run, and read the verdict
#
# One training step serves the whole notebook. Here it runs in an ordinary loop, at a learning rate at which the
# recurrent network trains well without a clip. `max_norm` is infinity, so the clip only measures. The `Recorder` writes
# a row per step. `push` waits only if the device is more than `2 * every` steps behind, which is 100 by default.


# %%
def optimizer(max_norm, rate):
  return optax.chain(clipjax.clip_by_global_norm(max_norm), optax.sgd(rate, momentum=0.9))


@partial(jax.jit, static_argnames="name")
def step(name, params, opt_state, i, max_norm, rate):
  batch = MODELS[name].batch(jax.random.fold_in(jax.random.key(1), i))
  loss, grads = jax.value_and_grad(MODELS[name].loss_fn)(params, batch)
  updates, opt_state = optimizer(max_norm, rate).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


params = MODELS["rnn"].init(jax.random.key(0))
opt_state = optimizer(math.inf, 0.25).init(params)
with clipjax.runs.Recorder("run.jsonl") as recorder:
  for i in range(STEPS):
    params, opt_state, loss = step("rnn", params, opt_state, i, math.inf, 0.25)
    recorder.push(i, opt_state, params=params, loss=loss)
run = clipjax.runs.read_run("run.jsonl")
report = clipjax.runs.diagnose(run)
print(report)

# %% [markdown]
# No FAIL and no WARN: this run is a sound basis for a threshold. `plot_norms` draws what the file holds, and
# `write_report` makes one HTML page with what happened, what to do, the threshold and all series.

# %%
clipjax.runs.write_report(run, "report.html")
clipjax.runs.plot_norms(run).savefig("norms.png", dpi=90)
Image("norms.png")

# %% [markdown]
# ## Ask for a threshold
#
# For the same learning rate, the suggestion is the 90th percentile of the norms while the run was learning. For another
# rate it keeps the *step budget*: under SGD, the product of rate and threshold bounds how far one step can go.

# %%
print(clipjax.runs.suggest_max_norm(run, model="rnn"), end="\n\n")
print(clipjax.runs.suggest_max_norm(run, learning_rate=0.25, new_learning_rate=2.5).reason)

# %% [markdown]
# ## 12 thresholds at once
#
# Is it a good threshold? Try it. `max_norm` may be a traced number, so `jax.vmap` trains many thresholds at once in one
# compiled program: 12 of them, a factor of 2 apart, and beside them the suggestion, the middle of the rule of thumb,
# and no clip.
#
# Each model first tries 15 learning rates without a clip. The best of them is its *base rate*, and the suggestion sees
# only the norms of that run. Then come the thresholds, at the base rate and at ten times that, where a clip has
# something to do.


# %%
@partial(jax.jit, static_argnames="name")
def train(name, max_norms, rates):
  def one(max_norm, rate):
    def advance(carry, i):
      params, opt_state, loss = step(name, *carry, i, max_norm, rate)
      return (params, opt_state), (loss, clipjax.metrics(opt_state)["grad/norm"])

    params = MODELS[name].init(jax.random.key(0))
    return jax.lax.scan(advance, (params, optimizer(max_norm, rate).init(params)), jnp.arange(STEPS))[1]

  return jax.vmap(one)(max_norms, rates)  # Losses and norms, shape (thresholds, steps).


def final(losses):  # A run that is not finite counts as infinitely bad.
  return np.nan_to_num(np.asarray(losses)[:, -FINAL:].mean(axis=1), nan=np.inf, posinf=np.inf)


THRESHOLDS, RATES = 2.0 ** np.arange(-8, 4), 2.0 ** np.arange(-6, 1.5, 0.5)
cells = {}
for name, model in MODELS.items():
  losses, norms = train(name, np.full(RATES.size, np.inf), RATES)
  best = int(final(losses).argmin())
  base = RATES[best]
  for k in (1, 10):
    advice = clipjax.runs.suggest_max_norm(norms[best], learning_rate=base, new_learning_rate=k * base, model=name)
    tried = np.array([advice.max_norm, math.sqrt(math.prod(model.thumb)), np.inf])
    ends = final(train(name, np.append(THRESHOLDS, tried), np.full(RATES.size, k * base))[0])
    cells[name, k] = base, ends[: THRESHOLDS.size], tried, ends[THRESHOLDS.size :]
draw_curves(THRESHOLDS, cells)

# %% [markdown]
# The stars are the suggestion, which knows the norms and the rate. At ten times the base rate they lie in the valleys,
# which are narrow. At the base rate no clip is needed. There the suggestion is a guard against bad batches, and
# shortening a tenth of the steps may cost a little. The grey band, the rule of thumb, knows neither norms nor rate.
#
# In the table, a threshold *holds* if its loss is at most 5% or 0.05 nats above the best of the 12, whichever is more.

# %%
limits = {cell: losses.min() + max(0.05 * losses.min(), 0.05) for cell, (_, losses, _, _) in cells.items()}
good = {cell: cells[cell][1] <= limit for cell, limit in limits.items()}
holds = {cell: cells[cell][3] <= limit for cell, limit in limits.items()}
suggested, thumb, none = np.sum(list(holds.values()), axis=0)
summary = f"Of {len(cells)} cells the suggestion holds in {suggested}, the rule of thumb in {thumb}, no clip in {none}."
Markdown(table(THRESHOLDS, cells, holds, good) + "\n\n" + summary)

# %% [markdown]
# What you see:
#
# - At the base rate, nearly every threshold works that is large enough, and so does no clip at all. A rule of thumb is
#   easily right where no clip is needed.
# - At ten times the rate, only thresholds below 1 hold, on all four models. A table by model family cannot know that.
# - To the left of the valley training is slow, to the right it breaks. If you can afford more than one run, try half
#   and twice the suggestion too.
#
# This is one seed and SGD with momentum. [docs/choosing.md](../docs/choosing.md) has six other models with five seeds,
# under SGD, Adam and Lion, and shows what a clip insures against where none is needed.
#
# ## What to do
#
# 1. Train for a while at a rate that works, with `clip_by_global_norm(float("inf"))` and a `Recorder`.
# 2. Read `diagnose`. A run that diverged is no basis for a threshold.
# 3. Call `suggest_max_norm`, with both learning rates if you change the rate. For Adam and similar optimizers, record
#    at the rate that you will train at: no known number carries over to another rate.
# 4. If it matters, try a few thresholds around it, under `vmap` if the model is small.
#
# From a shell: `clipjax report run.jsonl` and `clipjax suggest run.jsonl`. For thresholds that adapt by themselves, see
# [04_adaptive_clipping](04_adaptive_clipping.ipynb).
