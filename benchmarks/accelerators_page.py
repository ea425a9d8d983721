"""The page of `accelerators.py`: from its JSON to Markdown, and nothing else.

`render` is a pure function, so that a test can hold the page against the numbers; the bounds are those of
`accelerators_bounds.py`.
"""

from collections.abc import Sequence
from typing import Any

from accelerators_bounds import ALL, BOUNDS, COMPILE, MB, SCALARS, SMALL, Bound, Json, Verdict, traffic, verdicts
from accelerators_targets import EXTRA, TARGETS
from speed_sections import DASH, table
from speed_trees import CLIPJAX, NO_CLIP, OPTAX

ORDER = ("one", "tf", "many", "stack", "train")
BYTES = ("temporaries", "HBM traffic")  # Bounds on bytes; tables give them in MB.


def render(data: Json) -> str:
  """The whole page; what has not been compiled is left out."""
  cases = ordered(data["cases"])
  lines = [
    "# What compilers for TPUs and GPUs make of a clip",
    "",
    "One step with a clip, compiled ahead of time for devices that were not there. **Every figure is the compiler's: "
    "no device ran any of this, and nothing here is a time on one.** Where a GPU is at hand, `python "
    "benchmarks/gpu.py` times the same steps; no GPU has run it yet. All numbers and verdicts are derived from "
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
  """By target, case and dtype."""
  return sorted(cases, key=lambda x: (ALL.index(x["target"]), ORDER.index(x["key"]), x["dtype"] != "float32"))


# The summary --------------------------------------------------------------------------------------------------------


def in_short(cases: Sequence[Json]) -> list[str]:
  """The main results in sentences, those that there are."""
  lines = []
  for case in cases:
    if (case["key"], case["dtype"]) != ("tf", "float32"):
      continue
    v, where = case["variants"], f"{TARGETS[case['target']].title}, {case['title']}, float32"
    if case["target"] == "tpu":
      added = {name: mb(traffic(case, name)) for name in (CLIPJAX, OPTAX)}
      lines.append(
        f"- {where}: the clip adds {added[CLIPJAX]} MB of HBM traffic to the {mb(v[NO_CLIP]['traffic'])} MB of Adam's "
        f"step, Optax's adds {added[OPTAX]} MB."
      )
    elif case["target"] == "pod":
      reduces = {name: v[name]["all_reduces"] - v[NO_CLIP]["all_reduces"] for name in (CLIPJAX, OPTAX)}
      lines.append(f"- {where}: all-reduces added: {reduces[CLIPJAX]}; by Optax's clip: {reduces[OPTAX]}.")
    else:
      kernels = (v[name]["kernels"] for name in (NO_CLIP, CLIPJAX, OPTAX))
      lines.append(f"- {where}: kernels without a clip, with the clip, with Optax's: {', '.join(map(str, kernels))}.")
  found = verdicts(cases)
  if found:
    lines.append(f"- Of {len(found)} bounds, one for each number, clip and case, {sum(x.holds for x in found)} hold.")
  return ["## In short", "", *lines, ""] if lines else []


def bound_section(cases: Sequence[Json]) -> list[str]:
  """Each bound and clip by target, with the case in which it fails by most."""
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
    "In how many cases each bound holds; where it does not, the worst case, what was found there, and the most that "
    "the bound allows. HBM traffic is what goes beyond the step without a clip. On a TPU the compiler sets aside "
    f"{SMALL:,} bytes for each scalar that goes through HBM: the bounds on temporaries leave room for 8 a leaf where a "
    "clip by leaf runs on one chip, and for 16 a leaf on 256 chips. Those on traffic leave "
    f"{SCALARS} bytes a leaf, and 16 times that, for scalars.",
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
  """All clips in one case."""
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
    columns["beyond no clip, MB"] = [DASH if name == NO_CLIP else mb(traffic(case, name)) for name in v]
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
  """The text as a heading begins."""
  return text[:1].upper() + text[1:]


def mb(size: float) -> str:
  """Megabytes with three digits or more."""
  x = size / MB
  if abs(x) < 0.0005:
    return "0"
  return f"{x:,.0f}" if abs(x) >= 999.5 else f"{x:.1f}" if abs(x) >= 9.95 else f"{x:.3g}"


# How ----------------------------------------------------------------------------------------------------------------


def how_measured() -> list[str]:
  """What the columns are."""
  return [
    "## How it is measured",
    "",
    "A step is `optax.chain(clip, optax.adam(1e-3))` and `optax.apply_updates` in one jitted function, state and "
    "parameters donated, lowered for abstract devices and compiled. The training step computes its gradients first: a "
    "decoder of width 512, 8 heads, sequences of 256 tokens, a vocabulary of 8192, with 8 sequences on one device and "
    "one on each of 256 chips. Parameters, gradients and moments are in the dtype of the heading. On 256 chips, a mesh "
    "of 16 x 16, matrices are split over both axes and everything else is on every chip.",
    "",
    "- **Conditionals, kernels, copies, all-reduces** are instructions of the optimized HLO that run on their own: in "
    "the entry computation, and in branches, loops and calls. Kernels are fusions; on the GPU each is a launch, and "
    "*other launches* are what is neither fusion nor copy, such as matrix products of a library. A loop counts once.",
    "- **Temporaries** are `memory_analysis().temp_size_in_bytes`: what the step allocates beside arguments and "
    "results.",
    "- **HBM traffic** adds up the operands and results of these instructions as far as their layout is in HBM, not in "
    "the chip's own memory; an asynchronous copy or slice counts what it moves. Branches are added up apart. It is an "
    "estimate from the program. The training step's gathers count the whole table that they read from.",
    "- **Compile** is the time from tracing the step to the compiled program, the best of the rounds in which the "
    "clips took turns, each with empty caches. It depends on the machine; the rest does not.",
    "- **On the H100** autotuning and Triton's matrix products are off, as both need the card.",
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
    "`--target tpu`, `--only tf many` and `--dtype float32` compile a part, and the rest keeps its numbers. `--quick` "
    "compiles fewer leaves once and, without `--out`, writes nothing.",
    "",
  ]


def made(cases: Sequence[Json]) -> list[str]:
  """Where and when, the cases of one machine, day and set of packages in one row."""
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
