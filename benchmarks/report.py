"""Measures the chosen workloads and reports: tables on the terminal, a page with charts, raw JSON."""

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastlm
from benchmarks import ROOT, tables
from benchmarks.measure import Measurement, Peaks, Sweep, duration, measure, problems, sweep
from benchmarks.page import page
from benchmarks.workloads import COMPILED, DTYPES, FASTLM, Workload, workloads
from fastlm import _C

RESULTS = ROOT / "benchmarks" / "results"
QUICK = 0.05  # seconds of timed calls of a pass
STYLES = {"own": "bold", "more": "green", "less": "red", "bad": "red"}


@dataclass(frozen=True)
class Request:
    """What is asked of a run."""

    words: list[str]  # in the names of what is measured; none: all
    dtypes: list[str]  # none: all
    seconds: float  # of timed calls of each pass
    memory: bool
    quick: bool  # the smallest shapes and sizes, briefly, without torch.compile
    folder: Path | None  # of the raw figures; none: a new one in RESULTS
    html: Path | None  # the page; none: beside the raw figures

    def workloads(self) -> list[Workload]:
        words = self.words or ["smallest"] * self.quick
        chosen = [
            w
            for w in workloads()
            if (not words or any(word.lower() in w.name.lower() for word in words))
            and (not self.dtypes or str(w.dtype).removeprefix("torch.") in self.dtypes)
        ]
        if not chosen:
            names = "\n".join(f"  {w.name}" for w in workloads())
            raise ValueError(f"no benchmark fits {' '.join(words + self.dtypes)}; there are\n{names}")
        return chosen


def run(console: Console, asked: Request) -> bool:
    """Measures, prints a table for each operator, and writes raw figures and the page, anew after each operator.
    Whether every fastlm result was right."""
    chosen = asked.workloads()
    folder = asked.folder or RESULTS / time.strftime("%Y%m%d-%H%M%S")
    html = asked.html or folder / "report.html"
    for path in (folder, html.parent):
        path.mkdir(parents=True, exist_ok=True)
    torch._inductor.config.compile_threads = 1  # no pool of compilers beside what is timed
    console.width = max(console.width, 150)  # the terminal may wrap a row, but nothing is cut off
    facts = machine()
    for name, value in facts.items():
        console.print(f"{name:<10} {value}", soft_wrap=True, markup=False)
    peaks, done, sweeps = Peaks(), [], []
    swept_in = next((dtype for dtype in DTYPES if any(w.dtype == dtype for w in chosen)), DTYPES[0])
    for operator in dict.fromkeys(w.operator for w in chosen):
        measured = []
        for workload in [w for w in chosen if w.operator == operator]:
            measured += timed(console, workload, asked, peaks)
        console.print(table(operator, measured, peaks))
        for line in problems(measured):
            console.print(line, style="red", soft_wrap=True, markup=False)
        done += measured
        if asked.memory:
            with console.status(f"{operator}: memory"):
                swept = sweep(operator, swept_in, 3 if asked.quick else None)
            sweeps += [swept] if swept else []
        save(folder / "results.json", done, sweeps, peaks, facts)
        html.write_text(page(done, sweeps, peaks, facts), encoding="utf-8")
    console.print(describe(peaks), soft_wrap=True)
    console.print(f"raw figures: {folder}\npage: {html}", soft_wrap=True, markup=False)
    return all(m.contenders[FASTLM].problem is None for m in done)


def timed(console: Console, workload: Workload, asked: Request, peaks: Peaks) -> list[Measurement]:
    """One workload measured and printed, and the machine's peaks once more."""
    names = [name for name in workload.contenders if not asked.quick or name != COMPILED]
    seconds = min(asked.seconds, QUICK) if asked.quick else asked.seconds
    with console.status(workload.name):
        peaks.measure(tries=2 if asked.quick else 8)
        found = measure(workload, seconds, asked.memory, names)
    for m in found:
        times = (f"{n} {duration(t.median)}" for n, t in m.contenders.items() if t.seconds)
        console.print(f"{workload.name} {m.kind}: {', '.join(times)}", soft_wrap=True)
    return found


def machine() -> dict[str, str]:
    """What figures depend on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "CPU": f"{name}, {os.cpu_count()} CPUs, {_C.isa()} in use",
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f} before the start",
        "versions": f"fastlm {fastlm.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {_C.compiler}",
        "system": platform.platform(),
        "command": shlex.join(["fastlm", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def describe(peaks: Peaks) -> str:
    bf16 = f"{peaks.bf16 / 1e9:,.0f} GFLOP/s in bf16 dot products, " if peaks.bf16 else ""
    return (
        f"floor: the larger of operations at {peaks.fma / 1e9:,.0f} GFLOP/s in float32 "
        f"multiply-adds, {bf16}and bytes at {peaks.copy / 1e9:,.1f} GB/s of copying; measured in "
        "this run. (1.50x): times as long as fastlm. Memory: at the peak, beyond inputs and results"
    )


# Tables


def table(operator: str, measured: list[Measurement], peaks: Peaks) -> Table:
    made = Table(title=operator, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, name in enumerate(tables.header(measured)):
        made.add_column(name, justify="left" if i < 3 else "right", no_wrap=True)
    shape = None
    for cells in tables.rows(measured, peaks):
        texts = [Text(cell.text, STYLES.get(cell.kind, "")) for cell in cells]
        made.add_row("" if cells[0].text == shape else texts[0], *texts[1:])
        shape = cells[0].text
    return made


# Files


def save(
    path: Path, measured: list[Measurement], sweeps: list[Sweep], peaks: Peaks, facts: dict[str, str]
) -> None:
    content = {
        "machine": facts,
        "peaks": dataclasses.asdict(peaks),
        "measurements": [dataclasses.asdict(m) | {"floor_seconds": m.floor(peaks)} for m in measured],
        "sweeps": [dataclasses.asdict(s) for s in sweeps],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
