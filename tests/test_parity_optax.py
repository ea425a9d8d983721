"""The clips of Optax and of this package inside wrappers, with schedules and in 16 bits: the same steps.

What they answer by themselves is in `test_golden.py`. Where the two differ on purpose is in docs/hardening.md, which
`test_deviations.py` runs.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax needs it.

TREE = {"a": jnp.array([3.0, -4.0, 0.25]), "b": {"c": jnp.array([[1.0, -2.0], [0.0, 12.0]]), "d": jnp.array(-0.5)}}
PARAMS = jax.tree.map(lambda x: x / 3 + 1, TREE)
COMPLEX = [jnp.array([3 + 4j, 1j], jnp.complex64), jnp.array([2.0])]
# Both factories, and the names that they give their limit.
PAIRS = {
  "global": ((clipjax.clip_by_global_norm, optax.clip_by_global_norm), ("max_norm", "max_norm")),
  "value": ((clipjax.clip_by_value, optax.clip), ("max_value", "max_delta")),
  "rms": ((clipjax.clip_by_block_rms, optax.clip_by_block_rms), ("max_rms", "threshold")),
}
WRAPPERS = {
  "chain": lambda clip: optax.chain(clip, optax.trace(0.9), optax.scale(-0.1)),
  "named_chain": lambda clip: optax.named_chain(("clip", clip), ("sgd", optax.sgd(0.1))),
  "masked": lambda clip: optax.masked(clip, {"a": True, "b": {"c": True, "d": False}}),
  "masked by function": lambda clip: optax.masked(clip, lambda tree: jax.tree.map(lambda x: x.ndim > 0, tree)),
  "partition": lambda clip: optax.partition(
    {"clip": clip, "plain": optax.sgd(0.1)}, {"a": "clip", "b": {"c": "plain", "d": "clip"}}
  ),
  "MultiSteps": lambda clip: optax.MultiSteps(optax.chain(clip, optax.sgd(0.1)), 2),
  "MultiSteps that skips": lambda clip: optax.MultiSteps(
    optax.chain(clip, optax.sgd(0.1)), 1, should_skip_update_fn=optax.skip_not_finite
  ),
  "apply_if_finite": lambda clip: optax.apply_if_finite(optax.chain(clip, optax.sgd(0.1)), 3),
  "maybe_transform": lambda clip: optax.transforms.conditionally_transform(clip, lambda step: step % 2 == 0),
  "flatten": optax.flatten,
  "lookahead of updates": lambda clip: optax.chain(optax.add_decayed_weights(0.01), clip, optax.scale(-0.1)),
}
INJECTED = {"an injected schedule": optax.exponential_decay(2.0, 1, 0.5), "an injected number": 0.5}
SITUATIONS = [
  *(pytest.param("global", wrapper) for wrapper in WRAPPERS),
  *(pytest.param(clip, wrapper, marks=pytest.mark.slow) for clip in ("value", "rms") for wrapper in WRAPPERS),
  *(pytest.param(clip, injected) for clip in PAIRS for injected in INJECTED),
]


def steps_of(tx, broken):
  """The updates of five steps of very different sizes, the third of NaN if it is to be `broken`."""
  tx = optax.with_extra_args_support(tx) if hasattr(tx, "_fields") else tx
  state, update, rng, steps = tx.init(PARAMS), jax.jit(tx.update), np.random.default_rng(5), []
  for i in range(5):
    scale = jnp.float32(jnp.nan if broken and i == 2 else 10.0 ** rng.uniform(-2, 2))
    updates, state = update(jax.tree.map(lambda x, s=scale: x * s, TREE), state, PARAMS)
    steps.append(updates)
  return steps


@pytest.mark.parametrize(("clip", "situation"), SITUATIONS)
def test_the_two_give_the_same_steps(clip, situation):
  if situation in INJECTED:
    pair = [optax.inject_hyperparams(f)(**{n: INJECTED[situation]}) for f, n in zip(*PAIRS[clip], strict=True)]
  else:
    pair = [WRAPPERS[situation](factory(0.7)) for factory in PAIRS[clip][0]]
  ours, theirs = (steps_of(tx, "finite" in situation or "skips" in situation) for tx in pair)
  chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
  assert_close(ours, theirs, 5e-6, 1e-30)


@pytest.mark.parametrize("limit", [0.01, 1.0, 13.0])
@pytest.mark.parametrize(("clip", "dtype"), [
  ("value", "bfloat16"), ("value", "float16"), ("global", "complex64"), ("rms", "complex64"),
])  # fmt: skip
def test_the_two_agree_in_other_dtypes(clip, dtype, limit):
  tree = COMPLEX if dtype == "complex64" else jax.tree.map(lambda x: x.astype(dtype), TREE)
  # Optax compares with a bound in the wider dtype, and rounds afterwards.
  bounds = limit, limit if dtype == "complex64" else jnp.asarray(limit, dtype)
  ours, theirs = (tx(b).update(tree, tx(b).init(tree))[0] for tx, b in zip(PAIRS[clip][0], bounds, strict=True))
  chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
  assert_close(ours, theirs, 2e-6 if dtype == "complex64" else 0)
