"""Which optimizers divide out the scale of the gradient, by the classes of their recorded states.

Such an optimizer makes the same updates when every gradient is a hundred times larger. `Run.optimizer` has the classes.
Some optimizers, such as `optax.sign_sgd`, keep no state of their own and cannot be recognized.
"""

from clipjax.runs.run import Run

# States of Optax; `tests/test_suggest.py` scales gradients to find out which belong here.
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
  """The recorded classes that divide out the scale; empty if there are none or the optimizer is unknown."""
  return tuple(name for name in run.optimizer if name in _SCALE_FREE)
