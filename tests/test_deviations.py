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

import clipjax

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "hardening.md"
HEADING = "Where it differs on purpose"
ONE, HUGE, TINY, INF = [3.0, 4.0], [3e20, 4e20], [3e-7, 4e-7], [1.0, math.inf]


def clip_norm(values, max_norm=1.0, dtype=jnp.float32, **options):
  return clipjax.clip_grad_norm(jnp.asarray(values, dtype), max_norm, **options)[0]


def leaf_norm(values, max_norm=1.0):
  tx, x = clipjax.clip_by_leaf_norm(max_norm), jnp.asarray(values, jnp.float32)
  return tx.update(x, tx.init(x))[0]


def optax_clip(factory, values, dtype=jnp.float32, params=None):
  x = jnp.asarray(values, dtype)
  return factory.update(x, factory.init(x), params)[0]


def gradient_at_zero(tx):
  return jax.grad(lambda x: tx.update(x, tx.init(x))[0][0])(jnp.zeros(2))


def agc(factory, gradient):
  return optax_clip(factory(0.01), gradient, params=jnp.array([3e-7, 4e-7]))


def examples(values, dtype=jnp.float32):
  return jnp.asarray(values, dtype)


def torch_clip(torch, values, max_norm=1.0, dtype="float32", **options):
  parameter = torch.nn.Parameter(torch.zeros(len(values), dtype=getattr(torch, dtype)))
  parameter.grad = torch.tensor(values, dtype=getattr(torch, dtype))
  torch.nn.utils.clip_grad_norm_([parameter], max_norm, **options)
  return parameter.grad.float()


def torch_value(torch, values, bound, dtype="float32"):
  parameter = torch.nn.Parameter(torch.zeros(len(values), dtype=getattr(torch, dtype)))
  parameter.grad = torch.tensor(values, dtype=getattr(torch, dtype))
  torch.nn.utils.clip_grad_value_([parameter], bound)
  return parameter.grad.float()


# The first two cells of a row -> theirs, to which a module other than Optax is handed in, and ours.
ROWS = {
  ("Optax", "`clip_by_global_norm(1)` of float32 `[3e20, 4e20]`"): (
    lambda _: optax_clip(optax.clip_by_global_norm(1.0), HUGE), lambda: clip_norm(HUGE),
  ),
  ("Optax", "`clip_by_global_norm(1)` of `[1, inf]`"): (
    lambda _: optax_clip(optax.clip_by_global_norm(1.0), INF), lambda: clip_norm(INF),
  ),
  ("Optax", "`clip_by_global_norm(-1)` of `[3, 4]`"): (
    lambda _: optax_clip(optax.clip_by_global_norm(-1.0), ONE), lambda: clipjax.clip_by_global_norm(-1.0),
  ),
  ("Optax", "`clip_by_global_norm(0)` of zeros"): (
    lambda _: optax_clip(optax.clip_by_global_norm(0.0), [0.0, 0.0]), lambda: clip_norm([0.0, 0.0], 0.0),
  ),
  ("Optax", "derivative of `clip_by_global_norm(1)` at zeros"): (
    lambda _: gradient_at_zero(optax.clip_by_global_norm(1.0)),
    lambda: gradient_at_zero(clipjax.clip_by_global_norm(1.0)),
  ),
  ("Optax", "`global_norm` of 300 bfloat16 leaves `[1]`"): (
    lambda _: optax.tree.norm([jnp.ones(1, jnp.bfloat16)] * 300),
    lambda: clipjax.global_norm([jnp.ones(1, jnp.bfloat16)] * 300),
  ),
  ("Optax", "`clip_by_block_rms(0)` of zeros"): (
    lambda _: optax_clip(optax.clip_by_block_rms(0.0), [0.0, 0.0]),
    lambda: optax_clip(clipjax.clip_by_block_rms(0.0), [0.0, 0.0]),
  ),
  ("Optax", "`clip_by_block_rms(1)` of `[1, inf]`"): (
    lambda _: optax_clip(optax.clip_by_block_rms(1.0), INF), lambda: optax_clip(clipjax.clip_by_block_rms(1.0), INF),
  ),
  ("Optax", "`clip(-1)` of `[3, 4]`"): (
    lambda _: optax_clip(optax.clip(-1.0), ONE), lambda: clipjax.clip_by_value(-1.0),
  ),
  ("Optax", "`adaptive_grad_clip(0.01, eps=0)` of `[3e-7, 4e-7]`, parameters the same"): (
    lambda _: agc(functools.partial(optax.adaptive_grad_clip, eps=0.0), TINY),
    lambda: agc(functools.partial(clipjax.adaptive_grad_clip, eps=0.0), TINY),
  ),
  ("Optax", "`adaptive_grad_clip(0.01)` of `[1, inf]`"): (
    lambda _: agc(optax.adaptive_grad_clip, INF), lambda: agc(clipjax.adaptive_grad_clip, INF),
  ),
  ("Optax", "`per_example_global_norm_clip` of `[3, 4]` and `[inf, 1]` to 1, the sum"): (
    lambda _: optax.per_example_global_norm_clip([examples([ONE, [math.inf, 1.0]])], 1.0)[0][0],
    lambda: clipjax.clip_grad_per_example(examples([ONE, [math.inf, 1.0]]), 1.0)[0],
  ),
  ("Optax", "`per_example_global_norm_clip` of `[3, 4]` and `[0.3, 0.4]` to 1, what comes beside the sum"): (
    lambda _: optax.per_example_global_norm_clip([examples([ONE, [0.3, 0.4]])], 1.0)[1],
    lambda: clipjax.clip_grad_per_example(examples([ONE, [0.3, 0.4]]), 1.0)[1],
  ),
  ("Optax", "`per_example_global_norm_clip` of 3000 float16 examples `[300, 400]` to 100"): (
    lambda _: optax.per_example_global_norm_clip([examples([[300.0, 400.0]] * 3000, jnp.float16)], 100.0)[0][0],
    lambda: clipjax.clip_grad_per_example(examples([[300.0, 400.0]] * 3000, jnp.float16), 100.0)[0],
  ),
  ("Optax", "`per_example_global_norm_clip` of no leaves"): (
    lambda _: optax.per_example_global_norm_clip([], 1.0)[0], lambda: clipjax.clip_grad_per_example([], 1.0)[0],
  ),
  ("torch", "`clip_grad_norm_` of `[1, inf]` to 1"): (lambda torch: torch_clip(torch, INF), lambda: clip_norm(INF)),
  ("torch", "`clip_grad_norm_` of float32 `[3e20, 4e20]` to 1"): (
    lambda torch: torch_clip(torch, HUGE), lambda: clip_norm(HUGE),
  ),
  ("torch", "`clip_grad_norm_` of `[3, 4]` to -1"): (
    lambda torch: torch_clip(torch, ONE, -1.0), lambda: clip_norm(ONE, -1.0),
  ),
  ("torch", "`clip_grad_norm_` of `[3e-7, 4e-7]` to 1e-7"): (
    lambda torch: torch_clip(torch, TINY, 1e-7), lambda: clip_norm(TINY, 1e-7),
  ),
  ("torch", "`get_total_norm` of order 0 of `[1, 2]` and `[3]`"): (
    lambda torch: torch.nn.utils.get_total_norm([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], 0.0),
    lambda: clipjax.global_norm([jnp.array([1.0, 2.0]), jnp.array([3.0])], 0),
  ),
  ("torch", "`clip_grad_norm_` of `[3, 4]` to 1, order 0"): (
    lambda torch: torch_clip(torch, ONE, norm_type=0.0), lambda: clip_norm(ONE, ord=0),
  ),
  ("torch", "`clip_grad_norm_` of `[3, 4]` to 1, order \"inf\""): (
    lambda torch: torch_clip(torch, ONE, norm_type="inf"), lambda: clip_norm(ONE, ord="inf"),
  ),
  ("torch", "`clip_grad_norm_` of `[1, inf]`, `error_if_nonfinite=True`"): (
    lambda torch: torch_clip(torch, INF, error_if_nonfinite=True), lambda: clip_norm(INF, on_nonfinite="error"),
  ),
  ("torch", "`clip_grad_value_` of `[3, 4]` to -1"): (
    lambda torch: torch_value(torch, ONE, -1.0), lambda: clipjax.clip_grad_value(jnp.array(ONE), -1.0),
  ),
  ("torch", "`clip_grad_value_` of float16 `[3, 4]` to 1e9"): (
    lambda torch: torch_value(torch, ONE, 1e9, "float16"),
    lambda: clipjax.clip_grad_value(jnp.array(ONE, jnp.float16), 1e9),
  ),
  ("torch", "`clip_grad_value_` of no parameters"): (
    lambda torch: torch.nn.utils.clip_grad_value_([], 1.0), lambda: clipjax.clip_grad_value([], 1.0),
  ),
  ("TensorFlow", "`clip_by_norm` of `[1, inf]` to 1"): (lambda tf: tf.clip_by_norm(INF, 1.0), lambda: leaf_norm(INF)),
  ("TensorFlow", "`clip_by_norm` of float32 `[3e20, 4e20]` to 1"): (
    lambda tf: tf.clip_by_norm(HUGE, 1.0), lambda: leaf_norm(HUGE),
  ),
  ("TensorFlow", "`clip_by_norm` of `[3, 4]` to -1"): (
    lambda tf: tf.clip_by_norm(ONE, -1.0), lambda: leaf_norm(ONE, -1.0),
  ),
  ("TensorFlow", "`clip_by_norm` of zeros to 0"): (
    lambda tf: tf.clip_by_norm([0.0, 0.0], 0.0), lambda: leaf_norm([0.0, 0.0], 0.0),
  ),
  ("TensorFlow", "`clip_by_norm` of `[3, 4]` to inf"): (
    lambda tf: tf.clip_by_norm(ONE, math.inf), lambda: leaf_norm(ONE, math.inf),
  ),
  ("TensorFlow", "`clip_by_global_norm` of `[3, 4]` to inf"): (
    lambda tf: tf.clip_by_global_norm([tf.constant(ONE)], math.inf)[0][0], lambda: clip_norm(ONE, math.inf),
  ),
  ("TensorFlow", "`clip_by_global_norm` of `[3, 4]` to -1"): (
    lambda tf: tf.clip_by_global_norm([tf.constant(ONE)], -1.0)[0][0], lambda: clip_norm(ONE, -1.0),
  ),
  ("TensorFlow", "`clip_by_global_norm` of zeros to 0"): (
    lambda tf: tf.clip_by_global_norm([tf.constant([0.0, 0.0])], 0.0)[0][0], lambda: clip_norm([0.0, 0.0], 0.0),
  ),
  ("TensorFlow", "`clip_by_global_norm` of float32 `[3e20, 4e20]` to 1"): (
    lambda tf: tf.clip_by_global_norm([tf.constant(HUGE)], 1.0)[0][0], lambda: clip_norm(HUGE),
  ),
  ("TensorFlow", "`linalg.global_norm` of float16 `[300, 400]`"): (
    lambda tf: tf.linalg.global_norm([tf.constant([300.0, 400.0], tf.float16)]),
    lambda: clipjax.global_norm(jnp.array([300.0, 400.0], jnp.float16)),
  ),
  ("TensorFlow", "`clip_by_global_norm` of one tensor, not in a list, `[3, 4]` to 1"): (
    lambda tf: tf.clip_by_global_norm(tf.constant(ONE), 1.0), lambda: clip_norm(ONE),
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
