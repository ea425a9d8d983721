"""Bounds on what a clip adds to a compiled step, and whether they hold; for the page and for the test.

Everything but the limits comes from the cases of the JSON. The bounds are relative to Optax's global clip in the same
case, which does the least that a clip can do: sum, compare, scale.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from speed_trees import BY_LEAF, CLIPJAX, EFFECT, NO_CLIP, OPTAX, WATCHED_LEAVES, ZCLIP

Json = Mapping[str, Any]

MB = 1e6
BARE = (CLIPJAX, BY_LEAF, ZCLIP)  # Clips without a watch.
SMALL = 32_256  # Bytes that the TPU compiler reserves for a scalar or a tuple in HBM.
SCALARS = 256  # Bytes per leaf, and 16 times once for the state, of scalars in HBM: they matter in small steps.
COMPILE = "compile time"


class Bound(NamedTuple):
  """A limit on one number of a step.

  Attributes:
    what: the bounded number, as the page names it.
    limit_text: the limit in words.
    clips: the clips that it applies to.
    targets: the targets that it applies to.
    value: `(case, clip) -> number`.
    limit: `(case, clip) -> largest number that holds`.
    only: keys of the cases that it applies to; () for all.
  """

  what: str
  limit_text: str
  clips: tuple[str, ...]
  targets: tuple[str, ...]
  value: Callable[[Json, str], float]
  limit: Callable[[Json, str], float]
  only: tuple[str, ...] = ()


class Verdict(NamedTuple):
  """A bound in one case: number, limit, and whether it holds."""

  bound: Bound
  clip: str
  target: str
  case: str
  value: float
  limit: float

  @property
  def holds(self) -> bool:
    """Whether the number is within the limit."""
    return self.value <= self.limit


def of(key: str) -> Callable[[Json, str], float]:
  """A function that returns the number `key` of a clip."""
  return lambda case, clip: float(case["variants"][clip][key])


def traffic(case: Json, clip: str) -> float:
  """HBM traffic that a clip adds to the step without one, with every branch taken."""
  base = case["variants"][NO_CLIP]
  return all_traffic(case["variants"][clip]) - all_traffic(base)


def all_traffic(variant: Json) -> float:
  """HBM traffic of a step with every branch taken."""
  return float(variant["traffic"] + variant["traffic_in_branches"])


def added_reduces(case: Json, clip: str) -> float:
  """The all-reduces beyond Optax's clip; inf for too few, as a sum over only one device would be wrong."""
  v = case["variants"]
  more = float(v[clip]["all_reduces"] - v[OPTAX]["all_reduces"])
  return more if more >= 0 else math.inf


def reduces_limit(case: Json, clip: str) -> float:
  """The compiler joins up to 256 sums, and a leaf has three."""
  return math.ceil(3 * case["leaves"] / 256) - 1


def traffic_limit(case: Json, clip: str) -> float:
  """A global clip may move 2% of the step more than Optax's, a clip by leaf 0.1%, and both a few scalars.

  A clip by leaf could scale each leaf while the chip still holds it, but it must wait for all norms: in a nonfinite
  step every leaf becomes NaN.

  Leaves of stacked layers are large, and the compiler decides which of them the chip holds between norm and use. There,
  a global clip may read one of them again.
  """
  room = 0.001 if clip == BY_LEAF else 0.03 if case["key"] == "stack" else 0.02
  return traffic(case, OPTAX) + room * all_traffic(case["variants"][NO_CLIP]) + of_scalars(case)


def watch_limit(case: Json, clip: str) -> float:
  """One more read of the gradient than the clip itself, one and a half for stacked layers, and scalars."""
  return traffic(case, CLIPJAX) + (1.5 if case["key"] == "stack" else 1) * case["gradient"] + of_scalars(case)


def of_scalars(case: Json) -> float:
  """HBM traffic of norms, factors and counters."""
  return float(SCALARS * (16 + case["leaves"]))


def temporaries_limit(case: Json, clip: str) -> float:
  """Optax's temporaries and 1 MB; by leaf, a quarter of the gradient, for leaves held between norm and use.

  On a TPU, every scalar that goes through HBM takes as much room as 8000 entries. A clip by leaf may have eight of them
  per leaf. On many chips, each of which holds little else, any clip may have sixteen.
  """
  room = 0.25 * case["gradient"] if clip == BY_LEAF else MB
  scalars = {"tpu": 8 if clip == BY_LEAF else 0, "pod": 16, "gpu": 0}[case["target"]]
  return of("temporaries")(case, OPTAX) + room + scalars * SMALL * case["leaves"]


def effect_traffic(case: Json, clip: str) -> float:
  """The clip's own traffic and 7.5 gradients.

  A pass of Adam reads the gradient and two moments and writes the moments: five gradients. Two and a half more cover
  updates that the chip does not hold until they are compared, such as updates rounded to bfloat16.
  """
  return traffic(case, CLIPJAX) + 7.5 * case["gradient"] + of_scalars(case)


ALL = ("tpu", "pod", "gpu")
BOUNDS = (
  Bound("conditionals", "0", (*BARE, WATCHED_LEAVES), ALL, of("conditionals"), lambda case, clip: 0),
  Bound("conditionals, of the Transformer", "0", (EFFECT,), ALL, of("conditionals"), lambda case, clip: 0, ("tf",)),
  Bound(
    "kernels", "Optax's + 16 + 2 per leaf", BARE, ALL, of("kernels"),
    lambda case, clip: of("kernels")(case, OPTAX) + 16 + 2 * case["leaves"],
  ),
  Bound(
    "kernels", "the clip's own + 16 + 5 per leaf", (WATCHED_LEAVES,), ALL, of("kernels"),
    lambda case, clip: of("kernels")(case, CLIPJAX) + 16 + 5 * case["leaves"],
  ),
  Bound(
    "kernels, of the Transformer", "the clip's own + 16 + 9 per leaf", (EFFECT,), ALL, of("kernels"),
    lambda case, clip: of("kernels")(case, CLIPJAX) + 16 + 9 * case["leaves"], ("tf",),
  ),
  Bound(
    "HBM traffic, of the Transformer", "the clip's own + 7.5 gradients", (EFFECT,), ("tpu",), traffic,
    effect_traffic, ("tf",),
  ),
  Bound(
    "temporaries", "Optax's + 1 MB, by leaf + a quarter of the gradient", BARE, ALL, of("temporaries"),
    temporaries_limit,
  ),
  Bound(
    "HBM traffic", "Optax's + 2% of the step, 3% for stacks, by leaf + 0.1%", BARE, ("tpu",), traffic, traffic_limit,
  ),
  Bound(
    "HBM traffic", "the clip's own + one read of the gradient, one and a half for stacks", (WATCHED_LEAVES,),
    ("tpu",), traffic, watch_limit,
  ),
  Bound(
    "HBM traffic, by layer", "the global clip's", (BY_LEAF,), ("tpu", "pod"), traffic,
    lambda case, clip: traffic(case, CLIPJAX) + of_scalars(case), ("stack",),
  ),
  Bound(
    "all-reduces, beyond Optax's", "0, and 1 per 256 sums after the first", BARE, ("pod",), added_reduces,
    reduces_limit,
  ),
  Bound(
    # People wait for training steps; if a step compiles in a second, every scalar of a state shows.
    COMPILE, "1.3 x Optax's, in a training step", BARE, ALL, of("compile"),
    lambda case, clip: 1.3 * of("compile")(case, OPTAX), ("train",),
  ),
)  # fmt: skip


def verdicts(cases: Iterable[Json]) -> list[Verdict]:
  """Every bound in every case it applies to, for the clips compiled there."""
  return [
    Verdict(bound, clip, case["target"], f"{case['title']}, {case['dtype']}", *numbers(bound, case, clip))
    for case in cases
    for bound in BOUNDS
    if case["target"] in bound.targets and (not bound.only or case["key"] in bound.only)
    for clip in bound.clips
    if clip in case["variants"]
  ]


def numbers(bound: Bound, case: Json, clip: str) -> tuple[float, float]:
  """The bounded number and its limit."""
  return bound.value(case, clip), bound.limit(case, clip)
