"""What torch's own tests ask of its clips, asked of torch and of this package with the same numbers.

`clip_grad_norm_` is `clip_grad_norm(..., eps=1e-6)`. Skipped where torch is not installed; where the two differ on
purpose is in docs/hardening.md, which `test_deviations.py` runs.
"""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import clipjax

torch = pytest.importorskip("torch")

ORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf]
TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


def gradients(*shapes, seed=0, scale=3.0):
  rng = np.random.default_rng(seed)
  return [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


def tensor(x):
  if x.dtype == ml_dtypes.bfloat16:
    return torch.tensor(x.astype(np.float32)).to(torch.bfloat16)
  return torch.tensor(x)


def parameters(grads):
  """Parameters with these gradients, None for one without."""
  out = []
  for x in grads:
    t = torch.zeros(2) if x is None else tensor(x)
    parameter = torch.nn.Parameter(torch.zeros_like(t))
    parameter.grad = None if x is None else t
    out.append(parameter)
  return out


def after(params):
  return [None if p.grad is None else p.grad.double().numpy() for p in params]


def assert_close(got, want, dtype="float32"):
  for a, b in zip(got, want, strict=True):
    assert (a is None) == (b is None)
    if a is not None:
      np.testing.assert_allclose(np.asarray(a).astype(np.float64), b, rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 2.0, 1e6])
def test_clip_of_every_order(p, max_norm, foreach):
  grads = gradients((10, 10), (1,), (3, 4, 5), ())
  params = parameters(grads)
  norm = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type=p, foreach=foreach)
  clipped, ours = clipjax.clip_grad_norm(grads, max_norm, p, eps=1e-6)
  np.testing.assert_allclose(ours, norm.item(), rtol=2e-6)
  assert_close(clipped, after(params))
  # One factor for all entries: the direction is kept.
  if 0 < max_norm < norm.item():
    ratios = np.concatenate([np.ravel(c / g) for c, g in zip(clipped, grads, strict=True)])
    np.testing.assert_allclose(ratios, ratios[0], rtol=2e-6)
    assert clipjax.global_norm(clipped, p) <= max_norm * (1 + 1e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_a_small_gradient_is_left_alone(p):
  grads = gradients((4, 4), (7,), scale=1e-3)
  params = parameters(grads)
  torch.nn.utils.clip_grad_norm_(params, 1e3, norm_type=p)
  clipped, _ = clipjax.clip_grad_norm(grads, 1e3, p, eps=1e-6)
  for ours, theirs, given in zip(clipped, params, grads, strict=True):
    assert np.array_equal(ours, given) and np.array_equal(theirs.grad.numpy(), given)


@pytest.mark.parametrize("p", ORDERS)
def test_a_norm_about_as_small_as_what_is_added_to_it(p):
  grads = gradients((4, 4), (7,), scale=1e-6)
  params = parameters(grads)
  torch.nn.utils.clip_grad_norm_(params, 1e-7, norm_type=p)
  clipped, _ = clipjax.clip_grad_norm(grads, 1e-7, p, eps=1e-6)
  assert_close(clipped, after(params))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_error_if_nonfinite(p, bad, place, foreach):
  grads = gradients((4,), (5,))
  grads[place[0]][place[1]] = bad
  params = parameters(grads)
  with pytest.raises(RuntimeError, match="non-finite"):
    torch.nn.utils.clip_grad_norm_(params, 1.0, norm_type=p, error_if_nonfinite=True, foreach=foreach)
  with pytest.raises(FloatingPointError, match=f"not finite .* in '{place[0]}'"):
    clipjax.clip_grad_norm(grads, 1.0, p, on_nonfinite="error")
  for before, parameter in zip(grads, params, strict=True):  # Neither has touched anything.
    assert np.array_equal(parameter.grad.numpy(), before, equal_nan=True)
  norm = torch.nn.utils.clip_grad_norm_(parameters(grads), 1.0, norm_type=p, foreach=foreach)
  _, ours = clipjax.clip_grad_norm(grads, 1.0, p)
  np.testing.assert_array_equal(ours, norm.item())  # inf stays inf, NaN stays NaN.


@pytest.mark.parametrize("p", ORDERS)
def test_a_finite_gradient_raises_nothing(p):
  grads = gradients((4,), (5,))
  theirs = torch.nn.utils.clip_grad_norm_(parameters(grads), 1.0, norm_type=p, error_if_nonfinite=True)
  _, ours = clipjax.clip_grad_norm(grads, 1.0, p, on_nonfinite="error")
  np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "bfloat16", "float32"), ("bfloat16",)])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_mixed_dtypes(dtypes, p):
  grads = [x.astype(jnp.dtype(d)) for x, d in zip(gradients((3, 4), (5,), (2, 2)), dtypes, strict=False)]
  params = parameters(grads)
  norm = torch.nn.utils.clip_grad_norm_(params, 1.0, norm_type=p)
  clipped, ours = clipjax.clip_grad_norm(grads, 1.0, p, eps=1e-6)
  widest = min(dtypes, key=TOLERANCE.get)
  narrowest = max(dtypes, key=TOLERANCE.get)
  assert [c.dtype.name for c in clipped] == [str(t.grad.dtype).removeprefix("torch.") for t in params] == list(dtypes)
  np.testing.assert_allclose(float(ours), norm.item(), rtol=TOLERANCE[narrowest], err_msg=widest)
  assert_close(clipped, after(params), narrowest)


def test_float64():
  with jax.enable_x64(True):
    grads = [x.astype(np.float64) for x in gradients((3, 4), (5,))]
    params = parameters(grads)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    clipped, ours = clipjax.clip_grad_norm(grads, 1.0, eps=1e-6)
    np.testing.assert_allclose(ours, norm.item(), rtol=1e-14)
    for a, b in zip(clipped, after(params), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize("p", [0.5, 2.0, math.inf])
def test_a_single_tensor_is_a_tree_too(p):
  (grad,) = gradients((6,))
  one, many = parameters([grad])[0], parameters([grad])
  norms = [torch.nn.utils.clip_grad_norm_(x, 0.5, norm_type=p).item() for x in (one, many)]
  bare, norm = clipjax.clip_grad_norm(grad, 0.5, p, eps=1e-6)
  (listed,), listed_norm = clipjax.clip_grad_norm([grad], 0.5, p, eps=1e-6)
  assert norms[0] == norms[1] and norm == listed_norm
  np.testing.assert_allclose(norm, norms[0], rtol=1e-6)
  assert np.array_equal(bare, listed)
  assert_close([bare], after([one]))


@pytest.mark.parametrize("foreach", [None, False, True])
def test_nothing_to_clip_has_norm_0(foreach):
  assert torch.nn.utils.clip_grad_norm_([], 1.0, foreach=foreach).item() == 0
  assert torch.nn.utils.get_total_norm([], foreach=foreach).item() == 0
  for nothing in ([], {}, None, [None], {"a": (None, [])}):
    clipped, norm = clipjax.clip_grad_norm(nothing, 1.0)
    assert (norm, clipjax.global_norm(nothing)) == (0, 0)
    assert clipped == nothing
  assert torch.nn.utils.clip_grad_norm_(parameters([None, None]), 1.0, foreach=foreach).item() == 0


def test_parameters_without_a_gradient_are_passed_over():
  grads = gradients((3,), (4,))
  grads.insert(1, None)
  params = parameters(grads)
  norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
  clipped, ours = clipjax.clip_grad_norm(grads, 0.5, eps=1e-6)
  np.testing.assert_allclose(ours, norm.item(), rtol=1e-6)
  assert clipped[1] is None
  assert_close(clipped, after(params))
  params = parameters(grads)
  torch.nn.utils.clip_grad_value_(params, 0.5)
  assert_close(clipjax.clip_grad_value(grads, 0.5), after(params))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_one_gradient_of_zeros(p):
  grads = [*gradients((3,)), np.zeros(4, np.float32)]
  params = parameters(grads)
  norm = torch.nn.utils.clip_grad_norm_(params, 0.5, norm_type=p)
  clipped, ours = clipjax.clip_grad_norm(grads, 0.5, p, eps=1e-6)
  np.testing.assert_allclose(ours, norm.item(), rtol=1e-6)
  assert not np.any(clipped[1])
  assert_close(clipped, after(params))
  params = parameters([np.zeros(4, np.float32)])
  assert torch.nn.utils.clip_grad_norm_(params, 0.5, norm_type=p).item() == 0
  clipped, ours = clipjax.clip_grad_norm(np.zeros(4, np.float32), 0.5, p, eps=1e-6)
  assert ours == 0 and not np.any(clipped)


@pytest.mark.parametrize("p", [*ORDERS, -math.inf])
@pytest.mark.parametrize("foreach", [False, True])
def test_total_norm(p, foreach):
  grads = gradients((10, 3), (7,), ())
  want = torch.nn.utils.get_total_norm(map(tensor, grads), norm_type=p, foreach=foreach).item()
  np.testing.assert_allclose(clipjax.global_norm(grads, p), want, rtol=2e-6)
  whole = torch.linalg.vector_norm(torch.cat([tensor(g).ravel() for g in grads]), p).item()
  np.testing.assert_allclose(clipjax.global_norm(grads, p), whole, rtol=2e-6)
  by_leaf = [torch.linalg.vector_norm(tensor(g), p).item() for g in grads]
  np.testing.assert_allclose(clipjax.leaf_norms(grads, p), by_leaf, rtol=2e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_total_norm_that_is_not_finite(bad):
  grads = [*gradients((3,)), np.array([1.0, bad], np.float32)]
  np.testing.assert_array_equal(clipjax.global_norm(grads), torch.nn.utils.get_total_norm(map(tensor, grads)).item())
  with pytest.raises(RuntimeError, match="non-finite"):
    torch.nn.utils.get_total_norm(map(tensor, grads), error_if_nonfinite=True)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("norm", [0.0, 0.25, 7.0, math.nan])
def test_a_norm_that_is_given(norm, foreach):
  grads = gradients((4,), (2, 2))
  params = parameters(grads)
  torch.nn.utils.clip_grads_with_norm_(params, 0.5, torch.tensor(norm), foreach=foreach)
  clipped, same = clipjax.clip_grad_norm(grads, 0.5, norm=norm, eps=1e-6)
  np.testing.assert_array_equal(same, np.float32(norm))
  assert_close(clipped, after(params))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_norm_and_clip_apart_are_the_two_together(p):
  grads = gradients((4,), (2, 2))
  params = parameters(grads)
  total = torch.nn.utils.get_total_norm([t.grad for t in params], norm_type=p)
  torch.nn.utils.clip_grads_with_norm_(params, 0.5, total)
  together, _ = clipjax.clip_grad_norm(grads, 0.5, p, eps=1e-6)
  apart, _ = clipjax.clip_grad_norm(grads, 0.5, norm=clipjax.global_norm(grads, p), eps=1e-6)
  assert_close(together, after(params))
  for a, b in zip(apart, together, strict=True):
    assert np.array_equal(a, b)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("bound", [0.0, 0.3, 2.5, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_clip_by_value(bound, dtype, foreach):
  grads = [x.astype(jnp.dtype(dtype)) for x in gradients((10, 10), (3,), ())]
  grads[1][:] = [math.inf, -math.inf, math.nan]
  params = parameters(grads)
  torch.nn.utils.clip_grad_value_(params, bound, foreach=foreach)
  clipped = clipjax.clip_grad_value(grads, bound)
  for a, b in zip(clipped, after(params), strict=True):
    np.testing.assert_allclose(np.asarray(a).astype(np.float64), b, rtol=TOLERANCE[dtype] if bound else 0)


def test_clip_by_value_of_one_tensor():
  (grad,) = gradients((6,))
  (parameter,) = parameters([grad])
  torch.nn.utils.clip_grad_value_(parameter, 0.5)
  assert np.array_equal(clipjax.clip_grad_value(grad, 0.5), parameter.grad.numpy())


def test_many_steps_of_sgd_are_those_of_torch():
  rng = np.random.default_rng(3)
  x, y = rng.standard_normal((16, 4)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
  w = np.zeros(4, np.float32)
  parameter = torch.nn.Parameter(torch.zeros(4))
  optimizer = torch.optim.SGD([parameter], 0.3)
  for _ in range(20):
    optimizer.zero_grad()
    loss = torch.mean((torch.tensor(x) @ parameter - torch.tensor(y)) ** 2)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 0.4)
    optimizer.step()
    clipped, ours = clipjax.clip_grad_norm(2 * x.T @ (x @ w - y) / 16, 0.4, eps=1e-6)
    np.testing.assert_allclose(ours, norm.item(), rtol=1e-4)
    w = w - 0.3 * np.asarray(clipped)
  np.testing.assert_allclose(w, parameter.detach().numpy(), rtol=1e-4)
