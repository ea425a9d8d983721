"""Warnings that are given once, however many steps they are true of."""

from collections.abc import Callable


class Once:
  """Hands each kind of warning on once."""

  def __init__(self, warn: Callable[[str], None]):
    self._warn = warn
    self._said: set[str] = set()

  def say(self, kind: str, text: str) -> None:
    """Warns, unless one of this kind was given before."""
    if kind not in self._said:
      self._said.add(kind)
      self._warn(text)
