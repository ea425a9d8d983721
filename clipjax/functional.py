"""Clipping that acts now: functions from gradients to clipped gradients, for eager use and inside jit.

Every Python check runs in the public function, before an inner `jit`, so an eager call costs one dispatch. Scaling
multiplies each leaf by a scalar, which XLA fuses into whatever reads the clipped gradient next.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from clipjax import checks, nonfinite
from clipjax.norms.derivatives import measure
from clipjax.norms.sums import NormSpec, norm_dtype
from clipjax.scaling import Limits, Spread, clamp, rescale
from clipjax.trees import check_real, prepare


def clip_grad_norm(
  grads: Any,
  max_norm: ArrayLike,
  ord: float | None = None,
  *,
  norm: ArrayLike | None = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
) -> tuple[Any, jax.Array]:
  """Scales gradients down to a global norm: `g * min(1, max_norm / (norm + eps))`.

  With `eps=0`, leaves keep their bits if `norm <= max_norm`, and 0 stays 0 for every `max_norm`, 0 included, with
  finite derivatives. `max_norm=inf` only measures. 16-bit leaves are multiplied in float32 and rounded once. If the
  norm is inf, NaN or above the largest number of its dtype, or `max_norm` is NaN, `on_nonfinite` decides. An empty tree
  has norm 0.

  Args:
    grads: pytree of floating or complex arrays of any shape; None and float0 leaves pass through.
    max_norm: number or scalar array >= 0, in the unit of the gradient; a traced negative one counts as 0.
    norm: the norm, if you already have it; None computes it. A negative one in an array counts as NaN.
    ord, eps, on_nonfinite, axis_name: see `clip_by_global_norm`.

  Returns:
    `(clipped, norm)`: the same structure, shapes and dtypes; the norm before the clip, shape (), float32 (float64
    when x64 is enabled).

  Raises:
    ValueError: if `norm` is a negative Python number; also as `clip_by_global_norm` does.
    TypeError: for an integer, bool or other leaf, with its path; also as `clip_by_global_norm` does.
    FloatingPointError: eagerly, with "error", for a nonfinite norm; it names the leaves.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> clipped, norm = clipjax.clip_grad_norm({"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}, max_norm=5.0)
    >>> print(norm, clipped["w"], clipped["b"])
    13.0 [1.1538461 1.5384616] [4.6153846]
    >>> same, norm = clipjax.clip_grad_norm({"w": jnp.array([3.0, 4.0])}, max_norm=5.0)
    >>> print(norm, same["w"])
    5.0 [3. 4.]

  References:
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063; algorithm 1.
  """
  p = checks.check_ord(ord, for_clip=True)
  max_norm = checks.check_threshold(max_norm, "max_norm")
  eps = checks.check_eps(eps)
  checks.check_policy(on_nonfinite)
  if norm is not None:
    remedy = "pass the norm of `grads`, or None to compute it"
    norm = _given_norm(checks.check_threshold(norm, "norm", remedy=remedy, allow_nan=True))
  prepared = prepare(grads, "grads", axis_name=axis_name if norm is None else ())
  spec = NormSpec(p, (tuple(range(len(prepared.measured))),), prepared.axes)
  limit, eps = checks.within_range(max_norm), checks.within_range(eps)
  clipped, total, bad = _clip(spec, prepared.measured, limit, norm, eps)
  return prepared.with_measured(nonfinite.settle(on_nonfinite, prepared, clipped, bad, total)), total


def clip_grad_value(grads: Any, max_value: ArrayLike) -> Any:
  """Clips every entry to `[-max_value, max_value]`.

  Entries within the interval keep their bits, inf becomes `max_value`, NaN stays NaN, and `max_value=0` gives zeros.
  The direction of the gradient changes; `clip_grad_norm` keeps it.

  Args:
    grads: pytree of floating arrays of any shape; None and float0 leaves pass through.
    max_value: number or scalar array >= 0; a traced negative one counts as 0. It is rounded to the leaf's dtype.

  Returns:
    The same structure, shapes and dtypes.

  Raises:
    ValueError: if `max_value` is a negative or NaN Python number, or an array that is not a scalar.
    TypeError: for a `max_value` of the wrong type; for a complex, integer, bool or other leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> print(clipjax.clip_grad_value(jnp.array([0.5, -3.0, jnp.inf]), 1.0))
    [ 0.5 -1.   1. ]
  """
  max_value = checks.check_threshold(max_value, "max_value")
  prepared = prepare(grads, "grads", axis_name=())
  check_real(prepared, "grads")
  return prepared.with_measured(clamp(prepared.measured, checks.within_range(max_value)))


def _given_norm(norm: Any) -> Any:
  """The norm; a host number above the range of norms becomes inf, without NumPy's warning."""
  within = checks.within_range(norm)
  return np.inf if not isinstance(norm, jax.Array) and norm > within else norm


@partial(jax.jit, static_argnums=0, inline=True)
def _clip(
  spec: NormSpec, leaves: Sequence[Any], max_norm: Any, norm: Any, eps: Any
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  dtype = norm_dtype()
  # Measure, unless the caller already has the norm.
  if norm is None:
    norm = measure(spec, leaves).norms[0]
  else:
    norm = jnp.asarray(norm).astype(dtype)
    norm = jnp.where(norm < 0, np.array(np.nan, dtype), norm)
  # Decide.
  limit = jnp.maximum(jnp.asarray(max_norm).astype(dtype), 0)
  bad = nonfinite.is_bad(norm, [limit])
  # Scale.
  return rescale(Spread((0,) * len(leaves)), leaves, [Limits.of(norm, limit, limit, bad, eps)]), norm, bad
