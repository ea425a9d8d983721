"""Measure: norms from one read of each leaf, right for every dtype and magnitude.

Squares of float32 entries leave the range of float32 beyond about 1e-19 and 1e19. There are two ways around this:

- Accelerators read each leaf once, into three sums of squares at the scales 2^-96, 1 and 2^96, which XLA fuses into
  one pass. `where` picks the sum that kept its range: no branch, no second read, nothing doubled by `vmap`.
- XLA on CPU reads a leaf once for each sum. A small leaf is summed in float64, which holds the square of any float32.
  A large leaf is summed in float32 and, if that sum left its range, once more in float64, behind a `cond`. For stacked
  layers one layer out of range, for example one of zeros, sends all of them through the second sum.

16-bit and 8-bit floats other than bfloat16 need neither. float64 leaves use the same two ways at wider scales.
`lax.platform_dependent` chooses the way when a program is lowered.

A norm belongs to a block: a tuple of leaf indices. One block of all leaves gives the global norm, one block for each
leaf gives leaf norms, anything in between gives group norms. `over` takes norms of parts of a leaf instead: of the
slices of stacked layers, or of the units of AGC.
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
from clipjax.cpu_branch import chunks, run_if, run_if_any
from clipjax.mesh import Axes
from clipjax.stacks import Stacks, over

# Up to this many entries, XLA on CPU sums about as fast in float64.
SMALL = 1 << 16
# Up to this many entries, it finds the largest integer about as fast as the largest float.
FEW = 1 << 12


class NormSpec(NamedTuple):
  """What to measure; static, to serve as a key of the jit cache.

  Attributes:
    ord: the order p of the norm.
    blocks: for each norm, the indices of the leaves that it measures.
    axes: the mesh axes to reduce each leaf over, from `mesh.resolve_axes`.
    over: for each leaf, the array axes that its norms are taken over, kept with size 1; None for all axes and a norm of
      shape (). Then each leaf is a block. () if all norms cover whole leaves.
  """

  ord: float
  blocks: tuple[tuple[int, ...], ...]
  axes: tuple[Axes, ...]
  over: tuple[tuple[int, ...] | None, ...] = ()


def spec_of_slices(ord: float, leaves: Sequence[Any], axes: tuple[Axes, ...], stacks: Stacks) -> NormSpec:
  """The spec for one norm for each slice of a stacked leaf, and for each other leaf."""
  return NormSpec(ord, tuple((i,) for i in range(len(leaves))), axes, over(leaves, stacks) if stacks else ())


class Measured(NamedTuple):
  """What was measured, in `norm_dtype()`.

  Attributes:
    norms: the norm of each block, of shape (), or of the shape of the leaf with size 1 along its `over`.
    vector: the same norms as one vector, of shape (n,); with `over`, the norms of all leaves, one after the other.
    first_bad: int32, shape (): the first leaf with a NaN or, if there is none, with an inf or a sum that overflowed; -1
      if there is none. With `over`, the first such entry of `vector`.
  """

  norms: tuple[jax.Array, ...]
  vector: jax.Array
  first_bad: jax.Array


class Scales(NamedTuple):
  """The dtype that sums a leaf, and the exponents of the powers of two that scale it, from the lowest to the highest.

  `floor`: a plain sum of squares of at least `floor` for each entry lost nothing that counts to underflow.
  """

  dtype: Any
  exponents: tuple[int, ...]
  floor: float


_ONE_32, _THREE_32 = (Scales(np.float32, exponents, 2.0**-102) for exponents in ((0,), (-96, 0, 96)))
_ONE_64, _THREE_64 = (Scales(np.float64, exponents, 2.0**-968) for exponents in ((0,), (-600, 0, 600)))


class Way(NamedTuple):
  """How a leaf is summed at first, and again if the first sum left its range; None for never."""

  first: Scales
  again: Scales | None = None


def norm_dtype() -> Any:
  """The dtype of norms, thresholds and rule states: float64 exactly when x64 is enabled."""
  return jax.dtypes.canonicalize_dtype(np.float64)


def measure(spec: NormSpec, leaves: Sequence[Any], *, lazy_vmap: bool = True) -> Measured:
  """The norms of the blocks of `spec`; `derivatives.measure` adds the derivative.

  `lazy_vmap=False` uses no rule for `vmap`, because JAX cannot differentiate one.
  """
  xs = [mesh.without_reduced(jnp.asarray(x)) for x in leaves]

  def on_cpu(xs: list[jax.Array]) -> Measured:
    # Other readers of a leaf must not share its square or its float32 copy: XLA on CPU would write them out. One
    # barrier for all leaves compiles faster, but makes every leaf vary over the mesh axes of any leaf.
    apart = [lax.optimization_barrier(x) for x in xs] if mesh.manual_axes() else lax.optimization_barrier(xs)
    return measure_on("cpu", spec, apart, lazy_vmap)

  on_gpu, elsewhere = partial(measure_on, "gpu", spec), partial(measure_on, "tpu", spec)
  if not xs:
    return elsewhere(xs)
  return Measured(*lax.platform_dependent(xs, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=elsewhere))


def measure_on(platform: str, spec: NormSpec, xs: Sequence[jax.Array], lazy_vmap: bool = True) -> Measured:
  """`measure` for one platform: sums the leaves of each kind, then joins the parts of each block."""
  ways = [_way(x, spec.ord, platform) for x in xs]
  one_each = not spec.over and spec.blocks == tuple((i,) for i in range(len(xs)))
  found: list[list[jax.Array]] = [[] for _ in spec.blocks]
  numbers: list[tuple[Any, jax.Array]] = []
  # Leaves of one kind are summed together; a block may have parts of several kinds.
  for way in dict.fromkeys(ways):
    blocks = {b: own for b, block in enumerate(spec.blocks) if (own := tuple(i for i in block if ways[i] == way))}
    leaves = {i: xs[i] for block in blocks.values() for i in block}
    kind = _Kind(platform, spec, list(blocks.values()), leaves)
    norms, of_leaves = _square_norms(kind, way.first) if spec.ord == 2 else _power_norms(kind)
    # Sum again what left its range.
    if way.again:
      norms = _checked(kind, way.first.floor, way.again, norms, lazy_vmap)
    if one_each and (way.again or spec.ord != 2 or platform == "tpu"):
      of_leaves = [stack(norms, norm_dtype(), barrier=platform == "cpu")]
    numbers += [(np.array([*leaves]), of_leaves[0])] if of_leaves[0].ndim else zip(leaves, of_leaves, strict=True)
    for b, norm in zip(blocks, norms, strict=True):
      found[b].append(norm)
  # Join the parts of each block, and line up the norms in one vector.
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
  """The first entry that is NaN or, if there is none, the first that is inf; -1 if all are finite."""
  return _first_bad([(np.arange(vector.size), vector)], vector.size)


def _first_bad(numbers: Iterable[tuple[Any, jax.Array]], n: int) -> jax.Array:
  """The first of n leaves with a NaN, or else with an inf, from the indices and numbers of the leaves; -1 for none."""
  worst = jnp.zeros((), jnp.int32)
  for i, x in numbers:  # 0 if finite; else a larger rank means worse, then earlier.
    rank = jnp.where(x < jnp.inf, 0, jnp.where(x == jnp.inf, 2 * n - 1 - i, 3 * n - 1 - i)).astype(jnp.int32)
    worst = jnp.maximum(worst, rank.max(initial=0))
  return jnp.where(worst > 0, n - 1 - lax.rem(worst, np.int32(max(n, 1))), -1).astype(jnp.int32)


def _way(x: jax.Array, p: float, platform: str) -> Way:
  """How to sum a leaf, given its dtype, its size and the platform."""
  wide = x.dtype in (jnp.float64, jnp.complex128)
  # Except for bfloat16, neither a square of a 16-bit or 8-bit entry nor the sum of 2^38 of them leaves float32's range.
  if p != 2 or (x.dtype.itemsize <= 2 and x.dtype != jnp.bfloat16):
    return Way(_ONE_64 if wide else _ONE_32)
  if platform != "cpu":
    return Way(_THREE_64 if wide else _THREE_32)
  if wide:
    return Way(_ONE_64, _THREE_64)
  return Way(_ONE_64) if x.size <= SMALL else Way(_ONE_32, _ONE_64)


# Leaves of one kind --------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
  """Leaves that are summed in the same way, by index, and the blocks that they form."""

  platform: str
  spec: NormSpec
  blocks: Sequence[tuple[int, ...]]
  leaves: Mapping[int, jax.Array]

  def over(self, i: int) -> tuple[int, ...] | None:
    return self.spec.over[i] if self.spec.over else None

  def size(self, block: tuple[int, ...]) -> int:
    """The number of entries in a norm, over all shards."""
    shapes = ((self.leaves[i].shape, self.over(i), self.spec.axes[i]) for i in block)
    return sum(math.prod(s[a] for a in _dims(len(s), over)) * mesh.axes_size(axes) for s, over, axes in shapes)


def _square_norms(kind: _Kind, scales: Scales, *, numbers: bool = True) -> tuple[list[jax.Array], list[jax.Array]]:
  """The 2-norm of each block, and for each leaf a number that is finite exactly if the leaf is.

  The numbers come as a vector, of norms for leaves that have one; on a TPU they are scalars, which XLA tests in a chain
  without using memory.
  """
  dtype, width = norm_dtype(), len(scales.exponents)
  with _allowed(scales.dtype):
    # Sum the squares of each leaf at each scale, then add up the shards.
    sums = [s for i, x in kind.leaves.items() for s in _square_sums(kind.platform, x, scales, kind.over(i))]
    flat = mesh.all_reduce(sums, [kind.spec.axes[i] for i in kind.leaves for _ in range(width)])
    by_leaf = {i: flat[k * width : (k + 1) * width] for k, i in enumerate(kind.leaves)}

    # Add up the leaves of each block, and take the root of the sum that kept its range.
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
  """The sums of squares of a leaf, one for each scale."""
  squares = []
  for exponent in scales.exponents:
    of_parts = []
    for part in parts(x):
      y = lax.convert_element_type(part, scales.dtype)
      if exponent:
        y = lax.mul(y, lax.full_like(y, 2.0**exponent))
        # For a single entry XLA would square the constant instead, which gives inf.
        y = lax.optimization_barrier(y) if y.size == 1 else y
      of_parts.append(lax.mul(y, y))
    squares.append(functools.reduce(lax.add, of_parts))
  if platform != "gpu" or len(squares) == 1:
    return [_reduced(s, lax.add, 0.0, over) for s in squares]
  # One reduction of three operands saves two kernels for each leaf. (A CPU would add its entries one by one.)
  zeros = [scales.dtype(0) for s in squares]
  sums = lax.reduce(squares, zeros, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], _dims(x.ndim, over))
  return [lax.expand_dims(s, over or ()) for s in sums]


@partial(jax.jit, static_argnums=1)
def _choose(sums: Sequence[jax.Array], scales: Scales, least: Any) -> jax.Array:
  """The norm from the sum that kept its range: the plain sum if it is finite and lost nothing to underflow."""
  if len(sums) == 1:
    return jnp.sqrt(sums[0])
  # Under x64 the norm of float32 leaves may exceed the largest float32.
  roots = [jnp.sqrt(s).astype(np.promote_types(s.dtype, norm_dtype())) for s in sums]
  low, middle, high = (r * r.dtype.type(2.0**-e) for r, e in zip(roots, scales.exponents, strict=True))
  return jnp.where(sums[1] < least, high, jnp.where(sums[1] < jnp.inf, middle, low))


def _checked(kind: _Kind, floor: float, scales: Scales, norms: Sequence[jax.Array], lazy_vmap: bool) -> list[jax.Array]:
  """The norms, measured again for every block whose sum left its range; only used on CPU."""
  checked = list(norms)
  for chunk in chunks([sum(kind.leaves[i].size for i in block) for block in kind.blocks]):
    blocks = [kind.blocks[b] for b in chunk]
    members = [i for block in blocks for i in block]
    # NaN is doubtful too. If a leaf has parts, each must be in range.
    least, most = (stack([_extreme_of(norms[b], p) for b in chunk], norm_dtype()) for p in (-math.inf, math.inf))
    floors = np.sqrt(np.array([kind.size(block) * floor for block in blocks])).astype(least.dtype)
    doubtful = ~((least >= floors) & (most < jnp.inf)).all()
    again = partial(_again, kind._replace(blocks=blocks), scales, members)
    # A rule for vmap does not know the name of its axis, so a collective over that axis has no meaning there.
    known = set(mesh.manual_axes()).issuperset(axis for i in members for axis in kind.spec.axes[i])
    run = run_if_any if lazy_vmap and known else run_if
    chosen = run(doubtful, again, [norms[b] for b in chunk], [kind.leaves[i] for i in members])
    for b, norm in zip(chunk, chosen, strict=True):
      checked[b] = norm
  return checked


def _again(kind: _Kind, scales: Scales, members: Sequence[int], xs: Sequence[jax.Array]) -> list[jax.Array]:
  """The norms of some blocks at scales that hold every square."""
  # No numbers of leaves, which need a vector of sizes: JAX refuses constants inside a rule for `vmap`.
  return _square_norms(kind._replace(leaves=dict(zip(members, xs, strict=True))), scales, numbers=False)[0]


def _power_norms(kind: _Kind) -> tuple[list[jax.Array], list[jax.Array]]:
  """`_square_norms` for a p-norm with p other than 2."""
  p, dtype = kind.spec.ord, norm_dtype()
  axes = [kind.spec.axes[i] for i in kind.leaves]
  # inf and -inf: the extreme magnitude.
  if math.isinf(p):
    found = [_extreme_magnitude(kind.platform, x, p, kind.over(i)).astype(dtype) for i, x in kind.leaves.items()]
    by_leaf = dict(zip(kind.leaves, mesh.all_reduce(found, axes, p), strict=True))
    norms = [_together(kind.platform, [by_leaf[i] for i in block], p) for block in kind.blocks]
    return norms, _column(kind.platform, by_leaf.values())
  magnitudes = {i: jnp.abs(widest(x)).astype(dtype) for i, x in kind.leaves.items()}

  def totals(xs: Mapping[int, jax.Array]) -> tuple[list[jax.Array], dict[int, jax.Array]]:
    by_leaf = dict(zip(xs, mesh.all_reduce([_power_sum(x, p, kind.over(i)) for i, x in xs.items()], axes), strict=True))
    return [_together(kind.platform, [by_leaf[i] for i in block]) for block in kind.blocks], by_leaf

  # Up to p = 1 a power sum leaves its range only if the norm does.
  if p <= 1:
    sums, by_leaf = totals(magnitudes)
    return [root(s, p).astype(dtype) for s in sums], _column(kind.platform, by_leaf.values())
  # Above 1, divide the entries by the largest of their block first: two reads, on every platform.
  found = [_reduced(x, lax.max, 0.0, kind.over(i)) for i, x in magnitudes.items()]
  most = dict(zip(magnitudes, mesh.all_reduce(found, axes, math.inf), strict=True))
  largest = [_together(kind.platform, [most[i] for i in block], math.inf) for block in kind.blocks]
  units = [jnp.where((m >= jnp.finfo(m.dtype).tiny) & (m < jnp.inf), m, 1) for m in largest]
  unit_of = {i: unit for block, unit in zip(kind.blocks, units, strict=True) for i in block}
  sums, by_leaf = totals({i: divide(x, unit_of[i]) for i, x in magnitudes.items()})
  norms = [(unit * root(s, p)).astype(dtype) for unit, s in zip(units, sums, strict=True)]
  # The largest may have dropped a NaN; the sum keeps it, but is also inf if another leaf of the block is.
  numbers = [jnp.where(jnp.isnan(by_leaf[i]), by_leaf[i], m) for i, m in most.items()]
  return norms, _column(kind.platform, numbers)


def _power_sum(magnitude: jax.Array, p: float, over: tuple[int, ...] | None) -> jax.Array:
  """The sum of |x|^p; for p = 0, the number of nonzeros."""
  powers = (magnitude != 0).astype(magnitude.dtype) if p == 0 else power(magnitude, p)
  return _reduced(powers, lax.add, 0.0, over)


def _extreme_magnitude(platform: str, x: jax.Array, p: float, over: tuple[int, ...] | None) -> jax.Array:
  """The largest (p = inf) or smallest (p = -inf) magnitude; NaN if any entry is NaN."""

  def magnitude(x: jax.Array) -> jax.Array:
    return jnp.abs(widest(x) if jnp.iscomplexobj(x) else upcast(x))

  if platform != "cpu" or x.size <= FEW:
    return lax.expand_dims(extreme(magnitude(x), p, _dims(x.ndim, over)), over or ())
  # XLA on CPU finds the largest float much faster than the largest integer, but drops a NaN. A sum keeps it, and is
  # scaled down to keep finite entries from overflowing. The barrier stops XLA from fusing both reductions into one slow
  # loop.
  found = _reduced(magnitude(x), lax.max, 0.0, over) if p > 0 else _reduced(magnitude(x), lax.min, math.inf, over)
  scaled = magnitude(lax.optimization_barrier(x))
  total = _reduced(scaled * scaled.dtype.type(2.0**-100), lax.add, 0.0, over)
  return jnp.where(jnp.isnan(total), total, found)


# Small parts ---------------------------------------------------------------------------------------------------------


def _dims(rank: int, over: tuple[int, ...] | None) -> tuple[int, ...]:
  """The axes to reduce over: all axes if `over` is None."""
  return tuple(range(rank)) if over is None else over


def _reduced(x: jax.Array, op: Callable[..., Any], start: float, over: tuple[int, ...] | None) -> jax.Array:
  """A reduction over some axes, kept with size 1, or over all axes."""
  return lax.expand_dims(lax.reduce(x, x.dtype.type(start), op, _dims(x.ndim, over)), over or ())


def _scalar(x: jax.Array) -> jax.Array:
  return x if x.ndim == 0 else jnp.sum(x)


def _extreme_of(x: jax.Array, p: float) -> jax.Array:
  return x if x.ndim == 0 else extreme(x, p, tuple(range(x.ndim)))


def _together(platform: str, values: Sequence[jax.Array], p: float = 1.0) -> jax.Array:
  """The sum or extreme of reduced values: on CPU through one vector, elsewhere in a chain, which XLA fuses there."""
  if len(values) == 1 or platform != "cpu":
    return functools.reduce(lax.add if math.isfinite(p) else lax.max if p > 0 else lax.min, values)
  stacked = stack(values, values[0].dtype, barrier=True)
  return stacked.sum() if math.isfinite(p) else extreme(stacked, p, (0,))


def _column(platform: str, values: Iterable[jax.Array]) -> list[jax.Array]:
  """The reduced values of leaves: scalars on a TPU, one vector elsewhere."""
  scalars = [_scalar(x) for x in values]
  return scalars if platform == "tpu" else [stack(scalars, scalars[0].dtype, barrier=platform == "cpu")]


def stack(values: Iterable[jax.Array], dtype: Any, *, barrier: bool = False) -> jax.Array:
  """Scalars as a vector, of shape (0,) if there are none."""
  scalars = [lax.convert_element_type(v, dtype) for v in values]
  if not scalars:
    return jnp.zeros((0,), dtype)
  # Without a barrier XLA on CPU turns a reduction of the vector back into one of the scalars, which takes long.
  return lax.optimization_barrier(jnp.stack(scalars)) if barrier else jnp.stack(scalars)


def end_to_end(values: Iterable[jax.Array], dtype: Any) -> jax.Array:
  """Arrays of any shape as one vector, of shape (0,) if there are none."""
  flat = [mesh.replicated(lax.convert_element_type(v, dtype)).ravel() for v in values]
  return jnp.concatenate(flat) if flat else jnp.zeros((0,), dtype)


def _allowed(dtype: Any) -> AbstractContextManager[Any]:
  """A context in which JAX keeps this dtype: without x64 it turns float64 into float32, even inside a sum."""
  return jax.enable_x64(True) if dtype == np.float64 else nullcontext()
