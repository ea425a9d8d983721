"""The command line: `clipjax COMMAND`, or `python -m clipjax COMMAND`.

Exit codes: 0 for success, 2 for wrong arguments, a missing extra, or a file that cannot be written, each with one line
on stderr. A command imports what it needs when it runs, so that `--help` answers without loading JAX.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import clipjax


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
  _add_demo(parser.add_subparsers(title="commands", metavar="COMMAND"))
  args = parser.parse_args(argv)
  if args.command is None:
    parser.print_help(sys.stderr)
    return 2
  try:
    return int(args.command(args))
  except OSError as error:
    return _fail(f"cannot write {error.filename or 'the output'}: {error.strerror or error}")
  except KeyboardInterrupt:
    return 130  # What a shell reports for a process that an interrupt ended.


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  parser = commands.add_parser(
    "demo",
    help="train a small RNN without and with clipping, and draw what happens",
    description="Trains a small character RNN three times, without clipping and with two thresholds, shows loss and "
    "gradient norm, and writes clipjax_demo.png and clipjax_demo.json. Takes well under two minutes on a CPU.",
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
    from clipjax import _demo as demo  # noqa: PLC0415  (loads JAX and the extra)
  except ImportError as error:
    return _fail(f"the demo needs more packages, pip install 'clipjax[demo]' ({str(error).splitlines()[0]})")
  demo.run(args.out, args.steps, args.seed)
  return 0


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


if __name__ == "__main__":
  sys.exit(main())
