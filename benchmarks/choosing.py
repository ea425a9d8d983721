"""How to choose `max_norm`: compares the advice of `suggest_max_norm` with a sweep of thresholds, no clip, other rules.

Run `python benchmarks/choosing.py [--quick] [--models vae gru] [--steps 300] [--seeds 5] [--out docs/choosing.md]`: it
trains the runs of `choosing_runs.py`, on the models of `choosing_models.py` under every optimizer, and under SGD on two
models of `small_models.py`, on which the rule was chosen. It writes the page and the pictures beside it. Every number,
list and verdict on the page is derived from the runs.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from choosing_free import free_section
from choosing_long import LENGTHS, Long, choice_section, long_section, long_study, long_summary
from choosing_models import NEW_MODELS
from choosing_page import (
  FAST,
  introduction,
  needed_section,
  old_section,
  poison_section,
  sgd_section,
  sources_section,
  summary,
)
from choosing_picture import picture
from choosing_runs import FACTORS, OPTIMIZERS, Study, study
from small_models import MODELS

MIN_STEPS = 60  # Fewer leave no room for the poisoned batches and for a phase.
OLD_SEEDS = 3  # For the models that the rule was chosen on, and for long records.
FAST_OLD = ("mlp", "cnn")  # The other two take longer than everything else together.
LONG = ("residual", "mixer", "vae", "mlp", "cnn")  # Models that converge, and one that does not.


def write(
  groups: Sequence[Sequence[Study]], old: Sequence[Study], longs: dict[str, Long], steps: int, out: Path
) -> str:
  """Writes the page and its pictures; returns the text of the page."""
  everything = [s for studies in groups for s in studies]
  shown = groups if everything else [old]
  seeds = shown[0][0].grid.shape[0]
  new_longs, old_longs = ([long for name, long in longs.items() if name in models] for models in (NEW_MODELS, MODELS))
  free = [studies for studies in groups if OPTIMIZERS[studies[0].optimizer].scale_free]
  images = [out.with_suffix(".png"), out.with_name(f"{out.stem}_adam.png")]
  lines = [
    *introduction([s.title for s in shown[0]], bool(everything), steps, seeds),
    *summary(shown, old if everything else [], long_summary([*new_longs, *old_longs])),
    *needed_section([s for studies in shown for s in studies]),
    *poison_section([s for studies in shown for s in studies], steps),
    *sgd_section(shown[0], images[0].name),
    *sources_section(shown[0]),
    *(free_section(free, images[1].name) if free else []),
    *(long_section(new_longs, old_longs, steps) if longs else []),
    *choice_section(old_longs),
    *(old_section(old) if everything and old else []),
    "What holds for models this small, at a constant rate and for a few hundred steps, need not hold for a large model "
    "with a schedule. A sweep is the way to find out.",
  ]
  text = "\n".join(lines) + "\n"
  out.write_text(text, encoding="utf-8")
  picture(shown[0], FAST).savefig(images[0], dpi=110)
  if free:
    picture(free[0], FACTORS).savefig(images[1], dpi=110)
  return text


def main() -> None:
  """Trains everything, then writes the page and its pictures."""
  parser = argparse.ArgumentParser(description=__doc__)
  models = {**NEW_MODELS, **MODELS}
  parser.add_argument("--models", nargs="+", choices=list(models), default=[*NEW_MODELS, *FAST_OLD])
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument(
    "--quick", action="store_true", help="one seed, 60 steps, two optimizers, one long record: only to see that it runs"
  )
  parser.add_argument("--out", type=Path, default=Path("docs/choosing.md"))
  args = parser.parse_args()
  steps, seeds = (MIN_STEPS, 1) if args.quick else (args.steps, args.seeds)
  optimizers, most_long = (["adam"], 1) if args.quick else ([name for name in OPTIMIZERS if name != "sgd"], len(LONG))
  if steps < MIN_STEPS or seeds < 1:
    parser.error(f"--steps must be at least {MIN_STEPS} and --seeds at least 1")
  lengths = tuple(max(n * steps // LENGTHS[0], MIN_STEPS) for n in LENGTHS)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  start = time.perf_counter()

  def timed(name: str, optimizer: str) -> Study:
    done = study(models[name], optimizer, steps, seeds if name in NEW_MODELS else min(seeds, OLD_SEEDS))
    print(f"{name}, {OPTIMIZERS[optimizer].title}: done after {time.perf_counter() - start:.0f} s", flush=True)
    return done

  def timed_long(name: str, sgd: "Future[Study]") -> Long:
    s = sgd.result()
    done = long_study(models[name], float(s.rates[s.stable]), lengths, steps, min(seeds, OLD_SEEDS))
    print(f"{name}, long records: done after {time.perf_counter() - start:.0f} s", flush=True)
    return done

  # Two at a time: a compiled scan over a small model leaves a second core mostly idle.
  with ThreadPoolExecutor(2) as pool:
    new, old = ([name for name in args.models if name in among] for among in (NEW_MODELS, MODELS))
    sgd = {name: pool.submit(timed, name, "sgd") for name in (*old, *new)}
    rest = [[pool.submit(timed, name, optimizer) for name in new] for optimizer in optimizers]
    long = {name: pool.submit(timed_long, name, sgd[name]) for name in [x for x in LONG if x in sgd][-most_long:]}
    groups = [[future.result() for future in part] for part in ([sgd[name] for name in new], *rest) if part]
    studies = [sgd[name].result() for name in old]
    longs = {name: future.result() for name, future in long.items()}
  print(write(groups, studies, longs, steps, args.out))


if __name__ == "__main__":
  main()
