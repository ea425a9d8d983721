"""`clipjax diagnose`, `report` and `suggest`: what they print, exit status, one line for whatever is wrong."""

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
from clipjax.runs.report.mark import START

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = ["diagnose", "report", "suggest"]
HEADER = '{"clipjax_run": 1, "version": "0.1.0", "leaves": {}, "parameters": 12, "every": 1}'


def write(path, norms, header=HEADER, **columns):
  rows = [{"step": i, "grad/norm": x, **{key: y[i] for key, y in columns.items()}} for i, x in enumerate(norms)]
  path.write_text("\n".join([header, *map(json.dumps, rows)]) + "\n", encoding="utf-8")
  return path


@pytest.fixture
def run(tmp_path):
  return write(tmp_path / "run.jsonl", np.exp(np.random.default_rng(0).normal(0, 0.2, 300)).tolist())


@pytest.fixture
def pages(monkeypatch):
  """A stand-in for `write_report`; its calls."""
  calls = []

  def write_report(run, path, *, limits, warmup_steps):
    calls.append((run, path, limits, warmup_steps))
    pathlib.Path(path).write_text(START)
    return pathlib.Path(path)

  monkeypatch.setattr(write_module, "write_report", write_report)
  return calls


def one_line(capsys):
  """The line on stderr, which is all there is."""
  captured = capsys.readouterr()
  assert captured.out == ""
  (line,) = captured.err.splitlines()
  return line


# suggest ------------------------------------------------------------------------------------------------------------


def test_suggest_prints_the_suggestion(run, capsys):
  assert cli.main(["suggest", str(run)]) == 0
  assert capsys.readouterr() == (f"{clipjax.runs.suggest_max_norm(clipjax.runs.read_run(run))}\n", "")


def test_suggest_hands_every_option_on(run, capsys):
  args = ["--model", "transformer", "--learning-rate", "0.1", "--new-learning-rate", "1e0", "--scale-free"]
  assert cli.main(["suggest", str(run), *args]) == 0
  want = clipjax.runs.suggest_max_norm(
    clipjax.runs.read_run(run), model="transformer", learning_rate=0.1, new_learning_rate=1.0, scale_free=True
  )
  assert capsys.readouterr().out == f"{want}\n"


@pytest.mark.parametrize(("args", "scale_free"), [([], None), (["--scale-free"], True), (["--no-scale-free"], False)])
def test_suggest_takes_the_optimizer_from_the_run_unless_told(args, scale_free, tmp_path, capsys):
  header = HEADER.replace('"leaves"', '"optimizer": ["ScaleByAdamState"], "leaves"')
  run = write(tmp_path / "run.jsonl", [1.0] * 60, header)
  assert cli.main(["suggest", str(run), *args]) == 0
  want = clipjax.runs.suggest_max_norm(clipjax.runs.read_run(run), scale_free=scale_free)
  assert capsys.readouterr().out == f"{want}\n"
  assert want.scale_free is (scale_free is not False)


@pytest.mark.parametrize(
  ("args", "text"),
  [
    (["--model", "gan"], "`model` must be one of feed-forward, cnn, rnn, lstm, transformer or None, got 'gan' (str)"),
    (
      ["--learning-rate", "1"],
      "`learning_rate` and `new_learning_rate` must be given both or neither, got 1.0 and None",
    ),
    (["--learning-rate", "1", "--new-learning-rate", "-1"], "`new_learning_rate` must be > 0 and finite, got -1.0"),
  ],
)
def test_suggest_says_wrong_options_in_one_line(args, text, run, capsys):
  assert cli.main(["suggest", str(run), *args]) == 2
  assert one_line(capsys).startswith(f"clipjax: {text}")


def test_suggest_says_in_one_line_that_there_are_no_norms(tmp_path, capsys):
  assert cli.main(["suggest", str(write(tmp_path / "run.jsonl", []))]) == 2
  assert one_line(capsys).startswith("clipjax: `norms_or_run` must have finite norms after the warm-up")


def test_the_help_names_the_families(capsys):
  with pytest.raises(SystemExit):
    cli.main(["suggest", "--help"])
  *names, last = suggest.FAMILIES
  assert f"{', '.join(names)} or {last}" in " ".join(capsys.readouterr().out.split())


# report -------------------------------------------------------------------------------------------------------------


def test_report_prints_findings_and_the_path_of_the_page(run, pages, capsys):
  assert cli.main(["report", str(run)]) == 0
  page = run.with_suffix(".html")
  assert capsys.readouterr() == (f"{clipjax.runs.diagnose(clipjax.runs.read_run(run))}\n\nWrote {page}\n", "")
  ((judged, *rest),) = pages
  assert (judged.path, rest) == (str(run), [page, clipjax.runs.HealthLimits(), None])


def test_report_writes_where_it_is_told(run, pages, tmp_path, capsys):
  assert cli.main(["report", str(run), "-o", str(tmp_path / "a.htm")]) == 0
  assert capsys.readouterr().out.endswith(f"Wrote {tmp_path / 'a.htm'}\n")
  assert pages[0][1] == tmp_path / "a.htm"


def test_report_does_not_overwrite_the_run(run, pages, capsys):
  html = run.rename(run.with_suffix(".html"))
  for args in ([str(html)], [str(html), "-o", str(html)]):
    assert cli.main(["report", *args]) == 2
    assert one_line(capsys).startswith("clipjax: the report must be another file than the run, got ")
  assert html.read_text().startswith(HEADER)
  assert pages == []


def test_a_report_that_cannot_be_written_is_one_line(run, pages, tmp_path, capsys):
  assert cli.main(["report", str(run), "-o", str(tmp_path)]) == 2
  captured = capsys.readouterr()
  assert captured.err == f"clipjax: cannot write {tmp_path}: Is a directory\n"
  assert "Wrote" not in captured.out


def test_a_report_without_matplotlib_is_one_line(run, tmp_path):
  code = "import sys; sys.modules['matplotlib'] = None; from clipjax.__main__ import main; sys.exit(main())"
  got = python("-c", code, "report", str(run))
  assert got.returncode == 2
  (line,) = got.stderr.decode().splitlines()
  assert line == "clipjax: the report needs more packages, pip install 'clipjax[report]' (no matplotlib)"


def test_names_that_stdout_cannot_encode_are_escaped(tmp_path):
  header = HEADER.replace('"leaves": {}', '"leaves": {"grad": ["Größe", "b"]}')
  run = write(tmp_path / "läuf.jsonl", [1.0] * 40, header, leaf=[{"grad/norm": [0.0, 1.0]}] * 40)
  code = (
    "import sys, clipjax.runs; clipjax.runs.report.write.write_report = lambda run, path, **_: path; "
    "from clipjax.__main__ import main; sys.exit(main())"
  )
  got = python("-c", code, "report", str(run), encoding="ascii")
  assert (got.returncode, got.stderr) == (1, b"")  # A leaf whose gradient is zero is a FAIL.
  text = got.stdout.decode("ascii")
  assert r"Gr\xf6\xdfe" in text and r"l\xe4uf.html" in text


# diagnose, limits, exit status ------------------------------------------------------------------------------------


@pytest.fixture
def mostly_zero(tmp_path):
  """A run whose gradient is mostly 0, which is a WARN and no FAIL."""
  norms = np.exp(np.random.default_rng(0).normal(0, 0.2, 300)).tolist()
  return write(tmp_path / "zeros.jsonl", norms, **{"grad/zero_fraction": [0.7] * 300})


@pytest.fixture
def failed(tmp_path):
  """A run with a loss of NaN, which is a FAIL."""
  losses = [2.0] * 150 + [None] + [2.0] * 149
  bad = [{}] * 150 + [{"loss": "nan"}] + [{}] * 149
  return write(tmp_path / "failed.jsonl", [1.0] * 300, loss=losses, nonfinite=bad)


def test_diagnose_prints_the_verdict(mostly_zero, capsys):
  assert cli.main(["diagnose", str(mostly_zero)]) == 0
  report = clipjax.runs.diagnose(clipjax.runs.read_run(mostly_zero))
  assert "WARN  zeros" in str(report)
  assert capsys.readouterr() == (f"{report}\n", "")
  assert list(mostly_zero.parent.iterdir()) == [mostly_zero]


@pytest.mark.parametrize("command", ["diagnose", "report"])
def test_the_exit_status_is_1_where_a_fail_was_found(command, failed, pages, capsys):
  assert cli.main([command, str(failed)]) == 1
  captured = capsys.readouterr()
  assert "FAIL  nonfinite-loss" in captured.out and captured.err == ""
  assert captured.out.endswith("Wrote " + str(failed.with_suffix(".html")) + "\n") == (command == "report")
  assert len(pages) == (command == "report")


@pytest.mark.parametrize("command", ["diagnose", "report"])
def test_limits_and_warm_up_are_those_of_the_library(command, mostly_zero, pages, capsys):
  args = ["--limit", "zero_fraction=0.9", "--limit=min_steps=5", "--limit", "norm_high=inf", "--warmup-steps", "7"]
  assert cli.main([command, str(mostly_zero), *args]) == 0
  out = capsys.readouterr().out
  limits = clipjax.runs.HealthLimits(zero_fraction=0.9, min_steps=5, norm_high=math.inf)
  report = clipjax.runs.diagnose(clipjax.runs.read_run(mostly_zero), limits=limits, warmup_steps=7)
  assert out.startswith(f"{report}\n")
  assert "WARN  zeros" not in out and "the warm-up of 7 steps" in " ".join(out.split())
  assert [rest for _, _, *rest in pages] == [[limits, 7]] * (command == "report")


def test_a_suggestion_takes_the_warm_up(run, capsys):
  assert cli.main(["suggest", str(run), "--warmup-steps", "290"]) == 0
  assert capsys.readouterr().out == f"{clipjax.runs.suggest_max_norm(clipjax.runs.read_run(run), warmup_steps=290)}\n"


@pytest.mark.parametrize("command", ["diagnose", "report"])
@pytest.mark.parametrize(
  ("given", "line"),
  [
    ("clip_fractoin=1", "--limit must be NAME=VALUE, got 'clip_fractoin=1': a name is clip_fraction"),
    ("clip_fraction", "--limit clip_fraction must be a number, got '': pass one such as 0.5"),
    ("rise=much", "--limit rise must be a number, got 'much': pass one such as 3.0"),
    ("min_steps=2.5", "--limit min_steps must be a number, got '2.5': pass one such as 20"),
    ("min_steps=0", "--limit min_steps must be a whole number >= 1, got 0: pass one such as 20."),
    ("rise=nan", "--limit rise must be a number >= 0, got nan: pass one such as 3.0."),
    ("\x1b[31m\u202e=1", "--limit must be NAME=VALUE, got '\\x1b[31m\\u202e=1': a name is "),
  ],
)
def test_a_wrong_limit_is_one_line(command, given, line, run, pages, capsys):
  assert cli.main([command, str(run), "--limit", given]) == 2
  assert one_line(capsys).startswith(f"clipjax: {line}")
  assert pages == []


# Names of files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.html", "a.txt"])
def test_a_file_that_clipjax_did_not_make_is_not_overwritten(name, run, pages, capsys):
  other = run.with_name(name)
  other.write_text("<!DOCTYPE html>\n<title>Mine</title>")
  index = run.rename(run.with_name("index.jsonl"))
  assert cli.main(["report", str(index), *(["-o", str(other)] if name == "a.txt" else [])]) == 2
  assert one_line(capsys) == (
    f"clipjax: the report must be a new file or a page that clipjax wrote, got {str(other)!r}, which is neither: name "
    "another one with -o"
  )
  assert other.read_text() == "<!DOCTYPE html>\n<title>Mine</title>"
  assert pages == []


def test_a_page_that_clipjax_made_is_overwritten(run, capsys):
  page = run.with_suffix(".html")
  for _ in range(2):
    assert cli.main(["report", str(run)]) == 0
    assert page.read_text().count("Training run run.jsonl") >= 1
    page.write_text(page.read_text().replace("Training run run.jsonl", "old"))


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
  header = HEADER.replace('"leaves": {}', '"leaves": {"grad": ["\\u001b[2Ja\\u202eb", "b"]}')
  evil = "\x1b]0;x\x07\r\n\u202e\u2028.jsonl"
  run = write(tmp_path / evil, [1.0] * 40, header, leaf=[{"grad/norm": [0.0, 1.0]}] * 40)
  for args, status in ((["diagnose"], 1), (["report"], 1), (["suggest"], 0)):
    assert cli.main([*args, str(run)]) == status
    out = capsys.readouterr().out
    assert all(c == "\n" or c.isprintable() for c in out)
    assert (r"\x1b[2Ja\u202eb" in out) == (status == 1)
    assert args != ["report"] or out.endswith(r"Wrote " + str(tmp_path) + r"/\x1b]0;x\x07\r\n\u202e\u2028.html" + "\n")


def test_lines_that_are_printed_are_escaped_each(capsys):
  cli._print("\x1b[31ma\u202e\nb\r")
  assert capsys.readouterr().out == r"\x1b[31ma\u202e" + "\n" + r"b\r" + "\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_cannot_write_to_the_terminal(command, tmp_path, capsys):
  for name in ("no\x1b[31m\n\u202e.jsonl", "text\x1b[31m\n\u202e.jsonl"):
    path = tmp_path / name
    if name.startswith("text"):
      path.write_text("hello")
    assert cli.main([command, str(path)]) == 2
    line = one_line(capsys)
    assert line.isprintable() and r"\x1b[31m\n\u202e" in line
  with pytest.raises(SystemExit):
    cli.main([command, "run.jsonl", "--\x1b[31m"])
  err = capsys.readouterr().err
  assert "\x1b" not in err and r"\x1b[31m" in err


# Files --------------------------------------------------------------------------------------------------------------

FILES = {
  "empty": b"",
  "blank": b"\n \n",
  "text": b"hello\nworld\n",
  "binary": bytes(range(256)),
  "JSON of another kind": b'{"loss": 1.0}\n{"loss": 2.0}\n',
  "JSON array": b"[1, 2, 3]\n",
  "number": b"3\n",
  "torn header": b'{"clipjax_run": 1, "ver',
  "later format": b'{"clipjax_run": 99, "leaves": {}}\n{"step": 1, "grad/norm": 1.0}\n',
  "format of another type": b'{"clipjax_run": "x"}\n{"step": 1}\n',
  "leaves of another type": b'{"clipjax_run": 1, "leaves": [1]}\n{"step": 1, "leaf": {"a/b": [1]}}\n',
  "vector of another type": b'{"clipjax_run": 1, "leaves": {"a": ["x"]}}\n{"step": 1, "leaf": {"a/b": 5}}\n',
  "weights of another type": b'{"clipjax_run": 1, "leaves": {}}\n{"step": 1, "weights": [1]}\n',
  "counts of other bins": b'{"clipjax_run": 1, "leaves": {}}\n'
  b'{"step": 1, "grad/norm": 1.0, "weights": {"edges": [1, 2], "counts": [1, 2]}}\n',
  "parameters of another type": b'{"clipjax_run": 1, "parameters": "many"}\n{"step": 1, "grad/norm": 1.0}\n',
  "word in a vector": b'{"clipjax_run": 1, "leaves": {"a": ["x"]}}\n{"step": 1, "leaf": {"a/b": ["c"]}}\n',
  "step beyond int64": b'{"clipjax_run": 1, "leaves": {}}\n{"step": 1' + b"0" * 30 + b"}\n",
  "number beyond float64": b'{"clipjax_run": 1, "leaves": {}}\n{"step": 1, "loss": 1' + b"0" * 400 + b"}\n",
  "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_run_is_one_line(command, name, tmp_path, capsys, pages):
  path = tmp_path / "run.jsonl"
  path.write_bytes(FILES[name])
  assert cli.main([command, str(path)]) == 2
  line = one_line(capsys)
  assert line.startswith("clipjax: ") and str(path) in line
  assert pages == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_path_without_a_name_is_one_line(command, path, capsys):
  assert cli.main([command, path]) == 2
  assert "got the directory " in one_line(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_of_stdout_that_stops_is_no_error(command, run):
  stop, write_end = os.pipe()
  os.close(stop)
  got = subprocess.run(
    [sys.executable, "-m", "clipjax", command, str(run)],
    cwd=ROOT,
    stdout=write_end,
    stderr=subprocess.PIPE,
    check=False,
  )
  os.close(write_end)
  assert (got.returncode, got.stderr) == (141, b"")


def test_a_closed_stdout_is_one_line(run, monkeypatch, capsys):
  monkeypatch.setattr(sys, "stdout", None)
  assert cli.main(["suggest", str(run)]) == 2
  assert one_line(capsys) == "clipjax: cannot write the output: Bad file descriptor"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_file_and_a_directory_are_one_line(command, tmp_path, capsys):
  assert cli.main([command, str(tmp_path / "no.jsonl")]) == 2
  assert one_line(capsys) == f"clipjax: cannot read {tmp_path / 'no.jsonl'}: there is no such file"
  assert cli.main([command, str(tmp_path)]) == 2
  assert str(tmp_path) in one_line(capsys)
  (tmp_path / "file").touch()
  assert cli.main([command, str(tmp_path / "file" / "x")]) == 2
  assert one_line(capsys) == f"clipjax: cannot read {tmp_path / 'file' / 'x'}: Not a directory"


def test_a_torn_last_line_is_passed_over(run, pages, capsys):
  whole = run.read_bytes()
  assert cli.main(["suggest", str(run)]) == 0
  want = capsys.readouterr().out
  run.write_bytes(whole + b'{"step": 300, "grad/no')
  assert cli.main(["suggest", str(run)]) == 0
  assert capsys.readouterr().out == want
  for command in ("diagnose", "report"):
    assert cli.main([command, str(run)]) == 0
    assert "of 270 finite norms after the warm-up" in capsys.readouterr().out
  assert len(pages) == 1


# What is loaded -----------------------------------------------------------------------------------------------------


def python(*args, encoding="utf-8"):
  env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
  return subprocess.run([sys.executable, *args], capture_output=True, check=False, cwd=ROOT, env=env)


SHOW_MODULES = (
  "import atexit, sys; atexit.register(lambda: print(*sys.modules))\n"
  "from clipjax.__main__ import main; sys.exit(main())"
)


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_no_extra(args):
  got = python("-c", SHOW_MODULES, *args)
  assert (got.returncode, got.stderr) == (0, b"")
  *text, modules = got.stdout.decode().splitlines()
  assert text[0].startswith("clipjax 0" if "--version" in args else "usage: clipjax ")
  assert "clipjax.cli" in modules.split()
  assert not {"matplotlib", "rich"} & set(modules.split())


def test_a_suggestion_loads_no_matplotlib(run):
  got = python("-c", SHOW_MODULES, "suggest", str(run))
  assert (got.returncode, got.stderr) == (0, b"")
  modules = got.stdout.decode().splitlines()[-1].split()
  assert "clipjax.runs.suggest" in modules and "matplotlib" not in modules


def test_all_commands_are_in_the_help(capsys):
  assert cli.main([]) == 2
  text = capsys.readouterr().err
  assert all(f"\n    {command} " in text for command in ("demo", *COMMANDS))


@pytest.mark.parametrize("args", [["demo"], ["report"]])
def test_a_missing_extra_in_this_process(args, run, monkeypatch, capsys):
  for name in ("demo.compare", "demo.advice", "runs.report.build"):
    monkeypatch.setitem(sys.modules, f"clipjax.{name}", None)
    monkeypatch.delattr(f"clipjax.{name}", raising=False)
  assert cli.main([*args, *([str(run)] if args == ["report"] else [])]) == 2
  assert "needs more packages, pip install 'clipjax[" in capsys.readouterr().err
