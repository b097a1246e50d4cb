"""`make gpu-check`: all tests, then the benchmarks, on a machine with a GPU, and one report of both.

The report (report.md, with charts in report.html) has the device, the versions, the backends, the
tests' outcome, the compiled kernels, and for each shape the time and the peak memory of every contender that
is here: eager PyTorch (cuDNN for the GRU), torch.compile, fastlm as it chooses, fastlm on each other family
of kernels, and flash-attn and Liger where installed.
The contenders take turns, timed by the device's events; each result is compared with the reference first.
A contender, a workload or a family of kernels that fails is reported, and the others go on; the report is
written anew after each step. Needs no network; which packages it needs, it says first.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from cases import OPERATORS
from harness import differentiable, on_device
from torch.backends.cudnn.rnn import get_cudnn_mode
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from benchmarks import ROOT, tables
from benchmarks.measure import Measurement, Timing, check, failure, problems
from benchmarks.page import page
from benchmarks.workloads import FASTLM, OperatorProblem, Workload, workloads
from fastlm import ops
from fastlm.functional.gru import gru_arguments

CUDNN, FLASH, LIGER = "cuDNN", "flash-attn", "Liger"
ROUNDS, ROUND_SECONDS = 20, 0.01
# Of the tests, each in a process of its own: a fault in a kernel spoils the device for its whole process.
SUITES = {
    "cuda": ["tests/test_cuda.py", "tests/test_gpu.py", "-k", "test_cuda or cuda_device"],
    "triton": ["tests/test_triton.py", "tests/test_gpu.py", "-k", "test_triton or triton_device"],
    "others": ["tests", *(f"--ignore=tests/test_{name}.py" for name in ("cuda", "triton", "gpu"))],
}
SUITE_SECONDS = 2 * 3600


# ---- contenders ----------------------------------------------------------------------------


def _cudnn(*args, **kwargs):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


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
    ("scaled_dot_product_attention", CUDNN): ("torch", _cudnn),
    ("scaled_dot_product_attention", FLASH): ("flash_attn", _flash),
    ("cross_entropy", LIGER): ("liger_kernel", _liger),
    ("linear_cross_entropy", LIGER): ("liger_kernel", _liger_linear),
}


def _flatten_weights(*args) -> None:
    """The weights of a GRU in one piece of memory, as nn.GRU keeps them for cuDNN, which would else compact them
    at each call."""
    given = gru_arguments(args, {})
    params, biases = given["params"], given["has_biases"]
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            params, 4 if biases else 2, params[0].size(1), get_cudnn_mode("GRU"), given["hx"].size(-1), 0,
            given["num_layers"], given.get("batch_first", False), given["bidirectional"],
        )  # fmt: skip


class DeviceProblem(OperatorProblem):
    """An operator's inputs in a device's memory."""

    def __init__(self, workload: Workload, device: torch.device):
        self.device = device
        super().__init__(OPERATORS[workload.operator], workload.shape, workload.dtype)
        self.arguments = on_device(self.operator, self.arguments, device)
        if workload.operator == "gru" and device.type == "cuda" and torch.backends.cudnn.is_available():
            _flatten_weights(*self.arguments[0])
        self.inputs = differentiable(self.arguments)

    def function(self, contender: str) -> Callable:
        other = OTHERS.get((self.operator.name, contender))
        if contender in FORCED:
            contender = FASTLM
        return super().function(contender) if other is None else other[1]


def contenders(workload: Workload) -> list[str]:
    missing = ops.missing_backends()
    families = [name for name, family in FORCED.items() if family not in missing]
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


def prepare(
    problem: DeviceProblem, name: str, kind: str, truth, timing: Timing
) -> tuple[Callable, int] | None:
    """Its call, checked, and how many fill a round; None where it fails, which `timing` is told."""
    try:
        with on_family(name):
            call = problem.call(name, kind)
            timing.problem = check(call, truth, problem.dtype)
            if timing.problem is None:
                times = max(1, int(ROUND_SECONDS / max(1e-6, timed(call, 1, problem.device))))
                timing.memory = extra_memory(call, problem.device)
                return call, times
    except Exception as error:  # reported; the others go on
        timing.problem = failure(error)
    return None


def measure(workload: Workload, device: torch.device) -> list[Measurement]:
    torch._dynamo.reset()
    problem = DeviceProblem(workload, device)
    truth = problem.truth()
    dtype = str(workload.dtype).removeprefix("torch.")
    measured = []
    for kind in problem.kinds:
        timings = {name: Timing() for name in contenders(workload)}
        calls = {}
        for name, timing in timings.items():
            call = prepare(problem, name, kind, truth, timing)
            if call is not None:
                calls[name] = call
            if device.type == "cuda":
                torch.cuda.empty_cache()
        names = list(calls)
        for turn in range(ROUNDS):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with on_family(name):
                    timings[name].seconds.append(timed(*calls[name], device))
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
    distributions = importlib.metadata.packages_distributions()
    for package in packages:
        if importlib.util.find_spec(package):
            (name, *_) = distributions.get(package, [package])
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.append(f"{name} {importlib.metadata.version(name)}")
    if device.type == "cuda":
        versions.append(f"cuDNN {torch.backends.cudnn.version()}")
    found["versions"] = ", ".join(versions)
    missing = ops.missing_backends()
    for name in ("cuda", "triton"):
        found[f"backend {name}"] = (
            f"missing: {missing[name]}" if name in missing else ops.backend_notes()[name]
        )
    found["time"] = time.strftime("%Y-%m-%d %H:%M:%S")
    return found


def parallel() -> bool:
    return importlib.util.find_spec("xdist") is not None


def run_tests(suite: str, arguments: list[str], log: Path) -> tuple[bool, str]:
    """Whether all passed, and pytest's summary; the rest of what it says goes to the terminal and a file."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", *SUITES[suite]]
    command += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=600"]
    if parallel():
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        command += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "1000"]
    command += arguments
    # Configurations are tuned in the benchmarks: compiling all would make the tests as many times longer.
    environment = {"TRITON_INTERPRET": "0", "FASTLM_AUTOTUNE": "0", "GOMP_SPINCOUNT": "1000"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment | os.environ | {"TRITON_INTERPRET": "0"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    timer = threading.Timer(SUITE_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines = []
    with log.open("w") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
            lines.append(line.rstrip())
    timer.cancel()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR "))]
    if len(failed) > 100:
        failed[100:] = [f"and {len(failed) - 100} more, in {log.name}"]
    if process.wait() < 0:
        failed.append(f"ended by {signal.Signals(-process.returncode).name}, after {SUITE_SECONDS} s at most")
    return process.returncode == 0, "\n".join(failed + lines[-1:])


COMPILED = """
import sys
from fastlm.targets import HEAD, line
from fastlm.triton import targets
print(HEAD)
for row in targets.table(sys.argv[1]):
    print(line(row), *row.problems())
"""


def kernels(device: torch.device) -> str:
    """What became of the Triton kernels for this device, where it is a target that is known."""
    from fastlm.triton import targets
    from fastlm.triton.launch import target_of

    name = target_of(device).name
    if name not in targets.COMPILED_FOR:
        return f"{name} is not among {', '.join(targets.COMPILED_FOR)}"
    command = [sys.executable, "-c", COMPILED, name]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr[-2000:]


def table(measured: list[Measurement], peaks: Peaks) -> list[str]:
    if not measured:
        return []
    head = tables.header(measured)
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    lines += [f"| {' | '.join(cell.text for cell in row)} |" for row in tables.rows(measured, peaks)]
    return lines + [f"\n- {line}" for line in problems(measured)]


class Report:
    """report.md, written whole at each addition: what stops the run loses nothing."""

    def __init__(self, folder: Path, about: dict[str, str]):
        self.path, self.lines = folder / "report.md", []
        self.add("# fastlm on " + about["device"], *(f"- {name}: {value}" for name, value in about.items()))

    def add(self, *lines: str) -> None:
        self.lines += lines
        self.path.write_text("\n".join(self.lines) + "\n")


def benchmark(report: Report, chosen: list[Workload], device: torch.device, about: dict[str, str]) -> bool:
    """Whether every fastlm result was right."""
    peaks, good, done = measure_peaks(device), True, []
    report.add(
        f"\n## Benchmarks\nFloor: the larger of operations at {peaks.bf16 / 1e12:.3g} (bfloat16) or "
        f"{peaks.fma / 1e12:.3g} TFLOP/s (float32, as torch multiplies) and bytes at {peaks.copy / 1e9:.4g} GB/s, "
        "measured here. (1.50x): times as long as fastlm."
    )
    for operator in dict.fromkeys(w.operator for w in chosen):
        measured, lost = [], []
        for workload in (w for w in chosen if w.operator == operator):
            print(workload.name, flush=True)
            try:
                measured += measure(workload, device)
            except Exception as error:  # the reference may need more memory than there is
                lost.append(f"\n- {workload.name} was not measured: {failure(error)}")
        good &= not lost and all(m.contenders[FASTLM].problem is None for m in measured)
        report.add(f"\n### {operator}", *table(measured, peaks), *lost)
        done += measured
        if done:
            (report.path.parent / "report.html").write_text(page(done, [], peaks, about), encoding="utf-8")
    return good


def lacking(device: torch.device) -> tuple[list[str], list[str]]:
    """What must be here and is not, and what is left out for want of a package."""
    found = {name: bool(importlib.util.find_spec(name)) for name in NEEDED | OPTIONAL.keys()}
    must = [f"Python package {name}" for name in sorted(NEEDED) if not found[name]]
    if device.type == "cuda" and not torch.cuda.is_available():
        must.append("a GPU that this torch can use")
    return must, [f"without {name}: {what}" for name, what in OPTIONAL.items() if not found[name]]


NEEDED = {"pytest", "triton"}
OPTIONAL = {
    "numpy": "the tests of data and training, and of Triton's interpreter, fail",
    "xdist": "tests run one after the other, and a family's end with the first fault of the device",
    "hypothesis": "no generated cases",
    "rich": "the tests of the command line fail",
    "flash_attn": "not among the contenders",
    "liger_kernel": "not among the contenders",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only benchmarks with one of these words in their name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--tests", default="", help="more arguments for pytest")
    parser.add_argument(
        "--output", type=Path, help="folder of the report [default: benchmarks/results/gpu-...]"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    must, without = lacking(device)
    if must:
        print("gpu-check needs " + ", ".join(must), file=sys.stderr)
        return 2
    chosen = [w for w in workloads() if w.operator in OPERATORS]  # those with kernels for GPUs
    chosen = [w for w in chosen if not options.words or any(word in w.name for word in options.words)]
    folder = options.output or ROOT / "benchmarks" / "results" / time.strftime("gpu-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        # float32 is float32 in every contender: torch lets cuDNN's GRU multiply it in tf32.
        torch.backends.cudnn.allow_tf32 = False
    about, good = facts(device), True
    report = Report(folder, about)
    report.add(*(f"- {line}" for line in without))
    print("\n".join(report.lines), flush=True)
    for suite in () if options.no_tests else SUITES:
        passed, summary = run_tests(suite, options.tests.split(), folder / f"tests-{suite}.txt")
        good &= passed
        report.add(f"\n## Tests: {suite}", f"```\n{summary}\n```")
    good &= benchmark(report, chosen, device, about)
    if device.type == "cuda" and not options.no_tests:
        report.add("\n## Triton kernels", f"```\n{kernels(device)}\n```")
    print(f"report: {report.path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
