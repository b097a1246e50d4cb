"""How a kernel is compared with the truth; shared by the tests and the benchmarks.

The truth is the reference in float64 on the very inputs, rounded as the kernel got them.
A kernel passes if its error is at most twice that of eager PyTorch in the same dtype (of
the reference where torch has no such function), or a few ulps of the result's scale where
eager happens to be exact; and never more than torch.testing's tolerance for the dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Draw, Operator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import fastlm
from fastlm import reference

# Ulps of the largest value that a result may be off whatever eager's error: another order of
# summation in fp64 and fp32, one more rounding in the storage types. The fp64 reference is
# itself no better than float64, hence the many ulps there.
FLOOR_ULPS = {torch.float64: 4096, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}
# rtol + atol of torch.testing.assert_close, relative to the result's scale; for float16 the 2 ulps
# that bfloat16 has there, not 1.
TOLERANCE = {
    torch.float64: 2e-7,
    torch.float32: 1.13e-5,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


def tensors_of(tree) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], tree):
    """The tree with each tensor replaced by a new leaf, requires_grad as before."""

    def replace(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return function(leaf.detach()).detach().requires_grad_(leaf.requires_grad)

    return tree_map(replace, tree)


def on_device(operator: Operator, arguments, device: torch.device | str):
    """The arguments on a device, but for the integers of a GRU: step sizes stay on the CPU."""
    stays = operator.name == "gru"
    return map_tensors(
        lambda x: x if stays and not x.is_floating_point() else x.to(device, copy=True), arguments
    )


def to_double(arguments):
    return map_tensors(lambda x: x.double() if x.is_floating_point() else x, arguments)


def differentiable(tree) -> list[Tensor]:
    return [x for x in tensors_of(tree) if x.requires_grad]


def cotangents_for(outputs: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]


def run(function: Callable, arguments, seed: int, cotangents: list[Tensor] | None = None):
    """Calls the function and differentiates it.

    Returns (outputs, gradients, cotangents): all output tensors; one gradient for each
    argument with requires_grad, zeros where it has no influence; what was propagated back
    through the outputs that require grad (drawn here unless given).
    """
    args, kwargs = arguments
    torch.manual_seed(seed)
    outputs = tensors_of(function(*args, **kwargs))
    inputs = differentiable(arguments)
    live = [x for x in outputs if x.requires_grad]
    assert bool(live) == bool(inputs), "outputs are detached from inputs that require grad"
    if not inputs:
        return outputs, [], []
    if cotangents is None:
        cotangents = cotangents_for(live, seed + 1)
    gradients = torch.autograd.grad(
        live,
        inputs,
        [c.to(x.dtype) for c, x in zip(cotangents, live, strict=True)],
        allow_unused=True,
        materialize_grads=True,
    )
    for gradient, x in zip(gradients, inputs, strict=True):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
    return outputs, list(gradients), cotangents


def largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def error(actual: Tensor, truth: Tensor, what: str) -> float:
    """Largest absolute difference; NaN and infinity must be where the truth has them."""
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    if not truth.is_floating_point():
        assert torch.equal(actual, truth), f"{what}: differs"
        return 0.0
    actual, truth = actual.detach().double(), truth.detach().double()
    assert torch.equal(actual.isnan(), truth.isnan()), f"{what}: NaN in other places"
    infinite = truth.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{what}: infinity in other places"
    assert torch.equal(actual[infinite], truth[infinite]), f"{what}: infinity of another sign"
    return largest(actual - truth)


def limit(dtype: torch.dtype, eager_error: float, scale: float, generated: bool) -> float:
    """Generated cases are many and small: in some, eager is exact by luck or beyond the tolerance
    itself, so there either bound is enough."""
    floor = FLOOR_ULPS[dtype] * torch.finfo(dtype).eps * scale
    relative, absolute = max(2 * eager_error, floor), max(TOLERANCE[dtype] * scale, floor)
    return max(relative, absolute) if generated else min(relative, absolute)


def stand_in(operator: Operator, case: Case, device: torch.device) -> Callable:
    """What the kernel's error is measured against."""
    takes = case.eager and (case.eager_on_gpu or device.type == "cpu")
    return operator.eager if takes and operator.eager is not None else operator.reference


def compare(
    operator: Operator,
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    generated: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Runs one case in one dtype and checks every output and gradient by the rule above."""
    arguments = case.build(dtype, seed)
    device = torch.device(device)
    if device.type != "cpu":
        arguments = on_device(operator, arguments, device)
    inputs = differentiable(arguments)
    outputs, gradients, cotangents = run(operator.function, arguments, seed)
    if case.random:
        return  # drawn by another generator than eager's: nothing to compare with
    exact_arguments = to_double(arguments)
    exact, exact_gradients, _ = run(operator.reference, exact_arguments, seed, cotangents)
    eager, eager_gradients, _ = run(stand_in(operator, case, device), arguments, seed, cotangents)

    assert len(outputs) == len(exact) == len(eager), "another number of outputs"
    failures = []
    for i, (x, e, t) in enumerate(zip(outputs, eager, exact, strict=True)):
        what = f"output {i}"
        assert x.dtype == e.dtype, f"{what}: dtype {x.dtype}, expected {e.dtype}"
        if x.is_floating_point():
            failures += _failure(what, dtype, x, e, t, largest(t.detach()), generated)
        else:
            error(x, t, what)
    # Gradients of one call share a scale: where one is 0 in exact arithmetic (the query's,
    # with a single key), what remains is rounding of terms of the others' size.
    # Where all are (the logits of a single class), it is of terms of the incoming gradient's size,
    # in the precision that is computed in.
    scale = max((largest(t) for t in exact_gradients), default=0.0)
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    remains = 4 * compute * max((largest(c) for c in cotangents), default=0.0)
    scale = max(scale, remains / torch.finfo(dtype).eps / FLOOR_ULPS[dtype])
    for i, (x, e, t) in enumerate(zip(gradients, eager_gradients, exact_gradients, strict=True)):
        what = f"gradient {i} {tuple(inputs[i].shape)}"
        failures += _failure(what, dtype, x, e, t, scale, generated)
    assert not failures, "\n".join(failures)


def _failure(what, dtype, actual, eager, truth, scale, generated) -> list[str]:
    mine, theirs = error(actual, truth, what), error(eager, truth, what + " of eager")
    bound = limit(dtype, theirs, scale, generated)
    if mine <= bound:
        return []
    return [f"{what}: error {mine:.3g} > {bound:.3g} (eager {theirs:.3g}, scale {scale:.3g}, {dtype})"]


# ---- what every family for GPUs is asked besides -------------------------------------------


def bits(x):
    """Integer view, so that NaN equals NaN and 0.0 differs from -0.0."""
    widths = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return x.detach().contiguous().view(widths[x.element_size()]) if x.is_floating_point() else x


def case_of(operator: Operator, id: str) -> Case:
    return next(case for case in operator.cases if case.id == id)


def check_layout(operator: Operator, id: str, layout: str, device: torch.device | str) -> None:
    """The values of a case in another memory layout give the same result."""
    args, kwargs = case_of(operator, id).build(torch.float32, 0)
    laid = [Draw.lay(x.detach(), layout).requires_grad_() for x in args], kwargs
    outputs, gradients, cotangents = run(operator.function, on_device(operator, laid, device), 0)
    plain = on_device(operator, (args, kwargs), device)
    expected, expected_gradients, _ = run(operator.function, plain, 0, cotangents)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients, expected_gradients)


class Tf32Products(TorchDispatchMode):
    """Rounds the factors of every product to tf32."""

    PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.PRODUCTS:
            args = *args[:-2], *(((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(x.dtype) for x in args[-2:])
        return function(*args, **(kwargs or {}))


def check_tf32(operator: Operator, case: Case, device: torch.device | str = "cpu") -> None:
    """Where the caller has float32 multiplied in tf32: the error is at most twice that of the reference with
    such products, or as the fraction allows, which is float16's; and more than float32's would be."""
    arguments = on_device(operator, case.build(torch.float32, 0), device)
    outputs, gradients, cotangents = run(operator.function, arguments, 0)
    exact, exact_gradients, _ = run(operator.reference, to_double(arguments), 0, cotangents)
    with Tf32Products():
        eager, eager_gradients, _ = run(operator.reference, arguments, 0, cotangents)
    scale = max((largest(t) for t in exact_gradients), default=0.0)
    results = [(x, e, t, largest(t)) for x, e, t in zip(outputs, eager, exact, strict=True)]
    results += [(*x, scale) for x in zip(gradients, eager_gradients, exact_gradients, strict=True)]
    errors = []
    for i, (x, e, t, scale) in enumerate(results):
        mine, theirs = error(x, t, f"result {i}"), error(e, t, f"result {i} of the reference")
        bound = limit(torch.float16, theirs, scale, generated=True)
        assert mine <= bound, (
            f"result {i}: error {mine:.3g} > {bound:.3g} (reference {theirs:.3g}, scale {scale:.3g})"
        )
        errors.append(mine / scale)
    assert max(errors) > TOLERANCE[torch.float32], "not multiplied in tf32"


def check_bits(operator: Operator, id: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """A case gives the same bits again."""
    results = []
    for _ in range(2):
        arguments = on_device(operator, case_of(operator, id).build(dtype, 0), device)
        outputs, gradients, _ = run(operator.function, arguments, 0)
        results.append(outputs + gradients)
    for a, b in zip(*results, strict=True):
        assert torch.equal(bits(a), bits(b))


def check_compiled(operator: Operator, arguments, backend: str = "inductor") -> None:
    """Compiled whole: values and gradients of eager mode."""
    torch.compiler.reset()
    compiled = torch.compile(operator.function, fullgraph=True, backend=backend)
    outputs, gradients, cotangents = run(compiled, arguments, 0)
    expected, expected_gradients, _ = run(operator.function, arguments, 0, cotangents)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def check_autocast(operator: Operator, case: Case, to: torch.dtype, device: torch.device) -> None:
    """Under autocast: dtypes are eager's, values as exact; gradients come in the inputs' dtype."""

    def under_autocast(function):
        def wrapped(*args, **kwargs):
            with torch.autocast(device.type, dtype=to):
                return function(*args, **kwargs)

        return wrapped

    arguments = on_device(operator, case.build(torch.float32, 0), device)
    expected, expected_gradients, cotangents = run(under_autocast(operator.eager), arguments, 0)
    outputs, gradients, _ = run(under_autocast(operator.function), arguments, 0, cotangents)
    for actual, eager in zip(outputs + gradients, expected + expected_gradients, strict=True):
        assert actual.dtype == eager.dtype
        scale = max(1.0, largest(eager))
        torch.testing.assert_close(
            actual.float(), eager.float(), rtol=3e-2, atol=3e-2 * scale, equal_nan=True
        )


def check_dropout(T: tuple[int, int], device: torch.device | str) -> None:
    """Kernel and formula drop the same weights, forward and backward, for one state of the generator."""
    shapes = (1, 2, T[0], 8), (1, 1, T[1], 8), (1, 1, T[1], 8)
    inputs = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    results = []
    for function in (fastlm.scaled_dot_product_attention, reference.scaled_dot_product_attention):
        torch.manual_seed(7)
        out = function(*inputs, dropout_p=0.4, is_causal=T[0] > 1, enable_gqa=True)
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    torch.testing.assert_close(*results)


def check_pages(device: torch.device | str) -> None:
    """Pages of a size that no block is a multiple of, a table with room to spare, and keys in splits."""
    q, pool = torch.randn(2, 4, 8), torch.randn(500, 7, 2, 8)
    table = torch.randperm(500)[:400].view(2, 200).to(torch.int32)
    at, used = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1393, 8], dtype=torch.int32)
    arguments = [x.to(device) for x in (q, pool, pool, at)]
    options = dict(enable_gqa=True, seqused_k=used.to(device), block_table=table.to(device))
    torch.testing.assert_close(
        fastlm.varlen_attn(*arguments, None, 1, 1400, **options),
        reference.varlen_attn(*arguments, None, 1, 1400, **options),
    )
