"""The one engine of clipping as an Optax transformation, and the `clip_by_*` that stand on it.

Data flow of a step: updates in -> norms of blocks of leaves -> rule -> limit and target of each block -> factor of
each block -> updates out. A block is all leaves (global), a group of leaves, or one leaf. Everything that is measured
on the way goes into a `ClipState` of fixed structure.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.typing import ArrayLike

from clipjax import _functional, _leaves, _norms
from clipjax._labels import Labels
from clipjax._rule import Rule, StateCheck, as_rule, ask, check_flag, keep_where

MaxNorm: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike] | Rule


class ClipState(NamedTuple):
  """What a clip has seen; one structure from `init` on. n is the number of groups or leaves, 0 for a global clip.

  Norms are float32, or float64 when x64 is enabled, whatever the dtypes of the gradients.

  Attributes:
    norm: shape (): global norm of the last gradient, before the clip.
    norm_clipped: shape (): global norm after the clip.
    max_norm: shape () for a global clip, else (n,): the limit in force at the last step.
    scale: shape of `max_norm`: the factor that the gradient was multiplied with.
    norms: shape (n,): norm of each group or leaf (rms for `clip_by_rms`), before the clip; () for a global clip.
    steps: int32, shape (): updates so far.
    clipped_steps: int32, shape (): those of them in which anything was clipped.
    nonfinite_steps: int32, shape (): those of them whose norm, or threshold, was not finite.
    finite: bool, shape (): whether the last step was finite.
    nonfinite_leaf: int32, shape (): at a step that was not finite, the first leaf with a NaN, or without any, with an
      inf or a sum of squares that overflowed; -1 for none.
    rule: the state of the rule.
    labels: names of leaves and groups; static, no arrays.
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


class _Config(NamedTuple):
  """What distinguishes one clip from another, apart from its threshold.

  Attributes:
    ord: order of the norm.
    label: `(tree) -> Labels`, which leaves share a norm.
    rms: whether norms are divided by the square root of the number of entries.
    clamp: whether entries are clipped one by one instead of rescaled together.
    on_nonfinite: the policy.
    eps: added to norms.
    axis_name: mesh axes.
  """

  ord: float
  label: Callable[[Any], Labels]
  rms: bool = False
  clamp: bool = False
  on_nonfinite: str = "propagate"
  eps: ArrayLike = 0.0
  axis_name: Any = None


def clip_by_global_norm(
  max_norm: MaxNorm,
  ord: float | None = None,
  *,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Scales updates down to a global norm: `g * min(1, max_norm / (norm + eps))`, the norm taken over all leaves.

  With `eps=0` every leaf is bit-identical where `norm <= max_norm`, and 0 stays 0 for every `max_norm`, 0 included.
  `max_norm=inf` only measures. 16-bit leaves are multiplied in float32 and rounded once. Where the norm is inf, NaN or
  above the largest float32, or the threshold is NaN, `on_nonfinite` says what happens; the step is counted.

  Args:
    max_norm: number or scalar array >= 0, schedule `count -> number`, or `clipjax.rules.Rule`.
    ord: order of the norm, 2 when None; 1, `jnp.inf` or any p > 0.
    eps: added to the norm; `1e-6` gives the factor of torch.
    on_nonfinite: "propagate" makes every leaf NaN, "zero" makes every leaf 0, "error" raises. Inside jit "error" is a
      check that the caller turns on with two lines, `err, out = jax.jit(checkify.checkify(step))(...)` and
      `err.throw()`, `checkify` being `jax.experimental.checkify`.
    axis_name: as in `global_norm`; not needed under jit or in `shard_map` with its checks on.
    name: first part of the keys of `clipjax.metrics`.
    track: False keeps `optax.EmptyState()` instead of statistics, so that checkpoints of `optax.clip_by_global_norm`
      still restore; for a number or an array only.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState`: read it with `clipjax.metrics`.

  Raises:
    ValueError: for a negative or NaN Python number, an `ord` not above 0, an unknown policy, `track=False` with a
      schedule or rule; in `update`, for another number of leaves than `init` saw.
    TypeError: for an `ord` that is no Python number; in `update`, for an integer or bool leaf, with its path.
    FloatingPointError: in an eager `update` with "error", for a norm that is not finite.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> tx = optax.chain(clipjax.clip_by_global_norm(5.0), optax.sgd(1.0))
    >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates["w"], updates["b"])
    [-1.1538461 -1.5384616] [-4.6153846]
    >>> print(clipjax.metrics(state)["grad/norm"])
    13.0

  References:
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063; algorithm 1.
  """
  label = partial(Labels.of, name=check_name(name), unit="global")
  _check_track(track, max_norm)
  options = {"eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name}
  return _clip(as_rule(max_norm, "max_norm"), ord, label, track, **options)


def clip_by_leaf_norm(
  max_norm: MaxNorm,
  ord: float | None = None,
  *,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Scales each leaf down to a norm of its own: `g_i * min(1, max_norm / (norm_i + eps))`.

  0, inf and NaN as in `clip_by_global_norm`; a norm of any leaf that is not finite is a step that is not finite, for
  every leaf.

  Args:
    max_norm: as in `clip_by_global_norm`; one number for all leaves. A rule sees the norms as a vector.
    ord: as in `clip_by_global_norm`.
    eps: as in `clip_by_global_norm`.
    on_nonfinite: as in `clip_by_global_norm`.
    axis_name: as in `clip_by_global_norm`.
    name: as in `clip_by_global_norm`.
    track: as in `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`; `metrics(state, per_leaf=True)` has every norm.

  Raises:
    ValueError: as in `clip_by_global_norm`.
    TypeError: as in `clip_by_global_norm`.
    FloatingPointError: as in `clip_by_global_norm`.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> tx = clipjax.clip_by_leaf_norm(1.0)
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["w"], updates["b"])
    [0.6 0.8] [0.5]

  References:
    `tf.clip_by_norm`, https://www.tensorflow.org/api_docs/python/tf/clip_by_norm, does this to one tensor.
  """
  label = partial(Labels.of, name=check_name(name), unit="leaf")
  _check_track(track, max_norm)
  options = {"eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name}
  return _clip(as_rule(max_norm, "max_norm"), ord, label, track, **options)


def clip_by_group_norm(
  max_norm: MaxNorm | Mapping[Hashable, MaxNorm | None],
  groups: Callable[[str, Any], Hashable] | Any,
  *,
  ord: float | None = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Scales each group of leaves down to a norm of its own: `g_i * min(1, max_norm / (norm_of_its_group + eps))`.

  0, inf and NaN as in `clip_by_global_norm`; a norm of any group that is not finite is a step that is not finite, for
  every leaf, exempt ones included.

  Args:
    max_norm: as in `clip_by_global_norm`, for all groups, or a dict of these by label, in which None exempts a group.
    groups: `(path, leaf) -> label`, the path being the leaf's name such as "encoder/w", or a tree of labels of the
      structure of the parameters. Under `optax.inject_hyperparams` name it in `static_args`.
    ord: as in `clip_by_global_norm`.
    eps: as in `clip_by_global_norm`.
    on_nonfinite: as in `clip_by_global_norm`.
    axis_name: as in `clip_by_global_norm`.
    name: as in `clip_by_global_norm`.
    track: as in `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`; its metrics have `<name>/norm/<label>` and
    `<name>/scale/<label>`.

  Raises:
    ValueError: as in `clip_by_global_norm`; in `init`, for a label without a threshold and a threshold without leaves.
    TypeError: as in `clip_by_global_norm`; for `groups` that is an array.
    FloatingPointError: as in `clip_by_global_norm`.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> grads = {"body/w": jnp.array([3.0]), "body/b": jnp.array([4.0]), "head": jnp.array([100.0])}
    >>> tx = clipjax.clip_by_group_norm({"body": 1.0, "head": None}, lambda path, leaf: path.split("/")[0])
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["body/w"], updates["body/b"], updates["head"])
    [0.6] [0.8] [100.]
    >>> print(clipjax.metrics(state)["grad/norm/body"])
    5.0
  """
  if groups is None or isinstance(groups, jax.Array | np.generic | int | float):
    raise TypeError(
      f"`groups` must be a function (path, leaf) -> label or a tree of labels, got {_leaves.describe(groups)}: "
      f"pass it as the second argument; {_leaves.STATIC_ARGS_REMEDY}."
    )
  known = None
  rule = max_norm
  if isinstance(max_norm, Mapping):
    if None in max_norm:
      raise TypeError("labels of groups must be strings, got a NoneType in `max_norm`: pass strings.")
    known = tuple(map(str, max_norm))
    if len(set(known)) < len(known):
      raise ValueError(f"labels of groups must differ as strings, got {list(max_norm)} in `max_norm`: rename one.")
    rule = _by_label({str(key): value for key, value in max_norm.items()})
  label = partial(Labels.by_group, name=check_name(name), groups=groups, known=known)
  _check_track(track, *(max_norm.values() if isinstance(max_norm, Mapping) else [max_norm]))
  options = {"eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name}
  return _clip(as_rule(rule, "max_norm"), ord, label, track, **options)


def clip_by_rms(
  max_rms: MaxNorm,
  *,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Scales each leaf down to a root mean square: `g_i * min(1, max_rms / (rms_i + eps))`, `rms_i = sqrt(mean(g_i^2))`.

  0, inf and NaN as in `clip_by_leaf_norm`; the rms of an empty leaf is 0. Same result as
  `optax.clip_by_block_rms(max_rms)`. After a `scale_by_*` it is the update clipping of Adafactor.

  Args:
    max_rms: number or scalar array >= 0, schedule, or rule; a rule sees the rms of the leaves as a vector.
    eps: as in `clip_by_global_norm`, added to the rms.
    on_nonfinite: as in `clip_by_global_norm`.
    axis_name: as in `clip_by_global_norm`.
    name: as in `clip_by_global_norm`.
    track: as in `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`, whose `norms` and `max_norm` are in units of rms.

  Raises:
    ValueError: as in `clip_by_global_norm`.
    TypeError: as in `clip_by_global_norm`.
    FloatingPointError: as in `clip_by_global_norm`.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_rms(1.0)
    >>> updates, _ = tx.update(jnp.array([2.0, -2.0, 2.0, -2.0]), tx.init(jnp.zeros(4)))
    >>> print(updates)
    [ 1. -1.  1. -1.]

  References:
    Shazeer and Stern, Adafactor: adaptive learning rates with sublinear memory cost, 2018,
    https://arxiv.org/abs/1804.04235; section 6, update clipping.
  """
  label = partial(Labels.of, name=check_name(name), unit="leaf")
  _check_track(track, max_rms)
  options = {"eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name}
  return _clip(as_rule(max_rms, "max_rms"), None, label, track, rms=True, **options)


def clip_by_value(
  max_value: MaxNorm, *, axis_name: Any = None, name: str = "grad"
) -> optax.GradientTransformationExtraArgs:
  """Clips every entry to `[-max_value, max_value]`, as `optax.clip` does.

  Entries within the interval are bit-identical, inf becomes `max_value`, NaN stays NaN. The norm that is measured is
  the largest magnitude, the norm of order inf, of which `max_value` is the limit.

  Args:
    max_value: number or scalar array >= 0, schedule, or rule; it is rounded to each leaf's dtype.
    axis_name: as in `clip_by_global_norm`; for what is measured, and a rule.
    name: as in `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`.

  Raises:
    ValueError: for a negative or NaN Python number; in `update`, for another number of leaves than `init` saw.
    TypeError: in `update`, for a complex, integer or bool leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_value(1.0)
    >>> updates, state = tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)))
    >>> print(updates, clipjax.metrics(state)["grad/norm"])
    [ 0.5 -1. ] 3.0
  """
  label = partial(Labels.of, name=check_name(name), unit="global")
  return _clip(as_rule(max_value, "max_value"), math.inf, label, track=True, clamp=True, axis_name=axis_name)


# The engine ---------------------------------------------------------------------------------------------------------


def _clip(
  rule: Rule, ord: float | None, label: Callable[[Any], Labels], track: bool, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """Builds the transformation, once what is left to check of the Python values is checked."""
  config = _Config(_norms.check_ord(ord, for_clip=True), label, **options)
  _functional.check_policy(config.on_nonfinite)
  config = config._replace(eps=_functional.check_eps(config.eps))
  _leaves.check_axis_name(config.axis_name)
  unlabelled, rule_state = label(()), StateCheck(rule, "rule")

  def init(params: optax.Params) -> ClipState:
    labels = label(params)
    return empty_state(labels, rule.init(labels.shape, _norms.norm_dtype()))

  def update(
    updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, Any]:
    del extra_args
    _leaves.check_reduced(updates, params)
    if track:
      check_state(state, unlabelled)
      rule_state.check(state.rule, state.labels.shape)
      return _update(config, rule, updates, state, state.labels)
    fresh = init(updates)
    return _update(config, rule, updates, fresh, fresh.labels)[0], state

  return optax.GradientTransformationExtraArgs(init if track else optax.init_empty_state, update)


def _update(config: _Config, rule: Rule, updates: Any, state: ClipState, labels: Labels) -> tuple[Any, ClipState]:
  """One step: updates in, norms, rule, factors, updates out."""
  flat = _leaves.flatten(updates, "updates")
  labels.check_count(updates, len(flat.measured))
  if config.clamp:
    _functional.check_real(updates, flat, "updates")
  spec = _norms.NormSpec(config.ord, labels.blocks, _leaves.resolve_axes(updates, config.axis_name))
  block_norms, first_bad = _measure(spec, config.rms, flat.measured)
  is_global = labels.unit == "global"
  norms = block_norms.measured[0] if is_global else _norms.stack(block_norms.measured)
  global_norm = norms if is_global else _norms.vector_norm(_norms.stack(block_norms.norms), config.ord)

  limit, target, rule_state = ask(rule, norms, state.rule, global_norm)
  limit = jnp.maximum(limit, 0)
  bad = ~jnp.isfinite(norms).all() | ~jnp.isfinite(global_norm) | jnp.isnan(limit).any() | jnp.isnan(target).any()
  whole = _limits(config, norms, jnp.broadcast_to(limit, norms.shape), target)

  if config.clamp:
    new = _functional.clamp_leaves(flat.measured, limit)
    scale = _functional.scale_of(whole)
    clipped_norm = jnp.minimum(norms, limit)
  else:
    parts = [_limits(config, norm, _item(limit, b), _item(target, b)) for b, norm in enumerate(block_norms.measured)]
    new = _functional.rescale_leaves_jit(labels.block_of, config.on_nonfinite, flat.measured, parts, bad)
    if config.on_nonfinite == "error":
      _functional.raise_nonfinite(bad, global_norm, updates)
    fill = 0.0 if config.on_nonfinite == "zero" else _functional.nan_if(bad, norms.dtype)
    scale = jnp.where(bad, fill, _functional.scale_of(whole))
    after = _functional.norm_after(norms, whole)
    if config.rms:
      after = after * jnp.asarray(_root_sizes(spec, flat.measured), after.dtype)
    clipped_norm = jnp.where(bad, fill, after if is_global else _norms.vector_norm(after, config.ord))

  return flat.with_measured(new), next_state(
    state,
    norm=global_norm,
    norm_clipped=clipped_norm,
    max_norm=whole.limit,
    scale=scale,
    norms=state.norms if is_global else norms,
    clipped=(whole.norm > limit).any(),
    bad=bad,
    first_bad=first_bad,
    rule=keep_where(bad, state.rule, rule_state),
  )


def empty_state(labels: Labels, rule: Any) -> ClipState:
  """The state before the first step."""
  shape, dtype = labels.shape, _norms.norm_dtype()
  # Every field is an array of its own: a step that donates its state may donate no buffer twice.
  return ClipState(
    norm=jnp.zeros((), dtype),
    norm_clipped=jnp.zeros((), dtype),
    max_norm=jnp.full(shape, jnp.inf, dtype),
    scale=jnp.ones(shape, dtype),
    norms=jnp.zeros(shape, dtype) if shape else (),  # Orbax saves no arrays of size 0.
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
  """The state after a step that was clipped, or not finite (`bad`), or neither; the counters stop at their largest."""
  clipped_steps, nonfinite_steps = state.clipped_steps, state.nonfinite_steps
  return state._replace(
    steps=optax.safe_increment(state.steps),
    clipped_steps=jnp.where(clipped & ~bad, optax.safe_increment(clipped_steps), clipped_steps),
    nonfinite_steps=jnp.where(bad, optax.safe_increment(nonfinite_steps), nonfinite_steps),
    finite=~bad,
    nonfinite_leaf=jnp.where(bad, first_bad, -1).astype(jnp.int32),
    **fields,
  )


def check_state(state: Any, unlabelled: Labels) -> None:
  """Raises where `update` is given the state of something else; `unlabelled` are the labels of no leaves."""
  or_else = ", or `track=False` to go on with a checkpoint of optax.clip_by_global_norm"
  _leaves.check_state(state, ClipState, or_else=or_else)
  state.labels.check_state(unlabelled, state.norms)


class _Measured(NamedTuple):
  """Per block, each of shape (): the norms, and what the rule sees of them (the rms for an rms clip)."""

  norms: tuple[jax.Array, ...]
  measured: tuple[jax.Array, ...]


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _measure(spec: _norms.NormSpec, rms: bool, leaves: Sequence[Any]) -> tuple[_Measured, jax.Array]:
  norms = _norms.block_norms(spec, leaves)
  first_bad = _norms.first_nonfinite(spec, leaves)
  if not rms:
    return _Measured(norms, norms), first_bad
  return _Measured(norms, tuple(n / r for n, r in zip(norms, _root_sizes(spec, leaves), strict=True))), first_bad


def _root_sizes(spec: _norms.NormSpec, leaves: Sequence[Any]) -> list[float]:
  """What turns the rms of each block into its norm."""
  return [math.sqrt(max(size, 1)) for size in _norms.block_sizes(spec, leaves)]


def _by_label(thresholds: Mapping[str, Any]) -> Rule:
  """The rule that applies one rule to each group; None never clips."""
  each = [as_rule(math.inf if value is None else value, f"max_norm['{key}']") for key, value in thresholds.items()]

  def init(shape: tuple[int, ...], dtype: Any) -> Any:
    del shape
    return tuple(rule.init((), dtype) for rule in each)

  def update(norms: jax.Array, state: Any, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    outs = [ask(rule, norms[i], state[i], global_norm) for i, rule in enumerate(each)]
    limits, targets, states = zip(*outs, strict=True)
    return _norms.stack(limits), _norms.stack(targets), states

  return Rule(init, update)


def check_name(name: Any) -> str:
  """The name, or an error where it is none."""
  if not isinstance(name, str) or not name:
    raise TypeError(f'`name` must be a nonempty string, got {_leaves.describe(name)}: pass a word such as "grad".')
  return name


def _check_track(track: bool, *thresholds: Any) -> None:
  """Raises where a threshold that needs a state is to have none."""
  check_flag(track, "track")
  if not track and any(isinstance(value, Rule) or callable(value) for value in thresholds):
    raise ValueError(
      "`track=False` keeps no state, so that `max_norm` must be a number or an array, got a schedule or a rule: "
      "leave `track` at True."
    )


def _limits(config: _Config, norm: jax.Array, limit: jax.Array, target: jax.Array) -> _functional.Limits:
  """What holds for a block, or for all of them as vectors."""
  # Where the norm is not above the limit the target has no meaning, and `eps` can still ask for it.
  target = jnp.where(norm > limit, jnp.clip(target, 0, limit), limit)
  return _functional.Limits(norm + jnp.asarray(config.eps).astype(norm.dtype), limit, target)


def _item(value: jax.Array, b: int) -> jax.Array:
  """The value for a block. One value for all stays a scalar: a slice for each leaf takes XLA long to compile."""
  return value if value.ndim == 0 else value[b]
