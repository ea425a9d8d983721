"""What a compiler made of a program before, kept in a folder. It is not a command.

A compiler makes the same of the same program, so a test need not ask it twice. The key of an entry is everything that
the facts depend on: the lowered program, the target, the versions of the compiler, its flags, and the code that counts.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerators_targets import TARGETS, version

_COUNTS = Path(__file__).with_name("accelerators_hlo.py")

Facts = dict[str, Any]


def kept(folder: str | None, target: str, lowered: Any, make: Callable[[], Facts]) -> Facts:
  """What `make()` gives, or gave before for the same program; without a folder it is always made."""
  if folder is None:
    return make()
  packages = ("jax", "jaxlib", *TARGETS[target].packages)
  versions = [f"{package} {version(package)}" for package in packages]
  # Where the compiler lies is another folder in each environment; its version is in the key already.
  flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "_dir=" not in flag]
  parts = [target, *versions, *flags, _COUNTS.read_text("utf-8"), lowered.as_text()]
  key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
  path = Path(folder) / f"program-{key}.json"
  if path.exists():
    found: Facts = json.loads(path.read_text("utf-8"))
    return found
  found = make()
  beside = path.with_suffix(f".{os.getpid()}")
  beside.write_text(json.dumps(found), "utf-8")
  beside.replace(path)  # At once, so that no other process reads half of it.
  return found
