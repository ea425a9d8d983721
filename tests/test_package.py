"""The package as a whole: exports, what an import loads, docstrings, the README."""

import ast
import doctest
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib

import pytest
import typed_usage

import clipjax
import clipjax.__main__
from clipjax import cli, rules, runs

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXTRAS = ("matplotlib", "rich", "tensorboardX", "torch", "tensorflow", "flax", "IPython", "pandas", "clipjax.runs")
pytestmark = pytest.mark.usefixtures("standard_promotion")
PUBLIC = (
  {f"clipjax.{name}": getattr(clipjax, name) for name in clipjax.__all__ if name not in ("rules", "runs")}
  | {
    f"clipjax.rules.{name}": value
    for name, value in vars(rules).items()
    if not (name.startswith("_") or inspect.ismodule(value))
  }
  | {f"clipjax.runs.{name}": getattr(runs, name) for name in runs.__all__}
)
STATES = {"clipjax.ClipState", "clipjax.EffectState", "clipjax.SkipState", "clipjax.WatchState"}


def loaded_after(code):
  """The modules of `EXTRAS` that a fresh interpreter has loaded after running `code`."""
  report = f"import sys; {code}; print([m for m in {EXTRAS} if m in sys.modules])"
  out = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=ROOT)
  return ast.literal_eval(out.stdout.strip().splitlines()[-1])


def test_import_loads_no_extra_and_the_run_wing_on_first_use():
  assert loaded_after("import clipjax; clipjax.clip_by_global_norm(1.0); clipjax.metrics; clipjax.rules") == []
  assert "runs" in dir(clipjax)


def test_the_test_of_imports_can_fail():
  assert loaded_after("import clipjax, rich; clipjax.runs.Recorder") == ["rich", "clipjax.runs"]


def test_the_names_that_are_made_on_first_use():
  assert clipjax.__getattr__("runs") is runs
  assert clipjax.__main__.main is cli.main


@pytest.mark.parametrize("module", [clipjax, rules, runs], ids=lambda module: module.__name__)
def test_exports_are_what_the_file_imports_by_name(module):
  tree = ast.parse(pathlib.Path(module.__file__).read_text(encoding="utf-8"))
  seen = {a.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names if a.asname}
  assert seen == {name for name in getattr(module, "__all__", seen) if not name.startswith("_")}
  assert seen <= set(dir(module))
  with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
    module.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring_example_runs(name):
  value = PUBLIC[name]
  if name in STATES:
    assert "Attributes:" in value.__doc__  # States that users read, and do not make.
    return
  examples = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
  assert examples[0].examples
  result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples[0])
  assert result.failed == 0


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring_names_every_argument(name):
  value = PUBLIC[name]
  fields = getattr(value, "_fields", None) or tuple(inspect.signature(value).parameters)
  lines = re.findall(r"^ +(\w+(?:, \w+)*): ", value.__doc__, re.MULTILINE)  # Such as "eps, name: see `clip_by_...`."
  assert set(fields) <= {field for line in lines for field in line.split(", ")}


def test_typical_user_code_runs(tmp_path):
  assert typed_usage.main()["grad/steps"] == 3
  max_norm, findings, page = typed_usage.record(str(tmp_path / "run.jsonl"))
  assert max_norm > 0
  assert "clipped-often" in findings
  assert pathlib.Path(page).exists()


def code_blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_has_exactly_two_setup_commands():
  lines = [line for block in code_blocks("sh") for line in block.splitlines() if "-m venv" in line]
  assert len(lines) == 2
  assert all(line.startswith("python3 -m venv .venv") for line in lines)
  assert "clipjax demo" in lines[0]
  assert "pytest" in lines[1]


@pytest.mark.parametrize("index", range(len(code_blocks("python"))))
def test_readme_code_runs(index):
  code = code_blocks("python")[index]
  runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
  if ">>>" in code:
    parsed = doctest.DocTestParser().get_doctest(code, {}, f"README block {index}", "README.md", 0)
    assert runner.run(parsed).failed == 0
  else:
    exec(compile(code, f"README block {index}", "exec"), {"__name__": "readme"})


def api_table(text):
  """The API table: the arguments by name of what is called, and the names of what one gets."""
  table = text[text.index("| you want to | call |") :].split("\n\n")[0]
  rows = [row.split(" | ") for row in table.splitlines()[2:]]
  calls, results = ([span for row in rows for span in re.findall(r"`([^`]+)`", row[i])] for i in (1, 2))
  return {f"clipjax.{call.partition('(')[0]}": re.findall(r"[(,] ?(\w+)", call) for call in calls}, {
    f"clipjax.{name}" for name in results
  }


def test_api_table_of_the_readme_has_the_public_names_and_no_other():
  calls, results = api_table(README)
  assert set(calls) <= set(PUBLIC) <= set(calls) | results
  for name, arguments in calls.items():
    assert set(arguments) <= set(inspect.signature(PUBLIC[name]).parameters), name


def test_comparison_with_the_api_table_can_fail():
  calls, _ = api_table(README.replace("| `global_norm(", "| `globl_norm("))
  assert set(calls) - set(PUBLIC) == {"clipjax.globl_norm"}
  calls, results = api_table(README.replace("`ClipState`, ", "").replace("a `runs.Run`: ", ""))
  assert set(PUBLIC) - set(calls) - results == {"clipjax.ClipState", "clipjax.runs.Run"}


def test_code_of_contributing_runs():
  names = {"__name__": "contributing"}
  for block in re.findall(r"^ *```python\n(.*?)```", CONTRIBUTING, re.DOTALL | re.MULTILINE):
    exec(compile(textwrap.dedent(block), "a block of CONTRIBUTING.md", "exec"), names)
  tests = [value for name, value in names.items() if name.startswith("test_")]
  assert len(tests) == 1
  tests[0]()


def test_contributing_has_every_module_and_benchmark():
  table = CONTRIBUTING[CONTRIBUTING.index("| module | subject |") :].split("\n\n")[0]
  modules = re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE)
  found = (path.relative_to(ROOT / "clipjax").with_suffix("").as_posix() for path in (ROOT / "clipjax").rglob("*.py"))
  assert sorted(modules) == sorted(found)
  named = set(re.findall(r"`benchmarks/(\w+)\.py`", CONTRIBUTING))
  texts = {path.stem: path.read_text("utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
  programs = {name for name, text in texts.items() if "__main__" in text and "Not a command" not in text}
  assert named == programs
  for path in re.findall(r"`((?:tests|docs|clipjax|benchmarks|\.ci)/[\w./]+\w)`", CONTRIBUTING):
    assert (ROOT / path).exists(), path


def test_citation_and_changelog_have_the_version_and_the_project_its_authors():
  citation = (ROOT / "CITATION.cff").read_text("utf-8")
  project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
  assert f"version: {clipjax.__version__}\n" in citation
  assert re.search(rf"^## {re.escape(clipjax.__version__)} ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
  assert re.findall(r'- name: "(.*)"', citation) == [author["name"] for author in project["authors"]]
  assert f"license: {project['license']}\n" in citation
