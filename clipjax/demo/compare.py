"""The demo: one recurrent network trained three times, without and with clipping, shown live and as a picture.

`run` trains the same tanh RNN from the same weights on the same batches, and only `max_norm` differs. It is an
argument of the one compiled step, in which `clipjax.clip_by_global_norm` is chained before the optimizer; all that is
shown of the gradient is what `clipjax.metrics` reads out of the optimizer's state. The text is the prose in the
standard library, so that nothing is downloaded. Every sentence is derived from the numbers of the run.

This module imports rich and matplotlib, the extra `demo`; only the command line imports this module.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from clipjax.demo.model import HIDDEN, LEARNING_RATE, LENGTH
from clipjax.demo.picture import picture
from clipjax.demo.training import MAX_NORMS, Report, Trained, label_of, to_json, train_all
from clipjax.runs.words import plain

PRINT_EVERY = 100  # Steps between two lines where there is no terminal; a multiple of READ_EVERY.
FINAL_STEPS = 10  # The final loss is the mean over so many steps: a single batch is noisy.


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
  written = f"\nWrote {plain(str(picture_path))} and {plain(str(series_path))}"
  # A path may hold what stdout cannot encode.
  written = written.encode(console.encoding, "backslashreplace").decode(console.encoding)
  console.print(written, soft_wrap=True)


# Showing ------------------------------------------------------------------------------------------------------------


@contextmanager
def _reporter(console: Console, steps: int) -> Iterator[Report]:
  """Gives what shows the progress: live bars in a terminal, else a plain line now and then."""
  if console.is_terminal and not console.is_dumb_terminal:
    with _bars(console) as progress:
      tasks = {label_of(c): progress.add_task(label_of(c), total=steps, values="") for c in MAX_NORMS}
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


def short(x: float) -> str:
  """Three digits, and no exponent below a million."""
  return f"{x:,.0f}" if 999.5 <= x < 1e6 else f"{x:.3g}"


def _as_worst(loss: float) -> float:
  return loss if math.isfinite(loss) else math.inf


def _of_numbers(reduce: Callable[[Any], Any], values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
  """`reduce` over what is not NaN; NaN where nothing is left."""
  numbers = values[~np.isnan(values)]
  return float(reduce(numbers)) if numbers.size else math.nan
