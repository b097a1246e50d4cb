"""Compiles with ninja what runs CUDA kernels on the CPU, into build/simt/<kind>.

Kinds: plain, and one for each sanitizer. Environment: CXX, CXXFLAGS (appended), MAX_JOBS,
FASTLM_SIMT_SOURCES (comma-separated names of csrc/cuda/*.cu to compile; default: all).
"""

import fcntl
import functools
import os
import shlex
import subprocess
from pathlib import Path

import ninja
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"

KINDS = {
    "plain": "-O2",
    "address": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -DFASTLM_SOME_KERNELS=32",
    # Lanes are threads here, and only here.
    "thread": "-O1 -g1 -fsanitize=thread -DFASTLM_SOME_KERNELS=32 -DSIMT_THREADS",
}
# Kernels view memory as vectors of other types, which nvcc allows; kernels' names stay visible for the counts.
FLAGS = (
    "-std=c++20 -fPIC -pthread -fno-strict-aliasing -fno-semantic-interposition -Wall -Wextra -Wno-psabi "
    f"-Wno-attributes -Wno-unknown-pragmas -I{HERE} -I{CSRC}"
)


def library() -> str:
    """The library's name: one for each choice of sources."""
    chosen = os.environ.get("FASTLM_SIMT_SOURCES")
    return f"libfastlm_cuda_host{'-' + chosen.replace(',', '-') if chosen else ''}.so"


def sources(kind: str) -> list[Path]:
    """Launchers, each with its kernels; without those of types that FASTLM_SOME_KERNELS leaves out."""
    if chosen := os.environ.get("FASTLM_SIMT_SOURCES"):
        return [CSRC / "cuda" / f"{x}.cu" for x in chosen.split(",")]
    every = sorted(CSRC.glob("cuda/*.cu"))
    return [x for x in every if kind == "plain" or not x.stem.endswith(("_float16", "_tf32"))]


def quote(words):
    return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")


def ninja_script(kind):
    """libfastlm_cuda_host.so: the model and csrc/cuda's launchers; kernels: the model and its own tests."""
    torch_root = Path(torch.__file__).parent
    flags = [*shlex.split(f"{FLAGS} {KINDS[kind]}"), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    includes = [f"-isystem{torch_root / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {quote(shlex.split(os.environ.get('CXX', 'c++')))}",
        f"flags = {quote(flags)}",
        f"torch = {quote(includes)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule library",
        f"  command = $cxx $flags -shared $in -o $out {quote(link)}",
        "rule program",
        "  command = $cxx $flags -rdynamic $in -o $out -ldl",
    ]

    def compile(source, extra=""):
        name = f"{source.stem}.o"
        lines.extend([f"build {name}: compile {quote([source])}", f"  extra = {extra}"])
        return name

    model = compile(HERE / "simt.cpp")
    # The same schemas, in a library of another name.
    objects = [compile(CSRC / "ops.cpp", "$torch -Dfastlm=fastlm_cuda_host")]
    objects += [compile(source, "$torch") for source in sources(kind)]
    lines.append(f"build {library()}: library {model} {' '.join(objects)}")
    lines.append(f"build kernels: program {model} {compile(HERE / 'kernels.cpp')}")
    return "\n".join([*lines, ""])


@functools.cache
def build(kind: str, target: str) -> Path:
    """The path of an up-to-date target."""
    folder = ROOT / "build" / "simt" / kind
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        script, path = ninja_script(kind), folder / "build.ninja"
        if not path.exists() or path.read_text() != script:
            path.write_text(script)
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, "--quiet", target]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)
    return folder / target
