"""Which optimizers divide the scale of the gradient out: what they do, and what their states say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from synthetic import healthy, run_of

import clipjax
from clipjax.runs import suggest_max_norm
from clipjax.state_search import optimizer_states


def updates(tx, scale):
  """What an optimizer makes of some steps whose gradients are all scaled."""
  params = {"w": jnp.full((4, 4), 0.3), "b": jnp.ones(4)}
  state, rng = tx.init(params), np.random.default_rng(0)
  for _ in range(4):
    grads = jax.tree.map(lambda p: scale * (p + jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype)), params)
    out, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, out)
  return params, optimizer_states(state)


FREE_BY_NAME = ("adam", "adamw", "amsgrad", "adan", "adabelief", "adafactor", "lion", "novograd", "rmsprop", "rprop",
                "sm3")  # fmt: skip
OPTIMIZERS = {name: (lambda name=name: getattr(optax, name)(1e-2), True) for name in FREE_BY_NAME} | {
  "sgd": (lambda: optax.sgd(1e-5), False),
  "momentum": (lambda: optax.sgd(1e-5, momentum=0.9), False),
  "adadelta": (lambda: optax.adadelta(1.0, eps=1e-12), True),
  "adagrad": (lambda: optax.adagrad(1e-2, initial_accumulator_value=1e-8), True),
  "rmsprop, centered": (lambda: optax.rmsprop(1e-2, centered=True, momentum=0.9), True),
  "rmsprop, bias correction": (lambda: optax.rmsprop(1e-2, bias_correction=True), True),
  "muon": (lambda: optax.contrib.muon(1e-2), True),
  "schedule-free AdamW": (lambda: optax.contrib.schedule_free_adamw(1e-2), True),
  "schedule-free SGD": (lambda: optax.contrib.schedule_free_sgd(1e-5), False),
  "in MultiSteps": (lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_which_optimizers_divide_the_scale_out(name, standard_promotion):
  make, is_free = OPTIMIZERS[name]
  (small, states), (large, _) = updates(make(), 1.0), updates(make(), 100.0)
  moved = max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (small, large)), strict=True))
  far = float(jnp.abs(small["w"] - 0.3).max())
  assert (moved < 0.01 * far) == is_free  # It is what we say.
  run = dataclasses.replace(run_of(healthy()), optimizer=states)
  found = suggest_max_norm(run)
  assert found.scale_free == is_free
  assert ("According to the record, the optimizer divides the scale" in " ".join(found.notes)) == is_free


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_states_of_this_package_tell_no_optimizer(momentum):
  rule = clipjax.rules.percentile(50.0, window=3)
  clips = [clipjax.watch(), clipjax.clip_by_global_norm(1.0), clipjax.clip_by_leaf_norm(rule, name="leaf")]
  tx = clipjax.skip_steps(optax.chain(*clips, optax.sgd(0.1, momentum)), norm_rule=rule)
  want = () if momentum is None else ("TraceState",)
  assert optimizer_states(tx.init({"w": jnp.ones(2)})) == want
