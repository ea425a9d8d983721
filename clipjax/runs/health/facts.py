"""What is good to know of a run, and of its record, that is no defect."""

from collections.abc import Iterator, Sequence

from clipjax.runs.health.detectors import FEWEST
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.series import series_of
from clipjax.runs.health.view import View
from clipjax.runs.roles import Role, judged_states, keys_with, main_loss
from clipjax.runs.speed import speed
from clipjax.runs.words import counted, duration, several


def too_few(view: View) -> Iterator[Finding]:
  """INFO where there are no norms, or too few to judge."""
  count = view.norms.typical.size
  if view.name is None:
    advice = "Put clipjax.watch() or a clip with track=True into the chain, and push the whole optimizer state."
    yield Finding("INFO", "no-norms", "No norm was recorded, so none is judged.", advice)
  elif not view.enough(count):
    norms = f"{count} finite norm{'' if count == 1 else 's'} after the warm-up of {view.norms.warmup_steps} steps"
    message = f"{norms} {'is' if count == 1 else 'are'} too few to judge; only "
    message += "what needs no statistics was judged."
    rule = f"at least {view.limits.min_steps}, a limit of clipjax"
    yield Finding("INFO", "few-steps", message, "Record more steps.", rule)


def left_out(view: View) -> Iterator[Finding]:
  """INFO where the record has more than the run: rows of a course that was given up, and torn lines."""
  superseded, unreadable = view.run.superseded, view.run.unreadable
  if superseded:
    what = "1 row was left out, as the run" if superseded == 1 else f"{superseded:,} rows were left out, as the run"
    message = f"{what} went back to a step before and recorded from there again."
    yield Finding("INFO", "superseded", message, "To keep both courses, record each in a file of its own.")
  if unreadable:
    what = "1 line could not be read and was" if unreadable == 1 else f"{unreadable:,} lines could not be read and were"
    message = f"{what} left out, as where a process ended while it wrote."
    yield Finding("INFO", "unreadable", message)


def not_judged(view: View) -> Iterator[Finding]:
  """INFO: which losses and states are not judged, or not wholly, and why."""
  run, said = view.run, []
  main = main_loss(run.columns)
  others = [key for key in keys_with(run.columns, Role.LOSS) if key != main]
  if others:
    why = "of several losses none is called as the one that is trained" if main is None else f"{main!r} is the one"
    said.append(f"{_list(others)}: for spikes and for what is not finite alone, since {why}")
  if same := [name for name in judged_states(run) if name not in view.names]:
    said.append(f"{_list(same)}: the same norms as {_list(view.names)}")
  few = [series.key for series in series_of(run) if 0 < series.values.size < FEWEST]
  if few:
    said.append(f"{_list(few)}: fewer than {FEWEST} values")
  if said:
    yield Finding("INFO", "not-judged", f"Not judged in full: {'; '.join(said)}.")


def _list(names: Sequence[str]) -> str:
  return several(names, names)


def parameters(view: View) -> Iterator[Finding]:
  """INFO: the number of the parameters."""
  if view.run.parameters is not None:
    yield Finding("INFO", "parameters", f"{view.run.parameters:,} parameters.")


def step_time(view: View) -> Iterator[Finding]:
  """INFO: the time of a step, and the throughput."""
  found = speed(view.run, view.norms.begin)
  if found is None:
    return
  message = f"{duration(found.step_time)} a step, the median of {found.parts} parts of the run; from push to push "
  message += f"median {duration(found.median)}, p99 {duration(found.p99)}."
  yield Finding("INFO", "step-time", message)
  for key, rate in found.rates.items():
    yield Finding("INFO", "throughput", f"{counted(rate)} {key} a second at that step time.")
