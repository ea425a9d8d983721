"""Every notebook is a pair: text in jupytext's percent format, and the same cells after execution.

CI runs the notebooks with nbmake. These tests check what nbmake does not see: both files agree, the kept outputs are
there and fit for a reader, and the notebooks stay small. Each check is also shown to fail on a spoiled copy.
"""

import copy
import pathlib
import re

import jupytext
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted({path.stem for path in FOLDER.glob("*.*") if path.suffix in {".py", ".ipynb"}})
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES, MOST_BYTES = 150, 400_000
# A path from the root of a machine; not the one inside of a URL or of a fraction.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~<>-])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Z]:\\\w")


def read(name):
  """`(cells of the .py, the .ipynb)`; a missing file is an error."""
  return jupytext.read(FOLDER / f"{name}.py"), nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def texts(output):
  """The text of an output."""
  yield from (output.get(key, "") for key in ("text", "evalue"))
  yield from output.get("traceback", ())
  yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def check_agreement(text, executed):
  """The same cells, in the same order."""
  contents = [[(cell.cell_type, cell.source.strip()) for cell in pair.cells] for pair in (text, executed)]
  assert contents[0] == contents[1]


def check_size(text, executed):
  """The code is short enough to read, and the file small enough for a browser."""
  lines = [line.strip() for cell in code_cells(text) for line in cell.source.splitlines()]
  assert 0 < sum(bool(line) and not line.startswith("#") for line in lines) < MOST_LINES
  assert len(nbformat.writes(executed).encode()) < MOST_BYTES


def check_execution(text, executed):
  """All cells ran in order without an error."""
  del text
  cells = code_cells(executed)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert [output for cell in cells for output in cell.outputs if output.output_type == "error"] == []


def check_pictures(text, executed):
  """At least one picture."""
  del text
  assert any("image/png" in output.get("data", {}) for cell in code_cells(executed) for output in cell.outputs)


def check_outputs(text, executed):
  """No warnings, no stderr, and no trace of the machine."""
  del text
  outputs = [output for cell in code_cells(executed) for output in cell.outputs]
  assert [output for output in outputs if output.get("name") == "stderr"] == []
  assert [word for output in outputs for word in texts(output) if re.search("warning", word, re.IGNORECASE)] == []
  said = [word for output in outputs for word in texts(output)]
  assert [path for word in [*said, str(executed.metadata)] for path in ABSOLUTE_PATH.findall(word)] == []


def check_links(text, executed):
  """Relative links lead to files in the repository."""
  del executed
  prose = "\n".join(cell.source for cell in text.cells if cell.cell_type == "markdown")
  links = [link for link in re.findall(r"\]\(([^)#]+)", prose) if "://" not in link]
  assert [link for link in links if not (FOLDER / link).exists()] == []


CHECKS = (check_agreement, check_size, check_execution, check_pictures, check_outputs, check_links)


def test_there_are_notebooks():
  assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_in_the_readme(name):
  assert f"notebooks/{name}.ipynb" in README


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_notebook(name, check):
  check(*read(name))


# The checks can fail ------------------------------------------------------------------------------------------------


def sound():
  """A pair that passes every check."""
  picture = nbformat.v4.new_output("display_data", {"image/png": "aGVsbG8="})
  printed = nbformat.v4.new_output("stream", name="stdout", text="3/4 of 5, see https://a.org/b/c.html\n")
  cells = [nbformat.v4.new_markdown_cell("# Title\n[the front page](../README.md)"), nbformat.v4.new_code_cell("x = 1")]
  text = nbformat.v4.new_notebook(cells=cells)
  executed = copy.deepcopy(text)
  executed.cells[1].update(execution_count=1, outputs=[picture, printed])
  return text, executed


def say(words):
  return lambda text, executed: executed.cells[1].outputs[1].update(text=words)


def edit(index, source):
  def spoil(text, executed):
    for notebook in (text, executed):
      notebook.cells[index].source = source

  return spoil


def test_sound_pair_passes_every_check():
  for check in CHECKS:
    check(*sound())


@pytest.mark.parametrize(
  ("check", "spoil"),
  [
    (check_agreement, lambda text, executed: executed.cells[1].update(source="x = 2")),
    (check_agreement, lambda text, executed: executed.cells[0].update(source="# Another title")),
    (check_agreement, lambda text, executed: text.cells.pop()),
    (check_agreement, lambda text, executed: executed.cells.reverse()),
    (check_size, edit(1, "x = 1\n" * MOST_LINES)),
    (check_size, edit(1, "# nothing but a comment")),
    (check_size, say("x" * MOST_BYTES)),
    (check_execution, lambda text, executed: executed.cells[1].update(execution_count=None)),
    (check_execution, lambda text, executed: executed.cells[1].update(execution_count=2)),
    (check_execution, lambda text, executed: executed.cells[1].outputs.append(nbformat.v4.new_output("error"))),
    (check_pictures, lambda text, executed: executed.cells[1].outputs.pop(0)),
    (check_outputs, say("UserWarning: deprecated")),
    (check_outputs, say("wrote /home/me/run.jsonl")),
    (check_outputs, say("<ipykernel at '/tmp/a/1.py'>")),
    (check_outputs, say(r"wrote C:\run.jsonl")),
    (check_outputs, lambda text, executed: executed.cells[1].outputs[1].update(name="stderr")),
    (check_outputs, lambda text, executed: executed.metadata.update(path="/opt/python/bin")),
    (check_links, edit(0, "# Title\n[nowhere](nowhere.md)")),
  ],
)
def test_check_fails_on_a_spoiled_pair(check, spoil):
  text, executed = sound()
  spoil(text, executed)
  with pytest.raises(AssertionError):
    check(text, executed)
