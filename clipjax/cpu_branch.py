"""A branch that `vmap` does not double, used only by XLA on CPU: on accelerators nothing in this package branches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Arrays = list[jax.Array]

# A large leaf of zeros sends about 1 / _MAX_CHUNKS of the gradient through a branch, or itself if it is larger.
_MAX_CHUNKS = 16


def run_if(asked: jax.Array, fn: Callable[..., Arrays], otherwise: Sequence[jax.Array], xs: Sequence[Any]) -> Arrays:
  """`fn(xs)` if asked, else `otherwise`."""
  chosen: Arrays = lax.cond(asked, lambda otherwise, xs: fn(xs), lambda otherwise, xs: otherwise, list(otherwise), xs)
  return chosen


def run_if_any(
  asked: jax.Array, fn: Callable[..., Arrays], otherwise: Sequence[jax.Array], xs: Sequence[Any]
) -> Arrays:
  """`run_if` that skips an unwanted branch under `vmap` too; it has no derivative.

  JAX turns a `lax.cond` with a batched predicate into a select, which runs both branches. Here the whole batch branches
  once, if any member asks, and each member keeps its own answer.
  """

  @custom_vmap
  def run(asked: jax.Array, otherwise: Any, xs: Any) -> Any:
    return run_if(asked, fn, otherwise, xs)

  @run.def_vmap
  def _(size: int, batched: Any, asked: jax.Array, otherwise: Any, xs: Any) -> Any:
    of_asked, of_otherwise, of_xs = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
    by_lane = jax.vmap(fn, in_axes=(of_xs,), axis_size=size)
    kept = jax.vmap(lambda values: values, in_axes=(of_otherwise,), axis_size=size)(otherwise)
    # One branch for the whole batch, then each member picks its own result.
    chosen = run_if_any(asked.any(), by_lane, kept, xs)
    keep = jax.vmap(jnp.where, in_axes=(of_asked, 0, 0))
    return [keep(asked, new, old) for new, old in zip(chosen, kept, strict=True)], [True] * len(kept)

  chosen: Arrays = run(asked, list(otherwise), list(xs))
  return chosen


def chunks(sizes: Sequence[int]) -> list[list[int]]:
  """The indices of blocks, in at most about `_MAX_CHUNKS` runs of similar size: one branch for each run."""
  runs: list[list[int]] = []
  filled = math.inf
  for b, size in enumerate(sizes):
    if filled + size > sum(sizes) / _MAX_CHUNKS:
      runs.append([])
      filled = 0
    runs[-1].append(b)
    filled += size
  return runs
