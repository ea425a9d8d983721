"""The worst step of a report: which step it is, by its pushed number, and its layers."""

import numpy as np
import pytest
from pages import judged, make
from synthetic import run_of

from clipjax.runs.health.events import Event, Move
from clipjax.runs.health.findings import Finding
from clipjax.runs.report.series import norm_series
from clipjax.runs.report.worst import worst_step

NAN = np.nan
AB = (("a", 8.0), ("b", 4.0))
RESUMED = [110, 120, 130, 140, 150]


def worst(run, *args):
  return worst_step(run, norm_series(run, "grad"), *args)


def watched(steps, counts, worst, norm, rows, values):
  """A run of a watch that recorded norms by leaf only at its worst step, in these rows."""
  columns = {"grad/norm": norm, "grad/steps": counts, "grad/worst_step": worst}
  at = np.array(rows), np.array(values, np.float64)
  return run_of(columns, steps=steps, leaves={"grad": ("a", "b")}, vectors={"grad/worst_norm": at})


def layers(run):
  found = worst(run)
  return found.step, found.norm, tuple(layer[:2] for layer in found.layers)


@pytest.mark.parametrize(
  ("recorded", "worst"),
  [
    (([100, 200, 300], [1, 2, 3], [1, 2, 2], [1, 9, 2], [100, 300], [[1, 0], [8, 4]]), (200, 9.0, AB)),
    # A search by the number of the step would find no step or another one.
    (([2, 3, 4], [1, 2, 3], [1, 1, 1], [1, 9, 2], [2, 4], [[1, 0], [1, 0]]), (3, 9.0, ())),
    (([2, 3, 4], [11, 12, 13], [2, 2, 2], [9, 1, 2], [2, 4], [[1, 0], [1, 0]]), (2, 9.0, ())),
    # The worst step may be one out of the history of a watch.
    (
      ([101, 102, 103, 104, 108], [NAN, NAN, NAN, 4, 8], [NAN, NAN, NAN, 2, 2], [1, 9, 1, 1, 1], [104], [[8, 4]]),
      (102, 9.0, AB),
    ),
    # A second state, from step 130 on: its worst step is its second too, and has the largest norm of all, or not.
    ((RESUMED, [1, 2, 1, 2, 3], [1, 2, 1, 2, 2], [1, 5, 1, 9, 1], [120, 150], [[5, 1], [8, 4]]), (140, 9.0, AB)),
    ((RESUMED, [1, 2, 1, 2, 3], [1, 2, 1, 2, 2], [1, 9, 1, 5, 1], [150], [[5, 1]]), (120, 9.0, ())),
  ],
)
def test_the_worst_step_is_the_one_that_was_pushed(recorded, worst):
  assert layers(watched(*recorded)) == worst


def test_a_rejected_step_has_no_layers_though_the_one_before_has_its_count():
  run = watched([10, 20, 30, 40], [1, 2, 2, 3], [1, 2, 2, 2], [1, 9, 9, 1], [20, 30, 40], [[9.0, 1.0]] * 3)
  run.columns.update({"skip/norm": np.array([1, 9, 700, 1.0]), "skip/consecutive": np.array([0, 0, 1, 0.0])})
  assert layers(run) == (30, 700.0, ())
  text = "Step 30, the largest norm: grad/norm 700.skip_steps rejected it, and a clipjax.watch() inside did not"
  assert text in judged(run).text


def test_layers_that_were_not_recorded_at_the_worst_step_are_left_out_and_bad_ones_come_first():
  run = run_of({"grad/norm": [1.0, 9.0]}, leaves={"grad": ("a", "b", "c")})
  run.vectors["grad/norm"] = np.array([2]), np.array([[3.0, np.nan, np.inf]])
  assert layers(run)[2] == (("c", np.inf), ("a", 3.0))


def test_worst_step_by_layer():
  run = make([1.0, 9.0, 2.0], names=("a", "b"), every=1)
  assert layers(run) == (2, 9.0, (("b", 9.0), ("a", 4.5)))
  # Recorded only later, by the watch, which keeps the norms of its worst step.
  run.vectors.clear()
  run.columns["grad/worst_step"] = np.array([1.0, np.nan, 2.0])
  run.vectors["grad/worst_norm"] = np.array([1, 3]), np.array([[1.0, 1.0], [7.0, 3.0]])
  assert layers(run)[2] == (("a", 7.0), ("b", 3.0))
  run.columns["grad/worst_step"][:] = 1.0
  assert layers(run)[2] == ()


# Which step ---------------------------------------------------------------------------------------------------------


def event(start, end, **kwargs):
  return Event(start, end, (Move("grad/norm", start, 9.0, 1.0),), **kwargs)


def test_a_step_that_was_applied_and_not_finite_comes_before_any_other():
  run = make([1.0, 50.0, 1.0, 1.0, 2.0], bad=[0, 3], names=("a", "b"), every=1)
  assert worst(run)[:2] == (2, 50.0)  # What was dropped, as an overflow at the start, is not the worst.
  step, norm, layers = worst(run, (), (1, 4))
  assert (step, np.isnan(norm), layers[0].name) == (1, True, "a")
  assert worst(run, (), (4,)).step == 4
  assert worst(make([1.0, 1.0], bad=[0, 1])).step == 1  # There is no other.
  assert worst(run_of({"grad/norm": [np.nan]})) is None


def test_an_event_that_reached_the_parameters_comes_before_a_larger_norm_that_was_caught():
  run = make([9.0, 1.0, 7.0, 8.0, 1.0, 99.0])
  caught = event(6, 6, is_caught=True)
  assert worst(run, (event(3, 5), caught)).step == 4
  assert worst(run, (caught,)).step == 6
  page = judged(run, [], [event(3, 5), caught])
  assert "Worst stepStep 4, the largest norm in an event that reached the parameters: grad/norm 8." in page.text
  assert "Largest normStep 6, the largest norm: grad/norm 99." in judged(run).text


def test_layers_are_ordered_by_how_far_they_moved():
  run = make(np.ones(100), names=("large", "small", "bad"), every=10)
  _, values = run.vectors["grad/norm"]
  values[:] = 100.0, 1.0, 5.0
  values[5] = 110.0, 30.0, np.inf
  run.columns["grad/norm"][50] = 200.0
  assert worst(run).layers == (("bad", np.inf, np.inf), ("small", 30.0, 30.0), ("large", 110.0, 1.1))
  # A long event has many rows, of which none tells what is usual.
  run.vectors["grad/norm"] = np.arange(1, 101), np.ones((100, 3))
  run.vectors["grad/norm"][1][30:95, 1] = 30.0
  assert [layer.times for layer in worst(run, (event(31, 95),)).layers] == [30.0, 1.0, 1.0]


def test_the_page_shows_the_worst_step_of_the_finding():
  run = make([1.0, 50.0, 1.0], bad=[0], names=("a", "b"), every=1)
  finding = Finding("FAIL", "nonfinite", "m", steps=(1,))
  assert "Step 1, the first nonfinite step of grad/norm.layernormanonfinite" in judged(run, [finding]).text
  assert "Step 2, the largest norm" in judged(run, [finding._replace(name="nonfinite-dropped")]).text
