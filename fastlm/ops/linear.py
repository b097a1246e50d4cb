"""Linear layers: autograd, and which calls are ours.

    y = x W^T + b                                 x (..., K), W (N, K), b (N), y (..., N)
    dx = dy W,  dW = dy^T x,  db = sum of dy's rows

On a CPU each of the three products goes the way that products.py finds fastest. Where these are torch's own,
and wherever something else than plain CPU tensors comes in, the call is F.linear's, to the bit, as is any
under torch.use_deterministic_algorithms, which leaves nothing to timing.

A weight of int8 with a scale an output, y = x (s q)^T + b, is widened for the product, but for a few tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlm import ops
from fastlm.ops import memory, products
from fastlm.ops.activation import gelu

original = torch._C._nn.linear  # F.linear, whatever is installed over that name
_sum_rows = torch.ops.fastlm.sum_rows.default
_is_compiling = torch.compiler.is_compiling

# Elements of input times elements of weight below which a choice gains less than it costs to look up. Other
# dtypes have none.
_SMALL = {torch.float32: 1 << 30, torch.bfloat16: 1 << 22, torch.float16: 1 << 22}
_SMALL_WEIGHT = 1 << 17  # elements of weight alone, for a few tokens: reading them takes the time
_MANY_TOKENS = 8  # bits of their number
_TYPES = (Tensor, Parameter)
_STRIP = 64  # columns that a thread sums, at least
_ALL_TORCH = ("torch", "torch", "torch")
# The ways of forward, input gradient and weight gradient; torch's too for a gradient that isn't wanted.
_known: dict[tuple, tuple[str, str, str]] = {}


def _ways(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[torch.dtype, tuple] | None:
    """The dtype of the products and their ways; None where the call is F.linear's, to serve or to refuse.

    Cheap questions come first: a call of some microseconds is asked little.
    """
    if _is_compiling() or type(input) not in _TYPES or type(weight) not in _TYPES:
        return None
    small = _SMALL.get(input.dtype)
    if small is None or input.is_nested:
        return None
    elements = input.numel()
    if type(elements) is not int:  # while torch.jit traces
        return None
    size, shape = weight.numel(), weight.shape
    if elements * size < small and products.forced is None:
        if size < _SMALL_WEIGHT or elements > products.FEW * shape[-1]:
            return None
    if len(shape) != 2 or input.dim() == 0 or input.shape[-1] != shape[1] or 0 in shape:
        return None
    dtype, autocast = input.dtype, torch.is_autocast_enabled("cpu")
    if autocast:
        dtype = torch.get_autocast_dtype("cpu")
    differentiated = torch.is_grad_enabled()
    tokens, threads = (elements // shape[1]).bit_length(), torch.get_num_threads()
    kind = tokens, shape[1], shape[0], input.dtype, weight.dtype, dtype, weight.is_contiguous(), threads
    key = kind, differentiated and input.requires_grad, differentiated and weight.requires_grad
    ways = _known.get(key)
    if (ways == _ALL_TORCH and not _keeps(key)) or not _is_ours(input, weight, bias, dtype, autocast):
        return None
    if ways is None:
        ways = _known[key] = (
            products.way(products.FORWARD, kind),
            products.way(products.INPUT, kind) if key[1] else "torch",
            products.way(products.WEIGHT, kind) if key[2] else "torch",
        )
    return None if ways == _ALL_TORCH and not _keeps(key) else (dtype, ways)


def _keeps(key: tuple) -> bool:
    """Whether the weight's gradient is worth having in kept memory, where all products are torch's. Autocast would
    have rounded the weight but once for several calls, which for many tokens is little."""
    kind, _, needs_weight = key
    return needs_weight and kind[0] > _MANY_TOKENS and kind[1] * kind[2] >= memory.LARGE


def _is_ours(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, autocast: bool) -> bool:
    """Whether these are plain tensors of fitting dtypes and shapes, and nothing asks for F.linear itself or
    for torch's own choice of the products."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not ops.are_plain(tensors) or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    dtypes = products.DTYPES if autocast else (dtype,)
    for x in tensors:
        if x.dtype not in dtypes:
            return False
    return not (
        input.numel() == 0
        or dtype not in products.DTYPES
        or not (weight.is_contiguous() or weight.t().is_contiguous())
        or torch.are_deterministic_algorithms_enabled()
        or not torch._C._get_mkldnn_enabled()
        or torch._C._get_fp32_precision_getter("mkldnn", "matmul") not in ("none", "ieee")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype, forward, input_gradient, weight_gradient):
        needs_input, needs_weight, _ = ctx.needs_input_grad[:3]
        ctx.set_materialize_grads(False)
        rounded = None  # the weight, for all products that take it so
        if weight.dtype is not dtype and (
            forward != "float32" or (needs_input and input_gradient != "float32")
        ):
            rounded = memory.cast(weight, dtype)
        ctx.save_for_backward(
            input if needs_weight else None,
            weight if needs_input else None,
            rounded if needs_input and input_gradient != "float32" else None,
        )
        ctx.shape, ctx.by_rows, ctx.dtype = input.shape, weight.is_contiguous(), dtype
        ctx.dtypes = [None if x is None else x.dtype for x in (input, weight, bias)]
        ctx.ways = input_gradient, weight_gradient
        return _product(
            forward, input, weight if forward == "float32" or rounded is None else rounded, bias, dtype
        )

    @staticmethod
    def backward(ctx, dy):
        dx = dweight = dbias = None
        if dy is None:
            return (None,) * 7
        input, weight, rounded = ctx.saved_tensors
        with products.without_autocast():
            dy = dy.reshape(-1, dy.shape[-1])
            x = None if input is None else input.reshape(-1, input.shape[-1])
            recorded = ops.is_recorded(dy)
            if recorded:
                # by torch, which autograd and everything else knows
                if weight is not None:
                    dx = torch.mm(dy, weight.to(ctx.dtype))
                if x is not None:
                    dweight = torch.mm(dy.t(), x.to(ctx.dtype))
            else:
                way, other = ctx.ways
                if weight is not None:
                    # Gradients through float32 are not rounded to the product's dtype where the tensors have more.
                    dtype = ctx.dtypes[0] if way == "float32" else ctx.dtype
                    dx = products.input_gradient(way, dy, weight if rounded is None else rounded, dtype)
                if x is not None:
                    dweight = products.weight_gradient(other, dy, x, ctx.dtype, ctx.by_rows, ctx.dtypes[1])
            if dx is not None:
                dx = dx.view(ctx.shape)
            if ctx.needs_input_grad[2]:
                dbias = _bias_gradient(dy, ctx.dtypes[2], recorded)
        return dx, dweight, dbias, None, None, None, None


def _bias_gradient(dy: Tensor, dtype: torch.dtype, recorded: bool) -> Tensor:
    # torch widens all of dy first.
    if dy.dtype.itemsize > 2 or recorded or dy.size(1) < _STRIP * torch.get_num_threads():
        return dy.sum(0, dtype=dtype)
    with products.below_autograd():
        return _sum_rows(dy).to(dtype)


def _product(
    way: str, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **activation
) -> Tensor:
    with products.without_autocast():
        y = products.PRODUCTS[way](input.reshape(-1, input.shape[-1]), weight.t(), bias, dtype, **activation)
        return y.view(*input.shape[:-1], -1)


class _Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]  # where there is such
    onednn: tuple[str, str]  # name and algorithm


_gelu_tanh = functools.partial(gelu, approximate="tanh")
ACTIVATIONS = {
    "relu": _Activation(torch.relu, torch.relu_, ("relu", "")),
    "gelu": _Activation(gelu, gelu, ("gelu", "none")),
    "gelu_tanh": _Activation(_gelu_tanh, _gelu_tanh, ("gelu", "tanh")),
    "silu": _Activation(torch._C._nn.silu, torch._C._nn.silu_, ("swish", "")),
    "sigmoid": _Activation(torch.sigmoid, torch.sigmoid_, ("sigmoid", "")),
    "tanh": _Activation(torch.tanh, torch.tanh_, ("tanh", "")),
}  # fmt: skip


@torch.library.register_fake("fastlm::linear")
def _few_tokens_fake(input, weight, scale, bias):
    return input.new_empty(input.size(0), weight.size(0))


def _few_tokens_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _few_tokens_backward(ctx, dy):
    input, weight, scale, bias = ctx.saved_tensors
    dx = dw = dscale = None
    scaled = dy if scale is None else dy * scale
    if ctx.needs_input_grad[0]:
        dx = scaled @ weight.to(dy.dtype)
    if ctx.needs_input_grad[1]:
        dw = dy.t() @ input
    if scale is not None and ctx.needs_input_grad[2]:
        dscale = (dy * (input @ weight.to(dy.dtype).t())).sum(0)
    return dx, dw, dscale, dy.sum(0) if bias is not None and ctx.needs_input_grad[3] else None


torch.library.register_autograd("fastlm::linear", _few_tokens_backward, setup_context=_few_tokens_save)


def linear_int8(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The layer with autograd for weight (N, K) of int8 and scale (N)."""
    tensors = (input, weight, scale) if bias is None else (input, weight, scale, bias)
    shape = input.shape
    if (
        not _is_compiling()
        and not input.is_nested
        and input.numel() <= products.FEW * shape[-1]
        and ops.are_plain(tensors)
        and not ops.autocast_is_on(input.device)
        and not ops.requires_grad(input, scale, bias)
    ):
        with products.below_autograd():
            y = products.few_tokens(input.reshape(-1, shape[-1]), weight, scale, bias)
        return y.view(*shape[:-1], weight.size(0))
    y = linear(input, weight.to(input.dtype), None)
    scale = scale.to(y.dtype)  # autocast's
    return y * scale if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """The layer with autograd; activation is a key of ACTIVATIONS or None."""
    found = _ways(input, weight, bias)
    if found is None:
        y = original(input, weight, bias)
        return y if activation is None else ACTIVATIONS[activation].function(y)
    dtype, ways = found
    act = None if activation is None else ACTIVATIONS[activation]
    if ops.requires_grad(input, weight, bias):
        if dtype is not input.dtype and "float32" not in (ways[0], ways[2]):
            input = memory.to(input, dtype)
        y = _Linear.apply(input, weight, bias, dtype, *ways)
        return y if act is None else act.function(y)
    if act is not None and ways[0] == "onednn":
        return _product("onednn", input, weight, bias, dtype, activation=act.onednn)
    y = _product(ways[0], input, weight, bias, dtype)
    return y if act is None else act.in_place(y)
