"""Reading what the transformations of this package have measured, out of any optimizer state.

`metrics` gives device scalars and never waits for them, inside jit too; `check` reads them on the host. Both find
every clipjax state in any nesting: chain, masked, multi_transform, MultiSteps, inject_hyperparams, apply_if_finite,
`flax.nnx.Optimizer`, a train state that has an `opt_state`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._norms import norm_dtype
from clipjax._skip import SkipState
from clipjax._transforms import ClipState


def metrics(opt_state: Any, *, per_leaf: bool = False) -> dict[str, jax.Array]:
  """What every clip in an optimizer state has measured, as a flat dict of scalars: `{"grad/norm": ..., ...}`.

  The keys of a clip are `<name>/norm` (before the clip), `norm_clipped`, `max_norm` (the limit in force), `scale`
  (the factor applied; 1 where nothing was clipped), `clip_fraction` (clipped steps over all), `nonfinite_steps` and
  `steps`. A clip by group adds `norm/<label>`, `max_norm/<label>` and `scale/<label>`, a clip by leaf the same by leaf
  name with `per_leaf=True`; their plain `max_norm` and `scale` are the smallest ones. A second clip of one name is
  `<name>_2`, and one inside `optax.multi_transform` is `<name>_<label>`.

  Before the first step the norms are 0 and the scale is 1. A step that was not finite shows its norm as it was, inf
  or NaN. A state with `track=False` has nothing to show; a state without any clip gives an empty dict.

  Args:
    opt_state: the state of an optimizer, or an object that holds it as `opt_state`.
    per_leaf: whether to add the numbers of every leaf, one device operation each.

  Returns:
    A dict of arrays of shape () (with leading axes for a state under `vmap`), on the device.

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
    grad/nonfinite_steps 0
    grad/steps 1
  """
  out: dict[str, jax.Array] = {}
  for name, state in _states(opt_state):
    if isinstance(state, SkipState):
      out.update(_skip_metrics(name, state))
      continue
    out[f"{name}/norm"] = state.norm
    out[f"{name}/norm_clipped"] = state.norm_clipped
    is_global = state.labels.unit == "global"
    out[f"{name}/max_norm"] = state.max_norm if is_global else jnp.min(state.max_norm, axis=-1, initial=jnp.inf)
    out[f"{name}/scale"] = state.scale if is_global else jnp.min(state.scale, axis=-1, initial=1.0)
    out[f"{name}/clip_fraction"] = _share(state.clipped_steps, state.steps)
    out[f"{name}/nonfinite_steps"] = state.nonfinite_steps
    out[f"{name}/steps"] = state.steps
    if state.labels.unit == "group" or (state.labels.unit == "leaf" and per_leaf):
      for i, label in enumerate(state.labels.block_names):
        out[f"{name}/norm/{label}"] = state.norms[..., i]
        out[f"{name}/max_norm/{label}"] = state.max_norm[..., i]
        out[f"{name}/scale/{label}"] = state.scale[..., i]
  return out


def _skip_metrics(name: str, state: SkipState) -> dict[str, jax.Array]:
  return {
    f"{name}/norm": state.norm,
    f"{name}/loss": state.loss,
    f"{name}/max_norm": state.max_norm,
    f"{name}/max_loss": state.max_loss,
    f"{name}/fraction": _share(state.skipped_steps, state.steps),
    f"{name}/consecutive": state.consecutive,
    f"{name}/steps": state.steps,
  }


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
  """A count over another, 0 where that is 0."""
  dtype = norm_dtype()
  return part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)


def check(opt_state: Any) -> None:
  """Raises where the last step was not finite, and names the leaves: call it on the host, between steps.

  A clip by leaf or by group names every leaf or group whose norm was inf or NaN; a global clip names the first leaf
  with a NaN, or without any, the first with an inf or an overflow. Waits for the step to end.

  Args:
    opt_state: as in `metrics`.

  Raises:
    FloatingPointError: if the last step of any clip was not finite.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([1.0]), "b": jnp.array([jnp.nan])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> clipjax.check(state)
    Traceback (most recent call last):
    ...
    FloatingPointError: step 1 of 'grad' was not finite: norm nan, first in leaf 'b'. 1 of 1 steps were not finite: \
lower the learning rate, look at the batch, or pass on_nonfinite="zero" to drop such steps.
  """
  problems = []
  for name, state in _states(opt_state):
    if isinstance(state, SkipState):
      # Without the wrapped state, which is large and not asked for.
      problems.append(_skip_problem(name, jax.device_get(state._replace(inner_state=()))))
    else:
      problems.append(_problem(name, jax.device_get(state)))
  problems = [text for text in problems if text]
  if problems:
    raise FloatingPointError(" ".join(problems))


def _problem(name: str, state: Any) -> str:
  """One sentence or two on a `ClipState` of numpy arrays whose last step was not finite; else an empty text."""
  if np.all(state.finite):
    return ""
  labels = state.labels
  if labels.unit == "global":
    first = [i for i in np.unique(state.nonfinite_leaf) if i >= 0]
    where = f"first in leaf {', '.join(repr(labels.leaves[i]) for i in first)}" if first else ""
  else:
    bad = ~np.isfinite(state.norms).reshape(-1, state.norms.shape[-1]).all(axis=0)
    names = [repr(label) for label, is_bad in zip(labels.block_names, bad, strict=True) if is_bad]
    where = f"in {labels.unit} {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
  norms = state.norm if np.ndim(state.norm) == 0 else state.norm[~state.finite].flat[0]
  return (
    f"step {np.max(state.steps)} of '{name}' was not finite: norm {float(norms):g}, "
    f"{where or f'threshold {float(np.min(state.max_norm)):g}'}. "
    f"{np.max(state.nonfinite_steps)} of {np.max(state.steps)} steps were not finite: lower the learning rate, look at "
    'the batch, or pass on_nonfinite="zero" to drop such steps.'
  )


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


def _states(opt_state: Any) -> Iterator[tuple[str, Any]]:
  """Every state of this package with the name that its metrics have, from the outside in, in the order of the chain."""
  taken: set[str] = set()
  for path, state in _found((), getattr(opt_state, "opt_state", opt_state)):
    base = name = "_".join([state.labels.name, *_transform_labels(path)])
    copy = 1
    while name in taken:
      copy += 1
      name = f"{base}_{copy}"
    taken.add(name)
    yield name, jax.tree.map(_unwrapped, state, is_leaf=_is_wrapper)


def _found(prefix: tuple[Any, ...], tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
  """Every state of this package in a tree, with its path."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, ClipState | SkipState))
  for path, state in paths:
    if isinstance(state, ClipState | SkipState):
      yield (*prefix, *path), state
    if isinstance(state, SkipState):
      yield from _found((*prefix, *path), state.inner_state)


def _transform_labels(path: tuple[Any, ...]) -> list[str]:
  """The labels of every `optax.multi_transform` on a path: the keys of its dict `inner_states`."""
  return [
    str(key.key)
    for field, key in itertools.pairwise(path)
    if getattr(field, "name", None) == "inner_states" and hasattr(key, "key")
  ]


def _is_wrapper(x: Any) -> bool:
  """Whether this is an array in a Flax NNX variable, which is told by its method."""
  return callable(getattr(x, "get_value", None))


def _unwrapped(x: Any) -> Any:
  return x.get_value() if _is_wrapper(x) else x
