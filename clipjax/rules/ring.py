"""The last norms, for a rule with a window. All are finite: a nonfinite step changes no state of a rule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax


class Ring(NamedTuple):
  """The last norms, for a rule with a window.

  Attributes:
    values: shape (window, *shape of the norms), in the order of writing, which wraps.
    next: int32, shape (): the row to write next.
    filled: int32, shape (): the rows written so far, at most `window`.
  """

  values: jax.Array
  next: jax.Array
  filled: jax.Array

  @classmethod
  def empty(cls, window: int, shape: tuple[int, ...], dtype: Any) -> "Ring":
    """A ring without norms."""
    return cls(jnp.zeros((window, *shape), dtype), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def push(self, norms: jax.Array) -> "Ring":
    """The ring with one more row; a full ring replaces its oldest row."""
    # The write position wraps, so a full ring overwrites its oldest row.
    window = self.values.shape[0]
    return Ring(
      lax.dynamic_update_index_in_dim(self.values, norms, self.next, 0),
      (self.next + 1) % window,
      jnp.minimum(self.filled + 1, window),
    )

  @property
  def holds(self) -> jax.Array:
    """Which entries hold a norm that counts, in the shape of `values`.

    A norm of 0 does not count: it would keep a leaf without a gradient so far clipped to 0.
    """
    rows = jnp.arange(self.values.shape[0], dtype=jnp.int32) < self.filled
    return rows.reshape(-1, *(1,) * (self.values.ndim - 1)) & (self.values != 0)

  @property
  def counted(self) -> jax.Array:
    """The number of norms that count, int32, in the shape of the norms."""
    return jnp.sum(self.holds, axis=0, dtype=jnp.int32)


export.register_namedtuple_serialization(Ring, serialized_name="clipjax.rules.Ring")
