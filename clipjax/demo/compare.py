"""The first part of the demo: one recurrent network, trained without and with clipping, shown live and as a picture.

`run` trains the same tanh RNN three times, from the same weights on the same batches; only `max_norm` differs. It is an
argument of the one compiled step, which chains `clipjax.clip_by_global_norm` before the optimizer. All numbers about
the gradient are read from the optimizer's state by `clipjax.metrics`. The text is prose from the standard library, and
nothing is downloaded. Every sentence is derived from the numbers of the run.

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

PRINT_EVERY = 100  # Steps between two printed lines without a terminal; a multiple of READ_EVERY.
FINAL_STEPS = 10  # The final loss is the mean over these last steps, as a single batch is noisy.


class Summary(NamedTuple):
  """A row of the table. Losses and norms may be inf or NaN; `lowest_loss` to `median_norm` ignore NaN."""

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
    out: directory of the two files, created if missing.
    steps: training steps of each run, at least 1.
    seed: seed of weights and batches, 0 <= seed < 2**32.

  Raises:
    OSError: if the directory is not writable; this is checked before the training.
  """
  out.mkdir(parents=True, exist_ok=True)
  tempfile.TemporaryFile(dir=out).close()  # Fail now, not after the training.
  console = Console(markup=False, highlight=False, emoji=False)
  console.print(
    f"A tanh RNN of {HIDDEN} units, unrolled {LENGTH} times, learns to predict the next character with SGD at a "
    f"learning rate of {LEARNING_RATE:g}: first without clipping, then from the same weights on the same batches with "
    "clipjax.clip_by_global_norm(max_norm).\n"
  )
  with _reporter(console, steps) as report:
    runs = train_all(steps, seed, report)
  # Everything printed below is derived from the recorded series.
  summaries = [summarize(trained) for trained in runs]
  console.print("", table(summaries, console), "", sep="\n", crop=False)
  console.print(conclusion(summaries))
  picture_path, series_path = out / "clipjax_demo.png", out / "clipjax_demo.json"
  picture(runs).savefig(picture_path, dpi=150)
  series_path.write_text(to_json(runs, seed), encoding="utf-8")
  written = f"\nWrote {plain(str(picture_path))} and {plain(str(series_path))}"
  # A path may contain characters that stdout cannot encode.
  written = written.encode(console.encoding, "backslashreplace").decode(console.encoding)
  console.print(written, soft_wrap=True)


# Showing ------------------------------------------------------------------------------------------------------------


@contextmanager
def _reporter(console: Console, steps: int) -> Iterator[Report]:
  """Yields the function that shows progress: live bars in a terminal, otherwise a plain line now and then."""
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
  # "crop": by default, rich marks cut text with an ellipsis, which an ASCII terminal cannot show.
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
  """The table row of a run."""
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
  """The table of the runs; rich draws it in ASCII if stdout is not Unicode."""
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
  # Full width: a narrow terminal wraps whole lines, and no number is cut.
  out.width = console.measure(out, options=console.options.update(width=200)).maximum
  return out


def conclusion(summaries: Sequence[Summary]) -> str:
  """Compares the first run, which is unclipped, with the best of the others.

  Args:
    summaries: summaries of at least two runs.

  Returns:
    Sentences that are true whatever the outcome.
  """
  # Compare what the table shows: losses equal in three digits make no difference.
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
    f"{min(FINAL_STEPS, free.steps)} steps). Without clipping, the gradient norm had a median of "
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
  """A number with three digits, without an exponent below a million."""
  return f"{x:,.0f}" if 999.5 <= x < 1e6 else f"{x:.3g}"


def _as_worst(loss: float) -> float:
  return loss if math.isfinite(loss) else math.inf


def _of_numbers(reduce: Callable[[Any], Any], values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
  """`reduce` over the values that are not NaN; NaN if none is left."""
  numbers = values[~np.isnan(values)]
  return float(reduce(numbers)) if numbers.size else math.nan
