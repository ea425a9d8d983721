"""Times the steps of `accelerators.py` on one NVIDIA GPU: what does a clip cost?

It takes five minutes and needs only `pip install "jax[cuda12]" optax`. Run it from the root of the project:
`PYTHONPATH=. python benchmarks/gpu.py [--rounds 21] [--out gpu.json]`. It has three parts: what each clip adds to a
step of Adam; the share of the memory bandwidth that `clipjax.global_norm` reaches; and the error of the norm against
float64. `--quick` runs everything on small trees, also on a CPU, and measures nothing. No GPU has run it yet.
"""

import argparse
import datetime
import json
import math
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from accelerators_steps import DTYPES, Case, cases, clips, step_of
from speed_sections import DASH, ms, percent, table
from speed_trees import ITEMSIZE, NO_CLIP, OPTAX
from timing import Turn, interleave, summary, turn_of

import clipjax

ROUNDS, QUICK_ROUNDS = 21, 2
# Bytes per second by `device_kind`, from NVIDIA's data sheets: https://www.nvidia.com/en-us/data-center/h200/, /h100/
# and /a100/. HBM3 in the name of an H100 means the SXM module.
BANDWIDTH = {
  "NVIDIA H200": 4.8e12,
  "NVIDIA H100 80GB HBM3": 3.35e12,
  "NVIDIA A100-SXM4-80GB": 2.039e12,
  "NVIDIA A100-SXM4-40GB": 1.555e12,
}
SUM, NORM, LEAST = "jnp.sum", "clipjax.global_norm", "optax.tree.norm"
TOLERANCE = 1e-6  # Relative error of a norm against float64.


def trees(quick: bool) -> dict[str, Case]:
  """The trees of `accelerators.py` without tokens; one tiny tree in a quick run."""
  if quick:
    return {"many": Case("3 leaves of 8x8", {f"w{i}": (8, 8) for i in range(3)})}
  return {key: case for key, case in cases().items() if not case.trains}


def turn(run: Callable[[int], object], quick: bool) -> Turn:
  """A turn that queues several runs, as training does; its time is per run."""
  count = 2 if quick else 10
  take = turn_of(partial(run, count))
  return lambda: take() / count


# The steps ----------------------------------------------------------------------------------------------------------


class Steps:
  """Compiled steps of all clips on the same donated parameters and moments; each clip has its own state."""

  def __init__(self, case: Case, dtype: str):
    keys = jax.random.split(jax.random.key(0), len(case.shapes))
    draw = partial(jax.random.normal, dtype=dtype)
    self.grads = {name: draw(key, shape) for key, (name, shape) in zip(keys, case.shapes.items(), strict=True)}
    self.params = jax.tree.map(jnp.zeros_like, self.grads)
    self.adam = optax.adam(1e-3).init(self.params)
    self.clips = {name: clip.init(self.params) for name, clip in clips(case).items()}
    self.programs = {}
    for name, clip in clips(case).items():
      step = step_of(optax.chain(clip, optax.adam(1e-3)))
      state = (self.clips[name], self.adam)
      self.programs[name] = jax.jit(step, donate_argnums=(1, 2)).lower(self.grads, state, self.params).compile()

  def run(self, name: str, count: int) -> None:
    """Runs `count` steps and waits for the last one."""
    for _ in range(count):
      out = self.programs[name](self.grads, (self.clips[name], self.adam), self.params)
      self.params, (self.clips[name], self.adam) = out
    jax.block_until_ready(self.params)


def step_times(quick: bool, rounds: int) -> list[dict[str, Any]]:
  """Times of a step with each clip, by tree and dtype."""
  found = []
  for key, case in trees(quick).items():
    for dtype in DTYPES:
      steps = Steps(case, dtype)
      turns = {name: turn(partial(steps.run, name), quick) for name in steps.programs}
      times = summary(interleave(turns, rounds), NO_CLIP)
      size = sum(math.prod(shape) for shape in case.shapes.values()) * ITEMSIZE[dtype]
      common = {"key": key, "title": case.title, "dtype": dtype, "leaves": len(case.shapes), "gradient": size}
      found.append({**common, "variants": times})
  return found


def step_text(found: list[dict[str, Any]]) -> list[str]:
  """One row per tree, dtype and clip."""
  rows = []
  for case in found:
    v = case["variants"]
    for name, t in v.items():
      over = DASH if v[OPTAX]["added"] <= 0 or name == NO_CLIP else f"{t['added'] / v[OPTAX]['added']:.2f}"
      ratio = f"{t['median'] / v[NO_CLIP]['median']:.3f}"
      cells = (ms(t["median"]), ms(t["min"]), ratio, DASH if name == NO_CLIP else ms(t["added"]), over)
      rows.append((case["title"], case["dtype"], name, *cells))
  head = ("tree", "dtype", "clip", "step, ms", "fastest", "step / no clip", "added, ms", "added / Optax's")
  return ["A step of a clip and Adam, medians:", "", *table(head, rows, left=3)]


# The bandwidth ------------------------------------------------------------------------------------------------------


def norm_times(quick: bool, rounds: int) -> list[dict[str, Any]]:
  """Times of the norm of one leaf of 1 GB, of Optax's norm, and of a plain sum over the same bytes."""
  found = []
  for dtype in DTYPES:
    size = 10**5 if quick else 10**9
    x = jnp.ones(size // ITEMSIZE[dtype], dtype)
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
      SUM: lambda x: jnp.sum(x, dtype=jnp.float32),
      LEAST: lambda x: optax.tree.norm({"w": x}),
      NORM: lambda x: clipjax.global_norm({"w": x}),
    }
    turns = {name: turn(partial(calls, jax.jit(f).lower(x).compile(), x), quick) for name, f in functions.items()}
    found.append({"dtype": dtype, "bytes": x.nbytes, "variants": summary(interleave(turns, rounds))})
  return found


def calls(program: Callable[[jax.Array], jax.Array], x: jax.Array, count: int) -> None:
  """Makes `count` calls and waits for the last one."""
  for _ in range(count):
    out = program(x)
  jax.block_until_ready(out)


def norm_text(found: list[dict[str, Any]], kind: str) -> list[str]:
  """One row per dtype and function."""
  nominal, rows = BANDWIDTH.get(kind), []
  for case in found:
    for name, t in case["variants"].items():
      rate = case["bytes"] / t["median"]
      share = DASH if nominal is None else percent(rate / nominal)
      of_sum = percent(case["variants"][SUM]["median"] / t["median"])
      rows.append((name, case["dtype"], ms(t["median"]), f"{rate / 1e9:.0f}", share, of_sum))
  said = f"nominal {nominal / 1e12:g} TB/s" if nominal else "no nominal bandwidth known"
  head = ("function", "dtype", "ms", "GB/s", "of nominal", "of the sum")
  return [f"{found[0]['bytes']:,} bytes in one leaf, {kind}, {said}:", "", *table(head, rows, left=2)]


# The accuracy -------------------------------------------------------------------------------------------------------


def errors(quick: bool) -> list[dict[str, Any]]:
  """The relative error of the norm against float64."""
  found = []
  norm = jax.jit(lambda x: clipjax.global_norm({"w": x}))
  for count in (10**4, 10**5) if quick else (10**7, 10**8):
    entries = np.random.default_rng(0).standard_normal(count, np.float32)
    for magnitude in (1e-30, 1.0, 1e30):
      x = entries * np.float32(magnitude)
      # Dot products of float64 chunks: copies stay small, and 1e60 and 1e-60 are well within its range.
      chunks = (chunk.astype(np.float64) for chunk in np.array_split(x, max(1, count // 10**7)))
      want = math.sqrt(math.fsum(float(chunk @ chunk) for chunk in chunks))
      error = abs(float(norm(x)) - want) / want
      found.append({"entries": count, "magnitude": magnitude, "error": error, "holds": error <= TOLERANCE})
  return found


def error_text(found: list[dict[str, Any]]) -> list[str]:
  """One row per number of entries and magnitude."""
  rows = [
    (f"{x['entries']:,}", f"{x['magnitude']:g}", f"{x['error']:.1e}", "yes" if x["holds"] else "**no**") for x in found
  ]
  head = ("entries", "magnitude", "relative error", f"at most {TOLERANCE:g}")
  return ["`clipjax.global_norm` of float32 against float64:", "", *table(head, rows, left=0)]


def main() -> None:
  """Runs the three parts, and prints each when it is done."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, help=f"rounds each (default: {ROUNDS}, or {QUICK_ROUNDS} with --quick)")
  parser.add_argument("--quick", action="store_true", help="small trees, only to see that everything runs")
  parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
  args = parser.parse_args()
  rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
  if rounds < 1:
    parser.error(f"--rounds must be at least 1, got {rounds}")
  device = jax.devices()[0]
  if device.platform != "gpu" and not args.quick:
    parser.error(f'JAX must have a GPU, found {device.platform}: pip install "jax[cuda12]", or try --quick')
  data: dict[str, Any] = {
    "device": device.device_kind,
    "nominal_bandwidth": BANDWIDTH.get(device.device_kind),
    "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "rounds": rounds,
    "quick": args.quick,
  }
  versions = ", ".join(f"{package} {number}" for package, number in data["versions"].items())
  print(f"{device.device_kind}, {versions}, {rounds} rounds\n", flush=True)
  data["accuracy"] = errors(args.quick)
  print("\n".join(error_text(data["accuracy"])), flush=True)
  data["norm"] = norm_times(args.quick, rounds)
  print("\n".join(norm_text(data["norm"], device.device_kind)), flush=True)
  data["steps"] = step_times(args.quick, rounds)
  print("\n".join(step_text(data["steps"])), flush=True)
  if args.out:
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
