"""The report has the limits and the warm-up of the verdict, steps as they were pushed, and spares other files."""

import os
import pathlib
import re

import numpy as np
import pytest
from synthetic import N, healthy, layered, run_of, with_spikes

import clipjax
from clipjax.runs.report import figures, mark, series
from clipjax.runs.report.series import norm_series, worst_step

Limits = clipjax.runs.HealthLimits


def text_of(run, tmp_path, **options):
  """The words of a page, without its tags."""
  page = clipjax.runs.write_report(run, tmp_path / "report.html", **options).read_text()
  return re.sub("<[^>]*>", "", re.sub("<script.*?</script>", "", page, flags=re.DOTALL)).replace("&#x27;", "'")


def lines_of(axes):
  return {line.get_label(): line for line in axes.lines}


# Limits -------------------------------------------------------------------------------------------------------------


def test_the_verdict_of_the_page_has_the_limits(tmp_path):
  run = run_of(healthy(**{"grad/clip_fraction": np.full(N, 0.7)}))
  assert "'grad' clipped 70% of the steps." in text_of(run, tmp_path)
  text = text_of(run, tmp_path, limits=Limits(clip_fraction=0.9), warmup_steps=123)
  assert "'grad' clipped 70% of the steps." not in text
  assert "after the warm-up of 123 steps" in text
  assert "(the 123 of the warm-up left out)" in text  # Of the suggestion.


def test_the_speed_of_the_page_leaves_out_the_same_warm_up(tmp_path):
  time = np.cumsum(np.where(np.arange(N) < 300, 9.0, 0.5))
  run = run_of(healthy(time=time))
  assert "time of a step9 s" in text_of(run, tmp_path)
  text = text_of(run, tmp_path, warmup_steps=300)
  assert "Line chart of the time of a step: 500 ms, the median of parts of the run" in text
  assert "time of a step500 ms" in text and "500 ms a step" in text


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


def test_spikes_are_ringed_by_the_rule_of_the_verdict():
  run = run_of(with_spikes())
  rings = lines_of(clipjax.runs.plot_norms(run).axes[0])["spike"]
  assert rings.get_xdata().tolist() == [201, 301] and rings.get_ydata().tolist() == [30.0, 30.0]
  assert "spike" not in lines_of(clipjax.runs.plot_norms(run, limits=Limits(spike_sigma=1e6)).axes[0])
  assert norm_series(run).spikes.nonzero()[0].tolist() == [200, 300]


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


# Steps --------------------------------------------------------------------------------------------------------------


def watched(steps, counts, worst, norm, rows, values):
  """A run of a watch that recorded norms by leaf at its worst step alone, in these rows."""
  columns = {"grad/norm": norm, "grad/steps": counts, "grad/worst_step": worst}
  at = np.array(rows), np.array(values, np.float64)
  return run_of(columns, steps=steps, leaves={"grad": ("a", "b")}, vectors={"grad/worst_norm": at})


def layers(run):
  return worst_step(run, norm_series(run))


def test_the_worst_step_is_the_one_that_was_pushed():
  run = watched([100, 200, 300], [1, 2, 3], [1, 2, 2], [1.0, 9.0, 2.0], [100, 300], [[1, 0], [8, 4]])
  assert layers(run) == (200, 9.0, (("a", 8.0), ("b", 4.0)))
  # By the number of the step alone, none would be found, or that of another step.
  other = watched([2, 3, 4], [1, 2, 3], [1, 1, 1], [1.0, 9.0, 2.0], [2, 4], [[1, 0], [1, 0]])
  assert layers(other) == (3, 9.0, ())
  far = watched([2, 3, 4], [11, 12, 13], [2, 2, 2], [9.0, 1.0, 2.0], [2, 4], [[1, 0], [1, 0]])
  assert layers(far) == (2, 9.0, ())


def test_the_worst_step_may_be_one_out_of_the_history_of_a_watch():
  nan = np.nan
  run = watched(
    [101, 102, 103, 104, 108], [nan, nan, nan, 4, 8], [nan, nan, nan, 2, 2], [1, 9, 1, 1, 1], [104], [[8.0, 4.0]]
  )
  assert layers(run) == (102, 9.0, (("a", 8.0), ("b", 4.0)))


def test_the_worst_step_of_a_new_state_is_not_that_of_the_one_before():
  # The second state, from step 130 on, had its worst step as its second, and the largest norm of all.
  run = watched(
    [110, 120, 130, 140, 150], [1, 2, 1, 2, 3], [1, 2, 1, 2, 2], [1, 5, 1, 9, 1], [120, 150], [[5, 1], [9, 2]]
  )
  assert layers(run) == (140, 9.0, (("a", 9.0), ("b", 2.0)))
  first = watched([110, 120, 130, 140, 150], [1, 2, 1, 2, 3], [1, 2, 1, 2, 2], [1, 9, 1, 5, 1], [150], [[5.0, 1.0]])
  assert layers(first) == (120, 9.0, ())


def test_a_rejected_step_has_no_layers_though_the_one_before_has_its_count():
  nan = np.nan
  columns = {
    "grad/norm": [1.0, 9.0, nan, 1.0],
    "grad/steps": [1, 2, 2, 3],
    "grad/worst_step": [1, 2, 2, 2],
    "skip/norm": [1.0, 9.0, 700.0, 1.0],
    "skip/consecutive": [0, 0, 1, 0],
  }
  vectors = {"grad/worst_norm": (np.array([20, 30, 40]), np.array([[9.0, 1.0]] * 3))}
  run = run_of(columns, steps=[10, 20, 30, 40], leaves={"grad": ("a", "b")}, vectors=vectors)
  assert layers(run) == (30, 700.0, ())


def test_layers_that_were_not_recorded_at_the_worst_step_are_left_out_and_bad_ones_come_first():
  run = run_of({"grad/norm": [1.0, 9.0]}, leaves={"grad": ("a", "b", "c")})
  run.vectors["grad/norm"] = np.array([2]), np.array([[3.0, np.nan, np.inf]])
  assert layers(run).layers == (("c", np.inf), ("a", 3.0))


def test_leaves_that_were_not_recorded_are_no_colour_of_the_map():
  values = np.ones((40, 2))
  values[:20, 0], values[30, 1] = np.nan, np.inf
  run = run_of(healthy(), **layered(values))
  (image,) = figures.layers(series.vectors(run, "grad/norm")).axes[0].images
  _, high = image.get_clim()
  drawn = image.get_array()
  assert drawn.mask[0, :20].all() and not drawn.mask[0, 20:].any() and not drawn.mask[1].any()
  assert (drawn[1] > high).nonzero()[0].tolist() == [30]
  assert tuple(image.cmap(np.ma.masked)) == (0, 0, 0, 0)


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
