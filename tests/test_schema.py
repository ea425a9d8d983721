"""Every key of a row is written once, in `clipjax.runs.schema` or `clipjax.metric_names`, not elsewhere in the wing."""

import ast
import pathlib

import pytest

from clipjax import metric_names, runs
from clipjax.runs import schema

RUNS = pathlib.Path(runs.__file__).parent
KEYS = {value for module in (metric_names, schema) for name, value in vars(module).items() if name.isupper()}
KEYS = {value for value in KEYS if isinstance(value, str)}
# Words that are no key where they stand: a label, the name of a finding or of an argument, a field of the page's JSON.
WORDS = {
  "blocks.py": {"leaf"},
  "arrays.py": {"steps", "parameters", "leaves", "weights"},
  "loggers/kinds.py": {"leaves", "step"},
  "record/pushes.py": {"step"},
  "record/recorder.py": {"every"},
  "record/weights.py": {"nonfinite"},
  "loggers/writers.py": {"leaves"},
  "health/facts.py": {"parameters"},
  "health/losses.py": {"loss"},
  "health/nonfinite.py": {"nonfinite"},
  "health/verdict.py": {"nonfinite"},
  "report/axes.py": {"scale", "step"},
  "report/build_page.py": {"max_norm"},
  "report/data.py": {"version", "parameters", "leaves", "steps", "nonfinite", "weights"},
  "report/effect.py": {"nonfinite", "step"},
  "report/figures.py": {"steps"},
  "report/happened.py": {"batch", "nonfinite", "norm", "steps"},
  "report/heatmap.py": {"nonfinite", "norm"},
  "report/sections.py": {"nonfinite", "parameters", "steps", "update"},
  "report/timeline.py": {"nonfinite", "norm"},
  "roles.py": {"batch", "scale", "step"},
  "suggest.py": {"max_norm"},
}


def literals(source):
  """The strings of a source, docstrings left out, that are a key or a path with a key in it."""
  tree = ast.parse(source)
  holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
  bodies = [node.body for node in ast.walk(tree) if isinstance(node, holders) and node.body]
  docs = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
  strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
  return {node.value for node in strings if id(node) not in docs and _has_key(node.value)}


def _has_key(text):
  return text in KEYS or ("/" in text and " " not in text and not KEYS.isdisjoint(text.split("/")))


def modules():
  return [path.relative_to(RUNS).as_posix() for path in RUNS.rglob("*.py") if path.name != "schema.py"]


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_key_is_written_out(name):
  assert literals((RUNS / name).read_text("utf-8")) == WORDS.get(name, set())


def test_every_file_with_words_is_there():
  assert set(modules()) >= set(WORDS)


def test_the_test_of_literals_can_fail():
  assert {"grad/norm", "/max_norm", "consecutive", "tokens"} == literals(
    'x["grad/norm"]\nf"{name}/max_norm"\ndef f():\n  "loss"\n  return g("consecutive", "tokens"), "the norm", "a/b"'
  )


def test_keys_and_names():
  assert schema.key_of("grad", metric_names.NORM) == "grad/norm"
  assert schema.key_of("a/b", metric_names.SCALE, "w/x") == "a/b/scale/w/x"
  assert schema.name_of("a/b/norm") == "a/b"
  others = ["step", "norm", "grad/norm/w", "grad/norm/norm", "grad/scale/a/norm", "x/normal"]
  assert schema.names_with(["grad/norm", "enc/grad/norm", *others], metric_names.NORM) == ["grad", "enc/grad"]
