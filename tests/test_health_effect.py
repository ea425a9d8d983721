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


def gradients(*, tail=0.0, spread=0.0, seed=0):
  """Gradients by step; `tail` is the sigma of a lognormal factor of one leaf, `spread` that of a factor of all."""
  rng = np.random.default_rng(seed)
  each = {name: rng.standard_normal((STEPS, 8)) for name in LEAVES}
  each["heavy"] *= np.exp(tail * np.abs(rng.standard_normal((STEPS, 1))))
  factor = np.exp(spread * rng.standard_normal((STEPS, 1)))
  return {name: jnp.float32(0.5 * x * factor) for name, x in each.items()}


def trained(clip, optimizer, grads, **options):
  """The run of a clip and an optimizer at these gradients, every number of it at every step."""
  tx = clipjax.clip_effect(clip, optimizer, **options)
  params = {name: jnp.ones(8) for name in LEAVES}

  def step(state, grad):
    _, state = tx.update(grad, state, params)
    return state, clipjax.metrics(state, per_leaf=True)

  _, arrays = jax.lax.scan(step, tx.init(params), grads)
  return Run.from_arrays(arrays)


def found(run, **limits):
  """The findings of clips in a run, by name."""
  report = diagnose(run, limits=HealthLimits(**limits) if limits else None)
  return {finding.name: finding for finding in report if finding.name.startswith("clip-")}


def norms(grads):
  return np.sqrt(sum((np.asarray(x) ** 2).sum(1) for x in grads.values()))


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_leaf_with_a_heavy_tail_starves_the_other(optimizer):
  grads = gradients(tail=4.0)
  finding = found(trained(clipjax.clip_by_global_norm(2.5), optimizer, grads))["clip-starves"]
  assert (finding.level, finding.leaves) == ("WARN", LEAVES)
  assert finding.message.startswith("The clip of 'effect' starves 'even': 'even' keeps ")
  assert re.search(r"'heavy' makes the clip act: it leaves 29% .* would leave 100%", finding.message)
  assert "clip_by_leaf_norm" in finding.advice
  others = found(trained(clipjax.clip_by_global_norm(2.5), optimizer, grads))
  assert {f.advice for f in others.values() if f.level == "INFO"} == {""}  # One cause, one advice.


def test_so_it_does_under_adam():
  grads = gradients()
  rare = np.arange(STEPS) % 20 == 0  # The other leaf has a step of its own, and its second moment with it, at these.
  grads["even"] = jnp.ones((STEPS, 8)) * 0.5
  grads["heavy"] = grads["heavy"] * jnp.float32(np.where(rare, 1.0, 300.0))[:, None]
  run = trained(clipjax.clip_by_global_norm(2.5), optax.adam(0.1), grads)
  assert found(run)["clip-starves"].leaves == LEAVES
  assert [finding.advice for finding in diagnose(run) if finding.name == "clipped"] == [""]


def test_a_clip_by_leaf_starves_nobody():
  grads = gradients(tail=4.0)
  assert "clip-starves" not in found(trained(clipjax.clip_by_leaf_norm(2.5), optax.sgd(0.1), grads))


def test_a_clip_below_every_norm_is_no_fault_of_one_leaf():
  run = trained(clipjax.clip_by_global_norm(0.01), optax.sgd(0.1), gradients(tail=4.0))
  names = set(found(run))
  assert "clip-starves" not in names and names & {"clip-shortens", "clipped-often"}


def test_one_bad_batch_starves_nobody():
  grads = gradients()
  grads["heavy"] = grads["heavy"].at[200].multiply(1e4)
  assert "clip-starves" not in found(trained(clipjax.clip_by_global_norm(10.0), optax.sgd(0.1), grads))


def test_leaves_that_were_seldom_recorded_where_the_clip_acts():
  """Six steps in ten are clipped hard, and one in ten of the rows with leaves is of such a step."""
  grads = gradients()
  hard = np.arange(STEPS) % 10 < 6
  grads["heavy"] = grads["heavy"] * jnp.float32(np.where(hard, 1e3, 1.0))[:, None]
  whole = trained(clipjax.clip_by_global_norm(10.0), optax.sgd(0.1), grads)
  kept = ~hard | (np.arange(STEPS) % 50 == 0)
  vectors = {key: (steps[kept], values[kept]) for key, (steps, values) in whole.vectors.items()}
  finding = found(Run(**{**vars(whole), "vectors": vectors}))["clip-starves"]
  assert finding.leaves == LEAVES and re.search(r"'even' keeps 4[01](\.\d)?% of its step", finding.message)


def test_a_longer_step_of_adam():
  grads = gradients(spread=1.5)
  median = float(np.median(norms(grads)))
  finding = found(trained(clipjax.clip_by_global_norm(median), optax.adam(0.1), grads))["clip-lengthens"]
  assert finding.level == "WARN" and " times as long as without it (median)" in finding.message
  assert "clip-lengthens" not in found(
    trained(clipjax.clip_by_global_norm(median), optax.adam(0.1), grads), lengthened=3.0
  )


def test_the_leaf_that_is_lengthened_most_is_named():
  grads = gradients()
  vary = np.exp(2 * np.random.default_rng(1).standard_normal((STEPS, 1)))
  grads["even"] = grads["even"] * jnp.float32(vary)
  run = trained(clipjax.clip_by_leaf_norm(1.0), optax.adam(0.1), grads)
  finding = found(run, lengthened=1.05)["clip-lengthens"]
  assert finding.leaves == ("even",) and "in 'even' " in finding.message


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.sgd(0.1), optax.lion(0.1)])
def test_a_clip_that_does_nothing(optimizer):
  grads = gradients()
  run = trained(clipjax.clip_by_global_norm(2 * np.percentile(norms(grads), 90)), optimizer, grads)
  assert list(found(run)) == ["clip-no-effect"]
  finding = found(run)["clip-no-effect"]
  assert finding.level == "INFO" and finding.message == (
    "The clip of 'effect' leaves the step as it is (median ratio 1, cosine 1); in 0% of the steps it changes "
    "the length by more than 5%."
  )


def test_a_shorter_step_and_one_that_is_turned():
  grads = gradients()
  run = trained(clipjax.clip_by_global_norm(0.5 * float(np.median(norms(grads)))), optax.sgd(0.1), grads)
  shorter = found(run)["clip-shortens"]
  assert shorter.level == "INFO" and "shortens the step to 5" in shorter.message
  turned = found(trained(clipjax.clip_by_value(0.01), optax.sgd(0.1), grads))["clip-turns"]
  assert turned.advice and shorter.advice
  assert turned.level == "INFO" and "(median ratio " in turned.message


def test_nothing_is_said_of_a_few_steps_or_of_none_that_are_finite():
  grads = gradients()
  clip = clipjax.clip_by_global_norm(1.0)
  assert found(trained(clip, optax.sgd(0.1), jax.tree.map(lambda x: x[:8], grads))) == {}
  bad = jax.tree.map(lambda x: x * jnp.nan, grads)
  assert found(trained(clip, optax.sgd(0.1), bad)) == {}


def test_each_effect_is_judged_and_a_clip_of_optax_too():
  grads = gradients(tail=4.0)
  run = trained(optax.clip_by_global_norm(2.5), optax.sgd(0.1), grads, name="step")
  assert found(run)["clip-starves"].message.startswith("The clip of 'step' starves 'even'")


def test_an_effect_called_update_is_no_size_of_updates():
  run = trained(clipjax.clip_by_global_norm(50.0), optax.sgd(0.1), gradients(), name="update_effect")
  assert [finding.name for finding in diagnose(run) if finding.name.startswith("update")] == []


def test_stacked_layers_are_leaves():
  rng = np.random.default_rng(0)
  each = 0.5 * rng.standard_normal((STEPS, 3, 8))
  each[:, 1] *= np.exp(3 * np.abs(rng.standard_normal((STEPS, 1))))
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(3.0), optax.sgd(0.1), stacked=0)

  def step(state, grad):
    _, state = tx.update({"w": grad}, state)
    return state, clipjax.metrics(state, per_leaf=True)

  _, arrays = jax.lax.scan(step, tx.init({"w": jnp.zeros((3, 8))}), jnp.float32(each))
  finding = found(Run.from_arrays(arrays))["clip-starves"]
  assert set(finding.leaves[:-1]) == {"w[0]", "w[2]"} and finding.leaves[-1] == "w[1]"


def test_the_same_of_a_recorded_file(tmp_path):
  grads = gradients(tail=4.0)
  tx = clipjax.clip_effect(clipjax.clip_by_global_norm(2.5), optax.sgd(0.1))
  params = {name: jnp.ones(8) for name in LEAVES}
  state, update = tx.init(params), jax.jit(tx.update)
  with clipjax.runs.Recorder(tmp_path / "run.jsonl", every=10) as recorder:
    for i in range(STEPS):
      _, state = update(jax.tree.map(lambda x, i=i: x[i], grads), state, params)
      recorder.push(i, state)
  assert found(read_run(tmp_path / "run.jsonl"))["clip-starves"].leaves == LEAVES


# The advice ----------------------------------------------------------------------------------------------------------


def sign(rate):
  """An optimizer that keeps no state by which it could be known."""
  return optax.stateless(lambda updates, params: jax.tree.map(lambda u: -rate * jnp.sign(u), updates))


def test_what_was_measured_tells_that_scale_does_not_count():
  grads, clip = gradients(), clipjax.clip_by_global_norm(0.2)
  advice = suggest_max_norm(trained(clip, sign(0.1), grads))
  assert advice.scale_free and "clip_effect measured steps that stay as long" in " ".join(advice.notes)
  assert suggest_max_norm(trained(clip, sign(0.1), grads), scale_free=False).scale_free is False
  for optimizer in (optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)):
    assert not suggest_max_norm(trained(clip, optimizer, grads)).scale_free
  # A clip that hardly acts tells nothing.
  assert not suggest_max_norm(trained(clipjax.clip_by_global_norm(9.0), sign(0.1), grads)).scale_free


def test_the_advice_says_what_the_clip_did():
  grads = gradients()
  notes = " ".join(suggest_max_norm(trained(clipjax.clip_by_global_norm(50.0), optax.sgd(0.1), grads)).notes)
  assert "left the length of the step as it is (clip_effect: median ratio 1, cosine 1)" in notes
  notes = " ".join(suggest_max_norm(trained(clipjax.clip_by_global_norm(0.2), optax.sgd(0.1), grads)).notes)
  assert "made the step shorter, " in notes and "% of its length (clip_effect: " in notes
  notes = " ".join(
    suggest_max_norm(trained(clipjax.clip_by_global_norm(1.0), optax.adam(0.1), gradients(spread=1.5))).notes
  )
  assert "made the step longer, " in notes and " times as long (clip_effect: " in notes
  run = trained(clipjax.clip_by_global_norm(2.5), optax.sgd(0.1), gradients(tail=4.0))
  notes = " ".join(suggest_max_norm(run).notes)
  assert "One leaf, 'heavy', made the clip of this run act, and 'even' kept " in notes
  few = trained(clipjax.clip_by_global_norm(50.0), optax.sgd(0.1), jax.tree.map(lambda x: x[:15], grads))
  assert "clip_effect" not in " ".join(suggest_max_norm(few).notes)


def test_a_step_that_is_a_little_longer_or_turned_is_told_too():
  grads = gradients(spread=0.6)
  run = trained(clipjax.clip_by_global_norm(float(np.median(norms(grads)))), optax.adam(0.1), grads)
  longer = found(run)["clip-lengthens"]
  assert longer.level == "INFO" and longer.message.startswith("The clip of 'effect' lengthens the step to 1")
  steady = {name: jnp.asarray(np.tile(np.linspace(1.0, 2.0, 8), (STEPS, 1)), jnp.float32) for name in LEAVES}
  turned = found(
    trained(clipjax.clip_by_group_norm({"even": 1.5, "heavy": None}, lambda path, leaf: path), optax.adam(0.1), steady)
  )
  assert list(turned) == ["clip-no-effect"]


# Where findings begin ------------------------------------------------------------------------------------------------


def made(grad_ratio, ratio, share, names=("a", "b")):
  """A run of 40 steps with one effect: how much the clip leaves, ratios of the leaves, and the share of the second."""
  steps = np.arange(1, 41)
  fill = lambda x: np.broadcast_to(np.asarray(x, float), 40).copy()  # noqa: E731
  of_leaves = {"ratio": np.stack([fill(x) for x in ratio], 1), "share": np.stack([1 - fill(share), fill(share)], 1)}
  columns = {"effect/ratio": fill(ratio[0]), "effect/cosine": np.ones(40), "effect/grad_ratio": fill(grad_ratio)}
  vectors = {f"effect/{key}": (steps, values) for key, values in of_leaves.items()}
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
  assert ("clip-starves" in found(made(grad_ratio, (kept, 1.0), share))) == is_starved


def test_the_second_of_two_effects_is_judged_too():
  one, two = made(0.3, (1.4, 1.4), 0.5), made(1.0, (1.0, 1.0), 0.5)
  columns = one.columns | {key.replace("effect", "second"): column for key, column in two.columns.items()}
  both = Run(**{**vars(one), "columns": columns})
  names = [(f.name, f.message.split("'")[1]) for f in diagnose(both) if f.name.startswith("clip-")]
  assert names == [("clip-lengthens", "effect"), ("clip-no-effect", "second")]


@pytest.mark.parametrize(("rows", "is_told"), [(19, False), (20, True)])
def test_how_many_steps_tell_that_scale_does_not_count(rows, is_told):
  run = made(np.where(np.arange(40) < rows, 0.2, 1.0), (1.0, 1.0), 0.5)
  columns = run.columns | {"grad/norm": np.linspace(1, 2, 40)}
  assert suggest_max_norm(Run(**{**vars(run), "columns": columns})).scale_free == is_told


def test_the_leaf_that_keeps_least_is_named_first():
  run = made(0.3, (0.3, 1.0), 0.99)
  ratios = np.stack([np.full(40, x) for x in (0.4, 0.2, 1.0)], 1)
  shares = np.stack([np.full(40, x) for x in (0.005, 0.005, 0.99)], 1)
  steps = run.steps
  run = Run(**{**vars(run), "leaves": {"effect": ("a", "b", "c")},
               "vectors": {"effect/ratio": (steps, ratios), "effect/share": (steps, shares)}})  # fmt: skip
  finding = found(run)["clip-starves"]
  assert finding.leaves == ("b", "a", "c") and "'b' keeps 20% of its step" in finding.message
