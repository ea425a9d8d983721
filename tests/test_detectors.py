"""The detectors of spikes, against the rule written out, fed in parts and taken back; events; the course of a loss."""

import itertools

import numpy as np
import pytest
from synthetic import run_of

import clipjax
from clipjax.runs.course import course_of
from clipjax.runs.health.leaf_spikes import LeafDetector
from clipjax.runs.health.series import KINDS
from clipjax.runs.health.spike_detectors import Kind, SpikeDetector
from clipjax.runs.roles import Role

Limits = clipjax.runs.HealthLimits
NORMS = np.exp(np.random.default_rng(0).normal(0, 0.4, 1000))
NORMS[[17, 40, 50, 300, 301, 302, 700]] = [1e7, 110, 15, 40, 60, 50, 30]


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


def in_parts(detector, values, parts):
  """What a detector says of the values, fed in parts: spikes, and medians."""
  got = [detector.feed(values[a:b]) for a, b in itertools.pairwise(np.cumsum([0, *parts]))]
  return [np.concatenate(part) for part in zip(*got, strict=True)]


@pytest.mark.parametrize("parts", [[1] * 1000, [50] * 20, [3, 200, 797]])
def test_a_detector_fed_in_parts_says_what_it_says_of_all(parts):
  whole = SpikeDetector(6.0, 64, KINDS[Role.NORM]).feed(NORMS)
  for got, want in zip(in_parts(SpikeDetector(6.0, 64, KINDS[Role.NORM]), NORMS, parts), whole, strict=True):
    np.testing.assert_array_equal(got, want)


def test_a_detector_forgets_what_a_run_went_back_before():
  detector, other = (SpikeDetector(6.0, 64, KINDS[Role.NORM]) for _ in range(2))
  detector.feed(NORMS[:300])
  detector.feed(np.full(40, 1e6))
  detector.forget(40)
  other.feed(NORMS[:300])
  again, once = detector.feed(NORMS[300:]), other.feed(NORMS[300:])
  assert again.is_spike.tolist() == once.is_spike.tolist() and once.is_spike[:3].all()
  np.testing.assert_array_equal(again.usual[40:], once.usual[40:])


VARIED = np.exp(np.random.default_rng(3).normal(0, 1.5, 300))
LARGE = 40 * np.median(VARIED[128:192])
SMALL = np.where(np.arange(200) < 8, 2.0, 1e-3)


def put(values, place, value):
  return np.where(np.arange(len(values)) == place, value, values)


@pytest.mark.parametrize(
  ("values", "kind", "want"),
  [
    *((put(np.full(500, x), 400, x * (1 + 1e-7)), Kind(5, 2), []) for x in (0.0, 1e-300, 1.0, 1e300)),
    (np.r_[np.ones(100), 1.3 ** np.arange(30)], Kind(3, 2), []),  # A level that rises bit by bit.
    (np.r_[np.ones(100), np.full(100, 50.0)], Kind(3, 2), [*range(100, 136)]),  # Then it is the usual level.
    # 200 is below exp(6 * 1.5), but thirty times the median.
    (put(VARIED, 200, LARGE), KINDS[Role.NORM], [9, 109, 142, 200, 247, 252]),
    (put(SMALL, 150, 3e-3), KINDS[Role.LOSS], []),  # A small loss may triple.
    (put(SMALL, 150, 1.0), KINDS[Role.LOSS], [150]),
  ],
)
def test_which_values_are_spikes(values, kind, want):
  assert np.flatnonzero(SpikeDetector(6.0, 64, kind).feed(values).is_spike).tolist() == want


def test_an_infinite_sigma_switches_spikes_off():
  assert not SpikeDetector(np.inf, 64, KINDS[Role.NORM]).feed(NORMS).is_spike.any()
  assert not LeafDetector(Limits(spike_sigma=np.inf)).feed(NORMS[:, None])[0].any()


def test_leaves_have_spikes_of_their_own():
  rng = np.random.default_rng(0)
  norms = np.exp(rng.normal(0, 0.3, (200, 3))) * [1.0, 1e-6, 0.0]
  norms[150, 1], norms[160] = 1e-4, np.nan
  spikes, usual = LeafDetector(Limits()).feed(norms)
  assert np.argwhere(spikes).tolist() == [[150, 1]]
  np.testing.assert_allclose(usual[150, 1], np.median(norms[128 - 64 : 128, 1]), rtol=1e-3)
  for parts in ([1] * 200, [7] * 28 + [4], [100, 100]):
    for got, want in zip(in_parts(LeafDetector(Limits()), norms, parts), (spikes, usual), strict=True):
      np.testing.assert_array_equal(got, want)


# Events -------------------------------------------------------------------------------------------------------------


def event_of(columns=("loss", "grad/norm", "update/norm"), **changes):
  """The one event of a run of 400 calm rows; a change is a column and its values by row."""
  rng = np.random.default_rng(1)
  columns = {key: np.exp(rng.normal(0, 0.05, 400)) for key in columns}
  for key, values in changes.items():
    for row, value in values.items():
      columns.setdefault(key, np.ones(400))[row] = value
  (event,) = clipjax.runs.diagnose(run_of(columns)).events
  return event


def test_spikes_at_one_time_are_one_event_that_says_what_moved_first():
  event = event_of(**{"loss": {202: 9.0, 203: 8.0}, "grad/norm": {201: 30.0}, "update/norm": {200: 50.0}})
  assert (event.start, event.end) == (201, 204)
  moves = [("update/norm", 201, 50.0), ("grad/norm", 202, 30.0), ("loss", 203, 9.0)]
  assert [(move.key, move.step, move.peak) for move in event.moves] == moves
  assert event.moves[0].usual == pytest.approx(1, abs=0.05)
  assert event.is_recovered and not event.is_caught


@pytest.mark.parametrize(("end", "is_recovered"), [(400, False), (260, True)])
def test_an_event_is_recovered_where_the_loss_comes_back(end, is_recovered):
  event = event_of(**{"loss": dict.fromkeys(range(201, end), 4.0), "grad/norm": {200: 30.0}})
  assert event.is_recovered is is_recovered


ALL = ("loss", "grad/norm", "update/norm")


@pytest.mark.parametrize(
  ("columns", "after", "other", "is_caught"),
  [
    (ALL, 1.2, {}, True),
    (ALL, 1.2, {"loss": {201: 9.0}}, False),
    (ALL, 1.2, {"update/norm": {200: 9.0}}, False),
    (("grad/norm",), 1.2, {}, True),
    (("grad/norm",), 30.0, {}, False),
  ],
)
def test_an_event_is_caught_where_neither_the_clipped_norm_nor_the_update_moved(columns, after, other, is_caught):
  scale = {**dict.fromkeys(range(400), 1.0), 200: 0.03}
  clip = {"grad/norm": {200: 40.0}, "grad/max_norm": {0: 1.0}, "grad/scale": scale, "grad/norm_clipped": {200: after}}
  assert event_of(columns, **clip, **other).is_caught == is_caught


@pytest.mark.parametrize(
  ("moved", "is_rejected", "is_caught"),
  [
    ({"loss": {200: 9.0}}, True, True),
    ({"loss": {200: 9.0}}, False, False),
    ({"loss": {200: 9.0}, "grad/norm": {200: 40.0}}, True, True),
    ({"loss": {200: 9.0, 201: 9.0}}, True, False),  # The second step was not rejected.
  ],
)
def test_an_event_of_rejected_steps_is_caught_whatever_moved(moved, is_rejected, is_caught):
  consecutive = {**dict.fromkeys(range(400), 0.0), 200: float(is_rejected)}
  assert event_of(**moved, **{"skip/consecutive": consecutive}).is_caught == is_caught


# The course of a loss -----------------------------------------------------------------------------------------------


def test_the_course_of_a_loss():
  noise = np.exp(np.random.default_rng(2).normal(0, 0.02, 400))
  loss = np.r_[np.linspace(3, 1, 200), np.full(100, 1.0), np.full(100, 2.5)] * noise
  course = course_of(np.arange(400) + 1000, loss)
  assert (course.first, course.best, course.last) == pytest.approx((3, 1, 2.5), rel=0.05)
  assert course.noise == pytest.approx(0.02, rel=0.3) and course.left == 1300
  assert course_of(np.arange(7), np.ones(7)) is None
  assert course_of(np.arange(400), np.linspace(3, 1, 400)).left is None
