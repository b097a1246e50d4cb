"""Large tensors in memory that is kept for the next one (csrc/kept_memory.h)."""

import torch
from torch import Tensor

from fastlm import ops

new_empty = torch.ops.fastlm.new_empty.default

LARGE = 1 << 18  # elements, below which the system's memory costs less than a node of autograd


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), without autograd, of a tensor without gaps or a matrix by columns."""
    if x.dtype is dtype:
        return x
    if x.is_contiguous():
        return new_empty(x, x.shape, dtype).copy_(x)
    return cast(x.t(), dtype).t()


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return cast(x, dtype)

    @staticmethod
    def backward(ctx, dy):
        return (dy.to(ctx.dtype) if ops.is_recorded(dy) or not _fits(dy) else cast(dy, ctx.dtype)), None


def to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), with autograd, of any tensor."""
    if x.dtype is dtype or torch.compiler.is_compiling() or not ops.are_plain((x,)) or not _fits(x):
        return x.to(dtype)
    return _Cast.apply(x, dtype) if ops.requires_grad(x) else cast(x, dtype)


def _fits(x: Tensor) -> bool:
    return x.numel() >= LARGE and (x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous()))
