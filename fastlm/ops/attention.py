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
    batched,
    choose_backend,
    eager_call,
    kernel,
    reference_backward,
    register_autograd,
    register_fake,
    requires_grad,
)

_below_autograd = torch._C._AutoDispatchBelowAutograd


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_scale(query: Tensor) -> float:
    D = query.shape[-1]
    return D**-0.5 if D > 0 else 1.0


def choose(function: str, query: Tensor, value: Tensor, *, backward: bool = False) -> str:
    """The backend; kernels may have a largest head size, of query and key or of value."""
    widest = query if query.shape[-1] >= value.shape[-1] else value
    return choose_backend(function, widest, backward=backward)


def _empty_as(like: Tensor, D: int) -> Tensor:
    """An empty (B, H, T, D), its memory ordered as `like`'s."""
    B, H, T, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, T, H, D).transpose(1, 2)
    return like.new_empty(B, H, T, D)


@register_fake("attention_forward")
def _(
    query, key, value, attn_mask, alibi_slopes, sinks, seed, dropout_p, is_causal, left, right, scale, softcap
):
    lse = query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))
    return _empty_as(query, value.size(-1)), lse


@register_fake("attention_backward")
def _(
    dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, seed, dropout_p, is_causal,
    left, right, scale, softcap, needs_mask, needs_slopes,
):  # fmt: skip
    dq, dk, dv = (_empty_as(x, x.size(-1)) for x in (query, key, value))
    dmask = lse.new_empty(attn_mask.shape if needs_mask else 0)
    dslopes = lse.new_empty(alibi_slopes.shape if needs_slopes else 0)
    return dq, dk, dv, dmask, dslopes, lse.new_empty(0 if sinks is None else sinks.shape)


@register_fake("varlen_attention_forward")
def _(query, key, value, cu_q, cu_k, seqused_k, block_table, max_q, max_k, left, right, scale, num_splits):
    T, H, _ = query.shape
    return query.new_empty(T, H, value.size(-1)), query.new_empty(H, T, dtype=compute_dtype(query.dtype))


@register_fake("varlen_attention_backward")
def _(dout, dlse, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, left, right, scale):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


# ---- autograd: each pair of functions serves torch.library and the eager autograd.Function ----


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    needs = ctx.needs_input_grad
    nones = (None,) * 7  # seed and the options
    if dout is None and dlse is None:
        return (None,) * 6 + nones
    grads = _input_gradients(ctx.saved_tensors, ctx.options, needs[:6], dout, dlse)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=False)) + nones


def _input_gradients(saved, options, needs, dout, dlse):
    """Those of query, key, value, attn_mask, alibi_slopes and sinks, and perhaps some that aren't needed."""
    query, key, value, attn_mask, alibi_slopes, sinks, seed, out, lse = saved
    backend = choose("scaled_dot_product_attention", query, value, backward=True)
    # create_graph=True asks for gradients that can be differentiated again.
    if torch.is_grad_enabled() or batched(dout, dlse) or backend == "eager":
        dropout_p, is_causal, left, right, scale, softcap = options

        def formula(query, key, value, attn_mask, alibi_slopes, sinks):
            return reference.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, query.size(1) != key.size(1),
                window_size=(left, right), softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
                return_lse=True, seed=seed,
            )  # fmt: skip

        return reference_backward(formula, saved[:6], needs, (dout, dlse))
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dmask, dslopes, dsinks = kernel(backend, "attention_backward")(
        dout, dlse, *saved[:3], out, lse, *saved[3:7], *options, needs[3], needs[4]
    )
    return dq, dk, dv, dmask.to(attn_mask.dtype) if needs[3] else None, dslopes, dsinks


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
    backend = choose("varlen_attn", query, value, backward=True)
    if torch.is_grad_enabled() or batched(dout, dlse) or backend == "eager":

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
    def forward(ctx, query, key, value, attn_mask, alibi_slopes, sinks, op, inputs, return_lse):
        with _below_autograd():
            output = op(*inputs)
        _save(ctx, inputs, output)
        return output if return_lse else output[0]

    @staticmethod
    def backward(ctx, dout, dlse=None):
        return _gradients(ctx, dout, dlse)[:9]


class _PlainAttention(torch.autograd.Function):
    """Of a call without mask, slopes, sinks and dropout: less to keep and to give back."""

    @staticmethod
    def forward(ctx, query, key, value, op, inputs):
        with _below_autograd():
            out, lse = op(*inputs)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = inputs[7:]
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 5
        query, key, value, out, lse = ctx.saved_tensors
        saved = query, key, value, None, None, None, None, out, lse
        needs = *ctx.needs_input_grad[:3], False, False, False
        return *_input_gradients(saved, ctx.options, needs, dout, None)[:3], None, None


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, op, inputs, return_lse):
        with _below_autograd():
            output = op(*inputs)
        _varlen_save(ctx, inputs, output)
        return output if return_lse else output[0]

    @staticmethod
    def backward(ctx, dout, dlse=None):
        return _varlen_gradients(ctx, dout, dlse)[:6]


_attention, _varlen_attention = eager_call(_Attention), eager_call(_VarlenAttention)
_plain_attention = eager_call(_PlainAttention)


def _run(op, function, inputs, differentiable, return_lse):
    """The operator, by the shortest way that keeps gradients: torch.library's own autograd costs tens
    of microseconds a call, and is left to the compiler, which traces through it."""
    if torch.compiler.is_compiling():
        output = op(*inputs)
    elif requires_grad(*inputs[:differentiable]):
        return function(*inputs[:differentiable], op, inputs, return_lse)
    else:
        with _below_autograd():
            output = op(*inputs)
    return output if return_lse else output[0]


def attention(backend: str, return_lse: bool, *inputs) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse; inputs are those of the schema of fastlm::attention_forward."""
    return _run(kernel(backend, "attention_forward"), _attention, inputs, 6, return_lse)


def plain_attention(backend: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """out of a call without options."""
    op = kernel(backend, "attention_forward")
    inputs = query, key, value, None, None, None, None, 0.0, is_causal, -1, -1, default_scale(query), 0.0
    if requires_grad(query, key, value):
        return _plain_attention(query, key, value, op, inputs)
    with _below_autograd():
        return op(*inputs)[0]


def varlen_attention(backend: str, return_lse: bool, *inputs) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse; inputs are those of the schema of fastlm::varlen_attention_forward."""
    return _run(kernel(backend, "varlen_attention_forward"), _varlen_attention, inputs, 3, return_lse)
