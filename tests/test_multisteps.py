"""One NaN micro-batch inside and outside of optax.MultiSteps: what becomes of the parameters, and what readers say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax needs it.

EVERY = 2
START = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
GRADS = [{"w": jnp.array([1.0 + i, 2.0]), "b": jnp.array([0.5 - i])} for i in range(10)]
BAD = 3  # The second micro-batch of the second window.
SEEN = [jax.tree.map(lambda x: x * jnp.nan, g) if i == BAD else g for i, g in enumerate(GRADS)]
WITHOUT = SEEN[:BAD] + SEEN[BAD + 1 :]

STAYS = (
  "The accumulator of `optax.MultiSteps` is nonfinite and stays nonfinite, because Optax resets it with 0 * NaN: no "
  "later step will be finite. Resume from an earlier checkpoint, and put `clipjax.skip_steps` around MultiSteps, "
  "or pass it `should_skip_update_fn=optax.skip_not_finite`."
)


def chain(**options):
  return optax.chain(clipjax.clip_by_global_norm(1.5, **options), optax.sgd(0.1))


def multi(tx, **options):
  return optax.MultiSteps(tx, EVERY, **options)


def run(tx, grads=SEEN):
  """The parameters after every micro-step, and what the check says of each state, an empty text for nothing."""
  params, state, update = START, tx.init(START), jax.jit(tx.update)
  after, said = [], []
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
    after.append(jax.device_get(params))
    said.append(problem(state))
  return after, said, state


def problem(state):
  try:
    clipjax.raise_if_nonfinite(state)
  except FloatingPointError as error:
    return str(error)
  return ""


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


START_OF_IT = "step 2 of 'grad' was not finite: norm nan, "
REST_OF_IT = f"1 of 2 steps were not finite: lower the learning rate or look at the batch. {STAYS}"
# The transformation inside, and what is said of the first bad window.
INSIDE = {
  "skip_steps": (lambda: clipjax.skip_steps(chain()), STAYS),
  "skip_steps that allows a thousand": (lambda: clipjax.skip_steps(chain(), max_consecutive_skips=1000), STAYS),
  "skip_steps without a clip": (lambda: clipjax.skip_steps(optax.sgd(0.1)), STAYS),
  "zero": (lambda: chain(on_nonfinite="zero"), f"{START_OF_IT}first in leaf 'b'. {REST_OF_IT}"),
  "zero by leaf": (
    lambda: optax.chain(clipjax.clip_by_leaf_norm(1.5, on_nonfinite="zero"), optax.sgd(0.1)),
    f"{START_OF_IT}in leaf 'b', 'w'. {REST_OF_IT}",
  ),
  "apply_if_finite": (lambda: optax.apply_if_finite(chain(), 100), STAYS),
  "apply_if_finite without a clip": (lambda: optax.apply_if_finite(optax.sgd(0.1), 100), STAYS),
}


@pytest.mark.parametrize("name", INSIDE)
def test_inside_training_freezes_and_the_check_tells_at_once(name):
  make, first = INSIDE[name]
  after, said, _ = run(multi(make()))
  assert not np.array_equal(after[EVERY - 1]["w"], START["w"])
  for params in after[EVERY:]:  # From the window of the NaN on, no parameter moves.
    assert_equal(params, after[EVERY - 1])
  # Nothing inside sees a window before it is full; from then on it is told at every micro-step.
  assert said[: BAD + 1] == [""] * BAD + [first]
  assert all(text.endswith(STAYS) for text in said[BAD:])


def test_once_it_has_rejected_enough_skip_steps_speaks_too():
  _, said, _ = run(multi(clipjax.skip_steps(chain(), max_consecutive_skips=2)))
  assert said[-1] == (
    "'skip' rejected the last 4 steps, the limit is 2: norm nan: check the data and the loss, and resume from an "
    f"earlier checkpoint. {STAYS}"
  )


def test_inside_nan_that_is_propagated_reaches_the_parameters_and_is_told():
  after, said, state = run(multi(chain()))
  assert np.isnan(after[BAD]["w"]).all() and np.isnan(after[-1]["w"]).all()
  assert said[:BAD] == [""] * BAD and all(text.endswith(STAYS) for text in said[BAD:])
  assert 'on_nonfinite="zero"' not in said[-1]
  assert clipjax.metrics(state)["grad/nonfinite_steps"] == 4


EXACT = {
  "skip_steps around": lambda: clipjax.skip_steps(multi(chain())),
  "skip_steps around its transformation": lambda: clipjax.skip_steps(multi(chain()).gradient_transformation()),
  "skip_steps around one that drops too": lambda: clipjax.skip_steps(multi(chain(on_nonfinite="zero"))),
  "should_skip_update_fn": lambda: multi(chain(), should_skip_update_fn=optax.skip_not_finite),
  "should_skip_update_fn with skip_steps inside": lambda: multi(
    clipjax.skip_steps(chain()), should_skip_update_fn=optax.skip_not_finite
  ),
  "apply_if_finite around": lambda: optax.apply_if_finite(multi(chain()).gradient_transformation(), 100),
}


@functools.cache
def without_the_batch():
  after, _, state = run(multi(chain()), WITHOUT)
  return after, state


@pytest.mark.parametrize("name", EXACT)
def test_around_it_is_the_run_that_never_saw_the_batch(name):
  after, said, state = run(EXACT[name]())
  want, plain = without_the_batch()
  assert_equal(after[BAD], after[BAD - 1])
  assert_equal(after[:BAD] + after[BAD + 1 :], want)
  assert said == [""] * len(SEEN)
  got, expected = clipjax.metrics(state), clipjax.metrics(plain)
  assert expected["grad/steps"] == 4 and expected["grad/nonfinite_steps"] == 0
  for key, value in expected.items():
    assert got[key] == value, key
  if name.startswith("skip_steps"):
    assert got["skip/steps"] == len(SEEN) and got["skip/consecutive"] == 0
    np.testing.assert_allclose(got["skip/fraction"], 0.1)


def test_a_finite_step_that_is_rejected_inside_leaves_the_accumulator_alone():
  large = [jax.tree.map(lambda x, i=i: 1e6 * x if i == BAD else x, g) for i, g in enumerate(GRADS)]
  after, said, state = run(multi(clipjax.skip_steps(chain(), norm_rule=100.0)), large)
  assert said == [""] * len(large) and clipjax.metrics(state)["skip/fraction"] == 0.2
  assert not np.array_equal(after[-1]["w"], after[BAD]["w"])


def test_a_norm_beyond_its_dtype_is_told_though_the_accumulator_is_finite():
  large = jax.tree.map(lambda x: jnp.full_like(x, 3e38), START)
  _, said, _ = run(multi(chain(on_nonfinite="zero")), [large, large, *GRADS[:2]])
  assert said[1] == (
    "step 1 of 'grad' was not finite: norm inf, first in leaf 'w'. 1 of 1 steps were not finite: lower the learning "
    "rate or look at the batch. `optax.MultiSteps` around it would keep a NaN in its accumulator for good: put "
    "`clipjax.skip_steps` around MultiSteps, or pass it `should_skip_update_fn=optax.skip_not_finite`."
  )
  assert said[0] == said[3] == ""


def test_a_threshold_that_is_nan_is_no_matter_of_the_accumulator():
  clip = clipjax.clip_by_global_norm(lambda count: jnp.where(count == 0, jnp.nan, 1.0), on_nonfinite="zero")
  tx = optax.MultiSteps(clip, 1)
  _, said, _ = run(tx, GRADS[:1])
  assert said == [
    "step 1 of 'grad' was not finite: norm 2.29129, threshold nan. 1 of 1 steps were not finite: check the schedule "
    "or rule that gives it."
  ]


def test_an_accumulator_in_flax_nnx_and_of_many_models():
  tx = multi(clipjax.skip_steps(chain()))
  (*_, state), (*_, sound) = run(tx), run(tx, GRADS)
  for other, text in ((state, STAYS), (sound, "")):
    assert problem(jax.tree.map(lambda *xs: jnp.stack(xs), sound, other)) == text
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx.gradient_transformation(), wrt=nnx.Param)
  grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
  for factor in (1.0, jnp.nan):
    assert problem(optimizer) == ""
    optimizer.update(model, jax.tree.map(lambda x, f=factor: x * f, grads))
  assert problem(optimizer) == problem(nnx.split(optimizer)) == STAYS


def test_one_inside_another_names_the_outcome_once():
  tx = optax.MultiSteps(multi(clipjax.skip_steps(chain())).gradient_transformation(), 2)
  _, said, _ = run(tx, SEEN[:8])
  assert said == ["", "", "", *[STAYS] * 5]


@pytest.mark.parametrize(
  ("options", "limit"), [({}, 10), ({"max_consecutive_skips": 3}, 3), ({"max_consecutive_skips": 12}, 12)]
)
def test_ten_steps_in_a_row_are_enough_where_no_number_is_given(options, limit):
  tx = clipjax.skip_steps(chain(), **options)
  _, said, state = run(tx, [SEEN[BAD]] * 12)
  assert [text.partition(":")[0] for text in said] == [""] * (limit - 1) + [
    f"'skip' rejected the last {n} steps, the limit is {limit}" for n in range(limit, 13)
  ]
  assert problem(tx.update(GRADS[0], state, START)[1]) == ""
