"""Measures what a clip does to the optimizer's step: runs two optimizers, one on the clipped gradient.

Both see the same parameters; one sees the gradient after the clip and makes the updates, the other sees it before the
clip and is only compared with the first. The comparison is between vectors: the ratio of their norms and the cosine
between them.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import export, lax

from clipjax.arithmetic import by_parts, direction, parts, quotient, vector_norm, widest
from clipjax.checks import check_name, check_state
from clipjax.groups import Labels, carries_labels
from clipjax.leaves import is_float0
from clipjax.mesh import all_reduce, check_axis_name
from clipjax.norms.derivatives import measure
from clipjax.norms.sums import Measured, NormSpec, end_to_end, norm_dtype, spec_of_slices, stack
from clipjax.rules.base import no_limit
from clipjax.transforms.inner import check_inner_state, check_transformation, kept_where
from clipjax.transforms.state import ClipState
from clipjax.trees import Prepared, prepare


@carries_labels
class EffectState(NamedTuple):
  """What a clip did to the last step; one fixed structure from `init` on.

  n is the number of leaves, and slices of stacked leaves. Numbers are float32, or float64 when x64 is enabled. At a
  step with a nonfinite gradient or a nonfinite update of either optimizer, ratios, cosines and shares are NaN.

  Attributes:
    grad_ratio: shape (): norm of the gradient after the clip over its norm before; 1 if both are 0.
    ratio: shape (): norm of the update over the norm of the update without the clip; 1 if both are 0, and the largest
      number of the dtype if only the latter is.
    cosine: shape (): cosine between the two updates, from -1 to 1; 1 if either is 0.
    ratios: shape (n,): the ratio for each leaf.
    cosines: shape (n,): the cosine for each leaf.
    shares: shape (n,): each leaf's part of the squared global norm of the gradient; they sum to 1, or are all 0.
    steps: int32, shape (): updates so far.
    nonfinite_steps: int32, shape (): updates with a nonfinite gradient.
    finite: bool, shape (): whether the last gradient was finite.
    inner_state: the state of `optax.chain(clip, optimizer)`.
    unclipped_state: the state of the optimizer that sees the unclipped gradient.
    labels: names of the leaves; static, no arrays.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> print(f"{float(state.ratio):.2f}", int(state.steps))
    0.20 1
  """

  grad_ratio: jax.Array
  ratio: jax.Array
  cosine: jax.Array
  ratios: jax.Array
  cosines: jax.Array
  shares: jax.Array
  steps: jax.Array
  nonfinite_steps: jax.Array
  finite: jax.Array
  inner_state: Any
  unclipped_state: Any
  labels: Labels


export.register_namedtuple_serialization(EffectState, serialized_name="clipjax.EffectState")


def clip_effect(
  clip: optax.GradientTransformation,
  optimizer: optax.GradientTransformation,
  *,
  stacked: Any = None,
  axis_name: Any = None,
  name: str = "effect",
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain(clip, optimizer)` that also measures what the clip does to the length and direction of the step.

  A clip acts on the gradient, but the step is what trains. Under SGD a clip shortens the step. Under Adam it may leave
  the step alone, lengthen it, or starve every leaf but one. To show which, a second state of the same optimizer sees
  the unclipped gradient at the same parameters, and the two updates are compared: the ratio of their norms and the
  cosine between them, globally and for each leaf. The updates equal those of the chain bit by bit, if run eagerly or
  with `update` compiled by itself. In a larger program XLA may fuse the two differently, and round a last bit
  differently.

  It costs a second optimizer state and a second optimizer pass. According to the compiler for a TPU, a step of Adam
  moves 1.6 times the bytes (docs/accelerators.md of the project). On a CPU, which writes out both updates before
  comparing them, the step takes five times as long (docs/speed.md). Use it for a few hundred steps to decide on a
  threshold, then go back to the chain, whose state is `state.inner_state`.

  A gradient with inf or NaN follows the policy of the clip; the second state is unchanged, and the ratio and the cosine
  are NaN. A gradient of 0 is an ordinary step. If neither update moves, the ratio and the cosine are 1. Derivatives go
  through the updates as in the chain; the numbers in the state have no derivatives.

  Extra arguments of `update`, such as `value=`, reach the clip and both optimizers. An optimizer that calls a `grad_fn`
  or `value_fn` calls it twice. An optimizer with its own parameters, such as `optax.contrib.schedule_free`, steps from
  the position of its second state, and the ratio compares positions rather than steps.

  Args:
    clip: the clip: any transformation of the gradient, from this package or from Optax.
    optimizer: the optimizer after it: any transformation, chains included.
    stacked: see `clip_by_leaf_norm`; each layer of a stack has its own numbers.
    axis_name: see `global_norm`; used only for the comparison, since the clip has its own.
    name: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with an `EffectState`. `clipjax.metrics` has `<name>/ratio` and
    `<name>/cosine` of the updates, `<name>/grad_ratio` of the gradient, and by leaf `<name>/ratio/<leaf>`,
    `<name>/cosine/<leaf>` and `<name>/share/<leaf>`, along with the numbers of the clip itself.

  Raises:
    TypeError: for anything that is not a transformation; in `update`, for an integer or bool leaf, with its path, and
      for another transformation's state.
    ValueError: in `init`, for an axis that a leaf does not have; in `update`, for another number of leaves or layers
      than `init` saw, and for inner states that do not belong to the clip and the optimizer. Most optimizers with
      weight decay also raise it if `params` is None.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> tx = clipjax.clip_effect(clipjax.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(1)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> for key in ("effect/ratio", "effect/cosine", "effect/ratio/w", "effect/share/w"):
    ...   print(f"{key} {clipjax.metrics(state, per_leaf=True)[key]:.4g}")
    effect/ratio 0.2
    effect/cosine 1
    effect/ratio/w 0.2
    effect/share/w 1
  """
  check_transformation(clip, "clip", "clipjax.clip_by_global_norm(1.0)")
  check_transformation(optimizer, "optimizer")
  check_axis_name(axis_name)
  label = partial(Labels.of, name=check_name(name), unit="leaf", stacked=stacked, axis_name=axis_name)
  unlabelled = label(())
  first, second = map(optax.with_extra_args_support, (clip, optimizer))
  chained = optax.chain(first, second)  # Its state is a pair, one for each.

  def init(params: optax.Params) -> EffectState:
    # Some states hold the parameters themselves: copy them, because no buffer may be donated twice.
    unclipped = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, second.init(params))
    return _empty_state(label(params), chained.init(params), unclipped)

  def update(
    updates: optax.Updates, state: EffectState, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, EffectState]:
    check_state(state, EffectState)
    state.labels.check_state(unlabelled, state.ratios, stacked=stacked, updates=updates, field="ratios")
    known, stacks = state.labels.leaves, state.labels.stacks
    prepared = partial(prepare, axis_name=axis_name, known=known, stacks=stacks)
    grads = prepared(updates, "updates", params=params)

    # The chain: its updates are the result.
    tree = updates if params is None else params
    try:
      of_clip, of_optimizer = state.inner_state
      clipped, of_clip = first.update(updates, of_clip, params, **extra_args)
      step, of_optimizer = second.update(clipped, of_optimizer, params, **extra_args)
    except Exception as error:
      check_inner_state(chained, state.inner_state, "inner_state", tree, error)
      raise
    # The same optimizer without the clip, at the same parameters. What is only compared gets no derivative: zero times
    # the slope of Adam's root at 0 would be NaN.
    still = partial(jax.tree.map, lambda x: x if is_float0(x) else lax.stop_gradient(x))
    try:
      plain, unclipped_state = second.update(still(updates), still(state.unclipped_state), still(params), **extra_args)
    except Exception as error:
      check_inner_state(second, state.unclipped_state, "unclipped_state", tree, error)
      raise

    # Measure the gradient, and compare the two updates.
    gradient = _measured(_spec(grads), still(grads.measured))
    a, b = (prepared(still(tree), "updates of optimizer") for tree in (step, plain))
    left = _left(of_clip, gradient, lambda: prepared(still(clipped), "updates of clip"))
    fields = _compared(_spec(a), gradient, left, a.measured, b.measured)
    bad = ~jnp.isfinite(gradient.norm)
    return step, EffectState(
      **fields,
      steps=optax.safe_increment(state.steps),
      nonfinite_steps=jnp.where(bad, optax.safe_increment(state.nonfinite_steps), state.nonfinite_steps),
      finite=~bad,
      inner_state=(of_clip, of_optimizer),
      unclipped_state=kept_where(bad, state.unclipped_state, unclipped_state),
      labels=state.labels,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _empty_state(labels: Labels, inner_state: Any, unclipped_state: Any) -> EffectState:
  dtype = norm_dtype()
  return EffectState(
    grad_ratio=jnp.ones((), dtype),
    ratio=jnp.ones((), dtype),
    cosine=jnp.ones((), dtype),
    ratios=jnp.ones(labels.shape, dtype),
    cosines=jnp.ones(labels.shape, dtype),
    shares=jnp.zeros(labels.shape, dtype),
    steps=jnp.zeros((), jnp.int32),
    nonfinite_steps=jnp.zeros((), jnp.int32),
    finite=jnp.ones((), jnp.bool_),
    inner_state=inner_state,
    unclipped_state=unclipped_state,
    labels=labels,
  )


def _left(of_clip: Any, gradient: "_Norms", clipped: Callable[[], Prepared]) -> jax.Array:
  """The norm of the gradient after the clip over its norm before the clip."""
  # A clip by the global norm keeps its factor in its state; any other clip needs a read of its result.
  if isinstance(of_clip, ClipState) and of_clip.labels.unit == "global":
    return lax.stop_gradient(of_clip.scale)
  after = clipped()
  return _ratio(_measured(_spec(after), after.measured).norm, gradient.norm)


class _Norms(NamedTuple):
  """Norms of a tree: of each leaf, in a shape that broadcasts against it; the same as a vector; the global norm."""

  leaves: tuple[jax.Array, ...]
  vector: jax.Array
  norm: jax.Array


def _spec(prepared: Prepared) -> NormSpec:
  """The spec with one norm for each leaf, or slice of a stacked leaf."""
  return spec_of_slices(2.0, prepared.measured, prepared.axes, prepared.stacks)


@partial(jax.jit, static_argnums=0, inline=True)
def _measured(spec: NormSpec, leaves: list[Any]) -> _Norms:
  found: Measured = measure(spec, leaves)
  return _Norms(found.norms, found.vector, vector_norm(found.vector, 2.0))


@partial(jax.jit, static_argnums=0, inline=True)
def _compared(
  spec: NormSpec, gradient: _Norms, left: jax.Array, clipped: list[Any], plain: list[Any]
) -> dict[str, jax.Array]:
  """The fields of the next state, from the gradient, the share `left` of its norm, and the two updates."""
  a, b = _measured(spec, clipped), _measured(spec, plain)
  # 0 if everything is finite, else NaN, which then spreads to every number of the step.
  poison = sum((n - n for n in (a.norm, b.norm)), start=gradient.norm - gradient.norm)

  # For a' and b' of length 1, the cosine is 1 - |a' - b'|^2 / 2, which keeps its digits if the two nearly coincide.
  # The gap between the two updates, each scaled to length 1, leaf by leaf.
  of_leaves = zip(clipped, a.leaves, plain, b.leaves, strict=True)
  gaps = [_unit(widest(x), m) - _unit(widest(y), n) for x, m, y, n in of_leaves]
  bends = jnp.where((a.vector > 0) & (b.vector > 0), _squares(spec, gaps), 0)
  # Globally: each leaf is an axis, along which its norms are the lengths of the two vectors.
  p, q = direction(a.vector, a.norm, 2.0), direction(b.vector, b.norm, 2.0)
  bend = jnp.where((a.norm > 0) & (b.norm > 0), jnp.sum((p - q) ** 2 + p * q * bends), 0)

  fields = {
    "grad_ratio": left,
    "ratio": _ratio(a.norm, b.norm),
    "cosine": jnp.maximum(1 - bend / 2, -1),
    "ratios": _ratio(a.vector, b.vector),
    "cosines": jnp.maximum(1 - bends / 2, -1),
    "shares": direction(gradient.vector, gradient.norm, 2.0) ** 2,
  }
  return {key: value + poison for key, value in fields.items()}


def _unit(x: jax.Array, norm: jax.Array) -> jax.Array:
  """A leaf over its norm; 0 for norm 0. It multiplies: dividing every entry would take longer than all the rest."""
  n = norm.astype(x.real.dtype)
  # A power of two moves the norm into the range where its reciprocal is a normal number.
  shift = jnp.where(n > 2.0**64, 2.0**-64, jnp.where(n < 2.0**-64, 2.0**64, 1)).astype(n.dtype)
  scaled = n * shift
  inverse = jnp.where(scaled > 0, 1 / jnp.where(scaled > 0, scaled, 1), 0)
  return by_parts(lambda part: part * shift * inverse, x)


def _squares(spec: NormSpec, leaves: list[Any]) -> jax.Array:
  """The sum of squares of each leaf or slice, for numbers far from the ends of their range."""
  over = spec.over or (None,) * len(leaves)
  squares = [reduce(lax.add, (y * y for y in parts(x))) for x in leaves]
  sums = [jnp.sum(x, o, keepdims=o is not None) for x, o in zip(squares, over, strict=True)]
  found = all_reduce(sums, spec.axes)
  return end_to_end(found, norm_dtype()) if spec.over else stack(found, norm_dtype())


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  """One norm over another: 1 if both are 0, the largest number if only the other is."""
  known = b > 0
  most = no_limit(a.dtype)
  return jnp.where(known, jnp.minimum(quotient(a, jnp.where(known, b, 1)), most), jnp.where(a > 0, most, 1))
