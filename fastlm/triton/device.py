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
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, the sums in acc's type. PRECISION: of float32 operands, see launch.dot_precision."""
    # The interpreter has no product of bfloat16; in float32 it is the tensor cores' exact one.
    if INTERPRETED and a.dtype == tl.bfloat16:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another floating dtype, rounded to nearest, as conversions on a GPU are."""
    # The interpreter cuts the bits off that bfloat16 lacks, which is up to twice as far away.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, up, x.to(tl.float32))
    return x.to(dtype)


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
def random_words(seed, rows, columns, head, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Random 32-bit words (ROWS, COLUMNS) as in reference.dropout_keep.

    rows: (ROWS,) any integers below 2^32. columns: (COLUMNS // 4,) a quarter of the first column of four.
    """
    c0 = tl.broadcast_to(columns[None, :], (ROWS, COLUMNS // 4)).to(tl.uint32)
    c1 = tl.broadcast_to(rows[:, None], (ROWS, COLUMNS // 4)).to(tl.uint32)
    zeros = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zeros + head.to(tl.uint32), zeros)
    # join makes a new last axis: (w0, w2) beside (w1, w3) reads w0, w1, w2, w3 when flattened.
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, COLUMNS)
