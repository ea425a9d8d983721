"""Watches a gradient, or any update, without changing it.

Every step computes the norms, which XLA shares with a clip in the same program. Parameter norms, the share of zeros and
the count of nonfinite entries are taken only at a sampled step: at every 16th step, and at a nonfinite one. On CPU,
where sampling reads everything again, it sits behind a `lax.cond`. Accelerators count at every step, in the read that
the norms need anyway, and keep the counts of sampled steps: no branch, and the same numbers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export, lax

from clipjax.arithmetic import upcast, vector_norm
from clipjax.checks import check_flag, check_name, check_state, check_whole
from clipjax.groups import Labels, carries_labels
from clipjax.mesh import Axes, all_reduce, axes_size, check_axis_name, varying_axes
from clipjax.norms.derivatives import measure
from clipjax.norms.sums import NormSpec, end_to_end, norm_dtype, spec_of_slices, stack
from clipjax.rules.base import in_dtype
from clipjax.stacks import absent, by_leaf, check_layers, over
from clipjax.trees import paired, prepare

# Steps between two samples of the parameters and the zeros. Parameters move by about a thousandth per step.
LOOK_EVERY = 16
_LARGEST_COUNT = 2.0**31 - 128  # The largest float32 that is an int32.


@carries_labels
class WatchState(NamedTuple):
  """What a watch has seen; one fixed structure from `init` on. n is the number of leaves and slices of stacked leaves.

  Norms are float32, or float64 when x64 is enabled. Fields of shape (n,) are () with `per_leaf=False`; `history` is ()
  with `history=0`.

  Attributes:
    norm: shape (): global norm of the last updates.
    norms: shape (n,): norm of each leaf.
    steps: int32, shape (): updates so far.
    nonfinite_steps: int32, shape (): updates with a nonfinite norm.
    finite: bool, shape (): whether the last step was finite.
    nonfinite: int32, shape (n,): entries of the last updates that were inf or NaN.
    zero_fraction: shape (): share of zeros among the entries. This field and the next two are from the last sampled
      step: every 16th step from the first on, and every nonfinite step.
    param_norm: shape (): global norm of the parameters; 0 if they were never given.
    param_norms: shape (n,): norm of each parameter.
    worst_norm: shape (): the norm of the worst step: the first nonfinite step, else the step with the largest norm.
    worst_step: int32, shape (): the number of the worst step, counted from 1; 0 before the first step.
    worst_norms: shape (n,): the norms of the worst step by leaf.
    history: shape (history,): the last norms; step i is at `(i - 1) % history`.
    labels: names of the leaves; static, no arrays.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx, grads = clipjax.watch(), jnp.array([3.0, 4.0])
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> print(float(state.norm), int(state.steps))
    5.0 1
  """

  norm: jax.Array
  norms: jax.Array | tuple[()]
  steps: jax.Array
  nonfinite_steps: jax.Array
  finite: jax.Array
  nonfinite: jax.Array | tuple[()]
  zero_fraction: jax.Array
  param_norm: jax.Array
  param_norms: jax.Array | tuple[()]
  worst_norm: jax.Array
  worst_step: jax.Array
  worst_norms: jax.Array | tuple[()]
  history: jax.Array | tuple[()]
  labels: Labels

  def last_norms(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`(steps, norms)` of the steps in the history, oldest first, as numpy arrays; waits for the device.

    Raises:
      ValueError: for a state of several models, for example under vmap.
    """
    if isinstance(self.history, tuple):
      return np.zeros(0, np.int64), np.zeros(0)
    if shape := np.shape(self.steps):
      raise ValueError(
        f"`last_norms` needs the state of one model, got a state with leading axes {shape}: select one model with "
        "jax.tree.map(lambda x: x[0], state)."
      )
    read = jax.device_get((self.history, self.steps))
    ring, steps = np.asarray(read[0]), int(read[1])
    numbers = np.arange(max(steps - len(ring), 0) + 1, steps + 1)
    return numbers, ring[(numbers - 1) % len(ring)]


export.register_namedtuple_serialization(WatchState, serialized_name="clipjax.WatchState")


def watch(
  *,
  history: int = 0,
  per_leaf: bool = True,
  stacked: Any = None,
  param_norms: bool = True,
  axis_name: Any = None,
  name: str = "grad",
) -> optax.GradientTransformationExtraArgs:
  """Measures updates and returns them unchanged: norms, zeros, nonfinite entries, the worst step, the last steps.

  First in a chain, it sees the raw gradient and shares the norms with a clip after it. Last in a chain, with another
  `name`, it sees the optimizer's updates, whose ratio to the parameters shows the effect of the learning rate. inf and
  NaN are counted by leaf and passed on. Parameter norms and the share of zeros are taken only at every 16th step from
  the first on, and at a nonfinite step, which saves a second read of the updates at the others.

  Args:
    history: number of last steps whose norms stay on the device, 4 bytes each. A loop that reads once in that many
      steps, or a `jax.lax.scan` over them, then misses none.
    per_leaf: whether to keep numbers by leaf, 20 bytes for each; the global ones are always kept.
    stacked: see `clip_by_leaf_norm`; each layer of a stack has its own numbers.
    param_norms: whether to take the norms of the parameters, if `update` gets them. With False nothing here reads
      them: an extra reader makes XLA on CPU copy donated parameters, which a step would otherwise update in place.
    axis_name: see `global_norm`.
    name: see `clip_by_global_norm`; a watch and a clip of the same name are assumed to see the same updates.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WatchState`. `clipjax.metrics` has `<name>/norm`,
    `<name>/zero_fraction`, `<name>/param_norm`, `<name>/ratio`, `<name>/worst_norm`, `<name>/worst_step`, and by leaf
    `<name>/norm/<leaf>`, `<name>/ratio/<leaf>`, `<name>/nonfinite/<leaf>` and `<name>/worst_norm/<leaf>`.

  Raises:
    ValueError: for a negative `history`, or `stacked` with `per_leaf=False`; in `init`, for an axis that a leaf does
      not have; in `update`, for another number of leaves or layers than `init` saw.
    TypeError: for a `history` that is not a Python integer, or a `per_leaf` or `param_norms` that is not a bool; in
      `update`, for an integer or bool leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> clip = clipjax.clip_by_global_norm(1.0)
    >>> tx = optax.chain(clipjax.watch(), clip, optax.sgd(0.1), clipjax.watch(name="update"))
    >>> params = {"w": jnp.array([6.0, 8.0]), "b": jnp.array([0.0])}
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
    >>> _, state = tx.update(grads, tx.init(params), params)
    >>> for key in ("grad/norm", "grad/zero_fraction", "grad/param_norm", "update/ratio/w"):
    ...   print(f"{key} {clipjax.metrics(state, per_leaf=True)[key]:.4g}")
    grad/norm 5
    grad/zero_fraction 0.3333
    grad/param_norm 10
    update/ratio/w 0.01
  """
  check_whole(history, "history", 0)
  check_flag(per_leaf, "per_leaf")
  check_flag(param_norms, "param_norms")
  check_axis_name(axis_name)
  if stacked is not None and not per_leaf:
    raise ValueError(
      "`stacked` must be None with `per_leaf=False`, which keeps no numbers by layer, got both: leave one of them out."
    )
  unit = "leaf" if per_leaf else "global"
  label = partial(Labels.of, name=check_name(name), unit=unit, stacked=stacked, axis_name=axis_name)
  unlabelled = label(())

  def init(params: optax.Params) -> WatchState:
    return _empty_state(label(params), history)

  def update(
    updates: optax.Updates, state: WatchState, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, WatchState]:
    del extra_args
    check_state(state, WatchState)
    state.labels.check_state(unlabelled, state.norms, stacked=stacked, updates=updates)
    _check_history(state, history)
    known, stacks = state.labels.leaves, state.labels.stacks
    prepared = prepare(updates, "updates", axis_name=axis_name, known=known, stacks=stacks, params=params)
    # Pair each measured leaf with its parameter; a leaf without one gets a stand-in of norm 0.
    pairs = paired(params, prepared) if param_norms and params is not None else []
    weights = [absent(s) if w is None else w for w, s in zip(pairs, by_leaf(stacks, len(pairs)), strict=False)]
    if weights and stacks:
      check_layers(weights, stacks, prepared.names, "params")
    of_params = tuple(map(varying_axes, weights)) if axis_name is None else prepared.axes
    return updates, _watched(_Spread(prepared.axes, of_params), prepared.measured, weights, state)

  return optax.GradientTransformationExtraArgs(init, update)


def _check_history(state: WatchState, history: int) -> None:
  got = 0 if isinstance(state.history, tuple) else jnp.shape(state.history)[-1]
  if got != history:
    raise ValueError(
      f"`state` must have a history of {history} norms, as `init` made it, got {got}: pass the state of this "
      "transformation, or call `init` again."
    )


def _empty_state(labels: Labels, history: int) -> WatchState:
  shape, dtype = labels.shape, norm_dtype()

  def by_leaf(dtype: Any) -> Any:
    return jnp.zeros(shape, dtype) if shape else ()

  return WatchState(
    norm=jnp.zeros((), dtype),
    norms=by_leaf(dtype),
    steps=jnp.zeros((), jnp.int32),
    nonfinite_steps=jnp.zeros((), jnp.int32),
    finite=jnp.ones((), jnp.bool_),
    nonfinite=by_leaf(jnp.int32),
    zero_fraction=jnp.zeros((), dtype),
    param_norm=jnp.zeros((), dtype),
    param_norms=by_leaf(dtype),
    worst_norm=jnp.zeros((), dtype),
    worst_step=jnp.zeros((), jnp.int32),
    worst_norms=by_leaf(dtype),
    history=jnp.zeros((history,), dtype) if history else (),
    labels=labels,
  )


class _Sample(NamedTuple):
  """The fields of `WatchState` that are taken only at a sampled step."""

  nonfinite: jax.Array | tuple[()]
  zero_fraction: jax.Array
  param_norm: jax.Array
  param_norms: jax.Array | tuple[()]


class _Spread(NamedTuple):
  """The mesh axes of the updates and of the parameters, leaf by leaf; static."""

  updates: tuple[Axes, ...]
  params: tuple[Axes, ...]


@partial(jax.jit, static_argnums=0, inline=True)
def _watched(axes: _Spread, leaves: Sequence[Any], weights: Sequence[Any], state: WatchState) -> WatchState:
  """The state after a step."""
  # The state may be stored in another dtype, from before x64 was set, or as bfloat16 with the rest of a train state.
  state = jax.tree.map(lambda x: in_dtype(x, norm_dtype()) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
  # Measure; sample if due; and remember the worst step and the history.
  norm, norms = _measured(state.labels, axes.updates, leaves)
  bad = ~jnp.isfinite(norm)
  seen = _sample_if_due(bad | (state.steps % LOOK_EVERY == 0), axes, leaves, weights, state)
  # The first nonfinite step stays the worst one.
  worse = (state.worst_step == 0) | (jnp.isfinite(state.worst_norm) & (bad | (norm > state.worst_norm)))
  steps = optax.safe_increment(state.steps)
  # The history is a ring, written at the number of the step.
  history = state.history
  if not isinstance(history, tuple):
    history = history.at[state.steps % history.shape[0]].set(norm)
  return WatchState(
    norm=norm,
    norms=norms,
    steps=steps,
    nonfinite_steps=jnp.where(bad, optax.safe_increment(state.nonfinite_steps), state.nonfinite_steps),
    finite=~bad,
    worst_norm=jnp.where(worse, norm, state.worst_norm),
    worst_step=jnp.where(worse, steps, state.worst_step),
    worst_norms=jax.tree.map(lambda now, old: jnp.where(worse, now, old), norms, state.worst_norms),
    history=history,
    labels=state.labels,
    **seen._asdict(),
  )


def _measured(labels: Labels, axes: tuple[Axes, ...], leaves: Sequence[Any]) -> tuple[jax.Array, Any]:
  """The global norm, and the norms of the leaves if they are kept."""
  spec = spec_of_slices(2.0, leaves, axes, labels.stacks) if labels.stacks else NormSpec(2.0, labels.blocks, axes)
  measured = measure(spec, leaves)
  if labels.is_whole:
    return measured.norms[0], ()
  return vector_norm(measured.vector, 2.0), measured.vector


def _sample_if_due(
  due: jax.Array, axes: _Spread, leaves: Sequence[Any], weights: Sequence[Any], state: WatchState
) -> _Sample:
  """The sampled fields if a sample is due, else those of the last one, with no entry counted as nonfinite."""
  last = _Sample(state.nonfinite, state.zero_fraction, state.param_norm, state.param_norms)
  unseen = last._replace(nonfinite=jax.tree.map(jnp.zeros_like, last.nonfinite))
  sample = partial(_sample, state.labels, axes)

  # On CPU the branch saves a read of everything; elsewhere both sides share the read of the norms.
  def on_cpu(due: jax.Array, leaves: Any, weights: Any, unseen: _Sample) -> _Sample:
    seen: _Sample = lax.cond(due, sample, lambda leaves, weights, unseen: unseen, leaves, weights, unseen)
    return seen

  def elsewhere(due: jax.Array, leaves: Any, weights: Any, unseen: _Sample) -> _Sample:
    seen: _Sample = jax.tree.map(partial(jnp.where, due), sample(leaves, weights, unseen), unseen)
    return seen

  seen: _Sample = lax.platform_dependent(due, list(leaves), list(weights), unseen, cpu=on_cpu, default=elsewhere)
  return seen


def _sample(labels: Labels, axes: _Spread, leaves: Sequence[Any], weights: Sequence[Any], unseen: _Sample) -> _Sample:
  """One read of the updates for the counts, one of the parameters for their norms."""
  dtype, of_slices = norm_dtype(), over(leaves, by_leaf(labels.stacks, len(leaves)))
  pairs = zip(leaves, of_slices, strict=True)
  counts = [count.astype(dtype) for leaf, axes_of in pairs for count in _zeros_and_nonfinite(upcast(leaf), axes_of)]
  # Two counts for each leaf, in turn: zeros and nonfinite entries.
  counts = all_reduce(counts, [a for a in axes.updates for _ in range(2)])
  joined = end_to_end if labels.stacks else stack
  zeros, nonfinite = joined(counts[::2], dtype), joined(counts[1::2], dtype)
  size = sum(jnp.size(x) * axes_size(a) for x, a in zip(leaves, axes.updates, strict=True))
  # There are at most as many zeros as finite entries. The minimum keeps both counts in use, and so the one reduction.
  fraction = jnp.minimum(zeros.sum(), size - nonfinite.sum()) / max(size, 1)
  seen = unseen._replace(zero_fraction=fraction)
  if labels.unit == "leaf":
    seen = seen._replace(nonfinite=jnp.minimum(nonfinite, _LARGEST_COUNT).astype(jnp.int32))
  if weights:
    param_norm, param_norms = _measured(labels, axes.params, weights)
    seen = seen._replace(param_norm=param_norm, param_norms=param_norms)
  return seen


def _zeros_and_nonfinite(x: jax.Array, over: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
  """The number of zeros, and of entries that are inf or NaN, over some axes or all of them."""
  # One reduction with two results: for two separate counts XLA on CPU would write out a copy of the leaf for each.
  flags = (x == 0).astype(jnp.int32), (~jnp.isfinite(x)).astype(jnp.int32)
  zero = jnp.zeros((), jnp.int32)
  axes = tuple(range(x.ndim)) if over is None else over
  # With more entries than an int32 can count, count row by row first.
  first = int(len(axes) > 1 and x.size > _LARGEST_COUNT)
  zeros, nonfinite = lax.reduce(flags, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes[first:])
  if not first:
    return zeros, nonfinite
  dtype = norm_dtype()
  return zeros.astype(dtype).sum(axes[0]), nonfinite.astype(dtype).sum(axes[0])
