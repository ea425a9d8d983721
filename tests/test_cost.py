"""What a clip adds to the compiled step: no copy of the gradient, no second read of it."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases, conditionals, factories

import clipjax
from clipjax.norms.derivatives import measure_jit
from clipjax.scaling import rescale_jit

TREES = {
  "one leaf": [(1 << 20,)],
  "matrices": [(256, 768), (256, 256), (256,)] * 4,
  "many": [(64, 64)] * 60,
}


def compiled(clip, shapes, dtype=jnp.float32):
  tx = optax.chain(clip, optax.adam(1e-3))
  grads = [jnp.ones(shape, dtype) for shape in shapes]

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  return step.lower(grads, tx.init(grads), grads).compile(), sum(x.nbytes for x in grads)


def temporaries(clip, shapes, dtype=jnp.float32):
  """Bytes of temporaries of a step with Adam, as a share of the gradient."""
  program, nbytes = compiled(clip, shapes, jnp.dtype(dtype))
  return program.memory_analysis().temp_size_in_bytes / nbytes


GLOBAL, BY_LEAF = clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(1.0)
SMALL_WATCH = clipjax.watch(param_norms=False)
# What stands before Adam, the dtype, and the least and the most of temporaries.
COPIES = {
  "a clip": (GLOBAL, "float32", 0, 0.02),
  "a clip by leaf": (BY_LEAF, "float32", 0, 0.05),
  "a watch": (SMALL_WATCH, "float32", 0, 0.05),
  "a watch of the whole": (clipjax.watch(per_leaf=False, param_norms=False), "float32", 0, 0.05),
  "a watch and a clip": (optax.chain(SMALL_WATCH, GLOBAL), "float32", 0, 0.05),
  "a clip in bfloat16": (GLOBAL, "bfloat16", 0, 0.02),
  # What is left is the clipped leaf in 16 bits, which both moments of Adam read, not its copy in float32.
  "a clip by leaf in bfloat16": (BY_LEAF, "bfloat16", 0, 1.1),
  "a watch and a clip in bfloat16": (optax.chain(clipjax.watch(), GLOBAL), "bfloat16", 0, 1.1),
  # The measure can fail. Of parameters that are donated, what else reads them makes XLA write a copy.
  "a clip of Optax, which writes the clipped gradient": (optax.clip_by_global_norm(1.0), "float32", 0.9, math.inf),
  "a clip of Optax in bfloat16": (optax.clip_by_global_norm(1.0), "bfloat16", 1.9, math.inf),
  "a watch of the parameters": (clipjax.watch(), "float32", 0.9, math.inf),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
  ("tree", "name"),
  cases(
    itertools.product(TREES, COPIES),
    lambda case: case[0] != "matrices" and case[1] not in ("a clip", "a clip in bfloat16"),
  ),
)
def test_no_copy_of_the_gradient(tree, name):
  tx, dtype, least, most = COPIES[name]
  assert least <= temporaries(tx, TREES[tree], dtype) < most


def test_the_clip_per_example_copies_no_batch():
  grads = [jnp.ones((32, 100, 100)), jnp.ones((32, 100))]
  program = jax.jit(lambda grads: clipjax.clip_grad_per_example(grads, 1.0)).lower(grads).compile()
  share = program.memory_analysis().temp_size_in_bytes / sum(x.nbytes for x in grads)
  assert share < 0.1


@pytest.mark.usefixtures("standard_promotion")
def test_each_leaf_is_reduced_once_outside_of_the_second_pass():
  shapes = [(512, 200 + i) for i in range(10)]
  program, _ = compiled(clipjax.clip_by_global_norm(1.0), shapes)
  text = program.as_text()
  sizes = [200 + i for i in range(10)]
  # One reduction of a leaf's shape in the step itself, one more in the branch.
  counts = [len(re.findall(rf"\n[^\n]*f32\[512,{n}\][^\n]*\n(?:[^\n]*\n)?[^\n]*reduce\(", text)) for n in sizes]
  assert max(counts) <= 2
  assert text.count(" conditional(") == 1


def test_eager_transformation_compiles_nothing_new():
  tx = clipjax.clip_by_leaf_norm(1.0)
  grads = [jnp.asarray(x, jnp.float32) for x in np.eye(5)]
  state = tx.init(grads)
  _, state = tx.update(grads, state)
  sizes = [f._cache_size() for f in (measure_jit, rescale_jit)]
  again = clipjax.clip_by_leaf_norm(2.0)
  again.update(grads, again.init(grads))
  assert [f._cache_size() for f in (measure_jit, rescale_jit)] == sizes


def test_watch_beside_a_clip_reads_the_gradient_no_second_time():
  grads = [jnp.ones((64, 64)) for _ in range(4)]
  both = optax.chain(clipjax.watch(history=8), clipjax.clip_by_global_norm(1.0))
  alone = clipjax.clip_by_global_norm(1.0)

  def reductions_of_leaves(tx):
    text = jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    bodies = dict(re.findall(r"^%(\S+) \((.*?)^\}", text, re.M | re.S))
    fused = [bodies[name] for name in re.findall(r"calls=%(\S+?)[,\s]", entry)]
    in_fusions = sum("f32[64,64]" in body and " reduce(" in body for body in fused)
    return in_fusions + len(re.findall(r" reduce\([^)]*f32\[64,64\]", entry))

  assert reductions_of_leaves(alone) == len(grads)
  assert reductions_of_leaves(both) == len(grads)


# What accelerators are given ------------------------------------------------------------------------------------------

EVERYTHING = {
  **factories(),
  "watch": clipjax.watch(history=3),
  "watch, global": clipjax.watch(per_leaf=False),
  "skip_steps": clipjax.skip_steps(clipjax.clip_by_global_norm(1.0), norm_rule=clipjax.rules.rolling_sigma()),
  "clip_effect": clipjax.clip_effect(clipjax.clip_by_leaf_norm(1.0), optax.trace(0.9)),
  "adaptive_grad_clip": clipjax.adaptive_grad_clip(),
  "untracked": clipjax.clip_by_leaf_norm(1.0, track=False),
  "order 1": clipjax.clip_by_global_norm(1.0, 1),
  "order inf": clipjax.clip_by_leaf_norm(1.0, math.inf),
  "order 3": clipjax.clip_by_global_norm(1.0, 3),
}


def branches(tx, platform, vmap=False):
  """How many branches the program for a platform has."""
  grads = {"w": jnp.ones((300, 300)), "b": jnp.ones(3, jnp.bfloat16), "h": jnp.ones(4, jnp.float16)}
  step, args = tx.update, (grads, tx.init(grads), grads)
  if vmap:
    step, args = jax.vmap(step), jax.tree.map(lambda x: jnp.stack([x, x]), args)
  return conditionals(jax.make_jaxpr(step)(*args).jaxpr, platform)


SOME = ("clip_by_global_norm", "clip_by_leaf_norm", "watch", "adaptive_grad_clip")


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_accelerators_are_given_no_branch(name, platform):
  assert branches(EVERYTHING[name], platform) == 0
  if name in SOME and platform == "tpu":
    assert branches(EVERYTHING[name], platform, vmap=True) == 0
    assert branches(EVERYTHING[name], "cpu") >= 1  # So the search finds what there is.
