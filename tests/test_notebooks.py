"""Every notebook is a pair: text in jupytext's percent format, and the same cells after execution.

Both files say the same, the kept outputs are fit for a reader, and the notebooks are short. `pytest -m notebooks` also
executes each of them, and then its claims, `tests/claims/<name>.py`: plain statements that run in the kernel of the
notebook after its last cell, and assert what its sentences say. Each check is shown to fail, on a spoiled copy of a
notebook that passes. Files in notebooks/ without a number are modules that notebooks import.
"""

import ast
import copy
import os
import pathlib
import re

import jupytext
import nbclient
import nbformat
import pytest
from compiled import variables

ROOT = pathlib.Path(__file__).parent.parent
FOLDER, CLAIMS = ROOT / "notebooks", ROOT / "tests" / "claims"
NAMES = sorted({path.stem for path in FOLDER.glob("[0-9][0-9]_*.*") if path.suffix in {".py", ".ipynb"}})
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES, MOST_BYTES = 90, 400_000
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
  """Two screens of code, and a file that a browser shows."""
  lines = [line.strip() for cell in code_cells(text) for line in cell.source.splitlines()]
  assert 0 < sum(bool(line) and not line.startswith("#") for line in lines) <= MOST_LINES
  assert len(nbformat.writes(executed).encode()) < MOST_BYTES


def check_no_asserts(text, executed):
  """A notebook shows; its claims are checked outside of it."""
  del executed
  trees = [ast.parse(cell.source) for cell in code_cells(text)]
  assert not any(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))


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


CHECKS = (
  check_agreement,
  check_size,
  check_no_asserts,
  check_execution,
  check_pictures,
  check_outputs,
  check_links,
)


def check_claims(claims):
  """Something is claimed."""
  assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(claims.read_text(encoding="utf-8"))))


def words_of(notebook):
  """What each code cell prints, without its numbers, which depend on the machine, and its line breaks."""
  for cell in code_cells(notebook):
    said = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    yield " ".join(re.sub(r"[-+]?\d[\d.,e+-]*", "#", said).split())


def execute(notebook, claims):
  """Runs a copy of the notebook and, in the same kernel, the file of its claims; gives the copy.

  Raises:
    CellExecutionError: with the traceback of the cell, or of the claim, that failed.
  """
  notebook = copy.deepcopy(notebook)
  own = len(notebook.cells)
  file = str(claims)
  notebook.cells.append(
    nbformat.v4.new_code_cell(f"exec(compile(open({file!r}, encoding='utf-8').read(), {file!r}, 'exec'))")
  )
  client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
  client.execute(env=environment(notebook))
  del notebook.cells[own:]
  return notebook


def environment(notebook):
  """What a user with one CPU device has, and the programs that earlier runs compiled."""
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = env.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "").strip()
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  if not needs_devices(notebook):
    env |= variables()
  return env


def needs_devices(notebook):
  """Whether programs run over several devices: from the cache these wait for one another, see tests/conftest.py."""
  code = "\n".join(cell.source for cell in code_cells(notebook))
  return re.search(r"\b(make_mesh|pmap|device_count)\b", code) is not None


def test_there_are_notebooks():
  assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_in_the_readme(name):
  assert f"notebooks/{name}.ipynb" in README


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_notebook(name, check):
  check(*read(name))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_has_claims(name):
  check_claims(CLAIMS / f"{name}.py")


def test_claims_have_notebooks():
  assert {path.stem for path in CLAIMS.glob("*.py")} <= set(NAMES)


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NAMES)
def test_what_the_notebook_says_holds_and_is_what_it_prints(name):
  kept = read(name)[1]
  again = execute(kept, CLAIMS / f"{name}.py")
  assert list(words_of(again)) == list(words_of(kept))


def test_notebook_over_several_devices_compiles_all_of_its_programs():
  _, executed = sound()
  assert "JAX_COMPILATION_CACHE_DIR" in environment(executed)
  assert "JAX_COMPILATION_CACHE_DIR" not in environment(read("05_sharded_training")[1])


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
    (check_size, edit(1, "x = 1\n" * (MOST_LINES + 1))),
    (check_size, edit(1, "# nothing but a comment")),
    (check_size, say("x" * MOST_BYTES)),
    (check_no_asserts, edit(1, "for x in range(3):\n  assert x < 3")),
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


@pytest.fixture
def claims(tmp_path):
  """Makes a file of claims."""

  def write(text):
    (tmp_path / "claims.py").write_text(text, encoding="utf-8")
    return tmp_path / "claims.py"

  return write


def test_claims_without_an_assert_claim_nothing(claims):
  with pytest.raises(AssertionError):
    check_claims(claims("x < 3  # The text says so.\n"))


@pytest.mark.notebooks
def test_claims_see_the_variables_of_the_notebook(claims):
  _, executed = sound()
  before = copy.deepcopy(executed)
  executed.cells[1].source = "x = 1\nprint('x is', x)"
  again = execute(executed, claims("def doubled():\n  return 2 * x\n\n\nassert doubled() == 2\n"))
  assert list(words_of(again)) == ["x is #"]
  executed.cells[1].source = before.cells[1].source
  assert executed == before


@pytest.mark.notebooks
@pytest.mark.parametrize(
  ("cell", "claim", "message"),
  [
    ("x = 1", "assert x == 2", "claims.py:1"),
    ("x = 1", "assert y == 1", "NameError"),
    ("x = 1 / 0", "assert True", "ZeroDivisionError"),
  ],
)
def test_wrong_claim_or_cell_fails_with_its_traceback(cell, claim, message, claims):
  _, executed = sound()
  executed.cells[1].source = cell
  with pytest.raises(nbclient.exceptions.CellExecutionError, match=message):
    execute(executed, claims(claim))
