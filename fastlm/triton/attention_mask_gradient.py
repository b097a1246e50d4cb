"""The gradient of attention's mask: dS, as attention_backward.py has it, summed over the dimensions along
which the mask is broadcast; a kernel for calls that ask for it alone."""

import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton.attention import Call, kept, load_lse, load_rows, sequence, tile_gradients
from fastlm.triton.device import LOG2E, dot
from fastlm.triton.launch import Config, Kernel, cdiv

SCALARS = ("seed", "drop_below", "Hkv", "Tq", "Tk", "left", "right", "H_m", "Tq_m", "Tk_m", "n_b", "n_h")


@triton.jit(do_not_specialize=SCALARS)
def _attention_dmask(
    dmask, dout, lse, delta, gb, gh, gt, lb, lh, keep_scale, H_m, Tq_m, Tk_m, n_b, n_h,
    q, k, v, mask, slopes, cu_q, cu_k, used, table, seed, drop_below, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    mb, mh, mq, mk, page_size, k_page, v_page, table_b, Hkv, Tq, Tk, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr, PAGED: tl.constexpr,
    PRECISION: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dmask (parts, B or 1, H_m, Tq_m, Tk_m), contiguous. A tile of the mask was added to the scores of
    n_b entries of the batch, n_h heads and, with SUM_Q or SUM_K, all blocks of queries or keys: the
    program of a part sums its share of these tiles."""
    UPPER: tl.constexpr = RIGHT or CAUSAL
    q0, k0, nq, nk, lower, upper = sequence(
        0, cu_q, cu_k, used, Tq, Tk, left, right, CAUSAL, LEFT, RIGHT, PACKED
    )
    blocks_i = tl.cdiv(Tq_m, BLOCK_M)
    blocks_j = tl.cdiv(Tk_m, BLOCK_N)
    pid = tl.program_id(0)
    mask_j = pid % blocks_j
    pid = pid // blocks_j
    mask_i = pid % blocks_i
    pid = pid // blocks_i
    mask_h = pid % H_m
    mask_b = pid // H_m
    part = tl.program_id(1)
    n_i, n_j = 1, 1
    if SUM_Q:
        n_i = tl.cdiv(nq, BLOCK_M)
    if SUM_K:
        n_j = tl.cdiv(nk, BLOCK_N)
    steps = n_b * n_h * n_i * n_j
    share = tl.cdiv(steps, tl.num_programs(1))

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        i_block = mask_i + step // n_j % n_i
        j_block = mask_j + step % n_j
        h = mask_h + step // (n_j * n_i) % n_h
        b = mask_b + step // (n_j * n_i * n_h)
        i = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        j = j_block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = i < nq
        inside = j < nk
        b64, h64, hkv64 = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
        i64, j64 = i.to(tl.int64), j.to(tl.int64)
        q_r = load_rows(q, b64 * qb + h64 * qh + i64 * qt, there, D, BLOCK_D)
        dout_r = load_rows(dout, b64 * gb + h64 * gh + i64 * gt, there, DV, BLOCK_DV)
        k_j = load_rows(k, b64 * kb + hkv64 * kh + j64 * kt, inside, D, BLOCK_D)
        v_j = load_rows(v, b64 * vb + hkv64 * vh + j64 * vt, inside, DV, BLOCK_DV)
        rows_lse = b64 * lb + h64 * lh + i64
        lse_r = load_lse(lse, rows_lse, there)
        delta_r = tl.load(delta + rows_lse, mask=there, other=0.0)
        heads = tl.zeros([BLOCK_M], tl.int32) + (b * Hkv * GROUP + h)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + b * Hkv * GROUP + h) * LOG2E
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        qk = dot(q_r, tl.trans(k_j), zeros, PRECISION)
        dp = dot(dout_r, tl.trans(v_j), zeros, PRECISION)
        keep = zeros
        if DROPOUT:
            keep = kept(seed, i, heads, j_block * BLOCK_N, drop_below, BLOCK_M, BLOCK_N)
        _, ds, _ = tile_gradients(
            qk, dp, i[:, None], j[None, :], heads, keep, nq, nk, lower, upper, mask,
            (b64 * mb + h64 * mh + i64 * mq)[:, None], mk, slope, scale, softcap, lse_r[:, None],
            delta_r[:, None], keep_scale, True, LEFT, UPPER, MASK, ALIBI, SOFTCAP, DROPOUT,
        )  # fmt: skip
        total += ds

    i = mask_i * BLOCK_M + tl.arange(0, BLOCK_M)
    j = mask_j * BLOCK_N + tl.arange(0, BLOCK_N)
    batches = tl.num_programs(0) // (blocks_i * blocks_j * H_m)
    base = dmask + ((part * batches + mask_b).to(tl.int64) * H_m + mask_h) * Tq_m * Tk_m
    if SUM_Q and SUM_K:
        tl.store(base, tl.sum(total))
    elif SUM_Q:
        tl.store(base + j, tl.sum(total, 0), mask=j < Tk_m)
    elif SUM_K:
        tl.store(base + i, tl.sum(total, 1), mask=i < Tq_m)
    else:
        at = base + i.to(tl.int64)[:, None] * Tk_m + j[None, :]
        tl.store(at, total, mask=(i < Tq_m)[:, None] & (j < Tk_m)[None, :])


def _dmask_configs(target, dtype, **_) -> list[Config]:
    if target.kind == "interpreter":
        return [Config({"BLOCK_M": 32, "BLOCK_N": 128}, 1, 1)]
    return [Config({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1)]


_dmask = Kernel(_attention_dmask, _dmask_configs)


def mask_gradient(c: Call, attn_mask: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of attn_mask in float32. delta: as attention_backward has it."""
    if 0 in (c.B, c.Hq, c.Tq, c.Tk):
        return lse.new_zeros(attn_mask.shape)
    B_m, H_m, Tq_m, Tk_m = attn_mask.shape
    sum_q, sum_k = Tq_m < c.Tq, Tk_m < c.Tk
    # Enough programs to fill a GPU where the mask itself has few tiles; from shapes alone.
    tiles = attn_mask.numel() / 64**2
    steps = c.B * c.Hq * cdiv(c.Tq, 64) * cdiv(c.Tk, 64) / max(tiles, 1)
    parts = int(min(steps, max(1, 512 // max(tiles, 1))))
    dmask = lse.new_empty(parts, *attn_mask.shape)
    _dmask(
        lambda blocks: (cdiv(Tq_m, blocks["BLOCK_M"]) * cdiv(Tk_m, blocks["BLOCK_N"]) * H_m * B_m, parts),
        dmask, dout, lse, delta, *c.strides(dout), *c.lse_strides(lse), c.keep_scale, H_m, Tq_m, Tk_m,
        c.B // B_m, c.Hq // H_m, *c.arguments, sizes=(c.B * c.Hq, c.Tq, c.Tk), **c.constants,
        SUM_Q=sum_q, SUM_K=sum_k,
    )  # fmt: skip
    return dmask.sum(0) if parts > 1 else dmask[0]
