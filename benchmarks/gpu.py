"""`make gpu-check`: all tests, then the benchmarks, on a machine with a GPU, and one report of both.

The report (report.md, with a chart for each operator) has the device, the versions, the backends, the
tests' outcome, the compiled kernels, and for each shape the time and the peak memory of every contender that
is here: eager PyTorch (cuDNN for the GRU), torch.compile, fastlm as it chooses, fastlm on each other family
of kernels, and flash-attn and Liger where installed.
The contenders take turns, timed by the device's events; each result is compared with the reference first.
Needs no network, and no package beyond torch, triton and pytest; charts need matplotlib and rich.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from cases import OPERATORS
from harness import differentiable, on_device

import fastlm
from benchmarks import ROOT
from benchmarks.measure import Measurement, Timing, check
from benchmarks.training_step import TrainingStep
from benchmarks.workloads import FASTLM, OperatorProblem, Workload, workloads
from fastlm import ops

FLASH, LIGER = "flash-attn", "Liger"
ROUNDS, ROUND_SECONDS = 20, 0.01


# ---- contenders ----------------------------------------------------------------------------


def _flash(query, key, value, *, is_causal=False, enable_gqa=False):
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(q, k, v, causal=is_causal).transpose(1, 2)


def _liger(input, target):
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It writes the gradient over its input, which the others read too.
    return liger_cross_entropy(input.clone(), target)


def _liger_linear(input, linear_weight, target):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(input, linear_weight, target)


# contender -> the family of kernels that it forces
FORCED = {"fastlm cuda": "cuda", "fastlm triton": "triton"}
# (operator, contender) -> its package and its function on the operator's arguments
OTHERS = {
    ("scaled_dot_product_attention", FLASH): ("flash_attn", _flash),
    ("cross_entropy", LIGER): ("liger_kernel", _liger),
    ("linear_cross_entropy", LIGER): ("liger_kernel", _liger_linear),
}


class DeviceProblem(OperatorProblem):
    """An operator's inputs in a device's memory."""

    def __init__(self, workload: Workload, device: torch.device):
        self.device = device
        super().__init__(OPERATORS[workload.operator], workload.shape, workload.dtype)
        self.arguments = on_device(self.operator, self.arguments, device)
        self.inputs = differentiable(self.arguments)

    def function(self, contender: str) -> Callable:
        other = OTHERS.get((self.operator.name, contender))
        if contender in FORCED:
            contender = FASTLM
        return super().function(contender) if other is None else other[1]


def contenders(workload: Workload, device: torch.device) -> list[str]:
    sample = torch.empty(1, dtype=workload.dtype, device=device)
    chosen, missing = ops.choose_backend(workload.operator, sample), ops.missing_backends()
    families = [name for name, family in FORCED.items() if family != chosen and family not in missing]
    others = [
        name
        for (operator, name), (package, _) in OTHERS.items()
        if operator == workload.operator and importlib.util.find_spec(package)
    ]
    return [*workload.contenders, *families, *others]


def on_family(contender: str) -> contextlib.AbstractContextManager:
    """Where a contender's calls are made, backward included. Outside of what is timed: changing the family
    takes longer than a small call."""
    return fastlm.use_backend(FORCED[contender]) if contender in FORCED else contextlib.nullcontext()


# ---- measuring -----------------------------------------------------------------------------


@dataclasses.dataclass
class Peaks:
    """What the device was measured to do: products of 16 and 32 bits, and copies."""

    bf16: float
    fma: float
    copy: float

    def floor(self, operations: int, moved: int, dtype: str) -> float:
        return max(operations / (self.bf16 if dtype == "bfloat16" else self.fma), moved / self.copy)


def measure_peaks(device: torch.device) -> Peaks:
    n = 8192 if device.type == "cuda" else 512
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(n, n, device=device, dtype=dtype)
        rates.append(2 * n**3 / seconds_of(lambda a=a: a @ a, device))
    source = torch.ones(n * n, device=device)
    target = torch.empty_like(source)
    return Peaks(*rates, 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device))


def timed(call: Callable, times: int, device: torch.device) -> float:
    """Seconds a call, of `times` in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def seconds_of(call: Callable, device: torch.device) -> float:
    timed(call, 1, device)
    return median(timed(call, 3, device) for _ in range(5))


def extra_memory(call: Callable, device: torch.device) -> int | None:
    """Bytes at the peak of one call beyond its inputs and its results."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


def measure(workload: Workload, device: torch.device) -> list[Measurement]:
    torch._dynamo.reset()
    problem = DeviceProblem(workload, device)
    truth = problem.truth()
    dtype = str(workload.dtype).removeprefix("torch.")
    measured = []
    for kind in problem.kinds:
        timings = {name: Timing() for name in contenders(workload, device)}
        calls, times = {}, {}
        for name, timing in timings.items():
            call = problem.call(name, kind)
            with on_family(name):
                timing.problem = check(call, truth, workload.dtype)
                if timing.problem is None:
                    calls[name] = call
                    times[name] = max(1, int(ROUND_SECONDS / max(1e-6, timed(call, 1, device))))
                    timing.memory = extra_memory(call, device)
        names = list(calls)
        for turn in range(ROUNDS):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with on_family(name):
                    timings[name].seconds.append(timed(calls[name], times[name], device))
        measured.append(
            Measurement(workload.operator, workload.shape, dtype, kind, *problem.floor[kind], timings)
        )
    return measured


# ---- the report ----------------------------------------------------------------------------


def facts(device: torch.device) -> dict[str, str]:
    found = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["device"] = f"{about.name}, {about.multi_processor_count} multiprocessors, " + (
            f"{about.total_memory >> 30} GiB"
        )
    packages = ("triton", "flash_attn", "liger_kernel", "numpy")
    versions = [f"fastlm {fastlm.__version__}", f"torch {torch.__version__}"]
    versions += [
        f"Python {platform.python_version()}",
        f"CUDA {torch.version.cuda}",
        f"HIP {torch.version.hip}",
    ]
    for package in packages:
        if importlib.util.find_spec(package):
            name = importlib.metadata.packages_distributions().get(package, [package])[0]
            versions.append(f"{name} {importlib.metadata.version(name)}")
    found["versions"] = ", ".join(versions)
    missing = ops.missing_backends()
    for name in ("cuda", "triton"):
        found[f"backend {name}"] = (
            f"missing: {missing[name]}" if name in missing else ops.backend_notes()[name]
        )
    serving = {name: [family for family, _ in rules] for name, rules in ops._native[device.type].items()}
    found["fastlm chooses"] = ", ".join(
        f"{' or '.join(families) or 'eager'} for {operator}" for operator, families in serving.items()
    )
    found["time"] = time.strftime("%Y-%m-%d %H:%M:%S")
    return found


def run_tests(arguments: list[str]) -> tuple[bool, str]:
    """Whether all passed, and pytest's summary."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=line", str(ROOT / "tests"), *arguments]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4", "--dist", "worksteal"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    return done.returncode == 0, "\n".join([x for x in lines if x.startswith("FAILED")] + lines[-1:])


def kernels() -> str:
    command = [sys.executable, "-m", "fastlm", "info", "--kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr[-2000:]


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def table(measured: list[Measurement], peaks: Peaks) -> list[str]:
    names = list(dict.fromkeys(name for m in measured for name in m.contenders))
    lines = [
        "| shape | dtype | pass | " + " | ".join(names) + " | of the floor | MiB " + "/".join(names) + " |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for m in measured:
        cells = []
        for name in names:
            timing = m.contenders[name]
            text = "fails" if timing.problem else duration(timing.median)
            if not timing.problem and name != FASTLM and m.contenders[FASTLM].seconds:
                text += f" ({m.ratio(name):.2f}x)"
            cells.append(text)
        memory = "/".join("-" if t.memory is None else str(t.memory >> 20) for t in m.contenders.values())
        share = m.floor(peaks) / m.contenders[FASTLM].median
        cells += ["" if share != share else f"{share:.0%}", memory]
        lines.append(f"| {m.shape} | {m.dtype} | {m.kind} | " + " | ".join(cells) + " |")
    lines += [
        f"\n- {m.shape}, {m.dtype}, {m.kind}, {name}: {timing.problem}"
        for m in measured
        for name, timing in m.contenders.items()
        if timing.problem
    ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only benchmarks with one of these words in their name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--tests", default="", help="more arguments for pytest")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no GPU is available to torch here", file=sys.stderr)
        return 2
    folder = ROOT / "benchmarks" / "results" / time.strftime("gpu-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    about = facts(device)
    report = ["# fastlm on " + about["device"], *(f"- {name}: {value}" for name, value in about.items())]
    good = True
    if not options.no_tests:
        good, summary = run_tests(options.tests.split())
        report += ["\n## Tests", f"```\n{summary}\n```", "\n## Kernels", f"```\n{kernels()}\n```"]
        print(summary)
    peaks = measure_peaks(device)
    report.append(
        f"\n## Benchmarks\nFloor: the larger of operations at {peaks.bf16 / 1e12:.3g} (bfloat16) or "
        f"{peaks.fma / 1e12:.3g} TFLOP/s (float32, as torch multiplies) and bytes at {peaks.copy / 1e9:.4g} GB/s, "
        "measured here. (1.50x): times as long as fastlm."
    )
    chosen = [w for w in workloads() if w.operator != TrainingStep.operator]
    chosen = [w for w in chosen if not options.words or any(word in w.name for word in options.words)]
    for operator in dict.fromkeys(w.operator for w in chosen):
        measured = []
        for workload in (w for w in chosen if w.operator == operator):
            print(workload.name, flush=True)
            measured += measure(workload, device)
        good &= all(m.contenders[FASTLM].problem is None for m in measured)
        report += [f"\n### {operator}", *table(measured, peaks)]
        if all(importlib.util.find_spec(name) for name in ("matplotlib", "rich")):
            from benchmarks.report import draw

            draw(measured, peaks, about, folder)
            report.append(f"\n![{operator}]({operator.replace(' ', '_')}.png)")
        (folder / "report.md").write_text("\n".join(report) + "\n")
    print(f"report: {folder / 'report.md'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
