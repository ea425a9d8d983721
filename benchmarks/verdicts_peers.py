"""Other run doctors on the same runs: what they get, and how their findings map to the names used here.

Each is a command that reads a table of losses and norms. It is looked up on the PATH and left out if missing; the
project does not depend on it. Names are mapped in its favour: if one of its checks may stand for several findings, the
right one counts. None of them can name a leaf or a batch, so these do not count.
"""

import csv
import json
import math
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from verdicts_truth import Outcome, Truth, judge

from clipjax.metric_names import NORM
from clipjax.runs import Finding, Run
from clipjax.runs.schema import GRAD, SKIP, key_of

# Columns that a peer gets, and their names there; losses keep their names.
COLUMNS = {key_of(GRAD, NORM): "grad_norm", "learning_rate": "lr"}
# For a step that `skip_steps` dropped, the norm that it saw.
INSTEAD = {key_of(GRAD, NORM): key_of(SKIP, NORM)}
NOT_GIVEN = (
  "norms by leaf, the size of the updates, the limit of a clip, what it does to the step, which steps were dropped, a "
  "second optimizer's norms, the loss scale and the names of batches: none of them has a place for these"
)
# Also found on PyPI, and why they are not compared.
TRIED = {
  "trainscope 1.8.1": "records from inside a PyTorch training, and reports only on its own records",
  "training-doctor 0.1.0": "installs no command; it is called from Python",
  "trainpulse 0.4.0": "installs no command either",
}

_NOT_FINITE = ("nonfinite", "nonfinite-loss", "nonfinite-dropped", "diverged")
_SPIKES = ("spikes", "spikes-caught", "update-spike")
_FLAT = ("not-learning", "update-ratio", "stopped", "layer-spread", "clipped-often", "clip-starves")
_LEFT = ("diverged", "rising-loss")


class Said(NamedTuple):
  """A finding of another run doctor.

  Attributes:
    check: its name there.
    level: "FAIL", "WARN" or "INFO".
    steps: the steps that it names.
  """

  check: str
  level: str
  steps: tuple[int, ...]


class Peer(NamedTuple):
  """Another run doctor.

  Attributes:
    arguments: arguments of its command, before the path.
    said: extracts its findings from its output.
    names: the names that its checks may have here; other checks are hints and do not count.
  """

  arguments: tuple[str, ...]
  said: Callable[[Any], Iterator[Said]]
  names: dict[str, tuple[str, ...]]


def _runmedic(report: Any) -> Iterator[Said]:
  levels = {"critical": "FAIL", "warning": "WARN"}
  for run in report:
    for f in run["findings"]:
      yield Said(f["check"], levels.get(f["severity"], "INFO"), () if f["step"] is None else (int(f["step"]),))


def _losslint(report: Any) -> Iterator[Said]:
  levels = {"error": "FAIL", "warning": "WARN"}
  for f in report["findings"]:
    details = f["details"]
    steps = details.get("steps") or [value for key, value in details.items() if key.endswith("step")]
    yield Said(
      f["check"], levels.get(f["severity"], "INFO"), tuple(int(s) for s in steps if isinstance(s, int | float))
    )


def _trainspotter(report: Any) -> Iterator[Said]:
  levels = {"error": "FAIL", "warning": "WARN"}
  for f in report["findings"]:
    yield Said(f["detector"], levels.get(f["severity"], "INFO"), (int(f["step_start"]),))


PEERS = {
  "runmedic": Peer(
    ("diagnose", "--json"),
    _runmedic,
    {
      "non_finite": _NOT_FINITE,
      "divergence": _LEFT,
      "loss_spikes": _SPIKES,
      "grad_spikes": (*_SPIKES, "rising-norm"),
      "no_learning": _FLAT,
      "overfitting": ("overfit",),
    },
  ),
  "losslint": Peer(
    ("check", "--format", "json"),
    _losslint,
    {
      "nan_inf": _NOT_FINITE,
      "divergence": _LEFT,
      "loss_spike": _SPIKES,
      "stagnation": _FLAT,
      "overfit_onset": ("overfit",),
    },
  ),
  "trainspotter": Peer(
    ("analyze", "--output", "json"),
    _trainspotter,
    {
      "spikes": _SPIKES,
      "divergence": (*_LEFT, *_NOT_FINITE),
      "grad_norm": (*_SPIKES, "rising-norm", "layer-spread", "zero-gradient"),
      "plateau": _FLAT,
      "overfitting": ("overfit",),
    },
  ),
}


def installed() -> dict[str, str]:
  """The versions of the peers on the PATH."""
  out = {}
  for name in PEERS:
    if (command := shutil.which(name)) is not None:
      said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
      out[name] = said.split()[-1] if said.split() else "?"
  return out


def outcome_of(name: str, run: Run, truth: Truth, folder: pathlib.Path) -> Outcome:
  """How a peer's answer on a run compares with the truth."""
  path = folder / "run.csv"
  write_table(run, path)
  peer = PEERS[name]
  command = [shutil.which(name) or name, *peer.arguments, str(path)]
  printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
  found = [said for said in peer.said(json.loads(printed)) if said.check in peer.names]
  return judge(without_leaves(truth), as_findings(found, peer.names, truth))


def write_table(run: Run, path: pathlib.Path) -> None:
  """Writes the losses of a run, its gradient norm and its rate, one row per step, with "nan" and "inf" as such."""
  keys = [key for key in run.columns if key in COLUMNS or key.rpartition("/")[2].endswith("loss")]
  keys = [key for key in keys if not key.startswith(f"{SKIP}/")]
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["step", *(COLUMNS.get(key, key) for key in keys)])
    for i, step in enumerate(run.steps):
      writer.writerow([int(step), *(_cell(run, key, i) for key in keys)])


def _cell(run: Run, key: str, i: int) -> str:
  """A number; empty if none was recorded."""
  for column in (key, INSTEAD.get(key, key)):
    if column in run and math.isfinite(run[column][i]):
      return repr(float(run[column][i]))
    if column in run.flags and run.flags[column][i]:
      return "nan"
  return ""


def without_leaves(truth: Truth) -> Truth:
  """The truth without leaves and batches, which losses and norms do not show."""
  return truth._replace(expected=tuple(e._replace(leaves=(), batches=()) for e in truth.expected))


def as_findings(found: list[Said], names: dict[str, tuple[str, ...]], truth: Truth) -> list[Finding]:
  """A peer's findings under the names of this package; if a check may mean several, the right one."""
  right = [e.name for e in truth.expected]
  out = []
  for said in found:
    known = names[said.check]
    name = next((n for n in (*right, *truth.also) if n in known), known[0])
    out.append(Finding(said.level, name, said.check, steps=said.steps))
  return out
