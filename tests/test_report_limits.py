"""The report uses the limits and the warm-up of the verdict, and overwrites no other files."""

import os
import re
from unittest import mock

import numpy as np
import pytest
from pages import lines_of, written
from synthetic import N, healthy, layered, run_of, with_spikes

import clipjax
from clipjax.runs.health.events import Event, Move
from clipjax.runs.report import build_page, figures, own_pages, series
from clipjax.runs.report import write as report_write

Limits = clipjax.runs.HealthLimits


# Limits -------------------------------------------------------------------------------------------------------------


def test_the_page_has_the_limits_and_the_warm_up_of_its_verdict(tmp_path):
  time = np.cumsum(np.where(np.arange(N) < 300, 9.0, 0.5))
  run = run_of(healthy(time=time), **layered([1e-3, 5e-2], key="update/ratio"))
  given = {"limits": Limits(min_steps=10**6, ratio_low=1e-3, ratio_high=0.1), "warmup_steps": 300}
  pages = [written(run, tmp_path, drawn=True, **options).text for options in ({}, given)]
  messages = [{finding.message for finding in clipjax.runs.diagnose(run, **options)} for options in ({}, given)]
  assert messages[0] - messages[1] and messages[1] - messages[0]
  for page, own, other in zip(pages, messages, messages[::-1], strict=True):
    assert {message for message in own | other if message in page} == own
  told = (
    ("step time9 s", "step time500 ms"),
    (
      "1 of 2 layers have a median in the range 0.0001 to 0.01.",
      "2 of 2 layers have a median in the range 0.001 to 0.1.",
    ),
    ("usual, 0.0001 to 0.01", "usual, 0.001 to 0.1"),
    ("(left out: 40 from the warm-up)", "(left out: 300 from the warm-up)"),  # Of the suggestion.
  )
  for usual, limited in told:
    assert usual in pages[0] and limited not in pages[0]
    assert limited in pages[1] and usual not in pages[1]


@pytest.mark.parametrize(
  ("band", "label", "middle"),
  [
    ((0.04, 0.09), "usual, 0.04 to 0.09", ["0.06"]),
    ((0.0, np.inf), "usual, 0 to inf", []),
  ],
)
def test_the_figure_shows_the_usual_ratio_of_the_limits(band, label, middle):
  run = run_of(healthy(), **layered([1e-3, 5e-2], key="update/ratio"))
  found = series.vectors(run, "update/ratio")
  (axes,) = figures.ratios((run.steps, run["update/ratio"]), found, band).axes
  (span,) = [patch for patch in axes.patches if patch.get_label() == label]
  low, high = span.get_y(), span.get_y() + span.get_height()
  assert low == pytest.approx(max(band[0], 1e-306)) and high == pytest.approx(min(band[1], 1e306))
  dashed = [line.get_label() for line in axes.lines if re.fullmatch(r"[\d.]+", line.get_label())]
  assert dashed == middle


def test_spikes_are_ringed_by_the_rule_of_the_verdict(monkeypatch):
  run, given = run_of(with_spikes()), []
  moves = (Move("loss", 300, 9.0, 2.0), Move("grad/norm", 301, 30.0, 1.0))
  events = (Event(201, 203, (Move("grad/norm", 201, 30.0, 1.0),)), Event(300, 301, moves), Event(50, 60, moves[:1]))

  def diagnose(run, **options):
    given.append(options)
    return clipjax.runs.HealthReport((), "", N, 40, events)

  monkeypatch.setattr(report_write, "diagnose", diagnose)
  limits = Limits(rise=3.0)
  rings = lines_of(clipjax.runs.plot_norms(run, limits=limits, warmup_steps=7).axes[0])["spike"]
  assert rings.get_xdata().tolist() == [201, 301] and rings.get_ydata().tolist() == [30.0, 30.0]
  assert given == [{"limits": limits, "warmup_steps": 7}]


def test_the_warm_up_is_shaded():
  def shaded(**options):
    (axes,) = clipjax.runs.plot_norms(run_of(healthy(), steps=np.arange(N) + 1000), **options).axes
    return [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches if p.get_label() == "warm-up"]

  assert shaded() == [(1000, 1040)]
  assert shaded(warmup_steps=7) == [(1000, 1007)]
  assert shaded(warmup_steps=0) == shaded(warmup_steps=5000) == []


# Wrong arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [clipjax.runs.plot_norms, clipjax.runs.write_report])
@pytest.mark.parametrize(
  ("run", "options", "kind", "text"),
  [
    ("run.jsonl", {}, TypeError, "`run` must be a Run, got 'run.jsonl' (str): read the file with"),
    (None, {"limits": {}}, TypeError, "`limits` must be a HealthLimits, got a dict: "),
    (None, {"warmup_steps": -1}, ValueError, "`warmup_steps` must be >= 0, got -1: "),
  ],
)
def test_wrong_arguments_are_reported_as_by_diagnose(function, run, options, kind, text, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = ["x.html"] if function is clipjax.runs.write_report else []
  with pytest.raises(kind) as error:
    function(run or run_of(healthy()), *path, **options)
  assert str(error.value).startswith(text)
  assert list(tmp_path.iterdir()) == []


# Files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(monkeypatch):
  """The content of every page, as a stand-in for the real one."""
  content = f"{own_pages.START}new"
  monkeypatch.setattr(build_page, "whole_page", lambda *_: content)
  return content


def write(path):
  return clipjax.runs.write_report(run_of({"grad/norm": [1.0]}), path)


@pytest.mark.parametrize(
  "content", ["<!DOCTYPE html>\n<title>mine</title>", "x", own_pages.START[:-1], "\n" + own_pages.START]
)
@pytest.mark.parametrize("is_link", [False, True])
def test_no_other_file_is_overwritten(content, is_link, tmp_path):
  path, file = tmp_path / "index.html", tmp_path / ("notes.txt" if is_link else "index.html")
  file.write_text(content)
  if is_link:
    path.symlink_to(file)
  with pytest.raises(ValueError, match="must be a new file") as error:
    write(path)
  assert str(error.value) == (
    f"`path` must be a new file or a page that clipjax wrote, got {str(path)!r}, which is neither: name another file, "
    "or delete that one."
  )
  assert file.read_text() == content and path.is_symlink() == is_link and set(tmp_path.iterdir()) == {path, file}


@pytest.mark.parametrize("content", ["", own_pages.START + "old"])
def test_a_page_and_an_empty_file_are_overwritten_at_once(content, page, tmp_path, monkeypatch):
  path = tmp_path / "report.html"
  path.write_text(content)
  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError):
      write(path)
  assert path.read_text() == content and list(tmp_path.iterdir()) == [path]
  assert write(path) == path
  assert path.read_text() == page and list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_no_file_is_written_through(page):
  assert write(os.devnull).exists()
  assert not os.path.isfile(os.devnull)


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("none/x.html", "[Errno 2] the directory of the report does not exist, create it first: '{}'"),
    (".", "[Errno 21] Is a directory: '{}'"),
  ],
)
def test_a_place_that_cannot_hold_a_page_is_an_error(name, text, page, tmp_path):
  with pytest.raises(OSError, match="Errno") as error:
    write(tmp_path / name)
  assert str(error.value) == text.format(tmp_path / name)
  assert list(tmp_path.iterdir()) == [] and list(tmp_path.parent.glob(".clipjax*")) == []


# Throughput ---------------------------------------------------------------------------------------------------------


def test_tokens_of_an_update_that_takes_several_steps():
  # Four micro-batches of half a second, 100 tokens each: rows every fourth step, with the sums.
  columns = {"grad/norm": np.ones(N), "time": np.arange(N) * 2.0, "tokens": np.full(N, 400.0), "update": np.arange(N)}
  report = clipjax.runs.diagnose(run_of(columns, steps=np.arange(N) * 4))
  (step_time,) = [f.message for f in report if f.name == "step-time"]
  (throughput,) = [f.message for f in report if f.name == "throughput"]
  assert step_time.startswith("2 s per step") and throughput.startswith("200 tokens per second")
