"""How a page of clipjax is told from any other file: by its first lines, which name their generator."""

import os

# The version follows.
START = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="clipjax '


def may_be_replaced(path: str | os.PathLike[str]) -> bool:
  """Whether nothing is lost where a page is written there: no file, an empty one, a page, or no plain file."""
  if not os.path.isfile(path):
    return True
  with open(path, "rb") as file:
    head = file.read(len(START))
  return head in (b"", START.encode())
