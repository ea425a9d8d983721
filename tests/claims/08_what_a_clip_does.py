"""Claims of notebooks/08_what_a_clip_does.py."""

adaptive = "Adam", "Lion", "Muon"

# "Lion takes a sign and Muon orthogonalises, so their steps have a fixed length." "Adam: the length of the step stays."
assert all(abs(ratios[name] - 1).max() < 0.02 for name in ("Lion", "Muon"))
assert abs(ratios["Adam"] - 1).max() < 0.15

# "SGD keeps the direction, and its step shrinks", "they turn instead".
assert cosines["SGD"].min() > 0.999
assert max(ratios[name][-1] for name in ("SGD", "momentum")) < 0.05
assert 0.9 < cosines["momentum"].min() < 0.99
assert max(cosines[name][-1] for name in adaptive) < 0.9

# "A limit below p10: lowering it further changes almost nothing", "at 8 p90 the median step equals".
assert max(abs(ratios[name][-1] - ratios[name][-2]) for name in adaptive) < 0.05
assert max(abs(numbers[name][0] - 1) for numbers in (ratios, cosines) for name in OPTIMIZERS) < 0.01

# "Is it more than a learning rate?"
for name in OPTIMIZERS:
  assert (with_clip[name][-1] > plain[name].min() + 1) == (name in ("SGD", "momentum"))
  assert with_clip[name].min() < plain[name].min()  # "Its loss is lower", "no rate without a clip gets there".
assert {NAMED[with_clip[name].argmin()] for name in ("SGD", "momentum")} == {"8 p90"}
assert max(with_clip[name][-1] - with_clip[name].min() for name in adaptive) < 0.05

# "Most steps under this limit are longer", "the leaf `hidden` gains most".
assert min(longer.values()) > 0.5
assert all(LEAVES[usual(adam["ratios"])[lane].argmax()] == "hidden" for lane in lanes.values())

# "SGD and momentum starve", "Adam keeps most of their length", "Lion and Muon hide the fault from the ratio".
assert max(planted[name, "global"][0][1:].max() for name in ("SGD", "momentum")) < 0.3
assert min(planted[name, "by leaf"][0][1] for name in ("SGD", "momentum")) > 0.9
assert planted["Adam", "global"][0][1:].min() > 0.6
assert all(abs(planted[name, "global"][0] - 1).max() < 0.05 for name in ("Lion", "Muon"))
for name in adaptive:
  assert planted[name, "global"][1][1:].max() < planted[name, "by leaf"][1][1:].min()

# "The clip by leaf has the lower loss under all five."
assert all(planted_loss[name, "by leaf"] < planted_loss[name, "global"] for name in OPTIMIZERS)
