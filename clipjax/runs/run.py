"""A recorded run: columns of numpy arrays over its steps.

`clipjax.runs.read_run` makes a `Run` of a file, `Run.from_arrays` of the arrays that a `jax.lax.scan` returned. numpy
alone.
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
  """A recorded run, made by `read_run` or `from_arrays`. n is the number of steps, m the number with values by leaf.

  `run[key]` is a column. For a leaf, as in `run["grad/norm/w"]`, it spreads the recorded numbers over all steps, with
  NaN at the others. A key that the run does not have raises a KeyError, which names similar ones. `run.keys()` lists
  keys of both kinds; `key in run` and `len(run)`, the number of steps, work too. A slice of stacked layers is a leaf,
  as in `run["grad/norm/blocks/w[3]"]`.

  Attributes:
    path: the file; empty if the run was not read from one.
    steps: int64, shape (n,): the step numbers that were pushed, ascending and unique, possibly with gaps.
    columns: float64, shape (n,), by key: NaN where nothing was recorded or the number was nonfinite. "time" is the time
      of the push in seconds since 1970, "update" the number of updates that the optimizer had counted.
    flags: bool, shape (n,), by key: True where the recorded number was inf or NaN; only keys with such numbers.
    leaves: names of the leaves or groups, by the name of the clip or watch, such as "grad".
    vectors: by `<name>/<quantity>`: int64 (m,), the steps, and float64 (m, leaves), the numbers: inf for a nonfinite
      one, NaN for a leaf that was not recorded at that step, for example because the model changed.
    weights: the histogram of log10|w| over the parameters: int64 (m,), steps; float64 (k + 1,), edges of its bins;
      float64 (m, k), counts. None if no parameters were given.
    parameters: the number of parameters; None if none were given.
    batches: object, shape (n,): the caller's name for each batch, an int or a string; a tuple of them for several
      micro-batches; None for a row without one. None if no row has one.
    superseded: how many rows of the file are left out because the run went back to an earlier step.
    unreadable: how many lines of the file were torn by a crash, or hold neither a row nor a header.
    optimizer: the classes of the states that were pushed, such as "ScaleByAdamState", except those of this package;
      empty if unknown.

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
    """Makes a run of what a `jax.lax.scan` returned: one array per recorded number, with one entry per step.

    Numbers by leaf, named as in `clipjax.metrics(state, per_leaf=True)`, become `vectors`. Their leaves are sorted by
    name, "w[2]" before "w[10]". Everything else becomes `columns`. Nonfinite numbers are flagged. A limit that means
    "no limit" in `clipjax.metrics` counts as inf, which a run stores as NaN with a flag.

    Args:
      arrays: 1-D arrays of equal length by key, such as "grad/norm" or "loss": JAX or numpy arrays, or lists.
      steps: the number of each step, whole and ascending; None means 1, 2, ....

    Raises:
      TypeError: for anything but a dict of real numbers, and for steps that are not whole.
      ValueError: for an empty dict, empty arrays, scalars, arrays of different lengths, or arrays with leading axes, as
        for runs under `vmap`; for steps that do not ascend or differ in number; for a key that a run itself uses.

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
    """The keys of the columns, then the keys of the numbers by leaf."""
    by_leaf = (f"{key}/{leaf}" for key in self.vectors for leaf in self.leaves[name_of(key)])
    return tuple(dict.fromkeys((*self.columns, *by_leaf)))

  def __getitem__(self, key: str) -> Floats:
    if key in self.columns:
      return self.columns[key]
    if (place := self._place(key)) is None:
      near = difflib.get_close_matches(str(key), self.keys(), 3, 0.5) or list(self.columns)
      raise KeyError(f"{self.path or 'the run'} has no {key!r}; it has {', '.join(map(repr, near[:10]))}")
    vector, i = place  # A leaf: its recorded numbers, spread over all steps.
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
    """The vector that a key such as "grad/norm/w" belongs to, and the index of the leaf in it."""
    if not isinstance(key, str):
      return None
    for ending in UNITS:  # The unit marks blocks that differ from those of the watch of this name.
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
