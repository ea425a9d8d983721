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
# # With your stack: how does one clip go into Flax NNX, Equinox, plain JAX, TensorBoard and Orbax?
#
# A clip of clipjax is an Optax transformation. It goes wherever an Optax optimizer goes, and its state is part of the
# optimizer state. Here one chain, ZClip before SGD, trains the same network in three frameworks. TensorBoard draws its
# norms, and Orbax saves the run in the middle of ZClip's warm-up. The resumed run equals an uninterrupted one in every
# bit.
#
# The networks and their batches are in [same_network](same_network.py). One batch is broken.

# %%
import logging
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import same_network as nets
from flax import nnx
from tensorboardX import SummaryWriter

import clipjax

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save.
logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # It reports every inf, such as the limit in a warm-up.
STEPS, WARMUP, STOP = 120, 40, 20
folder = Path(tempfile.mkdtemp())

tx = optax.chain(clipjax.zclip(warmup_steps=WARMUP), optax.sgd(0.05, momentum=0.9))

# %% [markdown]
# ## Flax NNX
#
# Pass the chain to `nnx.Optimizer`. `clipjax.metrics` reads the optimizer itself.

# %%
model = nets.NnxNet()
start = nets.start_of(model)  # The other two begin with the same weights.
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x, y):
  loss, grads = nnx.value_and_grad(lambda m: nets.cross_entropy(m(x), y))(model)
  optimizer.update(model, grads)
  return loss


seen = {"Flax NNX": [], "Equinox": []}
for i in range(STEPS):
  loss = nnx_step(model, optimizer, *nets.batch_of(i))
  seen["Flax NNX"].append({"loss": loss} | clipjax.metrics(optimizer))

# %% [markdown]
# ## Equinox
#
# An Equinox model has leaves that are not arrays, here the activation function. Filter them out where Optax expects
# parameters. The clip passes over the None leaves in their places.

# %%
net = nets.equinox_net(start)
eqx_state = tx.init(eqx.filter(net, eqx.is_inexact_array))


@eqx.filter_jit
def eqx_step(net, opt_state, x, y):
  loss, grads = eqx.filter_value_and_grad(lambda m: nets.cross_entropy(jax.vmap(m)(x), y))(net)
  updates, opt_state = tx.update(grads, opt_state, eqx.filter(net, eqx.is_inexact_array))
  return eqx.apply_updates(net, updates), opt_state, loss


for i in range(STEPS):
  net, eqx_state, loss = eqx_step(net, eqx_state, *nets.batch_of(i))
  seen["Equinox"].append({"loss": loss} | clipjax.metrics(eqx_state))

# %% [markdown]
# ## Plain JAX, with TensorBoard
#
# The parameters are a dict and the step is a function. A `clipjax.runs.Recorder` writes what the clip measured to a
# file and to any number of `writers`. A `SummaryWriter` of tensorboardX or torch is one. `push` waits only if the
# device is more than `2 * every` steps behind, which is 100 by default.


# %%
@jax.jit
def step(params, opt_state, x, y):
  loss, grads = jax.value_and_grad(nets.plain_loss)(params, x, y)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def train(state, last, recorder=None):
  """Trains from a state up to a step; returns the new state and what was seen on the way."""
  params, opt_state, rows = state["params"], state["opt_state"], []
  for i in range(int(state["step"]), last):
    params, opt_state, loss = step(params, opt_state, *nets.batch_of(i))
    rows.append({"loss": loss} | clipjax.metrics(opt_state))
    if recorder is not None:
      recorder.push(i, opt_state, loss=loss)
  return {"params": params, "opt_state": opt_state, "step": jnp.int32(last)}, rows


def new_run(params):
  return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}


with SummaryWriter(folder / "board") as board, clipjax.runs.Recorder(folder / "run", writers=[board]) as recorder:
  uninterrupted, seen["plain JAX"] = train(new_run(start), STEPS, recorder)

# %% [markdown]
# `tensorboard --logdir` shows the curves of that folder. We read the event file itself and draw what is in it.

# %%
curves = nets.curves_in(folder / "board")
print(len(curves), "curves, among them", ", ".join(tag for tag in sorted(curves) if tag.startswith("grad/")))
nets.draw_norms(curves, WARMUP)

# %% [markdown]
# ## The same run three times
#
# All three started with the same weights and saw the same batches. Each framework orders its multiplications in its own
# way, so rounding is the only difference.

# %%
column = {name: nets.columns(rows) for name, rows in seen.items()}
apart, clipped = {}, {}
for name, run in column.items():
  apart[name] = max(np.max(np.abs(run[key] / column["plain JAX"][key] - 1)) for key in ("loss", "grad/norm"))
  clipped[name] = int(run["grad/clipped_steps"][-1])
  print(f"{name:10} last loss {run['loss'][-1]:.4f}, {clipped[name]} clipped, relative difference {apart[name]:.0e}")

# %% [markdown]
# ## An Orbax checkpoint in the middle of the warm-up
#
# ZClip collects norms during its warm-up, before it sets a limit. They are in `opt_state`. Save it with the parameters
# and nothing is lost. We stop at step 20 of a warm-up of 40 steps. To restore, Orbax needs only the structure, which
# `jax.eval_shape` gives without making an array.

# %%
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shapes = jax.eval_shape(new_run, start)
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)

with ocp.StandardCheckpointer() as checkpointer:
  stopped, _ = train(new_run(start), STOP)
  checkpointer.save(folder / "checkpoint", stopped)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(folder / "checkpoint", target)

resumed, rows = train(restored, STEPS)
same = jax.tree.leaves(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), uninterrupted, resumed))
print(f"{sum(same)} of {len(same)} arrays are equal in every bit")

# %% [markdown]
# For comparison, we restore the parameters alone and start with a new optimizer state.

# %%
_, forgetful_rows = train(restored | {"opt_state": tx.init(restored["params"])}, STEPS)
whole, after, forgetful = column["plain JAX"], nets.columns(rows), nets.columns(forgetful_rows)
nets.draw_limits(*(run["grad/max_norm"] for run in (whole, after, forgetful)))
first = [int(np.argmax(np.isfinite(run["grad/max_norm"]))) for run in (whole, after, forgetful)]
print(f"first limit at step {first[0]}; resumed, at {STOP + first[1]}; without its state, at {STOP + first[2]}")

# %% [markdown]
# ## What to remember
#
# - A clip is a link of the Optax chain. NNX, Equinox and plain JAX need nothing else.
# - `Recorder(..., writers=[SummaryWriter(...)])` sends every number to TensorBoard.
# - Save `opt_state` with the parameters. A resumed run then equals one that never stopped, adaptive rules included.
# - A checkpoint from `optax.clip_by_global_norm` restores into `clipjax.clip_by_global_norm(max_norm, track=False)`,
#   which keeps no state.
#
# Next: [07_scanned_layers](07_scanned_layers.ipynb), a model that keeps all its layers in one array.
