"""Embedding: rows of a matrix, and a gradient whose memory is kept.

    y[...] = W[x[...]]                            x (...), W (N, D), y (..., D)
    dW[n] = sum of dy over the places where x = n, which are added up in their order

The gradient is as large as the matrix, and nearly all of it 0. To make that anew at each step takes more time than
all else here (csrc/kept_memory.h). Values and order are those of F.embedding, but that 16-bit types are summed in
float32.
"""

import torch

from fastlm.ops import is_recorded
from fastlm.ops.memory import new_empty


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, padding_idx):
        ctx.save_for_backward(input)
        ctx.rows, ctx.padding_idx = weight.size(0), padding_idx
        return torch.embedding(weight, input, padding_idx)

    @staticmethod
    def backward(ctx, dy):
        (input,) = ctx.saved_tensors
        if is_recorded(dy):
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
