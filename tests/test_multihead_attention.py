"""fastlm.nn.MultiheadAttention against torch.nn.MultiheadAttention, over all of its options."""

import copy
import pickle

import pytest
import torch
from harness import tensors_of

import fastlm

N, L, S, E, H = 2, 3, 5, 8, 2
MASKS = ("none", "padding", "bool", "bool+padding", "float", "heads+float-padding", "heads", "hint")
OPTIONS = (
    (),
    ("bias",),
    ("add_bias_kv",),
    ("add_zero_attn", "separate"),
    ("bias", "add_bias_kv", "add_zero_attn"),
    ("add_bias_kv", "add_zero_attn", "separate"),
)
SHARED = ("separate", "key-is-value", "self")


@pytest.fixture(autouse=True)
def slow_path():
    """torch's inference path gives NaN for rows without a key; its other path gives 0, as we do."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def pair(training=True, dtype=torch.float64, **options):
    theirs = torch.nn.MultiheadAttention(E, H, dtype=dtype, **options).train(training)
    ours = fastlm.nn.MultiheadAttention(E, H, dtype=dtype, **options).train(training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(shared, batched, batch_first, kdim=E, vdim=E):
    rows = L if shared == "self" else S

    def make(length, width):
        shape = (length, width)
        if batched:
            shape = (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    q = make(L, E)
    k = q if shared == "self" else make(rows, kdim)
    v = k if shared != "separate" else make(rows, vdim)
    return q, k, v


def masks(kind, rows, batched):
    """(key_padding_mask, attn_mask, is_causal); a floating attn_mask wants a gradient."""
    padding_shape = (N, rows) if batched else (rows,)
    heads_shape = ((N if batched else 1) * H, L, rows)
    padding = torch.rand(padding_shape) < 0.3
    boolean = torch.rand(L, rows) < 0.3
    if kind == "none":
        return None, None, False
    if kind == "padding":
        return padding, None, False
    if kind == "bool":
        return None, boolean, False
    if kind == "bool+padding":
        return padding, boolean, False
    if kind == "float":
        return None, torch.randn(L, rows, dtype=torch.float64, requires_grad=True), False
    if kind == "heads+float-padding":
        additive = torch.randn(heads_shape, dtype=torch.float64, requires_grad=True)
        return torch.randn(padding_shape, dtype=torch.float64), additive, False
    if kind == "heads":
        return None, torch.rand(heads_shape) < 0.3, False
    assert kind == "hint"
    return None, torch.ones(L, rows).triu(1).bool(), True


@pytest.mark.parametrize("batch_first", (False, True), ids=("length-first", "batch-first"))
@pytest.mark.parametrize("batched", (True, False), ids=("batched", "unbatched"))
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shared", SHARED)
def test_matches_torch(shared, kind, batched, batch_first):
    for chosen in OPTIONS:
        options = dict.fromkeys(chosen, True) | ({"bias": False} if "bias" in chosen else {})
        separate = options.pop("separate", False)
        if separate and shared != "separate":
            continue
        widths = dict(kdim=5, vdim=7) if separate else {}
        ours, theirs = pair(batch_first=batch_first, **options, **widths)
        q, k, v = inputs(shared, batched, batch_first, **widths)
        rows = L if shared == "self" else S
        padding, mask, hint = masks(kind, rows, batched)
        call = dict(key_padding_mask=padding, attn_mask=mask, is_causal=hint, need_weights=False)
        actual, none = ours(q, k, v, **call)
        expected, _ = theirs(q, k, v, **call)
        assert none is None
        torch.testing.assert_close(actual, expected)

        cotangent = torch.randn_like(expected)
        leaves = {id(x): x for x in (q, k, v, mask) if x is not None and x.requires_grad}

        def gradients(module, output, leaves=leaves, cotangent=cotangent):
            wanted = [*leaves.values(), *module.parameters()]
            return torch.autograd.grad(output, wanted, cotangent)

        torch.testing.assert_close(gradients(ours, actual), gradients(theirs, expected))


@pytest.mark.parametrize("average", (True, False), ids=("averaged", "per-head"))
@pytest.mark.parametrize("kind", ("none", "bool", "float"))
def test_weights(kind, average):
    """The weights are torch's, and the output beside them agrees with the fused one."""
    ours, theirs = pair(batch_first=True)
    q, k, v = inputs("separate", True, True)
    padding, mask, _ = masks(kind, S, True)
    if kind == "bool":
        mask = torch.ones(L, S).triu(3).bool()  # no row without a key: torch gives NaN there
    call = dict(key_padding_mask=padding, attn_mask=mask)
    output, weights = ours(q, k, v, average_attn_weights=average, **call)
    expected, expected_weights = theirs(q, k, v, average_attn_weights=average, **call)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert weights.shape == ((N, L, S) if average else (N, H, L, S))
    torch.testing.assert_close(output, ours(q, k, v, need_weights=False, **call)[0])


def test_dropout_is_of_training_only_and_repeatable():
    ours, _ = pair(dropout=0.5)
    q, k, v = inputs("separate", True, False)

    def run(seed):
        torch.manual_seed(seed)
        return ours(q, k, v, need_weights=False)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    ours.eval()
    assert torch.equal(run(1), run(2))


def test_is_torchs_module():
    """Same state_dict, repr and class hierarchy; copies and pickles; counts as a transformer's."""
    ours, theirs = pair(add_bias_kv=True, kdim=5, vdim=7, dropout=0.1, batch_first=True)
    assert isinstance(ours, torch.nn.MultiheadAttention) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.eval()
    arguments = inputs("separate", True, True, kdim=5, vdim=7)
    expected = ours(*arguments, need_weights=False)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(*arguments, need_weights=False)[0], expected)


def test_reads_the_packed_projection_in_place():
    """Self-attention calls our kernel once and copies no head: no (L, S) matrix either."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operators, self.largest = [], 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.operators.append(str(function))
            self.largest = max([self.largest, *(x.numel() for x in tensors_of(result))])
            return result

    module = fastlm.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(1, 256, 16)
    with Sizes() as seen:
        module(x, x, x, need_weights=False)
    assert sum("fastlm" in name for name in seen.operators) == 1
    assert seen.largest == 3 * x.numel()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=torch.zeros(L, N, E + 1)), AssertionError, "query has embedding dimension 9"),
        (dict(key=torch.zeros(S + 1, N, E)), AssertionError, "does not fit value's"),
        (dict(query=torch.zeros(L)), AssertionError, "2D or batched 3D"),
        (dict(attn_mask=torch.zeros(L, L)), RuntimeError, r"attn_mask has shape \(3, 3\)"),
        (dict(attn_mask=torch.zeros(N, L, S)), RuntimeError, r"expected \(4, 3, 5\)"),
        (dict(attn_mask=torch.zeros(L, S).int()), AssertionError, "bool or floating"),
        (
            dict(key_padding_mask=torch.zeros(N, S + 1)),
            AssertionError,
            "key_padding_mask has shape",
        ),
        (dict(is_causal=True), RuntimeError, "needs an attn_mask"),
    ],
    ids=("query", "key", "rank", "mask", "heads-mask", "mask-dtype", "padding", "hint"),
)
def test_errors(change, error, message):
    arguments = dict(query=torch.zeros(L, N, E), key=torch.zeros(S, N, E), value=torch.zeros(S, N, E))
    ours, theirs = pair(dtype=torch.float32)
    with pytest.raises(error, match=message):
        ours(**(arguments | change), need_weights=False)
    with pytest.raises(error):
        theirs(**(arguments | change), need_weights=False)


@pytest.mark.parametrize("batches", ((0, 1), (1, 2)), ids=str)
def test_batches_must_be_equal(batches):
    query, key = (torch.randn(n, 3, 4) for n in batches)
    for module in (torch.nn.MultiheadAttention, fastlm.nn.MultiheadAttention):
        with pytest.raises(RuntimeError):
            module(4, 2, batch_first=True)(query, key, key, need_weights=False)
