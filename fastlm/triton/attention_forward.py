"""Attention forward: online softmax (arXiv:1805.02867), one program a block of rows (FlashAttention-2,
arXiv:2307.08691).

Blocks of keys out of the band are skipped; those wholly inside run without a comparison, those at its
edges with. Where a key head has few rows, as in decoding, its keys are split among programs, and a second
kernel joins their results. Kept for the backward: lse = log sum exp S per row.
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
    key_offsets,
    load_rows,
    logits,
    sequence,
    store_rows,
)
from fastlm.triton.device import LN2, LOG2E, dot, narrow
from fastlm.triton.launch import Config, Kernel, Target, cdiv, next_power_of_2

FEW_ROWS = 64  # rows of a key head up to which its keys are split
SPLIT_KEYS = tl.constexpr(1024)  # keys of a split at least, and a multiple of every block
MOST_SPLITS = 64

SCALARS = ("seed", "drop_below", "Hkv", "Tq", "Tk", "left", "right", "rows_most", "n_splits")


@triton.jit
def split_of(nk, n_splits):
    """How a sequence's keys are divided: the number of its splits, and the keys of each."""
    splits = tl.minimum(tl.maximum(tl.cdiv(nk, SPLIT_KEYS), 1), n_splits)
    return splits, tl.cdiv(tl.cdiv(nk, splits), 128) * 128


@triton.jit
def attend(
    acc, m, l, q, start, i, heads, nq, nk, lower, upper, k_base, v_base, mask, mask_rows, slope, table, seed,
    drop_below, kt, vt, mk, page_size, k_page, v_page, scale, softcap,
    EDGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr, UPPER: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PAGED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: rescales the sums acc and l from the maximum m to the new one, and adds to them."""
    j = start + tl.arange(0, BLOCK_N)
    inside = j < nk
    k = load_rows(
        k_base, key_offsets(j, nk, table, page_size, k_page, kt, PAGED), inside, D, BLOCK_D, not EDGE
    )
    qk = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
    s, _ = logits(
        qk, i[:, None], j[None, :], nq, nk, lower, upper, mask, mask_rows, mk, slope, scale, softcap,
        EDGE, LEFT, UPPER, MASK, ALIBI, SOFTCAP,
    )  # fmt: skip
    new = tl.maximum(m, tl.max(s, 1))
    zero = tl.where(new == float("-inf"), 0.0, new)  # of a row that has seen no key yet
    p = tl.exp2(s - zero[:, None])
    alpha = tl.exp2(m - zero)
    l = l * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(seed, i, heads, start, drop_below, BLOCK_M, BLOCK_N), p, 0.0)
    v = load_rows(
        v_base, key_offsets(j, nk, table, page_size, v_page, vt, PAGED), inside, DV, BLOCK_DV, not EDGE
    )
    acc = dot(narrow(p, v.dtype), v, acc * alpha[:, None], PRECISION)
    return acc, new, l


@triton.jit(do_not_specialize=SCALARS)
def _attention_forward(
    out, lse, part_out, part_lse, sinks, ob, oh, ot, lb, lh, keep_scale, rows_most, n_splits,
    q, k, v, mask, slopes, cu_q, cu_k, used, table, seed, drop_below, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    mb, mh, mq, mk, page_size, k_page, v_page, table_b, Hkv, Tq, Tk, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr, PAGED: tl.constexpr,
    PRECISION: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (B, H, T, DV) and lse by the strides given; with SPLIT instead, for each (b, key head, split,
    row), part_out (..., rows_most, DV) and part_lse (..., rows_most), in base 2. ROWS: rows of a key head
    in the split case, rounded up; else 0."""
    UPPER: tl.constexpr = RIGHT or CAUSAL
    pid = tl.program_id(0)
    split = pid % n_splits
    pid = pid // n_splits
    n_blocks = tl.cdiv(rows_most, BLOCK_M)
    block = n_blocks - 1 - pid % n_blocks  # the last queries of a causal sequence see the most keys
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
    b64 = b.to(tl.int64)
    r = first + tl.arange(0, BLOCK_M)
    there = r < rows
    i = r // GROUP
    h = hkv * GROUP + r % GROUP
    heads = b * Hkv * GROUP + h
    i64 = (q0 + i).to(tl.int64)
    h64 = h.to(tl.int64)

    lo, hi = nk * 0, nk
    if SPLIT:
        splits, keys = split_of(nk, n_splits)
        if split >= splits:
            return
        lo = split * keys
        hi = tl.minimum(nk, lo + keys)
    lo, full_lo, full_hi, before, behind = blocks_of_keys(
        lo, hi, first, nq, lower, upper, LEFT, UPPER, GROUP, BLOCK_M, BLOCK_N
    )

    tile = load_rows(q, b64 * qb + h64 * qh + i64 * qt, there, D, BLOCK_D)
    mask_rows = mask
    slope = 0.0
    if MASK != 0:
        mask_rows = (b64 * mb + h64 * mh + i.to(tl.int64) * mq)[:, None]
    if ALIBI:
        slope = (tl.load(slopes + heads) * LOG2E)[:, None]
    k_base = k + b64 * kb + hkv.to(tl.int64) * kh + k0.to(tl.int64) * kt
    v_base = v + b64 * vb + hkv.to(tl.int64) * vh + k0.to(tl.int64) * vt
    pages = table
    if PAGED:
        pages = table + b64 * table_b
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # a key of its own, without a value; of the first split
        m = tl.where(split == 0, tl.load(sinks + h) * LOG2E, m)
        l = tl.where(split == 0, 1.0, l)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for start in range(full_lo, full_hi, BLOCK_N):
        acc, m, l = attend(
            acc, m, l, tile, start, i, heads, nq, nk, lower, upper, k_base, v_base, mask, mask_rows, slope,
            pages, seed, drop_below, kt, vt, mk, page_size, k_page, v_page, scale, softcap, False, D, DV,
            BLOCK_D, BLOCK_DV, LEFT, UPPER, MASK, ALIBI, SOFTCAP, DROPOUT, PAGED, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for n in range(0, before + behind):
        start = tl.where(n < before, lo + n * BLOCK_N, full_hi + (n - before) * BLOCK_N)
        acc, m, l = attend(
            acc, m, l, tile, start, i, heads, nq, nk, lower, upper, k_base, v_base, mask, mask_rows, slope,
            pages, seed, drop_below, kt, vt, mk, page_size, k_page, v_page, scale, softcap, True, D, DV,
            BLOCK_D, BLOCK_DV, LEFT, UPPER, MASK, ALIBI, SOFTCAP, DROPOUT, PAGED, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    acc = acc * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    sums = m + tl.log2(l)
    if SPLIT:
        at = ((b64 * Hkv + hkv) * n_splits + split) * rows_most + r
        tl.store(part_lse + at, sums, mask=there)
        store_rows(part_out, at * DV, acc, there, DV, BLOCK_DV)
    else:
        tl.store(lse + b64 * lb + h64 * lh + i64, sums * LN2, mask=there)
        store_rows(out, b64 * ob + h64 * oh + i64 * ot, acc, there, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["rows_most", "n_splits", "Hkv", "Tq", "Tk"])
def _attention_combine(
    part_out, part_lse, out, lse, cu_q, cu_k, used, ob, oh, ot, lb, lh, rows_most, n_splits, Hkv, Tq, Tk,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one row: the mean of their results, weighted with their shares of the sum."""
    pid = tl.program_id(0)
    r = pid % rows_most
    hkv = pid // rows_most % Hkv
    b = pid // rows_most // Hkv
    q0, _, nq, nk, _, _ = sequence(b, cu_q, cu_k, used, Tq, Tk, 0, 0, False, False, False, PACKED)
    if r >= nq * GROUP:
        return
    b64 = b.to(tl.int64)
    splits, _ = split_of(nk, n_splits)
    x = tl.arange(0, SPLITS)
    there = x < splits
    at = ((b64 * Hkv + hkv) * n_splits + x) * rows_most + r
    sums = tl.load(part_lse + at, mask=there, other=float("-inf"))
    m = tl.max(sums, 0)
    zero = tl.where(m == float("-inf"), 0.0, m)
    weights = tl.exp2(sums - zero)
    total = tl.sum(weights, 0)
    parts = load_rows(part_out, at * DV, there, DV, BLOCK_DV)
    row = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    i64 = (q0 + r // GROUP).to(tl.int64)
    h64 = (hkv * GROUP + r % GROUP).to(tl.int64)
    tl.store(lse + b64 * lb + h64 * lh + i64, (zero + tl.log2(total)) * LN2)
    d = tl.arange(0, BLOCK_DV)
    tl.store(out + b64 * ob + h64 * oh + i64 * ot + d, narrow(row, out.dtype.element_ty), mask=d < DV)


# ---- configurations ------------------------------------------------------------------------


def _forward_configs(
    target: Target, dtype: torch.dtype, *, BLOCK_D, BLOCK_DV, ROWS, MASK, SOFTCAP, DROPOUT, **_
) -> list[Config]:
    def config(M, N, warps, stages):
        return Config({"BLOCK_M": min(M, ROWS) if ROWS else M, "BLOCK_N": N}, warps, stages)

    if target.kind == "interpreter":
        return [config(64, 128, 1, 1)]
    size = max(BLOCK_D, BLOCK_DV)
    if dtype == torch.float32:
        return [config(32, 32, 4, 2 if size <= 128 else 1)]
    if size > 256:
        return [config(32, 32, 8, 1)]
    if ROWS:  # bound by the reading of keys and values
        return [config(64, 64 if size <= 128 else 32, 4, 2 if target.kind == "hip" else 3)]
    if target.kind == "hip":
        return [config(128, 64, 4, 1)] if size <= 128 else [config(64, 32, 4, 1)]
    if MASK or SOFTCAP or DROPOUT:  # these need registers
        return [config(64, 32, 4, 2)]
    if size <= 64:
        return [config(128, 64, 4, 3), config(128, 128, 8, 3)]
    # What mma multiplies stands in registers beside the sums; wgmma and tcgen05 take it from shared memory.
    spare = target.arch in (90, 100)
    if size <= 128:
        return [config(128, 64 if spare else 32, 8, 3), config(64, 32, 4, 3)]
    if spare:
        return [config(64, 32, 4, 2), config(128, 32, 8, 2)]
    return [config(64, 32, 8, 2)]


_forward = Kernel(_attention_forward, _forward_configs)
_combine = Kernel(
    _attention_combine,
    lambda target, dtype, SPLITS, BLOCK_DV, **_: [Config({}, 4 if SPLITS * BLOCK_DV <= 8192 else 8, 1)],
    matrix=False,
)


# ---- operators -----------------------------------------------------------------------------


def run_forward(
    c: Call, out: Tensor, lse: Tensor, sinks: Tensor | None, max_q: int, max_k: int, split_keys: bool
) -> None:
    """Fills out (B, H, T, DV) or (T, H, DV), and lse (B, H, T) or (H, T)."""
    lse_strides = c.lse_strides(lse)
    rows = c.group * max_q
    few = rows <= FEW_ROWS
    splits = min(max(cdiv(max_k, SPLIT_KEYS.value), 1), MOST_SPLITS) if split_keys and few else 1
    part_out, part_lse = None, None
    if splits > 1:
        part_lse = lse.new_empty(c.B, c.Hkv, splits, rows)
        part_out = lse.new_empty(c.B, c.Hkv, splits, rows, c.DV)

    def grid(blocks):
        return (cdiv(rows, blocks["BLOCK_M"]) * c.Hkv * c.B * splits,)

    _forward(
        grid, out, lse, part_out, part_lse, sinks, *c.strides(out), *lse_strides, c.keep_scale, rows, splits,
        *c.arguments, sizes=(c.B * c.Hkv, rows, max_k), **c.constants, SINKS=sinks is not None,
        SPLIT=splits > 1, ROWS=max(16, next_power_of_2(rows)) if few else 0,
    )  # fmt: skip
    if splits > 1:
        lengths = c.arguments[5:8]
        _combine(
            lambda blocks: (rows * c.Hkv * c.B,), part_out, part_lse, out, lse, *lengths, *c.strides(out),
            *lse_strides, rows, splits, c.Hkv, c.Tq, c.Tk, DV=c.DV,
            BLOCK_DV=c.constants["BLOCK_DV"], GROUP=c.group, PACKED=c.packed, SPLITS=next_power_of_2(splits),
        )  # fmt: skip


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, seed: Tensor | None = None,
    dropout_p: float = 0.0, left: int = -1, right: int = -1, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    c = Call(
        query, key, value, mask=attn_mask, slopes=alibi_slopes, seed=seed, dropout_p=dropout_p,
        is_causal=is_causal, left=left, right=right, scale=scale, softcap=softcap,
    )  # fmt: skip
    out = empty_as(query, c.DV)
    lse = query.new_empty(c.B, c.Hq, c.Tq, dtype=torch.float32)
    run_forward(c, out, lse, sinks, c.Tq, c.Tk, True)
    return out, lse


def varlen_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor | None, used: Tensor | None,
    table: Tensor | None, max_q: int, max_k: int, left: int, right: int, scale: float, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_lengths(cu_q, cu_k, used, table, query, key, max_q, max_k)
    c = Call(
        query, key, value, left=left, right=right, scale=scale, cu_q=cu_q, cu_k=cu_k, used=used, table=table
    )
    # Rows of no sequence give 0.
    out = query.new_zeros(c.Tq, c.Hq, c.DV)
    lse = query.new_full((c.Hq, c.Tq), float("-inf"), dtype=torch.float32)
    # A sequence's own length decides how its keys are divided; the most that there may be, the grid.
    run_forward(c, out, lse, None, max_q, max_k if used is None else c.Tk, num_splits != 1)
    return out, lse
