"""Properties that hold for every tree: hypothesis draws the leaves, the orders and the thresholds.

The profile "suite" is quick and always the same; `HYPOTHESIS_PROFILE=long` draws many more examples, anew each time.
What XLA on CPU does is part of the oracle: an entry, a norm or a factor below the smallest normal number is 0 to it.
"""

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_wide, assert_bits_equal, first_step, oracle_norm
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import clipjax

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile("suite", max_examples=24, deadline=None, derandomize=True, suppress_health_check=CHECKS)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=CHECKS)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "suite")
settings.load_profile(PROFILE)
LONG = PROFILE == "long"

ORDERS = st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf])
if LONG:
  ORDERS |= st.floats(0.2, 60.0) | st.integers(1, 200).map(float)
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64")
# Shapes are few, so that the examples share their compilations.
SHAPES = st.sampled_from([(3,), (2, 2), (), (0,)])
if LONG:
  SHAPES |= st.lists(st.integers(0, 5), max_size=4).map(tuple)


class Pair(NamedTuple):
  left: object
  right: object


@jax.tree_util.register_dataclass
@dataclass
class Layer:
  kernel: object
  bias: object


def info_of(dtype):
  return jnp.finfo(jnp.float32 if dtype == "complex64" else jnp.float64 if dtype == "complex128" else dtype)


@st.composite
def leaves(draw, dtype, shape=None):
  """An array whose entries lie within some decades of a magnitude from the whole range of the dtype."""
  info, shape = info_of(dtype), draw(SHAPES) if shape is None else shape
  low, high = math.log2(float(info.smallest_subnormal)), math.log2(float(info.max))
  top = draw(st.floats(low, high) | st.sampled_from([low, high, 0.0, math.log2(float(info.tiny))]))
  mantissas = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.7, -0.3, 2.0**-12, -0.99]) | st.floats(-1, 1)
  parts = [draw(mantissas) for _ in range(math.prod(shape) * (2 if dtype.startswith("complex") else 1))]
  # The largest number of the dtype itself is hit by a mantissa of 1 at the top.
  magnitude = float(info.max) if top >= high else 2.0**top
  wide = np.array([magnitude * part for part in parts], np.float64)
  if dtype.startswith("complex"):
    return (wide[::2] + 1j * wide[1::2]).reshape(shape).astype(dtype)
  return np.clip(wide, -float(info.max), float(info.max)).astype(jnp.dtype(dtype)).reshape(shape)


@st.composite
def trees(draw, dtypes=DTYPES, most=3):
  """One to three leaves in some nesting: dict, list, tuple, NamedTuple, dataclass, None beside them."""
  xs = [jnp.asarray(draw(leaves(draw(st.sampled_from(dtypes))))) for _ in range(draw(st.integers(1, most)))]
  first, rest = xs[0], xs[1:]
  shapes = [
    lambda: {"a": first, "b": {"c": rest, "none": None}},
    lambda: [first, tuple(rest), None],
    lambda: Pair(first, Pair(rest, None)),
    lambda: Layer(first, {"x": rest}),
    lambda: (Layer(None, first), *rest),
  ]
  return draw(st.sampled_from(shapes))()


# The oracle: float64, with the flushing of subnormal numbers to zero that XLA on CPU does -----------------------------


def flushed(x):
  """The entries in float64 as XLA on CPU reads them: those that are subnormal in 32 bits or more are 0."""
  x = np.asarray(x)
  if x.dtype in (np.float32, np.complex64, np.float64, np.complex128, jnp.bfloat16):
    tiny = float(jnp.finfo(x.dtype).tiny)
    parts = np.stack([x.real, x.imag], -1).astype(np.float64)
    parts = np.where(np.abs(parts) < tiny, 0.0 * parts, parts)
    return parts[..., 0] + 1j * parts[..., 1] if np.iscomplexobj(x) else parts[..., 0]
  return x.astype(np.float64)


def oracle(tree, p):
  """The p-norm in float64."""
  return oracle_norm(jax.tree.map(flushed, tree), p)


TINY, HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def assert_norm(got, want, p, err_msg="", tiny=TINY, huge=HUGE):
  """Right to 1e-6, for p < 1 to 1e-6 / p; what rounds to a subnormal number may be 0, above the largest it is inf."""
  rtol = 2e-6 / min(p, 1) if p > 0 else 2e-6
  if want > huge * (1 - rtol):
    assert got == math.inf or np.isclose(got, want, rtol=rtol), (got, want, err_msg)
  elif want < tiny * (1 + rtol):
    assert 0 <= got <= tiny * (1 + 2 * rtol), (got, want, err_msg)
  else:
    np.testing.assert_allclose(got, want, rtol=rtol, err_msg=err_msg)


def assert_scaled(got, x, factor):
  """A clipped leaf: every entry times the factor, rounded once to its dtype, signs kept."""
  info = info_of(str(jnp.asarray(x).dtype))
  rtol = max(float(info.eps), 4e-6)
  atol = float(info.smallest_subnormal) + (float(info.tiny) if float(info.tiny) <= TINY else 0)
  for a, b in zip(parts_of(as_wide(got)), parts_of(as_wide(x)), strict=True):
    np.testing.assert_allclose(a, b * factor, rtol=rtol, atol=atol)
    assert (np.signbit(a) == np.signbit(b)).all()


def parts_of(x):
  return (x.real, x.imag) if np.iscomplexobj(x) else (x,)


# Properties -----------------------------------------------------------------------------------------------------------


def check_norms(tree, p, dtype):
  whole, norms = clipjax.global_norm(tree, p), clipjax.leaf_norms(tree, p)
  assert jax.tree.structure(norms) == jax.tree.structure(tree)
  for x, norm in [(tree, whole), *zip(jax.tree.leaves(tree), jax.tree.leaves(norms), strict=True)]:
    assert norm.shape == () and norm.dtype == dtype
    if p == 0:  # Whether a subnormal entry is one of those that are not 0 depends on what XLA makes of the comparison.
      assert oracle(x, p) <= float(norm) <= sum(np.count_nonzero(np.asarray(leaf)) for leaf in jax.tree.leaves(x))
    else:
      # A power of a subnormal entry is not always flushed, and leaves of 32 bits and less are summed in float32.
      has_subnormal = any((flushed(leaf) != as_wide(leaf)).any() for leaf in jax.tree.leaves(x))
      narrow = [leaf for leaf in jax.tree.leaves(x) if leaf.dtype not in (np.float64, np.complex128)]
      info = np.finfo(np.float32 if oracle(narrow, p) > HUGE / 2 else dtype)
      assert_norm(float(norm), oracle(x, p), p, tiny=TINY if has_subnormal else float(info.tiny), huge=float(info.max))


ALL_ORDERS = ORDERS | st.sampled_from([0.0, -math.inf])


@given(tree=trees(), p=ALL_ORDERS)
@example(tree=[jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0**-127], jnp.bfloat16)], p=0.0)
def test_norms_are_those_of_the_oracle(tree, p):
  check_norms(tree, p, "float32")


@given(data=st.data(), p=ALL_ORDERS)
def test_norms_of_leaves_of_every_width_together(data, p):
  with jax.enable_x64(True):
    check_norms(data.draw(trees((*DTYPES, "float64", "float64", "complex128"))), p, "float64")


SHARES = st.sampled_from([0.0, 1e-30, 1e-6, 0.5, 0.999, 1.0, 1.001, 2.0, math.inf])
if LONG:
  SHARES |= st.floats(0, 4)


def limit_at(share, norm):
  """The share of a norm as a float32 >= 0."""
  if share in (0.0, math.inf):
    return np.float32(share)
  return np.float32(min(share * norm, HUGE))


def check_clip(clipped, tree, norm, limit):
  """What holds for leaves that were clipped together from a finite norm to a limit."""
  if norm <= limit:
    assert_bits_equal(clipped, tree)
    return
  assert jax.tree.structure(clipped) == jax.tree.structure(tree)
  for got, x in zip(jax.tree.leaves(clipped), jax.tree.leaves(tree), strict=True):
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    assert_scaled(got, x, float(limit) / float(norm))


@given(tree=trees(), p=ORDERS, share=SHARES)
def test_clip(tree, p, share):
  limit = limit_at(share, oracle(tree, p))
  clipped, norm = clipjax.clip_grad_norm(tree, limit, p)
  assert_norm(float(norm), oracle(tree, p), p)
  if not np.isfinite(norm):
    assert all(np.isnan(as_wide(x)).all() for x in jax.tree.leaves(clipped))
    return
  check_clip(clipped, tree, norm, limit)
  after = oracle(clipped, p)
  xs = jax.tree.leaves(tree)
  if p >= 1:
    rounding = max(2e-6, *(float(info_of(str(x.dtype)).eps) for x in xs))
    # An entry that comes out subnormal may be rounded up by half of the dtype's smallest step.
    steps = sum(x.size * float(info_of(str(x.dtype)).smallest_subnormal) for x in xs)
    assert after <= float(limit) * (1 + rounding) + steps
  again, norm_after = clipjax.clip_grad_norm(clipped, limit, p)
  check_clip(again, clipped, norm_after, limit)  # Nothing, but for what rounding brought above the limit.


@given(tree=trees(("float32", "complex64")), p=ORDERS, power=st.integers(-40, 40), share=SHARES)
def test_order_and_cuts_of_leaves_and_powers_of_two_change_nothing(tree, p, power, share):
  norm = oracle(tree, p)
  assume(TINY * 2.0**60 < norm < HUGE / 2.0**60)
  pieces = [row for x in jax.tree.leaves(tree) for row in jnp.ravel(x)[::-1]][::-1]
  assert_norm(float(clipjax.global_norm(pieces, p)), norm, p)
  limit = limit_at(share, norm)
  clipped, _ = clipjax.clip_grad_norm(tree, limit, p)
  scaled = jax.tree.map(lambda x: x * jnp.asarray(2.0**power, x.dtype), tree)
  same, scaled_norm = clipjax.clip_grad_norm(scaled, limit * np.float32(2.0**power), p)
  assert_norm(float(scaled_norm), norm * 2.0**power, p)
  for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(clipped), strict=True):
    for got, want in zip(parts_of(as_wide(a)), parts_of(as_wide(b)), strict=True):
      # Entries that are subnormal before or after the scaling are lost.
      np.testing.assert_allclose(got, want * 2.0**power, rtol=1e-5 / min(p, 1), atol=TINY * max(2.0**power, 1))


@pytest.mark.slow
@given(tree=trees(tuple(d for d in DTYPES if d != "complex64"), most=2), share=SHARES)
@example(tree=[jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0**-127])], share=1e-30)
@settings(max_examples=max(settings().max_examples // 4, 5))
def test_transformations_clip_their_blocks(tree, share):
  xs = jax.tree.leaves(tree)
  limit = limit_at(share, max([oracle(x, 2) for x in xs]))
  roots = [math.sqrt(max(x.size, 1)) for x in xs]
  assume(all(n == 0 or n > TINY * 2**20 for n in (oracle(x, 2) / root for x, root in zip(xs, roots, strict=True))))
  assume(oracle(tree, 2) < HUGE)
  for factory, divisors in ((clipjax.clip_by_leaf_norm, [1.0] * len(xs)), (clipjax.clip_by_block_rms, roots)):
    updates, state = first_step(factory(limit), tree)
    for x, got, norm, divisor in zip(xs, jax.tree.leaves(updates), state.norms, divisors, strict=True):
      np.testing.assert_allclose(norm, oracle(x, 2) / divisor, rtol=2e-6)
      check_clip(got, x, norm, limit)
  updates, state = first_step(clipjax.clip_by_value(limit), tree)
  assert_norm(float(state.norm), oracle(tree, math.inf), math.inf)
  for x, got in zip(xs, jax.tree.leaves(updates), strict=True):
    bound = float(limit) if x.dtype.itemsize == 1 else float(np.asarray(jnp.asarray(limit).astype(x.dtype), np.float64))
    want = np.clip(as_wide(x), -bound, bound).astype(x.dtype)
    np.testing.assert_array_equal(as_wide(got), as_wide(want))
    kept = np.abs(as_wide(x)) <= bound
    assert_bits_equal(np.asarray(got)[kept], np.asarray(x)[kept])


@pytest.mark.slow
@given(data=st.data(), dtype=st.sampled_from(["float32", "bfloat16", "float16"]), shape=SHAPES, share=SHARES)
@settings(max_examples=settings().max_examples // 2)
def test_units_are_clipped_to_a_share_of_their_parameters(data, dtype, shape, share):
  grads, params = (jnp.asarray(data.draw(leaves(dtype, shape))) for _ in range(2))
  axes = tuple(range(len(shape))) if len(shape) < 2 else (0,) if len(shape) < 4 else (0, 1, 2)
  over, of_params = (unit_oracle(x, axes) for x in (grads, params))
  eps = 2.0 ** data.draw(st.integers(-60, 0))
  clipping = limit_at(share, float((over / np.maximum(of_params, eps)).max(initial=0.0)))
  limits = float(clipping) * np.maximum(of_params, eps)
  # Right at a limit, or where a norm or a limit leaves float32, either answer will do.
  close = np.isclose(over, limits, rtol=1e-5) & (over > 0)
  assume(not close.any() and over.max(initial=0.0) < HUGE / 2 and of_params.max(initial=0.0) < HUGE / 2)
  assume(all(v == 0 or v > TINY * 2.0**30 for v in [*limits.ravel(), *over.ravel(), *of_params.ravel()]))
  tx = clipjax.adaptive_grad_clip(clipping, eps)
  got, _ = tx.update(grads, tx.init(params), params)
  kept = np.broadcast_to(over <= limits, shape)
  assert (got.shape, got.dtype) == (grads.shape, grads.dtype)
  assert_bits_equal(np.asarray(got)[kept], np.asarray(grads)[kept])
  factor = np.broadcast_to(np.minimum(limits, HUGE) / np.where(over > 0, over, 1), shape)
  assert_scaled(np.asarray(got)[~kept], np.asarray(grads)[~kept], factor[~kept])


def unit_oracle(x, axes):
  """The 2-norm over some axes in float64, these kept."""
  x = np.abs(flushed(x))
  largest = x.max(axis=axes, keepdims=True, initial=0.0)
  ratios = x / np.where(largest > 0, largest, 1)
  with np.errstate(under="ignore"):
    return largest * np.sqrt(np.sum(ratios**2, axis=axes, keepdims=True))


@given(data=st.data(), dtype=st.sampled_from(["float32", "float16", "bfloat16", "complex64"]), share=SHARES)
@settings(max_examples=settings().max_examples // 2)
def test_each_example_is_clipped_by_itself(data, dtype, share):
  batch = jnp.stack([jnp.asarray(data.draw(leaves(dtype, shape=(2, 2)))) for _ in range(3)])
  norms = [oracle(x, 2) for x in batch]
  limit = limit_at(share, sorted(norms)[1])
  total, got = clipjax.clip_grad_per_example({"x": batch}, limit)
  want = np.zeros((2, 2), np.complex128)
  for x, norm, measured in zip(batch, norms, got, strict=True):
    assert_norm(float(measured), norm, 2)
    if np.isfinite(measured):
      want += flushed(x) * (float(limit) / float(measured) if measured > limit else 1)
  size = np.abs(want).max() + sum(min(float(limit), norm) for norm in norms if norm < HUGE)
  if size < HUGE:
    np.testing.assert_allclose(as_wide(total["x"]), want, rtol=1e-5, atol=4e-6 * size + 4 * TINY)


@given(data=st.data(), p=ORDERS, share=SHARES)
@settings(max_examples=settings().max_examples // 2)
def test_float64_leaves_are_clipped_in_float64(data, p, share):
  with jax.enable_x64(True):
    tree = {"a": jnp.asarray(data.draw(leaves("float64"))), "b": jnp.asarray(data.draw(leaves("float32")))}
    norm = oracle(tree, p)
    assume(1e-290 < norm < 1e300 or not any(np.any(x) for x in tree.values()))
    limit = float(share * norm) if 0 < share < math.inf else share
    clipped, got = clipjax.clip_grad_norm(tree, limit, p)
    rtol = 1e-6 if np.any(np.asarray(tree["b"])) else 1e-13 / min(p, 1)
    np.testing.assert_allclose(float(got), norm, rtol=rtol)
    if got <= limit:
      assert_bits_equal(clipped, tree)
    else:
      assert clipped["a"].dtype == jnp.float64 and clipped["b"].dtype == jnp.float32
      np.testing.assert_allclose(clipped["a"], np.asarray(tree["a"]) * (limit / float(got)), rtol=1e-14, atol=1e-307)
