"""Shared by transformations that wrap others: checks of the wrapped ones and their states, and keeping a state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipjax.checks import describe
from clipjax.rules.base import in_dtype, same_structure


def check_transformation(tx: Any, argument: str, such_as: str = "optax.adam(1e-3)") -> None:
  """Raises for anything without `init` and `update`."""
  if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
    raise TypeError(f"`{argument}` must be an Optax transformation, got {describe(tx)}: pass one such as {such_as}.")


def kept_where(flag: jax.Array, old: Any, now: Any) -> Any:
  """The old state if `flag` is true, else the new one; the old one may have been stored in another width."""
  return jax.tree.map(lambda o, n: jnp.where(flag, in_dtype(o, jnp.asarray(n).dtype), n), old, now)


def check_inner_state(tx: optax.GradientTransformation, state: Any, field: str, tree: Any, error: Exception) -> None:
  """Raises, from the error of an update, if its state does not match what `init` returns."""
  wanted = jax.eval_shape(lambda: tx.init(tree))
  if not same_structure(state, wanted):
    raise ValueError(
      f"`state.{field}` must match what the wrapped `init` returns, {_outline(wanted)}, got {_outline(state)}: "
      "pass the state of this transformation, or call `init` again."
    ) from error


def _outline(state: Any) -> str:
  """The types of a state and the number of its arrays, such as "(TraceState, EmptyState) of 2 arrays"."""
  kinds = f"({', '.join(type(s).__name__ for s in state)})" if type(state) is tuple else type(state).__name__
  return f"{kinds} of {len(jax.tree.leaves(state))} arrays"
