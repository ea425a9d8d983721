"""The page of a report: escaping, style sheet, figures as inline SVG, data as JSON. One file, no script, no network.

Text that comes from a run (leaf names, keys, its path) goes through `text`, and the data through `data_block`. A
figure becomes SVG whose text stays text and whose colours are variables of the style sheet, so that it follows the
reader's light or dark mode; it stands in the page twice, for a screen and for a phone, and the style sheet shows one.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

import clipjax
from clipjax.runs.report import figures
from clipjax.runs.report.mark import START
from clipjax.runs.sources import BY_TEXT
from clipjax.runs.words import plain

INK = "#202124"  # Stands for the text colour of the page, and becomes `currentColor`.
_STYLE: dict[str, Any] = {
  **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
  "svg.fonttype": "none",
  "font.family": ["sans-serif"],
  "font.sans-serif": ["DejaVu Sans"],
  "font.size": 9,
  "savefig.transparent": True,
}
_VARIABLES = {
  INK: "currentColor",
  figures.BLUE: "var(--blue)",
  figures.VERMILION: "var(--vermilion)",
  figures.GREEN: "var(--green)",
  figures.ORANGE: "var(--orange)",
  figures.PURPLE: "var(--purple)",
  figures.SKY: "var(--sky)",
  figures.GREY: "var(--grey)",
}
_COLOUR = re.compile("|".join(_VARIABLES))
# Nothing may be fetched, whatever the page holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
:root{color-scheme:light dark;--page:#fff;--text:#1f2328;--soft:#59636e;--edge:#d1d9e0;--card:#f6f8fa;--link:#0550ae;
--blue:#0072b2;--vermilion:#d55e00;--green:#009e73;--orange:#e69f00;--purple:#b8578f;--sky:#56b4e9;--grey:#8c8c8c;
--fail:#b3261e;--warn:#8a5200;--info:#0550ae}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--text:#e6e8eb;--soft:#a3abb5;--edge:#3a414a;--card:#1e2228;
--link:#7ab8ff;--blue:#5ab4ec;--vermilion:#ff7f2a;--green:#2bc79a;--orange:#f0b429;--purple:#e092bd;--sky:#3f86b5;
--grey:#909090;--fail:#ff8a80;--warn:#f0b429;--info:#7ab8ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:54rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--edge)}
p{margin:.4rem 0}a{color:var(--link)}.soft,figcaption,footer{color:var(--soft);font-size:.9rem}
code{font:.9em ui-monospace,monospace;background:var(--card);padding:.1em .25em;border-radius:3px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.5rem;margin:1rem 0}
dl div{background:var(--card);border:1px solid var(--edge);border-radius:6px;padding:.4rem .6rem}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-size:1.1rem;font-weight:600}
figure{margin:.5rem 0}figure svg{display:block;width:100%;height:auto;fill:currentColor;overflow:visible}
svg *{stroke-linejoin:round;stroke-linecap:butt}svg text{font-family:system-ui,sans-serif!important}
.narrow{display:none}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.4rem .6rem .4rem 0;
border-bottom:1px solid var(--edge)}th{font-size:.85rem;color:var(--soft);overflow-wrap:normal}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.level{display:inline-block;white-space:nowrap;font-weight:700;font-size:.8rem;border:1.5px solid;
border-radius:4px;padding:0 .35rem}
.FAIL{color:var(--fail)}.WARN{color:var(--warn)}.INFO{color:var(--info)}
.answer{font-size:1.3rem;font-weight:600}summary{cursor:pointer;padding:.4rem 0}
.findings td:nth-child(2){white-space:nowrap}.findings td:nth-child(3){min-width:16rem}
.findings td:nth-child(4){min-width:13rem}
@media(max-width:44rem){.wide{display:none}.narrow{display:block}
:is(.findings,.cards) thead{position:absolute;clip-path:inset(50%)}
:is(.findings,.cards) tr{display:block;padding:.6rem 0;border-bottom:1px solid var(--edge)}
:is(.findings,.cards) td{display:block;border:0;padding:.1rem 0}
.findings td:nth-child(2){font-weight:600;white-space:normal}
.cards td.n{display:inline-block;margin-right:1rem}.cards td.n::before{content:attr(data-title) " ";color:var(--soft);
font-size:.85rem}}
@media print{details>*{display:revert}h2,figure{break-inside:avoid}}
"""


def text(value: object) -> str:
  """Any text as HTML text or attribute; what has no shape, line ends included, as an escape."""
  return html.escape(plain(str(value)), quote=True)


def code(value: object) -> str:
  """A name from the run or from the library, set as code; a path may be broken after each of its parts."""
  return f"<code>{text(value).replace('/', '/<wbr>')}</code>"


def source(value: str) -> str:
  """The source of a rule as a link. Only the sources of this package become one: a name may look like an address."""
  found = BY_TEXT.get(value)
  return text(value) if found is None else f'<a href="{text(found.address)}">{text(found.title)}</a>'


def figure(draw: Callable[[float], Figure], alt: str, caption: str) -> str:
  """A figure for a screen and one for a phone, each with the alt text; the caption, which is HTML, under them."""
  images = []
  for kind, width in (("wide", figures.WIDE), ("narrow", figures.NARROW)):
    images.append(f'<div class="{kind}">{svg(draw, width, alt)}</div>')
  return f"<figure>{''.join(images)}<figcaption>{caption}</figcaption></figure>"


def svg(draw: Callable[[float], Figure], width: float, alt: str) -> str:
  """The figure that `draw` makes as an SVG element, with its colours as variables of the page."""
  with style.context(["default", _STYLE | {"svg.hashsalt": f"{alt}{width}"}]), warnings.catch_warnings():
    # The browser has the glyphs that matplotlib's own font lacks; only the room they take is a guess.
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    out = io.StringIO()
    draw(width).savefig(out, format="svg", metadata={"Date": None})
  source = out.getvalue()
  (box,) = re.findall(r'<svg [^>]*viewBox="([\d. ]+)"', source)
  body = source[source.index("</metadata>") + len("</metadata>") : source.rindex("</svg>")]
  body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)
  return f'<svg role="img" aria-label="{text(alt)}" viewBox="{box}">{re.sub("<[^>]*>", _tag, body)}</svg>'


def _tag(match: re.Match[str]) -> str:
  """One tag of matplotlib's SVG: without the names that nothing refers to, and with variables for colours."""
  tag = re.sub(r'^<g id="[^"]*"', "<g", match[0])
  tag = tag.replace("'DejaVu Sans'", "sans-serif").replace(", sans-serif", "").replace("xlink:href", "href")
  return _COLOUR.sub(lambda colour: _VARIABLES[colour[0]], tag)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
  """A table of cells that are HTML. `kind`: "findings", "layers" or "cards", where all but the first are numbers.

  On a phone, "findings" and "cards" become a block for each row, in which a cell of "cards" has its title.
  """
  mark = "" if kind == "findings" else ' class="n"'
  titles = "".join(f'<th scope="col"{mark if i else ""}>{title}</th>' for i, title in enumerate(head))
  lines = []
  for first, *rest in rows:
    cells = (f'<td{mark} data-title="{title}">{x}</td>' for title, x in zip(head[1:], rest, strict=True))
    lines.append(f"<tr><td>{first}</td>{''.join(cells)}</tr>")
  return f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
  """A list of named numbers, all plain text."""
  return "<dl>" + "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in pairs) + "</dl>"


def data_block(source: str) -> str:
  """JSON as a block of the page that no name in it can end: `<`, `>` and `&` are written as escapes of JSON."""
  for character in "<>&":
    source = source.replace(character, f"\\u{ord(character):04x}")
  return f'<script type="application/json" id="clipjax-run">{source}</script>'


def page(title: str, body: str, data: str) -> str:
  """The whole file; `body` is HTML, `data` is JSON in ASCII."""
  return (
    f'{START}{clipjax.__version__}">\n<title>{text(title)}</title>\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<link rel="icon" href="data:,">\n'
    f"<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n{data_block(data)}\n</body>\n</html>\n"
  )
