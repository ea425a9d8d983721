"""clip_grad_norm and clip_grad_value against the oracle and the stated rules."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
  DTYPES,
  assert_bits_equal,
  assert_close,
  cases,
  factories,
  first_step,
  oracle_clip,
  oracle_norm,
  random_leaves,
)
from jax.experimental import checkify

import clipjax
from clipjax import functional, scaling

EXAMPLE = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_entries_within_the_interval_are_bit_identical(dtype):
  info = jnp.finfo(dtype)
  x = jnp.asarray(np.array([info.smallest_subnormal, -info.smallest_subnormal, info.tiny, 2.0, -0.0]).astype(dtype))
  for clip in (clipjax.clip_grad_value, jax.jit(clipjax.clip_grad_value)):
    assert_bits_equal(clip(x, 1.0)[jnp.array([0, 1, 2, 4])], x[jnp.array([0, 1, 2, 4])])
    assert clip(x, 1.0)[3] == 1


def test_a_weakly_typed_leaf_comes_back_as_a_strong_one_of_its_dtype():
  # One answer under and over the limit, and for every clip: a step is traced again at most once.
  weak = {"w": jax.grad(lambda x: x * x)(1.5)}
  assert weak["w"].weak_type
  outputs = [
    clip(weak, limit)
    for limit in (1.0, 9.0)
    for clip in (lambda g, c: clipjax.clip_grad_norm(g, c)[0], jax.jit(clipjax.clip_grad_value))
  ]
  outputs += [first_step(tx, weak)[0] for tx in factories().values()]
  for got in outputs:
    assert (got["w"].dtype, got["w"].weak_type) == (jnp.float32, False)
  assert [float(got["w"]) for got in outputs[:4]] == [1.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("magnitude", "eps"), [(1e-30, 0.0), (1.0, 0.0), (1e30, 0.0), (1.0, 1e-6)])
def test_oracle(p, dtype, magnitude, eps):
  magnitude = magnitude ** (0.1 if dtype == "float16" else 1)
  leaves = random_leaves(5, dtype, magnitude)
  max_norm = 0.3 * oracle_norm(leaves, p)
  clipped, norm = clipjax.clip_grad_norm(leaves, max_norm, p, eps=eps)
  chex.assert_trees_all_equal_shapes_and_dtypes(clipped, leaves)
  np.testing.assert_allclose(norm, oracle_norm(leaves, p), rtol=1e-6)
  rounding = float(jnp.finfo(dtype).eps)
  # Entries that come out subnormal in the dtype are rounded to its smallest step.
  smallest = float(jnp.finfo(dtype).tiny) * (1 if dtype == "float32" else rounding)
  assert_close(clipped, oracle_clip(leaves, max_norm, p, eps), max(rounding, 1e-6), smallest)
  assert oracle_norm(clipped, p) <= max_norm * (1 + (1e-6 if dtype == "float32" else rounding))


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("jitted", [False, True])
def test_bit_identical_at_and_under_the_limit(dtype, jitted):
  leaves = [jnp.asarray([0.0, -0.0, 1.0, -2.0, 2.0], dtype), jnp.zeros((0, 2), dtype), jnp.asarray(4.0, dtype)]
  clip = jax.jit(clipjax.clip_grad_norm) if jitted else clipjax.clip_grad_norm
  for max_norm in (5.0, 5.1, 1e30, math.inf):
    clipped, norm = clip(leaves, max_norm)
    assert norm == 5
    assert_bits_equal(clipped, leaves)


def test_subnormal_entries_survive_under_the_limit():
  leaves = [jnp.asarray(np.array([1e-40, -1e-45, 1.0], np.float32)), jnp.asarray([1e-40], jnp.bfloat16)]
  assert_bits_equal(jax.jit(clipjax.clip_grad_norm)(leaves, 1.0)[0], leaves)


@pytest.mark.parametrize("norm", [4.0, 1e6, 1e25])
def test_tiny_entries_beside_large_ones_are_scaled_as_they_are(norm):
  clipped, _ = clipjax.clip_grad_norm(jnp.array([norm, norm * 1e-34]), 1.0)
  np.testing.assert_allclose(clipped, [1.0, 1e-34], rtol=1e-6)


def test_sixteen_bit_leaves_are_rounded_once():
  x = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.bfloat16)
  clipped, norm = clipjax.clip_grad_norm(x, 1.0)
  want = (np.asarray(x, np.float32) * np.float32(1 / norm)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(clipped, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_zero_gradient_and_an_empty_tree_stay(max_norm):
  grads = {"a": jnp.zeros(3), "b": jnp.zeros((), jnp.bfloat16), "c": jnp.zeros((0, 4))}
  for tree in (grads, {}):
    clipped, norm = clipjax.clip_grad_norm(tree, max_norm)
    assert norm == 0
    assert_bits_equal(clipped, tree)
  jac = jax.jacrev(lambda g: clipjax.clip_grad_norm(g, max_norm)[0])(grads["a"])
  np.testing.assert_array_equal(jac, np.eye(3))


@pytest.mark.parametrize(("clip", "limit"), [(clipjax.clip_grad_norm, 0.0), (jax.jit(clipjax.clip_grad_norm), -1.0)])
def test_a_limit_of_zero_gives_zeros_and_a_traced_negative_one_counts_as_zero(clip, limit):
  clipped, norm = clip(EXAMPLE, limit)
  assert norm == 13
  assert not any(x.any() for x in jax.tree.leaves(clipped))
  assert not jax.jit(clipjax.clip_grad_value)(EXAMPLE, limit)["w"].any()


# A gradient, a limit, and the norm where it is given.
NO_FINITE_STEP = {
  "an entry inf": ([1.0, math.inf], 1.0, None),
  "an entry -inf": ([1.0, -math.inf], 1.0, None),
  "an entry NaN": ([1.0, math.nan], 1.0, None),
  "an entry NaN under no limit": ([1.0, math.nan], math.inf, None),
  "an entry inf beside a norm of NaN": ([math.inf, 1.0], 1.0, math.nan),
  "a limit NaN": ([3.0, 4.0], math.nan, None),
  "a limit NaN above the norm": ([0.3, 0.4], math.nan, None),
  "a limit NaN for zeros": ([0.0, 0.0], math.nan, None),
  **{f"a given norm of {norm}": ([3.0, 4.0], 1.0, norm) for norm in (-1.0, -math.inf, math.nan, math.inf)},
}


@pytest.mark.parametrize("case", NO_FINITE_STEP)
@pytest.mark.parametrize("compiled", [lambda clip: clip, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("policy", "filled"), [("propagate", np.nan), ("zero", 0.0)])
def test_a_step_that_is_not_finite_is_never_half_applied(case, compiled, policy, filled):
  values, max_norm, norm = NO_FINITE_STEP[case]
  grads = {"a": jnp.array(values), "b": jnp.zeros(3, jnp.bfloat16), "c": jnp.array(0.0)}
  clip = compiled(lambda grads, limit, norm: clipjax.clip_grad_norm(grads, limit, norm=norm, on_nonfinite=policy))
  clipped, got = clip(grads, jnp.float32(max_norm), norm if norm is None else jnp.float32(norm))
  assert np.isfinite(got) == ("a limit" in case)
  assert_close(clipped, jax.tree.map(lambda x: np.full(x.shape, filled), grads), 0)


@pytest.mark.parametrize("policy", ["propagate", "zero", "error"])
def test_a_policy_does_nothing_to_a_finite_gradient(policy):
  for max_norm, want in ((1.0, [0.6, 0.8]), (5.0, [3.0, 4.0])):
    clipped, norm = clipjax.clip_grad_norm(jnp.array([3.0, 4.0]), max_norm, on_nonfinite=policy)
    assert norm == 5
    np.testing.assert_allclose(clipped, want, rtol=1e-6)


def test_error_policy_eagerly_and_through_checkify():
  def step(grads, norm=None, max_norm=1.0):
    return clipjax.clip_grad_norm(grads, max_norm, norm=norm, on_nonfinite="error")

  bad = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(3)}
  for grads, norm in ((bad, None), (EXAMPLE, jnp.float32(-1.0))):  # A norm below 0 is none.
    with pytest.raises(FloatingPointError, match="norm nan"):
      step(grads, norm)
  err, _ = jax.jit(checkify.checkify(step))(bad)
  assert "the gradient is not finite (norm nan)" in err.get()
  err, _ = jax.jit(checkify.checkify(step))(EXAMPLE, max_norm=jnp.float32(jnp.nan))
  assert "a limit is NaN, of a gradient with the norm 13.0" in err.get()
  err, (clipped, _) = jax.jit(checkify.checkify(step))(EXAMPLE)
  assert err.get() is None
  np.testing.assert_allclose(clipped["w"], [3 / 13, 4 / 13], rtol=1e-6)


def test_numbers_beyond_int32():
  clipped, norm = clipjax.clip_grad_norm(EXAMPLE, 2**40, eps=10**3)
  assert norm == 13
  assert_bits_equal(clipped, EXAMPLE)


def test_vmap_and_jit_are_the_eager_clip():
  rows = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)) * 10.0 ** np.arange(-4, 6, 2)[:, None], "float32")
  eager = [clipjax.clip_grad_norm(row, 1.0) for row in rows]
  chex.assert_trees_all_equal([jax.jit(clipjax.clip_grad_norm)(row, 1.0) for row in rows], eager)
  mapped = jax.vmap(lambda g: clipjax.clip_grad_norm(g, 1.0))(rows)
  assert_close(mapped, tuple(map(np.stack, zip(*eager, strict=True))))


def test_trees_pass_through_with_everything_that_is_not_measured(x64):
  f0 = np.zeros(3, jax.dtypes.float0)
  grads = {"a": jnp.array([3.0, 4.0], jnp.float32), "none": None, "masked": optax.MaskedNode(), "f0": f0, "py": 12.0}
  clipped, norm = clipjax.clip_grad_norm(grads, 6.5)
  np.testing.assert_allclose(clipped["a"], [1.5, 2.0], rtol=1e-6)
  assert clipped["none"] is None and clipped["f0"] is f0 and isinstance(clipped["masked"], optax.MaskedNode)
  assert clipped["py"] == 6 and clipped["a"].dtype == jnp.float32
  assert norm.dtype == (jnp.float64 if x64 else jnp.float32)


@pytest.mark.one_version
@pytest.mark.parametrize(
  ("magnitude", "max_norm"),
  cases(itertools.product([0.0, 1e-30, 1.0, 1e30], [0.0, 1.0, math.inf]), lambda case: case[1] != 1.0 and case[0] > 0),
)
def test_no_nan_on_the_way_without_jit(magnitude, max_norm):
  # Every operation is looked at, not what comes out alone; leaves of every width, and with an entry 0.
  def total(leaves, p):
    return sum(jnp.sum(x.real.astype(jnp.float32)) for x in clipjax.clip_grad_norm(leaves, max_norm, p)[0])

  with jax.enable_x64(True), jax.disable_jit(), jax.debug_nans(True):
    leaves = [jnp.array([magnitude, 0.0], dtype) for dtype in ("float32", "float64", "bfloat16", "complex64")]
    for p in (0.5, 2.0, 3.0, math.inf):
      assert all(np.isfinite(np.asarray(x, np.complex128)).all() for x in jax.grad(total)(leaves, p))


def test_eager_call_does_not_trace_again():
  grads = random_leaves(3, seed=5)
  clipjax.clip_grad_norm(grads, 1.25)
  before = functional._clip._cache_size()
  clipjax.clip_grad_norm(grads, 2.5)
  assert functional._clip._cache_size() == before


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e5m2"])
def test_clip_by_value_is_elementwise(dtype):
  x = jnp.asarray([0.5, -0.5, 1.0, -3.0, jnp.inf, -jnp.inf, 0.0, jnp.nan], dtype)
  got = clipjax.clip_grad_value({"x": x}, 1.0)["x"]
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(np.asarray(got, np.float32), [0.5, -0.5, 1, -1, 1, -1, 0, np.nan])
  assert_bits_equal(clipjax.clip_grad_value(x[:4], 3.0), x[:4])


@pytest.mark.parametrize("bound", [1e9, math.inf])
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_a_bound_above_the_dtype_clips_nothing(dtype, bound):
  x = jnp.asarray([0.5, -3.0, 100.0], dtype)
  assert_bits_equal(clipjax.clip_grad_value(x, bound), x)


ANOTHER_NAN = np.uint32(0x7FFFFFFF).view(np.float32)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 2.0**-9, 0.1, 1 / 3, 0.75, 0.999, 1.0, 2.0, -1e-3, ANOTHER_NAN])
def test_bfloat16_is_rounded_on_a_cpu_as_everywhere(factor):
  # Every bfloat16 there is; below 0 a factor is that of an entry which is shrunk first, above 1 nothing changes.
  every = jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), jnp.bfloat16)

  @jax.jit
  def rounded(factor):
    """The bits of both, with one NaN for all, and the product in float32."""
    both = scaling._rounded_by_hand(every, factor), scaling._rounded(every, factor)
    bits = [jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(y), jnp.nan, y), jnp.uint16) for y in both]
    return *bits, scaling._product(every, factor)

  by_hand, plain, wide = map(np.asarray, rounded(np.float32(factor)))
  np.testing.assert_array_equal(by_hand, plain)
  if factor <= 1:  # Against arithmetic in float64: to the nearest, a tie to the even one.
    normal = np.isfinite(wide) & (np.abs(wide) > 1e-37)
    steps = wide[normal].view(np.uint32).astype(np.float64) / 2**16
    np.testing.assert_array_equal(by_hand[normal], np.round(steps).astype(np.uint32))


@pytest.mark.one_version
@pytest.mark.parametrize("max_norm", [1e-37, 3e-38, 1e-31, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize("norm", [5.0, 5e30, 1.5e38])
def test_a_limit_far_below_the_norm_is_met(norm, max_norm, x64):
  """Their quotient is up to 1e75, far beyond float32."""
  grads = {"w": jnp.array([0.6, 0.8], jnp.float32) * jnp.float32(norm), "b": jnp.zeros(2, jnp.float32)}
  limit = min(max_norm, 0.5 * norm)
  want = {"w": np.array([0.6, 0.8]) * limit, "b": np.zeros(2)}
  clipped, measured = jax.jit(lambda g: clipjax.clip_grad_norm(g, limit))(grads)
  np.testing.assert_allclose(measured, norm, rtol=1e-6)
  # Entries near the least normal float32 keep fewer digits where they are flushed to subnormal steps.
  assert_close(clipped, want)
  for make, share in (
    (clipjax.clip_by_global_norm, 1),
    (clipjax.clip_by_leaf_norm, 1),
    (clipjax.clip_by_block_rms, math.sqrt(0.5)),
  ):
    updates, state = first_step(make(limit * share), grads)
    assert_close(updates, want)
    np.testing.assert_allclose([state.norm_clipped, clipjax.global_norm(updates)], limit, rtol=1e-6)
