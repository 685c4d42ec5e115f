"""The page's only style sheet: two palettes, one column, and rules for paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --soft: #f3f0e9; --rule: #e2dcd1; --ink: #1d1a16; --muted: #6a6258;
  --ours: #c2410c; --ours-soft: #f0b99f; --other: #8a93a0; --second: #1f5f8b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161412; --soft: #201d1a; --rule: #38332d; --ink: #ece7df; --muted: #a99f93;
    --ours: #ff8a4c; --ours-soft: #7a4325; --other: #77818d; --second: #7cb8e4;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
header, main, footer { max-width: 51rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3.5rem; }
.eyebrow {
  margin: 0 0 .75rem; color: var(--ours); font-size: .78rem; font-weight: 650;
  letter-spacing: .14em; text-transform: uppercase;
}
h1 { margin: 0; font-size: clamp(1.9rem, 5vw, 2.7rem); line-height: 1.12; letter-spacing: -.022em;
  text-wrap: balance; }
.subtitle { margin: .8rem 0 0; max-width: 44rem; color: var(--muted); font-size: 1.08rem; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 0 2rem;
  margin: 2.2rem 0 0; border-top: 2px solid var(--ink);
}
.figures div { padding: .9rem 0 1rem; }
.figures dt { font-size: 2.05rem; font-weight: 640; line-height: 1.1; letter-spacing: -.025em; white-space: nowrap; }
.figures dd { margin: .35rem 0 0; color: var(--muted); font-size: .86rem; line-height: 1.4; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin-top: 1rem; padding: .7rem 0; font-size: .88rem;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .22em; }
a:hover, a:focus-visible { text-decoration-color: var(--ours); }
section { padding-top: 3rem; }
h2 { margin: 0; font-size: 1.4rem; letter-spacing: -.012em; line-height: 1.25; }
h3 { margin: 2rem 0 .5rem; font-size: 1rem; }
p { max-width: 44rem; }
section > h2 + p { margin: .45rem 0 1.2rem; }
.note { color: var(--muted); font-size: .88rem; }
figure { margin: 1.2rem 0 0; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 1.4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin-bottom: .5rem;
  color: var(--muted); font-size: .86rem; }
.legend span::before { content: ""; display: inline-block; width: 1rem; height: .2rem; margin-right: .45rem;
  border-radius: 1px; vertical-align: middle; background: currentColor; }
.legend .dotted::before { width: .62rem; height: .62rem; border-radius: 50%; }
.legend .ours::before { background: var(--ours); }
.legend .raw::before { background: var(--ours-soft); }
.legend .second::before { background: var(--second); }
.legend .baseline::before { background: var(--other); }
.chart { display: block; width: 100%; min-width: 34rem; height: auto; overflow: visible; }
.chart.small { min-width: 0; }
.multiples { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr));
  gap: 1.2rem 1.6rem; margin-top: 1.8rem; }
.multiples figure { margin: 0; }
.multiples figcaption { margin-bottom: .3rem; font-size: .86rem; }
.multiples figcaption b { display: block; font-weight: 600; }
.multiples figcaption span { color: var(--muted); }
svg text { font-family: inherit; fill: var(--ink); }
svg .tick, svg .label { font-size: 12px; fill: var(--muted); }
svg .name, svg .value { font-size: 13px; }
svg .ours.name, svg .ours.value { font-weight: 650; }
svg .value { font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--muted); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
svg .line.ours { stroke: var(--ours); stroke-width: 2.25; }
svg .line.raw { stroke: var(--ours-soft); stroke-width: 1; }
svg .line.second { stroke: var(--second); }
svg .line.plain { stroke: var(--ink); stroke-width: 1.4; }
svg .dot { stroke: var(--paper); stroke-width: 1.5; }
svg .dot.ours { fill: var(--ours); }
svg .dot.second { fill: var(--second); }
svg .dot.baseline { fill: var(--other); }
svg .span { stroke: var(--rule); stroke-width: 5; stroke-linecap: round; }
svg .bar { fill: var(--other); opacity: .62; }
svg .bar.ours { fill: var(--ours); opacity: 1; }
svg .whisker { stroke: var(--ink); stroke-width: 1.6; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; line-height: 1.4; }
caption { padding: 0 0 .5rem; color: var(--muted); font-size: .86rem; text-align: left; }
th, td { padding: .42rem .9rem .42rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: .78rem; font-weight: 600;
  border-bottom: 1px solid var(--muted); white-space: nowrap; }
tbody th { font-weight: 500; }
.num { text-align: right; white-space: nowrap; }
td.num:not(:last-child), th.num:not(:last-child) { padding-right: 1.5rem; }
.dense th, .dense td { padding-top: .26rem; padding-bottom: .26rem; }
.short { white-space: nowrap; }
td, th { overflow-wrap: break-word; }
.held::before { content: "\\2713\\00a0"; color: var(--second); font-weight: 700; }
.failed { color: var(--ours); font-weight: 650; }
.failed::before { content: "\\2717\\00a0"; }
.watch { color: var(--second); font-weight: 650; }
.watch::before { content: "!\\00a0"; }
code, .mono, .quote { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
.mono { overflow-wrap: anywhere; }
.quote { display: block; max-height: 9rem; overflow: auto; font-size: .8rem; line-height: 1.45; white-space: pre-line;
  overflow-wrap: anywhere; min-width: 15rem; unicode-bidi: plaintext; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem;
  margin: .8rem 0 0; font-size: .9rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; padding-bottom: 4rem; color: var(--muted); font-size: .84rem; }
footer > div { padding-top: 1rem; border-top: 1px solid var(--rule); }
footer p { margin: .3rem 0; }
@media screen and (max-width: 44rem) {
  .stacked thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stacked, .stacked tbody, .stacked tr, .stacked th, .stacked td { display: block; }
  .stacked tr { padding: .7rem 0; border-bottom: 1px solid var(--rule); }
  .stacked th, .stacked td { padding: .1rem 0; border: 0; }
  .stacked td.short { position: absolute; right: 1.5rem; margin-top: -1.45rem; }
  .stacked td[data-label]::before { content: attr(data-label) ": "; color: var(--muted); }
}
@media (max-width: 36rem) {
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: .5rem; }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #fff; --soft: #fff; --rule: #d8d4cc; --ink: #000; --muted: #4a4540;
    --ours: #b23a08; --ours-soft: #e9b59b; --other: #8a93a0; --second: #1f5f8b;
  }
  @page { margin: 16mm; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  body { font-size: 10.5pt; }
  header { padding-top: 0; }
  header, main, footer { max-width: none; padding-left: 0; padding-right: 0; }
  nav { display: none; }
  section { padding-top: 1.8rem; }
  h2, h2 + p, caption, thead { break-after: avoid; }
  p, figure, tr, .figures, .multiples { break-inside: avoid; }
  .wide, .quote { overflow: visible; max-height: none; }
  .chart { min-width: 0; }
}
"""
