"""The steps that `accelerators.py` compiles and `gpu.py` times: their trees, their clips, and a small decoder.

A step is `(data, state, params) -> (params, state)` and donates state and parameters. The data are gradients or, in a
training step, the tokens from which the step computes its gradients.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from speed_trees import BY_LEAF, CLIPJAX, EFFECT, NO_CLIP, OPTAX, WATCHED_LEAVES, ZCLIP

import clipjax

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Step: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]

DTYPES = ("float32", "bfloat16")
SEQUENCE, HEADS = 256, 8


class Case(NamedTuple):
  """The input of a step.

  Attributes:
    title: its name on the page.
    shapes: shapes of the parameters, by name.
    trains: whether the step computes its gradients from tokens.
    stacked: whether the leaves under "blocks/" are layers stacked along axis 0, each with its own norm.
    effect: whether `clip_effect`, which runs a second optimizer, is compiled too.
  """

  title: str
  shapes: Shapes
  trains: bool = False
  stacked: bool = False
  effect: bool = False


def transformer(width: int, blocks: int, vocabulary: int, positions: int, *, stacked: bool = False) -> Shapes:
  """The leaves of a decoder: embeddings, blocks of attention and MLP with gains and a bias, gain, output."""
  block = {
    "gain1": (width,),
    "qkv": (width, 3 * width),
    "out": (width, width),
    "gain2": (width,),
    "up": (width, 4 * width),
    "bias": (4 * width,),
    "down": (4 * width, width),
  }
  if stacked:
    inside: Shapes = {f"blocks/{name}": (blocks, *shape) for name, shape in block.items()}
  else:
    inside = {f"{i}/{name}": shape for i in range(blocks) for name, shape in block.items()}
  ends = {"gain": (width,), "head": (width, vocabulary), "head_bias": (vocabulary,)}
  return {"embedding": (vocabulary, width), "positions": (positions, width), **inside, **ends}


def cases(quick: bool = False) -> dict[str, Case]:
  """The cases by key; a quick run has fewer leaves, as compile time grows with them."""
  count, blocks, layers, depth = (30, 1, 6, 2) if quick else (300, 4, 24, 8)
  whole = transformer(512, depth, 8192, 512)
  return {
    "one": Case("one leaf of 16M", {"w": (4096, 4096)}),
    "tf": Case(f"Transformer of {len(whole)} leaves", whole, effect=True),
    "many": Case(f"{count} leaves of 64x64", {f"w{i}": (64, 64) for i in range(count)}),
    "stack": Case(
      f"{layers} stacked layers, 12 leaves", transformer(512, layers, 8192, 512, stacked=True), stacked=True
    ),
    "train": Case("training step", transformer(512, blocks, 8192, SEQUENCE), trains=True),
  }


def transformations(case: Case, optimizer: optax.GradientTransformation) -> dict[str, optax.GradientTransformation]:
  """The optimizer after each clip, by the name of the clip; the first entry has no clip."""
  out: dict[str, optax.GradientTransformation] = {
    name: optax.chain(clip, optimizer) for name, clip in clips(case).items()
  }
  if case.effect:
    out[EFFECT] = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optimizer)
  return out


def clips(case: Case) -> dict[str, optax.GradientTransformation]:
  """The clips by name. If layers are stacked, the clip by leaf clips by layer."""

  def layers(path: str, leaf: Any) -> int | None:
    del leaf
    return 0 if path.startswith("blocks/") else None

  stacked = layers if case.stacked else None
  return {
    NO_CLIP: optax.identity(),
    OPTAX: optax.clip_by_global_norm(1.0),
    CLIPJAX: clipjax.clip_by_global_norm(1.0),
    BY_LEAF: clipjax.clip_by_leaf_norm(1.0, stacked=stacked),
    ZCLIP: clipjax.zclip(),
    WATCHED_LEAVES: optax.chain(clipjax.watch(stacked=stacked), clipjax.clip_by_global_norm(1.0)),
  }


def step_of(tx: optax.GradientTransformation, trains: bool = False, shardings: Any = None) -> Step:
  """A step of a transformation: computes the updates and applies them.

  Args:
    tx: the clip and the optimizer.
    trains: whether the data are tokens.
    shardings: shardings of the gradients that a training step computes; None lets the compiler choose.
  """

  def step(data: Any, state: Any, params: Any) -> tuple[Any, Any]:
    grads = jax.grad(loss)(params, data) if trains else data
    if trains and shardings is not None:
      grads = jax.lax.with_sharding_constraint(grads, shardings)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


# The decoder --------------------------------------------------------------------------------------------------------


def loss(params: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
  """Mean cross-entropy of the next tokens; products in the dtype of the parameters, sums and softmax in float32."""
  x = params["embedding"][tokens[:, :-1]] + params["positions"][: tokens.shape[1] - 1]
  for i in range(sum(name.endswith("/qkv") for name in params)):
    block = {name.removeprefix(f"{i}/"): value for name, value in params.items() if name.startswith(f"{i}/")}
    x = x + attention(layer_norm(x, block["gain1"]), block["qkv"]) @ block["out"]
    x = x + jax.nn.gelu(layer_norm(x, block["gain2"]) @ block["up"] + block["bias"]) @ block["down"]
  logits = layer_norm(x, params["gain"]) @ params["head"] + params["head_bias"]
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()


def layer_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  """Normalizes the last axis to mean 0 and variance 1, then multiplies by the gain."""
  wide = x.astype(jnp.float32)
  centered = wide - wide.mean(-1, keepdims=True)
  scaled = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-6)
  return scaled.astype(x.dtype) * gain


def attention(x: jax.Array, qkv: jax.Array) -> jax.Array:
  """Causal attention of several heads, before the output projection."""
  batch, length, width = x.shape
  q, k, v = jnp.moveaxis((x @ qkv).reshape(batch, length, 3, HEADS, width // HEADS), 2, 0)
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(width // HEADS)
  seen = jnp.tril(jnp.ones((length, length), bool))
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(x.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
