"""Writes `docs/api.md`, the reference of every public name, from the docstrings.

  python docs/api.py          writes the page
  python docs/api.py --check  exits with 1 if the page is not what the docstrings say

A section of the page is a thing to do. A public name without a section is an error.
"""

import inspect
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import clipjax

PAGE = pathlib.Path(__file__).parent / "api.md"
SECTIONS = {
  "Train with a clip": (
    "clip_by_global_norm", "clip_by_leaf_norm", "clip_by_group_norm", "clip_by_block_rms", "clip_by_value",
    "adaptive_grad_clip", "ClipState",
  ),
  "Let the threshold adapt": ("autoclip", "zclip", "adagc"),
  "Reject a step": ("skip_steps", "SkipState"),
  "Clip now": ("clip_grad_norm", "clip_grad_value", "clip_grad_per_example"),
  "Measure": ("global_norm", "leaf_norms"),
  "Read the state": ("metrics", "raise_if_nonfinite"),
  "Watch": ("watch", "WatchState", "clip_effect", "EffectState"),
  "Record a run": ("runs.Recorder", "runs.Run", "runs.read_run"),
  "Judge a run": (
    "runs.diagnose", "runs.HealthReport", "runs.HealthLimits", "runs.Finding", "runs.Event", "runs.Move",
  ),
  "Choose a threshold": ("runs.suggest_max_norm", "runs.Suggestion"),
  "Draw a run": ("runs.write_report", "runs.plot_norms"),
  "Make a rule": (
    "rules.Rule", "rules.percentile", "rules.quantile_tracking", "rules.zscore", "rules.rolling_sigma",
    "rules.ema_ratio", "rules.minimum", "rules.delayed",
  ),
}  # fmt: skip
HEADING = re.compile(r"^(Args|Attributes|Returns|Raises|Example|References):$")
ITEM = re.compile(r"^  ((?:\w+, )*\w+): (.*)$")


def public_names() -> set[str]:
  """Every public name, without `clipjax.`."""
  of_rules = {f"rules.{name}" for name, x in vars(clipjax.rules).items() if name[0] != "_" and not inspect.ismodule(x)}
  of_runs = {f"runs.{name}" for name in clipjax.runs.__all__}
  return (set(clipjax.__all__) - {"rules", "runs"}) | of_rules | of_runs


def page() -> str:
  """The whole page."""
  listed = [name for names in SECTIONS.values() for name in names]
  if missing := public_names().symmetric_difference(listed):
    raise SystemExit(f"`SECTIONS` must list every public name once, and differs by: {', '.join(sorted(missing))}")
  lines = ["# API", "", "Made from the docstrings by `python docs/api.py`. Options after the `*` are keyword-only.", ""]
  lines += [f"- [{title}](#{anchor(title)}): {', '.join(map(link, names))}" for title, names in SECTIONS.items()]
  for title, names in SECTIONS.items():
    lines += ["", f"## {title}"]
    for name in names:
      lines += ["", *entry(name)]
  return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
  """The fragment that a heading gets."""
  return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def link(name: str) -> str:
  """A name with a link to its entry."""
  return f"[`{name}`](#{anchor(name)})"


def entry(name: str) -> Iterator[str]:
  """A name: its signature, its docstring, and its public methods."""
  value: Any = clipjax
  for part in name.split("."):
    value = getattr(value, part)
  yield f"### {name}"
  if not hasattr(value, "_fields"):
    yield from ("", f"`{signature(f'clipjax.{name}', value)}`")
  yield from ("", *markdown(inspect.getdoc(value) or ""))
  if inspect.isclass(value):
    for method, found in vars(value).items():
      function = getattr(found, "__func__", found)  # A class method.
      if method[0] != "_" and inspect.isfunction(function) and function.__doc__:
        yield from ("", f"**`{signature(method, function)}`**", "", *markdown(inspect.getdoc(function) or ""))


def signature(name: str, value: Any) -> str:
  """The call without annotations."""
  parameters = [p.replace(annotation=p.empty) for p in inspect.signature(value).parameters.values()]
  return name + str(inspect.Signature([p for p in parameters if p.name not in ("self", "cls")]))


def markdown(docstring: str) -> Iterator[str]:
  """A docstring in Google's sections as Markdown: lists of arguments, examples as code."""
  section, is_code = "", False
  for line in docstring.splitlines():
    if found := HEADING.match(line):
      section = found[1]
      yield from () if section == "Example" else (f"**{section}**", "")
      continue
    begins = line.strip().startswith(">>>")
    if begins and not is_code:
      is_code = True
      yield "```python"
    if is_code and not line.strip():
      is_code = False
      yield "```"
    yield line.removeprefix("  ") if is_code else _prose(line, section)
  if is_code:
    yield "```"


def _prose(line: str, section: str) -> str:
  """A line of text; one that names an argument or an error becomes an item of a list."""
  if section in ("Args", "Attributes", "Raises") and (found := ITEM.match(line)):
    return f"- {', '.join(f'`{name}`' for name in found[1].split(', '))}: {found[2]}"
  return "  " + line.strip() if section in ("Args", "Attributes", "Raises") and line.strip() else line.strip()


def main() -> None:
  """Writes the page, or checks it."""
  text = page()
  if "--check" not in sys.argv[1:]:
    PAGE.write_text(text, encoding="utf-8")
  elif PAGE.read_text(encoding="utf-8") != text:
    raise SystemExit("docs/api.md is not what the docstrings say: run `python docs/api.py`.")


if __name__ == "__main__":
  main()
