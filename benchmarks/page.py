"""The page of a run: one file of HTML with its charts, tables and style, that fetches nothing and runs nothing.

It follows the reader's light or dark setting, and is light on paper. Every figure of a chart is in a table too.
"""

from html import escape

from benchmarks import charts, tables
from benchmarks.charts import LOOKS
from benchmarks.measure import Measurement, Sweep, problems
from benchmarks.workloads import FASTLM

STYLE = """
:root { color-scheme: light; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #e4e7eb; --axis: #7d8590;
  --tint: #f6f8fa; --good: #0b6b4f; --bad: #a8400a; LIGHT }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #14171b; --ink: #e8eaed;
  --soft: #a2abb6; --line: #2b3138; --axis: #7d8590; --tint: #1c2126; --good: #4cc79c; --bad: #f0955f; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1104px; padding: 2.5rem 2rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.02em; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 .4rem; padding-top: .8rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: inherit; text-underline-offset: .2em; }
nav a { margin-right: 1.1rem; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 1.4rem 0; padding: 1rem 1.2rem;
  background: var(--tint); border-radius: 6px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.pair { display: flex; flex-wrap: wrap; gap: 0 20px; }
figure { margin: 0; overflow-x: auto; break-inside: avoid; }
figcaption, caption { color: var(--soft); font-size: .87rem; text-align: left; max-width: 46rem; padding: .2rem 0 .5rem; }
svg { display: block; max-width: 100%; min-width: min(100%, 30rem); height: auto; }
.pair figure { flex: 1 1 440px; max-width: 510px; }
.wide svg { min-width: 46rem; }
svg text { font-size: 12px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .strong { font-weight: 600; } svg .light { font-weight: 400; fill: var(--soft); } svg .soft { fill: var(--soft); } svg .bad { fill: var(--bad); }
svg .tiny { font-size: 10px; fill: var(--soft); }
svg .back { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
.grid { stroke: var(--line); } .axis { stroke: var(--axis); } .stem { stroke: var(--axis); stroke-width: 1; }
.roof { fill: none; stroke: var(--ink); stroke-width: 1.6; stroke-linejoin: round; } .dashed { stroke-dasharray: 6 4; }
.bar { fill: var(--c); }
.mark { fill: var(--c); stroke: var(--paper); stroke-width: 1; }
.mark.thin { fill: none; stroke: var(--c); stroke-width: 2.4; }
.mark.hollow { fill: var(--paper); stroke: var(--c); stroke-width: 1.8; }
.curve { fill: none; stroke: var(--c); stroke-width: 2; }
.stem[class*="of-"] { stroke: var(--c); stroke-width: 2; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; font-size: .87rem; margin: .2rem 0; }
.key span { display: flex; align-items: center; gap: .4rem; } .key svg { min-width: 0; width: 14px; overflow: visible; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; margin: .8rem 0; width: 100%; }
th, td { padding: .22rem .4rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { white-space: normal; vertical-align: bottom; } tbody th { font-weight: 400; text-align: left; }
th:nth-child(-n+4), td:nth-child(-n+4) { text-align: left; } .sizes th:not(:first-child), .sizes td { text-align: right; }
.own { font-weight: 600; } .more { color: var(--good); } .less, .bad { color: var(--bad); }
CONTENDERS
@media print { .pair { flex-wrap: nowrap; } .pair figure { flex-basis: 0; }
  body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; } tr { break-inside: avoid; }
  figure, .scroll { overflow: visible; } .wide svg, svg { min-width: 0; } nav { display: none; }
  th, td { padding: .1rem .35rem; } table { font-size: 7.5pt; } * { print-color-adjust: exact; } }
"""


def style() -> str:
    colours = [" ".join(f"--c{i}: {look[k]};" for i, look in enumerate(LOOKS.values())) for k in (0, 1)]
    contenders = "\n".join(f".of-{i} {{ --c: var(--c{i}); }}" for i in range(len(LOOKS)))
    return STYLE.replace("LIGHT", colours[0]).replace("DARK", colours[1]).replace("CONTENDERS", contenders)


def page(measured: list[Measurement], sweeps: list[Sweep], peaks, facts: dict[str, str]) -> str:
    """Of all measurements of a run, which must not be none."""
    operators = list(dict.fromkeys(m.operator for m in measured))
    made_of = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    links = "\n".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in operators)
    sections = [
        section([m for m in measured if m.operator == name], [s for s in sweeps if s.operator == name], peaks)
        for name in operators
    ]
    at_a_glance = figure(
        charts.overview(measured),
        "fastlm against eager PyTorch on the same machine, in the same run: a mark for each shape. Right of 1× fastlm "
        "is faster. The axis doubles from line to line.",
        "wide",
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastlm benchmarks</title>
<style>{style()}</style>
</head>
<body>
<header>
<h1>fastlm benchmarks</h1>
<p>Time and memory of each operator and training step beside eager PyTorch and its other kernels, measured on this
machine. Every result was compared with a reference before it was timed; contenders took turns, and figures are
medians.</p>
<dl>{made_of}</dl>
</header>
<main>
<section>
<h2>At a glance</h2>
{at_a_glance}
<nav aria-label="Operators">{links}</nav>
<h3>How to read the rest</h3>
<p>Bars are speed relative to eager PyTorch, with the time of a call. <em>Floor</em>: the larger of operations at the
rate of products and bytes at that of copies, both measured in this run; nothing can be faster by much unless it stays
in a cache. A roofline shows the same: a point's height is what it reaches, the line above it what the machine allows
for as many operations a byte. Points of contenders on one stem are one row of the table, whose number it bears; calls
with a floor below {charts.OVERHEAD * 1e6:.0f} µs are left out. Memory is that at the peak of one call, beyond its
inputs and results, in a process of its own.</p>
<p>Measured here: {peaks.fma / 1e9:,.0f} GFLOP/s in float32{bf16(peaks)} and {peaks.copy / 1e9:,.1f} GB/s of copies,
read and written.</p>
</section>
{"".join(sections)}
</main>
</body>
</html>
"""


def bf16(peaks) -> str:
    return f", {peaks.bf16 / 1e9:,.0f} in bfloat16" if peaks.bf16 else ""


def anchor(name: str) -> str:
    return name.replace(" ", "-")


def section(measured: list[Measurement], sweeps: list[Sweep], peaks) -> str:
    operator = measured[0].operator
    graphs = figure(
        charts.roofline(measured, peaks),
        "Roofline: operations a second over operations a byte. Numbers are rows of the table.",
    )
    for sweep in sweeps:
        caption = f"Memory of a forward and backward pass in {sweep.dtype} over {sweep.of}; both axes double."
        graphs += figure(charts.memory(sweep), caption)
    wrong = "".join(f'<p class="bad">{escape(line)}</p>' for line in problems(measured))
    return f"""<section id="{anchor(operator)}">
<h2>{escape(operator)}</h2>
{figure(charts.bars(measured, peaks), "Speed relative to eager PyTorch; longer is faster.", "wide")}
<div class="pair">{graphs}</div>
{key(measured) if graphs else ""}
{wrong}
{table(measured, peaks)}
{"".join(map(sizes, sweeps))}
</section>
"""


def figure(svg: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{svg}<figcaption>{caption}</figcaption></figure>' if svg else ""


def key(measured: list[Measurement]) -> str:
    entries = []
    for name in measured[0].contenders:
        drawing = charts.Drawing(14, 14, "")
        drawing.mark(7, 7, name, name)
        entries.append(f"<span>{drawing.svg()}{escape(name)}</span>")
    return f'<div class="key" aria-hidden="true">{"".join(entries)}</div>'


def table(measured: list[Measurement], peaks) -> str:
    names = [escape(name).replace("/", "/<wbr>") for name in ("row", *tables.header(measured))]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{i}</th>'
        + "".join(f'<td class="{cell.kind}">{escape(cell.text)}</td>' for cell in row)
        + "</tr>"
        for i, row in enumerate(tables.rows(measured, peaks), 1)
    )
    return (
        f'<div class="scroll"><table><caption>{escape(measured[0].operator)}: median time of a call; in brackets how '
        f"many times as long as {FASTLM}.</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def sizes(sweep: Sweep) -> str:
    """The table of a chart of memory."""
    found = sorted({n for line in sweep.memory.values() for n in line})
    head = "".join(f'<th scope="col">{n:,}</th>' for n in found)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{charts.size(line[n]) if n in line else '-'}</td>" for n in found)
        + "</tr>"
        for name, line in sweep.memory.items()
    )
    return (
        f'<div class="scroll"><table class="sizes"><caption>{escape(sweep.operator)}: memory over {escape(sweep.of)}'
        f"</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
