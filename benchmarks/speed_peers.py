"""Other frameworks besides JAX, each in its own process, which works only during its turn.

In one process, frameworks would disturb each other: each keeps threads, and torch's would spin while XLA works. The
parent therefore takes turns among the processes, with a short pause before each turn.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from speed_trees import DTYPES, Tree
from timing import Turn

FRAMEWORKS = ("torch", "tensorflow")
PAUSE = 0.005  # Seconds; OpenMP's threads spin for less before they sleep.


class Plan(NamedTuple):
  """What a section should do.

  Attributes:
    rounds: rounds of every measurement.
    quick: whether to use small trees, only to see that everything runs.
    peers: frameworks that take part besides JAX.
    notes: a section adds what it left out; the page shows it.
  """

  rounds: int
  quick: bool
  peers: tuple[str, ...]
  notes: list[str]


def dtypes(plan: Plan, tree: Tree) -> tuple[str, ...]:
  """The dtypes of a tree: only float32 for the tree with the most leaves; two in a quick run."""
  return DTYPES[: 1 if tree.key == "most" else 2 if plan.quick else 3]


class Peer:
  """A framework in its own process."""

  def __init__(self, framework: str):
    self.framework = framework
    self._process = subprocess.Popen(
      [sys.executable, str(Path(__file__).with_name("speed_worker.py")), framework],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )

  def load(self, work: str, tree: Tree, dtype: str) -> dict[str, Turn]:
    """The variants of this framework for one tree, warmed up.

    Raises:
      RuntimeError: if it has none; the text is the worker's reason.
    """
    answer = self._ask(do="load", work=work, shapes=tree.shapes, dtype=dtype)
    return {name: partial(self._seconds, name) for name in answer["variants"]}

  def close(self) -> None:
    """Ends the process."""
    if self._process.poll() is None:
      self._process.communicate(json.dumps({"do": "stop"}) + "\n")

  def _seconds(self, variant: str) -> float:
    return float(self._ask(do="run", variant=variant)["seconds"])

  def _ask(self, **request: Any) -> dict[str, Any]:
    if self._process.stdin is None or self._process.stdout is None:
      raise RuntimeError(f"the worker of {self.framework} has no pipes.")
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"error": "the process has ended"}
    if "error" in answer:
      raise RuntimeError(f"{self.framework}: {answer['error']}")
    return answer


def installed(framework: str) -> bool:
  """Whether this Python can import it."""
  return importlib.util.find_spec(framework) is not None


@contextmanager
def started(plan: Plan, frameworks: Sequence[str] = FRAMEWORKS) -> Iterator[list[Peer]]:
  """The peers of the plan among `frameworks`; one that is not installed is noted and left out."""
  wanted = [name for name in frameworks if name in plan.peers]
  plan.notes.extend(f"{name} is not installed and was left out." for name in wanted if not installed(name))
  peers = [Peer(name) for name in wanted if installed(name)]
  try:
    yield peers
  finally:
    for peer in peers:
      peer.close()


def peer_turns(plan: Plan, peers: Sequence[Peer], work: str, tree: Tree, dtype: str) -> dict[str, Turn]:
  """The turns of all peers on one tree; a peer that cannot run it is noted and left out."""
  turns: dict[str, Turn] = {}
  for peer in peers:
    try:
      turns |= peer.load(work, tree, dtype)
    except RuntimeError as error:
      plan.notes.append(f"{tree.title}, {dtype}: left out, {error}.")
  return turns
