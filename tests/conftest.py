"""Strict promotion, eight CPU devices and no warnings, for every test."""

import os

from compiled import cache_folder

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("CLIPJAX_TESTS_CACHE", cache_folder())  # The workers of xdist inherit it.

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Each program is compiled once on a machine, not once in each run, worker and test.
jax.config.update("jax_compilation_cache_dir", os.environ["CLIPJAX_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
  """Runs a test without and with x64; the value says which."""
  with jax.enable_x64(request.param):
    yield request.param


@pytest.fixture
def standard_promotion():
  """JAX as users have it, for tests that run their code, or code of Optax that strict promotion does not allow."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield
