"""The speed page: from the JSON of `speed.py` to Markdown, and nothing else.

`render` is a pure function, so that a test can hold the page against the numbers. Every figure in a sentence is derived
from them too.
"""

import speed_targets
from speed_sections import DASH, SECTIONS, Json, ms, table
from speed_trees import CLIPJAX, LOOK_EVERY, NO_CLIP, OPTAX
from speed_why import WHY
from timing import WARM_UP


def render(data: Json, picture: str = "speed.png") -> str:
  """The whole page; sections that have not been run are left out."""
  sections = data["sections"]
  lines = [
    "# Speed",
    "",
    "What a clip costs, measured beside Optax, torch and TensorFlow. Every number and every verdict on this page is "
    "derived from `speed.json`, which `python benchmarks/speed.py` writes.",
    "",
  ]
  if any(section["quick"] for section in sections.values()):
    lines += ["**A quick run, on small trees: it shows that everything runs, and measures nothing.**", ""]
  lines += in_short(data) + target_section(data)
  for name, (title, write) in SECTIONS.items():
    if name in sections:
      lines += [f"## {title}", "", *write(sections[name])]
      lines += ["![Time against the number of parameters and of leaves](" + picture + ")", ""] * (name == "growth")
      lines += [f"Made by `{sections[name]['command']}`.", ""]
  return "\n".join([*lines, WHY, *how_to_run(), *how_measured(data), *machines(data)]).rstrip() + "\n"


def section_text(name: str, section: Json) -> str:
  """One section, as it is printed when it is done."""
  title, write = SECTIONS[name]
  return "\n".join([f"## {title}", "", *write(section)])


# The summary --------------------------------------------------------------------------------------------------------


def in_short(data: Json) -> list[str]:
  """The main results in sentences, those that were measured."""
  lines = []
  for key in ("transformer", "leaf", "many"):
    case = speed_targets.find(data, "adam", key)
    if case:
      v = case["variants"]
      lines.append(
        f"- {case['tree']}, float32: before Adam the clip adds {ms(v[CLIPJAX]['added'])} ms to a step of "
        f"{ms(v[NO_CLIP]['median'])} ms; Optax's adds {ms(v[OPTAX]['added'])} ms."
      )
  case = speed_targets.find(data, "train", "training")
  if case:
    v = case["variants"]
    added = {name: v[name]["added"] / v[NO_CLIP]["median"] for name in (CLIPJAX, OPTAX)}
    lines.append(
      f"- A whole training step of a Transformer of {case['parameters'] / 1e6:.1f}M parameters changes by "
      f"{added[CLIPJAX]:+.1%} with the clip, by {added[OPTAX]:+.1%} with Optax's."
    )
  held = [t.holds for t in speed_targets.targets(data) if t.holds is not None]
  if held:
    lines.append(f"- {sum(held)} of {len(held)} targets that were measured hold.")
  return ["## In short", "", *lines, ""] if lines else []


def target_section(data: Json) -> list[str]:
  """What is to be reached, and whether it is."""
  verdict = {True: "yes", False: "**no**", None: DASH}
  rows = [
    (t.what, t.limit or "reported", t.measured, verdict[t.holds], f"`--only {t.section}`")
    for t in speed_targets.targets(data)
  ]
  return [
    "## Targets",
    "",
    "For two cores of a CPU. Each figure is a ratio of medians within one run, made by `python benchmarks/speed.py` "
    f"with the option behind it. A step with `watch()` is the mean of {LOOK_EVERY}, one of which looks at zeros and "
    "parameters.",
    "",
    *table(("what", "limit", "measured", "holds", "made by"), rows, left=1),
  ]


# How ----------------------------------------------------------------------------------------------------------------


def how_to_run() -> list[str]:
  """The commands."""
  return [
    "## How to run",
    "",
    "```sh",
    'pip install ".[bench]"  # torch and TensorFlow for the CPU; without them JAX runs alone.',
    "python benchmarks/speed.py",
    "```",
    "",
    "On a quiet machine: another busy process spoils it. `--only norm adam` runs some sections, and the others keep "
    "their numbers; `--rounds` makes them longer; `--peers jax` leaves the other frameworks out; `--quick` "
    "runs everything on small trees and, without `--out`, writes nothing. The same command runs on a GPU.",
    "",
  ]


def how_measured(data: Json) -> list[str]:
  """The rules of measuring."""
  rounds = sorted({section["rounds"] for section in data["sections"].values()})
  return [
    "## How it is measured",
    "",
    f"All variants of a table take turns: in each of {' or '.join(map(str, rounds))} rounds every one runs once, in a "
    f"new order of chance, after {WARM_UP} rounds that do not count. Compilation comes before, and every turn waits "
    "for its result. Times are medians over the rounds; a minimum is the fastest turn. Ratios compare variants of the "
    "same rounds only.",
    "",
    "torch and TensorFlow each work in a process of their own, which holds its tensors and works only while it has its "
    "turn. Where they take part, every variant first runs once more without being timed, so that none finds the caches "
    "full of another's tensors, and there is a short pause before each turn. Every framework uses the threads that it "
    "takes by default. All have the same gradients, normal entries from one seed.",
    "",
    "`jnp.sum` of the same bytes, the measure of the bandwidth, takes turns with the rest and always runs twice, the "
    "second time timed. With few parameters the bytes stay in the caches, and so does its bandwidth.",
    "",
  ]


def machines(data: Json) -> list[str]:
  """Where and when the sections ran, those of one machine, day and set of packages in one row."""
  groups: dict[tuple[str, str, str], list[str]] = {}
  for name in SECTIONS:
    if name in data["sections"]:
      section = data["sections"][name]
      versions = ", ".join(f"{package} {version}" for package, version in section["versions"].items())
      where = (section["machine"], versions, section["date"])
      groups.setdefault(where, []).append(f"{name} ({section['seconds']:.0f} s)")
  rows = [(*where, ", ".join(names)) for where, names in groups.items()]
  return ["## Machine", "", *table(("machine", "versions", "date", "sections"), rows, left=4)]
