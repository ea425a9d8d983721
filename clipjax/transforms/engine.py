"""The one engine of clipping: prepare -> measure -> decide -> scale -> next state.

Prepare takes the updates apart and checks them. Measure reads them once, for the norm of each block: all leaves, a
group, or one leaf. Decide asks the rule for the limits, scale multiplies the leaves, and the next state keeps what was
measured. Clips differ only in how they measure, decide and scale: a `Clip`. The usual ways are below; `clip_by_value`
and AGC bring their own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from clipjax import checks, nonfinite
from clipjax.arithmetic import vector_norm
from clipjax.groups import Labels
from clipjax.mesh import axes_size, check_axis_name
from clipjax.norms.derivatives import measure_jit
from clipjax.norms.sums import Measured, NormSpec, norm_dtype, spec_of_slices
from clipjax.rules.base import Rule, StateCheck, as_rule, ask, keep_where
from clipjax.scaling import Limits, Spread, norm_after, rescale_jit, scale_of
from clipjax.stacks import by_leaf, slice_sizes, spread_out
from clipjax.transforms.state import ClipState, check_state, empty_state, next_state
from clipjax.trees import Prepared, prepare

MaxNorm: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike] | Rule


class Decision(NamedTuple):
  """The outcome of a step, before anything is scaled.

  Attributes:
    limits: one `Limits` for each block; if leaves have units, one for each leaf, in a shape that broadcasts against it;
      if leaves are stacked, one for all blocks.
    spread: which limits apply to which leaf.
    bad: shape (), bool: whether the step is nonfinite.
    fields: fields of the next state.
  """

  limits: list[Limits]
  spread: Spread
  bad: jax.Array
  fields: dict[str, Any]


class _Decide(Protocol):
  def __call__(self, prepared: Prepared, measured: Measured, state: ClipState, params: Any, /) -> Decision: ...


class Clip(NamedTuple):
  """What distinguishes one clip from another.

  Attributes:
    label: `(tree) -> Labels`, which leaves share a norm.
    init_rule: `(labels) -> state` of its rule.
    fit_rule: puts the rule's state into the right dtypes; raises for the state of another rule.
    spec: `(prepared, labels) -> NormSpec`, what to measure.
    decide: from the measured norms to limits and the fields of the next state.
    scale: `(spread, leaves, limits) -> leaves`.
    on_nonfinite: the policy.
    axis_name: the user's `axis_name`.
    stacked: the user's `stacked`.
  """

  label: Callable[[Any], Labels]
  init_rule: Callable[[Labels], Any]
  fit_rule: Callable[[ClipState], ClipState]
  spec: Callable[[Prepared, Labels], NormSpec]
  decide: _Decide
  scale: Callable[..., list[jax.Array]] = rescale_jit
  on_nonfinite: str = "propagate"
  axis_name: Any = None
  stacked: Any = None


def transformation(clip: Clip, track: bool) -> optax.GradientTransformationExtraArgs:
  """The transformation of a clip; with `track=False` it keeps no state."""
  check_axis_name(clip.axis_name)
  unlabelled = clip.label(())

  def init(params: optax.Params) -> ClipState:
    labels = clip.label(params)
    return empty_state(labels, clip.init_rule(labels))

  def update(
    updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, Any]:
    del extra_args
    # Check the state, or make a fresh one if none is kept.
    if track:
      now = clip.fit_rule(check_state(state, unlabelled, stacked=clip.stacked, updates=updates))
    else:
      now = init(updates)
    # Prepare: the leaves and their mesh axes, matched with the leaves that `init` saw.
    known, stacks = now.labels.leaves, now.labels.stacks
    prepared = prepare(updates, "updates", axis_name=clip.axis_name, known=known, stacks=stacks, params=params)
    # Measure: one read of each leaf.
    measured = measure_jit(clip.spec(prepared, now.labels), prepared.measured)
    # Decide: the rule gives a limit for each block.
    decision = clip.decide(prepared, measured, now, params)
    # Scale: each leaf by the factor of its block, or as the policy says for a nonfinite step.
    scaled = clip.scale(decision.spread, prepared.measured, decision.limits)
    settled = nonfinite.settle(clip.on_nonfinite, prepared, scaled, decision.bad, decision.fields["norm"])
    # Next state: the measured numbers, and the counters.
    if not track:
      return prepared.with_measured(settled), state
    fields = {"first_bad": measured.first_bad, **decision.fields}
    return prepared.with_measured(settled), next_state(now, bad=decision.bad, **fields)

  return optax.GradientTransformationExtraArgs(init if track else optax.init_empty_state, update)


def clip_by_rule(
  threshold: Any,
  argument: str,
  label: Callable[[Any], Labels],
  *,
  track: bool,
  eps: ArrayLike,
  on_nonfinite: str,
  axis_name: Any,
  stacked: Any = None,
  ord: float | None = None,
  rms: bool = False,
  or_else: str = "",
) -> optax.GradientTransformationExtraArgs:
  """The clip of norms to the limits of a rule; `rms` divides each norm by the root of its number of entries.

  `or_else` extends the remedy for an array of thresholds.
  """
  rule = as_rule(threshold, argument, or_else=or_else)
  p = checks.check_ord(ord, for_clip=True)
  checks.check_policy(on_nonfinite)
  eps = checks.check_eps(eps)

  def decide(prepared: Prepared, measured: Measured, state: ClipState, params: Any) -> Decision:
    del params
    # The norms that the rule sees, and the global norm, in the units of the limit.
    labels, is_global = state.labels, state.labels.is_whole
    block_norms, norms = measured.norms, measured.norms[0] if is_global else together(measured.vector, labels, p)
    global_norm = norms if is_global else vector_norm(norms, p)
    if rms:
      roots = _root_sizes(prepared, norms.dtype)  # Here each block is a slice.
      block_norms = () if labels.stacks else tuple(n / r for n, r in zip(block_norms, roots, strict=True))
      norms = norms / roots
    # Ask the rule, and decide what its limits mean for each block.
    limit, target, rule_state = asked(rule, norms, state.rule, global_norm)
    bad = nonfinite.is_bad(global_norm, [limit] if target is limit else [limit, target])
    spread = limit if is_global else jnp.broadcast_to(limit, norms.shape)
    whole = Limits.of(norms, spread, spread if target is limit else target, bad, eps)
    limits = [whole]
    if not labels.stacks and not is_global:
      limits = [Limits.of(n, _item(limit, b), _item(target, b), bad, eps) for b, n in enumerate(block_norms)]
    # What the state will report.
    after = norm_after(norms, whole)
    if rms:
      after = after * roots
    fields = {
      "norm": global_norm,
      "norm_clipped": nonfinite.number(on_nonfinite, bad, after if is_global else vector_norm(after, p)),
      "max_norm": jnp.broadcast_to(limit, norms.shape),
      "scale": nonfinite.number(on_nonfinite, bad, scale_of(whole)),
      "norms": state.norms if is_global else norms,
      "clipped": (whole.norm > limit).any(),
      "rule": keep_where(bad, state.rule, rule_state),
    }
    return Decision(limits, Spread(labels.block_of, labels.stacks), bad, fields)

  options = {"on_nonfinite": on_nonfinite, "axis_name": axis_name, "stacked": stacked}
  return transformation(Clip(label, **of_rule(rule), spec=spec_of_blocks(p), decide=decide, **options), track)


def of_rule(rule: Rule) -> dict[str, Any]:
  """How a clip makes and checks the state of its rule."""
  state_check = StateCheck(rule, "rule")
  return {
    "init_rule": lambda labels: rule.init(labels.shape, norm_dtype()),
    "fit_rule": lambda state: state._replace(rule=state_check.fitted(state.rule, state.labels.shape)),
  }


def spec_of_blocks(p: float) -> Callable[[Prepared, Labels], NormSpec]:
  """The spec with one norm for each block; with stacked leaves, for each slice."""

  def spec(prepared: Prepared, labels: Labels) -> NormSpec:
    if not labels.stacks:
      return NormSpec(p, labels.blocks, prepared.axes)
    return spec_of_slices(p, prepared.measured, prepared.axes, labels.stacks)

  return spec


def together(norms: jax.Array, labels: Labels, p: float) -> jax.Array:
  """The norms of all blocks; with stacked leaves, they are joined from the norms of slices."""
  if not labels.stacks or labels.unit == "leaf":
    return norms
  # Blocks of similar size form the rows of a matrix, padded with the norm 0 appended below.
  alike: dict[int, list[int]] = {}
  blocks = labels.blocks
  for b, block in enumerate(blocks):
    alike.setdefault(len(block).bit_length(), []).append(b)
  padded, found = jnp.concatenate([norms, jnp.zeros(1, norms.dtype)]), [norms[:0]]
  for some in alike.values():
    rows = np.full((len(some), max(len(blocks[b]) for b in some)), norms.size)
    for row, b in zip(rows, some, strict=True):
      row[: len(blocks[b])] = blocks[b]
    found.append(vector_norm(padded[rows], p))
  return jnp.concatenate(found)[np.argsort([b for some in alike.values() for b in some])]


def asked(rule: Rule, norms: jax.Array, state: Any, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
  """The rule's answer, with limits between 0 and `no_limit`; limit and target stay one array if they are one."""
  limit, target, new = ask(rule, norms, state, global_norm)
  # Not `jnp.maximum`, because NaN must stay: before JAX 0.9, XLA folds a constant `maximum(NaN, 0)` to 0.
  least = jnp.where(limit < 0, 0, limit)
  return least, least if target is limit else target, new


def _root_sizes(prepared: Prepared, dtype: Any) -> np.ndarray[Any, Any]:
  """The factors that turn the rms of each slice into its norm."""
  stacks = by_leaf(prepared.stacks, len(prepared.measured))
  pairs = zip(slice_sizes(prepared.measured, stacks), spread_out(prepared.axes, stacks), strict=True)
  return np.array([math.sqrt(max(size * axes_size(axes), 1)) for size, axes in pairs], dtype)


def _item(value: jax.Array, b: int) -> jax.Array:
  """The value for a block. A value for all blocks stays a scalar: slicing it for each leaf would compile slowly."""
  return value if value.ndim == 0 else value[b]
