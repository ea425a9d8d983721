"""Measures the seconds and the peak memory that `read_run` needs for a long run, also for another version.

Run `python benchmarks/reading.py [--rows 1000000] [--columns 20] [--rounds 3] [--against CHECKOUT]`. It writes a file
of rows like those of a watch and a clip, with numbers for 12 leaves in every 50th row, and reads it in separate
processes, in turn with the version in the folder CHECKOUT, such as a `git worktree` of 0.1.0. The file has format 1,
which both versions read. Memory is the growth of the process at its peak, over the size of the data. Then `tail` reads
the end of the file, and the run is judged, which should need no more memory than a few columns.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LEAVES, EVERY = 12, 50
COLUMNS = (
  "grad/norm", "loss", "grad/scale", "grad/max_norm", "grad/steps", "grad/clip_fraction", "grad/zero_fraction",
  "update/norm", "update/ratio", "grad/norm_clipped", "grad/clipped_steps", "grad/nonfinite_steps", "grad/worst_norm",
  "grad/worst_step", "update/steps", "update/worst_norm", "tokens", "learning_rate", "grad/param_norm", "accuracy",
)  # fmt: skip

READER = """
import json, resource, sys, time
import clipjax
read = clipjax.runs.read_run if hasattr(clipjax, "runs") else clipjax.read_run
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start, before = time.perf_counter(), peak()
run = read(sys.argv[1])
seconds, grown = time.perf_counter() - start, peak() - before
arrays = [run.steps, *run.columns.values(), *run.flags.values(), *(x for pair in run.vectors.values() for x in pair)]
print(json.dumps([len(run), seconds, grown, sum(x.nbytes for x in arrays)]))
"""

JUDGE = """
import sys, time, tracemalloc
import clipjax
from clipjax.runs.reading.read import tail
start = time.perf_counter()
last = tail(sys.argv[1], 64)
print(f"tail of 64 rows: {1e3 * (time.perf_counter() - start):.1f} ms, up to step {last.steps[-1]}")
run = clipjax.runs.read_run(sys.argv[1])
for call in (clipjax.runs.diagnose, clipjax.runs.suggest_max_norm):
  tracemalloc.start()
  start = time.perf_counter()
  call(run)
  seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  print(f"{call.__name__}: {seconds:.2f} s, at its peak {peak / run.steps.nbytes:.1f} columns")
"""


def lines(rows: int, columns: int) -> Iterator[str]:
  """The lines of the file."""
  leaves = {"grad": [f"layers/{i}/w" for i in range(LEAVES)]}
  yield json.dumps({"clipjax_run": 1, "version": "0.1.0", "started": 1.0, "leaves": leaves, "every": EVERY})
  rng = np.random.default_rng(0)
  for step in range(1, rows + 1):
    drawn = iter(float(f"{x:.9g}") for x in rng.lognormal(size=columns + 4 * LEAVES).astype(np.float32).tolist())
    row = {"step": step, "time": round(1.7e9 + 0.0123 * step, 6)}
    counts = ("steps", "tokens", "worst_step")
    row |= {key: step if key.endswith(counts) else next(drawn) for key in COLUMNS[:columns]}
    if step % EVERY == 1:
      quantities = ("norm", "ratio", "nonfinite", "worst_norm")
      row["leaf"] = {f"grad/{quantity}": [next(drawn) for _ in range(LEAVES)] for quantity in quantities}
    yield json.dumps(row)


def measured(code: str, path: Path, checkout: Path) -> str:
  """The output of a process that imports clipjax from a folder."""
  environment = {**os.environ, "PYTHONPATH": str(checkout)}
  command = [sys.executable, "-c", code, str(path)]
  return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=checkout).stdout


def main() -> None:
  """Prints the time and memory of both versions, and the ratio of the times."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=1_000_000)
  parser.add_argument("--columns", type=int, default=len(COLUMNS))
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--against", type=Path, help="folder of another version")
  args = parser.parse_args()
  here = Path(__file__).resolve().parent.parent
  versions = {"this version": here} | ({"the other one": args.against.resolve()} if args.against else {})
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "run.jsonl"
    with path.open("w") as file:
      file.writelines(line + "\n" for line in lines(args.rows, args.columns))
    print(f"{platform.machine()}, numpy {np.__version__}; {args.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
    results: dict[str, list[list[float]]] = {name: [] for name in versions}
    for _ in range(args.rounds):
      for name, checkout in versions.items():
        results[name].append(json.loads(measured(READER, path, checkout)))
    seconds = {name: statistics.median(result[1] for result in some) for name, some in results.items()}
    for name, some in results.items():
      grown, own = max(result[2] for result in some), some[0][3]
      print(f"{name}: {seconds[name]:.2f} s, {grown / 1e6:.0f} MB at its peak, {grown / own:.2f} of {own / 1e6:.0f} MB")
    if args.against:
      print(f"this version takes {seconds['this version'] / seconds['the other one']:.3f} of the time of the other one")
    print(measured(JUDGE, path, here), end="")


if __name__ == "__main__":
  main()
