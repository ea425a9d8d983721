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
# A clip has one number, `max_norm`, and the right one depends on the model, the loss and the learning rate. This
# notebook records a run without a clip, reads the verdict on it, and takes a threshold from its norms. Then it trains
# 16 thresholds at once, and holds that threshold, and the rule-of-thumb table that is often passed on, against the
# measured curves of four models.
#
# ## Four small models
#
# A recurrent network and a Transformer learn the prose of Python's own documentation, character by character. A
# feed-forward net and a convolutional network (CNN) classify scikit-learn's digits. Each is a function that makes the
# weights, and one that gives the loss.

# %%
import math
import os
import tempfile
from functools import partial
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Image, Markdown
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import clipjax

os.chdir(tempfile.mkdtemp())  # For the files of the recorded run.
UNITS, LENGTH, WIDTH, HEADS, STEPS, FINAL, HE, SMALL = 64, 32, 32, 4, 120, 10, math.sqrt(2), 0.1
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
prose = "\n".join(topics.topics[name] for name in sorted(topics.topics))
codes = jnp.asarray(np.frombuffer(prose.encode("ascii", "replace"), np.uint8), jnp.int32)
images, labels = map(jnp.asarray, load_digits(return_X_y=True))


def text_batch(key):
  return codes[jax.random.randint(key, (8, 1), 0, codes.size - LENGTH) + jnp.arange(LENGTH + 1)]


def digits_batch(key):
  rows = jax.random.randint(key, (64,), 0, labels.size)
  return images[rows] / 16, labels[rows]


def matrices(**shapes):
  """A function that draws matrices `(rows, columns, gain)`, with a standard deviation of gain / sqrt(rows)."""

  def init(key):
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {n: jax.random.normal(keys[n], (a, b)) * gain / math.sqrt(a) for n, (a, b, gain) in shapes.items()}

  return init


def rnn_loss(params, windows):
  def cell(state, x):
    state = jnp.tanh(x + state @ params["recurrent"])
    return state, state

  x = params["embed"][windows[:, :-1].T]
  states = jax.lax.scan(cell, jnp.zeros(x.shape[1:]), x)[1]
  return cross_entropy(states @ params["out"], windows[:, 1:].T).mean()


def transformer_loss(params, windows):
  x = params["embed"][windows[:, :-1]] + params["positions"]
  for i in "12":
    qkv = (jax.nn.standardize(x) @ params["qkv" + i]).reshape(*x.shape[:2], 3, HEADS, -1)
    mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
    x = x + mixed.reshape(x.shape) @ params["mixed" + i]
    x = x + jax.nn.gelu(jax.nn.standardize(x) @ params["up" + i]) @ params["down" + i]
  return cross_entropy(jax.nn.standardize(x) @ params["out"], windows[:, 1:]).mean()


def mlp_loss(params, batch):
  hidden = jax.nn.relu(jax.nn.relu(batch[0] @ params["first"]) @ params["second"])
  return cross_entropy(hidden @ params["out"], batch[1]).mean()


def cnn_loss(params, batch):
  """Three convolutions of 3x3, written as products of matrices, the last two with stride 2."""
  x = batch[0].reshape(-1, 8, 8, 1)
  for name, stride in (("first", 1), ("second", 2), ("third", 2)):
    size = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + size : stride, j : j + size : stride] for i in range(3) for j in range(3)]
    x = jax.nn.relu(jnp.concatenate(parts, axis=-1) @ params[name])
  return cross_entropy(x.reshape(x.shape[0], -1) @ params["out"], batch[1]).mean()


block = {"qkv": (WIDTH, 3 * WIDTH, 1), "mixed": (WIDTH, WIDTH, 0.5), "up": (WIDTH, 4 * WIDTH, 1)}
blocks = {name + i: shape for i in "12" for name, shape in (block | {"down": (4 * WIDTH, WIDTH, 0.5)}).items()}
embed = {"embed": (128, WIDTH, 0.5 * math.sqrt(128)), "positions": (LENGTH, WIDTH, 0.5 * math.sqrt(LENGTH))}
rnn = matrices(embed=(128, UNITS, math.sqrt(128)), recurrent=(UNITS, UNITS, 0.5), out=(UNITS, 128, SMALL))
transformer = matrices(**embed, **blocks, out=(WIDTH, 128, SMALL))
mlp = matrices(first=(64, 128, HE), second=(128, 128, HE), out=(128, 10, HE))
cnn = matrices(first=(9, 8, HE), second=(72, 16, HE), third=(144, 32, HE), out=(128, 10, HE))
MODELS = {  # The initial weights, the loss, the batches, and the rule of thumb for the family.
  "rnn": (rnn, rnn_loss, text_batch, (0.25, 1.0)),
  "transformer": (transformer, transformer_loss, text_batch, (0.5, 2.0)),
  "feed-forward": (mlp, mlp_loss, digits_batch, (5.0, 10.0)),
  "cnn": (cnn, cnn_loss, digits_batch, (1.0, 5.0)),
}

# %% [markdown]
# ## Record a run, and read the verdict
#
# One training step serves the whole notebook. Here it runs in an ordinary loop, at a learning rate at which the
# recurrent network trains well without a clip: `max_norm` is infinity, so that the clip only measures. The `Recorder`
# writes a row for each step and never makes the loop wait.


# %%
def optimizer(max_norm, rate):
  return optax.chain(clipjax.clip_by_global_norm(max_norm), optax.sgd(rate, momentum=0.9))


@partial(jax.jit, static_argnames="name")
def step(name, params, opt_state, i, max_norm, rate):
  _, loss_fn, batch, _ = MODELS[name]
  loss, grads = jax.value_and_grad(loss_fn)(params, batch(jax.random.fold_in(jax.random.key(1), i)))
  updates, opt_state = optimizer(max_norm, rate).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


params = rnn(jax.random.key(0))
opt_state = optimizer(math.inf, 0.25).init(params)
with clipjax.runs.Recorder("run.jsonl") as recorder:
  for i in range(STEPS):
    params, opt_state, loss = step("rnn", params, opt_state, i, math.inf, 0.25)
    recorder.push(i, opt_state, params=params, loss=loss)
run = clipjax.runs.read_run("run.jsonl")
report = clipjax.runs.diagnose(run)
assert not [finding for finding in report.findings if finding.level == "FAIL"]
print(report)

# %% [markdown]
# `plot_norms` draws what the file holds, and `write_report` makes one HTML page: what happened and what to do, a
# timeline, the threshold and all the series.

# %%
clipjax.runs.write_report(run, "report.html")
clipjax.runs.plot_norms(run).savefig("norms.png", dpi=90)
Image("norms.png")

# %% [markdown]
# ## Ask for a threshold
#
# For the same learning rate the suggestion is the 90th percentile of the norms, of the steps in which the run learned.
# For another rate it keeps the *step budget*: the product of rate and threshold bounds how far one step can go.

# %%
print(clipjax.runs.suggest_max_norm(run, model="rnn"), end="\n\n")
print(clipjax.runs.suggest_max_norm(run, learning_rate=0.25, new_learning_rate=2.5).reason)

# %% [markdown]
# ## 16 thresholds at once
#
# Is it a good one? The way to know is to try. Thresholds are numbers in the optimizer, so `jax.vmap` trains many of
# them at once, in one compiled program: 16 thresholds, a factor of 2 apart, and beside them the suggestion, the middle
# of the rule of thumb, and no clip. Each model first takes as many learning rates without a clip. The best of them is
# its *base rate*, and the norms of that run are all that the suggestion may look at. Then come the thresholds, at the
# base rate and at ten times that, where a clip has something to do.


# %%
@partial(jax.jit, static_argnames="name")
def train(name, max_norms, rates):
  """Losses and norms of all lanes, of shape (lanes, steps)."""

  def one(max_norm, rate):
    def advance(carry, i):
      params, opt_state, loss = step(name, *carry, i, max_norm, rate)
      return (params, opt_state), (loss, clipjax.metrics(opt_state)["grad/norm"])

    params = MODELS[name][0](jax.random.key(0))
    return jax.lax.scan(advance, (params, optimizer(max_norm, rate).init(params)), jnp.arange(STEPS))[1]

  return jax.vmap(one)(max_norms, rates)


def final(losses):
  """Mean of the last steps; a run that is not finite counts as infinitely bad."""
  return np.nan_to_num(np.asarray(losses)[:, -FINAL:].mean(axis=1), nan=np.inf, posinf=np.inf)


THRESHOLDS, RATES, FACTORS = 2.0 ** np.arange(-10, 6), 2.0 ** np.arange(-7.5, 2, 0.5), (1, 10)
curves, rules = {}, {}
for name, (*_, (low, high)) in MODELS.items():
  losses, norms = train(name, np.full(RATES.size, np.inf), RATES)
  best = int(final(losses).argmin())
  base = RATES[best]
  for k in FACTORS:
    advice = clipjax.runs.suggest_max_norm(norms[best], learning_rate=base, new_learning_rate=k * base, model=name)
    assert f"{low:g} to {high:g}" in str(advice)  # The rule of thumb, as the suggestion quotes it.
    tried = np.array([advice.max_norm, math.sqrt(low * high), np.inf])
    ends = final(train(name, np.append(THRESHOLDS, tried), np.full(RATES.size, k * base))[0])
    curves[name, k], rules[name, k] = ends[: THRESHOLDS.size], (base, tried, ends[THRESHOLDS.size :])

# %%
fig, panels = plt.subplots(2, 2, figsize=(11, 8))
for axis, (name, (*_, (low, high))) in zip(panels.flat, MODELS.items(), strict=True):
  axis.axvspan(low, high, color="grey", alpha=0.25, label="rule of thumb")
  for k, colour in zip(FACTORS, ("#0072B2", "#D55E00"), strict=True):
    base, tried, losses = rules[name, k]
    axis.loglog(THRESHOLDS, np.minimum(curves[name, k], 1e3), "o-", color=colour, label=f"{k} times the base rate")
    star = {"markersize": 17, "markeredgecolor": "black", "label": f"suggested for {k} times"}
    axis.plot(tried[0], losses[0], "*", color=colour, **star)
  axis.set(title=f"{name}, base rate {base:.3g}", xlabel="max_norm", ylabel="final loss (nats)")
panels[0, 0].legend(fontsize=8)
fig.suptitle("The good thresholds move with the learning rate, the rule of thumb does not")
plt.show()

# %% [markdown]
# Stars are the suggestion, which knows the norms and the rate. At ten times the base rate they lie in the valleys,
# which are narrow. At the base rate no clip is needed: the suggestion shortens a tenth of the steps, which is a guard
# against worse ones and may cost a little. The grey band, the rule of thumb, knows neither the norms nor the rate.
#
# In the table a threshold *holds* where its loss is at most 5% or 0.05 nats above the best of the 16, whichever is
# more.

# %%
rows, held = [], []
for (name, k), (_, tried, losses) in rules.items():
  best = curves[name, k].min()
  limit = best + max(0.05 * best, 0.05)
  good = THRESHOLDS[curves[name, k] <= limit]
  held.append(losses <= limit)
  assert held[-1][2] == (k == 1)  # No clip holds at the base rate, and only there.
  assert k == 1 or (good.max() < 1 and not held[-1][1])  # Nor does the rule of thumb hold at the high one.
  cells = [f"{c:.2g}: {loss:.3g}{' holds' * bool(ok)}" for c, loss, ok in zip(tried, losses, held[-1], strict=True)]
  span = f"{good.size} of {THRESHOLDS.size}, from {good.min():.2g} to {good.max():.2g}"
  rows.append(f"| {name} | {k} | {best:.3g} | {span} | " + " | ".join(cells) + " |")
head = "| model | rate | best loss | thresholds that hold | suggested: loss | rule of thumb, middle: loss | no clip |"
suggested, thumb, none = np.sum(held, axis=0)
assert suggested >= len(rows) - 2  # A single seed may be unlucky.
assert suggested > max(thumb, none) + 1
summary = f"Of {len(rows)} cells the suggestion holds in {suggested}, the rule of thumb in {thumb}, no clip in {none}."
Markdown("\n".join([head, "|" + "---|" * 7, *rows, "", summary]))

# %% [markdown]
# What you see:
#
# - At the base rate nearly every threshold will do that is large enough, and so will no clip at all. A rule of thumb is
#   easily right where a clip is not needed.
# - At ten times the rate only thresholds below 1 hold, on all four models. A table by model family cannot know that.
# - To the left of the valley training is slow, to the right it breaks. If you can afford more than one run, try half
#   of the suggestion and twice as much too.
#
# This is one seed and SGD with momentum. How the advice fares on six other models with five seeds, under SGD, Adam and
# Lion, and what a clip insures against where none is needed, is in [docs/choosing.md](../docs/choosing.md).
#
# ## What to do
#
# 1. Train for a while at a rate that works, with `clip_by_global_norm(float("inf"))` and a `Recorder`.
# 2. Read `diagnose`. A run that diverged is no base for a threshold.
# 3. Take `suggest_max_norm`, with both learning rates if you change the rate. Under Adam and its like record at the
#    rate that you will train at: no number is known to carry over to another one.
# 4. If it matters, try a few thresholds around it, under `vmap` if the model is small.
#
# From a shell: `clipjax report run.jsonl` and `clipjax suggest run.jsonl`. Thresholds that adapt by themselves:
# [04_adaptive_clipping](04_adaptive_clipping.ipynb).
