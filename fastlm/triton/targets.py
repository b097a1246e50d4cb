"""Every kernel in every configuration, compiled for GPUs that are not here: what `fastlm info --kernels`
prints and the tests judge.

Samples are calls of operators on meta tensors; what they would launch is compiled instead (see
launch.ahead_of_time), and the binary is read.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fastlm.targets import TARGETS, Row, Target, occupancy, read
from fastlm.triton import kernel
from fastlm.triton.launch import Compiled, ahead_of_time

COMPILED_FOR = ("sm_80", "sm_90", "sm_100", "gfx942")

# ---- samples -------------------------------------------------------------------------------


def _attention(
    B=2, H=(4, 4), T=(1024, 1024), D=64, dtype=torch.bfloat16, backward=True, mask=False, slopes=False,
    sinks=False, dropout_p=0.0, is_causal=False, window=(-1, -1), softcap=0.0,
):  # fmt: skip
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def sample():
        q, k = empty(B, H[0], T[0], D), empty(B, H[1], T[1], D)
        options = (
            empty(1, H[0], *T) if mask else None, empty(B, H[0], dtype=torch.float32) if slopes else None,
            empty(H[0], dtype=torch.float32) if sinks else None, torch.tensor(1 << 40), dropout_p, *window,
            softcap,
        )  # fmt: skip
        out, lse = kernel("attention_forward")(q, k, k, is_causal, 0.125, *options)
        if backward:
            kernel("attention_backward")(
                out, q, k, k, out, lse, is_causal, 0.125, lse, *options, mask, slopes
            )

    return sample


def _packed(H=(4, 4), D=64, dtype=torch.bfloat16, pages=False, max_q=1024, backward=True):
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def sample():
        q, at = empty(4096, H[0], D), empty(5, dtype=torch.int32)
        k = empty(256, 64, H[1], D) if pages else empty(4096, H[1], D)
        used, table = empty(4, dtype=torch.int32), empty(4, 64, dtype=torch.int32)
        keys = (None, used, table) if pages else (at, None, None)
        out, lse = kernel("varlen_attention_forward")(q, k, k, at, *keys, max_q, 1024, -1, 0, 0.125, 0)
        if backward:
            kernel("varlen_attention_backward")(
                out, lse, q, k, k, out, lse, at, at, max_q, 1024, -1, 0, 0.125
            )

    return sample


def _cross_entropy(dtype=torch.bfloat16, options=(0.0, 0.0, 0.0), weight=False, D=None, C=50304):
    """Of logits, or with D linear; with the gradients in the forward."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def sample():
        target, weights = empty(4096, dtype=torch.int64), empty(C, dtype=torch.float32) if weight else None
        if D is None:
            call = kernel("cross_entropy")
            call(empty(4096, C), target, weights, 1, -100, *options, False, False, True)
        else:
            call, bias = kernel("linear_cross_entropy"), empty(C) if weight else None
            wanted = (True, True, weight)
            call(empty(4096, D), empty(C, D), target, bias, weights, 1, -100, *options, False, *wanted)

    return sample


def _gru(dtype=torch.bfloat16, H=512, layer_norm=False, zoneout=0.0):
    def empty(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def sample():
        x, h = empty(32, 64, 256), empty(1, 64, H)
        weights = [empty(3 * H, 256), empty(3 * H, H), *[empty(3 * H)] * (4 if layer_norm else 2)]
        arguments = (x, None, h, weights, True, layer_norm, None, zoneout)
        out, _, *kept = kernel("gru_layer")(*arguments, True)
        kernel("gru_layer_backward")(out, None, *arguments, out, *kept, True, True)

    return sample


# The common cases, and what fills the registers.
SAMPLES = {
    "attention 64": _attention(is_causal=True),
    "attention 128 gqa": _attention(H=(8, 2), D=128, is_causal=True),
    "attention 256": _attention(D=256),
    "attention 64 float32": _attention(dtype=torch.float32, is_causal=True),
    "attention biases": _attention(
        H=(8, 2), mask=True, slopes=True, sinks=True, window=(300, 0), softcap=30.0
    ),
    "attention dropout": _attention(dropout_p=0.1, is_causal=True),
    "attention decode": _attention(H=(32, 8), T=(1, 4096), D=128, backward=False),
    "attention packed": _packed(D=128),
    "attention paged": _packed(H=(32, 8), D=128, pages=True, max_q=1, backward=False),
    "cross-entropy": _cross_entropy(),
    "cross-entropy options": _cross_entropy(options=(0.1, 1e-4, 30.0), weight=True),
    "linear cross-entropy": _cross_entropy(D=1024),
    "linear cross-entropy options": _cross_entropy(options=(0.1, 1e-4, 30.0), weight=True, D=1024),
    "linear cross-entropy float32": _cross_entropy(torch.float32, D=1024),
    "gru": _gru(),
    "gru layer norm": _gru(layer_norm=True, zoneout=0.1),
    "gru float32": _gru(torch.float32),
}


# ---- reading binaries ----------------------------------------------------------------------


def _read_nvidia(binary) -> tuple[int, int, int, int]:
    """Registers, spills, tensor-core instructions and 16-byte loads."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        (code,) = read(Path(file.name))
    return code.registers, code.spills, code.tensor, code.wide


def _read_amd(binary) -> tuple[int, int, int, int]:
    text = binary.asm["amdgcn"]

    def fact(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    # Scalar registers spill into lanes of vector registers, which is not memory, and counted there.
    tensor = len(re.findall(r"\bv_mfma_", text))
    wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text))
    return fact("vgpr_count"), fact("vgpr_spill_count"), tensor, wide


def _row(sample: str, target: Target, compiled: Compiled) -> Row:
    binary, config = compiled.binary, compiled.config
    facts = _read_amd(binary) if target.kind == "hip" else _read_nvidia(binary)
    registers, spills, tensor, wide = facts
    shared = binary.metadata.shared
    return Row(
        sample, target.name, compiled.kernel.name, str(config), registers, spills, shared,
        occupancy(target, registers, binary.metadata.num_warps, shared), tensor, wide,
        compiled.kernel.matrix and compiled.constants.get("PRECISION") is not None and "float32" not in sample,
    )  # fmt: skip


def table(target: str, samples: list[str] | None = None) -> Iterator[Row]:
    """Compiles the samples (all of them unless named) for a target: a row for each binary."""
    with ahead_of_time(TARGETS[target]) as compiled:
        for name in samples or SAMPLES:
            before = len(compiled)
            SAMPLES[name]()
            for one in compiled[before:]:
                yield _row(name, TARGETS[target], one)
