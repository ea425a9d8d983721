"""Each condition of a run gives its findings of `diagnose`, at their step and with their leaf, and no other defect."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from conditions import LOSS, NOISE, NORMS, ROWS, at, check, leaves_at, since, spoiled
from synthetic import N, healthy, layered, run_of, with_spikes

import clipjax
from clipjax.runs.words import number

CLIP_AT_50 = {"grad/max_norm": np.full(N, 50.0), "grad/scale": np.ones(N), "grad/clip_fraction": np.zeros(N)}

# Columns that differ from a healthy run, and the findings: name, level, steps (None: not compared), leaves.
CONDITIONS = {
  "the loss leaves from the start": (
    {"loss": 4.85 * np.exp(np.linspace(0, 5, N)) * NOISE}, [("diverged", "FAIL", None, ())]),
  "the loss leaves in the middle, slowly": (
    {"loss": np.where(ROWS < 200, LOSS, LOSS[199] + np.linspace(0, 9, 2 * N)[ROWS] * (ROWS - 200) / 90) * NOISE},
    [("diverged", "FAIL", None, ())]),
  "what was learned is lost at a step": (
    {"loss": since(250, 4.0, LOSS) * NOISE}, [("diverged", "FAIL", (251,), ())]),
  "a part of what was learned is lost": (
    {"loss": np.where(ROWS < 250, LOSS, LOSS + (ROWS - 250) / 150) * NOISE}, [("rising-loss", "WARN", None, ())]),
  "a loss at chance": ({"loss": 2.303 * NOISE}, [("not-learning", "WARN", (), ())]),
  "eight more on the loss for four steps, with a usual norm": (
    {"loss": at([200, 201, 202, 203], LOSS + 8, LOSS)}, [("spikes", "WARN", (201,), ())]),
  "a norm at step 17": ({"grad/norm": at(16, 1.4e7, NORMS), "grad/scale": np.ones(N)}, [("spikes", "WARN", (17,), ())]),
  "a norm at step 40": ({"grad/norm": at(39, 110.0, NORMS), "grad/scale": np.ones(N)}, [("spikes", "WARN", (40,), ())]),
  "a clip that is too high": (
    {"grad/norm": at(200, 112.0, 0.7 * NORMS), **CLIP_AT_50, "grad/scale": at(200, 50 / 112, 1.0),
     "grad/norm_clipped": at(200, 50.0, 0.7 * NORMS), "loss": at([201, 202], 12.9, LOSS)},
    [("spikes", "WARN", (201,), ())]),
  "a clip that catches": (
    {"grad/norm": at(200, 112.0, NORMS), "grad/scale": at(200, 0.01, 1.0), "grad/norm_clipped": at(200, 1.1, NORMS)},
    []),
  "a learning rate a hundred times too high for a step": (
    {"update/norm": at(250, 0.85, 0.01 * NOISE), "learning_rate": at(250, 0.1, 0.001), "lr/head": np.ones(N),
     "grad/norm": at([251, 252], 20.0, NORMS), "grad/scale": np.ones(N)},
    [("update-spike", "WARN", (251,), (), ". 'learning_rate' was 0.1 there, 100 times its previous value.\n")]),
  "a learning rate of 0 in the end": (
    {"learning_rate": since(300, 0.0)}, [("stopped", "FAIL", (301,), ())]),
  "updates of 0 in the end": ({"update/norm": since(300, 0.0)}, [("stopped", "FAIL", (301,), ())]),
  "every step rejected in the end": (
    {"skip/consecutive": np.maximum(0, ROWS - 249), "skip/fraction": np.maximum(0, ROWS - 249) / N},
    [("stopped", "FAIL", (251,), ())]),
  "many steps rejected": (
    {"skip/consecutive": (ROWS % 5 < 2) * (1 + ROWS % 5), "skip/fraction": np.full(N, 0.4)},
    [("skipped", "FAIL", None, ())]),
  "some steps rejected": ({"skip/fraction": np.full(N, 0.125)}, [("skipped", "WARN", (), ())]),
  "a norm that rises tenfold, evenly": (
    {"grad/norm": NORMS * np.linspace(1, 10, N), "grad/scale": np.ones(N)}, [("rising-norm", "WARN", (), ())]),
  "updates far too large, and nothing is learned": (
    {"update/ratio": np.full(N, 0.05), "loss": 2.3 * NOISE}, [("update-ratio", "WARN", (), ())]),
  "updates far too small, and nothing is learned": (
    {"update/ratio": np.full(N, 2e-5), "loss": 2.3 * NOISE}, [("update-ratio", "WARN", (), ())]),
  "large updates of a run that learns": ({"update/ratio": np.full(N, 0.05)}, []),
  "a clip that takes most of the gradient": (
    {"grad/clip_fraction": np.ones(N), "grad/norm_clipped": np.full(N, 1e-3), "grad/scale": np.full(N, 1e-3)},
    [("clipped-often", "WARN", (), (), "'grad' clipped 100% of the steps and left <0.1% of the gradient (median).")]),
  "a clip that acts in most steps and takes little": ({"grad/clip_fraction": np.full(N, 0.9)}, []),
  "a clip that lengthens the step": (
    {"effect/ratio": 1.5 * NOISE, "effect/cosine": np.full(N, 0.98)}, [("clip-lengthens", "WARN", (), ())]),
  "a clip that leaves the step alone": ({"effect/ratio": np.ones(N), "effect/cosine": np.ones(N)}, []),
  "zeros": ({"grad/zero_fraction": np.full(N, 0.625)}, [("zeros", "WARN", (), ())]),
}  # fmt: skip


def of(changes=None, **options):
  """A healthy run with other columns, or more than columns."""
  return run_of(healthy(**changes or {}), **options)


def died(row, layer):
  """Norms of two layers, one of them 0 from one of the 40 rows on."""
  return leaves_at({i: np.where(np.arange(2) == layer, 0.0, [1.0, 0.3]) for i in range(row, 40)})


def of_length(n, nan_at=(), **changes):
  columns, is_bad = healthy(n=n, **changes), np.isin(np.arange(n), nan_at)
  columns["grad/norm_clipped"][is_bad] = np.nan
  return run_of(columns, flags={"grad/norm": is_bad})


def absent(*names):
  return [(name, None) for name in names]


def lost(rows, changes, key="loss", **options):
  """A run whose loss is not finite at some rows."""
  is_bad = np.isin(ROWS, rows)
  columns = healthy(**changes)
  columns[key] = np.where(is_bad, np.nan, columns[key])
  return run_of(columns, flags={key: is_bad}, **options)


ZEROS = {"grad/zero_fraction": np.full(N, 0.7)}
GROUPS = {"grad/clip_fraction": np.ones(N), "grad/scale/a": at(ROWS[::2], 1.0, 0.01)}
LEFT = "and left 1% of the gradient (median)."
OVERFLOWS = [0, 1, 2, 150]
SKIPPED = {"skip/consecutive": np.isin(ROWS, OVERFLOWS) * (ROWS % 150 + 1)}
SCALE = 2.0 ** (16 - np.cumsum(np.isin(ROWS, OVERFLOWS)))
COUNTED = leaves_at({7: [1.0, np.inf]}, (1.0, 1.0))
COUNTED["vectors"] |= leaves_at({7: [5.0, 0.0]}, (0.0, 0.0), key="grad/nonfinite")["vectors"]


def seen_at_every_eighth(limit):
  """Rows from the history of a watch: all but the norm is known of each eighth step alone."""
  columns = with_spikes()
  columns |= {"grad/scale": np.minimum(1, columns["grad/max_norm"] / columns["grad/norm"])}
  columns["grad/max_norm"] = np.full(N, limit) if limit else columns["grad/max_norm"]
  return run_of({key: x if key == "grad/norm" else np.where(ROWS % 8 == 7, x, np.nan) for key, x in columns.items()})


def validated(rise, key="val_loss", loss=LOSS, lucky=None):
  """A run whose validation loss is `rise` of its distance from step 200 above 2, at each fourth step."""
  losses = np.where(ROWS % 4 == 3, 2 + rise(ROWS - 199), np.nan)
  return of({"val_loss": np.full(N, np.nan), "loss": loss, key: losses if lucky is None else at(3, lucky, losses)})


def by_row(names, norms):
  """Norms by leaf at every row."""
  return {"leaves": {"grad": names}, "vectors": {"grad/norm": (ROWS + 1, norms)}}


def expert(end):
  """An expert that is used at a few rows before `end`: 129 steps without one, then 109 at the end of all."""
  used = np.isin(ROWS, [5, 90, 130, 260, 290]) & (end > ROWS)
  return by_row(("in/w", "expert/w"), np.stack([np.ones(N), used], 1))


HINGE = since(300, 0.0, 3 * np.exp(-ROWS / 60) * NOISE)
ABOVE = "% above its best (2.18 near step 200), while 'loss' fell from "

# Runs that are more than columns, and the findings.
RUNS = {
  # Layers.
  "a layer without a gradient": (
    of(**leaves_at({}, (0.0, 0.3))),
    [("zero-gradient", "FAIL", (), ("in/w",), "1 of 2 layers had a gradient of exactly 0 at all 40 recorded steps")]),
  "a layer that dies": (
    of(**died(20, 1)), [("zero-gradient", "FAIL", (201,), ("out/w",), "'out/w' has been exactly 0 since step 201.")]),
  "a layer without a gradient at the very end": (of(**died(38, 1)), []),
  "a group without a gradient": (
    of({"grad/norm/head": np.zeros(N), "grad/norm/rest": np.ones(N)}), [("zero-gradient", "FAIL", (), ("head",))]),
  "an early layer that hardly gets one": (
    of(**layered([1e-4, 2e-2, 0.5], ("in/w", "mid/w", "out/w"))),
    [("layer-spread", "WARN", (), ("in/w", "out/w"), "differ by a factor of 5000: 0.0001 in 'in/w', 0.5 in 'out/w'.")]),
  "a bias whose gradient is rounding, beside its weights": (
    of(**layered([1e-9, 0.2, 0.5], ("key/bias", "key/kernel", "out/w"))), []),
  "a leaf whose gradient is rounding, alone": (of(**layered([1e-9, 0.2, 0.5], ("a", "b", "c"))), []),
  "layers of a stack that vanish with depth": (
    of(**layered([1e-7, 1e-5, 1e-3, 0.1], tuple(f"blocks/w[{i}]" for i in range(4)))),
    [("layer-spread", "WARN", (), ("blocks/w[0]", "blocks/w[3]"))]),
  "a layer with large updates": (
    of(**layered([1e-3, 0.2], key="update/ratio")),
    [("update-ratio-by-layer", "INFO", (), ("out/w",),
      "1 of 2 layers have a median 'update/ratio' outside the range; the farthest is 'out/w' at 0.2.")]),
  "layers with usual updates after the first step": (
    of(leaves={"update": ("a", "b")}, vectors={"update/ratio": (
        np.r_[np.ones(50, int), 1:401:10], np.r_[np.full((50, 2), 0.5), np.full((40, 2), 1e-3)])}),
    [("update-ratio-by-layer", None)]),
  # Parts that no longer train, and parts that may rest.
  "a part with a learning rate of 0": (of({"lr/backbone": np.zeros(N), "lr/head": np.full(N, 0.1)}), []),
  "a part whose learning rate becomes 0": (of({"lr/backbone": since(300, 0.0), "lr/head": np.full(N, 0.1)}), []),
  "all learning rates become 0": (
    of({"lr/backbone": since(200, 0.0), "lr/head": since(300, 0.0)}),
    [("stopped", "FAIL", (301,), (), "Nothing has trained since step 301: 'lr/backbone', 'lr/head' are 0.",
      "training stands still for less than 5% of the run, a clipjax limit")]),
  "one of two optimizers stops": (
    of({"update_g/norm": 0.01 * NORMS, "update_d/norm": since(300, 0.0, 0.01 * NORMS[::-1])}),
    [("stopped", "FAIL", (301,), (),
      "Part of the model has not trained since step 301: the norm of 'update_d' is 0.",
      "training stands still for less than 5% of the run and for less than 100 rows, a clipjax limit")]),
  "an expert that is seldom used": (of(**expert(N)), []),
  "an expert that is used no more": (of(**expert(150)), [("zero-gradient", "FAIL", (132,), ("expert/w",))]),
  "a norm that becomes 0 for good": (
    of({"grad/norm": since(300, 0.0, NORMS)}),
    [("zero-gradient", "FAIL", (301,), (), "The norm of 'grad' has been exactly 0 since step 301.")]),
  # A hinge loss on data that can be told apart.
  "a norm and a loss that become 0": (of({"loss": HINGE, "grad/norm": since(300, 0.0, NORMS)}), []),
  "layers and a loss that become 0": (
    of({"loss": HINGE}, **by_row(("in/w", "out/w"), np.tile(since(300, 0.0)[:, None], (1, 2)))), []),
  "a group called like a loss or a rate": (
    run_of({"grad/norm": NORMS, "loss": LOSS, "grad/norm/lr_encoder": since(300, 0.0),
            "grad/norm/perceptual_loss": 4 * at(200, 5.0) * NOISE}),
    [("zero-gradient", "FAIL", (301,), ("lr_encoder",))]),
  # Few numbers, and other limits.
  "no rows": (run_of({"loss": []}, parameters=None), [("no-norms", "INFO", (), ()), *absent("loss", "parameters")]),
  "no norms": (
    run_of({"loss": np.linspace(2, 1, N)}), [("no-norms", "INFO", (), ()), ("loss", "INFO", (), ()), *absent("norms")]),
  "ten steps": (of_length(10), [("few-steps", "INFO", (), ()), *absent("loss", "norm-scale")]),
  "fifteen steps, and one of NaN": (
    of_length(15, [3], **{"grad/clip_fraction": np.ones(15), "grad/zero_fraction": np.ones(15)}),
    [("nonfinite", "FAIL", (4,), ()),
     ("few-steps", "INFO", (), (), "13 finite norms after the 1-step warm-up are too few for statistics; only")]),
  "a loss in tenths, whose median NaN and a spike do not move": (
    of({"loss": at(5, np.nan, at(399, 50.0, np.repeat([3.0, 2.0, 1.25], [40, 320, 40])))}),
    [("spikes", "WARN", (400,), ()),
     ("loss", "INFO", (), (), "'loss' went from 3 to 1.25 (medians of the first and last tenth).")]),
  "zeros below a limit": (of(ZEROS), absent("zeros"), {"zero_fraction": 0.8}),
  "more steps asked for than there are": (
    of(ZEROS), [("few-steps", "INFO", (), (), "at least 10000, a clip"), *absent("zeros")], {"min_steps": 10_000}),
  "more rows by leaf asked for than there are": (
    of({"grad/clip_fraction": np.ones(N)}, **layered([1.0, 0.01], key="grad/scale")), absent("clipped-often"),
    {"min_steps": 41}),
  "no hint on the size of norms": (
    run_of({"grad/norm": np.full(N, 1e4)}), absent("norm-scale"), {"norm_low": 0.0, "norm_high": np.inf}),
  # What is not finite.
  "three steps of NaN, and the layer where it began": (
    spoiled([70, 71, 100], **leaves_at({7: [1.0, np.inf]}, (1.0, 1.0))),
    [("nonfinite", "FAIL", (71, 72, 101), ("out/w",),
      "3 of 400 steps had a norm of inf or NaN, at steps 71, 72, 101; first in 'out/w'.\n"
      "Restore a checkpoint from before step 71. Look at the batch of step 71, and wrap the optimizer in skip_steps, "
      "which drops such steps.\n")]),
  "steps of NaN without layers": (
    spoiled([70]), [("nonfinite", "FAIL", (71,), (), "Put clipjax.watch() first in the chain to record which")]),
  "the first step of all": (
    spoiled([0]), [("nonfinite", "FAIL", (1,), (), "\nLook at the batch of step 1, and wrap the optimizer")]),
  "NaN in a group": (
    spoiled([70], {"grad/norm/a": np.ones(N), "grad/norm/b": at(70, np.nan)},
            flags=dict.fromkeys(("grad/norm", "grad/norm/b"), ROWS == 70)),
    [("nonfinite", "FAIL", (71,), ("b",), "; first in 'b'.")]),
  "counts of nonfinite entries, which go before norms": (
    spoiled([70], **COUNTED), [("nonfinite", "FAIL", (71,), ("in/w",), "first in 'in/w'.")]),
  "layers at the second step of NaN": (
    spoiled([65, 70], **leaves_at({7: [1.0, np.inf]}, (1.0, 1.0))),
    [("nonfinite", "FAIL", (66, 71), ("out/w",), "at steps 66, 71; at step 71 in 'out/w'.")]),
  "layers that were not recorded at a step of NaN": (
    spoiled([70], **leaves_at({7: np.nan}, (1.0, 1.0))), [("nonfinite", "FAIL", (71,), (), "clipjax.watch()")]),
  "steps of NaN between rows": (
    of({"grad/nonfinite_steps": ROWS // 100}),
    [("nonfinite", "FAIL", (), (), "3 of 400 steps had a norm of inf or NaN, at unrecorded steps.\nWrap the")]),
  "NaN in the second of two states": (
    of({"grad_2/norm": at(300, np.nan, 5 * NORMS[::-1]), "grad_2/nonfinite_steps": ROWS >= 300},
       flags={"grad_2/norm": ROWS == 300}),
    [("nonfinite", "FAIL", (301,), (), "had a norm of 'grad_2' of inf or NaN, at step 301.")]),
  "norms that are never finite": (
    run_of({"grad/norm": np.full(N, np.nan)}, flags={"grad/norm": np.ones(N, bool)}),
    [("nonfinite", "FAIL", None, (), "400 of 400 steps had a norm of inf or NaN, at steps 1, 2, 3, 4, 5 and 395 more."),
     ("few-steps", "INFO", (), (), "0 finite norms")]),
  "overflows under a loss scale, pushed after the step": (
    spoiled(OVERFLOWS, {**SKIPPED, "loss_scale": SCALE}),
    [("loss-scaling", "INFO", (1, 2, 3, 151), (), "4 of 400 steps", "Each was dropped and lowered 'loss_scale'")]),
  "overflows under a loss scale, pushed before the step": (
    spoiled(OVERFLOWS, {**SKIPPED, "loss_scale": np.append(2.0**16, SCALE[:-1])}),
    [("loss-scaling", "INFO", (1, 2, 3, 151), ())]),
  "dropped steps without a loss scale": (
    spoiled(OVERFLOWS, SKIPPED),
    [("nonfinite-dropped", "WARN", (1, 2, 3, 151), (), 'skip_steps or on_nonfinite="zero" dropped them.')]),
  "dropped steps under a constant loss scale": (
    spoiled(OVERFLOWS, {**SKIPPED, "loss_scale": np.full(N, 1024.0)}),
    [("nonfinite-dropped", "WARN", (1, 2, 3, 151), ())]),
  "a loss of NaN": (
    lost(200, {}), [("nonfinite-loss", "FAIL", (201,), (), "1 of 400 values of 'loss' were inf or NaN, at step 201.")]),
  "a loss of NaN in a rejected step": (
    lost(200, {"skip/consecutive": at(200, 1.0, 0.0)}), [("nonfinite-loss", "WARN", (201,), (), "rejected these")]),
  **{f"a {key} of NaN": (lost(200, {key: LOSS}, key), [("nonfinite-loss", "FAIL", (201,), (), repr(key))])
     for key in ("train_loss", "train/loss", "total_loss", "val_loss", "d_loss")},
  "a loss of NaN and the leaf that is too": (
    lost(70, {}, **leaves_at({7: [np.inf, 1.0]}, (1.0, 1.0))),
    [("nonfinite-loss", "FAIL", (71,), ("in/w",),
      "1 of 400 values of 'loss' were inf or NaN, at step 71; so was the gradient, in 'in/w'.")]),
  # Ends, and what comes after them.
  "NaN to the end": (
    spoiled(range(200, N), {"grad/zero_fraction": since(200, 1.0, 0.1), "update/ratio": since(200, 9.0, 1e-3),
                            "loss": since(200, np.nan, LOSS)},
            flags=dict.fromkeys(("grad/norm", "loss"), ROWS >= 200),
            **leaves_at({i: [np.nan, 0.0] for i in range(20, 40)})),
    [("nonfinite", "FAIL", None, None)]),
  "a loss that leaves, then NaN": (
    spoiled(range(350, N), {"loss": since(200, 50.0, LOSS) * NOISE}), [("diverged", "FAIL", (201,), ())]),
  "NaN, then a loss that leaves": (
    spoiled(range(150, N), {"loss": since(160, 50.0, LOSS) * NOISE}), [("nonfinite", "FAIL", None, ())]),
  "one step of NaN, and a loss that leaves later": (
    spoiled([150], {"loss": since(300, 50.0, LOSS) * NOISE}),
    [("nonfinite", "FAIL", (151,), ()), ("diverged", "FAIL", (301,), ())]),
  # Clips.
  "a clip that takes most of the gradient, under Adam": (
    dataclasses.replace(of(CONDITIONS["a clip that takes most of the gradient"][0]), optimizer=("ScaleByAdamState",)),
    [("clipped", "INFO", (), (), "Harmless under this optimizer")]),
  "a clip that acts on a group at each step, on each in half of them": (
    of({**GROUPS, "grad/scale/b": at(ROWS[::2], 0.01)}),
    [("clipped", "INFO", (), (), "'grad' clipped some leaf or group in 100% of 400 steps.")]),
  "a clip that acts on one group in most steps": (
    of({**GROUPS, "grad/scale/b": at(ROWS[::4], 1.0, 0.01)}),
    [("clipped-often", "WARN", (), ("b",), f"'grad' clipped 75% of the steps in 'b' {LEFT}")]),
  "groups that a Recorder wrote at two rows as vectors too": (
    of({**GROUPS, "grad/scale/b": at(ROWS[::4], 1.0, 0.01)}, leaves={"grad": ("b", "a")},
       vectors={"grad/scale": (np.array([1, 51]), np.full((2, 2), 0.5))}),
    [("clipped-often", "WARN", (), ("b",), f"'grad' clipped 75% of the steps in 'b' {LEFT}")]),
  "a clip by leaf": (
    of({"grad/clip_fraction": np.ones(N)},
       **layered(np.where(np.arange(40)[:, None] % 5 < [2, 4], 0.01, 1.0), key="grad/scale")),
    [("clipped-often", "WARN", (), ("out/w",), "'grad' clipped 80% of the steps in 'out/w'")]),
  "a spike that a clip caught, and few rows say so": (seen_at_every_eighth(None), []),
  "a spike below the limit, and few rows say so": (seen_at_every_eighth(50.0), [("spikes", "WARN", (201, 301), ())]),
  # Losses and norms.
  **{f"a rising {key}": (
      validated(lambda far: np.abs(far) / 100, key),
      [("overfit", "WARN", (200,), (), f"{key!r} ends 75.2{ABOVE}", "at most 5%, criterion GL5")])
     for key in ("val_loss", "validation/loss", "eval_loss", "Test loss")},
  "one lucky validation": (
    validated(lambda far: np.abs(far) / 100, lucky=1.5), [("overfit", "WARN", (200,), (), ABOVE)]),
  # Both losses are bad, which is no overfitting.
  "a rising validation loss of a run that learns no more": (
    validated(lambda far: np.abs(far) / 100, loss=np.where(ROWS < 100, LOSS, LOSS[:100].min())), []),
  "a validation loss that rises a little": (validated(lambda far: np.abs(far) / 5000), []),
  "a validation loss that falls": (validated(lambda far: 1 - far / 200), []),
  **{f"a {key} that leaves": (
      run_of({k: v for k, v in healthy().items() if k != "loss"} | {key: since(250, 40.0, LOSS) * NOISE}),
      [("diverged", "FAIL", (251,), ())])
     for key in ("train_loss", "train/loss", "trainLoss", "total_loss", "training/total-loss", "nll")},
  "a loss that explodes in eighteen steps": (
    run_of({"loss": np.geomspace(2.5, 1e8, 18)}), [("diverged", "FAIL", (2,), (), "\nLower the learning rate or")]),
  "norms that explode without a loss": (
    run_of({"grad/norm": NORMS * since(300, 1000.0)}),
    [("diverged", "FAIL", (301,), (), "The norm rose from ", " at step 301 and stayed high.")]),
  # Of two losses none is named as the trained one, as in a GAN.
  "norms of the second state that explode without a loss": (
    run_of({"g_loss": LOSS, "d_loss": LOSS[::-1], "g/norm": NORMS, "d/norm": NORMS[::-1] * since(300, 1e4)}),
    [("diverged", "FAIL", (301,), (), "The norm of 'd' rose from ")]),
  "a flat loss": (
    of({"loss": 0.3 * NOISE}),
    [("not-learning", "WARN", (), (),
      "'loss' hardly fell: 0.302 at the start, 0.283 at its best, over 400 recorded losses.")]),
  "a flat loss recorded from the middle on": (of({"loss": 0.3 * NOISE}, steps=ROWS + 5000), []),
  "a flat loss, and steps that count examples": (
    of({"loss": 2.303 * NOISE}, steps=65536 * (ROWS + 1)), [("not-learning", "WARN", (), ())]),
  **{f"a spike that only skip_steps recorded, rejected {times} times": (
      run_of({"loss": LOSS, "skip/norm": at(200, 50.0, NORMS), "skip/consecutive": at(200, times, 0.0)}), [want])
     for times, want in ((1.0, ("spikes-caught", "INFO", (201,), ())), (0.0, ("spikes", "WARN", (201,), ())))},
  "a spike of a second state": (of({"critic/norm": at(300, 80.0, NORMS[::-1])}), [("spikes", "WARN", (301,), ())]),
  "a small validation loss that triples": (of({"val_loss": at(300, 3e-3, since(20, 1e-3, 2.0))}), []),
  "a small jump of a loss that is not trained": (of({"aux_loss": at(200, 1.6) * NOISE}), []),
  "series that are not fully judged": (
    of({"aux_loss": NOISE, "copy/norm": healthy()["grad/norm"], "eval_loss": at([5, 9], 1.0, np.nan)}),
    [("not-judged", "INFO", (), (), "'aux_loss' (only for spikes and nonfinite values, since 'loss' is the training "
      "loss)", "'copy' (same norms as 'grad')", "'eval_loss' (fewer than 8 values)")]),
  "a ratio of parameters that were not given": (of({"update/ratio": np.zeros(N)}), []),
  "the ratio of a gradient": (of({"grad/ratio": np.full(N, 50.0)}), []),
  **{f"equal norms of {x:g}": (
      run_of({"grad/norm": np.full(N, x)}), [("norms", "INFO", (), (), f"p50 {x:.3g}, p90 {x:.3g}, p99 {x:.3g}")])
     for x in (1e-300, 1.0, 1e300)},
  "norms that differ by rounding": (run_of({"grad/norm": (1 + 1e-7 * (ROWS % 2)) * at(200, 1 + 1e-5)}), []),
  "a gradient of zeros": (
    run_of({"grad/norm": np.zeros(N)}),
    [("zero-gradient", "FAIL", (), (), "The norm of 'grad' was exactly 0 at all 400 steps with a finite norm."),
     ("norms", "INFO", (), (), "p50 0, p90 0, p99 0", "warm-up.\n\n")]),  # No advice: suggest_max_norm raises there.
  "a gradient that is seldom there, but not gone": (run_of({"grad/norm": ROWS % 100 == 7}), []),
  "only skip_steps recorded": (
    run_of({key: value for key, value in healthy().items() if key.startswith("skip/")}),
    [("norms", "INFO", (), (), "over 360 finite norms")]),
  "a state of another name": (
    run_of({"skip/norm": np.ones(N), "critic/norm": np.full(N, 7.0)}), [("norms", "INFO", (), (), "p50 7")]),
  **{f"norms {text}": (
      run_of({"grad/norm": healthy()["grad/norm"] * factor}),
      [("norm-scale", "INFO", (), (), f"is {number(np.median(healthy()['grad/norm'][40:]) * factor)}, {text}.")])
     for factor, text in ((1e4, "above 100"), (1e-8, "below 1e-05"))},
}  # fmt: skip


@pytest.mark.parametrize(
  "case",
  [
    *(pytest.param((of(columns), want), id=name) for name, (columns, want) in CONDITIONS.items()),
    *(pytest.param(case, id=name) for name, case in RUNS.items()),
  ],
)
def test_a_condition_has_its_findings_and_no_other_defect(case):
  run, want, *limits = case
  check(run, want, *limits)


def test_no_verdict_contradicts_itself():
  """Two conditions at once, of all pairs of those that have a finding of their own."""
  by_name = {want[0][0]: columns for columns, want in CONDITIONS.values() if want}
  some = [*by_name.values(), CONDITIONS["updates far too large, and nothing is learned"][0]]
  for one, other in itertools.combinations(some, 2):
    report = clipjax.runs.diagnose(of(one | other))
    advice = " ".join(finding.advice for finding in report)
    assert not ("Raise the learning rate" in advice and "Lower the learning rate" in advice), str(report)
    assert len(re.findall("Restore a checkpoint", advice)) <= 1, str(report)
    names = [finding.name for finding in report if finding.level != "INFO"]
    assert len(names) == len(set(names))
