"""Keys of a row for loggers that do not accept every key: mlflow and neptune.

A key gets the same new key in every row, and no two keys get the same one.
"""

import posixpath
import re

_MLFLOW_LENGTH = 250


class Namespaces:
  """Keys for a logger in which "grad/norm" cannot be both a number and a folder, as in "grad/norm/w".

  If the folder already is a number, its slash becomes a dot: "grad/norm.w". If the number comes after its folder, it
  becomes "grad/norm.all".
  """

  def __init__(self) -> None:
    self._new: dict[str, str] = {}
    self._folders: set[str] = set()

  def __call__(self, key: str) -> str:
    """The key to use."""
    if key not in self._new:
      self._new[key] = self._without_folder(key)
    return self._new[key]

  def _without_folder(self, key: str) -> str:
    parts = key.split("/")
    folders = ["/".join(parts[:i]) for i in range(1, len(parts))]
    for folder in folders:
      if folder in self._new:
        return f"{folder}.{key[len(folder) + 1 :]}"
    self._folders.update(folders)
    return f"{key}.all" if key in self._folders else key


class MlflowKeys(Namespaces):
  """Keys for mlflow: only letters, digits and "_-. :/", no empty folder, at most 250 characters.

  Its file store has folders, and a name such as "blocks/w[3]" becomes "blocks/w.3".
  """

  def __init__(self) -> None:
    super().__init__()
    self._taken: set[str] = set()

  def _without_folder(self, key: str) -> str:
    # Rewrite what mlflow refuses, then number duplicates.
    new = re.sub(r"\[(\w+)\]", r".\1", super()._without_folder(key))
    new = re.sub(r"[^/\w.\- ]", "_", new)
    new = posixpath.normpath(re.sub(r"(?<![^/])\.+(?![^/])", "_", new)).lstrip("/")[:_MLFLOW_LENGTH]
    number, unique = 2, new
    while unique in self._taken:
      unique, number = f"{new[: _MLFLOW_LENGTH - 8]}_{number}", number + 1
    self._taken.add(unique)
    return unique
