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
# # What does gradient clipping do to a gradient?
#
# Where the loss is steep, the gradient is long, and one long step can throw a model far from where it was. Gradient
# clipping limits the length of the gradient before the optimizer uses it. This notebook shows what that does to a
# vector, how a clip by value differs from a clip by norm, what other norms look like, and what happens at zero,
# infinity and NaN.
#
# Code that only draws is in [vectors.py](vectors.py).

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from IPython.display import Markdown
from vectors import angle, directions, draw_limit, draw_orders, draw_value_and_norm, show

import clipjax

# %% [markdown]
# ## A gradient, its norm, and the clip
#
# In JAX a gradient is a tree of arrays, its *leaves*: here a weight `w` with entries 3 and 4, and a bias `b` of 12. The
# *global norm* is the length of the vector that all leaves form together, $\sqrt{3^2 + 4^2 + 12^2} = 13$.
#
# Clipping to `max_norm` multiplies every leaf by the same factor:
#
# $$ g \cdot \min\left(1, \frac{\mathrm{max\_norm}}{\lVert g \rVert}\right). $$

# %%
grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
clipped, norm = clipjax.clip_grad_norm(grads, max_norm=6.5)
norm_after = clipjax.global_norm(clipped)
print("norm before the clip:", norm, " after it:", norm_after)
print("clipped to 6.5:", clipped)
same, _ = clipjax.clip_grad_norm(grads, max_norm=13.0)
print("clipped to 13: ", same)

# %% [markdown]
# A limit of half the norm halves every entry. A gradient within the limit comes back unchanged, bit for bit. A clip
# therefore shortens the unusual steps and leaves the ordinary ones alone, unlike a lower learning rate.
#
# The next picture shows it for vectors with two entries. The radius of the circle is `max_norm`.


# %%
def clip_each(vectors, max_norm, ord=None):
  """Clips each row as a gradient of its own."""
  return np.asarray(jax.vmap(lambda g: clipjax.clip_grad_norm(g, max_norm, ord)[0])(vectors))


vectors = np.array([[3.0, 4.0], [4.5, -1.0], [-3.5, -2.5], [-1.0, 1.2], [0.6, -1.4]], np.float32)
after = clip_each(vectors, 2.0)
lengths = np.linspace(0, 10, 201, dtype=np.float32)[:, None]
draw_limit(vectors, after, 2.0, lengths, {limit: clip_each(lengths, limit) for limit in (1.0, 2.0, 5.0)})

# %% [markdown]
# Long arrows are cut at the circle. All arrows keep their direction.
#
# ## By value or by norm?
#
# Clipping by value limits each entry by itself. Large entries shrink and small ones do not, and the direction changes.
# A clip of each leaf by its own norm lies in between. Here are all three on the gradient from above, with the angle by
# which they turn it.

# %%
by_leaf = clipjax.clip_by_leaf_norm(2.5)
ways = {
  "`clip_grad_norm(grads, 2.5)`": clipjax.clip_grad_norm(grads, 2.5)[0],
  "`clip_by_leaf_norm(2.5)`": by_leaf.update(grads, by_leaf.init(grads))[0],
  "`clip_grad_value(grads, 2.5)`": clipjax.clip_grad_value(grads, 2.5),
}
turned = {name: angle(grads, tree) for name, tree in ways.items()}
rows = [f"| {n} | {show(t['w'])} | {show(t['b'])} | {turned[n]:.1f}° |" for n, t in ways.items()]
Markdown("\n".join(["| call | w | b | turned by |", "|---|---|---|--:|", *rows]))

# %% [markdown]
# Only the global norm keeps the direction. The next picture clips gradients of length 3 in twelve directions. By norm
# they end on a circle, each on its own ray. By value they end on a square, most of them at its corners.

# %%
ring = directions(360)
some = 3 * ring[10::30]
quarter = ring[:91]
degrees = {
  f"by value, {k:g} times the limit": [*map(angle, quarter, clipjax.clip_grad_value(k * quarter, 1.0))]
  for k in (1.2, 2, 10)
}
degrees["by norm"] = [*map(angle, quarter, clip_each(quarter, 0.5))]
by_value = np.asarray(clipjax.clip_grad_value(some, 1.0))
draw_value_and_norm(some, by_value, clip_each(some, 1.0), degrees)
for name, values in degrees.items():
  print(f"{name:28} turned by at most {max(values):.0f}°")

# %% [markdown]
# **What to do:** clip by the global norm unless you have a reason not to. A value clip is a reasonable guard when
# single entries are wrong and the direction means nothing anyway.
#
# ## Other norms
#
# The p-norm is $(\sum |g_i|^p)^{1/p}$: p = 2 is the usual length, p = 1 the sum of the absolute entries, p = inf the
# largest of them. `ord` chooses it. A clip still multiplies by one factor and keeps the direction. What changes is the
# shape of the limit.

# %%
sizes = 2 ** np.arange(0, 17, 2)
balls, growth = {}, {}
for order in (1, 2, 4, jnp.inf):
  balls[f"ord = {order:g}"] = clip_each(3 * ring, 1.0, order)
  growth[f"ord = {order:g}"] = [float(clipjax.global_norm(jnp.ones(n), order)) for n in sizes]
  print(f"ord = {order:g}: the norm of (3, 4, 12) is {clipjax.global_norm(grads, order):.4g}")
draw_orders(balls, sizes, growth)

# %% [markdown]
# The panel on the right shows why this matters. For entries of a given size, the 1-norm grows with the number of
# entries, the 2-norm with its square root, and the largest entry stays the same. A threshold that suits a small model
# is therefore wrong for a large one, and a threshold for one norm says nothing about another.
#
# ## Zero, infinity and NaN
#
# `on_nonfinite` decides what a clip does with a gradient whose norm is infinite or NaN:


# %%
def result(values, max_norm, policy):
  try:
    return show(clipjax.clip_grad_norm(jnp.array(values), max_norm, on_nonfinite=policy)[0])
  except FloatingPointError:
    return "FloatingPointError"


policies = ("propagate", "zero", "error")
cases = ([0.0, 0.0], 1.0), ([3.0, 4.0], 0.0), ([3e20, 4e20], 1.0), ([1.0, np.inf], 1.0), ([1.0, np.nan], 1.0)
found = {(str(g), limit): [result(g, limit, policy) for policy in policies] for g, limit in cases}
head = "| gradient | max_norm | " + " | ".join(f'`"{policy}"`' for policy in policies) + " |"
rows = [f"| {g} | {limit:g} | " + " | ".join(texts) + " |" for (g, limit), texts in found.items()]
Markdown("\n".join([head, "|---|--:|---|---|---|", *rows]))

# %% [markdown]
# - A zero gradient stays zero, and a limit of 0 gives zeros.
# - The square of 3e20 does not fit into float32. The norm does, and the clip is right.
# - `"propagate"`, the default, shows the trouble: *every* entry becomes NaN, the healthy 1 included.
# - `"zero"` drops the step. `"error"` raises; inside `jax.jit` it becomes a check for `jax.experimental.checkify`.
#
# ## In an Optax chain
#
# As a transformation, the clip keeps its norm in the optimizer state and counts the steps that it changed. Here it gets
# a long gradient, a short one, and NaN:

# %%
tx = optax.chain(clipjax.clip_by_global_norm(1.0, on_nonfinite="zero"), optax.sgd(0.1))
params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
state = tx.init(params)
for scale in (1.0, 0.01, jnp.nan):
  updates, state = tx.update(jax.tree.map(lambda g, s=scale: s * g, grads), state, params)
  params = optax.apply_updates(params, updates)
seen = clipjax.metrics(state)
for key in ("grad/norm", "grad/clipped_steps", "grad/nonfinite_steps", "grad/steps"):
  print(f"{key:22} {seen[key]}")
print("the weights are finite:", bool(jnp.isfinite(params["w"]).all()))

# %% [markdown]
# ## Coming from PyTorch or TensorFlow
#
# | there | here |
# |---|---|
# | `torch.nn.utils.clip_grad_norm_(params, c)`, in place | `grads, norm = clipjax.clip_grad_norm(grads, c, eps=1e-6)` |
# | `torch.nn.utils.clip_grad_value_(params, c)`, in place | `grads = clipjax.clip_grad_value(grads, c)` |
# | `tf.clip_by_global_norm(grads, c)` | `grads, norm = clipjax.clip_grad_norm(grads, c)` |
# | `tf.clip_by_norm(g, c)` on each tensor | `clipjax.clip_by_leaf_norm(c)` in the chain |
# | Keras `Adam(global_clipnorm=c)` | `optax.chain(clipjax.clip_by_global_norm(c), optax.adam(...))` |
#
# The formulas differ slightly.
# [PyTorch](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html) multiplies by
# `min(1, c / (norm + 1e-6))`, [TensorFlow](https://www.tensorflow.org/api_docs/python/tf/clip_by_global_norm) by
# `c / max(norm, c)`. The cell below computes both in numpy, next to clipjax:

# %%
flat = np.array([3.0, 4.0, 12.0], np.float32)
theirs, ours = {}, {}
for c in (6.5, 13.0, 20.0):
  theirs["torch", c] = flat * min(1, c / (np.linalg.norm(flat) + 1e-6))
  theirs["tensorflow", c] = flat * c / max(np.linalg.norm(flat), c)
  ours["torch", c] = clipjax.clip_grad_norm(flat, c, eps=1e-6)[0]
  ours["tensorflow", c] = clipjax.clip_grad_norm(flat, c)[0]
  print(f"c = {c:4g}", *(f"  {name} {show(theirs[name, c])}, ours {show(ours[name, c])}" for name, _ in [*ours][-2:]))
with np.errstate(invalid="ignore"):  # inf * 0.
  bad = np.array([1.0, np.inf], np.float32)
  torch_on_inf = bad * min(1, 1 / (np.linalg.norm(bad) + 1e-6))
print("torch's formula on [1, inf]:", show(torch_on_inf))

# %% [markdown]
# The last line is the difference that matters. An infinite norm gives the factor 0: healthy entries become 0, the
# infinite one becomes NaN, and most of the damage is hidden. Here `on_nonfinite` decides for all leaves together.
# `tests/test_golden.py` compares clipjax with numbers that the libraries themselves gave.
#
# ## To remember
#
# - Clipping by the global norm multiplies all leaves by one factor. The direction stays, the length is limited, and a
#   short gradient is untouched.
# - Clipping by value or by leaf turns the gradient.
# - A threshold belongs to one norm, one model and one loss. [03_choosing_max_norm](03_choosing_max_norm.ipynb) chooses
#   one.
# - Decide what happens to a nonfinite gradient, and look at the counters.
#
# Next: [02_exploding_rnn](02_exploding_rnn.ipynb), where a network needs the clip. All calls:
# [docs/api.md](../docs/api.md). What each does at 0, inf and NaN: [docs/edge_cases.md](../docs/edge_cases.md).
