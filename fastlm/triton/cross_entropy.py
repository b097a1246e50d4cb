"""Softmax cross-entropy over logits x (N, C, S), any strides; the formulas stand in token_loss.py.

A program takes a tile of tokens, one alone where classes are contiguous and many, and sweeps over
their classes: running maximum, sum of exponentials rescaled to it (Milakov and Gimelshein,
arXiv:1805.02867), and the sums that smoothing or probabilities need. Where the upstream gradient is
known in the forward, a second sweep writes the gradient while the logits are in the L2 cache.
Kept for the backward: lse and low, two numbers a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.cross_entropy import token_shape
from fastlm.triton.device import narrow
from fastlm.triton.launch import Config, Kernel, cdiv, next_power_of_2
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


@triton.jit
def _cross_entropy_kernel(
    x, target, weight, weight_sum, scale, dloss, dlse, loss, lse, low, dx, dtarget, C, S,
    x_n, x_c, x_s, q_n, q_c, q_s, dx_n, dx_c, dx_s, dq_n, dq_c, dq_s,
    ignore_index, smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    FORWARD: tl.constexpr, LSE_EVERYWHERE: tl.constexpr, INDICES: tl.constexpr,
    SMOOTHING: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(CLASSES <= WIDTH)  # with ROWS, what the configurations go by
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(S, TOKENS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    s = (tl.program_id(0) % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = s < S
    i = n * S + s
    x += n * x_n + s[:, None] * x_s
    y = tl.zeros([TOKENS], tl.int64)
    w_y = tl.full([TOKENS], 1, T)
    kept = inside
    if INDICES:
        y = tl.load(target + i, inside, ignore_index)
        kept = (y != ignore_index) & (y >= 0) & (y < C)
        if weight is not None:
            w_y = tl.load(weight + y, kept, 0)
    else:
        target += n * q_n + s[:, None] * q_s

    mass, dot = tl.zeros([TOKENS], T), tl.zeros([TOKENS], T)
    if FORWARD:
        stored = inside if LSE_EVERYWHERE else kept
        m, total = tl.full([TOKENS], float("-inf"), T), tl.zeros([TOKENS], T)
        end = tl.where(tl.max(stored.to(tl.int32)) > 0, C, 0)  # nothing to read for ignored tokens
        for first in range(0, end, CLASSES):
            c = first + tl.arange(0, CLASSES).to(tl.int64)[None, :]
            used = stored[:, None] & (c < C)
            v = tl.load(x + c * x_c, used, float("-inf")).to(T)
            if CAPPED:
                v = tl.where(used, capped(v, softcap), float("-inf"))
            old, m = m, tl.maximum(m, tl.max(v, 1))
            new = finite(m)
            total = total * tl.exp(old - new) + tl.sum(tl.exp(v - new[:, None]), 1)
            if SMOOTHING or not INDICES:
                share = used.to(T)
                if not INDICES:
                    q = tl.load(target + c * q_c, used, 0).to(T)
                    share = tl.where(used, smoothed(q, C, smoothing), 0)
                if weight is not None:
                    share = share * tl.load(weight + c, c < C, 0)
                dot += mass * (finite(old) - new) + tl.sum(tl.where(used, share * (v - new[:, None]), 0), 1)
                mass += tl.sum(share, 1)
        x_y = tl.zeros([TOKENS], T)
        if INDICES:
            x_y = tl.load(x + y[:, None] * x_c, kept[:, None], 0).to(T)
            if CAPPED:
                x_y = capped(x_y, softcap)
            x_y = tl.sum(x_y, 1)
        a, b = store_token(
            loss,
            lse,
            low,
            i,
            inside,
            stored,
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
    else:
        a, b = tl.load(lse + i, inside, 0), tl.load(low + i, inside, 0)
        if not INDICES and dx is not None:
            mass = _mass(target, q_c, weight, inside, C, smoothing, T, TOKENS, CLASSES)

    if dx is not None or dtarget is not None:
        softmax, onehot, smooth, probs, active = coefficients(
            i,
            inside,
            kept,
            w_y,
            a,
            mass,
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
        if dx is not None:
            dx += n * dx_n + s[:, None] * dx_s
        if dtarget is not None:
            dtarget += n * dq_n + s[:, None] * dq_s
        for first in range(0, C, CLASSES):
            c = first + tl.arange(0, CLASSES).to(tl.int64)[None, :]
            used = inside[:, None] & (c < C)
            v = tl.load(x + c * x_c, used & active[:, None], 0).to(T)
            if CAPPED:
                v = capped(v, softcap)
            w, q = None, None
            if weight is not None:
                w = tl.load(weight + c, c < C, 0)
            if dx is not None:
                if not INDICES:
                    q = tl.load(target + c * q_c, used, 0).to(T)
                grad = logits_gradient(
                    v,
                    c,
                    y,
                    w,
                    q,
                    a,
                    b,
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
                tl.store(dx + c * dx_c, narrow(grad, dx.dtype.element_ty), used)
            if dtarget is not None:
                rest = (1 - tl.full([1, 1], smoothing, T)) * probs[:, None]
                grad = rest * ((a[:, None] - v) + b[:, None])
                if weight is not None:
                    grad = grad * w
                grad = tl.where(active[:, None], grad, 0)
                tl.store(dtarget + c * dq_c, narrow(grad, dtarget.dtype.element_ty), used)


@triton.jit
def _mass(q, q_c, weight, inside, C, smoothing, T: tl.constexpr, TOKENS: tl.constexpr,
          CLASSES: tl.constexpr):  # fmt: skip
    """sum_c w_c q'_c of the tokens that the pointers q (TOKENS, 1) stand at."""
    mass = tl.zeros([TOKENS], T)
    for first in range(0, C, CLASSES):
        c = first + tl.arange(0, CLASSES).to(tl.int64)[None, :]
        used = inside[:, None] & (c < C)
        share = smoothed(tl.load(q + c * q_c, used, 0).to(T), C, smoothing)
        if weight is not None:
            share = share * tl.load(weight + c, c < C, 0)
        mass += tl.sum(tl.where(used, share, 0), 1)
    return mass


def _configs(target, dtype, ROWS, WIDTH, SMOOTHING, CAPPED, INDICES, **constants):
    """16 logits a thread, which loads of 16 bytes fill and registers hold with all options; 32 in the
    plain case. Where positions, not classes, are contiguous, a tile has at least 32 tokens."""
    plain = INDICES and not SMOOTHING and not CAPPED
    configs = []
    for elements, warps in ((4096, 8), (8192 if plain else 4096, 8), (2048, 4)):
        tokens = 1 if ROWS else 64
        classes = min(WIDTH, elements // tokens)
        config = Config(dict(TOKENS=min(elements // classes, 64), CLASSES=classes), warps)
        if config not in configs:
            configs.append(config)
    return configs


_cross_entropy = Kernel(_cross_entropy_kernel, _configs, matrix=False)


def _merged(x: Tensor, loss: Loss) -> Tensor:
    """x as (N, C, S), a copy where its trailing dimensions are not one."""
    return x.reshape(loss.N, loss.C, loss.S)


def _tokens_last(N: int, S: int, views: list[Tensor]) -> tuple[int, int, list[tuple[int, int, int]]]:
    """N, S and the strides of each view; tokens of a plain matrix are its positions."""
    if S > 1:
        return N, S, [v.stride() for v in views]
    return 1, N, [(0, v.stride(1), v.stride(0)) for v in views]


def _run(
    loss: Loss, input: Tensor, outputs: tuple, saved: tuple, options: tuple, ignore_index: int,
    scale, dloss, dlse, forward: bool, return_lse: bool, input_gradient: bool, target_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to input, laid out as it, and to probabilities, contiguous; each empty unless wanted."""
    label_smoothing, z_loss, softcap = options
    x = _merged(input, loss)
    dinput = torch.empty_like(input) if input_gradient else None
    dx = None if dinput is None else _merged(dinput, loss)
    apart = dinput is not None and dx.data_ptr() != dinput.data_ptr()  # a copy: written back below
    dtarget = None
    if target_gradient:
        dtarget = input.new_empty((loss.N, loss.C, loss.S))
    views = (x, None if loss.indices else loss.target, dx, dtarget)
    N, S, strides = _tokens_last(loss.N, loss.S, [x if v is None else v for v in views])
    _cross_entropy(
        lambda blocks: (N * cdiv(S, blocks["TOKENS"]),),
        x, loss.target, loss.weight, loss.weight_sum, scale, dloss, dlse, *outputs, *saved, dx, dtarget,
        loss.C, S, *strides[0], *strides[1], *strides[2], *strides[3],
        ignore_index, label_smoothing, z_loss, softcap,
        sizes=(loss.C,), FORWARD=forward, LSE_EVERYWHERE=return_lse, INDICES=loss.indices,
        SMOOTHING=label_smoothing > 0, CAPPED=softcap != 0, ROWS=strides[0][1] == 1 or loss.C == 1,
        WIDTH=min(next_power_of_2(max(loss.C, 16)), 16384),
    )  # fmt: skip
    if apart:
        dinput.copy_(dx.view(dinput.shape))
    return (
        input.new_empty(0) if dinput is None else dinput,
        input.new_empty(0) if dtarget is None else dtarget.view(input.shape),
    )


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, return_lse: bool, full_precision: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert not gradient or (reduction != NONE and not return_lse), "the upstream gradient must be known"
    loss = read_loss("cross_entropy", input.shape, input.dtype, target, weight, reduction, ignore_index)
    shape = token_shape(input.shape)
    each, lse, low = (loss.new(input) for _ in range(3))
    scale, _ = loss.upstream(None) if gradient else (None, None)
    dinput, _ = _run(
        loss, input, (each,), (lse, low), (label_smoothing, z_loss, softcap), ignore_index,
        scale, None, None, True, return_lse, gradient, False,
    )  # fmt: skip
    dtype = loss.compute if full_precision else input.dtype
    return loss.finish(each, shape, dtype), lse.view(shape), low.view(shape), dinput


def cross_entropy_backward(
    dloss: Tensor, dlse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
    low: Tensor, reduction: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    input_gradient: bool, target_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = read_loss(
        "cross_entropy_backward", input.shape, input.dtype, target, weight, reduction, ignore_index
    )
    scale, dloss = loss.upstream(dloss)
    dlse = None if dlse is None else dlse.contiguous()
    return _run(
        loss, input, (None,), (lse.contiguous(), low.contiguous()), (label_smoothing, z_loss, softcap),
        ignore_index, scale, dloss, dlse, False, False, input_gradient, target_gradient,
    )  # fmt: skip


# ---- gradients that the forward left -------------------------------------------------------


@triton.jit
def _scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    """x *= factor; where that is 1, as it mostly is, nothing else is read."""
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    by = tl.load(factor).to(T)
    if by != 1:
        step = tl.num_programs(0) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            i = first + tl.arange(0, BLOCK)
            v = tl.load(x + i, i < count, 0).to(T) * by
            tl.store(x + i, narrow(v, x.dtype.element_ty), i < count)


_scale = Kernel(_scale_kernel, lambda target, dtype: [Config(dict(BLOCK=2048))], matrix=False)


def scale_(gradients: list[Tensor], factor: Tensor) -> None:
    for x in gradients:
        n = x.numel()
        flat = x.as_strided((n,), (1,))  # dense, of any layout
        _scale(lambda blocks, n=n: (min(cdiv(n, blocks["BLOCK"]), 1024),), flat, factor, n)
