"""What the verdict and the advice say of `clip_effect`: starved leaves, longer steps, a clip that does nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax.runs import HealthLimits, Run, diagnose, read_run, suggest_max_norm

pytestmark = pytest.mark.usefixtures("standard_promotion")

LEAVES = ("even", "heavy")
STEPS = 300


def gradients(*, tail=0.0, spread=0.0, **factors):
  """Gradients by step; `tail` is the sigma of a lognormal factor of one leaf, `spread` that of a factor of all.

  Others are a factor by step of the leaf of that name.
  """
  rng = np.random.default_rng(0)
  each = {name: rng.standard_normal((STEPS, 8)) for name in LEAVES}
  each["heavy"] *= np.exp(tail * np.abs(rng.standard_normal((STEPS, 1))))
  factor = np.exp(spread * rng.standard_normal((STEPS, 1)))
  return {name: jnp.float32(0.5 * x * factor * np.reshape(factors.get(name, 1.0), (-1, 1))) for name, x in each.items()}


def trained(clip, optimizer, grads, **options):
  """The run of a clip and an optimizer at these gradients, every number of it at every step."""
  tx = clipjax.clip_effect(clip, optimizer, **options)
  params = {name: jnp.ones(x.shape[1:]) for name, x in grads.items()}

  def step(state, grad):
    _, state = tx.update(grad, state, params)
    return state, clipjax.metrics(state, per_leaf=True)

  _, arrays = jax.lax.scan(step, tx.init(params), grads)
  return Run.from_arrays(arrays)


def found(run, **limits):
  """The findings of clips in a run, by name."""
  report = diagnose(run, limits=HealthLimits(**limits) if limits else None)
  return {finding.name: finding for finding in report if finding.name.startswith("clip-")}


def median_norm(grads):
  return float(np.median(np.sqrt(sum((np.asarray(x) ** 2).sum(1) for x in grads.values()))))


def sign(rate):
  """An optimizer that keeps no state by which it could be known."""
  return optax.stateless(lambda updates, params: jax.tree.map(lambda u: -rate * jnp.sign(u), updates))


CALM, TAIL, WILD, UNEVEN = gradients(), gradients(tail=4.0), gradients(spread=1.5), gradients(spread=0.6)
NUMBERS = np.arange(STEPS)
# The other leaf has a step of its own, and its second moment with it, at one step in twenty.
RARE = gradients(heavy=np.where(NUMBERS % 20 == 0, 1.0, 300.0)) | {"even": jnp.full((STEPS, 8), 0.5)}
STEADY = {name: jnp.asarray(np.tile(np.linspace(1.0, 2.0, 8), (STEPS, 1)), jnp.float32) for name in LEAVES}
STACK = {"w": jnp.float32(0.5 * np.random.default_rng(0).standard_normal((STEPS, 3, 8)))}
STACK["w"] *= jnp.float32(np.exp(3 * np.abs(np.random.default_rng(2).standard_normal((STEPS, 3, 1))) * [[0], [1], [0]]))
ONE_LEAF = clipjax.clip_by_group_norm({"even": 1.5, "heavy": None}, lambda path, leaf: path)
glob, sgd, adam = clipjax.clip_by_global_norm, optax.sgd(0.1), optax.adam(0.1)
STARVES = "The clip in 'effect' starves 'even': 'even' keeps .*'heavy' triggers the clip, which leaves "
QUIET = ("INFO", (), "")
KEPT = "kept the length of the step \\(clip_effect: median ratio 1, cosine 1\\)"

# Clip, optimizer, gradients; options; the findings of clips, with level, leaves and a pattern; what the advice says.
CASES = {
  "a heavy tail starves the other leaf": (
    (glob(2.5), sgd, TAIL), {}, {"clip-starves": ("WARN", LEAVES, STARVES + "29% .* would leave 100% without"),
                                 "clip-shortens": QUIET},
    "One leaf, 'heavy', triggered the clip of this run, and 'even' kept "),
  "a clip of Optax, by another name": (
    (optax.clip_by_global_norm(2.5), sgd, TAIL), {"name": "step"},
    {"clip-starves": ("WARN", LEAVES, "The clip in 'step' starves 'even'"), "clip-shortens": QUIET}, None),
  "so it does under Adam": (
    (glob(2.5), adam, RARE), {},
    {"clip-starves": ("WARN", LEAVES, STARVES), "clip-turns": QUIET}, "One leaf, "),
  "a clip by leaf starves nobody": (
    (clipjax.clip_by_leaf_norm(2.5), sgd, TAIL), {}, {"clip-shortens": QUIET}, "shortened the step"),
  "a clip below every norm is no fault of one leaf": (
    (glob(0.01), sgd, TAIL), {}, {"clip-shortens": QUIET}, ""),
  "one bad batch starves nobody": (
    (glob(10.0), sgd, gradients(heavy=np.where(NUMBERS == 200, 1e4, 1.0))), {}, {"clip-no-effect": QUIET}, ""),
  "a longer step of Adam": (
    (glob(median_norm(WILD)), adam, WILD), {},
    {"clip-lengthens": ("WARN", ("heavy",), r"the step 1.43 times as long \(median\), and 1.56 times .* in 'heavy'")},
    r"made the step 1\.\d+ times as long \(clip_effect: "),
  "a step that is a little longer": (
    (glob(median_norm(UNEVEN)), adam, UNEVEN), {},
    {"clip-lengthens": ("INFO", (), "The clip in 'effect' lengthens the step to 1")}, "made the step "),
  "a clip that does nothing": (
    (glob(50.0), adam, CALM), {},
    {"clip-no-effect": ("INFO", (), r"barely affects the step \(median ratio 1, cosine 1\): the length changes by "
                                    "more than 5% in 0% of the steps.")}, KEPT),
  "a clip that Adam undoes": ((ONE_LEAF, adam, STEADY), {}, {"clip-no-effect": QUIET}, ""),
  "a shorter step": (
    (glob(0.5 * median_norm(CALM)), sgd, CALM), {}, {"clip-shortens": ("INFO", (), "the step to 50% of its length")},
    r"shortened the step to 5[\d.]*% of its length \(clip_effect: "),
  "a step that is turned": (
    (clipjax.clip_by_value(0.01), sgd, CALM), {},
    {"clip-turns": ("INFO", (), r"changes the direction of the step \(median ratio ")}, ""),
  "stacked layers are leaves": (
    (glob(3.0), sgd, STACK), {"stacked": 0},
    {"clip-starves": ("WARN", ("w[2]", "w[0]", "w[1]"), ""), "clip-shortens": QUIET}, None),
  "nothing is finite": ((glob(1.0), sgd, jax.tree.map(lambda x: x * jnp.nan, CALM)), {}, {}, None),
  "few steps": ((glob(1.0), sgd, jax.tree.map(lambda x: x[:15], CALM)), {}, {}, "^(?!.*clip_effect)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_clip_has_the_finding_and_the_advice_of_what_it_did(name):
  args, options, want, advice = CASES[name]
  run = trained(*args, **options)
  got = found(run)
  assert {key: finding.level for key, finding in got.items()} == {key: level for key, (level, *_) in want.items()}
  for key, (level, leaves, pattern) in want.items():
    assert re.search(pattern, got[key].message) and leaves in (None, got[key].leaves), got[key]
    # One cause, one advice.
    assert bool(got[key].advice) == (level == "WARN" or ("clip-starves" not in want and key != "clip-lengthens"))
  if advice is not None:
    assert re.search(advice, " ".join(suggest_max_norm(run).notes))


def test_leaves_that_were_seldom_recorded_where_the_clip_acts():
  """Six steps in ten are clipped hard, and one in ten of the rows with leaves is of such a step."""
  hard = NUMBERS % 10 < 6
  whole = trained(glob(10.0), sgd, gradients(heavy=np.where(hard, 1e3, 1.0)))
  kept = ~hard | (NUMBERS % 50 == 0)
  vectors = {key: (steps[kept], values[kept]) for key, (steps, values) in whole.vectors.items()}
  finding = found(Run(**{**vars(whole), "vectors": vectors}))["clip-starves"]
  assert finding.leaves == LEAVES and re.search(r"'even' keeps 4[01](\.\d)?% of its step", finding.message)


def test_the_same_of_a_recorded_file(tmp_path):
  tx = clipjax.clip_effect(glob(2.5), sgd)
  params = {name: jnp.ones(8) for name in LEAVES}
  state, update = tx.init(params), jax.jit(tx.update)
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", every=10) as recorder:
    for i in range(STEPS):
      _, state = update(jax.tree.map(lambda x, i=i: x[i], TAIL), state, params)
      recorder.push(i, state)
  assert found(read_run(tmp_path / "run.jsonl"))["clip-starves"].leaves == LEAVES


def test_an_effect_called_update_is_no_size_of_updates():
  run = trained(glob(50.0), sgd, CALM, name="update_effect")
  assert [finding.name for finding in diagnose(run) if finding.name.startswith("update")] == []


@pytest.mark.parametrize(
  ("max_norm", "optimizer", "is_free"),
  [(0.2, sign(0.1), True), (0.2, sgd, False), (0.2, optax.sgd(0.1, momentum=0.9), False), (9.0, sign(0.1), False)],
  ids=["signs", "SGD", "momentum", "signs under a clip that hardly acts"],
)
def test_what_was_measured_tells_that_scale_does_not_count(max_norm, optimizer, is_free):
  run = trained(glob(max_norm), optimizer, CALM)
  advice = suggest_max_norm(run)
  assert advice.scale_free == is_free
  assert ("clip_effect measured that steps keep their length" in " ".join(advice.notes)) == is_free
  assert suggest_max_norm(run, scale_free=False).scale_free is False


# Where findings begin ------------------------------------------------------------------------------------------------


def made(grad_ratio, ratio, share, names=("a", "b")):
  """A run of 40 steps with one effect: how much the clip leaves, and the ratios and shares of the leaves."""
  steps, ones = np.arange(1, 41), np.ones(40)
  columns = {"effect/ratio": ratio[0] * ones, "effect/cosine": ones, "effect/grad_ratio": grad_ratio * ones}
  by_leaf = {"ratio": ratio, "share": share}
  vectors = {f"effect/{key}": (steps, ones[:, None] * np.array(values)) for key, values in by_leaf.items()}
  return Run("", steps, columns, {}, {"effect": names}, vectors, None, None)


@pytest.mark.parametrize(
  ("grad_ratio", "kept", "share", "is_starved"),
  [
    (0.3, 0.3, 0.99, True),  # Without the other leaf nothing would be clipped.
    (0.3, 0.5, 0.99, False),  # It keeps half.
    (0.3, 0.49, 0.99, True),
    (0.3, 0.3, 0.7, False),  # 0.55 without the other leaf, less than twice 0.3.
    (0.3, 0.3, 0.76, True),  # 0.61.
    (0.04, 0.04, 0.99, False),  # 0.4 without it: a clip that is too low for all leaves.
    (0.06, 0.06, 0.99, True),
  ],
)
def test_what_a_leaf_keeps_and_what_it_would_keep(grad_ratio, kept, share, is_starved):
  assert ("clip-starves" in found(made(grad_ratio, (kept, 1.0), (1 - share, share)))) == is_starved


def test_the_second_of_two_effects_is_judged_too():
  one, two = made(0.3, (1.4, 1.4), (0.5, 0.5)), made(1.0, (1.0, 1.0), (0.5, 0.5))
  columns = one.columns | {key.replace("effect", "second"): column for key, column in two.columns.items()}
  both = Run(**{**vars(one), "columns": columns})
  names = [(f.name, f.message.split("'")[1]) for f in diagnose(both) if f.name.startswith("clip-")]
  assert names == [("clip-lengthens", "effect"), ("clip-no-effect", "second")]


@pytest.mark.parametrize(("rows", "is_told"), [(19, False), (20, True)])
def test_how_many_steps_tell_that_scale_does_not_count(rows, is_told):
  run = made(np.where(np.arange(40) < rows, 0.2, 1.0), (1.0, 1.0), (0.5, 0.5))
  columns = run.columns | {"grad/norm": np.linspace(1, 2, 40)}
  assert suggest_max_norm(Run(**{**vars(run), "columns": columns})).scale_free == is_told


def test_the_leaf_that_keeps_least_is_named_first():
  finding = found(made(0.3, (0.4, 0.2, 1.0), (0.005, 0.005, 0.99), ("a", "b", "c")))["clip-starves"]
  assert finding.leaves == ("b", "a", "c") and "'b' keeps 20% of its step" in finding.message
