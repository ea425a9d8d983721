"""A recorded run as one HTML file, or its norm as one figure. It loads matplotlib at the call.

The file needs no network and runs no script: the verdict, the suggestion, the figures as SVG and the raw series as JSON
are in it. The parts: `series` takes the numbers out of the run, `timeline`, `heatmap` and `figures` draw, `happened`,
`course`, `effect` and `sections` word, `page` escapes, `build` puts it together.
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from clipjax.runs.health.findings import HealthLimits
from clipjax.runs.health.verdict import check_arguments, diagnose
from clipjax.runs.norms import main_name
from clipjax.runs.reading.lines import checked_path
from clipjax.runs.report.mark import may_be_replaced
from clipjax.runs.report.series import norm_series
from clipjax.runs.run import Run
from clipjax.runs.suggest import Suggestion
from clipjax.runs.words import described

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def plot_norms(run: Run, *, limits: HealthLimits | None = None, warmup_steps: int | None = None) -> "Figure":
  r"""The norm before the clip against the step, on a log axis, with the threshold; bad steps are marked.

  Triangles are clipped steps, rings are spikes, crosses those whose norm was inf or NaN, dots at the bottom norms of 0;
  a gap in the line is a step without a finite norm. The warm-up is grey. A long run is thinned for drawing, and every
  spike stays.

  Args:
    run: from `clipjax.runs.read_run`.
    limits: those of `clipjax.runs.diagnose`: which norms are spikes.
    warmup_steps: how many steps from the first on are the warm-up, as in `diagnose`.

  Returns:
    A `matplotlib.figure.Figure` that pyplot does not know: call its `savefig`, or show it under `%matplotlib inline`.

  Raises:
    TypeError: if `run` is no `Run`, or for a limit or a warm-up that `diagnose` refuses.
    ValueError: if it has no norm, and likewise.
    ImportError: without matplotlib, the extra `report`.

  Example:
    >>> import tempfile, pathlib, clipjax
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
    >>> rows = '{"clipjax_run": 1, "leaves": {}, "parameters": 2}', '{"step": 1, "grad/norm": 3.0}'
    >>> _ = path.write_text("\n".join(rows) + "\n")
    >>> clipjax.runs.plot_norms(clipjax.runs.read_run(path)).axes[0].get_ylabel()
    'grad/norm'
  """
  report = diagnose(run, limits=limits, warmup_steps=warmup_steps)
  if (name := main_name(run)) is None:
    raise ValueError(f"`run` must have a norm, got {sorted(run.columns)}: chain clipjax.watch() or a clip, and push.")
  with _needs_matplotlib():
    from clipjax.runs.report import figures  # noqa: PLC0415  (needs the extra)
  return figures.norms(norm_series(run, name, warmup_steps, report.events))


def write_report(
  run: Run,
  path: str | os.PathLike[str],
  *,
  limits: HealthLimits | None = None,
  warmup_steps: int | None = None,
  suggestion: Suggestion | None = None,
) -> pathlib.Path:
  r"""Writes a run as one HTML page that needs no network: what happened, where, what to do, figures, raw series.

  The first screen has the strongest findings. Below are the losses, learning rate, norms, updates and layers on one
  axis of steps, on which events are marked, then the events one by one, the suggested threshold, and the whole verdict.

  It opens on a phone and in dark mode, runs no script, and every name is escaped. What was not recorded is left out,
  with a line that says how to get it. A long run is thinned for drawing only, and the page says so; a series
  that would make the file larger than about 10 MB stays out of the JSON, and the page names it. The JSON has 7 digits.

  Args:
    run: from `clipjax.runs.read_run`.
    path: of the file. A page that is there is replaced, at once: no reader sees half of one.
    limits: those of `clipjax.runs.diagnose`, for the verdict and the figures; None: the published ones.
    warmup_steps: how many steps from the first on to leave out, as in `diagnose`.
    suggestion: what `clipjax.runs.suggest_max_norm` gave, for another learning rate or with other options; None: what
      it gives for the run as it is.

  Returns:
    `path`, as a `pathlib.Path`.

  Raises:
    TypeError: if `run` is no `Run`, `path` no path, `suggestion` no `Suggestion`, or for a limit or a warm-up that
      `diagnose` refuses.
    ValueError: if `path` is a file that is no page of clipjax, as that of the run itself, and likewise.
    OSError: if the file cannot be written; its directory must exist.
    ImportError: without matplotlib, the extra `report`.

  Example:
    >>> import tempfile, pathlib, clipjax
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
    >>> rows = '{"clipjax_run": 1, "leaves": {}, "parameters": 2}', '{"step": 1, "grad/norm": 3.0}'
    >>> _ = path.write_text("\n".join(rows) + "\n")
    >>> clipjax.runs.write_report(clipjax.runs.read_run(path), path.with_suffix(".html")).name
    'run.html'
  """
  check_arguments(run, limits, warmup_steps)
  if suggestion is not None and not isinstance(suggestion, Suggestion):
    raise TypeError(
      f"`suggestion` must be a Suggestion, got {described(suggestion)}: pass what clipjax.runs.suggest_max_norm gives."
    )
  target = pathlib.Path(checked_path(path))
  if target.exists() and os.path.exists(run.path) and target.samefile(run.path):
    raise ValueError(f"`path` must be another file than that of the run, got {str(path)!r}: name one for the page.")
  if not may_be_replaced(target):
    raise ValueError(
      f"`path` must be a new file or a page that clipjax wrote, got {str(path)!r}, which is neither: name another "
      "file, or remove that one."
    )
  if target.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  if not target.parent.is_dir():
    raise FileNotFoundError(errno.ENOENT, "the directory of the report does not exist, make it first", str(path))
  with _needs_matplotlib():
    from clipjax.runs.report import build  # noqa: PLC0415  (needs the extra)
  report = diagnose(run, limits=limits, warmup_steps=warmup_steps)
  page = build.whole_page(run, report, suggestion, limits, warmup_steps)
  _write(target, page.encode("ascii", "xmlcharrefreplace"))
  return target


# Writing ------------------------------------------------------------------------------------------------------------


def _write(target: pathlib.Path, content: bytes) -> None:
  """All of it or nothing, through a file beside it; straight where the path is no file, as /dev/stdout."""
  is_special = target.exists() and not target.is_file()
  beside = target if is_special else target.with_name(f".clipjax-{os.getpid()}-{target.name}"[:200])
  try:
    beside.write_bytes(content)
    if not is_special:
      os.replace(beside, target)
  except OSError as error:  # It names no file, or the one beside, which nobody has asked for.
    raise OSError(error.errno, error.strerror, str(target)) from error
  finally:
    if not is_special:
      beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _needs_matplotlib() -> Iterator[None]:
  """Says what to install where the import inside finds no matplotlib."""
  try:
    yield
  except ModuleNotFoundError as error:
    raise _without_matplotlib(error) from error


def _without_matplotlib(error: ModuleNotFoundError) -> ImportError:
  if (error.name or "").partition(".")[0] != "matplotlib":
    return error
  return ImportError("a report needs matplotlib: pip install 'clipjax[report]'", name="matplotlib")
