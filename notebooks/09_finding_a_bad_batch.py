# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Finding a bad batch: which file broke the run, and what should you do about it?
#
# The loss jumps in the middle of a run. It may be a bad batch, or the learning rate may be too high. This notebook
# finds out from the recorded file alone: the step, the batch, and the layers. Then it measures three remedies.
#
# ## A run over files
#
# We train on handwritten digits, which lie in forty small files. Each file is one batch. The first 32 files are there
# from the start, and after step 160 eight more arrive. Two of those are bad. [digit_files](digit_files.py) knows which;
# the training loop does not.
#
# Two lines of the loop matter. `clipjax.watch()` measures the norm of every leaf, and `push` stores it together with
# the loss and the **name of the batch**. Without the name, a record can give you a step and no file.

# %%
import tempfile
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from digit_files import held_out_loss, init, loss_fn, order, read

import clipjax

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
plt.switch_backend("inline")  # Shows the figures of clipjax too, which pyplot did not make.
folder = Path(tempfile.mkdtemp())


def watched(optimizer):
  """Measures the gradient before the optimizer, and the update after it."""
  return optax.chain(clipjax.watch(), optimizer, clipjax.watch(name="update"))


@partial(jax.jit, static_argnums=0)
def train_step(tx, params, opt_state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
  updates, opt_state = tx.update(grads, opt_state, params, value=loss)  # skip_steps looks at the loss too.
  return optax.apply_updates(params, updates), opt_state, loss


def train(name, tx, seed=0, without=(), repaired=False, on_finding=None):
  """Trains on the files in their order; returns the recorded run and the held-out loss at the end."""
  params, path = init(seed), folder / f"{name}-{seed}.jsonl"
  opt_state = tx.init(params)
  with clipjax.runs.Recorder(path, every=10, on_finding=on_finding) as recorder:
    for step, file in enumerate(order(seed), 1):
      if file not in without:
        params, opt_state, loss = train_step(tx, params, opt_state, *read(file, repaired=repaired))
        recorder.push(step, opt_state, loss=loss, batch=file)
  return clipjax.runs.read_run(path), held_out_loss(params)


alerts = []
sgd = optax.sgd(0.02, momentum=0.9)
run, _ = train("first", watched(sgd), on_finding=alerts.append)
clipjax.runs.plot_norms(run)

# %% [markdown]
# Rings mark spikes. `clipjax.runs.write_report(run, "report.html")` draws this and more on one page, for a browser.
#
# ## The step and the batch
#
# `diagnose` reads the whole record. Spikes that belong together form an `Event`, which has its steps, its batches, and
# a `Move` for each series that rose: when it began, how high it went, and what was usual before.

# %%
report = clipjax.runs.diagnose(run)
verdict = report[0]  # The strongest finding.
print(verdict.level, verdict.name, verdict.steps, "->", verdict.advice)


def tell(events):
  for event in events:
    moves = ", ".join(f"{m.key} {m.peak / m.usual:.0f}x from step {m.step}" for m in event.moves)
    print(f"steps {event.start}-{event.end}  {event.batches}  {moves}")


tell(report.events)

# %% [markdown]
# There are three events, and **all of them are at the same file**, `part-35`. The files come in a new order in each
# pass, so the file and not the time must be the cause. It is from the second delivery.
#
# ## The layers
#
# The recorder keeps the norms of all leaves at the steps that a finding names, and at every tenth step as well. We
# divide the norms at a spike by the median of the five before.


# %%
def growth(run, step):
  """How many times its usual norm each leaf had at a step."""
  steps, norms = run.vectors["grad/norm"]
  at = list(steps).index(step)
  return norms[at] / np.median(norms[at - 5 : at], axis=0)


leaves = run.leaves["grad"]
raw = growth(run, report.events[0].start)
print(*(f"{leaf} {times:.1f}x" for leaf, times in zip(leaves, raw, strict=True)), sep="   ")
for file in ("part-00", *report.events[0].batches):
  print(f"largest pixel of {file}: {read(file)[0].max():g}")

# %% [markdown]
# All four matrices grew more than forty times, and the biases about three times. The gradient of a bias is the error
# that comes back to its layer. The gradient of a matrix is that error times what comes into the layer. So the errors
# are about three times as large as usual, and what comes in is many times as large, in every layer from the first one
# on. The fault is in the **inputs**. The file agrees: its pixels go to 16, because nobody divided them.
#
# ## A second fault behind the first
#
# A large fault can hide a smaller one: after the first spike, norms vary so much that little else stands out. That is
# why some high peaks in the picture have no ring. So leave the file out, run again, and ask again.

# %%
second, _ = train("second", watched(sgd), without=["part-35"])
events = clipjax.runs.diagnose(second).events
tell(events)
shifted = growth(second, events[0].start)

fig, ax = plt.subplots(figsize=(8, 3))
for times, label, marker in ((raw, "part-35", "o"), (shifted, events[0].batches[0], "D")):
  ax.semilogx(times, leaves, marker, label=f"{label}, first event", markersize=8)
ax.axvline(1, color="#999999")
ax.set(xlim=(0.5, 100), xlabel="times the usual norm", title="Large inputs raise the matrices, wrong labels all leaves")
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# A second file shows up, `part-38`, and it looks different. The loss rises far more than the norms, and most biases
# grow as much as the matrices. So the activations are as usual and the errors are large: the network is right, and is
# told that it is wrong. The fault is in the **labels**. They are off by one.
#
# ## Or is it the learning rate?
#
# For comparison, repaired files and ten times the learning rate:

# %%
fast, _ = train("fast", watched(optax.sgd(0.2, momentum=0.9)), repaired=True)
fast_report = clipjax.runs.diagnose(fast)
for finding in (finding for finding in fast_report if finding.level != "INFO"):
  print(finding.level, finding.name, finding.message, "->", finding.advice)
tell(fast_report.events)

# %% [markdown]
# | | bad batch | learning rate too high |
# |---|---|---|
# | verdict | `spikes`, with the batch | `diverged` |
# | the same batch again | the same spike again | nothing, or another batch each time |
# | without that batch | no spike | the same divergence |
# | at a lower rate | the spike stays | no divergence |
#
# ## Hear of it during the run
#
# We passed `on_finding=alerts.append` to the first run. The recorder judges the rows as it writes them, and calls the
# function with each FAIL or WARN that names a step, about `every` pushes later. Send a message there, or raise an
# exception to stop the run. This is the first alert of that run:

# %%
print(alerts[0].level, alerts[0].name, alerts[0].steps, run.batches[run.steps == alerts[0].steps[0]])
print(alerts[0].message)

# %% [markdown]
# ## What to do about it
#
# Three remedies, on all forty files, and for comparison nothing, a quarter of the learning rate, and repaired files.
# The clip takes its threshold from the first run, the one with the bad files. `skip_steps` rejects a step whose
# gradient norm or loss is six standard deviations above its mean over the last 128 steps.

# %%
max_norm = clipjax.runs.suggest_max_norm(run).max_norm
rule = clipjax.rules.rolling_sigma(6.0, window=128)
remedies = {
  "nothing": (sgd, {}),
  "a quarter of the rate": (optax.sgd(0.005, momentum=0.9), {}),
  f"clip at {max_norm:.2f}": (optax.chain(clipjax.clip_by_global_norm(max_norm), sgd), {}),
  "skip_steps": (clipjax.skip_steps(sgd, norm_rule=rule, loss_rule=rule), {}),
  "both files left out": (sgd, {"without": ["part-35", "part-38"]}),
  "both files repaired": (sgd, {"repaired": True}),
}
losses, runs = {}, {}
for name, (optimizer, options) in remedies.items():
  tx = watched(optimizer)
  runs[name], losses[name] = zip(*(train(name, tx, seed, **options) for seed in range(3)), strict=True)
  print(f"{name:22} held-out loss", *(f"{loss:5.3f}" for loss in losses[name]), f"  mean {np.mean(losses[name]):.3f}")

rejected = [str(b) for r in runs["skip_steps"] for b in r.batches[r["skip/consecutive"] > 0]]
print("skip_steps rejected:", {name: rejected.count(name) for name in sorted(set(rejected))})

# %% [markdown]
# - **Nothing:** the held-out loss is several times that of repaired files.
# - **A lower learning rate** is no remedy. It softens the blow, slows down everything else, and the spikes stay.
# - **A clip** makes the loss as low as repaired files do. It needs no history and costs one line. The bad batches still
#   train, but no single one can do much.
# - **`skip_steps`** does as well here. It rejected all 15 batches of `part-38`, and 5 of the 15 of `part-35`: its rule
#   remembers what it rejected, so a large spike raises the limit until it leaves the window.
# - **Clean files** remove the cause. Repair a file where you can, and leave it out where you cannot.
#
# ## What to remember
#
# - Push the loss and the name of the batch, and chain `clipjax.watch()` before the clip.
# - Compare the batches of `report.events`. The same name again and again means a bad batch.
# - Compare leaves: large inputs raise the matrices most, wrong labels raise all leaves.
# - Fix the largest fault, run again, and look again.
# - Keep a clip as insurance, and clean the data that the record names.
#
# This is the last of the notebooks. [docs/runs.md](../docs/runs.md) says more about records and verdicts, and
# [docs/verdicts.md](../docs/verdicts.md) how often they are right.
