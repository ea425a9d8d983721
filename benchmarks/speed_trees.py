"""What the files of `speed.py` share: the trees, their bytes, and the names of the variants.

It imports only NumPy: the workers of other frameworks and the page must not need JAX.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Shapes: TypeAlias = Sequence[Sequence[int]]
Case: TypeAlias = dict[str, Any]

DTYPES = ("float32", "bfloat16", "float16")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

# Names of variants that the page or a target looks up.
SUM, PLAIN, NO_CLIP, OPTAX, CLIPJAX = "jnp.sum", "plain", "no clip", "Optax", "clipjax"
LEAF_NORMS = "clipjax.leaf_norms"
UNTRACKED, BY_LEAF, BY_GROUP = "clipjax, track=False", "clipjax, by leaf", "clipjax, by group"
BY_LAYER = "clipjax, by leaf, stacked="
AUTOCLIP, ZCLIP = "clipjax.autoclip", "clipjax.zclip"
EFFECT = "clip_effect of clipjax"
WATCHED, WATCHED_LEAVES = "watch(per_leaf=False) + clipjax", "watch() + clipjax"
LOOK = "watch() + clipjax, a step that looks"
LOOK_EVERY = 16  # A watch counts zeros and measures parameters at every 16th step.
TORCH, TF_EAGER, TF_FUNCTION = "torch", "TensorFlow, eager", "TensorFlow, tf.function"
EAGER, JITTED = "{}, eager", "{}, jitted"
IN_TURN, AT_ONCE = "{}, one after another", "{}, vmap"


class Tree(NamedTuple):
  """Leaves to measure on.

  Attributes:
    key: its key in the benchmark, the same in a quick run.
    title: its name in the tables.
    shapes: shapes of the leaves.
  """

  key: str
  title: str
  shapes: Shapes

  @property
  def parameters(self) -> int:
    """The number of entries in all leaves."""
    return sum(math.prod(shape) for shape in self.shapes)


def transformer(vocabulary: int, outputs: int, width: int, blocks: int) -> Shapes:
  """The leaves of a decoder: embedding, blocks of attention and MLP with their gains, gain, and output."""
  block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), (width,), (width,)]
  return [(vocabulary, width), *block * blocks, (width,), (width, outputs)]


def trees(quick: bool) -> dict[str, Tree]:
  """The four trees by key; small ones in a quick run."""
  if quick:
    found = [
      Tree("leaf", "one leaf 64k", [(2**16,)]),
      Tree("transformer", "Transformer 45k", transformer(512, 512, 32, 1)),
      Tree("many", "10 leaves of 64x64", [(64, 64)] * 10),
      Tree("most", "15 leaves of 32x32", [(32, 32)] * 15),
    ]
  else:
    found = [
      Tree("leaf", "one leaf 16M", [(16 * 2**20,)]),
      Tree("transformer", "Transformer 30M", transformer(16384, 6144, 384, 12)),
      Tree("many", "1000 leaves of 64x64", [(64, 64)] * 1000),
      Tree("most", "5000 leaves of 32x32", [(32, 32)] * 5000),
    ]
  return {tree.key: tree for tree in found}


def arrays(shapes: Shapes) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
  """Gradients: normal entries, the same in every process."""
  rng = np.random.default_rng(0)
  return [rng.standard_normal(tuple(shape), np.float32) for shape in shapes]


def half_norm(parameters: int) -> float:
  """A threshold at half the norm of so many normal entries: every step clips, and no entry becomes tiny."""
  return 0.5 * math.sqrt(parameters)


def case_of(tree: Tree, dtype: str, variants: dict[str, dict[str, Any]]) -> Case:
  """What the JSON keeps of the measurements on one tree."""
  return {
    "key": tree.key,
    "tree": tree.title,
    "dtype": dtype,
    "leaves": len(tree.shapes),
    "parameters": tree.parameters,
    "bytes": tree.parameters * ITEMSIZE[dtype],
    "variants": variants,
  }


def memory() -> int:
  """The memory of this machine in bytes; 0 if unknown."""
  try:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, OSError, ValueError):
    return 0
