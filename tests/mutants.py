"""Mutation testing: breaks a module in one small way after another, and tells the ways that no test notices.

The operators are those of cosmic-ray (the extra `mutation`), and some for array code, where `jnp.where` is the branch.
Each mutant meets the tests that noticed others most often, then all of `TESTS`, until one fails, in a process that is
forked after JAX is imported and before it has started. Which test runs which line would be no guide: JAX traces a
function once, for whoever comes first.

  python tests/mutants.py _skip.py _rule.py --sample 0.5

A survivor wants a new test, or a reason.
"""

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from compiled import cache_folder
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parent.parent
TESTS = {
  "norms/sums.py": "norms cost derivatives nan_in_a_large_array nan_in_a_shard shards sharding functional transforms",
  "norms/derivatives.py": "derivatives norms shards sharding transforms",
  "arithmetic.py": "norms derivatives functional adaptive",
  "scaling.py": "functional per_example transforms derivatives golden norms adaptive vectors cost",
  "nonfinite.py": "functional transforms messages integrations stacked",
  "functional.py": "messages bad_calls functional norms golden",
  "per_example.py": "per_example golden bad_calls messages derivatives sharding",
  "transforms/engine.py": "messages bad_calls transforms adaptive metrics optax_situations stacked sharding",
  "transforms/state.py": "transforms metrics bad_calls long_runs",
  "transforms/by_norm.py": "messages bad_calls transforms adaptive metrics integrations optax_situations stacked",
  "transforms/by_value.py": "functional transforms bad_calls golden messages",
  "transforms/agc.py": "agc golden parity_optax bad_calls messages sharding stacked",
  "transforms/skip.py": "messages skip bad_calls metrics vectors integrations sharding",
  "transforms/watch.py": "messages watch bad_calls metrics sharding record stacked",
  "transforms/effect.py": "messages effect bad_calls states names sharding stacked",
  "transforms/inner.py": "messages skip bad_calls effect",
  "runs/effects.py": "health_effect",
  "runs/kept_steps.py": "health_effect report_effect",
  "runs/health/effect.py": "health_effect health_checks",
  "rules/base.py": "messages bad_calls rules adaptive transforms vectors",
  "rules/combine.py": "messages bad_calls rules adaptive",
  **{
    f"rules/{name}.py": "bad_calls adaptive vectors rules derivatives messages integrations"
    for name in ("ring", "percentile", "quantile_tracking", "zscore", "rolling_sigma", "ema_ratio")
  },
}
BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Mul Mod_Mul LShift_RShift BitAnd_BitOr BitOr_BitAnd"
COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is"
OTHERS = (
  "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
  "ReplaceContinueWithBreak NumberReplacer RemoveDecorator ZeroIterationForLoop"
)
OPERATORS = (
  *(f"ReplaceBinaryOperator_{pair}" for pair in BINARY.split()),
  *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISONS.split()),
  *(f"ReplaceUnaryOperator_{pair}" for pair in ("USub_UAdd", "Delete_Invert", "Delete_Not")),
  *OTHERS.split(),
)
UNSEEN = re.compile(r"\b(strict|inline)=True")  # Lengths are always equal; a program is the same, told in another way.
TWINS = [("minimum", "maximum"), ("max", "min"), ("isnan", "isinf"), ("any", "all"), ("pmax", "pmin")]
TWIN = {**dict(TWINS), **{b: a for a, b in TWINS}, "isfinite": "isnan", "psum": "pmax", "argmax": "argmin"}


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
  """`(line, operator, source)` of every mutant that is another program."""
  seen = {ast.dump(ast.parse(source))}
  unseen = len(UNSEEN.findall(source))
  for line, operator, code in [*_of_cosmic_ray(source), *_of_arrays(source)]:
    try:
      tree = ast.dump(ast.parse(code))
    except SyntaxError:
      continue
    if tree not in seen and len(UNSEEN.findall(code)) == unseen:
      seen.add(tree)
      yield line, operator, code


def _of_cosmic_ray(source: str) -> Iterator[tuple[int, str, str]]:
  typed = [span for node in ast.walk(ast.parse(source)) for span in _annotations(node)]
  nodes = list(ast_nodes(get_ast(source)))
  for name in OPERATORS:
    operator = plugins.get_operator(f"core/{name}")()
    places = [place for node in nodes for place in operator.mutation_positions(node)]
    for i, (start, end) in enumerate(places):
      code = mutate_code(source, operator, i)
      slashes, before = (len(re.findall(r"/\s*,", text)) for text in (code, source))
      is_separator = slashes > before  # The star before arguments by keyword, taken for a product.
      if not is_separator and not any(a <= start and end <= b for a, b in typed):
        yield start[0], name, code


def _annotations(node: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
  """Where the types are, which do nothing."""
  found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
  for x in filter(None, found):
    yield (x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)


def _of_arrays(source: str) -> Iterator[tuple[int, str, str]]:
  """One side of a `where` for both, the twin of a reduction, and what is done without a call or an argument."""
  starts = [0]
  for line in source.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))

  def span(first: ast.AST, last: ast.AST | None = None) -> tuple[int, int]:
    last = last or first
    return starts[first.lineno - 1] + first.col_offset, starts[last.end_lineno - 1] + last.end_col_offset

  def text(node: ast.AST) -> str:
    return source[slice(*span(node))]

  def put(place: tuple[int, int], new: str) -> str:
    return source[: place[0]] + new + source[place[1] :]

  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
      yield node.lineno, "DropCall", put(span(node), "pass")
    if not isinstance(node, ast.Call):
      continue
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name == "where" and len(node.args) == 3:
      yield node.lineno, "WhereFirst", put(span(node.args[2]), text(node.args[1]))
      yield node.lineno, "WhereSecond", put(span(node.args[1]), text(node.args[2]))
    if name in ("stop_gradient", "optimization_barrier"):
      yield node.lineno, "Unwrap", put(span(node), text(node.args[0]))
    if name in TWIN:
      yield node.lineno, "Twin", put(span(node.func), text(node.func).removesuffix(name) + TWIN[name])
    for keyword in node.keywords:
      if keyword.arg is not None:
        start, end = span(keyword, keyword.value)
        start = len(source[:start].rstrip().removesuffix(","))
        yield keyword.lineno, "DropKeyword", put((start, end), "")


def outcome(folder: Path, tests: list[str], limit: float) -> tuple[int | None, str]:
  """The exit code of pytest, None where it ran into the limit, and the test that failed."""
  log = folder / "log"
  start, child = time.monotonic(), os.fork()
  if child == 0:
    os.setsid()
    os.chdir(folder)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    code = 3
    try:
      import pytest  # noqa: PLC0415

      # What starts processes of its own takes a minute.
      code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", "not two_processes", *tests]))
    except BaseException:  # It would be lost, and with it the reason.
      traceback.print_exc()
    finally:
      sys.stderr.flush()
      os._exit(code)
  while time.monotonic() - start < limit:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      lines = log.read_text(errors="replace").splitlines()
      failed = next((x for x in lines if x.startswith("FAILED")), "")
      return os.waitstatus_to_exitcode(status), failed.removeprefix("FAILED ").split(" - ")[0]
    time.sleep(0.02)
  os.killpg(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return None, ""


def main() -> None:
  """Runs what the command line asks for; a file that is there is gone on with."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE", help=f"of {' '.join(TESTS)}")
  parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
  parser.add_argument("--sample", type=float, default=1.0, help="share of the mutants, drawn at random")
  parser.add_argument("--share", default="0/1", metavar="K/N", help="every Nth of them, from the Kth: for N processes")
  parser.add_argument("--most", type=float, default=1.0, help="share of survivors above which it exits with 1")
  parser.add_argument("--limit", type=float, default=300, help="seconds for each mutant")
  args = parser.parse_args()
  first, step = map(int, args.share.split("/"))
  known = {}
  if args.out.exists():
    rows = [x for x in map(json.loads, args.out.read_text().splitlines()) if x["status"] is not None]
    known = {(x["module"], x["diff"], x["nth"]): x for x in rows}  # What ran into the limit is tried again.
  with tempfile.TemporaryDirectory() as name:
    folder = copy_of_project(Path(name))
    sys.path.insert(0, str(folder))
    if "CLIPJAX_TESTS_CACHE" not in os.environ:  # A copy: programs of broken code are of no use later.
      os.environ["CLIPJAX_TESTS_CACHE"] = shutil.copytree(cache_folder(), str(folder / "cache"))
    sys.dont_write_bytecode = True  # Two mutants of one second and size would share it.
    import optax  # noqa: F401, PLC0415  (before the fork)

    every_file = sorted({file for module in args.modules for file in files_of(module)})
    if outcome(folder, ["--durations=0", "--durations-min=0", "-n", "auto", *every_file], 20 * args.limit)[0] != 0:
      raise SystemExit("the tests must pass before anything is broken\n" + (folder / "log").read_text())
    every_test = quickest_first((folder / "log").read_text())
    for module in args.modules:
      source = (ROOT / "clipjax" / module).read_text()
      files = files_of(module)
      tests = [test for test in every_test if test.partition("::")[0] in files]
      found, times = [], Counter()
      for line, operator, code in mutants(source):
        diff = "\n".join(list(difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=0))[3:])
        times[diff] += 1  # Lines that are alike are broken alike.
        found.append((line, operator, code, diff, times[diff]))
      random.Random(0).shuffle(found)
      for line, operator, code, diff, nth in found[: round(len(found) * args.sample)][first::step]:
        if (module, diff, nth) in known:
          continue
        noticed = {test for test, _ in Counter(x["by"] for x in known.values()).most_common(60)}
        (folder / "clipjax" / module).write_text(code)
        status, by = outcome(folder, sorted(tests, key=lambda test: test not in noticed), args.limit)
        if status == 4:  # A test has another name now.
          status, by = outcome(folder, files, args.limit)
        (folder / "clipjax" / module).write_text(source)
        place = {"module": module, "line": line, "operator": operator, "diff": diff, "nth": nth}
        row = {**place, "survived": status == 0, "by": by, "status": status}
        known[module, diff, nth] = row
        with args.out.open("a") as file:
          file.write(json.dumps(row) + "\n")
        if status in (0, None):
          print(f"{module}:{line} {operator}{'' if status == 0 else ' ran into the limit'}\n{diff}\n", flush=True)
  survived, late = (sum(x["status"] == status for x in known.values()) for status in (0, None))
  print(f"{len(known)} mutants: {survived} survived, {late} ran into the limit")
  sys.exit(survived > args.most * len(known))


def files_of(module: str) -> list[str]:
  """The files whose tests should notice a mutant of the module."""
  return [f"tests/test_{subject}.py" for subject in TESTS[module].split()]


def quickest_first(log: str) -> list[str]:
  """The tests by the time that they took: most mutants fail one that takes none."""
  took: Counter[str] = Counter()
  for seconds, test in re.findall(r"^([\d.]+)s (?:setup|call|teardown) +(.*)$", log, re.MULTILINE):
    took[test] += float(seconds)
  return sorted(took, key=took.__getitem__)


def copy_of_project(folder: Path) -> Path:
  """The package, to be broken, with all that its tests read beside it."""
  shutil.copytree(ROOT / "clipjax", folder / "clipjax", ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("tests", "benchmarks", "docs", "README.md", "pyproject.toml"):
    (folder / name).symlink_to(ROOT / name)
  return folder


if __name__ == "__main__":
  main()
