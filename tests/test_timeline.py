"""What happened, on one axis of steps: the first screen, the timeline and its marks, its close-up, the events."""

import dataclasses
import itertools
import re
import time

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from pages import full, judged, labels, lines_of, make, panel, shown
from synthetic import healthy, run_of

from clipjax.runs.health.events import Event, Move
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.verdict import HealthReport
from clipjax.runs.report import axes as report_axes
from clipjax.runs.report import build_page, course, happened, marks, sections
from clipjax.runs.report.grid import Steps, steps_of
from clipjax.runs.report.timeline import timeline

WIDTHS = (report_axes.WIDE, report_axes.NARROW)
SPIKE = Finding("WARN", "spikes", "The norm rose 50 times at step 151.", "Leave out batch 7.", "rule", "", (151,))
DIVERGED = Finding("FAIL", "diverged", "The loss left at step 200.", "Go back.", steps=(200, 201))
INFO = Finding("INFO", "norms", "p50 1.")


def event(start=151, end=152, **kwargs):
  moves = (Move("grad/norm", start, 50.0, 1.0), Move("loss", start + 1, 9.0, 2.0))
  return Event(start, end, moves, **({"leaves": ("layers/0/w",), "batches": (7,)} | kwargs))


def drawn(run, findings=(), events=(), width=report_axes.WIDE, axis=None):
  """The timeline, laid out as in the page."""
  figure = timeline(course.timeline_of(shown(run, findings, events, 0)), axis or steps_of(run.steps), width)
  FigureCanvasAgg(figure).draw()
  return figure


def titles(figure):
  return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def rings_of(axes):
  """The place of each line of rings."""
  rings = [line for line in axes.lines if line.get_fillstyle() == "none" and len(line.get_xdata())]
  return [(*line.get_xdata(), *line.get_ydata()) for line in rings]


def bold(axes):
  return {text.get_text() for text in axes.get_yticklabels() if text.get_fontweight() == "bold"}


# The first screen ---------------------------------------------------------------------------------------------------


def said(findings, events=()):
  """The first screen without its tags."""
  return re.sub("<[^>]*>", "", happened.first_screen(HealthReport(tuple(findings), "", 300, 0, tuple(events))))


MANY = [Finding("WARN", f"name-{i}", f"message {i}") for i in range(5)]
THREE = "WARN message 0WARN message 1WARN message 2"


@pytest.mark.parametrize(
  ("findings", "events", "text"),
  [
    ([INFO], [], "No problem was found."),
    ([DIVERGED], [event(190, 210)], "Go back.Marked in the timeline as diverged, 1."),
    ([SPIKE], [event(1, 2), event(), event(150, 155)], "batch 7.Marked in the timeline as 2, 3."),
    ([SPIKE._replace(steps=())], [], "What to do: Leave out batch 7."),
    (MANY, [], f"{THREE}2 more findings (FAIL or WARN): see the whole verdict."),
    (MANY[:4], [], f"{THREE}1 more finding (FAIL or WARN): see the whole verdict."),
    (MANY[:3], [], THREE),
  ],
)
def test_the_first_screen_has_three_findings_with_what_they_are_marked_with(findings, events, text):
  assert said(findings, events).endswith(text)


def test_the_page_begins_with_what_happened_and_ends_with_the_whole_verdict():
  page = judged(full(), [DIVERGED, SPIKE, *MANY, INFO], [event()])
  begin, verdict = page.text.split("Timeline")[0], page.text.split("Verdict: 1 FAIL, 6 WARN, 1 INFO")[1]
  first, second = (
    "FAIL The loss left at step 200.What to do: Go back.Marked in the timeline as diverged.",
    "WARN The norm rose 50 times at step 151.What to do: Leave out batch 7.Marked in the timeline as 1.",
  )
  assert begin.index(first) < begin.index(second) < begin.index("see the whole verdict") < begin.index("steps300")
  assert "p50 1." not in begin and "No problem" not in begin
  assert all(one.message in verdict for one in (DIVERGED, SPIKE, *MANY, INFO))
  assert '<a href="#verdict">' in page.source and '<h2 id="verdict">' in page.source


# Marks --------------------------------------------------------------------------------------------------------------


def test_what_happened_is_marked_in_every_panel():
  figure = drawn(full(), [DIVERGED, SPIKE], [event()])
  assert titles(figure) == ["What happened", "Loss", "Learning rate", "Gradient norm", "Norm of the update", "Layers"]
  lane, *panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
  assert {text.get_text() for text in lane.texts} == {"1", "diverged"}
  assert labels(lane) == ["finding of the verdict", "reached the parameters"]
  for axes in panels:
    assert axes.get_xlim() == panels[0].get_xlim()
    starts = {x for c in axes.collections if hasattr(c, "get_segments") for (x, _), _ in c.get_segments()}
    triangles = {x for line in axes.lines if line.get_marker() == "v" for x in line.get_xdata()}
    assert starts == {151, 200} or (axes.images and triangles >= {151, 200})
  assert drawn(full()).axes[0].get_title(loc="left") == "Loss"  # No lane without marks.


def test_the_largest_value_of_an_event_is_in_a_ring():
  run = full()
  run.columns["loss"][151] = 9.0
  figure = drawn(run, [SPIKE], [event()])
  assert rings_of(panel(figure, "Loss")) == [(152, 9.0)]
  assert rings_of(panel(figure, "Gradient norm")) == [(151, 50.0)]
  assert rings_of(panel(figure, "Norm of the update")) == []
  assert bold(panel(figure, "Layers")) == {"layers/0"}


def test_a_layer_that_an_event_names_has_a_ring_and_a_label():
  run = full(names=tuple(f"layers/{i}/w" for i in range(300)), every=10)
  run.vectors["grad/norm"][1][15, 217] *= 30  # At step 151.
  layers = panel(drawn(run, [SPIKE], [event(leaves=("layers/217/w", "gone"))]), "Layers")
  assert rings_of(layers) == [(151, 217)] and bold(layers) == {"217"}


def test_events_are_numbered_by_their_steps_and_of_many_the_strongest_are():
  events = [event(10 * i, 10 * i, is_caught=i % 2 == 0) for i in range(1, 29)]
  events[7] = Event(80, 80, (Move("loss", 80, np.inf, 1.0),), is_caught=True)
  known = marks.numbered(events)
  assert len(known) == marks.MOST and list(known) == list(range(1, 21))
  assert [one.start for one in known.values()] == sorted(one.start for one in known.values())
  assert {one.start for one in known.values()} >= {80, *range(10, 290, 20)}  # What was not caught, and the strongest.
  found = marks.marks_of(events, [])
  assert [mark.label for mark in found] == [*map(str, range(1, 21)), *[""] * 8]
  assert {mark.kind for mark in found} == {"caught", "reached"}


def test_a_finding_is_marked_by_name_where_no_event_tells_of_it():
  found = [DIVERGED, SPIKE, SPIKE._replace(name="overfit", steps=(7,)), INFO._replace(steps=(3,))]
  assert [mark for mark in marks.marks_of([event()], found) if mark.kind == "finding"] == [
    marks.Mark("diverged", 200, 200, "finding"),
    marks.Mark("overfit", 7, 7, "finding"),
  ]
  assert marks.told_by(SPIKE, {1: event(10, 20), 2: event(140, 151)}) == [2]
  # What fails has its name, although an event tells of the step too.
  assert [one.name for one in marks.begins([event(190, 210)], [DIVERGED])] == ["diverged"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [3, 300])
def test_no_text_is_cut_and_none_covers_another(count, width, monkeypatch):
  names = tuple(f"params/decoder/layers_{i}/attention/kernel" for i in range(count))
  run = full(names=names, **{"loss_scale": np.full(300, 1024.0), "a_long_name_of_some_validation/loss": np.ones(300)})
  run.columns.update({"discriminator/norm": run["grad/norm"], "discriminator/max_norm": run["grad/max_norm"]})
  events = [event(i, i + 1, is_caught=i % 3 == 0) for i in (3, 5, 60, 62, 64, 66, 68, 151, 297)]
  findings = [DIVERGED, *[SPIKE._replace(name=f"zero-gradient-{i}", steps=(295 + i,)) for i in range(3)]]
  seen, draw = [], Text.draw

  def draw_and_note(text, renderer):
    draw(text, renderer)
    if text.get_visible() and text.get_text().strip():
      seen.append((text.get_text(), text.get_window_extent(renderer)))

  monkeypatch.setattr(Text, "draw", draw_and_note)
  box = drawn(run, findings, events, width).bbox
  assert len(seen) > 40
  for text, extent in seen:
    assert box.x0 - 1 <= extent.x0 and extent.x1 <= box.x1 + 1, text
    assert box.y0 - 1 <= extent.y0 and extent.y1 <= box.y1 + 1, text
  for (a, first), (b, second) in itertools.combinations(seen, 2):
    across = min(first.x1, second.x1) - max(first.x0, second.x0)
    along = min(first.y1, second.y1) - max(first.y0, second.y0)
    assert across < 1 or along < 1, (a, b)


# Panels -------------------------------------------------------------------------------------------------------------


def test_what_is_a_loss_and_what_is_not():
  columns = healthy() | {"loss_scale": np.full(400, 1024.0), "train/aux_loss": np.ones(400), "lr": np.ones(400)}
  figure = drawn(run_of(columns))
  assert labels(panel(figure, "Loss")) == ["loss", "val_loss"]
  assert labels(panel(figure, "Loss scale")) == ["loss_scale"]
  assert panel(figure, "Learning rate").get_ylim()[0] == 0
  page = judged(run_of(columns))
  assert "train/aux_loss from 1 to 1, lowest 1" in page.alt("Line chart of other losses")
  assert "loss_scale" not in page.alt("Line chart of other losses")


@pytest.mark.parametrize(("last", "scale"), [(0.2, "linear"), (0.01, "log"), (-1.0, "linear")])
def test_the_loss_is_on_a_log_axis_where_it_spans_a_factor_of_100(last, scale):
  figure = drawn(make(np.ones(300), loss=np.linspace(5, last, 300)))
  assert panel(figure, "Loss").get_yscale() == scale


def test_each_state_has_its_panel_and_the_caption_says_what_is_not_drawn():
  run = full()
  for name in ("d", "e", "f"):
    run.columns[f"{name}/norm"] = np.ones(300)
  figure = drawn(run)
  assert titles(figure)[2:5] == ["Gradient norm", "Gradient norm, d/norm", "Gradient norm, e/norm"]
  page = judged(run)
  assert "Not drawn: f/norm." in page.text and "d/norm after the warm-up" in page.alt("Timeline")
  run.columns["d/norm"][3], run.flags["d/norm"] = np.nan, np.arange(300) == 3
  assert "<dt>nonfinite steps</dt><dd>2</dd>" in sections.summary(shown(run))  # Of both states.


def test_updates_are_norms_and_where_there_are_none_ratios_with_their_band():
  run = full()
  assert "Norm of the update" in titles(drawn(run))
  del run.columns["update/norm"]
  axes = panel(drawn(run), "Update over parameters")
  assert labels(axes) == ["usual, 0.0001 to 0.01", "update/ratio"]
  del run.columns["update/ratio"]
  assert "Update over parameters" not in titles(drawn(run))


def test_numbers_near_the_largest_float_are_drawn():
  huge = {"loss": np.tile([-1.7e308, 1.7e308], 150), "learning_rate": np.full(300, 1.7e308), "val_loss": np.ones(300)}
  figure = drawn(full(**huge))
  assert panel(figure, "Loss").get_yscale() == "linear"
  assert panel(figure, "Learning rate").get_ylim() == (0, 1.06e306)
  assert panel(drawn(full(learning_rate=np.zeros(300))), "Learning rate").get_ylim() == (0, 1)


def test_parts_of_a_record_that_have_no_number_are_left_out():
  run = full(names=("a", "b"))
  run.columns["d/norm"] = run.columns["lr"] = np.full(300, np.nan)  # Nothing was measured.
  run.vectors["grad/norm"][1][:] = np.inf
  run.vectors["d/norm"] = np.zeros(0, np.int64), np.zeros((0, 2))
  run.leaves["d"] = ("x", "y")
  run.columns["grad/max_norm/a"] = np.ones(300)
  page = judged(run, drawn=True)
  assert "Each leaf or group has its own threshold; the dashed line is the smallest." in page.text
  assert "2 layers of grad/norm at 31 recorded steps. 2 layers were nonfinite at some step" in page.alt("Timeline")
  assert "d/norm after the warm-up, from step 31: no finite value. No threshold." in page.alt("Timeline")
  assert page.text.count("grad/norm 50.") == 1 and "d/norm not" not in page.text  # Of the worst steps.


# The close-up -------------------------------------------------------------------------------------------------------


def test_a_long_run_has_a_close_up_around_what_is_said_first():
  steps = np.arange(5, 10005, 5)
  run = dataclasses.replace(run_of({"grad/norm": np.ones(2000), "loss": np.ones(2000)}), steps=steps)
  assert marks.focus([], [], steps) is None
  assert marks.focus([event(5000, 5010)], [], steps) == (4700, 5310)
  assert marks.focus([event(5000, 5010), event(9000, 9000, is_caught=True)], [], steps) == (4700, 5310)
  assert marks.focus([event(5000, 5010)], [INFO, DIVERGED], steps) == (5, 500)
  assert marks.focus([event(150, 250)], [DIVERGED], steps) == (5, 550)
  assert marks.focus([event(5000, 9000)], [], steps) == (4700, 5900)  # What moved first, of a long one.
  assert marks.focus([event(700, 710)], [], steps[:300]) is None
  page = judged(run, [SPIKE._replace(steps=(5000,))], [event(5000, 5010)])
  assert "Close-upSteps 4,700 to 5,310 of the timeline, around the mark 1." in re.sub(
    r"Close-up.*?(?=Steps 4)", "Close-up", page.text, flags=re.DOTALL
  )
  assert "Marked: 1 at step 5,000, grad/norm 50, 50 times the usual 1." in page.alt("The same panels")


def test_a_close_up_draws_only_its_steps():
  run = full(2000)
  figure = drawn(run, [SPIKE], [event(1001, 1002)], axis=Steps(941, 1062, 1.0))
  low, high = panel(figure, "Loss").get_xlim()
  assert 935 < low < 941 and 1062 < high < 1068
  assert lines_of(panel(figure, "Gradient norm"))["norm"].get_xdata().tolist() == list(range(941, 1063))
  (image,) = panel(figure, "Layers").images
  assert image.get_extent()[:2] == [940.5, 1062.5]
  assert image.get_array().shape[1] == 122
  # A loss of validation that has no number there is not in the legend either, and a rate may have none.
  run.columns["val_loss"][900:1100] = run.columns["learning_rate"][900:1100] = np.nan
  figure = drawn(run, [SPIKE], [event(1001, 1002)], axis=Steps(941, 1062, 1.0))
  assert labels(panel(figure, "Loss")) == ["loss"]


# Events -------------------------------------------------------------------------------------------------------------


def rows_of(*events):
  table = happened.events_table(events)
  text = re.sub(r"</?(code|strong|ul|li|wbr)>", "", table.replace("</li>", "; "))
  rows = re.findall(r"<tr>(<td>.*?)</tr>", text)
  return [[cell.strip("; ") for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


MOVES = "grad/norm 50, 50 times the usual 1; loss 9, 4.5 times the usual 2, 1 step later"


@pytest.mark.parametrize(
  ("told", "row"),
  [
    (
      event(151, 160, is_recovered=False),
      ["1", "151 to 160", MOVES, "layers/0/w", "7", "reached the parameters; the loss did not recover"],
    ),
    (  # No batch is known.
      event(1151, 1151, is_caught=True, is_recovered=True, batches=(), leaves=("a", "b", "c", "d", "e")),
      ["1", "1,151", MOVES, "a, b, c and 2 more", "caught; the loss recovered"],
    ),
  ],
)
def test_a_row_says_what_moved_how_far_where_and_how_it_ended(told, row):
  assert rows_of(told) == [row]


@pytest.mark.parametrize(
  ("move", "words"),
  [
    (Move("loss", 1, np.inf, 2.0), "nonfinite, usually 2"),
    (Move("loss", 1, 5.0, -3.0), "5, usually -3"),
    (Move("loss", 1, 5.0, 0.0), "5, usually 0"),
    (Move("loss", 1, 0.01, 1.0), "0.01, 0.01 times the usual 1"),
  ],
)
def test_how_far_a_series_moved(move, words):
  assert happened.how_far(move) == words


def test_of_many_events_the_strongest_have_a_row():
  events = [event(10 * i, 10 * i) for i in range(1, 31)]
  assert len(rows_of(*events)) == 20
  assert "30 events; the table lists the 20 strongest, in step order" in happened.events_table(events)
  assert "1 event, in step order" in happened.events_table(events[:1])
  assert happened.events_table([]) == ""
  assert "<dt>events</dt><dd>30</dd>" in sections.summary(shown(full(), (), events))


@pytest.mark.slow
def test_a_million_steps_have_a_page_in_seconds():
  n = 1_000_000
  run = make(np.exp(np.random.default_rng(0).normal(0, 0.2, n)), loss=np.ones(n), names=("a", "b"), every=100)
  events = [event(100 * i, 100 * i + 3, is_caught=True) for i in range(1, 5000)]
  report = HealthReport((DIVERGED,), "", n, 100, tuple(events))
  start = time.perf_counter()
  page = build_page.whole_page(run, report)
  assert time.perf_counter() - start < 60
  assert len(page) < 10_000_000
