"""A small Transformer that scans over its layers, a gradient with a planted fault, and pictures of its layers.

The model predicts the next character of the prose in Python's own documentation. `nnx.vmap` makes its blocks, each from
a random key of its own, and `nnx.scan` runs one after the other. So axis 0 of every array in `blocks` counts layers.
"""

import re
from collections.abc import Mapping, Sequence
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import LogNorm

from clipjax.runs import Run

LAYERS, SICK = 8, 4  # How many there are, and the one with the fault; they count from 0.
_WIDTH, _HEADS, _LENGTH, _BATCH, _CHARACTERS = 32, 4, 32, 8, 128

# Rows of dashes and of blanks make spikes of their own: each is cut to one character.
_prose = re.sub(r"(\W)\1+", r"\1", "\n".join(topics.topics[name] for name in sorted(topics.topics)))
_codes = np.frombuffer(_prose.encode("ascii", "replace"), np.uint8).astype(np.int32)


class _Block(nnx.Module):
  """Attention and an MLP, each after a norm."""

  def __init__(self, rngs: nnx.Rngs):
    self.norm_1, self.norm_2 = nnx.RMSNorm(_WIDTH, rngs=rngs), nnx.RMSNorm(_WIDTH, rngs=rngs)
    self.qkv = nnx.Linear(_WIDTH, 3 * _WIDTH, use_bias=False, rngs=rngs)
    self.out = nnx.Linear(_WIDTH, _WIDTH, use_bias=False, rngs=rngs)
    self.up = nnx.Linear(_WIDTH, 4 * _WIDTH, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(4 * _WIDTH, _WIDTH, use_bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(self.qkv(self.norm_1(x)).reshape(*x.shape[:2], _HEADS, -1), 3, axis=-1)
    x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
    return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


_make_blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(_Block))
_run_blocks = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)


class Transformer(nnx.Module):
  """Eight blocks between an embedding and a head."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed, self.place = nnx.Embed(_CHARACTERS, _WIDTH, rngs=rngs), nnx.Embed(_LENGTH, _WIDTH, rngs=rngs)
    self.blocks = _make_blocks(rngs)
    self.norm, self.head = nnx.RMSNorm(_WIDTH, rngs=rngs), nnx.Linear(_WIDTH, _CHARACTERS, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """The logits of the next characters, shape (batch, length, 128)."""
    x = _run_blocks(self.blocks, self.embed(x) + self.place(jnp.arange(_LENGTH)))
    return self.head(self.norm(x))


def batch_of(step: int) -> np.ndarray:
  """The texts of a step, as codes of characters, shape (8, 33)."""
  starts = np.random.default_rng(step).integers(len(_codes) - _LENGTH, size=(_BATCH, 1))
  return _codes[starts + np.arange(_LENGTH + 1)]


@nnx.jit
def gradient(model: Transformer, texts: jax.Array, factor: jax.Array) -> tuple[jax.Array, nnx.State]:
  """The loss and its gradient, in which that of layer `SICK` is multiplied by `factor`: the planted fault."""

  def loss_fn(model: Transformer) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(texts[:, :-1]), texts[:, 1:]).mean()

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  grads["blocks"] = jax.tree.map(lambda g: g.at[SICK].multiply(factor), grads["blocks"])
  return loss, grads


def by_layer(run: Run, key: str) -> np.ndarray:
  """Norms of shape (steps, layers): those of all slices of a layer, taken together."""
  labels, norms = run.leaves[key.split("/", maxsplit=1)[0]], run.vectors[key][1]
  of_layer = [[label.endswith(f"[{i}]") for label in labels] for i in range(LAYERS)]
  return np.stack([np.linalg.norm(norms[:, chosen], axis=1) for chosen in of_layer], axis=1)


def draw_norms(run: Run) -> None:
  """The norm of the gradient over the steps, above those of the layers."""
  _, (top, bottom) = plt.subplots(
    2, 1, figsize=(9, 5), dpi=80, sharex=True, height_ratios=(1, 1.6), layout="constrained"
  )
  top.semilogy(run.steps, run["grad/norm"], color="#0072B2", linewidth=1)
  top.set(ylabel="gradient norm", title="The norm of the whole gradient says when")
  image = bottom.pcolormesh(run.steps, range(LAYERS), by_layer(run, "grad/norm").T, norm=LogNorm(), cmap="cividis")
  bottom.set(xlabel="step", ylabel="layer", yticks=range(LAYERS), title="The norms by layer say where")
  bottom.figure.colorbar(image, ax=bottom, label="gradient norm of the layer")
  plt.show()


def draw_factors(names: Sequence[str], tables: Mapping[str, np.ndarray]) -> None:
  """Under each title, the factor of a clip for each leaf and layer."""
  figure, axes = plt.subplots(1, len(tables), figsize=(10.5, 3.4), dpi=80, sharey=True, layout="constrained")
  for ax, (title, table) in zip(axes, tables.items(), strict=True):
    image = ax.imshow(table, norm=LogNorm(0.003, 1), cmap="cividis", aspect="auto")
    for (row, column), factor in np.ndenumerate(table):
      ax.text(column, row, f"{factor:.2g}", ha="center", va="center", fontsize=8, color="wk"[int(factor > 0.1)])
    ax.set(xlabel="layer", xticks=range(LAYERS), title=title)
  axes[0].set_yticks(range(len(names)), [name.removeprefix("blocks/") for name in names])
  figure.colorbar(image, ax=axes, label="factor of the clip")
  plt.show()


def draw_updates(steps: np.ndarray, sizes: Mapping[str, np.ndarray], first: int, healthy: int) -> None:
  """The updates of the sick layer and of a healthy one from a step on, a line for each run."""
  _, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), dpi=80, sharey=True, layout="constrained")
  for ax, layer, title in zip(axes, (SICK, healthy), ("the sick layer", "a healthy layer"), strict=True):
    for (name, norms), colour in zip(sizes.items(), ("#bbbbbb", "black", "#D55E00", "#0072B2"), strict=True):
      ax.plot(steps, norms[:, layer], color=colour, linewidth=6 if colour == "#bbbbbb" else 1.5, label=name)
    ax.set(xlim=(first, steps[-1]), xlabel="step", title=f"Layer {layer}, {title}")
  axes[0].set(ylabel="norm of Adam's update", ylim=0)
  axes[1].legend(fontsize=8)
  plt.show()
