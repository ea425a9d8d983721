"""`clipjax diagnose`, `report` and `suggest`: output, exit status, and one line on stderr for every error."""

import io
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import clipjax
from clipjax import cli
from clipjax.runs import suggest
from clipjax.runs.report import write as write_module
from clipjax.runs.report.own_pages import START

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = ["diagnose", "report", "suggest"]
HEADER = '{"clipjax_run": 1, "version": "0.1.0", "leaves": {}, "parameters": 12, "every": 1}'
ADAM = HEADER.replace('"leaves"', '"optimizer": ["ScaleByAdamState"], "leaves"')
NORMS = np.exp(np.random.default_rng(0).normal(0, 0.2, 300)).tolist()


def write(path, norms, header=HEADER, **columns):
  rows = [{"step": i, "grad/norm": x, **{key: y[i] for key, y in columns.items()}} for i, x in enumerate(norms)]
  path.write_text("\n".join([header, *map(json.dumps, rows)]) + "\n", encoding="utf-8")
  return path


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A run of Adam in the current folder."""
  monkeypatch.chdir(tmp_path)
  return write(pathlib.Path("run.jsonl"), NORMS, ADAM)


@pytest.fixture
def pages(monkeypatch):
  """A stand-in for `write_report`; its calls."""
  calls = []

  def write_report(run, path, *, limits, warmup_steps):
    calls.append((run.path, str(path), limits, warmup_steps))
    pathlib.Path(path).write_text(START)
    return pathlib.Path(path)

  monkeypatch.setattr(write_module, "write_report", write_report)
  return calls


def failure(capsys, *args):
  """The line on stderr of a call that fails with status 2 and prints nothing else."""
  assert cli.main([*args]) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  (line,) = captured.err.splitlines()
  assert line.startswith("clipjax: ")
  return line.removeprefix("clipjax: ")


# suggest ------------------------------------------------------------------------------------------------------------

RATES = ["--learning-rate", "0.1", "--new-learning-rate", "1e0"]
SUGGESTIONS = {
  "no option": ([], {}),
  "Adam": (["--scale-free"], {"scale_free": True}),
  "the warm-up": (["--warmup-steps", "290"], {"warmup_steps": 290}),
  "all of SGD": (
    ["--model", "transformer", *RATES, "--no-scale-free"],
    {"model": "transformer", "learning_rate": 0.1, "new_learning_rate": 1.0, "scale_free": False},
  ),
}


@pytest.mark.parametrize("case", SUGGESTIONS)
def test_suggest_prints_the_suggestion_of_the_library(case, run, capsys):
  args, options = SUGGESTIONS[case]
  want = clipjax.runs.suggest_max_norm(clipjax.runs.read_run(run), **options)
  assert want.scale_free is (case != "all of SGD")
  assert cli.main(["suggest", str(run), *args]) == 0
  assert capsys.readouterr() == (f"{want}\n", "")


def test_suggest_says_a_wrong_option_in_one_line(run, capsys):
  line = failure(capsys, "suggest", str(run), "--learning-rate", "1")
  assert line.startswith("`learning_rate` and `new_learning_rate` must be given both or neither, got 1.0 and None")


# diagnose, report, exit status --------------------------------------------------------------------------------------


def test_diagnose_prints_the_verdict_and_writes_nothing(run, capsys):
  assert cli.main(["diagnose", str(run)]) == 0
  assert capsys.readouterr() == (f"{clipjax.runs.diagnose(clipjax.runs.read_run(run))}\n", "")
  assert os.listdir() == ["run.jsonl"]


@pytest.mark.parametrize(("args", "page"), [([], "run.html"), (["-o", "a.htm"], "a.htm")])
def test_report_prints_the_verdict_and_the_path_of_the_page(args, page, run, pages, capsys):
  assert cli.main(["report", str(run), *args]) == 0
  assert capsys.readouterr() == (f"{clipjax.runs.diagnose(clipjax.runs.read_run(run))}\n\nWrote {page}\n", "")
  assert pages == [("run.jsonl", page, clipjax.runs.HealthLimits(), None)]


@pytest.mark.parametrize("command", ["diagnose", "report"])
def test_the_exit_status_is_1_for_a_fail(command, tmp_path, pages, capsys):
  losses, bad = ([x] * 60 for x in (2.0, {}))
  losses[30], bad[30] = None, {"loss": "nan"}
  run = write(tmp_path / "run.jsonl", NORMS[:60], loss=losses, nonfinite=bad)
  assert cli.main([command, str(run)]) == 1
  captured = capsys.readouterr()
  assert "FAIL  nonfinite-loss" in captured.out and captured.err == ""
  assert len(pages) == (command == "report")


@pytest.mark.parametrize("command", ["diagnose", "report"])
def test_limits_and_warm_up_are_those_of_the_library(command, tmp_path, pages, capsys):
  run = write(tmp_path / "zeros.jsonl", NORMS, **{"grad/zero_fraction": [0.7] * 300})
  read = clipjax.runs.read_run(run)
  args = ["--limit", "zero_fraction=0.9", "--limit=min_steps=5", "--limit", "norm_high=inf", "--warmup-steps", "7"]
  assert cli.main([command, str(run), *args]) == 0
  limits = clipjax.runs.HealthLimits(zero_fraction=0.9, min_steps=5, norm_high=math.inf)
  report = clipjax.runs.diagnose(read, limits=limits, warmup_steps=7)
  assert capsys.readouterr().out.startswith(f"{report}\n")
  assert "WARN  zeros" in str(clipjax.runs.diagnose(read)) and "WARN  zeros" not in str(report)
  assert [rest for _, _, *rest in pages] == [[limits, 7]] * (command == "report")


@pytest.mark.parametrize(
  ("given", "line"),
  [
    ("clip_fractoin=1", "--limit must be NAME=VALUE, got 'clip_fractoin=1': NAME can be clip_fraction"),
    ("clip_fraction", "--limit clip_fraction must be a number, got '': pass one such as 0.5"),
    ("min_steps=2.5", "--limit min_steps must be a number, got '2.5': pass one such as 20"),
    ("min_steps=0", "--limit min_steps must be a whole number >= 1, got 0: pass one such as 20."),
    ("\x1b[31m\u202e=1", "--limit must be NAME=VALUE, got '\\x1b[31m\\u202e=1': NAME can be "),
  ],
)
def test_a_wrong_limit_is_one_line(given, line, run, pages, capsys):
  assert failure(capsys, "report", str(run), "--limit", given).startswith(line)
  assert pages == []


# Files --------------------------------------------------------------------------------------------------------------


OVER_RUN = "the report must not be the file of the run, got 'run.html': name another file with -o"
NO_PAGE = (
  "the report must be a new file or a page that clipjax wrote, got '{}', which is neither: name another file with -o"
)


@pytest.mark.parametrize(
  ("args", "line"),
  [
    (["run.html"], OVER_RUN),
    (["run.html", "-o", "run.html"], OVER_RUN),
    (["run.jsonl"], NO_PAGE.format("run.html")),
    (["run.jsonl", "-o", "a.txt"], NO_PAGE.format("a.txt")),
  ],
)
def test_only_a_page_of_clipjax_is_overwritten(args, line, run, pages, capsys):
  run.rename(args[0])
  for name in {"run.html", "a.txt"} - {args[0]}:
    pathlib.Path(name).write_text("<!DOCTYPE html>\n<title>Mine</title>")
  before = {name: pathlib.Path(name).read_bytes() for name in os.listdir()}
  assert failure(capsys, "report", *args) == line
  assert {name: pathlib.Path(name).read_bytes() for name in os.listdir()} == before
  assert pages == []


def test_a_page_of_clipjax_is_overwritten(run):
  page = run.with_suffix(".html")
  page.write_text(START)
  assert cli.main(["report", str(run)]) == 0
  assert "Training run run.jsonl" in page.read_text()


def test_a_report_that_cannot_be_written_is_one_line(run, pages, capsys):
  assert cli.main(["report", str(run), "-o", "."]) == 2
  captured = capsys.readouterr()
  assert captured.err == "clipjax: cannot write .: Is a directory\n" and "Wrote" not in captured.out


FILES = {
  "no file": (None, "cannot read {}: there is no such file"),
  "text": (
    b"hello\nworld\n",
    "`path` must be a file that `clipjax.runs.Recorder` wrote, got {!r}, which has no Recorder heade",
  ),
  "empty": (b"", "`path` must be a file that `clipjax.runs.Recorder` wrote, got {!r}, which is empty: "),
  "deep": (
    b"[" * 100_000,
    "`path` must be a file that `clipjax.runs.Recorder` wrote, got {!r}, which has no Recorder header",
  ),
  "a later format": (b'{"clipjax_run": 99}\n{"step": 1}\n', "`path` must be "),
  "number beyond float64": (
    b'{"clipjax_run": 1, "leaves": {}}\n{"step": 1, "loss": 1' + b"0" * 400 + b"}\n",
    "`path` must be a file that `clipjax.runs.Recorder` wrote, got {!r}, which has malformed rows (OverflowError",
  ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_run_is_one_line(case, tmp_path, capsys):
  content, line = FILES[case]
  path = tmp_path / "run.jsonl"
  if content is not None:
    path.write_bytes(content)
  found = failure(capsys, "suggest", str(path))
  assert found.startswith(line.format(str(path))) and str(path) in found


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
  ("path", "line"),
  [(".", "got the directory "), ("/", "got the directory "), ("run.jsonl/x", "cannot read run.jsonl/x: Not a dir")],
)
def test_a_path_that_is_no_file_is_one_line(command, path, line, run, capsys):
  assert line in failure(capsys, command, path)


# What is printed ----------------------------------------------------------------------------------------------------


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
  header = HEADER.replace('"leaves": {}', '"leaves": {"grad": ["\\u001b[2Ja\\u202eb", "b"]}')
  evil = "\x1b]0;x\x07\r\n\u202e\u2028.jsonl"
  run = write(tmp_path / evil, [1.0] * 40, header, leaf=[{"grad/norm": [0.0, 1.0]}] * 40)
  for command, status in (("diagnose", 1), ("report", 1), ("suggest", 0)):  # A leaf without a gradient is a FAIL.
    assert cli.main([command, str(run)]) == status
    out = capsys.readouterr().out
    assert all(c == "\n" or c.isprintable() for c in out)
    assert (r"\x1b[2Ja\u202eb" in out) == (status == 1)
    assert command != "report" or out.endswith(rf"Wrote {tmp_path}/\x1b]0;x\x07\r\n\u202e\u2028.html" + "\n")


@pytest.mark.parametrize(("encoding", "letter"), [("utf-8", "ö"), ("ascii", r"\xf6")])
def test_each_line_is_escaped_for_the_terminal_and_its_encoding(encoding, letter, monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
  cli._print("\x1b[31mö\u202e\nb\r")
  assert raw.getvalue().decode(encoding) == rf"\x1b[31m{letter}" + (r"\u202e" + "\n" + r"b\r" + "\n")


def test_an_error_cannot_write_to_the_terminal(capsys):
  line = failure(capsys, "suggest", "a\x1b[31m\n\u202e.jsonl")
  assert line.isprintable() and r"\x1b[31m\n\u202e" in line
  with pytest.raises(SystemExit):
    cli.main(["suggest", "run.jsonl", "--\x1b[31m"])
  err = capsys.readouterr().err
  assert "\x1b" not in err and r"\x1b[31m" in err


def test_a_closed_stdout_is_one_line(run, monkeypatch, capsys):
  monkeypatch.setattr(sys, "stdout", None)
  assert failure(capsys, "suggest", str(run)) == "cannot write the output: Bad file descriptor"


def python(*args, **options):
  command, env = [sys.executable, *args], os.environ | {"PYTHONPATH": str(ROOT)}
  return subprocess.run(command, env=env, stderr=subprocess.PIPE, check=False, **options)


def test_a_reader_of_stdout_that_stops_is_no_error(run):
  stop, write_end = os.pipe()
  os.close(stop)
  got = python("-m", "clipjax", "suggest", str(run), stdout=write_end)
  os.close(write_end)
  assert (got.returncode, got.stderr) == (141, b"")


# Help and what is loaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([command, "--help"] for command in (*COMMANDS, "demo"))])
def test_help_and_version(args, capsys):
  with pytest.raises(SystemExit) as exit_info:
    cli.main(args)
  out = capsys.readouterr().out
  assert exit_info.value.code == 0
  assert out.startswith(f"clipjax {clipjax.__version__}\n" if "--version" in args else "usage: clipjax ")
  if "suggest" in args:
    *names, last = suggest.FAMILIES
    assert f"{', '.join(names)} or {last}" in " ".join(out.split())


def test_no_command_prints_the_help_with_every_command(capsys):
  assert cli.main([]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.startswith("usage: clipjax ")
  assert all(f"\n    {command} " in captured.err for command in ("demo", *COMMANDS))


def test_the_command_line_loads_no_extra(run):
  code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from clipjax.__main__ import main; main()"
  got = python("-c", code, "suggest", str(run), stdout=subprocess.PIPE)
  assert (got.returncode, got.stderr) == (0, b"")
  modules = set(got.stdout.decode().splitlines()[-1].split())
  assert {"clipjax.cli", "clipjax.runs.suggest"} <= modules and not {"matplotlib", "rich"} & modules


MISSING = {
  "demo": "the demo needs more packages: pip install 'clipjax[demo]' (import of clipjax.demo.compare halted",
  "report": "the report needs more packages: pip install 'clipjax[report]' (no matplotlib)",
}


@pytest.mark.parametrize("command", MISSING)
def test_a_missing_extra_is_one_line(command, run, monkeypatch, capsys):
  def refuse(*_, **__):
    raise ImportError("two\nlines", name="matplotlib.figure")

  monkeypatch.setattr(write_module, "write_report", refuse)
  monkeypatch.setitem(sys.modules, "clipjax.demo.compare", None)
  monkeypatch.delattr("clipjax.demo.compare", raising=False)
  assert cli.main([command, *([str(run)] if command == "report" else [])]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"clipjax: {MISSING[command]}")
