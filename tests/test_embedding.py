"""fastlm.embedding and fastlm.nn.Embedding: torch's numbers and manners, of whatever size and option."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.ops import embedding as ops_embedding

N, D = 1024, 256  # large enough for a gradient in kept memory
CALLS = (fastlm.embedding, F.embedding)


@pytest.fixture
def taken(monkeypatch):
    """How many gradients were made in memory of ours."""
    made, new_empty = [], ops_embedding.new_empty
    monkeypatch.setattr(ops_embedding, "new_empty", lambda *args: made.append(args) or new_empty(*args))
    return made


def gradients(function, input, weight, dy, **options):
    weight = weight.detach().clone().requires_grad_()
    y = function(input, weight, **options)
    y.backward(dy)
    return y, weight.grad


@pytest.mark.parametrize("padding_idx", (None, 0, 7, -1, -N))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_same_bits(padding_idx, dtype, taken):
    """But in 16 bits, whose sums are rounded once."""
    torch.manual_seed(0)
    weight = torch.randn(N, D, dtype=dtype)
    for input in (
        torch.randint(N, (3, 50)),
        torch.randint(4, (200,), dtype=torch.int32),
        torch.tensor(N - 1),
        torch.randint(9, (4, 6)).t(),
        torch.empty(0, dtype=torch.int64),
    ):
        dy = torch.randn(*input.shape, D, dtype=dtype)
        wide = (torch.promote_types(dtype, torch.float32),) if dtype.itemsize == 2 else ()
        y, dw = gradients(F.embedding, input, *(x.to(*wide) for x in (weight, dy)), padding_idx=padding_idx)
        actual = gradients(fastlm.embedding, input, weight, dy, padding_idx=padding_idx)
        expected = y.to(dtype), dw.to(dtype)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e) and a.dtype is e.dtype and a.stride() == e.stride()
    assert len(taken) == 5


@pytest.mark.parametrize(
    "options",
    ({"max_norm": 1.0}, {"max_norm": 2.0, "norm_type": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}),
    ids=str,
)
def test_other_options_are_torchs(options, taken):
    weight, input = torch.randn(N, D), torch.randint(9, (40,))
    dy = torch.randn(40, D)
    (y, dw), (y_torch, dw_torch) = (gradients(f, input, weight, dy, **options) for f in CALLS)
    assert torch.equal(y, y_torch) and dw.layout is dw_torch.layout and not taken
    assert torch.equal(dw.to_dense(), dw_torch.to_dense())


def test_small_matrices_and_calls_without_gradients_are_torchs(taken):
    gradients(fastlm.embedding, torch.arange(3), torch.randn(8, 4), torch.ones(3, 4))
    weight = torch.randn(N, D)
    assert fastlm.embedding(torch.arange(3), weight).grad_fn is None
    with torch.no_grad():
        assert fastlm.embedding(torch.arange(3), weight.requires_grad_()).grad_fn is None
    assert not taken


@pytest.mark.parametrize(
    "arguments, options",
    (
        ((torch.tensor([N]), torch.randn(N, D, requires_grad=True)), {}),
        ((torch.tensor([-1]), torch.randn(N, D, requires_grad=True)), {}),
        ((torch.tensor([0.5]), torch.randn(N, D, requires_grad=True)), {}),
        ((torch.tensor([0]), torch.randn(N * D, requires_grad=True)), {}),
        ((torch.tensor([0]), torch.randn(N, D, requires_grad=True)), {"padding_idx": N}),
        ((torch.tensor([0]), torch.randn(N, D, requires_grad=True)), {"padding_idx": -N - 1}),
        (([0], torch.randn(N, D, requires_grad=True)), {}),
    ),
)
def test_errors_are_torchs(arguments, options):
    raised = []
    for function in CALLS:
        with pytest.raises(Exception) as info:  # noqa: PT011 - which one, torch says
            function(*arguments, **options)
        raised.append((info.type, str(info.value)))
    assert raised[0] == raised[1]


def test_second_derivatives():
    input = torch.randint(N, (5,))
    seconds = []
    for function in CALLS:
        weight = torch.linspace(-1, 1, N * D, dtype=torch.float64).view(N, D).requires_grad_()
        (first,) = torch.autograd.grad(function(input, weight).pow(3).sum(), weight, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert torch.equal(*seconds)


def test_transforms_and_batched_gradients(taken):
    weight, input = torch.randn(N, D), torch.randint(N, (4,))
    for function in CALLS:
        assert torch.func.vmap(lambda i: function(i, weight))(input).shape == (4, D)  # noqa: B023
    tangents = [torch.func.jvp(lambda w: f(input, w), (weight,), (weight,))[1] for f in CALLS]  # noqa: B023
    assert torch.equal(*tangents)
    rows = torch.eye(4, dtype=torch.float32)[:, :, None].expand(4, 4, D).contiguous()
    made = []
    for function in CALLS:
        w = weight.clone().requires_grad_()
        made.append(torch.autograd.grad(function(input, w), w, rows, is_grads_batched=True)[0])
    assert torch.equal(*made) and not taken


def test_compiles_whole():
    layer, tokens = fastlm.nn.Embedding(N, D), torch.randint(N, (2, 8))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(tokens).sum().backward()
    expected = F.one_hot(tokens.flatten(), N).sum(0).float()[:, None].expand(N, D)
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("padding_idx", (None, 3))
def test_module_is_torchs(padding_idx):
    torch.manual_seed(0)
    theirs = torch.nn.Embedding(N, D, padding_idx=padding_idx)
    torch.manual_seed(0)
    ours = fastlm.nn.Embedding(N, D, padding_idx=padding_idx)
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.weight, theirs.weight)
    tokens = torch.randint(N, (2, 8))
    for module in (ours, theirs):
        module(tokens).square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert type(fastlm.convert(copy.deepcopy(theirs))) is fastlm.nn.Embedding
    assert torch.equal(torch.jit.script(ours)(tokens), theirs(tokens))


def test_installed(taken):
    layer = torch.nn.Embedding(N, D)
    with fastlm.installed():
        layer(torch.arange(9)).sum().backward()
    assert len(taken) == 1
    layer(torch.arange(9)).sum().backward()
    assert len(taken) == 1 and layer.weight.grad[:9].eq(2).all()
