"""fastlm.linear and fastlm.nn.Linear: each way of each product, the choice among them, and drop-in manners."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FEW_LAYOUTS, FEW_SHAPES, LINEAR, Draw, few_inputs
from harness import bits, compare, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm import tuned
from fastlm.ops import linear as ops_linear
from fastlm.ops import products

LOW = (torch.bfloat16, torch.float16)
every_case = pytest.mark.parametrize("case", LINEAR.cases, ids=lambda case: case.id)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def go(monkeypatch, way, dtype):
    """Takes a way for everything from here on."""
    if way not in products._candidates(dtype) and not (way, dtype) == ("float32", torch.float32):
        pytest.skip(f"torch has no {name_of(dtype)} product by {way} on this CPU")
    force(monkeypatch, way)


def force(monkeypatch, way):
    forget(monkeypatch)
    monkeypatch.setattr(products, "forced", way)


def forget(monkeypatch):
    """As another process starts."""
    monkeypatch.setattr(products, "_chosen", {})
    monkeypatch.setattr(ops_linear, "_known", {})


def taken(monkeypatch):
    """The ways of all products from here on, as a list that grows."""
    ways = []

    def spy(way, product):
        def call(*args, **kwargs):
            ways.append(way)
            return product(*args, **kwargs)

        return call

    spies = {way: spy(way, product) for way, product in products.PRODUCTS.items()}
    monkeypatch.setattr(products, "PRODUCTS", spies)
    return ways


# ---- values --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("way", products.WAYS)
@every_case
def test_matches_reference(case, way, dtype, monkeypatch):
    if dtype in products.DTYPES:
        go(monkeypatch, way, dtype)
    compare(LINEAR, case, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("shape", ((50, 3, 4), (3, 50, 4), (3, 4, 50)), ids=str)
def test_matrices_too_large_to_convert_at_once(shape, dtype, monkeypatch):
    """In pieces of the longest dimension: rows, inner, columns."""
    monkeypatch.setattr(products, "_BLOCK", 40)
    m, k, n = shape
    draw = Draw(dtype, 0)
    a, b, bias = draw(m, k, grad=False), draw(k, n, grad=False), draw(n, grad=False)
    for given in (None, bias):
        expected = a.float() @ b.float() + (0 if given is None else given.float())
        actual = products.PRODUCTS["float32"](a, b, given, dtype)
        torch.testing.assert_close(actual, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("way", products.WAYS)
@pytest.mark.parametrize("by_columns", (False, True), ids=("rows", "columns"))
def test_incoming_gradients_of_any_layout(by_columns, way, monkeypatch):
    go(monkeypatch, way, torch.float32)
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(8, 16)
    w = (w.t().contiguous().t() if by_columns else w).requires_grad_()
    dy = torch.randn(6, 8)
    for layout in ("strided", "transposed", "expanded", "offset"):
        laid = Draw.lay(dy, layout)
        actual = torch.autograd.grad(fastlm.linear(x, w), (x, w), laid)
        expected = torch.autograd.grad(F.linear(x, w), (x, w), laid)
        torch.testing.assert_close(actual, expected)


def test_a_weight_by_columns_gets_such_a_gradient(monkeypatch):
    """Its transposed leaf then accumulates it without a copy."""
    go(monkeypatch, "onednn", torch.float32)
    leaf = torch.randn(16, 8, requires_grad=True)
    fastlm.linear(torch.randn(5, 16), leaf.t()).sum().backward()
    assert leaf.grad.is_contiguous()


# ---- autocast ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("way", products.WAYS)
@pytest.mark.parametrize("given", (torch.float32, torch.bfloat16), ids=name_of)
def test_autocast(given, way, dtype, monkeypatch):
    """Dtypes are F.linear's; errors at most twice its own, against the float32 operands."""
    go(monkeypatch, way, dtype)
    x, w, b = torch.randn(7, 33).to(given), torch.randn(20, 33) / 6, torch.randn(20)
    results = []
    for function, enabled in ((fastlm.linear, True), (F.linear, True), (F.linear, False)):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        operands = inputs if enabled else [t.float() for t in inputs]
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            y = function(*operands)
            gradients = torch.autograd.grad(y.float().square().sum(), inputs)  # inside autocast too
        results.append([y, *gradients])
    ours, eager, truth = results
    assert ours[0].dtype == dtype
    for a, e, t in zip(ours, eager, truth, strict=True):
        assert a.dtype == e.dtype
        assert (a - t).abs().max() <= 2 * (e - t).abs().max() + torch.finfo(dtype).eps * t.abs().max()


def test_autocast_refuses_what_eager_refuses(monkeypatch):
    force(monkeypatch, "float32")
    x, w = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(3, 8)
    for function in (F.linear, fastlm.linear):
        with pytest.raises(RuntimeError, match="dtype"):
            function(x, w)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
            function(x.double(), w)


# ---- derivatives and transforms ------------------------------------------------------------


@pytest.mark.parametrize("way", ("onednn", "float32"))
def test_second_derivatives(way, monkeypatch):
    dtype = torch.float32 if way == "onednn" else torch.bfloat16
    go(monkeypatch, way, dtype)
    draw = Draw(dtype, 0)
    inputs = draw(5, 16), draw(8, 16), draw(8)
    v = [draw(*x.shape, grad=False) for x in inputs]

    def second(function, *inputs):
        gradients = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(gradients, inputs, [x.to(inputs[0].dtype) for x in v])

    exact = second(F.linear, *[x.detach().double().requires_grad_() for x in inputs])
    for a, e, t in zip(second(fastlm.linear, *inputs), second(F.linear, *inputs), exact, strict=True):
        assert a.dtype == dtype
        assert (a - t).abs().max() <= 2 * (e - t).abs().max() + 4 * torch.finfo(dtype).eps * t.abs().max()


@pytest.mark.parametrize("way", ("onednn", "float32"))
def test_transforms(way, monkeypatch):
    """vmap, jvp, per-sample gradients, batched gradients, checkpointing."""
    force(monkeypatch, way)
    x, w, b = torch.randn(4, 6, 16), torch.randn(8, 16), torch.randn(8)
    t = torch.randn_like(x)
    for transform in (
        lambda f: torch.vmap(lambda x: f(x, w, b))(x),
        lambda f: torch.func.jvp(lambda x: f(x, w, b), (x,), (t,)),
        lambda f: torch.vmap(torch.func.grad(lambda w, x: f(x, w, b).sum()), (None, 0))(w, x),
    ):
        torch.testing.assert_close(transform(fastlm.linear), transform(F.linear))
    w.requires_grad_()
    dy = torch.randn(3, 4, 6, 8)
    for function in (fastlm.linear, F.linear):
        (batched,) = torch.autograd.grad(function(x, w, b), w, dy, is_grads_batched=True)
        torch.testing.assert_close(batched, torch.einsum("nbto,bti->noi", dy, x))
    y = torch.utils.checkpoint.checkpoint(fastlm.linear, x, w, b, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), w), torch.autograd.grad(F.linear(x, w, b).sum(), w)
    )


@pytest.mark.parametrize("way", products.WAYS)
def test_a_frozen_weight_saves_no_input(way, monkeypatch):
    go(monkeypatch, way, torch.float32)
    x = torch.randn(4, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fastlm.linear(x, torch.randn(8, 16))
    assert x.data_ptr() not in [t.data_ptr() for t in saved]
    y.sum().backward()
    assert x.grad is not None


# ---- calls that are F.linear's -------------------------------------------------------------


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("activation", (None, "silu"))
def test_compiles_and_exports_as_linear(activation, monkeypatch):
    force(monkeypatch, "onednn")
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def layer(x, w):
        return fastlm.linear(x, w, activation=activation)

    x, w = torch.randn(5, 16), torch.randn(8, 16)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, w), layer(x, w))
    assert sum("linear" in target for target in targets) == 1

    class Layer(torch.nn.Module):
        def forward(self, x, w):
            return layer(x, w)

    program = torch.export.export(Layer(), (x, w)).module()
    torch.testing.assert_close(program(x, w), layer(x, w))
    traced = torch.jit.trace(layer, (x, w))
    torch.testing.assert_close(traced(x, w), layer(x, w))


def test_compiles_for_any_number_of_tokens():
    """No guard on whether the product is large: one graph serves all."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(fastlm.linear, backend=backend, fullgraph=True, dynamic=True)
    w = torch.randn(64, 64)
    for tokens in (2, 5, 5000):
        torch.testing.assert_close(compiled(x := torch.randn(tokens, 64), w), F.linear(x, w))
    assert len(graphs) == 1


def test_what_is_no_plain_tensor_is_left_to_torch(monkeypatch):
    force(monkeypatch, "onednn")
    ways = taken(monkeypatch)
    x, w, b = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    assert torch.equal(fastlm.linear(x, w, b), F.linear(x, w, b)) or ways  # plain: ours
    assert ways == ["onednn"]
    ways.clear()
    assert type(fastlm.linear(x.as_subclass(Tagged), w, b)) is Tagged
    assert type(fastlm.linear(x, w.as_subclass(Tagged), b)) is Tagged
    assert fastlm.linear(x.to("meta"), w.to("meta")).is_meta
    with FakeTensorMode() as mode:
        assert fastlm.linear(mode.from_tensor(x), mode.from_tensor(w)).shape == (5, 8)
    torch.testing.assert_close(fastlm.linear(x.to_sparse(), w), F.linear(x, w))
    nested = torch.nested.nested_tensor([x, x[:3]])
    assert fastlm.linear(nested, w, b).is_nested
    torch.testing.assert_close(fastlm.linear(x, w[:, :1].expand(8, 16)), F.linear(x, w[:, :1].expand(8, 16)))
    torch.testing.assert_close(fastlm.linear(x, w, b[:1]), F.linear(x, w, b[:1]))
    with FlopCounterMode(display=False) as counter:
        fastlm.linear(x, w, b)
    assert counter.get_total_flops() == 2 * 5 * 8 * 16
    with fastlm.use_backend("eager"):
        assert torch.equal(fastlm.linear(x, w, b), F.linear(x, w, b))
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(fastlm.linear(x, w, b), F.linear(x, w, b))
    assert not ways


def test_deterministic_algorithms_and_reduced_precision_are_torchs(monkeypatch):
    force(monkeypatch, "onednn")
    ways = taken(monkeypatch)
    x, w = torch.randn(5, 16), torch.randn(8, 16)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(fastlm.linear(x, w), F.linear(x, w))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(fastlm.linear(x, w), F.linear(x, w))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not ways


@pytest.mark.parametrize("way", (None, *products.WAYS))
def test_errors_are_eagers(way, monkeypatch):
    force(monkeypatch, way)
    x, w, b = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    for arguments in (
        (x, w[:, 1:]),
        (x, w, b[1:]),
        (x, w.double()),
        (x, w, b.double()),
        (x, w[None]),
    ):
        with pytest.raises(RuntimeError) as theirs:
            F.linear(*arguments)
        with pytest.raises(RuntimeError) as mine:
            fastlm.linear(*arguments)
        assert str(mine.value) == str(theirs.value)
    for unknown in ("swish", ["relu"], torch.relu):
        with pytest.raises(ValueError, match="fastlm.linear: activation is .*, expected one of relu, gelu,"):
            fastlm.linear(x, w, activation=unknown)


# ---- choice --------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing chosen yet, and nothing too small."""
    monkeypatch.setattr(products, "forced", None)
    forget(monkeypatch)
    monkeypatch.setattr(ops_linear, "_SMALL", dict.fromkeys(products.DTYPES, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTLM_AUTOTUNE", raising=False)
    return tmp_path


def pretend(monkeypatch, seconds):
    """Replaces the clock: (way, product) -> seconds."""
    asked = []

    def samples(product, kind, shape, ways):
        asked.append((product, kind))
        return {way: (way, product) for way in ways}

    monkeypatch.setattr(products, "_samples", samples)
    monkeypatch.setattr(products, "_seconds", lambda call: seconds(*call))
    return asked


def test_each_product_goes_its_fastest_way(fresh, monkeypatch):
    best = {products.FORWARD: "onednn", products.INPUT: "float32", products.WEIGHT: "torch"}
    asked = pretend(monkeypatch, lambda way, product: 1.0 if best[product] == way else 2.0)
    monkeypatch.setattr(products, "_candidates", lambda dtype: products.WAYS)
    ways = taken(monkeypatch)
    x, w = torch.randn(5, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    for _ in range(2):
        fastlm.linear(x, w).sum().backward()
    assert ways == 2 * ["onednn", "float32", "torch"]
    assert [product for product, _ in asked] == [products.FORWARD, products.INPUT, products.WEIGHT]
    with torch.no_grad():
        fastlm.linear(torch.randn(6, 16), w)  # of the same kind
        assert len(asked) == 3
        fastlm.linear(torch.randn(9, 16), w)
        assert len(asked) == 4
    forget(monkeypatch)  # another process: reads the file
    fastlm.linear(x, w)
    assert len(asked) == 4
    (file,) = fresh.rglob("linear-*.jsonl")
    kept = [json.loads(line)[1] for line in file.read_text().splitlines() if line]
    assert sorted(kept) == ["float32", "onednn", "onednn", "torch"]


def test_of_two_programs_that_time_at_once_the_first_decides(fresh):
    def slower():
        assert tuned.choice("name", "key", ("a", "b"), lambda: "a") == "a"  # the other program
        return "b"

    assert tuned.choice("name", "key", ("a", "b"), slower) == "a"
    assert tuned.choice("name", "key", ("c", "d"), lambda: "c") == "c"  # what is no choice any more
    assert tuned.choice("name", "other", ("a", "b"), lambda: "b") == "b"


def test_a_narrow_win_or_a_failure_leaves_torchs(fresh, monkeypatch):
    def seconds(way, product):
        if way == "onednn":
            raise RuntimeError("could not create a primitive")
        return 1.0 if way == "torch" else 0.95

    pretend(monkeypatch, seconds)
    monkeypatch.setattr(products, "_candidates", lambda dtype: products.WAYS)
    kind = products.Kind(5, 16, 8, torch.bfloat16, torch.bfloat16, torch.bfloat16, True, 1)
    assert products.way(products.FORWARD, kind) == "torch"


def test_where_torch_is_fastest_nothing_stands_between(fresh, monkeypatch):
    pretend(monkeypatch, lambda way, product: 1.0 if way == "torch" else 2.0)
    x, w, b = torch.randn(5, 16), torch.randn(8, 16, requires_grad=True), torch.randn(8)
    y = fastlm.linear(x, w, b)
    assert y.grad_fn.name() == "AddmmBackward0" and torch.equal(y, F.linear(x, w, b))


def test_timing_leaves_generator_and_modes_alone(fresh):
    state = torch.get_rng_state()
    x, w = torch.randn(5, 16, dtype=torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    torch.set_rng_state(state)
    with torch.inference_mode():
        fastlm.linear(x, w)
    y = fastlm.linear(x.requires_grad_(), w)
    y.sum().backward()
    assert torch.equal(state, torch.get_rng_state())
    assert len(products._chosen) == 2 and set(products._chosen.values()) <= set(products.PRODUCTS)


def test_no_timing_on_request(fresh, monkeypatch):
    asked = pretend(monkeypatch, lambda way, product: 1.0)
    monkeypatch.setenv("FASTLM_AUTOTUNE", "0")
    x, w = torch.randn(5, 16), torch.randn(8, 16)
    assert torch.equal(fastlm.linear(x, w), F.linear(x, w)) and not asked


def test_small_products_and_other_dtypes_are_not_chosen_for(monkeypatch):
    monkeypatch.setattr(products, "forced", None)
    monkeypatch.setattr(products, "way", None)
    fastlm.linear(torch.randn(5, 16), torch.randn(8, 16))
    fastlm.linear(torch.randn(300, 300).double(), torch.randn(300, 300).double())


def test_sample_shapes_are_bounded():
    for sizes in ((1, 1, 1), (1024, 768, 2304), (1024, 768, 50257), (1, 4096, 128256), (1 << 20, 3, 3)):
        m, k, n = shape = products._sample_shape(*sizes)
        assert m * k * n <= 1 << 30 and max(m * k, k * n, m * n) <= 1 << 24
        assert all(1 <= sample <= max(1, size) * 1.5 for sample, size in zip(shape, sizes, strict=True))
    assert products._sample_shape(1, 768, 768) == [1, 768, 768]


def in_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )


def test_the_environment_names_a_way():
    code = "import fastlm; from fastlm.ops import products; print(products.forced)"
    assert in_process(code, FASTLM_LINEAR="onednn").stdout == "onednn\n"
    refused = in_process(code, FASTLM_LINEAR="mkl")
    assert "FASTLM_LINEAR is 'mkl', expected one of torch, onednn, float32" in refused.stderr


def test_a_named_way_that_is_missing_is_an_error(monkeypatch):
    force(monkeypatch, "onednn")
    monkeypatch.setattr(products, "_candidates", lambda dtype: ("torch", "float32"))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="FASTLM_LINEAR is onednn, which multiplies no torch.bfloat16"):
        fastlm.linear(x, x)


@pytest.mark.parametrize("way", products.WAYS)
def test_same_bits_again(way, monkeypatch):
    dtype = torch.bfloat16 if way == "float32" else torch.float32
    go(monkeypatch, way, dtype)
    for case in LINEAR.cases[:8]:
        first, second = (run(fastlm.linear, case.build(dtype, 0), 0) for _ in range(2))
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(bits(a), bits(b))


# ---- module, install, convert --------------------------------------------------------------


@pytest.mark.parametrize("bias", (True, False))
def test_module_is_torchs(bias):
    torch.manual_seed(3)
    mine = fastlm.nn.Linear(16, 8, bias=bias, dtype=torch.float64)
    torch.manual_seed(3)
    theirs = torch.nn.Linear(16, 8, bias=bias, dtype=torch.float64)
    assert repr(mine) == repr(theirs) and isinstance(mine, torch.nn.Linear)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert (mine.in_features, mine.out_features) == (16, 8)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(mine(x), theirs(x))
    theirs.load_state_dict(mine.state_dict())
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(twin) is fastlm.nn.Linear and torch.equal(twin(x), mine(x))
    assert type(fastlm.convert(theirs)) is fastlm.nn.Linear


@pytest.mark.parametrize("how", ("install", "convert"))
def test_a_program_of_torchs_modules_takes_the_way(how, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    x = torch.randn(4, 16)
    expected = [model(x), *torch.autograd.grad(model(x).sum(), model.parameters())]
    go(monkeypatch, "onednn", torch.float32)
    ways = taken(monkeypatch)
    model(x)
    assert not ways
    if how == "convert":
        fastlm.convert(model)
        actual = [model(x), *torch.autograd.grad(model(x).sum(), model.parameters())]
    else:
        with fastlm.installed():
            actual = [model(x), *torch.autograd.grad(model(x).sum(), model.parameters())]
    assert ways == 2 * ["onednn"] + 2 * ["onednn"] + ["onednn"] * 3
    torch.testing.assert_close(actual, expected)


def test_activation_is_in_onednns_product_only_without_gradient(monkeypatch):
    go(monkeypatch, "onednn", torch.float32)
    x, w = torch.randn(4, 16), torch.randn(8, 16, requires_grad=True)
    called = []
    onednn = products.PRODUCTS["onednn"]
    monkeypatch.setitem(
        products.PRODUCTS, "onednn", lambda *args, **kwargs: called.append(kwargs) or onednn(*args, **kwargs)
    )
    for name, activation in ops_linear.ACTIVATIONS.items():
        expected = activation.function(F.linear(x, w))
        torch.testing.assert_close(fastlm.linear(x, w, activation=name), expected)
        with torch.no_grad():
            torch.testing.assert_close(fastlm.linear(x, w, activation=name), expected)
        assert called == [{}, {"activation": activation.onednn}]
        called.clear()


@pytest.mark.parametrize("by_columns", (False, True), ids=("rows", "columns"))
@pytest.mark.parametrize("activation", (None, "gelu_tanh"))
def test_large_results_are_made_in_parts(activation, by_columns, monkeypatch):
    """oneDNN's, so that they stay in the caches, and torch's in 16 bits, whole tiles first."""
    monkeypatch.setattr(products, "_MAPPED", 1 << 14)
    monkeypatch.setattr(products, "_PART", 1 << 12)
    monkeypatch.setattr(products, "_MANY", 1 << 8)
    made, new_empty = [], products.new_empty
    monkeypatch.setattr(products, "new_empty", lambda *args: made.append(args) or new_empty(*args))
    for m, n in ((70, 333), (333, 70), (300, 301)):
        a, b, bias = torch.randn(m, 40), torch.randn(40, n), torch.randn(n)
        b = b.t().contiguous().t() if by_columns else b
        if products._onednn is not None:
            act = (("none", ""), lambda y: y) if activation is None else (("gelu", "tanh"), fastlm.gelu)
            options = {} if activation is None else {"approximate": "tanh"}
            for c in (None, bias):
                y = products._by_onednn(a, b, c, torch.float32, act[0])
                torch.testing.assert_close(y, act[1](a @ b if c is None else torch.addmm(c, a, b), **options))
            assert len(made) == 2
            made.clear()
        a, b = a.bfloat16(), b.bfloat16()
        torch.testing.assert_close(
            products._by_torch(a, b, None, torch.bfloat16).float(), a.float() @ b.float(), atol=0.1, rtol=0.02
        )
        made.clear()


# ---- a few tokens --------------------------------------------------------------------------

few_tokens = torch.ops.fastlm.linear.default


def scaled(weight, scale):
    return weight.double() if scale is None else weight.double() * scale.double()[:, None]


@pytest.mark.parametrize("layout", FEW_LAYOUTS)
@pytest.mark.parametrize("int8", (False, True), ids=("plain", "int8"))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_few_tokens(dtype, int8, layout, isa):
    """Errors are at most twice eager's, which widens int8 first, and a rounding of the sum of all sizes."""
    for shape in FEW_SHAPES:
        for biased in (False, True):
            x, w, scale, bias = few_inputs(shape, dtype, layout, int8, biased)
            wide = None if bias is None else bias.double()
            truth = F.linear(x.double(), scaled(w, scale), wide)
            actual = few_tokens(x, w, scale, bias)
            assert actual.dtype == dtype and actual.is_contiguous() and actual.shape == truth.shape
            if truth.numel():
                error = (F.linear(x, scaled(w, scale).to(dtype), bias) - truth).abs().amax()
                sizes = F.linear(
                    x.double().abs(), scaled(w, scale).abs(), None if bias is None else wide.abs()
                )
                rounding = (
                    torch.finfo(dtype).eps * sizes.amax() * (2 if dtype is torch.float64 else 1)
                )  # truth's
                assert (actual - truth).abs().amax() <= 2 * error + rounding, shape


@pytest.mark.parametrize("by_columns", (False, True), ids=("rows", "columns"))
def test_few_tokens_have_the_same_bits(by_columns, restore_threads):
    """Whatever the number of threads, and whoever stands beside them."""
    x, w = torch.randn(11, 700), torch.randn(900, 700)
    w = w.t().contiguous().t() if by_columns else w
    y = few_tokens(x, w, None, None)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(y, few_tokens(x, w, None, None))
    for m in range(11):
        assert torch.equal(y[m : m + 1], few_tokens(x[m : m + 1], w, None, None))


def test_few_tokens_of_no_number(isa):
    x, w = torch.randn(2, 40), torch.randn(50, 40)
    x[0, 3], w[7, 5], w[9, 0] = float("nan"), float("inf"), float("nan")
    for weight in (w, w.t().contiguous().t()):
        y, expected = few_tokens(x, weight, None, None), F.linear(x, weight)
        assert y[0].isnan().all()
        assert torch.equal(y[1].isnan(), expected[1].isnan()) and y[1, 7] == expected[1, 7]


def test_few_tokens_are_asked_only_where_weights_are_large(fresh, monkeypatch):
    asked = pretend(monkeypatch, lambda way, product: 1.0 if way == "fastlm" else 2.0)
    ways = taken(monkeypatch)
    large = (torch.randn(512, 256) / 16).requires_grad_()
    for by_columns in (False, True):
        weight = large.t().contiguous().t() if by_columns else large
        for tokens in (1, 7):
            x = torch.randn(tokens, 256, requires_grad=True)
            results = []
            for function in (fastlm.linear, F.linear):
                y = function(x, weight, torch.ones(512))
                results.append((y, *torch.autograd.grad(y.sin().sum(), (x, large))))
            torch.testing.assert_close(*results)
    assert ways == 4 * ["fastlm", "fastlm", "torch"]  # the weight's gradient has a row for each input
    asked.clear()
    monkeypatch.setattr(ops_linear, "_SMALL", {torch.float32: 1 << 30})
    fastlm.linear(torch.randn(8, 256), large)
    fastlm.linear(torch.randn(1, 256), torch.randn(511, 256))
    assert not asked


def test_few_tokens_read_other_weights_each_time():
    """As a model's are by the time of the next token."""
    kind = products.Kind(1, 768, 768, torch.float32, torch.float32, torch.float32, True, 1)
    calls = products._samples(products.FORWARD, kind, [1, 768, 768], ("torch",))
    weights = calls["torch"].func.__closure__
    stored = next(c.cell_contents for c in weights if isinstance(c.cell_contents, itertools.cycle))
    first, second = next(stored), next(stored)
    assert first.data_ptr() != second.data_ptr()
    assert products._CACHES <= first.untyped_storage().nbytes()


def test_the_operator_by_itself():
    x, w, b = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True), torch.randn(5)
    q, s = torch.randint(-128, 128, (5, 8), dtype=torch.int8), torch.rand(5, requires_grad=True)
    for args in ((x, w, None, b), (x, q, s, None)):
        torch.library.opcheck(few_tokens, args)
    y, expected = few_tokens(x, q, s, b), F.linear(x, s[:, None] * q, b)
    for actual, right in zip(
        *(torch.autograd.grad(out.square().sum(), (x, s)) for out in (y, expected)), strict=True
    ):
        torch.testing.assert_close(actual, right)
    wrong = [
        ((x[0], w, None, None), "input has shape"),
        ((x, w[0], None, None), "weight has shape"),
        ((x, w[:, :7], None, None), "weight has shape"),
        ((x, w.double(), None, None), "weight has another dtype"),
        ((x, q, None, None), "scale must be given"),
        ((x, w, s, None), "scale must be given"),
        ((x, q, s[:4], None), "scale has shape"),
        ((x, w, None, b.double()), "bias has another dtype"),
        ((x.int(), w.int(), None, None), "must be float64"),
    ]
    for args, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            few_tokens(*args)


# ---- int8 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", (0, 1, 7, 8, 40))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_int8(dtype, tokens):
    x = torch.randn(2, tokens, 24, dtype=dtype)
    q, s, b = (
        torch.randint(-128, 128, (10, 24), dtype=torch.int8),
        torch.rand(10).to(dtype) / 100,
        torch.randn(10),
    )
    for bias in (None, b.to(dtype)):
        for activation in (None, "relu"):
            y = fastlm.linear(x, q, bias, activation=activation, scale=s)
            truth = F.linear(x.double(), scaled(q, s), None if bias is None else bias.double())
            truth = truth if activation is None else truth.relu()
            assert y.dtype == dtype
            torch.testing.assert_close(
                y.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps
            )


def test_int8_with_gradients_autocast_and_transforms():
    q = torch.randint(-128, 128, (10, 24), dtype=torch.int8)
    for tokens in (2, 30):
        x, s, b = (
            torch.randn(tokens, 24, requires_grad=True),
            (torch.rand(10) / 100).requires_grad_(),
            torch.randn(10),
        )

        def call(x, s):
            return fastlm.linear(x, q, b, scale=s)  # noqa: B023

        def formula(x, s):
            return F.linear(x, s[:, None] * q, b)  # noqa: B023

        results = [torch.autograd.grad(f(x, s).square().sum(), (x, s)) for f in (call, formula)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.func.jvp(f, (x, s), (x, s)) for f in (call, formula)))
        torch.testing.assert_close(*(torch.vmap(f, (0, None))(x, s) for f in (call, formula)))
        torch.testing.assert_close(
            torch.compile(call, fullgraph=True, backend="aot_eager")(x, s), formula(x, s)
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = call(x, s)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(
            y.float(), formula(x, s), rtol=0.05, atol=0.05 * float(formula(x, s).abs().max())
        )
        with fastlm.use_backend("eager"), torch.no_grad():
            torch.testing.assert_close(call(x, s), formula(x, s))


def test_int8_refusals():
    x, q, s, b = torch.randn(2, 8), torch.ones(5, 8, dtype=torch.int8), torch.ones(5), torch.ones(5)
    wrong = [
        ((x, q.float(), b, s), "scale is for a weight"),
        ((x, q[0], b, s), "scale is for a weight"),
        ((x[:, :7], q, b, s), "input must be"),
        ((x.int(), q, b, s), "input must be"),
        ((x, q, b, s[:, None]), "scale must be"),
        ((x, q, b, s.double()), "scale must be"),
        ((x, q, b[:4], s), "bias must be"),
    ]
    for (input, weight, bias, scale), message in wrong:
        with pytest.raises(ValueError, match=f"fastlm.linear: {message}"):
            fastlm.linear(input, weight, bias, scale=scale)
