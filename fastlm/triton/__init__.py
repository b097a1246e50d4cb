"""The Triton kernels: every operator on NVIDIA and AMD GPUs, and on a CPU in Triton's interpreter.

Nothing outside of this package imports triton, and neither does this file: a kernel's module is
imported at its operator's first call. Each module has, for each operator named below, a function of
that name with the arguments and results of the schema in csrc/ops.cpp; it is fastlm_triton::<name>.

The interpreter (TRITON_INTERPRET=1, read when triton is first imported) runs the same source on
CPU tensors, slowly: it is for tests and for reading along.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import torch
from torch.library import Library

from fastlm import _C  # noqa: F401 - has the schemas

# Operator -> the module of this package that has it.
MODULES: dict[str, str] = {
    "attention_forward": "attention_forward",
    "attention_backward": "attention_backward",
    "varlen_attention_forward": "attention_forward",
    "varlen_attention_backward": "attention_backward",
    "cross_entropy": "cross_entropy",
    "cross_entropy_backward": "cross_entropy",
    "scale_": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_cross_entropy_backward": "linear_cross_entropy",
    "gru_layer": "gru",
    "gru_layer_backward": "gru",
}

NAMESPACE = "fastlm_triton"
LARGEST_HEAD = 512
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing() -> str | None:
    if not installed():
        return "Triton is not installed (pip install triton)"
    if not INTERPRETING and not torch.cuda.is_available():
        return "no GPU here, and Triton's interpreter is not asked for (TRITON_INTERPRET=1)"
    return None


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if INTERPRETING else ("cuda",)


def note() -> str:
    version = importlib.metadata.version("triton")
    return f"Triton {version}" + (", interpreted on the CPU" if INTERPRETING else "")


def refuses(function: str, tensor: torch.Tensor) -> str | None:
    if function in ("scaled_dot_product_attention", "varlen_attn"):
        if tensor.dtype == torch.float64:
            return "no kernel for torch.float64: its products have no tensor cores to run on"
        if tensor.size(-1) > LARGEST_HEAD:
            return f"no kernel for head size {tensor.size(-1)}, Triton's have at most {LARGEST_HEAD}"
    return None


@functools.cache
def kernel(operator: str) -> Callable:
    return getattr(importlib.import_module(f"fastlm.triton.{MODULES[operator]}"), operator)


def _operators() -> Library:
    """Of the schemas of fastlm::*, for the tensors of any device; they exist while the result lives."""
    library = Library(NAMESPACE, "DEF")

    def implementation(operator, *args):
        return kernel(operator)(*args)

    for operator in MODULES:
        schema = str(getattr(torch.ops.fastlm, operator).default._schema)
        library.define(schema.removeprefix("fastlm::"))
        for device in ("CPU", "CUDA"):
            library.impl(operator, functools.partial(implementation, operator), device)
    return library


_library = _operators()
