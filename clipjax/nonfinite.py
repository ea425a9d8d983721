"""The policy for a step whose norm, or threshold, is not finite: once for everything that clips.

"propagate" makes every leaf NaN: every factor is NaN, so the scaling has done it. "zero" makes every leaf 0. "error"
raises where values are known, and is a check for `checkify` where they are traced.
"""

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
  """Whether a step is not finite: its global norm is inf or NaN, or any limit NaN. Shape (), bool."""
  bad = ~jnp.isfinite(norm)
  for limit in limits:
    bad = bad | jnp.isnan(limit).any()
  return bad


def number(policy: str, bad: jax.Array, x: jax.Array) -> jax.Array:
  """A number of the step as the policy has it: under "zero" that of a bad step is 0."""
  return jnp.where(bad, 0, x) if policy == "zero" else x


def settle(policy: str, prepared: Prepared, scaled: Sequence[jax.Array], bad: jax.Array, norm: jax.Array) -> list[Any]:
  """The scaled leaves as the policy has them."""
  if policy == "error":
    _raise(prepared, bad, norm)
  return _zeroed(scaled, bad) if policy == "zero" else list(scaled)


@partial(jax.jit, inline=True)
def _zeroed(leaves: Sequence[jax.Array], bad: jax.Array) -> list[jax.Array]:
  return [jnp.where(bad, jnp.zeros((), y.dtype), y) for y in leaves]


def _raise(prepared: Prepared, bad: jax.Array, norm: jax.Array) -> None:
  text = "the gradient is not finite (norm {norm})"
  if isinstance(bad, jax.core.Tracer):
    checkify.check(~bad, text + ': see `on_nonfinite="error"` in the docstring of clipjax.clip_grad_norm', norm=norm)
  elif bool(bad):
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
  """For each slice of a leaf whether all of it is finite, as far as this process can tell."""
  (axes,) = over([leaf], (stack,))
  finite = jnp.isfinite(leaf).all(axis=axes)
  if not finite.is_fully_addressable:  # Of other processes, which may not have called: the answer for the whole leaf.
    finite = jnp.broadcast_to(jnp.asarray(bool(finite.all())), finite.shape)
  return np.asarray(finite).reshape(-1)
