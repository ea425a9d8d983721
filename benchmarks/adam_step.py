"""What a clip adds to a step of Adam: time and temporaries, clipjax beside Optax, in one process.

Run `python benchmarks/adam_step.py [--dtype float32] [--rounds 61]`. The variants take turns, round after round in an
order of chance, on the same gradients; times are medians, and the ratio is between what each clip adds to plain Adam.
"""

import argparse
import json
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax

TREES: dict[str, list[tuple[int, ...]]] = {
  # Embedding, 12 blocks of attention and MLP, and the output of a decoder with 30 million parameters.
  "transformer 30M": [(16384, 384)]
  + [(384, 1152), (384, 384), (384, 1536), (1536, 384), (384,), (384,)] * 12
  + [(384,)]
  + [(384, 6144)],
  "one leaf 16M": [(16 * 2**20,)],
  "1000 leaves of 64x64": [(64, 64)] * 1000,
}


def clips(max_norm: float) -> dict[str, optax.GradientTransformation]:
  """The variants by name; the first adds nothing."""
  return {
    "adam": optax.identity(),
    "optax": optax.clip_by_global_norm(max_norm),
    "clipjax": clipjax.clip_by_global_norm(max_norm),
    "clipjax, no state": clipjax.clip_by_global_norm(max_norm, track=False),
    "clipjax, by leaf": clipjax.clip_by_leaf_norm(max_norm),
  }


def measure(shapes: list[tuple[int, ...]], dtype: str, rounds: int) -> dict[str, dict[str, float]]:
  """Median step time, temporaries and compile time of every variant on one tree."""
  rng = np.random.default_rng(0)
  grads = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
  nbytes = sum(g.nbytes for g in grads)
  runs: dict[str, Any] = {}
  results: dict[str, dict[str, float]] = {}
  for name, clip in clips(1.0).items():
    tx = optax.chain(clip, optax.adam(1e-3))

    def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    params = [jnp.zeros_like(g) for g in grads]
    state = tx.init(params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads)
    start = time.perf_counter()
    compiled = lowered.compile()
    results[name] = {
      "compile_s": time.perf_counter() - start,
      "temporaries": compiled.memory_analysis().temp_size_in_bytes / nbytes,
    }
    runs[name] = (compiled, *jax.block_until_ready(compiled(params, state, grads)))
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    # In an order of chance: what runs after a variant finds the caches and the memory that it leaves.
    for name in rng.permutation(list(runs)):
      compiled, *carry = runs[name]
      start = time.perf_counter()
      after = jax.block_until_ready(compiled(*carry, grads))
      times[name].append(time.perf_counter() - start)
      runs[name] = (compiled, *after)
  for name, values in times.items():
    results[name]["step_ms"] = 1e3 * statistics.median(values)
    # The difference is taken within each round, in which the machine was in one state.
    results[name]["added_ms"] = 1e3 * statistics.median(a - b for a, b in zip(values, times["adam"], strict=True))
  return results


def main() -> None:
  """Prints a table for every tree, and the same as JSON."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rounds", type=int, default=61)
  args = parser.parse_args()
  print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}")
  everything = {}
  for tree, shapes in TREES.items():
    results = everything[tree] = measure(shapes, args.dtype, args.rounds)
    print(f"\n{tree}, {args.dtype}")
    print(f"{'variant':20}{'added / optax':>14}{'added ms':>10}{'step ms':>10}{'temp / grads':>14}{'compile s':>11}")
    for name, r in results.items():
      ratio = r["added_ms"] / results["optax"]["added_ms"]
      row = f"{name:20}{ratio:14.2f}{r['added_ms']:10.2f}{r['step_ms']:10.2f}"
      print(f"{row}{r['temporaries']:14.1%}{r['compile_s']:11.2f}")
  print("\n" + json.dumps(everything))


if __name__ == "__main__":
  main()
