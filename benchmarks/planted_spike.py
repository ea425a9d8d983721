"""The picture of the README: a spike in one layer of a Transformer, found by step and layer.

  python benchmarks/planted_spike.py --out docs/spike.png

A Transformer with eight scanned layers learns the text of Python's documentation under Adam and a clip. At one step the
gradient of one layer is multiplied by 300. Nothing tells the recorder about it. The program prints the verdict on the
recorded run and draws the run with the functions that draw a report.
"""

import argparse
import pathlib
import tempfile
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax

import clipjax
from clipjax.runs.report.axes import WIDE
from clipjax.runs.report.course import timeline_of
from clipjax.runs.report.grid import steps_of
from clipjax.runs.report.shown import shown_of
from clipjax.runs.report.timeline import timeline

LAYERS, WIDTH, HEADS, LENGTH, BATCH, CHARACTERS = 8, 64, 4, 64, 16, 128
STEPS, SPIKE_STEP, SPIKE_LAYER, SPIKE_FACTOR = 300, 200, 5, 300.0
EVERY = 4  # Norms by leaf at every fourth step.

Params = dict[str, Any]


def init(key: jax.Array) -> Params:
  """Parameters; axis 0 of the arrays in `blocks` counts layers."""
  keys = iter(jax.random.split(key, 4))
  normal = lambda shape, scale: jax.random.normal(next(keys), shape) * scale  # noqa: E731
  blocks = {
    "read": normal((LAYERS, WIDTH, 7 * WIDTH), WIDTH**-0.5),
    "write": normal((LAYERS, 5 * WIDTH, WIDTH), (10 * LAYERS * WIDTH) ** -0.5),
  }
  embed, place = normal((CHARACTERS, WIDTH), WIDTH**-0.5), normal((LENGTH, WIDTH), WIDTH**-0.5)
  return {"blocks": blocks, "embed": embed, "place": place}


def rms_norm(x: jax.Array) -> jax.Array:
  """Each vector over its root mean square."""
  return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def block(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
  """Attention and a feed-forward net side by side: one matrix reads for both, one writes."""
  *qkv, hidden = jnp.split(rms_norm(x) @ w["read"], [WIDTH, 2 * WIDTH, 3 * WIDTH], axis=-1)
  q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in qkv)
  mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
  return x + jnp.concatenate([mixed, jax.nn.gelu(hidden)], axis=-1) @ w["write"], None


def loss_fn(params: Params, windows: jax.Array) -> jax.Array:
  """The mean cross-entropy of the next character, in nats."""
  x = params["embed"][windows[:, :-1]] + params["place"]
  x, _ = jax.lax.scan(block, x, params["blocks"])
  logits = rms_norm(x) @ params["embed"].T
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def plant(grads: Params, factor: jax.Array) -> Params:
  """The gradient with one layer multiplied by `factor`."""
  blocks = jax.tree.map(lambda g: g.at[SPIKE_LAYER].multiply(factor), grads["blocks"])
  return grads | {"blocks": blocks}


def record(path: pathlib.Path) -> clipjax.runs.Run:
  """Trains, records and reads the run."""
  stacked = {"blocks": 0, "embed": None, "place": None}
  tx = optax.chain(clipjax.watch(stacked=stacked), clipjax.clip_by_global_norm(1.0), optax.adam(2e-3))

  @jax.jit
  def step(params: Params, opt_state: Any, windows: jax.Array, factor: jax.Array) -> tuple[Params, Any, jax.Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params, windows)
    updates, opt_state = tx.update(plant(grads, factor), opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
  codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
  rng, params = np.random.default_rng(0), init(jax.random.key(0))
  opt_state = tx.init(params)
  with clipjax.runs.Recorder(path, every=EVERY) as recorder:
    for i in range(1, STEPS + 1):
      windows = codes[rng.integers(len(codes) - LENGTH, size=(BATCH, 1)) + np.arange(LENGTH + 1)]
      factor = jnp.float32(SPIKE_FACTOR if i == SPIKE_STEP else 1.0)
      params, opt_state, loss = step(params, opt_state, windows, factor)
      recorder.push(i, opt_state, loss=loss)
  return clipjax.runs.read_run(path)


def draw(run: clipjax.runs.Run, report: clipjax.runs.HealthReport, out: pathlib.Path) -> None:
  """The norm and the layers on one axis of steps."""
  found = timeline_of(shown_of(run, report))._replace(losses=())
  with mpl.rc_context({"font.size": 9}):
    timeline(found, steps_of(run.steps), WIDE).savefig(out, dpi=110)


def main() -> None:
  """Prints the verdict and draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/spike.png"))
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    run = record(pathlib.Path(folder, "run.jsonl"))
  report = clipjax.runs.diagnose(run)
  print(report)
  draw(run, report, args.out)


if __name__ == "__main__":
  main()
