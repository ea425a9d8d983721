"""The demo and the command line. No test asserts a loss: the text, and with it every loss, changes with Python."""

import errno
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import clipjax
from clipjax import cli
from clipjax.demo import compare as demo
from clipjax.demo import model, picture, training
from clipjax.runs.words import number

STEPS = 12
FORCES_A_TERMINAL = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")  # What rich takes for one.
ROOT = str(Path(clipjax.__file__).parents[1])


@pytest.fixture(scope="module")
def reports():
  return []


@pytest.fixture(scope="module")
def runs(reports):
  return training.train_all(STEPS, 0, lambda *args: reports.append(args))


def run_python(*args, **env):
  env = {**os.environ, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", **env}
  for name in FORCES_A_TERMINAL:
    env.pop(name, None)
  return subprocess.run([sys.executable, *args], env=env, capture_output=True, timeout=100, check=False)


def trained(loss, norm, max_norm=1.0):
  """A run with these series, in which every finite norm above `max_norm` was clipped."""
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


def test_every_run_has_a_value_for_every_step(runs):
  assert [run.max_norm for run in runs] == list(training.MAX_NORMS)
  for run in runs:
    assert {"loss", "grad/norm", "grad/norm_clipped", "grad/scale", "grad/clip_fraction"} <= set(run.series)
    assert {values.shape for values in run.series.values()} == {(STEPS,)}
    assert run.series["grad/steps"].tolist() == list(range(1, STEPS + 1))
    assert run.seconds > 0


def test_the_clipped_norm_is_bounded_and_the_unclipped_run_is_only_measured(runs):
  unclipped, *clipped = runs
  assert np.all(unclipped.series["grad/scale"] == 1)
  assert np.array_equal(unclipped.series["grad/norm"], unclipped.series["grad/norm_clipped"])
  for run in clipped:
    assert np.all(run.series["grad/max_norm"] == run.max_norm)
    assert np.all(run.series["grad/norm_clipped"] <= run.max_norm * (1 + 1e-6))
    assert np.any(run.series["grad/scale"] < 1)


def test_the_runs_differ_in_the_threshold_alone(runs):
  assert len({run.series["loss"][0] for run in runs}) == 1
  assert len({run.series["grad/norm"][0] for run in runs}) == 1
  assert len({run.series["loss"][-1] for run in runs}) == len(runs)


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
    "(mean of the last 10 steps). The norm of the unclipped gradient had a median of 0.5 and reached 1,234; with "
    "max_norm 0.25, 299 of 300 steps were clipped."
  )


@pytest.mark.parametrize(
  ("unclipped", "clipped", "start"),
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
def test_conclusion_is_true_whichever_way_the_runs_go(unclipped, clipped, start):
  assert demo.conclusion([unclipped, clipped]).startswith(start)


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
  """The text that `draw(console)` leaves in a console of this width and encoding; what cannot be encoded raises."""
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
  lines = shown(
    80, "utf-8", lambda console: console.print(demo.table([WIDE, free()], console), crop=False)
  ).splitlines()
  assert max(len(line.rstrip()) for line in lines) <= 80


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


@pytest.mark.parametrize(
  "bad", [[math.nan] * 3, [math.inf] * 3, [0.0] * 3, [2.0, math.nan, 3e38], [math.nan, 1e-40, 1]]
)
def test_picture_leaves_gaps_for_what_a_log_axis_cannot_show(tmp_path, bad):
  figure = picture.picture([trained(bad, bad, c) for c in training.MAX_NORMS])
  figure.savefig(tmp_path / "x.png")
  want = [math.isfinite(x) and x > 0 for x in bad]
  assert np.isfinite(figure.axes[0].lines[0].get_ydata()).tolist() == want


def assert_demo_files(out, steps):
  png = (out / "clipjax_demo.png").read_bytes()
  assert png.startswith(b"\x89PNG\r\n\x1a\n")
  assert len(png) > 10_000
  series = json.loads((out / "clipjax_demo.json").read_text())["runs"]
  assert [run["max_norm"] for run in series] == [None, 1.0, 0.25]
  assert {len(values) for run in series for values in run["series"].values()} == {steps}
  names = ["clipjax_demo.json", "clipjax_demo.png", "clipjax_demo_run.html", "clipjax_demo_run.jsonl"]
  assert sorted(path.name for path in out.iterdir()) == names
  run = clipjax.runs.read_run(out / "clipjax_demo_run.jsonl")
  assert run.steps.tolist() == list(range(1, steps + 1))
  assert {"loss", "grad/norm", "grad/norm/recurrent", "update/ratio/recurrent", "tokens"} <= set(run.keys())
  assert run.parameters == 128 * 128 * 3 + 128 * 2
  assert not np.any(run["grad/scale"] != 1)  # It is unclipped.
  assert "Suggested threshold" in (out / "clipjax_demo_run.html").read_text()


# The command line ---------------------------------------------------------------------------------------------------


def test_demo_in_ascii_without_a_terminal(tmp_path):
  out = tmp_path / "neu"
  args = ["-m", "clipjax", "demo", "--steps", "30", "--out", str(out)]
  got = run_python(*args, PYTHONIOENCODING="ascii", LC_ALL="C", NO_COLOR="1", TERM="xterm", COLUMNS="80")
  assert (got.returncode, got.stderr) == (0, b"")
  text = got.stdout.decode("ascii")
  assert "\x1b" not in text
  assert "\r" not in text.replace("\r\n", "\n")
  assert "max_norm 0.25: step 30 of 30, loss " in text
  assert f"Wrote {out / 'clipjax_demo.png'} and {out / 'clipjax_demo.json'}" in text
  run = clipjax.runs.read_run(out / "clipjax_demo_run.jsonl")
  suggested = clipjax.runs.suggest_max_norm(run, learning_rate=0.25, new_learning_rate=2.0, model="rnn")
  assert str(suggested) in text
  assert f">max_norm = {number(suggested.max_norm)}<" in (out / "clipjax_demo_run.html").read_text()
  assert "With it, at a rate of 2, the loss went from " in text
  assert text.endswith(f"the report {out / 'clipjax_demo_run.html'}\n")
  assert len(text.splitlines()) < 60
  assert_demo_files(out, 30)


def test_demo_in_process(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in FORCES_A_TERMINAL:
    monkeypatch.delenv(name, raising=False)
  assert cli.main(["demo", "--steps", "2", "--seed", "4294967295"]) == 0
  captured = capsys.readouterr()
  assert "Wrote clipjax_demo.png and clipjax_demo.json\n" in captured.out
  assert captured.out.endswith("Wrote clipjax_demo_run.jsonl and the report clipjax_demo_run.html\n")
  assert captured.err == ""
  assert_demo_files(tmp_path, 2)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--steps", "0"], "argument --steps: must be >= 1, got 0"),
    (["--steps", "many"], "argument --steps: must be a whole number, got 'many'"),
    (["--seed", "-1"], "argument --seed: must be >= 0 and <= 4294967295, got -1"),
  ],
)
def test_wrong_arguments(args, message, capsys):
  with pytest.raises(SystemExit) as exit_info:
    cli.main(["demo", *args])
  assert exit_info.value.code == 2
  assert capsys.readouterr().err.splitlines()[-1] == f"clipjax demo: error: {message}"


def test_a_directory_that_cannot_be_written_to_is_told_before_the_training(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(demo, "train_all", lambda *_: pytest.fail("trained first"))
  (tmp_path / "file").touch()
  assert cli.main(["demo", "--out", str(tmp_path / "file" / "x")]) == 2
  assert capsys.readouterr() == ("", f"clipjax: cannot write {tmp_path / 'file' / 'x'}: Not a directory\n")
  assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
  assert capsys.readouterr() == ("", f"clipjax: cannot write {tmp_path / 'file'}: File exists\n")


def test_a_read_only_directory_is_told_before_the_training(tmp_path, capsys, monkeypatch):
  # A mode would not keep root from writing.
  def refuse(dir):
    raise PermissionError(errno.EACCES, "Permission denied", str(dir))

  monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
  monkeypatch.setattr(demo, "train_all", lambda *_: pytest.fail("trained first"))
  assert cli.main(["demo", "--out", str(tmp_path)]) == 2
  assert capsys.readouterr() == ("", f"clipjax: cannot write {tmp_path}: Permission denied\n")


def test_a_file_that_cannot_be_written(tmp_path, capsys, monkeypatch, runs):
  monkeypatch.setattr(demo, "train_all", lambda *_: runs)
  (tmp_path / "clipjax_demo.json").mkdir()
  assert cli.main(["demo", "--out", str(tmp_path)]) == 2
  assert capsys.readouterr().err == f"clipjax: cannot write {tmp_path / 'clipjax_demo.json'}: Is a directory\n"


@pytest.mark.parametrize("name", ["clipjax_demo_run.jsonl", "clipjax_demo_run.html"])
def test_a_file_that_the_demo_did_not_make_is_kept(name, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(demo, "train_all", lambda *_: pytest.fail("trained first"))
  (tmp_path / name).write_text("mine")
  assert cli.main(["demo", "--out", str(tmp_path)]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    f"clipjax: the demo writes {str(tmp_path / name)!r}, a file that it did not make: name another folder with --out"
  )
  assert (tmp_path / name).read_text() == "mine"


def test_an_interrupt_leaves_no_traceback(monkeypatch, tmp_path):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(demo, "train_all", interrupt)
  assert cli.main(["demo", "--out", str(tmp_path)]) == 130
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_extra_is_one_line(package, tmp_path):
  code = f"import sys; sys.modules['{package}'] = None; from clipjax.__main__ import main; sys.exit(main())"
  got = run_python("-c", code, "demo", "--out", str(tmp_path))
  assert (got.returncode, got.stdout) == (2, b"")
  (line,) = got.stderr.decode().splitlines()
  assert line.startswith("clipjax: the demo needs more packages, pip install 'clipjax[demo]' (")
  assert package in line


def test_no_command_prints_the_help(capsys):
  assert cli.main([]) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("usage: clipjax ")
  assert "demo" in captured.err


@pytest.mark.parametrize("args", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version_do_not_load_the_extra(args):
  code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from clipjax.__main__ import main; main()"
  got = run_python("-c", code, *args)
  *text, modules = got.stdout.decode().splitlines()
  assert (got.returncode, got.stderr) == (0, b"")
  assert text[0].startswith("usage: clipjax" if "--help" in args else f"clipjax {clipjax.__version__}")
  assert "clipjax.__main__" in modules.split()
  assert not {"rich", "matplotlib"} & set(modules.split())


def test_the_demo_loads_no_pyplot():
  got = run_python(
    "-c", "import sys, clipjax.demo.compare; print('jax' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
  )
  assert got.stdout.decode().split() == ["True", "False"]
