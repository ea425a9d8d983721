"""Synthetic runs for the tests of `diagnose` and `suggest_max_norm`: a healthy one, and ways to spoil it."""

import numpy as np

from clipjax.runs.run import Run

N = 400


def healthy(seed=0, n=N, **columns):
  """The columns of a run without a defect: falling loss and norm, a clip that acts in a tenth of the steps."""
  rng = np.random.default_rng(seed)
  steps = np.arange(1, n + 1)
  norm = np.exp(rng.normal(0, 0.15, n)) * (1 + 2 / np.sqrt(steps))
  limit = float(np.quantile(norm, 0.9))
  clipped = np.cumsum(norm > limit).astype(float)
  loss = 1 + 3 * np.exp(-steps / (n / 4)) * np.exp(rng.normal(0, 0.05, n))
  base = {
    "time": 1e9 + np.cumsum(rng.uniform(0.009, 0.011, n)),
    "loss": loss,
    "val_loss": np.where(steps % 10 == 0, loss * 1.05 * np.exp(rng.normal(0, 0.005, n)), np.nan),
    "tokens": np.full(n, 100.0),
    "grad/norm": norm,
    "grad/norm_clipped": np.minimum(norm, limit),
    "grad/max_norm": np.full(n, limit),
    "grad/scale": np.minimum(1, limit / norm),
    "grad/clip_fraction": clipped / steps,
    "grad/clipped_steps": clipped,
    "grad/nonfinite_steps": np.zeros(n),
    "grad/steps": steps.astype(float),
    "grad/zero_fraction": np.full(n, 0.1),
    "update/norm": norm * 1e-2,
    "update/ratio": 1e-3 * np.exp(rng.normal(0, 0.3, n)),
    "skip/norm": norm,
    "skip/fraction": np.zeros(n),
    "skip/consecutive": np.zeros(n),
    "skip/steps": steps.astype(float),
  }
  return base | columns


def run_of(columns, *, flags=None, leaves=None, vectors=None, parameters=1234, steps=None):
  n = len(next(iter(columns.values())))
  steps = np.arange(1, n + 1) if steps is None else np.asarray(steps)
  columns = {key: np.asarray(value, np.float64) for key, value in columns.items()}
  return Run("run.jsonl", steps, columns, flags or {}, leaves or {}, vectors or {}, None, parameters)


def layered(values, names=("in/w", "out/w"), key="grad/norm"):
  """Vectors of the rows 1, 11, 21, ...: `values` is what each leaf has there."""
  steps = np.arange(1, N + 1, 10)
  values = np.broadcast_to(np.asarray(values, np.float64), (len(steps), len(names)))
  return {"leaves": {key.split("/")[0]: names}, "vectors": {key: (steps, np.array(values))}}


def bad(report):
  return [f.name for f in report.findings if f.level != "INFO"]


def only(report, name):
  """The one finding of this name."""
  (finding,) = [f for f in report.findings if f.name == name]
  return finding


def with_spikes(at=(200, 300), height=30.0):
  columns = healthy()
  columns["grad/norm"][list(at)] = height
  return columns
