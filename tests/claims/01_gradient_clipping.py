# "A limit of half the norm halves every entry."
assert norm == 13
assert norm_after == 6.5
for key in grads:
  assert jnp.allclose(clipped[key] / grads[key], 0.5)

# "A gradient within the limit comes back unchanged, bit for bit."
assert all(bool((same[key] == grads[key]).all()) for key in grads)

# "Long arrows are cut at the circle. All arrows keep their direction."
is_long = np.linalg.norm(vectors, axis=1) > 2
assert 0 < is_long.sum() < len(vectors)
assert (after == vectors)[~is_long].all()
assert np.allclose(np.linalg.norm(after[is_long], axis=1), 2)
assert max(map(angle, vectors, after)) < 0.1

# "Only the global norm keeps the direction."
by_norm, by_leaf_norm, by_value_clip = turned.values()
assert by_norm < 0.1 < min(by_leaf_norm, by_value_clip)

# "By norm they end on a circle. By value they end on a square, most of them at its corners."
assert np.allclose(np.linalg.norm(clip_each(some, 1.0), axis=1), 1)
assert (np.abs(by_value).max(axis=1) == 1).all()
assert len(some) == 12 and (np.abs(by_value).min(axis=1) == 1).mean() > 0.5

# "The longer the gradient, the more a value clip turns it."
most = [max(values) for values in degrees.values()]
assert most[0] < most[1] < most[2] and most[2] > 30 and most[3] < 0.1

# "A clip still multiplies by one factor and keeps the direction."
for ball in balls.values():
  assert max(map(angle, ball[::45], ring[::45])) < 0.1

# "The 1-norm grows with the number of entries, the 2-norm with its square root, and the largest entry stays the same."
for label, power in (("ord = 1", 1), ("ord = 2", 0.5), ("ord = inf", 0)):
  assert np.allclose(growth[label], sizes**power, rtol=1e-5)

# "A zero gradient stays zero, and a limit of 0 gives zeros."
assert found["[0.0, 0.0]", 1.0] == found["[3.0, 4.0]", 0.0] == ["[0. 0.]"] * 3

# "The square of 3e20 does not fit into float32. The norm does, and the clip is right."
assert jnp.isinf(jnp.float32(3e20) ** 2)
assert found["[3e+20, 4e+20]", 1.0] == ["[0.6 0.8]"] * 3

# "Every entry becomes NaN"; "zero drops the step"; "error raises".
assert found["[1.0, inf]", 1.0] == found["[1.0, nan]", 1.0] == ["[nan nan]", "[0. 0.]", "FloatingPointError"]

# "It keeps its norm in the optimizer state and counts the steps that it changed."
assert (seen["grad/clipped_steps"], seen["grad/nonfinite_steps"], seen["grad/steps"]) == (1, 1, 3)
assert jnp.isnan(seen["grad/norm"])
assert jnp.isfinite(params["w"]).all()

# The table of calls, and "an infinite norm gives the factor 0".
assert len(theirs) == 6
for key, value in theirs.items():
  np.testing.assert_allclose(ours[key], value, rtol=1e-6)
assert torch_on_inf[0] == 0 and np.isnan(torch_on_inf[1])
