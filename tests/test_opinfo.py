"""PyTorch's own operator and module samples (op_db, module_db), run through fastlm.

What torch's test suite feeds to its functions and modules gives the same values, gradients
and errors (their types, and the words that the suite asks for) with ours, called directly, as modules, and under fastlm.install().
"""

import warnings

import pytest
import torch
from harness import TOLERANCE, error, largest, run, tensors_of, to_double
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastlm
import fastlm.nn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = {
    f"{op.name.removeprefix('nn.functional.')} {op.variant_test_name}".strip().replace(" ", "-"): op
    for op in op_db
    if op.name.removeprefix("nn.functional.")
    in ("scaled_dot_product_attention", "cross_entropy", "linear_cross_entropy", "linear", "gelu")
}
MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls.__name__
    in ("GRU", "GRUCell", "Linear", "MultiheadAttention", "CrossEntropyLoss", "LinearCrossEntropyLoss")
}
TRANSFORMERS = {
    info.module_cls.__name__: info for info in module_db if "Transformer" in info.module_cls.__name__
}


def test_samples_were_found():
    """op_db and module_db are internal to torch: notice if a name moves."""
    missing = not hasattr(torch.nn.functional, "linear_cross_entropy")  # before torch 2.13
    expected = {"scaled_dot_product_attention", "cross_entropy", "linear_cross_entropy", "linear", "gelu"}
    assert expected - set(OPS) == ({"linear_cross_entropy"} if missing else set())
    assert len(MODULES) == 6 - missing and len(TRANSFORMERS) >= 4


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def ours(op):
    return getattr(fastlm, op.name.removeprefix("nn.functional."))


def samples(op, dtype, requires_grad=True):
    torch.manual_seed(0)
    yield from op.sample_inputs("cpu", dtype, requires_grad=requires_grad)


def is_random(sample):
    return sample.kwargs.get("dropout_p", 0.0) > 0.0


def assert_as_good(actual, expected, dtype, what, truth=None):
    """As close to the truth as eager's result is, twice over, or within the dtype's tolerance."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    truth = expected if truth is None else truth
    scale = max(largest(truth.detach()), 1e-3)
    bound = max(2 * error(expected, truth, what), 2 * TOLERANCE[dtype] * scale)
    mine = error(actual, truth, what)
    assert mine <= bound, f"{what}: error {mine:.3g} > {bound:.3g}, scale {scale:.3g}"


def arguments_of(sample):
    return (sample.input, *sample.args), sample.kwargs


def fused(original):
    """Torch's attention in four dimensions, where it takes its fused kernel: in 16 bits that kernel's
    gradients, like ours, come from the rounded output, those of its plain formula do not."""

    def attention(query, key, value, **options):
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        if options.get("enable_gqa") or len(batch) > 2:
            return original(query, key, value, **options)
        lead = (1,) * (2 - len(batch)) + tuple(batch)
        lifted = (x.expand(*lead, *x.shape[-2:]) for x in (query, key, value))
        return original(*lifted, **options).reshape(*batch, query.shape[-2], value.shape[-1])

    return attention


def check_same(function, original, sample, dtype):
    """Values, and the gradients through a random cotangent, by the rule of harness.py."""
    arguments = arguments_of(sample)
    if is_random(sample):
        results = [run(function, arguments, 1)[0][0] for _ in range(2)]
        assert torch.equal(*results)
        return
    outputs, gradients, cotangents = run(original, arguments, 1)
    actual, actual_gradients, _ = run(function, arguments, 1, cotangents)
    positional, named = to_double(arguments)
    named.pop("options", None)  # of a chunked computation, which knows no float64
    truth, true_gradients, _ = run(original, (positional, named), 1, cotangents)
    for name, ours, theirs, exact in (
        ("value", actual, outputs, truth),
        ("gradient", actual_gradients, gradients, true_gradients),
    ):
        for i, (a, b, t) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert_as_good(a, b, dtype, f"{name} {i}", t)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_operator_samples(op, dtype):
    failures = []
    for i, sample in enumerate(samples(op, dtype)):
        try:
            check_same(ours(op), fused(op.op) if "attention" in op.name else op.op, sample, dtype)
        except Exception as error:  # collected: one message for all samples
            failures.append(f"sample {i} {sample.summary()}: {type(error).__name__}: {error}"[:600])
    assert not failures, f"{len(failures)} samples differ\n" + "\n".join(failures[:5])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_operator_samples_installed(op):
    """The same through torch's own name, under install()."""
    name = op.name.removeprefix("nn.functional.")
    original = getattr(torch.nn.functional, name)
    with fastlm.installed():
        replaced = getattr(torch.nn.functional, name)
        assert replaced is not original
        for sample in samples(op, torch.float32):
            check_same(replaced, original, sample, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_operator_samples_second_derivative(op):
    """gradgradcheck on torch's samples, the chunked ones too, where torch itself gives none."""
    chosen = [s for s in samples(op, torch.float64) if not is_random(s)]
    for sample in chosen[:: max(1, len(chosen) // 12)]:
        inputs = [x for x in tensors_of((sample.input, sample.args, sample.kwargs)) if x.requires_grad]
        positions = {id(x): i for i, x in enumerate(inputs)}

        def call(*values, sample=sample, positions=positions):
            def swap(x):
                return values[positions[id(x)]] if id(x) in positions else x

            args = [swap(x) for x in (sample.input, *sample.args)]
            return ours(op)(*args, **{k: swap(v) for k, v in sample.kwargs.items()})

        torch.autograd.gradcheck(call, inputs, fast_mode=True)
        torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.error_inputs_func], ids=lambda op: op.name)
def test_operator_errors(op):
    for bad in op.error_inputs("cpu"):
        sample = bad.sample_input
        with pytest.raises(bad.error_type, match=bad.error_regex):
            ours(op)(sample.input, *sample.args, **sample.kwargs)
        with fastlm.installed(), pytest.raises(bad.error_type, match=bad.error_regex):
            op.op(sample.input, *sample.args, **sample.kwargs)


# ---- modules -------------------------------------------------------------------------------


def module_samples(info, dtype, training):
    """At most about 80: LinearCrossEntropyLoss has the product of all of its options, 857."""
    torch.manual_seed(0)
    found = list(
        info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    )
    return found[:: max(1, len(found) // 80)]


def build(module_class, sample, dtype, training):
    given = sample.constructor_input
    kwargs = {"device": "cpu", "dtype": dtype, **given.kwargs}
    if module_class.__name__ in ("CrossEntropyLoss", "TransformerEncoder"):  # made without these
        kwargs = dict(given.kwargs)
    return module_class(*given.args, **kwargs).train(training)


def check_module(actual, expected, sample, dtype):
    """Outputs, and gradients of inputs and parameters, of two modules with one state_dict."""
    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    torch.manual_seed(1)
    wanted = tensors_of(expected(*args, **kwargs))
    torch.manual_seed(1)
    got = tensors_of(actual(*args, **kwargs))
    assert len(got) == len(wanted)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_as_good(a, b, dtype, f"output {i} of {sample.desc}")
        assert a.requires_grad == b.requires_grad
    live = [i for i, x in enumerate(wanted) if x.requires_grad]
    if not live:
        return
    cotangents = [torch.randn_like(wanted[i]) for i in live]
    inputs = [x for x in tensors_of((args, kwargs)) if x.requires_grad]

    def differentiate(module, outputs):
        leaves = inputs + [p for p in module.parameters() if p.requires_grad]
        return torch.autograd.grad(
            [outputs[i] for i in live],
            leaves,
            cotangents,
            allow_unused=True,
            materialize_grads=True,
        )

    for i, (a, b) in enumerate(zip(differentiate(actual, got), differentiate(expected, wanted), strict=True)):
        assert_as_good(a, b, dtype, f"gradient {i} of {sample.desc}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=name_of)
@pytest.mark.parametrize("info", MODULES.values(), ids=MODULES.keys())
def test_module_samples(info, dtype, training):
    module_class = getattr(fastlm.nn, info.module_cls.__name__)
    count = 0
    for sample in module_samples(info, dtype, training):
        expected = build(info.module_cls, sample, dtype, training)
        actual = build(module_class, sample, dtype, training)
        actual.load_state_dict(expected.state_dict())
        assert repr(actual) == repr(expected)
        assert list(actual.state_dict()) == list(expected.state_dict())
        check_module(actual, expected, sample, dtype)
        count += 1
    assert count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("info", (MODULES | TRANSFORMERS).values(), ids=MODULES | TRANSFORMERS)
def test_module_samples_installed(info, training):
    """torch's modules under install(), against themselves without."""

    class Installed(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            with fastlm.installed():
                return self.module(*args, **kwargs)

    for sample in module_samples(info, torch.float32, training):
        expected = build(info.module_cls, sample, torch.float32, training)
        if any(p > 0 for p in dropouts(expected)) and training:
            continue  # drawn differently
        check_module(Installed(expected), expected, sample, torch.float32)


def dropouts(module):
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            yield part.p
        elif isinstance(getattr(part, "dropout", None), float):
            yield part.dropout


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "info",
    [info for info in MODULES.values() if info.module_error_inputs_func],
    ids=[name for name, info in MODULES.items() if info.module_error_inputs_func],
)
def test_module_errors(info):
    module_class = getattr(fastlm.nn, info.module_cls.__name__)
    for bad in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        given = bad.module_error_input.constructor_input
        if bad.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(bad.error_type, match=bad.error_regex):
                module_class(*given.args, **given.kwargs)
            continue
        try:
            original = info.module_cls(*given.args, **given.kwargs)
        except Exception as error:
            with pytest.raises(type(error)):
                module_class(*given.args, **given.kwargs)
            continue
        forward = bad.module_error_input.forward_input
        with pytest.raises(bad.error_type, match=bad.error_regex):
            module_class(*given.args, **given.kwargs)(*forward.args, **forward.kwargs)
        with fastlm.installed(), pytest.raises(bad.error_type, match=bad.error_regex):
            original(*forward.args, **forward.kwargs)


@pytest.mark.parametrize("name", ("scaled_dot_product_attention", "cross_entropy"))
def test_no_warnings(name):
    """An ordinary call warns of nothing."""
    op = OPS[name]
    sample = next(samples(op, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(op)(sample.input, *sample.args, **sample.kwargs)
