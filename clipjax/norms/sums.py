"""Norms from one read of each leaf, right for every dtype and magnitude.

Squares of float32 entries leave the range of float32 beyond about 1e-19 and 1e19. There are two ways around it:

- Accelerators read each leaf once, into three sums of squares at the scales 2^-96, 1 and 2^96, which XLA fuses into
  one pass. `where` picks the one that kept its range: no branch, no second read, nothing doubled by `vmap`.
- XLA on CPU reads a leaf once for each sum. A small leaf is summed in float64, which holds the square of any float32.
  A large one is summed in float32, and once more in float64 where that left its range, behind a `cond`; of stacked
  layers all, though one alone may be 0.

16-bit and 8-bit floats other than bfloat16 need neither. float64 leaves have the same two ways at wider scales. Which
is taken is settled by `lax.platform_dependent` when a program is lowered.

A norm belongs to a block: a tuple of leaf indices. All leaves in one block make the global norm, one leaf a block the
norm of each leaf, anything between a group. `over` takes the norms of parts of a leaf instead: of the slices of
stacked layers, or of the units of AGC.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipjax import mesh
from clipjax.arithmetic import divide, extreme, parts, power, root, upcast, vector_norm, widest
from clipjax.conditional import chunks, run_if, run_if_any
from clipjax.mesh import Axes
from clipjax.stacks import Stacks, over

# Up to so many entries XLA on CPU sums about as fast in float64.
SMALL = 1 << 16
# Up to so many it finds the largest of integers about as fast as that of floats.
FEW = 1 << 12


class NormSpec(NamedTuple):
  """What to measure; static, so that it can be a key of the jit cache.

  Attributes:
    ord: the order p of the norm.
    blocks: for each norm, the indices of the leaves that it measures.
    axes: the mesh axes to reduce each leaf over, as `mesh.resolve_axes` gives them.
    over: for each leaf the array axes that its norms are taken over, which stay with size 1; None for all of them, and
      a norm of shape (). Each leaf is a block then. () where all norms are of whole leaves.
  """

  ord: float
  blocks: tuple[tuple[int, ...], ...]
  axes: tuple[Axes, ...]
  over: tuple[tuple[int, ...] | None, ...] = ()


def spec_of_slices(ord: float, leaves: Sequence[Any], axes: tuple[Axes, ...], stacks: Stacks) -> NormSpec:
  """What to measure where each slice of stacked leaves, and each other leaf, has a norm of its own."""
  return NormSpec(ord, tuple((i,) for i in range(len(leaves))), axes, over(leaves, stacks) if stacks else ())


class Measured(NamedTuple):
  """What was measured, in `norm_dtype()`.

  Attributes:
    norms: the norm of each block, of shape (), or of the shape of the leaf with size 1 along its `over`.
    vector: the same as one vector, of shape (n,); with `over` those of all leaves, one after the other.
    first_bad: int32, shape (): the first leaf with a NaN, or without any, with an inf or a sum that overflowed; -1 for
      none. With `over` the first such entry of `vector`.
  """

  norms: tuple[jax.Array, ...]
  vector: jax.Array
  first_bad: jax.Array


class Scales(NamedTuple):
  """In which dtype a leaf is summed, and scaled by which powers of two, from the lowest to the highest.

  `floor`: a plain sum of squares of at least this times its number of entries lost nothing that counts to underflow.
  """

  dtype: Any
  exponents: tuple[int, ...]
  floor: float


_ONE_32, _THREE_32 = (Scales(np.float32, exponents, 2.0**-102) for exponents in ((0,), (-96, 0, 96)))
_ONE_64, _THREE_64 = (Scales(np.float64, exponents, 2.0**-968) for exponents in ((0,), (-600, 0, 600)))


class Way(NamedTuple):
  """How a leaf is summed: at first, and once more where its first sum has left its range; None for never."""

  first: Scales
  again: Scales | None = None


def norm_dtype() -> Any:
  """The dtype of norms, thresholds and rule states: float64 exactly when x64 is enabled."""
  return jax.dtypes.canonicalize_dtype(np.float64)


def measure(spec: NormSpec, leaves: Sequence[Any], *, lazy_vmap: bool = True) -> Measured:
  """The norms of the blocks of `spec`; `derivatives.measure` is the same with a derivative.

  `lazy_vmap=False` does without a rule for `vmap`, of which JAX takes no derivative.
  """
  xs = [mesh.without_reduced(jnp.asarray(x)) for x in leaves]

  def on_cpu(xs: list[jax.Array]) -> Measured:
    # What else reads a leaf must not share its square, or its copy in float32: XLA on CPU would write them out. One
    # barrier compiles faster, but makes every leaf vary over the mesh axes of any.
    apart = [lax.optimization_barrier(x) for x in xs] if mesh.manual_axes() else lax.optimization_barrier(xs)
    return measure_on("cpu", spec, apart, lazy_vmap)

  on_gpu, elsewhere = partial(measure_on, "gpu", spec), partial(measure_on, "tpu", spec)
  if not xs:
    return elsewhere(xs)
  return Measured(*lax.platform_dependent(xs, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=elsewhere))


def measure_on(platform: str, spec: NormSpec, xs: Sequence[jax.Array], lazy_vmap: bool = True) -> Measured:
  """`measure` for one platform: leaves of each kind by themselves, then blocks from the norms of their parts."""
  ways = [_way(x, spec.ord, platform) for x in xs]
  one_each = not spec.over and spec.blocks == tuple((i,) for i in range(len(xs)))
  found: list[list[jax.Array]] = [[] for _ in spec.blocks]
  numbers: list[tuple[Any, jax.Array]] = []
  for way in dict.fromkeys(ways):
    blocks = {b: own for b, block in enumerate(spec.blocks) if (own := tuple(i for i in block if ways[i] == way))}
    leaves = {i: xs[i] for block in blocks.values() for i in block}
    kind = _Kind(platform, spec, list(blocks.values()), leaves)
    norms, of_leaves = _square_norms(kind, way.first) if spec.ord == 2 else _power_norms(kind)
    if way.again:
      norms = _checked(kind, way.first.floor, way.again, norms, lazy_vmap)
    if one_each and (way.again or spec.ord != 2 or platform == "tpu"):
      of_leaves = [stack(norms, norm_dtype(), barrier=platform == "cpu")]
    numbers += [(np.array([*leaves]), of_leaves[0])] if of_leaves[0].ndim else zip(leaves, of_leaves, strict=True)
    for b, norm in zip(blocks, norms, strict=True):
      found[b].append(norm)
  whole = tuple(n[0] if len(n) == 1 else vector_norm(stack(n, norm_dtype()), spec.ord) for n in found)
  if spec.over:
    vector = end_to_end(whole, norm_dtype())
    return Measured(whole, vector, first_bad(vector))
  if one_each and xs:
    indices, of_kinds = zip(*numbers, strict=True)
    vector = of_kinds[0] if len(numbers) == 1 else jnp.concatenate(of_kinds)[np.argsort(np.concatenate(indices))]
  else:
    vector = stack(whole, norm_dtype(), barrier=platform == "cpu")
  return Measured(whole, vector, _first_bad(numbers, len(xs)))


def first_bad(vector: jax.Array) -> jax.Array:
  """The first entry that is NaN, or without any, the first that is inf; -1 for none."""
  return _first_bad([(np.arange(vector.size), vector)], vector.size)


def _first_bad(numbers: Iterable[tuple[Any, jax.Array]], n: int) -> jax.Array:
  """Of n leaves the first with a NaN, or else with an inf, by the indices and numbers of leaves; -1 for none."""
  worst = jnp.zeros((), jnp.int32)
  for i, x in numbers:  # 0 for a finite number; else the larger the worse, and the earlier.
    rank = jnp.where(x < jnp.inf, 0, jnp.where(x == jnp.inf, 2 * n - 1 - i, 3 * n - 1 - i)).astype(jnp.int32)
    worst = jnp.maximum(worst, rank.max(initial=0))
  return jnp.where(worst > 0, n - 1 - lax.rem(worst, np.int32(max(n, 1))), -1).astype(jnp.int32)


def _way(x: jax.Array, p: float, platform: str) -> Way:
  """How to sum a leaf, by its dtype, its size and the platform."""
  wide = x.dtype in (jnp.float64, jnp.complex128)
  # No square of an entry of 16 or 8 bits, nor the sum of 2^38 of them, leaves the range of float32, save of bfloat16.
  if p != 2 or (x.dtype.itemsize <= 2 and x.dtype != jnp.bfloat16):
    return Way(_ONE_64 if wide else _ONE_32)
  if platform != "cpu":
    return Way(_THREE_64 if wide else _THREE_32)
  if wide:
    return Way(_ONE_64, _THREE_64)
  return Way(_ONE_64) if x.size <= SMALL else Way(_ONE_32, _ONE_64)


# Leaves of one kind --------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
  """Leaves that are summed alike, by their indices, and the blocks that they form."""

  platform: str
  spec: NormSpec
  blocks: Sequence[tuple[int, ...]]
  leaves: Mapping[int, jax.Array]

  def over(self, i: int) -> tuple[int, ...] | None:
    return self.spec.over[i] if self.spec.over else None

  def size(self, block: tuple[int, ...]) -> int:
    """How many entries a norm is of, over all shards."""
    shapes = ((self.leaves[i].shape, self.over(i), self.spec.axes[i]) for i in block)
    return sum(math.prod(s[a] for a in _dims(len(s), over)) * mesh.axes_size(axes) for s, over, axes in shapes)


def _square_norms(kind: _Kind, scales: Scales, *, numbers: bool = True) -> tuple[list[jax.Array], list[jax.Array]]:
  """The 2-norm of each block, and a number of each leaf that is finite where the leaf is.

  These numbers are a vector, of norms where a leaf has one; on a TPU scalars, which XLA asks in a chain without memory.
  """
  dtype, width = norm_dtype(), len(scales.exponents)
  with _allowed(scales.dtype):
    sums = [s for i, x in kind.leaves.items() for s in _square_sums(kind.platform, x, scales, kind.over(i))]
    flat = mesh.all_reduce(sums, [kind.spec.axes[i] for i in kind.leaves for _ in range(width)])
    by_leaf = {i: flat[k * width : (k + 1) * width] for k, i in enumerate(kind.leaves)}

    norms = []
    for block in kind.blocks:
      totals = [_together(kind.platform, column) for column in zip(*(by_leaf[i] for i in block), strict=True)]
      norms.append(_choose(totals, scales, scales.dtype(kind.size(block) * scales.floor)).astype(dtype))
    if not numbers:
      return norms, []
    columns = [_column(kind.platform, column) for column in zip(*by_leaf.values(), strict=True)]
    if kind.platform == "tpu":
      return norms, [jnp.sqrt(x).astype(dtype) for x in columns[0]]
    least = np.array([kind.size((i,)) * scales.floor for i in by_leaf], scales.dtype)
    return norms, [_choose([column for (column,) in columns], scales, least).astype(dtype)]


@partial(jax.jit, static_argnums=(0, 2, 3))  # Traced and lowered once for all leaves of one type.
def _square_sums(platform: str, x: jax.Array, scales: Scales, over: tuple[int, ...] | None) -> Sequence[jax.Array]:
  """The sums of squares of a leaf, one a scale."""
  squares = []
  for exponent in scales.exponents:
    of_parts = []
    for part in parts(x):
      y = lax.convert_element_type(part, scales.dtype)
      if exponent:
        y = lax.mul(y, lax.full_like(y, 2.0**exponent))
        # Of a single entry XLA would take the square of the constant instead, which is inf.
        y = lax.optimization_barrier(y) if y.size == 1 else y
      of_parts.append(lax.mul(y, y))
    squares.append(functools.reduce(lax.add, of_parts))
  if platform != "gpu" or len(squares) == 1:
    return [_reduced(s, lax.add, 0.0, over) for s in squares]
  # One reduction of three operands saves two kernels a leaf. (On a CPU it would add one entry after the other.)
  zeros = [scales.dtype(0) for s in squares]
  sums = lax.reduce(squares, zeros, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], _dims(x.ndim, over))
  return [lax.expand_dims(s, over or ()) for s in sums]


@partial(jax.jit, static_argnums=1)
def _choose(sums: Sequence[jax.Array], scales: Scales, least: Any) -> jax.Array:
  """The norm from the sum that kept its range: the plain one if it is finite and lost nothing to underflow."""
  if len(sums) == 1:
    return jnp.sqrt(sums[0])
  # With x64 the norm of float32 leaves may be above the largest float32.
  roots = [jnp.sqrt(s).astype(np.promote_types(s.dtype, norm_dtype())) for s in sums]
  low, middle, high = (r * r.dtype.type(2.0**-e) for r, e in zip(roots, scales.exponents, strict=True))
  return jnp.where(sums[1] < least, high, jnp.where(sums[1] < jnp.inf, middle, low))


def _checked(kind: _Kind, floor: float, scales: Scales, norms: Sequence[jax.Array], lazy_vmap: bool) -> list[jax.Array]:
  """The norms, those measured once more whose sum has left its range: on CPU alone."""
  checked = list(norms)
  for chunk in chunks([sum(kind.leaves[i].size for i in block) for block in kind.blocks]):
    blocks = [kind.blocks[b] for b in chunk]
    members = [i for block in blocks for i in block]
    # NaN is doubtful too. Of the parts of a leaf each must be in range.
    least, most = (stack([_extreme_of(norms[b], p) for b in chunk], norm_dtype()) for p in (-math.inf, math.inf))
    floors = np.sqrt(np.array([kind.size(block) * floor for block in blocks])).astype(least.dtype)
    doubtful = ~((least >= floors) & (most < jnp.inf)).all()
    again = partial(_again, kind._replace(blocks=blocks), scales, members)
    # A rule for vmap does not know the name of its axis, so that a collective over it has no meaning there.
    known = set(mesh.manual_axes()).issuperset(axis for i in members for axis in kind.spec.axes[i])
    run = run_if_any if lazy_vmap and known else run_if
    chosen = run(doubtful, again, [norms[b] for b in chunk], [kind.leaves[i] for i in members])
    for b, norm in zip(chunk, chosen, strict=True):
      checked[b] = norm
  return checked


def _again(kind: _Kind, scales: Scales, members: Sequence[int], xs: Sequence[jax.Array]) -> list[jax.Array]:
  """The norms of some blocks at scales that hold every square."""
  # Without a vector of sizes: where there is a rule for `vmap`, JAX refuses constants.
  return _square_norms(kind._replace(leaves=dict(zip(members, xs, strict=True))), scales, numbers=False)[0]


def _power_norms(kind: _Kind) -> tuple[list[jax.Array], list[jax.Array]]:
  """`_square_norms` for the p-norm, p other than 2."""
  p, dtype = kind.spec.ord, norm_dtype()
  axes = [kind.spec.axes[i] for i in kind.leaves]
  if math.isinf(p):
    found = [_extreme_magnitude(kind.platform, x, p, kind.over(i)).astype(dtype) for i, x in kind.leaves.items()]
    by_leaf = dict(zip(kind.leaves, mesh.all_reduce(found, axes, p), strict=True))
    norms = [_together(kind.platform, [by_leaf[i] for i in block], p) for block in kind.blocks]
    return norms, _column(kind.platform, by_leaf.values())
  magnitudes = {i: jnp.abs(widest(x)).astype(dtype) for i, x in kind.leaves.items()}

  def totals(xs: Mapping[int, jax.Array]) -> tuple[list[jax.Array], dict[int, jax.Array]]:
    by_leaf = dict(zip(xs, mesh.all_reduce([_power_sum(x, p, kind.over(i)) for i, x in xs.items()], axes), strict=True))
    return [_together(kind.platform, [by_leaf[i] for i in block]) for block in kind.blocks], by_leaf

  if p <= 1:  # Here a power sum leaves its range only where the norm does.
    sums, by_leaf = totals(magnitudes)
    return [root(s, p).astype(dtype) for s in sums], _column(kind.platform, by_leaf.values())
  # Elsewhere entries are divided by the largest of their block first: two reads, on every platform.
  found = [_reduced(x, lax.max, 0.0, kind.over(i)) for i, x in magnitudes.items()]
  most = dict(zip(magnitudes, mesh.all_reduce(found, axes, math.inf), strict=True))
  largest = [_together(kind.platform, [most[i] for i in block], math.inf) for block in kind.blocks]
  units = [jnp.where((m >= jnp.finfo(m.dtype).tiny) & (m < jnp.inf), m, 1) for m in largest]
  unit_of = {i: unit for block, unit in zip(kind.blocks, units, strict=True) for i in block}
  sums, by_leaf = totals({i: divide(x, unit_of[i]) for i, x in magnitudes.items()})
  norms = [(unit * root(s, p)).astype(dtype) for unit, s in zip(units, sums, strict=True)]
  # The largest may have dropped a NaN, and a sum is inf where another leaf of the block is.
  numbers = [jnp.where(jnp.isnan(by_leaf[i]), by_leaf[i], m) for i, m in most.items()]
  return norms, _column(kind.platform, numbers)


def _power_sum(magnitude: jax.Array, p: float, over: tuple[int, ...] | None) -> jax.Array:
  """The sum of |x|^p, for 0 the number of nonzeros."""
  powers = (magnitude != 0).astype(magnitude.dtype) if p == 0 else power(magnitude, p)
  return _reduced(powers, lax.add, 0.0, over)


def _extreme_magnitude(platform: str, x: jax.Array, p: float, over: tuple[int, ...] | None) -> jax.Array:
  """The largest (p = inf) or smallest (p = -inf) magnitude, NaN where an entry is."""

  def magnitude(x: jax.Array) -> jax.Array:
    return jnp.abs(widest(x) if jnp.iscomplexobj(x) else upcast(x))

  if platform != "cpu" or x.size <= FEW:
    return lax.expand_dims(extreme(magnitude(x), p, _dims(x.ndim, over)), over or ())
  # XLA on CPU finds the largest float much faster than the largest integer, but drops a NaN. A sum keeps it, and scaled
  # down no finite entries overflow. The barrier keeps XLA from fusing the two reductions into one slow loop.
  found = _reduced(magnitude(x), lax.max, 0.0, over) if p > 0 else _reduced(magnitude(x), lax.min, math.inf, over)
  scaled = magnitude(lax.optimization_barrier(x))
  total = _reduced(scaled * scaled.dtype.type(2.0**-100), lax.add, 0.0, over)
  return jnp.where(jnp.isnan(total), total, found)


# Small parts ---------------------------------------------------------------------------------------------------------


def _dims(rank: int, over: tuple[int, ...] | None) -> tuple[int, ...]:
  """The axes to reduce over: all of them where none are given."""
  return tuple(range(rank)) if over is None else over


def _reduced(x: jax.Array, op: Callable[..., Any], start: float, over: tuple[int, ...] | None) -> jax.Array:
  """A reduction over some axes, which stay with size 1, or over all of them."""
  return lax.expand_dims(lax.reduce(x, x.dtype.type(start), op, _dims(x.ndim, over)), over or ())


def _scalar(x: jax.Array) -> jax.Array:
  return x if x.ndim == 0 else jnp.sum(x)


def _extreme_of(x: jax.Array, p: float) -> jax.Array:
  return x if x.ndim == 0 else extreme(x, p, tuple(range(x.ndim)))


def _together(platform: str, values: Sequence[jax.Array], p: float = 1.0) -> jax.Array:
  """The sum of reduced values, or their extreme: on CPU as one vector, elsewhere in a chain, which XLA fuses there."""
  if len(values) == 1 or platform != "cpu":
    return functools.reduce(lax.add if math.isfinite(p) else lax.max if p > 0 else lax.min, values)
  stacked = stack(values, values[0].dtype, barrier=True)
  return stacked.sum() if math.isfinite(p) else extreme(stacked, p, (0,))


def _column(platform: str, values: Iterable[jax.Array]) -> list[jax.Array]:
  """Reduced values of leaves: as scalars on a TPU, elsewhere as one vector."""
  scalars = [_scalar(x) for x in values]
  return scalars if platform == "tpu" else [stack(scalars, scalars[0].dtype, barrier=platform == "cpu")]


def stack(values: Iterable[jax.Array], dtype: Any, *, barrier: bool = False) -> jax.Array:
  """Scalars as a vector, of shape (0,) where there are none."""
  scalars = [lax.convert_element_type(v, dtype) for v in values]
  if not scalars:
    return jnp.zeros((0,), dtype)
  # Without a barrier XLA on CPU makes a reduction of the vector into one of the scalars again, which takes it long.
  return lax.optimization_barrier(jnp.stack(scalars)) if barrier else jnp.stack(scalars)


def end_to_end(values: Iterable[jax.Array], dtype: Any) -> jax.Array:
  """Arrays of any shapes as one vector, of shape (0,) where there are none."""
  flat = [mesh.replicated(lax.convert_element_type(v, dtype)).ravel() for v in values]
  return jnp.concatenate(flat) if flat else jnp.zeros((0,), dtype)


def _allowed(dtype: Any) -> AbstractContextManager[Any]:
  """Where JAX is to keep to this dtype: without x64 it makes float32 of float64 even inside a sum."""
  return jax.enable_x64(True) if dtype == np.float64 else nullcontext()
