"""The table of docs/coming_from.md: what Optax's clip does with hard gradients, and what clipjax does.

  python benchmarks/against_optax.py                              prints the table
  python benchmarks/against_optax.py --check docs/coming_from.md  exits with 1 if the page ends with another one

It computes every cell on the CPU, in a few seconds.
"""

import argparse
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax


def clipped(factory: Any, grads: Any, max_norm: Any = 1.0) -> Any:
  """The updates of one jitted step."""
  tx = factory(max_norm)
  return jax.jit(lambda g: tx.update(g, tx.init(g))[0])(grads)


def show(x: Any) -> str:
  """A number or a few numbers in short form."""
  flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])
  return ", ".join(f"{v:.3g}" for v in flat[:3]) + (", ..." if flat.size > 3 else "")


def outcome(fn: Callable[[], Any]) -> str:
  """The result of a call, or the name of the error that it raises."""
  try:
    result = fn()
  except Exception as error:
    return type(error).__name__
  return result if isinstance(result, str) else show(result)


def scan(factory: Any) -> str:
  """Whether a transformation's state can be the carry of a scan, and its content afterwards."""
  tx = factory()
  state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s, g)[1], None), tx.init(jnp.zeros(2)), jnp.ones((3, 2)))
  return "works" + (f", norm {float(v):.3g}" if (v := clipjax.metrics(state).get("grad/norm")) is not None else "")


def injected(factory: Any, tree: Any, **options: Any) -> str:
  """The norm after one step of a clip with an injected threshold."""
  tx = optax.inject_hyperparams(factory)(**options)
  updates, _ = tx.update(tree, tx.init(tree), tree)
  return f"works, norm after {float(clipjax.global_norm(updates)):.3g}"


def in_shard_map(factory: Any) -> str:
  """The norm of a sharded gradient of ones after a clip to 1 inside shard_map."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("x")
  tx = factory(1.0)
  step = jax.shard_map(lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=spec, out_specs=spec)
  return f"norm after: {float(clipjax.global_norm(jax.jit(step)(jnp.ones(64)))):.3g}"


def rows() -> Iterator[tuple[str, str, str]]:
  """`(what, Optax, clipjax)` of every row."""
  rng = np.random.default_rng(0)
  many = [jnp.asarray(rng.standard_normal((64, 64)) * 0.01, jnp.bfloat16) for _ in range(1000)]
  ones = [jnp.ones(1, jnp.bfloat16)] * 3000
  true = math.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in many))
  for what, tree, value in (
    ("norm of 1000 bfloat16 leaves of 64x64", many, true),
    ("norm of 3000 bfloat16 leaves `[1.]`", ones, math.sqrt(3000)),
  ):
    yield f"{what}, true {value:.3g}", show(optax.tree.norm(tree)), show(clipjax.global_norm(tree))

  clips = (optax.clip_by_global_norm, clipjax.clip_by_global_norm)

  def both(what: str, grads: Any, max_norm: Any = 1.0) -> tuple[str, str, str]:
    ours, theirs = (outcome(lambda f=f: clipped(f, grads, max_norm)) for f in reversed(clips))
    return what, theirs, ours

  yield both("clip float32 `[3e20, 4e20]` to 1", jnp.array([3e20, 4e20]))
  yield both("clip float16 `[300, 400]` to 1", jnp.array([300.0, 400.0], jnp.float16))
  yield both("clip float32 `[3e-25, 4e-25]` to 1e-25", jnp.array([3e-25, 4e-25]), 1e-25)
  yield both("clip `[3, 4]` to -1", jnp.array([3.0, 4.0]), -1.0)
  yield both("clip zeros to 0", jnp.zeros(2), 0.0)
  yield both("clip `[1, inf]` to 1 (policy: propagate)", jnp.array([1.0, jnp.inf]))
  zero = lambda m: clipjax.clip_by_global_norm(m, on_nonfinite="zero")  # noqa: E731
  yield "the same (policy: zero)", "no policy", outcome(lambda: clipped(zero, jnp.array([1.0, jnp.inf])))

  def derivative(factory: Any) -> Any:
    return jax.jacrev(lambda g: clipped(factory, g))(jnp.zeros(2))[0]

  yield ("derivative of the clip at zero, first row", *(show(derivative(f)) for f in clips))
  state = [jax.tree.leaves(f(1.0).init(jnp.zeros(2))) for f in clips]
  yield "the norm in the state", "no" if not state[0] else "yes", "yes, `clipjax.metrics`" if state[1] else "no"
  monitor = getattr(optax, "monitor", None)
  theirs = outcome(lambda: scan(lambda: monitor({"norm": optax.tree.norm}))) if monitor else "absent"
  yield "norms inside `lax.scan` (`optax.monitor`)", theirs, outcome(lambda: scan(lambda: clips[1](1.0)))
  mixed = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4)}
  half = {"a": jnp.ones(8, jnp.bfloat16)}
  for what, tree, options in (
    ("`inject_hyperparams`, mixed bfloat16 and float32", mixed, {"max_norm": 1.0}),
    ("the same, bfloat16 and a float32 array", half, {"max_norm": jnp.float32(1.0)}),
  ):
    yield (what, *(outcome(lambda f=f, t=tree, o=options: injected(f, t, **o)) for f in clips))
  yield ("clip 64 ones to 1 inside `shard_map`, 8 shards", *(outcome(lambda f=f: in_shard_map(f)) for f in clips))


def main() -> None:
  """Prints the table as Markdown, or compares it with the end of a page."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--check", type=pathlib.Path, metavar="PAGE")
  args = parser.parse_args()
  print(f"optax {optax.__version__}, jax {jax.__version__}, {jax.devices()[0].platform}\n")
  table = "| what | Optax | clipjax |\n|---|---|---|\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows())
  print(table)
  if args.check is not None and not args.check.read_text(encoding="utf-8").endswith(table):
    raise SystemExit(f"`{args.check}` must end with the table above: copy it there.")


if __name__ == "__main__":
  main()
