"""The clip cases of jax_privacy's tests, and sums of clipped examples, run in jax_privacy.

The release used here has no limits by layer yet, so each layer is clipped by a separate call.
"""

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from golden import Cases
from jax_privacy import clipping

ROOT = "https://github.com/google-deepmind/jax_privacy/blob/8967688c26d4/tests"
TREES, GRADIENTS = f"{ROOT}/clipping_test.py", f"{ROOT}/gradient_clipping_test.py"


def arrays(tree: Any) -> Any:
  """A tree of JAX arrays as NumPy arrays."""
  return jax.tree.map(np.asarray, tree)


def cases() -> Cases:
  """All of jax_privacy's cases."""
  out = Cases("jax_privacy", importlib.metadata.version("jax_privacy"))
  for part in (_trees, _broken_trees, _layers, _sums, _gradients, _pytrees):
    part(out)
  return out


def _tree(out: Cases, key: str, tree: Any, clip_norm: float, test: str, **options: Any) -> None:
  clipped, norm = clipping.clip_pytree(jax.tree.map(jnp.asarray, tree), clip_norm, **options)
  outputs = {"clipped": arrays(clipped), "norm": np.asarray(norm)}
  out.add("clip_pytree", tree, outputs, source=f"{TREES} {test}", key=key, clip_norm=clip_norm, **options)


def _trees(out: Cases) -> None:
  rng = np.random.default_rng(0)
  matrix = rng.standard_normal((5, 5)).astype(np.float32)
  mixed = {
    "a": rng.standard_normal(10).astype(np.float16),
    "b": rng.standard_normal((5, 5)).astype(np.float32),
    "c": np.asarray(rng.standard_normal(), ml_dtypes.bfloat16),
  }
  for key, tree in (("a matrix", matrix), ("three dtypes", mixed)):
    for clip_norm in (0.0, 1.0, 2.0, math.inf):
      _tree(out, key, tree, clip_norm, "test_clip_pytree_has_bounded_norm")
    norm = math.sqrt(sum(float(np.sum(x.astype(np.float64) ** 2)) for x in jax.tree.leaves(tree)))
    _tree(out, key, tree, 1.5 * norm, "test_clip_pytree_with_large_clip_norm")
    zeros = jax.tree.map(np.zeros_like, tree)
    for clip_norm in (0.0, 1.0, math.inf):
      _tree(out, f"zeros of {key}", zeros, clip_norm, "test_clip_pytree_zero_norm_pytree")
  _tree(out, "a matrix", matrix, 2.0, "test_clip_pytree_has_bounded_norm", rescale_to_unit_norm=True)
  pair = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([0.0, 4.0], np.float32)}
  for rescale in (False, True):
    _tree(out, "norm 5", pair, 0.0, "test_clip_pytree_clip_norm_zero_rescale", rescale_to_unit_norm=rescale)


def _broken_trees(out: Cases) -> None:
  for bad in (math.nan, math.inf, -math.inf):
    tree = np.array([3.0, 0.0, bad, 2.0], np.float32)
    for nan_safe in (True, False):
      _tree(
        out, f"with {bad}", tree, 1.0, "test_clip_pytree_non_finite_input_returns_non_finite_norm", nan_safe=nan_safe
      )


def _layers(out: Cases) -> None:
  def clip(key: str, tree: Any, limits: dict[str, float], test: str) -> None:
    each = {layer: clipping.clip_pytree(tree[layer], limit) for layer, limit in limits.items()}
    outputs = {
      "clipped": {layer: arrays(clipped) for layer, (clipped, _) in each.items()},
      "norms": {layer: np.asarray(norm) for layer, (_, norm) in each.items()},
    }
    out.add("clip_pytree, by layer", tree, outputs, source=f"{TREES} {test}", key=key, limits=limits)

  def row(*values: float) -> np.ndarray:
    return np.array(values, np.float32)

  pairs = {"a": row(3.0, 4.0), "b": row(0.0, 10.0)}
  clip("two leaves", pairs, {"a": 1.0, "b": 15.0}, "test_clip_pytree_per_layer_full_clip_norm_tree")
  zeros = {"layer1": {"w": row(0.0, 0.0), "b": row(0.0)}}
  clip("zeros of a layer", zeros, {"layer1": 2.0}, "test_clip_pytree_per_layer_zero_clip_norm_tree")
  layers = {"layer1": {"w": row(0.0, 3.0), "b": row(4.0)}, "layer2": {"w": row(0.0, 8.0), "b": row(6.0)}}
  limits = {"layer1": 2.0, "layer2": 5.0}
  clip("two layers", layers, limits, "test_clip_pytree_per_layer_prefix_clip_norm_tree")
  for key, tree, bounds, test in (
    ("two leaves thrice", pairs, {"a": 1.0, "b": 15.0}, "test_clip_per_layer_clipped_fun_full_norm_tree"),
    ("two layers thrice", layers, limits, "test_clip_per_layer_clipped_fun_prefix_norm_tree"),
  ):
    times = np.array([1.0, 2.0, 3.0], np.float32)
    grads = jax.tree.map(lambda x, t=times: t.reshape(3, *(1 for _ in x.shape)) * x, tree)
    sums, norms = {}, {}
    for layer, limit in bounds.items():
      sums[layer], norms[layer] = arrays(_summed(limit)(grads[layer]))
    outputs = {"sum": sums, "norms": norms}
    out.add("clipped_fun, by layer", grads, outputs, source=f"{TREES} {test}", key=key, limits=bounds)


def _summed(clip_norm: float) -> Callable[..., Any]:
  """The sum of clipped examples, and all their norms."""
  clipped_sum = clipping.clipped_fun(
    lambda x: x, batch_argnums=0, keep_batch_dim=False, l2_clip_norm=clip_norm, return_norms=True
  )

  def call(*args: Any, **given: Any) -> tuple[Any, Any]:
    total, beside = clipped_sum(*args, **given)
    return total, beside[-1] if isinstance(beside, tuple) else beside  # 2.0.0 returns (None, norms).

  return call


def _sum(out: Cases, key: str, grads: Any, clip_norm: float, where: str, *, padding: Any = None) -> None:
  given = {} if padding is None else {"is_padding_example": jnp.asarray(padding)}
  total, norms = _summed(clip_norm)(jax.tree.map(jnp.asarray, grads), **given)
  outputs = {"sum": arrays(total), "norms": np.asarray(norms)}
  out.add("clipped_fun", grads, outputs, source=where, key=key, l2_clip_norm=clip_norm, is_padding_example=padding)


def _sums(out: Cases) -> None:
  squares = np.array([1.0, 4.0, 9.0], np.float32)
  _sum(out, "three squares", squares, math.inf, f"{TREES} test_return_norms_without_aux_matches_documented_signature")
  data = np.random.default_rng(1).standard_normal((15, 4)).astype(np.float32)
  _sum(out, "fifteen", data, 1.0, f"{TREES} test_clip_sum_sensitivity")
  neighbour = data.copy()
  neighbour[3] = [-10, 10, 20, 20]
  _sum(out, "fifteen, one far", neighbour, 1.0, f"{TREES} test_clip_sum_sensitivity")
  padding = [i == 3 for i in range(15)]
  _sum(out, "fifteen", data, 1.0, f"{TREES} test_clip_sum_sensitivity", padding=padding)
  for clip_norm in (0.0, 1.0):
    for bad in (math.nan, math.inf, -math.inf):
      broken = data[:8].copy()
      broken[3] = bad
      where = f"{TREES} test_nan_safe_norm_check_produces_finite_output"
      _sum(out, f"eight, one all {bad}", broken, clip_norm, where)
  partly = data[:8].copy()
  partly[3, 1] = math.nan
  _sum(out, "eight, one with nan", partly, 1.0, f"{TREES} test_nan_safe_by_default")


def _gradients(out: Cases) -> None:
  def loss(params: Any, x: Any) -> Any:
    return 0.5 * jnp.mean((params - x) ** 2)

  def clip(dtype: str, clip_norm: float, test: str, padding: Any = None, **options: Any) -> None:
    kind = jnp.dtype(dtype)
    params, x = jnp.array([2.0], kind), jnp.array([[1.0], [4.0], [7.0]], kind)
    grads = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(params, x[:, None]))
    clipped = clipping.clipped_grad(loss, l2_clip_norm=clip_norm, batch_argnums=1, return_grad_norms=True, **options)
    total, aux = clipped(params, x, **({} if padding is None else {"is_padding_example": jnp.asarray(padding)}))
    outputs = {"sum": np.asarray(total), "norms": np.asarray(aux.grad_norms)}
    out.add(
      "clipped_grad", grads, outputs, source=f"{GRADIENTS} {test}", key=f"1, -2 and -5 in {dtype}",
      l2_clip_norm=clip_norm, is_padding_example=padding, **options,
    )  # fmt: skip

  clip("float32", 2.5, "test_sum_clipped_grad_basic")
  for dtype in ("float16", "bfloat16"):
    clip(dtype, 2.5, "test_sum_clipped_grad_float16")
  for size in (None, 1, 3):
    clip("float32", 2.5, "test_sum_clipped_grad_with_rescale", rescale_to_unit_norm=True, microbatch_size=size)
    clip("float32", 10.0, "test_sum_clipped_grad_return_metrics", microbatch_size=size)
  for padding in ([False, False, False], [True, True, True], [False, True, True]):
    test = "test_sum_clipped_grad_with_padding_examples"
    clip("float32", 2.5, test, padding, rescale_to_unit_norm=True)


def _pytrees(out: Cases) -> None:
  def add(key: str, loss: Any, params: Any, data: tuple[Any, ...], clip_norm: float, test: str, scale: Any) -> None:
    each = jax.vmap(jax.grad(loss), (None, *(0 for _ in data)))(params, *(x[:, None] for x in data))
    clipped = clipping.clipped_grad(
      loss, l2_clip_norm=clip_norm, batch_argnums=tuple(range(1, len(data) + 1)), pre_clipping_transform=scale
    )
    outputs = {"sum": arrays(clipped(params, *data))}
    grads = arrays(jax.vmap(scale)(each))
    out.add("clipped_grad", grads, outputs, source=f"{GRADIENTS} {test}", key=key, l2_clip_norm=clip_norm)

  def line(params: Any, data: Any) -> Any:
    return jnp.sum((params["w"] * data + params["b"] - data) ** 2)

  def classes(params: Any, inputs: Any, targets: Any) -> Any:
    log_probs = jax.nn.log_softmax(inputs @ params["weights"] + params["bias"])
    return -jnp.mean(jnp.sum(log_probs * targets, axis=-1))

  scales = {"w": 0.1, "b": 1.0}
  start = {"w": jnp.array([2.0]), "b": jnp.array([1.0])}
  test = "test_sum_clipped_grad_leaf_scales"
  add(
    "a line, scaled", line, start, (jnp.array([[1.0], [2.0]]),), 1.0, test,
    lambda g: {name: scales[name] * x for name, x in g.items()},
  )  # fmt: skip
  weights = {"weights": jnp.array([[1.0, -1.0], [2.0, 0.5]]), "bias": jnp.array([0.5, 0.0])}
  data = (jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
  test = "test_sum_clipped_grad_pytree_params_and_data"
  add("a classifier", classes, weights, data, 1.0, test, lambda g: g)
