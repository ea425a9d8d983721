"""The figures of a report and the numbers behind them: thinned lines, the heat map, axes, labels."""

import functools
import itertools
import re

import numpy as np
import pytest
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pages import full, judged, make

import clipjax
from clipjax.runs import speed
from clipjax.runs.health.verdict import diagnose
from clipjax.runs.report import axes as report_axes
from clipjax.runs.report import course, figures, heatmap, html, sections, series

# Numbers and thinning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 20, 21, 1000, 1001])
def test_thinning_keeps_ends_extremes_and_gaps(n):
  values = np.random.default_rng(n).normal(size=n)
  values[n // 2 : n // 2 + n // 5] = np.nan
  kept = series.thin(values, 10)
  assert (np.diff(kept) > 0).all()
  assert {0, n - 1} <= set(kept.tolist()) and kept.size <= 22
  assert np.isnan(values[kept]).any() == np.isnan(values).any()
  for part in np.split(values, np.linspace(0, n, 11).astype(np.int64)[1:-1]):
    assert {*part[part == np.nanmin(part, initial=9)], *part[part == np.nanmax(part, initial=-9)]} <= {*values[kept]}
  assert series.thin(np.full(1000, np.nan), 10).size == 11


def test_thinned_marks_leave_no_part_out():
  mask = np.zeros(1000, np.bool_)
  mask[[3, 4, 555, 999]] = True
  assert series.thin_mask(mask, 10).tolist() == [3, 555, 999]
  assert series.thin_mask(mask[:3], 10).tolist() == []


def test_a_spike_of_one_step_in_many_is_drawn():
  norm = np.ones(5000)
  norm[3123] = 77.0
  (axes,) = clipjax.runs.plot_norms(make(norm, bad=[4000])).axes
  assert (axes.get_yscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "step", "grad/norm")
  lines = {line.get_label(): line for line in axes.lines}
  assert lines["norm"].get_ydata().max() == 77.0 and lines["norm"].get_xdata().size < 2000
  assert (lines["clipped"].get_xdata().tolist(), lines["nonfinite"].get_xdata().tolist()) == ([3124], [4001])
  assert lines["threshold 2"].get_ydata() == [2.0, 2.0]


NAN = np.nan
SKIPPED = {"grad/steps": [1, 2, 2, 3], "skip/consecutive": [0, 0, 1, 0], "skip/norm": [1, 3, 400, 1.5]}
MULTI = {"grad/steps": [0, 1, 1, 2], "skip/consecutive": [0, 0, 0, 0], "skip/norm": [2, 4, 7, 3]}
WATCHED = {"grad/max_norm": [2, NAN, NAN, 4], "grad/scale": [1, NAN, NAN, 0.5]}


@pytest.mark.parametrize(
  ("norm", "columns", "seen", "clipped", "rejected"),
  [
    # With a scale, and without one by the threshold.
    ([1, 3, 5, 1], {"grad/scale": [1, 0.5, NAN, NAN]}, [1, 3, 5, 1], [0, 1, 1, 0], [0, 0, 0, 0]),
    # A rejected step has the norm that skip_steps saw.
    ([1, 3, 3, 1.5], SKIPPED, [1, 3, 400, 1.5], [0, 1, 0, 0], [0, 0, 1, 0]),
    # As of optax.MultiSteps inside skip_steps: a step that only adds to a larger one is neither rejected nor clipped.
    ([0, 3, 3, 5], MULTI, [NAN, 3, NAN, 5], [0, 1, 0, 1], [0, 0, 0, 0]),
    # A norm from the history of a watch is compared with the threshold of the next push.
    ([1, 5, 1, 9], WATCHED, [1, 5, 1, 9], [0, 1, 0, 1], [0, 0, 0, 0]),
  ],
)
def test_norms_with_what_was_clipped_and_rejected(norm, columns, seen, clipped, rejected):
  run = make(norm)
  run.columns.update({key: np.array(values, np.float64) for key, values in columns.items()})
  found = series.norm_series(run, "grad")
  np.testing.assert_array_equal(found.norm, seen)
  assert (found.clipped.tolist(), found.rejected.tolist()) == (clipped, rejected)
  assert not found.nonfinite.any()


def test_time_of_a_step_and_throughput():
  run = make([1.0] * 5, time=[10.0, 10.5, np.nan, 11.5, 11.0], tokens=[7.0, 8.0, 7.0, 9.0, 7.0])
  steps, seconds = speed.seconds_per_step(run)
  assert (steps.tolist(), seconds.tolist()) == ([2, 4], [0.5, 0.5])  # Two steps in a second; a clock set back.


def test_the_step_time_is_a_median_over_parts_of_the_run():
  # Pushes come in pairs, 1 ms apart, as the host waits for the device at every other step; a step takes 0.5 s.
  time = np.arange(1001) * 0.5
  time[1::2] -= 0.499
  run = make(np.ones(1001), time=time, tokens=np.where(np.arange(1001) % 2, np.nan, 8.0))
  assert speed.speed(run).step_time == pytest.approx(0.5, rel=0.03)
  at, rate = speed.throughput(run, "tokens")
  assert at.size == 50
  np.testing.assert_allclose(rate, 16.0, rtol=0.06)
  assert speed.speed(make([1.0])) is None
  assert speed.throughput(make([1.0, 1.0], time=[1.0, 1.0], tokens=[1.0, 1.0]), "tokens")[0].size == 0


def test_the_section_and_the_verdict_have_one_speed():
  # Slow and short steps in the warm-up, and a clock that was set back in the middle.
  time = np.cumsum(np.where(np.arange(200) < 20, 9.0, 0.5)) - np.where(np.arange(200) < 100, 0.0, 60.0)
  run = make(np.ones(200), time=time, tokens=np.where(np.arange(200) < 20, 1.0, 50.0))
  words = " ".join(judged(run, diagnose(run)).words)
  assert "500 ms per step (median of 19 parts of the run); between pushes: median 500 ms, p99 500 ms." in words
  assert "100 tokens per second at that step time." in words
  assert (
    "500 ms, the median over parts of the run; time between pushes: median 500 ms, 99th percentile 500 ms;" in words
  )
  assert "; 100 tokens per second." in words


def test_thresholds_by_group_are_named_as_such():
  run = make([1.0, 3.0])
  assert not series.norm_series(run, "grad").by_block
  run.columns["grad/max_norm/decoder"] = np.ones(2)
  assert "Smallest threshold of any leaf or group 2." in course.norm_words(series.norm_series(run, "grad"))
  assert clipjax.runs.plot_norms(run).axes[0].lines[-1].get_label() == "smallest threshold 2"


def test_a_threshold_that_moves_is_a_line_and_zeros_and_rejected_steps_are_counted():
  run = make([0.0, 1.0, 9.0, 2.0, 0.0], **{"skip/consecutive": [0, 0, 1, 0, 0]})
  run.columns["grad/max_norm"] = np.array([1.0, 2.0, 4.0, 3.0, 3.0])
  page = judged(run)
  assert "Threshold between 1 and 4, at last 3." in page.alt("Timeline")
  assert "1 of 5 (20%) steps rejected by skip_steps." in page.alt("Timeline")
  assert "Squares are steps that skip_steps rejected, at the norm that it saw." in page.text
  assert "2 steps with norm 0 cannot be shown on a log axis." in page.text
  (line,) = [line for line in clipjax.runs.plot_norms(run).axes[0].lines if line.get_label() == "threshold"]
  assert list(line.get_ydata()) == [1.0, 2.0, 4.0, 3.0, 3.0]


def test_a_run_without_a_finite_norm_has_no_histogram():
  text = judged(make([1.0, 2.0], bad=[0, 1])).text
  assert "no step after the warm-up had a finite norm above 0, so there is nothing to draw." in text


@pytest.mark.parametrize(
  ("shorten", "names", "want"),
  [
    (series.without_common, ("p/l0/w", "p/l1/w"), ("l0", "l1")),
    (series.without_common, ("p/l0/w", "p/l1/b"), ("l0/w", "l1/b")),
    (series.without_common, ("a/a", "a/a"), ("a", "a")),
    (series.without_common, ("a", "a/b"), ("a", "a/b")),
    (series.without_common, ("a/b",), ("a/b",)),
    (series.without_common, (), ()),
    (series.without_last, ("a/kernel", "a/bias", "b/kernel"), ("a/kernel", "a/bias", "b")),
    (series.without_last, ("a/b", "a"), ("a/b", "a")),
    (series.without_last, ("a",), ("a",)),
  ],
)
def test_labels_leave_out_what_tells_nothing(shorten, names, want):
  assert shorten(names) == want


@pytest.mark.parametrize(
  ("x", "text"), [(0.001, "0.001"), (2000.0, "2,000"), (1e6, "1e6"), (1e-5, "1e-5"), (0.5, "0.5"), (1e-300, "1e-300")]
)
def test_ticks_are_short(x, text):
  assert report_axes.tick(x) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0123, "12.3 ms"), (60.0, "60 s"), (120.0, "2 min"), (1e5, "27.8 h")])
def test_long_times_have_a_long_unit(seconds, text):
  assert sections.long_time(seconds) == text


def test_short_names_keep_both_ends():
  assert series.short("params/layers_12/attention/kernel", 18) == "params/lay…/kernel"
  assert series.short("a" * 18, 18) == "a" * 18
  assert len(series.short("x" * 200, 36)) == 36


# Figures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [report_axes.WIDE, report_axes.NARROW])
@pytest.mark.parametrize("count", [1, 40, 300])
def test_labels_of_layers_do_not_touch(count, width):
  names = tuple(f"params/layers_{i}/kernel" for i in range(count))
  figure = heatmap.layers(series.vectors(full(names=names), "grad/norm"), width)
  FigureCanvasAgg(figure).draw()
  labels = figure.axes[0].get_yticklabels()
  wanted = "layers_0" if count > 1 else series.short("params/layers_0", 22 if width == report_axes.WIDE else 14)
  assert labels[0].get_text() == wanted
  boxes = [label.get_window_extent() for label in labels]
  assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
  assert min(box.x0 for box in boxes) >= 0
  assert len(boxes) >= min(count, 40 if width == report_axes.WIDE else 36)


@pytest.mark.parametrize("low", [1e-300, 1e-9, 0.3, 1.0, 7.0, 1e30, 1e300])
@pytest.mark.parametrize("span", [1.0, 1.5, 20.0, 1e8])
def test_log_axes_have_a_few_labels_around_the_data(low, span):
  axes = Figure().add_subplot()
  report_axes.log_axis(axes, np.array([low, np.nan, low * span]))
  bottom, top = axes.get_ylim()
  ticks = [x for x in axes.get_yticks() if bottom <= x <= top]
  assert bottom < low <= min(low * span, 1e307) <= top
  assert 1 <= len(ticks) <= 8


def test_a_figure_has_the_colours_of_the_page_and_not_the_style_of_the_caller():
  draw = functools.partial(figures.norms, series.norm_series(full(), "grad"))
  plain = html.svg(draw, report_axes.WIDE, "words")
  with style.context(["dark_background", {"axes.linewidth": 9, "legend.fontsize": 30}]):
    assert html.svg(draw, report_axes.WIDE, "words") == plain  # And one run makes one file, to the byte.
    assert clipjax.runs.plot_norms(full()).get_facecolor()[:3] == (0, 0, 0)
  assert html.INK not in plain and "var(--blue)" in plain and "currentColor" in plain
  # Matplotlib names clip paths by memory addresses.
  assert {name[:5] for name in re.findall(r"url\(#([^)]*)\)", plain)} == {"clip-"}
