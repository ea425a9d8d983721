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
# Many deep models scan one block over their layers. That compiles fast, and it keeps the weights of all layers in one
# array. To an optimizer that array is one leaf: its norm mixes all layers, and a clip by leaf scales all of them. With
# `stacked=` you say which axis counts layers. Each slice along it is then a leaf of its own, with a name, a norm, a
# limit and a factor.
#
# ## A planted fault
#
# The model is [a Transformer that scans over eight layers](scanned_transformer.py) and predicts the next character of a
# text. At step 60 we multiply the gradient of layer 4 by 300; layers count from 0. Neither watch nor clip is told.
#
# `train` records every step. One watch measures the gradient before the clip. Another one, at the end of the chain,
# measures the update that Adam makes of it.

# %%
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scanned_transformer as scanned
from flax import nnx
from scanned_transformer import LAYERS, SICK, Transformer, batch_of, by_layer, gradient

import clipjax

STEPS, WARMUP, SPIKE = 100, 30, 60
folder = tempfile.mkdtemp()
print("blocks/up/kernel", Transformer(nnx.Rngs(0)).blocks.up.kernel.shape)


def layers(path, leaf):
  # The axis that counts layers, None for a leaf without one.
  return 0 if path.startswith("blocks/") else None


@nnx.jit
def update(optimizer, model, grads):
  optimizer.update(model, grads)


def train(name, *before_adam, factor=300.0):
  # Returns the trained model, its optimizer, and the recorded run.
  tx = optax.chain(*before_adam, optax.adam(2e-3), clipjax.watch(name="update", stacked=layers))
  model = Transformer(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  with clipjax.runs.Recorder(f"{folder}/{name}.jsonl", every=1) as recorder:  # 1: norms by leaf at every step.
    for step in range(1, STEPS + 1):
      loss, grads = gradient(model, batch_of(step), jnp.float32(factor if step == SPIKE else 1))
      update(optimizer, model, grads)
      recorder.push(step, optimizer, loss=loss)
  return model, optimizer, clipjax.runs.read_run(f"{folder}/{name}.jsonl")


# %% [markdown]
# Axis 0 of this array counts the layers, and so does axis 0 of every other array in `blocks`.
#
# ## Without `stacked=`: one norm for all layers
#
# AdaGC clips each leaf to a multiple of its own average norm. We allow four times the average, which leaves the usual
# noise alone. `on_nonfinite="zero"` drops a step with a NaN.

# %%
ADAGC = {"ratio": 4.0, "decay": 0.9, "warmup_steps": WARMUP, "max_norm": jnp.inf, "on_nonfinite": "zero"}
model, optimizer, whole = train("whole", clipjax.watch(), clipjax.adagc(**ADAGC))
at = SPIKE - 1  # Step 1 is in row 0.


def times_usual(run, name):
  # The norm at the spike over its median in the 20 steps before.
  norms = run[f"grad/norm/{name}"]
  return norms[at] / np.median(norms[at - 20 : at])


def show(run, names):
  print(f"{'step ' + str(SPIKE):24} {'times the usual norm':>20} {'factor of the clip':>20}")
  for name in names:
    print(f"{name:24} {times_usual(run, name):20.1f} {run['grad/scale/' + name][at]:20.4f}")


names = [name for name in whole.leaves["grad"] if name.startswith("blocks/")]
show(whole, names)

# %% [markdown]
# Something in the blocks spiked, but this does not say which layer. The clip has one factor for each leaf, and applies
# it to all eight layers.
#
# A NaN tells no more. We plant one in layer 4 at the next step, and ask `raise_if_nonfinite`.


# %%
def message_of_a_nan(model, optimizer):
  update(optimizer, model, gradient(model, batch_of(STEPS + 1), jnp.float32(jnp.nan))[1])
  try:
    clipjax.raise_if_nonfinite(optimizer)
  except FloatingPointError as error:
    return str(error)


message = message_of_a_nan(model, optimizer)
print(textwrap.fill(message, 110))

# %% [markdown]
# ## With `stacked=`: each layer by itself
#
# `stacked=` takes a function of a leaf's name and the leaf, which returns an axis or None. Our `layers` returns 0 for
# everything in `blocks`. There are two other ways:
#
# - For parameters in plain dicts, a prefix tree of axes such as `{"blocks": 0, "head": None}`.
# - For a Flax model that names the axis, `stacked="layers"`. Its variables need axis names (`out_sharding`), and
#   `nnx.vmap` and `nnx.scan` both need `transform_metadata={nnx.PARTITION_NAME: "layers"}`.

# %%
model, optimizer, stacked = train("stacked", clipjax.watch(stacked=layers), clipjax.adagc(**ADAGC, stacked=layers))
slices = [name for name in stacked.leaves["grad"] if name.startswith("blocks/")]
print(len(names), "leaves in blocks,", len(slices), "slices. These rose most:")
risen = sorted(slices, key=lambda name: -times_usual(stacked, name))
show(stacked, risen[: len(names) + 2])
scanned.draw_norms(stacked)

# %% [markdown]
# The six slices of layer 4 are on top, and only they are clipped. The next slices belong to other layers: their norms
# rose little, and their factor is 1. The picture combines the slices of each layer.
#
# ## Who pays for the spike
#
# These are the factors of both clips at step 60.

# %%
factors = np.array([[stacked[f"grad/scale/{name}[{i}]"][at] for i in range(LAYERS)] for name in names])
factors_whole = np.array([np.full(LAYERS, whole[f"grad/scale/{name}"][at]) for name in names])
scanned.draw_factors(names, {"Without stacked=": factors_whole, "With stacked=": factors})
up, rise = names.index("blocks/up/kernel"), times_usual(stacked, f"blocks/up/kernel[{SICK}]")
print(f"blocks/up/kernel[{SICK}] came with {rise:.0f} times its usual norm. It is left with", end=" ")
print(f"{rise * factors_whole[up, SICK]:.1f} times without stacked=, {rise * factors[up, SICK]:.1f} times with it.")

# %% [markdown]
# One factor for all layers is wrong twice. It is too small for the healthy layers, which lose nearly all of their
# gradient. And it is too large for the sick one: a limit for eight layers together lets one of them grow further. With
# `stacked=` the sick slice is left with about four times its usual norm, the ratio that we asked for.
#
# What does this change in training? Two more runs help to tell: one without the fault, and one without a clip. We
# compare Adam's updates. In the table they are multiples of those of the run without the fault.

# %%
_, _, healthy = train("healthy", clipjax.watch(stacked=layers), clipjax.adagc(**ADAGC, stacked=layers), factor=1.0)
_, _, unclipped = train("unclipped", clipjax.watch(stacked=layers))
runs = {"no fault": healthy, "no clip": unclipped, "AdaGC": whole, "AdaGC, stacked=": stacked}
sizes = {name: by_layer(run, "update/norm") for name, run in runs.items()}
scanned.draw_updates(healthy.steps, sizes, first=SPIKE - 20, healthy=1)

print(f"{'':15} layer {SICK}, step {SPIKE}   layer {SICK}, step {STEPS}   others, step {SPIKE}   final loss")
ratios = {name: norms / sizes["no fault"] for name, norms in sizes.items()}
others = {name: np.delete(ratio[at], SICK) for name, ratio in ratios.items()}
final = {name: run["loss"][-20:].mean() for name, run in runs.items()}
for name, ratio in ratios.items():
  print(f"{name:15} {ratio[at, SICK]:16.2f} {ratio[-1, SICK]:18.2f}", end=" ")
  print(f"{others[name].min():9.2f} to {others[name].max():.2f} {final[name]:12.2f}")

# %% [markdown]
# With `stacked=` the seven healthy layers get exactly the update of the run without a fault, and the update of layer 4
# rises least. Without `stacked=` the healthy layers lose a part of their update. The part is small beside the gradient
# that they lost, because most of an update is Adam's momentum.
#
# The run without a clip shows why one spike matters under Adam. Its running mean of squares forgets slowly: 40 steps
# later the updates of layer 4 are about a quarter of what they should be. The loss shows nothing of this: it ends alike
# in all four runs.
#
# ## A NaN in one layer

# %%
message_stacked = message_of_a_nan(model, optimizer)
print(textwrap.fill(message_stacked, 110))

# %% [markdown]
# This message names the slices of layer 4, and no others. (Its advice is general: our clip already drops such a step.)
#
# ## One limit for each layer
#
# AdaGC has a limit for each of the 48 slices. You may prefer one for each layer. `clip_by_group_norm` asks its function
# `groups` for a label, and slices with the same label share a norm. Our limits are twice the 90th percentile of each
# layer's norms before the spike. A limit of None exempts a group.


# %%
def layer_of(path, leaf):
  return f"layer {path.split('[')[1][:-1]}" if path.startswith("blocks/") else "the rest"


usual = 2 * np.percentile(by_layer(stacked, "grad/norm")[WARMUP:at], 90, axis=0)
limits = {f"layer {i}": float(limit) for i, limit in enumerate(usual)}
clip = clipjax.clip_by_group_norm({**limits, "the rest": None}, layer_of, stacked=layers)
_, grads = gradient(model, batch_of(STEPS + 2), jnp.float32(300))  # The fault again, on the trained model.
_, state = jax.jit(clip.update)(grads, clip.init(grads))
seen = clipjax.metrics(state)
for label in limits:
  print(label, *(f"{key} {seen[f'grad/{key}/{label}']:7.4f}" for key in ("norm", "max_norm", "scale")), sep="   ")

# %% [markdown]
# Only layer 4 is above its limit. All of its slices get the same factor, and the other layers keep their gradient.
#
# ## What to remember
#
# - A model that scans over its layers has one leaf for all of them. Without `stacked=` a clip by leaf cuts the healthy
#   layers together with the sick one, and leaves the sick one too large.
# - Pass `stacked=` to `clipjax.watch` to find a layer. Slices such as `blocks/up/kernel[4]` then appear in
#   `clipjax.metrics`, in the recorded run, and in the message of `clipjax.raise_if_nonfinite`.
# - Pass it to `clip_by_leaf_norm`, `clip_by_block_rms`, `adagc` or `adaptive_grad_clip` to clip each slice by itself.
# - Pass it to `clip_by_group_norm`, with a label for each layer, to give each layer one limit.
# - A clip by the global norm does not need it. It keeps the direction of the whole gradient, so it has one factor for
#   all layers on purpose.
#
# Next: [08_what_a_clip_does](08_what_a_clip_does.ipynb), what a clip changes under five optimizers.
