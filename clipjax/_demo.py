"""The demo: one recurrent network trained three times, without and with clipping, shown live and as a picture.

`run` trains the same tanh RNN from the same weights on the same batches, and only `max_norm` differs. It is an
argument of the one compiled step, in which `clipjax.clip_by_global_norm` is chained before the optimizer; all that is
shown of the gradient is what `clipjax.metrics` reads out of the optimizer's state. The text is the prose in the
standard library, so that nothing is downloaded. Every sentence is derived from the numbers of the run.

This module imports rich and matplotlib, the extra `demo`; only the command line imports this module.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

import clipjax

HIDDEN, LENGTH, BATCH, CHARACTERS = 128, 100, 32, 128
LEARNING_RATE, MOMENTUM = 2.0, 0.9
MAX_NORMS = (math.inf, 1.0, 0.25)
READ_EVERY = 10  # Steps between two reads from the device: a read waits for the step, and more would slow the run.
PRINT_EVERY = 100  # Steps between two lines where there is no terminal; a multiple of READ_EVERY.
FINAL_STEPS = 10  # The final loss is the mean over so many steps: a single batch is noisy.

# Okabe and Ito's colours, which are told apart with any colour vision.
COLOURS = ("#D55E00", "#0072B2", "#009E73")
# The small dots show a step between two that are not finite, where there is no line.
LINE: dict[str, Any] = {"linewidth": 1.2, "marker": ".", "markersize": 2.5}

Params = dict[str, jax.Array]
Series = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
Report = Callable[[str, int, dict[str, float]], None]


class Trained(NamedTuple):
  """One run.

  Attributes:
    max_norm: the threshold, inf for none.
    series: "loss" and every key of `clipjax.metrics`; float64, shape (steps,).
    seconds: wall time of the steps, compilation excluded.
  """

  max_norm: float
  series: Series
  seconds: float

  @property
  def label(self) -> str:
    """The name of the run in table and picture."""
    return _label(self.max_norm)


class Summary(NamedTuple):
  """What the table shows of a run. Losses and norms may be inf or NaN; `lowest_` to `median_` leave NaN out."""

  label: str
  steps: int
  first_loss: float
  final_loss: float
  lowest_loss: float
  largest_norm: float
  median_norm: float
  clipped_steps: int
  nonfinite_steps: int
  seconds: float


def run(out: Path, steps: int, seed: int) -> None:
  """Trains, prints, and writes `clipjax_demo.png` and `clipjax_demo.json`.

  Args:
    out: directory of the two files, made where it is missing.
    steps: training steps of each run, at least 1.
    seed: of the weights and the batches, 0 <= seed < 2**32.

  Raises:
    OSError: if the directory cannot be written to, which is tried before the training.
  """
  out.mkdir(parents=True, exist_ok=True)
  tempfile.TemporaryFile(dir=out).close()
  console = Console(markup=False, highlight=False, emoji=False)
  console.print(
    f"A tanh RNN of {HIDDEN} units, unrolled {LENGTH} times, learns to predict the next character with SGD at a "
    f"learning rate of {LEARNING_RATE:g}: first without clipping, then from the same weights on the same batches with "
    "clipjax.clip_by_global_norm(max_norm).\n"
  )
  with _reporter(console, steps) as report:
    runs = train_all(steps, seed, report)
  summaries = [summarize(trained) for trained in runs]
  console.print("", table(summaries, console), "", sep="\n", crop=False)
  console.print(conclusion(summaries))
  picture_path, series_path = out / "clipjax_demo.png", out / "clipjax_demo.json"
  picture(runs).savefig(picture_path, dpi=150)
  series_path.write_text(to_json(runs, seed), encoding="utf-8")
  written = f"\nWrote {picture_path} and {series_path}"
  # A path may hold what stdout cannot encode.
  written = written.encode(console.encoding, "backslashreplace").decode(console.encoding)
  console.print(written, soft_wrap=True)


# Training -----------------------------------------------------------------------------------------------------------


def train_all(steps: int, seed: int, report: Report) -> list[Trained]:
  """One run for each of `MAX_NORMS`, with one compilation.

  Args:
    steps: training steps of each run.
    seed: of the weights and the batches.
    report: called with the name of the run, the step and the values there, every `READ_EVERY` steps and at the last.

  Returns:
    The runs, in order.
  """
  text = jnp.asarray(read_text())
  key_params, key_batches = jax.random.split(jax.random.key(seed))
  params = init_params(key_params)
  opt_state = optimizer(jnp.float32(math.inf)).init(params)
  compiled = jax.jit(train_step).lower(params, opt_state, jnp.float32(0), text, key_batches, jnp.int32(0)).compile()
  runs = []
  for max_norm in MAX_NORMS:
    state: tuple[Params, Any] = params, opt_state
    rows: list[dict[str, float]] = []
    pending: list[dict[str, jax.Array]] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
      *state, values = compiled(*state, jnp.float32(max_norm), text, key_batches, jnp.int32(step))
      pending.append(values)
      if step % READ_EVERY == 0 or step == steps:
        rows += [{name: float(value) for name, value in row.items()} for row in jax.device_get(pending)]
        pending.clear()
        report(_label(max_norm), step, rows[-1])
    seconds = time.perf_counter() - start
    runs.append(Trained(max_norm, {name: np.array([row[name] for row in rows]) for name in rows[0]}, seconds))
  return runs


def read_text() -> np.ndarray[Any, np.dtype[np.uint8]]:
  """The prose of `pydoc_data.topics` as ASCII codes, shape (n,); its few other characters become "?"."""
  text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
  return np.frombuffer(text.encode("ascii", "replace"), np.uint8)


def init_params(key: jax.Array) -> Params:
  """Weights of a network that starts tame: the recurrent matrix has a spectral radius of about 1/2."""
  keys = jax.random.split(key, 3)
  return {
    "embed": jax.random.normal(keys[0], (CHARACTERS, HIDDEN), jnp.float32),
    "recurrent": jax.random.normal(keys[1], (HIDDEN, HIDDEN), jnp.float32) * (0.5 / math.sqrt(HIDDEN)),
    "bias": jnp.zeros(HIDDEN, jnp.float32),
    "out": jax.random.normal(keys[2], (HIDDEN, CHARACTERS), jnp.float32) * 0.01,
    "out_bias": jnp.zeros(CHARACTERS, jnp.float32),
  }


def optimizer(max_norm: jax.Array) -> optax.GradientTransformationExtraArgs:
  """The clip, chained before SGD with momentum; `max_norm=inf` only measures."""
  return optax.chain(clipjax.clip_by_global_norm(max_norm), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))


def train_step(
  params: Params, opt_state: Any, max_norm: jax.Array, text: jax.Array, key: jax.Array, step: jax.Array
) -> tuple[Params, Any, dict[str, jax.Array]]:
  """One step on the batch that `key` and `step` determine; `max_norm` is traced, so that no threshold recompiles it."""
  loss, grads = jax.value_and_grad(loss_fn)(params, batch(text, key, step))
  updates, opt_state = optimizer(max_norm).update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  return params, opt_state, {"loss": loss, **clipjax.metrics(opt_state)}


def batch(text: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
  """The windows of a step, shape (batch, length + 1), int32."""
  starts = jax.random.randint(jax.random.fold_in(key, step), (BATCH, 1), 0, text.size - LENGTH)
  return text[starts + jnp.arange(LENGTH + 1)[None, :]].astype(jnp.int32)


def loss_fn(params: Params, windows: jax.Array) -> jax.Array:
  """Mean cross-entropy, in nats, of each next character in windows of shape (batch, length + 1)."""

  def cell(hidden: jax.Array, embedded: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(embedded + hidden @ params["recurrent"] + params["bias"][None, :])
    return hidden, hidden

  inputs, targets = windows[:, :-1].T, windows[:, 1:].T
  hidden = jnp.zeros((windows.shape[0], HIDDEN), jnp.float32)
  _, hiddens = jax.lax.scan(cell, hidden, params["embed"][inputs])
  logits = hiddens @ params["out"] + params["out_bias"][None, None, :]
  losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return losses.mean()


# Showing ------------------------------------------------------------------------------------------------------------


@contextmanager
def _reporter(console: Console, steps: int) -> Iterator[Report]:
  """Gives what shows the progress: live bars in a terminal, else a plain line now and then."""
  if console.is_terminal and not console.is_dumb_terminal:
    with _bars(console) as progress:
      tasks = {_label(c): progress.add_task(_label(c), total=steps, values="") for c in MAX_NORMS}
      progress.refresh()

      def move_bar(label: str, step: int, values: dict[str, float]) -> None:
        progress.update(tasks[label], completed=step, values=_values_text(values), refresh=True)

      yield move_bar
  else:

    def print_line(label: str, step: int, values: dict[str, float]) -> None:
      if step % PRINT_EVERY == 0 or step == steps:
        console.print(f"{label}: step {step} of {steps}, {_values_text(values)}", soft_wrap=True)

    yield print_line


def _bars(console: Console) -> Progress:
  # "crop": the default of a narrow terminal is an ellipsis, a character that an ASCII terminal does not have.
  def narrow() -> Column:
    return Column(no_wrap=True, overflow="crop")

  return Progress(
    TextColumn("{task.description}", table_column=narrow()),
    BarColumn(bar_width=10, complete_style="cyan", finished_style="green", table_column=narrow()),
    TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=narrow()),
    TextColumn("{task.fields[values]}", table_column=narrow()),
    console=console,
    auto_refresh=False,
  )


def _values_text(values: dict[str, float]) -> str:
  clipped = values["grad/clip_fraction"]
  return f"loss {short(values['loss'])}, norm {short(values['grad/norm'])}, clipped {clipped:.1%}"


def summarize(trained: Trained) -> Summary:
  """The row of the table that belongs to a run."""
  loss, norm = trained.series["loss"], trained.series["grad/norm"]
  return Summary(
    label=trained.label,
    steps=loss.size,
    first_loss=float(loss[0]),
    final_loss=float(loss[-FINAL_STEPS:].mean()),
    lowest_loss=_of_numbers(np.min, loss),
    largest_norm=_of_numbers(np.max, norm),
    median_norm=_of_numbers(np.median, norm),
    clipped_steps=round(float(trained.series["grad/clip_fraction"][-1]) * loss.size),
    nonfinite_steps=int(trained.series["grad/nonfinite_steps"][-1]),
    seconds=trained.seconds,
  )


def table(summaries: Sequence[Summary], console: Console) -> Table:
  """The runs side by side; rich draws it in ASCII where stdout is not Unicode."""
  out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
  out.add_column("run", vertical="bottom")
  titles = "final\nloss", "lowest\nloss", "largest\nnorm", "median\nnorm", "steps\nclipped", "not\nfinite", "time"
  for title in titles:
    out.add_column(title, justify="right")
  for row in summaries:
    out.add_row(
      row.label,
      *(short(x) for x in (row.final_loss, row.lowest_loss, row.largest_norm, row.median_norm)),
      f"{row.clipped_steps / row.steps:.1%}",
      str(row.nonfinite_steps),
      f"{row.seconds:.1f} s",
    )
  # As wide as it needs: in a narrow terminal its lines wrap, and no number is broken or cut.
  out.width = console.measure(out, options=console.options.update(width=200)).maximum
  return out


def conclusion(summaries: Sequence[Summary]) -> str:
  """What the first run, which is unclipped, and the best of the others show together.

  Args:
    summaries: of the runs, at least two.

  Returns:
    Sentences that are true whichever way the runs went.
  """
  free, *others = summaries
  best = min(others, key=lambda row: _as_worst(row.final_loss))
  if short(best.final_loss) == short(free.final_loss):
    verdict = "Clipping made no difference to the final loss"
  elif _as_worst(best.final_loss) < _as_worst(free.final_loss):
    verdict = "Clipping helped"
  else:
    verdict = "Clipping did not help"
  return (
    f"{verdict}: the loss {_course(best)} with {best.label}, and {_course(free)} without clipping (mean of the last "
    f"{min(FINAL_STEPS, free.steps)} steps). The norm of the unclipped gradient had a median of "
    f"{short(free.median_norm)} and reached {short(free.largest_norm)}; with {best.label}, "
    f"{best.clipped_steps} of {best.steps} steps were clipped."
  )


def _course(row: Summary) -> str:
  first, final = short(row.first_loss), short(row.final_loss)
  if not (math.isfinite(row.first_loss) and math.isfinite(row.final_loss)):
    return f"went from {first} to {final}"
  if first == final:
    return f"stayed at {final}"
  return f"{'fell' if row.final_loss < row.first_loss else 'rose'} from {first} to {final}"


def _label(max_norm: float) -> str:
  return "no clipping" if math.isinf(max_norm) else f"max_norm {max_norm:g}"


def short(x: float) -> str:
  """Three digits, and no exponent below a million."""
  return f"{x:,.0f}" if 999.5 <= x < 1e6 else f"{x:.3g}"


def _as_worst(loss: float) -> float:
  return loss if math.isfinite(loss) else math.inf


def _of_numbers(reduce: Callable[[Any], Any], values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
  """`reduce` over what is not NaN; NaN where nothing is left."""
  numbers = values[~np.isnan(values)]
  return float(reduce(numbers)) if numbers.size else math.nan


# Writing ------------------------------------------------------------------------------------------------------------


def to_json(runs: Sequence[Trained], seed: int) -> str:
  """The series of the runs as JSON; a number that is not finite, a `max_norm` of inf included, is null."""
  return json.dumps(
    {
      "clipjax": clipjax.__version__,
      "seed": seed,
      "learning_rate": LEARNING_RATE,
      "momentum": MOMENTUM,
      "runs": [
        {
          "label": trained.label,
          "max_norm": _or_none(trained.max_norm),
          "seconds": trained.seconds,
          "series": {name: [_or_none(x) for x in values.tolist()] for name, values in trained.series.items()},
        }
        for trained in runs
      ],
    },
    allow_nan=False,
  )


def _or_none(x: float) -> float | None:
  return x if math.isfinite(x) else None


def picture(runs: Sequence[Trained]) -> Figure:
  """Loss, and below it the norm of the gradient before the clip, against the step; what is not finite is a gap."""
  figure = Figure(figsize=(9, 8), layout="constrained")
  figure.suptitle(f"A character RNN under SGD at learning rate {LEARNING_RATE:g}, without and with clipping")
  top, bottom = figure.subplots(2, 1, sharex=True)
  for row, (trained, colour) in enumerate(zip(runs, COLOURS, strict=True)):
    _draw_loss(top, trained, colour)
    _draw_norm(bottom, trained, colour, row)
  top.set_ylabel("Loss (nats per character)")
  bottom.set_ylabel("Gradient norm before the clip")
  bottom.set_xlabel("Step")
  for axes in (top, bottom):
    axes.set_yscale("log")
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    if not math.isfinite(axes.dataLim.minposy):
      axes.set_ylim(1, 10)  # Nothing to show: matplotlib raises for a log axis that it has to scale by itself.
  return figure


def _draw_loss(axes: Axes, trained: Trained, colour: str) -> None:
  loss = trained.series["loss"]
  axes.plot(_steps(loss), _positive(loss), color=colour, label=trained.label, **LINE)


def _draw_norm(axes: Axes, trained: Trained, colour: str, row: int) -> None:
  """The norm, its limit, and in the given row above the panel a tick at each clipped step."""
  norm = trained.series["grad/norm"]
  axes.plot(_steps(norm), _positive(norm), color=colour, label=trained.label, **LINE)
  if math.isinf(trained.max_norm):
    return
  axes.axhline(trained.max_norm, color=colour, linestyle="--", label=f"limit {trained.max_norm:g}")
  clipped = _steps(norm)[trained.series["grad/scale"] < 1]
  # Ticks apart from the curve: where most steps are clipped, marks on it would hide it.
  axes.plot(
    clipped, np.full(clipped.shape, 1 + 0.035 * row), color=colour, linestyle="", marker="|", markersize=7,
    transform=axes.get_xaxis_transform(), clip_on=False, label=f"clipped at {trained.max_norm:g}",
  )  # fmt: skip


def _steps(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
  return np.arange(1, values.size + 1)


def _positive(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
  """What a log axis can show; the rest is NaN, a gap in the line."""
  return np.where(np.isfinite(values) & (values > 0), values, np.nan)
