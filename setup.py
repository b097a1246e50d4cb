"""Builds fastlm/libfastlm.so with ninja: one object per source, the CPU kernels once per instruction set.

Environment: CXX (compiler), CXXFLAGS and LDFLAGS (appended), MAX_JOBS, FASTLM_ISAS (comma-separated
instruction sets to build; default: all of this architecture), FASTLM_BUILD (folder of the objects).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# Instruction sets by architecture, from plain to wide, with the compiler flags of each.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = (
    f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized"  # of g++ 12's own intrinsics
)
ISAS = {
    "x86_64": {
        "generic": "",
        "wide": f"{AVX2} -DFASTLM_VECTOR_BYTES=64 -DFASTLM_BF16_DOT",  # tests: on request only
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
    },
    "aarch64": {"neon": ""},
}
ON_REQUEST = {"wide"}
FAMILIES = ("attention", "cross_entropy", "gru", "linear_cross_entropy", "peak")


def find_torch():
    """torch of the environment that pip installs into, also from inside an isolated build."""
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_paths()["purelib"])
        try:
            import torch
        except ImportError:
            raise SystemExit(
                "fastlm is compiled against PyTorch, and this environment has none.\n"
                "Install it first, then fastlm:\n"
                "    pip install 'torch>=2.10'\n"
                "    pip install --no-build-isolation .\n"
            ) from None
    version = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise SystemExit(f"fastlm needs torch 2.10 or later; this environment has {torch.__version__}.")
    return torch


def find_compiler():
    """The C++ compiler's command: $CXX, else c++, g++ or clang++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise SystemExit(
        "fastlm needs a C++20 compiler (g++ 11 or clang 14, or later), and none was found.\n"
        "Install one (Debian, Ubuntu: apt install g++) or name it in CXX, then try again.\n"
    )


def find_ninja():
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if not found:
        raise SystemExit("fastlm is built with ninja, and none was found: pip install ninja")
    return found


def chosen_isas():
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    isas = ISAS.get(machine, {"generic": ""})
    wanted = os.environ.get("FASTLM_ISAS")
    if wanted is None:
        return {name: flags for name, flags in isas.items() if name not in ON_REQUEST}
    names = set(wanted.split(","))
    if names - set(isas):
        raise SystemExit(f"FASTLM_ISAS={wanted}: {machine} has {', '.join(isas)}")
    return {name: flags for name, flags in isas.items() if name in names}


class Build(build_ext):
    """Writes build.ninja and runs it; ninja rebuilds what changed."""

    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".so"))  # the same for every Python

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # One folder for every way to build, editable and isolated ones too: nothing is compiled twice.
        build = Path(os.environ.get("FASTLM_BUILD") or ROOT / "build" / "ninja").resolve()
        build.mkdir(parents=True, exist_ok=True)
        script = self.ninja_script(output)
        path = build / "build.ninja"
        if not path.exists() or path.read_text() != script:
            path.write_text(script)
        command = [find_ninja(), "-C", str(build)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("fastlm: the build failed; the compiler's message stands above.") from None

    def ninja_script(self, output):
        torch = find_torch()
        root = Path(torch.__file__).parent
        compiler = find_compiler()
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
        isas = chosen_isas()
        facts = {
            "FASTLM_COMPILER": '"' + version.stdout.partition("\n")[0].replace('"', "") + '"',
            "FASTLM_TORCH_VERSION": f'"{torch.__version__}"',
            "FASTLM_FOR_EACH_ISA(X)": " ".join(f"X({name})" for name in isas),
            "TORCH_TARGET_VERSION": "0x020a000000000000",
        }
        flags = [
            "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
            "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
            "-Wno-unknown-pragmas", "-DNDEBUG", *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]  # fmt: skip
        link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *shlex.split(os.environ.get("LDFLAGS", ""))]
        includes = [
            f"-I{CSRC}",
            f"-isystem{root / 'include'}",
        ]
        bindings = [f"-D{key}={value}" for key, value in facts.items()]

        def quote(words):
            return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")

        lines = [
            "ninja_required_version = 1.3",
            f"cxx = {quote(compiler)}",
            f"flags = {quote(flags)}",
            f"torch = {quote(includes + bindings)}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  description = link $out",
            f"  command = $cxx -shared $in -o $out {quote(link)}",
        ]
        objects = []

        def compile(source, name, extra):
            objects.append(f"{name}.o")
            path = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            lines.extend([f"build {name}.o: compile {path}", f"  extra = {extra}"])

        for isa, isa_flags in isas.items():
            for family in FAMILIES:
                defines = quote([f"-DFASTLM_ISA={isa}", f'-DFASTLM_FAMILY="{family}.h"'])
                compile(CSRC / "cpu/isa.cpp", f"{family}_{isa}", f"{isa_flags} {defines}")
        for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]):
            if source.name != "isa.cpp":
                compile(source, source.stem if source.parent == CSRC else f"cpu_{source.stem}", "$torch")
        target = str(output).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines.extend([f"build {target}: link {' '.join(objects)}", f"default {target}", ""])
        return "\n".join(lines)


class Wheel(bdist_wheel):
    """The library calls torch and C alone: a wheel fits every Python of its platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastlm.libfastlm", sources=[])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
