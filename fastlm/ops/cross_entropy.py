"""Softmax cross-entropy: fake kernels, autograd and entry point.

fastlm::cross_entropy(input, target, weight, ...) -> (loss, lse, low, dinput)
    input   (C), (N, C) or (N, C, d1, ...), floating, any strides
    target  int64 class indices, input's shape without C; or probabilities, input's shape and dtype
    weight  (C) in the compute dtype, or None
    loss    input's shape without C, or () if reduced; in the compute dtype with full_precision,
            else in input's
    lse     input's shape without C, compute dtype; 0 for ignored tokens unless return_lse
    low     like lse, what rounding took from it: lse + low is exact enough for confident tokens
    dinput  like input, the gradient for an upstream gradient of 1; empty unless `gradient`
fastlm::cross_entropy_backward(dloss, dlse, input, target, weight, lse, low, ...)
        -> (dinput, dtarget)
    each empty unless wanted
fastlm::scale_(gradients, factor): gradients of the forward times a scalar, in place; nothing is read where
    it is 1. On GPUs alone.

The compute dtype is float64 for float64 and float32 otherwise; reduction is 0 none, 1 mean, 2 sum.

In eager mode a scalar loss computes its gradient in the forward, while the logits are in cache: the
backward then only hands it over. Where the upstream gradient is not known to be one scalar, or under
torch.compile, which plans memory better than that, the backward reads the logits once more.
"""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import (
    asks_for_graph,
    choose_backend,
    eager_call,
    kernel,
    reference_backward,
    register_autograd,
    register_fake,
    requires_grad,
)

REDUCTIONS = ("none", "mean", "sum")
LOW_PRECISION = (torch.bfloat16, torch.float16)

_below_autograd = torch._C._AutoDispatchBelowAutograd
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_shape(logits: torch.Size) -> list[int]:
    """Shape of one value per token."""
    return [] if len(logits) == 1 else [logits[0], *logits[2:]]


@register_fake("cross_entropy")
def _(
    input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, return_lse,
    full_precision, gradient,
):  # fmt: skip
    shape, compute = token_shape(input.shape), compute_dtype(input.dtype)
    loss = input.new_empty([] if reduction else shape, dtype=compute if full_precision else input.dtype)
    lse = input.new_empty(shape, dtype=compute)
    dinput = torch.empty_like(input) if gradient else input.new_empty(0)
    return loss, lse, torch.empty_like(lse), dinput


@register_fake("cross_entropy_backward")
def _(
    dloss, dlse, input, target, weight, lse, low, reduction, ignore_index, label_smoothing, z_loss,
    softcap, input_gradient, target_gradient,
):  # fmt: skip
    return (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        input.new_empty(target.shape) if target_gradient else input.new_empty(0),
    )


def _save(ctx, input, target, weight, lse, low, options):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, lse, low)
    ctx.options = options
    ctx.dinput = None


def _gradients(ctx, dloss, dlse):
    """Gradients to input and target."""
    wants_input, wants_target = ctx.needs_input_grad[:2]
    if dloss is None and dlse is None:
        return None, None
    input, target, weight, lse, low = ctx.saved_tensors
    reduction = ctx.options[0]
    backend = choose_backend("cross_entropy", input, backward=True)
    if backend == "eager" or asks_for_graph(dloss, dlse):
        name, rest = REDUCTIONS[reduction], ctx.options[1:]
        if dloss is not None:
            dloss = dloss.to(compute_dtype(input.dtype))
        return reference_backward(
            lambda x, y: reference.cross_entropy_formula(x, y, weight, name, *rest),
            (input, target), (wants_input, wants_target), (dloss, dlse),
        )  # fmt: skip
    if dloss is None:
        dloss = lse.new_zeros([] if reduction else lse.shape)
    dinput, dtarget = kernel(backend, "cross_entropy_backward")(
        dloss, dlse, input, target, weight, lse, low, *ctx.options, wants_input, wants_target
    )
    return dinput if wants_input else None, dtarget if wants_target else None


def _setup_context(ctx, inputs, output):
    input, target, weight, *options, _, _, _ = inputs
    _save(ctx, input, target, weight, output[1], output[2], options)


def _backward(ctx, dloss, dlse, *unused):
    # The functions that call the operator under autograd never ask it for dinput.
    return *_gradients(ctx, dloss, dlse), *[None] * 9


register_autograd("cross_entropy", _backward, _setup_context)


@register_fake("scale_")
def _(gradients, factor):
    pass


def scale_known_gradients(ctx, function: str, dloss: Tensor, names: tuple[str, ...]) -> list[Tensor | None]:
    """The gradients that the forward computed, for the upstream gradient dloss, and then let go.

    They are handed over as they are, or scaled in place, only when this is the graph's last use:
    with retain_graph the saved ones must stay as they are, whatever is done to those returned.
    """
    saved = [getattr(ctx, name) for name in names]
    if all(g is None for g in saved):
        raise RuntimeError(
            "Trying to backward through the graph a second time (or directly access saved tensors "
            "after they have already been freed). Specify retain_graph=True if you need to backward "
            "through the graph a second time."
        )
    if _keeps_graph():
        return [None if g is None else g * dloss.to(g.dtype) for g in saved]
    for name in names:
        setattr(ctx, name, None)
    given = [g for g in saved if g is not None]
    backend = choose_backend(function, given[0], backward=True)
    if backend in ("cpu", "eager"):
        factor = dloss.item()
        if factor != 1:
            for g in given:
                g.mul_(factor)
    else:  # without making the host wait for the device
        with _below_autograd():
            kernel(backend, "scale_")(given, dloss)
    return saved


class _CrossEntropy(torch.autograd.Function):
    """The operator in eager mode: calls through torch.library cost tens of microseconds more."""

    @staticmethod
    def forward(ctx, input, target, weight, return_lse, full_precision, fused, options, op):
        with _below_autograd():
            loss, lse, low, dinput = op(input, target, weight, *options, return_lse, full_precision, fused)
        _save(ctx, input, target, weight, lse, low, options)
        ctx.fused = fused
        if fused:
            ctx.dinput = dinput
        return (loss, lse) if return_lse else loss

    @staticmethod
    def backward(ctx, dloss, dlse=None):
        if ctx.fused and dloss is not None and not (is_dynamo_compiling() or asks_for_graph(dloss)):
            dinput, dtarget = *scale_known_gradients(ctx, "cross_entropy", dloss, ("dinput",)), None
        else:
            dinput, dtarget = _gradients(ctx, dloss, dlse)
        return dinput, dtarget, None, None, None, None, None, None


_cross_entropy = eager_call(_CrossEntropy)


def cross_entropy(
    backend: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
    full_precision: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator with autograd, arguments checked and converted already."""
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    op = kernel(backend, "cross_entropy")
    if torch.compiler.is_compiling():
        loss, lse, *_ = op(input, target, weight, *options, return_lse, full_precision, False)
        return (loss, lse) if return_lse else loss
    if requires_grad(input, target):
        # float16: the gradients of a mean underflow unless the loss scale is in them from the start.
        fused = (
            reduction != 0 and not return_lse and not target.requires_grad and input.dtype != torch.float16
        )
        return _cross_entropy(input, target, weight, return_lse, full_precision, fused, options, op)
    with _below_autograd():
        loss, lse, *_ = op(input, target, weight, *options, return_lse, full_precision, False)
    return (loss, lse) if return_lse else loss


# ---- linear_cross_entropy -----------------------------------------------------------------
#
# fastlm::linear_cross_entropy(input, linear_weight, target, linear_bias, weight, ...)
#         -> (loss, lse, low, dinput, dlinear_weight, dlinear_bias)
#     input (D) or (N, D); linear_weight (C, D) or (C, d1, ..., D); linear_bias its shape without D;
#     the rest as above for logits (C), (N, C) or (N, C, d1, ...), which never exist whole
#     the gradients are for an upstream gradient of 1, each empty unless asked for
# fastlm::linear_cross_entropy_backward(dloss, dlse, input, ..., lse, low, ...)
#         -> (dinput, dlinear_weight, dlinear_bias), each empty unless wanted
#
# With the gradients in the forward, loss and gradients cost three matrix products; a backward from
# lse recomputes the logits and costs a fourth.

_LINEAR_GRADIENTS = ("dinput", "dlinear_weight", "dlinear_bias")


def _empty_gradients(tensors, wanted):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if w and t is not None
        else tensors[0].new_empty(0)
        for t, w in zip(tensors, wanted, strict=True)
    )


@register_fake("linear_cross_entropy")
def _(
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
    z_loss, softcap, full_precision, *wanted,
):  # fmt: skip
    shape = [*input.shape[:-1], *linear_weight.shape[1:-1]]
    compute = compute_dtype(input.dtype)
    loss = input.new_empty([] if reduction else shape, dtype=compute if full_precision else input.dtype)
    lse = input.new_empty(shape, dtype=compute)
    return loss, lse, torch.empty_like(lse), *_empty_gradients((input, linear_weight, linear_bias), wanted)


@register_fake("linear_cross_entropy_backward")
def _(
    dloss, dlse, input, linear_weight, target, linear_bias, weight, lse, low, reduction,
    ignore_index, label_smoothing, z_loss, softcap, *wanted,
):  # fmt: skip
    return _empty_gradients((input, linear_weight, linear_bias), wanted)


def _save_linear(ctx, input, linear_weight, target, linear_bias, weight, lse, low, options):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, linear_weight, target, linear_bias, weight, lse, low)
    ctx.options = options


def _linear_gradients(ctx, dloss, dlse, needed):
    """Gradients to input, linear_weight and linear_bias, None for one not needed."""
    if dloss is None and dlse is None:
        return None, None, None
    input, linear_weight, target, linear_bias, weight, lse, low = ctx.saved_tensors
    reduction = ctx.options[0]
    backend = choose_backend("linear_cross_entropy", input, backward=True)
    if backend == "eager" or asks_for_graph(dloss, dlse):
        name, rest = REDUCTIONS[reduction], ctx.options[1:]
        if dloss is not None:
            dloss = dloss.to(compute_dtype(input.dtype))
        return reference_backward(
            lambda x, w, b: reference.linear_cross_entropy_formula(
                x, w, target, b, weight, name, *rest
            ),
            (input, linear_weight, linear_bias), needed, (dloss, dlse),
        )  # fmt: skip
    if dloss is None:
        dloss = lse.new_zeros([] if reduction else lse.shape)
    grads = kernel(backend, "linear_cross_entropy_backward")(
        dloss, dlse, input, linear_weight, target, linear_bias, weight, lse, low, *ctx.options, *needed
    )
    return [g if need else None for g, need in zip(grads, needed, strict=True)]


def _linear_setup_context(ctx, inputs, output):
    *tensors, _, _, _, _ = inputs
    _save_linear(ctx, *tensors[:5], output[1], output[2], tensors[5:])


def _linear_backward(ctx, dloss, dlse, *unused):
    # The functions that call the operator under autograd never ask it for gradients.
    x, w, _, b, *_ = ctx.needs_input_grad
    dinput, dweight, dbias = _linear_gradients(ctx, dloss, dlse, (x, w, b))
    return dinput, dweight, None, dbias, *[None] * 10


register_autograd("linear_cross_entropy", _linear_backward, _linear_setup_context)


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator in eager mode: calls through torch.library cost tens of microseconds more."""

    @staticmethod
    def forward(
        ctx, input, linear_weight, linear_bias, target, weight, return_lse, full_precision, fused,
        options, op,
    ):  # fmt: skip
        ctx.needed = ctx.needs_input_grad[:3]
        wanted = ctx.needed if fused else (False, False, False)
        with _below_autograd():
            loss, lse, low, *grads = op(
                input, linear_weight, target, linear_bias, weight, *options, full_precision, *wanted
            )
        _save_linear(ctx, input, linear_weight, target, linear_bias, weight, lse, low, options)
        ctx.fused = fused
        for name, grad, need in zip(_LINEAR_GRADIENTS, grads, wanted, strict=True):
            setattr(ctx, name, grad if need else None)
        return (loss, lse) if return_lse else loss

    @staticmethod
    def backward(ctx, dloss, dlse=None):
        if ctx.fused and dloss is not None and not (is_dynamo_compiling() or asks_for_graph(dloss)):
            grads = scale_known_gradients(ctx, "linear_cross_entropy", dloss, _LINEAR_GRADIENTS)
        else:
            grads = _linear_gradients(ctx, dloss, dlse, ctx.needed)
        return *grads, *[None] * 7


_linear_cross_entropy = eager_call(_LinearCrossEntropy)


def linear_cross_entropy(
    backend: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
    full_precision: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator with autograd, arguments checked and converted already."""
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    op = kernel(backend, "linear_cross_entropy")
    if requires_grad(input, linear_weight, linear_bias) and not torch.compiler.is_compiling():
        # float16: see cross_entropy.
        fused = reduction != 0 and not return_lse and input.dtype != torch.float16
        return _linear_cross_entropy(
            input, linear_weight, linear_bias, target, weight, return_lse, full_precision, fused,
            options, op,
        )  # fmt: skip
    arguments = (input, linear_weight, target, linear_bias, weight, *options, full_precision)
    if torch.compiler.is_compiling():
        loss, lse, *_ = op(*arguments, False, False, False)
    else:
        with _below_autograd():
            loss, lse, *_ = op(*arguments, False, False, False)
    return (loss, lse) if return_lse else loss
