"""Why some figures of the speed page are not lower: the parts of a step, each measured once to find the reason.

The command does not repeat these measurements, so that they stand here as text. One machine: two x86-64 cores, jax
0.10.2, float32, 1000 leaves of 64x64 where nothing else is said.
"""

WHY = """\
## Why it is not less

Parts of a step, each measured once to find the reason; `speed.py` does not repeat them.

**Compile time with many leaves.** XLA's time grows with the operations of the program, not with its kernels: fusions
that are equal are compiled once. 300 leaves times a scalar buffer each compile in 0.11 s, times 300 slices of one
vector, which make 300 different fusions, in 2.1 s. A cheap scalar that several loops read is computed again in each of
them, and barriers do not hinder that; a division is not repeated. Three scalars for each block, and a norm that each
leaf was asked for by itself, made 8.2 s of the global clip of 1000 leaves and 12.7 s of the clip by leaf; one vector of
norms 6.6 s and 10.7 s; one number for each block, which ends in a division and says by its sign and its size what the
other two said, 6.0 s and 9.2 s. What is left keeps its promises: the untouched leaf stays bit-identical, subnormal
entries included; a norm of 1e38 is clipped to 1e-3, whose factor no float32 holds; a step that is not finite is NaN
throughout. Tried and left: the limits of a clip by leaf behind a conditional, so that XLA computes them once (no less,
once the rest was done); vectors of norms and factors, sliced for each leaf (36 s); stacked leaves (a copy of the
gradient).

**Step time with many leaves.** Adam's 3000 kernels of 4096 entries take about as long to start as to run. Any factor
that is computed in the step, even from one entry, adds 2.2 ms, since every kernel then waits for it; the plainest
norm takes 1.7 to 2.4 ms.

**bfloat16.** XLA on CPU writes out what it converts to bfloat16 and reads twice, as both moments of Adam read the
clipped leaf: 100% of the gradient, Optax's step 200%, and more than half of the time that the clip added. clipjax
rounds by integer operations there, which XLA fuses into both. The norm itself copies nothing. XLA on CPU fuses no
reduction with a conversion from float16: there the copy in float32 stays.

**A watch in a step that donates its parameters.** XLA on CPU copies a donated buffer that anything but its own update
reads, if nothing says that the read comes first; this holds for the plainest norm of the parameters too. The copy is
what `watch()` costs before Adam alone. `watch(param_norms=False)` leaves the parameters alone. Tried: parameter norms
in every step, outside of the conditional (the same copy, and a read); updates that depend on the parameter norms (XLA
then writes the updates).
"""
