"""Recognizes a page that clipjax wrote by its first lines, which name the generator."""

import os

# The version follows.
START = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="clipjax '


def may_be_replaced(path: str | os.PathLike[str]) -> bool:
  """Whether a page may replace `path`: there is no file, an empty one, a page of clipjax, or no regular file."""
  if not os.path.isfile(path):
    return True
  with open(path, "rb") as file:
    head = file.read(len(START))
  return head in (b"", START.encode())
