"""Watching a gradient, or any update, without touching it.

What a step costs is the norms, which XLA shares with a clip beside it. The parameter norms, the share of zeros and the
entries that are not finite are taken at a look: at every 16th step, and at one that is not finite. On CPU, where a look
reads everything again, it stands behind a `lax.cond`. Accelerators count in the read that the norms take anyway, at
every step, and keep what a look has seen: no branch, and the same numbers.
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

# Between two looks at the parameters and at the zeros. Parameters move by about a thousandth a step.
LOOK_EVERY = 16
_LARGEST_COUNT = 2.0**31 - 128  # The largest float32 that is an int32.


@carries_labels
class WatchState(NamedTuple):
  """What a watch has seen; one structure from `init` on. n is the number of leaves, and slices of stacked ones.

  Norms are float32, or float64 when x64 is enabled. Fields of shape (n,) are () with `per_leaf=False`, `history` is ()
  with `history=0`.

  Attributes:
    norm: shape (): global norm of the last updates.
    norms: shape (n,): norm of each leaf.
    steps: int32, shape (): updates so far.
    nonfinite_steps: int32, shape (): those of them whose norm was not finite.
    finite: bool, shape (): whether the last step was finite.
    nonfinite: int32, shape (n,): entries of the last updates that were inf or NaN.
    zero_fraction: shape (): share of zeros among the entries; this and the next two as of the last look, which is at
      every 16th step from the first on, and at one that is not finite.
    param_norm: shape (): global norm of the parameters; 0 where they were never given.
    param_norms: shape (n,): norm of each parameter.
    worst_norm: shape (): the norm of the worst step: the first that was not finite, else the one of the largest norm.
    worst_step: int32, shape (): its number, counted from 1; 0 before the first step.
    worst_norms: shape (n,): its norms by leaf.
    history: shape (history,): the last norms, that of step i at `(i - 1) % history`.
    labels: names of the leaves; static, no arrays.
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
      ValueError: for a state of several models, as under vmap.
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
  """Measures updates and hands them on as they are: norms, zeros, nonfinite entries, the worst step, the last steps.

  First in a chain it sees the raw gradient, and shares the norms with a clip behind it; last in a chain, with another
  `name`, the updates that the optimizer makes of it, whose ratio to the parameters is what the learning rate does.
  inf and NaN are counted, by leaf, and passed on. Parameter norms and the share of zeros are taken at every 16th
  step, from the first on, so that a watch costs no second read of the updates.

  Args:
    history: the norms of so many last steps stay on the device, 4 bytes each, so that a loop that reads once in so
      many steps, or a `jax.lax.scan` over them, misses none.
    per_leaf: whether to keep numbers by leaf, 20 bytes for each; the global ones are always kept.
    stacked: as in `clip_by_leaf_norm`: a layer of a stack has numbers of its own.
    param_norms: whether to take the norms of the parameters, where `update` is given them. False leaves them alone:
      what else reads parameters that a step updates in place, donated, makes XLA on CPU copy them.
    axis_name: as in `global_norm`.
    name: first part of the keys of `clipjax.metrics`; a clip of the same name is taken to be of the same updates.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WatchState`. `clipjax.metrics` has `<name>/norm`,
    `<name>/zero_fraction`, `<name>/param_norm`, `<name>/ratio`, `<name>/worst_norm`, `<name>/worst_step`, and by leaf
    `<name>/norm/<leaf>`, `<name>/ratio/<leaf>`, `<name>/nonfinite/<leaf>` and `<name>/worst_norm/<leaf>`.

  Raises:
    ValueError: for a negative `history`, `stacked` with `per_leaf=False`; in `init`, for an axis that a leaf does not
      have; in `update`, for another number of leaves or layers than `init` saw.
    TypeError: for a `history` that is no Python integer, a `per_leaf` or `param_norms` that is no bool; in `update`,
      for an integer or bool leaf, with its path.

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


class _Look(NamedTuple):
  """What is seen at a look alone; fields as in `WatchState`."""

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
  # It may be stored in another width, from before x64 was set, or as bfloat16 with the rest of a train state.
  state = jax.tree.map(lambda x: in_dtype(x, norm_dtype()) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
  norm, norms = _measured(state.labels, axes.updates, leaves)
  bad = ~jnp.isfinite(norm)
  seen = _look_if(bad | (state.steps % LOOK_EVERY == 0), axes, leaves, weights, state)
  worse = (state.worst_step == 0) | (jnp.isfinite(state.worst_norm) & (bad | (norm > state.worst_norm)))
  steps = optax.safe_increment(state.steps)
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
  """The global norm, and those of the leaves where they are kept."""
  spec = spec_of_slices(2.0, leaves, axes, labels.stacks) if labels.stacks else NormSpec(2.0, labels.blocks, axes)
  measured = measure(spec, leaves)
  if labels.unit == "global":
    return measured.norms[0], ()
  return vector_norm(measured.vector, 2.0), measured.vector


def _look_if(due: jax.Array, axes: _Spread, leaves: Sequence[Any], weights: Sequence[Any], state: WatchState) -> _Look:
  """What is seen at a look where one is due, else what the last one saw, with no entry counted as not finite."""
  last = _Look(state.nonfinite, state.zero_fraction, state.param_norm, state.param_norms)
  unseen = last._replace(nonfinite=jax.tree.map(jnp.zeros_like, last.nonfinite))
  look = partial(_look, state.labels, axes)

  def on_cpu(due: jax.Array, leaves: Any, weights: Any, unseen: _Look) -> _Look:
    seen: _Look = lax.cond(due, look, lambda leaves, weights, unseen: unseen, leaves, weights, unseen)
    return seen

  def elsewhere(due: jax.Array, leaves: Any, weights: Any, unseen: _Look) -> _Look:
    seen: _Look = jax.tree.map(partial(jnp.where, due), look(leaves, weights, unseen), unseen)
    return seen

  seen: _Look = lax.platform_dependent(due, list(leaves), list(weights), unseen, cpu=on_cpu, default=elsewhere)
  return seen


def _look(labels: Labels, axes: _Spread, leaves: Sequence[Any], weights: Sequence[Any], unseen: _Look) -> _Look:
  """One read of the updates for the counts, one of the parameters for their norms."""
  dtype, of_slices = norm_dtype(), over(leaves, by_leaf(labels.stacks, len(leaves)))
  pairs = zip(leaves, of_slices, strict=True)
  counts = [count.astype(dtype) for leaf, axes_of in pairs for count in _zeros_and_nonfinite(upcast(leaf), axes_of)]
  counts = all_reduce(counts, [a for a in axes.updates for _ in range(2)])
  joined = end_to_end if labels.stacks else stack
  zeros, nonfinite = joined(counts[::2], dtype), joined(counts[1::2], dtype)
  size = sum(jnp.size(x) * axes_size(a) for x, a in zip(leaves, axes.updates, strict=True))
  # No more entries are zero than are finite. This keeps both counts in use, and with them the one reduction.
  fraction = jnp.minimum(zeros.sum(), size - nonfinite.sum()) / max(size, 1)
  seen = unseen._replace(zero_fraction=fraction)
  if labels.unit == "leaf":
    seen = seen._replace(nonfinite=jnp.minimum(nonfinite, _LARGEST_COUNT).astype(jnp.int32))
  if weights:
    param_norm, param_norms = _measured(labels, axes.params, weights)
    seen = seen._replace(param_norm=param_norm, param_norms=param_norms)
  return seen


def _zeros_and_nonfinite(x: jax.Array, over: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
  """The number of zeros, and of entries that are inf or NaN, over some axes, or all of them, of shape () each."""
  # One reduction with two results: XLA on CPU would write out a copy of the leaf for either count by itself.
  flags = (x == 0).astype(jnp.int32), (~jnp.isfinite(x)).astype(jnp.int32)
  zero = jnp.zeros((), jnp.int32)
  axes = tuple(range(x.ndim)) if over is None else over
  first = int(len(axes) > 1 and x.size > _LARGEST_COUNT)  # More than an int32 counts: first row by row.
  zeros, nonfinite = lax.reduce(flags, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes[first:])
  if not first:
    return zeros, nonfinite
  dtype = norm_dtype()
  return zeros.astype(dtype).sum(axes[0]), nonfinite.astype(dtype).sum(axes[0])
