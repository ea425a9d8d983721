"""The clip of single entries."""

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
  """Clips every entry to `[-max_value, max_value]`, as `optax.clip` does.

  Entries within the interval are bit-identical, inf becomes `max_value`, NaN stays NaN. The norm that is measured is
  the largest magnitude, the norm of order inf, of which `max_value` is the limit.

  Args:
    max_value: number or scalar array >= 0, schedule, or rule; it is rounded to each leaf's dtype.
    axis_name: as in `clip_by_global_norm`; for what is measured, and a rule.
    name: as in `clip_by_global_norm`.
    track: as in `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`.

  Raises:
    ValueError: for a negative or NaN Python number, `track=False` with a schedule or rule; in `update`, for leaves that
      `init` did not see.
    TypeError: in `update`, for a complex, integer or bool leaf, with its path.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_value(1.0)
    >>> updates, state = tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)))
    >>> print(updates, clipjax.metrics(state)["grad/norm"])
    [ 0.5 -1. ] 3.0
  """
  label = partial(Labels.of, name=check_name(name), unit="global")
  rule = as_rule(max_value, "max_value")
  check_track(track, "max_value", max_value)

  def decide(prepared: Prepared, measured: Measured, state: ClipState, params: Any) -> Decision:
    del params
    check_real(prepared, "updates")
    norm = measured.norms[0]
    limit, target, rule_state = asked(rule, norm, state.rule, norm)
    bad = nonfinite.is_bad(norm, [limit, target])
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
  """Entry by entry: there is no factor that could be NaN."""
  del spread
  clamped: list[jax.Array] = scaling.clamp(leaves, limits[0].limit)
  return clamped
