"""Launching kernels: targets, configurations, their choice, and compilation ahead of time.

A kernel is a jitted function beside a function that lists its configurations for a target, the best
guess first. The first call of a kernel for new constants, dtypes or sizes (rounded up to powers of two)
times the list, and keeps the choice (see fastlm/tuned.py).
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from fastlm import tuned
from fastlm.targets import TARGETS, Target

HIP = torch.version.hip is not None


# Triton's own of these take 3 us a call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0


# ---- targets -------------------------------------------------------------------------------


INTERPRETER = Target("interpreter")


@functools.cache
def target_of(device: torch.device) -> Target:
    if knobs.runtime.interpret:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.warp_size, 64 << 10)
    arch = 10 * properties.major + properties.minor
    return Target("cuda", arch, 32, properties.shared_memory_per_block_optin)


def dot_precision(dtype: torch.dtype, target: Target) -> str:
    """input_precision of tl.dot: what torch.backends.cuda.matmul.allow_tf32 or
    torch.set_float32_matmul_precision say for float32; of no meaning for other dtypes."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and target.kind == "cuda" else "ieee"


# ---- configurations ------------------------------------------------------------------------


class Config(NamedTuple):
    """blocks: the kernel's constants that are free to choose."""

    blocks: dict[str, int]
    warps: int = 4
    stages: int = 2

    def smaller(self) -> "Config | None":
        """That takes less shared memory; None where nothing is left to take away."""
        if self.stages > 1:
            return self._replace(stages=self.stages - 1)
        name = max(self.blocks, key=self.blocks.get, default=None)
        if name is None or self.blocks[name] <= 16:  # the least that tensor cores take
            return None
        return self._replace(blocks=self.blocks | {name: self.blocks[name] // 2})

    def __str__(self):
        sizes = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{sizes} warps={self.warps} stages={self.stages}".strip()


class Compiled(NamedTuple):
    """One kernel in one configuration, compiled ahead of time."""

    kernel: "Kernel"
    constants: dict
    config: Config
    binary: object  # triton's CompiledKernel


class Ready(NamedTuple):
    """What a kernel's calls of one form launch."""

    config: Config
    binary: object  # triton's CompiledKernel; None in the interpreter
    values: tuple  # of the constants, in the order of the kernel's parameters


def form_of(x):
    """All that triton.jit makes of an argument in a binary: of an integer whether it is 1 or a multiple of 16 and
    whether it has 32 bits, of a tensor its dtype and whether it starts at a multiple of 16 bytes."""
    if type(x) is int:
        divisor = 1 if x == 1 else 0 if x & 15 else 16
        return divisor if -(1 << 31) <= x < 1 << 31 else (divisor, x < 1 << 63)
    if isinstance(x, Tensor):
        # On AMD's GPUs also whether 32 bits hold all offsets.
        return x.dtype, x.data_ptr() & 15 == 0, HIP and x.untyped_storage().nbytes() < 1 << 31
    return type(x) if type(x) is float else x


class Kernel:
    """A kernel with its configurations.

    Args:
        function: of ``triton.jit``.
        configs: (target, dtype, **constants) -> list of Config, the best guess first. dtype is that of
            the first argument.
        matrix: whether it multiplies matrices: its 16-bit binaries must then use tensor cores.
        restore: names of arguments that the kernel both reads and writes, which tuning puts back.

    A call takes the grid (a function of the blocks), the arguments by position, and by keyword the
    constants, and `sizes`: the numbers that the choice of a configuration depends on. The binary of a call is
    kept by all that it depends on: for sixty arguments triton.jit takes several times as long to find it.
    """

    def __init__(
        self,
        function,
        configs: Callable[..., list[Config]],
        matrix: bool = True,
        restore: Sequence[str] = (),
    ):
        self.function = function
        self.configs = configs
        self.matrix = matrix
        self.name = function.fn.__name__.strip("_")
        names = [name for name in function.arg_names]
        self.restore = [names.index(name) for name in restore]
        self._chosen: dict[tuple, Config] = {}
        self._ready: dict[tuple, Ready] = {}

    def __call__(self, grid: Callable[[dict], tuple], *args, sizes: Sequence[int] = (), **constants) -> None:
        first = next(x for x in args if isinstance(x, Tensor))
        if _ahead is not None:
            return _ahead.compile(self, first.dtype, args, constants)
        device = first.device
        form = (
            device,
            *[form_of(x) for x in args],
            *constants.values(),
            *[(size - 1).bit_length() for size in sizes],
        )
        ready = self._ready.get(form)
        if ready is not None and (device.type == "cpu" or device.index == torch.cuda.current_device()):
            return self._run(ready, grid, args, constants)
        with _on(device):
            if ready is None:
                ready = self._ready[form] = self._prepare(device, grid, args, sizes, constants)
            return self._run(ready, grid, args, constants)

    def _prepare(self, device, grid, args, sizes, constants) -> Ready:
        dtypes = [x.dtype for x in args if isinstance(x, Tensor)]
        key = (device, *dtypes, *constants.values(), *map(next_power_of_2, sizes))
        config = self._chosen.get(key)
        if config is None:
            config = self._chosen[key] = self._choose(key, grid, args, constants, dtypes[0])
        if knobs.runtime.interpret:
            return Ready(config, None, ())
        values = constants | config.blocks
        return Ready(
            config,
            self.compiled(args, constants, config),
            tuple(values[name] for name in self.function.arg_names[len(args) :]),
        )

    def _run(self, ready: Ready, grid, args, constants) -> None:
        config, binary, values = ready
        shape = grid(config.blocks)
        if 0 in shape:
            return
        if binary is None:
            self.launch(shape, args, constants, config)
        else:
            binary[(*shape, 1, 1)[:3]](*args, *values)

    def launch(self, shape, args, constants, config):
        self.function[shape](*args, **constants, **self._options(config))

    def compiled(self, args, constants, config):
        return self.function.warmup(*args, grid=(1,), **constants, **self._options(config))

    @staticmethod
    def _options(config):
        # Fused multiply-adds are asked for by name: Triton 3.10 changes the default.
        return config.blocks | {
            "num_warps": config.warps,
            "num_stages": config.stages,
            "enable_fp_fusion": True,
        }

    def _choose(self, key, grid, args, constants, dtype) -> Config:
        target = target_of(key[0])
        configs = self.configs(target, dtype, **constants)
        if target.kind == "interpreter":
            return configs[0]
        if len(configs) > 1 and tuned.wanted() and not torch.cuda.is_current_stream_capturing():
            by_name = {str(c): c for c in configs}
            # Another source of the kernel or another compiler may have another best configuration.
            version = f"{triton.__version__}-{self.function.cache_key[:16]}"
            chosen = tuned.choice(
                f"{self.name}-{target.name}-{torch.cuda.get_device_name(key[0])}-{version}",
                " ".join(map(str, key[1:])),
                by_name,
                lambda: min(
                    by_name, key=lambda c: self._time(grid(by_name[c].blocks), args, constants, by_name[c])
                ),
            )
            config = by_name[chosen]
        else:
            config = next((c for c in configs if self._fits(args, constants, c, target)), configs[-1])
        # The lists are for GPUs of 164 KiB and more a block, and AMD's; others have as little as 64.
        while not self._fits(args, constants, config, target) and (smaller := config.smaller()):
            config = smaller
        return config

    def _fits(self, args, constants, config, target) -> bool:
        return self.compiled(args, constants, config).metadata.shared <= target.shared_memory

    def _time(self, shape, args, constants, config) -> float:
        """Milliseconds of the fastest of some launches; infinite where the device can't run it."""
        if 0 in shape:
            return 0.0
        args = list(args)
        for i in self.restore:  # with the strides that the kernel is told
            args[i] = args[i].new_empty_strided(args[i].shape, args[i].stride()).copy_(args[i])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        try:
            for _ in range(6):  # the first compiles
                begin.record()
                self.launch(shape, args, constants, config)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        except OutOfResources:
            return float("inf")
        return min(times[1:])


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---- ahead of time -------------------------------------------------------------------------


class _Driver:
    """Stands in for a GPU's driver: enough of it to compile for `target`, nothing to run."""

    def __init__(self, target: Target):
        self._target = GPUTarget(target.kind, target.arch, target.warp_size)
        self._device = target.name
        self.utils = self

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": TARGETS[self._device].shared_memory}


class _Ahead:
    def __init__(self, target: Target):
        self.target = target
        self.compiled: list[Compiled] = []
        self._seen = set()

    def compile(self, kernel: Kernel, dtype: torch.dtype, args, constants) -> None:
        for config in kernel.configs(self.target, dtype, **constants):
            binary = kernel.compiled(args, constants, config)
            if binary.hash not in self._seen:
                self._seen.add(binary.hash)
                self.compiled.append(Compiled(kernel, constants, config, binary))


_ahead: _Ahead | None = None


@contextlib.contextmanager
def ahead_of_time(target: Target):
    """Inside, calls of operators on meta tensors launch nothing: each kernel that they would launch is
    compiled for `target`, with the very specialisation of that launch, in all of its configurations.
    Yields the growing list of Compiled."""
    global _ahead
    if knobs.runtime.interpret:
        raise RuntimeError("fastlm: no compilation in Triton's interpreter; unset TRITON_INTERPRET")
    _ahead = _Ahead(target)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(target))
    try:
        yield _ahead.compiled
    finally:
        triton.runtime.driver._active = before
        _ahead = None


def current_target(device: torch.device) -> Target:
    """Of the device, or that of the compilation ahead of time at work."""
    return target_of(device) if _ahead is None else _ahead.target
