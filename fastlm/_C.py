"""The compiled library: importing this module loads it, which registers the operators.

Gives the facts of the build and the choice of the CPU's instruction set.
"""

import ctypes
import os
from pathlib import Path

import torch

# FASTLM_LIBRARY names another build of it, as the sanitizers' tests do.
_path = Path(os.environ.get("FASTLM_LIBRARY") or Path(__file__).with_name("libfastlm.so"))
if not _path.exists():
    raise ImportError(
        f"fastlm: {_path} is missing, the compiled part of fastlm. "
        "Build it with `pip install --no-build-isolation .` in the source folder."
    )
torch.ops.load_library(_path)
_library = ctypes.CDLL(str(_path))
for _name in ("isa", "isa_name", "compiler", "torch_version"):
    getattr(_library, f"fastlm_{_name}").restype = ctypes.c_char_p
for _name in ("isa_runs_here", "set_isa"):
    getattr(_library, f"fastlm_{_name}").restype = ctypes.c_bool

_library.fastlm_multiply_adds.restype = ctypes.c_double
_library.fastlm_multiply_adds.argtypes = (ctypes.c_int64, ctypes.c_bool)

compiler: str = _library.fastlm_compiler().decode()
torch_version: str = _library.fastlm_torch_version().decode()


def built_isas() -> list[str]:
    """Instruction sets that are built in, from slow to fast."""
    names = []
    while name := _library.fastlm_isa_name(len(names)):
        names.append(name.decode())
    return names


def isas() -> list[str]:
    """Instruction sets that are built in and run on this CPU."""
    return [n for i, n in enumerate(built_isas()) if _library.fastlm_isa_runs_here(i)]


def isa() -> str:
    """The instruction set in use: the widest that runs here, or that of ``FASTLM_ISA``."""
    return _library.fastlm_isa().decode()


def set_isa(name: str) -> None:
    """Use another instruction set from now on."""
    if not _library.fastlm_set_isa(name.encode()):
        raise ValueError(f"fastlm._C.set_isa: {name!r} is not among those that run here: {', '.join(isas())}")


# ---- as a backend, see fastlm.ops ----

NAMESPACE = "fastlm"


def missing() -> str | None:
    return None


def note() -> str:
    return f"C++ kernels for {isa()}"


def devices() -> tuple[str, ...]:
    return ("cpu",)


def refuses(function: str, tensor: torch.Tensor) -> str | None:
    return None


def multiply_adds(rounds: int, *, bf16: bool = False) -> float:
    """Loads all of torch's threads with multiply-adds in registers, to measure what they reach.

    Returns the operations done, a multiply and an add being two. ``bf16`` takes the dot products of
    bfloat16 pairs, and gives 0 where the instruction set in use has none.
    """
    return _library.fastlm_multiply_adds(rounds, bf16)


if os.environ.get("FASTLM_ISA") and isa() != os.environ["FASTLM_ISA"]:
    raise ImportError(
        f"fastlm: FASTLM_ISA={os.environ['FASTLM_ISA']} is not among the instruction sets that are "
        f"built in and run on this CPU: {', '.join(isas())}"
    )
