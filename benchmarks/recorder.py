"""The cost of `clipjax.watch` and `Recorder.push` on the demo's training step, and of a push by itself.

Run `python benchmarks/recorder.py [--rounds 1000] [--quick]`. Three variants of the demo's step take turns in random
order, each in its own run: without a watch, with a watch before the clip, and with that watch and a push. It reports
wall time and processor time; rely on processor time if other processes disturb the wall time. The median difference is
the cost of an ordinary step; the sum includes the reads of every 50th step. Next come the host time of a push in a loop
of 4.7 ms, and of pushes in direct succession, for states of 3 to 1000 leaves. The last part is the time of a row, with
all reads and writes, for 200 layers in 12 stacked arrays and for 24 plain leaves. `--quick` only shows that it runs.
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
from clipjax.demo import model

Clocks = tuple[float, float]  # Wall seconds, and processor seconds over all cores.


def optimizer(watched: bool) -> optax.GradientTransformationExtraArgs:
  """The demo's optimizer, with a watch before its clip if `watched`."""
  tx = model.optimizer(jnp.float32(1))
  return optax.chain(clipjax.watch(history=16), tx) if watched else tx


def trainer(watched: bool) -> tuple[Any, Any]:
  """A compiled step `(params, state, number) -> (params, state, loss)`, and its first arguments."""
  key_params, key = jax.random.split(jax.random.key(0))
  text = jnp.asarray(model.read_text())
  tx = optimizer(watched)

  def step(params: Any, state: Any, number: Any) -> Any:
    loss, grads = jax.value_and_grad(model.loss_fn)(params, model.batch(text, key, number))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = model.init_params(key_params)
  return jax.jit(step, donate_argnums=(0, 1)), (params, tx.init(params))


def demo_steps(folder: Path, rounds: int) -> dict[str, list[Clocks]]:
  """The times of the demo's steps: plain, watched, and watched and recorded."""
  names = ("alone", "watched", "recorded")
  steps, states = zip(*(trainer(name != "alone") for name in names), strict=True)
  states = list(states)
  times: dict[str, list[Clocks]] = {name: [] for name in names}
  rng = np.random.default_rng(0)
  with clipjax.runs.Recorder(folder / "run.jsonl") as recorder:
    for turn in range(1, rounds + 21):
      for i in rng.permutation(len(names)):
        start = time.perf_counter(), time.process_time()
        *states[i], loss = steps[i](*states[i], jnp.int32(turn))
        if names[i] == "recorded":
          recorder.push(turn, states[i][1], loss=loss)
        jax.block_until_ready(states[i])
        if turn > 20:  # The first turns compile.
          times[names[i]].append((time.perf_counter() - start[0], time.process_time() - start[1]))
  return times


def push_time(folder: Path, leaves: int, pushes: int) -> tuple[float, float]:
  """Median and mean host time of a push in microseconds; the mean includes the reads of every 50th push."""
  params = {f"layer {i}": jnp.ones((4, 4)) for i in range(leaves)}
  tx = optax.chain(clipjax.watch(history=16), clipjax.clip_by_global_norm(1.0), optax.adam(1e-3))
  state = jax.jit(tx.update)(params, tx.init(params), params)[1]
  loss = jnp.float32(1)
  times = []
  with clipjax.runs.Recorder(folder / f"{leaves}.jsonl") as recorder:
    recorder.push(0, state, loss=loss)
    for step in range(pushes):
      jax.block_until_ready(state)
      start = time.perf_counter()
      recorder.push(step, state, loss=loss)
      times.append(1e6 * (time.perf_counter() - start))
  return statistics.median(times), statistics.mean(times)


def paced_pushes(folder: Path, pushes: int, pause: float = 0.0047) -> list[float]:
  """The microseconds of each push in a loop with steps of `pause` seconds."""
  states = states_of((4, 4), 6, None, "global", pushes)
  times, loss = [], jnp.float32(1)
  with clipjax.runs.Recorder(folder / "paced.jsonl") as recorder:
    for step, state in enumerate(states):
      time.sleep(pause)
      start = time.perf_counter()
      recorder.push(step, state, loss=loss)
      times.append(1e6 * (time.perf_counter() - start))
  return times[100:]  # The first pushes compile.


def states_of(shape: tuple[int, ...], leaves: int, stacked: Any, clip: str, count: int = 200) -> list[Any]:
  """Optimizer states after steps with a watch and a clip on random gradients."""
  rng = np.random.default_rng(0)
  params = {f"blocks/{i}": jnp.asarray(rng.normal(size=shape), jnp.float32) for i in range(leaves)}
  tx = optax.chain(
    clipjax.watch(stacked=stacked),
    clipjax.adagc(stacked=stacked) if clip == "adagc" else clipjax.clip_by_global_norm(1.0),
  )
  state, step = tx.init(params), jax.jit(lambda grads, state: tx.update(grads, state, params)[1])
  states = []
  for _ in range(count):
    grads = {key: x * jnp.asarray(rng.lognormal(size=x.shape), jnp.float32) for key, x in params.items()}
    state = step(grads, state)
    states.append(state)
  return jax.block_until_ready(states)  # type: ignore[no-any-return]  # JAX does not say.


def row_times(folder: Path, clip: str, rows: int, every: int = 50) -> dict[str, tuple[float, float, float, float]]:
  """Median microseconds of a row (wall, processor in the loop, processor in the thread), and its bytes.

  For plain and for stacked layers. Only the wall time includes the device's work. The median is over parts of `every`
  rows; each part is written before the next begins.
  """
  models = {
    "24 leaves": states_of((4, 4), 24, None, clip),
    "200 layers x 12 arrays": states_of((200, 4, 4), 12, lambda path, leaf: 0, clip),
  }
  recorders = {name: clipjax.runs.Recorder(folder / f"{clip} {name}.jsonl", every=every) for name in models}
  times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
  rng = np.random.default_rng(0)
  loss = jnp.float32(1)
  for part in range(rows // every + 2):
    for i in rng.permutation(len(models)):
      name = list(models)[i]
      recorder, states = recorders[name], models[name]
      start = time.perf_counter(), time.thread_time(), thread_time_of(recorder)
      for turn in range(part * every, (part + 1) * every):
        recorder.push(turn, states[turn % len(states)], loss=loss)
      recorder.flush()
      end = time.perf_counter(), time.thread_time(), thread_time_of(recorder)
      if part >= 2:
        wall, loop, thread = (1e6 * (b - a) / every for a, b in zip(start, end, strict=True))
        times[name].append((wall, loop, thread))
  out = {}
  for name, recorder in recorders.items():
    recorder.close()
    size = (folder / f"{clip} {name}.jsonl").stat().st_size / (rows + 2 * every)
    wall, loop, thread = (statistics.median(some) for some in zip(*times[name], strict=True))
    out[name] = wall, loop, thread, size
  return out


def thread_time_of(recorder: clipjax.runs.Recorder) -> float:
  """Processor seconds of a recorder's thread."""
  return time.clock_gettime(time.pthread_getcpuclockid(recorder._pipeline._thread.ident))


def main() -> None:
  """Prints what a watch and a push add to a step, and the time of a push."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, help="steps of each variant (default: 1000, or 20 with --quick)")
  parser.add_argument("--quick", action="store_true", help="few steps, and no state of 1000 leaves")
  args = parser.parse_args()
  rounds = args.rounds or (20 if args.quick else 1000)
  print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}")
  with tempfile.TemporaryDirectory() as name:
    times = demo_steps(Path(name), rounds)
    for i, clock in enumerate(("wall", "processor")):
      alone, watched, recorded = ([1e3 * clocks[i] for clocks in values] for values in times.values())
      base = statistics.median(alone)
      print(f"demo, {clock}: {base:.3f} ms a step", end="")
      for what, before, after in (("watch", alone, watched), ("push", watched, recorded)):
        median = statistics.median(y - x for x, y in zip(before, after, strict=True)) / base
        print(f"; {what} adds {median:+.2%}, in sum {sum(after) / sum(before) - 1:+.2%}", end="")
      print()
    times = paced_pushes(Path(name), max(rounds, 150 if args.quick else 300))
    median, p99 = np.percentile(times, [50, 99])
    print(f"push in a loop of 4.7 ms: median {median:.0f} us, mean {np.mean(times):.0f} us, p99 {p99:.0f} us")
    for leaves in (3, 100) if args.quick else (3, 100, 1000):
      median, mean = push_time(Path(name), leaves, 60 if args.quick else 500)
      print(f"push, {leaves} leaves: median {median:.0f} us, mean with the reads {mean:.0f} us")
    for clip in ("adagc",) if args.quick else ("clip_by_global_norm", "adagc"):
      for model, (wall, loop, thread, size) in row_times(Path(name), clip, 5 * rounds).items():
        print(
          f"row, watch and {clip}, {model}: {wall:.0f} us, processor {loop:.0f} us in the loop and {thread:.0f} us in "
          f"the thread, {size:.0f} bytes"
        )


if __name__ == "__main__":
  main()
