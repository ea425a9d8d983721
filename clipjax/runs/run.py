"""A recorded run: columns of numpy arrays over its steps.

A file becomes one by `clipjax.runs.read_run`, what a `jax.lax.scan` returned by `Run.from_arrays`. numpy alone.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipjax.runs.arrays import fields_of
from clipjax.runs.kinds import Bools, Floats, Ints, Objects
from clipjax.runs.schema import UNITS, name_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
  """A recorded run; made by `read_run` or `from_arrays`. n is the number of steps, m of those with numbers by leaf.

  `run[key]` is a column, or for a leaf, as in `run["grad/norm/w"]`, its numbers spread over all steps, NaN where none
  were recorded. `run.keys()` are the keys of both kinds, `key in run` and `len(run)`, the number of steps, work too.
  A slice of stacked layers is a leaf, as in `run["grad/norm/blocks/w[3]"]`.

  Attributes:
    path: the file; empty where the run was not read from one.
    steps: int64, shape (n,): the numbers that were pushed, ascending, each once; not every one needs to be there.
    columns: float64, shape (n,), by key: NaN where nothing was recorded or the number was not finite. "time" is the
      time of the push in seconds since 1970, "update" how many updates the optimizer had counted.
    flags: bool, shape (n,), by key: True where a number was recorded and was inf or NaN; only keys that have such.
    leaves: names of the leaves or groups, by name of the clip or watch, such as "grad".
    vectors: by `<name>/<quantity>`: int64 (m,), the steps, and float64 (m, leaves), the numbers, inf for what was not
      finite, NaN for a leaf that was not recorded there, as after the model has changed.
    weights: the histogram of log10|w| over the parameters: int64 (m,), steps; float64 (k + 1,), edges of its bins;
      float64 (m, k), counts. None where no parameters were given.
    parameters: number of the parameters; None where none were given.
    batches: what the caller calls the batches: object, shape (n,), an int, a string, a tuple of these where a row is of
      several micro-batches, or None where it has none. None where no row has one.
    superseded: how many rows of the file are left out, as the run went back to an earlier step.
    unreadable: how many lines of the file were torn by a crash, or hold nothing of a run.
    optimizer: the classes of the states that were pushed, such as "ScaleByAdamState", without those of this package;
      empty where they are not known.

  Example:
    >>> import os, tempfile, jax.numpy as jnp, clipjax
    >>> tx, grads = clipjax.clip_by_leaf_norm(1.0), {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
    >>> with clipjax.runs.Recorder(path) as recorder:
    ...   recorder.push(1, tx.update(grads, tx.init(grads))[1], loss=0.5)
    >>> run = clipjax.runs.read_run(path)
    >>> len(run), "loss" in run, run["grad/norm"], run["grad/norm/w"]
    (1, True, array([13.]), array([5.]))
  """

  path: str
  steps: Ints
  columns: dict[str, Floats]
  flags: dict[str, Bools]
  leaves: dict[str, tuple[str, ...]]
  vectors: dict[str, tuple[Ints, Floats]]
  weights: tuple[Ints, Floats, Floats] | None
  parameters: int | None
  batches: Objects | None = None
  superseded: int = 0
  unreadable: int = 0
  optimizer: tuple[str, ...] = ()

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, Any], steps: Any = None) -> "Run":
    """The run whose steps a `jax.lax.scan` has returned: an array for each number, with an entry for each step.

    Numbers by leaf, as `clipjax.metrics(state, per_leaf=True)` names them, become `vectors`, whose leaves are in the
    order of their names, "w[2]" before "w[10]". All else becomes `columns`. What is not finite is flagged. A limit that
    stands for none, as in `clipjax.metrics`, is inf, which a run has as NaN with a flag.

    Args:
      arrays: 1-D arrays of one length by key, such as "grad/norm" or "loss": of JAX or numpy, or lists.
      steps: the number of each step, whole and ascending; None: 1, 2, ....

    Raises:
      TypeError: for what is no dict of real numbers, and for steps that are not whole.
      ValueError: for arrays of other lengths, scalars, arrays with leading axes, as of runs under `vmap`, and none at
        all; for steps that do not ascend or are not as many; for a key that means something else in a run.

    Example:
      >>> import jax, jax.numpy as jnp, clipjax
      >>> tx, params = clipjax.clip_by_leaf_norm(1.0), {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> def step(state, scale):
      ...   _, state = tx.update({"w": jnp.array([3.0, 4.0]) * scale, "b": jnp.ones(1)}, state)
      ...   return state, {"loss": 1 / scale, **clipjax.metrics(state, per_leaf=True)}
      >>> _, arrays = jax.lax.scan(step, tx.init(params), jnp.array([1.0, 2.0, 4.0]))
      >>> run = clipjax.runs.Run.from_arrays(arrays)
      >>> run.steps, run["loss"], run.leaves["grad"], run["grad/norm/w"]
      (array([1, 2, 3]), array([1.  , 0.5 , 0.25]), ('b', 'w'), array([ 5., 10., 20.]))
    """
    return cls(**fields_of(arrays, steps))

  def keys(self) -> tuple[str, ...]:
    """The columns, then the numbers by leaf."""
    by_leaf = (f"{key}/{leaf}" for key in self.vectors for leaf in self.leaves[name_of(key)])
    return tuple(dict.fromkeys((*self.columns, *by_leaf)))

  def __getitem__(self, key: str) -> Floats:
    if key in self.columns:
      return self.columns[key]
    if (place := self._place(key)) is None:
      near = difflib.get_close_matches(str(key), self.keys(), 3, 0.5) or list(self.columns)
      raise KeyError(f"{self.path or 'the run'} has no {key!r}; it has {', '.join(map(repr, near[:10]))}")
    vector, i = place
    steps, values = self.vectors[vector]
    out = np.full(self.steps.shape, np.nan)
    out[np.searchsorted(self.steps, steps)] = values[:, i]
    return out

  def __contains__(self, key: object) -> bool:
    return key in self.columns or self._place(key) is not None

  def __len__(self) -> int:
    return len(self.steps)

  def __repr__(self) -> str:
    lost = "".join(f", {count} {what}" for what, count in self._lost() if count)
    return f"Run({self.path!r}, {len(self)} steps, {len(self.columns)} columns{lost})"

  def _lost(self) -> tuple[tuple[str, int], ...]:
    return ("superseded rows", self.superseded), ("unreadable lines", self.unreadable)

  def _place(self, key: object) -> tuple[str, int] | None:
    """The vector that a key such as "grad/norm/w" belongs to, and the place of the leaf in it."""
    if not isinstance(key, str):
      return None
    for ending in UNITS:  # Of blocks that are not those of the watch of this name.
      for vector in self.vectors:
        name, _, quantity = vector.rpartition("/")
        start, leaves = f"{name.removesuffix(ending)}/{quantity}/", self.leaves[name]
        if name.endswith(ending) and key.startswith(start) and key[len(start) :] in leaves:
          return vector, leaves.index(key[len(start) :])
    return None


def rows_before(run: Run, step: int) -> Run:
  """The rows of a run before a step."""
  count = int(np.searchsorted(run.steps, step))
  vectors = {key: (steps[steps < step], values[steps < step]) for key, (steps, values) in run.vectors.items()}
  return dataclasses.replace(
    run,
    steps=run.steps[:count],
    columns={key: column[:count] for key, column in run.columns.items()},
    flags={key: column[:count] for key, column in run.flags.items()},
    vectors={key: vector for key, vector in vectors.items() if vector[0].size},
    batches=None if run.batches is None else run.batches[:count],
  )
