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
# A gradient says in which direction the loss falls, and how steeply. Where the loss is very steep, a step along the
# gradient is very long, and one long step can throw a model far away from where it was. Gradient clipping limits the
# length of the gradient before the optimizer uses it. This notebook shows what that does to a vector, how clipping by
# value differs from clipping by norm, what other norms look like, what happens at zero, infinity and NaN, and how the
# calls of PyTorch and TensorFlow are written here.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

import clipjax

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## A gradient, its norm, and the clip
#
# In JAX a gradient is a tree of arrays, its *leaves*: here a weight `w` with the entries 3 and 4, and a bias `b` of 12.
# Its *global norm* is the length of the one long vector that all leaves make together,
# $\sqrt{3^2 + 4^2 + 12^2} = 13$.
#
# Clipping to `max_norm` multiplies every leaf by one and the same factor,
#
# $$ g \cdot \min\left(1, \frac{\mathrm{max\_norm}}{\lVert g \rVert}\right). $$

# %%
grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
clipped, norm = clipjax.clip_grad_norm(grads, max_norm=6.5)
print("norm before:", norm)
print("clipped:    ", clipped)
print("norm after: ", clipjax.global_norm(clipped))
assert norm == 13
assert clipjax.global_norm(clipped) == 6.5
assert jnp.allclose(clipped["w"] / grads["w"], clipped["b"] / grads["b"])  # One factor for all leaves.

# %% [markdown]
# The limit is half the norm, so every entry is halved. A gradient that is already short enough comes back as it was,
# bit for bit. So a clip is no second learning rate: it does nothing at all to ordinary steps, and only shortens the
# unusual ones.

# %%
same, norm = clipjax.clip_grad_norm(grads, max_norm=13.0)
print("at the limit:", same)
assert all(bool((same[key] == grads[key]).all()) for key in grads)

# %% [markdown]
# In two dimensions this can be drawn. The circle has the radius `max_norm`. Arrows that reach beyond it are shortened
# to it, and all arrows keep their direction.


# %%
def arrows(axes, vectors, **style):
  """Draws vectors of shape (n, 2) as arrows from the origin."""
  zeros = np.zeros(len(vectors))
  axes.quiver(zeros, zeros, *vectors.T, angles="xy", scale_units="xy", scale=1, **style)


def clip_each(vectors, max_norm, order=None):
  """Each row clipped as a gradient of its own."""
  return np.asarray(jax.vmap(lambda g: clipjax.clip_grad_norm(g, max_norm, order)[0])(vectors))


vectors = np.array([[3.0, 4.0], [4.5, -1.0], [-3.5, -2.5], [-1.0, 1.2], [0.6, -1.4]], np.float32)
after = clip_each(vectors, 2.0)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
arrows(left, vectors, color=GREY, width=0.006, label="gradient")
arrows(left, after, color=BLUE, width=0.012, label="clipped to 2")
left.add_patch(plt.Circle((0, 0), 2, fill=False, color=BLUE, linestyle="--"))
left.set(xlim=(-5, 5), ylim=(-4.5, 4.5), aspect="equal", xlabel="first entry", ylabel="second entry")
left.set_title("Long arrows end on the circle, short ones stay")
left.legend(loc="upper left")
lengths = np.linspace(0, 10, 201, dtype=np.float32)[:, None]
for limit, colour in ((1.0, GREEN), (2.0, BLUE), (5.0, RED)):
  right.plot(lengths, np.abs(clip_each(lengths, limit)), color=colour, label=f"max_norm = {limit:g}")
right.set(xlabel="norm before the clip", ylabel="norm after the clip", title="No change up to the limit, then constant")
right.legend()
plt.show()

is_long = np.linalg.norm(vectors, axis=1) > 2
assert (after == vectors)[~is_long].all()
assert np.allclose(np.linalg.norm(after[is_long], axis=1), 2)

# %% [markdown]
# ## By value or by norm?
#
# The other kind of clipping limits each entry by itself: everything above `max_value` becomes `max_value`. That is
# simple, but the entries are cut by different factors, so that the direction changes. In between lies a clip of each
# leaf by its own norm. Here are the three on the gradient from above, and the angle by which they turn it:


# %%
def angle(a, b):
  """Degrees between two trees, as vectors."""
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64) for tree in (a, b))
  return np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def show(x):
  """An array with a few digits."""
  return np.array2string(np.asarray(x), precision=3)


by_leaf = clipjax.clip_by_leaf_norm(2.5)
ways = {
  "`clip_grad_norm(grads, 2.5)`": clipjax.clip_grad_norm(grads, 2.5)[0],
  "`clip_by_leaf_norm(2.5)`": by_leaf.update(grads, by_leaf.init(grads))[0],
  "`clip_grad_value(grads, 2.5)`": clipjax.clip_grad_value(grads, 2.5),
}
turned = {name: angle(grads, tree) for name, tree in ways.items()}
rows = [f"| {n} | {show(t['w'])} | {show(t['b'])} | {turned[n]:.1f}° |" for n, t in ways.items()]
by_norm, by_leaf_norm, by_value = turned.values()
assert by_norm < 0.1 < min(by_leaf_norm, by_value)
Markdown("\n".join(["| call | w | b | turned by |", "|---|---|---|--:|", *rows]))

# %% [markdown]
# Only the global norm keeps the direction. The next picture takes gradients of length 3 in all directions. By norm
# they end on a circle, each on its own ray. By value they end on a square, and most of them are drawn towards its
# corners.

# %%
theta = np.linspace(0, 2 * np.pi, 361)
ring = np.stack([np.cos(theta), np.sin(theta)], axis=1).astype(np.float32)
some = 3 * ring[10::30]
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
cut = np.asarray(clipjax.clip_grad_value(some, 1.0))
left.plot(*some.T, "o", color=GREY, label="gradient")
left.plot(*cut.T, "s", color=RED, label="by value")
left.plot(*clip_each(some, 1.0).T, "o", color=BLUE, label="by norm")
for start, end in zip(some, cut, strict=True):
  left.plot(*np.stack([start, end]).T, color=RED, linewidth=0.8)
  left.plot(*np.stack([start, 0 * start]).T, color=BLUE, linewidth=0.8, linestyle=":")
left.plot([1, 1, -1, -1, 1], [1, -1, -1, 1, 1], color=RED, linestyle="--")
left.add_patch(plt.Circle((0, 0), 1, fill=False, color=BLUE, linestyle="--"))
left.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), aspect="equal", xlabel="first entry", ylabel="second entry")
left.set_title("By value: to the corners. By norm: along the ray")
left.legend(loc="upper right", fontsize=8)
for length, style in ((1.2, ":"), (2.0, "--"), (10.0, "-")):
  turns = [angle(g, cut) for g, cut in zip(ring, clipjax.clip_grad_value(length * ring[:91], 1.0), strict=False)]
  right.plot(np.arange(91), turns, color=RED, linestyle=style, label=f"by value, {length:g} times the limit")
right.plot(
  np.arange(91),
  [angle(*pair) for pair in zip(ring, clip_each(ring[:91], 0.5), strict=False)],
  color=BLUE,
  label="by norm",
)
right.set(xlabel="direction of the gradient (degrees)", ylabel="turned by (degrees)")
right.set_title("The longer the gradient, the more a value clip turns it")
right.legend(fontsize=8)
plt.show()
assert max(turns) > 30  # The last curve, 10 times the limit.

# %% [markdown]
# **What to do:** clip by the global norm unless you have a reason not to. A value clip is a reasonable guard where
# single entries are wrong and their direction means nothing anyway.
#
# ## Other norms
#
# The length of a vector can be measured in other ways. The p-norm is $(\sum |g_i|^p)^{1/p}$: p = 2 is the usual
# length, p = 1 the sum of the absolute entries, and p = inf the largest of them. `ord` chooses it. A clip still
# multiplies by one factor and keeps the direction. What changes is the shape of the limit: gradients of length 3,
# clipped to 1, draw it.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
sizes = 2 ** np.arange(0, 17, 2)
for order, colour in ((1, GREEN), (2, BLUE), (4, "#CC79A7"), (jnp.inf, RED)):
  ball = clip_each(3 * ring, 1.0, order)
  assert max(angle(a, b) for a, b in zip(ball[::45], ring[::45], strict=True)) < 0.1
  name = f"ord = {order:g}"
  left.plot(*ball.T, color=colour, label=f"{name}, norm of (3, 4, 12): {clipjax.global_norm(grads, order):.4g}")
  right.loglog(sizes, [clipjax.global_norm(jnp.ones(n), order) for n in sizes], "o-", color=colour, label=name)
left.set(aspect="equal", xlabel="first entry", ylabel="second entry", ylim=(-1.2, 2.1), xlim=(-1.8, 1.8))
left.set_title("Gradients of length 3, clipped to a p-norm of 1")
left.legend(loc="upper center", fontsize=8)
right.set_title("Norms grow with the model, but for ord = inf")
right.set(xlabel="number of entries, all of them 1", ylabel="norm")
right.legend()
plt.show()

# %% [markdown]
# The right panel says what the choice means in practice. For entries of a given size the 1-norm grows with the number
# of entries, the 2-norm with its square root, and the largest entry does not care. A threshold that was right for a
# small model is therefore not right for a large one, and a threshold for one norm says nothing about another.
#
# ## Zero, infinity and NaN
#
# Gradients are sometimes exactly zero, and sometimes not numbers at all. What a clip does there should be something
# that you have decided. `on_nonfinite` decides it for a gradient whose norm is infinite or NaN:


# %%
def result(values, max_norm, policy):
  """What the clip gives, or the error that it raises."""
  try:
    return show(clipjax.clip_grad_norm(jnp.array(values), max_norm, on_nonfinite=policy)[0])
  except FloatingPointError:
    return "FloatingPointError"


policies = ("propagate", "zero", "error")
cases = ([0.0, 0.0], 1.0), ([3.0, 4.0], 0.0), ([3e20, 4e20], 1.0), ([1.0, np.inf], 1.0), ([1.0, np.nan], 1.0)
found = {(str(g), limit): [result(g, limit, policy) for policy in policies] for g, limit in cases}
head = "| gradient | max_norm | " + " | ".join(f'`"{policy}"`' for policy in policies) + " |"
rows = [f"| {g} | {limit:g} | " + " | ".join(texts) + " |" for (g, limit), texts in found.items()]
assert found["[1.0, inf]", 1.0] == found["[1.0, nan]", 1.0] == ["[nan nan]", "[0. 0.]", "FloatingPointError"]
assert found["[0.0, 0.0]", 1.0] == ["[0. 0.]"] * 3
assert found["[3e+20, 4e+20]", 1.0] == ["[0.6 0.8]"] * 3
Markdown("\n".join([head, "|---|--:|---|---|---|", *rows]))

# %% [markdown]
# - A zero gradient stays zero, without a division of 0 by 0, and a limit of 0 gives zeros.
# - The squares of 3e20 do not fit into float32, yet its norm does, and the clip is right.
# - `"propagate"`, the default, makes the trouble visible: *every* entry becomes NaN, also the healthy 1. A clip that
#   gives 0 and NaN instead hides that the whole step is worthless.
# - `"zero"` drops the step, `"error"` stops. Inside `jax.jit` the latter is a check of `jax.experimental.checkify`.
#
# As a transformation in an Optax chain the clip keeps its norm in the optimizer state, and counts such steps:

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
assert (seen["grad/nonfinite_steps"], seen["grad/steps"]) == (1, 3)
assert jnp.isfinite(params["w"]).all()

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
# The formulas differ in small print.
# [PyTorch](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html) multiplies by
# `min(1, c / (norm + 1e-6))`,
# [TensorFlow](https://www.tensorflow.org/api_docs/python/tf/clip_by_global_norm) by `c / max(norm, c)`. Both are one
# line of numpy, so that they can be compared here without either library:

# %%
flat = np.array([3.0, 4.0, 12.0], np.float32)
with np.errstate(invalid="ignore"):  # inf * 0 below.
  for c in (6.5, 13.0, 20.0):
    ours = [jnp.concatenate([g["w"], g["b"]]) for g in (clipjax.clip_grad_norm(grads, c, eps=e)[0] for e in (1e-6, 0))]
    torch_like = flat * min(1, c / (np.linalg.norm(flat) + 1e-6))
    tensorflow_like = flat * c / max(np.linalg.norm(flat), c)
    np.testing.assert_allclose(ours, [torch_like, tensorflow_like], rtol=1e-6)
    print(f"c = {c:4g}   torch {show(torch_like)}   tensorflow {show(tensorflow_like)}   ours the same")
  bad = np.array([1.0, np.inf], np.float32)
  print("torch's formula on [1, inf]:", show(bad * min(1, 1 / (np.linalg.norm(bad) + 1e-6))))

# %% [markdown]
# The last line is the difference that matters. An infinite norm gives the factor 0, so the healthy entries become 0
# and the infinite one NaN. Here `on_nonfinite` decides for all leaves together. In the repository
# `tests/test_golden.py` compares with numbers that the libraries gave.
#
# ## To remember
#
# - Clipping by the global norm multiplies all leaves by one factor: the direction stays, the length is limited, and a
#   short gradient is untouched.
# - Clipping by value or by leaf turns the gradient.
# - A threshold belongs to one norm, one model and one loss. It has to be chosen:
#   [03_choosing_max_norm](03_choosing_max_norm.ipynb).
# - Decide what happens to a gradient that is not finite, and look at the counters.
#
# Next: [02_exploding_rnn](02_exploding_rnn.ipynb), where a network needs the clip. All calls, and what each does at 0,
# inf and NaN: [README](../README.md).
