"""Softmax cross-entropy over a vocabulary that the processes of a group share: process r holds the
classes of one contiguous range.

With log-sum-exps lse_r of the shards, and the target y in the shard of its owner o:

    lse = log sum_r exp lse_r        lse - x_y = (lse_o - x_y) + (lse - lse_o)

Both terms on the right are >= 0, so nothing cancels. The fused operators give lse_r and lse_o - x_y;
these, two numbers a token, travel forward, and backward the gradient of hidden states alone. The logits
and the gradients of logits and classifier stay where they are.

Every process computes the whole loss, and its backward is that of one loss: what all hold alike gets
the sum of the shares of all, what one holds gets its own (f and g in Shoeybi et al. 2019,
arXiv:1909.08053, section 3). The collectives are differentiable, to any order.

Dimensions: N tokens, D hidden width, C classes, P processes of the group.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm import reference
from fastlm.functional.cross_entropy import _check_linear, _check_loss_options, _check_target
from fastlm.ops import autocast_is_on, choose_backend, requires_grad, under_transform
from fastlm.ops import cross_entropy as ops_cross_entropy
from fastlm.ops.cross_entropy import compute_dtype, token_shape

__all__ = ["cross_entropy", "linear_cross_entropy"]

# ---- collectives ---------------------------------------------------------------------------
# Two pairs, each the other's backward. Low precision is summed in float32.


class _Share(torch.autograd.Function):
    """What all processes hold alike, before each makes its own use of it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return _Total.apply(dx, ctx.group), None


class _Total(torch.autograd.Function):
    """The sum over the processes, on each."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx, dtotal):
        return _Share.apply(dtotal, ctx.group), None


class _Gather(torch.autograd.Function):
    """x of every process, (P, ...), on each."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all(x, group)

    @staticmethod
    def backward(ctx, dgathered):
        return _Own.apply(dgathered, ctx.group), None


class _Own(torch.autograd.Function):
    """This process's of what all hold, (P, ...)."""

    @staticmethod
    def forward(ctx, gathered, group):
        ctx.group = group
        return gathered[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx, dx):
        return _Gather.apply(dx, ctx.group), None


def _all(x: Tensor, group) -> Tensor:
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(gathered.unbind()), x.contiguous(), group=group)
    return gathered


# ---- the boundary --------------------------------------------------------------------------


def _check_group(name: str, group, *tensors: Tensor | None) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{name}: there is no process group: call torch.distributed.init_process_group")
    if dist.get_rank(group) < 0:
        raise RuntimeError(f"{name}: this process, number {dist.get_rank()}, is not in the group")
    if under_transform(*tensors):
        raise RuntimeError(f"{name}: no rule for functorch transforms and forward-mode AD")


def _shard_sizes(
    name: str, group, classes: int, sizes: Sequence[int] | None, device: torch.device, **alike: int
) -> list[int]:
    """Classes of each process. Unless they are given, the processes tell each other, and find out
    whether they are called alike."""
    if sizes is not None:
        sizes, world, rank = list(sizes), dist.get_world_size(group), dist.get_rank(group)
        if len(sizes) != world:
            raise ValueError(
                f"{name}: sizes has {len(sizes)} entries, expected one for each of {world} processes"
            )
        if sizes[rank] != classes:
            raise ValueError(
                f"{name}: sizes[{rank}] is {sizes[rank]}, but this process holds {classes} classes"
            )
        return sizes
    mine = torch.tensor([classes, *alike.values()], device=device)
    sizes, *rest = zip(*_all(mine, group).tolist(), strict=True)
    for what, values in zip(alike, rest, strict=True):
        if len(set(values)) > 1:
            what = what.replace("_", " ")
            raise RuntimeError(f"{name}: the processes of the group differ in {what}: {list(values)}")
    return list(sizes)


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_call(
    name: str, group, local: tuple[int, ...], dtype: torch.dtype, differentiable: bool, target: Tensor,
    weight: Tensor | None, sizes: Sequence[int] | None, ignore_index: int, same_weight_dtype: bool,
) -> list[int]:  # fmt: skip
    """The shards' sizes, once everything fits; local is the shape of this process's logits."""
    if dtype not in _DTYPES:
        raise RuntimeError(f"{name}: input has dtype {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    axis = 0 if len(local) == 1 else 1
    sizes = _shard_sizes(
        name, group, local[axis], sizes, target.device,
        tokens=target.numel(), dtype=_DTYPES.index(dtype), whether_input_requires_a_gradient=differentiable,
    )  # fmt: skip
    whole = (*local[:axis], sum(sizes), *local[axis + 1 :])
    if target.is_floating_point():
        raise RuntimeError(
            f"{name}: target has dtype {target.dtype}: no class probabilities here, only indices"
        )
    _check_target(
        name, "the whole of the logits", whole, dtype, target, weight, ignore_index, same_weight_dtype
    )
    return sizes


# ---- the loss ------------------------------------------------------------------------------


def _loss(
    name: str, group, operator, classes: int, target: Tensor, weight: Tensor | None, sizes: list[int],
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole loss and log-sum-exp in the compute dtype. operator(target, weight, label_smoothing) is
    the fused one on this process's classes: loss and log-sum-exp of each token, where the target -1
    does not count."""
    rank, total = dist.get_rank(group), sum(sizes)
    start = sum(sizes[:rank])
    kept = target != ignore_index
    wrong = kept & ((target < 0) | (target >= total))
    if target.is_cpu and wrong.any():
        raise IndexError(
            f"{name}: target {target[wrong][0].item()} is out of bounds for {total} classes"
            f" (ignore_index is {ignore_index})"
        )
    own = torch.where(kept & (target >= start) & (target < start + classes), target - start, -1)
    own = torch.where(wrong, classes, own)  # the operator stops a GPU there

    nll, lse = operator(own, None, 0.0)  # lse_o - x_y of the tokens whose owner this is, 0 of the others
    parts = [lse, nll]
    if label_smoothing:  # sum over the shard's classes of w_c (lse_r - x_c)
        shard = None if weight is None else weight[start : start + classes]
        parts.append(classes * operator(torch.zeros_like(own), shard, 1.0)[0])
    lses, nlls, *sums = _Gather.apply(torch.stack(parts), group).unbind(1)  # (P, tokens) each

    lse = lses.logsumexp(0)
    y = torch.where(kept & ~wrong, target, 0)
    stops = torch.tensor(sizes, device=y.device).cumsum(0)
    owner = torch.bucketize(y, stops, right=True).clamp(max=len(sizes) - 1)  # of no class at all: the last
    lse_owner = lses.gather(0, owner.unsqueeze(0)).squeeze(0)
    excess = lse - lse_owner
    loss = torch.where(lse_owner == -math.inf, excess, nlls.sum(0) + excess)
    if weight is not None:
        loss = weight[y] * loss
    if label_smoothing:
        whole = lse.new_ones(total) if weight is None else weight
        smooth = [
            part + shard.sum() * (lse - lse_r)
            for part, shard, lse_r in zip(sums[0], whole.split(sizes), lses, strict=True)
            if len(shard)
        ]
        loss = (1 - label_smoothing) * loss + label_smoothing / total * sum(smooth)
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = torch.where(kept, loss, 0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (kept if weight is None else torch.where(kept, weight[y], 0)).sum()
    return loss, lse


def cross_entropy(
    input_shard: Tensor,
    target: Tensor,
    group: "dist.ProcessGroup | None" = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    sizes: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastlm.cross_entropy` of logits whose classes are spread over the processes of a group.

    Args:
        input_shard (Tensor): this process's logits, ``(C_r)``, ``(N, C_r)`` or ``(N, C_r, d1, ..., dK)``.
            The classes are numbered through in the order of the processes; shares may be unequal, or
            empty.
        target (Tensor): class indices among all classes, of input_shard's shape without ``C_r``, int64,
            int32 or uint8. Every process must hold the same.
        group (ProcessGroup, optional): the processes. Default: all.

    Keyword args:
        weight (Tensor, optional): a weight for each of all classes, ``(C)``, the same on every process;
            of input_shard's dtype.
        ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse: as for
            :func:`fastlm.cross_entropy`, the same on every process.
        sizes (sequence of int, optional): the number of classes on each process. If None, the processes
            tell each other at every call and raise if they are called with different numbers of tokens,
            dtypes or needs of gradients; on a GPU that makes the host wait for the device.

    Returns:
        Tensor: the loss of all classes, on every process the same bits; with `return_lse`, a tuple of it
        and the log-sum-exp of each token over all classes. Dtypes and shapes are those of
        :func:`fastlm.cross_entropy`.

    All processes of the group must make the call, and the backward. The gradient of input_shard is that
    of the whole loss: it is not to be summed over the group. Derivatives of any order are right.

    Raises:
        IndexError: a target outside all classes that is not ignore_index (on a GPU, as the operator does).
        ValueError: batch sizes differ, an unknown reduction, a z_loss or softcap out of range, sizes that
            do not fit.
        RuntimeError: no process group, or one without this process; processes that differ; probabilities;
            any other shape, dtype or device that doesn't fit.
    """
    name = "fastlm.distributed.cross_entropy"
    _check_group(name, group, input_shard, target, weight)
    _check_loss_options(name, reduction, label_smoothing, z_loss, softcap)
    shape, dtype = tuple(input_shard.shape), input_shard.dtype
    if not shape:
        raise RuntimeError(f"{name}: input_shard has no dimension, expected (C), (N, C) or (N, C, d1, ...)")
    if input_shard.device != target.device:
        raise RuntimeError(
            f"{name}: input_shard is on {input_shard.device} and target on {target.device}, expected one device"
        )
    autocast = autocast_is_on(input_shard.device)
    sizes = _check_call(
        name,
        group,
        shape,
        dtype,
        requires_grad(input_shard),
        target,
        weight,
        sizes,
        ignore_index,
        not autocast,
    )
    axis = 0 if len(shape) == 1 else 1

    def operator(target, weight, label_smoothing):
        if not shape[axis]:
            return _of_no_class(input_shard.to(compute_dtype(dtype)).sum(axis))
        backend = choose_backend("cross_entropy", input_shard)
        if backend == "eager":
            return reference.cross_entropy_formula(
                input_shard, target, weight, "none", -1, label_smoothing, 0.0, softcap
            )
        return ops_cross_entropy.cross_entropy(
            backend, input_shard, target, weight, 0, -1, label_smoothing, 0.0, softcap, True, True
        )

    loss, lse = _loss(
        name, group, operator, shape[axis], _indices(target, token_shape(input_shard.shape)),
        _weights(weight, dtype), sizes, ignore_index, reduction, label_smoothing, z_loss,
    )  # fmt: skip
    if not autocast:
        loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss


def linear_cross_entropy(
    input: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    group: "dist.ProcessGroup | None" = None,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    sizes: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastlm.linear_cross_entropy` with the rows of the linear layer's weight spread over the
    processes of a group. No process holds its logits whole.

    Args:
        input (Tensor): ``(D)`` or ``(N, D)``. Every process must hold the same.
        weight_shard (Tensor): this process's rows, ``(C_r, D)``, or ``(C_r, d1, ..., dK, D)`` for a
            K-dimensional loss; of input's dtype. The classes are numbered through in the order of the
            processes; shares may be unequal, or empty.
        target (Tensor): class indices among all classes, ``()``, ``(N)`` or ``(N, d1, ..., dK)``, the same
            on every process.
        group (ProcessGroup, optional): the processes. Default: all.

    Keyword args:
        linear_bias (Tensor, optional): of this process's rows, ``(C_r)`` or ``(C_r, d1, ..., dK)``.
        weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse, sizes: as for
            :func:`cross_entropy`.

    Returns:
        Tensor: as :func:`cross_entropy`.

    The gradient of input is the whole one, the same on every process: the shares are summed over the
    group in the backward. Those of weight_shard and linear_bias are this process's rows of the whole
    ones. A loss recomputes its logits in the backward, as that of :func:`fastlm.linear_cross_entropy`
    with ``reduction='none'``.

    Raises:
        As :func:`cross_entropy`.
    """
    name = "fastlm.distributed.linear_cross_entropy"
    _check_group(name, group, input, weight_shard, target, linear_bias, weight)
    _check_loss_options(name, reduction, label_smoothing, z_loss, softcap)
    autocast = autocast_is_on(input.device)
    shape = _check_linear(name, input, weight_shard, linear_bias, autocast)
    if target.device != input.device:
        raise RuntimeError(
            f"{name}: input is on {input.device} and target on {target.device}, expected one device"
        )
    sizes = _check_call(
        name,
        group,
        shape,
        input.dtype,
        requires_grad(input),
        target,
        weight,
        sizes,
        ignore_index,
        not autocast,
    )
    dtype = input.dtype
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    x = _Share.apply(input, group).to(dtype)
    w = weight_shard.to(dtype)
    b = None if linear_bias is None else linear_bias.to(dtype)

    def operator(target, weight, label_smoothing):
        if not len(w):
            logits = torch.nn.functional.linear(x, w.flatten(0, -2), None if b is None else b.flatten())
            return _of_no_class(
                logits.reshape(shape).to(compute_dtype(dtype)).sum(0 if len(shape) == 1 else 1)
            )
        backend = choose_backend("linear_cross_entropy", x)
        if backend == "eager":
            return reference.linear_cross_entropy_formula(
                x, w, target, b, weight, "none", -1, label_smoothing, 0.0, softcap
            )
        return ops_cross_entropy.linear_cross_entropy(
            backend, x, w, target, b, weight, 0, -1, label_smoothing, 0.0, softcap, True, True
        )

    loss, lse = _loss(
        name, group, operator, len(w), _indices(target, [*input.shape[:-1], *shape[2:]]),
        _weights(weight, dtype), sizes, ignore_index, reduction, label_smoothing, z_loss,
    )  # fmt: skip
    if not autocast:
        loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss


def _of_no_class(zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of tokens in an empty shard, which takes part in the backward as the others."""
    return zeros, zeros - math.inf


def _indices(target: Tensor, tokens: Sequence[int]) -> Tensor:
    return target.long().reshape(tokens)  # of one token the target may be (1)


def _weights(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else weight.to(compute_dtype(dtype))
