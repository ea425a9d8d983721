"""Rules: how a threshold follows the norms that it sees.

A rule is a pair of pure functions, as an `optax.GradientTransformation` is:

  init(shape, dtype) -> state
  update(norms, state, *, global_norm) -> (limit, target, state)

`norms` has shape () where the global norm is clipped and (n,) for n leaves or groups; `limit` and `target` have that
shape or (). A norm above `limit` is rescaled to `target`, which is at most `limit` and has no meaning elsewhere. A
rule is built of `jnp` operations on a state of fixed shapes and dtypes, and then works under jit, scan and vmap.

A step whose norms are not all finite changes no rule state, with one exception: a `StepCount` counts every step.
"""

from clipjax._adaptive import EmaRatioState as EmaRatioState
from clipjax._adaptive import Ring as Ring
from clipjax._adaptive import ZScoreState as ZScoreState
from clipjax._adaptive import ema_ratio as ema_ratio
from clipjax._adaptive import percentile as percentile
from clipjax._adaptive import quantile_tracking as quantile_tracking
from clipjax._adaptive import rolling_sigma as rolling_sigma
from clipjax._adaptive import zscore as zscore
from clipjax._rule import Rule as Rule
from clipjax._rule import StepCount as StepCount
from clipjax._rule import after as after
from clipjax._rule import constant as constant
from clipjax._rule import lower as lower
from clipjax._rule import schedule as schedule
