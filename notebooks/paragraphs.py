"""Paragraphs of unequal length, a small network that reads them, and pictures of what a clip does to its optimizers.

The paragraphs are those of Python's own documentation, in an order drawn once. The network reads four characters and
predicts the next one. A batch is one paragraph, and its loss is a sum over characters: that of a long paragraph is
large without any fault in the data.
"""

import re
from collections.abc import Mapping, Sequence
from pydoc_data import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

HELD_OUT = 400  # The first paragraphs, which are not for training.
LEAVES = "embed", "hidden", "out"
_CONTEXT, _WINDOW, _WIDTH, _HIDDEN = 4, 64, 8, 32

_prose = [p for name in sorted(topics.topics) for p in re.split(r"\n\s*\n", topics.topics[name]) if p.strip()]
_prose = [_prose[i] for i in np.random.default_rng(0).permutation(len(_prose))]
COUNT, CHARACTERS = len(_prose), np.array([len(p) for p in _prose], np.float32)  # How many paragraphs, of what length.
_codes = np.zeros((COUNT, _CONTEXT + _WINDOW), np.int32)  # 0 stands before a paragraph, and fills up after it.
for _row, _paragraph in zip(_codes, _prose, strict=True):
  _row[_CONTEXT:][: len(_paragraph)] = np.frombuffer(_paragraph.encode("ascii", "replace")[:_WINDOW], np.uint8)
_codes, _weights = jnp.asarray(_codes), jnp.asarray(CHARACTERS / CHARACTERS.mean())


def init(key: jax.Array) -> dict[str, jax.Array]:
  """The parameters, by the names in `LEAVES`."""
  embed, hidden, out = jax.random.split(key, 3)
  return {
    "embed": jax.random.normal(embed, (128, _WIDTH)),
    "hidden": jax.random.normal(hidden, (_CONTEXT * _WIDTH, _HIDDEN)) * (2 / _CONTEXT / _WIDTH) ** 0.5,
    "out": jax.random.normal(out, (_HIDDEN, 128)) * 0.01,
  }


def loss_fn(params: dict[str, jax.Array], i: jax.Array) -> jax.Array:
  """The loss of paragraph `i`: the mean over its first 64 characters, times its length over the mean length."""
  x, y = params["embed"][_codes[i]], _codes[i, _CONTEXT:]
  x = jnp.concatenate([x[k : k + _WINDOW] for k in range(_CONTEXT)], axis=-1)
  logits = jax.nn.relu(x @ params["hidden"]) @ params["out"]
  return _weights[i] * optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(where=y > 0)


def held_out_loss(params: dict[str, jax.Array]) -> jax.Array:
  """The loss by character of the paragraphs that are held out, weighted as in training."""
  losses = jax.vmap(loss_fn, (None, 0))(params, jnp.arange(HELD_OUT))
  return losses.sum() / _weights[:HELD_OUT].sum()


def table(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
  """Prints a row of numbers for each optimizer."""
  print(f"{title:9}", *(f"{head:>8}" for head in heads))
  for name, numbers in rows.items():
    print(f"{name:9}", *(f"{number:8.3f}" for number in numbers))


# Pictures -----------------------------------------------------------------------------------------------------------

_COLOURS = "black", "#999999", "#0072B2", "#D55E00", "#009E73"  # Of the five optimizers.
_STYLE = {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3}


@plt.rc_context(_STYLE)
def draw_ratios(heads: Sequence[str], ratios: Mapping[str, np.ndarray], cosines: Mapping[str, np.ndarray]) -> None:
  """The ratio and the cosine of each optimizer's step, for each limit."""
  _, axes = plt.subplots(1, 2, figsize=(10, 3.6))
  for ax, numbers in zip(axes, (ratios, cosines), strict=True):
    for size, name, colour in zip((11, 9, 11, 8, 4), numbers, _COLOURS, strict=True):  # For lines upon each other.
      ax.plot(numbers[name], "o-", color=colour, markersize=size, label=name)
    ax.set(xlabel="limit, from the norms without a clip", xticks=range(len(heads)), xticklabels=heads)
  axes[0].set(yscale="log", ylabel="ratio of the steps", title="Length: only SGD and momentum take shorter steps")
  axes[1].set(ylabel="cosine of the steps", title="Direction: all but plain SGD turn")
  axes[1].legend()
  plt.show()


@plt.rc_context(_STYLE)
def draw_losses(
  rates: np.ndarray,
  unclipped: Mapping[str, np.ndarray],
  ratios: Mapping[str, np.ndarray],
  clipped: Mapping[str, np.ndarray],
) -> None:
  """The loss without a clip at other rates, and that with a clip at the ratio that it leads to."""
  figure, axes = plt.subplots(1, len(ratios), figsize=(13, 3.6), sharey=True)
  figure.suptitle("A low limit: worse than a low rate under SGD, better than any rate tried under Adam, Lion and Muon")
  for ax, name in zip(axes, ratios, strict=True):
    ax.semilogx(rates, unclipped[name], "s--", color="#999999", label="no clip, other rates")
    ax.plot(ratios[name], clipped[name], "o", color="#D55E00", label="clip, base rate")
    ax.set(title=name, xlabel="rate, or ratio")
  axes[0].set(ylabel="held-out loss (nats)", ylim=(2, 5))
  axes[-1].legend(fontsize=8)
  plt.show()


@plt.rc_context(_STYLE)
def draw_steps(norms: np.ndarray, limits: Mapping[str, float], ratios: Mapping[str, np.ndarray]) -> None:
  """The norms of a run with three limits, above the ratio of its steps under each."""
  _, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
  top.semilogy(norms, color="#999999", linewidth=0.8)
  for (head, ratio), colour in zip(ratios.items(), ("#009E73", "#0072B2", "#D55E00"), strict=True):
    top.axhline(limits[head], color=colour)
    bottom.plot(ratio, color=colour, label=head)
  top.set(ylabel="norm of the gradient", title="Norms vary as the paragraphs do, and Adam remembers the long ones")
  bottom.set(ylabel="ratio of Adam's steps", xlabel="step")
  bottom.legend(title="limit", ncols=3)
  plt.show()


@plt.rc_context(_STYLE)
def draw_leaves(seen: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]]) -> None:
  """The ratio and the cosine of each leaf's step, by `(optimizer, clip)`."""
  names = list(dict.fromkeys(name for name, _ in seen))
  figure, axes = plt.subplots(2, len(names), figsize=(12, 4.8), sharex=True, sharey=True)
  figure.suptitle("One factor for all leaves starves the sound ones, hidden and out, or turns them")
  for (name, how), pair in seen.items():
    i, style, colour = names.index(name), *(("o", "#D55E00") if how == "global" else ("D", "#0072B2"))
    for ax, numbers, label in zip(axes[:, i], pair, ("ratio", "cosine"), strict=True):
      ax.plot(numbers, LEAVES, style, color=colour, fillstyle="none", label=how)
      ax.set(xlim=(-0.05, 1.25), ylim=(-0.5, 2.5), xlabel=label)
    axes[0, i].set_title(name)
  axes[0, 3].legend(fontsize=8, title="clip", loc="center left")
  plt.show()
