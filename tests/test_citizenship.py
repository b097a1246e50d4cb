"""fastlm among PyTorch's machinery: autocast, transforms, compilation, export, copies, workers."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from cases import OPERATORS, eager_linear_cross_entropy
from harness import check_autocast, cotangents_for, differentiable, run, tensors_of
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fastlm
import fastlm.nn

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
DROP_INS = {
    f"{operator.name}-{case.id}": (operator, case)
    for operator in OPERATORS.values()
    if operator.eager is not None
    for case in operator.cases
    if case.eager and not case.random and torch.float32 in case.dtypes
}
every_drop_in = pytest.mark.parametrize("operator, case", DROP_INS.values(), ids=DROP_INS)


def sample(operator, dtype=torch.float32):
    """An ordinary case's function of no arguments but its leaves."""
    case = next(case for case in operator.cases if not case.random and dtype in case.dtypes)
    return case.build(dtype, 0)


def call(operator, arguments):
    return tensors_of(operator.function(*arguments[0], **arguments[1]))


# ---- autocast ------------------------------------------------------------------------------


@pytest.mark.parametrize("to", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@every_drop_in
def test_autocast_as_eager(operator, case, to):
    """Output dtypes, and values as exact as eager's; gradients come in the inputs' dtype."""
    check_autocast(operator, case, to, torch.device("cpu"))


@every_operator
def test_autocast_disabled_inside(operator):
    arguments = sample(operator)
    expected = call(operator, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        outputs = call(operator, arguments)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


# ---- function transforms -------------------------------------------------------------------


def attention(q, k, v):
    return fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)


def loss(x, t):
    return fastlm.cross_entropy(x, t, label_smoothing=0.1)


def linear_loss(x, w, t):
    return fastlm.linear_cross_entropy(x, w, t)


def gru(x, h, *weights):
    return fastlm.gru(x, h, list(weights), True, 1, 0.0, True, False, False)[0]


def gru_cell(x, h, *weights):
    return fastlm.gru_cell(x, h, *weights)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def weights(width=2, hidden=3):
    return draw(3 * hidden, width), draw(3 * hidden, hidden), draw(3 * hidden), draw(3 * hidden)


def eager_gru(x, h, *weights):
    return torch.gru(x, h, list(weights), True, 1, 0.0, True, False, False)[0]


# name: (ours, torch's, floating arguments, the rest)
FUNCTIONS = {
    "scaled_dot_product_attention": (
        attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: (draw(2, 3, 2), draw(2, 3, 2), draw(2, 3, 2)),
        lambda: (),
    ),
    "cross_entropy": (
        loss,
        lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
        lambda: (draw(4, 5),),
        lambda: (torch.tensor([0, 4, -100, 2]),),
    ),
    "linear_cross_entropy": (
        linear_loss,
        eager_linear_cross_entropy,
        lambda: (draw(3, 2), draw(5, 2)),
        lambda: (torch.tensor([0, 4, 1]),),
    ),
    "gru": (gru, eager_gru, lambda: (draw(2, 2, 2), draw(1, 2, 3), *weights()), lambda: ()),
    "gru_cell": (
        gru_cell,
        torch.gru_cell,
        lambda: (draw(2, 2), draw(2, 3), *weights()),
        lambda: (),
    ),
}
every_function = pytest.mark.parametrize("ours, eager, floats, rest", FUNCTIONS.values(), ids=FUNCTIONS)


def close(function, rest):
    return lambda *values: function(*values, *rest)


@every_function
def test_vmap(ours, eager, floats, rest):
    """Over a batch of every argument, and over a batch of the first alone."""
    batch = [floats() for _ in range(3)]
    given = rest()
    function = close(ours, given)
    expected = torch.stack([function(*values) for values in batch])
    stacked = tuple(torch.stack(values) for values in zip(*batch, strict=True))
    torch.testing.assert_close(torch.func.vmap(function)(*stacked), expected)
    dims = (0, *(None for _ in stacked[1:]))
    expected = torch.stack([function(values[0], *batch[0][1:]) for values in batch])
    actual = torch.func.vmap(function, in_dims=dims)(stacked[0], *batch[0][1:])
    torch.testing.assert_close(actual, expected)


@every_function
def test_per_sample_gradients(ours, eager, floats, rest):
    batch = [floats() for _ in range(3)]
    stacked = tuple(torch.stack(values) for values in zip(*batch, strict=True))
    given = rest()

    def gradients(function):
        scalar = close(function, given)
        return torch.func.vmap(torch.func.grad(lambda *v: scalar(*v).sin().sum()))(*stacked)

    torch.testing.assert_close(gradients(ours), gradients(eager))


@every_function
@pytest.mark.parametrize("transform", ("jacrev", "jacfwd", "hessian", "jvp", "vjp", "linearize"))
def test_derivative_transforms(ours, eager, floats, rest, transform):
    values, given = floats(), rest()
    tangents = tuple(torch.randn_like(x) for x in values)

    def apply(function):
        function = close(function, given)
        if transform == "jvp":
            return torch.func.jvp(function, values, tangents)
        if transform == "vjp":
            output, pull = torch.func.vjp(function, *values)
            return output, pull(torch.cos(output))
        if transform == "linearize":
            output, push = torch.func.linearize(function, *values)
            return output, push(*tangents)
        if transform == "hessian":
            return torch.func.hessian(lambda *v: function(*v).sin().sum())(*values)
        return getattr(torch.func, transform)(function, argnums=tuple(range(len(values))))(*values)

    torch.testing.assert_close(apply(ours), apply(eager))


@every_function
@pytest.mark.parametrize("whole", (False, True), ids=("of an eager forward", "of a compiled step"))
def test_compiled_autograd(ours, eager, floats, rest, whole):
    """torch traces the backward with gradients enabled, as where a graph of it is wanted."""
    torch._dynamo.reset()
    values, given = [x.requires_grad_() for x in floats()], rest()
    expected = torch.autograd.grad(close(eager, given)(*values).sin().sum(), values)

    def step():
        close(ours, given)(*values).sin().sum().backward()

    if whole:
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(step, backend="aot_eager")()
    else:
        output = close(ours, given)(*values).sin().sum()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            output.backward()
    torch.testing.assert_close([x.grad for x in values], list(expected))


@every_function
def test_dual_numbers(ours, eager, floats, rest):
    values, given = floats(), rest()
    tangents = tuple(torch.randn_like(x) for x in values)
    results = []
    for function in (ours, eager):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(values, tangents, strict=True)]
            results.append(tuple(forward_ad.unpack_dual(function(*duals, *given))))
    torch.testing.assert_close(*results)


@every_function
def test_third_derivative(ours, eager, floats, rest):
    values, given = floats(), rest()

    def third(function):
        leaves = [x.clone().requires_grad_() for x in values]
        y = function(*leaves, *given).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(y, leaves, create_graph=True, materialize_grads=True)
            y = sum(g.square().sum() for g in grads)
        return y

    torch.testing.assert_close(third(ours), third(eager))


@every_function
def test_functional_call_and_jacobian_of_autograd(ours, eager, floats, rest):
    values, given = floats(), rest()
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(close(ours, given), values), jacobian(close(eager, given), values))
    # vectorize=True differentiates once with a batched cotangent: a vmap over our backward.
    torch.testing.assert_close(
        jacobian(close(ours, given), values, vectorize=True), jacobian(close(eager, given), values)
    )


@every_function
def test_gradients_of_a_batch_of_cotangents_hold_no_graph(ours, eager, floats, rest):
    leaves = [x.requires_grad_() for x in floats()]
    output = close(ours, rest())(*leaves)
    cotangents = torch.randn(3, *output.shape, dtype=output.dtype)
    options = dict(is_grads_batched=True, retain_graph=True)
    gradients = torch.autograd.grad(output, leaves, cotangents, **options)
    assert not any(g.requires_grad for g in gradients)
    for i in range(3):
        torch.testing.assert_close(
            [g[i] for g in gradients],
            list(torch.autograd.grad(output, leaves, cotangents[i], retain_graph=True)),
        )
    assert all(
        g.requires_grad for g in torch.autograd.grad(output, leaves, cotangents, create_graph=True, **options)
    )


# ---- autograd's habits ---------------------------------------------------------------------


@every_operator
def test_backward_twice_needs_retain_graph(operator):
    arguments = sample(operator)
    total = sum(x.sum() for x in call(operator, arguments) if x.requires_grad)
    inputs = differentiable(arguments)
    first = torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True, allow_unused=True)
    second = torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time|already been freed"):
        torch.autograd.grad(total, inputs, allow_unused=True)


@every_operator
def test_gradients_accumulate_and_hooks_run(operator):
    arguments = sample(operator)
    inputs = differentiable(arguments)
    seen = []
    handles = [x.register_hook(lambda g: seen.append(g.shape)) for x in inputs]
    for _ in range(2):
        sum(x.sum() for x in call(operator, arguments) if x.requires_grad).backward()
    once = torch.autograd.grad(
        sum(x.sum() for x in call(operator, arguments) if x.requires_grad),
        inputs,
        allow_unused=True,
    )
    for x, gradient in zip(inputs, once, strict=True):
        if gradient is not None:
            torch.testing.assert_close(x.grad, 2 * gradient)
            assert x.shape in seen
    for handle in handles:
        handle.remove()


@every_operator
def test_saved_input_modified_in_place(operator):
    """An error as in eager, or the gradient that was known already: never one of changed values."""
    arguments = sample(operator)
    _, expected, _ = run(operator.function, arguments, 0)
    leaves = differentiable(arguments)
    doubled = {id(x): x * 1 for x in leaves}
    args, kwargs = torch.utils._pytree.tree_map(lambda x: doubled.get(id(x), x), arguments)
    live = [x for x in tensors_of(operator.function(*args, **kwargs)) if x.requires_grad]
    cotangents = cotangents_for(live, 1)
    with torch.no_grad():
        for x in doubled.values():
            x.mul_(2)
    options = dict(allow_unused=True, materialize_grads=True)
    try:
        gradients = torch.autograd.grad(live, leaves, cotangents, **options)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(list(gradients), expected)


@every_operator
@pytest.mark.parametrize("reentrant", (False, True), ids=("by-hooks", "reentrant"))
def test_checkpointing(operator, reentrant):
    arguments = sample(operator)
    inputs = differentiable(arguments)

    def function(*values):
        places = {id(x): v for x, v in zip(inputs, values, strict=True)}
        args, kwargs = torch.utils._pytree.tree_map(lambda x: places.get(id(x), x), arguments)
        outputs = tensors_of(operator.function(*args, **kwargs))
        return sum(x.sum() for x in outputs if x.is_floating_point())

    options = dict(allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(function(*inputs), inputs, **options)
    if reentrant:  # works with .backward() only
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        checkpoint(lambda *v: function(*v), *leaves, use_reentrant=True).backward()
        actual = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    else:
        actual = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False), inputs, **options)
    torch.testing.assert_close(list(actual), list(expected))
    with torch.autograd.graph.save_on_cpu():
        offloaded = function(*inputs)
    torch.testing.assert_close(torch.autograd.grad(offloaded, inputs, **options), expected)


@every_operator
def test_anomaly_and_deterministic_modes(operator):
    arguments = sample(operator)
    _, expected, cotangents = run(operator.function, arguments, 0)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            _, gradients, _ = run(operator.function, arguments, 0, cotangents)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@every_operator
def test_default_dtype_does_not_matter(operator):
    expected = call(operator, sample(operator))
    torch.set_default_dtype(torch.float64)
    try:
        outputs = call(operator, sample(operator))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(outputs, expected, strict=True))


# ---- threads and processes -----------------------------------------------------------------


@every_operator
def test_python_threads_at_once(operator):
    """Concurrent calls, each with its own scratch, give the bits of a call alone."""
    expected = run(operator.function, sample(operator), 0)
    failures = []

    def work():
        for _ in range(5):
            outputs, gradients, _ = run(operator.function, sample(operator), 0, expected[2])
            for a, b in zip(outputs + gradients, expected[0] + expected[1], strict=True):
                if not torch.equal(a, b):
                    failures.append(operator.name)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_set_num_threads_holds():
    """With one thread, a large call starts none; with two, only torch's pool."""
    program = """
import os, sys, torch, fastlm
torch.set_num_threads(int(sys.argv[1]))
q = torch.randn(2, 4, 256, 32, requires_grad=True)
w = torch.randn(1000, 32, requires_grad=True)
gru = fastlm.nn.GRU(32, 64)
F = torch.nn.functional
torch.mm(torch.randn(512, 512), torch.randn(512, 512))
F.scaled_dot_product_attention(q, q, q).sum().backward()
before = len(os.listdir("/proc/self/task"))
fastlm.scaled_dot_product_attention(q, q, q).sum().backward()
fastlm.linear_cross_entropy(q[0, 0], w, torch.randint(0, 1000, (256,))).backward()
fastlm.cross_entropy(q[0, 0] @ w.T, torch.randint(0, 1000, (256,))).backward()
gru(q[0])[0].sum().backward()
assert len(os.listdir("/proc/self/task")) == before, "threads were started"
"""
    for threads in ("1", "2"):
        subprocess.run([sys.executable, "-c", program, threads], check=True)


class Losses(Dataset):
    """Computes in the worker process."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.manual_seed(i)
        q = torch.randn(1, 2, 65, 16, requires_grad=True)
        out = fastlm.scaled_dot_product_attention(q, q, q, is_causal=True)
        total = fastlm.cross_entropy(out.flatten(0, 2), torch.arange(130) % 16)
        total = total + fastlm.nn.GRU(16, 8)(q[0])[0].square().mean()
        total.backward()
        return total.detach(), q.grad


def test_dataloader_workers():
    """Forked after the parent has used the thread pool: results are the same, and none hangs."""
    dataset = Losses()
    expected = [dataset[i] for i in range(4)]
    for i, (value, gradient) in enumerate(DataLoader(dataset, batch_size=None, num_workers=2, timeout=120)):
        torch.testing.assert_close((value, gradient), expected[i])


# ---- modules -------------------------------------------------------------------------------


def sequence():
    return torch.randn(5, 2, 8)


def labels():
    return torch.tensor([0, 3])


# name: (constructor arguments, inputs)
MODULES = {
    "GRU": (
        (dict(input_size=8, hidden_size=4, num_layers=2, bidirectional=True)),
        lambda: (sequence(),),
    ),
    "GRUCell": (dict(input_size=8, hidden_size=4), lambda: (sequence()[0],)),
    "MultiheadAttention": (
        dict(embed_dim=8, num_heads=2),
        lambda: (*[sequence()] * 3, None, False),
    ),
    "CrossEntropyLoss": (
        dict(weight=torch.rand(8), ignore_index=3, label_smoothing=0.1),
        lambda: (sequence()[0], labels()),
    ),
    "LinearCrossEntropyLoss": (
        dict(in_features=8, num_classes=9, bias=True),
        lambda: (sequence()[0], labels()),
    ),
}
every_module = pytest.mark.parametrize("name", MODULES)


def make(name, home=fastlm.nn):
    if not hasattr(home, name):
        pytest.skip(f"torch {torch.__version__} has no nn.{name}")
    options, inputs = MODULES[name]
    torch.manual_seed(0)
    return getattr(home, name)(**options), inputs()


def first(result):
    return tensors_of(result)[0]


@every_module
def test_is_the_torch_module(name):
    ours, _ = make(name)
    theirs, _ = make(name, nn)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))  # same init
    missing = {key for key in vars(theirs) if key not in vars(ours)}
    assert not missing, f"attributes that torch's has: {missing}"


@every_module
def test_state_dict_both_ways(name):
    ours, inputs = make(name)
    theirs, _ = make(name, nn)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(first(ours(*inputs)), first(theirs(*inputs)))
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    torch.testing.assert_close(first(ours(*inputs)), first(theirs(*inputs)))


@every_module
def test_copies_and_pickles(name):
    module, inputs = make(name)
    module.eval()
    expected = first(module(*inputs))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        loaded,
    ):
        assert type(twin) is type(module) and repr(twin) == repr(module)
        assert torch.equal(first(twin(*inputs)), expected)
    for twin in (copy.deepcopy(module), loaded):
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}


@every_module
def test_moves_between_dtypes_and_devices(name):
    module, inputs = make(name)
    wide = module.double()
    doubled = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    assert first(wide(*doubled)).dtype == torch.float64
    meta = make(name)[0].to("meta")
    inputs = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs]
    assert first(meta(*inputs)).device.type == "meta"


@every_module
def test_functional_call_with_gradients(name):
    module, inputs = make(name)
    parameters = {key: p.detach().clone() for key, p in module.named_parameters()}
    if not parameters:
        pytest.skip("no parameters")

    def total(values):
        return first(torch.func.functional_call(module, values, inputs)).square().sum()

    gradients = torch.func.grad(total)(parameters)
    first(module(*inputs)).square().sum().backward()
    for key, p in module.named_parameters():
        torch.testing.assert_close(gradients[key], p.grad)


@every_module
def test_export(name):
    """torch.export gives a program whose values and state_dict keys are the module's."""
    module, inputs = make(name)
    module.eval()
    exported = torch.export.export(module, inputs)
    torch.testing.assert_close(first(exported.module()(*inputs)), first(module(*inputs)))
    assert set(exported.state_dict) == set(module.state_dict())


@every_module
def test_compiles_whole_and_dynamic(name):
    """One graph for all lengths: values and gradients as in eager mode."""
    module, inputs = make(name)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")

    def lengthen(x, times):
        return torch.cat([x] * times) if isinstance(x, torch.Tensor) else x

    with torch.compiler.set_stance("default"):
        for times in (1, 2, 3):
            longer = [lengthen(x, times) for x in inputs]
            leaves = [
                x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in longer
            ]
            if name == "MultiheadAttention":
                leaves[0] = leaves[1] = leaves[2]
            floats = [*differentiable(leaves), *module.parameters()]
            results = []
            for function in (compiled, module):
                output = first(function(*leaves))
                results.append([output, *torch.autograd.grad(output.square().sum(), floats)])
            torch.testing.assert_close(*results)


def test_counted_operations():
    """Those of PyTorch's products; attention's backward computes the scores again, as PyTorch's fused one."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(function, *arguments, backward=False, **options):
        with FlopCounterMode(display=False) as counter:
            output = tensors_of(function(*arguments, **options))[0]
            if backward:
                output.sum().backward()
        return counter.get_total_flops()

    q, k = torch.randn(2, 4, 70, 32, requires_grad=True), torch.randn(2, 2, 90, 32, requires_grad=True)
    gqa = dict(enable_gqa=True)
    products = count(fastlm.reference.scaled_dot_product_attention, q, k, k, **gqa)
    assert count(fastlm.scaled_dot_product_attention, q, k, k, **gqa) == products > 0
    assert count(fastlm.scaled_dot_product_attention, q, k, k, backward=True, **gqa) == 3.5 * products
    ends, x = torch.tensor([0, 3, 10], dtype=torch.int32), torch.randn(10, 2, 8, requires_grad=True)
    products = count(fastlm.reference.varlen_attn, x, x, x, ends, ends, 7, 7)
    assert count(fastlm.varlen_attn, x, x, x, ends, ends, 7, 7) == products > 0
    assert count(fastlm.varlen_attn, x, x, x, ends, ends, 7, 7, backward=True) == 3.5 * products

    options, x = dict(num_layers=2, bidirectional=True), torch.randn(9, 4, 16, requires_grad=True)
    ours, theirs = fastlm.nn.GRU(16, 24, **options), nn.GRU(16, 24, **options)
    assert count(ours, x) == count(theirs, x) > 0
    first_states = 2 * 2 * 2 * 4 * 72 * 24  # zeros: PyTorch differentiates only what asks for it
    assert count(ours, x, backward=True) == count(theirs, x, backward=True) + first_states

    hidden = torch.randn(200, 64, requires_grad=True), torch.randn(500, 64, requires_grad=True)
    target = torch.arange(200)
    for reduction in ("mean", "none"):
        products = count(eager_linear_cross_entropy, *hidden, target, backward=True, reduction=reduction)
        again = products / 3 if reduction == "none" else 0  # the logits
        found = count(fastlm.linear_cross_entropy, *hidden, target, backward=True, reduction=reduction)
        assert found == products + again


class Everything(nn.Module):
    """All modules, one behind the other."""

    def __init__(self):
        super().__init__()
        self.gru, self.cell = fastlm.nn.GRU(8, 8, 2, dropout=0.5), fastlm.nn.GRUCell(8, 8)
        self.attention = fastlm.nn.MultiheadAttention(8, 2)
        self.linear, self.loss = fastlm.nn.Linear(8, 9), fastlm.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: torch.Tensor, target: torch.Tensor):
        y = self.gru(x)[0]
        y = self.attention(y, y, y, need_weights=False)[0].flatten(0, 1)
        return self.loss(self.linear(self.cell(y)), target)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ("trace", "script"))
def test_torchscript(how):
    """A graph of torch's operators alone: stored, and of another length when it runs."""
    model = Everything().eval()
    x, target = torch.randn(5, 3, 8), torch.arange(15) % 9
    longer, more = torch.randn(7, 3, 8), torch.arange(21) % 9
    expected = model(longer, more)
    graph = torch.jit.trace(model, (x, target)) if how == "trace" else torch.jit.script(model)
    stored = io.BytesIO()
    torch.jit.save(graph, stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    torch.testing.assert_close(loaded(longer, more), expected)
    graph = loaded.inlined_graph
    assert graph.findNode("aten::gru") is not None
    assert not any(node.kind().startswith("fastlm") for node in graph.nodes())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_has_none_of_our_options():
    with pytest.raises(RuntimeError, match="fastlm.nn.GRU: .* has no zoneout"):
        torch.jit.script(nn.Sequential(fastlm.nn.GRU(3, 4, zoneout=0.1)))


def test_compiled_gru_with_packed_sequences():
    module = fastlm.nn.GRU(8, 4, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 8) for n in (5, 3, 1)])
    expected, hidden = module(packed)
    torch.compiler.reset()
    actual, compiled_hidden = torch.compile(module, fullgraph=True, backend="aot_eager")(packed)
    torch.testing.assert_close(actual.data, expected.data)
    torch.testing.assert_close(compiled_hidden, hidden)


def test_compiled_training_step_with_inductor():
    """A GRU, attention and a loss in one graph, against the same step in eager mode."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = fastlm.nn.GRU(8, 8, batch_first=True)
            self.attention = fastlm.nn.MultiheadAttention(8, 2, batch_first=True)
            self.loss = fastlm.nn.LinearCrossEntropyLoss(8, 11)

        def forward(self, x, target):
            y, _ = self.gru(x)
            y = y + self.attention(y, y, y, need_weights=False)[0]
            return self.loss(y.flatten(0, 1), target)

    torch.manual_seed(0)
    model = Model()
    x, target = torch.randn(2, 5, 8), torch.randint(0, 11, (10,))
    expected = torch.autograd.grad(model(x, target), list(model.parameters()))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    actual = torch.autograd.grad(compiled(x, target), list(model.parameters()))
    torch.testing.assert_close(actual, expected)


# ---- backends ------------------------------------------------------------------------------


@every_operator
def test_eager_backend_agrees_and_under_install_does_not_recurse(operator):
    """The reference calls torch's functions, never what install() puts in their place."""
    arguments = sample(operator)
    expected = call(operator, arguments)
    with fastlm.installed(), fastlm.use_backend("eager"):
        outputs = call(operator, arguments)
    torch.testing.assert_close(outputs, expected)
