"""One layer of a GRU over all time steps; the formulas and the shapes stand in csrc/cpu/gru.h and
fastlm/ops/gru.py.

The rows of a batch are independent: a program owns a tile of rows in one direction and walks all time
steps. Its states go by through a few KiB of memory that its own L1 cache holds, between barriers of the
program alone; the recurrent weights stream from L2, and the gates are made where their products end.
The input's products for all steps are one matrix product before, the weights' gradients products over
all rows behind. Kept for the backward: r, z, n, q in the compute type (and what layer norm needs).

Backward, with dh the gradient of h', k = z (with zoneout 1 - u (1 - z)) and c = 1 - k:
    dn = dh c (1 - n^2)    dq = dn r    dr = dn q r (1 - r)    dz = dh u (h - n) z (1 - z)
    dh_prev = dh k + (dq, dr, dz) W_hh
A row of `delta` is (dq, dr, dz, dn): the gradients of h W and of x W are each one block of it. With
layer norm they differ throughout and stand side by side.

B sequences, H units, N rows (step, sequence) in time-major order, D directions; S storage type, T
compute type.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton.device import dot, narrow, tanh
from fastlm.triton.launch import Config, Kernel, cdiv, current_target, dot_precision
from fastlm.triton.matmul import compute_dtype, matmul

NORM_EPS = tl.constexpr(1e-5)
# No access is wider for what these are divisible by: another length or batch must not compile anew.
SCALARS = ("T", "B", "D", "N")


# ---- the recurrence -------------------------------------------------------------------------


@triton.jit
def _steps_of(lengths, T, b, B):
    """Steps that the longest sequence of a tile has."""
    steps = T
    if lengths is not None:
        steps = tl.max(tl.load(lengths + b, b < B, 0))
    return steps


@triton.jit
def _rows_of(offsets, t, b, B):
    """Rows of the sequences b at step t, and which of them last so long."""
    if offsets is None:
        row, active = t.to(tl.int64) * B + b, b < B
    else:
        first = tl.load(offsets + t)
        row, active = first + b, b < tl.load(offsets + t + 1) - first
    return row, active


@triton.jit
def _step(r, z, n_x, q, h, u, ZONEOUT: tl.constexpr):
    """Gates and the new state from the sums that enter them."""
    r, z = tl.sigmoid(r), tl.sigmoid(z)
    n = tanh(n_x + r * q)
    if ZONEOUT:  # so that u = 0 keeps the old state to the bit
        new = h + u * (1 - z) * (n - h)
    else:
        new = n + z * (h - n)
    return r, z, n, new


@triton.jit
def _make_gates(
    at, y_r, y_z, y_n, b_hh, h_now, h_next, out, update, row, active, b, u, B, H, D, direction, zoneout,
    SAVE: tl.constexpr, ZONEOUT: tl.constexpr,
):  # fmt: skip
    """One tile (rows, units): `at` points at x W + b of the rows (BB, 1)."""
    T: tl.constexpr = y_r.dtype
    cell = u[None, :] < H
    used = active[:, None] & cell
    x_r, x_z = tl.load(at + u[None, :], used, 0), tl.load(at + (H + u)[None, :], used, 0)
    x_n = tl.load(at + (2 * H + u)[None, :], used, 0)
    if b_hh is not None:
        y_r += tl.load(b_hh + u, u < H, 0).to(T)[None, :]
        y_z += tl.load(b_hh + H + u, u < H, 0).to(T)[None, :]
        y_n += tl.load(b_hh + 2 * H + u, u < H, 0).to(T)[None, :]
    h = tl.load(h_now + u[None, :], cell, 0)
    keep = tl.full([1, 1], 1, T) - tl.full([1, 1], zoneout, T)
    place = row[:, None] * (D * H) + direction * H + u[None, :]
    if update is not None:
        keep = tl.load(update + place, used, 0).to(T)
    r, z, n, new = _step(x_r + y_r, x_z + y_z, x_n, y_n, h, keep, ZONEOUT)
    tl.store(h_next + u[None, :], tl.where(used, new, h), (b < B)[:, None] & cell)
    tl.store(out + place, narrow(new, out.dtype.element_ty), used)
    if SAVE:
        tl.store(at + u[None, :], r, used)
        tl.store(at + (H + u)[None, :], z, used)
        tl.store(at + (2 * H + u)[None, :], n, used)
        tl.store(at + (3 * H + u)[None, :], y_n, used)


@triton.jit(do_not_specialize=SCALARS)
def _gru_forward_kernel(
    w_hh, gates, b_hh, g_hh, state, raw, update, offsets, lengths, out, hn, normed, rstd,
    T, B, H, D, N, gates_row, zoneout: tl.float64,
    SAVE: tl.constexpr, ZONEOUT: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gates (D, N, gates_row): x W + b in, the gates out with SAVE. state (2, D, B, H), of which the
    first half holds h0. raw (D, B, 3H): scratch for layer norm, which is there with g_hh."""
    F: tl.constexpr = state.dtype.element_ty
    direction = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    gate = tl.cast(H, tl.int64) * H  # elements of w_hh
    steps = _steps_of(lengths, T, b, B)
    rows = b < B
    # Rows behind the batch read the last one's state, so that these loads need no mask.
    mine = (direction * B + tl.minimum(b, B - 1)).to(tl.int64)[:, None]
    state += mine * H
    half = tl.cast(D, tl.int64) * B * H
    gates += direction * N * gates_row
    w_hh += direction * 3 * H * H
    if b_hh is not None:
        b_hh += direction * 3 * H
    if g_hh is not None:
        g_hh += direction * 3 * H
        raw += mine * 3 * H
    if normed is not None:
        normed += direction * N * 6 * H + 3 * H
        rstd += direction * N * 2 + 1
    k = tl.arange(0, BK)
    for s in range(steps):
        t = tl.where(direction == 1, steps - 1 - s, s)
        row, active = _rows_of(offsets, t, b, B)
        at = gates + row[:, None] * gates_row
        h_now, h_next = state + (s % 2) * half, state + ((s + 1) % 2) * half
        mean, spread, count = tl.zeros([BB], F), tl.zeros([BB], F), tl.zeros([BB], F)
        for first in range(0, H, BU):
            u = first + tl.arange(0, BU)
            y_r, y_z, y_n = tl.zeros([BB, BU], F), tl.zeros([BB, BU], F), tl.zeros([BB, BU], F)
            w = w_hh + u[None, :].to(tl.int64) * H
            for start in range(0, H, BK):
                c = start + k
                h = narrow(tl.load(h_now + c[None, :], c[None, :] < H, 0), w_hh.dtype.element_ty)
                used = (c[:, None] < H) & (u[None, :] < H)
                y_r = dot(h, tl.load(w + c[:, None], used, 0), y_r, PRECISION)
                y_z = dot(h, tl.load(w + gate + c[:, None], used, 0), y_z, PRECISION)
                y_n = dot(h, tl.load(w + 2 * gate + c[:, None], used, 0), y_n, PRECISION)
            if g_hh is None:
                _make_gates(
                    at,
                    y_r,
                    y_z,
                    y_n,
                    b_hh,
                    h_now,
                    h_next,
                    out,
                    update,
                    row,
                    active,
                    b,
                    u,
                    B,
                    H,
                    D,
                    direction,
                    zoneout,
                    SAVE,
                    ZONEOUT,
                )
            else:
                # Mean and sum of squared differences of this tile, joined to those so far
                # (Chan, Golub, LeVeque, 1979).
                cell = u[None, :] < H
                n = 3 * tl.minimum(H - first, BU)
                part = tl.sum(y_r + y_z + y_n, 1) / n
                a = tl.where(cell, y_r - part[:, None], 0)
                c = tl.where(cell, y_z - part[:, None], 0)
                e = tl.where(cell, y_n - part[:, None], 0)
                delta = part - mean
                spread += tl.sum(a * a + c * c + e * e, 1) + delta * delta * (count * n / (count + n))
                mean += delta * (n / (count + n))
                count += n
                tl.store(raw + u[None, :], y_r, cell)
                tl.store(raw + (H + u)[None, :], y_z, cell)
                tl.store(raw + (2 * H + u)[None, :], y_n, cell)
        if g_hh is not None:
            scale = 1 / tl.sqrt(spread / (3 * H) + NORM_EPS)
            if rstd is not None:
                tl.store(rstd + row * 2, scale, active)
            tl.debug_barrier()
            for first in range(0, H, BU):
                u = first + tl.arange(0, BU)
                y_r = _normalise(raw, g_hh, normed, row, active, u, H, 0, mean, scale)
                y_z = _normalise(raw, g_hh, normed, row, active, u, H, H, mean, scale)
                y_n = _normalise(raw, g_hh, normed, row, active, u, H, 2 * H, mean, scale)
                _make_gates(
                    at,
                    y_r,
                    y_z,
                    y_n,
                    b_hh,
                    h_now,
                    h_next,
                    out,
                    update,
                    row,
                    active,
                    b,
                    u,
                    B,
                    H,
                    D,
                    direction,
                    zoneout,
                    SAVE,
                    ZONEOUT,
                )
        tl.debug_barrier()
    last = state + (steps % 2) * half
    for first in range(0, H, BU):
        u = first + tl.arange(0, BU)
        h = tl.load(last + u[None, :], u[None, :] < H, 0)
        tl.store(hn + mine * H + u[None, :], narrow(h, hn.dtype.element_ty), rows[:, None] & (u[None, :] < H))


@triton.jit
def _normalise(raw, gain, normed, row, active, u, H, offset, mean, scale):
    """One gate of a tile: (y - mean) * scale, which is kept, times the gain."""
    cell = u[None, :] < H
    y = tl.load(raw + (offset + u)[None, :], cell, 0)
    v = (y - mean[:, None]) * scale[:, None]
    if normed is not None:
        tl.store(normed + row[:, None] * 6 * H + (offset + u)[None, :], v, active[:, None] & cell)
    return v * tl.load(gain + offset + u, u < H, 0).to(y.dtype)[None, :]


@triton.jit(do_not_specialize=SCALARS)
def _gru_backward_kernel(
    w_hh, gates, g_hh, carry, dout, out, h0, update, offsets, lengths, delta, outer, previous, normed, rstd,
    T, B, H, D, N, delta_row, input_at, zoneout: tl.float64,
    ZONEOUT: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """carry (D, B, H): the gradient of hn in, of h0 out. delta (D, N, delta_row), the input's part from
    `input_at` on. outer (D, N, 3H): (dr, dz, dq) before the norm's own backward, with layer norm.
    previous (D, N, H): the states before, for the gradient of W_hh, or None."""
    F: tl.constexpr = carry.dtype.element_ty
    direction = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    steps = _steps_of(lengths, T, b, B)
    mine = (direction * B + tl.minimum(b, B - 1)).to(tl.int64)[:, None]
    carry += mine * H
    h0 += mine * H
    gates += direction * N * 4 * H
    delta += direction * N * delta_row
    w_hh += direction * 3 * H * H
    if previous is not None:
        previous += direction * N * H
    if g_hh is not None:
        g_hh += direction * 3 * H
        outer += direction * N * 3 * H
        normed += direction * N * 6 * H + 3 * H
        rstd += direction * N * 2 + 1
    k = tl.arange(0, BK)
    for s in range(steps):
        t = tl.where(direction == 1, s, steps - 1 - s)
        row, active = _rows_of(offsets, t, b, B)
        before = tl.where(direction == 1, t + 1, t - 1)
        there = (before >= 0) & (before < steps)
        row_before, had = _rows_of(offsets, tl.where(there, before, t), b, B)
        had = had & active & (b < tl.where(there, B, 0))
        sums, slopes = tl.zeros([BB], F), tl.zeros([BB], F)
        for first in range(0, H, BU):
            u = first + tl.arange(0, BU)
            used = active[:, None] & (u[None, :] < H)
            at = gates + row[:, None] * 4 * H + u[None, :]
            r, z = tl.load(at, used, 0), tl.load(at + H, used, 0)
            n, q = tl.load(at + 2 * H, used, 0), tl.load(at + 3 * H, used, 0)
            column = direction * H + u[None, :]
            h = tl.load(out + row_before[:, None] * (D * H) + column, had[:, None] & (u[None, :] < H), 0)
            h += tl.load(h0 + u[None, :], used & ~had[:, None], 0)
            if previous is not None:
                tl.store(previous + row[:, None] * H + u[None, :], h, used)
            h = h.to(F)
            grad = tl.load(carry + u[None, :], used, 0)
            place = row[:, None] * (D * H) + column
            if dout is not None:
                grad += tl.load(dout + place, used, 0).to(F)
            keep, grad_z = z, grad
            if ZONEOUT:
                share = tl.full([1, 1], 1, F) - tl.full([1, 1], zoneout, F)
                if update is not None:
                    share = tl.load(update + place, used, 0).to(F)
                keep = 1 - share * (1 - z)
                grad_z = grad * share
            dn = grad * (1 - keep) * (1 - n * n)
            dz = grad_z * (h - n) * z * (1 - z)
            dr = dn * q * r * (1 - r)
            dq = dn * r
            tl.store(carry + u[None, :], grad * keep, used)
            S: tl.constexpr = delta.dtype.element_ty
            to = delta + row[:, None] * delta_row + u[None, :]
            tl.store(to + input_at, narrow(dr, S), used)
            tl.store(to + input_at + H, narrow(dz, S), used)
            tl.store(to + input_at + 2 * H, narrow(dn, S), used)
            if g_hh is None:
                tl.store(to, narrow(dq, S), used)
            else:
                v = normed + row[:, None] * 6 * H + u[None, :]
                beside = outer + row[:, None] * 3 * H + u[None, :]
                tl.store(beside, dr, used)
                tl.store(beside + H, dz, used)
                tl.store(beside + 2 * H, dq, used)
                g_r = dr * tl.load(g_hh + u, u < H, 0).to(F)[None, :]
                g_z = dz * tl.load(g_hh + H + u, u < H, 0).to(F)[None, :]
                g_n = dq * tl.load(g_hh + 2 * H + u, u < H, 0).to(F)[None, :]
                sums += tl.sum(g_r + g_z + g_n, 1)
                slopes += tl.sum(g_r * tl.load(v, used, 0) + g_z * tl.load(v + H, used, 0)
                                 + g_n * tl.load(v + 2 * H, used, 0), 1)  # fmt: skip
        tl.debug_barrier()
        if g_hh is not None:
            mean, slope = sums / (3 * H), slopes / (3 * H)
            scale = tl.load(rstd + row * 2, active, 0)
            for first in range(0, H, BU):
                u = first + tl.arange(0, BU)
                to = delta + row[:, None] * delta_row
                beside, v = outer + row[:, None] * 3 * H, normed + row[:, None] * 6 * H
                _norm_gradient(to + H, beside, v, g_hh, active, u, H, mean, slope, scale)
                _norm_gradient(to + 2 * H, beside + H, v + H, g_hh + H, active, u, H, mean, slope, scale)
                _norm_gradient(to, beside + 2 * H, v + 2 * H, g_hh + 2 * H, active, u, H, mean, slope, scale)
            tl.debug_barrier()
        for first in range(0, H, BU):
            u = first + tl.arange(0, BU)
            acc = tl.zeros([BB, BU], F)
            for start in range(0, 3 * H, BK):
                c = start + k
                x = tl.load(
                    delta + row[:, None] * delta_row + c[None, :], active[:, None] & (c[None, :] < 3 * H), 0
                )
                # (dq, dr, dz) are of the rows n, r, z.
                gate_row = tl.where(c < H, c + 2 * H, c - H).to(tl.int64)
                used = (c[:, None] < 3 * H) & (u[None, :] < H)
                acc = dot(x, tl.load(w_hh + gate_row[:, None] * H + u[None, :], used, 0), acc, PRECISION)
            used = active[:, None] & (u[None, :] < H)
            tl.store(carry + u[None, :], tl.load(carry + u[None, :], used, 0) + acc, used)
        tl.debug_barrier()


@triton.jit
def _norm_gradient(to, dy, v, gain, active, u, H, mean, slope, scale):
    """One gate of a tile: dy back through y = gain v, v = (x - mean) * scale."""
    used = active[:, None] & (u[None, :] < H)
    dy = tl.load(dy + u[None, :], used, 0)
    dv = dy * tl.load(gain + u, u < H, 0).to(dy.dtype)[None, :]
    dx = scale[:, None] * (dv - mean[:, None] - tl.load(v + u[None, :], used, 0) * slope[:, None])
    tl.store(to + u[None, :], narrow(dx, to.dtype.element_ty), used)


# ---- layer norm of the input's products -----------------------------------------------------


@triton.jit
def _norm_kernel(y, gain, bias, normed, rstd, width, y_row, BLOCK: tl.constexpr):
    """A row of y (N, y_row), its first `width` values: gain * (y - mean) * rstd + bias, in place."""
    F: tl.constexpr = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    y += row * y_row
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], F)
    for first in range(0, width, BLOCK):
        total += tl.load(y + first + at, first + at < width, 0)
    mean = tl.sum(total) / width
    squares = tl.zeros([BLOCK], F)
    for first in range(0, width, BLOCK):
        v = tl.where(first + at < width, tl.load(y + first + at, first + at < width, 0) - mean, 0)
        squares += v * v
    scale = 1 / tl.sqrt(tl.sum(squares) / width + NORM_EPS)
    if rstd is not None:
        tl.store(rstd + row * 2, scale)
    for first in range(0, width, BLOCK):
        i = first + at
        used = i < width
        v = (tl.load(y + i, used, 0) - mean) * scale
        if normed is not None:
            tl.store(normed + row * 2 * width + i, v, used)
        v = v * tl.load(gain + i, used, 0).to(F)
        if bias is not None:
            v += tl.load(bias + i, used, 0).to(F)
        tl.store(y + i, v, used)


@triton.jit
def _norm_backward_kernel(dy, gain, normed, rstd, width, dy_row, BLOCK: tl.constexpr):
    """The gradient of the norm's output, a row of dy (N, dy_row), to that of its input, in place."""
    F: tl.constexpr = normed.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    dy += row * dy_row
    normed += row * 2 * width
    at = tl.arange(0, BLOCK)
    sums, slopes = tl.zeros([BLOCK], F), tl.zeros([BLOCK], F)
    for first in range(0, width, BLOCK):
        i = first + at
        used = i < width
        dv = tl.load(dy + i, used, 0).to(F) * tl.load(gain + i, used, 0).to(F)
        sums += dv
        slopes += dv * tl.load(normed + i, used, 0)
    mean, slope, scale = tl.sum(sums) / width, tl.sum(slopes) / width, tl.load(rstd + row * 2)
    for first in range(0, width, BLOCK):
        i = first + at
        used = i < width
        dv = tl.load(dy + i, used, 0).to(F) * tl.load(gain + i, used, 0).to(F)
        dx = scale * (dv - mean - tl.load(normed + i, used, 0) * slope)
        tl.store(dy + i, narrow(dx, dy.dtype.element_ty), used)


# ---- configurations and launches ------------------------------------------------------------


def _recurrence_configs(target, dtype, stages=3, **constants):
    """16 rows are the least that tensor cores take: more programs share the batch, and each streams the
    weights; more units at a time make longer products between barriers."""
    if dtype.itemsize == 2:
        return [
            Config(dict(BB=16, BU=64, BK=64), 8, 2 if target.kind == "hip" else stages),
            Config(dict(BB=16, BU=128, BK=64), 8, 2),
        ]
    return [Config(dict(BB=16, BU=32, BK=32), 8, 2)]


def _row_configs(target, dtype, **constants):
    return [Config(dict(BLOCK=1024), 4)]


def _forward_configs(target, dtype, *, ZONEOUT, **constants):
    return _recurrence_configs(target, dtype, 2 if ZONEOUT else 3)  # which needs registers


_forward = Kernel(_gru_forward_kernel, _forward_configs, restore=("gates", "state"))
_backward = Kernel(_gru_backward_kernel, _recurrence_configs, restore=("carry",))
_norm = Kernel(_norm_kernel, _row_configs, matrix=False)
_norm_backward = Kernel(_norm_backward_kernel, _row_configs, matrix=False)


class _Layer:
    """What forward and backward share: sizes, rows of each step, weights by direction."""

    def __init__(self, name, input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout):
        self.D, self.B, self.H = hx.shape
        self.N = math.prod(input.shape[:-1])
        self.x = input.reshape(self.N, input.shape[-1])
        self.compute = compute_dtype(input.dtype)
        self.hx = hx.contiguous()
        self.update = None if update is None else update.contiguous()
        self.zoneout = zoneout
        self.precision = dot_precision(input.dtype, current_target(input.device))
        self.offsets = self.lengths = None
        self.T = input.shape[0]
        if batch_sizes is not None:
            self._read_batch_sizes(name, batch_sizes, input.device)
        per_direction = 2 + 2 * has_biases + 2 * layer_norm
        assert len(weights) == self.D * per_direction, f"fastlm::{name}: {len(weights)} weights"
        columns = [list(weights[i::per_direction]) for i in range(per_direction)]  # each of D tensors
        self.w_ih, self.w_hh = columns[:2]
        self.b_ih, self.b_hh = columns[2:4] if has_biases else (None, None)
        self.g_ih, self.g_hh = columns[-2:] if layer_norm else (None, None)

    def _read_batch_sizes(self, name, batch_sizes, device):
        sizes = batch_sizes.tolist()
        self.T = len(sizes)
        fits = all(a >= b > 0 for a, b in zip([self.B, *sizes], sizes, strict=False))
        if not fits or sum(sizes) != self.N or sizes[:1] != [self.B]:
            raise RuntimeError(
                f"fastlm::{name}: batch_sizes is {sizes}, expected positive sizes that never grow, from "
                f"{self.B} (hx) on, and add up to {self.N} (rows of input)"
            )
        offsets = torch.zeros(self.T + 1, dtype=torch.int64)
        torch.cumsum(batch_sizes, 0, out=offsets[1:])
        lengths = (batch_sizes[None, :] > torch.arange(self.B)[:, None]).sum(1, dtype=torch.int32)
        self.offsets = offsets.to(device, non_blocking=True)
        self.lengths = lengths.to(device, non_blocking=True)

    def recurrent(self, tensors: list[Tensor] | None) -> Tensor | None:
        """A weight of all directions, one behind the other."""
        if tensors is None:
            return None
        return tensors[0].contiguous() if self.D == 1 else torch.stack(tensors)

    def constants(self) -> dict:
        return dict(ZONEOUT=self.update is not None or self.zoneout != 0, PRECISION=self.precision)

    def grid(self, blocks):
        return cdiv(self.B, blocks["BB"]), self.D


def gru_layer(
    input: Tensor, batch_sizes: Tensor | None, hx: Tensor, weights: list[Tensor], has_biases: bool,
    layer_norm: bool, update: Tensor | None, zoneout: float, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    layer = _Layer("gru_layer", input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout)
    D, B, H, N, compute = layer.D, layer.B, layer.H, layer.N, layer.compute
    out = input.new_empty((*input.shape[:-1], D * H))
    hn = input.new_empty((D, B, H))
    norms = D if save and layer_norm else 0
    gates = input.new_empty((D if save else 0, N, 4 * H), dtype=compute)
    normed = input.new_empty((norms, N, 6 * H), dtype=compute)
    rstd = input.new_empty((norms, N, 2), dtype=compute)
    if B == 0:
        return out, hn, gates, normed, rstd
    # The memory of the gates takes x W + b first.
    sums = gates if save else input.new_empty((D, N, 3 * H), dtype=compute)
    for d in range(D):
        bias = None if layer.b_ih is None else layer.b_ih[d].contiguous()
        to = sums[d, :, : 3 * H]
        matmul(layer.x, layer.w_ih[d].t(), to, bias=None if layer_norm else bias)
        if layer_norm:
            _norm(
                lambda blocks: (N,), to, layer.g_ih[d].contiguous(), bias, normed[d] if norms else None,
                rstd[d] if norms else None, 3 * H, sums.shape[2], sizes=(H,),
            )  # fmt: skip
    state = input.new_empty((2, D, B, H), dtype=compute)
    state[0] = hx
    raw = input.new_empty((D, B, 3 * H), dtype=compute) if layer_norm else None
    _forward(
        layer.grid, layer.recurrent(layer.w_hh), sums, layer.recurrent(layer.b_hh),
        layer.recurrent(layer.g_hh), state, raw, layer.update, layer.offsets, layer.lengths, out, hn,
        normed if norms else None, rstd if norms else None, layer.T, B, H, D, N, sums.shape[2], zoneout,
        sizes=(B, H), SAVE=save, **layer.constants(),
    )  # fmt: skip
    return out, hn, gates, normed, rstd


def gru_layer_backward(
    grad_output: Tensor | None, grad_hn: Tensor | None, input: Tensor, batch_sizes: Tensor | None,
    hx: Tensor, weights: list[Tensor], has_biases: bool, layer_norm: bool, update: Tensor | None,
    zoneout: float, output: Tensor, gates: Tensor, normed: Tensor, rstd: Tensor, input_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    layer = _Layer(
        "gru_layer_backward", input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout
    )
    D, B, H, N, compute = layer.D, layer.B, layer.H, layer.N, layer.compute
    if B == 0:
        dx = input.new_empty(input.shape if input_wanted else 0)
        return dx, torch.empty_like(hx), [torch.zeros_like(w) for w in weights] if weights_wanted else []
    carry = input.new_empty((D, B, H), dtype=compute)
    if grad_hn is None:
        carry.zero_()
    else:
        carry.copy_(grad_hn)
    input_at = 3 * H if layer_norm else H
    delta = input.new_empty((D, N, input_at + 3 * H))
    outer = input.new_empty((D, N, 3 * H), dtype=compute) if layer_norm else None
    previous = input.new_empty((D, N, H)) if weights_wanted else None
    normed, rstd = normed.contiguous(), rstd.contiguous()
    _backward(
        layer.grid, layer.recurrent(layer.w_hh), gates.contiguous(), layer.recurrent(layer.g_hh), carry,
        None if grad_output is None else grad_output.contiguous(), output.contiguous(), layer.hx,
        layer.update, layer.offsets, layer.lengths, delta, outer, previous,
        normed if layer_norm else None, rstd if layer_norm else None,
        layer.T, B, H, D, N, delta.shape[2], input_at, zoneout, sizes=(B, H), **layer.constants(),
    )  # fmt: skip
    grads = []
    for d in range(D):
        of_input = delta[d, :, input_at:]
        if weights_wanted:
            sums = _vector_gradients(layer, d, delta, input_at, outer, normed)
        if layer_norm:
            _norm_backward(
                lambda blocks: (N,), of_input, layer.g_ih[d].contiguous(), normed[d], rstd[d], 3 * H,
                delta.shape[2], sizes=(H,),
            )  # fmt: skip
        if weights_wanted:
            grads += _matrix_gradients(layer, d, delta, input_at, previous[d]) + sums
    return _input_gradient(layer, input, delta, input_at, input_wanted), carry.to(hx.dtype), grads


def _vector_gradients(layer: _Layer, d: int, delta, input_at: int, outer, normed) -> list[Tensor]:
    """Of b_ih and b_hh, then of the gains, where there are such."""
    H, grads = layer.H, []
    of_input, compute, dtype = delta[d, :, input_at:], layer.compute, layer.x.dtype
    if layer.b_ih is not None:
        grads.append(of_input.sum(0, dtype=compute))
        if outer is None:
            hidden = delta[d, :, : 3 * H].sum(0, dtype=compute)
            grads.append(torch.cat([hidden[H:], hidden[:H]]))
        else:
            grads.append(outer[d].sum(0))
    if outer is not None:
        grads.append((of_input * normed[d, :, : 3 * H]).sum(0))
        grads.append((outer[d] * normed[d, :, 3 * H :]).sum(0))
    return [g.to(dtype) for g in grads]


def _matrix_gradients(layer: _Layer, d: int, delta, input_at: int, previous: Tensor) -> list[Tensor]:
    """Of w_ih and w_hh; the rows r and z of w_hh from (dr, dz), its rows n from dq."""
    H, dtype = layer.H, layer.x.dtype
    dw_ih = matmul(delta[d, :, input_at:].t(), layer.x, torch.empty_like(layer.w_ih[d], dtype=dtype))
    dw_hh = torch.empty_like(layer.w_hh[d])
    matmul(delta[d, :, H : 3 * H].t(), previous, dw_hh[: 2 * H])
    matmul(delta[d, :, :H].t(), previous, dw_hh[2 * H :])
    return [dw_ih, dw_hh]


def _input_gradient(layer: _Layer, input: Tensor, delta, input_at: int, wanted: bool) -> Tensor:
    if not wanted:
        return input.new_empty(0)
    dx = input.new_empty((layer.N, layer.x.shape[1]))
    so_far = None
    for d in range(layer.D):
        to = dx if d == layer.D - 1 else torch.empty_like(dx, dtype=layer.compute)
        matmul(delta[d, :, input_at:], layer.w_ih[d], to, addend=so_far)
        so_far = to
    return dx.view(input.shape)
