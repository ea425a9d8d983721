"""The wheel and the sdist: what they contain and require, and that the sdist builds the same wheel.

They run with `-m release`, as in `.ci/run release`, which also installs both with only their run-time dependencies.
"""

import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import clipjax

ROOT = pathlib.Path(__file__).parent.parent
NAME = f"clipjax-{clipjax.__version__}"
TOP = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"}
pytestmark = pytest.mark.release
KINDS = {  # What belongs in each folder of the sdist.
  "clipjax": {".py", ".typed"},
  "tests": {".py", ".json"},
  "benchmarks": {".py"},
  "docs": {".md", ".png", ".json", ".py"},
  "notebooks": {".py", ".ipynb"},
}


def build(source, out):
  """The wheel and the sdist of a folder, as `{member: bytes}` each."""
  command = [sys.executable, "-m", "hatchling", "build", "-d", out]
  done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert sorted(path.name for path in out.iterdir()) == [f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"]
  with zipfile.ZipFile(out / f"{NAME}-py3-none-any.whl") as archive:
    wheel = {name: archive.read(name) for name in archive.namelist()}
  with tarfile.open(out / f"{NAME}.tar.gz") as archive:
    members = archive.getmembers()
    assert all(member.isfile() and member.name.startswith(f"{NAME}/") for member in members)
    sdist = {member.name.removeprefix(f"{NAME}/"): archive.extractfile(member).read() for member in members}
  return wheel, sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  return build(ROOT, tmp_path_factory.mktemp("dist"))


def in_tree(folder):
  """The files of a folder that belong into the sdist."""
  paths = (ROOT / folder).rglob("*")
  return {str(path.relative_to(ROOT)) for path in paths if path.suffix in KINDS[folder] and not hidden(path)}


def hidden(path):
  return any(part.startswith(".") for part in path.relative_to(ROOT).parts)


def test_wheel_has_the_package_and_nothing_else(built):
  wheel, _ = built
  info = f"{NAME}.dist-info"
  about = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
  assert set(wheel) == in_tree("clipjax") | about
  assert "clipjax/py.typed" in wheel
  for name, content in wheel.items():
    if name.startswith("clipjax/"):
      assert content == (ROOT / name).read_bytes()
  assert wheel[f"{info}/entry_points.txt"].decode() == "[console_scripts]\nclipjax = clipjax.cli:main\n"


def test_sdist_has_the_sources_and_nothing_else(built):
  _, sdist = built
  # Hatchling adds PKG-INFO, and the .gitignore that it follows.
  assert set(sdist) == set().union(*map(in_tree, KINDS)) | TOP | {"PKG-INFO", ".gitignore"}
  assert "clipjax/py.typed" in sdist and {"tests/data/vectors.json", "tests/data/golden.json"} <= sdist.keys()


def test_wheel_of_the_sdist_is_the_same(built, tmp_path):
  wheel, sdist = built
  for name, content in sdist.items():
    path = tmp_path / "source" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  assert build(tmp_path / "source", tmp_path / "dist")[0] == wheel


def test_wheel_asks_for_the_run_time_dependencies_alone(built):
  metadata = built[0][f"{NAME}.dist-info/METADATA"].decode()
  asked = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
  assert {re.match(r"[\w-]+", line)[0] for line in asked if "extra ==" not in line} == {"jax", "jaxlib", "optax"}
  assert f"Version: {clipjax.__version__}\n" in metadata and "License-Expression: Apache-2.0\n" in metadata


def test_every_dependency_has_a_lower_bound():
  # Without one, the lowest version is one of years ago, and `uv --resolution lowest-direct` finds nothing that works.
  project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
  lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
  assert [line for line in lines if not re.search(r">=|==", line) and not line.startswith("clipjax[")] == []
