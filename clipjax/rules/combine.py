"""The two rules built from other rules: the lower of two limits, and a limit that takes effect later."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from clipjax.checks import check_whole
from clipjax.rules.base import Rule, as_rule, ask, no_limit


def minimum(rule_a: Rule | ArrayLike, rule_b: Rule | ArrayLike) -> Rule:
  """The lower limit of two rules, `min(limit_a, limit_b)`, and the lower target of those that would clip.

  Each rule sees the norms before the clip and keeps its own state: neither knows what the other clipped.

  Args:
    rule_a: a `Rule`, or a number, an array or a schedule.
    rule_b: the other one, of the same types.

  Returns:
    A `Rule` whose state is the pair of their states.

  Raises:
    ValueError: for a negative or NaN Python number.
    TypeError: for anything else that is not a threshold.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> from clipjax import rules
    >>> tx = clipjax.clip_by_global_norm(rules.minimum(rules.zscore(), 1.0))
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
    # Only a rule that would clip has a say in the target.
    limit = jnp.minimum(limit_a, limit_b)
    target_a = jnp.where(norms > limit_a, jnp.minimum(target_a, limit), limit)
    target_b = jnp.where(norms > limit_b, jnp.minimum(target_b, limit), limit)
    return limit, jnp.minimum(target_a, target_b), (state_a, state_b)

  return Rule(init, update)


def delayed(n: int, rule: Rule | ArrayLike) -> Rule:
  """Clips nothing for `n` finite steps, then clips by `rule`, which sees the norms from the first step on.

  Args:
    n: finite steps without a clip, >= 0.
    rule: a `Rule`, or a number, an array or a schedule.

  Returns:
    A `Rule` whose state is the number of steps so far, up to `n`, and the state of `rule`.

  Raises:
    ValueError: if `n` is negative, or `rule` is a negative or NaN Python number.
    TypeError: if `n` is not a Python integer, or `rule` is not a threshold.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> tx = clipjax.clip_by_global_norm(clipjax.rules.delayed(1, 1.0))
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
    # The inner rule has seen these norms, but its limit waits.
    return jnp.where(seen < n, no_limit(limit.dtype), limit), target, (jnp.minimum(seen + 1, n), inner_state)

  return Rule(init, update)
