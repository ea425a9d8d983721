"""Measures the verdict: trains small models under known conditions and judges them with `clipjax.runs.diagnose`.

Run `python benchmarks/verdicts.py [--half both] [--peers] [--out docs/verdicts.md]`. Each condition trains several
models and records them as a user would; the truth about a run is how it was made, see `verdicts_truth.py`. The limits
of the verdict were chosen on the half "tune"; the page reports the half "held-out", with other models, seeds and steps.
`--keep DIR` keeps the runs and `truth.json`; `--judge DIR` judges kept runs again without training. `--quick` runs
three conditions with one seed.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
import verdicts_page
from small_models import Array
from verdicts_conditions import HALVES, Condition, Draw, Made
from verdicts_healthy import HEALTHY
from verdicts_page import Result
from verdicts_peers import installed, outcome_of
from verdicts_sick import SICK
from verdicts_training import record
from verdicts_truth import Expected, Truth, course_of, departure, judge, read_truths, write_truths

import clipjax
from clipjax.runs import Run

CONDITIONS: dict[str, Condition] = {condition.name: condition for condition in (*HEALTHY, *SICK)}
QUICK = ("sgd", "stuck", "spike at 17")
TRUTHS = "truth.json"
USUAL = 30  # The usual value is the median over so many steps.
# Halves the compile time; small programs run as fast.
FLAGS = "--xla_llvm_disable_expensive_passes=true"


# Training -----------------------------------------------------------------------------------------------------------


def train(conditions: Iterable[Condition], half: str, folder: pathlib.Path, seeds: int) -> Iterator[Truth]:
  """Records the runs of a half, and yields the truth about each."""
  for condition in conditions:
    for draw in condition.draws(half)[:seeds]:
      start = time.perf_counter()
      made = condition.make(draw)
      named = truth_of(condition, draw, made)
      path = folder / named.file
      path.parent.mkdir(parents=True, exist_ok=True)
      path.unlink(missing_ok=True)
      record(made.training, path)
      truth = completed(named, made, clipjax.runs.read_run(path))
      write_truths([truth], folder / TRUTHS)
      _note(f"{truth.file}, {time.perf_counter() - start:.1f} s{'' if truth.is_so else ', is not what it should be'}")
      yield truth
    jax.clear_caches()  # The programs of 300 runs are more memory maps than Linux gives a process.


def truth_of(condition: Condition, draw: Draw, made: Made) -> Truth:
  """What is known before the training."""
  model, optimizer, *_ = draw.setting
  is_healthy = condition.is_healthy
  return Truth(
    draw.half, condition.name, model, optimizer, draw.seed, is_healthy, made.expected, made.also, made.course
  )


def completed(truth: Truth, made: Made, run: Run) -> Truth:
  """The truth with facts from the recorded loss: the step at which it diverged, and whether it did as planned."""
  name = made.training.loss
  if name not in run:
    return truth
  losses = run[name]
  if name in run.flags:
    losses = np.where(run.flags[name], np.inf, losses)
  expected = truth.expected
  if made.near and (left := departure(losses)) is not None:
    expected = diverged_at(run.steps, losses, left, made.near)
  return truth._replace(expected=expected, is_so=truth.course in ("", course_of(losses)))


def diverged_at(steps: Array, losses: Array, left: int, near: int) -> tuple[Expected, ...]:
  """The right answers for a run that diverged at an index and may have become NaN later."""
  expected = [Expected("diverged", (int(steps[left]),), near)]
  if not np.isfinite(losses).all():
    first = int(steps[np.argmin(np.isfinite(losses))])
    expected += [Expected(name, (first,)) for name in ("nonfinite-loss", "nonfinite")]
  return tuple(expected)


# Judging ------------------------------------------------------------------------------------------------------------


def judged(truths: Sequence[Truth], folder: pathlib.Path, peers: Iterable[str]) -> list[Result]:
  """Judges the runs with the verdict and the peers."""
  results = []
  with tempfile.TemporaryDirectory() as scratch:
    for truth in truths:
      run = clipjax.runs.read_run(folder / truth.file)
      report = clipjax.runs.diagnose(run)
      others = {name: outcome_of(name, run, truth, pathlib.Path(scratch)) for name in peers}
      results.append(Result(truth, judge(truth, report.findings), report.findings, others, seen_at(run, truth)))
  return results


def seen_at(run: Run, truth: Truth) -> dict[str, float]:
  """Each series at the first step to be named, as a multiple of its median over the steps before."""
  steps = [step for expected in truth.expected for step in expected.steps]
  if not steps or (place := int(np.searchsorted(run.steps, min(steps)))) >= len(run.steps) or place < 2:
    return {}
  out = {}
  for key in ("loss", "train/loss", "grad/norm", "update/norm"):
    if key in run:
      values = run[key][max(0, place - USUAL) : place + 1]
      usual = np.nanmedian(values[:-1]) if np.isfinite(values[:-1]).any() else np.nan
      if np.isfinite(values[-1]) and usual > 0:
        out[key] = float(values[-1] / usual)
  return out


def in_order(truths: Iterable[Truth]) -> list[Truth]:
  """The truths in the order of the conditions."""
  places = {name: i for i, name in enumerate(CONDITIONS)}
  return sorted(truths, key=lambda truth: (truth.half, places.get(truth.condition, len(places)), truth.seed))


# The command --------------------------------------------------------------------------------------------------------


def main() -> None:
  """Trains, judges, prints the page and writes it."""
  args = _arguments()
  os.environ.setdefault("XLA_FLAGS", FLAGS)
  halves = list(HALVES) if args.half == "both" else [args.half]
  versions = installed() if args.peers else {}
  if args.peers and not versions:
    _note("none of the peers is on the PATH, so they are left out")
  with tempfile.TemporaryDirectory() as scratch:
    folder = args.judge or args.keep or pathlib.Path(scratch) / "runs"
    if args.judge is None:
      _cache(pathlib.Path(scratch) / "compiled")
      _train_all(args, halves, folder)
    truths = [truth for truth in read_truths(folder / TRUTHS) if truth.half in halves and _is_asked(args, truth)]
    results = judged(in_order(truths), folder, versions)
  said = {name: condition.said for name, condition in CONDITIONS.items()}
  page = verdicts_page.render(results, said, versions, args.quick)
  print(page)
  if args.out is not None:
    args.out.write_text(page, encoding="utf-8")


def _train_all(args: argparse.Namespace, halves: Sequence[str], folder: pathlib.Path) -> None:
  conditions = [c for c in CONDITIONS.values() if _is_meant(args, c.name)]
  for half in halves:
    for _ in train(conditions, half, folder, seeds=1 if args.quick else 3):
      pass


def _is_meant(args: argparse.Namespace, name: str) -> bool:
  names = args.only or (QUICK if args.quick else ())
  return not names or name in names


def _is_asked(args: argparse.Namespace, truth: Truth) -> bool:
  return _is_meant(args, truth.condition)


def _cache(folder: pathlib.Path) -> None:
  """Keeps compiled programs for the next run."""
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _note(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--half", default="both", choices=(*HALVES, "both"))
  parser.add_argument("--only", nargs="+", choices=CONDITIONS, metavar="CONDITION", help="run only these conditions")
  parser.add_argument("--quick", action="store_true", help="three conditions, one seed")
  parser.add_argument("--peers", action="store_true", help="also ask the other run doctors that are on the PATH")
  parser.add_argument("--out", type=pathlib.Path, help="file for the page")
  where = parser.add_mutually_exclusive_group()
  where.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="keep the runs in DIR")
  where.add_argument("--judge", type=pathlib.Path, metavar="DIR", help="judge the runs kept in DIR")
  return parser.parse_args()


if __name__ == "__main__":
  main()
