"""Handwritten digits in forty small files, two of them bad, and a network that reads them.

The data are scikit-learn's: images of 8x8 pixels from 0 to 16. The first 32 files are there from the start. A second
delivery, `LATE`, brings eight more. In one of these nobody divided the pixels by 16, and in another one the labels are
off by one. `read` returns what a file holds; it does not say which files are bad.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

NAMES = tuple(f"part-{i:02}" for i in range(40))
LATE = NAMES[32:]
_RAW, _SHIFTED = "part-35", "part-38"
_IMAGES = 32  # In a file, which is a batch.
_WIDTHS = 64, 64, 64, 64, 10

_pixels, _digits = load_digits(return_X_y=True)
_shuffled = np.random.default_rng(0).permutation(len(_digits))
_pixels, _digits = _pixels[_shuffled].astype(np.float32), _digits[_shuffled].astype(np.int32)


def read(name: str, *, repaired: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """`(pixels, labels)` of a file, shapes (32, 64) and (32,); with `repaired=True` what a bad file should have held."""
  start = NAMES.index(name) * _IMAGES
  x, y = _pixels[start : start + _IMAGES], _digits[start : start + _IMAGES]
  if name == _RAW and not repaired:
    return x, y
  return x / 16, (y + 1) % 10 if name == _SHIFTED and not repaired else y


def order(seed: int = 0) -> list[str]:
  """The file of each of 360 steps: five passes over the first delivery, then five over both, each in a new order."""
  draw = np.random.default_rng(seed)
  passes = [NAMES[:32]] * 5 + [NAMES] * 5
  return [names[i] for names in passes for i in draw.permutation(len(names))]


def init(seed: int = 0) -> dict[str, dict[str, jax.Array]]:
  """The parameters: four dense layers, each with a matrix "w" and a bias "b"."""
  keys = jax.random.split(jax.random.key(seed), len(_WIDTHS) - 1)
  return {
    f"layer_{i}": {"w": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
    for i, (key, n, m) in enumerate(zip(keys, _WIDTHS, _WIDTHS[1:], strict=False))
  }


def loss_fn(params: dict[str, dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
  """The mean cross-entropy of a batch, with relu between the layers."""
  *inner, last = params.values()
  for layer in inner:
    x = jax.nn.relu(x @ layer["w"] + layer["b"])
  return optax.softmax_cross_entropy_with_integer_labels(x @ last["w"] + last["b"], y).mean()


def held_out_loss(params: dict[str, dict[str, jax.Array]]) -> float:
  """The mean cross-entropy of the 517 images that are in no file."""
  start = len(NAMES) * _IMAGES
  return float(loss_fn(params, _pixels[start:] / 16, _digits[start:]))
