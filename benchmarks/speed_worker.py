"""A process that keeps the tensors of torch or TensorFlow and takes one turn at a time, on request of `speed_peers.py`.

It is not a command. Each line of stdin is a JSON object with a key "do": "load" creates the tensors and the variants
and answers with their names, "run" takes a turn of a variant and answers with its seconds, "stop" ends the process.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from speed_trees import TF_EAGER, TF_FUNCTION, TORCH, Shapes, arrays, half_norm
from timing import Turn, turn_of

Works = dict[str, Callable[[], object]]


def torch_works(work: str, shapes: Shapes, dtype: str) -> Works:
  """The variants of torch, which work in place on the gradients of parameters."""
  import torch  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415  (one framework per process)

  device = "cuda" if torch.cuda.is_available() else "cpu"
  grads = [torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in arrays(shapes)]
  max_norm = half_norm(sum(g.numel() for g in grads))

  def done() -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  if work == "norm":

    def norm() -> None:
      torch.nn.utils.get_total_norm(grads, foreach=True)
      done()

    return {TORCH: norm}
  params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
  for p, g in zip(params, grads, strict=True):
    p.grad = g

  def clip() -> None:
    # In place: from the second turn on, the norm equals the threshold. torch still multiplies by the factor.
    torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
    done()

  if work == "clip":
    return {TORCH: clip}

  def step(optimizer: Any, clipped: bool) -> Callable[[], None]:
    def run() -> None:
      if clipped:
        torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
      optimizer.step()
      done()

    return run

  works: Works = {}
  for kind in ("foreach", "fused"):
    optimizer = torch.optim.Adam(params, lr=1e-3, **{kind: True})
    works[f"torch Adam, {kind}"] = step(optimizer, False)
    works[f"torch Adam, {kind}, clip"] = step(optimizer, True)
  return works


def tensorflow_works(work: str, shapes: Shapes, dtype: str) -> Works:
  """The variants of TensorFlow, which create new tensors."""
  import tensorflow as tf  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: PLC0415

  for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)  # Other processes use the same device.
  grads = [tf.cast(tf.constant(x), dtype) for x in arrays(shapes)]
  max_norm = half_norm(sum(int(tf.size(g)) for g in grads))

  def norm() -> Any:
    return tf.linalg.global_norm(grads)

  def clip() -> Any:
    return tf.clip_by_global_norm(grads, max_norm)

  def waited(function: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
      out = function()
      # Read one number: on a GPU, this waits for everything queued before it.
      float(out if work == "norm" else tf.reshape(out[0][-1], [-1])[0])

    return run

  eager = {"norm": norm, "clip": clip}[work]
  # Gradients are captured as inputs: the graph should be timed, not a call with a thousand arguments.
  function = tf.function(eager, jit_compile=False).get_concrete_function()
  return {TF_EAGER: waited(eager), TF_FUNCTION: waited(function)}


WORKS = {"torch": torch_works, "tensorflow": tensorflow_works}


def main() -> None:
  """Answers requests until told to stop or the parent ends."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # Redirects the frameworks' output to stderr.
  works = WORKS[sys.argv[1]]
  turns: dict[str, Turn] = {}
  for line in sys.stdin:
    request = json.loads(line)
    answer: dict[str, Any] = {}
    try:
      if request["do"] == "stop":
        break
      if request["do"] == "load":
        turns.clear()
        warm = request["work"] != "adam"
        found = works(request["work"], request["shapes"], request["dtype"])
        turns |= {name: turn_of(run, warm=warm) for name, run in found.items()}
        for take in turns.values():
          take()
        answer["variants"] = list(turns)
      else:
        answer["seconds"] = turns[request["variant"]]()
    except Exception as error:  # The parent reports it and leaves the variant out.
      answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  main()
