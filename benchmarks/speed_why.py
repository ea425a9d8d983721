"""Why some figures on the speed page are not lower: parts of a step, each measured once to find the reason.

The command does not repeat these measurements, so they are text. One machine: two x86-64 cores, jax 0.10.2, float32,
1000 leaves of 64x64 unless stated otherwise.
"""

WHY = """\
## Why it is not less

Parts of a step, each measured once to find the reason; `speed.py` does not repeat them.

**Compile time with many leaves.** XLA's time grows with the operations of the program, not with its kernels: equal
fusions are compiled once. Multiplying 300 leaves by one scalar buffer each compiles in 0.11 s; multiplying them by 300
slices of one vector makes 300 different fusions and compiles in 2.1 s. XLA recomputes a cheap scalar in every loop
that reads it, even behind barriers, but does not repeat a division. With three scalars per block and a separate norm
per leaf, the global clip of 1000 leaves compiled in 8.2 s and the clip by leaf in 12.7 s; with one vector of norms, in
6.6 s and 10.7 s; with one number per block, which ends in a division and encodes the other two in its sign and size,
in 6.0 s and 9.2 s. The remaining time pays for promises: an untouched leaf stays bit-identical, including subnormal
entries; a norm of 1e38 can be clipped to 1e-3, although no float32 holds that factor; a nonfinite step is NaN
throughout. Tried and rejected: the limits of a clip by leaf behind a conditional, to make XLA compute them once (no
gain after the other changes); vectors of norms and factors, sliced for each leaf (36 s); stacked leaves (a copy of the
gradient).

**Step time with many leaves.** Adam's 3000 kernels of 4096 entries take about as long to start as to run. Any factor
computed in the step, even from one entry, adds 2.2 ms because every kernel then waits for it; the plainest norm takes
1.7 to 2.4 ms.

**bfloat16.** XLA on CPU writes out a value that it converts to bfloat16 and reads twice, and both moments of Adam read
the clipped leaf. This took 100% of the gradient in temporaries (Optax's step: 200%) and more than half of the time
that the clip added. clipjax therefore rounds with integer operations on CPU, which XLA fuses into both moments. The
norm itself copies nothing. XLA on CPU does not fuse a reduction with a conversion from float16: that copy in float32
stays.

**A watch in a step that donates its parameters.** XLA on CPU copies a donated buffer if anything but its own update
reads it, unless the program orders the read first; even the plainest norm of the parameters causes the copy. In a step
of only Adam, this copy is the cost of `watch()`. `watch(param_norms=False)` does not read the parameters. Tried:
parameter norms in every step, outside the conditional (the same copy, and a read); updates that depend on the
parameter norms (XLA then writes out the updates).
"""
