"""Compiles steps with a clip for TPUs and GPUs, without a TPU or a GPU.

Run `python benchmarks/accelerators.py [--target tpu pod gpu] [--only one tf many stack train] [--rounds 2] [--quick]
[--dtype float32 bfloat16] [--out docs/accelerators.md]`: it prints the results, and writes the page and, beside it,
the numbers as JSON. Cases that are not compiled keep their numbers in the JSON. `pip install -e ".[aot]"` installs the
compilers; a target without a compiler is left out. Each target runs in its own process, one after another.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import accelerators_page
from accelerators_targets import TARGETS, environment, missing, version

HERE = Path(__file__).parent
OUT = Path("docs/accelerators.md")
ROUNDS = 2
DTYPES = ("float32", "bfloat16")


def compile_cases(
  target: str,
  only: Sequence[str],
  dtypes: Sequence[str],
  *,
  quick: bool = False,
  rounds: int = 1,
  kept: str | None = None,
) -> Iterator[dict[str, Any]]:
  """Yields each case of a target when it is done, with where and when it was compiled.

  Raises:
    RuntimeError: if the process fails; the text is the end of its output.
  """
  asked = json.dumps({"only": list(only), "dtypes": list(dtypes), "quick": quick, "rounds": rounds, "kept": kept})
  command = [sys.executable, str(HERE / "accelerators_compile.py"), target, asked]
  env = environment(target)
  env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(HERE.parent)]))
  packages = ("jax", "jaxlib", "optax", *TARGETS[target].packages)
  about = {
    "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "quick": quick,
    "rounds": rounds,
  }
  with tempfile.TemporaryFile("w+") as errors:
    start = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
      assert process.stdout is not None
      for line in process.stdout:
        now = time.perf_counter()
        yield {**json.loads(line), **about, "seconds": now - start}
        start = now
    if process.returncode:
      errors.seek(0)
      raise RuntimeError(f"compiling for {TARGETS[target].title} failed:\n{errors.read()[-2000:].strip()}")


def rounded(value: Any) -> Any:
  """Rounds every float, which is in seconds, to three decimals."""
  if isinstance(value, float):
    return round(value, 3)
  if isinstance(value, dict):
    return {key: rounded(x) for key, x in value.items()}
  return [rounded(x) for x in value] if isinstance(value, list) else value


def merged(data: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
  """The data with a case, which replaces an older one with the same target, key and dtype."""

  def name(x: dict[str, Any]) -> tuple[str, str, str]:
    return x["target"], x["key"], x["dtype"]

  others = [x for x in data["cases"] if name(x) != name(case)]
  return {**data, "cases": accelerators_page.ordered([*others, rounded(case)])}


def write(data: dict[str, Any], out: Path) -> None:
  """Writes the numbers and the page."""
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
  out.write_text(accelerators_page.render(data), encoding="utf-8")


def main() -> int:
  """Compiles for each target with a compiler; writes after each case, so an interrupted run loses nothing."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="what to compile for")
  parser.add_argument("--only", nargs="+", choices=accelerators_page.ORDER, default=list(accelerators_page.ORDER),
                      help="cases to compile")  # fmt: skip
  parser.add_argument(
    "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of parameters and gradients"
  )
  parser.add_argument("--rounds", type=int, help=f"compilations per step (default: {ROUNDS}, or 1 with --quick)")
  parser.add_argument("--quick", action="store_true", help="fewer leaves")
  parser.add_argument("--out", type=Path, help=f"the page (default: {OUT}; a quick run writes nothing by default)")
  args = parser.parse_args()
  rounds = args.rounds or (1 if args.quick else ROUNDS)
  if rounds < 1:
    parser.error(f"--rounds must be at least 1, got {rounds}")
  out = args.out or (None if args.quick else OUT)
  data: dict[str, Any] = {"cases": []}
  if out and out.with_suffix(".json").exists():
    data = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
  failed = False
  for target in args.target:
    if reason := missing(target):
      print(reason, flush=True)
      continue
    try:
      for case in compile_cases(target, args.only, args.dtype, quick=args.quick, rounds=rounds):
        data = merged(data, case)
        text = "\n".join(accelerators_page.case_text(rounded(case)))
        print(f"{TARGETS[target].title}, {case['seconds']:.0f} s\n{text}", flush=True)
        if out:
          write(data, out)
    except RuntimeError as error:
      print(error, file=sys.stderr, flush=True)
      failed = True
  if data["cases"]:
    print("\n".join(accelerators_page.bound_section(data["cases"])))
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
