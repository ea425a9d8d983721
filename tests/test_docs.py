"""Every page: its programs run and print what stands below them, its links lead somewhere, its tables are computed.

The programs of docs/sharding.md and docs/loggers.md have files of their own, test_recipes.py and test_loggers.py.
"""

import contextlib
import io
import pathlib
import re
import sys
import textwrap

import api
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *DOCS.glob("*.md"))}
ELSEWHERE = {"sharding.md", "loggers.md", "api.md"}  # The examples of api.md are those of the docstrings.
BLOCK = re.compile(r"^ *```python\n(.*?)^ *```\n(?:\s*```text\n(.*?)^ *```)?", re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.usefixtures("standard_promotion")


RUN_HERE = sorted(PAGES.keys() - ELSEWHERE - {"CONTRIBUTING.md"})  # CONTRIBUTING is one program, see below.
PROGRAMS = [
  pytest.param(textwrap.dedent(code), printed, id=f"{name}-{i}")
  for name in RUN_HERE
  for i, (code, printed) in enumerate(BLOCK.findall(PAGES[name]))
]


@pytest.mark.parametrize(("code", "printed"), PROGRAMS)
def test_program_prints_what_stands_below_it(code, printed):
  for package in re.findall(r"\b(wandb|haiku|flax|equinox)\b", code.partition("\n\n")[0]):
    pytest.importorskip(package)
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, "a program of the docs", "exec"), {"__name__": "docs"})
  assert out.getvalue() == printed


def test_no_program_is_overlooked():
  assert len(PROGRAMS) == sum(PAGES[name].count("```python") for name in RUN_HERE)
  assert sum(bool(p.values[1]) for p in PROGRAMS) == sum(PAGES[name].count("```text") for name in RUN_HERE)


# README -------------------------------------------------------------------------------------------------------------


def test_readme_is_read_in_five_minutes_and_has_two_commands():
  readme = PAGES["README.md"]
  assert readme.count("\n") <= 160
  commands = [line for line in readme.splitlines() if "-m venv" in line]
  assert len(commands) == 2
  assert all(line.startswith("python3 -m venv .venv") for line in commands)
  assert "clipjax demo" in commands[0] and "pytest" in commands[1]


def unknown_names(readme):
  """What the tables of the README call and clipjax does not have."""
  table = readme[readme.index("| you want to | call |") :].split("\n\n")[0]
  calls = re.findall(r"`((?:runs\.|rules\.)?[a-z_A-Z]+)(?:\([^`]*\))?`", "".join(table.splitlines()[2:]))
  known = api.public_names() | {"max_norm"}
  return [name for name in calls if name not in known]


def test_readme_calls_what_there_is():
  assert unknown_names(PAGES["README.md"]) == []
  assert unknown_names(PAGES["README.md"].replace("`zclip`", "`zlip`")) == ["zlip"]  # The test can fail.


# Made by programs ---------------------------------------------------------------------------------------------------


def test_api_is_what_the_docstrings_say(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["api.py", "--check"])
  api.main()
  assert api.PAGE.read_text(encoding="utf-8") == api.page()


def test_an_old_api_page_and_a_name_without_a_section_are_seen(tmp_path, monkeypatch):
  (tmp_path / "api.md").write_text(api.page().replace("clip_by_leaf_norm", "clip_by_norm", 1))
  monkeypatch.setattr(api, "PAGE", tmp_path / "api.md")
  monkeypatch.setattr(sys, "argv", ["api.py", "--check"])
  with pytest.raises(SystemExit, match=r"run `python docs/api\.py`"):
    api.main()
  monkeypatch.setattr(api, "SECTIONS", api.SECTIONS | {"Measure": ("global_norm",)})
  with pytest.raises(SystemExit, match="differs by: leaf_norms"):
    api.page()


def test_rows_of_the_readme_are_those_of_the_computed_table():  # Which `against_optax.py --check` computes, in CI.
  computed = PAGES["coming_from.md"].splitlines()
  assert sum(line in computed for line in PAGES["README.md"].splitlines() if re.match(r"\| (norm|clip) ", line)) == 3


# Links --------------------------------------------------------------------------------------------------------------


def anchors(page):
  """The fragments of the headings of a page, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
  return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(folder, page):
  """The relative links that lead to no file, or to no heading of it."""
  out = []
  for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
    path, _, fragment = link.partition("#")
    target = folder / path
    if "://" in link or (not fragment and target.exists()):
      continue
    text = target.read_text("utf-8") if target.is_file() else "" if path else page
    if fragment not in anchors(text):
      out.append(link)
  return out


@pytest.mark.parametrize("name", sorted(PAGES))
def test_links_lead_somewhere(name):
  assert broken_links(DOCS if (DOCS / name).exists() else ROOT, PAGES[name]) == []


def test_the_test_of_links_can_fail():
  page = "# A b\n[a](#a-b) [b](#b) [c](README.md#install) [d](README.md#nowhere) [e](nothing.md)"
  assert broken_links(ROOT, page) == ["#b", "README.md#nowhere", "nothing.md"]


def test_every_page_is_linked_from_the_readme():
  assert [path.name for path in DOCS.glob("*.md") if f"docs/{path.name}" not in PAGES["README.md"]] == []


# CONTRIBUTING -------------------------------------------------------------------------------------------------------


def test_code_of_contributing_runs():
  names = {"__name__": "contributing"}
  for code, _ in BLOCK.findall(PAGES["CONTRIBUTING.md"]):
    exec(compile(textwrap.dedent(code), "a block of CONTRIBUTING.md", "exec"), names)
  tests = [value for name, value in names.items() if name.startswith("test_")]
  assert len(tests) == 1
  tests[0]()


def test_contributing_names_what_there_is():
  page = PAGES["CONTRIBUTING.md"]
  for path in re.findall(r"`((?:tests|docs|clipjax|benchmarks|\.ci)/[\w./]+\w)`", page):
    assert (ROOT / path).exists(), path
  named = set(re.findall(r"`benchmarks/(\w+)\.py`", page))
  texts = {path.stem: path.read_text("utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
  assert named == {name for name, text in texts.items() if "__main__" in text and "ot a command" not in text}
