"""The heat map of a report: columns at their own steps, empty cells for missing records, layers by depth."""

import numpy as np
import pytest
from synthetic import N, healthy, layered, run_of

from clipjax.runs.health.events import Event
from clipjax.runs.report import heatmap
from clipjax.runs.report.grid import Steps, jumps, over_usual, rhythm, steps_of, time_grid, usual
from clipjax.runs.report.series import Vectors, vectors


def rows(steps, values=None):
  steps = np.asarray(steps)
  values = np.ones((steps.size, 1)) if values is None else np.asarray(values, np.float64).reshape(steps.size, -1)
  return Vectors(steps, values, tuple(f"leaf {i}" for i in range(values.shape[1])))


def test_a_spike_of_one_step_is_one_column_at_its_step():
  # Rows once in 10 steps, and one at step 207, since it is a spike.
  found = rows(sorted([*range(1, 300, 10), 207]))
  found.values[found.steps == 207] = 50.0
  start, stop, grid = time_grid(found, Steps(1, 300, 1.0), 1000)
  assert (start, stop, grid.shape) == (0.5, 300.5, (1, 300))
  assert (np.flatnonzero(grid[0] > 1) + 1).tolist() == [207]
  known = np.flatnonzero(np.isfinite(grid[0])) + 1
  assert known.tolist() == list(range(1, 297))  # Half a gap beyond the last row.


def test_a_row_of_an_event_stands_for_its_own_step_though_it_is_in_the_rhythm():
  found = rows(range(1, 300, 10))
  found.values[20] = 50.0  # Step 201.
  grid = time_grid(found, Steps(1, 300, 1.0), 1000, found.steps == 201).values[0]
  assert (np.flatnonzero(grid > 1) + 1).tolist() == [201]
  assert (np.flatnonzero(np.isnan(grid[:296])) + 1).tolist() == [197, 198, 199, 200, 202, 203, 204, 205]


def test_what_comes_after_a_jump_does_not_stand_for_what_was_before():
  # The norm jumps at step 192 and is still large at step 200, which was due.
  found = rows([0, 50, 100, 150, *range(192, 199), 200, 250, 300], [1] * 4 + [90] * 7 + [9, 1, 1])
  grid = time_grid(found, Steps(0, 300, 1.0), 1000, (found.steps > 190) & (found.steps < 199)).values[0]
  assert np.flatnonzero(grid > 1).tolist() == list(range(192, 226))
  assert np.flatnonzero(np.isnan(grid)).tolist() == list(range(176, 192))


def test_what_was_not_recorded_is_empty():
  grid = time_grid(rows([*range(10, 110, 10), *range(500, 610, 10)]), Steps(1, 700, 1.0), 1000).values[0]
  assert (np.flatnonzero(np.isfinite(grid)) + 1).tolist() == [*range(5, 106), *range(495, 606)]


def test_a_column_of_many_steps_has_the_greatest_value_and_what_was_not_finite():
  steps = np.arange(0, 5000, 10) + 1
  values = np.ones((500, 3))
  values[321, 1], values[123, 2] = 9.0, np.inf
  values[:25, 0] = values[300:302, 1] = np.nan  # They were not recorded.
  start, stop, grid = time_grid(rows(steps, values), steps_of(steps), 50)
  assert (start, stop) == (-4, 4996)
  assert grid.shape == (3, 50)
  assert grid[1].argmax() == 321 // 10
  assert np.flatnonzero(np.isinf(grid[2])).tolist() == [123 // 10]
  assert np.isnan(grid[0]).tolist() == [True] * 2 + [False] * 48
  assert (grid[0, 2:] == 1).all() and not np.isnan(grid[1]).any()


def test_one_row():
  assert time_grid(rows([7], [4.0]), steps_of(np.array([7])), 50) == (6.5, 7.5, [[4.0]])
  grid = time_grid(rows([7], [4.0]), Steps(5, 9, 1.0), 50).values
  np.testing.assert_array_equal(grid, [[np.nan, np.nan, 4, np.nan, np.nan]])


def test_the_rhythm_of_the_recorder_is_found_among_other_rows():
  due = list(range(1, 500, 50))
  for between in ([], [2, 3, 4, 7, 77], [*range(300, 401)], [*range(2, 51), 444]):
    steps = np.array(sorted({*due, *between}))
    regular, gap = rhythm(steps)
    assert gap == 50 and steps[regular].tolist() == due
    assert steps[rhythm(steps, steps == 151)[0]].tolist() == [step for step in due if step != 151]
  assert rhythm(np.arange(5, 100))[1] == 1 and rhythm(np.arange(5, 100))[0].all()
  lost = np.delete(np.arange(0, 1000, 10), [40, 41])  # As where a process was killed.
  assert rhythm(lost)[1] == 10 and rhythm(lost)[0].all()
  examples = np.array([1, 2, 3, *range(10**12, 10**15, 10**12)])  # Steps may be counts of examples.
  assert rhythm(examples)[1] == 10**12


def test_without_a_rhythm_every_row_is_regular_and_the_gap_is_the_median():
  regular, gap = rhythm(np.array([1, 4, 20, 22, 90, 300]))
  assert regular.all() and gap == 16
  regular, gap = rhythm(np.array([1, 7]))
  assert regular.all() and gap == 6
  assert rhythm(np.array([1, 7]), np.array([True, True])) == (pytest.approx(np.array([False, False])), 1)


def test_the_usual_norm_is_a_median_over_regular_rows():
  found = rows(range(1, 9), [1, 1, 1, 1, 90, 90, 90, 90])
  alone = found.steps > 4
  assert usual(found, alone).tolist() == [1.0]
  assert over_usual(found, alone).values[:, 0].tolist() == [1] * 4 + [90] * 4
  assert usual(found, found.steps > 3) is None and over_usual(found, found.steps > 3) is None
  dead = rows(range(4), [0, 0, 0, 0])
  assert np.isnan(usual(dead)).all() and not over_usual(dead).values.any()


def test_a_layer_jumps_at_its_largest_norm_within_the_event():
  found = rows(range(10), np.ones((10, 2)))
  found.values[4, 1] = 5.0
  found.values[6, 1] = np.nan
  assert jumps(found, [Event(3, 7, (), ("leaf 1", "other")), Event(20, 21, (), ("leaf 0",))]) == [(4, 1)]


def test_leaves_that_were_not_recorded_are_no_colour_of_the_map():
  values = np.ones((40, 2))
  values[:20, 0], values[30, 1], values[35, 1] = np.nan, np.inf, 0.0
  run = run_of(healthy(), **layered(values))
  figure = heatmap.layers(vectors(run, "grad/norm"), axis=Steps(1, N, 10.0))
  (image,) = figure.axes[0].images
  low, high = image.get_clim()
  drawn = image.get_array()
  assert drawn.shape == (2, 41)
  assert drawn.mask[0, :20].all() and not drawn.mask[0, 20:40].any() and not drawn.mask[1, :40].any()
  assert (drawn[1] > high).nonzero()[0].tolist() == [30] and (drawn[1] < low).nonzero()[0].tolist() == [35]
  assert tuple(image.cmap(np.ma.masked)) == (0, 0, 0, 0)
  assert {line.get_label() for line in figure.axes[0].lines} >= {"nonfinite", "zero"}
