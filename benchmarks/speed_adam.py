"""Sections of `speed.py` about a step of Adam after a clip: what the clip adds, compile time, and growth.

All variants of a tree take turns on the same donated parameters and moments; each variant has only its own clip state.
"""

import math
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from speed_gradients import gradients, jax_turn, sum_turn, temporaries
from speed_peers import PAUSE, Plan, dtypes, peer_turns, started
from speed_trees import (
  AUTOCLIP,
  BY_GROUP,
  BY_LAYER,
  BY_LEAF,
  CLIPJAX,
  LOOK,
  NO_CLIP,
  OPTAX,
  SUM,
  UNTRACKED,
  WATCHED,
  WATCHED_LEAVES,
  ZCLIP,
  Case,
  Tree,
  case_of,
  half_norm,
  memory,
  trees,
)
from timing import Turn, interleave, summary, turn_of

import clipjax

GROUPS = 4
COMPILATIONS = 3
FEW = (NO_CLIP, OPTAX, CLIPJAX)
COMPILED = (*FEW, BY_LEAF, WATCHED_LEAVES)
ROOM = 8 * 10**9  # With less memory, in bytes, the growth leaves out Adam with the most parameters.
MANY = 2000  # From this many leaves, XLA compiles the sum of scalars in Optax's norm for minutes.


def clips(tree: Tree) -> dict[str, optax.GradientTransformation]:
  """The clips by name, with thresholds at which every step clips; the first entry is no clip."""
  total, leaf = half_norm(tree.parameters), half_norm(tree.parameters // len(tree.shapes))
  return {
    NO_CLIP: optax.identity(),
    OPTAX: optax.clip_by_global_norm(total),
    CLIPJAX: clipjax.clip_by_global_norm(total),
    UNTRACKED: clipjax.clip_by_global_norm(total, track=False),
    BY_LEAF: clipjax.clip_by_leaf_norm(leaf),
    BY_GROUP: clipjax.clip_by_group_norm(total / math.sqrt(GROUPS), lambda path, _: zlib.crc32(path.encode()) % GROUPS),
    AUTOCLIP: clipjax.autoclip(),
    ZCLIP: clipjax.zclip(),
    WATCHED: optax.chain(clipjax.watch(per_leaf=False), clipjax.clip_by_global_norm(total)),
    WATCHED_LEAVES: optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(total)),
  }


def jitted_step(clip: optax.GradientTransformation) -> Any:
  """A new jitted step `(params, (clip_state, adam_state), grads) -> (params, state)` that donates the first two."""
  return jitted(optax.chain(clip, optax.adam(1e-3)))


def jitted(tx: optax.GradientTransformation) -> Any:
  """The same for any transformation."""

  def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


class Steps:
  """Compiled steps with different clips, on the same parameters and moments.

  Args:
    variants: the clips by name.
    params: the initial parameters; they are donated.
    data: the third argument of a step: gradients or a batch.
    make: makes a jitted step from a clip.
  """

  def __init__(
    self,
    variants: Mapping[str, optax.GradientTransformation],
    params: Any,
    data: Any,
    make: Callable[[optax.GradientTransformation], Any] = jitted_step,
  ):
    self.params, self.data = params, data
    self.adam = optax.adam(1e-3).init(self.params)
    self.clips = {name: clip.init(self.params) for name, clip in variants.items()}
    self.programs: dict[str, Any] = {}
    for name, clip in variants.items():
      state = (self.clips[name], self.adam)
      self.programs[name] = make(clip).lower(self.params, state, data).compile()

  def run(self, name: str) -> None:
    """Runs one step and waits for it."""
    state = (self.clips[name], self.adam)
    out = jax.block_until_ready(self.programs[name](self.params, state, self.data))
    self.params, (self.clips[name], self.adam) = out

  def turns(self, repeats: int = 1) -> dict[str, Turn]:
    """One turn per variant."""
    return {name: turn_of(partial(self.run, name), repeats=repeats) for name in self.programs}

  def look_turn(self, name: str) -> Turn:
    """A turn of a watched variant at a step that looks; the program is the same."""
    self.programs[LOOK], self.clips[LOOK] = self.programs[name], jax.tree.map(jnp.copy, self.clips[name])

    def rewind() -> None:
      watch, *rest = self.clips[LOOK]
      self.clips[LOOK] = (watch._replace(steps=jax.block_until_ready(jnp.zeros_like(watch.steps))), *rest)

    return turn_of(lambda: self.run(LOOK), prepare=rewind)


def adam_steps(tree: Tree, grads: list[jax.Array], names: tuple[str, ...]) -> Steps:
  """Steps of Adam with the clips `names`."""
  chosen = {name: clip for name, clip in clips(tree).items() if name in names}
  return Steps(chosen, [jnp.zeros_like(g) for g in grads], grads)


def adam(plan: Plan) -> list[Case]:
  """What a clip adds to a step of Adam, also in torch."""
  cases = []
  for tree in trees(plan.quick).values():
    for dtype in dtypes(plan, tree):
      all_clips = dtype == "float32" and (tree.key == "transformer" or not plan.quick)
      names = FEW if tree.key == "most" else tuple(clips(tree)) if all_clips else (*FEW, BY_LEAF)
      cases.append(measured(plan, tree, dtype, names))
  with started(plan, ["torch"]) as peers:
    for tree in list(trees(plan.quick).values())[:3] if peers else ():
      turns = peer_turns(plan, peers, "adam", tree, "float32")
      if turns:
        found = interleave(turns, plan.rounds, pause=PAUSE)
        variants: dict[str, dict[str, Any]] = {}
        for kind in ("torch Adam, foreach", "torch Adam, fused"):
          variants |= summary({name: found[name] for name in (kind, f"{kind}, clip")}, kind)
        cases.append({**case_of(tree, "float32", variants), "peer": "torch"})
  return cases


def measured(plan: Plan, tree: Tree, dtype: str, names: tuple[str, ...]) -> Case:
  """Measures the steps with the clips `names` on one tree."""
  steps = adam_steps(tree, gradients(tree.shapes, dtype), names)
  sizes = {name: temporaries(program) for name, program in steps.programs.items()}
  turns = {**steps.turns(), SUM: sum_turn(tree.parameters, dtype)}
  if WATCHED_LEAVES in names:
    turns[LOOK] = steps.look_turn(WATCHED_LEAVES)
  variants: dict[str, dict[str, Any]] = {**summary(interleave(turns, plan.rounds), NO_CLIP)}
  for name, size in sizes.items():
    variants[name]["temporaries"] = size
  return case_of(tree, dtype, variants)


def stacked(plan: Plan) -> list[Case]:
  """What a clip by leaf adds if each leaf stacks 24 layers: one norm per leaf, and one norm per layer."""
  layers, width = (3, 32) if plan.quick else (24, 256)
  of_layer = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), (width,), (width,)]
  cases = []
  for axis in (0, 1):
    shapes = [(*shape[:axis], layers, *shape[axis:]) for shape in of_layer]
    tree = Tree(f"axis {axis}", f"{layers} layers stacked along axis {axis}", shapes)
    limit = half_norm(tree.parameters // len(shapes))
    variants = {
      NO_CLIP: optax.identity(),
      OPTAX: optax.clip_by_global_norm(half_norm(tree.parameters)),
      BY_LEAF: clipjax.clip_by_leaf_norm(limit),
      BY_LAYER: clipjax.clip_by_leaf_norm(limit / math.sqrt(layers), stacked=axis),
    }
    for dtype in ("float32", "bfloat16"):
      steps = Steps(variants, gradients(shapes, dtype), gradients(shapes, dtype))
      cases.append(case_of(tree, dtype, {**summary(interleave(steps.turns(), plan.rounds), NO_CLIP)}))
  return cases


def compile_time(plan: Plan) -> list[Case]:
  """The time to trace and lower the step, and to compile it."""
  tree = trees(plan.quick)["many"]
  grads = gradients(tree.shapes, "float32")
  parts: dict[str, list[tuple[float, float]]] = {name: [] for name in COMPILED}

  def turn(name: str) -> Turn:
    def take() -> float:
      tx = clips(tree)[name]
      state = (tx.init(grads), optax.adam(1e-3).init(grads))
      jax.clear_caches()
      start = time.perf_counter()
      lowered = jitted_step(tx).lower(grads, state, grads)
      middle = time.perf_counter()
      lowered.compile()
      end = time.perf_counter()
      parts[name].append((middle - start, end - middle))
      return end - start

    return take

  times = interleave({name: turn(name) for name in COMPILED}, min(plan.rounds, COMPILATIONS), warm_up=0)
  total = summary(times)
  lower = summary({name: [a for a, _ in values] for name, values in parts.items()})
  backend = summary({name: [b for _, b in values] for name, values in parts.items()})
  variants = {name: {**total[name], "lower": lower[name], "compile": backend[name]} for name in COMPILED}
  return [case_of(tree, "float32", variants)]


def growth(plan: Plan) -> list[Case]:
  """The norm, and what the clip adds to Adam, against the number of parameters and of leaves."""
  exponents = (4, 4.5) if plan.quick else (5, 5.5, 6, 6.5, 7, 7.5, 8)
  sizes = [round(10**e / 16) for e in exponents]
  by_size = [Tree("parameters", f"{16 * n:,} parameters in 16 leaves", [(n,)] * 16) for n in sizes]
  counts = (1, 10) if plan.quick else (1, 10, 100, 1000, 5000)
  total = 40_000 if plan.quick else 4_000_000
  by_count = [Tree("leaves", f"{total:,} parameters in {n} leaves", [(total // n,)] * n) for n in counts]
  cases = []
  for tree in (*by_size, *by_count):
    if len(tree.shapes) > MANY:
      plan.notes.append(f"{tree.title}: only clipjax's norm, as XLA compiles Optax's for minutes; for Adam, see above.")
      cases.append(grown(plan, tree, with_adam=False, with_optax=False))
      continue
    with_adam = tree.parameters < 90_000_000 or memory() >= ROOM
    if not with_adam:
      plan.notes.append(f"{tree.title}: only the norm, as there is less than {ROOM / 1e9:.0f} GB of memory.")
    cases.append(grown(plan, tree, with_adam))
  return cases


def grown(plan: Plan, tree: Tree, with_adam: bool, with_optax: bool = True) -> Case:
  """One point of the growth."""
  grads = gradients(tree.shapes, "float32")
  repeats = max(1, 2_000_000 // tree.parameters)  # Below a millisecond, the clock and the call weigh too much.
  turns = {
    SUM: sum_turn(tree.parameters, "float32", repeats),
    f"{CLIPJAX}, norm": jax_turn(jax.jit(partial(clipjax.global_norm)), grads, repeats=repeats),
  }
  if with_optax:
    turns[f"{OPTAX}, norm"] = jax_turn(jax.jit(partial(optax.tree.norm)), grads, repeats=repeats)
  if with_adam:
    turns |= adam_steps(tree, grads, FEW).turns(repeats)
  times = interleave(turns, plan.rounds)
  return case_of(tree, "float32", {**summary(times, NO_CLIP if with_adam else None)})
