"""The command line: `clipjax COMMAND`, or `python -m clipjax COMMAND`.

Exit status: 0 for success; 1 if the verdict on a run has a FAIL; 2 for wrong arguments, a missing extra, or a file that
cannot be read or written, each with one line on stderr; 130 after an interrupt; 141 if the reader of its output has
closed the pipe. Control characters are escaped in all output, as the name of a file or a leaf may contain them.
"""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import clipjax
from clipjax.runs.health.limits import HealthLimits, check_limits
from clipjax.runs.health.verdict import HealthReport, diagnose
from clipjax.runs.reading.read import read_run
from clipjax.runs.report import write
from clipjax.runs.report.own_pages import may_be_replaced
from clipjax.runs.run import Run
from clipjax.runs.suggest import suggest_max_norm
from clipjax.runs.words import plain


class _Parser(argparse.ArgumentParser):
  """An argument parser that escapes the arguments it quotes."""

  def error(self, message: str) -> NoReturn:
    super().error(plain(message))


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the arguments; None: the arguments of the process.

  Returns:
    The exit status. As in argparse, refused arguments, `--help` and `--version` raise `SystemExit`.
  """
  parser = _Parser(prog="clipjax", description="Gradient clipping and gradient health for JAX.")
  parser.add_argument("--version", action="version", version=f"clipjax {clipjax.__version__}")
  parser.set_defaults(command=None)
  commands = parser.add_subparsers(title="commands", metavar="COMMAND")
  for add in (_add_diagnose, _add_report, _add_suggest, _add_demo):
    add(commands)
  args = parser.parse_args(argv)
  if args.command is None:
    parser.print_help(sys.stderr)
    return 2
  try:
    return int(args.command(args))
  except _WrongError as error:
    return _fail(str(error))
  except BrokenPipeError:  # The reader has seen enough, as in `clipjax suggest run.jsonl | head -1`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Or Python would write the rest at exit.
    return 141  # The status that a shell reports after a closed pipe.
  except OSError as error:
    return _fail(f"cannot write {error.filename or 'the output'}: {error.strerror or error}")
  except KeyboardInterrupt:
    return 130  # The status that a shell reports after an interrupt.


# diagnose, report ---------------------------------------------------------------------------------------------------


def _add_diagnose(commands: _Commands) -> None:
  parser = commands.add_parser(
    "diagnose",
    help="judge a recorded run",
    description="Prints the verdict of clipjax.runs.diagnose on a recorded run. The exit status is 1 if it has a FAIL.",
  )
  _add_run(parser)
  _add_limits(parser)
  parser.set_defaults(command=_diagnose)


def _diagnose(args: argparse.Namespace) -> int:
  limits = _limits(args.limit)
  report = diagnose(_read(args.run), limits=limits, warmup_steps=args.warmup_steps)
  _print(str(report))
  return _status(report)


def _add_report(commands: _Commands) -> None:
  parser = commands.add_parser(
    "report",
    help="judge a recorded run, and write an HTML report",
    description="Prints the verdict of clipjax.runs.diagnose on a recorded run, and writes a report with figures, one "
    "HTML file that works offline. The exit status is 1 if the verdict has a FAIL.",
  )
  _add_run(parser)
  parser.add_argument(
    "-o", "--output", type=Path, metavar="FILE", help="the report (default: RUN with the suffix .html)"
  )
  _add_limits(parser)
  parser.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> int:
  limits = _limits(args.limit)
  run = _read(args.run)
  # Refuse to overwrite before the run is judged, which may take a while.
  output = args.run.with_suffix(".html") if args.output is None else args.output
  if output.exists() and output.samefile(args.run):
    return _fail(f"the report must not be the file of the run, got {str(output)!r}: name another file with -o")
  if not may_be_replaced(output):
    return _fail(
      f"the report must be a new file or a page that clipjax wrote, got {str(output)!r}, which is neither: name "
      "another file with -o"
    )
  report = diagnose(run, limits=limits, warmup_steps=args.warmup_steps)
  _print(str(report))
  try:
    written = write.write_report(run, output, limits=limits, warmup_steps=args.warmup_steps)
  except ImportError as error:
    missing = (error.name or str(error)).partition(".")[0]
    return _fail(f"the report needs more packages: pip install 'clipjax[report]' (no {missing})")
  _print(f"\nWrote {plain(str(written))}")
  return _status(report)


def _status(report: HealthReport) -> int:
  return int(any(finding.level == "FAIL" for finding in report))


# suggest ------------------------------------------------------------------------------------------------------------


def _add_suggest(commands: _Commands) -> None:
  parser = commands.add_parser(
    "suggest",
    help="suggest a max_norm from the norms of a recorded run",
    description="Prints the suggestion of clipjax.runs.suggest_max_norm for a recorded run: a threshold, the reason, "
    "the steps it is based on, and the share of steps that other thresholds would have clipped.",
  )
  _add_run(parser)
  parser.add_argument(
    "--model", metavar="FAMILY", help="compare with its rule of thumb: feed-forward, cnn, rnn, lstm or transformer"
  )
  parser.add_argument(
    "--learning-rate",
    type=float,
    metavar="X",
    help="learning rate of the run, if the threshold is for SGD at another one",
  )
  parser.add_argument("--new-learning-rate", type=float, metavar="Y", help="learning rate that the threshold is for")
  parser.add_argument(
    "--scale-free",
    action=argparse.BooleanOptionalAction,
    help="whether the threshold is for Adam or another optimizer that divides out the scale of the gradient (default: "
    "as recorded in the run, else no)",
  )
  _add_warmup(parser, "a tenth of the rows in which the run learned, at most 100 rows")
  parser.set_defaults(command=_suggest)


def _suggest(args: argparse.Namespace) -> int:
  run = _read(args.run)
  try:
    suggestion = suggest_max_norm(
      run,
      learning_rate=args.learning_rate,
      new_learning_rate=args.new_learning_rate,
      scale_free=args.scale_free,
      model=args.model,
      warmup_steps=args.warmup_steps,
    )
  except ValueError as error:
    return _fail(str(error))
  _print(str(suggestion))
  return 0


# demo ---------------------------------------------------------------------------------------------------------------


def _add_demo(commands: _Commands) -> None:
  parser = commands.add_parser(
    "demo",
    help="train a small RNN without and with clipping, and plot both",
    description="Trains a small character RNN three times, without clipping and with two thresholds, shows loss and "
    "gradient norm, and writes clipjax_demo.png and clipjax_demo.json. Then it records a stable run, suggests a "
    "threshold, tries it, and writes the report clipjax_demo_run.html. Takes well under two minutes on a CPU.",
  )
  parser.add_argument(
    "--out", type=Path, default=Path(), metavar="DIR", help="directory for the files (default: the current one)"
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
    from clipjax.demo import advice  # noqa: PLC0415  (needs the extra)
    from clipjax.demo import compare as demo  # noqa: PLC0415
  except ImportError as error:
    return _fail(f"the demo needs more packages: pip install 'clipjax[demo]' ({_first_line(error)})")
  if (other := advice.other_file(args.out)) is not None:
    return _fail(f"the demo would overwrite {str(other)!r}, which it did not write: name another directory with --out")
  demo.run(args.out, args.steps, args.seed)
  advice.run(args.out, args.steps, args.seed)
  return 0


# Arguments ----------------------------------------------------------------------------------------------------------


def _add_run(parser: _Parser) -> None:
  parser.add_argument("run", type=Path, metavar="RUN", help="a file written by clipjax.runs.Recorder")


def _add_limits(parser: _Parser) -> None:
  parser.add_argument(
    "--limit",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="limit of a finding, a field of clipjax.runs.HealthLimits such as clip_fraction=0.9; may be repeated",
  )
  _add_warmup(parser, "those of the first tenth of the rows, at most 100 rows")


def _add_warmup(parser: _Parser, default: str) -> None:
  parser.add_argument(
    "--warmup-steps",
    type=_integer(0, None),
    metavar="N",
    help=f"number of steps at the start to leave out (default: {default})",
  )


class _WrongError(Exception):
  """A wrong argument, or a file that is not a run; the text is one line."""


def _limits(given: Sequence[str]) -> HealthLimits:
  """The limits set by `--limit`, the others at their defaults."""
  fields: dict[str, Any] = {}
  for text in given:
    name, _, value = text.partition("=")
    if name not in HealthLimits._fields:
      near = difflib.get_close_matches(name, HealthLimits._fields, 3, 0.5) or HealthLimits._fields
      raise _WrongError(f"--limit must be NAME=VALUE, got {text!r}: NAME can be {', '.join(near)}")
    try:
      fields[name] = int(value) if isinstance(HealthLimits._field_defaults[name], int) else float(value)
    except ValueError:
      raise _WrongError(
        f"--limit {name} must be a number, got {value!r}: pass one such as {HealthLimits._field_defaults[name]}"
      ) from None
  # The library checks the ranges; its message names a field, here it names the option.
  limits = HealthLimits(**fields)
  try:
    check_limits(limits)
  except ValueError as error:
    raise _WrongError(str(error).replace("`limits.", "--limit ", 1).replace("`", "", 1)) from None
  return limits


def _read(path: Path) -> Run:
  """The run in a file; `_WrongError` for anything that may be wrong with the file."""
  try:
    return read_run(path)
  except FileNotFoundError:
    raise _WrongError(f"cannot read {path}: there is no such file") from None
  except OSError as error:
    raise _WrongError(f"cannot read {path}: {error.strerror or _first_line(error)}") from None
  except ValueError as error:
    raise _WrongError(_first_line(error)) from None


def _integer(low: int, high: int | None) -> Callable[[str], int]:
  """An argparse type: whole numbers from `low` to `high`."""

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < low or (high is not None and value > high):
      raise argparse.ArgumentTypeError(f"must be >= {low}{'' if high is None else f' and <= {high}'}, got {value}")
    return value

  return parse


# Output -------------------------------------------------------------------------------------------------------------


def _print(text: str) -> None:
  """Prints lines; escapes what a terminal would obey and what stdout cannot encode."""
  if sys.stdout is None:  # The caller closed it.
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
  encoding = sys.stdout.encoding or "utf-8"
  shown = "\n".join(map(plain, text.split("\n")))
  print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _fail(message: str) -> int:
  print(f"clipjax: {plain(message)}", file=sys.stderr)
  return 2


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)
