"""What calls with NaN or infinity among their arguments give: at each place what the reference gives there, or NaN
where that is infinite; so no NaN is lost, and none is where a number belongs.

Of attention with a band (is_causal, window_size) there are two references. To one a key that the band hides from a
query is not there; to the other it counts 0 times, which is NaN where it isn't finite. Kernels take keys in blocks
and don't read the blocks that are hidden whole, so either may be right.
"""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from harness import largest, run, to_double
from torch import Tensor

from fastlm import reference
from fastlm.reference import band, scaled_dot_product_attention

from .calls import Call

# Relative to the largest number among the results, or 1: what rounding leaves is for other calls to tell.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LOWEST = -1e30  # in place of -inf: the weight is 0 all the same, and a row has some


def attention(
    read: bool, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    *, window_size=(-1, -1), alibi_slopes=None, **options,
):  # fmt: skip
    """reference.scaled_dot_product_attention; to `read`, the keys that the band hides count 0 times, and so does
    one more."""
    Tq, Tk = query.size(-2), key.size(-2)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)
    bias = query.new_zeros(query.size(-3), Tq, Tk)
    if alibi_slopes is not None:
        bias = bias - alibi_slopes[..., None, None] * (i + (Tk - Tq) - j).abs()
    if attn_mask is not None:
        hides = attn_mask.dtype == torch.bool
        bias = bias + (torch.zeros_like(bias).masked_fill(~attn_mask, -torch.inf) if hides else attn_mask)
    lower, upper = band(Tq, Tk, is_causal, window_size)
    first = [0 if lower is None else min(max(i - lower, 0), Tk) for i in range(Tq)]
    end = [Tk if upper is None else min(max(i + upper + 1, first[i]), Tk) for i in range(Tq)]
    if read or Tq == 0:
        hidden = torch.tensor([[not a <= j < b for j in range(Tk)] for a, b in zip(first, end, strict=True)])
        bias = torch.where(bias == -torch.inf, LOWEST, bias) + LOWEST * hidden.view(Tq, Tk)
        bias = F.pad(bias, (0, 1), value=LOWEST)
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, bias, scale=scale, **options)
    parts = []
    for row, a, b in zip(range(Tq), first, end, strict=True):
        q, k, v = query[..., row : row + 1, :], key[..., a:b, :], value[..., a:b, :]
        seen = bias[..., row : row + 1, a:b]
        parts.append(scaled_dot_product_attention(q, k, v, seen, scale=scale, **options))
    if not options.get("return_lse"):
        return torch.cat(parts, -2)
    outs, sums = zip(*parts, strict=True)
    nothing = query[..., :0].sum() + key[..., :0].sum()  # lse is a function of both also where no key is seen
    return torch.cat(outs, -2), torch.cat(sums, -1) + nothing


def references(operator) -> list:
    """The operator's reference, twice; of attention both."""
    both = [partial(attention, read) for read in (False, True)]
    if operator.name == "scaled_dot_product_attention":
        return both
    if operator.name == "varlen_attn":
        name = "scaled_dot_product_attention"
        return [patch.object(reference, name, formula)(operator.reference) for formula in both]
    return [operator.reference] * 2


def compare(operator, call: Call) -> str | None:
    """What is wrong with the operator's results."""
    outputs, gradients, cotangents = run(operator.function, call.arguments(), call.seed)
    exact = []
    for formula in references(operator):
        values, slopes, _ = run(formula, to_double(call.arguments()), call.seed, cotangents)
        exact.append(values + slopes)
    return differs(outputs + gradients, *exact)


def differs(results: list[Tensor], expected: list[Tensor], read: list[Tensor] | None = None) -> str | None:
    """`read`: the second reference, if there is one."""
    scale = max(1.0, *(largest(x.detach()) for x in expected))
    for at, (x, y, z) in enumerate(zip(results, expected, read or expected, strict=True)):
        if x.shape != y.shape or x.dtype.is_floating_point != y.dtype.is_floating_point:
            return f"result {at}: {x.dtype} of {tuple(x.shape)}, expected {y.dtype} of {tuple(y.shape)}"
        allowed = TOLERANCE.get(x.dtype, 3e-2)
        x, y, z = (t.detach().double() for t in (x, y, z))
        right = torch.isclose(x, y, rtol=allowed, atol=allowed * scale, equal_nan=True)
        wrong = ~(right | x.isnan() & ~z.isfinite())
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            return f"result {at} has {x[place]:.4g} where {y[place]:.4g} is expected, at {place} of {tuple(x.shape)}"
    return None
