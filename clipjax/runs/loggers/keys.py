"""Keys of a row as loggers take them that do not take every key: mlflow and neptune.

A new key is the same in every row, and no two keys become one.
"""

import posixpath
import re

_MLFLOW_LENGTH = 250


class Namespaces:
  """Keys for a logger in which "grad/norm" cannot be a number and also a folder, as in "grad/norm/w".

  The slash after what is a number becomes a dot: "grad/norm.w".
  A number that comes after its folder is "grad/norm.all".
  """

  def __init__(self) -> None:
    self._new: dict[str, str] = {}
    self._folders: set[str] = set()

  def __call__(self, key: str) -> str:
    """The key to be used."""
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
  """Keys of mlflow: letters, digits and "_-. :/" alone, no empty folder, at most 250 characters.

  Its file store has folders, and a name such as "blocks/w[3]" is "blocks/w.3".
  """

  def __init__(self) -> None:
    super().__init__()
    self._taken: set[str] = set()

  def _without_folder(self, key: str) -> str:
    new = re.sub(r"\[(\w+)\]", r".\1", super()._without_folder(key))
    new = re.sub(r"[^/\w.\- ]", "_", new)
    new = posixpath.normpath(re.sub(r"(?<![^/])\.+(?![^/])", "_", new)).lstrip("/")[:_MLFLOW_LENGTH]
    number, unique = 2, new
    while unique in self._taken:
      unique, number = f"{new[: _MLFLOW_LENGTH - 8]}_{number}", number + 1
    self._taken.add(unique)
    return unique
