"""Every operator, by its table of cases: values, gradients, registration, repeatability."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, OPERATORS, Draw
from harness import (
    bits,
    check_compiled,
    compare,
    cotangents_for,
    differentiable,
    map_tensors,
    run,
    tensors_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ALL = [(operator, case) for operator in OPERATORS.values() for case in operator.cases]
# Compilation and opcheck take about a second a case: these tests sample each operator's table.
SAMPLE = [
    (operator, case)
    for operator in OPERATORS.values()
    for case in operator.cases[:: max(1, len(operator.cases) // 8)]
]


def names(pairs):
    return [f"{operator.name}-{case.id}" for operator, case in pairs]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def sampled(refuses):
    """(operator, case, dtype) for a family on which a case takes long: all cases in float32. The types of 16
    bits share the cases between them, and the few that float64 runs on see every fourth."""
    for i, (operator, case) in enumerate(ALL):
        for dtype in DTYPES:
            every, turn = {torch.float64: (4, 0), torch.bfloat16: (2, 0), torch.float16: (2, 1)}.get(
                dtype, (1, 0)
            )
            refused = refuses(operator.name, case.build(dtype, 0)[0][0])
            if i % every == turn and dtype in case.dtypes and not refused:
                yield pytest.param(
                    operator, case, dtype, id=f"{names([(operator, case)])[0]}-{name_of(dtype)}"
                )


every_case = pytest.mark.parametrize("operator, case", ALL, ids=names(ALL))
some_cases = pytest.mark.parametrize("operator, case", SAMPLE, ids=names(SAMPLE))


def only_in(case, dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"the case does not exist in {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_case
def test_matches_reference(operator, case, dtype, isa):
    only_in(case, dtype)
    compare(operator, case, dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@every_case
def test_same_bits_again_and_with_any_threads(operator, case, dtype, isa, restore_threads):
    only_in(case, dtype)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients, _ = run(operator.function, case.build(dtype, 0), seed=0)
        results.append(outputs + gradients)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(bits(a), bits(b))


def lay(x, layout):
    """Integer tensors stay as they are where the layout would change their values."""
    return x if layout == "expanded" and not x.is_floating_point() else Draw.lay(x, layout)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@every_case
def test_any_memory_layout(operator, case, layout):
    """The same values in another layout give the same result."""
    dtype = case.dtypes[min(1, len(case.dtypes) - 1)]
    laid = map_tensors(lambda x: lay(x, layout), case.build(dtype, 0))
    plain = map_tensors(lambda x: x.clone(memory_format=torch.contiguous_format), laid)
    outputs, gradients, cotangents = run(operator.function, laid, 0)
    expected, expected_gradients, _ = run(operator.function, plain, 0, cotangents)
    torch.testing.assert_close(outputs, expected, equal_nan=True)
    torch.testing.assert_close(gradients, expected_gradients, equal_nan=True)


@every_case
def test_cotangents_of_any_layout(operator, case):
    """Backward takes expanded and strided incoming gradients, as .sum() and slices make them."""
    arguments = case.build(torch.float64, 0)
    inputs = differentiable(arguments)
    if not inputs:
        pytest.skip("nothing to differentiate")
    torch.manual_seed(0)
    live = [x for x in tensors_of(operator.function(*arguments[0], **arguments[1])) if x.requires_grad]
    for layout in ("expanded", "strided"):
        laid = [Draw.lay(x, layout) for x in cotangents_for(live, 1)]
        plain = [x.contiguous() for x in laid]
        settings = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(
            torch.autograd.grad(live, inputs, laid, **settings),
            torch.autograd.grad(live, inputs, plain, **settings),
            equal_nan=True,
        )


@every_case
def test_some_outputs_and_inputs_only(operator, case):
    """Each output alone can be differentiated, and each input alone asked for."""
    arguments = case.build(torch.float64, 0)
    inputs = differentiable(arguments)
    if not inputs:
        pytest.skip("nothing to differentiate")
    for i in range(len(inputs)):
        frozen = map_tensors(lambda x: x, arguments)
        for j, x in enumerate(differentiable(frozen)):
            x.requires_grad_(i == j)
        _, gradients, cotangents = run(operator.function, frozen, 0)
        _, expected, _ = run(operator.function, arguments, 0, cotangents)
        torch.testing.assert_close(gradients[0], expected[i], equal_nan=True)
    torch.manual_seed(0)
    live = [x for x in tensors_of(operator.function(*arguments[0], **arguments[1])) if x.requires_grad]
    seeds = cotangents_for(live, 1)
    settings = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    alone = [torch.autograd.grad(x, inputs, c, **settings) for x, c in zip(live, seeds, strict=True)]
    together = torch.autograd.grad(live, inputs, seeds, **settings)
    for i, total in enumerate(together):
        torch.testing.assert_close(sum(part[i] for part in alone), total, equal_nan=True)


# ---- derivatives ---------------------------------------------------------------------------


def closed(operator, arguments):
    """The operator as a seeded function of its differentiable inputs alone."""
    args, kwargs = arguments
    inputs = differentiable(arguments)
    places = {id(x): i for i, x in enumerate(inputs)}

    def function(*values):
        replaced = tree_map(lambda x: values[places[id(x)]] if id(x) in places else x, (args, kwargs))
        torch.manual_seed(0)
        outputs = tensors_of(operator.function(*replaced[0], **replaced[1]))
        return tuple(x for x in outputs if x.requires_grad)

    return function, inputs


def is_finite(operator, arguments):
    torch.manual_seed(0)
    outputs = tensors_of(operator.function(*arguments[0], **arguments[1]))
    return all(x.isfinite().all() for x in outputs)


def gradcheckable(operator, case):
    if torch.float64 not in case.dtypes:
        pytest.skip("the case does not exist in float64")
    arguments = map_tensors(torch.clone, case.build(torch.float64, 0))
    arguments = map_tensors(lambda x: x.contiguous(), arguments)
    if not differentiable(arguments):
        pytest.skip("nothing to differentiate")
    if not is_finite(operator, arguments):
        pytest.skip("finite differences need finite values")
    return closed(operator, arguments)


@every_case
def test_gradcheck(operator, case):
    function, inputs = gradcheckable(operator, case)
    torch.autograd.gradcheck(function, inputs, fast_mode=True)


@every_case
def test_gradgradcheck(operator, case):
    function, inputs = gradcheckable(operator, case)
    torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


# ---- registration --------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps the calls of fastlm's operators that go by."""

    def __init__(self):
        super().__init__()
        self.calls, self.others = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace.startswith("fastlm"):
            own = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
            self.calls.append((function, *own))
        else:
            self.others.append(function.__name__)
        return function(*args, **kwargs)


def recorded_calls(operator, arguments):
    """Each with whether autograd differentiates it."""
    with Recorder() as recorder:
        run(operator.function, arguments, seed=0)
    trained = bool(differentiable(arguments))
    return [(*call, trained and "backward" not in call[0].__name__) for call in recorder.calls]


def check_registration(calls):
    for function, args, kwargs, trained in calls:
        if trained:
            for x in tensors_of((args, kwargs)):
                x.detach_().requires_grad_(x.is_floating_point())
        for x in tensors_of((args, kwargs)):
            if sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) < -32:
                pytest.skip("opcheck's copy of an argument fails for an empty one of such strides")
        torch.library.opcheck(function, args, kwargs)


@every_case
def test_runs_on_our_kernels(operator, case):
    """No case falls back to plain PyTorch, forward or backward."""
    arguments = case.build(case.dtypes[0], 0)
    with Recorder() as forward:
        outputs = tensors_of(operator.function(*arguments[0], **arguments[1]))
    assert forward.calls, "no kernel of fastlm ran"
    live = [x for x in outputs if x.requires_grad]
    if live:
        with Recorder() as backward:
            torch.autograd.grad(
                live,
                differentiable(arguments),
                [torch.ones_like(x) for x in live],
                allow_unused=True,
            )
        # Gradients may be known since the forward, which leaves a scaling.
        assert backward.calls or "softmax" not in " ".join(backward.others)


@some_cases
def test_opcheck(operator, case):
    dtype = case.dtypes[min(1, len(case.dtypes) - 1)]
    check_registration(recorded_calls(operator, case.build(dtype, 0)))


@every_case
def test_fake_tensors_agree(operator, case):
    """Shapes, dtypes, strides and devices are the same without data."""
    dtype = case.dtypes[min(1, len(case.dtypes) - 1)]
    args, kwargs = case.build(dtype, 0)
    torch.manual_seed(0)
    real = tensors_of(operator.function(*args, **kwargs))
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake_args, fake_kwargs = tree_map(
        lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, (args, kwargs)
    )
    with mode:
        fake = tensors_of(operator.function(*fake_args, **fake_kwargs))
    for a, b in zip(real, fake, strict=True):
        for trait in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(a, trait) == getattr(b, trait), trait
        if a.numel() > 0:
            assert a.stride() == b.stride()


@every_case
def test_leaves_arguments_and_generator_alone(operator, case):
    """Inputs keep their bits and version; torch's generator moves only for a random case."""
    arguments = case.build(case.dtypes[0], 0)
    tensors = tensors_of(arguments)
    before = [(x.detach().clone(), x._version) for x in tensors]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    outputs = tensors_of(operator.function(*arguments[0], **arguments[1]))
    assert torch.equal(state, torch.get_rng_state()) != case.random
    for x, (values, version) in zip(tensors, before, strict=True):
        assert x._version == version and torch.equal(bits(x), bits(values))
    storages = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
    assert not storages & {x.untyped_storage().data_ptr() for x in outputs if x.numel()}


@some_cases
def test_compiles_whole(operator, case):
    """torch.compile(fullgraph=True) gives the values and gradients of eager mode."""
    if case.random:
        pytest.skip("the compiled program may draw in another order")
    dtype = case.dtypes[min(1, len(case.dtypes) - 1)]
    arguments = case.build(dtype, 0)
    torch.compiler.reset()
    compiled = torch.compile(operator.function, fullgraph=True, backend="aot_eager")
    outputs, gradients, cotangents = run(compiled, arguments, 0)
    expected, expected_gradients, _ = run(operator.function, arguments, 0, cotangents)
    torch.testing.assert_close(outputs, expected, equal_nan=True)
    torch.testing.assert_close(gradients, expected_gradients, equal_nan=True)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_compiles_with_inductor(operator):
    case = next(case for case in operator.cases if not case.random)
    arguments = case.build(torch.float32, 0)
    check_compiled(operator, arguments)


# ---- transforms ----------------------------------------------------------------------------


@every_case
def test_forward_mode(operator, case):
    """Jacobian-vector products agree with the reference's."""
    if case.random:
        pytest.skip("draws differ")
    arguments = map_tensors(torch.clone, case.build(torch.float64, 0))
    if not differentiable(arguments):
        pytest.skip("nothing to differentiate")
    function, inputs = closed(operator, arguments)
    values = tuple(x.detach() for x in inputs)
    tangents = tuple(torch.randn_like(x) for x in values)

    def tensors(implementation):
        def call(*replacements):
            places = {id(x): i for i, x in enumerate(inputs)}
            args, kwargs = tree_map(
                lambda x: replacements[places[id(x)]] if id(x) in places else x, arguments
            )
            return tuple(x for x in tensors_of(implementation(*args, **kwargs)) if x.is_floating_point())

        return call

    ours = torch.func.jvp(tensors(operator.function), values, tangents)
    theirs = torch.func.jvp(tensors(operator.reference), values, tangents)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_no_grad_and_inference_mode(operator):
    case = operator.cases[0]
    args, kwargs = case.build(torch.float32, 0)
    expected = tensors_of(operator.function(*args, **kwargs))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = tensors_of(operator.function(*args, **kwargs))
        assert not any(x.requires_grad for x in outputs)
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b.detach())
