"""The clip cases of Optax's tests, and more thresholds and shapes, run in Optax."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden import Cases

ROOT = "https://github.com/google-deepmind/optax/blob/2edbcbe2390d/optax"
CLIPPING, PRIVACY = f"{ROOT}/transforms/_clipping_test.py", f"{ROOT}/contrib/_privacy_test.py"
MORE = "clipjax, drawn with numpy"
UPDATES = [np.array([500.0, 5.0], np.float32), np.array([300.0, 3.0], np.float32)]
PARAMS = [np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32)]
FRACTIONS = [1.0 / i for i in range(1, 51)]
CLIPS: dict[str, Callable[..., Any]] = {
  "clip": optax.clip,
  "clip_by_block_rms": optax.clip_by_block_rms,
  "clip_by_global_norm": optax.clip_by_global_norm,
}


def arrays(tree: Any) -> Any:
  """A tree of JAX arrays as NumPy arrays."""
  return jax.tree.map(np.asarray, tree)


def normal(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> list[Any]:
  """Normal float32 arrays of these shapes."""
  rng = np.random.default_rng(seed)
  return [np.asarray(scale * rng.standard_normal(shape), np.float32) for shape in shapes]


def cases() -> Cases:
  """All of Optax's cases."""
  out = Cases("optax", optax.__version__)
  for part in (_clips, _adaptive, _examples, _layers, _privacy):
    part(out)
  return out


def _clip(out: Cases, name: str, key: str, grads: Any, limit: float, source: str = MORE) -> None:
  outputs = {"clipped": arrays(CLIPS[name](limit).update(grads, optax.EmptyState())[0])}
  out.add(name, grads, outputs, source=source, key=key, limit=limit)


def _clips(out: Cases) -> None:
  for limit in (1e6, 1.0):
    _clip(out, "clip", "two pairs", UPDATES, limit, f"{CLIPPING} test_clip")
  for name in ("clip_by_block_rms", "clip_by_global_norm"):
    # The output of one threshold is the input of the next, and each also sees the original updates.
    again, steps = UPDATES, []
    for limit in FRACTIONS:
      again = CLIPS[name](limit).update(again, optax.EmptyState())[0]
      once = CLIPS[name](limit).update(UPDATES, optax.EmptyState())[0]
      steps.append({"again": arrays(again), "once": arrays(once)})
    out.add(
      f"{name}, repeated", UPDATES, {"steps": steps}, source=f"{CLIPPING} test_{name}", key="two pairs",
      limits=FRACTIONS,
    )  # fmt: skip
  grads = normal((3, 4), (5,), (), (2, 1, 3), seed=1, scale=2.0)
  for name in CLIPS:
    for limit in (0.1, 3.0, 1e4):
      _clip(out, name, "four ranks", grads, limit)
  out.add("tree.norm", grads, {"norm": np.asarray(optax.tree.norm(grads))}, source=MORE, key="four ranks")
  for key, tree in (
    ("nothing", []),
    ("a None", {"a": None, "b": np.array([3.0, 4.0], np.float32)}),
    ("nested", {"a": [np.array([3.0], np.float32)], "b": {"c": np.array([[4.0]], np.float32)}}),
  ):
    for name in CLIPS:
      _clip(out, name, key, tree, 1.0)
  broken = [np.array([1.0, math.inf], np.float32), np.array([2.0], np.float32)]
  for name in CLIPS:
    _clip(out, name, "with inf", broken, 1.5)


def _adaptive(out: Cases) -> None:
  def agc(key: str, grads: Any, params: Any, source: str, **arguments: Any) -> None:
    outputs = {"clipped": arrays(optax.adaptive_grad_clip(**arguments).update(grads, optax.EmptyState(), params)[0])}
    out.add("adaptive_grad_clip", grads, outputs, source=source, key=key, params=params, **arguments)

  where = f"{CLIPPING} test_adaptive_grad_clip"
  again, steps = UPDATES, []
  for ratio in FRACTIONS:
    tx = optax.adaptive_grad_clip(ratio)
    again = tx.update(again, optax.EmptyState(), PARAMS)[0]
    steps.append({"again": arrays(again), "once": arrays(tx.update(UPDATES, optax.EmptyState(), PARAMS)[0])})
  out.add(
    "adaptive_grad_clip, repeated", UPDATES, {"steps": steps}, source=where, key="two pairs", params=PARAMS,
    ratios=FRACTIONS,
  )  # fmt: skip
  two = [np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)]
  agc("two by two", two, [np.ones((2, 2), np.float32)], where, clipping=1.0)
  cube, flat = (2, 2, 2, 3, 4), (5, 6)
  ones = [np.ones(cube, np.float32)]
  agc("twos of rank 5", [2 * ones[0]], ones, f"{where}_with_axis", clipping=0.5, axis=[0, 1, 2])
  agc("tenths of rank 5", [ones[0] / np.float32(10)], ones, f"{where}_with_axis", clipping=2.0, axis=[0, 1, 2])
  agc("threes", [np.full(flat, 3, np.float32)], [np.ones(flat, np.float32)], f"{where}_with_axis", clipping=0.5)
  agc("twos of rank 5", [2 * ones[0]], ones, f"{where}_default_axis_conv3d", clipping=0.5)
  six = [np.ones((2,) * 6, np.float32)]
  where = f"{CLIPPING} test_unitwise_norm_with_axis"
  agc("rank 6", six, six, where, clipping=0.5, axis=[0, 1, 2])
  try:
    optax.adaptive_grad_clip(0.5).update(six, optax.EmptyState(), six)
  except ValueError:
    out.add("adaptive_grad_clip", six, {"raises": True}, source=where, key="rank 6", params=six, clipping=0.5)
  shapes = [(), (5,), (1, 5), (5, 1), (4, 3), (2, 4, 3), (2, 3, 2, 2)]
  grads, params = normal(*shapes, seed=2), normal(*shapes, seed=3)
  params[1] = np.zeros(5, np.float32)  # Only `eps` keeps this limit above 0.
  for clipping in (0.01, 0.5, 10.0):
    for eps in (1e-3, 2.0):
      agc("seven shapes", grads, params, MORE, clipping=clipping, eps=eps)


def _examples(out: Cases) -> None:
  def clip(key: str, grads: list[Any], limit: float, source: str = MORE) -> None:
    total, count = optax.per_example_global_norm_clip(grads, limit)
    outputs = {"sum": arrays(total), "clipped": int(count)}
    out.add("per_example_global_norm_clip", grads, outputs, source=source, key=key, l2_norm_clip=limit)

  four = [
    np.array([[0.0, -0.5], [3.0, 4.0], [5.0, 6.0], [0.0, 0.0]], np.float32),
    np.array([[0.0], [5.0], [-3.0], [0.0]], np.float32),
  ]
  clip("four examples", four, 1.0, f"{CLIPPING} test_per_example_global_norm_clip")
  for limit in (0.0, 0.5, 2.0, 3.0, math.inf):
    clip("a vector", normal((6, 3)), limit)
    clip("a number and a matrix", normal((6,), (6, 2, 3)), limit)
    clip("three leaves", normal((6, 3), (6, 1), (6, 2, 2)), limit)
  clip("one of zeros", [np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)], 1.0)
  clip("one with inf", [np.array([[3.0, 4.0], [math.inf, 1.0]], np.float32)], 1.0)


def _layers(out: Cases) -> None:
  """The clip of each layer of each example."""

  def clip(key: str, grads: list[Any], limit: float, uniform: bool, source: str = MORE) -> None:
    total, counts = optax.per_example_layer_norm_clip(grads, limit, uniform=uniform)
    outputs = {"sum": arrays(total), "clipped": [int(count) for count in counts]}
    out.add(
      "per_example_layer_norm_clip", grads, outputs, source=source, key=key, global_l2_norm_clip=limit, uniform=uniform
    )

  where = f"{CLIPPING} test_per_example_layer_norm_clip"
  two = [np.array([[0.5], [1.5], [-2.0], [3.0]], np.float32), np.ones((4, 3, 3, 2), np.float32)]
  clip("two layers", two, math.sqrt(2), True, where)
  clip("two layers", two, math.sqrt(19), False, where)
  for limit in (0.0, 0.5, 2.0, math.inf):
    for uniform in (True, False):
      clip("three layers", normal((6, 3), (6, 2, 2), (6,)), limit, uniform)


def _privacy(out: Cases) -> None:
  """The mean of clipped examples without noise; every entry of example i is i."""
  shapes = {"key_a": [(2, 3, 4), ()], "key_b": (6, 7)}

  def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)

  params = jax.tree.map(jnp.zeros, shapes, is_leaf=is_shape)
  grads = jax.tree.map(
    lambda s: np.broadcast_to(np.arange(8, dtype=np.float32).reshape(8, *(1 for _ in s)), (8, *s)).copy(), shapes,
    is_leaf=is_shape,
  )  # fmt: skip
  for limit, test in (
    (float(np.finfo(np.float32).max), "test_no_privacy"),
    *((x, "test_clipping_norm") for x in (0.5, 10.0, 20.0, 40.0, 80.0)),
  ):
    tx = optax.contrib.differentially_private_aggregate(limit, 0.0, key=0)
    outputs = {"mean": arrays(tx.update(jax.tree.map(jnp.asarray, grads), tx.init(params), params)[0])}
    out.add(
      "contrib.differentially_private_aggregate", grads, outputs, source=f"{PRIVACY} {test}", key="eight examples",
      l2_norm_clip=limit,
    )  # fmt: skip
