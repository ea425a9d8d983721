"""Finds the states of this package in any optimizer state.

It finds them in any nesting: chain, masked, multi_transform, MultiSteps, inject_hyperparams, apply_if_finite,
`flax.nnx.Optimizer` or its parts from `nnx.split`, and a train state with an `opt_state`. Anything else raises a
TypeError: a check that finds nothing to look at would let every NaN pass.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax

from clipjax.checks import describe
from clipjax.rules.base import StepCount
from clipjax.transforms.effect import EffectState
from clipjax.transforms.skip import SkipState
from clipjax.transforms.state import ClipState
from clipjax.transforms.watch import WatchState

_OURS = (ClipState, EffectState, SkipState, WatchState)
_AROUND = (EffectState, SkipState)  # These hold the wrapped transformation's state as `inner_state`.
_SOUGHT = (*_OURS, optax.MultiStepsState, optax.GradientTransformation)
_SHELLS = (StepCount, optax.EmptyState, optax.MaskedState, optax.MaskedNode)  # They reveal no optimizer.

# Fields that identify a state of this package after it became a dict, without its type and its leaf names.
_MARKS = (
  {"norm_clipped", "clipped_steps", "nonfinite_steps"},
  {"skipped_steps", "consecutive", "max_consecutive_skips"},
  {"zero_fraction", "worst_norm", "worst_step"},
  {"ratio", "cosine", "unclipped_state"},
)

_RETURNED = "pass what `init` or `update` returned."
_RESTORE = (
  "pass what `init` or `update` returned; restore a state that was saved as a dict with "
  "`flax.serialization.from_state_dict(tx.init(params), saved)`."
)
_MERGE = (
  "pass `nnx.merge(graphdef, state)`, the optimizer itself; `nnx.state` and `nnx.split` leave the names of the leaves "
  "in the graphdef."
)


class Found(NamedTuple):
  """A state of this package or of `optax.MultiSteps`, and its place.

  Attributes:
    path: the keys that lead to it, in the form of `jax.tree_util.tree_flatten_with_path`.
    state: the state in the tree.
    accumulators: every `optax.MultiStepsState` around it, from the outside in.
  """

  path: tuple[Any, ...]
  state: Any
  accumulators: tuple[Any, ...]


def named_states(opt_state: Any) -> Iterator[tuple[str, Any]]:
  """Every state of this package with the name of its metrics, from the outside in, in the order of the chain.

  A clip and a watch may share a name: they see the same updates.
  """
  for name, found in named(found_in(held_tree(opt_state))):
    yield name, jax.tree.map(unwrapped, found.state, is_leaf=is_wrapper)


def named(everything: Iterable[Found]) -> list[tuple[str, Found]]:
  """The states of this package among those found, each with its name."""
  out: list[tuple[str, Found]] = []
  taken: set[tuple[bool, str]] = set()
  for found in everything:
    if is_accumulator(found.state):
      continue
    # A watch and a clip may share a name, two clips may not.
    is_watch = isinstance(found.state, WatchState)
    base = name = "_".join([found.state.labels.name, *_transform_labels(found.path)])
    copy = 1
    while (is_watch, name) in taken:
      copy += 1
      name = f"{base}_{copy}"
    taken.add((is_watch, name))
    out.append((name, found))
  return out


def held_tree(opt_state: Any) -> Any:
  """The optimizer state itself, out of an object that holds it as `opt_state`, or of its parts from `nnx.split`."""
  whole = _merged(opt_state)
  return getattr(whole, "opt_state", whole)


def found_in(tree: Any) -> list[Found]:
  """All states in a tree from `held_tree`, in the order of `named_states`; raises if it is not an optimizer state."""
  everything = list(_walk(tree, (), ()))
  if all(is_accumulator(found.state) for found in everything):
    _check_opt_state(tree)
  return everything


def _walk(tree: Any, prefix: tuple[Any, ...], accumulators: tuple[Any, ...]) -> Iterator[Found]:
  paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, _SOUGHT))
  for path, state in paths:
    if not isinstance(state, _SOUGHT):
      continue
    if isinstance(state, optax.GradientTransformation):
      raise _no_state(state, _RETURNED)
    # Report the state, then descend into what it wraps.
    here = (*prefix, *path)
    yield Found(here, state, accumulators)
    if isinstance(state, _AROUND):
      yield from _walk(state.inner_state, (*here, jax.tree_util.GetAttrKey("inner_state")), accumulators)
    if is_accumulator(state):
      for field, value in state._asdict().items():
        around = (*accumulators, state) if field == "inner_opt_state" else accumulators
        yield from _walk(value, (*here, jax.tree_util.GetAttrKey(field)), around)


def optimizer_states(tree: Any) -> tuple[str, ...]:
  """The state classes of other transformations in a tree, each once, such as `("ScaleByAdamState",)`."""
  others = [x for x in _namedtuples(tree) if not isinstance(x, _SHELLS) and not _is_ours(x)]
  return tuple(dict.fromkeys(type(x).__name__ for x in others))


def _is_ours(x: Any) -> bool:
  """Whether this is a state of this package: of a clip, or of a rule inside one."""
  return type(x).__module__.partition(".")[0] == __name__.partition(".")[0]


def _namedtuples(x: Any) -> Iterator[Any]:
  """Every NamedTuple in a tree of tuples, lists and dicts, from the outside in."""
  if _is_namedtuple(x):
    yield x
  if isinstance(x, tuple | list | Mapping):
    for part in x.values() if isinstance(x, Mapping) else x:
      yield from _namedtuples(part)


def _transform_labels(path: tuple[Any, ...]) -> list[str]:
  """The labels of every `optax.multi_transform` on a path: the keys of its dict `inner_states`."""
  return [
    str(key.key)
    for field, key in itertools.pairwise(path)
    if getattr(field, "name", None) == "inner_states" and hasattr(key, "key")
  ]


def is_accumulator(x: Any) -> bool:
  """Whether this is the state of `optax.MultiSteps`."""
  return isinstance(x, optax.MultiStepsState)


# Not an optimizer state ----------------------------------------------------------------------------------------------


def _check_opt_state(tree: Any) -> None:
  """Raises if a tree without a state of this package is not an optimizer state at all.

  Optax builds its states from NamedTuples. A tree without any is something else, or has lost its types on the way.
  """
  # The remedy depends on what is there: parts of `nnx.split`, a state that became a dict, or neither.
  parts = jax.tree.leaves(tree, is_leaf=lambda x: _is_split(x) or _is_lost(x) or _is_namedtuple(x))
  is_lost = any(map(_is_lost, jax.tree.leaves(parts, is_leaf=_is_lost)))
  if is_lost or not any(map(_is_namedtuple, parts)):
    if any(map(_is_split, parts)):
      raise _no_state(tree, _MERGE)
    raise _no_state(tree, _RESTORE if is_lost or isinstance(tree, Mapping) else _RETURNED)


def _no_state(x: Any, remedy: str) -> TypeError:
  return TypeError(f"`opt_state` must be the state of an optimizer, got {describe(x)}: {remedy}")


def _is_namedtuple(x: Any) -> bool:
  return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_lost(x: Any) -> bool:
  """Whether this is a dict of the fields of a lost state of this package."""
  return isinstance(x, Mapping) and any(marks <= set(x) for marks in _MARKS)


# Flax NNX ------------------------------------------------------------------------------------------------------------


def _nnx_types(*names: str) -> tuple[type, ...]:
  """Types of Flax NNX; none if it was not imported."""
  nnx = sys.modules.get("flax.nnx")
  return tuple(getattr(nnx, name) for name in names if hasattr(nnx, name))


def _is_split(x: Any) -> bool:
  """Whether this is a part that `nnx.split` returns."""
  return isinstance(x, _nnx_types("State", "GraphDef"))


def _merged(x: Any) -> Any:
  """The object that `nnx.split` has taken apart; anything else unchanged."""
  if not (isinstance(x, tuple) and x and isinstance(x[0], _nnx_types("GraphDef"))):
    return x
  try:
    return sys.modules["flax.nnx"].merge(*x)
  except Exception:  # A part is missing or foreign: the check of the whole names the remedy.
    return x


def is_wrapper(x: Any) -> bool:
  """Whether this is an array in a Flax NNX variable."""
  return isinstance(x, _nnx_types("Variable"))


def unwrapped(x: Any) -> Any:
  """The array itself."""
  return x.get_value() if is_wrapper(x) else x
