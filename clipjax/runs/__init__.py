"""The run wing records a training run, judges it and draws it. Everything here runs on the host.

A run flows one way: optimizer state -> `packing` -> `rows` -> file -> `Run` -> findings -> text or page. `schema` names
every key of a row once.
"""

from clipjax.runs.health.events import Event as Event
from clipjax.runs.health.events import Move as Move
from clipjax.runs.health.findings import Finding as Finding
from clipjax.runs.health.limits import HealthLimits as HealthLimits
from clipjax.runs.health.verdict import HealthReport as HealthReport
from clipjax.runs.health.verdict import diagnose as diagnose
from clipjax.runs.reading.read import read_run as read_run
from clipjax.runs.record.recorder import Recorder as Recorder
from clipjax.runs.report.write import plot_norms as plot_norms
from clipjax.runs.report.write import write_report as write_report
from clipjax.runs.run import Run as Run
from clipjax.runs.suggest import Suggestion as Suggestion
from clipjax.runs.suggest import suggest_max_norm as suggest_max_norm

__all__ = [  # noqa: RUF022  (in the order of a run)
  "Recorder",
  "Run",
  "read_run",
  "diagnose",
  "HealthReport",
  "HealthLimits",
  "Finding",
  "Event",
  "Move",
  "suggest_max_norm",
  "Suggestion",
  "write_report",
  "plot_norms",
]
