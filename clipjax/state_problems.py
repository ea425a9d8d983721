"""Whether the last step went wrong, told on the host: `raise_if_nonfinite`.

All that is asked of the device is read at once, and explicitly, as `jax.transfer_guard("disallow")` allows.
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
  "The accumulator of `optax.MultiSteps` is not finite and stays so, since Optax resets it by 0 * NaN: no finite step "
  f"will follow. Resume from before, and {_AROUND}."
)


def raise_if_nonfinite(opt_state: Any) -> None:
  """Raises where the last step was not finite, and names the leaves: call it on the host, between steps.

  A clip by leaf or by group, or a `clipjax.watch`, names every leaf or group whose norm was inf or NaN; a global clip
  names the first leaf with a NaN, or without any, the first with an inf or an overflow. Of several, the one that names
  most speaks. Waits for the step.

  Raises too where `skip_steps` has rejected `max_consecutive_skips` steps in a row, 10 where none were given, and where
  one NaN has stopped training for good: `optax.MultiSteps` keeps a NaN of any micro-batch in its accumulator, so that
  `skip_steps`, `on_nonfinite="zero"` or `optax.apply_if_finite` inside it drop every step from then on.

  Args:
    opt_state: as in `metrics`.

  Raises:
    FloatingPointError: if the last step of any clip or watch was not finite, too many were rejected, or an accumulator
      keeps a NaN.
    TypeError: for what is no optimizer state, as in `metrics`, or inside jit.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([1.0]), "b": jnp.array([jnp.nan])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> clipjax.raise_if_nonfinite(state)
    Traceback (most recent call last):
    ...
    FloatingPointError: step 1 of 'grad' was not finite: norm nan, first in leaf 'b'. 1 of 1 steps were not finite: \
lower the learning rate, look at the batch, or pass on_nonfinite="zero" to drop such steps.
  """
  everything = found_in(held_tree(opt_state))
  accumulators = [found.state for found in everything if is_accumulator(found.state)]
  ours = named(everything)
  guards = [_guards(state.inner_opt_state) for state in accumulators]
  asked = [_without_others(found.state) for _, found in ours], guards
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((asked, [a.mini_step for a in accumulators]))):
    raise TypeError(
      "`opt_state` must be of arrays with values, got traced ones: call `raise_if_nonfinite` outside jit, with what "
      "the jitted step returns."
    )
  states, guards = jax.device_get(jax.tree.map(unwrapped, asked, is_leaf=is_wrapper))

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
    if text and (name not in problems or state.labels.unit != "global"):
      problems[name] = text
    if _is_nonfinite(state):
      in_trouble |= {id(a) for a in found.accumulators}
      may_stay |= bool(text and found.accumulators and not np.isfinite(state.norm).all())
  # The clip inside an effect says more, where it keeps a state.
  problems = problems or effects
  # An accumulator is as large as the gradient: it is looked at only where something inside was not finite.
  if any(_has_nonfinite(a.acc_grads) for a in accumulators if id(a) in in_trouble):
    raise FloatingPointError(" ".join([*problems.values(), _STAYS]))
  if problems:
    raise FloatingPointError(" ".join([*problems.values(), *[_MAY_STAY] * may_stay]))


def _without_others(state: Any) -> Any:
  """A state without those of its rules and of what it wraps, which may be large and are not asked for."""
  if isinstance(state, SkipState):
    return state._replace(norm_rule=(), loss_rule=(), inner_state=())
  if isinstance(state, EffectState):
    return state._replace(inner_state=(), unclipped_state=())
  return state._replace(history=()) if isinstance(state, WatchState) else state._replace(rule=())


def _problem(name: str, state: Any, accumulators: Sequence[Any]) -> str:
  """One sentence or two on a clip or watch, of numpy arrays, whose last step was not finite; else an empty text."""
  if np.all(state.finite):
    return ""
  labels = state.labels
  if isinstance(state, WatchState) and labels.unit == "global":
    where = "somewhere"
  elif labels.unit == "global":
    first = [i for i in np.unique(state.nonfinite_leaf) if i >= 0]
    where = f"first in leaf {', '.join(repr(labels.slices[i]) for i in first)}" if first else ""
  else:
    bad = ~np.isfinite(state.norms).reshape(-1, state.norms.shape[-1]).all(axis=0)
    names = [repr(label) for label, is_bad in zip(labels.block_names, bad, strict=True) if is_bad]
    listed = f"in {labels.unit} {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
    where = f"in every {labels.unit}" if bad.all() and bad.size > 3 else listed
  norms = state.norm if np.ndim(state.norm) == 0 else state.norm[~state.finite].flat[0]
  remedy = 'look at the batch, or pass on_nonfinite="zero" to drop such steps.'
  return (
    f"step {np.max(state.steps)} of '{name}' was not finite: norm {float(norms):g}, "
    f"{where or _other_reason(state)}. "
    f"{np.max(state.nonfinite_steps)} of {np.max(state.steps)} steps were not finite: lower the learning rate"
    f"{' or look at the batch.' if accumulators else ', ' + remedy}"
  )


def _other_reason(state: Any) -> str:
  """What was not finite where no norm of a leaf or group was."""
  if isinstance(state, ClipState) and np.isnan(state.max_norm).any():
    return f"threshold {float(np.min(state.max_norm)):g}"
  return "above the largest number of its dtype"


def _skip_problem(name: str, state: SkipState) -> str:
  """One sentence on a `SkipState` of numpy arrays that has rejected too many steps in a row; else an empty text."""
  in_a_row = np.max(state.consecutive)
  if in_a_row < np.min(state.max_consecutive_skips):
    return ""
  return (
    f"the last {in_a_row} steps were all rejected by '{name}', the limit is {np.min(state.max_consecutive_skips)}: "
    f"{_of('norm', state.norm, state.max_norm)}{_of_loss(state)}: look at the data and at the loss, and resume from "
    "before."
  )


def _effect_problem(name: str, state: EffectState) -> str:
  """Two sentences on an `EffectState` of numpy arrays whose last gradient was not finite."""
  bad, steps = np.max(state.nonfinite_steps), np.max(state.steps)
  return (
    f"step {steps} of '{name}' was not finite. {bad} of {steps} steps were not finite: lower the learning rate, "
    "or look at the batch."
  )


def _of_loss(state: SkipState) -> str:
  return "" if is_no_limit(float(np.min(state.max_loss))) else f", {_of('loss', state.loss, state.max_loss)}"


def _of(what: str, value: Any, limit: Any) -> str:
  lowest = float(np.min(limit))
  return f"{what} {float(np.max(value)):g}" + ("" if is_no_limit(lowest) else f" against {lowest:g}")


# What optax.MultiSteps keeps -----------------------------------------------------------------------------------------


def _guards(tree: Any) -> list[Any]:
  """What every `optax.apply_if_finite` in a tree says of its last step; a state inside it never sees a bad one."""

  def is_guard(x: Any) -> bool:
    return isinstance(x, optax.ApplyIfFiniteState)

  return [x.last_finite for x in jax.tree.leaves(tree, is_leaf=is_guard) if is_guard(x)]


def _is_nonfinite(state: Any) -> bool:
  """Whether the last step of a state, of numpy arrays, was not finite."""
  return not (np.isfinite(state.norm) if isinstance(state, SkipState) else state.finite).all()


def _has_nonfinite(tree: Any) -> bool:
  """Whether any entry is inf or NaN, of what this process holds: another one may not have called, and would not answer.

  On the host, since a mesh that is set around lets no program run on one of its devices alone.
  """
  for leaf in map(unwrapped, jax.tree.leaves(tree, is_leaf=is_wrapper)):
    parts = [shard.data for shard in leaf.addressable_shards] if isinstance(leaf, jax.Array) else [leaf]
    if not all(np.isfinite(jax.device_get(part)).all() for part in parts):
      return True
  return False
