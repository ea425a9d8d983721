# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does a clip do under SGD, momentum, Adam, Lion and Muon?
#
# A clip shortens the gradient. What trains is the step, and the optimizer makes it from the gradient. So the same
# `max_norm` can mean a lower learning rate, another direction, or nothing at all.
# `clipjax.clip_effect(clip, optimizer)` is `optax.chain(clip, optimizer)` with a second optimizer state beside it,
# which sees the gradient without the clip. It compares the two steps, globally and for each leaf:
#
# - the **ratio** of their lengths: below 1 the clip shortens the step;
# - the **cosine** between them: below 1 the clip turns the step.
#
# ## Paragraphs of unequal length
#
# A small network reads four characters of the prose in Python's own documentation and predicts the next one. A batch is
# one paragraph, and its loss is a sum over characters: a paragraph of 2000 characters counts twenty times as much as
# one of 100. (The network looks at the first 64 of them and weighs their mean.) The norms of the gradients vary as the
# lengths do, without any fault in the data.

# %%
import re
from functools import partial
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import clipjax

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
CONTEXT, WINDOW, WIDTH, HIDDEN, HELD_OUT, STEPS, START = 4, 64, 8, 32, 400, 300, 100

prose = [p for name in sorted(topics.topics) for p in re.split(r"\n\s*\n", topics.topics[name]) if p.strip()]
prose = [prose[i] for i in np.random.default_rng(0).permutation(len(prose))]
characters = np.array([len(p) for p in prose], np.float32)
codes = np.zeros((len(prose), CONTEXT + WINDOW), np.int32)  # 0 stands before a paragraph, and fills up behind it.
for row, paragraph in zip(codes, prose, strict=True):
  row[CONTEXT:][: len(paragraph)] = np.frombuffer(paragraph.encode("ascii", "replace")[:WINDOW], np.uint8)
codes, weights = jnp.asarray(codes), jnp.asarray(characters / characters.mean())


def init(key):
  embed, hidden, out = jax.random.split(key, 3)
  return {
    "embed": jax.random.normal(embed, (128, WIDTH)),
    "hidden": jax.random.normal(hidden, (CONTEXT * WIDTH, HIDDEN)) * (2 / CONTEXT / WIDTH) ** 0.5,
    "out": jax.random.normal(out, (HIDDEN, 128)) * 0.01,
  }


def loss_fn(params, i):
  """Mean loss of a paragraph's characters, times its length over the usual length: a sum over characters."""
  x, y = params["embed"][codes[i]], codes[i, CONTEXT:]
  x = jnp.concatenate([x[k : k + WINDOW] for k in range(CONTEXT)], axis=-1)
  logits = jax.nn.relu(x @ params["hidden"]) @ params["out"]
  return weights[i] * optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(where=y > 0)


def held_out_loss(params):
  losses = jax.vmap(loss_fn, (None, 0))(params, jnp.arange(HELD_OUT))
  return losses.sum() / weights[:HELD_OUT].sum()  # By character, as the training weighs them.


print("characters, percentiles 1, 10, 50, 90, 99, 100:", *np.percentile(characters, (1, 10, 50, 90, 99, 100)).round())

# %% [markdown]
# ## Five optimizers, six limits
#
# `train` runs all settings and seeds of one optimizer at once: `vmap` over them, and `lax.scan` over the steps. The
# numbers come out of the state of `clip_effect`. A limit of infinity never clips. The last argument plants a fault that
# we need later on.

# %%
OPTIMIZERS = {  # And the rate at which it trains well without a clip.
  "SGD": (optax.sgd, 0.05),
  "momentum": (partial(optax.sgd, momentum=0.9), 0.005),
  "Adam": (optax.adam, 0.01),
  "Lion": (optax.lion, 0.002),
  "Muon": (optax.contrib.muon, 0.015),
}
RATES = np.array([1 / 16, 1 / 4, 1 / 2, 1, 2, 4])
SEEDS, LEAVES = 3, ("embed", "hidden", "out")  # In the order of the tree.


@partial(jax.jit, static_argnums=0)
def train(name, limits, leaf_limits, rates, planted):
  """All numbers of each step, and the loss afterwards, for each setting and seed."""

  def one(seed, limit, leaf_limit, rate):
    clip = optax.chain(clipjax.clip_by_global_norm(limit), clipjax.clip_by_leaf_norm(leaf_limit))
    tx = clipjax.clip_effect(clip, OPTIMIZERS[name][0](OPTIMIZERS[name][1] * rate))
    params = init(jax.random.key(seed))

    def step(carry, key):
      params, state = carry
      draw, fault = jax.random.split(key)
      grads = jax.grad(loss_fn)(params, jax.random.randint(draw, (), HELD_OUT, len(prose)))
      grads["embed"] *= jnp.where(planted, 100 * jnp.exp(2 * jax.random.normal(fault)), 1)
      updates, state = tx.update(grads, state, params)
      seen = {"norm": optax.global_norm(grads), "ratio": state.ratio, "cosine": state.cosine}
      return (optax.apply_updates(params, updates), state), seen | {"ratios": state.ratios, "cosines": state.cosines}

    (params, _), seen = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(seed), STEPS))
    return seen | {"loss": held_out_loss(params)}

  over_seeds = partial(jax.vmap(one, (0, None, None, None)), jnp.arange(SEEDS))
  return jax.vmap(over_seeds)(limits, leaf_limits, rates)


def run(name, limit=np.inf, leaf_limit=np.inf, rate=1.0, planted=False):
  """As NumPy arrays of shape (settings, seeds, steps); a limit of infinity never clips."""
  *settings, _ = np.broadcast_arrays(*map(np.float32, (limit, leaf_limit, rate)), RATES)
  return jax.tree.map(np.asarray, train(name, *settings, planted))


# %% [markdown]
# First without a clip, at six learning rates. The norms at the base rate have percentiles, and these give the limits:
# from eight times the 90th percentile down to a tenth of the 10th.

# %%
NAMED = "8 p90", "2 p90", "p90", "p50", "p10", "p10 / 10"
unclipped = {name: run(name, rate=RATES) for name in OPTIMIZERS}
limits, clipped = {}, {}
for name in OPTIMIZERS:
  p10, p50, p90 = np.percentile(unclipped[name]["norm"][RATES == 1, :, START:], (10, 50, 90))
  limits[name] = np.array([8 * p90, 2 * p90, p90, p50, p10, p10 / 10])
  clipped[name] = run(name, limits[name])


def usual(numbers):
  """The median over seeds and over the steps from START on."""
  return np.median(numbers[:, :, START:], axis=(1, 2))


def table(title, rows):
  print(f"{title:9}", *(f"{label:>8}" for label in NAMED))
  for name, numbers in rows.items():
    print(f"{name:9}", *(f"{number:8.3f}" for number in numbers))


ratios, cosines = ({name: usual(seen[key]) for name, seen in clipped.items()} for key in ("ratio", "cosine"))
table("limit", limits)
table("ratio", ratios)
table("cosine", cosines)
assert all(abs(ratios[name] - 1).max() < 0.02 for name in ("Lion", "Muon"))
assert cosines["SGD"].min() > 0.999
assert max(cosines[name][-1] for name in ("Adam", "Lion", "Muon")) < 0.9

# %%
COLOURS = dict(zip(OPTIMIZERS, ("black", "#999999", "#0072B2", "#D55E00", "#009E73"), strict=True))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for ax, numbers in zip(axes, (ratios, cosines), strict=True):
  for size, name in zip((11, 9, 11, 8, 4), OPTIMIZERS, strict=True):  # Sizes for lines that lie on each other.
    ax.plot(numbers[name], "o-", color=COLOURS[name], markersize=size, label=name)
  ax.set(xlabel="limit, from the norms without a clip", xticks=range(len(NAMED)), xticklabels=NAMED)
axes[0].set(yscale="log", ylabel="ratio of the steps", title="Length: only SGD and momentum take shorter steps")
axes[1].set(ylabel="cosine of the steps", title="Direction: all but plain SGD turn")
axes[1].legend()
plt.show()

# %% [markdown]
# The numbers are medians over steps and seeds, and the five optimizers part into three kinds.
#
# - **SGD** keeps the direction, and its step is as much shorter as the gradient. **Momentum** mixes clipped and
#   unclipped gradients of several steps, so it turns a little.
# - **Adam** divides by a running size of the gradient. A low limit shrinks both, and the length of its step stays: it
#   even grows by some percent. A limit below p10 acts at nearly every step. Lowering it further changes almost nothing.
# - **Lion** takes a sign and **Muon** orthogonalises, so their steps have a fixed length. They turn instead: under a
#   low limit their momentum counts all paragraphs alike.
#
# At 8 p90 the median step is that of the run without a clip, under each optimizer: the clip acts on rare steps only.
#
# ## Is it more than a learning rate?
#
# A ratio says how much of the step is left, so we can ask whether a clip does more than another learning rate does.
# Grey is training without a clip at other rates. Orange are the six limits at the base rate, placed at the ratio that
# they lead to. If a clip were only a lower rate, its points would lie on the grey line.

# %%
fig, axes = plt.subplots(1, 5, figsize=(13, 3.6), sharey=True)
fig.suptitle("A low limit: worse than a low rate under SGD, better than any rate tried under Adam, Lion and Muon")
for ax, name in zip(axes, OPTIMIZERS, strict=True):
  ax.semilogx(RATES, unclipped[name]["loss"].mean(1), "s--", color="#999999", label="no clip, other rates")
  ax.plot(usual(clipped[name]["ratio"]), clipped[name]["loss"].mean(1), "o", color="#D55E00", label="clip, base rate")
  ax.set(title=name, xlabel="rate, or ratio")
axes[0].set(ylabel="held-out loss (nats)", ylim=(2, 5))
axes[-1].legend(fontsize=8)
plt.show()

print(f"{'':9} without a clip: best rate   its loss    with a clip: best limit   its loss   loss at p10 / 10")
for name in OPTIMIZERS:
  plain, losses = (runs[name]["loss"].mean(1) for runs in (unclipped, clipped))
  print(f"{name:9} {RATES[plain.argmin()]:25g} {plain.min():10.2f}", end=" ")
  print(f"{NAMED[losses.argmin()]:>25} {losses.min():10.2f} {losses[-1]:18.2f}")
  assert (losses[-1] > plain.min() + 1) == (name in ("SGD", "momentum"))

# %% [markdown]
# **SGD and momentum:** the points of low limits lie above the grey line. Such a clip is worse than a rate that is lower
# by its ratio, since it takes most from the long paragraphs, which make up most of the loss. The best limit is the
# highest, 8 p90. It stops a few very long paragraphs, and brings the loss of SGD from 3.30, at the best rate without a
# clip, to 3.00.
#
# **Adam, Lion and Muon:** all points have nearly the same length, and most lie below the grey line. None of the rates
# gets there without a clip: 2.22 instead of 2.40 under Adam. What helps is the direction, in which no single paragraph
# dominates any more. The exact number matters little: a tenth of p10 costs at most 0.02 over the best limit.
#
# ## Adam, step by step

# %%
adam = clipped["Adam"]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
top.semilogy(adam["norm"][0, 0], color="#999999", linewidth=0.8)
for lane, colour in ((1, "#009E73"), (3, "#0072B2"), (4, "#D55E00")):
  top.axhline(limits["Adam"][lane], color=colour)
  bottom.plot(adam["ratio"][lane, 0], color=colour, label=NAMED[lane])
top.set(ylabel="norm of the gradient", title="Norms vary as the paragraphs do, and Adam remembers the long ones")
bottom.set(ylabel="ratio of Adam's steps", xlabel="step")
bottom.legend(title="limit", ncols=3)
plt.show()
for lane in (1, 3, 4):
  ratio = adam["ratio"][lane, :, START:]
  print(f"{NAMED[lane]:6} longer steps {np.mean(ratio > 1):4.0%}, percentiles 10, 50, 90:", end=" ")
  print(*(f"{number:.2f}" for number in np.percentile(ratio, (10, 50, 90))), end="   by leaf: ")
  print(*(f"{leaf} {number:.2f}" for leaf, number in zip(LEAVES, usual(adam["ratios"])[lane], strict=True)))

# %% [markdown]
# The green limit acts on a few paragraphs, such as those before step 180. There it shortens the step. Afterwards the
# step is some percent longer than without the clip, up to the end of the run: without the clip, Adam's running mean of
# squares remembers the long paragraph, and divides every later step by it. With this limit 64% of the steps are longer.
#
# The blue and the orange limit act most of the time, and agree: their steps are shorter where a long paragraph comes,
# and longer elsewhere. The median is 7% longer, one step in ten at least 37%, and the leaf `hidden` gains most. So
# lowering `max_norm` under Adam does not calm training as a lower rate does. A larger spike is remembered as long, and
# costs more: [07_scanned_layers](07_scanned_layers.ipynb) has one after which the steps without a clip stay short.
#
# ## One leaf with a heavy tail
#
# Some leaves have gradients of another kind than the rest: an embedding under rare tokens, a head that learns rewards.
# Here it is planted, so that we know the answer: the gradient of `embed` is multiplied by 100 and by a lognormal number
# at each step. The limit stays at p50, the usual norm without this fault. We give it to the global norm, and then to
# each leaf.

# %%
fig, axes = plt.subplots(2, 5, figsize=(12, 4.8), sharex=True, sharey=True)
fig.suptitle("One factor for all leaves starves the sound ones, hidden and out, or turns them")
print(f"{'':17}", *(f"{label:>23}" for label in ("ratio of the steps", "cosine of the steps")), "      held-out")
print(f"{'':17}", *(f"{leaf:>7}" for leaf in LEAVES * 2), "          loss")
starved = {}
for i, name in enumerate(OPTIMIZERS):
  usual_norm, by_leaf = limits[name][3], np.arange(RATES.size) >= 3  # Half of the settings for each clip.
  seen = run(name, np.where(by_leaf, np.inf, usual_norm), np.where(by_leaf, usual_norm, np.inf), planted=True)
  for how, setting, style in (("global", 0, "o"), ("by leaf", -1, "D")):
    pair = [usual(seen[key])[setting] for key in ("ratios", "cosines")]
    for ax, numbers in zip(axes[:, i], pair, strict=True):
      ax.plot(numbers, LEAVES, style, color="#D55E00" if style == "o" else "#0072B2", fillstyle="none", label=how)
      ax.set(xlim=(-0.05, 1.25), ylim=(-0.5, 2.5))
    starved[name, how] = pair[0][1:].max()  # Of the leaves that are sound.
    print(f"{name:9} {how:7}", *(f"{number:7.2f}" for numbers in pair for number in numbers), end=" ")
    print(f"{seen['loss'][setting].mean():12.2f}")
  axes[0, i].set(title=name, xlabel="ratio")
  axes[1, i].set(xlabel="cosine")
axes[0, 3].legend(fontsize=8, title="clip", loc="center left")
plt.show()
assert max(starved["SGD", "global"], starved["momentum", "global"]) < 0.3

# %% [markdown]
# - **SGD and momentum** starve: `embed` holds the norm, its factor is that of all leaves, and `hidden` and `out` get
#   about a sixth of their step. Under a clip by leaf `hidden` keeps nearly all of it. (`out` is above p50 by itself at
#   many steps, with and without the fault, and momentum remembers them.)
# - **Adam** scales each leaf by its own past, so `hidden` and `out` keep 91% and 77% of their length. But the factor
#   follows the heavy tail from step to step, and that turns them: their cosines are 0.54 and 0.62, and 0.96 and 0.90
#   under a clip by leaf.
# - **Lion and Muon** hide it from the ratio, which is 1 for every leaf. The cosine shows it.
#
# The clip by leaf has the lower loss under all five.
#
# ## When to bother
#
# | optimizer | a high limit, 8 p90 | a low limit, p50 and below | tune `max_norm`? |
# |---|---|---|---|
# | SGD, momentum | insurance against rare steps | a lower rate, and a biased one | yes, together with the rate |
# | Adam | insurance | as long a step or longer, turned | try p50 against a high one, no finer |
# | Lion, Muon | insurance | the same length, turned | try p50 against a high one, no finer |
#
# - **Only insurance:** the ratio is near 1 and the cosine above 0.99. Leave the limit where it is and tune something
#   else.
# - **Worth the time:** SGD and momentum. Limit and rate act together, as in
#   [03_choosing_max_norm](03_choosing_max_norm.ipynb). Under Adam, Lion and Muon try one low limit if the norms vary as
#   much as here. Below p10 nothing is left to tune.
# - **By leaf or by group:** when one leaf has nearly all of the squared norm (`effect/share/<leaf>`), and the others
#   have a low ratio, or under Lion and Muon a low cosine.
#
# All this is one small model, three seeds and 300 steps. Look at your own: replace `optax.chain(clip, optimizer)` by
# `clipjax.clip_effect(clip, optimizer)` for a few hundred steps, and read `effect/ratio` and `effect/cosine` in
# `clipjax.metrics`. It costs a second optimizer state and a second pass of the optimizer. Then go back to the chain.
#
# This is the last of the notebooks. The [README](../README.md) has the table of all functions.
