"""The CUDA kernels' own source on the CPU: importing this adds the backend "cuda-host".

    import tests.simt
    with fastlm.use_backend("cuda-host"):
        fastlm.gru(...)  # on CPU tensors, by csrc/cuda

The kernels are compiled by the C++ compiler against a model of a CUDA device (simt.h), which rejects what
a GPU leaves undefined, and counts bank conflicts and sectors. FASTLM_SIMT_SEED chooses the order in which
threads run; FASTLM_SIMT_LIBRARY names another build of the library, as the sanitizers' tests do.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastlm import cuda, ops
from tests.simt.build import build, library


@functools.cache
def _library() -> ctypes.CDLL:
    """Built and loaded when it is first needed, which registers the operators."""
    path = os.environ.get("FASTLM_SIMT_LIBRARY") or build("plain", library())
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    loaded.simt_counts.restype = ctypes.c_char_p
    loaded.simt_seed.argtypes = (ctypes.c_uint64,)
    loaded.simt_count.argtypes = (ctypes.c_bool,)
    gpu = (ctypes.c_int, ctypes.c_size_t, ctypes.c_bool, ctypes.c_bool)
    loaded.simt_gpu.argtypes = loaded.simt_list.argtypes = gpu
    loaded.simt_listed.restype = loaded.simt_ran.restype = ctypes.c_char_p
    ops.add_operators("cuda-host")
    return loaded


def seed(value: int) -> None:
    """Chooses the order of threads from now on."""
    _library().simt_seed(value)


class Count(NamedTuple):
    """What the accesses of a warp at one line of the source came to, over all launches of a kernel."""

    kernel: str
    file: str
    line: int
    memory: str  # "shared" or "global"
    requests: int
    conflicts: int  # turns of a bank beyond those that the access takes anyway
    sectors: int  # of 32 bytes
    fewest_sectors: int


@contextlib.contextmanager
def counting() -> Iterator[list[Count]]:
    """Gives a list that holds, after the block, the counts of the launches in it."""
    counts: list[Count] = []
    _library().simt_forget_counts()
    _library().simt_count(True)
    try:
        yield counts
    finally:
        _library().simt_count(False)
        for line in _library().simt_counts().decode().splitlines():
            kernel, file, at, memory, *numbers = line.split("\t")
            counts.append(Count(kernel, Path(file).name, int(at), memory, *map(int, numbers)))


@contextlib.contextmanager
def gpu(
    multiprocessors: int = 4, shared_bytes: int = 99 << 10, tf32: bool = False, warpgroups: bool = False
) -> Iterator[None]:
    """Kernels are launched as on a GPU of so many multiprocessors, of whose shared memory a block may use so
    much; tf32: that multiplies float32 so; warpgroups: that has their products, as sm_90."""
    _library().simt_gpu(multiprocessors, shared_bytes, tf32, warpgroups)
    try:
        yield
    finally:
        _library().simt_gpu(0, 0, False, False)


class Launch(NamedTuple):
    """What a launcher asked for."""

    kernel: str  # mangled
    threads: int  # of a block
    shared: int  # bytes of a block


@contextlib.contextmanager
def listing(
    multiprocessors: int, shared_bytes: int, tf32: bool = False, warpgroups: bool = False
) -> Iterator[set[Launch]]:
    """Gives a set that holds, after the block, the launches in it: on a GPU as of `gpu`. No kernel runs, so results are what memory held."""
    launches: set[Launch] = set()
    _library().simt_list(multiprocessors, shared_bytes, tf32, warpgroups)
    try:
        yield launches
    finally:
        for line in _library().simt_listed().decode().splitlines():
            kernel, threads, shared = line.split("\t")
            launches.add(Launch(kernel, int(threads), int(shared)))


def ran() -> set[str]:
    """The kernels that have run in this process, mangled."""
    return set(_library().simt_ran().decode().splitlines())


# ---- as a backend, see fastlm.ops ----


NAMESPACE = "fastlm_cuda_host"
refuses = cuda.refuses


def missing() -> str | None:
    _library()
    return None


def note() -> str:
    return "CUDA kernels in a model of a GPU, for tests"


def devices() -> tuple[str, ...]:
    return ("cpu",)


ops.FAMILIES["cuda-host"] = sys.modules[__name__]
