"""Runs of models whose layers are stacked in arrays: what a Recorder writes of them, the verdict, the report."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from synthetic import N, bad, healthy, layered, only, run_of

import clipjax
from clipjax.runs import number_text
from clipjax.runs.health.verdict import HealthReport
from clipjax.runs.report import axes as report_axes
from clipjax.runs.report import grid, heatmap
from clipjax.runs.report import sections as report_sections
from clipjax.runs.report import series as report_series
from clipjax.runs.report.shown import shown_of
from clipjax.runs.words import Stack, in_stacks, several

LAYERS, ARRAYS = 200, 12
SLICES = LAYERS * ARRAYS + 1


def layers_of(*leaves, size=24):
  return tuple(f"{leaf}[{i}]" for leaf in leaves for i in range(size))


def stacked(path, leaf):
  return 0 if path.startswith("blocks/") else None


def by_layer(path, leaf):
  """The group of a slice: its layer, or "rest"."""
  return f"layer {path.partition('[')[2][:-1]}" if "[" in path else "rest"


def grads_of(layers=LAYERS, arrays=ARRAYS, seed=0):
  rng = np.random.default_rng(seed)
  blocks = {f"{i:02}": jnp.asarray(rng.lognormal(size=(layers, 2)), jnp.float32) for i in range(arrays)}
  return {"blocks": blocks, "head": jnp.ones(3)}


def record(path, tx, grads, every=5, steps=11):
  """Steps of growing gradients; the last state."""
  state, update = tx.init(grads), jax.jit(tx.update)
  with clipjax.runs.Recorder(path, every=every) as recorder:
    for step in range(1, steps + 1):
      _, state = update(jax.tree.map(lambda x, by=1 + step / 100: x * by, grads), state, grads)
      recorder.push(step, state, loss=1 / step)
  return state


def lines_of(path):
  return path.read_text().splitlines()


# The record ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """The file of a large model under a watch and a clip by layer, and its last state."""
  path = tmp_path_factory.mktemp("stacked") / "run.jsonl"
  clip = clipjax.clip_by_group_norm(1.0, by_layer, stacked=stacked)
  tx = optax.chain(clipjax.watch(stacked=stacked), clip, optax.sgd(1.0))
  return path, record(path, tx, grads_of())


def test_a_row_has_16_bytes_a_number_and_no_key_for_each_layer_and_the_names_are_written_once(recorded):
  path, _ = recorded
  lines = lines_of(path)
  header, *rows = map(json.loads, lines)
  assert [len(header["leaves"][key]) for key in ("grad", "grad_group")] == [SLICES, LAYERS + 1]
  assert len(rows) == 11  # No other header.
  assert max(len(row) for row in rows) == 18
  full = [row["leaf"] for row in rows if "leaf" in row]
  assert len(full) == 3
  want = {f"grad/{key}" for key in ("norm", "ratio", "nonfinite", "worst_norm")}
  want |= {f"grad_group/{key}" for key in ("norm", "max_norm", "scale")}
  assert all(set(leaf) == want for leaf in full)
  for line in lines[1:]:
    assert len(line) < (16 * 3 * (SLICES + LAYERS + 1) + 3 * SLICES + 1000 if '"leaf"' in line else 600)


def test_every_slice_and_every_group_is_what_metrics_says(recorded):
  path, state = recorded
  run, want = clipjax.runs.read_run(path), clipjax.metrics(state, per_leaf=True)
  assert len(want) > 4 * LAYERS * ARRAYS + 3 * LAYERS
  assert run.steps[-1] == 11
  for key in ("norm", "ratio", "nonfinite", "worst_norm"):
    values = [want[f"grad/{key}/{name}"] for name in run.leaves["grad"]]
    np.testing.assert_array_equal(run.vectors[f"grad/{key}"][1][-1].astype(np.float32), values)
  np.testing.assert_array_equal(
    run["grad/norm/blocks/03[117]"][-1], np.float64(f"{want['grad/norm/blocks/03[117]']:.9g}")
  )
  for key in ("norm", "max_norm", "scale"):  # By the keys of `metrics`, though the watch has other leaves.
    column = run[f"grad/{key}/layer 117"].astype(np.float32)
    assert column[-1] == want[f"grad/{key}/layer 117"]
    assert np.isfinite(column).sum() == 3
  assert "grad/scale/rest" in run
  assert "grad/scale/layer 200" not in run
  assert not [key for key in run.columns if "layer" in key]


@pytest.mark.parametrize("layers", [None, stacked])
def test_up_to_64_groups_are_columns(tmp_path, layers):
  for groups, is_column in ((64, True), (65, False)):
    path = tmp_path / f"{groups}.jsonl"
    tree = {"blocks": {f"{i:02}": jnp.ones((1, 2)) for i in range(groups)}}
    record(path, clipjax.clip_by_group_norm(1.0, lambda path, leaf: path[:9], stacked=layers), tree, steps=3)
    run = clipjax.runs.read_run(path)
    assert ("grad/norm/blocks/07" in run.columns) == is_column
    assert np.isfinite(run["grad/norm/blocks/07"]).sum() == (3 if is_column else 1)


def test_text_of_vectors_is_that_of_single_numbers():
  rng = np.random.default_rng(0)
  powers = np.array([f"1e{i}" for i in range(-45, 39)], np.float32)
  some = rng.integers(0, 0x7F800000, 20_000, dtype=np.uint32).view(np.float32)  # All finite float32 are as likely.
  ties = (rng.integers(2**23, 2**24, 5000) * 2.0 ** rng.integers(-20, 8, 5000)).astype(np.float32)
  near = np.nextafter(powers, np.float32(0)), np.nextafter(powers[:-1], np.float32(np.inf))
  # At these, so near to a half in the tenth digit, a product in float64 is rounded to the wrong side.
  hard = np.float32([6.205945e-14, 2.8634637e-26, 6.476829e-22, 8.0649666e31, 9.864476e24])
  values = np.concatenate([powers, *near, some, ties, hard, np.float32([0, np.inf, np.nan, 3.4028235e38])])
  single = [float(f"{x:.9g}") for x in values.tolist()]
  np.testing.assert_array_equal(number_text.numbers(values), single)
  np.testing.assert_array_equal(number_text.numbers(-values.reshape(-1, 1)), [[-x] for x in single])
  array = number_text.json_array(values)
  assert json.loads(array, parse_constant=pytest.fail) == [x if math.isfinite(x) else None for x in single]
  assert len(array) == 16 * len(values)
  np.testing.assert_array_equal(np.array(single).astype(np.float32), values)


@pytest.mark.parametrize("size", [3, 300])
def test_text_of_vectors_of_other_kinds(size):
  negative = np.float32([-0.5, *[1] * (size - 1)])
  for vector in (np.zeros(size, np.int32), np.arange(size), np.full(size, np.inf), negative):
    want = [None if np.isinf(x) else x for x in vector.tolist()]
    assert json.loads(number_text.json_array(vector)) == want
  assert json.loads(number_text.json_array(np.full(size, 0.1))) == [0.1] * size


# Names --------------------------------------------------------------------------------------------------------------


def test_layers_are_found_among_names():
  names = ("embed", *layers_of("b/w", "b/v", size=3), "x[0]", "x[2]", "y[1]", "a\n[0]", "a\n[1]")
  assert in_stacks(names) == [
    Stack("embed", 0, 1),
    Stack("b/w", 1, 3),
    Stack("b/v", 4, 3),
    *(Stack(names[i], i, 1) for i in (7, 8, 9)),
    Stack("a\n", 10, 2),
  ]
  assert in_stacks(()) == []
  odd = ["w[00]", "w[01]", "w[\u0660]", "w[\u0661]", f"w[{'9' * 5000}]"]
  assert [stack.size for stack in in_stacks(odd)] == [1] * 5


ALL = ("embed", *layers_of("b/k", "b/q", "b/v", "b/w"))
DEPTHS = (*layers_of("enc/q", "enc/k", size=6), *layers_of("dec/q", "dec/k", size=12))
EIGHT = layers_of(*"abcdefgh")


@pytest.mark.parametrize(
  ("names", "among", "text"),
  [
    (["embed"], ALL, "'embed'"),
    (["b/k[3]"], ALL, "'b/k[3]'"),
    (layers_of("b/k"), ALL, "all 24 layers of 'b/k'"),
    (layers_of("b/k")[3:8], ALL, "'b/k[3..7]'"),
    ([f"b/q[{i}]" for i in (0, 5, 6, 7, 9)], ALL, "'b/q[0, 5..7, 9]'"),
    ([f"b/q[{i}]" for i in (0, 2, 4, 6)], ALL, "4 layers of 'b/q'"),
    (["embed", *layers_of("b/k", "b/v")], ALL, "'embed', all 24 layers of 'b/k', all 24 layers of 'b/v'"),
    ([f"b/{leaf}[3]" for leaf in "kqvw"], ALL, "layer 3 of all 4 stacks"),
    ([f"b/{leaf}[{i}]" for leaf in "kqvw" for i in (3, 4, 9)], ALL, "layers 3..4, 9 of all 4 stacks"),
    ([f"b/{leaf}[{i}]" for leaf in "kqvw" for i in (1, 3, 5, 9)], ALL, "4 layers of all 4 stacks"),
    (ALL, ALL, "'embed', all 24 layers of all 4 stacks"),
    (
      ["embed", "b/k[1]", *layers_of("b/q"), *layers_of("b/v")[:2]], ALL,
      "'embed', 'b/k[1]', all 24 layers of 'b/q' and 2 more",
    ),
    # Stacks of other depths are told apart.
    (
      layers_of("enc/q", "enc/k", "dec/q", "dec/k", size=6), DEPTHS,
      "all 6 layers of 'enc/q', all 6 layers of 'enc/k', 'dec/q[0..5]' and 6 more",
    ),
    ([f"{leaf}[7]" for leaf in "bcdef"], EIGHT, "layer 7 of 5 stacks ('b', 'c', 'd' and 2 more)"),
    ([f"{leaf}[7]" for leaf in "bc"], EIGHT, "'b[7]', 'c[7]'"),
    # Names that are no layers.
    (list("abcde"), list("abcdefg"), "'a', 'b', 'c' and 2 more"),
    (["w[4]"], ["w[4]", "w[7]"], "'w[4]'"),
    (["w", "w[0]"], ["w", "w[0]", "w[1]"], "'w', 'w[0]'"),
  ],
)  # fmt: skip
def test_layers_are_said_together(names, among, text):
  assert several(names, among) == text


# The verdict --------------------------------------------------------------------------------------------------------


def test_layers_that_were_not_finite_first():
  columns, at = healthy(), np.arange(N) == 70
  columns["grad/norm"][at] = columns["grad/norm_clipped"][at] = np.nan
  values = np.ones((40, 49))
  names = ("head", *layers_of("b/v", "b/w"))
  values[7, 4:49:24] = np.inf  # Row 7 is step 71.
  run = run_of(columns, flags={"grad/norm": at}, **layered(values, names))
  assert "at step 71; first in layer 3 of all 2 stacks." in only(clipjax.runs.diagnose(run), "nonfinite").message
  run.vectors["grad/norm"][1][7, :] = np.inf
  assert "at step 71; first in every leaf." in only(clipjax.runs.diagnose(run), "nonfinite").message


def test_layers_without_a_gradient_and_layers_far_apart():
  values = np.ones((40, 48))
  values[:, 20:24] = 0
  report = clipjax.runs.diagnose(run_of(healthy(), **layered(values, layers_of("b/v", "b/w"))))
  assert bad(report) == ["zero-gradient"]
  assert only(report, "zero-gradient").message.startswith(
    "4 of 48 layers had a gradient of exactly 0 at all 40 recorded steps: 'b/v[20..23]'."
  )
  assert only(report, "zero-gradient").leaves == ("b/v[20]", "b/v[21]", "b/v[22]", "b/v[23]")
  report = clipjax.runs.diagnose(run_of(healthy(), **layered(np.geomspace(1, 1e-4, 24), layers_of("b/w"))))
  assert "differ by a factor of 10000: 0.0001 in 'b/w[23]', 1 in 'b/w[0]'." in only(report, "layer-spread").message


@pytest.mark.parametrize("beside_a_watch", [False, True])
def test_groups_of_layers_are_judged_group_by_group(beside_a_watch):
  # Some group is clipped in every step, but only one of them in most.
  columns = healthy(**{"grad/clip_fraction": np.ones(N)})
  scales = np.where(np.arange(40)[:, None] % 5 < [1, 4], 0.01, 1.0)
  name = "grad_group" if beside_a_watch else "grad"
  found = layered(scales, ("layer 0", "layer 1"), key=f"{name}/scale")
  if beside_a_watch:
    found["leaves"]["grad"] = ("w[0]", "w[1]")
    found["vectors"]["grad/norm"] = (np.arange(1, N + 1, 10), np.ones((40, 2)))
  report = clipjax.runs.diagnose(run_of(columns, **found))
  assert bad(report) == ["clipped-often"]
  assert only(report, "clipped-often").message.startswith("'grad' clipped 80% of the steps in 'layer 1' and ")
  assert "some leaf or group in 100% of 400 steps" in only(report, "clipped").message


# The report ---------------------------------------------------------------------------------------------------------


def run_of_stacks(leaves, layers, rows=8):
  """A run in which the norm of layer i of leaf j is (j + 1) 0.9**i; layer 1 of the first leaf is largest at step 31."""
  names = ("embed", *layers_of(*leaves, size=layers), "head")
  sizes = np.outer(np.arange(1, len(leaves) + 1), 0.9 ** np.arange(layers)).ravel()
  values = np.tile(np.array([0.5, *sizes, 0.25]), (rows, 1))
  values[3, 2] = 1000.0
  steps = np.arange(1, 10 * rows, 10)
  norm = np.ones(10 * rows)
  norm[30] = 1000.0
  found = {"leaves": {"grad": names, "update": names}}
  found["vectors"] = {"grad/norm": (steps, values), "update/ratio": (steps, np.full(values.shape, 1e-3))}
  return run_of({"grad/norm": norm}, **found)


@pytest.mark.parametrize("width", [report_axes.WIDE, report_axes.NARROW])
@pytest.mark.parametrize(("arrays", "layers"), [(1, 24), (6, 24), (12, 200), (100, 24)])
def test_labels_of_stacks_do_not_touch_and_go_by_depth(arrays, layers, width):
  leaves = [f"blocks/mlp_{i}" for i in range(arrays)]
  found = report_series.vectors(run_of_stacks(leaves, layers), "grad/norm")
  figure = heatmap.layers(found, width)
  FigureCanvasAgg(figure).draw()
  labels = figure.axes[0].get_yticklabels()
  boxes = [label.get_window_extent() for label in labels]
  assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
  assert min(box.x0 for box in boxes) >= 0
  texts = [label.get_text() for label in labels]
  assert {"embed", "head"} <= set(texts) or arrays > 1
  stacks = [text for text in texts if text.endswith(f"[0..{layers - 1}]")]
  assert len(stacks) == arrays or arrays == 100
  depths = [int(text[1:-1]) for text in texts if text.startswith("[")]
  if arrays < 100:
    assert depths == arrays * sorted(set(depths))
    assert len(depths) >= arrays
  if arrays == 6:
    assert stacks[3] == "mlp_3[0..23]"
    assert depths[:4] == [5, 10, 15, 20]


def test_every_stack_keeps_its_label_beside_whole_leaves():
  labels = heatmap.layer_labels(grid.by_depth(("a", *layers_of("w", size=30)), np.ones((31, 1)), 99), 3, 36, {})
  assert labels == {1: "w[0..29]", **{1 + i: f"[{i}]" for i in (5, 10, 15, 20, 25)}}


def test_neighbours_of_a_stack_share_a_line_where_there_are_many():
  names = ("embed", *layers_of("w", "v", size=7))
  values = np.arange(30.0).reshape(15, 2)
  values[9] = np.inf
  values[4] = np.nan  # It was not recorded.
  lines, stacks, per, places = grid.by_depth(names, values, 5)
  assert per == 3
  assert places.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 4, 4, 4, 5, 5, 5, 6]
  assert stacks == (Stack("embed", 0, 1), Stack("w", 1, 7), Stack("v", 4, 7))
  np.testing.assert_array_equal(lines[:, 0], [0, 6, 12, 14, np.inf, 26, 28])
  np.testing.assert_array_equal(grid.by_depth(names, values, 15).values[:9], values[:9])


def test_a_spike_of_one_layer_in_thousands_is_drawn():
  found = report_series.vectors(run_of_stacks([f"b/{i}" for i in range(12)], 200), "grad/norm")
  (image,) = heatmap.layers(found).axes[0].images
  assert image.get_array().max() == 3
  assert image.get_array().shape[0] <= heatmap.MOST_LINES + 14


def test_the_page_of_stacks_says_layers_by_name(tmp_path):
  run = run_of_stacks(["blocks/v", "blocks/w"], 24)
  run.vectors["grad/norm"][1][5, [4, 28]] = np.inf
  page = clipjax.runs.write_report(run, tmp_path / "report.html").read_text()
  text = page.replace("<wbr>", "").replace("<code>", "").replace("</code>", "")
  assert "2 layers were nonfinite at some step: layer 3 of all 2 stacks." in page.replace("&#x27;", "'")
  assert "One row for each of 50 layers" in page
  assert "<tr><td>blocks/v[1]</td>" in text[text.index("Step <strong>31</strong>") : text.index("Suggested threshold")]
  table = text[text.index("All layers") : text.index("Verdict: ")]
  medians = [f"{np.median(j * 0.9 ** np.arange(24)):.3g}" for j in (1, 2)]
  for name, median, largest, wrong in (
    ("embed", "0.5", "0.5", 0),
    ("blocks/v[0..23]", medians[0], "1000 in [1]", 1),
    ("blocks/w[0..23]", medians[1], "2 in [0]", 1),
    ("blocks/w[9]", f"{2 * 0.9**9:.3g}", f"{2 * 0.9**9:.3g}", 0),
  ):
    row = table[table.index(f"<td>{name}</td>") :].partition("</tr>")[0]
    cells = [part.partition("<")[0] for part in row.split('">')[1:]]
    assert cells == [median, largest, str(wrong), "0.001"]
  assert table.count("<tr>") == 3 + 4 + 48  # Heads, then whole leaves and stacks, then layers.
  assert "24 layers of blocks/w</summary>" in table


def test_many_layers_share_rows_of_the_map_and_the_caption_says_so():
  run = run_of_stacks([f"b/{i}" for i in range(12)], 200)
  (section,) = report_sections._layers(shown_of(run, HealthReport((), "", len(run), 0)), "grad")
  assert "2,402 layers, the first on top; in a stack, each row shows the largest of 7 neighbours. " in section
  run.leaves["grad"] = tuple(f"w{i}" for i in range(2402))  # Without a stack each has a row of its own.
  (section,) = report_sections._layers(shown_of(run, HealthReport((), "", len(run), 0)), "grad")
  assert "One row for each of 2,402 layers, the first on top. " in section
