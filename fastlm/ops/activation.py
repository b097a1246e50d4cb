"""GELU: autograd, and which calls are ours.

    fastlm::gelu(input, tanh) -> y                      y = x Phi(x), or with tanh for Phi; any strides
    fastlm::gelu_backward(dout, input, tanh) -> dinput

Both of input's dtype, not float64, and contiguous. Small calls are torch's, which answer before an operator has
reached its kernel.
"""

import torch
from torch import Tensor

from fastlm import (
    _C,  # noqa: F401 - has the operators
    ops,
)

original = torch._C._nn.gelu  # F.gelu, whatever is installed over that name

_SMALL = 1 << 14  # elements
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_forward, _backward = torch.ops.fastlm.gelu.default, torch.ops.fastlm.gelu_backward.default


@torch.library.register_fake("fastlm::gelu")
def _(input, tanh):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastlm::gelu_backward")
def _(dout, input, tanh):
    return torch.empty_like(input, memory_format=torch.contiguous_format)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, tanh):
        ctx.save_for_backward(input)
        ctx.tanh = tanh
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(input, tanh)

    @staticmethod
    def backward(ctx, dy):
        (input,) = ctx.saved_tensors
        if ops.is_recorded(dy):
            return torch.ops.aten.gelu_backward(dy, input, approximate="tanh" if ctx.tanh else "none"), None
        return _backward(dy, input, ctx.tanh), None


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """With autograd."""
    if (
        torch.compiler.is_compiling()
        or not ops.are_plain((input,))
        or input.dtype not in _DTYPES
        or input.numel() < _SMALL
        or not input.is_contiguous()
        or approximate not in ("none", "tanh")
    ):
        return original(input, approximate=approximate)
    tanh = approximate == "tanh"
    if ops.requires_grad(input):
        return _Gelu.apply(input, tanh)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(input, tanh)
