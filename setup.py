"""Builds fastlm/libfastlm.so with ninja: one object per source, the CPU kernels once per instruction set;
and fastlm/libfastlm_cuda.so of the CUDA kernels: always with FASTLM_CUDA=1, never with FASTLM_CUDA=0, else
where nvcc is found and either a wheel is built or the torch that is here has CUDA.

Environment: CXX (compiler), CXXFLAGS and LDFLAGS (appended), MAX_JOBS, FASTLM_ISAS (comma-separated
instruction sets to build; default: all of this architecture), FASTLM_CUDA_ARCHS (GPUs to build for, as
"80;90"; default: all of CUDA_ARCHS), CUDA_HOME, FASTLM_BUILD (folder of the objects). nvcc itself reads
NVCC_CCBIN, its own C++ compiler, and NVCC_APPEND_FLAGS.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1, which is enough to build in place

    class bdist_wheel(Command):
        user_options = []

        def initialize_options(self):
            raise SystemExit("fastlm: a wheel needs setuptools 77 or later: pip install --upgrade setuptools")

        finalize_options = run = initialize_options


ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# Instruction sets by architecture, from slow to fast, with the compiler flags of each.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = (
    f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized"  # of g++ 12's own intrinsics
)
ISAS = {
    "x86_64": {
        "avx512_model": f"{AVX2} -DFASTLM_AVX512_MODEL",
        "avx512_bf16_model": f"{AVX2} -DFASTLM_AVX512_MODEL -DFASTLM_AVX512_BF16_MODEL",
        "generic": "",
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
    },
    "aarch64": {"neon": ""},
}
ON_REQUEST = {"avx512_model", "avx512_bf16_model"}  # for tests on machines without AVX-512
FAMILIES = ("activation", "attention", "cross_entropy", "gru", "linear", "linear_cross_entropy", "peak")

# Compute capabilities without their dot; the last one chosen also as PTX, for GPUs to come.
CUDA_ARCHS = ("75", "80", "86", "90", "100", "120")
TORCH_TARGET_VERSION = "0x020a000000000000"


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


def find_nvcc():
    """CUDA's compiler: in CUDA_HOME, on PATH or of the pip packages; None where there is none."""
    found = [shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        found.insert(0, Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    for packages in (sysconfig.get_paths()["purelib"], Path(find_torch().__file__).parents[1]):
        found += [*Path(packages).glob("nvidia/cu*/bin/nvcc"), Path(packages) / "nvidia/cuda_nvcc/bin/nvcc"]
    return next((Path(path) for path in found if path and Path(path).is_file()), None)


def require_nvcc():
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit(
            "fastlm's CUDA kernels need nvcc, and none was found in CUDA_HOME, on PATH or among the pip packages.\n"
            "Install NVIDIA's CUDA toolkit, or\n"
            "    pip install nvidia-cuda-nvcc\n"
        )
    return nvcc


def chosen_archs(nvcc):
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = re.findall(r"compute_(\d+)", listed.stdout)
    wanted = os.environ.get("FASTLM_CUDA_ARCHS")
    if wanted is None:
        return [arch for arch in CUDA_ARCHS if arch in known]
    archs = re.findall(r"\d+", wanted.replace(".", ""))
    if not archs or set(archs) - set(known):
        raise SystemExit(f"FASTLM_CUDA_ARCHS={wanted}: {nvcc} has {', '.join(known)}")
    return sorted(archs, key=int)


def quote(words):
    return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja(script, hint=""):
    """Writes build.ninja and runs it; ninja rebuilds what changed."""
    # One folder for every way to build, editable and isolated ones too: nothing is compiled twice.
    build = Path(os.environ.get("FASTLM_BUILD") or ROOT / "build" / "ninja").resolve()
    build.mkdir(parents=True, exist_ok=True)
    path = build / "build.ninja"
    text = "\n".join(["ninja_required_version = 1.3", *script, ""])
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    command = [find_ninja(), "-C", str(build)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError:
        raise SystemExit(f"fastlm: the build failed; the compiler's message stands above.{hint}") from None


def environment_flags(name):
    return shlex.split(os.environ.get(name, ""))


def short_paths(torch_root):
    """Flags that leave this machine's folders out of error messages."""
    return [f"-fmacro-prefix-map={folder}/=" for folder in (ROOT, torch_root / "include")]


def cpu_rules(output):
    torch = find_torch()
    root = Path(torch.__file__).parent
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    isas = chosen_isas()
    facts = {
        "FASTLM_COMPILER": '"' + version.stdout.partition("\n")[0].replace('"', "") + '"',
        "FASTLM_TORCH_VERSION": f'"{torch.__version__}"',
        "FASTLM_FOR_EACH_ISA(X)": " ".join(f"X({name})" for name in isas),
        "TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
    }
    flags = [
        "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
        "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
        "-Wno-unknown-pragmas", "-DNDEBUG", *environment_flags("CXXFLAGS"),
    ]  # fmt: skip
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *environment_flags("LDFLAGS")]
    includes = [f"-I{CSRC}", f"-isystem{root / 'include'}", *short_paths(root)]
    bindings = [f"-D{key}={value}" for key, value in facts.items()]
    lines = [
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
        lines.extend([f"build {name}.o: compile {escape(source)}", f"  extra = {extra}"])

    for isa, isa_flags in isas.items():
        for family in FAMILIES:
            defines = quote([f"-DFASTLM_ISA={isa}", f'-DFASTLM_FAMILY="{family}.h"'])
            compile(CSRC / "cpu/isa.cpp", f"{family}_{isa}", f"{isa_flags} {defines}")
    for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]):
        if source.name != "isa.cpp":
            compile(source, source.stem if source.parent == CSRC else f"cpu_{source.stem}", "$torch")
    return [*lines, f"build {escape(output)}: link {' '.join(objects)}"]


def cuda_rules(nvcc, output=None, names="*"):
    """One object per source, for all GPUs at once, and the library of them. cudart is linked in, libtorch_cuda
    is not: launchers look up torch's stream in it at run time. Without output only the GPUs' code, of some
    sources where these are named."""
    root = Path(find_torch().__file__).parent
    archs = chosen_archs(nvcc)
    sources = sorted(path for name in names.split(",") for path in CSRC.glob(f"cuda/{name}.cu"))
    sources += sorted(CSRC.glob("cuda/*.cpp")) if output else []
    real = ["90a" if arch == "90" else arch for arch in archs]  # with wgmma; every GPU of 9.0 runs it
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in real]
    if int(archs[-1]) >= 80:  # what is compiled for sm_75 has not all of what is launched on others
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count())

    def host(flags):  # nvcc hands them on; a comma would end one
        return ["-Xcompiler=" + flag.replace(",", "\\,") for flag in flags]

    flags = [
        "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f'-DFASTLM_CUDA_ARCHS="{";".join(archs)}"', f"-I{CSRC}", f"-isystem={root / 'include'}",
        *host(["-fPIC", "-fvisibility=hidden", *short_paths(root), *environment_flags("CXXFLAGS")]),
        *codes, f"--threads={max(1, min(jobs // len(sources), len(archs)))}",
    ]  # fmt: skip
    link = [
        "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10",
        f"-L{nvcc.parents[1] / 'lib'}",  # where the pip packages have cudart
        *host(environment_flags("LDFLAGS")),
    ]  # fmt: skip
    lines = [
        f"nvcc = {quote([nvcc])}",
        f"cuda_flags = {quote(flags)}",
        "rule compile_cuda",
        f"  command = $nvcc -MD -MF $out.d $cuda_flags {'-c' if output else '-fatbin'} $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link_cuda",
        f"  command = $nvcc $in -o $out {quote(link)}",
        "  description = link $out",
    ]
    objects = [f"cuda_{source.stem}.{'o' if output else 'fatbin'}" for source in sources]
    lines += [f"build {o}: compile_cuda {escape(s)}" for o, s in zip(objects, sources, strict=True)]
    return [*lines, f"build {escape(output)}: link_cuda {' '.join(objects)}"] if output else lines


class Build(build_ext):
    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".so"))  # the same for every Python

    def nvcc(self):
        """CUDA's compiler where its kernels are to be built, else None."""
        choice = os.environ.get("FASTLM_CUDA", "")
        if choice not in ("", "0", "1"):
            raise SystemExit(f"FASTLM_CUDA={choice}: expected 0 or 1")
        if choice == "1":
            return require_nvcc()
        by_default = "bdist_wheel" in self.distribution.commands or find_torch().version.cuda
        return find_nvcc() if by_default and choice != "0" else None

    def build_extensions(self):
        library, cuda_library = (Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions)
        library.parent.mkdir(parents=True, exist_ok=True)
        nvcc = self.nvcc()
        if nvcc:
            script = cpu_rules(library) + cuda_rules(nvcc, cuda_library)
            ninja(script, hint=" FASTLM_CUDA=0 leaves the CUDA kernels out.")
        else:
            if (
                not self.inplace or os.environ.get("FASTLM_CUDA") == "0"
            ):  # in place it may come from elsewhere
                cuda_library.unlink(missing_ok=True)  # of an earlier build: it would get into the wheel
            ninja(cpu_rules(library))


class CudaCode(Command):
    """Compiles the CUDA kernels for GPUs, without their launchers: to read what the compiler made of them."""

    user_options = [("sources=", None, "names of files in csrc/cuda, as gru,cross_entropy [default: all]")]

    def initialize_options(self):
        self.sources = "*"

    def finalize_options(self):
        pass

    def run(self):
        ninja(cuda_rules(require_nvcc(), names=self.sources))


class Wheel(bdist_wheel):
    """The library calls torch and C alone: a wheel fits every Python of its platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        license="MIT",
        ext_modules=[
            Extension("fastlm.libfastlm", sources=[]),
            Extension("fastlm.libfastlm_cuda", sources=[], optional=True),  # optional: not in every build
        ],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel, "cuda_code": CudaCode},
    )
