"""The CUDA kernels as a backend: libfastlm_cuda.so, where this build of fastlm has it.

It is loaded where torch has CUDA, which registers its operators for CUDA tensors, and needs neither a
GPU nor a driver for that. `missing` says what is lacking to run them.
"""

import ctypes
import functools
from pathlib import Path

import torch

NAMESPACE = "fastlm"
LARGEST_HEAD = 256
NO_FLOAT64 = ("scaled_dot_product_attention", "varlen_attn", "gru", "gru_cell")

_path = Path(__file__).with_name("libfastlm_cuda.so")
_library: ctypes.CDLL | None = None
_problem: str | None = None  # why it could not be loaded
if torch.version.cuda and _path.exists():
    try:
        torch.ops.load_library(_path)
        _library = ctypes.CDLL(str(_path))
        _library.fastlm_cuda_archs.restype = ctypes.c_char_p
    except OSError as error:  # the other families serve
        _problem = str(error)


def archs() -> list[int]:
    """Compute capabilities that the kernels were built for, as 90 for 9.0."""
    return [int(arch) for arch in _library.fastlm_cuda_archs().decode().split(";")]


def serves(capability: tuple[int, int]) -> bool:
    """Whether there is code for GPUs of this capability: an older one's of the same generation runs, and
    what is newer than all compiles the newest anew, but for that of sm_75."""
    major, minor = capability
    newest = max(archs())
    return any(a // 10 == major and a % 10 <= minor for a in archs()) or 10 * major + minor > newest >= 80


def driver_version() -> int:
    """CUDA's version, as 13000, that the driver here serves; 0 without a driver. Asked of the driver itself:
    the runtime's question initialises CUDA, which a process that forks later must not have done."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def unusable() -> str | None:
    """Why the kernels can't run whatever the GPU, or None. Starts nothing on a GPU: a program may fork
    after importing fastlm."""
    if not _path.exists():
        return "this build of fastlm has no CUDA kernels"
    if not torch.version.cuda:
        return "torch here is built without CUDA"
    if _library is None:
        return f"{_path.name} can't be loaded: {_problem}"
    built, served = _library.fastlm_cuda_version(), driver_version()
    if not served:
        return "no NVIDIA driver here"
    if served // 1000 < built // 1000:
        return f"the driver here serves CUDA {_version(served)}, the kernels were built with CUDA {_version(built)}"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def missing() -> str | None:
    reason = unusable()
    if reason is None and not torch.cuda.is_available():
        reason = "no GPU here"
    if reason is None:
        here = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        if not any(map(serves, here)):
            names = ", ".join(f"sm_{arch}" for arch in archs())
            reason = f"the kernels are for {names}, the GPU here is sm_{here[0][0]}{here[0][1]}"
    return reason


def note() -> str:
    names = ", ".join(f"sm_{arch}" for arch in archs())
    return f"CUDA {_version(_library.fastlm_cuda_version())} kernels for {names}, on {torch.cuda.get_device_name()}"


def devices() -> tuple[str, ...]:
    return ("cuda",)


@functools.cache
def _no_code(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if serves((major, minor)) else f"no kernel for sm_{major}{minor}, which this build is not for"


def refuses(function: str, tensor: torch.Tensor) -> str | None:
    # Not while a program is traced: what CUDA says of the GPU is no part of it.
    if tensor.is_cuda and not torch.compiler.is_compiling() and (reason := _no_code(tensor.get_device())):
        return reason
    if function in NO_FLOAT64 and tensor.dtype == torch.float64:
        return "no kernel for torch.float64: its products have no tensor cores to run on"
    if function in ("scaled_dot_product_attention", "varlen_attn") and tensor.size(-1) > LARGEST_HEAD:
        return f"no kernel for head size {tensor.size(-1)}, CUDA's have at most {LARGEST_HEAD}"
    return None
