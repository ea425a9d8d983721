"""The sections of the speed page: each turns its part of the JSON into a table and explains the numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import speed_targets
from speed_trees import (
  AT_ONCE,
  BY_LAYER,
  BY_LEAF,
  CLIPJAX,
  EAGER,
  IN_TURN,
  JITTED,
  LEAF_NORMS,
  LOOK,
  LOOK_EVERY,
  NO_CLIP,
  OPTAX,
  PLAIN,
  SUM,
  TF_EAGER,
  TF_FUNCTION,
  TORCH,
  WATCHED_LEAVES,
  Case,
)

Json = Mapping[str, Any]
DASH = "-"
KINDS = ("median", "min")


# Cells -------------------------------------------------------------------------------------------------------------


def row(cells: Iterable[str]) -> str:
  """A line of a table."""
  return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
  """A table whose first `left` columns are left-aligned."""
  return [row(head), row(["---"] * left + ["--:"] * (len(head) - left)), *map(row, rows), ""]


def ms(seconds: float) -> str:
  """Milliseconds with three digits."""
  x = 1e3 * seconds
  return f"{x:.0f}" if abs(x) >= 999.5 else f"{x:.3g}"


def percent(share: float) -> str:
  """A share in percent, with more decimals if it is small."""
  return f"{share:.2%}" if 0 < abs(share) < 0.001 else f"{share:.1%}" if abs(share) < 0.095 else f"{share:.0%}"


def share_of_limit(v: Json, name: str, reads: int = 1) -> str:
  """The time that the bytes need at the bandwidth of the sum, over the time of a variant."""
  return percent(reads * v[SUM]["median"] / v[name]["median"])


def speed_cell(v: Json, name: str, base: str) -> str:
  """The speed relative to the base, with median and minimum in brackets."""
  if name not in v:
    return DASH
  return f"{v[base]['median'] / v[name]['median']:.2f} ({ms(v[name]['median'])}, {ms(v[name]['min'])})"


def notes(section: Json) -> list[str]:
  """Notes on what was left out."""
  return [line for note in dict.fromkeys(section["notes"]) for line in (note, "")]


# Sections -----------------------------------------------------------------------------------------------------------


def norm_text(section: Json) -> list[str]:
  """Only the norm."""
  names = (OPTAX, CLIPJAX, LEAF_NORMS, TORCH, TF_EAGER, TF_FUNCTION)
  rows = []
  for case in section["cases"]:
    v = case["variants"]
    bandwidth = f"{case['bytes'] / v[SUM]['median'] / 1e9:.1f}"
    shares = [share_of_limit(v, name) for name in (PLAIN, CLIPJAX)]
    cells = (speed_cell(v, name, PLAIN) for name in (PLAIN, *names))
    rows.append((case["tree"], case["dtype"], *cells, *shares, bandwidth))
  head = ("tree", "dtype", PLAIN, *names, f"limit / {PLAIN}", f"limit / {CLIPJAX}", "GB/s of the sum")
  return [
    "Speed relative to the plainest norm in JAX, `sqrt(sum(sum(square(x.astype(float32)))))`, with median and minimum "
    "in ms in brackets. The limit is the time to read each leaf once, at the bandwidth that a plain `jnp.sum` reaches "
    "over as many entries of the same dtype in one leaf. Above 100% the sum is slower. torch is "
    "`get_total_norm(foreach=True)`, TensorFlow `tf.linalg.global_norm`.",
    "",
    *table(head, rows, left=2),
    *notes(section),
  ]


def clip_text(section: Json) -> list[str]:
  """Only the clip."""
  names = (OPTAX, CLIPJAX, TORCH, TF_EAGER, TF_FUNCTION)
  rows = []
  for case in section["cases"]:
    v = case["variants"]
    cells = (speed_cell(v, name, OPTAX) for name in names)
    rows.append((case["tree"], case["dtype"], *cells, share_of_limit(v, CLIPJAX, reads=3)))
  return [
    "Gradients in, clipped gradients out. JAX and TensorFlow write into new buffers; torch works in place, and "
    "multiplies whether it clips or not. Speed relative to Optax, with median and minimum in ms in brackets. The limit "
    "is the time for three times the bytes of the gradient (one read for the norm, one read and one write for the "
    "scaling) at the bandwidth of a plain sum. Before an optimizer in one jitted function, a clip need not write "
    "anything: see the next section.",
    "",
    *table(("tree", "dtype", *names, f"limit / {CLIPJAX}"), rows, left=2),
    *notes(section),
  ]


def adam_text(section: Json) -> list[str]:
  """What a clip adds to Adam."""
  lines = [
    "One jitted step of `optax.chain(clip, optax.adam(1e-3))`, with parameters and state donated, compared with the "
    "same step without the clip. *Added* is the median of the differences within a round. The limit is one more read "
    "of the gradient at the bandwidth of a plain sum. Temporaries are the bytes that the compiled step allocates "
    "besides its arguments and results (`memory_analysis`), over the bytes of the gradient. Every step clips, except "
    "with `autoclip` and `zclip`, whose thresholds follow the norm; they do the same work.",
    "",
  ]
  for title in dict.fromkeys(case["tree"] for case in section["cases"]):
    own = [case for case in section["cases"] if case["tree"] == title and "peer" not in case]
    rows = [cells for case in own for cells in adam_rows(case)]
    head = (
      "dtype", "clip", "added / Optax's", "added, ms", "by minima, ms", "step, ms", "fastest, ms", "limit, ms",
      "temporaries",
    )  # fmt: skip
    lines += [f"### {title}", "", *table(head, rows, left=2)]
  peers = [case for case in section["cases"] if "peer" in case]
  if peers:
    lines += ["### torch", "", "`clip_grad_norm_(foreach=True)` before `torch.optim.Adam`, float32, run apart.", ""]
    lines += table(("tree", "Adam", "added / step", "added, ms", "step, ms", "fastest, ms"), torch_rows(peers), left=2)
  return [*lines, *notes(section)]


def adam_rows(case: Case) -> list[list[str]]:
  """The variants on one tree, the step without a clip first."""
  v, rows = case["variants"], []
  for name, times in v.items():
    if name == SUM:
      continue
    ratio = speed_targets.added_ratio(v, name) if name != NO_CLIP else None
    # The look runs the same program as the watched step.
    size = v[WATCHED_LEAVES if name == LOOK else name].get("temporaries")
    added = (DASH, DASH) if name == NO_CLIP else (ms(times["added"]), ms(times["added_min"]))
    rows.append([
      case["dtype"], name, DASH if ratio is None else f"{ratio:.2f}", *added, ms(times["median"]), ms(times["min"]),
      DASH if name == NO_CLIP else ms(v[SUM]["median"]), DASH if size is None else percent(size / case["bytes"]),
    ])  # fmt: skip
  return rows


def torch_rows(cases: Sequence[Case]) -> list[list[str]]:
  """What torch's clip adds to its own step."""
  rows = []
  for case in cases:
    for kind in ("foreach", "fused"):
      base, clipped = (case["variants"][f"torch Adam, {kind}{end}"] for end in ("", ", clip"))
      share = f"{clipped['added'] / base['median']:.2f}"
      rows.append([case["tree"], kind, share, *(ms(x) for x in (clipped["added"], base["median"], base["min"]))])
  return rows


def stacked_text(section: Json) -> list[str]:
  """Norms of stacked layers, compared with norms of whole leaves."""
  rows = []
  for case in section["cases"]:
    v = case["variants"]
    for name in (NO_CLIP, OPTAX, BY_LEAF, BY_LAYER):
      ratio = None if name == NO_CLIP else speed_targets.layers_ratio(v, name)
      cells = (ms(v[name]["median"]), ms(v[name]["min"]), DASH if name == NO_CLIP else ms(v[name]["added"]))
      rows.append((case["tree"], case["dtype"], name, *cells, DASH if ratio is None else f"{ratio:.2f}"))
  case = section["cases"][0]
  head = ("tree", "dtype", "clip", "step, ms", "fastest", "added, ms", "added / by leaf")
  return [
    f"A step of Adam, {case['parameters']:,} parameters in {case['leaves']} arrays. By leaf, each array has one norm; "
    "with `stacked=`, each of its layers has one.",
    "",
    *table(head, rows, left=3),
    *notes(section),
  ]


def effect_text(section: Json) -> list[str]:
  """A step with `clip_effect`: time, state and temporaries."""
  rows = []
  for case in section["cases"]:
    base = case["variants"][CLIPJAX]
    for name, v in case["variants"].items():
      sizes = [v["state"] / base["state"], v["temporaries"] / case["bytes"]]
      cells = (ms(v["median"]), ms(v["min"]), f"{1 + v['added'] / base['median']:.2f}")
      rows.append((case["optimizer"], name, *cells, f"{sizes[0]:.2f}", percent(sizes[1])))
  case = section["cases"][0]
  head = ("optimizer", "step", "step, ms", "fastest, ms", "step / clip only", "state / clip only", "temporaries")
  return [
    f"A step of {case['tree']}, {case['parameters']:,} parameters in {case['leaves']} leaves, float32. `clip_effect` "
    "runs the optimizer a second time and compares the updates leaf by leaf. Temporaries are over the bytes of the "
    "gradient.",
    "",
    *table(head, rows, left=2),
    *notes(section),
  ]


def compile_text(section: Json) -> list[str]:
  """Compile times."""
  lines = []
  for case in section["cases"]:
    v, rows = case["variants"], []
    for name, times in v.items():
      ratios = [times[part]["median"] / v[OPTAX][part]["median"] for part in ("compile", "lower")]
      seconds = [times["compile"]["median"], times["compile"]["min"], times["lower"]["median"], times["lower"]["min"]]
      rows.append((name, *(f"{x:.2f}" for x in ratios), *(f"{x:.2f}" for x in seconds)))
    lines += [
      f"The same step of Adam on {case['tree']}, float32, each variant compiled in turn with empty caches: "
      "`jit(step).lower(...)`, which traces and lowers, and `.compile()`.",
      "",
      *table(
        ("clip", "compile / Optax's", "lower / Optax's", "compile, s", "fastest", "trace and lower, s", "fastest"), rows
      ),
    ]
  return [*lines, *notes(section)]


def train_text(section: Json) -> list[str]:
  """The whole training step."""
  lines = []
  for case in section["cases"]:
    v, base = case["variants"], case["variants"][NO_CLIP]["median"]
    rows = [
      (name, f"{1 + t['added'] / base:.3f}", ms(t["added"]), ms(t["median"]), ms(t["min"])) for name, t in v.items()
    ]
    lines += [
      f"Gradient, clip and Adam of a Transformer: {case['tree']}, {case['parameters']:,} parameters in "
      f"{case['leaves']} leaves, float32. Nothing is read from the state. Averaged over {LOOK_EVERY} steps, a step "
      f"with `watch()` takes {speed_targets.watched_ratio(v):.3f} times as long as a step with only the clip.",
      "",
      *table(("clip", "step / no clip", "added, ms", "step, ms", "fastest, ms"), rows),
    ]
  return [*lines, *notes(section)]


def eager_text(section: Json) -> list[str]:
  """Eager calls."""
  lines = []
  for case in section["cases"]:
    v, rows = case["variants"], []
    for name in ("clipjax.clip_grad_norm", "clipjax.clip_by_global_norm", "optax.clip_by_global_norm"):
      a, b = EAGER.format(name), JITTED.format(name)
      rows.append((f"`{name}`", f"{speed_targets.over(v, a, b):.2f}", *(ms(v[x][k]) for x in (a, b) for k in KINDS)))
    lines += [
      f"Calls outside jit on {case['tree']}, float32, compared with the same call inside jit; for a transformation, "
      "the call is its `update`.",
      "",
      *table(("call", "eager / jitted", "eager, ms", "fastest", "jitted, ms", "fastest"), rows),
    ]
  return [*lines, *notes(section)]


def vmap_text(section: Json) -> list[str]:
  """Many thresholds at once."""
  lines = []
  for case in section["cases"]:
    v, rows = case["variants"], []
    for name in (NO_CLIP, OPTAX, CLIPJAX):
      a, b = AT_ONCE.format(name), IN_TURN.format(name)
      rows.append((name, f"{speed_targets.over(v, a, b):.2f}", *(ms(v[x][k]) for x in (a, b) for k in KINDS)))
    lines += [
      f"One training step of all runs together: {case['tree']}, {case['parameters']:,} parameters, SGD with momentum. "
      "At once: one call of the step under `vmap`. One after another: one call of the jitted step for each run.",
      "",
      *table(("clip", "vmap / one after another", "vmap, ms", "fastest", "one after another, ms", "fastest"), rows),
    ]
  return [*lines, *notes(section)]


def per_example_text(section: Json) -> list[str]:
  """The clip per example."""
  lines = []
  for case in section["cases"]:
    v, base, rows = case["variants"], "optax.per_example_global_norm_clip", []
    for name, times in v.items():
      if name != SUM:
        size = times.get("temporaries")
        share = DASH if size is None else percent(size / case["bytes"])
        limit = share_of_limit(v, name, reads=2)
        cells = f"{times['median'] / v[base]['median']:.2f}", ms(times["median"]), ms(times["min"]), limit, share
        rows.append((f"`{name}`", *cells))
    lines += [
      f"The sum of clipped per-example gradients: {case['tree']}, float32. The limit is the time to read the gradients "
      "of all examples twice, for the norms and for the sum. Temporaries are over the bytes of these gradients.",
      "",
      *table(("call", "time / Optax's", "ms", "fastest", "limit / time", "temporaries"), rows),
    ]
  return [*lines, *notes(section)]


def growth_text(section: Json) -> list[str]:
  """Growth with the number of parameters and leaves."""
  rows = []
  for case in section["cases"]:
    v = case["variants"]
    norms = [v[key]["median"] if (key := f"{name}, norm") in v else None for name in (CLIPJAX, OPTAX)]
    added = [v[name]["added"] if name in v else None for name in (CLIPJAX, OPTAX)]
    rows.append((
      f"{case['parameters']:,}", f"{case['leaves']:,}", *(DASH if x is None else ms(x) for x in norms + added),
      ms(v[SUM]["median"]), ms(v[NO_CLIP]["median"]) if NO_CLIP in v else DASH,
    ))  # fmt: skip
  head = (
    "parameters", "leaves", "norm, clipjax", "norm, Optax", "added to Adam, clipjax", "added to Adam, Optax",
    "limit: one read", "Adam",
  )  # fmt: skip
  return [
    "float32, medians in ms. If the added time is below zero, it is lost in the noise of Adam's step, and the picture "
    "leaves it out.",
    "",
    *table(head, rows, left=0),
    *notes(section),
  ]


SECTIONS: dict[str, tuple[str, Callable[[Json], list[str]]]] = {
  "norm": ("Only the norm", norm_text),
  "clip": ("Only the clip", clip_text),
  "adam": ("What a clip adds to Adam", adam_text),
  "stacked": ("Stacked layers", stacked_text),
  "compile": ("Compile time", compile_text),
  "train": ("A whole training step", train_text),
  "eager": ("Eager calls", eager_text),
  "vmap": ("Many thresholds at once", vmap_text),
  "per_example": ("The clip per example", per_example_text),
  "growth": ("Growth", growth_text),
  "effect": ("What `clip_effect` costs", effect_text),
}
