"""The process that compiles for one target; `accelerators.py` starts it. It is not a command.

Arguments: the target, then a JSON object with "only", "dtypes", "quick", "rounds" and "kept". It prints each finished
case as a line of JSON. It needs the variables of `accelerators_targets.environment`.
"""

import json
import math
import sys
import time
from typing import Any

import jax
import optax
from accelerators_hlo import count, traffic
from accelerators_kept import kept
from accelerators_steps import SEQUENCE, Case, cases, step_of, transformations
from accelerators_targets import TARGETS, mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from speed_trees import ITEMSIZE

BATCH = 8  # Sequences on one device; many devices have one each.


def sharding(mesh_: Mesh, shape: tuple[int, ...]) -> NamedSharding:
  """Splits matrices, also in stacks, over both axes if they divide evenly; replicates everything else."""
  divides = len(shape) >= 2 and shape[-2] % mesh_.shape["x"] == 0 and shape[-1] % mesh_.shape["y"] == 0
  return NamedSharding(mesh_, PartitionSpec(*[None] * (len(shape) - 2), "x", "y") if divides else PartitionSpec())


def lowered(tx: optax.GradientTransformation, case: Case, dtype: str, mesh_: Mesh) -> Any:
  """One step, traced and lowered for the mesh."""

  def placed(x: Any, spec: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec or sharding(mesh_, x.shape))

  params = {name: placed(jax.ShapeDtypeStruct(shape, dtype)) for name, shape in case.shapes.items()}
  state = jax.tree.map(placed, jax.eval_shape(tx.init, params))
  specs = jax.tree.map(lambda x: x.sharding, (params, state))
  data: Any = params
  if case.trains:
    batch = mesh_.size if mesh_.size > 1 else BATCH
    tokens = jax.ShapeDtypeStruct((batch, SEQUENCE + 1), "int32")
    data = placed(tokens, NamedSharding(mesh_, PartitionSpec(("x", "y"))))
  step = step_of(tx, case.trains, specs[0])
  jax.clear_caches()
  return jax.jit(step, donate_argnums=(1, 2), out_shardings=specs).lower(data, state, params)


def facts(program: Any, on_tpu: bool) -> dict[str, Any]:
  """The counts, traffic and temporaries of a program."""
  text = program.as_text()
  found = {**count(text)._asdict(), "temporaries": program.memory_analysis().temp_size_in_bytes}
  if on_tpu:
    found["traffic"], found["traffic_in_branches"] = traffic(text)
  return found


def measured(case: Case, dtype: str, target: str, mesh_: Mesh, rounds: int, folder: str | None) -> dict[str, Any]:
  """All clips in one case; compile times are the best of several rounds in which the clips take turns."""
  variants: dict[str, dict[str, Any]] = {}
  for _ in range(rounds):
    for name, tx in transformations(case, optax.adam(1e-3)).items():
      start = time.perf_counter()
      step = lowered(tx, case, dtype, mesh_)

      def made(step: Any = step, start: float = start) -> dict[str, Any]:
        program = step.compile()
        seconds = time.perf_counter() - start
        return {**facts(program, bool(TARGETS[target].topology)), "compile": seconds}

      found = kept(folder, target, step, made)
      best = min(found["compile"], variants.get(name, found)["compile"])
      variants[name] = {**variants.get(name, found), "compile": best}
  parts = (math.prod(sharding(mesh_, shape).shard_shape(shape)) for shape in case.shapes.values())
  return {
    "title": case.title,
    "dtype": dtype,
    "leaves": len(case.shapes),
    "parameters": sum(math.prod(shape) for shape in case.shapes.values()),
    "gradient": sum(parts) * ITEMSIZE[dtype],  # Bytes on one device.
    "variants": variants,
  }


def main() -> None:
  """Compiles the requested cases one by one."""
  target, asked = sys.argv[1], json.loads(sys.argv[2])
  mesh_ = mesh(target)
  # The first program of a process takes seconds longer, so an untimed one goes first.
  jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "float32", sharding=sharding(mesh_, ()))).compile()
  for key in asked["only"]:
    for dtype in asked["dtypes"]:
      case = cases(asked["quick"])[key]
      found = measured(case, dtype, target, mesh_, asked["rounds"], asked["kept"])
      print(json.dumps({"target": target, "key": key, **found}), flush=True)


if __name__ == "__main__":
  main()
