"""The effect of a clip in the report: its section and figure, and no other part of the page."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pages import Page, figures, full, judged, labels, lines_of, make, panel, shown

import clipjax
from clipjax.runs.effects import effect_names
from clipjax.runs.health.events import Event, Move
from clipjax.runs.health.findings import Finding
from clipjax.runs.kept_steps import mean_kept
from clipjax.runs.report import effect, grid
from clipjax.runs.roles import judged_states, role_of
from clipjax.runs.run import Run

TITLE = "What the clip does to the step"
LENGTH, TURN, LEAVES = "Ratio to the step without the clip", "Cosine between the two steps", "Ratio by leaf"
MOST = float(np.finfo(np.float32).max)  # The ratio of a step that would be 0 without the clip.
NAMES = ("embed", "head", "layers/0/w")


def with_effect(run, ratio=0.6, cosine=0.9, grad_ratio=0.5, *, leaves=None, names=NAMES, every=10, name="effect"):
  """The run with an effect; NaN marks a nonfinite step. `leaves`: ratios by leaf, or by row and leaf."""
  n = len(run)
  for quantity, values in (("ratio", ratio), ("cosine", cosine), ("grad_ratio", grad_ratio), ("steps", run.steps)):
    key, column = f"{name}/{quantity}", np.broadcast_to(np.asarray(values, np.float64), n).copy()
    run.columns[key] = column
    if np.isnan(column).any():
      run.flags[key] = np.isnan(column)
  if leaves is not None and n:
    at = np.arange(0, n, every)
    values = np.broadcast_to(np.asarray(leaves, np.float64), (at.size, len(names))).copy()
    run.vectors[f"{name}/ratio"] = run.steps[at], np.where(np.isnan(values), np.inf, values)
    run.leaves[name] = tuple(names)
  return run


def section_of(page, title=TITLE):
  """The words between a heading and the next one."""
  (found,) = re.findall(rf"<h2>{re.escape(title)}</h2>.*?</section>", page.source, re.DOTALL)
  return re.sub(r"\s+", " ", re.sub("<[^>]*>", "", re.sub("<svg.*?</svg>", "", found, flags=re.DOTALL)))


def sections_of(run, findings=(), events=(), *, drawn=False):
  """The sections of the effects, as a page."""
  with figures(drawn):
    return Page("".join(effect.effects(shown(run, findings, events))))


def drawn(run, findings=(), events=()):
  figure = effect.figure(effect.picture_of(shown(run, findings, events), "effect"))
  FigureCanvasAgg(figure).draw()
  return figure


def curve(axes, label):
  return lines_of(axes)[label].get_ydata()


# What is said -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [full, lambda: make([]), lambda: make([1.0] * 9, **{"mine/cosine": [0.5] * 9})])
def test_a_run_without_an_effect_has_no_section(run):
  assert effect.effects(shown(run())) == []


def test_the_numbers_leave_out_the_warm_up():
  # A tenth of 100 steps is the warm-up, whose numbers would turn every median.
  ratio, cosine = np.full(100, 0.5), np.full(100, 0.8)
  ratio[:10], cosine[:10] = 40.0, -1.0
  ratio[10:28] = 1.04  # 18 of 90 steps are within 5%.
  ratio[28:32] = [0.94, 1.06, 0.96, 1.0]
  leaves = np.tile([0.9, 1.5, 1.0], (20, 1))
  leaves[2:, 0] = [0.2, 3.0, 0.6] * 6  # Kept: (0.2 + 1 + 0.6) / 3; a longer step makes up for none.
  page = sections_of(with_effect(make(np.ones(100)), ratio, cosine, 0.25, leaves=leaves, every=5))
  for words in (page.alt(TITLE), section_of(page)):
    assert "the median ratio is 0.5 and the median cosine 0.8." in words
    assert "In 20 of 90 (22.2%) steps the ratio is within 5% of 1." in words
    assert "multiplies the gradient norm by 0.25 (median)" in words
    assert re.search(r"embed.? keeps the smallest part of its step, 60% on average", words)
    assert re.search(r"The step of head.? grows most, 1.5 times \(median\)", words)
  assert "a ratio of 1" in section_of(page).lower()
  assert "Adam" in section_of(page)


KEEPS = "keeps the smallest part of its step"


@pytest.mark.parametrize(
  ("leaves", "said"),
  [
    ([1.0, 0.97, 1.04], "On average every leaf keeps its step to within 5%."),
    ([0.6, 0.6, 0.6], "Every leaf keeps the same part of its step, 60% on average."),
    ([0.6, 1.01, 1.0], f"embed {KEEPS}, 60% on average. The step of no leaf grows by more than 5% (median)."),
    ([1.0, 2.5, 1.0], "No leaf loses more than 5% of its step on average. The step of head grows most, 2.5 times"),
    ([0.0, 1.0, MOST], f"embed {KEEPS}, 0% on average. layers/0/w would not move without the clip."),
    ([np.nan, np.nan, np.nan], "No leaf has a finite ratio after the warm-up."),
    ([np.nan, 1.0, 0.5], f"layers/0/w {KEEPS}, 50% on average. The step of no leaf grows by more than 5% (median)."),
  ],
)
def test_leaves_in_words(leaves, said):
  page = sections_of(with_effect(make(np.ones(100)), leaves=leaves))
  assert said in page.alt(TITLE)


def test_steps_that_were_not_finite_are_counted():
  ratio = np.full(50, 0.5)
  ratio[[20, 30]] = np.nan
  words = sections_of(with_effect(make(np.ones(50)), ratio, ratio, ratio)).alt(TITLE)
  assert "2 steps were nonfinite" in words and "the median ratio is 0.5" in words


def test_rows_of_a_spike_do_not_count_more_than_others():
  # A recorder writes the leaves once in 10 steps, and at spikes, whose gradients are clipped to a hundredth.
  left = np.full(200, 0.8)
  left[102:108] = 0.01
  run = with_effect(make(np.ones(200)), left, grad_ratio=left, leaves=[0.8, 1.0, 1.0])
  steps, values = run.vectors["effect/ratio"]
  at, low = np.arange(103, 109), np.full((6, 3), 0.01)
  order = np.argsort(np.append(steps, at), kind="stable")
  run.vectors["effect/ratio"] = np.append(steps, at)[order], np.concatenate([values, low])[order]
  kept = (174 * 0.8 + 6 * 0.01) / 180
  assert f"embed {KEEPS}, {100 * kept:.3g}% on average" in sections_of(run).alt(TITLE)


def test_each_step_counts_as_the_row_that_was_clipped_as_much():
  ratios = np.array([[0.2, 1.0], [0.4, 5.0], [0.8, 0.5]])
  # Two rows at 1 stand together for the steps near 1, one for those near 0.1; ratios above 1 are whole steps.
  found = mean_kept(ratios, np.array([1.0, 1.0, 0.1]), np.array([1.0, 0.9, 0.95, 0.2, np.nan]))
  np.testing.assert_allclose(found, [(3 * 0.3 + 0.8) / 4, (3 * 1.0 + 0.5) / 4])
  np.testing.assert_allclose(mean_kept(ratios, np.full(3, np.nan), np.ones(4)), [1.4 / 3, 2.5 / 3])
  ratios[1, 0], ratios[:, 1] = np.inf, np.nan
  np.testing.assert_allclose(mean_kept(ratios, np.ones(3), np.ones(4)), [0.5, np.nan])


def test_each_effect_has_a_section_after_the_distribution_of_the_norm():
  run = with_effect(full(), 0.5, leaves=[0.5, 0.5, 0.5])
  page = judged(with_effect(run, 1.5, name="adam/effect"))
  headings = re.findall("<h2[^>]*>([^<]*)</h2>", page.source)
  at = headings.index("Distribution of the norm") + 1
  titles = headings[at : at + 2]
  assert titles == [f"{TITLE}, effect", f"{TITLE}, adam/effect"]
  first, second = (section_of(page, title) for title in titles)
  assert "the median ratio is 0.5" in first and "Numbers by leaf were not recorded" not in first
  assert "the median ratio is 1.5" in second and "Numbers by leaf were not recorded" in second


# What is drawn ------------------------------------------------------------------------------------------------------


def test_the_figure_has_the_ratios_the_cosine_and_the_leaves_on_one_axis():
  n = 100
  ratio, cosine, left = np.linspace(0.2, 3, n), np.linspace(1, -0.4, n), np.linspace(1, 0.1, n)
  figure = drawn(with_effect(make(np.ones(n)), ratio, cosine, left, leaves=[0.1, 1.0, 10.0]))
  length, turn, leaves = (panel(figure, title) for title in (LENGTH, TURN, LEAVES))
  np.testing.assert_allclose(curve(length, "step"), ratio)
  np.testing.assert_allclose(curve(length, "gradient"), left)
  assert length.get_yscale() == "log"
  assert any(np.array_equal(line.get_ydata(), [1, 1]) for line in length.lines)
  np.testing.assert_allclose([line.get_ydata() for line in turn.lines if line.get_ydata().size == n], [cosine])
  assert turn.get_yscale() == "linear"
  low, high = turn.get_ylim()
  assert -1.1 < low < -0.4 and 1 < high < 1.1
  low, high = panel(drawn(with_effect(make(np.ones(50)), cosine=np.linspace(0.99999, 1, 50))), TURN).get_ylim()
  assert low <= 0.9 and 1 < high < 1.1  # A cosine near 1 is not magnified.
  assert length.get_xlim() == turn.get_xlim() == leaves.get_xlim()
  (image,) = leaves.images
  assert image.norm.vmin == pytest.approx(-1) and image.norm.vmax == pytest.approx(1)
  np.testing.assert_allclose(image.get_array()[:, 0], [-1, 0, 1], atol=1e-12)
  assert [text.get_text() for text in leaves.get_yticklabels()] == ["embed", "head", "layers/0"]


def test_ratios_without_a_place_on_the_axis_are_marks_at_its_edge_and_cells_of_a_colour_of_their_own():
  ratio = np.full(50, 0.5)
  ratio[[10, 20, 30]] = 0, MOST, np.nan
  figure = drawn(with_effect(make(np.ones(50)), ratio, leaves=[0.0, np.nan, MOST]))
  axes = panel(figure, LENGTH)
  low, high = axes.get_ylim()
  assert low > 0.05 and high < 20
  at = [int(*lines_of(axes)[label].get_xdata()) for label in ("0 with the clip", "0 without the clip", "nonfinite")]
  assert at == [11, 21, 31]
  axes = panel(figure, LEAVES)
  (image,) = axes.images
  values = image.get_array()[:, 0]
  assert values[0] < image.norm.vmin and values[1] > image.norm.vmax and values[2] == image.norm.vmax
  assert set(labels(axes)) >= {"nonfinite", "zero"}


def test_one_short_or_long_step_of_a_long_run_is_drawn():
  values = np.ones((3000, 1))
  values[1234:1236, 0], values[2345:2347, 0] = (0.02, 3.0), (50.0, 0.5)  # In one cell each, the farther from 1 counts.
  ratio = np.exp(np.random.default_rng(0).normal(0, 0.1, 3000))
  figure = drawn(with_effect(make(np.ones(3000)), ratio, leaves=values, names=("w",), every=1))
  (image,) = panel(figure, LEAVES).images
  cells = image.get_array()
  assert cells.shape[1] < 500
  assert (cells.min(), cells.max()) == (pytest.approx(np.log10(0.02)), pytest.approx(np.log10(50.0)))
  line = curve(panel(figure, LENGTH), "step")
  assert line.size < 2000 and (line.min(), line.max()) == (ratio.min(), ratio.max())
  some = np.array([[np.nan, 1.0], [np.nan, -np.inf], [np.nan, np.nan]])
  np.testing.assert_array_equal(grid.farthest(some, np.array([0])), [[np.nan, -np.inf]])


def test_a_starved_layer_of_a_deep_stack_is_drawn():
  names = tuple(f"blocks/w[{i}]" for i in range(2000))
  values = np.ones(2000)
  values[1234] = 0.02
  run = with_effect(make(np.ones(100)), leaves=values, names=names)
  (image,) = panel(drawn(run), LEAVES).images
  assert image.get_array().min() == pytest.approx(np.log10(0.02))
  page = sections_of(run)
  assert f"blocks/w[1234] {KEEPS}, 2% on average" in page.alt(TITLE)
  assert "farthest from 1 among 6 neighbours" in section_of(page)


def test_what_the_verdict_marks_is_marked():
  findings = [Finding("WARN", "clip-starves", "x", steps=(40,))]
  events = [Event(70, 72, (Move("grad/norm", 70, 50.0, 1.0),), (), (), True)]
  run = with_effect(make(np.ones(100)), leaves=1.0)
  figure = drawn(run, findings=findings, events=events)
  words = {text.get_text() for text in panel(figure, "What happened").texts}
  assert words == {"clip-starves", "1"}
  assert "marked as in the timeline" in section_of(sections_of(run, findings, events))
  assert "marked" not in section_of(sections_of(run))


ODD = {
  "none finite": functools.partial(with_effect, ratio=np.nan, cosine=np.nan, grad_ratio=np.nan, leaves=np.nan),
  "zero": functools.partial(with_effect, ratio=0.0, cosine=1.0, grad_ratio=0.0, leaves=0.0),
  "most": functools.partial(with_effect, ratio=MOST, cosine=1.0, grad_ratio=MOST, leaves=MOST),
  "one": functools.partial(with_effect, ratio=1.0, cosine=1.0, grad_ratio=1.0, leaves=1.0),
  "ratios alone": functools.partial(with_effect, cosine=np.nan),
  "gaps": lambda run: with_effect(run, np.where(run.steps % 3 == 0, np.nan, 0.5), leaves=[0.5, np.nan, 2.0]),
  "one leaf": functools.partial(with_effect, leaves=[0.3], names=("w",)),
  "many leaves": functools.partial(
    with_effect, leaves=np.geomspace(0.01, 10, 2000), names=tuple(map(str, range(2000)))
  ),
  "names": functools.partial(with_effect, leaves=[0.1, 1, 9], names=("</script><b>", "cost $a_1$", "_x" * 99)),
  "no leaves": with_effect,
}


@pytest.mark.parametrize(
  ("case", "steps"), [*((case, 60) for case in ODD), ("none finite", 1), ("most", 1), ("one leaf", 2)]
)
def test_odd_runs_have_a_whole_section(case, steps):
  page = sections_of(ODD[case](make(np.ones(steps))), drawn=True)
  assert LENGTH in page.text
  alt = page.alt(TITLE)
  assert not re.search(r"\bnan\b|\binf\b|e\+38|None", alt)
  assert len([attrs for attrs in page.all("svg") if attrs["aria-label"] == alt]) == 2
  assert ("After the warm-up, no step was finite" in alt) == (case == "none finite" and steps > 1)


# What it is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["effect", "update"])
def test_an_effect_is_neither_a_gradient_nor_a_ratio_of_updates(name):
  run = with_effect(make(np.ones(50)), leaves=[0.5, 1.0, 2.0], name=name)
  assert effect_names(run) == [name]
  assert judged_states(run) == ["grad"]
  assert [role_of(key) for key in run.columns if key.startswith("effect/")] == [None] * 4 * (name == "effect")
  assert clipjax.runs.plot_norms(run).axes[0].get_ylabel() == "grad/norm"
  page = judged(run)
  assert (TITLE if name == "effect" else f"{TITLE}, update") in page.text
  assert "Size of the updates" in page.text.partition("Not in this report")[2]
  assert "Update over parameters" not in page.text and "update ratio" not in page.text
  data = json.loads(page.data)
  assert {f"{name}/{quantity}" for quantity in ("ratio", "cosine", "grad_ratio", "steps")} <= set(data["columns"])
  assert data["vectors"][f"{name}/ratio"]["values"][0] == [0.5, 1.0, 2.0]
  assert data["leaves"][name] == list(NAMES)


def test_a_run_of_an_effect_alone_has_its_section_and_no_norm():
  alone = with_effect(Run("x", np.arange(1, 51), {}, {}, {}, {}, None, None), leaves=1.0)
  with pytest.raises(
    ValueError, match=r"^`run` must have a norm, got \['effect/cosine', .*: chain clipjax.watch\(\) or a"
  ):
    clipjax.runs.plot_norms(alone)
  assert TITLE in sections_of(alone).text


# A recorded run -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
def test_the_page_of_a_recorded_run_says_what_its_file_says(tmp_path):
  # One of two gradients is 100 times as large at every third step.
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(3.0), optax.sgd(0.1))
  params = {"even": jnp.ones(8), "heavy": jnp.ones(8)}
  draws = np.random.default_rng(1).standard_normal((60, 2, 8)).astype(np.float32)
  draws[::3, 1] *= 100
  state, update = tx.init(params), jax.jit(tx.update)
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", every=1) as recorder:
    for step, (even, heavy) in enumerate(draws, 1):
      _, state = update({"even": jnp.array(even), "heavy": jnp.array(heavy)}, state, params)
      recorder.push(step, state, loss=1.0)
  run = clipjax.runs.read_run(tmp_path / "run.jsonl")
  words = sections_of(run).alt(TITLE)
  begin = clipjax.runs.diagnose(run).warmup_steps
  ratio, cosine = (np.median(run[f"effect/{quantity}"][begin:]) for quantity in ("ratio", "cosine"))
  assert f"the median ratio is {ratio:.3g} and the median cosine {cosine:.3g}" in words
  kept = np.minimum(run["effect/ratio/even"][begin:], 1).mean()
  assert 0.3 < kept < 0.9
  assert f"keeps the same part of its step, {100 * kept:.3g}% on average" in words
