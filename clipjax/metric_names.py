"""The quantities that the states of this package report: the second part of every key, such as "grad/norm".

Each name is defined once, here. `metrics` and the run wing build their keys from these names.
"""

# Quantities of the last step, from a clip, a watch, `skip_steps` or `clip_effect`.
NORM = "norm"
NORM_CLIPPED = "norm_clipped"
MAX_NORM = "max_norm"
SCALE = "scale"
LOSS = "loss"
MAX_LOSS = "max_loss"
ZERO_FRACTION = "zero_fraction"
PARAM_NORM = "param_norm"
RATIO = "ratio"
NONFINITE = "nonfinite"
COSINE = "cosine"
GRAD_RATIO = "grad_ratio"
SHARE = "share"

# Quantities of all steps so far.
STEPS = "steps"
CLIP_FRACTION = "clip_fraction"
CLIPPED_STEPS = "clipped_steps"
NONFINITE_STEPS = "nonfinite_steps"
FRACTION = "fraction"
CONSECUTIVE = "consecutive"
WORST_NORM = "worst_norm"
WORST_STEP = "worst_step"

SO_FAR = frozenset(
  {STEPS, CLIP_FRACTION, CLIPPED_STEPS, NONFINITE_STEPS, FRACTION, CONSECUTIVE, WORST_NORM, WORST_STEP}
)
# In a run file, inf means no limit; in a state, the largest number of the dtype does.
LIMITS = frozenset({MAX_NORM, MAX_LOSS})
