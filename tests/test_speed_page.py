"""The speed benchmark: its timing on fake clocks, and its page against its numbers."""

import copy
import json
import pathlib
import sys

import jax
import pytest
import speed
import speed_page
import speed_picture
import speed_targets
import timing

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  """The page of a quick run of two sections, one after the other, and its numbers."""
  out = tmp_path_factory.mktemp("speed") / "speed.md"
  command = ["speed.py", "--quick", "--peers", "jax", "--out", str(out), "--only"]
  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for section in ("norm", "eager"):
      patch.setattr(sys, "argv", [*command, section])
      speed.main()
  return out, json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def fake(seconds):
  """Work that takes the given seconds, call by call, and its clock."""
  now, left = [0.0], list(seconds)

  def run():
    now[0] += left.pop(0)

  return run, lambda: now[0]


def test_times_come_from_the_clock():
  run, clock = fake([100, 1, 5, 2, 4])
  take = timing.turn_of(run, clock=clock)
  assert [take() for _ in range(5)] == [100, 1, 5, 2, 4]
  run, clock = fake([100, 1, 3, 100, 5, 7])
  take = timing.turn_of(run, repeats=2, warm=True, clock=clock)
  assert [take(), take()] == [2, 6]


def test_preparation_is_not_timed():
  run, clock = fake([100, 1])
  assert timing.turn_of(run, prepare=run, clock=clock)() == 1


def test_rounds_leave_the_warm_up_out_and_mix_the_order():
  order, values = [], {name: iter([*[100.0] * timing.WARM_UP, *range(20)]) for name in "ab"}

  def turn(name):
    def take():
      order.append(name)
      return float(next(values[name]))

    return take

  times = timing.interleave({name: turn(name) for name in "ab"}, 20)
  assert times == {name: list(map(float, range(20))) for name in "ab"}
  pairs = {tuple(order[i : i + 2]) for i in range(0, len(order), 2)}
  assert pairs == {("a", "b"), ("b", "a")}


def test_summary_compares_within_a_round():
  # The machine slows down by 10, and once in the midst of a round: the difference of the medians is 1.5.
  times = {"base": [1.0, 2.0, 11.0, 12.0, 13.0], "more": [1.5, 12.5, 11.5, 12.5, 13.5]}
  found = timing.summary(times, "base")
  assert found["more"] == {"median": 12.5, "min": 1.5, "added": 0.5, "added_min": 0.5}
  assert found["base"]["added"] == 0
  assert timing.summary({"a": [3.0, 1.0, 2.0]}) == {"a": {"median": 2.0, "min": 1.0}}


@pytest.mark.speed
def test_the_page_of_a_quick_run(quick):
  out, data = quick
  text = out.read_text(encoding="utf-8")
  assert text == speed_page.render(data)
  assert list(data["sections"]) == ["norm", "eager"]
  assert "A quick run" in text
  assert not out.with_suffix(".png").exists()  # Only the section "growth" has one.
  for line in text.splitlines():
    assert "nan" not in line.split()
  tables = [block for block in text.split("\n\n") if block.startswith("|")]
  assert tables
  for block in tables:
    assert len({line.count("|") for line in block.splitlines()}) == 1, block


@pytest.mark.speed
def test_verdicts_follow_the_numbers(quick):
  data = copy.deepcopy(quick[1])
  variants = speed_targets.find(data, "norm", "leaf")["variants"]
  for factor, holds in ((1.04, True), (1.06, False)):
    variants["clipjax"]["median"] = factor * variants["plain"]["median"]
    row = next(t for t in speed_targets.targets(data) if t.what.startswith("norm, speed relative to the plainest"))
    assert row.holds is holds
    assert f"{1 / factor:.2f} " in row.measured
  unmeasured = [t for t in speed_targets.targets(data) if t.section == "compile"]
  assert {(t.measured, t.holds) for t in unmeasured} == {("not measured", None)}


def test_a_time_lost_in_noise_has_no_ratio_and_no_point():
  variants = {"Optax": {"added": -1e-6}, "clipjax": {"added": 1e-6}}
  assert speed_targets.added_ratio(variants, "clipjax") is None
  variants |= {"jnp.sum": {"median": 1e-3}}
  case = {"key": "parameters", "parameters": 10, "leaves": 1, "variants": variants}
  figure = speed_picture.picture({"cases": [case, {**case, "key": "leaves"}]})
  lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
  assert lines["added to Adam, Optax"] == []
  assert lines["added to Adam, clipjax"] == [pytest.approx(1e-3)]


@pytest.mark.skipif(not (ROOT / "docs/speed.json").exists(), reason="the benchmark has not been run")
def test_the_page_in_docs_matches_its_numbers():
  data = json.loads((ROOT / "docs/speed.json").read_text(encoding="utf-8"))
  assert (ROOT / "docs/speed.md").read_text(encoding="utf-8") == speed_page.render(data)
  assert not any(section["quick"] for section in data["sections"].values())
