"""What `Recorder.push` adds to a training step: the demo's network with and without it, and the push by itself.

Run `python benchmarks/recorder.py [--rounds 1000]`. Steps with and without a push take turns in an order of chance, on
one training, timed on the wall and on the processor; the latter is what counts where other processes disturb the wall
time. The median of the differences is what an ordinary push adds; the sum has the reads of every 50th in it. Then the
host time of one push, for optimizer states of 3 to 1000 leaves.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax
from clipjax import _demo

Clocks = tuple[float, float]  # Seconds on the wall, and of all cores together.


def watched(max_norm: jax.Array) -> optax.GradientTransformationExtraArgs:
  """The demo's optimizer with a watch before its clip, so that there are numbers by leaf to record."""
  return optax.chain(clipjax.watch(history=16), _demo.optimizer(max_norm))


def demo_steps(folder: Path, rounds: int) -> dict[str, list[Clocks]]:
  """What each step of the demo took, by whether it was recorded."""
  key_params, key = jax.random.split(jax.random.key(0))
  text = jnp.asarray(_demo.read_text())

  def step(params: Any, state: Any, number: Any) -> Any:
    starts = jax.random.randint(jax.random.fold_in(key, number), (_demo.BATCH, 1), 0, text.size - _demo.LENGTH)
    windows = text[starts + jnp.arange(_demo.LENGTH + 1)[None, :]].astype(jnp.int32)
    loss, grads = jax.value_and_grad(_demo.loss_fn)(params, windows)
    updates, state = watched(jnp.float32(1)).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  compiled = jax.jit(step, donate_argnums=(0, 1))
  params = _demo.init_params(key_params)
  state = watched(jnp.float32(1)).init(params)
  times: dict[str, list[Clocks]] = {"alone": [], "recorded": []}
  rng = np.random.default_rng(0)
  number = 0
  with clipjax.Recorder(folder / "run.jsonl") as recorder:
    for turn in range(rounds + 20):
      for key_of_turn in rng.permutation(list(times)):
        number += 1
        start = time.perf_counter(), time.process_time()
        params, state, loss = compiled(params, state, jnp.int32(number))
        if key_of_turn == "recorded":
          recorder.push(number, state, loss=loss)
        jax.block_until_ready((params, state))
        if turn >= 20:  # The first ones compile.
          times[key_of_turn].append((time.perf_counter() - start[0], time.process_time() - start[1]))
  return times


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
  parser.add_argument("--rounds", type=int, default=1000)
  args = parser.parse_args()
  print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}")
  with tempfile.TemporaryDirectory() as name:
    times = demo_steps(Path(name), args.rounds)
    for i, clock in enumerate(("wall", "processor")):
      a, b = ([1e3 * clocks[i] for clocks in times[key]] for key in ("alone", "recorded"))
      alone = statistics.median(a)
      median = statistics.median(y - x for x, y in zip(a, b, strict=True)) / alone
      print(f"demo, {clock}: {alone:.3f} ms a step; push adds {median:+.2%}, with the reads {sum(b) / sum(a) - 1:+.2%}")
    for leaves in (3, 100, 1000):
      median, mean = push_time(Path(name), leaves, 500)
      print(f"push, {leaves} leaves: median {median:.0f} us, mean with the reads {mean:.0f} us")


if __name__ == "__main__":
  main()
