"""The demo and its command. No test asserts a loss: the text, and so every loss, changes with Python."""

import errno
import io
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import clipjax
from clipjax import cli
from clipjax.demo import advice, model, picture, training
from clipjax.demo import compare as demo
from clipjax.runs.words import number

STEPS = 12
FORCES_A_TERMINAL = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")  # What rich takes for one.


@pytest.fixture(scope="module")
def reports():
  return []


@pytest.fixture(scope="module")
def runs(reports):
  return training.train_all(STEPS, 0, lambda *args: reports.append(args))


def trained(loss, norm, max_norm=1.0):
  """A run with these series; every finite norm above `max_norm` was clipped."""
  norm = np.array(norm, np.float64)
  with np.errstate(invalid="ignore", divide="ignore"):
    clipped = np.isfinite(norm) & (norm > max_norm)
    scale = np.where(np.isfinite(norm), np.minimum(1, max_norm / norm), np.nan)
  series = {
    "loss": np.array(loss, np.float64),
    "grad/norm": norm,
    "grad/scale": scale,
    "grad/clip_fraction": np.cumsum(clipped) / np.arange(1, norm.size + 1),
    "grad/nonfinite_steps": np.cumsum(~np.isfinite(norm)).astype(np.float64),
  }
  return training.Trained(max_norm, series, 1.5)


def summary(first=5.0, final=2.0, label="max_norm 1", **fields):
  values = {"steps": 20, "lowest_loss": 1.0, "largest_norm": 1234.0, "median_norm": 0.5, "clipped_steps": 3}
  values |= {"nonfinite_steps": 0, "seconds": 1.0, **fields}
  return demo.Summary(label=label, first_loss=first, final_loss=final, **values)


def free(first=5.0, final=2.0, **fields):
  return summary(first, final, "no clipping", **fields)


WIDE = summary(final=445.9, label="max_norm 0.25", largest_norm=1.366e11, median_norm=545053.2, clipped_steps=20)


# Training -----------------------------------------------------------------------------------------------------------


def test_runs_have_a_value_for_every_step_and_differ_only_in_the_threshold(runs):
  unclipped, *clipped = runs
  assert [run.max_norm for run in runs] == list(training.MAX_NORMS)
  for run in runs:
    assert {"loss", "grad/norm", "grad/norm_clipped", "grad/scale", "grad/clip_fraction"} <= set(run.series)
    assert {values.shape for values in run.series.values()} == {(STEPS,)}
    assert run.series["grad/steps"].tolist() == list(range(1, STEPS + 1))
    assert run.seconds > 0
  assert np.all(unclipped.series["grad/scale"] == 1)
  assert np.array_equal(unclipped.series["grad/norm"], unclipped.series["grad/norm_clipped"])
  for run in clipped:
    assert np.all(run.series["grad/max_norm"] == run.max_norm)
    assert np.all(run.series["grad/norm_clipped"] <= run.max_norm * (1 + 1e-6))
    assert np.any(run.series["grad/scale"] < 1)
  firsts = {(run.series["loss"][0], run.series["grad/norm"][0]) for run in runs}
  assert len(firsts) == 1 and len({run.series["loss"][-1] for run in runs}) == len(runs)


def test_one_compilation_serves_every_threshold_and_the_seed_decides_the_rest(monkeypatch, runs):
  traces = []
  train_step = model.train_step
  monkeypatch.setattr(training, "train_step", lambda *args: traces.append(None) or train_step(*args))
  again = training.train_all(3, 0, lambda *_: None)
  assert len(traces) == 1
  other = training.train_all(1, 1, lambda *_: None)
  for before, after in zip(runs, again, strict=True):
    np.testing.assert_allclose(after.series["loss"], before.series["loss"][:3], rtol=1e-5)
  assert other[0].series["loss"][0] != again[0].series["loss"][0]


def test_progress_is_reported_now_and_then_and_at_the_last_step(runs, reports):
  assert [(label, step) for label, step, _ in reports] == [
    (run.label, step) for run in runs for step in (training.READ_EVERY, STEPS)
  ]
  assert reports[1][2] == {name: values[-1] for name, values in runs[0].series.items()}


def test_the_text_is_long_and_ascii():
  text = model.read_text()
  assert text.size > 100_000
  assert text.max() < model.CHARACTERS
  assert b"Python" in text.tobytes()


# Showing ------------------------------------------------------------------------------------------------------------


def test_summary_of_a_run():
  loss = [9.0] * 5 + [2.0] * 5 + [1.0] * 5
  got = demo.summarize(trained(loss, [0.5] * 10 + [4.0] * 3 + [8.0] * 2))
  assert got == demo.Summary("max_norm 1", 15, 9.0, 1.5, 1.0, 8.0, 0.5, 5, 0, 1.5)


def test_summary_of_a_run_that_is_not_finite():
  got = demo.summarize(trained([5.0, math.inf, math.nan], [2.0, math.inf, math.nan], math.inf))
  assert (got.label, got.clipped_steps, got.nonfinite_steps) == ("no clipping", 0, 2)
  assert (got.first_loss, got.lowest_loss, got.largest_norm, got.median_norm) == (5.0, 5.0, math.inf, math.inf)
  assert math.isnan(got.final_loss)
  nothing = demo.summarize(trained([math.nan] * 2, [math.nan] * 2))
  assert math.isnan(nothing.lowest_loss)
  assert math.isnan(nothing.median_norm)


def test_conclusion_in_full():
  best = summary(4.851, 1.747, "max_norm 0.25", steps=300, clipped_steps=299)
  others = [summary(4.851, 11.3), best]
  assert demo.conclusion([free(4.851, 445.9), *others]) == (
    "Clipping helped: the loss fell from 4.85 to 1.75 with max_norm 0.25, and rose from 4.85 to 446 without clipping "
    "(mean of the last 10 steps). Without clipping, the gradient norm had a median of 0.5 and reached 1,234; with "
    "max_norm 0.25, 299 of 300 steps were clipped."
  )


@pytest.mark.parametrize(
  ("unclipped", "clipped", "text"),
  [
    (free(5.0, 1.0), summary(5.0, 2.0), "Clipping did not help: the loss fell from 5 to 2 with max_norm 1, and fell"),
    (free(5.0, 2.0), summary(5.0, 2.001), "Clipping made no difference to the final loss: the loss fell from 5 to 2"),
    (free(5.0, 5.001), summary(5.0, 9.0), "Clipping did not help: the loss rose from 5 to 9 with max_norm 1, and stay"),
    (free(5.0, math.nan), summary(5.0, 9.0), "Clipping helped: the loss rose from 5 to 9 with max_norm 1, and went f"),
    (free(5.0, math.inf), summary(5.0, math.nan), "Clipping did not help: the loss went from 5 to nan with max_norm 1"),
    (free(5.0, math.nan), summary(5.0, math.nan), "Clipping made no difference to the final loss: the loss went from"),
    (free(5.0, 1e9), summary(math.nan, 3.0), "Clipping helped: the loss went from nan to 3 with max_norm 1, and rose"),
  ],
)
def test_conclusion_is_true_whichever_way_the_runs_go(unclipped, clipped, text):
  assert demo.conclusion([unclipped, clipped]).startswith(text)


def test_conclusion_takes_a_finite_run_for_the_best():
  got = demo.conclusion([free(5.0, 3.0), summary(5.0, math.nan), summary(5.0, 9.0, "max_norm 0.25")])
  assert "rose from 5 to 9 with max_norm 0.25" in got


@pytest.mark.parametrize(
  ("x", "text"),
  [(0.0, "0"), (0.25, "0.25"), (445.91, "446"), (999.6, "1,000"), (545053.2, "545,053"), (1.366e11, "1.37e+11")],
)
def test_numbers_are_short(x, text):
  assert demo.short(x) == text


def shown(width, encoding, draw, terminal=True):
  """What `draw(console)` prints at this width and encoding; a character that cannot be encoded raises."""
  raw = io.BytesIO()
  file = io.TextIOWrapper(raw, encoding=encoding, newline="")
  draw(Console(file=file, width=width, force_terminal=terminal, color_system=None, markup=False, highlight=False))
  file.flush()
  return raw.getvalue().decode(encoding)


def show_progress(console):
  values = {"loss": 445.9123, "grad/norm": 1.366e11, "grad/clip_fraction": 0.9767}
  with demo._reporter(console, 300) as report:
    for step in range(10, 301, 10):
      report("max_norm 0.25", step, values)


def test_live_bars_fit_a_terminal_of_80_columns():
  last = shown(80, "utf-8", show_progress).split("\x1b[2K")[-1].splitlines()[:3]
  assert [line[:13].strip() for line in last] == ["no clipping", "max_norm 1", "max_norm 0.25"]
  assert last[2].endswith(" 300/300 loss 446, norm 1.37e+11, clipped 97.7%")
  assert max(map(len, last)) <= 80


@pytest.mark.parametrize("width", [80, 30, 8])
def test_an_ascii_terminal_of_any_width_gets_ascii(width):
  def show(console):
    show_progress(console)
    console.print(demo.table([free(largest_norm=1.366e11)], console), crop=False)

  # `shown` encodes strictly: any other character raises.
  row = shown(width, "ascii", show).splitlines()[-1]
  cells = [cell.strip() for cell in row.split("|")]
  assert cells == ["no clipping", "2", "1", "1.37e+11", "0.5", "15.0%", "0", "1.0 s"]


def test_the_table_fits_80_columns():
  text = shown(80, "utf-8", lambda console: console.print(demo.table([WIDE, free()], console), crop=False))
  assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_without_a_terminal_there_are_plain_lines_only():
  values = "loss 446, norm 1.37e+11, clipped 97.7%"
  assert shown(20, "utf-8", show_progress, terminal=False).splitlines() == [
    f"max_norm 0.25: step {step} of 300, {values}" for step in (100, 200, 300)
  ]


# Writing ------------------------------------------------------------------------------------------------------------


def test_json_keeps_every_number_and_has_null_for_the_rest():
  run = trained([5.0, math.inf, math.nan], [2.0, math.inf, math.nan], math.inf)
  got = json.loads(training.to_json([run], 7), parse_constant=pytest.fail)
  assert (got["seed"], got["clipjax"]) == (7, clipjax.__version__)
  assert got["runs"][0]["max_norm"] is None
  assert got["runs"][0]["series"]["loss"] == [5.0, None, None]
  assert got["runs"][0]["series"]["grad/norm"] == [2.0, None, None]


def test_picture_shows_series_limits_and_clipped_steps():
  three = [trained([5.0, 6.0], [3.0, 0.1], math.inf), trained([5.0, 4.0], [3.0, 0.5]), trained([5.0, 3.0], [3.0, 2.0])]
  top, bottom = picture.picture(three).axes
  assert [axes.get_yscale() for axes in (top, bottom)] == ["log", "log"]
  assert top.get_ylabel() == "Loss (nats per character)"
  assert (bottom.get_ylabel(), bottom.get_xlabel()) == ("Gradient norm before the clip", "Step")
  assert len(top.get_legend().texts) == 3
  assert len(bottom.get_legend().texts) == 7
  assert [line.get_ydata().tolist() for line in top.lines] == [[5, 6], [5, 4], [5, 3]]
  by_label = {}
  for line in bottom.lines:
    by_label.setdefault(line.get_label(), []).append(line)
  assert by_label["no clipping"][0].get_ydata().tolist() == [3.0, 0.1]
  assert by_label["limit 1"][0].get_ydata() == [1.0, 1.0]
  assert [line.get_xdata().tolist() for line in by_label["clipped at 1"]] == [[1], [1, 2]]


@pytest.mark.parametrize("bad", [[math.nan] * 3, [2.0, math.inf, 0.0], [1e-40, math.nan, 3e38]])
def test_picture_leaves_gaps_for_what_a_log_axis_cannot_show(tmp_path, bad):
  figure = picture.picture([trained(bad, bad, c) for c in training.MAX_NORMS])
  figure.savefig(tmp_path / "x.png")
  want = [math.isfinite(x) and x > 0 for x in bad]
  assert np.isfinite(figure.axes[0].lines[0].get_ydata()).tolist() == want


# The command line ---------------------------------------------------------------------------------------------------


def test_demo_in_ascii_without_a_terminal(tmp_path, monkeypatch, capsys):
  for name in FORCES_A_TERMINAL:
    monkeypatch.delenv(name, raising=False)
  stdout, out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline=""), tmp_path / "größe"
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", stdout)
    assert cli.main(["demo", "--steps", "30", "--seed", "4294967295", "--out", str(out)]) == 0
  stdout.flush()
  text = stdout.buffer.getvalue().decode("ascii")
  assert capsys.readouterr() == ("", "")
  assert "\x1b" not in text and "\r" not in text and len(text.splitlines()) < 60
  assert "max_norm 0.25: step 30 of 30, loss " in text
  shown_out = str(out).encode("ascii", "backslashreplace").decode()
  assert f"Wrote {shown_out}/clipjax_demo.png and {shown_out}/clipjax_demo.json\n" in text
  assert text.endswith(f"Wrote {shown_out}/clipjax_demo_run.jsonl and the report {shown_out}/clipjax_demo_run.html\n")
  # The three runs.
  names = ["clipjax_demo.json", "clipjax_demo.png", "clipjax_demo_run.html", "clipjax_demo_run.jsonl"]
  assert sorted(path.name for path in out.iterdir()) == names
  assert (out / "clipjax_demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
  series = json.loads((out / "clipjax_demo.json").read_text())["runs"]
  assert [run["max_norm"] for run in series] == [None, 1.0, 0.25]
  assert {len(values) for run in series for values in run["series"].values()} == {30}
  # The recorded run and the advice.
  run = clipjax.runs.read_run(out / "clipjax_demo_run.jsonl")
  assert run.steps.tolist() == list(range(1, 31))
  assert {"loss", "grad/norm", "grad/norm/recurrent", "update/ratio/recurrent", "tokens"} <= set(run.keys())
  assert run.parameters == 128 * 128 * 3 + 128 * 2
  assert not np.any(run["grad/scale"] != 1)  # It is unclipped.
  suggested = clipjax.runs.suggest_max_norm(run, learning_rate=0.25, new_learning_rate=2.0, model="rnn")
  assert str(suggested) in text and "With this threshold and a rate of 2, the loss went from " in text
  assert f">max_norm = {number(suggested.max_norm)}<" in (out / "clipjax_demo_run.html").read_text()


@pytest.mark.parametrize(
  ("args", "want"), [([], (Path(), 300, 0)), (["--steps", "2", "--seed", "3", "--out", "x"], (Path("x"), 2, 3))]
)
def test_demo_hands_its_options_on(args, want, monkeypatch):
  calls = []
  for part in (demo, advice):
    monkeypatch.setattr(part, "run", lambda *given: calls.append(given))
  assert cli.main(["demo", *args]) == 0
  assert calls == [want] * 2


@pytest.mark.parametrize(
  ("option", "value", "message"),
  [
    ("--steps", "0", "must be >= 1, got 0"),
    ("--steps", "many", "must be a whole number, got 'many'"),
    ("--seed", "4294967296", "must be >= 0 and <= 4294967295, got 4294967296"),
  ],
)
def test_wrong_arguments(option, value, message, capsys):
  with pytest.raises(SystemExit, match="2"):
    cli.main(["demo", option, value])
  assert capsys.readouterr().err.endswith(f"\nclipjax demo: error: argument {option}: {message}\n")


OVERWRITE = "the demo would overwrite '{}', which it did not write: name another directory with --out"


def refuse(dir):  # A mode would not keep root from writing.
  raise PermissionError(errno.EACCES, "Permission denied", str(dir))


@pytest.mark.parametrize(
  ("out", "line"),
  [
    ("clipjax_demo.png/x", "cannot write clipjax_demo.png/x: Not a directory"),
    ("read only", "cannot write read only: Permission denied"),
    ("run", OVERWRITE.format(f"run/{advice._RECORD}")),
    ("page", OVERWRITE.format(f"page/{advice._PAGE}")),
  ],
)
def test_a_folder_unfit_for_the_files_is_reported_before_the_training(out, line, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(demo, "train_all", lambda *_: pytest.fail("trained first"))
  if out == "read only":
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
  mine = [Path("clipjax_demo.png"), Path("run", advice._RECORD), Path("page", advice._PAGE)]
  for path in mine:
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
  assert cli.main(["demo", "--out", out]) == 2
  assert capsys.readouterr() == ("", f"clipjax: {line}\n")
  assert {path.read_text() for path in mine} == {"mine"}


def test_an_interrupt_leaves_no_traceback(monkeypatch, tmp_path):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(demo, "train_all", interrupt)
  assert cli.main(["demo", "--out", str(tmp_path)]) == 130
  assert list(tmp_path.iterdir()) == []
