"""Programs that run in several processes together, as on several machines."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax

TESTS = pathlib.Path(__file__).parent
# How a program begins, of which each of two processes has four of eight devices.
TWO_OF_FOUR_DEVICES = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], *map(int, sys.argv[2:]))
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
"""
_GLOO = re.compile(r"\[Gloo\]|peer ranks")  # Its threads write into each other's lines.


def everywhere(tree, mesh):
  """The tree where every process can read it."""
  if jax.process_count() == 1:
    return tree
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(lambda tree: tree, out_shardings=whole)(tree)


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def outputs_of_processes(code, processes, folder, timeout=120):
  """What each process prints, without what Gloo does; raises with their stderr where one fails or takes too long.

  Each gets the address of the first, the number of processes and its own number as arguments.
  """
  folder.mkdir()
  (folder / "program.py").write_text(code, encoding="utf-8")
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), env.get("PYTHONPATH", "")])
  address = f"127.0.0.1:{free_port()}"
  running = []
  with contextlib.ExitStack() as files:
    for rank in range(processes):
      out, err = (files.enter_context((folder / f"{rank}.{kind}").open("w")) for kind in ("out", "err"))
      command = [sys.executable, "-W", "error", folder / "program.py", address, str(processes), str(rank)]
      running.append(subprocess.Popen(command, stdout=out, stderr=err, env=env, cwd=folder))
    deadline = time.monotonic() + timeout
    try:
      # One that fails leaves the others waiting for it.
      while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
        if time.monotonic() > deadline:
          break
        time.sleep(0.05)
    finally:
      codes = [p.poll() for p in running]
      for p in running:
        p.kill()
        p.wait()
  if any(codes) or None in codes:
    errors = [f"process {rank}: {(folder / f'{rank}.err').read_text()}" for rank in range(processes)]
    raise AssertionError(f"exit codes {codes} within {timeout} s\n" + "\n".join(errors))
  outputs = [(folder / f"{rank}.out").read_text() for rank in range(processes)]
  return ["".join(line for line in out.splitlines(True) if not _GLOO.search(line)) for out in outputs]
