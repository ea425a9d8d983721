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
# # Adaptive clipping: which method removes a spike, and what does it do to all other steps?
#
# A fixed threshold has to be chosen, and the size of a healthy gradient changes during a run. Adaptive methods take
# their threshold from the norms of the run itself. Here six of them, and one that you write yourself, train the same
# model on the same batches, of which six are broken on purpose. For each we ask two things: does the broken batch do
# harm, and how often is a healthy step changed?
#
# | method | threshold | source |
# |---|---|---|
# | AutoClip | the 10th percentile of all norms so far | [arXiv 2007.14469] |
# | quantile tracking | one number that moves towards a quantile | [arXiv 1905.03871] |
# | ZClip | mean + 2.5 standard deviations, both moving averages | [arXiv 2504.02507] |
# | AdaGC | for each leaf, 1.04 times its own moving average | [arXiv 2502.11034] |
# | AGC | for each unit, a share of the norm of its weights | [arXiv 2102.06171] |
# | `skip_steps` | mean + 6 standard deviations; above it the step is rejected | [OLMo-core] |
#
# [arXiv 2007.14469]: https://arxiv.org/abs/2007.14469
# [arXiv 1905.03871]: https://arxiv.org/abs/1905.03871
# [arXiv 2504.02507]: https://arxiv.org/abs/2504.02507
# [arXiv 2502.11034]: https://arxiv.org/abs/2502.11034
# [arXiv 2102.06171]: https://arxiv.org/abs/2102.06171
# [OLMo-core]: https://github.com/allenai/OLMo-core

# %% [markdown]
# ## A small network, and a broken shard in its data
#
# The model reads scikit-learn's 8x8 digits: two hidden layers, SGD with momentum. Six of the 600 batches come from a
# broken shard: their pixels are not divided by 16 as the others are, and their labels are off by one. This is the kind
# of fault that a data pipeline really has, and the gradient of such a batch is large.

# %%
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import clipjax
from clipjax import rules

plt.rcParams["figure.dpi"] = 80
STEPS, BATCH, LEARNING_RATE = 600, 32, 0.05
BROKEN = np.array([150, 220, 300, 301, 380, 450])

rng = np.random.default_rng(0)
pixels, digits = load_digits(return_X_y=True)
order = rng.permutation(len(digits))
pixels, digits = jnp.asarray(pixels[order], jnp.float32), jnp.asarray(digits[order])
held_out = slice(1440, None)
batches = rng.integers(1440, size=(STEPS, BATCH))
is_broken = np.isin(np.arange(STEPS), BROKEN)

sizes = (64, 64, 64, 10)
keys = jax.random.split(jax.random.key(0), 3)
params = [
  {"w": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
  for key, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
]


def loss_fn(params, x, y):
  *hidden, last = params
  for layer in hidden:
    x = jax.nn.relu(x @ layer["w"] + layer["b"])
  return optax.softmax_cross_entropy_with_integer_labels(x @ last["w"] + last["b"], y).mean()


# %% [markdown]
# ## One training loop for all methods
#
# `train` takes an optimizer and runs all steps in one `lax.scan`. What the clip did is in the optimizer's state:
# `clipjax.metrics` reads it, inside of the compiled loop. `norm` is the gradient as it came, `used` is what was left of
# it, and `limit` is the threshold of the step (for the methods that have one threshold).

# %%
SGD = optax.sgd(LEARNING_RATE, momentum=0.9)


def read(opt_state):
  seen = clipjax.metrics(opt_state)
  if "skip/norm" in seen:
    used = jnp.where(seen["skip/consecutive"] > 0, 0, seen["skip/norm"])
    return {"norm": seen["skip/norm"], "used": used, "limit": seen["skip/max_norm"]}
  return {"norm": seen["grad/norm"], "used": seen["grad/norm_clipped"], "limit": seen["grad/max_norm"]}


def train(tx):
  def step(carry, batch):
    params, opt_state = carry
    rows, broken = batch
    x, y = pixels[rows] / jnp.where(broken, 1, 16), (digits[rows] + broken) % 10
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    params = optax.apply_updates(params, updates)
    return (params, opt_state), read(opt_state) | {"loss": loss_fn(params, pixels[held_out] / 16, digits[held_out])}

  carry = params, tx.init(params)
  return jax.tree.map(np.asarray, jax.jit(lambda c: jax.lax.scan(step, c, (batches, is_broken)))(carry)[1])


unclipped = train(optax.chain(clipjax.clip_by_global_norm(jnp.inf), SGD))  # inf only measures.

# %%
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def mark_broken(ax):
  for i in BROKEN:
    ax.axvline(i, color=ORANGE, linewidth=0.8, alpha=0.5, zorder=0)


fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
top.semilogy(unclipped["loss"], color=BLUE, linewidth=1)
top.set(ylabel="held-out loss (nats)", title="Without a clip, one broken batch undoes what was learned")
bottom.semilogy(unclipped["norm"], color=BLUE, linewidth=1)
bottom.set(ylabel="gradient norm", xlabel="step (orange lines: broken batches)")
for ax in (top, bottom):
  mark_broken(ax)
plt.show()

first = BROKEN[0]
usual = np.median(unclipped["norm"][first - 50 : first])
print(f"norm of the first broken batch: {unclipped['norm'][first]:.0f}, usual norm before it: {usual:.2f}")
print(f"held-out loss before it {unclipped['loss'][first - 1]:.2f}, at the end {unclipped['loss'][-1]:.2f}")
print(f"guessing would give {np.log(10):.2f}")
assert unclipped["norm"][first] > 20 * usual
assert unclipped["loss"][-1] > 10 * unclipped["loss"][first - 1]

# %% [markdown]
# The first broken batch has a gradient that is more than twenty times as long as usual. One step along it is enough:
# the network ends where guessing would be, and does not recover. Note that its norm is small *afterwards*; a look at
# the last norms alone would not tell you that the run is lost.
#
# ## A rule of your own, in ten lines
#
# All adaptive thresholds of clipjax are *rules*: `init(shape, dtype)` makes a state, and
# `update(norms, state, *, global_norm)` returns a limit, a target and the next state. A norm above the limit is scaled
# to the target. The rule below clips what is above three times the median of the last 31 norms. A median does not care
# how large a spike is, so the rule may remember the raw norms.


# %%
def above_the_median(factor=3.0, window=31):
  def init(shape, dtype):
    return jnp.full((window, *shape), jnp.inf, dtype)

  def update(norms, last, *, global_norm):
    limit = factor * jnp.median(last, axis=0)  # inf, no limit, until half of the window is filled.
    return limit, limit, jnp.roll(last, 1, axis=0).at[0].set(norms)

  return rules.Rule(init, update)


assert sum(bool(line.strip()) for line in inspect.getsource(above_the_median).splitlines()) <= 10

# %% [markdown]
# It works wherever a `max_norm` is taken: for the global norm, for each leaf, for each group, and in `skip_steps`. It
# needs no care for NaN: a step that is not finite never reaches the state of a rule.
#
# ## All of them
#
# Everything has its defaults, which are those of the papers where there is one; the two rules without a default get a
# usual value. A fixed threshold stands beside them.

# %%
sigma = rules.rolling_sigma(6.0, window=128)
clips = {
  "fixed at 2": clipjax.clip_by_global_norm(2.0),
  "AutoClip": clipjax.autoclip(),
  "quantile tracking": clipjax.clip_by_global_norm(rules.quantile_tracking(0.9)),
  "ZClip": clipjax.zclip(),
  "AdaGC": clipjax.adagc(),
  "AGC": clipjax.adaptive_grad_clip(),
  "your own rule": clipjax.clip_by_global_norm(above_the_median()),
}
optimizers = {name: optax.chain(clip, SGD) for name, clip in clips.items()}
optimizers["skip_steps"] = clipjax.skip_steps(SGD, norm_rule=sigma)  # Around the optimizer, not in the chain.
runs = {name: train(tx) for name, tx in optimizers.items()}

# %%
fig, axes = plt.subplots(4, 2, figsize=(8.5, 7.8), sharex=True, sharey=True, layout="constrained")
for ax, (name, run) in zip(axes.flat, runs.items(), strict=True):
  ax.semilogy(run["norm"], color=GREY, linewidth=0.8, label="norm as it came")
  ax.semilogy(np.where(run["used"] > 0, run["used"], np.nan), color=BLUE, linewidth=0.8, label="norm that was used")
  if name not in ("AdaGC", "AGC"):  # Those have a limit for each leaf or unit.
    there = run["limit"] < np.finfo(np.float32).max  # A step without a limit has the largest number.
    ax.semilogy(np.where(there, run["limit"], np.nan), color=GREEN, linewidth=1.4, label="limit")
  ax.set_title(name, fontsize=10)
  mark_broken(ax)
axes[0, 0].set_ylim(0.03, 300)
fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
fig.suptitle("The limits follow the run; only the fixed one stays where it was put")
fig.supylabel("gradient norm")
for ax in axes[-1]:
  ax.set_xlabel("step (orange lines: broken batches)")
plt.show()

# %% [markdown]
# Grey is the gradient that came, blue what the optimizer was given, green the limit. Where blue covers grey, nothing
# was changed. Look at how the limits move:
#
# - **AutoClip** lies *under* most norms: it is the tenth percentile of the norms so far, and would clip nine steps in
#   ten if the norms did not fall. So it is rather a normalisation.
# - **Quantile tracking** aims at one step in ten, with a single number for memory; it wanders around its quantile.
# - **ZClip** has no limit in its first 25 steps. Then it lies just above the norms, and a spike is pulled down almost
#   to the mean.
# - **AdaGC** and **AGC** have many limits, one for each leaf or unit, which one green line cannot show.
# - **`skip_steps`** leaves a broken step out, momentum and all. A spike widens its limit, since the window holds norms
#   as they came, and the limit stays wide for 128 steps: the next spikes here are only just above it.
#
# ## Harm and side effects

# %%
healthy = ~is_broken
rows = {"no clip": unclipped} | runs
table = {}
for name, run in rows.items():
  table[name] = (
    np.mean(run["used"][healthy] < 0.999 * run["norm"][healthy]),  # Healthy steps that were changed.
    np.max(run["used"][BROKEN]),  # The largest step that a broken batch was allowed.
    np.max(run["loss"][BROKEN] - run["loss"][BROKEN - 1]),  # The harm of the worst one.
    np.mean(run["loss"][-50:]),
  )
print(f"{'':18} {'healthy steps':>14} {'largest norm of a':>18} {'worst rise of':>14} {'final':>7}")
print(f"{'':18} {'changed':>14} {'broken batch used':>18} {'the loss':>14} {'loss':>7}")
for name, (changed, largest, harm, final) in table.items():
  print(f"{name:18} {changed:14.0%} {largest:18.2f} {harm:14.3f} {final:7.3f}")

changed, largest, harm, final = (dict(zip(table, column, strict=True)) for column in zip(*table.values(), strict=True))
assert all(final[name] < final["no clip"] / 10 for name in runs)
assert all(harm[name] < harm["no clip"] / 10 for name in runs)
assert all(changed[name] > 0.5 for name in ("AutoClip", "AdaGC", "AGC"))
assert all(changed[name] < 0.2 for name in ("ZClip", "your own rule", "quantile tracking", "skip_steps"))
assert largest["skip_steps"] == 0
assert max(final, key=final.get) == "no clip"
assert max(runs, key=final.get) == "AGC"

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
names = list(runs)
left.barh(names, [100 * changed[name] for name in names], color=BLUE)
left.set(xlabel="healthy steps that were changed (%)", title="Side effects differ widely", xlim=(0, 100))
left.invert_yaxis()
highlighted = {"AutoClip": BLUE, "ZClip": GREEN, "AGC": ORANGE, "skip_steps": "black"}
for name, run in rows.items():
  colour = highlighted.get(name, GREY)
  dashes = "--" if name == "no clip" else "-"
  label = name if name in highlighted else {"no clip": "no clip", "fixed at 2": "the others"}.get(name)
  right.semilogy(run["loss"], dashes, color=colour, linewidth=1, label=label)
right.set(xlabel="step", ylabel="held-out loss (nats)", title="Any of them saves the run")
right.legend(fontsize=7)
plt.show()

# %% [markdown]
# Every method saves this run, and they differ in what they do to the other steps. AutoClip and AdaGC change most of
# the healthy ones, which under SGD acts like a lower learning rate. So does AGC, whose default of 0.01 comes from large
# image models trained with large batches; here it learns most slowly. ZClip, quantile tracking, the rule above and
# `skip_steps` leave most healthy steps alone. The fixed threshold does well too, but we chose its value after we had
# seen the norms.
#
# ## What to do
#
# - Rare spikes in a run that is otherwise sound: ZClip, or `skip_steps` when a broken batch should leave no trace.
# - Spikes in the first steps: the adaptive rules have seen too little by then. Give ZClip a cap:
#   `clipjax.zclip(max_norm=...)`.
# - A learning rate that is on the edge: a low fixed threshold is the simplest and, as
#   [docs/methods.md](../docs/methods.md) measures, the surest. That page also shows which rules lock in when the norm
#   rises *for good* (ZClip does, unless you pass `restart_after`).
# - A rule of your own is ten lines, and goes wherever a number goes.
#
# Next: [05_sharded_training](05_sharded_training.ipynb), the same clip on eight devices.
