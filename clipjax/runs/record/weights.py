"""The parameters in a record: their number, and the histogram of log10|w|, counted on the device.

No program grows with the number of leaves, because XLA takes seconds to compile one for hundreds of leaves. One program
joins up to 64 small leaves and pads them to a power of two, so few sizes are ever compiled. A large leaf is counted by
itself, with one program per shape.
"""

import math
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipjax.checks import describe
from clipjax.leaves import is_measured
from clipjax.state_search import is_wrapper, unwrapped

# log10|w|, four bins per decade; values outside count in the outermost bins.
LOW, HIGH, BINS = -8, 2, 40
EDGES = np.linspace(LOW, HIGH, BINS + 1)
_CHUNK = 2**22  # Entries of a leaf that are binned at once; binning all would need as much memory again as the leaf.
_SMALL = 2**14  # Leaves of up to this many entries are joined.
_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())
_MOST = 64  # One program joins up to this many leaves.


def parameter_count(params: Any) -> int:
  """The number of entries in all floating and complex leaves."""
  return sum(int(np.prod(np.shape(x))) for x in map(unwrapped, _weight_leaves(params)))


def histogram(params: Any) -> jax.Array | None:
  """Enqueues the histogram of log10|w| over the entries on the first device. Shape (parts, BINS + 2), int32, or None.

  The last two columns count zeros and nonfinite entries. The host sums the rows, because the sum may exceed int32.
  """
  with jax.set_mesh(_NO_MESH):  # The caller's mesh spans more than the first device.
    return _histogram(params)


def _histogram(params: Any) -> jax.Array | None:
  small: dict[Any, list[tuple[Any, int]]] = {}  # Leaves and their sizes, by dtype.
  counts: list[jax.Array] = []
  for (dtype, shape), leaves in _by_kind([first_shard(unwrapped(x)) for x in _weight_leaves(params)]).items():
    size = math.prod(shape)
    if size > _SMALL:
      counts += map(_leaf_counts, leaves)
    elif size:
      small.setdefault(dtype, []).extend((x, size) for x in leaves)
  for alike in small.values():
    parts = (alike[i : i + _MOST] for i in range(0, len(alike), _MOST))
    counts += (_first_counts(*_joined([x for x, _ in part])) for part in parts)
  return _stacked(counts) if counts else None


def weights_row(counts: np.ndarray[Any, Any]) -> dict[str, list[float]]:
  """The histogram as a row has it under "weights"."""
  total = counts.astype(np.int64).sum(axis=0).tolist()
  return {"edges": EDGES.tolist(), "counts": total[:BINS], "zeros": total[BINS], "nonfinite": total[BINS + 1]}


def first_shard(x: Any) -> Any:
  """The part of an array on the first device of this process.

  A program over devices of other processes would wait for them. A replicated array is whole on every device.
  """
  return x.addressable_data(0) if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 else x


def _weight_leaves(params: Any) -> list[Any]:
  leaves = jax.tree.leaves(params, is_leaf=is_wrapper)
  weights = [x for x in leaves if is_measured(unwrapped(x))]
  if leaves and not weights:
    raise TypeError(
      f"`params` must have floating or complex leaves, got {describe(unwrapped(leaves[0]))}: pass the "
      "parameters that you train."
    )
  return weights


# Joining small leaves -----------------------------------------------------------------------------------------------


_KIND = attrgetter("dtype", "shape")


def _by_kind(leaves: Iterable[Any]) -> dict[Any, list[Any]]:
  """The leaves by dtype and shape: the same program then joins many groups of equal leaves."""
  kinds: dict[Any, list[Any]] = {}
  for x in leaves:
    kinds.setdefault(_KIND(x), []).append(x)
  return kinds


@jax.jit
def _joined(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
  """The absolute values of all entries in one vector, zero-padded to a power of two, and the number of entries."""
  # Between barriers, XLA on CPU copies each leaf as a whole; fused with the rest, it takes ten times longer to compile.
  vectors = lax.optimization_barrier([jnp.asarray(x).ravel() for x in leaves])
  sizes = _sizes(lax.optimization_barrier(jnp.concatenate(vectors)))
  padded = jnp.pad(sizes, (0, (1 << (sizes.size - 1).bit_length()) - sizes.size))
  return padded, jnp.full((), sizes.size, jnp.int32)  # A constant of the program: nothing is moved to the device.


@jax.jit
def _first_counts(sizes: jax.Array, count: jax.Array) -> jax.Array:
  """Counts the first `count` values; the rest is padding."""
  return _counted(jnp.zeros(BINS + 2, jnp.int32), sizes, jnp.arange(sizes.size, dtype=count.dtype) < count)


# Counting -----------------------------------------------------------------------------------------------------------


@jax.jit
def _leaf_counts(x: jax.Array) -> jax.Array:
  """Counts all entries of a leaf, chunk by chunk."""
  x = jnp.asarray(x).ravel()
  counts = jnp.zeros(BINS + 2, jnp.int32)
  whole = x.size // _CHUNK

  def body(i: Any, counts: jax.Array) -> jax.Array:
    return _counted(counts, _sizes(lax.dynamic_slice(x, (i * _CHUNK,), (_CHUNK,))), True)

  counts = lax.fori_loop(0, whole, body, counts) if whole else counts
  return _counted(counts, _sizes(x[whole * _CHUNK :]), True)


def _sizes(x: jax.Array) -> jax.Array:
  """Absolute values: float64 for 64-bit numbers, otherwise float32."""
  size = jnp.abs(jnp.asarray(x).ravel())
  return size if size.dtype == jnp.float64 else size.astype(jnp.float32)


def _counted(counts: jax.Array, size: jax.Array, is_one: jax.Array | bool) -> jax.Array:
  # The bin of each entry; zeros and nonfinite entries have their own.
  place = jnp.clip(jnp.floor((jnp.log10(size) - LOW) * (BINS / (HIGH - LOW))), 0, BINS - 1).astype(jnp.int32)
  place = jnp.where(size > 0, place, BINS)
  place = jnp.where(jnp.isfinite(size), place, BINS + 1)
  return counts.at[place].add(jnp.where(is_one, jnp.ones_like(place), 0))


@jax.jit
def _stacked(counts: list[jax.Array]) -> jax.Array:
  return jnp.stack(counts)
