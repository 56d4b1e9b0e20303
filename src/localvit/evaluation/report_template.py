"""The page that `report_page` fills: its frame and its style, light and dark, down to a phone's width."""

from string import Template

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root {
  --page: #f5f6f8; --surface: #ffffff; --line: #d9dee5; --text: #1b1f24; --muted: #57606a;
  --right: #2463c4; --wrong: #d1550f; --warning: #fff3e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --surface: #181c22; --line: #313842; --text: #e7eaee; --muted: #a0abb8;
    --right: #5b9bf5; --wrong: #f08a4b; --warning: #33241a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 70rem; margin: 0 auto; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
p { margin: 0 0 .9rem; max-width: 52rem; text-wrap: pretty; }
.muted { color: var(--muted); }
section, .warning {
  background: var(--surface); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.1rem 1.25rem; margin: 1rem 0;
}
section > :last-child, .warning > :last-child { margin-bottom: 0; }
.warning { background: var(--warning); border-color: var(--wrong); }
.warning ul { margin: .3rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere; }

dl.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0; }
dl.headline > div {
  background: var(--surface); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem;
  display: flex; flex-direction: column;
}
dl.headline dt { color: var(--muted); font-size: .85rem; }
dl.headline dd {
  margin: 0; font-size: 1.75rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3;
}
dl.headline dd.muted { font-size: .8rem; font-weight: 400; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; min-width: 7rem; }
tr > :first-child { padding-left: 0; }
.number { text-align: right; white-space: nowrap; }
.bar {
  min-width: 7rem; background: linear-gradient(color-mix(in srgb, var(--right) 30%, transparent) 0 0)
    no-repeat left / calc(var(--share) * 100%) 70%;
}
table.about { width: 100%; }
table.about th { color: var(--muted); width: 1%; white-space: nowrap; }
table.about td { overflow-wrap: anywhere; }

.side { display: grid; grid-template-columns: minmax(0, 24rem) minmax(0, 1fr); gap: 1rem 2rem; align-items: start; }
svg { display: block; width: 100%; max-width: 24rem; height: auto; }
svg text { fill: var(--muted); font-size: 12px; font-family: inherit; }
svg .axis { stroke: var(--line); fill: none; }
svg .ideal { stroke: var(--muted); stroke-dasharray: 4 4; fill: none; }
svg .accuracy { fill: var(--right); fill-opacity: .55; }
svg .gap { stroke: var(--wrong); stroke-width: 2.5; fill: none; }
svg .count { fill: var(--muted); fill-opacity: .6; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .15em; border-radius: .15em; }
.key.accuracy { background: var(--right); }
.key.gap { background: var(--wrong); height: .2em; vertical-align: .25em; }
summary { cursor: pointer; color: var(--muted); }

table.confusion { font-size: .8rem; }
table.confusion th, table.confusion td { padding: .15rem .3rem; border: 1px solid var(--line); }
table.confusion thead th { vertical-align: bottom; font-weight: 500; text-align: center; }
table.confusion thead th span {
  writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden; text-overflow: ellipsis;
}
table.confusion tbody th {
  white-space: nowrap; min-width: 0; max-width: 11rem; overflow: hidden; text-overflow: ellipsis;
  position: sticky; left: 0; background: var(--surface);
}
table.confusion td { text-align: center; min-width: 1.9rem; }
/* 55 % and no more: the count keeps its contrast on the fullest cell, in both schemes. */
td.hit { background: color-mix(in srgb, var(--right) calc(12% + var(--share) * 43%), transparent); }
td.miss { background: color-mix(in srgb, var(--wrong) calc(12% + var(--share) * 43%), transparent); }

.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; display: flex; gap: .8rem; min-width: 0; }
figure img, .placeholder { flex: 0 0 96px; width: 96px; height: 96px; border-radius: .35rem; }
figure img { object-fit: contain; background: var(--page); }
.placeholder {
  display: flex; align-items: center; justify-content: center; text-align: center; padding: .4rem;
  border: 1px dashed var(--line); color: var(--muted); font-size: .75rem; line-height: 1.25; overflow-wrap: anywhere;
}
figcaption { min-width: 0; font-size: .85rem; line-height: 1.4; overflow-wrap: anywhere; }
figcaption b { font-weight: 600; }
figcaption .path { font-size: .75rem; margin-top: .2rem; }

@media (max-width: 44rem) {
  body { padding: 1rem .6rem 2rem; }
  section, .warning { padding: .9rem .8rem; }
  .side { grid-template-columns: minmax(0, 1fr); }
  table.about th { white-space: normal; }
  table.confusion tbody th { max-width: 6.5rem; }
}
@media print { body { background: none; } section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")
