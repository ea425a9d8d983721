"""The report has the limits and the warm-up of the verdict, and spares other files."""

import os
import pathlib
import re

import numpy as np
import pytest
from synthetic import N, healthy, layered, run_of, with_spikes

import clipjax
from clipjax.runs.health.events import Event, Move
from clipjax.runs.report import figures, mark, series, write

Limits = clipjax.runs.HealthLimits


def text_of(run, tmp_path, **options):
  """The words of a page, without its tags."""
  page = clipjax.runs.write_report(run, tmp_path / "report.html", **options).read_text()
  return re.sub("<[^>]*>", "", re.sub("<script.*?</script>", "", page, flags=re.DOTALL)).replace("&#x27;", "'")


def lines_of(axes):
  return {line.get_label(): line for line in axes.lines}


# Limits -------------------------------------------------------------------------------------------------------------


def test_the_verdict_of_the_page_has_the_limits(tmp_path):
  run = run_of(healthy())
  seen = []
  for options in ({}, {"limits": Limits(min_steps=10**6), "warmup_steps": 123}):
    messages = [finding.message for finding in clipjax.runs.diagnose(run, **options)]
    text = text_of(run, tmp_path, **options)
    assert all(message in text for message in messages)
    seen.append((messages, text))
  (usual, before), (limited, after) = seen
  assert {message in after for message in set(usual) - set(limited)} == {False}
  assert {message in before for message in set(limited) - set(usual)} == {False}
  assert "(the 123 of the warm-up left out)" in after  # Of the suggestion.


def test_the_speed_of_the_page_leaves_out_the_same_warm_up(tmp_path):
  time = np.cumsum(np.where(np.arange(N) < 300, 9.0, 0.5))
  run = run_of(healthy(time=time))
  assert "step time9 s" in text_of(run, tmp_path)
  text = text_of(run, tmp_path, warmup_steps=300)
  assert "Line chart of the time of a step: 500 ms, the median of parts of the run" in text
  assert "step time500 ms" in text and "500 ms a step" in text


@pytest.mark.parametrize(
  ("band", "label", "middle"),
  [
    ((1e-4, 1e-2), "usual, 0.0001 to 0.01", "0.001"),
    ((0.04, 0.09), "usual, 0.04 to 0.09", "0.06"),
    ((0.0, 1e-2), "usual, 0 to 0.01", None),
    ((1e-4, np.inf), "usual, 0.0001 to inf", None),
  ],
)
def test_the_usual_ratio_of_the_figure_is_that_of_the_limits(band, label, middle):
  run = run_of(healthy(), **layered([1e-3, 5e-2], key="update/ratio"))
  found = series.vectors(run, "update/ratio")
  (axes,) = figures.ratios((run.steps, run["update/ratio"]), found, band).axes
  (span,) = [patch for patch in axes.patches if patch.get_label() == label]
  low, high = span.get_y(), span.get_y() + span.get_height()
  assert low == pytest.approx(max(band[0], 1e-306)) and high == pytest.approx(min(band[1], 1e306))
  dashed = [line.get_label() for line in axes.lines if re.fullmatch(r"[\d.]+", line.get_label())]
  assert dashed == ([middle] if middle else [])


def test_the_words_of_the_ratio_have_the_limits_too(tmp_path):
  run = run_of(healthy(), **layered([1e-3, 5e-2], key="update/ratio"))
  assert "The median of 1 of 2 layers lies in 0.0001 to 0.01." in text_of(run, tmp_path)
  limits = Limits(ratio_low=1e-3, ratio_high=0.1)
  assert "The median of 2 of 2 layers lies in 0.001 to 0.1." in text_of(run, tmp_path, limits=limits)
  assert "usual, 0.001 to 0.1" in text_of(run, tmp_path, limits=limits)


def test_spikes_are_ringed_by_the_rule_of_the_verdict(monkeypatch):
  run, given = run_of(with_spikes()), []
  moves = (Move("loss", 300, 9.0, 2.0), Move("grad/norm", 301, 30.0, 1.0))
  events = (Event(201, 203, (Move("grad/norm", 201, 30.0, 1.0),)), Event(300, 301, moves), Event(50, 60, moves[:1]))

  def diagnose(run, **options):
    given.append(options)
    return clipjax.runs.HealthReport((), "", N, 40, events)

  monkeypatch.setattr(write, "diagnose", diagnose)
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


@pytest.mark.parametrize(
  "function", [clipjax.runs.plot_norms, lambda run, **o: clipjax.runs.write_report(run, "x", **o)]
)
def test_wrong_limits_are_told_as_by_diagnose(function):
  run = run_of(healthy())
  with pytest.raises(TypeError, match=r"^`limits` must be a HealthLimits, got a dict: "):
    function(run, limits={})
  with pytest.raises(ValueError, match=r"^`limits.rise` must be a number >= 0, got -1"):
    function(run, limits=Limits(rise=-1))
  with pytest.raises(ValueError, match=r"^`warmup_steps` must be >= 0, got -1: "):
    function(run, warmup_steps=-1)
  assert not pathlib.Path("x").exists()


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["<!DOCTYPE html>\n<title>mine</title>", "x", mark.START[:-1], "\n" + mark.START])
def test_no_other_file_is_overwritten(content, tmp_path):
  path = tmp_path / "index.html"
  path.write_text(content)
  with pytest.raises(ValueError, match="must be a new file") as error:
    clipjax.runs.write_report(run_of(healthy()), path)
  assert str(error.value) == (
    f"`path` must be a new file or a page that clipjax wrote, got {str(path)!r}, which is neither: name another file, "
    "or remove that one."
  )
  assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


def test_a_page_and_an_empty_file_are_overwritten(tmp_path):
  path = tmp_path / "report.html"
  path.touch()
  for columns in (healthy(), with_spikes()):
    clipjax.runs.write_report(run_of(columns), path)
    assert path.read_text().startswith(mark.START)
    assert f'<meta name="generator" content="clipjax {clipjax.__version__}">' in path.read_text()


def test_a_link_to_another_file_is_kept(tmp_path):
  path, other = tmp_path / "report.html", tmp_path / "notes.txt"
  other.write_text("mine")
  os.symlink(other, path)
  with pytest.raises(ValueError, match="which is neither"):
    clipjax.runs.write_report(run_of(healthy()), path)
  assert other.read_text() == "mine" and path.is_symlink()


# Throughput ---------------------------------------------------------------------------------------------------------


def test_tokens_of_an_update_that_takes_several_steps():
  # Four micro-batches of half a second, 100 tokens each: rows every fourth step, with the sums.
  columns = {"grad/norm": np.ones(N), "time": np.arange(N) * 2.0, "tokens": np.full(N, 400.0), "update": np.arange(N)}
  report = clipjax.runs.diagnose(run_of(columns, steps=np.arange(N) * 4))
  (step_time,) = [f.message for f in report if f.name == "step-time"]
  (throughput,) = [f.message for f in report if f.name == "throughput"]
  assert step_time.startswith("2 s a step") and throughput.startswith("200 tokens a second")
