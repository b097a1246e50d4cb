"""Cross-entropy beyond its table of cases: edge values, errors, repeated backward, modules."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fastlm
from fastlm import reference

INF = float("inf")


def gradient(function, x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    loss = function(x, *args, **kwargs)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), dx


# ---- values where eager's behaviour is the specification ------------------------------------

EDGES = {
    "minus-inf-elsewhere": ([[0.0, -INF, 1.0, -INF, 2.0]], 0),
    "minus-inf-target": ([[0.0, -INF, 1.0, -INF, 2.0]], 1),
    "all-minus-inf": ([[-INF] * 5], 0),
    "plus-inf": ([[0.0, INF, 1.0]], 0),
    "nan": ([[0.0, math.nan, 1.0]], 0),
    "huge": ([[1e30, -1e30, 0.0]], 1),
    "large-offset": ([[10000.0, 10001.0, 9998.5]], 2),
    "confident": ([[30.0, -30.0, 0.0]], 0),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_values_are_eagers(name, isa):
    values, y = EDGES[name]
    x, target = torch.tensor(values), torch.tensor([y])
    loss, dx = gradient(fastlm.cross_entropy, x, target, reduction="none")
    expected, expected_dx = gradient(F.cross_entropy, x, target, reduction="none")
    assert_close(loss, expected, equal_nan=True)
    assert_close(dx, expected_dx, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("step", (-200.0, -30.0, 0.0, 30.0, 60.0, 200.0), ids=str)
@pytest.mark.parametrize("masked", (0, 4500))
def test_maximum_that_moves(masked, step, dtype, isa):
    """Along a row the logits rise or fall, from block to block of the sweep, by more or less than what exp may be
    of; the first ones may be -inf."""
    x = torch.randn(3, 9001, dtype=torch.float64) + step * (torch.arange(9001) // 1000)
    x[:, :masked] = -math.inf
    x = x.to(dtype).requires_grad_()
    target = torch.tensor([9000, 5000, 8765])
    loss = fastlm.cross_entropy(x, target)
    (dx,) = torch.autograd.grad(loss, x)
    wide = x.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, target)
    (expected_dx,) = torch.autograd.grad(expected, wide)
    rtol = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert_close(loss.double(), expected, rtol=rtol, atol=0)
    assert_close(dx.double(), expected_dx, rtol=30 * rtol, atol=rtol / 10)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_every_token_ignored(reduction, smoothing, isa):
    x, target = torch.randn(3, 5), torch.full((3,), -100)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    loss, dx = gradient(fastlm.cross_entropy, x, target, **options)
    assert_close(loss, F.cross_entropy(x, target, **options), equal_nan=True)
    assert torch.equal(dx, torch.zeros_like(x))
    w = torch.randn(5, 4)
    h = torch.randn(3, 4)
    loss, dh = gradient(fastlm.linear_cross_entropy, h, w, target, **options)
    assert_close(loss, F.cross_entropy(h @ w.t(), target, **options), equal_nan=True)
    assert torch.equal(dh, torch.zeros_like(h))


def test_nothing_to_average():
    x, target = torch.randn(0, 5), torch.empty(0, dtype=torch.int64)
    assert fastlm.cross_entropy(x, target).isnan()
    assert fastlm.cross_entropy(x, target, reduction="sum") == 0
    assert fastlm.cross_entropy(x, target, reduction="none").shape == (0,)


def test_ignored_token_may_hold_nan(isa):
    x = torch.tensor([[0.0, math.nan], [1.0, 2.0]])
    loss, dx = gradient(fastlm.cross_entropy, x, torch.tensor([-100, 1]))
    assert_close(loss, F.cross_entropy(x[1:], torch.tensor([1])))
    assert torch.equal(dx[0], torch.zeros(2))


@pytest.mark.parametrize("shape", ((3, 5), (3, 5, 4)), ids=("rows", "columns"))
def test_weight_of_an_absent_class_may_be_infinite(shape, isa):
    x, target = torch.randn(shape), torch.zeros((3, *shape[2:]), dtype=torch.int64)
    weight = torch.tensor([0.5, INF, 1.0, math.nan, -INF])
    assert_close(
        gradient(fastlm.cross_entropy, x, target, weight), gradient(F.cross_entropy, x, target, weight)
    )


def test_an_unbatched_target_of_one_element(tiny_calls_as_shipped):
    x, target = torch.randn(5), torch.tensor([3])
    assert_close(gradient(fastlm.cross_entropy, x, target), gradient(F.cross_entropy, x, target[0]))


@pytest.mark.parametrize("scale", (1.0, 1 / 3))
def test_small_half_gradients_survive_loss_scaling(scale, isa):
    """A mean's unit gradient, 1 / N of a small probability, would underflow in float16."""
    x = torch.randn(4096, 40).half().requires_grad_()
    target = torch.randint(40, (4096,))
    (fastlm.cross_entropy(x, target).float() * 32768 * scale).backward()
    exact = x.detach().double().requires_grad_()
    (F.cross_entropy(exact, target) * 32768 * scale).backward()
    assert_close(x.grad.double(), exact.grad, rtol=2e-3, atol=1e-5)


# ---- gradients handed over from the forward --------------------------------------------------


def losses():
    w = torch.randn(9, 6)
    target = torch.randint(9, (7,))
    return [
        (torch.randn(7, 9), lambda x: fastlm.cross_entropy(x, target)),
        (torch.randn(7, 6), lambda x: fastlm.linear_cross_entropy(x, w, target)),
    ]


@pytest.mark.parametrize("index", (0, 1), ids=("logits", "linear"))
def test_backward_twice(index):
    x, loss_of = losses()[index]
    x.requires_grad_()
    loss = loss_of(x)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward(torch.tensor(3.0), retain_graph=True)
    assert_close(x.grad, 4 * once)
    x.grad.zero_()  # must not reach what the graph keeps
    loss.backward()
    assert_close(x.grad, once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("index", (0, 1), ids=("logits", "linear"))
def test_double_backward(index):
    x = losses()[index][0].double().requires_grad_()
    target = torch.randint(9, (7,))
    w = torch.randn(9, 6, dtype=torch.float64)
    function = (
        (lambda t: fastlm.cross_entropy(t, target))
        if index == 0
        else (lambda t: fastlm.linear_cross_entropy(t, w, target))
    )
    assert torch.autograd.gradgradcheck(function, (x,))


def test_class_weights_of_probabilities_have_a_gradient():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    q = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: fastlm.cross_entropy(*a), (x, q, weight))
    h = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w, q, weight: fastlm.linear_cross_entropy(h, w, q, weight=weight),
        (h, w, q, weight),
    )


def test_linear_with_a_frozen_side_asks_for_one_gradient():
    h = torch.randn(5, 3)
    w = torch.randn(7, 3, requires_grad=True)
    fastlm.linear_cross_entropy(h, w, torch.randint(7, (5,))).backward()
    assert h.grad is None and w.grad is not None


def test_autocast_is_eagers():
    h, w, target = torch.randn(6, 8), torch.randn(9, 8), torch.randint(9, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (torch.randn(6, 9), torch.randn(6, 9).bfloat16()):
            loss, expected = fastlm.cross_entropy(x, target), F.cross_entropy(x, target)
            assert loss.dtype == expected.dtype == torch.float32
            assert_close(loss, expected)
        loss = fastlm.linear_cross_entropy(h, w, target)
        expected = F.cross_entropy(F.linear(h, w), target)
        assert loss.dtype == expected.dtype == torch.float32
        assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_linear_over_several_chunks(isa):
    """More tokens than one chunk of any ISA, the last one partly filled."""
    h, w, target = torch.randn(1201, 16), torch.randn(3000, 16), torch.randint(3000, (1201,))
    h.requires_grad_(), w.requires_grad_()
    loss = fastlm.linear_cross_entropy(h, w, target)
    exact = F.cross_entropy(h.double() @ w.double().t(), target)
    assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (h, w)), torch.autograd.grad(exact, (h, w)), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


# ---- errors ---------------------------------------------------------------------------------

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 4, 2])
H, W = torch.randn(4, 3), torch.randn(5, 3)

ERRORS = {
    "target-high": (IndexError, "target 5 is out of bounds for 5", (X, torch.tensor([0, 5, 1, 2])), {}),
    "target-low": (IndexError, "target -1 is out of bounds", (X, torch.tensor([0, -1, 1, 2])), {}),
    "batch": (ValueError, r"target has shape \(3,\), expected \(4,\)", (X, Y[:3]), {}),
    "positions": (RuntimeError, "target has shape", (X[None].mT, Y[None, :3]), {}),
    "target-dtype": (RuntimeError, "expected target dtype to be Long or Byte", (X, Y.short()), {}),
    "target-float-indices": (RuntimeError, "Long or Byte", (X, Y.float()), {}),
    "integer-probabilities": (RuntimeError, "class probabilities", (X, torch.zeros(4, 5).long()), {}),
    "scalar-input": (RuntimeError, "input has no dimension", (torch.tensor(1.0), Y[0]), {}),
    "integer-input": (RuntimeError, "input has dtype torch.int64", (X.long(), Y), {}),
    "weight-size": (RuntimeError, "all 5 classes", (X, Y, torch.rand(4)), {}),
    "weight-dtype": (RuntimeError, "weight has dtype", (X, Y, torch.rand(5).double()), {}),
    "weight-gradient": (RuntimeError, "not differentiable", (X, Y, torch.rand(5, requires_grad=True)), {}),
    "reduction": (ValueError, "not a valid value for reduction", (X, Y), {"reduction": "average"}),
    "smoothing": (RuntimeError, "between 0.0 and 1.0", (X, Y), {"label_smoothing": 1.1}),
    "smoothing-nan": (RuntimeError, "between 0.0 and 1.0", (X, Y), {"label_smoothing": math.nan}),
    "z-loss": (ValueError, "z_loss is inf", (X, Y), {"z_loss": INF}),
    "softcap": (ValueError, "softcap is -1", (X, Y), {"softcap": -1.0}),
    "ignored-probability": (RuntimeError, "ignore_index", (X, X.softmax(1)), {"ignore_index": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, message, args, kwargs = ERRORS[name]
    with pytest.raises(kind, match=message):
        fastlm.cross_entropy(*args, **kwargs)


LINEAR_ERRORS = {
    "target": (IndexError, "fastlm.linear_cross_entropy: target 7", (H, W, torch.tensor([7, 0, 0, 0])), {}),
    "input-rank": (RuntimeError, "dimensionality 1 or 2", (H[None], W, Y), {}),
    "weight-rank": (RuntimeError, "at least 2", (H, W[0], Y), {}),
    "features": (RuntimeError, "in_features", (H[:, :2], W, Y), {}),
    "bias-shape": (RuntimeError, "linear_bias shape", (H, W, Y), {"linear_bias": torch.zeros(4)}),
    "dtype": (RuntimeError, "linear_weight has dtype", (H, W.double(), Y), {}),
    "unbatched-heads": (RuntimeError, "requires batched input", (H[0], W[None], Y[0]), {}),
    "ignored-probability": (RuntimeError, "ignore_index", (H, W, X.softmax(1)), {"ignore_index": -1}),
    "options": (TypeError, "LinearCrossEntropyOptions", (H, W, Y), {"options": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR_ERRORS)
def test_linear_errors(name):
    kind, message, args, kwargs = LINEAR_ERRORS[name]
    with pytest.raises(kind, match=message):
        fastlm.linear_cross_entropy(*args, **kwargs)


def test_deprecated_reductions():
    with pytest.warns(UserWarning, match="deprecated"):
        assert_close(fastlm.cross_entropy(X, Y, size_average=False), F.cross_entropy(X, Y, reduction="sum"))
    with pytest.warns(UserWarning, match="deprecated"):
        assert_close(fastlm.cross_entropy(X, Y, reduce=False), F.cross_entropy(X, Y, reduction="none"))


# ---- memory ---------------------------------------------------------------------------------

# Prints what a step takes at its peak beyond its inputs, for few tokens and for many.
EXTRA_MEMORY = """
import ctypes, re, torch, fastlm
from pathlib import Path

def status(name):
    return int(re.search(rf"{name}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

torch.set_num_threads(2)
for N, V in ((4, 16), (1056, 8192), (4224, 8192)):  # the first brings in the code
    x, w = (torch.randn(n, 16, requires_grad=True) for n in (N, V))
    target = torch.arange(N)
    target %= V
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmHWM")
    fastlm.linear_cross_entropy(x, w, target).backward()
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_linear_memory_is_flat_in_tokens():
    """Tokens go by in chunks: logits of all would take 33 and 132 MiB."""
    done = subprocess.run([sys.executable, "-c", EXTRA_MEMORY], capture_output=True, text=True, check=True)
    _, few, many = map(int, done.stdout.split())
    assert many < few + (8 << 20)


# ---- modules --------------------------------------------------------------------------------


def test_modules_are_torchs():
    ours = fastlm.nn.CrossEntropyLoss(torch.rand(5), ignore_index=1, label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(ours.weight.clone(), ignore_index=1, label_smoothing=0.1)
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert_close(ours(X, Y), theirs(X, Y))
    assert_close(copy.deepcopy(ours)(X, Y), ours(X, Y))
    assert "z_loss=0.5" in repr(fastlm.nn.CrossEntropyLoss(z_loss=0.5))


def test_linear_module():
    ours = fastlm.nn.LinearCrossEntropyLoss(3, 5, out_features=(2,), bias=True, weight=torch.rand(5))
    assert set(ours.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    target = torch.randint(5, (4, 2))
    logits = ours.linear(H).reshape(4, 5, 2)
    assert_close(ours(H, target), F.cross_entropy(logits, target, weight=ours.weight))
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(3, 5, out_features=(2,), bias=True, weight=ours.weight)
        theirs.load_state_dict(ours.state_dict())
        assert repr(ours) == repr(theirs)
        assert_close(ours(H, target), theirs(H, target))
    with pytest.raises(RuntimeError, match="weight shape"):
        fastlm.nn.LinearCrossEntropyLoss(3, 5, weight=torch.rand(4))


@pytest.mark.parametrize("how", ("hook", "replaced", "own forward"))
def test_linear_module_calls_a_layer_that_does_more_than_multiply(how):
    module = fastlm.nn.LinearCrossEntropyLoss(
        3, 5, out_features=(2,), bias=True, weight=torch.rand(5), ignore_index=1, label_smoothing=0.1,
        z_loss=0.1, return_lse=True,
    )  # fmt: skip
    target = torch.randint(5, (4, 2))
    twice = copy.deepcopy(module)
    with torch.no_grad():
        for p in twice.linear.parameters():
            p.mul_(2)
    linear = module.linear
    if how == "hook":
        linear.register_forward_hook(lambda layer, given, output: 2 * output)
    elif how == "replaced":
        module.linear = torch.nn.Sequential(linear, Double())
    else:
        linear.forward = lambda x: 2 * F.linear(x, linear.weight, linear.bias)
    assert_close(module(H, target), twice(H, target))


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_torch_compile_keeps_the_graph_whole():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(h, w, y):
        return fastlm.cross_entropy(h @ w.t(), y) + fastlm.linear_cross_entropy(h, w, y)

    h, w = H.clone().requires_grad_(), W.clone().requires_grad_()
    dh, dw = torch.autograd.grad(step(h, w, Y), (h, w))
    expected = 2 * reference.cross_entropy(h @ w.t(), Y)
    assert_close((dh, dw), torch.autograd.grad(expected, (h, w)))
