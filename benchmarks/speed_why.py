"""Why some figures of the speed page are not lower: the parts of a step, each measured once to find the reason.

The command does not repeat these measurements, so that they stand here as text. One machine: two x86-64 cores, jax
0.10.2, float32, 1000 leaves of 64x64 where nothing else is said.
"""

WHY = """\
## Why it is not less

Parts of a step, each measured once to find the reason; `speed.py` does not repeat them.

**Compile time with many leaves.** XLA's time grows with the operations of the program, not with its kernels: fusions
that are equal are compiled once. 300 leaves times a scalar buffer each compile in 0.11 s, times 300 slices of one
vector, which make 300 different fusions, in 2.1 s. Of the step, Adam alone takes 3.5 s; with the plainest norm and one
multiplication by a factor 4.8 s. With the three scalars of clipjax 6.5 s, and each of them keeps a promise: the
untouched leaf stays bit-identical, subnormal entries included; a norm of 1e38 is clipped to 1e-3, whose factor no
float32 holds; a step that is not finite is NaN throughout. The second pass over hard gradients takes 0.9 s; it was 3.5
s before small leaves of one shape were summed together in it. By leaf the plainest clip takes 5.5 s; three scalars for
each leaf make that 10, and the thousand reductions of the second pass, one for each leaf, add 5 to 6. Tried and left:
the limits of a clip by leaf behind a conditional, so that XLA computes them once (13% less); leaves stacked eight at a
time in the second pass (1.5 s less, but 7% temporaries); one `while_loop` for both passes (1.3 times the plain sum, but
a clip and a watch then read the gradient twice); a scale of its own for each leaf of a global norm (13.7 s); vectors of
norms and factors, sliced for each leaf (27 s); reductions of 16 leaves with 16 results (fast, but XLA adds 4096 equal
entries up one by one, with an error of 6e-5); stacked leaves (a copy of the gradient).

**Step time with many leaves.** Adam's 3000 kernels of 4096 entries take about as long to start as to run. Any factor
that is computed in the step, even from one entry, adds 2.2 ms, since every kernel then waits for it; the plainest
norm takes 1.7 to 2.4 ms.

**bfloat16.** Both moments of Adam read the clipped leaf, so that XLA writes it, in 16 bits: 100% of the gradient,
where Optax's step writes 200%. The norm itself copies nothing. XLA on CPU fuses no reduction with a conversion from
float16: there the copy in float32 stays.

**A watch in a step that donates its parameters.** XLA on CPU copies a donated buffer that anything but its own update
reads, if nothing says that the read comes first; this holds for the plainest norm of the parameters too. The copy is
what `watch()` costs before Adam alone. `watch(param_norms=False)` leaves the parameters alone. Tried: parameter norms
in every step, outside of the conditional (the same copy, and a read); updates that depend on the parameter norms (XLA
then writes the updates).
"""
