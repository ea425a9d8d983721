"""Where programs that were compiled for tests are kept: for one version of jaxlib and one kind of CPU."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil

_LARGEST = 4 * 2**30  # Bytes; a folder that has grown above that is emptied.


def cache_folder() -> str:
  """The folder, in the user's cache; made where it is missing."""
  home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  folder = home / "clipjax-tests" / f"jaxlib-{importlib.metadata.version('jaxlib')}-{_cpu()}"
  if folder.is_dir() and sum(entry.stat().st_size for entry in os.scandir(folder)) > _LARGEST:
    shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True, exist_ok=True)
  return str(folder)


def options() -> dict[str, str | int]:
  """The options of JAX with which every program is taken from the folder, and kept there; see `variables`."""
  return {
    "jax_compilation_cache_dir": os.environ.get("CLIPJAX_TESTS_CACHE") or cache_folder(),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }


def variables() -> dict[str, str]:
  """`options` for a process that is to be started."""
  return {name.upper(): str(value) for name, value in options().items()}


def _cpu() -> str:
  """What tells this kind of CPU from others: programs are compiled for its instructions."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    lines = []
  flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
  return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


if __name__ == "__main__":  # For a shell, which evaluates it.
  for name, value in variables().items():
    print(f"export {name}={shlex.quote(value)}")
