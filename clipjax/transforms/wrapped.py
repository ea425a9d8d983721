"""What transformations around other transformations share: checking them and their states, and keeping a state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipjax.checks import describe
from clipjax.rules.base import in_dtype, same_structure


def check_transformation(tx: Any, argument: str, such_as: str = "optax.adam(1e-3)") -> None:
  """Raises for what has no `init` and `update`."""
  if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
    raise TypeError(f"`{argument}` must be an Optax transformation, got {describe(tx)}: pass one such as {such_as}.")


def kept_where(flag: jax.Array, old: Any, now: Any) -> Any:
  """A state as it was where `flag` is true; it may have been stored in another width."""
  return jax.tree.map(lambda o, n: jnp.where(flag, in_dtype(o, jnp.asarray(n).dtype), n), old, now)


def check_inner_state(tx: optax.GradientTransformation, state: Any, field: str, tree: Any, error: Exception) -> None:
  """Raises, from the error of an update, where the state that it was given is not what `init` gives."""
  wanted = jax.eval_shape(lambda: tx.init(tree))
  if not same_structure(state, wanted):
    raise ValueError(
      f"`state.{field}` must match what the wrapped `init` returns, {_outline(wanted)}, got {_outline(state)}: "
      "pass the state of this transformation, or call `init` again."
    ) from error


def _outline(state: Any) -> str:
  """The types of a state and the number of its arrays, as in "(TraceState, EmptyState) of 2 arrays"."""
  kinds = f"({', '.join(type(s).__name__ for s in state)})" if type(state) is tuple else type(state).__name__
  return f"{kinds} of {len(jax.tree.leaves(state))} arrays"
