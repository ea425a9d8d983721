"""What is an optimizer state, what can be made one, and what is none: readers never pass over it in silence."""

import dataclasses
import functools
import types
from typing import Any

import equinox as eqx
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training import train_state
from helpers import message_of

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Adam needs it.

PARAMS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
BAD = {"w": jnp.array([jnp.nan, 1.0]), "b": jnp.array([12.0])}
OURS = optax.chain(clipjax.watch(), clipjax.skip_steps(clipjax.clip_by_leaf_norm(6.5)), optax.adam(1e-3))
OTHERS = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def state_of(tx, grads=BAD):
  return tx.update(grads, tx.init(PARAMS), PARAMS)[1]


@functools.cache
def nnx_optimizer(tx=OURS):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  optimizer.update(model, jax.tree.map(lambda x: x * jnp.nan, nnx.state(model, nnx.Param)))
  return model, optimizer


def readers(path):
  def push(state):
    with clipjax.runs.Recorder(path) as recorder:
      recorder.push(1, state, loss=1.0)

  return {"metrics": clipjax.metrics, "raise_if_nonfinite": clipjax.raise_if_nonfinite, "push": push}


RETURNED = "pass what `init` or `update` returned"
RESTORE = (
  f"{RETURNED}; restore a state that was saved as a dict with "
  "`flax.serialization.from_state_dict(tx.init(params), saved)`"
)
MERGE = (
  "pass `nnx.merge(graphdef, state)`, the optimizer itself; `nnx.state` and `nnx.split` leave the names of the leaves "
  "in the graphdef"
)

NONE_OF_THEM = {
  "nnx.state of an optimizer": (lambda: nnx.state(nnx_optimizer()[1]), "a State", MERGE),
  "nnx.state of an optimizer without a clip": (lambda: nnx.state(nnx_optimizer(OTHERS)[1]), "a State", MERGE),
  "a GraphDef": (lambda: nnx.graphdef(nnx_optimizer()[1]), "a GraphDef", MERGE),
  "a part of nnx.split": (
    lambda: nnx.split(nnx_optimizer()[1], lambda path, _: "mu" in path, ...)[:2], "a tuple", MERGE,
  ),
  "nnx.state under opt_state": (lambda: {"opt_state": nnx.state(nnx_optimizer()[1])}, "a dict", MERGE),
  "nnx.state beside another state": (
    lambda: (optax.EmptyState(), nnx.state(nnx_optimizer()[1])), "a tuple", MERGE,
  ),
  "a state dict": (lambda: flax.serialization.to_state_dict(state_of(OURS)), "a dict", RESTORE),
  "a state dict without a clip": (lambda: flax.serialization.to_state_dict(state_of(OTHERS)), "a dict", RESTORE),
  "a state dict beside another state": (
    lambda: [optax.EmptyState(), flax.serialization.to_state_dict(state_of(OURS))], "a list", RESTORE,
  ),
  "a state dict of a clip in a tuple": (
    lambda: (flax.serialization.to_state_dict(state_of(clipjax.clip_by_global_norm(1.0))),), "a tuple", RESTORE,
  ),
  "an empty dict": (dict, "a dict", RESTORE),
  "an empty tuple": (tuple, "a tuple", RETURNED),
  "a list of arrays": (lambda: [jnp.ones(2)], "a list", RETURNED),
  "an array": (lambda: jnp.ones(2), "float32[2]", RETURNED),
  "a class": (lambda: optax.EmptyState, "a type", RETURNED),
  "an object": (lambda: types.SimpleNamespace(state=None), "a SimpleNamespace", RETURNED),
  "an object that holds None": (lambda: linen_train_state(None), "a NoneType", RETURNED),
  "None": (lambda: None, "a NoneType", RETURNED),
  "nnx.split of a model": (lambda: nnx.split(nnx_optimizer()[0]), "a Linear", RETURNED),
}  # fmt: skip


def linen_train_state(opt_state):
  return train_state.TrainState(step=0, apply_fn=None, params=PARAMS, tx=OURS, opt_state=opt_state)


@pytest.mark.parametrize("case", NONE_OF_THEM)
def test_what_is_no_optimizer_state_is_an_error_with_a_remedy(case, tmp_path):
  make, what, remedy = NONE_OF_THEM[case]
  for name, read in readers(tmp_path / "run.jsonl").items():
    if what != "a NoneType" or name != "push":  # A run may have no optimizer state.
      text = message_of(lambda read=read: read(make()), TypeError)
      assert text == f"`opt_state` must be the state of an optimizer, got {what}: {remedy}."


def test_a_run_may_have_no_optimizer_state(tmp_path):
  readers(tmp_path / "run.jsonl")["push"](None)
  assert clipjax.runs.read_run(tmp_path / "run.jsonl")["loss"].tolist() == [1.0]


class Callable(eqx.Module):
  """A pytree that is callable too."""

  state: Any

  def __call__(self):
    return self.state


@flax.struct.dataclass
class Dataclass:
  """A pytree of Flax."""

  inside: Any


HOLDERS = {
  "itself": lambda s: s,
  "a callable module of Equinox": Callable,
  "a dataclass of Flax": Dataclass,
  "a NamedTuple": optax.TraceState,
  "a train state": linen_train_state,
  "an object": lambda s: types.SimpleNamespace(opt_state=s),
  "a dict": lambda s: {"params": PARAMS, "opt_state": s},
  "a tuple": lambda s: (PARAMS, s),
  "a list": lambda s: [s],
  "a saved copy beside it": lambda s: {"opt_state": s, "saved": flax.serialization.to_state_dict(s)},
  "parameters of Flax NNX beside it": lambda s: (nnx.state(nnx_optimizer()[0]), s),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_state_is_read_wherever_it_is_held(holder, tmp_path):
  state, held = state_of(OURS), HOLDERS[holder](state_of(OURS))
  want, got = clipjax.metrics(state, per_leaf=True), clipjax.metrics(held, per_leaf=True)
  assert set(got) == set(want) and got["grad/steps"] == 1 and got["skip/fraction"] == 1
  with pytest.raises(FloatingPointError, match="step 1 of 'grad' was not finite: norm nan, in leaf 'w'"):
    clipjax.raise_if_nonfinite(held)
  readers(tmp_path / "run.jsonl")["push"](held)
  assert clipjax.runs.read_run(tmp_path / "run.jsonl")["skip/fraction"].tolist() == [1.0]


WITHOUT = {
  "EmptyState": optax.identity,
  "adam": lambda: optax.adam(1e-3),
  "lbfgs": optax.lbfgs,
  "named_chain": lambda: optax.named_chain(("a", optax.scale(1.0)), ("b", optax.adam(1e-3))),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-3), 2),
  "multi_transform": lambda: optax.multi_transform(
    {"a": optax.adam(1e-3), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}
  ),
  "masked": lambda: optax.masked(optax.adam(1e-3), {"w": True, "b": False}),
  "track=False": lambda: clipjax.clip_by_global_norm(1.0, track=False),
}
OF_OPTAX = {
  **{name: lambda make=make: make().init(PARAMS) for name, make in WITHOUT.items()},
  **{name: lambda hold=hold: hold(state_of(OTHERS)) for name, hold in HOLDERS.items() if name != "a list"},
}


@pytest.mark.parametrize("name", OF_OPTAX)
def test_a_state_of_optax_alone_is_read_in_silence(name, tmp_path):
  state = OF_OPTAX[name]()
  assert clipjax.metrics(state) == {} == clipjax.metrics(state, per_leaf=True)
  assert name not in WITHOUT or jax.jit(clipjax.metrics)(state) == {}
  assert clipjax.raise_if_nonfinite(state) is None
  readers(tmp_path / "run.jsonl")["push"](state)
  assert clipjax.runs.read_run(tmp_path / "run.jsonl")["loss"].tolist() == [1.0]


def test_what_nnx_split_gives_is_read(tmp_path):
  model, optimizer = nnx_optimizer()
  want = clipjax.metrics(optimizer, per_leaf=True)
  assert want["skip/fraction"] == 1 and "grad/norm/kernel" in want
  for split in (
    nnx.split(optimizer, lambda path, _: "mu" in path, ...),
    nnx.split((model, optimizer)),
    nnx.split(optimizer.opt_state),
    nnx.split(optimizer),
  ):
    got = clipjax.metrics(split, per_leaf=True)
    assert set(got) == set(want) and got["skip/fraction"] == 1
    with pytest.raises(FloatingPointError, match="step 1 of 'grad' was not finite"):
      clipjax.raise_if_nonfinite(split)
  readers(tmp_path / "run.jsonl")["push"](split)
  assert clipjax.runs.read_run(tmp_path / "run.jsonl")["skip/fraction"].tolist() == [1.0]
  graphdef, state = split
  assert set(jax.jit(lambda s: clipjax.metrics((graphdef, s), per_leaf=True))(state)) == set(want)


def test_the_remedies_work():
  _, optimizer = nnx_optimizer()
  assert "grad/norm" in clipjax.metrics(nnx.merge(nnx.graphdef(optimizer), nnx.state(optimizer)))
  saved = flax.serialization.to_state_dict(state_of(OURS))
  assert clipjax.metrics(flax.serialization.from_state_dict(OURS.init(PARAMS), saved))["grad/steps"] == 1


def test_a_foreign_object_with_get_value_is_no_variable_of_flax():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Boxed:
    x: Any

    def get_value(self):
      raise AssertionError("not ours to call")

  tx = clipjax.skip_steps(optax.GradientTransformation(lambda p: Boxed(jnp.ones(1)), lambda u, s, p=None: (u, s)))
  state = state_of(tx, PARAMS)
  assert clipjax.metrics(state)["skip/steps"] == 1
  clipjax.raise_if_nonfinite(state)
