"""Rows through real loggers and back: 300 steps into each, read through that package; what is not installed is skipped.

`python tests/test_loggers.py` prints the table of `docs/loggers.md`.
"""

import contextlib
import functools
import glob
import importlib
import importlib.metadata
import json
import math
import os
import re
import struct
import sys
import tempfile
import time
import types
import warnings
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from recording import LOGGING, train, warnings_of

import clipjax

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}  # wandb reads them once.
STEPS = 300
ODD = {100: math.nan, 101: math.inf, 102: -math.inf}  # Losses.
PARAMS = {"w": jnp.ones(2), "blocks": {"v[0]": jnp.ones(3)}}

# Loggers warn of their own accord: of files that they leave open, of what they will change.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("standard_promotion")]


def record(folder, writer, *, leaves=False, before=lambda step: None, after=lambda step: None):
  """Trains and records; returns the rows of the file, as {step: values}."""
  path = Path(folder) / "run.jsonl"
  with clipjax.runs.Recorder(path, writers=[(writer, "leaves") if leaves else writer]) as recorder:
    for step, state in train(clipjax.watch(), STEPS, params=PARAMS):
      before(step)
      recorder.push(step, state, loss=ODD.get(step, 1 / step))
      after(step)
      if step == STEPS // 2:
        recorder.flush()
  return rows_of(path, leaves)


def rows_of(path, leaves):
  """What a logger is to be given: the scalars of each row, and its numbers by leaf."""
  names, rows = {}, {}
  for line in path.read_text().splitlines():
    row = json.loads(line)
    if "clipjax_run" in row:
      names = row["leaves"]
      continue
    flags = row.pop("nonfinite", {})
    vectors = row.pop("leaf", {})
    values = {key: float(flags[key]) if value is None else value for key, value in row.items()}
    for key in ("time", "weights", "batch"):
      values.pop(key, None)
    if leaves:
      for key, vector in vectors.items():
        values |= {f"{key}/{leaf}": number for leaf, number in zip(names[key.rpartition("/")[0]], vector, strict=True)}
    rows.setdefault(values.pop("step"), {}).update(values)
  return rows


def same(got, want):
  """Whether rows are equal, to the precision of a float32; loggers rewrite what is not a letter or a digit in a key."""
  assert sorted(got) == sorted(want)
  for step, values in want.items():
    numbers, expected = plain(got[step]), plain(values)
    assert sorted(numbers) == sorted(expected), step
    for key, value in expected.items():
      np.testing.assert_allclose(numbers[key], value, rtol=1e-6, err_msg=f"{key} at step {step}")


def plain(values):
  """The values, with keys in which only letters and digits count; none becomes one with another."""
  out = {re.sub(r"[^A-Za-z0-9]+", "_", key).strip("_"): value for key, value in values.items()}
  assert len(out) == len(values)
  return out


def gathered(triples):
  """Numbers as {step: values}; each is there once."""
  rows = {}
  for step, key, value in triples:
    assert key not in rows.setdefault(step, {}), (step, key)
    rows[step][key] = value
  return rows


def finite(rows):
  """The rows without what is not finite."""
  return {step: {k: v for k, v in values.items() if math.isfinite(v)} for step, values in rows.items()}


# wandb ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def wandb_run(folder):
  import wandb  # noqa: PLC0415

  settings = wandb.Settings(x_disable_stats=True, console="off")
  run = wandb.init(mode="offline", dir=folder, project="tests", reinit="create_new", settings=settings)
  try:
    yield run
  finally:
    run.finish()


def wandb_rows(folder):
  """The rows in the file of an offline run; `finish` returns before the file is complete."""
  until = time.monotonic() + 60
  while True:
    with contextlib.suppress(Exception):  # A record may be half written.
      entries = list(wandb_entries(folder))
      if any(entry.WhichOneof("record_type") == "exit" for entry in entries):
        histories = [entry.history for entry in entries if entry.WhichOneof("record_type") == "history"]
        return [
          {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
          for history in histories
        ]
    assert time.monotonic() < until, "the file is not completed"
    time.sleep(0.05)


def wandb_entries(folder):
  """What the file holds: blocks of 32 KiB with pieces of protocol buffers."""
  from wandb.proto import wandb_internal_pb2  # noqa: PLC0415

  (path,) = glob.glob(f"{folder}/wandb/offline-run-*/*.wandb")
  data, place, whole = Path(path).read_bytes(), 7, b""
  while place + 7 <= len(data):
    left = 2**15 - place % 2**15
    _, size, kind = struct.unpack("<IHB", data[place : place + 7]) if left >= 7 else (0, 0, 0)
    if kind == 0:
      place += left
      continue
    piece = data[place + 7 : place + 7 + size]
    place += 7 + size
    whole = piece if kind in (1, 2) else whole + piece
    if kind in (1, 4):
      yield wandb_internal_pb2.Record.FromString(whole)


def through_wandb(folder, situation, leaves=False):
  """Rows of ours that wandb has, those that it should have, and how many of the user's it has and should have."""
  logged = []
  with wandb_run(folder) as run:
    user = types.SimpleNamespace(log=lambda values, **options: (logged.append(values), run.log(values, **options)))
    when = "after" if "after" in situation else "before"
    want = record(folder, run, leaves=leaves, **{when: functools.partial(LOGGING[situation], user)})
  rows = wandb_rows(folder)
  ours = [{key[8:]: value for key, value in row.items() if key.startswith("clipjax/")} for row in rows]
  ours = [row for row in ours if row]
  assert all("time" in row for row in ours)
  got = {row["step"]: {k: v for k, v in row.items() if k not in ("step", "time")} for row in ours}
  assert len(got) == len(ours)
  found = sum(not k.startswith(("clipjax/", "_")) for row in rows for k in row)
  return got, want, found, len(logged)


@pytest.mark.parametrize("situation", LOGGING)
def test_wandb_has_all_rows_of_ours_and_of_the_user(situation, tmp_path):
  pytest.importorskip("wandb")
  got, want, found, logged = through_wandb(tmp_path, situation)
  same(got, want)
  assert len(got) == STEPS and found == logged


def test_wandb_is_given_the_leaves(tmp_path):
  pytest.importorskip("wandb")
  got, want, _, _ = through_wandb(tmp_path, "log(step=i)", leaves=True)
  same(got, want)
  assert got[1]["grad/norm/blocks/v[0]"] == pytest.approx(3**0.5)


def train_with_epochs(path, ours, users):
  with clipjax.runs.Recorder(path, writers=[ours]) as recorder:
    for step in range(STEPS):
      recorder.push(step, None, loss=1.0)
      if step % 100 == 99:
        users.log({"epoch": step}, step=step // 100)


def test_wandb_beside_epochs_that_begin_late_says_what_it_costs(tmp_path):
  pytest.importorskip("wandb")
  with wandb_run(tmp_path) as run:
    (said,) = warnings_of(lambda: train_with_epochs(tmp_path / "run.jsonl", run, run))
  assert "your `step=` is not above " in said and 'reinit="create_new"' in said
  assert sum("clipjax/step" in row for row in wandb_rows(tmp_path)) == STEPS


def test_two_runs_of_wandb_beside_epochs_keep_all(tmp_path):
  pytest.importorskip("wandb")
  (tmp_path / "ours").mkdir()
  with wandb_run(tmp_path) as users, wandb_run(tmp_path / "ours") as ours:
    train_with_epochs(tmp_path / "run.jsonl", ours, users)
  assert [row["epoch"] for row in wandb_rows(tmp_path)] == [99, 199, 299]
  assert len(wandb_rows(tmp_path / "ours")) == STEPS


def test_a_run_of_wandb_that_is_finished_holds_up_no_push(tmp_path):
  pytest.importorskip("wandb")
  with wandb_run(tmp_path) as run:
    recorder = clipjax.runs.Recorder(tmp_path / "run.jsonl", every=1, writers=[run])
    recorder.push(0, None, loss=1.0)
    recorder.push(1, None, loss=1.0)
  said = warnings_of(lambda: recorder.push(2, None, loss=1.0) or recorder.close())
  assert "the run is finished" in said[0] and said[-1] == "the writer wandb never took 2 rows: the file has them."


# The others: each returns what was read back and what should be -------------------------------------------------------


def tensorboardx(folder, leaves):
  from tensorboardX import SummaryWriter  # noqa: PLC0415
  from tensorboardX.proto.event_pb2 import Event  # noqa: PLC0415

  with SummaryWriter(f"{folder}/events") as writer:
    want = record(folder, writer, leaves=leaves)
  triples, times = [], {}
  (file,) = Path(folder, "events").iterdir()
  data = file.read_bytes()
  while data:  # Records of length, checksum, event, checksum.
    size = int.from_bytes(data[:8], "little")
    event = Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]
    for value in event.summary.value:
      triples.append((event.step, value.tag, value.simple_value))
      times[event.step] = event.wall_time
  run = clipjax.runs.read_run(Path(folder) / "run.jsonl")
  np.testing.assert_allclose([times[step] for step in run.steps.tolist()], run["time"], atol=1e-3)
  return gathered(triples), want


def torch(folder, leaves):
  from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

  with SummaryWriter(f"{folder}/events") as writer:
    want = record(folder, writer, leaves=leaves)
  return events_of(folder), want


def events_of(folder):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

  events = EventAccumulator(f"{folder}/events", size_guidance={"scalars": 0})
  events.Reload()
  return gathered((e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


def clu(folder, leaves):
  from clu import metric_writers  # noqa: PLC0415
  from clu.metric_writers.torch_tensorboard_writer import TorchTensorboardWriter  # noqa: PLC0415

  writer = metric_writers.AsyncWriter(TorchTensorboardWriter(f"{folder}/events"))
  want = record(folder, writer, leaves=leaves)
  writer.close()
  return events_of(folder), want


def trackio(folder, leaves):
  os.environ["TRACKIO_DIR"] = str(folder)
  import trackio  # noqa: PLC0415
  from trackio import sqlite_storage, utils  # noqa: PLC0415

  for module in (utils, sqlite_storage):
    if hasattr(module, "TRACKIO_DIR"):
      module.TRACKIO_DIR = Path(folder)
  trackio.init(project="tests", name="run", embed=False)
  want = record(folder, trackio, leaves=leaves)
  trackio.finish()
  rows = sqlite_storage.SQLiteStorage.get_logs("tests", "run")
  got = gathered((row["step"], k, v) for row in rows for k, v in row.items() if k not in ("step", "timestamp"))
  return got, want


def mlflow(folder, leaves):
  import mlflow  # noqa: PLC0415

  mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
  with mlflow.start_run() as run:
    want = record(folder, mlflow, leaves=leaves)
  client = mlflow.MlflowClient()
  triples = []
  for key in client.get_run(run.info.run_id).data.metrics:
    triples += [(point.step, key, point.value) for point in client.get_metric_history(run.info.run_id, key)]
  largest = sys.float_info.max  # Of its database, for inf.
  want = {
    step: {key: value if math.isnan(value) else max(min(value, largest), -largest) for key, value in row.items()}
    for step, row in want.items()
  }
  return gathered(triples), want


def aim(folder, leaves):
  from aim import Run  # noqa: PLC0415

  run = Run(repo=str(folder), system_tracking_interval=None, log_system_params=False, capture_terminal_logs=False)
  want = record(folder, run, leaves=leaves)
  triples = [(step, metric.name, value) for metric in run.metrics() for step, (value, *_) in metric.data.items()]
  run.close()
  return gathered(triples), want


def comet(folder, leaves):
  import comet_ml  # noqa: PLC0415

  off = "log_code log_graph auto_param_logging auto_metric_logging parse_args log_env_details log_git_metadata"
  experiment = comet_ml.OfflineExperiment(
    project_name="tests", offline_directory=str(folder), auto_output_logging=False, **dict.fromkeys(off.split(), False)
  )
  experiment.set_step(7)
  want = record(folder, experiment, leaves=leaves)
  assert experiment.curr_step == 7
  experiment.end()
  (path,) = Path(folder).glob("*.zip")
  lines = zipfile.ZipFile(path).read("messages.json").splitlines()
  metrics = [entry["payload"]["metric"] for entry in map(json.loads, lines) if entry["type"] == "metric_msg"]
  return gathered((m["step"], m["metricName"], float(m["metricValue"])) for m in metrics), want


def clearml(folder, leaves):
  os.environ["CLEARML_CACHE_DIR"] = str(folder)
  from clearml import Task  # noqa: PLC0415

  Task.set_offline(True)
  off = "auto_connect_frameworks auto_resource_monitoring auto_connect_arg_parser auto_connect_streams"
  task = Task.init(project_name="tests", task_name="run", **dict.fromkeys(off.split(), False))
  want = record(folder, task.get_logger(), leaves=leaves)
  task.flush(wait_for_uploads=True)
  place = task.get_offline_mode_folder()
  task.close()
  triples = []
  for line in Path(place, "metrics.jsonl").read_text().splitlines():
    for event in json.loads(line):
      title, series = event["metric"], event["variant"]
      triples.append((event["iter"], series if title == series else f"{title}/{series}", event["value"]))
  return gathered(triples), finite(want)


def neptune(folder, leaves):
  import neptune  # noqa: PLC0415

  off = "capture_stdout capture_stderr capture_hardware_metrics capture_traceback git_ref"
  with contextlib.chdir(folder):
    run = neptune.init_run(mode="offline", project="tests/tests", **dict.fromkeys(off.split(), False))
    want = record(folder, run, leaves=leaves)
    run.stop()
    (path,) = Path().glob(".neptune/offline/*/data-1.log")
    decoder, text, triples = json.JSONDecoder(), path.read_text(), []
    while text.strip():
      entry, end = decoder.raw_decode(text.lstrip())
      text = text.lstrip()[end:]
      operation = entry["obj"]
      if operation["type"] == "LogFloats":
        key = "/".join(operation["path"])
        triples += [(value["step"], key, value["value"]) for value in operation["values"]]
  return gathered(triples), finite(want)


# The package that must be installed, and what PyPI calls it.
LOGGERS = {
  tensorboardx: ("tensorboardX", "tensorboardX"),
  torch: ("torch.utils.tensorboard", "torch"),
  clu: ("clu.metric_writers.torch_tensorboard_writer", "clu"),
  trackio: ("trackio", "trackio"),
  mlflow: ("mlflow", "mlflow"),
  aim: ("aim", "aim"),
  comet: ("comet_ml", "comet_ml"),
  clearml: ("clearml", "clearml"),
  neptune: ("neptune", "neptune"),
}


@pytest.mark.parametrize("leaves", [False, True], ids=["scalars", "leaves"])
@pytest.mark.parametrize("logger", LOGGERS, ids=lambda logger: logger.__name__)
def test_a_logger_has_every_row_once(logger, leaves, tmp_path):
  pytest.importorskip(LOGGERS[logger][0], exc_type=ImportError)
  got, want = logger(tmp_path, leaves)
  same(got, want)
  assert len(got) == STEPS
  assert any("blocks" in key for key in got[1]) == leaves


# The page ------------------------------------------------------------------------------------------------------------


ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loggers.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split()[1])
def test_the_examples_of_the_page_run(block, tmp_path, monkeypatch):
  for module in re.findall(r"^(?:import|from) ([\w.]+)", block, re.MULTILINE):
    pytest.importorskip(module, exc_type=ImportError)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
  if "import wandb" in block:  # It remembers the folder that it was first used in.
    wandb = importlib.import_module("wandb")
    monkeypatch.setattr(wandb, "init", functools.partial(wandb.init, dir=tmp_path))
  names = {"clipjax": clipjax}
  exec(block, names)
  recorder = names["recorder"]
  with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)  # Of a logger that raises.
    for step in range(3):
      recorder.push(step, None, loss=1.0)
    recorder.close()
  assert len(clipjax.runs.read_run("run.jsonl")) == 3
  for module, end in (("wandb", "finish"), ("trackio", "finish"), ("mlflow", "end_run")):
    if module in names:
      getattr(names[module], end)()
  for name, end in (("file", "close"), ("experiment", "end")):
    if name in names:
      getattr(names[name], end)()


# The table of the page ------------------------------------------------------------------------------------------------


def table():
  """Rows written and read back, for what is installed here."""
  for logger, (module, package) in LOGGERS.items():
    with contextlib.suppress(ImportError):
      importlib.import_module(module)
      for leaves in (False, True):
        with tempfile.TemporaryDirectory() as folder:
          got, want = logger(folder, leaves)
          same(got, want)
          what = "with leaves" if leaves else "scalars"
          yield f"| {package} {importlib.metadata.version(package)} | {what} | {len(want)} | {len(got)} | |"
  with contextlib.suppress(ImportError):
    version = importlib.metadata.version("wandb")
    for situation in LOGGING:
      with tempfile.TemporaryDirectory() as folder:
        got, want, found, logged = through_wandb(folder, situation)
        same(got, want)
        yield f"| wandb {version} | {situation} | {len(want)} | {len(got)} | {found} of {logged} |"


if __name__ == "__main__":
  for line in table():
    print(line, flush=True)
