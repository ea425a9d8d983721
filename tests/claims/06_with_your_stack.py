"""Claims of notebooks/06_with_your_stack.py."""

# "It goes wherever an Optax optimizer goes": TensorBoard has what the clip measured.
assert list(curves["grad/norm"].values()) == [float(row["grad/norm"]) for row in seen["plain JAX"]]

# "The limit begins after the warm-up, and cuts the spike."
spike = int(np.nanargmax(whole["grad/norm"]))
assert spike > WARMUP
assert whole["grad/norm_clipped"][spike] < whole["grad/norm"][spike] / 5

# "Rounding is the only difference."
assert max(apart.values()) < 1e-2
assert len(set(clipped.values())) == 1
assert clipped["plain JAX"] > 0

# "We stop at step 20 of a warm-up of 40 steps", "the resumed run equals an uninterrupted one in every bit".
assert int(restored["step"]) == STOP < WARMUP
assert all(same)
assert all(after[key].tobytes() == whole[key][STOP:].tobytes() for key in after)

# "Without its state the run begins a new warm-up."
assert first == [WARMUP, WARMUP - STOP, WARMUP]
assert not np.array_equal(forgetful["loss"], after["loss"])
