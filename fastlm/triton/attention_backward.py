"""Attention backward (FlashAttention-2, arXiv:2307.08691): scores and weights are computed again from lse.

With P and keep as in the forward and delta_i = sum_d dO O - dlse_i, the gradient of S is

    dS = P (keep dO V^T - delta),  dV = (keep P)^T dO,  dK = scale dS'^T Q,  dQ = scale dS' K

where dS' has passed softcap's derivative. A program owns a block of keys and sums dK and dV over the rows
that see it; another kernel owns a block of rows and sums dQ over keys. So nothing is added atomically, and
the same inputs give the same bits. The gradient of a mask has a kernel of its own, in
attention_mask_gradient.py.

Rows behind the last one have lse = inf, hence weights of 0: no other mask of rows is needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton.attention import (
    Call,
    blocks_of_keys,
    check_lengths,
    empty_as,
    kept,
    load_lse,
    load_rows,
    rows_close,
    sequence,
    store_rows,
    tile_gradients,
)
from fastlm.triton.attention_mask_gradient import mask_gradient
from fastlm.triton.device import LOG2E, dot, narrow, widen
from fastlm.triton.launch import Config, Kernel, Target, cdiv

SCALARS = ("seed", "drop_below", "Hkv", "Tq", "Tk", "left", "right", "rows_most", "keys_most")


# ---- delta ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "H"])
def _attention_delta(
    out, dout, dlse, delta, ob, oh, ot, gb, gh, gt, lb, lh, lt, T, H, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, H, T), contiguous, from out and dout (B, H, T, DV) and dlse (B, H, T) by strides."""
    blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    i = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    bh = (pid // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    there = i < T
    i64 = i.to(tl.int64)
    o = load_rows(out, b * ob + h * oh + i64 * ot, there, DV, BLOCK_DV)
    g = load_rows(dout, b * gb + h * gh + i64 * gt, there, DV, BLOCK_DV)
    sums = tl.sum(widen(o) * widen(g), 1)
    if HAS_DLSE:
        sums -= tl.load(dlse + b * lb + h * lh + i64 * lt, mask=there, other=0.0)
    tl.store(delta + bh * T + i, sums, mask=there)


# ---- dK and dV -----------------------------------------------------------------------------


@triton.jit
def add_rows(
    dk, dv, k, v, start, j, hkv, b, q0, nq, nk, lower, upper, q, dout, lse, delta, mask, slopes, seed,
    drop_below, qb, qh, qt, gb, gh, gt, lb, lh, mb, mh, mq, mk, Hkv, j0, scale, softcap, keep_scale,
    EDGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, LEFT: tl.constexpr, UPPER: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what the rows from `start` give. Tiles are (keys, rows)."""
    r = start + tl.arange(0, BLOCK_M)
    there = r < nq * GROUP
    i = r // GROUP
    h = hkv * GROUP + r % GROUP
    heads = b * Hkv * GROUP + h
    i64 = (q0 + i).to(tl.int64)
    h64 = h.to(tl.int64)
    b64 = b.to(tl.int64)
    rows_lse = b64 * lb + h64 * lh + i64
    lse_r = load_lse(lse, rows_lse, there)
    delta_r = tl.load(delta + rows_lse, mask=there, other=0.0)
    mask_rows = mask
    slope = 0.0
    if MASK != 0:
        mask_rows = (b64 * mb + h64 * mh + i.to(tl.int64) * mq)[None, :]
    if ALIBI:
        slope = (tl.load(slopes + heads, mask=there, other=0.0) * LOG2E)[None, :]
    q_r = load_rows(q, b64 * qb + h64 * qh + i64 * qt, there, D, BLOCK_D)
    dout_r = load_rows(dout, b64 * gb + h64 * gh + i64 * gt, there, DV, BLOCK_DV)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    qk = dot(k, tl.trans(q_r), zeros, PRECISION)
    dp = dot(v, tl.trans(dout_r), zeros, PRECISION)
    keep = zeros
    if DROPOUT:
        keep = tl.trans(kept(seed, i, heads, j0, drop_below, BLOCK_M, BLOCK_N))
    met, _, dqk = tile_gradients(
        qk, dp, i[None, :], j[:, None], heads, keep, nq, nk, lower, upper, mask, mask_rows, mk, slope, scale,
        softcap, lse_r[None, :], delta_r[None, :], keep_scale, EDGE, LEFT, UPPER, MASK, ALIBI, SOFTCAP, DROPOUT,
    )  # fmt: skip
    dv = dot(narrow(met, dout_r.dtype), dout_r, dv, PRECISION)
    dk = dot(narrow(dqk, q_r.dtype), q_r, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SCALARS)
def _attention_dkdv(
    dk, dv, dout, lse, delta, dkb, dkh, dkt, dvb, dvh, dvt, gb, gh, gt, lb, lh, keep_scale, keys_most,
    q, k, v, mask, slopes, cu_q, cu_k, used, table, seed, drop_below, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    mb, mh, mq, mk, page_size, k_page, v_page, table_b, Hkv, Tq, Tk, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr, PAGED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UPPER: tl.constexpr = RIGHT or CAUSAL
    n_blocks = tl.cdiv(keys_most, BLOCK_N)
    pid = tl.program_id(0)
    j0 = pid % n_blocks * BLOCK_N  # the first keys of a causal sequence are seen by the most rows
    pid = pid // n_blocks
    hkv = pid % Hkv
    b = pid // Hkv
    q0, k0, nq, nk, lower, upper = sequence(
        b, cu_q, cu_k, used, Tq, Tk, left, right, CAUSAL, LEFT, RIGHT, PACKED
    )
    if j0 >= nk:
        return
    j = j0 + tl.arange(0, BLOCK_N)
    inside = j < nk
    b64, hkv64 = b.to(tl.int64), hkv.to(tl.int64)
    j64 = (k0 + j).to(tl.int64)
    k_j = load_rows(k, b64 * kb + hkv64 * kh + j64 * kt, inside, D, BLOCK_D)
    v_j = load_rows(v, b64 * vb + hkv64 * vh + j64 * vt, inside, DV, BLOCK_DV)

    # Rows from lo to hi see some of these keys, those from full_lo to full_hi all.
    lo, hi = nq * 0, nq * GROUP
    full_lo, full_hi = lo, tl.cdiv(hi, BLOCK_M) * BLOCK_M
    if UPPER:
        lo = tl.maximum(j0 - upper, 0) * GROUP // BLOCK_M * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(tl.minimum(j0 + BLOCK_N, nk) - 1 - upper, 0) * GROUP, BLOCK_M) * BLOCK_M
    if LEFT:
        hi = tl.minimum(hi, tl.maximum(tl.minimum(j0 + BLOCK_N, nk) + lower, 0) * GROUP)
        full_hi = tl.minimum(full_hi, tl.maximum(j0 + lower + 1, 0) * GROUP // BLOCK_M * BLOCK_M)
    if full_hi <= full_lo:
        full_lo, full_hi = lo, lo
    before = (full_lo - lo) // BLOCK_M
    behind = tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK_M)

    dk_j = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_j = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for start in range(full_lo, full_hi, BLOCK_M):
        dk_j, dv_j = add_rows(
            dk_j, dv_j, k_j, v_j, start, j, hkv, b, q0, nq, nk, lower, upper, q, dout, lse, delta, mask,
            slopes, seed, drop_below, qb, qh, qt, gb, gh, gt, lb, lh, mb, mh, mq, mk, Hkv, j0, scale,
            softcap, keep_scale, False, D, DV, BLOCK_D, BLOCK_DV, GROUP, LEFT, UPPER, MASK, ALIBI, SOFTCAP,
            DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for n in range(0, before + behind):
        start = tl.where(n < before, lo + n * BLOCK_M, full_hi + (n - before) * BLOCK_M)
        dk_j, dv_j = add_rows(
            dk_j, dv_j, k_j, v_j, start, j, hkv, b, q0, nq, nk, lower, upper, q, dout, lse, delta, mask,
            slopes, seed, drop_below, qb, qh, qt, gb, gh, gt, lb, lh, mb, mh, mq, mk, Hkv, j0, scale,
            softcap, keep_scale, True, D, DV, BLOCK_D, BLOCK_DV, GROUP, LEFT, UPPER, MASK, ALIBI, SOFTCAP,
            DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    store_rows(dk, b64 * dkb + hkv64 * dkh + j64 * dkt, dk_j * scale, inside, D, BLOCK_D)
    store_rows(dv, b64 * dvb + hkv64 * dvh + j64 * dvt, dv_j, inside, DV, BLOCK_DV)


# ---- dQ ------------------------------------------------------------------------------------


@triton.jit
def add_keys(
    dq, sums, q, dout, lse, delta, start, i, heads, nq, nk, lower, upper, k_base, v_base, mask, mask_rows,
    slope, seed, drop_below, kt, vt, mk, scale, softcap, keep_scale,
    EDGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, UPPER: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to dq what the keys from `start` give, and to sums (rows) what SUMS asks for."""
    j = start + tl.arange(0, BLOCK_N)
    inside = j < nk
    k = load_rows(k_base, j.to(tl.int64) * kt, inside, D, BLOCK_D, not EDGE)
    v = load_rows(v_base, j.to(tl.int64) * vt, inside, DV, BLOCK_DV, not EDGE)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    qk = dot(q, tl.trans(k), zeros, PRECISION)
    dp = dot(dout, tl.trans(v), zeros, PRECISION)
    keep = zeros
    if DROPOUT:
        keep = kept(seed, i, heads, start, drop_below, BLOCK_M, BLOCK_N)
    _, ds, dqk = tile_gradients(
        qk, dp, i[:, None], j[None, :], heads, keep, nq, nk, lower, upper, mask, mask_rows, mk, slope, scale,
        softcap, lse[:, None], delta[:, None], keep_scale, EDGE, LEFT, UPPER, MASK, ALIBI, SOFTCAP, DROPOUT,
    )  # fmt: skip
    if SUMS == 2:
        sums += tl.sum(ds, 1)
    else:
        dq = dot(narrow(dqk, k.dtype), k, dq, PRECISION)
    if SUMS == 1:
        # From the nearest key that the band shows: a row's dS cancel, and rounding of them times what all
        # distances have in common would remain.
        distance = tl.abs(i[:, None] + (nk - nq) - j[None, :])
        if UPPER:
            distance -= tl.maximum(nk - nq - upper, 0)
        sums -= tl.sum(ds * distance.to(tl.float32), 1)
    return dq, sums


@triton.jit(do_not_specialize=SCALARS)
def _attention_dq(
    dq, sums, dout, lse, delta, dqb, dqh, dqt, gb, gh, gt, lb, lh, keep_scale, rows_most,
    q, k, v, mask, slopes, cu_q, cu_k, used, table, seed, drop_below, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    mb, mh, mq, mk, page_size, k_page, v_page, table_b, Hkv, Tq, Tk, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr, PAGED: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq by its strides. SUMS 1: and sums, laid out as lse, each row's share of the gradient of ALiBi's
    slope; 2: these only, sum_j P dP, which is delta without the rounding of out to 16 bits, and without
    dlse. delta is then not read."""
    UPPER: tl.constexpr = RIGHT or CAUSAL
    n_blocks = tl.cdiv(rows_most, BLOCK_M)
    pid = tl.program_id(0)
    block = n_blocks - 1 - pid % n_blocks
    pid = pid // n_blocks
    hkv = pid % Hkv
    b = pid // Hkv
    q0, k0, nq, nk, lower, upper = sequence(
        b, cu_q, cu_k, used, Tq, Tk, left, right, CAUSAL, LEFT, RIGHT, PACKED
    )
    rows = nq * GROUP
    first = block * BLOCK_M
    if first >= rows:
        return
    r = first + tl.arange(0, BLOCK_M)
    there = r < rows
    i = r // GROUP
    h = hkv * GROUP + r % GROUP
    heads = b * Hkv * GROUP + h
    b64, h64, hkv64 = b.to(tl.int64), h.to(tl.int64), hkv.to(tl.int64)
    i64 = (q0 + i).to(tl.int64)

    lo, hi = nk * 0, nk
    lo, full_lo, full_hi, before, behind = blocks_of_keys(
        lo, hi, first, nq, lower, upper, LEFT, UPPER, GROUP, BLOCK_M, BLOCK_N
    )

    q_r = load_rows(q, b64 * qb + h64 * qh + i64 * qt, there, D, BLOCK_D)
    dout_r = load_rows(dout, b64 * gb + h64 * gh + i64 * gt, there, DV, BLOCK_DV)
    rows_lse = b64 * lb + h64 * lh + i64
    lse_r = load_lse(lse, rows_lse, there)
    delta_r = tl.zeros([BLOCK_M], tl.float32)
    if SUMS != 2:
        delta_r = tl.load(delta + rows_lse, mask=there, other=0.0)
    mask_rows = mask
    slope = 0.0
    if MASK != 0:
        mask_rows = (b64 * mb + h64 * mh + i.to(tl.int64) * mq)[:, None]
    if ALIBI:
        slope = (tl.load(slopes + heads, mask=there, other=0.0) * LOG2E)[:, None]
    k_base = k + b64 * kb + hkv64 * kh + k0.to(tl.int64) * kt
    v_base = v + b64 * vb + hkv64 * vh + k0.to(tl.int64) * vt

    dq_r = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sums = tl.zeros([BLOCK_M], tl.float32)
    for start in range(full_lo, full_hi, BLOCK_N):
        dq_r, row_sums = add_keys(
            dq_r, row_sums, q_r, dout_r, lse_r, delta_r, start, i, heads, nq, nk, lower, upper, k_base, v_base,
            mask, mask_rows, slope, seed, drop_below, kt, vt, mk, scale, softcap, keep_scale, False, D, DV,
            BLOCK_D, BLOCK_DV, LEFT, UPPER, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, SUMS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for n in range(0, before + behind):
        start = tl.where(n < before, lo + n * BLOCK_N, full_hi + (n - before) * BLOCK_N)
        dq_r, row_sums = add_keys(
            dq_r, row_sums, q_r, dout_r, lse_r, delta_r, start, i, heads, nq, nk, lower, upper, k_base, v_base,
            mask, mask_rows, slope, seed, drop_below, kt, vt, mk, scale, softcap, keep_scale, True, D, DV,
            BLOCK_D, BLOCK_DV, LEFT, UPPER, MASK, ALIBI, SOFTCAP, DROPOUT, PRECISION, SUMS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if SUMS != 2:
        store_rows(dq, b64 * dqb + h64 * dqh + i64 * dqt, dq_r * scale, there, D, BLOCK_D)
    if SUMS != 0:
        tl.store(sums + rows_lse, row_sums, mask=there)


# ---- configurations ------------------------------------------------------------------------


def _configs(
    target: Target, dtype: torch.dtype, *, BLOCK_D, BLOCK_DV, MASK, SOFTCAP, DROPOUT, **_
) -> list[Config]:
    """For dK and dV: rows M stream past keys N."""

    def config(M, N, warps, stages):
        return Config({"BLOCK_M": M, "BLOCK_N": N}, warps, stages)

    if target.kind == "interpreter":
        return [config(64, 128, 1, 1)]
    size = max(BLOCK_D, BLOCK_DV)
    if dtype == torch.float32:
        return [config(32, 32, 4, 1)]
    if size > 128:  # of AMD's registers, 8 waves have half as many each
        return [config(32, 32, 4 if target.kind == "hip" else 8, 1)]
    if target.kind == "hip":
        return [config(32, 64, 4, 1)]
    if size > 64:
        return [config(32, 64, 8, 2)]
    if MASK or SOFTCAP or DROPOUT:  # these need registers
        return [config(32, 64, 8 if DROPOUT else 4, 2)]
    # Without wgmma the products' factors stand in registers too, and 64 rows leave none.
    rows = 64 if target.arch in (90, 100) else 32
    return [config(rows, 128, 8, 2), config(32, 64, 4, 2)]


def _dq_configs(target, dtype, **constants) -> list[Config]:
    """For dQ, rows M stay and keys N stream past."""
    return [
        Config({"BLOCK_M": c.blocks["BLOCK_N"], "BLOCK_N": c.blocks["BLOCK_M"]}, c.warps, c.stages)
        for c in _configs(target, dtype, **constants)
    ]


_delta = Kernel(
    _attention_delta,
    lambda target, dtype, BLOCK_DV, **_: [Config({"BLOCK_M": 2048 // BLOCK_DV or 1}, 4, 1)],
    False,
)
_dkdv = Kernel(_attention_dkdv, _configs)
_dq = Kernel(_attention_dq, _dq_configs)


# ---- operators -----------------------------------------------------------------------------


def _delta_of(c: Call, out: Tensor, dout: Tensor, dlse: Tensor | None, lse: Tensor) -> Tensor:
    """delta, laid out as lse."""
    B, T = (1 if c.packed else c.B), c.Tq
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    strides = (0, 0, 0)
    if dlse is not None:
        strides = (0, *dlse.stride()) if c.packed else dlse.stride()
    _delta(
        lambda blocks: (cdiv(T, blocks["BLOCK_M"]) * c.Hq * B,), out, dout, dlse, delta, *c.strides(out),
        *c.strides(dout), *strides, T, c.Hq, DV=c.DV, BLOCK_DV=c.constants["BLOCK_DV"],
        HAS_DLSE=dlse is not None,
    )  # fmt: skip
    return delta


def _run_dkdv(c: Call, dk, dv, dout, lse, delta, max_q: int, max_k: int) -> None:
    _dkdv(
        lambda blocks: (cdiv(max_k, blocks["BLOCK_N"]) * c.Hkv * c.B,), dk, dv, dout, lse, delta,
        *c.strides(dk), *c.strides(dv), *c.strides(dout), *c.lse_strides(lse), c.keep_scale, max_k,
        *c.arguments, sizes=(c.B * c.Hkv, c.group * max_q, max_k), **c.constants,
    )  # fmt: skip


def _run_dq(c: Call, dq, sums, dout, lse, delta, max_q: int, SUMS: int) -> None:
    rows = c.group * max_q
    _dq(
        lambda blocks: (cdiv(rows, blocks["BLOCK_M"]) * c.Hkv * c.B,), dq, sums, dout, lse, delta,
        *c.strides(dq), *c.strides(dout), *c.lse_strides(lse), c.keep_scale, rows, *c.arguments,
        sizes=(c.B * c.Hkv, rows, c.Tk), **c.constants, SUMS=SUMS,
    )  # fmt: skip


def attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool,
    scale: float, dlse: Tensor | None = None, attn_mask: Tensor | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0, left: int = -1,
    right: int = -1, softcap: float = 0.0, needs_mask: bool = False, needs_slopes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    c = Call(
        query, key, value, mask=attn_mask, slopes=alibi_slopes, seed=seed, dropout_p=dropout_p,
        is_causal=is_causal, left=left, right=right, scale=scale, softcap=softcap,
    )  # fmt: skip
    out, dout, lse = rows_close(out), rows_close(dout), lse.contiguous()
    dq, dk, dv = (empty_as(x, x.size(-1)) for x in (query, key, value))
    if (needs_mask or needs_slopes) and out.dtype != lse.dtype:  # their float32 shows the rounding of out
        delta = torch.empty_like(lse)
        _run_dq(c, dq, delta, dout, lse, lse, c.Tq, 2)
        if dlse is not None:
            delta.sub_(dlse)
    else:
        delta = _delta_of(c, out, dout, dlse, lse)
    shares = torch.empty_like(lse) if needs_slopes else None
    _run_dkdv(c, dk, dv, dout, lse, delta, c.Tq, c.Tk)
    _run_dq(c, dq, shares, dout, lse, delta, c.Tq, 1 if needs_slopes else 0)
    dmask = dslopes = dsinks = None
    if needs_mask:
        dmask = mask_gradient(c, attn_mask, dout, lse, delta)
    if needs_slopes:
        dslopes = shares.sum(-1)
    if sinks is not None:
        weights = torch.exp(sinks[:, None] - lse).masked_fill(lse == float("-inf"), 0.0)
        dsinks = -(weights * delta).sum((0, 2))
    return dq, dk, dv, dmask, dslopes, dsinks


def varlen_attention_backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, left: int, right: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_lengths(cu_q, cu_k, None, None, query, key, max_q, max_k)
    c = Call(query, key, value, left=left, right=right, scale=scale, cu_q=cu_q, cu_k=cu_k)
    out, dout, lse = rows_close(out), rows_close(dout), lse.contiguous()
    # Rows of no sequence have a gradient of 0.
    dq, dk, dv = (x.new_zeros(x.shape) for x in (query, key, value))
    delta = _delta_of(c, out, dout, dlse, lse)
    _run_dkdv(c, dk, dv, dout, lse, delta, max_q, max_k)
    _run_dq(c, dq, None, dout, lse, delta, max_q, 0)
    return dq, dk, dv
