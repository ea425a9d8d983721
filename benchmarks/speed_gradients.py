"""Sections of `speed.py` that need only gradients: the norm, the clip, eager calls, and the clip per example."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from speed_peers import PAUSE, Plan, dtypes, peer_turns, started
from speed_trees import (
  CLIPJAX,
  EAGER,
  JITTED,
  LEAF_NORMS,
  OPTAX,
  PLAIN,
  SUM,
  Case,
  Shapes,
  Tree,
  arrays,
  case_of,
  half_norm,
  trees,
)
from timing import Turn, interleave, summary, turn_of

import clipjax

BATCH = 32


def gradients(shapes: Shapes, dtype: str) -> list[jax.Array]:
  """The gradients as JAX arrays."""
  grads = [jnp.asarray(x, dtype) for x in arrays(shapes)]
  jax.block_until_ready(grads)
  return grads


def jax_turn(function: Callable[..., Any], *args: Any, repeats: int = 1, warm: bool = True) -> Turn:
  """The turn of a function with fixed arguments."""
  return turn_of(lambda: jax.block_until_ready(function(*args)), repeats=repeats, warm=warm)


def sum_turn(parameters: int, dtype: str, repeats: int = 1) -> Turn:
  """The turn that measures the bandwidth: a plain sum of as many entries in one flat leaf."""
  return jax_turn(jax.jit(jnp.sum), jax.block_until_ready(jnp.ones(parameters, dtype)), repeats=repeats)


def temporaries(compiled: Any) -> int | None:
  """Bytes of temporaries of a compiled program; None if the device does not report them."""
  try:
    size = compiled.memory_analysis().temp_size_in_bytes
  except (AttributeError, NotImplementedError, RuntimeError):
    return None
  return None if size is None else int(size)


def plain_norm(leaves: list[jax.Array]) -> jax.Array:
  """The plainest norm in JAX, with sums in float32."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves))


def norm(plan: Plan) -> list[Case]:
  """Only the norm."""
  cases = []
  with started(plan) as peers:
    for tree, dtype in trees_and_dtypes(plan):
      grads = gradients(tree.shapes, dtype)
      functions = {
        PLAIN: plain_norm,
        OPTAX: optax.tree.norm,
        CLIPJAX: clipjax.global_norm,
        LEAF_NORMS: clipjax.leaf_norms,
      }
      # A new function each time: a jitted function keeps its programs for as long as it lives.
      turns = {name: jax_turn(jax.jit(partial(function)), grads) for name, function in functions.items()}
      turns[SUM] = sum_turn(tree.parameters, dtype)
      turns |= peer_turns(plan, peers, "norm", tree, dtype)
      times = interleave(turns, plan.rounds, pause=PAUSE)
      cases.append(case_of(tree, dtype, summary(times)))
  return cases


def clip(plan: Plan) -> list[Case]:
  """Only the clip: gradients in, clipped gradients out."""
  cases = []
  with started(plan) as peers:
    for tree, dtype in trees_and_dtypes(plan):
      grads = gradients(tree.shapes, dtype)
      max_norm = half_norm(tree.parameters)
      tx = optax.clip_by_global_norm(max_norm)
      turns = {
        OPTAX: jax_turn(jax.jit(partial(tx.update, state=optax.EmptyState())), grads),
        CLIPJAX: jax_turn(jax.jit(partial(clipjax.clip_grad_norm, max_norm=max_norm)), grads),
      }
      turns[SUM] = sum_turn(tree.parameters, dtype)
      turns |= peer_turns(plan, peers, "clip", tree, dtype)
      times = interleave(turns, plan.rounds, pause=PAUSE)
      cases.append(case_of(tree, dtype, summary(times)))
  return cases


def trees_and_dtypes(plan: Plan) -> list[tuple[Tree, str]]:
  """Every tree in each of its dtypes, except 5000 leaves, whose plain norm and Optax's norm compile for minutes."""
  return [(tree, dtype) for tree in trees(plan.quick).values() if tree.key != "most" for dtype in dtypes(plan, tree)]


def eager(plan: Plan) -> list[Case]:
  """Calls outside jit, compared with the same calls inside."""
  tree = trees(plan.quick)["many"]
  grads = gradients(tree.shapes, "float32")
  max_norm = half_norm(tree.parameters)
  turns: dict[str, Turn] = {}

  def both(name: str, function: Callable[..., Any], *args: Any) -> None:
    turns[EAGER.format(name)] = jax_turn(function, *args, warm=False)
    turns[JITTED.format(name)] = jax_turn(jax.jit(function), *args, warm=False)

  both("clipjax.clip_grad_norm", partial(clipjax.clip_grad_norm, max_norm=max_norm), grads)
  transformations = {
    "clipjax.clip_by_global_norm": clipjax.clip_by_global_norm(max_norm),
    "optax.clip_by_global_norm": optax.clip_by_global_norm(max_norm),
  }
  for name, tx in transformations.items():
    both(name, partial(tx.update), grads, tx.init(grads))
  return [case_of(tree, "float32", summary(interleave(turns, plan.rounds)))]


def per_example(plan: Plan) -> list[Case]:
  """The sum of per-example gradients, each clipped by itself."""
  shapes = [(64, 64), (64,)] if plan.quick else [(512, 512), (512,)] * 4
  size = sum(x.size for x in arrays(shapes))
  tree = Tree("examples", f"batch of {BATCH}, {size:,} parameters", [(BATCH, *shape) for shape in shapes])
  grads = gradients(tree.shapes, "float32")
  max_norm = half_norm(size)
  private = optax.contrib.differentially_private_aggregate(max_norm, 0.0, 0)
  functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "clipjax.clip_grad_per_example": (partial(clipjax.clip_grad_per_example, max_norm=max_norm), ()),
    "optax.per_example_global_norm_clip": (partial(optax.per_example_global_norm_clip, l2_norm_clip=max_norm), ()),
    # It draws noise even with a standard deviation of 0.
    "optax.contrib.differentially_private_aggregate": (
      private.update,
      (private.init([g[0] for g in grads]),),
    ),
  }
  turns, sizes = {SUM: sum_turn(tree.parameters, "float32")}, {}
  for name, (function, args) in functions.items():
    compiled = jax.jit(function).lower(grads, *args).compile()
    sizes[name] = temporaries(compiled)
    turns[name] = jax_turn(compiled, grads, *args, warm=False)
  variants: dict[str, dict[str, Any]] = {**summary(interleave(turns, plan.rounds))}
  for name, bytes_ in sizes.items():
    variants[name]["temporaries"] = bytes_
  return [case_of(tree, "float32", variants)]
