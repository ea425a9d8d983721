"""Reads what the transformations of this package have measured from any optimizer state, as device scalars.

`metrics` never waits for the device and transfers nothing: it computes only in small programs that hold their
constants. It therefore runs under `jax.transfer_guard("disallow")`, and inside jit too.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from clipjax import metric_names
from clipjax.arithmetic import quotient
from clipjax.checks import check_flag
from clipjax.groups import Labels
from clipjax.norms.sums import norm_dtype
from clipjax.rules.base import no_limit
from clipjax.state_search import named_states
from clipjax.transforms.effect import EffectState
from clipjax.transforms.skip import SkipState
from clipjax.transforms.state import ClipState
from clipjax.transforms.watch import WatchState


def metrics(opt_state: Any, *, per_leaf: bool = False) -> dict[str, jax.Array]:
  """The numbers that every clip and watch in an optimizer state has measured, as scalars: `{"grad/norm": ..., ...}`.

  Keys are `<name>/<quantity>`. The quantities are:

  - A clip: `norm` (before the clip), `norm_clipped`, `max_norm` (the limit in force; the largest number of the dtype if
    there is no limit), `scale` (the factor applied, by `clip_by_value` to the largest entry; 1 if nothing was clipped),
    `clip_fraction` (clipped steps over all steps), `clipped_steps`, `nonfinite_steps` and `steps`. A clip by group, and
    a clip by leaf with `per_leaf=True`, adds `norm/<label>`, `max_norm/<label>` and `scale/<label>`; its plain
    `max_norm` and `scale` are the smallest ones.
  - `clipjax.watch`: `norm`, `zero_fraction`, `param_norm`, `ratio` (norm over parameter norm; 0 if `update` got no
    parameters), `worst_norm`, `worst_step`, `nonfinite_steps` and `steps`; by leaf `norm`, `ratio`, `nonfinite` and
    `worst_norm`. A watch and a clip of the same name share their keys: the first in the chain gives what both have.
  - `clipjax.skip_steps`: `norm`, `loss`, `max_norm` and `max_loss` (each the largest number of the dtype if there is no
    limit), `fraction`, `consecutive` and `steps`.
  - `clipjax.clip_effect`: `ratio`, `cosine`, `grad_ratio` and counts; by leaf `ratio`, `cosine` and `share`.

  If a group's label is also the name of a leaf with other entries, in a watch or clip of the same name, the numbers by
  group move to `<name>_group/norm/<label>` and so on. A second clip, or watch, of one name is `<name>_2`; one inside
  `optax.multi_transform` is `<name>_<label>`.

  Before the first step the norms are 0 and the scale is 1. A nonfinite step shows its norm unchanged, inf or NaN. A
  state with `track=False` has nothing to show; a state without any clip gives an empty dict.

  Args:
    opt_state: the state of an optimizer, or an object that holds it as `opt_state`.
    per_leaf: whether to add the numbers of every leaf, one device operation each.

  Returns:
    A dict of arrays of shape () (with leading axes for a state under `vmap`), on the device.

  Raises:
    TypeError: for anything but an optimizer state, such as a transformation, None, a dict of arrays or the `nnx.state`
      of an optimizer, which has lost the names of the leaves; for a `per_leaf` that is not a bool.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> tx = optax.chain(clipjax.clip_by_global_norm(1.0), optax.adam(1e-3))
    >>> params = {"w": jnp.zeros(2)}
    >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
    >>> for key, value in clipjax.metrics(state).items():
    ...   print(key, value)
    grad/norm 5.0
    grad/norm_clipped 1.0
    grad/max_norm 1.0
    grad/scale 0.2
    grad/clip_fraction 1.0
    grad/clipped_steps 1
    grad/nonfinite_steps 0
    grad/steps 1
  """
  check_flag(per_leaf, "per_leaf")
  # Measured numbers may be inf or NaN; reading them is not an error.
  with jax.debug_nans(False), jax.debug_infs(False):
    return _read(opt_state, per_leaf)


def _read(opt_state: Any, per_leaf: bool) -> dict[str, jax.Array]:
  """The numbers of every state, by key."""
  out: dict[str, jax.Array] = {}
  states = list(named_states(opt_state))
  labels = [(name, state.labels) for name, state in states]
  for name, state in states:
    # Of two states with one name, such as a watch and a clip, the first wins.
    for quantity, value in global_numbers(state).items():
      out.setdefault(f"{name}/{quantity}", value)
    if state.labels.unit == "group" or (state.labels.unit == "leaf" and per_leaf):
      by = blocks_name(name, state.labels, labels)
      for quantity, vector in vectors_of(state).items():
        for label, value in zip(state.labels.block_names, _unstacked(vector), strict=True):
          out.setdefault(f"{by}/{quantity}/{label}", value)
  return out


def blocks_name(name: str, labels: Labels, states: Iterable[tuple[str, Labels]]) -> str:
  """The first part of keys by block: `name`, unless a label is also a leaf with other entries in another state."""
  # A group with just that one leaf is no clash.
  if labels.unit == "group":
    shared = [set(other.block_names) for base, other in states if base == name and other.unit == "leaf"]
    slices = labels.slices
    for label, block in zip(labels.block_names, labels.blocks, strict=True):
      if [slices[i] for i in block] != [label] and any(label in names for names in shared):
        return f"{name}_group"
  return name


def global_numbers(state: Any) -> dict[str, jax.Array]:
  """The numbers of a state for all leaves together, by quantity."""
  if isinstance(state, SkipState):
    return {
      metric_names.NORM: state.norm,
      metric_names.LOSS: state.loss,
      metric_names.MAX_NORM: state.max_norm,
      metric_names.MAX_LOSS: state.max_loss,
      metric_names.FRACTION: _share(state.skipped_steps, state.steps),
      metric_names.CONSECUTIVE: state.consecutive,
      metric_names.STEPS: state.steps,
    }
  if isinstance(state, EffectState):
    return {
      metric_names.RATIO: state.ratio,
      metric_names.COSINE: state.cosine,
      metric_names.GRAD_RATIO: state.grad_ratio,
      metric_names.NONFINITE_STEPS: state.nonfinite_steps,
      metric_names.STEPS: state.steps,
    }
  if isinstance(state, WatchState):
    return {
      metric_names.NORM: state.norm,
      metric_names.ZERO_FRACTION: state.zero_fraction,
      metric_names.PARAM_NORM: state.param_norm,
      metric_names.RATIO: _ratio(state.norm, state.param_norm),
      metric_names.WORST_NORM: state.worst_norm,
      metric_names.WORST_STEP: state.worst_step,
      metric_names.NONFINITE_STEPS: state.nonfinite_steps,
      metric_names.STEPS: state.steps,
    }
  is_global = state.labels.is_whole
  return {
    metric_names.NORM: state.norm,
    metric_names.NORM_CLIPPED: state.norm_clipped,
    metric_names.MAX_NORM: state.max_norm if is_global else _smallest(state.max_norm, None),
    metric_names.SCALE: state.scale if is_global else _smallest(state.scale, 1.0),
    metric_names.CLIP_FRACTION: _share(state.clipped_steps, state.steps),
    metric_names.CLIPPED_STEPS: state.clipped_steps,
    metric_names.NONFINITE_STEPS: state.nonfinite_steps,
    metric_names.STEPS: state.steps,
  }


def vectors_of(state: Any) -> dict[str, Any]:
  """The numbers of a state for each group or leaf, by quantity, each of shape (..., n)."""
  if isinstance(state, ClipState) and not state.labels.is_whole:
    return {metric_names.NORM: state.norms, metric_names.MAX_NORM: state.max_norm, metric_names.SCALE: state.scale}
  if isinstance(state, WatchState) and not isinstance(state.norms, tuple):
    return {
      metric_names.NORM: state.norms,
      metric_names.RATIO: _ratio(state.norms, state.param_norms),
      metric_names.NONFINITE: state.nonfinite,
      metric_names.WORST_NORM: state.worst_norms,
    }
  if isinstance(state, EffectState):
    return {metric_names.RATIO: state.ratios, metric_names.COSINE: state.cosines, metric_names.SHARE: state.shares}
  return {}


# Each of these is its own program, because states, and even fields of one state, may lie on different devices.


@partial(jax.jit, inline=True)
def _ratio(norm: Any, param_norm: Any) -> jax.Array:
  """A norm over the norm of the parameters; 0 if the latter is 0 or unknown."""
  known = param_norm > 0
  return quotient(jnp.where(known, norm, 0), jnp.where(known, param_norm, 1))


@partial(jax.jit, inline=True)
def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
  """One count over another; 0 if the other is 0."""
  dtype = norm_dtype()
  return part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)


@partial(jax.jit, inline=True, static_argnums=1)
def _smallest(vector: jax.Array, of_none: float | None) -> jax.Array:
  """The smallest number of all groups or leaves; NaN if any is NaN; `of_none` if there are none, None for no limit."""
  least = jnp.min(vector, axis=-1, initial=no_limit(vector.dtype) if of_none is None else of_none)
  return jnp.where(jnp.isnan(vector).any(axis=-1), jnp.sum(vector, axis=-1), least)  # A minimum on CPU may drop a NaN.


def _unstacked(vector: Any) -> list[jax.Array]:
  """The entries along the last axis, of shape (...) each."""
  n = vector.shape[-1]
  # Inside a program slices cost nothing; outside, each would be a dispatch of its own.
  if isinstance(vector, jax.core.Tracer):
    return [vector[..., i] for i in range(n)]
  # XLA takes 30 s to compile a program of 2000 results, and 1 s to compile two of 45.
  size = math.isqrt(max(n - 1, 0)) + 1
  return [entry for row in _rows(vector, size) for entry in _entries(row)][:n]


@partial(jax.jit, static_argnums=1)
def _rows(vector: jax.Array, size: int) -> list[jax.Array]:
  """Parts of `size` entries each, the last one padded with zeros."""
  count = -(-vector.shape[-1] // size)
  padding = [(0, 0)] * (vector.ndim - 1) + [(0, count * size - vector.shape[-1])]
  padded = jnp.pad(vector, padding)
  return [padded[..., i * size : (i + 1) * size] for i in range(count)]


@jax.jit
def _entries(vector: jax.Array) -> list[jax.Array]:
  return [vector[..., i] for i in range(vector.shape[-1])]
