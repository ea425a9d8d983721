"""The clip cases of TensorFlow's tests, and more thresholds and places, run in TensorFlow."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf
from golden import Cases

FILE = (
  "https://github.com/tensorflow/tensorflow/blob/2f22fbeda2d8/tensorflow/python/kernel_tests/math_ops/clip_ops_test.py"
)
MORE = "clipjax"
MATRIX = np.array([[-3.0, 0.0, 0.0], [4.0, 0.0, 0.0]], np.float32)  # Norm 5.
SPREAD = np.array([[-2.0, 0.0, 0.0], [4.0, 0.0, 0.0]], np.float32)  # With PAIR norm 5.
PAIR = np.array([1.0, -2.0], np.float32)
ROWS = np.array([[-3.0, 0.0, 0.0], [4.0, 0.0, 3.0]], np.float32)
WEIGHTS = np.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]], np.float32)


def source(test: str) -> str:
  """The address of one of TensorFlow's tests."""
  return f"{FILE} {test}"


def cases() -> Cases:
  """All of TensorFlow's cases."""
  out = Cases("tensorflow", tf.__version__)
  for part in (_values, _norms, _derivatives, _global_norms, _others):
    part(out)
  return out


def _value(out: Cases, key: str, x: Any, low: Any, high: Any, where: str) -> None:
  outputs = {"clipped": tf.clip_by_value(x, low, high).numpy()}
  out.add("clip_by_value", x, outputs, source=where, key=key, clip_value_min=low, clip_value_max=high)


def _values(out: Cases) -> None:
  six = np.array([[-5.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
  _value(out, "six", six, -4.4, 4.4, source("testClipByValue"))
  bad = np.array([math.nan, math.inf, -math.inf], np.float32)
  _value(out, "what is not finite", bad, -4.0, 4.0, source("testClipByValueNonFinite"))
  _value(out, "an empty tensor", np.zeros((7, 0), np.float32), 1.0, 1.0, source("testClipByValueEmptyTensor"))
  for dtype in ("float16", "float32", "float64", "bfloat16", "int16", "int32", "int64", "uint8"):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = np.arange(1, 7).reshape(2, 3).astype(kind)
    lows = [2, np.array([[2, 2, 2], [3, 3, 3]]), 4, np.array([[2, 2, 2], [5, 5, 5]])]
    highs = [4, 4, np.full((2, 3), 6), np.array([[5, 5, 5], [7, 7, 7]])]
    for i, (low, high) in enumerate(zip(lows, highs, strict=True)):
      bounds = (v.astype(kind) if isinstance(v, np.ndarray) else v for v in (low, high))
      _value(out, f"1 to 6 in {dtype}", x, *bounds, source(f"testClipByValue{i}Type"))
  values = np.zeros((2, 2, 3), np.float32)
  values[0, :, 0], values[1, 0, 1], values[1, 1, 2] = [-3.0, 4.0], 2.0, -1.0
  for low, high in ((-2.0, 2.0), (1.0, 2.0), (-2.0, -1.0)):
    slices = tf.IndexedSlices(tf.constant(values), tf.constant([2, 6]), tf.constant([10, 2, 3]))
    outputs = {"clipped": tf.clip_by_value(slices, low, high).values.numpy()}
    out.add(
      "clip_by_value", values, outputs, source=source("testClipByValueWithIndexedSlicesClipped"),
      key="values of IndexedSlices", clip_value_min=low, clip_value_max=high,
    )  # fmt: skip
  for dtype in ("float32", "float16"):
    mixed = np.array([[-5.0, 2.0, math.inf], [4.0, -math.inf, math.nan]]).astype(dtype)
    for bound in (0.0, 1.5, 4.0, 10.0):
      _value(out, f"some of it not finite, {dtype}", mixed, -bound, bound, MORE)


def _by_norm(out: Cases, key: str, x: Any, clip_norm: Any, where: str, axes: Any = None) -> None:
  outputs = {"clipped": tf.clip_by_norm(x, clip_norm, axes).numpy()}
  out.add("clip_by_norm", x, outputs, source=where, key=key, clip_norm=clip_norm, axes=axes)


def _norms(out: Cases) -> None:
  _by_norm(out, "norm 5", MATRIX, 4.0, source("testClipByNormClipped"))
  _by_norm(out, "norm 5", MATRIX, 6.0, source("testClipByNormNotClipped"))
  _by_norm(out, "zeros", np.zeros((2, 3), np.float32), 6.0, source("testClipByNormZero"))
  _by_norm(out, "two rows", ROWS, 4.0, source("testClipByNormClippedWithDim0"), [0])
  _by_norm(out, "two rows", ROWS, 4.0, source("testClipByNormClippedWithDim1"), [1])
  _by_norm(out, "two rows", ROWS, 6.0, source("testClipByNormNotClippedWithAxes"), [1])
  for limit in (5.0, 0.5, 0.0, np.float32(4.0), np.float32(0.5)):
    _by_norm(out, "norm 5", MATRIX, limit, MORE)
    _by_norm(out, "a pair", PAIR, limit, MORE)
  block = (2 * np.random.default_rng(0).standard_normal((3, 4, 2))).astype(np.float32)
  for axes in ([0], [1], [0, 1], [0, 2], [1, 2]):
    for limit in (0.5, 2.0, 100.0):
      _by_norm(out, "a block", block, limit, MORE, axes)
  for test, x, limit in (
    ("testClipByNormBadShape", MATRIX.reshape(2, 3, 1), np.array([1.0, 2.0], np.float32)),
    ("testClipByNormBadShape", np.float32(2.0), np.array([2.0, 3.0], np.float32)),
  ):
    try:
      tf.clip_by_norm(x, limit)
    except (ValueError, tf.errors.InvalidArgumentError):
      key = f"limits of a tensor of shape {list(np.shape(x))}"
      out.add("clip_by_norm", x, {"raises": True}, source=source(test), key=key, clip_norm=limit, axes=None)
  for limit in (0.8, np.float32(0.8), 0.9, 0.1):
    outputs = {"clipped": tf.compat.v1.clip_by_average_norm(MATRIX, limit).numpy()}
    where = source("testClipByAverageNormClipped")
    out.add("clip_by_average_norm", MATRIX, outputs, source=where, key="norm 5", clip_norm=limit)
  zeros = np.zeros((2, 3), np.float32)
  outputs = {"clipped": tf.compat.v1.clip_by_average_norm(zeros, 0.9).numpy()}
  where = source("testClipByAverageNormZero")
  out.add("clip_by_average_norm", zeros, outputs, source=where, key="zeros", clip_norm=0.9)


def _derivatives(out: Cases) -> None:
  """The derivative of a weighted sum of the clipped entries."""

  def derivative(clip: Any, x: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    with tf.GradientTape() as tape:
      variable = tf.Variable(x)
      y = tf.reduce_sum(weights * clip(variable))
    return {"derivative": tape.gradient(y, variable).numpy()}

  def by_norm(key: str, x: np.ndarray, weights: np.ndarray, limit: float, where: str) -> None:
    outputs = derivative(lambda v: tf.clip_by_norm(v, limit), x, weights)
    out.add("derivative of clip_by_norm", x, outputs, source=where, key=key, weights=weights, clip_norm=limit)

  by_norm("three zeros", np.zeros(3, np.float32), np.ones(3, np.float32), 1.0, source("testClipByNormGradientZeros"))
  for limit in (1.0, 50.0):
    by_norm("norm 5", MATRIX, WEIGHTS, limit, MORE)
  inputs, ones = np.array([-2.5, 2.0, 0.0, 4.0], np.float32), np.array([1.0, 2.0, 3.0, 4.0], np.float32)
  for bound in (1.5, 3.5):
    outputs = derivative(lambda v, b=bound: tf.clip_by_value(v, -b, b), inputs, ones)
    out.add(
      "derivative of clip_by_value", inputs, outputs, source=source("testClipByValueGradient"), key="four",
      weights=ones, clip_value_min=-bound, clip_value_max=bound,
    )  # fmt: skip


def _global(out: Cases, key: str, grads: list[Any], clip_norm: Any, where: str, use_norm: float | None = None) -> None:
  theirs, norm = tf.clip_by_global_norm(grads, clip_norm, use_norm=None if use_norm is None else tf.constant(use_norm))
  values = [getattr(x, "values", x) for x in theirs]
  outputs = {"clipped": [None if x is None else x.numpy() for x in values], "norm": norm.numpy()}
  dense = [x.values.numpy() if isinstance(x, tf.IndexedSlices) else x for x in grads]
  out.add("clip_by_global_norm", dense, outputs, source=where, key=key, clip_norm=clip_norm, use_norm=use_norm)


def _global_norms(out: Cases) -> None:
  both, zeros = [SPREAD, PAIR], [np.zeros((2, 3), np.float32), np.zeros(2, np.float32)]
  _global(out, "norm 5 together", both, 4.0, source("testClipByGlobalNormClipped"))
  _global(out, "norm 5 together", both, np.float32(4.0), source("testClipByGlobalNormClippedTensor"))
  with_none = [SPREAD, None, PAIR, None]
  _global(out, "with Nones", with_none, 4.0, source("testClipByGlobalNormSupportsNone"))
  slices = tf.IndexedSlices(tf.constant(PAIR), tf.constant([3, 4]))
  _global(out, "with IndexedSlices", [SPREAD, slices], 4.0, source("testClipByGlobalNormWithIndexedSlicesClipped"))
  one = tf.IndexedSlices(tf.constant([1.0]), tf.constant([0]), dense_shape=(1,))
  _global(out, "IndexedSlices alone", [one], 1.0, source("testClipByGlobalNormPreservesDenseShape"))
  _global(out, "norm 5 together", both, 6.0, source("testClipByGlobalNormNotClipped"))
  _global(out, "zeros together", zeros, 6.0, source("testClipByGlobalNormZero"))
  with_inf = [np.array([[-2.0, 0.0, math.inf], [4.0, 0.0, 0.0]], np.float32), PAIR]
  _global(out, "with inf", with_inf, 6.0, source("testClipByGlobalNormInf"))
  for limit in (0.5, 5.0, 1e9):
    _global(out, "norm 5 together", both, limit, MORE)
  for norm in (0.5, 3.0, 5.0, 80.0, math.inf, math.nan):
    _global(out, "norm 5 together", both, 4.0, MORE, norm)
  for bad in (math.inf, -math.inf, math.nan):
    broken = [SPREAD.copy(), PAIR]
    broken[0][0, 0] = bad
    for norm in (None, 2.0, 50.0):
      _global(out, f"{bad} in front", broken, 4.0, MORE, norm)
  for dtype in ("float32", "float16"):
    for key, grads in (("norm 5 together", both), ("with Nones", with_none)):
      cast = [None if x is None else x.astype(dtype) for x in grads]
      outputs = {"norm": tf.linalg.global_norm(cast).numpy()}
      out.add("global_norm", cast, outputs, source=MORE, key=f"{key}, {dtype}")
  out.add("global_norm", [None, None], {"norm": tf.linalg.global_norm([None, None]).numpy()}, source=MORE, key="Nones")
  outputs = {"clipped": tf.clip_by_global_norm([], 1.0)[0]}
  out.add("clip_by_global_norm", [], outputs, source=MORE, key="nothing", clip_norm=1.0, use_norm=None)


def _others(out: Cases) -> None:
  """The updates of Keras optimizers after a clip."""
  for argument in ("clipnorm", "global_clipnorm", "clipvalue"):
    variables = [tf.Variable(np.zeros_like(x)) for x in (MATRIX, PAIR)]
    optimizer = tf.keras.optimizers.SGD(1.0, **{argument: 0.5})
    optimizer.apply_gradients(zip([tf.constant(MATRIX), tf.constant(PAIR)], variables, strict=True))
    outputs = {"clipped": [-v.numpy() for v in variables]}
    out.add("keras.optimizers.SGD", [MATRIX, PAIR], outputs, source=MORE, key="two tensors", **{argument: 0.5})
