"""Calls so small that plain PyTorch is faster than a kernel's operator: who serves them, and what of."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm import ops

pytestmark = pytest.mark.usefixtures("tiny_calls_as_shipped")


@pytest.fixture
def served(monkeypatch):
    """Names of PyTorch's own functions that were called."""
    calls = []

    def record(name):
        function = getattr(torch._C._nn, name)

        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(torch._C._nn, name, call)

    record("cross_entropy_loss")
    return calls


def logits(*shape, **options):
    x = torch.randn(*shape, requires_grad=True, **options)
    return x, torch.randint(0, shape[1], shape[:1])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_cross_entropy_is_eagers_to_the_bit(served, dtype, reduction):
    x, y = logits(4, 8, dtype=dtype)
    y[1] = -100
    weight = torch.rand(8, dtype=dtype)
    options = dict(weight=weight, reduction=reduction, label_smoothing=0.1)
    results = [f(x, y, **options) for f in (fastlm.cross_entropy, F.cross_entropy)]
    assert len(served) == 2  # F's is the other
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(r.sum(), x)[0] for r in results]
    assert torch.equal(*gradients)


def test_cross_entropy_has_second_derivatives(served):
    x, y = logits(3, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: fastlm.cross_entropy(x, y), x)
    assert "cross_entropy_loss" in served


@pytest.mark.parametrize("shape", ((2, 8, 16), (2, 3, 8, 16), (2, 2, 3, 8, 16)), ids=len)
def test_attention_of_any_rank_takes_the_short_way(shape, monkeypatch):
    q, k, v = (torch.randn(*shape[:-2], T, 16, requires_grad=True) for T in (8, 9, 9))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    monkeypatch.setattr("fastlm.functional.attention._four_dimensions", None)
    out = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    assert out.stride() == expected.stride()
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), cotangent), torch.autograd.grad(expected, (q, k, v), cotangent)
    )


def cell(B=2, H=8, **options):
    return [
        torch.randn(*shape, requires_grad=True, **options)
        for shape in ((B, 5), (B, H), (3 * H, 5), (3 * H, H), (3 * H,), (3 * H,))
    ]


def test_a_cells_step_is_eagers_to_the_bit():
    arguments = cell()
    ours, theirs = fastlm.gru_cell(*arguments), torch.gru_cell(*arguments)
    assert torch.equal(ours, theirs) and ours.grad_fn.name() == theirs.grad_fn.name()
    with fastlm.installed():
        assert torch.gru_cell(*arguments).grad_fn.name() == theirs.grad_fn.name()
    assert torch.equal(fastlm.gru_cell(*arguments[:4]), torch.gru_cell(*arguments[:4]))
    assert torch.autograd.gradgradcheck(fastlm.gru_cell, cell(1, 2, dtype=torch.float64))
    for others, options in (
        (cell(ops.TINY["gru_cell"], 2), {}),
        (cell(dtype=torch.bfloat16), {}),
        (arguments, {"zoneout": 0.5}),
        (arguments, {"layer_norm": (torch.ones(24), torch.ones(24))}),
    ):
        assert fastlm.gru_cell(*others, **options).grad_fn.name() != theirs.grad_fn.name()
    with pytest.raises(RuntimeError, match="^fastlm.gru_cell: Input batch size 2 doesn.t match"):
        fastlm.gru_cell(arguments[0], arguments[1][:1], *arguments[2:])


def test_kernels_serve_what_is_larger_and_what_eager_lacks(served):
    x, y = logits(2, ops.TINY["cross_entropy"])
    fastlm.cross_entropy(x, y)
    x, y = logits(4, 8)
    fastlm.cross_entropy(x, y, z_loss=1e-4)
    fastlm.cross_entropy(x, y, softcap=30.0)
    fastlm.cross_entropy(x, y, return_lse=True)
    assert not served


def test_a_forced_backend_serves_tiny_calls(served):
    x, y = logits(4, 8)
    with fastlm.use_backend("cpu"):
        fastlm.cross_entropy(x, y)
    assert not served


def test_a_compiled_program_keeps_the_kernels():
    x, y = logits(4, 8)
    q = torch.randn(1, 2, 8, 16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(fastlm.cross_entropy, backend=backend, fullgraph=True)(x, y)
    torch.compile(fastlm.scaled_dot_product_attention, backend=backend, fullgraph=True)(q, q, q)
    assert "fastlm.cross_entropy" in graphs[0] and "fastlm.attention_forward" in graphs[1]


def test_errors_are_worded_as_for_larger_calls():
    x, y = logits(4, 8)
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(IndexError, match="^fastlm.cross_entropy: target 8 is out of bounds for 8 classes"):
        fastlm.cross_entropy(x, y.new_tensor([1, 2, 8, 0]))
    with pytest.raises(
        ValueError, match="^fastlm.cross_entropy: Expected input batch_size .*: target has shape"
    ):
        fastlm.cross_entropy(x, y[:3])
    with pytest.raises(ValueError, match="^fastlm.cross_entropy: reduction is 'nothing'"):
        fastlm.cross_entropy(x, y, reduction="nothing")
    with pytest.raises(RuntimeError, match="^fastlm.cross_entropy: input has dtype"):
        fastlm.cross_entropy(x.long(), y)
    with pytest.raises(ValueError, match="^fastlm.scaled_dot_product_attention: value has 7 rows"):
        fastlm.scaled_dot_product_attention(q, q, q[:, :, 1:])
    with pytest.raises(TypeError, match="^fastlm.scaled_dot_product_attention: key is torch.float64"):
        fastlm.scaled_dot_product_attention(q, q.double(), q)


def test_forward_mode_and_function_transforms(served):
    q = torch.randn(1, 2, 3, 4)
    _, tangent = torch.func.jvp(lambda q: fastlm.scaled_dot_product_attention(q, q, q), (q,), (q,))
    assert tangent.shape == q.shape
    x, y = logits(4, 8)
    x = x.detach()
    jacobian = torch.func.jacfwd(lambda x: fastlm.cross_entropy(x, y))(x)
    x.requires_grad_()
    torch.testing.assert_close(jacobian, torch.autograd.grad(fastlm.cross_entropy(x, y), x)[0])
