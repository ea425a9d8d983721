"""Norms against the float64 oracle, one test for each hazard."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import DTYPES, assert_close, cases, conditionals, first_step, oracle_clip, oracle_norm, random_leaves

import clipjax
from clipjax import arithmetic, cpu_branch
from clipjax.norms import sums
from clipjax.norms.sums import NormSpec, measure_on

ORDERS = (0.9, 1.0, 1.5, 2.0, 3.0, 7.3, math.inf)
COUNTS = (0.0, -math.inf)  # Of which a norm can be taken, but not a clip.


@pytest.mark.parametrize(
  "count", [1, 4, pytest.param(200, marks=pytest.mark.one_version), pytest.param(700, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_of_magnitudes_dtypes_and_leaf_counts(dtype, count):
  norm = jax.jit(clipjax.global_norm)
  low, high = {"float32": (-34, 34), "bfloat16": (-34, 34), "float16": (-6, 5)}[dtype]
  for exponent in range(low, high):
    leaves = random_leaves(count, dtype, 10.0**exponent)
    assert np.isfinite(oracle_norm(leaves))
    np.testing.assert_allclose(norm(leaves), oracle_norm(leaves), rtol=1e-6, err_msg=f"1e{exponent}")


@pytest.mark.one_version
@pytest.mark.parametrize("p", [*ORDERS, *COUNTS])
@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e-10, 1.0, 1e10, 1e24, 1e30, 1e37])
def test_every_order_at_every_magnitude(p, magnitude):
  leaves = random_leaves(5, magnitude=magnitude)
  # 1e-37 brings entries below the smallest normal float32, which XLA on CPU reads as zero.
  leaves = [jnp.where(jnp.abs(x) < 1.2e-38, 1.2e-38, x) for x in leaves]
  for tree in (leaves, {"z": jax.lax.complex(leaves[1], leaves[1][::-1]), "x": leaves[0]}):
    want = oracle_norm(tree, p)
    np.testing.assert_allclose(clipjax.global_norm(tree, p), math.inf if want > 3.4e38 else want, rtol=1e-6)


@pytest.mark.one_version
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("count", [7, 40])
def test_one_extreme_leaf_among_many_has_a_scale_of_its_own(p, count):
  # With more leaves than the second pass has parts, leaves of different magnitudes share one.
  leaves = [jnp.full((3,), 0.5) for _ in range(count)]
  for i, magnitude in ((0, 1e30), (3, 0.0), (5, 1e-25), (count - 1, 1e-30)):
    leaves[i] = jnp.full((3,), magnitude)
  np.testing.assert_allclose(clipjax.leaf_norms(leaves, p), [oracle_norm(x, p) for x in leaves], rtol=1e-6)


@pytest.mark.one_version
@pytest.mark.parametrize("count", [600, pytest.param(3000, marks=pytest.mark.slow)])
def test_many_scalars_in_bfloat16(count):
  # Of more than 256 ones, their sum in bfloat16 is 256.
  np.testing.assert_allclose(clipjax.global_norm([jnp.ones(1, jnp.bfloat16)] * count), math.sqrt(count), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"])
def test_float8_leaves(dtype):
  x = jnp.asarray([0.5, -2.0, 0.0, 3.0], dtype)
  np.testing.assert_allclose(clipjax.global_norm(x), oracle_norm(np.asarray(x, np.float32)), rtol=1e-6)
  assert np.isnan(clipjax.global_norm(jnp.asarray([1.0, jnp.nan], dtype)))


@pytest.mark.parametrize("tree", [{}, [], None, {"a": jnp.zeros((0, 3))}, jnp.zeros(4), (None, optax.MaskedNode())])
def test_nothing_and_zero_have_norm_zero_in_the_dtype_of_norms(tree, x64):
  for p in ORDERS:
    for norm in (clipjax.global_norm(tree, p), *jax.tree.leaves(clipjax.leaf_norms(tree, p))):
      assert norm == 0 and norm.dtype == (jnp.float64 if x64 else jnp.float32)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_nonfinite_entries(p, bad):
  tree = {"a": jnp.array([1.0, bad]), "b": jnp.ones(3)}
  want = math.nan if math.isnan(bad) else math.inf
  np.testing.assert_equal(float(clipjax.global_norm(tree, p)), want)
  norms = clipjax.leaf_norms(tree, p)
  np.testing.assert_equal(float(norms["a"]), want)
  np.testing.assert_allclose(norms["b"], oracle_norm(tree["b"], p), rtol=1e-6)


@pytest.mark.one_version
@pytest.mark.parametrize("p", [*ORDERS, *COUNTS])
def test_float64_leaves_at_their_own_range_and_beside_float32(p):
  pairs = ((1e-30, 1e-30), (1e30, 1e30), (1e-30, 1e-200), (1e30, 1e200), (0.0, 1e-100), (1.0, math.inf))
  with jax.enable_x64(True):
    for magnitude in (1e-300, 1e-60, 1.0, 1e200):
      alone = [jnp.asarray(np.random.default_rng(0).standard_normal(30) * magnitude), jnp.zeros(0)]
      np.testing.assert_allclose(clipjax.global_norm(alone, p), oracle_norm(alone, p), rtol=1e-13)
    for small, large in pairs:
      leaves = [jnp.full(5, small, jnp.float32), jnp.full(7, large, jnp.float64)]
      np.testing.assert_allclose(clipjax.global_norm(leaves, p), oracle_norm(leaves, p), rtol=1e-6)
      assert np.isnan(clipjax.global_norm([*leaves, jnp.full(2, math.nan)], p)) or p == 0


@pytest.mark.one_version
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25, 1e37])  # Norms up to 3e38.
def test_derivatives_are_those_of_the_formula(p, magnitude):
  x = jnp.array([3.0, -4.0, 1.0]) * magnitude
  wide = np.asarray(x, np.float64)
  n = oracle_norm(x, p)
  want = np.sign(wide) * (np.abs(wide) == n if p == math.inf else (np.abs(wide) / n) ** (p - 1))
  np.testing.assert_allclose(jax.grad(clipjax.global_norm)(x, p), want, rtol=1e-5)
  np.testing.assert_allclose(jax.jacfwd(clipjax.global_norm)(x, p), want, rtol=1e-5)
  np.testing.assert_allclose(jax.grad(lambda x: clipjax.leaf_norms([x, 0.5 * x], p)[1])(x), 0.5 * want, rtol=1e-5)


def norm_beside_norms_of_leaves(tree, p):
  """The global norm, measured together with the norm of each leaf."""
  return clipjax.metrics(first_step(clipjax.clip_by_leaf_norm(1.0, p), tree)[1])["grad/norm"]


# Orders, leaves, and the derivative of their norm where the formula has none.
CORNERS = {
  "a count": ((0,), {"a": [3.0, 0.0], "z": [1 + 2j]}, {"a": [0, 0], "z": [0]}),
  "one largest entry": ((math.inf,), {"a": [3.0], "b": [-1.0]}, {"a": [1], "b": [0]}),
  "a tie within a leaf": ((math.inf,), [[2.0, -2.0, 1.0]], [[0.5, -0.5, 0]]),
  "a tie of leaves": ((math.inf,), {"a": [3.0, -5.0], "b": [5.0, 1.0]}, {"a": [0, -0.5], "b": [0.5, 0]}),
  "a zero entry": ((0.5, 1.0, 1.5, 3.0), [[0.0, 3.0]], [[0, 1]]),  # For p < 1 that of |x|^p is infinite.
  "a complex zero": ((0.5, 1.0, 2.0, 3.0, math.inf), [[3 + 4j, 0j]], [[0.6 - 0.8j, 0]]),
  "an entry too small to count": ((1.5, 3.0), [[1e-30, 1e30]], [[0, 1]]),
  "nothing but zeros": (
    (0.5, 1.0, 2.0, 3.0, math.inf),
    {"a": [0.0, 0.0], "b": [0.0], "c": []},
    {"a": [0, 0], "b": [0], "c": []},
  ),
}


@pytest.mark.one_version
@pytest.mark.parametrize("case", CORNERS)
def test_derivatives_where_the_formula_has_none(case):
  orders, tree, want = CORNERS[case]
  is_leaf = lambda x: isinstance(x, list) and not (x and isinstance(x[0], list))  # noqa: E731
  tree, want = (jax.tree.map(jnp.asarray, t, is_leaf=is_leaf) for t in (tree, want))
  for p in orders:
    for norm in (clipjax.global_norm, norm_beside_norms_of_leaves)[: 1 if p == 0 else 2]:
      assert_close(jax.grad(norm)(tree, p), want, 1e-6, 1e-25)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_complex_derivative_agrees_with_jax(p):
  z = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)) @ np.array([1, 1j]), jnp.complex64)
  want = jax.grad(lambda z: jnp.sum(jnp.abs(z) ** p) ** (1 / p))(z)
  np.testing.assert_allclose(jax.grad(clipjax.global_norm)(z, p), want, rtol=1e-5)


@pytest.mark.one_version
@pytest.mark.parametrize("magnitude", cases([0.0, 1e-30, 1.0, 1e30], {1.0}))
def test_no_nan_on_the_way_without_jit(magnitude):
  # Every operation is looked at, not what comes out alone; leaves of every width, and with an entry 0.
  with jax.enable_x64(True), jax.disable_jit(), jax.debug_nans(True):
    leaves = [jnp.array([magnitude, 0.0], dtype) for dtype in ("float32", "float64", "complex64")]
    for p in (*ORDERS, *COUNTS):
      norm, grad = jax.value_and_grad(clipjax.global_norm)(leaves, p)
      assert np.isfinite(norm) and all(np.isfinite(x).all() for x in grad)
      assert all(np.isfinite(n) for n in clipjax.leaf_norms(leaves, p))


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("axis_name", ["i", {"split": "i", "whole": ()}])
def test_over_a_named_axis_of_vmap_it_is_the_norm_of_all(axis_name, magnitude, p):
  batch = jnp.arange(12.0).reshape(4, 3) * magnitude
  whole = None if axis_name == "i" else jnp.array([2.0, 3.0]) * magnitude  # The same in every place of the axis.
  norm = lambda x: clipjax.global_norm({"split": x, "whole": whole}, p, axis_name=axis_name)  # noqa: E731
  norms = jax.vmap(norm, axis_name="i")(batch)
  np.testing.assert_allclose(norms, np.full(4, oracle_norm([batch, whole], p)), rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e25, 1e-25])
def test_many_small_leaves_of_few_kinds_in_the_second_pass(magnitude):
  rng = np.random.default_rng(0)

  def leaves(count, shape, dtype):
    return [jnp.asarray(rng.standard_normal(shape) * magnitude, dtype) for _ in range(count)]

  spun = [
    jax.lax.complex(x, y) for x, y in zip(leaves(9, (3, 2), "float32"), leaves(9, (3, 2), "float32"), strict=True)
  ]
  tree = [*leaves(20, (5,), "float32"), *spun, *leaves(11, (5,), "bfloat16"), *leaves(2, (70_000,), "float32")]
  np.testing.assert_allclose(clipjax.global_norm(tree), oracle_norm(tree), rtol=1e-6)
  shuffled = [tree[i] for i in rng.permutation(len(tree))]
  np.testing.assert_allclose(jax.jit(clipjax.global_norm)(shuffled), oracle_norm(tree), rtol=1e-6)
  assert np.isnan(clipjax.global_norm([*tree, jnp.full(5, jnp.nan)]))


def test_large_leaves_on_cpu_are_read_once_unless_their_sum_leaves_its_range(monkeypatch):
  monkeypatch.setattr(sums, "SMALL", 4)
  monkeypatch.setattr(sums, "_again", lambda kind, *_: [jnp.full((), -1.0) for _ in kind.blocks])
  leaves = [jnp.ones(8)] * 100

  def norms(leaves, by_leaf):
    blocks = tuple((i,) for i in range(100)) if by_leaf else (tuple(range(100)),)
    return np.asarray(measure_on("cpu", NormSpec(2.0, blocks, ((),) * len(leaves)), leaves).norms)

  assert (norms(leaves, by_leaf=False) > 0).all()
  assert (norms(leaves, by_leaf=True) > 0).all()
  with_a_zero = [jnp.zeros(8), *leaves[1:]]
  assert (norms(with_a_zero, by_leaf=False) > 0).all()
  assert 1 <= (norms(with_a_zero, by_leaf=True) < 0).sum() <= 8
  assert norms([1e25 * x for x in leaves], by_leaf=False) == -1
  monkeypatch.setattr(sums, "SMALL", 8)
  assert (norms([1e25 * x for x in with_a_zero], by_leaf=True) >= 0).all()


# What a GPU reduces as a tree a CPU adds entry by entry; `tests/test_accelerators.py` looks at the tree.
RTOL = {"cpu": 1e-6, "tpu": 1e-6, "gpu": 1e-3}
if jax.__version_info__ < (0, 9):  # There XLA on CPU adds less carefully.
  RTOL = {"cpu": 2e-6, "tpu": 1e-5, "gpu": 1e-3}
PLATFORMS = tuple(RTOL)
MAGNITUDES = (1e-36, 1e-30, 1e-19, 1e-4, 1.0, 1e4, 1e19, 1e30, 3e36)


def program_on(platform, count, p=2.0, by_leaf=False):
  """What one platform is made to compute of `count` leaves, to be run here."""
  blocks = tuple((i,) for i in range(count)) if by_leaf else (tuple(range(count)),)
  return jax.jit(lambda xs: measure_on(platform, NormSpec(p, blocks, ((),) * count), xs))


def norms_on(platform, leaves, p=2.0, by_leaf=False):
  return program_on(platform, len(leaves), p, by_leaf)(leaves)


def is_much_like_another(case):
  """A GPU sums what is no square as a TPU does, and in other orders than 2 and inf one dtype is like another."""
  platform, dtype, p = case
  return p != 2 and (platform == "gpu" or (dtype != "float32" and p != math.inf))


@pytest.mark.one_version
@pytest.mark.parametrize(
  ("platform", "dtype", "p"),
  cases(itertools.product(PLATFORMS, [*DTYPES, "complex64"], [2.0, 1.0, math.inf, 0.5, 3.0]), is_much_like_another),
)
def test_every_platform_has_the_norms_of_the_oracle(platform, dtype, p):
  rng = np.random.default_rng(0)
  shapes = ((7, 5), (64,), (300, 300), ())
  whole, by_leaf = (program_on(platform, len(shapes), p, by_leaf) for by_leaf in (False, True))
  for magnitude in (1e-3, 1.0, 1e3) if dtype == "float16" else MAGNITUDES:
    entries = [np.sign(x) * (np.abs(x) + 0.1) for x in map(rng.standard_normal, shapes)]
    leaves = [jnp.asarray((x * magnitude).astype(jnp.dtype(dtype))) for x in entries]
    want = oracle_norm(leaves, p)
    if want < 3e38:
      np.testing.assert_allclose(whole(leaves).norms[0], want, rtol=RTOL[platform])
    for x, norm in zip(leaves, by_leaf(leaves).norms, strict=True):
      if oracle_norm([x], p) < 3e38:
        np.testing.assert_allclose(norm, oracle_norm([x], p), rtol=RTOL[platform])


@pytest.mark.one_version
@pytest.mark.parametrize("size", [4, 90_000])
@pytest.mark.parametrize(
  ("platform", "p"),
  cases(itertools.product(PLATFORMS, [0.5, 1.0, 2.0, 3.0]), slow=lambda case: case[0] == "gpu" and case[1] != 2),
)
def test_with_x64_the_norm_of_float32_leaves_may_be_above_float32(platform, size, p):
  with jax.enable_x64(True):
    leaves = [jnp.full(size, 3e38, jnp.float32), jnp.zeros(3, jnp.float32)]
    want = float(np.float32(3e38)) * size ** (1 / p)
    np.testing.assert_allclose(norms_on(platform, leaves, p).norms[0], want, rtol=RTOL[platform])
    np.testing.assert_allclose(norms_on(platform, leaves, p, by_leaf=True).vector, [want, 0], rtol=RTOL[platform])


@pytest.mark.one_version
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_keeps_leaves_of_other_magnitudes_apart(platform):
  leaves = [jnp.full((300, 300), m, jnp.float32) for m in (1e-30, 1e30, 0.0, 1.0)] + [jnp.full(3, 1e-25), jnp.zeros(0)]
  got = norms_on(platform, leaves, by_leaf=True)
  np.testing.assert_allclose(got.norms, [oracle_norm([x]) for x in leaves], rtol=RTOL[platform])
  np.testing.assert_array_equal(got.vector, got.norms)
  assert got.first_bad == -1


@pytest.mark.one_version
@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("size", [3, 70_000])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_names_the_first_nan_and_without_one_the_first_inf(platform, size, by_leaf):
  fine, inf, nan = (jnp.full(size, 1.0).at[0].set(x) for x in (2.0, jnp.inf, jnp.nan))
  for leaves, first in ([[fine, inf, inf], 1], [[fine, inf, nan], 2], [[nan, inf, nan], 0], [[fine, fine], -1]):
    assert norms_on(platform, leaves, by_leaf=by_leaf).first_bad == first


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("size", [10**7, 10**8])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_platform_is_right_for_many_entries(platform, size, magnitude):
  for shape in ((size,), (size // 1000, 1000)):
    x = jnp.full(shape, magnitude, jnp.float32)
    np.testing.assert_allclose(norms_on(platform, [x]).norms[0], magnitude * math.sqrt(size), rtol=1e-6)


def test_chunks_cover_every_block_once():
  sizes = [5, 7, 100, 1, 1, 1, 9, 1, 300, 2] + [1] * 50
  assert [b for run in cpu_branch.chunks(sizes) for b in run] == list(range(len(sizes)))
  assert 12 <= len(cpu_branch.chunks([1] * 1000)) <= 20


def test_numpy_python_and_float0_leaves():
  tree = {"np": np.array([3.0], np.float32), "py": 4.0, "f0": np.zeros(2, jax.dtypes.float0)}
  assert clipjax.global_norm(tree) == 5
  assert clipjax.leaf_norms(tree) == {"np": 3.0, "py": 4.0, "f0": 0.0}


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("count", [1, 20])
def test_a_batch_of_some_leaves_is_measured_beside_the_others(count, p):
  # Each leaf is a part of the second pass of its own, or, of 40, shares one with a leaf of the other kind.
  rng = np.random.default_rng(0)
  xs = [jnp.asarray(rng.standard_normal((4, 3)) * 10.0 ** rng.uniform(-30, 30), jnp.float32) for _ in range(count)]
  rest = [jnp.full((3,), 10.0**k, jnp.float32) for k in range(-30, 30, 60 // count)]
  mixed = lambda xs: [leaf for pair in zip(xs, rest, strict=True) for leaf in pair]  # noqa: E731
  got = jax.vmap(lambda xs: clipjax.leaf_norms(mixed(xs), p))(xs)
  want = [[oracle_norm(x, p) for x in mixed([x[i] for x in xs])] for i in range(4)]
  np.testing.assert_allclose(np.transpose([np.broadcast_to(n, 4) for n in got]), want, rtol=1e-6)


@pytest.mark.parametrize("ord", [0, 0.5, 1, math.inf, -math.inf])
def test_where_a_sum_leaves_its_range_only_with_the_norm_there_is_no_second_pass(ord):
  x = jnp.ones(70_000)
  assert conditionals(jax.make_jaxpr(lambda x: clipjax.global_norm(x, ord))(x).jaxpr, "cpu") == 0
  assert conditionals(jax.make_jaxpr(lambda x: clipjax.global_norm(x, 2))(x).jaxpr, "cpu") == 1


@pytest.mark.one_version
@pytest.mark.parametrize("n", [1e-30, 0.5, 3.0, 1e19, 5e37])  # 1 / n is a normal number.
def test_a_quotient_and_its_derivatives_up_to_the_third(n):
  # In n itself, in units of n: x / n, -x / n, 2 x / n, -6 x / n.
  fn, x = lambda s: arithmetic.quotient(jnp.float32(0.75 * n), n * s), jnp.float32(1.0)
  for want in (0.75, -0.75, 1.5, -4.5):
    np.testing.assert_allclose(fn(x), want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(fn)(x), want, rtol=1e-6)
    fn = jax.grad(fn)


@pytest.mark.parametrize("n", [1e-37, 1e-3, 2.0**64, 2.0**65, 1e30, 3e38])
def test_divide_is_right_for_every_normal_divisor(n):
  x = jnp.array([0.5 * n, -n, 0.0, n / 3 + 1j * n / 4])
  for got in (arithmetic.divide(x, jnp.float32(n)), jax.jit(arithmetic.divide)(x, jnp.float32(n))):
    np.testing.assert_allclose(got, np.array([0.5, -1, 0, 1 / 3 + 0.25j]), rtol=1e-6)
  # The derivative in x is 1 / n, which itself may be too small to be a number.
  for fn in (arithmetic.divide, arithmetic.quotient):
    _, change = jax.jvp(lambda x, fn=fn: fn(x, jnp.float32(n)), (x.real,), (jnp.full(4, 0.25 * n),))
    np.testing.assert_allclose(change, np.full(4, 0.25), rtol=1e-6)


@pytest.mark.parametrize("divisor", [2.0, 1e3, 1e10])
def test_small_numbers_and_tangents_survive_a_large_divisor(divisor):
  small, n = jnp.float32(1e-27), jnp.float32(divisor)
  _, change = jax.jvp(lambda x: arithmetic.quotient(x, n), (jnp.float32(1),), (small,))
  np.testing.assert_allclose([change, arithmetic.divide(small, n)], 1e-27 / divisor, rtol=1e-6)


@pytest.mark.one_version
def test_the_root_of_zero_has_the_derivatives_zero():
  np.testing.assert_array_equal(arithmetic.root_or_zero(jnp.array([0.0, 4.0])), [0.0, 2.0])
  with jax.debug_nans(True):
    for fn in (jax.grad(arithmetic.root_or_zero), jax.grad(jax.grad(arithmetic.root_or_zero))):
      assert fn(jnp.float32(0)) == 0
  assert jax.grad(arithmetic.root_or_zero)(jnp.float32(4)) == 0.25


@pytest.mark.one_version
@pytest.mark.parametrize("ord", cases([0.5, 1.5, 3.0], {1.5}))
def test_second_derivatives_at_zero_and_beside_it_are_no_nan(ord):
  def norm(parts):
    return clipjax.global_norm([parts[:2], jax.lax.complex(parts[2:4], parts[4:])], ord)

  small = 1e-30 if ord > 1 else 1e-10  # Below, that of the order 0.5 is no number: it grows as x^-1.5.
  for x in (jnp.zeros(6), jnp.array([0.0, 2.0, 0.0, 1.0, 0.0, 3.0]), jnp.array([small, 2.0, small, 1.0, 0.0, 3.0])):
    for outer in (jax.jacfwd, jax.jacrev):
      assert np.isfinite(outer(jax.jacrev(norm))(x)).all()


@pytest.mark.one_version
@pytest.mark.parametrize("p", cases([1.0, 2.0, math.inf, -math.inf, 0.5, 3.0], {1.0, -math.inf, 0.5}))
def test_with_x64_a_norm_of_32_bit_leaves_may_be_above_the_largest_float32(p):
  leaves = {"complex": np.array([3e38 + 3e38j, 1e38], np.complex64), "float": np.full(8, 3e38, np.float32)}

  def clip(grads):
    return clipjax.clip_grad_norm(grads, 1.0, p)[0]

  with jax.enable_x64(True):
    for grads in ({"complex": leaves["complex"]}, {"float": leaves["float"]}, leaves):
      want = oracle_norm(grads, p)
      norm, longer = jax.jvp(lambda g: clipjax.global_norm(g, p), (grads,), (grads,))
      np.testing.assert_allclose([norm, longer], want, rtol=1e-6)
      assert_close(clipjax.leaf_norms(grads, p), jax.tree.map(lambda x: oracle_norm(x, p), grads))
      if p > 0:
        clipped, change = jax.jvp(clip, (grads,), (grads,))
        assert_close(clipped, oracle_clip(grads, 1.0, p), 2e-6)
        assert_close(change, jax.tree.map(np.zeros_like, grads), 0, 1e-5)  # A longer one is clipped to the same.
        by_leaf = first_step(clipjax.clip_by_leaf_norm(1.0, p), grads)[0]
        assert_close(by_leaf, jax.tree.map(lambda x: oracle_clip(x, 1.0, p), grads), 2e-6)
