"""The report's style sheet: system fonts, one column on a phone, two on a desk."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfaf8; --sheet: #ffffff; --ink: #1c1f24; --quiet: #5c6470; --line: #e0ddd6;
  --kept: #0b6b50; --kept-ground: #eaf5f0; --void: #a3241f; --void-ground: #fbeceb;
  --warn: #8a4b00; --warn-ground: #fdf3e2; --note: #44546a; --note-ground: #eef1f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --sheet: #1b1f24; --ink: #e7e8ea; --quiet: #a0a8b3; --line: #323841;
    --kept: #6fd3ae; --kept-ground: #14291f; --void: #ff9b94; --void-ground: #331a1a;
    --warn: #f2bd6b; --warn-ground: #2e2413; --note: #b4c2d6; --note-ground: #222a34;
    --series-1: #56b4e9; --series-2: #ff8f4a; --series-3: #45c99c; --series-4: #e3a5c8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC",
    sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h1 { font-size: clamp(1.4rem, 1.1rem + 1.6vw, 2rem); margin: 0 0 1.25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .4rem; }
p { margin: 0 0 .75rem; }
.kicker { color: var(--quiet); font-size: .85rem; margin: 0 0 .25rem; }
.banner {
  background: var(--warn-ground); color: var(--ink); border-left: 4px solid var(--warn);
  padding: .75rem 1rem; border-radius: 0 .5rem .5rem 0; margin: 0 0 1.25rem; font-size: .95rem;
}
.banner strong { color: var(--warn); }
.claim { border-radius: .75rem; padding: 1.25rem; border: 1px solid var(--line); }
.claim.kept { background: var(--kept-ground); }
.claim.void { background: var(--void-ground); }
.claim .label { margin: 0; font-size: .85rem; font-weight: 600; }
.claim .figure {
  font-size: clamp(1.8rem, 1.2rem + 3vw, 2.8rem); font-weight: 650; line-height: 1.15;
  margin: 0 0 .75rem; letter-spacing: -.02em;
}
.claim .figure span {
  font-size: .5em; font-weight: 500; color: var(--quiet); letter-spacing: 0; white-space: nowrap;
}
.claim.kept .label, .claim.kept .figure { color: var(--kept); }
.claim.void .label, .claim.void .figure { color: var(--void); }
.statement { font-size: 1.08rem; max-width: 46rem; margin-bottom: 1.1rem; }
dl { margin: 0; display: grid; gap: .5rem 2rem; grid-template-columns: 1fr; }
dl div { border-top: 1px solid var(--line); padding-top: .5rem; min-width: 0; }
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.hazards { list-style: none; padding: 0; margin: 0; display: grid; gap: .5rem; }
.hazards li {
  padding: .7rem .9rem; border-radius: .5rem; display: grid; gap: .1rem .9rem;
  overflow-wrap: anywhere;
}
.tag { font-size: .85rem; font-weight: 650; }
.hazards .void { background: var(--void-ground); } .void > .tag { color: var(--void); }
.hazards .warning { background: var(--warn-ground); } .warning > .tag { color: var(--warn); }
.hazards .note { background: var(--note-ground); } .note > .tag { color: var(--note); }
.figures { display: grid; gap: 1rem; }
figure {
  margin: 0; padding: .9rem .9rem .6rem; background: var(--sheet); border: 1px solid var(--line);
  border-radius: .75rem; min-width: 0;
}
figcaption { font-weight: 600; margin-bottom: .4rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
.exposed {
  display: inline-block; font-size: .8rem; font-weight: 600; color: var(--warn);
  background: var(--warn-ground); border-radius: 1rem; padding: .05rem .55rem; margin-left: .35rem;
  letter-spacing: 0; white-space: nowrap; vertical-align: middle;
}
.scroll {
  overflow-x: auto; border: 1px solid var(--line); border-radius: .75rem; background: var(--sheet);
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .6rem; border-top: 1px solid var(--line); }
td, tbody th { vertical-align: top; }
thead th { border-top: 0; color: var(--quiet); font-size: .85rem; font-weight: 600; }
tbody th { font-weight: 500; }
td { min-width: 4.5rem; }
pre {
  font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono CJK SC",
    monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--sheet); margin: 0;
  border: 1px solid var(--line); border-radius: .5rem; padding: .75rem .9rem;
}
article h3 { margin-top: 1rem; }
.grid { display: grid; gap: 0 2rem; }
.grid ul { margin: 0; padding-left: 1.1rem; }
.grid h3 { margin-top: .75rem; }
details { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: .75rem; font-size: .8rem; }
@media (min-width: 44rem) {
  main { padding: 2.5rem 2rem 5rem; }
  .claim { padding: 1.75rem 2rem; }
  th, td { padding: .5rem .9rem; }
  dl, .figures { grid-template-columns: 1fr 1fr; }
  .grid { grid-template-columns: 1fr 1fr; }
  .hazards li { grid-template-columns: 4.5rem 1fr; }
}
@media print {
  body { background: none; } .claim, figure, .hazards li { break-inside: avoid; }
}
"""
