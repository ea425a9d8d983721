"""Pages for the tests of reports, and runs that record everything a page shows."""

import contextlib
from html.parser import HTMLParser
from unittest import mock

import numpy as np

import clipjax
from clipjax.runs.health.verdict import HealthReport, diagnose
from clipjax.runs.report import build_page, html
from clipjax.runs.report.shown import shown_of
from clipjax.runs.run import Run

VOID = {"meta", "link", "wbr", "br", "path", "use", "rect", "image", "line", "circle"}


class Page(HTMLParser):
  """A page as its tags with their attributes, its text and its data; it must be well nested."""

  def __init__(self, source):
    super().__init__(convert_charrefs=True)
    self.source, self.tags, self.open, self.words, self.data, self.css = source, [], [], [], "", ""
    self.feed(source)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    assert len(attrs) == len(dict(attrs))
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "script":
      self.data += data
    elif self.open and self.open[-1] == "style":
      self.css += data
    else:
      self.words.append(data)

  @property
  def text(self):
    return "".join(self.words)

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]

  def alt(self, start):
    (text,) = {attrs["aria-label"] for attrs in self.all("svg") if attrs["aria-label"].startswith(start)}
    return text


def make(norm, *, bad=(), limit=2.0, names=(), every=10, path="runs/demo.jsonl", **columns):
  """A run with these norms, nonfinite at the indices `bad`, and with everything else that a page shows."""
  norm = np.array(norm, np.float64)
  n = norm.size
  steps = np.arange(1, n + 1)
  flag = np.isin(np.arange(n), bad)
  norm[flag] = np.nan
  with np.errstate(divide="ignore"):
    scale = np.minimum(1.0, limit / norm)
  data = {"grad/norm": norm, "grad/max_norm": np.broadcast_to(np.float64(limit), n).copy(), "grad/scale": scale}
  data |= {key: np.array(values, np.float64) for key, values in columns.items()}
  flags = {"grad/norm": flag} if flag.any() else {}
  vectors, weights = {}, None
  if names and n:
    at = np.unique(np.append(np.arange(0, n, every), np.flatnonzero(flag)))
    values = np.outer(np.nan_to_num(norm[at], nan=1.0), np.arange(1, len(names) + 1) / len(names))
    values[flag[at], 0] = np.inf
    vectors = {"grad/norm": (steps[at], values), "update/ratio": (steps[at], np.full(values.shape, 2e-3))}
    counts = np.outer(np.arange(1, at.size + 1), [0.0, 3.0, 5.0, 1.0])
    weights = steps[at], np.linspace(-4, 0, 5), counts
  leaves = {"grad": tuple(names), "update": tuple(names)} if names else {}
  return Run(path, steps, data, flags, leaves, vectors, weights, 1234567 if names else None)


def full(n=300, names=("embed", "layers/0/w", "layers/1/w"), **kwargs):
  """A run with everything: a spike in the middle and a nonfinite step after it."""
  rng = np.random.default_rng(0)
  norm = np.exp(rng.normal(0, 0.2, n))
  norm[n // 2 : n // 2 + 1] = 50.0
  columns = {
    "time": 1.79e9 + np.arange(n) * 0.125,
    "loss": np.linspace(5, 2, n),
    "val_loss": np.where(np.arange(n) % 10 == 0, 3.0, np.nan),
    "learning_rate": np.full(n, 3e-4),
    "tokens": np.full(n, 1000.0),
    "update/norm": norm * 1e-2,
    "update/ratio": np.full(n, 1e-3),
  }
  return make(norm, **({"bad": [n // 2 + 1], "names": names} | columns | kwargs))


@contextlib.contextmanager
def figures(drawn):
  """Pages with their figures, or with empty ones that have the alt text: drawing is most of the time of a page."""
  with mock.patch.object(html, "svg", _empty) if not drawn else contextlib.nullcontext():
    yield


def _empty(draw, width, alt):
  return f'<svg role="img" aria-label="{html.text(alt)}"></svg>'


def written(run, tmp_path, *, drawn=False, **options):
  """The page that `write_report` writes."""
  path = tmp_path / "report.html"
  with figures(drawn):
    assert clipjax.runs.write_report(run, str(path), **options) == path
  assert list(tmp_path.iterdir()) == [path]
  return Page(path.read_text(encoding="ascii"))


def shown(run, findings=(), events=(), warmup_steps=None):
  """What the report of a run with this verdict shows."""
  warmup_steps = diagnose(run).warmup_steps if warmup_steps is None else warmup_steps
  return shown_of(run, HealthReport(tuple(findings), run.path, len(run), warmup_steps, tuple(events)))


def judged(run, findings=(), events=(), *, drawn=False):
  """The page of a run with this verdict."""
  with figures(drawn):
    source = build_page.whole_page(run, shown(run, findings, events).report)
  return Page(source.encode("ascii", "xmlcharrefreplace").decode("ascii"))


# Figures ------------------------------------------------------------------------------------------------------------


def panel(figure, title):
  """The axes with this title."""
  (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
  return axes


def labels(axes):
  """The words of the legend."""
  return [text.get_text().strip() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def lines_of(axes):
  """The lines by their label."""
  return {line.get_label().strip(): line for line in axes.lines}
