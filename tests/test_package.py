"""The package as a whole: exports, what an import loads, docstrings."""

import ast
import doctest
import inspect
import operator
import pathlib
import re
import subprocess
import sys
import tomllib

import api
import pytest
import typed_usage

import clipjax
import clipjax.__main__
from clipjax import cli, rules, runs

ROOT = pathlib.Path(__file__).parent.parent
EXTRAS = ("matplotlib", "rich", "tensorboardX", "torch", "tensorflow", "flax", "IPython", "pandas", "clipjax.runs")
pytestmark = pytest.mark.usefixtures("standard_promotion")
PUBLIC = {f"clipjax.{name}": operator.attrgetter(name)(clipjax) for name in api.public_names()}
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


def test_citation_and_changelog_have_the_version_and_the_project_its_authors():
  citation = (ROOT / "CITATION.cff").read_text("utf-8")
  project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
  assert f"version: {clipjax.__version__}\n" in citation
  assert re.search(rf"^## {re.escape(clipjax.__version__)} ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
  assert re.findall(r'- name: "(.*)"', citation) == [author["name"] for author in project["authors"]]
  assert f"license: {project['license']}\n" in citation
