"""Choice of backend and what the operators' autograd formulas share.

Each operator has a module here: its fake kernel, its autograd formula and its entry point, which the
public functions of `fastlm.functional` call. Importing this package registers them all.
"""

import os
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastlm import _C, cuda, triton

KERNEL_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))

# Function -> the size (elements of logits, states) up to which a call on the CPU is tiny. A library's
# operator takes some 5 us to reach its kernel, through Python and the dispatcher, and plain PyTorch has
# answered by then. It serves tiny calls that ask for nothing but what it does too.
TINY = {"cross_entropy": 1 << 13, "gru_cell": 1 << 8}

# ---- families of kernels -------------------------------------------------------------------
# A family is a module that offers
#   NAMESPACE                 of its operators, whose schemas are those of csrc/ops.cpp
#   missing()                 why it can serve no call here, or None
#   note()                    a few words for `fastlm info`
#   devices()                 types of the devices whose tensors it takes in this process
#   refuses(function, tensor) why it has no kernel for a call whose main input this is, or None
# and adding a family is one entry here (tests/simt makes its own from outside).
FAMILIES = {"cpu": _C, "cuda": cuda, "triton": triton}

# The operators behind a public function: forward, backward.
OPERATORS = {
    "scaled_dot_product_attention": ("attention_forward", "attention_backward"),
    "varlen_attn": ("varlen_attention_forward", "varlen_attention_backward"),
    "cross_entropy": ("cross_entropy", "cross_entropy_backward"),
    "linear_cross_entropy": ("linear_cross_entropy", "linear_cross_entropy_backward"),
    "gru": ("gru_layer", "gru_layer_backward"),
    "gru_cell": ("gru_layer", "gru_layer_backward"),
}


def always(tensor: torch.Tensor) -> bool:
    return True


# Operator -> families, and whether each is asked for a call whose main input (query, logits ...) this is.
# On a GPU the first serves that is there, is asked and does not refuse. On an H100 that order is the faster one in
# nearly every shape (benchmarks/NOTES.md); what a report of `make gpu-check` says of another GPU can be written as
# ("triton", lambda query: query.size(-1) > 128) before ("cuda", always).
Rules = tuple[tuple[str, Callable[[torch.Tensor], bool]], ...]
ON_GPU: dict[str, Rules] = {
    "attention_forward": (("cuda", always), ("triton", always)),
    "attention_backward": (("cuda", always), ("triton", always)),
    "varlen_attention_forward": (("cuda", always), ("triton", always)),
    "varlen_attention_backward": (("cuda", always), ("triton", always)),
    "cross_entropy": (("cuda", always), ("triton", always)),
    "cross_entropy_backward": (("cuda", always), ("triton", always)),
    "linear_cross_entropy": (("cuda", always), ("triton", always)),
    "linear_cross_entropy_backward": (("cuda", always), ("triton", always)),
    "gru_layer": (("cuda", always), ("triton", always)),
    "gru_layer_backward": (("cuda", always), ("triton", always)),
}


def backends() -> tuple[str, ...]:
    """The names that can be asked for, whether they are available here or not."""
    return (*FAMILIES, "eager")


def missing_backends() -> dict[str, str]:
    """Backends that can't serve any call here, each with the reason."""
    return {name: reason for name, family in FAMILIES.items() if (reason := family.missing())}


def backend_notes() -> dict[str, str]:
    """What `fastlm info` says of each backend that is there."""
    missing = missing_backends()
    notes = {name: family.note() for name, family in FAMILIES.items() if name not in missing}
    return notes | {"eager": "plain PyTorch"}


def _on_gpu() -> dict[str, Rules]:
    """The table without families that are not there, as far as it can be told without asking a GPU."""
    there = {
        "cuda": cuda.unusable() is None,
        "triton": triton.installed() and (torch.version.cuda or torch.version.hip),  # AMD's are "cuda" too
    }
    return {operator: tuple(rule for rule in rules if there[rule[0]]) for operator, rules in ON_GPU.items()}


# Device type -> the family that serves every call unless another is forced, or operator -> the families.
_native: dict[str, str | dict[str, Rules]] = {"cpu": "cpu", "meta": "cpu", "cuda": _on_gpu()}
_forced: str | None = None

# ---- choice --------------------------------------------------------------------------------


def _checked(name: str | None, source: str) -> str | None:
    if not name:
        return None
    if name not in backends():
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(backends())}")
    reason = FAMILIES[name].missing() if name in FAMILIES else None
    if reason:
        raise RuntimeError(f"{source}: backend {name!r} is not available: {reason}")
    return name


_forced = _checked(os.environ.get("FASTLM_BACKEND"), "FASTLM_BACKEND")


class use_backend:
    """Force one backend for every call of fastlm, from now on or inside a ``with`` block.

    Args:
        name (str or None): ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"eager"`` (plain PyTorch);
            ``None`` goes back to the choice by device, dtype and features.

    A call that the forced backend can't serve raises :class:`RuntimeError` with the reason. The
    environment variable ``FASTLM_BACKEND`` does the same for a whole program. The choice holds for all
    threads. Forward and backward may run on different backends: what one keeps, the other reads.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend is not available here, with the reason.

    Example::

        with fastlm.use_backend("eager"):
            reference = fastlm.scaled_dot_product_attention(q, k, v)
    """

    def __init__(self, name: str | None):
        global _forced
        self._previous = _forced
        _forced = _checked(name, "fastlm.use_backend")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc) -> None:
        global _forced
        _forced = self._previous


def choose_backend(
    function: str,
    tensor: torch.Tensor,
    unsupported: str | None = None,
    *,
    value: torch.Tensor | None = None,
    backward: bool = False,
) -> str:
    """The backend for a call of ``fastlm.<function>`` whose main input is `tensor`, or for its backward.

    `unsupported` says why no kernel covers the call's features, if none does; plain PyTorch serves
    it then, unless another backend is forced. `value`, of attention, is asked about in the place of the
    query where its heads are larger. The functions in TINY ask before what `is_tiny` asks.
    """
    if _forced is None:
        if unsupported is None and tensor.dtype in KERNEL_DTYPES:
            native = _native.get("cpu" if tensor.is_cpu else tensor.device.type)  # a device's type takes 2 us
            if type(native) is str:
                return native
            tensor = _larger(tensor, value)
            operator = OPERATORS[function][1 if backward else 0]  # torch.compile of 2.11 knows no bool there
            for name, asked in native[operator] if native else ():
                if asked(tensor) and FAMILIES[name].refuses(function, tensor) is None:
                    return name
        return "eager"
    if _forced != "eager":
        reason = unsupported or _refusal(FAMILIES[_forced], function, _larger(tensor, value))
        if reason is not None:
            raise RuntimeError(f"fastlm.{function}: backend {_forced!r} is forced, but there is {reason}")
    return _forced


def _larger(query: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    return query if value is None or query.shape[-1] >= value.shape[-1] else value


PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # types of tensors without rules of their own


def is_tiny(function: str, tensor: torch.Tensor) -> bool:
    """Whether plain PyTorch serves a call of this tensor's size (see TINY) on the CPU, since it is faster.
    Never where a backend is forced, in a compiled or exported program, whose calls cost less, or in a trace,
    which is for any size."""
    return (
        _forced is None
        and type(tensor) in PLAIN
        and not is_dynamo_compiling()
        and tensor.is_cpu
        and type(size := tensor.numel()) is int  # a tensor in a trace
        and 0 < size <= TINY[function]
    )


def _refusal(family, function: str, tensor: torch.Tensor) -> str | None:
    if tensor.device.type not in (*family.devices(), "meta"):
        return f"no kernel for device {tensor.device}"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"no kernel for {tensor.dtype}"
    return family.refuses(function, tensor)


# ---- operators -----------------------------------------------------------------------------
# Each family's operators have the same fake kernels and autograd formulas.

_kernels: dict[str, dict[str, torch._ops.OpOverload]] = {}  # backend -> operator
_namespaces: list[str] = []
_registrations: list[Callable[[str], None]] = []  # each makes one for the operators of a namespace


def kernel(backend: str, operator: str) -> torch._ops.OpOverload:
    """A family's operator."""
    return _kernels[backend][operator]


def add_operators(backend: str) -> None:
    """Those of a family, which exist by now."""
    namespace = FAMILIES[backend].NAMESPACE
    operators = getattr(torch.ops, namespace)
    _kernels[backend] = {name: getattr(operators, name).default for name in triton.MODULES}
    if namespace not in _namespaces:
        _namespaces.append(namespace)
        for register in _registrations:
            register(namespace)


def for_namespaces(register: Callable[[str], None]) -> None:
    """Calls register(namespace) for each family whose operators exist, and for the others when theirs do."""
    _registrations.append(register)
    for namespace in _namespaces:
        register(namespace)


def _is_real(x) -> bool:
    """A tensor that holds values; integers, as the sizes of steps, may stay on the CPU."""
    return (
        isinstance(x, torch.Tensor)
        and x.is_floating_point()
        and x.device.type != "meta"
        and not isinstance(x, FakeTensor)
    )


def register_fake(operator: str, namespace: str | None = None):
    """torch.library.register_fake for the operator of every family, or of the one namespace that has it."""

    def decorate(function):
        def fake(*args):
            if any(map(_is_real, args)):  # called for another of them, which is on meta
                raise RuntimeError(f"fastlm::{operator}: tensors on several devices, expected all on meta")
            return function(*args)

        def register(namespace):
            torch.library.register_fake(f"{namespace}::{operator}", fake)

        if namespace is None:
            for_namespaces(register)
        else:
            register(namespace)
        return function

    return decorate


def register_autograd(operator: str, backward, setup_context) -> None:
    """torch.library.register_autograd for the operator of every family."""
    for_namespaces(
        lambda namespace: torch.library.register_autograd(
            f"{namespace}::{operator}", backward, setup_context=setup_context
        )
    )


for _name in FAMILIES:
    add_operators(_name)


# Asked once: torch.compile has no rule for the question in torch 2.11.
_AUTOCAST = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu"))
)


autocast_is_on_somewhere = torch._C._is_any_autocast_enabled
# How many see the operators of plain tensors, as a counter of operations does.
dispatch_modes = torch._C._len_torch_dispatch_stack


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on for the device; there are devices that it does not know, as meta."""
    if not torch.compiler.is_compiling() and not autocast_is_on_somewhere():  # for a device's type takes 2 us
        return False
    return device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)


_interpreter = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing


def transforms_are_off() -> bool:
    """No functorch transform is at work, no level of forward-mode AD is open, and torch.jit doesn't trace: a
    cheap first question."""
    return _interpreter() is None and forward_ad._current_level < 0 and not _is_tracing()


def under_transform(*tensors: torch.Tensor | None) -> bool:
    """Whether a functorch transform, forward-mode AD or torch.jit.trace is at work: kernels have no rule for
    these, the reference formulas compose with all of them."""
    if torch.compiler.is_compiling() or transforms_are_off():
        return False
    return (
        _interpreter() is not None
        or _is_tracing()
        or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    )


def batched(*gradients: torch.Tensor | None) -> bool:
    """Whether a backward runs for a batch of upstream gradients at once (``is_grads_batched``, a vmap
    over it): kernels can't read these, the reference formulas can."""
    if _interpreter() is not None:
        return True
    for g in gradients:
        if g is not None and torch._C._functorch.is_legacy_batchedtensor(g):
            return True
    return False


def asks_for_graph(*gradients: torch.Tensor | None) -> bool:
    """Whether a backward for these is to be differentiated itself (``create_graph=True``) or runs for a batch of
    them: the reference formulas can. Not where compiled autograd traces it, with gradients enabled: nothing
    differentiates what comes of that."""
    return not is_dynamo_compiling() and (torch.is_grad_enabled() or batched(*gradients))


def are_plain(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether kernels for CPUs may read these, and nothing stands between, but perhaps autograd."""
    for x in tensors:
        if type(x) not in PLAIN or not x.is_cpu or x.layout is not torch.strided:
            return False
    return not (
        _forced == "eager"
        or dispatch_modes() > 0
        or torch._C._len_torch_function_stack() > 0
        or under_transform(*tensors)
    )


def is_recorded(gradient: torch.Tensor) -> bool:
    """Whether a backward's own operations are watched: compiled autograd traces it, a graph of it is made, it is
    batched, or a mode sees them. torch's operators serve it then."""
    return is_dynamo_compiling() or torch.is_grad_enabled() or batched(gradient) or dispatch_modes() > 0


def requires_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether the result of a call with these is to be differentiable."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def eager_call(function: type[torch.autograd.Function]):
    """function.apply without its search for functorch's wrappers, a microsecond for each of the arguments:
    callers ask `under_transform` first."""
    return super(torch.autograd.Function, function).apply


def reference_backward(function, inputs, needs_grad, grad_outputs):
    """Gradients of ``function(*inputs)``: differentiable where gradients are, as in a double backward.

    Args:
        function: plain PyTorch formula, returning a tensor or a tuple of tensors.
        inputs: its positional arguments.
        needs_grad: a bool per input.
        grad_outputs: a tensor or None per output.

    Returns:
        A tensor or None per input.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: a tensor that is passed twice gets its gradient at each place.
        inputs = [
            x.view_as(x) if need and isinstance(x, torch.Tensor) else x
            for x, need in zip(inputs, needs_grad, strict=True)
        ]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None and y.requires_grad
        ]
        wanted = [x for x, need in zip(inputs, needs_grad, strict=True) if need]
        if not pairs or not wanted:
            return tuple(None for _ in inputs)
        grads = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=differentiable,
                allow_unused=True,
            )  # fmt: skip
        )
    return tuple(next(grads) if need else None for need in needs_grad)
