"""The house: the clip wing knows nothing of the run wing, and in the run wing every import goes down."""

import ast
import pathlib

import clipjax

ROOT = pathlib.Path(clipjax.__file__).parent
# From the ground up: what stands before may be imported by what stands behind, and by nothing else.
FLOORS = (
  "kinds", "schema", "words", "sources", "number_text", "arrays", "run", "reading", "roles", "norms", "speed",
  "optimizers", "blocks", "kept_steps", "effects", "course", "phase", "suggest_notes", "suggest", "health", "loggers",
  "record", "report",
)  # fmt: skip


def imports_of(path):
  """The modules of this package that a file imports, inside functions too."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "clipjax":
      for alias in node.names:
        yield f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "clipjax")


def upward(floors):
  """The imports of the run wing from a floor above, or of a part that has no floor."""
  out = []
  for path in (ROOT / "runs").rglob("*.py"):
    part = path.relative_to(ROOT / "runs").with_suffix("").parts[0]
    if part == "__init__":
      continue
    for name in imports_of(path):
      if name.startswith("clipjax.runs."):
        other = name.split(".")[2]
        if other != part and not (other in floors and floors.index(other) < floors.index(part)):
          out.append((part, name))
  return out


def test_every_import_of_the_run_wing_goes_down():
  assert upward(FLOORS) == []


def test_the_test_of_floors_can_fail():
  assert ("run", "clipjax.runs.schema.name_of") in upward(FLOORS[::-1])


def test_the_clip_wing_does_not_import_the_run_wing():
  outside = [path for path in ROOT.rglob("*.py") if not {"runs", "demo"} & set(path.relative_to(ROOT).parts)]
  found = {path.name for path in outside for name in imports_of(path) if name.startswith("clipjax.runs")}
  assert found == {"__init__.py", "cli.py"}  # The first of these where `clipjax.runs` is used first.
