"""Clips by norm: over all leaves, over each leaf, over each group, and by the root mean square of a leaf.

Each clip is the engine with other labels. Options that the clips share are documented in `clip_by_global_norm`.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from clipjax.checks import STATIC_ARGS_REMEDY, check_name, check_track, describe
from clipjax.groups import Labels
from clipjax.norms.sums import stack
from clipjax.rules.base import Rule, as_rule, ask
from clipjax.transforms.engine import MaxNorm, clip_by_rule

_BY_GROUP = ", or use clip_by_group_norm"  # What to do with a threshold for each leaf.


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
  """Scales updates down to a global norm over all leaves: `g * min(1, max_norm / (norm + eps))`.

  With `eps=0`, leaves keep their bits if `norm <= max_norm`, and 0 stays 0 for every `max_norm`, 0 included.
  `max_norm=inf` only measures. 16-bit leaves are multiplied in float32 and rounded once. If the norm is inf, NaN or
  above the largest number of its dtype, or the threshold is NaN, `on_nonfinite` decides, and the state counts the step.

  Args:
    max_norm: number or scalar array >= 0, schedule `count -> number`, or `clipjax.rules.Rule`.
    ord: order of the norm, 2 when None; 1, `jnp.inf` or any p > 0.
    eps: added to the norm; `1e-6` gives the factor of torch.
    on_nonfinite: "propagate" makes every leaf NaN, "zero" makes every leaf 0, "error" raises. Inside jit, "error" adds
      a `jax.experimental.checkify` check; turn it on with `err, out = jax.jit(checkify.checkify(step))(...)` and
      `err.throw()`. `optax.MultiSteps` keeps a NaN in its accumulator, and "zero" inside it drops every step from then
      on: put `clipjax.skip_steps` around MultiSteps instead.
    axis_name: mesh axes to reduce over, see `global_norm`; not needed under jit or in `shard_map` with its checks on.
    name: first part of the keys of `clipjax.metrics`.
    track: False keeps `optax.EmptyState()` instead of statistics, which lets checkpoints of `optax.clip_by_global_norm`
      restore; only for a number or an array.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state is a `ClipState`: read it with `clipjax.metrics`.

  Raises:
    ValueError: for a negative or NaN Python number, an array that is not a scalar, an infinite `eps`, an `ord` not
      above 0, an unknown policy, `track=False` with a schedule or rule; in `update`, for another number of leaves than
      `init` saw.
    TypeError: for an `ord` that is not a Python number; for a threshold, `eps`, `name`, `track` or `axis_name` of the
      wrong type; in `update`, for another transformation's state, and for an integer or bool leaf, with its path.
    FloatingPointError: in an eager `update` with "error", for a nonfinite norm.

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
  check_track(track, "max_norm", max_norm)
  options = {"track": track, "eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name}
  return clip_by_rule(max_norm, "max_norm", label, ord=ord, or_else=_BY_GROUP, **options)


def clip_by_leaf_norm(
  max_norm: MaxNorm,
  ord: float | None = None,
  *,
  stacked: Any = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Scales each leaf down by its own norm: `g_i * min(1, max_norm / (norm_i + eps))`.

  Each leaf follows `clip_by_global_norm` at 0, inf and NaN. One nonfinite leaf norm makes the whole step nonfinite, for
  every leaf; so does a global norm above the largest number of its dtype, even if the norm of each leaf is finite.

  Args:
    max_norm: one threshold for all leaves, see `clip_by_global_norm`. A rule sees the norms as a vector, with an entry
      for each slice of a stacked leaf.
    stacked: which axis of a leaf counts layers, for layers stacked in one array as by `nn.scan` and `nnx.scan`:
      `(path, leaf) -> axis or None`, a prefix tree of axes, or the name of the axis in the metadata of Flax boxes, such
      as "layers". Each slice is then a leaf of its own, `blocks/w[3]`. With a name, leaves without that name stay
      whole, such as biases under `nn.scan` whose initializer makes no box; a function can find those too. Under
      `optax.inject_hyperparams` name it in `static_args`.
    ord, eps, on_nonfinite, axis_name, name, track: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`; `metrics(state, per_leaf=True)` has every norm.

  Raises:
    ValueError: in `init`, for an axis that a leaf does not have, a tree of axes that does not match, or a name that no
      leaf carries; in `update`, for another number of layers than `init` saw.
    TypeError: in `init`, for an axis that is not a Python integer.
    Also as `clip_by_global_norm` does.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> tx = clipjax.clip_by_leaf_norm(1.0)
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["w"], updates["b"])
    [0.6 0.8] [0.5]
    >>> layers = {"blocks": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    >>> tx = clipjax.clip_by_leaf_norm(1.0, stacked=0)
    >>> print(tx.update(layers, tx.init(layers))[0]["blocks"])
    [[0.6 0.8]
     [0.3 0.4]]

  References:
    `tf.clip_by_norm`, https://www.tensorflow.org/api_docs/python/tf/clip_by_norm, clips one tensor in this way.
  """
  label = partial(Labels.of, name=check_name(name), unit="leaf", stacked=stacked, axis_name=axis_name)
  check_track(track, "max_norm", max_norm)
  options = {"track": track, "eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name, "stacked": stacked}
  return clip_by_rule(max_norm, "max_norm", label, ord=ord, or_else=_BY_GROUP, **options)


def clip_by_group_norm(
  max_norm: MaxNorm | Mapping[Hashable, MaxNorm | None],
  groups: Callable[[str, Any], Hashable] | Any,
  *,
  ord: float | None = None,
  stacked: Any = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Scales each group of leaves down by its own norm: `g_i * min(1, max_norm / (norm_of_its_group + eps))`.

  Each group follows `clip_by_global_norm` at 0, inf and NaN. One nonfinite group norm makes the whole step nonfinite,
  for every leaf, exempt ones included; so does a global norm above the largest number of its dtype, even if the norm of
  each group is finite.

  Args:
    max_norm: one threshold for all groups, see `clip_by_global_norm`, or a dict from label to threshold, with None to
      exempt a group.
    groups: `(path, leaf) -> label`, with the leaf's name as the path, such as "encoder/w", or a tree of labels with the
      structure of the parameters, which may be a prefix tree. Under `optax.inject_hyperparams` name it in
      `static_args`.
    stacked: see `clip_by_leaf_norm`; a function `groups` gets the shape and dtype of each slice as its leaf.
    ord, eps, on_nonfinite, axis_name, name, track: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`; its metrics have `<name>/norm/<label>` and
    `<name>/scale/<label>`.

  Raises:
    ValueError: for labels that are equal as strings; in `init`, for a label without a threshold, and for a threshold
      without leaves.
    TypeError: if `groups` is a number or an array, or a label is None.
    Also as `clip_by_leaf_norm` does.

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
      f"`groups` must be a function (path, leaf) -> label or a tree of labels, got {describe(groups)}: "
      f"pass it as the second argument; {STATIC_ARGS_REMEDY}."
    )
  # A dict of thresholds becomes one rule, which fixes the labels and their order.
  known = None
  rule = max_norm
  if isinstance(max_norm, Mapping):
    if None in max_norm:
      raise TypeError("`max_norm` must have labels that are not None, got None as a key: pass a string.")
    known = tuple(map(str, max_norm))
    if len(set(known)) < len(known):
      raise ValueError(f"labels of groups must differ as strings, got {list(max_norm)} in `max_norm`: rename one.")
    rule = _by_label({str(key): value for key, value in max_norm.items()})
  label = partial(
    Labels.by_group, name=check_name(name), groups=groups, known=known, stacked=stacked, axis_name=axis_name
  )
  check_track(track, "max_norm", *(max_norm.values() if isinstance(max_norm, Mapping) else [max_norm]))
  options = {"track": track, "eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name, "stacked": stacked}
  return clip_by_rule(rule, "max_norm", label, ord=ord, or_else=", or a dict by label", **options)


def clip_by_block_rms(
  max_rms: MaxNorm,
  *,
  stacked: Any = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
  track: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Scales each leaf down to a root mean square: `g_i * min(1, max_rms / (rms_i + eps))`, `rms_i = sqrt(mean(g_i^2))`.

  Each leaf follows `clip_by_leaf_norm` at 0, inf and NaN; the rms of an empty leaf is 0. Gives the same result as
  `optax.clip_by_block_rms(max_rms)`. After a `scale_by_*` it is the update clipping of Adafactor.

  Args:
    max_rms: number or scalar array >= 0, schedule, or rule; a rule sees the rms of the leaves as a vector.
    stacked: see `clip_by_leaf_norm`.
    eps: added to the rms.
    on_nonfinite, axis_name, name, track: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`, whose `norms` and `max_norm` are in units of rms.

  Raises:
    The same errors as `clip_by_leaf_norm`.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_block_rms(1.0)
    >>> updates, _ = tx.update(jnp.array([2.0, -2.0, 2.0, -2.0]), tx.init(jnp.zeros(4)))
    >>> print(updates)
    [ 1. -1.  1. -1.]

  References:
    Shazeer and Stern, Adafactor: adaptive learning rates with sublinear memory cost, 2018,
    https://arxiv.org/abs/1804.04235; section 6, update clipping.
  """
  label = partial(Labels.of, name=check_name(name), unit="leaf", stacked=stacked, axis_name=axis_name)
  check_track(track, "max_rms", max_rms)
  options = {"track": track, "eps": eps, "on_nonfinite": on_nonfinite, "axis_name": axis_name, "stacked": stacked}
  return clip_by_rule(max_rms, "max_rms", label, rms=True, **options)


def _by_label(thresholds: Mapping[str, Any]) -> Rule:
  """The rule that applies one rule to each group; None never clips."""
  each = [as_rule(math.inf if value is None else value, f"max_norm['{key}']") for key, value in thresholds.items()]

  def init(shape: tuple[int, ...], dtype: Any) -> Any:
    del shape
    return tuple(rule.init((), dtype) for rule in each)

  def update(norms: jax.Array, state: Any, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    # Each rule sees the norm of its own group as a scalar.
    outs = [ask(rule, norms[i], state[i], global_norm) for i, rule in enumerate(each)]
    limits, targets, states = zip(*outs, strict=True)
    return stack(limits, norms.dtype), stack(targets, norms.dtype), states

  return Rule(init, update)
