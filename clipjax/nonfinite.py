"""The policy for a step with a nonfinite norm or a NaN threshold, shared by everything that clips.

"propagate" makes every leaf NaN: every factor is NaN, so scaling has already done it. "zero" makes every leaf 0.
"error" raises if values are known, and adds a check for `checkify` if they are traced.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from clipjax.stacks import Stack, by_leaf, over, slice_names
from clipjax.trees import Prepared


def is_bad(norm: jax.Array, limits: Sequence[jax.Array]) -> jax.Array:
  """Whether a step is nonfinite: its global norm is inf or NaN, or any limit is NaN. Shape (), bool."""
  bad = ~jnp.isfinite(norm)
  for limit in limits:
    bad = bad | jnp.isnan(limit).any()
  return bad


def number(policy: str, bad: jax.Array, x: jax.Array) -> jax.Array:
  """A number of the step under the policy: "zero" makes it 0 in a bad step."""
  return jnp.where(bad, 0, x) if policy == "zero" else x


def settle(policy: str, prepared: Prepared, scaled: Sequence[jax.Array], bad: jax.Array, norm: jax.Array) -> list[Any]:
  """The scaled leaves under the policy."""
  if policy == "error":
    _raise(prepared, bad, norm)
  return _zeroed(scaled, bad) if policy == "zero" else list(scaled)


@partial(jax.jit, inline=True)
def _zeroed(leaves: Sequence[jax.Array], bad: jax.Array) -> list[jax.Array]:
  return [jnp.where(bad, jnp.zeros((), y.dtype), y) for y in leaves]


def _raise(prepared: Prepared, bad: jax.Array, norm: jax.Array) -> None:
  # The gradient itself or, if its norm is finite, a limit that is NaN.
  text = "the gradient is not finite (norm {norm})"
  limit = "a limit is NaN, of a gradient with the norm {norm}: check the schedule, rule or parameters that give it."
  if isinstance(bad, jax.core.Tracer):
    where_to_look = ': see `on_nonfinite="error"` in the docstring of clipjax.clip_by_global_norm'
    checkify.check(~bad | jnp.isfinite(norm), text + where_to_look, norm=norm)
    checkify.check(~bad | ~jnp.isfinite(norm), limit, norm=norm)
  elif bool(bad):
    if math.isfinite(norm):
      raise FloatingPointError(limit.format(norm=float(norm)))
    # Look for the leaves only now: a finite step never pays for it.
    finite = list(map(_finite_slices, prepared.measured, by_leaf(prepared.stacks, len(prepared.measured))))
    slices = slice_names(prepared.names(), prepared.stacks)
    names = [
      name
      for name, is_finite in zip(slices, np.concatenate([np.zeros(0, bool), *finite]), strict=True)
      if not is_finite
    ]
    where = ", ".join(f"'{name}'" for name in names[:10]) + (", ..." if len(names) > 10 else "")
    raise FloatingPointError(
      text.format(norm=float(norm))
      + (f" in {where}" if names else "")
      + ': lower the learning rate, or pass on_nonfinite="zero" to drop such steps.'
    )


def _finite_slices(leaf: Any, stack: Stack | None) -> np.ndarray[Any, Any]:
  """Whether each slice of a leaf is finite, as far as this process can tell."""
  (axes,) = over([leaf], (stack,))
  finite = jnp.isfinite(leaf).all(axis=axes)
  # Other processes may hold some of the answers and not have called: give one answer for the whole leaf.
  if not finite.is_fully_addressable:
    finite = jnp.broadcast_to(jnp.asarray(bool(finite.all())), finite.shape)
  return np.asarray(finite).reshape(-1)
