"""Attention: what forward and backward share.

    S = softcap(scale Q K^T) + bias,  P = softmax(S),  O = dropout(P) V

Q, K, V and O are (B, H, T, D) by strides, the last dimension contiguous; or packed (T, H, D), sequence b
holding the rows cu[b] up to cu[b + 1]; or K and V are pages of a pool. Hq = GROUP * Hkv query heads share
Hkv heads of keys and values: the rows of one key head are r = i * GROUP + g, query i of its head g, and
a block of rows reads K and V once for all heads of the group.

Scores are in base 2 inside of the kernels: exp2 is an instruction, exp is not. Letters: B batch, H heads,
T length, D size of a head of Q and K, DV of V; i a query, j a key, r a row; n the lengths of one sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton.device import LOG2E, narrow, random_words, tanh, widen
from fastlm.triton.launch import Target, current_target, dot_precision, next_power_of_2

NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2


# ---- on the device -------------------------------------------------------------------------


@triton.jit
def sequence(
    b, cu_q, cu_k, used, Tq, Tk, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sequence b: first row of its queries and of its keys, lengths, and the band: query i sees the keys
    i - lower <= j <= i + upper."""
    q0, k0, nq, nk = b * 0, b * 0, Tq, Tk
    if PACKED:
        q0 = tl.load(cu_q + b)
        nq = tl.load(cu_q + b + 1) - q0
        if cu_k is not None:
            k0 = tl.load(cu_k + b)
            nk = tl.load(cu_k + b + 1) - k0
        if used is not None:
            nk = tl.load(used + b)
    lower = nq * 0 + (1 << 30)
    upper = nq * 0 + (1 << 30)
    if LEFT:
        lower = left - (nk - nq)
    if RIGHT:
        upper = right + (nk - nq)
    if CAUSAL:
        upper = tl.minimum(upper, 0)
    return q0, k0, nq, nk, lower, upper


@triton.jit
def blocks_of_keys(
    lo, hi, first, nq, lower, upper, LEFT: tl.constexpr, UPPER: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the keys from lo to hi, for the BLOCK_M rows from `first` on: lo, the first that some row sees;
    full_lo to full_hi, whole blocks that all rows see; the number of blocks before these and behind."""
    i_first = first // GROUP
    i_last = tl.minimum((first + BLOCK_M - 1) // GROUP, nq - 1)
    full_lo, full_hi = lo, hi
    if LEFT:
        lo = tl.maximum(lo, tl.maximum(i_first - lower, 0) // BLOCK_N * BLOCK_N)
        full_lo = tl.maximum(lo, tl.cdiv(tl.maximum(i_last - lower, 0), BLOCK_N) * BLOCK_N)
    if UPPER:
        hi = tl.minimum(hi, i_last + upper + 1)
        full_hi = tl.minimum(full_hi, i_first + upper + 1)
    full_hi = tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N
    if full_hi <= full_lo:
        full_lo, full_hi = lo, lo
    before = (full_lo - lo) // BLOCK_N
    behind = tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK_N)
    return lo, full_lo, full_hi, before, behind


@triton.jit
def load_rows(base, offsets, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr = False):
    """A tile (rows, BLOCK) of rows of SIZE elements, 0 beyond and where not `inside`. ALL: all are."""
    d = tl.arange(0, BLOCK)
    at = base + offsets[:, None] + d[None, :]
    if SIZE < BLOCK and ALL:
        tile = tl.load(at, mask=(d < SIZE)[None, :], other=0.0)
    elif SIZE < BLOCK:
        tile = tl.load(at, mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
    elif ALL:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside[:, None], other=0.0)
    return tile


@triton.jit
def store_rows(base, offsets, tile, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    keep = inside[:, None]
    if SIZE < BLOCK:
        keep = keep & (d < SIZE)[None, :]
    tl.store(base + offsets[:, None] + d[None, :], narrow(tile, base.dtype.element_ty), mask=keep)


@triton.jit
def key_offsets(j, nk, table, page_size, page_stride, row_stride, PAGED: tl.constexpr):
    """Offsets of keys from the start of their sequence, or from that of the pool."""
    if PAGED:
        page = tl.load(table + j // page_size, mask=j < nk, other=0).to(tl.int64)
        at = page * page_stride + (j % page_size).to(tl.int64) * row_stride
    else:
        at = j.to(tl.int64) * row_stride
    return at


@triton.jit
def logits(
    qk, i, j, nq, nk, lower, upper, mask, mask_rows, mask_k, slope, scale, softcap,
    EDGE: tl.constexpr, LEFT: tl.constexpr, UPPER: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The logits of a tile in base 2, and tanh of the softcap (else its input).

    i, j: indices along the two sides, of shapes that broadcast to the tile's, as mask_rows (offsets in
    the mask of the rows) and slope (ALiBi's, in base 2) do. EDGE: the tile may have pairs that are out
    of the band or behind the last key.
    """
    t = qk
    if SOFTCAP:
        t = tanh(qk * (scale / softcap))
        s = t * (softcap * LOG2E)
    else:
        s = qk * (scale * LOG2E)
    if ALIBI:
        s -= tl.abs(i + (nk - nq) - j).to(tl.float32) * slope
    if MASK != 0:
        there = (i < nq) & (j < nk)
        bias = tl.load(mask + mask_rows + j.to(tl.int64) * mask_k, mask=there, other=0)
        if MASK == 1:
            s = tl.where(bias != 0, s, float("-inf"))
        else:
            s += widen(bias) * LOG2E
    if EDGE:
        seen = j < nk
        if LEFT:
            seen = seen & (j >= i - lower)
        if UPPER:
            seen = seen & (j <= i + upper)
        s = tl.where(seen, s, float("-inf"))
    return s, t


@triton.jit
def kept(seed, i, heads, start, drop_below, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Which weights (ROWS, KEYS) of the keys from `start`, a multiple of 4, dropout keeps."""
    columns = start // 4 + tl.arange(0, KEYS // 4)
    return random_words(seed, i, columns, heads, ROWS, KEYS) >= drop_below.to(tl.uint32)


@triton.jit
def tile_gradients(
    qk, dp, i, j, heads, keep, nq, nk, lower, upper, mask, mask_rows, mk, slope, scale, softcap, lse, delta,
    keep_scale, EDGE: tl.constexpr, LEFT: tl.constexpr, UPPER: tl.constexpr, MASK: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Of a tile, either side first: the weights that met the values, dS of the logits, and dS of
    scale Q K^T. dp: dO V^T. i, j, lse (in base 2), delta: of shapes that broadcast to it."""
    s, t = logits(
        qk, i, j, nq, nk, lower, upper, mask, mask_rows, mk, slope, scale, softcap, EDGE, LEFT, UPPER, MASK,
        ALIBI, SOFTCAP,
    )  # fmt: skip
    p = tl.exp2(s - lse)
    met = p
    if DROPOUT:
        met = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    dqk = ds
    if SOFTCAP:
        dqk = ds * (1.0 - t * t)
    return met, ds, dqk


@triton.jit
def load_lse(lse, at, there):
    """lse in base 2; rows without any key have weights of 0, as rows that are not there."""
    x = tl.load(lse + at, mask=there, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2E)


# ---- on the host ---------------------------------------------------------------------------


def rows_close(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied where it is not."""
    return x if x.stride(-1) == 1 or x.size(-1) <= 1 else x.contiguous()


def head_block(size: int) -> int:
    return max(16, next_power_of_2(size))


def empty_as(like: Tensor, D: int) -> Tensor:
    """An empty (B, H, T, D), its memory ordered as `like`'s."""
    B, H, T, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, T, H, D).transpose(1, 2)
    return like.new_empty(B, H, T, D)


def check_lengths(cu_q, cu_k, used, table, query, key, max_q: int, max_k: int) -> None:
    """Checks the values of offsets that are on the CPU. Those on a GPU are trusted, as by every other
    library: to read them would make the host wait for the device."""
    if cu_q.device.type != "cpu" or cu_q.numel() == 0:
        return

    def lengths(name, at, total):
        counts = at.diff()
        if at[0] < 0 or at[-1] > total or (counts < 0).any():
            raise RuntimeError(
                f"fastlm::varlen_attention: {name} is {at.tolist()}, expected offsets of {total} rows that never decrease"
            )
        return counts

    queries = lengths("cu_seq_q", cu_q, query.size(0))
    keys = table.size(1) * key.size(1) * torch.ones_like(queries) if table is not None else None
    if keys is None:
        keys = lengths("cu_seq_k", cu_k, key.size(0))
    most = max_k if used is None else None
    if used is not None:
        if (used < 0).any() or (used > keys).any():
            raise RuntimeError(
                f"fastlm::varlen_attention: seqused_k is {used.tolist()}, there is room for {keys.tolist()}"
            )
        if table is not None:
            pages = torch.arange(table.size(1)) * key.size(1) < used[:, None]
            if ((table < 0) | (table >= key.size(0)))[pages].any():
                raise RuntimeError(
                    f"fastlm::varlen_attention: block_table names a page that is not among the {key.size(0)}"
                )
    if (queries > max_q).any() or (most is not None and (keys > most).any()):
        raise RuntimeError(
            f"fastlm::varlen_attention: sequences of {queries.tolist()} queries and {keys.tolist()} keys exceed"
            f" max_q = {max_q} or max_k = {max_k}"
        )


class Call:
    """The arguments and constants that all kernels of one call share.

    strides: of query, key, value in the order (batch, head, row), batch 0 where packed.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask=None, slopes=None, seed=None,
        dropout_p=0.0, is_causal=False, left=-1, right=-1, scale=1.0, softcap=0.0,
        cu_q=None, cu_k=None, used=None, table=None,
    ):  # fmt: skip
        self.q, self.k, self.v = rows_close(query), rows_close(key), rows_close(value)
        self.packed, self.paged = cu_q is not None, table is not None
        self.D, self.DV = query.size(-1), value.size(-1)
        if self.packed:
            self.B = cu_q.numel() - 1
            self.Tq, self.Hq = query.shape[:2]
            self.Tk = table.size(1) * key.size(1) if self.paged else key.size(0)
        else:
            self.B, self.Hq, self.Tq = query.shape[:3]
            self.Tk = key.size(2)
        self.Hkv = key.size(-2 if self.packed else 1)
        self.group = self.Hq // self.Hkv if self.Hkv else 1
        self.target: Target = current_target(query.device)
        slopes = None if slopes is None else slopes.contiguous()
        page = (self.k.size(1), self.k.stride(0), self.v.stride(0)) if self.paged else (1, 0, 0)
        kind, mask, mask_strides = NO_MASK, mask, (0, 0, 0, 0)
        if mask is not None:
            kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
            mask_strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
            mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
        dropout = dropout_p > 0
        furthest = self.Tq + self.Tk  # so that offsets of rows beside a window stay inside of 32 bits
        # In the order of the kernels' parameters behind their own.
        self.arguments = (
            self.q, self.k, self.v, mask, slopes, cu_q, cu_k, used, table,
            int(seed) if dropout else 0, min(int(dropout_p * 2.0**32), 2**32 - 1) if dropout else 0,
            *self.strides(self.q), *self.strides(self.k), *self.strides(self.v), *mask_strides, *page,
            0 if table is None else table.stride(0), self.Hkv, self.Tq, self.Tk,
            min(left, furthest), min(right, furthest), scale, softcap,
        )  # fmt: skip
        self.keep_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        self.constants = {
            "D": self.D, "DV": self.DV, "BLOCK_D": head_block(self.D), "BLOCK_DV": head_block(self.DV),
            "GROUP": self.group, "CAUSAL": is_causal, "LEFT": left >= 0, "RIGHT": right >= 0,
            "MASK": kind, "ALIBI": slopes is not None, "SOFTCAP": softcap > 0, "DROPOUT": dropout,
            "PACKED": self.packed, "PAGED": self.paged,
            "PRECISION": dot_precision(query.dtype, self.target),
        }  # fmt: skip

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Of the batch, heads and rows of a tensor laid out as query, or as pages."""
        if self.packed:
            return 0, x.stride(-2), x.stride(-3)
        return x.stride(0), x.stride(1), x.stride(2)

    def lse_strides(self, lse: Tensor) -> tuple[int, int]:
        """Of the batch and heads of a contiguous (B, H, T) or (H, T)."""
        return (0, lse.stride(0)) if self.packed else (lse.stride(0), lse.stride(1))
