"""Measurements of one operator as rows of text, for the terminal, the page and the report of a GPU."""

import math
from dataclasses import dataclass

from benchmarks.measure import Measurement, duration
from benchmarks.workloads import FASTLM


@dataclass(frozen=True)
class Cell:
    """kind: "own", of fastlm; "more" or "less", a contender that takes so; "bad", one without a result."""

    text: str
    kind: str = ""


def header(measured: list[Measurement]) -> list[str]:
    memory = "/".join(name.removeprefix("eager ").removeprefix("fastlm.") for name in weighed(measured))
    names = list(measured[0].contenders)
    return ["shape", "dtype", "pass", *names, "of the floor"] + ([f"MiB {memory}"] if memory else [])


def rows(measured: list[Measurement], peaks) -> list[list[Cell]]:
    kept = weighed(measured)
    found = []
    for m in measured:
        share = m.floor(peaks) / m.contenders[FASTLM].median
        row = [Cell(m.shape), Cell(m.dtype), Cell(m.kind)]
        row += [time(m, name) for name in m.contenders]
        row.append(Cell("" if math.isnan(share) else f"{share:.0%}"))
        if kept:
            row.append(Cell("/".join(mebibytes(m.contenders[n].memory) for n in kept)))
        found.append(row)
    return found


def weighed(measured: list[Measurement]) -> list[str]:
    """The contenders whose memory was measured."""
    names = measured[0].contenders
    return [n for n in names if any(m.contenders[n].memory is not None for m in measured)]


def time(m: Measurement, name: str) -> Cell:
    timing, ratio = m.contenders[name], m.ratio(name)
    if timing.problem:
        return Cell("wrong" if timing.problem.startswith("wrong") else "fails", "bad")
    if name == FASTLM or math.isnan(ratio):
        return Cell(duration(timing.median), "own" if name == FASTLM else "")
    return Cell(f"{duration(timing.median)} ({ratio:.2f}x)", "more" if ratio >= 1 else "less")


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"
