"""The report of a run: what is said, what is drawn, what is escaped. Browsers are not part of the tests."""

import functools
import html
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import clipjax
from clipjax.runs import sources, speed, words
from clipjax.runs.health import verdict
from clipjax.runs.report import build as report_build
from clipjax.runs.report import figures as report_figures
from clipjax.runs.report import page as report_page
from clipjax.runs.report import sections as report_sections
from clipjax.runs.report import series as report_series
from clipjax.runs.report import write as report_write
from clipjax.runs.run import Run

ROOT = pathlib.Path(__file__).parent.parent
VOID = {"meta", "link", "wbr", "br", "path", "use", "rect", "image", "line", "circle"}
EVIL = (
  "params/<script>alert(1)</script>/kernel",
  "quote\"'&amp;",
  "</script><b onclick=x>",
  "a\u2028b\u2029c\nd\u202ee",
  "x" * 200,
  "cost $a_1$ \\$",
  "_under",
  "层/权重",
  "\ud800",
  "https://evil.example/a",
  "fill: #0072b2",
)


class Page(HTMLParser):
  """What the tests ask of a page: its tags with their attributes, its text, its data; it must be well nested."""

  def __init__(self, source):
    super().__init__(convert_charrefs=True)
    self.source, self.tags, self.open, self.words, self.data, self.css = source, [], [], [], "", ""
    self.feed(source)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    assert len(attrs) == len(dict(attrs))
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "script":
      self.data += data
    elif self.open and self.open[-1] == "style":
      self.css += data
    else:
      self.words.append(data)

  @property
  def text(self):
    return "".join(self.words)

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]

  def alt(self, start):
    (text,) = {attrs["aria-label"] for attrs in self.all("svg") if attrs["aria-label"].startswith(start)}
    return text


def make(norm, *, bad=(), limit=2.0, names=(), every=10, path="runs/demo.jsonl", **columns):
  """A run with these norms, of which those at `bad` (indices) were not finite, and with all else that a page shows."""
  norm = np.array(norm, np.float64)
  n = norm.size
  steps = np.arange(1, n + 1)
  flag = np.isin(np.arange(n), bad)
  norm[flag] = np.nan
  with np.errstate(divide="ignore"):
    scale = np.minimum(1.0, limit / norm)
  data = {"grad/norm": norm, "grad/max_norm": np.broadcast_to(np.float64(limit), n).copy(), "grad/scale": scale}
  data |= {key: np.array(values, np.float64) for key, values in columns.items()}
  flags = {"grad/norm": flag} if flag.any() else {}
  vectors, weights = {}, None
  if names and n:
    at = np.unique(np.append(np.arange(0, n, every), np.flatnonzero(flag)))
    values = np.outer(np.nan_to_num(norm[at], nan=1.0), np.arange(1, len(names) + 1) / len(names))
    values[flag[at], 0] = np.inf
    vectors = {"grad/norm": (steps[at], values), "update/ratio": (steps[at], np.full(values.shape, 2e-3))}
    counts = np.outer(np.arange(1, at.size + 1), [0.0, 3.0, 5.0, 1.0])
    weights = steps[at], np.linspace(-4, 0, 5), counts
  leaves = {"grad": tuple(names), "update": tuple(names)} if names else {}
  return Run(path, steps, data, flags, leaves, vectors, weights, 1234567 if names else None)


def full(n=300, names=("embed", "layers/0/w", "layers/1/w"), **kwargs):
  """A run with everything, that has a spike at the middle and a nonfinite step after it."""
  rng = np.random.default_rng(0)
  norm = np.exp(rng.normal(0, 0.2, n))
  norm[n // 2 : n // 2 + 1] = 50.0
  columns = {
    "time": 1.79e9 + np.arange(n) * 0.125,
    "loss": np.linspace(5, 2, n),
    "val_loss": np.where(np.arange(n) % 10 == 0, 3.0, np.nan),
    "tokens": np.full(n, 1000.0),
    "update/ratio": np.full(n, 1e-3),
  }
  return make(norm, **({"bad": [n // 2 + 1], "names": names} | columns | kwargs))


def shown(run):
  """What the sections of a run are made of."""
  return report_sections.Shown(run, report_series.norm_series(run), speed.speed(run), clipjax.runs.HealthLimits())


def written(run, tmp_path, **options):
  path = tmp_path / "report.html"
  assert clipjax.runs.write_report(run, str(path), **options) == path
  assert list(tmp_path.iterdir()) == [path]
  return Page(path.read_text(encoding="ascii"))


CASES = {
  "3 layers": full,
  "300 layers": lambda: full(names=tuple(f"params/layers_{i}/kernel" for i in range(300))),
  "50 steps": lambda: full(50),
  "50000 steps": lambda: full(50_000, every=50),
  "equal": lambda: make([1.5] * 100, names=("w", "b")),
  "zero": lambda: make([0.0] * 100, names=("w", "b")),
  "all nonfinite": lambda: make([1.0] * 100, bad=range(100), names=("w", "b"), loss=[np.nan] * 100),
  "one step": lambda: full(1, bad=()),
  "one nonfinite step": lambda: full(1, bad=[0]),
  "two steps": lambda: full(2, bad=()),
  "huge": lambda: make([1e-40, 1.0, 1e38, 1e300]),
  "no leaves": lambda: full(names=()),
  "names": lambda: full(names=EVIL),
  "no limit": lambda: full(limit=np.nan),
  "negative loss": lambda: full(loss=np.linspace(1, -3, 300)),
  "no steps": lambda: make([]),
  "nothing": lambda: Run("x", np.arange(1, 4), {}, {}, {}, {}, None, None),
}


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
  """The page of a case, made once."""
  return functools.cache(lambda case: written(CASES[case](), tmp_path_factory.mktemp("page")))


@pytest.mark.parametrize("case", CASES)
def test_every_page_is_whole_and_needs_nothing_else(case, page_of):
  page = page_of(case)
  assert page.source.startswith("<!DOCTYPE html>")
  # No script but the data, no address but those of the sources.
  assert page.all("script") == [{"type": "application/json", "id": "clipjax-run"}]
  for tag, attrs in page.tags:
    assert not [key for key in attrs if key.startswith("on")]
    for key in ("href", "src", "xlink:href"):
      assert re.match("https://" if tag == "a" else "#|data:", attrs.get(key, "#" if tag != "a" else "https://"))
  assert "url(" not in page.css
  assert "@import" not in page.css
  hosts = {attrs["href"].split("/")[2] for attrs in page.all("a")}
  assert hosts <= {"github.com", "cs231n.github.io", "arxiv.org", "doi.org"}
  # Every reference inside has one aim, and no two elements have one name.
  names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
  assert len(names) == len(set(names))
  aims = re.findall(r'url\(#(\w+)\)|[" ]href="#(\w+)"', page.source)
  assert {a or b for a, b in aims} <= set(names)
  # Figures stand twice, each with its alt text.
  assert {attrs["role"] for attrs in page.all("svg")} <= {"img"}
  assert all(len(attrs["aria-label"]) > 40 for attrs in page.all("svg"))
  kinds = [attrs.get("class") for attrs in page.all("div")]
  assert kinds.count("wide") == kinds.count("narrow") == len(page.all("figure")) == len(page.all("svg")) / 2
  assert page.text.count("Verdict: ") == 1


@pytest.mark.parametrize("case", CASES)
def test_the_data_are_those_of_the_run(case, page_of):
  run = CASES[case]()
  got = json.loads(page_of(case).data, parse_constant=pytest.fail)
  assert got["steps"] == run.steps.tolist()
  assert got["omitted"] == []
  assert list(got["columns"]) == sorted(run.columns, key=list(got["columns"]).index)
  for key, values in run.columns.items():
    back = np.array([np.nan if x is None else x for x in got["columns"][key]], np.float64)
    np.testing.assert_allclose(back, values, rtol=1e-9 if key == "time" else 5.1e-7, atol=0)
  assert got["nonfinite"] == {key: run.steps[mask].tolist() for key, mask in run.flags.items()}
  assert got["leaves"] == {key: list(names) for key, names in run.leaves.items()}
  assert set(got["vectors"]) == set(run.vectors)
  for key, (steps, values) in run.vectors.items():
    assert got["vectors"][key]["steps"] == steps.tolist()
    back = np.array([[np.nan if x is None else float(x) for x in row] for row in got["vectors"][key]["values"]])
    np.testing.assert_allclose(back, values, rtol=5.1e-7)
  if run.weights is not None:
    np.testing.assert_allclose(got["weights"]["counts"], run.weights[2])


def test_names_are_shown_and_are_no_markup(tmp_path, monkeypatch):
  evil = verdict.Finding("FAIL", "<i>name</i>", f"<script>{EVIL[0]}", "</td><td>", "<b>rule</b>", '"><i>source')
  findings = [evil, *[verdict.Finding("INFO", *"abc")] * 2]
  report = verdict.HealthReport(tuple(findings), "", 0, 0)
  monkeypatch.setattr(report_build, "diagnose", lambda run, limits, warmup_steps: report)
  run = full(names=EVIL, path="</title><script>x<&.jsonl")
  losses = ("<b>loss</b>", '" onload="x loss', "loss $a_1$ $b$", "_loss")
  run.columns.update(dict.fromkeys(losses, run.columns["loss"]))
  page = written(run, tmp_path)
  assert not page.all("b") + page.all("i")
  assert f"Training run {os.path.basename(run.path)}" in page.text
  assert f'<script>{EVIL[0]}Rule: <b>rule</b>. Source: "><i>source.</td><td>' in page.text
  for name in EVIL:
    assert words.plain(name) in page.text
  assert "a\\u2028b\\u2029c\\nd\\u202ee" in page.text
  assert "\\ud800" in page.text
  assert "<b>loss</b> from 5 to 2, lowest 2" in page.alt("Line chart of the losses")
  assert "cost $a_1$ \\$" in "".join(page.words)
  assert page.source.count(">fill: #0072b2</text>") == 2  # Labels, whose text is no colour of the page.
  assert json.loads(page.data)["leaves"]["grad"] == list(EVIL)
  assert not set("<>&") & set(page.data)
  for name in (EVIL[5], *losses[2:]):  # No mathematics in a label, and none left out.
    assert len(re.findall(rf"> ?{re.escape(name)}</text>", page.source)) == 2
  assert all("onload" not in attrs for attrs in page.all("svg"))
  assert "Verdict: 1 FAIL, 0 WARN, 2 INFO" in page.text


def test_the_words_of_a_run(page_of):
  page = page_of("3 layers")
  norm = full().columns["grad/norm"]
  norm = norm[np.isfinite(norm)]
  p50, p90, p99 = (f"{x:.3g}" for x in np.percentile(norm, [50, 90, 99]))
  assert page.alt("Line chart of grad/norm") == (
    f"Line chart of grad/norm, steps 1 to 300, log axis: median {p50}, 90th percentile {p90}, 99th percentile {p99}, "
    f"smallest {norm.min():.3g}, largest 50. Threshold 2. 1 of 300 (0.333%) steps clipped. 1 of 300 (0.333%) steps not "
    "finite, the first is step 152. 1 spikes."
  )
  assert page.alt("Histogram of log10 of grad/norm") == (
    f"Histogram of log10 of grad/norm over 299 finite steps: p50 {p50}, p90 {p90}, p99 {p99}."
  )
  assert "1 layers were not finite at some step: embed." in page.alt("Heat map")
  assert page.alt("Line chart of the losses").endswith("loss from 5 to 2, lowest 2; val_loss from 3 to 3, lowest 3.")
  assert "The median of 3 of 3 layers lies in 0.0001 to 0.01." in page.alt("Line chart of update")
  assert page.alt("Histogram of log10 of the size of the weights").endswith("0.0316 at step 1 and 0.0316 at step 291.")
  assert page.alt("Line chart of the time").endswith(
    "time of a step: 125 ms, the median of parts of the run; from push to push median 125 ms, 99th percentile 125 ms; "
    "8 steps per second, 37.4 s in all; 8,000 tokens per second."
  )
  assert "parameters1,234,567" in page.text
  assert "Step 152, the first that was not finite: norm not finite.layernormembednot finitelayers/1/w1" in page.text
  assert "Not in this report" not in page.text


def test_verdict_and_suggestion_are_those_of_the_library(page_of):
  run, page = full(), page_of("3 layers")
  findings = clipjax.runs.diagnose(run).findings
  assert findings
  for finding in findings:
    source = sources.BY_TEXT[finding.source].title if finding.source else ""
    rule = f"Rule: {finding.rule}." if finding.rule else ""
    rule += f" Source: {source}." if source else ""
    assert f"{finding.level}{finding.name}{finding.message}{rule}{finding.advice}" in page.text
  assert any(finding.source for finding in findings)
  suggestion = clipjax.runs.suggest_max_norm(run)
  assert f"max_norm = {words.number(suggestion.max_norm)}{suggestion.reason}" in page.text
  assert "".join(f"Source: {sources.BY_TEXT[source].title}" for source in suggestion.sources) in page.text
  assert f"(suggested){words.percent(suggestion.clip_fraction)}" in page.text


def test_sources_are_links_and_nothing_else_is():
  for text, source in sources.BY_TEXT.items():
    assert re.fullmatch(r"https://[\w.]+/[\w./#-]+", source.address)
    assert report_page.source(text) == f'<a href="{source.address}">{html.escape(source.title)}</a>'
  for other in ("https://evil.example/a", "javascript:alert(1)", f"x{sources.PLAYBOOK}", sources.PLAYBOOK.address):
    assert report_page.source(other) == html.escape(other)
  assert report_page.source("<b>") == "&lt;b&gt;"


def test_the_words_of_a_finding_are_never_links(tmp_path, monkeypatch):
  words = f"{sources.PLAYBOOK} {sources.PLAYBOOK.address} arXiv 1211.5063"
  finding = verdict.Finding("WARN", "name", words, words, words, str(sources.OLMO_2))
  report = verdict.HealthReport((finding,), "", 0, 0)
  monkeypatch.setattr(report_build, "diagnose", lambda run, limits, warmup_steps: report)
  page = written(Run("x", np.arange(1, 4), {}, {}, {}, {}, None, None), tmp_path)
  assert [attrs["href"] for attrs in page.all("a")] == [sources.OLMO_2.address]


def test_without_a_suggestion_the_page_says_why(tmp_path):
  run = make([1.0] * 50, bad=range(50))
  with pytest.raises(ValueError, match="must") as error:
    clipjax.runs.suggest_max_norm(run)
  assert f"Suggested thresholdNone: {error.value}" in written(run, tmp_path).text


def test_what_was_not_recorded_is_one_line_each(tmp_path, page_of):
  page = written(make([1.0, 2.0]), tmp_path)
  left_out = page.text[page.text.index("Not in this report") : page.text.index("Data")]
  assert left_out == (
    "Not in this report"
    "Layers over time: chain clipjax.watch() before the clip; the norm of every layer is then read."
    'Size of the updates: chain clipjax.watch(name="update") last, after the optimizer, and give params to update.'
    "Loss: give the losses to push, as in recorder.push(step, opt_state, loss=loss, val_loss=val_loss)."
    "Size of the weights: give the parameters to push, as in recorder.push(step, opt_state, params=params)."
    "Speed: two calls of recorder.push or more give the time of a step.\n"
  )
  nothing = page_of("nothing").text
  assert "Gradient norm: chain clipjax.clip_by_global_norm(max_norm) or clipjax.watch() before the opt" in nothing


def test_a_large_run_is_a_file_that_opens(tmp_path, page_of):
  run = full(50_000, every=50)
  for i in range(10):
    run.columns[f"grad/other_{i}"] = np.random.default_rng(i).random(50_000)
  page = written(run, tmp_path)
  assert len(page.source) < 10_000_000
  assert "Lines are thinned for drawing" in page.text
  text, omitted = report_build.to_json(run, 2_000_000)
  assert len(text) < 2_010_000
  kept = json.loads(text)
  assert len(kept["columns"]["grad/norm"]) == 50_000
  assert kept["omitted"] == omitted
  assert "grad/other_9" in omitted
  assert set(omitted) | set(kept["columns"]) >= set(run.columns)
  assert "thinned" not in page_of("3 layers").text


def test_a_page_names_what_is_left_out_of_its_data(tmp_path, monkeypatch):
  monkeypatch.setattr(report_build, "_LARGEST_DATA", 4000)
  text = written(full(), tmp_path).text
  assert "Left out of the JSON for its size: grad/norm, time, loss, " in text


# Numbers and thinning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 20, 21, 1000, 1001])
def test_thinning_keeps_ends_extremes_and_gaps(n):
  values = np.random.default_rng(n).normal(size=n)
  values[n // 3] = 100.0
  values[n // 2 : n // 2 + n // 5] = np.nan
  kept = report_series.thin(values, 10)
  assert (np.diff(kept) > 0).all()
  assert {0, n - 1} <= set(kept.tolist())
  assert kept.size <= 22
  assert np.nanmin(values[kept]) == np.nanmin(values)
  assert np.nanmax(values[kept]) == np.nanmax(values)
  assert np.isnan(values[kept]).any() == np.isnan(values).any()
  if n > 20:
    for part in np.array_split(np.arange(n), 1):
      assert np.nanmax(values[part]) in values[kept]


def test_thinning_keeps_the_extremes_of_every_part():
  values = np.random.default_rng(3).normal(size=1000)
  kept = set(values[report_series.thin(values, 10)].tolist())
  for part in values.reshape(10, 100):
    assert {part.min(), part.max()} <= kept
  assert report_series.thin(np.full(1000, np.nan), 10).size == 11


def test_thinned_marks_leave_no_part_out():
  mask = np.zeros(1000, np.bool_)
  mask[[3, 4, 555, 999]] = True
  assert report_series.thin_mask(mask, 10).tolist() == [3, 555, 999]
  assert report_series.thin_mask(mask[:3], 10).tolist() == []


def test_a_spike_of_one_step_in_many_is_drawn():
  norm = np.ones(50_000)
  norm[31_234] = 77.0
  (axes,) = clipjax.runs.plot_norms(make(norm, bad=[40_000])).axes
  lines = {line.get_label(): line for line in axes.lines}
  assert lines["norm before the clip"].get_ydata().max() == 77.0
  assert lines["norm before the clip"].get_xdata().size < 2000
  assert lines["clipped"].get_xdata().tolist() == [31_235]
  assert lines["not finite"].get_xdata().tolist() == [40_001]
  assert lines["threshold 2"].get_ydata() == [2.0, 2.0]


def test_the_heat_map_keeps_extremes_and_what_was_not_finite():
  steps = np.arange(0, 5000, 10) + 1
  values = np.ones((500, 3))
  values[321, 1], values[123, 2] = 9.0, np.inf
  values[:25, 0] = values[300:302, 1] = np.nan  # They were not recorded.
  start, stop, grid = report_series.time_grid(steps, values, 50)
  assert (start, stop) == (-4, 4996)
  assert grid.shape == (3, 50)
  assert grid[1].argmax() == 321 // 10
  assert np.flatnonzero(np.isinf(grid[2])).tolist() == [123 // 10]
  assert np.isnan(grid[0]).tolist() == [True] * 2 + [False] * 48
  assert (grid[0, 2:] == 1).all() and not np.isnan(grid[1]).any()


def test_the_heat_map_holds_what_was_last_recorded():
  grid = report_series.time_grid(np.array([1, 2, 3, 6]), np.array([[1.0], [2.0], [3.0], [6.0]]), 50).values
  assert grid.tolist() == [[1, 2, 3, 3, 3, 6]]
  assert report_series.time_grid(np.array([7]), np.array([[4.0]]), 50) == (6.5, 7.5, [[4.0]])


def test_clipped_steps_are_known_with_and_without_a_scale():
  run = make([1.0, 3.0, 5.0, 1.0])
  run.columns["grad/scale"][:] = [1.0, 0.5, np.nan, np.nan]
  assert report_series.norm_series(run).clipped.tolist() == [False, True, True, False]


def test_a_rejected_step_has_the_norm_that_skip_steps_saw():
  run = make([1.0, 3.0, 3.0, 1.5], **{"grad/steps": [1, 2, 2, 3], "skip/consecutive": [0, 0, 1, 0]})
  run.columns["skip/norm"] = np.array([1.0, 3.0, 400.0, 1.5])
  series = report_series.norm_series(run)
  assert series.norm.tolist() == [1.0, 3.0, 400.0, 1.5]
  assert series.rejected.tolist() == [False, False, True, False]
  assert series.clipped.tolist() == [False, True, False, False]
  assert "1 of 4 (25%) steps rejected by skip_steps." in report_sections.norm_words(series)


def test_a_step_that_only_adds_to_a_larger_one_is_neither_rejected_nor_clipped():
  # As of optax.MultiSteps inside skip_steps: the clip sees one step in two.
  run = make([0.0, 3.0, 3.0, 5.0], **{"grad/steps": [0, 1, 1, 2], "skip/consecutive": [0, 0, 0, 0]})
  run.columns["skip/norm"] = np.array([2.0, 4.0, 7.0, 3.0])
  series = report_series.norm_series(run)
  np.testing.assert_array_equal(series.norm, [np.nan, 3, np.nan, 5])
  assert not series.rejected.any() and not series.nonfinite.any()
  assert series.clipped.tolist() == [False, True, False, True]


def test_a_norm_out_of_the_history_of_a_watch_is_clipped_by_the_threshold_of_the_next_push():
  run = make([1.0, 5.0, 1.0, 9.0])
  run.columns["grad/max_norm"] = np.array([2.0, np.nan, np.nan, 4.0])
  run.columns["grad/scale"] = np.array([1.0, np.nan, np.nan, 0.5])
  assert report_series.norm_series(run).clipped.tolist() == [False, True, False, True]


def test_worst_step_by_layer():
  run = make([1.0, 9.0, 2.0], names=("a", "b"), every=1)
  worst = report_series.worst_step(run, report_series.norm_series(run))
  assert worst == (2, 9.0, (("b", 9.0), ("a", 4.5)))
  # Recorded only later, by the watch, which keeps the norms of its worst step.
  run.vectors.clear()
  run.columns["grad/worst_step"] = np.array([1.0, np.nan, 2.0])
  run.vectors["grad/worst_norm"] = np.array([1, 3]), np.array([[1.0, 1.0], [7.0, 3.0]])
  assert report_series.worst_step(run, report_series.norm_series(run)).layers == (("a", 7.0), ("b", 3.0))
  run.columns["grad/worst_step"][:] = 1.0
  assert report_series.worst_step(run, report_series.norm_series(run)).layers == ()


def test_time_of_a_step_and_throughput():
  run = make([1.0] * 5, time=[10.0, 10.5, np.nan, 11.5, 11.0], tokens=[7.0, 8.0, 7.0, 9.0, 7.0])
  steps, seconds = speed.seconds_per_step(run)
  assert (steps.tolist(), seconds.tolist()) == ([2, 4], [0.5, 0.5])  # Two steps in a second; a clock set back.


def test_the_time_of_a_step_is_that_of_parts_of_the_run():
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


def test_the_speed_of_the_verdict_is_that_of_its_section(tmp_path):
  # Slow and short steps in the warm-up, and a clock that was set back in the middle.
  time = np.cumsum(np.where(np.arange(200) < 20, 9.0, 0.5)) - np.where(np.arange(200) < 100, 0.0, 60.0)
  run = make(np.ones(200), time=time, tokens=np.where(np.arange(200) < 20, 1.0, 50.0))
  words = " ".join(written(run, tmp_path).words)
  assert "500 ms a step, the median of 19 parts of the run; from push to push median 500 ms, p99 500 ms." in words
  assert "100 tokens a second at that step time." in words
  assert "500 ms, the median of parts of the run; from push to push median 500 ms, 99th percentile 500 ms;" in words
  assert "; 100 tokens per second." in words


def test_thresholds_by_group_are_named_as_such():
  run = make([1.0, 3.0])
  assert not report_series.norm_series(run).by_block
  run.columns["grad/max_norm/decoder"] = np.ones(2)
  assert "Smallest threshold of a leaf or group 2." in report_sections.norm_words(report_series.norm_series(run))
  assert clipjax.runs.plot_norms(run).axes[0].lines[-1].get_label() == "smallest threshold 2"


def test_a_threshold_that_moves_is_a_line_and_zeros_and_rejected_steps_are_told(tmp_path):
  run = make([0.0, 1.0, 9.0, 2.0, 0.0], **{"skip/consecutive": [0, 0, 1, 0, 0]})
  run.columns["grad/max_norm"] = np.array([1.0, 2.0, 4.0, 3.0, 3.0])
  page = written(run, tmp_path)
  assert "Threshold between 1 and 4, 3 in the end." in page.alt("Line chart of grad/norm")
  assert "1 of 5 (20%) steps rejected by skip_steps." in page.alt("Line chart of grad/norm")
  assert "Squares are steps that skip_steps rejected; their norm is the one that it saw." in page.text
  assert "2 steps of norm 0 cannot be drawn on a log axis." in page.text
  (line,) = [line for line in clipjax.runs.plot_norms(run).axes[0].lines if line.get_label() == "threshold"]
  assert list(line.get_ydata()) == [1.0, 2.0, 4.0, 3.0, 3.0]


def test_a_run_without_a_finite_norm_has_no_histogram(tmp_path):
  text = written(make([1.0, 2.0], bad=[0, 1]), tmp_path).text
  assert "no step had a finite norm above 0, so there is nothing to draw." in text


def test_layers_of_a_rejected_step_are_not_known(tmp_path):
  run = make([1.0, 9.0, 2.0], names=("a", "b"), **{"skip/consecutive": [0, 1, 0]})
  text = written(run, tmp_path).text
  assert "Step 2, the largest norm: norm 9.skip_steps rejected it, so that a clipjax.watch() inside did not" in text


@pytest.mark.parametrize(
  ("names", "want"),
  [
    (("p/l0/w", "p/l1/w"), ("l0", "l1")),
    (("p/l0/w", "p/l1/b"), ("l0/w", "l1/b")),
    (("a/a", "a/a"), ("a", "a")),
    (("a", "a/b"), ("a", "a/b")),
    (("a/b",), ("a/b",)),
    ((), ()),
  ],
)
def test_labels_leave_out_what_all_share(names, want):
  assert report_series.without_common(names) == want


@pytest.mark.parametrize(
  ("x", "text"), [(0.001, "0.001"), (2000.0, "2,000"), (1e6, "1e6"), (1e-5, "1e-5"), (0.5, "0.5"), (1e-300, "1e-300")]
)
def test_ticks_are_short(x, text):
  assert report_figures._tick(x) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0123, "12.3 ms"), (60.0, "60 s"), (120.0, "2 min"), (1e5, "27.8 h")])
def test_long_times_have_a_long_unit(seconds, text):
  assert report_sections._total(seconds) == text


def test_short_names_keep_both_ends():
  assert report_series.short("params/layers_12/attention/kernel", 18) == "params/lay…/kernel"
  assert report_series.short("a" * 18, 18) == "a" * 18
  assert len(report_series.short("x" * 200, 36)) == 36


# Figures ------------------------------------------------------------------------------------------------------------


def test_plot_norms_is_a_figure_with_the_norm_on_a_log_axis():
  figure = clipjax.runs.plot_norms(full())
  assert type(figure) is Figure
  (axes,) = figure.axes
  assert (axes.get_yscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "step", "grad/norm")


@pytest.mark.parametrize("width", [report_figures.WIDE, report_figures.NARROW])
@pytest.mark.parametrize("count", [1, 3, 40, 300])
def test_labels_of_layers_do_not_touch(count, width):
  names = tuple(f"params/layers_{i}/kernel" for i in range(count))
  figure = report_figures.layers(report_series.vectors(full(names=names), "grad/norm"), width)
  FigureCanvasAgg(figure).draw()
  labels = figure.axes[0].get_yticklabels()
  wanted = "layers_0" if count > 1 else report_series.short(names[0], 36 if width == report_figures.WIDE else 18)
  assert labels[0].get_text() == wanted
  boxes = [label.get_window_extent() for label in labels]
  assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
  assert min(box.x0 for box in boxes) >= 0
  assert len(boxes) >= min(count, 40)


def test_subnormal_norms_have_a_page(tmp_path):
  assert clipjax.runs.write_report(make([5e-324] * 4, limit=5e-324), tmp_path / "x.html").exists()


@pytest.mark.parametrize("low", [1e-300, 1e-9, 0.3, 1.0, 7.0, 1e30, 1e300])
@pytest.mark.parametrize("span", [1.0, 1.5, 20.0, 1e8])
def test_log_axes_have_a_few_labels_around_the_data(low, span):
  axes = Figure().add_subplot()
  report_figures._log_axis(axes, np.array([low, np.nan, low * span]))
  bottom, top = axes.get_ylim()
  ticks = [x for x in axes.get_yticks() if bottom <= x <= top]
  assert bottom < low <= min(low * span, 1e307) <= top
  assert 1 <= len(ticks) <= 8


def test_colours_of_the_page_are_variables(page_of):
  page = page_of("3 layers")
  drawn = page.source[page.source.index("<svg") : page.source.rindex("</svg>")]
  assert report_page.INK not in drawn
  assert "var(--blue)" in drawn
  assert "currentColor" in drawn
  assert set(re.findall(r"var\(--(\w+)\)", page.source)) <= set(re.findall(r"--(\w+):", page.css))
  assert "prefers-color-scheme:dark" in page.css


def test_the_page_does_not_depend_on_the_style_of_the_caller(tmp_path, page_of):
  plain = page_of("3 layers").source
  with style.context(["dark_background", {"axes.linewidth": 9, "legend.fontsize": 30}]):
    assert written(full(), tmp_path).source == plain  # And from one run comes one file, to the byte.
    assert clipjax.runs.plot_norms(full()).get_facecolor()[:3] == (0, 0, 0)


# Files and errors ---------------------------------------------------------------------------------------------------


def test_a_report_replaces_another_at_once(tmp_path, monkeypatch):
  path = tmp_path / "report.html"
  written(make([1.0]), tmp_path)
  written(full(), tmp_path)

  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  old = path.read_bytes()
  monkeypatch.setattr(os, "replace", refuse)
  with pytest.raises(PermissionError):
    clipjax.runs.write_report(make([1.0]), path)
  assert path.read_bytes() == old
  assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_no_file_is_written_through(tmp_path):
  assert clipjax.runs.write_report(make([1.0]), os.devnull).exists()
  assert not os.path.isfile(os.devnull)


def test_a_missing_directory_is_told(tmp_path):
  path = tmp_path / "none" / "x.html"
  with pytest.raises(FileNotFoundError) as error:
    clipjax.runs.write_report(make([1.0]), path)
  assert str(error.value) == f"[Errno 2] the directory of the report does not exist, make it first: '{path}'"


def test_a_directory_is_no_report(tmp_path):
  with pytest.raises(IsADirectoryError) as error:
    clipjax.runs.write_report(make([1.0]), tmp_path)
  assert str(error.value) == f"[Errno 21] Is a directory: '{tmp_path}'"
  assert list(tmp_path.iterdir()) == []
  assert list(tmp_path.parent.glob(".clipjax*")) == []


@pytest.mark.parametrize("function", [clipjax.runs.plot_norms, lambda run: clipjax.runs.write_report(run, "x.html")])
def test_what_is_no_run_is_told(function):
  with pytest.raises(TypeError) as error:
    function("run.jsonl")
  assert (
    str(error.value) == "`run` must be a Run, got 'run.jsonl' (str): read the file with clipjax.runs.read_run(path)."
  )


def test_a_run_without_a_norm_has_no_plot():
  with pytest.raises(ValueError, match=r"^`run` must have a norm, got \[\]: chain clipjax.watch\(\) or a clip, and"):
    clipjax.runs.plot_norms(CASES["nothing"]())


def run_python(code):
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


MAKE = (
  "import sys; import numpy as np, clipjax; from clipjax.runs.run import Run; "
  "run = Run('x', np.arange(1, 4), {'grad/norm': np.ones(3)}, {}, {}, {}, None, None); "
)


def test_a_report_loads_no_pyplot(tmp_path):
  report = f"clipjax.runs.write_report(run, {str(tmp_path / 'x.html')!r}); clipjax.runs.plot_norms(run); "
  got = run_python(f"{MAKE} {report} print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)")
  assert (got.stdout, got.stderr) == ("True False\n", "")


@pytest.mark.parametrize("call", ["write_report(run, 'x.html')", "plot_norms(run)"])
def test_matplotlib_is_loaded_at_the_call_and_named_where_it_is_missing(call):
  name = call.partition("(")[0]
  loaded = f"clipjax.runs.{name}; assert 'matplotlib' not in sys.modules; sys.modules['matplotlib'] = None; "
  loaded += f"clipjax.runs.{call}"
  got = run_python(MAKE + loaded)
  assert got.stderr.splitlines()[-1] == "ImportError: a report needs matplotlib: pip install 'clipjax[report]'"


def test_clipped_steps_are_those_that_the_clip_counted_where_rows_do_not_tell():
  run = full()
  marked = int(np.sum(run["grad/scale"] < 1))
  assert 0 < marked < 250
  assert re.search(rf"clipped steps</dt>\s*<dd>{marked}<", report_sections.summary(shown(run)))
  run.columns["grad/clipped_steps"] = np.append(np.full(len(run) - 2, np.nan), [249.0, 250.0])
  assert re.search(r"clipped steps</dt>\s*<dd>250<", report_sections.summary(shown(run)))


@pytest.mark.parametrize("call", [lambda run, path: clipjax.runs.plot_norms(run), clipjax.runs.write_report])
def test_a_part_that_cannot_be_imported_is_told_as_it_is(monkeypatch, tmp_path, call):
  for name in ("figures", "build"):
    monkeypatch.setitem(sys.modules, f"clipjax.runs.report.{name}", None)
    monkeypatch.delattr(f"clipjax.runs.report.{name}", raising=False)
  with pytest.raises(ModuleNotFoundError, match=r"clipjax\.runs\.report"):
    call(clipjax.runs.Run.from_arrays({"grad/norm": [1.0, 2.0]}), tmp_path / "x.html")
  told = report_write._without_matplotlib(ModuleNotFoundError(name="matplotlib"))
  assert str(told) == "a report needs matplotlib: pip install 'clipjax[report]'"
