"""What the kernels share on the device: products, tanh, random words.

In an expression of a tensor and a tl.constexpr the tensor stands left: the interpreter of Triton 3.9
knows no other order.
"""

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another floating dtype, rounded to nearest, as conversions on a GPU are."""
    # The interpreter cuts the bits off that bfloat16 lacks, which is up to twice as far away.
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def widen(x):
    """bfloat16 as float32; quicker in the interpreter than its own."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, the sums in acc's type. PRECISION: of float32 operands, see launch.dot_precision."""
    # The interpreter has no product of bfloat16; in float32 it is the tensor cores' exact one.
    if INTERPRETED and a.dtype == tl.bfloat16:
        acc = tl.dot(widen(a), widen(b), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def tanh(x):
    """tanh in float32 (2 ulp or so) or float64: a ratio of exponentials, near 0 in float32 its series."""
    size = tl.abs(x)
    e = tl.exp2(size * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(x < 0, -t, t)
    if x.dtype == tl.float32:
        s = x * x
        series = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        t = tl.where(size < 0.25, series, t)
    return t


@triton.jit
def random_words(seed, rows, columns, heads, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Random 32-bit words (ROWS, COLUMNS) as in reference.dropout_keep.

    rows, heads: (ROWS,). columns: (COLUMNS // 4,), the index of a column by 4.
    """
    c0 = tl.broadcast_to(columns[None, :], (ROWS, COLUMNS // 4)).to(tl.uint32)
    c1 = tl.broadcast_to(rows[:, None], (ROWS, COLUMNS // 4)).to(tl.uint32)
    c2 = tl.broadcast_to(heads[:, None], (ROWS, COLUMNS // 4)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c0 * 0)
    # join makes a new last axis: (w0, w2) beside (w1, w3) reads w0, w1, w2, w3 when flattened.
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, COLUMNS)
