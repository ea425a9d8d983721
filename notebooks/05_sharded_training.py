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
# # Sharded training: whose norm is it?
#
# A clip by the global norm needs one number that depends on every entry of the gradient. When the gradient is spread
# over eight devices, no device has all entries. Who adds them up, and what happens if nobody does?
#
# This notebook makes eight devices out of one CPU, so it runs anywhere. That has to be said before JAX is imported; on
# real hardware leave out the two lines with `os.environ`.

# %%
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import clipjax

plt.rcParams["figure.dpi"] = 80
print(jax.device_count(), "devices")
assert jax.device_count() == 8

# %% [markdown]
# ## A model in pieces
#
# The mesh has two axes. The batch is split over `data`. The hidden layer is split over `model`: each device holds some
# of the columns of `up`, the entries of `shift` and the rows of `down` that belong to its hidden units. `bias` is too
# small to split, so every device has all of it.

# %%
STEPS, BATCH, HIDDEN, MAX_NORM = 40, 64, 128, 0.5
SPECS = {"up": P(None, "model"), "shift": P("model"), "down": P("model", None), "bias": P()}

rng = np.random.default_rng(0)
pixels, digits = load_digits(return_X_y=True)
rows = [rng.integers(len(digits), size=BATCH) for _ in range(STEPS)]
batches = [(jnp.asarray(pixels[r] / 16, jnp.float32), jnp.asarray(digits[r])) for r in rows]
keys = jax.random.split(jax.random.key(0))
start = {
  "up": jax.random.normal(keys[0], (64, HIDDEN)) * (2 / 64) ** 0.5,
  "shift": jnp.zeros(HIDDEN),
  "down": jax.random.normal(keys[1], (HIDDEN, 10)) * (2 / HIDDEN) ** 0.5,
  "bias": jnp.zeros(10),
}


def mesh_of(model):
  """Eight devices, so many of them along `model`."""
  return jax.make_mesh((8 // model, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def place(params, mesh):
  return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in params.items()}


def loss_fn(params, x, y, add_up=lambda x: x, average=lambda x: x):
  hidden = jax.nn.relu(x @ params["up"] + params["shift"])
  logits = add_up(hidden @ params["down"]) + params["bias"]
  return average(optax.softmax_cross_entropy_with_integer_labels(logits, y).mean())


# %%
mesh = mesh_of(4)
placed = place(start, mesh)
fig, axes = plt.subplots(1, 4, figsize=(8.5, 3.4), layout="constrained", width_ratios=(4, 1.4, 1.4, 1.4))
for ax, (name, x) in zip(axes, placed.items(), strict=True):
  pieces, picture = {}, np.zeros(x.shape if x.ndim == 2 else (*x.shape, 1))
  for device, index in x.sharding.devices_indices_map(x.shape).items():
    pieces.setdefault(str(index), (index, []))[1].append(str(device.id))
  for i, (index, devices) in enumerate(pieces.values(), start=1):
    picture[index] = i if len(pieces) > 1 else 9
    row, col = np.argwhere(picture == picture[index].max()).mean(0)
    ax.text(col, row, "all" if len(devices) == 8 else "\n".join(devices), ha="center", va="center", fontsize=9)
  ax.imshow(picture, aspect="auto", cmap="Pastel1", vmin=1, vmax=9, interpolation="nearest")
  ax.set_title(f"{name} {x.shape}", fontsize=9)
  ax.set(xticks=[], yticks=[])
fig.suptitle("Which of the devices 0 to 7 hold which part: four pieces, twice each, and a bias on all")
plt.show()

# %% [markdown]
# ## `jax.jit`: nothing changes
#
# The step is the one you would write for a single device. Place the parameters and the batch; XLA adds the partial sums
# of the norm, and every device gets the same factor. Below it runs on one device and on eight.

# %%
tx = optax.chain(clipjax.clip_by_global_norm(MAX_NORM), optax.sgd(0.5, momentum=0.9))


@jax.jit
def jit_step(params, opt_state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


# %% [markdown]
# ## `jax.shard_map`: nothing to configure
#
# Inside of `shard_map` the code sees one device's piece. The type of each array says over which mesh axes the pieces
# differ, and clipjax reads it, leaf by leaf: the squares of `up` are added up over `model`, `bias` is counted once. The
# two collectives below are those of the model itself; the clip is the same line as before.

# %%
add_up, average = partial(jax.lax.psum, axis_name="model"), partial(jax.lax.pmean, axis_name="data")
state_specs = optax.tree.map_params(tx, lambda _, spec: spec, tx.init(start), SPECS, transform_non_params=lambda _: P())


@jax.jit
@partial(
  jax.shard_map,
  mesh=mesh,
  in_specs=(SPECS, state_specs, P("data"), P("data")),
  out_specs=(SPECS, state_specs, P()),
)
def map_step(params, opt_state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y, add_up, average)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def train(step, params, batches):
  opt_state, rows = tx.init(params), []
  for batch in batches:
    # One step at a time: devices made of one CPU share its threads, and two steps in flight can wait for each other.
    params, opt_state, loss = jax.block_until_ready(step(params, opt_state, *batch))
    rows.append({"loss": loss} | clipjax.metrics(opt_state))
  return params, {key: np.array([row[key] for row in rows]) for key in rows[0]}


split = [jax.device_put(batch, NamedSharding(mesh, P("data"))) for batch in batches]
runs = {
  "one device": train(jit_step, start, batches),
  "eight, jit": train(jit_step, placed, split),
  "eight, shard_map": train(map_step, placed, split),
}
reference_params, reference = runs["one device"]
for name, (params, seen) in runs.items():
  apart = np.max(np.abs(seen["grad/norm"] / reference["grad/norm"] - 1))
  devices, share = len(params["up"].sharding.device_set), seen["grad/clip_fraction"][-1]
  print(f"{name:17} {devices} devices, clipped {share:.0%} of the steps, norms apart by {apart:.0e} at most")
  assert apart < 1e-3
  assert seen["grad/clipped_steps"][-1] == reference["grad/clipped_steps"][-1] > 0

fig, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
for (name, (_, seen)), width, colour in zip(runs.items(), (6, 3, 1), ("#cccccc", "#56B4E9", "black"), strict=True):
  ax.plot(seen["grad/norm"], color=colour, linewidth=width, label=name)
ax.axhline(MAX_NORM, color="#009E73", label="max_norm")
ax.set(xlabel="step", ylabel="gradient norm", title="One device or eight, jit or shard_map: one norm", ylim=(0, 1.9))
ax.legend(fontsize=8, ncols=4)
plt.show()

# %% [markdown]
# ## What a local norm would have done
#
# A clip that knows nothing of the mesh takes the norm of what it sees. Optax's clip does, inside of `shard_map`. We
# give it the gradient of the first step, its split leaves spread over 1, 2, 4 and 8 devices.

# %%
_, grads = jax.value_and_grad(loss_fn)(start, *batches[0])


def in_pieces(clip, grads, model):
  """Clips the pieces of a gradient inside of shard_map; the checks are off, as the wrong clip does not pass them."""
  mesh = mesh_of(model)
  mapped = jax.shard_map(clip, mesh=mesh, in_specs=(SPECS,), out_specs=SPECS, check_vma=False)
  return jax.jit(mapped)(place(grads, mesh))


def local(grads):
  return optax.clip_by_global_norm(MAX_NORM).update(grads, optax.EmptyState())[0]


def right(grads):
  axes = {name: "model" if "model" in spec else None for name, spec in SPECS.items()}  # For want of the types.
  return clipjax.clip_grad_norm(grads, MAX_NORM, axis_name=axes)[0]


counts, clips = (1, 2, 4, 8), {"Optax, local norm": local, "clipjax": right}
norms, copies = {name: [] for name in clips}, {}
for name, clip in clips.items():
  for model in counts:
    clipped = in_pieces(clip, grads, model)
    norms[name].append(float(clipjax.global_norm({leaf: clipped[leaf] for leaf in ("up", "shift", "down")})))
  copies[name] = np.array([np.linalg.norm(shard.data) for shard in clipped["bias"].addressable_shards])
print(f"norm before the clip {clipjax.global_norm(grads):.2f}, max_norm {MAX_NORM}; of the split leaves after it")
for name, values in norms.items():
  print(f"{name:17}", ", ".join(f"{v:.2f} on {n}" for n, v in zip(counts, values, strict=True)))
  print(f"{'':17} copies of bias: from {copies[name].min():.4f} to {copies[name].max():.4f}")
assert np.ptp(norms["clipjax"]) < 1e-5
assert np.ptp(copies["clipjax"]) == 0
assert all(np.diff(norms["Optax, local norm"]) > 0)
assert norms["Optax, local norm"][-1] > 2 * MAX_NORM
assert copies["Optax, local norm"].max() > 1.1 * copies["Optax, local norm"].min()

# %%
fig, (left, rest) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, colour, offset in (("Optax, local norm", "#D55E00", -0.2), ("clipjax", "#0072B2", 0.2)):
  left.plot(counts, norms[name], "o-", color=colour, label=name)
  rest.bar(np.arange(8) + offset, copies[name], 0.4, color=colour, label=name)
left.axhline(MAX_NORM, color="#009E73", linewidth=1, label="max_norm")
left.set(xlabel="devices that share the leaves", ylabel="norm after the clip", xticks=counts, ylim=(0, None))
left.set_title("A local norm: more devices, a longer step", fontsize=10)
left.legend(fontsize=8)
rest.set(xlabel="device", ylabel="norm of its copy of bias")
rest.set_title("Copies of one leaf, clipped by eight factors", fontsize=10)
rest.margins(y=0.25)
rest.legend(fontsize=8, loc="upper right", ncols=2)
plt.show()

# %% [markdown]
# Two things go wrong, and with the checks off neither raises an error. On the left: each piece is let through up to
# `max_norm`, so that the whole gradient is longer than it may be, and the more devices, the longer. The same program on
# another number of devices is another training. On the right: `bias` is one parameter with eight copies, and each
# device multiplies its copy by a factor of its own. From the first step on, the copies are no longer the same.
#
# ## A gradient that nobody has reduced
#
# The other way to get a wrong norm is to clip before the gradients of the data shards have been averaged. Where
# `update` is given the parameters, clipjax sees it in the types, and refuses when the step is traced.


# %%
def unreduced(params, x, y):
  mine = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)  # Reductions are now up to you.
  grads = jax.grad(loss_fn)(mine, x, y, add_up)
  return tx.update(grads, tx.init(params), params)[0]


try:
  jax.shard_map(unreduced, mesh=mesh, in_specs=(SPECS, P("data"), P("data")), out_specs=SPECS)(placed, *split[0])
except ValueError as error:
  print(error)
else:
  raise AssertionError("an unreduced gradient passed")

# %% [markdown]
# ## What to remember
#
# - `jax.jit` on sharded arrays, and `shard_map` with its checks on: write the clip as for one device.
# - `shard_map(check_vma=False)` and `pmap` have no types: name the axes with `axis_name=`, as `right` does above.
# - Average the loss or the gradients over `data` before the clip.
# - A norm after the clip that grows with the number of devices, or copies that differ, mean a local norm.
#
# [docs/sharding.md](../docs/sharding.md) has a program for each way, for several processes and for gradient
# accumulation, and counts what a clip costs on 8 to 100,000 devices. Next:
# [06_with_your_stack](06_with_your_stack.ipynb).
