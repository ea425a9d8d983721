"""The Rule pair, the two rules that no norm moves, the two that combine others, and the door to them all.

The contract of a rule is in `clipjax.rules`, where all of these are public.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.typing import ArrayLike

from clipjax import _functional, _leaves, _norms


class _Init(Protocol):
  def __call__(self, shape: tuple[int, ...], dtype: Any) -> Any: ...


class _Update(Protocol):
  def __call__(
    self, norms: jax.Array, state: Any, /, *, global_norm: jax.Array
  ) -> tuple[jax.Array, jax.Array, Any]: ...


class Rule(NamedTuple):
  """A threshold that may depend on the norms seen so far; pass it wherever `max_norm` is taken.

  Attributes:
    init: `init(shape, dtype) -> state`, shape and dtype being those of the norms.
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
  """The state of a rule that depends on time alone; unlike any other, it also moves on a step that is not finite.

  Attributes:
    steps: int32, shape (): the `update` calls so far.
  """

  steps: jax.Array


export.register_namedtuple_serialization(StepCount, serialized_name="clipjax.rules.StepCount")


def constant(value: ArrayLike) -> Rule:
  """The rule whose limit and target are always `value`; what a number for `max_norm` stands for.

  Args:
    value: number or scalar array >= 0; a traced negative one counts as 0, inf never clips.

  Returns:
    A `Rule` whose state is a `StepCount`, as that of `schedule`: a run can resume with the one for the other.

  Raises:
    ValueError: for a negative or NaN Python number.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(clipjax.rules.constant(1.0))
    >>> clipped, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> print(clipped)
    [0.6 0.8]
  """
  _functional.check_threshold(value, "value")
  return _of_count(lambda _: value)


def schedule(fn: optax.Schedule) -> Rule:
  """The rule whose limit and target are `fn(count)`, count being the number of steps before this one.

  Args:
    fn: an Optax schedule, `count -> number >= 0`; a negative number counts as 0, NaN makes the step a nonfinite one.

  Returns:
    A `Rule` whose state is a `StepCount`. It counts every step, as Optax's schedules do.

  Raises:
    TypeError: if `fn` is not callable.

  Example:
    >>> import jax.numpy as jnp, optax, clipjax
    >>> tx = clipjax.clip_by_global_norm(optax.exponential_decay(5.0, transition_steps=1, decay_rate=0.5))
    >>> state = tx.init(jnp.zeros(2))
    >>> for _ in range(3):
    ...   clipped, state = tx.update(jnp.array([3.0, 4.0]), state)
    ...   print(clipped)
    [3. 4.]
    [1.5 2. ]
    [0.75 1.  ]
  """
  if not callable(fn):
    raise TypeError(
      f"`fn` must be a schedule, count -> number, got {_leaves.describe(fn)}: for a number use rules.constant."
    )
  return _of_count(fn)


def as_rule(value: Any, argument: str) -> Rule:
  """The rule that a number, an array, a schedule or a rule stands for: the door through which all thresholds come."""
  if isinstance(value, Rule):
    for field in value._fields:
      if not callable(getattr(value, field)):
        raise TypeError(
          f"`{argument}` must be a Rule of two functions, got {_leaves.describe(getattr(value, field))} as its "
          f"`{field}`: see clipjax.rules.Rule."
        )
    return value
  if callable(value):
    return schedule(value)
  if isinstance(value, tuple | list | dict) or value is None:
    raise TypeError(
      f"`{argument}` must be a number, a scalar array, a schedule or a clipjax.rules.Rule, got "
      f"{_leaves.describe(value)}: pass a float such as 1.0; a dict by label is for clip_by_group_norm."
    )
  number = _functional.check_threshold(value, argument)
  return _of_count(lambda _: number)


def ask(rule: Rule, norms: jax.Array, state: Any, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
  """The limit, the target and the next state, checked: a rule may be the user's own."""
  answer = rule.update(norms, state, global_norm=global_norm)
  if not isinstance(answer, tuple) or len(answer) != 3:
    got = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else _leaves.describe(answer)
    raise TypeError(f"a rule's `update` must return (limit, target, state), got {got}: return all three.")
  limit, target, new = answer
  if not _is_like(new, state):
    raise ValueError(
      f"a rule's `update` must return a state like the one that it was given, {_outline(state)}, got {_outline(new)}: "
      "keep its structure and shapes."
    )
  return _checked_limit(limit, norms, "limit"), _checked_limit(target, norms, "target"), new


def _checked_limit(answer: Any, norms: jax.Array, what: str) -> jax.Array:
  """What a rule answered, in the dtype of the norms; raises where its shape is neither () nor theirs."""
  number = isinstance(answer, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(answer, bool)
  if not number or jnp.iscomplexobj(answer):
    raise TypeError(
      f"a rule's `{what}` must be a real number or an array of them, got {_leaves.describe(answer)}: compute it from "
      "`norms`, with jnp.inf for no limit."
    )
  value: jax.Array = jnp.asarray(answer).astype(norms.dtype)
  if value.shape not in ((), norms.shape):
    raise ValueError(
      f"a rule's `{what}` must have shape () or that of the norms, {norms.shape}, got {value.shape}: "
      "compute it from `norms` element by element."
    )
  return value


class StateCheck:
  """Compares states with what the `init` of a rule gives, which it is asked for once for each shape."""

  def __init__(self, rule: Rule, field: str):
    self._rule = rule
    self._field = field
    self._wanted: dict[tuple[int, ...], Any] = {}

  def check(self, state: Any, shape: tuple[int, ...]) -> None:
    """Raises for the state of another rule, or of one with another window."""
    if shape not in self._wanted:
      self._wanted[shape] = jax.eval_shape(lambda: self._rule.init(shape, _norms.norm_dtype()))
    wanted = self._wanted[shape]
    if not _is_like(state, wanted):
      raise ValueError(
        f"`state.{self._field}` must be as the rule's `init` gave it, {_outline(wanted)}, got {_outline(state)}: pass "
        "the state of this transformation, or call `init` anew."
      )


def same_structure(state: Any, wanted: Any) -> bool:
  """Whether two states are trees of one structure, whatever their leaves are."""
  structures: list[Any] = [jax.tree.structure(x) for x in (state, wanted)]
  return bool(structures[0] == structures[1])


def _is_like(state: Any, wanted: Any) -> bool:
  if not same_structure(state, wanted):
    return False
  return all(  # An eager `update` asks this at every step: the usual case is two attributes.
    getattr(x, "shape", ()) == getattr(y, "shape", ())
    and (getattr(x, "dtype", None) == getattr(y, "dtype", float) or _kind(x) == _kind(y))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
  )


def _outline(state: Any) -> str:
  """The type of a state, and kind and shape of its arrays, as in "Ring(float(1000,), int(), int())"."""
  kind = "array" if jax.tree_util.all_leaves([state]) else type(state).__name__
  return f"{kind}({', '.join(f'{_kind(x)}{jnp.shape(x)}' for x in jax.tree.leaves(state))})"


def _kind(x: Any) -> str:
  dtype = jax.dtypes.result_type(x)
  kinds = {"float": np.floating, "int": np.integer, "bool": np.bool_}
  return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), str(dtype))


def keep_where(bad: jax.Array, old: Any, new: Any) -> Any:
  """The old state of a rule where `bad`, except for counts of steps, which always move."""

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
    value = fn(state.steps)
    number = isinstance(value, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not number or jnp.iscomplexobj(value):
      raise TypeError(
        f"a schedule must return a real number, got {_leaves.describe(value)}: call a rule of clipjax.rules "
        "first, as in rules.zscore()."
      )
    limit = jnp.asarray(value, norms.dtype)
    if limit.shape != ():
      raise ValueError(
        f"a schedule must return a scalar, got {_leaves.describe(limit)}: for a threshold by group pass a dict."
      )
    return limit, limit, StepCount(optax.safe_increment(state.steps))

  return Rule(init, update)


def lower(rule_a: Rule | ArrayLike, rule_b: Rule | ArrayLike) -> Rule:
  """The rule that asks two rules and takes the lower limit, and the lower target of those that would clip.

  Each sees the norms as they are, and keeps its own state: neither knows what the other clipped.

  Args:
    rule_a: a `Rule`, or what stands for one: a number, an array, a schedule.
    rule_b: likewise.

  Returns:
    A `Rule` whose state is the pair of their states.

  Raises:
    TypeError: for what is no threshold.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> from clipjax import rules
    >>> tx = clipjax.clip_by_global_norm(rules.lower(rules.zscore(), 1.0))
    >>> clipped, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> print(clipped)
    [0.6 0.8]
  """
  a, b = as_rule(rule_a, "rule_a"), as_rule(rule_b, "rule_b")

  def init(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    return a.init(shape, dtype), b.init(shape, dtype)

  def update(
    norms: jax.Array, state: tuple[Any, Any], *, global_norm: jax.Array
  ) -> tuple[jax.Array, jax.Array, tuple[Any, Any]]:
    limit_a, target_a, state_a = ask(a, norms, state[0], global_norm)
    limit_b, target_b, state_b = ask(b, norms, state[1], global_norm)
    limit = jnp.minimum(limit_a, limit_b)
    target_a = jnp.where(norms > limit_a, jnp.minimum(target_a, limit), limit)
    target_b = jnp.where(norms > limit_b, jnp.minimum(target_b, limit), limit)
    return limit, jnp.minimum(target_a, target_b), (state_a, state_b)

  return Rule(init, update)


def after(n: int, rule: Rule | ArrayLike) -> Rule:
  """The rule that clips nothing for `n` finite steps, and what `rule` says from then on.

  `rule` sees the norms from the first step on.

  Args:
    n: finite steps without a clip, >= 0.
    rule: a `Rule`, or what stands for one: a number, an array, a schedule.

  Returns:
    A `Rule` whose state is the number of steps so far, up to `n`, and the state of `rule`.

  Raises:
    ValueError: if `n` is negative.
    TypeError: if `n` is no Python integer, or `rule` no threshold.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(clipjax.rules.after(1, 1.0))
    >>> state = tx.init(jnp.zeros(2))
    >>> for _ in range(2):
    ...   clipped, state = tx.update(jnp.array([3.0, 4.0]), state)
    ...   print(clipped)
    [3. 4.]
    [0.6 0.8]
  """
  check_whole(n, "n", 0)
  inner = as_rule(rule, "rule")

  def init(shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, Any]:
    return jnp.zeros((), jnp.int32), inner.init(shape, dtype)

  def update(
    norms: jax.Array, state: tuple[jax.Array, Any], *, global_norm: jax.Array
  ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, Any]]:
    seen, inner_state = state
    limit, target, inner_state = ask(inner, norms, inner_state, global_norm)
    return jnp.where(seen < n, jnp.inf, limit), target, (jnp.minimum(seen + 1, n), inner_state)

  return Rule(init, update)


# Checks of the arguments of rules: Python numbers are held to their range, what is traced is not ---------------------


def check_number(
  value: Any, argument: str, low: float, high: float, *, open_low: bool = False, finite: bool = False
) -> None:
  """Raises unless `value` is a number in its range, or an array."""
  if isinstance(value, jax.Array):
    return
  below = f"> {low:g}" if open_low else f">= {low:g}"
  rule = f"`{argument}` must be a {'finite ' if finite else ''}number {below}"
  rule += "" if math.isinf(high) else f" and <= {high:g}"
  if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
    raise TypeError(f"{rule}, got {_leaves.describe(value)}: pass a float.")
  if not (low < value if open_low else low <= value) or not value <= high or (finite and math.isinf(value)):
    raise ValueError(f"{rule}, got {value}: choose one in that range.")


def check_whole(value: Any, argument: str, low: int, high: int | None = None) -> None:
  """Raises unless `value` is a Python integer in its range."""
  rule = f"`{argument}` must be an integer >= {low}" + ("" if high is None else f" and <= {high}")
  if isinstance(value, jax.Array):
    raise TypeError(f"{rule}, got {_leaves.describe(value)}: pass a Python integer; {_leaves.STATIC_ARGS_REMEDY}.")
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise TypeError(f"{rule}, got {_leaves.describe(value)}: pass a Python integer.")
  if value < low or value > (2**31 - 1 if high is None else high):
    raise ValueError(f"{rule}, got {value}: choose one in that range.")


def check_choice(value: Any, argument: str, choices: tuple[str, ...]) -> None:
  """Raises unless `value` is one of some strings."""
  if not isinstance(value, str) or value not in choices:
    names = ", ".join(f'"{name}"' for name in choices)
    raise ValueError(f"`{argument}` must be one of {names}, got {_leaves.describe_choice(value)}: choose one of them.")


def check_flag(value: Any, argument: str) -> None:
  """Raises unless `value` is a Python bool."""
  if not isinstance(value, bool):
    raise TypeError(f"`{argument}` must be True or False, got {_leaves.describe(value)}: pass one of them.")
