"""Choice of backend and what the operators' autograd formulas share.

Each operator has a module here: its fake kernel, its autograd formula and its entry point, which the
public functions of `fastlm.functional` call. Importing this package registers them all.
"""

import os
import warnings

import torch
from torch.autograd import forward_ad
from torch.library import Library

from fastlm import _C, cuda, triton

KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# ---- families of kernels -------------------------------------------------------------------
# A family is a module that offers
#   missing()                 why it can serve no call here, or None
#   note()                    a few words for `fastlm info`
#   devices()                 types of the devices whose tensors it takes in this process
#   refuses(function, tensor) why it has no kernel for a call whose main input this is, or None
#   MODULES, kernel(name)     its operators, and the function behind one; a family that registers its
#                             operators itself, as the compiled libraries do, has neither
# and adding a family is one entry here (tests/simt makes its own from outside).
FAMILIES = {"cpu": _C, "cuda": cuda, "triton": triton}

# The operators behind a public function.
OPERATORS = {
    "scaled_dot_product_attention": ("attention_forward", "attention_backward"),
    "varlen_attn": ("varlen_attention_forward", "varlen_attention_backward"),
    "cross_entropy": ("cross_entropy", "cross_entropy_backward"),
    "linear_cross_entropy": ("linear_cross_entropy", "linear_cross_entropy_backward"),
    "gru": ("gru_layer", "gru_layer_backward"),
    "gru_cell": ("gru_layer", "gru_layer_backward"),
}

# Of these families the first that is there serves a function's tensors on a GPU: a guess, until a report
# of `make gpu-check` says which one is faster.
ON_GPU = {
    "scaled_dot_product_attention": ("cuda", "triton"),
    "varlen_attn": ("cuda", "triton"),
    "cross_entropy": ("cuda", "triton"),
    "linear_cross_entropy": ("cuda", "triton"),
    "gru": ("cuda", "triton"),
    "gru_cell": ("cuda", "triton"),
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


def _on_gpu(function: str) -> str:
    """The family that serves a function's tensors on a GPU, as far as it can be told without asking one."""
    there = {
        "cuda": cuda.unusable() is None and cuda.operators.issuperset(OPERATORS[function]),
        "triton": triton.installed() and (torch.version.cuda or torch.version.hip),  # AMD's are "cuda" too
    }
    return next((name for name in ON_GPU[function] if there[name]), "eager")


# Device type -> function -> the family that serves it unless another is forced.
_native = {
    "cpu": dict.fromkeys(OPERATORS, "cpu"),
    "meta": dict.fromkeys(OPERATORS, "cpu"),
    "cuda": {function: _on_gpu(function) for function in OPERATORS},
}
_forced: str | None = None
# Device type, operator -> the family that serves it, and its registration over the compiled libraries'.
_registered: dict[tuple[str, str], tuple[str, Library]] = {}


def _register() -> None:
    """Registers the operators of families in Python where they serve, forced or not, and no others."""
    wanted = {}
    for device in ("cpu", "cuda"):
        for function, operators in OPERATORS.items():
            forced = _forced in FAMILIES and device in FAMILIES[_forced].devices()
            name = _forced if forced else _native[device][function]
            modules = getattr(FAMILIES.get(name), "MODULES", ())
            wanted |= {(device, operator): name for operator in operators if operator in modules}
    for key, (name, library) in list(_registered.items()):
        if wanted.get(key) != name:
            library._destroy()
            del _registered[key]
    for (device, operator), name in wanted.items():
        if (device, operator) not in _registered:
            _registered[device, operator] = name, _registration(name, operator, device)


def _registration(name: str, operator: str, device: str) -> Library:
    """Of a family's operator for the tensors of a device type, while the result lives."""
    family, library = FAMILIES[name], Library("fastlm", "IMPL")

    def implementation(*args):
        return family.kernel(operator)(*args)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is the aim
        library.impl(operator, implementation, device.upper(), allow_override=True)
    return library


# ---- choice --------------------------------------------------------------------------------


def _checked(name: str | None, source: str) -> str | None:
    if not name:
        return None
    if name not in backends():
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(backends())}")
    reason = missing_backends().get(name)
    if reason:
        raise RuntimeError(f"{source}: backend {name!r} is not available: {reason}")
    return name


def _force(name: str | None) -> None:
    global _forced
    if name != _forced:
        _forced = name
        _register()


_register()
_force(_checked(os.environ.get("FASTLM_BACKEND"), "FASTLM_BACKEND"))


class use_backend:
    """Force one backend for every call of fastlm, from now on or inside a ``with`` block.

    Args:
        name (str or None): ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"eager"`` (plain PyTorch);
            ``None`` goes back to the choice by device, dtype and features.

    A call that the forced backend can't serve raises :class:`RuntimeError` with the reason. The
    environment variable ``FASTLM_BACKEND`` does the same for a whole program. The choice holds for all
    threads. Forward and backward may run on different backends: what one keeps, the other reads.

    Example::

        with fastlm.use_backend("eager"):
            reference = fastlm.scaled_dot_product_attention(q, k, v)
    """

    def __init__(self, name: str | None):
        self._previous = _forced
        _force(_checked(name, "fastlm.use_backend"))

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc) -> None:
        _force(self._previous)


def choose_backend(function: str, tensor: torch.Tensor, unsupported: str | None = None) -> str:
    """The backend for a call of ``fastlm.<function>`` whose main input is `tensor`.

    `unsupported` says why no kernel covers the call's features, if none does; plain PyTorch serves
    it then, unless another backend is forced.
    """
    device, dtype = tensor.device.type, tensor.dtype
    name = _native.get(device, {}).get(function, "eager") if _forced is None else _forced
    if name == "eager":
        return name
    reason = unsupported
    if reason is None:
        if device != "meta" and device not in FAMILIES[name].devices():
            reason = f"no kernel for device {tensor.device}"
        elif dtype not in KERNEL_DTYPES:
            reason = f"no kernel for {dtype}"
        else:
            reason = FAMILIES[name].refuses(function, tensor)
    if reason is None:
        return name
    if _forced is None:
        return "eager"
    raise RuntimeError(f"fastlm.{function}: backend {_forced!r} is forced, but there is {reason}")


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on for the device; there are devices that it does not know, as meta."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def under_transform(*tensors: torch.Tensor | None) -> bool:
    """Whether a functorch transform or forward-mode AD is at work: kernels have no rule for these,
    the reference formulas compose with all of them."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def batched(*gradients: torch.Tensor | None) -> bool:
    """Whether a backward runs for a batch of upstream gradients at once (``is_grads_batched``, a vmap
    over it): kernels can't read these, the reference formulas can."""
    return torch._C._functorch.peek_interpreter_stack() is not None or any(
        g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients
    )


def reference_backward(function, inputs, needs_grad, grad_outputs):
    """Gradients of ``function(*inputs)`` as differentiable tensors: for double backward.

    Args:
        function: plain PyTorch formula, returning a tensor or a tuple of tensors.
        inputs: its positional arguments.
        needs_grad: a bool per input.
        grad_outputs: a tensor or None per output.

    Returns:
        A tensor or None per input.
    """
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
                create_graph=True,
                allow_unused=True,
            )  # fmt: skip
        )
    return tuple(next(grads) if need else None for need in needs_grad)
