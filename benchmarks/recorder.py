"""What `Recorder.push` adds to a training step: the demo's network with and without it, and the push by itself.

Run `python benchmarks/recorder.py [--rounds 40] [--steps 50]`. The two loops take turns, round after round; a round is
so many steps and the wait for the last one, and the share is the median over rounds of one loop's time over the
other's. The processor time is what counts where other processes disturb the wall time. Then the host time of one push,
for optimizer states of 3 to 1000 leaves.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import clipjax
from clipjax import _demo

Clocks = tuple[float, float]  # Seconds on the wall, and of all cores together.


def watched(max_norm: jax.Array) -> optax.GradientTransformationExtraArgs:
  """The demo's optimizer with a watch before its clip, so that there are numbers by leaf to record."""
  return optax.chain(clipjax.watch(history=16), _demo.optimizer(max_norm))


def demo_loop(folder: Path, steps: int) -> dict[str, Callable[[], Clocks]]:
  """Seconds of so many steps of the demo, by whether they are recorded."""
  key_params, key = jax.random.split(jax.random.key(0))
  text = jnp.asarray(_demo.read_text())
  max_norm = jnp.float32(1.0)

  def step(params: Any, state: Any, number: Any) -> Any:
    starts = jax.random.randint(jax.random.fold_in(key, number), (_demo.BATCH, 1), 0, text.size - _demo.LENGTH)
    windows = text[starts + jnp.arange(_demo.LENGTH + 1)[None, :]].astype(jnp.int32)
    loss, grads = jax.value_and_grad(_demo.loss_fn)(params, windows)
    updates, state = watched(max_norm).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  compiled = jax.jit(step, donate_argnums=(0, 1))

  def loop(recorder: clipjax.Recorder | None) -> Callable[[], Clocks]:
    carry: list[Any] = [_demo.init_params(key_params)]
    carry.append(watched(max_norm).init(carry[0]))
    done = 0

    def seconds() -> Clocks:
      nonlocal carry, done
      start = time.perf_counter(), time.process_time()
      for _ in range(steps):
        done += 1
        params, state, loss = compiled(*carry, jnp.int32(done))
        if recorder is not None:
          recorder.push(done, state, loss=loss)
        carry = [params, state]
      jax.block_until_ready(carry)
      return time.perf_counter() - start[0], time.process_time() - start[1]

    return seconds

  return {"alone": loop(None), "recorded": loop(clipjax.Recorder(folder / "run.jsonl"))}


def push_time(folder: Path, leaves: int, pushes: int) -> tuple[float, float]:
  """Median and mean microseconds that a push takes on the host, the reads of every 50th among them."""
  params = {f"layer {i}": jnp.ones((4, 4)) for i in range(leaves)}
  tx = optax.chain(clipjax.watch(history=16), clipjax.clip_by_global_norm(1.0), optax.adam(1e-3))
  state = jax.jit(tx.update)(params, tx.init(params), params)[1]
  loss = jnp.float32(1)
  times = []
  with clipjax.Recorder(folder / f"{leaves}.jsonl") as recorder:
    recorder.push(0, state, loss=loss)
    for step in range(pushes):
      jax.block_until_ready(state)
      start = time.perf_counter()
      recorder.push(step, state, loss=loss)
      times.append(1e6 * (time.perf_counter() - start))
  return statistics.median(times), statistics.mean(times)


def main() -> None:
  """Prints the share of a step, and the time of a push."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=40)
  parser.add_argument("--steps", type=int, default=50)
  args = parser.parse_args()
  print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}")
  with tempfile.TemporaryDirectory() as name:
    loops = demo_loop(Path(name), args.steps)
    times: dict[str, list[Clocks]] = {key: [] for key in loops}
    for turn in range(args.rounds + 1):
      # Each goes first in every second round; the first round compiles and is left out.
      for key in sorted(loops, reverse=bool(turn % 2)):
        seconds = loops[key]()
        if turn:
          times[key].append(seconds)
    for i, clock in enumerate(("wall", "processor")):
      pairs = [(a[i], b[i]) for a, b in zip(times["alone"], times["recorded"], strict=True)]
      share = statistics.median(b / a - 1 for a, b in pairs)
      alone, recorded = (1e3 * statistics.median(values) / args.steps for values in zip(*pairs, strict=True))
      print(f"demo, {clock} time: {alone:.3f} ms a step, recorded {recorded:.3f} ms; push adds {share:+.2%}")
    for leaves in (3, 100, 1000):
      median, mean = push_time(Path(name), leaves, 500)
      print(f"push, {leaves} leaves: median {median:.0f} us, mean with the reads {mean:.0f} us")


if __name__ == "__main__":
  main()
