"""`pytest benchmarks`: pytest-benchmark over every workload, in groups of contenders.

pytest-benchmark times one test after the other; here the contenders of a workload take turns
(measure.py), and each test then plays its share of the rounds into the fixture, by a clock that
stands still but for them. Results are in the fixture's extra_info too.
"""

import pytest
import torch

from benchmarks.measure import Measurement, Peaks, measure
from benchmarks.workloads import FASTLM, Workload, workloads
from fastlm import _C


class Clock:
    """pytest-benchmark's timer: as late as the rounds played so far."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()
PEAKS = Peaks()
_last: tuple[Workload, dict[str, Measurement]] | None = None


def measured(workload: Workload) -> dict[str, Measurement]:
    """Its measurements by pass. The workload's tests follow each other: the last one is kept."""
    global _last
    if _last is None or _last[0] != workload:
        PEAKS.measure()
        _last = workload, {m.kind: m for m in measure(workload, seconds=1.0)}
    return _last[1]


PARAMETERS = [
    pytest.param(w, kind, name, id=f"{w.name}-{kind}-{name}".replace(" ", "_"))
    for w in workloads()
    for kind in w.kinds
    for name in w.contenders
]


@pytest.mark.parametrize(("workload", "kind", "contender"), PARAMETERS)
@pytest.mark.benchmark(timer=CLOCK)
def test_benchmark(benchmark, workload, kind, contender):
    found = measured(workload)
    if kind not in found:
        pytest.skip("no gradients")
    m = found[kind]
    timing = m.contenders[contender]
    if timing.problem and contender != FASTLM:
        pytest.skip(timing.problem)
    assert timing.problem is None, timing.problem
    benchmark.group = f"{workload.name} {kind}"
    benchmark.extra_info.update(
        isa=_C.isa(),
        threads=torch.get_num_threads(),
        ratio=m.ratio(contender),
        share_of_floor=m.floor(PEAKS) / timing.median,
        extra_memory=timing.memory,
    )
    rounds = iter(timing.seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(timing.seconds))
