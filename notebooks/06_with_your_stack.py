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
# A clip of clipjax is an Optax transformation. Whatever takes an Optax optimizer takes the clip with it, and the clip's
# state is a part of the optimizer's state. In this notebook one chain, ZClip before SGD, trains the same network
# written three times; its norms go to TensorBoard; and a run is stopped in the middle of ZClip's warm-up and resumed
# from an Orbax checkpoint, so that not one bit differs from a run that was never stopped.

# %%
import logging
import struct
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

import clipjax

plt.rcParams["figure.dpi"] = 80
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save.
logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # It reports every inf: the limit of a warm-up is one.
STEPS, WARMUP, STOP, BROKEN = 160, 40, 20, 100
folder = Path(tempfile.mkdtemp())

pixels, digits = load_digits(return_X_y=True)
pixels, digits = jnp.asarray(pixels, jnp.float32), jnp.asarray(digits)


def batch_of(step):
  """The batch of a step depends on nothing but its number; one batch is broken, as in notebook 04."""
  rows = np.random.default_rng(step).integers(len(digits), size=32)
  x, y = pixels[rows], digits[rows]
  return (x, (y + 1) % 10) if step == BROKEN else (x / 16, y)


def cross_entropy(logits, y):
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


tx = optax.chain(clipjax.zclip(warmup_steps=WARMUP), optax.sgd(0.05, momentum=0.9))

# %% [markdown]
# ## Flax NNX
#
# Pass the chain to `nnx.Optimizer`. `clipjax.metrics` reads the optimizer itself.


# %%
class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(64, 48, rngs=rngs)
    self.outer = nnx.Linear(48, 10, rngs=rngs)

  def __call__(self, x):
    return self.outer(nnx.relu(self.inner(x)))


model = NnxNet(nnx.Rngs(0))
start = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))  # For the others to begin with.
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x, y):
  loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(x), y))(model)
  optimizer.update(model, grads)
  return loss


seen = {"Flax NNX": [], "Equinox": []}
for i in range(STEPS):
  loss = nnx_step(model, optimizer, *batch_of(i))
  seen["Flax NNX"].append({"loss": loss} | clipjax.metrics(optimizer))

# %% [markdown]
# ## Equinox
#
# An Equinox model has leaves that are no arrays, here the activation of the MLP. Filter them out where Optax is given
# parameters; the clip lets the None leaves pass that stand in their place.

# %%
net = eqx.nn.MLP(64, 10, width_size=48, depth=1, key=jax.random.key(0))  # Its activation is relu too.
inner, outer = start["inner"], start["outer"]
weights = [inner["kernel"].T, inner["bias"], outer["kernel"].T, outer["bias"]]
net = eqx.tree_at(lambda m: [w for layer in m.layers for w in (layer.weight, layer.bias)], net, weights)
eqx_state = tx.init(eqx.filter(net, eqx.is_inexact_array))


@eqx.filter_jit
def eqx_step(net, opt_state, x, y):
  loss, grads = eqx.filter_value_and_grad(lambda m: cross_entropy(jax.vmap(m)(x), y))(net)
  updates, opt_state = tx.update(grads, opt_state, eqx.filter(net, eqx.is_inexact_array))
  return eqx.apply_updates(net, updates), opt_state, loss


for i in range(STEPS):
  net, eqx_state, loss = eqx_step(net, eqx_state, *batch_of(i))
  seen["Equinox"].append({"loss": loss} | clipjax.metrics(eqx_state))

# %% [markdown]
# ## Plain JAX, with TensorBoard
#
# Parameters are a dict, the step is a function. A `clipjax.runs.Recorder` writes what the clip has measured to a file
# and to any number of `writers`; a tensorboardX or torch `SummaryWriter` is one. It never makes the loop wait for the
# device.


# %%
@jax.jit
def step(params, opt_state, x, y):
  def loss_fn(params):
    hidden = jax.nn.relu(x @ params["inner"]["kernel"] + params["inner"]["bias"])
    return cross_entropy(hidden @ params["outer"]["kernel"] + params["outer"]["bias"], y)

  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def train(state, last, recorder=None):
  """Trains from a state up to a step; returns the next state, and what was seen on the way."""
  params, opt_state, rows = state["params"], state["opt_state"], []
  for i in range(int(state["step"]), last):
    params, opt_state, loss = step(params, opt_state, *batch_of(i))
    rows.append({"loss": loss} | clipjax.metrics(opt_state))
    if recorder is not None:
      recorder.push(i, opt_state, loss=loss)
  return {"params": params, "opt_state": opt_state, "step": jnp.int32(last)}, rows


def new_run(params):
  return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}


with SummaryWriter(folder / "board") as board, clipjax.runs.Recorder(folder / "run", writers=[board]) as recorder:
  uninterrupted, seen["plain JAX"] = train(new_run(start), STEPS, recorder)

# %% [markdown]
# `tensorboard --logdir` on that folder shows the curves. Here we read the event file itself, and draw what is in it. A
# row is numbered by the updates that the clip has seen, from 1 on, so the broken batch stands one further to the right.

# %%
(events,) = (folder / "board").glob("events*")
data, curves = events.read_bytes(), {}
while data:
  (size,) = struct.unpack("<Q", data[:8])  # Length, checksum, event, checksum.
  event = Event.FromString(data[12 : 12 + size])
  for value in event.summary.value:
    curves.setdefault(value.tag, {})[event.step] = value.simple_value
  data = data[16 + size :]
print(len(curves), "curves, among them", ", ".join(tag for tag in sorted(curves) if tag.startswith("grad/")))
assert list(curves["grad/norm"].values()) == [float(row["grad/norm"]) for row in seen["plain JAX"]]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
for tag, colour in (("grad/norm", GREY), ("grad/norm_clipped", BLUE), ("grad/max_norm", GREEN)):
  ax.semilogy(list(curves[tag]), list(curves[tag].values()), color=colour, linewidth=1.2, label=tag)
ax.axvspan(0, WARMUP, color=GREY, alpha=0.2, label="ZClip's warm-up")
ax.set(xlabel="step", ylabel="gradient norm", title="The event file: a limit from the warm-up on, and the spike is cut")
ax.legend(fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# ## The same run three times
#
# All three began with the same weights and saw the same batches. They may differ by rounding, since the frameworks
# order the multiplications differently, and by nothing else.


# %%
def columns(rows):
  # No limit, in the warm-up, is the largest number: it is left out.
  return {key: np.array([row[key] if row[key] < 3e38 else np.nan for row in rows]) for key in rows[0]}


column = {name: columns(rows) for name, rows in seen.items()}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for (name, run), width, colour in zip(column.items(), (6, 3, 1), ("#cccccc", "#56B4E9", "black"), strict=True):
  axes[0].semilogy(run["loss"], color=colour, linewidth=width, label=name)
  axes[1].semilogy(run["grad/norm_clipped"], color=colour, linewidth=width, label=name)
axes[0].set(xlabel="step", ylabel="loss (nats)", title="One run, three frameworks")
axes[1].set(xlabel="step", ylabel="norm after the clip", title="and one clip")
axes[0].legend(fontsize=8)
plt.show()

for name, run in column.items():
  apart = max(np.max(np.abs(run[key] / column["plain JAX"][key] - 1)) for key in ("loss", "grad/norm"))
  clipped = int(run["grad/clipped_steps"][-1])
  print(f"{name:10} final loss {run['loss'][-1]:.4f}, clipped {clipped} steps, apart by at most {apart:.1e}")
  assert apart < 1e-2
  assert clipped == column["plain JAX"]["grad/clipped_steps"][-1]

# %% [markdown]
# ## An Orbax checkpoint in the middle of the warm-up
#
# ZClip's warm-up collects norms before it sets its first limit, so a run that stops there has something to lose. What
# it has collected is in `opt_state`. Save that with the parameters and nothing is lost. We stop at step 20 of a warm-up
# of 40. A process that resumes needs no arrays of its own: `jax.eval_shape` gives Orbax the structure. (Here one
# process plays both parts.)

# %%
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shapes = jax.eval_shape(new_run, start)
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)

with ocp.StandardCheckpointer() as checkpointer:
  stopped, _ = train(new_run(start), STOP)
  checkpointer.save(folder / "checkpoint", stopped)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(folder / "checkpoint", target)

resumed, rows_after = train(restored, STEPS)
after, whole = columns(rows_after), column["plain JAX"]
same = jax.tree.leaves(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), uninterrupted, resumed))
print(f"{sum(same)} of {len(same)} arrays are identical to the last bit; {len(jax.tree.leaves(start))} are parameters")
assert int(restored["step"]) == STOP < WARMUP
assert all(same)
assert all(after[key].tobytes() == whole[key][STOP:].tobytes() for key in after)

# %% [markdown]
# For comparison, the same checkpoint with its optimizer state thrown away: the momentum is lost, and the warm-up begins
# anew.

# %%
_, rows = train(restored | {"opt_state": tx.init(restored["params"])}, STEPS)
forgetful = columns(rows)
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
x = np.arange(STOP, STEPS)
ax.plot(whole["grad/max_norm"], color="#cccccc", linewidth=6, label="never stopped")
ax.plot(x, after["grad/max_norm"], color="black", linewidth=1, label="resumed with its state")
ax.plot(x, forgetful["grad/max_norm"], color=ORANGE, linewidth=1.5, label="resumed without")
ax.axvline(STOP, color=GREY, linestyle=":", label="checkpoint")
ax.set(xlabel="step", ylabel="ZClip's limit", title="With its state the run goes on; without, the warm-up begins anew")
ax.legend(fontsize=8)
plt.show()

first = [int(np.argmax(np.isfinite(run["grad/max_norm"]))) for run in (whole, after, forgetful)]
print(f"first limit at step {first[0]}; resumed, at {STOP + first[1]}; without its state, at {STOP + first[2]}")
assert first == [WARMUP, WARMUP - STOP, WARMUP]
assert not np.array_equal(forgetful["loss"], after["loss"])

# %% [markdown]
# ## What to remember
#
# - The clip is a link of the Optax chain: NNX, Equinox and plain JAX need nothing else.
# - A `Recorder` with `writers=[SummaryWriter(...)]` sends every number to TensorBoard.
# - Save `opt_state` with the parameters, and a resumed run is the run that was never stopped, adaptive rules included.
# - A checkpoint that was written with `optax.clip_by_global_norm` restores into
#   `clipjax.clip_by_global_norm(max_norm, track=False)`, which keeps no state.
#
# Next: [07_scanned_layers](07_scanned_layers.ipynb), a model that keeps all of its layers in one array.
