"""The report of a run: what is said, what is drawn, what is escaped. Browsers are not part of the tests."""

import dataclasses
import functools
import html
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from pages import full, judged, make, written

import clipjax
from clipjax.runs import sources, words
from clipjax.runs.health import verdict
from clipjax.runs.health.events import Event, Move
from clipjax.runs.report import data as report_data
from clipjax.runs.report import html as report_page
from clipjax.runs.report import write as report_write
from clipjax.runs.report.own_pages import START
from clipjax.runs.run import Run

ROOT = pathlib.Path(__file__).parent.parent
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


CASES = {
  "3 layers": full,
  "300 layers": lambda: full(names=tuple(f"params/layers_{i}/kernel" for i in range(300))),
  "700 steps": lambda: full(700, every=50),
  "equal": lambda: make([1.5] * 100, names=("w", "b")),
  "zero": lambda: make([0.0] * 100, names=("w", "b")),
  "all nonfinite": lambda: make([1.0] * 100, bad=range(100), names=("w", "b"), loss=[np.nan] * 100),
  "one step": lambda: full(1, bad=()),
  "one nonfinite step": lambda: full(1, bad=[0]),
  "subnormal": lambda: make([5e-324] * 4, limit=5e-324),
  "huge": lambda: make([1e-40, 1.0, 1e38, 1e300]),
  "names": lambda: full(names=EVIL),
  "no leaves and no limit": lambda: full(names=(), limit=np.nan, loss=np.linspace(1, -3, 300)),
  "no steps": lambda: make([]),
  "nothing": lambda: Run("x", np.arange(1, 4), {}, {}, {}, {}, None, None),
}


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
  """The page of a case, made once."""
  return functools.cache(lambda case: written(CASES[case](), tmp_path_factory.mktemp("page"), drawn=True))


@pytest.mark.parametrize("case", CASES)
def test_every_page_is_whole_and_needs_nothing_else(case, page_of):
  page = page_of(case)
  assert page.source.startswith(f'{START}{clipjax.__version__}">')
  # No script but the data, no address but those of the sources.
  assert page.all("script") == [{"type": "application/json", "id": "clipjax-run"}]
  for tag, attrs in page.tags:
    assert not any(key.startswith("on") for key in attrs)
    for key in ("href", "src", "xlink:href"):
      assert re.match("https://|#" if tag == "a" else "#|data:", attrs.get(key, "#"))
  assert "url(" not in page.css and "@import" not in page.css
  assert set(re.findall(r"var\(--(\w+)\)", page.source)) <= set(re.findall(r"--(\w+):", page.css))
  assert "prefers-color-scheme:dark" in page.css
  hosts = {attrs["href"].split("/")[2] for attrs in page.all("a") if attrs["href"][0] != "#"}
  assert hosts <= {"github.com", "cs231n.github.io", "arxiv.org", "doi.org"}
  # Every reference inside has one aim, and no two elements have one name.
  names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
  assert len(names) == len(set(names))
  aims = re.findall(r'url\(#([\w-]+)\)|[" ]href="#([\w-]+)"', page.source)
  assert {a or b for a, b in aims} <= set(names)
  # Figures stand twice, each with its alt text.
  assert {attrs["role"] for attrs in page.all("svg")} <= {"img"}
  assert all(len(attrs["aria-label"]) > 40 for attrs in page.all("svg"))
  kinds = [attrs.get("class") for attrs in page.all("div")]
  assert kinds.count("wide") == kinds.count("narrow") == len(page.all("figure")) == len(page.all("svg")) / 2
  assert page.text.count("Verdict: ") == 1


def back(values):
  return np.array([np.nan if x is None else float(x) for x in values])


@pytest.mark.parametrize("case", CASES)
def test_the_page_contains_the_data_of_the_run(case, page_of):
  run = CASES[case]()
  got = json.loads(page_of(case).data, parse_constant=pytest.fail)
  assert got["steps"] == run.steps.tolist()
  assert got["omitted"] == []
  assert set(got["columns"]) == set(run.columns)
  for key, values in run.columns.items():
    np.testing.assert_allclose(back(got["columns"][key]), values, rtol=1e-9 if key == "time" else 5.1e-7, atol=0)
  assert got["nonfinite"] == {key: run.steps[mask].tolist() for key, mask in run.flags.items()}
  assert got["leaves"] == {key: list(names) for key, names in run.leaves.items()}
  assert {key: vector["steps"] for key, vector in got["vectors"].items()} == {
    key: steps.tolist() for key, (steps, _) in run.vectors.items()
  }
  for key, (_, values) in run.vectors.items():
    np.testing.assert_allclose([back(row) for row in got["vectors"][key]["values"]], values, rtol=5.1e-7)
  if run.weights is not None:
    np.testing.assert_allclose(got["weights"]["counts"], run.weights[2])


def test_names_are_shown_and_are_no_markup():
  evil = verdict.Finding("FAIL", "<i>name</i>", f"<script>{EVIL[0]}", "</td><td>", "<b>rule</b>", '"><i>source', (7,))
  moves = tuple(Move(key, 20, 9.0, 1.0) for key in ("loss", '"><b>'))
  event = Event(20, 21, moves, EVIL, ('" onload="x', ("<b>", 3)), is_recovered=False)
  run = full(names=EVIL, path="</title><script>x<&.jsonl")
  losses = ("val <b> loss", 'val " onload="x loss', "val $a_1$ $b$ loss", "_val_loss")
  run.columns.update(dict.fromkeys(losses, run.columns["loss"]))
  page = judged(run, [evil, *[verdict.Finding("INFO", *"abc")] * 2], [event], drawn=True)
  assert not page.all("b") + page.all("i")
  assert "Training run title><script>x<&.jsonl" in page.text
  assert f"FAIL <script>{EVIL[0]}What to do: </td><td>" in page.text
  assert f'<script>{EVIL[0]}Rule: <b>rule</b>. Source: "><i>source.</td><td>' in page.text
  assert not [name for name in EVIL if words.plain(name) not in page.text]
  assert "a\\u2028b\\u2029c\\nd\\u202ee" in page.text and "\\ud800" in page.text
  assert "val <b> loss from 5 to 2, lowest 2" in page.alt("Timeline")
  assert "cost $a_1$ \\$" in "".join(page.words)
  assert page.source.count(">fill: #0072b2</text>") == 6  # Labels of three maps, whose text is no colour of the page.
  assert json.loads(page.data)["leaves"]["grad"] == list(EVIL)
  assert not set("<>&") & set(page.data)
  for name in (EVIL[5], *losses[2:]):  # No mathematics in a label, and none left out.
    assert len(re.findall(rf"> ?{re.escape(name)}</text>", page.source)) >= 2
  assert not any("onload" in attrs for _, attrs in page.tags)
  assert "Verdict: 1 FAIL, 0 WARN, 2 INFO" in page.text


def test_the_words_of_a_run(page_of):
  page = page_of("3 layers")
  run = full()
  norm = run.columns["grad/norm"][30:]  # After the warm-up, as in the verdict.
  norm = norm[np.isfinite(norm)]
  p50, p90, p99 = (f"{x:.3g}" for x in np.percentile(norm, [50, 90, 99]))
  assert (
    f"p50 {p50}, p90 {p90}, p99 {p99}, largest 50, over 269 finite norms" in page.text
    and f"median norm{p50}" in page.text
  )
  assert page.source.count(f">p90 {p90}</text>") == 2  # The legend, for a screen and a phone.
  alt = page.alt("Timeline, steps 1 to 300.")
  assert (
    f"grad/norm after the warm-up, from step 31: median {p50}, 90th percentile {p90}, 99th percentile {p99}, smallest "
    f"{norm.min():.3g}, largest 50. Threshold 2. 1 of 300 (0.333%) steps clipped. 1 of 300 (0.333%) steps nonfinite, "
    "first at step 152."
  ) in alt
  assert "loss from 5 to 2, lowest 2. val_loss from 3 to 3, lowest 3. learning_rate from 0.0003 to 0.0003" in alt
  assert "1 layer was nonfinite at some step: embed." in alt
  assert page.alt("Histogram of log10 of grad/norm") == (
    f"Histogram of log10 of grad/norm over 269 finite steps after the warm-up: p50 {p50}, p90 {p90}, p99 {p99}."
  )
  assert "3 of 3 layers have a median in the range 0.0001 to 0.01." in page.alt("Line chart of update")
  assert page.alt("Histogram of log10 of the size of the weights").endswith("0.0316 at step 1 and 0.0316 at step 291.")
  assert page.alt("Line chart of the step time").endswith(
    "step time: 125 ms, the median over parts of the run; time between pushes: median 125 ms, 99th percentile 125 ms; "
    "8 steps per second, 37.4 s in total; 8,000 tokens per second."
  )
  assert "2026-09-21 14:13 UTC, 37.4 s. Step 1 to 300. Written by clipjax" in page.text
  assert "parameters1,234,567" in page.text
  assert "Step 152, the first nonfinite step of grad/norm.layernorm" in page.text
  assert "Not in this report" not in page.text


def test_the_head_has_the_optimizer_and_leaves_out_an_invalid_time():
  run = dataclasses.replace(full(20), optimizer=("ScaleByAdamState", "<b>"))
  assert "Optimizer states: ScaleByAdamState, <b>. Written" in judged(run).text
  run.columns["time"][:] = 1e300
  assert "Training run demo.jsonl\nStep 1 to 20. Optimizer" in judged(run).text


def test_verdict_and_suggestion_come_from_the_library(page_of):
  run, page = full(), page_of("3 layers")
  findings = clipjax.runs.diagnose(run).findings
  assert findings
  for finding in findings:
    source = sources.BY_TEXT[finding.source].title if finding.source else ""
    rule = f"Rule: {finding.rule}." if finding.rule else ""
    rule += f" Source: {source}." if source else ""
    assert f"{finding.level}{finding.name}{finding.message}{rule}{finding.advice}" in page.text
    said = f"{finding.level} {finding.message}" + f"What to do: {finding.advice}" * bool(finding.advice)
    assert (said in page.text) == (finding.level != "INFO")
  assert any(finding.source for finding in findings)
  suggestion = clipjax.runs.suggest_max_norm(run)
  assert f"max_norm = {words.number(suggestion.max_norm)}{suggestion.reason}" in page.text
  assert "".join(f"Source: {sources.BY_TEXT[source].title}" for source in suggestion.sources) in page.text
  assert f"(suggested){words.percent(suggestion.clip_fraction)}" in page.text


def test_the_page_shows_the_suggestion_of_the_caller(tmp_path):
  run = full()
  given = clipjax.runs.suggest_max_norm(run, learning_rate=0.1, new_learning_rate=0.8)
  assert given.max_norm != clipjax.runs.suggest_max_norm(run).max_norm
  text = written(run, tmp_path, suggestion=given).text
  assert f"Suggested thresholdmax_norm = {words.number(given.max_norm)}{given.reason}" in text
  with pytest.raises(TypeError, match="must be") as error:
    clipjax.runs.write_report(run, tmp_path / "x.html", suggestion=0.5)
  assert str(error.value) == (
    "`suggestion` must be a Suggestion, got 0.5 (float): pass what clipjax.runs.suggest_max_norm returns."
  )


def test_sources_are_links_and_nothing_else_is():
  for text, source in sources.BY_TEXT.items():
    assert re.fullmatch(r"https://[\w.]+/[\w./#-]+", source.address)
    assert report_page.source(text) == f'<a href="{source.address}">{html.escape(source.title)}</a>'
  for other in ("https://evil.example/a", "javascript:alert(1)", f"x{sources.PLAYBOOK}", "<b>"):
    assert report_page.source(other) == html.escape(other)
  said = f"{sources.PLAYBOOK} {sources.PLAYBOOK.address} arXiv 1211.5063"  # Words of a finding, no source.
  finding = verdict.Finding("WARN", "name", said, said, said, str(sources.OLMO_2))
  links = judged(CASES["nothing"](), [finding]).all("a")
  assert [attrs["href"] for attrs in links] == [sources.OLMO_2.address]


def test_without_a_suggestion_the_page_says_why():
  run = make([1.0] * 50, bad=range(50))
  with pytest.raises(ValueError, match="must") as error:
    clipjax.runs.suggest_max_norm(run)
  assert f"Suggested thresholdNone: {error.value}" in judged(run).text


def test_what_was_not_recorded_is_one_line_each():
  page = judged(make([1.0, 2.0]))
  left_out = page.text[page.text.index("Not in this report") : page.text.index("Data")]
  assert left_out == (
    "Not in this report"
    "Loss: pass the losses to push: recorder.push(step, opt_state, loss=loss, val_loss=val_loss)."
    "Learning rate: pass it to push: recorder.push(step, opt_state, learning_rate=schedule(step))."
    "Layers over time: chain clipjax.watch() before the clip to record the norm of every layer."
    'Norm of the update: chain clipjax.watch(name="update") last, after the optimizer.'
    'Size of the updates: chain clipjax.watch(name="update") last, after the optimizer, and pass params to update.'
    "Size of the weights: pass the parameters to push: recorder.push(step, opt_state, params=params)."
    "Speed: call recorder.push at least twice.\n"
  )
  nothing = judged(CASES["nothing"]()).text
  assert "Gradient norm: chain clipjax.clip_by_global_norm(max_norm) or clipjax.watch() before the opt" in nothing
  assert "Timeline: call recorder.push after each step." in judged(CASES["no steps"]()).text


def test_a_long_run_is_thinned_and_its_data_fit_into_a_file_that_opens(page_of):
  assert "Lines are thinned for drawing" in page_of("700 steps").text
  assert "thinned" not in page_of("3 layers").text
  assert report_data.LARGEST < 10_000_000
  text, omitted = report_data.to_json(run := full(2000), 90_000)
  assert len(text) < 94_000
  kept = json.loads(text)
  assert len(kept["columns"]["grad/norm"]) == 2000
  assert kept["omitted"] == omitted and "update/ratio" in omitted
  assert set(omitted) | set(kept["columns"]) >= set(run.columns)


def test_a_page_names_what_is_left_out_of_its_data(monkeypatch):
  monkeypatch.setattr(report_data, "LARGEST", 4000)
  assert "Left out of the JSON because of its size: grad/norm, time, loss, " in judged(full()).text


# Errors and imports -------------------------------------------------------------------------------------------------


IMPORTS = """
import sys
import clipjax
from clipjax.runs.run import Run
write_report, plot_norms = clipjax.runs.write_report, clipjax.runs.plot_norms
assert "matplotlib" not in sys.modules
run, path = Run.from_arrays({"grad/norm": [1.0, 2.0]}), sys.argv[1]
sys.modules["matplotlib"] = None
for call in (lambda: write_report(run, path), lambda: plot_norms(run)):
  try:
    call()
  except ImportError as error:
    print(error.name, error)
del sys.modules["matplotlib"]
write_report(run, path), plot_norms(run)
import clipjax.demo.compare
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""


def test_matplotlib_is_loaded_at_the_call_and_named_where_it_is_missing_and_pyplot_never(tmp_path):
  command = [sys.executable, "-W", "error", "-c", IMPORTS, str(tmp_path / "x.html")]
  got = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
  missing = "matplotlib a report needs matplotlib: pip install 'clipjax[report]'\n"
  assert (got.stderr, got.stdout) == ("", 2 * missing + "True False\n")


def test_clipped_steps_are_counted_by_the_clip_or_else_by_rows():
  run = full()
  marked = int(np.sum(run["grad/scale"] < 1))
  assert 0 < marked < 250
  assert f"clipped steps{marked}nonfinite" in judged(run).text
  run.columns["grad/clipped_steps"] = np.append(np.full(len(run) - 2, np.nan), [249.0, 250.0])
  assert "clipped steps250nonfinite" in judged(run).text


@pytest.mark.parametrize("call", [lambda run, path: clipjax.runs.plot_norms(run), clipjax.runs.write_report])
def test_an_import_error_inside_the_package_is_passed_on(monkeypatch, tmp_path, call):
  for name in ("figures", "build_page"):
    monkeypatch.setitem(sys.modules, f"clipjax.runs.report.{name}", None)
    monkeypatch.delattr(f"clipjax.runs.report.{name}", raising=False)
  with pytest.raises(ModuleNotFoundError, match=r"clipjax\.runs\.report"):
    call(clipjax.runs.Run.from_arrays({"grad/norm": [1.0, 2.0]}), tmp_path / "x.html")
  told = report_write._without_matplotlib(ModuleNotFoundError(name="matplotlib"))
  assert str(told) == "a report needs matplotlib: pip install 'clipjax[report]'"
