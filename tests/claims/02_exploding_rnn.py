# "Both runs begin alike."
assert series["no clip"]["grad/norm"][0] == series[CLIPPED]["grad/norm"][0]

# "Within the first twenty steps the norm of the unclipped run jumps by many orders of magnitude."
assert worst < 20
assert series["no clip"]["grad/norm"][worst] > 1e6 > 1e5 * series[CLIPPED]["grad/norm"].max()

# "The loss ends above the cost of a blind guess."
assert final["no clip"] > math.log(CHARACTERS) > 2 * final[CLIPPED]

# "In most of its early steps"; "later most gradients are below the limit".
assert above[CLIPPED][-50:].mean() < 0.5 < above[CLIPPED][:50].mean()

# "The curves on the left are nearly straight on the log axis."
for line in at_start.values():
  logs = np.log(np.asarray(line, np.float64))
  assert np.corrcoef(np.arange(LENGTH), logs)[0, 1] ** 2 > 0.95

# "At a small initial scale the product vanishes, at a large one it explodes, and the band in between is narrow."
assert at_start["scale 0.5"][-1] < 1e-9 < at_start["scale 1.5"][-1] < 1 < at_start["scale 2"][-1] / 100

# On the right: the order of the legend, from the explosion to the run that was lost.
ends = [float(line[-1]) for line in in_training.values()]
assert ends == sorted(ends, reverse=True)

# "One step before the explosion, the product of the unclipped network is still of ordinary size."
assert ends[0] > 1e6 > 1e4 * ends[1]

# "At the end the product is gone within ten steps"; "the product of the clipped run shrinks, but far more slowly".
assert in_training[f"no clip, step {STEPS}"][9] < 1e-6 < in_training[f"{CLIPPED}, step {STEPS}"][9] < 1

# "It vanishes", "it fades slowly", "it explodes".
assert heard[0.5][-20].max() < 1e-6 * heard[0.5][-1].max()
assert 1e-4 < heard[1.5][0].max() / heard[1.5][-1].max() < 1
assert heard[4.0][0].min() > 1e6 * heard[4.0][-1].max()

# "The norm of all weights looks healthy, about as large as in the middle."
assert 0.5 < norms[0.5] / norms[1.5] < 2
assert norms[4.0] > 1e6

# "Three leaves explode. Layer 2 and out saw larger gradients before that step."
assert {key.split("/")[-1] for key in leaves if jump[key] > 1e6} == {"embed", "input_1", "recurrent_1"}
assert sorted(jump.values())[2] < 1

# "After the giant step hardly any gradient arrives there."
assert silent > 0.9
