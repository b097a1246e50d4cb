"""The vectors and matrix products of every instruction set of this machine, checked natively; then
these and every operator, forward and backward, under the address and undefined-behaviour sanitizers
and under the thread sanitizer; and so the CUDA kernels, which tests/simt runs on the CPU.

Sanitized libraries are builds of their own. walk.py calls every case of tests/cases.py on the CPU's,
cuda_walk.py every kernel of the other.
`python tests/native/run.py [plain|address|thread|cuda-address|cuda-thread...]` runs some of this.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ninja

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
from tests.simt.build import build, library  # noqa: E402

BUILD = ROOT / "build" / "native"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = (
    "-std=c++20 -pthread -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
)
AVX2 = "-mavx2 -mfma -mf16c"
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
# The thread sanitizer needs fixed addresses on kernels with large address-space randomness.
FIXED = ["setarch", platform.machine(), "-R"]


def isas():
    """Name and flags of what this machine runs; of AVX-512 a model too, see csrc/cpu/avx512_model.h."""
    if platform.machine() != "x86_64":
        return {"neon" if platform.machine() == "aarch64" else "generic": ""}
    flags = Path("/proc/cpuinfo").read_text()
    found = {"generic": ""}
    if " avx2" in flags and " fma" in flags:
        found["avx2"] = AVX2
        found["avx512_model"] = f"{AVX2} -DFASTLM_AVX512_MODEL"
        found["avx512_bf16_model"] = f"{found['avx512_model']} -DFASTLM_AVX512_BF16_MODEL"
    if all(f" avx512{x}" in flags for x in ("f", "bw", "dq", "vl")):
        wide = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
        found["avx512"] = wide
        if " avx512_bf16" in flags:
            found["avx512_bf16"] = f"{wide} -mavx512bf16"
    return found


def widest():
    """The layout with the most tile remainders: in a model, whose loads and stores the sanitizers see."""
    available = isas()
    return "avx512_bf16_model" if "avx512_bf16_model" in available else list(available)[-1]


def check_vectors(kinds):
    """simd_test.cpp: plainly for each instruction set, sanitized for the widest."""
    runs = [(kind, widest()) for kind in kinds if kind in SANITIZERS]
    if "plain" in kinds:
        runs += [("plain", isa) for isa in isas()]
    rules = [
        f"rule compile\n  command = {COMPILER} {FLAGS} -I{ROOT / 'csrc'} $extra -MMD -MF $out.d $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = compile $out",
    ]
    programs = []
    for kind, isa in runs:
        programs.append(f"simd_test-{kind}-{isa}")
        level = f"-O1 -g {SANITIZERS[kind]}" if kind in SANITIZERS else "-O2"
        rules.append(f"build {programs[-1]}: compile {HERE / 'simd_test.cpp'}")
        rules.append(f"  extra = {level} {isas()[isa]}")
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(rules) + "\n")
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "--quiet"], check=True)
    for program in programs:
        print(f"{program}: ", end="", flush=True)
        subprocess.run([*FIXED, BUILD / program], check=True)


def check_operators(kind):
    """walk.py on a sanitized build of the library."""
    folder = BUILD / kind
    flags = f"-O1 -g {SANITIZERS[kind]}"
    environment = os.environ | {
        "CXXFLAGS": flags + (" -DFASTLM_OWN_THREADS" if kind == "thread" else ""),
        "LDFLAGS": SANITIZERS[kind],
        "FASTLM_ISAS": widest(),
        "FASTLM_BUILD": str(folder),
    }
    setup = ["setup.py", "--quiet", "build_ext", f"--build-lib={folder}"]
    subprocess.run([sys.executable, *setup], env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    built = folder / "fastlm" / "libfastlm.so"
    calls = walk("walk.py", kind, {"FASTLM_LIBRARY": str(built), "FASTLM_ISA": widest()})
    print(f"operators, {kind} sanitizer: {calls}", flush=True)


def check_cuda_kernels(kind):
    """cuda_walk.py on a sanitized build of the CUDA kernels for the CPU."""
    calls = walk("cuda_walk.py", kind, {"FASTLM_SIMT_LIBRARY": str(build(kind, library()))})
    print(f"CUDA kernels on the CPU, {kind} sanitizer: {calls}", flush=True)


def check(kind):
    if kind in SANITIZERS:
        check_operators(kind)
    else:
        check_cuda_kernels(kind.removeprefix("cuda-"))


def walk(program, kind, libraries):
    """What the program prints, run under the sanitizer."""
    names = ("libasan.so", "libubsan.so") if kind == "address" else ("libtsan.so",)
    preload = [
        subprocess.run([COMPILER, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in (*names, "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        **libraries,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, by the thousand
        "TSAN_OPTIONS": f"halt_on_error=1 suppressions={HERE / 'thread.supp'}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",  # torch's own work; walk.py gives the kernels more
    }
    done = subprocess.run(
        [*FIXED, sys.executable, HERE / program],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip()


def main():
    every = ["plain", *SANITIZERS, *(f"cuda-{kind}" for kind in SANITIZERS)]
    # Lanes as threads take minutes: that one is run where it is asked for.
    kinds = sys.argv[1:] or [kind for kind in every if kind != "cuda-thread"]
    if unknown := set(kinds) - set(every):
        raise SystemExit(f"unknown {sorted(unknown)}; there are {', '.join(every)}")
    check_vectors(kinds)
    # Each keeps little more than one core busy; the thread sanitizer, which takes longest, begins.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, sorted(set(kinds) - {"plain"}, reverse=True)))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"failed: {shlex.join(map(str, error.cmd))}") from None
