"""Builds the native tests and runs them: once per instruction set of this machine, then under the
address and undefined-behaviour sanitizers, then under the thread sanitizer.

The kernel bodies are free of torch, so they run here in small programs with real threads: the
sanitizers see every instruction. `python tests/native/run.py [name...]` runs some of them.
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "native"
FLAGS = (
    "-std=c++20 -pthread -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
)
AVX2 = "-mavx2 -mfma -mf16c"
SANITIZERS = {
    "plain": "-O2",
    "address": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -g -fsanitize=thread",
}


def isas():
    """Name and flags of what this machine runs; `wide` stands for AVX-512's tile sizes and bf16 pairs."""
    if platform.machine() != "x86_64":
        return {"native": ""}
    flags = Path("/proc/cpuinfo").read_text()
    found = {"generic": ""}
    if " avx2" in flags and " fma" in flags:
        found["avx2"] = AVX2
        found["wide"] = f"{AVX2} -DFASTLM_VECTOR_BYTES=64 -DFASTLM_BF16_DOT"
    if all(f" avx512{x}" in flags for x in ("f", "bw", "dq", "vl")):
        wide = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
        found["avx512"] = wide
        if " avx512_bf16" in flags:
            found["avx512_bf16"] = f"{wide} -mavx512bf16"
    return found


def plan(names):
    """(program, sanitizer, ISA) of every run. Plain runs cover the ISAs; the sanitizers take the
    widest layout, where the most tile remainders lie, and the thread sanitizer what has threads."""
    available = isas()
    widest = "wide" if "wide" in available else list(available)[-1]
    for name in names:
        for isa in available:
            yield name, "plain", isa
        yield name, "address", widest
        yield name, "thread", widest


def main():
    every = sorted(p.stem for p in HERE.glob("*_test.cpp"))
    names = sys.argv[1:] or every
    unknown = set(names) - set(every)
    if unknown:
        raise SystemExit(f"no native test {sorted(unknown)}; there are {every}")
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    rules = [f"rule compile\n  command = {compiler} {FLAGS} -I{ROOT / 'csrc'} $extra -MMD -MF $out.d $in -o $out",
             "  depfile = $out.d\n  deps = gcc\n  description = compile $out"]  # fmt: skip
    programs = []
    for name, sanitizer, isa in plan(names):
        program = f"{name}-{sanitizer}-{isa}"
        programs.append((program, sanitizer))
        rules.append(f"build {program}: compile {HERE / name}.cpp")
        rules.append(f"  extra = {SANITIZERS[sanitizer]} {isas()[isa]}")
    (BUILD / "build.ninja").write_text("\n".join(rules) + "\n")
    import ninja

    ninja_path = Path(ninja.BIN_DIR) / "ninja"
    if subprocess.run([ninja_path, "-C", BUILD, "--quiet"]).returncode:
        raise SystemExit("the native tests do not compile")
    failed = []
    for program, _ in programs:
        # The thread sanitizer needs fixed addresses on kernels with large address-space randomness.
        command = ["setarch", platform.machine(), "-R", str(BUILD / program)]
        print(f"{program}: ", end="", flush=True)
        if subprocess.run(command).returncode:
            failed.append(shlex.join(command))
    if failed:
        raise SystemExit("native tests failed:\n  " + "\n  ".join(failed))
    print(f"{len(programs)} passed, 0 failed")


if __name__ == "__main__":
    main()
