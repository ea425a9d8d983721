import inspect

# "The gradient of the first broken batch is about 150 times as long as usual."
assert 120 < ratio < 180

# "The network ends where a blind guess would be, and does not recover. The norm is small afterwards."
assert unclipped["loss"][-1] > 10 * unclipped["loss"][first - 1]
assert abs(unclipped["loss"][-1] - np.log(10)) < 0.1
assert np.median(unclipped["norm"][-100:]) < usual

# "A rule of your own, in ten lines."
assert sum(bool(line.strip()) for line in inspect.getsource(above_the_median).splitlines()) <= 10

# "AutoClip lies under most norms."
auto = runs["AutoClip"]
assert np.mean(auto["limit"] < auto["norm"]) > 0.5

# "Quantile tracking aims at one step in ten."
assert 0.05 < changed["quantile tracking"] < 0.15

# "ZClip has no limit in its first 25 steps, and pulls a spike down almost to the mean."
limited = runs["ZClip"]["limit"] < np.finfo(np.float32).max
assert not limited[:25].any() and limited[25:].all()
assert largest["ZClip"] < 2

# "skip_steps leaves a broken step out. A spike widens its limit; it stays wide for 128 steps."
skip = runs["skip_steps"]
assert largest["skip_steps"] == 0
assert (skip["limit"][first + 1 : first + 128] > 5 * skip["limit"][first]).all()
assert skip["limit"][-1] < 2 * skip["limit"][first]

# "The next spikes clear it by far less than the first."
assert (margins > 1).all() and (margins[1:] < margins[0] / 5).all()

# "Every method saves this run."
assert len(runs) == 8
assert all(final[name] < final["no clip"] / 10 for name in runs)
assert all(harm[name] < harm["no clip"] / 10 for name in runs)

# "AutoClip and AdaGC change most of the healthy ones. So does AGC, and here it learns most slowly."
assert all(changed[name] > 0.5 for name in ("AutoClip", "AdaGC", "AGC"))
assert max(final, key=final.get) == "no clip"
assert max(runs, key=final.get) == "AGC"

# "ZClip, quantile tracking, the rule above and skip_steps leave most healthy steps alone. The fixed threshold too."
quiet = ("ZClip", "your own rule", "quantile tracking", "skip_steps", "fixed at 2")
assert all(changed[name] < 0.2 for name in quiet)
assert final["fixed at 2"] < 2 * min(final.values())
