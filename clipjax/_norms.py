"""Norms of pytrees that are right for every dtype and magnitude.

Each leaf is reduced once, in float32 (float64 for float64 leaves), to the sum of the p-th powers of its entries. Only
where a sum has overflowed or underflowed does a second pass behind `lax.cond` reduce those leaves again, rescaled, so
that the normal case costs one read of the gradient, under `vmap` too.
Derivatives never go through it: they are `custom_jvp` rules, `dn = <x / n, dx>` for the 2-norm.

`block_norms` serves every caller. A block is a tuple of leaf indices that share one norm: all leaves in one block is
the global norm, one leaf a block the norm of each leaf, anything between a group.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from clipjax import _leaves
from clipjax._leaves import Axes

# One suspicious leaf sends at most about 1 / _MAX_CHUNKS of the gradient through the second pass: what a leaf that is
# zero throughout costs in every step. More chunks cost compile time, one `lax.cond` each.
_MAX_CHUNKS = 16
# So many leaves of one shape may each have a scale of their own in the second pass: of more, one array of their size is
# a small share, and the scalars would cost compile time.
_FEW = 64
# Leaves up to so many entries are small: what is done to them together, and so many of them at most.
_SMALL = 1 << 16
_BATCH = 8


class NormSpec(NamedTuple):
  """What to measure; static, so that it can be a key of the jit cache.

  Attributes:
    ord: the order p of the norm.
    blocks: for each norm, the indices of the leaves that it measures.
    axes: the mesh axes to reduce each leaf over, as `_leaves.resolve_axes` gives them.
  """

  ord: float
  blocks: tuple[tuple[int, ...], ...]
  axes: tuple[Axes, ...]


def global_norm(tree: Any, ord: float | None = None, *, axis_name: Any = None) -> jax.Array:
  """The p-norm of all entries of a tree as one vector, `(sum |x|^p)^(1/p)`.

  Right to about 1e-6 as long as the true norm is a normal float32, whatever the magnitude of the entries (1e-30,
  1e30) and their dtype (16-bit leaves are summed in float32). 0 for an empty tree and for zeros, with the derivative
  0 there; inf for an inf entry and for a true norm above the largest float32; NaN for a NaN entry. Inside `shard_map`
  the shards of a leaf are summed over the axes that it varies over.

  Args:
    tree: pytree of floating or complex arrays of any shape; None and float0 leaves are passed over.
    ord: 2 when None; 1, `jnp.inf` or any p > 0; 0 counts the nonzero entries; `-jnp.inf` is the smallest magnitude.
    axis_name: mesh axes to reduce over, for `pmap` and `shard_map(check_vma=False)`: a name, a tuple of names, or a
      prefix tree of them. None: what the types of the leaves say.

  Returns:
    The norm, shape (), float32 (float64 when x64 is enabled).

  Raises:
    TypeError: for an integer, bool or other leaf, with its path, and for an `ord` that is no Python number.
    ValueError: for an `ord` that is negative, other than -inf, or NaN.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    >>> print(clipjax.global_norm(grads), clipjax.global_norm(grads, 1), clipjax.global_norm(grads, jnp.inf))
    13.0 19.0 12.0
    >>> print(clipjax.global_norm(jnp.full(4, 1e30)))
    2e+30

  References:
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063; algorithm 1.
  """
  p = check_ord(ord, for_clip=False)
  flat = _leaves.flatten(tree, "tree")
  spec = NormSpec(p, (tuple(range(len(flat.measured))),), _leaves.resolve_axes(tree, axis_name))
  return block_norms_jit(spec, flat.measured)[0]


def leaf_norms(tree: Any, ord: float | None = None, *, axis_name: Any = None) -> Any:
  """The p-norm of each leaf by itself, `(sum |x|^p)^(1/p)`, in a tree of the same structure.

  Each is as right as `global_norm`, also beside leaves of another magnitude. 0 for an empty leaf, for zeros and for a
  float0 leaf; inf and NaN stay in their leaf.

  Args:
    tree: pytree of floating or complex arrays of any shape; None stays None.
    ord: as in `global_norm`.
    axis_name: as in `global_norm`.

  Returns:
    The tree with a norm, shape (), float32 (float64 when x64 is enabled), in place of each leaf.

  Raises:
    TypeError: for an integer, bool or other leaf, with its path, and for an `ord` that is no Python number.
    ValueError: for an `ord` that is negative, other than -inf, or NaN.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> norms = clipjax.leaf_norms({"w": jnp.array([3.0, 4.0]), "b": jnp.array([1e-25])})
    >>> print(norms["w"], norms["b"])
    5.0 1e-25
  """
  p = check_ord(ord, for_clip=False)
  flat = _leaves.flatten(tree, "tree")
  spec = NormSpec(p, tuple((i,) for i in range(len(flat.measured))), _leaves.resolve_axes(tree, axis_name))
  return flat.with_all(block_norms_jit(spec, flat.measured), lambda _: jnp.zeros((), norm_dtype()))


def norm_dtype() -> Any:
  """The dtype of norms, thresholds and rule states: float64 exactly when x64 is enabled."""
  return jax.dtypes.canonicalize_dtype(np.float64)


def check_ord(ord: Any, *, for_clip: bool) -> float:
  """The order of the norm as a float, 2 for None; raises on what is no order."""
  if ord is None:
    return 2.0
  if isinstance(ord, jax.Array):
    raise TypeError(
      f"`ord` must be a Python number, got {_leaves.describe(ord)}: pass 2, 1 or `float('inf')`; "
      f"{_leaves.STATIC_ARGS_REMEDY}."
    )
  if isinstance(ord, bool) or not isinstance(ord, int | float | np.integer | np.floating):
    raise TypeError(f"`ord` must be a Python number, got {_leaves.describe(ord)}: pass 2, 1 or `float('inf')`.")
  p = float(ord)
  if p > 0 or (not for_clip and p in (0.0, -math.inf)):
    return p
  allowed = "> 0" if for_clip else "> 0, 0 or -inf"
  raise ValueError(f"`ord` must be {allowed}, got {ord!r}: pass 2 for the Euclidean norm.")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def block_norms(spec: NormSpec, leaves: Sequence[Any]) -> tuple[jax.Array, ...]:
  """The norm of each block of `spec`, each of shape () and of `norm_dtype()`."""
  # A rule for vmap does not know the name of its axis, so that a collective over it has no meaning there.
  manual = set(_leaves.manual_axes())
  return _block_norms(spec, leaves, _again_where if all(map(manual.issuperset, spec.axes)) else _again_if)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _block_norms_beside_derivatives(spec: NormSpec, leaves: Sequence[Any]) -> tuple[jax.Array, ...]:
  """`block_norms` without `custom_vmap`, of which JAX takes no derivative where it drops ours: twice through a scan."""
  return _block_norms(spec, leaves, _again_if)


def _block_norms(spec: NormSpec, leaves: Sequence[Any], choose: Callable[..., Any]) -> tuple[jax.Array, ...]:
  xs = [jnp.asarray(x) for x in leaves]
  axes = spec.axes
  wide = {i for i, x in enumerate(xs) if _is_wide(x)}
  if not wide or len(wide) == len(xs):
    return tuple(_uniform_block_norms(spec.ord, spec.blocks, xs, axes, choose))
  # Leaves summed in float32 and in float64 have different ranges: first apart, then the norm of the two norms.
  narrow_blocks = [tuple(i for i in block if i not in wide) for block in spec.blocks]
  wide_blocks = [tuple(i for i in block if i in wide) for block in spec.blocks]
  halves = _uniform_block_norms(spec.ord, [*narrow_blocks, *wide_blocks], xs, axes, choose)
  pairs = zip(halves[: len(spec.blocks)], halves[len(spec.blocks) :], strict=True)
  return tuple(vector_norm(jnp.stack(pair), spec.ord) for pair in pairs)


def _uniform_block_norms(
  p: float,
  blocks: Sequence[tuple[int, ...]],
  xs: Sequence[jax.Array],
  axes: Sequence[Axes],
  choose: Callable[..., Any],
) -> list[jax.Array]:
  """Norms of blocks whose leaves are each of one width; `choose` is one of `_again_if` and `_again_where`."""
  totals = _block_sums(p, blocks, xs, axes)
  norms = [_root(total, p) for total in totals]
  if p <= 1 or math.isinf(p):  # Here a power sum leaves its range only where the norm does.
    return norms
  floors = [sum(_floor(xs[i], axes[i]) for i in block) for block in blocks]
  second_pass = _rescaled_square_norms if p == 2 else partial(_rescaled_power_norms, p)
  together = stack(totals)
  suspects = (together == jnp.inf) | (together < np.array(floors).astype(together.dtype))
  for chunk in _chunks([sum(xs[i].size for i in block) for block in blocks]):
    doubtful = suspects[np.array(chunk)].any() if len(chunk) < len(blocks) else suspects.any()
    members = [i for b in chunk for i in blocks[b]]
    place = {i: k for k, i in enumerate(members)}
    local = [tuple(place[i] for i in blocks[b]) for b in chunk]
    again = partial(second_pass, local, [axes[i] for i in members], [floors[b] for b in chunk])
    chosen = choose(doubtful, again, [norms[b] for b in chunk], [totals[b] for b in chunk], [xs[i] for i in members])
    for b, norm in zip(chunk, chosen, strict=True):
      norms[b] = norm
  return norms


def _block_sums(
  p: float,
  blocks: Sequence[tuple[int, ...]],
  xs: Sequence[jax.Array],
  axes: Sequence[Axes],
  rescale: Callable[[jax.Array, int, int], jax.Array] = lambda x, b, i: x,
) -> list[jax.Array]:
  """The power sum of each block, over all shards, of `rescale(leaf, number of its block, number of the leaf)`."""
  members = [(b, i) for b, block in enumerate(blocks) for i in block]
  sums = all_reduce(
    [_power_sum(rescale(_upcast_to_sum(xs[i]), b, i), p) for b, i in members], [axes[i] for _, i in members], p
  )
  by_block: list[list[jax.Array]] = [[] for _ in blocks]
  for (b, _), value in zip(members, sums, strict=True):
    by_block[b].append(value)
  return [_total(values, p) for values in by_block]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def plain_block_norms(spec: NormSpec, leaves: Sequence[Any]) -> tuple[jax.Array, ...]:
  """`block_norms` without a second pass, which compiles faster: in float32 right from about 1e-19 to 1e19, and at 0."""
  totals = _block_sums(spec.ord, spec.blocks, [jnp.asarray(x) for x in leaves], spec.axes)
  return tuple(_root(total, spec.ord) for total in totals)


def _block_norms_jvp(measure: Callable[..., Any], spec: NormSpec, primals: Any, tangents: Any) -> Any:
  (leaves,), (dleaves,) = primals, tangents
  norms = measure(spec, leaves)
  xs = [upcast(x) for x in leaves]
  axes = spec.axes
  block_of = {i: b for b, block in enumerate(spec.blocks) for i in block}
  directions = [_direction(x, norms[block_of[i]], spec.ord) for i, x in enumerate(xs)]
  inner = [_real_inner(g, dx) for g, dx in zip(directions, dleaves, strict=True)]
  inner = all_reduce(inner, axes, 1.0)
  dnorms = [_total([inner[i] for i in block], 1.0) for block in spec.blocks]
  if math.isinf(spec.ord):  # Entries that tie for the extreme share its derivative.
    ties = all_reduce([jnp.sum(jnp.abs(g)) for g in directions], axes, 1.0)
    counts = [jnp.maximum(_total([ties[i] for i in block], 1.0), 1) for block in spec.blocks]
    dnorms = [dn / lax.stop_gradient(count) for dn, count in zip(dnorms, counts, strict=True)]
  return norms, tuple(dnorms)


block_norms.defjvp(partial(_block_norms_jvp, _block_norms_beside_derivatives))
_block_norms_beside_derivatives.defjvp(partial(_block_norms_jvp, _block_norms_beside_derivatives))
plain_block_norms.defjvp(partial(_block_norms_jvp, plain_block_norms))


def first_nonfinite(spec: NormSpec, leaves: Sequence[Any]) -> jax.Array:
  """The first leaf whose power sum is NaN, or where there is none, inf; -1 where all are finite. Shape (), int32.

  It asks for the sums of `block_norms` once more, which XLA computes once.
  """
  if not leaves:
    return jnp.full((), -1, jnp.int32)
  xs = [_upcast_to_sum(lax.stop_gradient(jnp.asarray(x))) for x in leaves]
  sums = stack(all_reduce([_power_sum(x, spec.ord) for x in xs], spec.axes, spec.ord))
  badness = jnp.where(jnp.isnan(sums), 2, jnp.where(jnp.isinf(sums), 1, 0))
  return jnp.where((badness > 0).any(), jnp.argmax(badness), -1).astype(jnp.int32)


def block_sizes(spec: NormSpec, leaves: Sequence[Any]) -> list[int]:
  """The number of entries of each block, over all shards."""
  xs = [jnp.asarray(x) for x in leaves]
  sizes = [x.size * _leaves.axes_size(a) for x, a in zip(xs, spec.axes, strict=True)]
  return [sum(sizes[i] for i in block) for block in spec.blocks]


block_norms_jit: Callable[[NormSpec, Sequence[Any]], tuple[jax.Array, ...]] = jax.jit(
  block_norms, static_argnums=0, inline=True
)


def vector_norm(norms: jax.Array, p: float) -> jax.Array:
  """The p-norm of p-norms, shape (n,): rescaled by the largest, so right at every magnitude, with the derivatives."""
  return _vector_norm(p, norms)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _vector_norm(p: float, norms: jax.Array) -> jax.Array:
  if p in (0, 1):  # For 0 they are counts.
    return jnp.sum(norms)
  if math.isinf(p):
    return _power_sum(norms, p)
  largest = jnp.max(norms, initial=0.0)
  usable = (largest > 0) & (largest < jnp.inf)  # False for NaN too.
  return largest * _root(_power_sum(divide(norms, jnp.where(usable, largest, 1)), p), p)


@_vector_norm.defjvp
def _vector_norm_jvp(p: float, primals: Any, tangents: Any) -> Any:
  (norms,), (dnorms,) = primals, tangents
  norm = _vector_norm(p, norms)
  direction = _direction(norms, norm, p)
  if math.isinf(p):
    direction = direction / lax.stop_gradient(jnp.maximum(jnp.sum(direction), 1))
  return norm, jnp.sum(direction * dnorms)


# The parts of a norm ------------------------------------------------------------------------------------------------


def _is_wide(x: jax.Array) -> bool:
  """Whether a leaf is summed in float64."""
  return x.dtype in (jnp.float64, jnp.complex128)


def upcast(x: Any) -> jax.Array:
  """The leaf in the dtype in which it is summed: float64 and complex128 as they are, the rest in 32-bit parts."""
  array: jax.Array = jnp.asarray(x)
  if _is_wide(array):
    return array
  return array.astype(jnp.complex64 if jnp.iscomplexobj(array) else jnp.float32)


def _upcast_to_sum(x: jax.Array) -> jax.Array:
  """`upcast` for one reduction: what else reads the leaf must not share its square, or its copy in float32.

  XLA on CPU would write out what a reduction shares with, say, Adam's second moment. It fuses no reduction with a
  conversion from float16, whose copy is written.
  """
  return upcast(lax.optimization_barrier(x))


def _parts(x: jax.Array) -> tuple[jax.Array, ...]:
  return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _power_sum(x: jax.Array, p: float) -> jax.Array:
  """The sum of |x|^p; for inf and -inf the largest and the smallest magnitude, for 0 the number of nonzeros."""
  if p == 2:
    return sum((jnp.sum(part * part) for part in _parts(x)), start=jnp.zeros((), x.real.dtype))
  magnitude = jnp.abs(x)
  if p == math.inf:
    return jnp.max(magnitude, initial=0.0)
  if p == -math.inf:
    return jnp.min(magnitude, initial=math.inf)
  if p == 0:
    return jnp.sum((magnitude != 0).astype(magnitude.dtype))
  return jnp.sum(_power(magnitude, p))


def _power(magnitude: jax.Array, p: float) -> jax.Array:
  return magnitude ** (int(p) if p.is_integer() else p)


def _root(total: jax.Array, p: float) -> jax.Array:
  """`total^(1/p)`, with one Newton step: 1/p is not exact in floating point, which a large total magnifies."""
  if p == 2:
    return jnp.sqrt(total)
  if p in (0, 1) or math.isinf(p):
    return total
  usable = (total > 0) & (total < jnp.inf)
  t = jnp.where(usable, total, 1)
  root: jax.Array = lax.optimization_barrier(t ** (1 / p))  # XLA would simplify `(t^(1/p))^p` to t.
  finite = root < jnp.inf
  correction = (_power(jnp.where(finite, root, 1), p) / t - 1) / p
  return jnp.where(usable, jnp.where(finite, root - root * correction, root), total)


def _total(values: Sequence[jax.Array], p: float) -> jax.Array:
  """Brings the reduced values of some leaves together, in `norm_dtype()`."""
  if not values:
    return jnp.full((), math.inf if p == -math.inf else 0.0, norm_dtype())
  stacked = stack(values)
  return stacked.max() if p == math.inf else stacked.min() if p == -math.inf else stacked.sum()


def stack(values: Sequence[jax.Array]) -> jax.Array:
  """Scalars as a vector of `norm_dtype()`, of shape (0,) where there are none."""
  if not values:
    return jnp.zeros((0,), norm_dtype())
  # Without the barrier XLA makes a reduction of the vector into one of the scalars again, which takes it long.
  stacked: jax.Array = lax.optimization_barrier(jnp.stack([v.astype(norm_dtype()) for v in values]))
  return stacked


def all_reduce(values: Sequence[jax.Array], axes: Sequence[Axes], p: float) -> list[jax.Array]:
  """Reduces per-leaf values over mesh axes, with one collective for each distinct set of axes and dtype."""
  reduce: Callable[..., Any] = lax.pmax if p == math.inf else lax.pmin if p == -math.inf else lax.psum
  out = list(values)
  together: dict[tuple[Axes, Any], list[int]] = {}
  for i, (value, leaf_axes) in enumerate(zip(values, axes, strict=True)):
    if leaf_axes:
      together.setdefault((leaf_axes, value.dtype), []).append(i)
  for (leaf_axes, _), indices in together.items():
    reduced = reduce(jnp.stack([values[i] for i in indices]), leaf_axes)
    for k, i in enumerate(indices):
      out[i] = reduced[k]
  return out


# The second pass ----------------------------------------------------------------------------------------------------


def _again_if(
  doubtful: jax.Array, again: Callable[..., Any], norms: list[jax.Array], totals: list[jax.Array], xs: Sequence[Any]
) -> list[jax.Array]:
  """`again(totals, xs)` where doubtful, else `norms`."""
  chosen: list[jax.Array] = lax.cond(doubtful, lambda: again(totals, xs), lambda: norms)
  return chosen


def _again_where(
  doubtful: jax.Array, again: Callable[..., Any], norms: list[jax.Array], totals: list[jax.Array], xs: Sequence[Any]
) -> list[jax.Array]:
  """`_again_if` in which what is not asked for does not run under `vmap` either.

  JAX makes a select, which runs both, of a `lax.cond` whose predicate is batched. Here the batch asks whether any of
  it is doubtful, and each of its members keeps its own answer.
  """

  @custom_vmap
  def choose(doubtful: jax.Array, norms: Any, totals: Any, xs: Any) -> Any:
    return _again_if(doubtful, again, norms, totals, xs)

  @choose.def_vmap
  def _(size: int, batched: Any, doubtful: jax.Array, norms: Any, totals: Any, xs: Any) -> Any:
    of_doubtful, of_norms, *of_rest = jax.tree.map(lambda is_batched: 0 if is_batched else None, list(batched))
    again_by_lane = jax.vmap(again, in_axes=tuple(of_rest), axis_size=size)
    norms = jax.vmap(lambda norms: norms, in_axes=(of_norms,), axis_size=size)(norms)
    chosen = _again_where(doubtful.any(), again_by_lane, norms, totals, xs)
    keep = jax.vmap(jnp.where, in_axes=(of_doubtful, 0, 0))
    return [keep(doubtful, new, old) for new, old in zip(chosen, norms, strict=True)], [True] * len(norms)

  chosen: list[jax.Array] = choose(doubtful, norms, totals, list(xs))
  return chosen


def _floor(x: jax.Array, axes: Axes) -> float:
  """The power sum below which terms lost to underflow may matter: at most `size * tiny` is lost, 2^-25 of this."""
  return x.size * _leaves.axes_size(axes) * float(jnp.finfo(jnp.float64 if _is_wide(x) else jnp.float32).tiny) * 2.0**25


def _chunks(sizes: Sequence[int]) -> list[list[int]]:
  """Splits block indices into at most about `_MAX_CHUNKS` runs of similar size; no run for no entries."""
  chunks: list[list[int]] = []
  filled = math.inf
  for b, size in enumerate(sizes):
    if size == 0:
      continue
    if filled + size > max(sum(sizes) / _MAX_CHUNKS, 1):
      chunks.append([])
      filled = 0
    chunks[-1].append(b)
    filled += size
  return chunks


def _rescaled_square_norms(
  blocks: Sequence[tuple[int, ...]],
  axes: Sequence[Axes],
  floors: Sequence[float],
  totals: Sequence[jax.Array],
  xs: Sequence[jax.Array],
) -> list[jax.Array]:
  """2-norms at the power of two that the first sum of a block, held against its floor, asks for: one read."""
  scales = []
  for block, total, floor in zip(blocks, totals, floors, strict=True):
    up = 2.0**600 if block and _is_wide(xs[block[0]]) else 2.0**90
    scales.append(jnp.where(total == jnp.inf, 1 / up, jnp.where(total < floor, up, 1)))
  batches = [(b, batch) for b, block in enumerate(blocks) for batch in _batches(block, xs, axes)]
  alike = Counter((b, xs[batch[0]].shape) for b, batch in batches)

  def squares(k: int, b: int, batch: Sequence[int]) -> jax.Array:
    real = upcast(xs[batch[0]]).real
    scale = scales[b].astype(real.dtype)
    if 1 < alike[b, real.shape] <= _FEW:
      # XLA would share the scale among leaves of one shape, and write it out as an array of their size. The maximum
      # with a number below every scale, another one for each leaf, changes nothing else.
      scale = jnp.maximum(scale, (k + 1) * float(jnp.finfo(real.dtype).tiny))
    rescaled = [part * scale for i in batch for part in _parts(_upcast_to_sum(xs[i]))]
    return jnp.sum(sum((part * part for part in rescaled[1:]), start=rescaled[0] * rescaled[0]))

  sums = all_reduce(
    [squares(k, b, batch) for k, (b, batch) in enumerate(batches)], [axes[batch[0]] for _, batch in batches], 2.0
  )
  by_block: list[list[jax.Array]] = [[] for _ in blocks]
  for (b, _), value in zip(batches, sums, strict=True):
    by_block[b].append(value)
  return [jnp.sqrt(_total(s, 2.0)) / scale.astype(norm_dtype()) for s, scale in zip(by_block, scales, strict=True)]


def _batches(block: Sequence[int], xs: Sequence[jax.Array], axes: Sequence[Axes]) -> list[list[int]]:
  """The leaves of a block, small ones of one type together: one reduction of eight compiles faster than eight."""
  batches: list[list[int]] = []
  open_batch: dict[Any, list[int]] = {}
  for i in block:
    x = xs[i]
    kind = (x.shape, x.dtype, axes[i], _leaves.varying_axes(x), getattr(jax.typeof(x), "sharding", None))
    batch = open_batch.get(kind)
    if batch is None or len(batch) == _BATCH or x.size > _SMALL:
      batch = open_batch[kind] = []
      batches.append(batch)
    batch.append(i)
  return batches


def _rescaled_power_norms(
  p: float,
  blocks: Sequence[tuple[int, ...]],
  axes: Sequence[Axes],
  floors: Sequence[float],
  totals: Sequence[jax.Array],
  xs: Sequence[jax.Array],
) -> list[jax.Array]:
  """p-norms with each block divided by its largest entry: two reductions."""
  del floors, totals
  largest = _block_sums(math.inf, blocks, xs, axes)
  usable = [(m > 0) & (m < jnp.inf) for m in largest]
  units = [jnp.where(ok, m, 1) for ok, m in zip(usable, largest, strict=True)]
  again = _block_sums(p, blocks, xs, axes, lambda x, b, _: divide(jnp.abs(x), units[b].astype(x.real.dtype)))
  return [unit * _root(total, p) for unit, total in zip(units, again, strict=True)]


# Derivatives --------------------------------------------------------------------------------------------------------


def divide(x: jax.Array, n: jax.Array) -> jax.Array:
  """`x / n` for a real scalar n: XLA multiplies with 1 / n, which is subnormal, and flushed to 0, above 2^126."""
  shrink = jnp.where(n > 2.0**64, 2.0**-64, 1).astype(n.dtype)
  return by_parts(lambda part: quotient(part * shrink, n * shrink), x)


@jax.custom_jvp
def quotient(x: jax.Array, n: jax.Array) -> jax.Array:
  """`x / n` of real arrays, whose derivative is right wherever itself is: that of JAX squares n."""
  return x / n


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> Any:
  # Tangents are multiplied, not divided: backwards, a division of a tangent is again JAX's own.
  (x, n), (dx, dn) = primals, tangents
  ratio = quotient(x, n)
  shrink = jnp.where(n > 2.0**64, 2.0**-64, 1).astype(n.dtype)
  return ratio, (dx - ratio * dn) * shrink * _reciprocal(n * shrink)


@jax.custom_jvp
def _reciprocal(n: jax.Array) -> jax.Array:
  return 1 / n


@_reciprocal.defjvp
def _reciprocal_jvp(primals: Any, tangents: Any) -> Any:
  inverse = _reciprocal(*primals)
  return inverse, -(inverse * tangents[0]) * inverse


def root_or_zero(x: jax.Array) -> jax.Array:
  """The square root, with the derivative 0 at 0."""
  is_zero = x == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def by_parts(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """`fn` of a real array; of a complex one, `fn` of its real and of its imaginary part."""
  return lax.complex(fn(x.real), fn(x.imag)) if jnp.iscomplexobj(x) else fn(x)


def _direction(x: jax.Array, norm: jax.Array, p: float) -> jax.Array:
  """The derivative of the p-norm in each entry, 0 at norm 0; for inf and -inf the sign of every extreme entry."""
  n = norm.astype(x.real.dtype)
  usable = n > 0
  if p == 2:
    return divide(jnp.where(usable, x, 0), jnp.where(usable, n, 1))
  if p == 0:
    return jnp.zeros_like(x)
  magnitude = jnp.abs(x)
  # Not `jnp.sign` of a complex number, whose derivative JAX takes for 0.
  nonzero = magnitude > 0
  sign = (
    by_parts(lambda part: quotient(part, jnp.where(nonzero, magnitude, 1)), x) if jnp.iscomplexobj(x) else jnp.sign(x)
  )
  if p == 1:
    return sign
  if math.isinf(p):
    return jnp.where(magnitude == n, sign, 0)
  ratio = divide(magnitude, jnp.where(usable, n, 1))
  nonzero = usable & (ratio > 0)
  weight = jnp.where(nonzero, jnp.where(nonzero, ratio, 1) ** (p - 1), 0)
  return by_parts(lambda part: part * weight, sign)


def _real_inner(g: jax.Array, dx: jax.Array) -> jax.Array:
  """`Re <g, dx>`, the change of a real number when its argument moves by dx."""
  pairs = zip(_parts(g), _parts(upcast(dx)), strict=True)
  return sum((jnp.sum(a * b) for a, b in pairs), start=jnp.zeros((), g.real.dtype))
