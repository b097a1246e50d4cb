"""Attention: dropout, masks of other packages, edge cases, options and every documented error."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.varlen import AuxRequest

import fastlm
from fastlm import reference

sdpa = fastlm.scaled_dot_product_attention


def qkv(B=2, H=2, Tq=5, Tk=7, D=8, Dv=8, dtype=torch.float32, grad=False):
    shapes = (B, H, Tq, D), (B, H, Tk, D), (B, H, Tk, Dv)
    return tuple(torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes)


# ---- dropout -------------------------------------------------------------------------------


@pytest.mark.parametrize("T", ((5, 7), (97, 70), (1, 130)), ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_dropout_follows_the_reference(T, is_causal, isa):
    """Kernel and formula drop the same weights, forward and backward, for one state of the generator."""
    inputs = qkv(2, 4, *T, dtype=torch.float64, grad=True)
    results = []
    for function in (sdpa, reference.scaled_dot_product_attention):
        torch.manual_seed(7)
        out = function(*inputs, dropout_p=0.4, is_causal=is_causal)
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_dropout_is_seeded_by_torch():
    inputs = qkv()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(sdpa(*inputs, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert not torch.equal(sdpa(*inputs, dropout_p=0.5), sdpa(*inputs, dropout_p=0.5))


def test_dropout_keeps_the_right_share():
    """With equal weights, an output is the share of the weights kept, over 1 - p."""
    q = torch.zeros(1, 4, 64, 8)
    v = torch.ones(1, 4, 1024, 1)
    out = sdpa(q, torch.zeros(1, 4, 1024, 8), v, dropout_p=0.3)
    assert abs(out.mean().item() - 1) < 0.01  # five standard deviations of 262144 draws
    assert out.std().item() < 0.04


def test_philox_known_answers():
    """Random123's vectors for philox4x32-10."""
    zeros = reference._philox_4x32(tuple(torch.zeros(3, dtype=torch.int64)) + (0,), torch.tensor(0))
    assert [int(x) for x in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_in_compiled_code_is_fresh():
    inputs = qkv()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(*inputs), compiled(*inputs))


# ---- against eager -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    (
        ((3, 5), (4, 5), (4, 5)),
        ((2, 3, 5), (2, 4, 5), (2, 4, 6)),
        ((2, 3, 5), (1, 4, 5), (2, 4, 6)),
        ((2, 2, 3, 5), (2, 1, 4, 5), (2, 1, 4, 6)),
        ((1, 2, 3, 5), (4, 2, 4, 5), (4, 2, 4, 5)),
        ((2, 2, 3, 5), (2, 4, 5), (2, 4, 5)),
        ((2, 3, 2, 3, 5), (2, 3, 2, 4, 5), (2, 3, 2, 4, 6)),
        ((2, 1, 2, 3, 5), (1, 3, 2, 4, 5), (2, 3, 2, 4, 6)),
    ),
    ids=str,
)
@pytest.mark.parametrize("mask", (None, (3, 4), (1, 4), (4,), "full"), ids=str)
def test_leading_dimensions_as_eager(shapes, mask):
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    if mask is not None:
        if mask == "full":
            mask = (*torch.broadcast_shapes(*(s[:-2] for s in shapes)), 3, 4)
        inputs.append(torch.randn(mask, dtype=torch.float64, requires_grad=True))
    eager_inputs = list(inputs)
    if mask == (4,):  # torch's fused kernel does not take one dimension, its formula does
        eager_inputs[3] = inputs[3][None]
    out, expected = sdpa(*inputs), F.scaled_dot_product_attention(*eager_inputs)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def test_gqa_in_three_dimensions_and_with_other_value_heads():
    q, k, v = torch.randn(6, 3, 5), torch.randn(2, 4, 5), torch.randn(3, 4, 5)
    torch.testing.assert_close(
        sdpa(q, k, k, enable_gqa=True), F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    )
    q, k, v = q[None], k[None], v[None]
    torch.testing.assert_close(
        sdpa(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )


@pytest.mark.parametrize("T", ((5, 7), (7, 7)), ids=str)
@pytest.mark.parametrize("variant", (causal_upper_left, causal_lower_right), ids=lambda f: f.__name__)
def test_causal_bias_objects(variant, T):
    inputs = qkv(Tq=T[0], Tk=T[1], dtype=torch.float64)
    torch.testing.assert_close(
        sdpa(*inputs, variant(*T)), F.scaled_dot_product_attention(*inputs, variant(*T))
    )


@pytest.mark.parametrize("mask_dtype", (torch.bool, torch.float32), ids=str)
def test_expanded_masks(mask_dtype):
    """Stride 0 and transposed masks, as .expand() and .mT make them."""
    q, k, v = qkv(Tq=9, Tk=9)
    keys = torch.rand(2, 1, 1, 9) < 0.6
    for mask in (keys.expand(2, 2, 9, 9), keys.expand(2, 2, 9, 9).mT, (torch.rand(9, 9) < 0.6).mT):
        mask = mask if mask_dtype == torch.bool else mask.float()
        torch.testing.assert_close(sdpa(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_autocast_as_eager(dtype):
    q, k, v = qkv(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_output_keeps_the_memory_order_of_query():
    """(B, T, H, D) projections seen as (B, H, T, D): the output's transpose back is contiguous."""
    q = torch.randn(2, 5, 3, 8).transpose(1, 2)
    assert sdpa(q, q, q).transpose(1, 2).is_contiguous()
    assert sdpa(*[x.contiguous() for x in (q, q, q)]).is_contiguous()


def test_rows_without_keys_give_zero_and_no_gradient(isa):
    inputs = qkv(Tq=9, Tk=5, grad=True)
    out, lse = sdpa(*inputs, window_size=(0, 0), return_lse=True)  # queries 0..3 lie before key 0
    assert (out[:, :, :4] == 0).all() and (lse[:, :, :4] == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 4:].sum(), inputs)
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, :4] == 0).all()


@pytest.mark.parametrize("value", (math.nan, -math.inf))
@pytest.mark.parametrize("Tq", (2, 20), ids="Tq{}".format)
def test_sinks_of_rows_without_keys(Tq, value, isa):
    """A sink that is NaN is not lost there; one of -inf is none, and has gradient 0."""
    q, k, sinks = torch.randn(1, 2, Tq, 8), torch.randn(1, 2, 9, 8), torch.tensor([0.5, value])
    mask = torch.rand(Tq, 9) < 0.5
    mask[1] = False

    def call(function):
        inputs = [x.clone().requires_grad_() for x in (q, k, sinks)]
        out = function(inputs[0], inputs[1], inputs[1], mask, sinks=inputs[2])
        return out, *torch.autograd.grad(out.sin().sum(), inputs)

    ours, formula = call(fastlm.scaled_dot_product_attention), call(reference.scaled_dot_product_attention)
    torch.testing.assert_close(ours, formula, equal_nan=True)


def test_overlapping_queries(tiny_calls_as_shipped):
    """Rows from unfold, in a call that is small enough for PyTorch's kernel, which gives garbage for them."""
    q = torch.randn(1, 2, 10).unfold(-1, 3, 1)
    k, v = torch.randn(2, 1, 2, 8, 3)
    torch.testing.assert_close(sdpa(q, k, v), sdpa(q.contiguous(), k, v))


def test_memory_grows_linearly():
    """No T x T matrix: 16384 queries and keys would need a gigabyte for one head's scores."""
    from torch.profiler import ProfilerActivity, profile

    q, k, v = (torch.randn(1, 1, 16384, 8, requires_grad=True) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        sdpa(q, k, v, window_size=(64, 0)).sum().backward()
    assert max(abs(e.cpu_memory_usage) for e in prof.key_averages()) < 64 << 20


def test_offsets_beyond_32_bits():
    """A cache so strided that its last rows lie more than 2**31 elements from the first."""
    store = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # untouched pages cost no memory
    k = store.as_strided((1, 2, 3, 8), (0, 2**31, 64, 1))
    k.copy_(torch.randn(1, 2, 3, 8))
    q = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(sdpa(q, k, k), sdpa(q, k.contiguous(), k.contiguous()))


# ---- split keys ----------------------------------------------------------------------------


def test_split_keys_do_not_depend_on_the_batch():
    """num_splits or not, a sequence's result is the same bits alone and in a batch."""
    x, cache = torch.randn(3, 4, 16), torch.randn(3000, 2, 16)
    at = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    keys = torch.tensor([0, 1500, 1510, 3000], dtype=torch.int32)
    for num_splits in (None, 1):
        together = fastlm.varlen_attn(
            x, cache, cache, at, keys, 1, 1500, enable_gqa=True, num_splits=num_splits
        )
        alone = fastlm.varlen_attn(
            x[:1],
            cache[:1500],
            cache[:1500],
            at[:2],
            keys[:2],
            1,
            1500,
            enable_gqa=True,
            num_splits=num_splits,
        )
        assert torch.equal(together[:1], alone)


def test_varlen_is_dense_attention_per_sequence():
    q, k, v = qkv(3, 2, 6, 6, dtype=torch.float64)
    packed = [x.transpose(1, 2).reshape(18, 2, 8) for x in (q, k, v)]
    at = torch.arange(0, 19, 6, dtype=torch.int32)
    out, lse = fastlm.varlen_attn(*packed, at, at, 6, 6, window_size=(-1, 0), return_aux=AuxRequest(lse=True))
    expected, expected_lse = sdpa(q, k, v, is_causal=True, return_lse=True)
    torch.testing.assert_close(out, expected.transpose(1, 2).reshape(18, 2, 8))
    torch.testing.assert_close(lse, expected_lse.transpose(0, 1).reshape(2, 18))


def test_varlen_compiles_whole():
    x = torch.randn(12, 2, 8, requires_grad=True)
    at = torch.tensor([0, 5, 12], dtype=torch.int32)
    torch.compiler.reset()

    def call(x):
        return fastlm.varlen_attn(x, x, x, at, at, 7, 7, window_size=(-1, 0))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(call(x).sum(), x)
    )


def test_vmap_and_hessian_go_through_the_formula():
    q, k, v = qkv(1, 1, 3, 4, 2, 2, dtype=torch.float64)
    many = torch.randn(3, *q.shape, dtype=torch.float64)
    mapped = torch.func.vmap(lambda q: sdpa(q, k, v))(many)
    torch.testing.assert_close(mapped, torch.stack([sdpa(x, k, v) for x in many]))
    assert torch.func.hessian(lambda q: sdpa(q, k, v).sum())(q).isfinite().all()


def test_eager_backend_is_the_formula():
    inputs = qkv()
    with fastlm.use_backend("eager"):
        out = sdpa(*inputs)
    assert torch.equal(out, reference.scaled_dot_product_attention(*inputs))


# ---- errors --------------------------------------------------------------------------------


def change(**replacements):
    """Arguments of a good call with some replaced; values may be functions of (q, k, v)."""
    q, k, v = qkv()
    arguments = {"query": q, "key": k, "value": v}
    for name, x in replacements.items():
        arguments[name] = x(q, k, v) if callable(x) else x
    return arguments


@pytest.mark.parametrize(
    "replacements, error, message",
    (
        ({"query": lambda q, k, v: q[0, 0, 0]}, ValueError, r"query has shape \(8,\), expected at least 2"),
        ({"query": 3}, TypeError, "query is int, expected a Tensor"),
        ({"key": lambda q, k, v: k[..., :4]}, ValueError, "key has head size 4, expected 8"),
        ({"value": lambda q, k, v: v[:, :, :3]}, ValueError, "value has 3 rows, expected 7"),
        ({"key": lambda q, k, v: k.double()}, TypeError, "key is torch.float64, expected torch.float32"),
        ({"query": lambda q, k, v: q.long()}, TypeError, "query is torch.int64, expected a floating dtype"),
        ({"key": lambda q, k, v: k.to("meta")}, ValueError, "key is on meta, expected cpu"),
        ({"query": lambda q, k, v: q.to_sparse()}, ValueError, "query has layout torch.sparse_coo"),
        ({"key": lambda q, k, v: k.repeat(1, 2, 1, 1)}, ValueError, "do not broadcast over their leading"),
        (
            {"key": lambda q, k, v: k.repeat(1, 3, 1, 1), "enable_gqa": True},
            ValueError,
            "6 key heads and 2 value",
        ),
        (
            {"attn_mask": torch.zeros(5, 6)},
            ValueError,
            r"attn_mask has shape \(5, 6\), which does not broadcast",
        ),
        ({"attn_mask": torch.zeros(3, 1, 1, 7)}, ValueError, "attn_mask has shape .* does not broadcast"),
        ({"attn_mask": torch.zeros(1, 2, 2, 5, 7)}, ValueError, "attn_mask has shape .* does not broadcast"),
        (
            {"attn_mask": torch.zeros(5, 7, dtype=torch.int64)},
            TypeError,
            "attn_mask is torch.int64, expected",
        ),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.float16)}, TypeError, "attn_mask is torch.float16"),
        ({"attn_mask": [1.0]}, TypeError, "attn_mask is list, expected a Tensor"),
        ({"attn_mask": causal_lower_right(5, 6)}, ValueError, "CausalBias of 5 x 6, expected 5 x 7"),
        ({"attn_mask": causal_lower_right(5, 7), "is_causal": True}, ValueError, "cannot be combined"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1, expected a probability"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p is nan, expected a probability"),
        ({"scale": math.inf}, ValueError, "scale is inf, expected a finite number"),
        ({"window_size": (1,)}, ValueError, r"window_size is \(1,\), expected two integers"),
        ({"window_size": (-2, 0)}, ValueError, r"window_size is \(-2, 0\), expected two integers"),
        ({"window_size": (torch.ones(2), 0)}, ValueError, "window_size is .*, expected two integers"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected a finite number >= 0"),
        ({"softcap": math.nan}, ValueError, "softcap is nan, expected a finite number >= 0"),
        (
            {"alibi_slopes": torch.zeros(3)},
            ValueError,
            r"alibi_slopes has shape \(3,\), expected \(2,\) or \(2, 2\)",
        ),
        (
            {"alibi_slopes": torch.zeros(2, dtype=torch.int64)},
            TypeError,
            "alibi_slopes must be a floating Tensor",
        ),
        ({"sinks": torch.zeros(2, 2)}, ValueError, r"sinks has shape \(2, 2\), expected \(2,\)"),
    ),
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(replacements, error, message):
    with pytest.raises(error, match=f"fastlm.scaled_dot_product_attention: .*{message}"):
        sdpa(**change(**replacements))


def test_misuse_is_torchs_kind_of_error_too():
    q = torch.randn(2, 3, 4, 8)
    for call in (
        (q, q.double(), q),
        (q[0, 0, 0], q, q),
        (q, q[..., :4], q),
        (q, q, q, torch.ones(4, 4, dtype=torch.int32)),
        (q, q, q, torch.ones(3, 9)),
    ):
        for function in (F.scaled_dot_product_attention, fastlm.scaled_dot_product_attention):
            with pytest.raises(RuntimeError):
                function(*call)


def packed_arguments(**replacements):
    x = torch.randn(10, 2, 8)
    at = torch.tensor([0, 4, 10], dtype=torch.int32)
    arguments = dict(query=x, key=x, value=x, cu_seq_q=at, cu_seq_k=at, max_q=6, max_k=6)
    return arguments | replacements


@pytest.mark.parametrize(
    "replacements, error, message",
    (
        ({"query": torch.randn(10, 8)}, ValueError, "query has shape"),
        ({"key": torch.randn(10, 1, 8)}, ValueError, "value has shape"),
        (
            {"key": torch.randn(10, 1, 8), "value": torch.randn(10, 1, 8)},
            ValueError,
            "Try setting enable_gqa",
        ),
        ({"key": torch.randn(10, 2, 8).double()}, TypeError, "key is torch.float64"),
        (
            {"cu_seq_q": torch.tensor([0, 4, 11], dtype=torch.int32)},
            RuntimeError,
            "cu_seq_q runs from 0 to 11",
        ),
        (
            {"cu_seq_q": torch.tensor([0, 8, 4], dtype=torch.int32)},
            RuntimeError,
            "cu_seq_q decreases from 8 to 4",
        ),
        ({"cu_seq_q": torch.tensor([0.0, 4.0, 10.0])}, TypeError, "cu_seq_q is torch.float32"),
        ({"cu_seq_k": torch.tensor([0, 10], dtype=torch.int32)}, ValueError, "cu_seq_k has shape"),
        ({"cu_seq_k": None}, ValueError, "cu_seq_k is None"),
        ({"max_q": 5}, RuntimeError, "sequence 1 has 6 queries and 6 keys, more than max_q = 5"),
        ({"max_k": -1}, ValueError, "max_k is -1"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"window_size": (0, -3)}, ValueError, "window_size is"),
        ({"num_splits": -1}, ValueError, "num_splits is -1"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "key has shape"),
        (
            {"seqused_k": torch.tensor([9, 1], dtype=torch.int32)},
            RuntimeError,
            "seqused_k is 9 for sequence 0",
        ),
    ),
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_varlen_errors(replacements, error, message):
    with pytest.raises(error, match=message):
        fastlm.varlen_attn(**packed_arguments(**replacements))


def test_paged_errors():
    q, pool = torch.randn(2, 2, 8), torch.randn(3, 4, 2, 8)
    at = torch.tensor([0, 1, 2], dtype=torch.int32)
    used, table = torch.tensor([4, 4], dtype=torch.int32), torch.tensor([[0], [3]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="block_table names page 3 of 3 for sequence 1"):
        fastlm.varlen_attn(q, pool, pool, at, None, 1, 4, seqused_k=used, block_table=table)
    with pytest.raises(ValueError, match="block_table requires seqused_k"):
        fastlm.varlen_attn(q, pool, pool, at, None, 1, 4, block_table=table)
    with pytest.raises(
        RuntimeError, match="block_table is for inference only|seqused_k is for inference only"
    ):
        fastlm.varlen_attn(
            q.requires_grad_(), pool, pool, at, None, 1, 4, seqused_k=used, block_table=table.clamp(max=2)
        )


def test_operators_guard_memory():
    """What the Python functions check is checked again for direct callers, where memory depends on it."""
    q, k, v = qkv()
    options = (False, 1.0)
    op = torch.ops.fastlm.attention_forward
    with pytest.raises(RuntimeError, match="attention_forward: value has shape"):
        op(q, k, v[:, :, :3], *options)
    with pytest.raises(RuntimeError, match="attention_forward: key has another dtype"):
        op(q, k.double(), v, *options)
    with pytest.raises(RuntimeError, match="attention_forward: attn_mask has shape"):
        op(q, k, v, *options, torch.zeros(1, 1, 5, 6))
    with pytest.raises(RuntimeError, match="attention_forward: dropout needs a seed"):
        op(q, k, v, *options, dropout_p=0.5)


def test_operators_without_their_options():
    """torch.library hands on none of the last arguments that are left out; gradients nobody asks for are None."""
    q, k, v = qkv(grad=True)
    out, lse = torch.ops.fastlm.attention_forward(q, k, v, True, 0.3)
    expected = reference.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), dout), gradients)
    inputs = [x.detach() for x in (dout, q, k, v, out, lse)]
    backward = torch.ops.fastlm.attention_backward
    *given, dmask, dslopes, dsinks = backward(*inputs, True, 0.3)
    torch.testing.assert_close(tuple(given), gradients)
    assert dmask is dslopes is dsinks is None
    mask, sinks = torch.randn(1, 1, 5, 7), torch.randn(2)
    for options in ((), (None, mask, None, sinks, None, 0.0, -1, -1, 0.0, True)):
        torch.library.opcheck(backward, (*inputs, True, 0.3, *options))


def test_operators_of_plain_calls():
    """What a call without options takes on a CPU is the other operators' to the bit; what doesn't fit is refused."""
    plain, general = torch.ops.fastlm.plain_attention_forward, torch.ops.fastlm.attention_forward
    backward = torch.ops.fastlm.plain_attention_backward, torch.ops.fastlm.attention_backward
    q, k, v = (torch.randn(2, H, T, 16) for H, T in ((4, 5), (2, 7), (2, 7)))
    for is_causal in (False, True):
        out, lse = plain(q, k, v, is_causal, True)
        assert all(map(torch.equal, (out, lse), general(q, k, v, is_causal, 0.25)))
        inputs = torch.randn_like(out), q, k, v, out, lse, is_causal
        ours, theirs = backward[0](*inputs), backward[1](*inputs, 0.25)
        assert all(map(torch.equal, ours, theirs[:3]))
        torch.library.opcheck(plain, (q, k, v, is_causal, True))
        torch.library.opcheck(backward[0], inputs)
    for wrong, message in (
        ((q, k, v, False, False), "enable_gqa"),
        ((q, k, v.double(), False, True), "value has another dtype"),
        ((q, k, v[:, :, 1:], False, True), "value has shape"),
        ((q[0], k, v, False, True), "must be .B, H, T, D."),
        ((q, k[0], v, False, False), "must be .B, H, T, D."),
        ((q.to_sparse(), k, v, False, True), "Sparse"),
        ((q, k.to("meta"), v, False, True), "several devices"),
        ((q.int(), k.int(), v.int(), False, True), "must be float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            plain(*wrong)


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("wanted", ((0, 1, 2), (1,), (0, 2)), ids=str)
def test_second_derivatives_of_some_inputs(is_causal, wanted):
    inputs = list(torch.randn(3, 1, 1, 3, 4, dtype=torch.float64).unbind())

    def attention(*given):
        for i, x in zip(wanted, given, strict=True):
            inputs[i] = x
        return fastlm.scaled_dot_product_attention(*inputs, is_causal=is_causal)

    given = [inputs[i].clone().requires_grad_() for i in wanted]
    assert torch.autograd.gradcheck(attention, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attention, given)
    x = given[0]  # at each place the same
    assert torch.autograd.gradgradcheck(lambda x: fastlm.scaled_dot_product_attention(x, x, x), x)


def test_changed_before_its_backward_is_an_error():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 8, 16).unbind())
    used = q * 1
    out = fastlm.scaled_dot_product_attention(used, k, v)
    used.mul_(2)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), q, create_graph=create_graph, retain_graph=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_rows_that_share_memory(dtype, isa):
    """Every key, or every value, in one place: the bits of copies in places of their own."""
    q, k, v, upstream = torch.randn(4, 2, 2, 37, 16, dtype=dtype).unbind()
    for key, value in ((k[:, :, :1].expand_as(k), v), (k, v[:, :, :1].expand_as(v))):
        results = []
        for places in (Tensor.detach, Tensor.contiguous):
            inputs = [x.requires_grad_() for x in (q.detach(), places(key.detach()), places(value.detach()))]
            out = sdpa(*inputs, is_causal=True)
            results.append((out, *torch.autograd.grad(out, inputs, upstream)))
        for shared, own in zip(*results, strict=True):
            assert torch.equal(shared, own)
