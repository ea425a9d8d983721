"""The clip of single entries.

It runs the engine with the norm of order inf as the measure, and a clamp as the scale stage.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipjax import nonfinite, scaling
from clipjax.checks import check_name, check_track
from clipjax.groups import Labels
from clipjax.norms.sums import Measured
from clipjax.rules.base import as_rule, keep_where, no_limit
from clipjax.scaling import Limits, Spread
from clipjax.transforms.engine import Clip, Decision, MaxNorm, asked, of_rule, spec_of_blocks, transformation
from clipjax.transforms.state import ClipState
from clipjax.trees import Prepared, check_real


def clip_by_value(
  max_value: MaxNorm, *, axis_name: Any = None, name: str = "grad", track: bool = True
) -> optax.GradientTransformationExtraArgs:
  """Clips every entry to `[-max_value, max_value]`, like `optax.clip`.

  Entries within the interval keep their bits, inf becomes `max_value`, and NaN stays NaN. The measured norm is the
  largest magnitude, the norm of order inf; `max_value` is its limit.

  Args:
    max_value: number or scalar array >= 0, schedule, or rule; it is rounded to each leaf's dtype.
    axis_name: see `clip_by_global_norm`; it affects only the measured norm, and so a rule.
    name, track: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`.

  Raises:
    ValueError: for a negative or NaN Python number, or `track=False` with a schedule or rule; in `update`, for leaves
      that `init` did not see.
    TypeError: in `update`, for a complex, integer or bool leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_value(1.0)
    >>> updates, state = tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)))
    >>> print(updates, clipjax.metrics(state)["grad/norm"])
    [ 0.5 -1. ] 3.0
  """
  label = partial(Labels.of, name=check_name(name), unit="entry")
  rule = as_rule(max_value, "max_value")
  check_track(track, "max_value", max_value)

  def decide(prepared: Prepared, measured: Measured, state: ClipState, params: Any) -> Decision:
    del params
    check_real(prepared, "updates")
    # Ask the rule about the largest magnitude; the scale stage needs only its limit.
    norm = measured.norms[0]
    limit, target, rule_state = asked(rule, norm, state.rule, norm)
    bad = nonfinite.is_bad(norm, [limit, target])
    # The state reports the factor of the largest entry, although entries are clamped one by one.
    whole = Limits(norm, limit, jnp.clip(target, 0, limit))
    fields = {
      "norm": norm,
      "norm_clipped": jnp.where(limit >= no_limit(limit.dtype), norm, jnp.minimum(norm, limit)),
      "max_norm": limit,
      "scale": scaling.scale_of(whole),
      "norms": state.norms,
      "clipped": norm > limit,
      "rule": keep_where(bad, state.rule, rule_state),
    }
    return Decision([whole], Spread(state.labels.block_of), bad, fields)

  return transformation(
    Clip(label, **of_rule(rule), spec=spec_of_blocks(math.inf), decide=decide, scale=_clamp, axis_name=axis_name), track
  )


def _clamp(spread: Spread, leaves: list[Any], limits: list[Limits]) -> list[jax.Array]:
  """Scales entry by entry: no factor can be NaN."""
  del spread
  clamped: list[jax.Array] = scaling.clamp(leaves, limits[0].limit)
  return clamped
