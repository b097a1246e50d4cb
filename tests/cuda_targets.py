"""Every CUDA kernel compiled for GPUs that are not here: `make cuda-targets` prints what became of them, and
test_cuda_targets.py judges it.

nvcc compiles csrc/cuda, and the binaries are read. Threads and shared memory of a kernel's blocks are those
that the launchers ask for on a GPU of that size, listed by tests/simt instead of run: for the tests' cases,
and for SIZES that these don't reach. `python tests/cuda_targets.py [sm_80 ...]`, default: all.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cases import OPERATORS  # noqa: E402
from harness import run  # noqa: E402

import fastlm  # noqa: E402
from fastlm import cuda  # noqa: E402
from fastlm.targets import HEAD, TARGETS, Row, Unavailable, demangled, line, occupancy, read, unreadable  # noqa: E402

ALL = tuple(name for name, target in TARGETS.items() if target.kind == "cuda")
MULTIPROCESSORS = {"sm_75": 40, "sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 170}

# What a kernel must be made of: MATRIX has tensor-core instructions where it multiplies 16-bit types or tf32, MEMORY
# 16-byte loads. OTHERS are small beside these, or read what lies scattered.
MATRIX = {
    "attention_forward", "attention_forward_warpgroups", "attention_backward_keys", "attention_backward_rows", "attention_mask_backward",
    "gru_forward", "gru_forward_step", "gru_backward", "gru_backward_step",
}  # fmt: skip
MEMORY = MATRIX | {"attention_combine", "cross_entropy_rows"}
OTHERS = {
    "attention_row_stats", "attention_head_backward", "attention_sum_parts", "cross_entropy_tokens",
    "fold_product", "sum_tokens", "gru_pack", "gru_norm", "gru_norm_backward", "store_values",
    "scale_gradient",
}  # fmt: skip


def compile(targets: tuple[str, ...], every: bool) -> list[Path]:
    """A fatbin of each source, for all of the targets. Unless every kernel is asked for, some are left out, as
    csrc/cuda/launch.h says."""
    if reason := unreadable():
        raise Unavailable(reason)
    archs = [target.removeprefix("sm_") for target in targets]
    sources = [path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    if not every:
        sources = [name for name in sources if not name.endswith(("_float16", "_float32", "_tf32"))]
    folder = ROOT / "build" / "cuda" / "-".join(archs if every else ["some", *archs])
    environment = os.environ | {"FASTLM_CUDA_ARCHS": ";".join(archs), "FASTLM_BUILD": str(folder)}
    if not every:
        flags = os.environ.get("NVCC_APPEND_FLAGS", "")
        environment["NVCC_APPEND_FLAGS"] = f"{flags} -DFASTLM_SOME_KERNELS=128".strip()
    command = [sys.executable, "setup.py", "--quiet", "cuda_code", f"--sources={','.join(sources)}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        error = Unavailable if "need nvcc" in done.stderr else RuntimeError
        raise error(done.stdout[-8000:] + done.stderr[-8000:])
    return [folder / f"cuda_{name}.fatbin" for name in sources]


# ---- what launchers ask for ----------------------------------------------------------------


def _attention(D, T=(600, 600), H=(4, 2), **options):
    def call(dtype):
        q = torch.zeros(2, H[0], T[0], D, dtype=dtype, requires_grad=T[0] > 1)
        k, v = (torch.zeros(2, H[1], T[1], D, dtype=dtype) for _ in range(2))
        return fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)

    return call


def _gru(H):
    def call(dtype):
        gru = fastlm.nn.GRU(64, H, dtype=dtype)
        return gru(torch.zeros(4, 16, 64, dtype=dtype))[0]

    return call


def _cross_entropy(C, probabilities=False):
    def call(dtype):
        x = torch.zeros(8, C, dtype=dtype, requires_grad=True)
        target = torch.zeros(8, C, dtype=dtype) if probabilities else torch.zeros(8, dtype=torch.int64)
        return fastlm.cross_entropy(x, target)

    return call


# Beyond the cases' sizes.
SIZES = [
    *(_attention(D, softcap=softcap) for D in (32, 64, 96, 128, 256) for softcap in (0.0, 30.0)),
    *(_attention(D, T=(1, 4096), H=(32, 8)) for D in (64, 128, 256)),
    *(_gru(H) for H in (64, 256, 512, 1024, 2048)),
    *(_cross_entropy(C) for C in (1000, 32000, 128256)),
    _cross_entropy(1000, probabilities=True),
]


def _calls() -> Iterator:
    """Every case in one of the types; of the losses, whose kernels are for pairs of types, in all."""
    for operator in OPERATORS.values():
        for i, case in enumerate(operator.cases):
            one = case.dtypes[i % len(case.dtypes)]
            for dtype in case.dtypes if "cross_entropy" in operator.name else (one,):
                arguments = case.build(dtype, 0)
                if not cuda.refuses(operator.name, arguments[0][0]):
                    yield operator.function, arguments


def launches(targets: tuple[str, ...]) -> dict[str, dict[str, tuple[int, int]]]:
    """Target -> mangled name -> threads and the most shared memory of a block."""
    from tests import simt

    found = {name: {} for name in targets}
    calls = list(_calls())
    with fastlm.use_backend("cuda-host"):
        for name, tf32 in ((name, tf32) for name in targets for tf32 in (False, True)):
            target = TARGETS[name]
            if tf32 and target.arch < 80:
                continue
            dtypes = (torch.float32,) if tf32 else (torch.float32, torch.bfloat16, torch.float16)
            with simt.listing(MULTIPROCESSORS[name], target.shared_memory, tf32, target.arch == 90) as listed:
                for function, arguments in calls:
                    if arguments[0][0].dtype in dtypes or not tf32:
                        run(function, arguments, 0)
                for size in SIZES:
                    for dtype in dtypes:
                        out = size(dtype)
                        if out.requires_grad:
                            out.sum().backward()
            for launch in listed:
                threads, shared = found[name].get(launch.kernel, (0, 0))
                found[name][launch.kernel] = max(threads, launch.threads), max(shared, launch.shared)
    return found


# ---- the table -----------------------------------------------------------------------------


def parts(readable: str) -> tuple[str, str]:
    """Name and template arguments: "void fastlm::cuda::f<float, 64>(P)" -> "f", "float 64"."""
    name = re.sub(r"\(anonymous namespace\)::|fastlm::cuda::|^void ", "", readable)
    name = re.sub(r"\((?:unsigned )?(?:int|bool|long)\)", "", name)
    name = name[: name.rindex("(")] if name.endswith(")") else name
    base, _, arguments = name.partition("<")
    return base, arguments.removesuffix(">").replace(", ", " ").replace("true", "1").replace("false", "0")


def table(targets: tuple[str, ...], every: bool = True) -> Iterator[Row]:
    """A row for each kernel on each of the targets; of occupancy 0 where it is not launched there."""
    listed = launches(targets)
    for path in compile(targets, every):
        codes = read(path)
        for code, readable in zip(codes, demangled([code.name for code in codes]), strict=True):
            name, config = parts(readable)
            target = TARGETS[code.target]
            threads, shared = listed[code.target].get(code.name, (0, 0))
            share = occupancy(target, code.registers, -(-threads // 32), shared) if threads else 0
            # Turing's tensor cores lack bf16.
            matrix = name in MATRIX and bool(re.search(r"\bf16" if target.arch < 80 else "f16|tf32", config))
            yield Row(
                path.stem.removeprefix("cuda_"), code.target, name, config, code.registers, code.spills, shared,
                share, code.tensor, code.wide, bool(threads) and matrix, bool(threads) and name in MEMORY,
            )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(ALL)}")
    targets = tuple(parser.parse_args().targets) or ALL
    if unknown := set(targets) - set(ALL):
        parser.error(f"unknown targets {', '.join(sorted(unknown))}, expected some of {', '.join(ALL)}")
    print(HEAD)
    found = 0
    for row in table(targets):
        problems = ", ".join(row.problems())
        found += bool(problems)
        print(line(row) + (f"  PROBLEM: {problems}" if problems else ""), flush=True)
    print(f"{found} with problems" if found else "no problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
