"""Turns the JSON of `accelerators.py` into its page, in Markdown.

`render` is a pure function, so a test can compare the page with the numbers. `accelerators_bounds.py` has the bounds.
"""

from collections.abc import Sequence
from typing import Any

from accelerators_bounds import ALL, BOUNDS, COMPILE, MB, SCALARS, SMALL, Bound, Json, Verdict, traffic, verdicts
from accelerators_targets import EXTRA, TARGETS
from speed_sections import DASH, table
from speed_trees import CLIPJAX, NO_CLIP, OPTAX

ORDER = ("one", "tf", "many", "stack", "train")
BYTES = ("temporaries", "HBM traffic")  # Bounds on bytes; tables show MB.


def render(data: Json) -> str:
  """The whole page; cases that were not compiled are left out."""
  cases = ordered(data["cases"])
  lines = [
    "# What compilers for TPUs and GPUs make of a clip",
    "",
    "One step with a clip, compiled ahead of time for devices that were not present. **Every figure comes from the "
    "compiler: no device ran any of this, and no figure is a time on a device.** On a GPU, `python benchmarks/gpu.py` "
    "times the same steps, but for the training step; no GPU has run it yet. All numbers and verdicts are derived from "
    "`accelerators.json`, which `python benchmarks/accelerators.py` writes.",
    "",
  ]
  if any(case["quick"] for case in cases):
    lines += ["**A quick run, with fewer leaves and each step compiled once.**", ""]
  lines += in_short(cases) + bound_section(cases)
  for target in ALL:
    own = [case for case in cases if case["target"] == target]
    if own:
      lines += [f"## {upper(TARGETS[target].title)}", ""]
      lines += [line for case in own for line in case_text(case)]
  return "\n".join([*lines, *how_measured(), *how_to_run(), *made(cases)]).rstrip() + "\n"


def ordered(cases: Sequence[Json]) -> list[Json]:
  """The cases sorted by target, case and dtype."""
  return sorted(cases, key=lambda x: (ALL.index(x["target"]), ORDER.index(x["key"]), x["dtype"] != "float32"))


# The summary --------------------------------------------------------------------------------------------------------


def in_short(cases: Sequence[Json]) -> list[str]:
  """The main results in sentences, as far as they were compiled."""
  lines = []
  for case in cases:
    if (case["key"], case["dtype"]) != ("tf", "float32"):
      continue
    v, where = case["variants"], f"{TARGETS[case['target']].title}, {case['title']}, float32"
    if case["target"] == "tpu":
      added = {name: mb(traffic(case, name)) for name in (CLIPJAX, OPTAX)}
      lines.append(
        f"- {where}: the clip adds {added[CLIPJAX]} MB of HBM traffic to the {mb(v[NO_CLIP]['traffic'])} MB of Adam's "
        f"step; Optax's clip adds {added[OPTAX]} MB."
      )
    elif case["target"] == "pod":
      reduces = {name: v[name]["all_reduces"] - v[NO_CLIP]["all_reduces"] for name in (CLIPJAX, OPTAX)}
      lines.append(f"- {where}: all-reduces added: {reduces[CLIPJAX]}; by Optax's clip: {reduces[OPTAX]}.")
    else:
      kernels = (v[name]["kernels"] for name in (NO_CLIP, CLIPJAX, OPTAX))
      lines.append(f"- {where}: kernels without a clip, with it, with Optax's: {', '.join(map(str, kernels))}.")
  found = verdicts(cases)
  if found:
    lines.append(f"- Of {len(found)} bounds, one per number, clip and case, {sum(x.holds for x in found)} hold.")
  return ["## In short", "", *lines, ""] if lines else []


def bound_section(cases: Sequence[Json]) -> list[str]:
  """Each bound and clip by target, with the case that exceeds it most."""
  found = verdicts(cases)
  rows = []
  for bound in BOUNDS:
    for clip in bound.clips:
      own = [x for x in found if x.bound == bound and x.clip == clip]
      cells = (bound_cell([x for x in own if x.target == target]) for target in ALL)
      rows.append((bound.what, bound.limit_text, clip, *cells))
  head = ("what", "at most", "clip", *(TARGETS[target].title for target in ALL))
  return [
    "## Bounds",
    "",
    "In how many cases each bound holds; if it fails somewhere, the worst case with the value found there and the "
    f"bound. HBM traffic counts what a clip adds to the step without one. On a TPU, the compiler reserves {SMALL:,} "
    "bytes for each scalar that goes through HBM. The bounds on temporaries therefore allow 8 scalars per leaf for a "
    f"clip by leaf on one chip, and 16 per leaf on 256 chips. The bounds on traffic allow {SCALARS} bytes per leaf, "
    "and 16 times that once, for scalars.",
    "",
    *table(head, rows, left=6),
  ]


def bound_cell(own: Sequence[Verdict]) -> str:
  """Whether a bound holds for one clip and target."""
  if not own:
    return DASH
  failed = [x for x in own if not x.holds]
  if not failed:
    return f"holds in {len(own)} of {len(own)}"
  worst = max(failed, key=lambda x: (x.value - x.limit) / max(abs(x.limit), 1.0))
  value, limit = (number(worst.bound, x) for x in (worst.value, worst.limit))
  return f"**holds in {len(own) - len(failed)} of {len(own)}**; worst {value}, at most {limit}: {worst.case}"


def number(bound: Bound, value: float) -> str:
  """A bounded number with its unit."""
  if bound.what in BYTES:
    return f"{mb(value)} MB"
  return f"{value:.1f} s" if bound.what == COMPILE else f"{value:.0f}"


# The tables ---------------------------------------------------------------------------------------------------------


def case_text(case: Json) -> list[str]:
  """The table of all clips in one case."""
  target, v = case["target"], case["variants"]
  columns: dict[str, list[str]] = {"clip": list(v)}
  columns["conditionals"] = [str(x["conditionals"]) for x in v.values()]
  columns["kernels"] = [str(x["kernels"]) for x in v.values()]
  if target == "gpu":
    columns["other launches"] = [str(x["others"]) for x in v.values()]
  columns["copies"] = [str(x["copies"]) for x in v.values()]
  columns["temporaries, MB"] = [mb(x["temporaries"]) for x in v.values()]
  if target != "gpu":
    columns["HBM traffic, MB"] = [mb(x["traffic"]) for x in v.values()]
    columns["in branches, MB"] = [mb(x["traffic_in_branches"]) for x in v.values()]
    columns["added by the clip, MB"] = [DASH if name == NO_CLIP else mb(traffic(case, name)) for name in v]
  if target == "pod":
    base = v[NO_CLIP]["all_reduces"]
    columns["all-reduces"] = [str(x["all_reduces"]) for x in v.values()]
    columns["added"] = [DASH if name == NO_CLIP else str(x["all_reduces"] - base) for name, x in v.items()]
  columns["compile, s"] = [f"{x['compile']:.1f}" for x in v.values()]
  columns["over Optax's"] = [f"{x['compile'] / v[OPTAX]['compile']:.2f}" for x in v.values()]
  each = " on each chip" if target == "pod" else ""
  leaves = "one leaf" if case["leaves"] == 1 else f"{case['leaves']} leaves"
  return [
    f"### {upper(case['title'])}, {case['dtype']}",
    "",
    f"{case['parameters']:,} parameters in {leaves}, a gradient of {mb(case['gradient'])} MB{each}.",
    "",
    *table(tuple(columns), list(zip(*columns.values(), strict=True))),
  ]


def upper(text: str) -> str:
  """The text with a capital first letter."""
  return text[:1].upper() + text[1:]


def mb(size: float) -> str:
  """Megabytes with at least three digits."""
  x = size / MB
  if abs(x) < 0.0005:
    return "0"
  return f"{x:,.0f}" if abs(x) >= 999.5 else f"{x:.1f}" if abs(x) >= 9.95 else f"{x:.3g}"


# How ----------------------------------------------------------------------------------------------------------------


def how_measured() -> list[str]:
  """What the columns mean."""
  return [
    "## How it is measured",
    "",
    "A step is `optax.chain(clip, optax.adam(1e-3))` and `optax.apply_updates` in one jitted function, with state and "
    "parameters donated, lowered for abstract devices and compiled. The training step first computes the gradients of "
    "a decoder with width 512, 8 heads, sequences of 256 tokens and a vocabulary of 8192, for 8 sequences on one "
    "device or one on each of 256 chips. Parameters, gradients and moments have the dtype of the heading. The 256 "
    "chips form a mesh of 16 x 16; matrices are split over both axes, and everything else is replicated.",
    "",
    "- **Conditionals, kernels, copies, all-reduces** are instructions of the optimized HLO that run by themselves: in "
    "the entry computation, and in branches, loops and calls. Kernels are fusions; on the GPU, each is a launch, and "
    "*other launches* are neither fusions nor copies, such as matrix products of a library. A loop counts once.",
    "- **Temporaries** are `memory_analysis().temp_size_in_bytes`: what the step allocates besides arguments and "
    "results.",
    "- **HBM traffic** adds up the operands and results of these instructions that are in HBM, not in the chip's own "
    "memory; an asynchronous copy or slice counts what it moves. Branches are added up separately. It is an estimate "
    "from the program. The training step's gathers count the whole table that they read from.",
    "- **Compile** is the time from tracing the step to the compiled program: the best of the rounds, given below "
    "with the versions, in which the clips took turns, each with empty caches. It depends on the machine; the other "
    "figures do not.",
    "- **On the H100**, autotuning and Triton's matrix products are off, as both need the card.",
    "",
  ]


def how_to_run() -> list[str]:
  """The commands."""
  return [
    "## How to run",
    "",
    "```sh",
    f"{EXTRA}  # The compilers, without a driver or a device.",
    "python benchmarks/accelerators.py",
    "```",
    "",
    "`--target tpu`, `--only tf many` and `--dtype float32` compile a part; the rest keeps its numbers. `--quick` "
    "compiles fewer leaves once and, without `--out`, writes nothing.",
    "",
  ]


def made(cases: Sequence[Json]) -> list[str]:
  """Where and when the cases were compiled, one row per machine, set of packages and day."""
  groups: dict[tuple[str, ...], list[Json]] = {}
  for case in cases:
    versions = ", ".join(f"{package} {number}" for package, number in case["versions"].items())
    where = (TARGETS[case["target"]].title, case["machine"], versions, case["date"], str(case["rounds"]))
    groups.setdefault(where, []).append(case)
  rows: list[tuple[Any, ...]] = [
    (*where, str(len(own)), f"{sum(case['seconds'] for case in own) / 60:.0f}") for where, own in groups.items()
  ]
  return [
    "## Versions", "", *table(("target", "machine", "versions", "date", "rounds", "cases", "minutes"), rows, left=4)
  ]  # fmt: skip
