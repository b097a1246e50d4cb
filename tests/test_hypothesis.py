"""Generated shapes, memory layouts and combinations of options, by the rule of harness.py.

CI draws the same examples each time (HYPOTHESIS_PROFILE=ci or CI set); elsewhere they vary.
"""

import math
import os

import torch
from cases import OPERATORS, Case, Draw
from harness import compare
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastlm
from fastlm import reference

_common = dict(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
settings.register_profile("default", **_common)
settings.register_profile("ci", **_common, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "default"))

# Lengths meet at the boundaries of vectors (4, 8, 16 lanes) and tiles.
lengths = st.sampled_from((0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65))
sizes = st.sampled_from((1, 2, 3, 4, 7, 8, 9, 16, 17, 33))
layouts = st.sampled_from(("contiguous", "strided", "transposed", "expanded", "offset"))
dtypes = st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))
isas = st.sampled_from(fastlm._C.isas())


def check(name: str, isa: str, dtype: torch.dtype, build, eager: bool = True) -> None:
    """compare() for a case that was made up just now."""
    before = fastlm._C.isa()
    fastlm._C.set_isa(isa)
    try:
        compare(OPERATORS[name], Case("generated", build, eager=eager), dtype, generated=True)
    finally:
        fastlm._C.set_isa(before)


def broadcastable(shape):
    """Shapes that broadcast to this one, of 2 dimensions or more."""

    def choose(parts):
        keep, drop = parts
        full = tuple(n if k else 1 for n, k in zip(shape, keep, strict=True))
        return full[min(drop, len(shape) - 2) :]

    kept = st.lists(st.booleans(), min_size=len(shape), max_size=len(shape))
    return st.tuples(kept, st.integers(0, len(shape))).map(choose)


@given(st.data(), isas, dtypes)
def test_scaled_dot_product_attention(data, isa, dtype):
    draw = data.draw
    batch, kv_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    heads = kv_heads * group
    Tq, Tk, D, Dv = draw(lengths), draw(lengths), draw(sizes), draw(sizes)
    layout = [draw(layouts) for _ in range(3)]
    options = {}
    if group > 1:
        options["enable_gqa"] = True
    mask = draw(st.sampled_from(("none", "causal", "bool", "float")))
    mask_shape = draw(broadcastable((batch, heads, Tq, Tk)))
    if mask == "causal":
        options["is_causal"] = True
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((0.05, 0.5, 1.0)))
    ours = {}
    if draw(st.booleans()):
        ours["window_size"] = draw(st.tuples(st.sampled_from((-1, 0, 1, 9)), st.sampled_from((-1, 0, 2))))
    if draw(st.booleans()):
        ours["softcap"] = draw(st.sampled_from((0.5, 20.0)))
    alibi, sinks = draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()):
        ours["return_lse"] = True

    def build(dtype, seed):
        values = Draw(dtype, seed)
        q = values(batch, heads, Tq, D, layout=layout[0])
        k = values(batch, kv_heads, Tk, D, layout=layout[1])
        v = values(batch, kv_heads, Tk, Dv, layout=layout[2])
        kwargs = {**options, **ours}
        if mask == "bool":
            kwargs["attn_mask"] = values.mask(*mask_shape)
        elif mask == "float":
            kwargs["attn_mask"] = values(*mask_shape)
        if alibi:
            kwargs["alibi_slopes"] = values.uniform(heads).float()
        if sinks:
            kwargs["sinks"] = values(heads)
        return (q, k, v), kwargs

    check("scaled_dot_product_attention", isa, dtype, build, eager=not (ours or alibi or sinks))


@given(st.data(), isas, dtypes)
def test_varlen_attn(data, isa, dtype):
    draw = data.draw
    kv_heads, group, D = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(sizes)
    number = draw(st.integers(1, 4))
    q_lengths = [draw(lengths) for _ in range(number)]
    same = draw(st.booleans())
    k_lengths = q_lengths if same else [draw(lengths) for _ in range(number)]
    window = draw(st.sampled_from(((-1, -1), (-1, 0), (3, 0), (2, 1))))
    layout = draw(layouts)

    def build(dtype, seed):
        values = Draw(dtype, seed)
        q = values(sum(q_lengths), kv_heads * group, D, layout=layout)
        k = values(sum(k_lengths), kv_heads, D, layout=layout)
        v = values(sum(k_lengths), kv_heads, D)
        starts = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (q_lengths, k_lengths)]
        longest = max(q_lengths), max(k_lengths)
        return (q, k, v, *starts, *longest), dict(window_size=window, enable_gqa=group > 1)

    check("varlen_attn", isa, dtype, build, eager=False)


@given(st.data(), isas, dtypes)
def test_cross_entropy(data, isa, dtype):
    draw = data.draw
    classes = draw(st.sampled_from((1, 2, 3, 7, 8, 9, 17, 33, 100, 257)))
    batch, extra = draw(st.sampled_from((None, 0, 1, 2, 5))), draw(st.integers(0, 2))
    shape = (classes,) if batch is None else (batch, classes, *(2, 3)[:extra])
    probabilities = draw(st.booleans())
    weighted, layout = draw(st.booleans()), draw(layouts)
    scale = draw(st.sampled_from((0.1, 1.0, 30.0)))
    options = dict(
        reduction=draw(st.sampled_from(("none", "mean", "sum"))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1, 1.0))),
    )
    if not probabilities and draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from((-100, -1, 0)))
    ours = {}
    if draw(st.booleans()):
        ours["z_loss"] = 1e-2
    if draw(st.booleans()):
        ours["softcap"] = 5.0
    if draw(st.booleans()):
        ours["return_lse"] = True

    def build(dtype, seed):
        values = Draw(dtype, seed)
        x = values(*shape, layout=layout, scale=scale)
        rest = () if batch is None else (batch, *shape[2:])
        if probabilities:
            target = values(*shape, grad=False).double().softmax(0 if batch is None else 1)
            target = target.to(dtype).requires_grad_()
        else:
            target = values.integers(0, classes, rest)
            if "ignore_index" in options:
                target = target.masked_fill(values.mask(*rest, keep=0.3), options["ignore_index"])
        weight = values.uniform(classes) if weighted else None
        return (x, target), dict(weight=weight, **options, **ours)

    check("cross_entropy", isa, dtype, build, eager=not ours)


@given(st.data(), isas, dtypes)
def test_linear_cross_entropy(data, isa, dtype):
    draw = data.draw
    batch, width = draw(st.sampled_from((0, 1, 2, 7, 17, 40))), draw(sizes)
    classes = draw(st.sampled_from((1, 2, 7, 8, 9, 17, 33, 100)))
    bias, weighted = draw(st.booleans()), draw(st.booleans())
    layout = [draw(layouts) for _ in range(2)]
    frozen = draw(st.sampled_from((None, 0, 1)))
    options = dict(
        reduction=draw(st.sampled_from(("none", "mean", "sum"))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1))),
    )
    ours = {}
    if draw(st.booleans()):
        ours["z_loss"] = 1e-2
    if draw(st.booleans()):
        ours["softcap"] = 5.0
    if draw(st.booleans()):
        ours["return_lse"] = True
    assume(frozen is None or batch > 0)

    def build(dtype, seed):
        values = Draw(dtype, seed)
        x = values(batch, width, layout=layout[0], grad=frozen != 0)
        w = values(classes, width, layout=layout[1], grad=frozen != 1)
        target = values.integers(0, classes, (batch,))
        kwargs = dict(options, **ours)
        if bias:
            kwargs["linear_bias"] = values(classes)
        if weighted:
            kwargs["weight"] = values.uniform(classes)
        return (x, w, target), kwargs

    check("linear_cross_entropy", isa, dtype, build, eager=not ours)


def gru_parameters(values, width, hidden, layers, directions, bias, norm):
    """What nn.GRU keeps in _flat_weights, of its usual size, and the gains of layer_norm."""
    scale = hidden**-0.5
    weights, gains = [], []
    for layer in range(layers):
        for _ in range(directions):
            inputs = width if layer == 0 else directions * hidden
            weights.append(values(3 * hidden, inputs, scale=scale))
            weights.append(values(3 * hidden, hidden, scale=scale))
            if bias:
                weights += [values(3 * hidden, scale=scale), values(3 * hidden, scale=scale)]
            if norm:
                gains += [values(3 * hidden), values(3 * hidden)]
    return weights, gains if norm else None


@given(st.data(), isas, dtypes)
def test_gru(data, isa, dtype):
    draw = data.draw
    T, B = draw(st.sampled_from((1, 2, 3, 7, 20))), draw(st.sampled_from((0, 1, 2, 3, 5, 9)))
    width, hidden = draw(sizes), draw(sizes)
    layers, directions = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    bias, batch_first, train = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    packed, layout = draw(st.booleans()), draw(layouts)
    norm = draw(st.sampled_from((False, False, True)))
    zoneout = 0.0 if train else draw(st.sampled_from((0.0, 0.3)))
    steps = sorted((draw(st.integers(1, T)) for _ in range(B)), reverse=True)
    packed = packed and B > 0

    def build(dtype, seed):
        values = Draw(dtype, seed)
        weights, gains = gru_parameters(values, width, hidden, layers, directions, bias, norm)
        hx = values(layers * directions, B, hidden)
        ours = dict(zoneout=zoneout, layer_norm=gains) if norm or zoneout else {}
        rest = (weights, bias, layers, 0.0, train, directions == 2)
        if packed:
            sizes = torch.tensor([sum(n > t for n in steps) for t in range(steps[0])])
            x = values(sum(steps), width, layout=layout)
            return (x, sizes, hx, *rest), ours
        x = values(*((B, T) if batch_first else (T, B)), width, layout=layout)
        return (x, hx, *rest, batch_first), ours

    check("gru", isa, dtype, build, eager=not (norm or zoneout))


@given(st.data(), isas, dtypes)
def test_gru_cell(data, isa, dtype):
    draw = data.draw
    B, width, hidden = draw(st.sampled_from((0, 1, 2, 3, 5, 9, 17))), draw(sizes), draw(sizes)
    bias, norm, layout = draw(st.booleans()), draw(st.booleans()), draw(layouts)

    def build(dtype, seed):
        values = Draw(dtype, seed)
        weights, gains = gru_parameters(values, width, hidden, 1, 1, bias, norm)
        x, h = values(B, width, layout=layout), values(B, hidden, layout=layout)
        return (x, h, *weights), dict(layer_norm=gains) if norm else {}

    check("gru_cell", isa, dtype, build, eager=not norm)


@given(st.data())
def test_attention_combines_options(data):
    draw = data.draw
    size = st.integers(1, 40)
    group, Hkv, B = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    Tq, Tk, D, Dv = draw(size), draw(size), draw(size), draw(size)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    order = draw(st.permutations((0, 1, 2)))

    def tensor(*shape):
        memory = [shape[d] for d in (*order, 3)] if len(shape) == 4 else shape
        x = torch.randn(memory, dtype=torch.float64)
        if len(shape) == 4:
            x = x.permute(*(order.index(d) for d in range(3)), 3)
        return x.requires_grad_()

    inputs = [tensor(B, group * Hkv, Tq, D), tensor(B, Hkv, Tk, D), tensor(B, Hkv, Tk, Dv)]
    kwargs = {
        "is_causal": draw(st.booleans()),
        "enable_gqa": True,
        "scale": draw(st.sampled_from((None, 0.3, -1.0))),
        "window_size": (draw(st.integers(-1, 20)), draw(st.integers(-1, 20))),
        "softcap": draw(st.sampled_from((0.0, 2.0))),
        "dropout_p": draw(st.sampled_from((0.0, 0.25))),
    }
    full = (B, group * Hkv, Tq, Tk)
    if draw(st.booleans()):
        mask = torch.randn([draw(st.sampled_from((1, n))) for n in full], dtype=torch.float64)
        kind = draw(st.sampled_from(("bool", "float", "gradient")))
        kwargs["attn_mask"] = mask > -0.5 if kind == "bool" else mask.requires_grad_(kind == "gradient")
    if draw(st.booleans()):
        kwargs["alibi_slopes"] = torch.rand(group * Hkv, dtype=torch.float64, requires_grad=True)
    if draw(st.booleans()):
        kwargs["sinks"] = torch.randn(group * Hkv, dtype=torch.float64, requires_grad=True)
    wanted = inputs + [x for x in kwargs.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    results = []
    for function in (fastlm.scaled_dot_product_attention, reference.scaled_dot_product_attention):
        torch.manual_seed(3)
        out, lse = function(*inputs, **kwargs, return_lse=True)
        seen = lse.masked_fill(lse == -math.inf, 0.0)
        grads = torch.autograd.grad(out.sin().sum() + seen.sin().sum(), wanted)
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results)
