"""A wrapper that rejects a whole step, including the state of the wrapped optimizer.

It judges the raw gradient, before anything in the wrapped chain touches it. Rejecting is a `where` over updates and
state, which XLA fuses into the passes that the optimizer makes anyway; NaN is never multiplied by 0.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.typing import ArrayLike

from clipjax.checks import check_state, check_whole, describe
from clipjax.groups import Labels, carries_labels
from clipjax.leaves import is_float0
from clipjax.mesh import check_axis_name, varying_axes
from clipjax.norms.derivatives import measure_jit
from clipjax.norms.sums import NormSpec, norm_dtype
from clipjax.rules.base import Rule, StateCheck, as_rule, ask, keep_where, no_limit
from clipjax.transforms.engine import asked
from clipjax.transforms.inner import check_inner_state, check_transformation, kept_where
from clipjax.trees import prepare

_MOST_SKIPS = 2**31 - 1
_REMEDY = "pass a limit above the usual numbers, or None for none"
_DEFAULT_SKIPS = 10  # No run loses this many steps in a row by chance.


@carries_labels
class SkipState(NamedTuple):
  """What `skip_steps` has seen; its structure is fixed from `init` on. Norms and losses are float32, float64 under x64.

  Attributes:
    norm: shape (): global norm of the last gradient, rejected or not.
    loss: shape (): the last loss given as `value=`; 0 without one.
    max_norm: shape (): the limit of the norm at the last step; the largest number of the dtype for no limit.
    max_loss: shape (): the limit of the loss at the last step; the largest number of the dtype for no limit.
    steps: int32, shape (): calls of `update` so far.
    skipped_steps: int32, shape (): rejected calls so far.
    consecutive: int32, shape (): rejected calls since the last accepted one.
    max_consecutive_skips: int32, shape (): rejected calls in a row at which `clipjax.raise_if_nonfinite` raises.
    norm_rule: state of the rule for norms.
    loss_rule: state of the rule for losses.
    inner_state: state of the wrapped transformation.
    labels: names of the leaves; static, no arrays.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> tx = clipjax.skip_steps(optax.sgd(1.0), norm_rule=1.0)
    >>> params = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> print(float(state.norm), float(state.max_norm), int(state.skipped_steps))
    5.0 1.0 1
  """

  norm: jax.Array
  loss: jax.Array
  max_norm: jax.Array
  max_loss: jax.Array
  steps: jax.Array
  skipped_steps: jax.Array
  consecutive: jax.Array
  max_consecutive_skips: jax.Array
  norm_rule: Any
  loss_rule: Any
  inner_state: Any
  labels: Labels


export.register_namedtuple_serialization(SkipState, serialized_name="clipjax.SkipState")


def skip_steps(
  inner: optax.GradientTransformation,
  *,
  norm_rule: Rule | ArrayLike | None = None,
  loss_rule: Rule | ArrayLike | None = None,
  axis_name: Any = None,
  max_consecutive_skips: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Rejects steps that are nonfinite or above the limit of a rule: zero updates, and an unchanged wrapped state.

  A step is rejected if its global norm is inf or NaN, if the norm is above the limit of `norm_rule`, if a limit is NaN
  or, with a `loss_rule`, if the loss is nonfinite or above its limit. A gradient of zeros is an ordinary step. Both
  rules see the norm or loss of rejected steps too, unless norm or loss is nonfinite or a limit is NaN.

  Wrap the whole chain, clip included: `skip_steps(chain(clip, adam), norm_rule=...)`. After a clip it would see only
  clipped norms, which no rule finds large. Wrap `optax.MultiSteps` too: outside it, a bad micro-batch is left out as if
  it had never existed. Inside it, one NaN rejects every later step, because MultiSteps keeps it in its accumulator;
  `optax.MultiSteps(tx, k, should_skip_update_fn=optax.skip_not_finite)` is the other way out.

  Args:
    inner: the transformation to protect.
    norm_rule: `clipjax.rules.Rule`, number, array or schedule for the global norm; only its limit counts. None rejects
      only nonfinite norms.
    loss_rule: the same for the loss, which `update(..., value=loss)` then needs.
    axis_name: see `global_norm`.
    max_consecutive_skips: rejected steps in a row at which `clipjax.raise_if_nonfinite` raises; 10 when None.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `SkipState`. `clipjax.metrics` has `skip/norm`, `skip/steps`,
    `skip/fraction`, `skip/consecutive` and more.

  Raises:
    ValueError: for a negative or NaN Python number, an array that is not a scalar, and a `max_consecutive_skips` below
      1; in `update`, for another number of leaves than `init` saw, for an inner state of another transformation and,
      with a `loss_rule`, without `value=` or for one that is not a scalar or varies over mesh axes.
    TypeError: for anything that is not a rule or not a transformation, and for a `max_consecutive_skips` that is not a
      Python integer; in `update`, for another transformation's state, for an integer or bool leaf, with its path, and,
      with a `loss_rule`, for a `value` that is not a number.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> from clipjax import rules
    >>> rule = rules.rolling_sigma(6.0, window=128)
    >>> tx = clipjax.skip_steps(optax.sgd(1.0), norm_rule=rule, loss_rule=rule)
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.array([jnp.nan]), state, params, value=2.5)
    >>> print(updates, clipjax.metrics(state)["skip/consecutive"])
    [0.] 1

  References:
    OLMo-core's `SkipStepOptimizer`, https://github.com/allenai/OLMo-core: the rule of the example, on norm and loss.
  """
  check_transformation(inner, "inner")
  if max_consecutive_skips is not None:
    check_whole(max_consecutive_skips, "max_consecutive_skips", 1, _MOST_SKIPS)
  protected = optax.with_extra_args_support(inner)
  # A missing rule is one without a limit.
  norms = as_rule(jnp.inf if norm_rule is None else norm_rule, "norm_rule", remedy=_REMEDY)
  losses = as_rule(jnp.inf if loss_rule is None else loss_rule, "loss_rule", remedy=_REMEDY)
  check_axis_name(axis_name)
  label = partial(Labels.of, name="skip", unit="global")
  norm_check, loss_check = StateCheck(norms, "norm_rule"), StateCheck(losses, "loss_rule")

  def init(params: optax.Params) -> SkipState:
    dtype = norm_dtype()
    return SkipState(
      norm=jnp.zeros((), dtype),
      loss=jnp.zeros((), dtype),
      max_norm=jnp.full((), no_limit(dtype), dtype),
      max_loss=jnp.full((), no_limit(dtype), dtype),
      steps=jnp.zeros((), jnp.int32),
      skipped_steps=jnp.zeros((), jnp.int32),
      consecutive=jnp.zeros((), jnp.int32),
      max_consecutive_skips=jnp.full((), max_consecutive_skips or _DEFAULT_SKIPS, jnp.int32),
      norm_rule=norms.init((), dtype),
      loss_rule=losses.init((), dtype),
      inner_state=protected.init(params),
      labels=label(params),
    )

  def update(
    updates: optax.Updates, state: SkipState, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, SkipState]:
    check_state(state, SkipState)
    norm_rule_state, loss_rule_state = norm_check.fitted(state.norm_rule, ()), loss_check.fitted(state.loss_rule, ())
    # Prepare, and measure the raw gradient.
    prepared = prepare(updates, "updates", axis_name=axis_name, known=state.labels.leaves, params=params)
    norm = measure_jit(NormSpec(2.0, state.labels.blocks, prepared.axes), prepared.measured).norms[0]
    loss = _loss(extra_args, loss_rule is not None, norm_dtype())
    # Decide: a nonfinite step is rejected and keeps the rules unchanged; a large one is only rejected.
    # A negative limit of the norm counts as 0; a loss may be negative.
    max_norm, _, norm_state = asked(norms, norm, norm_rule_state, norm)
    max_loss, _, loss_state = ask(losses, loss, loss_rule_state, norm)
    bad = ~jnp.isfinite(norm) | jnp.isnan(max_norm) | jnp.isnan(max_loss)
    skip = norm > max_norm
    if loss_rule is not None:
      bad = bad | ~jnp.isfinite(loss)
      skip = skip | (loss > max_loss)
    skip = skip | bad

    # Update as usual, then select.
    try:
      new, inner_state = protected.update(updates, state.inner_state, params, **extra_args)
    except Exception as error:
      check_inner_state(protected, state.inner_state, "inner_state", updates if params is None else params, error)
      raise
    # NaN must not survive, so select zeros instead of multiplying by 0.
    new = jax.tree.map(lambda u: u if is_float0(u) else jnp.where(skip, jnp.zeros_like(u), u), new)
    return new, SkipState(
      norm=norm,
      loss=loss,
      max_norm=max_norm,
      max_loss=max_loss,
      steps=optax.safe_increment(state.steps),
      skipped_steps=jnp.where(skip, optax.safe_increment(state.skipped_steps), state.skipped_steps),
      consecutive=jnp.where(skip, optax.safe_increment(state.consecutive), 0),
      max_consecutive_skips=state.max_consecutive_skips,
      norm_rule=keep_where(bad, norm_rule_state, norm_state),
      loss_rule=keep_where(bad, loss_rule_state, loss_state),
      inner_state=kept_where(skip, state.inner_state, inner_state),
      labels=state.labels,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _loss(extra_args: dict[str, Any], needed: bool, dtype: Any) -> jax.Array:
  """The loss among the extra arguments; 0 if there is none and none is needed."""
  value = extra_args.get("value")
  if value is None:
    if needed:
      raise ValueError(
        "`value` must be given with a `loss_rule`, got None: call update(grads, state, params, value=loss)."
      )
    return jnp.zeros((), dtype)
  is_number = isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
  if not is_number or jnp.shape(value) != () or jnp.iscomplexobj(value):
    if not needed:  # The wrapped transformation may want it.
      return jnp.zeros((), dtype)
    error = ValueError if is_number else TypeError
    raise error(f"`value` must be a scalar loss, got {describe(value)}: pass its mean over the batch.")
  # A loss that varies over a mesh axis covers only one shard of the batch.
  loss: jax.Array = jnp.asarray(value)
  if axes := varying_axes(loss):
    if not needed:
      return jnp.zeros((), dtype)
    raise ValueError(
      f"`value` must be the loss of the whole batch, got one that varies over the mesh axes {list(axes)}: reduce it "
      "with jax.lax.pmean first."
    )
  return loss.astype(dtype)
