"""The `Rule` pair, the conversion of every threshold to a rule, and the checks of a rule's answers.

`clipjax.rules` states the contract of a rule and exports the public ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.typing import ArrayLike

from clipjax.checks import ZERO_OR_INF, check_takes, check_threshold, describe, within_range
from clipjax.norms.sums import norm_dtype


class _Init(Protocol):
  def __call__(self, shape: tuple[int, ...], dtype: Any) -> Any: ...


class _Update(Protocol):
  def __call__(
    self, norms: jax.Array, state: Any, /, *, global_norm: jax.Array
  ) -> tuple[jax.Array, jax.Array, Any]: ...


class Rule(NamedTuple):
  """A threshold that may depend on the norms seen so far; pass it as any `max_norm`.

  Attributes:
    init: `init(shape, dtype) -> state`, with the shape and dtype of the norms.
    update: `update(norms, state, *, global_norm) -> (limit, target, state)`.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> from clipjax import rules
    >>> def twice_the_last():
    ...   def init(shape, dtype):
    ...     return jnp.full(shape, jnp.inf, dtype)
    ...   def update(norms, last, *, global_norm):
    ...     return 2 * last, 2 * last, jnp.minimum(norms, 2 * last)
    ...   return rules.Rule(init, update)
    >>> tx = clipjax.clip_by_global_norm(twice_the_last())
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in (jnp.array([3.0, 4.0]), jnp.array([30.0, 40.0])):
    ...   clipped, state = tx.update(g, state)
    ...   print(clipped)
    [3. 4.]
    [6. 8.]
  """

  init: _Init
  update: _Update


class StepCount(NamedTuple):
  """The state of a rule that depends only on time; unlike any other state, it also moves at a nonfinite step.

  Attributes:
    schedule_count: int32, shape (): the `update` calls so far. The name is unique among all states, which lets
      `optax.tree.get` and `optax.tree.set` find it.
  """

  schedule_count: jax.Array


export.register_namedtuple_serialization(StepCount, serialized_name="clipjax.rules.StepCount")


def no_limit(dtype: Any) -> Any:
  """The limit that no norm exceeds: the largest number of the dtype, because no state may hold an inf."""
  return jnp.finfo(dtype).max


def is_no_limit(limit: Any) -> Any:
  """Whether a limit on the host means no limit; the state may be older than the x64 setting."""
  return limit >= float(np.finfo(np.float32).max)


def number(value: Any, dtype: Any) -> jax.Array:
  """A rule's number or array, in the dtype of the norms."""
  out: jax.Array = jnp.asarray(within_range(value), dtype)
  return out


def as_rule(value: Any, argument: str, *, remedy: str = ZERO_OR_INF, or_else: str = "") -> Rule:
  """Turns a number, an array, a schedule or a rule into a rule: every threshold goes through here.

  `remedy` is for a number out of range; `or_else` extends the remedy for an array of numbers.
  """
  if isinstance(value, Rule):
    for field in value._fields:
      if not callable(getattr(value, field)):
        raise TypeError(
          f"`{argument}` must be a Rule of two functions, got {describe(getattr(value, field))} as its "
          f"`{field}`: see clipjax.rules.Rule."
        )
    check_takes(value.init, f"the `init` of `{argument}`", "shape, dtype", "jnp.zeros(shape, dtype)")
    check_takes(value.update, f"the `update` of `{argument}`", "norms, state", "", keywords=("global_norm",))
    return value
  if callable(value):
    check_takes(value, f"the schedule `{argument}`", "count", "0.1 * count")
    return _of_count(value)
  if isinstance(value, tuple | list | dict) or value is None:
    raise TypeError(
      f"`{argument}` must be a number, a scalar array, a schedule or a clipjax.rules.Rule, got "
      f"{describe(value)}: pass a float such as 1.0; a dict by label is for clip_by_group_norm."
    )
  threshold = check_threshold(value, argument, remedy=remedy, or_else=or_else)
  return _of_count(lambda _: threshold)


def ask(rule: Rule, norms: jax.Array, state: Any, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
  """The limit, the target and the next state, checked because a rule may be the user's own; inf becomes `no_limit`."""
  answer = rule.update(norms, state, global_norm=global_norm)
  if not isinstance(answer, tuple) or len(answer) != 3:
    got = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else describe(answer)
    raise TypeError(f"a rule's `update` must return (limit, target, state), got {got}: return all three.")
  # A state that changes its structure would fail only later, in a scan or at a restore.
  limit, target, new = answer
  if not _is_like(new, state):
    raise ValueError(
      f"a rule's `update` must return a state like the one it was given, {_outline(state)}, got {_outline(new)}: "
      "keep its structure and shapes."
    )
  # Keep limit and target one array if they are: the engine then skips the work for the target.
  checked = _checked_limit(limit, norms, "limit")
  return checked, checked if target is limit else _checked_limit(target, norms, "target"), new


def _checked_limit(answer: Any, norms: jax.Array, what: str) -> jax.Array:
  """A rule's answer in the dtype of the norms; raises unless its shape is () or the shape of the norms."""
  if not _is_real(answer):
    raise TypeError(
      f"a rule's `{what}` must be a real number or an array of them, got {describe(answer)}: compute it from "
      "`norms`, with jnp.inf for no limit."
    )
  # A host number is clamped to the range first, to avoid NumPy's warning.
  value = number(answer, norms.dtype) if jnp.ndim(answer) == 0 else jnp.asarray(answer).astype(norms.dtype)
  if value.shape not in ((), norms.shape):
    raise ValueError(
      f"a rule's `{what}` must have shape () or the shape of the norms, {norms.shape}, got {value.shape}: "
      "compute it from `norms` element by element."
    )
  most = no_limit(value.dtype)
  # Not `jnp.minimum`, because NaN must stay: before JAX 0.9, XLA folds a constant `minimum` with NaN to a number.
  return jnp.where(value > most, most, value)


def _is_real(answer: Any) -> bool:
  is_number = isinstance(answer, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(answer, bool)
  return is_number and not jnp.iscomplexobj(answer)


class StateCheck:
  """Compares states with the `init` of a rule, which is evaluated once for each shape and dtype."""

  def __init__(self, rule: Rule, field: str):
    self._rule = rule
    self._field = field
    self._wanted: dict[tuple[tuple[int, ...], Any], Any] = {}

  def fitted(self, state: Any, shape: tuple[int, ...]) -> Any:
    """The state in the dtypes of `init`; raises for the state of another rule, or of one with another window."""
    dtype = norm_dtype()
    # An eager `update` comes here at every step, so keep what `init` returns for each shape.
    if (shape, dtype) not in self._wanted:
      self._wanted[shape, dtype] = jax.eval_shape(lambda: self._rule.init(shape, dtype))
    wanted = self._wanted[shape, dtype]
    if not _is_like(state, wanted):
      raise ValueError(
        f"`state.{self._field}` must match what the rule's `init` returned, {_outline(wanted)}, got {_outline(state)}: "
        "pass the state of this transformation, or call `init` again."
      )
    return jax.tree.map(lambda x, like: in_dtype(x, like.dtype), state, wanted)


def in_dtype(x: Any, dtype: Any) -> Any:
  """A number of a state in its own dtype: it may be stored in another, from before x64 was set, or as bfloat16."""
  return x if getattr(x, "dtype", dtype) == dtype else jnp.asarray(x).astype(dtype)


def same_structure(state: Any, wanted: Any) -> bool:
  """Whether two states have the same tree structure; leaves may differ."""
  structures: list[Any] = [jax.tree.structure(x) for x in (state, wanted)]
  return bool(structures[0] == structures[1])


def _is_like(state: Any, wanted: Any) -> bool:
  if not same_structure(state, wanted):
    return False
  return all(  # An eager `update` runs this at every step: the usual case reads just two attributes.
    getattr(x, "shape", ()) == getattr(y, "shape", ())
    and (getattr(x, "dtype", None) == getattr(y, "dtype", float) or _kind(x) == _kind(y))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
  )


def _outline(state: Any) -> str:
  """The type of a state, with the kind and shape of its arrays, such as "Ring(float(1000,), int(), int())"."""
  kind = "array" if jax.tree_util.all_leaves([state]) else type(state).__name__
  return f"{kind}({', '.join(f'{_kind(x)}{jnp.shape(x)}' for x in jax.tree.leaves(state))})"


def _kind(x: Any) -> str:
  dtype = jax.dtypes.result_type(x)
  kinds = {"float": np.floating, "int": np.integer, "bool": np.bool_}
  return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), str(dtype))


def keep_where(bad: jax.Array, old: Any, new: Any) -> Any:
  """The old state of a rule if `bad`, else the new one; counts of steps always move."""

  def keep(before: Any, after: Any) -> Any:
    if isinstance(before, StepCount):
      return after
    before = jnp.asarray(before)
    return jnp.where(bad, before, jnp.asarray(after).astype(before.dtype))

  return jax.tree.map(keep, old, new, is_leaf=lambda x: isinstance(x, StepCount))


def _of_count(fn: Callable[[jax.Array], ArrayLike]) -> Rule:
  def init(shape: tuple[int, ...], dtype: Any) -> StepCount:
    del shape, dtype
    return StepCount(jnp.zeros((), jnp.int32))

  def update(norms: jax.Array, state: StepCount, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, StepCount]:
    del global_norm
    value = fn(state.schedule_count)
    if not _is_real(value):
      raise TypeError(
        f"a schedule must return a real number, got {describe(value)}: call a rule of clipjax.rules "
        "first, as in rules.zscore()."
      )
    if jnp.shape(value) != ():
      raise ValueError(
        f"a schedule must return a scalar, got {describe(value)}: for thresholds by group pass a dict to "
        "clip_by_group_norm."
      )
    limit = number(value, norms.dtype)
    return limit, limit, StepCount(optax.safe_increment(state.schedule_count))

  return Rule(init, update)
