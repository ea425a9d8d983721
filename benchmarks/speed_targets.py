"""The targets of the speed page: the limits, what was measured, and whether they hold.

Everything but the limits comes from the JSON of `speed.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from speed_trees import (
  AT_ONCE,
  BY_LAYER,
  BY_LEAF,
  CLIPJAX,
  EAGER,
  IN_TURN,
  JITTED,
  LOOK,
  LOOK_EVERY,
  NO_CLIP,
  OPTAX,
  PLAIN,
  TF_EAGER,
  TF_FUNCTION,
  TORCH,
  WATCHED_LEAVES,
  Case,
)

Variants = Mapping[str, Mapping[str, Any]]


class Target(NamedTuple):
  """A row of the table.

  Attributes:
    what: what is measured.
    section: the section that measures it.
    limit: the limit as text, "" if the figure is only reported.
    measured: the figure as text.
    holds: whether the target holds; None if it was not measured or has no limit.
  """

  what: str
  section: str
  limit: str
  measured: str
  holds: bool | None


def find(data: Mapping[str, Any], section: str, key: str, dtype: str = "float32") -> Case | None:
  """The case of a section on one tree; None if it was not run."""
  for case in data["sections"].get(section, {}).get("cases", ()):
    if (case["key"], case["dtype"]) == (key, dtype) and "peer" not in case:
      found: Case = case
      return found
  return None


def added_ratio(v: Variants, name: str, of: str = "added") -> float | None:
  """What a variant adds to Adam, over what Optax's clip adds; None if that is lost in the noise."""
  base, added = float(v[OPTAX][of]), float(v[name][of])
  return added / base if base > 0 else None


def watched_ratio(v: Variants) -> float:
  """The mean step with a watch, one in 16 of which looks, over the step with only the clip."""
  added = ((LOOK_EVERY - 1) * float(v[WATCHED_LEAVES]["added"]) + float(v[LOOK]["added"])) / LOOK_EVERY
  base = float(v[NO_CLIP]["median"])
  return (base + added) / (base + float(v[CLIPJAX]["added"]))


def layers_ratio(v: Variants, name: str) -> float | None:
  """What a clip adds, over what the clip by leaf adds; None if that adds nothing."""
  base = float(v[BY_LEAF]["added"])
  return float(v[name]["added"]) / base if base > 0 else None


def over(v: Variants, a: str, b: str, of: str = "median") -> float:
  """The time of variant `a` over the time of variant `b`."""
  ratio: float = v[a][of] / v[b][of]
  return ratio


def ahead_of(v: Variants, names: Iterable[str]) -> float | None:
  """The speed of clipjax's norm relative to the fastest peer; None without a peer."""
  ratios = [over(v, name, CLIPJAX) for name in names if name in v]
  return min(ratios) if ratios else None


def targets(data: Mapping[str, Any]) -> list[Target]:
  """Every row, in page order."""
  return [*adam_targets(data), *stacked_targets(data), *compile_targets(data), *norm_targets(data), *step_targets(data)]


def adam_targets(data: Mapping[str, Any]) -> list[Target]:
  """What the clip adds to Adam, and the temporaries."""
  rows = []
  for key, dtype, limit in (
    ("leaf", "float32", 0.25),
    ("transformer", "float32", 0.25),
    ("leaf", "bfloat16", 0.6),
    ("transformer", "bfloat16", 0.5),
    ("many", "float32", 0.9),
  ):
    case = find(data, "adam", key, dtype)
    title = named(case, key)
    ratio = added_ratio(case["variants"], CLIPJAX) if case else None
    least = added_ratio(case["variants"], CLIPJAX, "added_min") if case else None
    text = "not measurable: Optax adds nothing" if case else "not measured"
    if ratio is not None:
      text = f"{ratio:.2f}" + ("" if least is None else f" (by minima {least:.2f})")
    rows.append(at_most(f"added to Adam, over what Optax adds: {title}, {dtype}", "adam", limit, ratio, text))
  for key in ("leaf", "transformer", "many"):
    case = find(data, "adam", key)
    share, text = None, ""
    if case and case["variants"][CLIPJAX].get("temporaries") is not None:
      share = case["variants"][CLIPJAX]["temporaries"] / case["bytes"]
      text = f"{share:.1%} (Optax {case['variants'][OPTAX]['temporaries'] / case['bytes']:.0%})"
    what = f"temporaries, over the bytes of the gradient: {named(case, key)}, float32"
    rows.append(at_most(what, "adam", 0.02, share, text, "{:.0%}"))
  return rows


def stacked_targets(data: Mapping[str, Any]) -> list[Target]:
  """What norms of layers add, over norms of whole arrays."""
  rows = []
  for axis in (0, 1):
    case = find(data, "stacked", f"axis {axis}")
    ratio = layers_ratio(case["variants"], BY_LAYER) if case else None
    what = f"added to Adam with `stacked=`, over by leaf: {case['tree'] if case else f'layers along axis {axis}'}"
    rows.append(at_most(what, "stacked", 1.3, ratio, "" if ratio is None else f"{ratio:.2f}"))
  return rows


def compile_targets(data: Mapping[str, Any]) -> list[Target]:
  """Compile times of the step with many leaves."""
  case = find(data, "compile", "many")
  rows = []
  for name, title, limit in ((CLIPJAX, "global", 1.1), (BY_LEAF, "by leaf", 1.5)):
    ratio = case["variants"][name]["compile"]["median"] / case["variants"][OPTAX]["compile"]["median"] if case else None
    what = f"compile time over Optax's global clip: {named(case, 'many')}, {title}"
    rows.append(at_most(what, "compile", limit, ratio, "" if ratio is None else f"{ratio:.2f}"))
  return rows


def norm_targets(data: Mapping[str, Any]) -> list[Target]:
  """The norm, compared with the plainest one and other frameworks."""
  rows = []
  for key in ("leaf", "transformer"):
    case = find(data, "norm", key)
    ratio = over(case["variants"], PLAIN, CLIPJAX) if case else None
    text = f"{ratio:.2f} (by minima {over(case['variants'], PLAIN, CLIPJAX, 'min'):.2f})" if case else ""
    rows.append(at_least(f"norm, speed relative to the plainest: {named(case, key)}, float32", 0.95, ratio, text))
    for peer, names in (("torch", (TORCH,)), ("TensorFlow", (TF_EAGER, TF_FUNCTION))):
      ratio = ahead_of(case["variants"], names) if case else None
      text = "" if ratio is None else f"{ratio:.2f}"
      rows.append(at_least(f"norm, speed relative to {peer}: {named(case, key)}, float32", 1.0, ratio, text))
  return rows


def step_targets(data: Mapping[str, Any]) -> list[Target]:
  """The cost of a watch, eager calls, and many thresholds at once."""
  rows = []
  for section, key in (("train", "training"), ("adam", "transformer")):
    case = find(data, section, key)
    ratio = watched_ratio(case["variants"]) if case else None
    text = "" if ratio is None else f"{ratio:.3f}"
    what = "a whole training step" if section == "train" else f"only a step of Adam, {named(case, key)}"
    rows.append(at_most(f"`watch()` before the clip, over only the clip: {what}", section, 1.05, ratio, text))
  case = find(data, "eager", "many")

  def called(name: str) -> float | None:
    return over(case["variants"], EAGER.format(name), JITTED.format(name)) if case else None

  ratio, optax_ratio = called("clipjax.clip_grad_norm"), called("optax.clip_by_global_norm")
  text = "" if ratio is None else f"{ratio:.2f} (Optax {optax_ratio:.1f})"
  what = f"eager `clip_grad_norm` over jitted: {named(case, 'many')}"
  rows.append(at_most(what, "eager", 1.5, ratio, text))
  case = find(data, "vmap", "vmap")
  text = ""
  if case:
    ratios = [over(case["variants"], AT_ONCE.format(name), IN_TURN.format(name)) for name in (CLIPJAX, OPTAX, NO_CLIP)]
    text = f"{ratios[0]:.2f} (Optax {ratios[1]:.2f}, no clip {ratios[2]:.2f})"
  rows.append(
    Target("thresholds of the demo at once under `vmap`, over one after another", "vmap", "", text or "not run", None)
  )
  return rows


def named(case: Case | None, key: str) -> str:
  """The title of the measured tree, or its usual one."""
  titles = {"leaf": "one leaf", "transformer": "Transformer", "many": "1000 leaves"}
  return case["tree"] if case else titles[key]


def at_most(what: str, section: str, limit: float, value: float | None, text: str, form: str = "{:g}") -> Target:
  """A target with an upper limit."""
  return _target(what, section, f"<= {form.format(limit)}", value, text, lambda x: x <= limit)


def at_least(what: str, limit: float, value: float | None, text: str) -> Target:
  """A target of the norm with a lower limit."""
  return _target(what, "norm", f">= {limit:g}", value, text, lambda x: x >= limit)


def _target(
  what: str, section: str, limit: str, value: float | None, text: str, holds: Callable[[float], bool]
) -> Target:
  if value is None:
    return Target(what, section, limit, text or "not measured", None)
  return Target(what, section, limit, text, holds(value))
