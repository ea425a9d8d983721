"""The float64 oracle, and the trees that several tests use."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax

DTYPES = ("float32", "bfloat16", "float16")
NO_LIMIT = float(np.finfo(np.float32).max)  # What a state has for a limit that is none.


def cases(values, slow):
  """Values for a test, of which those that `slow` holds, or says yes to, run with `-m slow` alone."""
  is_slow = slow if callable(slow) else slow.__contains__
  return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=[pytest.mark.slow] * is_slow(v)) for v in values]


def oracle_norm(tree, p=2.0):
  """The p-norm of all entries in float64, rescaled by the largest, so that nothing can overflow."""
  parts = [np.abs(as_wide(x)).ravel() for x in jax.tree.leaves(tree)]
  entries = np.concatenate([np.zeros(0), *parts])
  if p == 0:
    return float(np.count_nonzero(entries))
  if p == -math.inf:
    return float(entries.min(initial=math.inf))
  largest = entries.max(initial=0.0)
  if largest == 0 or not np.isfinite(largest) or p == math.inf:
    return float(largest)
  return float(largest * np.sum((entries / largest) ** p) ** (1 / p))


def oracle_clip(tree, max_norm, p=2.0, eps=0.0):
  """Every leaf times `min(1, max_norm / (norm + eps))`, in float64."""
  norm = oracle_norm(tree, p)
  factor = min(1.0, max_norm / (norm + eps)) if norm + eps > 0 else 1.0
  return jax.tree.map(lambda x: as_wide(x) * factor, tree)


def as_wide(x):
  """In float64 or complex128."""
  x = np.asarray(x)
  return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def assert_close(got, want, rtol=1e-6, atol=0.0):
  """Two trees of one structure: every entry within `rtol`, compared in 64 bits."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(as_wide(a), as_wide(b), rtol=rtol, atol=atol), got, want)


def first_step(tx, grads, params=None):
  """The updates and the state of one step from a new state."""
  return tx.update(grads, tx.init(grads if params is None else params), params)


def steps_of(tx, grads, params=None, **extra):
  """The updates and the state after each of some steps."""
  state, update, steps = tx.init(grads[0] if params is None else params), jax.jit(tx.update), []
  for g in grads:
    updates, state = update(g, state, params, **extra)
    steps.append((updates, state))
  return steps


def message_of(call, kind=ValueError):
  """The whole text of the error that a call raises."""
  with pytest.raises(kind) as error:
    call()
  return str(error.value)


@functools.cache
def worked_cases():
  """The worked float64 steps of published methods, by name."""
  text = (pathlib.Path(__file__).parent / "data" / "vectors.json").read_text()
  return {case["name"]: case for case in json.loads(text)["cases"]}


def random_leaves(count, dtype="float32", magnitude=1.0, seed=0):
  """`count` leaves of mixed ranks, normal entries times `magnitude`."""
  rng = np.random.default_rng(seed)
  shapes = [(7, 5), (64,), (3,), (), (2, 1, 4)]
  with np.errstate(over="ignore"):  # An entry may be inf in the dtype: a test that wants none says so.
    return [
      jnp.asarray((rng.standard_normal(shapes[i % len(shapes)]) * magnitude).astype(jnp.dtype(dtype)))
      for i in range(count)
    ]


def assert_bits_equal(got, want):
  """Same structure, shapes, dtypes and bits, NaN payloads and the sign of zero included."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


def train_on_one_device(loss_fn, params, batches, limit, optimizer):
  """A loop that clips by hand in float64: the parameters after the batches, and the norms before the clip."""
  gradient = jax.jit(jax.grad(loss_fn))
  state, norms = optimizer.init(params), []
  for batch in batches:
    grads = gradient(params, *batch)
    norms.append(oracle_norm(grads))
    clipped = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), oracle_clip(grads, limit))
    updates, state = optimizer.update(clipped, state, params)
    params = optax.apply_updates(params, updates)
  return params, norms


def factories():
  """Every exported clip that needs no parameters, each so that it clips a large gradient: name -> transformation."""
  return {
    "clip_by_global_norm": clipjax.clip_by_global_norm(0.5),
    "clip_by_leaf_norm": clipjax.clip_by_leaf_norm(0.5),
    "clip_by_group_norm": clipjax.clip_by_group_norm(0.5, lambda path, leaf: path[0]),
    "clip_by_block_rms": clipjax.clip_by_block_rms(0.5),
    "clip_by_value": clipjax.clip_by_value(0.5),
    "autoclip": clipjax.autoclip(0.0),
    "zclip": clipjax.zclip(max_norm=0.5),
    "adagc": clipjax.adagc(max_norm=0.5),
  }


def operations(jaxpr):
  """How many operations a program has, with those of the programs in it."""
  inner = [list(eqn.params.values()) for eqn in jaxpr.eqns]
  programs = jax.tree.leaves(inner, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
  found = (getattr(x, "jaxpr", x) for x in programs)
  return len(jaxpr.eqns) + sum(operations(x) for x in found if hasattr(x, "eqns"))


def conditionals(jaxpr, platform):
  """How often a program branches on what a step computes, after the choice of a platform."""
  found = 0
  for eqn in jaxpr.eqns:
    branches = eqn.params.get("branches", ())
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:  # Which of them runs is known when the program is lowered.
      branches = [b for b, own in zip(branches, platforms, strict=True) if own is None or platform in own][:1]
    elif eqn.primitive.name in ("cond", "while"):
      found += 1
    inner = [v for k, v in eqn.params.items() if k != "branches"]
    for value in jax.tree.leaves([inner, list(branches)], is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      value = getattr(value, "jaxpr", value)
      found += conditionals(value, platform) if hasattr(value, "eqns") else 0
  return found
