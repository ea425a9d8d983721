"""Worked float64 steps of the published methods (data/vectors.json), under x64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import worked_cases

import clipjax
from clipjax import rules


def zclip(h, **options):
  return clipjax.zclip(h["z_thresh"], decay=h["alpha"], warmup_steps=h["warmup_steps"], eps=h["eps"], **options)


def levanter(h):
  waits = {"window": h["window"], "min_count": h["window"] // 2 + 1}
  return rules.rolling_sigma(h["sigma_factor"], ddof=0, std_floor=h["std_floor"], **waits)


TRANSFORMATIONS = {
  "clip_by_value": lambda h: clipjax.clip_by_value(h["max_delta"]),
  "clip_by_global_norm": lambda h: clipjax.clip_by_global_norm(h["max_norm"]),
  "clip_by_global_norm_torch_eps": lambda h: clipjax.clip_by_global_norm(h["max_norm"], eps=h["eps"]),
  "clip_by_leaf_norm": lambda h: clipjax.clip_by_leaf_norm(h["max_norm"]),
  "autoclip_p10_full_history": lambda h: clipjax.autoclip(h["percentile"]),
  "autoclip_p90_window4_include": lambda h: clipjax.autoclip(h["percentile"], window=h["window"]),
  "zclip_reciprocal": zclip,
  "zclip_skip_update": lambda h: zclip(h, record="none"),
  "adagc_paper": lambda h: clipjax.adagc(
    h["lambda_rel"], decay=h["beta"], warmup_steps=h["warmup_steps"], max_norm=h["lambda_abs"]
  ),
  "clip_rolling_sigma_levanter": lambda h: clipjax.clip_by_global_norm(levanter(h)),
}


# The variance of a few norms near 1 is about 0.02, so that rounding a norm in float32 moves it by 1e-5.
FLOAT32_RTOL = {"zclip_reciprocal": 1e-4, "zclip_skip_update": 1e-4, "clip_rolling_sigma_levanter": 1e-5}


def as_array(x, dtype):
  return jnp.asarray(np.array(x, dtype=np.float64), dtype)  # "inf" and "nan" are strings there.


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps(name, dtype):
  case = worked_cases()[name]
  with jax.enable_x64(dtype == "float64"):
    tx = TRANSFORMATIONS[name](case["hyperparams"])
    rtol = case["rtol"] if dtype == "float64" else FLOAT32_RTOL.get(name, 1e-6)
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
