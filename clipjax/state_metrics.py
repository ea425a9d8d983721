"""Reading what the transformations of this package have measured, out of any optimizer state.

`metrics` gives device scalars and never waits for them, inside jit too; `raise_if_nonfinite` reads them on the host.
Both find every clipjax state in any nesting: chain, masked, multi_transform, MultiSteps, inject_hyperparams,
apply_if_finite, `flax.nnx.Optimizer`, a train state that has an `opt_state`.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax.arithmetic import quotient
from clipjax.checks import check_flag, describe
from clipjax.groups import Labels
from clipjax.norms.sums import norm_dtype
from clipjax.transforms.skip import SkipState
from clipjax.transforms.state import ClipState
from clipjax.transforms.watch import WatchState

_STATES = ClipState | SkipState | WatchState


def metrics(opt_state: Any, *, per_leaf: bool = False) -> dict[str, jax.Array]:
  """What every clip and watch in an optimizer state has measured, as a dict of scalars: `{"grad/norm": ..., ...}`.

  Keys are `<name>/<quantity>`. Those of a clip: `norm` (before the clip), `norm_clipped`, `max_norm` (the limit in
  force), `scale` (the factor applied; 1 where nothing was clipped), `clip_fraction` (clipped steps over all),
  `clipped_steps`, `nonfinite_steps` and `steps`; by group, and by leaf with `per_leaf=True`, also `norm/<label>`,
  `max_norm/<label>` and `scale/<label>`, the plain `max_norm` and `scale` being the smallest ones.

  Those of a `clipjax.watch`: `norm`, `zero_fraction`, `param_norm`, `ratio` (norm over that of the parameters; 0 where
  these were not given), `worst_norm`, `worst_step`, `nonfinite_steps` and `steps`; by leaf `norm`, `ratio`,
  `nonfinite` and `worst_norm`. A watch goes together with the clip of its name, and the first in the chain gives what
  both have. Those of `clipjax.skip_steps`: `norm`, `loss`, `max_norm`, `max_loss`, `fraction`, `consecutive`, `steps`.

  Where a label is also the name of a leaf, of other entries, in a watch or clip of the same name, the numbers by group
  go by `<name>_group/norm/<label>` and so on. A second clip, or watch, of one name is `<name>_2`; one inside
  `optax.multi_transform` is `<name>_<label>`.

  Before the first step the norms are 0 and the scale is 1. A step that was not finite shows its norm as it was, inf
  or NaN. A state with `track=False` has nothing to show; a state without any clip gives an empty dict.

  Args:
    opt_state: the state of an optimizer, or an object that holds it as `opt_state`.
    per_leaf: whether to add the numbers of every leaf, one device operation each.

  Returns:
    A dict of arrays of shape () (with leading axes for a state under `vmap`), on the device.

  Raises:
    TypeError: for a transformation in the place of its state, or a `per_leaf` that is no bool.

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
  out: dict[str, jax.Array] = {}
  states = list(named_states(opt_state))
  labels = [(name, state.labels) for name, state in states]
  for name, state in states:
    for quantity, value in global_numbers(state).items():
      out.setdefault(f"{name}/{quantity}", value)
    if state.labels.unit == "group" or (state.labels.unit == "leaf" and per_leaf):
      by = blocks_name(name, state.labels, labels)
      for quantity, vector in vectors_of(state).items():
        for i, label in enumerate(state.labels.block_names):
          out.setdefault(f"{by}/{quantity}/{label}", vector[..., i])
  return out


def blocks_name(name: str, labels: Labels, states: Iterable[tuple[str, Labels]]) -> str:
  """What numbers by block go by: `name`, unless a label is the name of a leaf, of other entries, in another state."""
  if labels.unit == "group":
    shared = [set(other.block_names) for base, other in states if base == name and other.unit == "leaf"]
    for label, block in zip(labels.block_names, labels.blocks, strict=True):
      if [labels.leaves[i] for i in block] != [label] and any(label in names for names in shared):
        return f"{name}_group"
  return name


def global_numbers(state: Any) -> dict[str, jax.Array]:
  """What a state says of all leaves together, by quantity."""
  if isinstance(state, SkipState):
    return {
      "norm": state.norm,
      "loss": state.loss,
      "max_norm": state.max_norm,
      "max_loss": state.max_loss,
      "fraction": _share(state.skipped_steps, state.steps),
      "consecutive": state.consecutive,
      "steps": state.steps,
    }
  if isinstance(state, WatchState):
    return {
      "norm": state.norm,
      "zero_fraction": state.zero_fraction,
      "param_norm": state.param_norm,
      "ratio": _ratio(state.norm, state.param_norm),
      "worst_norm": state.worst_norm,
      "worst_step": state.worst_step,
      "nonfinite_steps": state.nonfinite_steps,
      "steps": state.steps,
    }
  is_global = state.labels.unit == "global"
  return {
    "norm": state.norm,
    "norm_clipped": state.norm_clipped,
    "max_norm": state.max_norm if is_global else _least(state.max_norm, jnp.inf),
    "scale": state.scale if is_global else _least(state.scale, 1.0),
    "clip_fraction": _share(state.clipped_steps, state.steps),
    "clipped_steps": state.clipped_steps,
    "nonfinite_steps": state.nonfinite_steps,
    "steps": state.steps,
  }


def vectors_of(state: Any) -> dict[str, Any]:
  """What a state says of each group or leaf, by quantity, each of shape (..., n)."""
  if isinstance(state, ClipState) and state.labels.unit != "global":
    return {"norm": state.norms, "max_norm": state.max_norm, "scale": state.scale}
  if isinstance(state, WatchState) and not isinstance(state.norms, tuple):
    return {
      "norm": state.norms,
      "ratio": _ratio(state.norms, state.param_norms),
      "nonfinite": state.nonfinite,
      "worst_norm": state.worst_norms,
    }
  return {}


def _ratio(norm: Any, param_norm: Any) -> jax.Array:
  """A norm over that of the parameters, 0 where that is 0 or not known."""
  known = param_norm > 0
  return quotient(jnp.where(known, norm, 0), jnp.where(known, param_norm, 1))


def _least(x: jax.Array, initial: float) -> jax.Array:
  """The smallest along the last axis, NaN where one is: on CPU the minimum alone may drop it."""
  return jnp.where(jnp.isnan(x).any(axis=-1), jnp.sum(x, axis=-1), jnp.min(x, axis=-1, initial=initial))


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
  """A count over another, 0 where that is 0."""
  dtype = norm_dtype()
  return part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)


def raise_if_nonfinite(opt_state: Any) -> None:
  """Raises where the last step was not finite, and names the leaves: call it on the host, between steps.

  A clip by leaf or by group, or a `clipjax.watch`, names every leaf or group whose norm was inf or NaN; a global clip
  names the first leaf with a NaN, or without any, the first with an inf or an overflow. Of several, the one that names
  most speaks. Raises too where `skip_steps` has rejected `max_consecutive_skips` steps in a row. Waits for the step.

  Args:
    opt_state: as in `metrics`.

  Raises:
    FloatingPointError: if the last step of any clip or watch was not finite, or too many were rejected.
    TypeError: for a transformation in the place of its state, or inside jit.

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
  problems: dict[str, str] = {}
  for name, state in named_states(opt_state):
    if isinstance(state.steps, jax.core.Tracer):
      raise TypeError(
        "`opt_state` must be of arrays with values, got traced ones: call `raise_if_nonfinite` outside jit, with what "
        "the jitted step returns."
      )
    if isinstance(state, SkipState):
      # Without the wrapped state, which is large and not asked for.
      text = _skip_problem(name, jax.device_get(state._replace(inner_state=())))
    else:
      text = _problem(name, jax.device_get(state))
    if text and (name not in problems or state.labels.unit != "global"):
      problems[name] = text
  if problems:
    raise FloatingPointError(" ".join(problems.values()))


def _problem(name: str, state: Any) -> str:
  """One sentence or two on a clip or watch, of numpy arrays, whose last step was not finite; else an empty text."""
  if np.all(state.finite):
    return ""
  labels = state.labels
  if isinstance(state, WatchState) and labels.unit == "global":
    where = "somewhere"
  elif labels.unit == "global":
    first = [i for i in np.unique(state.nonfinite_leaf) if i >= 0]
    where = f"first in leaf {', '.join(repr(labels.leaves[i]) for i in first)}" if first else ""
  else:
    bad = ~np.isfinite(state.norms).reshape(-1, state.norms.shape[-1]).all(axis=0)
    names = [repr(label) for label, is_bad in zip(labels.block_names, bad, strict=True) if is_bad]
    where = f"in {labels.unit} {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
  norms = state.norm if np.ndim(state.norm) == 0 else state.norm[~state.finite].flat[0]
  return (
    f"step {np.max(state.steps)} of '{name}' was not finite: norm {float(norms):g}, "
    f"{where or _other_reason(state)}. "
    f"{np.max(state.nonfinite_steps)} of {np.max(state.steps)} steps were not finite: lower the learning rate, look at "
    'the batch, or pass on_nonfinite="zero" to drop such steps.'
  )


def _other_reason(state: Any) -> str:
  """What was not finite where no norm of a leaf or group was."""
  if isinstance(state, ClipState) and np.isnan(state.max_norm).any():
    return f"threshold {float(np.min(state.max_norm)):g}"
  return "above the largest number of its dtype"


def _skip_problem(name: str, state: Any) -> str:
  """One sentence on a `SkipState` of numpy arrays that has rejected too many steps in a row; else an empty text."""
  in_a_row = np.max(state.consecutive)
  if in_a_row < np.min(state.max_consecutive_skips):
    return ""
  return (
    f"the last {in_a_row} steps were all rejected by '{name}', the limit is {np.min(state.max_consecutive_skips)}: "
    f"norm {float(np.max(state.norm)):g} against {float(np.min(state.max_norm)):g}, loss "
    f"{float(np.max(state.loss)):g} against {float(np.min(state.max_loss)):g}: look at the data and at the loss, and "
    "resume from before."
  )


def named_states(opt_state: Any) -> Iterator[tuple[str, Any]]:
  """Every state of this package with the name that its metrics have, from the outside in, in the order of the chain.

  A clip and a watch may have one name: they are of the same updates.
  """
  _check_opt_state(opt_state)
  taken: set[tuple[bool, str]] = set()
  for path, state in found_states((), getattr(opt_state, "opt_state", opt_state)):
    is_watch = isinstance(state, WatchState)
    base = name = "_".join([state.labels.name, *_transform_labels(path)])
    copy = 1
    while (is_watch, name) in taken:
      copy += 1
      name = f"{base}_{copy}"
    taken.add((is_watch, name))
    yield name, jax.tree.map(unwrapped, state, is_leaf=is_wrapper)


def _check_opt_state(opt_state: Any) -> None:
  """Raises for a transformation in the place of its state, and for what is no tree of arrays at all."""
  tree = getattr(opt_state, "opt_state", opt_state)
  for part in jax.tree.leaves(tree, is_leaf=_is_transformation):
    if _is_transformation(part) or (part is tree and _is_plain(part)):
      raise TypeError(
        f"`opt_state` must be the state of an optimizer, got {describe(part)}: pass what `init` or `update` returned."
      )


def _is_plain(x: Any) -> bool:
  """Whether this is a text, a number or a function, none of which is a tree of arrays."""
  return isinstance(x, str | bytes | int | float | complex) or callable(x)


def _is_transformation(x: Any) -> bool:
  return isinstance(x, optax.GradientTransformation)


def found_states(prefix: tuple[Any, ...], tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
  """Every state of this package in a tree, with its path, in the order of `named_states`."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, _STATES))
  for path, state in paths:
    if isinstance(state, _STATES):
      yield (*prefix, *path), state
    if isinstance(state, SkipState):
      yield from found_states((*prefix, *path, jax.tree_util.GetAttrKey("inner_state")), state.inner_state)


def _transform_labels(path: tuple[Any, ...]) -> list[str]:
  """The labels of every `optax.multi_transform` on a path: the keys of its dict `inner_states`."""
  return [
    str(key.key)
    for field, key in itertools.pairwise(path)
    if getattr(field, "name", None) == "inner_states" and hasattr(key, "key")
  ]


def is_wrapper(x: Any) -> bool:
  """Whether this is an array in a Flax NNX variable, which is told by its method."""
  return callable(getattr(x, "get_value", None))


def unwrapped(x: Any) -> Any:
  """The array itself."""
  return x.get_value() if is_wrapper(x) else x
