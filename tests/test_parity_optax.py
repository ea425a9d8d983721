"""The clips of Optax and of this package in a chain, with schedules, in 16 bits and complex: the same steps.

What they answer by themselves is in `test_golden.py`. Where the two differ on purpose is in docs/hardening.md, which
`test_deviations.py` runs.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, first_step, steps_of

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
SITUATIONS = {  # Wrappers are in `test_optax_situations.py`.
  "in a chain": lambda f, _: optax.chain(optax.add_decayed_weights(0.01), f(0.7), optax.trace(0.9), optax.scale(-0.1)),
  "an injected schedule": lambda f, name: optax.inject_hyperparams(f)(**{name: optax.exponential_decay(2.0, 1, 0.5)}),
  "an injected number": lambda f, name: optax.inject_hyperparams(f)(**{name: 0.5}),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("clip", PAIRS)
def test_the_two_give_the_same_steps(clip, situation):
  scales = 10.0 ** np.random.default_rng(5).uniform(-2, 2, 5)
  grads = [jax.tree.map(lambda x, s=s: x * jnp.float32(s), TREE) for s in scales]
  pair = (SITUATIONS[situation](factory, name) for factory, name in zip(*PAIRS[clip], strict=True))
  ours, theirs = ([updates for updates, _ in steps_of(tx, grads, PARAMS)] for tx in pair)
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
  ours, theirs = (first_step(factory(b), tree)[0] for factory, b in zip(PAIRS[clip][0], bounds, strict=True))
  chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
  assert_close(ours, theirs, 2e-6 if dtype == "complex64" else 0)
