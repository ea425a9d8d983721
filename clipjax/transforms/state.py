"""The state that a clip keeps between steps, and the next-state stage that moves it."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import export

from clipjax import checks
from clipjax.groups import Labels, carries_labels
from clipjax.norms.sums import norm_dtype
from clipjax.rules.base import no_limit


@carries_labels
class ClipState(NamedTuple):
  """What a clip has seen; one fixed structure from `init` on.

  n is the number of groups or leaves, 0 for a global clip; slices of stacked leaves count as leaves. Norms are float32,
  or float64 when x64 is enabled, for gradients of any dtype.

  Attributes:
    norm: shape (): global norm of the last gradient, before the clip.
    norm_clipped: shape (): global norm after the clip.
    max_norm: shape () for a global clip, else (n,): the limit in force at the last step; the largest number of the
      dtype, which no finite norm exceeds, if there is no limit.
    scale: shape of `max_norm`: the factor that multiplied the gradient; for `clip_by_value`, the largest entry.
    norms: shape (n,): norm of each group or leaf (rms for `clip_by_block_rms`), before the clip; () for a global clip.
    steps: int32, shape (): updates so far.
    clipped_steps: int32, shape (): updates in which anything was clipped.
    nonfinite_steps: int32, shape (): updates with a nonfinite norm or a NaN threshold.
    finite: bool, shape (): whether the last step was finite.
    nonfinite_leaf: int32, shape (): at a nonfinite step, the index in `labels.slices` of the first leaf, or slice of a
      stacked one, with a NaN or, if there is none, with an inf or a sum of squares that overflowed; else -1.
    rule: the state of the rule.
    labels: names of leaves and groups; static, no arrays.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx, grads = clipjax.clip_by_global_norm(1.0), jnp.array([3.0, 4.0])
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> print(float(state.norm), float(state.max_norm), int(state.clipped_steps))
    5.0 1.0 1
  """

  norm: jax.Array
  norm_clipped: jax.Array
  max_norm: jax.Array
  scale: jax.Array
  norms: jax.Array | tuple[()]
  steps: jax.Array
  clipped_steps: jax.Array
  nonfinite_steps: jax.Array
  finite: jax.Array
  nonfinite_leaf: jax.Array
  rule: Any
  labels: Labels


export.register_namedtuple_serialization(ClipState, serialized_name="clipjax.ClipState")


def empty_state(labels: Labels, rule: Any) -> ClipState:
  """The state before the first step."""
  shape, dtype = labels.shape, norm_dtype()
  # Every field is a separate array: a step that donates its state must not donate a buffer twice.
  return ClipState(
    norm=jnp.zeros((), dtype),
    norm_clipped=jnp.zeros((), dtype),
    max_norm=jnp.full(shape, no_limit(dtype), dtype),
    scale=jnp.ones(shape, dtype),
    norms=jnp.zeros(shape, dtype) if shape else (),  # Orbax cannot save arrays of size 0.
    steps=jnp.zeros((), jnp.int32),
    clipped_steps=jnp.zeros((), jnp.int32),
    nonfinite_steps=jnp.zeros((), jnp.int32),
    finite=jnp.ones((), jnp.bool_),
    nonfinite_leaf=jnp.full((), -1, jnp.int32),
    rule=rule,
    labels=labels,
  )


def next_state(
  state: ClipState, *, clipped: jax.Array, bad: jax.Array, first_bad: jax.Array, **fields: Any
) -> ClipState:
  """The state after a step that was clipped, nonfinite (`bad`) or neither; counters stop at their largest value."""
  # A nonfinite step counts as nonfinite only, even if its norm is above the limit.
  clipped_steps, nonfinite_steps = state.clipped_steps, state.nonfinite_steps
  return state._replace(
    steps=optax.safe_increment(state.steps),
    clipped_steps=jnp.where(clipped & ~bad, optax.safe_increment(clipped_steps), clipped_steps),
    nonfinite_steps=jnp.where(bad, optax.safe_increment(nonfinite_steps), nonfinite_steps),
    finite=~bad,
    nonfinite_leaf=jnp.where(bad, first_bad, -1).astype(jnp.int32),
    **fields,
  )


def check_state(state: Any, unlabelled: Labels, *, stacked: Any, updates: Any) -> ClipState:
  """The state; raises if `update` was given another transformation's state. For the rest see `Labels.check_state`."""
  or_else = ", or use `track=False` to continue from a checkpoint of optax.clip_by_global_norm"
  checks.check_state(state, ClipState, or_else=or_else)
  state.labels.check_state(unlabelled, state.norms, stacked=stacked, updates=updates)
  return cast(ClipState, state)
