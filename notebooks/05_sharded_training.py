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
# This notebook makes eight devices out of one CPU and runs anywhere. The two lines with `os.environ` must come before
# JAX is imported; leave them out on real hardware. Data and drawing are in [tensor_parallel.py](tensor_parallel.py).

# %%
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from functools import partial

import jax
import numpy as np
import optax
import tensor_parallel
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import clipjax

print(jax.device_count(), "devices")

# %% [markdown]
# ## A model in pieces
#
# The mesh has two axes. `data` splits the batch. `model` splits the hidden layer: each device holds the columns of
# `up`, the entries of `shift` and the rows of `down` that belong to its hidden units. `bias` is too small to split, and
# every device holds all of it.

# %%
SPECS = {"up": P(None, "model"), "shift": P("model"), "down": P("model", None), "bias": P()}


def mesh_of(model):
  return jax.make_mesh((8 // model, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def place(params, mesh):
  return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in params.items()}


def loss_fn(params, x, y, add_up=lambda x: x, average=lambda x: x):
  hidden = jax.nn.relu(x @ params["up"] + params["shift"])
  logits = add_up(hidden @ params["down"]) + params["bias"]
  return average(optax.softmax_cross_entropy_with_integer_labels(logits, y).mean())


mesh, start, batches = mesh_of(4), tensor_parallel.init_params(jax.random.key(0)), tensor_parallel.batches()
placed = place(start, mesh)
split = [jax.device_put(batch, NamedSharding(mesh, P("data"))) for batch in batches]
tensor_parallel.draw_placement(placed)

# %% [markdown]
# ## `jax.jit`: nothing changes
#
# The step is the one that you would write for a single device. Place the parameters and the batch: XLA adds the partial
# sums of the norm, and every device gets the same factor.

# %%
MAX_NORM = 0.5
tx = optax.chain(clipjax.clip_by_global_norm(MAX_NORM), optax.sgd(0.5, momentum=0.9))


@jax.jit
def jit_step(params, opt_state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


# %% [markdown]
# ## `jax.shard_map`: nothing to configure
#
# Inside `shard_map` the code sees the pieces of one device. The type of each array says over which mesh axes its pieces
# differ, and clipjax reads it, leaf by leaf. It sums the squares of `up` over `model`, and counts `bias` once. The two
# collectives below belong to the model. The clip is the same line as before.

# %%
add_up, average = partial(jax.lax.psum, axis_name="model"), partial(jax.lax.pmean, axis_name="data")
state_specs = optax.tree.map_params(tx, lambda _, spec: spec, tx.init(start), SPECS, transform_non_params=lambda _: P())
specs = {"in_specs": (SPECS, state_specs, P("data"), P("data")), "out_specs": (SPECS, state_specs, P())}


@jax.jit
@partial(jax.shard_map, mesh=mesh, **specs)
def map_step(params, opt_state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y, add_up, average)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def train(step, params, batches):
  opt_state, rows = tx.init(params), []
  for batch in batches:
    # One step at a time: on devices made of one CPU, two steps in flight can wait for each other.
    params, opt_state, loss = jax.block_until_ready(step(params, opt_state, *batch))
    rows.append({"loss": loss} | clipjax.metrics(opt_state))
  return params, {key: np.array([row[key] for row in rows]) for key in rows[0]}


runs = {"one device": train(jit_step, start, batches), "eight, jit": train(jit_step, placed, split)}
runs["eight, shard_map"] = train(map_step, placed, split)
norms = {name: seen["grad/norm"] for name, (_, seen) in runs.items()}
apart = {name: np.max(np.abs(values / norms["one device"] - 1)) for name, values in norms.items()}
for name, (params, seen) in runs.items():
  devices, clipped = len(params["up"].sharding.device_set), seen["grad/clipped_steps"][-1]
  print(f"{name:17} devices {devices}, clipped {clipped} of {len(batches)}, norms apart by at most {apart[name]:.0e}")
tensor_parallel.draw_norms(norms, MAX_NORM)

# %% [markdown]
# All three runs measure the same norms, up to rounding, and clip the same steps.
#
# ## What a local norm would have done
#
# A clip that ignores the mesh takes the norm of what it sees. Optax's clip does this inside `shard_map`. Below, both
# clips get the gradient of the first step, with its split leaves spread over 1, 2, 4 and 8 devices. The checks of
# `shard_map` are off, because the wrong clip does not pass them. Then the types do not name mesh axes, and clipjax
# needs the name of the axis for each leaf.

# %%
AXES = {name: "model" if "model" in spec else None for name, spec in SPECS.items()}
grads = jax.grad(loss_fn)(start, *batches[0])


def both_clips(grads):
  local, _ = optax.clip_by_global_norm(MAX_NORM).update(grads, optax.EmptyState())
  return {"Optax, local norm": local, "clipjax": clipjax.clip_grad_norm(grads, MAX_NORM, axis_name=AXES)[0]}


counts, after, copies = (1, 2, 4, 8), {"Optax, local norm": [], "clipjax": []}, {}
for model in counts:
  clips = {"mesh": mesh_of(model), "in_specs": (SPECS,), "out_specs": dict.fromkeys(after, SPECS), "check_vma": False}
  for name, clipped in jax.jit(jax.shard_map(both_clips, **clips))(place(grads, mesh_of(model))).items():
    after[name].append(float(clipjax.global_norm({leaf: clipped[leaf] for leaf in ("up", "shift", "down")})))
    copies[name] = np.array([np.linalg.norm(shard.data) for shard in clipped["bias"].addressable_shards])
print(f"norm before the clip {clipjax.global_norm(grads):.2f}, max_norm {MAX_NORM}; norm of the split leaves after it:")
for name, values in after.items():
  print(f"{name:17}", ", ".join(f"{v:.2f} on {n}" for n, v in zip(counts, values, strict=True)))
  print(f"{'':17} norms of the copies of bias on 8: from {copies[name].min():.4f} to {copies[name].max():.4f}")
tensor_parallel.draw_local_norms(counts, after, copies, MAX_NORM)

# %% [markdown]
# Two things go wrong, and with the checks off neither raises an error. On the left, each piece may be as long as
# `max_norm`, and the whole gradient is longer than that. It grows with the number of devices: the same program on
# another mesh is another training run. On the right, `bias` is one parameter with eight copies, and each device
# multiplies its copy by its own factor. The copies differ from the first step on.
#
# ## Average the loss, not the gradient
#
# With data parallelism, the loss of a device covers its own share of the batch. Parameters that every device holds get
# a gradient that is already *summed* over `data`: JAX's types insert that sum into the backward pass. A `pmean` of the
# gradient comes too late. It averages eight equal sums and changes nothing. `pmean` belongs to the loss, inside the
# function that you differentiate. Here are all three on eight shards of the first batch:


# %%
def three_ways(params, x, y):
  summed = jax.grad(loss_fn)(params, x, y)
  right = jax.grad(lambda p: jax.lax.pmean(loss_fn(p, x, y), "data"))(params)
  return summed, jax.lax.pmean(summed, "data"), right


mesh_of_data = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
mapped = jax.shard_map(three_ways, mesh=mesh_of_data, in_specs=(P(), P("data"), P("data")), out_specs=P())
names = "loss of each device", "the same, then pmean", "pmean of the loss"
ways = dict(zip(names, jax.jit(mapped)(start, *batches[0]), strict=True))
times = {name: float(clipjax.global_norm(tree) / clipjax.global_norm(grads)) for name, tree in ways.items()}
for name, ratio in times.items():
  print(f"{name:20}  gradient {ratio:.2f} times as long as on one device")

# %% [markdown]
# A gradient that is eight times too long makes `max_norm` eight times too tight. Clipped steps hide it, because their
# length comes out right.
#
# ## A gradient that nobody has reduced
#
# `pcast` switches the automatic sum off. Reducing is then your job, and here, before the clip, `pmean` of the gradients
# would be right. If you forget it, clipjax sees it in the types and refuses as soon as the step is traced. It needs the
# parameters for this: pass them to `update`.


# %%
def unreduced(params, x, y):
  mine = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
  return tx.update(jax.grad(loss_fn)(mine, x, y, add_up), tx.init(params), params)[0]


try:
  jax.shard_map(unreduced, mesh=mesh, in_specs=(SPECS, P("data"), P("data")), out_specs=SPECS)(placed, *split[0])
except ValueError as error:
  refused = str(error)
print(refused)

# %% [markdown]
# ## What to remember
#
# - With `jax.jit` on sharded arrays, and in `shard_map` with its checks on, write the clip as for one device.
# - In `shard_map(check_vma=False)` and `pmap` the types do not name mesh axes. Name the axes with `axis_name=`, as
#   `both_clips` does.
# - Average the loss over `data` inside the function that you differentiate. `pmean` of the gradients is too late.
# - If the norm after the clip grows with the number of devices, or copies differ, somebody took a local norm.
#
# [docs/sharding.md](../docs/sharding.md) has a program for each way, for several processes and for gradient
# accumulation, and counts what a clip costs on 8 to 100,000 devices. Next:
# [06_with_your_stack](06_with_your_stack.ipynb).
