"""The command line: `clipjax COMMAND`, or `python -m clipjax COMMAND`.

Exit codes: 0 for success, 2 for wrong arguments, a missing extra, or a file that cannot be read or written, each with
one line on stderr. A command imports what it needs when it runs, so that `--help` answers without loading JAX.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import clipjax

if TYPE_CHECKING:
  from clipjax.runs.run import Run


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the arguments, those of the process when None.

  Returns:
    The exit code. Wrong arguments, `--help` and `--version` leave through `SystemExit`, as argparse does.
  """
  parser = argparse.ArgumentParser(prog="clipjax", description="Gradient clipping and gradient health for JAX.")
  parser.add_argument("--version", action="version", version=f"clipjax {clipjax.__version__}")
  parser.set_defaults(command=None)
  commands = parser.add_subparsers(title="commands", metavar="COMMAND")
  _add_demo(commands)
  _add_report(commands)
  _add_suggest(commands)
  args = parser.parse_args(argv)
  if args.command is None:
    parser.print_help(sys.stderr)
    return 2
  try:
    return int(args.command(args))
  except _UnreadableError as error:
    return _fail(str(error))
  except BrokenPipeError:  # Its reader has seen enough, as in `clipjax suggest run.jsonl | head -1`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Else Python writes the rest as it ends.
    return 141  # What a shell reports for a process that a closed pipe ended.
  except OSError as error:
    return _fail(f"cannot write {error.filename or 'the output'}: {error.strerror or error}")
  except KeyboardInterrupt:
    return 130  # What a shell reports for a process that an interrupt ended.


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  parser = commands.add_parser(
    "demo",
    help="train a small RNN without and with clipping, and draw what happens",
    description="Trains a small character RNN three times, without clipping and with two thresholds, shows loss and "
    "gradient norm, and writes clipjax_demo.png and clipjax_demo.json. Then records a stable run, suggests a threshold "
    "from it, tries that, and writes a report, clipjax_demo_run.html. Takes well under two minutes on a CPU.",
  )
  parser.add_argument(
    "--out", type=Path, default=Path(), metavar="DIR", help="directory of the files (default: the current one)"
  )
  parser.add_argument(
    "--steps", type=_integer(1, None), default=300, metavar="N", help="steps of each run (default: %(default)s)"
  )
  parser.add_argument(
    "--seed",
    type=_integer(0, 2**32 - 1),
    default=0,
    metavar="S",
    help="seed of weights and batches (default: %(default)s)",
  )
  parser.set_defaults(command=_demo)


def _demo(args: argparse.Namespace) -> int:
  try:
    from clipjax import _demo_advice as advice  # noqa: PLC0415
    from clipjax.demo import compare as demo  # noqa: PLC0415  (loads JAX and the extra)
  except ImportError as error:
    return _fail(f"the demo needs more packages, pip install 'clipjax[demo]' ({_first_line(error)})")
  demo.run(args.out, args.steps, args.seed)
  advice.run(args.out, args.steps, args.seed)
  return 0


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  parser = commands.add_parser(
    "report",
    help="judge a recorded run, and draw it into one HTML file",
    description="Prints what clipjax.runs.diagnose finds in a recorded run, and writes a report with figures, which opens "
    "without a network.",
  )
  _add_run(parser)
  parser.add_argument(
    "-o", "--output", type=Path, metavar="FILE", help="the report (default: RUN with the ending .html)"
  )
  parser.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> int:
  run = _read(args.run)
  output = args.run.with_suffix(".html") if args.output is None else args.output
  if output.exists() and output.samefile(args.run):
    return _fail(f"the report must be another file than the run, got {str(output)!r}: name one with -o")
  from clipjax.runs.health.verdict import diagnose  # noqa: PLC0415  (loads numpy)

  _print(str(diagnose(run)))
  try:
    from clipjax.runs.report import write as report  # noqa: PLC0415  (needs the extra)

    written = report.write_report(run, output)
  except ImportError as error:
    missing = (error.name or str(error)).partition(".")[0]
    return _fail(f"the report needs more packages, pip install 'clipjax[report]' (no {missing})")
  _print(f"\nWrote {written}")
  return 0


def _add_suggest(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  parser = commands.add_parser(
    "suggest",
    help="which max_norm to use, from the norms of a recorded run",
    description="Prints what clipjax.runs.suggest_max_norm says of a recorded run: a threshold, why, and what others "
    "would have clipped.",
  )
  _add_run(parser)
  parser.add_argument(
    "--model", metavar="FAMILY", help="compare with the rule of thumb: feed-forward, cnn, rnn, lstm or transformer"
  )
  parser.add_argument("--learning-rate", type=float, metavar="X", help="the one of the run, for SGD at another one")
  parser.add_argument("--new-learning-rate", type=float, metavar="Y", help="the one that the threshold is for")
  parser.add_argument(
    "--scale-free", action="store_true", help="for Adam and others that divide the scale of the gradient out"
  )
  parser.set_defaults(command=_suggest)


def _suggest(args: argparse.Namespace) -> int:
  run = _read(args.run)
  from clipjax.runs.suggest import suggest_max_norm  # noqa: PLC0415  (loads numpy)

  try:
    suggestion = suggest_max_norm(
      run,
      learning_rate=args.learning_rate,
      new_learning_rate=args.new_learning_rate,
      scale_free=args.scale_free,
      model=args.model,
    )
  except ValueError as error:
    return _fail(str(error))
  _print(str(suggestion))
  return 0


def _add_run(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("run", type=Path, metavar="RUN", help="a file that clipjax.runs.Recorder wrote")


class _UnreadableError(Exception):
  """A file that is no run; its text is one line."""


def _read(path: Path) -> "Run":
  """The run of a file; `_UnreadableError` for whatever is wrong with it, as anything may be in a file."""
  from clipjax.runs.reading import read_run  # noqa: PLC0415  (loads numpy)

  try:
    return read_run(path)
  except FileNotFoundError:
    raise _UnreadableError(f"cannot read {path}: there is no such file") from None
  except OSError as error:
    raise _UnreadableError(f"cannot read {path}: {error.strerror or _first_line(error)}") from None
  except ValueError as error:
    raise _UnreadableError(_first_line(error)) from None


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)


def _print(text: str) -> None:
  """Prints what may hold characters that stdout cannot encode."""
  if sys.stdout is None:  # Closed by the caller.
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
  encoding = sys.stdout.encoding or "utf-8"
  print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _integer(low: int, high: int | None) -> Callable[[str], int]:
  """The argparse type of the whole numbers from `low` to `high`."""

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < low or (high is not None and value > high):
      raise argparse.ArgumentTypeError(f"must be >= {low}{'' if high is None else f' and <= {high}'}, got {value}")
    return value

  return parse


def _fail(message: str) -> int:
  print(f"clipjax: {message}", file=sys.stderr)
  return 2
