"""Cross-entropy of logits X W^T + bias that never exist whole; the formulas stand in token_loss.py.

X (N, D), W (C, S, D), bias (C, S): S heads, each with its own loss over C classes.
Forward: a program owns a block of tokens and a segment of the vocabulary, whose tiles of logits it
multiplies and folds into running maxima and sums in registers; a second kernel joins the segments.
Kept for the backward: lse and low, two numbers a token.
Backward: for a chunk of the vocabulary after another, tiles of logits are multiplied again and turned
into those of their gradient G (N, chunk), kept in the storage dtype; then
    dW[chunk] = G^T X      dX += G W[chunk]
The chunk is as wide as bounded scratch allows, and each dW is summed over all tokens in one float32
accumulator; dX, where there are several chunks, in a float32 tensor. So loss and gradients cost four
products, where keeping float32 logits of a block of tokens would cost three, but sum dW block by block
in memory: with blocks of 512 tokens, that traffic takes three quarters of the products' time on an H100.
Sums go in an order that the shapes fix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.cross_entropy import token_shape
from fastlm.triton.device import narrow
from fastlm.triton.launch import Config, Kernel, cdiv, current_target, dot_precision
from fastlm.triton.matmul import matmul, matrix_configs, product, tile_of
from fastlm.triton.token_loss import (
    NONE,
    Loss,
    capped,
    coefficients,
    finite,
    logits_gradient,
    read_loss,
    smoothed,
    store_token,
)  # fmt: skip

SCRATCH = 128 << 20  # bytes of G at most, if a chunk of 256 classes fits


@triton.jit
def _logits_tile(
    x, w, b, n, c, N, C, D, x_n, x_d, w_c, w_d, b_c, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Logits of the tokens n (BM) and the classes c (BN), capped."""
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    v = product(
        x + n[:, None] * x_n,
        w + c[None, :] * w_c,
        D,
        x_d,
        w_d,
        n < N,
        c < C,
        tl.zeros([BM, BN], T),
        PRECISION,
        BK,
    )
    if b is not None:
        v += tl.load(b + c * b_c, c < C, 0).to(T)[None, :]
    if CAPPED:
        v = capped(v, softcap)
    return v


@triton.jit
def _segments_kernel(
    x, w, b, target, weight, partial, N, C, D, S, span, x_n, x_d, w_c, w_s, w_d, b_c, b_s, q_n, q_c, q_s,
    ignore_index, smoothing: tl.float64, softcap: tl.float64, INDICES: tl.constexpr, SMOOTHING: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial (5, segments, N * S): maximum, sum of exponentials, logit of the target, mass, dot."""
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(N, BM)
    segments = tl.num_programs(0) // (blocks * S)
    pid = tl.program_id(0)
    n = (pid % blocks).to(tl.int64) * BM + tl.arange(0, BM)
    segment, head = pid // blocks % segments, (pid // blocks // segments).to(tl.int64)
    inside = n < N
    i = n * S + head
    w += head * w_s
    if b is not None:
        b += head * b_s
    y = tl.zeros([BM], tl.int64)
    if INDICES:
        y = tl.load(target + i, inside, ignore_index)
    m, total = tl.full([BM], float("-inf"), T), tl.zeros([BM], T)
    x_y, mass, dot = tl.zeros([BM], T), tl.zeros([BM], T), tl.zeros([BM], T)
    for first in range(segment * span, tl.minimum(segment * span + span, C), BN):
        c = first + tl.arange(0, BN).to(tl.int64)
        v = _logits_tile(
            x, w, b, n, c, N, C, D, x_n, x_d, w_c, w_d, b_c, softcap, CAPPED, PRECISION, BM, BN, BK
        )
        used = (c < C)[None, :]
        if INDICES:
            x_y += tl.sum(tl.where(c[None, :] == y[:, None], v, 0), 1)
        v = tl.where(used, v, float("-inf"))
        old, m = m, tl.maximum(m, tl.max(v, 1))
        new = finite(m)
        total = total * tl.exp(old - new) + tl.sum(tl.exp(v - new[:, None]), 1)
        if SMOOTHING or not INDICES:
            share = tl.where(used & inside[:, None], tl.full([1, 1], 1, T), 0)
            if not INDICES:
                q = tl.load(target + n[:, None] * q_n + head * q_s + c[None, :] * q_c,
                            used & inside[:, None], 0).to(T)  # fmt: skip
                share = share * smoothed(q, C, smoothing)
            if weight is not None:
                share = share * tl.load(weight + c, c < C, 0)[None, :]
            dot += mass * (finite(old) - new) + tl.sum(tl.where(used, share * (v - new[:, None]), 0), 1)
            mass += tl.sum(share, 1)
    count = tl.cast(N, tl.int64) * S
    at = partial + segment * count + i
    step = segments * count
    tl.store(at, m, inside)
    tl.store(at + step, total, inside)
    if INDICES:
        tl.store(at + 2 * step, x_y, inside)
    if SMOOTHING or not INDICES:
        tl.store(at + 3 * step, mass, inside)
        tl.store(at + 4 * step, dot, inside)


@triton.jit
def _join_kernel(
    partial, target, weight, loss, lse, low, count, segments, C, ignore_index, smoothing: tl.float64,
    z_loss: tl.float64, INDICES: tl.constexpr, SMOOTHING: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = partial.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = i < count
    kept = inside
    w_y = tl.full([TOKENS], 1, T)
    if INDICES:
        y = tl.load(target + i, inside, ignore_index)
        kept = inside & (y != ignore_index) & (y >= 0) & (y < C)
        if weight is not None:
            w_y = tl.load(weight + y, kept, 0)
    m, total = tl.full([TOKENS], float("-inf"), T), tl.zeros([TOKENS], T)
    x_y, mass, dot = tl.zeros([TOKENS], T), tl.zeros([TOKENS], T), tl.zeros([TOKENS], T)
    count = tl.cast(count, tl.int64)
    step = segments * count
    for segment in range(segments):
        at = partial + segment * count + i
        top = tl.load(at, inside, 0)
        old, m = m, tl.maximum(m, top)
        new = finite(m)
        total = total * tl.exp(old - new) + tl.load(at + step, inside, 0) * tl.exp(top - new)
        if INDICES:
            x_y += tl.load(at + 2 * step, inside, 0)
        if SMOOTHING or not INDICES:
            share = tl.load(at + 3 * step, inside, 0)
            dot += (
                mass * (finite(old) - new) + share * (finite(top) - new) + tl.load(at + 4 * step, inside, 0)
            )
            mass += share
    store_token(
        loss,
        lse,
        low,
        i,
        inside,
        inside,
        kept,
        m,
        total,
        x_y,
        w_y,
        mass,
        dot,
        C,
        smoothing,
        z_loss,
        INDICES,
        SMOOTHING,
    )


@triton.jit
def _gradient_kernel(
    x, w, b, target, weight, weight_sum, mass, scale, dloss, dlse, lse, low, g,
    N, C, D, S, head, start, width, x_n, x_d, w_c, w_d, b_c, q_n, q_c, g_n,
    ignore_index, smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64, INDICES: tl.constexpr,
    SMOOTHING: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """g (N, width): the gradient of the logits of one head and the classes from `start` on."""
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row, column = tile_of(N, width, BM, BN, GROUP)
    n = row.to(tl.int64) * BM + tl.arange(0, BM)
    at = column.to(tl.int64) * BN + tl.arange(0, BN)
    c = at + start
    v = _logits_tile(x, w, b, n, c, N, C, D, x_n, x_d, w_c, w_d, b_c, softcap, CAPPED, PRECISION, BM, BN, BK)
    inside = n < N
    i = n * S + head
    used = inside[:, None] & (at < width)[None, :]
    a, rest = tl.load(lse + i, inside, 0), tl.load(low + i, inside, 0)
    y, w_y, kept = tl.zeros([BM], tl.int64), tl.full([BM], 1, T), inside
    part, q, share = tl.zeros([BM], T), None, None
    if INDICES:
        y = tl.load(target + i, inside, ignore_index)
        kept = inside & (y != ignore_index) & (y >= 0) & (y < C)
        if weight is not None:
            w_y = tl.load(weight + y, kept, 0)
    else:
        part = tl.load(mass + i, inside, 0)
        q = tl.load(target + n[:, None] * q_n + c[None, :] * q_c, used, 0).to(T)
    if weight is not None:
        share = tl.load(weight + c, at < width, 0)[None, :]
    softmax, onehot, smooth, probs, active = coefficients(
        i,
        inside,
        kept,
        w_y,
        a,
        part,
        weight_sum,
        scale,
        dloss,
        dlse,
        C,
        smoothing,
        z_loss,
        INDICES,
        SMOOTHING,
    )
    grad = logits_gradient(
        v,
        c[None, :],
        y,
        share,
        q,
        a,
        rest,
        softmax,
        onehot,
        smooth,
        probs,
        active,
        C,
        softcap,
        smoothing,
        INDICES,
        SMOOTHING,
        CAPPED,
    )
    tl.store(g + n[:, None] * g_n + at[None, :], narrow(grad, g.dtype.element_ty), used)


@triton.jit
def _mass_kernel(
    q, weight, mass, N, C, S, q_n, q_c, q_s, smoothing: tl.float64, TOKENS: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    """mass (N * S) = sum_c w_c q'_c."""
    T: tl.constexpr = mass.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = i < tl.cast(N, tl.int64) * S
    q += ((i // S) * q_n + (i % S) * q_s)[:, None]
    sums = tl.zeros([TOKENS], T)
    for first in range(0, C, CLASSES):
        c = first + tl.arange(0, CLASSES).to(tl.int64)[None, :]
        used = inside[:, None] & (c < C)
        share = smoothed(tl.load(q + c * q_c, used, 0).to(T), C, smoothing)
        if weight is not None:
            share = share * tl.load(weight + c, c < C, 0)
        sums += tl.sum(tl.where(used, share, 0), 1)
    tl.store(mass + i, sums, inside)


def _segment_configs(target, dtype, INDICES, SMOOTHING, CAPPED, **constants):
    """A tile of logits in registers and its exponentials beside it: half as wide as that of a product,
    but where the loss is plain and the target spares the registers."""
    plain = INDICES and not SMOOTHING and not CAPPED and target.arch != 100
    configs = []
    for blocks, warps, stages in matrix_configs(target, dtype):
        tile = {name: blocks[name] for name in ("BM", "BN", "BK")}
        if tile["BN"] == 128 and not plain:
            tile["BN"] = 64
        configs.append(Config(tile, warps, stages))
    return configs


_segments = Kernel(_segments_kernel, _segment_configs)
_gradient = Kernel(_gradient_kernel, matrix_configs)
_join = Kernel(_join_kernel, lambda target, dtype, **_: [Config(dict(TOKENS=128))], matrix=False)
_mass = Kernel(_mass_kernel, lambda target, dtype, **_: [Config(dict(TOKENS=4, CLASSES=1024))], matrix=False)


def _logits_shape(input: Tensor, linear_weight: Tensor) -> list[int]:
    return [*input.shape[:-1], *linear_weight.shape[:-1]]


def _as_heads(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, loss: Loss):
    """input (N, D), linear_weight (C, S, D), linear_bias (C, S)."""
    D = input.shape[-1]
    return (
        input.reshape(loss.N, D),
        linear_weight.reshape(loss.C, loss.S, D),
        None if linear_bias is None else linear_bias.reshape(loss.C, loss.S),
    )


def _forward(loss: Loss, x: Tensor, w: Tensor, b: Tensor | None, options: tuple, ignore_index: int):
    """Losses, lse and low of all tokens."""
    label_smoothing, z_loss, softcap = options
    N, C, S = loss.N, loss.C, loss.S
    # About 512 programs, from the shapes alone; a segment is whole tiles of any configuration.
    segments = max(1, 512 // max(1, cdiv(N, 128) * S))
    span = max(256, cdiv(cdiv(C, segments), 256) * 256)
    segments = cdiv(C, span)
    partial = x.new_empty((5, segments, N * S), dtype=loss.compute)
    each, lse, low = (loss.new(x) for _ in range(3))
    flags = dict(INDICES=loss.indices, SMOOTHING=label_smoothing > 0)
    _segments(
        lambda t: (cdiv(N, t["BM"]) * segments * S,),
        x, w, b, loss.target, loss.weight, partial, N, C, x.shape[1], S, span, *x.stride(), *w.stride(),
        *((0, 0) if b is None else b.stride()), *loss.probs_strides, ignore_index, label_smoothing, softcap,
        sizes=(N, C, x.shape[1]), **flags, CAPPED=softcap != 0,
        PRECISION=dot_precision(x.dtype, current_target(x.device)),
    )  # fmt: skip
    _join(
        lambda t: (cdiv(N * S, t["TOKENS"]),),
        partial, loss.target, loss.weight, each, lse, low, N * S, segments, C, ignore_index,
        label_smoothing, z_loss, **flags,
    )  # fmt: skip
    return each, lse, low


def _probability_mass(loss: Loss, label_smoothing: float) -> Tensor | None:
    if loss.indices:
        return None
    mass = loss.new(loss.target)
    _mass(
        lambda t: (cdiv(loss.N * loss.S, t["TOKENS"]),),
        loss.target, loss.weight, mass, loss.N, loss.C, loss.S, *loss.target.stride(), label_smoothing,
    )  # fmt: skip
    return mass


def _backward(
    loss: Loss, x: Tensor, w: Tensor, b: Tensor | None, lse: Tensor, low: Tensor, scale: Tensor | None,
    dloss: Tensor | None, dlse: Tensor | None, options: tuple, ignore_index: int,
    dx: Tensor | None, dw: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    """Fills dx (N, D), dw (C, S, D) and db (C, S), each None unless wanted."""
    label_smoothing, z_loss, softcap = options
    N, C, S, D = loss.N, loss.C, loss.S, x.shape[1]
    width = min(C, max(256, SCRATCH // max(1, N * x.element_size()) // 256 * 256))
    chunks = [(s, c) for s in range(S) for c in range(0, C, width)]
    g = x.new_empty((N, width))
    mass = _probability_mass(loss, label_smoothing)
    # What is common to all tokens is multiplied behind the products: G stays well inside of float16.
    # The mean over no token has a scale of infinity, and no gradient.
    within, behind = (scale, None) if dlse is not None else (None, scale)
    if behind is not None:
        behind = torch.where(behind.isfinite(), behind, 0) if loss.denominator is not None else behind
    sums = dx
    if dx is not None and len(chunks) > 1 and dx.dtype != loss.compute:
        sums = torch.empty_like(dx, dtype=loss.compute)
    for index, (s, first) in enumerate(chunks):
        end = min(C, first + width)
        part = g[:, : end - first]
        head = w[:, s]
        bias = None if b is None else b[:, s]
        q = loss.target if loss.indices else loss.target[:, :, s]
        _gradient(
            lambda t, n=end - first: (cdiv(N, t["BM"]) * cdiv(n, t["BN"]),),
            x, head, bias, q, loss.weight, loss.weight_sum, mass, within, dloss, dlse, lse, low, part,
            N, C, D, S, s, first, end - first, *x.stride(), *head.stride(), 0 if b is None else bias.stride(0),
            *((0, 0) if loss.indices else q.stride()), g.stride(0),
            ignore_index, label_smoothing, z_loss, softcap,
            sizes=(N, end - first, D), INDICES=loss.indices, SMOOTHING=label_smoothing > 0,
            CAPPED=softcap != 0, PRECISION=dot_precision(x.dtype, current_target(x.device)),
        )  # fmt: skip
        if dw is not None:
            matmul(part.t(), x, dw[first:end, s], scale=behind)
        if dx is not None:
            to = dx if index == len(chunks) - 1 else sums
            matmul(part, head[first:end], to, scale=behind, addend=sums if index else None)
        if db is not None:
            column = part.sum(0, dtype=loss.compute)
            db[first:end, s] = column if behind is None else column * behind.to(column.dtype)


def _new_gradients(tensors: tuple, wanted: tuple) -> list[Tensor]:
    return [
        tensors[0].new_empty(t.shape if w and t is not None else 0)
        for t, w in zip(tensors, wanted, strict=True)
    ]


def _fill_gradients(loss: Loss, tensors: tuple, wanted: tuple, *arguments) -> list[Tensor]:
    """Gradients to input, linear_weight and linear_bias, each empty unless wanted."""
    grads = _new_gradients(tensors, wanted)
    if any(wanted):
        x, w, b = _as_heads(*tensors, loss)
        dx, dw, db = (
            g.view(like.shape) if want else None
            for g, like, want in zip(grads, (x, w, b), wanted, strict=True)
        )
        _backward(loss, x, w, b, *arguments, dx, dw, db)
    return grads


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    reduction: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    full_precision: bool, input_gradient: bool, weight_gradient: bool, bias_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = (input_gradient, weight_gradient, bias_gradient and linear_bias is not None)
    assert not any(wanted) or reduction != NONE, "the upstream gradient must be known"
    shape = _logits_shape(input, linear_weight)
    loss = read_loss("linear_cross_entropy", shape, input.dtype, target, weight, reduction, ignore_index)
    options = (label_smoothing, z_loss, softcap)
    tensors = (input, linear_weight, linear_bias)
    each, lse, low = _forward(loss, *_as_heads(*tensors, loss), options, ignore_index)
    scale, dloss = loss.upstream(None) if any(wanted) else (None, None)
    grads = _fill_gradients(loss, tensors, wanted, lse, low, scale, dloss, None, options, ignore_index)
    tokens = token_shape(torch.Size(shape))
    dtype = loss.compute if full_precision else input.dtype
    return loss.finish(each, tokens, dtype), lse.view(tokens), low.view(tokens), *grads


def linear_cross_entropy_backward(
    dloss: Tensor, dlse: Tensor | None, input: Tensor, linear_weight: Tensor, target: Tensor,
    linear_bias: Tensor | None, weight: Tensor | None, lse: Tensor, low: Tensor, reduction: int,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, input_gradient: bool,
    weight_gradient: bool, bias_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = (input_gradient, weight_gradient, bias_gradient and linear_bias is not None)
    loss = read_loss(
        "linear_cross_entropy_backward", _logits_shape(input, linear_weight), input.dtype, target, weight,
        reduction, ignore_index,
    )  # fmt: skip
    scale, dloss = loss.upstream(dloss)
    return tuple(
        _fill_gradients(
            loss, (input, linear_weight, linear_bias), wanted, lse.contiguous(), low.contiguous(), scale,
            dloss, None if dlse is None else dlse.contiguous(), (label_smoothing, z_loss, softcap),
            ignore_index,
        )
    )  # fmt: skip
