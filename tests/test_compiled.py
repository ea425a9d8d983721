"""Programs that tests keep for the next run: those of one device alone, see `conftest.py`."""

import random
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@pytest.mark.parametrize(("devices", "kept"), [(1, 1), (2, 0)])
def test_a_program_is_kept_if_it_has_one_device(devices, kept):
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ("a",))
  x = jax.device_put(jnp.ones(2), NamedSharding(mesh, P("a")))
  new = random.random()  # A program that no run has compiled.
  with mock.patch.object(compilation_cache, "put_executable_and_time") as put:
    for _ in range(2):
      jax.jit(lambda x: x * new)(x)
  assert put.call_count == 2 * kept
