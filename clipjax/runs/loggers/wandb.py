"""Rows for a run of wandb, which accepts only increasing steps and is also logged to by the training code.

Our rows come late, and wandb has one row per step. A row of ours joins the user's open row, or else takes the next
step. All our keys begin with "clipjax/" and use their own axis, "clipjax/step", so no number of the user is replaced.

A later `run.log(..., step=)` of the user cannot use a step that we took. Without `step=`, wandb counts by itself and
nothing can be lost. With it, we take steps only up to the last pushed one, and only while the user's steps keep up with
the pushed ones. Otherwise our rows wait for the user's next step, or for the end.
"""

from typing import Any

from clipjax.runs.schema import STEP, TIME

PREFIX = "clipjax/"
_BEHIND = 100  # Warn once this many more rows wait than at first.


class WandbRows:
  """Logs one row at a time, in the thread that pushes."""

  def __init__(self, run: Any):
    self.name = "wandb"
    self._run = run
    self._warning = ""
    self._has_warned = False
    self._last = -1  # The step of the open row if it holds a row of ours.
    self._has_axis = False
    self._has_steps: bool | None = False  # Whether the user logs with `step=`.
    self._keeps_up = False
    self._first_waiting: int | None = None

  def offer(self, entry: Any, pushed: tuple[int, int] | None, waiting: int, at_any_step: bool) -> bool:
    """Logs a row if there is a step for it; returns whether it did.

    Args:
      entry: the row.
      pushed: the steps of the last two pushes.
      waiting: how many rows wait.
      at_any_step: whether a row may take any step, because nothing is logged afterwards.
    """
    if getattr(self._run, "_is_finished", False):  # Asking for its step would block for half a minute.
      raise RuntimeError("the run is finished")
    if not self._has_axis:
      self._run.define_metric(PREFIX + STEP)
      self._run.define_metric(PREFIX + "*", step_metric=PREFIX + STEP)
      self._has_axis = True
    # The user has opened a new row: join it.
    step = self._run.step
    self._look(step, pushed, waiting)
    values = {f"{PREFIX}{key}": value for key, value in entry.values.items()} | {PREFIX + STEP: entry.step}
    if entry.time is not None:
      values[PREFIX + TIME] = entry.time
    if step > self._last:
      self._run.log(values, commit=False)  # It joins what the user logs at this step.
      self._last = step
      return True
    # Otherwise close the open row and take the next step, unless the user may need it.
    if not (at_any_step or self._may_take(self._last + 1, pushed)):
      return False
    self._run.log({}, commit=True)  # Not by `step=`, which would hide whether the user passes one.
    self._run.log(values, commit=False)
    self._last += 1
    return True

  def new_warning(self) -> str:
    """The warning since the last call; "" if there is none."""
    warning, self._warning = self._warning, ""
    return warning

  def _may_take(self, step: int, pushed: tuple[int, int] | None) -> bool:
    return not self._has_steps or (self._keeps_up and pushed is not None and step <= pushed[1])

  def _look(self, step: int, pushed: tuple[int, int] | None, waiting: int) -> None:
    """Learns how the user logs from the step of wandb."""
    had_steps, self._has_steps = self._has_steps, _has_steps(self._run)
    is_ahead = step > self._last  # The user has logged since our last row.
    if self._has_steps and not had_steps and not is_ahead:
      self._warn(f"your `step=` is not above {self._last}, the step of wandb")
    if not is_ahead or not self._has_steps or pushed is None:
      return
    self._keeps_up = step >= pushed[0]
    if self._first_waiting is None:
      self._first_waiting = waiting
    elif not self._keeps_up and waiting > self._first_waiting + _BEHIND:
      self._warn(f"`step=` was {step} after the push of step {pushed[1]}")

  def _warn(self, what: str) -> None:
    if not self._has_warned:
      self._has_warned = True
      self._warning = (
        f"wandb takes one row per step, and {what}: clipjax rows wait for your next step or the end of the recording, "
        "and wandb drops your rows at steps that it has passed. Log at the steps that you push, or give clipjax a run "
        'of its own: writers=[wandb.init(reinit="create_new")].'
      )


def _has_steps(run: Any) -> bool:
  """Whether anybody logged with `step=`; wandb notes it only in its telemetry."""
  feature = getattr(getattr(run, "_telemetry_obj", None), "feature", None)
  return bool(getattr(feature, "set_step_log", False))
