"""`Finding`, one result of `diagnose`."""

from typing import NamedTuple


class Finding(NamedTuple):
  """One line of a `HealthReport`. The table, the page and the terminal output are all built from these fields.

  Attributes:
    level: "FAIL", "WARN" or "INFO".
    name: a short fixed name, such as "clipped-often".
    message: what was found, with its numbers.
    advice: what to do next; empty if there is nothing to do.
    rule: the limit in words, such as "at most 50%"; empty if nothing is judged.
    source: title and address of the source of the rule; empty for a clipjax limit.
    steps: every step that the finding concerns, as pushed; empty if it concerns the whole run.
    leaves: the names of the leaves or groups that it concerns.

  Example:
    >>> import clipjax
    >>> finding = clipjax.runs.Finding("WARN", "spikes", "1 norm was a spike, at step 7.", "Clip it.", steps=(7,))
    >>> print(f"{finding.level} {finding.name}: {finding.message} {finding.advice}")
    WARN spikes: 1 norm was a spike, at step 7. Clip it.
  """

  level: str
  name: str
  message: str
  advice: str = ""
  rule: str = ""
  source: str = ""
  steps: tuple[int, ...] = ()
  leaves: tuple[str, ...] = ()
