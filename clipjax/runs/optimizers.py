"""Which optimizers divide the scale of the gradient out, by the classes of their states in a record.

Of such an optimizer the updates are the same where every gradient is a hundred times as large. `Run.optimizer` has the
classes; some optimizers, as `optax.sign_sgd`, keep no state of their own and cannot be told.
"""

from clipjax.runs.run import Run

# Those of Optax; `tests/test_suggest.py` scales gradients to see which belong here.
_SCALE_FREE = frozenset(
  {
    "COCOBState",
    "DAdaptAdamWState",
    "DoGState",
    "DoWGState",
    "FactoredState",
    "MomoAdamState",
    "MuonState",
    "ProdigyState",
    "ScaleByAdaDeltaState",
    "ScaleByAdamState",
    "ScaleByAdanState",
    "ScaleByAdemamixState",
    "ScaleByAmsgradState",
    "ScaleByBeliefState",
    "ScaleByDistanceOverGradientsState",
    "ScaleByLionState",
    "ScaleByNovogradState",
    "ScaleByRStdDevState",
    "ScaleByRStdDevWithCountState",
    "ScaleByRmsState",
    "ScaleByRmsWithCountState",
    "ScaleByRpropState",
    "ScaleByRssState",
    "ScaleBySM3State",
    "ScaleBySimplifiedAdEMAMixState",
  }
)


def scale_free_states(run: Run) -> tuple[str, ...]:
  """The classes of the recorded optimizer that divide the scale out; none where there are none, or it is not known."""
  return tuple(name for name in run.optimizer if name in _SCALE_FREE)
