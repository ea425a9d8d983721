"""Ways through a checkpoint: `(saved, fresh, folder) -> restored`; the fresh tree has the structure that is read."""

import equinox as eqx
import flax.serialization
import orbax.checkpoint as ocp


def through_orbax(saved, fresh, folder):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "state", saved)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / "state", fresh)


def through_flax(saved, fresh, folder):
  (folder / "state").write_bytes(flax.serialization.to_bytes(saved))
  return flax.serialization.from_bytes(fresh, (folder / "state").read_bytes())


def through_equinox(saved, fresh, folder):
  eqx.tree_serialise_leaves(folder / "state", saved)
  return eqx.tree_deserialise_leaves(folder / "state", fresh)
