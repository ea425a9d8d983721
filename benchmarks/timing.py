"""Times variants in rounds, taking turns in random order, and summarizes their times.

A turn is a function that does the work of one variant once and returns its seconds. Compared variants run in the same
rounds, so a disturbance of the machine affects all of them.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Turn: TypeAlias = Callable[[], float]
Clock: TypeAlias = Callable[[], float]

WARM_UP = 2  # Rounds that do not count: the first compiles, the second runs with memory allocated.


def turn_of(
  run: Callable[[], object],
  *,
  prepare: Callable[[], object] | None = None,
  repeats: int = 1,
  warm: bool = False,
  clock: Clock = time.perf_counter,
) -> Turn:
  """The turn of a variant.

  Args:
    run: the work; it returns when the work is done, not when it is queued.
    prepare: runs before the work and is not timed.
    repeats: how often the work runs in a turn; the time is the mean.
    warm: whether the work first runs once untimed. The caches then hold its own data, not data of the previous variant;
      needed for rivals that keep their tensors in other processes.
    clock: returns seconds.
  """

  def take() -> float:
    if warm:
      run()
    if prepare is not None:
      prepare()
    start = clock()
    for _ in range(repeats):
      run()
    return (clock() - start) / repeats

  return take


def interleave(
  turns: Mapping[str, Turn], rounds: int, *, seed: int = 0, pause: float = 0.0, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
  """Runs the rounds; returns the seconds of each variant, one per round.

  Args:
    turns: the variants by name.
    rounds: rounds that count, after the warm-up.
    seed: seed of the order within the rounds.
    pause: seconds before each turn, in which spinning threads of the previous variant go to sleep.
    warm_up: rounds that do not count.
  """
  rng = random.Random(seed)
  times: dict[str, list[float]] = {name: [] for name in turns}
  for number in range(warm_up + rounds):
    for name in rng.sample(list(turns), len(turns)):
      time.sleep(pause)
      seconds = turns[name]()
      if number >= warm_up:
        times[name].append(seconds)
  return times


def summary(times: Mapping[str, Sequence[float]], base: str | None = None) -> dict[str, dict[str, float]]:
  """Median and minimum of each variant in seconds.

  With a base, also "added", the median of the differences from the base in the same round, and "added_min", the
  difference of the minima.
  """
  out = {}
  for name, values in times.items():
    out[name] = {"median": statistics.median(values), "min": min(values)}
    if base is not None:
      differences = [a - b for a, b in zip(values, times[base], strict=True)]
      out[name] |= {"added": statistics.median(differences), "added_min": min(values) - min(times[base])}
  return out
