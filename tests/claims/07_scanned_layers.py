"""Claims of notebooks/07_scanned_layers.py."""

import re

# "Axis 0 of this array counts the layers", "six", "48 slices".
assert {leaf.shape[0] for leaf in jax.tree.leaves(nnx.state(model.blocks, nnx.Param))} == {LAYERS}
assert (len(names), len(slices)) == (6, 48)

# "A NaN tells no more": without `stacked=` the message has whole leaves.
assert all(f"'{name}'" in message for name in names)

# "The slices of layer 4 are on top, and only they are clipped."
sick = {f"{name}[{SICK}]" for name in names}
assert set(risen[: len(names)]) == sick
assert {name for name in slices if stacked[f"grad/scale/{name}"][at] < 1} == sick
assert max(times_usual(stacked, name) for name in risen[len(names) :]) < 4

# "Healthy layers lose nearly all of their gradient", "left with about four times its usual norm".
assert factors_whole.max() < 0.2
assert abs(rise * factors[up, SICK] - 4) < 0.8
assert rise * factors_whole[up, SICK] > 8

# "The seven healthy layers get exactly the update of the run without a fault", "rises least".
assert np.array_equal(*(np.delete(sizes[name][at], SICK) for name in ("no fault", "AdaGC, stacked=")))
assert 1 < ratios["AdaGC, stacked="][at, SICK] < ratios["AdaGC"][at, SICK] < ratios["no clip"][at, SICK]
assert 0.7 < others["AdaGC"].min() < others["AdaGC"].max() < 1
assert [int(run["grad/clipped_steps"][-1]) for run in (healthy, whole, stacked)] == [0, 1, 1]

# "40 steps later the updates of layer 4 are about a quarter", "it ends alike in all four runs".
assert STEPS - SPIKE == 40
assert 0.15 < ratios["no clip"][-1, SICK] < 0.35
assert max(final.values()) - min(final.values()) < 0.05

# "This message names the slices of layer 4, and no others."
assert set(re.findall(r"'(blocks/.*?)'", message_stacked)) == sick

# "Only layer 4 is above its limit."
assert [label for label in limits if seen[f"grad/scale/{label}"] < 1] == [f"layer {SICK}"]
