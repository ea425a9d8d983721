"""Rules: how a threshold follows the norms that it sees.

A rule is a pair of pure functions, like an `optax.GradientTransformation`:

  init(shape, dtype) -> state
  update(norms, state, *, global_norm) -> (limit, target, state)

`norms` has shape () for a clip of the global norm and (n,) for n leaves or groups; `limit` and `target` have that shape
or (). A norm above `limit` is rescaled to `target`, which is at most `limit` and is ignored for norms at or under the
limit. A rule made of `jnp` operations on a state of fixed shapes and dtypes works under jit, scan and vmap.

Norms of exactly 0 enter no statistic, except for the first 0 of `ema_ratio`: otherwise a leaf whose gradient comes late
would be clipped to 0 for good. The largest number of the norms' dtype means no limit; your own rule may answer
`jnp.inf` instead.

A nonfinite step changes no rule state, with one exception: the count of a schedule moves at every step.
"""

from clipjax.rules.base import Rule as Rule
from clipjax.rules.combine import delayed as delayed
from clipjax.rules.combine import minimum as minimum
from clipjax.rules.ema_ratio import ema_ratio as ema_ratio
from clipjax.rules.percentile import percentile as percentile
from clipjax.rules.quantile_tracking import quantile_tracking as quantile_tracking
from clipjax.rules.rolling_sigma import rolling_sigma as rolling_sigma
from clipjax.rules.zscore import zscore as zscore
