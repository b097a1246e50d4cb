"""GELU: autograd, and which calls are ours.

    fastlm::gelu(input, tanh) -> y                      y = x Phi(x), or with tanh for Phi; any strides
    fastlm::gelu_backward(dout, input, tanh) -> dinput

Both of input's dtype, not float64, and contiguous. Small calls are torch's, which answer before an operator has
reached its kernel.
"""

import torch
from torch import Tensor

from fastlm import ops

original = torch._C._nn.gelu  # F.gelu, whatever is installed over that name

_SMALL = 1 << 14  # elements
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_is_compiling, _below_autograd = torch.compiler.is_compiling, torch._C._AutoDispatchBelowAutograd
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
        with _below_autograd():
            return _forward(input, tanh)

    @staticmethod
    def backward(ctx, dy):
        (input,) = ctx.saved_tensors
        if ops.is_recorded(dy):
            return torch.ops.aten.gelu_backward(dy, input, approximate="tanh" if ctx.tanh else "none"), None
        return _backward(dy, input, ctx.tanh), None


_gelu = ops.eager_call(_Gelu)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """With autograd. Cheap questions come first: a small call is asked little."""
    if _is_compiling() or type(input) not in ops.PLAIN or input.dtype not in _DTYPES:
        return original(input, approximate=approximate)
    elements = input.numel()
    if (
        type(elements) is not int  # while torch.jit traces
        or elements < _SMALL
        or approximate not in ("none", "tanh")
        or not ops.are_plain((input,))
        or not input.is_contiguous()
    ):
        return original(input, approximate=approximate)
    tanh = approximate == "tanh"
    if ops.requires_grad(input):
        return _gelu(input, tanh)
    with _below_autograd():
        return _forward(input, tanh)
