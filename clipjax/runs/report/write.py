"""Writes a recorded run as one HTML file, or draws its norm as one figure; matplotlib is loaded only then.

The file contains the verdict, the suggestion, the figures as SVG and the series as JSON; it needs no network and runs
no script. `series` takes the numbers from the run; `timeline`, `heatmap` and `figures` draw; `happened`, `course`,
`effect` and `sections` write the words; `html` escapes them; `build_page` assembles the page.
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from clipjax.runs.health.limits import HealthLimits
from clipjax.runs.health.verdict import check_arguments, diagnose
from clipjax.runs.norms import main_name
from clipjax.runs.reading.lines import checked_path
from clipjax.runs.report.own_pages import may_be_replaced
from clipjax.runs.report.series import norm_series
from clipjax.runs.run import Run
from clipjax.runs.suggest import Suggestion
from clipjax.runs.words import described

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def plot_norms(run: Run, *, limits: HealthLimits | None = None, warmup_steps: int | None = None) -> "Figure":
  r"""Plots the norm before the clip and the threshold against the step, on a log axis, with bad steps marked.

  Triangles mark clipped steps, rings spikes, crosses norms of inf or NaN, squares rejected steps, and dots at the
  bottom norms of 0; a gap in the line is a step without a finite norm. The warm-up is grey. A long run is thinned for
  drawing, but every spike stays.

  Args:
    run: from `clipjax.runs.read_run` or `Run.from_arrays`.
    limits: limits for `clipjax.runs.diagnose`, which decide which norms are spikes.
    warmup_steps: number of warm-up steps at the start, as in `diagnose`.

  Returns:
    A `matplotlib.figure.Figure` that pyplot does not know: call its `savefig`, or show it under `%matplotlib inline`.

  Raises:
    TypeError: if `run` is not a `Run`, or `diagnose` refuses the type of a limit or of the warm-up.
    ValueError: if the run has no norm, or `diagnose` refuses a limit or the warm-up.
    ImportError: without matplotlib (the extra `report`).

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
  r"""Writes a run as one HTML page that works offline: what happened, where, what to do, figures, and the series.

  The first screen shows the main findings. Below it, losses, learning rate, norms, updates and layers share one step
  axis with the events marked; then come the events one by one, the suggested threshold, and the whole verdict.

  The page works on a phone and in dark mode, runs no script, and escapes every name. It says how to record what is
  missing. A long run is thinned only for drawing, and the page says so. The JSON has 7 digits; a series that would make
  the file larger than about 10 MB is left out, and the page names it.

  Args:
    run: from `clipjax.runs.read_run` or `Run.from_arrays`.
    path: path of the file. An existing page is replaced in one step: a reader never sees half a page.
    limits: limits for `clipjax.runs.diagnose`, used by the verdict and the figures; None: the defaults.
    warmup_steps: number of steps at the start to leave out, as in `diagnose`.
    suggestion: from `clipjax.runs.suggest_max_norm`, for instance for another learning rate; None: the page calls it
      with default options.

  Returns:
    `path`, as a `pathlib.Path`.

  Raises:
    TypeError: if `run` is not a `Run`, `path` not a path or `suggestion` not a `Suggestion`, or `diagnose` refuses the
      type of a limit or of the warm-up.
    ValueError: if `path` is a file that clipjax did not write as a page, such as the run itself, or `diagnose` refuses
      a limit or the warm-up.
    OSError: if the file cannot be written; its directory must exist.
    ImportError: without matplotlib (the extra `report`).

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
      f"`suggestion` must be a Suggestion, got {described(suggestion)}: pass what clipjax.runs.suggest_max_norm "
      "returns."
    )
  # Refuse before anything is computed: no file but a page may be replaced, least of all the run.
  target = pathlib.Path(checked_path(path))
  if target.exists() and os.path.exists(run.path) and target.samefile(run.path):
    raise ValueError(f"`path` must not be the file of the run, got {str(path)!r}: name another file for the page.")
  if not may_be_replaced(target):
    raise ValueError(
      f"`path` must be a new file or a page that clipjax wrote, got {str(path)!r}, which is neither: name another "
      "file, or delete that one."
    )
  if target.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  if not target.parent.is_dir():
    raise FileNotFoundError(errno.ENOENT, "the directory of the report does not exist, create it first", str(path))
  with _needs_matplotlib():
    from clipjax.runs.report import build_page  # noqa: PLC0415  (needs the extra)
  report = diagnose(run, limits=limits, warmup_steps=warmup_steps)
  page = build_page.whole_page(run, report, suggestion, limits, warmup_steps)
  _write(target, page.encode("ascii", "xmlcharrefreplace"))
  return target


# Writing ------------------------------------------------------------------------------------------------------------


def _write(target: pathlib.Path, content: bytes) -> None:
  """Writes all or nothing, through a temporary file beside it; directly if the path is a device such as /dev/stdout."""
  # `os.replace` is atomic within a file system, so the temporary file is in the same directory.
  is_special = target.exists() and not target.is_file()
  beside = target if is_special else target.with_name(f".clipjax-{os.getpid()}-{target.name}"[:200])
  try:
    beside.write_bytes(content)
    if not is_special:
      os.replace(beside, target)
  except OSError as error:  # Name the file that the caller asked for, not the temporary one.
    raise OSError(error.errno, error.strerror, str(target)) from error
  finally:
    if not is_special:
      beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _needs_matplotlib() -> Iterator[None]:
  """Says what to install if an import inside does not find matplotlib."""
  try:
    yield
  except ModuleNotFoundError as error:
    raise _without_matplotlib(error) from error


def _without_matplotlib(error: ModuleNotFoundError) -> ImportError:
  if (error.name or "").partition(".")[0] != "matplotlib":
    return error
  return ImportError("a report needs matplotlib: pip install 'clipjax[report]'", name="matplotlib")
