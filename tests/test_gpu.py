"""The families for GPUs among PyTorch's machinery: registration, compilation, autocast, streams, graphs, devices.

Where there is no GPU, what needs none runs on the CUDA kernels in a model of a GPU and in Triton's interpreter.
"""

import pytest
import torch
from cases import OPERATORS
from harness import (
    bits,
    check_autocast,
    check_compiled,
    differentiable,
    map_tensors,
    on_device,
    run,
    tensors_of,
)
from test_operators import check_registration, recorded_calls

import fastlm

# Logarithms of 0 are meant; numpy, which interprets Triton, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


@pytest.fixture(params=("cuda_device", "triton_device", "cuda_host"))
def device(request):
    """Runs the test on a family; gives the device that it takes tensors of."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=("cuda_device", "triton_device"))
def gpu(request):
    """As `device`, where it is a GPU."""
    device = request.getfixturevalue(request.param)
    if device.type != "cuda":
        pytest.skip("Triton is interpreted on the CPU here")
    return device


def ordinary(operator, dtype=torch.float32):
    return next(case for case in operator.cases if not case.random and dtype in case.dtypes)


def sample(operator, device, dtype=torch.float32):
    return on_device(operator, ordinary(operator, dtype).build(dtype, 0), device)


@every_operator
def test_registration(operator, device):
    check_registration(recorded_calls(operator, sample(operator, device)))


@every_operator
def test_compiles_whole(operator, device):
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    check_compiled(operator, sample(operator, device), backend)


# In float16: cuDNN's GRU takes no other type under autocast.
@every_operator
def test_autocast_as_eager(operator, device):
    if operator.eager is None:
        pytest.skip("torch has no such function")
    check_autocast(operator, ordinary(operator), torch.float16, device)


# ---- on a GPU ------------------------------------------------------------------------------


def size(arguments):
    return sum(x.numel() for x in tensors_of(arguments))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@every_operator
def test_same_bits_again(operator, dtype, gpu):
    """On the largest case."""
    cases = [case for case in operator.cases if dtype in case.dtypes and not case.random]
    same_bits_again(operator, max(cases, key=lambda case: size(case.build(dtype, 0))), dtype, gpu)


def same_bits_again(operator, case, dtype, device):
    results = []
    for _ in range(3):
        outputs, gradients, _ = run(operator.function, on_device(operator, case.build(dtype, 0), device), 0)
        results.append(outputs + gradients)
    for again in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], again, strict=True))


def set_values(arguments, values):
    """Floating tensors take the values of others."""
    with torch.no_grad():
        for x, y in zip(tensors_of(arguments), tensors_of(values), strict=True):
            if x.is_floating_point():
                x.copy_(y)


def hidden(arguments):
    """Copies, with zeros for values."""
    return map_tensors(lambda x: torch.zeros_like(x) if x.is_floating_point() else x.clone(), arguments)


@every_operator
def test_runs_on_the_current_stream(operator, gpu):
    """It waits for what that stream computes: on another one the kernels would read zeros."""
    arguments = sample(operator, gpu)
    outputs, gradients, cotangents = run(operator.function, arguments, 0)
    late, stream = hidden(arguments), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        set_values(late, arguments)
        results, late_gradients, _ = run(operator.function, late, 0, cotangents)
    torch.cuda.synchronize()
    torch.testing.assert_close(results + late_gradients, outputs + gradients, rtol=0, atol=0)


def step(operator, arguments, cotangents):
    """Outputs and gradients, and nothing besides that a graph could not capture."""
    args, kwargs = arguments
    outputs = tensors_of(operator.function(*args, **kwargs))
    live, inputs = [x for x in outputs if x.requires_grad], differentiable(arguments)
    gradients = torch.autograd.grad(live, inputs, cotangents, allow_unused=True, materialize_grads=True)
    return *(x.detach() for x in outputs), *gradients


@every_operator
def test_runs_in_a_graph(operator, gpu):
    """Forward and backward, captured on zeros and replayed on other values, give what direct calls give."""
    arguments = sample(operator, gpu)
    *_, cotangents = run(operator.function, arguments, 0)
    static, stream, graph = hidden(arguments), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes the libraries' workspaces
        expected = step(operator, arguments, cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = step(operator, static, cotangents)
    set_values(static, arguments)
    graph.replay()
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_packed_gru_in_a_graph(gpu, request):
    """The CUDA kernels take the lengths as parameters. Triton's take copies from memory that isn't pinned,
    which torch refuses to capture."""
    gru = fastlm.nn.GRU(5, 6, device=gpu).requires_grad_(False)
    x = torch.randn(7, 3, 5, device=gpu)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4, 1]))
    expected = gru(packed)[0].data
    graph = torch.cuda.CUDAGraph()
    if request.node.callspec.params["gpu"] == "triton_device":
        with pytest.raises(RuntimeError, match="pinned"), torch.cuda.graph(graph):
            gru(packed)
        return
    with torch.cuda.graph(graph):
        out = gru(packed)[0].data
    graph.replay()
    assert torch.equal(out, expected)


@every_operator
def test_on_a_device_that_is_not_the_current_one(operator, gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    outputs, gradients, cotangents = run(operator.function, sample(operator, gpu), 0)
    other = sample(operator, torch.device("cuda", 1))
    cotangents = [x.to("cuda:1") for x in cotangents]
    results, other_gradients, _ = run(operator.function, other, 0, cotangents)
    assert all(x.device.index == 1 for x in results + other_gradients)
    expected = [x.to("cuda:1") for x in outputs + gradients]
    torch.testing.assert_close(results + other_gradients, expected)


@pytest.fixture(scope="module")
def store():
    """Memory of which no page is touched costs none; two arguments can lie in it side by side."""
    return {}


def far(store, x, dim, offset=0):
    """x in memory where the last of dimension `dim` lies 2**31 elements or more from the first."""
    size = 2**31 + 2**16
    key = x.dtype, x.device
    if key not in store:
        if x.is_cuda and torch.cuda.mem_get_info()[0] < size * x.element_size():
            pytest.skip("needs 4 GiB of the GPU's memory")
        store[key] = torch.empty(size, dtype=x.dtype, device=x.device)
    strides = [2 * s for s in x.contiguous().stride()[:-1]] + [1]
    strides[dim] = -(-(2**31) // (x.shape[dim] - 1) // 8) * 8
    return store[key].as_strided(x.shape, strides, offset).copy_(x).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dim", (0, 1, 2), ids=("batch", "heads", "rows"))
def test_attention_offsets_beyond_32_bits(dim, store, device):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device=device, requires_grad=True)

    near = draw(2, 2, 3, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8), draw(2, 2, 3, 5)
    results = []
    for tensors in (
        near,
        [far(store, x.detach(), dim, 1024 * i).requires_grad_() for i, x in enumerate(near)],
    ):
        q, k, v, mask = tensors
        out = fastlm.scaled_dot_product_attention(q, k, v, mask)
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", (0, 1), ids=("pages", "rows"))
def test_page_offsets_beyond_32_bits(dim, store, device):
    k, v = torch.randn(2, 4, 4, 1, 8, dtype=torch.bfloat16, device=device)
    q = torch.randn(2, 1, 8, dtype=torch.bfloat16, device=device)
    at, used, table = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [7, 8], [[3, 0], [1, 2]])
    )
    results = [
        fastlm.varlen_attn(q, *pool, at, None, 1, 8, seqused_k=used, block_table=table)
        for pool in ((k, v), (far(store, k, dim), far(store, v, dim, 1024)))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("dim", (0, 1), ids=("tokens", "classes"))
def test_class_offsets_beyond_32_bits(dim, store, device):
    x, target = torch.randn(3, 5, dtype=torch.bfloat16, device=device), torch.tensor([1, 4, 0], device=device)
    results = []
    for one in (x.requires_grad_(), far(store, x.detach(), dim).requires_grad_()):
        loss = fastlm.cross_entropy(one, target, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, one)))
    torch.testing.assert_close(*results)


def test_logits_beyond_32_bits(gpu):
    V = 2**17 + 8
    N = 2**31 // V + 2
    need = 3 * 2 * N * V
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of the GPU's memory")
    last_rows(N, V, gpu)


def last_rows(N, V, device):
    """The last of many rows have the loss and the gradient that they have alone."""
    x = torch.randn(N, V, device=device, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(V, (N,), device=device)
    loss = fastlm.cross_entropy(x, target, reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    alone = x[-3:].detach().clone().requires_grad_()
    expected = fastlm.cross_entropy(alone, target[-3:], reduction="none")
    torch.testing.assert_close(loss[-3:], expected)
    torch.testing.assert_close(dx[-3:], *torch.autograd.grad(expected.sum(), alone))
