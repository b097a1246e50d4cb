"""Products of matrices with sums in float32 (float64 for float64), for the operators that need more
than a library's product: a bias, a scale and a sum so far in the same pass, float32 out of 16-bit factors.

out (M, N) = scale * a (M, K) b (K, N) + bias (N) + addend (M, N), any strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton.device import dot, narrow
from fastlm.triton.launch import Config, Kernel, cdiv, current_target, dot_precision


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program: GROUP rows of tiles go by together, so that their factors stay in L2."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    local = pid % (GROUP * columns)
    return group * GROUP + local % height, local // height


@triton.jit
def product(a, b, K, a_k, b_k, row_used, column_used, acc, PRECISION: tl.constexpr, BK: tl.constexpr):
    """acc + a b over K: a points at the first column (BM, 1) of a block of rows, b at the first row (1, BN)
    of a block of columns."""
    k = tl.arange(0, BK)
    a += k[None, :].to(tl.int64) * a_k
    b += k[:, None].to(tl.int64) * b_k
    for first in range(0, K, BK):
        rest = K - first
        x = tl.load(a, row_used[:, None] & (k[None, :] < rest), 0)
        y = tl.load(b, (k[:, None] < rest) & column_used[None, :], 0)
        acc = dot(x, y, acc, PRECISION)
        a += tl.full([1, 1], BK, tl.int64) * a_k
        b += tl.full([1, 1], BK, tl.int64) * b_k
    return acc


@triton.jit
def _matmul_kernel(
    a, b, out, bias, addend, scale, M, N, K, a_m, a_k, b_k, b_n, out_m, out_n, addend_m, addend_n,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    m, n = tile_of(M, N, BM, BN, GROUP)
    m = m.to(tl.int64) * BM + tl.arange(0, BM)
    n = n.to(tl.int64) * BN + tl.arange(0, BN)
    acc = product(
        a + m[:, None] * a_m,
        b + n[None, :] * b_n,
        K,
        a_k,
        b_k,
        m < M,
        n < N,
        tl.zeros([BM, BN], T),
        PRECISION,
        BK,
    )
    used = (m < M)[:, None] & (n < N)[None, :]
    if scale is not None:
        acc = acc * tl.load(scale).to(T)
    if bias is not None:
        acc += tl.load(bias + n, n < N, 0).to(T)[None, :]
    if addend is not None:
        acc += tl.load(addend + m[:, None] * addend_m + n[None, :] * addend_n, used, 0).to(T)
    tl.store(out + m[:, None] * out_m + n[None, :] * out_n, narrow(acc, out.dtype.element_ty), used)


def matrix_configs(target, dtype, **constants):
    """Tiles that keep tensor cores busy from shared memory; a small one for few tiles."""
    if target.kind == "interpreter":
        return [Config(dict(BM=64, BN=64, BK=64, GROUP=8))]
    if dtype.itemsize == 8:
        return [Config(dict(BM=32, BN=32, BK=16, GROUP=8), 4, 2)]
    if dtype.itemsize == 4:  # without tensor cores, factors of a step stand in registers: short steps
        return [
            Config(dict(BM=64, BN=64, BK=16, GROUP=8), 8, 2),
            Config(dict(BM=64, BN=64, BK=16, GROUP=8), 4, 2),
        ]
    stages = 2 if target.kind == "hip" else 3
    return [
        Config(dict(BM=128, BN=128, BK=64, GROUP=8), 8, stages),
        Config(dict(BM=64, BN=64, BK=64, GROUP=8), 4, stages),
    ]


_matmul = Kernel(_matmul_kernel, matrix_configs, restore=("out",))  # which may be addend too


def matmul(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, addend: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills `out`, which may be `addend` too, as above, and returns it. scale: a scalar tensor."""
    M, K = a.shape
    N = b.shape[1]
    strides = (0, 0) if addend is None else addend.stride()
    _matmul(
        lambda t: (cdiv(M, t["BM"]) * cdiv(N, t["BN"]),),
        a, b, out, bias, addend, scale, M, N, K, *a.stride(), *b.stride(), *out.stride(), *strides,
        sizes=(M, N, K), PRECISION=dot_precision(a.dtype, current_target(a.device)),
    )  # fmt: skip
    return out


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
