"""`fastlm bench`: measures, and writes a page that needs nothing else and says the same in charts and tables."""

import json
import math
import multiprocessing
import os
import re
import signal
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the command line prints with it")
pytest.importorskip("typer", reason="the command line is made with it")
pytest.importorskip("numpy", reason="the command line's training needs it")

from benchmarks import charts, measure, tables  # noqa: E402
from benchmarks.measure import Measurement, Peaks, Sweep, Timing  # noqa: E402
from benchmarks.page import page  # noqa: E402
from fastlm import cli  # noqa: E402

PEAKS = Peaks(fma=2e11, copy=2e10)
VOID = {"meta", "wbr"}


def measurement(shape="4x12", kind="forward", operations=10**9, moved=10**7, **seconds):
    """Contenders' seconds of a call; None: failed."""
    timings = {
        name: Timing([s], 2**20, None) if s else Timing(problem="RuntimeError: no <such> kernel")
        for name, s in seconds.items()
    }
    return Measurement("attention", shape, "float32", kind, operations, moved, timings)


class Tags(HTMLParser):
    """Checks that tags are closed in order; keeps the elements' names and attributes, and a table's cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.rows = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(text)


def drawings(text):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]


def assert_is_self_contained(text):
    tags = Tags(text)
    names = {name for name, _ in tags.found}
    assert not names & {"script", "link", "img", "iframe", "object", "image"}
    for name, attributes in tags.found:
        for value in (attributes.get("href"), attributes.get("src")):
            assert value is None or value.startswith("#"), name
    assert "url(" not in text and "@import" not in text and "://" not in text
    used = set(re.findall(r"var\((--\w+)\)", text))
    dark = re.search(r"prefers-color-scheme: dark\) \{(.*?)\} \}", text, re.S)[1]
    assert used - {"--c"} == set(re.findall(r"(--\w+):", dark))  # in the dark every colour is another
    for svg in drawings(text):
        for element in svg.iter():
            for number in re.findall(r"-?\d+\.?\d*|nan|inf", element.get("d", "") + element.get("x", "0")):
                assert math.isfinite(float(number))
    return tags


def test_bench(tmp_path, monkeypatch, capsys, tiny_calls_as_shipped):
    """From the command to the page: figures on the terminal, in results.json and on the page are the same."""
    html, out = tmp_path / "deep" / "page.html", tmp_path / "raw"
    words = f"bench gru/smallest attention/smallest --dtype float32 --quick --html {html} --out {out}"
    monkeypatch.setattr(sys, "argv", ["fastlm", *words.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed, text = capsys.readouterr().out, html.read_text(encoding="utf-8")
    raw = json.loads((out / "results.json").read_text())
    tags = assert_is_self_contained(text)
    assert f"<dd>fastlm {words}</dd>" in text and all(f"<dt>{name}</dt>" in text for name in raw["machine"])
    assert f"{raw['peaks']['fma'] / 1e9:,.0f} GFLOP/s" in text
    assert len(raw["measurements"]) == 4
    times = [
        measure.duration(Timing(**t).median) for m in raw["measurements"] for t in m["contenders"].values()
    ]
    cells = [cell for row in tags.rows for cell in row]
    for time in times:
        assert time in printed and any(cell.startswith(time) for cell in cells)
    (sweep,) = raw["sweeps"]
    assert sweep["operator"] == "scaled_dot_product_attention"
    assert set(sweep["memory"]) == {"eager", "eager unfused", "fastlm"}
    unfused = sweep["memory"]["eager unfused"]
    assert len(unfused) == 3 and unfused["1024"] > 2 * unfused["512"]  # the square of the length
    assert unfused["1024"] > 8 * 1024**2 * 4 > sweep["memory"]["fastlm"]["1024"]


def test_page_of_failures():
    """A contender that fails, and fastlm's own failure, are said; nothing is drawn of them."""
    measured = [
        measurement(eager=2e-3, fastlm=1e-3),
        measurement(kind="forward+backward", eager=None, fastlm=3e-3),
        measurement("a<b", eager=1e-3, fastlm=None),
    ]
    text = page(measured, [], PEAKS, {"CPU": "<one> & only"})
    assert_is_self_contained(text)
    assert "&lt;one&gt; &amp; only" in text and "a&lt;b" in text
    assert text.count("eager: RuntimeError: no &lt;such&gt; kernel") == 1
    assert text.count(">fails<") == 4  # in the chart and in the table
    assert "2.00×" in text and not re.search(r"\bnan\b", text)


def test_table():
    measured = [measurement(eager=3e-3, **{"torch.compile": 1e-3}, fastlm=2e-3)]
    assert tables.header(measured)[3:] == [
        "eager", "torch.compile", "fastlm", "of the floor", "MiB eager/torch.compile/fastlm",
    ]  # fmt: skip
    (row,) = tables.rows(measured, PEAKS)
    assert [cell.text for cell in row[3:]] == ["3 ms (1.50x)", "1 ms (0.50x)", "2 ms", "250%", "1/1/1"]
    assert [cell.kind for cell in row[3:6]] == ["more", "less", "own"]


def places(svg, name):
    """Where the marks of a contender are."""
    found = [e for e in drawings(svg)[0].iter() if charts.look(name) in (e.get("class") or "").split()]
    found = [re.search(r"\((\S+) (\S+)\)", e.get("transform")) for e in found if e.get("transform")]
    return [(float(m[1]), float(m[2])) for m in found]


def test_roofline():
    """A point of twice the speed is above its contender by what the axis doubles in; the roof is the floor."""
    measured = [
        measurement(eager=2e-2, fastlm=1e-2),
        measurement(operations=10**7, moved=10**7, eager=2e-3, fastlm=5e-4),  # as fast as copies
    ]
    svg = charts.roofline(measured, PEAKS)
    (x1, y1), (x2, y2) = sorted(places(svg, "fastlm"))
    (a1, b1), (a2, b2) = sorted(places(svg, "eager"))
    assert (x1, x2) == (a1, a2) and x1 < x2
    assert b1 - y1 == pytest.approx(2 * (b2 - y2), abs=0.2) and b2 > y2
    roof = next(e for e in drawings(svg)[0].iter() if e.get("class") == "roof").get("d")
    (xa, ya), (xb, yb), (xc, yc) = [tuple(map(float, p.split())) for p in re.split("[ML]", roof)[1:]]
    assert yb == yc < ya
    assert ya + (yb - ya) * (x1 - xa) / (xb - xa) == pytest.approx(y1, abs=0.5)
    assert charts.roofline([measurement(operations=10, moved=10, eager=1e-5, fastlm=1e-5)], PEAKS) == ""


def test_memory_chart():
    sweep = Sweep("attention", "tokens", "float32", {
        "eager unfused": {n: n * n * 4 for n in (1024, 2048, 4096)}, "fastlm": dict.fromkeys((1024, 2048, 4096), 99),
    })  # fmt: skip
    svg = charts.memory(sweep)
    squares, flat = places(svg, "eager unfused"), places(svg, "fastlm")
    assert squares[0][1] - squares[1][1] == pytest.approx(squares[1][1] - squares[2][1], abs=0.2)
    assert len({y for _, y in flat}) == 1 and flat[0][1] > squares[0][1]
    assert "64 MiB" in svg and "fastlm, below 1 MiB" in svg


class Deadly:
    """A workload of which one contender's process is killed, as where memory runs out."""

    stateful = False

    def problem(self):
        return self

    def draw_cotangents(self, shapes):
        pass

    def call(self, contender, kind):
        return (lambda: os.kill(os.getpid(), signal.SIGKILL)) if contender == "deadly" else lambda: []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux alone")
def test_memory_of_what_dies(restore_threads):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    measure._measure_memory(theirs, Deadly(), [], [("forward", "deadly"), ("forward", "good")], 1)
    assert ours.recv() is None
    assert ours.recv() >= 0


def test_apart():
    assert charts.apart([1, 2, 30], 10, 100) == [1, 11, 30]
    assert charts.apart([90, 95, 99], 10, 100) == [80, 90, 100]


def test_every_contender_has_looks():
    from benchmarks import gpu
    from benchmarks.workloads import workloads

    names = {n for w in workloads() for n in w.contenders} | {*gpu.FORCED, *(name for _, name in gpu.OTHERS)}
    assert names == set(charts.LOOKS)
    for operator in {w.operator for w in workloads()}:  # no two of an operator have the same mark
        of = [*next(w.contenders for w in workloads() if w.operator == operator)]
        of += [*gpu.FORCED, *(name for other, name in gpu.OTHERS if other == operator)]
        if operator == "training step":
            of = [n for n in of if n not in gpu.FORCED]
        assert len({charts.LOOKS[n][2] for n in of}) == len(of)
