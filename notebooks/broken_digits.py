"""Digits from a data pipeline with a broken shard, a small network, and the pictures of notebook 04.

Batches are rows of scikit-learn's 8x8 digits. In the batches `BROKEN` the pixels are not divided by 16, as they are in
all others, and the labels are off by one. Parameters are a list of layers, each a dict of `w` and `b`.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

STEPS, BATCH, SIZES = 600, 32, (64, 64, 64, 10)
BROKEN = np.array([150, 220, 300, 301, 380, 450])
IS_BROKEN = np.isin(np.arange(STEPS), BROKEN)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
plt.rcParams["figure.dpi"] = 80

_rng = np.random.default_rng(0)
_pixels, _labels = load_digits(return_X_y=True)
_order = _rng.permutation(len(_labels))
_pixels, _labels = jnp.asarray(_pixels[_order], jnp.float32), jnp.asarray(_labels[_order])
_rows = jnp.asarray(_rng.integers(1440, size=(STEPS, BATCH)))
HELD_OUT = _pixels[1440:] / 16, _labels[1440:]


def batch_of(step):
  """Pixels and labels of a step; works under `jit`."""
  broken = jnp.asarray(IS_BROKEN)[step]
  return _pixels[_rows[step]] / jnp.where(broken, 1, 16), (_labels[_rows[step]] + broken) % 10


def init_params(key):
  """Random weights of two hidden layers and the output."""
  keys = jax.random.split(key, len(SIZES) - 1)
  return [
    {"w": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
    for key, n, m in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
  ]


def loss_fn(params, x, y):
  """Mean cross-entropy, in nats."""
  *hidden, last = params
  for layer in hidden:
    x = jax.nn.relu(x @ layer["w"] + layer["b"])
  return cross_entropy(x @ last["w"] + last["b"], y).mean()


def _mark_broken(ax):
  for i in BROKEN:
    ax.axvline(i, color=ORANGE, linewidth=0.8, alpha=0.5, zorder=0)


def draw_unclipped(run):
  """Held-out loss and gradient norm of one run."""
  _, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
  top.semilogy(run["loss"], color=BLUE, linewidth=1)
  top.set(ylabel="held-out loss (nats)", title="Without a clip, one broken batch undoes what was learned")
  bottom.semilogy(run["norm"], color=BLUE, linewidth=1)
  bottom.set(ylabel="gradient norm", xlabel="step (orange lines: broken batches)")
  for ax in (top, bottom):
    _mark_broken(ax)
  plt.show()


def draw_limits(runs):
  """For each method the norm before the clip, the norm after it, and the limit where there is one."""
  fig, axes = plt.subplots(4, 2, figsize=(8.5, 8.2), sharex=True, sharey=True, layout="constrained")
  for ax, (name, run) in zip(axes.flat, runs.items(), strict=True):
    ax.semilogy(run["norm"], color=GREY, linewidth=0.8, label="norm before the clip")
    ax.semilogy(np.where(run["used"] > 0, run["used"], np.nan), color=BLUE, linewidth=0.8, label="norm after it")
    if name not in ("AdaGC", "AGC"):  # Those have a limit for each leaf or unit.
      there = run["limit"] < np.finfo(np.float32).max  # A step without a limit has the largest number.
      ax.semilogy(np.where(there, run["limit"], np.nan), color=GREEN, linewidth=1.4, label="limit")
    ax.set_title(name, fontsize=10)
    _mark_broken(ax)
  axes[0, 0].set_ylim(0.03, 300)
  fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
  fig.suptitle("The limits follow the run; only the fixed one stays where it was put")
  fig.supylabel("gradient norm")
  for ax in axes[-1]:
    ax.set_xlabel("step (orange lines: broken batches)")
  plt.show()


def draw_comparison(runs, changed):
  """The share of healthy steps that each method changed, and the losses of all runs."""
  _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
  shares = {name: 100 * share for name, share in changed.items() if name != "no clip"}
  left.bar_label(left.barh(list(shares), list(shares.values()), color=BLUE), fmt="%.0f%%", padding=3, fontsize=9)
  left.set(xlabel="healthy steps that were changed (%)", title="Side effects differ widely", xlim=(0, 115))
  left.invert_yaxis()
  highlighted = {"no clip": (ORANGE, "--"), "AutoClip": (BLUE, "-"), "AGC": (GREEN, "-"), "skip_steps": ("black", "-")}
  others = "the others"
  for name, run in runs.items():
    smooth = np.exp(np.convolve(np.log(run["loss"]), np.full(15, 1 / 15), mode="valid"))
    if name in highlighted:
      colour, style = highlighted[name]
      right.semilogy(np.arange(7, STEPS - 7), smooth, style, color=colour, linewidth=1.2, label=name, zorder=3)
    else:
      right.semilogy(np.arange(7, STEPS - 7), smooth, color=GREY, linewidth=0.8, label=others)
      others = None
  right.set(xlabel="step", ylabel="held-out loss (nats), mean of 15 steps", title="Any of them saves the run")
  right.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.65))
  plt.show()
