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
# A clip shortens the gradient. But it is the optimizer's step that trains. So the same `max_norm` can mean a lower
# learning rate, another direction, or nothing at all. `clipjax.clip_effect(clip, optimizer)` trains like
# `optax.chain(clip, optimizer)`. It keeps a second optimizer state that sees the gradient without the clip, and
# compares the two steps, over all leaves and for each one:
#
# - the **ratio** of their lengths: below 1, the clip shortens the step;
# - the **cosine** between them: below 1, the clip turns the step.
#
# ## Paragraphs of unequal length
#
# A [small network](paragraphs.py) reads four characters of the prose in Python's own documentation and predicts the
# next one. A batch is one paragraph, and its loss is a sum over characters: a paragraph of 2000 characters counts
# twenty times as much as one of 100. The norms of the gradients vary as the lengths do, without any fault in the data.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paragraphs
from paragraphs import LEAVES, held_out_loss, init, loss_fn

import clipjax

lengths = np.percentile(paragraphs.CHARACTERS, (1, 10, 50, 90, 99, 100)).round()
print("characters, percentiles 1, 10, 50, 90, 99, 100:", *lengths)

# %% [markdown]
# ## Five optimizers, six limits
#
# `train` runs all settings and seeds of one optimizer at once: it uses `vmap` over them and `lax.scan` over the steps.
# The numbers come out of the state of `clip_effect`. A limit of infinity never clips. The last argument plants a fault
# for the end of this notebook.

# %%
OPTIMIZERS = {  # With the rate at which each trains well without a clip.
  "SGD": (optax.sgd, 0.05),
  "momentum": (partial(optax.sgd, momentum=0.9), 0.005),
  "Adam": (optax.adam, 0.01),
  "Lion": (optax.lion, 0.002),
  "Muon": (optax.contrib.muon, 0.015),
}
RATES = np.array([1 / 16, 1 / 4, 1 / 2, 1, 2, 4])
SEEDS, STEPS, START = 3, 300, 100


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
      grads = jax.grad(loss_fn)(params, jax.random.randint(draw, (), paragraphs.HELD_OUT, paragraphs.COUNT))
      grads["embed"] *= jnp.where(planted, 100 * jnp.exp(2 * jax.random.normal(fault)), 1)
      updates, state = tx.update(grads, state, params)
      seen = {"norm": optax.global_norm(grads), "ratio": state.ratio, "cosine": state.cosine}
      return (optax.apply_updates(params, updates), state), seen | {"ratios": state.ratios, "cosines": state.cosines}

    (params, _), seen = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(seed), STEPS))
    return seen | {"loss": held_out_loss(params)}

  over_seeds = partial(jax.vmap(one, (0, None, None, None)), jnp.arange(SEEDS))
  return jax.vmap(over_seeds)(limits, leaf_limits, rates)


def run(name, limit=np.inf, leaf_limit=np.inf, rate=1.0, planted=False):
  """As NumPy arrays of shape (settings, seeds, steps)."""
  *settings, _ = np.broadcast_arrays(*map(np.float32, (limit, leaf_limit, rate)), RATES)
  return jax.tree.map(np.asarray, train(name, *settings, planted))


# %% [markdown]
# First without a clip, at six learning rates. The limits come from percentiles of the norms at the base rate: from
# eight times the 90th percentile (8 p90) down to a tenth of the 10th (p10 / 10). Ratios and cosines are medians over
# steps and seeds.

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


ratios, cosines = ({name: usual(seen[key]) for name, seen in clipped.items()} for key in ("ratio", "cosine"))
for title, rows in (("limit", limits), ("ratio", ratios), ("cosine", cosines)):
  paragraphs.table(title, NAMED, rows)
paragraphs.draw_ratios(NAMED, ratios, cosines)

# %% [markdown]
# There are three kinds of optimizers.
#
# - **SGD** keeps the direction, and its step shrinks as the gradient does. **Momentum** mixes clipped and unclipped
#   gradients of several steps, so it turns a little.
# - **Adam** divides by a running size of the gradient. A low limit shrinks both, so the length of the step stays. It
#   even grows by some percent. A limit below p10 acts at nearly every step, and lowering it further changes almost
#   nothing.
# - **Lion** takes a sign and **Muon** orthogonalises, so their steps have a fixed length. They turn instead: under a
#   low limit their momentum counts all paragraphs alike.
#
# At 8 p90 the median step equals the step without a clip, under each optimizer. This clip acts on rare steps only.
#
# ## Is it more than a learning rate?
#
# The ratio says how much of the step is left. So we can compare a clip with a lower rate. Grey is training without a
# clip at other rates. The orange points are the six limits at the base rate, placed at the ratio they lead to. If a
# clip were only a lower rate, its points would lie on the grey line.

# %%
plain, with_clip = ({n: seen["loss"].mean(1) for n, seen in runs.items()} for runs in (unclipped, clipped))
paragraphs.draw_losses(RATES, plain, ratios, with_clip)
print(f"{'':9} without a clip: best rate   its loss    with a clip: best limit   its loss   loss at p10 / 10")
for name, losses in with_clip.items():
  print(f"{name:9} {RATES[plain[name].argmin()]:25g} {plain[name].min():10.2f}", end=" ")
  print(f"{NAMED[losses.argmin()]:>25} {losses.min():10.2f} {losses[-1]:18.2f}")

# %% [markdown]
# **SGD and momentum:** the points of low limits lie above the grey line. Such a clip is worse than a rate that is lower
# by the same ratio. It takes most from the long paragraphs, which make up most of the loss. The best limit is the
# highest one, 8 p90. It stops a few very long paragraphs, and its loss is lower than at the best rate without a clip.
#
# **Adam, Lion and Muon:** all points have nearly the same length, and most lie below the grey line. No rate without a
# clip gets there. The new direction helps: no single paragraph dominates it. The exact number matters little: at a
# tenth of p10 the loss is nearly that of the best limit.
#
# ## Adam, step by step

# %%
adam, lanes = clipped["Adam"], {NAMED[lane]: lane for lane in (1, 3, 4)}
limit_of = dict(zip(NAMED, limits["Adam"], strict=True))
paragraphs.draw_steps(adam["norm"][0, 0], limit_of, {head: adam["ratio"][lane, 0] for head, lane in lanes.items()})
longer = {head: np.mean(adam["ratio"][lane, :, START:] > 1) for head, lane in lanes.items()}
for head, lane in lanes.items():
  print(f"{head:6} longer steps {longer[head]:4.0%}, percentiles 10, 50, 90:", end=" ")
  print(
    *(f"{number:.2f}" for number in np.percentile(adam["ratio"][lane, :, START:], (10, 50, 90))), end="   by leaf: "
  )
  print(*(f"{leaf} {number:.2f}" for leaf, number in zip(LEAVES, usual(adam["ratios"])[lane], strict=True)))

# %% [markdown]
# The green limit acts on a few long paragraphs, and shortens the step there. Afterwards the step is some percent longer
# than without the clip, up to the end of the run. Without the clip, Adam's running mean of squares remembers the long
# paragraph and divides every later step by it. So most steps under this limit are longer.
#
# The blue and the orange limit act most of the time, and agree: their steps are shorter at a long paragraph and longer
# elsewhere. The leaf `hidden` gains most. So a lower `max_norm` under Adam does not calm training as a lower rate does.
# A larger spike costs more and is remembered as long: [07_scanned_layers](07_scanned_layers.ipynb) shows one after
# which the steps without a clip stay short.
#
# ## One leaf with a heavy tail
#
# Some leaves have other gradients than the rest: an embedding of rare tokens, or a head that learns rewards. Here we
# plant it, to know the answer: at each step the gradient of `embed` is multiplied by 100 and by a lognormal number. The
# limit stays at p50, the usual norm without this fault. We give it to the global norm, and then to each leaf.

# %%
print(f"{'':17}", *(f"{label:>23}" for label in ("ratio of the steps", "cosine of the steps")), "      held-out")
print(f"{'':17}", *(f"{leaf:>7}" for leaf in LEAVES * 2), "          loss")
planted, planted_loss = {}, {}
for name in OPTIMIZERS:
  usual_norm, by_leaf = limits[name][3], np.arange(RATES.size) >= 3  # Half of the settings for each clip.
  seen = run(name, np.where(by_leaf, np.inf, usual_norm), np.where(by_leaf, usual_norm, np.inf), planted=True)
  for how, setting in (("global", 0), ("by leaf", -1)):
    planted[name, how] = tuple(usual(seen[key])[setting] for key in ("ratios", "cosines"))
    planted_loss[name, how] = seen["loss"][setting].mean()
    print(f"{name:9} {how:7}", *(f"{number:7.2f}" for numbers in planted[name, how] for number in numbers), end=" ")
    print(f"{planted_loss[name, how]:12.2f}")
paragraphs.draw_leaves(planted)

# %% [markdown]
# - **SGD and momentum** starve: `embed` holds the norm, all leaves get its factor, and `hidden` and `out` keep about a
#   sixth of their step. Under a clip by leaf `hidden` keeps nearly all of it. (`out` is often above p50 by itself, with
#   and without the fault, and momentum remembers these steps.)
# - **Adam** scales each leaf by its own past, so `hidden` and `out` keep most of their length. But the factor follows
#   the heavy tail from step to step, which turns them far more than a clip by leaf does.
# - **Lion and Muon** hide the fault from the ratio, which is 1 for every leaf. The cosine shows it.
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
#   much as here. Below p10 there is nothing left to tune.
# - **By leaf or by group:** when one leaf has nearly all of the squared norm (`effect/share/<leaf>`), and the others
#   have a low ratio, or under Lion and Muon a low cosine.
#
# This is one small model, three seeds and 300 steps. Look at your own: replace `optax.chain(clip, optimizer)` by
# `clipjax.clip_effect(clip, optimizer)` for a few hundred steps, and read `effect/ratio` and `effect/cosine` in
# `clipjax.metrics`. It costs a second optimizer state and a second pass of the optimizer. Then go back to the chain.
#
# Next: [09_finding_a_bad_batch](09_finding_a_bad_batch.ipynb), from a spike in a record to the file that caused it.
