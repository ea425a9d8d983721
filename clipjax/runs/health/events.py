"""What happened in a run: spikes of several series at the same time are one `Event`."""

from typing import Any, NamedTuple


class Move(NamedTuple):
  """How one series moved in an event.

  Attributes:
    key: the series, as in `run[key]`: "loss", "grad/norm", "update/norm".
    step: the first step at which it was a spike.
    peak: its largest value in the event; inf where it was not finite.
    usual: the median of the values before the event.
  """

  key: str
  step: int
  peak: float
  usual: float


class Event(NamedTuple):
  """Steps that follow each other at which one or more series had a spike.

  Attributes:
    start: the first of these steps, as it was pushed.
    end: the last one.
    moves: how each series moved, what moved first in front.
    leaves: the leaves or groups whose norm grew most, the strongest first; empty where none was recorded.
    batches: what the caller calls the batches of these steps; empty where they have no names.
    is_caught: whether nothing of it reached the parameters: the clip brought the norm down to the usual one, or
      `skip_steps` or a clip dropped the step.
    is_recovered: whether the loss came back to where it was before; None where no loss was recorded.
  """

  start: int
  end: int
  moves: tuple[Move, ...]
  leaves: tuple[str, ...] = ()
  batches: tuple[Any, ...] = ()
  is_caught: bool = False
  is_recovered: bool | None = None
