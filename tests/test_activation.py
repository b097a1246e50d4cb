"""fastlm.gelu: torch's numbers and manners. The gradient of a bias, which is summed beside it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.ops import activation

KINDS = ("none", "tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N = 1 << 14  # elements from which on the kernel serves
CALLS = (fastlm.gelu, F.gelu)
forward, backward = torch.ops.fastlm.gelu.default, torch.ops.fastlm.gelu_backward.default


@pytest.fixture
def served(monkeypatch):
    """The calls that the kernel served."""
    calls, operator = [], activation._forward
    monkeypatch.setattr(activation, "_forward", lambda *args: calls.append(args) or operator(*args))
    return calls


def truth(x, dy, kind):
    x = x.detach().double().requires_grad_()
    y = F.gelu(x, approximate=kind)
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, dtype, isa):
    """Within a rounding of the result and some of its largest factor, whatever the number of elements."""
    torch.manual_seed(0)
    for size in (0, 1, 7, 16, 33, 4099):
        x, dy = (5 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype)
        expected = truth(x, dy, kind)
        actual = forward(x, kind == "tanh"), backward(dy, x, kind == "tanh")
        for a, e, scale in zip(actual, expected, (x.double().abs(), dy.double().abs()), strict=True):
            assert a.dtype is dtype and a.shape == e.shape
            bound = torch.finfo(dtype).eps * e.abs() + (3e-7 if dtype is torch.float32 else 2e-5) * scale
            assert ((a.double() - e).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("kind", KINDS)
def test_far_below_zero(kind, isa):
    """Leading digits that torch's formulas, also in float64, lose to cancellation."""
    x = torch.linspace(-12.9 if kind == "none" else -9.5, -1, 5000)
    wide = x.double()
    share = torch.special.erfc(-wide / 2**0.5) / 2
    if kind == "tanh":
        share = torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    error = forward(x, kind == "tanh") / (wide * share) - 1
    assert error.abs().max() < 2e-5 and share.min() < 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_of_no_number(kind, dtype, isa):
    x = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 6e4, -6e4, 20, -20] * 3, dtype=dtype)
    y, dx = forward(x, kind == "tanh"), backward(torch.ones_like(x), x, kind == "tanh")
    assert y[0].isnan() and dx[0].isnan() and y[1].isinf()
    assert torch.equal(y[2:8], torch.where(x[2:8] > 0, x[2:8], 0.0))
    assert torch.equal(dx[2:8], torch.tensor([0.5, 0.5, 1, 0, 1, 0], dtype=dtype))
    assert torch.equal(y[1:2].signbit(), torch.tensor([False])) and y[3].signbit()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_with_any_threads(kind, dtype, restore_threads):
    x, dy = torch.randn(3, 70001, dtype=dtype), torch.randn(3, 70001, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append((forward(x, kind == "tanh"), backward(dy, x, kind == "tanh")))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_operators_are_registered_as_they_behave():
    x = torch.randn(3, 40)
    for argument in (x, x.t(), x[:, ::2]):
        torch.library.opcheck(forward, (argument, True), test_utils="test_faketensor")
        torch.library.opcheck(backward, (argument, argument, False), test_utils="test_faketensor")
        assert torch.equal(forward(argument, True), forward(argument.contiguous(), True))


def test_operators_refuse():
    x = torch.randn(4)
    for op, arguments, words in (
        (forward, (x.double(), True), "input must be float32, bfloat16 or float16"),
        (forward, (x.long(), True), "input must be float64, float32, bfloat16 or float16"),
        (backward, (x.half(), x, True), "dout has another dtype"),
        (backward, (x[:3], x, True), r"dout has shape \(3\), expected \(4\)"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_which_calls_are_torchs(kind, served):
    large = torch.randn(N)
    for x in (large[:-1], large.double(), torch.randn(2 * N)[::2], large.to("meta")):
        y, expected = (function(x, approximate=kind) for function in CALLS)
        assert x.is_meta or torch.equal(y, expected)
        assert y.stride() == expected.stride()
    with fastlm.use_backend("eager"):
        assert torch.equal(*(function(large, approximate=kind) for function in CALLS))
    assert not served
    fastlm.gelu(large, approximate=kind)
    fastlm.gelu(large.clone().requires_grad_(), approximate=kind)
    assert len(served) == 2


@pytest.mark.parametrize("arguments, options", (((torch.ones(N).long(),), {}), ((3,), {}), ((), {})))
def test_errors_are_torchs(arguments, options):
    for function in CALLS[1:]:
        with pytest.raises((RuntimeError, TypeError)):
            function(*arguments, **options)
    with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
        fastlm.gelu(torch.randn(N), approximate="sigmoid")


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    seconds = []
    for function in CALLS:
        x = torch.linspace(-4, 4, N).requires_grad_()
        (first,) = torch.autograd.grad(function(x, approximate=kind).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_and_batched_gradients(kind, served):
    x = torch.randn(2, N)
    assert torch.equal(*(torch.func.vmap(lambda r: f(r, approximate=kind))(x) for f in CALLS))  # noqa: B023
    tangents = [torch.func.jvp(lambda y: f(y, approximate=kind), (x,), (x,))[1] for f in CALLS]  # noqa: B023
    assert torch.equal(*tangents) and not served
    made = []
    for function in CALLS:
        leaf = x.clone().requires_grad_()
        y = function(leaf, approximate=kind)
        made.append(torch.autograd.grad(y, leaf, torch.stack((x, -x)), is_grads_batched=True)[0])
    assert torch.equal(*made) and len(served) == 1


def test_compiles_whole():
    x = torch.randn(N, requires_grad=True)
    compiled = torch.compile(
        lambda x: fastlm.gelu(x, approximate="tanh"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), F.gelu(x, approximate="tanh"))


def test_module_is_torchs(served):
    x = torch.randn(N)
    for kind in KINDS:
        theirs, ours = nn.GELU(kind), fastlm.nn.GELU(kind)
        assert repr(ours) == repr(theirs) and isinstance(ours, nn.GELU)
        torch.testing.assert_close(ours(x), theirs(x))
        converted = fastlm.convert(nn.Sequential(theirs))
        assert type(converted[0]) is fastlm.nn.GELU and torch.equal(converted(x), ours(x))
        torch.testing.assert_close(torch.jit.script(ours)(x), ours(x))
    assert len(served) == 8


def test_installed(served):
    x = torch.randn(4, N, requires_grad=True)
    modules = nn.GELU(), nn.GELU("tanh")
    expected = [m(x) for m in modules]
    with fastlm.installed():
        for module, e in zip(modules, expected, strict=True):
            torch.testing.assert_close(module(x), e)
        out = torch.empty(N)
        assert F.gelu(x[0].detach(), out=out) is out
        with pytest.raises(TypeError):
            F.gelu(x, "tanh")
        scripted = torch.jit.script(nn.GELU())
    assert len(served) == 2
    torch.testing.assert_close(scripted(x), expected[0])
    nn.GELU()(x)
    assert len(served) == 2


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_sums_of_rows(dtype, isa, restore_threads):
    """In the order of the rows alone: the same bits with any number of threads."""
    for rows, columns in ((0, 5), (1, 1), (7, 130), (8, 64), (301, 1100), (129, 2049)):
        x = torch.randn(rows, columns).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.fastlm.sum_rows(x))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert results[0].dtype is wide
        torch.testing.assert_close(results[0], x.double().sum(0).to(wide), atol=2e-5, rtol=1e-5)
        assert torch.equal(torch.ops.fastlm.sum_rows(x.t().contiguous().t()), results[0])


def test_gradient_of_a_bias_of_bfloat16(restore_threads):
    """Summed in float32 and rounded once, as torch's sum of columns is."""
    torch.set_num_threads(2)
    layer = fastlm.nn.Linear(512, 512)
    x, dy = torch.randn(600, 512), torch.randn(600, 512)
    for autocast in (True, False):
        layer, x = (
            layer.to(torch.float32 if autocast else torch.bfloat16),
            x.float() if autocast else x.bfloat16(),
        )
        layer.bias.grad = None
        with torch.autocast("cpu", enabled=autocast):
            layer(x).backward(dy.bfloat16())
        expected = dy.bfloat16().double().sum(0).to(layer.bias.dtype)
        torch.testing.assert_close(layer.bias.grad, expected, atol=1e-4, rtol=8e-3 if not autocast else 1e-5)
