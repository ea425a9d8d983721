"""Measures whether clipjax is as fast as memory allows, in one run with Optax, torch and TensorFlow.

Run `python benchmarks/speed.py [--only norm adam] [--rounds 41] [--quick] [--peers jax torch] [--out docs/speed.md]`:
it prints each table when it is done, and writes the page, with the numbers as JSON and the picture beside it. Sections
that are not run keep their numbers in the JSON. `timing.py` and the end of the page say how it measures.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import speed_page
from speed_peers import FRAMEWORKS, Plan
from speed_picture import picture
from speed_trees import memory

# The module of each section, imported when the section runs: not every machine has what all of them need.
HOMES = {
  "norm": ("speed_gradients", "norm"),
  "clip": ("speed_gradients", "clip"),
  "adam": ("speed_adam", "adam"),
  "stacked": ("speed_adam", "stacked"),
  "compile": ("speed_adam", "compile_time"),
  "train": ("speed_training", "train"),
  "eager": ("speed_gradients", "eager"),
  "vmap": ("speed_training", "vmap"),
  "per_example": ("speed_gradients", "per_example"),
  "growth": ("speed_adam", "growth"),
  "effect": ("speed_effect", "effect"),
}
ROUNDS, QUICK_ROUNDS = 41, 2
OUT = Path("docs/speed.md")
PACKAGES = {
  "jax": ("jax",),
  "jaxlib": ("jaxlib",),
  "optax": ("optax",),
  "torch": ("torch",),
  "tensorflow": ("tensorflow", "tensorflow-cpu"),
}


def run_section(name: str, rounds: int, quick: bool, peers: tuple[str, ...]) -> dict[str, Any]:
  """Runs a section; returns what the JSON keeps: its numbers, and how and where they were made."""
  module, function = HOMES[name]
  plan = Plan(rounds, quick, peers, [])
  start = time.perf_counter()
  cases = getattr(importlib.import_module(module), function)(plan)
  seconds = time.perf_counter() - start
  options = f" --only {name}" + " --quick" * quick
  options += f" --rounds {rounds}" if rounds != (QUICK_ROUNDS if quick else ROUNDS) else ""
  options += "" if len(peers) == len(FRAMEWORKS) else f" --peers {' '.join(['jax', *peers])}"
  return {
    "command": f"python benchmarks/speed.py{options}",
    "machine": machine(),
    "versions": versions(),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "seconds": seconds,
    "rounds": rounds,
    "quick": quick,
    "notes": plan.notes,
    "cases": cases,
  }


def machine() -> str:
  """The processor, its cores, the memory, the system and JAX's device."""
  import jax  # noqa: PLC0415  (`main` sets the environment that it reads)

  device = jax.devices()[0]
  parts = [f"{os.cpu_count()} cores of {processor()}"]
  if memory():
    parts.append(f"{memory() / 1e9:.0f} GB")
  kind = device.device_kind if device.device_kind == device.platform else f"{device.platform} {device.device_kind}"
  return ", ".join([*parts, system(), f"device {kind}"])


def processor() -> str:
  """The processor's model name if /proc/cpuinfo has one, else the architecture."""
  try:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    lines = []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names and names[0] != "unknown" else platform.machine()


def system() -> str:
  """The name of the distribution, else of the system."""
  try:
    return platform.freedesktop_os_release()["PRETTY_NAME"]
  except (OSError, KeyError):
    return f"{platform.system()} {platform.release()}"


def versions() -> dict[str, str]:
  """The versions of Python and of the installed packages."""
  found = {"python": platform.python_version()}
  for name, candidates in PACKAGES.items():
    for package in candidates:
      try:
        found[name] = importlib.metadata.version(package)
        break
      except importlib.metadata.PackageNotFoundError:
        continue
  return found


def rounded(value: Any) -> Any:
  """Rounds every float to six digits: clocks are no more precise."""
  if isinstance(value, float):
    return float(f"{value:.6g}")
  if isinstance(value, dict):
    return {key: rounded(x) for key, x in value.items()}
  return [rounded(x) for x in value] if isinstance(value, list) else value


def write(data: dict[str, Any], out: Path) -> None:
  """Writes the numbers, the page, and the picture if the growth was measured."""
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
  out.write_text(speed_page.render(data, out.with_suffix(".png").name), encoding="utf-8")
  if "growth" in data["sections"]:
    picture(data["sections"]["growth"]).savefig(out.with_suffix(".png"), dpi=130)


def main() -> None:
  """Runs the sections; writes after each, so an interrupted run loses nothing."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", nargs="+", choices=list(HOMES), default=list(HOMES), metavar="SECTION",
                      help="sections to run: " + ", ".join(HOMES))  # fmt: skip
  parser.add_argument("--rounds", type=int, help=f"rounds each (default: {ROUNDS}, or {QUICK_ROUNDS} with --quick)")
  parser.add_argument("--quick", action="store_true", help="small trees, only to see that everything runs")
  parser.add_argument("--peers", nargs="+", choices=["jax", *FRAMEWORKS], default=["jax", *FRAMEWORKS],
                      help="frameworks to compare with; jax always takes part")  # fmt: skip
  parser.add_argument("--out", type=Path, help=f"the page (default: {OUT}; a quick run writes nothing by default)")
  args = parser.parse_args()
  rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
  if rounds < 1:
    parser.error(f"--rounds must be at least 1, got {rounds}")
  out = args.out or (None if args.quick else OUT)
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Leaves room for the other frameworks on a GPU.
  data: dict[str, Any] = {"sections": {}}
  if out and out.with_suffix(".json").exists():
    data = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
  peers = tuple(name for name in FRAMEWORKS if name in args.peers)
  for name in args.only:
    section = rounded(run_section(name, rounds, args.quick, peers))
    data["sections"] = {key: value for key in HOMES if (value := {**data["sections"], name: section}.get(key))}
    print(f"{speed_page.section_text(name, section)}\n{name}: {section['seconds']:.0f} s\n", flush=True)
    if out:
      write(data, out)
  print("\n".join(speed_page.target_section(data)))


if __name__ == "__main__":
  main()
