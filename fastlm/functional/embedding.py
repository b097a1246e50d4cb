"""Embeddings: the public function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from fastlm.ops.embedding import Embedding
from fastlm.ops.memory import LARGE

original = F.embedding  # whatever is installed over that name

_INDICES = (torch.int64, torch.int32)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """torch.nn.functional.embedding, whose gradient on a CPU takes the memory of the one before.

    Values, and the order of the sums, are F.embedding's; 16-bit types are summed in float32, and rounded once. The
    gradient is as large as the matrix: in memory that the system hands out anew, page by page, it takes as long as
    some layers of a model.

    All else is F.embedding's, to the bit: other devices, tensor subclasses, matrices of less than 2^18 elements,
    the options behind ``padding_idx``, torch.compile, functorch transforms and forward-mode AD.

    Args:
        input (Tensor): (...), of int64 or int32, rows of weight.
        weight (Tensor): (N, D).
        padding_idx (int, optional): the row that gets no gradient; negative ones count from the end.
        max_norm (float, optional): norm that longer rows are first scaled down to, in place.
        norm_type (float): of max_norm.
        scale_grad_by_freq (bool): gradients are divided by the number of places of their row.
        sparse (bool): the gradient is a sparse tensor.

    Returns:
        Tensor: (..., D), of weight's dtype.

    Raises:
        AssertionError, IndexError, RuntimeError, TypeError: as F.embedding.

    Example::

        x = fastlm.embedding(tokens, wte.weight)
    """
    if (
        torch.compiler.is_compiling()
        or max_norm is not None
        or scale_grad_by_freq
        or sparse
        or not ops.are_plain((input, weight))
        or not ops.requires_grad(weight)
        or input.dtype not in _INDICES
        or weight.dim() != 2
        or weight.numel() < LARGE
    ):
        return original(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        padding_idx = -1
    elif not -weight.size(0) <= padding_idx < weight.size(0):
        return original(input, weight, padding_idx)  # which says so
    elif padding_idx < 0:
        padding_idx += weight.size(0)
    return Embedding.apply(input, weight, padding_idx)
