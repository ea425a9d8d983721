"""The style sheet of the page: light and dark, for screens, phones and paper."""

CSS = """
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
dl{display:flex;flex-wrap:wrap;gap:.4rem;margin:1rem 0}
dl div{flex:1 1 auto;background:var(--card);border:1px solid var(--edge);border-radius:6px;padding:.2rem .45rem}
dt{color:var(--soft);font-size:.75rem}dd{margin:0;font-size:.95rem;font-weight:600;white-space:nowrap}
figure{margin:.5rem 0}figure svg{display:block;width:100%;height:auto;fill:currentColor;overflow:visible}
svg *{stroke-linejoin:round;stroke-linecap:butt}svg text{font-family:system-ui,sans-serif!important}
.narrow{display:none}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.4rem .6rem .4rem 0;
border-bottom:1px solid var(--edge)}th{font-size:.85rem;color:var(--soft);overflow-wrap:normal}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.level{display:inline-block;white-space:nowrap;font-weight:700;font-size:.8rem;border:1.5px solid;
border-radius:4px;padding:0 .35rem}
.FAIL{color:var(--fail)}.WARN{color:var(--warn)}.INFO{color:var(--info)}
.said{border-left:4px solid;padding:.1rem 0 .1rem .9rem;margin:1rem 0}.said p{color:var(--text)}
.said .soft{color:var(--soft)}.lead{font-size:1.15rem;line-height:1.4}.said .level{font-size:.9rem;color:inherit}
.said.FAIL .level{color:var(--fail)}.said.WARN .level{color:var(--warn)}
.answer{font-size:1.3rem;font-weight:600}summary{cursor:pointer;padding:.4rem 0}
.events ul{list-style:none;margin:0;padding:0}.events td:nth-child(2){white-space:nowrap}
.events td:nth-child(3){min-width:15rem}
.findings td:nth-child(2){white-space:nowrap}.findings td:nth-child(3){min-width:16rem}
.findings td:nth-child(4){min-width:13rem}
@media(max-width:44rem){.wide{display:none}.narrow{display:block}
:is(.findings,.cards,.events) thead{position:absolute;clip-path:inset(50%)}
:is(.findings,.cards,.events) tr{display:block;padding:.6rem 0;border-bottom:1px solid var(--edge)}
:is(.findings,.cards,.events) td{display:block;border:0;padding:.1rem 0}
.events td:nth-child(-n+2){display:inline-block;margin-right:1rem}
.events td:nth-child(n+2)::before{content:attr(data-title) " ";color:var(--soft);font-size:.85rem}
.findings td:nth-child(2){font-weight:600;white-space:normal}
.cards td.n{display:inline-block;margin-right:1rem}.cards td.n::before{content:attr(data-title) " ";color:var(--soft);
font-size:.85rem}}
@media print{details>*{display:revert}h2,figure{break-inside:avoid}}
"""
