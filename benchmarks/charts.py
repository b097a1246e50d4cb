"""Charts of measurements, drawn as SVG with the style sheet of the page: bars, rooflines, memory.

No chart says anything by colour alone: bars have their contender's name, marks have a shape of its own for
each, and the points of a roofline the number of their row in the table. Lengths are CSS pixels.
"""

import math
from collections.abc import Iterable
from html import escape

from benchmarks.measure import Measurement, Sweep, duration
from benchmarks.workloads import EAGER, FASTLM

# Of each contender: its colour on light and on dark paper, and its mark. The colours are Okabe and Ito's or greys.
LOOKS = {
    "eager": ("#6b7280", "#9aa3af", "circle"),
    "eager unfused": ("#9aa3af", "#6f7885", "square"),
    "torch.compile": ("#d98200", "#e69f00", "triangle"),
    "fastlm.install": ("#56b4e9", "#2f86bd", "cross"),
    "fastlm": ("#0072b2", "#56b4e9", "diamond"),
    "fastlm cuda": ("#3e8fc4", "#3e8fc4", "cross"),
    "fastlm triton": ("#8cc4ea", "#8cc4ea", "plus"),
    "cuDNN": ("#cc79a7", "#cc79a7", "hourglass"),
    "flash-attn": ("#009e73", "#1db58a", "wedge"),
    "Liger": ("#d55e00", "#e8772a", "hourglass"),
}
MARKS = {  # around (0, 0)
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2Z",
    "triangle": "M0-4.8L4.6 3.6h-9.2Z",
    "wedge": "M0 4.8L4.6-3.6h-9.2Z",
    "hourglass": "M-4.4-4.4h8.8L-4.4 4.4h8.8Z",
    "diamond": "M0-5.6L5.2 0L0 5.6L-5.2 0Z",
    "cross": "M-4-4L4 4M-4 4L4-4",
    "plus": "M-5 0H5M0-5V5",
}
WIDE, HALF = 1040, 510  # widths of charts
OVERHEAD = 1e-5  # seconds; calls with a lower floor measure what a call costs, not what the machine can do


def look(name: str) -> str:
    """Class of a contender in the style sheet."""
    return f"of-{list(LOOKS).index(name)}"


class Drawing:
    def __init__(self, width: float, height: float, title: str):
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.path(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", kind)

    def path(self, path: str, kind: str) -> None:
        self.parts.append(f'<path d="{path}" class="{kind}"/>')

    def text(
        self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", more: str = ""
    ) -> None:
        """more: what follows in a lighter hand."""
        more = f'<tspan class="light">{escape(more)}</tspan>' if more else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}{more}</text>'
        )

    def bar(self, x1: float, x2: float, y: float, height: float, name: str, hint: str) -> None:
        x, width = min(x1, x2), max(abs(x2 - x1), 1)
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5" '
            f'class="bar {look(name)}"><title>{escape(hint)}</title></rect>'
        )

    def mark(
        self, x: float, y: float, name: str, hint: str, shape: str | None = None, kind: str = ""
    ) -> None:
        shape = shape or LOOKS[name][2]
        thin = " thin" if shape in ("cross", "plus") else ""
        self.parts.append(
            f'<path transform="translate({x:.1f} {y:.1f})" d="{MARKS[shape]}" '
            f'class="mark{thin} {look(name)} {kind}"><title>{escape(hint)}</title></path>'
        )

    def svg(self) -> str:
        return (
            f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" width="{self.width:.0f}" role="img" '
            f'aria-label="{escape(self.title)}">{"".join(self.parts)}</svg>'
        )


class Scale:
    """A logarithmic axis: where on [start, end] a value between `least` and `most` stands; others at the ends."""

    def __init__(self, least: float, most: float, start: float, end: float):
        self.least, self.most, self.start, self.end = least, most, start, end

    def __call__(self, value: float) -> float:
        share = math.log(max(self.least, min(self.most, value)) / self.least)
        return self.start + (self.end - self.start) * share / math.log(self.most / self.least)

    def ticks(self, base: int, most: int = 8) -> Iterable[float]:
        """Powers of the base; every second, third, ... of them, so that there are not too many."""
        first = math.ceil(math.log(self.least, base) - 1e-9)
        last = math.floor(math.log(self.most, base) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / most))
        return [float(base) ** i for i in range(first, last + 1) if i % step == 0]


def number(value: float) -> str:
    """1/4, 0.01, 8, 16k."""
    if 0.01 < value < 1:
        return f"1/{1 / value:.0f}"
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:,g}"


def size(value: float) -> str:
    """A number of bytes."""
    if value < 2**20:
        return "below 1 MiB"
    unit, scale = ("GiB", 2**30) if value >= 2**30 else ("MiB", 2**20)
    return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:.0f} {unit}"


def speed(m: Measurement, name: str) -> float:
    """How many times as fast as eager; nan where one of them has no time."""
    return m.contenders[EAGER].median / m.contenders[name].median


def known(values: Iterable[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]


def apart(places: list[float], gap: float, most: float) -> list[float]:
    """Ascending places moved up as far as they need for the gap, but none beyond the most."""
    moved = list(places)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], most - gap * (len(moved) - 1 - i))
    return moved


# ---- speed --------------------------------------------------------------------------------


def overview(measured: list[Measurement]) -> str:
    """fastlm's speed relative to eager: a row for each operator and dtype, a mark for each shape and pass."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in measured:
        if not math.isnan(speed(m, FASTLM)):
            groups.setdefault((m.operator, m.dtype), []).append(m)
    if not groups:
        return ""
    speeds = [speed(m, FASTLM) for m in sum(groups.values(), [])]
    left, right, top, row = 300, 130, 34, 26
    drawing = Drawing(WIDE, top + row * len(groups) + 34, "Speed relative to eager PyTorch, by operator")
    scale = Scale(min(0.8, *speeds) / 1.1, max(2.0, *speeds) * 1.1, left, WIDE - right)
    bottom = top + row * len(groups)
    _speed_axis(drawing, scale, top, bottom)
    for i, ((operator, dtype), group) in enumerate(groups.items()):
        y = top + row * (i + 0.5)
        found = [speed(m, FASTLM) for m in group]
        drawing.text(left - 80, y + 4, operator, "strong", "end")
        drawing.text(left - 12, y + 4, dtype, "soft", "end")
        drawing.line(scale(min(found)), y, scale(max(found)), y, f"stem {look(FASTLM)}")
        for m, value in sorted(zip(group, found, strict=True), key=lambda pair: pair[0].kind != "forward"):
            hint = f"{operator}, {m.shape}, {dtype}, {m.kind}: {value:.2f} times as fast as eager"
            drawing.mark(scale(value), y, FASTLM, hint, "circle", "hollow" if m.kind == "forward" else "")
        drawing.text(WIDE - right + 16, y + 4, f"{min(found):.2f} to {max(found):.2f}×", "soft")
    drawing.mark(left + 6, 11, FASTLM, "", "circle", "hollow")
    drawing.text(left + 16, 15, "forward", "soft")
    drawing.mark(left + 86, 11, FASTLM, "", "circle")
    drawing.text(left + 96, 15, "forward and backward, or a training step", "soft")
    return drawing.svg()


def bars(measured: list[Measurement], peaks) -> str:
    """Speed of each contender relative to eager: a group of bars for each shape and dtype, a panel for each pass."""
    kinds = list(dict.fromkeys(m.kind for m in measured))
    names = list(measured[0].contenders)
    groups = {(m.shape, m.dtype): {} for m in measured}
    for m in measured:
        groups[m.shape, m.dtype][m.kind] = m
    speeds = known(speed(m, name) for m in measured for name in names)
    left, top, row, head = 130, 40, 16, 24
    panel = (WIDE - left) / len(kinds)
    bottom = top + len(groups) * (head + row * len(names) + 6)
    drawing = Drawing(WIDE, bottom + 34, f"{measured[0].operator}: speed relative to eager PyTorch")
    ends = [(left + panel * i + 8, left + panel * (i + 1) - 212) for i in range(len(kinds))]
    scales = [Scale(min([0.8, *speeds]) / 1.1, max([2.0, *speeds]), *end) for end in ends]
    for kind, scale in zip(kinds, scales, strict=True):
        drawing.text(scale.start, 12, kind, "strong")
        for tick in scale.ticks(2) if len(groups) > 3 else ():  # above too, where it is far to the ones below
            drawing.text(scale(tick), 32, f"{number(tick)}×", "soft", "middle")
        _speed_axis(drawing, scale, top, bottom)
    y = top
    for (shape, dtype), passes in groups.items():
        drawing.text(0, y + 17, shape, "strong back", more=f" {dtype}")
        y += head
        for name in names:
            drawing.text(left - 6, y + 12, name, "strong" if name == FASTLM else "soft", "end")
            for kind, scale in zip(kinds, scales, strict=True):
                if kind in passes:
                    _bar(drawing, scale, passes[kind], name, y, peaks)
            y += row
        y += 6
    return drawing.svg()


def _bar(drawing: Drawing, scale: Scale, m: Measurement, name: str, y: float, peaks) -> None:
    timing, value = m.contenders[name], speed(m, name)
    text, kind = "fails", "bad"
    if not timing.problem:
        text, kind = duration(timing.median), "strong" if name == FASTLM else "soft"
        if name != EAGER and not math.isnan(value):
            text += f", {value:.2f}×"
        if name == FASTLM and m.floor(peaks) >= OVERHEAD:
            text += f", {m.floor(peaks) / timing.median:.0%} of floor"
    end = scale(1)
    if not math.isnan(value):
        end = max(end, scale(value))
        hint = f"{m.shape}, {m.dtype}, {m.kind}, {name}: {text}"
        drawing.bar(scale(1), scale(value), y + 2, 12, name, hint)
    drawing.text(end + 6, y + 12, text, f"{kind} back")


def _speed_axis(drawing: Drawing, scale: Scale, top: float, bottom: float) -> None:
    for tick in scale.ticks(2):
        x = scale(tick)
        drawing.line(x, top, x, bottom, "axis" if tick == 1 else "grid")
        drawing.text(x, bottom + 14, f"{number(tick)}×", "soft", "middle")
    drawing.text(scale.end, bottom + 30, "times as fast as eager →", "soft", "end")


# ---- rooflines ----------------------------------------------------------------------------


def roofline(measured: list[Measurement], peaks) -> str:
    """Operations a second over operations a byte. Contenders of a row of the table stand above each other."""
    shown = [
        (i, m) for i, m in enumerate(measured, 1)
        if m.floor(peaks) >= OVERHEAD and known(t.median for t in m.contenders.values())
    ]  # fmt: skip
    if not shown:
        return ""
    rates = [m.operations / t.median for _, m in shown for t in m.contenders.values() if t.seconds]
    intensities = [m.operations / m.bytes for _, m in shown]
    roofs = [rate for rate in (peaks.fma, peaks.bf16) if rate]
    ridges = [rate / peaks.copy for rate in roofs]
    x = Scale(min(intensities + ridges) / 3, max(intensities + ridges) * 4, 62, HALF - 14)
    y = Scale(min(rates) / 3, max(roofs + rates) * 1.5, 300, 24)
    drawing = Drawing(HALF, 344, f"{measured[0].operator}: roofline")
    for tick in x.ticks(10):
        drawing.line(x(tick), y.start, x(tick), y.end, "grid")
        drawing.text(x(tick), y.start + 16, f"{tick:g}", "soft", "middle")
    for tick in y.ticks(10):
        drawing.line(x.start, y(tick), x.end, y(tick), "grid")
        drawing.text(x.start - 6, y(tick) + 4, f"{tick / 1e9:,g}", "soft", "end")
    drawing.text(0, 11, "GFLOP/s", "soft")
    drawing.text(x.end, y.start + 34, "operations a byte of inputs and results →", "soft", "end")
    limits = f"{peaks.fma / 1e9:,.0f} GFLOP/s in float32"
    _roof(drawing, x, y, peaks.fma, peaks.copy, "roof")
    if peaks.bf16:
        limits += f", {peaks.bf16 / 1e9:,.0f} in bfloat16 (dashed)"
        _roof(drawing, x, y, peaks.bf16, peaks.copy, "roof dashed")
    drawing.text(x.end, 11, f"lines: {limits}, {peaks.copy / 1e9:,.0f} GB/s", "soft", "end")
    shown.sort(key=lambda pair: pair[1].operations / pair[1].bytes)
    places = apart([x(m.operations / m.bytes) for _, m in shown], 13, x.end)
    for at, (i, m) in zip(places, shown, strict=True):
        heights = {name: y(m.operations / t.median) for name, t in m.contenders.items() if t.seconds}
        drawing.line(at, min(heights.values()), at, max(heights.values()), "stem")
        for name in sorted(heights, key=lambda name: name == FASTLM):
            rate = f"{m.operations / m.contenders[name].median / 1e9:,.3g} GFLOP/s"
            drawing.mark(at, heights[name], name, f"{i}: {m.shape}, {m.dtype}, {m.kind}, {name}: {rate}")
        drawing.text(at, max(heights.values()) + 15, str(i), "tiny back", "middle")
    return drawing.svg()


def _roof(drawing: Drawing, x: Scale, y: Scale, rate: float, copy: float, kind: str) -> None:
    first, ridge = max(x.least, y.least / copy), rate / copy
    points = [(first, first * copy), (ridge, rate), (x.most, rate)]
    drawing.path("M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points), kind)


# ---- memory -------------------------------------------------------------------------------


def memory(sweep: Sweep) -> str:
    """Bytes at the peak over what grows. What is below 1 MiB is drawn there."""
    sizes = sorted({n for line in sweep.memory.values() for n in line})
    most = max((b for line in sweep.memory.values() for b in line.values()), default=0)
    if len(sizes) < 2:
        return ""
    drawing = Drawing(HALF, 344, f"{sweep.operator}: memory over {sweep.of}")
    x = Scale(sizes[0], sizes[-1], 72, HALF - 160)
    y = Scale(2**20, max(most * 1.5, 2**23), 300, 24)
    for n in sizes:
        drawing.line(x(n), y.start, x(n), y.end, "grid")
        drawing.text(x(n), y.start + 16, number(n), "soft", "middle")
    for tick in y.ticks(4):
        drawing.line(x.start, y(tick), x.end, y(tick), "grid")
        drawing.text(x.start - 6, y(tick) + 4, "≤ 1 MiB" if tick == 2**20 else size(tick), "soft", "end")
    drawing.text(0, 11, "at the peak, beyond inputs and results", "soft")
    drawing.text(x.end, y.start + 34, f"{sweep.of} →", "soft", "end")
    ends = []
    for name in sorted(sweep.memory, key=lambda name: name == FASTLM):
        line = sweep.memory[name]
        points = [(x(n), y(line[n])) for n in sorted(line)]
        drawing.path("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points), f"curve {look(name)}")
        for n, point in zip(sorted(line), points, strict=True):
            drawing.mark(*point, name, f"{name}, {sweep.of} {n:,}: {size(line[n])}")
        ends.append((points[-1][1], name, size(line[max(line)])))
    ends.sort()
    for at, (_, name, text) in zip(apart([end[0] for end in ends], 15, y.start + 4), ends, strict=True):
        drawing.text(x.end + 12, at + 4, f"{name}, {text}", "strong" if name == FASTLM else "soft")
    return drawing.svg()
