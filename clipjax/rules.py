"""Rules: how a threshold follows the norms that it sees.

A rule is a pair of pure functions, as an `optax.GradientTransformation` is:

  init(shape, dtype) -> state
  update(norms, state, *, global_norm) -> (limit, target, state)

`norms` has shape () where the global norm is clipped and (n,) for n leaves or groups; `limit` and `target` have that
shape or (). A norm above `limit` is rescaled to `target`, which is at most `limit` and has no meaning elsewhere. A
rule is built of `jnp` operations with a state of fixed shapes and dtypes, and then works under jit, scan and vmap.

A step whose norms are not all finite changes no rule state, with one exception: a `StepCount` counts every step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import export
from jax.typing import ArrayLike

from clipjax import _functional, _leaves


class _Init(Protocol):
  def __call__(self, shape: tuple[int, ...], dtype: Any) -> Any: ...


class _Update(Protocol):
  def __call__(self, norms: jax.Array, state: Any, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, Any]: ...


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
    return value
  if callable(value):
    return schedule(value)
  if isinstance(value, tuple | list | dict) or value is None:
    raise TypeError(
      f"`{argument}` must be a number, a scalar array, a schedule or a clipjax.rules.Rule, got "
      f"{_leaves.describe(value)}: pass a float such as 1.0; a dict by label is for clip_by_group_norm."
    )
  _functional.check_threshold(value, argument)
  return _of_count(lambda _: value)


def _of_count(fn: Callable[[jax.Array], ArrayLike]) -> Rule:
  def init(shape: tuple[int, ...], dtype: Any) -> StepCount:
    del shape, dtype
    return StepCount(jnp.zeros((), jnp.int32))

  def update(norms: jax.Array, state: StepCount, *, global_norm: jax.Array) -> tuple[jax.Array, jax.Array, StepCount]:
    del global_norm
    limit = jnp.asarray(fn(state.steps)).astype(norms.dtype)
    if limit.shape != ():
      raise ValueError(
        f"a schedule must return a scalar, got {_leaves.describe(limit)}: for a threshold by group pass a dict."
      )
    return limit, limit, StepCount(optax.safe_increment(state.steps))

  return Rule(init, update)
