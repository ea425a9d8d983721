"""Gradient clipping and gradient health for JAX and Optax.

Names are imported on first use, so that the command line answers without loading JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from clipjax import rules as rules
  from clipjax._health import HealthReport as HealthReport
  from clipjax._health import diagnose as diagnose
  from clipjax._health_findings import Finding as Finding
  from clipjax._health_findings import HealthLimits as HealthLimits
  from clipjax._record import Recorder as Recorder
  from clipjax._report import plot_norms as plot_norms
  from clipjax._report import write_report as write_report
  from clipjax._run import Run as Run
  from clipjax._run import read_run as read_run
  from clipjax._suggest import Suggestion as Suggestion
  from clipjax._suggest import suggest_max_norm as suggest_max_norm
  from clipjax.functional import clip_grad_norm as clip_grad_norm
  from clipjax.functional import clip_grad_value as clip_grad_value
  from clipjax.norms.tree import global_norm as global_norm
  from clipjax.norms.tree import leaf_norms as leaf_norms
  from clipjax.per_example import clip_grad_per_example as clip_grad_per_example
  from clipjax.state_metrics import metrics as metrics
  from clipjax.state_problems import raise_if_nonfinite as raise_if_nonfinite
  from clipjax.transforms.agc import adaptive_grad_clip as adaptive_grad_clip
  from clipjax.transforms.by_norm import clip_by_block_rms as clip_by_block_rms
  from clipjax.transforms.by_norm import clip_by_global_norm as clip_by_global_norm
  from clipjax.transforms.by_norm import clip_by_group_norm as clip_by_group_norm
  from clipjax.transforms.by_norm import clip_by_leaf_norm as clip_by_leaf_norm
  from clipjax.transforms.by_value import clip_by_value as clip_by_value
  from clipjax.transforms.published import adagc as adagc
  from clipjax.transforms.published import autoclip as autoclip
  from clipjax.transforms.published import zclip as zclip
  from clipjax.transforms.skip import SkipState as SkipState
  from clipjax.transforms.skip import skip_steps as skip_steps
  from clipjax.transforms.state import ClipState as ClipState
  from clipjax.transforms.watch import WatchState as WatchState
  from clipjax.transforms.watch import watch as watch

__version__ = "0.1.0"

_HOME = {
  "_health": ("HealthReport", "diagnose"),
  "_health_findings": ("Finding", "HealthLimits"),
  "_record": ("Recorder",),
  "_report": ("plot_norms", "write_report"),
  "_run": ("Run", "read_run"),
  "_suggest": ("Suggestion", "suggest_max_norm"),
  "functional": ("clip_grad_norm", "clip_grad_value"),
  "state_metrics": ("metrics",),
  "state_problems": ("raise_if_nonfinite",),
  "norms.tree": ("global_norm", "leaf_norms"),
  "per_example": ("clip_grad_per_example",),
  "transforms.agc": ("adaptive_grad_clip",),
  "transforms.by_norm": ("clip_by_block_rms", "clip_by_global_norm", "clip_by_group_norm", "clip_by_leaf_norm"),
  "transforms.by_value": ("clip_by_value",),
  "transforms.published": ("adagc", "autoclip", "zclip"),
  "transforms.skip": ("SkipState", "skip_steps"),
  "transforms.state": ("ClipState",),
  "transforms.watch": ("WatchState", "watch"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE_OF, "rules"])  # noqa: PLE0605  (a list, computed)


def __getattr__(name: str) -> Any:
  if name == "rules":
    return importlib.import_module("clipjax.rules")
  if name not in _MODULE_OF:
    raise AttributeError(f"module 'clipjax' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"clipjax.{_MODULE_OF[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return [*__all__, "__version__"]
