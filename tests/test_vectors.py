"""Worked float64 steps of the published methods (data/vectors.json), under x64."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax

CASES = {
  case["name"]: case
  for case in json.loads((pathlib.Path(__file__).parent / "data" / "vectors.json").read_text())["cases"]
}

TRANSFORMATIONS = {
  "clip_by_value": lambda h: clipjax.clip_by_value(h["max_delta"]),
  "clip_by_global_norm": lambda h: clipjax.clip_by_global_norm(h["max_norm"]),
  "clip_by_global_norm_torch_eps": lambda h: clipjax.clip_by_global_norm(h["max_norm"], eps=h["eps"]),
  "clip_by_leaf_norm": lambda h: clipjax.clip_by_leaf_norm(h["max_norm"]),
}


def as_array(x, dtype):
  return jnp.asarray(np.array(x, dtype=np.float64), dtype)  # "inf" and "nan" are strings there.


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps(name, dtype):
  case = CASES[name]
  with jax.enable_x64(dtype == "float64"):
    tx = TRANSFORMATIONS[name](case["hyperparams"])
    rtol = case["rtol"] if dtype == "float64" else 1e-6
    state = tx.init({key: as_array(x, dtype) for key, x in case["steps"][0]["grads"].items()})
    for step in case["steps"]:
      grads = {key: as_array(x, dtype) for key, x in step["grads"].items()}
      updates, state = tx.update(grads, state)
      for key, want in step["updates"].items():
        np.testing.assert_allclose(updates[key], np.array(want, np.float64), rtol=rtol, err_msg=key)
      if isinstance(step.get("norm"), float):
        np.testing.assert_allclose(state.norm, step["norm"], rtol=rtol)
        np.testing.assert_allclose(state.scale, step["factor"], rtol=rtol)
    assert state.steps == len(case["steps"])
