"""The table "Where it differs on purpose" of docs/hardening.md: each row is computed, on both sides."""

import functools
import math
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import first_step

import clipjax

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "hardening.md"
HEADING = "Where it differs on purpose"
ONE, HUGE, TINY, INF, ZEROS = [3.0, 4.0], [3e20, 4e20], [3e-7, 4e-7], [1.0, math.inf], [0.0, 0.0]


def optax_and_ours(name, ours, limit, values, params=None, **options):
  """The updates of both transformations."""
  grads = jnp.asarray(values, jnp.float32)
  params = None if params is None else jnp.asarray(params, jnp.float32)
  return tuple(
    lambda *_, factory=factory: first_step(factory(limit, **options), grads, params)[0]
    for factory in (getattr(optax, name), ours)
  )


def examples_and_ours(values, limit, part, dtype=jnp.float32):
  """The sum of clipped examples (0), or what comes beside it (1)."""
  x = jnp.asarray(values, dtype)
  return (
    lambda _: jax.tree.leaves(optax.per_example_global_norm_clip([x], limit)[part]),
    lambda: clipjax.clip_grad_per_example(x, limit)[part],
  )


def torch_and_ours(values, max_norm=1.0, norm_type=2.0, **options):
  """The gradient after each clip of its norm; with `error_if_nonfinite` each may raise."""
  policy = "error" if options else "propagate"
  return (
    lambda torch: torch_gradient(torch, torch.nn.utils.clip_grad_norm_, values, max_norm, norm_type, **options),
    lambda: clipjax.clip_grad_norm(jnp.array(values), max_norm, norm_type, on_nonfinite=policy)[0],
  )


def torch_value_and_ours(values, bound, dtype="float32"):
  return (
    lambda torch: torch_gradient(torch, torch.nn.utils.clip_grad_value_, values, bound, dtype=dtype),
    lambda: clipjax.clip_grad_value(jnp.array(values, dtype), bound),
  )


def torch_gradient(torch, clip, values, *arguments, dtype="float32", **options):
  parameter = torch.nn.Parameter(torch.zeros(len(values), dtype=getattr(torch, dtype)))
  parameter.grad = torch.tensor(values, dtype=getattr(torch, dtype))
  clip([parameter], *arguments, **options)
  return parameter.grad.float()


def tensorflow_norm_and_ours(values, limit):
  x = jnp.asarray(values, jnp.float32)
  return lambda tf: tf.clip_by_norm(values, limit), lambda: first_step(clipjax.clip_by_leaf_norm(limit), x)[0]


def tensorflow_global_and_ours(values, limit):
  x = jnp.asarray(values, jnp.float32)
  return (
    lambda tf: tf.clip_by_global_norm([tf.constant(values)], limit)[0][0], lambda: clipjax.clip_grad_norm(x, limit)[0],
  )  # fmt: skip


def gradient_at_zero(tx):
  return jax.grad(lambda x: first_step(tx, x)[0][0])(jnp.zeros(2))


GLOBAL = functools.partial(optax_and_ours, "clip_by_global_norm", clipjax.clip_by_global_norm)
RMS = functools.partial(optax_and_ours, "clip_by_block_rms", clipjax.clip_by_block_rms)
AGC = functools.partial(optax_and_ours, "adaptive_grad_clip", clipjax.adaptive_grad_clip, params=TINY)
# The first two cells of a row -> theirs, to which a module other than Optax is handed in, and ours.
ROWS = {
  ("Optax", "`clip_by_global_norm(1)` of float32 `[3e20, 4e20]`"): GLOBAL(1.0, HUGE),
  ("Optax", "`clip_by_global_norm(1)` of `[1, inf]`"): GLOBAL(1.0, INF),
  ("Optax", "`clip_by_global_norm(-1)` of `[3, 4]`"): GLOBAL(-1.0, ONE),
  ("Optax", "`clip_by_global_norm(0)` of zeros"): GLOBAL(0.0, ZEROS),
  ("Optax", "derivative of `clip_by_global_norm(1)` at zeros"): (
    lambda _: gradient_at_zero(optax.clip_by_global_norm(1.0)),
    lambda: gradient_at_zero(clipjax.clip_by_global_norm(1.0)),
  ),
  ("Optax", "`global_norm` of 300 bfloat16 leaves `[1]`"): (
    lambda _: optax.tree.norm([jnp.ones(1, jnp.bfloat16)] * 300),
    lambda: clipjax.global_norm([jnp.ones(1, jnp.bfloat16)] * 300),
  ),
  ("Optax", "`clip_by_block_rms(0)` of zeros"): RMS(0.0, ZEROS),
  ("Optax", "`clip_by_block_rms(1)` of `[1, inf]`"): RMS(1.0, INF),
  ("Optax", "`clip(-1)` of `[3, 4]`"): optax_and_ours("clip", clipjax.clip_by_value, -1.0, ONE),
  ("Optax", "`adaptive_grad_clip(0.01, eps=0)` of `[3e-7, 4e-7]`, parameters the same"): AGC(0.01, TINY, eps=0.0),
  ("Optax", "`adaptive_grad_clip(0.01)` of `[1, inf]`"): AGC(0.01, INF),
  ("Optax", "`per_example_global_norm_clip` of `[3, 4]` and `[inf, 1]` to 1, the sum"): examples_and_ours(
    [ONE, [math.inf, 1.0]], 1.0, 0
  ),
  ("Optax", "`per_example_global_norm_clip` of `[3, 4]` and `[0.3, 0.4]` to 1, what comes beside the sum"): (
    examples_and_ours([ONE, [0.3, 0.4]], 1.0, 1)
  ),
  ("Optax", "`per_example_global_norm_clip` of 3000 float16 examples `[300, 400]` to 100"): examples_and_ours(
    [[300.0, 400.0]] * 3000, 100.0, 0, jnp.float16
  ),
  ("Optax", "`per_example_global_norm_clip` of no leaves"): (
    lambda _: optax.per_example_global_norm_clip([], 1.0)[0], lambda: clipjax.clip_grad_per_example([], 1.0)[0],
  ),
  ("torch", "`clip_grad_norm_` of `[1, inf]` to 1"): torch_and_ours(INF),
  ("torch", "`clip_grad_norm_` of float32 `[3e20, 4e20]` to 1"): torch_and_ours(HUGE),
  ("torch", "`clip_grad_norm_` of `[3, 4]` to -1"): torch_and_ours(ONE, -1.0),
  ("torch", "`clip_grad_norm_` of `[3e-7, 4e-7]` to 1e-7"): torch_and_ours(TINY, 1e-7),
  ("torch", "`get_total_norm` of order 0 of `[1, 2]` and `[3]`"): (
    lambda torch: torch.nn.utils.get_total_norm([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], 0.0),
    lambda: clipjax.global_norm([jnp.array([1.0, 2.0]), jnp.array([3.0])], 0),
  ),
  ("torch", "`clip_grad_norm_` of `[3, 4]` to 1, order 0"): torch_and_ours(ONE, norm_type=0.0),
  ("torch", "`clip_grad_norm_` of `[3, 4]` to 1, order \"inf\""): torch_and_ours(ONE, norm_type="inf"),
  ("torch", "`clip_grad_norm_` of `[1, inf]`, `error_if_nonfinite=True`"): torch_and_ours(INF, error_if_nonfinite=True),
  ("torch", "`clip_grad_value_` of `[3, 4]` to -1"): torch_value_and_ours(ONE, -1.0),
  ("torch", "`clip_grad_value_` of float16 `[3, 4]` to 1e9"): torch_value_and_ours(ONE, 1e9, "float16"),
  ("torch", "`clip_grad_value_` of no parameters"): (
    lambda torch: torch.nn.utils.clip_grad_value_([], 1.0), lambda: clipjax.clip_grad_value([], 1.0),
  ),
  ("TensorFlow", "`clip_by_norm` of `[1, inf]` to 1"): tensorflow_norm_and_ours(INF, 1.0),
  ("TensorFlow", "`clip_by_norm` of float32 `[3e20, 4e20]` to 1"): tensorflow_norm_and_ours(HUGE, 1.0),
  ("TensorFlow", "`clip_by_norm` of `[3, 4]` to -1"): tensorflow_norm_and_ours(ONE, -1.0),
  ("TensorFlow", "`clip_by_norm` of zeros to 0"): tensorflow_norm_and_ours(ZEROS, 0.0),
  ("TensorFlow", "`clip_by_norm` of `[3, 4]` to inf"): tensorflow_norm_and_ours(ONE, math.inf),
  ("TensorFlow", "`clip_by_global_norm` of `[3, 4]` to inf"): tensorflow_global_and_ours(ONE, math.inf),
  ("TensorFlow", "`clip_by_global_norm` of `[3, 4]` to -1"): tensorflow_global_and_ours(ONE, -1.0),
  ("TensorFlow", "`clip_by_global_norm` of zeros to 0"): tensorflow_global_and_ours(ZEROS, 0.0),
  ("TensorFlow", "`clip_by_global_norm` of float32 `[3e20, 4e20]` to 1"): tensorflow_global_and_ours(HUGE, 1.0),
  ("TensorFlow", "`linalg.global_norm` of float16 `[300, 400]`"): (
    lambda tf: tf.linalg.global_norm([tf.constant([300.0, 400.0], tf.float16)]),
    lambda: clipjax.global_norm(jnp.array([300.0, 400.0], jnp.float16)),
  ),
  ("TensorFlow", "`clip_by_global_norm` of one tensor, not in a list, `[3, 4]` to 1"): (
    lambda tf: tf.clip_by_global_norm(tf.constant(ONE), 1.0), lambda: clipjax.clip_grad_norm(jnp.array(ONE), 1.0)[0],
  ),
}  # fmt: skip


def shown(call):
  """What a call gives, as a cell: its numbers to three digits, "none" for no leaves, or the type of its error."""
  with warnings.catch_warnings(), np.errstate(all="ignore"):
    warnings.simplefilter("ignore")
    try:
      value = call()
    except Exception as error:
      return type(error).__name__
  leaves = jax.tree.leaves(value) if isinstance(value, list | tuple) else [value]
  numbers = [f"{x + 0.0:.3g}" for leaf in leaves for x in np.ravel(np.asarray(leaf)).astype(np.float64)]
  return ", ".join(numbers) or "none"


def table():
  """The rows of the page: the first two cells -> the others."""
  section = PAGE.read_text(encoding="utf-8").partition(f"## {HEADING}\n")[2].partition("\n## ")[0]
  lines = [line for line in section.splitlines() if line.startswith("|")]
  rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
  assert rows[0] == ["library", "input", "theirs", "ours", "why"] and set("".join(rows[1])) == {"-"}
  return {tuple(row[:2]): row[2:] for row in rows[2:]}


def test_the_table_has_these_rows_and_no_other():
  assert list(table()) == list(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_what_we_do_is_what_the_table_says(row):
  theirs, ours, why = table()[row]
  assert shown(ROWS[row][1]) == ours
  assert theirs != ours and len(why) > 10


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_what_they_do_is_what_the_table_says(row, standard_promotion):
  library = None if row[0] == "Optax" else pytest.importorskip(row[0].lower())
  assert shown(lambda: ROWS[row][0](library)) == table()[row][0]
