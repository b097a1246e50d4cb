"""Each operator in plain PyTorch: differentiable to any order, for any dtype and device.

These formulas are the oracle of the tests, the documentation of what the kernels compute, and the
``eager`` backend. float16 and bfloat16 are computed in float32 and rounded at the end.
"""

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


# ---- cross_entropy ------------------------------------------------------------------------


def cross_entropy_formula(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp in the compute dtype: float32 for float16 and bfloat16."""
    classes = 0 if input.dim() == 1 else 1
    x = input.float() if input.dtype in LOW_PRECISION else input
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    log_p = torch.log_softmax(x, classes)
    lse = torch.logsumexp(x, classes)
    C = x.shape[classes]
    if weight is None:
        per_class = None
    else:
        weight = weight.to(x.dtype)
        per_class = weight.reshape(-1, *[1] * (x.dim() - classes - 1))
        log_p_weighted = log_p * per_class

    if target.shape == input.shape:  # probabilities
        q = target.to(x.dtype)
        if label_smoothing:
            q = q * (1 - label_smoothing) + label_smoothing / C
        loss = -(q * (log_p if weight is None else log_p_weighted)).sum(classes)
        kept = None
        denominator = loss.numel()
    else:
        target = target.long()
        if target.dim() == x.dim():  # an unbatched target of shape (1,)
            target = target.squeeze(0)
        kept = target != ignore_index
        y = torch.where(kept, target, 0)
        w = torch.ones_like(y, dtype=x.dtype) if weight is None else weight[y]
        loss = -w * log_p.gather(classes, y.unsqueeze(classes)).squeeze(classes)
        if label_smoothing:
            smooth = -(log_p if weight is None else log_p_weighted).sum(classes)
            loss = (1 - label_smoothing) * loss + label_smoothing / C * smooth
        denominator = torch.where(kept, w, 0).sum()
    if z_loss:
        loss = loss + z_loss * lse.square()
    if kept is not None:
        loss = torch.where(kept, loss, 0)
    if reduction == "mean":
        # Zero tokens give nan, as 0 / 0 does.
        loss = loss.sum() / denominator if loss.numel() else loss.sum() * float("nan")
    elif reduction == "sum":
        loss = loss.sum()
    return loss, lse


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax cross-entropy: see :func:`fastlm.cross_entropy`."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    dtype = input.dtype
    if target.shape == input.shape and target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if dtype in LOW_PRECISION and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    loss, lse = cross_entropy_formula(
        input.to(dtype) if dtype not in LOW_PRECISION else input,
        target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss


# ---- linear_cross_entropy -----------------------------------------------------------------


def linear_cross_entropy_formula(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp in the compute dtype, in which the logits are too."""
    if input.dtype in LOW_PRECISION:
        input, linear_weight = input.float(), linear_weight.float()
        linear_bias = None if linear_bias is None else linear_bias.float()
    flat_bias = None if linear_bias is None else linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), flat_bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    return cross_entropy_formula(
        logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a linear layer's output: see :func:`fastlm.linear_cross_entropy`."""
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
        low = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(low), linear_weight.to(low)
        linear_bias = None if linear_bias is None else linear_bias.to(low)
        dtype = torch.float32
    loss, lse = linear_cross_entropy_formula(
        input, linear_weight, target, linear_bias, weight, reduction,
        -100 if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
    loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss
