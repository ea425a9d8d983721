"""Strict promotion, eight CPU devices and no warnings, for every test."""

import gc
import itertools
import os
from unittest import mock

from compiled import cache_folder, options

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("CLIPJAX_TESTS_CACHE", cache_folder())  # The workers of xdist inherit it.

import jax
import pytest
from jax._src import compilation_cache, compiler

# There are thousands of small programs: to walk the whole heap for cycles, and to note where each operation was traced,
# would take a tenth of the time.
gc.set_threshold(200_000, 20, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Each program is compiled once on a machine, not once in each run, worker and test.
for name, value in options().items():
  jax.config.update(name, value)


def keep_no_program_over_several_devices():
  """Takes every program that has several devices past the kept ones.

  Those that XLA reads from a file no longer have their collectives in one order (jaxlib 0.10.2, on CPUs): devices wait
  for one another in different ones until the process is ended. JAX has no public way to say it of a program.
  """
  compile_or_get = compiler.compile_or_get_cached

  def compile_or_get_if_alone(backend, computation, devices, *args, **options):
    if devices.size == 1:
      return compile_or_get(backend, computation, devices, *args, **options)
    with mock.patch.object(compilation_cache, "is_cache_used", return_value=False):
      return compile_or_get(backend, computation, devices, *args, **options)

  compiler.compile_or_get_cached = compile_or_get_if_alone


keep_no_program_over_several_devices()


finished = itertools.count(1)


def pytest_runtest_logfinish():
  """Lets go of all programs now and then: those of all tests take 10 GB, and as many maps as Linux gives a process."""
  if next(finished) % 300 == 0:
    jax.clear_caches()
    gc.collect()


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


@pytest.fixture
def path(tmp_path):
  """Where a test records its run."""
  return tmp_path / "run.jsonl"
