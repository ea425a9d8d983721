"""Writers (to be replaced)."""

from clipjax.runs.outputs import Writer


class Writers:
  def __init__(self, targets, warn):
    if not hasattr(targets, "__iter__"):
      raise TypeError(f"`writers` must be a sequence, got {type(targets).__name__}: pass [writer].")
    self._w = [Writer(t) for t in targets]

  def hand_on(self, row, leaves):
    for w in self._w:
      w.write(row)

  def pace(self, step):
    pass

  def flush(self):
    for w in self._w:
      w.flush()

  def close(self):
    self.flush()
