# "No FAIL and no WARN."
assert {finding.level for finding in report.findings} == {"INFO"}

# "The 90th percentile"; "for another rate it keeps the step budget".
here = clipjax.runs.suggest_max_norm(run)
there = clipjax.runs.suggest_max_norm(run, learning_rate=0.25, new_learning_rate=2.5)
assert "90th percentile" in here.reason
assert there.max_norm * 2.5 <= here.max_norm * 0.25

# "12 thresholds, a factor of 2 apart"; "15 learning rates".
assert THRESHOLDS.size == 12 and RATES.size == 15
assert (THRESHOLDS[1:] == 2 * THRESHOLDS[:-1]).all()

for (name, k), (base, losses, *_) in cells.items():
  # The base rate is not at the end of those tried.
  assert RATES[0] < base < RATES[-1]
  # The rule of thumb of four_models.py, as the suggestion quotes it.
  low, high = MODELS[name].thumb
  assert f"{low:g} to {high:g}" in str(clipjax.runs.suggest_max_norm(run, model=name))
  # "At the base rate no clip is needed", and at ten times that rate it is; nor does the rule of thumb hold there.
  assert holds[name, k][2] == (k == 1)
  assert k == 1 or not holds[name, k][1]
  # "At ten times the rate, only thresholds below 1 hold."
  assert good[name, k].any()
  assert k == 1 or THRESHOLDS[good[name, k]].max() < 1
  # "At the base rate, nearly every threshold works that is large enough."
  enough = good[name, k][int(good[name, k].argmax()) :]
  assert k == 10 or enough.mean() > 0.7
  # "To the left of the valley training is slow, to the right it breaks."
  assert losses[0] > losses.min() and (k == 1 or losses[-1] > 2 * losses.min())

# "At ten times the base rate the stars lie in the valleys." A single seed may be unlucky.
assert suggested >= len(cells) - 2
assert suggested > max(thumb, none) + 1
