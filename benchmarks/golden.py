"""Golden numbers: the results of torch, TensorFlow, Optax and jax_privacy on the clip cases of their tests, and more.

`python benchmarks/golden.py` runs the libraries, which the extra `bench` installs, and writes `tests/data/golden.json`.
`python benchmarks/golden.py check` runs them again and compares. `tests/test_golden.py` compares clipjax with that file
and needs only Optax of these libraries.

An array is `{"dtype", "shape", "values"}`; its numbers read back exactly. Nonfinite numbers are "nan", "inf" or "-inf".
"""

import argparse
import importlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

PATH = pathlib.Path(__file__).parent.parent / "tests" / "data" / "golden.json"
LIBRARIES = ("torch", "tensorflow", "optax", "jax_privacy")
# A unit or two in the last place: processors may add in different orders.
TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Cases:
  """The cases of one library, and the gradients that they share, by name."""

  def __init__(self, library: str, version: str):
    self.library = library
    self.version = version
    self.inputs: dict[str, Any] = {}
    self.cases: list[dict[str, Any]] = []

  def add(self, function: str, grads: Any, outputs: dict[str, Any], *, source: str, key: str, **arguments: Any) -> None:
    """Adds one case.

    Args:
      function: name of the function in the library.
      grads: tree of NumPy arrays, lists, dicts and None.
      outputs: results of the function, by name.
      source: address of the test file that the case comes from, and the name of the test.
      key: name of `grads`; cases with the same gradients share it.
      **arguments: the library's arguments, by name.
    """
    encoded = encode(grads)
    if self.inputs.setdefault(f"{self.library}: {key}", encoded) != encoded:
      raise ValueError(f"`key` must name one tree of gradients, got another one for '{key}': rename it.")
    given = ", ".join(f"{name}={_short(value)}" for name, value in arguments.items())
    name = f"{self.library} {function}({key}{', ' if given else ''}{given})"
    if name in {case["name"] for case in self.cases}:
      raise ValueError(f"cases must differ in their names, got '{name}' twice: rename the gradients.")
    self.cases.append(
      {
        "name": name,
        "library": self.library,
        "function": function,
        "source": source,
        "grads": f"{self.library}: {key}",
        "arguments": encode(arguments),
        "outputs": encode(outputs),
      }
    )


def encode(x: Any) -> Any:
  """A tree as JSON; arrays become dicts of dtype, shape and values."""
  if isinstance(x, dict):
    return {key: encode(value) for key, value in x.items()}
  if isinstance(x, list | tuple):
    return [encode(value) for value in x]
  if isinstance(x, np.ndarray | np.generic):
    return {"dtype": x.dtype.name, "shape": list(x.shape), "values": [_number(v) for v in np.ravel(x)]}
  return _word(x) if isinstance(x, float) else x


def decode(x: Any) -> Any:
  """Inverts `encode`, except that tuples become lists."""
  if isinstance(x, dict):
    if set(x) == {"dtype", "shape", "values"}:
      return np.array([decode(v) for v in x["values"]], np.float64).astype(_dtype(x["dtype"])).reshape(x["shape"])
    return {key: decode(value) for key, value in x.items()}
  if isinstance(x, list):
    return [decode(value) for value in x]
  return _WORDS.get(x, x) if isinstance(x, str) else x


def load() -> dict[str, Any]:
  """The content of the file."""
  loaded: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
  return loaded


def generate() -> dict[str, Any]:
  """Runs every case in the libraries."""
  everything: dict[str, Any] = {"format": "clipjax-golden/1", "versions": {}, "inputs": {}, "cases": []}
  for library in LIBRARIES:
    cases = importlib.import_module(f"golden_{library}").cases()
    everything["versions"][library] = cases.version
    everything["inputs"].update(cases.inputs)
    everything["cases"].extend(cases.cases)
  return everything


def dumps(everything: dict[str, Any]) -> str:
  """The text of the file: one line per tree of gradients and per case."""
  head = [f'"{key}": {json.dumps(everything[key], allow_nan=False)}' for key in ("format", "versions")]
  inputs = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in everything["inputs"].items())
  cases = ",\n".join(json.dumps(case, allow_nan=False) for case in everything["cases"])
  return "{" + ",\n".join([*head, f'"inputs": {{\n{inputs}\n}}', f'"cases": [\n{cases}\n]']) + "}\n"


def differences(stored: dict[str, Any], fresh: dict[str, Any]) -> Iterator[str]:
  """One line for each difference between the file and a fresh run beyond rounding."""
  if stored["versions"] != fresh["versions"]:
    yield f"versions: {stored['versions']} stored, {fresh['versions']} installed"
  for key in sorted(stored["inputs"].keys() | fresh["inputs"].keys()):
    if stored["inputs"].get(key) != fresh["inputs"].get(key):
      yield f"inputs: '{key}'"
  old, new = ({case["name"]: case for case in x["cases"]} for x in (stored, fresh))
  for name in sorted(old.keys() | new.keys()):
    if name not in old or name not in new:
      yield f"only {'stored' if name in old else 'fresh'}: {name}"
      continue
    a, b = dict(old[name]), dict(new[name])
    if not _close(decode(a.pop("outputs")), decode(b.pop("outputs"))) or a != b:
      yield f"case: {name}"


def _close(a: Any, b: Any) -> bool:
  if isinstance(a, dict):
    return isinstance(b, dict) and a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
  if isinstance(a, list):
    return isinstance(b, list) and len(a) == len(b) and all(map(_close, a, b))
  if not isinstance(a, np.ndarray):
    return type(a) is type(b) and encode(a) == encode(b)
  if not isinstance(b, np.ndarray) or (a.dtype, a.shape) != (b.dtype, b.shape):
    return False
  rtol = TOLERANCE.get(a.dtype.name, 0.0)
  return np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=rtol, atol=0, equal_nan=True)


def _number(x: Any) -> Any:
  """The shortest number that reads back exactly."""
  if x.dtype.kind in "biu":
    return x.item()
  word = _word(float(x))
  if isinstance(word, str):
    return word
  short = float(str(x))
  return short if x.dtype.type(short) == x else word


def _word(x: float) -> Any:
  return float(x) if math.isfinite(x) else "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"


def _dtype(name: str) -> Any:
  return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def _short(value: Any) -> str:
  if isinstance(value, np.ndarray | np.generic):
    return f"{value.dtype.name}{list(value.shape)}" if value.size > 1 else f"{value.dtype.name} {value.item():.6g}"
  if isinstance(value, dict):
    return "{...}"
  if isinstance(value, list) and (len(value) > 4 or any(isinstance(x, np.ndarray) for x in value)):
    return f"[{len(value)} values]"
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def main() -> None:
  """Writes the file, or checks it."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("mode", nargs="?", choices=["write", "check"], default="write")
  mode = parser.parse_args().mode
  fresh = generate()
  if mode == "check":
    found = list(differences(load(), fresh))
    print("\n".join(found) or f"{len(fresh['cases'])} cases match the file.")
    sys.exit(bool(found))
  PATH.write_text(dumps(fresh), encoding="utf-8")
  print(f"{len(fresh['cases'])} cases, {PATH.stat().st_size / 1e3:.0f} kB, {fresh['versions']}")


if __name__ == "__main__":
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
  main()
