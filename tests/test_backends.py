"""The choice of a family of kernels by operator, shape and dtype, as on a GPU that has two of them: here the CUDA
kernels in a model of a GPU and the Triton kernels in the interpreter, both on CPU tensors."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fastlm
import fastlm.triton
import tests.simt
from fastlm import ops, reference
from fastlm.ops import always

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        not fastlm.triton.INTERPRETING, reason="on a GPU both families are there, forced one by one"
    ),
]
sdpa = fastlm.scaled_dot_product_attention
BOTH = (("cuda-host", always), ("triton", always))


class Calls(list):
    """Names of the operators that run, each with its family."""

    def __init__(self, monkeypatch):
        def kernel(backend, operator):
            self.append((backend, operator))
            return choice(backend, operator)

        choice = ops.kernel
        for module in (ops.attention, ops.cross_entropy, ops.gru):
            monkeypatch.setattr(module, "kernel", kernel)


@pytest.fixture
def both(monkeypatch):
    """The table of a GPU for CPU tensors."""
    assert tests.simt.missing() is None
    rules = dict.fromkeys(ops.ON_GPU, BOTH)
    monkeypatch.setitem(ops._native, "cpu", rules)
    return rules


def heads(D, dtype=torch.float32):
    return [torch.randn(1, 2, 3, D, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize(
    "function, shape, dtype, backend",
    (
        ("scaled_dot_product_attention", (1, 2, 3, 256), torch.bfloat16, "cuda-host"),
        ("scaled_dot_product_attention", (1, 2, 3, 257), torch.bfloat16, "triton"),
        ("scaled_dot_product_attention", (1, 2, 3, 512), torch.float32, "triton"),
        ("scaled_dot_product_attention", (1, 2, 3, 513), torch.float32, "eager"),
        ("scaled_dot_product_attention", (1, 2, 3, 64), torch.float64, "eager"),
        ("varlen_attn", (3, 2, 320), torch.float16, "triton"),
        ("gru", (3, 2, 8), torch.float32, "cuda-host"),
        ("gru", (3, 2, 8), torch.float64, "triton"),
        ("gru_cell", (2, 8), torch.float64, "triton"),
        ("cross_entropy", (2, 8), torch.float64, "cuda-host"),
        ("linear_cross_entropy", (2, 8), torch.float8_e5m2, "eager"),
    ),
)
def test_the_first_that_has_a_kernel_serves(function, shape, dtype, backend, both):
    x = torch.empty(shape, dtype=dtype)
    assert ops.choose_backend(function, x) == ops.choose_backend(function, x, backward=True) == backend
    assert ops.choose_backend(function, x, "no kernel for this feature") == "eager"


def test_a_rule_by_shape(both):
    both["attention_forward"] = (("triton", lambda query: query.size(-2) == 1), *BOTH)
    chosen = [ops.choose_backend("scaled_dot_product_attention", torch.empty(1, 1, T, 8)) for T in (1, 2)]
    assert chosen == ["triton", "cuda-host"]


@pytest.mark.parametrize("D, backend", ((64, "cuda-host"), (264, "triton")))
def test_forward_and_backward(D, backend, both, monkeypatch):
    calls = Calls(monkeypatch)
    inputs = heads(D)
    out = sdpa(*inputs, is_causal=True)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert calls == [(backend, "attention_forward"), (backend, "attention_backward")]
    expected = reference.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs))


def test_the_larger_head_size_counts(both, monkeypatch):
    calls = Calls(monkeypatch)
    q, k, _ = heads(8)
    _, _, v = heads(264)
    out = sdpa(q, k, v)
    assert calls == [("triton", "attention_forward")]
    torch.testing.assert_close(out, reference.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", ("cuda-host", "triton", "eager"))
def test_backward_by_another_family(backend, both, monkeypatch):
    """What one keeps, the other reads; in the table or by force."""
    calls = Calls(monkeypatch)
    inputs = heads(8)
    out = sdpa(*inputs, is_causal=True)
    if backend == "eager":
        with fastlm.use_backend("eager"):
            gradients = torch.autograd.grad(out.sum(), inputs)
        assert calls == [("cuda-host", "attention_forward")]
    else:
        both["attention_backward"] = ((backend, always),)
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert calls == [("cuda-host", "attention_forward"), (backend, "attention_backward")]
    expected = reference.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs))


def test_compiled(both):
    """A graph holds the operators of the families that serve its shapes, forward and backward."""
    names = []

    def note(graph, inputs):
        names.append({str(node.target) for node in graph.graph.nodes if "fastlm" in str(node.target)})
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: sdpa(q, k, v).sin(), fullgraph=True, dynamic=False,
        backend=aot_autograd(fw_compiler=note, bw_compiler=note),
    )  # fmt: skip
    for D, namespace in ((16, "fastlm_cuda_host"), (264, "fastlm_triton")):
        inputs = heads(D)
        names.clear()
        out = compiled(*inputs)
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert names == [{f"{namespace}.attention_{way}.default"} for way in ("forward", "backward")]
        expected = reference.scaled_dot_product_attention(*inputs).sin()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs))


def test_exported(both):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return sdpa(q, k, v)

    inputs = [x.detach() for x in heads(264)]
    program = torch.export.export(Attention(), tuple(inputs))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "fastlm_triton.attention_forward.default" in targets
    torch.testing.assert_close(program.module()(*inputs), sdpa(*inputs))


# ---- nothing on the way waits for the device -----------------------------------------------


@pytest.mark.parametrize("backend", ("cuda-host", "triton"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("linear", (False, True), ids=("logits", "linear"))
def test_gradients_of_the_forward_are_scaled_by_a_kernel(backend, dtype, linear, monkeypatch):
    """By the upstream gradient that the device holds; in any layout."""
    target = torch.arange(5)
    if linear:
        inputs = [torch.randn(n, 7, dtype=dtype, requires_grad=True) for n in (5, 9)]
    else:
        inputs = [torch.randn(11, 5, dtype=dtype).t().requires_grad_()]

    def gradients(factor):
        function = fastlm.linear_cross_entropy if linear else fastlm.cross_entropy
        return torch.autograd.grad(function(*inputs, target) * factor, inputs)

    with fastlm.use_backend(backend), monkeypatch.context() as patch:
        calls = Calls(patch)
        patch.setattr(torch.Tensor, "item", None)
        once, scaled = gradients(1.0), gradients(-2.5)
    assert calls.count((backend, "scale_")) == 2
    for a, b in zip(once, scaled, strict=True):
        assert a.any() and torch.equal((a.double() * -2.5).to(dtype), b)


@pytest.mark.parametrize("backend", ("cuda-host", "triton"))
def test_of_any_size(backend):
    """Around vectors and blocks."""
    with fastlm.use_backend(backend):
        scale = ops.kernel(backend, "scale_")
        for n in (0, 1, 3, 4, 5, 1023, 2049, 70001):
            x = torch.randn(n)
            expected = [x * 3, x * 2]
            factor = torch.tensor(3.0)
            parts = [x.clone(), x.clone()]
            scale(parts[:1], factor)
            scale(parts[1:], torch.tensor(2, dtype=torch.bfloat16))
            torch.testing.assert_close(parts, expected)
