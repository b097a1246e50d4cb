"""Attention: fake kernels, autograd formulas and entry points.

Tensors here are in the kernels' form: query (B, Hq, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv),
attn_mask (B or 1, Hq or 1, Tq or 1, Tk or 1), alibi_slopes (B, Hq) and sinks (Hq) in the compute dtype
(float64 for float64, else float32), seed an int64 scalar. lse is (B, Hq, Tq) in the compute dtype.
Packed sequences: query (T, Hq, D), lse (Hq, T).
"""

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import (
    asks_for_graph,
    choose_backend,
    eager_call,
    is_recorded,
    kernel,
    reference_backward,
    register_autograd,
    register_fake,
    requires_grad,
)

_below_autograd = torch._C._AutoDispatchBelowAutograd


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_scale(D: int) -> float:
    return D**-0.5 if D > 0 else 1.0


def _empty_as(like: Tensor, D: int) -> Tensor:
    """An empty (B, H, T, D), its memory ordered as `like`'s."""
    B, H, T, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, T, H, D).transpose(1, 2)
    return like.new_empty(B, H, T, D)


def _forward_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))
    return _empty_as(query, value.size(-1)), lse


def _input_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(_empty_as(x, x.size(-1)) for x in inputs)


@register_fake("attention_forward")
def _(query, key, value, is_causal, scale, *options):
    return _forward_results(query, value)


@register_fake("attention_backward")
def _(
    dout, query, key, value, out, lse, is_causal, scale, dlse=None, attn_mask=None, alibi_slopes=None, sinks=None,
    seed=None, dropout_p=0.0, left=-1, right=-1, softcap=0.0, needs_mask=False, needs_slopes=False,
):  # fmt: skip
    dq, dk, dv = _input_gradients(query, key, value)
    dmask = lse.new_empty(attn_mask.shape) if needs_mask else None
    dslopes = lse.new_empty(alibi_slopes.shape) if needs_slopes else None
    return dq, dk, dv, dmask, dslopes, None if sinks is None else lse.new_empty(sinks.shape)


@register_fake("varlen_attention_forward")
def _(query, key, value, cu_q, cu_k, seqused_k, block_table, max_q, max_k, left, right, scale, num_splits):
    T, H, _ = query.shape
    return query.new_empty(T, H, value.size(-1)), query.new_empty(H, T, dtype=compute_dtype(query.dtype))


@register_fake("varlen_attention_backward")
def _(dout, dlse, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, left, right, scale):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


# Eager calls without options on a CPU have operators of their own. Neither OpOverload's function in Python nor anything
# of autograd's stands before them, which would take a third of a small call.
_library = torch.library.Library("fastlm", "IMPL")
for _name in ("plain_attention_forward", "plain_attention_backward"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
_plain_forward = torch.ops.fastlm.plain_attention_forward.default._op
_plain_backward = torch.ops.fastlm.plain_attention_backward.default._op


@register_fake("plain_attention_forward", "fastlm")
def _(query, key, value, is_causal, enable_gqa):
    return _forward_results(query, value)


@register_fake("plain_attention_backward", "fastlm")
def _(dout, query, key, value, out, lse, is_causal):
    return _input_gradients(query, key, value)


# ---- autograd: each pair of functions serves torch.library and the eager autograd.Function ----


def _save(ctx, inputs, output):
    query, key, value, is_causal, scale, attn_mask, alibi_slopes, sinks, seed, *options = inputs
    ctx.save_for_backward(query, key, value, attn_mask, alibi_slopes, sinks, seed, *output)
    ctx.is_causal, ctx.scale, ctx.options = is_causal, scale, options
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    nones = (None,) * 5
    if dout is None and dlse is None:
        return (None,) * 8 + nones
    query, key, value, *optional, out, lse = ctx.saved_tensors
    mask, slopes, sinks, seed = optional
    given = *ctx.needs_input_grad, False, False, False  # of a compiled call, without the last that are None
    needs = *given[:3], *given[5:8]
    backend = choose_backend("scaled_dot_product_attention", query, value=value, backward=True)
    if _is_for_formula(backend, dout, dlse):
        formula = _formula(ctx.is_causal, ctx.scale, seed, *ctx.options)
        grads = reference_backward(formula, (query, key, value, mask, slopes, sinks), needs, (dout, dlse))
    else:
        if dout is None:
            dout = torch.zeros_like(out)
        grads = kernel(backend, "attention_backward")(
            dout, query, key, value, out, lse, ctx.is_causal, ctx.scale, dlse, *optional, *ctx.options,
            needs[3], needs[4],
        )  # fmt: skip
    dq, dk, dv, dmask, dslopes, dsinks = (g if need else None for g, need in zip(grads, needs, strict=True))
    if dmask is not None:
        dmask = dmask.to(mask.dtype)
    return dq, dk, dv, None, None, dmask, dslopes, dsinks, *nones


def _is_for_formula(backend: str, *grad_outputs: Tensor | None) -> bool:
    """Whether no kernel's backward can serve."""
    return backend == "eager" or asks_for_graph(*grad_outputs)


def _formula(is_causal, scale, seed=None, dropout_p=0.0, left=-1, right=-1, softcap=0.0):
    """The same in plain PyTorch, of the tensors that have gradients."""

    def attention(query, key, value, attn_mask=None, alibi_slopes=None, sinks=None):
        return reference.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, query.size(1) != key.size(1),
            window_size=(left, right), softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            return_lse=True, seed=seed,
        )  # fmt: skip

    return attention


def _varlen_save(ctx, inputs, output):
    query, key, value, cu_q, cu_k, seqused_k, block_table, *options = inputs
    if seqused_k is not None or block_table is not None:
        name = "seqused_k" if seqused_k is not None else "block_table"
        raise RuntimeError(f"fastlm.varlen_attn: {name} is for inference only, but a gradient is required")
    ctx.save_for_backward(query, key, value, cu_q, cu_k, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _varlen_gradients(ctx, dout, dlse):
    query, key, value, cu_q, cu_k, out, lse = ctx.saved_tensors
    max_q, max_k, left, right, scale, _ = ctx.options
    nones = (None,) * 10
    if dout is None and dlse is None:
        return (None,) * 3 + nones
    backend = choose_backend("varlen_attn", query, value=value, backward=True)
    if _is_for_formula(backend, dout, dlse):

        def formula(query, key, value):
            return reference.varlen_attn(
                query, key, value, cu_q, cu_k, max_q, max_k, return_aux=reference.AuxRequest(lse=True),
                scale=scale, window_size=(left, right), enable_gqa=query.size(1) != key.size(1),
            )  # fmt: skip

        return (
            reference_backward(formula, (query, key, value), ctx.needs_input_grad[:3], (dout, dlse)) + nones
        )
    if dout is None:
        dout = torch.zeros_like(out)
    grads = kernel(backend, "varlen_attention_backward")(
        dout, dlse, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, left, right, scale
    )
    return tuple(grads) + nones


register_autograd("attention_forward", _gradients, _save)
register_autograd("varlen_attention_forward", _varlen_gradients, _varlen_save)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, op, return_lse = arguments
        with _below_autograd():
            output = op(*inputs)
        _save(ctx, inputs, output)
        return output if return_lse else output[0]

    @staticmethod
    def backward(ctx, dout, dlse=None):
        return *_gradients(ctx, dout, dlse), None, None


class _PlainAttention(torch.autograd.Function):
    """Of a call without mask, slopes, sinks and dropout: less to keep and to give back."""

    @staticmethod
    def forward(ctx, query, key, value, options):
        out, lse = _plain(query, key, value, *options)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.is_causal = options[0]
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 4
        query, key, value, out, lse = ctx.saved_tensors
        backend = choose_backend("scaled_dot_product_attention", query, value=value, backward=True)
        if backend == "cpu" and not is_recorded(dout):
            dq, dk, dv = _plain_backward(dout, query, key, value, out, lse, ctx.is_causal)
            return dq, dk, dv, None
        scale = default_scale(query.shape[3])
        if _is_for_formula(backend, dout):
            needs, formula = ctx.needs_input_grad[:3], _formula(ctx.is_causal, scale)
            dq, dk, dv = reference_backward(formula, (query, key, value), needs, (dout, None))
        else:
            op = kernel(backend, "attention_backward")
            dq, dk, dv, _, _, _ = op(dout, query, key, value, out, lse, ctx.is_causal, scale)
        return dq, dk, dv, None


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, op, return_lse = arguments
        with _below_autograd():
            output = op(*inputs)
        _varlen_save(ctx, inputs, output)
        return output if return_lse else output[0]

    @staticmethod
    def backward(ctx, dout, dlse=None):
        return *_varlen_gradients(ctx, dout, dlse), None, None


_attention, _varlen_attention = eager_call(_Attention), eager_call(_VarlenAttention)
_plain_attention = eager_call(_PlainAttention)


def _run(op, function, inputs, differentiable, return_lse):
    """The operator, by the shortest way that keeps gradients: torch.library's own autograd costs tens
    of microseconds a call, and is left to the compiler, which traces through it."""
    if torch.compiler.is_compiling():
        output = op(*inputs)
    elif requires_grad(*differentiable):
        return function(*inputs, op, return_lse)
    else:
        with _below_autograd():
            output = op(*inputs)
    return output if return_lse else output[0]


def attention(backend: str, return_lse: bool, *inputs) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse; inputs are those of the schema of fastlm::attention_forward."""
    differentiable = *inputs[:3], *inputs[5:8]
    return _run(kernel(backend, "attention_forward"), _attention, inputs, differentiable, return_lse)


def _plain(query, key, value, is_causal, enable_gqa, backend):
    if backend == "cpu":
        return _plain_forward(query, key, value, is_causal, enable_gqa)
    with _below_autograd():
        return kernel(backend, "attention_forward")(
            query, key, value, is_causal, default_scale(query.shape[3])
        )


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *options) -> Tensor:
    """out of an eager call without options but is_causal, enable_gqa and the backend; the CPU's operator refuses
    tensors that don't fit."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _plain_attention(query, key, value, options)
    return _plain(query, key, value, *options)[0]


def varlen_attention(backend: str, return_lse: bool, *inputs) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse; inputs are those of the schema of fastlm::varlen_attention_forward."""
    return _run(
        kernel(backend, "varlen_attention_forward"), _varlen_attention, inputs, inputs[:3], return_lse
    )
