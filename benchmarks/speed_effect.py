"""The section of `speed.py` about `clip_effect`: a step with it, and one with only the clip and the optimizer.

Each variant has its own donated parameters and states; the difference is the second optimizer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from speed_adam import jitted
from speed_gradients import gradients, temporaries
from speed_peers import Plan
from speed_trees import CLIPJAX, EFFECT, Case, case_of, half_norm, trees
from timing import interleave, summary, turn_of

import clipjax

OPTIMIZERS = {"momentum": optax.sgd(1e-3, momentum=0.9), "Adam": optax.adam(1e-3)}


def effect(plan: Plan) -> list[Case]:
  """Steps with and without `clip_effect`, for each optimizer, on one tree."""
  tree = trees(plan.quick)["transformer"]
  grads = gradients(tree.shapes, "float32")
  cases = []
  for optimizer, tx in OPTIMIZERS.items():
    clip = clipjax.clip_by_global_norm(half_norm(tree.parameters))
    steps = {CLIPJAX: _Step(optax.chain(clip, tx), grads), EFFECT: _Step(clipjax.clip_effect(clip, tx), grads)}
    turns = {name: turn_of(step.run) for name, step in steps.items()}
    variants: dict[str, dict[str, Any]] = {**summary(interleave(turns, plan.rounds), CLIPJAX)}
    for name, step in steps.items():
      variants[name] |= {"temporaries": temporaries(step.program), "state": step.state_bytes}
    cases.append({**case_of(tree, "float32", variants), "optimizer": optimizer})
  return cases


class _Step:
  """A compiled step with its parameters and its state."""

  def __init__(self, tx: optax.GradientTransformation, grads: list[jax.Array]):
    self.grads = grads
    self.carried = [jnp.zeros_like(g) for g in grads], tx.init(grads)
    self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.carried[1]))
    self.program = jitted(tx).lower(*self.carried, grads).compile()

  def run(self) -> None:
    """Runs one step and waits for it."""
    self.carried = jax.block_until_ready(self.program(*self.carried, self.grads))
