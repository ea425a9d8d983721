"""Derivatives through everything that measures or clips, for those who learn through the clip.

Forward, reverse and second derivatives are held against central differences in float64, at entries of 1e-30, 1 and
1e30, through the state of several steps, and no NaN may appear on the way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cases, oracle_norm

import clipjax
from clipjax import rules

# Three examples with rows of 2 and 1 entries, or two leaves; and a direction to move in.
POINT = {"a": np.array([[0.3, -0.7], [1.1, 0.2], [-0.5, 0.4]]), "b": np.array([0.9, -0.2, 0.6])}
MOVE = {"a": np.array([[0.2, 0.5], [-0.3, 0.7], [0.1, -0.6]]), "b": np.array([-0.4, 0.3, 0.8])}
WEIGHTS = np.random.default_rng(0).standard_normal(64)
NORM = oracle_norm(POINT)


@dataclass(frozen=True)
class Steps:
  """A transformation, built by `make(max_norm)`, as a function of the gradient x: steps, and what is seen then."""

  make: Callable[[Any], optax.GradientTransformationExtraArgs]
  with_params: bool = False

  def __call__(self, x, max_norm, last, multiples):
    return self.last_step(self.start(x, max_norm, multiples), x, max_norm, last)

  def start(self, x, max_norm, multiples):
    """The state after a step with each multiple of x."""
    tx = self.make(max_norm)
    return jax.lax.scan(lambda state, m: (self.step(tx, x, m, state)[1], None), tx.init(x), multiples)[0]

  def step(self, tx, x, multiple, state):
    params = jax.tree.map(jnp.flip, x) if self.with_params else None
    grads = {"a": multiple * x["a"], "b": multiple * multiple * x["b"]}  # The norms of two leaves have another ratio.
    return tx.update(grads, state, params)

  def last_step(self, state, x, max_norm, last):
    """The updates of a step with `last` times x, and what `metrics` says, in the unit of x."""
    updates, state = self.step(self.make(max_norm), x, last, state)
    numbers = clipjax.metrics(state, per_leaf=True)
    numbers = {k: v for k, v in numbers.items() if not k.startswith("effect/")}  # These have no derivative.
    floats = {k: v for k, v in numbers.items() if jnp.issubdtype(v.dtype, jnp.floating) and "fraction" not in k}
    unit = jnp.where(jnp.isinf(max_norm), 1, max_norm)
    in_one_unit = {k: v * unit if "scale" in k or "ratio" in k else v for k, v in floats.items()}
    return updates, {k: jnp.where(jnp.isinf(v), 0, v) for k, v in in_one_unit.items()}


def with_rule(rule, clip=clipjax.clip_by_global_norm):
  return Steps(lambda max_norm: clip(rule(max_norm) if callable(rule) else rule))


NORMS = {
  **{f"global_norm {p}": lambda x, m, *_, p=p: clipjax.global_norm(x, p) for p in (0.5, 1.0, 1.5, 2.0, 7.3, math.inf)},
  "leaf_norms": lambda x, m, *_: clipjax.leaf_norms(x),
}
CLIPS = {
  **{
    f"clip_grad_norm {p}": lambda x, m, *_, p=p: clipjax.clip_grad_norm(x, m, p) for p in (0.5, 1.0, 2.0, 3.0, math.inf)
  },
  "clip_grad_norm eps": lambda x, m, *_: clipjax.clip_grad_norm(x, m, eps=0.1 * m),
  "clip_grad_norm norm": lambda x, m, *_: clipjax.clip_grad_norm(x, m, norm=2 * clipjax.global_norm(x, 3)),
  "clip_grad_value": lambda x, m, *_: clipjax.clip_grad_value(x, m),
  "clip_grad_per_example": lambda x, m, *_: clipjax.clip_grad_per_example(x, m),
  "clip_grad_norm limit": lambda x, m, *_: clipjax.clip_grad_norm(x["a"], clipjax.global_norm(x["b"])),
}
TRANSFORMATIONS = {
  "clip_by_global_norm": Steps(clipjax.clip_by_global_norm),
  "clip_by_leaf_norm": Steps(clipjax.clip_by_leaf_norm),
  "clip_by_leaf_norm inf": Steps(lambda m: clipjax.clip_by_leaf_norm(m, ord=math.inf)),
  "clip_by_group_norm": Steps(lambda m: clipjax.clip_by_group_norm({"a": m, "b": None}, lambda path, leaf: path[0])),
  "clip_by_block_rms": Steps(clipjax.clip_by_block_rms),
  "clip_by_value": Steps(clipjax.clip_by_value),
  "adaptive_grad_clip": Steps(lambda m: clipjax.adaptive_grad_clip(0.7, 0.01 * m), with_params=True),
  "autoclip": Steps(lambda m: clipjax.autoclip(40.0)),
  "zclip": Steps(lambda m: clipjax.zclip(warmup_steps=3, decay=0.8)),
  "adagc": Steps(lambda m: clipjax.adagc(1.2, warmup_steps=2, max_norm=m)),
  "skip_steps": Steps(lambda m: clipjax.skip_steps(clipjax.clip_by_global_norm(0.9 * m), norm_rule=m)),
  "clip_effect": Steps(lambda m: clipjax.clip_effect(clipjax.clip_by_global_norm(m), optax.trace(0.5))),
  "watch": Steps(lambda m: optax.chain(clipjax.watch(), clipjax.clip_by_global_norm(m)), with_params=True),
  "percentile": with_rule(rules.percentile(70.0, include_current=False)),
  "quantile_tracking": with_rule(rules.quantile_tracking(0.5)),
  "zscore mean": with_rule(rules.zscore(1.5, warmup_steps=2, mode="mean", record="raw")),
  "rolling_sigma": with_rule(rules.rolling_sigma(1.5, window=3)),
  "ema_ratio": with_rule(rules.ema_ratio(1.2, decay=0.9, warmup_steps=1, max_norm=math.inf)),
  "lower": with_rule(lambda m: rules.minimum(rules.zscore(1.5, warmup_steps=3, mode="max"), m)),
  "after": with_rule(lambda m: rules.delayed(3, m), clipjax.clip_by_leaf_norm),
}
CASES = {**NORMS, **CLIPS, **TRANSFORMATIONS}
FAR = (1e-30, 1.0, 1e30)
# ZClip's 1e-6 hides smaller norms from a difference; its variance and a norm of parameters have the range of a square.
NEAR = dict.fromkeys(("zclip", "zscore mean", "lower", "watch"), (1e-3, 1.0, 1e15))
# What shares its derivatives with another case runs with `-m slow`.
ALIKE = {"global_norm 1.0", "global_norm 7.3", "clip_grad_norm 1.0", "clip_grad_norm 0.5", "clip_grad_norm inf"}
ALIKE |= {"clip_grad_norm eps", "clip_by_value", "clip_by_block_rms", "autoclip", "rolling_sigma", "percentile"}
ALIKE |= {"zscore mean", "ema_ratio", "after"}


def points_of(name):
  """Scale of the entries, `max_norm`, multiple of the last step and of those before: over and under the limit."""
  before = np.array([1.0, 1.1, 0.9])
  return [
    (s, s * NORM * share, last, before) for s in NEAR.get(name, FAR) for share, last in ((0.5, 3.0), (10.0, 0.95))
  ]


def flat(tree):
  return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def weighted(fn):
  """The entries of the result times `WEIGHTS`, summed."""

  def scalar(x, *rest):
    y = flat(fn(x, *rest))
    return jnp.sum(y * jnp.asarray(WEIGHTS[: y.size], y.dtype))

  return scalar


def moved(scale, by, dtype):
  return jax.tree.map(lambda x, v: jnp.asarray((x + by * v) * scale, dtype), POINT, MOVE)


def single(numbers):
  return [jnp.asarray(number, jnp.float32) for number in numbers]


def difference(fn, scale, *rest):
  """The central difference of a function along MOVE, in float64."""
  ahead, behind = (flat(fn(moved(scale, by, jnp.float64), *rest)) for by in (1e-5, -1e-5))
  return np.asarray((ahead - behind) / 2e-5)


def assert_close(got, want, rtol):
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=rtol * np.abs(want).max(initial=0.0))


def compiled(fn):
  """The function under jit, with the compiler in a hurry."""
  return partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})(fn)


@cache
def first_derivatives(name):
  """The forward derivative of a case along v, and along it what the reverse one of `weighted` says; for float32."""
  fn = CASES[name]

  @compiled
  def compute(x, v, *rest):
    _, forward = jax.jvp(lambda x: flat(fn(x, *rest)), (x,), (v,))
    return forward, jnp.sum(flat(jax.grad(weighted(fn))(x, *rest)) * flat(v))

  def of_numbers(scale, *rest):
    v = jax.tree.map(lambda v: jnp.asarray((scale or 1) * v, jnp.float32), MOVE)
    with jax.debug_nans(True):
      return jax.block_until_ready(compute(moved(scale, 0, jnp.float32), v, *single(rest)))

  return of_numbers


@pytest.mark.parametrize("name", cases(sorted(CASES), ALIKE))
def test_first_derivatives_are_those_of_central_differences(name):
  with jax.enable_x64(True):
    exact = compiled(CASES[name])
    wanted = [difference(exact, *point) for point in points_of(name)]
  for point, want in zip(points_of(name), wanted, strict=True):
    forward, reverse = first_derivatives(name)(*point)
    assert_close(forward, want, 1e-4)
    assert_close(reverse, want @ WEIGHTS[: want.size], 1e-4)


@pytest.mark.parametrize("name", cases(sorted(CASES), ALIKE))
def test_derivatives_at_zero_and_of_constant_norms_are_finite(name):
  for scale in (0.0, *NEAR.get(name, FAR)):
    for max_norm in (0.0, 1.0, math.inf):
      for last in (0.0, 1.0, 3.0):
        out = first_derivatives(name)(scale, max_norm, last, np.ones(3))
        assert all(np.isfinite(leaf).all() for leaf in out)


@pytest.mark.parametrize("name", cases(sorted(CASES), ALIKE | (set(TRANSFORMATIONS) - {"clip_by_leaf_norm"})))
def test_second_derivatives_are_those_of_central_differences(name):
  # Those of a transformation in its last step, the state before being given.
  whole = CASES[name]
  start = compiled(whole.start) if isinstance(whole, Steps) else lambda *args: None

  def fn(x, state, max_norm, last):
    return whole.last_step(state, x, max_norm, last) if isinstance(whole, Steps) else whole(x, max_norm)

  gradient = jax.grad(weighted(fn))

  @compiled
  def compute(x, scale, *rest):
    v = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), MOVE)
    _, forward = jax.jvp(lambda x: flat(gradient(x, *rest)), (x,), (jax.tree.map(lambda v: scale * v, v),))
    # Backwards the direction is of size 1: a gradient that is carried back times 1e-30 twice is no float32.
    reverse = jax.grad(lambda x: jnp.sum(flat(gradient(x, *rest)) * flat(v)))(x)
    return forward, scale * flat(reverse)

  wanted = []
  with jax.enable_x64(True):
    exact = compiled(gradient)
    for scale, max_norm, last, before in points_of(name):
      state = start(moved(scale, 0, jnp.float64), max_norm, before)
      wanted.append(difference(exact, scale, state, max_norm, last))
  with jax.debug_nans(True):
    for (scale, *rest), want in zip(points_of(name), wanted, strict=True):
      x, (max_norm, last, before) = moved(scale, 0, jnp.float32), single(rest)
      for got in compute(x, jnp.float32(scale), start(x, max_norm, before), max_norm, last):
        assert_close(got, want, 1e-3)


@pytest.mark.parametrize("name", cases(sorted(NORMS | CLIPS), ALIKE))
def test_second_derivatives_at_zero_and_of_any_limit_are_finite(name):
  fn = CASES[name]

  @compiled
  def compute(x, v, *rest):
    return jax.jvp(lambda x: jax.grad(weighted(fn))(x, *rest), (x,), (v,))[1]

  with jax.debug_nans(True):
    for scale in (0.0, *FAR):
      v = moved(scale or 1.0, 0.5, jnp.float32)
      for max_norm in (0.0, 0.5 * scale, scale * NORM, 1.0, math.inf):
        out = jax.block_until_ready(compute(moved(scale, 0, jnp.float32), v, jnp.float32(max_norm), jnp.float32(1.0)))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize("scale", FAR)
def test_at_the_limit_the_derivative_is_that_below_it(scale):
  x, v = jnp.array([3.0, 4.0]) * jnp.float32(scale), jnp.array([0.5, -2.0])
  limit = clipjax.global_norm(x)
  clip = lambda x: clipjax.clip_grad_norm(x, limit)[0]  # noqa: E731
  np.testing.assert_array_equal(jax.jvp(clip, (x,), (v,))[1], v)
  np.testing.assert_array_equal(jax.vjp(clip, x)[1](v)[0], v)
  np.testing.assert_array_equal(jax.linearize(clip, x)[1](v), v)
  # The next float32 below the limit: the part along x is gone, what is across it stays.
  tighter = jnp.nextafter(limit, jnp.float32(0))
  across = np.array([0.5, -2.0]) - np.dot([0.5, -2.0], [0.6, 0.8]) * np.array([0.6, 0.8])
  np.testing.assert_allclose(jax.linearize(lambda x: clipjax.clip_grad_norm(x, tighter)[0], x)[1](v), across, rtol=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("scale", FAR)
def test_second_derivative_of_complex_leaves(p, scale):
  parts = np.array([[0.3, -0.7, 1.1], [0.9, 0.4, -0.2]])
  move = np.array([[0.5, 0.2, -0.6], [-0.1, 0.8, 0.3]])

  def along(norm, parts, move):
    def of_parts(parts):
      return norm(jax.lax.complex(parts[0], parts[1]))

    return jax.jvp(jax.grad(of_parts), (parts,), (move,))[1]

  with jax.enable_x64(True):
    plain = lambda z: jnp.sum((z.real**2 + z.imag**2) ** (p / 2)) ** (1 / p)  # noqa: E731
    want = np.asarray(along(plain, jnp.asarray(parts), jnp.asarray(move)))
  got = along(lambda z: clipjax.global_norm(z, p), *(jnp.asarray(v * scale, jnp.float32) for v in (parts, move)))
  assert_close(got, want, 1e-5)


def test_second_derivatives_through_a_scan():
  # JAX drops custom rules in the second derivative of a scan, and keeps them where its body is checkpointed.
  x, v = jnp.array([3.0, -4.0, 1.0]), jnp.array([0.5, -2.0, 1.0])

  def add_one(total, x):
    clipped, norm = clipjax.clip_grad_norm(x, 1.0)
    return total + clipped[0] - 2 * clipped[1] + norm

  def loop(add):
    return lambda x: jax.lax.scan(lambda total, m: (add(total, m * x), None), 0.0, jnp.array([1.0, 0.1]))[0]

  want = jax.jvp(jax.grad(lambda x: add_one(add_one(0.0, x), 0.1 * x)), (x,), (v,))[1]
  for fn in (loop(add_one), loop(jax.checkpoint(add_one))):
    assert_close(compiled(jax.jacfwd(jax.grad(fn)))(x) @ v, want, 1e-5)
    assert_close(compiled(jax.grad(lambda x, fn=fn: jnp.sum(jax.grad(fn)(x) * v)))(x), want, 1e-5)


def test_second_derivatives_through_a_checkpointed_scan_at_every_magnitude():
  want = None
  for scale in (1.0, *FAR):
    x, v = jnp.array([3.0, -4.0, 1.0]) * jnp.float32(scale), jnp.array([0.5, -2.0, 1.0])

    def fn(x, scale=scale):
      step = jax.checkpoint(lambda total, m: (total + clipjax.clip_grad_norm(m * x, scale)[0][0], None))
      return jax.lax.scan(step, 0.0, jnp.array([1.0, 0.1]))[0]

    got = np.asarray(jax.jvp(jax.grad(fn), (x,), (v * scale,))[1])
    want = got if want is None else want
    assert_close(got, want, 1e-5)
  assert np.abs(want).max() > 0.01


def test_reverse_derivative_through_vmap():
  # The last is reduced by more than the root of the largest float32.
  scales = np.array([1.0, 1e30, 1e-30, 0.0, 1e25])
  rows, limits = jnp.asarray(np.outer(scales, [3.0, 4.0]), jnp.float32), jnp.array([1.0, 1e30, 1e-30, 1.0, 1.0])
  jacobian = jax.vmap(jax.jacrev(lambda x, m: clipjax.clip_grad_norm(x, m)[0]))(rows, limits)
  want = np.array([[0.128, -0.096], [-0.096, 0.072]])
  np.testing.assert_allclose(jacobian, [want, want, want, np.eye(2), want / 1e25], rtol=1e-5)
