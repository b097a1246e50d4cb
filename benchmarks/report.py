"""Measures the chosen workloads and reports: tables on the terminal, a page with charts, raw JSON."""

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
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


def choose(words: list[str], dtypes: list[str]) -> list[Workload]:
    """Workloads whose name has one of the words in it, in one of the dtypes; all where none is
    given."""
    chosen = [
        w
        for w in workloads()
        if (not words or any(word.lower() in w.name.lower() for word in words))
        and (not dtypes or str(w.dtype).removeprefix("torch.") in dtypes)
    ]
    if not chosen:
        names = "\n".join(f"  {w.name}" for w in workloads())
        raise ValueError(f"no benchmark fits {' '.join(words + dtypes)}; there are\n{names}")
    return chosen


def run(
    console: Console,
    words: list[str],
    dtypes: list[str],
    seconds: float,
    memory: bool,
    folder: Path | None,
    html: Path | None,
    quick: bool,
) -> bool:
    """Measures, prints a table for each operator, writes raw figures and the page, anew after each operator, into
    the folder (default: a new one in benchmarks/results). Whether every fastlm result was right."""
    chosen = choose(words or ["smallest"] * quick, dtypes)
    folder = folder or RESULTS / time.strftime("%Y%m%d-%H%M%S")
    html = html or folder / "report.html"
    for path in (folder, html.parent):
        path.mkdir(parents=True, exist_ok=True)
    torch._inductor.config.compile_threads = 1  # no pool of compilers beside what is timed
    console.width = max(console.width, 150)  # the terminal may wrap a row, but nothing is cut off
    facts = machine()
    for name, value in facts.items():
        console.print(f"{name:<10} {value}", soft_wrap=True, markup=False)
    peaks, done, sweeps = Peaks(), [], []
    for operator in dict.fromkeys(w.operator for w in chosen):
        measured = []
        for workload in [w for w in chosen if w.operator == operator]:
            names = [name for name in workload.contenders if not quick or name != COMPILED]
            with console.status(workload.name):
                peaks.measure(tries=2 if quick else 8)
                found = measure(workload, min(seconds, QUICK) if quick else seconds, memory, names)
            measured += found
            for m in found:
                times = (f"{n} {duration(t.median)}" for n, t in m.contenders.items() if t.seconds)
                console.print(f"{workload.name} {m.kind}: {', '.join(times)}", soft_wrap=True)
        console.print(table(operator, measured, peaks))
        for line in problems(measured):
            console.print(line, style="red", soft_wrap=True, markup=False)
        done += measured
        if memory:
            with console.status(f"{operator}: memory"):
                swept = sweep(
                    operator, min((w.dtype for w in chosen), key=DTYPES.index), 3 if quick else None
                )
            sweeps += [swept] if swept else []
        save(folder / "results.json", done, sweeps, peaks, facts)
        html.write_text(page(done, sweeps, peaks, facts), encoding="utf-8")
    console.print(describe(peaks), soft_wrap=True)
    console.print(f"raw figures: {folder}\npage: {html}", soft_wrap=True, markup=False)
    return all(m.contenders[FASTLM].problem is None for m in done)


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
