"""The detectors of spikes, against the rule written out, fed in parts and taken back; events; the course of a loss."""

import itertools

import numpy as np
import pytest
from synthetic import run_of

import clipjax
from clipjax.runs.course import course_of
from clipjax.runs.health.detectors import Kind, SpikeDetector
from clipjax.runs.health.leaf_spikes import LeafDetector
from clipjax.runs.health.series import KINDS
from clipjax.runs.roles import Role

Limits = clipjax.runs.HealthLimits
NORMS = np.exp(np.random.default_rng(0).normal(0, 0.4, 1000))
NORMS[[17, 40, 300, 301, 302, 700]] = [1e7, 110, 40, 60, 50, 30]


def spikes_by_hand(values, sigma, window, kind):
  """The rule, value by value: (whether each is a spike, the median before it)."""
  spikes, usual = [], []
  for i, x in enumerate(values):
    end = i // 8 * 8 if i // 8 * 8 >= window else i
    before = values[max(end - window, 0) : end]
    spikes.append(False)
    usual.append(np.nan)
    if len(before) < 8:
      continue
    usual[i] = np.median(before)
    y = np.log(before) if min(before) > 0 else before
    limit = np.median(y) + sigma * 1.4826 * np.median(np.abs(y - np.median(y)))
    limit = min(np.exp(limit), 30 * np.median(before)) if min(before) > 0 else limit
    ratio = kind.ratio if len(before) >= window / 4 else kind.ratio**2
    floor = (ratio - 1) * abs(usual[i]) + kind.share * np.median(np.abs(values[:8]))
    just = max(values[max(i - 4, 0) : i])
    jumps = spikes[i - 1] or x - just > (kind.jump - 1) * abs(just)
    spikes[i] = bool(floor > 0 and x > max(limit, usual[i] + floor) and jumps)
  return np.array(spikes), np.array(usual)


@pytest.mark.parametrize("role", [Role.NORM, Role.LOSS, Role.PARAMETERS])
@pytest.mark.parametrize("window", [8, 12, 64, 128])
@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_spike_is_what_the_rule_says(role, window, shift):
  values = NORMS + shift
  judged = SpikeDetector(6.0, window, KINDS[role]).feed(values)
  spikes, usual = spikes_by_hand(values, 6.0, window, KINDS[role])
  assert judged.is_spike.tolist() == spikes.tolist() and spikes.sum() >= 4
  np.testing.assert_allclose(judged.usual, usual)


@pytest.mark.parametrize("parts", [[1] * 1000, [50] * 20, [3, 200, 797]])
def test_a_detector_fed_in_parts_says_what_it_says_of_all(parts):
  whole = SpikeDetector(6.0, 64, KINDS[Role.NORM]).feed(NORMS)
  detector, ends = SpikeDetector(6.0, 64, KINDS[Role.NORM]), np.cumsum([0, *parts])
  got = [detector.feed(NORMS[a:b]) for a, b in itertools.pairwise(ends)]
  assert np.concatenate([judged.is_spike for judged in got]).tolist() == whole.is_spike.tolist()
  np.testing.assert_array_equal(np.concatenate([judged.usual for judged in got]), whole.usual)


def test_a_detector_forgets_what_a_run_went_back_before():
  detector, other = (SpikeDetector(6.0, 64, KINDS[Role.NORM]) for _ in range(2))
  detector.feed(NORMS[:300])
  detector.feed(np.full(40, 1e6))
  detector.forget(40)
  other.feed(NORMS[:300])
  again, once = detector.feed(NORMS[300:]), other.feed(NORMS[300:])
  assert again.is_spike.tolist() == once.is_spike.tolist() and once.is_spike[:3].all()
  np.testing.assert_array_equal(again.usual[40:], once.usual[40:])


@pytest.mark.parametrize("value", [0.0, 1e-300, 1.0, 1e300])
def test_equal_values_and_what_rounding_makes_of_them_are_no_spikes(value):
  values = np.full(500, value)
  values[400] *= 1 + 1e-7
  assert not SpikeDetector(6.0, 64, KINDS[Role.NORM]).feed(values).is_spike.any()


def test_a_level_that_rises_bit_by_bit_is_no_spike_and_one_that_jumps_is():
  ramp = np.concatenate([np.ones(100), 1.3 ** np.arange(30)])
  assert not SpikeDetector(6.0, 64, Kind(3, 2)).feed(ramp).is_spike.any()
  step = np.concatenate([np.ones(100), np.full(100, 50.0)])
  spikes = np.flatnonzero(SpikeDetector(6.0, 64, Kind(3, 2)).feed(step).is_spike)
  assert spikes[0] == 100 and spikes[-1] < 140  # Then it is the usual level.


def test_thirty_times_the_median_is_a_spike_among_values_that_vary():
  values = np.exp(np.random.default_rng(3).normal(0, 1.5, 300))
  values[200] = 40 * np.median(values[128:192])
  assert values[200] < np.exp(6 * 1.5)
  assert 200 in np.flatnonzero(SpikeDetector(6.0, 64, KINDS[Role.NORM]).feed(values).is_spike)


def test_an_infinite_sigma_switches_spikes_off():
  assert not SpikeDetector(np.inf, 64, KINDS[Role.NORM]).feed(NORMS).is_spike.any()
  assert not LeafDetector(Limits(spike_sigma=np.inf)).feed(NORMS[:, None])[0].any()


def test_a_small_loss_may_triple():
  loss = np.full(200, 1e-3)
  loss[:8], loss[150] = 2.0, 3e-3
  assert not SpikeDetector(6.0, 64, KINDS[Role.LOSS]).feed(loss).is_spike.any()
  loss[150] = 1.0
  assert np.flatnonzero(SpikeDetector(6.0, 64, KINDS[Role.LOSS]).feed(loss).is_spike).tolist() == [150]


def test_leaves_have_spikes_of_their_own():
  rng = np.random.default_rng(0)
  norms = np.exp(rng.normal(0, 0.3, (200, 3))) * [1.0, 1e-6, 0.0]
  norms[150, 1], norms[160] = 1e-4, np.nan
  spikes, usual = LeafDetector(Limits()).feed(norms)
  assert np.argwhere(spikes).tolist() == [[150, 1]]
  np.testing.assert_allclose(usual[150, 1], np.median(norms[128 - 64 : 128, 1]), rtol=1e-3)
  for parts in ([1] * 200, [7] * 28 + [4], [100, 100]):
    detector, ends = LeafDetector(Limits()), np.cumsum([0, *parts])
    got = [detector.feed(norms[a:b]) for a, b in itertools.pairwise(ends)]
    np.testing.assert_array_equal(np.concatenate([spikes for spikes, _ in got]), spikes)
    np.testing.assert_array_equal(np.concatenate([medians for _, medians in got]), usual)


# Events -------------------------------------------------------------------------------------------------------------


def event_of(columns=("loss", "grad/norm", "update/norm"), **changes):
  """The one event of a run of 400 calm rows; a change is a column and its values by row."""
  rng = np.random.default_rng(1)
  columns = {key: np.exp(rng.normal(0, 0.05, 400)) for key in columns}
  for key, values in changes.items():
    for row, value in values.items():
      columns.setdefault(key, np.ones(400))[row] = value
  run = run_of(columns)
  (event,) = clipjax.runs.diagnose(run).events
  return event


def test_spikes_at_one_time_are_one_event_that_says_what_moved_first():
  event = event_of(**{"loss": {202: 9.0, 203: 8.0}, "grad/norm": {201: 30.0}, "update/norm": {200: 50.0}})
  assert (event.start, event.end) == (201, 204)
  assert [(move.key, move.step, move.peak) for move in event.moves] == [
    ("update/norm", 201, 50.0), ("grad/norm", 202, 30.0), ("loss", 203, 9.0)
  ]  # fmt: skip
  assert event.moves[0].usual == pytest.approx(1, abs=0.05)
  assert event.is_recovered and not event.is_caught


def test_an_event_is_recovered_where_the_loss_comes_back():
  up = dict.fromkeys(range(201, 400), 4.0)
  assert event_of(**{"loss": up, "grad/norm": {200: 30.0}}).is_recovered is False
  assert event_of(**{"loss": dict.fromkeys(range(201, 260), 4.0), "grad/norm": {200: 30.0}}).is_recovered


def test_an_event_is_caught_where_neither_the_clipped_norm_nor_the_update_moved():
  ones = {**dict.fromkeys(range(400), 1.0), 200: 0.03}
  clip = {"grad/norm": {200: 40.0}, "grad/max_norm": {0: 1.0}, "grad/scale": ones}
  assert event_of(**clip, **{"grad/norm_clipped": {200: 1.2}}).is_caught
  assert not event_of(**clip, **{"grad/norm_clipped": {200: 1.2}, "loss": {201: 9.0}}).is_caught
  assert event_of(("grad/norm",), **clip, **{"grad/norm_clipped": {200: 1.2}}).is_caught
  assert not event_of(("grad/norm",), **clip, **{"grad/norm_clipped": {200: 30.0}}).is_caught
  assert not event_of(**clip, **{"grad/norm_clipped": {200: 1.2}, "update/norm": {200: 9.0}}).is_caught


# The course of a loss -----------------------------------------------------------------------------------------------


def test_the_course_of_a_loss():
  rng = np.random.default_rng(2)
  loss = np.concatenate([np.linspace(3, 1, 200), np.full(100, 1.0), np.full(100, 2.5)]) * np.exp(
    rng.normal(0, 0.02, 400)
  )
  course = course_of(np.arange(400) + 1000, loss)
  assert (course.first, course.best, course.last) == (
    pytest.approx(3, rel=0.05), pytest.approx(1, rel=0.03), pytest.approx(2.5, rel=0.02)
  )  # fmt: skip
  assert course.noise == pytest.approx(0.02, rel=0.3)
  assert course.left == 1300
  assert course_of(np.arange(7), np.ones(7)) is None
  assert course_of(np.arange(400), np.linspace(3, 1, 400)).left is None
