"""The loss of one token and its derivative, shared by cross-entropy over logits and the linear form.

With logits x (capped already), lse = log sum_c exp x_c, class weights w and smoothing e:
    class index y     (1 - e) w_y (lse - x_y) + e / C sum_c w_c (lse - x_c) + z lse^2
    probabilities q   sum_c w_c q'_c (lse - x_c) + z lse^2,   q' = (1 - e) q + e / C
    gradient          a softmax_c - b [c = y] - s w_c - g w_c q'_c
with a token's coefficients a, b, s, g below. `mass` is the sum of w_c or w_c q'_c, `dot` that of the
same times (x_c - m): both beside the running maximum m, so that a large common offset cancels.

Tokens are numbered [N][S], classes C; T is the compute type. Options are doubles in a kernel's
signature, so that float64 tensors see their full value, and are brought to T where they are used.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton.device import tanh
from fastlm.triton.launch import Config, Kernel, cdiv

NONE, MEAN, SUM = range(3)  # reductions, in torch's numbering


# ---- in kernels -----------------------------------------------------------------------------


@triton.jit
def capped(x, softcap):
    cap = tl.full([1, 1], softcap, x.dtype)
    return cap * tanh(x / cap)


@triton.jit
def capped_slope(capped_x, softcap):
    t = capped_x / tl.full([1, 1], softcap, capped_x.dtype)
    return 1 - t * t


@triton.jit
def finite(m):
    """exp(-inf - -inf) must not become NaN while only -inf has been seen."""
    return tl.where(m > float("-inf"), m, 0)


@triton.jit
def smoothed(q, C, smoothing):
    """Probabilities (tokens, classes) mixed with the uniform distribution."""
    e = tl.full([1, 1], smoothing, q.dtype)
    return q * (1 - e) + e / C


@triton.jit
def store_token(loss, lse, low, i, inside, stored, kept, m, total, x_y, w_y, mass, dot, C, smoothing, z_loss,
                INDICES: tl.constexpr, SMOOTHING: tl.constexpr):  # fmt: skip
    """Stores of the tokens at i the loss (0 where not `kept`), and lse and low (0 where not `stored`),
    which it returns.

    In float64, a few operations a token: a confident token's loss, lse - x_y, and its gradient cancel
    to far below an ulp of lse, so that what rounding takes from lse is kept in low.
    """
    T: tl.constexpr = m.dtype
    top, log_sum = finite(m).to(tl.float64), tl.log(total.to(tl.float64))
    exact = top + log_sum
    part = exact - top
    error = (top - (exact - part)) + (log_sum - part)
    rounded = exact.to(T)
    rest = ((exact - rounded.to(tl.float64)) + error).to(T)
    rounded = tl.where(stored, rounded, 0)
    rest = tl.where(stored & (rest == rest), rest, 0)  # of an infinite lse
    tl.store(lse + i, rounded, inside)
    tl.store(low + i, rest, inside)
    wide = rounded.to(tl.float64)
    value = wide * 0
    if SMOOTHING or not INDICES:
        value = mass.to(tl.float64) * ((wide - top) + rest) - dot.to(tl.float64)
    if INDICES:
        e = tl.full([1], smoothing, tl.float64)
        hit = (1 - e) * w_y.to(tl.float64) * ((wide - x_y.to(tl.float64)) + rest)
        value = hit + e / C * value if SMOOTHING else hit
    z = tl.full([1], z_loss, tl.float64)
    value += tl.where(z != 0, z * wide * wide, 0)
    tl.store(loss + i, tl.where(kept, value, 0).to(T), inside)
    return rounded, rest


@triton.jit
def coefficients(i, inside, kept, w_y, lse, mass, weight_sum, scale, dloss, dlse, C, smoothing, z_loss,
                 INDICES: tl.constexpr, SMOOTHING: tl.constexpr):  # fmt: skip
    """Of the tokens at i: of softmax, of the class y, of every w_c, of w_c q'_c; and which are not all 0.

    scale: a float64 scalar in memory, the upstream gradient of a reduced loss over what a mean divides
    by, or None for 1. dloss, dlse: upstream gradients of each token, or None.
    """
    T: tl.constexpr = lse.dtype
    g = tl.where(kept, tl.full([1], 1, T), 0)
    if scale is not None:
        g = tl.where(kept, tl.load(scale).to(T), 0)
    if dloss is not None:
        g = g * tl.load(dloss + i, kept, 0)
    softmax = tl.zeros_like(g)
    if dlse is not None:
        softmax += tl.load(dlse + i, inside, 0)
    active = (g != 0) | (softmax != 0)
    onehot, smooth, probs = tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(g)
    if INDICES:
        e = tl.full([1], smoothing, T)
        onehot = g * (1 - e) * w_y
        softmax += onehot
        if SMOOTHING:
            smooth = g * e / C
            if weight_sum is None:
                softmax += smooth * C
            else:
                softmax += smooth * tl.load(weight_sum).to(T)
    else:
        probs = g
        softmax += g * mass
    z = tl.full([1], z_loss, T)
    softmax += tl.where((z != 0) & (g != 0), 2 * z * g * lse, 0)
    return softmax, onehot, smooth, probs, active


@triton.jit
def logits_gradient(x, c, y, w, q, lse, low, softmax, onehot, smooth, probs, active, C, softcap,
                    smoothing, INDICES: tl.constexpr, SMOOTHING: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """Of a tile (tokens, classes) of logits, capped already; w (1, classes) and q may be None."""
    p = tl.exp((x - lse[:, None]) - low[:, None])
    dx = softmax[:, None] * p
    if INDICES:
        dx -= tl.where(c == y[:, None], onehot[:, None], 0)
        if SMOOTHING:
            if w is None:
                dx -= smooth[:, None]
            else:
                dx -= smooth[:, None] * w
    else:
        share = smoothed(q, C, smoothing)
        if w is not None:
            share = share * w
        dx -= probs[:, None] * share
    if CAPPED:
        dx = dx * capped_slope(x, softcap)
    return tl.where(active[:, None], dx, 0)


@triton.jit
def _targets_kernel(target, weight, partial, count, C, ignore_index, BLOCK: tl.constexpr):
    """partial[p] = sum of the weights of the tokens that count, and how many are out of bounds."""
    total, outside = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    at, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0) * BLOCK
    for first in range(at, count, step):
        i = first + tl.arange(0, BLOCK)
        y = tl.load(target + i, i < count, ignore_index)
        kept = y != ignore_index
        inside = kept & (y >= 0) & (y < C)
        outside += (kept & ~inside).to(tl.float64)
        if weight is None:
            total += inside.to(tl.float64)
        else:
            total += tl.load(weight + y, inside, 0).to(tl.float64)
    tl.store(partial + 2 * tl.program_id(0), tl.sum(total))
    tl.store(partial + 2 * tl.program_id(0) + 1, tl.sum(outside))


_read_targets = Kernel(
    _targets_kernel, lambda target, dtype: [Config(dict(BLOCK=1024), warps=4)], matrix=False
)


# ---- around kernels -------------------------------------------------------------------------


@dataclass
class Loss:
    """The arguments that every form of the loss has. N, C, S: of the logits' shape (N, C, S)."""

    N: int
    C: int
    S: int
    compute: torch.dtype
    reduction: int
    indices: bool
    target: Tensor  # int64 (N * S), or probabilities (N, C, S), a view where strides allow
    weight: Tensor | None  # (C)
    weight_sum: Tensor | None  # float64 scalar
    denominator: Tensor | None  # of a mean, float64 scalar

    @property
    def probs_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.indices else self.target.stride()

    def new(self, like: Tensor) -> Tensor:
        """A value per token."""
        return like.new_empty(self.N * self.S, dtype=self.compute)

    def upstream(self, dloss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """`scale` and `dloss` of the kernels; None for a gradient of 1."""
        if self.reduction == NONE:
            return None, dloss.to(self.compute).contiguous()
        if dloss is None:
            return None if self.denominator is None else self.denominator.reciprocal(), None
        scale = dloss.to(torch.float64)
        return scale if self.denominator is None else scale / self.denominator, None

    def finish(self, loss: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
        """The losses of all tokens, reduced as asked for; sums in float64."""
        if self.reduction == NONE:
            return loss.view(shape).to(dtype)
        total = loss.sum(dtype=torch.float64)
        return (total if self.denominator is None else total / self.denominator).to(dtype)


def split(logits: list[int]) -> tuple[int, int, int]:
    """(N, C, S) of logits (C), (N, C) or (N, C, d1, ...)."""
    if len(logits) == 1:
        return 1, logits[0], 1
    S = 1
    for size in logits[2:]:
        S *= size
    return logits[0], logits[1], S


def read_loss(
    name: str, logits: list[int], dtype: torch.dtype, target: Tensor, weight: Tensor | None,
    reduction: int, ignore_index: int,
) -> Loss:  # fmt: skip
    N, C, S = split(logits)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = None if weight is None else weight.contiguous()
    weight_sum = None if weight is None else weight.sum(dtype=torch.float64)
    indices = target.dim() < len(logits)
    denominator = None
    if indices:
        target = target.contiguous().view(-1)
        denominator = _count(name, target, weight, C, ignore_index)
    else:
        target = target.reshape(N, C, S)
    if reduction != MEAN:
        denominator = None
    elif not indices:
        denominator = torch.full((), N * S, dtype=torch.float64, device=target.device)
    return Loss(N, C, S, compute, reduction, indices, target, weight, weight_sum, denominator)


def _count(name: str, target: Tensor, weight: Tensor | None, C: int, ignore_index: int) -> Tensor:
    """What a mean divides by. A class out of bounds is an error, on a GPU when its results are next
    waited for, as in PyTorch."""
    count = target.numel()
    programs = min(cdiv(count, 1024), 256)
    partial = target.new_empty((programs, 2), dtype=torch.float64)
    _read_targets(lambda blocks: (programs,), target, weight, partial, count, C, ignore_index)
    total, outside = partial.sum(0)
    torch._assert_async(
        outside == 0,
        f"fastlm.{name}: a target is out of bounds for {C} classes (ignore_index is {ignore_index})",
    )
    return total
