"""The page of a report: escaping, style sheet, figures as inline SVG, data as JSON. One file, no script, no network.

`text` escapes everything that comes from a run (leaf names, keys, its path), `data_block` the data. A figure becomes
SVG with real text; its colours are variables of the style sheet and follow the reader's light or dark mode. The page
has each figure twice, for a screen and for a phone, and the style sheet shows one of them.
"""

import hashlib
import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

import clipjax
from clipjax.runs.report import axes
from clipjax.runs.report.own_pages import START
from clipjax.runs.report.style import CSS
from clipjax.runs.sources import BY_TEXT
from clipjax.runs.words import plain

INK = "#202124"  # Placeholder for the text colour of the page: it becomes `currentColor`.
_STYLE: dict[str, Any] = {
  **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
  "svg.fonttype": "none",
  "font.family": ["sans-serif"],
  "font.sans-serif": ["DejaVu Sans"],
  "font.size": 9,
  "savefig.transparent": True,
}
_PHONE_SIZE = 10  # In a figure 3.9 inches wide: 12 pixels on a phone 400 pixels wide.
_VARIABLES = {
  INK: "currentColor",
  axes.BLUE: "var(--blue)",
  axes.VERMILION: "var(--vermilion)",
  axes.GREEN: "var(--green)",
  axes.ORANGE: "var(--orange)",
  axes.PURPLE: "var(--purple)",
  axes.SKY: "var(--sky)",
  axes.GREY: "var(--grey)",
}
_COLOUR = re.compile("|".join(_VARIABLES))
# The page may fetch nothing, whatever it contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object) -> str:
  """Escapes text for HTML or an attribute; invisible characters, line ends included, become escapes too."""
  return html.escape(plain(str(value)), quote=True)


def code(value: object) -> str:
  """A name set as code; a line may break after each part of a path."""
  return f"<code>{text(value).replace('/', '/<wbr>')}</code>"


def source(value: str) -> str:
  """The source of a rule, as a link only if this package knows it: a name in a run may look like an address."""
  # Only an exact match becomes a link; a lookalike stays text.
  found = BY_TEXT.get(value)
  return text(value) if found is None else f'<a href="{text(found.address)}">{text(found.title)}</a>'


def figure(draw: Callable[[float], Figure], alt: str, caption: str) -> str:
  """A figure for a screen and one for a phone, each with the alt text, over a caption of HTML."""
  # The style sheet hides one of the two; a figure scaled to a phone would be unreadable.
  images = []
  for kind, width in (("wide", axes.WIDE), ("narrow", axes.NARROW)):
    images.append(f'<div class="{kind}">{svg(draw, width, alt)}</div>')
  return f"<figure>{''.join(images)}<figcaption>{caption}</figcaption></figure>"


def svg(draw: Callable[[float], Figure], width: float, alt: str) -> str:
  """Draws a figure as an SVG element whose colours are variables of the page."""
  size = _STYLE["font.size"] if axes.is_wide(width) else _PHONE_SIZE
  shown = _STYLE | {"font.size": size, "svg.hashsalt": f"{alt}{width}"}
  with style.context(["default", shown]), warnings.catch_warnings():
    # Browsers have the glyphs that matplotlib's font lacks; only their width is a guess.
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    out = io.StringIO()
    draw(width).savefig(out, format="svg", metadata={"Date": None})
  # Strip matplotlib's XML header, metadata and style sheet; keep the drawing.
  source = out.getvalue()
  (box,) = re.findall(r'<svg [^>]*viewBox="([\d. ]+)"', source)
  body = source[source.index("</metadata>") + len("</metadata>") : source.rindex("</svg>")]
  body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)
  return (
    f'<svg role="img" aria-label="{text(alt)}" viewBox="{box}">{_named(re.sub("<[^>]*>", _tag, body), shown)}</svg>'
  )


def _named(body: str, shown: dict[str, Any]) -> str:
  """Numbers the clip paths: matplotlib names them by memory addresses, which would change the file each time."""
  names = dict.fromkeys(re.findall(r"url\(#(p[0-9a-f]{10})\)", body))
  salt = hashlib.sha256(shown["svg.hashsalt"].encode()).hexdigest()[:8]
  for i, name in enumerate(names):
    body = body.replace(name, f"clip-{salt}-{i}")
  return body


def _tag(match: re.Match[str]) -> str:
  """One tag of matplotlib's SVG without the ids that nothing refers to, and with variables for colours."""
  tag = re.sub(r'^<g id="[^"]*"', "<g", match[0])
  tag = tag.replace("'DejaVu Sans'", "sans-serif").replace(", sans-serif", "").replace("xlink:href", "href")
  return _COLOUR.sub(lambda colour: _VARIABLES[colour[0]], tag)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
  """A table of HTML cells; `kind` is "findings", "events", "layers" or "cards".

  In "layers" and "cards", all columns but the first are numbers. On a phone, a row of any kind but "layers" becomes a
  block, and a cell of "events" and "cards" shows its title.
  """
  mark = "" if kind in ("findings", "events") else ' class="n"'
  titles = "".join(f'<th scope="col"{mark if i else ""}>{title}</th>' for i, title in enumerate(head))
  lines = []
  for first, *rest in rows:
    cells = (f'<td{mark} data-title="{title}">{x}</td>' for title, x in zip(head[1:], rest, strict=True))
    lines.append(f"<tr><td>{first}</td>{''.join(cells)}</tr>")
  return f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
  """A list of named numbers, given as plain text."""
  return "<dl>" + "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in pairs) + "</dl>"


def data_block(source: str) -> str:
  """JSON as a data block; no name can close it, as `<`, `>` and `&` become JSON escapes."""
  for character in "<>&":
    source = source.replace(character, f"\\u{ord(character):04x}")
  return f'<script type="application/json" id="clipjax-run">{source}</script>'


def page(title: str, body: str, data: str) -> str:
  """The whole file; `body` is HTML, `data` is JSON in ASCII."""
  return (
    f'{START}{clipjax.__version__}">\n<title>{text(title)}</title>\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<link rel="icon" href="data:,">\n'
    f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n{data_block(data)}\n</body>\n</html>\n"
  )
