"""Useful facts about a run and its record that are not defects, all INFO."""

from collections.abc import Iterator, Sequence

from clipjax.runs.health.findings import Finding
from clipjax.runs.health.series import series_of
from clipjax.runs.health.spike_detectors import FEWEST
from clipjax.runs.health.view import View
from clipjax.runs.roles import Role, judged_states, keys_with, main_loss
from clipjax.runs.speed import speed
from clipjax.runs.words import counted, duration, several


def too_few(view: View) -> Iterator[Finding]:
  """INFO if there are no norms, or too few for statistics."""
  count = view.norms.typical.size
  if view.name is None:
    advice = "Add clipjax.watch() or a clip with track=True to the chain, and push the whole optimizer state."
    yield Finding("INFO", "no-norms", "No gradient norm was recorded, so norms are not judged.", advice)
  elif not view.enough(count):
    norms = f"{count} finite norm{'' if count == 1 else 's'} after the {view.norms.warmup_steps}-step warm-up"
    message = f"{norms} {'is' if count == 1 else 'are'} too few for statistics; only checks that need none were made."
    rule = f"at least {view.limits.min_steps}, a clipjax limit"
    yield Finding("INFO", "few-steps", message, "Record more steps.", rule)


def left_out(view: View) -> Iterator[Finding]:
  """INFO if the record holds more than the run: rows superseded by a resumed run, and torn lines."""
  superseded, unreadable = view.run.superseded, view.run.unreadable
  if superseded:
    what = "1 row was left out" if superseded == 1 else f"{superseded:,} rows were left out"
    message = f"{what}: the run went back to an earlier step and recorded again from there."
    yield Finding("INFO", "superseded", message, "To keep both versions, record each in its own file.")
  if unreadable:
    what = "1 line could not be read and was" if unreadable == 1 else f"{unreadable:,} lines could not be read and were"
    message = f"{what} left out; a process that dies while writing leaves such a line."
    yield Finding("INFO", "unreadable", message)


def not_judged(view: View) -> Iterator[Finding]:
  """INFO: which losses and states are not fully judged, and why."""
  # Three reasons: another loss is the trained one, another state has the same norms, or there are too few values.
  run, said = view.run, []
  main = main_loss(run.columns)
  others = [key for key in keys_with(run.columns, Role.LOSS) if key != main]
  if others:
    why = "no name tells which loss is trained" if main is None else f"{main!r} is the training loss"
    said.append(f"{_list(others)} (only for spikes and nonfinite values, since {why})")
  if same := [name for name in judged_states(run) if name not in view.names]:
    said.append(f"{_list(same)} (same norms as {_list(view.names)})")
  few = [series.key for series in series_of(run) if 0 < series.values.size < FEWEST]
  if few:
    said.append(f"{_list(few)} (fewer than {FEWEST} values)")
  if said:
    yield Finding("INFO", "not-judged", f"Not fully judged: {'; '.join(said)}.")


def _list(names: Sequence[str]) -> str:
  return several(names, names)


def parameters(view: View) -> Iterator[Finding]:
  """INFO: the number of parameters."""
  if view.run.parameters is not None:
    yield Finding("INFO", "parameters", f"{view.run.parameters:,} parameters.")


def step_time(view: View) -> Iterator[Finding]:
  """INFO: the time per step, and the throughput."""
  found = speed(view.run, view.norms.begin)
  if found is None:
    return
  message = f"{duration(found.step_time)} per step (median of {found.parts} parts of the run); between pushes: median "
  message += f"{duration(found.median)}, p99 {duration(found.p99)}."
  yield Finding("INFO", "step-time", message)
  for key, rate in found.rates.items():
    yield Finding("INFO", "throughput", f"{counted(rate)} {key} per second at that step time.")
