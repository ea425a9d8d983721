"""The verdict, measured: small models trained into known conditions, and what `clipjax.runs.diagnose` says of them.

Run `python benchmarks/verdicts.py [--half both] [--peers] [--out docs/verdicts.md]`. Each condition is trained on
several models and recorded as a user would; what is true of a run is how it was made, see `verdicts_truth.py`. The
limits of the verdict were chosen on the half "tune"; "held-out" has other models, other seeds and other steps, and is
what the page reports. `--keep DIR` keeps the runs, `--judge DIR` judges kept runs again, without training.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from verdicts_conditions import HALVES, Condition, Draw, Made
from verdicts_healthy import HEALTHY
from verdicts_sick import SICK
from verdicts_training import record
from verdicts_truth import Expected, Truth, course_of, departure, read_truths, write_truths

import clipjax
from clipjax.runs import Run

CONDITIONS = {condition.name: condition for condition in (*HEALTHY, *SICK)}
TRUTHS = "truth.json"


def train(conditions: Iterable[Condition], half: str, folder: pathlib.Path, seeds: int = 3) -> Iterator[Truth]:
  """Records the runs of a half, and says what is true of each."""
  for condition in conditions:
    for draw in condition.draws(half)[:seeds]:
      made = condition.make(draw)
      named = truth_of(condition, draw, made)
      path = folder / named.file
      path.parent.mkdir(parents=True, exist_ok=True)
      path.unlink(missing_ok=True)
      record(made.training, path)
      yield completed(named, made, clipjax.runs.read_run(path))


def truth_of(condition: Condition, draw: Draw, made: Made) -> Truth:
  """What is known before the training."""
  name, (model, optimizer, *_) = condition.name.replace(" ", "-").replace(",", "").replace("/", "-"), draw.setting
  return Truth(
    draw.half, name, model, optimizer, draw.seed, condition.is_healthy, made.expected, made.also, made.course
  )


def completed(truth: Truth, made: Made, run: Run) -> Truth:
  """With what the recorded loss says: at which step it left, and whether it did what the condition says."""
  if made.training.loss not in run:
    return truth
  losses = run[made.training.loss]
  losses = np.where(np.isnan(losses) & run.flags.get(made.training.loss, np.zeros(len(run), bool)), np.inf, losses)
  expected = truth.expected
  if made.near and (left := departure(losses)) is not None:
    expected = diverged_at(run.steps, losses, left, made.near)
  return truth._replace(expected=expected, is_so=truth.course in ("", course_of(losses)))


def diverged_at(steps: np.ndarray, losses: np.ndarray, left: int, near: int) -> tuple[Expected, ...]:
  """The right answers for a run that left at an index, and may have gone on to NaN."""
  expected = [Expected("diverged", (int(steps[left]),), near)]
  if not np.isfinite(losses).all():
    first = int(steps[np.argmin(np.isfinite(losses))])
    expected += [Expected(name, (first,)) for name in ("nonfinite-loss", "nonfinite")]
  return tuple(expected)


def main() -> None:
  os.environ.setdefault("XLA_FLAGS", "--xla_llvm_disable_expensive_passes=true")
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--half", default="both", choices=("tune", "held-out", "both"))
  parser.add_argument("--keep", type=pathlib.Path)
  parser.add_argument("--only", nargs="*")
  args = parser.parse_args()
  jax.config.update("jax_compilation_cache_dir", "/tmp/w/vb_cache2"); jax.config.update("jax_persistent_cache_min_compile_time_secs",0); jax.config.update("jax_persistent_cache_min_entry_size_bytes",-1)
  halves = list(HALVES) if args.half == "both" else [args.half]
  conds = [c for c in CONDITIONS.values() if not args.only or c.name in args.only]
  for half in halves:
    t = time.time()
    for truth in train(conds, half, args.keep):
      write_truths([truth], args.keep / TRUTHS)
      print(f"{time.time()-t:.1f}s", truth.file, truth.is_so, truth.expected[:1], flush=True)
      t = time.time()


if __name__ == "__main__":
  main()
