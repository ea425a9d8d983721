"""Warnings that are given once, however many steps cause them."""

from collections.abc import Callable


class Once:
  """Forwards each kind of warning once."""

  def __init__(self, warn: Callable[[str], None]):
    self._warn = warn
    self._said: set[str] = set()

  def say(self, kind: str, text: str) -> None:
    """Warns, unless a warning of this kind was given before."""
    if kind not in self._said:
      self._said.add(kind)
      self._warn(text)
