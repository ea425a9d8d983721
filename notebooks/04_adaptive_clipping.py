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
# model on the same batches. Six batches are broken on purpose. For each method we ask two things. Does the broken batch
# do harm? How often does the method change a healthy step?
#
# | method | threshold | source |
# |---|---|---|
# | AutoClip | the 10th percentile of all norms so far | [arXiv 2007.14469] |
# | quantile tracking | one number that moves towards a quantile | [arXiv 1905.03871] |
# | ZClip | mean + 2.5 standard deviations, both moving averages | [arXiv 2504.02507] |
# | AdaGC | for each leaf, 1.04 times its own moving average | [arXiv 2502.11034] |
# | AGC | for each unit, a share of the norm of its weights | [arXiv 2102.06171] |
# | `skip_steps` | mean + 6 standard deviations; rejects the step above it | [OLMo-core] |
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
# broken shard: nobody divided their pixels by 16, and their labels are off by one. Real data pipelines have faults like
# these. Model, data and drawing are in [broken_digits.py](broken_digits.py).
#
# `train` takes an optimizer and runs all steps in one `lax.scan`. The optimizer's state says what the clip did, and
# `clipjax.metrics` reads it inside the compiled loop: `norm` is the norm before the clip, `used` the norm after it, and
# `limit` is the threshold of the step, for methods that have one threshold.

# %%
import broken_digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from broken_digits import BROKEN, HELD_OUT, IS_BROKEN, STEPS, batch_of, init_params, loss_fn

import clipjax
from clipjax import rules

SGD = optax.sgd(0.05, momentum=0.9)


def read(opt_state):
  seen = clipjax.metrics(opt_state)
  if "skip/norm" in seen:
    used = jnp.where(seen["skip/consecutive"] > 0, 0, seen["skip/norm"])
    return {"norm": seen["skip/norm"], "used": used, "limit": seen["skip/max_norm"]}
  return {"norm": seen["grad/norm"], "used": seen["grad/norm_clipped"], "limit": seen["grad/max_norm"]}


def train(tx):
  def step(carry, i):
    params, opt_state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, *batch_of(i))
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    params = optax.apply_updates(params, updates)
    return (params, opt_state), read(opt_state) | {"loss": loss_fn(params, *HELD_OUT)}

  params = init_params(jax.random.key(0))
  return jax.tree.map(
    np.asarray, jax.jit(lambda *c: jax.lax.scan(step, c, jnp.arange(STEPS)))(params, tx.init(params))[1]
  )


unclipped = train(optax.chain(clipjax.clip_by_global_norm(jnp.inf), SGD))  # inf only measures.
broken_digits.draw_unclipped(unclipped)
first = BROKEN[0]
usual = np.median(unclipped["norm"][first - 50 : first])
ratio = unclipped["norm"][first] / usual
print(f"norm of the first broken batch: {unclipped['norm'][first]:.0f}, {ratio:.0f} times the usual {usual:.2f}")
print(f"held-out loss before it {unclipped['loss'][first - 1]:.2f}, at the end {unclipped['loss'][-1]:.2f}")
print(f"median norm of the last 100 steps: {np.median(unclipped['norm'][-100:]):.2f}")
print(f"loss of a blind guess: {np.log(10):.2f}")

# %% [markdown]
# The gradient of the first broken batch is about 150 times as long as usual. One step along it is enough: the network
# ends where a blind guess would be, and does not recover. The norm is small *afterwards*. The last norms alone would
# never tell you that the run is lost.
#
# ## A rule of your own, in ten lines
#
# All adaptive thresholds of clipjax are *rules*: `init(shape, dtype)` makes a state, and
# `update(norms, state, *, global_norm)` returns a limit, a target and the next state. A norm above the limit is scaled
# to the target. The rule below clips norms above three times the median of the last 31. A spike hardly moves a median,
# so the rule can safely remember the raw norms.


# %%
def above_the_median(factor=3.0, window=31):
  def init(shape, dtype):
    return jnp.full((window, *shape), jnp.inf, dtype)

  def update(norms, last, *, global_norm):
    limit = factor * jnp.median(last, axis=0)  # inf, no limit, until half of the window is filled.
    return limit, limit, jnp.roll(last, 1, axis=0).at[0].set(norms)

  return rules.Rule(init, update)


# %% [markdown]
# It works wherever `max_norm` is an argument: for the global norm, for each leaf, for each group, and in `skip_steps`.
# It needs no care for NaN, because a nonfinite step never reaches the state of a rule.
#
# ## All of them
#
# Every method keeps its defaults, which are those of its paper where there is one. Quantile tracking has no default
# quantile and gets 0.9; `skip_steps` has no default rule and gets that of OLMo-core. A fixed threshold runs beside
# them.

# %%
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
# Around the optimizer, not in the chain:
optimizers["skip_steps"] = clipjax.skip_steps(SGD, norm_rule=rules.rolling_sigma(6.0, window=128))
runs = {name: train(tx) for name, tx in optimizers.items()}
broken_digits.draw_limits(runs)
margins = runs["skip_steps"]["norm"][BROKEN] / runs["skip_steps"]["limit"][BROKEN]
print("the six spikes over the limit of skip_steps:", ", ".join(f"{margin:.1f}" for margin in margins))

# %% [markdown]
# Grey is the norm before the clip, blue the norm after it, green the limit. Where blue covers grey, nothing was
# changed. Look at how the limits move:
#
# - **AutoClip** lies *under* most norms. Its limit is the tenth percentile of the norms so far, so it would clip nine
#   steps in ten if the norms did not fall. It is closer to a normalization than to a guard.
# - **Quantile tracking** aims at one step in ten. Its only memory is one number, which wanders around the quantile.
# - **ZClip** has no limit in its first 25 steps. Then it lies just above the norms, and it pulls a spike down almost to
#   the mean.
# - **AdaGC** and **AGC** have many limits, one for each leaf or unit. One green line cannot show them.
# - **`skip_steps`** leaves a broken step out, momentum included. A spike widens its limit, because the window holds the
#   norms as they came. The limit stays wide for 128 steps, and the next spikes clear it by far less than the first.
#
# ## Harm and side effects
#
# The table counts healthy steps that a method changed, and measures how far the broken batches got: the largest norm
# that the optimizer was given, the worst rise of the loss in one of those steps, and the loss at the end.

# %%
healthy = ~IS_BROKEN
rows = {"no clip": unclipped} | runs
changed = {name: np.mean(run["used"][healthy] < 0.999 * run["norm"][healthy]) for name, run in rows.items()}
largest = {name: np.max(run["used"][BROKEN]) for name, run in rows.items()}
harm = {name: np.max(run["loss"][BROKEN] - run["loss"][BROKEN - 1]) for name, run in rows.items()}
final = {name: np.mean(run["loss"][-50:]) for name, run in rows.items()}
print(f"{'':18} {'healthy steps':>14} {'largest norm of a':>18} {'worst rise of':>14} {'final':>7}")
print(f"{'':18} {'changed':>14} {'broken batch used':>18} {'the loss':>14} {'loss':>7}")
for name in rows:
  print(f"{name:18} {changed[name]:14.0%} {largest[name]:18.2f} {harm[name]:14.3f} {final[name]:7.3f}")
broken_digits.draw_comparison(rows, changed)

# %% [markdown]
# Every method saves this run. They differ in what they do to the other steps. AutoClip and AdaGC change most of the
# healthy ones, which under SGD acts like a lower learning rate. So does AGC: its default of 0.01 comes from large image
# models with large batches, and here it learns most slowly. ZClip, quantile tracking, the rule above and `skip_steps`
# leave most healthy steps alone. The fixed threshold does well too, but we chose it after seeing the norms.
#
# ## What to do
#
# - **Rare spikes in a run that is otherwise sound:** ZClip, or `skip_steps` if a broken batch should leave no trace.
# - **Spikes in the first steps:** the adaptive rules have seen too little by then. Give ZClip a cap,
#   `clipjax.zclip(max_norm=...)`.
# - **A learning rate on the edge:** a low fixed threshold is the simplest and, as
#   [docs/methods.md](../docs/methods.md) measures, the surest. That page also shows which rules lock in when the norm
#   rises *for good*. ZClip does, unless you pass `restart_after`.
# - **A rule of your own** takes ten lines and goes wherever a number goes.
#
# Next: [05_sharded_training](05_sharded_training.ipynb), the same clip on eight devices.
