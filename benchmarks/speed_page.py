"""Turns the JSON of `speed.py` into the speed page, in Markdown.

`render` is a pure function, so a test can compare the page with the numbers. Every figure in a sentence is derived from
the JSON too.
"""

import speed_targets
from speed_sections import DASH, SECTIONS, Json, ms, table
from speed_trees import CLIPJAX, LOOK_EVERY, NO_CLIP, OPTAX
from speed_why import WHY
from timing import WARM_UP


def render(data: Json, picture: str = "speed.png") -> str:
  """The whole page; sections that were not run are left out."""
  sections = data["sections"]
  lines = [
    "# Speed",
    "",
    "What a clip costs, beside Optax, torch and TensorFlow. Each section comes from one run, on the machine named at "
    "the end. Every number and every verdict is derived from `speed.json`, which `python benchmarks/speed.py` writes, "
    "but for the numbers under *Why it is not less*.",
    "",
  ]
  if any(section["quick"] for section in sections.values()):
    lines += ["**A quick run on small trees: it shows that everything runs, and measures nothing.**", ""]
  lines += in_short(data) + target_section(data)
  for name, (title, write) in SECTIONS.items():
    if name in sections:
      lines += [f"## {title}", "", *write(sections[name])]
      lines += ["![Time against the number of parameters and leaves](" + picture + ")", ""] * (name == "growth")
      lines += [f"Made by `{sections[name]['command']}`.", ""]
  return "\n".join([*lines, WHY, *how_to_run(), *how_measured(data), *machines(data)]).rstrip() + "\n"


def section_text(name: str, section: Json) -> str:
  """One section, printed as soon as it is done."""
  title, write = SECTIONS[name]
  return "\n".join([f"## {title}", "", *write(section)])


# The summary --------------------------------------------------------------------------------------------------------


def in_short(data: Json) -> list[str]:
  """The main results in sentences, as far as they were measured."""
  lines = []
  for key in ("transformer", "leaf", "many"):
    case = speed_targets.find(data, "adam", key)
    if case:
      v = case["variants"]
      lines.append(
        f"- {case['tree']}, float32: the clip adds {ms(v[CLIPJAX]['added'])} ms to Adam's step of "
        f"{ms(v[NO_CLIP]['median'])} ms{', which is lost in its noise' * (v[CLIPJAX]['added'] < 0)}; Optax's clip adds "
        f"{ms(v[OPTAX]['added'])} ms."
      )
  case = speed_targets.find(data, "train", "training")
  if case:
    v = case["variants"]
    added = {name: v[name]["added"] / v[NO_CLIP]["median"] for name in (CLIPJAX, OPTAX)}
    lines.append(
      f"- The clip changes the time of a whole training step of a Transformer with {case['parameters'] / 1e6:.1f}M "
      f"parameters by {added[CLIPJAX]:+.1%}, Optax's clip by {added[OPTAX]:+.1%}."
    )
  held = [t.holds for t in speed_targets.targets(data) if t.holds is not None]
  if held:
    lines.append(f"- {sum(held)} of {len(held)} measured targets hold.")
  return ["## In short", "", *lines, ""] if lines else []


def target_section(data: Json) -> list[str]:
  """The targets, and whether they are met."""
  verdict = {True: "yes", False: "**no**", None: DASH}
  rows = [
    (t.what, t.limit or "reported", t.measured, verdict[t.holds], f"`--only {t.section}`")
    for t in speed_targets.targets(data)
  ]
  return [
    "## Targets",
    "",
    "For two CPU cores. Each figure is a ratio of medians within one run of `python benchmarks/speed.py` with the "
    f"option in its row. A step with `watch()` is the mean over {LOOK_EVERY} steps, one of which counts zeros and "
    "measures parameters.",
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
    'pip install ".[bench]"  # torch and TensorFlow for the CPU; without them, only JAX runs.',
    "python benchmarks/speed.py",
    "```",
    "",
    "Use a quiet machine: another busy process spoils the numbers. `--only norm adam` runs some sections, and the "
    "others keep their numbers; `--rounds` sets the number of rounds; `--peers jax` leaves out the other frameworks; "
    "`--quick` runs everything on small trees and, without `--out`, writes nothing. The same command runs on a GPU.",
    "",
  ]


def how_measured(data: Json) -> list[str]:
  """How times are measured."""
  rounds = sorted({section["rounds"] for section in data["sections"].values()})
  return [
    "## How it is measured",
    "",
    f"All variants of a table take turns: in each of {' or '.join(map(str, rounds))} rounds, every variant runs once, "
    f"in random order, after {WARM_UP} rounds that do not count. Compilation comes first, and every turn waits for its "
    "result. Times are medians over the rounds; a minimum is the fastest turn. Ratios compare only variants of the "
    "same rounds.",
    "",
    "torch and TensorFlow each run in their own process, which keeps its tensors and works only during its turn. If "
    "they take part, every variant first runs once untimed, so that no variant finds the caches full of another's "
    "tensors, and there is a short pause before each turn. Every framework uses its default threads. All use the same "
    "gradients: normal entries from one seed.",
    "",
    "`jnp.sum` over the same bytes measures the bandwidth. It takes turns with the other variants and always runs "
    "twice, timed the second time. With few parameters the bytes stay in the caches, and the bandwidth is that of the "
    "caches.",
    "",
  ]


def machines(data: Json) -> list[str]:
  """Where and when the sections ran, one row per machine, set of packages and day."""
  groups: dict[tuple[str, str, str], list[str]] = {}
  for name in SECTIONS:
    if name in data["sections"]:
      section = data["sections"][name]
      versions = ", ".join(f"{package} {version}" for package, version in section["versions"].items())
      where = (section["machine"], versions, section["date"])
      groups.setdefault(where, []).append(f"{name} ({section['seconds']:.0f} s)")
  rows = [(*where, ", ".join(names)) for where, names in groups.items()]
  return ["## Machine", "", *table(("machine", "versions", "date", "sections"), rows, left=4)]
