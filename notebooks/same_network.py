"""One network that reads handwritten digits, written for Flax NNX, Equinox and plain JAX, and the batches it trains on.

All three have one hidden layer with relu, and can begin with the same weights: `start_of` takes them from the NNX
module, `equinox_net` puts them into one of Equinox, and `plain_loss` reads them as they are. What a notebook draws of
them is here too.
"""

import pathlib
import struct
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tensorboardX.proto.event_pb2 import Event

BROKEN = 80  # The step whose batch is bad.
_INPUTS, _HIDDEN, _CLASSES = 64, 48, 10

_pixels, _digits = load_digits(return_X_y=True)
_pixels = _pixels.astype(np.float32)


def batch_of(step: int) -> tuple[jax.Array, jax.Array]:
  """`(pixels, labels)` of a step, which depend on its number alone; those of `BROKEN` are unscaled and mislabelled."""
  rows = np.random.default_rng(step).integers(len(_digits), size=32)
  x, y = jnp.asarray(_pixels[rows]), jnp.asarray(_digits[rows])
  return (x, (y + 1) % 10) if step == BROKEN else (x / 16, y)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
  """The mean over a batch, in nats."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class NnxNet(nnx.Module):
  """The network in Flax NNX."""

  def __init__(self, seed: int = 0):
    rngs = nnx.Rngs(seed)
    self.inner = nnx.Linear(_INPUTS, _HIDDEN, rngs=rngs)
    self.outer = nnx.Linear(_HIDDEN, _CLASSES, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """The logits of a batch."""
    return self.outer(nnx.relu(self.inner(x)))


def start_of(net: NnxNet) -> dict[str, Any]:
  """A copy of the weights: `{"inner": {"kernel", "bias"}, "outer": ...}`."""
  return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(net, nnx.Param)))


def equinox_net(start: dict[str, Any]) -> eqx.nn.MLP:
  """The network in Equinox with these weights; its matrices are transposed, and relu is a leaf of it."""
  net = eqx.nn.MLP(_INPUTS, _CLASSES, width_size=_HIDDEN, depth=1, key=jax.random.key(0))
  weights = [w for layer in (start["inner"], start["outer"]) for w in (layer["kernel"].T, layer["bias"])]
  return eqx.tree_at(lambda m: [w for layer in m.layers for w in (layer.weight, layer.bias)], net, weights)


def plain_loss(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
  """The loss of the network as a function of its weights."""
  hidden = jax.nn.relu(x @ params["inner"]["kernel"] + params["inner"]["bias"])
  return cross_entropy(hidden @ params["outer"]["kernel"] + params["outer"]["bias"], y)


def curves_in(board: pathlib.Path) -> dict[str, dict[int, float]]:
  """What TensorBoard shows of a folder with one event file: a value for each step of each curve."""
  (events,) = board.glob("events*")
  data, curves = events.read_bytes(), {}
  while data:
    (size,) = struct.unpack("<Q", data[:8])  # Length, checksum, event, checksum.
    event = Event.FromString(data[12 : 12 + size])
    for value in event.summary.value:
      curves.setdefault(value.tag, {})[event.step] = value.simple_value
    data = data[16 + size :]
  return curves


def columns(rows: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
  """The rows as one array for each key. "No limit", the largest number of float32, becomes NaN, which is not drawn."""
  return {key: np.array([row[key] if row[key] < 3e38 else np.nan for row in rows]) for key in rows[0]}


def draw_norms(curves: dict[str, dict[int, float]], warmup: int) -> None:
  """The norm before and after the clip and its limit, as they are in an event file."""
  _, ax = plt.subplots(figsize=(8, 3.4), dpi=80, layout="constrained")
  for tag, colour in (("grad/norm", "#999999"), ("grad/norm_clipped", "#0072B2"), ("grad/max_norm", "#009E73")):
    ax.semilogy(list(curves[tag]), list(curves[tag].values()), color=colour, linewidth=1.2, label=tag)
  ax.axvspan(0, warmup, color="#999999", alpha=0.2, label="ZClip's warm-up")
  ax.set(xlabel="step", ylabel="gradient norm", title="The limit begins after the warm-up, and cuts the spike")
  ax.legend(fontsize=8, ncols=2)
  plt.show()


def draw_limits(whole: np.ndarray, after: np.ndarray, forgetful: np.ndarray) -> None:
  """The limits of a run that never stopped, and of two that were resumed with and without their optimizer state."""
  _, ax = plt.subplots(figsize=(8, 3.4), dpi=80, layout="constrained")
  ax.plot(whole, color="#cccccc", linewidth=6, label="never stopped")
  for limits, colour, label in ((after, "black", "resumed with its state"), (forgetful, "#D55E00", "resumed without")):
    ax.plot(range(whole.size - limits.size, whole.size), limits, color=colour, linewidth=1.5, label=label)
  ax.axvline(whole.size - after.size, color="#999999", linestyle=":", label="checkpoint")
  ax.set(xlabel="step", ylabel="ZClip's limit", title="Without its state the run begins a new warm-up")
  ax.legend(fontsize=8)
  plt.show()
