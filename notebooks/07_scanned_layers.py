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
# # Scanned layers: which layer spiked, and can the clip act on it alone?
#
# A deep model is often one block that is scanned over its layers. It compiles fast, and it keeps the weights of all
# layers in one array. To an optimizer that array is one leaf. So the norm of a leaf mixes all layers, and a clip by
# leaf scales all of them. The argument `stacked=` says which axis of a leaf counts layers. Each slice along it is then
# a leaf of its own, with a name, a norm, a limit and a factor.
#
# ## A Transformer that is scanned over eight layers
#
# It predicts the next character of the prose in Python's own documentation. `nnx.vmap` makes eight blocks, each from a
# random key of its own, and `nnx.scan` runs one after the other.

# %%
import re
import tempfile
import textwrap
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import LogNorm

import clipjax

plt.rcParams["figure.dpi"] = 80
LAYERS, WIDTH, HEADS, LENGTH, BATCH, CHARACTERS = 8, 32, 4, 32, 8, 128
STEPS, WARMUP, SPIKE, SICK = 120, 30, 80, 4
folder = tempfile.mkdtemp()

# Rows of dashes and of blanks make spikes of their own: one is left of each.
prose = re.sub(r"(\W)\1+", r"\1", "\n".join(topics.topics[name] for name in sorted(topics.topics)))
codes = np.frombuffer(prose.encode("ascii", "replace"), np.uint8).astype(np.int32)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.norm_1, self.norm_2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
    self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
    self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
    self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

  def __call__(self, x):
    q, k, v = jnp.split(self.qkv(self.norm_1(x)).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
    x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
    return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


make_blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))
run_blocks = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)


class Model(nnx.Module):
  def __init__(self, rngs):
    self.embed, self.place = nnx.Embed(CHARACTERS, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
    self.blocks = make_blocks(rngs)
    self.norm, self.head = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, CHARACTERS, rngs=rngs)

  def __call__(self, x):
    x = run_blocks(self.blocks, self.embed(x) + self.place(jnp.arange(LENGTH)))
    return self.head(self.norm(x))


print("blocks/up/kernel", Model(nnx.Rngs(0)).blocks.up.kernel.shape)

# %% [markdown]
# Axis 0 of this array, and of every other one in `blocks`, counts the layers.
#
# ## A planted fault
#
# A real layer may spike because its attention overflows, or because a batch is unusual. Here the spike is planted, so
# that we know the answer: at step 80 the gradient of layer 4 is multiplied by 300. Layers count from 0. Neither watch
# nor clip is told the step or the layer.
#
# `train` trains a new model under a given clip, and records what was measured at every step. A watch before the clip
# measures the gradient. A second one, at the end of the chain, measures the update that Adam makes of it. That one
# always looks by layer, so that we can compare runs.


# %%
@nnx.jit
def gradient(model, windows, factor):
  def loss_fn(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(windows[:, :-1]), windows[:, 1:]).mean()

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  grads["blocks"] = jax.tree.map(lambda g: g.at[SICK].multiply(factor), grads["blocks"])  # The planted fault.
  return loss, grads


@nnx.jit
def update(optimizer, model, grads):
  optimizer.update(model, grads)


def batch_of(step):
  return codes[np.random.default_rng(step).integers(len(codes) - LENGTH, size=(BATCH, 1)) + np.arange(LENGTH + 1)]


def layers(path, leaf):
  # The axis that counts layers, None for a leaf without one.
  return 0 if path.startswith("blocks/") else None


def optimizer_of(*before_adam):
  return optax.chain(*before_adam, optax.adam(2e-3), clipjax.watch(name="update", stacked=layers))


def train(name, tx, factor=300.0):
  # Returns the trained model, its optimizer, and the recorded run.
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  with clipjax.runs.Recorder(f"{folder}/{name}.jsonl", every=1) as recorder:  # 1: norms by leaf at every step.
    for step in range(1, STEPS + 1):
      loss, grads = gradient(model, batch_of(step), jnp.float32(factor if step == SPIKE else 1))
      update(optimizer, model, grads)
      recorder.push(step, optimizer, loss=loss)
  return model, optimizer, clipjax.runs.read_run(f"{folder}/{name}.jsonl")


# %% [markdown]
# ## Without `stacked=`: one norm for all layers
#
# AdaGC clips each leaf to a multiple of its own average norm. We let a norm be four times its average, so that the
# usual noise passes. The warm-up of 30 steps only collects norms. `on_nonfinite="zero"` drops a step with a NaN.

# %%
ADAGC = {"ratio": 4.0, "decay": 0.9, "warmup_steps": WARMUP, "max_norm": jnp.inf, "on_nonfinite": "zero"}
tx = optimizer_of(clipjax.watch(), clipjax.adagc(**ADAGC))
model, optimizer, whole = train("whole", tx)
at = SPIKE - 1  # Step 1 is in row 0.


def times_usual(norms):
  # The norms of the spike against their median over the 20 steps before.
  return norms[at] / np.median(norms[at - 20 : at], axis=0)


def show(run, names):
  print(f"{'step ' + str(SPIKE):24} {'times the usual norm':>20} {'factor of the clip':>20}")
  for name in names:
    print(f"{name:24} {times_usual(run['grad/norm/' + name]):20.1f} {run['grad/scale/' + name][at]:20.4f}")


names = [name for name in whole.leaves["grad"] if name.startswith("blocks/")]
show(whole, names)
factors_whole = np.array([np.full(LAYERS, whole[f"grad/scale/{name}"][at]) for name in names])

# %% [markdown]
# Something in the blocks has spiked. Which layer it was, we do not learn. The clip has one factor for each leaf, and
# that factor falls on all eight layers.
#
# A NaN tells no more. We plant one in layer 4, in one further step, and ask `raise_if_nonfinite`.


# %%
def message_of_a_nan(model, optimizer):
  update(optimizer, model, gradient(model, batch_of(STEPS + 1), jnp.float32(jnp.nan))[1])
  try:
    clipjax.raise_if_nonfinite(optimizer)
  except FloatingPointError as error:
    return str(error)


message = message_of_a_nan(model, optimizer)
print(textwrap.fill(message, 110))
assert all(f"'{name}'" in message for name in names)

# %% [markdown]
# ## With `stacked=`: each layer by itself
#
# `stacked=` takes a function of a leaf's name and the leaf. It returns the axis, or None. Our function `layers` returns
# 0 for what is in `blocks`. There are two other ways:
#
# - Parameters in plain dicts can have a prefix tree of axes, such as `{"blocks": 0, "head": None}`.
# - A Flax model can name the axis, as in `stacked="layers"`. This wants variables with axis names (`out_sharding`), and
#   `transform_metadata={nnx.PARTITION_NAME: "layers"}` in both `nnx.vmap` and `nnx.scan`.

# %%
tx = optimizer_of(clipjax.watch(stacked=layers), clipjax.adagc(**ADAGC, stacked=layers))
model, optimizer, stacked = train("stacked", tx)
slices = [name for name in stacked.leaves["grad"] if name.startswith("blocks/")]
print(len(names), "leaves in blocks,", len(slices), "slices, of which these have risen most:")
show(stacked, sorted(slices, key=lambda name: -times_usual(stacked[f"grad/norm/{name}"]))[: len(names) + 2])
assert {name for name in slices if stacked[f"grad/scale/{name}"][at] < 1} == {f"{name}[{SICK}]" for name in names}

# %% [markdown]
# The six slices of layer 4 stand on top, and they alone are clipped. The next ones belong to other layers: their norms
# are about as usual, and their factor is 1.
#
# The record has the norm of each slice at every step. For the picture we take together those of one layer.


# %%
def by_layer(run, key):
  # Norms of shape (steps, layers): those of all slices of a layer, taken together.
  labels, norms = run.leaves[key.split("/")[0]], run.vectors[key][1]
  of_layer = [[label.endswith(f"[{i}]") for label in labels] for i in range(LAYERS)]
  return np.stack([np.linalg.norm(norms[:, chosen], axis=1) for chosen in of_layer], axis=1)


norms = by_layer(stacked, "grad/norm")
fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(1, 1.6), layout="constrained")
top.semilogy(stacked.steps, stacked["grad/norm"], color="#0072B2", linewidth=1)
top.set(ylabel="gradient norm", title="The norm of the whole gradient says when")
image = bottom.pcolormesh(stacked.steps, range(LAYERS), norms.T, norm=LogNorm(), cmap="cividis")
bottom.set(xlabel="step", ylabel="layer", yticks=range(LAYERS), title="The norms by layer say where")
fig.colorbar(image, ax=bottom, label="gradient norm of the layer")
plt.show()

# %% [markdown]
# ## Who pays for the spike
#
# These are the factors of the two clips at step 80, for each leaf and layer.

# %%
factors = np.array([[stacked[f"grad/scale/{name}[{i}]"][at] for i in range(LAYERS)] for name in names])
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.4), sharey=True, layout="constrained")
titles = ("Without stacked=: all layers are cut", f"With stacked=: layer {SICK} alone")
for ax, table, title in zip(axes, (factors_whole, factors), titles, strict=True):
  image = ax.imshow(table, norm=LogNorm(0.003, 1), cmap="cividis", aspect="auto")
  for (row, column), factor in np.ndenumerate(table):
    ax.text(column, row, f"{factor:.2g}", ha="center", va="center", fontsize=8, color="wk"[int(factor > 0.1)])
  ax.set(xlabel="layer", xticks=range(LAYERS), title=title)
axes[0].set_yticks(range(len(names)), [name.removeprefix("blocks/") for name in names])
fig.colorbar(image, ax=axes, label="factor of the clip at the spike")
plt.show()


# %% [markdown]
# One factor for all layers is wrong twice. It is too small for the healthy layers, which lose nearly all of their
# gradient. And it is too large for the sick one, since a limit for eight layers together lets one of them grow further:
# `up/kernel[4]` came with 258 times its usual norm. The factor 0.052 leaves it 13 times as large as usual, the factor
# 0.016 of its own 4 times, which is the ratio that we asked for.
#
# What does that change in training? Two more runs help to tell: one without the fault, under the clip with `stacked=`,
# and one with the fault and without a clip. We look at Adam's update, of the sick layer and of a healthy one. The table
# has updates as shares of those of the run without a fault.

# %%
_, _, healthy = train("healthy", tx, factor=1.0)
_, _, unclipped = train("unclipped", optimizer_of(clipjax.watch(stacked=layers)))
runs = {"no fault": healthy, "no clip": unclipped, "AdaGC": whole, "AdaGC, stacked=": stacked}
steps_of = {name: by_layer(run, "update/norm") for name, run in runs.items()}

fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), sharey=True, layout="constrained")
for ax, layer, title in zip(axes, (SICK, 1), ("the sick layer", "a healthy layer"), strict=True):
  for (name, sizes), colour in zip(steps_of.items(), ("#bbbbbb", "black", "#D55E00", "#0072B2"), strict=True):
    ax.plot(healthy.steps, sizes[:, layer], color=colour, linewidth=6 if name == "no fault" else 1.5, label=name)
  ax.set(xlim=(SPIKE - 20, STEPS), xlabel="step", title=f"Layer {layer}, {title}")
axes[0].set(ylabel="norm of Adam's update", ylim=0)
axes[1].legend(fontsize=8)
plt.show()

print(f"{'':15} layer {SICK}, step {SPIKE}   layer {SICK}, step {STEPS}   others, step {SPIKE}   final loss")
for name, sizes in steps_of.items():
  ratios, loss = sizes / steps_of["no fault"], runs[name]["loss"][-20:].mean()
  of_others = np.delete(ratios[at], SICK)
  print(f"{name:15} {ratios[at, SICK]:16.2f} {ratios[-1, SICK]:18.2f}", end=" ")
  print(f"{of_others.min():9.2f} to {of_others.max():.2f} {loss:12.2f}")
assert np.array_equal(*(np.delete(steps_of[name][at], SICK) for name in ("no fault", "AdaGC, stacked=")))
assert [int(run["grad/clipped_steps"][-1]) for run in (healthy, whole, stacked)] == [0, 1, 1]

# %% [markdown]
# With `stacked=` the update of the seven healthy layers is exactly that of the run without a fault. The update of layer
# 4 is 1.65 times as large, and usual again about twelve steps later. Without `stacked=` it is 2.67 times as large, and
# the healthy layers lose 5 to 12% of their update. That is little beside the gradient that they lost, since most of an
# update is Adam's momentum.
#
# The run without a clip shows why one spike matters under Adam. Its running mean of squares is slow to forget: 40 steps
# later the updates of layer 4 are still less than a third of what they should be. The loss shows nothing of it: it is
# 3.02 in all four runs.
#
# ## A NaN in one layer

# %%
message = message_of_a_nan(model, optimizer)
print(textwrap.fill(message, 110))
assert set(re.findall(r"'(blocks/.*?)'", message)) == {f"{name}[{SICK}]" for name in names}

# %% [markdown]
# This message names all slices of layer 4, and no other. (Its advice is general: our clip drops such a step already.)
#
# ## One limit for each layer
#
# AdaGC has a limit for each of the 48 slices. You may want one for each layer instead. `clip_by_group_norm` asks its
# function `groups` for the label of each slice, and slices of one label share a norm. Our limits are twice the 90th
# percentile of the layer's norms before the spike. None exempts a group.


# %%
def layer_of(path, leaf):
  return f"layer {path.split('[')[1][:-1]}" if path.startswith("blocks/") else "the rest"


limits = {f"layer {i}": 2 * float(np.percentile(norms[WARMUP:at, i], 90)) for i in range(LAYERS)}
clip = clipjax.clip_by_group_norm({**limits, "the rest": None}, layer_of, stacked=layers)
_, grads = gradient(model, batch_of(STEPS + 2), jnp.float32(300))  # The fault again, on the trained model.
_, state = jax.jit(clip.update)(grads, clip.init(grads))
seen = clipjax.metrics(state)
for label in limits:
  print(label, *(f"{key} {seen[f'grad/{key}/{label}']:7.4f}" for key in ("norm", "max_norm", "scale")), sep="   ")
  assert (seen[f"grad/scale/{label}"] < 1) == (label == f"layer {SICK}")

# %% [markdown]
# Layer 4 alone is above its limit. All of its slices get the same factor, 0.0088, and the other layers keep their
# gradient.
#
# ## What to take away
#
# - A model that scans over its layers has one leaf for all of them. Without `stacked=` a clip by leaf cuts the healthy
#   layers with the sick one, and lets the sick one keep too much.
# - Pass `stacked=` to `clipjax.watch` to find a layer. Its slices, such as `blocks/up/kernel[4]`, are in
#   `clipjax.metrics`, in a recorded run, and in the message of `clipjax.raise_if_nonfinite`.
# - Pass it to `clip_by_leaf_norm`, `clip_by_block_rms`, `adagc` or `adaptive_grad_clip` to clip each layer by itself.
# - Pass it to `clip_by_group_norm`, with a label for each layer, and a layer has one limit.
# - A clip by the global norm needs none of this. It keeps the direction of the whole gradient, so it has one factor for
#   all layers on purpose.
#
# Next: [08_what_a_clip_does](08_what_a_clip_does.ipynb), what a clip changes under five optimizers.
