"""The absent targets that `accelerators.py` compiles for: their compilers, environments and devices.

pip installs the compilers. Each needs its environment before JAX is imported, so every target gets its own process, and
this file imports JAX only to create the devices.
"""

import importlib.metadata
import os
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

EXTRA = 'pip install -e ".[aot]"'
# What XLA needs to know about the card, an H100 SXM with 80 GB; the keys are from XLA's `GpuDeviceInfoProto`.
H100 = {
  "core_count": 132,
  "fpus_per_core": 128,
  "clock_rate_ghz": 1.98,
  "device_memory_size": 84_929_347_584,
  "memory_bandwidth": 3_352_320_000_000,
  "l2_cache_size": 52_428_800,
  "shared_memory_per_block": 49_152,
  "shared_memory_per_block_optin": 232_448,
  "shared_memory_per_core": 233_472,
  "registers_per_core_limit": 65_536,
  "registers_per_block_limit": 65_536,
  "threads_per_warp": 32,
  "threads_per_block_limit": 1024,
  "threads_per_core_limit": 2048,
  "block_dim_limit_x": 2_147_483_647,
  "block_dim_limit_y": 65_535,
  "block_dim_limit_z": 65_535,
}


class Target(NamedTuple):
  """A target of the compiler.

  Attributes:
    title: its name on the page.
    packages: the compiler's packages besides JAX; a plugin must have JAX's version.
    side: number of devices along each of the two axes of the mesh.
    topology: name of the topology for the TPU compiler, "" for the GPU.
  """

  title: str
  packages: tuple[str, ...]
  side: int
  topology: str


CUDA = ("jax-cuda12-pjrt", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
TARGETS = {
  "tpu": Target("one TPU v5e chip", ("libtpu",), 1, "v5e:2x2"),
  "pod": Target("256 TPU v5e chips", ("libtpu",), 16, "v5e:16x16"),
  "gpu": Target("one H100", CUDA, 1, ""),
}


def version(package: str) -> str | None:
  """The version of a package; None if it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def missing(name: str) -> str | None:
  """Why a target cannot be compiled for, and the remedy; None if it can."""
  found = {package: version(package) for package in TARGETS[name].packages}
  jax = version("jax")
  absent = [package for package, number in found.items() if number is None]
  if absent:
    return f"no compiler for {TARGETS[name].title}: {', '.join(absent)} not installed. `{EXTRA}` installs it."
  other = [f"{p} {number}" for p, number in found.items() if p.startswith("jax-cuda12") and number != jax]
  if other:
    return (
      f"no compiler for {TARGETS[name].title}: {', '.join(other)} beside jax {jax}. `{EXTRA}` installs one version."
    )
  return None


def environment(name: str) -> dict[str, str]:
  """The environment of a process that compiles for a target: the caller's, without variables that redirect JAX."""
  env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "TPU_", "LIBTPU_"))}
  # Present devices are hidden, so every machine compiles the same.
  env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
  if TARGETS[name].topology:
    # Otherwise the compiler would ask the cloud's metadata server which chip it runs on.
    env |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    return env
  nvcc = Path(sysconfig.get_path("purelib")) / "nvidia" / "cuda_nvcc"
  env["PATH"] = os.pathsep.join([str(nvcc / "bin"), env.get("PATH", "")])
  # Autotuning runs kernels on the card; without it, Triton's matrix products have no tiling.
  flags = ("autotune_level=0", "enable_triton_gemm=false", f"cuda_data_dir={nvcc}")
  env["XLA_FLAGS"] = " ".join(f"--xla_gpu_{flag}" for flag in flags)
  return env


def mesh(name: str) -> Any:
  """A mesh of the target's devices with axes x and y; JAX must have been imported in the target's environment."""
  import jax  # noqa: PLC0415  (the environment comes first)
  import numpy as np  # noqa: PLC0415
  from jax.experimental import topologies  # noqa: PLC0415

  target = TARGETS[name]
  if target.topology:
    found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
  else:
    options = {"target_config": gpu_config(), "topology": "1x1x1"}
    found = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
  devices = np.array(found.devices[: target.side**2]).reshape(target.side, target.side)
  return jax.sharding.Mesh(devices, ("x", "y"))


def gpu_config() -> str:
  """The card in the text format of XLA's `GpuTargetConfigProto`."""
  facts = " ".join(f"{key}: {value}" for key, value in H100.items())
  return (
    f"gpu_device_info {{ {facts} cuda_compute_capability {{ major: 9 }} }} "
    'platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" '
    "dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }"
  )
