"""The clip cases of torch's tests, and more orders, thresholds and dtypes, run in torch."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from golden import Cases

FILE = "https://github.com/pytorch/pytorch/blob/74f2fa66feec/test/test_nn.py"
NORM, VALUE, BAD, MULTI = (
  f"{FILE} {name}"
  for name in (
    "test_clip_grad_norm",
    "test_clip_grad_value",
    "test_clip_grad_norm_error_if_nonfinite",
    "test_clip_grad_norm_multi_device",
  )
)
MORE = "clipjax, drawn with numpy"
OWN_ORDERS = [0.5, 1.5, 2.0, 4.0, math.inf]
ORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf]
utils = torch.nn.utils


def draw(*shapes: tuple[int, ...], seed: int = 0, scale: float = 3.0) -> list[Any]:
  """Normal float32 gradients of these shapes."""
  rng = np.random.default_rng(seed)
  return [np.asarray(scale * rng.standard_normal(shape), np.float32) for shape in shapes]


def tensor(x: np.ndarray) -> torch.Tensor:
  """The tensor of an array; torch cannot read NumPy's bfloat16."""
  if x.dtype == ml_dtypes.bfloat16:
    return torch.tensor(x.astype(np.float32)).to(torch.bfloat16)
  return torch.tensor(x)


def array(t: torch.Tensor) -> np.ndarray:
  """The array of a tensor."""
  t = t.detach()
  return t.float().numpy().astype(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy().copy()


def parameters(grads: list[Any]) -> list[torch.nn.Parameter]:
  """Parameters with these gradients, None for one without."""
  out = []
  for x in grads:
    t = torch.zeros(2) if x is None else tensor(x)
    parameter = torch.nn.Parameter(torch.zeros_like(t))
    parameter.grad = None if x is None else t
    out.append(parameter)
  return out


def clipped(clip: Callable[..., Any], grads: Any, *args: Any, **options: Any) -> dict[str, Any]:
  """The gradients after one of torch's clips, and the norm if the clip returns it."""
  params = parameters(grads if isinstance(grads, list) else [grads])
  norm = clip(params if isinstance(grads, list) else params[0], *args, **options)
  after = [None if p.grad is None else array(p.grad) for p in params]
  out = {"clipped": after if isinstance(grads, list) else after[0]}
  return out if norm is None else out | {"norm": array(norm)}


def cases() -> Cases:
  """All of torch's cases."""
  out = Cases("torch", torch.__version__.partition("+")[0])
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns about an empty list of parameters.
    for part in (_norms, _errors, _more_norms, _total_norms, _values, _training):
      part(out)
  return out


def _norm(out: Cases, key: str, grads: Any, max_norm: float, source: str = MORE, **options: Any) -> None:
  outputs = clipped(utils.clip_grad_norm_, grads, max_norm, **options)
  out.add("clip_grad_norm_", grads, outputs, source=source, key=key, max_norm=max_norm, **options)


def _norms(out: Cases) -> None:
  square = np.arange(1, 101, dtype=np.float32).reshape(10, 10)
  grads = [square, np.full(10, 1e-3, np.float32)]
  rng = np.random.default_rng(0)
  small = [(rng.random((10, 10)) / 1e4).astype(np.float32), np.full(10, 1 / 500, np.float32)]
  for p in OWN_ORDERS:
    for foreach in (False, True):
      _norm(out, "1 to 100 and thousandths", grads, 2.0, NORM, norm_type=p, foreach=foreach)
      total = utils.get_total_norm(map(tensor, grads), norm_type=p, foreach=foreach)
      outputs = clipped(utils.clip_grads_with_norm_, grads, 2.0, total, foreach=foreach)
      out.add(
        "clip_grads_with_norm_", grads, outputs | {"norm": array(total)}, source=NORM, key="1 to 100 and thousandths",
        max_norm=2.0, norm_type=p, total_norm=array(total), foreach=foreach,
      )  # fmt: skip
    _norm(out, "small ones", small, 2.0, NORM, norm_type=p)
    _norm(out, "1 to 100", square, 2.0, NORM, norm_type=p)
  layers = [np.ones(shape, np.float32) for shape in ((10, 10), (10,), (10, 10), (10,))]
  for p in (2.0, math.inf):
    _norm(out, "ones of two layers", layers, 0.5, MULTI, norm_type=p)


def _errors(out: Cases) -> None:
  """Whether a norm is an error with `error_if_nonfinite`, and the result without it."""
  for scalar in (math.inf, -math.inf, math.nan, 2e22, -2e22, 2e200, -2e200):
    for one_entry in (False, True):
      for prefix in (False, True):
        grad = np.full(10, scalar)
        if one_entry:
          grad = np.where(np.arange(10) == 1, scalar, 0.0)
        grads = [np.ones(1), grad] if prefix else [grad]
        key = f"{scalar:g} {'once' if one_entry else 'ten times'}{', after a 1' if prefix else ''}"
        for p in (0.1, 1.0, 2.0, 3.5, math.inf, -1.0, 0.0):
          try:
            clipped(utils.clip_grad_norm_, grads, 1.0, norm_type=p, error_if_nonfinite=True)
            raises = False
          except RuntimeError:
            raises = True
          outputs = clipped(utils.clip_grad_norm_, grads, 1.0, norm_type=p) | {"raises": raises}
          if p <= 0:
            outputs.pop("clipped")
          out.add("clip_grad_norm_, twice", grads, outputs, source=BAD, key=key, max_norm=1.0, norm_type=p)


def _more_norms(out: Cases) -> None:
  grads = draw((3, 4), (1,), (2, 3, 2), ())
  tiny = [(x * np.float32(1e-6)).astype(np.float32) for x in grads]
  notebook = [np.array([[3.0, -4.0], [0.5, 2.0]], np.float32), np.array([12.0, -0.25], np.float32)]
  for p in ORDERS:
    for max_norm in (0.0, 0.5, 2.0, 1e6):
      _norm(out, "four ranks", grads, max_norm, norm_type=p)
    _norm(out, "four ranks times 1e-6", tiny, 1e-7, norm_type=p)
  for p in (1.0, 2.0, 3.0, math.inf):
    for max_norm in (0.5, 7.0, 100.0):
      _norm(out, "the notebook's", notebook, max_norm, norm_type=p)
    with_zeros = [*draw((3,)), np.zeros(4, np.float32)]
    _norm(out, "one leaf of zeros", with_zeros, 0.5, norm_type=p)
    _norm(out, "zeros", np.zeros(4, np.float32), 0.5, norm_type=p)
  for p in (0.5, 2.0, math.inf):
    for bad in (math.inf, -math.inf, math.nan):
      for place in ((0, 0), (1, 2)):
        with_bad = [x.copy() for x in draw((4,), (5,))]
        with_bad[place[0]][place[1]] = bad
        outputs = clipped(utils.clip_grad_norm_, with_bad, 1.0, norm_type=p) | {"raises": True}
        out.add(
          "clip_grad_norm_, twice", with_bad, outputs, source=MORE, key=f"{bad} in leaf {place[0]}",
          max_norm=1.0, norm_type=p,
        )  # fmt: skip
  for dtypes in (("float32", "float16"), ("float16", "bfloat16", "float32"), ("bfloat16",), ("float64", "float64")):
    mixed = [x.astype(_dtype(d)) for x, d in zip(draw((3, 4), (5,), (2, 2)), dtypes, strict=False)]
    for p in (1.0, 2.0, math.inf):
      _norm(out, " and ".join(dtypes), mixed, 1.0, norm_type=p)
  _norm(out, "one without a gradient", [*draw((3,)), None, *draw((4,))], 0.5)
  _norm(out, "nothing", [], 1.0, NORM)
  _norm(out, "two without a gradient", [None, None], 1.0)
  for total in (0.0, 0.25, 7.0, math.nan, math.inf):
    for foreach in (False, True):
      given = np.float32(total)
      outputs = clipped(utils.clip_grads_with_norm_, grads, 0.5, tensor(given), foreach=foreach)
      out.add(
        "clip_grads_with_norm_", grads, outputs, source=MORE, key="four ranks", max_norm=0.5, total_norm=given,
        foreach=foreach,
      )  # fmt: skip


def _total_norms(out: Cases) -> None:
  grads = draw((3, 4), (1,), (2, 3, 2), ())
  for p in [*ORDERS, -math.inf]:
    for foreach in (False, True):
      norm = array(utils.get_total_norm(map(tensor, grads), norm_type=p, foreach=foreach))
      out.add("get_total_norm", grads, {"norm": norm}, source=MORE, key="four ranks", norm_type=p, foreach=foreach)
    each = [array(torch.linalg.vector_norm(tensor(g), p)) for g in grads]
    out.add("vector_norm", grads, {"norms": each}, source=MORE, key="four ranks", ord=p)
  for bad in (math.inf, math.nan):
    broken = [*draw((3,)), np.array([1.0, bad], np.float32)]
    norm = array(utils.get_total_norm(map(tensor, broken)))
    out.add("get_total_norm", broken, {"norm": norm}, source=MORE, key=f"{bad} at the end", norm_type=2.0)
  out.add("get_total_norm", [], {"norm": array(utils.get_total_norm([]))}, source=MORE, key="nothing", norm_type=2.0)


def _value(out: Cases, key: str, grads: Any, clip_value: float, source: str = MORE, **options: Any) -> None:
  outputs = clipped(utils.clip_grad_value_, grads, clip_value, **options)
  out.add("clip_grad_value_", grads, outputs, source=source, key=key, clip_value=clip_value, **options)


def _values(out: Cases) -> None:
  square, twos = (np.arange(-50, 50, dtype=np.float32) / 5).reshape(10, 10), np.full(10, 2, np.float32)
  for foreach in (False, True):
    _value(out, "-10 to 9.8 and twos", [square, twos], 2.5, VALUE, foreach=foreach)
    _value(out, "-10 to 9.8 and none", [square, None], 2.5, VALUE, foreach=foreach)
    _value(out, "-10 to 9.8 alone", square, 2.5, VALUE, foreach=foreach)
  for dtype in ("float32", "float16", "bfloat16"):
    grads = [x.astype(_dtype(dtype)) for x in draw((3, 4), (3,), ())]
    grads[1][:] = [math.inf, -math.inf, math.nan]
    for bound in (0.0, 0.3, 2.5, 1e4):
      for foreach in (False, True):
        _value(out, f"{dtype} and what is not finite", grads, bound, foreach=foreach)


def _training(out: Cases) -> None:
  """Twenty steps of SGD on squares, each clipped."""
  rng = np.random.default_rng(3)
  x, y = rng.standard_normal((16, 4)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
  parameter = torch.nn.Parameter(torch.zeros(4))
  optimizer = torch.optim.SGD([parameter], 0.3)
  norms = []
  for _ in range(20):
    optimizer.zero_grad()
    torch.mean((torch.tensor(x) @ parameter - torch.tensor(y)) ** 2).backward()
    norms.append(utils.clip_grad_norm_([parameter], 0.4).item())
    optimizer.step()
  outputs = {"norms": np.array(norms, np.float32), "weights": array(parameter)}
  out.add("SGD", [x, y], outputs, source=MORE, key="a regression", max_norm=0.4, lr=0.3, steps=20)


def _dtype(name: str) -> Any:
  return ml_dtypes.bfloat16 if name == "bfloat16" else name
