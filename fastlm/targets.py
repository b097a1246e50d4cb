"""GPUs that kernels are compiled for, here or not, and what became of the kernels there: registers, spills,
shared memory, how many blocks fit on one multiprocessor, tensor-core instructions, 16-byte loads.

NVIDIA's binaries are read by cuobjdump and nvdisasm, of the CUDA toolkit or of the Triton package.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What a kernel is compiled for. kind: "cuda", "hip" or "interpreter"; arch: 90, "gfx942"."""

    kind: str
    arch: int | str = 0
    warp_size: int = 32
    shared_memory: int = 0  # bytes that one block may use
    warps: int = 64  # that one multiprocessor holds
    blocks: int = 32  # the same

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.kind == "cuda" else str(self.arch or self.kind)


# Those that the tests compile for; a device's own is asked of its driver.
TARGETS = {
    target.name: target
    for target in (
        Target("cuda", 75, 32, 64 << 10, warps=32, blocks=16),
        Target("cuda", 80, 32, 163 << 10),
        Target("cuda", 86, 32, 99 << 10, warps=48, blocks=16),
        Target("cuda", 90, 32, 227 << 10),
        Target("cuda", 100, 32, 227 << 10),
        Target("cuda", 120, 32, 99 << 10, warps=48, blocks=24),
        Target("hip", "gfx942", 64, 64 << 10),
    )
}


def occupancy(target: Target, registers: int, warps: int, shared: int) -> float:
    """Share of the warps that a multiprocessor can hold, for blocks of so many warps."""
    granted = -(-max(registers, 1) // 8) * 8
    if target.kind == "hip":  # 4 SIMDs of up to 8 waves and 512 registers a lane; 64 KiB for all
        waves = min(8, 512 // granted) * 4 // warps * warps
        return min(waves, (64 << 10) // max(shared, 1) * warps) / 32
    # 64 Ki registers; from sm_80 on each block takes 1 KiB of shared memory for the system.
    system = 1024 if target.arch >= 80 else 0
    blocks = min(target.warps // warps, target.blocks, (64 << 10) // (granted * 32 * warps))
    if shared:
        blocks = min(blocks, (target.shared_memory + system) // (shared + system))
    return blocks * warps / target.warps


class Unavailable(Exception):
    """Kernels can't be compiled here, or their binaries not be read."""


class Row(NamedTuple):
    """registers: of a thread. spills: bytes of local memory of a thread, or registers on AMD. shared:
    bytes of a block. occupancy: share of the warps that a multiprocessor can hold. tensor, wide:
    instructions of tensor cores, and loads of 16 bytes from global memory. matrix, memory: whether there
    must be some."""

    sample: str
    target: str
    kernel: str
    config: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    tensor: int
    wide: int = 0
    matrix: bool = False
    memory: bool = False

    def problems(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"spills {self.spills}")
        if self.shared > TARGETS[self.target].shared_memory:
            found.append(f"shared memory {self.shared} > {TARGETS[self.target].shared_memory}")
        if self.matrix and not self.tensor:
            found.append("no tensor-core instruction")
        if self.memory and not self.wide:
            found.append("no 16-byte load")
        return found


LAYOUT = "{:<7} {:<26} {:<44} {:>9} {:>6} {:>7} {:>9} {:>6} {:>5}  {}"
HEAD = LAYOUT.format(
    "target", "kernel", "configuration", "registers", "spills", "shared", "occupancy", "tensor", "wide", "sample"
)  # fmt: skip


def line(row: Row) -> str:
    return LAYOUT.format(
        row.target, row.kernel, row.config, row.registers, row.spills, row.shared, f"{row.occupancy:.0%}",
        row.tensor, row.wide, row.sample,
    ).rstrip()  # fmt: skip


# ---- reading NVIDIA's binaries -------------------------------------------------------------


class Code(NamedTuple):
    """A kernel in a binary: its target, its mangled name, and of Row's."""

    target: str
    name: str
    registers: int
    spills: int
    tensor: int
    wide: int


@functools.cache
def _tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm."""
    folders = [Path(home) / "bin"] if (home := os.environ.get("CUDA_HOME")) else []
    if found := shutil.which("cuobjdump"):
        folders.append(Path(found).parent)
    if spec := importlib.util.find_spec("triton"):  # found, not imported
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((f for f in folders if all((f / name).is_file() for name in ("cuobjdump", "nvdisasm"))), None)


def unreadable() -> str | None:
    """Why binaries can't be read here, or None."""
    return None if _tools() else "no cuobjdump with nvdisasm (CUDA's toolkit or Triton has them)"


def _lines(option: str, path: Path) -> Iterator[str]:
    """Of cuobjdump, as they come: the machine code of a library is many."""
    environment = os.environ | {"PATH": f"{_tools()}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [_tools() / "cuobjdump", option, path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # it warns of what it can read
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


# mma, wgmma and tcgen05 are HMMA (DMMA), HGMMA and UTCHMMA in machine code.
_TENSOR = re.compile(r"\b(?:HMMA|DMMA|HGMMA|UTC[A-Z]*MMA)\b")
_WIDE = re.compile(r"\b(?:LDG|LD)\.E\.[\w.]*128\b|\bLDGSTS\.E\.[\w.]*128\b")


def read(path: Path) -> list[Code]:
    """The kernels in a cubin, a fatbin, an object or a library."""
    counts: dict[tuple[str, str], list[int]] = {}
    key = target = None
    for text in _lines("-sass", path):
        if found := re.search(r"code for (sm_\d+)", text):
            target = found.group(1)
        elif found := re.search(r"Function : (\S+)", text):
            key = target, found.group(1)
            counts[key] = [0, 0]
        elif key and "MMA" in text:
            counts[key][0] += _TENSOR.search(text) is not None
        elif key and "128" in text:
            counts[key][1] += _WIDE.search(text) is not None
    usage: dict[tuple[str, str], dict[str, int]] = {}
    targets = {target for target, _ in counts}
    target = targets.pop() if len(targets) == 1 else None  # a cubin's is not said again
    for text in _lines("-res-usage", path):
        if found := re.search(r"^arch = (sm_\d+)", text):
            target = found.group(1)
        elif found := re.search(r"Function (\S+):", text):
            key = target, found.group(1)
        elif "REG:" in text:
            usage[key] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
    return [
        Code(*key, usage[key]["REG"], usage[key]["STACK"] + usage[key]["LOCAL"], *count)
        for key, count in counts.items()
    ]


def demangled(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
