"""Measures the chosen workloads and reports: tables on the terminal, bar charts, raw JSON."""

import dataclasses
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
import torch._inductor.config
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastlm
from benchmarks import ROOT
from benchmarks.measure import Measurement, Peaks, duration, measure, problems
from benchmarks.workloads import COMPILED, EAGER, FASTLM, Workload, workloads
from fastlm import _C

RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {
    "eager": "#9aa5b1",
    "eager unfused": "#d3d9e0",
    "torch.compile": "#e0a458",
    "fastlm.install": "#7fb3d5",
    "fastlm": "#1f6fb2",
    "fastlm cuda": "#4f93c9",
    "fastlm triton": "#a9cbe3",
    "cuDNN": "#c9b458",
    "flash-attn": "#7a9e6f",
    "Liger": "#b07aa1",
}


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
) -> bool:
    """Measures, prints a table for each operator, writes charts and raw figures into the folder
    (default: a new one in benchmarks/results). Whether every fastlm result was right."""
    chosen = choose(words, dtypes)
    folder = folder or RESULTS / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    torch._inductor.config.compile_threads = 1  # no pool of compilers beside what is timed
    console.width = max(console.width, 150)  # the terminal may wrap a row, but nothing is cut off
    facts = machine()
    for name, value in facts.items():
        console.print(f"{name:<10} {value}", soft_wrap=True)
    peaks, done = Peaks(), []
    for operator in dict.fromkeys(w.operator for w in chosen):
        measured = []
        for workload in [w for w in chosen if w.operator == operator]:
            with console.status(workload.name):
                peaks.measure()
                found = measure(workload, seconds, memory)
            measured += found
            for m in found:
                times = (f"{n} {duration(t.median)}" for n, t in m.contenders.items() if t.seconds)
                console.print(f"{workload.name} {m.kind}: {', '.join(times)}", soft_wrap=True)
            save(folder / "results.json", done + measured, peaks, facts)
        console.print(table(operator, measured, peaks, memory))
        for line in problems(measured):
            console.print(line, style="red", soft_wrap=True, markup=False)
        done += measured
    console.print(describe(peaks), soft_wrap=True)
    for operator in dict.fromkeys(m.operator for m in done):
        draw([m for m in done if m.operator == operator], peaks, facts, folder)
    console.print(f"raw figures and charts: {folder}", soft_wrap=True)
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


def table(operator: str, measured: list[Measurement], peaks: Peaks, memory: bool) -> Table:
    names = list(measured[0].contenders)
    kept = [n for n in names if n != COMPILED]
    made = Table(title=operator, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("shape", "dtype", "pass"):
        made.add_column(column, no_wrap=True)
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("of floor", justify="right", no_wrap=True)
    if memory:
        made.add_column("MiB " + "/".join(short(n) for n in kept), justify="right", no_wrap=True)
    for i, m in enumerate(measured):
        new = i == 0 or m.shape != measured[i - 1].shape
        row = [m.shape if new else "", m.dtype, m.kind.replace("+backward", "+back")]
        row += [cell(m, name) for name in names]
        share = m.floor(peaks) / m.contenders[FASTLM].median
        row.append("" if math.isnan(share) else f"{share:.0%}")
        if memory:
            row.append("/".join(mebibytes(m.contenders[n].memory) for n in kept))
        made.add_row(*row)
    return made


def short(name: str) -> str:
    return name.removeprefix("eager ").removeprefix("fastlm.")


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def cell(m: Measurement, name: str) -> Text:
    timing = m.contenders[name]
    if timing.problem:
        return Text("wrong" if timing.problem.startswith("wrong") else "fails", style="red")
    if name == FASTLM:
        return Text(duration(timing.median), style="bold")
    ratio = m.ratio(name)
    style = "" if math.isnan(ratio) else "green" if ratio >= 1 else "red"
    return Text.assemble(duration(timing.median), (f" ({ratio:.2f}x)", style))


# Files


def save(path: Path, measured: list[Measurement], peaks: Peaks, facts: dict[str, str]) -> None:
    content = {
        "machine": facts,
        "peaks": dataclasses.asdict(peaks),
        "measurements": [dataclasses.asdict(m) | {"floor_seconds": m.floor(peaks)} for m in measured],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def draw(measured: list[Measurement], peaks: Peaks, facts: dict[str, str], folder: Path) -> None:
    """A bar chart of one operator: speed relative to eager, a panel for each pass."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(m.kind for m in measured))
    names = list(measured[0].contenders)
    panels = [[m for m in measured if m.kind == kind] for kind in kinds]
    bar, gap = 0.24, 0.3  # inches
    heights = [len(p) * (len(names) * bar + gap) for p in panels]
    figure = Figure(figsize=(10, sum(heights) + 0.75 * len(panels) + 0.9), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, kind, panel in zip(axes, kinds, panels, strict=True):
        _panel(axis, panel, names, peaks, bar, gap)
        axis.set_title(kind, loc="left", fontsize=10, fontweight="bold")
    axes[-1].set_xlabel("speed relative to eager (longer is faster)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(names), frameon=False)
    machine = facts.get("device") or f"{facts['CPU']}, {facts['threads']} threads"
    figure.suptitle(
        f"{measured[0].operator}\n{machine}, torch {torch.__version__}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    figure.savefig(folder / f"{measured[0].operator.replace(' ', '_')}.png", dpi=150)


def _panel(axis, panel: list[Measurement], names: list[str], peaks, bar, gap) -> None:
    step = len(names) * bar + gap
    longest = 1.0
    for i, name in enumerate(names):
        at = [row * step + i * bar for row in range(len(panel))]
        speeds = []
        for m in panel:
            speed = m.contenders[EAGER].median / m.contenders[name].median
            speeds.append(0.0 if math.isnan(speed) else speed)
        longest = max(longest, *speeds)
        axis.barh(at, speeds, 0.9 * bar, label=name, color=COLOURS[name])
        for y, speed, m in zip(at, speeds, panel, strict=True):
            timing = m.contenders[name]
            label = "fails" if timing.problem else duration(timing.median)
            if not timing.problem and name != EAGER:
                label += f", {speed:.2f}x"
            if not timing.problem and name == FASTLM:
                label += f", {m.floor(peaks) / timing.median:.0%} of the floor"
            weight = "bold" if name == FASTLM else "normal"
            axis.text(speed, y, f" {label}", va="center", fontsize=7.5, fontweight=weight)
    axis.axvline(1.0, color="#555555", linewidth=0.8, linestyle=":")
    axis.set_yticks([row * step + (len(names) - 1) * bar / 2 for row in range(len(panel))])
    axis.set_yticklabels([f"{m.shape}\n{m.dtype}" for m in panel], fontsize=8)
    axis.set_ylim(len(panel) * step - gap / 2 - bar / 2, -gap / 2 - bar / 2)
    axis.set_xlim(0, longest * 1.35)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
