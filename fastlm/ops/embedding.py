"""Embedding: rows of a matrix, and a gradient whose memory is kept.

    y[...] = W[x[...]]                            x (...), W (N, D), y (..., D)
    dW[n] = sum of dy over the places where x = n, which are added up in their order

The gradient is as large as the matrix, and nearly all of it 0. To make that anew at each step takes more time than
all else here (csrc/kept_memory.h). Values and order are those of F.embedding, but that 16-bit types are summed in
float32. Whatever isn't a plain CPU tensor,
a small matrix, or an option of F.embedding other than padding_idx, is F.embedding's.
"""

import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops import batched
from fastlm.ops.linear import are_plain
from fastlm.ops.products import new_empty

original = torch.nn.functional.embedding  # whatever is installed over that name

_LARGE_WEIGHT = 1 << 18  # elements
_INDICES = (torch.int64, torch.int32)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, padding_idx):
        ctx.save_for_backward(input)
        ctx.rows, ctx.padding_idx = weight.size(0), padding_idx
        return torch.embedding(weight, input, padding_idx)

    @staticmethod
    def backward(ctx, dy):
        (input,) = ctx.saved_tensors
        if torch.is_grad_enabled() or batched(dy) or torch._C._len_torch_dispatch_stack() > 0:
            dweight = torch.ops.aten.embedding_dense_backward(dy, input, ctx.rows, ctx.padding_idx, False)
            return None, dweight, None
        dweight = new_empty(dy, (ctx.rows, dy.size(-1)), dy.dtype).zero_()
        input, dy = input.reshape(-1), dy.reshape(-1, dy.size(-1))
        if dy.dtype.itemsize == 2:
            rows, places = input.unique(return_inverse=True)
            sums = dy.new_zeros(rows.size(0), dy.size(1), dtype=torch.float32).index_add_(
                0, places, dy.float()
            )
            dweight[rows] = sums.to(dy.dtype)
        else:
            dweight.index_add_(0, input, dy)
        if ctx.padding_idx >= 0:
            dweight[ctx.padding_idx].zero_()
        return None, dweight, None


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The rows with autograd; arguments as of F.embedding."""
    if (
        torch.compiler.is_compiling()
        or max_norm is not None
        or scale_grad_by_freq
        or sparse
        or not are_plain((input, weight))
        or not ops.requires_grad(weight)
        or input.dtype not in _INDICES
        or weight.dim() != 2
        or weight.numel() < _LARGE_WEIGHT
    ):
        return original(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        padding_idx = -1
    elif not -weight.size(0) <= padding_idx < weight.size(0):
        return original(input, weight, padding_idx)  # which says so
    elif padding_idx < 0:
        padding_idx += weight.size(0)
    return _Embedding.apply(input, weight, padding_idx)
