"""Rows for a run of wandb, which takes only growing steps and is logged to by the training as well.

Our rows come late, and wandb has one row a step: a row of ours joins the open row of the user's, or else takes the next
step. All keys stand below "clipjax/", on an axis of their own, "clipjax/step": no number of the user's is replaced.

A step that we take is lost to a later `run.log(..., step=)` of the user's. Without `step=` wandb counts by itself, and
nothing can be lost. With it, steps are taken only up to that of the last push, and only while the user's steps keep up
with those that are pushed; otherwise rows wait for the user's next one, or for the end.
"""

from typing import Any

from clipjax.runs.schema import STEP, TIME

PREFIX = "clipjax/"
_BEHIND = 100  # So many rows more than at first must wait before it is said.


class WandbRows:
  """Hands on one row at a time, in the thread that logs."""

  def __init__(self, run: Any):
    self.name = "wandb"
    self._run = run
    self._warning = ""
    self._has_warned = False
    self._last = -1  # The step of the open row, where it has one of ours.
    self._has_axis = False
    self._has_steps: bool | None = False  # Whether the user logs with `step=`.
    self._keeps_up = False
    self._first_waiting: int | None = None

  def offer(self, entry: Any, pushed: tuple[int, int] | None, waiting: int, at_any_step: bool = False) -> bool:
    """Hands on a row, if there is a step for it.

    Args:
      entry: the row.
      pushed: the steps of the push before and of the last push.
      waiting: how many rows wait.
      at_any_step: nothing is logged after this, and a row may take any step.
    """
    if getattr(self._run, "_is_finished", False):  # Asked for its step, it would wait for half a minute.
      raise RuntimeError("the run is finished")
    if not self._has_axis:
      self._run.define_metric(PREFIX + STEP)
      self._run.define_metric(PREFIX + "*", step_metric=PREFIX + STEP)
      self._has_axis = True
    step = self._run.step
    self._look(step, pushed, waiting)
    values = {f"{PREFIX}{key}": value for key, value in entry.values.items()} | {PREFIX + STEP: entry.step}
    if entry.time is not None:
      values[PREFIX + TIME] = entry.time
    if step > self._last:
      self._run.log(values, commit=False)  # It joins what the user logs at this step.
      self._last = step
      return True
    if not (at_any_step or self._may_take(self._last + 1, pushed)):
      return False
    self._run.log({}, commit=True)  # Closes the open row; `step=` here would hide whether the user gives one.
    self._run.log(values, commit=False)
    self._last += 1
    return True

  def new_warning(self) -> str:
    """What is to be said since the last call; "" for nothing."""
    warning, self._warning = self._warning, ""
    return warning

  def _may_take(self, step: int, pushed: tuple[int, int] | None) -> bool:
    return not self._has_steps or (self._keeps_up and pushed is not None and step <= pushed[1])

  def _look(self, step: int, pushed: tuple[int, int] | None, waiting: int) -> None:
    """Learns from wandb's step how the user logs."""
    had_steps, self._has_steps = self._has_steps, _has_steps(self._run)
    is_ahead = step > self._last  # The user has logged since our last row.
    if self._has_steps and not had_steps and not is_ahead:
      self._warn(f"a `step=` of yours is not above {self._last}, where wandb is")
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
        f"wandb takes one row a step, and {what}: rows of clipjax wait for your next step or the end of the recording, "
        "and wandb drops rows of yours at steps that it has passed. Log the steps that you push, or give clipjax a run "
        'of its own: writers=[wandb.init(reinit="create_new")].'
      )


def _has_steps(run: Any) -> bool:
  """Whether somebody has logged with `step=`; wandb notes it for its statistics, and says so nowhere else."""
  feature = getattr(getattr(run, "_telemetry_obj", None), "feature", None)
  return bool(getattr(feature, "set_step_log", False))
