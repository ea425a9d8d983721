"""Digits, a network of one hidden layer, and the pictures of notebook 05.

Parameters are a dict: `up` (64, HIDDEN), `shift` (HIDDEN,), `down` (HIDDEN, 10) and `bias` (10,). The notebook says how
they are spread over devices; nothing here depends on it.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

STEPS, BATCH, HIDDEN = 40, 64, 128
ORANGE, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
plt.rcParams["figure.dpi"] = 80


def batches():
  """STEPS pairs of pixels, shape (BATCH, 64), and digits, shape (BATCH,)."""
  rng = np.random.default_rng(0)
  pixels, digits = load_digits(return_X_y=True)
  rows = [rng.integers(len(digits), size=BATCH) for _ in range(STEPS)]
  return [(jnp.asarray(pixels[r] / 16, jnp.float32), jnp.asarray(digits[r])) for r in rows]


def init_params(key):
  """Random weights on one device."""
  keys = jax.random.split(key)
  return {
    "up": jax.random.normal(keys[0], (64, HIDDEN)) * (2 / 64) ** 0.5,
    "shift": jnp.zeros(HIDDEN),
    "down": jax.random.normal(keys[1], (HIDDEN, 10)) * (2 / HIDDEN) ** 0.5,
    "bias": jnp.zeros(10),
  }


def draw_placement(params):
  """Which devices hold which part of each parameter."""
  fig, axes = plt.subplots(1, 4, figsize=(8.5, 3.4), layout="constrained", width_ratios=(4, 1.4, 1.4, 1.4))
  for ax, (name, x) in zip(axes, params.items(), strict=True):
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


def draw_norms(norms, max_norm):
  """The gradient norm at each step, `{name: norms}`."""
  _, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
  for (name, values), width, colour in zip(norms.items(), (6, 3, 1), ("#cccccc", "#56B4E9", "black"), strict=True):
    ax.plot(values, color=colour, linewidth=width, label=name)
  ax.axhline(max_norm, color=GREEN, label="max_norm")
  ax.set(xlabel="step", ylabel="gradient norm", title="One device or eight, jit or shard_map: one norm", ylim=(0, 1.95))
  ax.set_xticks(range(0, STEPS + 1, 5))
  ax.legend(fontsize=8, ncols=4)
  plt.show()


def draw_local_norms(counts, norms, copies, max_norm):
  """The norm after the clip by the number of devices, and the norm of each device's copy of `bias`."""
  _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
  for name, colour, offset in zip(norms, (ORANGE, BLUE), (-0.2, 0.2), strict=True):
    left.plot(counts, norms[name], "o-", color=colour, label=name)
    right.bar(np.arange(8) + offset, copies[name], 0.4, color=colour, label=name)
  left.axhline(max_norm, color=GREEN, linewidth=1, label="max_norm")
  left.set(xlabel="devices that share the leaves", ylabel="norm after the clip", xticks=counts, ylim=(0, None))
  left.set_title("A local norm: more devices, a longer step", fontsize=10)
  left.legend(fontsize=8)
  right.set(xlabel="device", ylabel="norm of its copy of bias", xticks=range(8))
  right.set_title("Copies of one leaf, clipped by eight factors", fontsize=10)
  right.margins(y=0.25)
  right.legend(fontsize=8, loc="upper right", ncols=2)
  plt.show()
