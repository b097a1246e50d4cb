"""Sample inputs, shapes and references, one section per operator.

The tests run every case on every ISA and in every dtype (test_operators.py); the
benchmarks time each operator's `bench` cases. Adding an operator is one `register(...)`.

A case builds its arguments from a dtype and a seed. Values are drawn in float64 and then
rounded, so the same seed gives the same problem in every dtype. Floating tensors that the
operator differentiates have requires_grad=True. Arguments may nest (a list of weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

import fastlm

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# One vector of any ISA holds 2 to 16 floats; lengths around these are where kernels break.
LAYOUTS = ("contiguous", "strided", "transposed", "expanded", "offset")


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    id: readable, as in "causal-gqa-T65".
    build: (dtype, seed) -> (args, kwargs).
    eager: torch's own function takes these arguments (False for what only fastlm offers).
    eager_on_gpu: on a GPU, too; where that is what differs, the case says what is wrong with it there.
    random: draws from torch's generator, so that only its own repetition is comparable.
    dtypes: those that the case makes sense in.
    """

    id: str
    build: Callable[[torch.dtype, int], tuple[tuple, dict]]
    eager: bool = True
    eager_on_gpu: bool = True
    random: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES


@dataclass(frozen=True)
class Growth:
    """Cases along one size, of which the benchmarks measure the memory. of: what the size is."""

    of: str
    cases: dict[int, Case]


@dataclass(frozen=True)
class Operator:
    """A public function, what it is measured against, and its cases.

    function: fastlm.<name>.
    reference: fastlm.reference.<name>, same signature, any dtype.
    eager: the torch function that it is a drop-in for; None where torch has none on a CPU.
    cases: for tests. bench: for benchmarks, larger. growth: for their charts of memory.
    flops, bytes: (*args, **kwargs) -> (forward, backward), the least that any
        implementation must compute and move; the benchmarks' floor.
    """

    name: str
    function: Callable
    reference: Callable
    eager: Callable | None
    cases: tuple[Case, ...]
    bench: tuple[Case, ...] = ()
    growth: Growth | None = None
    flops: Callable[..., tuple[int, int]] | None = None
    bytes: Callable[..., tuple[int, int]] | None = None


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    ids = [case.id for case in operator.cases]
    assert operator.name not in OPERATORS, f"{operator.name} is registered twice"
    assert len(ids) == len(set(ids)), f"{operator.name} has two cases of one id"
    OPERATORS[operator.name] = operator


def powers_of_2(first: int, last: int) -> list[int]:
    return [n for n in (1 << i for i in range(last.bit_length())) if n >= first]


class Draw:
    """A seeded source of tensors of one dtype: `draw = Draw(dtype, seed); q = draw(2, 64)`."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, *shape: int, layout: str = "contiguous", scale: float = 1.0, grad: bool = True
    ) -> Tensor:
        """Normal values of standard deviation `scale`, as a leaf in the given layout."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self.lay(values.to(self.dtype), layout).requires_grad_(grad)

    def uniform(self, *shape: int, layout: str = "contiguous", grad: bool = False) -> Tensor:
        """Values in [0, 1)."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self.lay(values.to(self.dtype), layout).requires_grad_(grad)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """int64 values in [low, high)."""
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def mask(self, *shape: int, keep: float = 0.75) -> Tensor:
        """bool, True with probability `keep`."""
        return torch.rand(shape, generator=self.generator) < keep

    @staticmethod
    def lay(values: Tensor, layout: str) -> Tensor:
        """The same values in another memory layout (expanded: the first row repeated)."""
        if layout == "contiguous" or values.dim() == 0:
            return values
        unused = float("nan") if values.is_floating_point() else 0  # between the values
        if layout == "strided":  # every other element along the last dimension
            wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), unused)
            wide[..., ::2] = values
            return wide[..., ::2]
        if layout == "transposed":  # the first dimension is the innermost in memory
            return values.movedim(0, -1).contiguous().movedim(-1, 0)
        if layout == "expanded":  # stride 0 along the first dimension
            return values[:1].expand(values.shape)
        if layout == "offset":  # starts one element into its storage: misaligned for vectors
            flat = values.new_full((values.numel() + 1,), unused)
            flat[1:] = values.flatten()
            return flat[1:].view(values.shape)
        raise ValueError(f"layout is {layout!r}, expected one of {LAYOUTS}")


# ---- scaled_dot_product_attention ---------------------------------------------------------


def attention(
    id: str,
    B: int = 2,
    H: tuple[int, int] | int = 2,
    T: tuple[int, int] | int = 5,
    D: tuple[int, int] | int = 8,
    *,
    mask: Sequence[int] | None = None,
    mask_dtype: str = "bool",
    layout: str = "contiguous",
    slopes: Sequence[int] | None = None,
    sinks: bool = False,
    grad: bool = True,
    eager_on_gpu: bool = True,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **options,
) -> Case:
    """Query (B, Hq, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv); options are passed on.

    mask: its shape; mask_dtype: "bool", "same" as query, "float32", or "constant": without gradient.
    """
    (Hq, Hkv), (Tq, Tk), (D, Dv) = (x if isinstance(x, tuple) else (x, x) for x in (H, T, D))

    def build(dtype, seed):
        draw = Draw(dtype, seed)
        args = [
            draw(B, Hq, Tq, D, layout=layout, grad=grad),
            draw(B, Hkv, Tk, D, layout=layout, grad=grad),
            draw(B, Hkv, Tk, Dv, layout=layout, grad=grad),
        ]
        kwargs = dict(options)
        if Hq != Hkv:
            kwargs["enable_gqa"] = True
        if mask is not None and mask_dtype == "bool":
            kwargs["attn_mask"] = draw.mask(*mask)
        elif mask is not None:
            values = draw(*mask, grad=False)
            kwargs["attn_mask"] = values.float() if mask_dtype == "float32" else values
            kwargs["attn_mask"].requires_grad_(mask_dtype != "constant")
        if slopes is not None:
            kwargs["alibi_slopes"] = draw.uniform(*slopes, grad=grad)
        if sinks:
            kwargs["sinks"] = draw(Hq)
        return tuple(args), kwargs

    ours = {"window_size", "softcap", "return_lse"}
    eager = not (ours & set(options) or slopes or sinks)
    return Case(id, build, eager, eager_on_gpu, random="dropout_p" in options, dtypes=dtypes)


def broken_attention(id: str, change: Callable[[Tensor, Tensor, Tensor], dict]) -> Case:
    """Queries, keys and values with values changed in place; the function may return options."""

    def build(dtype, seed):
        draw = Draw(dtype, seed)
        q, k, v = (draw(1, 2, 5, 8, grad=False) for _ in range(3))
        kwargs = change(q, k, v) or {}
        return (q, k, v), kwargs

    return Case(id, build)


def _some_rows_masked(q, k, v):
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[[0, 3]] = False
    return {"attn_mask": mask}


def _all_minus_infinity(q, k, v):
    return {"attn_mask": torch.full((5, 5), float("-inf"), dtype=q.dtype)}


def _huge_logits(q, k, v):
    q.mul_(300)


def _nan_query(q, k, v):
    q[0, 0, 2] = float("nan")
    return {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}


def attention_products(query, key, value, *args, is_causal=False, **kwargs):
    """Multiply-adds count two; the backward computes the scores again (five products to two)."""
    (B, H, Tq, D), Tk, Dv = query.shape, key.size(-2), value.size(-1)
    pairs = Tq * Tk
    if is_causal:
        n = min(Tq, Tk)
        pairs = n * (n + 1) // 2 + (Tq - n) * Tk
    forward = 2 * B * H * pairs * (D + Dv)
    return forward, B * H * pairs * 2 * (3 * D + 2 * Dv)


def attention_traffic(query, key, value, *args, **kwargs):
    """Forward reads q, k, v and writes out; backward reads these and dout, writes three gradients."""
    inputs = sum(x.numel() for x in (query, key, value))
    out = query.numel() // max(query.size(-1), 1) * value.size(-1)
    size = query.element_size()
    return (inputs + out) * size, (2 * inputs + 2 * out) * size


FLOATS = (torch.float32, torch.bfloat16)

register(
    Operator(
        "scaled_dot_product_attention",
        fastlm.scaled_dot_product_attention,
        fastlm.reference.scaled_dot_product_attention,
        torch.nn.functional.scaled_dot_product_attention,
        cases=(
            attention("plain", T=(7, 9)),
            attention("one-query-one-key", T=1, D=1),
            attention("causal", T=33, is_causal=True),
            attention("causal-wide", T=(5, 19), is_causal=True),
            attention("causal-tall", T=(19, 5), is_causal=True),
            # Several blocks of queries and of keys, the last ones partly filled.
            attention("blocks", B=1, H=1, T=(97, 130), D=(16, 24)),
            attention("blocks-causal", B=1, H=(2, 1), T=(193, 193), D=16, is_causal=True),
            attention("gqa", H=(6, 2), T=(9, 17)),
            attention("mqa-causal", H=(4, 1), T=17, is_causal=True),
            attention("odd-heads", H=3, T=(11, 13), D=(7, 5)),
            attention("value-wider", T=(9, 11), D=(3, 33)),
            attention("large-head", B=1, H=1, T=(9, 17), D=(264, 136)),
            attention("transposed", T=(9, 17), D=16, layout="transposed", is_causal=True),
            attention("strided", T=(9, 17), layout="strided"),
            attention("scale", T=9, scale=0.7),
            # Eager's flash kernel for GPUs gives NaN for these.
            attention("scale-negative", T=9, scale=-0.7, eager_on_gpu=False),
            attention("scale-zero", T=9, scale=0.0, eager_on_gpu=False),
            # Few queries take vectors along the head instead of along queries.
            attention("decode", H=3, T=(1, 70), D=33),
            attention("decode-gqa", H=(8, 2), T=(1, 66), D=(24, 16)),
            attention("decode-splits", B=1, H=(2, 1), T=(1, 2100), D=16),
            attention("few-queries-splits", B=1, H=(4, 2), T=(5, 1100), D=8, is_causal=True),
            attention("mask-bool", T=(9, 70), mask=(2, 1, 9, 70)),
            attention("mask-keys", T=(9, 17), mask=(2, 1, 1, 17)),
            attention("mask-bool-causal", T=17, mask=(17, 17), is_causal=True, dtypes=FLOATS),
            attention("mask-float", T=(9, 17), mask=(9, 17), mask_dtype="constant"),
            attention(
                "mask-float32",
                T=(9, 17),
                mask=(2, 2, 9, 17),
                mask_dtype="float32",
                eager_on_gpu=False,  # takes a mask of the query's dtype alone
                dtypes=(torch.float32, torch.bfloat16, torch.float16),
            ),
            attention("mask-gradient", T=(9, 17), mask=(2, 2, 9, 17), mask_dtype="same"),
            attention("mask-gradient-2d", T=(98, 66), mask=(98, 66), mask_dtype="same"),
            attention("mask-gradient-heads", H=(4, 2), T=(9, 17), mask=(4, 1, 17), mask_dtype="same"),
            attention(  # eager's memory-efficient kernel wants the keys of a mask to be contiguous
                "mask-gradient-queries", T=(9, 17), mask=(2, 1, 9, 1), mask_dtype="same", eager_on_gpu=False
            ),
            attention("window", T=33, window_size=(5, 3)),
            attention("window-left", T=(9, 70), window_size=(20, -1)),
            attention("window-causal-blocks", B=1, H=1, T=(200, 300), window_size=(70, 0)),
            attention("window-tall", T=(19, 5), window_size=(2, 0), return_lse=True),
            attention("window-beyond", H=(4, 2), T=(9, 17), window_size=(1 << 40, 3)),
            attention("softcap", T=(9, 17), softcap=1.5),
            attention("alibi", H=(4, 2), T=(9, 17), slopes=(4,), is_causal=True),
            attention("alibi-batch", T=(17, 33), slopes=(2, 2), softcap=3.0),
            attention("sinks", H=(4, 2), T=(9, 17), sinks=True, return_lse=True),
            attention("sinks-window-decode", T=(2, 40), sinks=True, window_size=(9, 0)),
            attention("lse", T=(9, 17), return_lse=True),
            attention("lse-gqa-causal", H=(4, 1), T=33, return_lse=True, is_causal=True),
            attention(
                "everything",
                H=(4, 2),
                T=(33, 70),
                D=(16, 8),
                mask=(2, 4, 33, 70),
                mask_dtype="same",
                slopes=(4,),
                sinks=True,
                softcap=4.0,
                window_size=(30, 5),
                return_lse=True,
            ),
            attention("dropout", T=(9, 17), dropout_p=0.3),
            attention("dropout-causal-mask", H=(4, 2), T=(33, 70), mask=(70,), dropout_p=0.5, is_causal=True),
            attention("dropout-all", T=(9, 17), dropout_p=1.0),
            attention("no-queries", T=(0, 5)),
            attention("no-keys", T=(5, 0)),
            # Eager's flash kernel for GPUs gives a result without a gradient.
            attention("no-batch", B=0, eager_on_gpu=False),
            attention("no-head-size", D=(0, 8), eager_on_gpu=False),
            broken_attention("rows-masked", _some_rows_masked),
            broken_attention("all-masked", _all_minus_infinity),
            broken_attention("nan-query", _nan_query),
            broken_attention("huge-logits", _huge_logits),
        ),
        bench=(
            attention("4x12x1024x64", 4, 12, 1024, 64, is_causal=True, dtypes=FLOATS),
            attention("1x12x4096x64", 1, 12, 4096, 64, is_causal=True, dtypes=FLOATS),
            attention("1x32on8x2048x128", 1, (32, 8), 2048, 128, is_causal=True, dtypes=FLOATS),
            attention("decode-8x12x4096x64", 8, 12, (1, 4096), 64, grad=False, dtypes=FLOATS),
            attention("smallest-1x2x8x16", 1, 2, 8, 16, dtypes=FLOATS),
        ),
        growth=Growth(
            "tokens of a sequence",
            {T: attention(f"1x8x{T}x64", 1, 8, T, 64, is_causal=True) for T in powers_of_2(256, 4096)},
        ),
        flops=attention_products,
        bytes=attention_traffic,
    )
)


# ---- varlen_attn --------------------------------------------------------------------------


def packed(
    id: str,
    q_lengths: Sequence[int],
    k_lengths: Sequence[int] | None = None,
    H: tuple[int, int] | int = 2,
    D: tuple[int, int] | int = 8,
    *,
    behind: int = 0,
    lse: bool = False,
    **options,
) -> Case:
    """Sequences of these lengths, with `behind` rows after the last that belong to none."""
    (Hq, Hkv), (D, Dv) = (x if isinstance(x, tuple) else (x, x) for x in (H, D))
    k_lengths = q_lengths if k_lengths is None else k_lengths

    def build(dtype, seed):
        draw = Draw(dtype, seed)
        at_q, at_k = (
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (q_lengths, k_lengths)
        )
        q = draw(int(at_q[-1]) + behind, Hq, D)
        k, v = draw(int(at_k[-1]) + behind, Hkv, D), draw(int(at_k[-1]) + behind, Hkv, Dv)
        kwargs = dict(options, enable_gqa=Hq != Hkv)
        if lse:
            kwargs["return_aux"] = AuxRequest(lse=True)
        return (q, k, v, at_q, at_k, max(q_lengths, default=0), max(k_lengths, default=0)), kwargs

    return Case(id, build, eager=False)


def paged(id: str, q_lengths: Sequence[int], used: Sequence[int], page: int, D: int = 8, **options) -> Case:
    """Keys and values in pages of a pool, in any order; inference only."""

    def build(dtype, seed):
        draw = Draw(dtype, seed)
        at_q = torch.tensor([0, *q_lengths]).cumsum(0).to(torch.int32)
        pages = max(-(-n // page) for n in used)
        pool = len(used) * pages + 1
        order = torch.randperm(pool, generator=draw.generator)[: len(used) * pages]
        k, v = draw(pool, page, 2, D, grad=False), draw(pool, page, 2, D, grad=False)
        kwargs = dict(
            options,
            enable_gqa=True,
            seqused_k=torch.tensor(used, dtype=torch.int32),
            block_table=order.view(len(used), pages).to(torch.int32),
        )
        q = draw(int(at_q[-1]), 4, D, grad=False)
        return (q, k, v, at_q, None, max(q_lengths), max(used)), kwargs

    return Case(id, build, eager=False)


register(
    Operator(
        "varlen_attn",
        fastlm.varlen_attn,
        fastlm.reference.varlen_attn,
        None,  # torch's own needs a GPU
        cases=(
            packed("plain", (5, 9, 3)),
            packed("empty-sequences", (0, 5, 0, 7, 0), lse=True),
            packed("empty-queries-or-keys", (0, 5, 3, 7), (4, 0, 9, 7), lse=True),
            packed("no-sequence", ()),
            packed("rows-of-no-sequence", (5, 3), behind=4, lse=True),
            packed("causal", (33, 1, 18), (33, 5, 18), window_size=(-1, 0)),
            packed("causal-tall", (19, 8), (5, 8), window_size=(-1, 0), lse=True),
            packed("window", (33, 20), (40, 20), window_size=(7, 2)),
            packed("gqa-odd", (9, 17), (11, 30), H=(6, 2), D=(7, 5), lse=True),
            packed("blocks", (130, 97), (70, 200), H=1, D=16, window_size=(-1, 0)),
            packed("decode", (1, 1, 1), (70, 1, 1100), H=(4, 2), num_splits=1),
            packed("scale", (9, 5), scale=0.3),
            paged("paged", (1, 3, 0, 6), (9, 16, 4, 6), 4),
            paged("paged-causal-splits", (1, 2), (1100, 37), 16, window_size=(-1, 0)),
        ),
    )
)


# ---- gru ----------------------------------------------------------------------------------


def gru_case(
    id: str, T: int, B: int, I: int, H: int, layers: int = 1, directions: int = 1, *,
    bias: bool = True, lengths: Sequence[int] | None = None, batch_first: bool = False,
    train: bool = True, dropout: float = 0.0, norm: bool = False, frozen: str = "",
    eager: bool = True, random: bool = False, **options: float,
) -> Case:  # fmt: skip
    """T steps of B sequences, or packed sequences of `lengths`. Weights have the size that torch.nn
    gives them. train: also where nothing is drawn, as cuDNN's GRU has a backward in training alone.
    frozen: "input" or "weights" that take no gradient."""

    def build(dtype, seed):
        draw = Draw(dtype, seed)
        params, gains = [], []
        for index in range(layers * directions):
            width = I if index < directions else directions * H
            shapes = [(3 * H, width), (3 * H, H)] + [(3 * H,)] * (2 if bias else 0)
            params += [draw(*shape, scale=H**-0.5, grad=frozen != "weights") for shape in shapes]
            gains += [draw(3 * H) for _ in range(2 if norm else 0)]
        if lengths is None:
            shape, batch, sizes = (B, T) if batch_first else (T, B), B, ()
        else:
            sizes = torch.tensor([sum(n > t for n in lengths) for t in range(max(lengths))])
            shape, batch, sizes = (sum(lengths),), len(lengths), (sizes,)
        input = draw(*shape, I, grad=frozen != "input")
        hx = draw(layers * directions, batch, H)
        args = (input, *sizes, hx, params, bias, layers, dropout, train, directions == 2)
        keywords = dict(options, layer_norm=gains) if norm else options
        return args if lengths is not None else (*args, batch_first), keywords

    return Case(id, build, eager=eager, random=random)


def gru_flops(*args, **kwargs) -> tuple[int, int]:
    """The products with W_ih and W_hh; twice as many in the backward."""
    packed = isinstance(args[2], Tensor)
    rows = args[0].shape[:-1].numel()
    weights = args[3] if packed else args[2]
    forward = sum(2 * rows * w.numel() for w in weights if w.dim() == 2)
    return forward, 2 * forward


def gru_bytes(*args, **kwargs) -> tuple[int, int]:
    """Input, weights and output once; in the backward their gradients and they again."""
    packed = isinstance(args[2], Tensor)
    hx, weights = args[2:4] if packed else args[1:3]
    rows = args[0].shape[:-1].numel()
    output = rows * hx.shape[-1] * (2 if args[8 if packed else 7] else 1)
    elements = args[0].numel() + output + sum(w.numel() for w in weights)
    return elements * hx.element_size(), 2 * elements * hx.element_size()


# Unequal lengths around the rows of a micro-tile, two that are equal, one step alone.
UNEQUAL = (9, 7, 7, 4, 3, 1)
# A minute's mix: 32 sequences of 16 to 256 steps.
MIXED = tuple(sorted((16 + (37 * i * i) % 241 for i in range(32)), reverse=True))

register(
    Operator(
        name="gru",
        function=fastlm.gru,
        reference=fastlm.reference.gru,
        eager=torch._VF.gru,
        cases=(
            gru_case("plain", 5, 3, 7, 8),
            gru_case("one-of-everything", 1, 1, 1, 1),
            *(gru_case(f"H{H}", 3, 2, 5, H) for H in (3, 4, 7, 9, 15, 16, 17, 33)),
            *(gru_case(f"B{B}", 3, B, 4, 6) for B in (0, 1, 4, 5, 9, 17)),
            # A step by itself: of few rows, of as many as go that way, of more; with what else there is.
            *(gru_case(f"one-step-B{B}", 1, B, 5, 37) for B in (1, 8, 9)),
            gru_case("one-step-two-layers-both-ways", 1, 3, 9, 70, 2, 2),
            gru_case("one-step-packed", 1, 3, 9, 20, lengths=(1, 1, 1)),
            gru_case(
                "one-step-zoneout-no-bias", 1, 2, 9, 20, bias=False, train=False, zoneout=0.3, eager=False
            ),
            gru_case("wide-input", 2, 3, 200, 5),
            gru_case("deeper-than-a-panel", 2, 9, 3, 300),  # products in two blocks of k
            gru_case("one-row-split-over-threads", 3, 1, 5, 200),
            # A sequence long enough that x W is made beside h W: whole blocks of steps and a rest, odd sizes.
            gru_case("one-row-long", 29, 1, 20, 200),
            gru_case("one-row-long-both-ways", 25, 1, 33, 139, 1, 2, bias=False),
            gru_case("one-row-long-packed", 0, 0, 150, 130, lengths=(36,)),
            # More steps than x W is made for at a time.
            gru_case("blocks-of-steps", 20, 17, 6, 9, 1, 2),
            gru_case("blocks-of-steps-packed", 0, 0, 5, 9, 1, 2, lengths=(40,) * 3 + (30,) * 9 + (7,) * 5),
            gru_case("rows-split-over-threads", 4, 40, 5, 12),
            gru_case("no-bias", 4, 3, 5, 6, bias=False),
            gru_case("batch-first", 4, 3, 5, 6, batch_first=True),
            # Drops nothing; of our gradients alone, see gru_case.
            gru_case("evaluation", 4, 3, 5, 6, 3, dropout=0.4, train=False, eager=False),
            gru_case("three-layers", 4, 3, 5, 6, 3),
            gru_case("bidirectional", 5, 3, 5, 9, directions=2),
            gru_case("bidirectional-two-layers-no-bias", 4, 5, 3, 8, 2, 2, bias=False, batch_first=True),
            gru_case("packed", 0, 0, 5, 9, lengths=UNEQUAL),
            gru_case("packed-equal-lengths", 0, 0, 5, 8, lengths=(4, 4, 4)),
            gru_case("packed-bidirectional-two-layers", 0, 0, 5, 7, 2, 2, lengths=UNEQUAL),
            gru_case(
                "packed-rows-split-over-threads", 0, 0, 4, 9, 1, 2, lengths=(7,) * 3 + (5,) * 9 + (1,) * 9
            ),
            gru_case("frozen-input", 4, 3, 5, 6, 2, frozen="input"),
            gru_case("frozen-weights", 4, 3, 5, 6, 2, frozen="weights"),
            gru_case("zoneout-expected", 4, 3, 5, 6, train=False, zoneout=0.3, eager=False),
            gru_case("zoneout-all", 4, 3, 5, 6, train=False, zoneout=1.0, eager=False),
            gru_case("layer-norm", 4, 5, 5, 7, norm=True, eager=False),
            gru_case("layer-norm-no-bias", 3, 2, 4, 16, norm=True, bias=False, eager=False),
            gru_case("layer-norm-packed", 0, 0, 5, 9, 2, 2, norm=True, lengths=UNEQUAL, eager=False),
            gru_case("layer-norm-split-over-threads", 3, 2, 5, 200, norm=True, eager=False),
            gru_case("dropout", 4, 3, 5, 6, 3, dropout=0.4, random=True),
            gru_case("zoneout", 4, 3, 5, 6, 2, 2, zoneout=0.4, eager=False, random=True),
            gru_case(
                "zoneout-packed",
                0,
                0,
                5,
                6,
                lengths=UNEQUAL,
                zoneout=0.4,
                eager=False,
                random=True,
            ),
            gru_case(
                "everything-random",
                0,
                0,
                5,
                6,
                2,
                2,
                lengths=UNEQUAL,
                norm=True,
                zoneout=0.2,
                dropout=0.3,
                recurrent_dropout=0.3,
                eager=False,
                random=True,
            ),
        ),
        bench=(
            gru_case("T128-B1-H256", 128, 1, 256, 256),
            gru_case("T128-B32-H256", 128, 32, 256, 256),
            gru_case("T256-B32-H512-two-layers", 256, 32, 512, 512, 2),
            gru_case("T128-B64-H1024", 128, 64, 1024, 1024),
            gru_case("packed-B32-H256", 0, 0, 256, 256, lengths=MIXED),
            gru_case("smallest-T4-B2-H8", 4, 2, 8, 8),
        ),
        flops=gru_flops,
        bytes=gru_bytes,
    )
)


# ---- gru_cell -----------------------------------------------------------------------------


def gru_cell_case(
    id: str, B: int, I: int, H: int, *, bias: bool = True, norm: bool = False, eager: bool = True,
    random: bool = False, **options,
) -> Case:  # fmt: skip
    def build(dtype, seed):
        draw = Draw(dtype, seed)
        args = (draw(B, I), draw(B, H), draw(3 * H, I, scale=H**-0.5), draw(3 * H, H, scale=H**-0.5))
        biases = (draw(3 * H), draw(3 * H)) if bias else ()
        keywords = dict(options, layer_norm=(draw(3 * H), draw(3 * H))) if norm else options
        return (*args, *biases), keywords

    return Case(id, build, eager=eager, random=random)


def gru_cell_flops(input, hx, w_ih, w_hh, *biases, **options) -> tuple[int, int]:
    forward = 2 * input.shape[0] * (w_ih.numel() + w_hh.numel())
    return forward, 2 * forward


def gru_cell_bytes(*tensors, **options) -> tuple[int, int]:
    elements = sum(x.numel() for x in tensors) + tensors[1].numel()
    return elements * tensors[0].element_size(), 2 * elements * tensors[0].element_size()


register(
    Operator(
        name="gru_cell",
        function=fastlm.gru_cell,
        reference=fastlm.reference.gru_cell,
        eager=torch._VF.gru_cell,
        cases=(
            gru_cell_case("plain", 3, 5, 6),
            *(gru_cell_case(f"H{H}", 2, 3, H) for H in (1, 7, 8, 9, 17)),
            *(gru_cell_case(f"B{B}", B, 4, 5) for B in (0, 1, 5, 9)),
            gru_cell_case("wide", 2, 120, 100),
            gru_cell_case("no-bias", 3, 5, 6, bias=False),
            gru_cell_case("zoneout-expected", 3, 5, 6, eager=False, zoneout=0.3, training=False),
            gru_cell_case("layer-norm", 3, 5, 6, norm=True, eager=False),
            gru_cell_case("random", 3, 5, 6, eager=False, random=True, zoneout=0.3, recurrent_dropout=0.3),
        ),
        bench=(
            gru_cell_case("B1-H256", 1, 256, 256),
            gru_cell_case("B64-H512", 64, 512, 512),
        ),
        flops=gru_cell_flops,
        bytes=gru_cell_bytes,
    )
)


# ---- cross_entropy ------------------------------------------------------------------------


def _logits_to_target(shape: Sequence[int]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def _target(draw: Draw, shape: Sequence[int], kind: str, ignore_index: int = -100) -> Tensor:
    """kind: index (the first token is ignored), uint8, int32, prob, prob-grad or prob-transposed."""
    classes = shape[0] if len(shape) == 1 else shape[1]
    if kind.startswith("prob"):
        q = draw.uniform(*shape, layout="transposed" if kind == "prob-transposed" else "contiguous")
        return q.requires_grad_(kind == "prob-grad")
    target = draw.integers(0, max(classes, 1), _logits_to_target(shape))
    if kind in ("uint8", "int32"):
        return target.to(getattr(torch, kind))
    if target.numel() > 1:
        target.view(-1)[0] = ignore_index
    return target


def _class_weight(draw: Draw, classes: int) -> Tensor:
    return draw.uniform(classes) + 0.5


def _cross_entropy_case(
    id: str, *shape: int, kind: str = "index", weight: bool = False, layout: str = "contiguous",
    eager: bool = True, scale: float = 3.0, **kwargs,
) -> Case:  # fmt: skip
    def build(dtype, seed):
        draw = Draw(dtype, seed)
        x = draw(*shape, layout=layout, scale=scale)
        target = _target(draw, shape, kind, kwargs.get("ignore_index", -100))
        more = dict(kwargs)
        if weight:
            classes = shape[0] if len(shape) == 1 else shape[1]
            more["weight"] = _class_weight(draw, classes)
        return (x, target), more

    return Case(id, build, eager=eager and kind != "int32")


def _cross_entropy_bench(tokens: int, classes: int, name: str = "") -> Case:
    def build(dtype, seed):
        draw = Draw(dtype, seed)
        return (draw(tokens, classes), draw.integers(0, classes, (tokens,))), {}

    return Case(f"{name}{tokens}x{classes}", build)


def _loss_flops(input, target, **kwargs) -> tuple[int, int]:
    """An exponential in each direction counts as one operation: memory is the bound."""
    return input.numel(), input.numel()


def _loss_bytes(input, target, **kwargs) -> tuple[int, int]:
    """Reading the logits once; their gradient is written in the same sweep."""
    size = input.numel() * input.element_size()
    return size, size


register(
    Operator(
        "cross_entropy",
        fastlm.cross_entropy,
        fastlm.reference.cross_entropy,
        torch.nn.functional.cross_entropy,
        cases=(
            _cross_entropy_case("mean", 5, 33),
            _cross_entropy_case("unbatched", 7, reduction="sum"),
            *(  # around one vector of each ISA
                _cross_entropy_case(f"C{C}", 3, C, reduction="none") for C in (1, 3, 4, 8, 15, 17, 63)
            ),
            _cross_entropy_case("two-blocks-C2050", 2, 2050, reduction="sum"),
            _cross_entropy_case("none-many-tokens", 130, 10, reduction="none"),
            _cross_entropy_case("no-tokens", 0, 5, reduction="sum"),
            _cross_entropy_case("weight", 6, 19, weight=True),
            _cross_entropy_case("smooth", 6, 19, label_smoothing=0.1),
            _cross_entropy_case("smooth-C70", 3, 70, label_smoothing=0.1),  # beyond 128 bytes in any type
            _cross_entropy_case(
                "smooth-1-weight-sum", 6, 19, label_smoothing=1.0, weight=True, reduction="sum"
            ),
            _cross_entropy_case("ignored-class", 9, 4, ignore_index=2, label_smoothing=0.2, weight=True),
            _cross_entropy_case("uint8", 9, 21, kind="uint8"),
            _cross_entropy_case("int32", 9, 21, kind="int32"),
            _cross_entropy_case("prob", 5, 23, kind="prob"),
            _cross_entropy_case("prob-unbatched", 9, kind="prob", reduction="none"),
            _cross_entropy_case(
                "prob-smooth-weight", 5, 23, kind="prob", label_smoothing=0.1, weight=True, reduction="none"
            ),
            _cross_entropy_case("prob-grad", 5, 23, kind="prob-grad", label_smoothing=0.1, weight=True),
            _cross_entropy_case(
                "prob-grad-transposed", 5, 23, kind="prob-grad", layout="transposed", reduction="sum"
            ),
            _cross_entropy_case("image", 2, 5, 3, 7, reduction="none"),
            _cross_entropy_case("image-weight-smooth", 2, 40, 9, 5, weight=True, label_smoothing=0.1),
            _cross_entropy_case("image-wide", 1, 33, 70),
            _cross_entropy_case("image-prob-grad", 2, 5, 9, kind="prob-grad", weight=True),
            _cross_entropy_case("image-prob-transposed", 3, 5, 9, kind="prob-transposed", reduction="none"),
            *(
                _cross_entropy_case(f"{layout}", 6, 37, layout=layout, reduction="none")
                for layout in LAYOUTS[1:]
            ),
            *(_cross_entropy_case(f"image-{layout}", 3, 7, 9, layout=layout) for layout in LAYOUTS[1:]),
            _cross_entropy_case("confident", 6, 37, scale=60.0),
            _cross_entropy_case("z-loss", 6, 37, z_loss=0.02, eager=False),
            _cross_entropy_case("softcap", 6, 37, softcap=2.5, eager=False, reduction="none"),
            _cross_entropy_case("lse", 6, 37, return_lse=True, eager=False),
            _cross_entropy_case(
                "all",
                6,
                37,
                weight=True,
                label_smoothing=0.1,
                z_loss=0.02,
                softcap=5.0,
                return_lse=True,
                eager=False,
            ),
            _cross_entropy_case(
                "image-all",
                2,
                37,
                5,
                weight=True,
                label_smoothing=0.1,
                z_loss=0.02,
                softcap=5.0,
                return_lse=True,
                eager=False,
            ),
            _cross_entropy_case(
                "prob-all",
                6,
                37,
                kind="prob-grad",
                weight=True,
                label_smoothing=0.1,
                z_loss=0.02,
                softcap=5.0,
                return_lse=True,
                eager=False,
            ),
        ),
        bench=(
            _cross_entropy_bench(1024, 50257),
            _cross_entropy_bench(4096, 50257),
            _cross_entropy_bench(4, 8, "smallest-"),
        ),
        growth=Growth(
            "classes, for 512 tokens",
            {C: _cross_entropy_bench(512, C) for C in powers_of_2(4096, 131072)},
        ),
        flops=_loss_flops,
        bytes=_loss_bytes,
    )
)


# ---- linear, of a few tokens ----------------------------------------------------------------

# One vector and its neighbours; rows that four dot products share, parts of K, strips of columns; nothing.
FEW_SHAPES = [(1, 1, 1), (1, 7, 5), (2, 16, 3), (3, 17, 4), (5, 33, 9), (9, 130, 70), (1, 300, 4100)]
FEW_SHAPES += [(0, 8, 3), (2, 0, 3), (2, 8, 0), (1, 2100, 64)]

FEW_LAYOUTS = ("rows", "columns", "rows apart", "every other")  # of the weight


def few_inputs(shape, dtype, layout, int8, biased):
    """Input (M, K), weight (N, K), scale (N) of an int8 weight, bias (N), for the operator."""
    M, K, N = shape
    x = Draw.lay(torch.randn(M, K, dtype=dtype), "strided" if biased else "transposed")
    if int8:
        w, scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N).to(dtype) / 100
    else:
        w, scale = torch.randn(N, K, dtype=dtype), None
    if layout == "columns":
        w = w.t().contiguous().t()
    elif layout == "rows apart":
        w = torch.cat((w, w), 1)[:, :K]
    elif layout == "every other":
        w = torch.stack((w, w), 2)[:, :, 0]
    return x, w, scale, torch.randn(N).to(dtype) if biased else None


# ---- linear_cross_entropy -----------------------------------------------------------------


def _linear_case(
    id: str, N: int | None, D: int, C: int, *positions: int, kind: str = "index", bias: bool = False,
    weight: bool = False, layout: str = "contiguous", frozen: str = "", eager: bool = True,
    **kwargs,
) -> Case:  # fmt: skip
    def build(dtype, seed):
        draw = Draw(dtype, seed)
        x = draw(*([] if N is None else [N]), D, layout=layout, grad=frozen != "input")
        w = draw(C, *positions, D, layout=layout, scale=3 / max(D, 1) ** 0.5, grad=frozen != "weight")
        shape = (C,) if N is None else (N, C, *positions)
        more = dict(kwargs)
        if bias:
            more["linear_bias"] = draw(C, *positions, scale=1.0)
        if weight:
            more["weight"] = _class_weight(draw, C)
        return (x, w, _target(draw, shape, kind, kwargs.get("ignore_index", -100))), more

    return Case(id, build, eager=eager and kind != "int32")


def _linear_bench(tokens: int, classes: int = 50257, width: int = 768) -> Case:
    def build(dtype, seed):
        draw = Draw(dtype, seed)
        x, w = draw(tokens, width), draw(classes, width, scale=width**-0.5)
        return (x, w, draw.integers(0, classes, (tokens,))), {}

    return Case(f"{tokens}x{classes}x{width}", build)


def _linear_flops(input, linear_weight, target, **kwargs) -> tuple[int, int]:
    """One product forward, two backward."""
    product = 2 * input.numel() * (linear_weight.numel() // linear_weight.shape[-1])
    return product, 2 * product


def _linear_bytes(input, linear_weight, target, **kwargs) -> tuple[int, int]:
    size = (input.numel() + linear_weight.numel()) * input.element_size()
    return size, size


def _linear_then_loss(input, linear_weight, target, *, linear_bias=None, **settings):
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.unflatten(-1, linear_weight.shape[:-1])
    return F.cross_entropy(logits, target, **settings)


# torch 2.13 and later
eager_linear_cross_entropy = getattr(F, "linear_cross_entropy", _linear_then_loss)

register(
    Operator(
        "linear_cross_entropy",
        fastlm.linear_cross_entropy,
        fastlm.reference.linear_cross_entropy,
        eager_linear_cross_entropy,
        cases=(
            _linear_case("mean", 9, 16, 33),
            _linear_case("unbatched-bias", None, 7, 21, bias=True),
            _linear_case("one", 1, 1, 1),
            *(  # around a vector and a panel of tokens, a tile of classes
                _linear_case(f"N{N}-C{C}-D{D}", N, D, C, bias=True, reduction="none")
                for N, D, C in ((15, 5, 7), (16, 8, 95), (17, 9, 96), (25, 24, 97), (49, 33, 193))
            ),
            _linear_case("several-blocks", 200, 13, 40, bias=True),
            _linear_case("several-panels-of-D", 30, 260, 50),
            _linear_case("no-tokens", 0, 4, 5, bias=True, reduction="sum"),
            _linear_case("no-features", 3, 0, 4, bias=True, reduction="none"),
            _linear_case("weight-sum", 9, 16, 33, weight=True, reduction="sum"),
            _linear_case("smooth", 9, 16, 133, label_smoothing=0.1, bias=True),
            _linear_case(
                "smooth-weight-none", 9, 16, 133, label_smoothing=0.1, weight=True, reduction="none"
            ),
            _linear_case("ignored-class", 19, 6, 4, ignore_index=2, bias=True),
            _linear_case("uint8", 9, 16, 33, kind="uint8"),
            _linear_case("int32", 9, 16, 33, kind="int32"),
            _linear_case("prob", 9, 16, 133, kind="prob", bias=True),
            _linear_case(
                "prob-smooth-weight-none",
                9,
                16,
                33,
                kind="prob",
                label_smoothing=0.1,
                weight=True,
                reduction="none",
            ),
            _linear_case("prob-transposed", 9, 16, 33, kind="prob-transposed", reduction="sum"),
            _linear_case("heads", 9, 5, 7, 3, bias=True, weight=True),
            _linear_case("heads-none", 30, 12, 100, 2, 2, bias=True, label_smoothing=0.1, reduction="none"),
            _linear_case("heads-prob", 9, 5, 7, 3, kind="prob"),
            _linear_case("frozen-input", 9, 16, 33, frozen="input", bias=True),
            _linear_case("frozen-weight", 9, 16, 33, frozen="weight"),
            _linear_case("frozen-weight-none", 9, 16, 33, frozen="weight", reduction="none"),
            *(_linear_case(layout, 9, 16, 33, layout=layout) for layout in LAYOUTS[1:]),
            _linear_case("z-loss", 9, 16, 33, z_loss=0.02, eager=False),
            _linear_case("softcap-none", 9, 16, 133, softcap=2.5, reduction="none", eager=False),
            _linear_case("lse", 9, 16, 33, return_lse=True, eager=False),
            _linear_case(
                "all",
                9,
                16,
                133,
                bias=True,
                weight=True,
                label_smoothing=0.1,
                z_loss=0.02,
                softcap=5.0,
                return_lse=True,
                eager=False,
            ),
            _linear_case(
                "all-mean",
                9,
                16,
                133,
                bias=True,
                weight=True,
                label_smoothing=0.1,
                z_loss=0.02,
                softcap=5.0,
                eager=False,
            ),
        ),
        bench=(_linear_bench(1024), _linear_bench(4096)),
        growth=Growth(
            "classes, for 512 tokens of width 256",
            {C: _linear_bench(512, C, 256) for C in powers_of_2(4096, 131072)},
        ),
        flops=_linear_flops,
        bytes=_linear_bytes,
    )
)


# ---- linear -------------------------------------------------------------------------------

EAGER_ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def linear_case(
    id: str,
    input: Sequence[int],
    weight: Sequence[int],
    bias: bool = True,
    layout: str = "contiguous",
    by_columns: bool = False,
    frozen: str = "",
    activation: str | None = None,
) -> Case:
    """x (..., K) and W (N, K); by_columns: W is a transposed view; frozen: needs no gradient."""

    def build(dtype, seed):
        draw = Draw(dtype, seed)
        x = draw(*input, layout=layout, grad=frozen != "input")
        w = draw(*weight, layout="transposed" if by_columns else "contiguous", grad=frozen != "weight")
        b = draw(*weight[:-1], grad=frozen != "bias") if bias else None
        return (x, w, b), {} if activation is None else {"activation": activation}

    return Case(id, build)


def _eager_linear(input, weight, bias, activation=None):
    y = torch.nn.functional.linear(input, weight, bias)
    return y if activation is None else EAGER_ACTIVATIONS[activation](y)


def _linear_products(input, weight, *args, **kwargs):
    forward = 2 * input.numel() * weight.size(0)
    return forward, 2 * forward


def _linear_traffic(input, weight, *args, **kwargs):
    M, (N, K), size = input.numel() // weight.size(1), weight.shape, input.element_size()
    return (M * K + N * K + M * N) * size, (2 * M * K + 2 * N * K + M * N) * size


# No kernel of fastlm: it chooses among torch's products, so that the tests of registered operators, which
# go through OPERATORS, have nothing to look at (test_linear.py runs its cases each way).
LINEAR = Operator(
    "linear",
    fastlm.linear,
    fastlm.reference.linear,
    _eager_linear,
    cases=(
        linear_case("plain", (5, 7), (9, 7)),
        linear_case("no-bias", (5, 7), (9, 7), bias=False),
        linear_case("one", (1, 1), (1, 1)),
        linear_case("vector", (7,), (9, 7)),
        linear_case("batches", (2, 3, 5, 16), (33, 16)),
        linear_case("batches-no-bias", (2, 3, 16), (33, 16), bias=False),
        linear_case("one-row-of-many", (1, 1, 65), (130, 65)),
        linear_case("by-columns", (5, 7), (9, 7), by_columns=True),
        linear_case("by-columns-no-bias", (3, 5, 16), (8, 16), bias=False, by_columns=True),
        *(linear_case(f"input-{layout}", (6, 5, 16), (9, 16), layout=layout) for layout in LAYOUTS[1:]),
        *(linear_case(f"frozen-{what}", (5, 7), (9, 7), frozen=what) for what in ("input", "weight", "bias")),
        linear_case("no-rows", (0, 7), (9, 7)),
        linear_case("no-outputs", (5, 7), (0, 7)),
        linear_case("no-inputs", (5, 0), (9, 0)),
        linear_case("weight-vector", (5, 7), (7,), bias=False),
        *(linear_case(name, (5, 7), (9, 7), activation=name) for name in EAGER_ACTIVATIONS),
    ),
    bench=(
        linear_case("1024x768x2304", (1024, 768), (2304, 768)),
        linear_case("1024x768x768", (1024, 768), (768, 768)),
        linear_case("1024x768x3072", (1024, 768), (3072, 768)),
        linear_case("1024x3072x768", (1024, 3072), (768, 3072)),
        linear_case("smallest-4x8x8", (4, 8), (8, 8)),
    ),
    flops=_linear_products,
    bytes=_linear_traffic,
)
