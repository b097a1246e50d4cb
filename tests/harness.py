"""How a kernel is compared with the truth; shared by the tests and the benchmarks.

The truth is the reference in float64 on the very inputs, rounded as the kernel got them.
A kernel passes if its error is at most twice that of eager PyTorch in the same dtype (of
the reference where torch has no such function), or a few ulps of the result's scale where
eager happens to be exact; and never more than torch.testing's tolerance for the dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Operator
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

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


def stand_in(operator: Operator, case: Case) -> Callable:
    """What the kernel's error is measured against."""
    return operator.eager if case.eager and operator.eager is not None else operator.reference


def compare(
    operator: Operator,
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    generated: bool = False,
    device: torch.device | str | None = None,
) -> None:
    """Runs one case in one dtype and checks every output and gradient by the rule above."""
    arguments = case.build(dtype, seed)
    if device is not None and torch.device(device).type != "cpu":
        arguments = on_device(operator, arguments, device)
    inputs = differentiable(arguments)
    outputs, gradients, cotangents = run(operator.function, arguments, seed)
    if case.random:
        return  # drawn by another generator than eager's: nothing to compare with
    exact_arguments = to_double(arguments)
    exact, exact_gradients, _ = run(operator.reference, exact_arguments, seed, cotangents)
    eager, eager_gradients, _ = run(stand_in(operator, case), arguments, seed, cotangents)

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
