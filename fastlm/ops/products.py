"""Matrix products of the libraries that torch brings along, and which of them is fastest on this CPU.

    torch    what torch.mm takes: MKL or another BLAS, oneDNN for 16 bits where the CPU multiplies these
    onednn   oneDNN's inner product. MKL has AVX-512 code for Intel's processors only.
    float32  operands of 16 bits are converted, multiplied as float32 by torch, and the result is rounded
             once; float32 operands under autocast are taken as they are. Where the CPU has no products of
             16 bits, torch's take up to 80 times as long (Zen 3, see benchmarks/NOTES.md).
    fastlm   csrc/cpu/few_tokens.h, for a few tokens, where reading the weights takes the time

The three products of a linear layer are timed at their first use for a class of shapes. FASTLM_LINEAR names
one of the libraries' for all calls instead.
"""

import contextlib
import functools
import itertools
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm import (
    _C,  # noqa: F401 - has the operator
    tuned,
)
from fastlm.ops.memory import LARGE, cast, new_empty

FORWARD, INPUT, WEIGHT = "forward", "input gradient", "weight gradient"
WAYS = ("torch", "onednn", "float32")  # of the libraries
FEW = 7  # tokens, up to which the operator is asked
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

without_autocast = torch._C._DisableAutocast
few_tokens = torch.ops.fastlm.linear.default
below_autograd = torch._C._AutoDispatchBelowAutograd
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

forced = os.environ.get("FASTLM_LINEAR") or None
if forced not in (None, *WAYS):
    raise ValueError(f"FASTLM_LINEAR is {forced!r}, expected one of {', '.join(WAYS)}")


# ---- products ------------------------------------------------------------------------------


# (a (m, k), b (k, n), bias (n) or None, dtype) -> (m, n); the result has the dtype, and the operands are
# rounded to it first, but for float32's. Without autograd: torch's and float32's products are written to memory of
# ours, which is kept for the next result (csrc/kept_memory.h), oneDNN's where they
# are large, or `kept`.

# Rows of a result from which on oneDNN loses a quarter of its rate in 16 bits unless they are whole tiles: those of the
# gradient of a head's weight, as for the 50257 tokens of GPT-2.
_MANY, _TILE = 1 << 15, 64


def _by_torch(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    a, b = a.to(dtype), b.to(dtype)
    out = new_empty(a, (a.size(0), b.size(1)), dtype)
    if bias is not None:
        return torch.addmm(bias.to(dtype), a, b, out=out)
    rest = a.size(0) % _TILE
    if rest and a.size(0) >= _MANY and dtype.itemsize == 2:
        torch.mm(a[:-rest], b, out=out[:-rest])
        torch.mm(a[-rest:], b, out=out[-rest:])
        return out
    return torch.mm(a, b, out=out)


# Bytes of a result from which on malloc has new memory for it at every call, whose pages cost more than to copy it from
# parts that stay in the caches: GPT-2's logits of 1024 tokens in float32 take 0.88 of the time.
_MAPPED, _PART = 1 << 25, 1 << 24


def _by_onednn(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: tuple[str, str] = ("none", ""),
    kept: bool = False,
) -> Tensor:
    a, b, bias = a.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype)
    if not b.is_contiguous() and not b.t().is_contiguous():
        b = b.contiguous()

    def product(a, b, bias):
        return _onednn(a, b.t(), bias, activation[0], [], activation[1])

    (m, n), element = (a.size(0), b.size(1)), dtype.itemsize
    if not kept and m * n * element < _MAPPED:
        return product(a, b, bias)
    step = max(_TILE, _PART // min(m, n) // element // _TILE * _TILE)
    return _in_parts(product, step, new_empty(a, (m, n), dtype), a, b, bias)


def _in_parts(product: Callable, step: int, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`out`, of which so many rows or columns, whichever there are more of, are product(a, b, bias) at a time."""
    for i in range(0, max(out.shape), step):
        part = slice(i, i + step)
        if out.size(0) > out.size(1):
            out[part] = product(a[part], b, bias)
        else:
            out[:, part] = product(a, b[:, part], None if bias is None else bias[part])
    return out


_BLOCK = 1 << 24  # elements of a matrix that are float32 at once: 64 MiB


def _by_float32(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (m, k), n = a.shape, b.size(1)
    largest, longest = max(m * k, k * n, m * n), max(m, k, n)
    if largest <= _BLOCK:
        return _by_torch(a, b, bias, torch.float32).to(dtype)
    step = max(1, longest * _BLOCK // largest)
    if longest == k:
        total = a.new_zeros(m, n, dtype=torch.float32) if bias is None else bias.float().repeat(m, 1)
        for i in range(0, k, step):
            total.addmm_(a[:, i : i + step].float(), b[i : i + step].float())
        return total.to(dtype)
    a, b = (a, b.float()) if m > n else (a.float(), b)
    product = functools.partial(_by_torch, dtype=torch.float32)
    return _in_parts(product, step, a.new_empty(m, n, dtype=dtype), a, b, bias)


def _by_fastlm(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with below_autograd():
        return few_tokens(a.to(dtype), b.t(), None, None if bias is None else bias.to(dtype))


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "torch": _by_torch,
    "onednn": _by_onednn,
    "float32": _by_float32,
    "fastlm": _by_fastlm,
}


def input_gradient(way: str, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return PRODUCTS[way](dy, weight, None, dtype)


def weight_gradient(
    way: str, dy: Tensor, x: Tensor, dtype: torch.dtype, by_rows: bool, result: torch.dtype
) -> Tensor:
    """Rounded to the product's dtype, but by float32, then in the weight's dtype, `result`, and in its layout: one
    of another is copied when it is accumulated. Its memory is that of the gradient before."""
    a, b = (dy.t(), x) if by_rows else (x.t(), dy)
    dtype = result if way == "float32" else dtype
    # oneDNN's own memory would be new at each step: a gradient is held until the next.
    copied = way == "onednn" and dtype is result and a.size(0) * b.size(1) >= LARGE
    product = cast(PRODUCTS[way](a, b, None, dtype, **({"kept": True} if copied else {})), result)
    return product if by_rows else product.t()


# ---- choice --------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Layers between which the choice doesn't differ."""

    tokens: int  # bits of their number
    inputs: int
    outputs: int
    input: torch.dtype
    weight: torch.dtype
    product: torch.dtype
    by_rows: bool  # of the weight, or by columns: the layout in memory
    threads: int


_chosen: dict[tuple[str, Kind], str] = {}
_lock = threading.Lock()  # two that time at once would disturb each other


def way(product: str, kind: tuple) -> str:
    """Which one of WAYS to take for FORWARD, INPUT or WEIGHT of a Kind."""
    kind = Kind(*kind)
    if forced is not None:
        return _forced_way(kind.product)
    chosen = _chosen.get((product, kind))
    if chosen is None:
        with _lock:
            chosen = _chosen[product, kind] = _choose(product, kind)
    return chosen


def _forced_way(dtype: torch.dtype) -> str:
    if forced in _candidates(dtype):
        return forced
    if forced == "float32" and dtype is torch.float32:  # as torch's is
        return "torch"
    raise RuntimeError(f"fastlm.linear: FASTLM_LINEAR is {forced}, which multiplies no {dtype} on this CPU")


def _choose(product: str, kind: Kind) -> str:
    candidates = _candidates(kind.product)
    if product != WEIGHT and _is_few(kind) and kind.weight is kind.product:
        candidates += ("fastlm",)
    if len(candidates) == 1 or not tuned.wanted():
        return "torch"
    shape = _sample_shape(1 << kind.tokens, kind.inputs, kind.outputs)
    what = (product, "x".join(map(str, shape)), *kind[3:6], "rows" if kind.by_rows else "columns")
    return tuned.choice(
        f"linear-{_cpu()}-{torch.__version__}",
        " ".join(map(str, (*what, f"{kind.threads} threads:", *candidates))),
        candidates,
        lambda: _fastest(_samples(product, kind, shape, candidates)),
    )


@functools.cache
def _candidates(dtype: torch.dtype) -> tuple[str, ...]:
    has_onednn = _onednn is not None and torch.backends.mkldnn.is_available()
    if dtype is torch.float32:
        return ("torch", "onednn") if has_onednn else ("torch",)
    if has_onednn and dtype is torch.bfloat16:
        has_onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif has_onednn:
        has_onednn = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return WAYS if has_onednn else ("torch", "float32")


@functools.cache
def _cpu() -> str:
    """Which processor it is, and how wide the vectors are that torch uses there."""
    names = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    parts = [found[name] for name in names if name in found] or [platform.processor() or platform.machine()]
    return "-".join((*parts, torch.backends.cpu.get_cpu_capability()))


def _sample_shape(*sizes: int) -> list[int]:
    """Three quarters of the next powers of two, which as strides would be unfair to caches; halved until the
    product takes some tens of milliseconds, as the ways differ in their rates, which no longer change."""
    powers = [1 << (size - 1).bit_length() for size in sizes]
    while math.prod(powers) > 1 << 31 or max(a * b for a, b in itertools.combinations(powers, 2)) > 1 << 24:
        powers[powers.index(max(powers))] //= 2
    return [max(1, power * 3 // 4) for power in powers]


_CACHES = 1 << 27  # bytes: more than a core's share of them


def _is_few(kind: Kind) -> bool:
    return kind.tokens <= FEW.bit_length()


def _samples(product: str, kind: Kind, shape: list[int], ways: tuple[str, ...]) -> dict[str, Callable]:
    """For each way a call of the product. Of a few tokens it reads other weights each time: a model's don't
    stay in the caches from one token to the next."""
    M, K, N = shape
    x, dy = (
        torch.ones(M, K, dtype=kind.input, device="cpu"),
        torch.ones(M, N, dtype=kind.product, device="cpu"),
    )
    copies = -(-_CACHES // (N * K * kind.weight.itemsize)) if _is_few(kind) else 1
    stored = torch.ones(copies, *((N, K) if kind.by_rows else (K, N)), dtype=kind.weight, device="cpu")
    weights = itertools.cycle(stored if kind.by_rows else stored.mT)

    def call(way):
        weight = next(weights)
        if product == FORWARD:
            PRODUCTS[way](x, weight.t(), None, kind.product)
        elif product == INPUT:
            input_gradient(way, dy, weight, kind.product)
        else:
            weight_gradient(way, dy, x, kind.product, kind.by_rows, kind.weight)

    return {way: functools.partial(call, way) for way in ways}


def _fastest(calls: dict[str, Callable]) -> str:
    """torch's way, unless another takes less than 19 of 20 parts of its time: what wins by less is chance. By the
    medians of calls in turn: a step's products are disturbed as these are, and MKL's more than oneDNN's."""
    times = dict.fromkeys(calls, math.inf)
    with torch.no_grad(), without_autocast():
        for way, call in calls.items():
            with contextlib.suppress(RuntimeError):  # oneDNN's, where it has no such product after all
                times[way] = _seconds(call)
        # What took long is not asked again; what took little may have compiled something.
        rivals = [way for way in calls if times[way] < max(4 * min(times.values()), 0.05)]
        samples = {way: [] for way in rivals}
        end = time.perf_counter() + 0.2
        for i in range(50):
            if i >= 5 and time.perf_counter() > end:
                break
            for way in rivals:
                samples[way].append(_seconds(calls[way]))
    times = {way: statistics.median(taken) for way, taken in samples.items()}
    best = min(times, key=times.get)
    return best if times[best] < 0.95 * times.get("torch", math.inf) else "torch"


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
