"""What torch, TensorFlow, Optax and jax_privacy answer to their own clip cases, held against this package.

The numbers are in `data/golden.json`, which `benchmarks/golden.py` makes with the libraries installed; none but Optax
is needed here. `CALLS` has, for each function of theirs, what stands for it here. Where the two differ on purpose,
`DEVIATIONS` says in words what this package does instead, and checks it.
"""

import functools
import importlib.util
import math
import subprocess
import sys
from typing import Any, NamedTuple

import golden
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle_norm

import clipjax

FILE = golden.load()
WAYS = {"foreach", "nan_safe", "microbatch_size"}  # Ways of computing the same.


class Case(NamedTuple):
  """A case of a library with its arrays."""

  library: str
  function: str
  grads: Any
  arguments: dict[str, Any]
  outputs: dict[str, Any]
  is_wide: bool  # Whether any of it has 64 bits.


def read(case):
  grads = FILE["inputs"][case["grads"]]
  arguments = {name: value for name, value in case["arguments"].items() if name not in WAYS}
  decoded = map(golden.decode, (grads, arguments, case["outputs"]))
  return Case(case["library"], case["function"], *decoded, is_wide="64'" in str([case, grads]))


CASES = {case["name"]: read(case) for case in FILE["cases"]}
# Of a number: a few roundings of a factor or a norm (the order 0.1 takes a tenth power), one unit of a 16-bit dtype.
RTOL = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@functools.partial(jax.jit, static_argnames=("factory", "axis"))
def update(factory, limit, grads, params=None, **options):
  """One step of the transformation with this limit."""
  tx = factory(limit, **options)
  return tx.update(grads, tx.init(grads if params is None else params), params)[0]


# torch: 1e-6 is added to every norm before the division.


def torch_norm(grads, *, max_norm, norm_type=2.0, **options):
  clipped, norm = clipjax.clip_grad_norm(grads, max_norm, norm_type, eps=1e-6, **options)
  return {"clipped": clipped, "norm": norm}


def torch_norm_twice(grads, **arguments):
  outputs, text = torch_norm(grads, **arguments), ""
  try:
    torch_norm(grads, **arguments, on_nonfinite="error")
  except FloatingPointError as error:
    text = str(error)
  bad = next((i for i, leaf in enumerate(grads) if not np.isfinite(leaf).all()), None)
  message = f"the gradient is not finite (norm {float(outputs['norm'])}) in '{bad}': "
  return outputs | {"raises": text.startswith(message)}


def torch_given_norm(grads, *, max_norm, total_norm, norm_type=None):
  norm = total_norm if norm_type is None else clipjax.global_norm(grads, norm_type)
  clipped, same = clipjax.clip_grad_norm(grads, max_norm, norm=norm, eps=1e-6)
  return {"clipped": clipped, "norm": same}


def torch_sgd(data, *, max_norm, lr, steps):
  x, y = data
  weights, norms = np.zeros(4, np.float32), []
  for _ in range(steps):
    clipped, norm = clipjax.clip_grad_norm(2 * x.T @ (x @ weights - y) / len(y), max_norm, eps=1e-6)
    weights = weights - np.float32(lr) * np.asarray(clipped)
    norms.append(norm)
  return {"norms": np.array(norms), "weights": weights}


# TensorFlow.


def tensorflow_value(x, *, clip_value_min, clip_value_max):
  if isinstance(clip_value_min, float) and clip_value_min == -clip_value_max:
    return {"clipped": clipjax.clip_grad_value(x, clip_value_max)}
  low, high = (np.broadcast_to(v, x.shape).astype(x.dtype).ravel() for v in (clip_value_min, clip_value_max))
  return {"clipped": tensorflow_between(x.ravel(), low, high).reshape(x.shape)}


@jax.jit
@jax.vmap
def tensorflow_between(x, low, high):
  """A clip to an interval that is not symmetric, around its middle."""
  middle = ((low + high) / 2).astype(x.dtype)
  return clipjax.clip_grad_value(x - middle, (high - low) / 2) + middle


def tensorflow_norm(x, *, clip_norm, axes=None):
  if axes is None:
    clipped = clipjax.clip_grad_norm(x, clip_norm)[0]
    if not isinstance(x, jax.core.Tracer):
      assert np.array_equal(update(clipjax.clip_by_leaf_norm, clip_norm, x), clipped)
    return {"clipped": clipped}
  moved = np.moveaxis(x, axes, range(len(axes)))
  clipped = clip_slices(moved.reshape(*moved.shape[: len(axes)], -1), clip_norm)
  return {"clipped": np.moveaxis(clipped.reshape(moved.shape), range(len(axes)), axes)}


@jax.jit
@functools.partial(jax.vmap, in_axes=(-1, None), out_axes=-1)
def clip_slices(x, clip_norm):
  """A norm over some axes is that of each slice."""
  return clipjax.clip_grad_norm(x, clip_norm)[0]


def tensorflow_global_norm(grads, *, clip_norm, use_norm):
  clipped, norm = clipjax.clip_grad_norm(grads, clip_norm, norm=use_norm)
  return {"clipped": clipped, "norm": norm}


def derivative(call, x, weights, **arguments):
  return {"derivative": jax.jit(jax.grad(lambda x: jnp.sum(weights * call(x, **arguments)["clipped"])))(x)}


KERAS = {
  "clipnorm": clipjax.clip_by_leaf_norm,
  "global_clipnorm": clipjax.clip_by_global_norm,
  "clipvalue": clipjax.clip_by_value,
}


def tensorflow_keras(grads, **limit):
  ((name, value),) = limit.items()
  return {"clipped": update(KERAS[name], value, grads)}


# Optax.


def optax_repeated(factory, grads, *, params=None, limits):
  again, steps = grads, []
  for limit in limits:
    again = update(factory, limit, again, params)
    steps.append({"again": again, "once": update(factory, limit, grads, params)})
  return {"steps": steps}


def optax_adaptive(grads, *, params, clipping, axis=None, **options):
  axis = tuple(axis) if axis else None
  return {"clipped": update(clipjax.adaptive_grad_clip, clipping, grads, params, axis=axis, **options)}


def optax_examples(grads, *, l2_norm_clip):
  total, norms = clipjax.clip_grad_per_example(grads, l2_norm_clip)
  return {"sum": total, "clipped": int((norms > l2_norm_clip).sum())}


def optax_layers(grads, *, global_l2_norm_clip, uniform):
  """Each layer has its share of the limit: the same for all, or by size."""
  sizes = np.array([x[0].size for x in grads])
  limits = global_l2_norm_clip * np.sqrt(np.full(len(grads), 1 / len(grads)) if uniform else sizes / sizes.sum())
  sums, norms = zip(*map(clipjax.clip_grad_per_example, grads, limits), strict=True)
  counts = [int((n > limit * (1 + 1e-6)).sum()) for n, limit in zip(norms, limits, strict=True)]
  return {"sum": list(sums), "clipped": counts}


def optax_mean(grads, *, l2_norm_clip):
  total, norms = clipjax.clip_grad_per_example(grads, l2_norm_clip)
  return {"mean": jax.tree.map(lambda x: x / len(norms), total)}


# jax_privacy.


def privacy_tree(tree, *, clip_norm, rescale_to_unit_norm=False):
  clipped, norm = clipjax.clip_grad_norm(tree, clip_norm)
  return {"clipped": jax.tree.map(lambda x: x / clip_norm, clipped) if rescale_to_unit_norm else clipped, "norm": norm}


def privacy_tree_layers(tree, *, limits):
  tx = clipjax.clip_by_group_norm(limits, lambda path, leaf: path.split("/")[0])
  clipped, state = jax.jit(tx.update)(tree, tx.init(tree))
  return {"clipped": clipped, "norms": dict(zip(limits, state.norms, strict=True))}


def privacy_sum(grads, *, l2_clip_norm, is_padding_example=None, rescale_to_unit_norm=False):
  norms = clipjax.clip_grad_per_example(grads, l2_clip_norm)[1]
  if is_padding_example is not None:  # An example that is none is one of zeros.
    real = ~np.array(is_padding_example)
    grads = jax.tree.map(lambda x: x * real.reshape(-1, *(1 for _ in x.shape[1:])), grads)
  total = clipjax.clip_grad_per_example(grads, l2_clip_norm)[0]
  return {"sum": total / l2_clip_norm if rescale_to_unit_norm else total, "norms": norms}


def privacy_sum_layers(grads, *, limits):
  each = {layer: clipjax.clip_grad_per_example(grads[layer], limit) for layer, limit in limits.items()}
  return {"sum": {k: total for k, (total, _) in each.items()}, "norms": {k: norms for k, (_, norms) in each.items()}}


CALLS = {
  ("torch", "clip_grad_norm_"): torch_norm,
  ("torch", "clip_grad_norm_, twice"): torch_norm_twice,
  ("torch", "clip_grads_with_norm_"): torch_given_norm,
  ("torch", "get_total_norm"): lambda g, norm_type: {"norm": clipjax.global_norm(g, norm_type)},
  ("torch", "vector_norm"): lambda g, ord: {"norms": list(clipjax.leaf_norms(g, ord))},
  ("torch", "clip_grad_value_"): lambda g, clip_value: {"clipped": clipjax.clip_grad_value(g, clip_value)},
  ("torch", "SGD"): torch_sgd,
  ("tensorflow", "clip_by_value"): tensorflow_value,
  ("tensorflow", "clip_by_norm"): tensorflow_norm,
  ("tensorflow", "clip_by_average_norm"): lambda x, clip_norm: tensorflow_norm(x, clip_norm=clip_norm * x.size),
  ("tensorflow", "clip_by_global_norm"): tensorflow_global_norm,
  ("tensorflow", "global_norm"): lambda g: {"norm": clipjax.global_norm(g)},
  ("tensorflow", "derivative of clip_by_norm"): lambda x, **a: derivative(tensorflow_norm, x, **a),
  ("tensorflow", "derivative of clip_by_value"): lambda x, **a: derivative(tensorflow_value, x, **a),
  ("tensorflow", "keras.optimizers.SGD"): tensorflow_keras,
  ("optax", "clip"): lambda g, limit: {"clipped": update(clipjax.clip_by_value, limit, g)},
  ("optax", "clip_by_block_rms"): lambda g, limit: {"clipped": update(clipjax.clip_by_block_rms, limit, g)},
  ("optax", "clip_by_global_norm"): lambda g, limit: {"clipped": update(clipjax.clip_by_global_norm, limit, g)},
  ("optax", "clip_by_block_rms, repeated"): functools.partial(optax_repeated, clipjax.clip_by_block_rms),
  ("optax", "clip_by_global_norm, repeated"): functools.partial(optax_repeated, clipjax.clip_by_global_norm),
  ("optax", "tree.norm"): lambda g: {"norm": clipjax.global_norm(g)},
  ("optax", "adaptive_grad_clip"): optax_adaptive,
  ("optax", "adaptive_grad_clip, repeated"): lambda g, params, ratios: optax_repeated(
    clipjax.adaptive_grad_clip, g, params=params, limits=ratios
  ),
  ("optax", "per_example_global_norm_clip"): optax_examples,
  ("optax", "per_example_layer_norm_clip"): optax_layers,
  ("optax", "contrib.differentially_private_aggregate"): optax_mean,
  ("jax_privacy", "clip_pytree"): privacy_tree,
  ("jax_privacy", "clip_pytree, by layer"): privacy_tree_layers,
  ("jax_privacy", "clipped_fun"): privacy_sum,
  ("jax_privacy", "clipped_fun, by layer"): privacy_sum_layers,
  ("jax_privacy", "clipped_grad"): privacy_sum,
}


def ours(case):
  with jax.enable_x64(case.is_wide):
    return CALLS[case.library, case.function](case.grads, **case.arguments)


def leaves(tree):
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


def is_finite(tree):
  return all(np.isfinite(x.astype(np.float64)).all() for x in leaves(tree))


def assert_close(got, want, rtol=0.0):
  """Same names, and for each the same structure, shapes, dtypes and numbers, to `rtol` or that of the dtype."""
  assert got.keys() >= want.keys()
  for name in want:
    assert jax.tree.structure(got[name]) == jax.tree.structure(want[name])
    for a, b in zip(leaves(got[name]), leaves(want[name]), strict=True):
      assert a.shape == b.shape
      if name in ("clipped", "weights", "derivative", "again", "once"):
        assert a.dtype == b.dtype
      # A norm is float32 here, of 16-bit leaves too, and so is a sum of examples.
      times = max(rtol, *(RTOL.get(x.dtype.name, 0) for x in (a, b)))
      a, b = a.astype(np.float64), b.astype(np.float64)
      # Summands cancel: a sum is held to its largest entry.
      atol = times * np.abs(b).max(initial=0) if name == "sum" else 0
      np.testing.assert_allclose(a, b, rtol=times, atol=atol)


# What this package does instead: for which cases, and how that is checked.

CLIPS_BY_NORM = {
  "clip_grad_norm_", "clip_grad_norm_, twice", "clip_grads_with_norm_", "clip_by_norm", "clip_by_global_norm",
  "clip_by_block_rms",
}  # fmt: skip


def is_whole_nan(case):
  known = case.library in ("torch", "optax") and case.function in CLIPS_BY_NORM
  return (
    known
    and case.arguments.get("norm_type", 2) > 0
    and not is_finite([case.grads, case.arguments.get("total_norm", 0.0)])
  )


def check_whole_nan(case):
  got = ours(case)
  assert all(np.isnan(x.astype(np.float64)).all() for x in leaves(got["clipped"]))
  if case.library == "jax_privacy":
    assert not np.isfinite(got["norm"])
  else:
    assert_close(got, {name: case.outputs[name] for name in case.outputs.keys() & {"norm", "raises"}})


def has_no_such_order(case):
  return case.arguments.get("norm_type", 2) in (0, -1) and "clipped" not in case.outputs


def overflows(case):
  bad = case.function == "clip_grad_norm_, twice" and not np.isfinite(case.outputs.get("norm", 0.0))
  return bad and is_finite(case.grads) and not has_no_such_order(case)


def check_overflow(case):
  got, flat, p = ours(case), np.concatenate(case.grads), case.arguments["norm_type"]
  assert not got["raises"] and case.outputs["raises"]
  norm = oracle_norm(flat, p)
  np.testing.assert_allclose(got["norm"], norm, rtol=1e-14)
  np.testing.assert_allclose(np.concatenate(got["clipped"]), flat / norm, rtol=1e-14)


def check_broken_example(case):
  tree = jax.tree.leaves(case.grads)
  good = np.all([np.isfinite(x.reshape(len(x), -1)).all(1) for x in tree], axis=0)
  call, limit = clipjax.clip_grad_per_example, next(v for k, v in case.arguments.items() if "clip" in k)
  (got, norms), (want, _) = call(tree, limit), call([x[good] for x in tree], limit)
  assert np.array_equal(np.isfinite(norms), good) and not good.all()
  assert is_finite(got)
  helpers.assert_close(got, want)


def check_scaled_to_one(case):
  np.testing.assert_allclose(clipjax.global_norm(case.outputs["clipped"]), 1, rtol=1e-6)
  assert not any(x.any() for x in leaves(clipjax.clip_grad_norm(case.grads, 0.0)[0]))


def check_error(kind, text):
  def check(case):
    with pytest.raises(kind, match=text):
      ours(case)

  return check


DEVIATIONS = {
  "A step is applied whole or not at all: with a norm that is inf or NaN every entry is NaN, not some 0.": (
    is_whole_nan, check_whole_nan,
  ),
  "There is no clip by an order of 0 or below: it is a ValueError.": (
    has_no_such_order, check_error(ValueError, "`ord` must be"),
  ),
  "A finite gradient has a finite norm: what overflows in their sum of powers is clipped like any other.": (
    overflows, check_overflow,
  ),
  "Gradients are floating: integers are a TypeError.": (
    lambda case: case.function == "clip_by_value" and case.grads.dtype.kind in "iu", check_error(TypeError, "floating"),
  ),
  "An example with an inf or a NaN adds nothing to the sum, and its norm says so.": (
    lambda case: case.function in ("per_example_global_norm_clip", "clipped_fun") and not is_finite(case.grads),
    check_broken_example,
  ),
  "An entry that is not finite is not taken for 0: the whole tree is NaN, and its norm says so.": (
    lambda case: case.function == "clip_pytree" and not is_finite(case.grads), check_whole_nan,
  ),
  "Nothing is divided by its norm: a limit of 0 gives zeros.": (
    lambda case: case.arguments.get("rescale_to_unit_norm") is True and case.arguments.get("clip_norm") == 0,
    check_scaled_to_one,
  ),
}  # fmt: skip


def deviation(case):
  """The words for how this package deviates in a case, None where it does not."""
  found = [words for words, (applies, _) in DEVIATIONS.items() if applies(case)]
  assert len(found) <= 1, found
  return found[0] if found else None


def compare(case):
  """Asserts that this package gives what the library gave."""
  if case.outputs.keys() == {"raises"}:
    check_error(ValueError, r"`(max_norm|updates|axis)` must")(case)
    return
  got, want = ours(case), case.outputs
  # Of a limit after another one, each is compared.
  for a, b in zip(got.get("steps", [got]), want.get("steps", [want]), strict=True):
    assert_close(a, b, coarser(case))


def coarser(case):
  """What the library rounds more coarsely than the dtypes of its answers say."""
  dtypes = {x.dtype.name for x in leaves(case.grads)}
  if case.function == "clip_grad_norm_" and len(dtypes) > 1:
    return max(RTOL[name] for name in dtypes)  # The norm of a 16-bit leaf has 16 bits, and the factor is made of it.
  if case.function == "clip_pytree":
    return 2 * RTOL["float16"] if len(dtypes) > 1 else 0.0  # The factor has 16 bits too.
  return 1e-5 if case.function == "SGD" else 0.0  # Twenty steps.


@pytest.mark.parametrize("name", CASES, ids=list(CASES))
def test_golden(name):
  words = deviation(CASES[name])
  (compare if words is None else DEVIATIONS[words][1])(CASES[name])


@pytest.mark.parametrize("words", DEVIATIONS)
def test_where_this_package_deviates_the_library_does_something_else(words):
  cases = [case for case in CASES.values() if deviation(case) == words]
  differing = 0
  for case in cases[:40]:
    try:
      compare(case)
    except (AssertionError, ValueError, TypeError, KeyError):
      differing += 1
  assert differing, f"{len(cases)} cases, all of them the same"


def test_every_function_is_in_the_table_and_has_cases():
  assert {(case.library, case.function) for case in CASES.values()} == set(CALLS)
  assert set(FILE["versions"]) == set(golden.LIBRARIES) == {library for library, _ in CALLS}
  assert {case["grads"] for case in FILE["cases"]} == set(FILE["inputs"])


@pytest.mark.parametrize(("dtype", "values"), [
  ("float32", [0.1, 1e-45, 3.4028235e38, math.inf, -math.inf, math.nan, -0.0]), ("int32", [1, -7]),
  ("float64", [0.1, 5e-324, 1.7976931348623157e308]), ("bfloat16", [0.1, 1e-40, 3.3895314e38]),
])  # fmt: skip
def test_an_array_reads_back_as_it_was(dtype, values):
  x = np.array(values).astype(jnp.dtype(dtype)).reshape(1, -1)
  tree = {"a": [x, None], "b": {"c": x[0, 0], "d": "text", "e": math.inf, "f": [True, 2]}}
  back = golden.decode(golden.json.loads(golden.json.dumps(golden.encode(tree), allow_nan=False)))
  helpers.assert_bits_equal((back["a"], back["b"].pop("c")), (tree["a"], tree["b"].pop("c")))
  assert back["b"] == tree["b"]


def test_the_check_of_the_file_finds_what_changed():
  assert not list(golden.differences(FILE, golden.json.loads(golden.dumps(FILE))))
  changed = golden.json.loads(golden.dumps(FILE))
  changed["versions"]["torch"] = "1.0.0"
  changed["inputs"].pop("torch: zeros")
  first, second, *_ = changed["cases"]
  first["name"] = "another"
  second["outputs"]["norm"]["values"][0] *= 1 + 1e-5
  found = [line.partition(":")[0] for line in golden.differences(FILE, changed)]
  assert sorted(found) == ["case", "inputs", "only fresh", "only stored", "versions"]
  third = golden.json.loads(golden.dumps(FILE))
  third["cases"][0]["outputs"]["norm"]["values"][0] *= 1 + 1e-8  # Rounding.
  assert not list(golden.differences(FILE, third))


@pytest.mark.slow
def test_the_libraries_still_give_these_numbers():
  for library in golden.LIBRARIES:
    if importlib.util.find_spec(library) is None:
      pytest.skip(f"{library} is not installed: `pip install -e '.[bench]'`")
  done = subprocess.run([sys.executable, golden.__file__, "check"], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
