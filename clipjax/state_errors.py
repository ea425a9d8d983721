"""Reports on the host whether the last step went wrong: `raise_if_nonfinite`.

Everything it needs is read from the device at once, by an explicit transfer, which `jax.transfer_guard("disallow")`
allows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from clipjax.rules.base import is_no_limit
from clipjax.state_search import found_in, held_tree, is_accumulator, is_wrapper, named, unwrapped
from clipjax.transforms.effect import EffectState
from clipjax.transforms.skip import SkipState
from clipjax.transforms.state import ClipState
from clipjax.transforms.watch import WatchState

_AROUND = "put `clipjax.skip_steps` around MultiSteps, or pass it `should_skip_update_fn=optax.skip_not_finite`"
_MAY_STAY = f"`optax.MultiSteps` around it would keep a NaN in its accumulator for good: {_AROUND}."
_STAYS = (
  "The accumulator of `optax.MultiSteps` is nonfinite and stays nonfinite, because Optax resets it with 0 * NaN: no "
  f"later step will be finite. Resume from an earlier checkpoint, and {_AROUND}."
)


def raise_if_nonfinite(opt_state: Any) -> None:
  """Raises if the last step was nonfinite, and names the leaves: call it on the host, between steps.

  A clip by leaf or by group, or a `clipjax.watch`, names up to ten leaves or groups whose norm was inf or NaN. A global
  clip names the first leaf with a NaN or, if there is none, the first with an inf or an overflow. If several
  transformations share a name, the message of the most specific one is raised. Waits for the step.

  Also raises if `skip_steps` has rejected `max_consecutive_skips` steps in a row (10 by default), and if one NaN has
  stopped training for good: `optax.MultiSteps` keeps a NaN from any micro-batch in its accumulator, after which
  `skip_steps`, `on_nonfinite="zero"` or `optax.apply_if_finite` inside it drops every step.

  Args:
    opt_state: see `metrics`.

  Raises:
    FloatingPointError: if the last step of any clip or watch was nonfinite, too many steps were rejected, or an
      accumulator keeps a NaN.
    TypeError: inside jit; also as `metrics` does.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([1.0]), "b": jnp.array([jnp.nan])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> clipjax.raise_if_nonfinite(state)
    Traceback (most recent call last):
    ...
    FloatingPointError: step 1 of 'grad' was not finite: norm nan, first in leaf 'b'. 1 of 1 steps were not finite: \
lower the learning rate, look at the batch, or wrap the optimizer in clipjax.skip_steps to drop such steps.
  """
  # Find our states, and the accumulators of MultiSteps around them.
  everything = found_in(held_tree(opt_state))
  accumulators = [found.state for found in everything if is_accumulator(found.state)]
  ours = named(everything)
  guards = [_guards(state.inner_opt_state) for state in accumulators]
  asked = [_without_others(found.state) for _, found in ours], guards
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((asked, [a.mini_step for a in accumulators]))):
    raise TypeError(
      "`opt_state` must hold concrete arrays, got traced ones: call `raise_if_nonfinite` outside jit, with what the "
      "jitted step returns."
    )
  # Read everything in one transfer.
  states, guards = jax.device_get(jax.tree.map(unwrapped, asked, is_leaf=is_wrapper))

  # Describe each state in trouble; of several with one name, a clip or watch by leaf or group says most.
  problems: dict[str, str] = {}
  effects: dict[str, str] = {}
  in_trouble = {id(a) for a, last_finite in zip(accumulators, guards, strict=True) if not np.all(last_finite)}
  may_stay = False
  for (name, found), state in zip(ours, states, strict=True):
    text = ""
    if isinstance(state, EffectState):
      if not np.all(state.finite):
        effects[name] = _effect_problem(name, state)
    elif isinstance(state, SkipState):
      text = _skip_problem(name, state)
    else:
      text = _problem(name, state, found.accumulators)
    if text and (name not in problems or not state.labels.is_whole):
      problems[name] = text
    if _is_nonfinite(state):
      in_trouble |= {id(a) for a in found.accumulators}
      may_stay |= bool(text and found.accumulators and not np.isfinite(state.norm).all())
  # The clip inside an effect says more, if it keeps a state.
  problems = problems or effects
  # An accumulator is as large as the gradient: check it only if something inside was nonfinite.
  if any(_has_nonfinite(a.acc_grads) for a in accumulators if id(a) in in_trouble):
    raise FloatingPointError(" ".join([*problems.values(), _STAYS]))
  if problems:
    raise FloatingPointError(" ".join([*problems.values(), *[_MAY_STAY] * may_stay]))


def _without_others(state: Any) -> Any:
  """A state without the states of its rules and of the wrapped transformation, which may be large and are unused."""
  if isinstance(state, SkipState):
    return state._replace(norm_rule=(), loss_rule=(), inner_state=())
  if isinstance(state, EffectState):
    return state._replace(inner_state=(), unclipped_state=())
  return state._replace(history=()) if isinstance(state, WatchState) else state._replace(rule=())


def _problem(name: str, state: Any, accumulators: Sequence[Any]) -> str:
  """Describes the nonfinite last step of a clip or watch, whose arrays are numpy; empty if the step was finite."""
  if np.all(state.finite):
    return ""
  # Where: by block if the state has norms by block, else the first bad leaf, if a clip knows it.
  labels = state.labels
  if isinstance(state, WatchState) and labels.is_whole:
    where = "somewhere"
  elif labels.is_whole:
    first = [i for i in np.unique(state.nonfinite_leaf) if i >= 0]
    where = f"first in leaf {', '.join(repr(labels.slices[i]) for i in first)}" if first else ""
  else:
    bad = ~np.isfinite(state.norms).reshape(-1, state.norms.shape[-1]).all(axis=0)
    names = [repr(label) for label, is_bad in zip(labels.block_names, bad, strict=True) if is_bad]
    listed = f"in {labels.unit} {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
    where = f"in every {labels.unit}" if bad.all() and bad.size > 3 else listed
  norms = state.norm if np.ndim(state.norm) == 0 else state.norm[~state.finite].flat[0]
  remedy = "lower the learning rate, look at the batch, or wrap the optimizer in clipjax.skip_steps to drop such steps."
  if accumulators:
    remedy = "lower the learning rate or look at the batch."
  # What was nonfinite when every leaf or group had a finite norm.
  reason = "above the largest number of its dtype"
  if not where and isinstance(state, ClipState) and np.isnan(state.max_norm).any():
    reason, remedy = "threshold nan", "check the schedule or rule that gives it."
  return (
    f"step {np.max(state.steps)} of '{name}' was not finite: norm {float(norms):g}, {where or reason}. "
    f"{np.max(state.nonfinite_steps)} of {np.max(state.steps)} steps were not finite: {remedy}"
  )


def _skip_problem(name: str, state: SkipState) -> str:
  """Describes a `SkipState` of numpy arrays that has rejected too many steps in a row; else empty."""
  in_a_row = np.max(state.consecutive)
  if in_a_row < np.min(state.max_consecutive_skips):
    return ""
  return (
    f"'{name}' rejected the last {in_a_row} steps, the limit is {np.min(state.max_consecutive_skips)}: "
    f"{_of('norm', state.norm, state.max_norm)}{_of_loss(state)}: check the data and the loss, and resume from an "
    "earlier checkpoint."
  )


def _effect_problem(name: str, state: EffectState) -> str:
  """Describes an `EffectState` of numpy arrays whose last gradient was nonfinite."""
  bad, steps = np.max(state.nonfinite_steps), np.max(state.steps)
  return (
    f"step {steps} of '{name}' was not finite. {bad} of {steps} steps were not finite: lower the learning rate, "
    "or look at the batch."
  )


def _of_loss(state: SkipState) -> str:
  return "" if is_no_limit(float(np.min(state.max_loss))) else f", {_of('loss', state.loss, state.max_loss)}"


def _of(what: str, value: Any, limit: Any) -> str:
  lowest = float(np.min(limit))
  return f"{what} {float(np.max(value)):g}" + ("" if is_no_limit(lowest) else f" (limit {lowest:g})")


# What optax.MultiSteps keeps -----------------------------------------------------------------------------------------


def _guards(tree: Any) -> list[Any]:
  """Whether each `optax.apply_if_finite` in a tree saw a finite last step: states inside it never see a bad one."""

  def is_guard(x: Any) -> bool:
    return isinstance(x, optax.ApplyIfFiniteState)

  return [x.last_finite for x in jax.tree.leaves(tree, is_leaf=is_guard) if is_guard(x)]


def _is_nonfinite(state: Any) -> bool:
  """Whether the last step of a state of numpy arrays was nonfinite."""
  return not (np.isfinite(state.norm) if isinstance(state, SkipState) else state.finite).all()


def _has_nonfinite(tree: Any) -> bool:
  """Whether any entry that this process holds is inf or NaN: other processes may not have called, and would not answer.

  Runs on the host, because a mesh in the context lets no program run on just one of its devices.
  """
  for leaf in map(unwrapped, jax.tree.leaves(tree, is_leaf=is_wrapper)):
    parts = [shard.data for shard in leaf.addressable_shards] if isinstance(leaf, jax.Array) else [leaf]
    if not all(np.isfinite(jax.device_get(part)).all() for part in parts):
      return True
  return False
