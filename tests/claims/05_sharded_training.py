# "This notebook makes eight devices out of one CPU."
assert jax.device_count() == 8
assert {name: len(params["up"].sharding.device_set) for name, (params, _) in runs.items()} == {
  "one device": 1,
  "eight, jit": 8,
  "eight, shard_map": 8,
}

# "All three runs measure the same norms, up to rounding, and clip the same steps."
reference = runs["one device"][1]
for name, (_, seen) in runs.items():
  assert apart[name] < 1e-3
  assert (seen["grad/clipped_steps"] == reference["grad/clipped_steps"]).all()
assert reference["grad/clipped_steps"][-1] > 0

# "Each piece may be as long as max_norm. The whole grows with the number of devices."
assert np.ptp(after["clipjax"]) < 1e-5
assert all(np.diff(after["Optax, local norm"]) > 0)
assert after["Optax, local norm"][-1] > 2 * MAX_NORM

# "Each device multiplies its copy by its own factor."
assert np.ptp(copies["clipjax"]) == 0
assert copies["Optax, local norm"].max() > 1.1 * copies["Optax, local norm"].min()

# "Already summed over data"; "a pmean of the gradient changes nothing"; "pmean belongs to the loss".
np.testing.assert_allclose(list(times.values()), [8, 8, 1], rtol=1e-4)
for leaf, value in ways["pmean of the loss"].items():
  np.testing.assert_allclose(value, grads[leaf], rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(ways["the same, then pmean"][leaf], 8 * grads[leaf], rtol=1e-3, atol=1e-5)

# "Clipped steps hide it, because their length comes out right."
clipped_sum, long_norm = clipjax.clip_grad_norm(ways["loss of each device"], MAX_NORM)
np.testing.assert_allclose(clipjax.global_norm(clipped_sum), MAX_NORM, rtol=1e-5)
assert long_norm > 8 * MAX_NORM


# "Here, before the clip, pmean of the gradients would be right."
def reduced(params, x, y):
  mine = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
  return jax.lax.pmean(jax.grad(loss_fn)(mine, x, y, add_up), "data")


by_hand = jax.jit(jax.shard_map(reduced, mesh=mesh, in_specs=(SPECS, P("data"), P("data")), out_specs=SPECS))
for leaf, value in by_hand(placed, *split[0]).items():
  np.testing.assert_allclose(value, grads[leaf], rtol=1e-3, atol=1e-6)

# "If you forget it, clipjax refuses as soon as the step is traced."
assert "varying over ['data']" in refused
