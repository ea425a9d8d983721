"""Published adaptive methods, each a thin call around a rule.

Defaults come from the papers. If a paper and its reference code differ, the docstring says which one we follow.
"""

from typing import Any

import optax
from jax.typing import ArrayLike

from clipjax import rules
from clipjax.rules.base import as_rule
from clipjax.transforms.by_norm import clip_by_global_norm, clip_by_leaf_norm


def autoclip(
  percentile: float = 10.0,
  *,
  window: int = 1000,
  include_current: bool = True,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
) -> optax.GradientTransformationExtraArgs:
  """AutoClip: clips the global norm to a percentile of the norms so far, `clip_by_global_norm(rules.percentile(...))`.

  0, inf and NaN: see `clip_by_global_norm`; a nonfinite step does not enter the history. The paper keeps the norms of
  all steps, this keeps the last `window`. The paper's code divides by `norm + 1e-6`: pass `eps=1e-6` for that.

  Args:
    percentile: between 0 and 100; the lower, the more steps are clipped.
    window: how many of the last norms count, 4 bytes each, sorted at every step; the current one is among them only
      with `include_current`.
    include_current: whether the percentile includes the current norm.
    eps, on_nonfinite, axis_name, name: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if an argument has the wrong type, including a traced `window` under `optax.inject_hyperparams`.
    In `update`, as `clip_by_global_norm` does.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.autoclip(10.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 2.0, 4.0):
    ...   clipped, state = tx.update(jnp.array([g]), state)
    ...   print(clipped)
    [1.]
    [1.1]
    [1.2]

  References:
    Seetharaman et al., AutoClip: adaptive gradient clipping for source separation networks, 2020,
    https://arxiv.org/abs/2007.14469; algorithm 1.
  """
  rule = rules.percentile(percentile, window=window, include_current=include_current)
  return clip_by_global_norm(rule, eps=eps, on_nonfinite=on_nonfinite, axis_name=axis_name, name=name)


def zclip(
  z_thresh: float = 2.5,
  *,
  decay: float = 0.97,
  warmup_steps: int = 25,
  mode: str = "reciprocal",
  max_norm: float | None = None,
  record: str = "clipped",
  restart_after: int | None = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
) -> optax.GradientTransformationExtraArgs:
  """ZClip: clips spikes of the global norm by their z-score, `clip_by_global_norm(rules.zscore(...))`.

  0, inf and NaN: see `clip_by_global_norm`; a nonfinite step does not enter the statistics (in the authors' code one
  NaN disables the clip for good). If paper and code differ, this follows the code.

  Args:
    z_thresh: z-score above which a norm is a spike.
    decay: weight of the past in mean and variance.
    warmup_steps: finite steps that start the statistics; only `max_norm` clips during them.
    mode: the target of a spike: "reciprocal", "mean" or "max", see `rules.zscore`.
    max_norm: a cap on every norm, in the warm-up too; None for no cap. The statistics see norms before the cap.
    record: what enters the statistics for a spike: "clipped", "raw" or "none", see `rules.zscore`.
    restart_after: clipped steps in a row after which the statistics start again; None never restarts them. Without it,
      a lasting rise of the norm can lock the rule in.
    eps, on_nonfinite, axis_name, name: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if a number is neither a Python number nor a JAX array, or `warmup_steps` or `restart_after` is not a
      Python integer, a traced one under `optax.inject_hyperparams` included.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.zclip(warmup_steps=4)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (0.9, 1.1, 0.9, 1.1, 5.0):
    ...   clipped, state = tx.update(jnp.array([g]), state)
    >>> print(f"{clipped[0]:.4f}")
    1.0156

  References:
    Kumar et al., ZClip: adaptive spike mitigation for LLM pre-training, 2025, https://arxiv.org/abs/2504.02507.
  """
  rule = rules.zscore(
    z_thresh, decay=decay, warmup_steps=warmup_steps, mode=mode, record=record, restart_after=restart_after
  )
  if max_norm is not None:
    rule = rules.minimum(rule, as_rule(max_norm, "max_norm"))
  return clip_by_global_norm(rule, eps=eps, on_nonfinite=on_nonfinite, axis_name=axis_name, name=name)


def adagc(
  ratio: float = 1.04,
  *,
  decay: float = 0.99,
  warmup_steps: int = 100,
  max_norm: float = 1.0,
  stacked: Any = None,
  eps: ArrayLike = 0.0,
  on_nonfinite: str = "propagate",
  axis_name: Any = None,
  name: str = "grad",
) -> optax.GradientTransformationExtraArgs:
  """AdaGC: clips each leaf to a multiple of the EMA of its norm, `clip_by_leaf_norm(rules.ema_ratio(...))`.

  0, inf and NaN: see `clip_by_leaf_norm`; a nonfinite step does not enter the EMAs. A leaf whose norms were all 0
  follows the global rule until it has an EMA, a case that the paper leaves open.

  Args:
    ratio: how much larger than its EMA a leaf's norm may be.
    decay: weight of the past in the EMAs.
    warmup_steps: finite steps in which the global norm is clipped to `max_norm`.
    max_norm: the threshold of the warm-up.
    stacked: see `clip_by_leaf_norm`; each layer of a stack has its own EMA.
    eps, on_nonfinite, axis_name, name: see `clip_by_global_norm`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ClipState`.

  Raises:
    ValueError: if an argument is out of its range.
    TypeError: if a number is neither a Python number nor a JAX array, or `warmup_steps` is not a Python integer, a
      traced one under `optax.inject_hyperparams` included.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.adagc(1.5, warmup_steps=1, max_norm=10.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 4.0):
    ...   clipped, state = tx.update(jnp.array([g]), state)
    ...   print(clipped)
    [1.]
    [1.5]

  References:
    Wang et al., AdaGC: improving training stability for large language model pretraining, 2025,
    https://arxiv.org/abs/2502.11034; algorithm 1.
  """
  rule = rules.ema_ratio(ratio, decay=decay, warmup_steps=warmup_steps, max_norm=max_norm)
  return clip_by_leaf_norm(rule, stacked=stacked, eps=eps, on_nonfinite=on_nonfinite, axis_name=axis_name, name=name)
