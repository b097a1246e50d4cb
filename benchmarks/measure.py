"""Time, memory and floor of a workload: the one way of measuring behind pytest and `fastlm bench`.

Time. The contenders take turns, one round each, in random order, so that a slow minute of the
machine hits all of them; the figure is the median. Each contender's result is compared with the
reference before anything is timed, which is its warm-up too.

Floor. The larger of operations / measured multiply-add rate and bytes / measured copy rate, both
measured in the same run on the same threads.

Memory. Each contender but torch.compile, which compiles again, runs once in a fresh process: the high-water mark
of its resident anonymous memory, less what was resident before the call and less the results themselves. A sweep
measures it along an operator's sizes.
"""

import ctypes
import gc
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.workloads import BOTH, COMPILED, FASTLM, FORWARD, MEASURED, Workload
from fastlm import _C

SHORTEST_ROUND = 1e-3  # seconds; shorter calls are repeated within a round
MOST_ROUNDS = 100
SLOW = 10.0  # seconds; a call that takes longer is not made again: the one that was checked is its figure

# Norm of the error over the norm of the truth, for outputs and gradients. A plausibility check
# that the right thing is timed; how accurate each kernel is, the tests say.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.int8: 5e-2}


@dataclass
class Peaks:
    """What the machine was measured to do, on torch's threads: the best of all tries in a run."""

    fma: float = 0.0  # float32 operations per second, a multiply-add being two
    bf16: float = 0.0  # the same through bf16 dot products; 0 where the ISA has none
    copy: float = 0.0  # bytes per second, read plus written

    def measure(self, tries: int = 8) -> "Peaks":
        for _ in range(tries):
            self.fma = max(self.fma, self._rate(bf16=False))
            self.bf16 = max(self.bf16, self._rate(bf16=True))
        source, target = torch.ones(2, 1 << 26).unbind()  # 256 MiB each, beyond any cache
        for _ in range(tries):
            start = time.perf_counter()
            target.copy_(source)
            self.copy = max(self.copy, 2 * source.nbytes / (time.perf_counter() - start))
        return self

    @staticmethod
    def _rate(bf16: bool) -> float:
        start = time.perf_counter()
        operations = _C.multiply_adds(20_000, bf16=bf16)  # some 10 ms
        return operations / (time.perf_counter() - start)

    def floor(self, operations: int, moved: int, dtype: str) -> float:
        """Seconds that no implementation can beat."""
        rate = self.bf16 if dtype == "bfloat16" and self.bf16 else self.fma
        return max(operations / rate, moved / self.copy)


@dataclass
class Timing:
    """One contender: seconds per call in each round, extra bytes of memory; or what is wrong."""

    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    problem: str | None = None

    @property
    def median(self) -> float:
        return median(self.seconds) if self.seconds else math.nan


@dataclass
class Measurement:
    """All contenders of one pass ("forward", "forward+backward", "step") over one workload."""

    operator: str
    shape: str
    dtype: str
    kind: str
    operations: int
    bytes: int
    contenders: dict[str, Timing]

    def ratio(self, name: str) -> float:
        """How many times as long as fastlm this contender takes; above 1, fastlm is faster."""
        return self.contenders[name].median / self.contenders[FASTLM].median

    def floor(self, peaks: Peaks) -> float:
        return peaks.floor(self.operations, self.bytes, self.dtype)


@dataclass
class Sweep:
    """Memory of an operator, forward and backward, while one of its sizes grows."""

    operator: str
    of: str  # what grows
    dtype: str
    memory: dict[str, dict[int, int]]  # contender -> size -> bytes


def measure(
    workload: Workload, seconds: float = 3.0, memory: bool = True, names: Sequence[str] = ()
) -> list[Measurement]:
    """Measures each pass of the workload, with about so many seconds of timed calls; all contenders where
    none is named."""
    torch._dynamo.reset()
    problem = workload.problem()
    truth = problem.truth()
    measured = []
    for kind in problem.kinds:
        timings = {name: Timing() for name in names or workload.contenders}
        calls, warm = {}, {}
        for name, timing in timings.items():
            call = problem.call(name, kind)
            start = time.perf_counter()
            timing.problem = check(call, truth, workload.dtype)
            if timing.problem is None:
                calls[name], warm[name] = call, time.perf_counter() - start
            if name == "torch.compile" and name in calls:  # most of the first was compiling
                start = time.perf_counter()
                call()
                warm[name] = time.perf_counter() - start
        for name in [name for name in calls if warm[name] > SLOW]:
            timings[name].seconds = [warm[name]]
            del calls[name]
        for name, times in interleave(calls, warm, seconds).items():
            timings[name].seconds = times
        dtype = str(workload.dtype).removeprefix("torch.")
        floor = problem.floor[kind]
        measured.append(Measurement(workload.operator, workload.shape, dtype, kind, *floor, timings))
    if memory:
        tasks = [
            (m.kind, name)
            for m in measured
            for name, timing in m.contenders.items()
            if timing.seconds and timing.median <= 3 * SLOW and name != COMPILED
        ]
        found = peak_memory(workload, problem.shapes, tasks)
        for m in measured:
            for name, timing in m.contenders.items():
                timing.memory = found.get((m.kind, name))
    return measured


def check(call: Callable[[], list[Tensor]], truth: list[Tensor], dtype: torch.dtype) -> str | None:
    """Runs the call; what is wrong with its results, if anything."""
    try:
        results = call()
    except Exception as error:  # a contender that can't run is reported, and the others go on
        return failure(error)
    for i, (result, expected) in enumerate(zip(results, truth, strict=False)):
        error = (result.detach().float() - expected).norm() / expected.norm()
        if result.shape != expected.shape or not error <= TOLERANCE[dtype]:
            return f"wrong: result {i} of shape {tuple(result.shape)} is off by {error:.1e}"
    return None


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def problems(measured: list[Measurement]) -> list[str]:
    return [
        f"{m.shape}, {m.dtype}, {m.kind}: {name}: {timing.problem}"
        for m in measured
        for name, timing in m.contenders.items()
        if timing.problem
    ]


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds:.0f} s"
    raise AssertionError


def interleave(calls: dict[str, Callable], warm: dict[str, float], budget: float) -> dict:
    """Seconds per call in each round, by contender: rounds until the budget is spent, at least 3,
    or fewer where they take more than three times the budget."""
    names = list(calls)
    loops = {name: 1 if warm[name] > budget else repeats(calls[name]) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0)
    turn, spent, began = 0, 0.0, time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while names and turn < MOST_ROUNDS and spent < (budget if turn >= 3 else 3 * budget):
            # Any order as often as another: who comes after torch.compile finds nothing of its own in the caches.
            for name in shuffle.sample(names, len(names)):
                call, count = calls[name], range(loops[name])
                start = time.perf_counter()
                for _ in count:
                    call()
                times[name].append((time.perf_counter() - start) / loops[name])
            turn, spent = turn + 1, time.perf_counter() - began
    finally:
        gc.enable()
    return times


def repeats(call: Callable) -> int:
    """Calls that fill a round."""
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > SHORTEST_ROUND:
            return 1
    return math.ceil(SHORTEST_ROUND / seconds)


# Memory


def peak_memory(
    workload: Workload, shapes: list, tasks: list[tuple[str, str]]
) -> dict[tuple[str, str], int | None]:
    """Extra bytes at the peak of one call, beyond its inputs and results, by (kind, contender); None for
    a call whose process died, as one does that runs out of memory; empty where the operating system
    doesn't tell.

    Each call runs in a process of its own, forked where the inputs are in memory and no thread has
    started. What the contender keeps for later calls (a library's buffers) counts; a training step
    is measured with its optimizer's state in place, on the second call. `shapes` are those of the
    outputs to differentiate.
    """
    if not Path("/proc/self/clear_refs").exists() or not tasks:
        return {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure"])
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, workload, shapes, tasks, torch.get_num_threads())
    process = context.Process(target=_measure_memory, args=arguments)
    process.start()
    theirs.close()
    try:
        return {task: ours.recv() for task in tasks}
    except EOFError:
        raise RuntimeError(f"the process that measured the memory of {workload.name} died") from None
    finally:
        process.join()


def sweep(operator: str, dtype: torch.dtype, most: int | None = None) -> Sweep | None:
    """Along the operator's sizes, or the first `most`; None where it has none or the system doesn't tell."""
    growth = MEASURED[operator].growth if operator in MEASURED else None
    if growth is None:
        return None
    made = Sweep(operator, growth.of, str(dtype).removeprefix("torch."), {})
    for n, case in list(growth.cases.items())[:most]:
        workload = Workload(operator, case.id, dtype)
        shapes = [x.shape for x in workload.problem().call(FASTLM, FORWARD)()]
        tasks = [(BOTH, name) for name in workload.contenders if name != COMPILED]
        for (_, name), size in peak_memory(workload, shapes, tasks).items():
            if size is not None:
                made.memory.setdefault(name, {})[n] = size
    return made if made.memory else None


def _measure_memory(pipe, workload, shapes, tasks, threads: int) -> None:
    torch.set_num_threads(1)  # starts no threads, which would not live on in a forked process
    problem = workload.problem()
    problem.draw_cotangents(shapes)
    for kind, contender in tasks:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(threads)
            pipe.send(_extra_memory(problem, kind, contender))
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            pipe.send(None)


def _extra_memory(problem, kind: str, contender: str) -> int:
    call = problem.call(contender, kind)
    if problem.stateful:
        call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide what is allocated now
    before = _status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    results = call()
    peak = _status("VmHWM") - _status("RssFile") - _status("RssShmem")
    kept = 0 if problem.stateful else sum(x.nbytes for x in results)
    return max(0, peak - before - kept)


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
