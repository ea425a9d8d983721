"""Gradient clipping and gradient health for JAX and Optax.

This module exports the clips. `clipjax.runs` records, judges and draws a training run; it loads on first use.
"""

from typing import TYPE_CHECKING, Any

from clipjax import rules as rules
from clipjax.functional import clip_grad_norm as clip_grad_norm
from clipjax.functional import clip_grad_value as clip_grad_value
from clipjax.norms.tree import global_norm as global_norm
from clipjax.norms.tree import leaf_norms as leaf_norms
from clipjax.per_example import clip_grad_per_example as clip_grad_per_example
from clipjax.state_errors import raise_if_nonfinite as raise_if_nonfinite
from clipjax.state_metrics import metrics as metrics
from clipjax.transforms.agc import adaptive_grad_clip as adaptive_grad_clip
from clipjax.transforms.by_norm import clip_by_block_rms as clip_by_block_rms
from clipjax.transforms.by_norm import clip_by_global_norm as clip_by_global_norm
from clipjax.transforms.by_norm import clip_by_group_norm as clip_by_group_norm
from clipjax.transforms.by_norm import clip_by_leaf_norm as clip_by_leaf_norm
from clipjax.transforms.by_value import clip_by_value as clip_by_value
from clipjax.transforms.effect import EffectState as EffectState
from clipjax.transforms.effect import clip_effect as clip_effect
from clipjax.transforms.published import adagc as adagc
from clipjax.transforms.published import autoclip as autoclip
from clipjax.transforms.published import zclip as zclip
from clipjax.transforms.skip import SkipState as SkipState
from clipjax.transforms.skip import skip_steps as skip_steps
from clipjax.transforms.state import ClipState as ClipState
from clipjax.transforms.watch import WatchState as WatchState
from clipjax.transforms.watch import watch as watch

if TYPE_CHECKING:
  from clipjax import runs as runs

__version__ = "0.2.0"
__all__ = [
  "ClipState",
  "EffectState",
  "SkipState",
  "WatchState",
  "adagc",
  "adaptive_grad_clip",
  "autoclip",
  "clip_by_block_rms",
  "clip_by_global_norm",
  "clip_by_group_norm",
  "clip_by_leaf_norm",
  "clip_by_value",
  "clip_effect",
  "clip_grad_norm",
  "clip_grad_per_example",
  "clip_grad_value",
  "global_norm",
  "leaf_norms",
  "metrics",
  "raise_if_nonfinite",
  "rules",
  "runs",
  "skip_steps",
  "watch",
  "zclip",
]


def __getattr__(name: str) -> Any:
  if name == "runs":
    import clipjax.runs  # noqa: PLC0415  (its import sets the attribute)

    return clipjax.runs
  raise AttributeError(f"module 'clipjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, "__version__"]
