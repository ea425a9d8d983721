"""Other frameworks beside JAX: each in a process of its own that works only while it has its turn.

Two frameworks in one process would share nothing but trouble: each keeps threads, and torch's would spin while XLA
works. So the parent takes turns among them, with a short pause before each.
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
PAUSE = 0.005  # Seconds: more than the time that OpenMP's threads spin before they sleep.


class Plan(NamedTuple):
  """What a section is to do.

  Attributes:
    rounds: of every measurement.
    quick: small trees, to see that everything runs.
    peers: frameworks beside JAX that take part.
    notes: what a section adds when it leaves something out; the page says so.
  """

  rounds: int
  quick: bool
  peers: tuple[str, ...]
  notes: list[str]


def dtypes(plan: Plan, tree: Tree) -> tuple[str, ...]:
  """Those in which a tree is measured: the one with the most leaves in float32 only; two in a quick run."""
  return DTYPES[: 1 if tree.key == "most" else 2 if plan.quick else 3]


class Peer:
  """A framework in a process of its own."""

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
      RuntimeError: with the worker's reason, where it has none.
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
  """The peers of the plan among `frameworks`; those that are not installed are noted and left out."""
  wanted = [name for name in frameworks if name in plan.peers]
  plan.notes.extend(f"{name} is not installed and was left out." for name in wanted if not installed(name))
  peers = [Peer(name) for name in wanted if installed(name)]
  try:
    yield peers
  finally:
    for peer in peers:
      peer.close()


def peer_turns(plan: Plan, peers: Sequence[Peer], work: str, tree: Tree, dtype: str) -> dict[str, Turn]:
  """The turns of all peers on one tree; one that cannot is noted and left out."""
  turns: dict[str, Turn] = {}
  for peer in peers:
    try:
      turns |= peer.load(work, tree, dtype)
    except RuntimeError as error:
      plan.notes.append(f"{tree.title}, {dtype}: left out, {error}.")
  return turns
